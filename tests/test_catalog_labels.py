"""From published tables to a labelled and an unlabelled one: matched, chosen, on one scale, nothing lost unsaid."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import types
from html import escape
from pathlib import Path

import numpy as np
import pytest
from _vizier import serve
from astropy import units as u
from astropy.table import QTable, Table, vstack

from pix2mass.catalog import read_catalog, write_catalog
from pix2mass.catalog.dust import deredden, reddening
from pix2mass.catalog.labels import build, matching_radius_arcmin
from pix2mass.catalog.registry import catalogue
from pix2mass.cli import app
from pix2mass.config import CatalogConfig, validate
from pix2mass.cosmology import kpc_per_arcsec, r500c_kpc
from pix2mass.report import write_catalog_report
from pix2mass.report.catalog_page import fit_richness
from pix2mass.types import Pix2massError

N = 300
ACT_OFFSET, PSZ_OFFSET = -0.05, 0.10


def sky(seed: int = 5) -> dict[str, np.ndarray]:
    """Clusters of known mass on a grid 1 degree wide, far from each other."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(0.12, 0.5, N)
    mass = rng.normal(14.4, 0.25, N)
    return {
        "ra": 100.0 + np.arange(N) % 20,
        "dec": np.arange(N) // 20 * 1.0,
        "z": z,
        "mass": mass,
        "richness": 40 * 10 ** ((mass - 14.3) / 0.8 + 0.08 * rng.standard_normal(N)),
    }


