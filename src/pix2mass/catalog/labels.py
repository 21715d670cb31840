"""The two tables of a real survey: redMaPPer clusters with a mass label, and those without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.catalog.dust import reddening
from pix2mass.catalog.match import candidate_pairs, chance_matches, match_one_to_one
from pix2mass.catalog.published import read_published
from pix2mass.catalog.registry import CATALOGUES, DERIVED, PUBLISHED, catalogue
from pix2mass.catalog.scale import Scale, fit_scale
from pix2mass.catalog.table import check_catalog
from pix2mass.config import CatalogConfig
from pix2mass.cosmology import kpc_per_arcsec, r500c_kpc
from pix2mass.types import Pix2massError

PARENT = "redmapper"
_DUPLICATE_ARCMIN, _DUPLICATE_DZ = 1.0, 0.01
_SHIFT_DEG = 0.5
_FILES = (".fits", ".fit", ".vot", ".xml", ".csv", ".ecsv", ".csv.gz", ".fits.gz", ".fit.gz")


@dataclass
class SourceMatch:
    """How one label source was matched to redMaPPer.

    Attributes:
        source: name of the label source.
        rows: rows of its catalogue.
        matched: labels that found their cluster.
        by_name: how many of these by the catalogue's own counterpart names, the rest by position.
        by_chance: matches by position expected by chance, from shifted positions.
        chosen: clusters that carry this source's label in the end; the others carry a preferred source's.
        dropped: reason -> number of rows.
        derived: the file is not the published table.
        reference: the paper.
        file: where it was read from.
        notes: what to know about its masses.
        median_radius_arcmin: median matching radius of the rows in redMaPPer's redshift range.
    """

    source: str
    rows: int
    matched: int = 0
    by_name: int = 0
    by_chance: float = 0.0
    chosen: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    derived: bool = False
    reference: str = ""
    file: str = ""
    notes: list[str] = field(default_factory=list)
    median_radius_arcmin: float = float("nan")


@dataclass(frozen=True)
class Labels:
    """Result of :func:`build`.

    Attributes:
        labelled: clusters with a mass, redMaPPer's position, redshift and richness.
        unlabelled: all other redMaPPer clusters.
        matches: one entry per label source, in order of preference.
        scale: offsets between the sources.
        messages: what was left aside and why.
    """

    labelled: QTable
    unlabelled: QTable
    matches: list[SourceMatch]
    scale: Scale
    messages: list[str]

    def summary(self) -> dict[str, Any]:
        """Plain values for catalog.json."""
        return {
            "n_labelled": len(self.labelled),
            "n_unlabelled": len(self.unlabelled),
            "matches": [asdict(one) for one in self.matches],
            "scale": self.scale.as_dict(),
            "messages": self.messages,
        }


Progress = Callable[[int, int], None]


def build(config: CatalogConfig, seed: int = 1, progress: Progress = lambda done, total: None) -> Labels:
    """Read the catalogues, match them to redMaPPer one to one, choose one label per cluster, put labels on one scale.

    Args:
        config: where the catalogues are, and all choices.
        seed: of the bootstrap.
        progress: called with (done, total) catalogues.

    Returns:
        The two tables and how they came about.

    Raises:
        Pix2massError: redMaPPer or every label source is missing, or a table cannot be used.
    """
    tables, messages = _read_all(config, progress)
    parent = tables.pop(PARENT, None)
    if parent is None:
        raise Pix2massError(
            f"{config.catalogs}: no redMaPPer table among the catalogues; expected one (SDSS DR8 v5.10 or v6.3, "
            "http://risa.stanford.edu/redmapper/, or --vizier): labels are matched to its clusters"
        )
    order = _preference(config, tables, messages)
    matches: list[SourceMatch] = []
    rows_of: dict[str, dict[int, int]] = {}
    for name in order:
        found, rows, kinds = _match(tables[name], parent, config)
        matches.append(found)
        rows_of[name] = rows
        tables[name].meta["_kinds"] = kinds
    labels = {tables[name].meta["source"]: _spread(tables[name], rows_of[name], len(parent)) for name in order}
    scale = fit_scale(labels, _reference(config, order, tables, messages), config.bootstrap, seed)
    unlinked = [name for name, value in scale.offset_dex.items() if not np.isfinite(value)]
    if unlinked:
        messages.append(
            f"{', '.join(unlinked)}: too few clusters shared with {scale.reference} to fit an offset; left as published"
        )
    labelled, chosen_rows = _labelled(parent, tables, order, rows_of, scale, config)
    for one in matches:
        one.chosen = int((np.asarray(labelled["label_source"], str) == one.source).sum())
    rest = np.setdiff1d(np.arange(len(parent)), chosen_rows)
    unlabelled = parent[rest]
    for name in ("original_value", "original_err_up", "original_err_low", "original_definition", "reference"):
        unlabelled.remove_column(name)
    spectra = tables.get("spiders")
    for table in (labelled, unlabelled):
        _add_spectroscopic(table, spectra)
        _add_reddening(table, config)
    meta = _meta(config, scale, matches, parent)
    return Labels(
        _checked(labelled, {**meta, "table": "labelled"}),
        _checked(unlabelled, {**meta, "table": "unlabelled"}),
        matches,
        scale,
        messages,
    )


# ---- reading -------------------------------------------------------------------------------------------------------


def _read_all(config: CatalogConfig, progress: Progress) -> tuple[dict[str, QTable], list[str]]:
    """Catalogues by key (a user's own by its file's name), and what was left aside."""
    tables: dict[str, QTable] = {}
    messages: list[str] = []
    if config.vizier is not None:
        wanted = [PARENT, *(name for name in config.preference if name in {one.key for one in CATALOGUES})]
        for done, key in enumerate(wanted):
            progress(done, len(wanted))
            tables[key] = read_published(
                key, concentration=config.concentration, vizier=config.vizier, cache=config.cache
            )
        progress(len(wanted), len(wanted))
        return tables, messages
    assert config.catalogs is not None  # the config holds one of the two
    folder = config.catalogs
    paths = sorted(path for path in folder.iterdir() if path.name.lower().endswith(_FILES)) if folder.is_dir() else []
    if not paths:
        raise Pix2massError(
            f"{folder}: expected a folder with cluster catalogues (FITS, VOTable, CSV or ECSV), found none"
        )
    for done, path in enumerate(paths):
        progress(done, len(paths))
        table = read_published(path, concentration=config.concentration)
        key = table.meta["catalogue"] if table.meta["catalogue"] != "own" else f"own:{table.meta['source']}"
        if key in tables:
            keep, drop = (tables[key], table) if tables[key].meta["form"] == PUBLISHED else (table, tables[key])
            if table.meta["form"] == DERIVED:
                keep, drop = tables[key], table
            messages.append(f"{drop.meta['file']}: {key} is there twice; {keep.meta['file']} is used")
            tables[key] = keep
            continue
        tables[key] = table
        if table.meta["derived"]:
            messages.append(f"{path.name}: {'; '.join(table.meta['notes'])}")
    progress(len(paths), len(paths))
    return tables, messages


def _preference(config: CatalogConfig, tables: Mapping[str, QTable], messages: list[str]) -> list[str]:
    """Keys of the label sources at hand, preferred first; "own" stands for all tables of the user's own."""
    own = [key for key, table in tables.items() if table.meta["catalogue"] == "own"]
    order = [key for name in config.preference for key in (own if name == "own" else [name]) if key in tables]
    for name in config.preference:
        if name != "own":
            catalogue(name)  # a name that nobody knows is an error, one without a file is not
    for key, table in tables.items():
        has_mass = np.isfinite(np.asarray(table["log10_m500c"], float)).any()
        if key in order and not has_mass:
            order.remove(key)
            messages.append(f"{table.meta['file']}: gives no labels: {'; '.join(table.meta['notes'])}")
        elif key not in order:
            why = "left out by --prefer" if has_mass else "; ".join(table.meta["notes"])
            messages.append(f"{table.meta['file']}: gives no labels: {why}")
    if not order:
        raise Pix2massError(
            f"no catalogue with masses: expected at least one of {', '.join(config.preference)}, found "
            f"{', '.join(tables) or 'none beside redMaPPer'}"
        )
    return order


