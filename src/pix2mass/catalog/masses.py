"""Mass definitions: from 200c, 200m, 500c, with or without h, to log10(M500c / Msun) with H0 = 70, Om = 0.3, flat.

M_Delta is the mass inside the radius within which the mean density is Delta times the critical ("c") or mean ("m")
density of the universe at the cluster's redshift. Conversions assume an NFW profile (Navarro, Frenk & White 1997,
ApJ 490, 493) and a named relation of concentration and mass, and are done by colossus (Diemer 2018, ApJS 239, 35).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pix2mass.cosmology import H0_KM_S_MPC, OMEGA_M
from pix2mass.types import Pix2massError

TARGET = "500c"
DEFINITIONS = ("200c", "200m", "500c")
CONCENTRATIONS = ("diemer19", "duffy08", "bhattacharya13", "diemer15", "child18")
"""Concentration-mass relations of colossus: Diemer & Joyce 2019, Duffy et al. 2008, Bhattacharya et al. 2013, Diemer &
Kravtsov 2015, Child et al. 2018."""

# The concentration relations need a power spectrum; the mass definitions themselves use H0 and Om alone.
_COLOSSUS = {
    "flat": True,
    "H0": H0_KM_S_MPC,
    "Om0": OMEGA_M,
    "Ob0": 0.0469,
    "sigma8": 0.82,
    "ns": 0.95,
    "persistence": "",
}
_COLUMN = re.compile(
    r"(?P<log>log10_)?m(?P<delta>\d+)(?P<density>[cm])(?P<scale>_1e14)?(_msun)?(?P<h>_h)?", re.IGNORECASE
)
_LOOKS_LIKE_MASS = re.compile(
    r"(log(10)?_?)?m_?(\d{3,4}|vir|delta|sz|tot|lens|wl|cluster|halo)\w*|.*mass.*", re.IGNORECASE
)


@dataclass(frozen=True)
class MassDefinition:
    """What the numbers of a mass column mean.

    Attributes:
        overdensity: "200c", "200m" or "500c".
        per_h: the numbers are in Msun / h, with h = H0 / 100.
        unit_msun: what a value of 1 is, in Msun (or Msun / h).
        log10: the numbers are log10 of the mass in ``unit_msun``.
    """

    overdensity: str = TARGET
    per_h: bool = False
    unit_msun: float = 1.0
    log10: bool = False

    def __post_init__(self) -> None:
        if self.overdensity not in DEFINITIONS:
            raise Pix2massError(
                f"mass definition: expected one of {', '.join(DEFINITIONS)}, got {self.overdensity!r}; "
                "convert the masses first or leave the column out"
            )

    def __str__(self) -> str:
        unit = "Msun/h" if self.per_h else "Msun"
        scaled = unit if self.unit_msun == 1 else f"{self.unit_msun:.0e} {unit}".replace("e+", "e")
        return f"log10(M{self.overdensity} / {scaled})" if self.log10 else f"M{self.overdensity} in {scaled}"

    def msun(self, values: ArrayLike) -> np.ndarray:
        """Numbers of the column as masses in Msun, of this definition still."""
        linear = 10.0 ** np.asarray(values, float) if self.log10 else np.asarray(values, float)
        return linear * self.unit_msun / (H0_KM_S_MPC / 100.0 if self.per_h else 1.0)


def definition_of(name: str) -> MassDefinition | None:
    """The definition that a column's name states, e.g. ``log10_m500c``, ``m200m_1e14``, ``m200c_msun_h``, or None."""
    found = _COLUMN.fullmatch(name)
    if found is None:
        return None
    return MassDefinition(
        found["delta"] + found["density"].lower(),
        per_h=bool(found["h"]),
        unit_msun=1e14 if found["scale"] else 1.0,
        log10=bool(found["log"]),
    )


def looks_like_mass(name: str) -> bool:
    """Whether a column's name says cluster mass, with or without a definition."""
    return _LOOKS_LIKE_MASS.fullmatch(name) is not None and "stellar" not in name.lower()


def to_m500c(
    mass_msun: ArrayLike, z: ArrayLike, definition: MassDefinition, concentration: str = "diemer19"
) -> np.ndarray:
    """Convert masses to M500c.

    Args:
        mass_msun: masses in Msun of the given overdensity (see :meth:`MassDefinition.msun`), shape (n,); NaN stays NaN.
        z: redshifts, shape (n,).
        definition: what the masses are.
        concentration: name of the concentration-mass relation, one of :data:`CONCENTRATIONS`.

    Returns:
        M500c in Msun, shape (n,); NaN where the mass or the redshift is missing.

    Raises:
        Pix2massError: the relation is not known.
    """
    if concentration not in CONCENTRATIONS:
        raise Pix2massError(f"concentration: expected one of {', '.join(CONCENTRATIONS)}, got {concentration!r}")
    mass, redshift = np.broadcast_arrays(np.asarray(mass_msun, float), np.asarray(z, float))
    if definition.overdensity == TARGET:
        return np.array(mass)
    from colossus.halo import mass_adv

    out = np.full(mass.shape, np.nan)
    usable = np.isfinite(mass) & np.isfinite(redshift) & (mass > 0)
    h = H0_KM_S_MPC / 100.0
    with _colossus_cosmology():
        for index in np.flatnonzero(usable):
            converted, _, _ = mass_adv.changeMassDefinitionCModel(
                mass.flat[index] * h,
                redshift.flat[index],
                definition.overdensity,
                TARGET,
                profile="nfw",
                c_model=concentration,
            )
            out.flat[index] = np.ravel(converted)[0] / h
    return out


def log_mass_function(log10_m500c: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Natural logarithm of the comoving number of haloes per Mpc^3 and dex of M500c: Tinker et al. 2008, ApJ 688, 709.

    Args:
        log10_m500c: (n, m), 13 to 16; beyond, the value at the end.
        z: (n,) redshifts, 0 to 2; beyond, the value at the end.

    Returns:
        (n, m), interpolated between steps of 0.05 dex and 0.05 in redshift: within 0.01 of the function itself.
    """
    masses, redshifts, table = _mass_function_table()
    column = np.clip((log10_m500c - masses[0]) / (masses[1] - masses[0]), 0, len(masses) - 1.001)
    row = np.clip((z - redshifts[0]) / (redshifts[1] - redshifts[0]), 0, len(redshifts) - 1.001)[:, None]
    i, j = row.astype(int), column.astype(int)
    a, b = row - i, column - j
    low, high = (table[i, k] * (1 - a) + table[i + 1, k] * a for k in (j, j + 1))
    return low * (1 - b) + high * b


@functools.cache
def _mass_function_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from colossus.lss import mass_function

    masses, redshifts, h = np.linspace(13, 16, 61), np.linspace(0, 2, 41), H0_KM_S_MPC / 100.0
    with _colossus_cosmology():
        rows = [
            mass_function.massFunction(10**masses * h, at, q_in="M", q_out="dndlnM", mdef=TARGET, model="tinker08")
            for at in redshifts
        ]
    return masses, redshifts, np.log(np.array(rows) * h**3 * np.log(10.0))


@contextlib.contextmanager
def _colossus_cosmology() -> Iterator[Any]:
    """The project's cosmology inside colossus, which holds one for the whole process; the former one comes back."""
    from colossus.cosmology import cosmology

    before = cosmology.current_cosmo
    try:
        yield cosmology.setCosmology("pix2mass", params=_COLOSSUS)
    finally:
        cosmology.current_cosmo = before
