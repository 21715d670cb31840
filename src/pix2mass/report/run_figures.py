"""The figures of a run, each with a title and the text that stands in its place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, MultipleLocator, NullLocator

from pix2mass.report.cluster_map import draw_composite, draw_signed, read_maps
from pix2mass.report.drawing import (
    BLUE,
    GREY,
    INK,
    MASS_LABEL,
    ORANGE,
    STYLE,
    VERMILION,
    data_uri,
    new_figure,
)
from pix2mass.report.run_files import OutOfFold
from pix2mass.run import RunFolder
from pix2mass.types import Pix2massError

METHODS = {
    "network": "network (this run)",
    "richness": "richness and redshift",
    "richness_true": "true richness and redshift (mock only)",
    "redshift": "redshift alone",
    "constant": "constant (mean label)",
    "shuffled": "network, shuffled labels (null test)",
}
"""Name in metrics.json -> name in tables, in the order of the tables."""

Picture = dict[str, str]
"""``src``, ``title`` and ``alt`` of an <img>."""

_MANY = 1500
"""Above so many clusters, points are drawn as pixels and not as shapes."""

_REDSHIFT_COLOURS = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.25, 0.88, 256)), "redshift")
"""Viridis without its darkest and lightest parts, which vanish on a dark and on a light page."""

_BIN_NAMES = {
    "all": "all clusters",
    "predicted_mass": "predicted",
    "z": "z",
    "true_mass": "true mass",
    "label_mass": "label",
}


# ---- masses --------------------------------------------------------------------------------------------------------


def _draw_predicted(ax: Axes, out_of_fold: OutOfFold) -> None:
    """Predicted against reference mass with 68% bars, coloured by redshift where all are known."""
    x, y, z = out_of_fold.reference, out_of_fold.mass, out_of_fold.z
    many = len(x) > _MANY
    bars = LineCollection(
        [[(at, low), (at, high)] for at, low, high in zip(x, *out_of_fold.bar, strict=True)],
        linewidths=0.7,
        alpha=min(0.6, max(0.15, 150 / len(x))),
        zorder=1,
        rasterized=many,
    )
    ax.add_collection(bars)
    colour: dict[str, Any] = {"color": BLUE}
    if np.isfinite(z).all():
        bars.set(array=z, cmap=_REDSHIFT_COLOURS)
        colour = {"c": z, "cmap": _REDSHIFT_COLOURS}
    else:
        bars.set_color(BLUE)
    points = ax.scatter(x, y, s=11 if len(x) > 150 else 20, linewidths=0, zorder=2, rasterized=many, **colour)
    if "cmap" in colour:
        ax.figure.colorbar(points, ax=ax, label="redshift", pad=0.02)
    low, high = np.nanmin([x, y]) - 0.1, np.nanmax([x, y]) + 0.1
    ax.plot([low, high], [low, high], color=VERMILION, lw=1.3, zorder=3, label="1:1")
    ax.set(
        xlim=(low, high),
        ylim=(low, high),
        xlabel=f"{out_of_fold.reference_name} {MASS_LABEL}",
        ylabel=f"predicted {MASS_LABEL}",
    )
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(0.5))
    ax.legend(loc="upper left")


def _draw_residual(ax: Axes, x: np.ndarray, residual: np.ndarray, xlabel: str, log: bool = False) -> None:
    ax.axhline(0, color=VERMILION, lw=1.3)
    ax.scatter(x, residual, s=8, color=BLUE, alpha=0.35, linewidths=0, rasterized=len(x) > _MANY)
    order = np.argsort(x)
    groups = np.array_split(order, max(2, min(8, len(x) // 12)))
    middle = [np.median(x[group]) for group in groups]
    median = [np.median(residual[group]) for group in groups]
    low, high = (np.array([np.percentile(residual[group], q) for group in groups]) for q in (16, 84))
    ax.fill_between(middle, low, high, color=ORANGE, alpha=0.3, lw=0, label="16 to 84 per cent")
    ax.plot(middle, median, "o-", color=INK, ms=4, lw=1.2, label="median")
    if log:
        ax.set_xscale("log")
        ticks = [tick for tick in (2, 5, 10, 20, 50, 100, 200) if x.min() <= tick <= x.max()]
        if len(ticks) > 1:
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
            ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel=xlabel, ylabel="predicted − reference (dex)")
    limit = max(0.1, 1.1 * float(np.percentile(np.abs(residual), 99.5)))
    ax.set_ylim(-limit, 1.25 * limit)
    ax.legend(loc="upper center", ncols=2, fontsize=8.5)


def mass_pictures(out_of_fold: OutOfFold, missing: list[str]) -> list[Picture]:
    """Predicted against reference mass, and residuals against mass, redshift and richness.

    Args:
        out_of_fold: the run's masses.
        missing: gets a sentence for each figure that cannot be drawn.
    """
    name, residual = out_of_fold.reference_name, out_of_fold.residual
    pictures = [
        {
            "title": f"Predicted against {name} mass, with 68% error bars, coloured by redshift",
            "alt": f"Scatter plot of predicted against {name} log10 M500c of {len(out_of_fold)} clusters with 68 per "
            "cent error bars, coloured by redshift, and the 1:1 line. Mean absolute error "
            f"{out_of_fold.mae_dex():.3f} dex.",
            "src": data_uri(lambda ax: _draw_predicted(ax, out_of_fold), 4.6, 3.9),
        }
    ]
    wanted = {
        "mass": (out_of_fold.reference, f"{name} {MASS_LABEL}", False),
        "redshift": (out_of_fold.z, "redshift", False),
        "richness": (out_of_fold.richness, r"richness $\lambda$", True),
    }
    for what, (x, xlabel, log) in wanted.items():
        usable = np.isfinite(x) & np.isfinite(residual) & ((x > 0) | (not log))
        if usable.sum() < 2:
            missing.append(f"{what} is not known: no figure of residuals against {what}")
            continue
        pictures.append(
            {
                "title": f"Residuals against {what}",
                "alt": f"Predicted minus {name} log10 M500c in dex against {what}, with running median and 16 to 84 "
                f"per cent range. Mean {residual[usable].mean():+.3f} dex.",
                "src": data_uri(
                    lambda ax, x=x, usable=usable, xlabel=xlabel, log=log: _draw_residual(
                        ax, x[usable], residual[usable], xlabel, log
                    ),
                ),
            }
        )
    return pictures


# ---- errors --------------------------------------------------------------------------------------------------------


def _draw_coverage(ax: Axes, out_of_fold: OutOfFold) -> None:
    expected = np.linspace(0.02, 0.98, 49)
    found = [out_of_fold.inside(share).mean() for share in expected]
    error = np.sqrt(expected * (1 - expected) / len(out_of_fold))
    ax.fill_between(
        expected, expected - error, expected + error, color=GREY, alpha=0.35, lw=0, label="exact, sampling error"
    )
    ax.plot([0, 1], [0, 1], color=VERMILION, lw=1.3)
    ax.plot(expected, found, color=BLUE, lw=1.8, label="this run")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="expected share inside the interval", ylabel="found share")
    ax.set_aspect("equal")
    ax.legend(loc="upper left", fontsize=8.5)


def _draw_pit(ax: Axes, counts: np.ndarray) -> None:
    n, bins = counts.sum(), len(counts)
    expected = n / bins
    error = math.sqrt(n * (1 / bins) * (1 - 1 / bins))
    ax.bar((np.arange(bins) + 0.5) / bins, counts, width=0.92 / bins, color=BLUE, alpha=0.75, label="clusters")
    ax.axhspan(expected - error, expected + error, color=GREY, alpha=0.45, lw=0, label="flat, sampling error")
    ax.axhline(expected, color=VERMILION, lw=1.3)
    ax.set(xlim=(0, 1), ylim=(0, 1.3 * max(counts.max(), expected + error)))
    ax.set(xlabel="predicted share of probability below the reference mass", ylabel="clusters")
    ax.legend(loc="upper center", ncols=2, fontsize=8.5)


def _draw_bin_coverage(ax: Axes, rows: list[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    for level, exact, colour, marker in (("68", 0.68, BLUE, "o"), ("95", 0.95, ORANGE, "s")):
        ax.axvline(exact, color=colour, lw=1, ls="--")
        ax.errorbar(
            [row[f"coverage_{level}"] for row in rows],
            places,
            xerr=[row.get(f"coverage_{level}_error") or 0.0 for row in rows],
            fmt=marker,
            color=colour,
            ms=5,
            elinewidth=1.3,
            label=f"{level}%, line: exact",
        )
    ax.set_yticks(places, [f"{bin_name(row)}\n{row.get('n', '?')} clusters" for row in rows], fontsize=8.5)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlim(min(0.5, *(row["coverage_68"] - 0.05 for row in rows)), 1.01)
    ax.set_xlabel("share of clusters inside the interval")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8.5)


def bin_name(row: dict[str, Any]) -> str:
    """What a row of metrics.json's calibration is about, e.g. "z 0.10 to 0.20"."""
    what = _BIN_NAMES.get(str(row.get("what")), str(row.get("what")))
    if row.get("what") == "all" or not isinstance(row.get("low"), float):
        return what
    return f"{what} {row['low']:.2f} to {row['high']:.2f}"


