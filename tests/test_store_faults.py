"""A build that is killed, starved or disturbed loses nothing and ends in the same store."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from _toy import ToySource, toy_catalog
from zarr.storage import LocalStore

from pix2mass.config import GridConfig
from pix2mass.store import build, image_store
from pix2mass.store.place import Place
from pix2mass.types import Flag, Pix2massError, empty_cutout

GRID = GridConfig(bands="gri", n_pixels=16)


def fail_writing(monkeypatch, part: str) -> None:
    """No space left for keys that contain ``part``; as on a real disk, half of the file is written."""
    real = LocalStore.set

    async def full(self, key, value):
        if part in key:
            (self.root / key).parent.mkdir(parents=True, exist_ok=True)
            (self.root / f"{key}.0.partial").write_bytes(value.to_bytes()[: len(value) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await real(self, key, value)

    monkeypatch.setattr(LocalStore, "set", full)


def test_a_store_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Pix2massError, match=r"^\.: expected a folder with a name of its own.*--out clusters.zarr"):
        build(toy_catalog(4, 1), ToySource(GRID), ".", GRID)


@pytest.mark.parametrize("left", ["empty", "short", "zeros"])
def test_what_a_power_cut_left_of_a_row_is_made_again(tmp_path, left):
    catalog, source = toy_catalog(4, 1), ToySource(GRID)
    source.fail_at = 3
    with pytest.raises(RuntimeError):
        build(catalog, source, tmp_path / "s.zarr", GRID)
    row = tmp_path / "s.zarr" / "staging" / "1"
    size = row.stat().st_size
    row.write_bytes(bytes(size) if left == "zeros" else row.read_bytes()[: {"empty": 0, "short": 3000}[left]])
    again = ToySource(GRID)
    store = build(catalog, again, tmp_path / "s.zarr", GRID)
    assert again.made == ["toy-1", "toy-3"]
    assert store.checksum == build(catalog, ToySource(GRID), tmp_path / "whole.zarr", GRID).checksum


@pytest.mark.parametrize("key", ["staging/7", "flux/zarr.json", "mask/zarr.json", "flags/zarr.json"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, key):
    catalog, source = toy_catalog(12, 1), ToySource(GRID)
    fail_writing(monkeypatch, key)
    said = "cutout toy-7 could not be written" if key.startswith("staging") else "sealing failed"
    with pytest.raises(Pix2massError, match=f"{said} .*No space left on device.*run the same command again"):
        build(catalog, source, tmp_path / "s.zarr", GRID)
    monkeypatch.undo()
    again = ToySource(GRID)
    store = build(catalog, again, tmp_path / "s.zarr", GRID)
    assert len(again.made) == (5 if key.startswith("staging") else 0)
    assert store.checksum == build(catalog, ToySource(GRID), tmp_path / "whole.zarr", GRID).checksum


def test_a_shard_that_is_not_what_was_written_is_noticed(tmp_path, monkeypatch):
    """Staging is dropped after sealing: a disk that swallows bytes must be found out before."""
    real = image_store.Staging.read
    monkeypatch.setattr(image_store, "_digest", lambda array, start, stop: "another")
    with pytest.raises(Pix2massError, match="sealing failed .flux of rows 0 to 3 was not written as it should be"):
        build(toy_catalog(4, 1), ToySource(GRID), tmp_path / "s.zarr", GRID)
    monkeypatch.undo()
    assert image_store.Staging.read is real
    source = ToySource(GRID)
    build(toy_catalog(4, 1), source, tmp_path / "s.zarr", GRID)
    assert source.made == []


class Unlucky(ToySource):
    """Cannot make some of its cutouts, for now."""

    unlucky: tuple[str, ...] = ()

    def cutout(self, cluster):
        if str(cluster["id"]) in self.unlucky:
            raise Pix2massError(f"{cluster['id']}: frame-r-000094.fits.bz2 does not answer")
        return super().cutout(cluster)


def test_every_other_cutout_is_made(tmp_path):
    catalog, source = toy_catalog(9, 2), Unlucky(GRID)
    source.unlucky = ("toy-2", "toy-5")
    with pytest.raises(
        Pix2massError, match="2 cutouts could not be made, 7 of 9 are finished.*\n  toy-2: frame-r-0"
    ) as error:
        build(catalog, source, tmp_path / "s.zarr", GRID)
    assert all(f"{name}: frame-r-000094.fits.bz2 does not answer" in str(error.value) for name in ("toy-2", "toy-5"))
    summary = json.loads((tmp_path / "s.zarr" / "build.json").read_text())
    assert set(summary["failed"]) == {"toy-2", "toy-5"} and summary["made"] == 7
    source.unlucky = ()
    store = build(catalog, source, tmp_path / "s.zarr", GRID)
    assert source.made[7:] == ["toy-2", "toy-5"], "only these are tried again"
    assert store.checksum == build(catalog, ToySource(GRID), tmp_path / "whole.zarr", GRID).checksum
    assert store.build_summary["failed"] == {}


def test_a_source_that_is_gone_ends_the_build_soon(tmp_path):
    catalog, source = toy_catalog(60, 2), Unlucky(GRID)
    source.unlucky = tuple(catalog["id"][10:])
    with pytest.raises(Pix2massError, match="20 cutouts could not be made, 10 of 60 are finished"):
        build(catalog, source, tmp_path / "s.zarr", GRID)


def test_a_cutout_that_no_row_can_hold_does_not_stop_the_others(tmp_path):
    class Wrong(ToySource):
        def cutout(self, cluster):
            n = 17 if cluster["id"] == "toy-1" else 16
            return empty_cutout("gri", n, 1.0, 2.0, 3.0, Flag.OUTSIDE)

    with pytest.raises(Pix2massError, match=r"1 cutouts could not be made, 3 of 4.*\n  toy-1: .*shape \(3, 16, 16\)"):
        build(toy_catalog(4, 2), Wrong(GRID), tmp_path / "s.zarr", GRID)


def test_doubled_ids_are_refused(tmp_path):
    catalog = toy_catalog(4, 2)
    catalog["id"][3] = catalog["id"][0]
    with pytest.raises(Pix2massError, match="ids must be unique; 1 are not: toy-0"):
        build(catalog, ToySource(GRID), tmp_path / "s.zarr", GRID)


# A process that imports once and then forks builds, so that many can be killed in little time. It prints one line per
# build: how it ended, and how far it was.
_VICTIMS = """
import json, os, random, signal, sys, time
sys.path.insert(0, {tests!r})
from _toy import ToySource, toy_catalog
from pix2mass.config import GridConfig
from pix2mass.store import build, image_store

