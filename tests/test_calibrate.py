"""Posteriors against closed forms and against clusters whose true masses are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from pix2mass.calibrate import (
    QUANTILES,
    Calibration,
    Posterior,
    Shrinkage,
    TrainingPrior,
    cross_calibrate,
    fit_calibration,
    flat,
    known_errors,
)


def gaussian(centre: np.ndarray, sigma: np.ndarray) -> Posterior:
    """Plain normal posteriors: one Gaussian of the comb, moved and stretched to be one."""
    shape = np.zeros(12)
    shape[5] = 1.0
    return Posterior(centre, sigma / 0.6, np.tile(shape, (len(centre), 1)))


def test_a_single_gaussian_gives_the_closed_forms(rng):
    centre, sigma = rng.uniform(14, 15, 20), rng.uniform(0.1, 0.3, 20)
    one, at = gaussian(centre, sigma), rng.uniform(13.8, 15.2, 20)
    np.testing.assert_allclose(one.cdf(at), norm.cdf(at, centre, sigma), atol=1e-12)
    np.testing.assert_allclose(one.cdf(at, 0.2), norm.cdf(at, centre, np.hypot(sigma, 0.2)), atol=1e-12)
    np.testing.assert_allclose(one.log_density(at), norm.logpdf(at, centre, sigma), atol=1e-9)
    columns = one.summary()
    np.testing.assert_allclose(columns["log10_m500c"], centre, atol=1e-6)
    np.testing.assert_allclose(columns["log10_m500c_err"], sigma, rtol=1e-4)
    for name, share in QUANTILES.items():
        np.testing.assert_allclose(columns[name], norm.ppf(share, centre, sigma), atol=1e-6)
    np.testing.assert_allclose(one.variance, sigma**2)
    np.testing.assert_allclose(one.widened(0.3 * sigma**2).variance, 1.3 * sigma**2)
    # Gneiting & Raftery 2007, JASA 102, 359, equation 21.
    x = (at - centre) / sigma
    expected = sigma * (x * (2 * norm.cdf(x) - 1) + 2 * norm.pdf(x) - 1 / np.sqrt(np.pi))
    np.testing.assert_allclose(one.crps(at), expected, atol=1e-12)


def test_the_score_of_a_mixture_is_the_mean_distance_of_draws(rng):
    shape = rng.dirichlet(np.ones(12))
    one = Posterior(np.array([14.3]), np.array([0.2]), shape[None])
    draws = np.interp(rng.random(200_000), *(lambda x: (one.cdf(x[None])[0], x))(np.linspace(10, 18, 20_000)))
    expected = np.abs(draws - 14.5).mean() - np.abs(draws - rng.permutation(draws)).mean() / 2
    assert one.crps(np.array([14.5]))[0] == pytest.approx(expected, abs=0.002)
    assert one.variance[0] == pytest.approx(draws.var(), rel=0.02)


def survey(n: int, seed: int) -> tuple[np.ndarray, ...]:
    """True masses, redshifts, and the mean and spread of a network that is 0.05 dex high, overconfident by a half, and
    worse at high redshift than it thinks; its errors have a flat top, not a normal one."""
    rng = np.random.default_rng([seed, n])
    mean, z = 14.5 + 0.4 * rng.standard_normal(n), rng.uniform(0.1, 0.5, n)
    width = 0.1 + 0.4 * z
    true = mean - 0.05 + width * (0.6 * rng.choice([-1, 1], n) + 0.8 * rng.standard_normal(n))
    return true, z, mean, np.full(n, 0.12)


def measured(true: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    error = rng.uniform(0.05, 0.25, len(true))
    return true + error * rng.standard_normal(len(true)), error


def test_intervals_hold_true_masses_although_labels_are_noisy():
    true, z, mean, sigma = survey(3000, 1)
    found = fit_calibration(mean, sigma, z, *measured(true, 2))
    assert found == Calibration.from_json(found.as_json())
    true, z, mean, sigma = survey(20_000, 3)
    one = found.posterior(mean, sigma, z)
    assert np.mean(true - one.centre) == pytest.approx(0, abs=0.02)
    pit = one.cdf(true)
    for high in (False, True):
        inside = pit[(z > 0.3) == high]
        assert ((inside > 0.16) & (inside < 0.84)).mean() == pytest.approx(0.68, abs=0.04)
        assert ((inside > 0.025) & (inside < 0.975)).mean() == pytest.approx(0.95, abs=0.02)
    assert np.abs(np.histogram(pit, 10, (0, 1))[0] / 2000 - 1).max() < 0.2


def test_few_labels_correct_little():
    true, z, mean, sigma = survey(12, 4)
    found = fit_calibration(mean, sigma, z, *measured(true, 5))
    one = found.posterior(mean, sigma, z)
    assert np.abs(one.centre - mean).max() < 0.3 and 0.02 < one.scale.min() < one.scale.max() < 0.6


def test_clusters_far_outside_get_the_correction_of_the_edge():
    true, z, mean, sigma = survey(1000, 6)
    found = fit_calibration(mean, sigma, z, *measured(true, 7))
    edge, far = (found.posterior(np.array([m]), np.array([0.12]), np.array([0.3])) for m in (mean.max(), 20.0))
    assert far.centre[0] - 20.0 == pytest.approx(edge.centre[0] - mean.max())
    assert far.scale[0] == pytest.approx(edge.scale[0])


def test_a_fold_does_not_see_its_own_labels():
    true, z, mean, sigma = survey(300, 8)
    label, error = measured(true, 9)
    fold = np.arange(300) % 3
    before, shapes = cross_calibrate(mean, sigma, z, label, error, fold)
    changed = np.where(fold == 1, label + 1.0, label)
    after, _ = cross_calibrate(mean, sigma, z, changed, error, fold)
    np.testing.assert_array_equal(before.centre[fold == 1], after.centre[fold == 1])
    assert np.abs(before.centre - after.centre)[fold != 1].min() > 0.05
    assert len(shapes) == 3 and np.sum(shapes, axis=1) == pytest.approx(np.ones(3))


def test_another_prior_is_bayes_theorem(rng):
    """Masses from one distribution, seen with known errors; told the flat prior, the posterior is the likelihood."""
    z = rng.uniform(0.1, 0.5, 4000)
    true = 14.4 + 1.0 * (z - 0.3) + 0.3 * rng.standard_normal(4000)
    label_err = np.full(4000, 0.15)
    prior = TrainingPrior.fit(true + 0.15 * rng.standard_normal(4000), label_err, z)
    assert prior == TrainingPrior.from_json(prior.as_json())
    grid = np.linspace(-0.6, 0.6, 25)
    at = 14.4 + (0.2 - 0.3) + grid[None]
    density = np.exp(prior.log_density(at, np.array([0.2])))[0]
    np.testing.assert_allclose(density, norm.pdf(grid, 0, 0.3), atol=0.08)

    seen = np.array([14.3, 14.5, 14.7])
    where, error = np.array([0.2, 0.3, 0.4]), 0.12
    middle = 14.4 + 1.0 * (where - 0.3)
    weight = 0.3**2 / (0.3**2 + error**2)
    learnt = gaussian(middle + weight * (seen - middle), np.full(3, error * np.sqrt(weight)))
    found = learnt.reweighted(prior.to(flat), where)
    np.testing.assert_allclose(found["log10_m500c"], seen, atol=0.02)
    np.testing.assert_allclose(found["log10_m500c_err"], error, rtol=0.06)
    assert (np.diff([found[name] for name in QUANTILES], axis=0) > 0).all()

    steep = learnt.reweighted(prior.to(lambda mass, z: -3.0 * (mass - 14)), where)
    # A Gaussian likelihood times exp(-3 M) moves by 3 sigma^2.
    np.testing.assert_allclose(steep["log10_m500c"], found["log10_m500c"] - 3 * error**2, atol=0.02)


def test_a_posterior_outside_the_range_of_the_labels_ends_at_its_edge(rng):
    label = rng.uniform(14, 15, 500)
    prior = TrainingPrior.fit(label, np.full(500, 0.01), np.full(500, 0.3))
    found = gaussian(np.array([16.0]), np.array([0.2])).reweighted(prior.to(flat), np.array([0.3]))
    assert 14.9 < found["log10_m500c"][0] < 15.5 and np.isfinite(list(found.values())).all()


def test_shrunk_estimates_come_back_with_the_right_errors(rng):
    true = 14.4 + 0.35 * rng.standard_normal(6000)
    label_err = rng.uniform(0.05, 0.2, 6000)
    weight = 0.35**2 / (0.35**2 + 0.3**2)
    estimate = 14.4 + weight * (true + 0.3 * rng.standard_normal(6000) - 14.4)
    line = Shrinkage.fit(estimate, true + label_err * rng.standard_normal(6000), label_err)
    assert line.slope == pytest.approx(weight, abs=4 * line.slope_err) and 0.004 < line.slope_err < 0.02
    sigma = np.full(6000, 0.35 * np.sqrt(1 - weight))
    found = line.corrected(gaussian(estimate, sigma).summary())
    assert np.polyfit(true, found["log10_m500c"], 1)[0] == pytest.approx(1, abs=0.03)
    assert (np.abs(found["log10_m500c"] - true) < found["log10_m500c_err"]).mean() == pytest.approx(0.683, abs=0.025)
    assert ((true > found["q025"]) & (true < found["q975"])).mean() == pytest.approx(0.95, abs=0.015)


def test_the_slopes_error_is_its_scatter():
    slopes, errors = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        true = rng.uniform(13.8, 15.2, 300)
        line = Shrinkage.fit(14.5 + 0.7 * (true - 14.5) + 0.15 * rng.standard_normal(300), *measured(true, seed + 99))
        slopes.append(line.slope)
        errors.append(line.slope_err)
    assert np.mean(slopes) == pytest.approx(0.7, abs=0.015)
    assert np.std(slopes) == pytest.approx(np.mean(errors), rel=0.3)


def test_a_few_labels_that_say_nothing_change_little():
    rng = np.random.default_rng(5)
    true = rng.normal(14.4, 0.4, 300)
    estimate = 14.4 + 0.8 * (true - 14.4) + 0.1 * rng.standard_normal(300)
    label_err = np.full(300, 0.1)
    doubtful = label_err.copy()
    doubtful[:6] = 2.0
    label = true + 0.1 * rng.standard_normal(300)
    line, other = Shrinkage.fit(estimate, label, label_err), Shrinkage.fit(estimate, label, doubtful)
    assert line.slope == pytest.approx(0.8, abs=0.04) and other.slope == pytest.approx(line.slope, abs=0.01)
    priors = [TrainingPrior.fit(label, error, np.full(300, 0.3)) for error in (label_err, doubtful)]
    assert priors[0].high - priors[0].low == pytest.approx(priors[1].high - priors[1].low, abs=0.05)


def test_a_prior_learnt_without_redshifts_needs_none(rng):
    label = rng.uniform(14, 15, 500)
    prior = TrainingPrior.fit(label, np.full(500, 0.01), np.zeros(500))
    one = gaussian(np.array([14.5]), np.array([0.2]))
    known, unknown = (one.reweighted(prior.to(flat), np.array([z]))["log10_m500c"] for z in (0.3, np.nan))
    assert known == unknown and np.isfinite(known)


def test_missing_errors_of_labels_are_like_most():
    np.testing.assert_array_equal(known_errors(np.array([0.1, np.nan, 0.2, 0.4])), [0.1, 0.2, 0.2, 0.4])
    np.testing.assert_array_equal(known_errors(np.full(2, np.nan)), [0, 0])


def test_the_offset_of_one_network_is_not_put_on_another():
    rng = np.random.default_rng(3)
    true, fold = rng.uniform(13.8, 15.2, 240), np.arange(240) % 2
    mean = true + 0.1 * rng.standard_normal(240) + np.where(fold == 0, 0.2, -0.2)
    z, error = rng.uniform(0.1, 0.4, 240), np.full(240, 0.05)
    found, _ = cross_calibrate(mean, np.full(240, 0.1), z, true + error * rng.standard_normal(240), error, fold)
    np.testing.assert_allclose(found.centre, mean, atol=0.01)
