"""Richness measured from real SDSS galaxies against redMaPPer's own, cluster by cluster and galaxy by galaxy.

The red sequence is calibrated on satellites at z 0.10-0.20 and centrals to z 0.36, the background on the field itself.
Nothing is tuned on the clusters that are tested.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.table import Table, vstack
from astropy_healpix import HEALPix

from pix2mass.config import MockConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.images.mock import population
from pix2mass.richness import (
    Background,
    RedSequence,
    calibrate,
    colours_of,
    measure,
    radius_mpc,
    richness,
    ten_sigma_depth_mag,
)

FIELD_AREA_DEG2 = 3.357
"""One pixel of a HEALPix map with nside 32."""

NEAR, PARTLY_OUTSIDE = "RMJ092830.6+650614.0", "RMJ092842.8+652622.1"
"""The clusters at z 0.229, inside the field and complete, and z 0.337, close to its edge."""


def columns(table: Table) -> dict[str, np.ndarray]:
    found = {
        "ra_deg": np.asarray(table["RA"], float),
        "dec_deg": np.asarray(table["DEC"], float),
        "mag": np.asarray(table["MAG"], float),
        "mag_err": np.asarray(table["MAG_ERR"], float),
        "ref_mag": np.asarray(table["REFMAG"], float),
    }
    if "REFMAG_ERR" in table.colnames:
        found["ref_mag_err"] = np.asarray(table["REFMAG_ERR"], float)
    return found


@pytest.fixture(scope="module")
def photometry(real_data: Path) -> Path:
    return real_data / "photometry"


@pytest.fixture(scope="module")
def field(photometry):
    parts = sorted((photometry / "dr8_field").glob("dr8_test_galaxies_00*.fit"))
    return columns(vstack([Table.read(part) for part in parts], metadata_conflicts="silent"))


@pytest.fixture(scope="module")
def covered(field):
    """The footprint: the one HEALPix pixel that all galaxies lie in."""
    grid = HEALPix(nside=32, order="ring")
    (pixel,) = np.unique(grid.lonlat_to_healpix(field["ra_deg"] * u.deg, field["dec_deg"] * u.deg))
    return lambda ra, dec: grid.lonlat_to_healpix(ra * u.deg, dec * u.deg) == pixel


@pytest.fixture(scope="module")
def training(photometry):
    """Satellites without a cut on how red they are, certain centrals, their redshifts, and which are centrals."""
    satellites = Table.read(photometry / "test_dr8_trainredseq_gals.fit")
    centrals = Table.read(photometry / "test_dr8_centcalcat.fit")
    centrals = centrals[np.asarray(centrals["P_CEN"])[:, 0] > 0.8]
    both = [columns(satellites), columns(centrals)]
    galaxies = {name: np.concatenate([part[name] for part in both]) for name in ("mag", "mag_err", "ref_mag")}
    z = np.concatenate([np.asarray(satellites["Z"], float), np.asarray(centrals["Z"], float)])
    return galaxies, z, np.arange(len(z)) >= len(satellites), np.asarray(satellites["P"], float)


@pytest.fixture(scope="module")
def calibration(field, training) -> tuple[RedSequence, Background]:
    galaxies, z, central, _ = training
    return calibrate(galaxies, z, [field], FIELD_AREA_DEG2 * 3600.0**2, central)


@pytest.fixture(scope="module")
def published(real_data, covered):
    table = Table.read(real_data / "catalogs" / "sdss_redmapper.csv.gz", format="ascii.csv")
    table.rename_columns(["name", "RA", "dec", "redshift"], ["id", "ra_deg", "dec_deg", "z"])
    return table[covered(np.asarray(table["ra_deg"], float), np.asarray(table["dec_deg"], float))]


def test_richness_of_the_five_clusters(field, covered, calibration, published):
    found = measure(field, published, *calibration, covered=covered, i_limit_mag=ten_sigma_depth_mag(field))
    ratio = np.log(np.asarray(found["richness"]) / np.asarray(published["lambda"]))
    for row, here, value in zip(found, published, ratio, strict=True):
        print(
            f"{row['id']} z {here['z']:.3f}: {row['richness']:.1f} +- {row['richness_err']:.1f}, published "
            f"{here['lambda']:.1f}, ln ratio {value:+.3f}, S {row['scale']:.2f}, flagged {row['extrapolated']}"
        )
    assert len(found) == 5
    by_id = {str(row["id"]): (row, value) for row, value in zip(found, ratio, strict=True)}
    row, value = by_id[NEAR]
    assert abs(value) < 0.15 and row["scale"] == pytest.approx(1.0) and not row["extrapolated"]
    row, value = by_id[PARTLY_OUTSIDE]
    assert abs(value) < 0.35 and row["scale"] > 1.3 and row["extrapolated"]
    assert np.isfinite(found["richness"]).all() and (np.asarray(found["richness_err"]) > 0).all()


def test_members_of_the_near_cluster_are_those_of_redmapper(photometry, calibration):
    members = Table.read(photometry / "test_cluster_members.fit")
    galaxies = columns(members)
    centre = int(np.argmin(members["R"]))
    z, ra, dec = 0.227865, galaxies["ra_deg"][centre], galaxies["dec_deg"][centre]
    result = richness(galaxies, z, ra, dec, *calibration)
    theirs, ours = np.asarray(members["PMEM"], float), result.membership
    sure = theirs > 0.5
    area = (ours[sure][:, None] > ours[~sure]).mean() + 0.5 * (ours[sure][:, None] == ours[~sure]).mean()
    likely = theirs > 0.1
    print(
        f"area under the ROC curve {area:.4f} ({sure.sum()} of {len(sure)}); mean difference over candidates "
        f"{(ours - theirs).mean():+.4f}, where PMEM > 0.1 {(ours - theirs)[likely].mean():+.3f}, rms there "
        f"{(ours - theirs)[likely].std():.3f}; sums {ours.sum():.1f} and {theirs.sum():.1f}"
    )
    assert area > 0.98
    assert abs((ours - theirs).mean()) < 0.01
    assert abs(np.log(ours.sum() / theirs.sum())) < 0.15
    # The chi2 of likely members: the same four colours, nearly the same red sequence.
    chi2 = calibration[0].chi2(galaxies["mag"], galaxies["mag_err"], galaxies["ref_mag"], z)
    ratio = np.median(chi2[likely] / np.asarray(members["CHISQ"], float)[likely])
    print(f"chi2 over redMaPPer's, median {ratio:.2f}")
    assert 0.8 < ratio < 1.25


def test_red_sequence_predicts_the_other_half(training):
    galaxies, z, central, p = training
    rng = np.random.default_rng(1)
    tested = 0
    for _ in range(3):
        first = rng.random(len(z)) < 0.5
        sequence = RedSequence.fit(
            *(galaxies[name][first] for name in ("mag", "mag_err", "ref_mag")), z[first], central[first]
        )
        residual = colours_of(galaxies["mag"], galaxies["mag_err"])[0] - sequence.mean(z, galaxies["ref_mag"])
        satellite = ~central
        satellite[~central] = p > 0.8
        for name, kind, top in (("satellites", satellite, 0.20), ("centrals", central, 0.35)):
            for low in np.arange(0.10, top - 0.01, 0.05):
                chosen = kind & ~first & (z >= low) & (z < low + 0.05)
                if chosen.sum() < 50:
                    continue
                median = np.median(residual[chosen], axis=0)[1:3]
                print(f"{name} z {low:.2f}: N {chosen.sum()}, median g-r {median[0]:+.3f}, r-i {median[1]:+.3f}")
                assert np.all(np.abs(median) < 0.03), f"{name} z {low:.2f}: {median}"
                tested += 1
    assert tested >= 15


def test_a_cut_on_redness_narrows_the_red_sequence(training):
    """Why richness came out low: members in the wings are lost to a red sequence fitted to the reddest alone."""
    galaxies, z, central, p = training
    keep = central.copy()
    keep[~central] = p > 0.8
    widths = [
        RedSequence.fit(
            *(galaxies[name][chosen] for name in ("mag", "mag_err", "ref_mag")), z[chosen], central[chosen]
        ).scatter
        for chosen in (np.ones(len(z), bool), keep)
    ]
    print("scatter of u-g, g-r, r-i, i-z without and with the cut:", np.round(widths, 3))
    assert np.all(widths[1] < 0.85 * widths[0])


def test_baseline_of_the_published_catalogues(real_data):
    """The table of benchmarks/richness_baseline.py with fewer seeds: every N, every error within 0.004 dex."""
    path = Path(__file__).parents[2] / "benchmarks" / "richness_baseline.py"
    benchmark = runpy.run_path(str(path), run_name="richness_baseline")
    for name, sample in benchmark["samples"](real_data / "catalogs").items():
        n, *expected = benchmark["EXPECTED"][name]
        found = benchmark["score"](sample, 5).mean(axis=0)
        print(name, len(sample), np.round(found, 4))
        assert len(sample) == n
        assert found == pytest.approx(expected, abs=0.004)
        assert found[0] < 0.85 * min(found[1:])


@pytest.mark.slow
def test_mock_clusters_put_into_the_real_field_come_back(field, covered, calibration):
    rng = np.random.default_rng(5)
    config = MockConfig(miscentred_share=0.0)
    depth = ten_sigma_depth_mag(field)
    angle = np.arange(32) * 2 * np.pi / 32
    truth, found, error, redshift = [], [], [], []
    while len(found) < 200:
        ra, dec, z = rng.uniform(137.65, 142.92), rng.uniform(63.46, 66.43), rng.uniform(0.1, 0.33)
        number = float(np.round(np.exp(rng.uniform(np.log(20), np.log(100)))))
        mpc_per_deg = 3.6 * float(kpc_per_arcsec(z))
        reach = 1.15 * float(radius_mpc(number)) / mpc_per_deg
        if not covered(ra + reach * np.cos(angle) / np.cos(np.radians(dec)), dec + reach * np.sin(angle)).all():
            continue
        row = {"id": f"inserted-{len(found)}", "z": z, "ra_deg": ra, "dec_deg": dec}
        row |= {"log10_m500c_true": 14.24 + np.log10(number / 40), "richness_true": number}
        sources = population.galaxies(row, config, 4.8 / mpc_per_deg * 3600.0, 1)
        listed = population.observe(sources[sources.is_member], row, 1)
        listed |= {"ref_mag": listed["mag"][:, 3], "ref_mag_err": listed["mag_err"][:, 3]}
        both = {name: np.concatenate([field[name], listed[name]]) for name in field}
        result = richness(both, z, ra, dec, *calibration, covered=covered, i_limit_mag=depth)
        truth.append(number)
        found.append(result.richness)
        error.append(result.richness_err)
        redshift.append(z)
    truth, found, error, redshift = (np.array(values) for values in (truth, found, error, redshift))
    ratio = found / truth
    bias, standard_error = ratio.mean() - 1, ratio.std() / np.sqrt(len(ratio))
    print(
        f"mean ratio {1 + bias:.3f} +- {standard_error:.3f}, median {np.median(ratio):.3f}, scatter in ln "
        f"{np.log(ratio).std():.3f}, rms pull {np.sqrt(np.mean(((found - truth) / error) ** 2)):.2f}"
    )
    for name, values, edges in (("z", redshift, (0.1, 0.18, 0.26, 0.33)), ("lambda", truth, (19, 35, 60, 101))):
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            part = ratio[(values >= low) & (values < high)]
            print(
                f"{name} {low}-{high}: {len(part)}, mean ratio {part.mean():.3f} +- "
                f"{part.std() / np.sqrt(len(part)):.3f}, scatter in ln {np.log(part).std():.3f}"
            )
    assert abs(bias) < max(0.03, 2 * standard_error)
