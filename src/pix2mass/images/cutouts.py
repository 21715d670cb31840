"""Cutouts from a user's own FITS images: one file per cluster and band, any pixel scale, any celestial WCS."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from pix2mass.config import GridConfig
from pix2mass.images.grid import MIN_COVERAGE, ClusterRow, pixel_scale_arcsec, read_position, resample, target_wcs
from pix2mass.types import Cutout, Flag, Pix2massError, empty_cutout

ACCEPTED_UNITS = ("nanomaggy", "nanomaggies", "nmgy", "nmaggy", "nanomaggy/pixel", "nanomaggies/pixel", "nmgy/pixel")
"""Values of BUNIT that are taken as nanomaggies per pixel, in any case; a file without BUNIT is believed."""

MAX_PIXELS_ACROSS = 500
"""An image with more pixels than this along one pixel of the cutout is refused: its WCS is most likely wrong."""

_NOISE_EXTENSIONS = ("SIGMA", "IVAR", "INVVAR")
_RADESYS = {"J2000": "FK5", "J2000.0": "FK5", "ICRF": "ICRS"}
"""Names of sky frames that are met in headers and that the FITS standard does not know -> what is meant."""


class _BadFile(Exception):
    """A file that cannot be used; the message says why."""


class _Image(NamedTuple):
    """One band: flux, variance and mask (rows, cols), True where bad; where it lies; its PSF; what is wrong."""

    flux: np.ndarray
    variance: np.ndarray
    mask: np.ndarray
    wcs: WCS
    psf_fwhm_arcsec: float
    flags: Flag


class _Regridded(NamedTuple):
    """One band on the grid of the cutout, (n, n): flux, variance, shares covered by usable and by any pixels."""

    flux: np.ndarray
    variance: np.ndarray
    coverage: np.ndarray
    footprint: np.ndarray


def cutout_path(pattern: str, identifier: str, band: str) -> Path:
    """The file of one band of one cluster; the id comes last, since it may hold braces."""
    return Path(pattern.replace("{band}", band).replace("{id}", identifier))


class CutoutSource:
    """Cutouts from files named by a pattern such as ``DIR/{id}-{band}.fits``.

    A file holds an image in nanomaggies per pixel (mag = 22.5 - 2.5 log10 f), sky subtracted, with a celestial WCS, in
    the first HDU that has one. Extensions, all of the image's shape, may be: ``SIGMA`` (standard deviation), or
    ``IVAR`` or ``INVVAR`` (inverse variance, 0 where bad), else the scatter of the background is measured and stands
    for every pixel (flag SIGMA_APPROXIMATE); and ``MASK`` (not 0 where bad). The header keyword ``PSF_FWHM``, in
    arcsec, is read where there, and so are the names of flags in ``CUTFLAGS``, as ``write_cutout`` writes them. Images
    are regridded by area onto the store's grid (see ``grid.resample``).
    """

    def __init__(self, pattern: str, grid: GridConfig) -> None:
        """Check a pattern.

        Args:
            pattern: path with ``{id}`` and ``{band}``, e.g. ``DIR/{id}-{band}.fits`` or ``DIR/{band}/{id}.fits.gz``.
            grid: the pixel grid and the bands.

        Raises:
            Pix2massError: ``{id}`` or ``{band}`` is missing, or the folder does not exist.
        """
        missing = [part for part in ("{id}", "{band}") if part not in pattern]
        if missing:
            raise Pix2massError(
                f"cutouts {pattern!r}: expected a pattern with {' and '.join(missing)}; "
                "write e.g. 'DIR/{id}-{band}.fits'"
            )
        folder = Path(pattern.split("{", 1)[0] + "x").parent
        if not folder.is_dir():
            raise Pix2massError(f"cutouts {pattern!r}: no such folder: {folder}")
        self.pattern = pattern
        self.grid = grid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to close; a source of images has this method."""

    def check_files(self, ids: Iterable[Any]) -> None:
        """Look whether the clusters of a catalogue have files, and warn of those that have none in any band.

        Args:
            ids: names of the clusters.

        Raises:
            Pix2massError: not one cluster has a file, or an id cannot be part of a file's name.
        """
        names, bands = [_check_id(value) for value in ids], self.grid.bands
        without = [name for name in names if not any(cutout_path(self.pattern, name, band).is_file() for band in bands)]
        if not without:
            return
        looked_for = f"cutouts {self.pattern!r}: {len(without)} of {len(names)} clusters have no file in any band"
        example = f"e.g. there is no {cutout_path(self.pattern, without[0], bands[0])}"
        if len(without) == len(names):
            raise Pix2massError(f"{looked_for}; {example}; correct the pattern, or the catalogue's column id")
        warnings.warn(f"{looked_for} and will be flagged OUTSIDE; {example}", stacklevel=2)

    def cutout(self, cluster: ClusterRow) -> Cutout:
        """The cutout of one cluster.

        Args:
            cluster: dict or table row with ``id``, ``ra_deg``, ``dec_deg`` (ICRS degrees) and, where the grid's width
                is in kpc, ``z``.

        Returns:
            The bands of ``grid`` on its pixels. A file that cannot be read is warned about by name and flagged
            UNREADABLE; its band counts as missing, as does one without a file.

        Raises:
            Pix2massError: the id, the position, the redshift or an image's unit is not usable.
        """
        position = read_position(cluster)
        if "id" not in cluster.keys():  # noqa: SIM118 - a table row has keys but no "in"
            raise Pix2massError("cluster: expected a column id, which names the files of the cutouts; add it")
        identifier = _check_id(cluster["id"])
        try:
            scale = pixel_scale_arcsec(self.grid, position.z)
        except Pix2massError as error:
            raise Pix2massError(f"cluster {identifier}: {error}") from None
        n_pixels, bands = self.grid.n_pixels, self.grid.bands
        wcs = target_wcs(position.ra_deg, position.dec_deg, scale, n_pixels)
        cutout = empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, Flag(0))
        inside = np.zeros_like(cutout.mask)
        flags = Flag(0)
        present = []
        for k, band in enumerate(bands):
            path = cutout_path(self.pattern, identifier, band)
            try:
                image = _read_image(path)
                flux, variance, coverage, footprint = _regrid(image, wcs, n_pixels)
            except FileNotFoundError:
                continue
            except _BadFile as problem:
                warnings.warn(f"{path}: {problem}; band {band} is missing", stacklevel=2)
                flags |= Flag.UNREADABLE
                continue
            present.append(k)
            if (coverage < footprint - 1e-6).any():
                if Flag.BAD_PIXELS in image.flags:
                    problem = "pixels that are not finite, or whose noise is not known and above 0, are masked"
                    warnings.warn(f"{path}: {problem}", stacklevel=2)
                flags |= image.flags & Flag.BAD_PIXELS
            flags |= image.flags & ~Flag.BAD_PIXELS
            usable = coverage >= MIN_COVERAGE
            inside[k] = footprint >= MIN_COVERAGE
            cutout.flux[k] = np.where(usable, flux, 0.0)
            cutout.sigma[k] = np.where(usable, np.sqrt(variance), 0.0)
            cutout.mask[k] = ~usable
            cutout.psf_fwhm_arcsec[k] = image.psf_fwhm_arcsec
        # CUTFLAGS are about all bands that were written: here some may be left out.
        flags &= ~Flag.OUTSIDE
        if not (cutout.mask.any(axis=0) & ~cutout.mask.all(axis=0)).any():
            flags &= ~Flag.MISSING_BAND
        if not cutout.mask.any():
            flags &= ~Flag.PARTLY_OUTSIDE
        if cutout.mask.all():
            flags = (flags & (Flag.UNREADABLE | Flag.BAD_PIXELS)) | Flag.OUTSIDE
            return empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, flags)
        if len(present) < len(bands) or not inside.any(axis=(1, 2)).all():
            flags |= Flag.MISSING_BAND
        if not inside[present].all():
            flags |= Flag.PARTLY_OUTSIDE
        return replace(cutout, flags=flags)


