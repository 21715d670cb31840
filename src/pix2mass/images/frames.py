"""Cutouts from SDSS imaging frames (DR12, rerun 301), from a folder or over HTTP, in the archive's own layout."""

from __future__ import annotations

import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS

from pix2mass.config import GridConfig
from pix2mass.images.archive import BadFrame, Field, Folder, Http, decompress, frame_path, open_archive
from pix2mass.images.frame import Exposure, Noise, parse_frame, read_table, tabulated_noise
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frame_queue import FrameKey, FrameQueue, WorkOrder
from pix2mass.images.grid import (
    MIN_COVERAGE,
    ClusterRow,
    Position,
    pixel_scale_arcsec,
    read_position,
    regrid,
    source_window,
    target_wcs,
    to_pixels,
)
from pix2mass.types import BANDS, Cutout, Flag, Pix2massError, empty_cutout

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
    weight: float
    psf_fwhm_arcsec: float
    flags: Flag


@dataclass(frozen=True)
class _Needs:
    """Pixel scale of a cutout and, band by band, the fields that overlap it."""

    scale_arcsec: float
    covering: dict[str, list[Field]]

    def frames(self) -> list[FrameKey]:
        """Its frames, field by field."""
        fields = sorted(set().union(*self.covering.values()))
        return [(field, band) for field in fields for band, covering in self.covering.items() if field in covering]


class FrameSource:
    """Cutouts from SDSS frames.

    The bands are aligned through each frame's own WCS and regridded by area (see ``grid.regrid``). Where fields of
    one run and camera column overlap, the one that covers a pixel best is taken: their 128 common rows are the same
    exposure. Different runs and columns are independent and are averaged with weights coverage / typical variance of
    the frame, one number per frame, so that bright sources are not weighted down. Backgrounds and PSFs are not matched.

    A cutout is the same to the last byte whatever was made before it. Not safe to share between threads: give each
    thread or process its own; a copy sent to another process keeps the order of ``groups``.
    """

    def __init__(
        self, base: str | Path | Folder | Http, grid: GridConfig, index: FrameIndex | str | Path | None = None
    ) -> None:
        """Open an archive.

        Args:
            base: folder, or http(s) URL, that holds ``dr12``; or an archive that is open already.
            grid: the pixel grid and the bands.
            index: which frames exist, or a file of ``FrameIndex.to_file``; by default ``base`` is searched.

        Raises:
            Pix2massError: ``base`` is no archive, or ``index`` is no index.
        """
        self.grid = grid
        self._archive = open_archive(base)
        if index is None:
            index = FrameIndex.from_base(self._archive)
        self.index = index if isinstance(index, FrameIndex) else FrameIndex.from_file(index)
        self._noise: _Cache[Field, Noise] = _Cache(64)
        self._photo_fields: _Cache[tuple[int, int], dict[str, np.ndarray]] = _Cache(16)
        threads = min(len(grid.bands), os.cpu_count() or 1)
        self._queue = FrameQueue(self._read_frame, self._expose, self._drop, threads)
        self._seconds = {"unpack": 0.0, "regrid": 0.0}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"archive": self._archive, "grid": self.grid, "index": self.index, "order": self._queue.order}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["archive"], state["grid"], state["index"])
        self._queue.order, self._queue.in_group = state["order"], True

    def close(self) -> None:
        """Drop the frames in memory and close connections."""
        self._archive.stop()
        self._queue.close()
        self._archive.close()

    def statistics(self) -> dict[str, Any]:
        """What was read so far and how long it took, for a build's summary; seconds are summed over threads."""
        counts = self._archive.counts.statistics()
        return {**counts, "seconds": {**counts["seconds"], **self._seconds}}

    def groups(self, catalog: Table) -> list[list[int]]:
        """The best order of work: groups of cutouts that share frames, neighbours along a run next to each other.

        Cutouts asked for in this order, all of it or any of its groups, find their frames unpacked ahead; a frame is
        unpacked once and goes from memory, and from a cache that does not keep it, after its last use.

        Args:
            catalog: columns ``ra_deg``, ``dec_deg`` and, where the grid's width is in kpc, ``z``.

        Returns:
            Row numbers, each once. Rows without frames come last.
        """
        places, needs = [], []
        for row in catalog:
            try:
                position = read_position(row)
                needed = self._needs(position)
            except Pix2massError:  # said when its cutout is asked for
                places.append(None)
                needs.append([])
            else:
                places.append((position.ra_deg, position.dec_deg, needed.scale_arcsec))
                needs.append(needed.frames())
        self._queue.order = WorkOrder(places, needs)
        return self._queue.order.groups

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
            needs = self._needs(position)
        except Pix2massError as error:
            raise Pix2massError(f"cluster {position.name}: {error}") from None
        scale, n_pixels, bands = needs.scale_arcsec, self.grid.n_pixels, self.grid.bands
        wcs = target_wcs(position.ra_deg, position.dec_deg, scale, n_pixels)
        flags = Flag(0)
        pieces: dict[str, dict[tuple[int, int], list[_Piece]]] = {band: {} for band in bands}
        frames = needs.frames()
        fields = {field for field, _ in frames}
        absent = [(field, band) for field in fields for band in bands if field not in needs.covering[band]]
        lacking = {key[1] for key in absent if self.index.suffix(*key) is None}
        self._queue.begin((position.ra_deg, position.dec_deg, scale), frames)
        for field, band in frames:
            exposure = self._queue.take((field, band))
            if isinstance(exposure, BadFrame):
                lacking.add(band)
                flags |= Flag.UNREADABLE
                continue
            start = time.perf_counter()
            piece = _regrid(exposure, self._field_noise(field), BANDS.index(band), wcs, n_pixels)
            if piece is not None:
                pieces[band].setdefault((field.run, field.camcol), []).append(piece)
                flags |= piece.flags
            self._seconds["regrid"] += time.perf_counter() - start
        self._queue.end()

        cutout = empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, Flag(0))
        inside = np.zeros(cutout.mask.shape, np.bool_)
        for k, band in enumerate(bands):
            piece = _combine(list(pieces[band].values()), n_pixels)
            np.less(piece.coverage, MIN_COVERAGE, out=cutout.mask[k])
            np.greater_equal(piece.footprint, MIN_COVERAGE, out=inside[k])
            np.copyto(cutout.flux[k], piece.flux, casting="same_kind", where=~cutout.mask[k])
            np.sqrt(piece.variance, out=cutout.sigma[k], casting="same_kind", where=~cutout.mask[k])
            cutout.psf_fwhm_arcsec[k] = piece.psf_fwhm_arcsec
        if cutout.mask.all():
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
        return replace(cutout, flags=flags)

    def _needs(self, position: Position) -> _Needs:
        scale = pixel_scale_arcsec(self.grid, position.z)
        covering = self.index.covering(position.ra_deg, position.dec_deg, scale * self.grid.n_pixels)
        return _Needs(scale, {band: covering.get(band, []) for band in self.grid.bands})

    def _path(self, key: FrameKey) -> str:
        return frame_path(*key, self.index.suffix(*key) or "")

    def _read_frame(self, key: FrameKey) -> bytes | BadFrame:
        """Content of a frame, unpacked. Runs in threads, where no warning may be raised or caught."""
        path = self._path(key)
        try:
            data = self._archive.read(path)
            if data is None:
                raise BadFrame("no such file, though the frame index lists it")
            start = time.perf_counter()
            content = decompress(data) if path.endswith(".bz2") else data
            self._seconds["unpack"] += time.perf_counter() - start
            return content
        except BadFrame as problem:
            return problem

    def _expose(self, key: FrameKey, content: bytes | BadFrame, room: np.ndarray | None) -> Exposure | BadFrame:
        """The frame with its noise, or why it cannot be used."""
        field, band = key
        try:
            if isinstance(content, BadFrame):
                raise content
            frame = parse_frame(content, field, band)
        except BadFrame as problem:
            warnings.warn(f"{self._archive}/{self._path(key)}: {problem}; band {band} is missing", stacklevel=4)
            return problem
        noise, k = self._field_noise(field), BANDS.index(band)
        return frame.exposure(noise.gain[k], noise.dark_variance[k], room)

    def _drop(self, key: FrameKey) -> None:
        self._archive.drop(self._path(key))

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
            warnings.warn(f"{self._archive}/{path}: {problem}; going on without it", stacklevel=4)
            return {}


