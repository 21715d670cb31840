"""Mock clusters painted into a real field: what the aperture gains is what was painted, within its noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.archive import Field
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frames import FrameSource
from pix2mass.images.grid import target_wcs
from pix2mass.images.inject import InjectedSource, cluster_light, inject_frames, random_clusters
from pix2mass.images.mock.frames import draw, on_pixels
from pix2mass.types import BANDS, Flag

GRID = GridConfig(width_arcsec=120.0, n_pixels=100)
CONFIG = MockConfig(log10_m500c_min=14.3, z_min=0.15, z_max=0.35)
SEED = 11
RADII_ARCSEC = (5.0, 20.0, 45.0)


@pytest.fixture(scope="module")
def painted(real_data: Path, tmp_path_factory) -> tuple[QTable, list, list, list]:
    """Three clusters in field 94-1-0012: the cutouts before, after, and with the light added to the cutout instead."""
    everything = FrameIndex.from_base(real_data / "sas")
    rows = [Field(row["run"], row["camcol"], row["field"]) == Field(94, 1, 12) for row in everything.table]
    index = FrameIndex(everything.table[rows])
    out = tmp_path_factory.mktemp("painted")
    clusters = random_clusters(index, CONFIG, 3, SEED, margin_arcsec=62.0)
    clusters["ebv"] = [0.0, 0.05, 0.1]
    new = inject_frames(real_data / "sas", clusters, CONFIG, SEED, out, GRID, index=index)
    with FrameSource(real_data / "sas", GRID, index) as source, FrameSource(out, GRID, new) as copy:
        before = [source.cutout(row) for row in clusters]
        after = [copy.cutout(row) for row in clusters]
        on_cutout = InjectedSource(source, CONFIG, SEED)
        added = [on_cutout.cutout(row) for row in clusters]
    return clusters, before, after, added


def drawn(placed, flux: np.ndarray, psf: np.ndarray) -> np.ndarray:
    """Noise-free light (5, 100, 100), drawn 100 times brighter than it is, and so more accurately."""
    return draw(placed, 100.0 * flux, psf, CONFIG, 1.2, slice(0, 100), slice(0, 100)) / 100.0


@pytest.mark.slow
def test_aperture_flux_is_recovered_in_every_band(painted):
    """The frame's own pixels, WCS, calibration and gain, against the light drawn on the cutout's grid without noise."""
    clusters, before_all, after_all, _ = painted
    lights = [(row, *cluster_light(row, CONFIG, 1800.0, SEED)) for row in clusters]
    rows, cols = np.indices((100, 100))
    distance = np.hypot(rows - 49.5, cols - 49.5) * 1.2
    pulls = []
    for before, after in zip(before_all, after_all, strict=True):
        assert after.flags == before.flags and Flag.SIGMA_APPROXIMATE not in after.flags
        assert np.array_equal(after.mask, before.mask)
        wcs = target_wcs(before.ra_deg, before.dec_deg, 1.2, 100)
        psf = before.psf_fwhm_arcsec.astype(float)
        light = np.zeros(before.flux.shape)
        for row, sources, flux in lights:  # members of one cluster reach into the cutouts of the others
            placed = on_pixels(sources, float(row["ra_deg"]), float(row["dec_deg"]), wcs)
            light += drawn(placed, flux, psf)
        for radius in RADII_ARCSEC:
            for k, band in enumerate(BANDS):
                aperture = (distance < radius) & ~before.mask[k]
                gain = (after.flux - before.flux)[k][aperture].sum(dtype=float)
                variance = (after.sigma**2 - before.sigma**2)[k][aperture].sum(dtype=float)
                # Regridding from 0.396" to 1.2" correlates pixels: the variance of a sum is larger by (1 - s/3)^-2.
                error = np.sqrt(variance) / (1 - 0.33 / 3)
                expected = light[k][aperture].sum()
                assert expected > 0.0
                assert abs(gain - expected) < 4.0 * error + 0.005 * expected, (band, radius)
                pulls.append((gain - expected) / error)
    assert 0.5 < np.std(pulls) < 2.0


@pytest.mark.slow
def test_light_added_to_the_cutout_is_that_of_the_cluster(painted):
    """Straight on the cutout of a real frame, within the noise it states."""
    row, before, added = painted[0][0], painted[1][0], painted[3][0]
    sources, flux = cluster_light(row, CONFIG, 1800.0, SEED)
    placed = on_pixels(sources, before.ra_deg, before.dec_deg, target_wcs(before.ra_deg, before.dec_deg, 1.2, 100))
    psf = before.psf_fwhm_arcsec.astype(float)
    light = drawn(placed, flux, psf)
    for k, band in enumerate(BANDS):
        gain = np.where(before.mask, 0.0, added.flux - before.flux)[k].sum(dtype=float)
        error = np.sqrt((added.sigma**2 - before.sigma**2)[k].sum(dtype=float))
        expected = light[k][~before.mask[k]].sum()
        assert abs(gain - expected) < 4.0 * error + 0.002 * expected, band


@pytest.mark.slow
def test_added_noise_is_that_of_the_real_gain(painted):
    """The variance that a frame gains is flux times calibration over gain, the documented number within its spread."""
    before, after = painted[1][0], painted[2][0]
    electron = np.array(CONFIG.physics.nmgy_per_electron)
    for k in range(5):
        gain = (after.flux - before.flux)[k].sum(dtype=float)
        variance = (after.sigma**2 - before.sigma**2)[k].sum(dtype=float)
        # Regridding takes a factor (1 - s/3)^2 off the variance of a pixel.
        assert variance / gain / (1 - 0.33 / 3) ** 2 == pytest.approx(electron[k], rel=0.35), BANDS[k]