image_store._SHARD_BYTES = 2 * 4 * 3 * 16 * 16  # two rows a shard: sealing takes as long as making
class Slow(ToySource):
    def cutout(self, cluster):
        time.sleep(0.002)
        return super().cutout(cluster)
grid = GridConfig(bands="gri", n_pixels=16)
catalog = toy_catalog(160, 5)
chance = random.Random({seed})
Slow(grid).cutout(catalog[0])  # what is imported on first use is there before the forks
for _ in range({kills}):
    pid = os.fork()
    if not pid:
        build(catalog, Slow(grid), {path!r}, grid)
        os._exit(0)
    time.sleep(chance.uniform(0.0, {longest}))
    os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(json.dumps([killed, len(os.listdir({path!r} + "/staging")) if os.path.isdir({path!r} + "/staging") else -1,
                      os.path.isdir({path!r} + "/flux")]), flush=True)
"""


def victims(path: Path, seed: int, kills: int, longest: float) -> list[tuple[bool, int, bool]]:
    """Builds killed at random moments: was it killed, cutouts in staging, had sealing begun."""
    code = _VICTIMS.format(tests=str(Path(__file__).parent), path=str(path), seed=seed, kills=kills, longest=longest)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_killed_while_dropping_what_is_no_longer_needed(tmp_path, monkeypatch):
    def stopped(self):
        for row in (0, 3):
            os.unlink(tmp_path / "s.zarr" / "staging" / str(row))
        raise KeyboardInterrupt

    catalog, source = toy_catalog(6, 4), ToySource(GRID)
    monkeypatch.setattr(image_store.Staging, "remove", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(catalog, ToySource(GRID), tmp_path / "s.zarr", GRID)
    monkeypatch.undo()
    assert (tmp_path / "s.zarr" / "staging").exists()
    store = build(catalog, source, tmp_path / "s.zarr", GRID)
    assert source.made == [] and not (tmp_path / "s.zarr" / "staging").exists()
    assert store.checksum == build(catalog, source, tmp_path / "whole.zarr", GRID).checksum


# A build that stops half-way and waits.
_HOLDER = """
import sys
sys.path.insert(0, {tests!r})
from _toy import ToySource, toy_catalog
from pix2mass.config import GridConfig
from pix2mass.store import build
class Waits(ToySource):
    def cutout(self, cluster):
        if len(self.made) == 3:
            print("waiting", flush=True)
            sys.stdin.read()
        return super().cutout(cluster)
