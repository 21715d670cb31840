"""Which images to trust: what training images looked like, and how far a new one is from them.

Looks at simple statistics of the pixels, not at a network, so that it says the same whatever network is used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

_PER_BAND = 7
_GLARE, _NOISE = 3, 6
"""Places of the bright end and of the noise among the statistics of a band."""
_FALSE_ALARMS = {"distance": 0.006, "glare": 0.003, "noise": 0.003, "mass": 0.008}
"""Share of the training clusters beyond each limit: under two in a hundred together."""
_NOISE_MARGIN = 1.25
"""Noise may differ by this much more: that of new observing conditions is no fault."""
_PARTS = 5
_RIDGE = 1e-3
_BRIGHT_QUANTILE = 0.98
_LEAST_PIXELS = 16


def image_statistics(images: Tensor, mask: Tensor, noise: Tensor) -> np.ndarray:
    """Statistics of the pixels in units of the noise, compressed: x = asinh(flux / noise); and of the noise.

    Args:
        images: (n, n_bands, h, w) x, 0 where unusable, as :func:`pix2mass.model.prepare` gives it.
        mask: (n, n_bands, h, w) bool, True = unusable.
        noise: (n, n_bands) nanomaggies, NaN for a band without usable pixels.

    Returns:
        (n, 8 n_bands - 1): per band mean, spread, tenth percentile, bright end (98 per cent), correlation of
        neighbouring pixels, centre minus outskirts, and ln noise; then the correlation of each band with the next. NaN
        where there is nothing to measure.
    """
    n, n_bands, height, width = images.shape
    usable = ~mask & torch.isfinite(noise)[..., None, None]
    # Products with 0 and 1 are one pass over the pixels; choosing them takes several.
    parts = torch.stack([torch.ones(height, width), *_centre_and_outskirts(height, width)]).flatten(1).T
    count, *counts = (usable.flatten(2).float() @ parts).unbind(dim=-1)
    total, *totals = (images.flatten(2) @ parts).unbind(dim=-1)
    mean = total / count
    centre, outskirts = (part / counted for part, counted in zip(totals, counts, strict=True))
    centred = (images - mean.nan_to_num()[..., None, None]).mul_(usable)
    variance = centred.square().sum(dim=(2, 3)) / count
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean(dim=(2, 3)) + (
        centred[..., 1:, :] * centred[..., :-1, :]
    ).mean(dim=(2, 3))
    share = count / (height * width)
    between = (centred[:, 1:] * centred[:, :-1]).mean(dim=(2, 3)) / torch.sqrt(
        variance[:, 1:] * variance[:, :-1] * share[:, 1:] * share[:, :-1]
    )
    ordered = torch.from_numpy(np.sort(images.masked_fill(~usable, torch.inf).flatten(2).numpy(), axis=-1))
    faint, bright = (
        ordered.gather(2, torch.minimum((q * count).long(), (count - 1).clamp_min(0).long())[..., None])[..., 0]
        for q in (0.1, _BRIGHT_QUANTILE)
    )
    per_band = torch.stack(
        [
            mean,
            variance.sqrt(),
            faint,
            bright,
            neighbours / (2 * share * variance),
            centre - outskirts,
            noise.to(images.dtype).log(),
        ],
        dim=-1,
    )
    per_band[count < _LEAST_PIXELS] = torch.nan
    return torch.cat([per_band.flatten(1), between], dim=1).double().numpy()


def _centre_and_outskirts(height: int, width: int) -> tuple[Tensor, Tensor]:
    """1 within a quarter of the half-width and 1 beyond its half, 0 elsewhere, (h, w) each."""
    y, x = ((torch.arange(size) + 0.5) / size * 2 - 1 for size in (height, width))
    radius = torch.hypot(y[:, None], x[None, :])
    return (radius < 0.25).float(), (radius > 0.5).float()


@dataclass(frozen=True)
class Reference:
    """What the training images looked like at each redshift, with the limits beyond which an image is unlike them.

    Attributes:
        z_scale: mean and spread of the redshifts, then the lowest and the highest: beyond, as at the end.
        expected: (3, p) coefficients of 1, v, v^2 of each statistic, v the scaled redshift.
        spread: (p,) scatter about that.
        precision: (p, p) inverse of the correlations of the scatter.
        distance_limit: largest Mahalanobis distance squared, over the number of statistics.
        glare_limit: largest excess of the bright end over that expected, in units of its spread.
        noise_limit: largest difference of the noise from that expected, mean of ln over the bands, either way.
        mass_z: redshifts of ``mass_limit``.
        mass_limit: estimates below these are lower than nearly all of the training clusters got.
    """

    z_scale: tuple[float, float, float, float]
    expected: list[list[float]]
    spread: list[float]
    precision: list[list[float]]
    distance_limit: float
    glare_limit: float
    noise_limit: float
    mass_z: list[float]
    mass_limit: list[float]

    @classmethod
    def fit(cls, statistics: np.ndarray, z: np.ndarray, mass: np.ndarray) -> Self:
        """From the training clusters.

        Args:
            statistics: (n, p) of :func:`image_statistics`.
            z: (n,) redshifts.
            mass: (n,) out-of-fold log10 M500c.
        """
        scale = (float(z.mean()), max(1e-3, float(z.std())), float(z.min()), float(z.max()))
        part = np.arange(len(z)) % _PARTS
        distance, glare, noise = np.empty((3, len(z)))
        for k in range(_PARTS):  # limits from clusters that the mean and the covariance have not seen
            test = part == k
            without = cls._shape(statistics[~test], z[~test], scale)
            distance[test], glare[test], noise[test] = without._distances(statistics[test], z[test])
        edges = np.quantile(z, [0, 1 / 3, 2 / 3, 1])
        thirds = [(z >= low) & (z <= high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
        return cls(
            **{
                **asdict(cls._shape(statistics, z, scale)),
                "distance_limit": float(np.quantile(distance, 1 - _FALSE_ALARMS["distance"])),
                "glare_limit": float(np.quantile(glare, 1 - _FALSE_ALARMS["glare"])),
                "noise_limit": _NOISE_MARGIN * float(np.quantile(noise, 1 - _FALSE_ALARMS["noise"])),
                "mass_z": [float(np.median(z[third])) for third in thirds],
                "mass_limit": [float(np.quantile(mass[third], _FALSE_ALARMS["mass"])) for third in thirds],
            }
        )

    @classmethod
    def _shape(cls, statistics: np.ndarray, z: np.ndarray, scale: tuple[float, float, float, float]) -> Self:
        known = np.isfinite(statistics).all(axis=1)
        terms = _terms(z[known], scale)
        expected = np.linalg.lstsq(terms, statistics[known], rcond=None)[0]
        residual = statistics[known] - terms @ expected
        spread = np.maximum(residual.std(axis=0), 1e-6)
        correlation = (residual / spread).T @ (residual / spread) / max(1, len(residual))
        precision = np.linalg.inv(correlation + _RIDGE * np.eye(len(spread)))
        return cls(
            scale,
            [[float(f"{value:.6g}") for value in row] for row in expected],
            [float(f"{value:.6g}") for value in spread],
            [[float(f"{value:.6g}") for value in row] for row in precision],
            np.inf,
            np.inf,
            np.inf,
            [],
            [],
        )

    def unlike(self, statistics: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which images are unlike the training images, and which hold a source that is far brighter, (n,) bool.

        Args:
            statistics: (n, p) of :func:`image_statistics`.
            z: (n,) redshifts.
        """
        distance, glare, noise = self._distances(statistics, z)
        return (distance > self.distance_limit) | (noise > self.noise_limit), glare > self.glare_limit

    def _distances(self, statistics: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mahalanobis distance squared over the number of statistics that are known, the largest excess of a band's
        bright end in units of its spread, and the difference of the noise, mean of ln over the bands, each (n,)."""
        known = np.isfinite(statistics)
        residual = np.where(known, statistics - _terms(z, self.z_scale) @ np.array(self.expected), 0.0)
        scaled = residual / np.array(self.spread)
        n_bands = (scaled.shape[1] + 1) // (_PER_BAND + 1)
        distance = np.einsum("np,pq,nq->n", scaled, np.array(self.precision), scaled)
        shape = (len(scaled), n_bands, _PER_BAND)
        glare = scaled[:, : n_bands * _PER_BAND].reshape(shape)[..., _GLARE].max(axis=1)
        noise = np.abs(residual[:, : n_bands * _PER_BAND].reshape(shape)[..., _NOISE].mean(axis=1))
        return distance / np.maximum(1, known.sum(axis=1)), glare, noise

    def lowest_mass(self, z: np.ndarray) -> np.ndarray:
        """Estimates below this log10 M500c (n,) are lower than nearly all of the training clusters' at redshift z."""
        return np.interp(z, self.mass_z, self.mass_limit)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`as_json`."""
        return cls(**{**values, "z_scale": tuple(values["z_scale"])})


def _terms(z: np.ndarray, scale: tuple[float, float, float, float]) -> np.ndarray:
    v = np.nan_to_num((np.clip(z, *scale[2:]) - scale[0]) / scale[1])
    return np.stack([np.ones_like(v), v, v**2], axis=1)
