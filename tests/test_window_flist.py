"""The survey's list of fields: great circles, footprints that miss no frame, best fields by score, SkyServer, plans."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import _archive_server as server
import numpy as np
import pytest
from _frames import frame_wcs, write_frame
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.table import QTable, Table
from hypothesis import given
from hypothesis import strategies as st

from pix2mass import pipeline
from pix2mass.config import BuildConfig, GridConfig
from pix2mass.images.archive import Field, Folder, Http, frame_path
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.plan import plan_frames, plan_hips
from pix2mass.images.window import (
    WINDOW_FLIST,
    ask_skyserver,
    from_great_circle,
    read_window_flist,
    to_great_circle,
    write_window_flist,
)
from pix2mass.store import ImageStore
from pix2mass.types import BANDS, Pix2massError

SHAPE = (1489, 2048)
"""Of a frame: its rows run along the great circle."""


def table_of(frames: dict[tuple[Field, str], tuple[float, float, float]]) -> FrameIndex:
    """An index of frames of real size, by field and band: centre and angle in degrees."""
    rows = []
    for (field, band), (ra, dec, angle) in frames.items():
        wcs = frame_wcs(ra, dec, SHAPE, angle).wcs
        (cd11, cd12), (cd21, cd22) = wcs.cd
        geometry = (*wcs.crval, *wcs.crpix, cd11, cd12, cd21, cd22, SHAPE[1], SHAPE[0])
        names = ("crval1", "crval2", "crpix1", "crpix2", "cd1_1", "cd1_2", "cd2_1", "cd2_2", "naxis1", "naxis2")
        rows.append({**field._asdict(), "band": band, "suffix": ".fits.bz2", **dict(zip(names, geometry, strict=True))})
    return FrameIndex(Table(rows=rows))


@given(st.floats(0, 360), st.floats(-89, 89), st.floats(0, 360), st.floats(0, 180))
def test_great_circle_coordinates_go_there_and_back(ra, dec, node, incl):
    mu, nu = to_great_circle(ra, dec, node, incl)
    back = from_great_circle(mu, nu, node, incl)
    there, here = SkyCoord(ra, dec, unit="deg"), SkyCoord(*(float(v) for v in back), unit="deg")
    assert there.separation(here).arcsec < 1e-5


def test_great_circle_coordinates_of_known_places():
    # The node lies on both circles; 90 degrees on, the circle stands as high as its inclination.
    assert np.allclose(from_great_circle(95.0, 0.0, 95.0, 32.5), (95.0, 0.0))
    assert np.allclose(from_great_circle(185.0, 0.0, 95.0, 32.5), (185.0, 32.5))
    assert np.allclose(from_great_circle(185.0, 1.0, 95.0, 32.5), (185.0, 33.5))
    assert np.allclose(to_great_circle(336.66, -0.93, 95.0, 0.0), (336.66, -0.93))  # the equatorial stripe


@pytest.mark.parametrize("dec", [-88.0, -5.0, 0.0, 37.0, 75.0])
@pytest.mark.parametrize("angle", [90.0, 0.0, 205.0])
def test_no_frame_is_missed_and_few_are_too_many(tmp_path, dec, angle):
    rng = np.random.default_rng(3)
    field = Field(3000, 2, 40)
    offsets = dict(zip(BANDS, rng.uniform(-5.5, 5.5, (5, 2)) / 3600.0 / np.sqrt(2.0), strict=True))
    scale = np.cos(np.radians(dec))
    true = table_of({(field, b): (150.0 + x / scale, dec + y, angle) for b, (x, y) in offsets.items()})
    write_window_flist(tmp_path / "list.fits", true)
    listed = read_window_flist(tmp_path / "list.fits")
    assert len(listed) == 1 and listed.fields == [field]
    for _ in range(300):
        ra1, dec1 = 150.0 + rng.uniform(-0.3, 0.3) / scale, dec + rng.uniform(-0.3, 0.3)
        width = rng.uniform(20.0, 400.0)
        found, expected = listed.covering(ra1, dec1, width), true.covering(ra1, dec1, width)
        assert set(expected) <= set(found)
        # Not more than the margin of 20" too many: a square smaller by twice that on each side meets the true frame.
        assert not found or true.covering(ra1, dec1, width + 2 * 60.0)


def test_fields_that_were_not_resolved_or_have_no_score_are_left_out(tmp_path):
    true = table_of({(Field(1, 1, n), "r"): (10.0 + n, 0.0, 90.0) for n in range(5)})
    path = tmp_path / "list.fits"
    write_window_flist(path, true, {Field(1, 1, 1): 0.0, Field(1, 1, 2): 0.3})
    with fits.open(path, mode="update") as hdus:
        hdus[1].data["RERUN"][3] = "157"
        hdus[1].data["RA"][4] = np.nan
    assert read_window_flist(path).fields == [Field(1, 1, 0), Field(1, 1, 2)]


def test_damaged_lists_are_refused(tmp_path):
    path = tmp_path / "list.fits"
    path.write_bytes(b"<html>")
    with pytest.raises(Pix2massError, match="delete it, and it is fetched again"):
        read_window_flist(path)
    fits.BinTableHDU.from_columns([fits.Column("RUN", "J", array=[1])]).writeto(path, overwrite=True)
    with pytest.raises(Pix2massError, match="missing: RERUN, CAMCOL"):
        read_window_flist(path)


def test_where_runs_overlap_the_best_score_is_taken_until_the_square_is_covered(tmp_path):
    step = 0.1496  # fields of a run follow each other by 1361 rows
    fields = {(Field(run, 1, n), "r"): (10.0 + n * step, 0.0, 90.0) for run in (100, 200, 300) for n in range(3)}
    scores = {Field(run, 1, n): score for run, score in ((100, 0.5), (200, 0.9), (300, 0.7)) for n in range(3)}
    # The best run lacks its last field: there the second best has to step in, but the worst never.
    del fields[Field(200, 1, 2), "r"]
    true = table_of(fields)
    write_window_flist(tmp_path / "list.fits", true, scores)
    listed = read_window_flist(tmp_path / "list.fits")
    assert listed.covering(10.0, 0.0, 120.0)["r"] == [Field(200, 1, 0)]
    assert set(listed.covering(10.0, 0.0, 120.0)) == set(BANDS)
    assert listed.covering(10.0 + 0.5 * step, 0.0, 120.0)["g"] == [Field(200, 1, 0), Field(200, 1, 1)]
    both = listed.covering(10.0 + 1.5 * step, 0.0, 240.0)["r"]
    assert {field.run for field in both} == {200, 300}
    assert {field.run for field in listed.covering(10.0 + 2 * step, 0.0, 120.0)["r"]} == {300}
    # Without scores, all are taken, as ever.
    assert {field.run for field in true.covering(10.0, 0.0, 120.0)["r"]} == {100, 200, 300}


def test_the_choice_by_score_covers_all_that_can_be_covered(tmp_path):
    rng = np.random.default_rng(8)
    frames, scores = {}, {}
    for run in range(12):
        field = Field(run, 1, 1)
        frames[field, "r"] = (150.0 + rng.uniform(-0.15, 0.15), 20.0 + rng.uniform(-0.15, 0.15), rng.uniform(0, 360))
        scores[field] = rng.uniform(0.1, 0.9)
    true = table_of(frames)
    write_window_flist(tmp_path / "list.fits", true, scores)
    listed = read_window_flist(tmp_path / "list.fits")
    for _ in range(40):
        ra, dec = 150.0 + rng.uniform(-0.15, 0.15), 20.0 + rng.uniform(-0.15, 0.15)
        chosen = listed.covering(ra, dec, 400.0).get("r", [])
        side = np.linspace(-200.0, 200.0, 24) / 3600.0
        points = frame_wcs(ra, dec, (1, 1), 0.0).pixel_to_world_values(*np.meshgrid(side / 1.1e-4, side / 1.1e-4))
        covered = {
            key[0]: np.all(
                [
                    (value > -0.5) & (value < size - 0.5)
                    for value, size in zip(
                        frame_wcs(*place[:2], SHAPE, place[2]).world_to_pixel_values(*points), SHAPE[::-1], strict=True
                    )
                ],
                axis=0,
            )
            for key, place in frames.items()
        }
        by_all = np.any(list(covered.values()), axis=0)
        by_chosen = np.any([covered[field] for field in chosen] or [np.zeros_like(by_all)], axis=0)
        assert (by_chosen == by_all).all()


def test_the_part_near_a_catalogue_gives_the_same_answers(tmp_path):
    rng = np.random.default_rng(2)
    true = table_of({(Field(n, 1, 1), "r"): (*rng.uniform(0.0, 3.0, 2), rng.uniform(0, 360)) for n in range(200)})
    write_window_flist(tmp_path / "list.fits", true, {Field(n, 1, 1): rng.uniform(0.1, 1.0) for n in range(200)})
    listed = read_window_flist(tmp_path / "list.fits")
    ra, dec, widths = *rng.uniform(0.5, 1.0, (2, 9)), rng.uniform(50.0, 900.0, 9)
    part = read_window_flist(tmp_path / "list.fits", (ra, dec, widths))
    assert 0 < len(part) < len(listed)
    for square in zip(ra, dec, widths, strict=True):
        assert part.covering(*square) == listed.covering(*square) != {}
    listed.to_file(tmp_path / "index.fits")
    again = FrameIndex.from_file(tmp_path / "index.fits")
    assert again.covering(ra[0], dec[0], widths[0]) == listed.covering(ra[0], dec[0], widths[0])
    assert again.suffix(Field(7, 1, 1), "z") == ".fits.bz2" and again.suffix(Field(7, 1, 2), "z") is None
    none = read_window_flist(tmp_path / "list.fits", (np.array([200.0]), np.array([-40.0]), np.array([100.0])))
    assert len(none) == 0 and none.fields == [] and none.covering(200.0, -40.0, 100.0) == {}


# ---- a whole build -------------------------------------------------------------------------------------------------

GRID = GridConfig(bands="gr", width_arcsec=32.0, n_pixels=16)
CATALOG = QTable({"id": ["a", "far"], "ra_deg": [200.0, 20.0], "dec_deg": [1.0, 1.0], "z": [0.2, 0.2]})


def quiet(_):
    return contextlib.nullcontext(lambda *_: None)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two runs that cover one cluster, and a list of fields."""
    base = tmp_path / "sas"
    for run in (3000, 4000):
        for band in GRID.bands:
            noise = np.random.default_rng(run).normal(0.0, 0.1, (300, 300))
            write_frame(base, noise, frame_wcs(200.0, 1.0, (300, 300)), run, 2, 40, band)
    index = FrameIndex.from_base(base)
    write_window_flist(base / WINDOW_FLIST, index, {Field(4000, 2, 40): 0.9, Field(3000, 2, 40): 0.6})
    return base


