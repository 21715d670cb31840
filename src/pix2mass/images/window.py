"""Which fields SDSS has imaged: from the survey's own list, ``window_flist.fits``, or from SkyServer.

The list is described at https://data.sdss.org/datamodel/files/PHOTO_RESOLVE/window_flist.html: one row per field, with
the centre, the great circle along which it was scanned, its part of that circle, and a score. The frames' own headers
say where their pixels lie; the list says which frames to ask for.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.table import Table
from scipy.spatial import KDTree

from pix2mass.images.archive import BadFrame, Field, Folder, Http
from pix2mass.images.frame_index import FrameIndex, Progress, chord, unit_vectors
from pix2mass.images.http import user_agent
from pix2mass.types import BANDS, SDSS_PIXEL_SCALE_ARCSEC, Pix2massError

WINDOW_FLIST = "dr12/boss/resolve/2013-07-29/window_flist.fits"
"""The list's place in the archive: the resolve run that DR12 uses."""

MARGIN_ARCSEC = 20.0
"""How far a frame may lie off its place in the list. Bands differ by up to 14 pixels (5.5"); in the photoField of run
94, camera column 1, the middle of MU_START and MU_END is up to 10.7" from the field's centre."""

OVERLAP_PIXELS = 128
"""A frame is larger than its field's part of the great circle by this many pixels in both directions: 2048 x 1489
against 1920 x 1361 (photoField of run 94: NU 760.3", MU 538.9" at 0.396" per pixel)."""

RERUN = 301
_REACH_DEG = 0.16 + MARGIN_ARCSEC / 3600.0
"""A little more than half the diagonal of a frame, 0.14 degrees, and the margin."""
MAX_SKYSERVER_POSITIONS = 100

_COLUMNS = {
    "RUN": "J",
    "RERUN": "3A",
    "CAMCOL": "I",
    "FIELD": "J",
    "RA": "D",
    "DEC": "D",
    "NODE": "D",
    "INCL": "D",
    "MU_START": "D",
    "MU_END": "D",
    "NU_START": "D",
    "NU_END": "D",
    "SCORE": "E",
}
"""Columns that are used, with their FITS formats."""


