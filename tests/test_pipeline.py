"""`pix2mass run` on a user's own catalogues and images: no truth, no richness, gaps in the data."""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings

import numpy as np
import pytest
from _frames import frame_wcs, write_frame
from _toy import ToySource, toy_catalog
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS

from pix2mass import cli, pipeline
from pix2mass.config import BuildConfig, GridConfig, MockConfig, TrainConfig
from pix2mass.distribute import InProcess
from pix2mass.images.frame_index import FrameIndex
from pix2mass.run import RunFolder
from pix2mass.store import build
from pix2mass.types import Pix2massError

GRID = GridConfig(bands="gri", width_kpc=None, width_arcsec=80.0, n_pixels=16)
CONFIG = """
name = "own"
seed = 3
[data]
labelled = "{folder}/labelled.ecsv"
unlabelled = "{folder}/unlabelled.ecsv"
cutouts = "{folder}/images/{{id}}-{{band}}.fits"
[grid]
bands = "gri"
width_arcsec = 80.0
n_pixels = 16
[pretrain]
epochs = 2
units = "{units}"
accelerator = "cpu"
[train]
network = "{network}"
folds = 2
{settings}
[explain]
n_clusters = 1
steps = 2
"""
OF_BANDS = """views = 1
epochs = 40
batch_size = 16
accelerator = "cpu"
"""


def write_images(catalog: QTable, folder) -> None:
    source = ToySource(GRID)
    for row in catalog:
        cutout = source.cutout(row)
        for index, band in enumerate(cutout.bands):
            wcs = WCS(naxis=2)
            wcs.wcs.ctype, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [-5 / 3600, 5 / 3600]
            wcs.wcs.crval, wcs.wcs.crpix = [cutout.ra_deg, cutout.dec_deg], [8.5, 8.5]
            image = fits.PrimaryHDU(cutout.flux[index], wcs.to_header())
            sigma = fits.ImageHDU(cutout.sigma[index], name="SIGMA")
            fits.HDUList([image, sigma]).writeto(folder / f"{row['id']}-{band}.fits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "units", "settings"), [("bands", "noise", OF_BANDS), ("gaussian-process", "l-star", "")]
)
def test_own_images_and_labels_from_catalogue_to_report(tmp_path, monkeypatch, capsys, network, units, settings):
    labelled, unlabelled = toy_catalog(90, 1), toy_catalog(20, 2, "blank")
    (tmp_path / "images").mkdir()
    write_images(labelled, tmp_path / "images")
    write_images(unlabelled, tmp_path / "images")
    for band in "gri":
        (tmp_path / "images" / f"toy-5-{band}.fits").unlink()
    (tmp_path / "images" / "toy-6-r.fits").write_bytes(b"SIMPLE  = not quite")
    labelled["log10_m500c"][7] = np.nan
    richness = np.asarray(labelled["richness"]).copy()
    richness[::3] = np.nan
    labelled["richness"] = richness
    labelled.remove_columns(["log10_m500c_true", "group"])
    labelled.write(tmp_path / "labelled.ecsv")
    unlabelled["id", "ra_deg", "dec_deg", "z"].write(tmp_path / "unlabelled.ecsv")
    (tmp_path / "own.toml").write_text(CONFIG.format(folder=tmp_path, network=network, units=units, settings=settings))

    monkeypatch.setattr("sys.argv", ["pix2mass", "run", str(tmp_path / "own.toml"), "--out", str(tmp_path / "run")])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
        warnings.simplefilter("ignore")  # the file that is cut off is named in a warning
        cli.main()
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "1 labelled clusters have no usable pixels and are left out" in out
    assert "real clusters, scored against labels" in out and "have a richness; the ratio is of these" in out
    run = RunFolder(tmp_path / "run")
    metrics = run.read_json("metrics.json")
    assert not metrics["mock"] and metrics["n"] == 88 and 50 < metrics["n_richness"] < 60
    assert metrics["mae_dex"] < 0.6 * metrics["mae_constant_dex"] < metrics["mae_shuffled_dex"]
    assert not metrics["pretraining_saw_test_images"] and "unlabelled" not in metrics
    predictions = QTable.read(run / "predictions.ecsv")
    assert "log10_m500c_true" not in predictions.colnames and np.isfinite(predictions["log10_m500c"]).all()
    masses = QTable.read(run / "masses.ecsv")
    assert masses.meta["trained_on"] == "real observations" and len(masses) == 20
    text = re.sub(r"<style.*?</style>|<[^>]*>", " ", (run / "report.html").read_text(), flags=re.DOTALL)
    assert not re.search(r"\bnan\b", text), "a number of the report is not one"
    assert "Real" in text


def builds(tmp_path, catalog: QTable):
    config = BuildConfig(cutouts=f"{tmp_path}/images/{{id}}-{{band}}.fits")
    return pipeline.build_store(catalog, config, GRID, tmp_path / "own.zarr", InProcess(), silent)


@contextlib.contextmanager
def silent(_: str):
    yield lambda *_: None


def test_a_store_is_not_taken_for_one_of_files_that_have_changed(tmp_path):
    (tmp_path / "images").mkdir()
    catalog = toy_catalog(3, 1)
    write_images(catalog, tmp_path / "images")
    checksum = builds(tmp_path, catalog).checksum
    assert builds(tmp_path, catalog).checksum == checksum, "the same files are not read again"
    path = tmp_path / "images" / "toy-1-r.fits"
    with fits.open(path) as hdus:
        hdus[0].data *= 10
        hdus.writeto(path, overwrite=True)
    with pytest.raises(Pix2massError, match="other clusters, positions, redshifts or images.*remove it"):
        builds(tmp_path, catalog)


