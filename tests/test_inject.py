"""Mock clusters in other images: their light arrives, whole and with its noise, and nothing else changes."""

from __future__ import annotations

import bz2
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import QTable
from scipy.special import gammainc, gammaincinv

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.archive import Field, frame_path
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frames import FrameSource
from pix2mass.images.inject import InjectedSource, cluster_light, inject_frames, random_clusters
from pix2mass.images.mock.frames import OVERLAP_ROWS, dimmed_flux, with_truth, write_frames
from pix2mass.images.mock.source import MockSource
from pix2mass.types import BANDS, EXTINCTION_PER_EBV, Cutout, Flag, Pix2massError

SHAPE = (300, 420)
GRID = GridConfig(width_arcsec=100.0, n_pixels=40)
CONFIG = MockConfig(depth_r_mag=20.0, background_r_mag=23.0, miscentred_share=0.0)
SEED = 3
CLUSTER = {"id": "painted", "ra_deg": 150.0, "dec_deg": 20.0, "z": 0.25, "log10_m500c_true": 14.6, "richness_true": 40}
BLANK = {**CLUSTER, "log10_m500c_true": np.nan}


class Empty:
    """Cutouts without light and without knowledge of the PSF, one quarter masked."""

    def cutout(self, cluster) -> Cutout:
        plain = MockSource(CONFIG, GRID, SEED).cutout(BLANK)
        mask = np.zeros(plain.mask.shape, bool)
        mask[:, :20, :20] = True
        unknown = np.full(len(plain.bands), np.nan, np.float32)
        zero = np.zeros_like(plain.flux)
        return replace(plain, flux=zero, sigma=np.where(mask, zero, 1e-3), mask=mask, psf_fwhm_arcsec=unknown)


def photons(sources, flux, radius_arcsec: float, centre: tuple[float, float], psf_fwhm_arcsec: float, n=60_000):
    """Light inside an aperture, by throwing photons: profiles from their definition, PSF as its sum of Gaussians."""
    rng = np.random.default_rng(0)
    components = CONFIG.physics.psf_components
    # Width of the first Gaussian from the half-maximum condition, by bisection.
    radius = np.linspace(0.0, 3.0, 30001)[:, None]
    share, ratio = np.array(components).T
    profile = (share / ratio**2 * np.exp(-0.5 * (radius / ratio) ** 2)).sum(axis=1)
    sigma = psf_fwhm_arcsec / (2 * radius[np.argmin(np.abs(profile - profile[0] / 2)), 0])
    total = 0.0
    for k in range(len(sources)):
        u, azimuth = rng.random(n), rng.uniform(0, 2 * np.pi, n)
        index = sources.sersic_n[k]
        edge = {1: 4.0, 4: 8.0}[int(index)]
        b = gammaincinv(2 * index, 0.5)
        r = (gammaincinv(2 * index, u * gammainc(2 * index, b * edge ** (1 / index))) / b) ** index
        r *= sources.r50_arcsec[k] / np.median(r)
        major, minor = r * np.cos(azimuth), r * np.sin(azimuth) * sources.axis_ratio[k]
        turn = np.radians(sources.angle_deg[k])
        blur = sigma * rng.choice(ratio, n, p=share / share.sum())
        x = major * np.cos(turn) - minor * np.sin(turn) + blur * rng.normal(size=n) + sources.x_arcsec[k]
        y = major * np.sin(turn) + minor * np.cos(turn) + blur * rng.normal(size=n) + sources.y_arcsec[k]
        total += flux[k] * (np.hypot(x - centre[0], y - centre[1]) < radius_arcsec).mean()
    return total


# --- into cutouts ---


def test_light_in_an_aperture_is_that_of_the_profiles_in_every_band():
    class Fine(Empty):
        def cutout(self, cluster):
            zero = np.zeros((5, 200, 200), np.float32)
            return Cutout(zero, zero + 1e-4, zero > 0, BANDS, 150.0, 20.0, 0.5, np.full(5, 1.3, np.float32))

    lonely = {**CLUSTER, "richness_true": 1}
    cutout = InjectedSource(Fine(), CONFIG, SEED).cutout(lonely)
    sources, flux = cluster_light(lonely, CONFIG, 160.0, SEED)
    assert sources.is_diffuse.sum() == 1
    centre = sources.x_arcsec[0], sources.y_arcsec[0]
    rows, cols = np.indices((200, 200))
    distance = np.hypot((cols - 99.5) * 0.5 - centre[0], (rows - 99.5) * 0.5 - centre[1])
    for radius in (4.0, 12.0):
        for band in range(5):
            expected = photons(sources, flux[:, band], radius, centre, 1.3)
            error = np.sqrt((cutout.sigma[band][distance < radius] ** 2).sum())
            assert abs(cutout.flux[band][distance < radius].sum() - expected) < 3.5 * error + 0.015 * expected, band


