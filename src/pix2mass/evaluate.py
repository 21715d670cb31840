"""Scores of the out-of-fold masses, with every baseline on the same folds beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.calibrate import QUANTILES, Posterior, Shrinkage, known_errors
from pix2mass.richness import richness_mass_fit
from pix2mass.types import Pix2massError

_OUTLIER_DEX = 0.5
_BOOTSTRAPS = 2000
_MIN_RICHNESS = 8
_INTERVALS = {"68": (0.16, 0.84, 0.03), "95": (0.025, 0.975, 0.02)}
"""Central interval -> shares of the posterior at its ends, and by how much its coverage may be off beside sampling."""
_PIT_BINS = 10


def scores(estimate: np.ndarray, reference: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """How far estimates are from a reference.

    Args:
        estimate: (n,) log10 M500c.
        reference: (n,) true or measured log10 M500c.
        fold: (n,) fold numbers.

    Returns:
        ``mae_dex`` (mean over folds), ``mae_best_fold_dex``, ``mae_worst_fold_dex``, ``mae_fold_spread_dex`` (standard
        deviation), ``bias_dex`` (mean), ``rms_dex``, ``nmad_dex`` (1.4826 x median absolute deviation), ``slope`` (of
        estimate on reference, least squares), ``outlier_share`` (beyond 0.5 dex).
    """
    residual = estimate - reference
    per_fold = np.array([np.abs(residual[fold == k]).mean() for k in np.unique(fold)])
    return {
        "mae_dex": float(per_fold.mean()),
        "mae_best_fold_dex": float(per_fold.min()),
        "mae_worst_fold_dex": float(per_fold.max()),
        "mae_fold_spread_dex": float(per_fold.std(ddof=1)) if len(per_fold) > 1 else 0.0,
        "bias_dex": float(residual.mean()),
        "rms_dex": float(np.sqrt((residual**2).mean())),
        "nmad_dex": float(1.4826 * np.median(np.abs(residual - np.median(residual)))),
        "slope": float(np.polyfit(reference, estimate, 1)[0]),
        "outlier_share": float((np.abs(residual) > _OUTLIER_DEX).mean()),
    }


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, float | list[float]]:
    """Mean difference of two methods' absolute errors on the same clusters, bootstrapped over clusters.

    Args:
        first: (n,) absolute errors of one method, dex.
        second: (n,) of the other.
        seed: of the bootstrap.

    Returns:
        ``difference_dex`` (first minus second: negative where the first is better), ``error_dex`` and
        ``interval_95_dex``.
    """
    difference = first - second
    draws = np.random.default_rng(seed).integers(len(difference), size=(_BOOTSTRAPS, len(difference)))
    means = difference[draws].mean(axis=1)
    return {
        "difference_dex": float(difference.mean()),
        "error_dex": float(means.std(ddof=1)),
        "interval_95_dex": [float(value) for value in np.quantile(means, [0.025, 0.975])],
    }


def baselines(catalog: QTable, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Out-of-fold estimates of the simple methods, each fitted to the other folds' labels.

    Args:
        catalog: columns z, log10_m500c and, where known, richness and richness_true.
        fold: (n,) fold numbers.

    Returns:
        ``constant`` (mean label), ``redshift`` (quadratic in z), ``richness`` and ``richness_true`` (mass-richness
        relation with redshift), each (n,), NaN for clusters without a richness; without those whose input the
        catalogue lacks.
    """
    parts = {k: baselines_from(catalog[fold != k], catalog[fold == k]) for k in np.unique(fold)}
    names = [name for name in next(iter(parts.values())) if all(name in part for part in parts.values())]
    out = {name: np.empty(len(catalog)) for name in names}
    for k, part in parts.items():
        for name in names:
            out[name][fold == k] = part[name]
    return out


