"""The report of a run: its figures and one HTML page that opens from disk.

The page is made from the run folder alone. What the folder lacks is left out, with a sentence that says so.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from astropy.table import Table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, MultipleLocator

from pix2mass.cosmology import kpc_per_arcsec, r500c_kpc
from pix2mass.report.drawing import (
    BLUE,
    MASS_LABEL,
    ORANGE,
    STYLE,
    VERMILION,
    composite,
    data_uri,
    format_number,
    new_figure,
    numbers,
    page_template,
)
from pix2mass.run import RunFolder, write_atomic
from pix2mass.types import BANDS, Pix2massError

METHODS = {
    "network": "network (this run)",
    "richness": "richness and redshift",
    "richness_true": "true richness and redshift (mock only)",
    "redshift": "redshift alone",
    "constant": "constant (mean label)",
    "shuffled": "network, shuffled labels (null test)",
}
"""Name in metrics.json -> name in tables, in the order of the tables."""

_SCORES = {
    "mae_dex": "MAE",
    "mae_best_fold_dex": "best fold",
    "mae_worst_fold_dex": "worst fold",
    "mae_fold_spread_dex": "fold spread",
    "bias_dex": "bias",
    "rms_dex": "rms",
    "nmad_dex": "NMAD",
    "slope": "slope",
    "outlier_share": "outliers",
}
_BINS = {
    "z": "Redshift",
    "reference_mass": "Reference mass, log₁₀ M500c / M☉ (coverage need not hold in these bins)",
    "predicted_mass": "Predicted mass, log₁₀ M500c / M☉",
}

_MAP_NUMBERS = ("pixel_scale_arcsec", "z", "ra_deg", "dec_deg", "log10_m500c", "log10_m500c_err")
_MAP_IMAGES = ("flux", "integrated_gradients", "cam", "joint")


@dataclass
class ClusterMap:
    """What a file maps/NAME.npz holds about one cluster.

    Attributes:
        id: name in the catalogue.
        bands: names of the bands, in order.
        flux: (n_bands, h, w) nanomaggies per pixel, row 0 in the south, column 0 in the east.
        mask: (n_bands, h, w) bool, True where unusable.
        pixel_scale_arcsec: size of a pixel.
        z: redshift, NaN if unknown.
        ra_deg: right ascension of the centre.
        dec_deg: declination of the centre.
        log10_m500c: predicted mass.
        log10_m500c_err: its standard deviation, dex.
        integrated_gradients: (n_bands, h, w) dex per pixel.
        cam: (h, w) signed class-activation map, relative units.
        joint: (h, w) dex per pixel.
    """

    id: str
    bands: str
    flux: np.ndarray
    mask: np.ndarray
    pixel_scale_arcsec: float
    z: float
    ra_deg: float
    dec_deg: float
    log10_m500c: float
    log10_m500c_err: float
    integrated_gradients: np.ndarray
    cam: np.ndarray
    joint: np.ndarray

    @classmethod
    def load(cls, path: Path) -> ClusterMap:
        """Read one file.

        Raises:
            Pix2massError: the file is missing, broken, lacks an array, or its arrays do not fit each other.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                number = {name: float(arrays[name]) for name in _MAP_NUMBERS}
                image = {name: np.asarray(arrays[name], float) for name in _MAP_IMAGES}
                mask = np.asarray(arrays["mask"], bool)
                one = cls(id=str(arrays["id"]), bands=str(arrays["bands"]), mask=mask, **image, **number)  # type: ignore[arg-type]
        except KeyError as error:
            raise Pix2massError(f"{path.name}: {error.args[0]}; make the maps again with `pix2mass explain`") from None
        except Exception as error:  # noqa: BLE001  zip, numpy and conversions each have errors of their own
            raise Pix2massError(f"{path.name}: broken file: {error}") from None
        shape = (len(one.bands), *one.joint.shape)
        for name in ("flux", "mask", "integrated_gradients"):
            if one.joint.ndim != 2 or getattr(one, name).shape != shape or one.cam.shape != shape[1:]:
                raise Pix2massError(f"{path.name}: expected {name} of shape {shape}, got {getattr(one, name).shape}")
        return one

    @property
    def half_width_arcsec(self) -> float:
        """Half the width of the image."""
        return self.joint.shape[1] * self.pixel_scale_arcsec / 2

    @property
    def half_height_arcsec(self) -> float:
        """Half the height of the image."""
        return self.joint.shape[0] * self.pixel_scale_arcsec / 2

    @property
    def kpc_per_arcsec(self) -> float | None:
        """Proper kpc per arcsecond, None where the redshift is unknown."""
        return float(kpc_per_arcsec(self.z)) if math.isfinite(self.z) and self.z > 0 else None

    @property
    def r500c_kpc(self) -> float | None:
        """Radius that the predicted mass implies, None where the redshift or the mass is unknown."""
        if self.kpc_per_arcsec is None or not math.isfinite(self.log10_m500c):
            return None
        return float(r500c_kpc(self.log10_m500c, self.z))