def test_noise_of_the_added_light_is_poisson_and_enters_sigma():
    painted = InjectedSource(Empty(), CONFIG, SEED).cutout(CLUSTER)
    electron = np.array(CONFIG.physics.nmgy_per_electron)[:, None, None]
    good = ~painted.mask
    variance = np.where(good, painted.sigma.astype(float) ** 2 - 1e-6, 0.0)
    lit = variance > 1e-5
    pull = ((painted.flux - variance / electron)[lit] / np.sqrt(variance[lit])).ravel()
    assert lit.sum() > 500
    assert pull.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * lit.sum()))
    assert abs(pull.mean()) < 4 / np.sqrt(lit.sum())
    assert (painted.flux[painted.mask] == 0).all() and (painted.sigma[painted.mask] == 0).all()


def test_neither_field_nor_stars_are_painted_and_dust_dims():
    sources, flux = cluster_light(CLUSTER, CONFIG, 200.0, SEED)
    assert sources.is_member.all() and not sources.is_star.any() and len(sources) > 5
    dimmed = cluster_light({**CLUSTER, "ebv": 0.1}, CONFIG, 200.0, SEED)[1]
    ratio = [10 ** (-0.04 * EXTINCTION_PER_EBV[band]) for band in BANDS]
    assert dimmed / flux == pytest.approx(np.broadcast_to(ratio, flux.shape))
    assert np.array_equal(flux, dimmed_flux(sources.mag, 0.0))


def test_painting_depends_on_seed_and_id_alone_and_keeps_what_was_there():
    source = InjectedSource(MockSource(CONFIG, GRID, SEED), CONFIG, SEED)
    first, again = source.cutout(BLANK | {"log10_m500c_true": 14.6}), source.cutout(CLUSTER)
    assert np.array_equal(first.flux, again.flux)
    other = InjectedSource(Empty(), CONFIG, SEED + 1).cutout(CLUSTER)
    assert not np.array_equal(other.flux, InjectedSource(Empty(), CONFIG, SEED).cutout(CLUSTER).flux)
    bands = GridConfig(width_arcsec=100.0, n_pixels=40, bands="gi")
    part = InjectedSource(MockSource(CONFIG, bands, SEED), CONFIG, SEED).cutout(CLUSTER)
    assert part.bands == "gi" and part.flux == pytest.approx(again.flux[[1, 3]], rel=1e-3, abs=0.02)


def test_a_cutout_without_pixels_stays_as_it_is():
    class Outside(Empty):
        def cutout(self, cluster):
            plain = super().cutout(cluster)
            return replace(plain, mask=np.ones_like(plain.mask), flags=Flag.OUTSIDE)

    assert InjectedSource(Outside(), CONFIG, SEED).cutout(CLUSTER).flags == Flag.OUTSIDE


# --- into frames ---


