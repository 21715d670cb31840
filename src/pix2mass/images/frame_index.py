"""Which SDSS frames exist and where on the sky they lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from astropy.table import QTable, Table
from scipy.spatial import KDTree

from pix2mass.images.archive import FRAME_NAME, BadFrame, Field, Folder, Http, frame_path, open_archive
from pix2mass.images.frame import WCS_COLUMNS, check_identity, read_header, wcs_row
from pix2mass.types import BANDS, Pix2massError

_SAMPLES = 24
"""Points on a side of a square at which its coverage is looked at, where scores choose."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class FrameIndex:
    """Which frames exist and where on the sky each of them lies.

    Attributes:
        table: one row per footprint: ``run, camcol, field``, ``band`` (the band, or all bands that share the footprint,
            e.g. ugriz), ``suffix`` (.fits or .fits.bz2) and its WCS (``crval1`` to ``naxis2``, FITS conventions,
            degrees). The header's own WCS differs between the bands of a field by up to 14 pixels; one that stands for
            all of them has ``margin_arcsec``, by which a frame may lie off. ``score`` is the field's quality, best 1.
    """

    def __init__(self, table: Table) -> None:
        """Make an index from a table.

        Args:
            table: with the columns that the class names; ``margin_arcsec`` and ``score`` may be missing.

        Raises:
            Pix2massError: columns are missing or hold values that no frame has.
        """
        needed = ("run", "camcol", "field", "band", "suffix", *WCS_COLUMNS)
        missing = [name for name in needed if name not in table.colnames]
        if missing:
            raise Pix2massError(
                f"frame index: expected the columns {', '.join(needed)}; missing: {', '.join(missing)}; "
                "make the index anew with FrameIndex.from_base(BASE).to_file(FILE)"
            )
        bands, band = np.unique(np.asarray(table["band"], str), return_inverse=True)
        suffixes, suffix = np.unique(np.asarray(table["suffix"], str), return_inverse=True)
        wrong = sorted(set(suffixes.tolist()) - {".fits", ".fits.bz2"})
        wrong += [text for text in bands.tolist() if not text or text != "".join(b for b in BANDS if b in text)]
        if wrong:
            raise Pix2massError(f"frame index: expected bands of {BANDS} and suffixes .fits, .fits.bz2, got {wrong}")
        if any(np.asarray(table[name]).dtype.kind not in "iu" for name in ("run", "camcol", "field")):
            raise Pix2massError("frame index: expected whole numbers in the columns run, camcol and field")
        self.table = table
        self._place = np.stack([np.asarray(table[name], np.int64) for name in ("run", "camcol", "field")], axis=1)
        self._bands, self._band = bands.tolist(), band.reshape(-1)
        self._suffixes, self._suffix = suffixes.tolist(), suffix.reshape(-1)
        self._wcs = np.stack([np.asarray(table[name], float) for name in WCS_COLUMNS], axis=1).reshape(-1, 10)
        crval, crpix, cd, naxis = _split_wcs(self._wcs)
        if not (np.isfinite(self._wcs).all() and (np.linalg.det(cd) != 0.0).all()):
            raise Pix2massError("frame index: expected finite numbers and a matrix cd that can be inverted in each row")
        extra = {
            name: np.asarray(table[name], float) if name in table.colnames else np.zeros(len(table))
            for name in ("margin_arcsec", "score")
        }
        self._score = extra["score"] if "score" in table.colnames else None
        self._margin_px = extra["margin_arcsec"] / 3600.0 / np.sqrt(np.abs(np.linalg.det(cd)))
        offset = np.einsum("kij,kj->ki", cd, (naxis + 1.0) / 2.0 - crpix)
        self._centres = unit_vectors(*_deproject(offset[:, 0], offset[:, 1], crval[:, 0], crval[:, 1]))
        reach = naxis + 2.0 * self._margin_px[:, None]
        self._radius_deg = 0.5 * np.hypot(*np.einsum("kij,kj->ik", np.abs(cd), reach))
        keys = _keys(*self._place.T)
        self._by_key = np.argsort(keys, kind="stable")
        self._keys = keys[self._by_key]
        self._tree = KDTree(self._centres) if len(table) else None

    def __len__(self) -> int:
        return len(self._place)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.table,)

    @property
    def fields(self) -> list[Field]:
        """All fields, sorted."""
        return [Field(*place) for place in np.unique(self._place, axis=0).tolist()]

    @classmethod
    def from_base(cls, base: str | Path | Folder | Http, progress: Progress | None = None) -> Self:
        """Index the frames of an archive by reading the start of each file.

        Args:
            base: folder, or http(s) URL with directory listings, that holds ``dr12/boss/photoObj/frames/301``; or an
                archive that is open already.
            progress: called with (frames done, frames in all).

        Returns:
            The index. A frame whose header cannot be read keeps its place on the sky from another band of its field, so
            that cutouts there are flagged; without such a band it is left out, with a warning.

        Raises:
            Pix2massError: there are no frames, or too many for directory listings.
        """
        archive = open_archive(base)
        try:
            paths = archive.frame_paths()
            # A frame that lies there both ways is taken from the compressed file.
            matches = ((FRAME_NAME.fullmatch(path.rsplit("/", 1)[-1]), path) for path in paths)
            names = {match[0].removesuffix(".bz2"): (match, path) for match, path in matches if match}
            rows, failed = [], []
            for done, (match, path) in enumerate(names.values()):
                band, run, camcol, number, suffix = match.groups()
                field = Field(int(run), int(camcol), int(number))
                place = {**field._asdict(), "band": band, "suffix": suffix}
                try:
                    header = read_header(archive.chunks(path), suffix.endswith(".bz2"))
                    check_identity(header, field, band)
                    rows.append({**place, **wcs_row(header)})
                except BadFrame as problem:
                    failed.append((place, path, str(problem)))
                if progress is not None:
                    progress(done + 1, len(names))
        finally:
            if archive is not base:
                archive.close()
        siblings = {(row["run"], row["camcol"], row["field"]): row for row in rows}
        for place, path, problem in failed:
            sibling = siblings.get((place["run"], place["camcol"], place["field"]))
            fate = "left out of the index" if sibling is None else "its band is missing from cutouts there"
            warnings.warn(f"{base}/{path}: {problem}; {fate}", stacklevel=2)
            if sibling is not None:
                rows.append({**sibling, **place})
        if not rows:
            raise Pix2massError(
                f"{base}: expected frames such as {frame_path(Field(94, 1, 12), 'r', '.fits.bz2')}, found none "
                "that can be read"
            )
        rows.sort(key=lambda row: (row["run"], row["camcol"], row["field"], BANDS.index(row["band"])))
        return cls(Table(rows=rows, names=list(rows[0])))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read an index written by ``to_file``.

        Raises:
            Pix2massError: the file is missing or is no frame index.
        """
        path = Path(path)
        if not path.is_file():
            raise Pix2massError(f"{path}: no such file; expected a frame index")
        try:
            table = Table.read(path) if path.suffix in (".fits", ".fit") else Table.read(path, format="ascii.ecsv")
            table.convert_bytestring_to_unicode()
        except Exception as error:  # astropy's readers fail in many ways
            raise Pix2massError(f"{path}: expected a frame index (ECSV or FITS table): {error}") from None
        try:
            return cls(table)
        except Pix2massError as error:
            raise Pix2massError(f"{path}: {error}") from None

    def to_file(self, path: str | Path) -> None:
        """Write the index as ECSV, or as a FITS table where the name ends in .fits (better for 100,000 frames)."""
        path = Path(path)
        self.table.write(path, format="fits" if path.suffix in (".fits", ".fit") else "ascii.ecsv", overwrite=True)

    def suffix(self, field: Field, band: str) -> str | None:
        """File suffix of a frame, None where the index does not have it."""
        key = _keys(*field)
        for row in self._by_key[np.searchsorted(self._keys, key) : np.searchsorted(self._keys, key, "right")]:
            if band in self._bands[self._band[row]]:
                return self._suffixes[self._suffix[row]]
        return None

    def covering(self, ra_deg: float, dec_deg: float, width_arcsec: float) -> dict[str, list[Field]]:
        """Fields that a square on the sky overlaps, band by band.

        In an index with scores, runs and camera columns are taken in order of their score in the square, best first,
        until it is covered; the others are left out. Without scores all are taken.

        Args:
            ra_deg: right ascension of the square's centre, ICRS degrees.
            dec_deg: declination of its centre.
            width_arcsec: its width; its sides run north and east.

        Returns:
            For each band that has any, the fields whose frame overlaps the square, sorted.
        """
        half_deg = width_arcsec / 7200.0
        if self._tree is None:
            return {}
        centre = unit_vectors(ra_deg, dec_deg)
        near = self._tree.query_ball_point(centre, chord(np.minimum(self._radius_deg.max() + 1.5 * half_deg, 180.0)))
        near = np.sort(np.asarray(near, int))
        reach = np.minimum(self._radius_deg[near] + 1.5 * half_deg, 90.0)
        near = near[self._centres[near] @ centre >= np.cos(np.radians(reach))]
        if not near.size:
            return {}
        crval, crpix, cd, naxis = _split_wcs(self._wcs[near])
        margin = self._margin_px[near, None]
        signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
        # Two convex quadrilaterals are apart if and only if a side of one of them separates them.
        corners = (naxis + 1.0)[:, None] / 2.0 + signs * (naxis / 2.0 + margin)[:, None]
        offset = np.einsum("kij,kcj->kci", cd, corners - crpix[:, None])
        sky = _deproject(offset[..., 0], offset[..., 1], crval[:, :1], crval[:, 1:])
        in_square = np.stack(_project(*sky, ra_deg, dec_deg), axis=-1)
        sky = _deproject(signs[:, 0] * half_deg, signs[:, 1] * half_deg, ra_deg, dec_deg)
        offset = np.stack(_project(*sky, crval[:, :1], crval[:, 1:]), axis=-1)
        in_frame = np.einsum("kij,kcj->kci", np.linalg.inv(cd), offset) + crpix[:, None]
        overlap = (in_square.min(1) < half_deg) & (in_square.max(1) > -half_deg)
        overlap &= (in_frame.min(1) < naxis + 0.5 + margin) & (in_frame.max(1) > 0.5 - margin)
        near = near[overlap.all(axis=1)]
        if self._score is not None and near.size:
            near = near[self._best(near, ra_deg, dec_deg, half_deg)]
        found: dict[str, list[Field]] = {}
        for row in near:
            for band in self._bands[self._band[row]]:
                run, camcol, number = self._place[row].tolist()
                found.setdefault(band, []).append(Field(run, camcol, number))
        return {band: sorted(found[band]) for band in BANDS if band in found}

    def _best(self, rows: np.ndarray, ra_deg: float, dec_deg: float, half_deg: float) -> np.ndarray:
        """Which of the rows are needed to cover a square, best runs and columns first; bool (len(rows),)."""
        assert self._score is not None
        at = np.linspace(-half_deg, half_deg, _SAMPLES)
        xi, eta = (grid.ravel() for grid in np.meshgrid(at, at))
        points = unit_vectors(*_deproject(xi, eta, ra_deg, dec_deg))
        crval, crpix, cd, naxis = _split_wcs(self._wcs[rows])
        normal, east, north = _basis(crval[:, 0], crval[:, 1])
        depth = points @ normal.T
        plane = np.degrees(np.stack([points @ east.T, points @ north.T], axis=-1) / depth[..., None])
        pixel = np.einsum("kij,pkj->pki", np.linalg.inv(cd), plane) + crpix
        outside = np.abs(pixel - (naxis + 1.0) / 2.0) - naxis / 2.0
        margin = self._margin_px[rows, None]
        surely, perhaps = (outside <= -margin).all(axis=2), (outside <= margin).all(axis=2)
        strips, strip = np.unique(self._place[rows, :2], axis=0, return_inverse=True)
        strip = strip.reshape(-1)
        members = [strip == number for number in range(len(strips))]
        scores = self._score[rows]
        order = sorted(
            range(len(strips)),
            key=lambda number: (-_mean_score(scores[members[number]], perhaps[:, members[number]]), number),
        )
        left = np.ones(len(points), bool)
        chosen = np.zeros(len(rows), bool)
        # What lies so close to a frame's edge that nobody knows is left to all who may have it.
        for covered, certain in ((surely, True), (perhaps, False)):
            for number in order:
                mine = covered[:, members[number]].any(axis=1)
                if (mine & left).any():
                    chosen |= members[number]
                    if certain:
                        left &= ~mine
        return chosen


def _split_wcs(wcs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (k, 10) as crval (k, 2), crpix (k, 2), cd (k, 2, 2) and naxis (k, 2)."""
    return wcs[:, 0:2], wcs[:, 2:4], wcs[:, 4:8].reshape(-1, 2, 2), wcs[:, 8:10]


