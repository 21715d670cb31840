"""A contact sheet: many cutouts of a store at one glance, in colour, with their redshifts and flags."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from pix2mass.report.drawing import STYLE, VERMILION, composite, literal
from pix2mass.types import Cutout, Pix2massError

_COLUMNS = 6
_TILE_IN = 1.75
_NAME_LENGTH = 24
_ENDINGS = (".png", ".pdf", ".svg")


@dataclass(frozen=True, eq=False)
class Tile:
    """One cutout with its name and redshift, NaN where it has none."""

    id: str
    z: float
    cutout: Cutout


def write_contact_sheet(tiles: Sequence[Tile], title: str, path: Path) -> Path:
    """Draw colour composites side by side, north up and east left; masked pixels are grey, flagged cutouts framed.

    Args:
        tiles: in the order of drawing, row by row.
        title: above all of them.
        path: picture to write; its ending says of which kind.

    Raises:
        Pix2massError: there is nothing to draw, or the ending is no picture's.
    """
    if not tiles:
        raise Pix2massError("there is nothing to draw: no cutout was chosen")
    if path.suffix not in _ENDINGS:
        raise Pix2massError(f"{path}: expected a name that ends in {', '.join(_ENDINGS)}")
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(columns, 3) * _TILE_IN, rows * (_TILE_IN + 0.3) + 0.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # type: ignore[union-attr]
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax in panels:
            ax.axis("off")
        for ax, tile in zip(panels, tiles, strict=False):
            _draw(ax, tile)
        what = composite(tiles[0].cutout.flux, tiles[0].cutout.mask, tiles[0].cutout.bands)[1]
        figure.suptitle(f"{literal(title)}\n{what}; grey: no pixels", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return path


def _draw(ax: Axes, tile: Tile) -> None:
    one = tile.cutout
    ax.axis("on")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.imshow(composite(one.flux, one.mask, one.bands)[0], origin="lower", interpolation="nearest")
    width_arcsec = one.pixel_scale_arcsec * one.flux.shape[-1]
    wide = f"{width_arcsec / 60:.1f}′" if width_arcsec >= 100 else f"{width_arcsec:.0f}″"
    name = tile.id if len(tile.id) <= _NAME_LENGTH else tile.id[: _NAME_LENGTH - 1] + "…"
    redshift = f"z {tile.z:.3f}" if tile.z == tile.z else "no z"
    ax.set_title(f"{literal(name)}\n{redshift}, {wide} wide", fontsize=6.5, pad=2)
    ax.spines[:].set_visible(True)
    if one.flags:
        ax.spines[:].set(color=VERMILION, linewidth=1.8)
        words = textwrap.fill(", ".join(name.lower().replace("_", " ") for name in one.flags.names), 30)
        ax.text(
            0.03,
            0.03,
            words,
            transform=ax.transAxes,
            fontsize=6,
            color="white",
            va="bottom",
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )
