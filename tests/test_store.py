"""The image store: what goes in comes out, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from _toy import ToySource, toy_catalog

import pix2mass.store as store_module
from pix2mass.config import GridConfig
from pix2mass.store import ImageStore, build
from pix2mass.types import Cutout, Flag, Pix2massError, empty_cutout

GRID = GridConfig(bands="gri", n_pixels=16)


def cutout(seed: int, bands: str = "gri", n_pixels: int = 16) -> Cutout:
    rng = np.random.default_rng(seed)
    shape = (len(bands), n_pixels, n_pixels)
    mask = rng.random(shape) < 0.2
    flux = np.where(mask, 0, rng.standard_normal(shape)).astype(np.float32)
    sigma = np.where(mask, 0, rng.uniform(0.5, 2.0, shape)).astype(np.float32)
    psf = np.array([1.4, np.nan, 1.2], np.float32)[: len(bands)]
    flags = Flag.SATURATED | Flag.PARTLY_OUTSIDE if seed % 2 else Flag(0)
    return Cutout(flux, sigma, mask, bands, 150.0 + seed, -2.0, 3.5 + seed, psf, flags)


def filled(path: Path, n: int = 7) -> ImageStore:
    store = ImageStore.create(path, GRID, {"source": "test"})
    for i in range(n):
        store.append(cutout(i), f"c{i}", 0.1 + 0.01 * i, group=f"field {i % 2}")
    store.append(empty_cutout("gri", 16, 1.0, 2.0, 3.0, Flag.OUTSIDE), "nowhere é", 0.3)
    store.seal()
    return store


def test_what_goes_in_comes_out(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_SHARD_BYTES", 3 * 4 * 3 * 16 * 16)  # three rows a shard: the last is not full
    filled(tmp_path / "s.zarr")
    store = ImageStore.open(tmp_path / "s.zarr")
    assert store.ids == [*(f"c{i}" for i in range(7)), "nowhere é"]
    assert store.provenance == {"source": "test"} and store.grid == GRID
    assert store.groups.tolist() == [*(f"field {i % 2}" for i in range(7)), ""]
    for i in range(7):
        got, expected = store[i], cutout(i)
        for name in ("flux", "sigma", "mask", "psf_fwhm_arcsec"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
        assert (got.ra_deg, got.pixel_scale_arcsec, got.flags) == (
            expected.ra_deg,
            expected.pixel_scale_arcsec,
            expected.flags,
        )
        usable = [expected.sigma[b][~expected.mask[b]] for b in range(3)]
        np.testing.assert_allclose(store.noise[i], [np.median(values) for values in usable], rtol=1e-6)
    assert store[7].flags == Flag.OUTSIDE and store[7].mask.all() and np.isnan(store.noise[7]).all()


def test_batches_in_any_order_and_through_plain_zarr(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_SHARD_BYTES", 3 * 4 * 3 * 16 * 16)
    store = filled(tmp_path / "s.zarr")
    rows = [6, 0, 7, 3, 3]
    flux, mask = store.batch(rows)
    plain = zarr.open_group(tmp_path / "s.zarr", mode="r")
    np.testing.assert_array_equal(flux, plain["flux"][:][rows])
    np.testing.assert_array_equal(mask, plain["mask"][:][rows].astype(bool))
    assert store.batch([2])[0].shape == (1, 3, 16, 16)
    assert store.rows(["c3", "c0"]).tolist() == [3, 0]
    with pytest.raises(Pix2massError, match=r"1 of 2 ids are not in the store: c99"):
        store.rows(["c1", "c99"])
    with pytest.raises(IndexError):
        store[8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": "gir"}, "in that order"),
        ({"bands": "gr"}, "holds bands 'gri' in that order, the cutout 'gr'"),
        ({"n_pixels": 17}, r"shape \(3, 16, 16\)"),
    ],
)
def test_refuses_other_bands_and_shapes(tmp_path, change, message):
    store = ImageStore.create(tmp_path / "s.zarr", GRID)
    with pytest.raises(Pix2massError, match=message):
        store.append(cutout(1, **change), "a", 0.2)
    assert len(store) == 0


def test_refuses_duplicates_nan_and_appending_after_sealing(tmp_path):
    store = ImageStore.create(tmp_path / "s.zarr", GRID)
    store.append(cutout(1), "a", 0.2)
    with pytest.raises(Pix2massError, match="a: this id is already in"):
        store.append(cutout(2), "a", 0.2)
    broken = cutout(3)
    broken.flux[0, 0, 0] = np.nan
    with pytest.raises(Pix2massError, match="must be finite"):
        store.append(broken, "b", 0.2)
    noiseless = cutout(3)
    noiseless.sigma[~noiseless.mask] = 0
    with pytest.raises(Pix2massError, match="sigma must be positive"):
        store.append(noiseless, "b", 0.2)
    for bad_id in ("", "x" * 129):
        with pytest.raises(Pix2massError, match="1 to 128 bytes"):
            store.append(cutout(4), bad_id, 0.2)
    with pytest.raises(Pix2massError, match="not finished"):
        ImageStore.open(tmp_path / "s.zarr")
    store.seal()
    with pytest.raises(Pix2massError, match="sealed and cannot be appended"):
        store.append(cutout(2), "b", 0.2)
    with pytest.raises(Pix2massError, match="sealed and cannot be appended"):
        ImageStore.create(tmp_path / "s.zarr", GRID)


def test_refuses_foreign_folders_and_other_grids(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "letter.txt").write_text("dear all")
    with pytest.raises(Pix2massError, match="not empty"):
        ImageStore.create(tmp_path / "docs", GRID)
    with pytest.raises(Pix2massError, match="no image store here"):
        ImageStore.open(tmp_path / "none.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(Pix2massError, match="not a pix2mass image store"):
        ImageStore.open(tmp_path / "other.zarr")
    ImageStore.create(tmp_path / "s.zarr", GRID)
    with pytest.raises(Pix2massError, match="another grid"):
        ImageStore.create(tmp_path / "s.zarr", GridConfig(bands="gri", n_pixels=32))
    with pytest.raises(Pix2massError, match="nothing to seal"):
        ImageStore.create(tmp_path / "s.zarr", GRID).seal()


def test_damage_is_found(tmp_path):
    store = filled(tmp_path / "s.zarr")
    store.check()
    shard = tmp_path / "s.zarr" / "flux" / "c" / "0" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Pix2massError, match="damaged since it was sealed: flux"):
        ImageStore.open(tmp_path / "s.zarr").check()
    shard.unlink()
    with pytest.raises(Pix2massError, match="missing"):
        ImageStore.open(tmp_path / "s.zarr")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = ImageStore.create(tmp_path / "s.zarr", GRID)
    store.append(cutout(0), "a", 0.2)
    real = zarr.Array.__setitem__

    def full(self, selection, value):
        if self.name.endswith("/sigma"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, selection, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(
        Pix2massError, match=r"cutout b could not be written .*No space left.* the 1 before it are safe"
    ):
        store.append(cutout(1), "b", 0.2)
    with pytest.raises(Pix2massError, match=r"sealing failed .*No space left.* nothing is lost"):
        store.seal()
    monkeypatch.undo()
    again = ImageStore.create(tmp_path / "s.zarr", GRID)
    assert again.ids == ["a"]
    again.append(cutout(1), "b", 0.2)
    again.seal()
    np.testing.assert_array_equal(ImageStore.open(tmp_path / "s.zarr")[1].flux, cutout(1).flux)


def test_build_goes_on_without_redoing(tmp_path):
    catalog, source = toy_catalog(12, 1), ToySource(GRID)
    source.fail_at = 5
    with pytest.raises(RuntimeError):
        build(catalog, source, tmp_path / "a.zarr", GRID)
    source.fail_at = None
    store = build(catalog, source, tmp_path / "a.zarr", GRID)
    assert sorted(source.made) == sorted(catalog["id"].tolist())
    whole = build(catalog, ToySource(GRID), tmp_path / "b.zarr", GRID)
    assert store.checksum == whole.checksum
    before = list(source.made)
    assert build(catalog, source, tmp_path / "a.zarr", GRID).checksum == store.checksum
    assert source.made == before, "a sealed store of the same clusters is taken as it is"
    with pytest.raises(Pix2massError, match="other clusters"):
        build(toy_catalog(11, 2, "else"), source, tmp_path / "a.zarr", GRID)


def test_build_does_not_pass_off_other_images(tmp_path):
    """Same ids and grid, but another redshift, position or source of images: neither taken over nor continued."""
    catalog = toy_catalog(6, 1)
    moved, deeper = catalog.copy(), catalog.copy()
    moved["dec_deg"][2] += 0.01
    deeper["z"][4] += 0.1
    build(catalog, ToySource(GRID), tmp_path / "sealed.zarr", GRID, {"source": "a"})
    source = ToySource(GRID)
    source.fail_at = 3
    with pytest.raises(RuntimeError):
        build(catalog, source, tmp_path / "begun.zarr", GRID, {"source": "a"})
    for path in (tmp_path / "sealed.zarr", tmp_path / "begun.zarr"):
        for table, provenance in ((moved, {"source": "a"}), (deeper, {"source": "a"}), (catalog, {"source": "b"})):
            with pytest.raises(Pix2massError, match="other clusters, positions, redshifts or images"):
                build(table, ToySource(GRID), path, GRID, provenance)
        assert len(build(catalog, ToySource(GRID), path, GRID, {"source": "a"})) == 6


def test_build_with_two_processes_gives_the_same_store(tmp_path):
    catalog = toy_catalog(20, 3)
    one = build(catalog, ToySource(GRID), tmp_path / "one.zarr", GRID)
    two = build(catalog, ToySource(GRID), tmp_path / "two.zarr", GRID, workers=2)
    assert one.checksum == two.checksum


def test_sealing_can_be_interrupted(tmp_path, monkeypatch):
    catalog = toy_catalog(6, 4)
    whole = build(catalog, ToySource(GRID), tmp_path / "whole.zarr", GRID)

    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageStore, "_checksums", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(catalog, ToySource(GRID), tmp_path / "s.zarr", GRID)
    monkeypatch.undo()
    source = ToySource(GRID)
    assert build(catalog, source, tmp_path / "s.zarr", GRID).checksum == whole.checksum
    assert source.made == []


_VICTIM = """
import sys, time
sys.path.insert(0, {tests!r})
from _toy import ToySource, toy_catalog
from pix2mass.config import GridConfig
from pix2mass.store import build
class Slow(ToySource):
    def cutout(self, cluster):
        time.sleep(0.01)
        return super().cutout(cluster)
grid = GridConfig(bands="gri", n_pixels=16)
build(toy_catalog(60, 5), Slow(grid), {path!r}, grid)
"""


def test_killed_at_random_moments(tmp_path):
    code = _VICTIM.format(tests=str(Path(__file__).parent), path=str(tmp_path / "s.zarr"))
    rng = np.random.default_rng(6)
    kills = 0
    for _ in range(4):
        victim = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 60
        while not (tmp_path / "s.zarr" / "staging" / "record" / "zarr.json").exists() and victim.poll() is None:
            assert time.monotonic() < deadline, "the build never started"
            time.sleep(0.01)
        time.sleep(rng.uniform(0.05, 0.4))
        if victim.poll() is None:
            victim.send_signal(signal.SIGKILL)
            kills += 1
        victim.wait()
    assert kills, "no build was killed: the test tried nothing"
    catalog, source = toy_catalog(60, 5), ToySource(GRID)
    resumed = build(catalog, source, tmp_path / "s.zarr", GRID)
    assert len(source.made) < 60, "everything was made again"
    assert resumed.checksum == build(catalog, ToySource(GRID), tmp_path / "whole.zarr", GRID).checksum
