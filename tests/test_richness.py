"""Richness: calibrated on an observed mock sky, unbiased, zero on blank sky; and the mass it predicts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.mock import population
from pix2mass.images.mock.source import MockSource
from pix2mass.images.mock.templates import templates
from pix2mass.richness import (
    RICHNESS_FLOOR,
    Background,
    RedSequence,
    RichnessMassRelation,
    calibrate,
    m_star_i_mag,
    radius_mpc,
    richness,
    richness_mass_fit,
    separation_arcsec,
)
from pix2mass.types import Pix2massError

CONFIG = MockConfig(miscentred_share=0.0)
RA_DEG, DEC_DEG = 150.0, 20.0


def observed(number: float, z: float, i: int = 0) -> dict[str, np.ndarray]:
    row = {"id": f"r{i}", "z": z, "log10_m500c_true": 14.24 + np.log10(number / 40), "richness_true": number}
    return MockSource(CONFIG, GridConfig(), 1).galaxies({**row, "ra_deg": RA_DEG, "dec_deg": DEC_DEG})


def blank_field(i: int, width_arcsec: float = 1800.0) -> dict[str, np.ndarray]:
    row = {"id": f"blank{i}", "z": 0.25, "ra_deg": RA_DEG, "dec_deg": DEC_DEG}
    return population.observe(population.galaxies(row, CONFIG, width_arcsec, 7), row, 7)


@pytest.fixture(scope="module")
def calibration() -> tuple[RedSequence, Background]:
    """As an observer calibrates: members of training clusters with redshifts, and blank fields. Nothing else is
    true."""
    redshifts = np.linspace(0.08, 0.42, 60)
    parts, z = [], []
    for i, redshift in enumerate(redshifts):
        catalogue = observed(80, redshift, 1000 + i)
        members = catalogue["truth_member"] & (catalogue["mag"][:, 3] < m_star_i_mag(redshift) + 1.75)
        parts.append({name: catalogue[name][members] for name in ("mag", "mag_err")})
        z.append(np.full(members.sum(), redshift))
    red = {name: np.concatenate([part[name] for part in parts]) for name in ("mag", "mag_err")}
    return calibrate(red, np.concatenate(z), [blank_field(i) for i in range(16)], 16 * 1800.0**2)


def measure(catalogue, z, calibration, **options):
    return richness(catalogue, z, RA_DEG, DEC_DEG, *calibration, **options)


def test_red_sequence_is_recovered(calibration):
    sequence, _ = calibration
    z = np.array([0.12, 0.2, 0.28, 0.38])
    expected = -np.diff(templates().red_magnitudes(z), axis=1)
    assert np.abs(sequence.mean(z, m_star_i_mag(z)) - expected)[:, 1:].max() < 0.035
    assert np.allclose(sequence.scatter[1:], population.RED_COLOUR_SCATTER_MAG[1:], atol=0.012)


def test_red_sequence_survives_json(calibration):
    sequence, _ = calibration
    again = RedSequence.from_dict(json.loads(json.dumps(sequence.to_dict())))
    assert np.array_equal(again.mean(0.23, 18.0), sequence.mean(0.23, 18.0))


def test_chi2_of_red_galaxies_has_four_degrees_of_freedom():
    rng = np.random.default_rng(1)
    covariance = np.outer([0.1, 0.05, 0.03, 0.03], [0.1, 0.05, 0.03, 0.03]) * (0.5 + 0.5 * np.eye(4))
    sequence = RedSequence(np.array([0.1, 0.4]), np.full((2, 4), 0.7), np.zeros(4), covariance)
    n = 20_000
    error = np.full((n, 5), 0.04)
    colours = rng.multivariate_normal(np.full(4, 0.7), covariance, n)
    mag = 20.0 - np.concatenate([np.zeros((n, 1)), np.cumsum(colours, axis=1)], axis=1)
    chi2 = sequence.chi2(mag + error * rng.normal(size=(n, 5)), error, mag[:, 3], 0.2)
    assert np.mean(chi2) == pytest.approx(4.0, abs=0.1)
    assert np.var(chi2) == pytest.approx(8.0, abs=0.6)


def test_red_sequence_needs_galaxies():
    with pytest.raises(Pix2massError, match="at least 30"):
        RedSequence.fit(np.ones((3, 5)), np.ones((3, 5)), np.ones(3), np.full(3, 0.2))


@pytest.mark.parametrize("number", [30, 100])
def test_richness_is_unbiased(number, calibration):
    ratio = np.array(
        [measure(observed(number, z, i), z, calibration).richness for z in (0.12, 0.2, 0.32) for i in range(16)]
    ) / float(number)
    # 3% is what blue members on the red sequence add; beyond that, three standard errors of 48 clusters.
    error = 1.25 * np.subtract(*np.percentile(ratio, [75, 25])) / 1.349 / np.sqrt(len(ratio))
    assert error < 0.03
    assert abs(np.median(ratio) - 1) < 0.03 + 3 * error


def test_richness_rises_with_mass(calibration):
    means = [np.mean([measure(observed(n, 0.2, i), 0.2, calibration).richness for i in range(4)]) for n in (8, 30, 120)]
    assert means[0] < means[1] / 2 < means[2] / 4


def test_errors_of_richness_cover_its_scatter(calibration):
    results = [measure(observed(40, 0.25, i), 0.25, calibration) for i in range(25)]
    pull = np.array([(r.richness - 40) / r.richness_err for r in results])
    # Galaxies of groups in front and behind add to the scatter, which the error does not know.
    assert 0.6 < np.sqrt(np.mean(np.minimum(np.abs(pull), 4) ** 2)) < 2.2


def test_blank_sky_has_almost_no_richness(calibration):
    values = [measure(blank_field(100 + i), 0.25, calibration).richness for i in range(12)]
    assert np.median(values) < 3.0


def test_members_are_found_among_the_members(calibration):
    catalogue = observed(100, 0.2)
    result = measure(catalogue, 0.2, calibration)
    assert result.membership.shape == catalogue["ra_deg"].shape
    assert result.membership.sum() * result.scale == pytest.approx(result.richness, rel=0.03)
    sure = result.membership > 0.8
    assert sure.sum() > 30 and catalogue["truth_member"][sure].mean() > 0.8
    assert result.r_c_mpc == pytest.approx(float(radius_mpc(result.richness)))


def test_masked_half_is_made_up_for(calibration):
    ratios = []
    for i in range(8):
        catalogue = observed(120, 0.2, i)
        whole = measure(catalogue, 0.2, calibration)

        def covered(ra_deg, dec_deg):
            return ra_deg > RA_DEG

        seen = covered(catalogue["ra_deg"], catalogue["dec_deg"])
        half = measure({k: v[seen] for k, v in catalogue.items()}, 0.2, calibration, covered=covered)
        assert half.scale == pytest.approx(2.0, abs=0.05)
        assert half.richness_err > whole.richness_err
        ratios.append(half.richness / whole.richness)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.12)


def test_missing_depth_is_made_up_for(calibration):
    z, limit = 0.3, m_star_i_mag(0.3) + 0.9
    ratios = [
        measure(observed(120, z, i), z, calibration, i_limit_mag=limit).richness
        / measure(observed(120, z, i), z, calibration).richness
        for i in range(6)
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_what_cannot_be_measured_is_refused(calibration):
    catalogue = observed(30, 0.2)
    with pytest.raises(Pix2massError, match="outside"):
        measure(catalogue, 0.9, calibration)
    with pytest.raises(Pix2massError, match="2%"):
        measure(catalogue, 0.2, calibration, covered=lambda ra, dec: np.zeros(len(ra), bool))


def test_separation_across_zero_right_ascension():
    assert separation_arcsec(np.array([359.999]), np.array([0.0]), 0.001, 0.0)[0] == pytest.approx(7.2)


@given(a=st.floats(13.5, 15.0), b=st.floats(0.2, 1.5), c=st.floats(-2, 2), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_relation_is_recovered_exactly_without_noise(a, b, c, seed):
    rng = np.random.default_rng(seed)
    lam, z = rng.uniform(5, 200, 40), rng.uniform(0.1, 0.4, 40)
    mass = a + b * np.log10(lam / 40) + c * np.log10((1 + z) / 1.3)
    fit = richness_mass_fit(lam, z, mass)
    assert (fit.a, fit.b, fit.c) == pytest.approx((a, b, c), abs=1e-8)
    assert np.allclose(fit.predict(lam, z), mass)


def test_no_richness_still_gives_a_mass_and_bad_input_none():
    relation = RichnessMassRelation(14.24, 0.865, -0.12)
    assert relation.predict(0.0, 0.3) == relation.predict(RICHNESS_FLOOR, 0.3)
    assert relation.predict(40.0, 0.3) == pytest.approx(14.24)
    with pytest.raises(Pix2massError, match="finite"):
        richness_mass_fit([10, 20, np.nan, 30], [0.2] * 4, [14.0] * 4)
    with pytest.raises(Pix2massError, match="at least 4"):
        richness_mass_fit([10, 20], [0.2, 0.2], [14.0, 14.2])
