"""``ImageStore``: many cutouts on one grid, in a sharded Zarr v3 group, written once and then read-only.

While it is being written each cutout is one object under ``staging/``, so that a killed writer loses at most the
cutout in hand. Sealing copies the rows into shards, takes checksums, and drops the staging area. A sealed store on a
local disk is read through memory maps of its shard files.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarrs  # noqa: F401  registers the codec pipeline named below
from zarr.codecs import ZstdCodec

from pix2mass.config import GridConfig, validate
from pix2mass.distribute import InProcess, Workers
from pix2mass.store.place import Place
from pix2mass.store.staging import FOLDER, IMAGE_DTYPES, MAX_ID_BYTES, Staging
from pix2mass.types import Cutout, Flag, Pix2massError

FORMAT_VERSION = 2
_SHARD_BYTES = 64 << 20
_COLUMN_DTYPES = {
    "z": "f8",
    "ra_deg": "f8",
    "dec_deg": "f8",
    "pixel_scale_arcsec": "f8",
    "psf_fwhm_arcsec": "f4",
    "noise": "f4",
    "flags": "i8",
}
SUMMARY = "build.json"
"""What the build says about itself, beside the arrays; no part of the checksum."""

# The pipeline in Rust reads single chunks about twice as fast as the default one (benchmarks/store.py).
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


class _Shards:
    """One sealed array, read a row at a time: memory-mapped where that is possible, through Zarr elsewhere."""

    def __init__(self, array: Any, path: Path | None) -> None:
        self._array = array
        self.shape = array.shape
        self._row_shape = array.shape[1:]
        self._maps: list[tuple[np.memmap, np.ndarray]] | None = None
        if path is not None and path.is_dir() and array.shards and not array.compressors:
            self._rows_per_shard = array.shards[0]
            tail = "/".join("0" for _ in self._row_shape)
            n_shards = -(-array.shape[0] // self._rows_per_shard)
            self._maps = [self._map(path / "c" / str(i) / tail) for i in range(n_shards)]

    def _map(self, shard: Path) -> tuple[np.memmap, np.ndarray]:
        """A shard's bytes and the offset of each of its rows. Layout: Zarr v3 sharding codec, index at the end."""
        try:
            data = np.memmap(shard, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise Pix2massError(f"{shard}: part of the store is missing or empty: {error}; build it again") from None
        index = np.frombuffer(data[-(16 * self._rows_per_shard + 4) : -4].tobytes(), "<u8").reshape(-1, 2)
        return data, index[:, 0]

    def read(self, rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self._row_shape), self._array.dtype)
        if self._maps is None:
            for i, row in enumerate(rows):
                out[i] = self._array[int(row)]
            return out
        flat = out.reshape(len(rows), -1).view(np.uint8)
        for i, row in enumerate(rows):
            data, offsets = self._maps[row // self._rows_per_shard]
            start = int(offsets[row % self._rows_per_shard])
            if start + flat.shape[1] > len(data):
                raise Pix2massError(f"{data.filename}: row {row} of the store is missing or cut off; build it again")
            flat[i] = data[start : start + flat.shape[1]]
        return out


class ImageStore:
    """Cutouts on disk. Make one with :meth:`create` or :func:`build`, read a sealed one with :meth:`open`.

    Attributes:
        path: the Zarr group's folder, or its URL.
        grid: bands, width and pixels that all cutouts share.
        sealed: whether the store is complete and read-only.
        provenance: what the writer said about where the images come from.
    """

    def __init__(self, place: Place, mode: str) -> None:
        """Wrap a Zarr group that is there; use :meth:`create` or :meth:`open` instead."""
        self.path = place.location
        self._place = place
        self._group: Any = zarr.open_group(place.location, mode=mode)  # type: ignore[arg-type]
        header: Any = dict(self._group.attrs).get("pix2mass")
        if not isinstance(header, dict) or header.get("format") != FORMAT_VERSION:
            raise Pix2massError(
                f"{self.path}: not a pix2mass image store of format {FORMAT_VERSION}; if another version made it, "
                "remove it and build it again"
            )
        self._header: dict[str, Any] = header
        self.grid = validate(GridConfig, header["grid"], f"{self.path}: grid of the store")
        self.provenance: dict[str, Any] = header["provenance"]
        self.sealed: bool = header["sealed"]
        self._chosen: list[int] | None = None
        if self.sealed:
            self._load_columns()

    # ---- opening -----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | Path, grid: GridConfig, provenance: Mapping[str, Any] | None = None, inputs: str = ""
    ) -> ImageStore:
        """Start a store, or go on with an unsealed one on the same grid.

        Args:
            path: folder to write, or a URL that Zarr opens through fsspec.
            grid: the grid of every cutout.
            provenance: JSON-able facts about the images' source.
            inputs: digest of what the images are made from; an unfinished store made from something else is refused.

        Raises:
            Pix2massError: the path holds a sealed store, a store of other images, or something else.
        """
        place = Place(path)
        if place.exists("zarr.json"):
            store = cls(place, "r+")
            if store.sealed:
                raise Pix2massError(f"{path}: the store is sealed and cannot be appended to; choose another path")
            if store.grid != grid:
                raise Pix2massError(
                    f"{path}: an unfinished store on another grid lies here ({describe(store.grid)}; "
                    f"asked for {describe(grid)}); remove it or choose another path"
                )
            store.check_inputs(inputs)
            return store
        if place.names():
            raise Pix2massError(f"{path}: the folder is not empty and holds no image store; choose another path")
        header = {
            "format": FORMAT_VERSION,
            "sealed": False,
            "grid": grid.model_dump(mode="json"),
            "provenance": dict(provenance or {}),
            "inputs": inputs,
        }
        zarr.create_group(place.location, attributes={"pix2mass": header})
        return cls(place, "r+")

    def check_inputs(self, inputs: str) -> None:
        """Refuse to pass as, or to be continued with, images made from something else.

        Raises:
            Pix2massError: the digest is not the one the store was started with.
        """
        if self._header["inputs"] != inputs:
            raise Pix2massError(
                f"{self.path}: a store of other clusters, positions, redshifts or images lies here ({len(self)} rows), "
                "or one of files that have changed since; remove it or choose another path"
            )

    @classmethod
    def open(cls, path: str | Path) -> ImageStore:
        """Open a sealed store for reading.

        Args:
            path: its folder or URL.

        Raises:
            Pix2massError: nothing there, not a store, or not sealed yet.
        """
        place = Place(path)
        if not place.exists("zarr.json"):
            raise Pix2massError(f"{path}: no image store here; make one with `pix2mass build` or `pix2mass mock`")
        store = cls(place, "r")
        if not store.sealed:
            raise Pix2massError(
                f"{path}: the store is not finished ({len(store)} cutouts so far); run the command that builds it again"
            )
        return store

    def with_bands(self, bands: str) -> ImageStore:
        """The same sealed images, read with some of their bands only.

        Args:
            bands: those to keep, in the order wanted.

        Returns:
            A view of this store, with a checksum of its own.

        Raises:
            Pix2massError: the store lacks one of them.
        """
        if bands == self.grid.bands:
            return self
        if missing := [band for band in bands if band not in self.grid.bands]:
            raise Pix2massError(
                f"{self.path} holds bands {self.grid.bands!r}, not {''.join(missing)!r} of {bands!r}; build the store "
                f"with --bands {bands}"
            )
        view, index = copy.copy(self), [self.grid.bands.index(band) for band in bands]
        view._chosen = index if self._chosen is None else [self._chosen[k] for k in index]
        view._header = self._header | {"grid": self._header["grid"] | {"bands": bands}}
        view.grid = self.grid.model_copy(update={"bands": bands})
        view.noise, view.psf_fwhm_arcsec = self.noise[:, index], self.psf_fwhm_arcsec[:, index]
        flagged = np.flatnonzero(self.flags & int(Flag.MISSING_BAND)).tolist()
        complete = [row for row in flagged if np.isfinite(view.noise[row]).all() and not view._lacks_part(row)]
        view.flags = self.flags.copy()
        view.flags[complete] &= ~int(Flag.MISSING_BAND)
        return view

    def _lacks_part(self, row: int) -> bool:
        """Whether a band of a row flagged MISSING_BAND has no pixels where another has."""
        if not self.provenance.get("frames"):
            return False  # other sources mean bands without any pixels; their masks have holes for other reasons
        mask = self._read("mask", np.array([row]))[0] != 0
        return bool((mask.any(axis=0) & ~mask.all(axis=0)).any())

    # ---- writing -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def staging(self) -> Staging:
        """The rows of an unsealed store."""
        return Staging(self.path, self.grid)

    @functools.cached_property
    def _staged_ids(self) -> dict[str, int]:
        rows = self.staging.rows()
        if rows != list(range(len(rows))):
            raise Pix2massError(
                f"{self.path}: rows are missing between those that are there; a build is going on or was stopped: run "
                "the command that builds it again"
            )
        return {self.staging.read([row])[0][0]["id"]: row for row in rows}

    def append(self, cutout: Cutout, cluster_id: str, z: float, group: str = "") -> None:
        """Add one cutout after the last row. Once this returns, a kill does not lose it.

        Args:
            cutout: its bands and shape must be the grid's.
            cluster_id: unique name, at most 128 bytes of UTF-8.
            z: redshift, NaN where the position has none.
            group: name shared by cutouts that must not be split between training and test (a field, a sky patch).

        Raises:
            Pix2massError: sealed store, duplicate id, other bands, other shape, or the disk refuses.
        """
        if self.sealed:
            raise Pix2massError(f"{self.path}: the store is sealed and cannot be appended to")
        if cluster_id in self._staged_ids:
            raise Pix2massError(f"{cluster_id}: this id is already in {self.path}; ids must be unique")
        self.staging.put(len(self._staged_ids), cutout, cluster_id, z, group)
        self._staged_ids[cluster_id] = len(self._staged_ids)

    def seal(self, workers: Workers | None = None) -> None:
        """Copy the rows into shards, take checksums, and make the store read-only. Safe to repeat after a kill.

        Args:
            workers: write the shards; this process if not given.

        Raises:
            Pix2massError: there are no rows, rows are missing, or the disk refuses.
        """
        if self.sealed:
            return
        n = len(self.staging.rows())
        if not n:
            raise Pix2massError(f"{self.path}: there is nothing to seal: no cutout was added")
        row_shape = (len(self.grid.bands), self.grid.n_pixels, self.grid.n_pixels)
        rows_per_shard = max(1, min(n, _SHARD_BYTES // (4 * int(np.prod(row_shape)))))
        try:
            for name, dtype in IMAGE_DTYPES.items():
                self._group.create_array(
                    name,
                    shape=(n, *row_shape),
                    chunks=(1, *row_shape),
                    shards=(rows_per_shard, *row_shape),
                    dtype=dtype,
                    # Sigma is smooth, seldom read and not needed fast; the others are read in every training step.
                    compressors=ZstdCodec(level=3) if name == "sigma" else None,
                    # Chunks of nothing but the fill value are not written: with one that no cutout holds, a missing
                    # chunk always means damage.
                    fill_value=255 if name == "mask" else float("nan"),
                    overwrite=True,
                )
            site = _Site(self.path, self.grid)
            tasks = [range(start, min(start + rows_per_shard, n)) for start in range(0, n, rows_per_shard)]
            sealed = sorted((workers or InProcess()).map(_seal_shard, site, tasks), key=lambda shard: shard.start)
            digests = {name: [shard.digests[name] for shard in sealed] for name in IMAGE_DTYPES}
            for name, values in _columns([record for shard in sealed for record in shard.records]).items():
                array = self._group.create_array(name, data=values, chunks=values.shape, overwrite=True)
                digests[name] = [_digest(array, 0, n)]
            header = {**self._header, "sealed": True, "n": n, "digests": digests}
            self._group.attrs["pix2mass"] = header
        except OSError as error:
            raise Pix2massError(
                f"{self.path}: sealing failed ({error}); nothing is lost: mend the cause and run the same command again"
            ) from error
        self._header = header
        self._load_columns()
        self.sealed = True
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove what builders that were killed left in a sealed store."""
        self._place.remove_half_written()
        if FOLDER in self._place.names():
            self.staging.remove()

    # ---- reading -----------------------------------------------------------------------------------------------

    def _load_columns(self) -> None:
        def text(name: str) -> list[str]:
            raw = np.ascontiguousarray(self._group[name][:]).view(f"S{MAX_ID_BYTES}")[:, 0]
            return [value.decode() for value in raw]

        self._ids = text("id")
        self._rows = {cluster_id: row for row, cluster_id in enumerate(self._ids)}
        self.groups = np.array(text("group"))
        self.z: np.ndarray = self._group["z"][:]
        self.ra_deg: np.ndarray = self._group["ra_deg"][:]
        self.dec_deg: np.ndarray = self._group["dec_deg"][:]
        self.pixel_scale_arcsec: np.ndarray = self._group["pixel_scale_arcsec"][:]
        self.psf_fwhm_arcsec: np.ndarray = self._group["psf_fwhm_arcsec"][:]
        self.noise: np.ndarray = self._group["noise"][:]
        self.flags: np.ndarray = self._group["flags"][:]
        local = self.path if isinstance(self.path, Path) else None
        self._arrays = {name: _Shards(self._group[name], local / name if local else None) for name in IMAGE_DTYPES}

    def __len__(self) -> int:
        return len(self._ids) if self.sealed else len(self.staging.rows())

    @property
    def ids(self) -> list[str]:
        """Ids in row order."""
        return list(self._ids if self.sealed else self._staged_ids)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers of ids, shape (n,).

        Raises:
            Pix2massError: names the ids that the store does not hold.
        """
        missing = [cluster_id for cluster_id in ids if cluster_id not in self._rows]
        if missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise Pix2massError(f"{self.path}: {len(missing)} of {len(ids)} ids are not in the store: {shown}")
        return np.array([self._rows[cluster_id] for cluster_id in ids], int)

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read rows in any order.

        Args:
            rows: row numbers, shape (n,).

        Returns:
            flux (n, n_bands, h, w) float32 in nanomaggies per pixel, and mask of the same shape, bool, True = unusable.
        """
        rows = np.asarray(rows, int)
        return self._read("flux", rows), self._read("mask", rows).view(np.bool_)

    def _read(self, name: str, rows: np.ndarray) -> np.ndarray:
        values = self._arrays[name].read(rows)
        return values if self._chosen is None else values[:, self._chosen]

    def __getitem__(self, row: int) -> Cutout:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)}")
        one = np.array([row])
        flux, mask = self.batch(one)
        return Cutout(
            flux=flux[0],
            sigma=self._read("sigma", one)[0],
            mask=mask[0],
            bands=self.grid.bands,
            ra_deg=float(self.ra_deg[row]),
            dec_deg=float(self.dec_deg[row]),
            pixel_scale_arcsec=float(self.pixel_scale_arcsec[row]),
            psf_fwhm_arcsec=self.psf_fwhm_arcsec[row],
            flags=Flag(int(self.flags[row])),
        )

    # ---- checking ----------------------------------------------------------------------------------------------

    @property
    def checksum(self) -> str:
        """One digest of everything a sealed store holds; equal stores have equal checksums however they were made."""
        text = json.dumps([self._header["grid"], self._header["digests"]], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return self._place.n_bytes()

    @property
    def build_summary(self) -> dict[str, Any]:
        """What the build said about itself (``build.json``); empty if the store was not made by :func:`build`."""
        return json.loads(self._place.read(SUMMARY) or b"{}")

    def write_build_summary(self, summary: Mapping[str, Any]) -> None:
        """Write what :attr:`build_summary` reads."""
        self._place.write(SUMMARY, json.dumps(summary, indent=1).encode())

    def check(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read everything and compare with the checksums taken at sealing.

        Args:
            progress: called with the number of pieces compared and in all.

        Raises:
            Pix2massError: names the arrays, and the rows of the images, that have changed or cannot be read.
        """
        pieces = [(name, i) for name, digests in self._header["digests"].items() for i in range(len(digests))]
        wrong = []
        for done, (name, i) in enumerate(pieces):
            expected = self._header["digests"][name]
            try:
                array = self._group[name]
                step = array.shards[0] if len(expected) > 1 else array.shape[0]
                start, stop = i * step, min((i + 1) * step, array.shape[0])
                found = _digest(array, start, stop)
            except Exception as error:  # noqa: BLE001  any failure of a codec means the same: damaged
                raise Pix2massError(f"{self.path}: {name} cannot be read: {error}; build the store again") from error
            if found != expected[i]:
                wrong.append(f"{name} (rows {start} to {stop - 1})")
            if progress:
                progress(done + 1, len(pieces))
        if wrong:
            raise Pix2massError(f"{self.path}: damaged since it was sealed: {', '.join(wrong)}; build it again")


def describe(grid: GridConfig) -> str:
    """A grid in words, for messages."""
    width = f"{grid.width_kpc:g} kpc" if grid.width_kpc else f"{grid.width_arcsec:g} arcsec"
    return f"bands {grid.bands}, {width} on {grid.n_pixels} pixels"


@dataclass(frozen=True)
class _Site:
    """What a worker needs to write shards."""

    path: Path | str
    grid: GridConfig


@dataclass(frozen=True)
class _Shard:
    """One sealed stretch of rows: the records for the columns, and the digest of each array's pixels."""

    start: int
    records: list[dict[str, Any]]
    digests: dict[str, str]


def _seal_shard(site: _Site, rows: range) -> Iterator[_Shard]:
    """Copy rows from staging into their shard, and read them back, since staging is dropped once all is sealed."""
    records, images = Staging(site.path, site.grid).read(rows)
    group: Any = zarr.open_group(site.path, mode="r+")
    digests = {}
    for name, values in images.items():
        group[name][rows.start : rows.stop] = values
        digests[name] = _digest(group[name], rows.start, rows.stop)
        if digests[name] != _hash(values):
            raise OSError(f"{name} of rows {rows.start} to {rows.stop - 1} was not written as it should be")
    yield _Shard(rows.start, records, digests)


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    columns = {name: np.array([record[name] for record in records], dtype) for name, dtype in _COLUMN_DTYPES.items()}
    for name in ("id", "group"):  # fixed-width UTF-8 bytes: variable-length strings have no Zarr v3 specification
        encoded = np.array([record[name].encode() for record in records], f"S{MAX_ID_BYTES}")
        columns[name] = encoded.view(np.uint8).reshape(len(records), MAX_ID_BYTES)
    return columns


def _digest(array: Any, start: int, stop: int) -> str:
    return _hash(array[start:stop])


def _hash(values: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).hexdigest()
