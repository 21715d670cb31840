"""Weights that come with the package, one folder per network, and how a run is packed into such a folder.

A packed run holds one network: ``model.json``, ``fold-0.safetensors``, ``provenance.json``, ``stages.json`` (empty) and
``MODEL_CARD.md``. It is a run folder for prediction, wherever it lies.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pix2mass.run import RunFolder
from pix2mass.types import Pix2massError

MAX_BYTES = 8_000_000
"""Largest weights that go into the package."""
_SETTINGS = ("network", "ensemble_size", "encoder", "units", "views", "use_redshift")
"""What the card repeats from model.json."""


def names() -> list[str]:
    """The packaged weights."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/model.json"))


def open_weights(name: str) -> RunFolder:
    """Packaged weights as a run folder.

    Args:
        name: "default" (u, g, r, i, z) or "default-gri".

    Raises:
        Pix2massError: the package holds no weights of this name.
    """
    if name not in names():
        there = ", ".join(names()) or "none in this installation"
        raise Pix2massError(f"weights {name!r}: expected the name of packaged weights ({there}), or a run with --run")
    return RunFolder.open(Path(__file__).parent / name)


def open_run(run: str | Path) -> RunFolder:
    """A run folder by its path or, where there is no such folder, packaged weights by their name.

    Raises:
        Pix2massError: neither.
    """
    if str(run) in names() and not Path(run).exists():
        return open_weights(str(run))
    return RunFolder.open(run)


def is_packaged(folder: RunFolder) -> bool:
    """Whether a run folder is part of the package: nothing is to be written there."""
    return folder.path.resolve().parent == Path(__file__).resolve().parent


def pack(run: RunFolder, out: Path, fold: int = 0) -> Path:
    """Reduce a trained and evaluated run to one network and what prediction needs, with a model card.

    Args:
        run: the run folder.
        out: folder to write; its name becomes the model's name.
        fold: whose network; the calibration was made on single networks and stays.

    Returns:
        The folder.

    Raises:
        Pix2massError: the run lacks the network or has not been evaluated, or the folder holds something.
    """
    info = run.read_json("model.json")
    if not 0 <= fold < info["folds"]:
        raise Pix2massError(f"fold {fold}: {run.path} has networks 0 to {info['folds'] - 1}")
    metrics, provenance = run.read_json("metrics.json"), run.read_json("provenance.json")
    if metrics.get("null_test_failed"):
        raise Pix2massError(f"{run.path}: {metrics['null_test_failed']}")
    weights = run / f"fold-{fold}.safetensors"
    if not weights.exists():
        raise Pix2massError(f"{weights}: no such weights; the run's training has not finished")
    if weights.stat().st_size > MAX_BYTES:
        raise Pix2massError(
            f"{weights}: {weights.stat().st_size / 1e6:.1f} MB, expected at most {MAX_BYTES / 1e6:.0f}; "
            "train a smaller network"
        )
    if out.exists() and any(out.iterdir()):
        raise Pix2massError(f"{out}: the folder is not empty; choose another name")
    packed = RunFolder(out)
    (packed / "fold-0.safetensors").write_bytes(weights.read_bytes())
    packed.write_json("model.json", {**info, "folds": 1})
    kept = {name: value for name, value in provenance.items() if name not in ("command", "platform")}
    packed.write_json("provenance.json", {**kept, "packed_from": {"fold": fold, "folds": info["folds"]}})
    (packed / "MODEL_CARD.md").write_text(_card(out.name, info, metrics, provenance, packed / "fold-0.safetensors"))
    return out


def _card(name: str, info: dict[str, Any], metrics: dict[str, Any], provenance: dict[str, Any], weights: Path) -> str:
    mock = bool(metrics["mock"])
    grid = info["grid"]
    width = f"{grid['width_kpc']:g} kpc" if grid["width_kpc"] else f"{grid['width_arcsec']:g} arcsec"
    scores = [("this network", metrics["mae_dex"])]
    for key, label in (
        ("mae_richness_dex", "richness"),
        ("mae_richness_true_dex", "true richness"),
        ("mae_redshift_dex", "redshift only"),
        ("mae_constant_dex", "constant"),
        ("mae_shuffled_dex", "shuffled labels"),
    ):
        if metrics.get(key) is not None:
            scores.append((label, metrics[key]))
    table = "\n".join(f"| {label} | {value:.3f} |" for label, value in scores)
    rows = metrics["calibration"]["coverage"]
    met = sum(row["met"] for row in rows if row["target"])
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    low, high = info["label_range"]
    start = f", after a training on {info['started_from']}" if "started_from" in info else ""
    ratio = metrics.get("ratio_to_richness")
    ratio_line = "" if ratio is None else f" The ratio to richness is {ratio:.3f}."
    seed, commit = provenance.get("seed"), provenance.get("git") or "unknown"
    commit = f"{commit[:-1]} with changes" if commit.endswith("+") else commit
    z_range = "not used" if info["z_range"] is None else "{:.2f} to {:.2f}".format(*info["z_range"])
    warning = (
        "**Trained on mock images alone.** The mock sky is matched to SDSS, but real masses from this network carry "
        "whatever differs between the two, on top of the errors it gives. Train or fine-tune on real labels where you "
        "have them."
        if mock
        else "Trained on real clusters with measured masses: their selection and mass scale are in its estimates."
    )
    return f"""# Model card: {name}

One network that gives log10(M500c / Msun), H0 = 70 km/s/Mpc, Om = 0.3, from {info["bands"]} cutouts{
        " and redshifts" if info["use_redshift"] else ""
    } of galaxy clusters.

{warning}

| | |
|---|---|
| trained on | {info["trained_on"]}, {metrics["n"]} labelled clusters{start} |
| images | bands {info["bands"]}, {grid["n_pixels"]} x {grid["n_pixels"]} pixels, {width} wide |
| redshifts | {z_range} |
| labels | {low:.2f} to {high:.2f}, their errors included |
| prior | {info["prior"]} |
| pix2mass | {provenance["versions"].get("pix2mass", "?")}, commit {commit}, seed {seed} |
| SHA-256 of the weights | `{digest}` |

## Measured accuracy

Out of fold, on {metrics["n"]} clusters, against the {metrics["reference"]}. Mean absolute error over folds, dex:

| | |
|---|---|
{table}

{ratio_line.strip()}

Bias {metrics["bias_dex"]:+.3f} dex, slope of predicted on reference mass {metrics["slope"]:.2f}. The 68% intervals hold
{100 * metrics["coverage_68"]:.1f}%, the 95% intervals {100 * metrics["coverage_95"]:.1f}%; {met} of {
        sum(row["target"] for row in rows)
    } rows (all clusters, thirds of predicted mass and of redshift)
hold what they should within their errors.

## Use

    pix2mass predict CATALOG --weights {name} --frames DATA/sas --out masses.ecsv

Estimates with `trusted` false should not be used: their flags say why. Outside these redshifts and masses the network
extrapolates. Settings: `{json.dumps({key: info[key] for key in _SETTINGS if key in info})}`.
"""
