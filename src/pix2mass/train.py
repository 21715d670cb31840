"""Training: ``pretrain`` makes network 1 from unlabelled images, ``train`` makes one network 2 per fold from labels.

Both are short callers of one ``_fit``. Every random number is drawn from the seed and the epoch, never from what ran
before, so that a killed and resumed training ends where an undisturbed one does.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from astropy import units as u
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.table import QTable
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from pix2mass.calibrate import Shrinkage, TrainingPrior, cross_calibrate, fit_calibration
from pix2mass.config import GridConfig, OptimConfig, PretrainConfig, TrainConfig
from pix2mass.galaxies import Described, GalaxyRegressor
from pix2mass.model import (
    BandClassifier,
    Encoder,
    MassRegressor,
    Regressor,
    ViewMatcher,
    combine,
    dihedral,
    make_regressor,
    negative_log_likelihood,
    prepare,
)
from pix2mass.run import RunFolder, digest
from pix2mass.store import ImageStore
from pix2mass.trust import Reference, image_statistics
from pix2mass.types import Pix2massError

Progress = Callable[[int, int], None]

_PREDICT_BATCH = 64
_SAME_POSITION = 1.0 * u.arcmin
_FIND_BATCH = 16
_SCALER_SAMPLE = 128
"""Training clusters from which the scale of the features is taken."""
_MIN_BAND_COVERAGE = 0.5
"""Images of a band with less usable area than this take no part in pretraining."""


# ---- one fit for both networks -------------------------------------------------------------------------------------


class _EpochSampler(Sampler):
    """Row numbers in an order drawn from (seed, epoch), each with its epoch so that augmentation can use it too.

    Of K processes that train together each takes every K-th row, so that their K batches are one batch of one process.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @staticmethod
    def _place() -> tuple[int, int]:
        """Number of this process, and how many there are."""
        together = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)

    def __len__(self) -> int:
        return self.n // self._place()[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, processes = self._place()
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        return iter((self.epoch, int(i)) for i in order[: self.n - self.n % processes][rank::processes])


class _Batches(Dataset):
    """Hands whole batches to ``read(epoch, indices)``; epoch is -1 outside training."""

    def __init__(self, n: int, read: Callable[[int, np.ndarray], dict[str, Any]]) -> None:
        self.n, self.read = n, read

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, keys: list[Any]) -> dict[str, Any]:
        if isinstance(keys[0], tuple):
            return self.read(keys[0][0], np.array([index for _, index in keys]))
        return self.read(-1, np.array(keys))


def _loader(
    n: int,
    read: Callable[[int, np.ndarray], dict[str, Any]],
    batch_size: int,
    seed: int | None,
    processes: int = 1,
) -> DataLoader:
    # A last batch of one image would give batch normalisation nothing to normalise.
    drop_last = seed is not None and n // processes > batch_size
    sampler = None if seed is None else _EpochSampler(n, seed)
    return DataLoader(
        _Batches(n, read), batch_size, sampler=sampler, collate_fn=lambda batch: batch, drop_last=drop_last
    )


