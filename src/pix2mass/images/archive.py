"""Where SDSS frames lie: a folder or an http(s) URL in the archive's own layout, and the names of its files.

A file that comes over HTTP is fetched once into a cache folder: to a temporary name, checked, then renamed.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import hashlib
import os
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from pix2mass.images import http
from pix2mass.images.http import BadFrame, Client, Counts, Damaged, Health, TryAgain
from pix2mass.types import BANDS, Pix2massError

FRAMES_FOLDER = "dr12/boss/photoObj/frames/301"
FRAME_NAME = re.compile(r"frame-([ugriz])-(\d{6})-([1-6])-(\d{4})(\.fits(?:\.bz2)?)")
_MAX_BYTES = 64 << 20
_MAX_LIST_BYTES = 4 << 30
_MAX_LISTED_RUNS = 200
_MAX_LISTED_FIELDS = 500
_SAFE_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_PASSING = "passing"
_LOCKS = 64

T = TypeVar("T")


class Field(NamedTuple):
    """One field of a run: the same 13.5' x 9.8' of sky in every band."""

    run: int
    camcol: int
    field: int

    def __str__(self) -> str:
        return f"{self.run}-{self.camcol}-{self.field:04d}"


def frame_path(field: Field, band: str, suffix: str) -> str:
    name = f"frame-{band}-{field.run:06d}-{field.camcol}-{field.field:04d}{suffix}"
    return f"{FRAMES_FOLDER}/{field.run}/{field.camcol}/{name}"


class Folder:
    """An archive on disk.

    Attributes:
        base: the folder that holds ``dr12``.
        counts: what was read so far.
    """

    def __init__(self, base: str | Path) -> None:
        self.base = Path(base).expanduser()
        self.counts = Counts()
        if not (self.base / FRAMES_FOLDER).is_dir():
            raise Pix2massError(
                f"{self.base}: expected SDSS frames under {FRAMES_FOLDER}/RUN/CAMCOL/, found no such folder; "
                "give the folder (or the http(s) URL) that holds dr12"
            )

    def __str__(self) -> str:
        return str(self.base)

    def frame_paths(self) -> list[str]:
        paths = (self.base / FRAMES_FOLDER).glob("*/*/frame-*.fits*")
        # Downloads leave others beside them, such as .md5 and .part.
        return sorted(path.relative_to(self.base).as_posix() for path in paths if FRAME_NAME.fullmatch(path.name))

    def local(self, path: str) -> Path | None:
        """Where a file lies on this machine, None where there is none."""
        file = self.base / _checked(path)
        return file if file.is_file() else None

    def size_here(self, path: str) -> int | None:
        """Bytes of a file, None where there is none."""
        file = self.local(path)
        return file.stat().st_size if file else None

    def read(self, path: str) -> bytes | None:
        """Content of a file, None where there is none."""
        with self.counts.timed():
            try:
                file = self.base / _checked(path)
                if file.stat().st_size > _MAX_BYTES:
                    raise BadFrame(f"larger than {_MAX_BYTES >> 20} MiB")
                data = file.read_bytes()
            except FileNotFoundError:
                self.counts.add(not_found=1)
                return None
            except OSError as error:
                raise BadFrame(str(error)) from None
        self.counts.add(bytes_read=len(data), files=1)
        return data

    def drop(self, path: str) -> None:
        """Nothing: what lies in the user's folder stays there."""

    def sweep(self) -> None:
        """Nothing to sweep."""

    def chunks(self, path: str) -> Iterator[bytes]:
        """Content of a file, piece by piece."""
        try:
            with (self.base / _checked(path)).open("rb") as file:
                while chunk := file.read(1 << 16):
                    yield chunk
        except OSError as error:
            raise BadFrame(str(error)) from None

    def stop(self) -> None:
        """Nothing to stop."""

    def close(self) -> None:
        pass


