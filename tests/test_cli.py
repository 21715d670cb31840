"""The command line as a user meets it: help, clear mistakes, and the whole chain on a small mock survey."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _toy import ToySource, toy_catalog
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS

from pix2mass import cli
from pix2mass.config import GridConfig, RunConfig, load_toml
from pix2mass.predict import predict
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore, build

VERBS = ["demo", "catalog", "build", "mock", "inject", "pretrain", "train", "evaluate", "predict", "explain", "report"]
VERBS += ["run"]


def pix2mass(*words: object) -> int:
    """Run a command in this process; its exit status."""
    argv = sys.argv
    sys.argv = ["pix2mass", *(str(word) for word in words)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
    return 0


@pytest.mark.parametrize("verb", [[verb] for verb in VERBS if verb != "catalog"] + [["catalog", "check"]])
def test_help_of_every_verb_ends_with_an_example(verb, capsys):
    assert pix2mass(*verb, "--help") == 0
    text = capsys.readouterr().out
    assert "Example: pix2mass " + " ".join(verb) in text.replace("`", "")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "pix2mass", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "pix2mass COMMAND" in done.stdout


def test_the_demo_is_what_its_file_says():
    assert load_toml(RunConfig, Path(__file__).parents[1] / "configs" / "demo.toml") == cli.DEMO


def test_help_lists_every_verb_and_does_not_load_torch():
    code = "import sys; sys.argv = ['pix2mass', '--help']; from pix2mass.cli import main\n"
    code += "try:\n    main()\nfinally:\n    assert not {'torch', 'astropy', 'matplotlib', 'zarr'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "none.csv", "--frames", "x"], "none.csv: no such file"),
        (["build", "none.csv", "--framez", "x"], "--framez.*--frames"),
        (["build", "{catalog}", "--hips", "--cutouts", "y"], "--frames BASE, --hips or --cutouts"),
        (["build", "{catalog}", "--frames", "x", "--cutouts", "y"], "--frames BASE, --hips or --cutouts"),
        (["build", "{catalog}", "--frames", "x", "--bands", "rgi"], "in that order.*'rgi'"),
        (["build", "{catalog}", "--frames", "x", "--width-kpc", "5", "--width-arcsec", "5"], "not both"),
        (["build", "{catalog}", "--frames", "x", "--columns", "ra_deg"], "OURS=THEIRS"),
        (["build", "{catalog}", "--frames", "ftp://example.org/sas"], "ftp"),
        (["predict", "{catalog}", "--run", "none"], "none: no run here"),
        (["train", "none.zarr", "{catalog}", "--run", "{tmp}/run", "--from-scratch"], "freeze_encoder = false"),
        (["evaluate", "none", "none.zarr"], "none: no run here"),
        (["explain", "none", "none.zarr"], "none: no run here"),
        (["explain", "default", "none.zarr"], "default are packaged weights: name a store of images and, with --ids,"),
        (["predict", "{catalog}", "--run", "mine", "--weights", "default-gri"], "exclude each other"),
        (["report", "none"], "none: no run here"),
        (["run", "none.toml"], "none.toml: no such file"),
        (["run", "{toml}"], "train.epohcs: unknown key; did you mean 'epochs'"),
        (["weigh"], "weigh"),
        (["mock", "--out", "m", "--catalog", "{catalog}"], "together with --images frames"),
        (["inject", "none", "--out", "painted"], "none: expected SDSS frames under"),
        (["predict", "nowhere.zarr", "--run", "none"], "nowhere.zarr: no such catalogue or image store"),
        (["predict", "{catalog}", "--run", "none", "--out", "masses.zarr"], "masses.zarr: choose a name ending in"),
        (["predict", "{catalog}", "--cutouts", "x", "--out", "c.csv/m.ecsv"], "--out c.csv/m.ecsv: the folder cannot"),
        (["baseline", "{catalog}", "--out", "c.csv/numbers.json"], "--out c.csv/numbers.json: the folder cannot"),
        (["baseline", "{catalog}", "--out", "."], "--out .: expected the name of a file"),
        (["catalog", "check", "{catalog}", "--out", "c.csv/checked.ecsv"], "^pix2mass: c.csv: .*run the same command"),
        (["predict", "{catalog}", "--z-err", "-0.1", "--cutouts", "x"], "--z-err -0.1: expected .* 0 to 1"),
        (["predict", "z_err.csv", "--cutouts", "x"], "z_err.csv: column 'z_err' does not hold numbers: row 2: --"),
    ],
)
def test_mistakes_get_one_clear_message(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.csv").write_text("id,ra_deg,dec_deg,z\na,10,1,0.2\n")
    Path("z_err.csv").write_text("id,ra_deg,dec_deg,z,z_err\na,10,1,0.2,0.01\nb,10,2,0.2,--\n")
    Path("c.toml").write_text('name = "x"\n[mock]\n[train]\nepohcs = 3\n')
    filled = [word.format(catalog="c.csv", tmp=tmp_path, toml="c.toml") for word in words]
    assert pix2mass(*filled) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert "Traceback" not in error


def test_a_full_disk_is_one_line_with_the_file(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "masses.ecsv")

    monkeypatch.setattr("pix2mass.catalog.read_catalog", full)
    assert pix2mass("catalog", "check", tmp_path / "c.csv") == 2
    error = capsys.readouterr().err
    assert error.startswith("pix2mass: masses.ecsv: No space left on device; mend") and error.count("\n") == 1


def test_the_folder_of_a_table_is_made_before_the_work(tmp_path, capsys):
    (tmp_path / "c.csv").write_text("id,ra_deg,dec_deg,z\na,10,1,0.2\n")
    assert pix2mass("predict", tmp_path / "c.csv", "--out", tmp_path / "a" / "b" / "m.csv") == 2
    assert "say where its images are" in capsys.readouterr().err and (tmp_path / "a" / "b").is_dir()


def test_a_folder_without_rights_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "locked")
    assert pix2mass("baseline", tmp_path / "none.csv", "--out", tmp_path / "locked" / "numbers.json") == 2
    assert "files cannot be written in" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, -1])
def test_a_sheet_of_no_cutouts_is_refused(n, tmp_path, capsys):
    grid = GridConfig(bands="gri", n_pixels=16)
    build(toy_catalog(3, 1), ToySource(grid), tmp_path / "s.zarr", grid)
    assert pix2mass("store", "show", tmp_path / "s.zarr", "--out", tmp_path / "sheet.png", "--n", n) == 2
    assert f"n = {n}: expected the number of cutouts to draw, 1 or more" in capsys.readouterr().err


def test_catalog_check_lists_all_problems_at_once(tmp_path, capsys):
    path = tmp_path / "c.csv"
    path.write_text("NAME,RA,DEC,z\na,400,0,0.2\na,10,-95,-1\n")
    columns = "id=NAME,ra_deg=RA,dec_deg=DEC"
    assert pix2mass("catalog", "check", path, "--columns", columns) == 2
    error = capsys.readouterr().err
    for part in ("row 1: ra_deg = 400", "row 2: dec_deg = -95", "row 2: z = -1", "row 2: id 'a'"):
        assert part in error
    path.write_text("NAME,RA,DEC,z\na,40,0,0.2\nb,10,-9,0.3\n")
    assert pix2mass("catalog", "check", path, "--columns", columns, "--out", tmp_path / "c.ecsv") == 0
    assert QTable.read(tmp_path / "c.ecsv")["ra_deg"].tolist() == [40.0, 10.0]


CONFIG = """
name = "small"
seed = 2
[mock]
n_labelled = 240
n_unlabelled = 60
z_min = 0.1
z_max = 0.4
[mock.physics]
star_count_r145 = 1.0  # halos of bright stars need more labels than these
[grid]
bands = "{bands}"
n_pixels = 32
[pretrain]
epochs = 2
accelerator = "cpu"
[train]
folds = 2
views = 1
epochs = 25
batch_size = 16
accelerator = "cpu"
[explain]
n_clusters = 2
steps = 4
"""


@pytest.fixture(scope="module", params=["ugriz", "gri"])
def chain(request, tmp_path_factory) -> RunFolder:
    """`pix2mass run` on a small mock survey in five bands and in three."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "small.toml").write_text(CONFIG.format(bands=request.param))
    assert pix2mass("run", folder / "small.toml", "--out", folder / "run") == 0
    return RunFolder(folder / "run")


