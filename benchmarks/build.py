"""Claim: making cutouts from frames costs little more than unpacking the frames.

200 cutouts (five bands, 256 x 256) at random places of six real fields, in the order that ``FrameSource.groups`` gives,
against bz2 alone unpacking the same 30 frames once on as many cores, turn by turn; and against the plain way, measured
on a few cutouts and extrapolated: open, unpack and ``reproject_interp`` each frame for each cutout, perfectly shared
between the cores. Three grids: 0.396" per pixel (the headline), 0.792", and 2 Mpc wide at z = 0.25 (2.0"). Each build
runs in a fresh process, which gives its peak memory. Compiled code is loaded before the clock starts.

Run: PIX2MASS_DATA=/path/to/data python benchmarks/build.py [--rounds 3] [--store] [--scaling]

--store also builds whole stores, through disk. --scaling instead shows that the time per cutout does not depend on how
many there are: 100 to 5,000 cutouts, 33 in each field of mock frames of 400 x 500 pixels, with unpacking.
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS
from reproject import reproject_interp

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.archive import frame_path
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.images.grid import pixel_scale_arcsec, target_wcs
from pix2mass.images.mock.frames import write_frames
from pix2mass.store import build

CUTOUTS, N_PIXELS, Z, SEED, PLAIN_CUTOUTS = 200, 256, 0.25, 1, 6
CORES = min(2, os.cpu_count() or 1)
GRIDS = {
    '0.396"': GridConfig(width_arcsec=0.396 * N_PIXELS, n_pixels=N_PIXELS),
    '0.792"': GridConfig(width_arcsec=0.792 * N_PIXELS, n_pixels=N_PIXELS),
    "2 Mpc": GridConfig(n_pixels=N_PIXELS),
}
SCALING = (100, 300, 1000, 5000)
PER_FIELD, MOCK_SHAPE = 33, (400, 500)


def clusters(catalog: QTable, rows: Iterable[int]) -> list[dict[str, Any]]:
    """Rows of a catalogue as plain dictionaries."""
    return [dict(zip(catalog.colnames, catalog[int(row)], strict=True)) for row in rows]


def unpack(base: Path, index: FrameIndex) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that bz2 alone needs for all frames, read beforehand."""
    packed = [(base / frame_path(field, band, ".fits.bz2")).read_bytes() for field in index.fields for band in "ugriz"]
    with ThreadPoolExecutor(CORES) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in pool.map(lambda data: len(bz2.decompress(data)), packed):
            pass
        return time.perf_counter() - start, time.process_time() - cpu


class Measured(NamedTuple):
    """One build: seconds, seconds of processor time, peak memory in MB, seconds by phase summed over threads."""

    seconds: float
    cpu_s: float
    memory_mb: float
    phases: dict[str, float]


