"""Cutouts from synthetic frames: flux, noise, overlaps, flags, damaged files, the index and HTTP."""

from __future__ import annotations

import bz2
import functools
import io
import pickle
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from _frames import CALIB, SKY_COUNTS, frame_bytes, frame_wcs, gaussian, write_frame, write_photo_field
from astropy.io import fits
from astropy.table import QTable, Table
from scipy.ndimage import map_coordinates

import pix2mass.images.archive as archive_module
import pix2mass.images.frame_queue as queue_module
import pix2mass.images.frames as frames_module
import pix2mass.images.http as http_module
from pix2mass.config import GridConfig
from pix2mass.images.archive import FRAMES_FOLDER, Field
from pix2mass.images.frame import SATURATION_COUNTS, Frame, tabulated_noise
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.types import Flag, Pix2massError

RA, DEC = 200.0, 1.0
SHAPE = (160, 200)
GRID = GridConfig(bands="gri", width_arcsec=38.4, n_pixels=48)
CLUSTER = {"id": "c1", "ra_deg": RA, "dec_deg": DEC, "z": 0.2}
GAIN, DARK = 4.0, 2.0


def make_archive(base: Path, bands: str = "gri", **changes: np.ndarray) -> Path:
    """One field with a 100 nanomaggy source at its centre; band g is shifted by ten pixels."""
    for band in bands:
        wcs = frame_wcs(RA, DEC + (10 * 0.396 / 3600 if band == "g" else 0.0), SHAPE)
        flux = changes.get(band, gaussian(SHAPE, wcs, RA, DEC, 100.0, 1.5))
        write_frame(base, flux, wcs, 3000, 2, 40, band)
    write_photo_field(base, 3000, 2, [39, 40, 41], GAIN, DARK)
    return base


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make_archive(tmp_path)


def cutout(base: Path | str, cluster=CLUSTER, grid=GRID, **kwargs):
    with FrameSource(base, grid, **kwargs) as source:
        return source.cutout(cluster)


def test_flux_sigma_psf_and_alignment(archive):
    result = cutout(archive)
    assert result.flags == Flag(0) and result.coverage == 1.0
    assert result.flux.sum(axis=(1, 2)) == pytest.approx([100.0] * 3, rel=5e-4)
    rows, cols = np.indices((48, 48))
    for band in result.flux:
        assert (band * cols).sum() / band.sum() == pytest.approx(23.5, abs=0.01)
        assert (band * rows).sum() / band.sum() == pytest.approx(23.5, abs=0.01)
    assert np.allclose(result.psf_fwhm_arcsec, 1.3)


def test_sigma_is_the_formula_of_the_frame_data_model(archive):
    # Pixels of exactly 2 x 2 frame pixels; the corner is blank.
    result = cutout(archive, grid=GRID.model_copy(update={"width_arcsec": 48 * 0.792}))
    for k, band in enumerate("gri"):
        variance = 4 * CALIB[band] ** 2 * (SKY_COUNTS / GAIN + DARK)
        assert result.sigma[k, :10, :10] == pytest.approx(np.sqrt(variance), rel=1e-3)


def test_measured_scatter_is_the_propagated_sigma(tmp_path):
    rng = np.random.default_rng(1)
    sigma = CALIB["r"] * np.sqrt(SKY_COUNTS / GAIN + DARK)
    make_archive(tmp_path, "r", r=rng.normal(0.0, sigma, SHAPE))
    result = cutout(tmp_path, grid=GRID.model_copy(update={"bands": "r"}))
    assert np.std(result.flux / result.sigma) == pytest.approx(1.0, abs=0.06)


def test_a_very_near_cluster_is_made_without_filling_the_memory(archive):
    near = cutout(archive, {**CLUSTER, "z": 0.004}, GridConfig(bands="gri"))
    assert near.pixel_scale_arcsec > 370.0 and near.flags == Flag.OUTSIDE  # a frame one arcmin wide fills no pixel
    with pytest.raises(Pix2massError, match="cluster c1: z: expected a redshift at which"):
        cutout(archive, {**CLUSTER, "z": 1e-6}, GridConfig(bands="gri"))


