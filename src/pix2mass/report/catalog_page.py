"""The report of a pair of cluster catalogues: where the labels lie, how they agree, and what richness makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from astropy.table import QTable
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter

from pix2mass.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    GROUND,
    INK,
    MASS_LABEL,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    data_uri,
    literal,
    numbers,
    page_template,
)
from pix2mass.run import write_atomic
from pix2mass.types import Pix2massError

_COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PIVOT_RICHNESS, _PIVOT_Z = 40.0, 0.3


@dataclass(frozen=True)
class RichnessFit:
    """Least squares of log10 M500c = a + b log10(richness / 40) + c log10((1 + z) / 1.3).

    Attributes:
        a: log10 mass at richness 40 and z = 0.3.
        b: slope with richness.
        c: slope with 1 + z.
        rms_dex: root mean square about the fit, label noise included.
        nmad_dex: robust scatter, 1.4826 times the median absolute residual.
        n: clusters.
    """

    a: float
    b: float
    c: float
    rms_dex: float
    nmad_dex: float
    n: int


def fit_richness(log10_m500c: np.ndarray, richness: np.ndarray, z: np.ndarray) -> RichnessFit:
    """Fit the plane that the page draws; rows without a mass, a richness or a redshift are left out.

    Args:
        log10_m500c: shape (n,).
        richness: shape (n,).
        z: shape (n,).

    Raises:
        Pix2massError: fewer than 4 clusters have all three.
    """
    with np.errstate(invalid="ignore"):
        usable = np.isfinite(log10_m500c) & np.isfinite(z) & (richness > 0)
    if usable.sum() < 4:
        raise Pix2massError(
            f"{int(usable.sum())} clusters have mass, richness and redshift, expected at least 4 to fit"
        )
    y = log10_m500c[usable]
    design = np.stack(
        [
            np.ones(len(y)),
            np.log10(richness[usable] / _PIVOT_RICHNESS),
            np.log10((1 + z[usable]) / (1 + _PIVOT_Z)),
        ],
        axis=1,
    )
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ solution
    a, b, c = (float(value) for value in solution)
    nmad = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    return RichnessFit(a, b, c, float(np.sqrt(np.mean(residual**2))), nmad, len(y))


# ---- figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sources:
    """The label sources of a table, commonest first, each with its colour and marker."""

    names: tuple[str, ...]
    of_row: np.ndarray

    @classmethod
    def of(cls, table: QTable, order: list[str]) -> _Sources:
        of_row = np.asarray(table["label_source"], str)
        present = [name for name in order if (of_row == name).any()]
        return cls((*present, *sorted(set(of_row) - set(present))), of_row)

    def style(self, name: str) -> tuple[str, str]:
        number = self.names.index(name)
        return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]

    def scatter(self, ax: Axes, x: np.ndarray, y: np.ndarray, size: float = 13, alpha: float = 0.55) -> None:
        """Points by source, drawn in one mixed order so that no source hides another."""
        order = np.random.default_rng(0).permutation(len(x))
        for part in np.array_split(order, 24):
            for name in self.names:
                rows = part[self.of_row[part] == name]
                colour, marker = self.style(name)
                ax.scatter(
                    x[rows], y[rows], s=size, c=colour, marker=marker, alpha=alpha, linewidths=0, rasterized=True
                )

    def legend(self, ax: Axes, **options: Any) -> None:
        """One entry per source with its number of clusters."""
        handles = [
            Line2D([], [], ls="", marker=self.style(name)[1], color=self.style(name)[0], ms=5, label=label)
            for name in self.names
            for label in [f"{literal(name)} ({int((self.of_row == name).sum())})"]
        ]
        ax.legend(handles=handles, fontsize=8.5, handletextpad=0.2, **options)


def _draw_sky(ax: Axes, labelled: QTable, unlabelled: QTable, sources: _Sources) -> None:
    """Equal-area map (Mollweide), right ascension growing to the left, centred on 12 h."""
    figure, place = ax.figure, ax.get_subplotspec()
    ax.remove()
    sky: Any = figure.add_subplot(place, projection="mollweide")  # type: ignore[union-attr]

    def where(table: QTable) -> tuple[np.ndarray, np.ndarray]:
        return np.deg2rad(180.0 - numbers(table, "ra_deg")), np.deg2rad(numbers(table, "dec_deg"))

    sky.scatter(*where(unlabelled), s=1.2, c="0.72", linewidths=0, rasterized=True)
    sources.scatter(sky, *where(labelled), size=9, alpha=0.8)
    ticks = np.arange(30, 360, 60)
    sky.set_xticks(np.deg2rad(180.0 - ticks), [f"{tick}°" for tick in ticks])
    sky.set_yticks(np.deg2rad([-60, -30, 0, 30, 60]), ["−60°", "−30°", "0°", "+30°", "+60°"])
    sky.tick_params(labelsize=8)
    for label in sky.get_xticklabels():  # they stand on the equator, among the clusters
        label.set(path_effects=[withStroke(linewidth=3, foreground=GROUND)], zorder=10)
    sky.grid(color=GREY, alpha=0.5, lw=0.5)
    sky.set_axisbelow(False)
    sky.set_xlabel("right ascension (ICRS)", labelpad=10)
    sky.set_ylabel("declination (ICRS)")
    sources.legend(sky, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def _draw_mass_redshift(ax: Axes, labelled: QTable, sources: _Sources) -> None:
    sources.scatter(ax, numbers(labelled, "z"), numbers(labelled, "log10_m500c"))
    ax.set(xlabel="redshift", ylabel=MASS_LABEL)
    sources.legend(ax, loc="lower right")


def _draw_richness(ax: Axes, labelled: QTable, sources: _Sources, fit: RichnessFit) -> None:
    """Masses carried to z = 0.3 with the fit's own redshift term, so that line and band are those of the fit."""
    richness, z = numbers(labelled, "richness"), numbers(labelled, "z")
    mass = numbers(labelled, "log10_m500c") - fit.c * np.log10((1 + z) / (1 + _PIVOT_Z))
    sources.scatter(ax, richness, mass)
    x = np.geomspace(np.nanmin(richness), np.nanmax(richness), 50)
    line = fit.a + fit.b * np.log10(x / _PIVOT_RICHNESS)
    ax.fill_between(x, line - fit.rms_dex, line + fit.rms_dex, color="0.5", alpha=0.22, lw=0, zorder=0)
    ax.plot(x, line, color=INK, lw=1.6)
    ax.set_xscale("log")
    ticks = [tick for tick in (20, 30, 50, 100, 200, 300) if x[0] * 0.95 <= tick <= x[-1] * 1.05]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=r"richness $\lambda$", ylabel=f"{MASS_LABEL}, carried to $z = {_PIVOT_Z}$")
    sources.legend(ax, loc="lower right")
    ax.text(0.02, 0.98, f"line: fit; band: rms {fit.rms_dex:.3f} dex", transform=ax.transAxes, va="top", fontsize=8.5)


