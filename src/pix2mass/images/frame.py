"""One SDSS imaging frame: its pixels, its place on the sky and its noise.

Frames are described at https://data.sdss.org/datamodel/files/BOSS_PHOTOOBJ/frames/RERUN/RUN/CAMCOL/frame.html
(HDU0: nanomaggies per pixel, sky subtracted; HDU1: nanomaggies per count by column; HDU2: sky in counts).
"""

from __future__ import annotations

import bz2
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from pix2mass.images.archive import BadFrame, Field
from pix2mass.images.grid import tan_wcs
from pix2mass.types import BANDS

SATURATION_COUNTS = 15_000.0
"""Counts from which a pixel is flagged SATURATED, approximate. Chips saturate at 50,000 to 64,000 counts (photoField,
SATURATION_LEVEL), but frames hold interpolated values there: in frame 94-1-0012 the cores of stars that the photometric
pipeline calls saturated peak at 16,500 to 32,000 counts. Unsaturated stars of 13.5 to 14.5 mag are flagged too."""

GAIN_E_PER_COUNT = (
    (1.62, 3.32, 4.71, 5.165, 4.745),
    (1.825, 3.855, 4.6, 6.565, 5.155),
    (1.59, 3.845, 4.72, 4.86, 4.885),
    (1.6, 3.995, 4.76, 4.885, 4.775),
    (1.47, 4.05, 4.725, 4.64, 3.48),
    (2.17, 4.035, 4.895, 4.76, 4.69),
)
"""Gain by camcol (rows) and band (u, g, r, i, z). Source: SDSS frame data model, for runs after 1100."""

DARK_VARIANCE_COUNTS2 = (
    (9.61, 15.6025, 1.8225, 7.84, 0.81),
    (12.6025, 1.44, 1.0, 6.25, 1.0),
    (8.7025, 1.3225, 1.3225, 4.6225, 1.0),
    (12.6025, 1.96, 1.3225, 7.5625, 12.6025),
    (9.3025, 1.1025, 0.81, 7.84, 2.1025),
    (7.0225, 1.8225, 0.9025, 5.0625, 1.21),
)
"""Read noise and dark current, as variance, by camcol and band. Source: SDSS frame data model, for runs after 1500."""

_EARLY_GAIN = {(2, "u"): 1.595}
"""Gains of runs up to 1100 that differ. Source: SDSS frame data model."""

_EARLY_DARK_VARIANCE = {(2, "i"): 5.76, (4, "i"): 6.25, (4, "z"): 9.61, (5, "z"): 1.8225}
"""Dark variances of runs up to 1500 that differ. Source: SDSS frame data model."""

WCS_COLUMNS = ("crval1", "crval2", "crpix1", "crpix2", "cd1_1", "cd1_2", "cd2_1", "cd2_2", "naxis1", "naxis2")


def read_header(chunks: Iterable[bytes], compressed: bool) -> fits.Header:
    """Primary header from the first pieces of a file: a bzip2 file need not be unpacked whole."""
    decompressor = bz2.BZ2Decompressor()
    text = b""
    for chunk in chunks:
        try:
            text += decompressor.decompress(chunk) if compressed else chunk
        except (OSError, EOFError) as error:
            raise BadFrame(f"not a bzip2 file: {error}") from None
        if len(text) >= 80 and not text.startswith(b"SIMPLE  ="):
            raise BadFrame("not a FITS file")
        end = text.find(b"END" + b" " * 77)
        while end >= 0 and end % 80:
            end = text.find(b"END" + b" " * 77, end + 1)
        if end >= 0:
            return fits.Header.fromstring(text[: end + 80].decode("ascii", "replace"))
        if len(text) > 1 << 20:
            break
    raise BadFrame("truncated: the header has no END")


def check_identity(header: fits.Header, field: Field, band: str) -> None:
    """The header must be that of the frame its name promises (its FRAME counts rows of the chip, not fields)."""
    expected = {"RUN": field.run, "CAMCOL": field.camcol, "FILTER": band}
    for key, value in expected.items():
        found = header.get(key)
        found = found.strip() if isinstance(found, str) else found
        if found != value:
            raise BadFrame(f"wrong frame: expected {key} = {value!r} in its header, found {found!r}")


def wcs_row(header: fits.Header) -> dict[str, float]:
    if header.get("CTYPE1") != "RA---TAN" or header.get("CTYPE2") != "DEC--TAN":
        raise BadFrame(f"expected CTYPE RA---TAN, DEC--TAN, found {header.get('CTYPE1')}, {header.get('CTYPE2')}")
    try:
        row = {name: float(header[name.upper()]) for name in WCS_COLUMNS}  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise BadFrame(f"no usable WCS: {error}") from None
    if not np.isfinite(list(row.values())).all() or row["cd1_1"] * row["cd2_2"] == row["cd1_2"] * row["cd2_1"]:
        raise BadFrame("no usable WCS: not finite, or singular")
    return row


