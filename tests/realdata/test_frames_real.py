"""Cutouts rebuilt from real SDSS frames, held against the survey's own photometry of the same stars.

Stars are those of photoObj 94-1-0012 with a 4.63" aperture flux (APERFLUX) that are bright and have no neighbour that
could matter. Each star gets its own cutout, centred on it, 73" wide. A constant local background is subtracted.
"""

from __future__ import annotations

import bz2
import functools
import io
import threading
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs.utils import pixel_to_pixel

from pix2mass.config import GridConfig
from pix2mass.images.archive import Field
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.images.grid import local_affine, source_window, tan_wcs, target_wcs
from pix2mass.types import BANDS, Flag

CLUSTER = {"id": "RMJ222655.7-005503.6", "ra_deg": 336.73222, "dec_deg": -0.91766, "z": 0.245}
APERTURE_ARCSEC = 4.63
APERFLUX_INDEX = 5  # radii 0.23, 0.68, 1.03, 1.76, 3.00, 4.63, ... arcsec (Stoughton et al. 2002, AJ 123, 485)
DEFAULT_SCALE_ARCSEC = 8.112353
WIDTH_ARCSEC = 9 * DEFAULT_SCALE_ARCSEC


@pytest.fixture(scope="module")
def base(real_data: Path) -> Path:
    return real_data / "sas"


@pytest.fixture(scope="module")
def index(base) -> FrameIndex:
    return FrameIndex.from_base(base)


@pytest.fixture(scope="module")
def open_source(base, index):
    """Opens sources that share the frames in memory: unpacking them again for each grid would take the time."""
    shared = []

    def start(grid: GridConfig) -> FrameSource:
        source = FrameSource(base, grid, index)
        if shared:
            source._queue.frames = shared[0]
        shared.append(source._queue.frames)
        return source

    return start


@pytest.fixture(scope="module")
def photo(base):
    return fits.getdata(base / "dr12/boss/photoObj/301/94/1/photoObj-000094-1-0012.fits")


@pytest.fixture(scope="module")
def stars(photo):
    """Rows of bright, unsaturated, isolated stars at least 45" from the frame's edge."""
    kept = photo[photo["MODE"] <= 2]
    star = (kept["OBJC_TYPE"] == 6) & (kept["NCHILD"] == 0)
    star &= (kept["PSFMAG"][:, 2] > 14.5) & (kept["PSFMAG"][:, 2] < 18.0)
    star &= ~((kept["FLAGS"] >> 18) & 1).astype(bool).any(axis=1)  # bit 18: SATUR
    x, y = kept["COLC"][:, 2], kept["ROWC"][:, 2]
    star &= (x > 115) & (x < 2048 - 115) & (y > 115) & (y < 1489 - 115)
    for i in np.flatnonzero(star):
        distance = np.hypot(x - x[i], y - y[i]) * 0.396
        near = (distance > 1.0) & (distance < 22.0)
        star[i] = not (near & (kept["PSFMAG"][:, 2] < kept["PSFMAG"][i, 2] + 3.0)).any()
    return kept[star]


@pytest.fixture(scope="module")
def star_cutouts(open_source, stars):
    """By pixel scale in arcsec: one cutout for each star, centred on it."""
    cutouts = {}
    for n_pixels in (9, 92, 184):
        grid = GridConfig(width_arcsec=WIDTH_ARCSEC, n_pixels=max(n_pixels, 8))
        with open_source(grid) as source:
            cutouts[n_pixels] = [source.cutout({"id": s["ID"], "ra_deg": s["RA"], "dec_deg": s["DEC"]}) for s in stars]
    return cutouts


def radius_arcsec(n_pixels: int, sub: int = 8) -> np.ndarray:
    """Distance from the centre of the grid, at sub x sub points in each pixel."""
    at = ((np.arange(n_pixels * sub) + 0.5) / sub - n_pixels / 2) * WIDTH_ARCSEC / n_pixels
    return np.hypot(at, at[:, None])


def share_within(n_pixels: int, inner: float, outer: float) -> np.ndarray:
    inside = radius_arcsec(n_pixels)
    inside = (inside >= inner) & (inside < outer)
    return inside.reshape(n_pixels, 8, n_pixels, 8).mean(axis=(1, 3))


def aperture_fluxes(cutouts, n_pixels: int) -> np.ndarray:
    """(stars, bands) flux within 4.63" above the median of the ring 12" to 25"."""
    aperture, ring = share_within(n_pixels, 0.0, APERTURE_ARCSEC), share_within(n_pixels, 12.0, 25.0) > 0.99
    return np.array([[(f * aperture).sum() - np.median(f[ring]) * aperture.sum() for f in c.flux] for c in cutouts])