def build(folder: Path | str, out: Path, **settings) -> ImageStore:
    from pix2mass.distribute import InProcess

    config = BuildConfig(frames=str(folder), **settings)
    return pipeline.build_store(CATALOG, config, GRID, out, InProcess(), quiet)


def test_a_build_over_http_fetches_the_list_once_and_only_the_best_frames(folder, tmp_path):
    cache = tmp_path / "cache"
    local = build(folder, tmp_path / "local.zarr")
    with server.serve(folder) as remote:
        store = build(remote.url, tmp_path / "remote.zarr", frame_cache=cache)
        assert store.checksum == local.checksum
        assert remote.times(WINDOW_FLIST) == 1
        frames = [path for path, _ in remote.asked if "/frame-" in path]
        assert sorted(frames) == [f"/{frame_path(Field(4000, 2, 40), band, '.fits.bz2')}" for band in "gr"]
        assert not list(cache.rglob("frame-*.fits.bz2"))
        remote.asked.clear()
        again = build(remote.url, tmp_path / "again.zarr", frame_cache=cache, keep_frames=True, connections=1)
        assert again.checksum == local.checksum and remote.times(WINDOW_FLIST) == 0
        assert len(list(cache.rglob("frame-*.fits.bz2"))) == 2
        remote.asked.clear()
        offline = build(remote.url, tmp_path / "offline.zarr", frame_cache=cache)
        assert offline.checksum == local.checksum and remote.asked == []
    both = build(folder, tmp_path / "headers.zarr", fields="headers")
    assert both.checksum != local.checksum  # two runs averaged


