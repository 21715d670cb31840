"""Recipes and learning curves: every recipe is a valid run, a curve is what its points say."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from _toy import ToySource, toy_catalog

from pix2mass import pipeline
from pix2mass.config import GridConfig, PretrainConfig, RunConfig, TrainConfig, load_toml
from pix2mass.predict import Predictor
from pix2mass.run import RunFolder
from pix2mass.store import build
from pix2mass.train import pretrain

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_run_of_its_own_name(path):
    config = load_toml(RunConfig, path)
    assert config.name == path.stem and config.mock is not None
    if config.train.start_from:
        assert (path.parent / f"{config.train.start_from.name}.toml").exists()


def test_sizes_halve_down_to_the_least():
    assert pipeline._sizes(1000, 125) == [125, 250, 500, 1000]
    assert pipeline._sizes(100, 125) == [100]


def test_a_power_law_is_found_with_its_error():
    n = np.array([125, 250, 500, 1000])
    points = [{"n": int(k), "mae_dex": 0.3 * k**-0.2, "mae_err_dex": 0.003 * k**-0.2} for k in n]
    fit = pipeline._power_law(points)
    assert fit["slope"] == pytest.approx(-0.2) and 10 ** fit["intercept"] == pytest.approx(0.3)
    # Errors of 1% each: those of the slope by textbook, sigma / sqrt(sum (x - mean x)^2).
    x = np.log10(n)
    assert fit["slope_err"] == pytest.approx(0.01 / np.log(10) / np.sqrt(((x - x.mean()) ** 2).sum()))


def test_the_curve_of_a_run(tmp_path, monkeypatch):
    @contextmanager
    def quiet(_: str):
        yield lambda *_: None

    monkeypatch.setattr(pipeline, "_LEAST_LABELS", 25)
    monkeypatch.setattr("pix2mass.galaxies._STEPS", (200, 200))
    grid = GridConfig(bands="gri", n_pixels=16)
    catalog = toy_catalog(120, 5)
    catalog["richness"] = 40 * 10 ** (np.asarray(catalog["log10_m500c"]) - 14.5)
    store = build(catalog, ToySource(grid), tmp_path / "toy.zarr", grid)
    folder = RunFolder(tmp_path / "run")
    pipeline.train_run(folder, store.with_bands("gi"), catalog, TrainConfig(network="galaxies", folds=3), 1, quiet)
    found = pipeline.learning_curve(folder, store, 1, quiet)
    assert Predictor(folder / "learning-curve" / "labels-30").grid.bands == "gi", "the run's bands, not the store's"
    assert [point["n"] for point in found["labels"]] == [30, 60, 120] and found["unlabelled"] == []
    assert found["labels"][-1]["mae_dex"] < found["labels"][0]["mae_dex"]
    assert found["fit"]["labels"]["slope"] < 0
    # This richness is the label, so its mass errs as the labels do.
    scatter = np.abs(np.asarray(catalog["log10_m500c"]) - np.asarray(catalog["log10_m500c_true"])).mean()
    assert found["labels"][-1]["richness_mae_dex"] == pytest.approx(scatter, rel=1e-3)
    assert folder.read_json("learning_curve.json") == found


def test_the_curve_of_unlabelled_images_pretrains_anew_and_ends_at_the_run_itself(tmp_path, monkeypatch):
    @contextmanager
    def quiet(_: str):
        yield lambda *_: None

    monkeypatch.setattr(pipeline, "_LEAST_LABELS", 25)
    grid = GridConfig(bands="gr", n_pixels=16)
    catalog = toy_catalog(60, 5)
    store = build(catalog, ToySource(grid), tmp_path / "toy.zarr", grid)
    folder, pretraining = RunFolder(tmp_path / "run"), PretrainConfig(epochs=1)
    pretrain(store, folder, pretraining, 1)
    (folder / "config.toml").write_text("[pretrain]\nepochs = 1\n[train]\nepochs = 1\nfolds = 2\n")
    pipeline.train_run(folder, store, catalog, TrainConfig(epochs=1, folds=2), 1, quiet)
    found = pipeline.learning_curve(folder, store, 1, quiet, unlabelled=store)
    assert [point["n"] for point in found["unlabelled"]] == [30, 60]
    assert RunFolder.open(folder / "learning-curve" / "encoder-30").read_json("pretrain.json")["n_images"] == 30
    assert found["unlabelled"][-1] == found["labels"][-1], "both are the run itself"
    assert not (folder / "learning-curve" / "unlabelled-60").exists()