def test_a_store_is_not_taken_for_one_of_another_frame_index(tmp_path):
    for field in (40, 41):
        wcs = frame_wcs(200.0, 1.0, (60, 60))
        write_frame(tmp_path, np.zeros((60, 60)), wcs, 3000, 2, field, "r")
    index = FrameIndex.from_base(tmp_path)
    config = BuildConfig(frames=str(tmp_path), frame_index=tmp_path / "index.ecsv")
    grid = GridConfig(bands="r", width_kpc=None, width_arcsec=16.0, n_pixels=16)
    catalog = QTable({"id": ["a"], "ra_deg": [200.0], "dec_deg": [1.0], "z": [0.2]})

    def made():
        return pipeline.build_store(catalog, config, grid, tmp_path / "s.zarr", InProcess(), silent)

    index.to_file(tmp_path / "index.ecsv")
    checksum = made().checksum
    index.to_file(tmp_path / "index.ecsv")
    assert made().checksum == checksum
    FrameIndex(index.table[:1]).to_file(tmp_path / "index.ecsv")
    with pytest.raises(Pix2massError, match="or one of files that have changed since; remove it"):
        made()


def test_build_says_how_unreadable_cutouts_are_made_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    catalog = toy_catalog(3, 1)
    write_images(catalog, tmp_path / "images")
    (tmp_path / "images" / "toy-1-r.fits").write_bytes(b"SIMPLE  = not quite")
    catalog.write(tmp_path / "toy.ecsv")
    words = ["build", tmp_path / "toy.ecsv", "--cutouts", f"{tmp_path}/images/{{id}}-{{band}}.fits", "--workers", "1"]
    words += ["--bands", "gri", "--width-arcsec", "80", "--n-pixels", "16", "--out", tmp_path / "own.zarr"]
    monkeypatch.setattr("sys.argv", ["pix2mass", *map(str, words)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):  # made now, and found there
            with contextlib.suppress(SystemExit):
                cli.main()
            said = (
                f"1 of them are flagged UNREADABLE.*made again.*remove {tmp_path / 'own.zarr'} and run the same command"
            )
            assert re.search(said, capsys.readouterr().out)


@pytest.mark.parametrize(("column", "change"), [("z", 0.02), ("dec_deg", 0.01)])
def test_training_refuses_images_made_for_another_place_or_redshift(tmp_path, column, change):
    catalog = toy_catalog(30, 1)
    store = build(catalog, ToySource(GRID), tmp_path / "toy.zarr", GRID)
    catalog[column][4] += change
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(
        Pix2massError, match="1 clusters have another position or redshift.*toy-4.*build the store again"
    ):
        pipeline.train_run(folder, store, catalog, TrainConfig(folds=2, accelerator="cpu"), 1, silent)


def test_labels_that_do_not_differ_are_refused_before_training(tmp_path):
    catalog = toy_catalog(30, 1)
    catalog["log10_m500c"] = 14.5
    store = build(catalog, ToySource(GRID), tmp_path / "toy.zarr", GRID)
    with pytest.raises(Pix2massError, match="all 30 labels are log10_m500c = 14.5: expected masses that differ"):
        pipeline.train_run(RunFolder(tmp_path / "run"), store, catalog, TrainConfig(folds=2), 1, silent)


def test_mock_files_of_two_surveys_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "measure_richness", lambda *_: None)
    first = MockConfig(n_labelled=20, n_unlabelled=20)
    grid = GridConfig(n_pixels=16)
    pipeline.write_mock_files(first, grid, 1, tmp_path, "cutouts", InProcess(), silent)
    pipeline.write_mock_files(first, grid, 1, tmp_path, "cutouts", InProcess(), silent)
    before = (tmp_path / "labelled" / "L000000-r.fits").read_bytes()
    for config, seed in ((first, 2), (first.model_copy(update={"log10_m500c_min": 14.5}), 1)):
        with pytest.raises(Pix2massError, match="another mock survey lies here.*choose another --out"):
            pipeline.write_mock_files(config, grid, seed, tmp_path, "cutouts", InProcess(), silent)
    assert (tmp_path / "labelled" / "L000000-r.fits").read_bytes() == before


def test_catalogues_of_another_mock_survey_are_not_kept_beside_new_images(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "measure_richness", lambda *_: None)
    config, grid = MockConfig(n_labelled=20, n_unlabelled=20), GridConfig(n_pixels=16)
    made = pipeline.make_mock(config, grid, 1, tmp_path, InProcess(), silent)
    (tmp_path / "survey.json").unlink()  # as versions before this one left it
    again = pipeline.make_mock(config, grid, 1, tmp_path, InProcess(), silent)
    assert again.labelled_store.checksum == made.labelled_store.checksum
    with pytest.raises(Pix2massError, match="another mock survey lies here.*survey.json.*choose another --out"):
        pipeline.make_mock(config, grid, 2, tmp_path, InProcess(), silent)
    for name in ("labelled.zarr", "unlabelled.zarr"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(Pix2massError, match="another mock survey lies here"):
        pipeline.make_mock(config.model_copy(update={"log10_m500c_min": 14.5}), grid, 1, tmp_path, InProcess(), silent)
    again = pipeline.make_mock(config, grid, 1, tmp_path, InProcess(), silent)
    assert again.labelled_store.checksum == made.labelled_store.checksum
    (tmp_path / "survey.json").unlink()
    shutil.rmtree(tmp_path / "labelled.zarr")
    with pytest.raises(Pix2massError, match="another mock survey lies here.*labelled.ecsv"):
        pipeline.make_mock(config, grid, 1, tmp_path, InProcess(), silent)
