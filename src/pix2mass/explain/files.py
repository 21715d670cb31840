"""Maps as FITS: one extension per map, with the cutout's WCS."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from astropy.io import fits

_UNITS = {
    "flux": "nanomaggy/pixel",
    "gradient": "dex",
    "smoothgrad": "dex",
    "band_gradient": "",
    "band_smoothgrad": "",
}
"""Of maps that are not in dex per pixel (those of bands: log odds per pixel). Normalised flux has no unit."""
_LONGEST_NAME = 200


def file_name(cluster_id: str) -> str:
    """The id as a file's name without its ending: an id may hold any character, and may not name another folder."""
    name = quote(cluster_id, safe=" +()[],@=")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.blake2b(cluster_id.encode(), digest_size=8).hexdigest()}"
    return name


def write_fits(path: Path, maps: Mapping[str, Any]) -> None:
    """Write the contents of an ``.npz`` file of maps as FITS.

    Args:
        path: file to write, over an old one if there is one.
        maps: as :func:`pix2mass.explain.explain` keeps them. Those with bands become cubes, band by band.
    """
    primary = fits.PrimaryHDU()
    primary.header["OBJECT"] = _ascii(str(maps["id"]))
    for keyword, name, comment in (
        ("REDSHIFT", "z", "redshift"),
        ("LOGM500", "log10_m500c", "log10 M500c/Msun, as predicted"),
        ("LOGM_ERR", "log10_m500c_err", "[dex] its standard error"),
        ("LOGM_NET", "log10_m500c_networks", "the networks' mean: what the maps explain"),
        ("LOGM_SKY", "log10_m500c_blank_sky", "the networks' mean on blank sky"),
        ("IG_MISS", "completeness_error_dex", "[dex] missed by integrated gradients"),
    ):
        number = float(maps[name])
        primary.header[keyword] = (number if np.isfinite(number) else None, comment)
    primary.header["BESTMAP"] = (str(maps["default_method"]), "extension to look at first")
    primary.header["BANDS"] = (str(maps["bands"]), "planes of the cubes")
    hdus: list[Any] = [primary]
    for name, values in maps.items():
        values = np.asarray(values)
        if values.ndim < 2:
            continue
        hdu = fits.ImageHDU(values.astype(np.uint8) if values.dtype == bool else values, name=name)
        hdu.header.update(_wcs_keywords(maps, values.shape[-2:]))
        if name != "mask":
            hdu.header["BUNIT"] = _UNITS.get(name, "log odds/pixel" if name.startswith("band_") else "dex/pixel")
        hdus.append(hdu)
    part = path.with_name(f".{path.name}.part")
    fits.HDUList(hdus).writeto(part, overwrite=True)
    os.replace(part, path)


def _wcs_keywords(maps: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Tangent plane about the position, which is the middle of the image; north up, east left."""
    rows, columns = shape
    scale_deg = float(maps["pixel_scale_arcsec"]) / 3600.0
    return {
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CRVAL1": float(maps["ra_deg"]),
        "CRVAL2": float(maps["dec_deg"]),
        "CRPIX1": (columns + 1) / 2,
        "CRPIX2": (rows + 1) / 2,
        "CDELT1": -scale_deg,
        "CDELT2": scale_deg,
        "CUNIT1": "deg",
        "CUNIT2": "deg",
        "RADESYS": "ICRS",
    }


def _ascii(text: str) -> str:
    """A header holds printable ASCII only: other characters are written as Python would escape them."""
    return text.encode("unicode_escape").decode("ascii")[:68]