# ---- figures -------------------------------------------------------------------------------------------------------


def _draw_predicted(ax: Axes, table: Table, reference: str, reference_label: str) -> None:
    x, y, err = (numbers(table, name) for name in (reference, "log10_m500c", "log10_m500c_err"))
    z = numbers(table, "z")
    alpha = 0.25 if len(x) > 150 else 0.5
    ax.errorbar(x, y, yerr=err, fmt="none", ecolor="0.6", elinewidth=0.6, alpha=alpha, zorder=1, rasterized=True)
    coloured = np.isfinite(z).all()
    colour: dict[str, Any] = {"c": z, "cmap": "viridis"} if coloured else {"color": BLUE}
    points = ax.scatter(x, y, s=12 if len(x) > 150 else 20, zorder=2, rasterized=True, **colour)
    if coloured:
        ax.figure.colorbar(points, ax=ax, label="redshift", pad=0.02)
    low, high = np.nanmin([x.min(), y.min()]) - 0.1, np.nanmax([x.max(), y.max()]) + 0.1
    ax.plot([low, high], [low, high], color=VERMILION, lw=1.3, zorder=3, label="1:1")
    ax.set(
        xlim=(low, high), ylim=(low, high), xlabel=f"{reference_label} {MASS_LABEL}", ylabel=f"predicted {MASS_LABEL}"
    )
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(0.5))
    ax.legend(loc="upper left")


def _draw_residual(ax: Axes, x: np.ndarray, residual: np.ndarray, xlabel: str, log: bool = False) -> None:
    ax.axhline(0, color=VERMILION, lw=1.3)
    ax.scatter(x, residual, s=8, color=BLUE, alpha=0.35, linewidths=0, rasterized=True)
    order = np.argsort(x)
    groups = np.array_split(order, max(2, min(8, len(x) // 12)))
    middle = [np.median(x[group]) for group in groups]
    median = [np.median(residual[group]) for group in groups]
    low, high = (np.array([np.percentile(residual[group], q) for group in groups]) for q in (16, 84))
    ax.fill_between(middle, low, high, color=ORANGE, alpha=0.3, lw=0, label="16 to 84 per cent")
    ax.plot(middle, median, "o-", color="black", ms=4, lw=1.2, label="median")
    if log:
        ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel="predicted - reference (dex)")
    limit = max(0.1, 1.1 * float(np.percentile(np.abs(residual), 99.5)))
    ax.set_ylim(-limit, limit)
    ax.legend(loc="best", fontsize=8.5)


def _draw_pulls(ax: Axes, pull: np.ndarray) -> None:
    edges = np.linspace(-4, 4, 33 if len(pull) > 200 else 17)
    ax.hist(np.clip(pull, -4, 4), edges.tolist(), density=True, color=BLUE, alpha=0.6, label="clusters")
    x = np.linspace(-4, 4, 201)
    ax.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color=VERMILION, lw=1.6, label="unit normal")
    ax.set(xlim=(-4, 4), xlabel="(predicted - reference) / error", ylabel="density")
    ax.legend(loc="upper left", fontsize=8.5)


def _draw_coverage(ax: Axes, pull: np.ndarray) -> None:
    expected = np.linspace(0.02, 0.98, 49)
    limits = np.array([_normal_half_width(share) for share in expected])
    found = (np.abs(pull)[:, None] <= limits).mean(axis=0)
    error = np.sqrt(expected * (1 - expected) / len(pull))
    ax.fill_between(
        expected, expected - error, expected + error, color="0.75", alpha=0.6, lw=0, label="exact, sampling error"
    )
    ax.plot([0, 1], [0, 1], color=VERMILION, lw=1.3)
    ax.plot(expected, found, color=BLUE, lw=1.8, label="this run")
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="expected share inside the interval", ylabel="found share")
    ax.set_aspect("equal")
    ax.legend(loc="upper left", fontsize=8.5)


