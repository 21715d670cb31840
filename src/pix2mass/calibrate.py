"""Errors one can trust: from what a network says to a posterior of the true mass, and to that under another prior.

A network gives a mean and a spread. On clusters it was not trained on, the difference between label and mean shows how
far both are right: ``Calibration`` corrects them, with the errors of the labels taken out. The equations are in
docs/errors.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize
from scipy.special import erf, logsumexp, ndtr

from pix2mass.types import Pix2massError

QUANTILES = {"q025": 0.025, "q16": 0.16, "q50": 0.5, "q84": 0.84, "q975": 0.975}
"""Column name -> share of the posterior below it."""
ONE_SIGMA = (0.158655, 0.841345)
"""Between these lie 68.27%, as within one standard deviation of a normal distribution."""
LogDensity = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logarithm of a prior's density, up to a constant, at log10 M500c (n, m) and redshift (n,)."""

_OFFSETS = np.array([*(0.6 * np.arange(-5, 6)), 0.0])
_WIDTHS = np.array([0.6] * 11 + [3.0])
"""Centres and widths, over the scale, of the Gaussians that make a posterior: a comb, and a wide one for outliers."""
_NORMAL = np.array([*np.exp(-0.5 * _OFFSETS[:-1] ** 2 / (1 - 0.6**2)), 0.01])
_NORMAL /= _NORMAL.sum()
"""Their weights in a normal distribution of width 1, with a little in the wide one."""
_GRID_SIGMAS, _GRID_POINTS = 6.0, 301
_EDGE_DEX = 0.03
"""A prior that ends does so as a Gaussian of this width: no posterior is empty."""
_MIN_SCALE_DEX = 0.01
_BISECTIONS = 28


