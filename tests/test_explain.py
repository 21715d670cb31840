"""Attribution maps against answers worked out by hand, and against a trained network."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _toy import ToySource, toy_catalog
from astropy.io import fits
from astropy.wcs import WCS
from captum.attr import LayerGradCam
from scipy.stats import spearmanr

from pix2mass.config import GridConfig, PretrainConfig, TrainConfig
from pix2mass.cosmology import l_star_red_mag
from pix2mass.explain import METHODS, explain, load_band_classifier
from pix2mass.explain.attribution import mass_maps
from pix2mass.explain.blank_sky import blank_sky
from pix2mass.explain.files import file_name
from pix2mass.images.grid import target_wcs
from pix2mass.model import WholeImages, prepare
from pix2mass.predict import Predictor
from pix2mass.report import map_figure, write_map_figure
from pix2mass.run import RunFolder
from pix2mass.store import build
from pix2mass.train import pretrain, train
from pix2mass.types import Pix2massError


class HandMade(torch.nn.Module):
    """Features of each band's image, mass = 14 + sum over bands, features and pixels of weight x feature."""

    def __init__(self, weight: torch.Tensor, features) -> None:
        super().__init__()
        self.weight, self.features = weight, features
        self.encoder = SimpleNamespace(taps=torch.nn.ModuleList([torch.nn.Identity()]))
        self.tap = self.encoder.taps[0]

    def rescale(self, images, noise, z):
        return images

    def for_maps(self, images, valid, noise, z):
        return WholeImages(self)

    def forward(self, images, valid, z):
        n, n_bands, h, w = images.shape
        maps = self.tap(self.features(images.reshape(n * n_bands, 1, h, w)))
        return 14.0 + (maps.reshape(n, n_bands, -1, h, w) * self.weight[:, None]).sum(dim=(1, 2, 3, 4)), torch.ones(n)


def maps_of(images, blank, *networks, views=1, steps=8, **options):
    predictor = SimpleNamespace(regressors=networks, info={"views": views})
    valid, noise, z = torch.ones(1, *images.shape[2:]), torch.ones(1, images.shape[1]), torch.tensor([0.2])
    return mass_maps(predictor, images, valid, noise, z, blank, steps, **options)  # type: ignore[arg-type]


def double(images):
    return 2.0 * images


IMAGES = torch.tensor([[[[1.0, 0.0], [-1.0, 3.0]], [[0.0, 2.0], [0.0, 1.0]]]])
WEIGHT = torch.tensor([[[0.1, 0.1], [0.1, 0.1]], [[-0.2, -0.2], [-0.2, -0.2]]])


def test_maps_of_a_linear_network_worked_by_hand():
    blank = torch.tensor([0.5, -0.3])[:, None, None, None].expand(2, 2, 2, 2)
    maps = maps_of(IMAGES, blank, HandMade(WEIGHT, double), compare=True)
    # Mass = 14 + 2 x (0.1 x 3 - 0.2 x 3) = 13.4; of blank sky at 0.1 on average, 14 + 2 x 0.1 x (0.4 - 0.8) = 13.92.
    assert maps["log10_m500c_networks"] == pytest.approx(13.4, abs=1e-5)
    assert maps["log10_m500c_blank_sky"] == pytest.approx(13.92, abs=1e-5)
    gradients = (2 * WEIGHT * (IMAGES[0] - 0.1)).numpy()
    np.testing.assert_allclose(maps["integrated_gradients"], gradients, atol=1e-6)
    assert maps["integrated_gradients"].sum() == pytest.approx(13.4 - 13.92, abs=1e-5)
    assert maps["completeness_error_dex"] < 1e-5
    # The feature map is 2 x pixel, its gradient the weight: the class-activation map is the same, summed over bands.
    cam = gradients.sum(axis=0)
    np.testing.assert_allclose(maps["cam"], cam, atol=1e-6)
    np.testing.assert_allclose(maps["joint"], cam * np.abs(cam) / np.abs(cam).max(), atol=1e-6)
    for name in ("gradient", "smoothgrad"):
        np.testing.assert_allclose(maps[name], 2 * WEIGHT.numpy(), atol=1e-6)
    # Squares of one pixel, put in place of by the first draw of blank sky.
    np.testing.assert_allclose(maps["occlusion"], (2 * WEIGHT * (IMAGES[0] - 0.5)).sum(dim=0).numpy(), atol=1e-6)