def _check_id(value: Any) -> str:
    """An id becomes part of a path: it must not lead out of the folder."""
    identifier = str(value)
    if not identifier or any(part in identifier for part in ("/", "\\", "\0", "..")):
        raise Pix2massError(
            f"id {identifier!r}: expected a name without '/', '\\', '..' and NUL, since it names the files of the "
            "cutouts; rename it in the catalogue and rename its files"
        )
    return identifier


def _read_image(path: Path) -> _Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file warns before it fails; the failure is reported below
            with fits.open(path, memmap=False) as hdus:
                return _parse_image(hdus, path)
    except (FileNotFoundError, _BadFile, Pix2massError):
        raise
    except Exception as error:  # astropy fails in many ways on damaged files
        raise _BadFile(f"truncated, or not a FITS file: {error}") from None


def _parse_image(hdus: Any, path: Path) -> _Image:
    extensions: dict[str, np.ndarray] = {}
    images, image, wcs = 0, None, WCS(naxis=2)
    for hdu in hdus:
        if not getattr(hdu, "is_image", False) or hdu.data is None:
            continue
        name = hdu.name.upper()
        if name in (*_NOISE_EXTENSIONS, "MASK"):
            extensions[name] = np.asarray(hdu.data, np.float64)
        elif image is None:
            images, wcs = images + 1, WCS(hdu.header, naxis=2)
            image = hdu if wcs.has_celestial else None
    if image is None:
        raise _BadFile("no image has a celestial WCS in its header" if images else "holds no image")
    flux = np.asarray(image.data, np.float64)
    wrong = [name for name, data in extensions.items() if data.shape != flux.shape]
    if flux.ndim != 2 or wrong:
        raise _BadFile(f"expected images of one shape (rows, cols), found {flux.shape}; of another shape: {wrong}")
    unit = str(image.header.get("BUNIT", "")).strip()
    if unit and unit.lower().replace(" ", "") not in ACCEPTED_UNITS:
        raise Pix2massError(
            f"{path}: expected BUNIT to be one of {', '.join(ACCEPTED_UNITS)}, got {unit!r}; convert the image to "
            "nanomaggies per pixel (1 nanomaggy is 3.631 microjansky, magnitude 22.5)"
        )
    radesys = wcs.wcs.radesys.strip().upper()
    wcs.wcs.radesys = _RADESYS.get(radesys, radesys)
    flags = Flag(0)
    masked = extensions.get("MASK", np.zeros(flux.shape)) != 0
    with np.errstate(all="ignore"):
        if "SIGMA" in extensions:
            variance = np.where(extensions["SIGMA"] > 0.0, np.square(extensions["SIGMA"]), np.nan)
        elif "IVAR" in extensions or "INVVAR" in extensions:
            ivar = extensions["IVAR" if "IVAR" in extensions else "INVVAR"]
            variance = 1.0 / np.where(ivar > 0.0, ivar, np.nan)
        else:
            variance = np.full(flux.shape, background_scatter(flux[np.isfinite(flux) & ~masked]) ** 2)
            flags |= Flag.SIGMA_APPROXIMATE
    bad = ~(np.isfinite(flux) & np.isfinite(variance) & (variance > 0.0))
    if (bad & ~masked).any():
        flags |= Flag.BAD_PIXELS
    named = str(image.header.get("CUTFLAGS", "")).split("|")
    for flag in Flag:
        flags |= flag if flag.name in named else Flag(0)
    try:
        psf_fwhm_arcsec = float(image.header.get("PSF_FWHM", np.nan))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        psf_fwhm_arcsec = np.nan
    mask = bad | masked
    return _Image(np.where(mask, 0.0, flux), np.where(mask, 0.0, variance), mask, wcs, psf_fwhm_arcsec, flags)


