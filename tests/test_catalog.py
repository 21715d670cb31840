"""Catalogues: one table whatever the file, all mistakes at once; folds that never part neighbours on the sky."""

from __future__ import annotations

import gzip
import warnings

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.table import MaskedColumn, QTable, Table
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2mass.catalog import check_catalog, read_catalog, sky_folds, write_catalog
from pix2mass.catalog.table import redshift_errors
from pix2mass.types import Pix2massError

COLUMNS = ["z", "log10_m500c", "log10_m500c_err", "richness", "richness_err"]


def small() -> Table:
    return Table({"id": ["a", "b"], "ra_deg": [10.0, 359.9], "dec_deg": [-5.0, 60.0], "z": [0.2, 0.3]})


@pytest.mark.parametrize("ending", ["csv", "ecsv", "fits"])
def test_each_kind_of_file_gives_the_same_table(tmp_path, ending):
    path = tmp_path / f"clusters.{ending}"
    table = small()
    table["note"] = ["x", "y"]
    table.write(path)
    read = read_catalog(path)
    assert read["id"].tolist() == ["a", "b"]
    np.testing.assert_allclose(read["z"], [0.2, 0.3])
    assert np.isnan(read["log10_m500c"]).all() and np.isnan(read["richness"]).all()
    assert [str(value) for value in read["label_source"]] == ["", ""]
    assert [str(value) for value in read["note"]] == ["x", "y"]
    assert read.meta["mass_definition"] == "500c" and read.meta["cosmology"]["H0_km_s_Mpc"] == 70


def test_what_is_written_comes_back(tmp_path):
    table = check_catalog(small(), "here")
    write_catalog(table, tmp_path / "deep" / "a.ecsv")
    again = read_catalog(tmp_path / "deep" / "a.ecsv")
    assert again.colnames == table.colnames and again.meta == table.meta
    for name in COLUMNS:
        np.testing.assert_array_equal(np.asarray(again[name], float), np.asarray(table[name], float))
    with pytest.raises(Pix2massError, match="unknown kind of table"):
        write_catalog(table, tmp_path / "a.pickle")


def test_fits_keeps_the_cosmology(tmp_path):
    table = check_catalog(small(), "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_catalog(table, tmp_path / "a.fits")
    found = Table.read(tmp_path / "a.fits").meta
    assert found["cosmology_H0_km_s_Mpc"] == 70 and found["cosmology_Om0"] == 0.3 and found["cosmology_flat"] is True
    assert found["mass_definition"] == "500c" and table.meta["cosmology"]["Om0"] == 0.3


def test_arrays_are_written_but_not_as_csv(tmp_path):
    table = check_catalog(small(), "here")
    table["quantiles"] = [[1.0, 2.0], [3.0, 4.0]]
    for ending in ("ecsv", "fits"):
        write_catalog(table, tmp_path / f"a.{ending}")
        np.testing.assert_array_equal(read_catalog(tmp_path / f"a.{ending}")["quantiles"], table["quantiles"])
    with pytest.raises(Pix2massError, match=r"a\.csv: CSV holds .*arrays of quantiles; .*\.ecsv or \.fits"):
        write_catalog(table, tmp_path / "a.csv")
    assert not list(tmp_path.glob("*csv*part")) and not (tmp_path / "a.csv").exists()


def test_columns_are_mapped_and_a_wrong_name_is_hinted(tmp_path):
    path = tmp_path / "a.csv"
    Table({"NAME": ["a"], "RAJ2000": [10.0], "DEJ2000": [1.0], "z_lambda": [0.2], "z": [9.0]}).write(path)
    mapping = {"id": "NAME", "ra_deg": "RAJ2000", "dec_deg": "DEJ2000", "z": "z_lambda"}
    assert read_catalog(path, mapping)["z"][0] == 0.2
    with pytest.raises(Pix2massError, match="ra_deg=RAJ200: .*perhaps 'RAJ2000' is meant"):
        read_catalog(path, {**mapping, "ra_deg": "RAJ200"})
    with pytest.raises(Pix2massError) as caught:
        read_catalog(path)
    for name in ("id", "ra_deg", "dec_deg"):
        assert f"column '{name}' is missing" in str(caught.value)


def test_columns_are_all_taken_from_the_file_before_any_is_named_anew(tmp_path):
    table = small()
    table["zspec"] = [0.21, 0.31]
    write_catalog(QTable(table), tmp_path / "a.ecsv")
    read = read_catalog(tmp_path / "a.ecsv", {"z": "zspec", "z_phot": "z"})
    np.testing.assert_array_equal(read["z"], [0.21, 0.31])
    np.testing.assert_array_equal(read["z_phot"], [0.2, 0.3])
    with pytest.raises(Pix2massError, match="column 'id' is missing"):
        read_catalog(tmp_path / "a.ecsv", {"name": "id"})
    both = read_catalog(tmp_path / "a.ecsv", {"id": "id", "group": "id"})
    assert both["group"].tolist() == both["id"].tolist() == ["a", "b"]


def test_letters_that_fits_cannot_hold_are_named(tmp_path):
    table = check_catalog(small(), "here")
    table.meta["run"] = "Müller"
    write_catalog(table, tmp_path / "a.fits")
    assert Table.read(tmp_path / "a.fits").meta["RUN"] == "M\\xfcller"
    table["note"] = ["plain", "Abéll"]
    with pytest.raises(Pix2massError, match="row 2: note = 'Abéll' has letters that FITS cannot hold"):
        write_catalog(table, tmp_path / "b.fits")
    assert [path.name for path in tmp_path.iterdir()] == ["a.fits"]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"mass_definition": "200m"}, "mass_definition = '200m', column log10_m500c is for 500c"),
        ({"cosmology": {"H0_km_s_Mpc": 100.0, "Om0": 0.3}}, r"H0_km_s_Mpc = 100\.0, expected 70"),
    ],
)
def test_masses_of_another_definition_or_cosmology_are_refused(meta, message):
    table = small()
    table.meta.update(meta)
    check_catalog(table, "here")
    table["log10_m500c"] = [14.5, np.nan]
    with pytest.raises(Pix2massError, match=message):
        check_catalog(table, "here")


