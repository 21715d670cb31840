"""Richness: calibrated on an observed mock sky, unbiased, zero on blank sky; and the mass it predicts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from astropy.table import QTable
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
    SkyIndex,
    calibrate,
    cross_validate,
    m_star_i_mag,
    measure,
    radius_mpc,
    red_sequence_count,
    richness,
    richness_mass_fit,
    separation_arcsec,
    ten_sigma_depth_mag,
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


def lambda_of(catalogue, z, calibration, **options):
    return richness(catalogue, z, RA_DEG, DEC_DEG, *calibration, **options)


def test_red_sequence_is_recovered(calibration):
    sequence, _ = calibration
    z = np.array([0.12, 0.2, 0.28, 0.38])
    expected = -np.diff(templates(CONFIG.physics.red_colour_offset_mag).red_magnitudes(z), axis=1)
    assert np.abs(sequence.mean(z, m_star_i_mag(z)) - expected)[:, 1:].max() < 0.035
    assert np.allclose(sequence.scatter[1:], CONFIG.physics.red_colour_scatter_mag[1:], atol=0.012)


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
        [lambda_of(observed(number, z, i), z, calibration).richness for z in (0.12, 0.2, 0.32) for i in range(28)]
    ) / float(number)
    # 3% is what blue members on the red sequence add; beyond that, three standard errors of 84 clusters.
    error = 1.25 * np.subtract(*np.percentile(ratio, [75, 25])) / 1.349 / np.sqrt(len(ratio))
    assert error < 0.03
    assert abs(np.median(ratio) - 1) < 0.03 + 3 * error


def test_richness_rises_with_mass(calibration):
    means = [
        np.mean([lambda_of(observed(n, 0.2, i), 0.2, calibration).richness for i in range(4)]) for n in (8, 30, 120)
    ]
    assert means[0] < means[1] / 2 < means[2] / 4


def test_errors_of_richness_cover_its_scatter(calibration):
    results = [lambda_of(observed(40, 0.25, i), 0.25, calibration) for i in range(25)]
    pull = np.array([(r.richness - 40) / r.richness_err for r in results])
    # Galaxies of groups in front and behind add to the scatter, which the error does not know.
    assert 0.6 < np.sqrt(np.mean(np.minimum(np.abs(pull), 4) ** 2)) < 2.2


def test_blank_sky_has_almost_no_richness(calibration):
    values = [lambda_of(blank_field(100 + i), 0.25, calibration).richness for i in range(12)]
    assert np.median(values) < 3.0


def test_members_are_found_among_the_members(calibration):
    catalogue = observed(100, 0.2)
    result = lambda_of(catalogue, 0.2, calibration)
    assert result.membership.shape == catalogue["ra_deg"].shape
    assert result.membership.sum() * result.scale == pytest.approx(result.richness, rel=0.03)
    sure = result.membership > 0.8
    assert sure.sum() > 30 and catalogue["truth_member"][sure].mean() > 0.8
    assert result.r_c_mpc == pytest.approx(float(radius_mpc(result.richness)))


def test_centrals_extend_the_relation_without_shifting_it():
    """Satellites below z 0.2; centrals, 0.05 mag redder and more alike, to z 0.35."""
    rng = np.random.default_rng(2)
    n, covariance = 1500, np.diag([0.1, 0.06, 0.02, 0.02]) ** 2
    central = np.arange(n) < 500
    z = np.where(central, rng.uniform(0.1, 0.35, n), rng.uniform(0.1, 0.2, n))
    ref_mag = m_star_i_mag(z) + np.where(central, -1.2, 0.5) + 0.4 * rng.normal(size=n)
    colour = np.array([1.9, 1.0, 0.45, 0.33]) + np.outer(z - 0.1, [0.0, 2.0, 0.4, 0.0])
    colour += np.outer(ref_mag - m_star_i_mag(z), [-0.1, -0.02, -0.005, -0.005]) + 0.05 * central[:, None]
    colour += rng.multivariate_normal(np.zeros(4), covariance, n) * np.where(central, 0.5, 1.0)[:, None]
    error = np.full((n, 5), 0.01)
    mag = -np.concatenate([np.zeros((n, 1)), np.cumsum(colour, axis=1)], axis=1) + error * rng.normal(size=(n, 5))
    sequence = RedSequence.fit(mag, error, ref_mag, z, central)
    assert np.allclose(sequence.scatter, np.sqrt(np.diag(covariance)), rtol=0.1)
    expected = np.array([1.9, 1.0, 0.45, 0.33]) + np.outer([0.05, 0.15, 0.23], [0.0, 2.0, 0.4, 0.0])
    found = sequence.mean(np.array([0.15, 0.25, 0.33]), m_star_i_mag(np.array([0.15, 0.25, 0.33])))
    assert np.abs(found - expected).max() < 0.03
    mixed = RedSequence.fit(mag, error, ref_mag, z)
    assert (mixed.mean(0.33, m_star_i_mag(0.33)) - sequence.mean(0.33, m_star_i_mag(0.33)))[1] > 0.01


def test_many_clusters_at_once_are_each_measured_as_alone(calibration):
    """Six clusters in one catalogue, one outside the calibrated redshifts, one where nothing was observed."""
    z = [0.12, 0.2, 0.3, 0.25, 0.8, 0.2]
    places = [(10.0, 0.0), (359.99, 5.0), (120.0, 45.0), (200.0, -30.0), (220.0, 10.0), (300.0, 0.0)]
    parts = []
    for i, (ra, dec) in enumerate(places[:4]):
        row = {"id": f"m{i}", "z": z[i], "log10_m500c_true": 14.5, "richness_true": 60.0, "ra_deg": ra, "dec_deg": dec}
        parts.append(MockSource(CONFIG, GridConfig(), 1).galaxies(row))
    sky = {name: np.concatenate([part[name] for part in parts]) for name in ("ra_deg", "dec_deg", "mag", "mag_err")}
    clusters = QTable(
        {"id": list("abcdef"), "z": z, "ra_deg": [p[0] for p in places], "dec_deg": [p[1] for p in places]}
    )

    table = measure(sky, clusters, *calibration, covered=lambda ra, dec: np.abs(ra - 300.0) > 5.0)
    for i in range(4):
        alone = richness(sky, z[i], *places[i], *calibration)
        assert table["richness"][i] == pytest.approx(alone.richness, rel=1e-9)
        assert table["richness_err"][i] == pytest.approx(alone.richness_err, rel=1e-6)
    assert list(table["id"]) == list("abcdef")
    assert np.isnan(table["richness"][4:]).all() and table["extrapolated"][4:].all()
    assert not table["extrapolated"][:4].any()


@given(
    ra=st.floats(0, 360),
    dec=st.floats(-90, 90),
    radius=st.floats(0.01, 3.0),
    seed=st.integers(0, 20),
)
@settings(max_examples=80, deadline=None)
def test_index_finds_every_galaxy_near(ra, dec, radius, seed):
    rng = np.random.default_rng(seed)
    # Half all over the sky, half within a few degrees of the place asked for.
    all_ra = np.concatenate([rng.uniform(0, 360, 300), (ra + rng.normal(0, 3, 300)) % 360])
    all_dec = np.concatenate(
        [np.degrees(np.arcsin(rng.uniform(-1, 1, 300))), np.clip(dec + rng.normal(0, 2, 300), -90, 90)]
    )
    found = SkyIndex(all_ra, all_dec).near(ra, dec, radius)
    truly = np.flatnonzero(separation_arcsec(all_ra, all_dec, ra, dec) < radius * 3600.0)
    assert set(truly) <= set(found) and len(set(found)) == len(found)


def test_depth_is_where_the_error_reaches_a_tenth():
    rng = np.random.default_rng(3)
    mag = np.sort(rng.uniform(17, 22, 20_000))
    error = 0.1086 * 10 ** (0.35 * (mag - 20.3)) * np.exp(0.2 * rng.normal(size=len(mag)))
    catalogue = {"mag": np.tile(mag[:, None], 5), "mag_err": np.tile(error[:, None], 5)}
    assert ten_sigma_depth_mag(catalogue) == pytest.approx(20.3, abs=0.05)
    bright = {name: column[mag < 20] for name, column in catalogue.items()}
    assert ten_sigma_depth_mag(bright) == pytest.approx(20.0, abs=0.25)


@pytest.mark.slow
def test_it_beats_a_fixed_aperture_count_in_scatter_of_mass(calibration):
    """Scatter of log10 M500c about the fitted relation: at least 10% below that of the better of two apertures."""
    # Without groups at the cluster's own redshift: no colour tells their galaxies from members, by either method.
    config = MockConfig.model_validate(
        {"log10_m500c_min": 13.8, "z_min": 0.1, "z_max": 0.4, "physics": {"correlated_structure": 0.0}}
    )
    source = MockSource(config, GridConfig(), 1)
    clusters = population.draw_clusters(config, 400, 1, "test-")
    fields = [blank_field(i) for i in range(16)]
    field = {name: np.concatenate([part[name] for part in fields]) for name in ("mag", "mag_err")}
    depth = ten_sigma_depth_mag(field)
    found = np.empty((3, len(clusters)))
    for i, cluster in enumerate(clusters):
        catalogue = source.galaxies(cluster)
        place = tuple(float(cluster[name]) for name in ("z", "ra_deg", "dec_deg"))
        found[0, i] = richness(catalogue, *place, *calibration, i_limit_mag=depth).richness
        for k, aperture_mpc in enumerate((0.75, 1.0), start=1):
            found[k, i] = red_sequence_count(
                catalogue,
                *place,
                calibration[0],
                [field],
                16 * 1800.0**2,
                aperture_mpc=aperture_mpc,
                i_limit_mag=depth,
            )
    z, mass = np.asarray(clusters["z"], float), np.asarray(clusters["log10_m500c_true"], float)
    fold = np.arange(len(z)) % 10
    scatter = [np.std(cross_validate(values, z, mass, fold).predicted - mass) for values in found]
    print(
        f"scatter, dex: matched filter {scatter[0]:.3f}, apertures of 0.75 and 1 Mpc {scatter[1]:.3f} {scatter[2]:.3f}"
    )
    assert scatter[0] < 0.9 * min(scatter[1:])


def test_masked_half_is_made_up_for(calibration):
    ratios = []
    for i in range(8):
        catalogue = observed(120, 0.2, i)
        whole = lambda_of(catalogue, 0.2, calibration)

        def covered(ra_deg, dec_deg):
            return ra_deg > RA_DEG

        seen = covered(catalogue["ra_deg"], catalogue["dec_deg"])
        half = lambda_of({k: v[seen] for k, v in catalogue.items()}, 0.2, calibration, covered=covered)
        assert half.scale == pytest.approx(2.0, abs=0.05)
        assert half.richness_err > whole.richness_err
        ratios.append(half.richness / whole.richness)
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.12)


def test_missing_depth_is_made_up_for(calibration):
    z, limit = 0.3, m_star_i_mag(0.3) + 0.9
    ratios = [
        lambda_of(observed(120, z, i), z, calibration, i_limit_mag=limit).richness
        / lambda_of(observed(120, z, i), z, calibration).richness
        for i in range(6)
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_what_cannot_be_measured_is_refused(calibration):
    catalogue = observed(30, 0.2)
    with pytest.raises(Pix2massError, match="outside"):
        lambda_of(catalogue, 0.9, calibration)
    with pytest.raises(Pix2massError, match="2%"):
        lambda_of(catalogue, 0.2, calibration, covered=lambda ra, dec: np.zeros(len(ra), bool))


def test_a_redshift_beyond_the_calibration_is_flagged(calibration):
    assert not measured(0.2, calibration).extrapolated
    assert measured(0.45, calibration).extrapolated


def measured(z, calibration):
    return lambda_of(observed(80, z), z, calibration)


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