def _reference(config: CatalogConfig, order: list[str], tables: Mapping[str, QTable], messages: list[str]) -> str:
    if config.scale_reference in order:
        return str(tables[config.scale_reference].meta["source"])
    other = str(tables[order[-1]].meta["source"])
    messages.append(f"{config.scale_reference} is not among the label sources: {other} sets the scale")
    return other


# ---- matching ------------------------------------------------------------------------------------------------------


def matching_radius_arcmin(table: QTable) -> np.ndarray:
    """The larger of half of R500 and the position error, per row; NaN where the redshift is missing."""
    z, mass = np.asarray(table["z"], float), np.asarray(table["log10_m500c"], float)
    half_r500 = 0.5 * r500c_kpc(mass, np.where(np.isfinite(z), z, 0.1)) / kpc_per_arcsec(np.where(z > 0, z, 0.1)) / 60
    return np.where(
        np.isfinite(z) & np.isfinite(mass), np.fmax(half_r500, np.asarray(table["position_err_arcmin"], float)), np.nan
    )


def _match(table: QTable, parent: QTable, config: CatalogConfig) -> tuple[SourceMatch, dict[int, int], dict[int, str]]:
    """Match one source: its own counterpart names first, then positions.

    Returns:
        The account; parent row -> row of the table; parent row -> "name" or "position".
    """
    found = SourceMatch(
        table.meta["source"],
        len(table),
        derived=bool(table.meta["derived"]),
        reference=table.meta["reference"],
        file=table.meta["file"],
        notes=list(table.meta["notes"]),
    )
    z, mass = np.asarray(table["z"], float), np.asarray(table["log10_m500c"], float)
    low, high = (float(limit(np.asarray(parent["z"], float))) for limit in (np.nanmin, np.nanmax))
    why = np.full(len(table), "", dtype=object)
    why[~np.isfinite(mass)] = "no usable mass"
    why[~np.isfinite(z)] = "no redshift"
    why[(why == "") & ((z < low - config.dz) | (z > high + config.dz))] = "outside redMaPPer's redshifts"
    why[_duplicates(table, why == "")] = "second entry of the same cluster in this catalogue"
    open_rows = np.flatnonzero(why == "")
    radius = (
        matching_radius_arcmin(table) if config.radius_arcmin is None else np.full(len(table), config.radius_arcmin)
    )
    rows: dict[int, int] = {}
    kinds: dict[int, str] = {}
    if config.counterpart_names and "name_redmapper" in table.colnames:
        by_name = {str(name): row for row, name in enumerate(parent["id"])}
        unknown = 0
        for row in open_rows:
            target = by_name.get(str(table["name_redmapper"][row]))
            if target is None:
                unknown += bool(str(table["name_redmapper"][row]))
                continue
            if not abs(z[row] - float(parent["z"][target])) < config.dz:
                why[row] = f"named counterpart differs in redshift by {config.dz} or more"
            elif target in rows:
                why[row] = "cluster already taken by a closer entry"
            else:
                rows[target], kinds[target] = int(row), "name"
                why[row] = "matched"
        found.by_name = len(rows)
        if unknown:
            found.notes.append(f"{unknown} redMaPPer names are not in the redMaPPer table: their positions decide")
    open_rows = np.flatnonzero(why == "")
    free = np.setdiff1d(np.arange(len(parent)), np.array(sorted(rows), int))
    left, right, reach = table[open_rows], parent[free], radius[open_rows]
    pairs = match_one_to_one(left, right, reach, config.dz)
    for first, second in zip(pairs.first, pairs.second, strict=True):
        rows[int(free[second])], kinds[int(free[second])] = int(open_rows[first]), "position"
        why[open_rows[first]] = "matched"
    found.by_chance = chance_matches(left, right, reach, config.dz, _SHIFT_DEG)
    found.median_radius_arcmin = float(np.median(reach)) if len(reach) else float("nan")
    in_z = set(candidate_pairs(table, parent, np.where(why == "", radius, 0.0), config.dz).first)
    on_sky = set(candidate_pairs(table, parent, np.where(why == "", radius, 0.0), None).first)
    for row in np.flatnonzero(why == ""):
        if row in in_z:
            why[row] = "cluster already taken by a closer entry"
        elif row in on_sky:
            why[row] = f"nearest clusters differ in redshift by {config.dz} or more"
        else:
            why[row] = "no redMaPPer cluster within the radius, or outside its area"
    names, counts = np.unique(why[why != "matched"].astype(str), return_counts=True)
    found.dropped = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
    found.matched = len(rows)
    return found, rows, kinds


