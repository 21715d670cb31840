"""How bright an L* red galaxy is, and how large a pixel, at each redshift: what brings images to physical units."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pix2mass.config import GridConfig
from pix2mass.cosmology import kpc_per_arcsec, l_star_red_mag
from pix2mass.stretch import sinh
from pix2mass.types import BANDS, NANOMAGGY_ZEROPOINT_MAG

_TABLE_Z = np.arange(0.02, 0.7001, 0.005)
_UNIT_KPC = 160.0
"""A pixel of this size has L* itself as its unit of light; a smaller one less, in proportion, as its noise is less."""


class PhysicalScale(nn.Module):
    """Tables over redshift for one pixel grid.

    Args:
        grid: bands and pixel scale of the images.
    """

    l_star: Tensor
    kpc_per_pixel: Tensor

    def __init__(self, grid: GridConfig) -> None:
        super().__init__()
        columns = [BANDS.index(band) for band in grid.bands]
        flux = 10 ** (-0.4 * (l_star_red_mag(_TABLE_Z)[:, columns] - NANOMAGGY_ZEROPOINT_MAG))
        scale = kpc_per_arcsec(_TABLE_Z)
        width_arcsec = grid.width_arcsec or (grid.width_kpc or 0.0) / scale
        self.pixel_arcsec = np.broadcast_to(width_arcsec, _TABLE_Z.shape) / grid.n_pixels
        self.add_table("l_star", flux)
        self.add_table("kpc_per_pixel", (self.pixel_arcsec * scale)[:, None])

    def add_table(self, name: str, table: np.ndarray) -> None:
        """Keep a table (n_redshifts, columns) beside the weights, which does not go to file with them."""
        self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=False)

    def at(self, table: Tensor, z: Tensor) -> Tensor:
        """Rows of a table over redshift, interpolated: (n, columns)."""
        table = table.to(z.device)  # batches are made on the CPU while the network trains elsewhere
        step = (z - float(_TABLE_Z[0])) / float(_TABLE_Z[1] - _TABLE_Z[0])
        step = step.clamp(0, len(_TABLE_Z) - 1.001)
        left = step.long()
        part = (step - left)[:, None]
        return (1 - part) * table[left] + part * table[left + 1]

    def per_noise(self, noise: Tensor, z: Tensor) -> Tensor:
        """By how much light in units of its noise grows (n, n_bands) where it is put in units of an L* red galaxy's, in
        a pixel of 160 kpc, or less in proportion to the pixel's size; 0 for bands without a noise (n, n_bands)."""
        unit = self.at(self.l_star, z) * self.at(self.kpc_per_pixel, z) / _UNIT_KPC
        return torch.nan_to_num(noise) / unit

    def rescale(self, images: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """Images in these units in place of their noise.

        Args:
            images: (n, n_bands, h, w) asinh(flux / noise).
            noise: (n, n_bands) nanomaggies.
            z: (n,) redshifts.

        Returns:
            asinh of the light in these units, same shape; gradients can be taken.
        """
        return torch.asinh(sinh(images) * self.per_noise(noise, z)[..., None, None])
