"""Matching by position and redshift: one to one, the closest first, and chance measured rather than guessed."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2mass.catalog.match import candidate_pairs, chance_matches, match_one_to_one
from pix2mass.types import Pix2massError


def table(ra, dec, z=None) -> Table:
    ra = np.asarray(ra, float)
    return Table({"ra_deg": ra, "dec_deg": np.asarray(dec, float), "z": np.full(len(ra), 0.2) if z is None else z})


def test_the_closest_pair_wins_and_the_loser_takes_what_is_left():
    a = table([10.0, 10.01], [0, 0])
    b = table([10.009, 10.03], [0, 0])
    found = match_one_to_one(a, b, 3.0)
    assert found.first.tolist() == [0, 1] and found.second.tolist() == [1, 0]
    np.testing.assert_allclose(found.separation_arcmin, [1.8, 0.06], atol=1e-6)
    found = match_one_to_one(a, b, 1.0)
    assert found.first.tolist() == [1] and found.second.tolist() == [0]


def test_redshift_must_agree_and_a_missing_one_matches_nothing():
    a = table([10.0, 20.0, 30.0], [0, 0, 0], [0.2, 0.2, np.nan])
    b = table([10.0, 20.0, 30.0], [0, 0, 0], [0.249, 0.251, 0.2])
    assert match_one_to_one(a, b, 1.0, 0.05).first.tolist() == [0]
    assert match_one_to_one(a, b, 1.0, None).first.tolist() == [0, 1, 2]


def test_each_row_may_have_its_own_radius():
    a, b = table([10.0, 20.0, 30.0], [0, 0, 0]), table([10.05, 20.05, 30.05], [0, 0, 0])
    assert match_one_to_one(a, b, [2.9, 3.1, np.nan]).first.tolist() == [1]


def test_angles_are_on_the_sphere():
    a, b = table([359.995], [80.0]), table([0.02], [80.0])
    assert match_one_to_one(a, b, 1.0).separation_arcmin[0] == pytest.approx(0.025 * 60 * np.cos(np.deg2rad(80)), 1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), m=st.integers(1, 40), radius=st.floats(1.0, 40.0))
def test_matching_is_one_to_one_stable_and_the_same_either_way(seed, n, m, radius):
    rng = np.random.default_rng(seed)
    a, b = (table(rng.uniform(0, 2, k), rng.uniform(-1, 1, k), rng.uniform(0.1, 0.3, k)) for k in (n, m))
    found = match_one_to_one(a, b, radius, 0.1)
    assert len(set(found.first)) == len(set(found.second)) == len(found)
    back = match_one_to_one(b, a, radius, 0.1)
    assert set(zip(found.first, found.second, strict=True)) == set(zip(back.second, back.first, strict=True))
    separation = SkyCoord(a["ra_deg"], a["dec_deg"], unit="deg")[:, None].separation(
        SkyCoord(b["ra_deg"], b["dec_deg"], unit="deg")[None, :]
    )
    allowed = (separation.arcmin <= radius) & (np.abs(a["z"].data[:, None] - b["z"].data[None, :]) < 0.1)
    partner_a = dict(zip(found.first, found.separation_arcmin, strict=True))
    partner_b = dict(zip(found.second, found.separation_arcmin, strict=True))
    for i, j in zip(*np.nonzero(allowed), strict=True):
        apart = separation.arcmin[i, j]
        assert apart >= min(partner_a.get(i, np.inf), partner_b.get(j, np.inf)) - 1e-9


def test_chance_is_what_density_says():
    rng = np.random.default_rng(3)
    a, b = (
        table(rng.uniform(20, 30, 400), rng.uniform(-5, 5, 400)),
        table(rng.uniform(19, 31, 6000), rng.uniform(-6, 6, 6000)),
    )
    per_deg2 = 6000 / 144
    expected = 400 * per_deg2 * np.pi * (1.5 / 60) ** 2
    assert chance_matches(a, b, 1.5, 0.05) == pytest.approx(expected, rel=0.25)
    # Real counterparts do not count: the shift takes every one of them away.
    assert chance_matches(a, a, 0.2, 0.05) < 3


def test_empty_tables_and_wrong_input():
    assert len(match_one_to_one(table([], []), table([1.0], [2.0]), 1.0)) == 0
    assert len(candidate_pairs(table([1.0], [2.0]), table([1.0], [2.0]), 0.0, None)) == 0
    with pytest.raises(Pix2massError, match="second table has no column 'z'"):
        match_one_to_one(table([1.0], [2.0]), Table({"ra_deg": [1.0], "dec_deg": [2.0]}), 1.0)
    with pytest.raises(Pix2massError, match="negative"):
        match_one_to_one(table([1.0], [2.0]), table([1.0], [2.0]), -1.0)
