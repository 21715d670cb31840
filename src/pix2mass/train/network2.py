"""Network 2: masses learnt from labels, one network per fold, with errors calibrated on the other folds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.table import QTable
from torch import Tensor

from pix2mass.calibrate import Shrinkage, TrainingPrior, cross_calibrate, fit_calibration, known_errors
from pix2mass.config import GridConfig, PretrainConfig, TrainConfig, validate
from pix2mass.galaxies import GalaxyRegressor
from pix2mass.memory import keep_freed_memory
from pix2mass.model import (
    MassRegressor,
    ProcessRegressor,
    Regressor,
    combine,
    dihedral,
    make_regressor,
    negative_log_likelihood,
    prepare,
)
from pix2mass.run import RunFolder, digest
from pix2mass.store import ImageStore
from pix2mass.store.image_store import describe
from pix2mass.train.fit import PREDICT_BATCH, Progress, as_tensors, fit, loader, split
from pix2mass.train.network1 import places, seen_before
from pix2mass.trust import Reference, image_statistics
from pix2mass.types import Pix2massError
from pix2mass.weights import open_run

_FIND_BATCH = 16
_SCALER_SAMPLE = 128
"""Training clusters from which the scale of the features is taken."""
_FORMAT = 1
"""Of what training leaves; raised where predictions need something new of it, so that "train again" does so."""
_SAME = {"mock sky": (1.0, 1e-4), "real observations": (60.0, 0.05)}
"""Distance, arcsec, and difference in redshift up to which two clusters are one, by what they are: mock ones have one
catalogue, real ones several."""


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
        self.knows_z = bool(np.isfinite(self.z).all())
        if not self.knows_z:  # nothing is learnt from the redshifts of some
            self.z = np.zeros(len(self.z))
        self.ids, self.rows, self.label = ids[usable], rows[usable], label[usable]
        self.label_err = known_errors(np.asarray(catalog["log10_m500c_err"], float)[usable])

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
        Pix2massError: bands or grid differ from the encoder's, redshifts missing, or too few clusters.
    """
    start = _Start.of(config, folder, store)
    if start.info["units"] == "l-star" and not config.use_redshift:
        raise Pix2massError(
            f"{folder.path}: network 1 takes images in units 'l-star', which tell the redshift: train with "
            "--use-redshift, or pretrain with --units noise"
        )
    data = _Labelled(store, catalog, config.use_redshift)
    kind = "mock sky" if "log10_m500c_true" in catalog.colnames else "real observations"
    trained_on = places(store, data.rows)
    start.refuse_seen(data.ids, trained_on, kind)
    in_data = {cluster_id: index for index, cluster_id in enumerate(data.ids)}
    fold = np.array([fold[i] for i, cluster_id in enumerate(catalog["id"]) if str(cluster_id) in in_data], dtype=int)
    key = digest(
        name,
        _FORMAT,
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
    n_folds = int(fold.max()) + 1
    n_networks = n_folds if config.network == "bands" else 1
    table_path = folder / f"{name}-out-of-fold.ecsv"
    weights = [folder / f"fold-{k}.safetensors" for k in range(n_networks)]
    made = [folder / "model.json", *weights] if name == "train" else []
    if folder.is_done(name, key, table_path, *made):
        return QTable.read(table_path, format="ascii.ecsv")

    checkpoints = folder / "checkpoints" / f"{name}-{key}"
    checkpoints.mkdir(parents=True, exist_ok=True)
    empty = set(range(n_folds)) - set(fold.tolist())
    if empty:
        raise Pix2massError(f"fold {min(empty)} has no cluster with a mass and usable pixels; use fewer folds")
    with folder.stage(name, key) as facts:
        if name == "train":  # what an earlier training left must not be taken for this one's
            folder.remove_network2()
        train_folds = _train_bands if config.network == "bands" else _train_described
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
            blind_to_edges = config.network == "bands" and config.edge_probability == 0
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
                    "views": config.views if config.network == "bands" else 1,
                    "calibration": calibration.as_json(),
                    "shrinkage": Shrinkage.fit(
                        posterior.summary()["log10_m500c"], data.label, data.label_err
                    ).as_json(),
                    "training_prior": TrainingPrior.fit(data.label, data.label_err, data.z).as_json(),
                    "z_range": [float(data.z.min()), float(data.z.max())] if data.knows_z else None,
                    "label_range": [float(data.label.min()), float(data.label.max())],
                    # Simulated edges pass no further than the centre: about half of the image is always left. Networks
                    # that are not trained on them make up for masked area.
                    "min_coverage": min(1.0 if blind_to_edges else 0.5, float(covered.min())),
                    "prior": "the distribution of the training labels",
                    "reference": Reference.fit(statistics, data.z, as_predicted).as_json(),
                    "trained_on": kind,
                    # For those who start from this network.
                    "labels_seen": start.labels_with(trained_on, kind),
                    "images_seen": start.images_seen,
                },
            )
        facts["folds"] = n_folds
    shutil.rmtree(checkpoints, ignore_errors=True)
    return table