def _normal_half_width(share: float) -> float:
    """Number of standard deviations about the mean that hold a share of a normal distribution."""
    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < share else (low, middle)
    return (low + high) / 2


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


def _draw_methods(ax: Axes, methods: dict[str, dict[str, float]]) -> None:
    names = [name for name in METHODS if name in methods]
    mae = np.array([methods[name]["mae_dex"] for name in names])
    spread = np.array([methods[name].get("mae_fold_spread_dex", 0.0) for name in names])
    ax.barh(
        range(len(names)),
        mae,
        xerr=spread,
        color=[BLUE if name == "network" else ORANGE if name.startswith("richness") else "0.7" for name in names],
        error_kw={"elinewidth": 1},
    )
    ax.set_yticks(range(len(names)), [METHODS[name].replace(" (", "\n(").replace(", ", ",\n") for name in names])
    ax.invert_yaxis()
    ax.tick_params(axis="y", labelsize=8.5, length=0)
    for row, value in enumerate(mae):
        ax.text(value + spread[row] + 0.01 * mae.max(), row, f"{value:.3f}", va="center", fontsize=9)
    ax.set_xlim(0, 1.15 * (mae + spread).max())
    ax.set_xlabel("MAE (dex), line: spread over folds")


# ---- figures of clusters -------------------------------------------------------------------------------------------


def _show(ax: Axes, one: ClusterMap, image: np.ndarray, **options: Any) -> Any:
    """An image of a cluster in arcsec about its centre, north up and east left, with scale bar and R500c."""
    a, b = one.half_width_arcsec, one.half_height_arcsec
    shown = ax.imshow(image, origin="lower", extent=(a, -a, -b, b), interpolation="nearest", **options)
    colour, outline = ("white", "black") if image.ndim == 3 else ("black", "white")
    effects = [withStroke(linewidth=3, foreground=outline, alpha=0.7)]
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(True)
    scale, radius_kpc = one.kpc_per_arcsec, one.r500c_kpc
    if scale is None:
        length = _round_length(0.6 * a)
        text = f'{length:g}"'
    else:
        length_kpc = _round_length(0.6 * a * scale)
        length = length_kpc / scale
        text = f'{length_kpc:g} kpc = {length:.0f}"'
    ax.plot([0.92 * a, 0.92 * a - length], [-0.82 * b, -0.82 * b], color=colour, lw=2, path_effects=effects)
    ax.text(0.92 * a, -0.9 * b, text, color=colour, fontsize=8, va="center", path_effects=effects)
    if scale is not None and radius_kpc is not None:
        ax.add_patch(Circle((0, 0), radius_kpc / scale, fill=False, ls="--", lw=1, ec=colour, path_effects=effects))
    ax.set(xlim=(a, -a), ylim=(-b, b))
    return shown


def _round_length(longest: float) -> float:
    """The longest length of 1, 2 or 5 times a power of ten that does not exceed ``longest`` (> 0)."""
    power = 10.0 ** math.floor(math.log10(longest))
    return next(digit * power for digit in (5, 2, 1) if digit * power <= longest * (1 + 1e-9))


def _draw_composite(ax: Axes, one: ClusterMap) -> None:
    _show(ax, one, composite(one.flux, one.mask, one.bands)[0])


