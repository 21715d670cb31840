"""The nouns that cross every border: bands, flags, ``Cutout``, ``MassEstimate`` and the one error type.

This module imports nothing but numpy, so that everything else may import it at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

import numpy as np

BANDS = "ugriz"
"""The SDSS bands in order of wavelength. A store holds any ordered subset of them."""

SDSS_PIXEL_SCALE_ARCSEC = 0.396
"""Pixel size of SDSS frames. Source: York et al. 2000, AJ 120, 1579."""

NANOMAGGY_ZEROPOINT_MAG = 22.5
"""Magnitude of 1 nanomaggy, mag = 22.5 - 2.5 log10 f. Source: SDSS DR12 frame data model."""

EXTINCTION_PER_EBV = {"u": 4.239, "g": 3.303, "r": 2.285, "i": 1.698, "z": 1.263}
"""A_band / E(B-V)_SFD for R_V = 3.1. Source: Schlafly & Finkbeiner 2011, ApJ 737, 103, table 6."""


class Pix2massError(Exception):
    """A mistake the user can mend: the message says what was expected, what came, where, and what to do."""


class Flag(IntFlag):
    """Named bits that say what is wrong with a cutout or with an estimate; no bit set means nothing is known to be."""

    OUTSIDE = 1 << 0
    PARTLY_OUTSIDE = 1 << 1
    MISSING_BAND = 1 << 2
    SATURATED = 1 << 3
    BAD_PIXELS = 1 << 4
    SIGMA_APPROXIMATE = 1 << 5
    UNREADABLE = 1 << 6
    REDSHIFT_EXTRAPOLATED = 1 << 16
    LOW_COVERAGE = 1 << 17
    NO_ESTIMATE = 1 << 18
    OTHER_PIXEL_SCALE = 1 << 19
    BRIGHT_STAR = 1 << 20
    UNLIKE_TRAINING = 1 << 21
    NO_CLUSTER_SEEN = 1 << 22

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the bits that are set, lowest bit first."""
        return tuple(flag.name or "" for flag in Flag if flag in self)

    def __str__(self) -> str:
        return "|".join(self.names)


FLAG_MEANING = {
    Flag.OUTSIDE: "no image covers the position: there are no pixels",
    Flag.PARTLY_OUTSIDE: "part of the cutout lies outside the images",
    Flag.MISSING_BAND: "at least one band has no pixels where the others have",
    Flag.SATURATED: "some pixels are close to full well (judged by counts, approximate)",
    Flag.BAD_PIXELS: "some pixels inside the image are not finite or have no valid noise",
    Flag.SIGMA_APPROXIMATE: "the noise was not given by the image's own gain and dark variance",
    Flag.UNREADABLE: "a file that should cover the position could not be read",
    Flag.REDSHIFT_EXTRAPOLATED: "the redshift lies outside the range the run was trained on",
    Flag.LOW_COVERAGE: "less of the cutout is covered than in any training image",
    Flag.NO_ESTIMATE: "there are no usable pixels: no mass is given",
    Flag.OTHER_PIXEL_SCALE: "the pixels are larger or smaller than the run's grid has at this redshift",
    Flag.BRIGHT_STAR: "a source is far brighter than in the training images",
    Flag.UNLIKE_TRAINING: "the image's brightness, texture or colours are far from those of the training images",
    Flag.NO_CLUSTER_SEEN: "the estimate is lower than nearly all of the training clusters got: perhaps blank sky",
}
"""One sentence per flag, for reports and tables."""

UNTRUSTED = (
    Flag.OUTSIDE
    | Flag.MISSING_BAND
    | Flag.UNREADABLE
    | Flag.REDSHIFT_EXTRAPOLATED
    | Flag.LOW_COVERAGE
    | Flag.NO_ESTIMATE
    | Flag.OTHER_PIXEL_SCALE
    | Flag.BRIGHT_STAR
    | Flag.UNLIKE_TRAINING
    | Flag.NO_CLUSTER_SEEN
)
"""An estimate with any of these is not to be trusted; the other flags are remarks."""


