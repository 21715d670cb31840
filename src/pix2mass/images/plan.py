"""What a build will cost, from the index of frames alone: nothing is fetched."""

from __future__ import annotations

import bz2
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.config import GridConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.images.archive import BadFrame, Field, Folder, Http, decompress, frame_path
from pix2mass.images.frame_index import FrameIndex, Progress
from pix2mass.images.hips import request_bytes, request_pixels

FRAME_BYTES = 3.33e6
"""Mean size of a frame: 30 frames of six fields of DR12, five bands each."""
PHOTO_FIELD_BYTES = 1.5e6
"""Size of a photoField table, one per run and camera column: that of run 94, column 1, 536 fields."""
REGRID_S = 0.02
"""Core seconds to regrid one band of a cutout, where no earlier build tells: measured on a busy machine of 2 cores, 48
cutouts of six DR12 fields, 64 x 64 pixels, 2 Mpc wide at z = 0.3."""
DOWNLOAD_BYTES_PER_S = 10e6
"""Download rate where no earlier build tells: an assumption, not a measurement."""
SERVICE_S = 0.5
"""Seconds per answer of the cutout service where no earlier build tells: an assumption, not a measurement."""
_PIXEL_BYTES = 9
_FRAME_SHAPE = (1489, 2048)


def square_widths(catalog: QTable, grid: GridConfig) -> np.ndarray:
    """Widths of the cutouts in arcsec (n,); NaN where the redshift does not give one."""
    if grid.width_kpc is None:
        return np.full(len(catalog), float(grid.width_arcsec or np.nan))
    z = np.asarray(catalog["z"], float)
    usable = np.isfinite(z) & (z > 0.0)
    widths = np.full(len(catalog), np.nan)
    widths[usable] = grid.width_kpc / kpc_per_arcsec(z[usable])
    return widths