def _regrid(exposure: Exposure, noise: Noise, band_index: int, wcs: WCS, n_pixels: int) -> _Piece | None:
    """One frame on the target grid, None where it does not reach it."""
    window = source_window(exposure.wcs, wcs, n_pixels, exposure.pixels.shape[:2])
    if window is None:
        return None
    image = regrid(exposure.pixels, exposure.wcs, wcs, n_pixels)
    if not image.footprint.any():
        return None
    flags = Flag.SIGMA_APPROXIMATE if noise.approximate else Flag(0)
    if (image.coverage < image.footprint - 1e-6).any():
        flags |= Flag.BAD_PIXELS
    if _any_inside(exposure.hot, window, exposure.wcs, wcs, n_pixels):
        flags |= Flag.SATURATED
    return _Piece(*image, 1.0 / exposure.typical_variance, float(noise.psf_fwhm_arcsec[band_index]), flags)


def _any_inside(pixels: np.ndarray, window: Sequence[slice], source: WCS, target: WCS, n_pixels: int) -> bool:
    """Whether any of some source pixels (2, n), columns and rows, has its centre inside the target grid."""
    cols, rows = pixels
    near = (rows >= window[0].start) & (rows < window[0].stop) & (cols >= window[1].start) & (cols < window[1].stop)
    if not near.any():
        return False
    x, y = to_pixels(source, target, cols[near], rows[near])
    edge = n_pixels - 0.5
    return bool(((x > -0.5) & (x < edge) & (y > -0.5) & (y < edge)).any())


def _combine(strips: list[list[_Piece]], n_pixels: int) -> _Piece:
    """Merge pieces: the best covering one within a run and column, the weighted mean between them."""
    if len(strips) == 1 and len(strips[0]) == 1:
        return strips[0][0]
    flux, variance, weight_sum, coverage, footprint = np.zeros((5, n_pixels, n_pixels))
    psf_sum = psf_weight = 0.0
    for strip in strips:
        best = np.argmax([piece.coverage for piece in strip], axis=0)[None]
        chosen = {
            name: np.take_along_axis(np.stack([getattr(piece, name) for piece in strip]), best, 0)[0]
            for name in ("flux", "variance", "coverage")
        }
        weight = chosen["coverage"] * np.array([piece.weight for piece in strip])[best[0]]
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
    return _Piece(
        flux * scale,
        variance * scale**2,
        np.minimum(coverage, 1.0),
        np.minimum(footprint, 1.0),
        1.0,
        psf_sum / psf_weight if psf_weight > 0.0 else np.nan,
        Flag(0),
    )
