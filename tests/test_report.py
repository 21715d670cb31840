"""The report: complete, self-contained, safe, and honest about what a run folder lacks."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from _run_folder import N, make_run, write_map
from astropy.table import QTable

from pix2mass.report import METHODS, ClusterMap, OutOfFold, confusion_figure, map_figure, overview_figure, write_report
from pix2mass.report.cluster_map import for_display
from pix2mass.run import RunFolder
from pix2mass.types import Pix2massError

N_MAPS = 3
VOID = {"meta", "img", "link", "br", "hr", "input"}


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
        if not {"style", "script"} & set(self.open):
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
    for module in ("run_figures", "cluster_map"):
        monkeypatch.setattr(f"pix2mass.report.{module}.data_uri", lambda *_: "data:,")
    monkeypatch.setattr("pix2mass.report.run_page.map_figure", lambda _: None)
    monkeypatch.setattr("pix2mass.report.run_page.figure_uri", lambda _: "data:,")


def test_the_page_is_well_formed_and_needs_nothing_from_outside(mock_run):
    _, html = mock_run
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed"}
        assert str(attributes.get("src", "data:")).startswith("data:")
        if "href" in attributes:
            assert tag == "a" and str(attributes["href"]).startswith(("https://arxiv.org/", "https://doi.org/", "#"))
    assert "url(" not in html and "@import" not in html


def test_no_script_but_its_own_may_run(mock_run):
    """The page's policy names its one script by its hash, so that nothing a catalogue smuggles in is ever run."""
    _, html = mock_run
    assert html.count("<script") == 1
    script = html.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_each_figure_has_a_text_in_its_place(mock_run):
    images = [attributes for tag, attributes in Page(mock_run[1]).tags if tag == "img"]
    assert len(images) == 1 + 4 + 3 + 1 + 1 + N_MAPS * 5  # bars, masses, calibration, learning, bands, maps
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
    assert mock_run[1].partition('aria-label="Summary">')[2].partition("</section>")[0].count("<p>") == 3
    assert "(chance 0.20)" in words
    assert "trained on other images than these" in words and "Pixels are 5.81 to 16.94 arcsec wide" in words


def test_the_gallery_has_the_worst_a_typical_and_the_best_cluster(mock_run):
    folder, html = mock_run
    table = QTable.read(folder / "predictions.ecsv")
    error = np.abs(table["log10_m500c"] - table["log10_m500c_true"])
    order = [str(name) for name in table["id"][np.argsort(error)]]
    words = Page(html).words.partition("What the networks looked at")[2].partition("All clusters")[0]
    worst, typical, best = (words.index(f"{title}: ") for title in ("Worst", "Typical", "Best"))
    assert worst < words.index(f" {order[-1]} ") < typical < words.index(f" {order[N // 2 - 1]} ") < best
    assert best < words.index(f" {order[0]} ") and "Also mapped" not in words
    assert f"number 1 of {N} in the order of errors" in words[worst:typical]
    assert f"number {N} of {N} in the order of errors" in words[best:]
    assert "PARTLY_OUTSIDE: part of the cutout lies outside the images" in words[worst:typical]
    assert "Nothing is flagged." in words[typical:best]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, N, N + 5])
def test_a_gallery_of_any_size_holds_the_smaller_ones(mock_run, n):
    out_of_fold = OutOfFold.read(mock_run[0])
    small, large = out_of_fold.gallery(n), out_of_fold.gallery(n + 1)
    chosen = [name for names in small.values() for name in names]
    assert len(chosen) == len(set(chosen)) == min(n, N)
    assert all(large[kind][: len(names)] == names for kind, names in small.items() if n < N)


def test_calibration_and_learning_curve_are_drawn_where_the_run_has_them(mock_run):
    alts = [str(attributes["alt"]) for tag, attributes in Page(mock_run[1]).tags if tag == "img"]
    calibration = mock_run[0].read_json("metrics.json")["calibration"]
    counts = ", ".join(str(count) for count in calibration["pit"])
    assert any(f"{counts} in 10 equal bins; flat would be 12" in alt for alt in alts)
    points = "0.300 with 30, 0.252 with 60, 0.212 with 120. Fitted power of the number: -0.25 ± 0.03."
    richness = "Richness and redshift, fitted to as many: 0.200, 0.200, 0.200."
    assert any(f"{points} {richness}" in alt for alt in alts)
    words = Page(mock_run[1]).words
    rows = words.partition("clusters number 68% interval 95% interval target ")[2].partition("Continuous ranked")[0]
    everything, true_mass = calibration["coverage"][0], calibration["coverage"][-1]
    met = "met" if everything["met"] else "missed"
    assert rows.startswith(f"all clusters {N} {everything['coverage_68']:.3f} ± {everything['coverage_68_error']:.3f} ")
    assert f" {everything['coverage_95']:.3f} ± {everything['coverage_95_error']:.3f} {met} predicted 1" in rows
    assert f"true mass {true_mass['low']:.2f} to {true_mass['high']:.2f} {true_mass['n']} " in rows
    assert rows.rstrip().endswith("none")
    assert "no calibration" not in words and "no learning curve" not in words


