"""Reading and checking catalogues. Out comes one QTable with the project's column names, a row per cluster."""

from __future__ import annotations

import contextlib
import difflib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io.fits.verify import VerifyWarning
from astropy.table import QTable, Table
from astropy.units import Quantity, UnitConversionError

from pix2mass.cosmology import H0_KM_S_MPC, MASS_DEFINITION, OMEGA_M
from pix2mass.types import Pix2massError

_REQUIRED = ("id", "ra_deg", "dec_deg")
_RANGES: dict[str, tuple[float, float, str]] = {
    "ra_deg": (0.0, 360.0, "degrees, 0 to 360"),
    "dec_deg": (-90.0, 90.0, "degrees, -90 to 90"),
    "z": (1e-4, 3.0, "redshift, above 0 and below 3"),
    "log10_m500c": (12.0, 16.5, "log10 of M500c in solar masses, 12 to 16.5"),
    "log10_m500c_err": (0.0, 3.0, "dex, 0 to 3"),
    "richness": (0.0, 1000.0, "redMaPPer lambda, 0 to 1000"),
    "richness_err": (0.0, 1000.0, "0 to 1000"),
}
_TEXT = ("label_source", "group")
_MAY_BE_MISSING = ("z", "log10_m500c", "log10_m500c_err", "richness", "richness_err")
_SHOWN = 20


def read_catalog(path: str | Path, columns: Mapping[str, str] | None = None, need: tuple[str, ...] = ()) -> QTable:
    """Read a catalogue from CSV, ECSV or FITS.

    Args:
        path: the file; the kind is told by its ending (.csv, .csv.gz, .ecsv, .fits).
        columns: our name -> the file's name, e.g. ``{"ra_deg": "RA"}``, for columns named otherwise.
        need: columns that must have a value in every row, beside id, ra_deg and dec_deg, e.g. ``("z",)``.

    Returns:
        QTable with id, ra_deg, dec_deg, z, log10_m500c, log10_m500c_err, label_source, richness, richness_err, and all
        other columns of the file. Values that the file lacks are NaN, or "" for text. Metadata state the mass
        definition and the cosmology.

    Raises:
        Pix2massError: lists every missing column and impossible value at once, with row numbers counted from 1.
    """
    path = Path(path)
    if not path.is_file():
        raise Pix2massError(f"{path}: no such file; expected a catalogue in CSV, ECSV or FITS")
    name = path.name.lower().removesuffix(".gz")
    kinds = {".csv": "ascii.csv", ".ecsv": "ascii.ecsv", ".fits": "fits", ".fit": "fits"}
    kind = kinds.get(Path(name).suffix)
    if kind is None:
        raise Pix2massError(f"{path}: unknown kind of file; expected one ending in .csv, .ecsv or .fits")
    options = {}
    if kind == "ascii.csv":  # names made of digits stay as they are written; spreadsheets put a byte-order mark first
        text = {(columns or {}).get(ours, ours): str for ours in ("id", *_TEXT)}
        options = {"converters": text, "encoding": "utf-8-sig"}
    try:
        table = Table.read(path, format=kind, **options)
    except Exception as error:  # noqa: BLE001  each reader has errors of its own
        raise Pix2massError(f"{path}: could not be read as {kind.removeprefix('ascii.').upper()}: {error}") from error
    return check_catalog(renamed(table, columns or {}, str(path)), str(path), need)


def renamed(table: Table, columns: Mapping[str, str], where: str) -> Table:
    """The same table with some columns under other names, all as the file has them: ``{"z": "a", "a": "z"}`` swaps two.

    Args:
        table: as read.
        columns: our name -> the table's name.
        where: what to call the table in errors.

    Raises:
        Pix2massError: the table lacks a column.
    """
    for ours, theirs in columns.items():
        if theirs not in table.colnames:
            raise Pix2massError(f"{where}: --columns {ours}={theirs}: {_unknown_column(theirs, table.colnames)}")
    found = {ours: table[theirs].copy() for ours, theirs in columns.items()}
    out = table.copy(copy_data=False)
    out.remove_columns(sorted({*columns.values(), *(ours for ours in columns if ours in table.colnames)}))
    for ours, values in found.items():
        out[ours] = values
    return out


