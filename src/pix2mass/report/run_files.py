"""What the report reads from a run folder: its files, with a sentence for each that cannot be read."""

from __future__ import annotations

import hashlib
import math
import tomllib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from astropy.table import Table

from pix2mass.report.drawing import numbers
from pix2mass.run import RunFolder
from pix2mass.types import Pix2massError

_NEEDED = ("id", "z", "fold", "log10_m500c", "log10_m500c_err", "q16", "q84", "pit", "log10_m500c_label")


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """predictions.ecsv: masses by the networks that did not see the cluster, and what they are held against.

    Attributes:
        table: the file, one row per cluster.
        id: (n,) names.
        fold: (n,) fold numbers.
        z: (n,) redshifts, NaN if unknown.
        mass: (n,) predicted log10 M500c.
        mass_err: (n,) its standard error, dex.
        bar: (2, n) the ends of its central 68% interval, log10 M500c.
        reference: (n,) true mass (mock) or label, log10 M500c.
        reference_name: "true" or "measured".
        residual: (n,) predicted minus reference, dex.
        residual_err: (n,) its standard error, dex: on real data with the label's error.
        pit: (n,) share of the predicted probability that lies below the reference.
    """

    table: Table
    id: np.ndarray
    fold: np.ndarray
    z: np.ndarray
    mass: np.ndarray
    mass_err: np.ndarray
    bar: np.ndarray
    reference: np.ndarray
    reference_name: str
    residual: np.ndarray
    residual_err: np.ndarray
    pit: np.ndarray

    @classmethod
    def read(cls, folder: RunFolder) -> OutOfFold:
        """Read the file.

        Raises:
            Pix2massError: it is missing, broken, empty, or lacks a column.
        """
        path = folder / "predictions.ecsv"
        if not path.exists():
            raise Pix2massError(f"{folder.path}: the run has no predictions.ecsv; `pix2mass evaluate` makes it")
        try:
            table = Table.read(path, format="ascii.ecsv")
        except Exception as error:  # noqa: BLE001  the reader's errors are of many kinds
            raise Pix2massError(f"{path}: broken file: {error}") from None
        lacking = [name for name in _NEEDED if name not in table.colnames]
        if lacking or len(table) == 0:
            raise Pix2massError(
                f"{path}: expected rows with {', '.join(_NEEDED)}; {', '.join(lacking) or 'rows'} missing"
            )
        mock = "log10_m500c_true" in table.colnames
        mass, mass_err = numbers(table, "log10_m500c"), numbers(table, "log10_m500c_err")
        reference = numbers(table, "log10_m500c_true" if mock else "log10_m500c_label")
        residual_err = mass_err
        if not mock and "log10_m500c_label_err" in table.colnames:
            residual_err = np.hypot(mass_err, np.nan_to_num(numbers(table, "log10_m500c_label_err")))
        return cls(
            table=table,
            id=np.asarray(table["id"], str),
            fold=np.asarray(table["fold"], int),
            z=numbers(table, "z"),
            mass=mass,
            mass_err=mass_err,
            bar=np.array([numbers(table, "q16"), numbers(table, "q84")]),
            reference=reference,
            reference_name="true" if mock else "measured",
            residual=mass - reference,
            residual_err=residual_err,
            pit=numbers(table, "pit"),
        )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def richness(self) -> np.ndarray:
        """(n,) measured richness, NaN if unknown."""
        return self.column("richness")

    def column(self, name: str) -> np.ndarray:
        """A column as float64, NaN throughout where the file lacks it."""
        return numbers(self.table, name) if name in self.table.colnames else np.full(len(self), np.nan)

    def mae_dex(self, method: str = "network") -> float:
        """Mean over folds of the mean absolute error of the clusters that have one; NaN where none has."""
        error = self.error_dex(method)
        known = np.isfinite(error)
        per_fold = [error[known & (self.fold == k)].mean() for k in np.unique(self.fold[known])]
        return float(np.mean(per_fold)) if per_fold else math.nan

    def error_dex(self, method: str = "network") -> np.ndarray:
        """(n,) absolute error of a method, NaN where the file has no estimate of it."""
        mass = self.mass if method == "network" else self.column(f"log10_m500c_{method}")
        return np.abs(mass - self.reference)

    def inside(self, share: float) -> np.ndarray:
        """(n,) whether the reference lies in the central interval that holds this share of the probability."""
        return np.abs(self.pit - 0.5) <= share / 2

    def gallery(self, n: int) -> dict[str, list[str]]:
        """Which clusters show best how the run does: ids of the worst, the typical and the best, n in all.

        Worst and best have the largest and the smallest |residual|, typical ones stand nearest to the middle of that
        order. A larger n gives the same clusters and more.
        """
        residual = np.abs(self.residual)
        order = np.argsort(np.where(np.isfinite(residual), residual, -np.inf), kind="stable")
        order = order[int((~np.isfinite(residual)).sum()) :]
        n = min(n, len(order))
        rank = np.arange(len(order))
        from_middle = np.argsort(np.abs(rank - (len(order) - 1) / 2), kind="stable")
        picked: dict[str, list[int]] = {"worst": [], "typical": [], "best": []}
        queues = {"worst": list(rank[::-1]), "typical": list(from_middle), "best": list(rank)}
        taken: set[int] = set()
        while len(taken) < n:
            for kind, queue in queues.items():
                one = next((int(candidate) for candidate in queue if candidate not in taken), None)
                if one is not None and len(taken) < n:
                    picked[kind].append(one)
                    taken.add(one)
        return {kind: [str(self.id[order[one]]) for one in ranks] for kind, ranks in picked.items()}


@dataclass
class RunFiles:
    """The files of a run, and one sentence for each thing it lacks.

    Attributes:
        folder: the run.
        missing: what is left out, and why.
    """

    folder: RunFolder
    missing: list[str] = field(default_factory=list)

    def json(self, name: str, then: str) -> dict[str, Any]:
        """A JSON file of the run; empty, with a sentence in ``missing``, where it cannot be read."""
        try:
            values = self.folder.read_json(name)
        except Pix2massError as error:
            exists = (self.folder / name).exists()
            self.missing.append(f"{error}: {then}" if exists else f"{name} is missing: {then}")
            return {}
        if isinstance(values, dict):
            return values
        self.missing.append(f"{name} does not hold a table of values: {then}")
        return {}

    def config(self) -> tuple[str, dict[str, Any]]:
        """config.toml as text and as values."""
        path = self.folder / "config.toml"
        try:
            text = path.read_text()
            return text, tomllib.loads(text)
        except FileNotFoundError:
            self.missing.append("config.toml is missing: the settings of the run are not shown")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            self.missing.append(f"config.toml is broken ({error}): the settings of the run are not shown")
        return "", {}

    def out_of_fold(self) -> OutOfFold | None:
        """predictions.ecsv, None where it cannot be read."""
        try:
            return OutOfFold.read(self.folder)
        except Pix2massError:
            state = "cannot be used" if (self.folder / "predictions.ecsv").exists() else "is missing"
            self.missing.append(
                f"predictions.ecsv {state}: no figures of masses and residuals, no tables of folds and clusters"
            )
            return None

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the run's weights, tables and settings, by name of the file."""
        names = ("config.toml", "*.safetensors", "catalog.ecsv", "folds.ecsv", "predictions.ecsv")
        paths = [path for name in names for path in sorted(self.folder.path.glob(name))]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
