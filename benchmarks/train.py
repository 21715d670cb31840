"""Claim: pretraining and fine-tuning run at 0.9 of the speed of a bare loop of the same network on data in memory.

Run: python benchmarks/train.py [--clusters 1000] [--epochs 3] [--rounds 3] [--n-pixels 64]

Synthetic pixels. The product reads its store, augments, validates and keeps checkpoints; the bare loop has its batches
as tensors, ready for the network, and does forward, backward, clipping and step, and the same validation. Both take
turns; an epoch's time is the median over rounds, the first epoch of each training left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _synthetic import Synthetic, synthetic_catalog
from torch import Tensor, nn
from torch.nn import functional as F

from pix2mass.catalog import check_catalog
from pix2mass.config import GridConfig, PretrainConfig, TrainConfig
from pix2mass.model import BandClassifier, Encoder, make_regressor, negative_log_likelihood, prepare
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore, build
from pix2mass.train import pretrain, train


class Clock:
    """Notes when epochs end."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, *_: int) -> None:
        self.at.append(time.perf_counter())

    def epochs(self, per_training: int) -> list[float]:
        """Seconds of each epoch but the first of each training."""
        at = np.array(self.at[: len(self.at) // per_training * per_training]).reshape(-1, per_training)
        return np.diff(at, axis=1).ravel().tolist()


def bare(
    network: nn.Module,
    step: Callable[[list[Tensor]], Tensor],
    data: list[Tensor],
    n_train: int,
    batch: int,
    epochs: int,
) -> list[float]:
    """Seconds of each epoch but the first of a loop with nothing around it."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    order, clock = np.random.default_rng(0).permutation(len(data[0])), Clock()
    for _ in range(epochs):
        network.train()
        for start in range(0, n_train - batch + 1, batch):
            rows = order[start : start + batch]
            optimizer.zero_grad()
            step([values[rows] for values in data]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        network.eval()
        with torch.no_grad():
            for start in range(n_train, len(order), 64):
                step([values[order[start : start + 64]] for values in data])
        clock()
    return clock.epochs(epochs)


def pretraining(store: ImageStore, work: Path, config: PretrainConfig, round_: int) -> tuple[list[float], list[float]]:
    """Seconds per epoch of the product and of the bare loop."""
    clock = Clock()
    pretrain(store, RunFolder(work / f"pretrain-{round_}"), config, round_, progress=clock)
    images, _ = prepare(*_pixels(store))
    band = torch.arange(images.shape[1]).repeat(len(images), 1)
    network = BandClassifier(Encoder(config.encoder), images.shape[1])

    def step(batch: list[Tensor]) -> Tensor:
        single, answer = batch
        return F.cross_entropy(network(single.flatten(0, 1)[:, None]), answer.flatten())

    n_train = len(images) - round(config.validation_share * len(images))
    cutouts = max(1, config.batch_size // images.shape[1])
    return clock.epochs(config.epochs), bare(network, step, [images, band], n_train, cutouts, config.epochs)


def finetuning(
    store: ImageStore, catalog: Any, work: Path, config: TrainConfig, round_: int
) -> tuple[list[float], list[float]]:
    """The same of network 2, all its weights free; one of the product's folds against the bare loop."""
    clock, folder = Clock(), RunFolder(work / f"pretrain-{round_}")
    # The call that tells the end of a fold comes right after its last epoch's.
    told: set[int] = set()

    def progress(done: int, total: int) -> None:
        if done not in told:
            clock()
        told.add(done)

    fold = np.arange(len(store)) % config.folds
    train(store, catalog, fold, folder, config, round_, f"speed-{round_}", progress)
    flux, mask, noise = _pixels(store)
    images, valid = prepare(flux, mask, noise)
    z = torch.tensor(store.z, dtype=torch.float32)
    info = {"encoder": "small", "use_redshift": True}
    network = make_regressor(info, store.grid)
    label = torch.tensor(np.asarray(catalog["log10_m500c"]), dtype=torch.float32)
    part = len(store) - len(store) // config.folds
    data = [network.rescale(images, noise, z)[:part], valid[:part], z[:part], label[:part]]

    def step(batch: list[Tensor]) -> Tensor:
        images, valid, z, label = batch
        mean, sigma = network(images, valid, z)
        return negative_log_likelihood(mean, sigma, label, torch.full_like(label, 0.12))

    n_train = part - round(config.validation_share * part)
    return clock.epochs(config.epochs), bare(network, step, data, n_train, config.batch_size, config.epochs)


def _pixels(store: ImageStore) -> tuple[Tensor, Tensor, Tensor]:
    flux, mask = store.batch(np.arange(len(store)))
    return torch.from_numpy(flux), torch.from_numpy(mask), torch.from_numpy(store.noise)


def main() -> None:
    """Time both trainings against their bare loops, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-pixels", type=int, default=64)
    options = parser.parse_args()
    n, epochs = options.clusters, options.epochs
    grid = GridConfig(n_pixels=options.n_pixels)
    first = PretrainConfig(epochs=epochs, patience=epochs, accelerator="cpu")
    second = TrainConfig(epochs=epochs, patience=epochs, folds=2, freeze_encoder=False, accelerator="cpu")
    times: dict[str, tuple[list[float], list[float]]] = {"pretraining": ([], []), "fine-tuning": ([], [])}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        catalog = check_catalog(synthetic_catalog(n, (0.1, 0.4), 1), "synthetic")
        store = build(catalog, Synthetic(grid), work / "synthetic.zarr", grid)
        for round_ in range(options.rounds):
            for name, found in (
                ("pretraining", pretraining(store, work, first, round_)),
                ("fine-tuning", finetuning(store, catalog, work, second, round_)),
            ):
                for kept, seconds in zip(times[name], found, strict=True):
                    kept += seconds
    n_trained = n - round(first.validation_share * n)
    n_tuned = n // 2 - round(second.validation_share * (n // 2))
    per_epoch = {
        "pretraining": n_trained // (first.batch_size // 5) * (first.batch_size // 5) * 5,
        "fine-tuning": n_tuned // second.batch_size * second.batch_size,
    }
    print(
        f"{'':<12} {'unit':<9} {'product':>9} {'bare loop':>9}  ratio   per second, {torch.get_num_threads()} threads"
    )
    ratios, rates = {}, {}
    for name, unit in (("pretraining", "images"), ("fine-tuning", "clusters")):
        product, loop = (per_epoch[name] / np.median(seconds) for seconds in times[name])
        ratios[name], rates[name] = product / loop, product
        print(f"{name:<12} {unit:<9} {product:9.1f} {loop:9.1f}  {ratios[name]:.2f}")
    print(
        json.dumps(
            {
                "ratio_to_bare_loop": min(ratios.values()),
                "ratio_pretraining": ratios["pretraining"],
                "ratio_fine_tuning": ratios["fine-tuning"],
                "images_per_s": rates["pretraining"],
                "clusters_per_s": rates["fine-tuning"],
                "n_pixels": options.n_pixels,
                "clusters": n,
            }
        )
    )


if __name__ == "__main__":
    main()
