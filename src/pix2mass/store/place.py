"""Where a store lies, as whole objects with keys; and the lock that keeps a second build out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from zarr.buffer import default_buffer_prototype
from zarr.buffer.cpu import Buffer
from zarr.core.sync import collect_aiterator, sync
from zarr.storage import FsspecStore, LocalStore

from pix2mass.types import Pix2massError

_LOCK = "lock.json"
_HALF_WRITTEN = ".partial"


class Place:
    """A local folder, or a URL that Zarr opens through fsspec (``s3://...``, ``gs://...``, ``memory://...``).

    Attributes:
        location: a ``Path`` for local folders and ``file://`` URLs, else the URL.

    Raises:
        Pix2massError: nothing here can open the URL, or nothing answers there.
    """

    def __init__(self, location: str | Path) -> None:
        self.location: Path | str = location
        if isinstance(location, str) and location.startswith("file://"):
            self.location = Path(unquote(urlsplit(location).path))
        elif isinstance(location, str) and "://" not in location:
            self.location = Path(location)
        try:
            self._store: Any = (
                LocalStore(self.location) if isinstance(self.location, Path) else FsspecStore.from_url(self.location)
            )
        except (ImportError, ValueError, TypeError) as error:
            raise Pix2massError(
                f"{location}: cannot open this kind of URL: {error}; expected a folder or a URL whose fsspec package "
                "is installed (pip install s3fs for s3://, gcsfs for gs://)"
            ) from None
        if not isinstance(self.location, Path):
            try:
                self.exists("zarr.json")
            except Exception as error:  # each service has errors of its own
                raise Pix2massError(
                    f"{location}: the place does not answer: {type(error).__name__}: {error}; check the URL, the "
                    "network and the credentials that its fsspec package takes"
                ) from None

    @property
    def in_memory(self) -> bool:
        """Whether only this process can see it."""
        return str(self.location).startswith("memory://")

    def names(self, prefix: str = "") -> list[str]:
        """Names directly below a prefix; half-written objects, which a kill leaves behind, do not count."""
        return [name for name in self._names(prefix) if not name.endswith(_HALF_WRITTEN) and name != _LOCK]

    def _names(self, prefix: str) -> list[str]:
        try:
            return list(collect_aiterator(self._store.list_dir(prefix)))
        except FileNotFoundError:
            return []

    def remove_half_written(self) -> None:
        """Remove what kills left behind at the top of the store."""
        for name in self._names(""):
            if name.endswith(_HALF_WRITTEN):
                self.remove(name)

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""
        return sync(self._store.exists(key))

    def holds(self, key: str, n_bytes: int, start: bytes) -> bool:
        """Whether there is an object of that key and it is whole: of that size, with that start.

        A power cut may leave a local file empty, short or full of zeros; other places hold whole objects or none.
        """
        if not isinstance(self.location, Path):
            return self.exists(key)
        try:
            with (self.location / key).open("rb") as file:
                return os.fstat(file.fileno()).st_size == n_bytes and file.read(len(start)) == start
        except FileNotFoundError:
            return False

    def read(self, key: str) -> bytes | None:
        """An object's bytes, None where there is none."""
        buffer = sync(self._store.get(key, default_buffer_prototype()))
        return None if buffer is None else buffer.to_bytes()

    def write(self, key: str, data: bytes) -> None:
        """Write an object: whoever reads sees all of it or the one before."""
        sync(self._store.set(key, Buffer.from_bytes(data)))

    def remove(self, key: str) -> None:
        """Remove an object."""
        sync(self._store.delete(key))

    def remove_below(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        sync(self._store.delete_dir(prefix))

    def n_bytes(self) -> int:
        """Size of all objects together."""
        return sync(self._store.getsize_prefix(""))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other builds out while the block runs; a killed build's lock does not.

        Raises:
            Pix2massError: another build is writing here.
        """
        if isinstance(self.location, Path):
            with _locked_folder(self.location):
                yield
            return
        # An object store cannot tell whether the holder of a lock lives; the host's own processes can be looked up.
        mine = _holder()
        held = json.loads(self.read(_LOCK) or b"null")
        if held and not (held["host"] == mine["host"] and not _alive(held["pid"])):
            raise _refusal(self.location, held, f"{self.location}/{_LOCK}")
        self.write(_LOCK, json.dumps(mine).encode())
        held = json.loads(self.read(_LOCK) or b"null")
        if held != mine:
            raise _refusal(self.location, held, f"{self.location}/{_LOCK}")
        try:
            yield
        finally:
            self.remove(_LOCK)


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """A lock file beside a folder, held by the operating system, which lets go of it when its holder dies."""
    import fcntl

    if not folder.name:
        raise Pix2massError(
            f"{folder}: expected a folder with a name of its own for the store, beside which its lock can lie; write "
            "e.g. --out clusters.zarr"
        )
    path = folder.with_name(folder.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The build that just ended may have removed the file that was opened here.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
        except OSError:
            held = _read_holder(handle)
            os.close(handle)
            raise _refusal(folder, held, path) from None
        os.close(handle)
    try:
        held, mine = _read_holder(handle), _holder()
        # A lock of the operating system may not reach from one machine to another on a shared disk.
        if held and held["host"] != mine["host"]:
            raise _refusal(folder, held, path)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(mine).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid4().hex}


def _read_holder(handle: int) -> dict[str, Any] | None:
    try:
        return json.loads(os.pread(handle, 4096, 0) or b"null")
    except ValueError:  # killed while writing it
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refusal(location: Path | str, held: dict[str, Any] | None, lock: Path | str) -> Pix2massError:
    who = f"process {held['pid']} on {held['host']}" if held else "another process"
    return Pix2massError(
        f"{location}: {who} is building this store; wait for it, or choose another path. If no such process runs any "
        f"more, remove {lock}"
    )
