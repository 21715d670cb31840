"""Scores against numbers worked by hand; baselines that cannot see what they are tested on."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from astropy.table import QTable

from pix2mass.calibrate import Posterior
from pix2mass.evaluate import baselines, calibration_scores, evaluate, paired_difference, scores
from pix2mass.types import Pix2massError


def test_scores_by_hand():
    reference = np.array([13.0, 14.0, 15.0, 16.0])
    estimate = reference + [0.1, -0.1, 0.6, 0.2]
    fold = np.array([0, 0, 1, 1])
    found = scores(estimate, reference, fold)
    assert found["mae_dex"] == pytest.approx((0.1 + 0.4) / 2)
    assert found["mae_best_fold_dex"] == pytest.approx(0.1)
    assert found["mae_worst_fold_dex"] == pytest.approx(0.4)
    assert found["mae_fold_spread_dex"] == pytest.approx(0.3 / np.sqrt(2))
    assert found["bias_dex"] == pytest.approx(0.2)
    assert found["rms_dex"] == pytest.approx(np.sqrt((0.01 + 0.01 + 0.36 + 0.04) / 4))
    # Residuals about their median 0.15: 0.05, 0.25, 0.45, 0.05, of which the median is 0.15.
    assert found["nmad_dex"] == pytest.approx(1.4826 * 0.15)
    # Sum of (x - 14.5)(y - mean y) is 6, sum of (x - 14.5)^2 is 5.
    assert found["slope"] == pytest.approx(1 + (-1.5 * 0.1 + 0.5 * 0.1 + 0.5 * 0.6 + 1.5 * 0.2) / 5)
    assert found["outlier_share"] == pytest.approx(0.25)


def test_the_mean_over_folds_weighs_folds_alike():
    fold = np.array([0, 1, 1, 1])
    found = scores(np.array([14.4, 14.1, 15.1, 13.1]), np.array([14.0, 14.0, 15.0, 13.0]), fold)
    assert found["mae_dex"] == pytest.approx(0.25)
    assert scores(np.array([14.0, 15.0]), np.array([14.0, 15.0]), np.zeros(2, int))["mae_fold_spread_dex"] == 0


def test_a_paired_difference_has_the_error_of_its_mean(rng):
    first, shift = np.abs(rng.normal(0, 0.2, 400)), rng.normal(0.05, 0.1, 400)
    found = paired_difference(first, first + shift, seed=1)
    assert found["difference_dex"] == pytest.approx(-shift.mean())
    assert found["error_dex"] == pytest.approx(shift.std() / np.sqrt(400), rel=0.1)
    low, high = found["interval_95_dex"]
    assert low < found["difference_dex"] < high
    assert found == paired_difference(first, first + shift, seed=1)


def catalog(rng: np.random.Generator, n: int = 90, mock: bool = True) -> tuple[QTable, np.ndarray]:
    true, z = rng.uniform(13.6, 15.2, n), rng.uniform(0.1, 0.4, n)
    table = QTable(
        {
            "id": [f"c{i}" for i in range(n)],
            "ra_deg": np.linspace(0, 350, n),
            "dec_deg": np.zeros(n),
            "z": z,
            "log10_m500c": true + 0.1 * rng.standard_normal(n),
            "log10_m500c_err": np.full(n, 0.1),
            "richness": 40 * 10 ** (true - 14.3 + 0.1 * rng.standard_normal(n)),
            "richness_err": np.full(n, 3.0),
        }
    )
    if mock:
        table["log10_m500c_true"] = true
    return table, np.arange(n) % 3


def results(table: QTable, fold: np.ndarray, scatter: float, rng: np.random.Generator) -> QTable:
    truth = table["log10_m500c_true"] if "log10_m500c_true" in table.colnames else table["log10_m500c"]
    estimate = np.asarray(truth) + scatter * rng.standard_normal(len(table))
    shape = np.eye(12)[5]  # one Gaussian of width 0.6 of the scale
    posterior = Posterior(estimate, np.full(len(table), max(scatter, 0.02) / 0.6), np.tile(shape, (len(table), 1)))
    meta = {"shape_of_fold": [shape.tolist()] * 3}
    return QTable({"id": table["id"], "fold": fold, **posterior.columns()}, meta=meta)


def test_baselines_do_not_see_the_labels_they_are_tested_on(rng):
    table, fold = catalog(rng)
    before = baselines(table, fold)
    assert set(before) == {"constant", "redshift", "richness"}
    changed = table.copy()
    changed["log10_m500c"][fold == 1] += rng.normal(0, 1, (fold == 1).sum())
    after = baselines(changed, fold)
    for name in before:
        np.testing.assert_array_equal(before[name][fold == 1], after[name][fold == 1])
        assert (before[name][fold != 1] != after[name][fold != 1]).all()


def test_the_constant_is_the_mean_of_the_other_folds_and_redshift_its_quadratic(rng):
    table, fold = catalog(rng)
    label, z = np.asarray(table["log10_m500c"]), np.asarray(table["z"])
    np.testing.assert_allclose(baselines(table, fold)["constant"][fold == 0], label[fold != 0].mean())
    table["log10_m500c"] = 14 + 2 * z - 3 * z**2
    np.testing.assert_allclose(baselines(table, fold)["redshift"], table["log10_m500c"], atol=1e-6)


def test_the_richness_baseline_recovers_a_power_law(rng):
    table, fold = catalog(rng)
    richness, z = np.asarray(table["richness"]), np.asarray(table["z"])
    table["log10_m500c"] = 14.2 + 0.8 * np.log10(richness / 40) - 0.3 * np.log10((1 + z) / 1.3)
    np.testing.assert_allclose(baselines(table, fold)["richness"], table["log10_m500c"], atol=0.01)


def test_baselines_without_input_are_left_out(rng):
    table, fold = catalog(rng)
    table["richness"] = np.nan
    assert set(baselines(table, fold)) == {"constant", "redshift"}
    table["z"][3] = np.nan
    assert set(baselines(table, fold)) == {"constant"}


def test_metrics_hold_every_baseline_and_both_references(rng):
    table, fold = catalog(rng)
    out_of_fold = results(table, fold, 0.15, rng)
    shuffled = results(table, fold, 0.0, rng)
    shuffled["log10_m500c"] = 14.4 + 0.05 * rng.standard_normal(len(table))
    metrics, predictions = evaluate(table, out_of_fold, shuffled[::-1], 1, {"bands": "ugriz"})
    assert metrics["mock"] and metrics["n"] == 90 and metrics["bands"] == "ugriz"
    assert set(metrics["methods"]) == {"network", "constant", "redshift", "richness", "shuffled"}
    assert set(metrics["methods_against_label"]) == set(metrics["methods"])
    assert metrics["methods_against_label"]["network"]["mae_dex"] > metrics["mae_dex"]
    assert set(metrics["network_minus"]) == set(metrics["methods"]) - {"network"}
    assert metrics["ratio_to_richness"] == pytest.approx(metrics["mae_dex"] / metrics["mae_richness_dex"])
    assert 0.5 < metrics["coverage_68"] < 0.85 and metrics["coverage_95"] > 0.88
    assert sum(row["n"] for row in metrics["per_fold"]) == 90
    for rows in metrics["bins"].values():
        assert sum(row["n"] for row in rows) == 90
    json.loads(json.dumps(metrics))
    # The rows of the null test came in another order: they are matched by id.
    np.testing.assert_array_equal(predictions["log10_m500c_shuffled"], shuffled["log10_m500c"])
    np.testing.assert_array_equal(predictions["log10_m500c_true"], table["log10_m500c_true"])


def test_rows_are_matched_by_id_not_by_place(rng):
    table, fold = catalog(rng)
    out_of_fold, shuffled = results(table, fold, 0.1, rng), results(table, fold, 1.0, rng)
    straight, _ = evaluate(table, out_of_fold, shuffled, 1, {})
    turned, _ = evaluate(table[::-1], out_of_fold, shuffled, 1, {})
    assert turned["mae_dex"] == pytest.approx(straight["mae_dex"])
    assert turned["mae_richness_dex"] == pytest.approx(straight["mae_richness_dex"])


def test_on_real_data_the_label_and_its_error_are_the_reference(rng):
    table, fold = catalog(rng, mock=False)
    out_of_fold, shuffled = results(table, fold, 0.1, rng), results(table, fold, 1.0, rng)
    metrics, predictions = evaluate(table, out_of_fold, shuffled, 1, {})
    assert not metrics["mock"] and metrics["methods"] == metrics["methods_against_label"]
    assert "log10_m500c_true" not in predictions.colnames
    # Errors of 0.1 on either side make 0.14, residuals have 0.1: more than 68 per cent is inside.
    assert metrics["coverage_68"] > 0.75


def test_missing_errors_of_labels_count_as_in_training(rng):
    table, fold = catalog(rng, mock=False)
    found, shuffled = results(table, fold, 0.1, rng), results(table, fold, 0.5, rng)
    some = table.copy()
    some["log10_m500c_err"][::3] = np.nan
    with_all, with_some = (evaluate(one, found, shuffled, 1, {})[0] for one in (table, some))
    assert json.dumps(with_all) == json.dumps(with_some)


def test_shuffled_labels_as_good_as_real_ones_fail_the_null_test_and_all_numbers_are_kept(rng):
    table, fold = catalog(rng)
    metrics, predictions = evaluate(table, results(table, fold, 0.2, rng), results(table, fold, 0.2, rng), 1, {})
    assert re.match("null test failed.*the network has learnt nothing", metrics["null_test_failed"])
    assert len(predictions) == len(table)
    metrics, _ = evaluate(table, results(table, fold, 0.1, rng), results(table, fold, 2.0, rng), 1, {})
    assert "null_test_failed" not in metrics


def test_masses_that_are_not_finite_are_an_error(rng):
    table, fold = catalog(rng)
    broken = results(table, fold, 0.1, rng)
    broken["log10_m500c"][3] = np.nan
    with pytest.raises(Pix2massError, match="not finite"):
        evaluate(table, broken, results(table, fold, 2.0, rng), 1, {})


def test_clusters_without_a_richness_do_not_remove_the_rival(rng):
    table, fold = catalog(rng)
    without = np.arange(len(table)) % 4 == 0
    table["richness"][without] = np.nan
    out_of_fold = results(table, fold, 0.1, rng)
    metrics, predictions = evaluate(table, out_of_fold, results(table, fold, 2.0, rng), 1, {})
    assert metrics["n_richness"] == (~without).sum() < metrics["n"] == len(table)
    assert (np.isfinite(predictions["log10_m500c_richness"]) == ~without).all()
    reference = np.asarray(table["log10_m500c_true"])[~without]
    same = {
        name: scores(np.asarray(values)[~without], reference, fold[~without])["mae_dex"]
        for name, values in (
            ("network", out_of_fold["log10_m500c"]),
            ("richness", predictions["log10_m500c_richness"]),
        )
    }
    assert metrics["mae_richness_dex"] == pytest.approx(same["richness"])
    assert metrics["ratio_to_richness"] == pytest.approx(same["network"] / same["richness"])


def calibrated(n: int, rng: np.random.Generator, factor: float) -> tuple[Posterior, np.ndarray]:
    """Normal posteriors of 0.2 dex, and true masses that scatter by a factor more."""
    centre, shape = rng.uniform(13.8, 15.2, n), np.eye(12)[5]
    posterior = Posterior(centre, np.full(n, 0.2 / 0.6), np.tile(shape, (n, 1)))
    return posterior, centre + factor * 0.2 * rng.standard_normal(n)


def test_coverage_is_counted_overall_and_in_bins(rng):
    posterior, true = calibrated(3000, rng, 1.0)
    z = rng.uniform(0.1, 0.4, 3000)
    found = calibration_scores(posterior, true, np.zeros(3000), z, 1000, "true")
    rows = found["coverage"]
    assert [row["what"] for row in rows] == ["all"] + 3 * ["predicted_mass"] + 3 * ["z"] + 3 * ["true_mass"]
    assert [row["target"] for row in rows] == 7 * [True] + 3 * [False]
    assert [row["n"] for row in rows] == [3000] + 9 * [1000] and all(row["met"] for row in rows[:7])
    assert rows[0]["coverage_68"] == pytest.approx(0.68, abs=0.03) and rows[0]["low"] is None
    # 3,000 clusters, and 1,000 that the calibration saw.
    assert rows[0]["coverage_68_error"] == pytest.approx(np.sqrt(0.68 * 0.32 * (1 / 3000 + 1 / 1000)))
    assert rows[1]["coverage_95_error"] == pytest.approx(np.sqrt(0.95 * 0.05 * (1 / 1000 + 3 / 1000)))
    assert sum(found["pit"]) == 3000 and np.ptp(found["pit"]) < 100 and found["pit_kind"] == "true masses"
    assert found["crps_dex"] == pytest.approx(0.2 / np.sqrt(np.pi), rel=0.03)
    overconfident = calibration_scores(*calibrated(3000, rng, 1.5), np.zeros(3000), z, 1000, "true")
    assert not any(row["met"] for row in overconfident["coverage"][:7])


def test_labels_are_covered_with_their_errors(rng):
    posterior, true = calibrated(3000, rng, 1.0)
    label = true + 0.2 * rng.standard_normal(3000)
    z = np.full(3000, np.nan)
    found = calibration_scores(posterior, label, np.full(3000, 0.2), z, 3000, "label")
    assert found["coverage"][0]["coverage_68"] == pytest.approx(0.68, abs=0.03)
    assert {row["what"] for row in found["coverage"]} == {"all", "predicted_mass", "label_mass"}
    assert found["pit_kind"] == "labels, their errors included"


def test_metrics_hold_the_calibration_and_the_shrinkage(rng):
    table, fold = catalog(rng)
    out_of_fold, shuffled = results(table, fold, 0.1, rng), results(table, fold, 1.0, rng)
    metrics, predictions = evaluate(table, out_of_fold, shuffled, 1, {})
    calibration = metrics["calibration"]
    assert sum(calibration["pit"]) == 90 and metrics["coverage_68"] == calibration["coverage"][0]["coverage_68"]
    # The labels are flat over 1.6 dex: a forecast of their distribution scores a sixth of that on average.
    assert calibration["crps_constant_dex"] == pytest.approx(1.6 / 6, rel=0.15)
    assert calibration["crps_dex"] < 0.3 * calibration["crps_constant_dex"]
    assert metrics["shrinkage"]["slope_raw"] == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(
        np.histogram(predictions["pit"], 10, (0, 1))[0],
        calibration["pit"],
    )
    assert (predictions["q16"] < predictions["log10_m500c"]).all()
    del out_of_fold.meta["shape_of_fold"]
    with pytest.raises(Pix2massError, match="train again"):
        evaluate(table, out_of_fold, shuffled, 1, {})
