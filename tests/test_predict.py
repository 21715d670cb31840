"""Prediction needs the run folder and images, nothing else, and says when not to trust it."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from _toy import ToySource, toy_catalog

import pix2mass
from pix2mass.config import GridConfig, PretrainConfig, TrainConfig
from pix2mass.distribute import open_workers
from pix2mass.predict import Predictor, as_estimates, predict
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore, build
from pix2mass.train import pretrain, train
from pix2mass.types import Flag, Pix2massError

GRID = GridConfig(bands="gri", n_pixels=16)
NEEDED = ("model.json", "provenance.json", "stages.json", "fold-0.safetensors", "fold-1.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("trained") / "run")
    catalog = toy_catalog(120, 1)
    store = build(catalog, ToySource(GRID), folder.path.parent / "toy.zarr", GRID)
    pretrain(store, folder, PretrainConfig(epochs=1, accelerator="cpu"), 1)
    config = TrainConfig(epochs=30, folds=2, batch_size=16, views=2, accelerator="cpu")
    train(store, catalog, np.arange(120) % 2, folder, config, 1)
    folder.write_provenance(1)
    return folder


@pytest.fixture(scope="module")
def new_store(tmp_path_factory) -> ImageStore:
    catalog = toy_catalog(12, 8, "new")
    ids = catalog["id"].tolist()
    ids[3] = "outside-3"
    catalog["id"] = ids
    catalog["z"][5] = 0.9
    return build(catalog, ToySource(GRID), tmp_path_factory.mktemp("new") / "new.zarr", GRID)


def test_masses_of_new_clusters(run, new_store):
    table = predict(run, new_store)
    true = np.asarray(toy_catalog(12, 8, "new")["log10_m500c_true"])
    trusted = np.asarray(table["flags"]) == 0
    low, high = run.read_json("model.json")["z_range"]
    inside = (table["z"] >= low) & (table["z"] <= high)
    inside[3] = False  # no pixels
    np.testing.assert_array_equal(trusted, inside)
    assert trusted.sum() >= 8
    assert np.abs(table["log10_m500c"] - true)[trusted].mean() < 0.15
    assert (np.diff([table[name][trusted] for name in ("q025", "q16", "q50", "q84", "q975")], axis=0) > 0).all()
    np.testing.assert_allclose((table["q84"] - table["q16"])[trusted] / 2, table["log10_m500c_err"][trusted], rtol=0.01)
    assert table.meta["mass_definition"] == "500c" and table.meta["trained_on"] == "mock sky"


@pytest.mark.slow
def test_several_processes_give_the_same_table(run, new_store, monkeypatch):
    module = sys.modules["pix2mass.predict"]  # by attribute the package gives the function
    monkeypatch.setattr(module, "_BATCH", 3)
    monkeypatch.setattr(module, "_BATCHES_PER_TASK", 1)
    seen = []
    alone = predict(run, new_store, lambda done, total: seen.append((done, total)))
    with open_workers(2) as workers:
        together = predict(run, new_store, workers=workers)
    assert seen == [(3, 12), (6, 12), (9, 12), (12, 12)]
    assert together.colnames == alone.colnames and together.meta == alone.meta
    for name in alone.colnames:
        np.testing.assert_array_equal(together[name], alone[name])


def test_flags_say_what_not_to_trust(run, new_store):
    table = predict(run, new_store)
    assert np.isnan(table["log10_m500c"][3])
    assert table["flag_names"][3] == "OUTSIDE|LOW_COVERAGE|NO_ESTIMATE"
    assert table["flag_names"][5] == "REDSHIFT_EXTRAPOLATED" and np.isfinite(table["log10_m500c"][5])
    estimates = as_estimates(table)
    assert estimates[3].flags == Flag.OUTSIDE | Flag.LOW_COVERAGE | Flag.NO_ESTIMATE
    assert estimates[0].quantiles[2] == pytest.approx(estimates[0].log10_m500c)


def test_another_folder_with_only_the_needed_files(run, new_store, tmp_path):
    (tmp_path / "copied").mkdir()
    for name in NEEDED:
        shutil.copy(run / name, tmp_path / "copied" / name)
    here, there = predict(run, new_store), pix2mass.predict(tmp_path / "copied", new_store.path)
    np.testing.assert_array_equal(here["log10_m500c"], there["log10_m500c"])


def test_a_cluster_alone_gets_the_same_mass(run, new_store, tmp_path):
    together = predict(run, new_store)
    catalog = toy_catalog(12, 8, "new")[4:5]
    alone = predict(run, build(catalog, ToySource(GRID), tmp_path / "one.zarr", GRID))
    assert len(alone) == 1
    assert alone["log10_m500c"][0] == pytest.approx(together["log10_m500c"][4], abs=1e-5)


def test_refuses_stores_it_was_not_made_for(run, tmp_path):
    for grid, message in (
        (GridConfig(bands="gr", n_pixels=16), "holds bands 'gr'.*trained on 'gri'.*--bands gri"),
        (GridConfig(bands="gri", n_pixels=32), "another pixel grid"),
        (GridConfig(bands="gri", n_pixels=16, width_arcsec=60), "another pixel grid"),
    ):
        store = build(
            toy_catalog(2, 9), ToySource(grid), tmp_path / f"{grid.bands}{grid.n_pixels}{grid.width_kpc}", grid
        )
        with pytest.raises(Pix2massError, match=message):
            predict(run, store)
    catalog = toy_catalog(3, 10)
    catalog["z"][1] = np.nan
    store = build(catalog, ToySource(GRID), tmp_path / "noz.zarr", GRID)
    with pytest.raises(Pix2massError, match="1 clusters have no redshift.*toy-1"):
        predict(run, store)


def test_broken_runs_say_what_is_broken(run, tmp_path):
    with pytest.raises(Pix2massError, match="no run here"):
        Predictor(tmp_path / "none")
    shutil.copytree(run.path, tmp_path / "run")
    weights = tmp_path / "run" / "fold-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(Pix2massError, match="fold-1.safetensors: broken weights"):
        Predictor(tmp_path / "run")
    weights.unlink()
    with pytest.raises(Pix2massError, match="no such weights"):
        Predictor(tmp_path / "run")
    shutil.copy(run / "fold-1.safetensors", weights)
    info = RunFolder(tmp_path / "run").read_json("model.json")
    RunFolder(tmp_path / "run").write_json("model.json", {**info, "bands": "gr"})
    with pytest.raises(Pix2massError, match="does not fit model.json"):
        Predictor(tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text("{")
    with pytest.raises(Pix2massError, match="broken file"):
        Predictor(tmp_path / "run")
