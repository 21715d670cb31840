"""Published cluster catalogues: read from a local file or from VizieR, told by their columns, units verified.

A file is told by its columns, never by its name. Units are taken from the file's own metadata and converted; a unit
that does not fit is an error. Files that carry no units (CSV) are read with those of the published table and say so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from astropy import units as u
from astropy.coordinates import Angle
from astropy.table import QTable, Table

from pix2mass.catalog.masses import MassDefinition, definition_of, looks_like_mass, to_m500c
from pix2mass.catalog.registry import CATALOGUES, DERIVED, MASS_UNIT, OWN, Catalogue, Field, Form, catalogue
from pix2mass.catalog.table import check_catalog, check_cosmology, renamed
from pix2mass.cosmology import r500c_kpc
from pix2mass.types import Pix2massError

VIZIER = "https://vizier.cds.unistra.fr"
"""Base URL of the service that holds published tables (Ochsenbein et al. 2000, A&AS 143, 23)."""

_UNITS = {
    "degrees": "deg",
    "degree": "deg",
    "10+14msun": MASS_UNIT,
    "10^14 msol": MASS_UNIT,
    "10^14 msun": MASS_UNIT,
    "10+14solmass": MASS_UNIT,
    "1e14msun": MASS_UNIT,
    "1e+14 solmass": MASS_UNIT,
    "1e14 solmass": MASS_UNIT,
    "h:m:s": "hourangle",
    '"h:m:s"': "hourangle",
    "d:m:s": "deg",
    '"d:m:s"': "deg",
    "none": "",
    "---": "",
}
"""Spellings met in published tables that astropy does not read, in lower case."""

_LOWEST_MASS_MSUN = 1e12
_RADIUS_TOLERANCE = 0.03


def read_published(
    name_or_path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    concentration: str = "diemer19",
    vizier: str = VIZIER,
    cache: str | Path | None = None,
) -> QTable:
    """Read a published catalogue, or a user's own table, into the project's columns.

    Args:
        name_or_path: a file (FITS, VOTable, ECSV, CSV), or the name of a known catalogue, which is then fetched from
            VizieR.
        columns: our name -> the file's name, for a user's own table whose columns are named otherwise.
        concentration: relation of concentration and mass for masses that are not M500c.
        vizier: base URL of the VizieR service.
        cache: folder for fetched tables; needed for a name.

    Returns:
        QTable with the columns of :func:`~pix2mass.catalog.read_catalog` and z_err, ebv, original_value,
        original_err_up, original_err_low, original_definition, reference, position_err_arcmin, and text columns
        name_redmapper, name_mcxc, name_act where the catalogue names its counterparts. log10_m500c_err is half the
        difference of the log10 at the two limits. Metadata: ``catalogue`` (its key, or "own"), ``form``, ``derived``,
        ``notes``.

    Raises:
        Pix2massError: the file cannot be read or told, a column is missing, a unit does not fit, a mass has no stated
            definition.
    """
    path = Path(name_or_path)
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise Pix2massError(f"{path}: no such file; expected a cluster catalogue in FITS, VOTable, ECSV or CSV")
        path = fetch(catalogue(str(name_or_path)), vizier, cache)
    table = _read_any(path)
    table = renamed(table, columns or {}, str(path))
    found = None if columns else recognise(table)
    if found is None:
        return _own_table(table, path, concentration)
    known, form = found
    return _standardise(table, known, form, path, concentration)


def recognise(table: Table) -> tuple[Catalogue, Form] | None:
    """The catalogue and the form of it that a table's columns tell, or None."""
    # Exact names first: in VizieR's tables E_X and e_X, the upper and the lower error, differ by case alone.
    for fold in (str, str.lower):
        names = {fold(name) for name in table.colnames}
        for known in CATALOGUES:
            for form in known.forms:
                if {fold(name) for name in form.tells} <= names:
                    return known, form
    return None


