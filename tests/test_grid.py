"""Regridding: flux, variance, positions and coverage, against the exact WCS and against reproject."""

from __future__ import annotations

import math

import numpy as np
import pytest
from _frames import frame_wcs, gaussian
from astropy.table import QTable
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel
from hypothesis import given, settings
from hypothesis import strategies as st
from reproject import reproject_exact
from scipy.ndimage import gaussian_filter

import pix2mass.images.overlap as overlap_module
from pix2mass.config import GridConfig
from pix2mass.images.grid import (
    MAX_POSITION_ERROR_PX,
    local_affine,
    pixel_scale_arcsec,
    read_position,
    resample,
    source_window,
    target_wcs,
    to_pixels,
)
from pix2mass.types import Pix2massError

RA, DEC = 150.0, 32.0
SHAPE = (120, 140)
NATIVE = 0.396


def test_scale_of_a_physical_and_of_an_angular_grid():
    # 2 Mpc at z = 0.245 is 8.65' in the project's cosmology (3.852 kpc per arcsec).
    assert pixel_scale_arcsec(GridConfig(), 0.245) == pytest.approx(2000 / 3.852 / 64, rel=1e-3)
    assert pixel_scale_arcsec(GridConfig(width_arcsec=64.0), math.nan) == 1.0


@pytest.mark.parametrize("z", [math.nan, -0.1, 0.0, math.inf])
def test_unusable_redshift_is_refused(z):
    with pytest.raises(Pix2massError, match="redshift above 0"):
        pixel_scale_arcsec(GridConfig(), z)


def test_redshift_so_small_that_the_cutout_would_span_the_sky_is_refused():
    assert pixel_scale_arcsec(GridConfig(), 0.001) == pytest.approx(2000 / 0.0207 / 64, rel=1e-2)
    with pytest.raises(Pix2massError, match="2000 kpc span at most 90 degrees, got 1e-05"):
        pixel_scale_arcsec(GridConfig(), 1e-5)


def test_position_from_dict_and_row_and_what_is_refused():
    table = QTable({"id": ["a"], "ra_deg": [10.0], "dec_deg": [-1.0], "z": [0.2]})
    assert read_position(table[0]) == ("a", 10.0, -1.0, 0.2)
    assert math.isnan(read_position({"ra_deg": 370 - 360, "dec_deg": 0}).z)
    table["ra_deg"].unit = "deg"
    assert read_position(QTable(table)[0]).ra_deg == 10.0
    for bad in ({"ra_deg": math.nan, "dec_deg": 0.0}, {"ra_deg": 1.0, "dec_deg": 91.0}, {"dec_deg": 0.0}):
        with pytest.raises(Pix2massError, match="ra_deg"):
            read_position(bad)
    with pytest.raises(Pix2massError, match="expected a number in z"):
        read_position({"ra_deg": 1.0, "dec_deg": 1.0, "z": "high"})


def test_north_is_up_and_east_left():
    wcs = target_wcs(RA, DEC, 1.0, 65)
    assert np.allclose(wcs.world_to_pixel_values(RA, DEC), 32.0)
    x, y = wcs.world_to_pixel_values([RA + 0.003, RA], [DEC, DEC + 0.003])
    assert x[0] < 31.0 and y[1] > 33.0


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.floats(0.5, 20.0),
    angle=st.floats(0.0, 360.0),
    x=st.floats(-20.0, 20.0),
    y=st.floats(-20.0, 20.0),
    sigma_px=st.floats(0.7, 4.0),
    dec=st.floats(-80.0, 80.0),
)
def test_flux_is_conserved_and_stays_in_place(ratio, angle, x, y, sigma_px, dec):
    source_wcs = frame_wcs(RA, dec, SHAPE, angle)
    ra_deg, dec_deg = source_wcs.pixel_to_world_values(SHAPE[1] / 2 + x, SHAPE[0] / 2 + y)
    flux = gaussian(SHAPE, source_wcs, ra_deg, dec_deg, 100.0, sigma_px)
    n_pixels = math.ceil(200 / ratio)
    wcs = target_wcs(RA, dec, NATIVE * ratio, n_pixels)
    out, _, coverage = resample(flux, np.ones_like(flux), None, source_wcs, wcs, n_pixels)
    rows, cols = np.indices(out.shape)
    # The sub-pixel tables do not conserve the flux of sharp sources exactly; 0.5% is what is promised.
    assert (out * coverage).sum(dtype=float) == pytest.approx(flux.sum(), rel=5e-3)
    if ratio < 1.2 * sigma_px:  # on coarser grids the pixels are too few for a centroid
        tx, ty = wcs.world_to_pixel_values(ra_deg, dec_deg)
        found = out * coverage
        assert (found * cols).sum() / found.sum() == pytest.approx(float(tx), abs=0.05 / ratio)
        assert (found * rows).sum() / found.sum() == pytest.approx(float(ty), abs=0.05 / ratio)


