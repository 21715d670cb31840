"""Cutouts from a stand-in for hips2fits: units, noise, what is outside, and a service that misbehaves."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import _archive_server as server
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS

from pix2mass import pipeline
from pix2mass.config import BuildConfig, GridConfig
from pix2mass.distribute import InProcess
from pix2mass.images import http
from pix2mass.images.hips import HipsSource, request_bytes, request_pixels
from pix2mass.types import Flag, Pix2massError

RA, DEC = 150.0, 20.0
GRID = GridConfig(bands="gr", width_arcsec=128.0, n_pixels=32)
CLUSTER = {"id": "c1", "ra_deg": RA, "dec_deg": DEC, "z": 0.2}
NOISE = {"g": 0.02, "r": 0.03}
STAR_NMGY = 500.0

Sky = Callable[[WCS, int, int, str], np.ndarray]


def sky(wcs: WCS, width: int, height: int, band: str) -> np.ndarray:
    """Nanomaggies per 0.396" pixel: noise, and a star 12" north of the centre of 2" standard deviation."""
    rows, cols = np.indices((height, width))
    ra, dec = wcs.pixel_to_world_values(cols, rows)
    r2 = ((ra - RA) * np.cos(np.radians(DEC)) * 3600.0) ** 2 + ((dec - DEC) * 3600.0 - 12.0) ** 2
    per_arcsec2 = STAR_NMGY * np.exp(-r2 / 8.0) / (8.0 * np.pi)
    rng = np.random.default_rng([len(band), ord(band)])
    return per_arcsec2 * 0.396**2 + rng.normal(0.0, NOISE[band], (height, width))


@dataclass
class Service:
    url: str = ""
    draw: Sky = sky
    failures: int = 0
    status: int = 503
    body: bytes | None = None
    asked: list[dict[str, str]] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)


@contextlib.contextmanager
def hips2fits() -> Iterator[Service]:
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            service.asked.append(asked)
            service.agents.add(self.headers.get("User-Agent", ""))
            if service.failures > 0:
                service.failures -= 1
                server.send(self, b"busy", service.status)
                return
            if service.body is not None:
                server.send(self, service.body)
                return
            header = fits.Header(json.loads(asked["wcs"]))
            image = service.draw(WCS(header), header["NAXIS1"], header["NAXIS2"], asked["hips"][-1])
            buffer = io.BytesIO()
            fits.PrimaryHDU(image.astype(np.float32), WCS(header).to_header()).writeto(buffer)
            server.send(self, buffer.getvalue())

        def log_message(self, *_: object) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{listener.server_port}/hips-image-services/hips2fits"
    threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield service
    finally:
        listener.shutdown()
        listener.server_close()


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(http, "WAIT_S", 0.01)
    with hips2fits() as running:
        yield running


def cutout(service: Service, cluster=CLUSTER, grid=GRID):
    with HipsSource(grid, service.url) as source:
        return source.cutout(cluster)


def test_flux_position_and_flags(service):
    result = cutout(service)
    assert result.flags == Flag.SIGMA_APPROXIMATE and result.coverage == 1.0
    assert np.isnan(result.psf_fwhm_arcsec).all() and result.bands == "gr"
    rows, cols = np.indices((32, 32))
    for flux in result.flux:
        near = np.hypot(cols - 15.5, rows - 18.5) < 5.0  # 12" north is 3 pixels up
        assert flux[near].sum() == pytest.approx(STAR_NMGY, rel=0.02)
        assert (flux * cols * near).sum() / flux[near].sum() == pytest.approx(15.5, abs=0.1)
        assert (flux * rows * near).sum() / flux[near].sum() == pytest.approx(18.5, abs=0.1)
    assert {asked["hips"] for asked in service.asked} == {"CDS/P/SDSS9/g", "CDS/P/SDSS9/r"}
    assert all(asked["format"] == "fits" for asked in service.asked)
    assert all(agent.startswith("pix2mass/") for agent in service.agents)


def test_sigma_is_the_scatter_on_the_stores_grid(service):
    service.draw = lambda wcs, width, height, band: (
        sky(wcs, width, height, band) * 0 + np.random.default_rng(4).normal(0.0, NOISE[band], (height, width))
    )
    result = cutout(service)
    # 256 x 256 pixels of 0.5" are asked for, 8 x 8 of them make a pixel of the store, each of (0.5/0.396)^2 units.
    for k, band in enumerate("gr"):
        expected = NOISE[band] * (0.5 / 0.396) ** 2 * 8
        assert result.sigma[k].mean() == pytest.approx(expected, rel=0.05) and np.ptp(result.sigma[k]) == 0.0
        assert result.flux[k].std() == pytest.approx(result.sigma[k].mean(), rel=0.06)


