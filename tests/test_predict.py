"""Prediction needs the run folder and images, nothing else, and says when not to trust it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from _frames import frame_wcs, write_frame
from _toy import ToySource, toy_catalog
from astropy.table import QTable

import pix2mass
from pix2mass import cli, weights
from pix2mass.config import GridConfig, MockConfig, PretrainConfig, TrainConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.distribute import open_workers
from pix2mass.images.cutouts import write_cutout
from pix2mass.images.mock.population import draw_clusters
from pix2mass.images.mock.source import MockSource
from pix2mass.predict import Predictor, as_estimates, as_seen_at, predict
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore, build
from pix2mass.train import pretrain, train
from pix2mass.types import Cutout, Flag, Pix2massError

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
    scores = dict.fromkeys(("mae_dex", "mae_constant_dex", "mae_richness_dex", "bias_dex", "slope"), 0.123)
    coverage = [{"target": True, "met": True}, {"target": False, "met": False}]
    facts = {"n": 120, "mock": True, "reference": "true mass of the mock", "calibration": {"coverage": coverage}}
    folder.write_json("metrics.json", {**scores, **facts, "coverage_68": 0.68, "coverage_95": 0.95})
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
    trusted = np.asarray(table["trusted"])
    low, high = run.read_json("model.json")["z_range"]
    inside = (table["z"] >= low) & (table["z"] <= high)
    inside[3] = False  # no pixels
    np.testing.assert_array_equal(trusted, inside)
    assert trusted.sum() >= 8
    assert np.abs(table["log10_m500c"] - true)[trusted].mean() < 0.15
    assert (np.diff([table[name][trusted] for name in ("q025", "q16", "q50", "q84", "q975")], axis=0) > 0).all()
    np.testing.assert_allclose((table["q84"] - table["q16"])[trusted] / 2, table["log10_m500c_err"][trusted], rtol=0.01)
    assert table.meta["mass_definition"] == "500c" and table.meta["trained_on"] == "mock sky"
    assert table.meta["prior"] == "the distribution of the training labels"
    assert set(table["model"]) == {"run"} and set(table["version"]) == {table.meta["pix2mass_version"]} != {""}


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
    assert "REDSHIFT_EXTRAPOLATED" in table["flag_names"][5] and np.isfinite(table["log10_m500c"][5])
    assert not table["trusted"][[3, 5]].any() and table["trusted"].sum() >= 8
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


class _Slice:
    """Some bands of a store's cutouts, as a source."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store

    def cutout(self, cluster) -> Cutout:
        whole = self.store[int(self.store.rows([str(cluster["id"])])[0])]
        parts = {name: getattr(whole, name)[1:4] for name in ("flux", "sigma", "mask", "psf_fwhm_arcsec")}
        return replace(whole, bands="gri", **parts)