@pytest.mark.parametrize("angle", [0.0, 17.0, 45.0, 90.0])
@pytest.mark.parametrize("scale", [0.3, 0.396, 0.792, 3.0])
def test_agrees_with_reproject_exact(angle, scale):
    source_wcs = frame_wcs(RA, DEC, SHAPE, angle)
    flux = gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 1.5)
    n_pixels = int(24 / scale)
    wcs = target_wcs(RA, DEC, scale, n_pixels)
    out, _, coverage = resample(flux, np.ones(SHAPE), None, source_wcs, wcs, n_pixels)
    exact = reproject_exact((flux, source_wcs), wcs, (n_pixels, n_pixels), return_footprint=False)
    exact = exact * (scale / NATIVE) ** 2
    assert (coverage == 1.0).all()
    assert np.std(out - exact) < 0.005 * np.std(exact)


@pytest.mark.parametrize("scale", [0.198, 0.396, 1.0])
def test_star_fluxes_in_apertures_agree_with_reproject_exact(scale):
    source_wcs = frame_wcs(RA, DEC, SHAPE, 33.0)
    flux = gaussian(SHAPE, source_wcs, RA + 0.001, DEC - 0.0005, 50.0, 1.5)
    n_pixels = int(24 / scale)
    wcs = target_wcs(RA, DEC, scale, n_pixels)
    out = resample(flux, np.ones(SHAPE), None, source_wcs, wcs, n_pixels)[0]
    exact = reproject_exact((flux, source_wcs), wcs, (n_pixels, n_pixels), return_footprint=False)
    exact = exact * (scale / NATIVE) ** 2
    x, y = wcs.world_to_pixel_values(RA + 0.001, DEC - 0.0005)
    rows, cols = np.indices(out.shape)
    for radius_arcsec in (1.0, 2.0, 4.63):
        aperture = np.hypot(cols - x, rows - y) * scale < radius_arcsec
        assert out[aperture].sum() == pytest.approx(exact[aperture].sum(), rel=0.005)


@pytest.mark.parametrize("scale,angle", [(0.3, 10.0), (0.396, 30.0), (0.792, 90.0), (2.5, 45.0)])
def test_variance_is_that_of_the_noise(scale, angle):
    rng = np.random.default_rng(2)
    source_wcs = frame_wcs(RA, DEC, SHAPE, angle)
    sigma = rng.uniform(0.5, 2.0, SHAPE)
    n_pixels = int(16 / scale)
    wcs = target_wcs(RA, DEC, scale, n_pixels)
    draws = np.stack(
        [resample(rng.normal(0.0, sigma), sigma**2, None, source_wcs, wcs, n_pixels)[0] for _ in range(80)]
    )
    variance = resample(sigma, sigma**2, None, source_wcs, wcs, n_pixels)[1]
    ratio = (draws**2).mean(axis=0) / variance
    assert np.mean(ratio) == pytest.approx(1.0, abs=0.05)
    assert np.median(ratio) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("scale", [0.396, 0.792, 2.376])
def test_correlation_of_neighbours_as_documented(scale):
    rng = np.random.default_rng(3)
    s = NATIVE / scale
    measured, inflation = [], []
    n_pixels = int(40 / scale)
    for _ in range(40):
        # Random turns and offsets: the formula is the mean over unrelated grids along either axis.
        source_wcs = frame_wcs(RA + rng.uniform(-1, 1) * 2e-4, DEC + rng.uniform(-1, 1) * 2e-4, SHAPE, 0.0)
        wcs = target_wcs(RA, DEC, scale, n_pixels)
        out, variance, _ = resample(rng.normal(size=SHAPE), np.ones(SHAPE), None, source_wcs, wcs, n_pixels)
        measured.append((out[:, 1:] * out[:, :-1]).mean() / (out**2).mean())
        inflation.append(n_pixels**2 * scale**2 / NATIVE**2 / variance.sum())
    assert np.mean(measured) == pytest.approx((s / 6) / (1 - s / 3), abs=0.03)
    assert np.mean(inflation) == pytest.approx((1 - s / 3) ** -2, rel=0.1)


@pytest.mark.parametrize("angle", [0.0, 30.0, 45.0, 90.0])
@pytest.mark.parametrize("scale", [0.2, 0.396, 1.3, 8.0])
def test_a_flat_image_stays_flat(angle, scale):
    source_wcs = frame_wcs(RA, DEC, (300, 300), angle)
    n_pixels = int(48 / scale)
    flux = resample(
        np.ones((300, 300)),
        np.ones((300, 300)),
        None,
        source_wcs,
        target_wcs(RA, DEC, scale, n_pixels),
        n_pixels,
    )[0]
    assert np.abs(flux / (scale / NATIVE) ** 2 - 1.0).max() < (1e-4 if angle in (0.0, 90.0) else 0.008)