def to_great_circle(
    ra_deg: np.ndarray | float, dec_deg: np.ndarray | float, node_deg: np.ndarray | float, incl_deg: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Great-circle coordinates mu, nu of positions: the sphere turned about the node by the inclination.

    Source: https://www.sdss.org/dr14/algorithms/surveycoords/ and Stoughton et al. 2002, AJ 123, 485, section 3.2.2:
    sin(nu) = sin(dec) cos(i) - cos(dec) sin(ra - node) sin(i),
    tan(mu - node) = (cos(dec) sin(ra - node) cos(i) + sin(dec) sin(i)) / (cos(dec) cos(ra - node)).

    Args:
        ra_deg: right ascension.
        dec_deg: declination.
        node_deg: right ascension of the circle's ascending node.
        incl_deg: inclination i of the circle to the equator.

    Returns:
        mu (0 to 360 degrees) and nu in degrees.
    """
    x, y, z = np.moveaxis(unit_vectors(np.asarray(ra_deg) - node_deg, dec_deg), -1, 0)
    incl = np.radians(incl_deg)
    mu = np.degrees(np.arctan2(y * np.cos(incl) + z * np.sin(incl), x)) + node_deg
    return mu % 360.0, np.degrees(np.arcsin(np.clip(z * np.cos(incl) - y * np.sin(incl), -1.0, 1.0)))


def from_great_circle(
    mu_deg: np.ndarray | float, nu_deg: np.ndarray | float, node_deg: np.ndarray | float, incl_deg: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Right ascension (0 to 360) and declination, in degrees: the inverse of ``to_great_circle``.

    Args:
        mu_deg: longitude along the circle, equal to the right ascension at the node.
        nu_deg: latitude above it.
        node_deg: right ascension of the circle's ascending node.
        incl_deg: inclination of the circle to the equator.
    """
    return to_great_circle(mu_deg, nu_deg, node_deg, -np.asarray(incl_deg))


def read_window_flist(path: str | Path, around: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None) -> FrameIndex:
    """Index the fields of rerun 301 whose score is above 0, all five bands of each.

    A field's footprint is a rectangle around its centre, along and across its great circle, as long and as wide as its
    range of mu and nu and the overlap of frames; ``MARGIN_ARCSEC`` allows for the bands.

    Args:
        path: ``window_flist.fits``.
        around: right ascensions and declinations of positions (n,), ICRS degrees, and the widths of the squares around
            them (n,), arcsec: only fields that these may need are taken, which are few enough to hand to other
            processes.

    Raises:
        Pix2massError: the file is missing, or lacks columns.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with fits.open(path, memmap=True) as hdus:
                data: Any = hdus[1].data  # type: ignore[union-attr]
                names = {name.upper(): name for name in data.names}
                _need(names, str(path))
                rows = slice(None) if around is None else _near(data[names["RA"]], data[names["DEC"]], *around)
                table = Table({name: np.array(data[names[name]][rows]) for name in _COLUMNS})
    except Pix2massError:
        raise
    except Exception as error:  # astropy fails in many ways on damaged files
        raise Pix2massError(
            f"{path}: expected the list of SDSS fields (window_flist.fits), a FITS table: {error}; "
            "delete it, and it is fetched again"
        ) from None
    return _index(table)


def write_window_flist(path: str | Path, index: FrameIndex, scores: Mapping[Field, float] | None = None) -> None:
    """Write the fields of an index as a list of the survey's own form, with the columns that are read here.

    The great circle of a field is the one through its centre along its columns, so that nu is 0 there.

    Args:
        path: file to write; its folder is made.
        index: the frames; of each field the r band's place is used, or that of the first band it has.
        scores: quality of fields, 0 to 1; 0.8 for those not named.
    """
    chosen: dict[Field, Any] = {}
    for row in index.table:
        field = Field(int(row["run"]), int(row["camcol"]), int(row["field"]))
        if field not in chosen or "r" in str(row["band"]):
            chosen[field] = row
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for field, row in sorted(chosen.items(), key=lambda item: item[0]):
        cd = np.array([[row["cd1_1"], row["cd1_2"]], [row["cd2_1"], row["cd2_2"]]], float)
        size = np.array([row["naxis1"], row["naxis2"]], float)
        centre, east, north = _centre_basis(row, cd, size)
        along = cd[0, 1] * east + cd[1, 1] * north
        pole = np.cross(centre, along / np.linalg.norm(along))
        node = np.degrees(np.arctan2(pole[0], -pole[1])) % 360.0
        incl = np.degrees(np.arccos(np.clip(pole[2], -1.0, 1.0)))
        ra = np.degrees(np.arctan2(centre[1], centre[0])) % 360.0
        dec = np.degrees(np.arcsin(centre[2]))
        mu, nu = (float(value) for value in to_great_circle(ra, dec, node, incl))
        across_deg, along_deg = np.maximum(size - OVERLAP_PIXELS, 1.0) / 2.0 * np.hypot(*cd)
        values = (
            *(field.run, str(RERUN), field.camcol, field.field, ra, dec, node, incl),
            *(mu - along_deg, mu + along_deg, nu - across_deg, nu + across_deg),
            (scores or {}).get(field, 0.8),
        )
        for name, value in zip(_COLUMNS, values, strict=True):
            columns[name].append(value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = fits.BinTableHDU.from_columns(
        [fits.Column(name, form, array=np.array(columns[name])) for name, form in _COLUMNS.items()]
    )
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(path, overwrite=True)


def find_window_flist(archive: Folder | Http) -> Path | None:
    """The list of an archive, fetched into the cache once; None where the archive has none.

    Raises:
        Pix2massError: the archive does not answer, or the list cannot be fetched.
    """
    try:
        return archive.local(WINDOW_FLIST)
    except BadFrame as problem:
        raise Pix2massError(
            f"{archive}/{WINDOW_FLIST}: {problem}; it lists the fields: run the same command again, or give a frame "
            "index (--frame-index FILE)"
        ) from None


def ask_skyserver(
    server: str,
    ra_deg: np.ndarray,
    dec_deg: np.ndarray,
    width_arcsec: np.ndarray,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> FrameIndex:
    """Index the fields around a few positions, asked of SkyServer's tables Field and Run by SQL.

    Args:
        server: base URL, e.g. https://skyserver.sdss.org.
        ra_deg: right ascensions (n,), ICRS degrees.
        dec_deg: declinations (n,).
        width_arcsec: widths of the squares around them (n,).
        cache: folder that keeps the answer: the same question is asked once.
        progress: called with (positions done, in all).

    Raises:
        Pix2massError: too many positions, or the service does not answer as SkyServer does.
    """
    if len(ra_deg) > MAX_SKYSERVER_POSITIONS:
        raise Pix2massError(
            f"{len(ra_deg)} positions are too many to ask SkyServer about, at most {MAX_SKYSERVER_POSITIONS}; "
            "use --fields list, which reads the survey's list of fields once"
        )
    if not server.startswith(("http://", "https://")):
        raise Pix2massError(f"{server}: expected an http(s) URL such as https://skyserver.sdss.org")
    question = repr((server, np.c_[ra_deg, dec_deg, width_arcsec].round(6).tolist()))
    kept = None
    if cache is not None:
        kept = Path(cache) / f"skyserver-{hashlib.blake2b(question.encode(), digest_size=8).hexdigest()}.fits"
        if kept.exists():
            return FrameIndex.from_file(kept)
    rows = []
    for done, (ra, dec, width) in enumerate(zip(ra_deg, dec_deg, width_arcsec, strict=True)):
        rows.append(_query(server, float(ra), float(dec), float(width)))
        if progress is not None:
            progress(done + 1, len(ra_deg))
    merged = {name: np.concatenate([part[name] for part in rows]) for name in _COLUMNS}
    _, first = np.unique(np.c_[merged["RUN"], merged["CAMCOL"], merged["FIELD"]].astype(int), axis=0, return_index=True)
    index = _index(Table({name: values[first] for name, values in merged.items()}))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f".{kept.name}")
        index.to_file(part)
        part.replace(kept)
    return index


def _near(
    field_ra_deg: np.ndarray, field_dec_deg: np.ndarray, ra_deg: np.ndarray, dec_deg: np.ndarray, width: np.ndarray
) -> np.ndarray:
    """Rows of the fields whose frames may reach into squares around positions, sorted."""
    known = np.flatnonzero(np.isfinite(field_ra_deg) & np.isfinite(field_dec_deg))
    tree = KDTree(unit_vectors(np.asarray(field_ra_deg[known], float), np.asarray(field_dec_deg[known], float)))
    reach = np.minimum(_REACH_DEG + 0.75 * width / 3600.0, 180.0)
    found = tree.query_ball_point(unit_vectors(ra_deg, dec_deg), chord(reach))
    return known[np.unique(np.concatenate([np.asarray(rows, int) for rows in found]))]


def _query(server: str, ra_deg: float, dec_deg: float, width_arcsec: float) -> dict[str, np.ndarray]:
    from astroquery.sdss import SDSSClass, conf

    reach = _REACH_DEG + 0.75 * width_arcsec / 3600.0
    low, high = dec_deg - reach, dec_deg + reach
    where = f"f.dec BETWEEN {low:.6f} AND {high:.6f}"
    if max(abs(low), abs(high)) < 89.0:
        wide = np.degrees(np.arcsin(np.sin(np.radians(reach)) / np.cos(np.radians(dec_deg))))
        left, right = (ra_deg - wide) % 360.0, (ra_deg + wide) % 360.0
        joint = "AND" if left < right else "OR"
        where += f" AND (f.ra >= {left:.6f} {joint} f.ra <= {right:.6f})"
    columns = {
        **{name: f"f.{name.lower()}" for name in ("RUN", "RERUN", "CAMCOL", "FIELD", "RA", "DEC", "SCORE")},
        **{name: f"r.{name.lower()}" for name in ("NODE", "INCL")},
        **{"MU_START": "f.muStart", "MU_END": "f.muEnd", "NU_START": "f.nuStart", "NU_END": "f.nuEnd"},
    }
    sql = (
        f"SELECT {', '.join(f'{source} AS {name}' for name, source in columns.items())} FROM Field AS f "
        f"JOIN Run AS r ON f.run = r.run AND f.rerun = r.rerun WHERE f.rerun = {RERUN} AND {where}"
    )
    service = SDSSClass()
    service._session.headers["User-Agent"] = user_agent()
    try:
        with warnings.catch_warnings(), conf.set_temp("skyserver_baseurl", server.rstrip("/")):
            warnings.simplefilter("ignore")
            table: Any = service.query_sql(sql, timeout=60, data_release=12, cache=False)
    except Exception as error:  # noqa: BLE001  requests, astropy and astroquery each have errors of their own
        raise Pix2massError(
            f"{server}: SkyServer did not answer the question for the fields around RA {ra_deg:.4f}, "
            f"Dec {dec_deg:.4f} ({error}); try again, or use --fields list"
        ) from None
    if table is None:
        return {name: np.empty(0) for name in _COLUMNS}
    names = {name.upper(): name for name in table.colnames}
    _need(names, server)
    return {name: np.asarray(table[names[name]], float) for name in _COLUMNS}


def _need(names: Mapping[str, str], where: str) -> None:
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise Pix2massError(
            f"{where}: expected the list of SDSS fields with the columns {', '.join(_COLUMNS)}; "
            f"missing: {', '.join(missing)}"
        )


def _index(table: Table) -> FrameIndex:
    """Footprints of fields as an index: tangent planes at the centres, rows along mu, columns along nu."""
    rerun = np.char.strip(np.asarray(table["RERUN"]).astype(str))
    table = table[np.isin(rerun, (str(RERUN), f"{RERUN}.0"))]
    ra, dec, node, incl, mu0, mu1, nu0, nu1, score = (
        np.asarray(table[name], float)
        for name in ("RA", "DEC", "NODE", "INCL", "MU_START", "MU_END", "NU_START", "NU_END", "SCORE")
    )
    usable = np.isfinite([ra, dec, node, incl, mu0, mu1, nu0, nu1]).all(axis=0) & (score > 0.0)
    table = table[usable]
    ra, dec, node, incl, mu0, mu1, nu0, nu1, score = (
        values[usable] for values in (ra, dec, node, incl, mu0, mu1, nu0, nu1, score)
    )
    centre = unit_vectors(ra, dec)
    east = np.stack([-np.sin(np.radians(ra)), np.cos(np.radians(ra)), np.zeros_like(ra)], axis=-1)
    north = np.cross(centre, east)
    pole_ra, pole_dec = node - 90.0, 90.0 - incl
    pole = unit_vectors(pole_ra, pole_dec)
    along = np.cross(pole, centre)
    along /= np.linalg.norm(along, axis=1)[:, None]
    across = np.cross(centre, along)
    scale_deg = SDSS_PIXEL_SCALE_ARCSEC / 3600.0
    nu = np.radians((nu0 + nu1) / 2.0)
    rows = ((mu1 - mu0) % 360.0) * np.cos(nu) / scale_deg + OVERLAP_PIXELS
    cols = np.abs(nu1 - nu0) / scale_deg + OVERLAP_PIXELS
    n = len(table)
    return FrameIndex(
        Table(
            {
                "run": np.asarray(table["RUN"]).astype(np.int32),
                "camcol": np.asarray(table["CAMCOL"]).astype(np.int16),
                "field": np.asarray(table["FIELD"]).astype(np.int32),
                "band": np.full(n, BANDS),
                "suffix": np.full(n, ".fits.bz2"),
                "crval1": ra,
                "crval2": dec,
                "crpix1": (cols + 1.0) / 2.0,
                "crpix2": (rows + 1.0) / 2.0,
                "cd1_1": scale_deg * (across * east).sum(axis=1),
                "cd1_2": scale_deg * (along * east).sum(axis=1),
                "cd2_1": scale_deg * (across * north).sum(axis=1),
                "cd2_2": scale_deg * (along * north).sum(axis=1),
                "naxis1": cols,
                "naxis2": rows,
                "margin_arcsec": np.full(n, MARGIN_ARCSEC),
                "score": score,
            }
        )
    )


def _centre_basis(row: Any, cd: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Towards a frame's centre, and east and north of its tangent point: unit vectors (3,)."""
    ra, dec = np.radians(float(row["crval1"])), np.radians(float(row["crval2"]))
    normal = np.array([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])
    east = np.array([-np.sin(ra), np.cos(ra), 0.0])
    north = np.cross(normal, east)
    xi, eta = np.radians(cd @ ((size + 1.0) / 2.0 - np.array([row["crpix1"], row["crpix2"]], float)))
    centre = normal + xi * east + eta * north
    return centre / np.linalg.norm(centre), east, north
