"""Polite HTTP: few connections, growing waits, no way out of the archive, everything counted."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from pix2mass.types import Pix2massError

ATTEMPTS = 4
"""How often a file is asked for before it is given up; at least a mebibyte of progress starts the count anew."""
WAIT_S = 0.5
"""Wait after the first failed attempt; it doubles from one attempt to the next."""
LONGEST_WAIT_S = 60.0
"""No wait is longer, whatever the server's Retry-After says."""
TIMEOUT_S = 60.0
"""Longest silence of a server, in seconds."""
FILE_LIMIT_S = 3600.0
"""Longest time for one attempt at a file, so that a server that drips cannot hold a build up for ever."""
DEAD_IN_A_ROW = 10
"""Files that fail one after the other before a build stops instead of flagging everything."""

_MAX_REDIRECTS = 5
_PROGRESS_BYTES = 1 << 20

T = TypeVar("T")


class BadFrame(Exception):
    """A file of the archive that cannot be used; the message says why."""


class Damaged(BadFrame):
    """What came is not what it should be; another attempt may bring it whole."""


class TryAgain(Exception):
    """An attempt failed in a way that may pass: no answer, a cut connection, too busy, damaged content."""

    def __init__(self, reason: str, answered: bool = False, wait_s: float = 0.0, gained: int = 0) -> None:
        """Say what happened.

        Args:
            reason: for the message.
            answered: the server answered, but with content that is no good.
            wait_s: the wait that the server asked for.
            gained: bytes that the attempt added for good.
        """
        super().__init__(reason)
        self.answered, self.wait_s, self.gained = answered, wait_s, gained


@dataclass
class Counts:
    """What reading an archive took so far. Adding is safe in threads.

    Attributes:
        bytes_read: bytes that came over the network or from disk.
        files: files that were read whole.
        retries: attempts beyond the first.
        not_found: files that the archive does not have.
        failed: files that were given up.
        seconds: time spent reading and waiting, summed over threads.
    """

    bytes_read: int = 0
    files: int = 0
    retries: int = 0
    not_found: int = 0
    failed: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **more: float) -> None:
        """Add to the named numbers."""
        with self._lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time spent inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(seconds=time.perf_counter() - start)

    def statistics(self) -> dict[str, Any]:
        """The numbers by the names of a build's summary."""
        numbers = {**asdict(self), "bytes": self.bytes_read, "seconds": {"fetch": self.seconds}}
        del numbers["bytes_read"]
        return numbers

    def __getstate__(self) -> dict[str, Any]:
        return asdict(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{field.name: state[field.name] for field in fields(self)})


_NEVER = threading.Event()


def retry(action: Callable[[], T], counts: Counts, stopped: threading.Event = _NEVER) -> T:
    """Call until it does not raise ``TryAgain``, with growing waits.

    Args:
        action: one attempt.
        counts: gets the retries.
        stopped: once it is set, waits end and no attempt is begun.

    Raises:
        TryAgain: all attempts failed; the last one's reason.
        BadFrame: stopped.
    """
    failures = 0
    while True:
        if stopped.is_set():
            raise BadFrame("not fetched: the archive is being closed")
        try:
            return action()
        except TryAgain as error:
            failures = 1 if error.gained >= _PROGRESS_BYTES else failures + 1
            if failures >= ATTEMPTS and not stopped.is_set():
                raise
            counts.add(retries=1)
            stopped.wait(min(max(WAIT_S * 2 ** (failures - 1), error.wait_s), LONGEST_WAIT_S))


class Health:
    """Tells one dead file, which is flagged, from a dead archive, which stops the build."""

    def __init__(self, place: str, alive: Callable[[], bool]) -> None:
        """Watch a service.

        Args:
            place: its address, for the message.
            alive: asks whether it answers at all.
        """
        self._place, self._alive = place, alive
        self._dead_in_row = 0
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """A file came."""
        with self._lock:
            self._dead_in_row = 0

    def failed(self, name: str, error: TryAgain | BadFrame) -> BadFrame:
        """A file was given up.

        Args:
            name: of the file.
            error: the last attempt's: ``TryAgain``, or ``BadFrame`` where the answer will not change.

        Returns:
            What is wrong with it, to be raised for this file alone.

        Raises:
            Pix2massError: the archive itself does not answer, or gave up many files in a row.
        """
        with self._lock:
            self._dead_in_row += 1
            too_many = self._dead_in_row >= DEAD_IN_A_ROW
        answered = isinstance(error, BadFrame) or error.answered
        if not answered and not self._alive():
            raise Pix2massError(
                f"{name}: no answer after {ATTEMPTS} attempts ({error}), and {self._place} does not answer either; "
                "check the address and the network, then run the same command again: what was made is kept"
            )
        if too_many:
            raise Pix2massError(
                f"{name}: the last {DEAD_IN_A_ROW} files could not be had ({error}), so {self._place} is not well; "
                "run the same command again later: what was made is kept"
            )
        return BadFrame(str(error) if answered else f"no answer after {ATTEMPTS} attempts: {error}")