def plan_frames(
    catalog: QTable,
    grid: GridConfig,
    index: FrameIndex,
    archive: Folder | Http,
    cores: int,
    before: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What images from frames will cost.

    Args:
        catalog: columns ra_deg, dec_deg, z.
        grid: the grid of every cutout.
        index: which frames cover a position.
        archive: where the frames lie. Sizes of local files are looked up; nothing is asked of a server.
        cores: cores or processes that will work.
        before: summary of an earlier build with the same kind of source (``build.json``), or empty.
        progress: called with (clusters done, in all).

    Returns:
        ``clusters``, ``outside`` (no frame covers them), ``unusable`` (no width without a redshift), ``frames``,
        ``frame_sets`` (fields), ``gigabytes``, ``gigabytes_to_fetch``, ``hours``, ``store_gigabytes``,
        ``in_flight_gigabytes`` (frames kept until their last use, in the order of work), ``mean_frame_megabytes``, and
        ``origins``: where the rates come from.
    """
    widths = square_widths(catalog, grid)
    needs: list[list[tuple[Field, str]]] = []
    outside = 0
    for done, (cluster, width) in enumerate(zip(catalog, widths, strict=True)):
        covering = {}
        if np.isfinite(width):
            covering = index.covering(float(cluster["ra_deg"]), float(cluster["dec_deg"]), float(width))
            outside += not any(covering.get(band) for band in grid.bands)
        needs.append([(field, band) for band in grid.bands for field in covering.get(band, [])])
        if progress is not None:
            progress(done + 1, len(catalog))
    frames = sorted({frame for need in needs for frame in need})
    paths = [frame_path(field, band, index.suffix(field, band) or "") for field, band in frames]
    sizes = [size for path in paths if (size := archive.size_here(path)) is not None]
    here = isinstance(archive, Folder)
    frame_bytes = float(np.mean(sizes)) if here and sizes else FRAME_BYTES
    tables = len({frame[0][:2] for frame in frames})
    total = len(frames) * frame_bytes + tables * PHOTO_FIELD_BYTES
    to_fetch = 0.0 if here else max(total - sum(sizes), 0.0)
    hours, origin = _hours(len(catalog), len(frames), sum(map(len, needs)), to_fetch, cores, before, archive, paths)
    return {
        "clusters": len(catalog),
        "outside": outside,
        "unusable": int(np.isnan(widths).sum()),
        "frames": len(frames),
        "frame_sets": len({field for field, _ in frames}),
        "gigabytes": total / 1e9,
        "gigabytes_to_fetch": to_fetch / 1e9,
        "hours": hours,
        "store_gigabytes": store_bytes(len(catalog), grid) / 1e9,
        "in_flight_gigabytes": _most_in_flight(needs) * frame_bytes / 1e9,
        "mean_frame_megabytes": frame_bytes / 1e6,
        "origins": {
            "size": f"{len(sizes)} frames in {archive}" if here and sizes else "30 DR12 frames of six fields",
            "rate": origin,
        },
    }


def plan_hips(catalog: QTable, grid: GridConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """What images from the cutout service will cost; it does not say beforehand what it covers.

    Args:
        catalog: columns ra_deg, dec_deg, z.
        grid: the grid of every cutout.
        before: summary of an earlier build from the service, or empty.

    Returns:
        ``clusters``, ``unusable``, ``answers``, ``gigabytes``, ``gigabytes_to_fetch``, ``hours``, ``store_gigabytes``
        and ``origins``.
    """
    widths = square_widths(catalog, grid)
    usable = widths[np.isfinite(widths)]
    sizes = [request_bytes(request_pixels(grid, width / grid.n_pixels)) for width in usable]
    total, answers = float(sum(sizes)) * len(grid.bands), len(usable) * len(grid.bands)
    rate = _earlier_rate(before)
    return {
        "clusters": len(catalog),
        "unusable": int(np.isnan(widths).sum()),
        "answers": answers,
        "gigabytes": total / 1e9,
        "gigabytes_to_fetch": total / 1e9,
        "hours": (len(catalog) / rate if rate else answers * SERVICE_S) / 3600.0,
        "store_gigabytes": store_bytes(len(catalog), grid) / 1e9,
        "origins": {"rate": _EARLIER if rate else f"{SERVICE_S:g} s per answer, assumed"},
    }


def store_bytes(n: int, grid: GridConfig) -> float:
    """Most that a store of n cutouts takes on disk: flux, sigma and mask, none of them compressed."""
    return float(n) * len(grid.bands) * grid.n_pixels**2 * _PIXEL_BYTES


_EARLIER = "the earlier build of this store (build.json)"


def _earlier_rate(before: Mapping[str, Any]) -> float:
    """Cutouts per second of an earlier build, 0 where there is none."""
    seconds = float(before.get("seconds", {}).get("cutouts", 0.0))
    return before.get("made", 0) / seconds if seconds > 0.0 else 0.0


def _hours(
    n: int,
    frames: int,
    pieces: int,
    to_fetch: float,
    cores: int,
    before: Mapping[str, Any],
    archive: Folder | Http,
    paths: list[str],
) -> tuple[float, str]:
    if rate := _earlier_rate(before):
        return n / rate / 3600.0, _EARLIER
    unpack_s, what = _unpacking_time(archive, paths)
    origin = f"unpacking {what} here, just now: {unpack_s:.2f} s; regridding, measured once: {REGRID_S} s per band"
    # A frame from a server is unpacked once to check it and once to use it.
    unpacked = frames * unpack_s * (2.0 if to_fetch else 1.0)
    seconds = (unpacked + pieces * REGRID_S) / cores
    if to_fetch:
        origin += f"; download at {DOWNLOAD_BYTES_PER_S / 1e6:g} MB/s, assumed"
    return (seconds + to_fetch / DOWNLOAD_BYTES_PER_S) / 3600.0, origin


def _unpacking_time(archive: Folder | Http, paths: list[str]) -> tuple[float, str]:
    """Seconds to unpack a frame on one core: of the archive where it lies here, else a stand-in."""
    for path in paths[:: max(len(paths) // 5, 1)] if isinstance(archive, Folder) else ():
        try:
            data = archive.read(path)
            if data and path.endswith(".bz2"):
                return _seconds_to_unpack(data), "a frame"
        except BadFrame:
            continue
    rows, cols = _FRAME_SHAPE
    part = 4
    noise = np.random.default_rng(1).normal(0.0, 0.03, (rows // part, cols)).astype(">f4")
    # Frames keep ten binary digits (FLOATCOMPRESS in their headers).
    data = bz2.compress((noise.view(">u4") & np.uint32(0xFFFFE000)).tobytes())
    return part * _seconds_to_unpack(data), "a stand-in for a frame"


def _seconds_to_unpack(data: bytes) -> float:
    start = time.perf_counter()
    decompress(data)
    return time.perf_counter() - start


def _most_in_flight(needs: list[list[tuple[Field, str]]]) -> int:
    """Most frames that are needed at a time, clusters taken in the order of their first frame."""
    order = sorted((need for need in needs if need), key=lambda need: need[0])
    last = {frame: step for step, need in enumerate(order) for frame in need}
    live: set[tuple[Field, str]] = set()
    most = 0
    for step, need in enumerate(order):
        live.update(need)
        most = max(most, len(live))
        live -= {frame for frame in need if last[frame] == step}
    return most


def describe(plan: Mapping[str, Any]) -> str:
    """A plan in words, a line per number."""
    lines = [f"{plan['clusters']} clusters"]
    if plan["unusable"]:
        lines.append(f"{plan['unusable']} of them have no redshift, so no width")
    if "outside" in plan:
        lines += [
            f"{plan['outside']} of them outside the footprint",
            f"{plan['frames']} frames of {plan['frame_sets']} fields, {plan['gigabytes']:.3g} GB "
            f"({plan['mean_frame_megabytes']:.2f} MB per frame: {plan['origins']['size']})",
        ]
    else:
        lines.append(f"{plan['answers']} answers of the cutout service, {plan['gigabytes']:.3g} GB")
    lines.append(f"{plan['gigabytes_to_fetch']:.3g} GB to fetch")
    hours = plan["hours"]
    shown = f"{hours:.1f} hours" if hours >= 1.0 else f"{math.ceil(60.0 * hours)} minutes"
    lines.append(f"{shown} ({plan['origins']['rate']})")
    lines.append(
        f"{plan['store_gigabytes']:.3g} GB on disk for the store, up to twice that while it is being sealed"
        + (f"; {plan['in_flight_gigabytes']:.3g} GB for frames in flight" if "outside" in plan else "")
    )
    return "\n".join(lines)
