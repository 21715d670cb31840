"""The pixel grid of a cutout and the regridding of images onto it.

Regridding here averages over area: each source pixel's flux is shared out between the target pixels over it, so that
nanomaggies per pixel go in, nanomaggies per pixel come out, and their sum stays. Interpolation would keep surface
brightness instead and throw light away on coarser grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from astropy import units as u
from astropy.table import Row
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel
from numpy.typing import ArrayLike

from pix2mass.config import GridConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.images.overlap import gather, gather_wide, is_wide, overlaps
from pix2mass.types import Pix2massError

ClusterRow: TypeAlias = Mapping[str, Any] | Row
"""A cluster of a catalogue: a dict or a table row with ``ra_deg``, ``dec_deg``, ``z`` and ``id``."""

MIN_COVERAGE = 0.5
"""A target pixel with less than this share of its area under usable source pixels is to be masked."""

MAX_WIDTH_DEG = 90.0
"""A physical width that spans more than this is refused: a tangent plane cannot show it."""

MAX_POSITION_ERROR_PX = 0.02
"""Largest departure of the local affine from the exact WCS, in source pixels; regions that exceed it are halved."""

_EDGE = np.linspace(-1.0, 1.0, 7)
_SAMPLES = np.stack([np.ones(49), np.tile(_EDGE, 7), np.repeat(_EDGE, 7)], axis=1)
_FIT = np.linalg.pinv(_SAMPLES)
"""Least-squares plane through values at 7 x 7 points of the square from -1 to 1."""


class Position(NamedTuple):
    """Where a cluster is: its name for messages, ICRS degrees, and its redshift (NaN where there is none)."""

    name: str
    ra_deg: float
    dec_deg: float
    z: float


def _number(value: Any, unit: u.UnitBase) -> float:
    if value is None or np.ma.is_masked(value):
        return math.nan
    if isinstance(value, u.Quantity):
        value = value.value if unit == u.dimensionless_unscaled else value.to_value(unit)
    return float(value)


def read_position(cluster: ClusterRow) -> Position:
    """Read and check the position of a cluster.

    Args:
        cluster: a dict or an astropy table row with ``ra_deg``, ``dec_deg`` and, where known, ``z`` and ``id``.

    Raises:
        Pix2massError: a coordinate is missing, not a number, not finite, or out of range.
    """
    keys = cluster.keys()
    values = {key: cluster[key] for key in ("id", "ra_deg", "dec_deg", "z") if key in keys}
    name = str(values.get("id", "(no id)"))
    numbers = {}
    for key, unit in (("ra_deg", u.deg), ("dec_deg", u.deg), ("z", u.dimensionless_unscaled)):
        try:
            numbers[key] = _number(values.get(key), unit)
        except (TypeError, ValueError):
            raise Pix2massError(
                f"cluster {name}: expected a number in {key}, got {values[key]!r}; correct the catalogue"
            ) from None
    ra_deg, dec_deg = numbers["ra_deg"], numbers["dec_deg"]
    if not (-360.0 <= ra_deg <= 360.0 and -90.0 <= dec_deg <= 90.0):
        raise Pix2massError(
            f"cluster {name}: expected ra_deg in 0 to 360 and dec_deg in -90 to 90 (ICRS degrees), "
            f"got ra_deg = {ra_deg}, dec_deg = {dec_deg}; correct or remove this row of the catalogue"
        )
    return Position(name, ra_deg % 360.0, dec_deg, numbers["z"])


def pixel_scale_arcsec(grid: GridConfig, z: float) -> float:
    """Pixel size, in arcsec, of a cutout on ``grid`` at redshift ``z``.

    Args:
        grid: width in proper kpc at the redshift, or in arcsec (then ``z`` is not used and may be NaN).
        z: redshift, above 0 where the grid's width is in kpc.

    Raises:
        Pix2massError: the grid needs a redshift and ``z`` is not a positive number, or so small that the cutout spans
            more than ``MAX_WIDTH_DEG``.
    """
    if grid.width_arcsec is not None:
        return grid.width_arcsec / grid.n_pixels
    if not (math.isfinite(z) and z > 0.0):
        raise Pix2massError(
            f"z: expected a redshift above 0 for a cutout {grid.width_kpc:g} kpc wide, got {z}; "
            "correct the catalogue, or give the width in arcsec (--width-arcsec)"
        )
    assert grid.width_kpc is not None
    width_arcsec = float(grid.width_kpc / kpc_per_arcsec(z))
    if not width_arcsec <= MAX_WIDTH_DEG * 3600.0:
        raise Pix2massError(
            f"z: expected a redshift at which {grid.width_kpc:g} kpc span at most {MAX_WIDTH_DEG:g} degrees, got "
            f"{z:g} ({width_arcsec / 3600.0:.3g}); correct the catalogue, or give the width in arcsec (--width-arcsec)"
        )
    return float(grid.width_kpc / kpc_per_arcsec(z) / grid.n_pixels)


def tan_wcs(crval_deg: ArrayLike, crpix: ArrayLike, cd_deg: ArrayLike) -> WCS:
    """A tangent-plane WCS in ICRS.

    Args:
        crval_deg: (2,) right ascension and declination of the tangent point, degrees.
        crpix: (2,) pixel of the tangent point, x and y, the first pixel's centre being 1 (FITS convention).
        cd_deg: (2, 2) matrix from pixels to degrees (FITS CDi_j).
    """
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.radesys = "ICRS"
    wcs.wcs.crval = np.asarray(crval_deg, float)
    wcs.wcs.crpix = np.asarray(crpix, float)
    wcs.wcs.cd = np.asarray(cd_deg, float)
    wcs.wcs.set()
    return wcs


def target_wcs(ra_deg: float, dec_deg: float, pixel_scale_arcsec: float, n_pixels: int) -> WCS:
    """WCS of a cutout: tangent plane, north up, east left, the position at the centre of the grid.

    Args:
        ra_deg: right ascension, ICRS degrees.
        dec_deg: declination, ICRS degrees.
        pixel_scale_arcsec: pixel size.
        n_pixels: pixels on a side.
    """
    scale_deg = pixel_scale_arcsec / 3600.0
    centre = (n_pixels + 1) / 2.0
    return tan_wcs((ra_deg, dec_deg), (centre, centre), ((-scale_deg, 0.0), (0.0, scale_deg)))


def source_window(
    source_wcs: WCS, target_wcs: WCS, n_pixels: int, shape: tuple[int, int], margin_px: int = 3
) -> tuple[slice, slice] | None:
    """Rows and columns of a source image that a target grid needs.

    Args:
        source_wcs: WCS of the source image.
        target_wcs: WCS of the target grid.
        n_pixels: pixels on a side of the target grid.
        shape: (rows, columns) of the source image.
        margin_px: source pixels to add on each side.

    Returns:
        The two slices, inside the image, or None where the target lies wholly outside it.
    """
    edge = np.linspace(-0.5, n_pixels - 0.5, 9)
    x, y = to_pixels(target_wcs, source_wcs, np.tile(edge, 9), np.repeat(edge, 9))
    if not (np.isfinite(x).any() and np.isfinite(y).any()):
        return None
    low_x, high_x, low_y, high_y = np.nanmin(x), np.nanmax(x), np.nanmin(y), np.nanmax(y)
    rows = slice(max(math.floor(low_y) - margin_px, 0), min(math.ceil(high_y) + margin_px + 1, shape[0]))
    cols = slice(max(math.floor(low_x) - margin_px, 0), min(math.ceil(high_x) + margin_px + 1, shape[1]))
    return None if rows.start >= rows.stop or cols.start >= cols.stop else (rows, cols)


def to_pixels(source: WCS, target: WCS, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates in ``target`` of pixel coordinates in ``source``; pixel centres lie at whole numbers.

    Args:
        source: any celestial WCS.
        target: any celestial WCS.
        x: columns (n,).
        y: rows (n,).

    Returns:
        Columns and rows (n,), NaN where the target's projection does not reach.
    """
    if all(wcs.wcs.radesys == "ICRS" and tuple(wcs.wcs.ctype) == ("RA---TAN", "DEC--TAN") for wcs in (source, target)):
        # The same numbers without astropy's sky coordinates, which would take ten times as long.
        return target.world_to_pixel_values(*source.pixel_to_world_values(x, y))
    return pixel_to_pixel(source, target, x, y)