def _duplicates(table: QTable, usable: np.ndarray) -> np.ndarray:
    """Rows that repeat another one (1 arcmin, 0.01 in z): the one with the smaller error stays, then the heavier."""
    part = table[np.flatnonzero(usable)]
    numbers = np.flatnonzero(usable)
    pairs = candidate_pairs(part, part, _DUPLICATE_ARCMIN, _DUPLICATE_DZ)
    error = np.nan_to_num(np.asarray(part["log10_m500c_err"], float), nan=np.inf)
    mass = np.asarray(part["log10_m500c"], float)
    repeated = np.zeros(len(table), bool)
    for first, second in zip(pairs.first, pairs.second, strict=True):
        if first < second and not (repeated[numbers[first]] or repeated[numbers[second]]):
            worse = max(first, second, key=lambda row: (error[row], -mass[row], row))
            repeated[numbers[worse]] = True
    return repeated


def _spread(table: QTable, rows: Mapping[int, int], n: int) -> np.ndarray:
    """log10 M500c per parent row, NaN where the source has none."""
    out = np.full(n, np.nan)
    if rows:
        out[list(rows)] = np.asarray(table["log10_m500c"], float)[list(rows.values())]
    return out


# ---- the tables ----------------------------------------------------------------------------------------------------


def _labelled(
    parent: QTable,
    tables: Mapping[str, QTable],
    order: list[str],
    rows_of: Mapping[str, Mapping[int, int]],
    scale: Scale,
    config: CatalogConfig,
) -> tuple[QTable, np.ndarray]:
    """One label per cluster, of the most preferred source that has one, with all that is known about it."""
    chosen = np.array(sorted(set().union(*(set(rows_of[name]) for name in order))), int)
    if len(chosen) == 0:
        raise Pix2massError("no label found its redMaPPer cluster: check that the catalogues cover the same sky")
    out = parent[chosen]
    values: dict[str, list[Any]] = {
        name: []
        for name in (
            "log10_m500c",
            "log10_m500c_err",
            "label_source",
            "label_id",
            "label_z",
            "label_match",
            "label_separation_arcmin",
            "label_derived",
            "original_value",
            "original_err_up",
            "original_err_low",
            "original_definition",
            "reference",
            "scale_offset_dex",
            "scale_offset_err_dex",
            "n_labels",
            "other_labels",
        )
    }
    position = {name: _positions(tables[name]) for name in order}
    parent_position = _positions(parent)
    for target in chosen:
        sources = [name for name in order if target in rows_of[name]]
        name, row = sources[0], rows_of[sources[0]][target]
        table, source = tables[name], str(tables[name].meta["source"])
        offset = scale.offset_dex[source]
        taken = float(np.nan_to_num(offset)) if config.scale == "apply" else 0.0
        values["log10_m500c"].append(float(table["log10_m500c"][row]) - taken)
        values["log10_m500c_err"].append(float(table["log10_m500c_err"][row]))
        values["label_source"].append(source)
        values["label_id"].append(str(table["id"][row]))
        values["label_z"].append(float(table["z"][row]))
        values["label_match"].append(table.meta["_kinds"][target])
        separation = np.arccos(np.clip(position[name][row] @ parent_position[target], -1, 1))
        values["label_separation_arcmin"].append(float(np.rad2deg(separation)) * 60)
        values["label_derived"].append(bool(table.meta["derived"]))
        for kept in ("original_value", "original_err_up", "original_err_low"):
            values[kept].append(float(table[kept][row]))
        for kept in ("original_definition", "reference"):
            values[kept].append(str(table[kept][row]))
        values["scale_offset_dex"].append(offset)
        values["scale_offset_err_dex"].append(scale.error_dex[source])
        values["n_labels"].append(len(sources))
        values["other_labels"].append(
            ";".join(
                f"{tables[other].meta['source']}={float(tables[other]['log10_m500c'][rows_of[other][target]]):.4f}"
                for other in sources[1:]
            )
        )
    for name, column in values.items():
        out[name] = column
    return out, chosen


