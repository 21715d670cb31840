"""The report: complete, self-contained, safe, and honest about what a run folder lacks."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable

from pix2mass.evaluate import evaluate
from pix2mass.report import METHODS, ClusterMap, confusion_figure, overview_figure, write_report
from pix2mass.run import RunFolder
from pix2mass.types import Pix2massError

N, N_FOLDS, BANDS = 120, 4, "ugriz"
VOID = {"meta", "img", "link", "br", "hr", "input"}


def make_run(path: Path, mock: bool = True, ids: tuple[str, ...] = ("MOCK 001", "MOCK 002")) -> RunFolder:
    """A plausible finished run, made without networks."""
    rng = np.random.default_rng(7)
    folder = RunFolder(path)
    true = rng.uniform(13.5, 15.2, N)
    z = rng.uniform(0.1, 0.4, N)
    fold = np.arange(N) % N_FOLDS
    catalog = QTable(
        {
            "id": [f"c{i}" for i in range(N)],
            "ra_deg": rng.uniform(0, 360, N),
            "dec_deg": rng.uniform(-10, 60, N),
            "z": z,
            "log10_m500c": true + 0.12 * rng.standard_normal(N),
            "log10_m500c_err": np.full(N, 0.12),
            "richness": 40 * 10 ** (true - 14.3 + 0.12 * rng.standard_normal(N)),
            "richness_err": np.full(N, 4.0),
        }
    )
    if mock:
        catalog["log10_m500c_true"] = true
        catalog["richness_true"] = 40 * 10 ** (true - 14.3 + 0.08 * rng.standard_normal(N))
    estimate = 14.35 + 0.75 * (true - 14.35) + 0.18 * rng.standard_normal(N)
    out_of_fold = QTable(
        {"id": catalog["id"], "fold": fold, "log10_m500c": estimate, "log10_m500c_err": np.full(N, 0.22)}
    )
    shuffled = QTable({"id": catalog["id"], "log10_m500c": 14.35 + 0.05 * rng.standard_normal(N)})
    confusion = (100 * (0.6 * np.eye(5) + 0.08)).astype(int)
    facts = {"band_accuracy": 0.68, "band_confusion": confusion.tolist(), "bands": BANDS, "seconds": {"mock": 12.5}}
    facts |= {"pretraining_saw_test_images": False, "pixel_scale_arcsec_range": [5.81, 16.94]}
    metrics, predictions = evaluate(catalog, out_of_fold, shuffled, 1, facts)
    folder.write_json("metrics.json", metrics)
    predictions.write(folder / "predictions.ecsv", format="ascii.ecsv")
    folder.write_json(
        "pretrain.json",
        {
            "encoder": "small",
            "bands": BANDS,
            "band_accuracy": 0.68,
            "band_confusion": confusion.tolist(),
            "tested_on": "images that took no part",
            "n_images": 400,
            "store_checksum": "0123abcd",
        },
    )
    folder.write_json(
        "model.json",
        {
            "encoder": "small",
            "use_redshift": True,
            "z_range": [0.1, 0.4],
            "label_range": [13.3, 15.4],
            "prior": "the distribution of the training labels",
        },
    )
    folder.write_provenance(seed=1, checksums={"labelled store": "4567ef"})
    (folder / "config.toml").write_text(f'name = "example"\n[{"mock" if mock else "data"}]\n')
    with folder.stage("train", "key"):
        pass
    (folder / "maps").mkdir()
    for index, cluster_id in enumerate(ids):
        write_map(folder / "maps" / f"{index}.npz", cluster_id, 14.0 + 0.7 * index, rng)
    return folder


def write_map(
    path: Path, cluster_id: str, log10_m500c: float, rng: np.random.Generator, bands: str = BANDS, z: float = 0.25
) -> None:
    """A cluster of a few dozen round galaxies, its upper right corner without pixels."""
    n = 64
    y, x = np.mgrid[:n, :n]
    light = np.zeros((n, n))
    for _ in range(40):
        cx, cy, flux = *rng.normal(n / 2, 10, 2), rng.pareto(1.2) + 0.3
        light += flux * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 4)
    light += 20 * np.exp(-((x - n / 2) ** 2 + (y - n / 2) ** 2) / 8)
    scale = dict(zip("ugriz", (0.1, 0.4, 1.0, 1.5, 1.9), strict=True))
    flux = np.stack([scale[band] * light + 0.2 * rng.standard_normal((n, n)) for band in bands]).astype(np.float32)
    mask = np.zeros_like(flux, bool)
    mask[:, x + y > 1.8 * n] = True
    joint = 1e-3 * (light / light.max()) * np.sign(light - 1)
    np.savez_compressed(
        path,
        id=cluster_id,
        bands=bands,
        flux=flux,
        mask=mask,
        pixel_scale_arcsec=8.0,
        z=z,
        ra_deg=150.0,
        dec_deg=2.0,
        log10_m500c=log10_m500c,
        log10_m500c_err=0.2,
        integrated_gradients=np.stack([joint / len(bands)] * len(bands)) + 2e-5 * rng.standard_normal(flux.shape),
        cam=light / light.max() - 0.2,
        joint=joint,
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def mock_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, str]:
    folder = make_run(tmp_path_factory.mktemp("run") / "example")
    return folder, write_report(folder).read_text("utf-8")


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; tests of the words do without."""
    monkeypatch.setattr("pix2mass.report.run_page.data_uri", lambda *_: "data:,")


