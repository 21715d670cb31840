"""Mock clusters painted into other images, whose true mass is known there: into real frames, or into cutouts.

What is painted is the light of the members, of the brightest galaxy and of the diffuse light, blurred by the image's
own PSF, with its Poisson noise; neither the mock sky's field galaxies nor its stars.
"""

from __future__ import annotations

import bz2
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from astropy.io import fits
from astropy.table import QTable

from pix2mass.config import GridConfig, MockConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.images.archive import BadFrame, Field, decompress, frame_path, open_archive
from pix2mass.images.frame import parse_frame, read_table, tabulated_noise
from pix2mass.images.frame_index import FrameIndex, random_positions, unit_vectors
from pix2mass.images.grid import ClusterRow, pixel_scale_arcsec, target_wcs
from pix2mass.images.mock.frames import (
    claim_folder,
    dimmed_flux,
    draw,
    on_pixels,
    pixel_arcsec,
    row_segments,
    ten_bits,
    with_truth,
    write_atomic,
)
from pix2mass.images.mock.population import Sources, draw_clusters, galaxies, stream, value
from pix2mass.images.window import WINDOW_FLIST, write_window_flist
from pix2mass.types import BANDS, SDSS_PIXEL_SCALE_ARCSEC, Cutout, Pix2massError

LIGHT_WIDTH_KPC = 9000.0
"""Width of the box whose members are painted into frames: it holds those of 10^15.2 Msun, out to 2 R200c."""

ACCURACY = 10.0
"""How much more accurately than for pixels of the mock sky the light is drawn."""

HALO_REACH_KPC = 600.0
"""How far outside a cutout the members lie whose light is painted: 4 half-light radii of the diffuse light and more."""

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class _Source(Protocol):
    def cutout(self, cluster: ClusterRow) -> Cutout: ...


def cluster_light(
    cluster: ClusterRow, config: MockConfig, width_arcsec: float, seed: int
) -> tuple[Sources, np.ndarray]:
    """What is painted: the members of a mock cluster, the brightest galaxy and the diffuse light among them.

    Args:
        cluster: id, z and true mass as for ``population.galaxies``; E(B-V) in ``ebv``, where there, dims the light.
        config: the mock survey.
        width_arcsec: width of the box about the cluster's position.
        seed: seed of the sky.

    Returns:
        The sources, and their fluxes (n, 5) in nanomaggies in u, g, r, i, z.
    """
    alone = config.model_copy(update={"projected_groups": False})
    sources = galaxies(cluster, alone, width_arcsec, seed)
    sources = sources[sources.is_member]
    ebv_mag = value(cluster, "ebv", 0.0)
    return sources, dimmed_flux(sources.mag, float(ebv_mag) if np.isfinite(ebv_mag) else 0.0)


