"""The matched filter: lambda of one cluster, or of many in one large catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy.table import QTable
from numpy.typing import ArrayLike

from pix2mass.cosmology import H0_KM_S_MPC, kpc_per_arcsec, m_star_i_mag
from pix2mass.richness.background import CHI2_MAX, Background
from pix2mass.richness.red_sequence import (
    GALAXIES,
    N_COLOURS,
    RedSequence,
    colours_of,
    reference_mag,
    reference_mag_err,
)
from pix2mass.types import Pix2massError

LUMINOUS_MAG = 1.75
"""L > 0.2 L*, in magnitudes fainter than m*."""

NFW_SCALE_MPC, NFW_CORE_MPC, R_0_MPC, R_SOFT_MPC = (
    length / (H0_KM_S_MPC / 100.0) for length in (0.15, 0.10, 1.0, 0.05)
)
"""Filter's scale radius, core, R_c at lambda = 100, and softness of the edge at R_c: 0.15, 0.1, 1.0 and 0.05 Mpc/h
(Rykoff et al. 2012, sections 3.1 and 4; Rykoff et al. 2014; the last as redMaPPer's SDSS configuration has it)."""

R_C_POWER = 0.2
SCHECHTER_ALPHA = -1.0
"""Faint-end slope of the filter: Rykoff et al. 2014."""

MASKED_SHARE_MAX = 0.2
"""Beyond this masked or missing share a richness is flagged: the limit of the redMaPPer DR8 catalogue."""

_LAMBDA_GRID = np.geomspace(0.3, 500.0, 90)
_R_GRID = np.linspace(0.0, 2.4, 481)
_DM_GRID = np.linspace(-4.0, 4.0, 801)


@dataclass(frozen=True, eq=False)
class RichnessResult:
    """Richness of one cluster.

    Attributes:
        richness: lambda, corrected for the masked part; 0 where no cluster stands out.
        richness_err: standard deviation from membership and from the masked part.
        r_c_mpc: radius R_c(lambda) in proper Mpc of H0 = 70.
        scale: factor S >= 1 by which the counted members were multiplied.
        membership: (n,) probability of each galaxy of the catalogue, in its order.
        calibrated: whether the red sequence was fitted to galaxies on both sides of this redshift.
    """

    richness: float
    richness_err: float
    r_c_mpc: float
    scale: float
    membership: np.ndarray
    calibrated: bool = True

    @property
    def extrapolated(self) -> bool:
        """Use with care: more than a fifth of the members lies where nothing was observed, or the red sequence is not
        known at this redshift."""
        return not self.calibrated or self.scale > 1 / (1 - MASKED_SHARE_MAX)


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


_R_MIDDLE = (_R_GRID[1:] + _R_GRID[:-1]) / 2
_ENCLOSED = np.concatenate([[0.0], np.cumsum(2 * np.pi * _R_MIDDLE * _profile(_R_MIDDLE) * np.diff(_R_GRID))])


def _schechter(dm: np.ndarray) -> np.ndarray:
    luminosity = 10 ** (-0.4 * dm)
    return luminosity ** (SCHECHTER_ALPHA + 1) * np.exp(-luminosity)


_SCHECHTER_TOTAL = np.trapezoid(np.where(_DM_GRID <= LUMINOUS_MAG, _schechter(_DM_GRID), 0.0), _DM_GRID)


def _luminosity_filter(dm: np.ndarray) -> np.ndarray:
    """Schechter density per magnitude at ``dm`` = i - m*, one galaxy brighter than LUMINOUS_MAG; it goes on beyond."""
    return _schechter(dm) / _SCHECHTER_TOTAL


def _below(value: np.ndarray, limit: ArrayLike, sigma: ArrayLike) -> np.ndarray:
    """Probability that a quantity measured as ``value`` with an error ``sigma`` lies below a limit."""
    from scipy.special import ndtr

    return ndtr((limit - value) / np.maximum(sigma, 1e-6))


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
    angle = np.arange(64) * 2 * np.pi / 64 + 0.05
    offset_deg = _R_MIDDLE[:, None] * 1000.0 / float(kpc_per_arcsec(z)) / 3600.0
    dec = dec_deg + offset_deg * np.sin(angle)
    ra = ra_deg + offset_deg * np.cos(angle) / np.cos(np.radians(dec))
    share = np.asarray(covered(ra.ravel() % 360.0, dec.ravel()), float).reshape(dec.shape).mean(axis=1)
    seen = np.concatenate([[0.0], np.cumsum(np.diff(_ENCLOSED) * share)])
    return np.concatenate([share[:1], seen[1:] / _ENCLOSED[1:]])


def ten_sigma_depth_mag(galaxies: GALAXIES) -> float:
    """The i magnitude at which the median error is 2.5 / ln(10) / 10: how deep a catalogue can be trusted.

    Bins of a quarter magnitude, linear in the log of the error; the faintest bin's edge where no galaxy is so noisy.
    """
    ref_mag, error = reference_mag(galaxies), reference_mag_err(galaxies)
    edges = np.arange(16.0, ref_mag.max() + 0.25, 0.25)
    which = np.digitize(ref_mag, edges) - 1
    full = [k for k in range(len(edges) - 1) if (which == k).sum() >= 10]
    if len(full) < 2:
        return float(ref_mag.max())
    median = np.array([np.median(error[which == k]) for k in full])
    middle = edges[full] + 0.125
    limit = np.log(0.25 / np.log(10.0))
    return float(np.interp(limit, np.maximum.accumulate(np.log(median)), middle, right=edges[full[-1] + 1]))


def _depth_share(limit_dm: float, sigma: float) -> float:
    """Share of the filter's galaxies brighter than the catalogue's limit, both with magnitude errors ``sigma``."""
    wanted = _luminosity_filter(_DM_GRID) * _below(_DM_GRID, LUMINOUS_MAG, sigma)
    return float(wanted[limit_dm > _DM_GRID].sum() / wanted.sum())


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

    Solves lambda = S sum_i p_i t_i s_i, p = lambda u / (lambda u + b), Rykoff et al. 2014. Here u = Sigma(R) phi(m)
    rho(chi2) and b is the background density in the same units; the common factor 2 pi R cancels. The limits in
    magnitude and radius are soft: t is the probability that a galaxy with its magnitude error is brighter than 0.2 L*,
    s that it lies inside R_c(lambda) given a width of 0.05 Mpc/h. The largest solution is taken; lambda = 0 always is
    one.

    Args:
        galaxies: catalogue around the cluster; it must reach beyond R_c, 1.8 Mpc at lambda = 300.
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
    kpc, m_star = float(kpc_per_arcsec(z)), float(m_star_i_mag(z))
    ref_mag, ref_mag_err = reference_mag(galaxies), reference_mag_err(galaxies)
    membership = np.zeros(len(ref_mag))
    radius = separation_arcsec(galaxies["ra_deg"], galaxies["dec_deg"], ra_deg, dec_deg) * kpc / 1000.0
    dm = ref_mag - m_star
    near = np.flatnonzero(
        (radius < _R_GRID[-1]) & (dm > _DM_GRID[0]) & (dm < LUMINOUS_MAG + 5 * ref_mag_err) & (ref_mag < i_limit_mag)
    )
    chi2 = red_sequence.chi2(np.asarray(galaxies["mag"])[near], np.asarray(galaxies["mag_err"])[near], ref_mag[near], z)
    near, chi2 = near[chi2 < CHI2_MAX], np.maximum(chi2[chi2 < CHI2_MAX], 0.0)
    radius, dm, ref_mag, ref_mag_err = radius[near], dm[near], ref_mag[near], ref_mag_err[near]

    # chi2 density with four degrees of freedom: x exp(-x/2) / 4.
    u = _profile(radius) * _luminosity_filter(dm) * _chi2_density(chi2)
    b = background.at(z, ref_mag, chi2) * (1000.0 / kpc) ** 2
    bright = _below(dm, LUMINOUS_MAG, ref_mag_err)

    faint = ref_mag_err[dm > min(LUMINOUS_MAG, i_limit_mag - m_star) - 0.5]
    sigma = float(np.median(faint)) if len(faint) >= 5 else 0.08
    share = _covered_share(z, ra_deg, dec_deg, covered) * _depth_share(i_limit_mag - m_star, sigma)
    if not share[1:].max() > 0.02:
        raise Pix2massError(
            f"richness: at ra {ra_deg:.4f}, dec {dec_deg:.4f}, z {z:.3f} less than 2% of the aperture and luminosity "
            "range was observed; leave this cluster out"
        )

    def members(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Membership (k, n) and scale factors (k,) at each of k trial values, and R_c (k,)."""
        r_c = radius_mpc(value)
        signal = value[:, None] * u / np.interp(r_c, _R_GRID, _ENCLOSED)[:, None]
        weight = bright * _below(radius, r_c[:, None], R_SOFT_MPC)
        probability = weight * np.where(signal > 0, signal / np.maximum(signal + b, 1e-300), 0.0)
        return probability, 1.0 / np.maximum(np.interp(r_c, _R_GRID, share), 0.02), r_c

    def excess(value: np.ndarray) -> np.ndarray:
        probability, scale, _ = members(value)
        return scale * probability.sum(axis=1) - value

    solution = _largest_root(excess)
    calibrated = bool(red_sequence.z[0] <= z <= red_sequence.z[-1])
    if solution == 0:
        return RichnessResult(0.0, 0.0, 0.0, 1.0, membership, calibrated)
    probability, scale, r_c = members(np.array([solution]))
    p, s = probability[0], float(scale[0])
    membership[near] = p
    variance = s**2 * np.sum(p * (1 - p)) + (s - 1) * solution
    return RichnessResult(float(solution), float(np.sqrt(variance)), float(r_c[0]), s, membership, calibrated)


def _chi2_density(chi2: np.ndarray) -> np.ndarray:
    from scipy.special import gamma

    half = N_COLOURS / 2
    return chi2 ** (half - 1) * np.exp(-chi2 / 2) / (2**half * gamma(half))


def _largest_root(excess: Callable[[np.ndarray], np.ndarray]) -> float:
    """The largest value at which ``excess`` falls through zero, to a few 1e-4 of itself; 0 if it is never positive."""
    grid = _LAMBDA_GRID
    above = np.flatnonzero(excess(grid) > 0)
    if len(above) == 0:
        return 0.0
    if above[-1] == len(grid) - 1:
        return float(grid[-1])
    low, high = grid[above[-1]], grid[above[-1] + 1]
    for _ in range(3):
        trial = np.linspace(low, high, 9)
        positive = np.flatnonzero(excess(trial) > 0)
        last = positive[-1] if len(positive) else 0
        low, high = trial[last], trial[min(last + 1, 8)]
    return float((low + high) / 2)


class SkyIndex:
    """Finds the galaxies around a position without looking at all of them: sorted into strips of declination, and by
    right ascension within each."""

    def __init__(self, ra_deg: np.ndarray, dec_deg: np.ndarray, strip_deg: float = 0.1) -> None:
        """Sort a catalogue.

        Args:
            ra_deg: (n,) right ascensions.
            dec_deg: (n,) declinations.
            strip_deg: height of a strip.
        """
        self._strip_deg = strip_deg
        ra_deg = np.asarray(ra_deg, float) % 360.0
        key = np.floor((np.asarray(dec_deg, float) + 90.0) / strip_deg) * 400.0 + ra_deg
        self._order = np.argsort(key)
        self._key = key[self._order]

    def near(self, ra_deg: float, dec_deg: float, radius_deg: float) -> np.ndarray:
        """Row numbers of a set of galaxies that holds all within ``radius_deg``, and some beyond."""
        low, high = dec_deg - radius_deg, dec_deg + radius_deg
        bottom, top = ((np.clip(edge, -90.0, 90.0) + 90.0) / self._strip_deg for edge in (low, high))
        strips = range(int(bottom), int(top) + 1)
        # Widest reach in right ascension of a circle on the sphere.
        widest = np.cos(np.radians(dec_deg)) if max(abs(low), abs(high)) < 89.9 else 0.0
        ratio = np.sin(np.radians(radius_deg)) / widest if widest > 0 else 1.0
        reach = np.degrees(np.arcsin(ratio)) if ratio < 1 else 180.0
        start, end = ra_deg % 360.0 - reach, ra_deg % 360.0 + reach
        if reach >= 180.0:
            ranges = [(0.0, 360.0)]
        else:
            ranges = [(max(start, 0.0), min(end, 360.0))]
            ranges += [(start + 360.0, 360.0)] if start < 0 else []
            ranges += [(0.0, end - 360.0)] if end > 360.0 else []
        edges = np.array([(400.0 * k + a, 400.0 * k + b) for k in strips for a, b in ranges])
        first, last = np.searchsorted(self._key, edges[:, 0], "left"), np.searchsorted(self._key, edges[:, 1], "right")
        return np.concatenate([self._order[a:b] for a, b in zip(first, last, strict=True)])


def measure(
    galaxies: GALAXIES,
    clusters: Any,
    red_sequence: RedSequence,
    background: Background,
    *,
    covered: Covered | None = None,
    i_limit_mag: float = 21.0,
    index: SkyIndex | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QTable:
    """Measure lambda of many clusters in one catalogue of galaxies of any size.

    Args:
        galaxies: the catalogue; arrays in memory or memory-mapped.
        clusters: table with columns z, ra_deg and dec_deg, and id where it has one.
        red_sequence: mean colours of members.
        background: density of other galaxies.
        covered: which positions were observed; everything by default.
        i_limit_mag: depth of the catalogue.
        index: of these galaxies, where the caller already has one.
        progress: called with the number done and the number in all.

    Returns:
        A row per cluster, in order: id, richness, richness_err, r_c_mpc, scale, and extrapolated (bool, see
        :attr:`RichnessResult.extrapolated`). NaN and True where nothing can be measured.
    """
    index = index or SkyIndex(galaxies["ra_deg"], galaxies["dec_deg"])
    z, ra, dec = (np.asarray(clusters[name], float) for name in ("z", "ra_deg", "dec_deg"))
    out = np.full((len(z), 4), np.nan)
    flagged = np.ones(len(z), bool)
    names = set(getattr(clusters, "colnames", ()) or clusters)
    for row in range(len(z)):
        if background.z[0] <= z[row] <= background.z[-1]:
            reach_deg = _R_GRID[-1] * 1000.0 / float(kpc_per_arcsec(z[row])) / 3600.0
            near = index.near(ra[row], dec[row], reach_deg)
            part = {name: np.asarray(column)[near] for name, column in galaxies.items()}
            try:
                found = richness(
                    part, z[row], ra[row], dec[row], red_sequence, background, covered=covered, i_limit_mag=i_limit_mag
                )
            except Pix2massError:
                continue  # nothing observed there: the row stays NaN and flagged
            out[row] = found.richness, found.richness_err, found.r_c_mpc, found.scale
            flagged[row] = found.extrapolated
        if progress is not None:
            progress(row + 1, len(z))
    columns = {"id": np.asarray(clusters["id"])} if "id" in names else {"id": np.arange(len(z)).astype(str)}
    columns |= dict(zip(("richness", "richness_err", "r_c_mpc", "scale"), out.T, strict=True))
    return QTable({**columns, "extrapolated": flagged})


def red_sequence_count(
    galaxies: GALAXIES,
    z: float,
    ra_deg: float,
    dec_deg: float,
    red_sequence: RedSequence,
    background: Sequence[GALAXIES],
    area_arcsec2: float,
    *,
    aperture_mpc: float = 1.0,
    n_sigma: float = 2.0,
    i_limit_mag: float = 21.0,
) -> float:
    """The simple rival: galaxies with L > 0.2 L* on the g-r red sequence inside a fixed aperture, less the background.

    Args:
        galaxies: catalogue around the cluster.
        z: redshift.
        ra_deg: right ascension of the centre.
        dec_deg: declination of the centre.
        red_sequence: mean colours and scatter.
        background: catalogues of blank fields.
        area_arcsec2: their area.
        aperture_mpc: radius in proper Mpc.
        n_sigma: half-width in g-r, in units of scatter and error together.
        i_limit_mag: depth of the catalogue.
    """

    def chosen(catalogue: GALAXIES) -> np.ndarray:
        ref_mag = reference_mag(catalogue)
        colours, noise = colours_of(catalogue["mag"], catalogue["mag_err"])
        offset = (colours - red_sequence.mean(z, ref_mag))[:, 1]
        width = np.sqrt(noise[:, 1, 1] + red_sequence.covariance[1, 1])
        return (np.abs(offset) < n_sigma * width) & (ref_mag < min(m_star_i_mag(z) + LUMINOUS_MAG, i_limit_mag))

    aperture_arcsec = aperture_mpc * 1000.0 / float(kpc_per_arcsec(z))
    inside = separation_arcsec(galaxies["ra_deg"], galaxies["dec_deg"], ra_deg, dec_deg) < aperture_arcsec
    expected = sum(chosen(field).sum() for field in background) * np.pi * aperture_arcsec**2 / area_arcsec2
    return float((chosen(galaxies) & inside).sum() - expected)


def calibrate(
    red_galaxies: GALAXIES,
    red_z: np.ndarray,
    fields: Sequence[GALAXIES],
    area_arcsec2: float,
    central: np.ndarray | None = None,
) -> tuple[RedSequence, Background]:
    """Red sequence and background from a training sky, as an observer would get them.

    Args:
        red_galaxies: members of clusters, or other red galaxies, with redshifts. Blue ones among them do no harm.
        red_z: (n,) their redshifts.
        fields: catalogues of fields chosen without regard to clusters.
        area_arcsec2: area of all the fields.
        central: (n,) which of the red galaxies are centrals of clusters.
    """
    sequence = RedSequence.fit(
        red_galaxies["mag"], red_galaxies["mag_err"], reference_mag(red_galaxies), np.asarray(red_z, float), central
    )
    return sequence, Background.fit(fields, area_arcsec2, sequence)