def _look(store: ImageStore, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Usable share of the pixels of each row (n,), and the statistics of its images (n, p)."""
    covered, statistics = [], []
    for i in range(0, len(rows), PREDICT_BATCH):
        flux, mask, noise = as_tensors(store, rows[i : i + PREDICT_BATCH])
        covered.append(1.0 - mask.float().mean(dim=(1, 2, 3)).double().numpy())
        statistics.append(image_statistics(prepare(flux, mask, noise)[0], mask, noise))
    return np.concatenate(covered), np.concatenate(statistics)


@dataclass(frozen=True)
class _Start:
    """What the training of network 2 starts from.

    Attributes:
        info: what model.json says of the network: ``network``, ``encoder``, ``units``, ``use_redshift``,
            ``ensemble_size`` and, where it starts from a whole network, ``started_from``, what that one was trained on.
        grid: of the images.
        weights: of the whole network 2, or of its encoder alone; None starts from random ones.
        whole: whether they are the whole network's, scaler included.
        key: digest of where they come from.
        labels_seen: what they are -> ``ra_deg``, ``dec_deg`` and ``z`` of the clusters whose labels have trained them.
        images_seen: ``ra_deg`` and ``dec_deg`` of the images that have trained the features; None where none are used.
    """

    info: dict[str, Any]
    grid: GridConfig
    weights: dict[str, Tensor] | None
    whole: bool
    key: str | None
    labels_seen: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    images_seen: dict[str, list[float]] | None = None

    @classmethod
    def of(cls, config: TrainConfig, folder: RunFolder, store: ImageStore) -> _Start:
        info: dict[str, Any] = {
            "network": config.network,
            "encoder": None,
            "units": "noise",
            "use_redshift": config.use_redshift,
            "ensemble_size": config.ensemble_size,
        }
        if config.start_from is not None:
            source = open_run(config.start_from)
            made = source.read_json("model.json")
            for name, mine in (("network", config.network), ("use_redshift", config.use_redshift)):
                if made.get(name, "bands") != mine:
                    raise Pix2massError(
                        f"{source.path}: its networks have {name} = {made.get(name, 'bands')!r}, this training asks "
                        f"for {mine!r}; start from another run or change {name}"
                    )
            _same_bands(made["bands"], store, f"{source.path}: its networks were")
            _same_grid(made["grid"], store, f"{source.path}: its networks were")
            weights = source.load_weights("fold-0")
            info |= {
                "encoder": made["encoder"],
                "units": made.get("units", "noise"),
                "ensemble_size": made.get("ensemble_size", 1),
                "started_from": f"{made['calibration']['n']} clusters, {made['trained_on']}",
            }
            seen = made.get("labels_seen", {}), made.get("images_seen")
            return cls(info, store.grid, weights, True, digest(_fingerprint(weights)), *seen)
        if config.network == "galaxies":
            return cls(info, store.grid, None, False, None)
        if config.from_scratch and not (folder / "pretrain.json").exists():
            return cls({**info, "encoder": PretrainConfig().encoder}, store.grid, None, False, None)
        pretrained = folder.read_json("pretrain.json")
        info |= {"encoder": pretrained["encoder"], "units": pretrained.get("units", "noise")}
        key = folder.stages.get("pretrain", {}).get("key")
        if config.from_scratch:
            return cls(info, store.grid, None, False, key)
        _same_bands(pretrained["bands"], store, f"{folder.path}: network 1 was")
        _same_grid(pretrained["grid"], store, f"{folder.path}: network 1 was")
        images = {name: pretrained[name] for name in ("ra_deg", "dec_deg")}
        return cls(info, store.grid, folder.load_weights("encoder"), False, key, images_seen=images)

    def labels_with(self, trained_on: dict[str, list[float]], kind: str) -> dict[str, dict[str, list[float]]]:
        """``labels_seen`` and those of one more training."""
        before = self.labels_seen.get(kind, {})
        both = {name: [*before.get(name, []), *values] for name, values in trained_on.items()}
        return {**self.labels_seen, kind: both}

    def refuse_seen(self, ids: np.ndarray, clusters: dict[str, list[float]], kind: str) -> None:
        """That no cluster has trained the weights before: its out-of-fold mass would come from a network that knows it,
        and no fold would tell.

        Raises:
            Pix2massError: some have.
        """
        seen = seen_before(clusters, self.labels_seen[kind], *_SAME[kind]) if kind in self.labels_seen else None
        if seen is not None and seen.any():
            raise Pix2massError(
                f"the network to start from was trained on {int(seen.sum())} of these {len(ids)} clusters "
                f"({', '.join(ids[seen][:5])}), so its masses of them are not out of fold: leave out start_from, or "
                "start from a network trained on other clusters, as that one was"
            )

    def regressor(self, seed: int) -> Regressor:
        """A network 2 with these weights, the others random."""
        torch.manual_seed(seed)
        regressor = make_regressor(self.info, self.grid)
        if self.weights is not None:
            try:
                (regressor if self.whole else regressor.encoder).load_state_dict(self.weights)
            except RuntimeError as error:
                raise Pix2massError(
                    f"encoder {self.info['encoder']!r} is no longer what network 1 was trained with; pretrain again "
                    f"({error})"
                ) from None
        return regressor


def _fingerprint(weights: dict[str, Tensor]) -> list[list[float]]:
    return [[*map(float, value.shape), float(value.double().sum())] for _, value in sorted(weights.items())]


def _same_bands(bands: str, store: ImageStore, whose: str) -> None:
    if bands != store.grid.bands:
        raise Pix2massError(
            f"{whose} trained on bands {bands!r}, {store.path} holds {store.grid.bands!r}; build the store with "
            f"--bands {bands} or train again"
        )


def _same_grid(made: dict[str, Any], store: ImageStore, whose: str) -> None:
    grid = validate(GridConfig, made, f"{whose} trained on a grid")
    if grid != store.grid:
        raise Pix2massError(
            f"{whose} trained on {describe(grid)}, {store.path} holds {describe(store.grid)}; build the store on that "
            "grid"
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


def _train_described(
    start: _Start,
    store: ImageStore,
    data: _Labelled,
    fold: np.ndarray,
    config: TrainConfig,
    seed: int,
    checkpoints: Path,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_train_bands`: the images are described once for all folds. The network that is kept, as ``fold-0.pt``,
    is fitted to all labels; those of the folds tell its errors."""

    def new() -> GalaxyRegressor | ProcessRegressor:
        regressor = start.regressor(seed)
        assert not isinstance(regressor, MassRegressor)
        return regressor.eval()

    keep_freed_memory()
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
        _keep(tuple(regressor.described_by.joined(parts, sizes)), kept)
    described: Any = regressor.described_by(*torch.load(kept, weights_only=True))
    z, label, label_err = (torch.tensor(v, dtype=torch.float32) for v in (data.z, data.label, data.label_err))
    mean, sigma = np.full(len(data), np.nan), np.full(len(data), np.nan)

    def fitted(k: int, train: Tensor) -> GalaxyRegressor | ProcessRegressor:
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
                for start in range(0, len(data), PREDICT_BATCH):
                    part = np.arange(start, min(start + PREDICT_BATCH, len(data)))
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
    flux, mask, noise = as_tensors(store, data.rows[part])
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
    fitted, validation = (part[indices] for indices in split(len(part), config.validation_share, seed))
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

    fit(
        regressor,
        step,
        loader(len(fitted), reader(fitted), config.batch_size, seed, config.processes),
        loader(len(validation), reader(validation), PREDICT_BATCH, None),
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
    for start in range(0, len(part), PREDICT_BATCH):
        chosen = part[start : start + PREDICT_BATCH]
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