def baselines_from(labelled: QTable, others: QTable) -> dict[str, np.ndarray]:
    """Estimates of the simple methods, fitted to all labels, for other clusters.

    Args:
        labelled: columns z, log10_m500c and, where known, richness and richness_true.
        others: columns z and, where known, richness and richness_true.

    Returns:
        As :func:`baselines`, for ``others``.
    """
    label = np.asarray(labelled["log10_m500c"], float)
    z, other_z = (np.asarray(table["z"], float) for table in (labelled, others))
    out: dict[str, np.ndarray] = {"constant": np.full(len(others), label.mean())}
    if not (np.isfinite(z).all() and np.isfinite(other_z).all()):
        return out
    out["redshift"] = np.polyval(np.polyfit(z, label, 2), other_z)
    for name in ("richness", "richness_true"):
        if name not in labelled.colnames or name not in others.colnames:
            continue
        richness, other = (np.asarray(table[name], float) for table in (labelled, others))
        train, test = np.isfinite(richness), np.isfinite(other)
        if train.sum() >= _MIN_RICHNESS:
            out[name] = np.full(len(others), np.nan)
            relation = richness_mass_fit(richness[train], z[train], label[train])
            out[name][test] = relation.predict(other[test], other_z[test])
    return out


def evaluate(
    catalog: QTable, out_of_fold: QTable, shuffled: QTable, seed: int, facts: dict[str, Any]
) -> tuple[dict[str, Any], QTable]:
    """Compare out-of-fold masses with the truth (mock) or the labels, beside the baselines.

    Args:
        catalog: the labelled clusters; the column log10_m500c_true makes it a mock.
        out_of_fold: what :func:`pix2mass.train.train` returned.
        shuffled: the same from shuffled labels.
        seed: of the bootstrap.
        facts: JSON-able values to put into the metrics as they are (band accuracy, seconds, ...).

    Returns:
        The metrics, as written to metrics.json, and the table of predictions. The metrics have ``null_test_failed``,
        what to tell the user, where shuffled labels do as well as real ones: the network has learnt nothing from them.

    Raises:
        Pix2massError: masses that are not finite.
    """
    row_of = {str(cluster_id): row for row, cluster_id in enumerate(catalog["id"])}
    order = [row_of[str(cluster_id)] for cluster_id in out_of_fold["id"]]
    used: Any = catalog[order]
    fold = np.asarray(out_of_fold["fold"], int)
    label = np.asarray(used["log10_m500c"], float)
    label_err = known_errors(np.asarray(used["log10_m500c_err"], float))
    mock = "log10_m500c_true" in used.colnames
    reference = np.asarray(used["log10_m500c_true"], float) if mock else label
    reference_err = np.zeros(len(label)) if mock else label_err

    methods = {"network": np.asarray(out_of_fold["log10_m500c"], float), **baselines(used, fold)}
    by_id = {str(row["id"]): float(row["log10_m500c"]) for row in shuffled}
    methods["shuffled"] = np.array([by_id[str(cluster_id)] for cluster_id in out_of_fold["id"]])
    sigma = np.asarray(out_of_fold["log10_m500c_err"], float)
    network_error = np.abs(methods["network"] - reference)

    if not (np.isfinite(methods["network"]).all() and np.isfinite(sigma).all()):
        raise Pix2massError("some out-of-fold masses are not finite: look at those images, then train again")

    posterior, z = Posterior.from_table(out_of_fold), np.asarray(used["z"], float)
    pit = posterior.cdf(reference, reference_err)
    calibrated_on = round(len(fold) * (1 - 1 / len(np.unique(fold))))
    calibration = calibration_scores(posterior, reference, reference_err, z, calibrated_on, "true" if mock else "label")
    calibration["crps_constant_dex"] = _crps_of_labels(label, reference, fold)

    # A method that lacks some clusters is scored, and compared with the network, on those it has.
    has = {name: np.isfinite(values) for name, values in methods.items()}
    table = {name: scores(values[has[name]], reference[has[name]], fold[has[name]]) for name, values in methods.items()}
    differences = {
        name: paired_difference(network_error[has[name]], np.abs(values - reference)[has[name]], seed)
        for name, values in methods.items()
        if name != "network"
    }
    network = table["network"]
    ratio = None
    if "richness" in methods:
        same = has["richness"]
        ratio = scores(methods["network"][same], reference[same], fold[same])["mae_dex"] / table["richness"]["mae_dex"]
    metrics: dict[str, Any] = {
        "n": len(fold),
        "mock": mock,
        "reference": "true mass of the mock" if mock else "measured label",
        **network,
        **{f"mae_{name}_dex": table[name]["mae_dex"] for name in table if name != "network"},
        "n_richness": int(has["richness"].sum()) if "richness" in methods else 0,
        "ratio_to_richness": ratio,
        **{name: calibration["coverage"][0][name] for name in ("coverage_68", "coverage_68_error", "coverage_95")},
        "calibration": calibration,
        "shrinkage": _shrinkage(out_of_fold, label, label_err, reference, reference_err, fold),
        "methods": table,
        "methods_against_label": {
            name: scores(values[has[name]], label[has[name]], fold[has[name]]) for name, values in methods.items()
        },
        "network_minus": differences,
        "per_fold": [
            {"fold": int(k), "n": int((fold == k).sum()), "mae_dex": float(network_error[fold == k].mean())}
            for k in np.unique(fold)
        ],
        "bins": _bins(methods, pit, reference, z),
        **facts,
    }
    null = differences["shuffled"]
    if not float(null["difference_dex"]) + 2 * float(null["error_dex"]) < 0:  # type: ignore[arg-type]
        metrics["null_test_failed"] = (
            f"null test failed: the error is {table['shuffled']['mae_dex']:.3f} dex with shuffled labels and "
            f"{network['mae_dex']:.3f} dex with the real ones: the network has learnt nothing from the labels. "
            "Look at the images, the number of labels and the training settings before using these masses"
        )
    predictions = QTable(
        {
            "id": out_of_fold["id"],
            "ra_deg": used["ra_deg"],
            "dec_deg": used["dec_deg"],
            "z": used["z"],
            "fold": fold,
            "log10_m500c": methods["network"],
            "log10_m500c_err": sigma,
            **{name: out_of_fold[name] for name in QUANTILES},
            "pit": pit,
            "log10_m500c_label": label,
            "log10_m500c_label_err": label_err,
            **({"log10_m500c_true": reference} if mock else {}),
            **{f"log10_m500c_{name}": values for name, values in methods.items() if name != "network"},
            "richness": used["richness"],
            "richness_err": used["richness_err"],
        },
        meta={
            **{key: catalog.meta[key] for key in ("mass_definition", "cosmology") if key in catalog.meta},
            "mock": mock,
            "note": "every mass by the networks that did not see the cluster",
        },
    )
    return metrics, predictions


