"""Published tables: each told by its columns, units read from the file, every mismatch a clear error."""

from __future__ import annotations

import numpy as np
import pytest
from _vizier import serve
from astropy import units as u
from astropy.io import fits
from astropy.table import Table

from pix2mass.catalog import read_published
from pix2mass.catalog.registry import CATALOGUES, catalogue
from pix2mass.cosmology import r500c_kpc
from pix2mass.types import Pix2massError

Z = np.array([0.2, 0.3])
M = np.array([3.0, 5.0])
"""Masses of the small tables, 1e14 Msun."""


def redmapper(version: str) -> Table:
    """Columns of the catalogue files of SDSS DR8; v6.3 came with names in capitals, some copies of it without."""
    names = ("NAME", "RA", "DEC", "Z_LAMBDA", "Z_LAMBDA_ERR", "LAMBDA", "LAMBDA_ERR", "S", "Z_SPEC", "ID", "OBJID")
    columns = [["RMJ1", "RMJ2"], [10.0, 20.0], [1.0, 2.0], Z, [0.006, 0.01], [30.0, 60.0], [3.0, 4.0], [1.0, 1.1]]
    columns += [[0.201, -1.0], [1, 2], [11, 12]]
    table = Table(columns, names=names)
    if version == "lower":
        table.rename_columns(table.colnames, [name.lower() for name in table.colnames])
    return table


def mcxc(mass_unit: str = "10+14Msun") -> fits.HDUList:
    """The layout of mcxc.fits, an ASCII table with units that astropy does not read."""
    radius_mpc = r500c_kpc(np.log10(M * 1e14), Z) / 1000
    columns = [
        fits.Column("MCXC", "A12", array=np.array(["J0000.1+0816", "J0001.6-1540"]), ascii=True),
        fits.Column("OName", "A18", array=np.array(["RXC A", "RXC B"]), ascii=True),
        fits.Column("RAdeg", "F7.3", unit="deg", array=np.array([10.0, 20.0]), ascii=True),
        fits.Column("DEdeg", "F7.3", unit="deg", array=np.array([1.0, 2.0]), ascii=True),
        fits.Column("z", "F6.4", array=Z, ascii=True),
        fits.Column("L500", "F9.6", unit="10+37W", array=np.array([1.0, 2.0]), ascii=True),
        fits.Column("M500", "F7.4", unit=mass_unit, array=M, ascii=True),
        fits.Column("R500", "F7.4", unit="Mpc", array=radius_mpc, ascii=True),
    ]
    return fits.HDUList([fits.PrimaryHDU(), fits.TableHDU.from_columns(columns)])


def mcxc2() -> Table:
    return Table(
        {
            "MCXC": ["MCXC J0000.1+0816", "MCXC J0001.6-1540"],
            "OName": ["a", "b"],
            "RAJ2000": [10.0, 20.0] * u.deg,
            "DEJ2000": [1.0, 2.0] * u.deg,
            "z": Z,
            "zType": ["S", "S"],
            "R500": r500c_kpc(np.log10(M * 1e14), Z) / 1000 * u.Mpc,
            "M500": M * u.Unit("1e14 solMass"),
            "e_M500": [0.3, 0.5] * u.Unit("1e14 solMass"),
            "E_M500": [0.4, 0.6] * u.Unit("1e14 solMass"),
        }
    )


def psz2() -> fits.HDUList:
    """The layout and the units of HFI_PCCS_SZ-union_R2.08.fits: a third cluster has neither redshift nor mass."""
    columns = [
        fits.Column("NAME", "18A", unit="None", array=np.array(["PSZ2 G1", "PSZ2 G2", "PSZ2 G3"])),
        fits.Column("RA", "D", unit="degrees", array=np.array([10.0, 20.0, 30.0])),
        fits.Column("DEC", "D", unit="degrees", array=np.array([1.0, 2.0, 3.0])),
        fits.Column("POS_ERR", "E", unit="arcmin", array=np.array([2.0, 3.0, 4.0])),
        fits.Column("SNR", "E", unit="None", array=np.array([5.0, 6.0, 7.0])),
        fits.Column("REDSHIFT", "E", unit="None", array=np.array([0.2, 0.3, -1.0])),
        fits.Column("MSZ", "E", unit="10^14 Msol", array=np.array([3.0, 5.0, 0.0])),
        fits.Column("MSZ_ERR_UP", "E", unit="10^14 Msol", array=np.array([0.4, 0.6, 0.0])),
        fits.Column("MSZ_ERR_LOW", "E", unit="10^14 Msol", array=np.array([0.3, 0.5, 0.0])),
        fits.Column("MCXC", "25A", unit="None", array=np.array(["J0000.1+0816", "", ""])),
        fits.Column("REDMAPPER", "25A", unit="None", array=np.array(["RMJ1", "", ""])),
        fits.Column("ACT", "25A", unit="None", array=np.array(["", "", ""])),
    ]
    return fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns)])


