"""A toy sky for tests of the machinery: a blob whose brightness is the mass, in bands of fixed colour, on white noise.

Not the mock sky: it makes a hundred cutouts in a second and its answers are known in closed form.
"""

from __future__ import annotations

import numpy as np
from astropy.table import QTable

from pix2mass.catalog import check_catalog
from pix2mass.config import GridConfig
from pix2mass.images.grid import pixel_scale_arcsec
from pix2mass.types import BANDS, Cutout, Flag, empty_cutout

COLOUR = {"u": 0.1, "g": 0.4, "r": 1.0, "i": 1.5, "z": 2.0}
WIDTH_PIXELS = {"u": 3.0, "g": 1.0, "r": 2.0, "i": 4.0, "z": 1.5}


def toy_catalog(n: int, seed: int, prefix: str = "toy") -> QTable:
    """n clusters, flat in log mass 13.8-15.2 and z 0.1-0.4, labels good to 0.05 dex, spread over the sky."""
    rng = np.random.default_rng([seed, n])
    true = rng.uniform(13.8, 15.2, n)
    table = QTable(
        {
            "id": [f"{prefix}-{i}" for i in range(n)],
            "ra_deg": rng.uniform(0, 360, n),
            "dec_deg": rng.uniform(-60, 60, n),
            "z": rng.uniform(0.1, 0.4, n),
            "log10_m500c": true + 0.05 * rng.standard_normal(n),
            "log10_m500c_err": np.full(n, 0.05),
            "log10_m500c_true": true,
            "richness": 40 * 10 ** (true - 14.24 + 0.1 * rng.standard_normal(n)),
            "richness_err": np.full(n, 3.0),
            "group": [f"field-{i % 3}" for i in range(n)],
        }
    )
    return check_catalog(table, "toy")


class ToySource:
    """Makes the cutouts of :func:`toy_catalog`. Counts them, and fails from cutout number ``fail_at`` on."""

    def __init__(self, grid: GridConfig, band_noise: dict[str, float] | None = None, blobs: bool = True) -> None:
        self.grid, self.band_noise, self.blobs = grid, band_noise or dict.fromkeys(BANDS, 1.0), blobs
        self.made: list[str] = []
        self.fail_at: int | None = None

    def cutout(self, cluster) -> Cutout:
        if self.fail_at is not None and len(self.made) >= self.fail_at:
            raise RuntimeError("the source broke")
        self.made.append(str(cluster["id"]))
        n, bands = self.grid.n_pixels, self.grid.bands
        scale = pixel_scale_arcsec(self.grid, float(cluster["z"])) if np.isfinite(cluster["z"]) else 5.0
        if str(cluster["id"]).startswith("outside"):
            return empty_cutout(bands, n, float(cluster["ra_deg"]), float(cluster["dec_deg"]), scale, Flag.OUTSIDE)
        # Python's own hash of a string changes from run to run.
        rng = np.random.default_rng(list(str(cluster["id"]).encode()))
        y, x = np.mgrid[:n, :n] - (n - 1) / 2
        radius2 = x**2 + y**2
        flux = np.empty((len(bands), n, n), np.float32)
        sigma = np.empty_like(flux)
        for index, band in enumerate(bands):
            noise = self.band_noise[band]
            blob = COLOUR[band] * np.exp(-0.5 * radius2 / WIDTH_PIXELS[band] ** 2)
            amplitude = 20 * 10 ** (float(cluster["log10_m500c_true"]) - 14.5) if self.blobs else 0.0
            flux[index] = noise * (amplitude * blob + rng.standard_normal((n, n)))
            sigma[index] = noise
        return Cutout(
            flux=flux,
            sigma=sigma,
            mask=np.zeros(flux.shape, np.bool_),
            bands=bands,
            ra_deg=float(cluster["ra_deg"]),
            dec_deg=float(cluster["dec_deg"]),
            pixel_scale_arcsec=scale,
            psf_fwhm_arcsec=np.full(len(bands), 1.3, np.float32),
        )
