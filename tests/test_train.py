"""Training: it learns what is there, nothing leaks, and kills and seeds do what they should."""

from __future__ import annotations

import importlib
import linecache
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _toy import ToySource, toy_catalog
from astropy.table import QTable
from torch._subclasses.fake_tensor import FakeTensorMode

from pix2mass.calibrate import Shrinkage
from pix2mass.config import GridConfig, PretrainConfig, TrainConfig
from pix2mass.model import Encoder
from pix2mass.predict import Predictor, predict
from pix2mass.run import RunFolder
from pix2mass.scale import PhysicalScale
from pix2mass.store import ImageStore, build
from pix2mass.train import (
    RichnessBlend,
    band_confusion,
    leave_one_group_out,
    load_encoder,
    pretrain,
    seen_before,
    train,
)
from pix2mass.train.fit import EpochSampler, is_whole
from pix2mass.types import Flag, Pix2massError

GRID = GridConfig(bands="gri", n_pixels=16)
PRETRAIN = PretrainConfig(epochs=3, batch_size=24, accelerator="cpu")
TRAIN = TrainConfig(epochs=4, folds=3, batch_size=16, views=2, accelerator="cpu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    catalog = toy_catalog(90, 1)
    return catalog, build(catalog, ToySource(GRID), folder / "toy.zarr", GRID)


@pytest.fixture(scope="module")
def pretrained(toy, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("run") / "toy")
    pretrain(toy[1], folder, PRETRAIN, 1)
    return folder


def copy(folder: RunFolder, to: Path) -> RunFolder:
    shutil.copytree(folder.path, to)
    return RunFolder(to)


def folds(n: int, k: int = 3) -> np.ndarray:
    return np.arange(n) % k


def test_bands_are_told_apart_by_what_is_in_the_image(pretrained, toy):
    info = pretrained.read_json("pretrain.json")
    assert info["band_accuracy"] > 0.6, "blobs of three widths and brightnesses are easy"
    assert np.sum(info["band_confusion"]) == 3 * round(0.15 * 90)
    assert info["tested_on"] == "validation share"


def test_the_noise_level_does_not_betray_the_band(tmp_path):
    source = ToySource(GRID, band_noise={"u": 1, "g": 0.1, "r": 1.0, "i": 30.0, "z": 1}, blobs=False)
    store = build(toy_catalog(90, 2), source, tmp_path / "noise.zarr", GRID)
    test = build(toy_catalog(200, 3), source, tmp_path / "test.zarr", GRID)
    folder = RunFolder(tmp_path / "run")
    pretrain(store, folder, PRETRAIN, 1, test)
    accuracy = folder.read_json("pretrain.json")["band_accuracy"]
    assert abs(accuracy - 1 / 3) < 4 * np.sqrt(1 / 3 * 2 / 3 / 600)


def test_leaving_groups_out(pretrained, toy, tmp_path):
    folder = copy(pretrained, tmp_path / "run")
    results = leave_one_group_out(toy[1], folder, PRETRAIN, 1)
    assert sorted(results) == ["field-0", "field-1", "field-2"]
    assert all(result["n"] == 30 and np.sum(result["band_confusion"]) == 90 for result in results.values())
    stages = folder.stages
    leave_one_group_out(toy[1], folder, PRETRAIN, 1)
    assert folder.stages == stages, "finished groups are not trained again"
    single = toy_catalog(10, 4)
    single["group"] = ["one"] * 10
    store = build(single, ToySource(GRID), tmp_path / "single.zarr", GRID)
    with pytest.raises(Pix2massError, match="at least two groups"):
        leave_one_group_out(store, folder, PRETRAIN, 1)


def test_frozen_means_frozen_and_free_means_free(pretrained, toy, tmp_path):
    catalog, store = toy
    encoder = pretrained.load_weights("encoder")
    for freeze in (True, False):
        folder = copy(pretrained, tmp_path / str(freeze))
        train(store, catalog, folds(90), folder, TRAIN.model_copy(update={"freeze_encoder": freeze}), 1)
        weights = folder.load_weights("fold-0")
        same = {name: torch.equal(value, weights[f"encoder.{name}"]) for name, value in encoder.items()}
        if freeze:
            assert all(same.values())
        else:
            moved = [name for name in same if name.endswith(("weight", "running_mean"))]
            assert len(moved) >= 12 and not any(same[name] for name in moved)


def test_frozen_features_are_computed_once(pretrained, toy, tmp_path, monkeypatch):
    catalog, store = toy
    seen = []
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, image: (seen.append(len(image)), forward(self, image))[1])
    train(store, catalog, folds(90), copy(pretrained, tmp_path / "run"), TRAIN, 1)
    assert sum(seen) == 3 * (1 + 90 * TRAIN.views)  # one cluster asks for the shapes


