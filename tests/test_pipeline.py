"""`pix2mass run` on a user's own catalogues and images: no truth, no richness, gaps in the data."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from _toy import ToySource, toy_catalog
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS

from pix2mass import cli
from pix2mass.config import GridConfig
from pix2mass.run import RunFolder

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
views = 1
epochs = 40
batch_size = 16
accelerator = "cpu"
[explain]
n_clusters = 1
steps = 2
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
@pytest.mark.parametrize(("network", "units"), [("bands", "noise"), ("gaussian-process", "l-star")])
def test_own_images_and_labels_from_catalogue_to_report(tmp_path, monkeypatch, capsys, network, units):
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
    (tmp_path / "own.toml").write_text(CONFIG.format(folder=tmp_path, network=network, units=units))

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