KEYS = {
    "n",
    "mae_dex",
    "mae_best_fold_dex",
    "mae_constant_dex",
    "mae_redshift_dex",
    "mae_richness_dex",
    "mae_shuffled_dex",
    "ratio_to_richness",
    "bias_dex",
    "slope",
    "coverage_68",
    "band_accuracy",
    "seconds",
}


@pytest.mark.slow
def test_the_chain_leaves_all_it_promises(chain):
    metrics = chain.read_json("metrics.json")
    assert metrics.keys() >= KEYS and metrics["n"] == 240 and metrics["mock"]
    stages = {"mock", "pretrain", "train", "null", "evaluate", "predict", "explain", "report"}
    assert metrics["seconds"].keys() >= stages
    assert metrics["mae_dex"] < 0.85 * metrics["mae_constant_dex"]
    assert metrics["mae_richness_dex"] < 0.5 * metrics["mae_constant_dex"]
    assert metrics["n_richness"] == 240 and not metrics["pretraining_saw_test_images"]
    assert metrics["unlabelled"]["n"] == 60 and metrics["unlabelled"]["mae_dex"] < 0.85 * metrics["mae_constant_dex"]
    assert metrics["mae_shuffled_dex"] > 0.9 * metrics["mae_constant_dex"]
    predictions = QTable.read(chain / "predictions.ecsv")
    assert len(predictions) == 240 and (np.asarray(predictions["log10_m500c_err"]) > 0).all()
    assert len(QTable.read(chain / "masses.ecsv")) == 60
    assert "<svg" in (html := (chain / "report.html").read_text()) or "data:image" in html
    assert len(list((chain / "maps").glob("*.npz"))) == 2
    files = [path.suffix for path in chain.path.rglob("*") if path.is_file()]
    assert not {".ckpt", ".pt", ".pkl"} & set(files), "a run folder holds no pickles"


