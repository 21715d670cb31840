"""From sources to pixels: sums of Gaussians, convolved with the PSF's Gaussians and integrated over pixels, in torch.

Every profile is a sum of elliptical Gaussians (Hogg & Lang 2013, PASP 125, 719). The integral of a round Gaussian
over a pixel is a product of error functions, exact at any pixel scale. An elongated Gaussian is a round one of its
minor width smeared along its major axis; the smear is replaced by a few round Gaussians in a row. How many Gaussians
stand for a profile, how many for a smear, and how far each is drawn depends on the flux of the source, so that each of
the three errs by no more than about ``ERROR_NMGY``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import erfcinv, gammainc, gammaincinv, i0e

from pix2mass.images.mock.population import Sources
from pix2mass.types import SDSS_PIXEL_SCALE_ARCSEC

ERROR_NMGY = 7.5e-4
"""Error allowed in a native pixel of 0.396": 5% of the lowest sky noise of the quietest band. In other pixels it grows
with their side, as the sky noise does."""

FLUX_LOST = 2.5e-3
"""Share of the flux that may fall off the edge of a Gaussian that holds all of it; of one that holds a share s, the
square root of s times as much."""

MIN_AXIS_RATIO = 0.1
"""Flatter sources are drawn with this axis ratio."""

PSF_COMPONENTS = ((0.8, 1.0), (0.2, 2.2))
"""Share of the light and width over the first one's width of the PSF's Gaussians: of the double Gaussians that psField
gives for field 94-1-0012 in the five bands (peak ratio 0.045-0.068, width ratio 2.0-2.3)."""

TRUNCATION_R50 = {1: 4.0, 4: 8.0}
"""Radius, in half-light radii of the profile without an edge, at which SDSS cuts its exponential and de Vaucouleurs
models (Stoughton et al. 2002, AJ 123, 485, smoothly from 3 and 7)."""

_PIXEL_BLUR = 0.25
"""Width of a Gaussian, in pixels, that smooths no more than a pixel does (standard deviation 0.29)."""

_SIDES = (3, 5, 7, 9, 11, 13, 15, 17, 19, 22, 25, 28, 32, 37, 43, 50, 64, 80, 100, 128, 160, 200, 256, 320, 400, 512)
"""Sides of the stamps, in pixels."""

_SMALL_SIDE, _BLOCK = 9, 8
"""In larger stamps this many Gaussians of one source share a stamp: one product of matrices."""

_NUMBERS_PER_CHUNK = 500_000
"""Largest number of values of stamps held in memory at once."""


# --- shapes as sums of Gaussians --------------------------------------------------------------------------------------


class _Fits(NamedTuple):
    """Fits of one shape with few or many terms, each for use after at least a certain blur.

    Attributes:
        blur: (n_blurs,) widths of the blur, ascending, in units of the shape's own size.
        error: (n_blurs, n_levels) largest error of the blurred shape.
        start: (n_blurs, n_levels) where the terms of a fit begin in ``weight`` and ``place``.
        count: (n_blurs, n_levels) number of its terms.
        weight: (n,) weights, of sum one in each fit.
        place: (n,) widths or positions of the terms, in units of the shape's own size.
    """

    blur: np.ndarray
    error: np.ndarray
    start: np.ndarray
    count: np.ndarray
    weight: np.ndarray
    place: np.ndarray

    @classmethod
    def make(cls, blur: np.ndarray, fits: list[list[tuple[float, np.ndarray, np.ndarray]]]) -> _Fits:
        """From error, weights and places of each fit: a list per blur, all of one length."""
        flat = [fit for levels in fits for fit in levels]
        count = np.array([len(weight) for _, weight, _ in flat])
        table = [fit[0] for fit in flat], np.cumsum(count) - count, count
        error, start, count = (np.reshape(values, (len(blur), -1)) for values in table)
        return cls(blur, error, start, count, *(np.concatenate([fit[k] for fit in flat]) for k in (1, 2)))

    def expand(self, blur: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index of the shape, weight and place of every term, for m shapes with blurs (m,) and errors allowed (m,)."""
        row = np.maximum(np.searchsorted(self.blur, blur, side="right") - 1, 0)
        good = self.error[row] <= error[:, None]
        level = np.where(good.any(axis=1), good.argmax(axis=1), good.shape[1] - 1)
        start, count = self.start[row, level], self.count[row, level]
        shape = np.repeat(np.arange(len(row)), count)
        term = np.arange(len(shape)) + np.repeat(start + count - np.cumsum(count), count)
        return shape, self.weight[term], self.place[term]


