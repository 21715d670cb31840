"""``build``: from a catalogue and a source of images to a sealed store, on one machine or many, whatever happens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from astropy.table import QTable

from pix2mass.config import GridConfig
from pix2mass.distribute import InProcess, Workers
from pix2mass.store.image_store import ImageStore, describe
from pix2mass.store.place import Place
from pix2mass.store.staging import CannotWrite, Staging
from pix2mass.types import Cutout, Flag, Pix2massError

_CHUNK = 8
_PROBLEMS_IN_A_ROW = 20
_SUMMARY_EVERY_S = 10.0


class Source(Protocol):
    """Anything that can make the cutout of a catalogue row: an archive, a folder of images, a mock sky.

    Two more methods are used where a source has them. ``groups(catalog) -> list[list[int]]``: row numbers of the
    catalogue in groups whose cutouts share files, in the best order; a group is made by one worker, without a break.
    ``statistics() -> dict``: counters that only grow, e.g. ``{"bytes": 0, "retries": 0, "seconds": {"fetch": 0.0}}``;
    by how much they grew is added up over all workers and kept in ``build.json``.
    """

    def cutout(self, cluster: Mapping[str, Any]) -> Cutout:
        """The cutout centred on ``cluster['ra_deg']``, ``cluster['dec_deg']`` at redshift ``cluster['z']``."""
        ...


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make cutouts."""

    source: Source
    path: Path | str
    grid: GridConfig


@dataclass(frozen=True)
class _Made:
    """One cutout finished, or the reason why not."""

    cluster_id: str
    flags: Flag = Flag(0)
    problem: str = ""
    n_bytes: int = 0
    statistics: dict[str, Any] = field(default_factory=dict)


