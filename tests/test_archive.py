"""Files of an archive over HTTP: fetched once, resumed, retried, checked, dropped, and never out of their folder."""

from __future__ import annotations

import bz2
import errno
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _archive_server as server
import numpy as np
import pytest

import pix2mass.images.archive as archive_module
from pix2mass.images import http
from pix2mass.images.archive import FRAMES_FOLDER, BadFrame, Field, Folder, Http, frame_path, open_archive
from pix2mass.types import Pix2massError

RNG = np.random.default_rng(7)
CONTENT = b"SIMPLE  =" + RNG.integers(0, 256, 300_000, np.uint8).tobytes()
FRAME = frame_path(Field(3000, 2, 40), "r", ".fits.bz2")
OTHER = frame_path(Field(3000, 2, 41), "r", ".fits.bz2")
TABLE = "dr12/boss/photoObj/301/3000/photoField-003000-2.fits"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(http, "WAIT_S", 0.01)


@pytest.fixture
def folder(tmp_path) -> Path:
    base = tmp_path / "sas"
    for path, data in ((FRAME, bz2.compress(CONTENT)), (OTHER, bz2.compress(CONTENT[::-1])), (TABLE, CONTENT)):
        (base / path).parent.mkdir(parents=True, exist_ok=True)
        (base / path).write_bytes(data)
    return base


@pytest.fixture
def remote(folder):
    with server.serve(folder) as remote:
        yield remote


@pytest.fixture
def archive(remote, tmp_path):
    archive = Http(remote.url, tmp_path / "cache")
    yield archive
    archive.close()


def files(archive: Http) -> set[str]:
    """Files of the cache, its locks aside."""
    found = (path.relative_to(archive.cache) for path in archive.cache.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] != "locks"}


def test_a_file_is_fetched_once_and_dropped_after_its_last_use(archive, remote, folder):
    assert archive.read(FRAME) == archive.read(FRAME) == (folder / FRAME).read_bytes()
    assert archive.read(TABLE) == CONTENT
    assert remote.times(FRAME) == 1 and files(archive) == {f"passing/{FRAME}", TABLE}
    assert archive.counts.files == 2 and archive.counts.retries == 0
    assert archive.counts.bytes_read == len((folder / FRAME).read_bytes()) + len(CONTENT)
    archive.drop(FRAME)
    archive.drop(TABLE)  # small tables serve many frames: they stay
    assert files(archive) == {TABLE}
    archive.read(FRAME)
    assert remote.times(FRAME) == 2


def test_kept_frames_serve_later_builds_and_are_an_archive_of_their_own(archive, remote, folder, tmp_path):
    archive.read(OTHER)
    with_kept = Http(remote.url, tmp_path / "cache", keep_frames=True)
    with_kept.read(OTHER)  # fetched before by a build that drops: it stays now
    with_kept.read(FRAME)
    for some in (with_kept, archive):
        some.drop(FRAME)
        some.sweep()
        assert some.read(FRAME) == Folder(with_kept.cache).read(FRAME) == (folder / FRAME).read_bytes()
        assert some.read(OTHER) == (folder / OTHER).read_bytes()
    assert remote.times(FRAME) == remote.times(OTHER) == 1


def test_a_later_process_goes_on_with_what_is_on_disk(archive, remote, tmp_path):
    archive.read(FRAME)
    code = (
        "import sys; from pix2mass.images.archive import Http; "
        "a = Http(sys.argv[1], sys.argv[2]); print(len(a.read(sys.argv[3])), a.counts.files)"
    )
    arguments = [sys.executable, "-c", code, remote.url, str(tmp_path / "cache"), FRAME]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == [str(len(archive.read(FRAME))), "0"], result.stderr
    assert remote.times(FRAME) == 1


def test_sweep_removes_what_a_killed_build_left(archive):
    archive.read(FRAME)
    archive.read(TABLE)
    archive.sweep()
    assert files(archive) == {TABLE}


def test_not_found_is_remembered(archive, remote, tmp_path):
    missing = frame_path(Field(9999, 1, 1), "g", ".fits.bz2")
    assert archive.read(missing) is None and archive.read(missing) is None
    assert Http(remote.url, tmp_path / "cache").read(missing) is None
    assert remote.times(missing) == 1 and archive.counts.not_found == 1 and archive.counts.retries == 0


def test_a_cut_download_is_resumed_where_it_broke(archive, remote, folder):
    remote.misdeeds[FRAME] = server.cut(0.6, times=1)
    assert archive.read(FRAME) == (folder / FRAME).read_bytes()
    size = len((folder / FRAME).read_bytes())
    (_, first), (_, second) = remote.asked
    assert first == "" and second.startswith("bytes=") and archive.counts.bytes_read == size
    assert archive.counts.retries == 1 and files(archive) == {f"passing/{FRAME}"}