@pytest.mark.parametrize("workers", [1, 2])
def test_of_a_store_with_more_bands_the_runs_own_are_used(run, tmp_path, workers):
    grid, catalog = GridConfig(bands="ugriz", n_pixels=16), toy_catalog(6, 5)
    more = build(catalog, ToySource(grid), tmp_path / "ugriz.zarr", grid)
    own = build(catalog, _Slice(more), tmp_path / "gri.zarr", GRID)
    with open_workers(workers) as several:
        found, expected = (predict(run, store, workers=several) for store in (more, own))
    for name in ("log10_m500c", "log10_m500c_err", "flags"):
        np.testing.assert_array_equal(found[name], expected[name])


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
    RunFolder(tmp_path / "run").write_json("model.json", {**info, "grid": {**info["grid"], "bands": "gr"}})
    with pytest.raises(Pix2massError, match="does not fit model.json"):
        Predictor(tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text("{")
    with pytest.raises(Pix2massError, match="broken file"):
        Predictor(tmp_path / "run")


class Says:
    """A network that says what a function of the redshift says, with a spread of 0.2 dex."""

    def __init__(self, mean) -> None:
        self.mean = mean

    def rescale(self, images, noise, z):
        return images

    def __call__(self, images, valid, z):
        return self.mean(z), torch.full_like(z, 0.2)


def test_the_error_of_a_redshift_reaches_the_mass(run, new_store):
    predictor = Predictor(run)
    predictor.regressors = [Says(lambda z: 14.0 + 2.0 * z)]
    shift = predictor.calibration.shift
    object.__setattr__(predictor.calibration, "shift", (shift[0], 0.0, 0.0, 0.0, 0.0))
    z_err = np.array([0.0, 0.05, np.nan, 0.1, *[0.05] * 8])
    without, found = predict(predictor, new_store), predict(predictor, new_store, z_err=z_err)
    np.testing.assert_allclose(found["log10_m500c"], without["log10_m500c"], atol=0.005)
    # The posterior is stretched as its variance grows, and so is its error.
    shape = np.array(predictor.calibration.shape)
    offsets = np.array([*(0.6 * np.arange(-5, 6)), 0.0])
    unit = shape @ (offsets**2 + np.array([0.36] * 11 + [9.0])) - (shape @ offsets) ** 2
    scale = predictor.calibration.posterior(14.0 + 2.0 * new_store.z, np.full(12, 0.2), new_store.z).scale
    for row, error in ((0, 0.0), (1, 0.05), (2, 0.0), (4, 0.05)):
        expected = np.sqrt(1 + (2 * error) ** 2 / (scale[row] ** 2 * unit))
        assert found["log10_m500c_err"][row] / without["log10_m500c_err"][row] == pytest.approx(expected, rel=1e-3)


def test_a_cutout_at_another_redshift_shows_the_same_light_at_another_size():
    grid, n = GridConfig(bands="gr", n_pixels=64), 64
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    blob = np.exp(-0.5 * (x**2 + y**2) / 4.0**2)
    flux = torch.tensor(np.stack([blob, 2 * blob])[None], dtype=torch.float32)
    z, other = np.array([0.2]), np.array([0.3])
    moved, mask, noise = as_seen_at(grid, flux, torch.zeros(flux.shape, dtype=torch.bool), torch.ones(1, 2), z, other)
    # Farther away, two megaparsecs are fewer arcseconds: the same source covers more pixels.
    ratio = float(kpc_per_arcsec(z)[0] / kpc_per_arcsec(other)[0])
    assert ratio < 0.8 and not mask.any()
    np.testing.assert_allclose(moved.sum(dim=(2, 3)), flux.sum(dim=(2, 3)), rtol=0.01)
    width = np.sqrt((moved[0, 0].numpy() * x**2).sum() / moved[0, 0].numpy().sum())
    assert width == pytest.approx(4.0 / ratio, rel=0.02) and noise[0, 0] == pytest.approx(ratio)


def test_several_networks_err_less_than_one(run, new_store):
    predictor = Predictor(run)
    predictor.regressors = [Says(lambda z: 14.4 + 0 * z)]
    alone = predict(predictor, new_store)
    predictor.regressors = [Says(lambda z: 14.3 + 0 * z), Says(lambda z: 14.5 + 0 * z)]
    together = predict(predictor, new_store)
    np.testing.assert_allclose(together["log10_m500c"], alone["log10_m500c"], atol=0.005)
    assert (together["log10_m500c_err"] < alone["log10_m500c_err"])[np.arange(12) != 3].all()


def test_priors_are_named_and_change_masses(run, new_store):
    tables = {name: predict(run, new_store, prior=name) for name in ("training", "flat", "mass-function")}
    trusted = np.asarray(tables["training"]["trusted"])
    masses = {name: np.asarray(table["log10_m500c"])[trusted] for name, table in tables.items()}
    # The toy's labels are flat: so is the prior.
    np.testing.assert_allclose(masses["flat"], masses["training"], atol=0.05)
    assert (masses["mass-function"] < masses["flat"]).all()
    assert "Tinker" in tables["mass-function"].meta["prior"] and "flat" in tables["flat"].meta["prior"]
    corrected = predict(run, new_store, correct_shrinkage=True)
    slope = np.polyfit(masses["training"], np.asarray(corrected["log10_m500c"])[trusted], 1)[0]
    assert slope == pytest.approx(1 / run.read_json("model.json")["shrinkage"]["slope"], rel=1e-6)
    assert corrected.meta["corrected_for_shrinkage"]
    with pytest.raises(Pix2massError, match="exclude each other"):
        predict(run, new_store, prior="flat", correct_shrinkage=True)
    with pytest.raises(Pix2massError, match="expected one of training, flat, mass-function"):
        predict(run, new_store, prior="uniform")  # type: ignore[arg-type]


class Faulty(ToySource):
    """The toy sky with a fault, which the start of an id names."""

    def cutout(self, cluster):
        cutout = super().cutout(cluster)
        fault = str(cluster["id"]).partition("-")[0]
        if fault == "star":
            cutout.flux[:] += 3000 * np.exp(-0.5 * np.hypot(*(np.mgrid[:16, :16] - 4.0)) ** 2 / 9)
        elif fault == "missing":
            cutout.mask[1], cutout.sigma[1], cutout.flux[1] = True, 0.0, 0.0
        elif fault == "blank":
            cutout.flux[:] = np.random.default_rng(3).standard_normal(cutout.flux.shape)
        elif fault == "coarse":
            object.__setattr__(cutout, "pixel_scale_arcsec", 2 * cutout.pixel_scale_arcsec)
        elif fault == "swapped":
            cutout.flux[:] = cutout.flux[::-1].copy()
        return cutout


def test_every_fault_has_its_name(run, tmp_path):
    expected = {
        "star": "BRIGHT_STAR",
        "missing": "MISSING_BAND",
        "blank": "NO_CLUSTER_SEEN",
        "coarse": "OTHER_PIXEL_SCALE",
        "swapped": "UNLIKE_TRAINING",
    }
    catalog = toy_catalog(5, 21)
    catalog["id"] = [f"{fault}-1" for fault in expected]
    catalog["log10_m500c_true"] = 14.6
    table = predict(run, build(catalog, Faulty(GRID), tmp_path / "faults.zarr", GRID))
    for row, flag in zip(table, expected.values(), strict=True):
        assert flag in row["flag_names"].split("|") and not row["trusted"], row["flag_names"]


@pytest.mark.slow
def test_few_good_images_are_flagged(run, tmp_path):
    table = predict(run, build(toy_catalog(300, 31, "good"), ToySource(GRID), tmp_path / "good.zarr", GRID))
    inside = np.asarray(table["flags"]) & int(Flag.REDSHIFT_EXTRAPOLATED) == 0
    assert 1 - np.asarray(table["trusted"])[inside].mean() < 0.05


def test_a_packed_run_predicts_as_its_network_does(run, new_store, tmp_path, monkeypatch):
    packed = weights.pack(run, tmp_path / "mine", fold=1)
    assert sorted(path.name for path in packed.iterdir()) == [
        "MODEL_CARD.md",
        "fold-0.safetensors",
        "model.json",
        "provenance.json",
        "stages.json",
    ]
    one = Predictor(run)
    one.regressors = one.regressors[1:]
    table = predict(packed, new_store)
    np.testing.assert_array_equal(table["log10_m500c"], predict(one, new_store)["log10_m500c"])
    assert set(table["model"]) == {"mine"}
    card = (packed / "MODEL_CARD.md").read_text()
    assert "Trained on mock images alone" in card and "| richness | 0.123 |" in card and "1 of 1 rows" in card
    with pytest.raises(Pix2massError, match="not empty"):
        weights.pack(run, packed)
    with pytest.raises(Pix2massError, match="networks 0 to 1"):
        weights.pack(run, tmp_path / "other", fold=2)

    # As weights of the package.
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "__init__.py"))
    assert weights.names() == ["mine"]
    np.testing.assert_array_equal(pix2mass.predict("mine", new_store)["log10_m500c"], table["log10_m500c"])
    with pytest.raises(Pix2massError, match="expected the name of packaged weights .mine."):
        weights.open_weights("default")