class Reply(NamedTuple):
    """The beginning of an answer: whether it goes on from the byte asked for, its length, its version, its content."""

    resumed: bool
    length: int | None
    version: str
    chunks: Iterator[bytes]


class Client:
    """An HTTP client that stays on one server.

    Redirects are followed to the same host alone, and never from https to http: a redirect can lead neither to a file
    of this machine nor to a server that nobody named.
    """

    def __init__(self, base: str, connections: int) -> None:
        """Check an address; nothing is asked for yet.

        Args:
            base: http(s) URL without credentials, query and fragment.
            connections: most connections at a time.

        Raises:
            Pix2massError: not such a URL.
        """
        try:
            parts = urlsplit(base)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname)
            fine = (
                fine and not (parts.query or parts.fragment or parts.username or parts.password) and (parts.port != 0)
            )
        except ValueError:
            fine = False
        if not fine:
            raise Pix2massError(
                f"{base}: expected an http or https URL without user, password, '?' and '#', "
                "such as https://data.sdss.org/sas"
            )
        self.base = base.rstrip("/")
        self._client = httpx.Client(
            headers={"User-Agent": user_agent(), "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(TIMEOUT_S, connect=min(TIMEOUT_S, 10.0), pool=None),
            limits=httpx.Limits(max_connections=connections),
            follow_redirects=False,
        )

    @contextlib.contextmanager
    def open(self, path: str, start: int = 0, version: str = "") -> Iterator[Reply | None]:
        """Ask for a file, or for the rest of one.

        Args:
            path: below the base URL.
            start: first byte wanted.
            version: ETag or date of what the bytes before it belong to.

        Yields:
            The answer, None where the archive has no such file.

        Raises:
            TryAgain: no answer, cut off, or busy.
            BadFrame: an answer that will not change, such as "forbidden".
        """
        headers = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
        url = httpx.URL(f"{self.base}/{path}")
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                with self._client.stream("GET", url, headers=headers) as response:
                    if response.status_code in (301, 302, 303, 307, 308):
                        url = self._redirect(url, response)
                        continue
                    if response.status_code in (404, 410):
                        yield None
                        return
                    yield _reply(response, start)
                    return
            raise BadFrame(f"more than {_MAX_REDIRECTS} redirects")
        except (httpx.TransportError, httpx.StreamError) as error:
            raise _try_again(error) from None

    def alive(self) -> bool:
        """Whether the server answers at all, be it with "not found"."""
        try:
            with self._client.stream("GET", self.base + "/") as response:
                return response.status_code < 500 and response.status_code != 429
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _redirect(self, url: httpx.URL, response: httpx.Response) -> httpx.URL:
        try:
            target = url.join(response.headers.get("Location", ""))
        except httpx.InvalidURL:
            raise BadFrame("redirected to something that is no URL") from None
        upgrade = url.scheme == "http" and target.scheme == "https"
        same_place = (target.scheme, target.host, target.port) == (url.scheme, url.host, url.port)
        if not same_place and not (upgrade and target.host == url.host):
            advice = "; if it can be trusted, give its address" if target.scheme in ("http", "https") else ""
            raise BadFrame(f"redirected to {target}, which is not on {url.scheme}://{url.host}{advice}")
        return target


def _reply(response: httpx.Response, start: int) -> Reply:
    status = response.status_code
    if status == 416:
        raise TryAgain("the length that the archive gives does not fit its content", answered=True)
    if status in (408, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        raise TryAgain(f"HTTP status {status}", wait_s=float(wait) if wait.isdecimal() else 0.0)
    if status not in (200, 206):
        raise BadFrame(f"expected HTTP status 200, got {status}; check the URL")
    length = response.headers.get("Content-Length", "")
    resumed = status == 206
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        raise TryAgain(f"asked for bytes from {start}, got {response.headers.get('Content-Range')!r}", answered=True)
    version = response.headers.get("ETag", "")
    if not version or version.startswith("W/"):  # weak tags cannot vouch for bytes
        version = response.headers.get("Last-Modified", "")
    return Reply(resumed, int(length) if length.isdecimal() else None, version, _within(response, FILE_LIMIT_S))


def _within(response: httpx.Response, limit_s: float) -> Iterator[bytes]:
    end = time.monotonic() + limit_s
    try:
        # Not in pieces of one size: what is short of one would be lost with the connection.
        for chunk in response.iter_raw():
            if time.monotonic() > end:
                raise TryAgain(f"not finished after {limit_s:g} s")
            yield chunk
    except (httpx.TransportError, httpx.StreamError) as error:
        raise _try_again(error) from None


def _try_again(error: Exception) -> TryAgain:
    return TryAgain(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


@functools.cache
def user_agent() -> str:
    """Who asks: the package, its version and where to read about it."""
    about = metadata.metadata("pix2mass")
    link = (about.get_all("Project-URL") or [""])[0].rpartition(", ")[2]
    return f"pix2mass/{about['Version']} (+{link})"
