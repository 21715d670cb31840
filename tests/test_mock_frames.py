"""Mock frames: the archive's layout, and the same sky, noise and PSF as ``MockSource`` states."""

from __future__ import annotations

import bz2
import io
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.archive import Field, frame_path
from pix2mass.images.frame import parse_frame
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frames import FrameSource
from pix2mass.images.mock.frames import BAND_OFFSET_PX, OVERLAP_ROWS, dimmed_flux, with_truth, write_frames
from pix2mass.images.mock.population import galaxies, mean_richness
from pix2mass.images.mock.render import render
from pix2mass.images.mock.source import MockSource
from pix2mass.images.window import read_window_flist
from pix2mass.types import BANDS, Flag, Pix2massError

SHAPE = (300, 420)
GRID = GridConfig(width_arcsec=100.0, n_pixels=40)
EBV = 0.05
CONFIG = MockConfig(depth_r_mag=21.0, background_r_mag=23.0, ebv_min_mag=EBV, ebv_max_mag=EBV)
SEED = 5


def catalog() -> QTable:
    """A cluster by itself, two that share a sky, and blank sky."""
    return QTable(
        {
            "id": ["alone", "left", "right", "blank"],
            "ra_deg": [150.0, 200.0, 200.015, 359.99],
            "dec_deg": [20.0, -35.0, -35.0, 0.5],
            "z": [0.25, 0.3, 0.35, 0.2],
            "log10_m500c_true": [14.9, 14.6, 14.8, np.nan],
            "richness_true": [70.0, 40.0, 55.0, np.nan],
        }
    )


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> tuple[Path, FrameIndex]:
    out = tmp_path_factory.mktemp("frames")
    return out, write_frames(catalog(), CONFIG, SEED, out, GRID, shape=SHAPE)


@pytest.fixture(scope="module")
def source(survey):
    with FrameSource(survey[0], GRID, survey[1]) as opened:
        yield opened


def row(name: str) -> dict:
    table = with_truth(catalog(), CONFIG)
    return dict(table[[str(value) for value in table["id"]].index(name)])


def content(out: Path, field: Field, band: str) -> bytes:
    return bz2.decompress((out / frame_path(field, band, ".fits.bz2")).read_bytes())


def all_files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# --- the sky ---


@pytest.mark.parametrize("name", ["alone", "blank"])
def test_frames_and_mock_source_show_the_same_sky(source, name):
    frames, mock = source.cutout(row(name)), MockSource(CONFIG, GRID, SEED).cutout(row(name))
    assert frames.coverage == 1.0
    assert frames.flags & ~Flag.SATURATED == Flag(0)
    assert frames.psf_fwhm_arcsec == pytest.approx(mock.psf_fwhm_arcsec, rel=1e-5)
    pull = (frames.flux - mock.flux) / np.hypot(frames.sigma, mock.sigma)
    for k in range(5):
        assert abs(np.median(pull[k])) < 0.12, BANDS[k]
        assert 1.4826 * np.median(np.abs(pull[k])) == pytest.approx(1.0, abs=0.1), BANDS[k]
        assert np.median(frames.sigma[k]) == pytest.approx(np.median(mock.sigma[k]), rel=0.06), BANDS[k]


@pytest.mark.parametrize("name", ["alone", "blank"])
def test_bright_sources_have_their_place_and_flux_in_every_band(survey, name):
    grid = GridConfig(width_arcsec=100.0, n_pixels=250)
    with FrameSource(survey[0], grid, survey[1]) as fine:
        cutout = fine.cutout(row(name))
    # Halos of bright stars reach in from outside.
    truth = galaxies(row(name), CONFIG, 500.0, SEED)
    flux = dimmed_flux(truth.mag, EBV)
    psf = cutout.psf_fwhm_arcsec.astype(float)
    drawn = render(truth, flux, psf, 250, 0.4, psf_components=CONFIG.physics.psf_components)
    rows, cols = np.indices(drawn.shape[1:])
    right, up = (cols - 124.5) * 0.4, (rows - 124.5) * 0.4
    inside = (np.abs(truth.x_arcsec) < 43) & (np.abs(truth.y_arcsec) < 43) & ~truth.is_diffuse
    for k in sorted(np.flatnonzero(inside), key=lambda k: truth.mag[k, 2])[:8]:
        aperture = np.hypot(right - truth.x_arcsec[k], up - truth.y_arcsec[k]) < 4.0
        for band in range(5):
            found, expected = cutout.flux[band][aperture], drawn[band][aperture]
            # Noise of neighbouring pixels is correlated on a grid as fine as the frames': see ``grid.resample``.
            error = 1.6 * np.sqrt((cutout.sigma[band][aperture] ** 2).sum())
            assert abs(found.sum() - expected.sum()) < 3.5 * error + 0.01 * expected.sum(), (k, BANDS[band])
            if expected.sum() > 100.0 * error:
                for axis in (right[aperture], up[aperture]):
                    shift = (found * axis).sum() / found.sum() - (expected * axis).sum() / expected.sum()
                    assert abs(shift) < 0.08, (k, BANDS[band])