def _positions(table: QTable) -> np.ndarray:
    """Unit vectors, shape (n, 3)."""
    ra, dec = (np.deg2rad(np.asarray(table[name], float)) for name in ("ra_deg", "dec_deg"))
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)


def _add_spectroscopic(table: QTable, spectra: QTable | None) -> None:
    """Column z_spec: redMaPPer's own where it has one, else that of the SPIDERS cluster at the same place."""
    own = np.asarray(table["z_spec"], float) if "z_spec" in table.colnames else np.full(len(table), np.nan)
    own = np.where(own > 0, own, np.nan)
    if spectra is not None:
        pairs = match_one_to_one(table, spectra, 1.0, 0.05)
        fill = ~np.isfinite(own[pairs.first])
        own[pairs.first[fill]] = np.asarray(spectra["z"], float)[pairs.second[fill]]
    table["z_spec"] = own


def _add_reddening(table: QTable, config: CatalogConfig) -> None:
    ebv, origin = reddening(
        np.asarray(table["ra_deg"], float),
        np.asarray(table["dec_deg"], float),
        np.asarray(table["ebv"], float),
        config.dust_maps,
    )
    table["ebv"], table["ebv_source"] = ebv, origin


def _meta(config: CatalogConfig, scale: Scale, matches: list[SourceMatch], parent: QTable) -> dict[str, Any]:
    applied = {"apply": "subtracted", "carry": "in column scale_offset_dex, not subtracted", "none": "not used"}
    return {
        "parent": f"{parent.meta['source']} ({parent.meta['reference']})",
        "parent_notes": parent.meta["notes"],
        "references": [one.reference for one in matches],
        "preference": [one.source for one in matches],
        "scale_reference": scale.reference,
        "scale_offsets": applied[config.scale],
        "scale_note": "X-ray and SZ scale; may lie 0.1 to 0.15 dex below weak lensing; offsets include selection",
        "concentration": config.concentration,
        "redshift": "z and z_err are redMaPPer's photometric redshift, label_z is the label catalogue's",
    }


def _checked(table: QTable, meta: dict[str, Any]) -> QTable:
    """The project's column order, without what only the reading needed."""
    for name in ("position_err_arcmin", "name_redmapper", "name_mcxc", "name_act", "other_name", "r500_mpc"):
        if name in table.colnames:
            table.remove_column(name)
    kept = {name: table.meta[name] for name in ("mass_definition", "cosmology") if name in table.meta}
    table.meta = {**kept, **meta}
    return check_catalog(table, meta["table"])
