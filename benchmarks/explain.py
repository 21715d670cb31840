"""Claim: the attribution maps mean something. Maps of mock clusters that network 2 has never seen, held against the
true light of members, field galaxies and stars, and against maps that know nothing.

Prints how complete integrated gradients are; what is left of a map when the weights are random or the labels shuffled;
how fast the prediction changes when pixels are blanked or shown in the order of a map; whom each method finds; and what
the network weighs: radius, colour, band, the brightest galaxy, empty sky. Errors are bootstraps over clusters.

Run: python benchmarks/explain.py [--run runs/demo] [--clusters 40] [--without-training]. Trains the run's recipe once
more, on shuffled labels (kept in RUN/shuffled), unless told not to.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.table import QTable
from captum.attr import LayerGradCam
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.stats import rankdata

from pix2mass.catalog import read_catalog
from pix2mass.config import MockConfig, TrainConfig, validate
from pix2mass.cosmology import kpc_per_arcsec, m_star_i_mag, r500c_kpc
from pix2mass.explain import DEFAULT_METHOD, METHODS, load_band_classifier
from pix2mass.explain.attribution import band_maps, mass_maps
from pix2mass.explain.blank_sky import blank_sky
from pix2mass.images.mock import population
from pix2mass.images.mock.render import render
from pix2mass.images.mock.source import MockSource, draw_camera
from pix2mass.model import ProcessRegressor, prepare
from pix2mass.pipeline import labelled_store
from pix2mass.predict import Predictor
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore
from pix2mass.train import train
from pix2mass.types import BANDS, EXTINCTION_PER_EBV, NANOMAGGY_ZEROPOINT_MAG, Pix2massError

STEPS = 64
SEED = 1
BOOTSTRAPS = 1000
CLASSES = {
    "brightest": "brightest galaxy",
    "red": "red members",
    "blue": "blue members",
    "diffuse": "intracluster light",
    "field": "field galaxies",
    "star": "stars",
}
GALAXIES = ("brightest", "red", "blue")
"""The classes that are member galaxies."""
OWN_LIGHT = 0.6
"""A pixel counts as a class's own where it gives at least this share of the true light."""
FAINTEST_SIGMA = 1.0
"""True light, all bands over their joint noise, below which a pixel is empty sky."""
LIGHT_EDGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, np.inf)
"""Bins in which galaxies and stars are matched: pixels of the same light, in units of the noise."""
RADIUS_EDGES = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.5)
"""Bins, in units of the cutout's half-width, in which they are matched also in radius."""
R500_EDGES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
COLOUR_EDGES = (-np.inf, -0.6, -0.3, -0.1, 0.1, 0.3, np.inf)
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of the pixels that are blanked or shown."""
CONTROLS = {"light": "light alone", "blob": "central blob", "random": "random map", "grad_cam": "Grad-CAM as published"}


@dataclass
class Case:
    """One cluster: what the networks see, what truly is there, and all maps.

    Attributes:
        images: (1, n_bands, h, w) normalised.
        valid: (1, h, w).
        noise: (1, n_bands) nanomaggies.
        z: (1,).
        blank: (n_draws, n_bands, h, w).
        truth: class -> (h, w) true light, sum of the bands over the noise of that sum.
        radius: (h, w) distance from the centre over the half-width.
        radius_r500: (h, w) the same over the true R500c.
        psf_px: (1,) mean sigma of the PSF in pixels.
        galaxies: columns of the galaxies that own their pixel: row, column, distance from the red sequence in g-r.
        maps: method or control -> (h, w), summed over bands.
        per_band: (n_bands,) integrated gradients, dex.
        found: what ``mass_maps`` returned.
    """

    images: torch.Tensor
    valid: torch.Tensor
    noise: torch.Tensor
    z: torch.Tensor
    blank: torch.Tensor
    truth: dict[str, np.ndarray]
    radius: np.ndarray
    radius_r500: np.ndarray
    psf_px: float
    galaxies: np.ndarray
    maps: dict[str, np.ndarray]
    per_band: np.ndarray
    found: dict[str, Any]

    @property
    def light(self) -> np.ndarray:
        """(h, w) all true light."""
        return self.light_of(*self.truth)

    def light_of(self, *classes: str) -> np.ndarray:
        """(h, w) true light of some classes."""
        return sum((self.truth[name] for name in classes), np.zeros(self.radius.shape))

    def own(self, *classes: str) -> np.ndarray:
        """(h, w) pixels whose light is mostly that of some classes."""
        return (self.light_of(*classes) > OWN_LIGHT * self.light) & (self.light > FAINTEST_SIGMA)


# ---- truth -----------------------------------------------------------------------------------------------------------


def true_light(source: MockSource, cluster: Any, noise: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Light of each class, (h, w) each, and the galaxies that own their pixel: row, column, colour distance.

    Args:
        source: the mock sky.
        cluster: a row of its catalogue.
        noise: (n_bands,) nanomaggies, of the cluster's cutout.
    """
    n, width = source.grid.n_pixels, source.width_arcsec(cluster)
    sources = population.galaxies(cluster, source.config, width + 30.0, source.seed, background=True)
    camera, _ = draw_camera(cluster, source.config, source.seed)
    extinction = camera.ebv_mag * np.array([EXTINCTION_PER_EBV[band] for band in BANDS])
    flux = 10 ** (-0.4 * (sources.mag + extinction - NANOMAGGY_ZEROPOINT_MAG))
    bands = [BANDS.index(band) for band in source.grid.bands]
    member = sources.is_member & ~sources.is_diffuse
    brightest = member & (sources.mag[:, 2] == np.min(sources.mag[member, 2], initial=np.inf))
    of_class = {
        "brightest": brightest,
        "red": member & sources.is_red & ~brightest,
        "blue": member & ~sources.is_red & ~brightest,
        "diffuse": sources.is_diffuse,
        "field": ~sources.is_member & ~sources.is_star & ~sources.is_diffuse,
        "star": sources.is_star,
    }

    def picture(chosen: np.ndarray) -> np.ndarray:
        if not chosen.any():
            return np.zeros((n, n))
        fwhm, components = camera.psf_fwhm_arcsec, source.config.physics.psf_components
        drawn = render(sources[chosen], flux[chosen], fwhm, n, width / n, psf_components=components)[bands]
        return (drawn / noise[:, None, None]).sum(axis=0) / np.sqrt(len(bands))

    light = {name: picture(chosen) for name, chosen in of_class.items()}
    total = sum(light.values())
    g_r = sources.mag[:, 1] - sources.mag[:, 2]
    ridge = np.median(g_r[member & sources.is_red]) if (member & sources.is_red).any() else np.nan
    listed = ~sources.is_star & ~sources.is_diffuse
    listed &= sources.mag[:, 3] < m_star_i_mag(float(cluster["z"])) + population.LUMINOUS_MAG
    scale = width / n
    column = np.floor((sources.x_arcsec + width / 2) / scale).astype(int)
    row = np.floor((sources.y_arcsec + width / 2) / scale).astype(int)
    listed &= (column >= 0) & (column < n) & (row >= 0) & (row < n)
    galaxies = []
    for k in np.flatnonzero(listed):
        own = (flux[k, bands] / noise).sum() / np.sqrt(len(bands))
        # Of its light, an unresolved source leaves about two thirds or more in its own pixel of several arcsec.
        if own > OWN_LIGHT * total[row[k], column[k]] > FAINTEST_SIGMA:
            galaxies.append((row[k], column[k], g_r[k] - ridge))
    return light, np.array(galaxies, float).reshape(-1, 3)