def test_clusters_that_share_frames_share_a_sky(source):
    """The right cluster's members shine in the left one's cutout, where the mock's own picture lacks them."""
    left, right = row("left"), row("right")
    cutout, alone = source.cutout(left), MockSource(CONFIG, GRID, SEED).cutout(left)
    members = galaxies(right, CONFIG, 400.0, SEED)
    members = members[members.is_member & (members.mag[:, 3] < 20.0)]
    east = (right["ra_deg"] - left["ra_deg"]) * np.cos(np.radians(-35.0)) * 3600.0
    col, line = (members.x_arcsec - east) / 2.5 + 19.5, members.y_arcsec / 2.5 + 19.5
    seen = np.flatnonzero((np.abs(col - 19.5) < 17) & (np.abs(line - 19.5) < 17))
    assert len(seen) >= 3
    added = cutout.flux[3] - alone.flux[3]
    for k in seen:
        patch = np.s_[round(line[k]) - 1 : round(line[k]) + 2, round(col[k]) - 1 : round(col[k]) + 2]
        assert added[patch].sum() > 0.6 * dimmed_flux(members.mag[k : k + 1], EBV)[0, 3]


# --- the frames ---


def test_fields_of_a_run_overlap_by_identical_rows(survey):
    out, index = survey
    pairs = 0
    for field in index.fields:
        after = field._replace(field=field.field + 1)
        if after not in index.fields:
            continue
        pairs += 1
        first, second = (parse_frame(content(out, one, "g"), one, "g") for one in (field, after))
        assert np.array_equal(first.flux[-OVERLAP_ROWS:], second.flux[:OVERLAP_ROWS])
        # The two WCS agree there too, to a twentieth of a pixel.
        place = first.wcs.pixel_to_world_values(50.0, SHAPE[0] - 20.0)
        assert second.wcs.world_to_pixel_values(*place) == pytest.approx((50.0, OVERLAP_ROWS - 20.0), abs=0.05)
    assert pairs >= 2


def test_noise_is_what_calibration_gain_and_dark_variance_say(survey):
    out, index = survey
    blank = index.covering(359.99, 0.5, 60.0)
    for k, band in enumerate(BANDS):
        field = blank[band][0]
        table = fits.getdata(out / f"dr12/boss/photoObj/301/{field.run}/photoField-{field.run:06d}-{field.camcol}.fits")
        facts = table[table["FIELD"] == field.field][0]
        with fits.open(io.BytesIO(content(out, field, band))) as hdus:
            flux, calib, sky = hdus[0].data, hdus[1].data, hdus[2].data["ALLSKY"].mean()
        variance = calib**2 * ((flux / calib + sky) / facts["GAIN"][k] + facts["DARK_VARIANCE"][k])
        # Differences of neighbours do not see the sources.
        step = np.diff(flux, axis=1)
        scatter = step[np.abs(step) < 6 * np.sqrt(np.median(variance))].std() / np.sqrt(2)
        assert scatter == pytest.approx(np.sqrt(np.median(variance)), rel=0.02), band
        physics = CONFIG.physics
        assert 0.97 * physics.pixel_sigma_min_nmgy[k] < scatter < 1.03 * physics.pixel_sigma_max_nmgy[k], band
        assert facts["SKY"][k] == pytest.approx(sky * calib.mean() / 0.396**2, rel=1e-3)


def test_files_are_those_of_the_archive(survey):
    out, index = survey
    found = FrameIndex.from_base(out)
    assert found.fields == index.fields
    for name in index.table.colnames:
        ours, theirs = np.asarray(index.table[name]), np.asarray(found.table[name])
        assert np.array_equal(ours, theirs) if ours.dtype.kind == "U" else np.allclose(ours, theirs, rtol=1e-12), name
    field = index.fields[0]
    with fits.open(io.BytesIO(content(out, field, "i"))) as hdus:
        assert [hdu.data.shape for hdu in hdus[:2]] == [SHAPE, (SHAPE[1],)]
        assert hdus[2].data["ALLSKY"].shape == (1, 43, 53) and hdus[2].data["YINTERP"].shape == (1, SHAPE[0])
        header, astrometry = hdus[0].header, hdus[3].data[0]
        assert (header["RUN"], header["CAMCOL"], header["FILTER"]) == (field.run, field.camcol, "i")
        assert (astrometry["FIELD"], astrometry["FILTER"], astrometry["RERUN"]) == (field.field, "i", "301")
        # Great-circle coordinates of a pixel, by the formulas of Stoughton et al. 2002, lie where the WCS says.
        col, line = 30.0, 250.0
        mu = np.radians(astrometry["A"] + astrometry["B"] * line + astrometry["C"] * col - astrometry["NODE"])
        nu = np.radians(astrometry["D"] + astrometry["E"] * line + astrometry["F"] * col)
        incl = np.radians(astrometry["INCL"])
        up = np.sin(mu) * np.cos(nu) * np.cos(incl) - np.sin(nu) * np.sin(incl)
        ra = astrometry["NODE"] + np.degrees(np.arctan2(up, np.cos(mu) * np.cos(nu)))
        dec = np.degrees(np.arcsin(np.sin(mu) * np.cos(nu) * np.sin(incl) + np.sin(nu) * np.cos(incl)))
        expected = parse_frame(content(out, field, "i"), field, "i").wcs.pixel_to_world_values(col, line)
        assert (ra % 360.0, dec) == pytest.approx(tuple(map(float, expected)), abs=0.1 / 3600)
    listed = read_window_flist(out / "dr12/boss/resolve/2013-07-29/window_flist.fits")
    assert listed.fields == index.fields
    # Bands lie up to 14 pixels apart.
    rows = index.table[[Field(r["run"], r["camcol"], r["field"]) == field for r in index.table]]
    centres = np.stack([rows["crval1"] * np.cos(np.radians(rows["crval2"])), rows["crval2"]], 1) * 3600.0 / 0.396
    apart = np.hypot(*(centres[:, None] - centres[None]).reshape(-1, 2).T)
    assert 1.0 < apart.max() <= 2 * BAND_OFFSET_PX * np.sqrt(2) + 0.1


