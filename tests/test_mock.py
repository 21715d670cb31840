"""The mock sky: reproducible, conserving flux, with the noise, colours, numbers and profiles it states."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from pix2mass.config import GridConfig, MockConfig
from pix2mass.cosmology import kpc_per_arcsec, m_star_i_mag, r500c_kpc
from pix2mass.images.mock import population
from pix2mass.images.mock.population import Sources
from pix2mass.images.mock.render import PSF_FWHM_PER_SIGMA, PSF_WING_RATIO, PSF_WING_SHARE, render, sersic_mixture
from pix2mass.images.mock.source import PIXEL_SIGMA_NMGY, MockSource
from pix2mass.images.mock.templates import templates
from pix2mass.types import Pix2massError

CENTRED = MockConfig(miscentred_share=0.0, diffuse_light_share=0.0, projected_groups=False)


def one_source(x=0.0, y=0.0, r50=0.0, axis_ratio=1.0, angle=0.0, n=0.0) -> Sources:
    columns = {f.name: np.zeros(1) for f in fields(Sources)}
    columns.update(
        x_arcsec=np.array([x]),
        y_arcsec=np.array([y]),
        r50_arcsec=np.array([r50]),
        axis_ratio=np.array([axis_ratio]),
        angle_deg=np.array([angle]),
        sersic_n=np.array([n]),
    )
    return Sources(**columns)


def cluster(i=0, z=0.25, mass=14.5, richness=None) -> dict:
    row = {"id": f"c{i}", "z": z, "log10_m500c_true": mass, "ra_deg": 150.0, "dec_deg": 20.0}
    return row if richness is None else {**row, "richness_true": richness}


# --- catalogue ---


def test_catalogue_is_reproducible_and_its_start_does_not_depend_on_its_length():
    long, short = (population.draw_clusters(MockConfig(), n, 3, "m") for n in (50, 7))
    other = population.draw_clusters(MockConfig(), 7, 4, "m")
    for name in long.colnames:
        assert np.array_equal(long[name][:7], short[name]), name
    assert not np.allclose(short["z"], other["z"])
    assert long.meta["mass_definition"] == "500c" and long.meta["seed"] == 3


def test_catalogue_has_the_stated_ranges_and_scatters():
    config = MockConfig(label_scatter_dex=0.12)
    table = population.draw_clusters(config, 4000, 1, "m")
    true = np.asarray(table["log10_m500c_true"])
    assert true.min() >= config.log10_m500c_min and true.max() <= config.log10_m500c_max
    assert np.std(table["log10_m500c"] - true) == pytest.approx(0.12, rel=0.05)
    rich = true > 14.8
    ln_ratio = np.log(np.asarray(table["richness_true"])[rich] / population.mean_richness(true[rich]))
    poisson = np.mean(1 / population.mean_richness(true[rich]))
    assert np.std(ln_ratio) == pytest.approx(np.hypot(config.richness_scatter_ln, np.sqrt(poisson)), rel=0.08)
    assert np.mean(ln_ratio) == pytest.approx(0.0, abs=0.03)


def test_richness_of_a_mass_is_the_published_one():
    assert population.mean_richness(14.24) == pytest.approx(40.0)
    assert m_star_i_mag(0.25) == pytest.approx(18.39, abs=0.01)


# --- population ---


def test_sources_depend_on_seed_and_id_only():
    alone = population.galaxies(cluster(2), MockConfig(), 300.0, 9)
    population.galaxies(cluster(5), MockConfig(), 500.0, 9)
    again = population.galaxies(cluster(2), MockConfig(), 300.0, 9)
    other = population.galaxies(cluster(2), MockConfig(), 300.0, 10)
    assert all(getattr(alone, f.name).tobytes() == getattr(again, f.name).tobytes() for f in fields(Sources))
    assert len(other) != len(alone) or not np.array_equal(alone.mag, other.mag)


def test_a_wider_box_holds_the_sources_of_a_narrower_one():
    narrow, wide = (population.galaxies(cluster(), MockConfig(), width, 1) for width in (240.0, 700.0))
    inside = wide[(np.abs(wide.x_arcsec) <= 120.0) & (np.abs(wide.y_arcsec) <= 120.0)]
    assert len(narrow) == len(inside) > 50
    assert np.array_equal(narrow.mag, inside.mag)
    assert np.array_equal(narrow.is_member, inside.is_member)


def luminous_red_members(sources: Sources, z: float) -> np.ndarray:
    limit = m_star_i_mag(z) + population.LUMINOUS_MAG
    return sources.is_member & sources.is_red & (sources.mag[:, 3] < limit)


@pytest.mark.parametrize("richness", [1, 20, 150])
def test_red_members_within_r_c_are_as_many_as_the_richness(richness):
    z = 0.2
    sources = population.galaxies(cluster(z=z, richness=richness), CENTRED, 2000.0, 1)
    radius_kpc = np.hypot(sources.x_arcsec, sources.y_arcsec) * kpc_per_arcsec(z)
    inside = luminous_red_members(sources, z) & (radius_kpc < population.richness_radius_kpc(richness))
    assert inside.sum() == richness


def test_members_follow_a_projected_nfw_profile():
    z, mass, x = 0.2, 14.8, []
    scale_kpc = r500c_kpc(mass, z) * population.R200C_PER_R500C / population.GALAXY_CONCENTRATION
    for i in range(20):
        sources = population.galaxies(cluster(i, z, mass, richness=150), CENTRED, 2500.0, 1)
        red = luminous_red_members(sources, z)
        x.append((np.hypot(sources.x_arcsec, sources.y_arcsec) * kpc_per_arcsec(z) / scale_kpc)[red])
    x = np.concatenate(x)
    x = x[(x > 0) & (x < 3.0)]
    # Independent of the code's closed form: the surface density of an NFW halo, integrated numerically.
    line = np.linspace(0, 60, 6001)
    grid = np.linspace(0.02, 3.0, 150)
    r = np.hypot(grid[:, None], line)
    enclosed = np.cumsum(grid * (1 / (r * (1 + r) ** 2)).sum(axis=1))
    for share in (0.25, 0.5, 0.75):
        expected = np.interp(share * enclosed[-1], enclosed, grid)
        assert np.mean(x < expected) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(x)) + 0.01)


@pytest.mark.parametrize("z", [0.12, 0.25, 0.38])
def test_red_members_lie_on_the_red_sequence(z):
    sources = population.galaxies(cluster(z=z, richness=400), CENTRED, 1200.0, 2)
    chosen = luminous_red_members(sources, z)
    dm = sources.mag[chosen, 3] - m_star_i_mag(z)
    colours = -np.diff(sources.mag[chosen], axis=1)
    expected = -np.diff(templates().red_magnitudes(np.array([z])))[0] + population.RED_COLOUR_SLOPE * dm[:, None]
    scatter = population.RED_COLOUR_SCATTER_MAG
    assert np.all(np.abs(np.mean(colours - expected, axis=0)) < 4 * scatter / np.sqrt(chosen.sum()))
    assert np.allclose(np.std(colours - expected, axis=0), scatter, rtol=0.2)


def test_the_red_fraction_falls_outwards():
    z = 0.2
    red, radius = [], []
    for i in range(6):
        sources = population.galaxies(cluster(i, z, 14.8, richness=150), CENTRED, 2500.0, 1)
        bright = sources.is_member & (sources.mag[:, 3] < m_star_i_mag(z) + 1.5)
        red.append(sources.is_red[bright])
        radius.append((np.hypot(sources.x_arcsec, sources.y_arcsec) * kpc_per_arcsec(z) / r500c_kpc(14.8, z))[bright])
    red, radius = np.concatenate(red), np.concatenate(radius)
    assert red[radius < 0.5].mean() > red[radius > 1.0].mean() + 0.1


def test_blank_sky_has_no_members():
    blank = population.galaxies({"id": "b", "z": 0.2}, MockConfig(), 400.0, 1)
    assert not blank.is_member.any() and blank.is_star.any() and (~blank.is_star).any()


def test_wrong_requests_say_what_is_wrong():
    with pytest.raises(Pix2massError, match="width"):
        population.galaxies(cluster(), MockConfig(), 0.0, 1)
    with pytest.raises(Pix2massError, match=r"z = 2"):
        population.galaxies(cluster(z=2.0), MockConfig(), 100.0, 1)


def test_observed_catalogue_lists_galaxies_with_honest_errors():
    row = cluster()
    sources = population.galaxies(row, MockConfig(), 1500.0, 1)
    seen = population.observe(sources, row, 1)
    kept = ~sources.is_star & ~sources.is_diffuse
    assert len(seen["mag"]) < kept.sum()
    assert seen["mag"][:, 3].max() < 21.0
    quiet = population.observe(sources, row, 2)
    # Bright galaxies are in both lists, in the same order: their magnitudes differ by the stated errors.
    bright_a, bright_b = (c["mag"][:, 3] < 20.0 for c in (seen, quiet))
    both = np.intersect1d(seen["ra_deg"][bright_a], quiet["ra_deg"][bright_b])
    a, b = (np.flatnonzero(np.isin(c["ra_deg"], both)) for c in (seen, quiet))
    pull = (seen["mag"][a, 1:4] - quiet["mag"][b, 1:4]) / np.hypot(seen["mag_err"][a, 1:4], quiet["mag_err"][b, 1:4])
    assert len(both) > 100
    assert np.subtract(*np.percentile(pull, [84.1, 15.9])) / 2 == pytest.approx(1.0, abs=0.1)


# --- renderer ---


@pytest.mark.parametrize("n", [1, 4])
def test_mixtures_have_the_profile_they_stand_for(n):
    share, width = sersic_mixture(n)
    assert share.sum() == pytest.approx(1.0)
    radius = np.array([0.3, 1.0, 2.0])
    enclosed = 1 - (share * np.exp(-0.5 * (radius[:, None] / width) ** 2)).sum(axis=1)
    # Truncated Sersic profiles, integrated numerically.
    from scipy.special import gammaincinv

    edge = {1: 4.0, 4: 8.0}[n]
    grid = np.linspace(1e-5, edge, 400_000)
    light = np.cumsum(grid * np.exp(-gammaincinv(2 * n, 0.5) * (grid ** (1 / n) - 1)))
    light /= light[-1]
    # The half-light radius of the profile as truncated is the unit of the mixture.
    half = np.interp(0.5, light, grid)
    assert np.allclose(enclosed, np.interp(radius * half, grid, light), atol=0.015)


@pytest.mark.parametrize("scale", [0.396, 0.8, 1.6, 3.2, 12.0])
@pytest.mark.parametrize("n", [0, 1, 4])
def test_flux_is_conserved(n, scale):
    galaxy = one_source(0.37 * scale, -1.21 * scale, r50=2.0, axis_ratio=0.4, angle=35.0, n=n)
    pixels = 160 if scale < 1 else 64
    image = render(galaxy, np.array([[5.0, 1.0]]), np.array([1.5, 1.2]), pixels, scale)
    assert image.sum(axis=(1, 2)) == pytest.approx([5.0, 1.0], rel=0.005)


def test_a_star_has_the_stated_seeing():
    scale, fwhm = 0.1, 1.3
    image = render(one_source(scale / 2, scale / 2), np.ones((1, 1)), np.array([fwhm]), 128, scale)[0]
    row = image[64]
    above = np.flatnonzero(row > row.max() / 2)
    assert (above[-1] - above[0] + 1) * scale == pytest.approx(fwhm, abs=0.15)
    # Second moments of a double Gaussian are the sum of its parts'.
    sigma = fwhm / PSF_FWHM_PER_SIGMA
    x = (np.arange(128) + 0.5 - 64.5) * scale
    variance = (image.sum(axis=0) * x**2).sum() / image.sum()
    expected = sigma**2 * (1 - PSF_WING_SHARE + PSF_WING_SHARE * PSF_WING_RATIO**2)
    assert variance == pytest.approx(expected + scale**2 / 12, rel=0.02)


@pytest.mark.parametrize("angle", [0.0, 30.0, 45.0, 110.0])
@pytest.mark.parametrize("scale", [0.4, 1.6])
def test_elongated_galaxies_are_drawn_as_on_a_fine_grid(angle, scale):
    galaxy = one_source(1.1, -0.7, r50=2.5, axis_ratio=0.25, angle=angle, n=1)
    split = 8
    fine = render(galaxy, np.ones((1, 1)), np.array([1.2]), 48 * split, scale / split)[0]
    coarse = render(galaxy, np.ones((1, 1)), np.array([1.2]), 48, scale)[0]
    expected = fine.reshape(48, split, 48, split).sum(axis=(1, 3))
    assert np.abs(coarse - expected).max() < 0.02 * expected.max()


def test_a_bright_source_far_outside_adds_nothing_and_its_neighbourhood_wraps_nowhere():
    image = render(one_source(200.0, 0.0), np.full((1, 1), 1e4), np.array([1.3]), 64, 1.0)
    assert np.all(image == 0)
    edge = render(one_source(31.9, 0.0), np.ones((1, 1)), np.array([1.3]), 64, 1.0)[0]
    assert edge[:, -2:].sum() > 0.3 and edge[:, :32].sum() < 1e-6


# --- camera ---


def test_cutouts_are_the_same_bytes_in_any_order():
    rows = population.draw_clusters(MockConfig(), 3, 5, "m")
    first, second = (MockSource(MockConfig(), GridConfig(n_pixels=32), 5) for _ in range(2))
    forward = [first.cutout(row) for row in rows]
    backward = [second.cutout(row) for row in rows[::-1]][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.flux.tobytes() == b.flux.tobytes() and a.sigma.tobytes() == b.sigma.tobytes()
    assert forward[0].flux.tobytes() != forward[1].flux.tobytes()


def test_bands_do_not_depend_on_which_others_are_kept():
    every, some = (
        MockSource(MockConfig(), GridConfig(n_pixels=32, bands=b), 5).cutout(cluster()) for b in ("ugriz", "gi")
    )
    assert np.allclose(every.flux[[1, 3]], some.flux, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n_pixels, width_arcsec", [(64, 25.344), (64, 200.0)])
def test_noise_is_what_sigma_says(n_pixels, width_arcsec, monkeypatch):
    monkeypatch.setattr("pix2mass.images.mock.source.SKY_RESIDUAL_SIGMA", 0.0)
    grid = GridConfig(n_pixels=n_pixels, width_arcsec=width_arcsec)
    a = MockSource(MockConfig(), grid, 1).cutout({"id": "b", "z": 0.2})
    scale = width_arcsec / n_pixels
    for band, flux, sigma in zip("ugriz", a.flux, a.sigma, strict=True):
        low, high = PIXEL_SIGMA_NMGY[band]
        assert low * 0.999 < sigma.min() / (scale / 0.396) < high * 1.001
        quiet = sigma < 1.02 * sigma.min()
        left, middle = np.percentile((flux / sigma)[quiet], [16, 50])
        assert middle - left == pytest.approx(1.0, abs=0.08)
    assert a.flux.dtype == np.float32 and not a.mask.any() and a.flags == 0


def test_the_picture_shows_the_cluster_in_the_middle():
    with_cluster = MockSource(CENTRED, GridConfig(), 1).cutout(cluster(mass=15.0, richness=150))
    blank = MockSource(CENTRED, GridConfig(), 1).cutout({"id": "c0", "z": 0.25})
    difference = (with_cluster.flux - blank.flux)[2]
    middle = slice(24, 40)
    # A sixteenth of the area holds more than three times its share.
    assert difference[middle, middle].sum() > 3 / 16 * difference.sum() > 0
    # Same camera, same field: the cutouts differ by the members alone, so corners are nearly equal.
    assert np.median(np.abs(difference[:6, :6])) < 0.5 * np.median(with_cluster.sigma[2, :6, :6])


def test_importing_the_package_does_not_import_torch():
    code = "import pix2mass.images.mock, pix2mass.images.mock.source, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
