"""Mock surveys as SDSS imaging frames: the archive's folders, file names, HDUs, columns and header keywords.

The sky of a frame is that of ``population.galaxies``, so that frames and ``MockSource`` show the same galaxies.
Clusters whose frames could touch share one sky: of the sources that belong to no cluster, each place has those of the
nearest one. A run is drawn in segments of rows, each with random numbers of its own, so that the rows which two fields
share are the same in both, and a field can be made without its neighbours.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import QTable, Table
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel, proj_plane_pixel_scales

from pix2mass.config import GridConfig, MockConfig
from pix2mass.distribute import InProcess, Workers
from pix2mass.images.archive import Field, frame_path
from pix2mass.images.frame import WCS_COLUMNS, tabulated_noise
from pix2mass.images.frame_index import FrameIndex, unit_vectors
from pix2mass.images.grid import pixel_scale_arcsec, tan_wcs, target_wcs
from pix2mass.images.mock.population import Sources, galaxies, mean_richness, reddening_mag, stream, value
from pix2mass.images.mock.source import draw_camera
from pix2mass.images.window import WINDOW_FLIST, to_great_circle, write_window_flist
from pix2mass.types import (
    BANDS,
    EXTINCTION_PER_EBV,
    NANOMAGGY_ZEROPOINT_MAG,
    SDSS_PIXEL_SCALE_ARCSEC,
    Pix2massError,
)

FRAME_SHAPE = (1489, 2048)
"""Rows and columns of a frame. Source: SDSS frame data model."""

OVERLAP_ROWS = 128
"""Rows that a field shares with the next one of its run. Source: SDSS frame data model."""

FIRST_RUN, FIRST_FIELD = 9001, 11
"""Numbers of the first mock run, above those of real runs (up to 8162), and of its first field, as in real runs."""

POSITION_ANGLE_DEG = (45.0, 135.0)
"""Range of the scan direction, from north through east: that of the six real frames is 47 to 124."""

NMGY_PER_COUNT = {"u": 0.0074, "g": 0.0036, "r": 0.0050, "i": 0.0069, "z": 0.033}
"""Calibration: near the median of the six real frames."""

CALIB_SCATTER_LN, COLUMN_SCATTER = 0.05, 0.001
"""Scatter of the calibration from run to run (about that of the six real frames) and from column to column (theirs)."""

LOWEST_SKY_COUNTS = 10.0
"""Where the drawn noise is below what the chip's dark variance leaves room for, the sky is this bright."""

BAND_OFFSET_PX = 7
"""Bands of a field are shifted by up to this many pixels in each direction: real ones differ by up to 14."""

_STRIP_OVERLAP_COLS = 64
_MARGIN_PX = BAND_OFFSET_PX + 5
_MAX_GROUP_DEG = 6.0

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


# --- what is on the sky -----------------------------------------------------------------------------------------------


def with_truth(catalog: QTable, config: MockConfig) -> QTable:
    """A catalogue with all that the mock sky needs to draw its clusters: true mass and true richness.

    Args:
        catalog: any of the columns ``log10_m500c_true``, ``log10_m500c``, ``richness_true``, ``richness``.
        config: the mock survey, whose mean relation gives the mass of a richness.

    Returns:
        The catalogue with ``log10_m500c_true``: the column of that name, else ``log10_m500c``, else the mass whose mean
        richness is ``richness``, else NaN (blank sky); and ``richness_true``: the column of that name, else
        ``richness`` rounded, else masked (the sky draws it).
    """
    masses = np.arange(12.0, 16.5, 0.01)
    numbers: dict[str, np.ndarray] = {}
    for name in ("log10_m500c_true", "log10_m500c", "richness_true", "richness"):
        known = catalog[name] if name in catalog.colnames else np.full(len(catalog), np.nan)
        numbers[name] = np.ma.filled(np.ma.asarray(known, float), np.nan)
    richness = numbers["richness"]
    with np.errstate(invalid="ignore", divide="ignore"):
        from_richness = np.interp(np.log(richness), np.log(mean_richness(masses, config.physics)), masses)
    mass = np.where(np.isfinite(numbers["log10_m500c"]), numbers["log10_m500c"], from_richness)
    mass = np.where(np.isfinite(numbers["log10_m500c_true"]), numbers["log10_m500c_true"], mass)
    count = np.where(np.isfinite(numbers["richness_true"]), numbers["richness_true"], np.maximum(np.rint(richness), 1))
    done = catalog.copy()
    done["log10_m500c_true"] = mass
    done["richness_true"] = np.ma.masked_invalid(count)
    return done