def calibration_scores(
    posterior: Posterior,
    reference: np.ndarray,
    reference_err: np.ndarray,
    z: np.ndarray,
    calibrated_on: int,
    kind: str,
) -> dict[str, Any]:
    """Whether intervals hold what they say: overall, and in thirds of predicted mass, redshift and reference mass.

    Args:
        posterior: of n clusters that neither networks nor calibration have seen.
        reference: (n,) true masses or labels, log10 M500c.
        reference_err: (n,) their standard errors, dex: 0 for true masses.
        z: (n,) redshifts.
        calibrated_on: clusters that the calibration was fitted to; its sampling error is part of the coverage's.
        kind: "true" or "label", what the reference is.

    Returns:
        ``pit`` (counts in 10 bins of the share of the posterior below the reference; flat where calibrated),
        ``pit_kind`` (of true masses, or of labels with their errors), ``crps_dex``, and ``coverage``: one entry for
        all and for each bin with ``what`` (all, z, predicted_mass, true_mass or label_mass), ``low``, ``high``, ``n``,
        ``coverage_68``, ``coverage_68_error``, the same of 95, ``target`` (whether the coverage should hold there: not
        at given reference mass, where estimates shrink) and ``met``: 68 within 3 points and two errors, 95 within 2.
    """
    pit = posterior.cdf(reference, reference_err)
    bins = {"predicted_mass": posterior.centre, "z": z, f"{kind}_mass": reference}
    rows = [("all", float("nan"), float("nan"), np.ones(len(pit), bool))]
    rows += [(name, *third) for name, values in bins.items() if np.isfinite(values).all() for third in _thirds(values)]
    coverage = []
    for what, low, high, inside in rows:
        row: dict[str, Any] = {"what": what, "low": low, "high": high, "n": int(inside.sum())}
        if what == "all":
            row |= {"low": None, "high": None}
        row["target"], row["met"] = not what.startswith(kind), True
        for name, (lowest, highest, allowed) in _INTERVALS.items():
            share = highest - lowest
            found = float(((pit[inside] >= lowest) & (pit[inside] <= highest)).mean())
            error = float(np.sqrt(share * (1 - share) * (1 / inside.sum() + len(pit) / inside.sum() / calibrated_on)))
            row |= {f"coverage_{name}": found, f"coverage_{name}_error": error}
            row["met"] &= abs(found - share) <= allowed + 2 * error
        coverage.append(row)
    return {
        "pit": np.histogram(pit, _PIT_BINS, (0, 1))[0].tolist(),
        "pit_kind": "true masses" if kind == "true" else "labels, their errors included",
        "crps_dex": float(posterior.crps(reference, reference_err).mean()),
        "coverage": coverage,
    }