def test_the_page_is_well_formed_and_needs_nothing_from_outside(mock_run):
    _, html = mock_run
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        assert str(attributes.get("src", "data:")).startswith("data:")
        if "href" in attributes:
            assert tag == "a" and str(attributes["href"]).startswith(("https://arxiv.org/", "https://doi.org/"))
    assert "url(" not in html and "@import" not in html


def test_each_figure_has_a_text_in_its_place(mock_run):
    images = [attributes for tag, attributes in Page(mock_run[1]).tags if tag == "img"]
    assert len(images) == 1 + 4 + 2 + 1 + 2 * 4  # bars, masses, calibration, bands, two clusters of four
    assert all(len(str(image.get("alt", ""))) > 20 for image in images)


def test_every_method_stands_beside_the_network(mock_run):
    folder, html = mock_run
    page, metrics = Page(html), folder.read_json("metrics.json")
    assert set(metrics["methods"]) == set(METHODS)
    for name, text in METHODS.items():
        assert page.words.count(text) >= (2 if name == "network" else 3)  # two tables and the differences
        assert f"{metrics['methods'][name]['mae_dex']:.3f}" in html
    assert "Against the noisy label" in page.words and "Left out of this page" not in page.words


def test_summary_names_the_data_the_error_the_baselines_and_the_coverage(mock_run):
    words = Page(mock_run[1]).words
    metrics = mock_run[0].read_json("metrics.json")
    summary = words[: words.index("Methods side by side")]
    assert "Mock sky." in summary
    assert f"{metrics['mae_dex']:.3f} dex against the true mass of the mock" in summary
    assert f"richness and redshift {metrics['mae_richness_dex']:.3f}" in summary
    assert f"{metrics['coverage_68']:.2f} ± " in summary
    assert "(chance 0.20)" in summary
    assert "trained on other images than these" in words and "Pixels are 5.81 to 16.94 arcsec wide" in words


def test_reproduction_is_on_the_page(mock_run):
    words = Page(mock_run[1]).words
    for expected in ("0123abcd", "4567ef", "numpy", "the distribution of the training labels", 'name = "example"'):
        assert expected in words


@pytest.mark.usefixtures("without_figures")
def test_real_observations_are_called_so(tmp_path):
    words = Page(write_report(make_run(tmp_path / "real", mock=False)).read_text("utf-8")).words
    assert "Real observations." in words and "Mock sky." not in words
    assert "Against the measured label" in words and METHODS["richness_true"] not in words