@pytest.mark.slow
def test_the_same_command_skips_what_has_not_changed(chain, capsys):
    before = (chain / "predictions.ecsv").read_bytes()
    assert pix2mass("run", chain.path.parent / "small.toml", "--out", chain.path) == 0
    out = capsys.readouterr().out
    for stage in ("mock", "pretrain", "train", "null", "predict", "explain"):
        assert f"{stage}: inputs and configuration unchanged, skipped" in out
    assert (chain / "predictions.ecsv").read_bytes() == before


@pytest.mark.slow
def test_users_own_cutouts_get_masses(chain, tmp_path, capsys):
    """Mock clusters written as FITS files on a finer grid come back through the door for users' own images."""
    store = ImageStore.open(next(chain.path.glob("survey-*")) / "labelled.zarr")
    masses = QTable.read(chain / "predictions.ecsv")
    order = np.argsort(np.asarray(masses["log10_m500c_true"]))
    chosen = [str(masses["id"][order[0]]), str(masses["id"][order[-1]])]
    rows = store.rows(chosen)
    for cluster_id, row in zip(chosen, rows, strict=True):
        cutout = store[int(row)]
        for index, band in enumerate(cutout.bands):
            wcs = WCS(naxis=2)
            scale = cutout.pixel_scale_arcsec / 2 / 3600
            wcs.wcs.ctype, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [-scale, scale]
            wcs.wcs.crval, wcs.wcs.crpix = [cutout.ra_deg, cutout.dec_deg], [32.5, 32.5]
            finer = np.kron(cutout.flux[index], np.full((2, 2), 0.25, np.float32))
            noise = fits.ImageHDU(np.kron(cutout.sigma[index], np.full((2, 2), 0.5, np.float32)), name="SIGMA")
            image = fits.PrimaryHDU(finer, wcs.to_header())
            fits.HDUList([image, noise]).writeto(tmp_path / f"{cluster_id}-{band}.fits")
    QTable({"id": chosen, "ra_deg": store.ra_deg[rows], "dec_deg": store.dec_deg[rows], "z": store.z[rows]}).write(
        tmp_path / "mine.csv"
    )
    words = ["predict", tmp_path / "mine.csv", "--run", chain.path, "--cutouts", f"{tmp_path}/{{id}}-{{band}}.fits"]
    assert pix2mass(*words, "--out", tmp_path / "mine.ecsv") == 0
    out = capsys.readouterr().out
    assert "SIGMA_APPROXIMATE" not in out and "mock sky" in out
    mine = np.asarray(QTable.read(tmp_path / "mine.ecsv")["log10_m500c"])
    original = np.asarray(predict(chain, store)["log10_m500c"])[rows]
    # Four quarters of each pixel, with half its noise each, add up to the pixel again.
    np.testing.assert_allclose(mine, original, atol=0.01)
    assert mine[1] > mine[0]


@pytest.mark.slow
def test_other_bands_are_refused(chain, tmp_path, capsys):
    other = "gr"
    words = ["mock", "--out", tmp_path / "m", "--n-labelled", 20, "--n-unlabelled", 20, "--bands", other]
    assert pix2mass(*words, "--n-pixels", 32, "--workers", 1) == 0
    assert pix2mass("predict", tmp_path / "m" / "labelled.zarr", "--run", chain.path) == 2
    assert f"holds bands '{other}'" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_one_by_one(chain, tmp_path, capsys):
    survey, run = next(chain.path.glob("survey-*")), tmp_path / "run"
    assert pix2mass("pretrain", survey / "unlabelled.zarr", "--run", run, "--epochs", 1) == 0
    assert "rows true band" in capsys.readouterr().out
    words = ["train", survey / "labelled.zarr", survey / "labelled.ecsv", "--run", run, "--folds", 2]
    assert pix2mass(*words, "--epochs", 20, "--views", 1, "--batch-size", 16) == 0
    assert pix2mass("evaluate", run, survey / "labelled.zarr") == 0
    assert pix2mass("explain", run, survey / "unlabelled.zarr", "--ids", "U000003", "--steps", 2) == 0
    assert pix2mass("report", run) == 0
    assert json.loads((run / "metrics.json").read_text())["n"] == 240
    assert (run / "maps" / "U000003.npz").exists()
