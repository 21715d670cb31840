"""From richness to mass: fits, published relations, and the baseline's error beside a constant and the redshift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pix2mass.types import Pix2massError

RICHNESS_FLOOR = 3.0
"""Richness below this, 0 included, counts as this in the richness-mass relation: a logarithm needs a floor, and so few
members cannot be told from none."""

LAMBDA_PIVOT, ONE_PLUS_Z_PIVOT = 40.0, 1.3


def _log_richness(richness: ArrayLike) -> np.ndarray:
    return np.log10(np.maximum(np.asarray(richness, float), RICHNESS_FLOOR) / LAMBDA_PIVOT)


def _log_redshift(z: ArrayLike) -> np.ndarray:
    return np.log10((1 + np.asarray(z, float)) / ONE_PLUS_Z_PIVOT)


def _relation_terms(richness: ArrayLike, z: ArrayLike) -> np.ndarray:
    return np.stack(np.broadcast_arrays(1.0, _log_richness(richness), _log_redshift(z)), axis=-1)


@dataclass(frozen=True)
class RichnessMassRelation:
    """log10 M500c = a + b log10(lambda/40) + c log10((1+z)/1.3), lambda not below ``RICHNESS_FLOOR``."""

    a: float
    b: float
    c: float

    def predict(self, richness: ArrayLike, z: ArrayLike) -> np.ndarray:
        """log10(M500c / Msun) of clusters of given richness and redshift."""
        return _relation_terms(richness, z) @ np.array([self.a, self.b, self.c])


def richness_mass_fit(richness: ArrayLike, z: ArrayLike, log10_m500c: ArrayLike) -> RichnessMassRelation:
    """Least squares of the richness-mass relation on clusters with known masses.

    Args:
        richness: (n,) lambda.
        z: (n,) redshifts.
        log10_m500c: (n,) masses.

    Raises:
        Pix2massError: if fewer than 4 clusters are given or a value is not finite.
    """
    terms, mass = _checked(richness, z, log10_m500c, 4)
    a, b, c = np.linalg.lstsq(terms, mass, rcond=None)[0]
    return RichnessMassRelation(float(a), float(b), float(c))


def _checked(richness: ArrayLike, z: ArrayLike, mass: ArrayLike, least: int) -> tuple[np.ndarray, np.ndarray]:
    terms, mass = _relation_terms(richness, z), np.asarray(mass, float)
    if terms.ndim != 2 or mass.shape != terms.shape[:1] or len(mass) < least:
        raise Pix2massError(
            f"richness-mass relation: expected at least {least} clusters in columns of one length, got richness "
            f"{np.shape(richness)}, z {np.shape(z)}, mass {mass.shape}"
        )
    if not (np.isfinite(terms).all() and np.isfinite(mass).all()):
        raise Pix2massError(
            "richness-mass relation: a richness, redshift or mass is not finite; leave such clusters out"
        )
    return terms, mass


@dataclass(frozen=True)
class ScatterRelation:
    """The relation between true richness and true mass, with its intrinsic scatter, from noisy values of both.

    Attributes:
        relation: a, b and c of the true quantities.
        scatter_dex: intrinsic scatter of log10 mass at fixed true richness.
        errors: standard errors of a, b, c and scatter_dex.
        mean: log10(lambda/40) of the population at 1 + z = 1.3.
        mean_slope: its change with log10((1+z)/1.3).
        spread_dex: its standard deviation.
    """

    relation: RichnessMassRelation
    scatter_dex: float
    errors: tuple[float, float, float, float]
    mean: float
    mean_slope: float
    spread_dex: float

    def predict(self, richness: ArrayLike, z: ArrayLike, richness_err: ArrayLike = 0.0) -> np.ndarray:
        """Expected log10 M500c given a noisy richness: a noisy one is drawn towards the population's mean."""
        x, noise = _log_richness(richness), _log_error(richness, richness_err)
        mean = self.mean + self.mean_slope * _log_redshift(z)
        true = mean + self.spread_dex**2 / (self.spread_dex**2 + noise**2) * (x - mean)
        return self.relation.predict(LAMBDA_PIVOT * 10**true, z)


def _log_error(richness: ArrayLike, richness_err: ArrayLike) -> np.ndarray:
    return np.asarray(richness_err, float) / np.maximum(np.asarray(richness, float), RICHNESS_FLOOR) / np.log(10)


