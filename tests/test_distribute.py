"""Work in several processes gives the same as in one, also where processes die."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from _toy import ToySource, toy_catalog

from pix2mass.config import GridConfig
from pix2mass.distribute import InProcess, open_workers
from pix2mass.distribute.cluster import Cluster
from pix2mass.store import build, image_store
from pix2mass.types import Pix2massError

pytestmark = pytest.mark.slow
GRID = GridConfig(bands="gri", n_pixels=16)


class Recorded(ToySource):
    """Takes its time, and writes down which process made which cutout; groups of unequal size, in no order."""

    def __init__(self, grid: GridConfig, log: Path, seconds: float = 0.02) -> None:
        super().__init__(grid)
        self.log, self.seconds = log, seconds

    def groups(self, catalog) -> list[list[int]]:
        return [list(range(start, len(catalog), 7)) for start in range(6, -1, -1)]

    def statistics(self) -> dict[str, float]:
        return {"bytes": 10 * len(self.made)}

    def cutout(self, cluster):
        with self.log.open("a") as file:  # before the pixels: a process that dies now has begun but not finished
            file.write(f"{cluster['id']} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
        time.sleep(self.seconds)
        return super().cutout(cluster)


@pytest.fixture(scope="module")
def cluster():
    """Three processes on this machine."""
    with Cluster(3) as cluster:
        yield cluster


def test_one_process_needs_no_dask():
    with open_workers(1) as workers:
        assert isinstance(workers, InProcess)
        assert list(workers.map(lambda shared, task: [shared * task, task], 2, [1, 5])) == [2, 1, 10, 5]


def test_a_store_built_by_many_is_the_same(tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(image_store, "_SHARD_BYTES", 5 * 4 * 3 * 16 * 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    catalog, log = toy_catalog(43, 3), tmp_path / "log.txt"
    one = build(catalog, ToySource(GRID), tmp_path / "one.zarr", GRID)
    seen = []
    many = build(
        catalog,
        Recorded(GRID, log),
        tmp_path / "many.zarr",
        GRID,
        workers=cluster,
        progress=lambda done, total, note: seen.append(done),
    )
    made = [line.split() for line in log.read_text().splitlines()]
    assert many.checksum == one.checksum and many.ids == catalog["id"].tolist()
    assert sorted(name for name, _, _ in made) == sorted(catalog["id"].tolist())
    processes = {int(pid) for _, pid, _ in made}
    assert len(processes) == 3 and os.getpid() not in processes
    assert {threads for _, _, threads in made} == {"1"}
    assert seen == list(range(44)) and many.build_summary["bytes_read"] == 430


def test_a_killed_worker_costs_only_the_cutout_in_hand(tmp_path, monkeypatch, cluster):
    monkeypatch.setattr(image_store, "_SHARD_BYTES", 5 * 4 * 3 * 16 * 16)
    catalog, log = toy_catalog(43, 3), tmp_path / "log.txt"
    killed = []

    def kill_one() -> None:
        while not log.exists() or len(log.read_text().splitlines()) < 20:
            time.sleep(0.005)
        killed.append(int(log.read_text().splitlines()[-1].split()[1]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    many = build(catalog, Recorded(GRID, log, 0.05), tmp_path / "many.zarr", GRID, workers=cluster)
    killer.join()
    made = [line.split() for line in log.read_text().splitlines()]
    names = [name for name, _, _ in made]
    assert set(names) == set(catalog["id"].tolist())
    assert len(names) <= 44, "cutouts that were finished before the kill were made again"
    last = max(i for i, (_, pid, _) in enumerate(made) if int(pid) == killed[0])
    assert last < len(made) - 5, "the killed process was not killed in the middle of the work"
    assert many.checksum == build(catalog, ToySource(GRID), tmp_path / "one.zarr", GRID).checksum


def test_errors_come_back_from_workers(tmp_path, cluster):
    catalog, source = toy_catalog(30, 3), ToySource(GRID)
    source.fail_at = 4
    with pytest.raises(RuntimeError, match="the source broke"):
        build(catalog, source, tmp_path / "s.zarr", GRID, workers=cluster)
    with pytest.raises(Pix2massError, match="only this process can see it"):
        build(catalog, source, "memory://here/s.zarr", GRID, workers=cluster)
    assert list(cluster.map(_double, 2, list(range(40)))).count(2) == 1, "the workers are still of use"


def _double(shared: int, task: int) -> list[int]:
    return [shared * task]


def test_a_scheduler_elsewhere(tmp_path, cluster):
    address = cluster.client.scheduler.address
    catalog = toy_catalog(20, 3)
    with open_workers(1, address) as workers:
        many = build(catalog, Recorded(GRID, tmp_path / "log.txt"), tmp_path / "s.zarr", GRID, workers=workers)
    assert str(os.getpid()) not in (tmp_path / "log.txt").read_text()
    assert many.checksum == build(catalog, ToySource(GRID), tmp_path / "one.zarr", GRID).checksum


def test_a_scheduler_that_goes_away_while_work_is_done():
    words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen([*words, "--no-dashboard"], stderr=subprocess.PIPE, text=True)
    try:
        assert scheduler.stderr is not None
        lines = iter(scheduler.stderr.readline, "")
        address = next(found[0] for line in lines if (found := re.search(r"tcp://[\d.]+:\d+", line)))
        with open_workers(1, address) as workers:
            killer = threading.Timer(1.5, scheduler.kill)
            killer.start()
            with pytest.raises(Pix2massError, match="(?s)scheduler went away.*finished cutouts are safe: run the same"):
                list(workers.map(itertools.repeat, 2, list(range(40))))  # without a worker nothing is ever done
    finally:
        scheduler.kill()
        scheduler.wait()


def test_no_scheduler_there(tmp_path, monkeypatch):
    monkeypatch.setattr("pix2mass.distribute.cluster._CONNECT_SECONDS", 0.5)
    with (
        open_workers(1, "tcp://127.0.0.1:9") as workers,
        pytest.raises(Pix2massError, match="--scheduler tcp://127.0.0.1:9: no Dask scheduler answers there"),
    ):
        build(toy_catalog(20, 3), ToySource(GRID), tmp_path / "s.zarr", GRID, workers=workers)
