"""The report of a run: one HTML page that opens from disk, made from the run folder alone.

What the folder lacks is left out, with a sentence that says so.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pix2mass.report.cluster_map import ClusterMap, cluster_panels, read_maps
from pix2mass.report.drawing import figure_uri, format_number, page_template
from pix2mass.report.maps import map_figure
from pix2mass.report.run_figures import (
    METHODS,
    bin_name,
    calibration_pictures,
    confusion_picture,
    learning_pictures,
    mass_pictures,
    methods_picture,
)
from pix2mass.report.run_files import OutOfFold, RunFiles
from pix2mass.run import RunFolder, write_atomic
from pix2mass.types import BANDS, FLAG_MEANING, Flag

_SCORES = {
    "mae_dex": "MAE",
    "mae_best_fold_dex": "best fold",
    "mae_worst_fold_dex": "worst fold",
    "mae_fold_spread_dex": "fold spread",
    "bias_dex": "bias",
    "rms_dex": "rms",
    "nmad_dex": "NMAD",
    "slope": "slope",
    "outlier_share": "outliers",
}
_BINS = {
    "z": "Redshift",
    "reference_mass": "Reference mass, log₁₀ M500c / M☉ (coverage need not hold in these bins)",
    "predicted_mass": "Predicted mass, log₁₀ M500c / M☉",
}
_MOST_ROWS = 2000
"""The table of clusters has at most so many rows, so that the page opens at once."""
_GALLERY = {
    "worst": ("Worst", "the largest errors of the run"),
    "typical": ("Typical", "errors in the middle of the run's"),
    "best": ("Best", "the smallest errors of the run"),
    "other": ("Also mapped", "chosen by hand, or without a reference mass"),
}


# ---- the page ------------------------------------------------------------------------------------------------------


def write_report(folder: RunFolder) -> Path:
    """Write report.html into a run folder: one page without outside parts, made from the folder alone.

    Args:
        folder: the run. Whatever it lacks is left out and named.

    Returns:
        The page's path.
    """
    files = RunFiles(folder)
    config_text, config = files.config()
    metrics = files.json("metrics.json", "no scores, baselines and bins are shown")
    out_of_fold = files.out_of_fold()
    model = files.json("model.json", "the prior and the range of the training are not shown")
    has_network_1 = model.get("network", "bands") != "galaxies"
    pretrain = files.json("pretrain.json", "nothing is said about network 1") if has_network_1 else {}
    provenance = files.json("provenance.json", "command, versions and seed are not shown")
    stages = files.json("stages.json", "times are not shown")
    curve = files.json("learning_curve.json", "") if (folder / "learning_curve.json").exists() else {}
    maps, problems = read_maps(folder)
    files.missing += [f"maps: {problem}" for problem in problems]
    if not maps:
        files.missing.append("maps/ has no usable file: no attribution maps (`pix2mass explain` makes them)")
    methods = _known_methods(metrics.get("methods"))
    if metrics and "network" not in methods:
        files.missing.append("metrics.json has no scores of the network: the tables of methods are left out")
    lacking = [text for name, text in METHODS.items() if name not in methods and name != "richness_true"]
    if "network" in methods and lacking:
        files.missing.append(f"baselines without scores, since the run lacks their input: {', '.join(lacking)}")
    kind = _kind(metrics, config)
    calibration = _inner(metrics, "calibration")
    coverage = [row for row in calibration.get("coverage") or [] if {"coverage_68", "coverage_95"} <= set(row)]
    found_bins = _inner(metrics, "bins")
    anchors = {one.id: f"cluster-{number}" for number, one in enumerate(maps, start=1)}
    html = page_template("run.html.j2").render(
        name=str(config.get("name") or folder.path.resolve().name),
        kind=kind,
        origins=_origins(kind, config, metrics),
        summary=_summary(metrics, methods),
        key_numbers=_key_numbers(metrics, methods),
        missing=files.missing,
        metrics=metrics,
        score_names=_SCORES,
        tables=_method_tables(metrics, methods),
        differences=_differences(metrics),
        unlabelled=_inner(metrics, "unlabelled"),
        bars=methods_picture(methods) if "network" in methods else None,
        mass_figures=mass_pictures(out_of_fold, files.missing) if out_of_fold else [],
        calibration=calibration,
        shrinkage=_inner(metrics, "shrinkage"),
        coverage=[{**row, "name": bin_name(row)} for row in coverage],
        calibration_figures=calibration_pictures(out_of_fold, calibration.get("pit") or [], coverage),
        folds=_folds(out_of_fold) if out_of_fold else [],
        bins=[(title, found_bins[name]) for name, title in _BINS.items() if found_bins.get(name)],
        curve_figures=learning_pictures(curve, methods.get("richness", {}).get("mae_dex")),
        has_network_1=has_network_1,
        band=_band_section({**pretrain, **metrics}, pretrain, files.missing) if has_network_1 else None,
        gallery=_gallery(maps, anchors, out_of_fold),
        clusters=_cluster_rows(out_of_fold, anchors) if out_of_fold else [],
        n_clusters=len(out_of_fold) if out_of_fold else 0,
        seconds=_seconds(metrics, stages),
        model=model,
        provenance=provenance,
        facts=_facts(provenance, pretrain),
        checksums=files.checksums(),
        config_text=config_text,
        whole_run="name" in config,
    )
    path = folder / "report.html"
    write_atomic(path, html)
    return path


def _kind(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    """Whether the run's images are ``mock``, ``real`` or ``unknown``."""
    if isinstance(metrics.get("mock"), bool):
        return "mock" if metrics["mock"] else "real"
    return "mock" if "mock" in config else "real" if "data" in config else "unknown"


