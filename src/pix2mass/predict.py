"""From images to masses with errors: needs a run folder and a store, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.table import QTable
from torch import Tensor

from pix2mass.config import GridConfig, validate
from pix2mass.distribute import InProcess, Workers
from pix2mass.model import Encoder, MassRegressor, combine, dihedral, prepare
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore
from pix2mass.types import Flag, MassEstimate, Pix2massError

QUANTILES = {"q025": -1.959964, "q16": -0.994458, "q50": 0.0, "q84": 0.994458, "q975": 1.959964}
"""Column name -> quantile of the standard normal distribution (2.5, 16, 50, 84 and 97.5 per cent)."""
_BATCH = 64
_BATCHES_PER_TASK = 8


class Predictor:
    """The networks of all folds of a run, ready to estimate.

    Args:
        run: the run folder, or its path.

    Raises:
        Pix2massError: not a run, or its training has not finished, or its files are broken.
    """

    def __init__(self, run: RunFolder | str | Path) -> None:
        self.folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
        self.info: dict[str, Any] = self.folder.read_json("model.json")
        self.grid = validate(GridConfig, self.info["grid"], f"{self.folder.path}: grid of the run")
        self.regressors = [self._load(fold) for fold in range(self.info["folds"])]

    def _load(self, fold: int) -> MassRegressor:
        regressor = MassRegressor(Encoder(self.info["encoder"]), len(self.info["bands"]), self.info["use_redshift"])
        try:
            regressor.load_state_dict(self.folder.load_weights(f"fold-{fold}"))
        except RuntimeError as error:
            raise Pix2massError(
                f"{self.folder.path}: fold-{fold}.safetensors does not fit model.json: {error}; train again"
            ) from None
        return regressor.eval()

    def check_store(self, store: ImageStore) -> None:
        """Refuse images that the run was not made for.

        Raises:
            Pix2massError: other bands or another pixel grid.
        """
        if store.grid.bands != self.grid.bands:
            raise Pix2massError(
                f"{store.path} holds bands {store.grid.bands!r}, the run {self.folder.path} was trained on "
                f"{self.grid.bands!r}; build the store with --bands {self.grid.bands} or use another run"
            )
        if store.grid != self.grid:
            raise Pix2massError(
                f"{store.path} has another pixel grid than the run {self.folder.path}: "
                f"{store.grid.model_dump(exclude_none=True)} against {self.grid.model_dump(exclude_none=True)}; "
                "build the store on the run's grid"
            )

    @torch.no_grad()
    def estimate(self, images: Tensor, valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Ensemble over folds and views.

        Args:
            images: (n, n_bands, h, w) from :func:`pix2mass.model.prepare`.
            valid: (n, h, w) usable share.
            z: (n,) redshifts.

        Returns:
            log10 M500c (n,) and its calibrated standard deviation in dex (n,).
        """
        folds = []
        for regressor in self.regressors:
            views = [regressor(dihedral(images, view), dihedral(valid, view), z) for view in range(self.info["views"])]
            folds.append(combine(*(torch.stack(values) for values in zip(*views, strict=True))))
        means, sigmas = (torch.stack(values) for values in zip(*folds, strict=True))
        # The scale was calibrated on single networks, whose disagreement it already covers: adding their spread would
        # count it twice. The mean of several errs a little less than one, so these errors are mildly conservative.
        return means.mean(dim=0), self.info["error_scale"] * torch.sqrt((sigmas**2).mean(dim=0))


def predict(
    run: Predictor | RunFolder | str | Path,
    store: ImageStore | str | Path,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
) -> QTable:
    """Masses of all clusters of a store.

    Args:
        run: a run folder with finished training, or a :class:`Predictor`.
        store: sealed images with the run's bands and grid.
        progress: called with (done, total).
        workers: of ``distribute.open_workers``, who see the run and the store at the same paths; this process if not
            given.

    Returns:
        One row per cluster: id, ra_deg, dec_deg, z, log10_m500c, log10_m500c_err (dex), quantiles q025 to q975, flags
        (bits) and flag_names. Rows without usable pixels have NaN masses and the flag NO_ESTIMATE.

    Raises:
        Pix2massError: the store does not fit the run, or a redshift is missing that the run needs.
    """
    predictor = run if isinstance(run, Predictor) else Predictor(run)
    store = store if isinstance(store, ImageStore) else ImageStore.open(store)
    predictor.check_store(store)
    info = predictor.info
    z = store.z.copy()
    if info["use_redshift"] and not np.isfinite(z).all():
        missing = [store.ids[row] for row in np.flatnonzero(~np.isfinite(z))]
        raise Pix2massError(
            f"{store.path}: {len(missing)} clusters have no redshift and the run needs one: {', '.join(missing[:5])}"
        )
    mean, sigma = np.full(len(store), np.nan), np.full(len(store), np.nan)
    flags = store.flags.copy()
    flags[(z < info["z_range"][0]) | (z > info["z_range"][1])] |= Flag.REDSHIFT_EXTRAPOLATED
    batches = [range(start, min(start + _BATCH, len(store))) for start in range(0, len(store), _BATCH)]
    tasks = [batches[i : i + _BATCHES_PER_TASK] for i in range(0, len(batches), _BATCHES_PER_TASK)]
    done = 0
    for batch in (workers or InProcess()).map(_estimate_batches, _Site.of(predictor, store), tasks):
        rows = np.asarray(batch.rows)
        mean[rows], sigma[rows] = batch.mean, batch.sigma
        flags[rows[batch.coverage < info["min_coverage"]]] |= Flag.LOW_COVERAGE
        flags[rows[~np.isfinite(batch.mean)]] |= Flag.NO_ESTIMATE
        done += len(rows)
        if progress:
            progress(done, len(store))
    return QTable(
        {
            "id": store.ids,
            "ra_deg": store.ra_deg,
            "dec_deg": store.dec_deg,
            "z": z,
            "log10_m500c": mean,
            "log10_m500c_err": sigma,
            **{name: mean + number * sigma for name, number in QUANTILES.items()},
            "flags": flags,
            "flag_names": [str(Flag(int(bits))) for bits in flags],
        },
        meta={
            "mass_definition": "500c",
            "cosmology": {"H0_km_s_Mpc": 70.0, "Om0": 0.3, "flat": True},
            "run": str(predictor.folder.path),
            "prior": info["prior"],
            "trained_on": info["trained_on"],
            "pix2mass_version": predictor.folder.read_json("provenance.json")["versions"].get("pix2mass", ""),
        },
    )


class _Site:
    """The networks and the images, opened where they are needed: a worker gets the paths alone."""

    def __init__(self, run: Path, store: Path | str) -> None:
        self._run, self._store = run, store

    @classmethod
    def of(cls, predictor: Predictor, store: ImageStore) -> _Site:
        """Of networks and images that are open here."""
        folder, path = predictor.folder.path.absolute(), store.path
        site = cls(folder, path.absolute() if isinstance(path, Path) else path)
        site.predictor, site.store = predictor, store
        return site

    def __reduce__(self) -> tuple[Any, ...]:
        return _Site, (self._run, self._store)

    @functools.cached_property
    def predictor(self) -> Predictor:
        return Predictor(self._run)

    @functools.cached_property
    def store(self) -> ImageStore:
        return ImageStore.open(self._store)


@dataclass(frozen=True)
class _Batch:
    """Estimates of some rows: log10 M500c and its error, NaN without usable pixels, and covered shares of pixels."""

    rows: range
    mean: np.ndarray
    sigma: np.ndarray
    coverage: np.ndarray


def _estimate_batches(site: _Site, batches: list[range]) -> Iterator[_Batch]:
    """The part of :func:`predict` that takes time."""
    store = site.store
    for rows in batches:
        chosen = np.asarray(rows)
        flux, mask = store.batch(chosen)
        mean, sigma = np.full((2, len(rows)), np.nan)
        usable = np.isfinite(store.noise[chosen]).any(axis=1)
        if usable.any():
            images, valid = prepare(
                torch.from_numpy(flux[usable]),
                torch.from_numpy(mask[usable]),
                torch.from_numpy(store.noise[chosen[usable]]),
            )
            redshift = torch.tensor(np.nan_to_num(store.z[chosen[usable]]), dtype=torch.float32)
            estimate = site.predictor.estimate(images, valid, redshift)
            mean[usable], sigma[usable] = (values.numpy() for values in estimate)
        yield _Batch(rows, mean, sigma, 1.0 - mask.mean(axis=(1, 2, 3)))


def as_estimates(table: QTable) -> list[MassEstimate]:
    """The rows of a table made by :func:`predict` as :class:`MassEstimate` objects."""
    return [
        MassEstimate(
            id=str(row["id"]),
            log10_m500c=float(row["log10_m500c"]),
            log10_m500c_err=float(row["log10_m500c_err"]),
            quantiles=tuple(float(row[name]) for name in QUANTILES),  # type: ignore[arg-type]
            flags=Flag(int(row["flags"])),
        )
        for row in table
    ]