@pytest.mark.usefixtures("without_figures")
def test_a_run_without_calibration_and_learning_curve_says_so(mock_run, tmp_path):
    shutil.copytree(mock_run[0].path, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    (folder / "learning_curve.json").unlink()
    metrics = folder.read_json("metrics.json")
    del metrics["calibration"]
    folder.write_json("metrics.json", metrics)
    words = Page(write_report(folder).read_text("utf-8")).words
    assert "This run has no calibration in bins" in words and "This run has no learning curve" in words
    assert f"The 68% interval holds {metrics['coverage_68']:.3f}" in words


@pytest.mark.usefixtures("without_figures")
def test_a_network_of_galaxies_is_not_asked_for_network_1(mock_run, tmp_path):
    shutil.copytree(mock_run[0].path, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    (folder / "pretrain.json").unlink()
    folder.write_json("model.json", {**folder.read_json("model.json"), "network": "galaxies"})
    words = Page(write_report(folder).read_text("utf-8")).words
    assert "there is no network 1" in words and "are of the network fitted to all labels" in words
    assert "pretrain.json" not in words and "band confusion" not in words and "Network 1 was" not in words


def test_reproduction_is_on_the_page(mock_run):
    folder, words = mock_run[0], Page(mock_run[1]).words
    assert hashlib.sha256((folder / "predictions.ecsv").read_bytes()).hexdigest() in words
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
    assert hostile not in html and html.count("<script") == 1
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


@pytest.mark.parametrize(("method", "title"), [("joint", "Joint map"), ("cam", "Class-activation map")])
def test_the_map_to_look_at_first_comes_first(tmp_path, method, title):
    folder = RunFolder(tmp_path / "run")
    (folder / "maps").mkdir()
    write_map(folder / "maps" / "a.npz", "a", 14.2, np.random.default_rng(1), default_method=method)
    page = Page(write_report(folder).read_text("utf-8"))
    alts = [str(a["alt"]) for tag, a in page.tags if tag == "img" and " of a: " in str(a["alt"])]
    assert [alt.partition(" of a: ")[0] for alt in alts][:2] == ["Image", title]
    assert ["contours: light" in alt for alt in alts[:4]] == [False, True, False, False]
    first, second = map_figure(folder / "maps" / "a.npz").axes[:2]
    assert first.get_title().split() == f"image, contours of the {title.lower()}".split()
    assert second.get_title().split() == f"{title.lower()}, contours of the light".split()
    (shown,) = second.images
    expected = np.load(folder / "maps" / "a.npz")[method]
    seen = np.asarray(shown.get_array())
    usable = np.isfinite(seen)
    assert np.corrcoef(seen[usable], expected[usable])[0, 1] > 0.999


def test_an_unknown_map_to_look_at_first_is_refused(tmp_path):
    write_map(tmp_path / "a.npz", "a", 14.0, np.random.default_rng(1), default_method="__class__")
    with pytest.raises(Pix2massError, match=r"a.npz: expected default_method of joint, .* got '__class__'"):
        ClusterMap.load(tmp_path / "a.npz")


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


def test_maps_with_values_at_few_pixels_are_smoothed_for_the_eye_and_others_are_not():
    sparse = np.zeros((128, 128))
    sparse[60, 40], sparse[60, 80] = 2.0, -1.0
    shown, smoothed = for_display(sparse)
    assert smoothed and shown.sum() == pytest.approx(1.0)
    assert shown[60, 42] > 0 > shown[60, 82] and np.abs(shown[:30]).max() < 1e-6
    dense = np.random.default_rng(1).standard_normal((128, 128))
    dense[0, 0] = np.nan
    np.testing.assert_array_equal(for_display(dense)[0], dense)
    assert np.isnan(for_display(dense, smoothing_px=0.8)[0][0, 0])
