"""A run is a folder: config, weights, folds, predictions, metrics and where they came from. Never a pickle.

Files of a run folder::

    config.toml             the configuration as resolved
    model.json              what predict needs beside the weights: bands, grid, encoder, redshift range, error scale
    encoder.safetensors     network 1: the encoder
    band-head.safetensors   network 1: what tells the bands from its features
    fold-K.safetensors      network 2 of fold K, scaler included
    catalog.ecsv            the labelled clusters trained on
    folds.ecsv              which cluster is in which fold
    train-out-of-fold.ecsv  their masses by the networks that did not see them
    null-out-of-fold.ecsv   the same of networks trained on shuffled labels
    masses.ecsv             masses of the clusters without labels
    predictions.ecsv        out-of-fold mass of every labelled cluster, beside label, richness and (mock) truth
    metrics.json            every score with its baselines
    learning_curve.json     error against number of labels, if asked for
    maps/ID.npz, ID.fits    attribution maps
    report.html             all of it, to look at
    provenance.json         versions, seed, checksums, command
    stages.json             finished stages: what they were made from and how long they took
    log.txt                 what happened, with times
    survey-*/, *.zarr       catalogues and images that the run made itself
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tomli_w

from pix2mass.config import C, Config, validate
from pix2mass.types import Pix2massError

_OF_NETWORK_2 = (
    "model.json",
    "train-out-of-fold.ecsv",
    "predictions.ecsv",
    "metrics.json",
    "masses.ecsv",
    "learning_curve.json",
    "report.html",
)
_PACKAGES = ("pix2mass", "numpy", "astropy", "torch", "timm", "lightning", "captum", "zarr", "kcorrect")


def digest(*parts: Any) -> str:
    """Short hash of JSON-able values and configs: equal inputs have equal digests."""
    plain = [part.model_dump(mode="json") if isinstance(part, Config) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half of one."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


class RunFolder:
    """One run's folder and the record of its finished stages.

    Args:
        path: the folder; made if it does not exist.

    Raises:
        Pix2massError: the path is a file, or a folder that holds something other than a run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise Pix2massError(f"{self.path}: expected a run folder, this is a file")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "stages.json").exists():
            raise Pix2massError(f"{self.path}: the folder is not empty and is not a run; choose another name")
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "stages.json").exists():
            write_atomic(self.path / "stages.json", "{}")
        self.announce: Callable[[str], None] = lambda message: None
        """Called with a line whenever a stage is skipped; the command line prints it."""

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run that exists.

        Raises:
            Pix2massError: there is no run at the path.
        """
        if not (Path(path) / "stages.json").exists():
            raise Pix2massError(f"{path}: no run here; expected a folder made by `pix2mass run` or `pix2mass train`")
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ---- stages ------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Finished stages: name -> {"key": digest of inputs, "seconds": time taken, ...}."""
        return self.read_json("stages.json")

    def is_done(self, stage: str, key: str, *outputs: Path) -> bool:
        """Whether a stage was finished with the same inputs and its outputs are still there."""
        done = self.stages.get(stage, {}).get("key") == key and all(path.exists() for path in outputs)
        if done:
            self.log(f"{stage}: unchanged, skipped")
            self.announce(f"{stage}: inputs and configuration unchanged, skipped")
        return done

    @contextlib.contextmanager
    def stage(self, name: str, key: str) -> Iterator[dict[str, Any]]:
        """Time a stage and record it as finished if the block ends without an error.

        Args:
            name: of the stage.
            key: digest of its inputs.

        Yields:
            A dict for JSON-able facts to keep with the record.
        """
        facts: dict[str, Any] = {}
        # A stopped and resumed stage keeps the time it took before.
        clock = self / f".{quote(name, safe='')}.seconds"
        before = float(clock.read_text()) if clock.exists() else 0.0
        start = time.monotonic()
        self.log(f"{name}: start")
        try:
            yield facts
        except BaseException as error:
            write_atomic(clock, str(before + time.monotonic() - start))
            self.log(f"{name}: stopped by {type(error).__name__}: {error}")
            raise
        clock.unlink(missing_ok=True)
        seconds = before + time.monotonic() - start
        self.write_json("stages.json", {**self.stages, name: {"key": key, "seconds": round(seconds, 2), **facts}})
        self.log(f"{name}: done in {seconds:.1f} s")

    def log(self, message: str) -> None:
        """Append a line with the time to log.txt."""
        with (self / "log.txt").open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")

    # ---- files -------------------------------------------------------------------------------------------------

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        write_atomic(self / name, json.dumps(values, indent=2) + "\n")

    def read_config(self, name: str, config_class: type[C]) -> C:
        """One table of config.toml, e.g. ``read_config("train", TrainConfig)``.

        Raises:
            Pix2massError: the run has no such table, or it is not valid.
        """
        path = self / "config.toml"
        try:
            values = tomllib.loads(path.read_text())[name]
        except (FileNotFoundError, KeyError):
            raise Pix2massError(f"{path}: no [{name}] here; this stage of the run has not been started") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Pix2massError(f"{path}: broken file: {error}") from None
        return validate(config_class, values, str(path))

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run.

        Raises:
            Pix2massError: the file is missing or broken.
        """
        try:
            return json.loads((self / name).read_text())
        except FileNotFoundError:
            raise Pix2massError(f"{self.path}: the run has no {name}; its training has not finished") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise Pix2massError(f"{self / name}: broken file: {error}") from None

    def save_weights(self, name: str, state: Mapping[str, Any]) -> None:
        """Write tensors as NAME.safetensors, whole or not at all."""
        from safetensors.torch import save_file

        part = self / f".{name}.part"
        # Copies: a layer that a network uses under two names would share its memory, which the format refuses.
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, part)
        os.replace(part, self / f"{name}.safetensors")

    def load_weights(self, name: str) -> dict[str, Any]:
        """Read NAME.safetensors.

        Raises:
            Pix2massError: the file is missing or broken.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self / f"{name}.safetensors"
        try:
            return load_file(path)
        except FileNotFoundError:
            raise Pix2massError(f"{path}: no such weights; the run's training has not finished") from None
        except SafetensorError as error:
            raise Pix2massError(f"{path}: broken weights: {error}; train again or copy the run again") from None

    def remove_network2(self) -> None:
        """Remove what a training of network 2 left, and all that was made with it: wrong beside another network."""
        for old in (*(self / name for name in _OF_NETWORK_2), *self.path.glob("fold-*.safetensors")):
            old.unlink(missing_ok=True)
        shutil.rmtree(self / "maps", ignore_errors=True)

    def write_config(self, **parts: Config | int | str | None) -> None:
        """Keep parts of the configuration as resolved: ``write_config(seed=1, train=...)``; None removes a part."""
        path = self / "config.toml"
        kept: dict[str, Any] = tomllib.loads(path.read_text()) if path.exists() else {}
        for name, part in parts.items():
            kept.pop(name, None)
            if part is not None:
                kept[name] = part.model_dump(mode="json", exclude_none=True) if isinstance(part, Config) else part
        write_atomic(path, tomli_w.dumps(kept))

    def write_provenance(self, seed: int, **facts: Any) -> None:
        """Keep versions, platform, seed, git commit and further facts, such as checksums of the stores: ``stores`` adds
        to those of earlier stages."""
        before = self.read_json("provenance.json") if (self / "provenance.json").exists() else {}
        if stores := {**before.get("stores", {}), **facts.pop("stores", {})}:
            facts["stores"] = stores
        versions = {}
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        self.write_json(
            "provenance.json",
            {
                "made": datetime.now(UTC).isoformat(timespec="seconds"),
                "command": " ".join(["pix2mass", *sys.argv[1:]]),
                "seed": seed,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "versions": versions,
                "git": _git_commit(),
                **facts,
            },
        )


def _git_commit() -> str | None:
    """Commit of the source tree the package runs from, with "+" if it was changed; None outside a checkout of it, such
    as in an environment that lies in another project's."""
    here = Path(__file__).resolve().parent

    def git(*command: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(here), *command], capture_output=True, text=True, timeout=5, check=True
        )
        return found.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