def content(out: Path, field: Field, band: str) -> bytes:
    return bz2.decompress((out / frame_path(field, band, ".fits.bz2")).read_bytes())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, FrameIndex, Path, FrameIndex]:
    """Mock frames of blank sky, and the same with a cluster painted in."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("painted")
    sky = QTable([{**BLANK, "id": "sky"}])
    plain = write_frames(sky, CONFIG, SEED, base, GridConfig(width_arcsec=140.0), shape=SHAPE)
    painted = inject_frames(base, QTable([CLUSTER]), CONFIG, SEED, out, GRID)
    assert len(painted) >= 10
    return base, plain, out, painted


def test_painted_flux_is_recovered_in_every_band(folders):
    base, plain, out, painted = folders
    with FrameSource(base, GRID, plain) as before, FrameSource(out, GRID, painted) as after:
        old, new = before.cutout(CLUSTER), after.cutout(CLUSTER)
    assert new.flags == old.flags and np.array_equal(new.mask, old.mask)
    assert new.psf_fwhm_arcsec == pytest.approx(old.psf_fwhm_arcsec)
    zero = replace(old, flux=np.zeros_like(old.flux), sigma=np.full_like(old.sigma, 1e-6))

    class Nothing:
        def cutout(self, cluster):
            return zero

    electron = np.array(CONFIG.physics.nmgy_per_electron)[:, None, None]
    expected = InjectedSource(Nothing(), CONFIG, SEED).cutout(CLUSTER).sigma ** 2 / electron
    rows, cols = np.indices((40, 40))
    for x, y, radius in ((19.5, 19.5, 6.0), (19.5, 19.5, 19.0), (10.0, 28.0, 8.0)):
        aperture = np.hypot(cols - x, rows - y) < radius
        for k, band in enumerate(BANDS):
            added = (new.flux - old.flux)[k][aperture].sum()
            # The noise of what was added is what the two frames' variances differ by.
            error = np.sqrt((new.sigma[k] ** 2 - old.sigma[k] ** 2)[aperture].sum())
            light = expected[k][aperture].sum()
            assert abs(added - light) < 3.5 * error + 0.01 * light, (band, radius)
            assert light > 5 * error


def test_frames_keep_all_but_their_pixels_and_shared_rows_stay_shared(folders):
    base, index, out, painted = folders
    assert set(painted.fields) <= set(index.fields)
    for field in painted.fields:
        photo = f"dr12/boss/photoObj/301/{field.run}/photoField-{field.run:06d}-{field.camcol}.fits"
        assert (base / photo).read_bytes() == (out / photo).read_bytes()
        with (
            fits.open(io.BytesIO(content(base, field, "r"))) as old,
            fits.open(io.BytesIO(content(out, field, "r"))) as new,
        ):
            assert len(old) == len(new) == 4
            assert "painted in" in str(new[0].header["HISTORY"])
            for key in old[0].header:
                assert new[0].header[key] == old[0].header[key], key
            assert np.array_equal(new[1].data, old[1].data)
            assert new[2].data["ALLSKY"].tobytes() == old[2].data["ALLSKY"].tobytes()
            assert (new[0].data - old[0].data).sum() > 100.0
    pairs = [f for f in painted.fields if f._replace(field=f.field + 1) in painted.fields]
    assert pairs
    for field in pairs:
        images = [
            fits.getdata(io.BytesIO(content(out, one, "r"))) for one in (field, field._replace(field=field.field + 1))
        ]
        first, second = images[0][-OVERLAP_ROWS:], images[1][:OVERLAP_ROWS]
        # The two WCS differ by up to a twentieth of a pixel, the noise by nothing.
        assert np.abs(first - second).max() < 0.1 * first.max()
        assert np.median(np.abs(first - second)) < 0.02 * first.std()


def test_the_same_call_goes_on_and_other_settings_do_not_mix(folders):
    base, _, out, painted = folders
    files = {path: path.read_bytes() for path in sorted(out.rglob("*.bz2"))}
    next(iter(files)).unlink()
    inject_frames(base, QTable([CLUSTER]), CONFIG, SEED, out, GRID)
    assert all(path.read_bytes() == data for path, data in files.items())
    with pytest.raises(Pix2massError, match="another catalogue, seed or configuration"):
        inject_frames(base, QTable([CLUSTER]), CONFIG, SEED + 1, out, GRID)
    for more in ({"ebv": 0.5}, {"ra_deg_true": CLUSTER["ra_deg"] + 0.001, "dec_deg_true": CLUSTER["dec_deg"]}):
        with pytest.raises(Pix2massError, match="another catalogue, seed or configuration"):
            inject_frames(base, QTable([{**CLUSTER, **more}]), CONFIG, SEED, out, GRID)


def test_mistakes_are_explained(folders, tmp_path):
    base, index = folders[:2]
    with pytest.raises(Pix2massError, match="another folder than that of the frames"):
        inject_frames(base, QTable([CLUSTER]), CONFIG, SEED, base, GRID, index=index)
    with pytest.raises(Pix2massError, match="no frame covers any of the 1 positions"):
        inject_frames(base, QTable([{**CLUSTER, "ra_deg": 10.0}]), CONFIG, SEED, tmp_path, GRID, index=index)


def test_random_clusters_lie_inside_frames_and_are_spread_over_them(folders):
    index = folders[1]
    fields = len(index.fields)
    table = random_clusters(index, CONFIG, 2 * fields + 1, SEED, margin_arcsec=20.0)
    assert len(table) == 2 * fields + 1 == len(set(table["id"]))
    counts = [int((table["group"] == str(field)).sum()) for field in index.fields]
    assert sorted(counts) == [2] * (fields - 1) + [3]
    for row in table:
        assert any(str(field) == row["group"] for field in index.covering(row["ra_deg"], row["dec_deg"], 1.0)["r"])
    truth = with_truth(table, CONFIG)
    assert np.isfinite(truth["log10_m500c_true"]).all()
    light = cluster_light(dict(truth[0]), CONFIG, 300.0, SEED)[0]
    assert np.hypot(light.x_arcsec[0], light.y_arcsec[0]) < 1e-6  # about the new position, not the drawn one
    with pytest.raises(Pix2massError, match="n of 1 or more"):
        random_clusters(index, CONFIG, 0, SEED)