def test_an_archive_without_a_list_is_searched_or_refused(folder, tmp_path):
    (folder / WINDOW_FLIST).unlink()
    with server.serve(folder) as remote, pytest.raises(Pix2massError, match="--fields headers or skyserver"):
        build(remote.url, tmp_path / "s.zarr", frame_cache=tmp_path / "cache", fields="list")
    assert build(folder, tmp_path / "s.zarr").flags.tolist()[1] != 0


def test_the_plan_counts_without_fetching_a_frame(folder, tmp_path):
    with server.serve(folder) as remote:
        config = BuildConfig(frames=remote.url, frame_cache=tmp_path / "cache")
        plan = pipeline.plan_build(CATALOG, config, GRID, tmp_path / "none.zarr", 1, quiet)
        assert [path for path, _ in remote.asked] == [f"/{WINDOW_FLIST}"]
    assert (plan["clusters"], plan["outside"], plan["frames"], plan["frame_sets"]) == (2, 1, 2, 1)
    assert plan["gigabytes"] == plan["gigabytes_to_fetch"] == pytest.approx((2 * 3.33e6 + 1.5e6) / 1e9)
    assert plan["in_flight_gigabytes"] == pytest.approx(2 * 3.33e-3)
    assert plan["store_gigabytes"] == pytest.approx(2 * 2 * 16**2 * 9 / 1e9)
    assert plan["hours"] > plan["gigabytes_to_fetch"] * 1e9 / 10e6 / 3600
    local = pipeline.plan_build(CATALOG, BuildConfig(frames=str(folder)), GRID, tmp_path / "none.zarr", 1, quiet)
    path = folder / frame_path(Field(4000, 2, 40), "g", ".fits.bz2")
    assert local["mean_frame_megabytes"] == pytest.approx(path.stat().st_size / 1e6, rel=0.1)
    assert local["gigabytes_to_fetch"] == 0.0 and "unpacking a frame here" in local["origins"]["rate"]


