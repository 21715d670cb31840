"""The mock sky held against real SDSS data."""

from __future__ import annotations

import bz2
import io
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table, vstack
from scipy.spatial import cKDTree

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.mock import population
from pix2mass.images.mock.source import MockSource
from pix2mass.images.mock.templates import templates
from pix2mass.richness import m_star_i_mag
from pix2mass.types import BANDS

FIELD_AREA_DEG2 = 3.36
SKY = MockConfig().physics


def columns(table: Table) -> dict[str, np.ndarray]:
    return {
        "ra_deg": np.asarray(table["RA"], float),
        "dec_deg": np.asarray(table["DEC"], float),
        "mag": np.asarray(table["MAG"], float),
        "mag_err": np.asarray(table["MAG_ERR"], float),
        "ref_mag": np.asarray(table["REFMAG"], float),
    }


@pytest.fixture(scope="module")
def photometry(real_data: Path) -> Path:
    return real_data / "photometry"


@pytest.fixture(scope="module")
def field(photometry: Path) -> dict[str, np.ndarray]:
    parts = sorted((photometry / "dr8_field").glob("dr8_test_galaxies_00*.fit"))
    return columns(vstack([Table.read(part) for part in parts], metadata_conflicts="silent"))


@pytest.fixture(scope="module")
def red_galaxies(photometry: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Satellites with P > 0.8 and certain centrals, with redshifts."""
    satellites = Table.read(photometry / "test_dr8_trainredseq_gals.fit")
    satellites = satellites[satellites["P"] > 0.8]
    centrals = Table.read(photometry / "test_dr8_centcalcat.fit")
    centrals = centrals[np.asarray(centrals["P_CEN"])[:, 0] > 0.8]
    both = [columns(satellites), columns(centrals)]
    z = np.concatenate([np.asarray(satellites["Z"], float), np.asarray(centrals["Z"], float)])
    return {name: np.concatenate([part[name] for part in both]) for name in both[0]}, z


@pytest.fixture(scope="module")
def mock_field() -> tuple[dict[str, np.ndarray], float]:
    rows = [{"id": f"real{i}", "z": 0.25} for i in range(12)]
    sources = [population.galaxies(row, MockConfig(), 1800.0, 1) for row in rows]
    # The reddening of the real field.
    catalogues = [population.observe(s, row, 1, ebv_mag=0.09) for s, row in zip(sources, rows, strict=True)]
    for i, catalogue in enumerate(catalogues):
        catalogue["ra_deg"] = (catalogue["ra_deg"] + 180.0) % 360.0 + 2.0 * i
    return {k: np.concatenate([c[k] for c in catalogues]) for k in catalogues[0]}, len(rows) * 0.25


def test_red_sequence_of_the_mock_is_the_real_one(red_galaxies):
    galaxies, z = red_galaxies
    colours = -np.diff(galaxies["mag"], axis=1)[:, 1:]
    dm = galaxies["ref_mag"] - m_star_i_mag(z)
    slope = np.array(SKY.red_colour_slope)[1:] * dm[:, None]
    expected = -np.diff(templates(SKY.red_colour_offset_mag).red_magnitudes(z), axis=1)[:, 1:] + slope
    for low in np.arange(0.10, 0.32, 0.04):
        chosen = (z > low) & (z < low + 0.04)
        offset = np.median((colours - expected)[chosen], axis=0)
        assert np.all(np.abs(offset) < [0.03, 0.02, 0.02]), f"z {low:.2f}: {offset}"


def test_counts_of_field_galaxies(field, mock_field):
    mock, area = mock_field
    for low, tolerance in ((18.0, 0.25), (18.5, 0.25), (19.0, 0.2), (19.5, 0.2)):
        real_count = np.sum((field["mag"][:, 3] > low) & (field["mag"][:, 3] < low + 0.5)) / FIELD_AREA_DEG2
        mock_count = np.sum((mock["mag"][:, 3] > low) & (mock["mag"][:, 3] < low + 0.5)) / area
        assert mock_count == pytest.approx(real_count, rel=tolerance), f"i {low}"


def test_faint_galaxies_and_close_pairs_are_missing_as_in_the_real_catalogue(field, mock_field):
    mock, area = mock_field
    # Poisson errors of the counts are 2-4%; the rest is the large-scale structure of one field.
    for low, high in ((20.0, 20.5), (20.5, 20.75), (20.75, 21.0)):
        real_count = np.sum((field["ref_mag"] > low) & (field["ref_mag"] < high)) / FIELD_AREA_DEG2
        mock_count = np.sum((mock["mag"][:, 3] > low) & (mock["mag"][:, 3] < high)) / area
        print(f"i {low}-{high}: real {real_count:.0f} per deg2, mock {mock_count:.0f}")
        assert mock_count == pytest.approx(real_count, rel=0.15)
    shares = []
    for catalogue, mag in ((field, field["ref_mag"]), (mock, mock["mag"][:, 3])):
        bright = mag < 20.5
        ra, dec = np.radians(catalogue["ra_deg"][bright]), np.radians(catalogue["dec_deg"][bright])
        tree = cKDTree(np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)]))
        within = tree.count_neighbors(tree, np.radians(np.array([2.0, 10.0]) / 3600.0)) - bright.sum()
        shares.append(within[0] / within[1])
    print("pairs within 2 arcsec over those within 10, real and mock:", np.round(shares, 4))
    # Without blending 2^2 / 10^2 = 0.04.
    assert max(shares) < 0.02


def test_colours_of_field_galaxies(field, mock_field):
    mock, _ = mock_field
    # The real catalogue is incomplete beyond i = 20.5.
    for low, high in ((18.0, 19.0), (19.0, 20.0), (20.0, 20.5)):
        medians = []
        for catalogue in (field, mock):
            chosen = (catalogue["mag"][:, 3] > low) & (catalogue["mag"][:, 3] < high)
            medians.append(np.percentile(-np.diff(catalogue["mag"][chosen], axis=1)[:, 1:], [25, 50, 75], axis=0))
        assert np.all(np.abs(medians[0] - medians[1]) < [0.15, 0.10, 0.08]), f"i {low}"


def test_noise_of_the_mock_brackets_that_of_real_frames(real_data):
    frames = sorted((real_data / "sas").rglob("frame-*.fits.bz2"))
    assert frames
    for path in frames[::4]:
        with bz2.open(path) as packed, fits.open(io.BytesIO(packed.read())) as hdus:
            pixels = np.asarray(hdus[0].data)[::5, ::5]  # pyright: ignore
        sigma = 1.4826 * np.median(np.abs(pixels - np.median(pixels)))
        band = BANDS.index(path.name.split("-")[1])
        low, high = SKY.pixel_sigma_min_nmgy[band], SKY.pixel_sigma_max_nmgy[band]
        assert 0.97 * low < sigma < 1.03 * high, path.name


def test_bright_pixels_are_as_common_as_in_a_real_frame(real_data):
    """Percentiles of 3.2" pixels over the noise: what a network sees of the field."""
    frames = sorted((real_data / "sas").rglob("frame-i-*.fits.bz2"))
    real, mock = [], []
    for path in frames[:3]:
        with bz2.open(path) as packed, fits.open(io.BytesIO(packed.read())) as hdus:
            pixels = np.asarray(hdus[0].data, float)[:1480, :2048]  # pyright: ignore
        sigma = 8 * 1.4826 * np.median(np.abs(pixels[::5, ::5] - np.median(pixels[::5, ::5])))
        binned = pixels.reshape(185, 8, 256, 8).sum(axis=(1, 3)) / sigma
        real.append(np.percentile(binned - np.median(binned), [16, 95, 99]))
    source = MockSource(MockConfig(), GridConfig(width_arcsec=128 * 3.168, n_pixels=128), 3)
    for i in range(6):
        cutout = source.cutout({"id": f"blank{i}", "z": 0.2})
        binned = cutout.flux[3] / cutout.sigma[3].min()
        mock.append(np.percentile(binned - np.median(binned), [16, 95, 99]))
    ratio = np.mean(mock, axis=0) / np.mean(real, axis=0)
    assert np.all(np.abs(np.log(ratio)) < np.log([1.15, 1.6, 2.0])), ratio