def test_same_seed_same_numbers(pretrained, toy, tmp_path):
    catalog, store = toy
    tables = [
        train(store, catalog, folds(90), copy(pretrained, tmp_path / name), TRAIN, seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    masses = [np.asarray(table["log10_m500c"]) for table in tables]
    np.testing.assert_array_equal(masses[0], masses[1])
    assert not np.allclose(masses[0], masses[2])


@pytest.mark.parametrize("freeze", [True, False])
def test_a_killed_training_ends_where_an_undisturbed_one_does(pretrained, toy, tmp_path, freeze):
    catalog, store = toy
    config = TRAIN.model_copy(update={"freeze_encoder": freeze})
    calm = train(store, catalog, folds(90), copy(pretrained, tmp_path / "calm"), config, 1)
    folder = copy(pretrained, tmp_path / "killed")
    for last in (2, 5, 6):  # within the first fold, within the second, at its next epoch

        def kill(done: int, total: int, last: int = last) -> None:
            if done == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(store, catalog, folds(90), folder, config, 1, progress=kill)
    steps = []
    resumed = train(store, catalog, folds(90), folder, config, 1, progress=lambda done, total: steps.append(done))
    # The first fold is finished (4 epochs of 12), the second goes on after its second epoch.
    assert steps[0] == 4 and steps[1] >= 6
    np.testing.assert_array_equal(calm["log10_m500c"], resumed["log10_m500c"])
    for fold in range(3):
        for name, value in RunFolder(tmp_path / "calm").load_weights(f"fold-{fold}").items():
            assert torch.equal(value, folder.load_weights(f"fold-{fold}")[name]), name


def test_a_killed_pretraining_ends_where_an_undisturbed_one_does(pretrained, toy, tmp_path):
    folder = RunFolder(tmp_path / "killed")

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(toy[1], folder, PRETRAIN, 1, progress=kill)
    pretrain(toy[1], folder, PRETRAIN, 1)
    for name, value in pretrained.load_weights("encoder").items():
        assert torch.equal(value, folder.load_weights("encoder")[name]), name
    assert not (folder / "checkpoints").exists() or not list((folder / "checkpoints").rglob("*.ckpt"))


def test_the_test_part_does_not_reach_its_own_network(pretrained, toy, tmp_path):
    catalog, store = toy
    changed = catalog.copy()
    test = folds(90) == 0
    changed["log10_m500c"][test] = 15.9
    weights = []
    for name, table in (("a", catalog), ("b", changed)):
        folder = copy(pretrained, tmp_path / name)
        train(store, table, folds(90), folder, TRAIN, 1)
        weights.append([folder.load_weights(f"fold-{k}") for k in range(3)])
    assert all(torch.equal(value, weights[1][0][name]) for name, value in weights[0][0].items())
    assert not torch.equal(weights[0][1]["label_mean"], weights[1][1]["label_mean"])


def test_masses_are_recovered_and_shuffled_labels_teach_nothing(pretrained, toy, tmp_path):
    catalog, store = toy
    folder = copy(pretrained, tmp_path / "run")
    config = TRAIN.model_copy(update={"epochs": 25})
    table = train(store, catalog, folds(90), folder, config, 1)
    true = np.asarray(catalog["log10_m500c_true"])
    error = np.abs(table["log10_m500c"] - true).mean()
    constant = np.abs(true - true.mean()).mean()
    assert error < 0.4 * constant
    null = catalog.copy()
    null["log10_m500c"] = np.random.default_rng(1).permutation(null["log10_m500c"])
    before = sorted(path.name for path in folder.path.glob("fold-*")), folder.read_json("model.json")
    shuffled = train(store, null, folds(90), folder, config, 1, "null")
    assert np.abs(shuffled["log10_m500c"] - true).mean() > 0.8 * constant
    assert (sorted(path.name for path in folder.path.glob("fold-*")), folder.read_json("model.json")) == before


def test_changed_inputs_are_trained_on_and_a_stopped_retraining_leaves_nothing_mixed(pretrained, toy, tmp_path):
    catalog, store = toy
    folder = copy(pretrained, tmp_path / "run")
    first = np.asarray(train(store, catalog, folds(90), folder, TRAIN, 1)["log10_m500c"])
    for name in ("z", "log10_m500c_err"):
        changed = catalog.copy()
        changed[name] = np.asarray(catalog[name])[::-1] + 0.01
        again = np.asarray(train(store, changed, folds(90), folder, TRAIN, 1)["log10_m500c"])
        assert not np.allclose(first, again), name

    def kill(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    lighter = catalog.copy()
    lighter["log10_m500c"] -= 1.0
    with pytest.raises(KeyboardInterrupt):
        train(store, lighter, folds(90), folder, TRAIN, 1, progress=kill)
    with pytest.raises(Pix2massError, match="training has not finished"):
        Predictor(folder)
    assert not list(folder.path.glob("fold-*"))


def test_clusters_seen_before_are_told_by_position_and_redshift():
    here = {"ra_deg": [10.0, 359.999, 200.0, 50.0], "dec_deg": [0.0, 0.0, 60.0, 5.0], "z": [0.2, 0.3, 0.4, np.nan]}
    there = {"ra_deg": [10.01, 0.001, 50.0], "dec_deg": [0.0, 0.0, 5.0], "z": [0.2, 0.31, 0.1]}
    assert seen_before(here, there).tolist() == [True, True, False, True]
    assert seen_before(here, there, 20.0, 0.05).tolist() == [False, True, False, True], "no redshift: by position"
    assert seen_before(here, there, 60.0, 0.005).tolist() == [True, False, False, True]
    assert not seen_before(here, {"ra_deg": [], "dec_deg": []}).any()


def test_another_network_1_takes_network_2_of_the_old_one_away(pretrained, toy, tmp_path):
    folder, lines = copy(pretrained, tmp_path / "run"), []
    folder.announce = lines.append
    train(toy[1], toy[0], folds(90), folder, TRAIN.model_copy(update={"epochs": 1}), 1)
    pretrain(toy[1], folder, PRETRAIN, 1)
    assert (folder / "fold-0.safetensors").exists(), "the same network 1"
    pretrain(toy[1], folder, PRETRAIN.model_copy(update={"epochs": 1}), 5)
    assert not (folder / "fold-0.safetensors").exists() and not (folder / "model.json").exists()
    assert "train again" in lines[-1]
    with pytest.raises(Pix2massError, match="training has not finished"):
        Predictor(folder)


def test_a_fold_without_clusters_is_named(pretrained, toy, tmp_path):
    catalog, store = toy
    fold = np.where(folds(90) == 1, 2, folds(90))
    with pytest.raises(Pix2massError, match="fold 1 has no cluster"):
        train(store, catalog, fold, copy(pretrained, tmp_path / "run"), TRAIN, 1)


def test_an_encoder_that_cannot_take_the_images_is_refused(toy, tmp_path):
    config = PRETRAIN.model_copy(update={"encoder": "vit_tiny_patch16_224"})
    with pytest.raises(Pix2massError, match="vit_tiny_patch16_224.* 16 x 16 pixels.*resnet18"):
        pretrain(toy[1], RunFolder(tmp_path / "run"), config, 1)


def test_from_scratch_needs_no_network_1(toy, tmp_path):
    config = TRAIN.model_copy(update={"freeze_encoder": False, "from_scratch": True, "epochs": 1})
    table = train(toy[1], toy[0], folds(90), RunFolder(tmp_path / "run"), config, 1)
    assert np.isfinite(table["log10_m500c"]).all()


def test_from_scratch_uses_no_pretrained_weights(pretrained, toy, tmp_path):
    catalog, store = toy
    config = TRAIN.model_copy(update={"freeze_encoder": False, "from_scratch": True, "epochs": 1})
    masses = []
    for name in ("a", "b"):
        folder = copy(pretrained, tmp_path / name)
        if name == "b":
            state = folder.load_weights("encoder")
            folder.save_weights("encoder", {key: torch.zeros_like(value) for key, value in state.items()})
        masses.append(np.asarray(train(store, catalog, folds(90), folder, config, 1)["log10_m500c"]))
    np.testing.assert_array_equal(*masses)


def test_refuses_other_bands_and_missing_redshifts(pretrained, toy, tmp_path):
    catalog, store = toy
    grid = GridConfig(bands="gr", n_pixels=16)
    other = build(toy_catalog(12, 5), ToySource(grid), tmp_path / "gr.zarr", grid)
    folder = copy(pretrained, tmp_path / "run")
    with pytest.raises(Pix2massError, match="trained on bands 'gri'.*holds 'gr'"):
        train(other, toy_catalog(12, 5), folds(12), folder, TRAIN, 1)
    with pytest.raises(Pix2massError, match="'gri'.*'gr'"):
        pretrain(store, folder, PRETRAIN, 2, other)
    missing = catalog.copy()
    missing["z"][3] = np.nan
    with pytest.raises(Pix2massError, match="toy-3.*no-use-redshift"):
        train(store, missing, folds(90), folder, TRAIN, 1)
    with pytest.raises(Pix2massError, match="has not finished"):
        train(store, catalog, folds(90), RunFolder(tmp_path / "empty"), TRAIN, 1)


def test_clusters_without_pixels_or_label_are_left_out(pretrained, toy, tmp_path):
    catalog = toy_catalog(40, 6)
    ids = catalog["id"].tolist()
    ids[7] = "outside-7"
    catalog["id"] = ids
    catalog["log10_m500c"][11] = np.nan
    store = build(catalog, ToySource(GRID), tmp_path / "s.zarr", GRID)
    table = train(store, catalog, folds(40), copy(pretrained, tmp_path / "run"), TRAIN, 1)
    assert len(table) == 38 and not {"outside-7", "toy-11"} & set(table["id"])
    assert np.isfinite(table["log10_m500c"]).all() and (np.asarray(table["log10_m500c_err"]) > 0).all()


def test_encoder_survives_the_run_folder(pretrained, toy):
    encoder = load_encoder(pretrained)
    assert not encoder.training and encoder.name == "small"
    image = torch.randn(3, 1, 16, 16)
    assert [level.shape[0] for level in encoder(image)] == [3, 3]


def test_confusion_counts_every_image(toy, pretrained):
    class Always(torch.nn.Module):
        units = None

        def forward(self, image):
            return torch.nn.functional.one_hot(torch.full((len(image),), 2), 3).float()

    confusion = band_confusion(Always(), toy[1], np.arange(90))  # type: ignore[arg-type]
    assert confusion.tolist() == [[0, 0, 90]] * 3


def test_epochs_shuffle_differently_but_reproducibly():
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(i for _, i in first) == list(range(50)) == sorted(i for _, i in second)
    assert [i for _, i in first] != [i for _, i in second] and {epoch for epoch, _ in second} == {1}
    assert list(EpochSampler(50, seed=3)) == first


def test_store_type_is_what_the_package_exports():
    import pix2mass

    assert pix2mass.ImageStore is ImageStore


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", None])
def test_a_checkpoint_cut_off_by_a_kill_is_not_trusted(tmp_path, content):
    path = tmp_path / "last.ckpt"
    torch.save({"a": torch.zeros(100)}, path)
    assert is_whole(path)
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    assert not is_whole(path)
    assert not is_whole(tmp_path / "none.ckpt")


# ---- other tasks, other networks -----------------------------------------------------------------------------------


def test_contrastive_pretraining_matches_views_and_tells_no_bands(toy, tmp_path):
    catalog, store = toy
    folder = RunFolder(tmp_path / "run")
    config = PRETRAIN.model_copy(update={"task": "contrastive", "n_images": 60})
    pretrain(store, folder, config, 1)
    info = folder.read_json("pretrain.json")
    assert info["task"] == "contrastive" and info["n_images"] == len(info["ra_deg"]) == 60
    assert "band_accuracy" not in info and not (folder / "band-head.safetensors").exists()
    untrained = Encoder().state_dict()
    assert any(not torch.equal(value, untrained[name]) for name, value in folder.load_weights("encoder").items())
    table = train(store, catalog, folds(90), folder, TRAIN, 1)
    assert np.isfinite(table["log10_m500c"]).all()


GALAXIES = TrainConfig(network="galaxies", folds=3)


@pytest.fixture(scope="module", autouse=True)
def _few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pix2mass.galaxies._STEPS", (150, 150))
        yield


@pytest.fixture(scope="module")
def counting(toy, tmp_path_factory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("galaxies") / "toy")
    train(toy[1], toy[0], folds(90), folder, GALAXIES, 1)
    folder.write_provenance(1)
    return folder


def test_the_network_of_galaxies_learns_without_network_1_and_predicts(counting, toy):
    catalog, store = toy
    table = QTable.read(counting / "train-out-of-fold.ecsv", format="ascii.ecsv")
    true = np.asarray(catalog["log10_m500c_true"])
    error = np.abs(np.asarray(table["log10_m500c"]) - true).mean()
    assert error < 0.5 * np.abs(true - true.mean()).mean(), "on clusters it has not seen"
    assert counting.read_json("model.json")["network"] == "galaxies"
    predicted = predict(Predictor(counting), store)
    assert np.abs(np.asarray(predicted["log10_m500c"]) - true).mean() < error + 0.02


def test_a_label_without_an_error_is_as_good_as_most(toy, tmp_path):
    catalog, store = toy
    some, most = catalog.copy(), catalog.copy()
    error = np.linspace(0.05, 0.25, len(catalog))
    some["log10_m500c_err"] = np.where(np.arange(len(catalog)) % 3 == 0, np.nan, error)
    typical = np.nanmedian(some["log10_m500c_err"])
    most["log10_m500c_err"] = np.where(np.arange(len(catalog)) % 3 == 0, typical, error)
    left, right = (
        train(store, table, folds(90), RunFolder(tmp_path / name), GALAXIES, 1)
        for name, table in (("some", some), ("most", most))
    )
    for column in ("log10_m500c", "log10_m500c_err"):
        np.testing.assert_allclose(left[column], right[column], rtol=1e-6)
    # Predictions are corrected by the line of what is published: the medians.
    line = Shrinkage.fit(*(np.asarray(v) for v in (right["log10_m500c"], most["log10_m500c"], most["log10_m500c_err"])))
    assert RunFolder(tmp_path / "most").read_json("model.json")["shrinkage"] == pytest.approx(line.as_json(), rel=1e-9)


@pytest.mark.parametrize("units", ["noise", "l-star"])
def test_a_gaussian_process_learns_from_frozen_features_and_predicts(toy, tmp_path, units):
    catalog, store = toy
    folder = RunFolder(tmp_path / "run")
    pretrain(store, folder, PretrainConfig(epochs=1, units=units, accelerator="cpu"), 1)
    before = folder.load_weights("encoder")
    table = train(store, catalog, folds(90), folder, TrainConfig(network="gaussian-process", folds=3), 1)
    true = np.asarray(catalog["log10_m500c_true"])
    error = np.abs(np.asarray(table["log10_m500c"]) - true).mean()
    assert error < 0.5 * np.abs(true - true.mean()).mean(), "on clusters it has not seen"
    info = folder.read_json("model.json")
    assert (info["network"], info["units"], info["folds"], info["views"]) == ("gaussian-process", units, 1, 1)
    kept = folder.load_weights("fold-0")
    assert all(torch.equal(value, kept[f"encoder.{name}"]) for name, value in before.items()), "features are kept"
    folder.write_provenance(1)
    predicted = predict(Predictor(folder), store)
    assert np.abs(np.asarray(predicted["log10_m500c"]) - true).mean() < error + 0.02


def test_units_of_l_star_need_redshifts(toy, tmp_path):
    catalog, store = toy
    with pytest.MonkeyPatch.context() as patch:
        z = np.array(store.z)
        z[[1, 4]] = np.nan
        patch.setattr(store, "z", z)
        with pytest.raises(Pix2massError, match=r"'l-star' need the redshift of every image, 2 have none"):
            pretrain(store, RunFolder(tmp_path / "run"), PretrainConfig(units="l-star"), 1)
    folder = RunFolder(tmp_path / "whole")
    pretrain(store, folder, PretrainConfig(units="l-star", epochs=1, accelerator="cpu"), 1)
    with pytest.raises(Pix2massError, match=r"units 'l-star', which tell the redshift"):
        train(store, catalog, folds(90), folder, TRAIN.model_copy(update={"use_redshift": False}), 1)


def test_fine_tuning_starts_from_another_run(counting, toy, tmp_path):
    moved = toy_catalog(23, 8, "other")
    store = build(moved, ToySource(GRID), tmp_path / "other.zarr", GRID)
    moved["log10_m500c"] += 0.3
    tuned = GALAXIES.model_copy(update={"start_from": counting.path})
    masses = {}
    for name, config in (("alone", GALAXIES), ("tuned", tuned)):
        folder = RunFolder(tmp_path / name)
        table = train(store, moved, folds(len(moved)), folder, config, 1)
        masses[name] = np.asarray(table["log10_m500c"]) - np.asarray(moved["log10_m500c_true"])
    assert masses["tuned"].mean() == pytest.approx(0.3, abs=0.1), "the labels' offset is learnt"
    assert masses["tuned"].std() < masses["alone"].std(), "and what 23 labels cannot teach is kept"


def test_labels_that_trained_the_network_to_start_from_are_refused(counting, toy, tmp_path):
    catalog, store = toy
    tuned = GALAXIES.model_copy(update={"start_from": counting.path})
    with pytest.raises(Pix2massError, match=r"trained on 90 of these 90 clusters \(toy-0, .*leave out start_from"):
        train(store, catalog, folds(90), RunFolder(tmp_path / "again"), tuned, 1)
    other = toy_catalog(30, 8, "other")
    others = build(other, ToySource(GRID), tmp_path / "other.zarr", GRID)
    second = RunFolder(tmp_path / "second")
    train(others, other, folds(30), second, tuned, 1)
    with pytest.raises(Pix2massError, match="trained on 90 of these 90 clusters"):
        tuned = GALAXIES.model_copy(update={"start_from": second.path})
        train(store, catalog, folds(90), RunFolder(tmp_path / "third"), tuned, 1)
    real = catalog.copy()
    real.remove_column("log10_m500c_true")
    train(store, real, folds(90), RunFolder(tmp_path / "real"), tuned, 1)  # a mock cluster is no real one
    with pytest.raises(Pix2massError, match="trained on 90 of these 90 clusters"):
        tuned = GALAXIES.model_copy(update={"start_from": tmp_path / "real"})
        train(store, real, folds(90), RunFolder(tmp_path / "fourth"), tuned, 1)


def test_starting_from_what_does_not_fit_is_refused(counting, pretrained, toy, tmp_path):
    catalog, store = toy
    with pytest.raises(Pix2massError, match="network = 'galaxies'.*'bands'"):
        config = TRAIN.model_copy(update={"start_from": counting.path})
        train(store, catalog, folds(90), copy(pretrained, tmp_path / "a"), config, 1)
    grid = GridConfig(bands="ri", n_pixels=16)
    other = build(catalog, ToySource(grid), tmp_path / "ri.zarr", grid)
    with pytest.raises(Pix2massError, match="trained on bands 'gri'"):
        config = GALAXIES.model_copy(update={"start_from": counting.path})
        train(other, catalog, folds(90), RunFolder(tmp_path / "b"), config, 1)
    grid = GridConfig(bands="gri", n_pixels=20)
    other = build(catalog, ToySource(grid), tmp_path / "fine.zarr", grid)
    with pytest.raises(Pix2massError, match=r"on 16 pixels, .*on 20 pixels; build the store on that grid"):
        train(other, catalog, folds(90), RunFolder(tmp_path / "c"), config, 1)
    with pytest.raises(Pix2massError, match=r"weights.default: its networks were trained on bands 'ugriz'"):
        config = GALAXIES.model_copy(update={"start_from": Path("default")})
        train(store, catalog, folds(90), RunFolder(tmp_path / "d"), config, 1)


def test_richness_blend_finds_the_relation_it_was_made_with():
    rng = np.random.default_rng(3)
    estimate, richness, z = rng.uniform(14, 15, 40), rng.uniform(5, 100, 40), rng.uniform(0.1, 0.5, 40)
    label = 14.4 + 0.6 * (estimate - 14.5) + 0.3 * np.log10(richness / 40) - 0.2 * np.log10((1 + z) / 1.3)
    richness[3] = np.nan
    blend = RichnessBlend.fit(estimate, richness, z, label)
    np.testing.assert_allclose(
        [blend.constant, blend.network, blend.richness, blend.redshift], [14.4, 0.6, 0.3, -0.2], atol=1e-9
    )
    assert np.isnan(blend.predict(estimate, richness, z)[3])
    with pytest.raises(Pix2massError, match="at least 20"):
        RichnessBlend.fit(estimate[:10], richness[:10], z[:10], label[:10])


def test_another_training_leaves_nothing_of_the_one_before(pretrained, toy, tmp_path):
    catalog, store = toy
    folder = copy(pretrained, tmp_path / "run")
    train(store, catalog, folds(90), folder, TRAIN, 1)
    files = [folder / name for name in ("metrics.json", "predictions.ecsv", "masses.ecsv", "report.html", "maps")]
    files[-1].mkdir()
    for file in files[:-1]:
        file.touch()
    train(store, catalog, folds(90), folder, TRAIN, 1)
    assert all(file.exists() for file in files), "the same training again is skipped"
    train(store, catalog, folds(90), folder, TRAIN, 2)
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize("name", ["model.json", "fold-1.safetensors"])
def test_what_a_finished_training_has_lost_is_made_again(pretrained, toy, tmp_path, name):
    catalog, store = toy
    folder = copy(pretrained, tmp_path / "run")
    first = train(store, catalog, folds(90), folder, TRAIN, 1)
    (folder / name).unlink()
    again = train(store, catalog, folds(90), folder, TRAIN, 1)
    Predictor(folder)
    np.testing.assert_array_equal(first["log10_m500c"], again["log10_m500c"])


def test_network_2_wants_the_grid_of_network_1(pretrained, toy, tmp_path):
    catalog, _ = toy
    grid = GRID.model_copy(update={"n_pixels": 32})
    store = build(catalog, ToySource(grid), tmp_path / "other.zarr", grid)
    with pytest.raises(Pix2massError, match="network 1 was trained on.*build the store on that grid"):
        train(store, catalog, folds(90), copy(pretrained, tmp_path / "run"), TRAIN, 1)


def test_without_redshifts_no_redshift_is_too_high(tmp_path):
    grid = GridConfig(bands="gri", n_pixels=16, width_kpc=None, width_arcsec=80.0)
    catalog = toy_catalog(60, 1)
    catalog["z"][::2] = np.nan
    store = build(catalog, ToySource(grid), tmp_path / "toy.zarr", grid)
    folder = RunFolder(tmp_path / "run")
    pretrain(store, folder, PRETRAIN, 1)
    train(store, catalog, folds(60), folder, TRAIN.model_copy(update={"use_redshift": False}), 1)
    assert folder.read_json("model.json")["training_prior"]["slope"] == 0.0
    folder.write_provenance(1)
    masses = predict(folder, build(toy_catalog(60, 1, "new"), ToySource(grid), tmp_path / "new.zarr", grid))
    flags = np.asarray(masses["flags"])
    assert not (flags & int(Flag.REDSHIFT_EXTRAPOLATED)).any() and np.mean(masses["trusted"]) > 0.8


def test_an_encoder_whose_code_has_changed_is_trained_again(toy, tmp_path, monkeypatch):
    store = toy[1]
    code = """
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, WIDTH, 3, 2, 1)

    def forward(self, image):
        return [self.layer(image).relu()]

def make():
    return Own()
"""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    config = PRETRAIN.model_copy(update={"encoder": "own_for_test:make", "epochs": 1})
    folder = RunFolder(tmp_path / "run")
    for width in (4, 8):
        (tmp_path / "own_for_test.py").write_text(code.replace("WIDTH", str(width)))
        linecache.clearcache()
        sys.modules.pop("own_for_test", None)
        importlib.invalidate_caches()
        if width == 8:
            with pytest.raises(Pix2massError, match="no longer what network 1 was trained with; pretrain again"):
                train(store, toy[0], folds(90), folder, TRAIN, 1)
        assert pretrain(store, folder, config, 1).backbone.layer.out_channels == width
    sys.modules.pop("own_for_test", None)


def test_light_is_rescaled_where_the_images_are_though_the_network_is_elsewhere():
    with FakeTensorMode():
        scale = PhysicalScale(GRID).to("cuda")
        assert scale.per_noise(torch.ones(2, 3), torch.tensor([0.1, 0.3])).device.type == "cpu"
