"""What a survey lists of the mock sky: blends, faint galaxies in part, a few stars."""

from __future__ import annotations

import numpy as np
import pytest

from pix2mass.config import MockConfig
from pix2mass.images.mock import population
from pix2mass.images.mock.population import Sources

BLEND_ARCSEC = MockConfig().physics.blend_arcsec
ROW = {"id": "observed", "z": 0.2, "ra_deg": 150.0, "dec_deg": 20.0}


def sources(x: list[float], mag: list[float], star: list[bool]) -> Sources:
    n = len(x)
    zero, no = np.zeros(n), np.zeros(n, bool)
    return Sources(
        x_arcsec=np.array(x, float),
        y_arcsec=zero,
        mag=np.array(mag, float)[:, None] + np.array([2.0, 1.0, 0.4, 0.0, -0.2]),
        z=np.arange(n) / 10.0,
        r50_arcsec=zero + 1,
        axis_ratio=zero + 1,
        angle_deg=zero,
        sersic_n=zero + 4,
        is_member=no,
        is_red=~no,
        is_star=np.array(star),
        is_diffuse=no,
    )


def field(ideal: bool) -> dict[str, np.ndarray]:
    parts = [population.galaxies({"id": f"f{i}", "z": 0.25}, MockConfig(), 1800.0, 1) for i in range(6)]
    # The reddening of the field in which the limits were measured.
    listed = [population.observe(p, {"id": f"f{i}"}, 1, ebv_mag=0.09, ideal=ideal) for i, p in enumerate(parts)]
    for i, part in enumerate(listed):
        part["ra_deg"] = (part["ra_deg"] + 180.0) % 360.0 - 180.0 + 2.0 * i
    return {name: np.concatenate([part[name] for part in listed]) for name in listed[0]}


def test_the_fainter_of_a_close_pair_is_lost_and_its_light_kept():
    close, apart = 0.8 * BLEND_ARCSEC, 1.2 * BLEND_ARCSEC
    listed = population.observe(
        sources([0.0, close, 100.0, 100.0 + apart], [17.0, 17.5, 17.0, 17.5], [False] * 4), ROW, 1
    )
    assert len(listed["ra_deg"]) == 3
    together = 17.0 - 2.5 * np.log10(1 + 10 ** (-0.4 * 0.5))
    assert listed["mag"][0, 3] == pytest.approx(together, abs=5 * listed["mag_err"][0, 3])
    assert listed["mag"][1:, 3] == pytest.approx([17.0, 17.5], abs=0.1)
    assert list(listed["truth_z"]) == [0.0, 0.2, 0.3]


def test_a_galaxy_on_a_bright_star_is_lost():
    listed = population.observe(sources([0.0, 1.0, 50.0], [15.0, 18.0, 18.0], [True, False, False]), ROW, 1)
    assert list(listed["truth_z"]) == [0.2]


def test_a_chain_of_blends_goes_to_its_brightest():
    """B is swallowed by A; C, out of reach of A, is left although B was near it."""
    step = 0.9 * BLEND_ARCSEC
    listed = population.observe(sources([0.0, step, 2 * step], [16.0, 17.0, 18.0], [False] * 3), ROW, 1)
    assert list(listed["truth_z"]) == [0.0, 0.2]


def test_ideal_survey_lists_every_galaxy():
    listed = population.observe(sources([0.0, 0.5, 1.0], [15.0, 18.0, 18.5], [True, False, False]), ROW, 1, ideal=True)
    assert len(listed["ra_deg"]) == 2


def test_faint_galaxies_are_listed_in_part_and_bright_ones_almost_all():
    ideal, real = field(True), field(False)
    share = []
    for low, high in ((17.0, 20.0), (20.0, 20.5), (20.75, 21.0)):
        counts = [((c["mag"][:, 3] > low) & (c["mag"][:, 3] < high)).sum() for c in (real, ideal)]
        share.append(counts[0] / counts[1])
    print("listed share at i 17-20, 20-20.5, 20.75-21:", np.round(share, 3))
    # Blends lose a galaxy and lift another over the limit; a few red stars are added.
    assert 0.96 < share[0] < 1.04 and 0.95 < share[1] < 1.05 and 0.3 < share[2] < 0.5


def test_stars_among_the_galaxies_are_few():
    listed = field(False)
    stars = listed["truth_z"] == 0
    assert 0.001 < stars.mean() < 0.03


def test_dust_costs_depth_but_no_colour():
    """Errors grow by the extinction, most in u; corrected magnitudes stay where they were."""
    x = [10.0 * i for i in range(400)]
    clear, dusty = (
        population.observe(sources(x, [19.0] * len(x), [False] * len(x)), ROW, 1, ebv_mag=ebv) for ebv in (0.0, 0.15)
    )
    assert len(clear["ra_deg"]) == len(dusty["ra_deg"]) == len(x)
    ratio = np.median(dusty["mag_err"] / clear["mag_err"], axis=0)
    assert np.all(np.diff(ratio) < 0) and 1.2 < ratio[2] <= 10 ** (0.4 * 0.15 * 2.285) + 1e-6
    assert np.median(dusty["mag"] - clear["mag"], axis=0) == pytest.approx(np.zeros(5), abs=0.05)


def test_large_galaxies_have_larger_errors():
    small, large = (sources([0.0, 100.0], [18.0, 18.0], [False, False]) for _ in range(2))
    large.r50_arcsec[:] = 4.0
    errors = [population.observe(kind, ROW, 1)["mag_err"] for kind in (small, large)]
    assert np.all(errors[1] > 1.5 * errors[0])


def test_the_same_sky_is_listed_the_same_way():
    first, second = field(False), field(False)
    assert all(np.array_equal(first[name], second[name]) for name in first)