def command(*words: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pix2mass", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0)


def test_one_position_is_one_row(run, new_store, tmp_path, capsys):
    source, cluster = ToySource(GRID), toy_catalog(12, 8, "new")[0]
    write_cutout(source.cutout(cluster), "mine", f"{tmp_path}/{{id}}-{{band}}.fits")
    where = ("--ra", cluster["ra_deg"], "--dec", cluster["dec_deg"], "--z", cluster["z"])
    words = ("predict", *where, "--run", run.path)
    images = ("--id", "mine", "--cutouts", f"{tmp_path}/{{id}}-{{band}}.fits")
    for kind in ("csv", "fits", "ecsv"):
        assert command(*words, *images, "--out", tmp_path / f"one.{kind}") == 0
        one = QTable.read(tmp_path / f"one.{kind}")
        assert len(one) == 1 and {
            "id",
            "log10_m500c",
            "log10_m500c_err",
            "q16",
            "flag_names",
            "model",
            "version",
        } <= set(one.colnames)
        assert one["log10_m500c"][0] == pytest.approx(predict(run, new_store)["log10_m500c"][0], abs=0.01)
    assert command(*words, *images, "--out", tmp_path / "wide.ecsv", "--z-err", 0.1, "--prior", "flat") == 0
    wide = QTable.read(tmp_path / "wide.ecsv")
    assert "flat" in wide.meta["prior"]
    capsys.readouterr()
    for wrong, message in (
        (("--ra", 10, "--run", run.path), "expected --ra, --dec and --z"),
        (("--run", run.path), "give a store, a catalogue, or one position"),
        ((new_store.path, *where, "--run", run.path), "give a store, a catalogue, or one position"),
        ((*where, "--weights", "none-such"), "expected the name of packaged weights"),
    ):
        assert command("predict", *wrong, "--out", tmp_path / "no.ecsv") == 2
        assert message in capsys.readouterr().err


def test_one_position_from_a_local_archive(run, tmp_path, capsys):
    rng = np.random.default_rng(5)
    for band in "gri":
        flux = 0.02 * rng.standard_normal((400, 400))
        write_frame(tmp_path / "sas", flux, frame_wcs(150.0, 2.0, flux.shape), 94, 1, 12, band)
    words = ("predict", "--ra", 150, "--dec", 2, "--z", 0.3, "--run", run.path, "--frames", tmp_path / "sas")
    assert command(*words, "--out", tmp_path / "one.ecsv") == 0
    one = QTable.read(tmp_path / "one.ecsv")
    assert one["id"][0] == "J100000.0+020000.0" and np.isfinite(one["log10_m500c"][0])
    # A frame of 2.6' does not hold 2 Mpc at this redshift.
    assert "PARTLY_OUTSIDE" in one["flag_names"][0] and not one["trusted"][0]
    assert "not to be trusted: 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["default", "default-gri"])
def test_packaged_weights_weigh_mock_clusters_they_never_saw(name, tmp_path):
    predictor = Predictor(weights.open_weights(name))
    mock = MockConfig(z_min=0.1, z_max=0.4)
    clusters = draw_clusters(mock, 30, 987, "W")
    source = MockSource(mock, predictor.grid, 987)
    store = build(clusters, source, tmp_path / "s.zarr", predictor.grid)
    true = np.asarray(clusters["log10_m500c_true"])
    error = np.abs(np.asarray(predict(predictor, store)["log10_m500c"]) - true).mean()
    assert error < 0.5 * np.abs(true - true.mean()).mean()
    assert (predictor.folder / "MODEL_CARD.md").exists()