class InjectedSource:
    """Cutouts of another source with mock clusters painted in.

    The Poisson noise of the added light is drawn and added to ``sigma``: its variance is the light times
    ``config.physics.nmgy_per_electron``. Where the other source does not know the PSF, that of
    ``config.physics.psf_fwhm_arcsec`` is taken. Masked pixels stay as they are.

    Args:
        source: anything with ``cutout(cluster)``, e.g. ``FrameSource`` or ``MockSource``.
        config: the mock survey.
        seed: a cluster's light and its noise depend on the seed and on the cluster's id alone.
    """

    def __init__(self, source: _Source, config: MockConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the other source."""
        close = getattr(self.source, "close", None)
        if close:
            close()

    def cutout(self, cluster: ClusterRow) -> Cutout:
        """The other source's cutout with the cluster in it.

        Args:
            cluster: where to paint and what: position, id, z and true mass (see ``cluster_light``).

        Raises:
            Pix2massError: as the other source does.
        """
        plain = self.source.cutout(cluster)
        if plain.mask.all():
            return plain
        physics, index = self.config.physics, [BANDS.index(band) for band in plain.bands]
        n_pixels, scale = plain.flux.shape[-1], plain.pixel_scale_arcsec
        # Light of members outside reaches into the picture, that of a miscentred brightest galaxy far.
        margin_arcsec = 2.0 * HALO_REACH_KPC / float(kpc_per_arcsec(float(cluster["z"])))
        sources, flux = cluster_light(cluster, self.config, n_pixels * scale + margin_arcsec, self.seed)
        wcs = target_wcs(plain.ra_deg, plain.dec_deg, scale, n_pixels)
        placed = on_pixels(sources, plain.ra_deg, plain.dec_deg, wcs)
        psf = np.array(physics.psf_fwhm_arcsec)
        psf[index] = np.where(np.isfinite(plain.psf_fwhm_arcsec), plain.psf_fwhm_arcsec, psf[index])
        window = slice(0, n_pixels)
        light = _draw(placed, flux, index, psf[index], self.config, scale, (window, window))
        variance = np.maximum(light, 0.0) * np.array(physics.nmgy_per_electron)[index, None, None]
        # All five bands are drawn even if fewer are kept: a band's noise does not depend on the choice of the others.
        normal = stream(self.seed, str(cluster["id"]), "injected").normal(size=(len(BANDS), n_pixels, n_pixels))[index]
        return replace(
            plain,
            flux=np.where(plain.mask, plain.flux, plain.flux + light + np.sqrt(variance) * normal).astype(np.float32),
            sigma=np.where(plain.mask, plain.sigma, np.sqrt(plain.sigma**2 + variance)).astype(np.float32),
        )


def random_clusters(index: FrameIndex, config: MockConfig, n: int, seed: int, margin_arcsec: float = 60.0) -> QTable:
    """Mock clusters at random positions inside frames.

    Args:
        index: the frames.
        config: ranges of mass and redshift.
        n: number of clusters, spread evenly over the fields.
        seed: of positions and clusters.
        margin_arcsec: least distance from the frame's edge.

    Returns:
        Columns of ``draw_clusters`` with the new positions, and ``group``, the field.

    Raises:
        Pix2massError: the margin leaves nothing of a frame, or ``n`` is below 1.
    """
    if n < 1:
        raise Pix2massError(f"random clusters: expected n of 1 or more, got {n}")
    fields = len(index.fields)
    each = math.ceil(n / fields)
    places = random_positions(index, each, seed, margin_arcsec)
    # One in each field, fields in random order, then a second one, and so on.
    number = np.arange(len(places))
    turn = np.lexsort((np.random.default_rng([seed, fields]).permutation(fields)[number // each], number % each))
    places = places[np.sort(turn[:n])]
    clusters = draw_clusters(config, n, seed, "injected-")
    for name in ("ra_deg", "dec_deg", "group"):
        clusters[name] = places[name]
    # Members are centred where ``galaxies`` draws it anew, about the new positions.
    clusters.remove_columns([name for name in ("ra_deg_true", "dec_deg_true") if name in clusters.colnames])
    return clusters


@dataclass(frozen=True, eq=False)
class _Light:
    """A cluster's sources and fluxes (n, 5), its position, and how far its light reaches."""

    ra_deg: float
    dec_deg: float
    sources: Sources
    flux: np.ndarray
    reach_deg: float


def inject_frames(
    base: str | Path,
    catalog: QTable,
    config: MockConfig,
    seed: int,
    out: Path,
    grid: GridConfig,
    *,
    index: FrameIndex | None = None,
    progress: Progress | None = None,
) -> FrameIndex:
    """Copy the frames that clusters' cutouts need, with mock clusters painted in.

    Each frame keeps its HDUs, its WCS and its noise; photoField and psField are copied with it. The light is blurred by
    the PSF that they give (else ``config.physics.psf_fwhm_arcsec``); its Poisson variance per pixel is flux times
    calibration over gain. Rows that two fields share get the same noise. Finished files are kept: the same call goes on
    after a kill.

    Args:
        base: folder, or http(s) URL, that holds ``dr12``.
        catalog: ``id``, ``ra_deg``, ``dec_deg``, ``z`` and mass or richness (see ``with_truth``); with E(B-V) in
            ``ebv`` the light is dimmed.
        config: the mock survey.
        seed: same seed, same bytes.
        out: folder; gets ``dr12/...`` and ``truth.ecsv``.
        grid: of the cutouts that the frames are to cover; its width counts.
        index: which frames exist; by default ``base`` is searched.
        progress: called with frames done and in all.

    Returns:
        The index of the frames written.

    Raises:
        Pix2massError: no frame covers any of the positions, ``out`` is ``base``, or holds something else.
    """
    if "://" not in str(base) and Path(base).resolve() == out.resolve():
        raise Pix2massError(f"{out}: expected another folder than that of the frames, which stay as they are")
    index = index or FrameIndex.from_base(base)
    truth = with_truth(catalog, config)
    wanted: dict[Field, set[str]] = {}
    for row in truth:
        width_arcsec = pixel_scale_arcsec(grid, float(row["z"])) * grid.n_pixels
        for band, found in index.covering(float(row["ra_deg"]), float(row["dec_deg"]), width_arcsec).items():
            for field in found:
                wanted.setdefault(field, set()).add(band)
    if not wanted:
        raise Pix2massError(f"{base}: no frame covers any of the {len(truth)} positions; check the catalogue")
    width = [grid.width_kpc, grid.width_arcsec]
    settings = {"injected into": str(base), "mock": config.model_dump(mode="json"), "seed": seed, "width": width}
    claim_folder(out, truth, settings)
    lights = [_light(row, config, seed) for row in truth if np.isfinite(row["log10_m500c_true"])]
    archive = open_archive(base)
    total, done = sum(map(len, wanted.values())), 0
    try:
        for field in sorted(wanted):
            gain, psf = _copy_field_facts(archive, field, out)
            psf = np.where(np.isfinite(psf) & (psf > 0.0), psf, config.physics.psf_fwhm_arcsec)
            for band in sorted(wanted[field], key=BANDS.index):
                path = out / frame_path(field, band, ".fits.bz2")
                if not path.is_file():
                    name = frame_path(field, band, index.suffix(field, band) or "")
                    data = archive.read(name)
                    if data is None:
                        raise BadFrame(f"{name}: no such file, though the frame index lists it")
                    data = decompress(data) if name.endswith(".bz2") else data
                    k = BANDS.index(band)
                    painted = _paint(data, field, band, lights, float(gain[k]), float(psf[k]), config, seed)
                    write_atomic(path, bz2.compress(painted))
                done += 1
                if progress is not None:
                    progress(done, total)
    except BadFrame as problem:
        raise Pix2massError(f"{base}: {problem}; leave this frame out of the index, or fetch it again") from None
    finally:
        archive.close()
    written = FrameIndex.from_base(out)
    write_window_flist(out / WINDOW_FLIST, written)
    return written


def _draw(
    placed: Sources,
    flux: np.ndarray,
    bands: list[int],
    psf_fwhm_arcsec: np.ndarray,
    config: MockConfig,
    scale_arcsec: float,
    window: tuple[slice, slice],
) -> np.ndarray:
    """Draw the bands wanted of sources with fluxes (n, 5), PSF widths (n_bands,): (n_bands, rows, cols).

    The renderer draws a source as accurately as its brightest band deserves. One more band, ``ACCURACY`` times
    brighter, makes the light in an aperture right, not the pixels alone, and the same whichever bands are drawn.
    """
    guide = ACCURACY * flux.max(axis=1, keepdims=True)
    widths = np.append(psf_fwhm_arcsec, psf_fwhm_arcsec.min())
    return draw(placed, np.hstack([flux[:, bands], guide]), widths, config, scale_arcsec, *window)[:-1]


def _light(row: ClusterRow, config: MockConfig, seed: int) -> _Light:
    width = LIGHT_WIDTH_KPC / float(kpc_per_arcsec(float(row["z"])))
    sources, flux = cluster_light(row, config, width, seed)
    reach = np.hypot(sources.x_arcsec, sources.y_arcsec) + 20.0 * sources.r50_arcsec + 60.0
    place = float(row["ra_deg"]), float(row["dec_deg"])
    return _Light(*place, sources, flux, float(reach.max(initial=0.0)) / 3600.0)


def _copy_field_facts(archive: Any, field: Field, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Copy a field's photoField and psField where there; its gain (5,), and PSF width (5,) or NaN."""
    run, camcol, number = field
    gain, psf = tabulated_noise(run, camcol)[0], np.full(len(BANDS), np.nan)
    paths = (
        f"dr12/boss/photo/redux/301/{run}/objcs/{camcol}/psField-{run:06d}-{camcol}-{number:04d}.fit",
        f"dr12/boss/photoObj/301/{run}/photoField-{run:06d}-{camcol}.fits",
    )
    for path, hdu in zip(paths, (6, 1), strict=True):
        data = archive.read(path)
        if data is None:
            continue
        write_atomic(out / path, data)
        table = read_table(data, hdu, ("FIELD", "GAIN", "PSF_WIDTH"))
        rows = np.flatnonzero(table["FIELD"] == number) if "FIELD" in table else np.array([0])
        if rows.size:
            psf = table["PSF_WIDTH"][rows[0]] if "PSF_WIDTH" in table else psf
            gain = table["GAIN"][rows[0]] if "GAIN" in table else gain
    return gain, np.asarray(psf, float)


def _paint(
    data: bytes,
    field: Field,
    band: str,
    lights: list[_Light],
    gain: float,
    psf_fwhm_arcsec: float,
    config: MockConfig,
    seed: int,
) -> bytes:
    """A frame with the light of clusters in it."""
    frame = parse_frame(data, field, band)
    rows, cols = frame.flux.shape
    light = np.zeros((rows, cols), np.float32)
    centre = frame.wcs.pixel_to_world_values((cols - 1) / 2.0, (rows - 1) / 2.0)
    half_deg = 0.5 * math.hypot(rows, cols) * SDSS_PIXEL_SCALE_ARCSEC / 3600.0
    psf, k = np.array([psf_fwhm_arcsec]), BANDS.index(band)
    for one in lights:
        apart = unit_vectors(*centre) - unit_vectors(one.ra_deg, one.dec_deg)
        if np.linalg.norm(apart) < math.radians(half_deg + one.reach_deg):
            placed = on_pixels(one.sources, one.ra_deg, one.dec_deg, frame.wcs)
            window = slice(0, rows), slice(0, cols)
            light += _draw(placed, one.flux, [k], psf, config, pixel_arcsec(frame.wcs), window)[0]
    noise = np.sqrt(np.maximum(light, 0.0) * frame.calib / np.float32(gain)) * _run_noise(field, band, rows, cols, seed)
    with fits.open(io.BytesIO(data), memmap=False) as hdus:
        hdus[0].data = ten_bits(frame.flux + light + noise)  # type: ignore[union-attr]
        hdus[0].header.add_history(f"pix2mass: mock clusters painted in, seed {seed}")  # type: ignore[union-attr]
        buffer = io.BytesIO()
        hdus.writeto(buffer, output_verify="silentfix")
    return buffer.getvalue()


def _run_noise(field: Field, band: str, rows: int, cols: int, seed: int) -> np.ndarray:
    """Unit noise (rows, cols) of a frame, the same in the rows that it shares with its neighbours."""
    parts = []
    for start, stop in row_segments(field.field, rows):
        rng = stream(seed, f"{field.run}-{field.camcol}", f"injected {start} {band}")
        parts.append(rng.standard_normal((stop - start, cols), np.float32))
    return np.concatenate(parts)
