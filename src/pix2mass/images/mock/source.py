"""``MockSource``: pictures and galaxy catalogues of mock clusters, as an SDSS observer would get them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pix2mass.config import GridConfig, MockConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.images.mock import population
from pix2mass.images.mock.population import ROW, stream
from pix2mass.types import (
    BANDS,
    EXTINCTION_PER_EBV,
    NANOMAGGY_ZEROPOINT_MAG,
    SDSS_PIXEL_SCALE_ARCSEC,
    Cutout,
    Flag,
)

CATALOGUE_WIDTH_KPC = 4000.0
"""Width of the box of the galaxy catalogue: it holds R_c of a cluster with lambda 300 (1.8 Mpc) and its
surroundings."""


@dataclass(frozen=True, eq=False)
class Camera:
    """The mock survey's camera and sky in front of one cluster.

    Attributes:
        ebv_mag: Galactic reddening E(B-V).
        psf_fwhm_arcsec: (5,) PSF widths.
        sigma_nmgy: (5,) noise of a native 0.396" pixel without sources.
        residual: (5, 3) what the subtraction of the sky leaves, over that noise: level, and change from the centre to
            an edge, westward and northward.
    """

    ebv_mag: float
    psf_fwhm_arcsec: np.ndarray
    sigma_nmgy: np.ndarray
    residual: np.ndarray


def draw_camera(cluster: ROW, config: MockConfig, seed: int) -> tuple[Camera, np.random.Generator]:
    """The camera of a cluster's picture, and the random numbers that its noise comes from next.

    Args:
        cluster: its id decides.
        config: the mock survey.
        seed: seed of the sky.
    """
    rng, physics, n = stream(seed, str(cluster["id"]), "camera"), config.physics, len(BANDS)
    ebv_mag = float(rng.uniform(config.ebv_min_mag, config.ebv_max_mag))
    uniform, seeing, band_seeing, residual = rng.random(n), rng.normal(), rng.normal(size=n), rng.normal(size=(n, 3))
    low, high = np.array([physics.pixel_sigma_min_nmgy, physics.pixel_sigma_max_nmgy])
    scatter = physics.psf_scatter_ln * seeing + physics.psf_band_scatter_ln * band_seeing
    camera = Camera(
        ebv_mag=ebv_mag,
        psf_fwhm_arcsec=np.array(physics.psf_fwhm_arcsec) * np.exp(scatter),
        sigma_nmgy=low * (high / low) ** uniform,
        residual=physics.sky_residual_sigma * residual + np.array([physics.sky_offset_sigma, 0.0, 0.0]),
    )
    return camera, rng


class MockSource:
    """A survey of the mock sky: the pictures and the galaxies of a cluster show the same sky.

    Args:
        config: the mock survey.
        grid: pixel grid of the pictures.
        seed: seed of sky, camera and photometry; each cluster's depend on it and on the cluster's id alone.
    """

    def __init__(self, config: MockConfig, grid: GridConfig, seed: int) -> None:
        self.config = config
        self.grid = grid
        self.seed = seed

    def width_arcsec(self, cluster: ROW) -> float:
        """Width of the cluster's picture in arcsec."""
        if self.grid.width_arcsec is not None:
            return self.grid.width_arcsec
        return float(self.grid.width_kpc or 0) / float(kpc_per_arcsec(float(cluster["z"])))

    def galaxies(self, cluster: ROW, width_arcsec: float | None = None) -> dict[str, np.ndarray]:
        """Galaxy catalogue around a cluster: see ``population.observe``.

        Args:
            cluster: id and z, position and true mass where known.
            width_arcsec: width of the box; ``CATALOGUE_WIDTH_KPC`` if not given.
        """
        width = width_arcsec or CATALOGUE_WIDTH_KPC / float(kpc_per_arcsec(float(cluster["z"])))
        sources = population.galaxies(cluster, self.config, width, self.seed)
        ebv = population.reddening_mag(cluster, self.config, self.seed)
        return population.observe(sources, cluster, self.seed, self.config.physics, ebv_mag=ebv)

    def cutout(self, cluster: ROW) -> Cutout:
        """Picture of a cluster, with noise.

        Args:
            cluster: id and z, position and true mass where known (without a mass: blank sky).

        Returns:
            The cutout. ``sigma`` holds the noise of sky and camera and the Poisson noise of the sources' mean light.
        """
        # The renderer is imported on use, so that catalogues of galaxies do not wait for torch.
        from pix2mass.images.mock.render import render

        n_pixels, bands, physics = self.grid.n_pixels, self.grid.bands, self.config.physics
        width = self.width_arcsec(cluster)
        scale = width / n_pixels
        # Light of sources just outside reaches into the picture.
        sources = population.galaxies(cluster, self.config, width + 30.0, self.seed, background=True)

        # All five bands are drawn even if fewer are kept: a band's pixels do not depend on the choice of the others.
        camera, rng = draw_camera(cluster, self.config, self.seed)
        noise = rng.normal(size=(len(BANDS), n_pixels, n_pixels))

        index = [BANDS.index(band) for band in bands]
        extinction = camera.ebv_mag * np.array([EXTINCTION_PER_EBV[band] for band in BANDS])
        flux = 10 ** (-0.4 * (sources.mag + extinction - NANOMAGGY_ZEROPOINT_MAG))
        fwhm = camera.psf_fwhm_arcsec
        model = render(sources, flux, fwhm, n_pixels, scale, psf_components=physics.psf_components)[index]

        native_sigma = camera.sigma_nmgy[index, None, None]
        native_per_pixel = (scale / SDSS_PIXEL_SCALE_ARCSEC) ** 2
        electron = np.array(physics.nmgy_per_electron)[index, None, None]
        sigma = np.sqrt(native_sigma**2 * native_per_pixel + electron * np.maximum(model, 0))
        # Photons are counted: Poisson numbers of this variance have this skewness (Cornish & Fisher 1938, first order).
        skewed = noise[index] + electron / sigma / 6 * (noise[index] ** 2 - 1)
        ramp = np.linspace(-1, 1, n_pixels)
        level, right, up = (camera.residual[index, k][:, None, None] for k in range(3))
        sky = (level + right * ramp + up * ramp[:, None]) * native_sigma * native_per_pixel
        saturation = np.array(physics.saturation_nmgy)[index, None, None] * native_per_pixel
        return Cutout(
            flux=np.minimum(model + sky + sigma * skewed, saturation).astype(np.float32),
            sigma=sigma.astype(np.float32),
            mask=np.zeros(model.shape, np.bool_),
            bands=bands,
            ra_deg=float(population.value(cluster, "ra_deg", 0.0)),
            dec_deg=float(population.value(cluster, "dec_deg", 0.0)),
            pixel_scale_arcsec=scale,
            psf_fwhm_arcsec=fwhm[index].astype(np.float32),
            flags=Flag(0),
        )