def richness_mass_fit_with_scatter(
    richness: ArrayLike,
    z: ArrayLike,
    log10_m500c: ArrayLike,
    richness_err: ArrayLike,
    log10_m500c_err: ArrayLike,
) -> ScatterRelation:
    """Maximum likelihood with errors on both axes and intrinsic scatter: Kelly 2007, ApJ 665, 1489, section 4, with one
    Gaussian for the distribution of true richness, whose mean may change with redshift.

    Given z, (observed log richness, observed log mass) are jointly normal with covariance
    [[t^2 + ex^2, b t^2], [b t^2, b^2 t^2 + s^2 + ey^2]], t the spread of true richness and s the scatter. Selection
    is not modelled.

    Args:
        richness: (n,) lambda.
        z: (n,) redshifts.
        log10_m500c: (n,) masses.
        richness_err: (n,) standard deviations of lambda.
        log10_m500c_err: (n,) standard deviations of the masses in dex.

    Raises:
        Pix2massError: if fewer than 10 clusters are given, a value is not finite, or an error is negative.
    """
    from scipy.optimize import minimize

    terms, y = _checked(richness, z, log10_m500c, 10)
    x, shift = terms[:, 1], terms[:, 2]
    ex, ey = (
        np.broadcast_to(e, y.shape) for e in (_log_error(richness, richness_err), np.asarray(log10_m500c_err, float))
    )
    if not (np.isfinite(ex).all() and np.isfinite(ey).all() and (ex >= 0).all() and (ey >= 0).all()):
        raise Pix2massError("richness-mass relation: an error of a richness or mass is missing or negative")
    start = np.linalg.lstsq(terms, y, rcond=None)[0]
    residual = y - terms @ start

    def negative_log_likelihood(p: np.ndarray) -> float:
        a, b, c, log_s, mean, slope, log_t = p
        variance_t, variance_s = np.exp(2 * log_t), np.exp(2 * log_s)
        m = mean + slope * shift
        xx, xy, yy = variance_t + ex**2, b * variance_t, b**2 * variance_t + variance_s + ey**2
        dx, dy = x - m, y - (a + b * m + c * shift)
        determinant = xx * yy - xy**2
        return float(0.5 * np.sum(np.log(determinant) + (yy * dx**2 - 2 * xy * dx * dy + xx * dy**2) / determinant))

    first = np.array([*start, np.log(residual.std() + 1e-3), x.mean(), 0.0, np.log(x.std() + 1e-3)])
    bounds = [(None, None)] * 3 + [(np.log(1e-3), 1.0), (None, None), (None, None), (np.log(1e-3), 1.0)]
    best = minimize(negative_log_likelihood, first, method="L-BFGS-B", bounds=bounds).x
    scatter = float(np.exp(best[3]))
    covariance = np.linalg.pinv(_hessian(negative_log_likelihood, best))
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    a, b, c = (float(value) for value in best[:3])
    return ScatterRelation(
        RichnessMassRelation(a, b, c),
        scatter,
        (float(errors[0]), float(errors[1]), float(errors[2]), float(errors[3] * scatter)),
        float(best[4]),
        float(best[5]),
        float(np.exp(best[6])),
    )


