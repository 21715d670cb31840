"""Mass definitions: held against an NFW profile solved here, and against limits that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from pix2mass.catalog.masses import CONCENTRATIONS, MassDefinition, definition_of, looks_like_mass, to_m500c
from pix2mass.cosmology import cosmology, r500c_kpc
from pix2mass.types import Pix2massError


def duffy08(mass_msun: float, z: float, overdensity: str) -> float:
    """Concentration of Duffy et al. 2008, MNRAS 390, L64, table 1, full sample: A (M / 2e12 Msun/h)^B (1+z)^C."""
    a, b, c = {"200c": (5.71, -0.084, -0.47), "200m": (10.14, -0.081, -1.01)}[overdensity]
    return a * (mass_msun * 0.7 / 2e12) ** b * (1 + z) ** c


def nfw_m500c(mass_msun: float, z: float, overdensity: str, concentration: float) -> float:
    """M500c of an NFW profile, by solving for the radius: nothing here comes from colossus."""
    delta = {"200c": 200.0, "200m": 200.0 * float(cosmology().Om(z))}[overdensity]

    def enclosed(x: float) -> float:
        return np.log1p(x) - x / (1 + x)

    def excess(x: float) -> float:
        mean_density = delta * (enclosed(x) / enclosed(concentration)) * (concentration / x) ** 3
        return mean_density - 500.0

    x = brentq(excess, 1e-3 * concentration, concentration)
    return mass_msun * enclosed(x) / enclosed(concentration)


@settings(max_examples=15, deadline=None)
@given(
    log10_mass=st.floats(13.8, 15.3),
    z=st.floats(0.05, 0.6),
    overdensity=st.sampled_from(["200c", "200m"]),
)
@pytest.mark.filterwarnings("ignore:Some masses or redshifts are outside")
def test_conversions_agree_with_a_profile_solved_by_hand(log10_mass, z, overdensity):
    mass = 10.0**log10_mass
    got = to_m500c([mass], [z], MassDefinition(overdensity), "duffy08")[0]
    expected = nfw_m500c(mass, z, overdensity, duffy08(mass, z, overdensity))
    # 5e-4: colossus counts radiation in the mean density.
    assert got == pytest.approx(expected, rel=5e-4)


@pytest.mark.filterwarnings("ignore:Some masses or redshifts are outside")
def test_conversions_agree_with_a_published_formula():
    """Hu & Kravtsov 2003, ApJ 584, 702, equations C9 to C11: r_s / r of another overdensity, to 0.3 per cent."""

    def f(x: float) -> float:
        return x**3 * (np.log(1 + 1 / x) - 1 / (1 + x))

    def x_of(value: float) -> float:
        p = -0.4283 - 3.13e-3 * np.log(value) - 3.52e-5 * np.log(value) ** 2
        return (0.5116 * value ** (2 * p) + 0.75**2) ** -0.5 + 2 * value

    for mass in (1e14, 5e14, 2e15):
        c = duffy08(mass, 0.3, "200c")
        expected = 2.5 * (1 / (c * x_of(2.5 * f(1 / c)))) ** 3 * mass
        assert to_m500c([mass], [0.3], MassDefinition("200c"), "duffy08")[0] == pytest.approx(expected, rel=0.01)


def test_the_two_definitions_of_one_halo_meet_at_high_redshift():
    # Where matter dominates, 200 times the mean is 200 times the critical density.
    both = [to_m500c([2e14], [6.0], MassDefinition(name), "diemer19")[0] for name in ("200c", "200m")]
    assert both[0] == pytest.approx(both[1], rel=0.01)


def test_500c_is_left_alone_and_gaps_stay_gaps():
    np.testing.assert_array_equal(to_m500c([3e14, np.nan], [0.2, 0.3], MassDefinition()), [3e14, np.nan])
    got = to_m500c([3e14, np.nan, 3e14], [0.2, 0.3, np.nan], MassDefinition("200c"))
    assert np.isfinite(got).tolist() == [True, False, False]


@pytest.mark.parametrize("relation", CONCENTRATIONS)
@pytest.mark.filterwarnings("ignore:Some masses or redshifts are outside")
def test_relations_agree_within_their_spread(relation):
    ratio = to_m500c([5e14], [0.25], MassDefinition("200c"), relation)[0] / 5e14
    assert 0.62 < ratio < 0.76
    assert to_m500c([5e14], [0.25], MassDefinition("200m"), relation)[0] / 5e14 < ratio


def test_h_and_units():
    assert MassDefinition("500c", per_h=True, unit_msun=1e14).msun(0.7) == pytest.approx(1e14)
    assert MassDefinition("500c", log10=True).msun(14.0) == pytest.approx(1e14)
    assert MassDefinition("200m", per_h=True, log10=True).msun(14.0) == pytest.approx(1e14 / 0.7)
    assert str(MassDefinition("500c", unit_msun=1e14)) == "M500c in 1e14 Msun"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("log10_m500c", MassDefinition("500c", log10=True)),
        ("m200m_1e14", MassDefinition("200m", unit_msun=1e14)),
        ("M200C_MSUN_H", MassDefinition("200c", per_h=True)),
        ("log10_m200c_1e14_h", MassDefinition("200c", per_h=True, unit_msun=1e14, log10=True)),
    ],
)
def test_names_that_state_a_definition(name, expected):
    assert definition_of(name) == expected


@pytest.mark.parametrize("name", ["m500", "mass", "m", "mag_r", "log10_m500c_err", "m500c_kg"])
def test_names_that_do_not(name):
    assert definition_of(name) is None


def test_what_looks_like_a_mass():
    assert all(looks_like_mass(name) for name in ("M500", "mass", "logM200", "Mvir", "cluster_mass", "log10_m200"))
    assert not any(looks_like_mass(name) for name in ("mag_r", "stellar_mass", "z", "mu", "id", "m_star"))


def test_unknown_definitions_and_relations_are_refused():
    with pytest.raises(Pix2massError, match="got 'vir'"):
        MassDefinition("vir")
    with pytest.raises(Pix2massError, match="concentration: expected one of"):
        to_m500c([1e14], [0.2], MassDefinition("200c"), "nobody99")


def test_the_cosmology_of_other_users_of_colossus_stays(recwarn):
    from colossus.cosmology import cosmology as theirs

    theirs.setCosmology("planck18", persistence="")
    to_m500c([1e14], [0.2], MassDefinition("200c"))
    assert theirs.getCurrent().name == "planck18"


def test_the_radius_of_the_result_holds_500_times_the_critical_density():
    mass = to_m500c([5e14], [0.3], MassDefinition("200c"))[0]
    radius_kpc = r500c_kpc(np.log10(mass), 0.3)
    density = mass / (4 / 3 * np.pi * radius_kpc**3)
    assert density / cosmology().critical_density(0.3).to_value("Msun / kpc3") == pytest.approx(500)