def fetch(known: Catalogue, vizier: str, cache: str | Path | None) -> Path:
    """Fetch a catalogue's table from VizieR through astroquery, once: later calls find the file in the cache.

    Args:
        known: the catalogue.
        vizier: base URL, e.g. https://vizier.cds.unistra.fr or a mirror.
        cache: folder that gets the table as a VOTable.

    Raises:
        Pix2massError: astroquery is not installed, the service does not answer, or it answers with no such table.
    """
    if cache is None:
        raise Pix2massError(f"{known.key}: expected a folder to keep the fetched table in, got none; give --cache DIR")
    path = Path(cache) / f"{known.key}.vot"
    if path.exists():
        return path
    try:
        from astroquery import cache_conf
        from astroquery.vizier import VizierClass
    except ImportError:
        raise Pix2massError(
            "fetching catalogues needs astroquery: pip install astroquery, or download the tables and give --catalogs"
        ) from None

    class Service(VizierClass):
        """VizieR at any base URL, http or https."""

        def _server_to_url(self, return_type: str = "votable") -> str:
            return f"{vizier.rstrip('/')}/viz-bin/{return_type}"

    # "*" are the columns that VizieR shows by default, "**" are all.
    service = Service(columns=["**"], row_limit=-1, timeout=120)
    try:
        # astroquery's own cache would keep pickles in the user's home: the table below is the cache.
        with warnings.catch_warnings(), cache_conf.set_temp("cache_active", False):
            warnings.simplefilter("ignore")
            tables = service.get_catalogs(known.vizier)
    except Exception as error:  # noqa: BLE001  requests, astropy and astroquery each have errors of their own
        raise Pix2massError(
            f"{vizier}: {known.vizier} could not be fetched: {error}; try again, or another base URL with --vizier"
        ) from None
    found = [tables[number] for number in range(len(tables))] if isinstance(tables, list) else []
    if not found:
        raise Pix2massError(f"{vizier}: no table {known.vizier} there; is this the base URL of a VizieR service?")
    fitting = [table for table in found if (told := recognise(table)) and told[0].key == known.key]
    if not fitting:
        tells = "; ".join(", ".join(form.tells) for form in known.forms)
        raise Pix2massError(
            f"{vizier}: {known.vizier} does not have the columns of {known.source}: expected one of {tells}, got "
            f"{', '.join(found[0].colnames)}"
        )
    table = fitting[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    table.meta.clear()
    table.write(part, format="votable", overwrite=True)
    part.replace(path)
    return path


# ---- reading -------------------------------------------------------------------------------------------------------

_READERS = {
    ".fits": "fits",
    ".fit": "fits",
    ".vot": "votable",
    ".xml": "votable",
    ".csv": "ascii.csv",
    ".ecsv": "ascii.ecsv",
}


def _read_any(path: Path) -> Table:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in _READERS:
        raise Pix2massError(f"{path}: unknown kind of file; expected one ending in {', '.join(_READERS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unread units are judged below, with a message of our own
            kind = _READERS[suffix]
            table = Table.read(path, format=kind, hdu=1) if kind == "fits" else Table.read(path, format=kind)
    except Exception as error:  # noqa: BLE001  each reader has errors of its own
        raise Pix2massError(f"{path}: could not be read as {suffix[1:].upper()}: {error}") from None
    if len(table) == 0:
        raise Pix2massError(f"{path}: the table has no rows")
    table.meta["_carries_units"] = suffix not in (".csv",)
    return table


def _standardise(table: Table, known: Catalogue, form: Form, path: Path, concentration: str) -> QTable:
    """A published table in the project's columns."""
    where = f"{path} ({known.source}, {form.kind} form)"
    missing = [one.names[0] for one in form.fields.values() if one.required and _find(table, one) is None]
    if missing:
        raise Pix2massError(
            f"{where}: columns missing: {', '.join(missing)}; the file has {', '.join(table.colnames)}; "
            "fetch the table again from its publisher"
        )
    notes = [text for text in (form.note, known.note) if text]
    out, unstated = Table(), []
    for ours, one in form.fields.items():
        name = _find(table, one)
        if name is None:
            continue
        if one.unit == "" and table[name].dtype.kind in "SUO":
            out[ours] = [_text(value) for value in table[name]]
            continue
        values, stated = _numbers(table, name, one, where, form.units_in_file)
        out[ours] = values
        if one.unit and not stated:
            unstated.append(name)
    if unstated:
        notes.append(f"the file states no units for {', '.join(unstated)}: those of the published table are used")
    if "id" in out.colnames:
        out["id"] = [str(value) for value in out["id"]]
    _check_radius(out, known, where)
    return _finish(out, known.source if known.definition else "", known, form.kind, notes, path, concentration)


def _own_table(table: Table, path: Path, concentration: str) -> QTable:
    """A user's own table: the project's column names; a mass column's name states its definition."""
    stated = {name: found for name in table.colnames if (found := definition_of(name))}
    suspicious = [
        name
        for name in table.colnames
        if looks_like_mass(name) and name not in stated and definition_of(re.sub(r"_err\w*$", "", name)) is None
    ]
    if not stated and suspicious:
        raise Pix2massError(
            f"{path}: column {suspicious[0]!r} looks like a mass but states no definition; name it after one, e.g. "
            "log10_m500c, m200m_1e14 or m200c_msun_h (with columns NAME_err), or leave it out"
        )
    if len(stated) > 1 and "log10_m500c" not in stated:
        raise Pix2massError(f"{path}: several masses, {', '.join(stated)}: keep one")
    if stated:
        _check_stated_cosmology(table, stated, path)
    own = Catalogue("own", path.name.split(".")[0], f"user's table {path.name}", (), "")
    lacking = [name for name in ("id", "ra_deg", "dec_deg") if name not in table.colnames]
    if lacking:
        tells = "; ".join(f"{one.source}: {', '.join(one.forms[0].tells)}" for one in CATALOGUES)
        raise Pix2massError(
            f"{path}: not a known catalogue (told by columns: {tells}), and columns {', '.join(lacking)} of a table of "
            f"your own are missing; the file has {', '.join(table.colnames)}"
        )
    notes = ["a user's own table"]
    out = Table({name: table[name] for name in table.colnames if name != "_carries_units"})
    if stated:
        name = "log10_m500c" if "log10_m500c" in stated else next(iter(stated))
        definition = stated[name]
        own = Catalogue("own", own.source, own.reference, (), "", definition)
        mass_field = Field((name,))
        values, _ = _numbers(table, name, mass_field, str(path), False)
        error = np.full(len(table), np.nan)
        if f"{name}_err" in table.colnames:
            error, _ = _numbers(table, f"{name}_err", mass_field, str(path), False)
        out["mass"], out["mass_err_up"], out["mass_err_low"] = values, error, error
        for used in (name, f"{name}_err"):
            if used in out.colnames:
                out.remove_column(used)
    return _finish(out, own.source if stated else "", own, OWN, notes, path, concentration)


def _check_stated_cosmology(table: Table, stated: Mapping[str, MassDefinition], path: Path) -> None:
    """Metadata of a user's table must not contradict the names of its columns or the project's cosmology."""
    definition = table.meta.get("mass_definition")
    if definition and all(str(definition) != one.overdensity for one in stated.values()):
        raise Pix2massError(
            f"{path}: the metadata say mass_definition = {definition!r}, the column is named {', '.join(stated)}; "
            "correct one of the two"
        )
    check_cosmology(table.meta, str(path))


def _finish(
    out: Table, source: str, known: Catalogue, kind: str, notes: list[str], path: Path, concentration: str
) -> QTable:
    """Masses to log10 M500c, the columns that every label keeps, and the checks of any catalogue."""
    n = len(out)
    blank = np.full(n, np.nan)
    for name in ("z", "z_err", "richness", "richness_err", "ebv", "position_err_arcmin"):
        if name not in out.colnames:
            out[name] = blank
    out["z"] = np.where(np.asarray(out["z"], float) > 1e-4, np.asarray(out["z"], float), np.nan)
    position = np.asarray(out["position_err_arcmin"], float)
    out["position_err_arcmin"] = np.where(np.isfinite(position), position, known.position_err_arcmin)
    value, up, low = (
        np.array(out[name], float) if name in out.colnames else blank.copy()
        for name in ("mass", "mass_err_up", "mass_err_low")
    )
    if known.definition is not None:
        definition = known.definition
        redshift = np.asarray(out["z"], float)
        mass = to_m500c(definition.msun(value), redshift, definition, concentration)
        with np.errstate(invalid="ignore", divide="ignore"):
            if definition.log10:
                error = (up + low) / 2
            else:
                upper, lower = np.log10(1 + up / value), -np.log10(np.clip(1 - low / value, 0.01, None))
                error = (upper + lower) / 2
            unusable = mass < _LOWEST_MASS_MSUN
            if unusable.any():
                notes.append(f"{int(unusable.sum())} masses below 1e12 Msun are not used")
            out["log10_m500c"] = np.where(unusable, np.nan, np.log10(mass))
            out["log10_m500c_err"] = np.where(error > 0, error, np.nan)
        if definition.overdensity != "500c":
            notes.append(f"{definition} converted to M500c with NFW and concentrations of {concentration}")
    out["label_source"] = [source if np.isfinite(one) else "" for one in _or_nan(out, "log10_m500c", n)]
    out["original_value"], out["original_err_up"], out["original_err_low"] = value, up, low
    out["original_definition"] = [str(known.definition) if known.definition else ""] * n
    out["reference"] = [known.reference] * n
    for name in ("mass", "mass_err_up", "mass_err_low"):
        if name in out.colnames:
            out.remove_column(name)
    checked = check_catalog(out, str(path))
    checked.meta.update(
        catalogue=known.key,
        source=known.source,
        form=kind,
        derived=kind == DERIVED,
        reference=known.reference,
        notes=notes,
        file=path.name,
    )
    return checked


def _or_nan(table: Table, name: str, n: int) -> np.ndarray:
    return np.asarray(table[name], float) if name in table.colnames else np.full(n, np.nan)


def _find(table: Table, one: Field) -> str | None:
    """The table's name of a field: exact first (E_M500 and e_M500 differ by case alone), then whatever the case."""
    for name in one.names:
        if name in table.colnames:
            return name
    lower = {name.lower(): name for name in table.colnames}
    if len(lower) < len(table.colnames):
        return None
    return next((lower[name.lower()] for name in one.names if name.lower() in lower), None)


def _numbers(table: Table, name: str, one: Field, where: str, needs_unit: bool) -> tuple[np.ndarray, bool]:
    """A column as float64 in the field's unit, NaN where missing, and whether the file states its unit."""
    column = table[name]
    text = str(column.unit or "").strip()
    unit = _UNITS.get(text.lower(), text)
    if column.dtype.kind in "SUO" and one.unit == "deg":
        return _angles(column, name, unit, where), bool(unit)
    try:
        values = np.array(
            np.ma.filled(np.ma.asarray(column.data if hasattr(column, "data") else column, float), np.nan)
        )
    except (TypeError, ValueError) as error:
        raise Pix2massError(f"{where}: column {name!r} does not hold numbers: {error}") from None
    for stands_for_nothing in one.missing:
        values[values == stands_for_nothing] = np.nan
    if one.unit and unit:
        try:
            values = values * u.Unit(unit).to(u.Unit(one.unit))
        except (ValueError, TypeError, u.UnitConversionError):
            raise Pix2massError(
                f"{where}: column {name!r} has the unit {text!r}, expected {one.unit!r} or one that converts to it; "
                "check that this is the published table"
            ) from None
    elif one.unit and needs_unit and table.meta.get("_carries_units"):
        raise Pix2massError(
            f"{where}: column {name!r} states no unit, expected {one.unit!r}; the published table states it: "
            "check that this is the published table, or set the unit"
        )
    return values, bool(unit)


def _angles(column, name: str, unit: str, where: str) -> np.ndarray:
    """Sexagesimal text to degrees; right ascension is in hours, which its unit must say."""
    if not unit:
        raise Pix2massError(f"{where}: column {name!r} holds text and states no unit, expected h:m:s, d:m:s or deg")
    try:
        return Angle([str(value) for value in column], unit=unit).deg  # type: ignore[return-value]
    except Exception as error:  # noqa: BLE001  astropy has many
        raise Pix2massError(f"{where}: column {name!r} does not hold angles: {error}") from None


def _text(value: object) -> str:
    text = "" if value is None or np.ma.is_masked(value) else str(value).strip()
    return "" if text.lower() in ("--", "null", "none", "n/a") else text


def _check_radius(out: Table, known: Catalogue, where: str) -> None:
    """A table that gives M500 and R500 proves its own units, definition and cosmology: M = (4/3) pi 500 rho_c R^3."""
    if "r500_mpc" not in out.colnames or known.definition is None or "mass" not in out.colnames:
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = r500c_kpc(
            np.log10(known.definition.msun(np.asarray(out["mass"], float))), np.asarray(out["z"], float)
        )
    ratio = float(np.nanmedian(1000.0 * np.asarray(out["r500_mpc"], float) / expected))
    if not abs(ratio - 1) < _RADIUS_TOLERANCE:
        raise Pix2massError(
            f"{where}: R500 is {ratio:.3f} times the radius that M500 implies for 500 times the critical density, "
            "H0 = 70, Om = 0.3; expected 1: the masses have another unit, definition or cosmology"
        )
