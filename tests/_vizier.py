"""A stand-in for VizieR on this machine: answers POST /viz-bin/votable with VOTables made from given tables."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from astropy.io import votable
from astropy.table import Table


@dataclass
class Service:
    """Base URL of the server and the identifiers it was asked for."""

    url: str
    asked: list[str] = field(default_factory=list)


def as_votable(table: Table, name: str) -> bytes:
    """A VOTable as VizieR sends it: one resource, one table, units as attributes."""
    document = votable.from_table(table)
    document.resources[0].name = name
    document.resources[0].tables[0].name = name
    out = io.BytesIO()
    document.to_xml(out)
    return out.getvalue()


@contextlib.contextmanager
def serve(tables: Mapping[str, Table]) -> Iterator[Service]:
    """Serve tables by their VizieR identifier; anything else gets an empty VOTable, as VizieR does."""
    service = Service("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            lines = unquote(self.rfile.read(length).decode()).splitlines()
            wanted = next((line.removeprefix("-source=") for line in lines if line.startswith("-source=")), "")
            service.asked.append(wanted)
            if wanted in tables:
                body = as_votable(tables[wanted], wanted)
            else:
                body = b'<?xml version="1.0" encoding="UTF-8"?>\n<VOTABLE version="1.4" '
                body += b'xmlns="http://www.ivoa.net/xml/VOTable/v1.3"><RESOURCE/></VOTABLE>'
            self.send_response(200)
            self.send_header("Content-Type", "text/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
