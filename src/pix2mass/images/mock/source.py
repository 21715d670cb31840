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

PIXEL_SIGMA_NMGY = {
    "u": (0.040, 0.053),
    "g": (0.0155, 0.024),
    "r": (0.023, 0.032),
    "i": (0.037, 0.057),
    "z": (0.158, 0.217),
}
"""Range of the robust scatter of native 0.396" pixels: measured in six SDSS frames."""

NMGY_PER_ELECTRON = {"u": 0.0055, "g": 0.0010, "r": 0.0011, "i": 0.0012, "z": 0.0075}
"""Calibration over gain: a source of f nanomaggies has a Poisson variance of f times this. From the calibration
vectors of the same frames and the gains of photoField 94-1."""

PSF_FWHM_ARCSEC = {"u": 1.5, "g": 1.4, "r": 1.3, "i": 1.2, "z": 1.2}
"""Median seeing of SDSS imaging: Ross et al. 2011, MNRAS 417, 1350, and the SDSS DR7 site's r-band 1.32"."""

SEEING_SCATTER_LN, BAND_SEEING_SCATTER_LN = 0.10, 0.03
"""Scatter of the seeing from image to image, common to the bands (drift scans see them within minutes) and of each."""

SKY_RESIDUAL_SIGMA = 0.02
"""Scatter of the residual sky level, and of its change from the centre to an edge, in units of the native pixel
noise: the medians of the six frames lie within about 0.1 of it, sources included."""

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

    def galaxies(self, cluster: ROW) -> dict[str, np.ndarray]:
        """Galaxy catalogue of a box ``CATALOGUE_WIDTH_KPC`` wide: see ``population.observe``.

        Args:
            cluster: id and z, position and true mass where known.
        """
        width = CATALOGUE_WIDTH_KPC / float(kpc_per_arcsec(float(cluster["z"])))
        return population.observe(population.galaxies(cluster, self.config, width, self.seed), cluster, self.seed)

    def cutout(self, cluster: ROW) -> Cutout:
        """Picture of a cluster, with noise.

        Args:
            cluster: id and z, position and true mass where known (without a mass: blank sky).

        Returns:
            The cutout. ``sigma`` holds the noise of sky and camera and the Poisson noise of the sources' mean light.
        """
        # The renderer is imported on use, so that catalogues of galaxies do not wait for torch.
        from pix2mass.images.mock.render import render

        n_pixels, bands = self.grid.n_pixels, self.grid.bands
        width = self.width_arcsec(cluster)
        scale = width / n_pixels
        # Light of sources just outside reaches into the picture.
        sources = population.galaxies(cluster, self.config, width + 30.0, self.seed)

        rng = stream(self.seed, str(cluster["id"]), "camera")
        # All five bands are drawn even if fewer are kept: a band's noise does not depend on the choice of the others.
        ebv = rng.uniform(self.config.ebv_min_mag, self.config.ebv_max_mag)
        uniform, seeing, band_seeing = rng.random(len(BANDS)), rng.normal(), rng.normal(size=len(BANDS))
        residual = SKY_RESIDUAL_SIGMA * rng.normal(size=(len(BANDS), 3))
        noise = rng.normal(size=(len(BANDS), n_pixels, n_pixels))

        index = [BANDS.index(band) for band in bands]
        fwhm = np.array([PSF_FWHM_ARCSEC[band] for band in bands]) * np.exp(
            SEEING_SCATTER_LN * seeing + BAND_SEEING_SCATTER_LN * band_seeing[index]
        )
        extinction = ebv * np.array([EXTINCTION_PER_EBV[band] for band in bands])
        flux = 10 ** (-0.4 * (sources.mag[:, index] + extinction - NANOMAGGY_ZEROPOINT_MAG))
        model = render(sources, flux, fwhm, n_pixels, scale)

        low, high = np.array([PIXEL_SIGMA_NMGY[band] for band in bands]).T
        native_sigma = (low * (high / low) ** uniform[index])[:, None, None]
        native_per_pixel = (scale / SDSS_PIXEL_SCALE_ARCSEC) ** 2
        electron = np.array([NMGY_PER_ELECTRON[band] for band in bands])[:, None, None]
        sigma = np.sqrt(native_sigma**2 * native_per_pixel + electron * np.maximum(model, 0))
        ramp = np.linspace(-1, 1, n_pixels)
        level, right, up = (residual[index, k][:, None, None] for k in range(3))
        sky = (level + right * ramp + up * ramp[:, None]) * native_sigma * native_per_pixel
        return Cutout(
            flux=(model + sky + sigma * noise[index]).astype(np.float32),
            sigma=sigma.astype(np.float32),
            mask=np.zeros(model.shape, np.bool_),
            bands=bands,
            ra_deg=float(population.value(cluster, "ra_deg", 0.0)),
            dec_deg=float(population.value(cluster, "dec_deg", 0.0)),
            pixel_scale_arcsec=scale,
            psf_fwhm_arcsec=fwhm.astype(np.float32),
            flags=Flag(0),
        )
