"""Red-sequence richness lambda of a galaxy catalogue, and the mass it predicts: the baseline that stands beside the
network.

The matched filter of Rykoff et al. 2012, ApJ 746, 178, and 2014, ApJ 785, 104: lambda is the number of red galaxies
brighter than 0.2 L* within R_c, each counted by the probability that position, magnitude and colours make it a
member. Radii in this definition carry H0 = 100; all lengths here are proper Mpc of H0 = 70. One code measures mock
and real catalogues.

A catalogue of galaxies is any mapping with columns ra_deg, dec_deg (n,), mag and mag_err (n, 5): ugriz magnitudes
corrected for Galactic extinction; with ref_mag (n,), the total i magnitude, where that differs from mag's i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pix2mass.cosmology import H0_KM_S_MPC, kpc_per_arcsec
from pix2mass.types import Pix2massError

GALAXIES = Mapping[str, np.ndarray]

COLOURS = ((1, 2), (2, 3), (3, 4))
"""Colours used, as pairs of band numbers: g-r, r-i, i-z. SDSS u is too noisy for red galaxies."""

LUMINOUS_MAG = 1.75
"""L > 0.2 L*, in magnitudes fainter than m*."""

BRIGHTEST_MAG = -4.0
"""Galaxies brighter than m* by more than this are not members."""

CHI2_MAX = 20.0
"""Galaxies further from the red sequence have no probability to speak of and are left out."""

NFW_SCALE_MPC, NFW_CORE_MPC, R_0_MPC = (length / (H0_KM_S_MPC / 100.0) for length in (0.15, 0.10, 1.0))
"""Filter's scale radius, core, and R_c at lambda = 100: 0.15, 0.1 and 1.0 Mpc/h (Rykoff et al. 2012, sections 3.1 and
4)."""

R_C_POWER = 0.2
SCHECHTER_ALPHA = -1.0
"""Faint-end slope of the filter: Rykoff et al. 2014."""

BACKGROUND_Z = np.arange(0.05, 0.601, 0.02)
"""Redshifts at which the background is tabulated; lambda is measured between the first and the last."""

_LAMBDA_GRID = np.geomspace(0.3, 500.0, 90)


def m_star_i_mag(z: ArrayLike) -> np.ndarray:
    """i magnitude of an L* red galaxy for 0.05 < z < 0.7: Rykoff et al. 2012 (18.39 at z = 0.25)."""
    log_z = np.log(np.asarray(z, float))
    return 22.44 + 3.36 * log_z + 0.273 * log_z**2 - 0.0618 * log_z**3 - 0.0227 * log_z**4


def colours_of(mag: np.ndarray, mag_err: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (n, 3) = g-r, r-i, i-z and their covariances (n, 3, 3) from ugriz magnitudes (n, 5) and errors (n, 5)."""
    difference = np.zeros((len(COLOURS), 5))
    for row, (blue, red) in enumerate(COLOURS):
        difference[row, blue], difference[row, red] = 1.0, -1.0
    colours = mag @ difference.T
    return colours, np.einsum("ck,nk,dk->ncd", difference, mag_err**2, difference)


def reference_mag(galaxies: GALAXIES) -> np.ndarray:
    """(n,) total i magnitudes: the column ref_mag where there is one, else mag's i."""
    return np.asarray(galaxies["ref_mag"] if "ref_mag" in galaxies else np.asarray(galaxies["mag"])[:, 3], float)


