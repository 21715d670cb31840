"""One cluster's attribution maps: what a file of maps/ holds, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter

from pix2mass.cosmology import kpc_per_arcsec, r500c_kpc
from pix2mass.report.drawing import composite, data_uri
from pix2mass.run import RunFolder
from pix2mass.types import Pix2massError

_MAP_NUMBERS = ("pixel_scale_arcsec", "z", "ra_deg", "dec_deg", "log10_m500c", "log10_m500c_err")
_MAP_IMAGES = ("flux", "integrated_gradients", "cam", "joint")
_TITLES = {
    "joint": ("joint map", "integrated gradients times the strength of the class-activation map"),
    "integrated_gradients": (
        "integrated gradients",
        "sum over bands of the change in log10 mass that each pixel's light makes",
    ),
    "cam": ("class-activation map", "where the last feature maps raise (red) or lower (blue) the mass"),
}
"""What to call each map of the mass, and what it shows."""
_SPARSE, _SPARSE_SMOOTHING = 0.2, 0.006
"""Share of pixels with a value below which a map is smoothed before it is drawn; by how much, over its width."""


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
        cam: (h, w) signed class-activation map, dex per pixel.
        joint: (h, w) dex per pixel.
        default_method: which of the three to look at first.
        flags: bits of the cutout, None if the file does not say.
        path: the file, None if it is not from one.
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
    default_method: str
    flags: int | None = None
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> ClusterMap:
        """Read one file.

        Raises:
            Pix2massError: the file is missing, broken, lacks an array, or its arrays do not fit each other.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return replace(cls.of(dict(arrays), path.name), path=path)
        except Pix2massError:
            raise
        except Exception as error:  # noqa: BLE001  zip and numpy each have errors of their own
            raise Pix2massError(f"{path.name}: broken file: {error}") from None

    @classmethod
    def of(cls, arrays: Mapping[str, Any], name: str = "maps") -> ClusterMap:
        """Take what a file holds.

        Args:
            arrays: as :func:`pix2mass.explain` keeps them.
            name: what to call them in an error.

        Raises:
            Pix2massError: one is missing, is not what it should be, or they do not fit each other.
        """
        try:
            values: dict[str, Any] = {key: float(arrays[key]) for key in _MAP_NUMBERS}
            values |= {key: np.asarray(arrays[key], float) for key in _MAP_IMAGES}
            values |= {key: str(arrays[key]) for key in ("id", "bands", "default_method")}
            mask = np.asarray(arrays["mask"], bool)
            flags = int(arrays["flags"]) if "flags" in arrays else None
        except KeyError as error:
            raise Pix2massError(
                f"{name}: {error.args[0]} is missing; make the maps again with `pix2mass explain`"
            ) from None
        except (TypeError, ValueError) as error:
            raise Pix2massError(f"{name}: broken: {error}") from None
        one = cls(mask=mask, flags=flags, **values)
        shape = (len(one.bands), *one.joint.shape)
        for key in ("flux", "mask", "integrated_gradients"):
            if one.joint.ndim != 2 or getattr(one, key).shape != shape or one.cam.shape != shape[1:]:
                raise Pix2massError(f"{name}: expected {key} of shape {shape}, got {getattr(one, key).shape}")
        if one.default_method not in _TITLES:
            raise Pix2massError(f"{name}: expected default_method of {', '.join(_TITLES)}, got {one.default_method!r}")
        return one

    def of_mass(self) -> list[tuple[str, str, np.ndarray]]:
        """The maps of the mass (h, w), the one to look at first before the others: title, what it shows, the map."""
        maps = {"joint": self.joint, "integrated_gradients": self.integrated_gradients.sum(axis=0), "cam": self.cam}
        names = sorted(maps, key=lambda name: name != self.default_method)
        return [(*_TITLES[name], maps[name]) for name in names]

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


def read_maps(folder: RunFolder) -> tuple[list[ClusterMap], list[str]]:
    """The readable maps in order of predicted mass, and what is wrong with the others."""
    maps, problems = [], []
    for path in sorted((folder / "maps").glob("*.npz")):
        try:
            maps.append(ClusterMap.load(path))
        except Pix2massError as error:
            problems.append(str(error))
    return sorted(maps, key=lambda one: one.log10_m500c), problems


# ---- figures -------------------------------------------------------------------------------------------------------


def show(ax: Axes, one: ClusterMap, image: np.ndarray, **options: Any) -> Any:
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


def draw_composite(ax: Axes, one: ClusterMap) -> None:
    """The cluster in colour, or in grey where it has fewer than three bands."""
    show(ax, one, composite(one.flux, one.mask, one.bands)[0])


def for_display(values: np.ndarray, smoothing_px: float = 0.0) -> tuple[np.ndarray, bool]:
    """A map (h, w) as it can be seen: smoothed if it has values at few pixels, as of a network that looks at sources.

    Args:
        values: the map, NaN where there are no pixels.
        smoothing_px: standard deviation by which any map is smoothed.

    Returns:
        The map, with the same sum but for the edges, and whether it was taken for sparse.
    """
    sparse = bool(np.count_nonzero(np.nan_to_num(values)) < _SPARSE * values.size)
    sigma = max(smoothing_px, _SPARSE_SMOOTHING * values.shape[1]) if sparse else smoothing_px
    return np.where(np.isfinite(values), gaussian_filter(np.nan_to_num(values), sigma), np.nan), sparse


def draw_signed(ax: Axes, one: ClusterMap, values: np.ndarray, unit: str, contours: bool = False) -> None:
    """A map of values (h, w) of both signs with its colour bar; with the contours of the light if asked for."""
    values, sparse = for_display(np.where(one.mask.all(axis=0), np.nan, values))
    finite = values[np.isfinite(values)]
    limit = float(np.percentile(np.abs(finite), 99.7)) if finite.size else 0.0
    limit = limit or 1.0
    power = math.floor(math.log10(limit)) if limit < 0.01 else 0
    ax.set_facecolor("0.8")  # shows where there are no pixels
    limit /= 10.0**power
    shown = show(ax, one, values / 10.0**power, cmap="RdBu_r", vmin=-limit, vmax=limit)
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
            seen = [level for level in levels if level < light.max()]
            ax.contour(x, y, light, seen, colors="0.45", linewidths=0.3 if sparse else 0.6)
    bar = ax.figure.colorbar(shown, ax=ax, orientation="horizontal", fraction=0.05, pad=0.03)
    bar.set_label((f"$10^{{{power}}}$ " if power else "") + unit + (", smoothed" if sparse else ""), fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.locator = MaxNLocator(5)  # type: ignore[attr-defined]
    bar.update_ticks()


def cluster_panels(one: ClusterMap) -> list[dict[str, str]]:
    """Image and maps of the mass, each a picture of its own: ``src``, ``title`` and ``alt``."""
    panels: list[tuple[str, str, Callable[[Axes], None]]] = [
        ("Image", composite(one.flux, one.mask, one.bands)[1], lambda ax: draw_composite(ax, one)),
    ]
    for number, (title, text, values) in enumerate(one.of_mass()):
        first = number == 0

        def draw(ax: Axes, values: np.ndarray = values, first: bool = first) -> None:
            draw_signed(ax, one, values, "dex per pixel", contours=first)

        panels.append((title.capitalize(), text + ("; contours: light in all bands" if first else ""), draw))
    return [
        {
            "title": title,
            "alt": f"{title} of {one.id}: {text}",
            # The composite has no colour bar: less tall, so that the four images come out the same size.
            "src": data_uri(draw, 3.0, 3.0 if title == "Image" else 3.6),
        }
        for title, text, draw in panels
    ]