def test_two_networks_are_averaged():
    images = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    networks = [HandMade(torch.full((1, 4, 4), value), double) for value in (0.1, 0.3)]
    maps = maps_of(images, torch.zeros(3, 1, 4, 4), *networks)
    np.testing.assert_allclose(maps["integrated_gradients"], 2 * 0.2 * images[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(maps["cam"], 2 * 0.2 * images[0, 0].numpy(), atol=1e-6)


def test_views_are_turned_back():
    images = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    weight = torch.arange(9.0).reshape(1, 3, 3)
    maps = maps_of(images, torch.zeros(8, 1, 3, 3), HandMade(weight, double), views=8)
    # Seen from all sides, corners, edges and the middle have the weights' means over all of their kind.
    expected = 2 * torch.tensor([[4.0, 4.0, 4.0]] * 3) * images[0, 0]
    np.testing.assert_allclose(maps["integrated_gradients"][0], expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(maps["cam"], expected.numpy(), atol=1e-5)
    two = maps_of(images, torch.zeros(8, 1, 3, 3), HandMade(weight, double), views=2)
    # View 1 turns the image by a quarter: the pixel in row r, column c meets the weight in row 2 - c, column r.
    seen = (weight[0] + torch.rot90(weight[0], -1)) / 2
    np.testing.assert_allclose(two["cam"], (2 * seen * images[0, 0]).numpy(), atol=1e-5)
    np.testing.assert_allclose(two["integrated_gradients"][0], (2 * seen * images[0, 0]).numpy(), atol=1e-5)


def test_the_activation_map_lies_on_the_source_where_grad_cam_lies_on_empty_sky():
    def emptiness(images):
        """Lit by empty sky, dark on sources: the mass is what is missing of it."""
        return torch.relu(1.0 - images)

    images = torch.full((1, 1, 8, 8), 0.1)
    images[0, 0, 2:4, 5:7] = 4.0
    network = HandMade(torch.full((1, 8, 8), -0.05), emptiness)
    source = images[0, 0].numpy() > 1
    valid, z = torch.ones(1, 8, 8), torch.tensor([0.2])
    method = LayerGradCam(lambda *inputs: network(*inputs)[0], network.tap)
    published = method.attribute(images, additional_forward_args=(valid, z), relu_attributions=False)
    published = published.detach().numpy()[0, 0]
    assert np.abs(published[source]).sum() == 0 and (published[~source] < -0.04).all()
    maps = maps_of(images, torch.full((4, 1, 8, 8), 0.1), network, steps=400)
    np.testing.assert_allclose(maps["cam"][~source], 0.0, atol=1e-6)
    # Where the source is, the feature has gone dark: its local gradient is that of the weight alone.
    np.testing.assert_allclose(maps["cam"][source], 0.05 * 0.9, atol=1e-6)
    assert maps["joint"][source].min() > 0 and np.abs(maps["joint"][~source]).max() < 1e-6
    assert maps["integrated_gradients"].sum() == pytest.approx(4 * 0.05 * 0.9, rel=0.01)


# ---- blank sky -------------------------------------------------------------------------------------------------------


class Sky(SimpleNamespace):
    """What blank_sky needs of a store."""

    def batch(self, rows):
        return self.flux[rows], self.mask[rows]


def sky(n: int, level: float, seed: int) -> Sky:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, 1, 32, 32))
    flux = 2.0 * (level + 0.8 * shared + 0.6 * rng.standard_normal((n, 2, 32, 32))).astype(np.float32)
    flux[:, :, 10:20, 12:22] += 60.0
    return Sky(
        flux=flux,
        mask=np.zeros(flux.shape, bool),
        noise=np.full((n, 2), 2.0, np.float32),
        ids=[f"sky-{i}" for i in range(n)],
        pixel_scale_arcsec=np.linspace(4.0, 6.0, n),
    )


def test_blank_sky_has_the_stores_sky_and_no_source():
    store = sky(6, 0.3, 1)
    store.mask[2, 1, :, :5] = True
    store.noise[4, 0] = np.nan
    blank = blank_sky(store, 2, seed=1, draws=8)  # type: ignore[arg-type]
    assert blank.shape == (8, 2, 32, 32)
    seen = np.sinh(blank[:, :, :, 5:].numpy())
    assert seen.mean() == pytest.approx(0.3, abs=0.05) and seen.std() == pytest.approx(1.0, abs=0.05)
    assert seen.max() < 6, "the source is not in it"
    first, second = (seen[:, band].ravel() for band in (0, 1))
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.64, abs=0.05), "what bands share stays shared"
    assert (blank[:, 1, :, :5] == 0).all() and (blank[:, 0, :, :5] != 0).any()
    assert torch.equal(blank, blank_sky(store, 2, seed=1, draws=8))  # type: ignore[arg-type]
    assert not torch.equal(blank, blank_sky(store, 2, seed=2, draws=8))  # type: ignore[arg-type]