def test_the_plan_takes_the_rate_of_an_earlier_build_and_what_lies_in_the_cache(folder, tmp_path):
    out, cache = tmp_path / "s.zarr", tmp_path / "cache"
    with server.serve(folder) as remote:
        store = build(remote.url, out, frame_cache=cache, keep_frames=True)
        config = BuildConfig(frames=remote.url, frame_cache=cache)
        plan = pipeline.plan_build(CATALOG, config, GRID, out, 1, quiet)
    assert "build.json" in plan["origins"]["rate"]
    assert plan["hours"] == pytest.approx(store.build_summary["seconds"]["cutouts"] / 3600.0)
    assert plan["gigabytes_to_fetch"] < plan["gigabytes"]


def test_most_frames_in_flight_follow_the_order_of_work(folder):
    fields = {(Field(1, 1, n), "r"): (10.0 + n, 0.0, 90.0) for n in range(6)}
    catalog = QTable({"ra_deg": 10.0 + np.array([0, 5, 0, 3, 5.0]), "dec_deg": np.zeros(5), "z": np.full(5, 0.2)})
    grid = GridConfig(bands="r", width_arcsec=60.0)
    plan = plan_frames(catalog, grid, table_of(fields), Http("http://127.0.0.1:9"), 1, {})
    assert plan["frames"] == 3 and plan["in_flight_gigabytes"] == pytest.approx(3.33e-3)
    assert isinstance(Folder(folder), Folder)


def test_the_service_is_about_30_times_cheaper():
    catalog = QTable({"ra_deg": [0.0], "dec_deg": [0.0], "z": [0.2]})
    plan = plan_hips(catalog, GridConfig(), {})
    assert plan["gigabytes"] * 1e9 == pytest.approx(5 * 4 * 256**2, rel=0.03)


# ---- SkyServer -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def skyserver(rows: list[dict[str, float]], questions: list[str]) -> Iterator[str]:
    """A stand-in that understands the RA and Dec limits of the question."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = parse_qs(urlsplit(self.path).query)
            questions.append(asked["cmd"][0])
            words = asked["cmd"][0].replace("(", " ").replace(")", " ").split()
            low, high = (float(words[words.index("BETWEEN") + k]) for k in (1, 3))
            left = float(words[words.index(">=") + 1])
            right = float(words[words.index("<=") + 1])
            inside = [
                row
                for row in rows
                if low <= row["DEC"] <= high
                and (left <= row["RA"] <= right if left < right else row["RA"] >= left or row["RA"] <= right)
            ]
            lines = ["#Table1", ",".join(rows[0])] + [",".join(str(value) for value in row.values()) for row in inside]
            server.send(self, "\n".join(lines).encode())

        def log_message(self, *_: object) -> None:
            pass

    service = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{service.server_port}"
    finally:
        service.shutdown()
        service.server_close()


def test_skyserver_gives_the_same_fields_as_the_list(tmp_path):
    frames = {(Field(n, 1, 1), "r"): (ra, 30.0, 90.0) for n, ra in enumerate((0.02, 359.95, 5.0, 150.0))}
    write_window_flist(tmp_path / "list.fits", table_of(frames))
    listed = read_window_flist(tmp_path / "list.fits")
    data = fits.getdata(tmp_path / "list.fits", 1)
    rows = [{name: record[name] for name in data.names} for record in data]
    ra, dec, widths = np.array([0.0, 150.1, 250.0]), np.full(3, 30.0), np.full(3, 300.0)
    questions: list[str] = []
    with skyserver(rows, questions) as url:
        index = ask_skyserver(url, ra, dec, widths, tmp_path / "cache")
        assert index.fields == [Field(0, 1, 1), Field(1, 1, 1), Field(3, 1, 1)] and len(questions) == 3
        for square in zip(ra, dec, widths, strict=True):
            assert index.covering(*square) == listed.covering(*square)
        again = ask_skyserver(url, ra, dec, widths, tmp_path / "cache")
        assert again.fields == index.fields and len(questions) == 3  # asked once, offline afterwards
    assert "FROM Field" in questions[0] and "rerun = 301" in questions[0]


def test_skyserver_refuses_many_positions_and_says_when_it_does_not_answer(tmp_path):
    many = np.zeros(101)
    with pytest.raises(Pix2massError, match="101 positions are too many.*--fields list"):
        ask_skyserver("http://127.0.0.1:9", many, many, many)
    one = np.zeros(1)
    with pytest.raises(Pix2massError, match="127.0.0.1:9.*did not answer"):
        ask_skyserver("http://127.0.0.1:9", one, one, one)
    with pytest.raises(Pix2massError, match="expected an http"):
        ask_skyserver("file:///etc", one, one, one)