@pytest.mark.usefixtures("without_figures")
def test_a_hostile_id_is_text(tmp_path):
    hostile = '<script>alert("x")</script>'
    html = write_report(make_run(tmp_path / "run", ids=(hostile,))).read_text("utf-8")
    assert "<script" not in html
    assert hostile in Page(html).words


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "name",
    ["config.toml", "metrics.json", "predictions.ecsv", "pretrain.json", "model.json", "provenance.json", "maps"],
)
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_a_missing_or_broken_part_is_named(mock_run, tmp_path, name, how):
    shutil.copytree(mock_run[0].path, tmp_path / "run")
    path = tmp_path / "run" / name
    if name == "maps":
        for file in path.glob("*.npz"):
            file.unlink() if how == "missing" else file.write_bytes(b"PK no zip")
    elif how == "missing":
        path.unlink()
    else:
        path.write_text('{"a": [')
    page = Page(write_report(RunFolder.open(tmp_path / "run")).read_text("utf-8"))
    left_out = page.words.partition("Left out of this page")[2]
    assert name in left_out[:1500]


def test_an_empty_run_gives_a_page(tmp_path):
    words = Page(write_report(RunFolder(tmp_path / "run")).read_text("utf-8")).words
    assert "This run has no scores yet." in words and "Mock or real: not stated." in words


def test_redshift_and_richness_may_be_unknown(tmp_path):
    folder = make_run(tmp_path / "run", ids=())
    table = QTable.read(folder / "predictions.ecsv", format="ascii.ecsv")
    table["z"], table["richness"] = np.nan, np.nan
    table.write(folder / "predictions.ecsv", format="ascii.ecsv", overwrite=True)
    write_map(folder / "maps" / "a.npz", "no redshift", 14.2, np.random.default_rng(1), z=np.nan)
    words = Page(write_report(folder).read_text("utf-8")).words
    assert "redshift is not known" in words and "richness is not known" in words and "z = –" in words


@pytest.mark.parametrize("bands", ["r", "gr", "gri", "riz", "ugriz"])
def test_clusters_are_drawn_in_any_bands(tmp_path, bands):
    folder = RunFolder(tmp_path / "run")
    (folder / "maps").mkdir()
    write_map(folder / "maps" / "a.npz", "any bands", 14.2, np.random.default_rng(1), bands=bands)
    page = Page(write_report(folder).read_text("utf-8"))
    alt = next(str(a["alt"]) for tag, a in page.tags if tag == "img" and str(a["alt"]).startswith("Image of"))
    assert ("grey" in alt) == (len(bands) < 3)


def test_a_map_with_the_wrong_shape_is_refused(tmp_path):
    write_map(tmp_path / "a.npz", "a", 14.0, np.random.default_rng(1))
    arrays = dict(np.load(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", **{**arrays, "cam": arrays["cam"][:, :10]})
    with pytest.raises(Pix2massError, match=r"b.npz: expected .* of shape"):
        ClusterMap.load(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", **{**arrays, "id": np.array({"a": 1}, dtype=object)})
    with pytest.raises(Pix2massError, match="c.npz: broken file"):  # never a pickle
        ClusterMap.load(tmp_path / "c.npz")


def test_overview_and_confusion_figures(mock_run, tmp_path):
    from matplotlib.image import imread

    overview_figure(mock_run[0], tmp_path / "overview.png")
    assert imread(tmp_path / "overview.png").shape[:2] == (700, 1600)
    confusion_figure(np.eye(3, dtype=int), "gri", tmp_path / "confusion.png")
    assert imread(tmp_path / "confusion.png").std() > 0.05
    with pytest.raises(Pix2massError, match=r"expected shape \(5, 5\)"):
        confusion_figure(np.eye(3, dtype=int), "ugriz", tmp_path / "confusion.png")
    with pytest.raises(Pix2massError, match=r"no predictions\.ecsv"):
        overview_figure(RunFolder(tmp_path / "empty"), tmp_path / "overview.png")


@pytest.mark.slow
def test_a_browser_opens_the_page_from_disk(mock_run, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=400,900"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={picture}",
            (mock_run[0] / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert picture.stat().st_size > 10_000