def check_cosmology(meta: Mapping[str, Any], where: str) -> None:
    """That the metadata of a table with masses name no other cosmology than the project's.

    Raises:
        Pix2massError: they do.
    """
    cosmology = meta.get("cosmology")
    if not isinstance(cosmology, Mapping):
        return
    for key, ours in (("H0_km_s_Mpc", H0_KM_S_MPC), ("Om0", OMEGA_M)):
        if abs(float(cosmology.get(key, ours)) - ours) > 1e-3:
            raise Pix2massError(
                f"{where}: the metadata say {key} = {cosmology[key]}, expected {ours}; how masses depend on it only "
                "their method knows: derive them again, or correct the metadata if they are wrong"
            )


def check_catalog(table: Table, where: str, need: tuple[str, ...] = ()) -> QTable:
    """Bring a table to the project's columns and types, or say all that is wrong with it.

    Args:
        table: at least id, ra_deg and dec_deg.
        where: what to call the table in errors.
        need: further columns that must have a value in every row.

    Returns:
        A new QTable, as :func:`read_catalog` describes.

    Raises:
        Pix2massError: lists every missing column and impossible value at once.
    """
    problems = [
        f"column {name!r} is missing: {_unknown_column(name, table.colnames)}; map it with --columns {name}=THEIR_NAME"
        for name in dict.fromkeys((*_REQUIRED, *need))
        if name not in table.colnames
    ]
    if problems:
        raise Pix2massError(f"{where}:\n  " + "\n  ".join(problems))
    if len(table) == 0:
        raise Pix2massError(f"{where}: the catalogue has no rows")

    out = QTable(meta=dict(table.meta))
    out.meta.setdefault("mass_definition", MASS_DEFINITION)
    out.meta.setdefault("cosmology", {"H0_km_s_Mpc": H0_KM_S_MPC, "Om0": OMEGA_M, "flat": True})
    ids = [str(value).strip() for value in table["id"]]
    if getattr(table["id"], "ndim", 1) > 1:
        raise Pix2massError(
            f"{where}: column 'id' holds arrays of shape {table['id'].shape[1:]}, expected one name a row"
        )
    out["id"] = ids
    first: dict[str, int] = {}
    for row, cluster_id in enumerate(ids, start=1):
        if not cluster_id or cluster_id == "--":
            problems.append(f"row {row}: id is empty")
        elif cluster_id in first:
            problems.append(
                f"row {row}: id {cluster_id!r} is the same as in row {first[cluster_id]}; ids must be unique"
            )
        else:
            first[cluster_id] = row
    for name, (low, high, meaning) in _RANGES.items():
        if name not in table.colnames:
            out[name] = np.full(len(table), np.nan)
            continue
        out[name] = values = _floats(table, name, where)
        optional = name in _MAY_BE_MISSING and name not in need
        bad = ~((values >= low) & (values <= high)) & ~(np.isnan(values) & optional)
        problems += _rows(table, name, bad, meaning)
    for name in _TEXT:
        if name in table.colnames:
            out[name] = ["" if np.ma.is_masked(value) else str(value) for value in table[name]]
    if "label_source" not in out.colnames:
        out["label_source"] = [""] * len(table)
    _refuse(problems, where)
    if np.isfinite(out["log10_m500c"]).any():
        definition = str(out.meta["mass_definition"])
        if definition != MASS_DEFINITION:
            raise Pix2massError(
                f"{where}: the metadata say mass_definition = {definition!r}, column log10_m500c is for "
                f"{MASS_DEFINITION}; name the column after the masses it holds and let `pix2mass catalog build` "
                "convert them, or correct the metadata if they are wrong"
            )
        check_cosmology(out.meta, where)
    for name in table.colnames:
        if name not in out.colnames:
            out[name] = table[name]
    return out


def redshift_errors(table: Table, where: str) -> np.ndarray:
    """Standard errors of the redshifts from the column ``z_err``, shape (n,), NaN where there are none.

    Args:
        table: a checked catalogue.
        where: what to call the table in errors.

    Raises:
        Pix2massError: names the rows that do not hold a number from 0 to 1.
    """
    if "z_err" not in table.colnames:
        return np.full(len(table), np.nan)
    values = _floats(table, "z_err", where)
    meaning = "standard error of the redshift, 0 to 1, or empty"
    _refuse(_rows(table, "z_err", (values < 0.0) | (values > 1.0), meaning), where)
    return values


