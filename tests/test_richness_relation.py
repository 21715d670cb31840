"""From richness to mass: fits recover what was put in, published relations in one definition, the baseline's error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from astropy.table import QTable

from pix2mass.catalog import write_catalog
from pix2mass.catalog.masses import MassDefinition, to_m500c
from pix2mass.catalog.table import check_catalog
from pix2mass.cli import app
from pix2mass.config import BaselineConfig
from pix2mass.pipeline import richness_baseline
from pix2mass.richness import PUBLISHED, cross_validate, richness_mass_fit, richness_mass_fit_with_scatter
from pix2mass.types import Pix2massError

TRUE = (14.25, 0.9, -0.3)


def clusters(n: int, seed: int, scatter: float = 0.08, noise: float = 0.12, mass_noise: float = 0.05) -> QTable:
    """True relation with scatter in mass, then errors of ``noise`` in log10 richness and ``mass_noise`` in mass."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.1, 0.4, n)
    x = 0.1 + 0.5 * np.log10((1 + z) / 1.3) + 0.2 * rng.normal(size=n)
    mass = TRUE[0] + TRUE[1] * x + TRUE[2] * np.log10((1 + z) / 1.3) + scatter * rng.normal(size=n)
    richness = 40 * 10 ** (x + noise * rng.normal(size=n))
    return check_catalog(
        QTable(
            {
                "id": np.arange(n).astype(str),
                "ra_deg": rng.uniform(0, 360, n),
                "dec_deg": rng.uniform(0, 60, n),
                "z": z,
                "log10_m500c": mass + mass_noise * rng.normal(size=n),
                "log10_m500c_err": np.full(n, mass_noise),
                "richness": richness,
                "richness_err": richness * np.log(10) * noise,
            }
        ),
        "clusters",
    )


def columns(table: QTable, *names: str) -> list[np.ndarray]:
    return [np.asarray(table[name], float) for name in names]


def test_scatter_fit_recovers_slope_and_scatter_where_least_squares_does_not():
    pulls, slopes = [], []
    for seed in range(12):
        table = clusters(400, seed)
        data = columns(table, "richness", "z", "log10_m500c", "richness_err", "log10_m500c_err")
        fit = richness_mass_fit_with_scatter(*data)
        found = np.array([fit.relation.a, fit.relation.b, fit.relation.c, fit.scatter_dex])
        pulls.append((found - [*TRUE, 0.08]) / fit.errors)
        slopes.append((fit.relation.b, richness_mass_fit(*data[:3]).b))
    pulls, slopes = np.array(pulls), np.array(slopes)
    print("mean pull", pulls.mean(axis=0).round(2), "rms", pulls.std(axis=0).round(2), "slopes", slopes.mean(axis=0))
    assert np.all(np.abs(pulls.mean(axis=0)) < 3.5 / np.sqrt(12))
    assert np.all((pulls.std(axis=0) > 0.5) & (pulls.std(axis=0) < 1.7))
    # Noise in richness flattens least squares by t^2 / (t^2 + e^2) = 0.74.
    assert slopes[:, 1].mean() == pytest.approx(0.9 * 0.2**2 / (0.2**2 + 0.12**2), abs=0.05)


def test_scatter_fit_predicts_noisy_clusters_as_well_as_least_squares():
    train, test = clusters(600, 1), clusters(600, 2)
    names = ("richness", "z", "log10_m500c", "richness_err", "log10_m500c_err")
    fit = richness_mass_fit_with_scatter(*columns(train, *names))
    richness, z, mass, error, _ = columns(test, *names)
    least = richness_mass_fit(*columns(train, *names[:3]))
    shrunk = np.abs(fit.predict(richness, z, error) - mass).mean()
    assert shrunk == pytest.approx(np.abs(least.predict(richness, z) - mass).mean(), abs=0.003)
    assert shrunk < np.abs(fit.predict(richness, z) - mass).mean() - 0.003


def test_without_noise_the_two_fits_agree():
    table = clusters(200, 3, noise=1e-9, mass_noise=0.0)
    data = columns(table, "richness", "z", "log10_m500c")
    fit = richness_mass_fit_with_scatter(*data, np.zeros(200), np.zeros(200))
    least = richness_mass_fit(*data)
    assert (fit.relation.a, fit.relation.b, fit.relation.c) == pytest.approx((least.a, least.b, least.c), abs=2e-3)


def test_scatter_fit_refuses_missing_errors():
    table = clusters(30, 4)
    data = columns(table, "richness", "z", "log10_m500c")
    with pytest.raises(Pix2massError, match="missing or negative"):
        richness_mass_fit_with_scatter(*data, np.full(30, np.nan), np.zeros(30))


