"""The Gaussian process: hand-worked masses, errors, relevances, and what it does with what is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pix2mass.gaussian_process import GaussianProcess


def typical_mass(values, z):
    """What clusters with these values have, scatter apart."""
    return 14.5 + 0.3 * np.tanh(values[:, 0]) + 0.1 * values[:, 1] + 0.5 * (z - 0.3)


def sample(n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Two groups of three values, of which the first alone tells the mass, with 0.1 dex of scatter."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((n, 6)).astype(np.float32)
    z = rng.uniform(0.1, 0.5, n).astype(np.float32)
    true = typical_mass(values, z) + 0.1 * rng.standard_normal(n)
    label = true + 0.05 * rng.standard_normal(n)
    return tuple(torch.tensor(np.asarray(v, np.float32)) for v in (values, z, true, label, np.full(n, 0.05)))


def unfitted() -> GaussianProcess:
    """Grouped in two ways: halves, and the places within each half."""
    return GaussianProcess(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]))


def fitted(n: int = 250) -> GaussianProcess:
    values, z, _, label, error = sample(n)
    process = unfitted()
    process.fit(values, z, label, error, 1)
    return process


def test_masses_and_errors_are_those_of_the_textbook():
    process = fitted(40)
    values, z, _, label, error = sample(40)
    other, other_z, *_ = sample(5, seed=2)
    a = process.log_parameters.detach().double().exp().numpy()
    mean, scale = process.value_mean.numpy(), process.value_scale.numpy()
    zm, zs = process.z_scale.numpy()

    def covariance(x, x_z, y, y_z):
        relevance = np.outer(a[:2], a[2:5]).ravel()
        x, y = ((v.double().numpy() - mean) / scale * np.sqrt(relevance / 6) for v in (x, y))
        x_z, y_z = ((v.double().numpy() - zm) / zs for v in (x_z, y_z))
        apart = ((x[:, None] - y[None]) ** 2).sum(axis=2)
        near = np.exp(-apart) * np.exp(-a[5] * (x_z[:, None] - y_z) ** 2)
        return a[6] * near + a[7] * (1 + np.outer(x_z, y_z))

    centre = label.double().numpy().mean()
    of_labels = covariance(values, z, values, z) + np.diag((error.numpy() / 0.4) ** 2 + a[8] + 1e-6)
    cross = covariance(other, other_z, values, z)
    expected = centre + cross @ np.linalg.solve(of_labels, label.double().numpy() - centre)
    np.testing.assert_allclose(process(other, other_z).detach(), expected, atol=1e-4)
    variance = np.diag(covariance(other, other_z, other, other_z) - cross @ np.linalg.solve(of_labels, cross.T)) + a[8]
    np.testing.assert_allclose(process.sigma_dex(other, other_z), 0.4 * np.sqrt(variance), rtol=2e-3)


def test_it_learns_which_groups_matter_and_the_mass():
    process = fitted()
    half, place = (factors.detach().exp() for factors in process.log_factors)
    assert half[0] > 5 * half[1]
    assert place[0] > 3 * place[1] > 3 * place[2]
    values, z, true, *_ = sample(400, seed=5)
    error = process(values, z).detach() - true
    assert 0.09 < error.std() < 0.115 < 0.5 * true.std()
    assert ((error / process.sigma_dex(values, z)).abs() < 1).float().mean() == pytest.approx(0.68, abs=0.08)


def test_a_missing_value_is_taken_for_an_average_one_and_widens_nothing_else():
    values, z, _, label, error = sample(60)
    values[:10, 4] = torch.nan
    process = unfitted()
    process.fit(values, z, label, error, 1)
    filled = values.clone()
    filled[:, 4] = torch.where(torch.isnan(values[:, 4]), process.value_mean[4], values[:, 4])
    assert process.value_mean[4] == pytest.approx(float(values[10:, 4].mean()), abs=1e-6)
    torch.testing.assert_close(process(values, z), process(filled, z))
    assert torch.isfinite(process(values, z)).all() and torch.isfinite(process.sigma_dex(values, z)).all()


def test_values_that_no_cluster_has_or_that_never_change_say_nothing():
    values, z, _, label, error = sample(60)
    values[:, 2], values[:, 5] = torch.nan, 3.0
    process = unfitted()
    process.fit(values, z, label, error, 1)
    other = values.clone()
    other[:, 2], other[:, 5] = 7.0, 3.0 + 1e-4
    torch.testing.assert_close(process(other, z), process(values, z), atol=1e-3, rtol=0)


def test_it_comes_back_from_its_state_and_far_from_all_labels_it_says_so():
    process = fitted(30)
    copy = unfitted()
    copy.load_state_dict(process.state_dict())
    values, z, *_ = sample(7, seed=3)
    torch.testing.assert_close(copy(values, z), process(values, z))
    torch.testing.assert_close(copy.sigma_dex(values, z), process.sigma_dex(values, z), rtol=1e-4, atol=1e-5)
    assert (process.sigma_dex(values + 100, z) > 2 * process.sigma_dex(values, z).median()).all()
    mean = float(sample(30)[3].mean())
    assert (process(values + 100, process.z_scale[0].float().expand(7)) - mean).abs().max() < 0.05


def test_labels_count_that_the_relevances_were_not_learnt_from(monkeypatch):
    monkeypatch.setattr("pix2mass.gaussian_process._MOST_TO_LEARN", 20)
    values, z, _, label, error = sample(60)
    (left_out,) = set(np.random.default_rng(1).permutation(60)[20:21].tolist())
    found = []
    for change in (0.0, 1.0):
        process = unfitted()
        process.fit(values, z, label + change * (torch.arange(60) == left_out), error, 1)
        found.append(process(values, z).detach())
    moved = found[1] - found[0]
    assert moved[left_out] > 0.1 and moved.argmax() == left_out