def box_fluxes(cutouts, n_pixels: int) -> np.ndarray:
    """(stars, bands) flux in the middle ninth of the width squared, 24", above the median of the outer pixels."""
    at = (np.arange(n_pixels) + 0.5) / n_pixels * 9
    edges = np.arange(n_pixels * 8 + 0.0) + 0.5
    inside = (edges / (n_pixels * 8) * 9 >= 3) & (edges / (n_pixels * 8) * 9 < 6)
    box = (inside & inside[:, None]).reshape(n_pixels, 8, n_pixels, 8).mean(axis=(1, 3))
    middle = (at > 2) & (at < 7)
    outer = ~(middle & middle[:, None])
    return np.array([[(f * box).sum() - np.median(f[outer]) * box.sum() for f in c.flux] for c in cutouts])


def in_frame(stars, band: str) -> np.ndarray:
    return stars["APERFLUX"][:, BANDS.index(band), APERFLUX_INDEX]


@pytest.mark.parametrize("n_pixels", [184, 92])
def test_star_apertures_agree_with_photo_obj(star_cutouts, stars, n_pixels):
    # 0.396" and 0.793" per pixel.
    assert len(stars) >= 12
    ratio = aperture_fluxes(star_cutouts[n_pixels], n_pixels) / stars["APERFLUX"][:, :, APERFLUX_INDEX]
    bright = stars["PSFMAG"] < 19.0
    medians = [float(np.median(ratio[bright[:, k], k])) for k in range(5)]
    print(f"{WIDTH_ARCSEC / n_pixels:.3f} arcsec:", len(stars), bright.sum(axis=0), np.round(medians, 4))
    assert medians == pytest.approx([1.0] * 5, abs=0.03)


def test_star_boxes_on_the_default_grid_agree_with_photo_obj(star_cutouts, stars):
    # A 4.63" aperture is smaller than a pixel here. The flux in 3 x 3 pixels (24") about each star, corrected to the
    # aperture by the median growth of all stars measured at 0.396", stands in its place.
    growth = box_fluxes(star_cutouts[184], 184) / aperture_fluxes(star_cutouts[184], 184)
    boxes = box_fluxes(star_cutouts[9], 9)
    medians = []
    for k in range(5):
        bright = stars["PSFMAG"][:, k] < 17.5 + (k == 0)
        ratio = boxes[bright, k] / np.median(growth[bright, k]) / stars["APERFLUX"][bright, k, APERFLUX_INDEX]
        medians.append(float(np.median(ratio)))
    print("8.11 arcsec:", np.round(medians, 4), "growth", np.round(np.median(growth, axis=0), 4))
    assert medians == pytest.approx([1.0] * 5, abs=0.03)


def test_boxes_on_the_default_grid_hold_the_light_of_the_frame(base, star_cutouts, stars):
    # The same sky area, summed in the frame itself with the exact WCS and 4 x 4 points in each of its pixels.
    for k, band in enumerate(BANDS):
        path = base / f"dr12/boss/photoObj/frames/301/94/1/frame-{band}-000094-1-0012.fits.bz2"
        with warnings.catch_warnings(), fits.open(io.BytesIO(bz2.decompress(path.read_bytes()))) as hdus:
            warnings.simplefilter("ignore")
            header, flux = hdus[0].header, hdus[0].data.astype(float)
        wcs = tan_wcs(
            (header["CRVAL1"], header["CRVAL2"]),
            (header["CRPIX1"], header["CRPIX2"]),
            ((header["CD1_1"], header["CD1_2"]), (header["CD2_1"], header["CD2_2"])),
        )
        for star, cutout in list(zip(stars, star_cutouts[9], strict=True))[:4]:
            target = target_wcs(star["RA"], star["DEC"], DEFAULT_SCALE_ARCSEC, 9)
            x0, y0 = (int(v) for v in wcs.world_to_pixel_values(star["RA"], star["DEC"]))
            sub = (np.arange(100 * 4) + 0.5) / 4 - 0.5
            x, y = np.meshgrid(x0 - 50 + sub, y0 - 50 + sub)
            tx, ty = target.world_to_pixel_values(*wcs.pixel_to_world_values(x, y))
            inside = (np.abs(tx - 4) < 1.5) & (np.abs(ty - 4) < 1.5)
            share = inside.reshape(100, 4, 100, 4).mean(axis=(1, 3))
            expected = (flux[y0 - 50 : y0 + 50, x0 - 50 : x0 + 50] * share).sum()
            noise = float(cutout.sigma[k, 3:6, 3:6].mean())
            assert cutout.flux[k, 3:6, 3:6].sum() == pytest.approx(expected, rel=0.002, abs=0.3 * noise)


def test_bands_are_aligned(star_cutouts):
    n_pixels = 184
    at = np.arange(n_pixels) - (n_pixels - 1) / 2
    weight = np.exp(-0.5 * (at**2 + at[:, None] ** 2) / 4.0**2)
    offsets = []
    for cutout in star_cutouts[n_pixels]:
        ring = share_within(n_pixels, 12.0, 25.0) > 0.99
        # A Gaussian window halves, roughly, the shift it measures: never more than the shift itself.
        light = np.array([(f - np.median(f[ring])) * weight for f in cutout.flux])
        offsets.append(np.stack([(light * at).sum((1, 2)), (light * at[:, None]).sum((1, 2))]) / light.sum((1, 2)))
    offsets = np.array(offsets)
    relative = offsets - offsets[:, :, 2:3]
    shift = np.hypot(*np.median(relative, axis=0))
    print(
        "shift from r (native px):", np.round(shift, 3), "from the catalogue:", np.round(np.median(offsets, axis=0), 3)
    )
    assert (shift < 0.3).all()
    assert (np.abs(np.median(offsets, axis=0)) < 0.3).all()