class _Affine(NamedTuple):
    """target = matrix @ (column, row) + offset, pixel centres at whole numbers; its largest error in target pixels."""

    matrix: np.ndarray
    offset: np.ndarray
    error_px: float


def local_affine(source_wcs: WCS, target_wcs: WCS, bounds: tuple[int, int, int, int]) -> _Affine:
    """Least-squares affine from source to target pixels over a region, with its largest error.

    Args:
        source_wcs: WCS of the source image.
        target_wcs: WCS of the target image.
        bounds: row0, row1, col0, col1 of the region in source pixels.

    Returns:
        matrix (2, 2), offset (2,), and the largest distance, in target pixels, from the exact WCS at 49 points. The
        error is infinite where the target's projection does not reach.
    """
    row0, row1, col0, col1 = bounds
    centre = np.array([(col0 + col1 - 1) / 2.0, (row0 + row1 - 1) / 2.0])
    half = np.array([(col1 - col0) / 2.0, (row1 - row0) / 2.0])
    target = np.stack(to_pixels(source_wcs, target_wcs, *(centre + half * _SAMPLES[:, 1:]).T), axis=1)
    if not np.isfinite(target).all():
        return _Affine(np.eye(2), np.zeros(2), math.inf)
    solution = _FIT @ target
    matrix = solution[1:].T / half
    error_px = float(np.hypot(*(target - _SAMPLES @ solution).T).max())
    return _Affine(matrix, solution[0] - matrix @ centre, error_px)


