"""Cutouts from SDSS imaging frames (DR12, rerun 301), from a folder or over HTTP, in the archive's own layout.

Frames are described at https://data.sdss.org/datamodel/files/BOSS_PHOTOOBJ/frames/RERUN/RUN/CAMCOL/frame.html
(HDU0: nanomaggies per pixel, sky subtracted; HDU1: nanomaggies per count by column; HDU2: sky in counts).
"""

from __future__ import annotations

import bz2
import io
import os
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Self, TypeVar
from urllib.parse import unquote, urlsplit

import httpx
import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel

from pix2mass.config import GridConfig
from pix2mass.images.grid import (
    MIN_COVERAGE,
    ClusterRow,
    pixel_scale_arcsec,
    read_position,
    resample,
    source_window,
    tan_wcs,
    target_wcs,
)
from pix2mass.types import BANDS, Cutout, Flag, Pix2massError, empty_cutout

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

FRAMES_FOLDER = "dr12/boss/photoObj/frames/301"
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

_FRAME_NAME = re.compile(r"frame-([ugriz])-(\d{6})-([1-6])-(\d{4})(\.fits(?:\.bz2)?)")
_WCS_COLUMNS = ("crval1", "crval2", "crpix1", "crpix2", "cd1_1", "cd1_2", "cd2_1", "cd2_2", "naxis1", "naxis2")
_MAX_BYTES = 64 << 20
_MAX_LISTED_RUNS = 200
_MAX_LISTED_FIELDS = 500
_HTTP_ATTEMPTS = 4
_HTTP_WAIT_S = 0.5
_CACHED_FIELDS = 3

K = TypeVar("K")
V = TypeVar("V")


class Field(NamedTuple):
    """One field of a run: the same 13.5' x 9.8' of sky in every band."""

    run: int
    camcol: int
    field: int

    def __str__(self) -> str:
        return f"{self.run}-{self.camcol}-{self.field:04d}"


class _BadFrame(Exception):
    """A file of the archive that cannot be used; the message says why."""


def _frame_path(field: Field, band: str, suffix: str) -> str:
    name = f"frame-{band}-{field.run:06d}-{field.camcol}-{field.field:04d}{suffix}"
    return f"{FRAMES_FOLDER}/{field.run}/{field.camcol}/{name}"


# --- Archives: where the files lie ------------------------------------------------------------------------------------