class Http:
    """An archive behind an http(s) URL, and the cache folder in which each of its files arrives at most once.

    Safe in threads, and in several processes that share the cache folder: a file is fetched by one of them while the
    others wait, and all of them together keep no more than ``connections`` connections open.

    Attributes:
        base: the URL that stands before ``/dr12``.
        counts: what was fetched so far.
        cache: the folder of this archive's files; None until the first is fetched where no cache was named.
    """

    def __init__(self, base: str, cache: str | Path | None = None, keep_frames: bool = False, connections: int = 4):
        """Name an archive; nothing is asked for yet.

        Args:
            base: http(s) URL.
            cache: folder that keeps what was fetched; without one, a temporary folder that goes with this object.
            keep_frames: keep frames for later builds; else ``drop`` removes them.
            connections: most connections at a time.

        Raises:
            Pix2massError: not an http(s) URL.
        """
        self._client = Client(base, connections)
        self.base = self._client.base
        self.counts = Counts()
        self._arguments = (base, cache, keep_frames, connections)
        self._keep_frames = keep_frames
        self._connections = connections
        self._health = Health(self.base, self._client.alive)
        self._stopped = threading.Event()
        self._temporary = None
        if cache is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="pix2mass-")
            cache = self._temporary.name
        self.cache = Path(cache).expanduser() / _folder_name(self.base)

    def __str__(self) -> str:
        return self.base

    def __reduce__(self) -> tuple[Any, ...]:
        return Http, self._arguments

    def frame_paths(self) -> list[str]:
        """Frames found through directory listings, which only a small archive can answer."""
        paths: list[str] = []
        runs = [name for name in self._listing(FRAMES_FOLDER) if name.isascii() and name.isdigit()]
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
        def get() -> bytes | None:
            content = b""
            with self._client.open(folder + "/") as reply:
                for chunk in reply.chunks if reply else ():
                    content += chunk
                    if len(content) > _MAX_BYTES:
                        raise BadFrame(f"larger than {_MAX_BYTES >> 20} MiB")
            return content if reply else None

        try:
            page = self._asking(folder, get)
        except BadFrame as problem:
            raise Pix2massError(f"{self.base}/{folder}/: {problem}") from None
        if page is None:
            raise Pix2massError(
                f"{self.base}/{folder}/: expected a directory listing, got 'not found'; give the URL of what holds "
                "dr12, or pass a frame index (--frame-index FILE)"
            )
        links = re.findall(r"""href=["']([^"'?#]+)["']""", page.decode("utf-8", "replace"), re.IGNORECASE)
        return sorted({unquote(urlsplit(link).path).rstrip("/").rsplit("/", 1)[-1] for link in links})

    def size_here(self, path: str) -> int | None:
        """Bytes of a file that was fetched already, None of any other; nothing is asked for."""
        for file in (self.cache / _checked(path), self.cache / _PASSING / path):
            with contextlib.suppress(FileNotFoundError):
                return file.stat().st_size
        return None

    def read(self, path: str) -> bytes | None:
        """Content of a file, fetched at most once; None where the archive has none, which is remembered.

        Raises:
            BadFrame: this file cannot be had, others can.
            Pix2massError: the archive does not answer, or the cache folder cannot be written.
        """
        while (file := self.local(path)) is not None:
            # Another process may have dropped it since: then it is fetched again.
            with contextlib.suppress(FileNotFoundError):
                return file.read_bytes()
        return None

    def local(self, path: str) -> Path | None:
        """Where a file lies on this machine, fetched if it has to be; see ``read``."""
        target = self.cache / _checked(path)
        passing = self.cache / _PASSING / path
        is_frame = path.startswith(FRAMES_FOLDER + "/")
        if is_frame and not self._keep_frames and not target.exists():
            target = passing
        with self.counts.timed(), self._disk(path):
            if target.exists():
                return target
            (self.cache / "locks").mkdir(parents=True, exist_ok=True)
            with FileLock(self.cache / "locks" / f"file-{zlib.crc32(path.encode()) % _LOCKS}"):
                if target.exists():
                    return target
                target.parent.mkdir(parents=True, exist_ok=True)
                if target != passing and passing.exists():
                    os.replace(passing, target)
                    return target
                absent = self.cache / f"{path}.absent"
                if absent.exists():
                    return None
                if not self._fetch(path, target, _MAX_BYTES if is_frame else _MAX_LIST_BYTES):
                    absent.parent.mkdir(parents=True, exist_ok=True)
                    absent.touch()
                    self.counts.add(not_found=1)
                    return None
        self.counts.add(files=1)
        return target

    def drop(self, path: str) -> None:
        """Remove a frame after its last use, unless frames are kept."""
        (self.cache / _PASSING / _checked(path)).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the frames that an earlier, killed build left behind; kept frames stay."""
        for file in (self.cache / _PASSING).glob("**/frame-*.fits*"):
            if FRAME_NAME.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def chunks(self, path: str) -> Iterator[bytes]:
        """Content of a file, piece by piece, for as long as the caller wants more; nothing is kept."""
        given = 0

        def rest() -> Iterator[bytes]:
            nonlocal given
            skip = given  # a new attempt starts anew: what was given already is not given twice
            with self._client.open(_checked(path)) as reply:
                if reply is None:
                    raise BadFrame("not found")
                for chunk in reply.chunks:
                    if new := chunk[skip:]:
                        given += len(new)
                        self.counts.add(bytes_read=len(new))
                        yield new
                    skip = max(0, skip - len(chunk))

        source = rest()
        while True:

            def step() -> bytes | None:
                nonlocal source
                try:
                    return next(source, None)
                except TryAgain:
                    source = rest()
                    raise

            chunk = self._asking(path, step)
            if chunk is None:
                return
            yield chunk

    def stop(self) -> None:
        """Begin nothing more: threads that read end with the attempt in hand, after one time limit at the latest."""
        self._stopped.set()

    def close(self) -> None:
        """Close connections; a cache that nobody named goes."""
        self.stop()
        self._client.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _asking(self, path: str, action: Callable[[], T]) -> T:
        try:
            result = http.retry(action, self.counts, self._stopped)
        except (TryAgain, BadFrame) as error:
            self.counts.add(failed=1)
            raise self._health.failed(f"{self.base}/{path}", error) from None
        self._health.succeeded()
        return result

    def _fetch(self, path: str, target: Path, limit: int) -> bool:
        """Fetch into place; False where the archive has no such file."""
        part, note = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.version")

        def attempt() -> bool:
            version = note.read_text() if note.exists() and part.exists() else ""
            start = part.stat().st_size if version else 0
            gained = 0
            with self._slot(), self._client.open(path, start, version) as reply:
                if reply is None:
                    return False
                check = _Check(target.name)
                with part.open("ab" if reply.resumed else "wb") as file:
                    if reply.resumed:
                        for chunk in _pieces(part):
                            check.feed(chunk)
                    note.write_text(reply.version)
                    size = file.tell()
                    try:
                        for chunk in reply.chunks:
                            file.write(chunk)
                            self.counts.add(bytes_read=len(chunk))
                            gained, size = gained + len(chunk), size + len(chunk)
                            if size > limit:
                                raise BadFrame(f"larger than {limit >> 20} MiB")
                            check.feed(chunk)
                    except TryAgain as error:
                        raise TryAgain(str(error), gained=gained) from None
                    if reply.length is not None and gained != reply.length:
                        raise TryAgain(f"wrong length: expected {reply.length} bytes, got {gained}", gained=gained)
                    check.end()
                    file.flush()
                    os.fsync(file.fileno())
            return True

        def attempt_cleanly() -> bool:
            try:
                found = attempt()
            except Damaged as problem:
                _remove(part, note)
                raise TryAgain(str(problem), answered=True) from None
            except BadFrame:
                _remove(part, note)
                raise
            except TryAgain as error:
                if error.answered:
                    _remove(part, note)
                raise
            if found:
                os.replace(part, target)
            _remove(part, note)
            return found

        try:
            return self._asking(path, attempt_cleanly)
        except OSError:
            _remove(part, note)
            raise

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the few connections, shared by all processes that use the cache folder."""
        while not self._stopped.is_set():
            for k in range(self._connections):
                lock = FileLock(self.cache / "locks" / f"connection-{k}")
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=0)
                if lock.is_locked:
                    try:
                        yield
                    finally:
                        lock.release()
                    return
            self._stopped.wait(0.02)
        raise TryAgain("the archive is being closed")

    @contextlib.contextmanager
    def _disk(self, path: str) -> Iterator[None]:
        """Trouble with the cache folder is the user's to mend, and stops the build."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space there" if full else "mend the cause"
            raise Pix2massError(
                f"{self.cache}: {path} could not be written ({error.strerror or error}); {advice}, or name another "
                "folder with --frame-cache, and run the same command again: what was made is kept"
            ) from error


class _Check:
    """Whether a whole file of its kind arrives: bzip2 is unpacked for its checksums, FITS is known by its start."""

    def __init__(self, name: str) -> None:
        self._bzip2 = name.endswith(".bz2")
        self._fits = ".fit" in name
        self._start = b""
        self._stream: bz2.BZ2Decompressor | None = None
        self._room = _MAX_BYTES

    def feed(self, data: bytes) -> None:
        if len(self._start) < 10:
            self._start += data[:10]
        if not self._bzip2:
            if self._fits and len(self._start) >= 10 and not self._start.startswith(b"SIMPLE  ="):
                raise Damaged("not a FITS file")
            return
        while data:
            self._stream = self._stream or bz2.BZ2Decompressor()
            try:
                self._room -= len(self._stream.decompress(data, 1 << 20))
                while not (self._stream.eof or self._stream.needs_input) and self._room >= 0:
                    self._room -= len(self._stream.decompress(b"", 1 << 20))
            except (OSError, EOFError) as error:
                raise Damaged(f"not a bzip2 file: {error}") from None
            if self._room < 0:
                raise BadFrame(f"unpacks to more than {_MAX_BYTES >> 20} MiB")
            data = self._stream.unused_data
            if self._stream.eof:
                self._stream = None

    def end(self) -> None:
        if self._bzip2 and (self._stream is not None or not self._start):
            raise Damaged("truncated bzip2 file")
        if self._fits and not self._start:
            raise Damaged("empty file")


def open_archive(
    base: str | Path | Folder | Http,
    cache: str | Path | None = None,
    keep_frames: bool = False,
    connections: int = 4,
) -> Folder | Http:
    """The archive at a folder or URL; an archive is returned as it is.

    Args:
        base: folder or http(s) URL that holds ``dr12``.
        cache: for a URL, see ``Http``.
        keep_frames: for a URL, see ``Http``.
        connections: for a URL, see ``Http``.

    Raises:
        Pix2massError: no such folder, or neither a folder nor an http(s) URL.
    """
    if isinstance(base, (Folder, Http)):
        return base
    if "://" not in str(base):
        return Folder(base)
    scheme = urlsplit(str(base)).scheme
    if scheme not in ("http", "https"):
        raise Pix2massError(f"{base}: expected a folder or an http(s) URL, got scheme {scheme!r}")
    return Http(str(base), cache, keep_frames, connections)


def _checked(path: str) -> str:
    """A path below the base, which cannot lead out of it: it becomes part of a URL and of a file's name."""
    if not all(_SAFE_PART.fullmatch(part) for part in path.split("/")):
        raise Pix2massError(
            f"{path!r}: expected a path below the archive, of plain names without '..'; check the frame index"
        )
    return path


def _folder_name(base: str) -> str:
    """A folder of its own for each archive, readable and without anything that leads elsewhere."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "-", base.partition("://")[2]).strip(".-")[:60]
    return f"{plain}-{hashlib.blake2b(base.encode(), digest_size=4).hexdigest()}"


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 16):
            yield chunk


def _remove(*files: Path) -> None:
    for file in files:
        file.unlink(missing_ok=True)


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
