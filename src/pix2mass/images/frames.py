"""Cutouts from SDSS imaging frames (DR12, rerun 301), from a folder or over HTTP, in the archive's own layout."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel

from pix2mass.config import GridConfig
from pix2mass.images.archive import BadFrame, Field, decompress, frame_path, open_archive
from pix2mass.images.frame import SATURATION_COUNTS, Frame, Noise, parse_frame, read_table, tabulated_noise
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.grid import (
    MIN_COVERAGE,
    ClusterRow,
    pixel_scale_arcsec,
    read_position,
    resample,
    source_window,
    target_wcs,
)
from pix2mass.types import BANDS, Cutout, Flag, Pix2massError, empty_cutout

_CACHED_FIELDS = 3

K = TypeVar("K")
V = TypeVar("V")


class _Cache(Generic[K, V]):
    """The last few values, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __getitem__(self, key: K) -> V:
        self._values.move_to_end(key)
        return self._values[key]

    def __setitem__(self, key: K, value: V) -> None:
        self._values[key] = value
        while len(self._values) > self._size:
            self._values.popitem(last=False)


@dataclass(frozen=True, eq=False)
class _Piece:
    """One frame on the target grid: arrays (n, n); ``footprint`` is the coverage with bad pixels counted as covered."""

    flux: np.ndarray
    variance: np.ndarray
    coverage: np.ndarray
    footprint: np.ndarray
    weight: np.ndarray
    psf_fwhm_arcsec: float
    flags: Flag