def row_wcs(row: dict[str, float]) -> WCS:
    return tan_wcs(
        (row["crval1"], row["crval2"]),
        (row["crpix1"], row["crpix2"]),
        ((row["cd1_1"], row["cd1_2"]), (row["cd2_1"], row["cd2_2"])),
    )


@dataclass(frozen=True, eq=False)
class Frame:
    """One band of one field: flux (rows, cols) in nanomaggies, and what its noise is computed from."""

    flux: np.ndarray
    wcs: WCS
    calib: np.ndarray
    sky: np.ndarray
    x_interp: np.ndarray
    y_interp: np.ndarray

    def counts(self, rows: slice, cols: slice) -> np.ndarray:
        """Counts (rows, cols) before calibration and sky subtraction: f / calib + sky."""
        sky = _interpolate(_interpolate(self.sky, self.x_interp[cols], 1), self.y_interp[rows], 0)
        return self.flux[rows, cols] / self.calib[cols] + sky

    def variance(self, rows: slice, cols: slice, counts: np.ndarray, noise: Noise, band_index: int) -> np.ndarray:
        """Variance of the flux, nanomaggies^2: calib^2 (counts / gain + dark variance). Source: frame data model."""
        gain, dark = noise.gain[band_index], noise.dark_variance[band_index]
        return np.square(self.calib[cols]) * (counts / np.float32(gain) + np.float32(dark))


def _interpolate(table: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation of a table along an axis; beyond its ends the end values hold."""
    size = table.shape[axis]
    at = np.clip(at, 0.0, size - 1.0)
    low = np.minimum(at.astype(np.intp), max(size - 2, 0))
    share = (at - low).astype(np.float32)
    share = share if axis == 1 else share[:, None]
    high = np.minimum(low + 1, size - 1)
    return np.take(table, low, axis) * (1.0 - share) + np.take(table, high, axis) * share


def parse_frame(data: bytes, field: Field, band: str) -> Frame:
    if not data.startswith(b"SIMPLE  ="):
        raise BadFrame("not a FITS file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a truncated file warns before it fails; the failure is reported below
            with fits.open(io.BytesIO(data), memmap=False) as hdus:
                header = hdus[0].header  # type: ignore[union-attr]
                check_identity(header, field, band)
                wcs = row_wcs(wcs_row(header))
                flux, calib, sky = (_native(hdus[k].data) for k in (0, 1, 2))  # type: ignore[union-attr]
                if len(hdus) > 3 and (number := int(hdus[3].data["FIELD"][0])) != field.field:  # type: ignore[union-attr]
                    raise BadFrame(f"wrong frame: expected FIELD = {field.field} in HDU3, found {number}")
        table = {name: np.asarray(sky[name][0], np.float32) for name in ("ALLSKY", "XINTERP", "YINTERP")}
    except BadFrame:
        raise
    except Exception as error:  # astropy fails in many ways on damaged files
        raise BadFrame(f"truncated, or parts missing: {error}") from None
    shape = (table["YINTERP"].size, table["XINTERP"].size)
    if flux is None or flux.shape != shape or calib.shape != shape[1:] or table["ALLSKY"].ndim != 2:
        raise BadFrame(
            f"expected an image of shape {shape} as its sky table says, found {None if flux is None else flux.shape}"
        )
    return Frame(flux, wcs, calib, table["ALLSKY"], table["XINTERP"].ravel(), table["YINTERP"].ravel())


def _native(data: np.ndarray) -> np.ndarray:
    return data if data is None or data.dtype.names else np.ascontiguousarray(data, np.float32)


# --- Noise and PSF ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Noise:
    """Gain (5,), dark variance (5,) and PSF FWHM in arcsec (5,) of a field in ugriz, and whether they are its own."""

    gain: np.ndarray
    dark_variance: np.ndarray
    psf_fwhm_arcsec: np.ndarray
    approximate: bool


def tabulated_noise(run: int, camcol: int) -> tuple[np.ndarray, np.ndarray]:
    """Gain (5,), electrons per count, and dark variance (5,), counts^2, in u, g, r, i, z from the frame data model.

    Args:
        run: SDSS run.
        camcol: camera column, 1 to 6.
    """
    gain = np.array(GAIN_E_PER_COUNT[camcol - 1])
    dark_variance = np.array(DARK_VARIANCE_COUNTS2[camcol - 1])
    for k, band in enumerate(BANDS):
        if run <= 1100:
            gain[k] = _EARLY_GAIN.get((camcol, band), gain[k])
        if run <= 1500:
            dark_variance[k] = _EARLY_DARK_VARIANCE.get((camcol, band), dark_variance[k])
    return gain, dark_variance


def read_table(data: bytes, hdu: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The given columns, by upper-case name, of a FITS table; those it lacks are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(io.BytesIO(data), memmap=False) as hdus:
                table = hdus[hdu].data  # type: ignore[union-attr]
                names = {name.upper() for name in table.names}
                return {name: np.array(table[name], float) for name in columns if name in names}
    except Exception as error:  # astropy fails in many ways on damaged files
        raise BadFrame(f"not a readable FITS table: {error}") from None