def on_pixels(sources: Sources, ra_deg: float, dec_deg: float, wcs: WCS) -> Sources:
    """Sources placed by a WCS.

    Args:
        sources: offsets and angles in the tangent plane of a position, west and north.
        ra_deg: right ascension of that position, ICRS degrees.
        dec_deg: its declination.
        wcs: of an image.

    Returns:
        The sources with ``x_arcsec``, ``y_arcsec`` their column and row (counted from 0) times the WCS's pixel scale,
        and ``angle_deg`` from the direction of the columns towards that of the rows.
    """
    plane = target_wcs(ra_deg, dec_deg, 1.0, 1)
    scale = pixel_arcsec(wcs)
    angle = np.radians(sources.angle_deg)
    x, y = pixel_to_pixel(plane, wcs, sources.x_arcsec, sources.y_arcsec)
    along_x, along_y = pixel_to_pixel(plane, wcs, sources.x_arcsec + np.cos(angle), sources.y_arcsec + np.sin(angle))
    turned = np.degrees(np.arctan2(along_y - y, along_x - x))
    return replace(sources, x_arcsec=x * scale, y_arcsec=y * scale, angle_deg=turned)


def pixel_arcsec(wcs: WCS) -> float:
    """Pixel size of a WCS, arcsec, mean of its two axes."""
    return float(np.mean(proj_plane_pixel_scales(wcs))) * 3600.0


