"""Attribution maps against answers worked out by hand, and against a trained network."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _toy import ToySource, toy_catalog

from pix2mass.config import GridConfig, PretrainConfig, TrainConfig
from pix2mass.explain import attribute, explain
from pix2mass.model import combine
from pix2mass.run import RunFolder
from pix2mass.store import build
from pix2mass.train import pretrain, train
from pix2mass.types import Pix2massError


class HandMade(torch.nn.Module):
    """Feature map = 2 x pixel, per band; mass = 14 + sum over bands and pixels of weight x feature."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.encoder = SimpleNamespace(taps=torch.nn.ModuleList([torch.nn.Identity()]))
        self.tap = self.encoder.taps[0]

    def forward(self, images, valid, z):
        n, n_bands, h, w = images.shape
        features = self.tap(2.0 * images.reshape(n * n_bands, 1, h, w)).reshape(n, n_bands, h, w)
        return 14.0 + (features * self.weight).sum(dim=(1, 2, 3)), torch.ones(n)


def hand_made(*weights: torch.Tensor) -> SimpleNamespace:
    regressors = [HandMade(weight) for weight in weights]

    def estimate(images, valid, z):
        results = [regressor(images, valid, z) for regressor in regressors]
        return combine(*(torch.stack(values) for values in zip(*results, strict=True)))

    return SimpleNamespace(regressors=regressors, estimate=estimate)


def test_maps_of_a_linear_network_worked_by_hand():
    images = torch.tensor([[[[1.0, 0.0], [-1.0, 3.0]], [[0.0, 2.0], [0.0, 1.0]]]])
    weight = torch.tensor([[[0.1, 0.1], [0.1, 0.1]], [[-0.2, -0.2], [-0.2, -0.2]]])
    maps = attribute(hand_made(weight), images, torch.ones(1, 2, 2), torch.tensor([0.2]), steps=8)
    # Mass = 14 + 2 x (0.1 x 3 - 0.2 x 3) = 13.4; integrated gradients of a linear network are 2 x weight x pixel.
    assert maps["log10_m500c"] == pytest.approx(13.4, abs=1e-5)
    assert maps["log10_m500c_blank_sky"] == pytest.approx(14.0, abs=1e-6)
    np.testing.assert_allclose(maps["integrated_gradients"], (2 * weight * images[0]).numpy(), atol=1e-6)
    assert maps["integrated_gradients"].sum() == pytest.approx(13.4 - 14.0, abs=1e-5)
    # Grad-CAM: mean gradient of each band's feature map (0.1 and -0.2) times the map (2 x pixel), summed over bands.
    cam = 0.1 * 2 * images[0, 0] - 0.2 * 2 * images[0, 1]
    np.testing.assert_allclose(maps["cam"], cam.numpy(), atol=1e-6)
    joint = (2 * weight * images[0]).sum(dim=0) * cam.abs() / cam.abs().max()
    np.testing.assert_allclose(maps["joint"], joint.numpy(), atol=1e-6)
    assert maps["completeness_error_dex"] < 1e-5


def test_two_networks_are_averaged():
    images = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    weights = [torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.3)]
    maps = attribute(hand_made(*weights), images, torch.ones(1, 4, 4), torch.tensor([0.2]), steps=4)
    np.testing.assert_allclose(maps["integrated_gradients"], 2 * 0.2 * images[0].numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    grid = GridConfig(bands="gri", n_pixels=16)
    folder = RunFolder(tmp_path_factory.mktemp("trained") / "run")
    catalog = toy_catalog(60, 1)
    ids = catalog["id"].tolist()
    ids[:2] = ["outside-0", "../up/and away"]
    catalog["id"] = ids
    store = build(catalog, ToySource(grid), folder.path.parent / "toy.zarr", grid)
    pretrain(store, folder, PretrainConfig(epochs=1, accelerator="cpu"), 1)
    train(store, catalog, np.arange(60) % 2, folder, TrainConfig(epochs=20, folds=2, views=1, accelerator="cpu"), 1)
    return folder, store, catalog


def test_maps_of_a_trained_network_find_the_blob(trained):
    folder, store, catalog = trained
    heavy = str(catalog["id"][np.argmax(catalog["log10_m500c_true"])])
    (path,) = explain(folder, store, [heavy], steps=64)
    with np.load(path, allow_pickle=False) as maps:
        difference = float(maps["log10_m500c"] - maps["log10_m500c_blank_sky"])
        assert maps["integrated_gradients"].sum() == pytest.approx(difference, abs=0.05 * abs(difference) + 0.01)
        y, x = np.mgrid[:16, :16] - 7.5
        inside = np.hypot(x, y) < 5
        share = np.abs(maps["joint"])[inside].sum() / np.abs(maps["joint"]).sum()
        assert share > 2 * inside.mean(), "the blob in the middle carries the mass"
        assert str(maps["id"]) == heavy and str(maps["bands"]) == "gri"


def test_ids_do_not_leave_the_folder_and_blank_cutouts_are_refused(trained):
    folder, store, _ = trained
    (path,) = explain(folder, store, ["../up/and away"], steps=2)
    assert path.parent == folder / "maps" and path.exists()
    with pytest.raises(Pix2massError, match="outside-0: the cutout has no usable pixels"):
        explain(folder, store, ["outside-0"])
    with pytest.raises(Pix2massError, match="not in the store: nobody"):
        explain(folder, store, ["nobody"])
