"""The pixel grid of a cutout and the regridding of images onto it.

Regridding here averages over area: each source pixel's flux is shared out between the target pixels under it, so that
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
from astropy.wcs.utils import pixel_to_pixel, proj_plane_pixel_scales
from numpy.typing import ArrayLike

from pix2mass.config import GridConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.types import Pix2massError

ClusterRow: TypeAlias = Mapping[str, Any] | Row
"""A cluster of a catalogue: a dict or a table row with ``ra_deg``, ``dec_deg``, ``z`` and ``id``."""

MIN_COVERAGE = 0.5
"""A target pixel with less than this share of its area under usable source pixels is to be masked."""

MAX_POSITION_ERROR_PX = 0.02
"""Largest departure of the local affine from the exact WCS, in source pixels; regions that exceed it are halved."""

_PIECES_PER_TARGET = 4
"""Pieces of a source pixel are at most 1/4 of a target pixel wide: a flat image stays flat to 0.7 per cent per pixel,
whatever the angle between the grids, and exactly flat where they are parallel."""

_CHUNK_PIXELS = 1 << 17
"""Source pixels handled at once, so that temporary arrays stay in the processor's cache."""


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
        Pix2massError: the grid needs a redshift and ``z`` is not a positive number.
    """
    if grid.width_arcsec is not None:
        return grid.width_arcsec / grid.n_pixels
    if not (math.isfinite(z) and z > 0.0):
        raise Pix2massError(
            f"z: expected a redshift above 0 for a cutout {grid.width_kpc:g} kpc wide, got {z}; "
            "correct the catalogue, or give the width in arcsec (--width-arcsec)"
        )
    assert grid.width_kpc is not None
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
    bounds = _window_bounds(source_wcs, target_wcs, n_pixels, margin_px)
    if bounds is None:
        return None
    row0, row1, col0, col1 = bounds
    rows, cols = slice(max(row0, 0), min(row1, shape[0])), slice(max(col0, 0), min(col1, shape[1]))
    return None if rows.start >= rows.stop or cols.start >= cols.stop else (rows, cols)


def _window_bounds(source_wcs: WCS, target_wcs: WCS, n_pixels: int, margin_px: int) -> tuple[int, int, int, int] | None:
    """Bounding rows and columns (row0, row1, col0, col1) of the target grid in source pixels, not clipped."""
    edge = np.linspace(-0.5, n_pixels - 0.5, 9)
    x, y = pixel_to_pixel(target_wcs, source_wcs, *np.meshgrid(edge, edge))
    if not (np.isfinite(x).any() and np.isfinite(y).any()):
        return None
    low_x, high_x, low_y, high_y = np.nanmin(x), np.nanmax(x), np.nanmin(y), np.nanmax(y)
    return (
        math.floor(low_y) - margin_px,
        math.ceil(high_y) + margin_px + 1,
        math.floor(low_x) - margin_px,
        math.ceil(high_x) + margin_px + 1,
    )


class _Affine(NamedTuple):
    """target = matrix @ (column, row) + offset, pixel centres at whole numbers; its largest error in source pixels."""

    matrix: np.ndarray
    offset: np.ndarray
    error_px: float


def local_affine(source_wcs: WCS, target_wcs: WCS, bounds: tuple[int, int, int, int]) -> _Affine:
    """Least-squares affine from source to target pixels over a region, with its largest error.

    Args:
        source_wcs: WCS of the source image.
        target_wcs: WCS of the target grid.
        bounds: row0, row1, col0, col1 of the region in source pixels.

    Returns:
        matrix (2, 2), offset (2,), and the largest distance, in source pixels, from the exact WCS at 49 points. The
        error is infinite where the target's projection does not reach.
    """
    row0, row1, col0, col1 = bounds
    cols, rows = np.meshgrid(np.linspace(col0 - 0.5, col1 - 0.5, 7), np.linspace(row0 - 0.5, row1 - 0.5, 7))
    cols, rows = cols.ravel(), rows.ravel()
    target = np.stack(pixel_to_pixel(source_wcs, target_wcs, cols, rows), axis=1)
    if not np.isfinite(target).all():
        return _Affine(np.eye(2), np.zeros(2), math.inf)
    centre_col, centre_row = (col0 + col1 - 1) / 2.0, (row0 + row1 - 1) / 2.0
    design = np.stack([np.ones_like(cols), cols - centre_col, rows - centre_row], axis=1)
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    matrix = solution[1:].T
    offset = solution[0] - matrix @ (centre_col, centre_row)
    residual = (target - design @ solution).T
    error_px = float(np.hypot(*np.linalg.solve(matrix, residual)).max())
    return _Affine(matrix, offset, error_px)


def resample(
    flux: np.ndarray,
    variance: np.ndarray,
    mask: np.ndarray | None,
    source_wcs: WCS,
    target_wcs: WCS,
    n_pixels: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Regrid an image by area, conserving its flux; onto coarser, equal and finer grids.

    A source pixel is a square of even surface brightness, cut into k x k pieces (k = 1 where a target pixel is four or
    more source pixels wide). Each piece is placed by a local affine derived from the two WCS and shared between the
    target pixels by the product of its projections on x and on y, which is its exact overlap where the grids are
    parallel. The shares of a source pixel sum to one, so the flux is conserved exactly; the variance of a target pixel
    is the sum of share^2 times source variance. Bad pixels: a target pixel's flux is that of its usable part, scaled to
    its full area.

    Neighbouring target pixels share the source pixels on their border, so their noise is correlated. With s the size
    of a source pixel over that of a target pixel (s <= 1) and unrelated grids, the correlation coefficient with each of
    the four neighbours is (s/6) / (1 - s/3): 0.25 at equal scale, 0.01 on the default grid. The variance of a sum over
    many pixels is then (1 - s/3)^-2 times the sum of the returned variances: 2.25 at equal scale, 1.03 at s = 0.05. On
    finer grids (s > 1) the pixels under one source pixel are copies of it.

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
        coverage below ``MIN_COVERAGE`` are to be masked by the caller. All float64.
    """
    sums = np.zeros((4, n_pixels, n_pixels))
    bounds = _window_bounds(source_wcs, target_wcs, n_pixels, margin_px=2)
    if bounds is None:
        return sums[0], sums[1], sums[2]
    # A ring of pixels beyond the image's edge counts as masked: it tells a target pixel which part of it is uncovered.
    ratio = float(np.mean(proj_plane_pixel_scales(target_wcs)) / np.mean(proj_plane_pixel_scales(source_wcs)))
    ring = math.ceil(1.5 * ratio) + 2
    rows, cols = flux.shape
    row0, row1 = max(bounds[0], -ring), min(bounds[1], rows + ring)
    col0, col1 = max(bounds[2], -ring), min(bounds[3], cols + ring)
    if row0 >= row1 or col0 >= col1:
        return sums[0], sums[1], sums[2]

    shape = (row1 - row0, col1 - col0)
    inside = (slice(max(row0, 0), min(row1, rows)), slice(max(col0, 0), min(col1, cols)))
    place = tuple(slice(part.start - low, part.stop - low) for part, low in zip(inside, (row0, col0), strict=True))
    good = np.zeros(shape, np.bool_)
    good[place] = True if mask is None else ~mask[inside]
    source = np.zeros((2, *shape), np.float32)
    source[0][place] = flux[inside]
    source[1][place] = variance[inside]
    source[:, ~good] = 0.0
    all_good = bool(good.all())
    _drop(source, None if all_good else good, (row0, row1, col0, col1), (row0, col0), source_wcs, target_wcs, sums)

    if all_good:
        return sums[0], sums[1], np.ones((n_pixels, n_pixels))
    coverage = np.divide(sums[2], sums[3], out=np.zeros_like(sums[2]), where=sums[2] > 1e-6 * max(sums[3].max(), 1e-30))
    coverage = np.minimum(coverage, 1.0)
    scale = np.divide(1.0, coverage, out=np.zeros_like(coverage), where=coverage > 0.0)
    return sums[0] * scale, sums[1] * scale**2, coverage