class _Task(lightning.LightningModule):
    """A network with its loss. ``step`` gives the loss and the number of samples."""

    def __init__(
        self, network: nn.Module, step: Callable[[Any], tuple[Tensor, int]], config: OptimConfig, seed: int
    ) -> None:
        super().__init__()
        self.network, self.config, self.seed = network, config, seed
        self._step = step

    def training_step(self, batch: Any, index: int) -> Tensor:
        # Dropout must not depend on what ran before, or a resumed training would differ from an undisturbed one.
        torch.manual_seed((self.seed * 10_007 + self.current_epoch) * 10_007 + index)
        return self._step(batch)[0]

    def validation_step(self, batch: Any, _: int) -> None:
        loss, n = self._step(batch)
        self.log("val_loss", loss, batch_size=n, sync_dist=self.config.processes > 1)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.config.learning_rate, weight_decay=self.config.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.learning_rate, total_steps=max(2, steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class _Report(Callback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.progress(trainer.current_epoch + 1, trainer.max_epochs or 0)


def _fit(
    network: nn.Module,
    step: Callable[[Any], tuple[Tensor, int]],
    train: DataLoader,
    validation: DataLoader,
    config: OptimConfig,
    epochs: int,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> None:
    """Train in place and leave the network at its best epoch, in eval mode. Goes on from ``checkpoints`` if there."""
    task = _Task(network.train(), step, config, seed)
    best = ModelCheckpoint(
        checkpoints,
        "best",
        monitor="val_loss",
        save_last=True,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    stop = EarlyStopping("val_loss", patience=config.patience, check_on_train_epoch_end=True)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    together, threads = config.processes > 1, torch.get_num_threads()
    with warnings.catch_warnings():
        # Lightning's advice on workers does not hold: batches come from memory maps.
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*(lr_scheduler.step|LeafSpec).*")
        try:
            trainer = lightning.Trainer(
                max_epochs=epochs,
                accelerator=config.accelerator,
                devices=config.devices,
                num_nodes=config.num_nodes,
                precision=config.precision,
                # Forked, since what is trained on is made of functions; a fork of a process with threads must use one.
                strategy="ddp_fork" if together else "auto",
                sync_batchnorm=together and config.accelerator != "cpu" and CUDAAccelerator.is_available(),
                use_distributed_sampler=False,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                gradient_clip_val=1.0,
                callbacks=[best, stop, *([_Report(progress)] if progress else [])],
            )
        except MisconfigurationException as error:
            raise Pix2massError(f"accelerator {config.accelerator!r}: {error}; use --accelerator cpu or auto") from None
        last = checkpoints / "last.ckpt"
        # Other machines have no checkpoint to go on from.
        resume = str(last) if config.num_nodes == 1 and _is_whole(last) else None
        try:
            torch.set_num_threads(1 if together else threads)
            trainer.fit(task, train, validation, ckpt_path=resume, weights_only=True)
        except SystemExit as stopped:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stopped
        finally:
            torch.set_num_threads(threads)
    # Of several machines the first one writes.
    kept = checkpoints / "best.ckpt" if config.num_nodes == 1 else Path(best.best_model_path)
    state = torch.load(kept, map_location="cpu", weights_only=True)["state_dict"]
    task.load_state_dict(state)
    network.eval().cpu()


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there and was not cut off by a kill while it was written; if it was, start over."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # zip, pickle and file errors all mean the same: not whole
        return False
    return True


def _split(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random training and validation indices."""
    order = np.random.default_rng([seed, 77]).permutation(n)
    n_validation = min(n - 1, max(1, round(share * n)))
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])


def _as_tensors(store: ImageStore, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    flux, mask = store.batch(rows)
    return torch.from_numpy(flux), torch.from_numpy(mask), torch.from_numpy(store.noise[rows])


# ---- network 1 -----------------------------------------------------------------------------------------------------


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
    key = digest("pretrain", config, seed, store.checksum, test_store.checksum if test_store else None)
    if folder.is_done("pretrain", key, folder / "encoder.safetensors", folder / "pretrain.json"):
        return load_encoder(folder)
    checkpoints = folder / "checkpoints" / f"pretrain-{key}"
    with folder.stage("pretrain", key) as facts:
        n_images = min(config.n_images or len(store), len(store))
        rows = np.sort(np.random.default_rng([seed, 78]).permutation(len(store))[:n_images])
        fitted, validation = (rows[part] for part in _split(len(rows), config.validation_share, seed))
        if config.task == "bands":
            network = _train_classifier(store, fitted, validation, config, seed, checkpoints, progress)
            tested, chosen = (store, validation) if test_store is None else (test_store, np.arange(len(test_store)))
            confusion = band_confusion(network, tested, chosen)
            facts |= {"band_accuracy": accuracy(confusion), "band_confusion": confusion.tolist()}
            folder.save_weights("band-head", network.head.state_dict())
        else:
            network = _train_matcher(store, fitted, validation, config, seed, checkpoints, progress)
            (folder / "band-head.safetensors").unlink(missing_ok=True)
        folder.save_weights("encoder", network.encoder.state_dict())
        folder.write_json(
            "pretrain.json",
            {
                "task": config.task,
                "encoder": config.encoder,
                "bands": store.grid.bands,
                "grid": store.grid.model_dump(mode="json"),
                **facts,
                "tested_on": "validation share" if test_store is None else f"{len(test_store)} other images",
                "tested_images_seen": 0 if test_store is None else shared_positions(test_store, store),
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
                fitted, validation = _split(len(others), config.validation_share, seed)
                classifier = _train_classifier(
                    store, others[fitted], others[validation], config, seed, checkpoints, progress
                )
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
    store: ImageStore,
    fitted: np.ndarray,
    validation: np.ndarray,
    config: PretrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> BandClassifier:
    torch.manual_seed(seed)
    encoder = Encoder(config.encoder)
    encoder.check(store.grid.n_pixels)
    classifier = BandClassifier(encoder, len(store.grid.bands))

    def reader(rows: np.ndarray) -> Callable[[int, np.ndarray], dict[str, Any]]:
        def read(epoch: int, indices: np.ndarray) -> dict[str, Any]:
            images, band = _single_band_images(store, rows[indices])
            if epoch >= 0:
                images = _another_view(images, config, np.random.default_rng([seed, epoch, int(indices[0])]))
            return {"images": images, "answer": band}

        return read

    _fit_on_single_bands(classifier, reader, store, fitted, validation, config, seed, checkpoints, progress)
    return classifier


def _train_matcher(
    store: ImageStore,
    fitted: np.ndarray,
    validation: np.ndarray,
    config: PretrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> ViewMatcher:
    """Network 1 of the contrastive task: views differ by rotation, reflection, gain, a small shift and added noise."""
    torch.manual_seed(seed)
    encoder = Encoder(config.encoder)
    encoder.check(store.grid.n_pixels)

    def reader(rows: np.ndarray) -> Callable[[int, np.ndarray], dict[str, Any]]:
        def read(epoch: int, indices: np.ndarray) -> dict[str, Any]:
            images, _ = _single_band_images(store, rows[indices])
            rng = np.random.default_rng([seed, epoch + 1, int(indices[0])])
            views = [_another_view(images, config, rng, config.noise_jitter) for _ in range(2)]
            views[1] = torch.roll(views[1], tuple(int(k) for k in rng.integers(-3, 4, 2)), (-2, -1))
            return {"images": torch.cat(views), "answer": torch.arange(len(images))}

        return read

    matcher = ViewMatcher(encoder)
    _fit_on_single_bands(matcher, reader, store, fitted, validation, config, seed, checkpoints, progress)
    return matcher


def _another_view(images: Tensor, config: PretrainConfig, rng: np.random.Generator, noise: float = 0.0) -> Tensor:
    """Each single-band image (m, 1, h, w) turned or mirrored, with another gain and, if asked for, more noise."""
    views = rng.integers(8, size=len(images))
    gain = np.exp(config.gain_jitter * rng.standard_normal(len(images))).astype(np.float32)
    images = torch.stack([dihedral(image, view) for image, view in zip(images, views, strict=True)])
    light = torch.sinh(images) * torch.from_numpy(gain)[:, None, None, None]
    if noise > 0:
        light = light + noise * torch.from_numpy(rng.standard_normal(light.shape, dtype=np.float32))
    return torch.asinh(light)


def _fit_on_single_bands(
    network: nn.Module,
    reader: Callable[[np.ndarray], Callable[[int, np.ndarray], dict[str, Any]]],
    store: ImageStore,
    fitted: np.ndarray,
    validation: np.ndarray,
    config: PretrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> None:
    """Train a network 1, in place, to give the right answer to single-band images by cross-entropy."""

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(network(batch["images"]), batch["answer"]), len(batch["answer"])

    cutouts_per_batch = max(1, config.batch_size // len(store.grid.bands))
    fitted, validation = (rows[_has_band(store, rows).any(axis=1)] for rows in (fitted, validation))
    if len(fitted) < 2 or len(validation) < 1:
        raise Pix2massError(f"{store.path}: too few images with usable pixels to train on ({len(fitted)})")
    _fit(
        network,
        step,
        _loader(len(fitted), reader(fitted), cutouts_per_batch, seed, config.processes),
        _loader(len(validation), reader(validation), _PREDICT_BATCH, None),
        config,
        config.epochs,
        seed,
        checkpoints,
        progress,
    )


def _has_band(store: ImageStore, rows: np.ndarray) -> np.ndarray:
    """Whether each cutout has a noise level in each band, (n, n_bands)."""
    return np.isfinite(store.noise[rows])


def _single_band_images(store: ImageStore, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """All sufficiently covered single-band images of some rows (m, 1, h, w), and the number of their band (m,)."""
    flux, mask, noise = _as_tensors(store, rows)
    images, _ = prepare(flux, mask, noise)
    covered = (~mask).float().mean(dim=(2, 3)) >= _MIN_BAND_COVERAGE
    if not covered.any():  # a batch must not be empty; these images are the least bad
        covered = torch.isfinite(noise)
    return images[covered][:, None], torch.nonzero(covered)[:, 1]


@torch.no_grad()
def band_confusion(classifier: BandClassifier, store: ImageStore, rows: np.ndarray) -> np.ndarray:
    """Counts (n_bands, n_bands) of true band (rows) against told band (columns) over a store's rows."""
    n_bands = len(store.grid.bands)
    confusion = np.zeros((n_bands, n_bands), int)
    usable = rows[_has_band(store, rows).any(axis=1)]
    for start in range(0, len(usable), _PREDICT_BATCH):
        images, band = _single_band_images(store, usable[start : start + _PREDICT_BATCH])
        np.add.at(confusion, (band.numpy(), classifier(images).argmax(dim=1).numpy()), 1)
    return confusion


def accuracy(confusion: np.ndarray) -> float:
    """Share of the images on the diagonal of a confusion matrix."""
    return float(np.trace(confusion) / max(1, confusion.sum()))


def shared_positions(store: ImageStore, pretraining: ImageStore | Mapping[str, Any]) -> int:
    """How many positions of a store were, within 1 arcmin, among those network 1 was trained on.

    Args:
        store: the images to ask about.
        pretraining: network 1's store, or ``pretrain.json`` of its run.
    """
    seen = pretraining if isinstance(pretraining, Mapping) else vars(pretraining)
    here = SkyCoord(store.ra_deg, store.dec_deg, unit="deg")
    there = SkyCoord(np.asarray(seen["ra_deg"]), np.asarray(seen["dec_deg"]), unit="deg")
    return len(np.unique(search_around_sky(here, there, _SAME_POSITION)[0]))


def load_encoder(folder: RunFolder) -> Encoder:
    """The pretrained encoder of a run, in eval mode.

    Raises:
        Pix2massError: the run has no encoder.
    """
    encoder = Encoder(folder.read_json("pretrain.json")["encoder"])
    encoder.load_state_dict(folder.load_weights("encoder"))
    return encoder.eval()


# ---- network 2 -----------------------------------------------------------------------------------------------------


class _Labelled:
    """Labelled clusters as arrays: rows of the store, redshift, label, its error."""

    def __init__(self, store: ImageStore, catalog: QTable, use_redshift: bool) -> None:
        label = np.asarray(catalog["log10_m500c"], float)
        ids = np.array([str(cluster_id) for cluster_id in catalog["id"]])
        rows = store.rows(ids.tolist())
        usable = np.isfinite(label) & np.isfinite(store.noise[rows]).any(axis=1)
        self.z = np.asarray(catalog["z"], float)[usable]
        if use_redshift and not np.isfinite(self.z).all():
            missing = ids[usable][~np.isfinite(self.z)][:5]
            raise Pix2massError(
                f"{len(missing)} or more labelled clusters have no redshift ({', '.join(missing)}); "
                "fill column z or train with --no-use-redshift"
            )
        self.z = np.nan_to_num(self.z)
        self.ids, self.rows, self.label = ids[usable], rows[usable], label[usable]
        # A label without an error: its noise then counts as the network's own.
        self.label_err = np.nan_to_num(np.asarray(catalog["log10_m500c_err"], float)[usable])

    def __len__(self) -> int:
        return len(self.ids)


def train(
    store: ImageStore,
    catalog: QTable,
    fold: np.ndarray,
    folder: RunFolder,
    config: TrainConfig,
    seed: int,
    name: str = "train",
    progress: Progress | None = None,
) -> QTable:
    """Train network 2 once per fold, predict each cluster with the network that has not seen it.

    Args:
        store: images of the labelled clusters.
        catalog: columns id, z, log10_m500c, log10_m500c_err.
        fold: fold number of each row of the catalogue, shape (n,).
        folder: has the encoder of :func:`pretrain` (unless from scratch); gets one ``fold-K.safetensors`` per fold,
            ``model.json`` and, returned as well, ``NAME-out-of-fold.ecsv``.
        config: of the stage.
        seed: of every random number.
        name: of the stage; any other than "train" is a null test and keeps no weights.
        progress: called with (epochs done, epochs in all folds).

    Returns:
        Columns id, fold, log10_m500c, log10_m500c_err: out-of-fold estimates with calibrated errors, one row per
        labelled cluster that has pixels.

    Raises:
        Pix2massError: bands differ from the encoder's, redshifts missing, or too few clusters.
    """
    start = _Start.of(config, folder, store)
    data = _Labelled(store, catalog, config.use_redshift)
    in_data = {cluster_id: index for index, cluster_id in enumerate(data.ids)}
    fold = np.array([fold[i] for i, cluster_id in enumerate(catalog["id"]) if str(cluster_id) in in_data], dtype=int)
    key = digest(
        name,
        config,
        seed,
        store.checksum,
        data.ids.tolist(),
        data.z.tolist(),
        data.label.tolist(),
        data.label_err.tolist(),
        fold.tolist(),
        "log10_m500c_true" in catalog.colnames,
        start.key,
    )
    table_path = folder / f"{name}-out-of-fold.ecsv"
    if folder.is_done(name, key, table_path):
        return QTable.read(table_path, format="ascii.ecsv")

    checkpoints = folder / "checkpoints" / f"{name}-{key}"
    checkpoints.mkdir(parents=True, exist_ok=True)
    n_folds = int(fold.max()) + 1
    n_networks = 1 if config.network == "galaxies" else n_folds
    empty = set(range(n_folds)) - set(fold.tolist())
    if empty:
        raise Pix2massError(f"fold {min(empty)} has no cluster with a mass and usable pixels; use fewer folds")
    with folder.stage(name, key) as facts:
        if name == "train":  # what an earlier training left must not be taken for this one's, should this one stop
            for old in (table_path, folder / "model.json", *folder.path.glob("fold-*.safetensors")):
                old.unlink(missing_ok=True)
        train_folds = _train_galaxies if config.network == "galaxies" else _train_bands
        mean, sigma = train_folds(start, store, data, fold, config, seed, checkpoints, progress)
        known = (mean, sigma, data.z, data.label, data.label_err)
        posterior, shapes = cross_calibrate(*known, fold)
        table = QTable(
            {"id": data.ids, "fold": fold, **posterior.columns()},
            meta={"errors": "calibrated on the other folds' labels", "shape_of_fold": shapes},
        )
        part = table_path.with_name(f".{table_path.name}.part")
        table.write(part, format="ascii.ecsv", overwrite=True)
        part.replace(table_path)
        if name == "train":
            for k in range(n_networks):
                folder.save_weights(f"fold-{k}", torch.load(checkpoints / f"fold-{k}.pt", weights_only=True))
            covered, statistics = _look(store, data.rows)
            calibration = fit_calibration(*known, networks=n_folds)
            # Estimates are held against what predictions will be, so with the same calibration.
            as_predicted = calibration.posterior(mean, sigma, data.z).centre
            folder.write_json(
                "model.json",
                {
                    "bands": store.grid.bands,
                    "grid": store.grid.model_dump(mode="json"),
                    **start.info,
                    "folds": n_networks,
                    "views": 1 if config.network == "galaxies" else config.views,
                    "calibration": calibration.as_json(),
                    "shrinkage": Shrinkage.fit(posterior.centre, data.label, data.label_err).as_json(),
                    "training_prior": TrainingPrior.fit(data.label, data.label_err, data.z).as_json(),
                    "z_range": [float(data.z.min()), float(data.z.max())],
                    "label_range": [float(data.label.min()), float(data.label.max())],
                    # Simulated edges pass no further than the centre: about half of the image is always left.
                    "min_coverage": min(0.5 if config.edge_probability > 0 else 1.0, float(covered.min())),
                    "prior": "the distribution of the training labels",
                    "reference": Reference.fit(statistics, data.z, as_predicted).as_json(),
                    "trained_on": "mock sky" if "log10_m500c_true" in catalog.colnames else "real observations",
                },
            )
        facts["folds"] = n_folds
    shutil.rmtree(checkpoints, ignore_errors=True)
    return table


def _look(store: ImageStore, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Usable share of the pixels of each row (n,), and the statistics of its images (n, p)."""
    covered, statistics = [], []
    for i in range(0, len(rows), 256):
        part = rows[i : i + 256]
        flux, mask = store.batch(part)
        covered.append(1.0 - mask.mean(axis=(1, 2, 3)))
        statistics.append(image_statistics(flux, mask, store.noise[part]))
    return np.concatenate(covered), np.concatenate(statistics)


@dataclass(frozen=True)
class _Start:
    """What the training of network 2 starts from.

    Attributes:
        info: what model.json says of the network: ``network``, ``encoder``, ``use_redshift`` and, where it starts from
            a whole network, ``started_from``, what that one was trained on.
        grid: of the images.
        weights: of the whole network 2, or of its encoder alone; None starts from random ones.
        whole: whether they are the whole network's, scaler included.
        key: digest of where they come from.
    """

    info: dict[str, Any]
    grid: GridConfig
    weights: dict[str, Tensor] | None
    whole: bool
    key: str | None

    @classmethod
    def of(cls, config: TrainConfig, folder: RunFolder, store: ImageStore) -> _Start:
        info: dict[str, Any] = {"network": config.network, "encoder": None, "use_redshift": config.use_redshift}
        if config.start_from is not None:
            source = RunFolder.open(config.start_from)
            made = source.read_json("model.json")
            for name, mine in (("network", config.network), ("use_redshift", config.use_redshift)):
                if made.get(name, "bands") != mine:
                    raise Pix2massError(
                        f"{source.path}: its networks have {name} = {made.get(name, 'bands')!r}, this training asks "
                        f"for {mine!r}; start from another run or change {name}"
                    )
            _same_bands(made["bands"], store, f"{source.path}: its networks were")
            weights = source.load_weights("fold-0")
            info |= {
                "encoder": made["encoder"],
                "started_from": f"{made['calibration']['n']} clusters, {made['trained_on']}",
            }
            return cls(info, store.grid, weights, True, digest(_fingerprint(weights)))
        if config.network == "galaxies":
            return cls(info, store.grid, None, False, None)
        pretrained = folder.read_json("pretrain.json")
        info["encoder"], key = pretrained["encoder"], folder.stages.get("pretrain", {}).get("key")
        if config.from_scratch:
            return cls(info, store.grid, None, False, key)
        _same_bands(pretrained["bands"], store, f"{folder.path}: network 1 was")
        return cls(info, store.grid, folder.load_weights("encoder"), False, key)

    def regressor(self, seed: int) -> Regressor:
        """A network 2 with these weights, the others random."""
        torch.manual_seed(seed)
        regressor = make_regressor(self.info, self.grid)
        if self.weights is not None:
            (regressor if self.whole else regressor.encoder).load_state_dict(self.weights)
        return regressor


def _fingerprint(weights: dict[str, Tensor]) -> list[list[float]]:
    return [[*map(float, value.shape), float(value.double().sum())] for _, value in sorted(weights.items())]


def _same_bands(bands: str, store: ImageStore, whose: str) -> None:
    if bands != store.grid.bands:
        raise Pix2massError(
            f"{whose} trained on bands {bands!r}, {store.path} holds {store.grid.bands!r}; build the store with "
            f"--bands {bands} or train again"
        )


def _of_bands(regressor: Regressor) -> MassRegressor:
    assert isinstance(regressor, MassRegressor)
    return regressor


def _train_bands(
    start: _Start,
    store: ImageStore,
    data: _Labelled,
    fold: np.ndarray,
    config: TrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Train one network per fold, kept as ``fold-K.pt``; mean and sigma (n,) of each cluster by the one that has not
    seen it."""
    mean, sigma = np.full(len(data), np.nan), np.full(len(data), np.nan)
    n_folds = int(fold.max()) + 1
    frozen = None
    if config.freeze_encoder:
        frozen = _FrozenFeatures(_of_bands(start.regressor(seed)).eval(), store, data, config.views, checkpoints)
    for k in range(n_folds):
        regressor = _of_bands(start.regressor(seed * 1000 + k))
        weights = checkpoints / f"fold-{k}.pt"
        test = np.flatnonzero(fold == k)
        if weights.exists():
            regressor.load_state_dict(torch.load(weights, weights_only=True))
            regressor.eval()
        else:
            _train_fold(
                regressor,
                store,
                data,
                np.flatnonzero(fold != k),
                frozen,
                start.whole,
                config,
                seed * 1000 + k,
                checkpoints / str(k),
                (lambda done, total, k=k: progress(k * total + done, n_folds * total)) if progress else None,
            )
            _keep(regressor.state_dict(), weights)
        mean[test], sigma[test] = _estimate(regressor, store, data, test, frozen, config.views)
        if progress:
            progress((k + 1) * config.epochs, n_folds * config.epochs)
    return mean, sigma


def _check_enough(n: int) -> None:
    if n < 8:
        raise Pix2massError(f"{n} clusters are left to train a fold on, expected at least 8; use fewer folds")


def _keep(values: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(values, part)
    part.replace(path)


def _train_galaxies(
    start: _Start,
    store: ImageStore,
    data: _Labelled,
    fold: np.ndarray,
    config: TrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_train_bands`: the sources in the images are found once for all folds. The network that is kept, as
    ``fold-0.pt``, is fitted to all labels; those of the folds tell its errors."""

    def new() -> GalaxyRegressor:
        regressor = start.regressor(seed)
        assert isinstance(regressor, GalaxyRegressor)
        return regressor

    n_folds = int(fold.max()) + 1
    kept, regressor = checkpoints / "described.pt", new()
    if not kept.exists():
        parts, sizes = [], []
        with torch.no_grad():
            for begin in range(0, len(data), _FIND_BATCH):
                part = np.arange(begin, min(begin + _FIND_BATCH, len(data)))
                parts.append(regressor.described(*_prepared(regressor, store, data, part)))
                sizes.append(len(part))
                if progress:
                    progress(int(part[-1]) + 1, len(data))
        _keep(tuple(Described.joined(parts, sizes)), kept)
    described = Described(*torch.load(kept, weights_only=True))
    z, label, label_err = (torch.tensor(v, dtype=torch.float32) for v in (data.z, data.label, data.label_err))
    mean, sigma = np.full(len(data), np.nan), np.full(len(data), np.nan)

    def fitted(k: int, train: Tensor) -> GalaxyRegressor:
        """The network of fold k, or of all clusters, k = n_folds."""
        regressor, weights = new(), checkpoints / f"part-{k}.pt"
        if weights.exists():
            regressor.load_state_dict(torch.load(weights, weights_only=True))
            return regressor.eval()
        _check_enough(len(train))

        def report(done: int, steps: int) -> None:
            if progress:
                progress(k * steps + done, (n_folds + 1) * steps)

        chosen = described.of(train, len(z))
        regressor.fit(chosen, z[train], label[train], label_err[train], seed * 1000 + k, start.whole, report)
        _keep(regressor.state_dict(), weights)
        return regressor

    for k in range(n_folds):
        train, test = torch.from_numpy(np.flatnonzero(fold != k)), torch.from_numpy(np.flatnonzero(fold == k))
        regressor = fitted(k, train)
        with torch.no_grad():
            found = regressor.from_described(described.of(test, len(z)), z[test])
        mean[test], sigma[test] = (values.numpy() for values in found)
    _keep(fitted(n_folds, torch.arange(len(z))).state_dict(), checkpoints / "fold-0.pt")
    return mean, sigma


class _FrozenFeatures:
    """Feature maps of every labelled cluster in several views, computed once and kept on disk for all folds."""

    def __init__(self, regressor: MassRegressor, store: ImageStore, data: _Labelled, views: int, cache: Path) -> None:
        done = cache / "features.done"
        with torch.no_grad():
            probe = regressor.features(*_prepared(regressor, store, data, np.zeros(1, int))[::2])
        # Channels last: the layout in which mixing them is fastest.
        shapes = [(len(data), views, *level.shape[2:], level.shape[1]) for level in probe]
        files = [cache / f"features-{level}.npy" for level in range(len(shapes))]
        if not done.exists():
            arrays = [
                np.lib.format.open_memmap(file, "w+", np.float16, shape)
                for file, shape in zip(files, shapes, strict=True)
            ]
            with torch.no_grad():
                for start in range(0, len(data), _PREDICT_BATCH):
                    part = np.arange(start, min(start + _PREDICT_BATCH, len(data)))
                    images, _, z = _prepared(regressor, store, data, part)
                    for view in range(views):
                        levels = regressor.features(dihedral(images, view), z)
                        for array, level in zip(arrays, levels, strict=True):
                            array[part, view] = level.permute(0, 2, 3, 1).half().numpy()
            for array in arrays:
                array.flush()
            done.touch()
        self._arrays = [np.load(file, mmap_mode="r") for file in files]

    def read(self, indices: np.ndarray, views: np.ndarray) -> list[Tensor]:
        parts = (torch.from_numpy(np.asarray(array[indices, views])) for array in self._arrays)
        return [part.float().permute(0, 3, 1, 2) for part in parts]


def _prepared(
    regressor: Regressor, store: ImageStore, data: _Labelled, part: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, usable share and redshifts of some labelled clusters, as the network takes them."""
    z = torch.tensor(data.z[part], dtype=torch.float32)
    flux, mask, noise = _as_tensors(store, data.rows[part])
    images, valid = prepare(flux, mask, noise)
    return regressor.rescale(images, noise, z), valid, z


def _train_fold(
    regressor: MassRegressor,
    store: ImageStore,
    data: _Labelled,
    part: np.ndarray,
    frozen: _FrozenFeatures | None,
    scaled: bool,
    config: TrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> None:
    """Train one regressor on a part of the labelled clusters; the scaler, unless it is ``scaled`` already, sees that
    part's training share alone."""
    fitted, validation = (part[indices] for indices in _split(len(part), config.validation_share, seed))
    _check_enough(len(fitted))
    views = 8 if frozen is None else config.views
    if frozen is not None:
        regressor.encoder.requires_grad_(False)
    if not scaled:
        sample = fitted[:_SCALER_SAMPLE]
        with torch.no_grad():
            images, _, z = _prepared(regressor.eval(), store, data, sample)
            levels = frozen.read(sample, np.zeros(len(sample), int)) if frozen else regressor.features(images, z)
        regressor.fit_scaler(torch.tensor(data.label[fitted]).float(), torch.tensor(data.z[fitted]).float(), levels)

    def reader(members: np.ndarray) -> Callable[[int, np.ndarray], dict[str, Any]]:
        def read(epoch: int, indices: np.ndarray) -> dict[str, Any]:
            chosen = members[indices]
            rng = np.random.default_rng([seed, max(epoch, 0), int(indices[0])])
            view = rng.integers(views, size=len(chosen)) if epoch >= 0 else np.zeros(len(chosen), int)
            images, valid, z = _prepared(regressor, store, data, chosen)
            valid = torch.stack([dihedral(one, int(v)) for one, v in zip(valid, view, strict=True)])
            batch: dict[str, Any] = {"z": z}
            if epoch >= 0:
                valid = valid * _random_edges(len(chosen), valid.shape[-1], config.edge_probability, rng)
            if frozen is not None:
                batch["levels"] = frozen.read(chosen, view)
            else:
                images = torch.stack([dihedral(one, int(v)) for one, v in zip(images, view, strict=True)])
                if epoch >= 0 and config.shift_pixels:
                    rows, columns = (int(k) for k in rng.integers(-config.shift_pixels, config.shift_pixels + 1, 2))
                    images, valid = (torch.roll(values, (rows, columns), (-2, -1)) for values in (images, valid))
                batch["images"] = images * (valid > 0)[:, None]
            for name, values in (("label", data.label), ("label_err", data.label_err)):
                batch[name] = torch.tensor(values[chosen], dtype=torch.float32)
            return {**batch, "valid": valid}

        return read

    def step(batch: dict[str, Any]) -> tuple[Tensor, int]:
        if frozen is not None:
            regressor.encoder.eval()  # its batch statistics must not move
            mean, sigma = regressor.from_features(batch["levels"], batch["valid"], batch["z"])
        else:
            mean, sigma = regressor(batch["images"], batch["valid"], batch["z"])
        loss = negative_log_likelihood(mean, sigma, batch["label"], batch["label_err"])
        return loss, len(mean)

    _fit(
        regressor,
        step,
        _loader(len(fitted), reader(fitted), config.batch_size, seed, config.processes),
        _loader(len(validation), reader(validation), _PREDICT_BATCH, None),
        config,
        config.epochs,
        seed,
        checkpoints,
        progress,
    )


def _random_edges(n: int, n_pixels: int, probability: float, rng: np.random.Generator) -> Tensor:
    """Masks (n, h, w): 1 where kept, 0 beyond a straight edge of random direction and distance from the centre."""
    grid = (np.arange(n_pixels) + 0.5) / n_pixels * 2 - 1
    angle = rng.uniform(0, 2 * np.pi, n)
    distance = np.where(rng.random(n) < probability, rng.uniform(0.0, 1.0, n), np.inf)
    along = np.cos(angle)[:, None, None] * grid + np.sin(angle)[:, None, None] * grid[:, None]
    return torch.from_numpy((along < distance[:, None, None]).astype(np.float32))


@torch.no_grad()
def _estimate(
    regressor: MassRegressor,
    store: ImageStore,
    data: _Labelled,
    part: np.ndarray,
    frozen: _FrozenFeatures | None,
    views: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sigma of some clusters, averaged over views."""
    results = []
    for start in range(0, len(part), _PREDICT_BATCH):
        chosen = part[start : start + _PREDICT_BATCH]
        images, valid, z = _prepared(regressor, store, data, chosen)
        per_view = []
        for view in range(views):
            levels = (
                frozen.read(chosen, np.full(len(chosen), view))
                if frozen is not None
                else regressor.features(dihedral(images, view), z)
            )
            per_view.append(regressor.from_features(levels, dihedral(valid, view), z))
        results.append(combine(*(torch.stack(values) for values in zip(*per_view, strict=True))))
    mean, sigma = (torch.cat(values).numpy().astype(float) for values in zip(*results, strict=True))
    return mean, sigma


# ---- richness beside the pixels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RichnessBlend:
    """Mass from a network's estimate and a measured richness together.

    log10 M = constant + network (estimate - 14.5) + richness log10(lambda / 40) + redshift log10((1 + z) / 1.3), by
    least squares on clusters that the network has not seen.
    """

    constant: float
    network: float
    richness: float
    redshift: float

    @classmethod
    def fit(cls, estimate: np.ndarray, richness: np.ndarray, z: np.ndarray, label: np.ndarray) -> RichnessBlend:
        """Fit to out-of-fold estimates.

        Args:
            estimate: (n,) log10 M500c of networks that did not see the cluster.
            richness: (n,) measured lambda; clusters without one are left out.
            z: (n,) redshifts.
            label: (n,) measured log10 M500c.

        Raises:
            Pix2massError: fewer than 20 clusters have a richness.
        """
        terms, label = cls._terms(estimate, richness, z), np.asarray(label, float)
        known = np.isfinite(terms).all(axis=1) & np.isfinite(label)
        if known.sum() < 20:
            raise Pix2massError(
                f"richness: expected at least 20 labelled clusters with a richness, found {known.sum()}"
            )
        return cls(*map(float, np.linalg.lstsq(terms[known], label[known], rcond=None)[0]))

    @staticmethod
    def _terms(estimate: np.ndarray, richness: np.ndarray, z: np.ndarray) -> np.ndarray:
        # A filter that finds no galaxies says 0: the cluster then has at most a few.
        richness = np.maximum(np.asarray(richness, float), 2.0)
        columns = (
            np.asarray(estimate, float) - 14.5,
            np.log10(richness / 40),
            np.log10((1 + np.asarray(z, float)) / 1.3),
        )
        return np.stack([np.ones(len(richness)), *columns], axis=1)

    def predict(self, estimate: np.ndarray, richness: np.ndarray, z: np.ndarray) -> np.ndarray:
        """log10 M500c (n,); NaN without a richness."""
        return self._terms(estimate, richness, z) @ np.array(
            [self.constant, self.network, self.richness, self.redshift]
        )
