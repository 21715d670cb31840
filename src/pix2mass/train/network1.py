"""Network 1: features learnt from unlabelled images, by telling their bands or which two views show the same image."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy import units as u
from astropy.coordinates import SkyCoord, search_around_sky
from torch import Tensor
from torch.nn import functional as F

from pix2mass.config import PretrainConfig
from pix2mass.model import (
    BandClassifier,
    Encoder,
    ViewMatcher,
    dihedral,
    in_noise,
    make_units,
    source_of,
)
from pix2mass.run import RunFolder, digest
from pix2mass.scale import PhysicalScale
from pix2mass.store import ImageStore
from pix2mass.stretch import asinh
from pix2mass.train.fit import PREDICT_BATCH, Progress, as_tensors, fit, loader, split
from pix2mass.types import Pix2massError

Parts = tuple[np.ndarray, np.ndarray]
"""Rows to train on, rows to choose the epoch by."""
_MIN_BAND_COVERAGE = 0.5
"""Images of a band with less usable area than this take no part in pretraining."""


def pretrain(
    store: ImageStore,
    folder: RunFolder,
    config: PretrainConfig,
    seed: int,
    test_store: ImageStore | None = None,
    progress: Progress | None = None,
) -> Encoder:
    """Train network 1 on a task that needs no labels and keep its encoder in the run folder.

    Args:
        store: unlabelled images.
        folder: gets ``encoder.safetensors``, ``pretrain.json`` and, of the task "bands", ``band-head.safetensors``.
        config: of the stage.
        seed: of every random number.
        test_store: images that took no part, for the band accuracy; the validation share of ``store`` if None.
        progress: called with (epoch, epochs).

    Returns:
        The encoder, in eval mode.

    Raises:
        Pix2massError: no usable images, or stores with different bands.
    """
    if test_store is not None and test_store.grid.bands != store.grid.bands:
        raise Pix2massError(
            f"bands: {store.path} holds {store.grid.bands!r}, {test_store.path} holds {test_store.grid.bands!r}"
        )
    tested_on = test_store.checksum if test_store else None
    key = digest("pretrain", config, source_of(config.encoder), seed, store.checksum, tested_on)
    if folder.is_done("pretrain", key, folder / "encoder.safetensors", folder / "pretrain.json"):
        return load_encoder(folder)
    checkpoints = folder / "checkpoints" / f"pretrain-{key}"
    with folder.stage("pretrain", key) as facts:
        n_images = min(config.n_images or len(store), len(store))
        rows = np.sort(np.random.default_rng([seed, 78]).permutation(len(store))[:n_images])
        fitted, validation = (rows[part] for part in split(len(rows), config.validation_share, seed))
        parts = fitted, validation
        if config.task == "bands":
            network = _train_classifier(store, parts, config, seed, checkpoints, progress)
            tested, chosen = (store, validation) if test_store is None else (test_store, np.arange(len(test_store)))
            confusion = band_confusion(network, tested, chosen)
            facts |= {"band_accuracy": accuracy(confusion), "band_confusion": confusion.tolist()}
            folder.save_weights("band-head", network.head.state_dict())
        else:
            network = _train_matcher(store, parts, config, seed, checkpoints, progress)
            (folder / "band-head.safetensors").unlink(missing_ok=True)
        made = folder.read_json("model.json") if (folder / "model.json").exists() else {}
        if made.get("encoder") and "started_from" not in made:
            folder.announce("another network 1: network 2 of the old one is removed, train again")
            folder.remove_network2()
        folder.save_weights("encoder", network.encoder.state_dict())
        folder.write_json(
            "pretrain.json",
            {
                "task": config.task,
                "encoder": config.encoder,
                "units": config.units,
                "bands": store.grid.bands,
                "grid": store.grid.model_dump(mode="json"),
                **facts,
                "tested_on": "validation share" if test_store is None else f"{len(test_store)} other images",
                "tested_images_seen": 0 if test_store is None else _n_seen(test_store, store, rows),
                "n_images": len(rows),
                "ra_deg": store.ra_deg[rows].tolist(),
                "dec_deg": store.dec_deg[rows].tolist(),
            },
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    return network.encoder


def leave_one_group_out(
    store: ImageStore, folder: RunFolder, config: PretrainConfig, seed: int, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """Train network 1 without one group of images (a field), test it on that group; for every group in turn.

    Args:
        store: images with at least two groups.
        folder: gets ``band_transfer.json``.
        config: of the pretraining.
        seed: of every random number.
        progress: called with (epoch, epochs) of each training.

    Returns:
        Per group: ``n`` images per band, ``band_accuracy``, and ``band_confusion`` (rows: true band, columns: told
        band, counts).

    Raises:
        Pix2massError: fewer than two groups.
    """
    names = sorted(set(store.groups.tolist()))
    if len(names) < 2:
        raise Pix2massError(f"{store.path}: expected at least two groups of images, found {names}; add a group column")
    results = {}
    for index, name in enumerate(names):
        key = digest("transfer", config, seed, store.checksum, name)
        stage, output = f"pretrain-without-{name}", folder / f"band_transfer_{index}.json"
        if not folder.is_done(stage, key, output):
            checkpoints = folder / "checkpoints" / f"transfer-{key}"
            with folder.stage(stage, key):
                others = np.flatnonzero(store.groups != name)
                fitted, validation = split(len(others), config.validation_share, seed)
                parts = others[fitted], others[validation]
                classifier = _train_classifier(store, parts, config, seed, checkpoints, progress)
                left_out = np.flatnonzero(store.groups == name)
                confusion = band_confusion(classifier, store, left_out)
                folder.write_json(
                    output.name,
                    {
                        "n": len(left_out),
                        "band_accuracy": accuracy(confusion),
                        "band_confusion": confusion.tolist(),
                    },
                )
            shutil.rmtree(checkpoints, ignore_errors=True)
        results[name] = folder.read_json(output.name)
    folder.write_json("band_transfer.json", results)
    return results


def _train_classifier(
    store: ImageStore, parts: Parts, config: PretrainConfig, seed: int, checkpoints: Path, progress: Progress | None
) -> BandClassifier:
    """Network 1 of the task "bands"."""
    units = make_units({"units": config.units}, store.grid)
    if config.units == "l-star":
        _check_redshifts(store, np.concatenate(parts))
    classifier = BandClassifier(_new_encoder(store, config, seed), len(store.grid.bands), units)

    def batch(light: Tensor, band: Tensor, rng: np.random.Generator, training: bool) -> tuple[Tensor, Tensor]:
        return _another_view(light, config, rng) if training else asinh(light), band

    _fit_on_single_bands(classifier, batch, store, parts, config, seed, checkpoints, progress)
    return classifier


def _train_matcher(
    store: ImageStore, parts: Parts, config: PretrainConfig, seed: int, checkpoints: Path, progress: Progress | None
) -> ViewMatcher:
    """Network 1 of the contrastive task: views differ by rotation, reflection, gain, a small shift and added noise."""
    matcher = ViewMatcher(_new_encoder(store, config, seed))

    def batch(light: Tensor, band: Tensor, rng: np.random.Generator, training: bool) -> tuple[Tensor, Tensor]:
        views = [_another_view(light, config, rng, config.noise_jitter) for _ in range(2)]
        views[1] = torch.roll(views[1], tuple(int(k) for k in rng.integers(-3, 4, 2)), (-2, -1))
        return torch.cat(views), torch.arange(len(light))

    _fit_on_single_bands(matcher, batch, store, parts, config, seed, checkpoints, progress)
    return matcher


def _new_encoder(store: ImageStore, config: PretrainConfig, seed: int) -> Encoder:
    """An encoder with first weights from the seed."""
    torch.manual_seed(seed)
    encoder = Encoder(config.encoder)
    encoder.check(store.grid.n_pixels)
    return encoder


def _another_view(light: Tensor, config: PretrainConfig, rng: np.random.Generator, noise: float = 0.0) -> Tensor:
    """Each single-band image (m, 1, h, w; light in its units) turned or mirrored, with another gain and, if asked for,
    more noise; as network 1 takes it."""
    views = torch.from_numpy(rng.integers(8, size=len(light)))
    gain = np.exp(config.gain_jitter * rng.standard_normal(len(light))).astype(np.float32)
    turned = torch.empty_like(light)
    for view in range(8):
        chosen = views == view
        turned[chosen] = dihedral(light[chosen], view)
    turned *= torch.from_numpy(gain)[:, None, None, None]
    if noise > 0:
        turned += noise * torch.from_numpy(rng.standard_normal(light.shape, dtype=np.float32))
    return asinh(turned)


def _fit_on_single_bands(
    network: BandClassifier | ViewMatcher,
    batch: Callable[[Tensor, Tensor, np.random.Generator, bool], tuple[Tensor, Tensor]],
    store: ImageStore,
    parts: Parts,
    config: PretrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> None:
    """Train a network 1, in place, to give the right answer to single-band images by cross-entropy.

    Args:
        network: gives a logit to each answer.
        batch: from images (light in its units), their bands, random numbers and whether this is training: the network's
            images and answers.
        store: images.
        parts: rows to train on, and rows to choose the epoch by.
        config: of the stage.
        seed: of the order and of ``batch``.
        checkpoints: where a killed training goes on.
        progress: called with (epochs done, epochs).
    """

    def reader(rows: np.ndarray) -> Callable[[int, np.ndarray], dict[str, Any]]:
        def read(epoch: int, indices: np.ndarray) -> dict[str, Any]:
            rng = np.random.default_rng([seed, max(epoch, 0), int(indices[0])])
            images, answer = batch(*_single_band_images(store, rows[indices], network.units), rng, epoch >= 0)
            return {"images": images, "answer": answer}

        return read

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(network(batch["images"]), batch["answer"]), len(batch["answer"])

    cutouts_per_batch = max(1, config.batch_size // len(store.grid.bands))
    fitted, validation = (rows[_has_band(store, rows).any(axis=1)] for rows in parts)
    if len(fitted) < 2 or len(validation) < 1:
        raise Pix2massError(f"{store.path}: too few images with usable pixels to train on ({len(fitted)})")
    fit(
        network,
        step,
        loader(len(fitted), reader(fitted), cutouts_per_batch, seed, config.processes),
        loader(len(validation), reader(validation), PREDICT_BATCH, None),
        config,
        config.epochs,
        seed,
        checkpoints,
        progress,
    )


def _check_redshifts(store: ImageStore, rows: np.ndarray) -> None:
    missing = rows[~np.isfinite(store.z[rows])]
    if len(missing):
        raise Pix2massError(
            f"{store.path}: units 'l-star' need the redshift of every image, {len(missing)} have none "
            f"({', '.join(store.ids[row] for row in missing[:5])}); give them or use --units noise"
        )


def _has_band(store: ImageStore, rows: np.ndarray) -> np.ndarray:
    """Whether each cutout has a noise level in each band, (n, n_bands)."""
    return np.isfinite(store.noise[rows])


def _single_band_images(store: ImageStore, rows: np.ndarray, units: PhysicalScale | None) -> tuple[Tensor, Tensor]:
    """All sufficiently covered single-band images of some rows (m, 1, h, w; light in its units), and the number of
    their band (m,)."""
    flux, mask, noise = as_tensors(store, rows)
    light = in_noise(flux, mask, noise)
    if units is not None:
        z = torch.tensor(store.z[rows], dtype=torch.float32)
        light *= units.per_noise(noise, z)[..., None, None]
    covered = (~mask).float().mean(dim=(2, 3)) >= _MIN_BAND_COVERAGE
    if not covered.any():  # a batch must not be empty; these images are the least bad
        covered = torch.isfinite(noise)
    return light[covered][:, None], torch.nonzero(covered)[:, 1]


@torch.no_grad()
def band_confusion(classifier: BandClassifier, store: ImageStore, rows: np.ndarray) -> np.ndarray:
    """Counts (n_bands, n_bands) of true band (rows) against told band (columns) over a store's rows."""
    n_bands = len(store.grid.bands)
    confusion = np.zeros((n_bands, n_bands), int)
    usable = rows[_has_band(store, rows).any(axis=1)]
    if classifier.units is not None:
        _check_redshifts(store, usable)
    for start in range(0, len(usable), PREDICT_BATCH):
        light, band = _single_band_images(store, usable[start : start + PREDICT_BATCH], classifier.units)
        np.add.at(confusion, (band.numpy(), classifier(asinh(light)).argmax(dim=1).numpy()), 1)
    return confusion


