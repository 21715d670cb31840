"""Where work is done: in this process, in several on this machine, or on a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Workers(Protocol):
    """Does tasks that need nothing of one another."""

    def map(self, function: Callable[[S, T], Iterable[R]], shared: S, tasks: Sequence[T]) -> Iterator[R]:
        """Results of ``function(shared, task)`` for all tasks, as they come.

        Args:
            function: of a module's top level; may yield several results per task. A task is done again where a worker
                died, so that doing it twice must do no harm.
            shared: what all tasks need; each process gets its own.
            tasks: in the order in which they are begun.
        """
        ...


class InProcess:
    """One task after the other, here."""

    def map(self, function: Callable[[S, T], Iterable[R]], shared: S, tasks: Sequence[T]) -> Iterator[R]:
        """Results in the order of the tasks; see :class:`Workers`."""
        for task in tasks:
            yield from function(shared, task)


def open_workers(n: int = 1, scheduler: str | None = None) -> AbstractContextManager[Workers]:
    """Workers for the time of a ``with`` block.

    Args:
        n: processes on this machine; 1 means this one.
        scheduler: address of a Dask scheduler, e.g. ``tcp://host:8786``, whose workers are taken instead.
    """
    if scheduler is None and n == 1:
        return nullcontext(InProcess())
    from pix2mass.distribute.cluster import Cluster

    return Cluster(n, scheduler)