def build(
    catalog: QTable,
    source: Source,
    path: str | Path,
    grid: GridConfig,
    provenance: Mapping[str, Any] | None = None,
    workers: Workers | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ImageStore:
    """Make the cutout of every row of a catalogue and seal the store. Goes on where a killed build stopped.

    The rows are in catalogue order and the store is the same to the last byte, whatever the order of work, the number
    of workers and the number of times it was stopped.

    Args:
        catalog: columns id, ra_deg, dec_deg, z and, optionally, group.
        source: makes the cutouts.
        path: folder of the store, or a URL that Zarr opens through fsspec. A sealed store of the same catalogue and
            provenance is returned as it is.
        grid: the grid of every cutout.
        provenance: JSON-able facts about the source.
        workers: of ``distribute.open_workers``; this process if not given. Each gets its own copy of the source.
        progress: called with (done, total, note) after each cutout; the note counts bytes and failures.

    Raises:
        Pix2massError: the path holds other clusters or another grid, another build is writing there, or cutouts could
            not be made: all others are then finished, and the same command tries these again.
    """
    workers = workers or InProcess()
    ids = [str(cluster_id) for cluster_id in catalog["id"]]
    doubled = [cluster_id for cluster_id, count in Counter(ids).items() if count > 1]
    if doubled:
        raise Pix2massError(f"catalogue: ids must be unique; {len(doubled)} are not: {', '.join(doubled[:5])}")
    place = Place(path)
    if place.in_memory and not isinstance(workers, InProcess):
        raise Pix2massError(
            f"{path}: only this process can see it; write to a folder or another URL, or use --workers 1"
        )
    inputs = _inputs(catalog, provenance or {})
    store = _sealed_store(place, grid, inputs)
    if store is not None:
        return store
    with place.locked():
        store = _sealed_store(place, grid, inputs)  # by a build that ended just now
        if store is not None:
            return store
        store = ImageStore.create(place.location, grid, provenance, inputs)
        watch = _Watch(store, len(ids), progress)
        try:
            _make_cutouts(catalog, source, store, workers, watch)
            watch.stop_if_failed()
            with watch.phase("sealing"):
                store.seal(workers)
        finally:
            watch.write()
    return store


def _sealed_store(place: Place, grid: GridConfig, inputs: str) -> ImageStore | None:
    """The finished store of the same images, None where there is none yet."""
    if not place.exists("zarr.json"):
        return None
    store = ImageStore(place, "r")
    if not store.sealed:
        return None
    store.check_inputs(inputs)
    if store.grid != grid:
        raise Pix2massError(
            f"{place.location}: a sealed store on another grid lies here ({describe(store.grid)}; asked for "
            f"{describe(grid)}); remove it or choose another path"
        )
    store.remove_leftovers()
    return store


def _make_cutouts(catalog: QTable, source: Source, store: ImageStore, workers: Workers, watch: _Watch) -> None:
    there = set(store.staging.rows())
    left = np.array([row for row in range(len(catalog)) if row not in there], int)
    watch.begin(len(there))
    if not left.size:
        return
    with watch.phase("ordering"):
        groups = _groups(source, catalog[left])
    tasks = [_Rows(left[group], catalog) for group in groups]
    with watch.phase("cutouts"):
        for made in workers.map(_make, _Job(source, store.path, store.grid), tasks):
            watch.add(made)


def _groups(source: Source, catalog: QTable) -> list[list[int]]:
    """Row numbers in the order of work."""
    order = getattr(source, "groups", None)
    if order is None:
        return [list(range(start, min(start + _CHUNK, len(catalog)))) for start in range(0, len(catalog), _CHUNK)]
    groups = order(catalog)
    if sorted(row for group in groups for row in group) != list(range(len(catalog))):
        raise ValueError(f"{type(source).__name__}.groups must name each of {len(catalog)} rows once")
    return groups


class _Rows(Sequence[tuple[int, dict[str, Any]]]):
    """Some rows of a catalogue with their numbers, unpacked when they are needed."""

    def __init__(self, rows: np.ndarray, catalog: QTable) -> None:
        self._rows, self._catalog = rows, catalog

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        row = int(self._rows[i])
        return row, dict(zip(self._catalog.colnames, self._catalog[row], strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _make(job: _Job, clusters: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[_Made]:
    """Cutouts of some rows, each written before the next is begun."""
    staging = Staging(job.path, job.grid)
    statistics = getattr(job.source, "statistics", dict)
    before = statistics()
    for row, cluster in clusters:
        cluster_id = str(cluster["id"])
        if staging.has(row):  # by a worker that died after it
            yield _Made(cluster_id)
            continue
        try:
            cutout = job.source.cutout(cluster)
            n_bytes = staging.put(row, cutout, cluster_id, float(cluster["z"]), str(cluster.get("group", "")))
            made = _Made(cluster_id, cutout.flags, n_bytes=n_bytes)
        except CannotWrite:
            raise
        except Pix2massError as error:
            made = _Made(cluster_id, problem=str(error))
        after = statistics()
        yield _Made(made.cluster_id, made.flags, made.problem, made.n_bytes, _combine(after, before, -1))
        before = after


def _combine(left: Mapping[str, Any], right: Mapping[str, Any], sign: int = 1) -> dict[str, Any]:
    """Sum or difference of counters, which may be nested."""
    result = dict(left)
    for name, value in right.items():
        if isinstance(value, Mapping):
            result[name] = _combine(left.get(name, {}), value, sign)
        else:
            result[name] = left.get(name, 0) + sign * value
    return result


class _Watch:
    """Counts what a build does, shows it, and keeps it in ``build.json``, over all starts of the same build."""

    def __init__(self, store: ImageStore, total: int, progress: Callable[[int, int, str], None] | None) -> None:
        self._store, self._total, self._progress = store, total, progress
        before = store.build_summary
        self._starts = before.get("starts", 0) + 1
        self._flagged = Counter(before.get("flagged", {}))
        self._bytes_written = before.get("bytes_written", 0)
        self._seconds: dict[str, float] = before.get("seconds", {})
        self._source: dict[str, Any] = before.get("source", {})
        self._done = 0
        self._problems: dict[str, str] = {}
        self._problems_in_a_row = 0
        self._written_at = time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - start

    def begin(self, done: int) -> None:
        """Say how many cutouts were there already."""
        self._done = done
        self._show()

    def add(self, made: _Made) -> None:
        """Count one cutout.

        Raises:
            Pix2massError: so many failed one after the other that the next ones will fail too.
        """
        self._source = _combine(self._source, made.statistics)
        self._bytes_written += made.n_bytes
        self._flagged.update(made.flags.names)
        if made.problem:
            self._problems[made.cluster_id] = made.problem
            self._problems_in_a_row += 1
        else:
            self._done += 1
            self._problems_in_a_row = 0
        self._show()
        if time.monotonic() - self._written_at > _SUMMARY_EVERY_S:
            self.write()
        if self._problems_in_a_row >= _PROBLEMS_IN_A_ROW:
            self.stop_if_failed()

    def stop_if_failed(self) -> None:
        """Name the cutouts that could not be made.

        Raises:
            Pix2massError: there are some.
        """
        if self._problems:
            shown = "\n".join(f"  {problem}" for problem in list(self._problems.values())[:5])
            raise Pix2massError(
                f"{self._store.path}: {len(self._problems)} cutouts could not be made, {self._done} of {self._total} "
                f"are finished; mend the cause and run the same command again, which tries only these:\n{shown}"
                + ("\n  ..." if len(self._problems) > 5 else "")
            )

    def _show(self) -> None:
        if self._progress:
            read = self._source.get("bytes", 0)
            notes = [f"{read / 1e6:.0f} MB read"] if read else []
            notes += [f"{self._bytes_written / 1e6:.0f} MB written"]
            notes += [f"{self._source['retries']} retried"] if self._source.get("retries") else []
            notes += [f"{len(self._problems)} failed"] if self._problems else []
            self._progress(self._done, self._total, ", ".join(notes))

    def write(self) -> None:
        """Write ``build.json``: made, flagged by reason, retried, bytes, seconds by phase."""
        self._written_at = time.monotonic()
        flagged = dict(self._flagged)
        if self._store.sealed:  # exact, also where a kill came between a cutout and its count
            flagged = {
                name: count
                for flag in Flag
                if (count := int((self._store.flags & flag != 0).sum())) and (name := flag.name)
            }
        summary = {
            "clusters": self._total,
            "made": self._done,
            "failed": self._problems,
            "flagged": flagged,
            "retried": self._source.get("retries", 0),
            "bytes_read": self._source.get("bytes", 0),
            "bytes_written": self._bytes_written,
            "seconds": {name: round(seconds, 3) for name, seconds in self._seconds.items()},
            "source": self._source,
            "starts": self._starts,
        }
        with contextlib.suppress(OSError):  # a full disk has its own message
            self._store.write_build_summary(summary)


def _inputs(catalog: QTable, provenance: Mapping[str, Any]) -> str:
    """Digest of all that decides the images of a catalogue."""
    columns = {
        name: [str(value) for value in catalog[name]]
        for name in ("id", "ra_deg", "dec_deg", "z", "group")
        if name in catalog.colnames
    }
    text = json.dumps([columns, dict(provenance)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
