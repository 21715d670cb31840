"""Claim: how much of the mass the galaxies tell, if every galaxy of the survey's catalogue were read off the pictures
without a flaw. The network of the recipe `best` is given the mock galaxy catalogue, the one that richness is measured
on, in place of the sources of the picture: many clusters, their true masses, and as wide a field as wanted.

It bounds what to ask of pixels, and what a richness measured on that catalogue can add to them.

Run: python benchmarks/ceiling.py [--clusters 8000]   (all mock)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from pix2mass.config import RunConfig, load_toml
from pix2mass.cosmology import kpc_per_arcsec, l_star_red_mag
from pix2mass.evaluate import paired_difference
from pix2mass.galaxies import Described, GalaxyRegressor
from pix2mass.images.mock.population import draw_clusters
from pix2mass.images.mock.source import MockSource
from pix2mass.pipeline import measure_richness
from pix2mass.richness import richness_mass_fit

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "best.toml"
SEED = 77
TEST_SHARE = 0.25
HEADLINE_Z = (0.1, 0.4)
COLOUR_SCATTER = (0.20, 0.10, 0.06, 0.08)
"""Width of the red sequence in u-g, g-r, r-i, i-z, mag, with zero points and slope."""
FAINTEST = 2.5
"""Magnitudes below m* in i to which galaxies are given."""


def described(source: MockSource, clusters, half_width_kpc: float) -> Described:
    """What the catalogue says of each galaxy in a box, in the form of the sources of a picture."""
    parts = []
    for number, cluster in enumerate(clusters):
        z = float(cluster["z"])
        galaxies, scale = source.galaxies(cluster), float(kpc_per_arcsec(z))
        east = (galaxies["ra_deg"] - float(cluster["ra_deg"]) + 180) % 360 - 180
        x = east * np.cos(np.radians(float(cluster["dec_deg"]))) * 3600 * scale
        y = (galaxies["dec_deg"] - float(cluster["dec_deg"])) * 3600 * scale
        mag = galaxies["mag"] - l_star_red_mag(np.array([z]))[0]
        inside = (np.abs(x) < half_width_kpc) & (np.abs(y) < half_width_kpc) & (mag[:, 3] < FAINTEST)
        mag = np.nan_to_num(mag[inside], nan=5.0, posinf=5.0)
        error = np.nan_to_num(galaxies["mag_err"][inside], nan=2.0, posinf=2.0)
        radius = np.hypot(x, y)[inside]
        columns = [-0.4 * np.log(10) * mag[:, 3], np.log(error[:, 3] + 0.01), np.zeros(len(mag))]
        for band, scatter in enumerate(COLOUR_SCATTER):
            width = np.sqrt(error[:, band] ** 2 + error[:, band + 1] ** 2 + scatter**2)
            columns += [np.arcsinh((mag[:, band] - mag[:, band + 1]) / width), np.log(width)]
        columns += [radius / 1000, np.log(radius + 30), np.full(len(mag), z)]
        values = torch.tensor(np.stack(columns, axis=1), dtype=torch.float32)
        parts.append(Described(torch.zeros(len(mag), dtype=torch.long), values, torch.ones(len(mag))))
        if number % 1000 == 999:
            print(f"  galaxies of {number + 1} clusters", flush=True)
    return Described.joined(parts, [1] * len(parts))


def main() -> None:
    """Draw, fit, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=8000)
    n = parser.parse_args().clusters
    config = load_toml(RunConfig, RECIPE)
    assert config.mock is not None
    clusters, source = draw_clusters(config.mock, n, SEED, "C"), MockSource(config.mock, config.grid, SEED)
    measure_richness(clusters, source, SEED, lambda *_: None)
    z, true, label = (np.asarray(clusters[name], float) for name in ("z", "log10_m500c_true", "log10_m500c"))
    last = int((1 - TEST_SHARE) * n)
    test = np.arange(last, n)
    headline = (z[test] >= HEADLINE_Z[0]) & (z[test] <= HEADLINE_Z[1])
    estimates = {}
    for name in ("richness", "richness_true"):
        value = np.asarray(clusters[name], float)
        estimates[f"{name}, 1,000 labels"] = richness_mass_fit(value[:1000], z[:1000], label[:1000]).predict(
            value[test], z[test]
        )
    for half_width_kpc in (1000.0, 2000.0):
        galaxies = described(source, clusters, half_width_kpc)
        for known, exact in ((1000, False), (last, True)):
            rows = torch.arange(known)
            mass = torch.tensor((true if exact else label)[:known], dtype=torch.float32)
            error = torch.full((known,), 0.02 if exact else config.mock.label_scatter_dex)
            redshift = torch.tensor(z, dtype=torch.float32)
            network = GalaxyRegressor(config.grid)
            network.fit(galaxies.of(rows, n), redshift[rows], mass, error, SEED)
            with torch.no_grad():
                found, _ = network.from_described(galaxies.of(torch.from_numpy(test), n), redshift[test])
            what = "true masses" if exact else "labels"
            estimates[f"network, +-{half_width_kpc / 1000:g} Mpc, {known:,} {what}"] = found.numpy()

    print(f"\nMOCK, test clusters {len(test)} (z 0.1-0.4: {headline.sum()}), MAE against the true mass, dex")
    print(
        f"{'from the galaxy catalogue':<44} {'z 0.1-0.4':>10} {'ratio':>6} {'difference to richness':>26} {'all z':>7}"
    )
    rival = np.abs(estimates["richness, 1,000 labels"] - true[test])
    result = {}
    for name, mass in estimates.items():
        error = np.abs(mass - true[test])
        d = paired_difference(error[headline], rival[headline], SEED)
        low, high = d["interval_95_dex"]
        ratio = error[headline].mean() / rival[headline].mean()
        print(
            f"{name:<44} {error[headline].mean():10.4f} {ratio:6.3f} {d['difference_dex']:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] {error.mean():9.4f}"
        )
        result[name] = {"mae_dex": float(error[headline].mean()), "ratio_to_richness": float(ratio)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