def calibration_pictures(
    out_of_fold: OutOfFold | None, pit: list[int], coverage: list[dict[str, Any]]
) -> list[Picture]:
    """Coverage of all central intervals, coverage in bins, and the histogram of the probability integral transform.

    Args:
        out_of_fold: the run's masses, None if there are none.
        pit: clusters in bins of the probability that the prediction puts below the reference mass; may be empty.
        coverage: rows with ``what``, ``low``, ``high``, ``n``, ``coverage_68``, ``coverage_95`` and their errors.
    """
    pictures = []
    if out_of_fold is not None:
        pictures.append(
            {
                "title": "Coverage of central intervals of every size",
                "alt": "Share of clusters found inside the central interval against the share expected, with the "
                f"sampling error about exact coverage. At 68 per cent: {out_of_fold.inside(0.68).mean():.2f}.",
                "src": data_uri(lambda ax: _draw_coverage(ax, out_of_fold)),
            }
        )
    if pit:
        counts = np.asarray(pit, float)
        pictures.append(
            {
                "title": "Probability integral transform: flat if the errors are right, a hill if they are too wide, "
                "a bowl if too narrow",
                "alt": f"Histogram of {int(counts.sum())} clusters over the share of predicted probability below the "
                f"reference mass: {', '.join(f'{count:.0f}' for count in counts)} in {len(counts)} equal bins; flat "
                f"would be {counts.mean():.0f}.",
                "src": data_uri(lambda ax: _draw_pit(ax, counts)),
            }
        )
    if coverage:
        text = "; ".join(f"{bin_name(row)} {row['coverage_68']:.2f} and {row['coverage_95']:.2f}" for row in coverage)
        pictures.append(
            {
                "title": "Coverage of the 68% and 95% intervals, for all and in bins",
                "alt": f"Share of clusters inside the 68 and the 95 per cent interval with its error: {text}.",
                "src": data_uri(lambda ax: _draw_bin_coverage(ax, coverage), 4.6, max(3.0, 1.1 + 0.36 * len(coverage))),
            }
        )
    return pictures


