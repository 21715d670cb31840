"""Claim: the richness-mass baseline on real clusters is as good as measured before. Reproduces the table of mean
absolute errors on published catalogues matched to redMaPPer SDSS DR8 within 1 arcmin and |dz| < 0.05: 10 folds, least
squares, mean of 20 seeds of the fold assignment, beside a constant and a line in log10(1+z).

Run: PIX2MASS_DATA=/path/to/data python benchmarks/richness_baseline.py [--seeds 20]. Real catalogues, no images.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from astropy.table import QTable, Table, vstack

from pix2mass.catalog.masses import MassDefinition, to_m500c
from pix2mass.catalog.match import Match, match_one_to_one
from pix2mass.catalog.published import read_published
from pix2mass.richness import (
    PUBLISHED,
    cross_validate,
    richness_mass_fit,
    richness_mass_fit_with_scatter,
)

FOLDS = 10
RADIUS_ARCMIN, DZ = 1.0, 0.05
FILES = {
    "MCXC": "mcxc.fits",
    "MCXC-II": "mcxc2.csv",
    "PSZ2": "HFI_PCCS_SZ-union_R2.08.fits",
    "ACT-DR5": "act_dr5.csv",
}
EXPECTED = {
    "MCXC": (254, 0.160, 0.230, 0.230),
    "MCXC-II": (284, 0.151, 0.223, 0.217),
    "PSZ2": (111, 0.076, 0.114, 0.096),
    "PSZ2-names": (310, 0.069, 0.113, 0.082),
    "ACT-DR5": (753, 0.100, 0.121, 0.119),
    "union": (1013, 0.124, 0.156, 0.155),
}
"""N and mean absolute errors (dex) of richness, constant and redshift, measured before with other code."""


def samples(catalogs: Path) -> dict[str, QTable]:
    """Name -> table of redMaPPer row, z, richness, log10_m500c and log10_m500c_err, a row per cluster."""
    redmapper = read_published(catalogs / "sdss_redmapper.csv.gz")
    out = {}
    for name, file in FILES.items():
        table = read_published(catalogs / file)
        table = table[np.isfinite(table["log10_m500c"]) & np.isfinite(table["z"])]
        out[name] = joined(table, redmapper, match_one_to_one(table, redmapper, RADIUS_ARCMIN, DZ))
        if name == "PSZ2":
            out["PSZ2-names"] = joined(table, redmapper, by_name(table, redmapper))
    parts, taken = [], set()
    for name in ("ACT-DR5", "PSZ2", "MCXC"):
        rows = [row not in taken for row in out[name]["row"]]
        parts.append(out[name][rows])
        taken |= set(out[name]["row"])
    out["union"] = vstack(parts, metadata_conflicts="silent")
    return out


def by_name(psz2: Table, redmapper: Table) -> Match:
    """Pairs by PSZ2's own redMaPPer names, kept where the redshifts agree."""
    rows = {str(name).strip(): row for row, name in enumerate(redmapper["id"])}
    names = [str(name).strip() for name in psz2["name_redmapper"]]
    pairs = [(i, rows[name]) for i, name in enumerate(names) if name in rows]
    pairs = [(i, j) for i, j in pairs if abs(psz2["z"][i] - redmapper["z"][j]) < DZ]
    first, second = np.array(pairs, int).T
    return Match(first, second, np.zeros(len(first)))


def joined(table: Table, redmapper: Table, match: Match) -> QTable:
    """The matched clusters: redMaPPer's redshift and richness, the other catalogue's mass."""
    return QTable(
        {
            "row": match.second,
            "z": np.asarray(redmapper["z"])[match.second],
            "richness": np.asarray(redmapper["richness"])[match.second],
            "log10_m500c": np.asarray(table["log10_m500c"])[match.first],
            "log10_m500c_err": np.asarray(table["log10_m500c_err"])[match.first],
        }
    )


def score(sample: QTable, seeds: int, given: np.ndarray | None = None) -> np.ndarray:
    """(seeds, 3) errors of richness, constant and redshift."""
    found = []
    for seed in range(seeds):
        fold = np.random.default_rng(seed).permutation(len(sample)) % FOLDS
        s = cross_validate(sample["richness"], sample["z"], sample["log10_m500c"], fold, given=given)
        found.append((s.mae_dex, s.mae_constant_dex, s.mae_redshift_dex))
    return np.array(found)


def main() -> None:
    """Print the table, the deviations and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    catalogs = Path(os.environ["PIX2MASS_DATA"]) / "catalogs"
    result = {}
    print(f"{'label':<11} {'N':>5}  richness  constant  z only    a       b       c     largest deviation, seed spread")
    for name, sample in samples(catalogs).items():
        errors = score(sample, seeds)
        fit = richness_mass_fit(sample["richness"], sample["z"], sample["log10_m500c"])
        mae, constant, redshift = errors.mean(axis=0)
        n, *expected = EXPECTED[name]
        off = np.abs(errors.mean(axis=0) - expected).max()
        same = "" if len(sample) == n else f" (expected N {n})"
        print(
            f"{name:<11} {len(sample):>5}  {mae:.4f}    {constant:.4f}    {redshift:.4f}  {fit.a:7.3f} {fit.b:7.3f} "
            f"{fit.c:7.3f}  {off:.4f}{same}, {errors[:, 0].std():.4f}"
        )
        result[name] = {
            "n": len(sample),
            "mae_dex": round(mae, 4),
            "mae_constant_dex": round(constant, 4),
            "mae_redshift_dex": round(redshift, 4),
            "a": round(fit.a, 3),
            "b": round(fit.b, 3),
            "c": round(fit.c, 2),
        }
    print(
        "\nPublished relations as they are: mean absolute error and median offset (relation minus label) in M500c, dex"
    )
    for name, sample in samples(catalogs).items():
        texts = []
        for key, relation in PUBLISHED.items():
            definition = MassDefinition(relation.overdensity, per_h=relation.per_h)
            mass = relation.mass(sample["richness"], sample["z"])
            given = np.log10(to_m500c(definition.msun(mass), np.asarray(sample["z"]), definition))
            difference = given - np.asarray(sample["log10_m500c"])
            texts.append(f"{key} {np.abs(difference).mean():.3f} {np.median(difference):+.3f}")
        print(f"{name:<11} " + "   ".join(texts))
    print(
        "\nErrors on both axes and intrinsic scatter (labels with stated errors; richness error taken as sqrt(lambda))"
    )
    for name, sample in samples(catalogs).items():
        known = np.isfinite(sample["log10_m500c_err"])
        if known.sum() < 50:
            print(f"{name:<11} no stated mass errors")
            continue
        s = sample[known]
        fit = richness_mass_fit_with_scatter(
            s["richness"], s["z"], s["log10_m500c"], np.sqrt(s["richness"]), s["log10_m500c_err"]
        )
        r, e = fit.relation, fit.errors
        print(
            f"{name:<11} N {len(s)}  a {r.a:.3f} +- {e[0]:.3f}  b {r.b:.3f} +- {e[1]:.3f}  c {r.c:.2f} +- {e[2]:.2f}  "
            f"intrinsic scatter {fit.scatter_dex:.3f} +- {e[3]:.3f} dex"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