def test_without_photo_field_sigma_is_approximate_and_follows_the_tables(archive):
    exact = cutout(archive)
    (archive / "dr12/boss/photoObj/301/3000/photoField-003000-2.fits").unlink()
    result = cutout(archive)
    assert result.flags == Flag.SIGMA_APPROXIMATE
    assert np.isnan(result.psf_fwhm_arcsec).all()
    gain, dark = tabulated_noise(3000, 2)
    expected = (SKY_COUNTS / gain[1:4] + dark[1:4]) / (SKY_COUNTS / GAIN + DARK)
    measured = (result.sigma[:, :10, :10] ** 2).mean(axis=(1, 2)) / (exact.sigma[:, :10, :10] ** 2).mean(axis=(1, 2))
    assert measured == pytest.approx(expected, rel=1e-3)


def test_tables_of_gain_and_dark_variance_change_with_the_run():
    assert tabulated_noise(94, 2)[0][0] == 1.595 and tabulated_noise(1101, 2)[0][0] == 1.825
    assert tabulated_noise(1500, 4)[1][[3, 4]].tolist() == [6.25, 9.61]
    assert tabulated_noise(1501, 4)[1][[3, 4]].tolist() == [7.5625, 12.6025]


def test_fields_of_one_run_are_not_averaged_and_seams_conserve_flux(tmp_path):
    # The second field repeats the last 40 rows of the first: the same exposure, so sigma must not shrink.
    full_shape = (280, 200)
    wcs = frame_wcs(RA, DEC, full_shape)
    flux = gaussian(full_shape, wcs, RA, DEC, 100.0, 2.0)
    write_frame(tmp_path, flux[:160], wcs, 3000, 2, 40, "r")
    write_frame(tmp_path, flux[120:], wcs[120:], 3000, 2, 41, "r")
    write_photo_field(tmp_path, 3000, 2, [40, 41], GAIN, DARK)
    result = cutout(tmp_path, grid=GRID.model_copy(update={"bands": "r"}))
    assert result.flags == Flag(0) and result.coverage == 1.0
    assert result.flux.sum() == pytest.approx(100.0, rel=1e-3)
    edge = result.sigma[0][[0, -1]]
    assert np.ptp(edge) < 0.2 * edge.mean()


def test_different_runs_are_averaged_without_double_counting(tmp_path):
    for run, angle in ((3000, 90.0), (4000, 20.0)):
        wcs = frame_wcs(RA, DEC, SHAPE, angle)
        write_frame(tmp_path, gaussian(SHAPE, wcs, RA, DEC, 100.0, 1.5), wcs, run, 2, 40, "r")
        write_photo_field(tmp_path, run, 2, [40], GAIN, DARK)
    grid = GRID.model_copy(update={"bands": "r"})
    both = cutout(tmp_path, grid=grid)
    one = cutout(make_archive(tmp_path / "one", "r"), grid=grid)
    assert both.flux.sum() == pytest.approx(100.0, rel=2e-3)
    ratio = np.median(both.sigma[0, :8, :8]) / np.median(one.sigma[0, :8, :8])
    assert ratio == pytest.approx(np.sqrt(0.5), rel=0.06)


def test_two_halves_of_a_pixel_from_two_runs_make_one(tmp_path):
    # Two runs meet on the cutout's middle row, and each covers less than half of some pixels there.
    for run, shift in ((3000, 1), (4000, -1)):
        wcs = frame_wcs(RA, DEC + shift * 30.0 / 3600, (200, 152), 0.0)
        write_frame(tmp_path, np.full((200, 152), 1.0), wcs, run, 2, 40, "r")
    wide = GridConfig(bands="r", width_arcsec=45.0, n_pixels=9)
    result = cutout(tmp_path, grid=wide)
    assert result.coverage == 1.0
    assert np.allclose(result.flux, (5.0 / 0.396) ** 2, rtol=1e-2)


def test_partly_outside_and_outside(archive):
    edge = {**CLUSTER, "ra_deg": RA + 0.007}
    result = cutout(archive, edge)
    assert Flag.PARTLY_OUTSIDE in result.flags and Flag.MISSING_BAND not in result.flags
    assert 0.1 < result.coverage < 0.95
    assert (result.flux[result.mask] == 0).all() and (result.sigma[result.mask] == 0).all()
    assert (result.sigma[~result.mask] > 0).all()
    far = cutout(archive, {**CLUSTER, "ra_deg": RA + 1.0})
    assert far.flags == Flag.OUTSIDE and far.mask.all() and far.bands == "gri"


