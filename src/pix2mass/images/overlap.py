"""The inner loops of building from frames, compiled: pixel noise, and pixels shared out by the area of their overlap.

Of fast-math only the fused multiply-add is allowed, which never changes the order of a sum: the same bytes come out on
all processors that have it, which are those made since 2013.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numba import njit

_CELLS_PER_TARGET = 48
"""Least number of cells of the table of overlaps along one axis, per width of a target pixel and within limits; inside
a cell overlaps are linear in the place of the target pixel."""

_CELLS = (24, 192)
"""The limits: with the lower one the flux of sharp sources is right to 0.5% where grids are parallel."""

_MATRIX_STEP_PX = 1.0 / 256.0
"""The corners of a target pixel are rounded to this share of a source pixel, and its area then set right: bands of one
field and cutouts of one field share their table of overlaps."""

_TABLE_WIDTH_PX = 128
"""Where a target pixel is wider than this many source pixels, the table would fill the memory (113 MB at this width):
overlaps are then worked out one by one, as each source pixel lies under hardly more than one target pixel."""

_KEPT_BYTES = 256 << 20
"""Of the tables used last, those that together take no more than this are kept."""

_BLOCK = 16
"""Target pixels on a side of a block that is done at once: its source pixels stay in the processor's cache."""


class Overlaps(NamedTuple):
    """Areas of source pixels under a target pixel, by the place of its lowest corner within a source pixel.

    Attributes:
        table: (cells, cells, height, width, 3) float32. The first two axes are the fraction of the corner's y and x,
            the next two the source pixels from there on. The numbers are the area, in source pixels, in the middle of
            the cell, and how much it grows from one side of the cell to the other in x and in y.
        begin: (height,) first column that is touched anywhere in a cell.
        end: (height,) the column after the last one.
        corner: x and y from the target pixel's centre to the lowest corner of the box around it.
        total: area of a target pixel.
    """

    table: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    corner: tuple[float, float]
    total: float


def overlaps(matrix: np.ndarray) -> Overlaps:
    """Overlaps of target pixels with source pixels.

    Args:
        matrix: (2, 2) from target pixels (x, y) to source pixels (x, y).
    """
    step = min(1.0, 2.0 ** math.ceil(math.log2(np.abs(matrix).max()))) * _MATRIX_STEP_PX
    key = tuple(round(value / step) * step for value in matrix.ravel().tolist())
    with _kept_lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    found = _overlaps(*key)
    with _kept_lock:
        _kept[key] = found
        while len(_kept) > 1 and sum(one.table.nbytes for one in _kept.values()) > _KEPT_BYTES:
            _kept.popitem(last=False)
    return found


_kept: OrderedDict[tuple[float, ...], Overlaps] = OrderedDict()
_kept_lock = threading.Lock()


def is_wide(matrix: np.ndarray) -> bool:
    """Whether a target pixel is so many source pixels wide that ``gather_wide`` takes the place of ``gather``.

    Args:
        matrix: (2, 2) from target pixels (x, y) to source pixels (x, y).
    """
    return float(np.abs(matrix).sum(axis=1).max()) > _TABLE_WIDTH_PX