class FrameSource:
    """Cutouts from SDSS frames.

    The bands are aligned through each frame's own WCS and regridded by area (see ``grid.resample``). Where fields of
    one run and camera column overlap, the one that covers a pixel best is taken: their 128 common rows are the same
    exposure. Different runs and columns are independent and are averaged with weights coverage / typical variance of
    the frame, one number per frame, so that bright sources are not weighted down. Backgrounds and PSFs are not matched.

    Not safe to share between threads: give each thread or process its own.
    """

    def __init__(self, base: str | Path, grid: GridConfig, index: FrameIndex | str | Path | None = None) -> None:
        """Open an archive.

        Args:
            base: folder, or http(s) URL, that holds ``dr12``.
            grid: the pixel grid and the bands.
            index: which frames exist, or a file of ``FrameIndex.to_file``; by default ``base`` is searched.

        Raises:
            Pix2massError: ``base`` is no archive, or ``index`` is no index.
        """
        self.grid = grid
        self._archive = open_archive(base)
        self._base = str(base).rstrip("/")
        if index is None:
            index = FrameIndex.from_base(base)
        self.index = index if isinstance(index, FrameIndex) else FrameIndex.from_file(index)
        self._frames: _Cache[tuple[Field, str], Frame | BadFrame] = _Cache(_CACHED_FIELDS * len(grid.bands))
        self._noise: _Cache[Field, Noise] = _Cache(64)
        self._photo_fields: _Cache[tuple[int, int], dict[str, np.ndarray]] = _Cache(16)
        self._pool = ThreadPoolExecutor(min(len(grid.bands), os.cpu_count() or 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the frames in memory and close connections."""
        self._pool.shutdown()
        self._archive.close()
        self._frames = _Cache(0)

    def cutout(self, cluster: ClusterRow) -> Cutout:
        """The cutout of one cluster.

        Args:
            cluster: dict or table row with ``ra_deg``, ``dec_deg`` (ICRS degrees) and, where the grid's width is in
                kpc, ``z``; ``id`` appears in messages.

        Returns:
            The bands of ``grid`` on its pixels. What is wrong with them is in ``flags``; a frame that cannot be read is
            also warned about by name, and its band is treated as missing there.

        Raises:
            Pix2massError: the position or redshift is not usable, or the archive does not answer.
        """
        position = read_position(cluster)
        try:
            scale = pixel_scale_arcsec(self.grid, position.z)
        except Pix2massError as error:
            raise Pix2massError(f"cluster {position.name}: {error}") from None
        n_pixels, bands = self.grid.n_pixels, self.grid.bands
        wcs = target_wcs(position.ra_deg, position.dec_deg, scale, n_pixels)
        covering = self.index.covering(position.ra_deg, position.dec_deg, scale * n_pixels)
        covering = {band: covering.get(band, []) for band in bands}

        flags = Flag(0)
        pieces: dict[str, dict[tuple[int, int], list[_Piece]]] = {band: {} for band in bands}
        lacking = set()
        for field in sorted(set().union(*covering.values())):
            lacking |= {band for band in bands if self.index.suffix(field, band) is None}
            for band, frame in self._load(field, [band for band in bands if field in covering[band]]).items():
                if isinstance(frame, BadFrame):
                    lacking.add(band)
                    flags |= Flag.UNREADABLE
                    continue
                piece = _regrid(frame, self._field_noise(field), BANDS.index(band), wcs, n_pixels)
                if piece is not None:
                    pieces[band].setdefault((field.run, field.camcol), []).append(piece)
                    flags |= piece.flags

        combined = {band: _combine(list(strips.values()), n_pixels) for band, strips in pieces.items()}
        usable = np.stack([combined[band].coverage >= MIN_COVERAGE for band in bands])
        inside = np.stack([combined[band].footprint >= MIN_COVERAGE for band in bands])
        if not usable.any():
            flags = (flags & (Flag.UNREADABLE | Flag.BAD_PIXELS)) | Flag.OUTSIDE
            return empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, flags)
        somewhere = inside.any(axis=0)
        for k, band in enumerate(bands):
            if not inside[k].any() or (band in lacking and (somewhere & ~inside[k]).any()):
                flags |= Flag.MISSING_BAND
            elif not inside[k].all():
                flags |= Flag.PARTLY_OUTSIDE
        if not somewhere.all():
            flags |= Flag.PARTLY_OUTSIDE
        flux = np.stack([combined[band].flux for band in bands])
        sigma = np.sqrt(np.stack([combined[band].variance for band in bands]))
        return Cutout(
            flux=np.where(usable, flux, 0.0).astype(np.float32),
            sigma=np.where(usable, sigma, 0.0).astype(np.float32),
            mask=~usable,
            bands=bands,
            ra_deg=position.ra_deg,
            dec_deg=position.dec_deg,
            pixel_scale_arcsec=scale,
            psf_fwhm_arcsec=np.array([combined[band].psf_fwhm_arcsec for band in bands], np.float32),
            flags=flags,
        )

    def _load(self, field: Field, bands: list[str]) -> dict[str, Frame | BadFrame]:
        """Frames of a field, or why they cannot be used; unpacked side by side, since bzip2 is what takes the time."""
        new = [band for band in bands if (field, band) not in self._frames]
        loaded = {band: self._frames[field, band] for band in bands if band not in new}
        paths = [frame_path(field, band, self.index.suffix(field, band) or "") for band in new]
        for band, path, content in zip(new, paths, self._pool.map(self._read_frame, paths), strict=True):
            try:
                if isinstance(content, BadFrame):
                    raise content
                frame = parse_frame(content, field, band)
            except BadFrame as problem:
                frame = problem
                warnings.warn(f"{self._base}/{path}: {problem}; band {band} is missing", stacklevel=3)
            loaded[band] = self._frames[field, band] = frame
        return {band: loaded[band] for band in bands}

    def _read_frame(self, path: str) -> bytes | BadFrame:
        """Content of a frame, unpacked. Runs in threads, where no warning may be raised or caught."""
        try:
            data = self._archive.read(path)
            if data is None:
                raise BadFrame("no such file, though the frame index lists it")
            return decompress(data) if path.endswith(".bz2") else data
        except BadFrame as problem:
            return problem

    def _field_noise(self, field: Field) -> Noise:
        """Gain, dark variance and PSF of a field: from photoField and psField where there, else from the data model."""
        if field not in self._noise:
            found = {}
            table = self._photo_field(field.run, field.camcol)
            rows = np.flatnonzero(table.get("FIELD", np.empty(0)) == field.field)
            if rows.size:
                found = {name: column[rows[0]] for name, column in table.items()}
            gain, dark_variance = tabulated_noise(field.run, field.camcol)
            own = all(name in found for name in ("GAIN", "DARK_VARIANCE"))
            psf = found["PSF_WIDTH"] if "PSF_WIDTH" in found else self._ps_field(field)
            self._noise[field] = Noise(
                gain=found["GAIN"] if own else gain,
                dark_variance=found["DARK_VARIANCE"] if own else dark_variance,
                psf_fwhm_arcsec=np.where(np.isfinite(psf) & (psf > 0.0), psf, np.nan),
                approximate=not own,
            )
        return self._noise[field]

    def _photo_field(self, run: int, camcol: int) -> dict[str, np.ndarray]:
        if (run, camcol) not in self._photo_fields:
            path = f"dr12/boss/photoObj/301/{run}/photoField-{run:06d}-{camcol}.fits"
            columns = ("FIELD", "GAIN", "DARK_VARIANCE", "PSF_WIDTH")
            self._photo_fields[run, camcol] = self._read_optional(path, 1, columns)
        return self._photo_fields[run, camcol]

    def _ps_field(self, field: Field) -> np.ndarray:
        name = f"psField-{field.run:06d}-{field.camcol}-{field.field:04d}.fit"
        path = f"dr12/boss/photo/redux/301/{field.run}/objcs/{field.camcol}/{name}"
        return self._read_optional(path, 6, ("PSF_WIDTH",)).get("PSF_WIDTH", np.full(5, np.nan)).ravel()

    def _read_optional(self, path: str, hdu: int, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
        try:
            data = self._archive.read(path)
            return {} if data is None else read_table(data, hdu, columns)
        except BadFrame as problem:
            warnings.warn(f"{self._base}/{path}: {problem}; going on without it", stacklevel=4)
            return {}


def _regrid(frame: Frame, noise: Noise, band_index: int, wcs: WCS, n_pixels: int) -> _Piece | None:
    """One frame on the target grid, None where it does not reach it."""
    window = source_window(frame.wcs, wcs, n_pixels, frame.flux.shape)
    if window is None:
        return None
    rows, cols = window
    flux = frame.flux[rows, cols]
    with np.errstate(all="ignore"):
        counts = frame.counts(rows, cols)
        variance = frame.variance(rows, cols, counts, noise, band_index)
        bad = ~(np.isfinite(flux) & np.isfinite(variance) & (variance > 0.0))
        hot = counts >= SATURATION_COUNTS
    typical = np.inf if bad.all() else float(np.median(variance[~bad][::16]))
    window_wcs = frame.wcs[rows, cols]
    out_flux, out_variance, coverage = resample(flux, variance, bad, window_wcs, wcs, n_pixels)
    footprint = coverage
    flags = Flag.SIGMA_APPROXIMATE if noise.approximate else Flag(0)
    if bad.any():
        nothing = np.zeros_like(flux)
        footprint = resample(nothing, nothing, None, window_wcs, wcs, n_pixels)[2]
        if (coverage < footprint - 1e-6).any():
            flags |= Flag.BAD_PIXELS
    if not (footprint > 0.0).any():
        return None
    if _any_inside(hot, window_wcs, wcs, n_pixels):
        flags |= Flag.SATURATED
    weight = np.full(coverage.shape, 1.0 / typical)
    return _Piece(out_flux, out_variance, coverage, footprint, weight, float(noise.psf_fwhm_arcsec[band_index]), flags)


def _any_inside(pixels: np.ndarray, source: WCS, target: WCS, n_pixels: int) -> bool:
    rows, cols = np.nonzero(pixels)
    if not rows.size:
        return False
    x, y = pixel_to_pixel(source, target, cols, rows)
    edge = n_pixels - 0.5
    return bool(((x > -0.5) & (x < edge) & (y > -0.5) & (y < edge)).any())


def _combine(strips: list[list[_Piece]], n_pixels: int) -> _Piece:
    """Merge pieces: the best covering one within a run and column, the weighted mean between them."""
    flux, variance, weight_sum, coverage, footprint = np.zeros((5, n_pixels, n_pixels))
    psf_sum = psf_weight = 0.0
    for strip in strips:
        best = np.argmax([piece.coverage for piece in strip], axis=0)[None]
        chosen = {
            name: np.take_along_axis(np.stack([getattr(piece, name) for piece in strip]), best, 0)[0]
            for name in ("flux", "variance", "coverage", "weight")
        }
        weight = chosen["coverage"] * chosen["weight"]
        flux += weight * chosen["flux"]
        variance += weight**2 * chosen["variance"]
        weight_sum += weight
        coverage += chosen["coverage"]
        footprint += np.max([piece.footprint for piece in strip], axis=0)
        for k, piece in enumerate(strip):
            if np.isfinite(piece.psf_fwhm_arcsec):
                share = float(weight[best[0] == k].sum())
                psf_sum, psf_weight = psf_sum + share * piece.psf_fwhm_arcsec, psf_weight + share
    scale = np.divide(1.0, weight_sum, out=np.zeros_like(weight_sum), where=weight_sum > 0.0)
    psf = psf_sum / psf_weight if psf_weight > 0.0 else np.nan
    return _Piece(
        flux * scale,
        variance * scale**2,
        np.minimum(coverage, 1.0),
        np.minimum(footprint, 1.0),
        weight_sum,
        psf,
        Flag(0),
    )
