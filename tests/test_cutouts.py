"""Cutouts from a user's own FITS files."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from _frames import frame_wcs, gaussian
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

from pix2mass.catalog import check_catalog
from pix2mass.config import BuildConfig, GridConfig
from pix2mass.distribute import InProcess
from pix2mass.images.cutouts import CutoutSource, write_cutout
from pix2mass.pipeline import build_store
from pix2mass.types import Cutout, Flag, Pix2massError

RA, DEC = 80.0, -45.0
SHAPE = (150, 150)
GRID = GridConfig(bands="gr", width_arcsec=32.0, n_pixels=40)
CLUSTER = {"id": "A-1", "ra_deg": RA, "dec_deg": DEC, "z": 0.2}
NOISE = 0.05


def image(seed: int = 0, wcs: WCS | None = None) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return gaussian(SHAPE, wcs or frame_wcs(RA, DEC, SHAPE, 25.0), RA, DEC, 100.0, 2.0) + rng.normal(0, NOISE, SHAPE)


def write(path: Path, data: np.ndarray | None = None, wcs: WCS | None = None, unit: str | None = None, **extensions):
    header = (wcs or frame_wcs(RA, DEC, SHAPE, 25.0)).to_header()
    if unit:
        header["BUNIT"] = unit
    hdus = [fits.PrimaryHDU(image() if data is None else data, header)]
    hdus += [fits.ImageHDU(np.asarray(value, np.float32), name=name) for name, value in extensions.items()]
    fits.HDUList(hdus).writeto(path, overwrite=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for band in "gr":
        write(tmp_path / f"A-1-{band}.fits", SIGMA=np.full(SHAPE, NOISE))
    return tmp_path


def cutout(folder: Path, cluster=CLUSTER, grid=GRID):
    with CutoutSource(f"{folder}/{{id}}-{{band}}.fits", grid) as source:
        return source.cutout(cluster)


def quiet_cutout(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return cutout(folder)


def test_flux_sigma_and_place(folder):
    result = quiet_cutout(folder)
    assert result.flags == Flag(0) and result.coverage == 1.0 and result.bands == "gr"
    assert np.isnan(result.psf_fwhm_arcsec).all()
    assert result.flux.sum(axis=(1, 2)) == pytest.approx([100.0] * 2, abs=5 * NOISE * 80)
    rows, cols = np.indices((40, 40))
    core = np.hypot(rows - 19.5, cols - 19.5) < 6
    flux = result.flux[0] * core
    assert (flux * cols).sum() / flux.sum() == pytest.approx(19.5, abs=0.05)
    corner = (slice(None), slice(0, 10))
    assert np.std(result.flux[0][corner]) == pytest.approx(np.median(result.sigma[0][corner]), rel=0.1)


def test_scatter_stands_in_for_a_missing_sigma(folder):
    given = cutout(folder)
    for band in "gr":
        write(folder / f"A-1-{band}.fits")
    measured = quiet_cutout(folder)
    assert measured.flags == Flag.SIGMA_APPROXIMATE
    assert np.median(measured.sigma) == pytest.approx(np.median(given.sigma), rel=0.05)


@pytest.mark.parametrize("name", ["IVAR", "INVVAR"])
def test_inverse_variance_and_mask(folder, name):
    given = cutout(folder)
    ivar, mask = np.full(SHAPE, NOISE**-2), np.zeros(SHAPE)
    mask[70:80, 70:80] = 1
    write(folder / "A-1-g.fits", MASK=mask, **{name: ivar})
    result = quiet_cutout(folder)
    assert result.flags == Flag(0)
    assert 5 < result.mask[0].sum() < 60 and not result.mask[1].any()
    assert np.allclose(result.sigma[0][:5], given.sigma[0][:5], rtol=1e-4)


def test_other_pixel_scales_frames_of_the_sky_and_psf(folder):
    # A galactic-coordinate image of 1" pixels.
    from astropy.coordinates import SkyCoord

    place = SkyCoord(RA, DEC, unit="deg").galactic
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["GLON-TAN", "GLAT-TAN"]
    wcs.wcs.crval = [place.l.deg, place.b.deg]  # type: ignore[union-attr]
    wcs.wcs.crpix = [40.5, 40.5]
    wcs.wcs.cdelt = [-1 / 3600, 1 / 3600]
    rows, cols = np.indices((80, 80))
    data = 100 * np.exp(-0.5 * ((rows - 39.5) ** 2 + (cols - 39.5) ** 2) / 4) / (2 * np.pi * 4)
    header = wcs.to_header()
    header["PSF_FWHM"] = 1.1
    sigma = fits.ImageHDU(np.full((80, 80), 0.1), name="SIGMA")
    fits.HDUList([fits.PrimaryHDU(data, header), sigma]).writeto(folder / "A-1-g.fits", overwrite=True)
    result = quiet_cutout(folder)
    assert result.flags == Flag(0)
    assert result.psf_fwhm_arcsec[0] == pytest.approx(1.1)
    assert result.flux[0].sum() == pytest.approx(100.0, rel=1e-3)
    rows, cols = np.indices((40, 40))
    assert (result.flux[0] * cols).sum() / 100.0 == pytest.approx(19.5, abs=0.05)


def test_missing_files(folder):
    (folder / "A-1-r.fits").unlink()
    assert cutout(folder).flags == Flag.MISSING_BAND
    (folder / "A-1-g.fits").unlink()
    result = cutout(folder)
    assert result.flags == Flag.OUTSIDE and result.mask.all()


def test_clusters_without_any_file_are_counted_and_named(folder):
    source = CutoutSource(f"{folder}/{{id}}-{{band}}.fits", GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (folder / "A-1-g.fits").unlink()
        source.check_files(["A-1"])
    with pytest.warns(UserWarning, match=r"2 of 3 clusters have no file in any band .*no .*/B-g\.fits"):
        source.check_files(["A-1", "B", "C"])


def test_a_pattern_that_fits_no_cluster_stops_before_anything_is_written(folder, tmp_path):
    catalog = check_catalog(Table({name: [value] for name, value in {**CLUSTER, "id": "B"}.items()}), "here")
    config = BuildConfig(cutouts=f"{folder}/{{id}}-{{band}}.fits")
    with pytest.raises(Pix2massError, match=r"1 of 1 clusters have no file.*no .*/B-g\.fits; correct the pattern"):
        build_store(catalog, config, GRID, tmp_path / "s.zarr", InProcess(), nullcontext)
    assert not (tmp_path / "s.zarr").exists()


def test_image_smaller_than_the_grid_or_elsewhere(folder):
    wide = GRID.model_copy(update={"width_arcsec": 120.0})
    assert cutout(folder, grid=wide).flags == Flag.PARTLY_OUTSIDE
    assert cutout(folder, {**CLUSTER, "ra_deg": RA + 1}).flags == Flag.OUTSIDE


@pytest.mark.parametrize("unit", ["nanomaggy", "nanomaggies", "nMgy", "nanomaggies / pixel"])
def test_accepted_units(folder, unit):
    write(folder / "A-1-g.fits", unit=unit, SIGMA=np.full(SHAPE, NOISE))
    assert quiet_cutout(folder).flags == Flag(0)


def test_other_units_are_refused(folder):
    write(folder / "A-1-g.fits", unit="Jy/beam")
    with pytest.raises(Pix2massError, match=r"A-1-g\.fits: expected BUNIT.*'Jy/beam'"):
        cutout(folder)


@pytest.mark.parametrize("damage", ["no WCS", "truncated", "text", "cube", "no image", "shapes"])
def test_damaged_files_are_flagged_and_named(folder, damage):
    path = folder / "A-1-g.fits"
    if damage == "no WCS":
        fits.PrimaryHDU(image()).writeto(path, overwrite=True)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:20000])
    elif damage == "text":
        path.write_text("not an image")
    elif damage == "cube":
        fits.PrimaryHDU(np.zeros((3, 10, 10))).writeto(path, overwrite=True)
    elif damage == "no image":
        fits.PrimaryHDU().writeto(path, overwrite=True)
    else:
        write(path, SIGMA=np.ones((3, 3)))
    with pytest.warns(UserWarning, match=r"A-1-g\.fits: .*band g is missing"):
        result = cutout(folder)
    assert result.flags == Flag.UNREADABLE | Flag.MISSING_BAND
    assert result.mask[0].all() and not result.mask[1].any()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"RADESYS": "GAPPT"}, r"WCS \(CTYPE RA---TAN DEC--TAN, RADESYS 'GAPPT'\) cannot be used"),
        ({"CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN"}, r"WCS \(CTYPE HPLN-TAN HPLT-TAN, .*cannot be used"),
        ({"CDELT1": 1e-6, "CDELT2": 1e-6}, "its pixels are 4e-07 arcsec wide, those of the cutout 0.8"),
    ],
)
def test_headers_that_cannot_be_used_are_flagged_and_named(folder, keywords, message):
    with fits.open(folder / "A-1-g.fits", mode="update") as hdus:
        hdus[0].header.update(keywords)
    with pytest.warns(UserWarning, match=rf"A-1-g\.fits: .*{message}.*band g is missing"):
        result = cutout(folder)
    assert result.flags == Flag.UNREADABLE | Flag.MISSING_BAND
    assert result.mask[0].all() and not result.mask[1].any()


def test_the_first_image_with_a_celestial_wcs_is_read(folder):
    """A preview without WCS may stand before the image, and other images after it."""
    given = cutout(folder)
    path = folder / "A-1-g.fits"
    with fits.open(path) as hdus:
        science = fits.ImageHDU(hdus[0].data, hdus[0].header, name="SCI")
        sigma, other = hdus["SIGMA"].copy(), fits.ImageHDU(hdus[0].data * 0, hdus[0].header, name="MODEL")
    fits.HDUList([fits.PrimaryHDU(np.ones((5, 5))), sigma, science, other]).writeto(path, overwrite=True)
    result = quiet_cutout(folder)
    assert result.flags == Flag(0)
    np.testing.assert_array_equal(result.flux, given.flux)


@pytest.mark.parametrize(("name", "meant"), [("icrs", "ICRS"), ("ICRF", "ICRS"), ("fk5", "FK5"), ("J2000", "FK5")])
def test_loose_names_of_the_sky_frame_are_understood(folder, name, meant):
    results = []
    for radesys in (meant, name):
        with fits.open(folder / "A-1-g.fits", mode="update") as hdus:
            hdus[0].header["RADESYS"] = radesys
        results.append(quiet_cutout(folder))
    assert results[1].flags == Flag(0)
    np.testing.assert_array_equal(results[0].flux, results[1].flux)


def test_nan_pixels_are_masked_flagged_and_named(folder):
    data, sigma = image(), np.full(SHAPE, NOISE)
    data[70:80, 70:80] = np.nan
    sigma[10, 10] = -1.0
    write(folder / "A-1-g.fits", data, SIGMA=sigma)
    with pytest.warns(UserWarning, match=r"A-1-g\.fits: pixels that are not finite"):
        result = cutout(folder)
    assert result.flags == Flag.BAD_PIXELS
    assert result.mask[0].any() and np.isfinite(result.flux).all()


@pytest.mark.parametrize("identifier", ["../A-1", "a/b", "a\\b", "..", "a\0b", "", "/etc/passwd"])
def test_ids_must_not_leave_the_folder(folder, identifier):
    with pytest.raises(Pix2massError, match="id .*expected a name without"):
        cutout(folder, {**CLUSTER, "id": identifier})


def test_braces_in_an_id_are_plain_text(folder):
    (folder / "A-1-g.fits").rename(folder / "{band}-g.fits")
    assert cutout(folder, {**CLUSTER, "id": "{band}"}).flags == Flag.MISSING_BAND


def test_unusable_patterns_and_clusters_are_refused(folder):
    with pytest.raises(Pix2massError, match="band"):
        CutoutSource(f"{folder}/{{id}}.fits", GRID)
    with pytest.raises(Pix2massError, match="no such folder"):
        CutoutSource("/nowhere/{id}-{band}.fits", GRID)
    with pytest.raises(Pix2massError, match="expected a column id"):
        cutout(folder, {"ra_deg": RA, "dec_deg": DEC})
    for change in ({"ra_deg": np.nan}, {"z": -1.0}):
        with pytest.raises(Pix2massError, match="A-1"):
            cutout(folder, {**CLUSTER, **change}, GridConfig(bands="gr"))


# --- writing ---


def test_what_is_written_is_read_back(tmp_path):
    """Flux, sigma, mask, PSF and flags of a cutout, on its own grid; a band without PSF stays without."""
    rng = np.random.default_rng(2)
    shape = (2, 40, 40)
    mask = np.zeros(shape, bool)
    mask[1, :10] = True
    flux, sigma = rng.normal(0, 1, shape).astype(np.float32), rng.uniform(0.5, 1, shape).astype(np.float32)
    flux[mask], sigma[mask] = 0.0, 0.0
    psf = np.array([1.3, np.nan], np.float32)
    flags = Flag.PARTLY_OUTSIDE | Flag.SATURATED
    written = Cutout(flux, sigma, mask, "gr", RA, DEC, 0.8, psf, flags)
    paths = write_cutout(written, "A-1", f"{tmp_path}/deep/{{id}}-{{band}}.fits")
    assert [path.name for path in paths] == ["A-1-g.fits", "A-1-r.fits"]
    found = quiet_cutout(tmp_path / "deep")
    assert found.flags == flags
    assert np.array_equal(found.mask, mask)
    assert found.flux == pytest.approx(flux, abs=2e-3) and found.sigma == pytest.approx(sigma, abs=2e-3)
    assert np.array_equal(found.psf_fwhm_arcsec, psf, equal_nan=True)
    with fits.open(paths[0]) as hdus:
        assert [hdu.name for hdu in hdus[1:]] == ["SIGMA", "MASK"]
        assert WCS(hdus[0].header).pixel_to_world_values(19.5, 19.5) == pytest.approx((RA, DEC))


def test_flags_of_bands_that_are_not_read_are_not_read_back(tmp_path):
    shape = (3, 40, 40)
    mask = np.zeros(shape, bool)
    mask[0] = True
    ones = np.where(mask, 0, 1).astype(np.float32)
    flags = Flag.MISSING_BAND | Flag.PARTLY_OUTSIDE | Flag.SATURATED
    write_cutout(
        Cutout(ones, ones, mask, "ugr", RA, DEC, 0.8, np.ones(3), flags), "A-1", f"{tmp_path}/{{id}}-{{band}}.fits"
    )
    assert cutout(tmp_path).flags == Flag.SATURATED
    assert cutout(tmp_path, grid=GRID.model_copy(update={"bands": "ugr"})).flags == flags


def test_an_id_cannot_lead_out_of_the_folder_when_written(tmp_path):
    cutout = Cutout(*np.zeros((2, 1, 8, 8), np.float32), np.zeros((1, 8, 8), bool), "r", RA, DEC, 1.0, np.ones(1))
    with pytest.raises(Pix2massError, match="without '/'"):
        write_cutout(cutout, "../A", f"{tmp_path}/{{id}}-{{band}}.fits")
