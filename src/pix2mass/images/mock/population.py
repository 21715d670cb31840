"""Who is on the mock sky: clusters with masses, their members, and the galaxies, groups and stars in front and behind.

Every random number belongs to a named stream that depends on the seed and the cluster's id alone, so the same cluster
has the same sky whatever was drawn before it. Sources of the field are drawn outwards from the centre: a wider box
holds all the sources of a narrower one. Magnitudes are SDSS magnitudes free of Galactic extinction.
``docs/mock_sky.md`` gives the physics and its sources.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.config import MockConfig
from pix2mass.cosmology import H0_KM_S_MPC, MASS_DEFINITION, OMEGA_M, kpc_per_arcsec, m_star_i_mag, r500c_kpc
from pix2mass.images.mock.templates import RED_COLOUR_SCATTER_MAG, RED_COLOUR_SLOPE, colours_to_offsets, templates
from pix2mass.types import Pix2massError

ROW = Any
"""A cluster: anything with ``row[name]`` for id, z and, unless the sky is blank, log10_m500c_true (or log10_m500c)."""

RICHNESS_PIVOT = 40.0
RICHNESS_PIVOT_LOG10_M500C = 14.24
RICHNESS_SLOPE = 1.0
"""Median lambda = 40 (M500c / 10^14.24 Msun)^1. Amplitude: Simet et al. 2017, MNRAS 466, 3103 (M200m = 10^14.37
Msun/h at lambda 40, here M500c = 0.53 M200m), and the MCXC masses of redMaPPer clusters. Slope between the 0.75 of
Simet et al. and the 1.14 of Saro et al. 2015, MNRAS 454, 2305."""

LUMINOUS_MAG = 1.75
"""L > 0.2 L* is i < m* + 1.75: Rykoff et al. 2012, ApJ 746, 178."""

R200C_PER_R500C = 1.53
"""Of an NFW halo with c200 = 4.5, typical of 10^14.5 Msun: Diemer & Joyce 2019, ApJ 871, 168."""

GALAXY_CONCENTRATION = 5.0
"""c200 of red cluster galaxies: between 3-4 of all galaxies (Lin et al. 2004, ApJ 610, 745) and about 6 of red ones,
the 0.15 Mpc/h scale radius used by Rykoff et al. 2012."""

MEMBER_RADIUS_R200C = 2.0
"""Members are drawn to this projected radius; beyond it the field takes over."""

RED_FRACTION_CENTRE, RED_FRACTION_OUTSKIRTS = 0.88, 0.45
"""Red fraction of luminous members at the centre and at R200c and beyond, linear between: Hansen et al. 2009, ApJ
699, 1333."""

BCG_PIVOT_MAG, BCG_SLOPE_MAG, BCG_SCATTER_MAG = -1.5, -0.82, 0.35
"""i - m* of the brightest galaxy at 10^14.24 Msun, its change per dex of mass, and its scatter: measured on the
redMaPPer DR8 central galaxies, for which lambda 10-20, 20-30, 30-50, 50-100 give -1.19, -1.32, -1.54, -1.74 with
scatter 0.4."""

BCG_SIZE_FACTOR = 1.5
"""Brightest galaxies are larger than others of their luminosity: Bernardi et al. 2007, AJ 133, 1741."""

DIFFUSE_LIGHT_R50_KPC = 100.0
"""Half-light radius of the diffuse light, order of magnitude of Zhang et al. 2019, ApJ 874, 165."""

GROUP_LOG10_M500C = (13.3, 15.2)
GROUP_Z = (0.03, 0.70)
"""Range of the haloes drawn along the line of sight."""

LF_RED = (-20.34, -0.57, 1.11e-2, 0.8)
LF_BLUE = (-20.45, -1.49, 0.38e-2, 1.4)
"""Schechter M* - 5 log h in r at z = 0.1, alpha, phi* / (h^3 Mpc^-3) of red and blue galaxies: Loveday et al. 2012,
MNRAS 420, 1239; last, brightening in magnitudes per unit redshift, near their Q and that of Blanton et al.
2003."""

FIELD_SCALE_RED, FIELD_SCALE_BLUE = 0.76, 0.95
"""Factors on phi* so that field and groups together match the counts and colours of i < 21 galaxies in the DR8
field."""

YOUNG_SHARE_BETA = (2.0, 1.5)
"""Beta distribution of the share of young light of blue galaxies, matched to the colours in the DR8 field."""

BLUE_COLOUR_SCATTER_MAG = np.array([0.08, 0.04, 0.03, 0.03])
REDDENING_SCATTER_MAG = 0.08
REDDENING_COLOURS = np.array([0.94, 1.02, 0.59, 0.43])
"""Blue galaxies also scatter by internal dust: |E(B-V)| times these, the colours of the Galactic extinction curve."""

STAR_COUNT_R145, STAR_COUNT_SLOPE, STAR_COUNT_SCATTER_LN = 130.0, 0.17, 0.35
STAR_BRIGHTEST_R_MAG = 13.0
"""Stars per deg2 and magnitude at r = 14.5 and their log10 slope, from photoObj 94-1-0012 (b = -46 deg); the scatter
stands for other Galactic latitudes. Brighter stars saturate SDSS."""

STAR_LOCUS = np.array(
    # g-i, u-g, g-r, r-i, i-z
    [
        [0.30, 0.85, 0.23, 0.07, 0.01],
        [0.48, 1.03, 0.35, 0.13, 0.05],
        [0.64, 1.23, 0.47, 0.17, 0.07],
        [0.84, 1.54, 0.61, 0.23, 0.12],
        [1.19, 2.06, 0.88, 0.31, 0.19],
        [1.70, 2.50, 1.22, 0.48, 0.31],
        [2.17, 2.58, 1.42, 0.75, 0.44],
        [2.61, 2.50, 1.49, 1.12, 0.63],
        [3.20, 2.55, 1.52, 1.68, 0.92],
    ]
)
"""Medians of 108 stars with r < 20.5 in photoObj 94-1-0012 in bins of g-r, extended at both ends along the locus of
Covey et al. 2007, AJ 134, 2398."""

STAR_G_I_QUANTILES = (0.3, 0.48, 0.62, 0.72, 1.0, 1.45, 1.8, 2.1, 2.35, 2.6, 3.2)
"""Deciles of g-i of the same stars."""

PHOTOMETRY_MAG = np.arange(15.5, 25.0)
PHOTOMETRY_SIGMA_NMGY = np.array(
    [
        [5.0, 3.8, 3.0, 1.795, 1.178, 0.889, 0.721, 0.612, 0.529, 0.45],
        [2.095, 1.182, 0.692, 0.477, 0.356, 0.278, 0.235, 0.205, 0.186, 0.17],
        [2.368, 1.258, 0.810, 0.571, 0.442, 0.368, 0.304, 0.27, 0.25, 0.23],
        [2.590, 1.444, 0.991, 0.736, 0.600, 0.488, 0.411, 0.37, 0.34, 0.32],
        [6.012, 3.888, 3.013, 2.407, 1.987, 1.697, 1.583, 1.4, 1.3, 1.2],
    ]
)
"""Standard deviation (nanomaggies) of model fluxes against magnitude, per band: medians in the DR8 field (mean E(B-V)
0.09), continued smoothly where it has no galaxies. Fluxes of large, bright galaxies are noisier."""

PHOTOMETRY_SIGMA_SCATTER_LN = 0.25
"""Scatter of those errors from galaxy to galaxy, common to the bands."""

BLEND_ARCSEC = 2.1
"""Sources closer than this are one source in the catalogue. Pairs of galaxies with i < 20.5 in the DR8 field are 0.0,
0.2, 0.3, 0.55 of those of random positions at 0-1, 1-1.5, 1.5-2, 2-2.5 arcsec, and about 1.0 beyond; as many are
missing as with a sharp limit at 2.1."""

COMPLETENESS_I_MAG, COMPLETENESS_WIDTH_MAG = 20.83, 0.19
"""Observed i at which half of the galaxies are listed, and the width (standard deviation) of the fall: counts of the
DR8 field over those of the mock sky are 0.98, 0.86, 0.40 at i 20.25-20.5-20.75-21."""

STARS_LISTED_R_MAG, STARS_LISTED_SHARE = 20.0, 0.05
"""Stars fainter than this are taken for galaxies in this share of cases, of the order of what is stated for SDSS: right
for 95% at r = 21 (Stoughton et al. 2002, AJ 123, 485)."""

LUPTITUDE_SOFTENING = np.array([1.4e-10, 0.9e-10, 1.2e-10, 1.8e-10, 7.4e-10])
"""b of asinh magnitudes, in maggies: Lupton, Gunn & Szalay 1999, AJ 118, 1406; SDSS DR12 magnitudes page."""


@dataclass(frozen=True, eq=False)
class Sources:
    """Sources in a box on the sky, n of them, in columns.

    Attributes:
        x_arcsec: (n,) offset from the box's centre towards the west, that is to the right of the picture.
        y_arcsec: (n,) offset towards the north.
        mag: (n, 5) true ugriz magnitudes, without Galactic extinction.
        z: (n,) redshift; 0 for stars.
        r50_arcsec: (n,) half-light radius along the major axis; 0 for stars.
        axis_ratio: (n,) minor over major axis.
        angle_deg: (n,) angle of the major axis, from the right of the picture towards its top.
        sersic_n: (n,) 1 or 4; 0 for stars.
        is_member: (n,) whether it belongs to the cluster in the centre.
        is_red: (n,) whether it lies on the red sequence at its redshift.
        is_star: (n,) whether it is a star.
        is_diffuse: (n,) whether it is intracluster light, which no catalogue lists.
    """

    x_arcsec: np.ndarray
    y_arcsec: np.ndarray
    mag: np.ndarray
    z: np.ndarray
    r50_arcsec: np.ndarray
    axis_ratio: np.ndarray
    angle_deg: np.ndarray
    sersic_n: np.ndarray
    is_member: np.ndarray
    is_red: np.ndarray
    is_star: np.ndarray
    is_diffuse: np.ndarray

    def __len__(self) -> int:
        return len(self.x_arcsec)

    def __getitem__(self, keep: np.ndarray | slice) -> Sources:
        return Sources(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


def _concatenate(parts: list[Sources]) -> Sources:
    return Sources(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Sources)})


def stream(seed: int, cluster_id: str, purpose: str) -> np.random.Generator:
    """Random numbers that depend on the seed, the cluster's id and what they are for, and on nothing else."""
    digest = hashlib.blake2b(f"{cluster_id}\0{purpose}".encode(), digest_size=16).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def value(cluster: ROW, name: str, default: Any = None) -> Any:
    """``cluster[name]``, or ``default`` where the column is missing or masked."""
    try:
        found = cluster[name]
    except (KeyError, ValueError):
        return default
    return default if found is None or np.ma.is_masked(found) else found


