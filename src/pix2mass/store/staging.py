"""The rows of an unfinished store: one object per cutout, whole or absent, in any order and from any process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pix2mass.config import GridConfig
from pix2mass.store.place import Place
from pix2mass.types import Cutout, Pix2massError

IMAGE_DTYPES = {"flux": np.dtype("<f4"), "sigma": np.dtype("<f4"), "mask": np.dtype("u1")}
"""Name of each array of images -> type of its pixels."""
MAX_ID_BYTES = 128
FOLDER = "staging"
_RECORD_BYTES = 2048


class CannotWrite(Pix2massError):
    """The disk or the object store refuses: nothing more can be written, whatever the cutout."""


class Staging:
    """Rows of an unfinished store.

    Args:
        location: of the store.
        grid: of every cutout.
    """

    def __init__(self, location: str | Path, grid: GridConfig) -> None:
        self._place = Place(location)
        self._grid = grid
        self._shape = (len(grid.bands), grid.n_pixels, grid.n_pixels)
        pixel_bytes = sum(dtype.itemsize for dtype in IMAGE_DTYPES.values())
        self._row_bytes = _RECORD_BYTES + int(np.prod(self._shape)) * pixel_bytes

    def put(self, row: int, cutout: Cutout, cluster_id: str, z: float, group: str = "") -> int:
        """Write one row. Once this returns, a kill does not lose it.

        Returns:
            Bytes written.

        Raises:
            CannotWrite: the disk refuses.
            Pix2massError: other bands, other shape, or values that mean nothing.
        """
        check_cutout(cutout, self._grid, cluster_id, group)
        record = json.dumps(
            {
                "id": cluster_id,
                "group": group,
                "z": z,
                "ra_deg": cutout.ra_deg,
                "dec_deg": cutout.dec_deg,
                "pixel_scale_arcsec": cutout.pixel_scale_arcsec,
                "psf_fwhm_arcsec": [float(width) for width in cutout.psf_fwhm_arcsec],
                "noise": [float(level) for level in _noise_per_band(cutout)],
                "flags": int(cutout.flags),
            },
            ensure_ascii=False,
        ).encode()
        images = [np.ascontiguousarray(getattr(cutout, name), dtype) for name, dtype in IMAGE_DTYPES.items()]
        data = b"".join([record.ljust(_RECORD_BYTES), *(image.tobytes() for image in images)])
        try:
            self._place.write(f"{FOLDER}/{row}", data)
        except OSError as error:
            raise CannotWrite(
                f"{self._place.location}: cutout {cluster_id} could not be written ({error}); the finished ones are "
                "safe: mend the cause and run the same command again"
            ) from error
        return len(data)

    def rows(self) -> list[int]:
        """Row numbers that are there, in order. What a power cut left of a row does not count: it is made again."""
        rows = sorted(int(name) for name in self._place.names(FOLDER))
        return [row for row in rows if self.has(row)] if isinstance(self._place.location, Path) else rows

    def has(self, row: int) -> bool:
        """Whether a row is there, whole."""
        return self._place.holds(f"{FOLDER}/{row}", self._row_bytes, b"{")

    def read(self, rows: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """Records and images of some rows, the latter (n, n_bands, h, w).

        Raises:
            Pix2massError: a row is missing.
        """
        records = []
        images = {name: np.empty((len(rows), *self._shape), dtype) for name, dtype in IMAGE_DTYPES.items()}
        for i, row in enumerate(rows):
            data = self._place.read(f"{FOLDER}/{row}")
            if data is None:
                raise Pix2massError(f"{self._place.location}: row {row} is missing; run the same command again")
            records.append(json.loads(data[:_RECORD_BYTES]))
            start = _RECORD_BYTES
            for name, dtype in IMAGE_DTYPES.items():
                count = int(np.prod(self._shape))
                images[name][i] = np.frombuffer(data, dtype, count, start).reshape(self._shape)
                start += count * dtype.itemsize
        return records, images

    def remove(self) -> None:
        """Remove all rows."""
        self._place.remove_below(FOLDER)


def check_cutout(cutout: Cutout, grid: GridConfig, cluster_id: str, group: str) -> None:
    """Refuse what no row can hold.

    Raises:
        Pix2massError: other bands, other shape, values that mean nothing, or names that are too long.
    """
    if cutout.bands != grid.bands:
        raise Pix2massError(
            f"{cluster_id}: the store holds bands {grid.bands!r} in that order, the cutout {cutout.bands!r}"
        )
    expected = (len(grid.bands), grid.n_pixels, grid.n_pixels)
    if cutout.flux.shape != expected:
        raise Pix2massError(f"{cluster_id}: the store holds cutouts of shape {expected}, got {cutout.flux.shape}")
    if not (np.isfinite(cutout.flux).all() and np.isfinite(cutout.sigma).all()):
        raise Pix2massError(f"{cluster_id}: flux and sigma must be finite; put 0 and mask=True where they are not")
    if not (cutout.sigma[~cutout.mask] > 0).all():
        raise Pix2massError(f"{cluster_id}: sigma must be positive wherever the mask is False")
    if not cluster_id or len(cluster_id.encode()) > MAX_ID_BYTES or len(group.encode()) > MAX_ID_BYTES:
        raise Pix2massError(f"{cluster_id!r}: ids and groups need 1 to {MAX_ID_BYTES} bytes")


def _noise_per_band(cutout: Cutout) -> np.ndarray:
    """Median sigma of the usable pixels per band, (n_bands,); NaN for a band without any."""
    sigma = np.where(cutout.mask, np.nan, cutout.sigma).reshape(len(cutout.bands), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmedian(sigma, axis=1)
