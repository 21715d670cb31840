"""All maps of one cluster on one page: image, bands, maps of the mass, maps of the band."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pix2mass.report.cluster_map import ClusterMap, draw_composite, draw_signed, for_display, show
from pix2mass.report.drawing import BLUE, MASS_LABEL, STYLE, VERMILION, literal

_DEX, _ODDS = "dex per pixel", "log odds per pixel"
_COMPARED = {
    "gradient": ("gradient, all bands", "dex per unit of normalised flux"),
    "smoothgrad": ("SmoothGrad, all bands", "dex per unit of normalised flux"),
    "occlusion": ("occlusion", _DEX),
}
_CONTOURS = (0.25, 0.6)
"""Shares of a map's greatest value."""


def map_figure(maps: str | Path | Mapping[str, Any]) -> Figure:
    """Everything that ``pix2mass explain`` found out about one cluster.

    Rows of the figure: the image and the maps of the mass; each band with the contours of its integrated gradients; if
    they are there, what tells the band; if they are there, the maps of other methods. North is up, east left; the
    dashed circle is R500c of the predicted mass.

    Args:
        maps: the ``.npz`` file, or what it holds.

    Returns:
        The figure, not yet written.

    Raises:
        Pix2massError: the file is missing, broken, or lacks a map.
    """
    if isinstance(maps, str | Path):
        one = ClusterMap.load(Path(maps))
        with np.load(maps, allow_pickle=False) as arrays:
            maps = dict(arrays)
    else:
        one = ClusterMap.of(maps)
    bands, compared = "band_joint" in maps, [name for name in _COMPARED if name in maps]
    n_rows, n_bands = 2 + bands + bool(compared), len(one.bands)
    with mpl.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(13.0, 3.6 + 3.1 * (n_rows - 1)), layout="constrained")
        rows = iter(figure.subfigures(n_rows, 1, height_ratios=[3.7] + [3.1] * (n_rows - 1), squeeze=False)[:, 0])
        _draw_mass(next(rows).subplots(1, 4), one)
        for index, ax in enumerate(np.atleast_1d(next(rows).subplots(1, n_bands))):
            _draw_band(ax, one, index)
        if bands:
            row = next(rows)
            row.suptitle("Network 1: what makes it take each image for that band", x=0.01, ha="left")
            for index, ax in enumerate(np.atleast_1d(row.subplots(1, n_bands))):
                draw_signed(ax, one, np.asarray(maps["band_joint"], float)[index], _ODDS)
                found = float(np.asarray(maps["band_log_odds"])[index])
                ax.set_title(f"{one.bands[index]}: odds {_odds(found)}")
        if compared:
            axes = next(rows).subplots(1, 4)
            for ax, name in zip(axes, compared, strict=False):
                title, unit = _COMPARED[name]
                values = np.asarray(maps[name], float)
                draw_signed(ax, one, values.sum(axis=0) if values.ndim == 3 else values, unit)
                ax.set_title(title)
            for ax in axes[len(compared) :]:
                ax.axis("off")
        title = f"{literal(one.id)}:  {MASS_LABEL} = {one.log10_m500c:.2f} ± {one.log10_m500c_err:.2f}"
        figure.suptitle(f"{title},  z = {one.z:.3f}" if np.isfinite(one.z) else title, fontsize=12)
    return figure


def write_map_figure(maps: str | Path | Mapping[str, Any], path: str | Path) -> Path:
    """Draw :func:`map_figure` into a file; its ending says in which format. Returns the path."""
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    with mpl.rc_context(STYLE):
        map_figure(maps).savefig(part, dpi=130)
    os.replace(part, path)
    return path


def _draw_mass(axes: Any, one: ClusterMap) -> None:
    maps = one.of_mass()
    draw_composite(axes[0], one)
    _contour(axes[0], one, maps[0][2], "white")
    axes[0].set_title(f"image, contours of\nthe {maps[0][0]}")
    for ax, (title, _, values) in zip(axes[1:], maps, strict=True):
        draw_signed(ax, one, values, _DEX, contours=ax is axes[1])
        ax.set_title(title + (",\ncontours of the light" if ax is axes[1] else ""))


def _draw_band(ax: Axes, one: ClusterMap, index: int) -> None:
    """One band in grey with the contours of its integrated gradients."""
    flux = np.where(one.mask[index], np.nan, one.flux[index])
    seen = flux[np.isfinite(flux)]
    if not seen.size:
        ax.set_facecolor("0.8")
        ax.set_title(f"{one.bands[index]}: no usable pixels")
        return
    middle = float(np.median(seen))
    noise = 1.4826 * float(np.median(np.abs(seen - middle))) or 1.0
    shown = show(ax, one, np.arcsinh((flux - middle) / noise), cmap="Greys", vmin=-1.0, vmax=4.5)
    gradients = one.integrated_gradients[index]
    levels = _contour(ax, one, gradients, VERMILION, BLUE)
    ax.set_title(
        f"{one.bands[index]}: sum {gradients.sum():+.2f} dex\ncontours ±{', ±'.join(levels)} {_DEX}", fontsize=8
    )
    ax.figure.colorbar(shown, ax=ax, orientation="horizontal", fraction=0.05, pad=0.03, label="asinh(flux / noise)")


def _contour(ax: Axes, one: ClusterMap, values: np.ndarray, up: str, down: str | None = None) -> list[str]:
    """Contours of a smoothed map: of its positive part and, if it has a colour, of the negative one.

    Returns:
        The levels as text.
    """
    smooth = np.nan_to_num(for_display(values, 0.8)[0])
    scale = one.pixel_scale_arcsec
    x = one.half_width_arcsec - (np.arange(values.shape[1]) + 0.5) * scale
    y = -one.half_height_arcsec + (np.arange(values.shape[0]) + 0.5) * scale
    levels = [share * float(np.abs(smooth).max()) for share in _CONTOURS]
    for sign, colour in ((1, up), (-1, down)):
        reached = [level for level in levels if (sign * smooth).max() > level]
        if colour and reached:
            ax.contour(x, y, sign * smooth, reached, colors=colour, linewidths=0.9)
    return [f"{level:.1g}" for level in levels]


def _odds(log_odds: float) -> str:
    """Odds in words: "12 to 1", "1 to 3"."""
    ratio = np.exp(min(abs(log_odds), np.log(9999.0)))
    text = f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
    return f"{text} to 1" if log_odds >= 0 else f"1 to {text}"