def _crps_of_labels(label: np.ndarray, reference: np.ndarray, fold: np.ndarray) -> float:
    """CRPS of a forecast that says for every cluster: as the other folds' labels are distributed."""
    parts = []
    for k in np.unique(fold):
        known = label[fold != k]
        within = np.abs(known[:, None] - known).mean() / 2
        parts.append(np.abs(reference[fold == k][:, None] - known).mean(axis=1) - within)
    return float(np.concatenate(parts).mean())


def _shrinkage(
    out_of_fold: QTable,
    label: np.ndarray,
    label_err: np.ndarray,
    reference: np.ndarray,
    reference_err: np.ndarray,
    fold: np.ndarray,
) -> dict[str, float]:
    """Slope of estimates on the reference, raw and after the correction, each fold's line from the other folds."""
    columns = {name: np.asarray(out_of_fold[name], float) for name in ("log10_m500c", "log10_m500c_err", *QUANTILES)}
    after = {name: np.empty(len(fold)) for name in columns}
    for k in np.unique(fold):
        test = fold == k
        line = Shrinkage.fit(columns["log10_m500c"][~test], label[~test], label_err[~test])
        for name, values in line.corrected({name: values[test] for name, values in columns.items()}).items():
            after[name][test] = values
    whole = {
        name: Shrinkage.fit(mass, reference, reference_err)
        for name, mass in (("raw", columns["log10_m500c"]), ("corrected", after["log10_m500c"]))
    }
    residual = after["log10_m500c"] - reference
    inside = np.abs(residual) <= np.hypot((after["q84"] - after["q16"]) / 2, 0.994458 * reference_err)
    return {
        "slope_raw": whole["raw"].slope,
        "slope_raw_error": whole["raw"].slope_err,
        "slope_corrected": whole["corrected"].slope,
        "slope_corrected_error": whole["corrected"].slope_err,
        "mae_corrected_dex": float(np.abs(residual).mean()),
        "bias_corrected_dex": float(residual.mean()),
        "coverage_68_corrected": float(inside.mean()),
    }


def _thirds(values: np.ndarray) -> list[tuple[float, float, np.ndarray]]:
    """Lowest and highest value and members (n,) of each third."""
    edges = np.quantile(values, [0, 1 / 3, 2 / 3, 1])
    parts = [
        (float(low), float(high), (values >= low) & ((values < high) | (high == edges[-1])))
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    return [part for part in parts if part[2].any()]


def _bins(
    methods: dict[str, np.ndarray], pit: np.ndarray, reference: np.ndarray, z: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """MAE, bias and 68% coverage in thirds of redshift, of reference mass and of predicted mass."""
    network = methods["network"]
    out: dict[str, list[dict[str, Any]]] = {}
    for name, values in (("z", z), ("reference_mass", reference), ("predicted_mass", network)):
        if not np.isfinite(values).all():
            continue
        out[name] = []
        for low, high, inside in _thirds(values):
            residual = network[inside] - reference[inside]
            entry = {
                "low": low,
                "high": high,
                "n": int(inside.sum()),
                "mae_dex": float(np.abs(residual).mean()),
                "bias_dex": float(residual.mean()),
                "coverage_68": float(((pit[inside] >= 0.16) & (pit[inside] <= 0.84)).mean()),
            }
            missed = np.abs(methods["richness"][inside] - reference[inside]) if "richness" in methods else np.array([])
            if np.isfinite(missed).any():
                entry["mae_richness_dex"] = float(np.nanmean(missed))
            out[name].append(entry)
    return out