@pytest.mark.parametrize("name", ["z", "ra_deg", "id"])
def test_columns_of_arrays_are_refused(name):
    table = small()
    table[name] = np.stack([np.asarray(table[name])] * 3, axis=1)
    with pytest.raises(Pix2massError, match=rf"column '{name}' .*arrays of shape \(3,\), expected one"):
        check_catalog(table, "here")


def test_names_in_csv_stay_as_they_are_written(tmp_path):
    """Also under another column name, behind a byte-order mark, and compressed."""
    names = ["007", "7", "1.10", "1.1", "12E3", "12000", "nan", "True"]
    text = "NAME,ra_deg,dec_deg,group\n" + "".join(f"{name},{k},0,0{k}\n" for k, name in enumerate(names))
    (tmp_path / "a.csv").write_text(text, encoding="utf-8-sig")
    with gzip.open(tmp_path / "a.csv.gz", "wt", encoding="utf-8-sig") as file:
        file.write(text)
    (tmp_path / "b.csv").write_text(text.replace("NAME", "id"), encoding="utf-8-sig")
    for name, columns in (("a.csv", {"id": "NAME"}), ("a.csv.gz", {"id": "NAME"}), ("b.csv", {})):
        read = read_catalog(tmp_path / name, columns)
        assert read["id"].tolist() == names
        assert read["group"].tolist() == [f"0{k}" for k in range(len(names))]
        assert read["ra_deg"].tolist() == list(range(len(names)))


def test_all_impossible_values_are_listed_with_their_rows():
    table = Table(
        {
            "id": ["a", "a", "c", " "],
            "ra_deg": [10.0, 400.0, 20.0, 30.0],
            "dec_deg": [0.0, 0.0, -91.0, 0.0],
            "z": [0.2, -0.1, 0.3, 0.2],
            "log10_m500c": [14.0, 14.0, 14.0, 4e14],
        }
    )
    with pytest.raises(Pix2massError) as caught:
        check_catalog(table, "mine.csv")
    text = str(caught.value)
    assert text.startswith("mine.csv: 6 problems")
    for part in (
        "row 2: id 'a' is the same as in row 1",
        "row 4: id is empty",
        "row 2: ra_deg = 400.0",
        "row 3: dec_deg = -91.0",
        "row 2: z = -0.1",
        "row 4: log10_m500c = 4",
    ):
        assert part in text


def test_a_long_list_of_problems_is_cut_short():
    n = 100
    table = Table({"id": [str(i) for i in range(n)], "ra_deg": np.full(n, -1.0), "dec_deg": np.zeros(n)})
    with pytest.raises(Pix2massError, match=r"100 problems[\s\S]*and 80 more"):
        check_catalog(table, "here")


def test_units_of_a_fits_file_are_honoured(tmp_path):
    table = QTable({"id": ["a"], "ra_deg": [np.pi / 2] * u.rad, "dec_deg": [600.0] * u.arcmin})
    table.write(tmp_path / "a.fits")
    read = read_catalog(tmp_path / "a.fits")
    assert float(read["ra_deg"][0]) == pytest.approx(90) and float(read["dec_deg"][0]) == pytest.approx(10)
    QTable({"id": ["a"], "ra_deg": [1.0] * u.kpc, "dec_deg": [0.0]}).write(tmp_path / "b.fits")
    with pytest.raises(Pix2massError, match="'ra_deg' does not hold numbers"):
        read_catalog(tmp_path / "b.fits")