def tables(true: dict[str, np.ndarray]) -> dict[str, Table]:
    """redMaPPer of all, ACT of every second, PSZ2 of every third, MCXC-II of every fourth, each with its own offset."""
    rng = np.random.default_rng(11)
    name = np.array([f"RMJ{i:04d}" for i in range(N)])

    def shifted(rows: np.ndarray, arcmin: float) -> tuple[np.ndarray, np.ndarray]:
        angle = rng.uniform(0, 2 * np.pi, len(rows))
        dec = true["dec"][rows] + arcmin / 60 * np.sin(angle)
        return true["ra"][rows] + arcmin / 60 * np.cos(angle) / np.cos(np.deg2rad(dec)), dec

    redmapper = Table({"NAME": name, "RA": true["ra"], "DEC": true["dec"], "Z_LAMBDA": true["z"]})
    redmapper["Z_LAMBDA_ERR"], redmapper["Z_SPEC"] = 0.01, -1.0
    redmapper["LAMBDA"], redmapper["LAMBDA_ERR"] = true["richness"], 0.1 * true["richness"]
    rows = np.arange(0, N, 2)
    ra, dec = shifted(rows, 0.3)
    value = 10 ** (true["mass"][rows] + ACT_OFFSET + 0.05 * rng.standard_normal(len(rows)) - 14)
    act = Table({"name": [f"ACT-CL {i}" for i in rows], "RADeg": ra, "decDeg": dec, "redshift": true["z"][rows]})
    act["M500c"], act["M500c_errPlus"], act["M500c_errMinus"] = value, 0.15 * value, 0.15 * value
    rows = np.arange(0, N, 3)
    ra, dec = shifted(rows, 4.0)  # beyond half of R500: only names find them
    unit = u.Unit("1e14 solMass")
    value = 10 ** (true["mass"][rows] + PSZ_OFFSET + 0.04 * rng.standard_normal(len(rows)) - 14)
    psz2 = Table({"NAME": [f"PSZ2 {i}" for i in rows], "RA": ra * u.deg, "DEC": dec * u.deg})
    psz2["POS_ERR"] = np.full(len(rows), 1.0) * u.arcmin
    psz2["REDSHIFT"] = true["z"][rows]
    psz2["MSZ"], psz2["MSZ_ERR_UP"], psz2["MSZ_ERR_LOW"] = value * unit, 0.1 * value * unit, 0.1 * value * unit
    psz2["REDMAPPER"] = name[rows]
    psz2["REDSHIFT"][1] += 0.1  # a named counterpart at another redshift
    rows = np.arange(0, N, 4)
    ra, dec = shifted(rows, 0.5)
    value = 10 ** (true["mass"][rows] + 0.07 * rng.standard_normal(len(rows)) - 14)
    mcxc = Table({"MCXC": [f"MCXC {i}" for i in rows], "OName": ["x"] * len(rows), "zType": ["S"] * len(rows)})
    mcxc["RAJ2000"], mcxc["DEJ2000"], mcxc["z"] = ra * u.deg, dec * u.deg, true["z"][rows]
    mcxc["M500"], mcxc["e_M500"], mcxc["E_M500"] = value * unit, 0.1 * value * unit, 0.1 * value * unit
    again = mcxc[:1].copy()
    again["MCXC"], again["RAJ2000"], again["e_M500"] = ["MCXC again"], again["RAJ2000"] + 0.003 * u.deg, 9 * unit
    lonely = mcxc[1:4].copy()
    lonely["MCXC"] = ["lonely", "far", "other z"]
    lonely["DEJ2000"] = lonely["DEJ2000"] + np.array([0.5, 0.0, 0.0]) * u.deg
    lonely["z"] = [0.3, 0.9, 0.02]
    return {"redmapper": redmapper, "act": act, "psz2": psz2, "mcxc2": vstack([mcxc, again, lonely])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("catalogues")
    for name, table in tables(sky()).items():
        kind = "vot" if name == "mcxc2" else "fits"
        table.write(path / f"{name}.{kind}", format="votable" if kind == "vot" else "fits")
    return path


def config(folder: Path, **more) -> CatalogConfig:
    return CatalogConfig(catalogs=folder, scale_reference="mcxc-ii", bootstrap=200, **more)


@pytest.fixture(scope="module")
def made(folder: Path):
    return build(config(folder), seed=1)


def test_every_label_finds_its_cluster(made):
    account = {one.source: one for one in made.matches}
    assert account["ACT-DR5"].matched == 150 and account["ACT-DR5"].dropped == {}
    assert account["PSZ2"].matched == account["PSZ2"].by_name == 99
    assert account["PSZ2"].dropped == {"named counterpart differs in redshift by 0.05 or more": 1}
    assert account["MCXC-II"].matched == 75
    assert account["MCXC-II"].dropped == {
        "second entry of the same cluster in this catalogue": 1,
        "no redMaPPer cluster within the radius, or outside its area": 1,
        "outside redMaPPer's redshifts": 2,
    }
    for one in made.matches:
        assert one.rows == one.matched + sum(one.dropped.values())
        assert one.by_chance <= 1
    number = np.array([int(name[3:]) for name in made.labelled["id"]])
    for name, step in (("ACT-DR5", 2), ("PSZ2", 3), ("MCXC-II", 4)):
        own = number[np.asarray(made.labelled["label_source"]) == name]
        ids = [
            int(text.split()[-1])
            for text in made.labelled["label_id"][np.asarray(made.labelled["label_source"]) == name]
        ]
        assert (own % step == 0).all() and own.tolist() == ids


def test_the_two_tables_share_no_cluster_and_lose_none(made):
    labelled, unlabelled = set(made.labelled["id"]), set(made.unlabelled["id"])
    assert len(labelled) + len(unlabelled) == N and not labelled & unlabelled
    assert np.isfinite(made.labelled["log10_m500c"]).all() and np.isnan(made.unlabelled["log10_m500c"]).all()
    assert set(made.unlabelled["label_source"]) == {""}
    for name in ("z_err", "ebv", "ebv_source", "richness", "richness_err", "z_spec"):
        assert name in made.labelled.colnames and name in made.unlabelled.colnames


def test_preference_decides_and_the_others_are_remembered(made, folder):
    row = made.labelled[list(made.labelled["id"]).index("RMJ0012")]  # all three have it
    assert row["label_source"] == "ACT-DR5" and row["n_labels"] == 3
    assert [text.partition("=")[0] for text in row["other_labels"].split(";")] == ["PSZ2", "MCXC-II"]
    other = build(config(folder, prefer="mcxc-ii,psz2"))
    row = other.labelled[list(other.labelled["id"]).index("RMJ0012")]
    assert row["label_source"] == "MCXC-II" and "ACT-DR5" not in set(other.labelled["label_source"])
    assert "left out by --prefer" in " ".join(other.messages)


def test_offsets_that_were_put_in_are_taken_out(made, folder):
    scale = made.scale
    for name, truth in (("ACT-DR5", ACT_OFFSET), ("PSZ2", PSZ_OFFSET), ("MCXC-II", 0.0)):
        assert abs(scale.offset_dex[name] - truth) <= 3.5 * max(scale.error_dex[name], 1e-9)
    true = dict(zip([f"RMJ{i:04d}" for i in range(N)], sky()["mass"], strict=True))
    residual = np.array([row["log10_m500c"] - true[row["id"]] for row in made.labelled])
    source = np.asarray(made.labelled["label_source"], str)
    assert all(abs(np.median(residual[source == name])) < 0.035 for name in set(source))
    carried = build(config(folder, scale="carry")).labelled
    np.testing.assert_allclose(
        np.asarray(carried["log10_m500c"]) - np.asarray(carried["scale_offset_dex"]),
        np.asarray(made.labelled["log10_m500c"]),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        carried["log10_m500c"], np.log10(np.asarray(carried["original_value"]) * 1e14), atol=1e-6
    )


def test_every_label_keeps_where_it_comes_from(made):
    row = made.labelled[np.asarray(made.labelled["label_source"]) == "PSZ2"][0]
    assert row["original_definition"] == "M500c in 1e14 Msun"
    assert row["reference"] == catalogue("psz2").reference
    assert row["label_match"] == "name" and row["label_separation_arcmin"] == pytest.approx(4.0, abs=0.01)
    assert row["original_err_up"] == pytest.approx(0.1 * row["original_value"], rel=1e-5)
    meta = made.labelled.meta
    assert meta["mass_definition"] == "500c" and meta["cosmology"]["H0_km_s_Mpc"] == 70
    assert meta["scale_reference"] == "MCXC-II" and meta["scale_offsets"] == "subtracted"


def test_without_names_positions_decide(folder):
    account = {one.source: one for one in build(config(folder, counterpart_names=False)).matches}
    assert account["PSZ2"].by_name == 0 and account["PSZ2"].matched < 60
    wide = {one.source: one for one in build(config(folder, counterpart_names=False, radius_arcmin=5.0)).matches}
    assert wide["PSZ2"].matched == 99


def test_the_default_radius(made, folder):
    table = QTable({"z": [0.2, 0.2, np.nan], "log10_m500c": [14.5, 14.5, 14.5], "position_err_arcmin": [0.0, 9.0, 1.0]})
    half = 0.5 * r500c_kpc(14.5, 0.2) / kpc_per_arcsec(0.2) / 60
    np.testing.assert_allclose(matching_radius_arcmin(table), [half, 9.0, np.nan])


def test_a_users_table_comes_first(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    true = sky()
    Table(
        {"id": ["x", "y"], "ra_deg": true["ra"][:2], "dec_deg": true["dec"][:2], "z": true["z"][:2],
         "m500c_1e14": [2.0, 3.0], "m500c_1e14_err": [0.2, 0.2]}
    ).write(tmp_path / "lensing.csv")  # fmt: skip
    result = build(config(tmp_path))
    own = result.labelled[np.asarray(result.labelled["label_source"]) == "lensing"]
    assert own["label_id"].tolist() == ["x", "y"]
    # Two clusters in common are too few for an offset: the labels stay as they are, and that is said.
    np.testing.assert_allclose(own["log10_m500c"], np.log10([2e14, 3e14]))
    assert "lensing: too few clusters shared" in " ".join(result.messages)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prefer": "psz3"}, "'psz3' is no known catalogue"),
        ({"prefer": "mcxc"}, "no catalogue with masses"),
    ],
)
def test_wrong_choices_are_named(folder, more, message):
    with pytest.raises(Pix2massError, match=message):
        build(config(folder, **more))


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(Pix2massError, match="expected a folder with cluster catalogues"):
        build(config(tmp_path / "none"))
    (tmp_path / "act.fits").write_bytes((folder / "act.fits").read_bytes())
    with pytest.raises(Pix2massError, match="no redMaPPer table"):
        build(config(tmp_path))
    with pytest.raises(Pix2massError, match="--catalogs DIR or --vizier URL"):
        validate(CatalogConfig, {}, "here")