# ---- methods, bands, learning curve --------------------------------------------------------------------------------


def _draw_methods(ax: Axes, methods: dict[str, dict[str, float]]) -> None:
    mae = np.array([values["mae_dex"] for values in methods.values()])
    spread = np.array([values.get("mae_fold_spread_dex", 0.0) for values in methods.values()])
    rows = range(len(methods))
    colours = [BLUE if name == "network" else ORANGE if name.startswith("richness") else "0.6" for name in methods]
    ax.barh(rows, mae, xerr=spread, color=colours, error_kw={"elinewidth": 1, "ecolor": INK})
    names = [METHODS.get(name, name) for name in methods]
    ax.set_yticks(rows, [name.replace(" (", "\n(").replace(", ", ",\n") for name in names])
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8.5, length=0)
    for row, value in enumerate(mae):
        ax.text(value + spread[row] + 0.01 * mae.max(), row, f"{value:.3f}", va="center", fontsize=9)
    ax.set_xlim(0, 1.15 * (mae + spread).max())
    ax.set_xlabel("mean absolute error (dex)")


def methods_picture(methods: dict[str, dict[str, float]]) -> Picture:
    """Mean absolute error of each method, as bars."""
    text = ", ".join(f"{METHODS.get(name, name)} {values['mae_dex']:.3f}" for name, values in methods.items())
    return {
        "title": "Mean absolute error of each method; the line is its spread over folds",
        "alt": f"Bar chart of the mean absolute error in dex: {text}.",
        "src": data_uri(lambda ax: _draw_methods(ax, methods), 4.6, 0.9 + 0.48 * len(methods)),
    }