@pytest.mark.parametrize(
    ("n_pixels", "scale", "asked"), [(64, 8.11, 256), (256, 1.0, 256), (512, 0.8, 512), (64, 0.8, 128), (64, 0.2, 64)]
)
def test_what_is_asked_for_is_a_multiple_of_the_grid_and_not_finer_than_sdss(n_pixels, scale, asked):
    assert request_pixels(GridConfig(n_pixels=n_pixels), scale) == asked
    assert request_bytes(asked) % 2880 == 0 and request_bytes(asked) > 4 * asked**2


def test_blank_pixels_are_outside(service):
    def half(wcs, width, height, band):
        image = sky(wcs, width, height, band)
        image[:, : width // 2] = np.nan
        return image

    service.draw = half
    result = cutout(service)
    assert result.flags == Flag.SIGMA_APPROXIMATE | Flag.PARTLY_OUTSIDE and result.coverage == pytest.approx(
        0.5, abs=0.03
    )
    service.draw = lambda wcs, width, height, band: np.full((height, width), np.nan)
    assert cutout(service).flags == Flag.OUTSIDE
    service.draw = lambda *what: half(*what) if what[3] == "g" else np.full((what[2], what[1]), np.nan)
    assert Flag.MISSING_BAND in cutout(service).flags


def test_an_image_without_any_signal_is_outside(service):
    service.draw = lambda wcs, width, height, band: np.zeros((height, width))
    assert cutout(service).flags == Flag.OUTSIDE


def test_busy_answers_are_tried_again(service):
    service.failures = 3
    assert cutout(service).flags == Flag.SIGMA_APPROXIMATE


@pytest.mark.parametrize("body", [b"<html>maintenance</html>", b"", b"SIMPLE  =                    T"])
def test_what_is_no_image_is_flagged_and_named(service, body):
    draw = cutout(service)
    service.body = body
    with pytest.warns(UserWarning, match="CDS/P/SDSS9/g around cluster c1: not the FITS image asked for"):
        result = cutout(service)
    assert result.flags == Flag.UNREADABLE | Flag.OUTSIDE and draw.coverage == 1.0


def test_an_image_of_another_size_is_not_taken(service):
    buffer = io.BytesIO()
    fits.PrimaryHDU(np.zeros((5, 5), np.float32)).writeto(buffer)
    service.body = buffer.getvalue()
    with pytest.warns(UserWarning, match="expected an image of shape"):
        assert Flag.UNREADABLE in cutout(service).flags


def test_a_service_that_does_not_answer_stops(service):
    service.failures = 1000
    with pytest.raises(Pix2massError, match="no answer after 4 attempts.*does not answer either"):
        cutout(service)
    with pytest.raises(Pix2massError, match="no answer"):
        HipsSource(GRID, "http://127.0.0.1:9/x").cutout(CLUSTER)
    with pytest.raises(Pix2massError, match="expected an http"):
        HipsSource(GRID, "file:///etc/passwd")


def test_unusable_cluster_is_refused_by_name(service):
    with pytest.raises(Pix2massError, match="c1"):
        cutout(service, {**CLUSTER, "z": -1.0}, GridConfig(bands="g"))


def test_a_store_says_where_its_cutouts_come_from_and_what_was_assumed(service, tmp_path):
    catalog = QTable({"id": ["c1", "c2"], "ra_deg": [RA, RA], "dec_deg": [DEC, DEC], "z": [0.2, 0.3]})
    config = BuildConfig(hips=True, hips_service=service.url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = pipeline.build_store(
            catalog, config, GRID, tmp_path / "s.zarr", InProcess(), lambda _: contextlib.nullcontext(lambda *_: None)
        )
    said = store.provenance
    assert said["hips_service"] == service.url and said["hips"] == ["CDS/P/SDSS9/g", "CDS/P/SDSS9/r"]
    assert "0.396" in said["unit"] and "interpolated" in said["resampling"] and "scatter" in said["sigma"]
    assert (store.flags == Flag.SIGMA_APPROXIMATE).all()
    assert store.build_summary["bytes_read"] == 4 * request_bytes(256)


def test_a_source_travels_to_other_processes(service):
    source = HipsSource(GRID, service.url)
    source.cutout(CLUSTER)
    again = pickle.loads(pickle.dumps(source))  # as Dask does it
    assert np.array_equal(again.cutout(CLUSTER).flux, source.cutout(CLUSTER).flux)
    assert source.statistics()["files"] == 4 and source.statistics()["seconds"]["fetch"] > 0.0