@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_mirrored_and_stretched_images_agree_with_reproject_exact(scale):
    source_wcs = frame_wcs(RA, DEC, SHAPE, 25.0)
    source_wcs.wcs.cd = source_wcs.wcs.cd @ np.array([[-1.0, 0.1], [0.0, 1.3]])
    flux = gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 1.5)
    n_pixels = int(24 / scale)
    wcs = target_wcs(RA, DEC, scale, n_pixels)
    out, _, coverage = resample(flux, np.ones(SHAPE), None, source_wcs, wcs, n_pixels)
    exact = reproject_exact((flux, source_wcs), wcs, (n_pixels, n_pixels), return_footprint=False)
    exact = exact * (scale / NATIVE) ** 2 / 1.3
    assert (coverage == 1.0).all()
    assert np.std(out - exact) < 0.005 * np.std(exact)


@pytest.mark.parametrize("scale", [60.0, 150.0, 600.0])
@pytest.mark.parametrize("angle", [0.0, 33.0])
def test_very_coarse_grids_conserve_flux_exactly_and_agree_with_reproject(scale, angle):
    shape = (500, 700)
    source_wcs = frame_wcs(RA, DEC, shape, angle)
    source_wcs.wcs.cd = source_wcs.wcs.cd @ np.diag([-1.0, 1.1])
    flux = np.random.default_rng(5).exponential(size=shape) ** 4  # sharp: most of the light is in few pixels
    n_pixels = math.ceil(420 / scale) + 2
    wcs = target_wcs(RA, DEC, scale, n_pixels)
    out, variance, coverage = resample(flux, np.ones(shape), None, source_wcs, wcs, n_pixels)
    assert (out * coverage).sum(dtype=float) == pytest.approx(flux.sum(), rel=1e-6)
    exact = reproject_exact((flux, source_wcs), wcs, (n_pixels, n_pixels), return_footprint=False)
    exact = exact * (scale / NATIVE) ** 2 / 1.1
    whole = coverage == 1.0
    assert whole.any() == (scale < 300.0)
    assert out[whole] == pytest.approx(exact[whole], rel=1e-4)
    assert variance[whole] == pytest.approx((scale / NATIVE) ** 2 / 1.1, rel=0.02)
    mask = np.zeros(shape, bool)
    mask[200:230, 300:340] = True
    less = resample(np.where(mask, np.nan, flux), np.ones(shape), mask, source_wcs, wcs, n_pixels)
    assert (less[0] * less[2]).sum(dtype=float) == pytest.approx(flux[~mask].sum(), rel=1e-6)
    assert (coverage - less[2]).sum() * (scale / NATIVE) ** 2 / 1.1 == pytest.approx(1200.0, rel=1e-3)


def test_with_and_without_a_table_of_overlaps_the_same_comes_out(monkeypatch):
    source_wcs = frame_wcs(RA, DEC, (300, 400), 20.0)
    flux = gaussian_filter(np.random.default_rng(1).normal(size=(300, 400)), 1.5) + 1.0
    wcs = target_wcs(RA, DEC, 15 * NATIVE, 32)
    mask = flux > 1.3
    table = resample(flux, np.ones(flux.shape), mask, source_wcs, wcs, 32)
    monkeypatch.setattr(overlap_module, "_TABLE_WIDTH_PX", 10)
    covered = table[2] > 0.3
    for one, other in zip(table, resample(flux, np.ones(flux.shape), mask, source_wcs, wcs, 32), strict=True):
        assert np.abs(one - other)[covered].max() < 2e-3 * one[covered].max()


def test_tables_of_overlaps_that_are_kept_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(overlap_module, "_KEPT_BYTES", 2 << 20)
    tables = [overlap_module.overlaps(np.eye(2) * scale) for scale in np.linspace(5.0, 9.0, 12)]
    kept = [one for one in tables if any(one is other for other in overlap_module._kept.values())]
    assert 1 < len(kept) < 12 and kept[-1] is tables[-1]
    assert sum(one.table.nbytes for one in overlap_module._kept.values()) <= 2 << 20
    assert overlap_module.overlaps(np.eye(2) * 9.0) is tables[-1]


