"""Who is on the mock sky: clusters with masses, their members, and the galaxies, groups and stars in front and behind.

Every random number belongs to a named stream that depends on the seed and the cluster's id alone, so the same cluster
has the same sky whatever was drawn before it. Sources of the field are drawn outwards from the centre: a wider box
holds all the sources of a narrower one. Magnitudes are SDSS magnitudes free of Galactic extinction. The choices of
physics are fields of ``PhysicsConfig``; here stand tables and definitions. ``docs/mock_sky.md`` tells all of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np
from astropy.table import QTable
from numpy.typing import ArrayLike

from pix2mass.config import MockConfig, PerColour, PhysicsConfig
from pix2mass.cosmology import H0_KM_S_MPC, MASS_DEFINITION, OMEGA_M, kpc_per_arcsec, m_star_i_mag, r500c_kpc
from pix2mass.images.mock.templates import Templates, colours_to_offsets, templates
from pix2mass.types import EXTINCTION_PER_EBV, SDSS_PIXEL_SCALE_ARCSEC, Pix2massError

ROW = Any
"""A cluster: anything with ``row[name]`` for id, z and, unless the sky is blank, log10_m500c_true (or log10_m500c)."""

PIVOT_LOG10_M500C = 14.24
"""Mass to which richness and brightest galaxies refer: that of lambda 40 in Simet et al. 2017, MNRAS 466, 3103."""

LUMINOUS_MAG = 1.75
"""L > 0.2 L* is i < m* + 1.75: Rykoff et al. 2012, ApJ 746, 178."""

R200C_PER_R500C = 1.53
"""Of an NFW halo with c200 = 4.5, typical of 10^14.5 Msun: Diemer & Joyce 2019, ApJ 871, 168."""

GROUP_LOG10_M500C = (13.3, 15.2)
GROUP_Z = (0.03, 0.70)
"""Range of the haloes drawn along the line of sight."""

GROUP_REACH_ARCSEC = 300.0
"""Groups whose centres lie this far outside the box still give it galaxies."""

LIGHT_KM_S = 299792.458

REDDENING_COLOURS = np.array([0.94, 1.02, 0.59, 0.43])
"""u-g, g-r, r-i, i-z per E(B-V) of dust inside blue galaxies: the colours of the Galactic extinction curve."""

DEEPEST_R_MAG, BACKGROUND_R_MAG = 23.0, 22.0
"""To the first magnitude galaxies, members and stars can be drawn; beyond it the background of pictures holds all, and
from the second on what the growth of numbers with redshift adds."""

STAR_BRIGHTEST_R_MAG, STAR_BREAK_R_MAG = 9.0, 14.0
"""Magnitude of the brightest stars drawn, and where the slope of their counts changes."""

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

STAR_G_I_R_MAG = (16.5, 19.5)
STAR_G_I_QUANTILES = np.array(
    [
        [0.35, 0.47, 0.53, 0.56, 0.64, 0.80, 1.00, 1.15, 1.40, 1.75, 2.40],
        [0.25, 0.60, 1.55, 1.85, 2.00, 2.18, 2.33, 2.47, 2.60, 2.70, 3.10],
    ]
)
"""Deciles of g-i of stars of these r magnitudes and brighter or fainter, linear between: 122 stars of photoObj
94-1-0012 at r 12-17.5 and 19-20.5."""

STARS_LISTED_R_MAG = 20.0
"""Stars brighter than this are not taken for galaxies."""

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


def mean_richness(log10_m500c: np.ndarray | float, physics: PhysicsConfig) -> np.ndarray:
    """Median richness lambda of clusters of a mass, before lognormal and Poisson scatter."""
    offset = np.asarray(log10_m500c, float) - PIVOT_LOG10_M500C
    return physics.richness_at_pivot * 10.0 ** (physics.richness_slope * offset)


def richness_radius_kpc(richness: np.ndarray | float) -> np.ndarray:
    """R_c = (lambda/100)^0.2 / h Mpc with H0 = 100, in proper kpc of H0 = 70: Rykoff et al. 2014, ApJ 785, 104, eq.
    4."""
    return 1000.0 / (H0_KM_S_MPC / 100.0) * (np.asarray(richness, float) / 100.0) ** 0.2


def draw_clusters(config: MockConfig, n: int, seed: int, prefix: str) -> QTable:
    """Draw clusters with noisy labels, a realised richness and a true centre.

    Args:
        config: ranges, prior and scatters.
        n: number of clusters; the first clusters do not depend on it.
        seed: seed of the catalogue.
        prefix: ids are ``prefix`` and a number.

    Returns:
        A row per cluster: id, ra_deg, dec_deg (uniform over 5,000 deg2), z, log10_m500c (true mass plus label scatter),
        log10_m500c_err, label_source, log10_m500c_true, richness_true: how many red members with L > 0.2 L* the
        cluster has within R_c, the lognormal and Poisson scatter included; miscentring_kpc, ra_deg_true and
        dec_deg_true: where its members are centred.

    Raises:
        Pix2massError: if ``n`` is negative.
    """
    if n < 0:
        raise Pix2massError(f"draw_clusters: expected n of 0 or more clusters, got {n}")

    def rng(purpose: str) -> np.random.Generator:
        return stream(seed, prefix, purpose)

    physics = config.physics
    if config.mass_prior == "flat":
        z = rng("z").uniform(config.z_min, config.z_max, n)
        true = rng("mass").uniform(config.log10_m500c_min, config.log10_m500c_max, n)
    else:
        z, true = _haloes(rng, config, n)
    label = true + config.label_scatter_dex * rng("label").normal(size=n)
    expected = mean_richness(true, physics) * np.exp(physics.richness_scatter_ln * rng("richness").normal(size=n))
    sin_dec = rng("dec").uniform(0.0, np.sin(np.radians(60.0)), n)
    ra, dec = rng("ra").uniform(110.0, 220.0, n), np.degrees(np.arcsin(sin_dec))
    ids = [f"{prefix}{i:06d}" for i in range(n)]
    west, north = np.array([_draw_offset_kpc(ids[i], config, seed) for i in range(n)]).reshape(n, 2).T
    arcsec = 1.0 / kpc_per_arcsec(z) if n else np.zeros(0)
    ra_true, dec_true = offset_position(ra, dec, west * arcsec, north * arcsec)
    table = QTable(
        {
            "id": np.array(ids, dtype=f"U{len(prefix) + 6}"),
            "ra_deg": ra,
            "dec_deg": dec,
            "z": z,
            "log10_m500c": label,
            "log10_m500c_err": np.full(n, config.label_scatter_dex),
            "label_source": np.full(n, "mock"),
            "log10_m500c_true": true,
            # Inverse transform keeps one uniform number per cluster, so that early rows do not depend on n.
            "richness_true": _poisson_quantile(rng("members").random(n), expected),
            "miscentring_kpc": np.hypot(west, north),
            "ra_deg_true": ra_true,
            "dec_deg_true": dec_true,
        }
    )
    table.meta = {
        "mass_definition": MASS_DEFINITION,
        "cosmology": f"flat, H0 = {H0_KM_S_MPC}, Om = {OMEGA_M}",
        "source": "mock",
        "seed": seed,
    }
    return table


def _draw_offset_kpc(cluster_id: str, config: MockConfig, seed: int) -> tuple[float, float]:
    """Offset of a cluster's galaxies from its catalogued position, towards west and north."""
    rng = stream(seed, cluster_id, "member centring")
    off, azimuth, distance = rng.random(), rng.uniform(0, 2 * np.pi), rng.rayleigh()
    shift = config.miscentring_kpc * distance if off < config.miscentred_share else 0.0
    return shift * np.cos(azimuth), shift * np.sin(azimuth)


