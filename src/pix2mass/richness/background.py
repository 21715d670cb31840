"""Surface density of galaxies that belong to no cluster in question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pix2mass.richness.red_sequence import GALAXIES, N_COLOURS, RedSequence, reference_mag
from pix2mass.types import Pix2massError

CHI2_MAX = 20.0
"""Galaxies further from the red sequence have no probability to speak of and are left out."""

BACKGROUND_Z = np.arange(0.05, 0.601, 0.02)
"""Redshifts at which the background is tabulated; lambda is measured between the first and the last."""

_POWER = N_COLOURS / 2 - 1
_MAG_STEP, _CHI2_STEP = 0.2, 0.5
_CHUNK = 200_000


@dataclass(frozen=True, eq=False)
class Background:
    """Surface density Sigma_g(m_i, chi2 | z).

    Attributes:
        z: (k,) redshifts at which chi2 was computed.
        mag_edges: (p + 1,) edges in i magnitude.
        chi2_edges: (q + 1,) edges in chi2.
        density: (k, p, q) galaxies per arcsec2, magnitude and unit chi2, over chi2^(n/2 - 1): in n colours the density
            of galaxies spread smoothly over colour rises as that power, and what is left varies slowly within a cell.
    """

    z: np.ndarray
    mag_edges: np.ndarray
    chi2_edges: np.ndarray
    density: np.ndarray

    @classmethod
    def fit(
        cls,
        catalogues: Sequence[GALAXIES],
        area_arcsec2: float,
        red_sequence: RedSequence,
        z: ArrayLike = BACKGROUND_Z,
    ) -> Background:
        """Measure the density on fields without clusters, or on fields so wide that theirs do not matter.

        Args:
            catalogues: galaxies of the fields.
            area_arcsec2: area of all the fields together.
            red_sequence: what chi2 is measured about.
            z: redshifts to tabulate.

        Raises:
            Pix2massError: if the area is not positive or there are no galaxies.
        """
        number = sum(len(c["mag"]) for c in catalogues)
        if not area_arcsec2 > 0 or number == 0:
            raise Pix2massError(f"background: expected galaxies and an area, got {number} and {area_arcsec2} arcsec2")
        z = np.asarray(z, float)
        mag_edges = np.arange(12.0, 23.0 + _MAG_STEP / 2, _MAG_STEP)
        chi2_edges = np.arange(0.0, CHI2_MAX + _CHI2_STEP / 2, _CHI2_STEP)
        counts = np.zeros((len(z), len(mag_edges) - 1, len(chi2_edges) - 1))
        for catalogue in catalogues:
            for start in range(0, len(catalogue["mag"]), _CHUNK):
                part = {name: column[start : start + _CHUNK] for name, column in catalogue.items()}
                ref_mag = reference_mag(part)
                for k, redshift in enumerate(z):
                    chi2 = red_sequence.chi2(part["mag"], part["mag_err"], ref_mag, redshift)
                    counts[k] += np.histogram2d(ref_mag, chi2, (mag_edges, chi2_edges))[0]
        density = np.stack([_smooth(table, chi2_edges) for table in counts])
        return cls(z, mag_edges, chi2_edges, density / (area_arcsec2 * _MAG_STEP))

    def at(self, z: float, ref_mag: np.ndarray, chi2: np.ndarray) -> np.ndarray:
        """(n,) density Sigma_g per arcsec2, magnitude and unit chi2, linear in z; 0 outside the tables."""
        position = float(np.interp(z, self.z, np.arange(len(self.z))))
        low = min(int(position), len(self.z) - 2) if len(self.z) > 1 else 0
        high = min(low + 1, len(self.z) - 1)
        table = (1 - (position - low)) * self.density[low] + (position - low) * self.density[high]
        row = np.searchsorted(self.mag_edges, ref_mag, "right") - 1
        column = np.searchsorted(self.chi2_edges, chi2, "right") - 1
        inside = (row >= 0) & (row < table.shape[0]) & (column >= 0) & (column < table.shape[1])
        found = np.zeros(len(row))
        found[inside] = table[row[inside], column[inside]] * chi2[inside] ** _POWER
        return found


def _smooth(counts: np.ndarray, chi2_edges: np.ndarray) -> np.ndarray:
    """Counts over the integral of chi2^(n/2 - 1) in each cell, both smoothed by one magnitude and two chi2 cells.

    Cells of bright galaxies hold few or none; the floor of a thousandth of a galaxy keeps their density above zero.
    """
    from scipy.ndimage import gaussian_filter

    cell = np.diff(chi2_edges ** (_POWER + 1)) / (_POWER + 1)
    smooth, weight = (
        gaussian_filter(np.asarray(array, float), (1.0, 2.0), mode="constant")
        for array in (counts, np.broadcast_to(cell, counts.shape))
    )
    return np.maximum(smooth, 1e-3) / weight