def check_bands(bands: str | Iterable[str]) -> str:
    """Return the bands as a string, e.g. ``"gri"``.

    Raises:
        Pix2massError: if a band is unknown, doubled, or out of the order u, g, r, i, z.
    """
    text = "".join(bands)
    positions = [BANDS.find(band) for band in text]
    if not text or -1 in positions or positions != sorted(set(positions)):
        raise Pix2massError(
            f"bands: expected one or more of {BANDS!r} in that order, each once, got {text!r}; write e.g. --bands gri"
        )
    return text


@dataclass(frozen=True, eq=False)
class Cutout:
    """The bands of one position on one pixel grid: tangent plane, north up, east left, centred on the position.

    Attributes:
        flux: (n_bands, h, w) float32, nanomaggies per pixel; 0 where masked.
        sigma: (n_bands, h, w) float32, standard deviation of ``flux`` in nanomaggies; 0 where masked.
        mask: (n_bands, h, w) bool, True where the pixel must not be used.
        bands: names of the bands, in order.
        ra_deg: right ascension of the grid's centre, ICRS degrees.
        dec_deg: declination of the grid's centre, ICRS degrees.
        pixel_scale_arcsec: pixel size of the grid.
        psf_fwhm_arcsec: (n_bands,) float32, NaN where unknown.
        flags: what is wrong with the images.
    """

    flux: np.ndarray
    sigma: np.ndarray
    mask: np.ndarray
    bands: str
    ra_deg: float
    dec_deg: float
    pixel_scale_arcsec: float
    psf_fwhm_arcsec: np.ndarray
    flags: Flag = Flag(0)

    def __post_init__(self) -> None:
        check_bands(self.bands)
        if self.flux.ndim != 3 or self.flux.shape[0] != len(self.bands):
            raise Pix2massError(
                f"flux: expected shape ({len(self.bands)}, h, w) for bands {self.bands!r}, got {self.flux.shape}"
            )
        for name in ("sigma", "mask"):
            if getattr(self, name).shape != self.flux.shape:
                raise Pix2massError(f"{name}: expected shape {self.flux.shape}, got {getattr(self, name).shape}")
        if self.psf_fwhm_arcsec.shape != (len(self.bands),):
            raise Pix2massError(
                f"psf_fwhm_arcsec: expected shape ({len(self.bands)},), got {self.psf_fwhm_arcsec.shape}"
            )
        if self.mask.dtype != np.bool_:
            raise Pix2massError(f"mask: expected bool, got {self.mask.dtype}")

    @property
    def coverage(self) -> float:
        """Share of pixels, over all bands, that are not masked."""
        return float(1.0 - self.mask.mean())


def empty_cutout(
    bands: str, n_pixels: int, ra_deg: float, dec_deg: float, pixel_scale_arcsec: float, flags: Flag
) -> Cutout:
    """A cutout without a single usable pixel, which keeps its row in the store and says why through ``flags``."""
    shape = (len(bands), n_pixels, n_pixels)
    return Cutout(
        flux=np.zeros(shape, np.float32),
        sigma=np.zeros(shape, np.float32),
        mask=np.ones(shape, np.bool_),
        bands=bands,
        ra_deg=ra_deg,
        dec_deg=dec_deg,
        pixel_scale_arcsec=pixel_scale_arcsec,
        psf_fwhm_arcsec=np.full(len(bands), np.nan, np.float32),
        flags=flags,
    )


@dataclass(frozen=True)
class MassEstimate:
    """One cluster's mass.

    Attributes:
        id: the cluster's name in the catalogue.
        log10_m500c: log10(M500c / Msun), H0 = 70, Om = 0.3; NaN where ``flags`` has NO_ESTIMATE.
        log10_m500c_err: standard deviation in dex.
        quantiles: log10 M500c at 2.5, 16, 50, 84 and 97.5 per cent.
        flags: bits of the cutout and of the estimate.
    """

    id: str
    log10_m500c: float
    log10_m500c_err: float
    quantiles: tuple[float, float, float, float, float]
    flags: Flag