def _overlaps(xx: float, xy: float, yx: float, yy: float) -> Overlaps:
    width, height = abs(xx) + abs(xy), abs(yx) + abs(yy)
    least = min(max(math.ceil(_CELLS_PER_TARGET / max(width, height)), _CELLS[0]), _CELLS[1])
    # Where the grids are nearly parallel, overlaps bend where the far corner enters a source pixel: that is to happen
    # near the edge of a cell.
    cells = min(range(least, 3 * least // 2), key=lambda n: sum(abs(n * w - round(n * w)) for w in (width, height)))
    shape = (math.ceil(height - 1e-9) + 1, math.ceil(width - 1e-9) + 1)
    table = _overlap_table(xx, xy, yx, yy, cells, *shape)
    touched = (table != 0.0).any(axis=(0, 1, 4))
    begin, end = touched.argmax(axis=1), shape[1] - touched[:, ::-1].argmax(axis=1)
    end = np.where(touched.any(axis=1), end, begin)
    return Overlaps(table, begin, end, (-0.5 * width, -0.5 * height), abs(xx * yy - xy * yx))


@njit(cache=True, nogil=True, error_model="numpy")
def _area_below(x, y, corner_x, corner_y):
    """Area of a convex polygon (corners anticlockwise) left of ``x`` and below ``y``."""
    area = 0.0
    n = len(corner_x)
    for k in range(n):
        x0, y0 = corner_x[k], corner_y[k]
        x1, y1 = corner_x[(k + 1) % n], corner_y[(k + 1) % n]
        sign = -1.0
        if x0 > x1:
            x0, y0, x1, y1, sign = x1, y1, x0, y0, 1.0
        if x <= x0 or x1 <= x0:
            continue
        slope = (y1 - y0) / (x1 - x0)
        if x < x1:
            x1, y1 = x, y0 + slope * (x - x0)
        # The integral of min(edge, y) from x0 to x1.
        if y0 <= y and y1 <= y:
            area += sign * 0.5 * (y0 + y1) * (x1 - x0)
        elif y0 >= y and y1 >= y:
            area += sign * y * (x1 - x0)
        else:
            middle = x0 + (y - y0) / slope
            if y0 < y:
                area += sign * (0.5 * (y0 + y) * (middle - x0) + y * (x1 - middle))
            else:
                area += sign * (y * (middle - x0) + 0.5 * (y + y1) * (x1 - middle))
    return area


@njit(cache=True, nogil=True, error_model="numpy")
def _corners(xx, xy, yx, yy):
    """Corners of a target pixel about its centre, in source pixels, anticlockwise."""
    side = 1.0 if xx * yy - xy * yx > 0.0 else -1.0  # a mirrored grid would list the corners clockwise
    corner_x = 0.5 * np.array([-xx - side * xy, xx - side * xy, xx + side * xy, -xx + side * xy])
    corner_y = 0.5 * np.array([-yx - side * yy, yx - side * yy, yx + side * yy, -yx + side * yy])
    return corner_x, corner_y


@njit(cache=True, nogil=True, error_model="numpy")
def _overlap_table(xx, xy, yx, yy, cells, height, width):
    corner_x, corner_y = _corners(xx, xy, yx, yy)
    low_x, low_y = corner_x.min(), corner_y.min()
    # Where the lowest corner is p / cells into its source pixel, edges of source pixels lie at k - p / cells from it.
    below = np.empty(((height + 1) * cells + 1, (width + 1) * cells + 1))
    for j in range(below.shape[0]):
        for i in range(below.shape[1]):
            below[j, i] = _area_below(low_x + i / cells - 1.0, low_y + j / cells - 1.0, corner_x, corner_y)
    share = np.zeros((cells + 1, cells + 1, height, width))
    for p in range(cells + 1):
        for q in range(cells + 1):
            for row in range(height):
                j0, j1 = (row + 1) * cells - p, (row + 2) * cells - p
                for col in range(width):
                    i0, i1 = (col + 1) * cells - q, (col + 2) * cells - q
                    area = (below[j1, i1] - below[j0, i1]) - (below[j1, i0] - below[j0, i0])
                    if area > 1e-9:
                        share[p, q, row, col] = area
    table = np.empty((cells, cells, height, width, 3), np.float32)
    for p in range(cells):
        for q in range(cells):
            for row in range(height):
                for col in range(width):
                    a, b = share[p, q, row, col], share[p, q + 1, row, col]
                    c, d = share[p + 1, q, row, col], share[p + 1, q + 1, row, col]
                    table[p, q, row, col, 0] = 0.25 * (a + b + c + d)
                    table[p, q, row, col, 1] = 0.5 * ((b + d) - (a + c))
                    table[p, q, row, col, 2] = 0.5 * ((c + d) - (a + b))
    return table


@njit(nogil=True, error_model="numpy", fastmath={"contract"})
def _weigh(source, shares, at, pixel, count, dx, dy, flux, variance):
    """Add ``count`` source pixels in a row to the flux and variance of a target pixel."""
    for _ in range(count):
        share = shares[at] + dx * shares[at + np.uint64(1)] + dy * shares[at + np.uint64(2)]
        flux += share * source[pixel]
        variance += share * share * source[pixel + np.uint64(1)]
        at += np.uint64(3)
        pixel += np.uint64(2)
    return flux, variance


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def gather(pixels, matrix, offset, tile, table, begin, end, total, flux, variance, coverage, footprint):
    """Fill a tile of a target grid from the source pixels under each of its pixels.

    Args:
        pixels: (rows, cols, 2) float32, flux and variance; flux 0 and variance NaN where unusable.
        matrix: (2, 2) from target to source pixels.
        offset: (2,) x and y, in source pixels counted from the first one's lowest edge, of the lowest corner of the box
            around target pixel (0, 0).
        tile: first row, last row + 1, first column, last column + 1 of the target.
        table: see ``Overlaps``.
        begin: see ``Overlaps``.
        end: see ``Overlaps``.
        total: see ``Overlaps``.
        flux: (n, n) float32, filled: per target pixel, scaled up to its full area where a part is not covered.
        variance: (n, n) float32, filled: of that flux.
        coverage: (n, n) float32, filled: share of the target pixel's area under usable source pixels.
        footprint: (n, n) float32, filled: share under any source pixels.
    """
    rows, cols = pixels.shape[0], pixels.shape[1]
    cells, height, width = table.shape[0], table.shape[2], table.shape[3]
    source, shares = pixels.reshape(-1), table.reshape(-1)
    true_total = abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0])
    scale = np.float32(true_total / total)
    whole = np.float32(total)
    nothing = np.float32(0.0)
    for top in range(tile[0], tile[1], _BLOCK):
        for left in range(tile[2], tile[3], _BLOCK):
            for r in range(top, min(top + _BLOCK, tile[1])):
                for c in range(left, min(left + _BLOCK, tile[3])):
                    x = offset[0] + matrix[0, 0] * c + matrix[0, 1] * r
                    y = offset[1] + matrix[1, 0] * c + matrix[1, 1] * r
                    if not (x > -width and y > -height and x < cols and y < rows):
                        flux[r, c] = variance[r, c] = coverage[r, c] = footprint[r, c] = nothing
                        continue
                    low_x, low_y = math.floor(x), math.floor(y)
                    cell_x = min(int((x - low_x) * cells), cells - 1)
                    cell_y = min(int((y - low_y) * cells), cells - 1)
                    dx = np.float32((x - low_x) * cells - cell_x - 0.5)
                    dy = np.float32((y - low_y) * cells - cell_y - 0.5)
                    col, row = int(low_x), int(low_y)
                    entry = (cell_y * cells + cell_x) * height * width
                    f = v = nothing
                    if col >= 0 and row >= 0 and col + width <= cols and row + height <= rows:
                        if height == 3 and width == 3:  # native scale: with known counts the loops are unrolled
                            for a in range(3):
                                at, pixel = np.uint64(3 * (entry + a * 3)), np.uint64(2 * ((row + a) * cols + col))
                                f, v = _weigh(source, shares, at, pixel, 3, dx, dy, f, v)
                        else:
                            for a in range(height):
                                at = np.uint64(3 * (entry + a * width + begin[a]))
                                pixel = np.uint64(2 * ((row + a) * cols + col + begin[a]))
                                f, v = _weigh(source, shares, at, pixel, end[a] - begin[a], dx, dy, f, v)
                        if v == v:
                            flux[r, c], variance[r, c] = f * scale, v * scale * scale
                            coverage[r, c] = footprint[r, c] = np.float32(1.0)
                            continue
                    f = v = outside = bad = nothing
                    for a in range(height):
                        for b in range(begin[a], end[a]):
                            at = 3 * (entry + a * width + b)
                            share = shares[at] + dx * shares[at + 1] + dy * shares[at + 2]
                            if row + a < 0 or row + a >= rows or col + b < 0 or col + b >= cols:
                                outside += share
                            elif not pixels[row + a, col + b, 1] >= nothing:
                                bad += share
                            else:
                                f += share * pixels[row + a, col + b, 0]
                                v += share * share * pixels[row + a, col + b, 1]
                    footprint[r, c] = max(nothing, whole - outside) / whole
                    usable = whole - outside - bad
                    if usable < np.float32(1e-6) * whole:
                        flux[r, c] = variance[r, c] = coverage[r, c] = nothing
                    else:
                        up = scale * whole / usable
                        flux[r, c], variance[r, c] = f * up, v * up * up
                        coverage[r, c] = usable / whole


