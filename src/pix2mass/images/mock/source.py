"""``MockSource``: pictures and galaxy catalogues of mock clusters, as an SDSS observer would get them."""

from __future__ import annotations

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

        rng = stream(self.seed, str(cluster["id"]), "camera")
        # All five bands are drawn even if fewer are kept: a band's pixels do not depend on the choice of the others.
        ebv = rng.uniform(self.config.ebv_min_mag, self.config.ebv_max_mag)
        uniform, seeing, band_seeing = rng.random(len(BANDS)), rng.normal(), rng.normal(size=len(BANDS))
        residual = physics.sky_residual_sigma * rng.normal(size=(len(BANDS), 3))
        noise = rng.normal(size=(len(BANDS), n_pixels, n_pixels))

        index = [BANDS.index(band) for band in bands]
        fwhm = np.array(physics.psf_fwhm_arcsec) * np.exp(
            physics.psf_scatter_ln * seeing + physics.psf_band_scatter_ln * band_seeing
        )
        extinction = ebv * np.array([EXTINCTION_PER_EBV[band] for band in BANDS])
        flux = 10 ** (-0.4 * (sources.mag + extinction - NANOMAGGY_ZEROPOINT_MAG))
        model = render(sources, flux, fwhm, n_pixels, scale, psf_components=physics.psf_components)[index]

        low, high = np.array([physics.pixel_sigma_min_nmgy, physics.pixel_sigma_max_nmgy])[:, index]
        native_sigma = (low * (high / low) ** uniform[index])[:, None, None]
        native_per_pixel = (scale / SDSS_PIXEL_SCALE_ARCSEC) ** 2
        electron = np.array(physics.nmgy_per_electron)[index, None, None]
        sigma = np.sqrt(native_sigma**2 * native_per_pixel + electron * np.maximum(model, 0))
        # Photons are counted: Poisson numbers of this variance have this skewness (Cornish & Fisher 1938, first order).
        skewed = noise[index] + electron / sigma / 6 * (noise[index] ** 2 - 1)
        ramp = np.linspace(-1, 1, n_pixels)
        level, right, up = (residual[index, k][:, None, None] for k in range(3))
        level = level + physics.sky_offset_sigma
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