class _Folder:
    """An archive on disk."""

    def __init__(self, base: str | Path) -> None:
        self.base = Path(base).expanduser()
        if not (self.base / FRAMES_FOLDER).is_dir():
            raise Pix2massError(
                f"{self.base}: expected SDSS frames under {FRAMES_FOLDER}/RUN/CAMCOL/, found no such folder; "
                "give the folder (or the http(s) URL) that holds dr12"
            )

    def frame_paths(self) -> list[str]:
        paths = (self.base / FRAMES_FOLDER).glob("*/*/frame-*.fits*")
        return sorted(path.relative_to(self.base).as_posix() for path in paths)

    def read(self, path: str) -> bytes | None:
        """Content of a file, None where there is none."""
        try:
            if (self.base / path).stat().st_size > _MAX_BYTES:
                raise _BadFrame(f"larger than {_MAX_BYTES >> 20} MiB")
            return (self.base / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _BadFrame(str(error)) from None

    def chunks(self, path: str) -> Iterator[bytes]:
        """Content of a file, piece by piece."""
        try:
            with (self.base / path).open("rb") as file:
                while chunk := file.read(1 << 16):
                    yield chunk
        except OSError as error:
            raise _BadFrame(str(error)) from None

    def close(self) -> None:
        pass


class _Http:
    """An archive behind an http(s) URL. Files are kept in memory only."""

    def __init__(self, base: str) -> None:
        self.base = base.rstrip("/")
        self._client = httpx.Client(timeout=httpx.Timeout(60.0, connect=10.0), follow_redirects=True)

    def frame_paths(self) -> list[str]:
        """Frames found through directory listings, which only a small archive can answer."""
        paths: list[str] = []
        runs = [name for name in self._listing(FRAMES_FOLDER) if name.isdigit()]
        self._check_small(len(runs), _MAX_LISTED_RUNS, "runs")
        for run in runs:
            for camcol in self._listing(f"{FRAMES_FOLDER}/{run}"):
                if camcol in {"1", "2", "3", "4", "5", "6"}:
                    folder = f"{FRAMES_FOLDER}/{run}/{camcol}"
                    paths += [f"{folder}/{name}" for name in self._listing(folder) if _FRAME_NAME.fullmatch(name)]
                    self._check_small(len(paths), _MAX_LISTED_FIELDS * len(BANDS), "frames")
        return sorted(paths)

    def _check_small(self, count: int, limit: int, what: str) -> None:
        if count > limit:
            raise Pix2massError(
                f"{self.base}: more than {limit} {what}; an archive this large is not searched over HTTP: "
                "pass a frame index (--frame-index FILE)"
            )

    def _listing(self, folder: str) -> list[str]:
        page = self.read(folder + "/")
        if page is None:
            raise Pix2massError(
                f"{self.base}/{folder}/: expected a directory listing, got 'not found'; give the URL of what holds "
                "dr12, or pass a frame index (--frame-index FILE)"
            )
        links = re.findall(r"""href=["']([^"'?#]+)["']""", page.decode("utf-8", "replace"), re.IGNORECASE)
        return sorted({unquote(urlsplit(link).path).rstrip("/").rsplit("/", 1)[-1] for link in links})

    def read(self, path: str) -> bytes | None:
        content = io.BytesIO()
        for attempt in range(_HTTP_ATTEMPTS):
            content = io.BytesIO()
            try:
                for chunk in self._stream(path):
                    content.write(chunk)
                    if content.tell() > _MAX_BYTES:
                        raise _BadFrame(f"larger than {_MAX_BYTES >> 20} MiB")
                return content.getvalue()
            except FileNotFoundError:
                return None
            except httpx.TransportError as error:
                self._wait(attempt, path, error)
        return None

    def chunks(self, path: str) -> Iterator[bytes]:
        given = 0
        for attempt in range(_HTTP_ATTEMPTS):
            skip = given  # a new attempt starts anew: what was given already is not given twice
            try:
                for chunk in self._stream(path):
                    if rest := chunk[skip:]:
                        yield rest
                        given += len(rest)
                    skip = max(0, skip - len(chunk))
                return
            except FileNotFoundError:
                raise _BadFrame("not found") from None
            except httpx.TransportError as error:
                self._wait(attempt, path, error)

    def _stream(self, path: str) -> Iterator[bytes]:
        with self._client.stream("GET", f"{self.base}/{path}") as response:
            if response.status_code == 404:
                raise FileNotFoundError(path)
            if response.status_code == 429 or response.status_code >= 500:
                raise httpx.TransportError(f"HTTP status {response.status_code}")
            if response.status_code != 200:
                raise Pix2massError(
                    f"{self.base}/{path}: expected HTTP status 200, got {response.status_code}; check the URL"
                )
            yield from response.iter_bytes(1 << 16)

    def _wait(self, attempt: int, path: str, error: Exception) -> None:
        if attempt == _HTTP_ATTEMPTS - 1:
            raise Pix2massError(
                f"{self.base}/{path}: no answer after {_HTTP_ATTEMPTS} attempts ({error}); check the address and the "
                "network, then run the same command again"
            ) from None
        time.sleep(_HTTP_WAIT_S * 2**attempt)

    def close(self) -> None:
        self._client.close()


def _open_archive(base: str | Path) -> _Folder | _Http:
    if "://" not in str(base):
        return _Folder(base)
    scheme = urlsplit(str(base)).scheme
    if scheme not in ("http", "https"):
        raise Pix2massError(f"{base}: expected a folder or an http(s) URL, got scheme {scheme!r}")
    return _Http(str(base))


# --- Reading frames ---------------------------------------------------------------------------------------------------


def _read_header(chunks: Iterable[bytes], compressed: bool) -> fits.Header:
    """Primary header from the first pieces of a file: a bzip2 file need not be unpacked whole."""
    decompressor = bz2.BZ2Decompressor()
    text = b""
    for chunk in chunks:
        try:
            text += decompressor.decompress(chunk) if compressed else chunk
        except (OSError, EOFError) as error:
            raise _BadFrame(f"not a bzip2 file: {error}") from None
        if len(text) >= 80 and not text.startswith(b"SIMPLE  ="):
            raise _BadFrame("not a FITS file")
        end = text.find(b"END" + b" " * 77)
        while end >= 0 and end % 80:
            end = text.find(b"END" + b" " * 77, end + 1)
        if end >= 0:
            return fits.Header.fromstring(text[: end + 80].decode("ascii", "replace"))
        if len(text) > 1 << 20:
            break
    raise _BadFrame("truncated: the header has no END")


def _decompress(data: bytes) -> bytes:
    """Unpack bzip2, of one stream or several, up to a size no frame reaches."""
    parts, room = [], _MAX_BYTES
    while data:
        decompressor = bz2.BZ2Decompressor()
        try:
            parts.append(decompressor.decompress(data, room))
        except (OSError, EOFError) as error:
            raise _BadFrame(f"not a bzip2 file: {error}") from None
        room -= len(parts[-1])
        if not decompressor.eof:
            raise _BadFrame("truncated bzip2 file" if room > 0 else f"unpacks to more than {_MAX_BYTES >> 20} MiB")
        data = decompressor.unused_data
    return b"".join(parts)


def _check_identity(header: fits.Header, field: Field, band: str) -> None:
    """The header must be that of the frame its name promises (its FRAME counts rows of the chip, not fields)."""
    expected = {"RUN": field.run, "CAMCOL": field.camcol, "FILTER": band}
    for key, value in expected.items():
        found = header.get(key)
        found = found.strip() if isinstance(found, str) else found
        if found != value:
            raise _BadFrame(f"wrong frame: expected {key} = {value!r} in its header, found {found!r}")


def _wcs_row(header: fits.Header) -> dict[str, float]:
    if header.get("CTYPE1") != "RA---TAN" or header.get("CTYPE2") != "DEC--TAN":
        raise _BadFrame(f"expected CTYPE RA---TAN, DEC--TAN, found {header.get('CTYPE1')}, {header.get('CTYPE2')}")
    try:
        row = {name: float(header[name.upper()]) for name in _WCS_COLUMNS}  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise _BadFrame(f"no usable WCS: {error}") from None
    if not np.isfinite(list(row.values())).all() or row["cd1_1"] * row["cd2_2"] == row["cd1_2"] * row["cd2_1"]:
        raise _BadFrame("no usable WCS: not finite, or singular")
    return row


def _row_wcs(row: dict[str, float]) -> WCS:
    return tan_wcs(
        (row["crval1"], row["crval2"]),
        (row["crpix1"], row["crpix2"]),
        ((row["cd1_1"], row["cd1_2"]), (row["cd2_1"], row["cd2_2"])),
    )


@dataclass(frozen=True, eq=False)
class _Frame:
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

    def variance(self, rows: slice, cols: slice, counts: np.ndarray, noise: _Noise, band_index: int) -> np.ndarray:
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


def _parse_frame(data: bytes, field: Field, band: str) -> _Frame:
    if not data.startswith(b"SIMPLE  ="):
        raise _BadFrame("not a FITS file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a truncated file warns before it fails; the failure is reported below
            with fits.open(io.BytesIO(data), memmap=False) as hdus:
                header = hdus[0].header  # type: ignore[union-attr]
                _check_identity(header, field, band)
                wcs = _row_wcs(_wcs_row(header))
                flux, calib, sky = (_native(hdus[k].data) for k in (0, 1, 2))  # type: ignore[union-attr]
                if len(hdus) > 3 and (number := int(hdus[3].data["FIELD"][0])) != field.field:  # type: ignore[union-attr]
                    raise _BadFrame(f"wrong frame: expected FIELD = {field.field} in HDU3, found {number}")
        table = {name: np.asarray(sky[name][0], np.float32) for name in ("ALLSKY", "XINTERP", "YINTERP")}
    except _BadFrame:
        raise
    except Exception as error:  # astropy fails in many ways on damaged files
        raise _BadFrame(f"truncated, or parts missing: {error}") from None
    shape = (table["YINTERP"].size, table["XINTERP"].size)
    if flux is None or flux.shape != shape or calib.shape != shape[1:] or table["ALLSKY"].ndim != 2:
        raise _BadFrame(
            f"expected an image of shape {shape} as its sky table says, found {None if flux is None else flux.shape}"
        )
    return _Frame(flux, wcs, calib, table["ALLSKY"], table["XINTERP"].ravel(), table["YINTERP"].ravel())


def _native(data: np.ndarray) -> np.ndarray:
    return data if data is None or data.dtype.names else np.ascontiguousarray(data, np.float32)


# --- Noise and PSF ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Noise:
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


def _read_table(data: bytes, hdu: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The given columns, by upper-case name, of a FITS table; those it lacks are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(io.BytesIO(data), memmap=False) as hdus:
                table = hdus[hdu].data  # type: ignore[union-attr]
                names = {name.upper() for name in table.names}
                return {name: np.array(table[name], float) for name in columns if name in names}
    except Exception as error:  # astropy fails in many ways on damaged files
        raise _BadFrame(f"not a readable FITS table: {error}") from None


class _Cache(Generic[K, V]):
    """The last few values, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __getitem__(self, key: K) -> V:
        self._values.move_to_end(key)
        return self._values[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._values[key] = value
        while len(self._values) > self._size:
            self._values.popitem(last=False)


# --- Index ------------------------------------------------------------------------------------------------------------


class FrameIndex:
    """Which frames exist and where on the sky each band of each field lies.

    Attributes:
        table: one row per frame: ``run, camcol, field, band, suffix`` (.fits or .fits.bz2) and the frame's own WCS
            (``crval1`` to ``naxis2``, FITS conventions, degrees). Bands of a field differ by up to 14 pixels.
    """

    def __init__(self, table: Table) -> None:
        """Make an index from a table.

        Args:
            table: with the columns that the class names.

        Raises:
            Pix2massError: columns are missing or hold values that no frame has.
        """
        needed = ("run", "camcol", "field", "band", "suffix", *_WCS_COLUMNS)
        missing = [name for name in needed if name not in table.colnames]
        if missing:
            raise Pix2massError(
                f"frame index: expected the columns {', '.join(needed)}; missing: {', '.join(missing)}; "
                "make the index anew with FrameIndex.from_base(BASE).to_file(FILE)"
            )
        columns = {name: np.asarray(table[name]).tolist() for name in needed[:5]}
        self._bands: list[str] = columns["band"]
        wrong = sorted(set(columns["suffix"]) - {".fits", ".fits.bz2"}) + sorted(set(self._bands) - set(BANDS))
        if wrong:
            raise Pix2massError(f"frame index: expected bands of {BANDS} and suffixes .fits, .fits.bz2, got {wrong}")
        if any(np.asarray(table[name]).dtype.kind not in "iu" for name in ("run", "camcol", "field")):
            raise Pix2massError("frame index: expected whole numbers in the columns run, camcol and field")
        self.table = table
        self._fields = [
            Field(*place) for place in zip(columns["run"], columns["camcol"], columns["field"], strict=True)
        ]
        self._suffix = dict(zip(zip(self._fields, self._bands, strict=True), columns["suffix"], strict=True))
        self._wcs = np.stack([np.asarray(table[name], float) for name in _WCS_COLUMNS], axis=1).reshape(-1, 10)
        crval, crpix, cd, naxis = _split_wcs(self._wcs)
        if not (np.isfinite(self._wcs).all() and (np.linalg.det(cd) != 0.0).all()):
            raise Pix2massError("frame index: expected finite numbers and a matrix cd that can be inverted in each row")
        offset = np.einsum("kij,kj->ki", cd, (naxis + 1.0) / 2.0 - crpix)
        self._centres = _unit_vectors(*_deproject(offset[:, 0], offset[:, 1], crval[:, 0], crval[:, 1]))
        self._radius_deg = 0.5 * np.hypot(*np.einsum("kij,kj->ik", np.abs(cd), naxis))

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def fields(self) -> list[Field]:
        """All fields, sorted."""
        return sorted(set(self._fields))

    @classmethod
    def from_base(cls, base: str | Path, progress: Progress | None = None) -> Self:
        """Index the frames of an archive by reading the start of each file.

        Args:
            base: folder, or http(s) URL with directory listings, that holds ``dr12/boss/photoObj/frames/301``.
            progress: called with (frames done, frames in all).

        Returns:
            The index. A frame whose header cannot be read keeps its place on the sky from another band of its field, so
            that cutouts there are flagged; without such a band it is left out, with a warning.

        Raises:
            Pix2massError: there are no frames, or too many for directory listings.
        """
        archive = _open_archive(base)
        try:
            paths = archive.frame_paths()
            # A frame that lies there both ways is taken from the compressed file.
            names = {m[0].removesuffix(".bz2"): m for path in paths if (m := _FRAME_NAME.search(path))}
            rows, failed = [], []
            for done, (match, path) in enumerate((m, m.string) for m in names.values()):
                band, run, camcol, number, suffix = match.groups()
                field = Field(int(run), int(camcol), int(number))
                place = {**field._asdict(), "band": band, "suffix": suffix}
                try:
                    header = _read_header(archive.chunks(path), suffix.endswith(".bz2"))
                    _check_identity(header, field, band)
                    rows.append({**place, **_wcs_row(header)})
                except _BadFrame as problem:
                    failed.append((place, path, str(problem)))
                if progress is not None:
                    progress(done + 1, len(names))
        finally:
            archive.close()
        siblings = {(row["run"], row["camcol"], row["field"]): row for row in rows}
        for place, path, problem in failed:
            sibling = siblings.get((place["run"], place["camcol"], place["field"]))
            fate = "left out of the index" if sibling is None else "its band is missing from cutouts there"
            warnings.warn(f"{base}/{path}: {problem}; {fate}", stacklevel=2)
            if sibling is not None:
                rows.append({**sibling, **place})
        if not rows:
            raise Pix2massError(
                f"{base}: expected frames such as {_frame_path(Field(94, 1, 12), 'r', '.fits.bz2')}, found none "
                "that can be read"
            )
        rows.sort(key=lambda row: (row["run"], row["camcol"], row["field"], BANDS.index(row["band"])))
        return cls(Table(rows=rows, names=list(rows[0])))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read an index written by ``to_file``.

        Raises:
            Pix2massError: the file is missing or is no frame index.
        """
        path = Path(path)
        if not path.is_file():
            raise Pix2massError(f"{path}: no such file; expected a frame index")
        try:
            table = Table.read(path) if path.suffix in (".fits", ".fit") else Table.read(path, format="ascii.ecsv")
            table.convert_bytestring_to_unicode()
        except Exception as error:  # astropy's readers fail in many ways
            raise Pix2massError(f"{path}: expected a frame index (ECSV or FITS table): {error}") from None
        try:
            return cls(table)
        except Pix2massError as error:
            raise Pix2massError(f"{path}: {error}") from None

    def to_file(self, path: str | Path) -> None:
        """Write the index as ECSV, or as a FITS table where the name ends in .fits (better for 100,000 frames)."""
        path = Path(path)
        self.table.write(path, format="fits" if path.suffix in (".fits", ".fit") else "ascii.ecsv", overwrite=True)

    def suffix(self, field: Field, band: str) -> str | None:
        """File suffix of a frame, None where the index does not have it."""
        return self._suffix.get((field, band))

    def covering(self, ra_deg: float, dec_deg: float, width_arcsec: float) -> dict[str, list[Field]]:
        """Fields that a square on the sky overlaps, band by band.

        Args:
            ra_deg: right ascension of the square's centre, ICRS degrees.
            dec_deg: declination of its centre.
            width_arcsec: its width; its sides run north and east.

        Returns:
            For each band that has any, the fields whose frame overlaps the square, sorted.
        """
        half_deg = width_arcsec / 7200.0
        reach = np.minimum(self._radius_deg + 1.5 * half_deg, 90.0)
        near = np.flatnonzero(self._centres @ _unit_vectors(ra_deg, dec_deg) >= np.cos(np.radians(reach)))
        if not near.size:
            return {}
        crval, crpix, cd, naxis = _split_wcs(self._wcs[near])
        signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
        # Two convex quadrilaterals are apart if and only if a side of one of them separates them.
        corners = (naxis + 1.0)[:, None] / 2.0 + signs * (naxis / 2.0)[:, None]
        offset = np.einsum("kij,kcj->kci", cd, corners - crpix[:, None])
        sky = _deproject(offset[..., 0], offset[..., 1], crval[:, :1], crval[:, 1:])
        in_square = np.stack(_project(*sky, ra_deg, dec_deg), axis=-1)
        sky = _deproject(signs[:, 0] * half_deg, signs[:, 1] * half_deg, ra_deg, dec_deg)
        offset = np.stack(_project(*sky, crval[:, :1], crval[:, 1:]), axis=-1)
        in_frame = np.einsum("kij,kcj->kci", np.linalg.inv(cd), offset) + crpix[:, None]
        overlap = (in_square.min(1) < half_deg) & (in_square.max(1) > -half_deg)
        overlap &= (in_frame.min(1) < naxis + 0.5) & (in_frame.max(1) > 0.5)
        found: dict[str, list[Field]] = {}
        for k in near[overlap.all(axis=1)]:
            found.setdefault(self._bands[k], []).append(self._fields[k])
        return {band: sorted(found[band]) for band in BANDS if band in found}


def _split_wcs(wcs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (k, 10) as crval (k, 2), crpix (k, 2), cd (k, 2, 2) and naxis (k, 2)."""
    return wcs[:, 0:2], wcs[:, 2:4], wcs[:, 4:8].reshape(-1, 2, 2), wcs[:, 8:10]


def _unit_vectors(ra_deg: np.ndarray | float, dec_deg: np.ndarray | float) -> np.ndarray:
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def _deproject(xi_deg, eta_deg, ra0_deg, dec0_deg) -> tuple[np.ndarray, np.ndarray]:
    """Sky position of tangent-plane coordinates (Calabretta & Greisen 2002, A&A 395, 1077, section 5.1.3)."""
    xi, eta, dec0 = np.radians(xi_deg), np.radians(eta_deg), np.radians(dec0_deg)
    depth = np.cos(dec0) - eta * np.sin(dec0)
    ra = ra0_deg + np.degrees(np.arctan2(xi, depth))
    dec = np.degrees(np.arctan2(np.sin(dec0) + eta * np.cos(dec0), np.hypot(xi, depth)))
    return ra, dec


def _project(ra_deg, dec_deg, ra0_deg, dec0_deg) -> tuple[np.ndarray, np.ndarray]:
    """Tangent-plane coordinates, degrees east and north, of positions less than 90 degrees from the tangent point."""
    ra, dec, dec0 = np.radians(ra_deg - ra0_deg), np.radians(dec_deg), np.radians(dec0_deg)
    depth = np.sin(dec) * np.sin(dec0) + np.cos(dec) * np.cos(dec0) * np.cos(ra)
    xi = np.cos(dec) * np.sin(ra) / depth
    eta = (np.sin(dec) * np.cos(dec0) - np.cos(dec) * np.sin(dec0) * np.cos(ra)) / depth
    return np.degrees(xi), np.degrees(eta)


# --- Cutouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Piece:
    """One frame on the target grid: arrays (n, n); ``footprint`` is the coverage with bad pixels counted as covered."""

    flux: np.ndarray
    variance: np.ndarray
    coverage: np.ndarray
    footprint: np.ndarray
    weight: np.ndarray
    psf_fwhm_arcsec: float
    flags: Flag


class FrameSource:
    """Cutouts from SDSS frames.

    The bands are aligned through each frame's own WCS and regridded by area (see ``grid.resample``). Where fields of
    one run and camera column overlap, the one that covers a pixel best is taken: their 128 common rows are the same
    exposure. Different runs and columns are independent and are averaged with weights coverage / typical variance of
    the frame, one number per frame, so that bright sources are not weighted down. Backgrounds and PSFs are not matched.

    Not safe to share between threads: give each thread or process its own.
    """

    def __init__(self, base: str | Path, grid: GridConfig, index: FrameIndex | str | Path | None = None) -> None:
        """Open an archive.

        Args:
            base: folder, or http(s) URL, that holds ``dr12``.
            grid: the pixel grid and the bands.
            index: which frames exist, or a file of ``FrameIndex.to_file``; by default ``base`` is searched.

        Raises:
            Pix2massError: ``base`` is no archive, or ``index`` is no index.
        """
        self.grid = grid
        self._archive = _open_archive(base)
        self._base = str(base).rstrip("/")
        if index is None:
            index = FrameIndex.from_base(base)
        self.index = index if isinstance(index, FrameIndex) else FrameIndex.from_file(index)
        self._frames: _Cache[tuple[Field, str], _Frame | _BadFrame] = _Cache(_CACHED_FIELDS * len(grid.bands))
        self._noise: _Cache[Field, _Noise] = _Cache(64)
        self._photo_fields: _Cache[tuple[int, int], dict[str, np.ndarray]] = _Cache(16)
        self._pool = ThreadPoolExecutor(min(len(grid.bands), os.cpu_count() or 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the frames in memory and close connections."""
        self._pool.shutdown()
        self._archive.close()
        self._frames = _Cache(0)

    def cutout(self, cluster: ClusterRow) -> Cutout:
        """The cutout of one cluster.

        Args:
            cluster: dict or table row with ``ra_deg``, ``dec_deg`` (ICRS degrees) and, where the grid's width is in
                kpc, ``z``; ``id`` appears in messages.

        Returns:
            The bands of ``grid`` on its pixels. What is wrong with them is in ``flags``; a frame that cannot be read is
            also warned about by name, and its band is treated as missing there.

        Raises:
            Pix2massError: the position or redshift is not usable, or the archive does not answer.
        """
        position = read_position(cluster)
        try:
            scale = pixel_scale_arcsec(self.grid, position.z)
        except Pix2massError as error:
            raise Pix2massError(f"cluster {position.name}: {error}") from None
        n_pixels, bands = self.grid.n_pixels, self.grid.bands
        wcs = target_wcs(position.ra_deg, position.dec_deg, scale, n_pixels)
        covering = self.index.covering(position.ra_deg, position.dec_deg, scale * n_pixels)
        covering = {band: covering.get(band, []) for band in bands}

        flags = Flag(0)
        pieces: dict[str, dict[tuple[int, int], list[_Piece]]] = {band: {} for band in bands}
        lacking = set()
        for field in sorted(set().union(*covering.values())):
            lacking |= {band for band in bands if self.index.suffix(field, band) is None}
            for band, frame in self._load(field, [band for band in bands if field in covering[band]]).items():
                if isinstance(frame, _BadFrame):
                    lacking.add(band)
                    flags |= Flag.UNREADABLE
                    continue
                piece = _regrid(frame, self._field_noise(field), BANDS.index(band), wcs, n_pixels)
                if piece is not None:
                    pieces[band].setdefault((field.run, field.camcol), []).append(piece)
                    flags |= piece.flags

        combined = {band: _combine(list(strips.values()), n_pixels) for band, strips in pieces.items()}
        usable = np.stack([combined[band].coverage >= MIN_COVERAGE for band in bands])
        inside = np.stack([combined[band].footprint >= MIN_COVERAGE for band in bands])
        if not usable.any():
            flags = (flags & (Flag.UNREADABLE | Flag.BAD_PIXELS)) | Flag.OUTSIDE
            return empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, flags)
        somewhere = inside.any(axis=0)
        for k, band in enumerate(bands):
            if not inside[k].any() or (band in lacking and (somewhere & ~inside[k]).any()):
                flags |= Flag.MISSING_BAND
            elif not inside[k].all():
                flags |= Flag.PARTLY_OUTSIDE
        if not somewhere.all():
            flags |= Flag.PARTLY_OUTSIDE
        flux = np.stack([combined[band].flux for band in bands])
        sigma = np.sqrt(np.stack([combined[band].variance for band in bands]))
        return Cutout(
            flux=np.where(usable, flux, 0.0).astype(np.float32),
            sigma=np.where(usable, sigma, 0.0).astype(np.float32),
            mask=~usable,
            bands=bands,
            ra_deg=position.ra_deg,
            dec_deg=position.dec_deg,
            pixel_scale_arcsec=scale,
            psf_fwhm_arcsec=np.array([combined[band].psf_fwhm_arcsec for band in bands], np.float32),
            flags=flags,
        )

    def _load(self, field: Field, bands: list[str]) -> dict[str, _Frame | _BadFrame]:
        """Frames of a field, or why they cannot be used; unpacked side by side, since bzip2 is what takes the time."""
        new = [band for band in bands if (field, band) not in self._frames]
        loaded = {band: self._frames[field, band] for band in bands if band not in new}
        paths = [_frame_path(field, band, self.index.suffix(field, band) or "") for band in new]
        for band, path, content in zip(new, paths, self._pool.map(self._read_frame, paths), strict=True):
            try:
                if isinstance(content, _BadFrame):
                    raise content
                frame = _parse_frame(content, field, band)
            except _BadFrame as problem:
                frame = problem
                warnings.warn(f"{self._base}/{path}: {problem}; band {band} is missing", stacklevel=3)
            loaded[band] = self._frames[field, band] = frame
        return {band: loaded[band] for band in bands}

    def _read_frame(self, path: str) -> bytes | _BadFrame:
        """Content of a frame, unpacked. Runs in threads, where no warning may be raised or caught."""
        try:
            data = self._archive.read(path)
            if data is None:
                raise _BadFrame("no such file, though the frame index lists it")
            return _decompress(data) if path.endswith(".bz2") else data
        except _BadFrame as problem:
            return problem

    def _field_noise(self, field: Field) -> _Noise:
        """Gain, dark variance and PSF of a field: from photoField and psField where there, else from the data model."""
        if field not in self._noise:
            found = {}
            table = self._photo_field(field.run, field.camcol)
            rows = np.flatnonzero(table.get("FIELD", np.empty(0)) == field.field)
            if rows.size:
                found = {name: column[rows[0]] for name, column in table.items()}
            gain, dark_variance = tabulated_noise(field.run, field.camcol)
            own = all(name in found for name in ("GAIN", "DARK_VARIANCE"))
            psf = found["PSF_WIDTH"] if "PSF_WIDTH" in found else self._ps_field(field)
            self._noise[field] = _Noise(
                gain=found["GAIN"] if own else gain,
                dark_variance=found["DARK_VARIANCE"] if own else dark_variance,
                psf_fwhm_arcsec=np.where(np.isfinite(psf) & (psf > 0.0), psf, np.nan),
                approximate=not own,
            )
        return self._noise[field]

    def _photo_field(self, run: int, camcol: int) -> dict[str, np.ndarray]:
        if (run, camcol) not in self._photo_fields:
            path = f"dr12/boss/photoObj/301/{run}/photoField-{run:06d}-{camcol}.fits"
            columns = ("FIELD", "GAIN", "DARK_VARIANCE", "PSF_WIDTH")
            self._photo_fields[run, camcol] = self._read_optional(path, 1, columns)
        return self._photo_fields[run, camcol]

    def _ps_field(self, field: Field) -> np.ndarray:
        name = f"psField-{field.run:06d}-{field.camcol}-{field.field:04d}.fit"
        path = f"dr12/boss/photo/redux/301/{field.run}/objcs/{field.camcol}/{name}"
        return self._read_optional(path, 6, ("PSF_WIDTH",)).get("PSF_WIDTH", np.full(5, np.nan)).ravel()

    def _read_optional(self, path: str, hdu: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
        try:
            data = self._archive.read(path)
            return {} if data is None else _read_table(data, hdu, columns)
        except _BadFrame as problem:
            warnings.warn(f"{self._base}/{path}: {problem}; going on without it", stacklevel=4)
            return {}


def _regrid(frame: _Frame, noise: _Noise, band_index: int, wcs: WCS, n_pixels: int) -> _Piece | None:
    """One frame on the target grid, None where it does not reach it."""
    window = source_window(frame.wcs, wcs, n_pixels, frame.flux.shape)
    if window is None:
        return None
    rows, cols = window
    flux = frame.flux[rows, cols]
    with np.errstate(all="ignore"):
        counts = frame.counts(rows, cols)
        variance = frame.variance(rows, cols, counts, noise, band_index)
        bad = ~(np.isfinite(flux) & np.isfinite(variance) & (variance > 0.0))
        hot = counts >= SATURATION_COUNTS
    typical = np.inf if bad.all() else float(np.median(variance[~bad][::16]))
    window_wcs = frame.wcs[rows, cols]
    out_flux, out_variance, coverage = resample(flux, variance, bad, window_wcs, wcs, n_pixels)
    footprint = coverage
    flags = Flag.SIGMA_APPROXIMATE if noise.approximate else Flag(0)
    if bad.any():
        nothing = np.zeros_like(flux)
        footprint = resample(nothing, nothing, None, window_wcs, wcs, n_pixels)[2]
        if (coverage < footprint - 1e-6).any():
            flags |= Flag.BAD_PIXELS
    if not (footprint > 0.0).any():
        return None
    if _any_inside(hot, window_wcs, wcs, n_pixels):
        flags |= Flag.SATURATED
    weight = np.full(coverage.shape, 1.0 / typical)
    return _Piece(out_flux, out_variance, coverage, footprint, weight, float(noise.psf_fwhm_arcsec[band_index]), flags)


def _any_inside(pixels: np.ndarray, source: WCS, target: WCS, n_pixels: int) -> bool:
    rows, cols = np.nonzero(pixels)
    if not rows.size:
        return False
    x, y = pixel_to_pixel(source, target, cols, rows)
    edge = n_pixels - 0.5
    return bool(((x > -0.5) & (x < edge) & (y > -0.5) & (y < edge)).any())


def _combine(strips: list[list[_Piece]], n_pixels: int) -> _Piece:
    """Merge pieces: the best covering one within a run and column, the weighted mean between them."""
    flux, variance, weight_sum, coverage, footprint = np.zeros((5, n_pixels, n_pixels))
    psf_sum = psf_weight = 0.0
    for strip in strips:
        best = np.argmax([piece.coverage for piece in strip], axis=0)[None]
        chosen = {
            name: np.take_along_axis(np.stack([getattr(piece, name) for piece in strip]), best, 0)[0]
            for name in ("flux", "variance", "coverage", "weight")
        }
        weight = chosen["coverage"] * chosen["weight"]
        flux += weight * chosen["flux"]
        variance += weight**2 * chosen["variance"]
        weight_sum += weight
        coverage += chosen["coverage"]
        footprint += np.max([piece.footprint for piece in strip], axis=0)
        for k, piece in enumerate(strip):
            if np.isfinite(piece.psf_fwhm_arcsec):
                share = float(weight[best[0] == k].sum())
                psf_sum, psf_weight = psf_sum + share * piece.psf_fwhm_arcsec, psf_weight + share
    scale = np.divide(1.0, weight_sum, out=np.zeros_like(weight_sum), where=weight_sum > 0.0)
    psf = psf_sum / psf_weight if psf_weight > 0.0 else np.nan
    return _Piece(
        flux * scale,
        variance * scale**2,
        np.minimum(coverage, 1.0),
        np.minimum(footprint, 1.0),
        weight_sum,
        psf,
        Flag(0),
    )


def random_positions(
    index: FrameIndex, n_per_field: int, seed: int, margin_arcsec: float = 60.0, z: float | None = None
) -> QTable:
    """Random positions inside frames, e.g. for training images without clusters or labels.

    Args:
        index: the frames; of each field the r band's footprint is used, or that of the first band it has.
        n_per_field: positions in each field.
        seed: a field's positions depend on the seed and on the field alone.
        margin_arcsec: least distance from the frame's edge.
        z: redshift to put into the table, NaN by default.

    Returns:
        Columns ``id`` (RUN-CAMCOL-FIELD-NUMBER), ``ra_deg``, ``dec_deg``, ``z``, ``group`` (RUN-CAMCOL-FIELD).

    Raises:
        Pix2massError: a number is out of range, or the margin leaves nothing of a frame.
    """
    if n_per_field < 1 or margin_arcsec < 0.0:
        raise Pix2massError(
            f"random positions: expected n_per_field of 1 or more and margin_arcsec of 0 or more, got {n_per_field} "
            f"and {margin_arcsec}"
        )
    chosen: dict[Field, int] = {}
    for k, field in enumerate(index._fields):
        if field not in chosen or index._bands[k] == "r":
            chosen[field] = k
    names, groups, ra_parts, dec_parts = [], [], [], []
    for field in index.fields:
        crval, crpix, cd, naxis = (part[0] for part in _split_wcs(index._wcs[chosen[field]][None]))
        margin_px = margin_arcsec / 3600.0 / np.sqrt(abs(np.linalg.det(cd)))
        if 2.0 * margin_px >= naxis.min():
            raise Pix2massError(
                f"random positions: a margin of {margin_arcsec:g} arcsec leaves nothing of field {field}, "
                f"{naxis[0]:.0f} x {naxis[1]:.0f} pixels; give a smaller margin"
            )
        rng = np.random.default_rng([seed, *field])
        pixel = 0.5 + margin_px + rng.random((n_per_field, 2)) * (naxis - 2.0 * margin_px)
        offset = (pixel - crpix) @ cd.T
        ra_deg, dec_deg = _deproject(offset[:, 0], offset[:, 1], *crval)
        ra_parts.append(ra_deg % 360.0)
        dec_parts.append(dec_deg)
        names += [f"{field}-{k:04d}" for k in range(n_per_field)]
        groups += [str(field)] * n_per_field
    redshift = np.full(len(names), np.nan if z is None else z)
    return QTable(
        {
            "id": names,
            "ra_deg": np.concatenate(ra_parts),
            "dec_deg": np.concatenate(dec_parts),
            "z": redshift,
            "group": groups,
        }
    )
