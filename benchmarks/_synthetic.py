"""Pixels that cost nothing to make, for benchmarks of what comes after them."""

from __future__ import annotations

from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.config import GridConfig
from pix2mass.images.grid import pixel_scale_arcsec
from pix2mass.types import Cutout

_NOISE_NMGY = 0.1


def synthetic_catalog(n: int, z_range: tuple[float, float], seed: int) -> QTable:
    """n clusters with labels that depend on nothing, spread over the sky."""
    rng = np.random.default_rng(seed)
    true = rng.uniform(13.8, 15.2, n)
    return QTable(
        {
            "id": [f"S{k:06d}" for k in range(n)],
            "ra_deg": rng.uniform(0, 360, n),
            "dec_deg": rng.uniform(-60, 60, n),
            "z": rng.uniform(*z_range, n),
            "log10_m500c": true,
            "log10_m500c_err": np.full(n, 0.12),
            "log10_m500c_true": true,
        }
    )


class Synthetic:
    """White noise, and for each cluster a blob as bright as its label says."""

    def __init__(self, grid: GridConfig) -> None:
        self.grid = grid
        shape = (16, len(grid.bands), grid.n_pixels, grid.n_pixels)
        self.noise = _NOISE_NMGY * np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        y, x = np.mgrid[: grid.n_pixels, : grid.n_pixels] - (grid.n_pixels - 1) / 2
        self.blob = np.exp(-0.5 * (x**2 + y**2) / (grid.n_pixels / 16) ** 2).astype(np.float32)

    def cutout(self, cluster: Any) -> Cutout:
        """The cutout of a row."""
        number = int(str(cluster["id"])[1:])
        flux = np.roll(self.noise[number % 16], number, axis=-1)
        flux = flux + 10 * _NOISE_NMGY * 10 ** (float(cluster["log10_m500c"]) - 14.5) * self.blob
        return Cutout(
            flux=flux,
            sigma=np.full_like(flux, _NOISE_NMGY),
            mask=np.zeros(flux.shape, np.bool_),
            bands=self.grid.bands,
            ra_deg=float(cluster["ra_deg"]),
            dec_deg=float(cluster["dec_deg"]),
            pixel_scale_arcsec=pixel_scale_arcsec(self.grid, float(cluster["z"])),
            psf_fwhm_arcsec=np.full(len(self.grid.bands), 1.3, np.float32),
        )