def act() -> Table:
    """Columns of DR5_cluster-catalog_v1.1.fits, which states no units."""
    return Table(
        {
            "name": ["ACT-CL J1", "ACT-CL J2"],
            "RADeg": [10.0, 20.0],
            "decDeg": [1.0, 2.0],
            "SNR": [5.0, 9.0],
            "redshift": Z,
            "redshiftErr": [0.0, 0.01],
            "M500c": M,
            "M500c_errPlus": [0.4, 0.6],
            "M500c_errMinus": [0.3, 0.5],
            "M500cCal": M / 0.69,
            "M200m": 1.9 * M,
        }
    )


def spiders() -> Table:
    return Table(
        {
            "CLUS_ID": ["1_1", "1_2"],
            "RA": [10.0, 20.0] * u.deg,
            "RA_OPT": [10.0, 20.0] * u.deg,
            "DEC_OPT": [1.0, 2.0] * u.deg,
            "LAMBDA_CHISQ_OPT": [30.0, 60.0],
            "SCREEN_CLUZSPEC": Z,
            "SCREEN_CLUZSPEC_ERR": [0.001, 0.001],
            "R200C_DEG": [0.1, 0.1] * u.deg,
        }
    )


SMALL = {
    "redmapper": (redmapper("v5.10"), "fits"),
    "mcxc": (mcxc(), "fits"),
    "mcxc-ii": (mcxc2(), "vot"),
    "psz2": (psz2(), "fits"),
    "act-dr5": (act(), "fits"),
    "spiders": (spiders(), "fits"),
}


def written(table: Table | fits.HDUList, path):
    if isinstance(table, fits.HDUList):
        table.writeto(path)
    else:
        table.write(path, format={".vot": "votable", ".fits": "fits", ".csv": "ascii.csv"}[path.suffix])
    return path


@pytest.mark.parametrize("key", SMALL)
def test_each_published_form_is_told_and_read(tmp_path, key):
    table, ending = SMALL[key]
    read = read_published(written(table, tmp_path / f"some-file.{ending}"))
    assert read.meta["catalogue"] == key and not read.meta["derived"]
    assert read.meta["reference"] == catalogue(key).reference
    np.testing.assert_allclose(read["ra_deg"][:2], [10, 20])
    np.testing.assert_allclose(read["z"][:2], Z, rtol=1e-6)
    if catalogue(key).definition is None:
        assert np.isnan(read["log10_m500c"]).all() and set(read["label_source"]) == {""}
    else:
        np.testing.assert_allclose(read["log10_m500c"][:2], np.log10(M * 1e14), atol=1e-6)
        np.testing.assert_allclose(read["original_value"][:2], M, rtol=1e-6)
        assert read["original_definition"][0] == "M500c in 1e14 Msun"
        assert read["label_source"][0] == catalogue(key).source


@pytest.mark.parametrize("version", ["v5.10", "lower"])
def test_both_spellings_of_redmapper(tmp_path, version):
    read = read_published(written(redmapper(version), tmp_path / "a.fits"))
    np.testing.assert_allclose(read["richness_err"], [3, 4])
    np.testing.assert_allclose(read["z_err"], [0.006, 0.01])
    assert read["z_spec"][0] == 0.201 and np.isnan(read["z_spec"][1])


def test_errors_are_half_the_difference_of_the_limits_in_log(tmp_path):
    read = read_published(written(psz2(), tmp_path / "a.fits"))
    expected = (np.log10(3.4) - np.log10(2.7)) / 2
    assert read["log10_m500c_err"][0] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(read["log10_m500c"][2]) and np.isnan(read["z"][2]) and read["label_source"][2] == ""
    assert read["name_redmapper"].tolist() == ["RMJ1", "", ""] and read["position_err_arcmin"][1] == 3


