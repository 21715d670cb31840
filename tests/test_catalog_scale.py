"""One mass scale: offsets that were put in come back, outliers do not move them, errors are those of repetition."""

from __future__ import annotations

import numpy as np
import pytest

from pix2mass.catalog.scale import fit_scale, pair_offsets
from pix2mass.types import Pix2massError


def sources(seed: int, n: int = 400, noise: float = 0.08) -> dict[str, np.ndarray]:
    """Three sources that see random halves of the same clusters, 0, +0.1 and -0.05 dex off."""
    rng = np.random.default_rng(seed)
    true = rng.normal(14.4, 0.3, n)
    out = {}
    for name, offset in (("A", 0.0), ("B", 0.1), ("C", -0.05)):
        values = true + offset + noise * rng.standard_normal(n)
        values[rng.random(n) < 0.5] = np.nan
        out[name] = values
    return out


def test_known_offsets_come_back_within_their_errors():
    scale = fit_scale(sources(1), "A", 300, seed=1)
    for name, truth in (("A", 0.0), ("B", 0.1), ("C", -0.05)):
        assert abs(scale.offset_dex[name] - truth) <= 3.5 * scale.error_dex[name]
    assert scale.offset_dex["A"] == 0 and scale.error_dex["A"] == 0
    assert all(abs(pair.offset_dex) < 0.02 for pair in scale.after)
    assert [(pair.first, pair.second) for pair in scale.before] == [("A", "B"), ("A", "C"), ("B", "C")]


def test_errors_are_the_scatter_over_repetitions():
    offsets, errors = [], []
    for seed in range(40):
        scale = fit_scale(sources(seed, n=160), "A", 100, seed)
        offsets.append(scale.offset_dex["B"])
        errors.append(scale.error_dex["B"])
    assert np.mean(errors) == pytest.approx(np.std(offsets), rel=0.4)
    assert np.mean(offsets) == pytest.approx(0.1, abs=3 * np.std(offsets) / np.sqrt(40))


def test_outliers_do_not_move_the_median():
    labels = sources(2)
    both = np.flatnonzero(np.isfinite(labels["A"]) & np.isfinite(labels["B"]))
    clean = pair_offsets(labels, 200, 1)[0].offset_dex
    labels["B"][both[:5]] += 2.0
    assert pair_offsets(labels, 200, 1)[0].offset_dex == pytest.approx(clean, abs=0.01)


def test_a_source_is_linked_through_another():
    labels = sources(3)
    labels["C"][np.isfinite(labels["A"])] = np.nan
    scale = fit_scale(labels, "A", 200, seed=1)
    assert scale.offset_dex["C"] == pytest.approx(-0.05, abs=0.04) and scale.error_dex["C"] > scale.error_dex["B"]


def test_a_source_without_a_link_has_no_offset():
    labels = sources(4)
    labels["C"][:] = np.nan
    labels["C"][0] = 14.0
    scale = fit_scale(labels, "A", 200, seed=1)
    assert np.isnan(scale.offset_dex["C"]) and np.isfinite(scale.offset_dex["B"])
    alone = fit_scale({"A": labels["A"]}, "A", 100, 1)
    assert alone.offset_dex == {"A": 0.0} and alone.before == []


def test_seed_and_reference():
    first, again = (fit_scale(sources(5), "A", 100, seed=3) for _ in range(2))
    assert first == again and first != fit_scale(sources(5), "A", 100, seed=4)
    other = fit_scale(sources(5), "B", 100, seed=3)
    assert other.offset_dex["A"] == pytest.approx(-first.offset_dex["B"], abs=1e-9)
    with pytest.raises(Pix2massError, match="expected one of A, B, C"):
        fit_scale(sources(5), "D", 100, 1)