def test_wide_cutouts_are_covered_by_several_camera_columns(tmp_path):
    grid = GridConfig(width_arcsec=200.0, n_pixels=60)
    one = catalog()[:1]
    index = write_frames(one, MockConfig(depth_r_mag=18.0, background_r_mag=23.0), SEED, tmp_path, grid, shape=SHAPE)
    assert len({field.camcol for field in index.fields}) >= 2
    with FrameSource(tmp_path, grid, index) as source:
        cutout = source.cutout(dict(one[0]))
    assert cutout.coverage == 1.0 and Flag.PARTLY_OUTSIDE not in cutout.flags


# --- writing ---


class _InAnyOrder:
    """Workers that hand over copies and begin with the last task."""

    def map(self, function, shared, tasks):
        for task in reversed(tasks):
            yield from list(function(deepcopy(shared), deepcopy(task)))


def test_same_seed_same_bytes_whoever_draws_and_after_a_kill(survey, tmp_path):
    first = all_files(survey[0])
    calls = []
    write_frames(
        catalog(), CONFIG, SEED, tmp_path, GRID, shape=SHAPE, workers=_InAnyOrder(), progress=lambda *n: calls.append(n)
    )
    assert all_files(tmp_path) == first
    assert calls[-1][0] == calls[-1][1] == len(survey[1])
    # Killed half-way: some frames are missing, one is half written.
    frames = sorted((tmp_path / "dr12").rglob("frame-*"))
    for path in frames[::7]:
        path.rename(path.with_name(f".{path.name}.part"))
    kept = {path: path.stat().st_mtime_ns for path in frames if path.exists()}
    write_frames(catalog(), CONFIG, SEED, tmp_path, GRID, shape=SHAPE)
    assert {name: data for name, data in all_files(tmp_path).items() if ".part" not in name} == first
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


def test_another_survey_does_not_mix_with_the_one_in_the_folder(survey):
    with pytest.raises(Pix2massError, match="another catalogue, seed or configuration"):
        write_frames(catalog(), CONFIG, SEED + 1, survey[0], GRID, shape=SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (200, 400)}, "at least 256 rows"),
        ({"catalog": catalog()[[0, 0]]}, "all different"),
        ({"catalog": catalog()[:0]}, "one or more clusters"),
    ],
)
def test_mistakes_are_explained(change, message, tmp_path):
    arguments = {"catalog": catalog(), "shape": SHAPE, **change}
    with pytest.raises(Pix2massError, match=message):
        write_frames(arguments["catalog"], CONFIG, SEED, tmp_path, GRID, shape=arguments["shape"])


def test_truth_of_a_real_catalogue():
    """Mass from the label, else from richness by the mock's mean relation; richness as published."""
    table = QTable(
        {"id": list("abc"), "z": [0.2] * 3, "log10_m500c": [14.5, np.nan, np.nan], "richness": [33.3, 70.0, np.nan]}
    )
    truth = with_truth(table, CONFIG)
    mass = np.asarray(truth["log10_m500c_true"])
    assert mass[0] == 14.5 and np.isnan(mass[2])
    assert mean_richness(mass[1], CONFIG.physics) == pytest.approx(70.0, rel=1e-3)
    assert list(truth["richness_true"][:2]) == [33.0, 70.0] and np.ma.is_masked(truth["richness_true"][2])
    assert list(table.colnames) == ["id", "z", "log10_m500c", "richness"]
    # What a mock catalogue says already is not changed.
    again = with_truth(
        QTable({"log10_m500c_true": [14.0], "richness_true": [9.0], "log10_m500c": [14.4], "richness": [3.0]}), CONFIG
    )
    assert (again["log10_m500c_true"][0], again["richness_true"][0]) == (14.0, 9.0)