def accuracy(confusion: np.ndarray) -> float:
    """Share of the images on the diagonal of a confusion matrix."""
    return float(np.trace(confusion) / max(1, confusion.sum()))


def _n_seen(test_store: ImageStore, store: ImageStore, rows: np.ndarray) -> int:
    return int(seen_before(places(test_store, np.arange(len(test_store))), places(store, rows)).sum())


def seen_before(
    here: Mapping[str, Any], there: Mapping[str, Any], within_arcsec: float = 60.0, z_within: float | None = None
) -> np.ndarray:
    """Which of some clusters (n,) are among others.

    Args:
        here: ``ra_deg``, ``dec_deg`` and, with ``z_within``, ``z``, each (n,).
        there: the same of the others.
        within_arcsec: distance up to which two are one.
        z_within: difference in redshift up to which they are; where one is NaN, and if None, the position decides.
    """
    found = np.zeros(len(here["ra_deg"]), bool)
    if not len(found) or not len(there["ra_deg"]):
        return found
    a, b = (SkyCoord(np.asarray(one["ra_deg"]), np.asarray(one["dec_deg"]), unit="deg") for one in (here, there))
    first, second, *_ = search_around_sky(a, b, within_arcsec * u.arcsec)
    if z_within is not None:
        apart = np.abs(np.asarray(here["z"], float)[first] - np.asarray(there["z"], float)[second])
        first = first[~(apart > z_within)]
    found[first] = True
    return found


def places(store: ImageStore, rows: np.ndarray) -> dict[str, list[float]]:
    """``ra_deg``, ``dec_deg`` and ``z`` of some rows of a store, for :func:`seen_before`."""
    values = {"ra_deg": store.ra_deg, "dec_deg": store.dec_deg, "z": store.z}
    return {name: column[rows].tolist() for name, column in values.items()}


def load_encoder(folder: RunFolder) -> Encoder:
    """The pretrained encoder of a run, in eval mode.

    Raises:
        Pix2massError: the run has no encoder, or one of an earlier form.
    """
    encoder = Encoder(folder.read_json("pretrain.json")["encoder"])
    try:
        encoder.load_state_dict(folder.load_weights("encoder"))
    except RuntimeError as error:
        raise Pix2massError(
            f"{folder.path}: the encoder has changed since its training; pretrain again ({error})"
        ) from None
    return encoder.eval()