def _keys(run, camcol, field) -> Any:
    """One number per field, in the fields' own order."""
    return (np.int64(run) << 28) | (np.int64(camcol) << 24) | np.int64(field)


def chord(angle_deg):
    """Distance between two points of the unit sphere that are an angle apart."""
    return 2.0 * np.sin(np.radians(angle_deg) / 2.0)


def _basis(ra_deg: np.ndarray, dec_deg: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors (..., 3) towards positions, and there towards east and north."""
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    east = np.stack([-np.sin(ra), np.cos(ra), np.zeros_like(ra)], axis=-1)
    north = np.stack([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)], axis=-1)
    return unit_vectors(ra_deg, dec_deg), east, north


def _mean_score(scores: np.ndarray, covered: np.ndarray) -> float:
    """Score of a strip in a square: the best of its fields at each point (p, k) that it covers, averaged."""
    best = np.where(covered, scores, 0.0).max(axis=1)
    some = covered.any(axis=1)
    return float(best[some].mean()) if some.any() else 0.0


def unit_vectors(ra_deg: np.ndarray | float, dec_deg: np.ndarray | float) -> np.ndarray:
    """Unit vectors (..., 3) towards positions in degrees."""
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    return np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=-1)


def _deproject(xi_deg, eta_deg, ra0_deg, dec0_deg) -> tuple[np.ndarray, np.ndarray]:
    """Sky position of tangent-plane coordinates (Calabretta & Greisen 2002, A&A 395, 1077, section 5.1.3)."""
    xi, eta, dec0 = np.radians(xi_deg), np.radians(eta_deg), np.radians(dec0_deg)
    depth = np.cos(dec0) - eta * np.sin(dec0)
    ra = ra0_deg + np.degrees(np.arctan2(xi, depth))
    dec = np.degrees(np.arctan2(np.sin(dec0) + eta * np.cos(dec0), np.hypot(xi, depth)))
    return ra, dec


def _project(ra_deg, dec_deg, ra0_deg, dec0_deg) -> tuple[np.ndarray, np.ndarray]:
    """Tangent-plane coordinates, degrees east and north, of positions less than 90 degrees from the tangent point."""
    ra, dec, dec0 = np.radians(ra_deg - ra0_deg), np.radians(dec_deg), np.radians(dec0_deg)
    depth = np.sin(dec) * np.sin(dec0) + np.cos(dec) * np.cos(dec0) * np.cos(ra)
    xi = np.cos(dec) * np.sin(ra) / depth
    eta = (np.sin(dec) * np.cos(dec0) - np.cos(dec) * np.sin(dec0) * np.cos(ra)) / depth
    return np.degrees(xi), np.degrees(eta)


def random_positions(
    index: FrameIndex, n_per_field: int, seed: int, margin_arcsec: float = 60.0, z: float | None = None
) -> QTable:
    """Random positions inside frames, e.g. for training images without clusters or labels.

    Args:
        index: the frames; of each field the r band's footprint is used, or that of the first band it has.
        n_per_field: positions in each field.
        seed: a field's positions depend on the seed and on the field alone.
        margin_arcsec: least distance from the frame's edge.
        z: redshift to put into the table, NaN by default.

    Returns:
        Columns ``id`` (RUN-CAMCOL-FIELD-NUMBER), ``ra_deg``, ``dec_deg``, ``z``, ``group`` (RUN-CAMCOL-FIELD).

    Raises:
        Pix2massError: a number is out of range, or the margin leaves nothing of a frame.
    """
    if n_per_field < 1 or margin_arcsec < 0.0:
        raise Pix2massError(
            f"random positions: expected n_per_field of 1 or more and margin_arcsec of 0 or more, got {n_per_field} "
            f"and {margin_arcsec}"
        )
    chosen: dict[Field, int] = {}
    for k, place in enumerate(index._place.tolist()):
        if (field := Field(*place)) not in chosen or "r" in index._bands[index._band[k]]:
            chosen[field] = k
    names, groups, ra_parts, dec_parts = [], [], [], []
    for field in index.fields:
        crval, crpix, cd, naxis = (part[0] for part in _split_wcs(index._wcs[chosen[field]][None]))
        margin_px = margin_arcsec / 3600.0 / np.sqrt(abs(np.linalg.det(cd)))
        if 2.0 * margin_px >= naxis.min():
            raise Pix2massError(
                f"random positions: a margin of {margin_arcsec:g} arcsec leaves nothing of field {field}, "
                f"{naxis[0]:.0f} x {naxis[1]:.0f} pixels; give a smaller margin"
            )
        rng = np.random.default_rng([seed, *field])
        pixel = 0.5 + margin_px + rng.random((n_per_field, 2)) * (naxis - 2.0 * margin_px)
        offset = (pixel - crpix) @ cd.T
        ra_deg, dec_deg = _deproject(offset[:, 0], offset[:, 1], *crval)
        ra_parts.append(ra_deg % 360.0)
        dec_parts.append(dec_deg)
        names += [f"{field}-{k:04d}" for k in range(n_per_field)]
        groups += [str(field)] * n_per_field
    redshift = np.full(len(names), np.nan if z is None else z)
    return QTable(
        {
            "id": names,
            "ra_deg": np.concatenate(ra_parts),
            "dec_deg": np.concatenate(dec_parts),
            "z": redshift,
            "group": groups,
        }
    )
