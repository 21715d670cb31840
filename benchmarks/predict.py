"""Claim: from a store to a table of 26,350 masses in under 10 minutes on 2 cores, with memory that does not grow.

Run: python benchmarks/predict.py [--weights default | --run runs/mine] [--clusters 26350] [--workers 2]

Synthetic pixels on the grid of the network. At 256 x 256 pixels in five bands 26,350 clusters would take 60 GB of disk,
so the store holds fewer (--stored), and the command runs over them as often as it takes; seconds are added up. The
whole command `pix2mass predict` is timed, start and table included. Memory is that of all its processes, without the
pages of the store that the system maps in; it is compared with that of a quarter of the store.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _synthetic import Synthetic, synthetic_catalog
from astropy.table import QTable

from pix2mass.distribute import open_workers
from pix2mass.predict import Predictor
from pix2mass.store import build
from pix2mass.weights import open_weights


def anonymous_mb(process: psutil.Process) -> float:
    """Memory of a process and its children in MB, mapped files left out."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return total / 1e3


def timed(store: Path, out: Path, words: list[str], workers: int) -> tuple[float, float]:
    """Seconds and peak memory (MB) of the command."""
    command = [str(Path(sys.executable).with_name("pix2mass")), "predict", str(store), *words]
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [*command, "--workers", str(workers), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            peak = max(peak, anonymous_mb(psutil.Process(process.pid)))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    if process.wait():
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - start, peak


def main() -> None:
    """Build the stores, time the command, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--weights", default="default")
    parser.add_argument("--clusters", type=int, default=26_350)
    parser.add_argument("--stored", type=int, default=3765, help="clusters in the store; 3,765 are a seventh of 26,350")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="folder that keeps the stores")
    options = parser.parse_args()
    predictor = Predictor(options.run or open_weights(options.weights))
    low, high = predictor.info["z_range"]
    words = ["--run", str(options.run)] if options.run else ["--weights", options.weights]
    stored = min(options.stored, options.clusters)
    with tempfile.TemporaryDirectory() as scratch:
        work, rows = options.cache or Path(scratch), []
        for n, rounds in ((stored // 4, 1), (stored, -(-options.clusters // stored))):
            path = work / f"synthetic-{predictor.grid.bands}-{predictor.grid.n_pixels}-{n}.zarr"
            with open_workers(options.workers) as pool:
                build(synthetic_catalog(n, (low, high), 1), Synthetic(predictor.grid), path, predictor.grid, {}, pool)
            seconds, peaks = zip(
                *(timed(path, work / "masses.ecsv", words, options.workers) for _ in range(rounds)), strict=True
            )
            table = QTable.read(work / "masses.ecsv", format="ascii.ecsv")
            assert len(table) == n
            rows.append((n * rounds, rounds, sum(seconds), max(peaks)))
    print(f"{'clusters':>8} {'rounds':>6} {'seconds':>8} {'per second':>10} {'peak memory MB':>14}")
    for n, rounds, seconds, peak in rows:
        print(f"{n:8d} {rounds:6d} {seconds:8.1f} {n / seconds:10.1f} {peak:14.0f}")
    n, rounds, seconds, peak = rows[-1]
    print(
        json.dumps(
            {
                "model": predictor.folder.path.name,
                "networks": predictor.info["folds"],
                "clusters": n,
                "rounds": rounds,
                "workers": options.workers,
                "seconds": seconds,
                "clusters_per_s": n / seconds,
                "peak_memory_mb": peak,
                "peak_memory_of_a_quarter_mb": rows[0][3],
            }
        )
    )


if __name__ == "__main__":
    main()