@njit(cache=True, nogil=True, error_model="numpy")
def gather_wide(pixels, matrix, offset, tile, flux, variance, coverage, footprint):
    """``gather`` for target pixels many source pixels wide: exact overlaps, without a table.

    Args:
        pixels: see ``gather``.
        matrix: see ``gather``.
        offset: (2,) x and y of the centre of target pixel (0, 0), in source pixels counted from the first one's lowest
            edge.
        tile: see ``gather``.
        flux: see ``gather``.
        variance: see ``gather``.
        coverage: see ``gather``.
        footprint: see ``gather``.
    """
    rows, cols = pixels.shape[0], pixels.shape[1]
    corner_x, corner_y = _corners(matrix[0, 0], matrix[0, 1], matrix[1, 0], matrix[1, 1])
    whole = abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0])
    # Areas below the lower and the upper edge of a row of source pixels.
    lower, upper = np.empty(cols + 1), np.empty(cols + 1)
    for r in range(tile[0], tile[1]):
        for c in range(tile[2], tile[3]):
            x = offset[0] + matrix[0, 0] * c + matrix[0, 1] * r
            y = offset[1] + matrix[1, 0] * c + matrix[1, 1] * r
            low_x, high_x = math.floor(x + corner_x.min()), math.ceil(x + corner_x.max())
            low_y, high_y = math.floor(y + corner_y.min()), math.ceil(y + corner_y.max())
            first_col, last_col = int(max(low_x, 0)), int(min(high_x, cols))
            first_row, last_row = int(max(low_y, 0)), int(min(high_y, rows))
            f = v = inside = bad = 0.0
            if first_col < last_col:
                for row in range(first_row, last_row + 1):
                    lower, upper = upper, lower
                    for col in range(first_col, last_col + 1):
                        upper[col] = _area_below(col - x, row - y, corner_x, corner_y)
                    if row == first_row:
                        continue
                    for col in range(first_col, last_col):
                        share = (upper[col + 1] - lower[col + 1]) - (upper[col] - lower[col])
                        if not share > 1e-9:
                            continue
                        inside += share
                        if pixels[row - 1, col, 1] >= 0.0:
                            f += share * pixels[row - 1, col, 0]
                            v += share * share * pixels[row - 1, col, 1]
                        else:
                            bad += share
            if low_x >= 0 and low_y >= 0 and high_x <= cols and high_y <= rows:
                inside = whole  # all of it, whatever was lost in rounding
            usable = inside - bad
            footprint[r, c] = min(inside / whole, 1.0)
            if usable < 1e-6 * whole:
                flux[r, c] = variance[r, c] = coverage[r, c] = 0.0
            else:
                flux[r, c], variance[r, c] = f * whole / usable, v * (whole / usable) ** 2
                coverage[r, c] = min(usable / whole, 1.0)