def _draw_signed(ax: Axes, one: ClusterMap, values: np.ndarray, unit: str, contours: bool = False) -> None:
    values = np.where(one.mask.all(axis=0), np.nan, values)
    finite = values[np.isfinite(values)]
    limit = float(np.percentile(np.abs(finite), 99.7)) if finite.size else 0.0
    limit = limit or 1.0
    ax.set_facecolor("0.8")  # shows where there are no pixels
    shown = _show(ax, one, values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    if contours:
        usable = ~one.mask
        light = np.where(usable, np.nan_to_num(one.flux), 0.0).sum(axis=0)
        noise = 1.4826 * float(np.median(np.abs(light - np.median(light)))) or 1.0
        levels = [np.median(light) + step * noise for step in (5, 20, 80)]
        a, b = one.half_width_arcsec, one.half_height_arcsec
        scale = one.pixel_scale_arcsec
        x = a - (np.arange(light.shape[1]) + 0.5) * scale
        y = -b + (np.arange(light.shape[0]) + 0.5) * scale
        if light.max() > levels[0]:
            ax.contour(x, y, light, [level for level in levels if level < light.max()], colors="0.25", linewidths=0.6)
    bar = ax.figure.colorbar(shown, ax=ax, orientation="horizontal", fraction=0.05, pad=0.03, label=unit)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]
    bar.ax.tick_params(labelsize=8)
    bar.locator = MaxNLocator(5)  # type: ignore[attr-defined]
    bar.update_ticks()


def _cluster_panels(one: ClusterMap) -> list[dict[str, str]]:
    panels: list[tuple[str, str, Callable[[Axes], None]]] = [
        ("Image", composite(one.flux, one.mask, one.bands)[1], lambda ax: _draw_composite(ax, one)),
        (
            "Integrated gradients",
            "sum over bands of the change in log10 mass that each pixel's light makes",
            lambda ax: _draw_signed(ax, one, one.integrated_gradients.sum(axis=0), "dex per pixel"),
        ),
        (
            "Class-activation map",
            "where the feature maps of network 1 raise (red) or lower (blue) the mass",
            lambda ax: _draw_signed(ax, one, one.cam, "relative units"),
        ),
        (
            "Joint map",
            "integrated gradients times the strength of the class-activation map; contours: light in all bands",
            lambda ax: _draw_signed(ax, one, one.joint, "dex per pixel", contours=True),
        ),
    ]
    return [
        {
            "title": title,
            "alt": f"{title} of {one.id}: {text}",
            # The composite has no colour bar: less tall, so that the four images come out the same size.
            "src": data_uri(draw, 3.0, 3.0 if title == "Image" else 3.6),
        }
        for title, text, draw in panels
    ]


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


def overview_figure(folder: RunFolder, path: str | Path) -> None:
    """Draw the run in one picture of 1600 x 700 pixels: predicted against true mass, and two clusters with their maps.

    Args:
        folder: a run with predictions and at least one file in maps/.
        path: picture to write; its ending says in which format.

    Raises:
        Pix2massError: predictions or maps are missing or broken.
    """
    table = _read_predictions(folder)
    maps, problems = _read_maps(folder)
    if not maps:
        raise Pix2massError(
            f"{folder.path}: no attribution maps to draw{': ' if problems else ''}{'; '.join(problems)}"
        )
    reference, name = _reference(table)
    # The lightest and the heaviest show best what changes with mass.
    chosen = [maps[0], maps[-1]] if len(maps) > 1 else maps
    with mpl.rc_context({**STYLE, "font.size": 13}):
        figure = Figure(figsize=(16, 7), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=[1.12, 1])  # type: ignore[misc]
        ax = left.subplots()
        _draw_predicted(ax, table, reference, name)
        residual = numbers(table, "log10_m500c") - numbers(table, reference)
        beside = [f"{name} {_mae(table, name):.3f}" for name in ("richness", "constant") if _has(table, name)]
        note = f" ({', '.join(beside)})" if beside else ""
        kind = "mock" if "log10_m500c_true" in table.colnames else "real"
        ax.set_title(f"{len(table)} {kind} clusters, MAE {_mae(table):.3f} dex{note}", fontsize=14)
        ax.text(
            0.98, 0.03, f"bias {residual.mean():+.3f} dex", transform=ax.transAxes, ha="right", va="bottom", color="0.3"
        )
        axes = right.subplots(len(chosen), 2, squeeze=False)
        for row, one in zip(axes, chosen, strict=True):
            _draw_composite(row[0], one)
            row[0].set_title(f"{MASS_LABEL} = {one.log10_m500c:.2f} ± {one.log10_m500c_err:.2f}", fontsize=12)
            _draw_signed(row[1], one, one.joint, "dex per pixel", contours=True)
            row[1].set_title(f"what the networks used, z = {one.z:.2f}", fontsize=12)
        figure.savefig(path, dpi=100)