class Regridded(NamedTuple):
    """An image on a target grid: arrays (n, n) float32, as ``resample`` describes them.

    Attributes:
        flux: per target pixel, scaled to its full area where a part of it is not covered.
        variance: of that flux.
        coverage: share of the target pixel's area under usable source pixels, 0 to 1.
        footprint: share under any source pixels, bad ones too.
    """

    flux: np.ndarray
    variance: np.ndarray
    coverage: np.ndarray
    footprint: np.ndarray


def resample(
    flux: np.ndarray,
    variance: np.ndarray,
    mask: np.ndarray | None,
    source_wcs: WCS,
    target_wcs: WCS,
    n_pixels: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regrid an image by area, conserving its flux; onto coarser, equal and finer grids. See ``regrid``.

    Args:
        flux: (rows, cols) nanomaggies per source pixel.
        variance: (rows, cols) variance of ``flux``, nanomaggies^2.
        mask: (rows, cols) bool, True where a pixel must not be used, or None. Masked values may be NaN.
        source_wcs: WCS of ``flux``; any celestial frame and distortion that astropy knows.
        target_wcs: WCS of the target grid.
        n_pixels: pixels on a side of the target grid.

    Returns:
        flux (n, n) in nanomaggies per target pixel, its variance (n, n), and coverage (n, n): the share of the target
        pixel's area under usable source pixels, 0 to 1. Flux and variance are 0 where coverage is 0; pixels with
        coverage below ``MIN_COVERAGE`` are to be masked by the caller. All float32.
    """
    pixels = np.stack([flux, variance], axis=-1).astype(np.float32)
    if mask is not None:
        pixels[mask] = (0.0, np.nan)
    out = regrid(pixels, source_wcs, target_wcs, n_pixels)
    return out.flux, out.variance, out.coverage


def regrid(pixels: np.ndarray, source_wcs: WCS, target_wcs: WCS, n_pixels: int) -> Regridded:
    """Regrid flux and variance in one pass.

    A source pixel is a square of even surface brightness. A target pixel gets from it the share of its flux that lies
    under the target pixel: the overlap of the two polygons, from a table of exact overlaps or, for target pixels more
    than 128 source pixels wide, worked out one by one (see ``overlap``). Places come from a local affine derived from
    the two WCS. The shares of a target pixel sum to its area, so a flat image stays flat. The variance of a target
    pixel is the sum of share^2 times source variance. Bad pixels: a target pixel's flux is that of its
    usable part, scaled to its full area.

    Neighbouring target pixels share the source pixels on their border, so their noise is correlated. With s the size
    of a source pixel over that of a target pixel (s <= 1) and unrelated grids, the correlation coefficient with each of
    the four neighbours is (s/6) / (1 - s/3): 0.25 at equal scale, 0.01 on the default grid. The variance of a sum over
    many pixels is then (1 - s/3)^-2 times the sum of the returned variances: 2.25 at equal scale, 1.03 at s = 0.05. On
    finer grids (s > 1) the pixels under one source pixel are copies of it.

    Args:
        pixels: (rows, cols, 2) float32, nanomaggies per source pixel and their variance; 0 and NaN where unusable.
        source_wcs: WCS of ``pixels``; any celestial frame and distortion that astropy knows.
        target_wcs: WCS of the target grid.
        n_pixels: pixels on a side of the target grid.
    """
    out = Regridded(*np.zeros((4, n_pixels, n_pixels), np.float32))
    tiles = [(0, n_pixels, 0, n_pixels)]
    while tiles:
        row0, row1, col0, col1 = tile = tiles.pop()
        affine = local_affine(target_wcs, source_wcs, tile)
        if affine.error_px > MAX_POSITION_ERROR_PX and max(row1 - row0, col1 - col0) > 8:
            if row1 - row0 >= col1 - col0:
                middle = (row0 + row1) // 2
                tiles += [(row0, middle, col0, col1), (middle, row1, col0, col1)]
            else:
                middle = (col0 + col1) // 2
                tiles += [(row0, row1, col0, middle), (row0, row1, middle, col1)]
        elif not math.isfinite(affine.error_px):
            continue
        elif is_wide(affine.matrix):
            gather_wide(pixels, affine.matrix, affine.offset + 0.5, tile, *out)
        else:
            table = overlaps(affine.matrix)
            offset = affine.offset + 0.5 + table.corner
            gather(pixels, affine.matrix, offset, tile, *table[:3], table.total, *out)
    return out