def test_the_same_from_a_service(tmp_path):
    made = tables(sky())
    rename = {"NAME": "Name", "RA": "RAJ2000", "DEC": "DEJ2000", "Z_LAMBDA": "zlambda", "Z_LAMBDA_ERR": "e_zlambda"}
    redmapper = made["redmapper"]
    redmapper.rename_columns(list(rename), list(rename.values()))
    redmapper.rename_columns(["LAMBDA", "LAMBDA_ERR", "Z_SPEC"], ["lambda", "e_lambda", "zspec"])
    redmapper["RAJ2000"].unit = redmapper["DEJ2000"].unit = "deg"
    known = {catalogue("redmapper").vizier: redmapper, catalogue("mcxc-ii").vizier: made["mcxc2"]}
    with serve(known) as service:
        wanted = CatalogConfig(vizier=service.url, cache=tmp_path, prefer="mcxc-ii", scale_reference="mcxc-ii")
        result = build(wanted)
    assert len(result.labelled) == 75 and sorted(path.name for path in tmp_path.iterdir()) == [
        "mcxc-ii.vot",
        "redmapper.vot",
    ]


# ---- dust ------------------------------------------------------------------------------------------------------------


def test_reddening_without_maps_comes_from_the_catalogue_or_is_flagged(monkeypatch):
    monkeypatch.setitem(sys.modules, "dustmaps.sfd", None)
    values, origin = reddening(np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([0.05, np.nan]))
    assert values[0] == 0.05 and np.isnan(values[1]) and origin == ["catalogue", "none"]