@dataclass(frozen=True, eq=False)
class RedSequence:
    """Colours of red galaxies against redshift: at m*, with a slope in i - m*(z) and an intrinsic scatter.

    Attributes:
        z: (k,) nodes; linear between, constant beyond.
        colour: (k, 3) mean colours g-r, r-i, i-z at m*.
        slope: (3,) change per magnitude of i - m*.
        scatter: (k, 3) intrinsic standard deviations at the nodes.
    """

    z: np.ndarray
    colour: np.ndarray
    slope: np.ndarray
    scatter: np.ndarray

    @classmethod
    def fit(
        cls, mag: np.ndarray, mag_err: np.ndarray, ref_mag: np.ndarray, z: np.ndarray, node_step: float = 0.04
    ) -> RedSequence:
        """Calibrate on galaxies with redshifts of which many are red, as members of clusters are.

        Maximum likelihood by expectation-maximisation of two populations in the three colours about the relation: red
        ones with the intrinsic scatter, and a broad one of any other galaxies with its own mean. Blue galaxies among
        those given neither pull the relation nor widen it.

        Args:
            mag: (n, 5) ugriz magnitudes.
            mag_err: (n, 5) errors.
            ref_mag: (n,) total i magnitudes.
            z: (n,) redshifts.
            node_step: spacing of the redshift nodes.

        Raises:
            Pix2massError: if there are fewer than 30 galaxies.
        """
        mag, mag_err, ref_mag, z = (np.asarray(array, float) for array in (mag, mag_err, ref_mag, z))
        usable = np.isfinite(mag).all(axis=1) & (z > 0.03) & (z < 0.7)
        if usable.sum() < 30:
            raise Pix2massError(
                f"red sequence: expected at least 30 galaxies with redshifts 0.03-0.7 and finite magnitudes, "
                f"got {usable.sum()}; give more red galaxies"
            )
        mag, mag_err, ref_mag, z = mag[usable], mag_err[usable], ref_mag[usable], z[usable]
        colours, covariance = colours_of(mag, mag_err)
        noise = np.sqrt(np.einsum("ncc->nc", covariance))
        # Nodes between which galaxies lie, none emptier than ten galaxies.
        count = max(2, min(int(np.ceil(np.ptp(z) / node_step)) + 1, len(z) // 10))
        nodes = np.linspace(z.min(), z.max(), count)
        nodes = nodes[[True, *(np.histogram(z, nodes)[0][:-1] >= 10), True]]
        hats = np.stack([np.interp(z, nodes, row) for row in np.eye(len(nodes))], axis=1)
        design = np.column_stack([hats, ref_mag - m_star_i_mag(z)])
        coefficients = np.zeros((design.shape[1], 3))
        # Start on the red side of the galaxies at each redshift.
        ridge = np.empty((len(nodes), 3))
        for k, around in enumerate(hats.T > 0.5):
            ridge[k] = np.percentile(colours[around], 65, axis=0)
        coefficients = np.vstack([ridge, np.zeros(3)])
        scatter = np.full((len(nodes), 3), 0.06)
        share, other_mean, other_width = 0.7, _OTHER_MEAN.copy(), _OTHER_WIDTH.copy()
        for _ in range(25):
            residual = colours - design @ coefficients
            red = np.log(share) + _log_normal(residual, np.hypot(noise, hats @ scatter))
            other = np.log(1 - share) + _log_normal(residual - other_mean, np.hypot(noise, other_width))
            is_red = 1 / (1 + np.exp(np.clip(other - red, -50, 50)))
            share = float(np.clip(is_red.mean(), 0.02, 0.98))
            rest = np.maximum(1 - is_red, 1e-9)[:, None]
            other_mean = (rest * residual).sum(axis=0) / rest.sum()
            spread = (rest * ((residual - other_mean) ** 2 - noise**2)).sum(axis=0) / rest.sum()
            other_width = np.sqrt(np.maximum(spread, _OTHER_WIDTH**2 / 4))
            for c in range(3):
                weight = np.sqrt(is_red) / np.hypot(noise[:, c], hats @ scatter[:, c])
                coefficients[:, c] = np.linalg.lstsq(design * weight[:, None], colours[:, c] * weight, rcond=None)[0]
                residual_c = colours[:, c] - design @ coefficients[:, c]
                scatter[:, c] = _intrinsic_scatter(residual_c, noise[:, c], hats * is_red[:, None])
        return cls(nodes, coefficients[:-1], coefficients[-1], scatter)

    def mean(self, z: ArrayLike, ref_mag: ArrayLike) -> np.ndarray:
        """Mean colours (n, 3) of red galaxies of total i magnitude ``ref_mag`` (n,) at ``z`` (a number or (n,))."""
        z, ref_mag = np.broadcast_arrays(np.asarray(z, float), np.asarray(ref_mag, float))
        at_star = np.stack([np.interp(z, self.z, column) for column in self.colour.T], axis=-1)
        return at_star + self.slope * (ref_mag - m_star_i_mag(z))[..., None]

    def chi2(self, mag: np.ndarray, mag_err: np.ndarray, ref_mag: np.ndarray, z: float) -> np.ndarray:
        """(n,) chi2 of galaxies about the red sequence at one redshift, with errors' full covariance and the
        scatter."""
        colours, covariance = colours_of(np.asarray(mag, float), np.asarray(mag_err, float))
        scatter = np.array([np.interp(z, self.z, column) for column in self.scatter.T])
        covariance = covariance + np.diag(scatter**2)
        residual = colours - self.mean(z, ref_mag)
        return np.einsum("nc,nc->n", residual, np.linalg.solve(covariance, residual[:, :, None])[:, :, 0])

    def to_dict(self) -> dict[str, list]:
        """Plain lists, for JSON or TOML."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in ("z", "colour", "slope", "scatter")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RedSequence:
        """The inverse of ``to_dict``."""
        return cls(*(np.asarray(values[name], float) for name in ("z", "colour", "slope", "scatter")))


_OTHER_MEAN, _OTHER_WIDTH = np.array([-0.4, -0.1, -0.1]), np.array([0.25, 0.12, 0.12])
"""Where the fit of the red sequence starts to look for other galaxies; half the width is the least it may take."""


def _log_normal(residual: np.ndarray, width: np.ndarray) -> np.ndarray:
    """(n,) log of a product of normal densities over colours, without the constant."""
    return -(0.5 * (residual / width) ** 2 + np.log(width)).sum(axis=1)


def _intrinsic_scatter(residual: np.ndarray, noise: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(k,) scatter beyond the noise for k sets of weights (n, k): where the mean normalised square is one."""
    low, high = np.full(weight.shape[1], 0.004), np.full(weight.shape[1], 0.3)
    for _ in range(12):
        middle = np.sqrt(low * high)
        square = (weight * (residual[:, None] ** 2 / (noise[:, None] ** 2 + middle**2) - 1)).sum(axis=0)
        low, high = np.where(square > 0, middle, low), np.where(square > 0, high, middle)
    return np.sqrt(low * high)


@dataclass(frozen=True, eq=False)
class Background:
    """Surface density of galaxies that belong to no cluster in question, Sigma_g(m_i, chi2 | z).

    Attributes:
        z: (k,) redshifts at which chi2 was computed.
        mag_edges: (p + 1,) edges in i magnitude.
        chi2_edges: (q + 1,) edges in chi2.
        density: (k, p, q) galaxies per arcsec2, magnitude and unit chi2, over sqrt(chi2): in three colours the
            density of galaxies spread smoothly over colour rises as that root, and what is left varies slowly within
            a cell.
    """

    z: np.ndarray
    mag_edges: np.ndarray
    chi2_edges: np.ndarray
    density: np.ndarray

    @classmethod
    def fit(
        cls,
        catalogues: Sequence[GALAXIES],
        area_arcsec2: float,
        red_sequence: RedSequence,
        z: ArrayLike = BACKGROUND_Z,
    ) -> Background:
        """Measure the density on fields without clusters, or on fields so wide that theirs do not matter.

        Args:
            catalogues: galaxies of the fields.
            area_arcsec2: area of all the fields together.
            red_sequence: what chi2 is measured about.
            z: redshifts to tabulate.

        Raises:
            Pix2massError: if the area is not positive or there are no galaxies.
        """
        mag = np.concatenate([np.asarray(c["mag"], float) for c in catalogues]) if len(catalogues) else np.zeros((0, 5))
        if not area_arcsec2 > 0 or len(mag) == 0:
            raise Pix2massError(f"background: expected galaxies and an area, got {len(mag)} and {area_arcsec2} arcsec2")
        mag_err = np.concatenate([np.asarray(c["mag_err"], float) for c in catalogues])
        ref_mag = np.concatenate([reference_mag(c) for c in catalogues])
        z = np.asarray(z, float)
        mag_edges, chi2_edges = np.arange(12.0, 22.21, 0.2), np.arange(0.0, CHI2_MAX + 0.1, 0.5)
        density = np.empty((len(z), len(mag_edges) - 1, len(chi2_edges) - 1))
        for k, redshift in enumerate(z):
            chi2 = red_sequence.chi2(mag, mag_err, ref_mag, redshift)
            counts, _, _ = np.histogram2d(ref_mag, chi2, (mag_edges, chi2_edges))
            density[k] = _smooth(counts, chi2_edges)
        density /= area_arcsec2 * 0.2
        return cls(z, mag_edges, chi2_edges, density)

    def at(self, z: float, ref_mag: np.ndarray, chi2: np.ndarray) -> np.ndarray:
        """(n,) density Sigma_g per arcsec2, magnitude and unit chi2, linear in z; 0 outside the tables."""
        position = float(np.interp(z, self.z, np.arange(len(self.z))))
        low = min(int(position), len(self.z) - 2) if len(self.z) > 1 else 0
        high = min(low + 1, len(self.z) - 1)
        table = (1 - (position - low)) * self.density[low] + (position - low) * self.density[high]
        row = np.searchsorted(self.mag_edges, ref_mag, "right") - 1
        column = np.searchsorted(self.chi2_edges, chi2, "right") - 1
        inside = (row >= 0) & (row < table.shape[0]) & (column >= 0) & (column < table.shape[1])
        found = np.zeros(len(row))
        found[inside] = table[row[inside], column[inside]] * np.sqrt(chi2[inside])
        return found


def _smooth(counts: np.ndarray, chi2_edges: np.ndarray) -> np.ndarray:
    """Counts over the integral of sqrt(chi2) in each cell, both smoothed by one magnitude and two chi2 cells.

    Cells of bright galaxies hold few or none; the floor of a thousandth of a galaxy keeps their density above zero.
    """
    from scipy.ndimage import gaussian_filter

    root = np.diff(chi2_edges**1.5) / 1.5
    smooth, weight = (
        gaussian_filter(np.asarray(array, float), (1.0, 2.0), mode="constant")
        for array in (counts, np.broadcast_to(root, counts.shape))
    )
    return np.maximum(smooth, 1e-3) / weight


@dataclass(frozen=True, eq=False)
class RichnessResult:
    """Richness of one cluster.

    Attributes:
        richness: lambda, corrected for the masked part; 0 where no cluster stands out.
        richness_err: standard deviation from membership and from the masked part.
        r_c_mpc: radius R_c(lambda) in proper Mpc of H0 = 70.
        scale: factor S >= 1 by which the counted members were multiplied.
        membership: (n,) probability of each galaxy of the catalogue, in its order.
    """

    richness: float
    richness_err: float
    r_c_mpc: float
    scale: float
    membership: np.ndarray


def radius_mpc(richness: ArrayLike) -> np.ndarray:
    """R_c = R_0 (lambda/100)^0.2 in proper Mpc: Rykoff et al. 2012."""
    return R_0_MPC * (np.asarray(richness, float) / 100.0) ** R_C_POWER


def _profile(radius: np.ndarray) -> np.ndarray:
    """Projected NFW surface density, unnormalised, constant inside the core: Bartelmann 1996, A&A 313, 697."""
    x = np.maximum(radius, NFW_CORE_MPC) / NFW_SCALE_MPC
    root = np.sqrt(np.abs(x**2 - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.where(x > 1, np.arctan(root / (1 + x)), np.arctanh(np.minimum(root / (1 + x), 1 - 1e-12)))
        return np.where(root < 1e-3, 1 / 3, (1 - 2 * angle / root) / (x**2 - 1))


_R_GRID = np.linspace(0.0, 2.4, 481)
_ENCLOSED = np.concatenate(
    [
        [0.0],
        np.cumsum(2 * np.pi * (_R_GRID[1:] + _R_GRID[:-1]) / 2 * _profile((_R_GRID[1:] + _R_GRID[:-1]) / 2) * 0.005),
    ]
)


def _luminosity_filter(ref_mag: np.ndarray, z: float) -> np.ndarray:
    """Schechter density per magnitude, one galaxy between BRIGHTEST_MAG and LUMINOUS_MAG, 0 outside."""
    grid = np.linspace(BRIGHTEST_MAG, LUMINOUS_MAG, 400)

    def density(dm: np.ndarray) -> np.ndarray:
        luminosity = 10 ** (-0.4 * dm)
        return luminosity ** (SCHECHTER_ALPHA + 1) * np.exp(-luminosity)

    total = np.trapezoid(density(grid), grid)
    dm = ref_mag - m_star_i_mag(z)
    return np.where((dm > BRIGHTEST_MAG) & (dm < LUMINOUS_MAG), density(dm) / total, 0.0)


def separation_arcsec(
    ra_deg: np.ndarray, dec_deg: np.ndarray, centre_ra_deg: float, centre_dec_deg: float
) -> np.ndarray:
    """Great-circle distance of positions from a centre, haversine formula."""
    ra, dec, ra_0, dec_0 = (np.radians(angle) for angle in (ra_deg, dec_deg, centre_ra_deg, centre_dec_deg))
    half = np.sin((dec - dec_0) / 2) ** 2 + np.cos(dec) * np.cos(dec_0) * np.sin((ra - ra_0) / 2) ** 2
    return np.degrees(2 * np.arcsin(np.sqrt(half))) * 3600.0


Covered = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Given ra_deg and dec_deg, which positions were observed and not masked (bool)."""


def _covered_share(z: float, ra_deg: float, dec_deg: float, covered: Covered | None) -> np.ndarray:
    """Share of the filter's weight within each radius of ``_R_GRID`` that was observed, by sums over rings of 64
    points."""
    if covered is None:
        return np.ones(len(_R_GRID))
    middles = (_R_GRID[1:] + _R_GRID[:-1]) / 2
    angle = np.arange(64) * 2 * np.pi / 64 + 0.05
    offset_deg = middles[:, None] * 1000.0 / float(kpc_per_arcsec(z)) / 3600.0
    dec = dec_deg + offset_deg * np.sin(angle)
    ra = ra_deg + offset_deg * np.cos(angle) / np.cos(np.radians(dec))
    share = np.asarray(covered(ra.ravel() % 360.0, dec.ravel()), float).reshape(dec.shape).mean(axis=1)
    seen = np.concatenate([[0.0], np.cumsum(np.diff(_ENCLOSED) * share)])
    return np.concatenate([share[:1], seen[1:] / _ENCLOSED[1:]])


def richness(
    galaxies: GALAXIES,
    z: float,
    ra_deg: float,
    dec_deg: float,
    red_sequence: RedSequence,
    background: Background,
    *,
    covered: Covered | None = None,
    i_limit_mag: float = 21.0,
) -> RichnessResult:
    """Measure lambda of one cluster.

    Solves lambda = S sum_i p_i, p = lambda u / (lambda u + b) over galaxies inside R_c(lambda), Rykoff et al. 2014.
    Here u = Sigma(R) phi(m) rho(chi2) and b is the background density in the same units; the common factor 2 pi R
    cancels. The largest solution is taken; lambda = 0 always is one.

    Args:
        galaxies: catalogue around the cluster; it must reach R_c, 1.8 Mpc at lambda = 300.
        z: the cluster's redshift.
        ra_deg: right ascension of its centre.
        dec_deg: declination of its centre.
        red_sequence: mean colours of members.
        background: density of other galaxies.
        covered: which positions were observed; everything by default.
        i_limit_mag: depth of the catalogue. Members between it and 0.2 L* are made up for through S.

    Raises:
        Pix2massError: if z lies outside the background's range, or nothing of the filter's area or luminosities is
        seen.
    """
    if not background.z[0] <= z <= background.z[-1]:
        raise Pix2massError(
            f"richness: z = {z:.3f} lies outside {background.z[0]:.2f}-{background.z[-1]:.2f}, where the background "
            "is known; calibrate with a wider range"
        )
    kpc = float(kpc_per_arcsec(z))
    ref_mag = reference_mag(galaxies)
    radius = separation_arcsec(galaxies["ra_deg"], galaxies["dec_deg"], ra_deg, dec_deg) * kpc / 1000.0
    dm = ref_mag - m_star_i_mag(z)
    near = np.flatnonzero((radius < _R_GRID[-1]) & (dm < LUMINOUS_MAG) & (dm > BRIGHTEST_MAG) & (ref_mag < i_limit_mag))
    membership = np.zeros(len(ref_mag))
    chi2 = red_sequence.chi2(np.asarray(galaxies["mag"])[near], np.asarray(galaxies["mag_err"])[near], ref_mag[near], z)
    near, chi2 = near[chi2 < CHI2_MAX], np.maximum(chi2[chi2 < CHI2_MAX], 0.0)
    radius, ref_mag = radius[near], ref_mag[near]

    # chi2 density with three degrees of freedom: sqrt(x) exp(-x/2) / sqrt(2 pi).
    u = _profile(radius) * _luminosity_filter(ref_mag, z) * np.sqrt(chi2 / (2 * np.pi)) * np.exp(-chi2 / 2)
    b = background.at(z, ref_mag, chi2) * (1000.0 / kpc) ** 2

    luminosities = np.linspace(BRIGHTEST_MAG, LUMINOUS_MAG, 400)
    phi = _luminosity_filter(luminosities + m_star_i_mag(z), z)
    deep_enough = phi[luminosities + m_star_i_mag(z) < i_limit_mag].sum() / phi.sum()
    share = _covered_share(z, ra_deg, dec_deg, covered) * deep_enough
    if not share[1:].max() > 0.02:
        raise Pix2massError(
            f"richness: at ra {ra_deg:.4f}, dec {dec_deg:.4f}, z {z:.3f} less than 2% of the aperture and luminosity "
            "range was observed; leave this cluster out"
        )

    def members(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities (k, n) and scale factors (k,) at each of k trial values, and R_c (k,)."""
        r_c = radius_mpc(value)
        inside = radius < r_c[:, None]
        signal = value[:, None] * u / np.interp(r_c, _R_GRID, _ENCLOSED)[:, None]
        probability = np.where(inside & (signal > 0), signal / np.maximum(signal + b, 1e-300), 0.0)
        return probability, 1.0 / np.maximum(np.interp(r_c, _R_GRID, share), 0.02), r_c

    grid = _LAMBDA_GRID
    probability, scale, _ = members(grid)
    excess = scale * probability.sum(axis=1) - grid
    above = np.flatnonzero(excess > 0)
    if len(above) == 0 or above[-1] == len(grid) - 1:
        solution = 0.0 if len(above) == 0 else grid[-1]
    else:
        # p steps where R_c passes a galaxy, so the interval is refined rather than a root assumed smooth.
        low, high = grid[above[-1]], grid[above[-1] + 1]
        for _ in range(3):
            trial = np.linspace(low, high, 9)
            probability, scale, _ = members(trial)
            positive = np.flatnonzero(scale * probability.sum(axis=1) - trial > 0)
            last = positive[-1] if len(positive) else 0
            low, high = trial[last], trial[min(last + 1, 8)]
        solution = (low + high) / 2
    if solution == 0:
        return RichnessResult(0.0, 0.0, 0.0, 1.0, membership)
    probability, scale, r_c = members(np.array([solution]))
    membership[near] = probability[0]
    p, s = probability[0], float(scale[0])
    variance = s**2 * np.sum(p * (1 - p)) + (s - 1) * solution
    return RichnessResult(float(solution), float(np.sqrt(variance)), float(r_c[0]), s, membership)


def calibrate(
    red_galaxies: GALAXIES, red_z: np.ndarray, fields: Sequence[GALAXIES], area_arcsec2: float
) -> tuple[RedSequence, Background]:
    """Red sequence and background from a training sky, as an observer would get them.

    Args:
        red_galaxies: members of clusters, or other red galaxies, with redshifts. Blue ones among them are clipped.
        red_z: (n,) their redshifts.
        fields: catalogues of fields chosen without regard to clusters.
        area_arcsec2: area of all the fields.
    """
    sequence = RedSequence.fit(
        red_galaxies["mag"], red_galaxies["mag_err"], reference_mag(red_galaxies), np.asarray(red_z, float)
    )
    return sequence, Background.fit(fields, area_arcsec2, sequence)


RICHNESS_FLOOR = 3.0
"""Richness below this, 0 included, counts as this in the richness-mass relation: a logarithm needs a floor, and so few
members cannot be told from none."""


def _relation_terms(richness: ArrayLike, z: ArrayLike) -> np.ndarray:
    floored = np.maximum(np.asarray(richness, float), RICHNESS_FLOOR)
    return np.stack(
        np.broadcast_arrays(1.0, np.log10(floored / 40.0), np.log10((1 + np.asarray(z, float)) / 1.3)), axis=-1
    )


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
    terms, mass = _relation_terms(richness, z), np.asarray(log10_m500c, float)
    if terms.ndim != 2 or mass.shape != terms.shape[:1] or len(mass) < 4:
        raise Pix2massError(
            f"richness-mass relation: expected at least 4 clusters in columns of one length, got richness "
            f"{np.shape(richness)}, z {np.shape(z)}, mass {mass.shape}"
        )
    if not (np.isfinite(terms).all() and np.isfinite(mass).all()):
        raise Pix2massError(
            "richness-mass relation: a richness, redshift or mass is not finite; leave such clusters out"
        )
    a, b, c = np.linalg.lstsq(terms, mass, rcond=None)[0]
    return RichnessMassRelation(float(a), float(b), float(c))