def _draw_confusion(ax: Axes, confusion: np.ndarray, bands: str) -> None:
    share = confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    image = ax.imshow(share, vmin=0, vmax=1, cmap="cividis")
    for (row, column), value in np.ndenumerate(share):
        colour = "black" if value > 0.55 else "white"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(bands)), list(bands))
    ax.set_yticks(range(len(bands)), list(bands))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="band told by network 1", ylabel="true band")
    ax.figure.colorbar(image, ax=ax, label="share of the true band's images", pad=0.02)


def confusion_picture(confusion: np.ndarray, bands: str) -> Picture:
    """How often network 1 takes each band for each other; ``confusion`` is (n_bands, n_bands) counts, true in rows."""
    diagonal = np.diag(confusion) / np.maximum(1, confusion.sum(axis=1))
    each = ", ".join(f"{band} {share:.2f}" for band, share in zip(bands, diagonal, strict=True))
    return {
        "title": "Bands told by network 1",
        "alt": f"Band confusion matrix. Share told rightly per band: {each}.",
        "src": data_uri(lambda ax: _draw_confusion(ax, confusion, bands)),
    }


def confusion_figure(confusion: np.ndarray, bands: str, path: str | Path) -> None:
    """Draw a band confusion matrix into a file.

    Args:
        confusion: (n_bands, n_bands) counts, true band (rows) against told band (columns).
        bands: names of the bands, in order.
        path: picture to write; its ending says in which format.

    Raises:
        Pix2massError: the matrix does not fit the bands.
    """
    confusion = np.asarray(confusion)
    if confusion.shape != (len(bands), len(bands)):
        raise Pix2massError(
            f"confusion: expected shape {(len(bands), len(bands))} for {bands!r}, got {confusion.shape}"
        )
    with mpl.rc_context(STYLE):
        figure, ax = new_figure(4.8, 4.0)
        _draw_confusion(ax, confusion, bands)
        figure.savefig(path, dpi=160)


