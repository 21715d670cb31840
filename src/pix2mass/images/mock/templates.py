"""Magnitudes of galaxies of three kinds of light at any redshift, from kcorrect templates through the SDSS filters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from pix2mass.config import PerColour
from pix2mass.types import BANDS

SDSS_MINUS_AB_MAG = np.array([0.04, 0.0, 0.0, 0.0, -0.02])
"""u_SDSS = u_AB + 0.04, z_SDSS = z_AB - 0.02. Source: SDSS DR12 flux calibration page."""

_GR_DROP_Z = (0.27, 0.33)
_GR_DROP_MAG = -0.06
"""Centrals beyond z 0.27 are bluer in g-r than the shifted template, by 0.03 at 0.30 and 0.06 at 0.33, as far as they
go."""

_Z_GRID = np.arange(0.0, 1.301, 0.025)
_BLEND_GRID = np.linspace(0.0, 1.0, 11)
_OLD_TEMPLATE, _YOUNG_TEMPLATE = 3, 4
"""Of the five default templates, the passive one and the star-forming one without strong emission lines."""


@dataclass(frozen=True)
class Templates:
    """Magnitudes on a redshift grid of a galaxy whose absolute magnitude in r, K-corrected to z = 0.1, is zero.

    Adding an absolute magnitude and the distance modulus gives an apparent SDSS magnitude without evolution.

    Attributes:
        z: (n_z,) redshifts.
        red: (n_z, 5) magnitudes of the red sequence at m*.
        blend: (n_blend, n_z, 5) magnitudes of star-forming galaxies, from all old (0) to all young (1) light in r.
    """

    z: np.ndarray
    red: np.ndarray
    blend: np.ndarray

    def red_magnitudes(self, z: np.ndarray) -> np.ndarray:
        """Relative magnitudes of red-sequence galaxies at m*, shape (n, 5)."""
        left, fraction = self._place(z)
        return (1 - fraction) * self.red[left] + fraction * self.red[left + 1]

    def blend_magnitudes(self, z: np.ndarray, young_share: np.ndarray) -> np.ndarray:
        """Relative magnitudes of galaxies with the given share of young light in r at z = 0.1, shape (n, 5)."""
        position = np.clip(young_share, 0.0, 1.0) * (len(self.blend) - 1)
        lower = np.minimum(position.astype(int), len(self.blend) - 2)
        weight = (position - lower)[:, None]
        left, fraction = self._place(z)

        def at(row: np.ndarray) -> np.ndarray:
            return (1 - fraction) * self.blend[row, left] + fraction * self.blend[row, left + 1]

        return (1 - weight) * at(lower) + weight * at(lower + 1)

    def _place(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entry of the even grid below each redshift (n,), and the share of the way to the next one (n, 1)."""
        place = np.clip(z / (self.z[1] - self.z[0]), 0, len(self.z) - 1.001)
        left = place.astype(int)
        return left, (place - left)[:, None]


@cache
def templates(red_colour_offset_mag: PerColour) -> Templates:
    """The template grids (about one second, once per process).

    Args:
        red_colour_offset_mag: observed minus template colour of the red sequence.
    """
    red, blend = _kcorrect_grids()
    # Shift the colours to those observed and hold i, in which the members' magnitudes are drawn.
    offset = np.broadcast_to(red_colour_offset_mag, (len(_Z_GRID), 4)).copy()
    offset[:, 1] += np.interp(_Z_GRID, _GR_DROP_Z, (0.0, _GR_DROP_MAG))
    return Templates(_Z_GRID, red + colours_to_offsets(offset), blend)


@cache
def _kcorrect_grids() -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes (n_z, 5) of kcorrect's luminous red galaxy and (n_blend, n_z, 5) of star-forming ones."""
    from kcorrect.kcorrect import Kcorrect
    from kcorrect.template import Template

    folder = resources.files("kcorrect") / "data" / "templates"

    def magnitudes(name: str) -> np.ndarray:
        """(n_z, 5, n_templates) SDSS magnitudes of unit templates."""
        model = Kcorrect(
            responses=[f"sdss_{band}0" for band in BANDS],
            templates=Template(filename=str(folder / name)),
            redshift_range=[0.0, _Z_GRID[-1] + 0.01],
            nredshift=len(_Z_GRID),
            abcorrect=False,
        )
        return np.asarray(model.Amatrix(_Z_GRID))

    at_z01, r_band = int(np.argmin(abs(_Z_GRID - 0.1))), BANDS.index("r")

    def normalised(maggies: np.ndarray) -> np.ndarray:
        # M(0.1r) = m - DM + 2.5 log10(1.1) for a source at z = 0.1: Blanton & Roweis 2007, AJ 133, 734, eq. 2.
        relative = 1.1 * maggies / maggies[at_z01, r_band]
        return -2.5 * np.log10(relative) + SDSS_MINUS_AB_MAG

    red = normalised(magnitudes("kcorrect-lrg1-v4.fits")[:, :, 0])
    default = magnitudes("kcorrect-default-v4.fits")
    old, young = (default[:, :, k] / default[at_z01, r_band, k] for k in (_OLD_TEMPLATE, _YOUNG_TEMPLATE))
    blend = np.stack([normalised((1 - share) * old + share * young) for share in _BLEND_GRID])
    return red, blend


def colours_to_offsets(colours: np.ndarray) -> np.ndarray:
    """Colours (..., 4) = u-g, g-r, r-i, i-z to magnitudes (..., 5) relative to i."""
    u_g, g_r, r_i, i_z = np.moveaxis(np.asarray(colours), -1, 0)
    return np.stack([u_g + g_r + r_i, g_r + r_i, r_i, np.zeros_like(r_i), -i_z], axis=-1)