# ---- maps ------------------------------------------------------------------------------------------------------------


def grad_cam(
    predictor: Predictor, images: torch.Tensor, valid: torch.Tensor, noise: torch.Tensor, z: torch.Tensor
) -> np.ndarray:
    """Grad-CAM as published, with its sign: the activations times their gradients' means (h, w)."""
    total = np.zeros(images.shape[2:])
    for regressor in predictor.regressors:
        here = regressor.for_maps(images, valid, noise, z)
        low = LayerGradCam(here, here.tap).attribute(
            images, additional_forward_args=(valid, noise, z), relu_attributions=False
        )
        high = here.to_pixels(low.detach()[:, 0], (images.shape[2], images.shape[3]))
        total += high.sum(dim=0).numpy() / len(predictor.regressors)
    return total


def summed(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """The maps of all methods, each (h, w)."""
    maps = {name: found[name] for name in METHODS if name in found}
    return {name: values.sum(axis=0) if values.ndim == 3 else values for name, values in maps.items()}


def make_case(predictor: Predictor, store: ImageStore, source: MockSource, cluster: Any) -> Case:
    """All maps of one cluster."""
    row = int(store.rows([str(cluster["id"])])[0])
    flux, mask = store.batch([row])
    noise = torch.from_numpy(store.noise[[row]])
    images, valid = prepare(torch.from_numpy(flux), torch.from_numpy(mask), noise)
    z, blank = torch.tensor([store.z[row]], dtype=torch.float32), blank_sky(store, row, SEED)
    found = mass_maps(predictor, images, valid, noise, z, blank, STEPS, compare=True)
    truth, galaxies = true_light(source, cluster, store.noise[row])
    n = images.shape[-1]
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    radius = np.hypot(x, y) / (n / 2)
    kpc = radius * (n / 2) * store.pixel_scale_arcsec[row] * float(kpc_per_arcsec(store.z[row]))
    rng = np.random.default_rng([SEED, row])
    maps = {
        **summed(found),
        "light": (flux[0] / store.noise[row][:, None, None]).sum(axis=0),
        "blob": np.exp(-0.5 * (radius / 0.3) ** 2),
        "random": rng.standard_normal(radius.shape),
        "grad_cam": grad_cam(predictor, images, valid, noise, z),
        "input": (images[0] - blank.mean(dim=0)).abs().sum(dim=0).numpy(),
    }
    return Case(
        images=images,
        valid=valid,
        noise=noise,
        z=z,
        blank=blank,
        truth=truth,
        radius=radius,
        radius_r500=kpc / float(r500c_kpc(float(cluster["log10_m500c_true"]), store.z[row])),
        psf_px=float(np.nanmean(store.psf_fwhm_arcsec[row])) / 2.355 / float(store.pixel_scale_arcsec[row]),
        galaxies=galaxies,
        maps=maps,
        per_band=found["integrated_gradients"].sum(axis=(1, 2)),
        found=found,
    )


@torch.no_grad()
def random_weights(predictor: Predictor, cases: list[Case]) -> None:
    """Draw every weight of the networks anew; the scalers of labels and redshifts stay.

    A Gaussian process gives values far from all it knows the mean mass, whatever its weights: its values are brought
    back to the same mean and spread over the cases. What it has learnt, relevances and answers, is dealt anew.
    """
    torch.manual_seed(SEED)
    for regressor in predictor.regressors:
        for module in regressor.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        regressor.eval()
        if isinstance(regressor, ProcessRegressor):
            process = regressor.process
            values = torch.cat(
                [regressor.described(regressor.rescale(c.images, c.noise, c.z), c.valid, c.z).values for c in cases]
            )
            process.value_mean.copy_(values.mean(dim=0))
            process.value_scale.copy_(values.std(dim=0).clamp_min(1e-3))
            process.answer.copy_(process.answer[torch.randperm(len(process.answer))])
            for factors in process.log_factors:
                factors.copy_(factors[torch.randperm(len(factors))].clone())


def shuffled_run(run: RunFolder, store: ImageStore) -> Predictor:
    """The run's recipe trained on the labels of other clusters, and on nothing before: what a network that it starts
    from has learnt would stay."""
    folder = RunFolder(run / "shuffled")
    for name in ("encoder.safetensors", "pretrain.json", "provenance.json"):
        if (run / name).exists():
            shutil.copy(run / name, folder / name)
    if "pretrain" in run.stages:  # another network 1 makes another network 2
        folder.write_json("stages.json", {**folder.stages, "pretrain": run.stages["pretrain"]})
    catalog = read_catalog(run / "catalog.ecsv")
    order = np.random.default_rng(SEED).permutation(len(catalog))
    for name in ("log10_m500c", "log10_m500c_err"):
        catalog[name] = np.asarray(catalog[name])[order]
    fold = np.asarray(QTable.read(run / "folds.ecsv", format="ascii.ecsv")["fold"])
    config = run.read_config("train", TrainConfig).model_copy(update={"start_from": None})
    train(store, catalog, fold, folder, config, SEED)
    return Predictor(folder)


# ---- measures --------------------------------------------------------------------------------------------------------


def bootstrap(statistic: Callable[[np.ndarray], Any], n: int) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of n clusters, given their numbers, and its standard error."""
    rng = np.random.default_rng(SEED)
    draws = [statistic(rng.integers(n, size=n)) for _ in range(BOOTSTRAPS)]
    return np.asarray(statistic(np.arange(n))), np.nanstd(np.array(draws), axis=0)


def median_of(values: list[float]) -> tuple[float, float]:
    """Median and its standard error."""
    array = np.array(values)
    middle, error = bootstrap(lambda rows: np.nanmedian(array[rows]), len(array))
    return float(middle), float(error)


def correlation(case: Case, first: np.ndarray, second: np.ndarray, where: str = "pixels") -> float:
    """Rank correlation of two |maps|, smoothed to the PSF.

    Args:
        case: the cluster.
        first: a map (h, w).
        second: another one.
        where: "pixels" with light above 2 sigma; the same "at equal" radius and |image - blank sky|: of the ranks minus
            their straight-line dependence on the ranks of both, which any network that pools in rings and multiplies
            by its input brings along; or sums over 3 x 3 pixels of "galaxies", one value each: a network that looks at
            sources alone gives nothing to all other pixels, whatever its weights are.
    """
    maps = [gaussian_filter(np.abs(values), case.psf_px) for values in (first, second)]
    if where == "galaxies":
        row, column = case.galaxies[:, :2].astype(int).T
        ranks = [rankdata(uniform_filter(values, 3)[row, column]) for values in maps]
    else:
        bright = case.maps["light"] / np.sqrt(case.images.shape[1]) > 2.0
        ranks = [rankdata(values[bright]) for values in maps]
        if where == "at equal":
            others = (rankdata(v[bright]) for v in (case.radius, case.maps["input"]))
            known = np.stack([np.ones(bright.sum()), *others], 1)
            ranks = [values - known @ np.linalg.lstsq(known, values)[0] for values in ranks]
    return float(np.corrcoef(*ranks)[0, 1])


@torch.no_grad()
def curves(predictor: Predictor, case: Case, values: np.ndarray) -> tuple[float, float]:
    """Areas under the deletion and the insertion curve: the change of the prediction, over that from blank sky to the
    image, while pixels are blanked, or shown on blank sky, in the order of |map|. Larger is better."""
    order = torch.from_numpy(np.argsort(-np.abs(values), axis=None, kind="stable").copy())
    sky = case.blank[:1]
    stack = []
    for share in SHARES:
        chosen = torch.zeros(values.size, dtype=torch.bool)
        chosen[order[: round(share * values.size)]] = True
        chosen = chosen.reshape(values.shape)
        stack += [torch.where(chosen, sky, case.images), torch.where(chosen, case.images, sky)]
    images = torch.cat(stack)
    valid, z = case.valid.expand(len(images), -1, -1), case.z.expand(len(images))
    noise = case.noise.expand(len(images), -1)
    masses = [net(net.rescale(images, noise, z), valid, z)[0] for net in predictor.regressors]
    mass = torch.stack(masses).mean(dim=0).numpy()
    deleted, inserted = mass[0::2], mass[1::2]
    whole, empty = deleted[0], inserted[0]
    area = [np.trapezoid(change / (whole - empty), SHARES) for change in (whole - deleted, inserted - empty)]
    return float(area[0]), float(area[1])


class Tally:
    """Positive attribution of one method by pixel class, light and radius, per cluster."""

    def __init__(self, cases: list[Case], method: str) -> None:
        rows: list[dict[str, Any]] = []
        for case in cases:
            positive = np.clip(case.maps[method], 0, None)
            positive = positive / max(positive.sum(), 1e-30)
            light, radius = np.digitize(case.light, LIGHT_EDGES), np.digitize(case.radius, RADIUS_EDGES)
            cell = light * (len(RADIUS_EDGES) + 1) + radius
            size = (len(LIGHT_EDGES) + 1) * (len(RADIUS_EDGES) + 1)
            # Far from all sources the drawn light may be less than nothing by a rounding error.
            lit = np.maximum(case.light, FAINTEST_SIGMA)
            members = np.clip(case.light_of(*GALAXIES), 0, lit) / lit
            rows.append(
                {
                    name: np.array(
                        [np.bincount(cell[own], positive[own], size), np.bincount(cell[own], minlength=size)]
                    )
                    for name, own in (
                        ("member", case.own(*GALAXIES)),
                        ("field", case.own("field")),
                        ("star", case.own("star")),
                        ("all", np.ones(cell.shape, bool)),
                    )
                }
                | {"light": [(positive * members).sum(), (case.light * members).sum() / case.light.sum()]}
            )

        self.parts = {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _sum(self, rows: np.ndarray, name: str) -> np.ndarray:
        return self.parts[name][rows].sum(axis=0)

    def per_area(self, name: str) -> Callable[[np.ndarray], float]:
        """Share of the attribution on a class's own pixels over their share of the area."""

        def statistic(rows: np.ndarray) -> float:
            got, everything = self._sum(rows, name).sum(axis=1), self._sum(rows, "all").sum(axis=1)
            return (got[0] / everything[0]) / (got[1] / everything[1]) if got[1] else np.nan

        return statistic

    def matched(self, name: str, by_radius: bool = False) -> Callable[[np.ndarray], float]:
        """Attribution per pixel of members over that of another class's pixels of the same light (and radius)."""

        def statistic(rows: np.ndarray) -> float:
            member, other = self._sum(rows, "member"), self._sum(rows, name)
            if not by_radius:
                member, other = (v.reshape(2, len(LIGHT_EDGES) + 1, -1).sum(axis=2) for v in (member, other))
            both = (member[1] > 0) & (other[1] > 0)
            return member[0, both].sum() / (other[0, both] / other[1, both] * member[1, both]).sum()

        return statistic

    def per_light(self, rows: np.ndarray) -> float:
        """Share of the attribution on members, each pixel's dealt out by light, over their share of the light."""
        got = self._sum(rows, "light")
        return got[0] / got[1]


def profile(cases: list[Case], method: str) -> tuple[np.ndarray, np.ndarray]:
    """Net attribution per pixel in rings of R/R500c over its mean, (n_rings,), with errors."""
    rings = []
    for case in cases:
        ring, values = np.digitize(case.radius_r500, R500_EDGES) - 1, case.maps[method]
        inside = ring < len(R500_EDGES) - 1
        got = np.bincount(ring[inside], values[inside], len(R500_EDGES) - 1)
        pixels = np.bincount(ring[inside], minlength=len(R500_EDGES) - 1)
        rings.append((got / values.sum(), pixels / values.size))

    def statistic(rows: np.ndarray) -> np.ndarray:
        got, area = np.sum([rings[row] for row in rows], axis=0)
        return got / area

    return bootstrap(statistic, len(cases))


def by_colour(cases: list[Case], method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Net attribution of galaxies by distance from the red sequence in g-r, over the mean of all galaxies of their
    light and radius; errors; number of galaxies in each bin."""
    columns = []
    for number, case in enumerate(cases):
        row, column = case.galaxies[:, :2].astype(int).T
        light, radius = case.light[row, column], case.radius[row, column]
        cell = np.digitize(light, LIGHT_EDGES) * 100 + np.digitize(radius, RADIUS_EDGES)
        share = case.maps[method][row, column] / np.abs(case.maps[method]).sum()
        columns.append(np.stack([np.full(len(row), number), cell, case.galaxies[:, 2], share], axis=1))
    table = np.concatenate(columns)
    table = table[np.isfinite(table[:, 2])]
    _, cell = np.unique(table[:, 1], return_inverse=True)
    expected = np.bincount(cell, table[:, 3]) / np.bincount(cell)
    colour = np.digitize(table[:, 2], COLOUR_EDGES) - 1
    n_bins = len(COLOUR_EDGES) - 1
    per_cluster = np.zeros((len(cases), 2, n_bins))
    np.add.at(per_cluster, (table[:, 0].astype(int), 0, colour), table[:, 3])
    np.add.at(per_cluster, (table[:, 0].astype(int), 1, colour), expected[cell])

    def statistic(rows: np.ndarray) -> np.ndarray:
        got, mean = per_cluster[rows].sum(axis=0)
        return got / np.where(mean == 0, np.nan, mean)

    value, error = bootstrap(statistic, len(cases))
    return value, error, np.bincount(colour, minlength=n_bins)


def by_class(cases: list[Case], method: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per class, and for empty sky: shares of net attribution, of |attribution|, of light and of area."""
    shares: dict[str, list[list[float]]] = {name: [] for name in (*CLASSES, "sky")}
    for case in cases:
        values, light = case.maps[method], case.light
        sky = light <= FAINTEST_SIGMA
        for name in shares:
            lit = np.where(sky, np.inf, light)
            weight = sky.astype(float) if name == "sky" else case.truth[name] / lit
            shares[name].append(
                [
                    (values * weight).sum() / values.sum(),
                    (np.abs(values) * weight).sum() / np.abs(values).sum(),
                    (light * weight).sum() / light.sum(),
                    weight.mean(),
                ]
            )
    stacked = {name: np.array(values) for name, values in shares.items()}
    return {
        name: bootstrap(lambda rows, values=values: np.median(values[rows], axis=0), len(cases))
        for name, values in stacked.items()
    }


# ---- the table -------------------------------------------------------------------------------------------------------


def open_mock(folder: RunFolder) -> tuple[ImageStore, ImageStore, QTable, MockSource]:
    """Images of the labelled clusters; images, catalogue and sky of those that network 2 has never seen.

    Raises:
        Pix2massError: the run's images are not of this mock sky.
    """
    labelled = labelled_store(folder)
    if labelled.provenance.get("source") != "mock":
        raise Pix2massError(f"{folder.path}: expected a run on the mock sky, where the truth is known")
    survey = Path(labelled.path).parent
    store = ImageStore.open(survey / "unlabelled.zarr")
    catalog = read_catalog(survey / "unlabelled.ecsv")
    config = validate(MockConfig, labelled.provenance["config"], f"{labelled.path}: mock sky")
    source = MockSource(config, store.grid, int(labelled.provenance["seed"]))
    if not np.allclose(source.cutout(catalog[0]).flux, store.batch([0])[0][0], rtol=1e-3, atol=1e-3):
        raise Pix2massError(f"{labelled.path}: another version of the mock sky made it; run `pix2mass demo` again")
    return labelled, store, catalog, source


def speed(predictor: Predictor, store: ImageStore, rows: np.ndarray) -> tuple[float, float]:
    """Seconds per cluster for the default maps of the mass, and MB by which memory grows while all clusters are mapped
    a second time: more sources take more memory, so a first pass must see them all. Without the pages of the store
    that the system maps in."""
    seconds, memory = [], []
    for row in np.tile(rows, 2):
        flux, mask = store.batch([row])
        start = time.perf_counter()
        noise, z = torch.from_numpy(store.noise[[row]]), torch.tensor([store.z[row]], dtype=torch.float32)
        images, valid = prepare(torch.from_numpy(flux), torch.from_numpy(mask), noise)
        mass_maps(predictor, images, valid, noise, z, blank_sky(store, int(row), SEED), STEPS)
        seconds.append(time.perf_counter() - start)
        status = Path("/proc/self/status").read_text()
        memory.append(sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024)
    return float(np.median(seconds)), memory[-1] - memory[len(rows) - 1]


def show(value: float, error: float, digits: int = 2) -> str:
    """A number with its error."""
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Make the maps, measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--clusters", type=int, default=40)
    parser.add_argument("--without-training", action="store_true", help="leave out the networks on shuffled labels")
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    predictor, (labelled, store, catalog, source) = Predictor(run), open_mock(run)
    mass = np.asarray(catalog["log10_m500c_true"], float)
    order = np.argsort(mass)
    chosen = order[np.unique(np.linspace(0, len(mass) - 1, options.clusters).round().astype(int))]
    rows = store.rows([str(catalog["id"][index]) for index in chosen])
    seconds, growth = speed(predictor, store, rows)
    cases = []
    for index in chosen:
        cases.append(make_case(predictor, store, source, catalog[int(index)]))
    n = len(cases)
    scale = store.pixel_scale_arcsec[rows]
    print(
        f"{n} mock clusters that network 2 has not seen, log10 M500c {mass[chosen].min():.1f} to "
        f"{mass[chosen].max():.1f}, z {store.z[rows].min():.2f} to {store.z[rows].max():.2f}; {store.grid.n_pixels} "
        f'pixels of {scale.min():.1f}" to {scale.max():.1f}"; {len(predictor.regressors)} networks, {STEPS} steps '
        f"each; seed {SEED}\n"
    )
    default = DEFAULT_METHOD[predictor.info.get("network", "bands")]
    out: dict[str, Any] = {"clusters": n, "steps": STEPS, "default_method": default}

    # Completeness.
    difference = [abs(c.found["log10_m500c_networks"] - c.found["log10_m500c_blank_sky"]) for c in cases]
    missed = [c.found["completeness_error_dex"] / max(d, 0.05) for c, d in zip(cases, difference, strict=True)]
    out["completeness_error"], error = median_of(missed)
    print(f"completeness error of the mass   {show(out['completeness_error'], error, 4)}   target at most 0.01")
    print(f"   median difference from blank sky {np.median(difference):.2f} dex, worst error {max(missed):.4f}")
    classifier = load_band_classifier(run, predictor.grid)
    if classifier is not None:
        missed = []
        for case in cases:
            found = band_maps(classifier, case.images, case.noise, case.z, case.blank, STEPS)
            change = np.abs(found["log_odds"] - found["log_odds_blank_sky"])
            missed += (found["completeness_error"] / np.maximum(change, 0.05)).tolist()
        out["completeness_error_bands"], error = median_of(missed)
        print(f"completeness error of the band   {show(out['completeness_error_bands'], error, 4)}")
    print(f"{seconds:.2f} s per cluster, memory grows by {growth:.0f} MB in a second pass\n")
    out |= {"seconds_per_cluster": seconds, "memory_growth_mb": growth}

    # Do the maps depend on the weights, and on the labels?
    names = ("joint", "integrated_gradients", "cam")
    networks = {"random weights": Predictor(run)}
    random_weights(networks["random weights"], cases)
    if not options.without_training:
        networks["shuffled labels"] = shuffled_run(run, labelled)
    print(f"{'rank correlation with the |map| of':<38} " + " ".join(f"{METHODS[name]:>22}" for name in names))
    maps_of = {
        title: [summed(mass_maps(other, c.images, c.valid, c.noise, c.z, c.blank, STEPS)) for c in cases]
        for title, other in networks.items()
    }
    for title, found in maps_of.items():
        key = "randomised_correlation" if title == "random weights" else "shuffled_correlation"
        for where, suffix, label in (
            ("pixels", "", title),
            ("at equal", "_at_equal", "   at equal radius and |x - blank sky|"),
            ("galaxies", "_galaxies", "   over galaxies alone, one value each"),
        ):
            medians = {
                name: median_of(
                    [correlation(c, c.maps[name], f[name], where) for c, f in zip(cases, found, strict=True)]
                )
                for name in names
            }
            out[key + suffix] = medians[default][0]
            out[f"{key}{suffix}_by_method"] = {name: value for name, (value, _) in medians.items()}
            print(f"{label:<38} " + " ".join(f"{show(*medians[name]):>22}" for name in names))
    learnt = {name: [c.maps[name] for c in cases] for name in names}
    broken = {name: [f[name] for f in maps_of["random weights"]] for name in names}
    for key, label, maps, others in (
        ("input_only_correlation", "the image alone, |x - blank sky|", learnt, [c.maps["input"] for c in cases]),
        # What a map would have that showed the members and nothing else.
        (
            "truth_randomised_correlation",
            "true light of members, random weights",
            broken,
            [c.light_of(*GALAXIES) for c in cases],
        ),
    ):
        medians = {
            name: median_of([correlation(*pair) for pair in zip(cases, maps[name], others, strict=True)])
            for name in names
        }
        out[key] = medians[default][0]
        print(f"{label:<38} " + " ".join(f"{show(*medians[name]):>22}" for name in names))
    print("target for random weights: below 0.2\n")

    # Deletion and insertion; whom each method finds.
    print("area under the curve of deletion and insertion (larger is better); positive attribution on members, field")
    print(
        "galaxies and stars over their share of the area; members over their share of the light; per pixel of members"
    )
    print("over that of field galaxies and stars of the same light, and over field galaxies at the same radius too")
    head = (
        "deletion",
        "insertion",
        "member",
        "field",
        "star",
        "member/light",
        "member:field",
        "member:star",
        "same radius",
    )
    print(f"{'':<22} " + " ".join(f"{name:>14}" for name in head))
    deletion, insertion, tallies = {}, {}, {}
    for name, title in {**METHODS, **CONTROLS}.items():
        areas = np.array([curves(predictor, case, case.maps[name]) for case in cases])
        tally = tallies[name] = Tally(cases, name)
        columns = [
            *(bootstrap(lambda rows, area=area: area[rows].mean(), n) for area in areas.T),
            *(bootstrap(tally.per_area(kind), n) for kind in ("member", "field", "star")),
            bootstrap(tally.per_light, n),
            bootstrap(tally.matched("field"), n),
            bootstrap(tally.matched("star"), n),
            bootstrap(tally.matched("field", by_radius=True), n),
        ]
        deletion[name], insertion[name] = float(columns[0][0]), float(columns[1][0])
        out.setdefault("methods", {})[name] = {
            key.replace(":", "_over_").replace("/", "_per_").replace(" ", "_"): [float(v), float(e)]
            for key, (v, e) in zip(head, columns, strict=True)
        }
        print(f"{title:<22} " + " ".join(f"{show(float(v), float(e)):>14}" for v, e in columns))
    ratios = {name: out["methods"][name]["member_over_field"][0] for name in METHODS}
    best = max(ratios, key=lambda name: ratios[name])
    ours, light = out["methods"][default], out["methods"]["light"]
    print(f"finds members over field best: {METHODS[best]}; default: {METHODS[default]}; target at least 1.5")
    by_default, by_best = (tallies[name].matched("field") for name in (default, best))
    value, error = map(float, bootstrap(lambda rows: by_best(rows) / by_default(rows), n))
    print(f"the best over the default, on the same clusters: {show(value, error)}")
    out |= {
        "deletion_auc": {"map": deletion[default], "random": deletion["random"], "blob": deletion["blob"]},
        "insertion_auc": {"map": insertion[default], "random": insertion["random"], "blob": insertion["blob"]},
        "member_enrichment": ours["member"][0],
        "field_enrichment": ours["member"][0] / ours["member_over_field"][0],
        "light_enrichment": light["member"][0],
        "member_over_field": ours["member_over_field"],
        "light_member_over_field": light["member_over_field"],
        "member_over_field_same_radius": ours["same_radius"],
        "best_method": best,
        "best_over_default": [value, error],
    }

    # The trap.
    print(f"\nshare of |map| on empty sky (true light below {FAINTEST_SIGMA:g} sigma)")
    sky = [float((case.light <= FAINTEST_SIGMA).mean()) for case in cases]
    out["sky_area_share"] = median_of(sky)[0]
    print(f"{'area':<24} {show(*median_of(sky))}")
    for name in ("grad_cam", "cam", "joint", "integrated_gradients"):
        share = [
            float(np.abs(c.maps[name])[c.light <= FAINTEST_SIGMA].sum() / np.abs(c.maps[name]).sum()) for c in cases
        ]
        out[f"sky_share_{name}"] = median_of(share)[0]
        print(f"{ {**METHODS, **CONTROLS}[name]:<24} {show(*median_of(share))}")

    # What the network weighs.
    print("\nwho gets the attribution (medians over clusters; shares of the net sum, of |map|, of light, of area)")
    print(f"{'':<22} {'integrated gradients':^46} {'joint map':^31}")
    print(f"{'':<22} " + " ".join(f"{name:>14}" for name in ("net", "|map|", "light", "area", "net", "|map|")))
    gradients, joint = by_class(cases, "integrated_gradients"), by_class(cases, "joint")
    for name in (*CLASSES, "sky"):
        cells = [*zip(*gradients[name], strict=True), *list(zip(*joint[name], strict=True))[:2]]
        print(f"{CLASSES.get(name, 'empty sky'):<22} " + " ".join(f"{show(float(v), float(e)):>14}" for v, e in cells))
    out["net_share"] = {name: float(gradients[name][0][0]) for name in gradients}

    print(
        "\nnet attribution per pixel over the cluster's mean, by R / R500c (true), integrated gradients and joint map"
    )
    rings = {name: profile(cases, name) for name in ("integrated_gradients", "joint")}
    for k in range(len(R500_EDGES) - 1):
        cells = [show(float(rings[name][0][k]), float(rings[name][1][k])) for name in rings]
        print(f"{R500_EDGES[k]:>5.2f} to {R500_EDGES[k + 1]:<5.2f} " + " ".join(f"{cell:>16}" for cell in cells))
    out["by_radius"] = rings["integrated_gradients"][0].tolist()

    print(
        "\nnet integrated gradients of galaxies with i < m* + 1.75 by distance from the red sequence in g-r, over the"
    )
    print("mean of galaxies of their light and radius")
    value, error, number = by_colour(cases, "integrated_gradients")
    for k in range(len(COLOUR_EDGES) - 1):
        cell = show(float(value[k]), float(error[k]))
        print(f"{COLOUR_EDGES[k]:>5.1f} to {COLOUR_EDGES[k + 1]:<5.1f} {cell:>16}   {number[k]} galaxies")
    out["by_colour"] = value.tolist()

    print("\nnet integrated gradients per band, share of their sum")
    bands = np.array([case.per_band / case.per_band.sum() for case in cases])
    value, error = bootstrap(lambda rows: bands[rows].mean(axis=0), n)
    for k, band in enumerate(store.grid.bands):
        print(f"{band:<6} {show(float(value[k]), float(error[k])):>16}")
    out["by_band"] = dict(zip(store.grid.bands, value.tolist(), strict=True))
    print(json.dumps(out))


if __name__ == "__main__":
    main()