def test_a_store_of_one_gives_its_own_sky():
    blank = blank_sky(sky(1, 0.0, 3), 0, seed=1, draws=3)  # type: ignore[arg-type]
    assert blank.shape == (3, 2, 32, 32) and float(blank.max()) < np.arcsinh(6)


# ---- a trained network -----------------------------------------------------------------------------------------------


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
    train(store, catalog, np.arange(60) % 2, folder, TrainConfig(epochs=20, folds=2, views=2, accelerator="cpu"), 1)
    return folder, store, catalog


def load(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_maps_of_a_trained_network_are_complete_and_find_the_blob(trained):
    folder, store, catalog = trained
    heavy = str(catalog["id"][np.argmax(catalog["log10_m500c_true"])])
    (path,) = explain(folder, store, [heavy], steps=300, compare=True)
    maps = load(path)
    difference = float(maps["log10_m500c_networks"] - maps["log10_m500c_blank_sky"])
    assert difference > 0.3, "a cluster weighs more than blank sky"
    assert maps["integrated_gradients"].sum() == pytest.approx(difference, rel=0.01)
    assert maps["completeness_error_dex"] == pytest.approx(
        abs(maps["integrated_gradients"].sum() - difference), abs=1e-4
    )
    y, x = np.mgrid[:16, :16] - 7.5
    inside = np.hypot(x, y) < 5
    for name in ("joint", "cam"):
        share = np.abs(maps[name])[inside].sum() / np.abs(maps[name]).sum()
        assert share > 2 * inside.mean(), f"{name}: the blob in the middle carries the mass"
    assert str(maps["id"]) == heavy and str(maps["bands"]) == "gri" and str(maps["default_method"]) == "joint"
    assert {*METHODS, *(f"band_{name}" for name in METHODS)} <= set(maps)
    for name in METHODS:
        assert maps[f"band_{name}"].shape == (3, 16, 16), name


def test_maps_of_the_network_of_galaxies_are_complete_and_lie_on_the_sources(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("pix2mass.galaxies._STEPS", (150, 150))
    _, store, catalog = trained
    folder = RunFolder(tmp_path / "run")
    train(store, catalog, np.arange(60) % 2, folder, TrainConfig(network="galaxies", folds=2), 1)
    folder.write_provenance(1)
    heavy = str(catalog["id"][np.argmax(catalog["log10_m500c_true"])])
    maps = load(explain(folder, store, [heavy], steps=500, compare=True)[0])
    difference = float(maps["log10_m500c_networks"] - maps["log10_m500c_blank_sky"])
    assert difference > 0.3, "a cluster weighs more than blank sky"
    assert maps["integrated_gradients"].sum() == pytest.approx(difference, rel=0.01)
    y, x = np.mgrid[:16, :16] - 7.5
    for name in ("joint", "cam"):
        assert np.abs(maps[name])[np.hypot(x, y) < 5].sum() > 0.5 * np.abs(maps[name]).sum(), name
    assert not any(name.startswith("band_") for name in maps), "there is no network 1"
    assert str(maps["default_method"]) == "cam"


def test_maps_in_other_units_explain_the_same_band(trained, tmp_path):
    _, store, catalog = trained
    folder = RunFolder(tmp_path / "run")
    pretrain(store, folder, PretrainConfig(epochs=1, units="l-star", accelerator="cpu"), 1)
    train(store, catalog, np.arange(60) % 2, folder, TrainConfig(network="gaussian-process", folds=2), 1)
    folder.write_provenance(1)
    heavy = str(catalog["id"][np.argmax(catalog["log10_m500c_true"])])
    maps = load(explain(folder, store, [heavy], steps=20)[0])
    assert np.isfinite(maps["joint"]).all() and maps["joint"].any()
    row = store.rows([heavy])
    images = torch.from_numpy(store.batch(row)[0])  # light in the units of network 1, worked out anew
    z, pixel_kpc = float(store.z[row[0]]), store.grid.width_kpc / store.grid.n_pixels
    unit = 10 ** (-0.4 * (l_star_red_mag(z)[1:4] - 22.5)) * pixel_kpc / 160
    classifier = load_band_classifier(folder, store.grid)
    assert classifier is not None
    with torch.no_grad():
        seen = torch.asinh(images[0] / torch.tensor(unit, dtype=torch.float32)[:, None, None])
        share = classifier(seen[:, None]).softmax(dim=1).diagonal()
    np.testing.assert_allclose(maps["band_log_odds"], torch.logit(share).numpy(), rtol=2e-2, atol=2e-2)


def test_band_maps_explain_the_odds_of_the_true_band(trained):
    folder, store, catalog = trained
    name = str(catalog["id"][5])
    maps = load(explain(folder, store, [name], steps=128)[0])
    row = store.rows([name])
    flux, mask = store.batch(row)
    images, _ = prepare(*(torch.from_numpy(values) for values in (flux, mask, store.noise[row])))
    classifier = load_band_classifier(folder, store.grid)
    assert classifier is not None
    with torch.no_grad():
        share = classifier(images[0][:, None]).softmax(dim=1).diagonal()
    np.testing.assert_allclose(maps["band_log_odds"], torch.logit(share).numpy(), rtol=1e-3, atol=1e-3)
    difference = maps["band_log_odds"] - maps["band_log_odds_blank_sky"]
    missed = maps["band_integrated_gradients"].sum(axis=(1, 2)) - difference
    assert (np.abs(missed) <= 0.02 * np.maximum(np.abs(difference), 0.5)).all()


def test_random_weights_change_the_map(trained):
    folder, store, catalog = trained
    row = store.rows([str(catalog["id"][np.argmax(catalog["log10_m500c_true"])])])
    flux, mask = store.batch(row)
    noise = torch.from_numpy(store.noise[row])
    images, valid = prepare(torch.from_numpy(flux), torch.from_numpy(mask), noise)
    z = torch.tensor(store.z[row], dtype=torch.float32)
    known, broken = Predictor(folder), Predictor(folder)
    torch.manual_seed(1)
    for module in (module for regressor in broken.regressors for module in regressor.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    y, x = np.mgrid[:16, :16] - 7.5
    maps = [
        mass_maps(predictor, images, valid, noise, z, blank_sky(store, int(row[0]), seed), 64)["joint"][
            np.hypot(x, y) < 6
        ]
        for predictor, seed in ((known, 1), (known, 2), (broken, 1))
    ]
    assert spearmanr(maps[0], maps[1]).statistic > 0.8, "other draws of blank sky change little"
    assert spearmanr(maps[0], maps[2]).statistic < 0.4


def test_fits_has_the_cutouts_wcs_and_every_map(trained):
    folder, store, catalog = trained
    name = str(catalog["id"][3])
    (path,) = explain(folder, store, [name], steps=2)
    row, maps = store.rows([name])[0], load(path)
    expected = target_wcs(store.ra_deg[row], store.dec_deg[row], store.pixel_scale_arcsec[row], 16)
    with fits.open(path.with_suffix(".fits")) as hdus:
        assert hdus[0].header["OBJECT"] == name and hdus[0].header["BESTMAP"] == "joint"
        assert hdus[0].header["LOGM_NET"] == pytest.approx(float(maps["log10_m500c_networks"]))
        for map_name in ("flux", "integrated_gradients", "cam", "joint", "band_joint"):
            hdu = hdus[map_name]
            np.testing.assert_array_equal(hdu.data, maps[map_name])
            pixels = np.array([[0.0, 0.0], [15.0, 0.0], [3.0, 12.0]])
            sky = WCS(hdu.header).celestial.all_pix2world(pixels, 0)
            np.testing.assert_allclose(sky, expected.all_pix2world(pixels, 0), rtol=0, atol=1e-9)
        assert hdus["joint"].header["BUNIT"] == "dex/pixel"
        assert hdus["flux"].header["BUNIT"] == "nanomaggy/pixel"


def test_the_figure_shows_every_map(trained):
    folder, store, catalog = trained
    (path,) = explain(folder, store, [str(catalog["id"][9])], steps=2, compare=True)
    titles = [ax.get_title() for ax in map_figure(path).axes if ax.get_title()]
    assert len(titles) == 4 + 3 + 3 + 3 and len(map_figure(load(path)).axes) == len(map_figure(path).axes)
    bare = {name: values for name, values in load(path).items() if not name.startswith("band_")}
    for name in ("gradient", "smoothgrad", "occlusion"):
        bare.pop(name)
    assert len([ax for ax in map_figure(bare).axes if ax.get_title()]) == 4 + 3
    bare.pop("joint")
    with pytest.raises(Pix2massError, match="joint is missing"):
        map_figure(bare)


def test_an_id_that_is_no_mathematics_is_drawn_as_it_stands(trained, tmp_path):
    folder, store, catalog = trained
    (path,) = explain(folder, store, [str(catalog["id"][9])], steps=2)
    renamed = {**load(path), "id": r"A$\frac$3"}
    assert write_map_figure(renamed, tmp_path / "map.png").stat().st_size > 0


def test_ids_do_not_leave_the_folder_and_blank_cutouts_are_refused(trained):
    folder, store, _ = trained
    (path,) = explain(folder, store, ["../up/and away"], steps=2)
    assert path.parent == folder / "maps" and path.exists() and path.with_suffix(".fits").exists()
    with pytest.raises(Pix2massError, match="outside-0: the cutout has no usable pixels"):
        explain(folder, store, ["outside-0"])
    with pytest.raises(Pix2massError, match="not in the store: nobody"):
        explain(folder, store, ["nobody"])


def test_a_missing_redshift_is_no_redshift_of_nought(trained, tmp_path):
    folder, store, _ = trained
    catalog = toy_catalog(3, 5)
    catalog["z"][1] = np.nan
    other = build(catalog, ToySource(store.grid), tmp_path / "noz.zarr", store.grid)
    with pytest.raises(Pix2massError, match="1 clusters have no redshift.*toy-1"):
        explain(folder, other, ["toy-0", "toy-1"], steps=2)
    assert explain(folder, other, ["toy-0"], steps=2)


def test_maps_of_packaged_weights_do_not_go_into_the_package(tmp_path):
    grid = Predictor("default").grid
    store = build(toy_catalog(2, 6), ToySource(grid), tmp_path / "fine.zarr", grid)
    with pytest.raises(Pix2massError, match="packaged weights.*where to write"):
        explain("default", store, ["toy-0"], steps=2)
    (path,) = explain("default", store, ["toy-0"], steps=2, out=tmp_path / "maps")
    assert path.parent == tmp_path / "maps"


def test_any_id_makes_a_name_of_its_own():
    names = [file_name(text) for text in ("RMJ222655.7-005503.6", "a/b", "..", "é" * 64, "é" * 63 + "è", "a\0b")]
    assert names[0] == "RMJ222655.7-005503.6" and len(set(names)) == len(names)
    assert all("/" not in name and "\0" not in name and len(name.encode()) < 240 for name in names)
