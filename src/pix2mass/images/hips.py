"""Cutouts from the CDS service hips2fits, which resamples SDSS mosaics on its side: few bytes, but no noise and no PSF.

HiPS is described by Fernique et al. 2015, A&A 578, A114; the service at
https://alasky.cds.unistra.fr/hips-image-services/hips2fits.
"""

from __future__ import annotations

import io
import time
import warnings
from dataclasses import replace
from typing import Any, Self

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from pix2mass.config import GridConfig
from pix2mass.images import http
from pix2mass.images.cutouts import background_scatter
from pix2mass.images.grid import MIN_COVERAGE, ClusterRow, pixel_scale_arcsec, read_position, resample, target_wcs
from pix2mass.images.http import BadFrame, Counts, Health, TryAgain
from pix2mass.types import SDSS_PIXEL_SCALE_ARCSEC, Cutout, Flag, Pix2massError, empty_cutout

HIPS = "CDS/P/SDSS9/{band}"
"""The mosaics, one per band."""

REQUEST_PIXELS = 256
"""Pixels on a side of what is asked for, where the store's grid is coarser: they are averaged here, by area."""

_HEADER_BYTES = 2880
_PAUSE_S = 0.05


def request_pixels(grid: GridConfig, scale_arcsec: float) -> int:
    """Pixels on a side of what is asked for: a multiple of the grid's, near 256, not finer than SDSS pixels.

    Args:
        grid: the store's grid.
        scale_arcsec: its pixel size.
    """
    finest = max(int(scale_arcsec / SDSS_PIXEL_SCALE_ARCSEC), 1)
    return grid.n_pixels * min(max(REQUEST_PIXELS // grid.n_pixels, 1), finest)


def request_bytes(n_pixels: int) -> int:
    """Size of an answer of the service in bytes: a header block and the pixels as float32, in blocks of 2880."""
    return _HEADER_BYTES + -(-4 * n_pixels**2 // 2880) * 2880


class HipsSource:
    """Cutouts from hips2fits.

    Pixels are taken as nanomaggies per SDSS pixel of 0.396", a surface brightness, as in the frames that the mosaics
    were made of; they are scaled by area to nanomaggies per pixel. The service interpolates between HEALPix cells; what
    it sends is averaged over area onto the store's grid. It sends no noise: the robust scatter of the background on the
    store's grid stands for every pixel (flag SIGMA_APPROXIMATE). The PSF width is not known. Pixels that are not finite
    are outside the survey.

    Attributes:
        grid: the pixel grid and the bands.
        counts: what was fetched so far.
        provenance: what is known and assumed about the pixels.
    """

    def __init__(self, grid: GridConfig, server: str) -> None:
        """Name the service; nothing is asked for yet.

        Args:
            grid: the pixel grid and the bands.
            server: URL of the service.

        Raises:
            Pix2massError: not an http(s) URL.
        """
        http.Client(server, connections=1).close()  # says what is wrong with a URL
        self.grid = grid
        self.counts = Counts()
        self._server = server
        self._service: Any = None
        self.provenance = {
            "hips": [HIPS.format(band=band) for band in grid.bands],
            "unit": "taken as nanomaggies per 0.396 arcsec pixel (surface brightness), scaled to nanomaggies per pixel",
            "resampling": "HEALPix cells interpolated by hips2fits onto a finer tangent plane, averaged over area here",
            "sigma": "robust scatter of the background, one value per band and cutout; none was sent",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"grid": self.grid, "server": self._server}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["grid"], state["server"])

    def statistics(self) -> dict[str, Any]:
        """What was fetched so far, for a build's summary."""
        return self.counts.statistics()

    def close(self) -> None:
        """Close the connection."""
        if self._service is not None:
            self._service._session.close()
            self._service = None

    def cutout(self, cluster: ClusterRow) -> Cutout:
        """The cutout of one cluster.

        Args:
            cluster: dict or table row with ``ra_deg``, ``dec_deg`` (ICRS degrees) and, where the grid's width is in
                kpc, ``z``; ``id`` appears in messages.

        Returns:
            The bands of ``grid`` on its pixels, flagged SIGMA_APPROXIMATE. A band that cannot be had is warned about
            and flagged UNREADABLE.

        Raises:
            Pix2massError: the position or redshift is not usable, or the service does not answer.
        """
        position = read_position(cluster)
        try:
            scale = pixel_scale_arcsec(self.grid, position.z)
        except Pix2massError as error:
            raise Pix2massError(f"cluster {position.name}: {error}") from None
        n_pixels, bands = self.grid.n_pixels, self.grid.bands
        wcs = target_wcs(position.ra_deg, position.dec_deg, scale, n_pixels)
        n_asked = request_pixels(self.grid, scale)
        scale_asked = scale * n_pixels / n_asked
        asked = target_wcs(position.ra_deg, position.dec_deg, scale_asked, n_asked)
        asked.pixel_shape = (n_asked, n_asked)
        cutout = empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, Flag(0))
        flags = Flag(0)
        for k, band in enumerate(bands):
            name = f"{self._server}: {HIPS.format(band=band)} around cluster {position.name}"
            try:
                image, image_wcs = self._fetch(name, HIPS.format(band=band), asked)
            except BadFrame as problem:
                warnings.warn(f"{name}: {problem}; band {band} is missing", stacklevel=2)
                flags |= Flag.UNREADABLE
                continue
            bad = ~np.isfinite(image)
            value = np.where(bad, 0.0, image) * (scale_asked / SDSS_PIXEL_SCALE_ARCSEC) ** 2
            flux, _, coverage = resample(value, np.zeros_like(value), bad, image_wcs, wcs, n_pixels)
            usable = coverage >= MIN_COVERAGE
            sigma = background_scatter(flux[usable])
            usable &= sigma > 0.0
            cutout.flux[k] = np.where(usable, flux, 0.0)
            cutout.sigma[k] = np.where(usable, sigma, 0.0)
            cutout.mask[k] = ~usable
        if cutout.mask.all():
            flags = (flags & Flag.UNREADABLE) | Flag.OUTSIDE
            return empty_cutout(bands, n_pixels, position.ra_deg, position.dec_deg, scale, flags)
        present = ~cutout.mask.all(axis=(1, 2))
        if not present.all():
            flags |= Flag.MISSING_BAND
        if cutout.mask[present].any():
            flags |= Flag.PARTLY_OUTSIDE
        return replace(cutout, flags=flags | Flag.SIGMA_APPROXIMATE)

    def _fetch(self, name: str, hips: str, wcs: WCS) -> tuple[np.ndarray, WCS]:
        """Image (n, n) and its WCS."""
        health = self._open()
        with self.counts.timed():
            time.sleep(_PAUSE_S)
            try:
                answer = http.retry(lambda: self._ask(hips, wcs), self.counts)
            except (TryAgain, BadFrame) as error:
                self.counts.add(failed=1)
                raise health.failed(name, error) from None
        health.succeeded()
        self.counts.add(files=1)
        return answer

    def _open(self) -> Health:
        from astroquery.hips2fits import hips2fitsClass

        if self._service is None:
            self._service = hips2fitsClass()
            self._service.server = self._server
            self._service.timeout = http.TIMEOUT_S
            self._service._session.headers["User-Agent"] = http.user_agent()
            self._health = Health(self._server, self._alive)
        return self._health

    def _alive(self) -> bool:
        try:
            return self._service._session.get(self._server, timeout=http.TIMEOUT_S).status_code < 500
        except Exception:  # noqa: BLE001  requests and urllib3 each have errors of their own
            return False

    def _ask(self, hips: str, wcs: WCS) -> tuple[np.ndarray, WCS]:
        looks = {"min_cut": 0.5, "max_cut": 99.5, "stretch": "linear", "cmap": "Greys_r"}  # of pictures, not of FITS
        try:
            reply = self._service.query_with_wcs_async(hips=hips, wcs=wcs, format="fits", **looks)
        except Exception as error:  # noqa: BLE001
            raise TryAgain(f"{type(error).__name__}: {error}") from None
        if reply.status_code == 429 or reply.status_code >= 500:
            raise TryAgain(f"HTTP status {reply.status_code}")
        if reply.status_code != 200:
            raise BadFrame(f"expected HTTP status 200, got {reply.status_code}: {reply.text[:200]!r}")
        self.counts.add(bytes_read=len(reply.content))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged file warns before it fails; the failure is reported below
                with fits.open(io.BytesIO(reply.content), memmap=False) as hdus:
                    primary: Any = hdus[0]
                    image, image_wcs = np.asarray(primary.data, float), WCS(primary.header, naxis=2)
        except Exception as error:  # noqa: BLE001  astropy fails in many ways on damaged files
            raise TryAgain(f"not the FITS image asked for: {error}", answered=True) from None
        if image.shape != wcs.array_shape or not image_wcs.has_celestial:
            raise TryAgain(f"expected an image of shape {wcs.array_shape}, got {image.shape}", answered=True)
        return image, image_wcs