def _centre_arcsec(cluster: ROW, config: MockConfig, seed: int) -> tuple[float, float]:
    """Where the cluster's galaxies are centred in the box: as its columns say, else drawn as ``draw_clusters`` does."""
    place = [value(cluster, name) for name in ("ra_deg", "dec_deg", "ra_deg_true", "dec_deg_true")]
    if any(coordinate is None for coordinate in place):
        west_kpc, north_kpc = _draw_offset_kpc(str(cluster["id"]), config, seed)
        arcsec = 1.0 / float(kpc_per_arcsec(float(cluster["z"])))
        return west_kpc * arcsec, north_kpc * arcsec
    ra_0, dec_0, ra, dec = np.radians(np.array(place, float))
    # Gnomonic projection, the inverse of ``offset_position``.
    cosine = np.sin(dec_0) * np.sin(dec) + np.cos(dec_0) * np.cos(dec) * np.cos(ra - ra_0)
    xi = np.cos(dec) * np.sin(ra - ra_0) / cosine
    eta = (np.cos(dec_0) * np.sin(dec) - np.sin(dec_0) * np.cos(dec) * np.cos(ra - ra_0)) / cosine
    return -np.degrees(xi) * 3600.0, np.degrees(eta) * 3600.0


def reddening_mag(cluster: ROW, config: MockConfig, seed: int) -> float:
    """Galactic reddening E(B-V) in front of a cluster, the first random number of its camera."""
    return float(stream(seed, str(cluster["id"]), "camera").uniform(config.ebv_min_mag, config.ebv_max_mag))


