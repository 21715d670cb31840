"""The renderer: flux, profiles, PSF and pixels, against numerical integration and against GalSim."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from scipy.special import erf, gammainc, gammaincinv

from pix2mass.images.mock.population import Sources
from pix2mass.images.mock.render import PSF_COMPONENTS, psf_fwhm_per_sigma, render

SIGMA_R_NMGY = 0.027
"""Sky noise of native r pixels."""
EDGE_R50 = {1: 4.0, 4: 8.0}
SCALE, FWHM = 0.396, 1.3


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
    sigma = fwhm / psf_fwhm_per_sigma()
    x = (np.arange(128) + 0.5 - 64.5) * scale
    variance = (image.sum(axis=0) * x**2).sum() / image.sum()
    expected = sigma**2 * sum(share * ratio**2 for share, ratio in PSF_COMPONENTS)
    assert variance == pytest.approx(expected + scale**2 / 12, rel=0.02)


@pytest.mark.parametrize("angle", [0.0, 30.0, 45.0, 110.0])
@pytest.mark.parametrize("scale", [0.4, 1.6])
def test_elongated_galaxies_are_drawn_as_on_a_fine_grid(angle, scale):
    galaxy = one_source(1.1, -0.7, r50=2.5, axis_ratio=0.25, angle=angle, n=1)
    split = 8
    flux = np.full((1, 1), 300.0)
    fine = render(galaxy, flux, np.array([1.2]), 48 * split, scale / split)[0]
    coarse = render(galaxy, flux, np.array([1.2]), 48, scale)[0]
    expected = fine.reshape(48, split, 48, split).sum(axis=(1, 3))
    assert np.abs(coarse - expected).max() < 0.002 * expected.max()


def test_a_bright_source_far_outside_adds_nothing_and_its_neighbourhood_wraps_nowhere():
    image = render(one_source(200.0, 0.0), np.full((1, 1), 1e4), np.array([1.3]), 64, 1.0)
    assert np.all(image == 0)
    edge = render(one_source(31.9, 0.0), np.ones((1, 1)), np.array([1.3]), 64, 1.0)[0]
    assert edge[:, -2:].sum() > 0.3 and edge[:, :32].sum() < 1e-6


def two_sources() -> tuple[Sources, np.ndarray]:
    """A faint disk and a large bright spheroid, off the centre."""
    parts = one_source(3.0, -2.0, r50=0.8, axis_ratio=0.4, angle=70.0, n=1), one_source(-9.0, 4.0, 9.0, 0.6, 20.0, 4)
    columns = {f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Sources)}
    return Sources(**columns), np.array([[3.0, 5.0], [900.0, 1200.0]])


def integrated(n: int, r50: float, axis_ratio: float, angle: float, pixels: int, scale: float) -> np.ndarray:
    """A galaxy of unit flux by brute force: very many points on rings, each carrying the light that the truncated
    profile has there, blurred by the PSF and integrated over pixels."""
    b_n = gammaincinv(2 * n, 0.5)
    untruncated = r50 / (gammaincinv(2 * n, 0.5 * gammainc(2 * n, b_n * EDGE_R50[n] ** (1 / n))) / b_n) ** n
    edges = untruncated * np.concatenate([[0.0], np.geomspace(1e-4, 0.05, 60), np.linspace(0.05, EDGE_R50[n], 400)[1:]])
    light = np.diff(gammainc(2 * n, b_n * (edges / untruncated) ** (1 / n)))
    radius = (edges[1:] + edges[:-1])[:, None] / 2
    phase = 2 * np.pi * (np.arange(120) + 0.5) / 120 + np.arange(len(radius))[:, None]
    along, across = radius * np.cos(phase), axis_ratio * radius * np.sin(phase)
    turn = np.radians(angle)
    x = (along * np.cos(turn) - across * np.sin(turn)).ravel()
    y = (along * np.sin(turn) + across * np.cos(turn)).ravel()
    weight = np.repeat(light / light.sum() / 120, 120)
    walls = (np.arange(pixels + 1) - pixels / 2)[:, None] * scale
    image = np.zeros((pixels, pixels))
    for share, ratio in PSF_COMPONENTS:
        width = np.sqrt(2) * ratio * FWHM / psf_fwhm_per_sigma()
        columns, rows = (np.diff(erf((walls - place) / width), axis=0) / 2 for place in (x, y))
        image += share * (rows * weight) @ columns.T
    return image


@pytest.mark.parametrize("scale", [SCALE, 3.2])
@pytest.mark.parametrize("axis_ratio", [1.0, 0.3])
@pytest.mark.parametrize("n", [1, 4])
def test_bright_galaxies_are_right_to_a_tenth_of_the_noise(n, axis_ratio, scale):
    flux, pixels = 158.0, 40  # r = 17
    galaxy = one_source(r50=1.0, axis_ratio=axis_ratio, angle=35.0, n=n)
    image = render(galaxy, np.full((1, 1), flux), np.array([FWHM]), pixels, scale)[0]
    expected = flux * integrated(n, 1.0, axis_ratio, 35.0, pixels, scale)
    assert np.abs(image - expected).max() < 0.1 * SIGMA_R_NMGY * scale / SCALE
    assert image.sum() == pytest.approx(expected.sum(), rel=0.003)


@pytest.mark.parametrize("flux", [0.8, 6.0, 40.0])
@pytest.mark.parametrize("n", [1, 4])
def test_faint_galaxies_are_drawn_more_cheaply_and_still_below_the_noise(n, flux):
    galaxy = one_source(r50=0.6, axis_ratio=0.5, angle=120.0, n=n)
    image = render(galaxy, np.full((1, 1), flux), np.array([FWHM]), 40, SCALE)[0]
    expected = flux * integrated(n, 0.6, 0.5, 120.0, 40, SCALE)
    assert np.abs(image - expected).max() < 0.1 * SIGMA_R_NMGY
    assert image.sum() == pytest.approx(expected.sum(), rel=0.005)


@pytest.mark.parametrize("n", [1, 4])
def test_agrees_with_galsim(n):
    galsim = pytest.importorskip("galsim")
    b_n = gammaincinv(2 * n, 0.5)
    r50, axis_ratio, angle, flux = 1.3, 0.6, 50.0, 100.0
    untruncated = r50 / (gammaincinv(2 * n, 0.5 * gammainc(2 * n, b_n * EDGE_R50[n] ** (1 / n))) / b_n) ** n
    profile = galsim.Sersic(
        n, half_light_radius=r50 * axis_ratio**0.5, trunc=EDGE_R50[n] * untruncated * axis_ratio**0.5, flux=flux
    ).shear(q=axis_ratio, beta=angle * galsim.degrees)
    sigma = FWHM / psf_fwhm_per_sigma()
    psf = galsim.Add([galsim.Gaussian(sigma=sigma * ratio, flux=share) for share, ratio in PSF_COMPONENTS])
    expected = galsim.Convolve(profile, psf).drawImage(nx=64, ny=64, scale=SCALE, dtype=float).array
    galaxy = one_source(r50=r50, axis_ratio=axis_ratio, angle=angle, n=n)
    image = render(galaxy, np.full((1, 1), flux), np.array([FWHM]), 64, SCALE)[0]
    assert np.abs(image - expected).max() < 0.1 * SIGMA_R_NMGY
    assert image.sum() == pytest.approx(expected.sum(), rel=0.003)


def test_a_rectangle_is_a_crop_of_a_square():
    sources, flux = two_sources()
    psf = np.array([1.3, 1.5])
    square = render(sources, flux, psf, 120, SCALE)
    rectangle = render(sources, flux, psf, (60, 100), SCALE)
    assert rectangle.shape == (2, 60, 100)
    # Which pixels far from the centre are left out depends on the picture's size, by less than the error allowed.
    assert np.allclose(rectangle, square[:, 30:90, 10:110], atol=0.1 * SIGMA_R_NMGY)
    assert np.abs(rectangle).max() > 1.0


@pytest.mark.parametrize("components", [((1.0, 1.0),), PSF_COMPONENTS, ((0.7, 1.0), (0.25, 2.0), (0.05, 5.0))])
def test_psf_of_any_number_of_gaussians_has_the_stated_width(components):
    scale, fwhm = 0.05, 1.3
    star = one_source()
    image = render(star, np.full((1, 1), 1e4), np.array([fwhm]), 201, scale, psf_components=components)[0]
    row = image[100, 100:].astype(float)
    half = np.interp(0.5, row[::-1] / row[0], np.arange(len(row))[::-1])
    assert 2 * half * scale == pytest.approx(fwhm, rel=0.01)


def test_a_picture_depends_on_its_own_sources_alone():
    sources, flux = two_sources()
    psf = np.array([1.3, 1.5])
    before = render(sources, flux, psf, 64, SCALE)
    render(one_source(1.0, 1.0, 3.0, n=4), np.ones((1, 2)), psf, 300, SCALE)
    assert render(sources, flux, psf, 64, SCALE).tobytes() == before.tobytes()
    assert not render(sources[:0], flux[:0], psf, 64, SCALE).any()
