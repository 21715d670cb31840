"""The run folder: what is finished is recorded, what is broken is named, nothing is ever half written."""

from __future__ import annotations

import json
import subprocess
import tomllib

import pytest
import torch

from pix2mass import run
from pix2mass.config import GridConfig, TrainConfig
from pix2mass.run import RunFolder, digest, write_atomic
from pix2mass.types import Pix2massError


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def test_a_finished_stage_is_recorded_with_its_facts(folder):
    with folder.stage("train", "k1") as facts:
        facts["folds"] = 5
    record = RunFolder.open(folder.path).stages["train"]
    assert record["key"] == "k1" and record["folds"] == 5 and record["seconds"] >= 0
    assert folder.is_done("train", "k1")
    assert not folder.is_done("train", "k2") and not folder.is_done("pretrain", "k1")


def test_a_stage_without_its_outputs_is_not_done_and_a_skip_is_announced(folder):
    said = []
    folder.announce = said.append
    with folder.stage("train", "k"):
        pass
    assert not folder.is_done("train", "k", folder / "missing.ecsv") and said == []
    (folder / "there.ecsv").touch()
    assert folder.is_done("train", "k", folder / "there.ecsv")
    assert len(said) == 1 and "train" in said[0] and "skipped" in said[0]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_stage_is_not_recorded_and_keeps_its_time(folder, error, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pix2mass.run.time.monotonic", lambda: now[0])
    with pytest.raises(error), folder.stage("train", "k"):
        now[0] += 30
        raise error("stopped here")
    assert folder.stages == {}
    assert f"train: stopped by {error.__name__}: stopped here" in (folder / "log.txt").read_text()
    with folder.stage("train", "k"):
        now[0] += 12
    assert folder.stages["train"]["seconds"] == 42
    with folder.stage("train", "k2"):
        now[0] += 1
    assert folder.stages["train"]["seconds"] == 1  # the earlier time is not counted twice


def test_writing_is_whole_or_not_at_all(folder):
    folder.write_json("metrics.json", {"mae_dex": 0.2})
    with pytest.raises(TypeError):
        folder.write_json("metrics.json", {"mae_dex": object()})
    assert folder.read_json("metrics.json") == {"mae_dex": 0.2}
    write_atomic(folder / "a.txt", "one")
    write_atomic(folder / "a.txt", "two")
    assert (folder / "a.txt").read_text() == "two"
    assert list(folder.path.glob(".*part")) == []


def test_missing_and_broken_files_are_named(folder):
    with pytest.raises(Pix2massError, match="has no model.json"):
        folder.read_json("model.json")
    (folder / "model.json").write_text('{"bands": ')
    with pytest.raises(Pix2massError, match=r"model\.json: broken file"):
        folder.read_json("model.json")
    (folder / "model.json").write_bytes(b"\xff\xfe")
    with pytest.raises(Pix2massError, match=r"model\.json: broken file"):
        folder.read_json("model.json")


def test_weights_come_back_and_broken_ones_are_named(folder):
    import torch

    state = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "n": torch.tensor(3)}
    folder.save_weights("fold-0", state)
    loaded = folder.load_weights("fold-0")
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)
    with pytest.raises(Pix2massError, match=r"fold-1\.safetensors: no such weights"):
        folder.load_weights("fold-1")
    whole = (folder / "fold-0.safetensors").read_bytes()
    (folder / "fold-0.safetensors").write_bytes(whole[:20])
    with pytest.raises(Pix2massError, match=r"fold-0\.safetensors: broken weights"):
        folder.load_weights("fold-0")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(Pix2massError, match="is not a run; choose another name"):
        RunFolder(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    with pytest.raises(Pix2massError, match="expected a run folder, this is a file"):
        RunFolder(tmp_path / "photos" / "cat.jpg")
    with pytest.raises(Pix2massError, match="no run here"):
        RunFolder.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_config_is_kept_part_by_part(folder):
    folder.write_config(seed=3, grid=GridConfig(width_arcsec=600))
    folder.write_config(train=TrainConfig(folds=7))
    assert folder.read_config("grid", GridConfig) == GridConfig(width_arcsec=600)
    assert folder.read_config("train", TrainConfig).folds == 7
    assert tomllib.loads((folder / "config.toml").read_text())["seed"] == 3
    with pytest.raises(Pix2massError, match=r"no \[pretrain\] here"):
        folder.read_config("pretrain", TrainConfig)


def test_provenance_says_where_it_comes_from(folder):
    folder.write_provenance(seed=9, stores={"labelled": "abc"})
    kept = folder.read_json("provenance.json")
    assert kept["seed"] == 9 and kept["stores"] == {"labelled": "abc"}
    assert {"numpy", "torch", "pix2mass"} <= set(kept["versions"]) and kept["command"].startswith("pix2mass")
    json.dumps(kept)
    folder.write_provenance(seed=9, stores={"unlabelled": "def"})
    assert folder.read_json("provenance.json")["stores"] == {"labelled": "abc", "unlabelled": "def"}


def test_the_commit_is_the_packages_own(tmp_path, monkeypatch):
    def git(*command: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True)

    git("init", "-q")
    (tmp_path / "run.py").touch()
    git("commit", "-q", "--allow-empty", "-m", "another project's")
    monkeypatch.setattr(run, "__file__", str(tmp_path / "run.py"))
    assert run._git_commit() is None, "the file is not one of that project"
    git("add", "run.py")
    git("commit", "-q", "-m", "the project")
    commit = run._git_commit()
    assert commit is not None and len(commit) == 40


def test_a_layer_under_two_names_is_kept_twice(folder):
    layer = torch.arange(3.0)
    folder.save_weights("shared", {"a": layer, "b": layer})
    assert torch.equal(folder.load_weights("shared")["b"], layer)


def test_digest_follows_the_values_not_their_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(TrainConfig()) == digest(TrainConfig(folds=5))
    assert len({digest(TrainConfig()), digest(TrainConfig(folds=6)), digest("a", "b"), digest("ab"), digest(1)}) == 5