def _drop(
    source: np.ndarray,
    good: np.ndarray | None,
    bounds: tuple[int, int, int, int],
    origin: tuple[int, int],
    source_wcs: WCS,
    target_wcs: WCS,
    sums: np.ndarray,
) -> None:
    """Add a region's flux, variance and, where ``good`` is given, usable and total area to ``sums`` (4, n, n)."""
    row0, row1, col0, col1 = bounds
    affine = local_affine(source_wcs, target_wcs, bounds)
    if affine.error_px > MAX_POSITION_ERROR_PX and max(row1 - row0, col1 - col0) > 8:
        if row1 - row0 >= col1 - col0:
            middle = (row0 + row1) // 2
            halves = ((row0, middle, col0, col1), (middle, row1, col0, col1))
        else:
            middle = (col0 + col1) // 2
            halves = ((row0, row1, col0, middle), (row0, row1, middle, col1))
        for half in halves:
            _drop(source, good, half, origin, source_wcs, target_wcs, sums)
        return
    if not math.isfinite(affine.error_px):
        return
    width = max(1, min(col1 - col0, math.isqrt(_CHUNK_PIXELS)))
    height = max(1, _CHUNK_PIXELS // width)
    for top in range(row0, row1, height):
        for left in range(col0, col1, width):
            bottom, right = min(top + height, row1), min(left + width, col1)
            corners = affine.matrix @ [(left, right, left, right), (top, top, bottom, bottom)] + affine.offset[:, None]
            if (corners.max(axis=1) < -2.0).any() or (corners.min(axis=1) > sums.shape[-1] + 1.0).any():
                continue
            part = (slice(top - origin[0], bottom - origin[0]), slice(left - origin[1], right - origin[1]))
            _drop_chunk(source[:, *part], None if good is None else good[part], top, left, affine, sums)


def _drop_chunk(
    source: np.ndarray, good: np.ndarray | None, row0: int, col0: int, affine: _Affine, sums: np.ndarray
) -> None:
    """Share a chunk of source pixels (2, rows, cols), whose first pixel is (row0, col0), between target pixels."""
    rows = np.arange(row0, row0 + source.shape[1])[:, None]
    cols = np.arange(col0, col0 + source.shape[2])
    (xx, xy), (yx, yy) = affine.matrix
    first_x, start_x, touched_x = _footprint(xx * cols + (xy * rows + affine.offset[0]), abs(xx) + abs(xy), sums.shape)
    first_y, start_y, touched_y = _footprint(yx * cols + (yy * rows + affine.offset[1]), abs(yx) + abs(yy), sums.shape)

    pieces = max(1, math.ceil(_PIECES_PER_TARGET * max(math.hypot(xx, xy), math.hypot(yx, yy)) - 1e-6))
    centres = (np.arange(pieces) + 0.5) / pieces - 0.5
    weights = np.zeros((touched_y, touched_x, *source.shape[1:]), np.float32)
    for a in centres:
        for b in centres:
            share_x = _shares(start_x + np.float32(xx * a + xy * b), xx / pieces, xy / pieces, touched_x)
            share_y = _shares(start_y + np.float32(yx * a + yy * b), yx / pieces, yy / pieces, touched_y)
            for j in range(touched_y):
                for i in range(touched_x):
                    weights[j, i] += share_y[j] * share_x[i]
    weights /= np.float32(pieces**2)

    corner_y, corner_x = int(first_y.min()), int(first_x.min())
    height, width = int(first_y.max()) - corner_y + touched_y, int(first_x.max()) - corner_x + touched_x
    index = ((first_y - corner_y) * width + (first_x - corner_x)).ravel()
    # Layers are flux, variance, usable area and total area; most chunks have no bad pixel and need one area only.
    area = [] if good is None else [np.ones_like(source[0])] if good.all() else [good, np.ones_like(source[0])]
    local = np.zeros((2 + len(area), height * width))
    for j in range(touched_y):
        for i in range(touched_x):
            weight, at = weights[j, i], index + (j * width + i)
            layers = [weight * source[0], weight * weight * source[1], *(weight * layer for layer in area)]
            for k, layer in enumerate(layers):
                local[k] += np.bincount(at, layer.ravel(), height * width)
    if len(area) == 1:
        local = local[[0, 1, 2, 2]]

    n_pixels = sums.shape[-1]
    to_y, to_x = (slice(max(c, 0), min(c + size, n_pixels)) for c, size in ((corner_y, height), (corner_x, width)))
    if to_y.start < to_y.stop and to_x.start < to_x.stop:
        part = local.reshape(-1, height, width)
        part = part[:, to_y.start - corner_y : to_y.stop - corner_y, to_x.start - corner_x : to_x.stop - corner_x]
        sums[: len(part), to_y, to_x] += part


def _footprint(centre: np.ndarray, width: float, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """Along one target axis: the first target pixel each source pixel touches, its centre from there, how many follow.

    Args:
        centre: target coordinate of the source pixels' centres; target pixel j covers j - 0.5 to j + 0.5.
        width: full extent of a source pixel along the axis, in target pixels.
        shape: shape of the target, whose last number bounds the first pixel.
    """
    centre = centre + 0.5
    first = np.floor(centre - 0.5 * width)
    touched = math.ceil(width - 1e-9) + 1
    from_first = (centre - first).astype(np.float32)
    return np.clip(first, -touched, shape[-1]).astype(np.intp), from_first, touched


def _shares(centre: np.ndarray, side_a: float, side_b: float, touched: int) -> list[np.ndarray]:
    """Shares of pieces about ``centre`` that fall into pixels [0, 1), [1, 2), ... along one axis; they sum to one.

    A turned square projects onto an axis as a trapezium, the convolution of the projections of its two sides.
    """
    long, short = sorted((abs(side_a), abs(side_b)), reverse=True)
    shares: list[np.ndarray] = []
    below = np.zeros_like(centre)
    for edge in range(1, touched):
        up_to = _trapezium_below(np.float32(edge) - centre, long, short)
        shares.append(up_to - below)
        below = up_to
    return [*shares, np.float32(1.0) - below]


def _trapezium_below(x: np.ndarray, long: float, short: float) -> np.ndarray:
    """Share of a unit trapezium, box ``long`` convolved with box ``short``, that lies below ``x``."""
    if short < 0.02 * long:
        return np.clip(x * np.float32(1.0 / long) + np.float32(0.5), 0.0, 1.0)
    # The integral of a box's clipped ramp t over its width is t^2 / 2 inside it and linear beyond.
    t = x * np.float32(1.0 / long) + np.float32(0.5)
    half = np.float32(0.5 * short / long)
    high, low = t + half, t - half
    integral = _ramp_integral(high)
    integral -= _ramp_integral(low)
    return np.clip(integral * np.float32(long / short), 0.0, 1.0)


def _ramp_integral(t: np.ndarray) -> np.ndarray:
    ramp = np.clip(t, 0.0, 1.0)
    return np.maximum(t - ramp, 0.0) + np.float32(0.5) * ramp * ramp