def row_segments(number: int, n_rows: int) -> list[tuple[int, int]]:
    """Rows of a run, first and one after the last, that make up a field: shared with the field before, its own, shared
    with the one after.

    Args:
        number: of the field in its run.
        n_rows: rows of a frame.
    """
    step = n_rows - OVERLAP_ROWS
    edges = [number * step + row for row in (0, OVERLAP_ROWS, step, n_rows)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def draw(
    sources: Sources,
    flux: np.ndarray,
    psf_fwhm_arcsec: np.ndarray,
    config: MockConfig,
    scale_arcsec: float,
    rows: slice,
    cols: slice,
) -> np.ndarray:
    """Draw a window of an image without noise.

    Args:
        sources: n sources as ``on_pixels`` gives them.
        flux: (n, n_bands) nanomaggies.
        psf_fwhm_arcsec: (n_bands,) PSF widths.
        config: the mock survey, whose PSF has the components used.
        scale_arcsec: pixel size.
        rows: rows of the window.
        cols: its columns.

    Returns:
        (n_bands, rows, cols) float32 nanomaggies per pixel.
    """
    from pix2mass.images.mock.render import render

    height, width = rows.stop - rows.start, cols.stop - cols.start
    x = sources.x_arcsec - (cols.start + cols.stop - 1) / 2.0 * scale_arcsec
    y = sources.y_arcsec - (rows.start + rows.stop - 1) / 2.0 * scale_arcsec
    # The widest Gaussian of a profile is 4.5 half-light radii wide and is cut at four times that.
    reach = 20.0 * (sources.r50_arcsec + psf_fwhm_arcsec.max())
    near = (np.abs(x) < width / 2.0 * scale_arcsec + reach) & (np.abs(y) < height / 2.0 * scale_arcsec + reach)
    if not near.any():
        return np.zeros((flux.shape[1], height, width), np.float32)
    near_sources = replace(sources, x_arcsec=x, y_arcsec=y)[near]
    components = config.physics.psf_components
    return render(near_sources, flux[near], psf_fwhm_arcsec, (height, width), scale_arcsec, psf_components=components)


def dimmed_flux(mag: np.ndarray, ebv_mag: float | np.ndarray) -> np.ndarray:
    """Flux (n, 5) in nanomaggies of ugriz magnitudes behind a Galactic reddening E(B-V), one or one each."""
    extinction = np.multiply.outer(ebv_mag, [EXTINCTION_PER_EBV[band] for band in BANDS])
    return 10.0 ** (-0.4 * (mag + extinction - NANOMAGGY_ZEROPOINT_MAG))


# --- where the frames lie ---------------------------------------------------------------------------------------------


class _Strip(NamedTuple):
    """One camera column of a run: its WCS (row 0 is the first field's) in numbers, which other processes get exactly,
    and which fields are written, from 0."""

    run: int
    camcol: int
    crval_deg: tuple[float, float]
    crpix: tuple[float, float]
    angle_deg: float
    fields: tuple[int, ...]

    @property
    def wcs(self) -> WCS:
        return tan_wcs(self.crval_deg, self.crpix, _frame_cd(self.angle_deg))


@dataclass(frozen=True, eq=False)
class _Group:
    """Clusters that share a sky, the width of the cutout of each, and the strips that picture them."""

    clusters: list[dict[str, Any]]
    width_arcsec: np.ndarray
    strips: list[_Strip]

    @property
    def n_frames(self) -> int:
        return len(BANDS) * sum(len(strip.fields) for strip in self.strips)


def _plan(catalog: QTable, grid: GridConfig, seed: int, shape: tuple[int, int]) -> list[_Group]:
    """Which frames are needed, for each group of clusters, in the catalogue's order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    rows = [{name: value(row, name) for name in catalog.colnames} for row in catalog]
    if not rows:
        return []
    width = np.array([pixel_scale_arcsec(grid, float(row["z"])) * grid.n_pixels for row in rows])
    direction = _directions(rows)
    half = width / math.sqrt(2.0) + _MARGIN_PX * SDSS_PIXEL_SCALE_ARCSEC
    reach = np.hypot(*(half + side * SDSS_PIXEL_SCALE_ARCSEC for side in shape)) / 3600.0
    pairs = cKDTree(direction).query_pairs(2.0 * math.sin(math.radians(reach.max())), output_type="ndarray")
    apart = np.degrees(2.0 * np.arcsin(np.linalg.norm(direction[pairs[:, 0]] - direction[pairs[:, 1]], axis=1) / 2.0))
    pairs = pairs[apart < reach[pairs].sum(axis=1)]
    linked = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (len(rows), len(rows)))
    label = connected_components(linked, directed=False)[1]
    groups, run = [], FIRST_RUN
    for first in sorted(np.unique(label, return_index=True)[1]):
        chosen = np.flatnonzero(label == label[first])
        strips = _strips([rows[k] for k in chosen], width[chosen], direction[chosen], seed, shape, run)
        groups.append(_Group([rows[k] for k in chosen], width[chosen], strips))
        run = max(strip.run for strip in strips) + 1
    return groups


def _strips(
    clusters: list[dict[str, Any]],
    width_arcsec: np.ndarray,
    direction: np.ndarray,
    seed: int,
    shape: tuple[int, int],
    first_run: int,
) -> list[_Strip]:
    centre = direction.mean(axis=0) / np.linalg.norm(direction.mean(axis=0))
    span_deg = math.degrees(math.acos(min(1.0, float((direction @ centre).min()))))
    if span_deg > _MAX_GROUP_DEG / 2:
        raise Pix2massError(
            f"mock frames: {len(clusters)} clusters about {clusters[0]['id']!r} lie so close together that they "
            f"share one sky {2 * span_deg:.0f} deg wide, expected at most {_MAX_GROUP_DEG:g}; take fewer clusters "
            "or narrower cutouts"
        )
    ra_deg, dec_deg = _angles(centre)
    if len(clusters) == 1:
        ra_deg, dec_deg = float(clusters[0]["ra_deg"]), float(clusters[0]["dec_deg"])
    angle_deg = float(stream(seed, str(clusters[0]["id"]), "scan").uniform(*POSITION_ANGLE_DEG))
    plane = tan_wcs((ra_deg, dec_deg), (1.0, 1.0), _frame_cd(angle_deg))
    place = np.stack(
        plane.world_to_pixel_values([row["ra_deg"] for row in clusters], [row["dec_deg"] for row in clusters]), axis=1
    )
    turn = abs(math.cos(math.radians(angle_deg))) + abs(math.sin(math.radians(angle_deg)))
    half = (width_arcsec / 2.0 / SDSS_PIXEL_SCALE_ARCSEC * turn + _MARGIN_PX)[:, None]
    low, high = (place - half).min(axis=0), (place + half).max(axis=0)
    size = np.array([shape[1], shape[0]])
    shared = np.array([_STRIP_OVERLAP_COLS, OVERLAP_ROWS])
    count = np.maximum(np.ceil((high - low - shared) / (size - shared)), 1).astype(int)
    start = np.rint((low + high) / 2.0 - (count * (size - shared) + shared) / 2.0)
    strips = []
    for j in range(count[0]):
        corner = start + (size - shared) * np.array([j, 0])
        needed = tuple(
            k
            for k in range(count[1])
            if (np.abs(corner + (0, k * (size - shared)[1]) + size / 2.0 - place) < half + size / 2.0).all(axis=1).any()
        )
        if needed:
            run, camcol = first_run + j // 6, _camcol(j % 6, min(count[0] - 6 * (j // 6), 6))
            crpix = (float(1.0 - corner[0]), float(1.0 - corner[1]))
            strips.append(_Strip(run, camcol, (ra_deg, dec_deg), crpix, angle_deg, needed))
    return strips


def _camcol(number: int, count: int) -> int:
    """Camera column of the given one of ``count`` strips side by side: those in the middle of the camera."""
    return 4 - count // 2 + number


def _frame_cd(angle_deg: float) -> np.ndarray:
    """Matrix from columns and rows to degrees east and north for rows along a position angle."""
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return SDSS_PIXEL_SCALE_ARCSEC / 3600.0 * np.array([[-c, s], [s, c]])


def _directions(clusters: list[dict[str, Any]]) -> np.ndarray:
    """Unit vectors (n, 3) towards clusters."""
    ra, dec = (np.array([row[name] for row in clusters], float) for name in ("ra_deg", "dec_deg"))
    return unit_vectors(ra, dec)


def _angles(direction: np.ndarray) -> tuple[float, float]:
    ra = math.degrees(math.atan2(direction[1], direction[0])) % 360.0
    return ra, math.degrees(math.atan2(direction[2], math.hypot(direction[0], direction[1])))


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Chip:
    """One band of a strip: calibration (cols,), sky (cols,) in counts, gain, dark variance, and shift (cols, rows)."""

    calib: np.ndarray
    sky: np.ndarray
    gain: float
    dark_variance: float
    offset: tuple[int, int]


class _Painter:
    """Draws the frames of one group."""

    def __init__(self, group: _Group, config: MockConfig, seed: int, shape: tuple[int, int]) -> None:
        self.group, self.config, self.seed, self.shape = group, config, seed, shape
        self.identity = str(group.clusters[0]["id"])
        self.camera, _ = draw_camera(group.clusters[0], config, seed)
        rng = stream(seed, self.identity, "run")
        self._calib = [NMGY_PER_COUNT[band] * math.exp(CALIB_SCATTER_LN * rng.normal()) for band in BANDS]
        self._offsets = rng.integers(-BAND_OFFSET_PX, BAND_OFFSET_PX + 1, (len(BANDS), 2)).tolist()
        self._sky: dict[_Strip, tuple[Sources, np.ndarray]] = {}

    def chip(self, strip: _Strip, k: int) -> _Chip:
        """Camera of band ``k`` of a strip. The sky's brightness is what makes the drawn noise."""
        gain, dark_variance = (float(table[k]) for table in tabulated_noise(strip.run, strip.camcol))
        rng = stream(self.seed, self.identity, f"columns {strip.run - self.group.strips[0].run} {strip.camcol} {k}")
        across = np.arange(self.shape[1]) / self.shape[1] - 0.5
        calib = self._calib[k] * (1.0 + COLUMN_SCATTER * (3.0 * rng.normal() * across**2 + 0.3 * rng.normal() * across))
        level = gain * ((self.camera.sigma_nmgy[k] / self._calib[k]) ** 2 - dark_variance - 1.0 / 12.0)
        sky = max(level, LOWEST_SKY_COUNTS) * (1.0 + COLUMN_SCATTER * across)
        return _Chip(calib.astype(np.float32), sky.astype(np.float32), gain, dark_variance, tuple(self._offsets[k]))

    def sky(self, strip: _Strip) -> tuple[Sources, np.ndarray]:
        """Sources in pixels of a strip times its scale, and their fluxes (n, 5)."""
        if strip not in self._sky:
            self._sky = {strip: self._gather(strip)}
        return self._sky[strip]

    def _gather(self, strip: _Strip) -> tuple[Sources, np.ndarray]:
        clusters = self.group.clusters
        planes = [target_wcs(float(row["ra_deg"]), float(row["dec_deg"]), 1.0, 1) for row in clusters]
        step = self.shape[0] - OVERLAP_ROWS
        rows = np.array([[k * step - _MARGIN_PX, k * step + self.shape[0] + _MARGIN_PX] for k in strip.fields]).ravel()
        cols = np.array([-_MARGIN_PX, self.shape[1] + _MARGIN_PX])
        corners = [part.ravel() for part in np.meshgrid(cols, rows)]
        placed, fluxes = [], []
        for i, row in enumerate(clusters):
            reach = np.abs(pixel_to_pixel(strip.wcs, planes[i], *corners)).max()
            # Light of sources just outside reaches into the picture.
            sources = galaxies(row, self.config, 2.0 * float(reach) + 60.0, self.seed, background=True)
            if len(clusters) > 1:
                ra, dec = planes[i].pixel_to_world_values(sources.x_arcsec, sources.y_arcsec)
                closeness = unit_vectors(ra, dec) @ _directions(clusters).T
                sources = sources[sources.is_member | (closeness.argmax(axis=1) == i)]
            placed.append(on_pixels(sources, float(row["ra_deg"]), float(row["dec_deg"]), strip.wcs))
            fluxes.append(dimmed_flux(sources.mag, reddening_mag(row, self.config, self.seed)))
        columns = {f.name: np.concatenate([getattr(part, f.name) for part in placed]) for f in fields(Sources)}
        return Sources(**columns), np.concatenate(fluxes)

    def field(self, strip: _Strip, number: int) -> dict[str, np.ndarray]:
        """Frames of one field, nanomaggies (rows, cols), by band."""
        sources, flux = self.sky(strip)
        n_rows, n_cols = self.shape
        pad = BAND_OFFSET_PX
        chips = [self.chip(strip, k) for k in range(len(BANDS))]
        parts: dict[str, list[np.ndarray]] = {band: [] for band in BANDS}
        for start, stop in row_segments(number, n_rows):
            light = draw(
                sources,
                flux,
                self.camera.psf_fwhm_arcsec,
                self.config,
                SDSS_PIXEL_SCALE_ARCSEC,
                slice(start - pad, stop + pad),
                slice(-pad, n_cols + pad),
            )
            for k, (band, chip, drawn) in enumerate(zip(BANDS, chips, light, strict=True)):
                right, up = chip.offset
                seen = drawn[pad + up : pad + up + stop - start, pad + right : pad + right + n_cols]
                purpose = f"pixels {strip.run - self.group.strips[0].run} {strip.camcol} {start} {band}"
                rng = stream(self.seed, self.identity, purpose)
                exposed = self._expose(seen, self._residual(strip, chip, k, start, stop), chip, rng)
                parts[band].append(np.minimum(exposed, np.float32(self.config.physics.saturation_nmgy[k])))
        return {band: np.concatenate(found) for band, found in parts.items()}

    def _residual(self, strip: _Strip, chip: _Chip, k: int, start: int, stop: int) -> np.ndarray:
        """Sky that its subtraction leaves, nanomaggies per pixel: a level and a slope over the first cluster's
        cutout."""
        row = self.group.clusters[0]
        plane = target_wcs(float(row["ra_deg"]), float(row["dec_deg"]), self.group.width_arcsec[0] / 2.0, 1)
        right, up = chip.offset
        cols, rows = np.array([0, self.shape[1] - 1, 0]) + right, np.array([start, start, stop - 1]) + up
        level, west, north = self.camera.residual[k] * self.camera.sigma_nmgy[k]
        x, y = pixel_to_pixel(strip.wcs, plane, cols, rows)
        corner, along, upwards = level + west * x + north * y
        return (
            corner
            + (along - corner) * np.linspace(0.0, 1.0, self.shape[1])
            + (upwards - corner) * np.linspace(0.0, 1.0, stop - start)[:, None]
        )

    @staticmethod
    def _expose(light: np.ndarray, residual: np.ndarray, chip: _Chip, rng: np.random.Generator) -> np.ndarray:
        """What the camera records: Poisson electrons, dark variance, whole counts; then sky subtracted, calibrated."""
        electrons = rng.poisson(np.maximum((light + residual) / chip.calib + chip.sky, 0.0) * chip.gain)
        dark = math.sqrt(chip.dark_variance) * rng.standard_normal(light.shape, np.float32)
        return chip.calib * (np.rint(electrons / np.float32(chip.gain) + dark).astype(np.float32) - chip.sky)


# --- files ------------------------------------------------------------------------------------------------------------


def write_frames(
    catalog: QTable,
    config: MockConfig,
    seed: int,
    out: Path,
    grid: GridConfig,
    *,
    shape: tuple[int, int] = FRAME_SHAPE,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> FrameIndex:
    """Write the mock sky of a catalogue as frames in the layout of the SDSS archive.

    Each cluster, or group of clusters whose frames could touch, gets a run of its own with as many fields and camera
    columns as the cutouts need. Finished files are kept: the same call goes on after a kill.

    Args:
        catalog: ``id``, ``ra_deg``, ``dec_deg``, ``z`` and, where known, mass or richness (see ``with_truth``); rows
            without are blank sky. A mock catalogue, or a real one: its clusters are drawn at their true positions.
        config: the mock survey.
        seed: same seed, same bytes. The galaxies are those that ``MockSource`` draws for ``with_truth(catalog)``.
        out: folder; gets ``dr12/...`` (frames, photoField, window_flist) and ``truth.ecsv``.
        grid: of the cutouts that the frames are to cover; its width counts.
        shape: rows and columns of a frame; smaller ones for tests.
        workers: draw the frames, one group at a time each; the same bytes whoever does; this process by default.
        progress: called with frames done and in all.

    Returns:
        The index of the frames.

    Raises:
        Pix2massError: ``out`` holds frames of other settings, a frame is too small, or clusters lie too close together.
    """
    if shape[0] < 2 * OVERLAP_ROWS or shape[1] < 2 * _STRIP_OVERLAP_COLS:
        raise Pix2massError(f"mock frames: expected at least 256 rows and 128 columns, got {shape[0]} x {shape[1]}")
    if len(set(map(str, catalog["id"]))) != len(catalog) or not len(catalog):
        raise Pix2massError("mock frames: expected a catalogue of one or more clusters with an id each, all different")
    truth = with_truth(catalog, config)
    width = [grid.width_kpc, grid.width_arcsec]
    settings = {"mock": config.model_dump(mode="json"), "seed": seed, "width": width, "shape": list(shape)}
    claim_folder(out, truth, settings)
    groups = _plan(truth, grid, seed, shape)
    total, done = sum(group.n_frames for group in groups), 0
    rows: list[dict[str, Any]] = []
    for found in (workers or InProcess()).map(_write_group, (config, seed, out, shape), groups):
        rows += found
        done += len(found)
        if progress is not None:
            progress(done, total)
    rows.sort(key=lambda row: (row["run"], row["camcol"], row["field"], BANDS.index(row["band"])))
    index = FrameIndex(Table(rows=rows, names=list(rows[0])))
    scores = {field: float(stream(seed, str(field), "score").uniform(0.6, 1.0)) for field in index.fields}
    write_window_flist(out / WINDOW_FLIST, index, scores)
    return index


def claim_folder(out: Path, truth: QTable, settings: dict[str, Any]) -> None:
    """Make a folder for frames and write what they are made from, or find the same there.

    Args:
        out: the folder; gets ``truth.ecsv`` and ``frames.json``.
        truth: catalogue of the clusters, from ``with_truth``.
        settings: what else the frames depend on, as JSON can hold it.

    Raises:
        Pix2massError: the folder holds frames made from something else.
    """
    columns = {}
    optional = [name for name in ("ra_deg_true", "dec_deg_true", "ebv") if name in truth.colnames]
    for name in ("id", "ra_deg", "dec_deg", "z", "log10_m500c_true", "richness_true", *optional):
        column = np.ma.asarray(truth[name])
        columns[name] = np.ma.filled(column, np.nan).tolist() if column.dtype.kind == "f" else list(map(str, column))
    digest = hashlib.blake2b(json.dumps(columns).encode(), digest_size=16).hexdigest()
    text = json.dumps({**settings, "clusters": len(truth), "catalog": digest}, indent=1)
    path = out / "frames.json"
    if path.is_file():
        if path.read_text() != text:
            raise Pix2massError(
                f"{out}: holds frames made from another catalogue, seed or configuration (see {path.name}); choose "
                "another folder, or delete this one"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    truth.write(out / "truth.ecsv", format="ascii.ecsv", overwrite=True)
    write_atomic(path, text.encode())


def _write_group(
    shared: tuple[MockConfig, int, Path, tuple[int, int]], group: _Group
) -> Iterator[list[dict[str, Any]]]:
    """Write the files of a group that are not there yet; gives rows of the frame index, field by field."""
    config, seed, out, shape = shared
    painter = _Painter(group, config, seed, shape)
    for strip in group.strips:
        chips = {band: painter.chip(strip, k) for k, band in enumerate(BANDS)}
        photo_field: list[dict[str, Any]] = []
        for number in strip.fields:
            field = Field(strip.run, strip.camcol, FIRST_FIELD + number)
            paths = {band: out / frame_path(field, band, ".fits.bz2") for band in BANDS}
            wcs = {band: _field_wcs(strip, chips[band], number, shape) for band in BANDS}
            missing = [band for band in BANDS if not paths[band].is_file()]
            drawn = painter.field(strip, number) if missing else {}
            for band in missing:
                data = _frame_bytes(drawn[band], wcs[band], field, band, chips[band])
                write_atomic(paths[band], bz2.compress(data))
            photo_field.append(_field_facts(field, wcs["r"], painter, chips))
            place = {**field._asdict(), "suffix": ".fits.bz2"}
            yield [{**place, "band": band, **_wcs_row(wcs[band], shape)} for band in BANDS]
        name = f"dr12/boss/photoObj/301/{strip.run}/photoField-{strip.run:06d}-{strip.camcol}.fits"
        if not (out / name).is_file():
            write_atomic(out / name, _table_bytes(photo_field))


def _field_wcs(strip: _Strip, chip: _Chip, number: int, shape: tuple[int, int]) -> WCS:
    """TAN WCS about the field's own centre, fitted to the strip's, as the real frames' is to the drift scan."""
    n_rows, n_cols = shape
    crpix = np.array([n_cols // 2 + 1, n_rows // 2 + 1], float)
    cols, rows = (part.ravel() for part in np.meshgrid(np.linspace(0, n_cols - 1, 9), np.linspace(0, n_rows - 1, 9)))
    shift = np.array(chip.offset) + (0, number * (n_rows - OVERLAP_ROWS))
    ra_deg, dec_deg = (float(part) for part in strip.wcs.pixel_to_world_values(*(crpix - 1.0 + shift)))
    x, y = pixel_to_pixel(strip.wcs, target_wcs(ra_deg, dec_deg, 1.0, 1), cols + shift[0], rows + shift[1])
    offset = np.stack([cols, rows], axis=1) - (crpix - 1.0)
    # A cutout's columns run west, a WCS's first axis east.
    cd = np.linalg.lstsq(offset, np.stack([-x, y], axis=1) / 3600.0, rcond=None)[0].T
    return tan_wcs((ra_deg, dec_deg), crpix, cd)


def _wcs_row(wcs: WCS, shape: tuple[int, int]) -> dict[str, float]:
    values = (*wcs.wcs.crval, *wcs.wcs.crpix, *wcs.wcs.cd.ravel(), shape[1], shape[0])
    return dict(zip(WCS_COLUMNS, map(float, values), strict=True))


class _GreatCircle(NamedTuple):
    """Survey coordinates of a scan: node and inclination, and mu, nu of a frame: at its corner, per row, per column."""

    node_deg: float
    incl_deg: float
    mu: list[float]
    nu: list[float]


def _great_circle(wcs: WCS, shape: tuple[int, int]) -> _GreatCircle:
    """The great circle through the middle of a frame, along its columns."""
    n_rows, n_cols = shape
    cols, rows = (part.ravel() for part in np.meshgrid(np.linspace(0, n_cols - 1, 5), np.linspace(0, n_rows - 1, 5)))
    ends = unit_vectors(*wcs.pixel_to_world_values([(n_cols - 1) / 2.0] * 2, [0.0, n_rows - 1.0]))
    pole = np.cross(ends[0], ends[1])
    node_deg = math.degrees(math.atan2(pole[0], -pole[1])) % 360.0
    incl_deg = math.degrees(math.atan2(math.hypot(pole[0], pole[1]), pole[2]))
    ra, dec = wcs.pixel_to_world_values(cols, rows)
    mu, nu = to_great_circle(ra, dec, node_deg, incl_deg)
    design = np.stack([np.ones_like(rows), rows, cols], axis=1)
    fit = [np.linalg.lstsq(design, part, rcond=None)[0].tolist() for part in (np.unwrap(mu, period=360.0), nu)]
    return _GreatCircle(node_deg, incl_deg, fit[0], fit[1])


def _frame_bytes(flux: np.ndarray, wcs: WCS, field: Field, band: str, chip: _Chip) -> bytes:
    """A frame with the HDUs of the real ones."""
    n_rows, n_cols = flux.shape
    circle = _great_circle(wcs, flux.shape)
    primary = fits.PrimaryHDU(ten_bits(flux))
    cards = {
        "ORIGIN": ("PIX2MASS", "mock sky"),
        "TELESCOP": "2.5m",
        "RUN": (field.run, "Run number"),
        "FRAME": (field.field, "Frame sequence number within the run"),
        "CCDLOC": 10 * ("riuzg".index(band) + 1) + field.camcol,
        "FLAVOR": "science",
        "NODE": (circle.node_deg, "RA of the great circle's ascending node (deg)"),
        "INCL": (circle.incl_deg, "Great circle's inclination wrt cel. eq. (deg)"),
        "OBJECT": "mock sky",
        "EXPTIME": ("53.907456", "Exposure time (seconds)"),
        "CCDMODE": "DRIFT",
        "COLBIN": 1,
        "ROWBIN": 1,
        "CAMROW": "riuzg".index(band) + 1,
        "EQUINOX": 2000.0,
        "BUNIT": ("nanomaggy", "1 nanomaggy = 3.631e-6 Jy"),
        "FILTER": (band, "filter used"),
        "CAMCOL": (field.camcol, "column in the imaging camera"),
        "RADECSYS": "ICRS",
        "CTYPE1": "RA---TAN",
        "CTYPE2": "DEC--TAN",
        "CUNIT1": "deg",
        "CUNIT2": "deg",
    }
    for key, number in _wcs_row(wcs, flux.shape).items():
        if not key.startswith("naxis"):
            cards[key.upper()] = number
    cards |= {
        "NMGY": (float(chip.calib.mean()), "Calibration factor [nMgy per count]"),
        "NMGYIVAR": float((CALIB_SCATTER_LN * chip.calib.mean()) ** -2),
        "RERUN": "301",
    }
    primary.header.update(cards)
    sky_shape = (math.ceil(n_rows / 8) + 5, math.ceil(n_cols / 8))
    x_interp, y_interp = (np.arange(n_cols) + 0.5) / 8 - 0.5, (np.arange(n_rows) + 0.5) / 8 + 0.5
    # Straight lines between the table's columns give back the sky, which is linear in the column.
    all_sky = np.interp(8 * np.arange(sky_shape[1]) + 3.5, np.arange(n_cols), chip.sky)
    sky = {
        "ALLSKY": np.broadcast_to(all_sky, sky_shape).astype(np.float32),
        "XINTERP": x_interp.astype(np.float32),
        "YINTERP": y_interp.astype(np.float32),
    }
    astrometry = {
        **{"RUN": field.run, "RERUN": "301", "CAMCOL": field.camcol, "FILTER": band},
        **{"NODE": circle.node_deg, "INCL": circle.incl_deg, "NAXIS": np.array([n_cols, n_rows], np.int32)},
        **{"FIELD": field.field, **dict(zip("ABCDEF", (*circle.mu, *circle.nu), strict=True))},
    }
    zero = ("DROW0", "DROW1", "DROW2", "DROW3", "DCOL0", "DCOL1", "DCOL2", "DCOL3", "CSROW", "CSCOL", "CCROW", "CCCOL")
    astrometry |= {name: 0.0 for name in zero} | {"RICUT": 100.0, "MJD": _MJD, "AIRMASS": 1.2}
    astrometry |= {"MUERR": np.float32(0.03), "NUERR": np.float32(0.03)}
    buffer = io.BytesIO()
    fits.HDUList([primary, fits.ImageHDU(chip.calib), _table([sky]), _table([astrometry])]).writeto(buffer)
    return buffer.getvalue()


_MJD = 52_000.0


def _field_facts(field: Field, wcs: WCS, painter: _Painter, chips: Mapping[str, _Chip]) -> dict[str, Any]:
    """A field's row in photoField."""
    gain, dark_variance, calib, sky = (
        np.array([np.mean(getattr(chips[band], name)) for band in BANDS], np.float32)
        for name in ("gain", "dark_variance", "calib", "sky")
    )
    return {
        **{"RUN": field.run, "RERUN": "301", "CAMCOL": field.camcol, "FIELD": field.field},
        **{"RA": float(wcs.wcs.crval[0]), "DEC": float(wcs.wcs.crval[1])},
        **{"GAIN": gain, "DARK_VARIANCE": dark_variance, "NMGYPERCOUNT": calib},
        **{"SKY": calib * sky / np.float32(SDSS_PIXEL_SCALE_ARCSEC**2)},
        **{"PSF_WIDTH": painter.camera.psf_fwhm_arcsec.astype(np.float32)},
    }


def ten_bits(flux: np.ndarray) -> np.ndarray:
    """Numbers rounded to ten binary digits of precision, as those of real frames, which makes files a third as large.

    Args:
        flux: (rows, cols) nanomaggies.
    """
    bits = np.ascontiguousarray(flux, np.float32).view(np.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(np.float32)


def _table(rows: list[dict[str, Any]]) -> fits.BinTableHDU:
    """A FITS table; whole numbers take 4 bytes."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    columns = {name: data.astype(np.int32) if data.dtype == np.int64 else data for name, data in columns.items()}
    table = np.zeros(len(rows), [(name, data.dtype, data.shape[1:]) for name, data in columns.items()])
    for name, data in columns.items():
        table[name] = data
    return fits.BinTableHDU(table)


def _table_bytes(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), _table(rows)]).writeto(buffer)
    return buffer.getvalue()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file, in folders made for it, so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
