"""The order in which cutouts are made from frames, and the frames in memory: each unpacked once, ahead of its use."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np

from pix2mass.images.archive import BadFrame, Field
from pix2mass.images.frame import Exposure

FrameKey = tuple[Field, str]
"""Field and band."""

_GROUP_CUTOUTS = 256
"""A group of more cutouts than this ends where the next field begins, at twice as many in any case."""

_FRAMES = 45
"""Frames in memory at most, 24 MB each, where the order of work is known."""

_FRAMES_UNORDERED = 15
"""The same where it is not: three fields in five bands."""

_SPARE = 5
"""Arrays of dropped frames that are kept for the next ones."""

_AHEAD = 10
"""Frames unpacked before their turn: two fields in five bands."""


class WorkOrder:
    """Cutouts in groups that share no frames, neighbours along a run next to each other.

    A group that would be long is cut; only there two groups share frames.

    Attributes:
        groups: numbers of the cutouts, in the order of work.
    """

    def __init__(self, places: Sequence[Hashable], needs: Sequence[Sequence[FrameKey]]) -> None:
        """Order cutouts.

        Args:
            places: what tells cutouts apart, e.g. their position and scale.
            needs: the frames of each, in the order in which it needs them.
        """
        fields = [tuple(sorted({field for field, _ in keys})) for keys in needs]
        self.groups = list(_groups(fields))
        self._positions: dict[Hashable, list[int]] = {}
        self._uses: dict[Field, list[int]] = {}
        self._first: list[tuple[int, FrameKey]] = []
        self._group_ends: list[int] = []
        seen: set[FrameKey] = set()
        for group in self.groups:
            begin = len(self._group_ends)
            self._group_ends += [begin + len(group)] * len(group)
            for position, i in enumerate(group, begin):
                self._positions.setdefault(places[i], []).append(position)
                for field in fields[i]:
                    self._uses.setdefault(field, []).append(position)
                self._first += [(position, key) for key in needs[i] if key not in seen]
                seen.update(needs[i])

    def position(self, place: Hashable, after: int) -> int | None:
        """Where in the order a cutout stands: its first place after another one if it has several, None if it has none.

        Args:
            place: of the cutout.
            after: position of the cutout before it, -1 at the beginning.
        """
        positions = self._positions.get(place)
        if positions is None:
            return None
        return next((position for position in positions if position > after), positions[0])

    def next_use(self, field: Field, position: int) -> int | None:
        """The first position after another at which a field is needed, None where it is not needed any more."""
        uses = self._uses.get(field, [])
        k = bisect_right(uses, position)
        return uses[k] if k < len(uses) else None

    def new_frames(self, position: int, in_group: bool) -> Iterator[FrameKey]:
        """Frames needed after a position and not before, in order; only those of its group if ``in_group``."""
        end = self._group_ends[position] if in_group else len(self._group_ends)
        for k in range(bisect_right(self._first, position, key=lambda item: item[0]), len(self._first)):
            if self._first[k][0] >= end:
                return
            yield self._first[k][1]


def _groups(fields: Sequence[tuple[Field, ...]]) -> Iterator[list[int]]:
    """Numbers of cutouts that are connected through fields, sorted by their fields; those without any come last."""
    parent: dict[Field, Field] = {}

    def root(field: Field) -> Field:
        while parent.setdefault(field, field) != field:
            parent[field] = parent[parent[field]]
            field = parent[field]
        return field

    for own in fields:
        for field in own[1:]:
            parent[root(field)] = root(own[0])
    connected: dict[Field | None, list[int]] = {}
    for i in sorted(range(len(fields)), key=lambda i: (not fields[i], fields[i], i)):
        connected.setdefault(root(fields[i][0]) if fields[i] else None, []).append(i)
    for members in connected.values():
        begin = 0
        for k in range(1, len(members)):
            same_field = fields[members[k]][:1] == fields[members[k - 1]][:1]
            if k - begin >= (2 * _GROUP_CUTOUTS if same_field and fields[members[k]] else _GROUP_CUTOUTS):
                yield members[begin:k]
                begin = k
        yield members[begin:]


class FrameQueue:
    """Frames in memory. Threads unpack those that come next while the present ones are used.

    Attributes:
        order: in which cutouts will be asked for, if that is known.
        in_group: unpack ahead inside a group only, since another worker may have the next one.
        frames: what is in memory, the one used last at the end; for a frame that cannot be used, why.
    """

    def __init__(
        self,
        read: Callable[[FrameKey], bytes | BadFrame],
        expose: Callable[[FrameKey, bytes | BadFrame, np.ndarray | None], Exposure | BadFrame],
        drop: Callable[[FrameKey], None],
        threads: int,
    ) -> None:
        """Make an empty queue.

        Args:
            read: gives the unpacked content of a frame; called in threads.
            expose: makes the frame from it, in the given array where that has the right shape, as nobody needs what it
                holds any more; called by the thread that uses the queue.
            drop: called after a frame's last use.
            threads: that read.
        """
        self.order: WorkOrder | None = None
        self.in_group = False
        self.frames: OrderedDict[FrameKey, Exposure | BadFrame] = OrderedDict()
        self._read, self._expose, self._drop = read, expose, drop
        self._pool = ThreadPoolExecutor(threads)
        self._coming: dict[FrameKey, Future[bytes | BadFrame]] = {}
        self._wanted: Iterator[FrameKey] = iter(())
        self._position: int | None = None
        self._spare: list[np.ndarray] = []

    def begin(self, place: Hashable, needed: Sequence[FrameKey]) -> None:
        """Begin a cutout.

        Args:
            place: as in the order.
            needed: its frames, in the order in which they will be asked for.
        """
        before = -1 if self._position is None else self._position
        self._position = None if self.order is None else self.order.position(place, before)
        following: Iterable[FrameKey] = ()
        if self.order is not None and self._position is not None:
            following = self.order.new_frames(self._position, self.in_group)
        for key in [key for key in self._coming if key not in needed and self._next_use(key) is None]:
            self._coming.pop(key).cancel()
        self._wanted = chain(needed, following)
        self._fill()

    def take(self, key: FrameKey) -> Exposure | BadFrame:
        """A frame, as soon as it is there.

        Raises:
            Pix2massError: the archive does not answer.
        """
        if key not in self.frames:
            if key not in self._coming:
                self._coming[key] = self._pool.submit(self._read, key)
            try:
                content = self._coming[key].result()
            finally:
                del self._coming[key]
            self.frames[key] = self._expose(key, content, self._spare.pop() if self._spare else None)
        self.frames.move_to_end(key)
        while len(self.frames) > self._limit:
            others = [other for other in self.frames if other != key]
            self._forget(max(others, key=lambda other: self._next_use(other) or math.inf))
        self._fill()
        return self.frames[key]

    def end(self) -> None:
        """End a cutout: frames that no later one needs go."""
        if self._position is not None:
            for key in [key for key in self.frames if self._next_use(key) is None]:
                self._forget(key)
                self._drop(key)

    def close(self) -> None:
        """Stop the threads and forget the frames."""
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()
        self.frames, self._spare = OrderedDict(), []

    def _forget(self, key: FrameKey) -> None:
        frame = self.frames.pop(key)
        # New memory costs as much as filling it: one field's frames are written over those of another.
        if isinstance(frame, Exposure) and len(self._spare) < _SPARE:
            self._spare.append(frame.pixels)

    @property
    def _limit(self) -> int:
        return _FRAMES_UNORDERED if self._position is None else _FRAMES

    def _next_use(self, key: FrameKey) -> int | None:
        if self.order is None or self._position is None:
            return None
        return self.order.next_use(key[0], self._position)

    def _fill(self) -> None:
        while len(self._coming) < _AHEAD and len(self._coming) + len(self.frames) < self._limit:
            key = next(self._wanted, None)
            if key is None:
                return
            if key not in self.frames and key not in self._coming:
                self._coming[key] = self._pool.submit(self._read, key)
