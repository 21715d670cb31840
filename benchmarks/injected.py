"""Claim: masses hold on real pixels. Mock clusters of known mass are painted into six real SDSS fields, and the same
clusters, with the same Poisson noise, into the mock sky.

1. A finished network, trained on mock sky alone, weighs both: bias of real against mock pixels (target below 0.05 dex)
   and ratio of the errors (target at most 1.1), bootstrapped over fields.
2. The standard task on injected clusters: the network of the recipe `best` is trained on the clusters of five fields
   and tried on the sixth, in real pixels and in mock ones, with the same folds.

Real: all pixels outside the members' light. Mock: the members' light and Poisson noise, masses, labels (0.12 dex).
The catalogued cluster in 94-1-0012 is masked to its R500c, in both. Clusters of one field overlap on the sky: each is
painted into a fresh copy, but the six fields are all the sky there is, so errors are over fields.

Run: PIX2MASS_DATA=/path/to/data python benchmarks/injected.py [--run default] [--per-field 120]

Images and networks are kept in --cache: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import QTable

from pix2mass.catalog import write_catalog
from pix2mass.config import GridConfig, MockConfig, RunConfig, load_toml
from pix2mass.cosmology import kpc_per_arcsec, r500c_kpc
from pix2mass.evaluate import baselines, scores
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frames import FrameSource
from pix2mass.images.grid import target_wcs
from pix2mass.images.inject import InjectedSource, random_clusters
from pix2mass.images.mock.source import MockSource
from pix2mass.pipeline import measure_richness
from pix2mass.predict import Predictor, predict
from pix2mass.run import RunFolder, digest
from pix2mass.store import ImageStore, build
from pix2mass.train import train
from pix2mass.types import Cutout

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "best.toml"
REAL_CLUSTER = {"ra_deg": 336.73222, "dec_deg": -0.91766, "z": 0.245, "log10_m500c": 14.15}
"""RMJ222655.7-005503.6; the mass that its richness says."""
Z_RANGE = (0.25, 0.45)
"""2 Mpc must fit between the edges of a frame: 8.5' at the lower end."""
BOOTSTRAPS = 2000


class Masked:
    """Cutouts of real frames, the catalogued cluster masked to its R500c.

    Args:
        source: the frames.
    """

    def __init__(self, source: FrameSource) -> None:
        self.source = source

    def cutout(self, cluster: Any) -> Cutout:
        """The cutout of the frames, with that mask."""
        plain = self.source.cutout(cluster)
        n = plain.flux.shape[-1]
        row, column = np.mgrid[:n, :n]
        wcs = target_wcs(plain.ra_deg, plain.dec_deg, plain.pixel_scale_arcsec, n)
        place = SkyCoord(wcs.pixel_to_world(column, row))
        centre = SkyCoord(REAL_CLUSTER["ra_deg"], REAL_CLUSTER["dec_deg"], unit="deg")
        radius = r500c_kpc(REAL_CLUSTER["log10_m500c"], REAL_CLUSTER["z"]) / kpc_per_arcsec(REAL_CLUSTER["z"])
        near = place.separation(centre).arcsec < float(radius)
        return replace(plain, mask=plain.mask | near)


class Twin:
    """Blank mock sky with the masks of the real cutouts.

    Args:
        real: images of the same clusters in real frames.
        source: the mock sky.
    """

    def __init__(self, real: ImageStore, source: MockSource) -> None:
        self.real, self.source = real, source

    def cutout(self, cluster: Any) -> Cutout:
        """Sky without a cluster; field galaxies, stars and groups along the line of sight."""
        mask = self.real[int(self.real.rows([str(cluster["id"])])[0])].mask
        blank = {name: cluster[name] for name in ("id", "z", "ra_deg", "dec_deg")}
        return replace(self.source.cutout(blank), mask=mask)


def images(
    base: Path, index: FrameIndex, mock: MockConfig, grid: GridConfig, per_field: int, seed: int, cache: Path
) -> tuple[QTable, dict[str, ImageStore]]:
    """The clusters, with richness as measured on the mock sky, and their images in real and in mock pixels."""
    width_arcsec = float(grid.width_kpc or 0.0) / float(kpc_per_arcsec(Z_RANGE[0]))
    clusters = random_clusters(index, mock, per_field * len(index.fields), seed, margin_arcsec=width_arcsec / 2 + 5)
    facts = {"seed": seed, "mock": mock.model_dump(mode="json")}
    name = f"{per_field}-{digest(facts, grid.model_dump(mode='json'))[:8]}"
    with FrameSource(base, grid, index) as source:
        painted = InjectedSource(Masked(source), mock, seed)
        real = build(
            clusters, painted, cache / f"real-{name}.zarr", grid, facts | {"source": "injected"}, progress=show("real")
        )
    sky = MockSource(mock, grid, seed)
    painted = InjectedSource(Twin(real, sky), mock, seed)
    twin = build(
        clusters, painted, cache / f"mock-{name}.zarr", grid, facts | {"source": "mock"}, progress=show("mock")
    )
    measure_richness(clusters, sky, seed, lambda *_: None)
    return clusters, {"real": real, "mock": twin}


def show(what: str) -> Callable[..., None]:
    """Progress of the making of images, a line every hundred."""

    def progress(done: int, total: int, *_: Any) -> None:
        if done % 100 == 0 or done == total:
            print(f"  {what} pixels: {done} of {total} clusters", file=sys.stderr, flush=True)

    return progress


