"""Matching of two catalogues by position and redshift, one to one, and the matches that chance alone would make."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.table import Table
from numpy.typing import ArrayLike

from pix2mass.types import Pix2massError


@dataclass(frozen=True)
class Match:
    """Pairs of rows, in order of the first table; each row of either table is in one pair at most.

    Attributes:
        first: row numbers in the first table, shape (n,).
        second: row numbers in the second table, shape (n,).
        separation_arcmin: angle between the two positions, shape (n,).
    """

    first: np.ndarray
    second: np.ndarray
    separation_arcmin: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def candidate_pairs(a: Table, b: Table, radius_arcmin: ArrayLike, dz: float | None) -> Match:
    """All pairs of rows close enough on the sky and in redshift; a row may be in several.

    Args:
        a: columns ra_deg, dec_deg and, unless ``dz`` is None, z.
        b: the same.
        radius_arcmin: largest separation, a number or one per row of ``a``.
        dz: the redshifts must differ by less than this; None compares positions alone. A missing redshift matches none.
    """
    radius = np.broadcast_to(np.asarray(radius_arcmin, float), len(a))
    if len(a) == 0 or len(b) == 0 or not (np.nan_to_num(radius) > 0).any():
        return Match(np.empty(0, int), np.empty(0, int), np.empty(0))
    first, second, separation, _ = search_around_sky(_sky(a), _sky(b), float(np.nanmax(radius)) * u.arcmin)
    arcmin = separation.to_value("arcmin")
    keep = arcmin <= radius[first]
    if dz is not None:
        with np.errstate(invalid="ignore"):
            keep &= np.abs(_column(a, "z")[first] - _column(b, "z")[second]) < dz
    return Match(first[keep], second[keep], arcmin[keep])


def match_one_to_one(a: Table, b: Table, radius_arcmin: ArrayLike, dz: float | None = 0.05) -> Match:
    """Match two tables by position and redshift; where several rows compete, the closest pair on the sky wins.

    Pairs are taken in order of separation, each row at most once (Stable-marriage order: no two rows that are not
    paired with each other are both closer to one another than to their partners).

    Args:
        a: columns ra_deg, dec_deg and, unless ``dz`` is None, z; other columns are not looked at.
        b: the same.
        radius_arcmin: largest separation, a number or one per row of ``a``.
        dz: the redshifts must differ by less than this; None compares positions alone. A missing redshift matches none.

    Returns:
        The pairs, in order of the rows of ``a``.

    Raises:
        Pix2massError: a column is missing, or the radius is not positive.
    """
    for name in ("ra_deg", "dec_deg", *(("z",) if dz is not None else ())):
        for which, table in (("first", a), ("second", b)):
            if name not in table.colnames:
                raise Pix2massError(
                    f"matching: the {which} table has no column {name!r}, only {', '.join(table.colnames)}"
                )
    if np.any(np.asarray(radius_arcmin, float) < 0):
        raise Pix2massError("matching: radius_arcmin is negative; expected an angle in arcmin, 0 or more")
    pairs = candidate_pairs(a, b, radius_arcmin, dz)
    used_a, used_b, kept = set(), set(), []
    for index in np.argsort(pairs.separation_arcmin, kind="stable"):
        row_a, row_b = int(pairs.first[index]), int(pairs.second[index])
        if row_a not in used_a and row_b not in used_b:
            used_a.add(row_a)
            used_b.add(row_b)
            kept.append(index)
    chosen = np.array(sorted(kept, key=lambda index: pairs.first[index]), int)
    return Match(pairs.first[chosen], pairs.second[chosen], pairs.separation_arcmin[chosen])


def chance_matches(
    a: Table, b: Table, radius_arcmin: ArrayLike, dz: float | None = 0.05, shift_deg: float = 0.5
) -> float:
    """Matches expected by chance: the mean over four shifts of ``a`` (north, south, east, west) by ``shift_deg``.

    The shift is far outside any cluster and far inside a survey, so sky density and redshifts stay as they are.
    """
    position = _sky(a)
    counts = []
    for angle_deg in (0.0, 90.0, 180.0, 270.0):
        moved = position.directional_offset_by(angle_deg * u.deg, shift_deg * u.deg)
        table = Table({"ra_deg": moved.ra.deg, "dec_deg": moved.dec.deg})  # type: ignore[union-attr]
        if dz is not None:
            table["z"] = _column(a, "z")
        counts.append(len(match_one_to_one(table, b, radius_arcmin, dz)))
    return float(np.mean(counts))


def _sky(table: Table) -> SkyCoord:
    return SkyCoord(_column(table, "ra_deg"), _column(table, "dec_deg"), unit="deg")


def _column(table: Table, name: str) -> np.ndarray:
    return np.asarray(np.ma.filled(np.ma.asarray(table[name], float), np.nan), float)