@njit(cache=True, nogil=True, error_model="numpy")
def flux_and_variance(bits, calib, sky, low_y, share_y, numbers, pixels, hot):
    """Fill ``pixels`` of a frame with flux and variance, and list its hot pixels.

    Counts are f / calib + sky and the variance is calib^2 (counts / gain + dark variance). Source: SDSS frame data
    model.

    Args:
        bits: (rows, cols) uint32, flux in nanomaggies as a FITS file holds it: big-endian float32.
        calib: (cols,) float32, nanomaggies per count.
        sky: (height, cols) float32, sky in counts by column, to be interpolated between its rows.
        low_y: (rows,) row of ``sky`` below each row, at most height - 2 (0 where the height is 1).
        share_y: (rows,) float32, distance from there.
        numbers: (3,) float32: gain in electrons per count, dark variance in counts^2, and the counts from which pixels
            are listed.
        pixels: (rows, cols, 2) float32, filled: flux and variance; 0 and NaN where either is not usable.
        hot: (rows * cols,) int32, filled at its beginning: flat numbers of the hot pixels.

    Returns:
        How many hot pixels there are.
    """
    rows, cols = bits.shape
    gain, dark_variance, hot_counts = numbers[0], numbers[1], numbers[2]
    one, zero, nan, inf = np.float32(1.0), np.float32(0.0), np.float32(np.nan), np.float32(np.inf)
    per_calib, calib2, per_gain = one / calib, calib * calib, one / gain
    swapped, counts = np.empty(cols, np.uint32), np.empty(cols, np.float32)
    flux = swapped.view(np.float32)
    n_hot = 0
    for r in range(rows):
        here, above = sky[low_y[r]], sky[min(low_y[r] + 1, sky.shape[0] - 1)]
        share, rest = share_y[r], one - share_y[r]
        line, out = bits[r], pixels[r]
        # Short loops without branches: the compiler does eight pixels at a time.
        for c in range(cols):
            b = line[c]
            ends, inner = (b >> np.uint32(24)) | (b << np.uint32(24)), (b >> np.uint32(8)) & np.uint32(0xFF00)
            swapped[c] = ends | inner | ((b << np.uint32(8)) & np.uint32(0xFF0000))
        for c in range(cols):
            counts[c] = flux[c] * per_calib[c] + (here[c] * rest + above[c] * share)
            out[c, 0], out[c, 1] = flux[c], calib2[c] * (counts[c] * per_gain + dark_variance)
        plain = 0
        for c in range(cols):
            plain += (out[c, 1] > zero) & (counts[c] < hot_counts)
        if plain == cols:
            continue
        for c in range(cols):
            if counts[c] >= hot_counts:
                hot[n_hot] = r * cols + c
                n_hot += 1
            if not (out[c, 1] > zero and out[c, 1] < inf and abs(flux[c]) < inf):
                out[c, 0], out[c, 1] = zero, nan
    return n_hot
