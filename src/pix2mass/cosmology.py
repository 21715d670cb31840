"""Distances and sizes in the one cosmology of the project: flat, H0 = 70 km/s/Mpc, Om = 0.3; and the magnitudes of an
L* galaxy at a redshift."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike

H0_KM_S_MPC = 70.0
OMEGA_M = 0.3
MASS_DEFINITION = "500c"


@cache
def cosmology():
    """The astropy cosmology object (imported on first use: it takes longer to import than this whole package)."""
    from astropy.cosmology import FlatLambdaCDM

    return FlatLambdaCDM(H0=H0_KM_S_MPC, Om0=OMEGA_M)


@cache
def _critical_density_0_msun_kpc3() -> float:
    return float(cosmology().critical_density0.to_value("Msun / kpc3"))


def kpc_per_arcsec(z: ArrayLike) -> np.ndarray:
    """Proper transverse size of one arcsecond, in kpc, at redshift ``z`` (z > 0)."""
    return cosmology().kpc_proper_per_arcmin(np.asarray(z, float)).value / 60.0


def r500c_kpc(log10_m500c: ArrayLike, z: ArrayLike) -> np.ndarray:
    """Radius in proper kpc that encloses 500 times the critical density at ``z``: M = (4/3) pi 500 rho_c r^3."""
    rho_c_msun_kpc3 = _critical_density_0_msun_kpc3() * cosmology().efunc(np.asarray(z, float)) ** 2
    return np.cbrt(3.0 * 10.0 ** np.asarray(log10_m500c, float) / (4.0 * np.pi * 500.0 * rho_c_msun_kpc3))


def m_star_i_mag(z: ArrayLike) -> np.ndarray:
    """SDSS i magnitude of an L* red cluster galaxy, 0.05 < z < 0.7: Rykoff et al. 2012, ApJ 746, 178 (18.39 at
    z = 0.25)."""
    log_z = np.log(np.asarray(z, float))
    return 22.44 + 3.36 * log_z + 0.273 * log_z**2 - 0.0618 * log_z**3 - 0.0227 * log_z**4


_RED_Z = np.arange(0.05, 0.71, 0.05)
_RED_COLOUR = np.array(
    [
        [1.792, 1.821, 1.860, 1.942, 2.078, 2.263, 2.452, 2.552, 2.641, 2.653, 2.513, 2.319, 2.084, 1.893],
        [0.863, 0.978, 1.126, 1.301, 1.456, 1.608, 1.742, 1.759, 1.746, 1.716, 1.701, 1.731, 1.780, 1.841],
        [0.377, 0.397, 0.435, 0.478, 0.516, 0.556, 0.592, 0.657, 0.778, 0.933, 1.071, 1.185, 1.290, 1.369],
        [0.332, 0.355, 0.367, 0.356, 0.353, 0.373, 0.399, 0.436, 0.468, 0.490, 0.512, 0.535, 0.574, 0.635],
    ]
)
"""u-g, g-r, r-i, i-z in SDSS magnitudes of kcorrect's template of luminous red galaxies (kcorrect-lrg1-v4; Blanton &
Roweis 2007, AJ 133, 734), as it is: no offset was fitted to any sky."""


def l_star_red_mag(z: ArrayLike) -> np.ndarray:
    """SDSS u, g, r, i, z magnitudes (..., 5) of an L* red galaxy, 0.05 < z < 0.7: i of :func:`m_star_i_mag`, colours of
    kcorrect's luminous red galaxy."""
    z = np.clip(np.asarray(z, float), _RED_Z[0], _RED_Z[-1])
    u_g, g_r, r_i, i_z = (np.interp(z, _RED_Z, colour) for colour in _RED_COLOUR)
    i = m_star_i_mag(z)
    return np.stack([i + r_i + g_r + u_g, i + r_i + g_r, i + r_i, i, i - i_z], axis=-1)
