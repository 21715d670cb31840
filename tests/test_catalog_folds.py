"""Folds that are level in mass within each label source, and still never part neighbours."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2mass.catalog import sky_folds


def survey() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A rare heavy source and a common light one, on a patch where some clusters are neighbours."""
    rng = np.random.default_rng(4)
    source = np.where(rng.random(400) < 0.15, "PSZ2", "ACT-DR5")
    mass = np.where(source == "PSZ2", 14.8, 14.3) + 0.2 * rng.standard_normal(400)
    return rng.uniform(100, 140, 400), rng.uniform(-20, 20, 400), mass, source


def test_each_fold_gets_its_share_of_each_source_at_all_masses():
    ra, dec, mass, source = survey()
    fold = sky_folds(ra, dec, mass, 5, 0.3, seed=1, source=source)
    assert np.ptp(np.bincount(fold, minlength=5)) <= 4
    for name in ("PSZ2", "ACT-DR5"):
        counts = np.bincount(fold[source == name], minlength=5)
        assert np.ptp(counts) <= 4, (name, counts)
        means = [mass[(fold == k) & (source == name)].mean() for k in range(5)]
        assert np.std(means) < 0.02


def test_the_seed_decides_and_sources_matter():
    ra, dec, mass, source = survey()
    first = sky_folds(ra, dec, mass, 5, 0.3, 1, source=source)
    np.testing.assert_array_equal(first, sky_folds(ra, dec, mass, 5, 0.3, 1, source=source))
    assert (first != sky_folds(ra, dec, mass, 5, 0.3, 2, source=source)).any()
    assert (first != sky_folds(ra, dec, mass, 5, 0.3, 1)).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(6, 60), n_folds=st.integers(2, 6), n_sources=st.integers(1, 4))
def test_no_fold_is_empty_and_no_group_is_parted(seed, n, n_folds, n_sources):
    rng = np.random.default_rng(seed)
    home = rng.integers(0, 12, n)  # up to 12 groups, 10 degrees apart
    ra, dec = 10.0 * home + rng.uniform(0, 0.1, n), rng.uniform(0, 0.1, n)
    if len(set(home)) < n_folds:
        return
    source = rng.integers(0, n_sources, n).astype(str)
    fold = sky_folds(ra, dec, rng.normal(14.4, 0.3, n), n_folds, 0.5, seed, source)
    assert set(fold) == set(range(n_folds))
    assert all(len(set(fold[home == one])) == 1 for one in set(home))


def test_neighbours_of_different_sources_stay_together():
    ra, dec, mass, source = survey()
    ra[1], dec[1], source[0], source[1] = ra[0] + 0.01, dec[0], "PSZ2", "ACT-DR5"
    for seed in range(5):
        fold = sky_folds(ra, dec, mass, 5, 0.3, seed, source)
        assert fold[0] == fold[1]
