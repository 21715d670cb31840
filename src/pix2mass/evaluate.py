"""Scores of the out-of-fold masses, with every baseline on the same folds beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.richness import richness_mass_fit
from pix2mass.types import Pix2massError

_OUTLIER_DEX = 0.5
_BOOTSTRAPS = 2000
_MIN_RICHNESS = 8


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
    z, label = np.asarray(catalog["z"], float), np.asarray(catalog["log10_m500c"], float)
    out: dict[str, np.ndarray] = {"constant": np.empty(len(label))}
    with_z = bool(np.isfinite(z).all())
    if with_z:
        out["redshift"] = np.empty(len(label))
    for name in ("richness", "richness_true"):
        if with_z and name in catalog.colnames:
            known = np.isfinite(np.asarray(catalog[name], float))
            if all(known[fold != k].sum() >= _MIN_RICHNESS for k in np.unique(fold)):
                out[name] = np.full(len(label), np.nan)
    for k in np.unique(fold):
        train, test = fold != k, fold == k
        for name, values in out.items():
            if name == "constant":
                values[test] = label[train].mean()
            elif name == "redshift":
                values[test] = np.polyval(np.polyfit(z[train], label[train], 2), z[test])
            else:
                richness = np.asarray(catalog[name], float)
                train, test = train & np.isfinite(richness), test & np.isfinite(richness)
                relation = richness_mass_fit(richness[train], z[train], label[train])
                values[test] = relation.predict(richness[test], z[test])
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
        The metrics, as written to metrics.json, and the table of predictions.

    Raises:
        Pix2massError: shuffled labels do as well as real ones: the network has learnt nothing from the labels.
    """
    row_of = {str(cluster_id): row for row, cluster_id in enumerate(catalog["id"])}
    order = [row_of[str(cluster_id)] for cluster_id in out_of_fold["id"]]
    used: Any = catalog[order]
    fold = np.asarray(out_of_fold["fold"], int)
    label = np.asarray(used["log10_m500c"], float)
    label_err = np.nan_to_num(np.asarray(used["log10_m500c_err"], float))
    mock = "log10_m500c_true" in used.colnames
    reference = np.asarray(used["log10_m500c_true"], float) if mock else label
    reference_err = np.zeros(len(label)) if mock else label_err

    methods = {"network": np.asarray(out_of_fold["log10_m500c"], float), **baselines(used, fold)}
    by_id = {str(row["id"]): float(row["log10_m500c"]) for row in shuffled}
    methods["shuffled"] = np.array([by_id[str(cluster_id)] for cluster_id in out_of_fold["id"]])
    sigma = np.asarray(out_of_fold["log10_m500c_err"], float)
    network_error = np.abs(methods["network"] - reference)
    total_sigma = np.sqrt(sigma**2 + reference_err**2)
    pull = network_error / total_sigma

    if not (np.isfinite(methods["network"]).all() and np.isfinite(sigma).all()):
        raise Pix2massError("some out-of-fold masses are not finite: look at those images, then train again")

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
        "coverage_68": float((pull <= 1.0).mean()),
        "coverage_95": float((pull <= 1.959964).mean()),
        "coverage_68_error": float(np.sqrt(0.6827 * 0.3173 / len(fold))),
        "methods": table,
        "methods_against_label": {
            name: scores(values[has[name]], label[has[name]], fold[has[name]]) for name, values in methods.items()
        },
        "network_minus": differences,
        "per_fold": [
            {"fold": int(k), "n": int((fold == k).sum()), "mae_dex": float(network_error[fold == k].mean())}
            for k in np.unique(fold)
        ],
        "bins": _bins(methods, sigma, reference, reference_err, np.asarray(used["z"], float)),
        **facts,
    }
    null = differences["shuffled"]
    if not float(null["difference_dex"]) + 2 * float(null["error_dex"]) < 0:  # type: ignore[arg-type]
        raise Pix2massError(
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


def _bins(
    methods: dict[str, np.ndarray],
    sigma: np.ndarray,
    reference: np.ndarray,
    reference_err: np.ndarray,
    z: np.ndarray,
) -> dict[str, list[dict[str, Any]]]:
    """MAE, bias and 68% coverage in thirds of redshift, of reference mass and of predicted mass."""
    network = methods["network"]
    out: dict[str, list[dict[str, Any]]] = {}
    for name, values in (("z", z), ("reference_mass", reference), ("predicted_mass", network)):
        if not np.isfinite(values).all():
            continue
        edges = np.quantile(values, [0, 1 / 3, 2 / 3, 1])
        out[name] = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (values >= low) & ((values < high) | (high == edges[-1]))
            if not inside.any():
                continue
            residual = network[inside] - reference[inside]
            limit = np.sqrt(sigma[inside] ** 2 + reference_err[inside] ** 2)
            entry = {
                "low": float(low),
                "high": float(high),
                "n": int(inside.sum()),
                "mae_dex": float(np.abs(residual).mean()),
                "bias_dex": float(residual.mean()),
                "coverage_68": float((np.abs(residual) <= limit).mean()),
            }
            if "richness" in methods:
                entry["mae_richness_dex"] = float(np.nanmean(np.abs(methods["richness"][inside] - reference[inside])))
            out[name].append(entry)
    return out