def test_empty_archive_listing_of_damaged_headers(archive):
    # No sibling band is left to tell where the field lies.
    for band in "gri":
        frame_path(archive, band).write_bytes(b"x" * 100)
    with pytest.warns(UserWarning, match="left out of the index"), pytest.raises(Pix2massError, match="found none"):
        FrameIndex.from_base(archive)


def test_missing_band(tmp_path):
    result = cutout(make_archive(tmp_path, "gi"))
    assert result.flags == Flag.MISSING_BAND
    assert result.mask[1].all() and not result.mask[[0, 2]].any()


def frame_path(base: Path, band: str) -> Path:
    return base / FRAMES_FOLDER / f"3000/2/frame-{band}-003000-2-0040.fits.bz2"


def frame_of(field: int = 40, band: str = "r", run: int = 3000) -> bytes:
    wcs = frame_wcs(RA, DEC, SHAPE)
    return frame_bytes(np.zeros(SHAPE), wcs, run, 2, field, band)


def only_primary() -> bytes:
    with fits.open(io.BytesIO(frame_of())) as hdus:
        buffer = io.BytesIO()
        hdus[0].writeto(buffer)
    return buffer.getvalue()


DAMAGE = {
    "truncated bzip2": (lambda data: data[: len(data) // 2], "truncated"),
    "empty": (lambda data: b"", "truncated|not a FITS"),
    "not bzip2": (lambda data: b"<html>404</html>" * 300, "not a bzip2 file"),
    "not FITS": (lambda data: bz2.compress(b"hello world" * 3000), "not a FITS file"),
    "wrong band": (lambda data: bz2.compress(frame_of(band="g")), "wrong frame.*FILTER"),
    "wrong run": (lambda data: bz2.compress(frame_of(run=3001)), "wrong frame.*RUN"),
    "wrong field": (lambda data: bz2.compress(frame_of(field=41)), "wrong frame.*FIELD"),
    "truncated FITS": (lambda data: bz2.compress(frame_of()[:40000]), "truncated, or parts missing"),
    "missing HDU": (lambda data: bz2.compress(only_primary()), "truncated, or parts missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_unreadable_frame_is_flagged_named_and_the_rest_goes_on(archive, damage):
    spoil, message = DAMAGE[damage]
    path = frame_path(archive, "r")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"frame-r-003000-2-0040.*({message})"):
        result = cutout(archive)
    assert result.flags == Flag.UNREADABLE | Flag.MISSING_BAND
    assert result.mask[1].all() and not result.mask[[0, 2]].any()


def test_frame_gone_since_the_index_was_made(archive):
    index = FrameIndex.from_base(archive)
    frame_path(archive, "g").unlink()
    with pytest.warns(UserWarning, match="no such file, though the frame index lists it"):
        result = cutout(archive, index=index)
    assert result.flags == Flag.UNREADABLE | Flag.MISSING_BAND


def test_all_bands_unreadable(archive):
    index = FrameIndex.from_base(archive)
    for band in "gri":
        frame_path(archive, band).write_bytes(b"")
    with pytest.warns(UserWarning):
        result = cutout(archive, index=index)
    assert result.flags == Flag.UNREADABLE | Flag.OUTSIDE


def test_bad_pixels_are_masked_and_flagged(tmp_path):
    wcs = frame_wcs(RA, DEC, SHAPE)
    flux = gaussian(SHAPE, wcs, RA, DEC, 100.0, 1.5)
    flux[70:80, 90:100] = np.nan
    flux[60, 60] = -1e3  # counts below zero have no variance
    result = cutout(make_archive(tmp_path, r=flux))
    assert result.flags == Flag.BAD_PIXELS
    assert 5 < result.mask[1].sum() < 60 and not result.mask[[0, 2]].any()
    assert np.isfinite(result.flux).all() and np.isfinite(result.sigma).all()


def test_bad_pixels_beyond_the_cutout_do_not_matter(tmp_path):
    flux = np.zeros(SHAPE)
    flux[:5, :5] = np.nan
    assert cutout(make_archive(tmp_path, r=flux)).flags == Flag(0)


def test_saturation_is_flagged_inside_only(tmp_path):
    hot = 1.01 * SATURATION_COUNTS * CALIB["i"]
    inside, outside = np.zeros(SHAPE), np.zeros(SHAPE)
    inside[80, 100] = hot
    outside[2, 2] = hot
    assert cutout(make_archive(tmp_path / "in", i=inside)).flags == Flag.SATURATED
    assert cutout(make_archive(tmp_path / "out", i=outside)).flags == Flag(0)


@pytest.mark.parametrize("change", [{"ra_deg": np.nan}, {"dec_deg": 95.0}, {"z": -0.3}, {"z": np.nan}, {"ra_deg": "x"}])
def test_unusable_cluster_is_refused_by_name(archive, change):
    with FrameSource(archive, GridConfig(bands="gri")) as source, pytest.raises(Pix2massError, match="c1"):
        source.cutout({**CLUSTER, **change})


def test_angular_grid_needs_no_redshift(archive):
    assert cutout(archive, {**CLUSTER, "z": np.nan}).coverage == 1.0


def test_each_frame_is_unpacked_once(archive, monkeypatch):
    calls = []
    parse = frames_module.parse_frame

    def counted(*args):
        calls.append(args)
        return parse(*args)

    monkeypatch.setattr(frames_module, "parse_frame", counted)
    with FrameSource(archive, GRID) as source:
        first, second = source.cutout(CLUSTER), source.cutout(CLUSTER)
        source.cutout({**CLUSTER, "ra_deg": RA + 0.001})
    assert len(calls) == 3
    assert np.array_equal(first.flux, second.flux)


def make_run(base: Path, n_fields: int, seed: int = 1) -> tuple[FrameIndex, QTable]:
    """Fields side by side along a run, two bands of noise each; cutouts in the middle and on each border."""
    rng = np.random.default_rng(seed)
    rows, whole = SHAPE[0], frame_wcs(RA, DEC, (n_fields * SHAPE[0], SHAPE[1]))
    for k in range(n_fields):
        for band in "gr":
            flux = rng.normal(0.0, 0.05, SHAPE)
            write_frame(base, flux, whole[k * rows :], 3000, 2, 40 + k, band)
    write_photo_field(base, 3000, 2, list(range(40, 40 + n_fields)), GAIN, DARK)
    y = np.arange(2 * n_fields - 1) * (rows / 2) + rows / 2
    ra_deg, dec_deg = whole.pixel_to_world_values(np.full(y.size, SHAPE[1] / 2), y)
    order = rng.permutation(y.size)
    catalog = QTable({"id": [f"c{k}" for k in order], "ra_deg": ra_deg[order], "dec_deg": dec_deg[order]})
    catalog["z"] = 0.2
    return FrameIndex.from_base(base), catalog


RUN_GRID = GridConfig(bands="gr", width_arcsec=19.8, n_pixels=25)


def clusters(catalog: QTable) -> list[dict]:
    return [dict(zip(catalog.colnames, row, strict=True)) for row in catalog]


def test_groups_are_rows_that_share_fields_along_the_run(tmp_path):
    index, catalog = make_run(tmp_path, 4)
    far = {"id": ["far", "bad"], "ra_deg": [RA + 3.0, RA], "dec_deg": [DEC, 95.0], "z": [0.2, 0.2]}
    other = frame_wcs(RA + 1.0, DEC, SHAPE)
    write_frame(tmp_path, np.zeros(SHAPE), other, 2000, 1, 7, "r")
    alone = {"id": ["alone"], "ra_deg": [RA + 1.0], "dec_deg": [DEC], "z": [0.2]}
    catalog = QTable({name: [*catalog[name], *far[name], *alone[name]] for name in catalog.colnames})
    with FrameSource(tmp_path, RUN_GRID, FrameIndex.from_base(tmp_path)) as source:
        groups = source.groups(catalog)
    names = [[str(catalog["id"][row]) for row in group] for group in groups]
    assert names == [["alone"], [f"c{k}" for k in (0, 1, 2, 3, 4, 5, 6)], ["far", "bad"]]


def test_a_long_chain_is_cut_between_fields(tmp_path, monkeypatch):
    index, catalog = make_run(tmp_path, 6)
    monkeypatch.setattr(queue_module, "_GROUP_CUTOUTS", 3)
    with FrameSource(tmp_path, RUN_GRID, index) as source:
        groups = source.groups(catalog)
    names = [[int(str(catalog["id"][row])[1:]) for row in group] for group in groups]
    assert [k for group in names for k in group] == list(range(11))
    assert {len(group) for group in names[:-1]} <= {3, 4} and len(names) == 3
    # Where a group ends, the field that began last begins no cutout of the next one.
    assert all(group[0] % 2 == 0 for group in names[1:])


@pytest.mark.parametrize("limit", [45, 4])
def test_in_the_order_of_groups_frames_are_unpacked_once_and_go_after_their_last_use(tmp_path, monkeypatch, limit):
    index, catalog = make_run(tmp_path, 8)
    monkeypatch.setattr(queue_module, "_FRAMES", limit)
    read, dropped, held = [], [], []
    with FrameSource(tmp_path, RUN_GRID, index) as source:
        expected = [source.cutout(cluster) for cluster in clusters(catalog)]
    with FrameSource(tmp_path, RUN_GRID, index) as source:
        source._archive = Spied(tmp_path, read, dropped)
        rows = [row for group in source.groups(catalog) for row in group]
        for row in rows:
            assert_same(source.cutout(clusters(catalog)[row]), expected[row])
            held.append(len(source._queue.frames))
    frames = [path for path in read if "/frame-" in path]
    assert len(frames) == len(set(frames)) == 16
    assert sorted(dropped) == sorted(frames)
    assert max(held) <= 4 and held[-1] == 0


class Spied(archive_module.Folder):
    """A folder that tells what is read from it and what may go."""

    def __init__(self, base: Path, read: list[str], dropped: list[str]) -> None:
        super().__init__(base)
        self._read, self._dropped = read, dropped

    def read(self, path: str) -> bytes | None:
        self._read.append(path)
        return super().read(path)

    def drop(self, path: str) -> None:
        self._dropped.append(path)


def test_cutouts_do_not_depend_on_order_copies_or_memory(tmp_path, monkeypatch):
    index, catalog = make_run(tmp_path, 3)
    rows = clusters(catalog)
    with FrameSource(tmp_path, RUN_GRID, index) as source:
        expected = [source.cutout(row) for row in rows]
        groups = source.groups(catalog)
        with pickle.loads(pickle.dumps(source)) as copy:
            for row in reversed(groups[0]):
                assert_same(copy.cutout(rows[row]), expected[row])
    monkeypatch.setattr(queue_module, "_FRAMES", 1)
    monkeypatch.setattr(queue_module, "_FRAMES_UNORDERED", 1)
    with FrameSource(tmp_path, RUN_GRID, index) as source:
        for row, one in zip(rows, expected, strict=True):
            assert_same(source.cutout(row), one)
            assert len(source._queue.frames) == 1
        source.groups(catalog)
        for row in groups[0]:
            assert_same(source.cutout(rows[row]), expected[row])


def test_a_damaged_frame_is_named_when_its_cutout_is_made_not_ahead(tmp_path):
    index, catalog = make_run(tmp_path, 3)
    (tmp_path / FRAMES_FOLDER / "3000/2/frame-r-003000-2-0042.fits.bz2").write_bytes(b"x" * 100)
    with FrameSource(tmp_path, RUN_GRID, index) as source:
        order = source.groups(catalog)[0]
        rows = [clusters(catalog)[row] for row in order]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [source.cutout(row).flags for row in rows[:3]] == [Flag(0)] * 3
        with pytest.warns(UserWarning, match="frame-r-003000-2-0042.*not a bzip2 file"):
            assert source.cutout(rows[3]).flags == Flag.UNREADABLE | Flag.MISSING_BAND
        assert source.cutout(rows[4]).mask[1].all()


def test_noise_of_a_frame_follows_its_sky_and_calibration():
    rng = np.random.default_rng(4)
    sky = rng.uniform(100.0, 200.0, (20, 25)).astype(np.float32)
    x, y = np.linspace(-1.0, 26.0, SHAPE[1], dtype=np.float32), np.linspace(-1.0, 21.0, SHAPE[0], dtype=np.float32)
    calib = rng.uniform(0.0048, 0.0052, SHAPE[1]).astype(np.float32)
    flux = rng.normal(0.0, 0.05, SHAPE).astype(">f4")
    flux[3, 4], flux[5, 6], flux[7, 8], flux[9, 10] = np.nan, np.inf, -1e3, 1.01 * SATURATION_COUNTS * calib[10]
    exposure = Frame(flux, frame_wcs(RA, DEC, SHAPE), calib, sky, x, y).exposure(GAIN, DARK)
    at = np.meshgrid(np.clip(y, 0, 19), np.clip(x, 0, 24), indexing="ij")
    counts = flux / calib + map_coordinates(sky, at, order=1)
    variance = calib**2 * (counts / GAIN + DARK)
    bad = np.zeros(SHAPE, bool)
    bad[[3, 5, 7], [4, 6, 8]] = True
    assert np.array_equal(np.isnan(exposure.pixels[..., 1]), bad)
    assert (exposure.pixels[bad, 0] == 0.0).all()
    assert np.allclose(exposure.pixels[~bad, 0], flux[~bad], rtol=0)
    assert np.allclose(exposure.pixels[~bad, 1], variance[~bad], rtol=1e-5)
    assert exposure.hot.T.tolist() == [[6, 5], [10, 9]]
    assert exposure.typical_variance == pytest.approx(np.median(variance[~bad]), rel=0.1)


def test_files_beside_the_frames_do_not_hide_them(archive):
    expected = FrameIndex.from_base(archive).table
    for path in sorted((archive / FRAMES_FOLDER).rglob("frame-*.fits.bz2")):
        for more in (".md5", ".part", ".aria2"):
            path.with_name(path.name + more).write_text("no frame")
        path.with_name(path.name.removesuffix(".bz2") + ".tmp").write_text("no frame")
        path.with_name("frame-r-" + path.name).write_text("no frame")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FrameIndex.from_base(archive).table.as_array().tolist() == expected.as_array().tolist()


def test_plain_fits_and_progress(tmp_path):
    wcs = frame_wcs(RA, DEC, SHAPE)
    write_frame(tmp_path, gaussian(SHAPE, wcs, RA, DEC, 100.0, 1.5), wcs, 3000, 2, 40, "r", suffix=".fits")
    seen = []
    index = FrameIndex.from_base(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)] and index.fields == [Field(3000, 2, 40)]
    result = cutout(tmp_path, grid=GRID.model_copy(update={"bands": "r"}), index=index)
    assert result.flux.sum() == pytest.approx(100.0, rel=5e-4)


@pytest.mark.parametrize("name", ["index.ecsv", "index.fits"])
def test_index_survives_the_disk(archive, tmp_path, name):
    index = FrameIndex.from_base(archive)
    index.to_file(tmp_path / name)
    again = FrameIndex.from_file(tmp_path / name)
    assert again.covering(RA, DEC, 30.0) == index.covering(RA, DEC, 30.0) != {}
    assert np.array_equal(cutout(archive, index=tmp_path / name).flux, cutout(archive).flux)


def test_bad_index_files_are_refused(tmp_path):
    with pytest.raises(Pix2massError, match="no such file"):
        FrameIndex.from_file(tmp_path / "none.ecsv")
    for column, value, message in (
        ("run", 1.5, "whole numbers"),
        ("cd1_1", np.nan, "finite"),
        ("band", "y", "bands of"),
    ):
        table = Table(FrameIndex.from_base(make_archive(tmp_path / column, "r")).table)
        table[column] = [value]
        with pytest.raises(Pix2massError, match=message):
            FrameIndex(table)
    Table({"run": [1]}).write(tmp_path / "t.ecsv")
    with pytest.raises(Pix2massError, match="missing: camcol"):
        FrameIndex.from_file(tmp_path / "t.ecsv")
    (tmp_path / "x.ecsv").write_text("nonsense\n1")
    with pytest.raises(Pix2massError, match="expected a frame index"):
        FrameIndex.from_file(tmp_path / "x.ecsv")


@pytest.mark.parametrize("base", ["file:///tmp", "ftp://example.org/sas", "/nowhere/at/all"])
def test_bad_bases_are_refused(base):
    with pytest.raises(Pix2massError, match="expected"):
        FrameSource(base, GRID)


def test_archive_without_frames_is_refused(tmp_path):
    (tmp_path / FRAMES_FOLDER).mkdir(parents=True)
    with pytest.raises(Pix2massError, match="found none"):
        FrameIndex.from_base(tmp_path)


@pytest.mark.parametrize("dec", [-89.7, -30.0, 0.0, 62.0, 89.8])
@pytest.mark.parametrize("ra", [0.0, 123.0])
def test_covering_agrees_with_pixels(tmp_path, ra, dec):
    wcs = frame_wcs(ra, dec, SHAPE, 35.0)
    write_frame(tmp_path, np.zeros(SHAPE), wcs, 3000, 2, 40, "r")
    index = FrameIndex.from_base(tmp_path)
    rng = np.random.default_rng(5)
    for _ in range(60):
        near = frame_wcs(ra, dec, (1, 1), 0.0)
        ra1, dec1 = (float(v) for v in near.pixel_to_world_values(*rng.uniform(-180, 180, 2)))
        width = rng.uniform(5.0, 60.0)
        grid = frame_wcs(ra1, dec1, (1, 1), 0.0)
        side = np.linspace(-0.5, 0.5, 60) * width / 0.396
        x, y = wcs.world_to_pixel_values(*grid.pixel_to_world_values(*np.meshgrid(side, side)))
        touches = ((x > -0.5) & (x < SHAPE[1] - 0.5) & (y > -0.5) & (y < SHAPE[0] - 0.5)).any()
        assert bool(index.covering(ra1, dec1, width * 1.04)) or not touches
        assert touches or not index.covering(ra1, dec1, width * 0.92)


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder; the first answers may be errors."""

    failures = 0

    def do_GET(self):
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Serve a folder on this machine; yields a function from folder to URL."""
    servers = []

    def start(folder: Path, failures: int = 0) -> str:
        handler = type("Handler", (QuietHandler,), {"failures": failures})
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        server.handle_error = lambda *args: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def assert_same(a, b):
    assert a.flags == b.flags
    for name in ("flux", "sigma", "mask", "psf_fwhm_arcsec"):
        assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=name == "psf_fwhm_arcsec")


def test_http_equals_folder_and_retries(archive, serve, monkeypatch):
    monkeypatch.setattr(http_module, "WAIT_S", 0.01)
    assert_same(cutout(serve(archive, failures=2) + "/"), cutout(archive))


def test_http_limits_and_failures(archive, serve, monkeypatch):
    monkeypatch.setattr(http_module, "WAIT_S", 0.01)
    index = FrameIndex.from_base(archive)
    with pytest.raises(Pix2massError, match="no answer after 4 attempts"):
        cutout(serve(archive, failures=100), index=index)
    with pytest.raises(Pix2massError, match="no answer"):
        cutout("http://127.0.0.1:1/sas", index=index)
    with pytest.raises(Pix2massError, match="not found"):
        cutout(serve(archive / "dr12"))
    monkeypatch.setattr(archive_module, "_MAX_LISTED_FIELDS", 0)
    with pytest.raises(Pix2massError, match="pass a frame index"):
        cutout(serve(archive))


def test_random_positions_lie_inside_and_do_not_depend_on_other_fields(archive):
    wcs = frame_wcs(10.0, 50.0, SHAPE, 33.0)
    write_frame(archive, np.zeros(SHAPE), wcs, 4000, 1, 7, "r")
    index = FrameIndex.from_base(archive)
    table = random_positions(index, 20, seed=3, margin_arcsec=20.0)
    assert isinstance(table, QTable) and table.colnames == ["id", "ra_deg", "dec_deg", "z", "group"]
    assert len(set(table["id"])) == len(table) == 40 and np.isnan(table["z"]).all()
    assert set(table["group"]) == {"3000-2-0040", "4000-1-0007"}
    mine = table[table["group"] == "4000-1-0007"]
    x, y = wcs.world_to_pixel_values(mine["ra_deg"], mine["dec_deg"])
    margin = 20.0 / 0.396
    assert x.min() > margin - 0.51 and x.max() < SHAPE[1] - margin - 0.49
    assert y.min() > margin - 0.51 and y.max() < SHAPE[0] - margin - 0.49
    frame_path(archive, "r").unlink()
    fewer = random_positions(FrameIndex.from_base(archive), 20, seed=3, margin_arcsec=20.0, z=0.3)
    assert np.array_equal(fewer[fewer["group"] == "4000-1-0007"]["ra_deg"], mine["ra_deg"])
    assert (fewer["z"] == 0.3).all()
    with pytest.raises(Pix2massError, match="leaves nothing"):
        random_positions(index, 1, seed=1, margin_arcsec=60.0)
