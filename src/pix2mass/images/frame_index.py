"""Which SDSS frames exist and where on the sky they lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from astropy.table import QTable, Table

from pix2mass.images.archive import FRAME_NAME, BadFrame, Field, frame_path, open_archive
from pix2mass.images.frame import WCS_COLUMNS, check_identity, read_header, wcs_row
from pix2mass.types import BANDS, Pix2massError

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class FrameIndex:
    """Which frames exist and where on the sky each band of each field lies.

    Attributes:
        table: one row per frame: ``run, camcol, field, band, suffix`` (.fits or .fits.bz2) and the frame's own WCS
            (``crval1`` to ``naxis2``, FITS conventions, degrees). Bands of a field differ by up to 14 pixels.
    """

    def __init__(self, table: Table) -> None:
        """Make an index from a table.

        Args:
            table: with the columns that the class names.

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
        columns = {name: np.asarray(table[name]).tolist() for name in needed[:5]}
        self._bands: list[str] = columns["band"]
        wrong = sorted(set(columns["suffix"]) - {".fits", ".fits.bz2"}) + sorted(set(self._bands) - set(BANDS))
        if wrong:
            raise Pix2massError(f"frame index: expected bands of {BANDS} and suffixes .fits, .fits.bz2, got {wrong}")
        if any(np.asarray(table[name]).dtype.kind not in "iu" for name in ("run", "camcol", "field")):
            raise Pix2massError("frame index: expected whole numbers in the columns run, camcol and field")
        self.table = table
        self._fields = [
            Field(*place) for place in zip(columns["run"], columns["camcol"], columns["field"], strict=True)
        ]
        self._suffix = dict(zip(zip(self._fields, self._bands, strict=True), columns["suffix"], strict=True))
        self._wcs = np.stack([np.asarray(table[name], float) for name in WCS_COLUMNS], axis=1).reshape(-1, 10)
        crval, crpix, cd, naxis = _split_wcs(self._wcs)
        if not (np.isfinite(self._wcs).all() and (np.linalg.det(cd) != 0.0).all()):
            raise Pix2massError("frame index: expected finite numbers and a matrix cd that can be inverted in each row")
        offset = np.einsum("kij,kj->ki", cd, (naxis + 1.0) / 2.0 - crpix)
        self._centres = _unit_vectors(*_deproject(offset[:, 0], offset[:, 1], crval[:, 0], crval[:, 1]))
        self._radius_deg = 0.5 * np.hypot(*np.einsum("kij,kj->ik", np.abs(cd), naxis))

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def fields(self) -> list[Field]:
        """All fields, sorted."""
        return sorted(set(self._fields))

    @classmethod
    def from_base(cls, base: str | Path, progress: Progress | None = None) -> Self:
        """Index the frames of an archive by reading the start of each file.

        Args:
            base: folder, or http(s) URL with directory listings, that holds ``dr12/boss/photoObj/frames/301``.
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
            names = {m[0].removesuffix(".bz2"): m for path in paths if (m := FRAME_NAME.search(path))}
            rows, failed = [], []
            for done, (match, path) in enumerate((m, m.string) for m in names.values()):
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
        return self._suffix.get((field, band))

    def covering(self, ra_deg: float, dec_deg: float, width_arcsec: float) -> dict[str, list[Field]]:
        """Fields that a square on the sky overlaps, band by band.

        Args:
            ra_deg: right ascension of the square's centre, ICRS degrees.
            dec_deg: declination of its centre.
            width_arcsec: its width; its sides run north and east.

        Returns:
            For each band that has any, the fields whose frame overlaps the square, sorted.
        """
        half_deg = width_arcsec / 7200.0
        reach = np.minimum(self._radius_deg + 1.5 * half_deg, 90.0)
        near = np.flatnonzero(self._centres @ _unit_vectors(ra_deg, dec_deg) >= np.cos(np.radians(reach)))
        if not near.size:
            return {}
        crval, crpix, cd, naxis = _split_wcs(self._wcs[near])
        signs = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
        # Two convex quadrilaterals are apart if and only if a side of one of them separates them.
        corners = (naxis + 1.0)[:, None] / 2.0 + signs * (naxis / 2.0)[:, None]
        offset = np.einsum("kij,kcj->kci", cd, corners - crpix[:, None])
        sky = _deproject(offset[..., 0], offset[..., 1], crval[:, :1], crval[:, 1:])
        in_square = np.stack(_project(*sky, ra_deg, dec_deg), axis=-1)
        sky = _deproject(signs[:, 0] * half_deg, signs[:, 1] * half_deg, ra_deg, dec_deg)
        offset = np.stack(_project(*sky, crval[:, :1], crval[:, 1:]), axis=-1)
        in_frame = np.einsum("kij,kcj->kci", np.linalg.inv(cd), offset) + crpix[:, None]
        overlap = (in_square.min(1) < half_deg) & (in_square.max(1) > -half_deg)
        overlap &= (in_frame.min(1) < naxis + 0.5) & (in_frame.max(1) > 0.5)
        found: dict[str, list[Field]] = {}
        for k in near[overlap.all(axis=1)]:
            found.setdefault(self._bands[k], []).append(self._fields[k])
        return {band: sorted(found[band]) for band in BANDS if band in found}


def _split_wcs(wcs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (k, 10) as crval (k, 2), crpix (k, 2), cd (k, 2, 2) and naxis (k, 2)."""
    return wcs[:, 0:2], wcs[:, 2:4], wcs[:, 4:8].reshape(-1, 2, 2), wcs[:, 8:10]


def _unit_vectors(ra_deg: np.ndarray | float, dec_deg: np.ndarray | float) -> np.ndarray:
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
    for k, field in enumerate(index._fields):
        if field not in chosen or index._bands[k] == "r":
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