def test_a_download_cut_by_a_kill_is_resumed_by_the_next_process(archive, remote, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    remote.misdeeds[FRAME] = server.cut(0.6, times=1)
    with pytest.raises(BadFrame, match="no answer after 1 attempts"):
        archive.read(FRAME)
    assert any(name.endswith(".part") for name in files(archive))
    later = Http(remote.url, tmp_path / "cache")
    assert later.read(FRAME) == (folder / FRAME).read_bytes()
    assert 0 < later.counts.bytes_read < len((folder / FRAME).read_bytes())


def test_a_file_that_changed_meanwhile_is_fetched_anew(archive, remote, folder):
    def changing(handler, data, before):
        if before == 0:
            server.cut(0.6)(handler, data, before)
        else:
            handler.headers.replace_header("If-Range", '"v0"')  # the server now has another version
            server.send(handler, data)

    remote.misdeeds[FRAME] = changing
    assert archive.read(FRAME) == (folder / FRAME).read_bytes()


def test_a_complete_part_is_not_trusted_beyond_the_servers_word(archive, remote, folder):
    archive.read(FRAME)
    place = archive.cache / "passing" / FRAME
    part, note = (place.with_name(f".{place.name}.{end}") for end in ("part", "version"))
    place.replace(part)
    note.write_text('"v1"')
    assert archive.read(FRAME) == (folder / FRAME).read_bytes()


def test_progress_starts_the_count_of_attempts_anew(archive, remote, folder, monkeypatch):
    monkeypatch.setattr(http, "_PROGRESS_BYTES", 1000)
    big = Path(folder / FRAME).read_bytes()

    def slices(handler, data, before):
        asked = handler.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        stop = min(start + len(big) // 7, len(big))
        if stop < len(big):
            handler.send_response(206 if start else 200)
            for name, value in (("ETag", '"v1"'), ("Content-Length", len(big) - start)):
                handler.send_header(name, str(value))
            handler.send_header("Content-Range", f"bytes {start}-{len(big) - 1}/{len(big)}")
            handler.end_headers()
            handler.wfile.write(big[start:stop])
            handler.close_connection = True
        else:
            server.send(handler, data)

    remote.misdeeds[FRAME] = slices
    assert archive.read(FRAME) == big and archive.counts.retries >= 6


def test_busy_servers_are_given_the_time_they_ask_for(archive, remote, folder, monkeypatch):
    waits = []
    monkeypatch.setattr(archive._stopped, "wait", waits.append)
    remote.misdeeds[FRAME] = server.status(429, times=3, Retry_After=7)
    assert archive.read(FRAME) == (folder / FRAME).read_bytes()
    assert waits == [7.0, 7.0, 7.0]
    waits.clear()
    remote.misdeeds[OTHER] = server.status(503, times=3)
    archive.read(OTHER)
    assert waits == [0.01, 0.02, 0.04]


def test_one_dead_file_is_bad_and_a_dead_archive_stops(archive, remote, folder, monkeypatch):
    remote.misdeeds[FRAME] = server.status(500)
    with pytest.raises(BadFrame, match="no answer after 4 attempts: HTTP status 500"):
        archive.read(FRAME)
    assert archive.read(OTHER) == (folder / OTHER).read_bytes()
    assert archive.counts.failed == 1 and archive.counts.retries == 3
    remote.misdeeds[""] = server.status(500)
    with pytest.raises(Pix2massError, match="frame-r-003000-2-0040.*does not answer.*run the same command again"):
        archive.read(FRAME)
    nobody = Http("http://127.0.0.1:9/sas")
    with pytest.raises(Pix2massError, match="no answer after 4 attempts.*127.0.0.1:9/sas does not answer either"):
        nobody.read(FRAME)


def test_many_dead_files_in_a_row_stop_instead_of_flagging_everything(archive, remote):
    remote.misdeeds[".fits.bz2"] = server.status(403)
    for field in range(http.DEAD_IN_A_ROW - 1):
        with pytest.raises(BadFrame, match="403"):
            archive.read(frame_path(Field(1, 1, field), "r", ".fits.bz2"))
    with pytest.raises(Pix2massError, match="last 10 files could not be had"):
        archive.read(FRAME)


def test_connections_are_few_over_threads_and_objects(remote, tmp_path):
    remote.misdeeds[".bz2"] = server.hang(0.03)
    objects = [Http(remote.url, tmp_path / "cache", connections=2) for _ in range(2)]
    paths = [frame_path(Field(1, 1, field), "r", ".fits.bz2") for field in range(12)]
    remote.misdeeds[".bz2"] = lambda handler, data, before: server.hang(0.03)(handler, bz2.compress(CONTENT), before)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: objects[k % 2].read(paths[k]), range(12)))
    assert remote.at_once <= 2 and len(remote.asked) == 12


