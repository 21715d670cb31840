"""Builds from an archive that misbehaves: every fault ends in a flag or in a message that names the file, and all other
cutouts are made as if nothing had happened. ``pytest -s tests/test_faults.py`` prints the table of faults.
"""

from __future__ import annotations

import bz2
import errno
import io
import os
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _archive_server as server
import numpy as np
import pytest
from _frames import frame_bytes, frame_wcs, gaussian, write_frame, write_photo_field
from astropy.io import fits
from astropy.table import QTable

import pix2mass.images.archive as archive_module
from pix2mass.config import GridConfig
from pix2mass.images import http
from pix2mass.images.archive import Folder, Http
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frames import FrameSource
from pix2mass.store import ImageStore, build
from pix2mass.types import Flag, Pix2massError

SHAPE = (120, 120)
GRID = GridConfig(bands="gri", width_arcsec=32.0, n_pixels=16)
VICTIM = "frame-r-003000-2-0040.fits.bz2"
CATALOG = QTable(
    {
        "id": ["healthy-1", "victim", "healthy-2"],
        "ra_deg": [200.0, 210.0, 220.0],
        "dec_deg": [1.0, 1.0, 1.0],
        "z": [0.2, 0.2, 0.2],
    }
)
OK = Flag(0)
LOST = Flag.UNREADABLE | Flag.MISSING_BAND


