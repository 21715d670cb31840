"""Where SDSS frames lie: a folder or an http(s) URL in the archive's own layout, and the names of its files."""

from __future__ import annotations

import bz2
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import httpx

from pix2mass.types import BANDS, Pix2massError

FRAMES_FOLDER = "dr12/boss/photoObj/frames/301"
FRAME_NAME = re.compile(r"frame-([ugriz])-(\d{6})-([1-6])-(\d{4})(\.fits(?:\.bz2)?)")
_MAX_BYTES = 64 << 20
_MAX_LISTED_RUNS = 200
_MAX_LISTED_FIELDS = 500
_HTTP_ATTEMPTS = 4
_HTTP_WAIT_S = 0.5


class Field(NamedTuple):
    """One field of a run: the same 13.5' x 9.8' of sky in every band."""

    run: int
    camcol: int
    field: int

    def __str__(self) -> str:
        return f"{self.run}-{self.camcol}-{self.field:04d}"


class BadFrame(Exception):
    """A file of the archive that cannot be used; the message says why."""


def frame_path(field: Field, band: str, suffix: str) -> str:
    name = f"frame-{band}-{field.run:06d}-{field.camcol}-{field.field:04d}{suffix}"
    return f"{FRAMES_FOLDER}/{field.run}/{field.camcol}/{name}"


class Folder:
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
                raise BadFrame(f"larger than {_MAX_BYTES >> 20} MiB")
            return (self.base / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadFrame(str(error)) from None

    def chunks(self, path: str) -> Iterator[bytes]:
        """Content of a file, piece by piece."""
        try:
            with (self.base / path).open("rb") as file:
                while chunk := file.read(1 << 16):
                    yield chunk
        except OSError as error:
            raise BadFrame(str(error)) from None

    def close(self) -> None:
        pass


class Http:
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
                    paths += [f"{folder}/{name}" for name in self._listing(folder) if FRAME_NAME.fullmatch(name)]
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
                        raise BadFrame(f"larger than {_MAX_BYTES >> 20} MiB")
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
                raise BadFrame("not found") from None
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


def open_archive(base: str | Path) -> Folder | Http:
    if "://" not in str(base):
        return Folder(base)
    scheme = urlsplit(str(base)).scheme
    if scheme not in ("http", "https"):
        raise Pix2massError(f"{base}: expected a folder or an http(s) URL, got scheme {scheme!r}")
    return Http(str(base))


def decompress(data: bytes) -> bytes:
    """Unpack bzip2, of one stream or several, up to a size no frame reaches."""
    parts, room = [], _MAX_BYTES
    while data:
        decompressor = bz2.BZ2Decompressor()
        try:
            parts.append(decompressor.decompress(data, room))
        except (OSError, EOFError) as error:
            raise BadFrame(f"not a bzip2 file: {error}") from None
        room -= len(parts[-1])
        if not decompressor.eof:
            raise BadFrame("truncated bzip2 file" if room > 0 else f"unpacks to more than {_MAX_BYTES >> 20} MiB")
        data = decompressor.unused_data
    return b"".join(parts)