def test_derived_files_are_told_and_r500_is_never_a_label(tmp_path):
    own = Table({"ID": [1], "name": ["RMJ1"], "RA": [10.0], "dec": [1.0], "redshift": [0.2], "lambda": [30.0]})
    own["r500"] = [0.1]
    read = read_published(written(own, tmp_path / "a.csv"))
    assert read.meta["derived"] and "function of lambda" in " ".join(read.meta["notes"])
    assert np.isnan(read["log10_m500c"]).all() and "r500" not in read.colnames
    own = Table({"name": ["ACT-CL J1"], "ra_deg": [1.0], "dec_deg": [2.0], "z": [0.2], "M500c_1e14": [3.0]})
    read = read_published(written(own, tmp_path / "b.csv"))
    assert read.meta["derived"] and read.meta["catalogue"] == "act-dr5" and np.isnan(read["log10_m500c_err"][0])
    assert "states no units" in " ".join(read.meta["notes"])


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("10+14furlong", r"'M500' has the unit '10\+14furlong', expected '1e14 Msun'"),
        ("10+14g", "R500 is .* times the radius that M500 implies|'M500' has the unit"),
        ("10+14Msun/h", "'M500' has the unit"),
        ("", "'M500' states no unit"),
        ("10+13Msun", "R500 is .* times the radius that M500 implies|'M500' has the unit"),
        ("kpc", "'M500' has the unit 'kpc'"),
    ],
)
def test_a_wrong_unit_is_refused(tmp_path, unit, message):
    with pytest.raises(Pix2massError, match=message):
        read_published(written(mcxc(unit), tmp_path / "mcxc.fits"))


def test_units_that_convert_are_converted(tmp_path):
    table = mcxc2()
    for name in ("M500", "e_M500", "E_M500"):
        table[name] = table[name].to("solMass")
    table["RAJ2000"] = table["RAJ2000"].to("rad")
    table["R500"] = table["R500"].to("kpc")
    read = read_published(written(table, tmp_path / "a.vot"))
    np.testing.assert_allclose(read["log10_m500c"], np.log10(M * 1e14))
    np.testing.assert_allclose(read["ra_deg"], [10, 20])


def test_masses_that_do_not_fit_their_radii_are_refused(tmp_path):
    table = mcxc2()
    table["M500"] = table["M500"] * 0.7  # as if they were in Msun / h
    with pytest.raises(Pix2massError, match="another unit, definition or cosmology"):
        read_published(written(table, tmp_path / "a.vot"))


def test_a_missing_column_is_named(tmp_path):
    table = act()
    table.remove_column("M500c_errMinus")
    with pytest.raises(Pix2massError, match="columns missing: M500c_errMinus"):
        read_published(written(table, tmp_path / "a.fits"))


@pytest.mark.parametrize(("name", "text"), [("a.txt", "x"), ("a.fits", "x"), ("a.csv", "MCXC,M500\n")])
def test_files_that_cannot_be_used(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(Pix2massError, match=name):
        read_published(tmp_path / name)
    with pytest.raises(Pix2massError, match="no such file"):
        read_published(tmp_path / "none.csv")
    with pytest.raises(Pix2massError, match="no known catalogue"):
        read_published("mxcx")


# ---- a user's own table ----------------------------------------------------------------------------------------------


def own_table(**more) -> Table:
    return Table({"id": ["a", "b"], "ra_deg": [10.0, 20.0], "dec_deg": [1.0, 2.0], "z": Z, **more})


def test_a_users_table_goes_through_the_same_door(tmp_path):
    read = read_published(written(own_table(m500c_1e14=M, m500c_1e14_err=0.1 * M), tmp_path / "mine.csv"))
    np.testing.assert_allclose(read["log10_m500c"], np.log10(M * 1e14))
    assert read["label_source"][0] == "mine" and read["original_definition"][0] == "M500c in 1e14 Msun"
    np.testing.assert_allclose(read["log10_m500c_err"], (np.log10(1.1) - np.log10(0.9)) / 2)
    read = read_published(written(own_table(log10_m200m_msun_h=[14.5, 14.7]), tmp_path / "b.csv"))
    assert read["original_definition"][0] == "log10(M200m / Msun/h)"
    assert 14.2 < read["log10_m500c"][0] < 14.5 and "diemer19" in " ".join(read.meta["notes"])
    read = read_published(written(own_table(log10_m500c=[14.5, 14.7], log10_m500c_err=[0.1, 0.2]), tmp_path / "c.csv"))
    np.testing.assert_allclose(read["log10_m500c_err"], [0.1, 0.2])


@pytest.mark.parametrize("name", ["M500", "mass", "logM200", "mvir", "M_SZ", "cluster_mass"])
def test_a_mass_without_a_definition_is_refused(tmp_path, name):
    with pytest.raises(Pix2massError, match=f"'{name}' looks like a mass but states no definition"):
        read_published(written(own_table(**{name: M}), tmp_path / "mine.csv"))


def test_a_definition_that_cannot_be_converted_is_refused(tmp_path):
    with pytest.raises(Pix2massError, match="expected one of 200c, 200m, 500c, got '2500c'"):
        read_published(written(own_table(m2500c_msun=M), tmp_path / "mine.csv"))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"mass_definition": "200c"}, "mass_definition = '200c', the column is named log10_m500c"),
        ({"cosmology": {"H0_km_s_Mpc": 67.4, "Om0": 0.3}}, "H0_km_s_Mpc = 67.4, expected 70"),
    ],
)
def test_metadata_that_contradict_are_refused(tmp_path, meta, message):
    table = own_table(log10_m500c=[14.5, 14.7])
    table.meta.update(meta)
    table.write(tmp_path / "mine.ecsv", format="ascii.ecsv")
    with pytest.raises(Pix2massError, match=message):
        read_published(tmp_path / "mine.ecsv")


