"""Several processes that train together do what one process does with their batches put together."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from pix2mass.config import OptimConfig
from pix2mass.train.fit import fit, loader


def curve(folder: Path, config: OptimConfig) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Loss of each step, mean over the processes, and the final network: no batch statistics, no augmentation."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    images = rng.standard_normal((48, 2, 8, 8)).astype(np.float32)
    target = torch.tensor(images.mean(axis=(1, 2, 3)) * 20)
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)
    )

    def read(epoch: int, rows: np.ndarray) -> dict[str, Tensor]:
        return {"images": torch.from_numpy(images[rows]), "target": target[rows]}

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        loss = ((network(batch["images"])[:, 0] - batch["target"]) ** 2).mean()
        if network.training:
            rank = distributed.get_rank() if distributed.is_initialized() else 0
            with (folder / f"losses-{rank}").open("a") as file:
                file.write(f"{os.getpid()} {loss.item()}\n")
        return loss, len(batch["target"])

    train = loader(40, read, config.batch_size, 7, config.processes)
    validation = loader(8, lambda epoch, rows: read(epoch, rows + 40), 8, None)
    fit(network, step, train, validation, config, 3, 7, folder / "checkpoints", None)
    lines = [path.read_text().split() for path in sorted(folder.glob("losses-*"))]
    assert len(lines) == config.processes == len({line[0] for line in lines})
    return np.mean([np.array(line[1::2], float) for line in lines], axis=0), network.state_dict()


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    one = OptimConfig(batch_size=16, accelerator="cpu")
    two = OptimConfig(batch_size=8, accelerator="cpu", devices=2)
    (alone, before), (together, after) = curve(tmp_path / "one", one), curve(tmp_path / "two", two)
    assert len(alone) == 3 * (40 // 16) and alone[-1] < alone[0]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-5)


def test_settings_reach_the_trainer(tmp_path, monkeypatch):
    import lightning.pytorch as lightning

    seen = {}

    def trainer(**settings):
        seen.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(lightning, "Trainer", trainer)
    config = OptimConfig(devices=2, num_nodes=3, precision="bf16-mixed", accelerator="cpu")
    batches = loader(4, lambda epoch, rows: {}, 2, 1)
    with pytest.raises(KeyboardInterrupt):
        fit(nn.Linear(1, 1), lambda batch: (torch.zeros(()), 1), batches, batches, config, 1, 1, tmp_path, None)
    assert (seen["devices"], seen["num_nodes"], seen["precision"]) == (2, 3, "bf16-mixed")