def _hessian(function, at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    steps = step * np.eye(len(at))
    return np.array(
        [
            [
                (function(at + i + j) - function(at + i - j) - function(at - i + j) + function(at - i - j))
                / (4 * step**2)
                for j in steps
            ]
            for i in steps
        ]
    )


@dataclass(frozen=True)
class PublishedRelation:
    """<M> = mass_at_pivot (lambda/lambda_pivot)^slope ((1+z)/one_plus_z_pivot)^z_slope, in the paper's own definition.

    Attributes:
        mass_at_pivot: in Msun, or in Msun/h if ``per_h``.
        per_h: masses are in Msun/h, h = H0 / 100.
        overdensity: definition of the mass, "200m" or "200c".
        lambda_pivot: pivot richness.
        slope: exponent of richness.
        one_plus_z_pivot: pivot of 1 + z.
        z_slope: exponent of 1 + z.
        reference: the paper, the place in it, and what the relation holds for.
    """

    mass_at_pivot: float
    per_h: bool
    overdensity: str
    lambda_pivot: float
    slope: float
    one_plus_z_pivot: float
    z_slope: float
    reference: str

    def mass(self, richness: ArrayLike, z: ArrayLike) -> np.ndarray:
        """Masses of the paper's definition; ``catalog.masses.to_m500c`` brings them to M500c."""
        richness_ratio = np.maximum(np.asarray(richness, float), RICHNESS_FLOOR) / self.lambda_pivot
        z_ratio = (1 + np.asarray(z, float)) / self.one_plus_z_pivot
        return self.mass_at_pivot * richness_ratio**self.slope * z_ratio**self.z_slope


PUBLISHED = {
    "simet2017": PublishedRelation(
        10**14.344, True, "200m", 40.0, 1.33, 1.0, 0.0,
        "Simet et al. 2017, MNRAS 466, 3103, abstract: log10 M200m / (Msun/h) = 14.344 at lambda 40, slope 1.33; "
        "weak lensing of redMaPPer SDSS DR8 clusters, z 0.10-0.33",
    ),
    "mcclintock2019": PublishedRelation(
        3.081e14, False, "200m", 40.0, 1.356, 1.35, -0.30,
        "McClintock et al. 2019, MNRAS 482, 1352, abstract: M200m = 3.081e14 Msun at lambda 40, z 0.35, slope 1.356; "
        "weak lensing of redMaPPer DES Y1 clusters, z 0.20-0.65",
    ),
    "rykoff2012": PublishedRelation(
        1e14 * np.exp(1.48), False, "200c", 60.0, 1.06, 1.0, 0.0,
        "Rykoff et al. 2012, ApJ 746, 178: ln(M200c / 1e14 Msun, h = 0.7) = 1.48 + 1.06 ln(lambda/60), as quoted by "
        "later users of it, the paper's own text not seen; abundance matching of maxBCG clusters, z 0.10-0.30",
    ),
}  # fmt: skip
"""Mean relations from the literature. Each belongs to its own richness and mass scale: DES lambda is not SDSS lambda,
lambda of 2012 is not that of 2014, weak-lensing masses lie above those of X-rays and the SZ effect."""


@dataclass(frozen=True, eq=False)
class BaselineScores:
    """Out-of-fold errors of the richness baseline and of the two methods that need no richness.

    Attributes:
        mae_dex: mean absolute error of the richness-mass relation, mean over folds.
        mae_constant_dex: of the mean mass of the other folds.
        mae_redshift_dex: of a straight line in log10(1+z).
        predicted: (n,) out-of-fold log10 M500c from richness.
    """

    mae_dex: float
    mae_constant_dex: float
    mae_redshift_dex: float
    predicted: np.ndarray


def cross_validate(
    richness: ArrayLike,
    z: ArrayLike,
    log10_m500c: ArrayLike,
    fold: np.ndarray,
    errors: tuple[ArrayLike, ArrayLike] | None = None,
    given: ArrayLike | None = None,
) -> BaselineScores:
    """Fit the relation, a constant and a line in redshift on all folds but one; predict that one; for each in turn.

    Args:
        richness: (n,) lambda.
        z: (n,) redshifts.
        log10_m500c: (n,) masses.
        fold: (n,) fold numbers.
        errors: (n,) errors of lambda and of log10 mass, to fit with intrinsic scatter and errors on both axes.
        given: (n,) masses predicted from richness by some fixed relation, to score instead of a fit.
    """
    richness, z, mass = (np.asarray(values, float) for values in (richness, z, log10_m500c))
    terms, _ = _checked(richness, z, mass, 4)
    with_z = terms[:, [0, 2]]
    predicted, constant, redshift = np.empty((3, len(mass)))
    if given is not None:
        predicted[:] = given
    for k in np.unique(fold):
        train, test = fold != k, fold == k
        constant[test] = mass[train].mean()
        redshift[test] = with_z[test] @ np.linalg.lstsq(with_z[train], mass[train], rcond=None)[0]
        if given is None and errors is None:
            predicted[test] = richness_mass_fit(richness[train], z[train], mass[train]).predict(richness[test], z[test])
        elif given is None and errors is not None:
            ex, ey = (np.asarray(e, float) for e in errors)
            fit = richness_mass_fit_with_scatter(richness[train], z[train], mass[train], ex[train], ey[train])
            predicted[test] = fit.predict(richness[test], z[test], ex[test])

    def score(estimate: np.ndarray) -> float:
        return float(np.mean([np.abs(estimate - mass)[fold == k].mean() for k in np.unique(fold)]))

    return BaselineScores(score(predicted), score(constant), score(redshift), predicted)
