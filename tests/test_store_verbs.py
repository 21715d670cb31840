"""`pix2mass store info|check|show`: what a store holds, whether it is whole, and how its images look."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from _toy import ToySource, toy_catalog
from matplotlib.image import imread

from pix2mass import cli, pipeline
from pix2mass.config import GridConfig
from pix2mass.report import Tile, write_contact_sheet
from pix2mass.store import ImageStore, build
from pix2mass.types import Cutout, Flag, Pix2massError, empty_cutout

GRID = GridConfig(n_pixels=16)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ImageStore:
    catalog = toy_catalog(12, 8)
    catalog["id"] = [f"outside-{i}" if i % 5 == 3 else f"toy-{i}" for i in range(12)]
    catalog["z"][7] = np.nan
    path = tmp_path_factory.mktemp("store") / "toy.zarr"
    return build(catalog, ToySource(GRID), path, GRID, {"source": "toy sky", "index": None})


def said(capsys, monkeypatch, *words: object) -> tuple[int, str]:
    """Exit status and all that a command prints."""
    monkeypatch.setattr(sys, "argv", ["pix2mass", *(str(word) for word in words)])
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@pytest.mark.parametrize("verb", ["info", "check", "show"])
def test_help_ends_with_an_example(verb, capsys, monkeypatch):
    status, text = said(capsys, monkeypatch, "store", verb, "--help")
    assert status == 0 and f"Example: pix2mass store {verb}" in text


def test_info_says_what_a_store_holds(store, capsys, monkeypatch):
    status, text = said(capsys, monkeypatch, "store", "info", store.path)
    assert status == 0
    known = store.z[np.isfinite(store.z)]
    for fact in (
        "12 cutouts, bands ugriz, 16 x 16 pixels",
        f"checksum {store.checksum}",
        f"redshift   {known.min():.3f} to {known.max():.3f}, median {np.median(known):.3f}; 1 have none",
        "groups     3: field-0, field-1, field-2",
        "OUTSIDE: 2 cutouts; no image covers the position",
        "source: toy sky",
        "started 1 times",
    ):
        assert fact in text, fact
    assert "index" not in text and "SATURATED" not in text


def test_check_finds_a_flipped_bit(store, capsys, monkeypatch):
    status, text = said(capsys, monkeypatch, "store", "check", store.path)
    assert status == 0 and f"12 cutouts as they were sealed, checksum {store.checksum}" in text
    shard = store.path / "mask" / "c" / "0" / "0" / "0" / "0"
    before = shard.read_bytes()
    try:
        shard.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        status, text = said(capsys, monkeypatch, "store", "check", store.path)
    finally:
        shard.write_bytes(before)
    assert status == 2 and "damaged since it was sealed: mask (rows 0 to 11); build it again" in text


def test_show_draws_the_clusters_asked_for(store, tmp_path, capsys, monkeypatch):
    for words, n in (([], 12), (["--n", 5], 5), (["--flagged"], 2), (["--ids", "toy-2,toy-11,outside-3"], 3)):
        out = tmp_path / f"{len(words)}-{n}.png"
        status, text = said(capsys, monkeypatch, "store", "show", store.path, "--out", out, *words)
        assert status == 0 and f"{n} of 12 cutouts" in text, text
        assert imread(out).shape[0] > 200
    status, text = said(capsys, monkeypatch, "store", "show", store.path, "--ids", "nobody")
    assert status == 2 and "1 of 1 ids are not in the store: nobody" in text
    status, text = said(capsys, monkeypatch, "store", "show", store.path, "--out", tmp_path / "sheet.doc")
    assert status == 2 and "expected a name that ends in .png" in text


def test_clusters_are_chosen_evenly_over_redshift(store):
    rows = pipeline.choose_rows(store, 5)
    z = store.z[rows]
    assert len(rows) == 5 and z[0] == np.nanmin(store.z) and np.isnan(z[-1]) and (np.diff(z[:-1]) > 0).all()
    assert sorted(pipeline.choose_rows(store, 50, flagged=True)) == [3, 8]


def test_a_sheet_shows_light_gaps_and_flags(tmp_path):
    """A source that is bright in i comes out red, masked pixels grey, and only a flagged cutout has a frame."""
    flux = np.random.default_rng(1).normal(0, 0.01, (5, 32, 32)).astype(np.float32)
    flux[3, 4:12, 4:12] = 50.0
    mask = np.zeros(flux.shape, bool)
    mask[:, :, 20:] = True
    one = Cutout(flux, np.ones_like(flux), mask, "ugriz", 1.0, 2.0, 3.0, np.ones(5, np.float32))
    empty = empty_cutout("ugriz", 32, 1.0, 2.0, 3.0, Flag.OUTSIDE)

    def count(tile: Tile) -> tuple[int, int, int]:
        picture = imread(write_contact_sheet([tile], "a title", tmp_path / "sheet.png"))[..., :3]
        red = (picture[..., 0] > 0.8) & (picture[..., 1:] < 0.2).all(axis=-1)
        grey = (np.abs(picture - 128 / 255) < 0.01).all(axis=-1)
        frame = (np.abs(picture - np.array([0xD5, 0x5E, 0x00]) / 255) < 0.02).all(axis=-1)
        return int(red.sum()), int(grey.sum()), int(frame.sum())

    red, grey, frame = count(Tile("bright", 0.2, one))
    assert red / grey == pytest.approx(64 / (12 * 32), rel=0.1) and frame == 0
    red, grey_of_all, frame = count(Tile("nothing there", float("nan"), empty))
    assert red == 0 and grey_of_all > 2 * grey and frame > 500
    assert write_contact_sheet([Tile(r"A$\frac$3", 0.2, one)], r"of $\no$.zarr", tmp_path / "sheet.png").exists()
    with pytest.raises(Pix2massError, match="nothing to draw"):
        write_contact_sheet([], "a title", tmp_path / "sheet.png")
