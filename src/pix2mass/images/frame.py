"""One SDSS imaging frame: its pixels, its place on the sky and its noise.

Frames are described at https://data.sdss.org/datamodel/files/BOSS_PHOTOOBJ/frames/RERUN/RUN/CAMCOL/frame.html
(HDU0: nanomaggies per pixel, sky subtracted; HDU1: nanomaggies per count by column; HDU2: sky in counts).
"""

from __future__ import annotations

import bz2
import io
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from pix2mass.images.archive import BadFrame, Field
from pix2mass.images.grid import tan_wcs
from pix2mass.images.overlap import flux_and_variance
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

_FITS_TYPES = {-32: ">f4", -64: ">f8", "A": "S1", "B": "u1", "D": ">f8", "E": ">f4", "I": ">i2", "J": ">i4", "K": ">i8"}
"""Values of BITPIX, and letters of TFORM, that frames use."""

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
class Exposure:
    """What cutouts are made of: one band of one field with its noise.

    Attributes:
        pixels: (rows, cols, 2) float32, flux in nanomaggies and its variance; 0 and NaN where either is not usable.
        wcs: where they lie.
        hot: (2, n) columns and rows of pixels of ``SATURATION_COUNTS`` or more.
        typical_variance: median variance, infinite where no pixel is usable.
    """

    pixels: np.ndarray
    wcs: WCS
    hot: np.ndarray
    typical_variance: float


@dataclass(frozen=True, eq=False)
class Frame:
    """One band of one field: flux (rows, cols) in nanomaggies, big-endian, and what its noise is computed from."""

    flux: np.ndarray
    wcs: WCS
    calib: np.ndarray
    sky: np.ndarray
    x_interp: np.ndarray
    y_interp: np.ndarray

    def exposure(self, gain: float, dark_variance: float, room: np.ndarray | None = None) -> Exposure:
        """The frame with its noise: counts = f / calib + sky, variance = calib^2 (counts / gain + dark variance).

        Source: SDSS frame data model.

        Args:
            gain: electrons per count.
            dark_variance: counts^2.
            room: array that may be written over, for the pixels; a new one where it does not fit or is not given.
        """
        height, width = self.sky.shape
        low_x, share_x = _below(self.x_interp, width)
        low_y, share_y = _below(self.y_interp, height)
        sky = self.sky[:, low_x] * (1.0 - share_x) + self.sky[:, np.minimum(low_x + 1, width - 1)] * share_x
        shape = (*self.flux.shape, 2)
        pixels = room if room is not None and room.shape == shape else np.empty(shape, np.float32)
        hot = np.empty(self.flux.size, np.int32)
        numbers = np.array([gain, dark_variance, SATURATION_COUNTS], np.float32)
        n_hot = flux_and_variance(self.flux.view(np.uint32), self.calib, sky, low_y, share_y, numbers, pixels, hot)
        sample = pixels[::8, ::8, 1]
        sample = sample[np.isfinite(sample)]
        typical = float(np.median(sample)) if sample.size else np.inf
        rows, cols = np.divmod(hot[:n_hot], self.flux.shape[1])
        return Exposure(pixels, self.wcs, np.stack([cols, rows]), typical)


def _below(at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For linear interpolation in a table: the entry below each place, and the distance from there.

    Beyond the table's ends the end values hold.
    """
    at = np.clip(np.nan_to_num(at), 0.0, size - 1.0)
    low = np.minimum(at.astype(np.intp), max(size - 2, 0))
    return low, (at - low).astype(np.float32)


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
                flux, calib = _image(data, hdus[0]), _image(data, hdus[1])
                table = {name: _column(data, hdus[2], name) for name in ("ALLSKY", "XINTERP", "YINTERP")}
                if len(hdus) > 3 and (number := int(_column(data, hdus[3], "FIELD")[0])) != field.field:
                    raise BadFrame(f"wrong frame: expected FIELD = {field.field} in HDU3, found {number}")
    except BadFrame:
        raise
    except Exception as error:  # astropy fails in many ways on damaged files
        raise BadFrame(f"truncated, or parts missing: {error}") from None
    calib, sky, x, y = (np.array(part, np.float32) for part in (calib, *table.values()))
    shape = (y.size, x.size)
    if flux.shape != shape or flux.dtype != ">f4" or calib.shape != shape[1:] or sky.ndim != 2 or not sky.size:
        raise BadFrame(
            f"expected an image of shape {shape} as its sky table says, of type >f4, found {flux.shape} {flux.dtype}"
        )
    return Frame(flux, wcs, calib, sky, x, y)


def _image(data: bytes, hdu: Any) -> np.ndarray:
    """The numbers of an image HDU where they lie; astropy would copy them twice."""
    shape = hdu.shape
    place = hdu.fileinfo()["datLoc"]
    return np.frombuffer(data, _FITS_TYPES[hdu.header["BITPIX"]], math.prod(shape), place).reshape(shape)


def _column(data: bytes, hdu: Any, name: str) -> np.ndarray:
    """One column's numbers in the first row of a table HDU; astropy would make all columns of all HDUs first."""
    header, place = hdu.header, hdu.fileinfo()["datLoc"]
    for k in range(1, header["TFIELDS"] + 1):
        count, code = re.fullmatch(r"(\d*)([A-Z])", header[f"TFORM{k}"].strip()).groups()  # type: ignore[union-attr]
        dtype = np.dtype(_FITS_TYPES[code])
        count = int(count or 1)
        if header[f"TTYPE{k}"].strip().upper() == name:
            shape = [int(size) for size in header.get(f"TDIM{k}", f"({count})").strip("() ").split(",")]
            return np.frombuffer(data, dtype, count, place).reshape(shape[::-1])
        place += count * dtype.itemsize
    raise BadFrame(f"truncated, or parts missing: no column {name}")


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
