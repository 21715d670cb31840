"""Colours of red galaxies against redshift and magnitude, calibrated on galaxies with redshifts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pix2mass.cosmology import m_star_i_mag
from pix2mass.types import Pix2massError

GALAXIES = Mapping[str, np.ndarray]
"""Columns ra_deg, dec_deg (n,), mag and mag_err (n, 5): ugriz magnitudes free of Galactic extinction; with ref_mag and
ref_mag_err (n,), the total i magnitude and its error, where those differ from mag's i."""

COLOURS = ((0, 1), (1, 2), (2, 3), (3, 4))
"""Colours used, as pairs of band numbers: u-g, g-r, r-i, i-z, as redMaPPer does in SDSS (Rykoff et al. 2014)."""

N_COLOURS = len(COLOURS)

_DIFFERENCE = np.zeros((N_COLOURS, 5))
for _row, (_blue, _red) in enumerate(COLOURS):
    _DIFFERENCE[_row, _blue], _DIFFERENCE[_row, _red] = 1.0, -1.0


def colours_of(mag: np.ndarray, mag_err: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (n, 4) = u-g, g-r, r-i, i-z and their covariances (n, 4, 4) from ugriz magnitudes and errors (n, 5)."""
    mag, mag_err = np.asarray(mag, float), np.asarray(mag_err, float)
    return mag @ _DIFFERENCE.T, np.einsum("ck,nk,dk->ncd", _DIFFERENCE, mag_err**2, _DIFFERENCE)


def reference_mag(galaxies: GALAXIES) -> np.ndarray:
    """(n,) total i magnitudes: the column ref_mag where there is one, else mag's i."""
    return np.asarray(galaxies["ref_mag"] if "ref_mag" in galaxies else np.asarray(galaxies["mag"])[:, 3], float)


def reference_mag_err(galaxies: GALAXIES) -> np.ndarray:
    """(n,) errors of the total i magnitudes: the column ref_mag_err where there is one, else that of mag's i."""
    has = "ref_mag_err" in galaxies
    return np.asarray(galaxies["ref_mag_err"] if has else np.asarray(galaxies["mag_err"])[:, 3], float)


@dataclass(frozen=True, eq=False)
class RedSequence:
    """Colours of red satellite galaxies: at m* against redshift, with a slope in i - m*(z) and an intrinsic covariance.

    Attributes:
        z: (k,) nodes; linear between, constant beyond.
        colour: (k, 4) mean colours u-g, g-r, r-i, i-z at m*.
        slope: (4,) change per magnitude of i - m*.
        covariance: (4, 4) intrinsic covariance of the colours. One for all redshifts: satellites measure it at low
            redshift only, and central galaxies are more alike than satellites are.
    """

    z: np.ndarray
    colour: np.ndarray
    slope: np.ndarray
    covariance: np.ndarray

    @classmethod
    def fit(
        cls,
        mag: np.ndarray,
        mag_err: np.ndarray,
        ref_mag: np.ndarray,
        z: np.ndarray,
        central: np.ndarray | None = None,
        node_step: float = 0.05,
    ) -> RedSequence:
        """Calibrate on galaxies with redshifts of which many are red, as members of clusters are.

        Maximum likelihood by expectation-maximisation of two populations of Gaussian colours about the relation, each
        seen with every galaxy's own error covariance (Bovy, Hogg & Roweis 2011, Ann. Appl. Stat. 5, 1657): red
        galaxies, and a broad population of any others with a mean of its own. Blue galaxies among those given neither
        pull the relation nor widen it. Do not cut the sample on how near its galaxies lie to a red sequence: that cuts
        the wings off, and members with ordinary colours are lost.

        Args:
            mag: (n, 5) ugriz magnitudes.
            mag_err: (n, 5) errors.
            ref_mag: (n,) total i magnitudes.
            z: (n,) redshifts.
            central: (n,) which galaxies are centrals of clusters. They get a colour offset of their own, which is not
                part of the relation, and are not asked for the scatter: so they extend the relation to redshifts
                where no satellites have been observed.
            node_step: spacing of the redshift nodes.

        Raises:
            Pix2massError: if there are fewer than 30 galaxies.
        """
        mag, mag_err, ref_mag, z = (np.asarray(array, float) for array in (mag, mag_err, ref_mag, z))
        central = np.zeros(len(z), bool) if central is None else np.asarray(central, bool)
        usable = np.isfinite(mag).all(axis=1) & np.isfinite(mag_err).all(axis=1) & (z > 0.03) & (z < 0.7)
        if usable.sum() < 30:
            raise Pix2massError(
                f"red sequence: expected at least 30 galaxies with redshifts 0.03-0.7 and finite magnitudes, "
                f"got {usable.sum()}; give more red galaxies"
            )
        mag, mag_err, ref_mag, z, central = (array[usable] for array in (mag, mag_err, ref_mag, z, central))
        for_scatter = np.ones(len(z), bool) if central.all() else ~central
        colours, noise = colours_of(mag, mag_err)
        # Nodes between which galaxies lie, none emptier than ten galaxies.
        count = max(2, min(int(np.ceil(np.ptp(z) / node_step)) + 1, len(z) // 10))
        nodes = np.linspace(z.min(), z.max(), count)
        nodes = nodes[[True, *(np.histogram(z, nodes)[0][:-1] >= 10), True]]
        hats = np.stack([np.interp(z, nodes, row) for row in np.eye(len(nodes))], axis=1)
        terms = [hats, (ref_mag - m_star_i_mag(z))[:, None]]
        if central.any() and not central.all():
            terms.append(central[:, None].astype(float))
        design = np.hstack(terms)
        # Start on the red side of the galaxies at each redshift.
        coefficients = np.zeros((design.shape[1], N_COLOURS))
        for k, around in enumerate(hats.T > 0.5):
            coefficients[k] = np.percentile(colours[around], 65, axis=0)
        covariance = np.diag(_RED_WIDTH**2)
        share, other_mean, other = 0.7, _OTHER_MEAN.copy(), np.diag(_OTHER_WIDTH**2)
        for _ in range(_ITERATIONS):
            residual = colours - design @ coefficients
            red = np.log(share) + _log_normal(residual, noise + covariance)
            rest = np.log(1 - share) + _log_normal(residual - other_mean, noise + other)
            is_red = 1 / (1 + np.exp(np.clip(rest - red, -50, 50)))
            share = float(np.clip(is_red.mean(), 0.02, 0.98))
            other_mean, other = _moments(residual, noise, other_mean, other, np.maximum(1 - is_red, 1e-9))
            # A narrow second population would share out the red sequence instead of taking what is not on it.
            other = other + np.diag(np.maximum(_OTHER_WIDTH**2 / 4 - np.diag(other), 0.0))
            for c in range(N_COLOURS):
                weight = np.sqrt(is_red / (noise[:, c, c] + covariance[c, c]))
                coefficients[:, c] = np.linalg.lstsq(design * weight[:, None], colours[:, c] * weight, rcond=None)[0]
            residual = colours - design @ coefficients
            covariance = _moments(residual, noise, np.zeros(N_COLOURS), covariance, is_red * for_scatter + 1e-12)[1]
        return cls(nodes, coefficients[: len(nodes)], coefficients[len(nodes)], covariance)

    @property
    def scatter(self) -> np.ndarray:
        """(4,) intrinsic standard deviations of the colours."""
        return np.sqrt(np.diag(self.covariance))

    def mean(self, z: ArrayLike, ref_mag: ArrayLike) -> np.ndarray:
        """Mean colours (n, 4) of red galaxies of total i magnitude ``ref_mag`` (n,) at ``z`` (a number or (n,))."""
        z, ref_mag = np.broadcast_arrays(np.asarray(z, float), np.asarray(ref_mag, float))
        at_star = np.stack([np.interp(z, self.z, column) for column in self.colour.T], axis=-1)
        return at_star + self.slope * (ref_mag - m_star_i_mag(z))[..., None]

    def chi2(self, mag: np.ndarray, mag_err: np.ndarray, ref_mag: np.ndarray, z: float) -> np.ndarray:
        """(n,) chi2 of galaxies about the red sequence at one redshift: (c - mean)^T (C_err + C_int)^-1 (c - mean),
        Rykoff et al. 2014."""
        colours, noise = colours_of(mag, mag_err)
        residual = colours - self.mean(z, ref_mag)
        return np.einsum("nc,nc->n", residual, _solve(noise + self.covariance, residual))

    def to_dict(self) -> dict[str, list]:
        """Plain lists, for JSON or TOML."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in ("z", "colour", "slope", "covariance")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RedSequence:
        """The inverse of ``to_dict``."""
        return cls(*(np.asarray(values[name], float) for name in ("z", "colour", "slope", "covariance")))


_ITERATIONS = 40
_RED_WIDTH = np.array([0.15, 0.05, 0.03, 0.03])
"""Where the fit starts to look for the scatter of red galaxies."""

_OTHER_MEAN, _OTHER_WIDTH = np.array([-0.3, -0.4, -0.1, -0.1]), np.array([0.5, 0.25, 0.12, 0.12])
"""Where the fit of the red sequence starts to look for other galaxies; half the width is the least it may take."""


def _solve(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """(n, 4) solutions of n systems of equations."""
    return np.linalg.solve(matrix, vector[:, :, None])[:, :, 0]


def _log_normal(residual: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(n,) log of normal densities, without the constant."""
    return -0.5 * (np.einsum("nc,nc->n", residual, _solve(covariance, residual)) + np.linalg.slogdet(covariance)[1])


def _moments(
    residual: np.ndarray, noise: np.ndarray, mean: np.ndarray, covariance: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of true values behind noisy ones: one step of expectation-maximisation (Bovy et al. 2011, eq.
    16)."""
    gain = np.linalg.solve(noise + covariance, np.broadcast_to(covariance, noise.shape)).transpose(0, 2, 1)
    true = mean + np.einsum("nij,nj->ni", gain, residual - mean)
    left = covariance - np.einsum("nij,jk->nik", gain, covariance)
    new_mean = weight @ true / weight.sum()
    offset = true - new_mean
    spread = np.einsum("n,nij->ij", weight, left + offset[:, :, None] * offset[:, None, :]) / weight.sum()
    return new_mean, spread