def test_a_table_that_is_nobodys_says_what_would_tell_it(tmp_path):
    with pytest.raises(Pix2massError, match="not a known catalogue .*columns id of a table of your own are missing"):
        read_published(written(Table({"ra_deg": [1.0], "dec_deg": [2.0]}), tmp_path / "x.csv"))


# ---- VizieR ----------------------------------------------------------------------------------------------------------


def test_tables_come_from_vizier_once_and_then_from_the_cache(tmp_path):
    identifier = catalogue("mcxc-ii").vizier
    with serve({identifier: mcxc2()}) as service:
        read = read_published("mcxc-ii", vizier=service.url, cache=tmp_path)
        again = read_published("MCXC-II", vizier=service.url, cache=tmp_path)
    assert service.asked == [identifier]
    assert read.meta["form"] == "vizier"
    np.testing.assert_allclose(read["log10_m500c"], np.log10(M * 1e14))
    np.testing.assert_allclose(read["original_err_up"], [0.4, 0.6])
    np.testing.assert_allclose(again["log10_m500c"], read["log10_m500c"])


def test_sexagesimal_positions_as_vizier_sends_them(tmp_path):
    table = mcxc2()
    table["RAJ2000"] = ["00 40 00.0", "01 20 00.0"]
    table["DEJ2000"] = ["+01 00 00", "+02 00 00"]
    table["RAJ2000"].unit, table["DEJ2000"].unit = '"h:m:s"', '"d:m:s"'
    with serve({catalogue("mcxc-ii").vizier: table}) as service:
        read = read_published("mcxc-ii", vizier=service.url, cache=tmp_path)
    np.testing.assert_allclose(read["ra_deg"], [10, 20])
    np.testing.assert_allclose(read["dec_deg"], [1, 2])


def test_a_service_without_the_table_or_without_an_answer_is_named(tmp_path):
    with serve({}) as service:
        with pytest.raises(Pix2massError, match="J/A\\+A/534/A109/mcxc"):
            read_published("mcxc", vizier=service.url, cache=tmp_path)
        closed = service.url
    with pytest.raises(Pix2massError, match="could not be fetched"):
        read_published("mcxc", vizier=closed, cache=tmp_path)
    with pytest.raises(Pix2massError, match="give --cache"):
        read_published("mcxc")
    assert list(tmp_path.iterdir()) == []


def test_a_service_with_another_table_under_that_name_is_refused(tmp_path):
    wrong = pytest.raises(Pix2massError, match="does not have the columns of MCXC")
    with serve({catalogue("mcxc").vizier: Table({"x": [1.0]})}) as service, wrong:
        read_published("mcxc", vizier=service.url, cache=tmp_path)


def test_every_catalogue_has_a_paper_an_identifier_and_distinct_forms():
    told = [form.tells for known in CATALOGUES for form in known.forms]
    assert len(set(told)) == len(told)
    assert all(known.reference and known.vizier.startswith("J/") for known in CATALOGUES)