grid = GridConfig(bands="gri", n_pixels=16)
build(toy_catalog(6, 4), Waits(grid), {path!r}, grid)
"""


def test_a_second_build_is_refused_until_the_first_is_dead(tmp_path):
    path, catalog, source = tmp_path / "s.zarr", toy_catalog(6, 4), ToySource(GRID)
    code = _HOLDER.format(tests=str(Path(__file__).parent), path=str(path))
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "waiting\n"
        with pytest.raises(Pix2massError, match=f"process {first.pid} on .* is building this store"):
            build(catalog, source, path, GRID)
        assert source.made == []
    finally:
        first.kill()
        first.communicate()
    assert (tmp_path / "s.zarr.lock").exists(), "the killed build could not tidy up"
    build(catalog, source, path, GRID)
    assert len(source.made) == 3 and not (tmp_path / "s.zarr.lock").exists()


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_locks_of_living_dead_and_far_away_builds(tmp_path, kind):
    catalog = toy_catalog(2, 4)
    path = tmp_path / "s.zarr" if kind == "folder" else f"memory://{tmp_path.name}/s.zarr"
    with Place(path).locked(), pytest.raises(Pix2massError, match=f"process {os.getpid()} on .* is building"):
        build(catalog, ToySource(GRID), path, GRID)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for host in ("elsewhere", socket.gethostname()):
        holder = json.dumps({"host": host, "pid": dead.pid, "token": "x"})
        if kind == "folder":
            (tmp_path / "s.zarr.lock").write_text(holder)
        else:
            Place(path).write("lock.json", holder.encode())
        if host == "elsewhere":
            with pytest.raises(Pix2massError, match=f"process {dead.pid} on elsewhere is building.*remove .*lock"):
                build(catalog, ToySource(GRID), path, GRID)
        else:
            build(catalog, ToySource(GRID), path, GRID).check()


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(image_store, "_SHARD_BYTES", 2 * 4 * 3 * 16 * 16)
    path = tmp_path / "s.zarr"
    catalog, killed = toy_catalog(160, 5), []
    for seed in range(12):
        # Longer and longer: a busy machine takes its time before the first cutout.
        killed += [one for one in victims(path, seed, 6, 0.12 * 1.3**seed) if one[0]]
        if sum(sealing for _, _, sealing in killed) >= 6:
            break
    assert len({staged for _, staged, _ in killed}) >= 4, f"the kills came at too few different moments: {killed}"
    assert sum(sealing for _, _, sealing in killed) >= 6, f"too few kills came while sealing: {killed}"
    source = ToySource(GRID)
    resumed = build(catalog, source, path, GRID)
    assert not source.made, "finished cutouts were made again"
    resumed.check()
    assert resumed.checksum == build(catalog, ToySource(GRID), tmp_path / "whole.zarr", GRID).checksum
    assert {name.name for name in path.iterdir()} == {name.name for name in (tmp_path / "whole.zarr").iterdir()}
