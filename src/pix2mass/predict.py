"""From images to masses with errors: needs a run folder and a store, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from astropy.table import QTable
from torch import Tensor
from torch.nn import functional as F

from pix2mass import weights
from pix2mass.calibrate import QUANTILES, Calibration, LogDensity, Posterior, Shrinkage, TrainingPrior, flat
from pix2mass.catalog.masses import log_mass_function
from pix2mass.config import GridConfig, validate
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.distribute import InProcess, Workers
from pix2mass.model import Regressor, combine, dihedral, make_regressor, prepare
from pix2mass.run import RunFolder
from pix2mass.store import ImageStore
from pix2mass.trust import Reference, image_statistics
from pix2mass.types import UNTRUSTED, Flag, MassEstimate, Pix2massError

Prior = Literal["training", "flat", "mass-function"]
PRIORS: dict[str, tuple[str, LogDensity | None]] = {
    "training": ("as the run names it", None),
    "flat": ("flat in log10 M500c over the range of the training labels", flat),
    "mass-function": (
        "the halo mass function of Tinker et al. 2008 over the range of the training labels",
        log_mass_function,
    ),
}
"""Name -> what it is, and its logarithm where it takes the place of the training labels' distribution."""
_BATCH = 8
"""Clusters at a time: so few that their pixels stay near the processor."""
_BATCHES_PER_TASK = 16
_SCALE_TOLERANCE = 0.02
_LEAST_VARIANCE = 0.25