# ---- reading -------------------------------------------------------------------------------------------------------


def _reference(table: Table) -> tuple[str, str]:
    """Column that the predictions are held against, and what to call it."""
    return ("log10_m500c_true", "true") if "log10_m500c_true" in table.colnames else ("log10_m500c_label", "measured")


def _has(table: Table, method: str) -> bool:
    return f"log10_m500c_{method}" in table.colnames


def _mae(table: Table, method: str = "") -> float:
    """Mean over folds of the mean absolute error, as in metrics.json; of the network where no method is named."""
    error = np.abs(numbers(table, f"log10_m500c_{method}".rstrip("_")) - numbers(table, _reference(table)[0]))
    fold = np.asarray(table["fold"])
    return float(np.mean([error[fold == k].mean() for k in np.unique(fold)]))


def _read_predictions(folder: RunFolder) -> Table:
    path = folder / "predictions.ecsv"
    if not path.exists():
        raise Pix2massError(f"{folder.path}: the run has no predictions.ecsv; `pix2mass evaluate` makes it")
    try:
        table = Table.read(path, format="ascii.ecsv")
    except Exception as error:  # noqa: BLE001  the reader's errors are of many kinds
        raise Pix2massError(f"{path}: broken file: {error}") from None
    needed = ("id", "z", "fold", "log10_m500c", "log10_m500c_err", "log10_m500c_label")
    missing = [name for name in needed if name not in table.colnames]
    if missing or len(table) == 0:
        raise Pix2massError(f"{path}: expected rows with {', '.join(needed)}; {', '.join(missing) or 'rows'} missing")
    return table


def _read_maps(folder: RunFolder) -> tuple[list[ClusterMap], list[str]]:
    """The readable maps in order of predicted mass, and what is wrong with the others."""
    maps, problems = [], []
    for path in sorted((folder / "maps").glob("*.npz")):
        try:
            maps.append(ClusterMap.load(path))
        except Pix2massError as error:
            problems.append(str(error))
    return sorted(maps, key=lambda one: one.log10_m500c), problems


@dataclass
class _Parts:
    """What a run folder holds, and one sentence for each thing it lacks."""

    folder: RunFolder
    missing: list[str] = field(default_factory=list)

    def json(self, name: str, then: str) -> dict[str, Any]:
        """A JSON file of the run; empty, with a sentence in ``missing``, where it cannot be read."""
        try:
            values = self.folder.read_json(name)
        except Pix2massError as error:
            exists = (self.folder / name).exists()
            self.missing.append(f"{error}: {then}" if exists else f"{name} is missing: {then}")
            return {}
        if isinstance(values, dict):
            return values
        self.missing.append(f"{name} does not hold a table of values: {then}")
        return {}

    def config(self) -> tuple[str, dict[str, Any]]:
        """config.toml as text and as values."""
        path = self.folder / "config.toml"
        try:
            text = path.read_text()
            return text, tomllib.loads(text)
        except FileNotFoundError:
            self.missing.append("config.toml is missing: the settings of the run are not shown")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.missing.append(f"config.toml is broken ({error}): the settings of the run are not shown")
        return "", {}

    def predictions(self) -> Table | None:
        """predictions.ecsv, None where it cannot be read."""
        try:
            return _read_predictions(self.folder)
        except Pix2massError:
            state = "cannot be used" if (self.folder / "predictions.ecsv").exists() else "is missing"
            self.missing.append(f"predictions.ecsv {state}: no figures of masses, residuals and calibration")
            return None


