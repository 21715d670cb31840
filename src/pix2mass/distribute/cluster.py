"""Work on Dask: a cluster of processes on this machine, or one that runs elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Self, TypeVar
from uuid import uuid4

from distributed import Client, KilledWorker, LocalCluster, WorkerPlugin, as_completed, get_worker

from pix2mass.types import Pix2massError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

_CONNECT_SECONDS = 30
# A terminal sends Ctrl-C to all processes; the one that started the others answers it, and stops them.
_DEAF_TO_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
_ONE_AT_A_TIME = threading.Lock()
_KEPT = str(2**30)
_ENVIRONMENT = {
    # More threads in each process would wait for one another.
    "OMP_NUM_THREADS": "1",
    # Memory up to this size stays with the process: arrays as large as the last ones come again, and handing pages back
    # and forth takes a third of the time (of glibc; others do not read these).
    "MALLOC_MMAP_THRESHOLD_": _KEPT,
    "MALLOC_TRIM_THRESHOLD_": _KEPT,
}
"""Of the processes that are started here."""


class _Shared(WorkerPlugin):
    """What all tasks of one call need, unpacked once by each worker, also by those that join or start again later."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value


def _perform(function: Callable[[Any, T], Iterable[R]], name: str, task: T) -> list[R]:
    # Sources are not safe to share between threads, and a worker may have several.
    with _ONE_AT_A_TIME:
        plugin: Any = get_worker().plugins[name]
        return list(function(plugin.value, task))


class Cluster:
    """Workers on Dask; the processes are started at the first call of :meth:`map`.

    Args:
        n: processes to start on this machine, if no scheduler is given.
        scheduler: address of a running scheduler. Its workers must have this package, see the same paths, and are best
            started with one thread each.
    """

    def __init__(self, n: int, scheduler: str | None = None) -> None:
        self._n = n
        self._scheduler = scheduler
        self._cluster: LocalCluster | None = None
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        if self._cluster is not None:
            self._cluster.close()

    @property
    def client(self) -> Any:
        """The connection to the scheduler.

        Raises:
            Pix2massError: no scheduler answers at the address.
        """
        if self._client is None:
            # Lost and restarted workers are part of the work here; what matters is raised.
            logging.getLogger("distributed").setLevel(logging.CRITICAL)
            if self._scheduler is None:
                with _environment(**_ENVIRONMENT):
                    self._cluster = LocalCluster(
                        n_workers=self._n,
                        threads_per_worker=1,
                        memory_limit=0,
                        dashboard_address="127.0.0.1:0",
                        silence_logs=logging.CRITICAL,
                        preload=[_DEAF_TO_CTRL_C],
                    )
            try:
                self._client = Client(self._cluster or self._scheduler, timeout=_CONNECT_SECONDS)
            except (OSError, ValueError) as error:
                raise Pix2massError(
                    f"--scheduler {self._scheduler}: no Dask scheduler answers there ({error}); expected an address "
                    "such as tcp://host:8786, as `dask scheduler` prints it"
                ) from None
        return self._client

    def map(self, function: Callable[[S, T], Iterable[R]], shared: S, tasks: Sequence[T]) -> Iterator[R]:
        """Results as tasks finish; see :class:`pix2mass.distribute.Workers`.

        Raises:
            Pix2massError: a task killed several workers, or the scheduler went away.
        """
        if self._scheduler is None and len(tasks) < 2:
            for task in tasks:
                yield from function(shared, task)
            return
        client = self.client
        name = f"pix2mass-{uuid4().hex}"
        client.register_plugin(_Shared(name, shared), name=name)
        waiting = iter(tasks)
        # Few enough that the scheduler stays quick, enough that no worker waits for the next one.
        ahead = 32 + 4 * sum(client.nthreads().values())
        running: Any = as_completed()
        futures = set()

        def begin(count: int) -> None:
            for task in itertools.islice(waiting, count):
                future = client.submit(_perform, function, name, task, pure=False)
                futures.add(future)
                running.add(future)

        try:
            begin(ahead)
            for future in running:
                futures.discard(future)
                results = future.result()
                begin(1)
                yield from results
        except KilledWorker as error:
            raise Pix2massError(
                f"the same task ended several workers, most likely for lack of memory: {error}; finished cutouts are "
                "safe: use fewer workers per machine and run the same command again"
            ) from None
        except (OSError, CancelledError) as error:
            # Only a scheduler that goes away cancels futures; the client may not have noticed yet.
            if client.status == "running" and not isinstance(error, CancelledError):
                raise
            raise Pix2massError(
                f"the Dask scheduler went away ({error}); finished cutouts are safe: run the same command again"
            ) from None
        finally:
            if client.status == "running":
                client.cancel(list(futures))
                client.unregister_worker_plugin(name)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for processes started inside the block, and for those that replace them later."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
