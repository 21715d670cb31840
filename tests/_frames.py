"""Small synthetic SDSS frames in the archive's layout, with the HDUs, columns and header keywords of the real ones."""

from __future__ import annotations

import bz2
import io
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from pix2mass.images.archive import FRAMES_FOLDER
from pix2mass.images.grid import tan_wcs

SCALE_DEG = 0.396 / 3600.0
CALIB = {"u": 0.0074, "g": 0.0032, "r": 0.0048, "i": 0.0069, "z": 0.033}
SKY_COUNTS = 150.0


def frame_wcs(ra_deg: float, dec_deg: float, shape: tuple[int, int], angle_deg: float = 90.0) -> WCS:
    """TAN WCS of a frame centred on a position; SDSS frames of equatorial stripes are turned by 90 degrees."""
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    cd = SCALE_DEG * np.array([[-c, s], [s, c]])
    return tan_wcs((ra_deg, dec_deg), ((shape[1] + 1) / 2, (shape[0] + 1) / 2), cd)


def frame_bytes(flux: np.ndarray, wcs: WCS, run: int, camcol: int, field: int, band: str) -> bytes:
    """An uncompressed frame."""
    rows, cols = flux.shape
    primary = fits.PrimaryHDU(flux.astype(np.float32))
    header = primary.header
    header.update({"RUN": run, "CAMCOL": camcol, "FILTER": band})
    header.update({"BUNIT": "nanomaggy", "CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CUNIT1": "deg", "CUNIT2": "deg"})
    for k in (0, 1):
        header[f"CRPIX{k + 1}"], header[f"CRVAL{k + 1}"] = wcs.wcs.crpix[k], wcs.wcs.crval[k]
        header[f"CD{k + 1}_1"], header[f"CD{k + 1}_2"] = wcs.wcs.cd[k]
    calib = fits.ImageHDU(np.full(cols, CALIB[band], np.float32))
    coarse = (max(rows // 8, 2), max(cols // 8, 2))
    sky = fits.BinTableHDU.from_columns(
        [
            fits.Column(
                "ALLSKY",
                f"{coarse[0] * coarse[1]}E",
                dim=f"({coarse[1]},{coarse[0]})",
                array=np.full((1, *coarse), SKY_COUNTS),
            ),
            fits.Column("XINTERP", f"{cols}E", array=((np.arange(cols) + 0.5) / 8 - 0.5)[None]),
            fits.Column("YINTERP", f"{rows}E", array=((np.arange(rows) + 0.5) / 8 - 0.5)[None]),
        ]
    )
    astrometry = fits.BinTableHDU.from_columns([fits.Column("FIELD", "J", array=[field])])
    buffer = io.BytesIO()
    fits.HDUList([primary, calib, sky, astrometry]).writeto(buffer)
    return buffer.getvalue()


def write_frame(
    base: Path, flux: np.ndarray, wcs: WCS, run: int, camcol: int, field: int, band: str, suffix: str = ".fits.bz2"
) -> Path:
    """Write a frame into the archive under ``base`` and return its path."""
    folder = base / FRAMES_FOLDER / str(run) / str(camcol)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"frame-{band}-{run:06d}-{camcol}-{field:04d}{suffix}"
    data = frame_bytes(flux, wcs, run, camcol, field, band)
    path.write_bytes(bz2.compress(data) if suffix.endswith(".bz2") else data)
    return path


def write_photo_field(base: Path, run: int, camcol: int, fields: list[int], gain: float, dark: float) -> None:
    """Write a photoField table with the same gain and dark variance for every band."""
    folder = base / "dr12/boss/photoObj/301" / str(run)
    folder.mkdir(parents=True, exist_ok=True)
    columns = [
        fits.Column("FIELD", "J", array=fields),
        fits.Column("GAIN", "5E", array=np.full((len(fields), 5), gain)),
        fits.Column("DARK_VARIANCE", "5E", array=np.full((len(fields), 5), dark)),
        fits.Column("PSF_WIDTH", "5E", array=np.full((len(fields), 5), 1.3)),
    ]
    table = fits.BinTableHDU.from_columns(columns)
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(folder / f"photoField-{run:06d}-{camcol}.fits")


def gaussian(
    shape: tuple[int, int], wcs: WCS, ra_deg: float, dec_deg: float, flux: float, sigma_px: float
) -> np.ndarray:
    """An image of one round Gaussian source of the given total flux."""
    x, y = wcs.world_to_pixel_values(ra_deg, dec_deg)
    rows, cols = np.indices(shape)
    r2 = (cols - x) ** 2 + (rows - y) ** 2
    return flux * np.exp(-0.5 * r2 / sigma_px**2) / (2 * np.pi * sigma_px**2)
