"""``ImageStore``: many cutouts on one grid, in a sharded Zarr v3 group, written once and then read-only.

While it is being written each appended cutout is its own set of chunks under ``staging/``, with its record last, so
that a killed writer loses at most the cutout in hand. Sealing copies the rows into shards, takes checksums, and drops
the staging area. A sealed store on a local disk is read through memory maps of its shard files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
import zarrs  # noqa: F401  registers the codec pipeline named below
from astropy.table import QTable
from zarr.codecs import ZstdCodec

from pix2mass.config import GridConfig, validate
from pix2mass.types import Cutout, Flag, Pix2massError

FORMAT_VERSION = 1
MAX_ID_BYTES = 128
_RECORD_BYTES = 1024
_STAGING_ROWS = 1 << 30
_SHARD_BYTES = 64 << 20
_IMAGES = ("flux", "sigma", "mask")
_IMAGE_DTYPES = {"flux": "f4", "sigma": "f4", "mask": "u1"}

# The pipeline in Rust reads single chunks about twice as fast as the default one (benchmarks/store.py).
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


class Source(Protocol):
    """Anything that can make the cutout of a catalogue row: an archive, a folder of images, a mock sky."""

    def cutout(self, cluster: Mapping[str, Any]) -> Cutout:
        """The cutout centred on ``cluster['ra_deg']``, ``cluster['dec_deg']`` at redshift ``cluster['z']``."""
        ...


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
        path: the Zarr group's folder.
        grid: bands, width and pixels that all cutouts share.
        sealed: whether the store is complete and read-only.
        provenance: what the writer said about where the images come from.
    """

    def __init__(self, path: Path, group: Any) -> None:
        """Wrap an open Zarr group; use :meth:`create` or :meth:`open` instead."""
        self.path = path
        self._group = group
        header: Any = dict(group.attrs).get("pix2mass")
        if not isinstance(header, dict) or header.get("format") != FORMAT_VERSION:
            raise Pix2massError(f"{path}: not a pix2mass image store of format {FORMAT_VERSION}")
        self._header: dict[str, Any] = header
        self.grid = validate(GridConfig, header["grid"], f"{path}: grid of the store")
        self.provenance: dict[str, Any] = header["provenance"]
        self.sealed: bool = header["sealed"]
        if self.sealed:
            self._load_columns()
        else:
            self._ids = [record["id"] for record in self._staged_records()]
            self._id_set = set(self._ids)

    # ---- opening -----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | Path, grid: GridConfig, provenance: Mapping[str, Any] | None = None, inputs: str = ""
    ) -> ImageStore:
        """Start a store, or go on with an unsealed one on the same grid.

        Args:
            path: folder to write.
            grid: the grid of every cutout.
            provenance: JSON-able facts about the images' source.
            inputs: digest of what the images are made from; an unfinished store made from something else is refused.

        Raises:
            Pix2massError: the path holds a sealed store, a store of other images, or something else.
        """
        path = Path(path)
        if (path / "zarr.json").exists():
            store = cls(path, zarr.open_group(path, mode="r+"))
            if store.sealed:
                raise Pix2massError(f"{path}: the store is sealed and cannot be appended to; choose another path")
            if store.grid != grid:
                raise Pix2massError(
                    f"{path}: an unfinished store on another grid lies here ({_describe(store.grid)}; "
                    f"asked for {_describe(grid)}); remove it or choose another path"
                )
            store.check_inputs(inputs)
            return store
        if path.exists() and any(path.iterdir()):
            raise Pix2massError(f"{path}: the folder is not empty and holds no image store; choose another path")
        group: Any = zarr.create_group(path)
        shape = (len(grid.bands), grid.n_pixels, grid.n_pixels)
        staging = group.create_group("staging")
        flat_keys = {"name": "v2", "separator": "."}
        for name in _IMAGES:
            staging.create_array(
                name,
                shape=(_STAGING_ROWS, *shape),
                chunks=(1, *shape),
                dtype=_IMAGE_DTYPES[name],
                compressors=None,
                chunk_key_encoding=flat_keys,
            )
        staging.create_array(
            "record",
            shape=(_STAGING_ROWS, _RECORD_BYTES),
            chunks=(1, _RECORD_BYTES),
            dtype="u1",
            compressors=None,
            chunk_key_encoding=flat_keys,
        )
        group.attrs["pix2mass"] = {
            "format": FORMAT_VERSION,
            "sealed": False,
            "grid": grid.model_dump(mode="json"),
            "provenance": dict(provenance or {}),
            "inputs": inputs,
        }
        return cls(path, group)

    def check_inputs(self, inputs: str) -> None:
        """Refuse to pass as, or to be continued with, images made from something else.

        Raises:
            Pix2massError: the digest is not the one the store was started with.
        """
        if self._header["inputs"] != inputs:
            raise Pix2massError(
                f"{self.path}: a store of other clusters, positions, redshifts or images lies here "
                f"({len(self)} rows); remove it or choose another path"
            )

    @classmethod
    def open(cls, path: str | Path) -> ImageStore:
        """Open a sealed store for reading.

        Raises:
            Pix2massError: nothing there, not a store, or not sealed yet.
        """
        path = Path(path)
        if not (path / "zarr.json").exists():
            raise Pix2massError(f"{path}: no image store here; make one with `pix2mass build` or `pix2mass mock`")
        store = cls(path, zarr.open_group(path, mode="r"))
        if not store.sealed:
            raise Pix2massError(
                f"{path}: the store is not finished ({len(store)} cutouts so far); run the command that builds it again"
            )
        return store

    # ---- writing -----------------------------------------------------------------------------------------------

    def append(self, cutout: Cutout, cluster_id: str, z: float, group: str = "") -> None:
        """Add one cutout. Once this returns, a kill does not lose it.

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
        if cutout.bands != self.grid.bands:
            raise Pix2massError(
                f"{cluster_id}: the store holds bands {self.grid.bands!r} in that order, the cutout {cutout.bands!r}"
            )
        expected = (len(self.grid.bands), self.grid.n_pixels, self.grid.n_pixels)
        if cutout.flux.shape != expected:
            raise Pix2massError(f"{cluster_id}: the store holds cutouts of shape {expected}, got {cutout.flux.shape}")
        if not (np.isfinite(cutout.flux).all() and np.isfinite(cutout.sigma).all()):
            raise Pix2massError(f"{cluster_id}: flux and sigma must be finite; put 0 and mask=True where they are not")
        if not (cutout.sigma[~cutout.mask] > 0).all():
            raise Pix2massError(f"{cluster_id}: sigma must be positive wherever the mask is False")
        if cluster_id in self._id_set:
            raise Pix2massError(f"{cluster_id}: this id is already in {self.path}; ids must be unique")
        if not cluster_id or len(cluster_id.encode()) > MAX_ID_BYTES or len(group.encode()) > MAX_ID_BYTES:
            raise Pix2massError(f"{cluster_id!r}: ids and groups need 1 to {MAX_ID_BYTES} bytes")
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
            }
        ).encode()
        row, staging = len(self._ids), self._group["staging"]
        try:
            for name in _IMAGES:
                staging[name][row] = getattr(cutout, name)
            # The record goes last: a row without one was never finished and is written again.
            staging["record"][row] = np.frombuffer(record.ljust(_RECORD_BYTES), np.uint8)
        except OSError as error:
            raise Pix2massError(
                f"{self.path}: cutout {cluster_id} could not be written ({error}); the {row} before it are safe: "
                "mend the cause and run the same command again"
            ) from error
        self._ids.append(cluster_id)
        self._id_set.add(cluster_id)

    def seal(self) -> None:
        """Copy the rows into shards, take checksums, and make the store read-only. Safe to repeat after a kill."""
        if self.sealed:
            return
        if not self._ids:
            raise Pix2massError(f"{self.path}: there is nothing to seal: no cutout was added")
        n, staging = len(self._ids), self._group["staging"]
        row_shape = (len(self.grid.bands), self.grid.n_pixels, self.grid.n_pixels)
        rows_per_shard = max(1, min(n, _SHARD_BYTES // (4 * int(np.prod(row_shape)))))
        try:
            for name in _IMAGES:
                array = self._group.create_array(
                    name,
                    shape=(n, *row_shape),
                    chunks=(1, *row_shape),
                    shards=(rows_per_shard, *row_shape),
                    dtype=_IMAGE_DTYPES[name],
                    # Sigma is smooth, seldom read and not needed fast; the others are read in every training step.
                    compressors=ZstdCodec(level=3) if name == "sigma" else None,
                    # Chunks of nothing but the fill value are not written: with one that no cutout holds, a missing
                    # chunk always means damage.
                    fill_value=255 if name == "mask" else float("nan"),
                    overwrite=True,
                )
                for start in range(0, n, rows_per_shard):
                    stop = min(start + rows_per_shard, n)
                    array[start:stop] = staging[name][start:stop]
            for name, values in self._columns().items():
                self._group.create_array(name, data=values, chunks=values.shape, overwrite=True)
            header = {**self._header, "sealed": True, "n": n, "checksums": self._checksums()}
            self._group.attrs["pix2mass"] = header
        except OSError as error:
            raise Pix2massError(
                f"{self.path}: sealing failed ({error}); nothing is lost: mend the cause and run the same command again"
            ) from error
        self._header, self.sealed = header, True
        del self._group["staging"]
        self._load_columns()

    def _staged_records(self) -> Iterator[dict[str, Any]]:
        records, batch, start = self._group["staging"]["record"], 256, 0
        while True:
            for raw in records[start : start + batch]:
                if not raw[0]:
                    return
                yield json.loads(raw.tobytes())
            start += batch

    def _columns(self) -> dict[str, np.ndarray]:
        records = list(self._staged_records())
        columns = {
            name: np.array([record[name] for record in records], dtype)
            for name, dtype in {
                "z": "f8",
                "ra_deg": "f8",
                "dec_deg": "f8",
                "pixel_scale_arcsec": "f8",
                "psf_fwhm_arcsec": "f4",
                "noise": "f4",
                "flags": "i8",
            }.items()
        }
        for name in ("id", "group"):  # fixed-width UTF-8 bytes: variable-length strings have no Zarr v3 specification
            encoded = np.array([record[name].encode() for record in records], f"S{MAX_ID_BYTES}")
            columns[name] = encoded.view(np.uint8).reshape(len(records), MAX_ID_BYTES)
        return columns

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
        self._arrays = {name: _Shards(self._group[name], self.path / name) for name in _IMAGES}

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> list[str]:
        """Ids in row order."""
        return list(self._ids)

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
        return self._arrays["flux"].read(rows), self._arrays["mask"].read(rows).view(np.bool_)

    def __getitem__(self, row: int) -> Cutout:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)}")
        one = np.array([row])
        flux, mask = self.batch(one)
        return Cutout(
            flux=flux[0],
            sigma=self._arrays["sigma"].read(one)[0],
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
        text = json.dumps([self._header["grid"], self._header["checksums"]], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _checksums(self) -> dict[str, str]:
        digests = {}
        for name in sorted(set(self._group.array_keys())):
            array = self._group[name]
            step = array.shards[0] if array.shards else max(1, array.shape[0])
            digest = hashlib.blake2b(digest_size=16)
            for start in range(0, array.shape[0], step):
                digest.update(np.ascontiguousarray(array[start : start + step]).data)
            digests[name] = digest.hexdigest()
        return digests

    def check(self) -> None:
        """Read everything and compare with the checksums taken at sealing.

        Raises:
            Pix2massError: names the arrays that have changed or cannot be read.
        """
        try:
            found = self._checksums()
        except Exception as error:  # noqa: BLE001  any failure of a codec means the same: damaged
            raise Pix2massError(f"{self.path}: the store cannot be read: {error}") from error
        wrong = [name for name, digest in self._header["checksums"].items() if found.get(name) != digest]
        if wrong:
            raise Pix2massError(f"{self.path}: damaged since it was sealed: {', '.join(wrong)}; build it again")


def _noise_per_band(cutout: Cutout) -> np.ndarray:
    """Median sigma of the usable pixels per band, (n_bands,); NaN for a band without any."""
    sigma = np.where(cutout.mask, np.nan, cutout.sigma).reshape(len(cutout.bands), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmedian(sigma, axis=1)


def _inputs(catalog: QTable, provenance: Mapping[str, Any]) -> str:
    """Digest of all that decides the images of a catalogue."""
    columns = {
        name: [str(value) for value in catalog[name]]
        for name in ("id", "ra_deg", "dec_deg", "z", "group")
        if name in catalog.colnames
    }
    text = json.dumps([columns, dict(provenance)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _describe(grid: GridConfig) -> str:
    width = f"{grid.width_kpc:g} kpc" if grid.width_kpc else f"{grid.width_arcsec:g} arcsec"
    return f"bands {grid.bands}, {width} on {grid.n_pixels} pixels"


def build(
    catalog: QTable,
    source: Source,
    path: str | Path,
    grid: GridConfig,
    provenance: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ImageStore:
    """Make the cutout of every row of a catalogue and seal the store. Goes on where a killed build stopped.

    Args:
        catalog: columns id, ra_deg, dec_deg, z and, optionally, group.
        source: makes the cutouts.
        path: folder of the store. A sealed store of the same catalogue and provenance is returned as it is.
        grid: the grid of every cutout.
        provenance: JSON-able facts about the source.
        workers: processes that make cutouts; with more than one the source is pickled to each.
        progress: called with (done, total) after each cutout.

    Raises:
        Pix2massError: the path holds other clusters or another grid, or a cutout cannot be stored.
    """
    ids = [str(cluster_id) for cluster_id in catalog["id"]]
    path = Path(path)
    inputs = _inputs(catalog, provenance or {})
    if (path / "zarr.json").exists():
        store = ImageStore(path, zarr.open_group(path, mode="r+"))
        if store.sealed:
            store.check_inputs(inputs)
            if store.grid != grid:
                raise Pix2massError(
                    f"{path}: a sealed store on another grid lies here ({_describe(store.grid)}; asked for "
                    f"{_describe(grid)}); remove it or choose another path"
                )
            return store
    store = ImageStore.create(path, grid, provenance, inputs)
    clusters = [dict(zip(catalog.colnames, row, strict=True)) for row in catalog[len(store) :]]
    with contextlib.ExitStack() as stack:
        if workers > 1 and len(clusters) > workers:
            # Spawned, not forked: a fork of a process that has run a network may hang in its thread pool.
            pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (source,)))
            with _environment(OMP_NUM_THREADS="1"):  # as many threads in each process would wait for one another
                cutouts = pool.map(_worker_cutout, clusters, chunksize=8)
        else:
            cutouts = map(source.cutout, clusters)
        for cluster, cutout in zip(clusters, cutouts, strict=True):
            store.append(cutout, str(cluster["id"]), float(cluster["z"]), str(cluster.get("group", "")))
            if progress:
                progress(len(store), len(ids))
    store.seal()
    return store


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for processes started inside the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_worker_source: Source


def _start_worker(source: Source) -> None:
    global _worker_source
    _worker_source = source


def _worker_cutout(cluster: Mapping[str, Any]) -> Cutout:
    return _worker_source.cutout(cluster)
