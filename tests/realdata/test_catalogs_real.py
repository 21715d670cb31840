"""The published catalogues: counts, offsets and matches that were measured before this code was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.table import QTable, Table

from pix2mass.catalog import match_one_to_one, read_published, sky_folds
from pix2mass.catalog.labels import Labels, build
from pix2mass.catalog.match import chance_matches
from pix2mass.catalog.registry import catalogue
from pix2mass.catalog.scale import pair_offsets
from pix2mass.config import CatalogConfig
from pix2mass.types import Pix2massError

FILES = {
    "redmapper": ("sdss_redmapper.csv.gz", 26_350, 0),
    "mcxc": ("mcxc.fits", 1_743, 1_742),  # one mass lies below 1e12 Msun
    "mcxc-ii": ("mcxc2.csv", 2_221, 2_221),
    "psz2": ("HFI_PCCS_SZ-union_R2.08.fits", 1_653, 1_093),
    "act-dr5": ("act_dr5.csv", 4_195, 4_195),
    "spiders": ("catCluster-SPIDERS_RASS_CLUS-v3.0.fits", 2_740, 0),
}


@pytest.fixture(scope="module")
def folder(real_data: Path) -> Path:
    path = real_data / "catalogs"
    if not path.is_dir():
        pytest.skip(f"{real_data}: no folder catalogs/ there")
    return path


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, QTable]:
    return {key: read_published(folder / name) for key, (name, _, _) in FILES.items()}


@pytest.mark.parametrize("key", FILES)
def test_each_file_is_told(tables, key):
    table = tables[key]
    _, rows, with_mass = FILES[key]
    assert table.meta["catalogue"] == key
    assert len(table) == rows and np.isfinite(table["log10_m500c"]).sum() == with_mass
    assert table.meta["derived"] == (key in ("redmapper", "act-dr5"))


def one_arcmin(tables: dict[str, QTable]) -> dict[str, np.ndarray]:
    """log10 M500c per redMaPPer cluster, matched within 1 arcmin and 0.05 in redshift."""
    parent, out = tables["redmapper"], {}
    for key in ("act-dr5", "psz2", "mcxc-ii", "mcxc"):
        table = tables[key][np.isfinite(tables[key]["log10_m500c"])]
        found = match_one_to_one(table, parent, 1.0, 0.05)
        out[key] = np.full(len(parent), np.nan)
        out[key][found.second] = np.asarray(table["log10_m500c"])[found.first]
        assert chance_matches(table, parent, 1.0, 0.05) < 3
    return out


def test_matches_within_one_arcmin_are_those_measured(tables):
    labels = one_arcmin(tables)
    counts = {key: int(np.isfinite(values).sum()) for key, values in labels.items()}
    assert counts == {"mcxc": 254, "psz2": 111, "act-dr5": 753, "mcxc-ii": 284}
    union = np.isfinite([labels[key] for key in ("mcxc", "psz2", "act-dr5")]).any(axis=0)
    assert union.sum() == 1013


def test_offsets_between_sources_are_those_measured(tables):
    labels = one_arcmin(tables)
    labels.pop("mcxc-ii")
    found = {(pair.first, pair.second): pair for pair in pair_offsets(labels, 1000, 1)}
    measured = {
        ("psz2", "mcxc"): (0.098, 44, 0.078, 0.016),
        ("act-dr5", "mcxc"): (-0.034, 41, 0.100, 0.031),
        ("act-dr5", "psz2"): (-0.099, 31, 0.094, 0.028),
    }
    for pair, (offset, n, mae, error) in measured.items():
        assert found[pair].n == n
        assert found[pair].offset_dex == pytest.approx(offset, abs=0.0006)
        assert found[pair].mae_dex == pytest.approx(mae, abs=0.0006)
        assert found[pair].error_dex == pytest.approx(error, abs=0.004)


@pytest.fixture(scope="module")
def made(folder: Path) -> Labels:
    return build(CatalogConfig(catalogs=folder), seed=1)


def test_names_of_psz2(folder):
    wanted = CatalogConfig(catalogs=folder, prefer="act-dr5,psz2,mcxc", radius_arcmin=1.0, bootstrap=100)
    account = {one.source: one for one in build(wanted).matches}
    assert account["PSZ2"].by_name == 310
    assert account["PSZ2"].dropped["named counterpart differs in redshift by 0.05 or more"] == 8
    without = build(wanted.model_copy(update={"counterpart_names": False}))
    assert len(without.labelled) == 1013


def test_the_default_build_accounts_for_every_row(made):
    assert len(made.labelled) + len(made.unlabelled) == 26_350
    assert len(set(made.labelled["id"])) == len(made.labelled) > 1_200
    for one in made.matches:
        assert one.rows == one.matched + sum(one.dropped.values())
        assert one.by_chance < 0.01 * one.matched
    assert set(made.labelled["ebv_source"]) <= {"none", "sfdmap2", "dustmaps", "catalogue"}
    assert "r500" not in made.labelled.colnames
    for pair, after in zip(made.scale.before, made.scale.after, strict=True):
        assert abs(after.offset_dex) < max(3 * pair.error_dex, 0.01)
    assert made.scale.offset_dex["PSZ2"] == pytest.approx(0.098, abs=0.03)


def test_folds_of_the_real_labels_are_level(made):
    table = made.labelled
    source = np.asarray(table["label_source"], str)
    mass = np.asarray(table["log10_m500c"], float)
    ra, dec = np.asarray(table["ra_deg"], float), np.asarray(table["dec_deg"], float)
    fold = sky_folds(ra, dec, mass, 10, 0.5, 1, source)
    assert np.ptp(np.bincount(fold, minlength=10)) <= 2
    for name in set(source):
        own = source == name
        assert np.ptp(np.bincount(fold[own], minlength=10)) <= 3
        assert np.std([mass[own & (fold == k)].mean() for k in range(10)]) < 0.01


def test_a_service_that_serves_slices_of_the_real_tables(folder, tmp_path):
    """The columns and units of the real MCXC-II and MCXC through VOTables, as VizieR sends them."""
    from _vizier import serve

    newer = Table.read(folder / "mcxc2.csv", format="ascii.csv")[:200]
    for name in ("RAJ2000", "DEJ2000"):
        newer[name].unit = "deg"
    for name in ("M500", "e_M500", "E_M500"):
        newer[name].unit = "10+14Msun"
    newer["R500"].unit = "Mpc"
    older = Table.read(folder / "mcxc.fits", hdu=1)[:200]
    older.remove_columns([name for name in older.colnames if "-" in name])
    with serve({catalogue("mcxc-ii").vizier: newer, catalogue("mcxc").vizier: older}) as service:
        fetched = read_published("mcxc-ii", vizier=service.url, cache=tmp_path)
        first = read_published("mcxc", vizier=service.url, cache=tmp_path)
    local = read_published(folder / "mcxc2.csv")[:200]
    np.testing.assert_allclose(fetched["log10_m500c"], local["log10_m500c"])
    np.testing.assert_allclose(fetched["log10_m500c_err"], local["log10_m500c_err"])
    assert not any("states no units" in note for note in fetched.meta["notes"])
    np.testing.assert_allclose(first["log10_m500c"], read_published(folder / "mcxc.fits")["log10_m500c"][:200])
    older["M500"].unit = "10+14g"
    with serve({catalogue("mcxc").vizier: older}) as service, pytest.raises(Pix2massError, match="M500"):
        read_published("mcxc", vizier=service.url, cache=tmp_path / "other")