def _least_squares(basis: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """Largest error and coefficients, of sum one, of the fit of basis (m, k) to target (m,) with weights (m,).

    A slight penalty on the squares of the coefficients keeps them from growing with opposite signs.
    """
    k = basis.shape[1]
    scale = weight.max() * target.max()
    matrix = np.concatenate([basis * weight[:, None], np.full((1, k), 10 * scale), 1e-5 * scale * np.eye(k)])
    coefficients = np.linalg.lstsq(matrix, np.concatenate([target * weight, [10 * scale], np.zeros(k)]), rcond=None)[0]
    coefficients /= coefficients.sum()
    return float(np.abs(basis @ coefficients - target).max()), coefficients


def half_light_over_untruncated(n: int) -> float:
    """Half-light radius of a Sersic profile cut at ``TRUNCATION_R50`` over that of the whole profile."""
    b_n = gammaincinv(2 * n, 0.5)
    return float((gammaincinv(2 * n, 0.5 * gammainc(2 * n, b_n * TRUNCATION_R50[n] ** (1 / n))) / b_n) ** n)


@cache
def sersic_fits(n: int) -> _Fits:
    """A truncated Sersic profile as sums of 1 to 18 round Gaussians.

    Least squares of the surface brightness I(r) = exp(-b_n r^(1/n)) (Sersic 1968; b_n from Ciotti 1991, A&A 249, 99)
    after a round Gaussian blur: the more blur, the fewer Gaussians are needed. Any further blur lowers the error.
    Shares may be negative, as the sharp edge needs it.

    Args:
        n: Sersic index, 1 or 4.

    Returns:
        Fits in units of the half-light radius of the profile as truncated; errors per unit of flux.
    """
    b_n, half = gammaincinv(2 * n, 0.5), half_light_over_untruncated(n)
    edge = TRUNCATION_R50[n] / half
    blurs = np.geomspace(0.02, 20.0, 14)
    fits = []
    for blur in blurs:
        # The profile as thin rings, each blurred.
        step = min(blur, 0.5) / 12
        rings = np.concatenate([np.geomspace(1e-5, step, 40), np.arange(2 * step, edge, step), [edge]])
        light = np.diff(gammainc(2 * n, b_n * (rings * half) ** (1 / n)), prepend=0.0)
        middle = rings - np.diff(rings, prepend=0.0) / 2
        radius = np.linspace(0, 1, 90) ** 2 * (edge + 4 * blur)
        blurred = np.exp(-0.5 * ((radius[:, None] - middle) / blur) ** 2) * i0e(radius[:, None] * middle / blur**2)
        target = blurred @ light / light.sum() / (2 * np.pi * blur**2)
        levels = []
        for k in (1, 2, 3, 4, 6, 9, 13, 18):
            if k == 1:
                candidates = [np.array([width]) for width in edge * np.geomspace(0.08, 0.4, 40)]
            else:
                narrowest, widest = np.geomspace(np.clip(0.15 * blur, 0.004, 0.1), 0.6, 7), (0.15, 0.25, 0.37, 0.55)
                candidates = [np.geomspace(low, high * edge, k) for low in narrowest for high in widest]
            best: tuple = (np.inf,)
            for widths in candidates:
                variance = widths**2 + blur**2
                basis = np.exp(-0.5 * radius[:, None] ** 2 / variance) / (2 * np.pi * variance)
                error, shares = _least_squares(basis, target, np.sqrt(radius + 0.05 * blur))
                # Broad Gaussians of opposite signs may hold light far outside.
                spilt = float(shares @ np.exp(-0.5 * (edge + 3 * blur) ** 2 / variance))
                error *= 1 + (spilt / 5e-4) ** 2
                if error < best[0]:
                    best = (error, shares, widths)
            levels.append(best)
        fits.append(levels)
    return _Fits.make(blurs, fits)


@cache
def smear_fits() -> _Fits:
    """A Gaussian smear along a line as 3 to 57 equally spaced points on it.

    Least squares of the smear after a Gaussian blur.

    Returns:
        Fits in units of the smear's width; errors in units of the peak.
    """
    blurs = np.geomspace(0.1, 6.7, 15)
    fits = []
    for blur in blurs:
        x = np.linspace(0, 5 * np.hypot(1, blur), 80)
        target = np.exp(-0.5 * x**2 / (1 + blur**2))
        levels = []
        for k in (1, 2, 3, 4, 5, 7, 10, 14, 20, 28):
            best: tuple = (np.inf,)
            for step in np.linspace(0.5, 2.0, 16) * min(blur, 1.0):
                place = step * np.arange(k + 1)
                basis = sum(np.exp(-0.5 * ((x[:, None] + sign * place) / blur) ** 2) for sign in (-1, 1))
                error, weight = _least_squares(basis * np.hypot(1, blur) / (2 * blur), target, np.ones(len(x)))
                if error < best[0]:
                    weights = np.concatenate([weight[:0:-1] / 2, weight[:1], weight[1:] / 2])
                    best = (error, weights, np.concatenate([-place[:0:-1], place]))
            levels.append(best)
        fits.append(levels)
    return _Fits.make(blurs, fits)


@cache
def psf_fwhm_per_sigma(psf_components: tuple[tuple[float, float], ...] = PSF_COMPONENTS) -> float:
    """Full width at half maximum of a sum of round Gaussians over the width of the first.

    Args:
        psf_components: share of the light and width over the first one's width, for each Gaussian.
    """
    share, ratio = np.array(psf_components, float).T
    peaks = share / ratio**2

    def above_half(radius: float) -> float:
        return float((peaks * (np.exp(-0.5 * (radius / ratio) ** 2) - 0.5)).sum())

    return 2 * float(brentq(above_half, 0.0, 2 * ratio.max()))  # type: ignore[arg-type]


# --- pictures ---------------------------------------------------------------------------------------------------------


def render(
    sources: Sources,
    flux: np.ndarray,
    psf_fwhm_arcsec: np.ndarray,
    n_pixels: int | tuple[int, int],
    pixel_scale_arcsec: float,
    *,
    psf_components: tuple[tuple[float, float], ...] = PSF_COMPONENTS,
    device: str = "cpu",
) -> np.ndarray:
    """Draw sources without noise.

    Args:
        sources: positions and shapes of n sources; the origin is the middle of the picture.
        flux: (n, n_bands) total fluxes in nanomaggies: the brighter a source, the more accurately it is drawn.
        psf_fwhm_arcsec: (n_bands,) full widths at half maximum of the PSF.
        n_pixels: pixels on a side, or (rows, columns).
        pixel_scale_arcsec: size of a pixel.
        psf_components: the PSF as round Gaussians, the same in all bands but for their common width: share of the
            light and width over the first one's width, for each.
        device: torch device.

    Returns:
        (n_bands, rows, columns) float32 flux per pixel; rows go north, columns west.
    """
    shape = (n_pixels, n_pixels) if isinstance(n_pixels, int) else n_pixels
    error = ERROR_NMGY * pixel_scale_arcsec / SDSS_PIXEL_SCALE_ARCSEC
    psf_sigma = psf_fwhm_arcsec / psf_fwhm_per_sigma(psf_components) / pixel_scale_arcsec
    brightest = np.abs(flux).max(axis=1)
    psf_shares, ratios = np.array(sorted(psf_components, key=lambda component: component[1]), float).T
    shares = np.tile(psf_shares, (len(brightest), 1))
    # Wings too faint to be seen go to the next narrower Gaussian, where their light is still below the error.
    for k in range(len(ratios) - 1, 0, -1):
        area = 2 * np.pi * ((ratios[k - 1] * psf_sigma.min()) ** 2 + _PIXEL_BLUR**2)
        unseen = shares[:, k] * brightest < error * area
        shares[unseen, k - 1] += shares[unseen, k]
        shares[unseen, k] = 0.0
    parts = []
    for k, ratio in enumerate(ratios):
        index = np.flatnonzero(shares[:, k])
        owner, share, *geometry = _axis_parallel_gaussians(
            sources[index],
            shares[index, k] * brightest[index],
            pixel_scale_arcsec,
            ratio * float(psf_sigma.min()),
            error,
        )
        owner = index[owner]
        parts.append((owner, shares[owner, k] * share, *geometry, np.full(len(owner), ratio)))
    gaussians = _Gaussians(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    # A Gaussian is drawn to where it falls below the error, and at least until little of the flux is missing.
    widest = np.sqrt(np.maximum(gaussians.variance_x, gaussians.variance_y) + (gaussians.ratio * psf_sigma.max()) ** 2)
    share = np.maximum(np.abs(gaussians.share), 1e-9)
    peak = share * brightest[gaussians.owner] / (2 * np.pi * (widest**2 + _PIXEL_BLUR**2))
    cut_sigma = np.maximum(
        np.sqrt(2 * np.log(np.maximum(peak / error, 1.0))),
        np.sqrt(2) * erfcinv(np.minimum(FLUX_LOST / np.sqrt(share), 0.1)),
    )
    reach = np.ceil(cut_sigma * widest).astype(int)
    x, y = gaussians.x + shape[1] / 2, gaussians.y + shape[0] / 2
    seen = (x > -reach) & (x < shape[1] + reach) & (y > -reach) & (y < shape[0] + reach)
    if not seen.any():
        return np.zeros((flux.shape[1], *shape), np.float32)
    gaussians = _Gaussians(*(column[seen] for column in gaussians._replace(x=x, y=y)))
    return _draw(gaussians, reach[seen], flux, psf_sigma, shape, device)


class _Gaussians(NamedTuple):
    """Gaussians, each to be blurred by one of the PSF's, in columns (m,), in pixels: source, share of its flux, centre,
    variances before the PSF, width of the PSF's Gaussian over that of its first."""

    owner: np.ndarray
    share: np.ndarray
    x: np.ndarray
    y: np.ndarray
    variance_x: np.ndarray
    variance_y: np.ndarray
    ratio: np.ndarray


def _axis_parallel_gaussians(
    sources: Sources, flux: np.ndarray, pixel_scale_arcsec: float, psf_sigma: float, error: float
) -> tuple[np.ndarray, ...]:
    """The first six columns of ``_Gaussians`` for all sources, about the middle of the picture.

    Args:
        sources: n sources.
        flux: (n,) flux of each, which decides how accurately it is drawn.
        pixel_scale_arcsec: size of a pixel.
        psf_sigma: width of the Gaussian that will blur them, in pixels.
        error: error allowed in a pixel.
    """
    axis_ratio = np.maximum(sources.axis_ratio, MIN_AXIS_RATIO)
    point = (sources.sersic_n == 0) | (sources.r50_arcsec == 0)
    owners, shares, widths = [np.flatnonzero(point)], [np.ones(point.sum())], [np.zeros(point.sum())]
    for n in (1, 4):
        index = np.flatnonzero(~point & (sources.sersic_n == n))
        r50 = sources.r50_arcsec[index] / pixel_scale_arcsec
        blur = np.hypot(psf_sigma, _PIXEL_BLUR) / r50
        # Surface brightness goes as flux / r50^2, over the axis ratio unless blur has made the source round.
        roundness = np.maximum(axis_ratio[index], np.minimum(blur, 1.0))
        shape, share, width = sersic_fits(n).expand(blur, error * roundness * r50**2 / np.maximum(flux[index], 1e-30))
        owners.append(index[shape])
        shares.append(share)
        widths.append(width * r50[shape])
    owner, share, major = np.concatenate(owners), np.concatenate(shares), np.concatenate(widths)

    # A Gaussian of widths (major, minor) is a round one of width minor smeared along the major axis.
    minor = major * axis_ratio[owner]
    smear = np.sqrt(np.maximum(major**2 - minor**2, 0.0))
    angle = np.radians(sources.angle_deg[owner])
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = sources.x_arcsec[owner] / pixel_scale_arcsec, sources.y_arcsec[owner] / pixel_scale_arcsec
    blur_squared = minor**2 + psf_sigma**2 + _PIXEL_BLUR**2
    peak = np.abs(share) * flux[owner] / (2 * np.pi * np.sqrt(blur_squared * (blur_squared + smear**2)))
    allowed = error / np.maximum(peak, 1e-30)
    # Where x and y are hardly correlated, the smear only adds to their variances: what is left out of a Gaussian of
    # correlation c is c / e of its peak to first order.
    added = (smear * cosine) ** 2, (smear * sine) ** 2
    correlation = np.sqrt(added[0] * added[1] / ((blur_squared + added[0]) * (blur_squared + added[1])))
    single = 0.4 * correlation + correlation**2 <= allowed
    row = np.flatnonzero(~single)
    point, weight, place = smear_fits().expand(np.sqrt(blur_squared[row]) / smear[row], allowed[row])
    row = row[point]
    along = place * smear[row]
    return (
        np.concatenate([owner[single], owner[row]]),
        np.concatenate([share[single], share[row] * weight]),
        np.concatenate([x[single], x[row] + along * cosine[row]]),
        np.concatenate([y[single], y[row] + along * sine[row]]),
        np.concatenate([(minor**2 + added[0])[single], minor[row] ** 2]),
        np.concatenate([(minor**2 + added[1])[single], minor[row] ** 2]),
    )


def _draw(
    gaussians: _Gaussians,
    reach: np.ndarray,
    flux: np.ndarray,
    psf_sigma: np.ndarray,
    shape: tuple[int, int],
    device: str,
) -> np.ndarray:
    """Add up Gaussians, x and y counted from the picture's lower left corner.

    Args:
        gaussians: m of them, m > 0.
        reach: (m,) pixels to which each is drawn.
        flux: (n, n_bands) of the sources.
        psf_sigma: (n_bands,) width of the PSF's first Gaussian in pixels.
        shape: rows and columns.
        device: torch device.

    Returns:
        (n_bands, rows, columns).
    """
    owner, share, x, y, variance_x, variance_y, ratio = gaussians
    n_bands = len(psf_sigma)
    # Large Gaussians of one source and of like extent share a stamp, a few at a time: a block.
    extent = np.ceil(0.5 * np.log2((2 * reach + 1) / _SMALL_SIDE)).clip(0).astype(int)
    order = np.lexsort((extent, owner))
    group = (owner * (extent.max() + 1) + extent)[order]
    first = np.flatnonzero(np.diff(group, prepend=-1))
    position = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    opens = (extent[order] == 0) | (position % _BLOCK == 0)
    starts = np.flatnonzero(opens)
    ends = np.append(starts[1:], len(order))
    pixel = np.stack([x, y]).astype(int)[:, order]
    left, bottom = np.minimum.reduceat(pixel - reach[order], starts, axis=1)
    right, top = np.maximum.reduceat(pixel + reach[order], starts, axis=1)
    size = np.searchsorted(_SIDES, np.maximum(right - left, top - bottom) + 1)
    # Where stamps cover much of the picture, one product of matrices over all of it is faster.
    whole = int(np.searchsorted(_SIDES, min(np.sqrt(shape[0] * shape[1]) / 4, *shape), side="right"))
    canvas = torch.zeros((n_bands, *shape), device=device)
    flat = canvas.view(n_bands, -1)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, np.float32), device=device)

    psf_variance = tensor(2 * psf_sigma**2)[:, None]

    def integrals(index: np.ndarray, start: Any, centre: np.ndarray, variance: np.ndarray, n: int) -> torch.Tensor:
        """Twice the integrals (n_bands, n, k) of Gaussians ``index`` (k,) over n rows or columns from ``start``."""
        edges = torch.arange(n + 1, device=device, dtype=torch.float32)[:, None] - tensor(centre[index] - start)
        scale = (tensor(2 * variance[index]) + tensor(ratio[index] ** 2) * psf_variance).rsqrt_()
        return (edges * scale[:, None]).erf_().diff(dim=1)

    def weights(index: np.ndarray, used: np.ndarray | float = 1.0) -> torch.Tensor:
        """A quarter of the fluxes (n_bands, 1, k) of Gaussians ``index``, 0 where not used."""
        return (tensor(flux[owner[index]]) * tensor(0.25 * used * share[index])[:, None]).T[:, None]

    members = order[np.repeat(size, ends - starts) >= whole]
    per_chunk = max(1, _NUMBERS_PER_CHUNK // (n_bands * sum(shape)))
    for begin in range(0, len(members), per_chunk):
        index = members[begin : begin + per_chunk]
        rows = integrals(index, 0, y, variance_y, shape[0]) * weights(index)
        canvas += rows @ integrals(index, 0, x, variance_x, shape[1]).transpose(1, 2)

    for k in np.unique(size[size < whole]):
        n = _SIDES[k]
        n_slots = 1 if n <= _SMALL_SIDE else _BLOCK
        steps = torch.arange(n, device=device)
        stamp = steps[:, None] * shape[1] + steps
        blocks = np.flatnonzero(size == k)
        # Stamps that reach over an edge are moved inside.
        from_left, from_bottom = left[blocks].clip(0, shape[1] - n), bottom[blocks].clip(0, shape[0] - n)
        corner = from_bottom * shape[1] + from_left
        # Neighbours in the picture are neighbours in memory.
        nearby = np.argsort(corner, kind="stable")
        blocks, from_left, from_bottom = blocks[nearby], from_left[nearby], from_bottom[nearby]
        corners = torch.as_tensor(corner[nearby], device=device)
        per_chunk = max(1, _NUMBERS_PER_CHUNK // (n_bands * n * n))
        for begin in range(0, len(blocks), per_chunk):
            part = slice(begin, begin + per_chunk)
            slots = starts[blocks[part], None] + np.arange(n_slots)
            used = (slots < ends[blocks[part], None]).ravel()
            index = order[np.minimum(slots, len(order) - 1).ravel()]
            rows = integrals(index, np.repeat(from_bottom[part], n_slots), y, variance_y, n) * weights(index, used)
            columns = integrals(index, np.repeat(from_left[part], n_slots), x, variance_x, n)
            if n_slots == 1:
                stamps = rows[:, :, None] * columns[:, None]
                places = stamp[:, :, None] + corners[part]
            else:
                rows, columns = (v.view(n_bands, n, -1, n_slots).transpose(1, 2) for v in (rows, columns))
                stamps = rows @ columns.transpose(2, 3)
                places = corners[part, None, None] + stamp
            for band in range(n_bands):
                flat[band].scatter_add_(0, places.view(-1), stamps[band].reshape(-1))
    return canvas.cpu().numpy()