def _frame(ra_deg: float, band: str) -> np.ndarray:
    return gaussian(SHAPE, frame_wcs(ra_deg, 1.0, SHAPE), ra_deg, 1.0, 100.0, 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three fields far from each other; the second one's r band is the victim."""
    base = tmp_path_factory.mktemp("sas")
    for field, ra in ((39, 200.0), (40, 210.0), (41, 220.0)):
        for band in GRID.bands:
            write_frame(base, _frame(ra, band), frame_wcs(ra, 1.0, SHAPE), 3000, 2, field, band)
    write_photo_field(base, 3000, 2, [39, 40, 41], 4.0, 2.0)
    return base


@pytest.fixture(scope="module")
def index(folder) -> FrameIndex:
    return FrameIndex.from_base(folder)


@pytest.fixture(scope="module")
def healthy(folder, index, tmp_path_factory) -> ImageStore:
    with FrameSource(folder, GRID, index) as source:
        return build(CATALOG, source, tmp_path_factory.mktemp("store") / "healthy.zarr", GRID)


def _victim(**changes: Any) -> bytes:
    known = {"run": 3000, "camcol": 2, "field": 40, "band": "r", **changes}
    return frame_bytes(_frame(210.0, "r"), frame_wcs(210.0, 1.0, SHAPE), **known)


def _with_pixels(value: float) -> bytes:
    flux = _frame(210.0, "r")
    flux[55:60, 55:60] = value
    return bz2.compress(frame_bytes(flux, frame_wcs(210.0, 1.0, SHAPE), 3000, 2, 40, "r"))


def _without_sky() -> bytes:
    with fits.open(io.BytesIO(_victim())) as hdus:
        buffer = io.BytesIO()
        fits.HDUList([hdu.copy() for hdu in hdus[:2]]).writeto(buffer)
    return buffer.getvalue()


@dataclass(frozen=True)
class Fault:
    """What the server does to the victim, the flags of its cutout, and what the message says."""

    misdeed: server.Misdeed
    flags: Flag
    message: str = ""


HTML = b"<html><body>Service unavailable</body></html>" * 20
FAULTS = {
    "truncated body, length to match": Fault(server.instead(lambda data: data[: len(data) // 2]), LOST, "truncated"),
    "truncated body, once": Fault(server.instead(lambda data: data[: len(data) // 2], times=1), OK),
    "wrong length": Fault(
        lambda handler, data, before: server.send(handler, data, length=len(data) + 100), LOST, "length.*does not fit"
    ),
    "empty body": Fault(server.instead(b""), LOST, "truncated bzip2"),
    "garbage instead of bzip2": Fault(server.instead(b"\x00garbage" * 500), LOST, "not a bzip2 file"),
    "damaged inside": Fault(
        server.instead(lambda data: data[:400] + bytes([data[400] ^ 255]) + data[401:]), LOST, "not a bzip2 file"
    ),
    "HTML with status 200": Fault(server.instead(HTML), LOST, "not a bzip2 file"),
    "HTML inside bzip2": Fault(server.instead(bz2.compress(HTML)), LOST, "not a FITS file"),
    "wrong band in the header": Fault(server.instead(bz2.compress(_victim(band="g"))), LOST, "FILTER = 'r'"),
    "wrong field in the header": Fault(server.instead(bz2.compress(_victim(field=41))), LOST, "FIELD = 40"),
    "missing HDU": Fault(server.instead(bz2.compress(_without_sky())), LOST, "parts missing"),
    "FITS cut off inside bzip2": Fault(server.instead(bz2.compress(_victim()[:30000])), LOST, "parts missing"),
    "NaN pixels": Fault(server.instead(_with_pixels(np.nan)), Flag.BAD_PIXELS),
    "infinite pixels": Fault(server.instead(_with_pixels(np.inf)), Flag.BAD_PIXELS | Flag.SATURATED),
    "one band missing (404)": Fault(server.status(404), LOST, "no such file"),
    "forbidden (403)": Fault(server.status(403), LOST, "got 403"),
    "hanging connection": Fault(server.hang(1.5), LOST, "no answer after 4.*ReadTimeout"),
    "hanging connection, once": Fault(server.hang(1.5, times=1), OK),
    "500s in a burst": Fault(server.status(500, times=3), OK),
    "500s without end": Fault(server.status(500), LOST, "HTTP status 500"),
    "too many requests (429), twice": Fault(server.status(429, times=2), OK),
    "connection cut mid-way, once": Fault(server.cut(0.5, times=1), OK),
    "connection cut mid-way, always at the start": Fault(server.cut(0.0), LOST, "no answer after 4"),
    "redirect to a file of this machine": Fault(server.redirect("file:///etc/passwd"), LOST, "redirected to file"),
}


@pytest.fixture(scope="module")
def table():
    rows: list[tuple[str, str, str]] = []
    yield rows
    width = max((len(row[0]) for row in rows), default=0)
    print("\n" + "\n".join(f"{fault:<{width}}  {flags:<26}  {message}" for fault, flags, message in rows))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(http, "WAIT_S", 0.01)
    monkeypatch.setattr(http, "TIMEOUT_S", 0.4)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_flagged_or_survived_and_all_else_is_made(name, folder, index, healthy, tmp_path, quick, table):
    fault = FAULTS[name]
    with server.serve(folder) as remote, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        remote.misdeeds[VICTIM] = fault.misdeed
        archive = Http(remote.url, tmp_path / "cache")
        with FrameSource(archive, GRID, index) as source:
            store = build(CATALOG, source, tmp_path / "out.zarr", GRID)
    said = [str(warning.message) for warning in caught if VICTIM in str(warning.message)]
    table.append(
        (name, str(Flag(int(store.flags[1]))) or "none: survived", (said[0].partition(": ")[2] if said else ""))
    )
    assert store.ids == list(CATALOG["id"]) and Flag(int(store.flags[1])) == fault.flags
    assert bool(said) == bool(fault.message)
    assert not fault.message or re.search(fault.message, said[0], re.DOTALL), said
    for row in (0, 2):
        for part in ("flux", "sigma", "mask"):
            assert np.array_equal(getattr(store[row], part), getattr(healthy[row], part))
    if fault.flags == OK:
        assert store.checksum == healthy.checksum


def test_closing_does_not_wait_for_more_attempts_at_a_silent_server(folder, index, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT_S", 1.0)
    with server.serve(folder) as remote:
        remote.misdeeds[""] = server.hang(20.0)
        archive = Http(remote.url, tmp_path / "cache")
        source = FrameSource(archive, GRID, index)
        pool = ThreadPoolExecutor(1)
        made = pool.submit(source.cutout, dict(zip(CATALOG.colnames, CATALOG[0], strict=True)))
        while not remote.asked:
            time.sleep(0.01)
        time.sleep(0.2)
        asked, start = len(remote.asked), time.monotonic()
        source.close()
        assert time.monotonic() - start < 2.5
        assert isinstance(made.exception(), BaseException)
        assert len(remote.asked) == asked, "no attempt is begun any more"


def test_a_healthy_server_gives_the_same_bytes_as_the_folder(folder, index, healthy, tmp_path):
    with server.serve(folder) as remote:
        archive = Http(remote.url, tmp_path / "cache")
        with FrameSource(archive, GRID, index) as source:
            store = build(CATALOG, source, tmp_path / "out.zarr", GRID)
    assert store.checksum == healthy.checksum
    assert archive.counts.retries == archive.counts.failed == 0 and archive.counts.bytes_read > 0
    assert str(Folder(folder)) == str(folder)


def test_an_archive_that_dies_stops_the_build_and_loses_nothing(folder, index, healthy, tmp_path, quick, table):
    out = tmp_path / "out.zarr"
    with server.serve(folder) as remote:
        remote.misdeeds["-0041.fits.bz2"] = server.status(503)
        remote.misdeeds["/"] = server.status(503)
        archive = Http(remote.url, tmp_path / "cache")
        with (
            FrameSource(archive, GRID, index) as source,
            pytest.raises(Pix2massError, match="0041.*does not answer") as caught,
        ):
            build(CATALOG, source, out, GRID)
        table.append(
            (
                "archive that stops answering",
                "not made, store left open",
                "no answer after" + str(caught.value).partition("no answer after")[2][:60],
            )
        )
        asked = len(remote.asked)
        remote.misdeeds.clear()
        with FrameSource(Http(remote.url, tmp_path / "cache"), GRID, index) as source:
            store = build(CATALOG, source, out, GRID)
        again = [path for path, _ in remote.asked[asked:]]
    assert store.checksum == healthy.checksum
    assert {path[-13:-9] for path in again if path.endswith(".bz2")} == {"0041"}


def test_a_full_disk_stops_with_advice_and_loses_nothing(folder, index, healthy, tmp_path, monkeypatch, table):
    out, real = tmp_path / "out.zarr", archive_module.os.fsync
    calls = []

    def full_at_the_fifth(handle):
        calls.append(handle)
        if len(calls) >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(archive_module.os, "fsync", full_at_the_fifth)
    with server.serve(folder) as remote:
        with (
            FrameSource(Http(remote.url, tmp_path / "cache"), GRID, index) as source,
            pytest.raises(Pix2massError, match="No space left on device.*free some space") as caught,
        ):
            build(CATALOG, source, out, GRID)
        table.append(
            (
                "cache disk full (ENOSPC)",
                "not made, store left open",
                str(caught.value).rpartition("could not")[2][-110:],
            )
        )
        monkeypatch.undo()
        with FrameSource(Http(remote.url, tmp_path / "cache"), GRID, index) as source:
            store = build(CATALOG, source, out, GRID)
    assert store.checksum == healthy.checksum
