"""One fit for both networks, in an order drawn from the seed and the epoch, that goes on where it was killed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from pix2mass.config import OptimConfig
from pix2mass.memory import keep_freed_memory
from pix2mass.store import ImageStore
from pix2mass.types import Pix2massError

Progress = Callable[[int, int], None]

PREDICT_BATCH = 64


class EpochSampler(Sampler):
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


def loader(
    n: int,
    read: Callable[[int, np.ndarray], dict[str, Any]],
    batch_size: int,
    seed: int | None,
    processes: int = 1,
) -> DataLoader:
    """Batches made by ``read(epoch, rows)``; in an order drawn from the seed, or as they are without one."""
    # A last batch of one image would give batch normalisation nothing to normalise.
    drop_last = seed is not None and n // processes > batch_size
    sampler = None if seed is None else EpochSampler(n, seed)
    return DataLoader(
        _Batches(n, read), batch_size, sampler=sampler, collate_fn=lambda batch: batch, drop_last=drop_last
    )


class Task(lightning.LightningModule):
    """A network with its loss. ``step`` gives the loss and the number of samples."""

    def __init__(
        self, network: nn.Module, step: Callable[[Any], tuple[Tensor, int]], config: OptimConfig, seed: int
    ) -> None:
        super().__init__()
        self.network, self.config, self.seed = network, config, seed
        self._step = step

    def training_step(self, batch: Any, index: int) -> Tensor:
        # Dropout must not depend on what ran before, or a resumed training would differ from an undisturbed one.
        seed = (self.seed * 10_007 + self.current_epoch) * 10_007 + index
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # manual_seed takes 2 ms to seed devices that are not there
        else:
            torch.manual_seed(seed)
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


def fit(
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
    keep_freed_memory()
    task = Task(network.train(), step, config, seed)
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
        resume = str(last) if config.num_nodes == 1 and is_whole(last) else None
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


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is there and was not cut off by a kill while it was written; if it was, start over."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # zip, pickle and file errors all mean the same: not whole
        return False
    return True


def split(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random training and validation indices."""
    order = np.random.default_rng([seed, 77]).permutation(n)
    n_validation = min(n - 1, max(1, round(share * n)))
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])


def as_tensors(store: ImageStore, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Flux and mask (n, n_bands, h, w) and noise (n, n_bands) of some rows, as ``model.prepare`` takes them."""
    flux, mask = store.batch(rows)
    return torch.from_numpy(flux), torch.from_numpy(mask), torch.from_numpy(store.noise[rows])