class Predictor:
    """The networks of all folds of a run, ready to estimate.

    Args:
        run: the run folder, its path, or the name of packaged weights.

    Raises:
        Pix2massError: not a run, or its training has not finished, or its files are broken.
    """

    def __init__(self, run: RunFolder | str | Path) -> None:
        self.folder = run if isinstance(run, RunFolder) else weights.open_run(run)
        self.info: dict[str, Any] = self.folder.read_json("model.json")
        self.grid = validate(GridConfig, self.info["grid"], f"{self.folder.path}: grid of the run")
        try:
            self.calibration = Calibration.from_json(self.info["calibration"])
            self.shrinkage = Shrinkage(**self.info["shrinkage"])
            self.training_prior = TrainingPrior.from_json(self.info["training_prior"])
            self.reference = Reference.from_json(self.info["reference"])
        except (KeyError, TypeError) as error:
            raise Pix2massError(
                f"{self.folder / 'model.json'}: another version of pix2mass wrote it ({error}); train again"
            ) from None
        self.regressors = [self._load(fold) for fold in range(self.info["folds"])]

    def _load(self, fold: int) -> Regressor:
        regressor = make_regressor(self.info, self.grid)
        try:
            regressor.load_state_dict(self.folder.load_weights(f"fold-{fold}"))
        except RuntimeError as error:
            raise Pix2massError(
                f"{self.folder.path}: fold-{fold}.safetensors does not fit model.json: {error}; train again"
            ) from None
        return regressor.eval()

    def images(self, store: ImageStore) -> ImageStore:
        """The bands of a store that the run was trained on.

        Raises:
            Pix2massError: one of them is missing, or the pixel grid is another.
        """
        if missing := [band for band in self.grid.bands if band not in store.grid.bands]:
            raise Pix2massError(
                f"{store.path} holds bands {store.grid.bands!r}, the run {self.folder.path} was trained on "
                f"{self.grid.bands!r}: {''.join(missing)!r} missing; build the store with --bands {self.grid.bands} or "
                "use another run"
            )
        chosen = store.with_bands(self.grid.bands)
        if chosen.grid != self.grid:
            raise Pix2massError(
                f"{store.path} has another pixel grid than the run {self.folder.path}: "
                f"{store.grid.model_dump(exclude_none=True)} against {self.grid.model_dump(exclude_none=True)}; "
                "build the store on the run's grid"
            )
        return chosen

    def check_redshifts(self, store: ImageStore, rows: np.ndarray | slice = slice(None)) -> None:
        """That rows of a store have the redshifts that the networks take, if they do.

        Raises:
            Pix2massError: one is missing.
        """
        if self.info["use_redshift"]:
            _check_redshifts(store, rows, "the run")

    @torch.no_grad()
    def posterior(self, images: Tensor, valid: Tensor, z: Tensor) -> Posterior:
        """Posteriors of the true masses under the training clusters' distribution, from all folds and views.

        The calibration was made on single networks. The mean of K of them errs less: the variance of the means between
        networks, v, counts v / K in place of v, so (K - 1) / K v is taken off.

        Args:
            images: (n, n_bands, h, w) from :func:`pix2mass.model.prepare` and then the networks' ``rescale``.
            valid: (n, h, w) usable share.
            z: (n,) redshifts.
        """
        folds = []
        for regressor in self.regressors:
            views = [regressor(dihedral(images, view), dihedral(valid, view), z) for view in range(self.info["views"])]
            folds.append(combine(*(torch.stack(values) for values in zip(*views, strict=True))))
        means, sigmas = (torch.stack(values).double().numpy() for values in zip(*folds, strict=True))
        sigma = np.sqrt((sigmas**2).mean(axis=0))
        found = self.calibration.posterior(means.mean(axis=0), sigma, z.double().numpy())
        less = means.var(axis=0)  # (K - 1) / K times the unbiased variance
        return found.widened(-np.minimum(less, (1 - _LEAST_VARIANCE) * found.variance))

    def estimate(self, images: Tensor, valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """log10 M500c (n,) and its standard error in dex (n,); arguments as :meth:`posterior`."""
        columns = self.posterior(images, valid, z).summary()
        return torch.from_numpy(columns["log10_m500c"]), torch.from_numpy(columns["log10_m500c_err"])

    def summary(
        self, posterior: Posterior, z: np.ndarray, prior: Prior = "training", correct_shrinkage: bool = False
    ) -> dict[str, np.ndarray]:
        """log10_m500c, its error and the quantiles of posteriors; arguments as :func:`predict`."""
        density = PRIORS[prior][1]
        if density is not None:
            return posterior.reweighted(self.training_prior.to(density), z)
        columns = posterior.summary()
        return self.shrinkage.corrected(columns) if correct_shrinkage else columns


def predict(
    run: Predictor | RunFolder | str | Path,
    store: ImageStore | str | Path,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
    prior: Prior = "training",
    correct_shrinkage: bool = False,
    z_err: np.ndarray | float = 0.0,
) -> QTable:
    """Masses of all clusters of a store.

    Args:
        run: a run folder with finished training, the name of packaged weights ("default", "default-gri"), or a
            :class:`Predictor`.
        store: sealed images with the run's bands, or more, on its grid.
        progress: called with (done, total).
        workers: of ``distribute.open_workers``, who see the run and the store at the same paths; this process if not
            given.
        prior: of the true masses: the training labels' distribution, "flat" in log10 M500c, or "mass-function".
        correct_shrinkage: undo the line of out-of-fold estimates on true masses (see docs/errors.md); only with the
            training prior.
        z_err: standard errors of the redshifts, one or (n,) in the order of the store; NaN counts as 0.

    Returns:
        One row per cluster: id, ra_deg, dec_deg, z, log10_m500c, log10_m500c_err (dex; half the width of the central
        68.27%), quantiles q025 to q975, flags (bits), flag_names, trusted, model and version. Rows without usable
        pixels have NaN masses and the flag NO_ESTIMATE.

    Raises:
        Pix2massError: the store does not fit the run, a redshift is missing that the run needs, or the prior and the
            correction do not go together.
    """
    if prior not in PRIORS:
        raise Pix2massError(f"prior {prior!r}: expected one of {', '.join(PRIORS)}")
    if correct_shrinkage and prior != "training":
        raise Pix2massError(
            f"prior {prior!r} and the correction for shrinkage exclude each other: both undo the training prior"
        )
    predictor = run if isinstance(run, Predictor) else Predictor(run)
    store = predictor.images(store if isinstance(store, ImageStore) else ImageStore.open(store))
    info = predictor.info
    z = store.z.copy()
    if prior == "mass-function" or (prior == "flat" and predictor.training_prior.slope):
        _check_redshifts(store, slice(None), f"the prior {prior!r}")
    predictor.check_redshifts(store)
    errors = np.nan_to_num(np.broadcast_to(np.asarray(z_err, float), z.shape))
    site = _Site.of(predictor, store, _Choices(prior, correct_shrinkage, errors))
    names = ("log10_m500c", "log10_m500c_err", *QUANTILES)
    columns = {name: np.full(len(store), np.nan) for name in names}
    flags = store.flags.copy()
    batches = [range(start, min(start + _BATCH, len(store))) for start in range(0, len(store), _BATCH)]
    tasks = [batches[i : i + _BATCHES_PER_TASK] for i in range(0, len(batches), _BATCHES_PER_TASK)]
    done = 0
    for batch in (workers or InProcess()).map(_estimate_batches, site, tasks):
        rows = np.asarray(batch.rows)
        for name in names:
            columns[name][rows] = batch.columns[name]
        flags[rows] |= batch.flags
        done += len(rows)
        if progress:
            progress(done, len(store))
    version = predictor.folder.read_json("provenance.json")["versions"].get("pix2mass", "")
    return QTable(
        {
            "id": store.ids,
            "ra_deg": store.ra_deg,
            "dec_deg": store.dec_deg,
            "z": z,
            **columns,
            "flags": flags,
            "flag_names": [str(Flag(int(bits))) for bits in flags],
            "trusted": flags & int(UNTRUSTED) == 0,
            "model": [predictor.folder.path.name] * len(store),
            "version": [version] * len(store),
        },
        meta={
            "mass_definition": "500c",
            "cosmology": {"H0_km_s_Mpc": 70.0, "Om0": 0.3, "flat": True},
            "run": str(predictor.folder.path),
            "prior": info["prior"] if prior == "training" else PRIORS[prior][0],
            "corrected_for_shrinkage": correct_shrinkage,
            "trained_on": info["trained_on"],
            "pix2mass_version": version,
        },
    )


@dataclass(frozen=True)
class _Choices:
    """What the user chose, and the errors of all redshifts (n,)."""

    prior: Prior
    correct_shrinkage: bool
    z_err: np.ndarray


class _Site:
    """The networks and the images, opened where they are needed: a worker gets the paths alone."""

    def __init__(self, run: Path, store: Path | str, choices: _Choices) -> None:
        self._run, self._store, self.choices = run, store, choices

    @classmethod
    def of(cls, predictor: Predictor, store: ImageStore, choices: _Choices) -> _Site:
        """Of networks and images that are open here."""
        folder, path = predictor.folder.path.absolute(), store.path
        site = cls(folder, path.absolute() if isinstance(path, Path) else path, choices)
        site.predictor, site.store = predictor, store
        return site

    def __reduce__(self) -> tuple[Any, ...]:
        return _Site, (self._run, self._store, self.choices)

    @functools.cached_property
    def predictor(self) -> Predictor:
        return Predictor(self._run)

    @functools.cached_property
    def store(self) -> ImageStore:
        return self.predictor.images(ImageStore.open(self._store))


@dataclass(frozen=True)
class _Batch:
    """Estimates of some rows, NaN without usable pixels, and the flags that prediction adds."""

    rows: range
    columns: dict[str, np.ndarray]
    flags: np.ndarray


def _estimate_batches(site: _Site, batches: list[range]) -> Iterator[_Batch]:
    """The part of :func:`predict` that takes time."""
    store, predictor, choices = site.store, site.predictor, site.choices
    for rows in batches:
        chosen = np.asarray(rows)
        flux, mask = map(torch.from_numpy, store.batch(chosen))
        noise, z = torch.from_numpy(store.noise[chosen]), store.z[chosen]
        images, valid = prepare(flux, mask, noise)
        columns = {name: np.full(len(rows), np.nan) for name in ("log10_m500c", "log10_m500c_err", *QUANTILES)}
        training_mass = np.full(len(rows), np.nan)
        usable = np.isfinite(store.noise[chosen]).any(axis=1)
        if usable.any():
            some = torch.from_numpy(usable) if not usable.all() else slice(None)
            redshift = np.nan_to_num(z[usable])
            found = _posterior(predictor, images[some], valid[some], noise[some], redshift)
            extra = _variance_of_redshift(
                predictor, flux[some], mask[some], noise[some], redshift, choices.z_err[chosen[usable]]
            )
            found = found.widened(extra)
            summary = predictor.summary(found, z[usable], choices.prior, choices.correct_shrinkage)
            for name, values in summary.items():
                columns[name][usable] = values
            training_mass[usable] = found.centre
        yield _Batch(rows, columns, _flags(site, chosen, images, mask, noise, training_mass))


def _check_redshifts(store: ImageStore, rows: np.ndarray | slice, who: str) -> None:
    missing = np.asarray(store.ids)[rows][~np.isfinite(store.z[rows])]
    if len(missing):
        raise Pix2massError(
            f"{store.path}: {len(missing)} clusters have no redshift and {who} needs one: {', '.join(missing[:5])}"
        )


def _posterior(predictor: Predictor, images: Tensor, valid: Tensor, noise: Tensor, z: np.ndarray) -> Posterior:
    redshift = torch.tensor(z, dtype=torch.float32)
    return predictor.posterior(predictor.regressors[0].rescale(images, noise, redshift), valid, redshift)


def _variance_of_redshift(
    predictor: Predictor, flux: Tensor, mask: Tensor, noise: Tensor, z: np.ndarray, z_err: np.ndarray
) -> np.ndarray:
    """What the errors of the redshifts add to the variance of the estimates, (n,)."""
    extra, uncertain = np.zeros(len(z)), np.flatnonzero(z_err > 0)
    if len(uncertain):
        ends = []
        for sign in (-1, 1):
            # Not below half the redshift: errors of photometric redshifts can be of its own size.
            other = np.maximum(z[uncertain] + sign * z_err[uncertain], z[uncertain] / 2)
            seen = as_seen_at(predictor.grid, flux[uncertain], mask[uncertain], noise[uncertain], z[uncertain], other)
            ends.append(_posterior(predictor, *prepare(*seen), seen[2], other).centre)
        extra[uncertain] = ((ends[1] - ends[0]) / 2) ** 2
    return extra


def as_seen_at(
    grid: GridConfig, flux: Tensor, mask: Tensor, noise: Tensor, z: np.ndarray, other: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Cutouts as they would have been made at other redshifts: on a grid in kpc, wider or narrower on the sky.

    Args:
        grid: of the cutouts.
        flux: (n, n_bands, h, w) nanomaggies per pixel.
        mask: (n, n_bands, h, w) bool, True = unusable.
        noise: (n, n_bands) nanomaggies.
        z: (n,) redshifts at which they were made.
        other: (n,) the other redshifts.

    Returns:
        flux, mask and noise; what would lie outside is the cutout's own edge, mirrored.
    """
    if grid.width_kpc is None:
        return flux, mask, noise
    ratio = torch.tensor(kpc_per_arcsec(z) / kpc_per_arcsec(other), dtype=flux.dtype)
    corners = torch.zeros(len(z), 2, 3, dtype=flux.dtype)
    corners[:, 0, 0] = corners[:, 1, 1] = ratio
    places = F.affine_grid(corners, list(flux.shape), align_corners=False)
    area = ratio[:, None, None, None] ** 2
    moved = F.grid_sample(flux, places, padding_mode="reflection", align_corners=False) * area
    hidden = F.grid_sample(mask.to(flux.dtype), places, padding_mode="border", align_corners=False) > 0.5
    return moved, hidden, noise * ratio[:, None]


def _flags(
    site: _Site, chosen: np.ndarray, images: Tensor, mask: Tensor, noise: Tensor, mass: np.ndarray
) -> np.ndarray:
    """Bits that say what is wrong with some images or their estimates; ``mass`` under the training prior."""
    predictor, store = site.predictor, site.store
    info, reference = predictor.info, predictor.reference
    z = store.z[chosen]
    unlike, glaring = reference.unlike(image_statistics(images, mask, noise), z)
    scale = store.pixel_scale_arcsec[chosen]
    if predictor.grid.width_kpc is not None:
        expected = predictor.grid.width_kpc / kpc_per_arcsec(np.where(z > 0, z, np.nan)) / predictor.grid.n_pixels
    else:
        expected = np.full(len(z), float(predictor.grid.width_arcsec or np.nan) / predictor.grid.n_pixels)
    seen = np.isfinite(store.noise[chosen])
    covered = 1.0 - mask.float().mean(dim=(1, 2, 3)).double().numpy()
    wrong = {
        Flag.REDSHIFT_EXTRAPOLATED: _outside(z, info["z_range"]),
        Flag.LOW_COVERAGE: covered < info["min_coverage"],
        Flag.MISSING_BAND: seen.any(axis=1) & ~seen.all(axis=1),
        Flag.NO_ESTIMATE: ~np.isfinite(mass),
        Flag.OTHER_PIXEL_SCALE: np.abs(scale / expected - 1) > _SCALE_TOLERANCE,
        Flag.BRIGHT_STAR: glaring,
        Flag.UNLIKE_TRAINING: unlike,
        Flag.NO_CLUSTER_SEEN: mass < reference.lowest_mass(z),
    }
    bits = np.zeros(len(chosen), np.int64)
    for flag, where in wrong.items():
        bits[where] |= int(flag)
    return bits


def _outside(z: np.ndarray, z_range: list[float] | None) -> np.ndarray:
    """Redshifts (n,) beyond those of training, if training knew any."""
    return np.zeros(len(z), bool) if z_range is None else ~((z >= z_range[0]) & (z <= z_range[1]))


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
