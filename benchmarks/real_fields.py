"""Claims on real SDSS pixels: network 1 tells the bands of a field it has not seen; a run trained on the mock sky
weighs the one catalogued cluster of six real fields, and finds empty positions lighter.

Run: PIX2MASS_DATA=/path/to/data python benchmarks/real_fields.py --run runs/demo

Real: all images, the cluster and its published richness. Mock: everything that --run was trained on. Stamps for the
bands are 50" wide at 0.78" per pixel, in unit noise; cutouts for the mass lie on the run's own grid.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from astropy.table import QTable, vstack

from pix2mass.config import GridConfig, PretrainConfig
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.predict import Predictor, predict
from pix2mass.richness import RichnessMassRelation
from pix2mass.run import RunFolder
from pix2mass.store import build
from pix2mass.train import leave_one_group_out
from pix2mass.types import BANDS

CLUSTER = QTable(
    {
        "id": ["RMJ222655.7-005503.6"],
        "ra_deg": [336.73222],
        "dec_deg": [-0.91766],
        "z": [0.245],
        "group": ["94-1-0012"],
    }
)
RICHNESS = {"SDSS DR8": 28.1, "DES Y3": 32.5, "DES Y1": 30.5}
"""redMaPPer lambda of the cluster in three surveys (Rykoff et al. 2014, ApJ 785, 104, and its DES successors)."""
RELATION = RichnessMassRelation(a=14.238, b=0.865, c=-0.12)
"""Least squares of 254 MCXC masses on redMaPPer richness (1 arcmin, |dz| < 0.05)."""


def bands(base: Path, index: FrameIndex, per_field: int, epochs: int, work: Path, seed: int) -> dict:
    """Leave one field out: accuracy and confusion per field."""
    grid = GridConfig(width_kpc=None, width_arcsec=50.0)
    positions = random_positions(index, per_field, seed, margin_arcsec=36.0)
    with FrameSource(base, grid, index) as source:
        store = build(positions, source, work / "stamps.zarr", grid)
    config = PretrainConfig(epochs=epochs, patience=epochs, accelerator="cpu")
    return leave_one_group_out(store, RunFolder(work / "bands"), config, seed)


def masses(base: Path, index: FrameIndex, run: Path, per_field: int, work: Path, seed: int) -> QTable:
    """Mass of the cluster (first row) and of empty positions in the fields without a catalogued cluster."""
    predictor = Predictor(run)
    empty = random_positions(index, per_field, seed, margin_arcsec=60.0, z=float(CLUSTER["z"][0]))
    empty = empty[[group != str(CLUSTER["group"][0]) for group in empty["group"]]]
    positions = vstack([CLUSTER, empty])
    with FrameSource(base, predictor.grid, index) as source:
        store = build(positions, source, work / "masses.zarr", predictor.grid)
    table = predict(predictor, store)
    table["group"] = positions["group"]
    return table


def main() -> None:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--per-field", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if "PIX2MASS_DATA" not in os.environ:
        sys.exit("set PIX2MASS_DATA to the folder of real SDSS data (with sas/ in the archive's layout)")
    base = Path(os.environ["PIX2MASS_DATA"]) / "sas"
    index = FrameIndex.from_base(base)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        told = bands(base, index, options.per_field, options.epochs, work, options.seed)
        table = masses(base, index, options.run, options.per_field, work, options.seed)

    print(f'REAL: network 1 without one field, tested on it; {options.per_field} positions of 50" per field and band')
    for field, result in told.items():
        rows = "  ".join(
            f"{band}: {'/'.join(str(count) for count in counts)}"
            for band, counts in zip(BANDS, result["band_confusion"], strict=True)
        )
        print(f"  {field:<12} accuracy {result['band_accuracy']:.3f}   told {'/'.join(BANDS)} of true {rows}")
    accuracy = np.array([result["band_accuracy"] for result in told.values()])
    print(f"  mean {accuracy.mean():.3f} +- {accuracy.std(ddof=1) / np.sqrt(len(accuracy)):.3f} (guessing 0.200)")

    mass, error = float(table["log10_m500c"][0]), float(table["log10_m500c_err"][0])
    print(f"\nREAL cluster {table['id'][0]}, z 0.245, weighed by networks trained on: {table.meta['trained_on']}")
    print(f"  log10 M500c = {mass:.3f} +- {error:.3f}, flags {table['flag_names'][0]}")
    for survey, richness in RICHNESS.items():
        print(f"  richness {richness} ({survey}) says {RELATION.predict(richness, 0.245):.3f}")
    empty = table[1:]
    lighter = np.asarray(empty["log10_m500c"]) < mass
    print(f"REAL empty positions at the same redshift: {len(empty)}, by field")
    for field in sorted(set(empty["group"])):
        here = np.asarray(empty["group"]) == field
        values = np.asarray(empty["log10_m500c"])[here]
        print(
            f"  {field:<12} median {np.median(values):.3f}, 84% below {np.quantile(values, 0.84):.3f}, "
            f"lighter than the cluster {lighter[here].mean():.2f}"
        )
    margin = mass - float(np.median(empty["log10_m500c"]))
    print(f"  all: {lighter.mean():.3f} lighter, median {margin:.3f} dex lighter (targets: at least 0.90 and 0.15)")
    print(
        json.dumps(
            {
                "band_accuracy": {field: result["band_accuracy"] for field, result in told.items()},
                "band_accuracy_mean": float(accuracy.mean()),
                "log10_m500c": mass,
                "log10_m500c_err": error,
                "log10_m500c_richness": float(RELATION.predict(RICHNESS["SDSS DR8"], 0.245)),
                "flags": str(table["flag_names"][0]),
                "empty_lighter_share": float(lighter.mean()),
                "empty_median_lighter_dex": margin,
            }
        )
    )


if __name__ == "__main__":
    main()