def over_fields(statistic: Callable[[np.ndarray], float], field: np.ndarray, seed: int) -> tuple[float, float]:
    """A statistic of the rows (n,) and its standard error, from fields drawn with replacement."""
    rows = [np.flatnonzero(field == name) for name in np.unique(field)]
    rng = np.random.default_rng(seed)
    draws = [
        statistic(np.concatenate([rows[k] for k in rng.integers(len(rows), size=len(rows))])) for _ in range(BOOTSTRAPS)
    ]
    return float(statistic(np.arange(len(field)))), float(np.std(draws, ddof=1))


def compare(
    title: str, mass: dict[str, np.ndarray], true: np.ndarray, field: np.ndarray, seed: int
) -> dict[str, list[float]]:
    """Print real against mock pixels per field and over all; return values with errors over fields."""
    error = {name: np.abs(values - true) for name, values in mass.items()}
    print(f"\n{title}\n{'field':<14} {'N':>4} {'MAE real':>9} {'MAE mock':>9} {'real - mock, dex':>17}")
    for name in np.unique(field):
        here = field == name
        shift = (mass["real"] - mass["mock"])[here]
        print(
            f"{name:<14} {here.sum():>4} {error['real'][here].mean():9.4f} {error['mock'][here].mean():9.4f} "
            f"{shift.mean():+9.4f} ± {shift.std(ddof=1) / np.sqrt(here.sum()):.4f}"
        )
    found = {
        "bias_dex": over_fields(lambda rows: (mass["real"] - mass["mock"])[rows].mean(), field, seed),
        "mae_ratio": over_fields(lambda rows: error["real"][rows].mean() / error["mock"][rows].mean(), field, seed),
        "mae_real_dex": over_fields(lambda rows: error["real"][rows].mean(), field, seed),
        "mae_mock_dex": over_fields(lambda rows: error["mock"][rows].mean(), field, seed),
        "bias_to_truth_real_dex": over_fields(lambda rows: (mass["real"] - true)[rows].mean(), field, seed),
        "bias_to_truth_mock_dex": over_fields(lambda rows: (mass["mock"] - true)[rows].mean(), field, seed),
    }
    for name, (value, err) in found.items():
        print(f"  {name:<24} {value:+.4f} ± {err:.4f}")
    return {name: list(values) for name, values in found.items()}


def main() -> None:
    """Paint, weigh, train, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="default", help="run folder, or name of packaged weights")
    parser.add_argument("--per-field", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/injected"))
    options = parser.parse_args()
    if "PIX2MASS_DATA" not in os.environ:
        sys.exit("set PIX2MASS_DATA to the folder of real SDSS data (with sas/ in the archive's layout)")
    base = Path(os.environ["PIX2MASS_DATA"]) / "sas"
    config = load_toml(RunConfig, RECIPE)
    assert config.mock is not None
    mock = config.mock.model_copy(update={"z_min": Z_RANGE[0], "z_max": Z_RANGE[1]})
    options.cache.mkdir(parents=True, exist_ok=True)
    clusters, stores = images(
        base, FrameIndex.from_base(base), mock, config.grid, options.per_field, options.seed, options.cache
    )
    true, field = np.asarray(clusters["log10_m500c_true"], float), np.asarray(clusters["group"], str)
    print(
        f"{len(clusters)} MOCK clusters painted into {len(np.unique(field))} REAL fields and into mock sky, "
        f"log10 M500c {true.min():.1f} to {true.max():.1f}, z {Z_RANGE[0]} to {Z_RANGE[1]}, seed {options.seed}"
    )

    predictor = Predictor(options.run)
    tables = {name: predict(predictor, store) for name, store in stores.items()}
    mass = {name: np.asarray(table["log10_m500c"], float) for name, table in tables.items()}
    title = f"Weighed by {options.run} (trained on: {predictor.info['trained_on']})"
    out: dict[str, Any] = compare(title, mass, true, field, options.seed)
    for name, table in tables.items():
        low, high = (np.asarray(table[column], float) for column in ("q16", "q84"))
        out[f"coverage_68_{name}"] = float(((true >= low) & (true <= high)).mean())
        out[f"trusted_{name}"] = float(np.asarray(table["trusted"], bool).mean())
        print(
            f"  {name} pixels: 68% intervals hold {out[f'coverage_68_{name}']:.3f}, "
            f"trusted {out[f'trusted_{name}']:.3f} of the clusters"
        )
    print("  targets: |bias_dex| below 0.05, mae_ratio at most 1.1")

    fold = np.unique(field, return_inverse=True)[1]
    mass = {}
    for name, store in stores.items():
        folder = RunFolder(options.cache / f"{Path(store.path).stem}-run")
        write_catalog(clusters, folder / "catalog.ecsv")
        table = train(store, clusters, fold, folder, config.train, options.seed)
        mass[name] = np.asarray(table["log10_m500c"], float)
    title = "Standard task: trained on the injected clusters of five fields, tried on the sixth"
    out["leave_one_field_out"] = compare(title, mass, true, field, options.seed)
    rivals = baselines(clusters, fold)
    print(f"\n{'method':<32} {'MAE':>7} {'worst field':>12} {'bias':>8} {'slope':>6} {'over richness':>14}")
    rows = {**rivals, **{f"network, {name} pixels": values for name, values in mass.items()}}
    measured = {name: scores(values, true, fold) for name, values in rows.items()}
    for name, row in measured.items():
        ratio = row["mae_dex"] / measured["richness"]["mae_dex"]
        print(
            f"{name:<32} {row['mae_dex']:7.4f} {row['mae_worst_fold_dex']:12.4f} {row['bias_dex']:+8.4f} "
            f"{row['slope']:6.3f} {ratio:14.3f}"
        )
    print("richness: measured on the mock sky around the same clusters, not on real pixels")
    out["mae_dex"] = {name: row["mae_dex"] for name, row in measured.items()}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