def true_log10_m500c(cluster: ROW) -> float:
    """True mass of a mock cluster: its column log10_m500c_true, else log10_m500c; -inf for blank sky."""
    mass = value(cluster, "log10_m500c_true", value(cluster, "log10_m500c", -np.inf))
    return float(mass) if np.isfinite(mass) else -np.inf


def mean_richness(log10_m500c: np.ndarray | float) -> np.ndarray:
    """Median richness lambda of clusters of a mass, before lognormal and Poisson scatter."""
    offset = np.asarray(log10_m500c, float) - RICHNESS_PIVOT_LOG10_M500C
    return RICHNESS_PIVOT * 10.0 ** (RICHNESS_SLOPE * offset)


def richness_radius_kpc(richness: np.ndarray | float) -> np.ndarray:
    """R_c = (lambda/100)^0.2 / h Mpc with H0 = 100, in proper kpc of H0 = 70: Rykoff et al. 2014, ApJ 785, 104, eq.
    4."""
    return 1000.0 / (H0_KM_S_MPC / 100.0) * (np.asarray(richness, float) / 100.0) ** 0.2


def draw_clusters(config: MockConfig, n: int, seed: int, prefix: str) -> QTable:
    """Draw clusters flat in redshift and log mass, with noisy labels and a realised richness.

    Args:
        config: ranges and scatters.
        n: number of clusters; the first clusters do not depend on it.
        seed: seed of the catalogue.
        prefix: ids are ``prefix`` and a number.

    Returns:
        A row per cluster: id, ra_deg, dec_deg (uniform over 5,000 deg2), z, log10_m500c (true mass plus label scatter),
        log10_m500c_err, label_source, log10_m500c_true, and richness_true: how many red members with L > 0.2 L* the
        cluster has within R_c, the lognormal and Poisson scatter included.

    Raises:
        Pix2massError: if ``n`` is negative.
    """
    if n < 0:
        raise Pix2massError(f"draw_clusters: expected n of 0 or more clusters, got {n}")

    def rng(purpose: str) -> np.random.Generator:
        return stream(seed, prefix, purpose)

    z = rng("z").uniform(config.z_min, config.z_max, n)
    true = rng("mass").uniform(config.log10_m500c_min, config.log10_m500c_max, n)
    label = true + config.label_scatter_dex * rng("label").normal(size=n)
    expected = mean_richness(true) * np.exp(config.richness_scatter_ln * rng("richness").normal(size=n))
    sin_dec = rng("dec").uniform(0.0, np.sin(np.radians(60.0)), n)
    table = QTable(
        {
            "id": np.array([f"{prefix}{i:06d}" for i in range(n)], dtype=f"U{len(prefix) + 6}"),
            "ra_deg": rng("ra").uniform(110.0, 220.0, n),
            "dec_deg": np.degrees(np.arcsin(sin_dec)),
            "z": z,
            "log10_m500c": label,
            "log10_m500c_err": np.full(n, config.label_scatter_dex),
            "label_source": np.full(n, "mock"),
            "log10_m500c_true": true,
            # Inverse transform keeps one uniform number per cluster, so that early rows do not depend on n.
            "richness_true": _poisson_quantile(rng("members").random(n), expected),
        }
    )
    table.meta = {
        "mass_definition": MASS_DEFINITION,
        "cosmology": f"flat, H0 = {H0_KM_S_MPC}, Om = {OMEGA_M}",
        "source": "mock",
        "seed": seed,
    }
    return table


