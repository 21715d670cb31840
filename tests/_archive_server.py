"""A stand-in for the SDSS archive on this machine: serves a folder, resumes, counts, and misbehaves on request."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Misdeed = Callable[[BaseHTTPRequestHandler, bytes, int], None]
"""Answers a request in its own way: handler, content of the file, how often the file was asked for before."""


@dataclass
class Archive:
    """What the server does and saw.

    Attributes:
        url: its base URL.
        misdeeds: path ending -> how its files are answered.
        asked: paths with the Range that was asked for.
        agents: user agents seen.
        at_once: most requests that were being answered at a time.
    """

    url: str = ""
    misdeeds: dict[str, Misdeed] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)
    at_once: int = 0

    def times(self, ending: str) -> int:
        """How often files with this ending were asked for."""
        return sum(path.endswith(ending) for path, _ in self.asked)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Archive]:
    """Serve a folder; the URL is that of the folder."""
    archive = Archive()
    lock = threading.Lock()
    active = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal active
            path = unquote(urlsplit(self.path).path)
            with lock:
                before = archive.times(path)
                archive.asked.append((path, self.headers.get("Range", "")))
                archive.agents.add(self.headers.get("User-Agent", ""))
                active += 1
                archive.at_once = max(archive.at_once, active)
            try:
                self._answer(path, before)
            finally:
                with lock:
                    active -= 1

        def _answer(self, path: str, before: int) -> None:
            file = folder / path.lstrip("/")
            data = file.read_bytes() if file.is_file() else b""
            for ending, misdeed in archive.misdeeds.items():
                if path.endswith(ending):
                    misdeed(self, data, before)
                    return
            if not file.is_file():
                send(self, b"no such file", 404)
            else:
                send(self, data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  a client that goes away is expected here
    archive.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield archive
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, length: int | None = None, **headers) -> None:
    """An answer that honours Range."""
    asked = handler.headers.get("Range", "")
    start = 0
    if status == 200 and asked and handler.headers.get("If-Range") == '"v1"':
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            status = 416
        else:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    body = data[start:] if status != 416 else b""
    handler.send_response(status)
    headers = {"ETag": '"v1"', **headers, "Content-Length": len(body) if length is None else length}
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def status(code: int, times: int = 1 << 30, **headers) -> Misdeed:
    """Errors for the first times, then the file."""

    def misdeed(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> None:
        if before < times:
            send(handler, b"trouble", code, **headers)
        else:
            send(handler, data)

    return misdeed


def instead(content: bytes | Callable[[bytes], bytes], times: int = 1 << 30) -> Misdeed:
    """Something else in place of the file, with status 200."""

    def misdeed(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> None:
        if before < times:
            data = content(data) if callable(content) else content
        send(handler, data)

    return misdeed


def cut(after: float, times: int = 1 << 30) -> Misdeed:
    """The connection breaks after a share of the file."""

    def misdeed(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> None:
        if before >= times:
            send(handler, data)
            return
        send(handler, data[: int(after * len(data))], length=len(data))
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()

    return misdeed


def hang(seconds: float, times: int = 1 << 30) -> Misdeed:
    """Silence."""

    def misdeed(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> None:
        if before < times:
            time.sleep(seconds)
        send(handler, data)

    return misdeed


def redirect(to: str) -> Misdeed:
    """Sent elsewhere."""

    def misdeed(handler: BaseHTTPRequestHandler, data: bytes, before: int) -> None:
        send(handler, b"", 302, Location=to)

    return misdeed