def _poisson_quantile(uniform: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Poisson numbers by inverse transform, at least 1 (a cluster has a brightest galaxy)."""
    from scipy.stats import poisson

    return np.maximum(poisson.ppf(uniform, mean), 1.0)


def galaxies(cluster: ROW, config: MockConfig, width_arcsec: float, seed: int, *, background: bool = False) -> Sources:
    """All sources in a square box around a cluster's catalogued position.

    Args:
        cluster: id and z; log10_m500c_true (or log10_m500c), without which the sky is blank; richness_true, drawn when
            it is missing.
        config: the mock survey.
        width_arcsec: width of the box.
        seed: seed of the sky.
        background: add the field galaxies that are too faint for any catalogue but roughen the sky of pictures.

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

    physics = config.physics
    parts = [_field(rng, width_arcsec, physics), _stars(rng, width_arcsec, config)]
    if config.projected_groups:
        parts.insert(0, _groups(rng, width_arcsec, config))
    log10_m500c = true_log10_m500c(cluster)
    if np.isfinite(log10_m500c):
        centre = _centre_arcsec(cluster, config, seed)
        if config.projected_groups and physics.correlated_structure > 0:
            parts.insert(0, _correlated_groups(rng, z, log10_m500c, centre, width_arcsec, config))
        count = value(cluster, "richness_true")
        if count is None:
            scatter = np.exp(physics.richness_scatter_ln * rng("richness").normal())
            expected = mean_richness(log10_m500c, physics) * scatter
            count = _poisson_quantile(rng("members").random(1), np.array([expected]))[0]
        parts.insert(0, _cluster_members(rng, z, log10_m500c, int(count), centre, config))
    sources = _concatenate(parts)
    half = width_arcsec / 2
    inside = (np.abs(sources.x_arcsec) <= half) & (np.abs(sources.y_arcsec) <= half)
    sources = sources[inside & (sources.mag[:, 2] < config.depth_r_mag)]
    if background and config.background_r_mag > DEEPEST_R_MAG:
        faint = _field(lambda purpose: rng("background " + purpose), width_arcsec, physics, config.background_r_mag)
        sources = _concatenate([sources, faint[faint.mag[:, 2] < config.background_r_mag]])
    return sources


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
def _schechter_table(alpha: float, fainter_mag: float) -> tuple[np.ndarray, np.ndarray]:
    """i - m*(z) and the number brighter, one per galaxy brighter than LUMINOUS_MAG, of galaxies whose own m* is
    ``fainter_mag`` fainter than m*(z)."""
    mag = np.linspace(-2.5, 9.0, 1151)
    luminosity = 10.0 ** (-0.4 * (mag - fainter_mag))
    density = luminosity ** (alpha + 1) * np.exp(-luminosity)
    number = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return mag, number / np.interp(LUMINOUS_MAG, mag, number)


def _halo_galaxies(
    rng: Any, z: np.ndarray, log10_m500c: np.ndarray, richness: np.ndarray, config: MockConfig
) -> tuple[Sources, np.ndarray]:
    """Galaxies of haloes about their own centres, the brightest galaxy first in each.

    Args:
        rng: purpose -> generator.
        z: (m,) redshifts.
        log10_m500c: (m,) masses.
        richness: (m,) red galaxies with L > 0.2 L* inside R_c, brightest galaxy included.
        config: depth and physics of the sky.

    Returns:
        The galaxies and the index of the halo of each; those of a halo depend on the haloes before it alone.
    """
    physics = config.physics
    number = richness.astype(int)
    scale_kpc = r500c_kpc(log10_m500c, z) * R200C_PER_R500C / physics.galaxy_concentration
    r_c_x = richness_radius_kpc(np.maximum(number, 1)) / scale_kpc
    x_max = physics.member_radius_r200c * physics.galaxy_concentration
    nfw_x, nfw_mass = _nfw_table()
    mass_c = np.interp(np.minimum(r_c_x, x_max), nfw_x, nfw_mass)
    mass_max = float(np.interp(x_max, nfw_x, nfw_mass))

    # Galaxies fainter than the sky's depth are not drawn: r - i of members is at least 0.1.
    faintest = np.maximum(config.depth_r_mag - 0.1 - m_star_i_mag(z), LUMINOUS_MAG)
    red_mag, red_number = _schechter_table(physics.red_alpha, physics.m_star_offset_mag)
    blue_mag, blue_number = _schechter_table(physics.blue_alpha, physics.m_star_offset_mag + physics.blue_fainter_mag)
    red_total, blue_total = np.interp(faintest, red_mag, red_number), np.interp(faintest, blue_mag, blue_number)

    per_mass = number / mass_c
    weight_max = 1 / physics.red_fraction_outskirts - 1
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
    dm[blue] = np.interp(u_mag[blue] * blue_total[halo[blue]], blue_number, blue_mag)
    bright = physics.brightest_mag + physics.brightest_slope_mag * (log10_m500c - PIVOT_LOG10_M500C)
    bright = bright + physics.brightest_scatter_mag * rng("brightest").normal(size=len(z))
    dm[first] = np.minimum(bright[halo[first]], 0.5)

    # Thin the blue galaxies so that the red fraction falls outwards.
    ramp = np.clip(x / physics.galaxy_concentration, 0, 1)
    red_fraction = physics.red_fraction_centre + (physics.red_fraction_outskirts - physics.red_fraction_centre) * ramp
    keep = ~blue | (rng("thin").random(n) * weight_max < (1 - red_fraction) / red_fraction)

    z_all = z[halo]
    angle = rng("azimuth").uniform(0, 2 * np.pi, n)
    radius_arcsec = x * (scale_kpc / _kpc_per_arcsec(z))[halo]
    scatter = np.broadcast_to(physics.red_colour_scatter_mag, (n, 4)).copy()
    scatter[first] = _central_scatter(z_all[first], physics)
    mag = np.where(blue[:, None], _blue_colours(rng, z_all, physics), _red_colours(rng, z_all, dm, physics, scatter))
    mag = mag - mag[:, 3:4] + (m_star_i_mag(z)[halo] + dm)[:, None]
    grid = _templates(physics)
    absolute_r = mag[:, 2] - _distance_modulus(z_all) - np.interp(z_all, grid.z, grid.red[:, 2])
    sources = _with_shapes(
        rng, radius_arcsec * np.cos(angle), radius_arcsec * np.sin(angle), mag, z_all, absolute_r, ~blue, physics
    )
    sources.r50_arcsec[first] *= physics.brightest_size_factor
    return sources[keep], halo[keep]


def _cluster_members(
    rng: Any, z: float, log10_m500c: float, richness: int, centre_arcsec: tuple[float, float], config: MockConfig
) -> Sources:
    """Members of the cluster in the centre, with diffuse light about the brightest."""
    sources, _ = _halo_galaxies(
        lambda purpose: rng("member " + purpose), np.array([z]), np.array([log10_m500c]), np.array([richness]), config
    )
    if config.physics.diffuse_light_share > 0 and len(sources):
        sources = _concatenate([sources, _diffuse_light(sources[:1], z, config.physics)])
    sources.x_arcsec[:] += centre_arcsec[0]
    sources.y_arcsec[:] += centre_arcsec[1]
    sources.is_member[:] = True
    return sources


def _diffuse_light(brightest: Sources, z: float, physics: PhysicsConfig) -> Sources:
    columns = {f.name: getattr(brightest, f.name).copy() for f in fields(Sources)}
    columns["mag"] = columns["mag"] - 2.5 * np.log10(physics.diffuse_light_share)
    columns["r50_arcsec"] = np.full(1, physics.diffuse_light_r50_kpc / _kpc_per_arcsec(z))
    columns["sersic_n"] = np.ones(1)
    columns["is_diffuse"] = np.ones(1, bool)
    return Sources(**columns)


HALO_FUNCTION = np.array([-4.7496, -1.5006, -0.5787, -0.4577, -0.5154, -0.8163, -0.6371, -0.5577, -0.6052])
"""log10 dn/dlog10 M500c (Mpc^-3) as a polynomial in x = log10 M500c - 14 and y = z - 0.3 with terms 1, x, x2, x3, y,
xy, x2y, y2, xy2: fit (to 0.06 dex) to Tinker et al. 2008, ApJ 688, 709, with sigma8 = 0.81."""


HALO_BIAS = np.array([0.4465, 0.3766, 0.0874, 0.341, 0.0705])
"""log10 b of haloes as a polynomial in the same x and y with terms 1, x, x2, y, xy: fit (to 0.01 dex, x -0.9 to 1.3, z
0.05-0.6) to Tinker et al. 2010, ApJ 724, 878."""

XI_MPC, XI = (
    np.array([1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0]),
    np.array([7.094, 3.930, 2.649, 1.511, 0.997, 0.610, 0.323, 0.193]),
)
"""Linear correlation function of matter at z = 0 against comoving Mpc, and the reach of correlated structure."""

GROWTH_Z, GROWTH = np.array([0.0, 0.1, 0.3, 0.5, 0.7]), np.array([1.0, 0.950, 0.856, 0.773, 0.701])
"""Linear growth factor. Both for H0 = 70, Om = 0.3, flat, sigma8 = 0.81, n_s = 0.965 (colossus, Eisenstein & Hu
1998)."""


def halo_density(log10_m500c: ArrayLike, z: ArrayLike) -> np.ndarray:
    """Comoving number of haloes per Mpc^3 and dex of mass, of simulated haloes (see ``halo_mass_offset_dex``)."""
    x, y = np.broadcast_arrays(np.asarray(log10_m500c, float) - 14.0, np.asarray(z, float) - 0.3)
    terms = np.stack([np.ones_like(x), x, x**2, x**3, y, x * y, x**2 * y, y**2, x * y**2])
    return 10 ** np.tensordot(HALO_FUNCTION, terms, 1)


def _halo_bias(log10_m500c: ArrayLike, z: ArrayLike) -> np.ndarray:
    x, y = np.broadcast_arrays(np.asarray(log10_m500c, float) - 14.0, np.asarray(z, float) - 0.3)
    return 10 ** np.tensordot(HALO_BIAS, np.stack([np.ones_like(x), x, x**2, y, x * y]), 1)


@cache
def _halo_cells(
    z_range: tuple[float, float], mass_range: tuple[float, float], z_step: float, mass_step: float
) -> tuple[np.ndarray, np.ndarray, tuple[float, float], np.ndarray, float]:
    """Cells in (z, mass): their lower edges, their sizes, cumulative share, and haloes per arcsec2."""
    z, mass = (
        np.linspace(low, high, round((high - low) / step) + 2)
        for (low, high), step in ((z_range, z_step), (mass_range, mass_step))
    )
    dz, dm = float(z[1] - z[0]), float(mass[1] - mass[0])
    density = halo_density(mass[None, :-1] + dm / 2, z[:-1, None] + dz / 2)
    number = density * dm * _volume_per_arcsec2(z[:-1], dz)[:, None]
    zz, mm = np.broadcast_arrays(z[:-1, None], mass[None, :-1])
    total = float(number.sum())
    return zz.ravel(), mm.ravel(), (dz, dm), np.cumsum(number.ravel()) / total, total


def _haloes(rng: Any, config: MockConfig, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Redshifts and masses of n clusters, from the halo mass function times comoving volume."""
    offset = config.physics.halo_mass_offset_dex
    masses = (config.log10_m500c_min - offset, config.log10_m500c_max - offset)
    z, mass, (dz, dm), cumulative, _ = _halo_cells((config.z_min, config.z_max), masses, 0.005, 0.01)
    cell = np.minimum(np.searchsorted(cumulative, rng("halo").random(n)), len(z) - 1)
    return z[cell] + dz * rng("z").random(n), mass[cell] + offset + dm * rng("mass").random(n)


def _groups(rng: Any, width_arcsec: float, config: MockConfig) -> Sources:
    """Galaxies of other groups and clusters whose centres lie in the box or up to ``GROUP_REACH_ARCSEC`` outside."""
    z_cell, mass_cell, (dz, dm), cumulative, density = _halo_cells(GROUP_Z, GROUP_LOG10_M500C, 0.01, 0.02)
    x, y = _nested_positions(rng("group place"), density, width_arcsec + 2 * GROUP_REACH_ARCSEC)
    cell = np.minimum(np.searchsorted(cumulative, rng("group cell").random(len(x))), len(z_cell) - 1)
    within = rng("group cell offset").random((len(x), 2))
    z, mass = z_cell[cell] + dz * within[:, 0], mass_cell[cell] + dm * within[:, 1]
    return _galaxies_of_groups(lambda purpose: rng("group " + purpose), x, y, z, mass, config)


def correlated_haloes(
    rng: Any, z: float, log10_m500c: float, config: MockConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Groups around a cluster in excess of the mean: the two-halo term.

    Their comoving density is n(M) b(M) b(M_cluster) D(z)^2 xi(r), from where the members end out to 20 Mpc: Cooray &
    Sheth 2002, Phys. Rep. 372, 1. Distances along the line of sight become redshifts without peculiar velocities.

    Args:
        rng: purpose -> generator.
        z: the cluster's redshift.
        log10_m500c: the cluster's true mass.
        config: the mock survey.

    Returns:
        Offsets from the cluster's true centre towards west and north in arcsec, redshifts, and log10 of the halo masses
        (on the scale of simulations, see ``halo_mass_offset_dex``).
    """
    physics = config.physics
    mass = np.linspace(*GROUP_LOG10_M500C, 96)
    weight = halo_density(mass, z) * _halo_bias(mass, z)
    by_mass = np.concatenate([[0.0], np.cumsum(0.5 * (weight[1:] + weight[:-1]) * np.diff(mass))])
    members_end_mpc = float(physics.member_radius_r200c * R200C_PER_R500C * r500c_kpc(log10_m500c, z)) / 1000.0
    radius = np.linspace(min(members_end_mpc * (1 + z), 0.9 * XI_MPC[-1]), XI_MPC[-1], 100)
    shell = 4 * np.pi * radius**2 * np.exp(np.interp(np.log(radius), np.log(XI_MPC), np.log(XI)))
    by_radius = np.concatenate([[0.0], np.cumsum(0.5 * (shell[1:] + shell[:-1]) * np.diff(radius))])
    own_bias = float(_halo_bias(log10_m500c - physics.halo_mass_offset_dex, z))
    excess = physics.correlated_structure * own_bias * np.interp(z, GROWTH_Z, GROWTH) ** 2
    n = int(rng("number").poisson(excess * by_mass[-1] * by_radius[-1]))

    uniform = rng("place").random((n, 4))
    r = np.interp(uniform[:, 0] * by_radius[-1], by_radius, radius)
    cosine, azimuth = 2 * uniform[:, 1] - 1, 2 * np.pi * uniform[:, 2]
    across_arcsec = r * np.sqrt(1 - cosine**2) / (1 + z) * 1000.0 / _kpc_per_arcsec(z)
    redshift = z + r * cosine * H0_KM_S_MPC * np.sqrt(OMEGA_M * (1 + z) ** 3 + 1 - OMEGA_M) / LIGHT_KM_S
    return (
        across_arcsec * np.cos(azimuth),
        across_arcsec * np.sin(azimuth),
        np.maximum(redshift, GROUP_Z[0]),
        np.interp(uniform[:, 3] * by_mass[-1], by_mass, mass),
    )


def _correlated_groups(
    rng: Any,
    z: float,
    log10_m500c: float,
    centre_arcsec: tuple[float, float],
    width_arcsec: float,
    config: MockConfig,
) -> Sources:
    """Galaxies of the groups around the cluster whose centres lie in or near the box."""

    def group_rng(purpose: str) -> np.random.Generator:
        return rng("correlated " + purpose)

    x, y, redshift, mass = correlated_haloes(group_rng, z, log10_m500c, config)
    x, y = x + centre_arcsec[0], y + centre_arcsec[1]
    # The nearest first, so that a wider box adds groups behind those of a narrower one.
    distance = np.maximum(np.abs(x), np.abs(y))
    order = np.argsort(distance)
    order = order[distance[order] < width_arcsec / 2 + GROUP_REACH_ARCSEC]
    return _galaxies_of_groups(group_rng, x[order], y[order], redshift[order], mass[order], config)


def _galaxies_of_groups(
    rng: Any, x: np.ndarray, y: np.ndarray, z: np.ndarray, log10_halo_mass: np.ndarray, config: MockConfig
) -> Sources:
    physics, n = config.physics, len(x)
    mass = log10_halo_mass + physics.halo_mass_offset_dex
    scatter = np.exp(physics.richness_scatter_ln * rng("richness").normal(size=n))
    richness = _poisson_quantile(rng("members").random(n), mean_richness(mass, physics) * scatter)
    sources, halo = _halo_galaxies(rng, z, mass, richness, config)
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
def _distance_table() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    z = np.arange(0.005, 1.305, 0.005)
    comoving_mpc = kpc_per_arcsec(z) * (180 / np.pi * 3600) / 1000 * (1 + z)
    modulus = 5 * np.log10(comoving_mpc * (1 + z)) + 25
    volume = comoving_mpc**3 / 3 / (180 / np.pi * 3600) ** 2
    return z, modulus, volume, comoving_mpc


def _distance_modulus(z: np.ndarray) -> np.ndarray:
    grid, modulus, _, _ = _distance_table()
    return np.interp(z, grid, modulus)


def _kpc_per_arcsec(z: ArrayLike) -> np.ndarray:
    """As ``cosmology.kpc_per_arcsec``, to 1e-4, from a table: a quarter of the time of a catalogue went there."""
    grid, _, _, comoving_mpc = _distance_table()
    z = np.asarray(z, float)
    return np.interp(z, grid, comoving_mpc) / (1 + z) * (1000.0 * np.pi / 180 / 3600)


def _volume_per_arcsec2(z: np.ndarray, step: float) -> np.ndarray:
    """Comoving Mpc^3 per arcsec2 in shells from each z to z + step."""
    grid, _, volume, _ = _distance_table()
    return np.interp(z + step, grid, volume) - np.interp(z, grid, volume)


_Z_STEP, _MAG_STEP = 0.01, 0.1


def _templates(physics: PhysicsConfig) -> Templates:
    return templates(physics.red_colour_offset_mag)


@cache
def _field_cells(
    populations: tuple[tuple[tuple[float, float, float, float], float, float, bool], ...],
    red_colour_offset_mag: PerColour,
    background_r_mag: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Cells in (kind, z, absolute magnitude): is red, lower edges, cumulative share, and galaxies per arcsec2.

    Args:
        populations: luminosity function, factor on it, its growth with redshift, and whether it is that of red
            galaxies, for each kind.
        red_colour_offset_mag: of the templates.
        background_r_mag: None for the sky to its depth; else for what lies beyond, to this magnitude, and for the
            growth from ``BACKGROUND_R_MAG`` on.
    """
    z = np.arange(0.02, 1.2, _Z_STEP)
    absolute = np.arange(-24.5, -13.0, _MAG_STEP)
    grid, h = templates(red_colour_offset_mag), H0_KM_S_MPC / 100.0
    modulus = _distance_modulus(z + _Z_STEP / 2)
    volume = _volume_per_arcsec2(z, _Z_STEP)
    numbers = []
    for (m_star, alpha, phi, evolution), scale, growth, red in populations:
        m_star = m_star + 5 * np.log10(h) - evolution * (np.minimum(z, 0.6) - 0.1)
        luminosity = 10 ** (-0.4 * (absolute[None] + _MAG_STEP / 2 - m_star[:, None]))
        density = 0.4 * np.log(10) * phi * h**3 * luminosity ** (alpha + 1) * np.exp(-luminosity)
        k_r = grid.red_magnitudes(z)[:, 2] if red else grid.blend_magnitudes(z, np.full(len(z), 0.6))[:, 2]
        apparent = absolute[None] + (modulus + k_r)[:, None]
        # A margin of 0.4 mag allows for the spread of K-corrections; the caller cuts.
        share = (apparent < DEEPEST_R_MAG + 0.4).astype(float)
        if background_r_mag is not None:
            more = 10 ** (0.4 * growth * np.maximum(z - 0.3, 0.0))[:, None]
            share = np.where(apparent < DEEPEST_R_MAG, more - 1.0, more)
            share *= (apparent > BACKGROUND_R_MAG) & (apparent < background_r_mag + 0.4)
        numbers.append(scale * density * _MAG_STEP * volume[:, None] * share)
    number = np.stack(numbers)
    kinds = np.array([red for *_, red in populations])
    red, zz, mm = np.broadcast_arrays(kinds[:, None, None], z[None, :, None], absolute[None, None])
    total = float(number.sum())
    return red.ravel(), zz.ravel(), mm.ravel(), np.cumsum(number.ravel()) / total, total


def _field(rng: Any, width_arcsec: float, physics: PhysicsConfig, background_r_mag: float | None = None) -> Sources:
    """Galaxies of the field, red and blue, from luminosity functions times volume: those of the sky's depth, or the
    background from there to ``background_r_mag``."""
    red_cell, z_cell, mag_cell, cumulative, density = _field_cells(
        (
            (physics.field_red_lf, physics.field_red_scale, 0.0, True),
            (physics.field_blue_lf, physics.field_blue_scale, physics.background_growth, False),
        ),
        physics.red_colour_offset_mag,
        background_r_mag,
    )
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
    base = _templates(physics).red_magnitudes(z) + (absolute_r + _distance_modulus(z))[:, None]
    dm = np.clip(base[:, 3] - m_star_i_mag(np.maximum(z, 0.05)), -2.5, 4.0)
    mag = np.where(
        red[:, None],
        _red_colours(field_rng, z, dm, physics, np.array(physics.red_colour_scatter_mag)),
        _blue_colours(field_rng, z, physics, 0.0 if background_r_mag is None else physics.background_young_growth),
    )
    mag = mag + (absolute_r + _distance_modulus(z))[:, None]
    return _with_shapes(field_rng, x, y, mag, z, absolute_r, red, physics)


def _red_colours(
    rng: Any, z: np.ndarray, dm: np.ndarray, physics: PhysicsConfig, scatter_mag: np.ndarray
) -> np.ndarray:
    """Relative magnitudes (n, 5) on the red sequence, with its slope in ``dm`` = i - m* and a scatter of
    ``scatter_mag``, (4,) or (n, 4)."""
    root = _correlation_root(physics.red_colour_correlation)
    scatter = scatter_mag * (rng("red colours").normal(size=(len(z), 4)) @ root.T)
    colours = np.array(physics.red_colour_slope) * dm[:, None] + scatter
    return _templates(physics).red_magnitudes(z) + colours_to_offsets(colours)


@cache
def _correlation_root(correlation: tuple[float, ...]) -> np.ndarray:
    """Matrix (4, 4) that turns independent normal numbers into correlated ones."""
    matrix = np.eye(4)
    matrix[np.triu_indices(4, 1)] = correlation
    return np.linalg.cholesky(matrix + matrix.T - np.eye(4))


def _central_scatter(z: np.ndarray, physics: PhysicsConfig) -> np.ndarray:
    """(n, 4) scatter of the colours of brightest galaxies."""
    near, far = np.array(physics.central_colour_scatter_mag)
    return near + np.clip((z[:, None] - 0.1) / 0.15, 0, 1) * (far - near)


def _blue_colours(rng: Any, z: np.ndarray, physics: PhysicsConfig, young_growth: float = 0.0) -> np.ndarray:
    """Relative magnitudes (n, 5) of star-forming galaxies: a share of young light, dust, and scatter."""
    # Inverse transform on a table: one uniform number per galaxy.
    young = np.interp(rng("young").random(len(z)), *_young_share_table(*physics.young_share_beta))
    young = 1.0 - (1.0 - young) ** (1.0 + young_growth * np.maximum(z - 0.3, 0.0))
    normal = rng("blue colours").normal(size=(len(z), 5))
    dust = physics.blue_reddening_mag * np.abs(normal[:, 4:])
    colours = normal[:, :4] * physics.blue_colour_scatter_mag + dust * REDDENING_COLOURS
    offsets = colours_to_offsets(colours)
    return _templates(physics).blend_magnitudes(z, young) + offsets - offsets[:, 2:3]


@cache
def _young_share_table(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import beta

    share = np.linspace(0, 1, 201)
    return beta.cdf(share, a, b), share


def _with_shapes(
    rng: Any,
    x: np.ndarray,
    y: np.ndarray,
    mag: np.ndarray,
    z: np.ndarray,
    absolute_r: np.ndarray,
    red: np.ndarray,
    physics: PhysicsConfig,
) -> Sources:
    """Sizes, axis ratios and profiles: Sersic n = 4 for red galaxies and n = 1 for blue ones.

    Half-light radii follow Shen et al. 2003, MNRAS 343, 978 (eq. 14 and 15; circular apertures), with scatter 0.3 and
    0.4 in ln r; axis ratios those of ellipticals (mean 0.75) and of randomly inclined disks.
    """
    n = len(x)
    normal, uniform = rng("size").normal(size=(n, 2)), rng("shape").random((n, 2))
    early = 0.26 * -absolute_r - 5.06
    late = 0.104 * -absolute_r + 0.25 * np.log10(1 + 10 ** (-0.4 * (absolute_r + 20.91))) - 1.71
    early = np.maximum(early, 0.0) + np.log10(physics.early_r50_scale)
    late = late + np.log10(physics.late_r50_scale)
    log10_kpc = np.where(red, early + 0.13 * normal[:, 0], late + 0.17 * normal[:, 0])
    elliptical = np.clip(0.75 + 0.15 * normal[:, 1], 0.3, 1.0)
    thin = physics.disk_thickness**2
    disk = np.sqrt(uniform[:, 0] ** 2 * (1 - thin) + thin)
    axis_ratio = np.where(red, elliptical, disk)
    return Sources(
        x_arcsec=x,
        y_arcsec=y,
        mag=mag,
        z=z,
        r50_arcsec=10**log10_kpc / np.sqrt(axis_ratio) / _kpc_per_arcsec(z),
        axis_ratio=axis_ratio,
        angle_deg=180.0 * uniform[:, 1],
        sersic_n=np.where(red, 4.0, 1.0),
        is_member=np.zeros(n, bool),
        is_red=red.copy(),
        is_star=np.zeros(n, bool),
        is_diffuse=np.zeros(n, bool),
    )


def _stars(rng: Any, width_arcsec: float, config: MockConfig) -> Sources:
    """Stars of the Galaxy: counts rising as a power law in flux, colours along the stellar locus with 0.03 mag
    scatter."""
    physics = config.physics
    grid = np.arange(STAR_BRIGHTEST_R_MAG, config.depth_r_mag + 0.05, 0.1)
    slope = np.where(grid < STAR_BREAK_R_MAG, physics.star_count_bright_slope, physics.star_count_slope)
    log10_count = slope * (grid - STAR_BREAK_R_MAG) + physics.star_count_slope * (STAR_BREAK_R_MAG - 14.5)
    per_mag = physics.star_count_r145 * 10**log10_count
    brighter = np.concatenate([[0.0], np.cumsum(0.05 * (per_mag[1:] + per_mag[:-1]))])
    latitude = np.exp(physics.star_count_scatter_ln * rng("latitude").normal())
    density = latitude * brighter[-1] / 3600.0**2
    x, y = _nested_positions(rng("star place"), density, width_arcsec)
    n = len(x)
    uniform = rng("star").random((n, 2))
    r = np.interp(uniform[:, 0] * brighter[-1], brighter, grid)
    decile = uniform[:, 1] * (STAR_G_I_QUANTILES.shape[1] - 1)
    bright, faint = (np.interp(decile, range(len(table)), table) for table in STAR_G_I_QUANTILES)
    g_i = bright + np.interp(r, STAR_G_I_R_MAG, (0.0, 1.0)) * (faint - bright)
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
    physics: PhysicsConfig | None = None,
    *,
    ebv_mag: float = 0.04,
    i_limit_mag: float = 21.0,
    ideal: bool = False,
) -> dict[str, np.ndarray]:
    """The galaxy catalogue that a survey like SDSS DR8 would make of the sources.

    Sources within ``blend_arcsec`` of a brighter one are merged with it, and lost with it where it is a star; faint
    galaxies are listed in part; a few faint stars are listed as galaxies.

    Args:
        sources: the true sources.
        cluster: id, ra_deg and dec_deg of the box's centre (0, 0 where missing).
        seed: seed of the photometric noise.
        physics: of the photometric catalogue; the configuration ``sky`` if not given.
        ebv_mag: Galactic reddening E(B-V). Magnitudes are free of it, but it has cost light: errors and limits know it.
        i_limit_mag: galaxies with a fainter observed i magnitude are not listed.
        ideal: list every galaxy by itself, and no star.

    Returns:
        Columns ra_deg, dec_deg, mag (n, 5) and mag_err (n, 5): asinh magnitudes corrected for Galactic extinction, with
        errors. Stars and diffuse light are left out. Columns truth_z, truth_red and truth_member, of the brightest
        source of a blend, are kept aside, for calibration with spectroscopic redshifts and for tests; no measurement
        of richness reads them.
    """
    physics = physics or PhysicsConfig()
    rng = stream(seed, str(cluster["id"]), "photometry")
    seen = sources[~sources.is_diffuse]
    flux = 10 ** (-0.4 * (seen.mag - 22.5))
    if ideal:
        alone = ~seen.is_star
    else:
        flux, alone = _blend(seen.x_arcsec, seen.y_arcsec, flux, physics.blend_arcsec)
        mistaken = rng.random(len(seen)) < physics.star_as_galaxy_share
        alone &= ~seen.is_star | ((seen.mag[:, 2] > STARS_LISTED_R_MAG) & mistaken)
    seen, flux = seen[alone], flux[alone]
    dimming = 10 ** (0.4 * ebv_mag * np.array(list(EXTINCTION_PER_EBV.values())))
    common = np.exp(physics.photometry_error_scatter_ln * rng.normal(size=(len(seen), 1)))
    sigma = common * dimming * _model_flux_sigma(flux / dimming, seen, physics)
    flux = flux + sigma * rng.normal(size=sigma.shape)
    softening = 2e9 * LUPTITUDE_SOFTENING
    mag = -2.5 / np.log(10) * (np.arcsinh(flux / softening) + np.log(LUPTITUDE_SOFTENING))
    mag_err = 2.5 / np.log(10) * sigma / np.hypot(softening, flux)
    listed = mag[:, 3] < i_limit_mag
    if not ideal:
        scattered = mag[:, 3] + physics.completeness_width_mag * rng.normal(size=len(mag))
        listed &= scattered + 2.5 * np.log10(dimming[3]) < physics.completeness_i_mag
    centre = np.array([float(value(cluster, name, 0.0)) for name in ("ra_deg", "dec_deg")])
    ra, dec = offset_position(centre[0], centre[1], seen.x_arcsec, seen.y_arcsec)
    return {
        "ra_deg": ra[listed],
        "dec_deg": dec[listed],
        "mag": mag[listed],
        "mag_err": mag_err[listed],
        "truth_z": seen.z[listed],
        "truth_red": seen.is_red[listed],
        "truth_member": seen.is_member[listed],
    }


def _model_flux_sigma(flux: np.ndarray, sources: Sources, physics: PhysicsConfig) -> np.ndarray:
    """Errors (n, 5) of model fluxes in nanomaggies: noise of the sky in the effective area of PSF and profile, plus the
    Poisson noise of the light, times ``photometry_error_factor``.

    The effective area is (integral of I)^2 over the integral of I^2: 4 pi sigma^2 of a Gaussian, 8.92 and 2.71 r50^2 of
    exponential and de Vaucouleurs profiles; PSF (wings widen it by a tenth) and profile are added.
    """
    psf = 4 * np.pi * (1.1 * np.array(physics.psf_fwhm_arcsec) / 2.355) ** 2
    profile = np.where(sources.sersic_n == 4, 2.71, 8.92) * sources.r50_arcsec**2 * sources.axis_ratio
    area = psf + profile[:, None]
    pixel = np.array(physics.pixel_sigma_min_nmgy) * physics.pixel_sigma_max_nmgy
    variance = pixel * area / SDSS_PIXEL_SCALE_ARCSEC**2 + flux * physics.nmgy_per_electron
    return np.array(physics.photometry_error_factor) * np.sqrt(variance)


def _blend(
    x_arcsec: np.ndarray, y_arcsec: np.ndarray, flux: np.ndarray, blend_arcsec: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fluxes (n, 5) with those of blended neighbours added to the brightest in i, and which sources are left (n,)."""
    from scipy.spatial import cKDTree

    left, total = np.ones(len(flux), bool), flux.copy()
    if len(flux) < 2:
        return total, left
    pairs = cKDTree(np.column_stack([x_arcsec, y_arcsec])).query_pairs(blend_arcsec, output_type="ndarray")
    order = np.argsort(flux[pairs, 3], axis=1)
    faint, bright = np.take_along_axis(pairs, order, axis=1).T
    for k in np.lexsort((-flux[faint, 3], -flux[bright, 3])):
        if left[faint[k]] and left[bright[k]]:
            left[faint[k]] = False
            total[bright[k]] += flux[faint[k]]
    return total, left


def offset_position(
    ra_deg: ArrayLike, dec_deg: ArrayLike, west_arcsec: np.ndarray, north_arcsec: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions at tangent-plane offsets from a centre (gnomonic projection; Calabretta & Greisen 2002, A&A 395,
    1077)."""
    ra_deg, dec_deg = np.asarray(ra_deg, float), np.asarray(dec_deg, float)
    xi, eta = np.radians(-west_arcsec / 3600), np.radians(north_arcsec / 3600)
    sin_dec, cos_dec = np.sin(np.radians(dec_deg)), np.cos(np.radians(dec_deg))
    denominator = cos_dec - eta * sin_dec
    ra = ra_deg + np.degrees(np.arctan2(xi, denominator))
    dec = np.degrees(np.arctan2(sin_dec + eta * cos_dec, np.hypot(xi, denominator)))
    return ra % 360.0, dec
