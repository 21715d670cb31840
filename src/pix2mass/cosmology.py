"""Distances and sizes in the one cosmology of the project: flat, H0 = 70 km/s/Mpc, Om = 0.3; and the magnitude of an L*
galaxy at a redshift."""

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
