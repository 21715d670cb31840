"""Galactic reddening at the positions of clusters, and dereddening with stated coefficients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pix2mass.types import EXTINCTION_PER_EBV, Pix2massError


def reddening(
    ra_deg: np.ndarray, dec_deg: np.ndarray, from_catalogue: np.ndarray | None = None, maps: Path | None = None
) -> tuple[np.ndarray, list[str]]:
    """E(B-V) on the scale of Schlegel, Finkbeiner & Davis 1998 (ApJ 500, 525), and where each value comes from.

    Tried in this order: the maps in the folder ``maps`` through sfdmap2; the maps that a configured ``dustmaps`` has;
    the catalogue's own column. sfdmap2 multiplies by 0.86 unless told otherwise; here it is told otherwise, since
    :data:`~pix2mass.types.EXTINCTION_PER_EBV` holds coefficients for the original scale.

    Args:
        ra_deg: right ascension, ICRS degrees, shape (n,).
        dec_deg: declination, ICRS degrees, shape (n,).
        from_catalogue: the catalogue's values, NaN where it has none, shape (n,).
        maps: folder with the two SFD maps (SFD_dust_4096_ngp.fits, SFD_dust_4096_sgp.fits).

    Returns:
        E(B-V) in mag, NaN where nothing gives it; and per row "sfdmap2", "dustmaps", "catalogue" or "none".

    Raises:
        Pix2massError: ``maps`` is given but cannot be used.
    """
    ra, dec = np.asarray(ra_deg, float), np.asarray(dec_deg, float)
    if maps is not None:
        return _from_sfdmap2(ra, dec, maps), ["sfdmap2"] * len(ra)
    values = _from_dustmaps(ra, dec)
    if values is not None:
        return values, ["dustmaps"] * len(ra)
    known = np.full(len(ra), np.nan) if from_catalogue is None else np.asarray(from_catalogue, float)
    return known, ["catalogue" if np.isfinite(value) else "none" for value in known]


def deredden(mag: ArrayLike, ebv_mag: ArrayLike, band: str) -> np.ndarray:
    """Magnitudes without Galactic extinction: m - R_band E(B-V), R from Schlafly & Finkbeiner 2011 (R_V = 3.1).

    Raises:
        Pix2massError: the band is not one of u, g, r, i, z.
    """
    if band not in EXTINCTION_PER_EBV:
        raise Pix2massError(f"band: expected one of {', '.join(EXTINCTION_PER_EBV)}, got {band!r}")
    return np.asarray(mag, float) - EXTINCTION_PER_EBV[band] * np.asarray(ebv_mag, float)


def _from_sfdmap2(ra: np.ndarray, dec: np.ndarray, maps: Path) -> np.ndarray:
    try:
        from sfdmap2.sfdmap import SFDMap  # type: ignore[import-not-found]
    except ImportError:
        raise Pix2massError(f"dust maps in {maps}: reading them needs sfdmap2: pip install sfdmap2") from None
    try:
        return np.asarray(SFDMap(str(maps), scaling=1.0).ebv(ra, dec), float)
    except Exception as error:  # noqa: BLE001  missing and broken files have errors of many kinds
        raise Pix2massError(
            f"{maps}: expected the SFD maps SFD_dust_4096_ngp.fits and SFD_dust_4096_sgp.fits: {error}"
        ) from None


def _from_dustmaps(ra: np.ndarray, dec: np.ndarray) -> np.ndarray | None:
    """None where dustmaps is not installed or has no maps: then the next source is asked."""
    try:
        from dustmaps.sfd import SFDQuery  # type: ignore[import-not-found]
    except ImportError:
        return None
    from astropy.coordinates import SkyCoord

    try:
        query: Any = SFDQuery()
    except Exception:  # noqa: BLE001  no maps downloaded: dustmaps raises what its file reader raises
        return None
    return np.asarray(query(SkyCoord(ra, dec, unit="deg")), float)