def _draw_offsets(ax: Axes, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    rows = np.arange(len(before))
    ax.axvline(0, color=GREY, lw=1)
    for pairs, shift, colour, marker, label in (
        (before, -0.14, VERMILION, "o", "as published"),
        (after, 0.14, BLUE, "s", "offsets subtracted"),
    ):
        ax.errorbar(
            [one["offset_dex"] for one in pairs],
            rows + shift,
            xerr=[one["error_dex"] for one in pairs],
            fmt=marker,
            color=colour,
            ms=5,
            elinewidth=1.4,
            label=label,
        )
    names = [f"{literal(one['first'])} − {literal(one['second'])}\n{one['n']} clusters" for one in before]
    ax.set_yticks(rows, names, fontsize=8.5)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(r"median difference of $\log_{10} M_{500c}$ (dex)")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.2f}".replace("-", "−")))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8.5)


def _draw_errors(ax: Axes, labelled: QTable, sources: _Sources) -> None:
    error = numbers(labelled, "log10_m500c_err")
    edges = np.linspace(0, max(0.05, float(np.nanpercentile(error, 99.5))), 31)
    hatches = ("", "///", "...", "xx", "\\\\\\", "++")
    for number, name in enumerate(sources.names):
        known = error[(sources.of_row == name) & np.isfinite(error)]
        if len(known):
            colour = sources.style(name)[0]
            label = f"{literal(name)} (median {np.median(known):.3f})"
            face = mpl.colors.to_rgba(colour, 0.25)  # type: ignore[attr-defined]
            ax.hist(
                np.clip(known, None, edges[-1]), edges.tolist(), histtype="stepfilled", facecolor=face,
                edgecolor=colour, lw=1.4, hatch=hatches[number % len(hatches)], label=label,
            )  # fmt: skip
    ax.set(xlabel=r"published error of $\log_{10} M_{500c}$ (dex)", ylabel="clusters", xlim=(0, edges[-1]))
    ax.legend(fontsize=8.5)


# ---- the page ------------------------------------------------------------------------------------------------------