def make(base: Path, index: FrameIndex, grid: GridConfig, catalog: QTable, with_store: bool, answer: Any) -> None:
    """Make all cutouts and send what that took; runs in a process of its own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with FrameSource(base, grid, index) as source:
        source.cutout(clusters(catalog, [0])[0])
    with FrameSource(base, grid, index) as source, tempfile.TemporaryDirectory(dir=".") as folder:
        start, cpu = time.perf_counter(), time.process_time()
        if with_store:
            build(catalog, source, Path(folder) / "store.zarr", grid)
        else:
            groups = source.groups(catalog)
            for cluster in clusters(catalog, (row for group in groups for row in group)):
                source.cutout(cluster)
        spent = time.perf_counter() - start, time.process_time() - cpu
        phases = source.statistics()["seconds"]
    answer.send(Measured(*spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0, phases))


def apart(*args: Any) -> Measured:
    """``make`` in a process of its own."""
    context = get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=make, args=(*args, theirs))
    process.start()
    theirs.close()
    result = mine.recv()
    process.join()
    return result


def plain(base: Path, index: FrameIndex, grid: GridConfig, catalog: QTable) -> float:
    """Seconds per cutout of the plain way on one core."""
    start = time.perf_counter()
    for cluster in clusters(catalog, range(PLAIN_CUTOUTS)):
        scale = pixel_scale_arcsec(grid, cluster["z"])
        target = target_wcs(cluster["ra_deg"], cluster["dec_deg"], scale, N_PIXELS)
        covering = index.covering(cluster["ra_deg"], cluster["dec_deg"], scale * N_PIXELS)
        for band in "ugriz":
            for field in covering.get(band, []):
                data = bz2.decompress((base / frame_path(field, band, ".fits.bz2")).read_bytes())
                with warnings.catch_warnings(), fits.open(io.BytesIO(data)) as hdus:
                    warnings.simplefilter("ignore")
                    reproject_interp((hdus[0].data, WCS(hdus[0].header)), target, (N_PIXELS, N_PIXELS))
    return (time.perf_counter() - start) / PLAIN_CUTOUTS


def compare(base: Path, rounds: int, with_store: bool) -> dict[str, float]:
    """Print the table and return the numbers of the headline."""
    index = FrameIndex.from_base(base)
    per_field = -(-CUTOUTS // len(index.fields))
    catalog = random_positions(index, per_field, SEED, z=Z)[:CUTOUTS]
    order = np.random.default_rng(SEED).permutation(CUTOUTS)
    catalog = catalog[order]
    ways = [(name, grid, False) for name, grid in GRIDS.items()]
    if with_store:
        ways += [(name, grid, True) for name, grid in GRIDS.items()]
    apart(base, index, ways[0][1], catalog[:1], False)  # compiles where that was not done before
    floors: list[tuple[float, float]] = []
    results: list[list[Measured]] = [[] for _ in ways]
    ratios: list[list[tuple[float, float]]] = [[] for _ in ways]
    for _ in range(rounds):
        for k, (_, grid, writes) in enumerate(ways):
            floors.append(unpack(base, index))
            results[k].append(apart(base, index, grid, catalog, writes))
            floors.append(unpack(base, index))
            wall, cpu = np.mean(floors[-2:], axis=0)
            ratios[k].append((results[k][-1].seconds / wall, results[k][-1].cpu_s / cpu))
    walls = [wall for wall, _ in floors]
    print(f"{CUTOUTS} cutouts of 5 x {N_PIXELS} x {N_PIXELS} from {len(index)} frames on {CORES} cores")
    print(f"bz2 alone: median {statistics.median(walls):.2f} s, from {min(walls):.2f} to {max(walls):.2f}")
    print("ratio: seconds over those of bz2 alone, just before and after; cpu: the same of processor time")
    print(
        f"{'grid':<14} {'seconds':>8} {'ratio':>6} {'cpu':>6} {'cutouts/s':>9} {'plain s':>8} {'speedup':>8} {'MB':>6}"
    )
    numbers = []
    for (name, grid, writes), values, pairs in zip(ways, results, ratios, strict=True):
        seconds = statistics.median(value.seconds for value in values)
        plain_s = plain(base, index, grid, catalog) * CUTOUTS / CORES
        wall, cpu = np.median(pairs, axis=0).tolist()
        numbers.append(
            {
                "ratio_to_decompression": wall,
                "cpu_ratio_to_decompression": cpu,
                "speedup_vs_plain": plain_s / seconds,
                "peak_memory_mb": max(value.memory_mb for value in values),
                "cutouts_per_s": CUTOUTS / seconds,
            }
        )
        phases = ", ".join(f"{phase} {spent:.1f}" for phase, spent in values[-1].phases.items())
        print(
            f"{name + writes * ' store':<14} {seconds:8.2f} {wall:6.2f} {cpu:6.2f} {CUTOUTS / seconds:9.1f} "
            f"{plain_s:8.0f} {plain_s / seconds:8.1f} {numbers[-1]['peak_memory_mb']:6.0f}"
        )
        print(f"{'':<14} rounds: {' '.join(f'{ratio:.2f}' for ratio, _ in pairs)}; seconds by phase: {phases}")
    print(f"targets: ratio at most 1.25, speedup at least 8, memory under 2000 MB; plain way: {PLAIN_CUTOUTS} cutouts")
    return numbers[0]


def scale() -> dict[str, float]:
    """Print the time per cutout against their number."""
    grid = GridConfig(width_arcsec=64 * 0.396, n_pixels=64)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        base = Path(folder)
        n = -(-max(SCALING) // PER_FIELD)
        rng = np.random.default_rng(SEED)
        ra, dec = np.meshgrid(np.arange(0.5, 360.0, 15.0), np.arange(-60.0, 61.0, 15.0))
        sky = QTable({"id": [f"c{i}" for i in range(n)], "ra_deg": ra.ravel()[:n], "dec_deg": dec.ravel()[:n]})
        sky["z"] = rng.uniform(0.2, 0.4, n)
        index = write_frames(sky, MockConfig(), SEED, base, grid, shape=MOCK_SHAPE)
        catalog = random_positions(index, PER_FIELD, SEED, margin_arcsec=15.0, z=Z)
        apart(base, index, grid, catalog[:1], False)
        curve = {}
        print(f"{len(index)} mock frames of {MOCK_SHAPE}; {'cutouts':>8} {'ms each':>8} {'MB':>6}")
        for count in SCALING:
            runs = [apart(base, index, grid, catalog[:count], False) for _ in range(2 if count < 5000 else 1)]
            curve[count] = 1e3 * min(run.seconds for run in runs) / count
            print(f"{count:>44} {curve[count]:8.2f} {max(run.memory_mb for run in runs):6.0f}")
    return {"ms_per_cutout_100": curve[100], "ms_per_cutout_5000": curve[5000], "growth": curve[5000] / curve[100]}


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    args = parser.parse_args()
    data = Path(os.environ.get("PIX2MASS_DATA", "../shared/data"))
    print(json.dumps(scale() if args.scaling else compare(data / "sas", args.rounds, args.store)))


if __name__ == "__main__":
    main()
