"""Claim: reading a sealed store does not starve training. Random batches of 64 five-band 128 x 128 cutouts (flux and
mask) from a sealed store of 4,000, against a bare ``numpy.memmap`` of the same bytes, turn by turn in one run.

Run: python benchmarks/store.py [--cutouts 4000]. Synthetic pixels; needs about 4 GB of disk for the time of the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from pix2mass.config import GridConfig
from pix2mass.store import ImageStore
from pix2mass.types import Cutout

BATCH, N_PIXELS, ROUNDS, BATCHES_PER_ROUND = 64, 128, 8, 10


def main() -> None:
    """Write both, read both, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cutouts", type=int, default=4000)
    n = parser.parse_args().cutouts
    shape = (5, N_PIXELS, N_PIXELS)
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = ImageStore.create(Path(folder) / "store.zarr", GridConfig(n_pixels=N_PIXELS))
        flux_map = np.memmap(Path(folder) / "flux.bin", np.float32, "w+", shape=(n, *shape))
        mask_map = np.memmap(Path(folder) / "mask.bin", np.bool_, "w+", shape=(n, *shape))
        start = time.perf_counter()
        for i in range(n):
            flux = rng.standard_normal(shape, np.float32)
            mask = np.zeros(shape, np.bool_)
            mask[:, : i % N_PIXELS] = True
            store.append(
                Cutout(flux, np.ones_like(flux), mask, "ugriz", 150.0, 2.0, 4.0, np.ones(5, np.float32)), f"c{i}", 0.2
            )
            flux_map[i], mask_map[i] = flux, mask
        written = time.perf_counter() - start
        store.seal()
        sealed = time.perf_counter() - start - written
        flux_map.flush()
        mask_map.flush()
        store = ImageStore.open(store.path)

        def memmap_batch(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return np.asarray(flux_map[rows]), np.asarray(mask_map[rows])

        readers = {"store": store.batch, "memmap": memmap_batch}
        for left, right in zip(*(read(np.arange(0, n, n // 20)) for read in readers.values()), strict=True):
            assert np.array_equal(left, right), "the store does not give back what was written"
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(ROUNDS):
            for name, read in readers.items():
                batches = rng.integers(n, size=(BATCHES_PER_ROUND, BATCH))
                start = time.perf_counter()
                for rows in batches:
                    read(rows)
                rates[name].append(batches.size / (time.perf_counter() - start))
        ratios = np.array(rates["store"]) / np.array(rates["memmap"])

    print(f"{n} cutouts of 5 x {N_PIXELS} x {N_PIXELS}; written {n / written:.0f}/s, sealed in {sealed:.1f} s")
    print(f"{'reader':<10} {'median':>9} {'min':>9} {'max':>9}  cutouts per second, batches of {BATCH} random rows")
    for name, values in rates.items():
        print(f"{name:<10} {np.median(values):9.0f} {min(values):9.0f} {max(values):9.0f}")
    print(f"{'ratio':<10} {np.median(ratios):9.2f} {ratios.min():9.2f} {ratios.max():9.2f}  target at least 0.5")
    print(json.dumps({"ratio_to_memmap": float(np.median(ratios)), "cutouts_per_s": float(np.median(rates["store"]))}))


if __name__ == "__main__":
    main()