# ---- the page ------------------------------------------------------------------------------------------------------


def write_report(folder: RunFolder) -> Path:
    """Write report.html into a run folder: one page without outside parts, made from the folder alone.

    Args:
        folder: the run. Whatever it lacks is left out and named.

    Returns:
        The page's path.
    """
    parts = _Parts(folder)
    config_text, config = parts.config()
    metrics = parts.json("metrics.json", "no scores, baselines and bins are shown")
    table = parts.predictions()
    pretrain = parts.json("pretrain.json", "nothing is said about network 1")
    model = parts.json("model.json", "the prior and the range of the training are not shown")
    provenance = parts.json("provenance.json", "versions, seed and checksums are not shown")
    stages = parts.json("stages.json", "times are not shown")
    maps, problems = _read_maps(folder)
    parts.missing += [f"maps: {problem}" for problem in problems]
    if not maps:
        parts.missing.append("maps/ has no usable file: no attribution maps (`pix2mass explain` makes them)")
    methods = _known_methods(metrics.get("methods"))
    if metrics and "network" not in methods:
        parts.missing.append("metrics.json has no scores of the network: the tables of methods are left out")
    lacking = [text for name, text in METHODS.items() if name not in methods and name != "richness_true"]
    if "network" in methods and lacking:
        parts.missing.append(f"baselines without scores, since the run lacks their input: {', '.join(lacking)}")
    found_bins = _inner(metrics, "bins")
    html = page_template("run.html.j2").render(
        name=str(config.get("name") or folder.path.resolve().name),
        kind=_kind(metrics, config),
        summary=_summary(metrics, methods, pretrain),
        missing=parts.missing,
        metrics=metrics,
        score_names=_SCORES,
        tables=_method_tables(metrics, methods),
        differences=_differences(metrics),
        bars=data_uri(lambda ax: _draw_methods(ax, methods), 5.0, 3.6) if "network" in methods else None,
        mass_figures=_mass_figures(table, parts.missing) if table is not None else [],
        calibration_figures=_calibration_figures(table) if table is not None else [],
        bins=[(title, found_bins[name]) for name, title in _BINS.items() if found_bins.get(name)],
        band=_band_section({**pretrain, **metrics}, pretrain, parts.missing),
        clusters=[_cluster_section(one) for one in maps],
        seconds=_seconds(metrics, stages),
        model=model,
        provenance=provenance,
        checksums=_checksums(provenance, pretrain),
        config_text=config_text,
    )
    path = folder / "report.html"
    write_atomic(path, html)
    return path