def test_reddening_from_maps_is_on_the_original_scale(monkeypatch, tmp_path):
    seen = {}

    class SFDMap:
        def __init__(self, mapdir, scaling=0.86):
            seen["scaling"], seen["mapdir"] = scaling, mapdir

        def ebv(self, ra, dec):
            return 0.1 * np.ones_like(ra)

    module = types.ModuleType("sfdmap2.sfdmap")
    module.SFDMap = SFDMap  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sfdmap2.sfdmap", module)
    monkeypatch.setitem(sys.modules, "sfdmap2", types.ModuleType("sfdmap2"))
    values, origin = reddening(np.array([1.0]), np.array([3.0]), None, tmp_path)
    assert values[0] == 0.1 and origin == ["sfdmap2"] and seen == {"scaling": 1.0, "mapdir": str(tmp_path)}
    monkeypatch.setitem(sys.modules, "sfdmap2.sfdmap", None)
    with pytest.raises(Pix2massError, match="pip install sfdmap2"):
        reddening(np.array([1.0]), np.array([3.0]), None, tmp_path)


def test_dereddening_uses_the_stated_coefficients():
    np.testing.assert_allclose(deredden([20.0, 21.0], 0.1, "g"), [20 - 0.3303, 21 - 0.3303])
    with pytest.raises(Pix2massError, match="band"):
        deredden(20.0, 0.1, "y")


# ---- command and page ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("out") / "clusters"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        app(
            ["catalog", "build", "--catalogs", str(folder), "--scale-reference", "mcxc-ii", "--bootstrap", "100",
             "--out", str(out), "--report"],
            result_action="return_value",
        )  # fmt: skip
    return out, printed.getvalue()


def test_the_command_writes_and_says_what_it_did(built):
    out, printed = built
    assert {path.name for path in out.iterdir()} == {"labelled.ecsv", "unlabelled.ecsv", "catalog.json", "report.html"}
    labelled = read_catalog(out / "labelled.ecsv", need=("z", "log10_m500c", "richness"))
    assert f"{len(labelled)} clusters with a mass" in printed
    for words in ("by chance", "rows without a label", "named counterpart differs", "PSZ2 - MCXC-II", "subtracted"):
        assert words in printed
    summary = json.loads((out / "catalog.json").read_text())
    assert summary["n_labelled"] == len(labelled) and summary["config"]["dz"] == 0.05


def test_the_page_is_self_contained_and_has_every_figure(built):
    html = (built[0] / "report.html").read_text()
    assert "<script" not in html and "url(" not in html and "http://" not in html
    assert html.count("<img ") == 5 and html.count('alt="') == 5 and 'alt=""' not in html
    for title in (
        "Clusters on the sky",
        "Mass against redshift",
        "Richness against mass",
        "label sources",
        "Errors of",
    ):
        assert title in html
    assert "0.1 to 0.15 dex below weak lensing" in html and escape(catalogue("psz2").reference) in html


def test_the_page_says_what_is_missing(tmp_path, built):
    with pytest.raises(Pix2massError, match="labelled.ecsv: no such file"):
        write_catalog_report(tmp_path)
    for name in ("labelled.ecsv", "unlabelled.ecsv"):
        (tmp_path / name).write_bytes((built[0] / name).read_bytes())
    (tmp_path / "catalog.json").write_text("{")
    with pytest.raises(Pix2massError, match="catalog.json: broken file"):
        write_catalog_report(tmp_path)


def test_a_source_that_is_no_mathematics_is_drawn_as_it_stands(tmp_path, built):
    for name in ("unlabelled.ecsv", "catalog.json"):
        (tmp_path / name).write_bytes((built[0] / name).read_bytes())
    labelled = read_catalog(built[0] / "labelled.ecsv")
    labelled["label_source"] = r"my $\frac$ list"
    write_catalog(labelled, tmp_path / "labelled.ecsv")
    assert (write_catalog_report(tmp_path).read_text()).count("<img ") == 5


def test_the_fit_on_the_page_finds_a_known_plane():
    rng = np.random.default_rng(2)
    richness, z = rng.uniform(20, 200, 500), rng.uniform(0.1, 0.5, 500)
    mass = 14.3 + 0.8 * np.log10(richness / 40) - 0.4 * np.log10((1 + z) / 1.3)
    fit = fit_richness(np.append(mass, np.nan), np.append(richness, 30.0), np.append(z, 0.2))
    assert (fit.a, fit.b, fit.c) == pytest.approx((14.3, 0.8, -0.4)) and fit.n == 500
    noisy = fit_richness(mass + 0.1 * rng.standard_normal(500), richness, z)
    assert noisy.rms_dex == pytest.approx(0.1, rel=0.1) and noisy.nmad_dex == pytest.approx(0.1, rel=0.15)
    with pytest.raises(Pix2massError, match="expected at least 4"):
        fit_richness(mass[:3], richness[:3], z[:3])