def test_two_at_a_time_fetch_a_file_once(remote, tmp_path):
    remote.misdeeds[FRAME] = server.hang(0.2)
    objects = [Http(remote.url, tmp_path / "cache") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        contents = set(pool.map(lambda one: one.read(FRAME), objects))
    assert len(contents) == 1 and remote.times(FRAME) == 1


def test_the_user_agent_says_who_asks(archive, remote):
    archive.read(FRAME)
    assert len(remote.agents) == 1 and remote.agents.pop().startswith("pix2mass/0")


def test_a_full_disk_stops_with_advice_and_leaves_no_part(archive, remote, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(archive_module.os, "fsync", full)
    with pytest.raises(Pix2massError, match="frame-r-003000.*No space left.*free some space.*--frame-cache"):
        archive.read(FRAME)
    assert files(archive) == set()
    monkeypatch.undo()
    assert archive.read(FRAME)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "dr12/../../secret",
        "/etc/passwd",
        "dr12//x",
        "dr12/.hidden",
        "a\\..\\b",
        "dr12/%2e%2e/x",
        "x?y",
        "",
    ],
)
def test_paths_cannot_leave_the_archive(archive, remote, folder, path):
    local = Folder(folder)
    for action in (archive.read, archive.local, archive.drop, archive.size_here, local.read, local.local):
        with pytest.raises(Pix2massError, match="expected a path below the archive"):
            action(path)
    for some in (archive, local):
        with pytest.raises(Pix2massError, match="expected a path below the archive"):
            next(some.chunks(path))
    assert remote.asked == [] and files(archive) == set()


@pytest.mark.parametrize(
    "base",
    [
        "file:///etc",
        "ftp://example.org/sas",
        "http://",
        "https://user:secret@example.org/sas",
        "http://example.org/sas?x=1",
        "http://example.org:99999999/",
        "gopher://x",
    ],
)
def test_bases_that_are_no_plain_http_url_are_refused(base):
    with pytest.raises(Pix2massError, match="expected"):
        open_archive(base)


@pytest.mark.parametrize(
    "base", ["http://x/../../etc", "http://../..", "http://a/b/.ssh", "https://data.sdss.org/sas/"]
)
def test_the_cache_folder_of_an_archive_lies_in_the_cache(tmp_path, base):
    cache = Http(base, tmp_path).cache
    assert cache.parent == tmp_path and cache.resolve().parent == tmp_path.resolve()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "http://example.org/x", "http://127.0.0.1:1/x", "ftp://x/y"])
def test_redirects_elsewhere_are_refused(archive, remote, target):
    remote.misdeeds[FRAME] = server.redirect(target)
    with pytest.raises(BadFrame, match="redirected to .*not on http://127.0.0.1"):
        archive.read(FRAME)
    assert remote.times(FRAME) == 1


def test_redirects_on_the_same_server_are_followed_but_not_in_circles(archive, remote, folder):
    remote.misdeeds[FRAME] = server.redirect("/" + OTHER)
    assert archive.read(FRAME) == (folder / OTHER).read_bytes()
    remote.misdeeds[TABLE] = server.redirect("/" + TABLE)
    with pytest.raises(BadFrame, match="more than 5 redirects"):
        archive.read(TABLE)


def test_listings_with_hostile_names_are_harmless(archive, remote):
    page = b"""<a href="../../../etc/">x</a><a href="94">94</a><a href="%2e%2e%2f94">y</a><a href='\xc2\xb2'>z</a>"""
    remote.misdeeds[FRAMES_FOLDER + "/"] = server.instead(page)
    remote.misdeeds["/94/"] = server.instead(b'<a href="1/">1</a><a href="../9">9</a>')
    remote.misdeeds["/94/1/"] = server.instead(b'<a href="../../frame-r-000094-1-0012.fits/../../../x">n</a>')
    assert archive.frame_paths() == []


def test_archives_travel_to_other_processes(archive, remote, tmp_path, folder):
    again = pickle.loads(pickle.dumps(archive))  # as Dask does it
    assert again.cache == archive.cache and again.read(FRAME) == (folder / FRAME).read_bytes()
    assert str(again) == archive.base and open_archive(again) is again
    assert pickle.loads(pickle.dumps(Folder(folder))).base == folder


def test_an_archive_without_a_cache_folder_cleans_up(remote):
    archive = Http(remote.url)
    archive.read(FRAME)
    place = archive.cache
    assert place.exists()
    archive.close()
    assert not place.exists()


def test_counts_add_up_over_threads():
    counts = http.Counts()
    threads = [
        threading.Thread(target=lambda: [counts.add(files=1, bytes_read=3) for _ in range(2000)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.files == 8000 and counts.statistics()["bytes"] == 24000
    assert pickle.loads(pickle.dumps(counts)) == counts