def _origins(kind: str, config: dict[str, Any], metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is mock and what is real: (thing, mock or real, where it comes from)."""
    if kind == "unknown":
        return []
    n = metrics.get("n", "the")
    if kind == "mock":
        mock = _inner(config, "mock")
        named = f", configuration {mock['configuration']}" if "configuration" in mock else ""
        scatter = mock.get("label_scatter_dex")
        scattered = f"{scatter:g} dex" if isinstance(scatter, int | float) else "a scatter"
        return [
            ("images", "mock", f"galaxies, stars, sky and noise drawn by the package{named}; no pixel is observed"),
            ("true masses", "mock", "known, and used for scoring alone: no network sees them"),
            ("labels", "mock", f"true mass with {scattered} of scatter; the networks are trained on these"),
            ("redshifts", "mock", "known exactly"),
            ("richness", "mock", "measured on the mock galaxies with the errors of a photometric catalogue"),
            ("scores", "mock", f"{n} mock clusters against their true masses"),
        ]
    data = _inner(config, "data")
    source = next((f"{name} = {data[name]}" for name in ("cutouts", "frames", "hips") if data.get(name)), "")
    return [
        ("images", "real", f"observed{': ' + source if source else ''}"),
        ("true masses", "real", "not known to anybody"),
        ("labels", "real", "published measurements with errors and a scale of their own"),
        ("redshifts", "real", "from the catalogue"),
        ("richness", "real", "from the catalogue, where it has one"),
        ("scores", "real", f"{n} clusters against their labels: the labels' errors are inside the scores"),
    ]


def _inner(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A table inside a table, empty where there is none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _known_methods(methods: Any) -> dict[str, dict[str, float]]:
    """Scores by method, known methods first and in order, those without an error left out."""
    if not isinstance(methods, dict):
        return {}
    usable = {
        name: values
        for name, values in methods.items()
        if isinstance(values, dict) and isinstance(values.get("mae_dex"), float) and math.isfinite(values["mae_dex"])
    }
    return {name: usable[name] for name in [*METHODS, *sorted(set(usable) - set(METHODS))] if name in usable}


def _summary(metrics: dict[str, Any], methods: dict[str, dict[str, float]]) -> list[str]:
    """Three sentences: the error, the baselines, the error bars; before them, if need be, that the null test failed."""
    if "network" not in methods:
        return []
    network = methods["network"]
    n_folds = len(metrics.get("per_fold") or [])
    folds = f", mean of {n_folds} folds" if n_folds else ""
    kind = {True: " mock", False: " real"}.get(metrics.get("mock"), "")  # type: ignore[arg-type]
    first = (
        f"The network weighs {metrics.get('n', 'the')}{kind} clusters that it was not trained on with a mean absolute "
        f"error of {format_number(network['mae_dex'])} dex against the {metrics.get('reference', 'reference')}{folds} "
        f"(best fold {format_number(network.get('mae_best_fold_dex'))}, "
        f"spread {format_number(network.get('mae_fold_spread_dex'))}), "
        f"a factor of {10 ** network['mae_dex']:.2f} in mass."
    )
    others = [
        f"{METHODS.get(name, name)} {format_number(values['mae_dex'])}"
        for name, values in methods.items()
        if name != "network"
    ]
    second = f"On the same clusters and folds the baselines have, in dex: {', '.join(others)}"
    against = _inner(metrics, "network_minus").get("richness")
    if against:
        verdict = f"the network is {'better' if against['difference_dex'] < 0 else 'worse'}"
        if abs(against["difference_dex"]) < 2 * against["error_dex"]:
            verdict = "not distinguishable at two standard errors"
        second += (
            f"; network minus richness is {format_number(against['difference_dex'], 3, '+')} ± "
            f"{format_number(against['error_dex'])} dex ({verdict})"
        )
    third = (
        f"The 68% error bars hold {format_number(metrics.get('coverage_68'), 2)} ± "
        f"{format_number(metrics.get('coverage_68_error'), 2)} of the clusters and the 95% bars "
        f"{format_number(metrics.get('coverage_95'), 2)}, and the slope of predicted on reference mass is "
        f"{format_number(network.get('slope'), 2)} (1 is perfect, 0 is the mean for all)"
    )
    failed = metrics.get("null_test_failed")
    warning = [f"{failed[0].upper()}{failed[1:]}."] if isinstance(failed, str) and failed else []
    return [*warning, first, second + ".", third + "."]


def _key_numbers(metrics: dict[str, Any], methods: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Number and what it is, for the top of the page."""
    if "network" not in methods:
        return []
    found = [
        (methods["network"]["mae_dex"], 3, "MAE of the network, dex"),
        (methods.get("richness", {}).get("mae_dex"), 3, "MAE of richness, dex"),
        (methods.get("constant", {}).get("mae_dex"), 3, "MAE of the mean mass, dex"),
        (metrics.get("coverage_68"), 2, "inside 68% bars"),
        (methods["network"].get("slope"), 2, "slope, predicted on reference"),
    ]
    return [(format_number(value, digits), text) for value, digits, text in found if value is not None]


def _method_tables(metrics: dict[str, Any], methods: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    if "network" not in methods:
        return []
    tables = [(f"Against the {metrics.get('reference', 'reference')}", methods)]
    if metrics.get("mock") and "network" in _known_methods(metrics.get("methods_against_label")):
        tables.append(("Against the noisy label", _known_methods(metrics["methods_against_label"])))
    return [
        {
            "title": title,
            "rows": [
                (name, METHODS.get(name, name), [values.get(key) for key in _SCORES])
                for name, values in by_name.items()
            ],
        }
        for title, by_name in tables
    ]


def _differences(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    found = _inner(metrics, "network_minus")
    order = [name for name in METHODS if name in found] + sorted(set(found) - set(METHODS))
    return [{"method": METHODS.get(name, name), **found[name]} for name in order]


def _folds(out_of_fold: OutOfFold) -> list[dict[str, Any]]:
    """One row per fold."""
    rows = []
    richness_error = out_of_fold.error_dex("richness")
    for fold in np.unique(out_of_fold.fold):
        own = out_of_fold.fold == fold
        residual, beside = out_of_fold.residual[own], richness_error[own & np.isfinite(richness_error)]
        rows.append(
            {
                "fold": int(fold),
                "n": int(own.sum()),
                "mae_dex": float(np.abs(residual).mean()),
                "bias_dex": float(residual.mean()),
                "rms_dex": float(np.sqrt((residual**2).mean())),
                "coverage_68": float(out_of_fold.inside(0.68)[own].mean()),
                "mae_richness_dex": float(beside.mean()) if beside.size else None,
            }
        )
    return rows


def _band_section(values: dict[str, Any], pretrain: dict[str, Any], missing: list[str]) -> dict[str, Any] | None:
    confusion = np.asarray(values.get("band_confusion") or [])
    bands = str(values.get("bands") or (BANDS if confusion.shape == (len(BANDS),) * 2 else ""))
    if not bands or confusion.shape != (len(bands), len(bands)):
        missing.append("there is no band confusion matrix: nothing is shown of how well network 1 tells the bands")
        return None
    return {
        "accuracy": float(np.trace(confusion) / max(1, confusion.sum())),
        "chance": 1 / len(bands),
        "n": int(confusion.sum()),
        "tested_on": str(pretrain.get("tested_on", "images whose origin the run does not state")),
        "figure": confusion_picture(confusion, bands),
    }


# ---- clusters ------------------------------------------------------------------------------------------------------


def _cluster_rows(out_of_fold: OutOfFold, anchors: dict[str, str]) -> list[dict[str, Any]]:
    """The table of clusters, those with the largest errors first where there are too many."""
    rows = np.arange(len(out_of_fold))
    if len(rows) > _MOST_ROWS:
        rows = np.sort(np.argsort(-np.nan_to_num(np.abs(out_of_fold.residual)), kind="stable")[:_MOST_ROWS])
    richness = out_of_fold.richness
    return [
        {
            "id": str(out_of_fold.id[row]),
            "anchor": anchors.get(str(out_of_fold.id[row])),
            "fold": int(out_of_fold.fold[row]),
            "z": float(out_of_fold.z[row]),
            "richness": float(richness[row]),
            "reference": float(out_of_fold.reference[row]),
            "mass": float(out_of_fold.mass[row]),
            "mass_err": float(out_of_fold.mass_err[row]),
            "residual": float(out_of_fold.residual[row]),
            "pull": float(out_of_fold.residual[row] / out_of_fold.residual_err[row]),
        }
        for row in rows
    ]


def _gallery(maps: list[ClusterMap], anchors: dict[str, str], out_of_fold: OutOfFold | None) -> list[dict[str, Any]]:
    """The mapped clusters by how well they were weighed, in the order of the page."""
    kind_of: dict[str, str] = {}
    row_of: dict[str, int] = {}
    rank_of: dict[str, int] = {}
    if out_of_fold is not None:
        kind_of = {name: kind for kind, names in out_of_fold.gallery(len(maps)).items() for name in names}
        row_of = {str(name): row for row, name in enumerate(out_of_fold.id)}
        order = np.argsort(-np.nan_to_num(np.abs(out_of_fold.residual)), kind="stable")
        rank_of = {str(out_of_fold.id[row]): rank for rank, row in enumerate(order, start=1)}
    groups: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _GALLERY}
    for one in maps:
        section: dict[str, Any] = {
            "map": one,
            "anchor": anchors[one.id],
            "width_arcsec": 2 * one.half_width_arcsec,
            "flags": _flags(one),
            "panels": cluster_panels(one),
            "whole": _whole(one),
            "rank": rank_of.get(one.id),
        }
        if out_of_fold is not None and one.id in row_of:
            row = row_of[one.id]
            section |= {
                "reference_name": out_of_fold.reference_name,
                "reference": float(out_of_fold.reference[row]),
                "mass": float(out_of_fold.mass[row]),
                "mass_err": float(out_of_fold.mass_err[row]),
                "residual": float(out_of_fold.residual[row]),
                "richness": float(out_of_fold.richness[row]),
            }
        groups[kind_of.get(one.id, "other")].append(section)
    return [
        {"title": _GALLERY[kind][0], "what": _GALLERY[kind][1], "clusters": sorted(sections, key=_by_rank)}
        for kind, sections in groups.items()
        if sections
    ]


def _whole(one: ClusterMap) -> dict[str, str]:
    """All maps of a cluster in one picture."""
    assert one.path is not None  # it comes from read_maps
    return {
        "title": "All maps: the mass, then band by band with contours of the integrated gradients",
        "alt": f"All maps of {one.id}: image and maps of the mass; each of the bands {', '.join(one.bands)} in grey "
        "with contours of its integrated gradients; what tells the bands, and other methods, where the run has them.",
        "src": figure_uri(map_figure(one.path)),
    }


def _by_rank(section: dict[str, Any]) -> int:
    return section["rank"] or 0


def _flags(one: ClusterMap) -> list[str] | None:
    """A sentence per flag of the cluster's images; None where the file does not say."""
    if one.flags is None:
        return None
    return [f"{flag.name}: {FLAG_MEANING[flag]}" for flag in Flag if flag in Flag(one.flags)]


# ---- time and origin -----------------------------------------------------------------------------------------------


def _seconds(metrics: dict[str, Any], stages: dict[str, Any]) -> dict[str, float]:
    from_stages = {
        name: record["seconds"] for name, record in stages.items() if isinstance(record, dict) and "seconds" in record
    }
    merged = {**_inner(metrics, "seconds"), **from_stages}
    return {name: float(value) for name, value in merged.items() if isinstance(value, int | float)}


def _facts(provenance: dict[str, Any], pretrain: dict[str, Any]) -> dict[str, str]:
    """Checksums of the stores and further facts of the provenance as text, by name."""
    known = {"made", "command", "seed", "python", "platform", "versions", "git"}
    facts: dict[str, str] = {}
    for name, value in provenance.items():
        if name in known or value is None:
            continue
        if isinstance(value, dict):
            facts.update({f"{name} {key}": str(inner) for key, inner in value.items()})
        else:
            facts[name] = str(value)
    if pretrain.get("store_checksum"):
        facts.setdefault("store of network 1 (checksum)", str(pretrain["store_checksum"]))
    return facts
