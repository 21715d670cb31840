"""From sources to pixels: sums of Gaussians, convolved with a double-Gaussian PSF and integrated over pixels, in torch.

Every profile is a sum of elliptical Gaussians (Hogg & Lang 2013, PASP 125, 719). The integral of a round Gaussian
over a pixel is a product of error functions, exact at any pixel scale. An elongated Gaussian is a round one of its
minor width smeared along its major axis; the smear is replaced by a few round Gaussians in a row, as many as the
pixels and the roundness require. No other approximation is made but the cut of each Gaussian at ``CUT_SIGMA``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.special import gammaincinv

from pix2mass.images.mock.population import Sources

CUT_SIGMA = 4.0
"""Gaussians are cut at this many standard deviations: 1.3e-4 of the flux falls outside."""

PSF_WING_SHARE, PSF_WING_RATIO = 0.2, 2.2
"""Share of the light in the PSF's second Gaussian and its width over the first's: of the double Gaussians that
psField gives for field 94-1-0012 in the five bands (peak ratio 0.045-0.068, width ratio 2.0-2.3)."""

PSF_FWHM_PER_SIGMA = 2.43
"""Full width at half maximum of that double Gaussian over the width of its first Gaussian."""

_TRUNCATION_R50 = {1: 4.0, 4: 8.0}
"""Radius, in half-light radii, at which SDSS cuts its exponential and de Vaucouleurs models (Stoughton et al. 2002,
AJ 123, 485, smoothly from 3 and 7)."""

_WIDTHS_R50 = {1: np.geomspace(0.12, 1.6, 6), 4: np.geomspace(0.02, 4.5, 8)}
"""Standard deviations, in half-light radii, offered to the fits."""

_NUMBERS_PER_CHUNK = 4_000_000
"""Largest number of values of stamps held in memory at once."""


@cache
def sersic_mixture(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A Sersic profile, truncated, as a sum of round Gaussians.

    Non-negative least squares of the surface brightness I(r) = exp(-b_n r^(1/n)) (Sersic 1968; b_n from Ciotti 1991,
    A&A 249, 99), each radius weighted by r so that the errors of flux are what is small, then rescaled to the
    half-light radius and to unit flux.

    Args:
        n: Sersic index, 1 or 4.

    Returns:
        Shares of the flux and standard deviations in half-light radii, each of shape (k,).
    """
    edge = _TRUNCATION_R50[n]
    b_n = gammaincinv(2 * n, 0.5)
    radius = np.geomspace(0.004, 1.5 * edge, 800)
    profile = np.where(radius < edge, np.exp(-b_n * (radius ** (1 / n) - 1)), 0.0)
    widths = _WIDTHS_R50[n]
    weight = radius * np.sqrt(np.gradient(np.log(radius)))
    basis = np.exp(-0.5 * (radius[:, None] / widths) ** 2) / (2 * np.pi * widths**2)
    shares, _ = nnls(basis * weight[:, None], profile * weight)
    kept = shares > 0
    shares, widths = shares[kept] / shares.sum(), widths[kept]
    enclosed = 1 - (shares * np.exp(-0.5 * (radius[:, None] / widths) ** 2)).sum(axis=1)
    return shares, widths / np.interp(0.5, enclosed, radius)