def test_pixel_places_are_those_of_astropy():
    frame, grid = frame_wcs(RA, DEC, SHAPE, 25.0), target_wcs(RA + 0.01, DEC, 1.3, 32)
    galactic = WCS(naxis=2)
    galactic.wcs.ctype = ["GLON-CAR", "GLAT-CAR"]
    galactic.wcs.cdelt = [-0.001, 0.001]
    galactic.wcs.crval = frame.pixel_to_world(0, 0).galactic.l.deg, 0.0
    x, y = np.random.default_rng(2).uniform(-20.0, 150.0, (2, 30))
    for source, target in ((frame, grid), (grid, frame), (frame, galactic), (galactic, grid)):
        assert np.allclose(to_pixels(source, target, x, y), pixel_to_pixel(source, target, x, y), atol=1e-6)


def test_masked_pixels_leave_the_surface_brightness_and_lower_the_coverage():
    source_wcs = frame_wcs(RA, DEC, SHAPE, 0.0)
    wcs = target_wcs(RA, DEC, 4 * NATIVE, 20)
    flux, mask = np.full(SHAPE, 2.0), np.zeros(SHAPE, bool)
    mask[50:53, 60:63] = True
    flux[mask] = np.nan
    out, variance, coverage = resample(flux, np.ones(SHAPE), mask, source_wcs, wcs, 20)
    assert coverage.min() < 0.9 and coverage.max() == 1.0
    assert (1 - coverage).sum() == pytest.approx(9 / 16, rel=1e-3)
    usable = coverage > 0.3
    assert np.allclose(out[usable], 32.0, rtol=1e-3)
    assert (variance[usable & (coverage < 0.9)] > variance[coverage == 1.0].max()).all()


def test_coverage_at_an_edge_and_far_outside():
    source_wcs = frame_wcs(RA, DEC, SHAPE, 0.0)
    edge_ra, edge_dec = source_wcs.pixel_to_world_values(70.0, 119.5)
    wcs = target_wcs(edge_ra, edge_dec, 5 * NATIVE, 11)
    out, _, coverage = resample(np.ones(SHAPE), np.ones(SHAPE), None, source_wcs, wcs, 11)
    assert np.allclose(coverage[:5], 1.0) and np.allclose(coverage[6:], 0.0)
    assert np.allclose(coverage[5], 0.5, atol=0.02)
    assert np.allclose(out[5], 25.0, rtol=1e-3)
    for ra_deg, dec_deg in ((RA + 5.0, DEC), (RA + 180.0, -DEC), (RA, -80.0)):
        wcs = target_wcs(ra_deg, dec_deg, 1.0, 16)
        assert resample(np.ones(SHAPE), np.ones(SHAPE), None, source_wcs, wcs, 16)[2].max() == 0.0
        assert source_window(source_wcs, wcs, 16, SHAPE) is None


@pytest.mark.parametrize("dec", [0.0, 42.8, -84.0])
def test_affine_over_a_nine_arcmin_cutout(dec):
    # A frame whose tangent point is 6' from the cutout's centre, at 0.05 frame pixels of tolerance.
    shape = (1489, 2048)
    source_wcs = frame_wcs(RA, dec, shape, 40.0)
    wcs = target_wcs(RA + 0.05 / np.cos(np.radians(dec)), dec + 0.08, 8.1, 64)
    affine = local_affine(wcs, source_wcs, (0, 64, 0, 64))
    x, y = np.random.default_rng(4).uniform(-0.5, 63.5, (2, 2000))
    exact = np.array(pixel_to_pixel(wcs, source_wcs, x, y))
    error_px = np.hypot(*(affine.matrix @ (x, y) + affine.offset[:, None] - exact))
    assert error_px.max() < 0.05
    assert error_px.max() < max(1.2 * affine.error_px, 1e-3)


def test_a_wide_or_distorted_image_is_halved_until_affine():
    # Four degrees on a side: one affine is off by 0.07 pixels, the halves together are not.
    source_wcs = frame_wcs(RA, 60.0, (400, 400), 0.0)
    source_wcs.wcs.cd *= 90.0
    wcs = target_wcs(RA + 2.0, 60.7, 80.0, 100)
    whole = local_affine(wcs, source_wcs, (0, 100, 0, 100))
    assert whole.error_px > 3 * MAX_POSITION_ERROR_PX
    ra_deg, dec_deg = wcs.pixel_to_world_values(80.0, 20.0)
    flux = gaussian((400, 400), source_wcs, ra_deg, dec_deg, 1.0, 2.0)
    out = resample(flux, np.ones_like(flux), None, source_wcs, wcs, 100)[0]
    rows, cols = np.indices(out.shape)
    assert out.sum() == pytest.approx(1.0, rel=1e-4)
    assert (out * cols).sum() / out.sum() == pytest.approx(80.0, abs=0.03)
    assert (out * rows).sum() / out.sum() == pytest.approx(20.0, abs=0.03)