def write_catalog_report(folder: str | Path) -> Path:
    """Write report.html into a folder made by `pix2mass catalog build`: one page without outside parts.

    Args:
        folder: holds labelled.ecsv, unlabelled.ecsv and catalog.json.

    Returns:
        The page's path.

    Raises:
        Pix2massError: one of the three is missing or broken.
    """
    folder = Path(folder)
    labelled, unlabelled = (_read_table(folder / name) for name in ("labelled.ecsv", "unlabelled.ecsv"))
    summary = _read_json(folder / "catalog.json")
    sources = _Sources.of(labelled, [one["source"] for one in summary["matches"]])
    fit = fit_richness(numbers(labelled, "log10_m500c"), numbers(labelled, "richness"), numbers(labelled, "z"))
    error = numbers(labelled, "log10_m500c_err")
    without_error = {
        name: int((~np.isfinite(error[sources.of_row == name])).sum())
        for name in sources.names
        if not np.isfinite(error[sources.of_row == name]).all()
    }
    html = page_template("catalog.html.j2").render(
        summary=summary,
        labelled_meta=labelled.meta,
        fit=fit,
        per_source=_per_source(labelled, sources),
        figures=_figures(labelled, unlabelled, sources, fit, summary),
        without_error=without_error,
        scale_name=summary["scale"]["reference"],
        no_reddening=int((np.asarray(labelled["ebv_source"], str) == "none").sum()),
    )
    path = folder / "report.html"
    write_atomic(path, html)
    return path


def _figures(
    labelled: QTable, unlabelled: QTable, sources: _Sources, fit: RichnessFit, summary: dict[str, Any]
) -> dict[str, dict[str, str]]:
    z, mass = numbers(labelled, "z"), numbers(labelled, "log10_m500c")
    counts = ", ".join(f"{name} {int((sources.of_row == name).sum())}" for name in sources.names)
    made: dict[str, tuple[str, str, Callable[[Axes], None], float, float]] = {
        "sky": (
            "Clusters on the sky: grey without a mass, coloured by the source of the label",
            f"All-sky map in right ascension and declination of {len(unlabelled)} clusters without and "
            f"{len(labelled)} with a mass label ({counts}).",
            lambda ax: _draw_sky(ax, labelled, unlabelled, sources),
            8.6,
            5.0,
        ),
        "mass_redshift": (
            "Mass against redshift, by the source of the label",
            f"Scatter plot of log10 M500c from {np.nanmin(mass):.2f} to {np.nanmax(mass):.2f} against redshift from "
            f"{np.nanmin(z):.2f} to {np.nanmax(z):.2f}: {counts}.",
            lambda ax: _draw_mass_redshift(ax, labelled, sources),
            5.2,
            4.1,
        ),
        "richness": (
            "Richness against mass, with the least-squares fit and its scatter",
            f"Scatter plot of log10 M500c against richness with the line a = {fit.a:.3f}, b = {fit.b:.3f}, "
            f"c = {fit.c:.2f} and a band of its rms, {fit.rms_dex:.3f} dex, over {fit.n} clusters.",
            lambda ax: _draw_richness(ax, labelled, sources, fit),
            5.2,
            4.1,
        ),
    }
    scale = summary["scale"]
    if scale["before"]:
        text = "; ".join(f"{one['first']} minus {one['second']} {one['offset_dex']:+.3f}" for one in scale["before"])
        made["offsets"] = (
            "Differences between label sources on clusters that both have, with bootstrap errors",
            f"Median differences in dex before and after the offsets are taken off. Before: {text}.",
            lambda ax: _draw_offsets(ax, scale["before"], scale["after"]),
            5.2,
            max(2.4, 1.2 + 0.52 * len(scale["before"])),
        )
    error = numbers(labelled, "log10_m500c_err")
    if np.isfinite(error).any():
        made["errors"] = (
            "Errors of the labels, as published",
            f"Histogram by source of the error of log10 M500c; median {np.nanmedian(error):.3f} dex over "
            f"{int(np.isfinite(error).sum())} labels that have one.",
            lambda ax: _draw_errors(ax, labelled, sources),
            5.2,
            4.1,
        )
    return {
        name: {"title": title, "alt": alt, "src": data_uri(draw, width, height)}
        for name, (title, alt, draw, width, height) in made.items()
    }


def _per_source(labelled: QTable, sources: _Sources) -> list[dict[str, Any]]:
    z, mass, error = (numbers(labelled, name) for name in ("z", "log10_m500c", "log10_m500c_err"))
    rows = []
    for name in sources.names:
        own = sources.of_row == name
        known = error[own & np.isfinite(error)]
        rows.append(
            {
                "source": name,
                "n": int(own.sum()),
                "z": [float(value) for value in np.percentile(z[own], [0, 50, 100])],
                "mass": [float(value) for value in np.percentile(mass[own], [0, 50, 100])],
                "error": float(np.median(known)) if len(known) else None,
                "definition": str(labelled["original_definition"][int(np.flatnonzero(own)[0])]),
            }
        )
    return rows


def _read_table(path: Path) -> QTable:
    if not path.exists():
        raise Pix2massError(f"{path}: no such file; `pix2mass catalog build` makes it")
    try:
        return QTable.read(path, format="ascii.ecsv")
    except Exception as error:  # noqa: BLE001  the reader's errors are of many kinds
        raise Pix2massError(f"{path}: broken file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise Pix2massError(f"{path}: no such file; `pix2mass catalog build` makes it") from None
    except ValueError as error:
        raise Pix2massError(f"{path}: broken file: {error}") from None
