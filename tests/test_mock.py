"""The mock sky: reproducible, conserving flux, with the noise, colours, numbers and profiles it states."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest

from pix2mass.config import PHYSICS, GridConfig, MockConfig, RunConfig, load_toml, to_toml, validate
from pix2mass.cosmology import cosmology, kpc_per_arcsec, m_star_i_mag, r500c_kpc
from pix2mass.images.mock import population
from pix2mass.images.mock.population import Sources
from pix2mass.images.mock.source import MockSource
from pix2mass.images.mock.templates import templates
from pix2mass.types import Pix2massError

CENTRED = MockConfig.model_validate(
    {"miscentred_share": 0.0, "projected_groups": False, "physics": {"diffuse_light_share": 0.0}}
)
SKY = MockConfig().physics


def cluster(i=0, z=0.25, mass=14.5, richness=None) -> dict:
    row = {"id": f"c{i}", "z": z, "log10_m500c_true": mass, "ra_deg": 150.0, "dec_deg": 20.0}
    return row if richness is None else {**row, "richness_true": richness}


# --- catalogue ---


def test_catalogue_is_reproducible_and_its_start_does_not_depend_on_its_length():
    long, short = (population.draw_clusters(MockConfig(), n, 3, "m") for n in (50, 7))
    other = population.draw_clusters(MockConfig(), 7, 4, "m")
    for name in long.colnames:
        assert np.array_equal(long[name][:7], short[name]), name
    assert not np.allclose(short["z"], other["z"])
    assert long.meta["mass_definition"] == "500c" and long.meta["seed"] == 3


def test_catalogue_has_the_stated_ranges_and_scatters():
    config = MockConfig(label_scatter_dex=0.12)
    table = population.draw_clusters(config, 4000, 1, "m")
    true = np.asarray(table["log10_m500c_true"])
    assert true.min() >= config.log10_m500c_min and true.max() <= config.log10_m500c_max
    assert np.std(table["log10_m500c"] - true) == pytest.approx(0.12, rel=0.05)
    rich = true > 14.8
    ln_ratio = np.log(np.asarray(table["richness_true"])[rich] / population.mean_richness(true[rich], SKY))
    poisson = np.mean(1 / population.mean_richness(true[rich], SKY))
    assert np.std(ln_ratio) == pytest.approx(np.hypot(SKY.richness_scatter_ln, np.sqrt(poisson)), rel=0.08)
    assert np.mean(ln_ratio) == pytest.approx(0.0, abs=0.03)


def test_richness_of_a_mass_is_the_published_one():
    assert population.mean_richness(14.24, SKY) == pytest.approx(40.0)
    assert m_star_i_mag(0.25) == pytest.approx(18.39, abs=0.01)


# --- physics ---


def mock(physics: dict | None = None, **values) -> MockConfig:
    return MockConfig.model_validate({**values, "physics": physics or {}})


def test_the_two_configurations_differ_in_what_the_literature_disagrees_on():
    sky, sim = (mock(configuration=name).physics for name in ("sky", "sim"))
    for names in (
        ("red_alpha", "blue_alpha", "m_star_offset_mag", "field_red_lf", "field_blue_lf"),
        ("red_colour_offset_mag", "red_colour_slope", "red_colour_scatter_mag", "red_fraction_centre"),
        ("richness_at_pivot", "richness_slope", "richness_scatter_ln"),
        ("psf_components", "psf_fwhm_arcsec", "pixel_sigma_min_nmgy", "pixel_sigma_max_nmgy"),
    ):
        assert all(getattr(sky, name) != getattr(sim, name) for name in names), names
    rows = [{"id": f"p{i}", "z": 0.2, "log10_m500c_true": 14.6} for i in range(4)]
    seen = [[population.galaxies(row, mock(configuration=name), 600.0, 1) for row in rows] for name in ("sky", "sim")]
    members = [sum(int(s.is_member.sum()) for s in part) for part in seen]
    assert abs(np.log(members[0] / members[1])) > 0.1
    zero_points = []
    for part, physics in zip(seen, (sky, sim), strict=True):
        red = np.concatenate([s.mag[s.is_member & s.is_red] for s in part])
        sloped = physics.red_colour_slope[1] * (red[:, 3] - m_star_i_mag(0.2))
        zero_points.append(np.median(red[:, 1] - red[:, 2] - sloped))
    assert zero_points[0] - zero_points[1] == pytest.approx(0.04, abs=0.02)


def test_one_value_can_be_overridden_on_top_of_a_configuration_and_survives_toml(tmp_path):
    config = RunConfig(name="a", mock=mock({"red_alpha": -1.1}, configuration="sim"))
    assert config.mock is not None and config.mock.physics.red_alpha == -1.1
    assert config.mock.physics.richness_slope == PHYSICS["sim"]["richness_slope"]
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_toml(RunConfig, tmp_path / "run.toml") == config
    written = tmp_path / "short.toml"
    written.write_text('name = "a"\n[mock]\nconfiguration = "sim"\n[mock.physics]\nred_alpha = -1.1\n')
    assert load_toml(RunConfig, written) == config


@pytest.mark.parametrize(
    ("physics", "message"),
    [
        ({"psf_components": [[0.8, 1.0], [0.1, 2.0]]}, "add up to 1"),
        ({"pixel_sigma_min_nmgy": [1.0] * 5}, "must not exceed"),
        ({"red_alhpa": -1.0}, "did you mean 'red_alpha'"),
    ],
)
def test_impossible_physics_is_refused(physics, message):
    with pytest.raises(Pix2massError, match=message):
        validate(MockConfig, {"physics": physics}, "here")


def test_physics_reaches_the_pixels():
    row, grid = cluster(mass=14.8), GridConfig(n_pixels=32)
    plain = MockSource(mock(), grid, 1).cutout(row)
    noisy = MockSource(mock({"pixel_sigma_min_nmgy": (1.0,) * 5, "pixel_sigma_max_nmgy": (1.0,) * 5}), grid, 1)
    assert np.all(np.median(noisy.cutout(row).sigma, axis=(1, 2)) > 4 * np.median(plain.sigma, axis=(1, 2)))
    richer = MockSource(mock({"richness_at_pivot": 120.0}), grid, 1).cutout(row)
    blank = MockSource(mock(), grid, 1).cutout({"id": row["id"], "z": row["z"]})
    assert (richer.flux - plain.flux)[3].sum() > 0.5 * (plain.flux - blank.flux)[3].sum() > 0
    close = GridConfig(n_pixels=32, width_arcsec=32 * 0.396)
    sharp, blurred = (
        MockSource(mock({"psf_components": parts}, miscentred_share=0.0), close, 1).cutout(row).flux[2].max()
        for parts in (((1.0, 1.0),), ((0.5, 1.0), (0.5, 6.0)))
    )
    assert blurred < 0.8 * sharp


# --- clusters ---


def test_masses_and_redshifts_follow_the_halo_mass_function_times_volume():
    config = mock(mass_prior="mass function", z_min=0.1, z_max=0.5, log10_m500c_min=13.8)
    table = population.draw_clusters(config, 20_000, 1, "m")
    z, mass = np.asarray(table["z"]), np.asarray(table["log10_m500c_true"])
    assert z.min() >= 0.1 and z.max() <= 0.5 and mass.min() >= 13.8 and mass.max() <= 15.2
    # Independent of the cells: astropy's volume and a plain sum over a fine grid.
    z_grid, m_grid = np.linspace(0.1, 0.5, 81), np.linspace(13.8, 15.2, 281)
    volume = cosmology().differential_comoving_volume(z_grid).value
    halo_mass = m_grid - config.physics.halo_mass_offset_dex
    density = population.halo_density(halo_mass[None], z_grid[:, None]) * volume[:, None]
    for values, grid, axis in ((z, z_grid, 1), (mass, m_grid, 0)):
        number = density.sum(axis=axis)
        cumulative = np.concatenate([[0.0], np.cumsum((number[1:] + number[:-1]) / 2)])
        expected = np.interp(np.sort(values), grid, cumulative / cumulative[-1])
        distance = np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max()
        # The 1% point of the Kolmogorov-Smirnov distance, and half a cell.
        assert distance < 1.63 / np.sqrt(len(values)) + 0.005
    # 10^14 to 10^14.5 at z 0.3: the fit of Tinker et al. 2008 gives 1.8e-5 and 1.9e-6 per Mpc^3 and dex.
    assert population.halo_density([14.0, 14.5], [0.3, 0.3]) == pytest.approx([1.8e-5, 1.9e-6], rel=0.35)


def test_the_start_of_a_mass_function_catalogue_does_not_depend_on_its_length():
    long, short = (population.draw_clusters(mock(mass_prior="mass function"), n, 3, "m") for n in (50, 7))
    assert all(np.array_equal(long[name][:7], short[name]) for name in long.colnames)


def test_members_are_centred_where_the_columns_say():
    config = mock(miscentred_share=0.5, z_min=0.1, z_max=0.4)
    table = population.draw_clusters(config, 60, 2, "m")
    off = np.asarray(table["miscentring_kpc"]) > 0
    assert 0.3 < off.mean() < 0.7
    assert 150 < np.median(table["miscentring_kpc"][off]) < 350
    for row in table[:12]:
        bare = {name: row[name] for name in ("id", "z", "ra_deg", "dec_deg", "log10_m500c_true", "richness_true")}
        listed = []
        for cluster_row in (row, bare):
            members = population.galaxies(cluster_row, config, 2000.0, 2)
            west, north = members.x_arcsec[0], members.y_arcsec[0]  # the brightest galaxy comes first
            assert members.is_member[0]
            listed.append((west, north))
            ra, dec = population.offset_position(row["ra_deg"], row["dec_deg"], west, north)
            assert float(ra) == pytest.approx(row["ra_deg_true"], abs=1e-8)
            assert float(dec) == pytest.approx(row["dec_deg_true"], abs=1e-8)
            distance_kpc = np.hypot(west, north) * float(kpc_per_arcsec(float(row["z"])))
            assert distance_kpc == pytest.approx(row["miscentring_kpc"], abs=0.01)
        assert listed[0] == pytest.approx(listed[1], abs=1e-6)


@pytest.mark.parametrize("z", [0.08, 0.55])
def test_the_ends_of_the_redshift_range_have_pictures_and_red_members(z):
    assert (MockConfig().z_min, MockConfig().z_max) == (0.08, 0.55)
    row = cluster(z=z, mass=15.0, richness=200)
    cutout = MockSource(CENTRED, GridConfig(), 1).cutout(row)
    middle = cutout.flux[3, 24:40, 24:40].sum()
    assert np.isfinite(cutout.flux).all() and middle > 16 * 16 * np.median(cutout.flux[3])
    sources = population.galaxies(row, CENTRED, 4000.0 / float(kpc_per_arcsec(z)), 1)
    red = luminous_red_members(sources, z)
    g_r, r_i = (sources.mag[red, k] - sources.mag[red, k + 1] for k in (1, 2))
    # Luminous red galaxies: the break moves through g-r until z 0.4, which then stays near 1.65, and on through r-i.
    expected = {0.08: (0.9, 0.38), 0.55: (1.65, 1.0)}[z]
    assert (np.median(g_r), np.median(r_i)) == pytest.approx(expected, abs=0.12)


def test_groups_gather_around_a_cluster_as_its_two_halo_term_says():
    """As many as n b b xi integrated over the sphere; at the cluster's redshift; none within its members' reach."""
    z, mass = 0.25, 14.7
    config = mock({"correlated_structure": 3.0}, miscentred_share=0.0)
    numbers, distances, redshifts = [], [], []
    for i in range(60):
        groups = population.correlated_haloes(
            lambda purpose, i=i: population.stream(1, f"g{i}", purpose), z, mass, config
        )
        numbers.append(len(groups[0]))
        distances.append(np.hypot(groups[0], groups[1]))
        redshifts.append(groups[2])
    halo_mass = np.linspace(13.3, 15.2, 400)
    bias = 10 ** (
        0.4465 + 0.3766 * (halo_mass - 14) + 0.0874 * (halo_mass - 14) ** 2 - 0.05 * (0.341 + 0.0705 * (halo_mass - 14))
    )
    own = mass + 0.15 - 14
    own_bias = 10 ** (0.4465 + 0.3766 * own + 0.0874 * own**2 - 0.05 * (0.341 + 0.0705 * own))
    start = 2 * 1.53 * float(r500c_kpc(mass, z)) / 1000 * (1 + z)
    r = np.linspace(start, 20.0, 2000)
    xi = np.exp(np.interp(np.log(r), np.log(population.XI_MPC), np.log(population.XI)))
    expected = 3.0 * own_bias * np.interp(z, population.GROWTH_Z, population.GROWTH) ** 2
    expected *= np.trapezoid(population.halo_density(halo_mass, z) * bias, halo_mass)
    expected *= np.trapezoid(4 * np.pi * r**2 * xi, r)
    assert np.mean(numbers) == pytest.approx(expected, abs=float(4 * np.sqrt(expected / 60)))
    assert np.abs(np.concatenate(redshifts) - z).max() < 20.0 * 70 * 1.2 / 299792
    reach_arcsec = 20_000 / (1 + z) / float(kpc_per_arcsec(z))
    assert np.concatenate(distances).max() < reach_arcsec


def test_correlated_structure_adds_galaxies_at_the_clusters_redshift_that_are_no_members():
    z = 0.25
    near = []
    for strength in (0.0, 30.0):
        config = mock({"correlated_structure": strength}, miscentred_share=0.0)
        sources = population.galaxies(cluster(z=z, mass=14.7), config, 1500.0, 1)
        near.append((~sources.is_member & (np.abs(sources.z - z) < 0.006)).sum())
    assert near[1] > 1.5 * near[0]


# --- population ---


def test_sources_depend_on_seed_and_id_only():
    alone = population.galaxies(cluster(2), MockConfig(), 300.0, 9)
    population.galaxies(cluster(5), MockConfig(), 500.0, 9)
    again = population.galaxies(cluster(2), MockConfig(), 300.0, 9)
    other = population.galaxies(cluster(2), MockConfig(), 300.0, 10)
    assert all(getattr(alone, f.name).tobytes() == getattr(again, f.name).tobytes() for f in fields(Sources))
    assert len(other) != len(alone) or not np.array_equal(alone.mag, other.mag)


def test_a_wider_box_holds_the_sources_of_a_narrower_one():
    narrow, wide = (population.galaxies(cluster(), MockConfig(), width, 1) for width in (240.0, 700.0))
    inside = wide[(np.abs(wide.x_arcsec) <= 120.0) & (np.abs(wide.y_arcsec) <= 120.0)]
    assert len(narrow) == len(inside) > 50
    assert np.array_equal(narrow.mag, inside.mag)
    assert np.array_equal(narrow.is_member, inside.is_member)


def luminous_red_members(sources: Sources, z: float) -> np.ndarray:
    limit = m_star_i_mag(z) + population.LUMINOUS_MAG
    return sources.is_member & sources.is_red & (sources.mag[:, 3] < limit)


@pytest.mark.parametrize("richness", [1, 20, 150])
def test_red_members_within_r_c_are_as_many_as_the_richness(richness):
    z = 0.2
    sources = population.galaxies(cluster(z=z, richness=richness), CENTRED, 2000.0, 1)
    radius_kpc = np.hypot(sources.x_arcsec, sources.y_arcsec) * kpc_per_arcsec(z)
    inside = luminous_red_members(sources, z) & (radius_kpc < population.richness_radius_kpc(richness))
    assert inside.sum() == richness


def test_members_follow_a_projected_nfw_profile():
    z, mass, x = 0.2, 14.8, []
    scale_kpc = r500c_kpc(mass, z) * population.R200C_PER_R500C / SKY.galaxy_concentration
    for i in range(20):
        sources = population.galaxies(cluster(i, z, mass, richness=150), CENTRED, 2500.0, 1)
        red = luminous_red_members(sources, z)
        x.append((np.hypot(sources.x_arcsec, sources.y_arcsec) * kpc_per_arcsec(z) / scale_kpc)[red])
    x = np.concatenate(x)
    x = x[(x > 0) & (x < 3.0)]
    # Independent of the code's closed form: the surface density of an NFW halo, integrated numerically.
    line = np.linspace(0, 60, 6001)
    grid = np.linspace(0.02, 3.0, 150)
    r = np.hypot(grid[:, None], line)
    enclosed = np.cumsum(grid * (1 / (r * (1 + r) ** 2)).sum(axis=1))
    for share in (0.25, 0.5, 0.75):
        expected = np.interp(share * enclosed[-1], enclosed, grid)
        assert np.mean(x < expected) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(x)) + 0.01)


@pytest.mark.parametrize("z", [0.12, 0.25, 0.38])
def test_red_members_lie_on_the_red_sequence(z):
    sources = population.galaxies(cluster(z=z, richness=400), CENTRED, 1200.0, 2)
    chosen = luminous_red_members(sources, z)
    dm = sources.mag[chosen, 3] - m_star_i_mag(z)
    colours = -np.diff(sources.mag[chosen], axis=1)
    expected = -np.diff(templates(SKY.red_colour_offset_mag).red_magnitudes(np.array([z])))[0]
    expected = expected + np.array(SKY.red_colour_slope) * dm[:, None]
    scatter = np.array(SKY.red_colour_scatter_mag)
    assert np.all(np.abs(np.mean(colours - expected, axis=0)) < 4 * scatter / np.sqrt(chosen.sum()))
    assert np.allclose(np.std(colours - expected, axis=0), scatter, rtol=0.2)


def test_the_red_fraction_falls_outwards():
    z = 0.2
    red, radius = [], []
    for i in range(6):
        sources = population.galaxies(cluster(i, z, 14.8, richness=150), CENTRED, 2500.0, 1)
        bright = sources.is_member & (sources.mag[:, 3] < m_star_i_mag(z) + 1.5)
        red.append(sources.is_red[bright])
        radius.append((np.hypot(sources.x_arcsec, sources.y_arcsec) * kpc_per_arcsec(z) / r500c_kpc(14.8, z))[bright])
    red, radius = np.concatenate(red), np.concatenate(radius)
    assert red[radius < 0.5].mean() > red[radius > 1.0].mean() + 0.1


def test_blank_sky_has_no_members():
    blank = population.galaxies({"id": "b", "z": 0.2}, MockConfig(), 400.0, 1)
    assert not blank.is_member.any() and blank.is_star.any() and (~blank.is_star).any()


def test_wrong_requests_say_what_is_wrong():
    with pytest.raises(Pix2massError, match="width"):
        population.galaxies(cluster(), MockConfig(), 0.0, 1)
    with pytest.raises(Pix2massError, match=r"z = 2"):
        population.galaxies(cluster(z=2.0), MockConfig(), 100.0, 1)


def test_observed_catalogue_lists_galaxies_with_honest_errors():
    row = cluster()
    sources = population.galaxies(row, MockConfig(), 1500.0, 1)
    seen = population.observe(sources, row, 1)
    kept = ~sources.is_star & ~sources.is_diffuse
    assert len(seen["mag"]) < kept.sum()
    assert seen["mag"][:, 3].max() < 21.0
    quiet = population.observe(sources, row, 2)
    # Bright galaxies are in both lists, in the same order: their magnitudes differ by the stated errors.
    bright_a, bright_b = (c["mag"][:, 3] < 20.0 for c in (seen, quiet))
    both = np.intersect1d(seen["ra_deg"][bright_a], quiet["ra_deg"][bright_b])
    a, b = (np.flatnonzero(np.isin(c["ra_deg"], both)) for c in (seen, quiet))
    pull = (seen["mag"][a, 1:4] - quiet["mag"][b, 1:4]) / np.hypot(seen["mag_err"][a, 1:4], quiet["mag_err"][b, 1:4])
    assert len(both) > 100
    assert np.subtract(*np.percentile(pull, [84.1, 15.9])) / 2 == pytest.approx(1.0, abs=0.1)


# --- camera ---


def test_cutouts_are_the_same_bytes_in_any_order():
    rows = population.draw_clusters(MockConfig(), 3, 5, "m")
    first, second = (MockSource(MockConfig(), GridConfig(n_pixels=32), 5) for _ in range(2))
    forward = [first.cutout(row) for row in rows]
    backward = [second.cutout(row) for row in rows[::-1]][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.flux.tobytes() == b.flux.tobytes() and a.sigma.tobytes() == b.sigma.tobytes()
    assert forward[0].flux.tobytes() != forward[1].flux.tobytes()


def test_bands_do_not_depend_on_which_others_are_kept():
    every, some = (
        MockSource(MockConfig(), GridConfig(n_pixels=32, bands=b), 5).cutout(cluster()) for b in ("ugriz", "gi")
    )
    assert np.allclose(every.flux[[1, 3]], some.flux, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n_pixels, width_arcsec", [(64, 25.344), (64, 200.0)])
def test_noise_is_what_sigma_says(n_pixels, width_arcsec):
    flat = mock({"sky_residual_sigma": 0.0, "star_count_r145": 1.0}, depth_r_mag=18.0, background_r_mag=23.0)
    grid = GridConfig(n_pixels=n_pixels, width_arcsec=width_arcsec)
    a = MockSource(flat, grid, 1).cutout({"id": "b", "z": 0.2})
    scale = width_arcsec / n_pixels
    ranges = zip(SKY.pixel_sigma_min_nmgy, SKY.pixel_sigma_max_nmgy, strict=True)
    for (low, high), flux, sigma in zip(ranges, a.flux, a.sigma, strict=True):
        assert low * 0.999 < sigma.min() / (scale / 0.396) < high * 1.001
        quiet = sigma < 1.02 * sigma.min()
        left, middle = np.percentile((flux / sigma)[quiet], [16, 50])
        assert middle - left == pytest.approx(1.0, abs=0.08)
    assert a.flux.dtype == np.float32 and not a.mask.any() and a.flags == 0


def test_the_background_of_pictures_leaves_the_rest_alone():
    width_arcsec = 900.0
    plain = population.galaxies(cluster(), CENTRED, width_arcsec, 1)
    full = population.galaxies(cluster(), CENTRED, width_arcsec, 1, background=True)
    assert np.array_equal(full.mag[: len(plain)], plain.mag)
    r_mag = full.mag[len(plain) :, 2]
    assert r_mag.min() > 21.5 and r_mag.max() < 25.0
    # Capak et al. 2007 have about 22,000 galaxies per deg2 and half magnitude at r = 24.25.
    per_deg2 = ((r_mag > 24.0) & (r_mag < 24.5)).sum() / (width_arcsec / 3600) ** 2
    assert 22_000 / 1.5 < per_deg2 < 22_000 * 1.5


def test_star_counts_bend_where_the_config_says():
    config = mock({"star_count_scatter_ln": 0.0, "star_count_r145": 800.0})
    stars = population.galaxies({"id": "stars", "z": 0.2}, config, 7200.0, 1)
    r_mag = stars.mag[stars.is_star, 2]
    physics = config.physics
    for low, high, slope in ((10.0, 14.0, physics.star_count_bright_slope), (14.0, 20.0, physics.star_count_slope)):
        grid = np.linspace(low, high, 200)
        at_break = physics.star_count_r145 * 10 ** (physics.star_count_slope * -0.5)
        expected = 4.0 * np.trapezoid(at_break * 10 ** (slope * (grid - 14.0)), grid)
        assert ((r_mag > low) & (r_mag < high)).sum() == pytest.approx(expected, abs=4 * expected**0.5)


def test_pixels_saturate_and_the_sky_keeps_its_offset():
    grid = GridConfig(n_pixels=64, width_arcsec=64 * 0.396)
    quiet = {"sky_residual_sigma": 0.0, "sky_offset_sigma": 0.0, "star_count_r145": 1.0}
    rows = {"id": "b", "z": 0.2}
    low, high = (
        MockSource(mock({**quiet, **change}), grid, 1).cutout(rows)
        for change in ({}, {"sky_offset_sigma": 2.0, "saturation_nmgy": (0.05,) * 5})
    )
    free = high.flux < 0.05
    shift = ((high.flux - low.flux) / low.sigma)[free & (low.flux + 2 * low.sigma < 0.05)]
    assert np.median(shift) == pytest.approx(2.0, abs=0.05)
    assert high.flux.max() == np.float32(0.05) and low.flux.max() > 0.1


def test_the_picture_shows_the_cluster_in_the_middle():
    with_cluster = MockSource(CENTRED, GridConfig(), 1).cutout(cluster(mass=15.0, richness=150))
    blank = MockSource(CENTRED, GridConfig(), 1).cutout({"id": "c0", "z": 0.25})
    difference = (with_cluster.flux - blank.flux)[2]
    middle = slice(24, 40)
    # A sixteenth of the area holds more than three times its share.
    assert difference[middle, middle].sum() > 3 / 16 * difference.sum() > 0
    # Same camera, same field: the cutouts differ by the members alone, so corners are nearly equal.
    assert np.median(np.abs(difference[:6, :6])) < 0.5 * np.median(with_cluster.sigma[2, :6, :6])


def test_importing_the_package_does_not_import_torch():
    code = "import pix2mass.images.mock, pix2mass.images.mock.source, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