def test_masked_and_empty_values_are_missing_unless_needed(tmp_path):
    table = small()
    table["z"] = MaskedColumn([0.2, 0.0], mask=[False, True])
    table["group"] = MaskedColumn(["field", "x"], mask=[False, True])
    read = check_catalog(table, "here")
    assert read["z"][0] == 0.2 and np.isnan(read["z"][1])
    assert [str(value) for value in read["group"]] == ["field", ""]
    with pytest.raises(Pix2massError, match="row 2: z = .*expected redshift"):
        check_catalog(table, "here", need=("z",))
    (tmp_path / "a.csv").write_text("id,ra_deg,dec_deg,z\na,1,2,0.1\nb,1,2,\n")
    assert np.isnan(read_catalog(tmp_path / "a.csv")["z"][1])
    (tmp_path / "b.csv").write_text("id,ra_deg,dec_deg\na,,2\n")
    with pytest.raises(Pix2massError, match="row 1: ra_deg"):
        read_catalog(tmp_path / "b.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,ra_deg,dec_deg\n", "no rows"),
        ("b.csv", "id,ra_deg,dec_deg\na,ten,2\n", "'ra_deg' does not hold numbers: row 1: ten$"),
        ("c.txt", "", "unknown kind of file"),
        ("d.fits", "not FITS", "could not be read as FITS"),
        ("e.ecsv", "# %ECSV 1.0\n# ---\n# {", "could not be read as ECSV"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(Pix2massError, match=message) as caught:
        read_catalog(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_errors_of_redshifts_are_checked_and_the_rows_named():
    table = check_catalog(small(), "here")
    assert np.isnan(redshift_errors(table, "here")).all()
    table["z_err"] = MaskedColumn([0.01, -1.0], mask=[False, True])
    np.testing.assert_array_equal(redshift_errors(table, "here"), [0.01, np.nan])
    table["z_err"] = [-0.01, 2.0]
    with pytest.raises(Pix2massError, match=r"here: 2 problems\s+row 1: z_err = -0\.01, .*0 to 1.*\s+row 2: z_err = 2"):
        redshift_errors(table, "here")
    table["z_err"] = ["0.01", "--"]
    with pytest.raises(Pix2massError, match="here: column 'z_err' does not hold numbers: row 2: --$"):
        redshift_errors(table, "here")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Pix2massError, match="no such file"):
        read_catalog(tmp_path / "none.csv")


# ---- folds ---------------------------------------------------------------------------------------------------------


def _sky(seed: int, n: int, patch_deg: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    # Across RA 0 and well away from the equator, where a difference of RA is not an angle.
    ra = (rng.uniform(-patch_deg, patch_deg, n) / np.cos(np.deg2rad(60))) % 360
    return ra, 60 + rng.uniform(-patch_deg, patch_deg, n), rng.normal(14.3, 0.4, n)


def _groups(ra: np.ndarray, dec: np.ndarray, separation_deg: float) -> np.ndarray:
    """Friends of friends by the plainest means there are."""
    position = SkyCoord(ra, dec, unit="deg")
    near = position[:, None].separation(position[None, :]).deg < separation_deg
    group = np.arange(len(ra))
    while True:
        merged = np.array([group[row].min() for row in near])
        if (merged == group).all():
            return group
        group = merged


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(12, 60),
    patch_deg=st.floats(2.0, 25.0),
    separation_deg=st.floats(0.1, 2.0),
    n_folds=st.integers(2, 6),
)
def test_folds_never_part_a_group_and_stay_level(seed, n, patch_deg, separation_deg, n_folds):
    ra, dec, mass = _sky(seed, n, patch_deg)
    group = _groups(ra, dec, separation_deg)
    if len(set(group)) < n_folds:
        with pytest.raises(Pix2massError, match="fewer than the .* folds"):
            sky_folds(ra, dec, mass, n_folds, separation_deg, seed)
        return
    fold = sky_folds(ra, dec, mass, n_folds, separation_deg, seed)
    assert fold.shape == (n,) and set(fold) == set(range(n_folds))
    assert all(len(set(fold[group == one])) == 1 for one in set(group))
    sizes = np.bincount(fold, minlength=n_folds)
    assert sizes.max() - sizes.min() <= np.unique(group, return_counts=True)[1].max()


def test_folds_follow_the_seed_and_nothing_else():
    ra, dec, mass = _sky(1, 200, 25.0)
    before = np.random.get_state()[1].copy()  # noqa: NPY002  the global state must not move
    first = sky_folds(ra, dec, mass, 5, 0.5, seed=3)
    assert (first == sky_folds(ra, dec, mass, 5, 0.5, seed=3)).all()
    assert (first != sky_folds(ra, dec, mass, 5, 0.5, seed=4)).any()
    assert (before == np.random.get_state()[1]).all()  # noqa: NPY002


def test_every_fold_gets_all_masses():
    ra, dec, mass = _sky(2, 300, 25.0)
    fold = sky_folds(ra, dec, mass, 5, 0.1, seed=0)
    means = [mass[fold == k].mean() for k in range(5)]
    # Dealt in order of mass: far closer than the 0.05 dex of chance.
    assert np.std(means) < 0.02


def test_too_few_groups_are_refused_with_advice():
    with pytest.raises(Pix2massError, match="4 clusters form 1 groups .*lower fold_separation_deg or folds"):
        sky_folds(np.full(4, 10.0), np.arange(4) / 100, np.full(4, 14.0), 2, 0.5, 1)