def write_catalog(table: QTable, path: str | Path) -> None:
    """Write a table so that a reader never sees half a file. The ending (.ecsv, .csv, .fits) says in which format.

    CSV holds no metadata; FITS holds those that are text or numbers, ``cosmology: {Om0: ...}`` as ``cosmology_Om0``.

    Raises:
        Pix2massError: another ending, CSV and a column with more than one value per row, or FITS and letters beyond
            ASCII.
    """
    path = Path(path)
    kinds = {".ecsv": "ascii.ecsv", ".csv": "ascii.csv", ".fits": "fits"}
    if path.suffix not in kinds:
        raise Pix2massError(f"{path}: unknown kind of table; choose a name ending in .ecsv, .csv or .fits")
    wide = [name for name in table.colnames if len(table[name].shape) > 1]
    if wide and path.suffix == ".csv":
        raise Pix2massError(
            f"{path}: CSV holds one value per row and column, not the arrays of {', '.join(wide)}; choose a name "
            "ending in .ecsv or .fits, or leave these columns out"
        )
    if path.suffix == ".fits":
        for name in table.colnames:
            check_letters(table[name], name, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    if path.suffix == ".fits":
        table = table.copy(copy_data=False)
        table.meta = _flat_meta(table.meta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VerifyWarning)  # long keywords become HIERARCH cards, which astropy reads back
        table.write(part, format=kinds[path.suffix], overwrite=True)
    os.replace(part, path)


def check_letters(values: Any, name: str, path: Path) -> None:
    """That a column can be written to a file, if that is a FITS file, whose texts have ASCII letters alone.

    Raises:
        Pix2massError: names the first row that cannot.
    """
    if path.suffix != ".fits" or np.asarray(values).dtype.kind not in "UO":
        return
    for row, value in enumerate(values, start=1):
        if isinstance(value, str) and not value.isascii():
            raise Pix2massError(
                f"{path}: row {row}: {name} = {str(value)!r} has letters that FITS cannot hold; choose a name ending "
                "in .ecsv or .csv"
            )


def _flat_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for a FITS header, which holds no mappings: ``{"a": {"b": 1}}`` becomes ``{"a_b": 1}``; and no letters
    beyond ASCII, which become their codes."""
    flat = {}
    for name, value in meta.items():
        inner = {f"{name}_{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {name: value}
        flat.update(inner)
    return {k: v.encode("ascii", "backslashreplace").decode() if isinstance(v, str) else v for k, v in flat.items()}


def _rows(table: Table, name: str, bad: np.ndarray, meaning: str) -> list[str]:
    return [f"row {row + 1}: {name} = {table[name][row]}, expected {meaning}" for row in np.flatnonzero(bad)]


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise Pix2massError(f"{where}: {len(problems)} problems\n  " + "\n  ".join(problems[:_SHOWN] + more))


def _floats(table: Table, name: str, where: str) -> np.ndarray:
    """A column as float64, NaN where masked, angles converted to degrees if the column has a unit."""
    column = table[name]
    try:
        plain = getattr(column, "unmasked", column)
        values = np.array(np.ma.getdata(getattr(plain, "value", plain)), float)
        if values.shape[1:]:
            raise ValueError(f"it holds arrays of shape {values.shape[1:]}, expected one number a row")
        values[np.asarray(getattr(column, "mask", False)) & np.ones(len(values), bool)] = np.nan
        unit = getattr(column, "unit", None)
        if name.endswith("_deg") and unit is not None:
            values = Quantity(values, unit).to_value("deg")
    except (ValueError, TypeError, UnitConversionError) as error:
        words = [f"row {row}: {value!s}" for row, value in enumerate(column, start=1) if not _is_number(value)]
        more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
        problem = ", ".join(words[:_SHOWN]) + more if words else error
        raise Pix2massError(f"{where}: column {name!r} does not hold numbers: {problem}") from None
    return values


def _is_number(value: Any) -> bool:
    """Whether a value is not a word; what is masked is none."""
    if np.ma.is_masked(value) or not isinstance(value, str):
        return True
    with contextlib.suppress(ValueError):
        float(value)
        return True
    return False


def _unknown_column(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f", perhaps {near[0]!r} is meant" if near else ""
    return f"the file has {', '.join(known)}{hint}"