def _regrid(image: _Image, wcs: WCS, n_pixels: int) -> _Regridded:
    try:
        finest, wanted = (proj_plane_pixel_scales(one).min() * 3600.0 for one in (image.wcs, wcs))
        if finest * MAX_PIXELS_ACROSS < wanted:
            raise _BadFile(
                f"its pixels are {finest:.2g} arcsec wide, those of the cutout {wanted:.2g}; expected at most "
                f"{MAX_PIXELS_ACROSS} along one: correct the header's WCS, or bin the image"
            )
        flux, variance, coverage = resample(image.flux, image.variance, image.mask, image.wcs, wcs, n_pixels)
        footprint = coverage
        if image.mask.any():
            footprint = resample(image.flux * 0, image.variance * 0, None, image.wcs, wcs, n_pixels)[2]
    except _BadFile:
        raise
    except Exception as error:  # astropy fails in many ways on odd headers
        axes = f"CTYPE {' '.join(image.wcs.wcs.ctype)}, RADESYS {image.wcs.wcs.radesys!r}"
        raise _BadFile(f"the header's WCS ({axes}) cannot be used: {error}") from None
    return _Regridded(flux, variance, coverage, footprint)


def write_cutout(cutout: Cutout, cluster_id: str, pattern: str) -> list[Path]:
    """Write a cutout as FITS files, one per band, that ``CutoutSource`` reads.

    A file holds the flux in nanomaggies per pixel with its WCS, the extensions SIGMA and MASK (1 where unusable), and
    the keywords FILTER, OBJECT, PSF_FWHM (arcsec, where known) and CUTFLAGS (names of the flags).

    Args:
        cutout: the cutout.
        cluster_id: name of the cluster.
        pattern: path with ``{id}`` and ``{band}``; folders are made.

    Returns:
        The files, in the order of the bands.

    Raises:
        Pix2massError: the id cannot be part of a file's name.
    """
    identifier = _check_id(cluster_id)
    wcs = target_wcs(cutout.ra_deg, cutout.dec_deg, cutout.pixel_scale_arcsec, cutout.flux.shape[-1])
    paths = []
    for k, band in enumerate(cutout.bands):
        primary = fits.PrimaryHDU(cutout.flux[k], wcs.to_header())
        primary.header.update({"BUNIT": "nanomaggy", "FILTER": band, "OBJECT": identifier})
        if np.isfinite(cutout.psf_fwhm_arcsec[k]):
            primary.header["PSF_FWHM"] = (float(cutout.psf_fwhm_arcsec[k]), "arcsec")
        if cutout.flags:
            primary.header["CUTFLAGS"] = str(cutout.flags)
        sigma = fits.ImageHDU(cutout.sigma[k], name="SIGMA")
        mask = fits.ImageHDU(cutout.mask[k].astype(np.uint8), name="MASK")
        path = cutout_path(pattern, identifier, band)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        fits.HDUList([primary, sigma, mask]).writeto(part, overwrite=True)
        os.replace(part, path)
        paths.append(path)
    return paths


def background_scatter(values: np.ndarray) -> float:
    """Robust standard deviation of the background: 1.4826 MAD after clipping sources at 3 sigma, three times.

    Where more than half of the pixels are equal, as in an image without noise, the plain standard deviation.
    """
    plain = float(values.std()) if values.size else 0.0
    scatter = 0.0
    for _ in range(4):
        if not values.size:
            break
        centre = np.median(values)
        scatter = 1.4826 * float(np.median(np.abs(values - centre)))
        values = values[np.abs(values - centre) <= 3.0 * scatter]
    return scatter or plain