def test_sigma_is_the_scatter_of_blank_sky(open_source, photo):
    n_pixels, width = 300, 300 * 0.396
    grid = GridConfig(width_arcsec=width, n_pixels=n_pixels)
    centre = {"id": "blank", "ra_deg": 336.62, "dec_deg": -0.93}
    with open_source(grid) as source:
        cutout = source.cutout(centre)
    wcs = target_wcs(centre["ra_deg"], centre["dec_deg"], width / n_pixels, n_pixels)
    x, y = wcs.world_to_pixel_values(photo["RA"], photo["DEC"])
    near = (np.abs(x - n_pixels / 2) < n_pixels / 2 + 50) & (np.abs(y - n_pixels / 2) < n_pixels / 2 + 50)
    rows, cols = np.indices((n_pixels, n_pixels))
    blank = np.ones((n_pixels, n_pixels), bool)
    for x0, y0, mag in zip(x[near], y[near], photo["PSFMAG"][near, 2], strict=True):
        radius_px = 15.0 + 6.0 * max(0.0, 22.0 - mag)
        blank &= np.hypot(cols - x0, rows - y0) > radius_px
    assert blank.mean() > 0.15
    values = (cutout.flux / cutout.sigma)[:, blank]
    scatter = 1.4826 * np.median(np.abs(values - np.median(values, axis=1)[:, None]), axis=1)
    print("scatter / sigma:", np.round(scatter, 3), f"blank share {blank.mean():.2f}")
    assert scatter == pytest.approx(np.ones(5), abs=0.1)


def test_the_cluster_is_partly_outside_and_http_equals_the_folder(base, index, open_source):
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(base.parent)))
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with open_source(GridConfig()) as source:
            local = source.cutout(CLUSTER)
        url = f"http://127.0.0.1:{server.server_port}/sas"
        listed = FrameIndex.from_base(url)
        with FrameSource(url, GridConfig(), listed) as source:
            remote = source.cutout(CLUSTER)
    finally:
        server.shutdown()
        server.server_close()
    assert listed.covering(336.7, -0.93, 300.0) == index.covering(336.7, -0.93, 300.0)
    assert Flag.PARTLY_OUTSIDE in local.flags and Flag.SIGMA_APPROXIMATE not in local.flags
    assert Flag.MISSING_BAND not in local.flags and Flag.UNREADABLE not in local.flags
    assert local.pixel_scale_arcsec == pytest.approx(DEFAULT_SCALE_ARCSEC, rel=1e-5)
    assert 0.5 < local.coverage < 0.7
    assert local.flags == remote.flags
    for name in ("flux", "sigma", "mask", "psf_fwhm_arcsec"):
        assert np.array_equal(getattr(local, name), getattr(remote, name))


def test_psf_of_photo_field_is_that_of_ps_field(base, index):
    with FrameSource(base, GridConfig(), index) as source:
        field = Field(94, 1, 12)
        assert source._field_noise(field).psf_fwhm_arcsec == pytest.approx(source._ps_field(field))


def test_index_holds_six_fields_whose_bands_differ(index):
    assert len(index.fields) == 6 and len(index) == 30
    positions = random_positions(index, 3, seed=1, margin_arcsec=60.0)
    for row in positions:
        covering = index.covering(row["ra_deg"], row["dec_deg"], 60.0)
        assert {str(field) for fields in covering.values() for field in fields} == {row["group"]}
        assert "".join(covering) == BANDS


def test_affine_over_default_cutouts_of_every_frame(index):
    # Against the exact WCS at random places of the part of the frame that a cutout in a corner of the field needs.
    rng = np.random.default_rng(1)
    errors = []
    for row in index.table:
        wcs = tan_wcs(
            (row["crval1"], row["crval2"]),
            (row["crpix1"], row["crpix2"]),
            ((row["cd1_1"], row["cd1_2"]), (row["cd2_1"], row["cd2_2"])),
        )
        ra_deg, dec_deg = wcs.pixel_to_world_values(200.0, 200.0)
        target = target_wcs(float(ra_deg), float(dec_deg), DEFAULT_SCALE_ARCSEC, 64)
        rows, cols = source_window(wcs, target, 64, (1489, 2048))
        affine = local_affine(wcs, target, (rows.start, rows.stop, cols.start, cols.stop))
        x, y = rng.uniform(cols.start, cols.stop, 500), rng.uniform(rows.start, rows.stop, 500)
        exact = np.array(pixel_to_pixel(wcs, target, x, y))
        error = np.linalg.solve(affine.matrix, affine.matrix @ (x, y) + affine.offset[:, None] - exact)
        errors.append(np.hypot(*error).max())
    print("affine, largest error in frame pixels:", np.round(max(errors), 5))
    assert max(errors) < 0.05