def _kind(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    """Whether the run's images are ``mock``, ``real`` or ``unknown``."""
    if isinstance(metrics.get("mock"), bool):
        return "mock" if metrics["mock"] else "real"
    return "mock" if "mock" in config else "real" if "data" in config else "unknown"


def _inner(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A table inside a table, empty where there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _known_methods(methods: Any) -> dict[str, dict[str, float]]:
    """Scores by method, known methods first and in order, those without an error left out."""
    if not isinstance(methods, dict):
        return {}
    usable = {
        name: values
        for name, values in methods.items()
        if isinstance(values, dict) and isinstance(values.get("mae_dex"), float) and math.isfinite(values["mae_dex"])
    }
    return {name: usable[name] for name in [*METHODS, *sorted(set(usable) - set(METHODS))] if name in usable}


def _summary(metrics: dict[str, Any], methods: dict[str, dict[str, float]], pretrain: dict[str, Any]) -> list[str]:
    """Three sentences: the error, the baselines, the error bars."""
    if "network" not in methods:
        return []
    network = methods["network"]
    n_folds = len(metrics.get("per_fold") or [])
    folds = f", mean of {n_folds} folds" if n_folds else ""
    first = (
        f"The network weighs {metrics.get('n', 'the')} clusters that it was not trained on with a mean absolute error "
        f"of {format_number(network['mae_dex'])} dex against the {metrics.get('reference', 'reference')}{folds} "
        f"(best fold {format_number(network.get('mae_best_fold_dex'))}, "
        f"spread {format_number(network.get('mae_fold_spread_dex'))})."
    )
    others = [
        f"{METHODS.get(name, name)} {format_number(values['mae_dex'])}"
        for name, values in methods.items()
        if name != "network"
    ]
    second = f"On the same clusters and folds the baselines have, in dex: {', '.join(others)}"
    against = _inner(metrics, "network_minus").get("richness")
    if against:
        verdict = f"the network is {'better' if against['difference_dex'] < 0 else 'worse'}"
        if abs(against["difference_dex"]) < 2 * against["error_dex"]:
            verdict = "not distinguishable at two standard errors"
        second += (
            f"; network minus richness is {format_number(against['difference_dex'], 3, '+')} ± "
            f"{format_number(against['error_dex'])} dex ({verdict})"
        )
    third = (
        f"The 68% error bars hold {format_number(metrics.get('coverage_68'), 2)} ± "
        f"{format_number(metrics.get('coverage_68_error'), 2)} of the clusters and the 95% bars "
        f"{format_number(metrics.get('coverage_95'), 2)}; the slope of predicted on reference mass is "
        f"{format_number(network.get('slope'), 2)} (1 is perfect, 0 is the mean for all)"
    )
    accuracy, bands = pretrain.get("band_accuracy"), pretrain.get("bands")
    if isinstance(accuracy, float) and bands:
        third += (
            f"; network 1 names the band of an image rightly in {accuracy:.2f} of cases (chance {1 / len(bands):.2f})"
        )
    return [first, second + ".", third + "."]


def _method_tables(metrics: dict[str, Any], methods: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    if "network" not in methods:
        return []
    tables = [(f"Against the {metrics.get('reference', 'reference')}", methods)]
    if metrics.get("mock") and "network" in _known_methods(metrics.get("methods_against_label")):
        tables.append(("Against the noisy label", _known_methods(metrics["methods_against_label"])))
    return [
        {
            "title": title,
            "rows": [
                (name, METHODS.get(name, name), [values.get(key) for key in _SCORES])
                for name, values in by_name.items()
            ],
        }
        for title, by_name in tables
    ]


def _differences(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    found = _inner(metrics, "network_minus")
    order = [name for name in METHODS if name in found] + sorted(set(found) - set(METHODS))
    return [{"method": METHODS.get(name, name), **found[name]} for name in order]


def _residual_and_error(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Predicted minus reference mass in dex, and its standard deviation (label errors included on real data)."""
    reference, _ = _reference(table)
    residual = numbers(table, "log10_m500c") - numbers(table, reference)
    error = numbers(table, "log10_m500c_err")
    if reference == "log10_m500c_label" and "log10_m500c_label_err" in table.colnames:
        error = np.hypot(error, np.nan_to_num(numbers(table, "log10_m500c_label_err")))
    return residual, error


def _mass_figures(table: Table, missing: list[str]) -> list[dict[str, str]]:
    reference, name = _reference(table)
    residual, _ = _residual_and_error(table)
    figures = [
        {
            "title": f"Predicted against {name} mass",
            "alt": f"Scatter plot of predicted against {name} log10 M500c of {len(table)} clusters with 68 per cent "
            f"error bars, coloured by redshift, and the 1:1 line. Mean absolute error {_mae(table):.3f} dex.",
            "src": data_uri(lambda ax: _draw_predicted(ax, table, reference, name), 5.2, 4.3),
        }
    ]
    wanted = {
        reference: ("mass", f"{name} {MASS_LABEL}", False),
        "z": ("redshift", "redshift", False),
        "richness": ("richness", r"richness $\lambda$", True),
    }
    for column, (what, xlabel, log) in wanted.items():
        x = numbers(table, column) if column in table.colnames else np.full(len(table), np.nan)
        usable = np.isfinite(x) & np.isfinite(residual) & ((x > 0) | (not log))
        if usable.sum() < 2:
            missing.append(f"{what} is not known: no figure of residuals against {what}")
            continue
        figures.append(
            {
                "title": f"Residuals against {what}",
                "alt": f"Predicted minus {name} log10 M500c in dex against {what}, with running median and 16 to 84 "
                f"per cent range. Mean {residual[usable].mean():+.3f} dex.",
                "src": data_uri(
                    lambda ax, x=x, usable=usable, xlabel=xlabel, log=log: _draw_residual(
                        ax, x[usable], residual[usable], xlabel, log
                    )
                ),
            }
        )
    return figures


def _calibration_figures(table: Table) -> list[dict[str, str]]:
    residual, error = _residual_and_error(table)
    usable = np.isfinite(residual) & (error > 0)
    if usable.sum() < 2:
        return []
    pull = residual[usable] / error[usable]
    return [
        {
            "title": "Residuals in units of the error",
            "alt": f"Histogram of residuals over errors beside a unit normal: mean {pull.mean():+.2f}, standard "
            f"deviation {pull.std():.2f}.",
            "src": data_uri(lambda ax: _draw_pulls(ax, pull)),
        },
        {
            "title": "Coverage of the intervals",
            "alt": "Share of clusters found inside the central interval against the share expected, with the sampling "
            f"error about exact coverage. At 68 per cent: {(np.abs(pull) <= 1).mean():.2f}.",
            "src": data_uri(lambda ax: _draw_coverage(ax, pull)),
        },
    ]


def _band_section(values: dict[str, Any], pretrain: dict[str, Any], missing: list[str]) -> dict[str, Any] | None:
    confusion = np.asarray(values.get("band_confusion") or [])
    bands = str(values.get("bands") or (BANDS if confusion.shape == (len(BANDS),) * 2 else ""))
    if not bands or confusion.shape != (len(bands), len(bands)):
        missing.append("there is no band confusion matrix: nothing is shown of how well network 1 tells the bands")
        return None
    accuracy = float(np.trace(confusion) / max(1, confusion.sum()))
    diagonal = np.diag(confusion) / np.maximum(1, confusion.sum(axis=1))
    each = ", ".join(f"{band} {share:.2f}" for band, share in zip(bands, diagonal, strict=True))
    return {
        "accuracy": accuracy,
        "chance": 1 / len(bands),
        "n": int(confusion.sum()),
        "tested_on": str(pretrain.get("tested_on", "images whose origin the run does not state")),
        "figure": {
            "title": "Bands told by network 1",
            "alt": f"Band confusion matrix. Share told rightly per band: {each}.",
            "src": data_uri(lambda ax: _draw_confusion(ax, confusion, bands)),
        },
    }


def _cluster_section(one: ClusterMap) -> dict[str, Any]:
    return {
        "id": one.id,
        "z": one.z,
        "ra_deg": one.ra_deg,
        "dec_deg": one.dec_deg,
        "log10_m500c": one.log10_m500c,
        "log10_m500c_err": one.log10_m500c_err,
        "r500c_kpc": one.r500c_kpc,
        "width_arcsec": 2 * one.half_width_arcsec,
        "panels": _cluster_panels(one),
    }


def _seconds(metrics: dict[str, Any], stages: dict[str, Any]) -> dict[str, float]:
    from_stages = {
        name: record["seconds"] for name, record in stages.items() if isinstance(record, dict) and "seconds" in record
    }
    merged = {**_inner(metrics, "seconds"), **from_stages}
    return {name: float(value) for name, value in merged.items() if isinstance(value, int | float)}


def _checksums(provenance: dict[str, Any], pretrain: dict[str, Any]) -> dict[str, str]:
    """Checksums and further facts of the provenance as text, by name."""
    known = {"made", "command", "seed", "python", "platform", "versions", "git"}
    facts: dict[str, str] = {}
    for name, value in provenance.items():
        if name in known or value is None:
            continue
        if isinstance(value, dict):
            facts.update({f"{name} {key}": str(inner) for key, inner in value.items()})
        else:
            facts[name] = str(value)
    if pretrain.get("store_checksum"):
        facts.setdefault("store of network 1 (checksum)", str(pretrain["store_checksum"]))
    return facts