def _poisson_quantile(uniform: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Poisson numbers by inverse transform, at least 1 (a cluster has a brightest galaxy)."""
    from scipy.stats import poisson

    return np.maximum(poisson.ppf(uniform, mean), 1.0)


def galaxies(cluster: ROW, config: MockConfig, width_arcsec: float, seed: int) -> Sources:
    """All sources in a square box around a cluster's catalogued position.

    Args:
        cluster: id and z; log10_m500c_true (or log10_m500c), without which the sky is blank; richness_true, drawn when
            it is missing.
        config: the mock survey.
        width_arcsec: width of the box.
        seed: seed of the sky.

    Returns:
        The sources whose centres lie in the box, members first. A wider box holds the same sources and more.

    Raises:
        Pix2massError: if the width is not positive or the redshift is outside 0.01 to 0.7.
    """
    z, identity = float(cluster["z"]), str(cluster["id"])
    if not width_arcsec > 0:
        raise Pix2massError(f"galaxies: expected width_arcsec > 0, got {width_arcsec}")
    if not 0.01 <= z <= 0.7:
        raise Pix2massError(f"galaxies: cluster {identity!r} has z = {z}; the mock sky covers 0.01 to 0.7")

    def rng(purpose: str) -> np.random.Generator:
        return stream(seed, identity, purpose)

    parts = [_field(rng, width_arcsec), _stars(rng, width_arcsec, config.depth_r_mag)]
    if config.projected_groups:
        parts.insert(0, _groups(rng, width_arcsec, config))
    log10_m500c = true_log10_m500c(cluster)
    if np.isfinite(log10_m500c):
        count = value(cluster, "richness_true")
        if count is None:
            expected = mean_richness(log10_m500c) * np.exp(config.richness_scatter_ln * rng("richness").normal())
            count = _poisson_quantile(rng("members").random(1), np.array([expected]))[0]
        parts.insert(0, _cluster_members(rng, z, log10_m500c, int(count), config))
    sources = _concatenate(parts)
    half = width_arcsec / 2
    inside = (np.abs(sources.x_arcsec) <= half) & (np.abs(sources.y_arcsec) <= half)
    return sources[inside & (sources.mag[:, 2] < config.depth_r_mag)]


# --- haloes -----------------------------------------------------------------------------------------------------------


def _projected_nfw(x: np.ndarray) -> np.ndarray:
    """Mass of an NFW halo within projected radius x = R/r_s, unnormalised: Bartelmann 1996, A&A 313, 697."""
    x = np.maximum(np.asarray(x, float), 1e-6)
    root = np.sqrt(np.abs(1.0 - x**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = np.where(x < 1, np.arccosh(np.maximum(1 / x, 1)), np.arccos(np.minimum(1 / x, 1)))
        ratio = np.where(root < 1e-4, 1.0, angle / root)
    return np.log(x / 2) + ratio


@cache
def _nfw_table() -> tuple[np.ndarray, np.ndarray]:
    x = np.concatenate([[0.0], np.geomspace(1e-3, 30.0, 600)])
    mass = _projected_nfw(x)
    mass[0] = 0.0
    return x, mass


@cache
def _schechter_table(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes relative to m* and the number brighter, one per galaxy brighter than LUMINOUS_MAG."""
    mag = np.linspace(-2.5, 9.0, 1151)
    luminosity = 10.0 ** (-0.4 * mag)
    density = luminosity ** (alpha + 1) * np.exp(-luminosity)
    number = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return mag, number / np.interp(LUMINOUS_MAG, mag, number)


RED_ALPHA, BLUE_ALPHA = -1.0, -1.2
"""Faint-end slopes of members: Rykoff et al. 2014 for red; steeper for blue ones (Popesso et al. 2006, A&A 445, 29)."""

BLUE_FAINTER_MAG = 0.4
"""m* of blue members in i is fainter than that of red ones: their stars weigh less (Hansen et al. 2009)."""


def _halo_galaxies(
    rng: Any, z: np.ndarray, log10_m500c: np.ndarray, richness: np.ndarray, depth_r_mag: float
) -> tuple[Sources, np.ndarray]:
    """Galaxies of haloes about their own centres, the brightest galaxy first in each.

    Args:
        rng: purpose -> generator.
        z: (m,) redshifts.
        log10_m500c: (m,) masses.
        richness: (m,) red galaxies with L > 0.2 L* inside R_c, brightest galaxy included.
        depth_r_mag: depth of the sky.

    Returns:
        The galaxies and the index of the halo of each; those of a halo depend on the haloes before it alone.
    """
    number = richness.astype(int)
    scale_kpc = r500c_kpc(log10_m500c, z) * R200C_PER_R500C / GALAXY_CONCENTRATION
    r_c_x = richness_radius_kpc(np.maximum(number, 1)) / scale_kpc
    x_max = MEMBER_RADIUS_R200C * GALAXY_CONCENTRATION
    nfw_x, nfw_mass = _nfw_table()
    mass_c = np.interp(np.minimum(r_c_x, x_max), nfw_x, nfw_mass)
    mass_max = float(np.interp(x_max, nfw_x, nfw_mass))

    # Galaxies fainter than the sky's depth are not drawn: r - i of members is at least 0.1.
    faintest = np.maximum(depth_r_mag - 0.1 - m_star_i_mag(z), LUMINOUS_MAG)
    red_mag, red_number = _schechter_table(RED_ALPHA)
    blue_mag, blue_number = _schechter_table(BLUE_ALPHA)
    red_total = np.interp(faintest, red_mag, red_number)
    blue_total = np.interp(faintest - BLUE_FAINTER_MAG, blue_mag, blue_number)

    per_mass = number / mass_c
    weight_max = (1 - RED_FRACTION_OUTSKIRTS) / RED_FRACTION_OUTSKIRTS
    counts = np.stack(
        [
            number,  # red, luminous, inside R_c: as many as the richness says
            rng("outer").poisson(per_mass * np.maximum(mass_max - mass_c, 0)),
            rng("faint").poisson(per_mass * mass_max * (red_total - 1)),
            rng("blue").poisson(per_mass * mass_max * weight_max * blue_total),
        ],
        axis=1,
    )
    halo = np.repeat(np.arange(len(z)), counts.sum(axis=1))
    kind = np.repeat(np.tile(np.arange(4), len(z)), counts.ravel())
    n = len(halo)
    first = np.zeros(n, bool)
    first[np.cumsum(counts.sum(axis=1)) - counts.sum(axis=1)] = n > 0
    blue = kind == 3

    u_radius, u_mag = rng("radius").random(n), rng("magnitude").random(n)
    low = np.where(kind == 1, mass_c[halo], 0.0)
    high = np.where(kind == 0, mass_c[halo], mass_max)
    x = np.interp(low + u_radius * (high - low), nfw_mass, nfw_x)
    x[first] = 0.0
    low = np.where(kind == 2, 1.0, 0.0)
    high = np.where(kind == 2, red_total[halo], 1.0)
    dm = np.interp(low + u_mag * (high - low), red_number, red_mag)
    dm[blue] = BLUE_FAINTER_MAG + np.interp(u_mag[blue] * blue_total[halo[blue]], blue_number, blue_mag)
    bright = BCG_PIVOT_MAG + BCG_SLOPE_MAG * (log10_m500c - RICHNESS_PIVOT_LOG10_M500C)
    dm[first] = np.minimum((bright + BCG_SCATTER_MAG * rng("brightest").normal(size=len(z)))[halo[first]], 0.5)

    # Thin the blue galaxies so that the red fraction falls outwards.
    ramp = np.clip(x / GALAXY_CONCENTRATION, 0, 1)
    red_fraction = RED_FRACTION_CENTRE + (RED_FRACTION_OUTSKIRTS - RED_FRACTION_CENTRE) * ramp
    keep = ~blue | (rng("thin").random(n) * weight_max < (1 - red_fraction) / red_fraction)

    z_all = z[halo]
    angle = rng("azimuth").uniform(0, 2 * np.pi, n)
    radius_arcsec = x * (scale_kpc / kpc_per_arcsec(z))[halo]
    mag = np.where(blue[:, None], _blue_colours(rng, z_all), _red_colours(rng, z_all, dm))
    mag = mag - mag[:, 3:4] + (m_star_i_mag(z)[halo] + dm)[:, None]
    grid = templates()
    absolute_r = mag[:, 2] - _distance_modulus(z_all) - np.interp(z_all, grid.z, grid.red[:, 2])
    sources = _with_shapes(
        rng, radius_arcsec * np.cos(angle), radius_arcsec * np.sin(angle), mag, z_all, absolute_r, ~blue
    )
    sources.r50_arcsec[first] *= BCG_SIZE_FACTOR
    return sources[keep], halo[keep]


def _cluster_members(rng: Any, z: float, log10_m500c: float, richness: int, config: MockConfig) -> Sources:
    """Members of the cluster in the centre, off the catalogued position in a share of clusters."""
    sources, _ = _halo_galaxies(
        lambda purpose: rng("member " + purpose),
        np.array([z]),
        np.array([log10_m500c]),
        np.array([richness]),
        config.depth_r_mag,
    )
    if config.diffuse_light_share > 0 and len(sources):
        sources = _concatenate([sources, _diffuse_light(sources[:1], z, config.diffuse_light_share)])
    centring = rng("centring")
    off, azimuth, distance = centring.random(), centring.uniform(0, 2 * np.pi), centring.rayleigh()
    shift = config.miscentring_kpc * distance / float(kpc_per_arcsec(z)) if off < config.miscentred_share else 0.0
    sources.x_arcsec[:] += shift * np.cos(azimuth)
    sources.y_arcsec[:] += shift * np.sin(azimuth)
    sources.is_member[:] = True
    return sources


def _diffuse_light(brightest: Sources, z: float, share: float) -> Sources:
    columns = {f.name: getattr(brightest, f.name).copy() for f in fields(Sources)}
    columns["mag"] = columns["mag"] - 2.5 * np.log10(share)
    columns["r50_arcsec"] = np.full(1, DIFFUSE_LIGHT_R50_KPC / float(kpc_per_arcsec(z)))
    columns["sersic_n"] = np.ones(1)
    columns["is_diffuse"] = np.ones(1, bool)
    return Sources(**columns)


HALO_MASS_OFFSET_DEX = -0.15
"""From masses of simulated haloes to the project's X-ray and SZ scale, which lies 0.1-0.15 dex below weak lensing.
With it clusters richer than 60 at z 0.1-0.35 are as many as in redMaPPer v5.10 (0.060 to 0.057 per deg2) and those
richer than 20 are 0.77 of its number, before richness scatter."""

HALO_FUNCTION = np.array([-4.7496, -1.5006, -0.5787, -0.4577, -0.5154, -0.8163, -0.6371, -0.5577, -0.6052])
"""log10 dn/dlog10 M500c (Mpc^-3) as a polynomial in x = log10 M500c - 14 and y = z - 0.3 with terms 1, x, x2, x3, y,
xy, x2y, y2, xy2: fit (to 0.06 dex) to Tinker et al. 2008, ApJ 688, 709, with sigma8 = 0.81."""


@cache
def _halo_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Cells in (z, mass): their lower edges, cumulative share, and haloes per arcsec2."""
    z = np.arange(*GROUP_Z, 0.01)
    mass = np.arange(*GROUP_LOG10_M500C, 0.02)
    x, y = mass[None] + 0.01 - 14, z[:, None] + 0.005 - 0.3
    terms = np.stack(np.broadcast_arrays(1.0 + 0 * x + 0 * y, x, x**2, x**3, y, x * y, x**2 * y, y**2, x * y**2))
    number = 10 ** np.tensordot(HALO_FUNCTION, terms, 1) * 0.02 * _volume_per_arcsec2(z, 0.01)[:, None]
    zz, mm = np.broadcast_arrays(z[:, None], mass[None])
    total = float(number.sum())
    return zz.ravel(), mm.ravel(), np.cumsum(number.ravel()) / total, total


def _groups(rng: Any, width_arcsec: float, config: MockConfig) -> Sources:
    """Galaxies of other groups and clusters whose centres lie in the box or up to 5' outside."""
    z_cell, mass_cell, cumulative, density = _halo_cells()
    x, y = _nested_positions(rng("group place"), density, width_arcsec + 600.0)
    n = len(x)
    cell = np.minimum(np.searchsorted(cumulative, rng("group cell").random(n)), len(z_cell) - 1)
    within = rng("group cell offset").random((n, 2))
    z, mass = z_cell[cell] + 0.01 * within[:, 0], mass_cell[cell] + 0.02 * within[:, 1]
    mass = mass + HALO_MASS_OFFSET_DEX
    scatter = np.exp(config.richness_scatter_ln * rng("group richness").normal(size=n))
    richness = _poisson_quantile(rng("group members").random(n), mean_richness(mass) * scatter)
    sources, halo = _halo_galaxies(lambda purpose: rng("group " + purpose), z, mass, richness, config.depth_r_mag)
    sources.x_arcsec[:] += x[halo]
    sources.y_arcsec[:] += y[halo]
    return sources


# --- field and stars --------------------------------------------------------------------------------------------------


def _nested_positions(rng: np.random.Generator, density: float, width_arcsec: float) -> tuple[np.ndarray, np.ndarray]:
    """A Poisson process over a square, drawn from the centre outwards: the start of a wider square's is a narrower
    one's.

    The area of the centred square that reaches out to the k-th source grows by exponential steps.
    """
    expected = density * width_arcsec**2
    n = int(expected + 8 * np.sqrt(expected) + 32)
    numbers = rng.random((n, 2))
    area = np.cumsum(-np.log1p(-numbers[:, 0])) / density
    inside = area <= width_arcsec**2
    half = np.sqrt(area[inside]) / 2
    side, along = np.divmod(4 * numbers[inside, 1], 1.0)
    along = (2 * along - 1) * half
    x = np.select([side == 0, side == 1], [half, -half], along)
    y = np.select([side == 2, side == 3], [half, -half], along)
    return x, y


@cache
def _distance_table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z = np.arange(0.005, 1.305, 0.005)
    comoving_mpc = kpc_per_arcsec(z) * (180 / np.pi * 3600) / 1000 * (1 + z)
    modulus = 5 * np.log10(comoving_mpc * (1 + z)) + 25
    volume = comoving_mpc**3 / 3 / (180 / np.pi * 3600) ** 2
    return z, modulus, volume


def _distance_modulus(z: np.ndarray) -> np.ndarray:
    grid, modulus, _ = _distance_table()
    return np.interp(z, grid, modulus)


def _volume_per_arcsec2(z: np.ndarray, step: float) -> np.ndarray:
    """Comoving Mpc^3 per arcsec2 in shells from each z to z + step."""
    grid, _, volume = _distance_table()
    return np.interp(z + step, grid, volume) - np.interp(z, grid, volume)


_Z_STEP, _MAG_STEP = 0.01, 0.1


@cache
def _field_cells() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Cells in (kind, z, absolute magnitude): is red, lower edges, cumulative share, and galaxies per arcsec2."""
    z = np.arange(0.02, 1.2, _Z_STEP)
    absolute = np.arange(-24.5, -13.0, _MAG_STEP)
    grid, h = templates(), H0_KM_S_MPC / 100.0
    modulus = _distance_modulus(z + _Z_STEP / 2)
    volume = _volume_per_arcsec2(z, _Z_STEP)
    numbers = []
    for (m_star, alpha, phi, evolution), scale, red in (
        (LF_RED, FIELD_SCALE_RED, True),
        (LF_BLUE, FIELD_SCALE_BLUE, False),
    ):
        m_star = m_star + 5 * np.log10(h) - evolution * (np.minimum(z, 0.6) - 0.1)
        luminosity = 10 ** (-0.4 * (absolute[None] + _MAG_STEP / 2 - m_star[:, None]))
        density = 0.4 * np.log(10) * phi * h**3 * luminosity ** (alpha + 1) * np.exp(-luminosity)
        k_r = grid.red_magnitudes(z)[:, 2] if red else grid.blend_magnitudes(z, np.full(len(z), 0.6))[:, 2]
        apparent = absolute[None] + (modulus + k_r)[:, None]
        # A margin beyond the deepest sky allows for the spread of K-corrections; the caller cuts at its own depth.
        numbers.append(scale * density * _MAG_STEP * volume[:, None] * (apparent < 23.4))
    number = np.stack(numbers)
    red, zz, mm = np.broadcast_arrays(np.array([True, False])[:, None, None], z[None, :, None], absolute[None, None])
    total = float(number.sum())
    return red.ravel(), zz.ravel(), mm.ravel(), np.cumsum(number.ravel()) / total, total


def _field(rng: Any, width_arcsec: float) -> Sources:
    """Galaxies of the field, red and blue, from luminosity functions times volume."""
    red_cell, z_cell, mag_cell, cumulative, density = _field_cells()
    x, y = _nested_positions(rng("field place"), density, width_arcsec)
    n = len(x)
    cell = np.minimum(np.searchsorted(cumulative, rng("field cell").random(n)), len(z_cell) - 1)
    within = rng("field cell offset").random((n, 2))
    red = red_cell[cell]
    z = z_cell[cell] + _Z_STEP * within[:, 0]
    absolute_r = mag_cell[cell] + _MAG_STEP * within[:, 1]

    def field_rng(purpose: str) -> np.random.Generator:
        return rng("field " + purpose)

    # The red sequence's slope is in i relative to m*, here through r - i of the template.
    base = templates().red_magnitudes(z) + (absolute_r + _distance_modulus(z))[:, None]
    dm = np.clip(base[:, 3] - m_star_i_mag(np.maximum(z, 0.05)), -2.5, 4.0)
    mag = np.where(red[:, None], _red_colours(field_rng, z, dm), _blue_colours(field_rng, z))
    mag = mag + (absolute_r + _distance_modulus(z))[:, None]
    return _with_shapes(field_rng, x, y, mag, z, absolute_r, red)


def _red_colours(rng: Any, z: np.ndarray, dm: np.ndarray) -> np.ndarray:
    """Relative magnitudes (n, 5) on the red sequence, with its slope in ``dm`` = i - m* and its scatter."""
    scatter = rng("red colours").normal(size=(len(z), 4)) * RED_COLOUR_SCATTER_MAG
    return templates().red_magnitudes(z) + colours_to_offsets(RED_COLOUR_SLOPE * dm[:, None] + scatter)


def _blue_colours(rng: Any, z: np.ndarray) -> np.ndarray:
    """Relative magnitudes (n, 5) of star-forming galaxies: a share of young light, dust, and scatter."""
    # Inverse transform on a table: one uniform number per galaxy.
    young = np.interp(rng("young").random(len(z)), *_young_share_table())
    normal = rng("blue colours").normal(size=(len(z), 5))
    dust = REDDENING_SCATTER_MAG * np.abs(normal[:, 4:])
    colours = normal[:, :4] * BLUE_COLOUR_SCATTER_MAG + dust * REDDENING_COLOURS
    offsets = colours_to_offsets(colours)
    return templates().blend_magnitudes(z, young) + offsets - offsets[:, 2:3]


@cache
def _young_share_table() -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import beta

    share = np.linspace(0, 1, 201)
    return beta.cdf(share, *YOUNG_SHARE_BETA), share


def _with_shapes(
    rng: Any, x: np.ndarray, y: np.ndarray, mag: np.ndarray, z: np.ndarray, absolute_r: np.ndarray, red: np.ndarray
) -> Sources:
    """Sizes, axis ratios and profiles: Sersic n = 4 for red galaxies and n = 1 for blue ones.

    Half-light radii follow Shen et al. 2003, MNRAS 343, 978 (eq. 14 and 15), with scatter 0.3 and
    0.4 in ln r; axis ratios those of ellipticals (mean 0.75) and of randomly inclined disks of thickness 0.2.
    """
    n = len(x)
    normal, uniform = rng("size").normal(size=(n, 2)), rng("shape").random((n, 2))
    early = 0.26 * -absolute_r - 5.06
    late = 0.104 * -absolute_r + 0.25 * np.log10(1 + 10 ** (-0.4 * (absolute_r + 20.91))) - 1.71
    log10_kpc = np.where(red, np.maximum(early, 0.0) + 0.13 * normal[:, 0], late + 0.17 * normal[:, 0])
    elliptical = np.clip(0.75 + 0.15 * normal[:, 1], 0.3, 1.0)
    disk = np.sqrt(uniform[:, 0] ** 2 * (1 - 0.2**2) + 0.2**2)
    return Sources(
        x_arcsec=x,
        y_arcsec=y,
        mag=mag,
        z=z,
        r50_arcsec=10**log10_kpc / kpc_per_arcsec(z) if n else np.zeros(0),
        axis_ratio=np.where(red, elliptical, disk),
        angle_deg=180.0 * uniform[:, 1],
        sersic_n=np.where(red, 4.0, 1.0),
        is_member=np.zeros(n, bool),
        is_red=red.copy(),
        is_star=np.zeros(n, bool),
        is_diffuse=np.zeros(n, bool),
    )


def _stars(rng: Any, width_arcsec: float, depth_r_mag: float) -> Sources:
    """Stars of the Galaxy: counts rising as a power law in flux, colours along the stellar locus with 0.03 mag
    scatter."""
    slope = STAR_COUNT_SLOPE * np.log(10)
    low, high = np.exp(slope * (STAR_BRIGHTEST_R_MAG - 14.5)), np.exp(slope * (depth_r_mag - 14.5))
    latitude = np.exp(STAR_COUNT_SCATTER_LN * rng("latitude").normal())
    density = latitude * STAR_COUNT_R145 * (high - low) / slope / 3600.0**2
    x, y = _nested_positions(rng("star place"), density, width_arcsec)
    n = len(x)
    uniform = rng("star").random((n, 2))
    r = 14.5 + np.log(low + uniform[:, 0] * (high - low)) / slope
    g_i = np.interp(uniform[:, 1] * (len(STAR_G_I_QUANTILES) - 1), range(len(STAR_G_I_QUANTILES)), STAR_G_I_QUANTILES)
    colours = np.stack([np.interp(g_i, STAR_LOCUS[:, 0], STAR_LOCUS[:, k]) for k in range(1, 5)], axis=1)
    offsets = colours_to_offsets(colours + 0.03 * rng("star colours").normal(size=(n, 4)))
    no = np.zeros(n, bool)
    return Sources(
        x_arcsec=x,
        y_arcsec=y,
        mag=r[:, None] + offsets - offsets[:, 2:3],
        z=np.zeros(n),
        r50_arcsec=np.zeros(n),
        axis_ratio=np.ones(n),
        angle_deg=np.zeros(n),
        sersic_n=np.zeros(n),
        is_member=no,
        is_red=no.copy(),
        is_star=~no,
        is_diffuse=no.copy(),
    )


# --- what an observer lists -------------------------------------------------------------------------------------------


def observe(
    sources: Sources,
    cluster: ROW,
    seed: int,
    *,
    i_limit_mag: float = 21.0,
    ideal: bool = False,
) -> dict[str, np.ndarray]:
    """The galaxy catalogue that a survey like SDSS DR8 would make of the sources.

    Sources within ``BLEND_ARCSEC`` of a brighter one are merged with it, and lost with it where it is a star; faint
    galaxies are listed in part; a few faint stars are listed as galaxies.

    Args:
        sources: the true sources.
        cluster: id, ra_deg and dec_deg of the box's centre (0, 0 where missing).
        seed: seed of the photometric noise.
        i_limit_mag: galaxies with a fainter observed i magnitude are not listed.
        ideal: list every galaxy by itself, and no star.

    Returns:
        Columns ra_deg, dec_deg, mag (n, 5) and mag_err (n, 5): asinh magnitudes corrected for Galactic extinction, with
        errors. Stars and diffuse light are left out. Columns truth_z, truth_red and truth_member, of the brightest
        source of a blend, are kept aside, for calibration with spectroscopic redshifts and for tests; no measurement
        of richness reads them.
    """
    rng = stream(seed, str(cluster["id"]), "photometry")
    seen = sources[~sources.is_diffuse]
    flux = 10 ** (-0.4 * (seen.mag - 22.5))
    if ideal:
        alone = ~seen.is_star
    else:
        flux, alone = _blend(seen.x_arcsec, seen.y_arcsec, flux)
        alone &= ~seen.is_star | ((seen.mag[:, 2] > STARS_LISTED_R_MAG) & (rng.random(len(seen)) < STARS_LISTED_SHARE))
    seen, flux = seen[alone], flux[alone]
    true_mag = 22.5 - 2.5 * np.log10(flux)
    common = PHOTOMETRY_SIGMA_SCATTER_LN * rng.normal(size=(len(seen), 1))
    log_sigma = np.stack(
        [np.interp(true_mag[:, k], PHOTOMETRY_MAG, np.log(PHOTOMETRY_SIGMA_NMGY[k])) for k in range(5)], axis=1
    )
    sigma = np.exp(log_sigma + common)
    flux = flux + sigma * rng.normal(size=sigma.shape)
    softening = 2e9 * LUPTITUDE_SOFTENING
    mag = -2.5 / np.log(10) * (np.arcsinh(flux / softening) + np.log(LUPTITUDE_SOFTENING))
    mag_err = 2.5 / np.log(10) * sigma / np.hypot(softening, flux)
    listed = mag[:, 3] < i_limit_mag
    if not ideal:
        listed &= mag[:, 3] + COMPLETENESS_WIDTH_MAG * rng.normal(size=len(mag)) < COMPLETENESS_I_MAG
    ra, dec = _offset_position(
        float(value(cluster, "ra_deg", 0.0)), float(value(cluster, "dec_deg", 0.0)), seen.x_arcsec, seen.y_arcsec
    )
    return {
        "ra_deg": ra[listed],
        "dec_deg": dec[listed],
        "mag": mag[listed],
        "mag_err": mag_err[listed],
        "truth_z": seen.z[listed],
        "truth_red": seen.is_red[listed],
        "truth_member": seen.is_member[listed],
    }


def _blend(x_arcsec: np.ndarray, y_arcsec: np.ndarray, flux: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fluxes (n, 5) with those of blended neighbours added to the brightest in i, and which sources are left (n,)."""
    from scipy.spatial import cKDTree

    left, total = np.ones(len(flux), bool), flux.copy()
    if len(flux) < 2:
        return total, left
    pairs = cKDTree(np.column_stack([x_arcsec, y_arcsec])).query_pairs(BLEND_ARCSEC, output_type="ndarray")
    order = np.argsort(flux[pairs, 3], axis=1)
    faint, bright = np.take_along_axis(pairs, order, axis=1).T
    for k in np.lexsort((-flux[faint, 3], -flux[bright, 3])):
        if left[faint[k]] and left[bright[k]]:
            left[faint[k]] = False
            total[bright[k]] += flux[faint[k]]
    return total, left


def _offset_position(
    ra_deg: float, dec_deg: float, west_arcsec: np.ndarray, north_arcsec: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions at tangent-plane offsets from a centre (gnomonic projection; Calabretta & Greisen 2002, A&A 395,
    1077)."""
    xi, eta = np.radians(-west_arcsec / 3600), np.radians(north_arcsec / 3600)
    sin_dec, cos_dec = np.sin(np.radians(dec_deg)), np.cos(np.radians(dec_deg))
    denominator = cos_dec - eta * sin_dec
    ra = ra_deg + np.degrees(np.arctan2(xi, denominator))
    dec = np.degrees(np.arctan2(sin_dec + eta * cos_dec, np.hypot(xi, denominator)))
    return ra % 360.0, dec