def _draw_learning(
    ax: Axes, points: list[dict[str, float]], fit: dict[str, float], what: str, richness_dex: float | None
) -> None:
    n, mae = (np.array([point[name] for point in points], float) for name in ("n", "mae_dex"))
    error = np.array([point.get("mae_err_dex") or 0.0 for point in points])
    if {"slope", "intercept"} <= set(fit):
        x = np.geomspace(n.min() / 1.25, n.max() * 1.25, 50)
        y = 10 ** (fit["intercept"] + fit["slope"] * np.log10(x))
        ax.plot(x, y, color=VERMILION, lw=1.4, label=f"fit: MAE ∝ n$^{{{_slope_text(fit)}}}$")
    richness = np.array([point.get("richness_mae_dex") or np.nan for point in points])
    if np.isfinite(richness).any():
        ax.plot(n, richness, color=ORANGE, lw=1.4, ls="--", marker="s", ms=4, label="richness and redshift")
    elif richness_dex is not None:
        ax.axhline(richness_dex, color=ORANGE, lw=1.4, ls="--", label="richness and redshift, all labels")
    ax.errorbar(n, mae, yerr=error, fmt="o", color=BLUE, ms=5, elinewidth=1.3, label="network")
    ax.set_xlim(n.min() / 1.25, n.max() * 1.25)
    ax.set(xscale="log", yscale="log", xlabel=f"number of {what}", ylabel="mean absolute error (dex)")
    ax.xaxis.set_major_locator(FixedLocator(n.tolist()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(FixedLocator(MaxNLocator(6).tick_values(low, high)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
    ax.set_ylim(low, high)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8.5)


def _slope_text(fit: dict[str, float]) -> str:
    error = fit.get("slope_err")
    return f"{fit['slope']:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def learning_pictures(curve: dict[str, Any], richness_dex: float | None) -> list[Picture]:
    """Mean absolute error against the number of labels and of unlabelled images, log10 MAE = intercept + slope log10 n.

    Args:
        curve: learning_curve.json.
        richness_dex: mean absolute error of richness and redshift, drawn beside where the curve has none of its own;
            None if unknown.
    """
    pictures = []
    for name, what in (("labels", "labels"), ("unlabelled", "unlabelled clusters")):
        points = [point for point in curve.get(name) or [] if {"n", "mae_dex"} <= set(point)]
        if len(points) < 2:
            continue
        fit = (curve.get("fit") or {}).get(name) or {}
        text = ", ".join(f"{point['mae_dex']:.3f} with {point['n']:,.0f}" for point in points)
        rival = ", ".join(f"{p['richness_mae_dex']:.3f}" for p in points if p.get("richness_mae_dex"))
        beside = f" Richness and redshift, fitted to as many: {rival}." if rival else ""
        slope = f" Fitted power of the number: {_slope_text(fit)}." if "slope" in fit else ""
        pictures.append(
            {
                "title": f"Error against the number of {what}",
                "alt": f"Mean absolute error in dex against the number of {what}: {text}.{slope}{beside}",
                "src": data_uri(
                    lambda ax, points=points, fit=fit, what=what: _draw_learning(ax, points, fit, what, richness_dex)
                ),
            }
        )
    return pictures


# ---- the run in one picture ----------------------------------------------------------------------------------------


def overview_figure(folder: RunFolder, path: str | Path) -> None:
    """Draw the run in one picture of 1600 x 700 pixels: predicted against true mass, and two clusters with their maps.

    Args:
        folder: a run with predictions and at least one file in maps/.
        path: picture to write; its ending says in which format.

    Raises:
        Pix2massError: predictions or maps are missing or broken.
    """
    out_of_fold = OutOfFold.read(folder)
    maps, problems = read_maps(folder)
    if not maps:
        raise Pix2massError(
            f"{folder.path}: no attribution maps to draw{': ' if problems else ''}{'; '.join(problems)}"
        )
    # The lightest and the heaviest show best what changes with mass.
    chosen = [maps[0], maps[-1]] if len(maps) > 1 else maps
    with mpl.rc_context({**STYLE, "font.size": 13}):
        figure = Figure(figsize=(16, 7), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1.12, 1])  # type: ignore[misc]
        ax = left.subplots()
        _draw_predicted(ax, out_of_fold)
        scores = {name: out_of_fold.mae_dex(name) for name in ("richness", "constant")}
        beside = ", ".join(f"{name} {mae:.3f}" for name, mae in scores.items() if math.isfinite(mae))
        kind = "mock" if out_of_fold.reference_name == "true" else "real"
        note = f" ({beside})" if beside else ""
        ax.set_title(f"{len(out_of_fold)} {kind} clusters, MAE {out_of_fold.mae_dex():.3f} dex{note}", fontsize=14)
        bias = f"bias {out_of_fold.residual.mean():+.3f} dex"
        ax.text(0.98, 0.03, bias, transform=ax.transAxes, ha="right", va="bottom", color="0.3")
        axes = right.subplots(len(chosen), 2, squeeze=False)
        for row, one in zip(axes, chosen, strict=True):
            draw_composite(row[0], one)
            row[0].set_title(f"{MASS_LABEL} = {one.log10_m500c:.2f} ± {one.log10_m500c_err:.2f}", fontsize=12)
            draw_signed(row[1], one, one.of_mass()[0][2], "dex per pixel", contours=True)
            row[1].set_title(f"what the networks used, z = {one.z:.2f}", fontsize=12)
        figure.savefig(path, dpi=100)