@pytest.mark.parametrize(
    ("name", "richness", "z", "expected"),
    [
        ("simet2017", 40.0, 0.2, 10**14.344),
        ("simet2017", 80.0, 0.3, 10**14.344 * 2**1.33),
        ("mcclintock2019", 40.0, 0.35, 3.081e14),
        ("mcclintock2019", 80.0, 0.35 * 2 + 0.35**2, 3.081e14 * 2**1.356 * 1.35**-0.3),
        ("rykoff2012", 60.0, 0.2, 1e14 * np.exp(1.48)),
    ],
)
def test_published_relations_in_their_own_definition(name, richness, z, expected):
    assert PUBLISHED[name].mass(richness, z) == pytest.approx(expected, rel=1e-6)


def test_published_relations_agree_at_the_pivot_once_converted():
    """Two lensing calibrations of two surveys at lambda 40, z 0.3: M500c of about 10^14.3, within their errors and the
    few per cent between SDSS and DES richness."""
    m500c = {}
    for name in ("simet2017", "mcclintock2019"):
        relation = PUBLISHED[name]
        definition = MassDefinition(relation.overdensity, per_h=relation.per_h)
        mass = definition.msun(relation.mass(np.array([40.0]), np.array([0.3])))
        m500c[name] = float(np.log10(to_m500c(mass, np.array([0.3]), definition)[0]))
        # 200m to 500c at z 0.3 takes away a factor of about 0.53-0.6; the h of Msun/h puts 0.155 dex on.
        assert np.log10(mass[0]) - m500c[name] == pytest.approx(0.25, abs=0.04)
    assert m500c["simet2017"] == pytest.approx(m500c["mcclintock2019"], abs=0.05)
    assert m500c["simet2017"] == pytest.approx(14.25, abs=0.06)


def test_cross_validation_never_sees_the_fold_it_predicts():
    table = clusters(60, 5)
    richness, z, mass = columns(table, "richness", "z", "log10_m500c")
    fold = np.arange(60) % 5
    before = cross_validate(richness, z, mass, fold)
    changed = np.where(fold == 2, mass + 1.0, mass)
    after = cross_validate(richness, z, changed, fold)
    assert np.array_equal(before.predicted[fold == 2], after.predicted[fold == 2])
    assert not np.array_equal(before.predicted[fold != 2], after.predicted[fold != 2])


def test_cross_validation_by_hand():
    """Two folds; the relation is exact, so richness errs by nothing, the constant by the folds' means."""
    richness = np.array([20.0, 40.0, 80.0, 30.0, 20.0, 40.0, 80.0, 50.0])
    z = np.array([0.1, 0.2, 0.3, 0.4, 0.15, 0.25, 0.35, 0.12])
    mass = 14.2 + 0.5 * np.log10(richness / 40)
    fold = np.repeat([0, 1], 4)
    found = cross_validate(richness, z, mass, fold)
    assert found.mae_dex == pytest.approx(0.0, abs=1e-12)
    by_hand = [np.abs(mass[fold == k] - mass[fold != k].mean()).mean() for k in (0, 1)]
    assert found.mae_constant_dex == pytest.approx(np.mean(by_hand))


def test_baseline_beats_constant_and_says_so(tmp_path, capsys):
    table = clusters(150, 6)
    table["richness"][3] = np.nan
    write_catalog(table, tmp_path / "clusters.ecsv")
    app(
        ["baseline", str(tmp_path / "clusters.ecsv"), "--repeats", "3", "--out", str(tmp_path / "b.json")],
        result_action="return_value",
    )
    result = json.loads((tmp_path / "b.json").read_text())
    printed = capsys.readouterr().out
    assert result["n"] == 149 and result["dropped"] == 1
    assert result["mae_dex"] < 0.8 * result["mae_constant_dex"]
    assert f"{result['mae_dex']:.3f}" in printed and "constant" in printed


@pytest.mark.parametrize("relation", ["scatter", "simet2017", "mcclintock2019", "rykoff2012"])
def test_baseline_of_every_kind(relation):
    table = clusters(80, 7)
    result = richness_baseline(
        table, BaselineConfig(repeats=2, folds=4, relation=relation), 1, lambda done, total: None
    )
    assert 0.05 < result["mae_dex"] < 0.4
    assert ("scatter_dex" in result) == (relation == "scatter")
    assert ("reference" in result) == (relation != "scatter")


def test_baseline_needs_clusters_with_both():
    table = clusters(30, 8)
    table["log10_m500c"][:25] = np.nan
    with pytest.raises(Pix2massError, match="5 of 30 clusters .*30 have richness, 5 have log10_m500c"):
        richness_baseline(table, BaselineConfig(), 1, lambda done, total: None)
