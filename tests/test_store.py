"""The image store: what goes in comes out, whatever happens in between."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from _toy import ToySource, toy_catalog

import pix2mass.store.image_store as image_store
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
    monkeypatch.setattr(image_store, "_SHARD_BYTES", 3 * 4 * 3 * 16 * 16)  # three rows a shard: the last is not full
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
    monkeypatch.setattr(image_store, "_SHARD_BYTES", 3 * 4 * 3 * 16 * 16)
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


class Shuffled(ToySource):
    """Asks for its rows in an order of its own, in groups of unequal size."""

    def groups(self, catalog) -> list[list[int]]:
        order = np.random.default_rng(len(catalog)).permutation(len(catalog)).tolist()
        return [order[:3], order[3:4], order[4:]]


def test_the_order_of_work_does_not_show(tmp_path):
    catalog = toy_catalog(13, 5)
    plain, shuffled = ToySource(GRID), Shuffled(GRID)
    one = build(catalog, plain, tmp_path / "plain.zarr", GRID)
    two = build(catalog, shuffled, tmp_path / "shuffled.zarr", GRID)
    assert plain.made == catalog["id"].tolist() != shuffled.made
    assert two.ids == catalog["id"].tolist() and one.checksum == two.checksum
    stopped = Shuffled(GRID)
    stopped.fail_at = 6
    with pytest.raises(RuntimeError):
        build(catalog, stopped, tmp_path / "s.zarr", GRID)
    stopped.fail_at = None
    assert build(catalog, stopped, tmp_path / "s.zarr", GRID).checksum == one.checksum
    assert sorted(stopped.made) == sorted(catalog["id"].tolist()), "a finished cutout was made again, or one was not"


def test_a_source_that_forgets_rows_is_a_mistake(tmp_path):
    class Forgets(ToySource):
        def groups(self, catalog):
            return [[0, 1]]

    with pytest.raises(ValueError, match="Forgets.groups must name each of 3 rows once"):
        build(toy_catalog(3, 1), Forgets(GRID), tmp_path / "s.zarr", GRID)


def test_a_store_lies_at_any_url(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "_SHARD_BYTES", 3 * 4 * 3 * 16 * 16)
    catalog = toy_catalog(7, 5)
    local = build(catalog, ToySource(GRID), tmp_path / "local.zarr", GRID)
    by_url = build(catalog, ToySource(GRID), f"file://{tmp_path}/by%20url.zarr", GRID)
    assert by_url.path == tmp_path / "by url.zarr" and by_url.checksum == local.checksum
    url = f"memory://{tmp_path.name}/store.zarr"
    source = ToySource(GRID)
    source.fail_at = 4
    with pytest.raises(RuntimeError):
        build(catalog, source, url, GRID)
    with pytest.raises(Pix2massError, match="not finished .4 cutouts so far"):
        ImageStore.open(url)
    source.fail_at = None
    assert build(catalog, source, url, GRID).checksum == local.checksum
    assert len(source.made) == 7
    remote = ImageStore.open(url)
    remote.check()
    assert remote.path == url and remote.n_bytes > 0
    np.testing.assert_array_equal(remote.batch([6, 2])[0], local.batch([6, 2])[0])
    np.testing.assert_array_equal(remote[3].sigma, local[3].sigma)
    with pytest.raises(Pix2massError, match="nowhere://x: cannot open this kind of URL"):
        ImageStore.open("nowhere://x")


def test_a_place_that_does_not_answer_is_named(monkeypatch):
    def refuse(self, key):
        raise PermissionError("no credentials")

    monkeypatch.setattr("zarr.storage.FsspecStore.exists", refuse)
    with pytest.raises(Pix2massError, match="memory://a/b: the place does not answer: PermissionError: no credentials"):
        ImageStore.open("memory://a/b")


def test_the_build_says_what_it_did(tmp_path):
    class Counts(ToySource):
        def statistics(self):
            return {
                "bytes": 100 * len(self.made),
                "retries": len(self.made) // 2,
                "seconds": {"fetch": 0.5 * len(self.made)},
            }

    catalog, source, seen = toy_catalog(5, 1, "outside"), Counts(GRID), []
    catalog["id"][1:] = [f"inside-{i}" for i in range(4)]
    source.fail_at = 2
    with pytest.raises(RuntimeError):
        build(catalog, source, tmp_path / "s.zarr", GRID)
    source.fail_at = None
    store = build(catalog, source, tmp_path / "s.zarr", GRID, progress=lambda *said: seen.append(said))
    summary = json.loads((tmp_path / "s.zarr" / "build.json").read_text())
    assert summary == store.build_summary
    expected = {"clusters": 5, "made": 5, "failed": {}, "flagged": {"OUTSIDE": 1}, "retried": 2, "bytes_read": 500}
    assert expected.items() <= summary.items()
    assert summary["source"]["seconds"] == {"fetch": 2.5} and summary["starts"] == 2
    assert set(summary["seconds"]) == {"ordering", "cutouts", "sealing"} and summary["bytes_written"] > 5 * 9 * 3 * 256
    assert [done for done, _, _ in seen] == [2, 3, 4, 5] and "retried" in seen[-1][2]
    plain = build(catalog, ToySource(GRID), tmp_path / "plain.zarr", GRID)
    assert plain.checksum == store.checksum, "the summary must be no part of the checksum"


def test_some_bands_of_a_store_are_those_of_a_store_built_with_them(tmp_path):
    catalog = toy_catalog(4, 1)
    grid = GridConfig(bands="gri", n_pixels=16)
    store = build(catalog, ToySource(grid), tmp_path / "all.zarr", grid)
    some = store.with_bands("gri").with_bands("ig").with_bands("g")
    assert some.grid.bands == "g" and store.grid.bands == "gri"
    assert some.checksum not in (store.checksum, store.with_bands("i").checksum)
    np.testing.assert_array_equal(store.with_bands("ig").batch([2, 0])[0], store.batch([2, 0])[0][:, [2, 0]])
    cutout, whole = some[1], store[1]
    for name in ("flux", "sigma", "mask", "psf_fwhm_arcsec"):
        np.testing.assert_array_equal(getattr(cutout, name), getattr(whole, name)[:1])
    np.testing.assert_array_equal(some.noise, store.noise[:, :1])
    with pytest.raises(Pix2massError, match="holds bands 'gri', not 'uz' of 'ugz'"):
        store.with_bands("ugz")


def test_a_band_that_is_missing_is_not_missed_where_it_is_not_wanted(tmp_path):
    store = ImageStore.create(tmp_path / "s.zarr", GRID)
    bad = cutout(0)
    bad = replace(bad, mask=np.stack([bad.mask[0], bad.mask[1], np.ones((16, 16), bool)]), flags=Flag.MISSING_BAND)
    store.append(bad, "a", 0.2)
    store.seal()
    store = ImageStore.open(tmp_path / "s.zarr")
    assert [int(store.with_bands(bands).flags[0]) for bands in ("gr", "ri")] == [0, int(Flag.MISSING_BAND)]


def test_a_kept_band_that_is_missing_in_part_is_still_missed(tmp_path):
    catalog = toy_catalog(3, 1)[:3]
    masked = {"toy-0": ("u", slice(None)), "toy-1": ("g", slice(8, 16)), "toy-2": ("gri", slice(8, 16))}

    class Frames(ToySource):
        """As frames give them where those of a band are not there."""

        def cutout(self, cluster):
            whole = super().cutout(cluster)
            mask = np.zeros_like(whole.mask)
            bands, cols = masked[str(cluster["id"])]
            for band in set(bands) & set(whole.bands):
                mask[whole.bands.index(band), :, cols] = True
            lacking = (mask.any(axis=0) & ~mask.all(axis=0)).any()
            flags = Flag.MISSING_BAND if lacking else Flag.PARTLY_OUTSIDE if mask.any() else Flag(0)
            return replace(
                whole, flux=np.where(mask, 0, whole.flux), sigma=np.where(mask, 0, whole.sigma), mask=mask, flags=flags
            )

    stores = {}
    for bands in ("ugri", "gri"):
        grid = GridConfig(bands=bands, n_pixels=16)
        stores[bands] = build(catalog, Frames(grid), tmp_path / f"{bands}.zarr", grid, {"frames": "/data/sas"})
    view = stores["ugri"].with_bands("gri")
    assert (stores["ugri"].flags[:3] == int(Flag.MISSING_BAND)).all()
    # The third lies at the edge of its kept bands, which is no lack of a band; u reaches further.
    assert (view.flags & int(Flag.MISSING_BAND)).tolist() == (stores["gri"].flags & int(Flag.MISSING_BAND)).tolist()
    assert (view.flags & int(Flag.MISSING_BAND) != 0).tolist() == [False, True, False]
    assert view[1].flags & Flag.MISSING_BAND and not stores["ugri"].with_bands("ri").flags[1]