@dataclass(frozen=True)
class Posterior:
    """Posteriors of n clusters: one shape (or one per cluster), moved and stretched.

    Attributes:
        centre: (n,) log10 M500c to which the shape is moved.
        scale: (n,) factor by which it is stretched, dex.
        shape: (n, 12) weights of the Gaussians that make it.
    """

    centre: np.ndarray
    scale: np.ndarray
    shape: np.ndarray

    @classmethod
    def from_table(cls, table: Any) -> Self:
        """From the columns that :meth:`columns` gives, and fold, with ``shape_of_fold`` in the table's metadata.

        Raises:
            Pix2massError: the table has no such metadata.
        """
        if "shape_of_fold" not in table.meta:
            raise Pix2massError("the out-of-fold masses hold no posteriors: another version wrote them; train again")
        shape = np.asarray(table.meta["shape_of_fold"], float)[np.asarray(table["fold"], int)]
        centre, scale = (np.asarray(table[name], float) for name in ("posterior_centre", "posterior_scale_dex"))
        return cls(centre, scale, shape)

    def columns(self) -> dict[str, np.ndarray]:
        """What :meth:`summary` gives, and what :meth:`from_table` needs."""
        return {**self.summary(), "posterior_centre": self.centre, "posterior_scale_dex": self.scale}

    def summary(self) -> dict[str, np.ndarray]:
        """log10_m500c (the median), log10_m500c_err (half the width of the central 68.27%) and the quantiles, (n,)."""
        return _summary(self.quantiles([0.5, *ONE_SIGMA, *QUANTILES.values()]))

    @property
    def variance(self) -> np.ndarray:
        """Variance (n,), dex squared."""
        mean = self.shape @ _OFFSETS
        return self.scale**2 * (self.shape @ (_OFFSETS**2 + _WIDTHS**2) - mean**2)

    def _gaussians(self, mass: np.ndarray, error: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Distances of masses (n, m) from the Gaussians (n, m, 12), and their variances (n, 1, 12)."""
        offset = mass[..., None] - self.centre[:, None, None] - (self.scale[:, None] * _OFFSETS)[:, None]
        variance = (self.scale[:, None] * _WIDTHS) ** 2 + np.broadcast_to(error, len(self.centre))[:, None] ** 2
        return offset, variance[:, None]

    def cdf(self, mass: np.ndarray, error: np.ndarray | float = 0.0) -> np.ndarray:
        """Share of each posterior below masses (n,) or (n, m).

        Args:
            mass: log10 M500c.
            error: (n,) standard error, dex, of an independent measurement: the share is then of its predicted values.
        """
        offset, variance = self._gaussians(mass.reshape(len(self.centre), -1), error)
        share = np.einsum("nmk,nk->nm", ndtr(offset / np.sqrt(variance)), self.shape)
        return share.reshape(mass.shape)

    def log_density(self, mass: np.ndarray, error: np.ndarray | float = 0.0) -> np.ndarray:
        """Logarithm of the density per dex at masses (n,) or (n, m); arguments as :meth:`cdf`."""
        offset, variance = self._gaussians(mass.reshape(len(self.centre), -1), error)
        with np.errstate(divide="ignore"):
            each = np.log(self.shape)[:, None] - 0.5 * (offset**2 / variance + np.log(2 * np.pi * variance))
        return logsumexp(each, axis=-1).reshape(mass.shape)

    def quantiles(self, shares: list[float]) -> np.ndarray:
        """Masses (n, m) with these shares of each posterior below them, by bisection."""
        reach = 15.0 * self.scale[:, None]
        low, high = (self.centre[:, None] + sign * reach + np.zeros(len(shares)) for sign in (-1, 1))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below = self.cdf(middle) < np.asarray(shares)
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def widened(self, variance: np.ndarray) -> Posterior:
        """Stretched so that the variance (n,) grows by this much, dex squared (or shrinks, where negative)."""
        return replace(self, scale=self.scale * np.sqrt(1 + variance / self.variance))

    def crps(self, mass: np.ndarray, error: np.ndarray | float = 0.0) -> np.ndarray:
        """Continuous ranked probability score (n,), dex, of masses (n,); arguments as :meth:`cdf`. Grimit et al. 2006,
        QJRMS 132, 2925, equation 5; of a forecast without spread it is the absolute error."""
        offset, variance = self._gaussians(mass[:, None], error)
        first = (self.shape * _mean_distance(offset[:, 0], variance[:, 0])).sum(axis=1)
        apart = self.scale[:, None, None] * (_OFFSETS[:, None] - _OFFSETS)
        both = variance[:, 0, :, None] + variance[:, 0, None, :]
        return first - np.einsum("nj,njk,nk->n", self.shape, _mean_distance(apart, both), self.shape) / 2

    def reweighted(self, log_ratio: LogDensity, z: np.ndarray) -> dict[str, np.ndarray]:
        """:meth:`summary` of the posteriors under another prior, on a grid of masses.

        Args:
            log_ratio: logarithm of new over old prior.
            z: (n,) redshifts.
        """
        reach = _GRID_SIGMAS * self.scale[:, None]
        mass = self.centre[:, None] + reach * np.linspace(-1, 1, _GRID_POINTS)
        log_density = self.log_density(mass) + log_ratio(mass, z)
        density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        below = np.cumsum((density[:, 1:] + density[:, :-1]) / 2, axis=1)
        below = np.concatenate([np.zeros((len(mass), 1)), below / below[:, -1:]], axis=1)
        wanted = [0.5, *ONE_SIGMA, *QUANTILES.values()]
        found = [np.interp(wanted, share, at) for share, at in zip(below, mass, strict=True)]
        return _summary(np.array(found).reshape(-1, len(wanted)))


def _summary(found: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "log10_m500c": found[:, 0],
        "log10_m500c_err": (found[:, 2] - found[:, 1]) / 2,
        **dict(zip(QUANTILES, found[:, 3:].T, strict=True)),
    }


def _mean_distance(offset: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mean of |X| of a Gaussian."""
    sigma = np.sqrt(variance)
    scaled = offset / sigma
    return sigma * np.sqrt(2 / np.pi) * np.exp(-0.5 * scaled**2) + offset * erf(scaled / np.sqrt(2))


# ---- calibration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What turns a network's mean and spread into a posterior; fitted by :func:`fit_calibration`.

    With u and v the network's mean and the redshift, scaled to mean 0 and spread 1, and s its spread over the typical
    one: centre = mean + shift . (1, u, v, u^2, v^2), ln scale = ln spread + stretch . (1, u, v, u^2, v^2, ln s).

    Attributes:
        mean_range: lowest and highest network mean that was seen; beyond, corrections stay as they are there.
        z_range: the same of the redshift.
        mean_scale: mean and spread of the network's means.
        z_scale: of the redshifts.
        typical_sigma: median of the network's spreads, dex.
        shift: coefficients of the centre, dex.
        stretch: coefficients of ln scale.
        shape: weights of the Gaussians that make a posterior.
        n: clusters it was fitted to.
    """

    mean_range: tuple[float, ...]
    z_range: tuple[float, ...]
    mean_scale: tuple[float, ...]
    z_scale: tuple[float, ...]
    typical_sigma: float
    shift: tuple[float, ...]
    stretch: tuple[float, ...]
    shape: tuple[float, ...]
    n: int

    def posterior(self, mean: np.ndarray, sigma: np.ndarray, z: np.ndarray) -> Posterior:
        """Posteriors from a network's mean (n,) and spread (n,), dex, and redshifts (n,)."""
        u = (np.clip(mean, self.mean_range[0], self.mean_range[1]) - self.mean_scale[0]) / self.mean_scale[1]
        v = (np.clip(z, self.z_range[0], self.z_range[1]) - self.z_scale[0]) / self.z_scale[1]
        terms = np.stack([np.ones_like(u), u, v, u**2, v**2, np.log(sigma / self.typical_sigma)], axis=1)
        scale = sigma * np.exp(np.clip(terms @ np.array(self.stretch), -2, 2))
        return Posterior(
            mean + terms[:, : len(self.shift)] @ np.array(self.shift),
            np.maximum(scale, _MIN_SCALE_DEX),
            np.tile(self.shape, (len(mean), 1)),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`as_json`."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain)


_SHIFT_PRIOR = np.array([0.3, 0.1, 0.1, 0.05, 0.05])
_STRETCH_PRIOR = np.array([1.0, 0.5, 0.5, 0.3, 0.3, 0.5])
"""Widths of Gaussian priors on the coefficients about 0: with few labels little is corrected."""
_SHAPE_PRIOR = 20.0
"""The weights of the shape start from a normal distribution as if this many clusters had shown it."""
_SHAPE_STEPS = 100


def fit_calibration(
    mean: np.ndarray, sigma: np.ndarray, z: np.ndarray, label: np.ndarray, label_err: np.ndarray, networks: int = 5
) -> Calibration:
    """Maximum likelihood of labels, each with its own error, given what networks said that were not trained on them.

    Args:
        mean: (n,) out-of-fold means, log10 M500c.
        sigma: (n,) out-of-fold spreads, dex.
        z: (n,) redshifts; all equal where the network uses none.
        label: (n,) measured log10 M500c.
        label_err: (n,) their standard errors, dex; they widen the likelihood and so are no part of the posterior.
        networks: how many networks said so. A shift seen in one may be its own and must not be put on another: with one
            network no shift is fitted, with few a small one.

    Returns:
        The calibration. Its posteriors are of the true mass, under the distribution of true masses of these clusters.
    """
    blank = Calibration(
        mean_range=(float(mean.min()), float(mean.max())),
        z_range=(float(z.min()), float(z.max())),
        mean_scale=(float(mean.mean()), max(1e-3, float(mean.std()))),
        z_scale=(float(z.mean()), max(1e-3, float(z.std()))),
        typical_sigma=float(np.median(sigma)),
        shift=(0.0,) * len(_SHIFT_PRIOR),
        stretch=(0.0,) * len(_STRETCH_PRIOR),
        shape=tuple(_NORMAL),
        n=len(mean),
    )

    width = np.concatenate([_SHIFT_PRIOR * max(1.0 - 1.0 / networks, 1e-6), _STRETCH_PRIOR])

    def with_terms(parameters: np.ndarray) -> Calibration:
        shift, stretch = np.split(parameters, [len(_SHIFT_PRIOR)])
        return replace(blank, shift=tuple(map(float, shift)), stretch=tuple(map(float, stretch)))

    def loss(parameters: np.ndarray) -> float:
        # A plain Gaussian of scale 1: which shape it is comes next.
        one = with_terms(parameters).posterior(mean, sigma, z)
        variance = one.scale**2 + label_err**2
        penalty = ((parameters / width) ** 2).sum()
        return 0.5 * float(penalty + (np.log(variance) + (label - one.centre) ** 2 / variance).sum())

    start = np.zeros(len(_SHIFT_PRIOR) + len(_STRETCH_PRIOR))
    found = with_terms(minimize(loss, start, method="L-BFGS-B").x)
    one = found.posterior(mean, sigma, z)
    offset, variance = one._gaussians(label[:, None], label_err)
    likelihood = np.exp(-0.5 * offset[:, 0] ** 2 / variance[:, 0]) / np.sqrt(variance[:, 0])
    shape = _NORMAL
    for _ in range(_SHAPE_STEPS):  # expectation, maximisation
        each = likelihood * shape
        counts = (each / each.sum(axis=1, keepdims=True)).sum(axis=0)
        shape = (counts + _SHAPE_PRIOR * _NORMAL) / (len(label) + _SHAPE_PRIOR)
    return replace(found, shape=tuple(map(float, shape)))


def cross_calibrate(
    mean: np.ndarray,
    sigma: np.ndarray,
    z: np.ndarray,
    label: np.ndarray,
    label_err: np.ndarray,
    fold: np.ndarray,
) -> tuple[Posterior, list[list[float]]]:
    """Posteriors of labelled clusters, each with a calibration that saw the other folds alone.

    Args:
        mean: (n,) out-of-fold means, log10 M500c; the next four as in :func:`fit_calibration`.
        sigma: (n,) out-of-fold spreads, dex.
        z: (n,) redshifts.
        label: (n,) measured log10 M500c.
        label_err: (n,) their standard errors, dex.
        fold: (n,) fold numbers, 0, 1, ...

    Returns:
        The posteriors, and the shape of each fold's.
    """
    centre, scale, shapes = np.empty(len(mean)), np.empty(len(mean)), []
    for k in range(int(fold.max()) + 1):
        test = fold == k
        others = [values[~test] for values in (mean, sigma, z, label, label_err)]
        found = fit_calibration(*others, networks=int(fold.max()))
        one = found.posterior(mean[test], sigma[test], z[test])
        centre[test], scale[test] = one.centre, one.scale
        shapes.append(list(found.shape))
    return Posterior(centre, scale, np.array(shapes)[fold]), shapes


# ---- priors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPrior:
    """Distribution of the training clusters' true masses: the prior that a network takes up from its labels.

    A density of the distance from a line, level + slope (z - z0), on a grid.

    Attributes:
        z0: mean redshift.
        level: mean log10 M500c there.
        slope: its change per unit of redshift.
        start: first distance, dex.
        step: between the following ones, dex.
        density: per dex at each distance.
        low: distance below which half a per cent of the masses lie.
        high: distance above which half a per cent lie.
    """

    z0: float
    level: float
    slope: float
    start: float
    step: float
    density: tuple[float, ...]
    low: float
    high: float

    @classmethod
    def fit(cls, label: np.ndarray, label_err: np.ndarray, z: np.ndarray) -> Self:
        """From labels (n,), their errors (n,), dex, and redshifts (n,).

        Labels that say nothing are left out. The others are drawn towards their mean until their variance is that of
        the true masses, which is smaller by the errors' mean square, and a kernel of Scott's width (Scott 1992,
        Multivariate Density Estimation) is put on each.
        """
        told = _telling(label, label_err)
        label, label_err, z = label[told], label_err[told], z[told]
        slope = float(np.polyfit(z, label, 1)[0]) if np.ptp(z) > 0 else 0.0
        z0, level = float(z.mean()), float(label.mean())
        distance = label - level - slope * (z - z0)
        spread = float(distance.std())
        true_spread = float(np.sqrt(max(spread**2 - float((label_err**2).mean()), (0.3 * spread) ** 2)))
        width = max(true_spread * len(label) ** -0.2, 0.02)
        # The kernels widen what the labels leave, so these shrink a little more.
        distance = distance * np.sqrt(max(true_spread**2 - width**2, 0.0)) / max(spread, 1e-9)
        step = 0.02
        grid = np.arange(distance.min() - 4 * width, distance.max() + 4 * width + step, step)
        density = np.array([np.exp(-0.5 * ((at - distance) / width) ** 2).mean() for at in grid])
        density /= density.sum() * step
        low, high = np.interp([0.005, 0.995], np.cumsum(density) * step, grid)
        return cls(
            z0, level, slope, float(grid[0]), step, tuple(np.round(density, 5).tolist()), float(low), float(high)
        )

    def log_density(self, mass: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Logarithm of the density per dex at log10 M500c (n, m) and redshift (n,); inside its range at least a
        twentieth of the highest, so that nothing is divided by next to nothing."""
        density = np.array(self.density)
        distance = self._distance(mass, z)
        grid = self.start + self.step * np.arange(len(density))
        return np.log(np.maximum(np.interp(distance, grid, density), 0.05 * density.max()))

    def to(self, log_density: LogDensity) -> LogDensity:
        """The ratio of another prior to this one, inside this one's range (0.5 to 99.5 per cent): outside, nothing was
        learnt, and the other prior ends."""

        def log_ratio(mass: np.ndarray, z: np.ndarray) -> np.ndarray:
            distance = self._distance(mass, z)
            outside = np.maximum(0, np.maximum(self.low - distance, distance - self.high))
            return log_density(mass, z) - self.log_density(mass, z) - 0.5 * (outside / _EDGE_DEX) ** 2

        return log_ratio

    def _distance(self, mass: np.ndarray, z: np.ndarray) -> np.ndarray:
        # Without a slope no redshift is needed, and none may be known.
        return mass - self.level - (self.slope * (z[:, None] - self.z0) if self.slope else 0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for model.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`as_json`."""
        return cls(**{**values, "density": tuple(values["density"])})


def known_errors(label_err: np.ndarray) -> np.ndarray:
    """Standard errors (n,) of labels, dex, for those (n,) of a catalogue, NaN where it has none.

    A label without an error beside others with one is as good as most: it gets their median. Where none has one, all
    are 0, and the labels' noise counts as the network's own.
    """
    known = np.isfinite(label_err)
    return np.where(known, label_err, np.median(label_err[known]) if known.any() else 0.0)


def _telling(label: np.ndarray, label_err: np.ndarray) -> np.ndarray:
    """Which labels (n,) tell something of the spread of masses: those with errors below twice the spread of all. A few
    with errors of 2 dex would make up most of the mean square error."""
    told = label_err < 2 * 1.4826 * np.median(np.abs(label - np.median(label)))
    return told if told.sum() > len(label) / 2 else np.ones(len(label), bool)


def flat(mass: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Logarithm of a prior that is flat in log10 M500c."""
    return np.zeros_like(mass)


# ---- shrinkage -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shrinkage:
    """Line of estimates on true masses: estimate = pivot + offset + slope (true mass - pivot).

    Attributes:
        pivot: mean log10 M500c of the labels.
        offset: of the estimates there, dex.
        slope: below 1: light clusters come out too heavy, heavy ones too light.
        slope_err: its standard error.
    """

    pivot: float
    offset: float
    slope: float
    slope_err: float

    @classmethod
    def fit(cls, estimate: np.ndarray, label: np.ndarray, label_err: np.ndarray) -> Self:
        """From out-of-fold estimates (n,), labels (n,) and the labels' errors (n,), dex.

        Labels that say nothing are left out. Least squares with the errors of the labels taken out of their variance,
        slope = cov(estimate, label) / (var(label) - mean square error), and its standard error in large samples: Fuller
        1987, Measurement Error Models, section 1.2.
        """
        told = _telling(label, label_err)
        estimate, label, label_err = estimate[told], label[told], label_err[told]
        pivot = float(label.mean())
        x, y = label - pivot, estimate - estimate.mean()
        noise = float((label_err**2).mean())
        variance = max(float((x**2).mean()) - noise, 0.1 * float((x**2).mean()))
        slope = float((x * y).mean()) / variance
        residual = y - slope * x
        error = float(np.sqrt(((x**2).mean() * (residual**2).mean() + (slope * noise) ** 2) / variance**2 / len(x)))
        return cls(pivot, float(estimate.mean()) - pivot, slope, error)

    def corrected(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Estimates, errors and quantiles with the line undone.

        Estimates of slope b come from posteriors of variance (1 - b) V, where V is that of the masses. At a given mass
        they scatter with variance b (1 - b) V, after division by b with (1 - b) V / b: errors grow by 1 / sqrt(b).
        """
        slope = max(self.slope, 0.1)
        middle = columns["log10_m500c"]
        moved = self.pivot + (middle - self.pivot - self.offset) / slope
        return {
            name: values / np.sqrt(slope) if name == "log10_m500c_err" else moved + (values - middle) / np.sqrt(slope)
            for name, values in columns.items()
        }

    def as_json(self) -> dict[str, float]:
        """Plain values, for model.json."""
        return asdict(self)