def render(
    sources: Sources,
    flux: np.ndarray,
    psf_fwhm_arcsec: np.ndarray,
    n_pixels: int,
    pixel_scale_arcsec: float,
    device: str = "cpu",
) -> np.ndarray:
    """Draw sources without noise.

    Args:
        sources: positions and shapes of n sources; the origin is the middle of the picture.
        flux: (n, n_bands) total fluxes, in any unit.
        psf_fwhm_arcsec: (n_bands,) PSF widths.
        n_pixels: pixels on a side.
        pixel_scale_arcsec: size of a pixel.
        device: torch device.

    Returns:
        (n_bands, n_pixels, n_pixels) float32 flux per pixel; rows go north, columns west.
    """
    gaussians = _elementary_gaussians(sources, pixel_scale_arcsec, float(psf_fwhm_arcsec.min()))
    owner, share, x, y, variance_x, variance_y = gaussians
    psf_sigma = psf_fwhm_arcsec / PSF_FWHM_PER_SIGMA / pixel_scale_arcsec
    image = torch.zeros((n_pixels, n_pixels, flux.shape[1]), device=device)
    for psf_share, ratio in ((1 - PSF_WING_SHARE, 1.0), (PSF_WING_SHARE, PSF_WING_RATIO)):
        smear = (ratio * psf_sigma) ** 2
        widest = np.sqrt(np.maximum(variance_x, variance_y) + smear.max())
        reach = np.ceil(CUT_SIGMA * widest + 0.5).astype(int)
        # Stamps of a few sizes; beyond a tenth of the picture a product of matrices is faster than a stamp.
        sizes = [r for r in (1, 2, 3, 4, 6, 9, 14, 21, 32, 48) if r <= n_pixels // 10] + [n_pixels]
        bins = np.minimum(np.searchsorted(sizes, reach), len(sizes) - 1)
        for index, size in enumerate(sizes):
            chosen = np.flatnonzero(bins == index)
            middle = n_pixels / 2
            limit = middle + np.minimum(reach[chosen], size)
            seen = (np.abs(x[chosen]) < limit) & (np.abs(y[chosen]) < limit)
            chosen = chosen[seen]
            numbers_each = flux.shape[1] * (4 * n_pixels if size == n_pixels else (2 * size + 1) ** 2)
            per_chunk = max(1, _NUMBERS_PER_CHUNK // numbers_each)
            for start in range(0, len(chosen), per_chunk):
                part = chosen[start : start + per_chunk]
                _add_stamps(
                    image,
                    size,
                    *(
                        torch.as_tensor(np.asarray(array, np.float32), device=device)
                        for array in (
                            x[part] + middle,
                            y[part] + middle,
                            variance_x[part, None] + smear,
                            variance_y[part, None] + smear,
                            psf_share * share[part, None] * flux[owner[part]],
                        )
                    ),
                )
    return image.permute(2, 0, 1).contiguous().cpu().numpy()


def _elementary_gaussians(sources: Sources, pixel_scale_arcsec: float, psf_fwhm_arcsec: float) -> tuple:
    """All sources as axis-parallel Gaussians before the PSF, in pixels: owner, share, x, y, variance in x and in y."""
    r50 = sources.r50_arcsec / pixel_scale_arcsec
    psf_sigma = psf_fwhm_arcsec / PSF_FWHM_PER_SIGMA / pixel_scale_arcsec
    owners, shares, widths = [], [], []
    # Where the half-light radius is below a tenth of what blurs it, one Gaussian of that radius does: r50 = 1.177
    # sigma.
    small = (r50 < 0.1 * np.hypot(0.5, psf_sigma)) | (sources.sersic_n == 0)
    for n, chosen in ((0, small), (1, ~small & (sources.sersic_n == 1)), (4, ~small & (sources.sersic_n == 4))):
        share, width = (np.ones(1), np.ones(1) / 1.177) if n == 0 else sersic_mixture(n)
        index = np.flatnonzero(chosen)
        owners.append(np.repeat(index, len(share)))
        shares.append(np.tile(share, len(index)))
        widths.append((r50[index, None] * width).ravel())
    owner, share, major = np.concatenate(owners), np.concatenate(shares), np.concatenate(widths)

    # A Gaussian of widths (major, minor) is a round one of width minor smeared along the major axis.
    minor = major * sources.axis_ratio[owner]
    smear = np.sqrt(np.maximum(major**2 - minor**2, 0))
    round_width = np.sqrt(minor**2 + psf_sigma**2)
    blur = np.maximum(round_width, 0.5)
    cosine, sine = (f(np.radians(sources.angle_deg[owner])) for f in (np.cos, np.sin))
    x, y = sources.x_arcsec[owner] / pixel_scale_arcsec, sources.y_arcsec[owner] / pixel_scale_arcsec

    # Short smears: only their variances in x and y count. Middling ones: the three Gauss-Hermite nodes, right to the
    # fifth moment. Long ones: nodes at steps of the blur out to three standard deviations.
    short = smear < 0.25 * blur
    middling = ~short & (smear < 1.0 * blur)
    parts = [
        (owner[short], share[short], x[short], y[short])
        + tuple((minor**2 + (smear * axis) ** 2)[short] for axis in (cosine, sine))
    ]
    step_count = np.where(middling, 1, np.ceil(3 * smear / blur)).astype(int)
    index = np.flatnonzero(~short)
    nodes_each = 2 * step_count[index] + 1
    row = np.repeat(index, nodes_each)
    node = np.arange(len(row)) - np.repeat(np.cumsum(nodes_each) - nodes_each, nodes_each) - step_count[row]
    spacing = np.where(middling[row], np.sqrt(3.0), 3.0 / step_count[row])
    weight = np.where(middling[row], np.where(node == 0, 2 / 3, 1 / 6), np.exp(-0.5 * (node * spacing) ** 2))
    weight = weight / np.bincount(row, weight, minlength=len(owner))[row] if len(row) else weight
    along = node * spacing * smear[row]
    parts.append(
        (
            owner[row],
            share[row] * weight,
            x[row] + along * cosine[row],
            y[row] + along * sine[row],
            minor[row] ** 2,
            minor[row] ** 2,
        )
    )
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _add_stamps(
    image: torch.Tensor,
    reach: int,
    x: torch.Tensor,
    y: torch.Tensor,
    variance_x: torch.Tensor,
    variance_y: torch.Tensor,
    flux: torch.Tensor,
) -> None:
    """Add Gaussians to the image, each within ``reach`` pixels of the pixel that holds its centre.

    Args:
        image: (n_pixels, n_pixels, n_bands), changed in place.
        reach: half-width of the stamps.
        x: (m,) centres, in pixels from the left edge of the picture.
        y: (m,) centres from the bottom edge.
        variance_x: (m, n_bands) in pixels squared.
        variance_y: (m, n_bands).
        flux: (m, n_bands).
    """
    n_pixels, n_bands = image.shape[0], image.shape[2]
    if reach >= n_pixels:
        # Integrals over every row and every column: the picture is one matrix product per band.
        edges = torch.arange(n_pixels + 1, device=image.device, dtype=torch.float32)
        rows = _cell_integrals(edges.expand(len(y), -1) - y[:, None], variance_y)
        columns = _cell_integrals(edges.expand(len(x), -1) - x[:, None], variance_x)
        drawn = torch.bmm((rows * flux[:, :, None]).permute(1, 2, 0), columns.permute(1, 0, 2))
        image += drawn.permute(1, 2, 0)
        return
    steps = torch.arange(2 * reach + 2, device=image.device)
    left, bottom = x.floor().long() - reach, y.floor().long() - reach
    columns = _cell_integrals((left[:, None] + steps) - x[:, None], variance_x)
    rows = _cell_integrals((bottom[:, None] + steps) - y[:, None], variance_y) * flux[:, :, None]
    stamps = rows.transpose(1, 2)[:, :, None, :] * columns.transpose(1, 2)[:, None, :, :]
    padded = n_pixels + 4 * reach + 2
    canvas = torch.zeros((padded * padded, n_bands), device=image.device)
    shift = 2 * reach
    place = (bottom[:, None] + steps[:-1] + shift)[:, :, None] * padded + (left[:, None] + steps[:-1] + shift)[:, None]
    canvas.index_add_(0, place.reshape(-1), stamps.reshape(-1, n_bands))
    image += canvas.view(padded, padded, n_bands)[shift : shift + n_pixels, shift : shift + n_pixels]


def _cell_integrals(edges: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Integrals of unit Gaussians about 0 between edges (m, k + 1), per band: (m, n_bands, k)."""
    return torch.erf(edges[:, None, :] / (2 * variance).sqrt()[:, :, None]).diff(dim=2).mul_(0.5)
