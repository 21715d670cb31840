"""The list of fields against six real fields, and against the list's own columns for one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from pix2mass.images.archive import Field
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.grid import tan_wcs
from pix2mass.images.window import MARGIN_ARCSEC, _index, read_window_flist, write_window_flist
from pix2mass.types import BANDS


@pytest.fixture(scope="module")
def base(real_data: Path) -> Path:
    return real_data / "sas"


@pytest.fixture(scope="module")
def index(base) -> FrameIndex:
    return FrameIndex.from_base(base)


def outlines(row, margin_arcsec: float = 0.0) -> np.ndarray:
    """Sky positions (40, 2) along a frame's edge."""
    wcs = wcs_of(row)
    grow = margin_arcsec / 0.396
    along = np.linspace(0.0, 1.0, 11)[:-1]
    square = np.concatenate([np.c_[along, 0 * along], np.c_[0 * along + 1, along], np.c_[1 - along, 0 * along + 1]])
    square = np.concatenate([square, np.c_[0 * along, 1 - along]])
    pixel = 0.5 - grow + square * (np.array([row["naxis1"], row["naxis2"]]) + 2 * grow)
    return np.stack(wcs.all_pix2world(*pixel.T, 1), axis=1)


def wcs_of(row):
    cd = ((row["cd1_1"], row["cd1_2"]), (row["cd2_1"], row["cd2_2"]))
    return tan_wcs((row["crval1"], row["crval2"]), (row["crpix1"], row["crpix2"]), cd)


def sticks_out_arcsec(frame, listed) -> float:
    """How far a real frame reaches beyond its place in the list."""
    x, y = wcs_of(listed).all_world2pix(*outlines(frame).T, 1)
    beyond = [0.5 - x, x - listed["naxis1"] - 0.5, 0.5 - y, y - listed["naxis2"] - 0.5]
    return float(np.max(beyond)) * 0.396


def test_the_list_misses_no_frame_of_the_six_fields(index, tmp_path):
    write_window_flist(tmp_path / "list.fits", index)
    listed = read_window_flist(tmp_path / "list.fits")
    assert listed.fields == index.fields and len(listed) == 6
    worst = {}
    for row in listed.table:
        mine = [f for f in index.table if all(f[name] == row[name] for name in ("run", "camcol", "field"))]
        worst[int(row["run"])] = max(sticks_out_arcsec(frame, row) for frame in mine)
    print("farthest beyond the listed place, arcsec, by run:", {run: round(far, 2) for run, far in worst.items()})
    assert max(worst.values()) < MARGIN_ARCSEC / 2.0
    rng = np.random.default_rng(4)
    too_many = 0
    for row in listed.table:
        scale = np.cos(np.radians(row["crval2"]))
        for _ in range(200):
            ra = row["crval1"] + rng.uniform(-0.25, 0.25) / scale
            dec = row["crval2"] + rng.uniform(-0.25, 0.25)
            width = rng.uniform(30.0, 600.0)
            found, true = listed.covering(ra, dec, width), index.covering(ra, dec, width)
            assert set(true) <= set(found)
            too_many += bool(found) and not true
            # What is too much lies within the margin and what a frame reaches beyond its place.
            assert not found or index.covering(ra, dec, width + 2.0 * np.sqrt(2.0) * (MARGIN_ARCSEC + 10.0))
    print(f"squares of 1200 for which the list names a frame that just misses them: {too_many}")
    assert too_many < 120


def test_the_surveys_own_columns_give_the_place_of_a_real_frame(base, index):
    """photoField holds the list's MU, NU, RA, DEC and SCORE for all fields of a run's column; NODE, INCL are HDU3's."""
    photo = fits.getdata(base / "dr12/boss/photoObj/301/94/photoField-000094-1.fits", 1)
    frame = base / "dr12/boss/photoObj/frames/301/94/1/frame-r-000094-1-0012.fits.bz2"
    astrometry = fits.getdata(frame, 3)
    names = ("RUN", "CAMCOL", "FIELD", "RA", "DEC", "MU_START", "MU_END", "NU_START", "NU_END", "SCORE")
    table = Table({name: photo[name] for name in names})
    table["RERUN"], table["NODE"], table["INCL"] = "301", astrometry["NODE"][0], astrometry["INCL"][0]
    listed = _index(table)
    assert len(listed) == (photo["SCORE"] > 0).sum() == 534
    row = next(row for row in listed.table if row["field"] == 12)
    assert row["score"] == pytest.approx(0.786, abs=1e-3)
    assert (row["naxis1"], row["naxis2"]) == pytest.approx((2048, 1489), abs=1.0)
    far = {
        band: sticks_out_arcsec(next(f for f in index.table if f["run"] == 94 and f["band"] == band), row)
        for band in BANDS
    }
    print("94-1-0012 beyond its listed place, arcsec:", {band: round(value, 2) for band, value in far.items()})
    assert max(far.values()) < MARGIN_ARCSEC / 2.0
    assert Field(94, 1, 12) in listed.covering(336.73222, -0.91766, 519.0)["u"]
