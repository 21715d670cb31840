"""The stages in order, for the command line: each function is one verb, ``run`` is all of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from astropy.coordinates import angular_separation
from astropy.table import QTable, vstack

from pix2mass.catalog import read_catalog, sky_folds, write_catalog
from pix2mass.catalog.masses import MassDefinition, to_m500c
from pix2mass.catalog.table import redshift_errors
from pix2mass.config import BaselineConfig, BuildConfig, GridConfig, MockConfig, PretrainConfig, RunConfig, TrainConfig
from pix2mass.distribute import Workers
from pix2mass.evaluate import baselines, baselines_from, evaluate
from pix2mass.explain import DEFAULT_METHOD, explain
from pix2mass.images.archive import Folder, Http, open_archive
from pix2mass.images.cutouts import CutoutSource, cutout_path, write_cutout
from pix2mass.images.frame_index import FrameIndex
from pix2mass.images.frames import FrameSource
from pix2mass.images.hips import HipsSource
from pix2mass.images.inject import inject_frames, random_clusters
from pix2mass.images.mock.frames import write_frames
from pix2mass.images.mock.population import draw_clusters
from pix2mass.images.mock.source import MockSource
from pix2mass.images.plan import plan_frames, plan_hips, square_widths
from pix2mass.images.window import WINDOW_FLIST, ask_skyserver, find_window_flist, read_window_flist
from pix2mass.predict import Predictor, predict
from pix2mass.report import OutOfFold, Tile, write_contact_sheet, write_report
from pix2mass.richness import (
    PUBLISHED,
    calibrate,
    cross_validate,
    m_star_i_mag,
    reference_mag,
    richness,
    richness_mass_fit,
    richness_mass_fit_with_scatter,
    ten_sigma_depth_mag,
)
from pix2mass.run import RunFolder, digest, write_atomic
from pix2mass.store import ImageStore, Source, build
from pix2mass.train import pretrain, seen_before, train
from pix2mass.types import Pix2massError


class Progress(Protocol):
    """Shows how far a stage is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total``; the note says what else there is to know, e.g. failures."""
        ...


Reporter = Callable[[str], AbstractContextManager[Progress]]
"""``with reporter("building") as progress: progress(done, total)``"""

_CALIBRATION_CLUSTERS = 60
_CALIBRATION_FIELDS = 16


@dataclass(frozen=True)
class Survey:
    """Two catalogues and their images: clusters with a mass and clusters without."""

    labelled: QTable
    unlabelled: QTable
    labelled_store: ImageStore
    unlabelled_store: ImageStore


def open_source(config: BuildConfig, grid: GridConfig, catalog: QTable, reporter: Reporter) -> Source:
    """The source of images that a config names, for the clusters of a catalogue.

    Raises:
        Pix2massError: the folder, URL or index cannot be read.
    """
    if config.cutouts is not None:
        source = CutoutSource(config.cutouts, grid)
        source.check_files(catalog["id"])
        return source
    if config.hips:
        return HipsSource(grid, config.hips_service)
    archive = _open_frames(config)
    return FrameSource(archive, grid, open_index(config, grid, catalog, archive, reporter))


def _open_frames(config: BuildConfig) -> Folder | Http:
    assert config.frames is not None  # the config holds exactly one source
    return open_archive(config.frames, config.frame_cache, config.keep_frames, config.connections)


def open_index(
    config: BuildConfig, grid: GridConfig, catalog: QTable, archive: Folder | Http, reporter: Reporter
) -> FrameIndex:
    """Which frames cover the clusters of a catalogue, found in the way that a config names.

    Raises:
        Pix2massError: the index, the list of fields or the service cannot be read.
    """
    if config.frame_index is not None:
        return FrameIndex.from_file(config.frame_index)
    where = (np.asarray(catalog["ra_deg"], float), np.asarray(catalog["dec_deg"], float))
    if config.fields == "skyserver":
        widths = np.nan_to_num(square_widths(catalog, grid))
        with reporter("asking SkyServer for fields") as progress:
            return ask_skyserver(config.skyserver, *where, widths, config.frame_cache, progress)
    if config.fields in ("auto", "list"):
        with reporter("reading the list of fields"):
            fields = find_window_flist(archive)
            if fields is not None:
                widths = np.nan_to_num(square_widths(catalog, grid))
                return read_window_flist(fields, (*where, widths))
        if config.fields == "list":
            raise Pix2massError(
                f"{archive}: expected the list of fields {WINDOW_FLIST}, found none; use --fields headers or skyserver"
            )
    with reporter("reading frame headers") as progress:
        return FrameIndex.from_base(archive, progress=progress)


def plan_build(
    catalog: QTable, config: BuildConfig, grid: GridConfig, out: Path | str, cores: int, reporter: Reporter
) -> dict[str, Any]:
    """What ``build_store`` would cost, before any image is fetched; see ``images.plan``."""
    if config.cutouts is not None:
        raise Pix2massError("--plan is about frames and the cutout service: your own cutouts lie here already")
    before: dict[str, Any] = {}
    with contextlib.suppress(Pix2massError):
        earlier = ImageStore.open(out)
        if config.decides().items() <= earlier.provenance.items():
            before = earlier.build_summary
    if config.hips:
        return plan_hips(catalog, grid, before)
    archive = _open_frames(config)
    try:
        index = open_index(config, grid, catalog, archive, reporter)
        with reporter("counting frames") as progress:
            return plan_frames(catalog, grid, index, archive, cores, before, progress)
    finally:
        archive.close()


def build_store(
    catalog: QTable, config: BuildConfig, grid: GridConfig, out: Path | str, workers: Workers, reporter: Reporter
) -> ImageStore:
    """Images of a catalogue from frames, from the cutout service or from the user's own cutouts, as a sealed store.

    What decides the pixels is in the store's provenance; how they came is not, so that a build from a server gives the
    same bytes as one from a folder.
    """
    source = open_source(config, grid, catalog, reporter)
    provenance = {**config.decides(), **_files(config, catalog, grid), **getattr(source, "provenance", {})}
    title = f"building {Path(out).name}"
    with contextlib.suppress(Pix2massError):
        ImageStore.open(out)
        title = f"taking the images of {Path(out).name}, made before (remove it to make them anew)"
    try:
        with reporter(title) as progress:
            store = build(catalog, source, out, grid, provenance, workers, progress)
        if config.frames is not None and not config.keep_frames:
            with contextlib.closing(_open_frames(config)) as archive:
                archive.sweep()
        return store
    finally:
        close = getattr(source, "close", None)
        if close:
            close()


def _files(config: BuildConfig, catalog: QTable, grid: GridConfig) -> dict[str, str]:
    """Digest of the user's own files: one that is mended or added makes other images.

    Cutouts count by name, size and time, a frame index by its content.
    """
    if config.cutouts is None:
        if config.frame_index is None or not config.frame_index.is_file():
            return {}
        return {"files": hashlib.blake2b(config.frame_index.read_bytes(), digest_size=12).hexdigest()}
    paths = [cutout_path(config.cutouts, str(name), band) for name in catalog["id"] for band in grid.bands]
    found = [[str(path), *((s := path.stat()).st_size, s.st_mtime_ns)] for path in paths if path.is_file()]
    return {"files": digest(found)}


def make_mock(
    config: MockConfig, grid: GridConfig, seed: int, out: Path, workers: Workers, reporter: Reporter
) -> Survey:
    """A mock survey with known truth; its richness is measured from galaxies with magnitude errors.

    Args:
        config: of the mock sky.
        grid: of the cutouts.
        seed: same seed, same bytes.
        out: folder; gets ``survey.json`` (settings and seed), ``labelled.ecsv``, ``unlabelled.ecsv``,
            ``labelled.zarr``, ``unlabelled.zarr``.
        workers: make the cutouts.
        reporter: shows progress.

    Raises:
        Pix2massError: another survey lies there.
    """
    _check_same_survey(config, seed, out)
    source = MockSource(config, grid, seed)
    made = {}
    for kind, n in (("labelled", config.n_labelled), ("unlabelled", config.n_unlabelled)):
        catalog = draw_clusters(config, n, seed, kind[0].upper())
        with reporter(f"drawing {kind} mock images") as progress:
            provenance = {"source": "mock", "seed": seed, "config": config.model_dump(mode="json")}
            store = build(catalog, source, out / f"{kind}.zarr", grid, provenance, workers, progress)
        made[kind] = (catalog, store)
    labelled, labelled_store = made["labelled"]
    unlabelled, unlabelled_store = made["unlabelled"]
    _write_mock_catalogs(labelled, unlabelled, source, seed, out, reporter)
    return Survey(read_catalog(out / "labelled.ecsv"), unlabelled, labelled_store, unlabelled_store)


def _write_mock_catalogs(
    labelled: QTable, unlabelled: QTable, source: MockSource, seed: int, out: Path, reporter: Reporter
) -> None:
    if not (out / "labelled.ecsv").exists():
        with reporter("measuring richness") as progress:
            measure_richness(labelled, source, seed, progress)
        write_catalog(unlabelled, out / "unlabelled.ecsv")
        write_catalog(labelled, out / "labelled.ecsv")


def write_mock_files(
    config: MockConfig,
    grid: GridConfig,
    seed: int,
    out: Path,
    images: Literal["cutouts", "frames"],
    workers: Workers,
    reporter: Reporter,
) -> None:
    """A mock survey as ``make_mock`` makes it, with its images in FITS files in place of stores.

    Args:
        config: of the mock sky.
        grid: of the cutouts; of frames, the width that they are to cover.
        seed: same seed, same bytes.
        out: folder; gets ``survey.json`` (settings and seed), ``labelled.ecsv``, ``unlabelled.ecsv``, and
            ``labelled/ID-BAND.fits`` and ``unlabelled/ID-BAND.fits``, or ``dr12/...`` in the archive's layout.
        images: which of the two.
        workers: draw the frames.
        reporter: shows progress.

    Raises:
        Pix2massError: another survey lies there.
    """
    source = MockSource(config, grid, seed)
    catalogs = {
        kind: draw_clusters(config, n, seed, kind[0].upper())
        for kind, n in (("labelled", config.n_labelled), ("unlabelled", config.n_unlabelled))
    }
    _check_same_survey(config, seed, out)
    if images == "frames":
        both = vstack(list(catalogs.values()), metadata_conflicts="silent")
        draw_frames(both, config, grid, seed, out, workers, reporter)
    else:
        for kind, catalog in catalogs.items():
            with reporter(f"drawing {kind} cutouts") as progress:
                for done, cluster in enumerate(catalog):
                    pattern = f"{out / kind}/{{id}}-{{band}}.fits"
                    write_cutout(source.cutout(cluster), str(cluster["id"]), pattern)
                    progress(done + 1, len(catalog))
    _write_mock_catalogs(catalogs["labelled"], catalogs["unlabelled"], source, seed, out, reporter)


def _check_same_survey(config: MockConfig, seed: int, out: Path) -> None:
    """That the folder holds nothing yet, or files of this survey, on which a killed command goes on."""
    path, survey = out / "survey.json", {"seed": seed, "config": config.model_dump(mode="json")}
    if path.exists():
        before = json.loads(path.read_text())
    elif (out / "labelled.ecsv").exists():
        path, before = out / "labelled.ecsv", None  # only images that were made with the catalogue can vouch for it
        with contextlib.suppress(Pix2massError):
            made = ImageStore.open(out / "labelled.zarr").provenance
            before = {name: made.get(name) for name in survey}
    else:
        before = survey
    if before != survey:
        raise Pix2massError(f"{out}: another mock survey lies here (see {path}); remove it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "survey.json", json.dumps(survey, indent=2) + "\n")


def draw_frames(
    catalog: QTable, config: MockConfig, grid: GridConfig, seed: int, out: Path, workers: Workers, reporter: Reporter
) -> int:
    """The mock sky of a catalogue as frames: see ``images.mock.frames.write_frames``; the number of frames."""
    with reporter("drawing frames") as progress:
        return len(write_frames(catalog, config, seed, out, grid, workers=workers, progress=progress))


def inject(
    base: str,
    catalog: QTable | None,
    n_clusters: int,
    config: MockConfig,
    grid: GridConfig,
    seed: int,
    out: Path,
    reporter: Reporter,
) -> QTable:
    """Paint mock clusters into frames, at the positions of a catalogue or at random ones.

    Args:
        base: folder or URL of the frames.
        catalog: clusters with mass or richness; None draws ``n_clusters``.
        n_clusters: how many are drawn.
        config: of the mock sky.
        grid: of the cutouts that the new frames are to cover.
        seed: same seed, same bytes.
        out: folder; gets ``dr12/...`` and ``injected.ecsv``.
        reporter: shows progress.

    Returns:
        The clusters painted.
    """
    with reporter("reading frame headers") as progress:
        index = FrameIndex.from_base(base, progress=progress)
    chosen = random_clusters(index, config, n_clusters, seed) if catalog is None else catalog
    with reporter("painting clusters into frames") as progress:
        inject_frames(base, chosen, config, seed, out, grid, index=index, progress=progress)
    write_catalog(chosen, out / "injected.ecsv")
    return chosen


def measure_richness(catalog: QTable, source: MockSource, seed: int, progress: Progress) -> None:
    """Set columns richness and richness_err from galaxies with magnitude errors, as for a real survey.

    Red sequence and background are calibrated on other clusters of the same sky, whose members have redshifts, and on
    blank fields; nothing of the measured clusters' truth is used.
    """
    config = source.config
    training = draw_clusters(config, _CALIBRATION_CLUSTERS, seed, "calibration-")
    red: dict[str, list[np.ndarray]] = {"mag": [], "mag_err": [], "z": []}
    for cluster in training:
        galaxies = source.galaxies(cluster)
        z = float(cluster["z"])
        chosen = galaxies["truth_member"] & (reference_mag(galaxies) < m_star_i_mag(z) + 1.75)
        red["mag"].append(galaxies["mag"][chosen])
        red["mag_err"].append(galaxies["mag_err"][chosen])
        red["z"].append(np.full(int(chosen.sum()), z))
    members = {name: np.concatenate(values) for name, values in red.items()}
    blank = [{"id": f"blank-{i}", "z": 0.25} for i in range(_CALIBRATION_FIELDS)]
    width_arcsec = 1800.0
    fields = [source.galaxies(field, width_arcsec) for field in blank]
    calibration = calibrate(members, members["z"], fields, len(fields) * width_arcsec**2)
    depth_mag = ten_sigma_depth_mag(
        {name: np.concatenate([field[name] for field in fields]) for name in ("mag", "mag_err")}
    )
    value, error = np.empty(len(catalog)), np.empty(len(catalog))
    for row, cluster in enumerate(catalog):
        result = richness(
            source.galaxies(cluster),
            float(cluster["z"]),
            float(cluster["ra_deg"]),
            float(cluster["dec_deg"]),
            *calibration,
            i_limit_mag=depth_mag,
        )
        value[row], error[row] = result.richness, result.richness_err
        progress(row + 1, len(catalog))
    catalog["richness"], catalog["richness_err"] = value, error


def richness_baseline(catalog: QTable, config: BaselineConfig, seed: int, progress: Progress) -> dict[str, Any]:
    """Cross-validated masses from richness, from redshift alone and from nothing, folds dealt several times.

    Args:
        catalog: columns ra_deg, dec_deg, z, richness, log10_m500c, and their errors for a fit with scatter.
        config: folds and the kind of relation.
        seed: of the first deal; the following ones count up.
        progress: called with the number of deals done and in all.

    Returns:
        ``n``, ``dropped``, ``mae_dex``, ``mae_constant_dex``, ``mae_redshift_dex`` and their spreads over deals; ``a``,
        ``b``, ``c`` of all clusters for a fit, with ``scatter_dex`` and ``errors`` where scatter is fitted;
        ``reference`` and ``offset_dex`` for a published relation.

    Raises:
        Pix2massError: too few clusters have a richness and a mass, or errors that the fit needs are missing.
    """
    needed = ["richness", "log10_m500c"] + (["richness_err", "log10_m500c_err"] if config.relation == "scatter" else [])
    known = np.all([np.isfinite(np.asarray(catalog[name], float)) for name in needed], axis=0)
    if known.sum() < 2 * config.folds:
        have = ", ".join(f"{np.isfinite(np.asarray(catalog[name], float)).sum()} have {name}" for name in needed)
        raise Pix2massError(
            f"{known.sum()} of {len(catalog)} clusters have all that the fit needs ({have}), expected at least "
            f"{2 * config.folds}; match the catalogue to one with richness first (pix2mass catalog build), use fewer "
            "folds, or --relation fit, which needs no errors"
        )
    used: Any = catalog[known]
    ra, dec, z, richness, mass = (
        np.asarray(used[name], float) for name in ("ra_deg", "dec_deg", "z", "richness", "log10_m500c")
    )
    errors = given = None
    facts: dict[str, Any] = {}
    if config.relation == "fit":
        facts = asdict(richness_mass_fit(richness, z, mass))
    elif config.relation == "scatter":
        errors = (np.asarray(used["richness_err"], float), np.asarray(used["log10_m500c_err"], float))
        fit = richness_mass_fit_with_scatter(richness, z, mass, *errors)
        facts = {**asdict(fit.relation), "scatter_dex": fit.scatter_dex, "errors": fit.errors}
    else:
        relation = PUBLISHED[config.relation]
        definition = MassDefinition(relation.overdensity, per_h=relation.per_h)
        given = np.log10(to_m500c(definition.msun(relation.mass(richness, z)), z, definition, config.concentration))
        facts = {"reference": relation.reference, "offset_dex": float(np.median(given - mass))}
    deals = []
    for k in range(config.repeats):
        fold = sky_folds(ra, dec, mass, config.folds, config.fold_separation_deg, seed + k)
        score = cross_validate(richness, z, mass, fold, errors, given)
        deals.append((score.mae_dex, score.mae_constant_dex, score.mae_redshift_dex))
        progress(k + 1, config.repeats)
    names = ("", "constant_", "redshift_")
    return {
        "n": len(used),
        "dropped": int((~known).sum()),
        **{f"mae_{name}dex": float(value) for name, value in zip(names, np.mean(deals, axis=0), strict=True)},
        **{f"mae_{name}spread_dex": float(value) for name, value in zip(names, np.std(deals, axis=0), strict=True)},
        **facts,
    }


def evaluate_run(folder: RunFolder, store: ImageStore, seed: int, reporter: Reporter) -> dict[str, Any]:
    """Train the same recipe on shuffled labels, then score the run beside all baselines.

    Returns:
        What metrics.json holds.

    Raises:
        Pix2massError: the run has not been trained, or on images of another grid or of other positions or redshifts.
    """
    catalog = read_catalog(_need(folder, "catalog.ecsv"))
    folds = QTable.read(_need(folder, "folds.ecsv"), format="ascii.ecsv")
    out_of_fold = QTable.read(_need(folder, "train-out-of-fold.ecsv"), format="ascii.ecsv")
    config = folder.read_config("train", TrainConfig)
    store = Predictor(folder).images(store)
    _check_same_clusters(store, store.rows([str(cluster_id) for cluster_id in catalog["id"]]), catalog)
    null = catalog.copy()
    order = np.random.default_rng([seed, 1234]).permutation(len(null))
    for name in ("log10_m500c", "log10_m500c_err"):
        null[name] = np.asarray(catalog[name])[order]
    with reporter("training on shuffled labels (null test)") as progress:
        shuffled = train(store, null, np.asarray(folds["fold"]), folder, config, seed, "null", progress)
    if [str(value) for value in out_of_fold["id"]] != [str(value) for value in catalog["id"]]:
        raise Pix2massError(f"{folder.path}: the training did not finish; run `pix2mass train` again")
    info = folder.read_json("model.json")
    images = info.get("images_seen")
    seen = int(seen_before(catalog, images).sum()) if images else None
    # Features that came with another run's network were not trained here.
    pretrained = folder.read_json("pretrain.json") if images and "started_from" not in info else {}
    with folder.stage("evaluate", digest(out_of_fold["log10_m500c"].tolist(), seed)):
        metrics, predictions = evaluate(
            catalog,
            out_of_fold,
            shuffled,
            seed,
            {
                "bands": store.grid.bands,
                "pixel_scale_arcsec_range": [
                    float(store.pixel_scale_arcsec.min()),
                    float(store.pixel_scale_arcsec.max()),
                ],
                **{name: pretrained[name] for name in ("band_accuracy", "band_confusion") if name in pretrained},
                "labelled_seen_in_pretraining": seen,
                "pretraining_saw_test_images": None if seen is None else seen > 0,
            },
        )
        write_catalog(predictions, folder / "predictions.ecsv")
    seconds = {name: record["seconds"] for name, record in folder.stages.items()}
    folder.write_json("metrics.json", {**metrics, "seconds": seconds})
    return folder.read_json("metrics.json")


def train_run(
    folder: RunFolder, store: ImageStore, catalog: QTable, config: TrainConfig, seed: int, reporter: Reporter
) -> None:
    """Deal the folds, keep them and the catalogue in the run folder, and train one network 2 per fold.

    Raises:
        Pix2massError: too few labels, or images of other positions or redshifts.
    """
    labelled = catalog[np.isfinite(np.asarray(catalog["log10_m500c"], float))]
    rows = store.rows([str(cluster_id) for cluster_id in labelled["id"]])
    _check_same_clusters(store, rows, labelled)
    usable = labelled[np.isfinite(store.noise[rows]).any(axis=1)]
    if len(usable) < len(labelled):
        folder.announce(f"{len(labelled) - len(usable)} labelled clusters have no usable pixels and are left out")
    if len(usable) < 2 * config.folds:
        raise Pix2massError(
            f"{len(usable)} clusters have a mass in column log10_m500c and pixels, expected at least {2 * config.folds}"
        )
    if np.ptp(np.asarray(usable["log10_m500c"], float)) == 0:
        raise Pix2massError(
            f"all {len(usable)} labels are log10_m500c = {usable['log10_m500c'][0]:g}: expected masses that differ, "
            "there is nothing to learn; look at the catalogue"
        )
    fold = sky_folds(
        np.asarray(usable["ra_deg"], float),
        np.asarray(usable["dec_deg"], float),
        np.asarray(usable["log10_m500c"], float),
        config.folds,
        config.fold_separation_deg,
        seed,
        source=[str(source) for source in usable["label_source"]],
    )
    with reporter(f"training network 2, {config.folds} folds") as progress:
        train(store, usable, fold, folder, config, seed, progress=progress)
    folder.write_config(seed=seed, grid=store.grid, train=config)
    write_catalog(usable, folder / "catalog.ecsv")
    write_catalog(QTable({"id": usable["id"], "fold": fold}), folder / "folds.ecsv")
    folder.write_provenance(seed, stores={"labelled": store.checksum})


_SAME_POSITION_ARCSEC, _SAME_REDSHIFT = 1.0, 1e-4


def _check_same_clusters(store: ImageStore, rows: np.ndarray, catalog: QTable) -> None:
    """That positions and redshifts are still those the images were made for: a redshift decides how wide they are."""
    places = (catalog["ra_deg"], catalog["dec_deg"], store.ra_deg[rows], store.dec_deg[rows])
    off_arcsec = 3600 * np.degrees(angular_separation(*(np.radians(np.asarray(place, float)) for place in places)))
    z_change = np.abs(np.asarray(catalog["z"], float) - store.z[rows])
    changed = (off_arcsec > _SAME_POSITION_ARCSEC) | (z_change > _SAME_REDSHIFT)
    if changed.any():
        names = ", ".join(str(cluster_id) for cluster_id in catalog["id"][changed][:5])
        raise Pix2massError(
            f"{store.path}: {int(changed.sum())} clusters have another position or redshift in the catalogue than "
            f"their images were made for ({names}): by up to {off_arcsec.max():.0f} arcsec and "
            f"{np.nanmax(z_change, initial=0):.3f} in z; build the store again from this catalogue"
        )


def run(config: RunConfig, folder: RunFolder, workers: Workers, reporter: Reporter) -> dict[str, Any]:
    """All stages from images to report. Stages whose inputs and configuration have not changed are skipped.

    Returns:
        What metrics.json holds.
    """
    folder.write_config(**{name: getattr(config, name) for name in RunConfig.model_fields})
    survey = _survey(config, folder, workers, reporter)
    if config.train.network != "galaxies":
        with reporter("pretraining network 1") as progress:
            pretrain(survey.unlabelled_store, folder, config.pretrain, config.seed, survey.labelled_store, progress)
    train_run(folder, survey.labelled_store, survey.labelled, config.train, config.seed, reporter)
    folder.write_provenance(
        config.seed,
        stores={"labelled": survey.labelled_store.checksum, "unlabelled": survey.unlabelled_store.checksum},
    )
    trained = folder.stages["train"]["key"]
    outputs = [folder / "masses.ecsv"]
    z_err = redshift_errors(survey.unlabelled, "the unlabelled clusters")
    key = digest("predict", trained, survey.unlabelled_store.checksum, z_err.tolist())
    if not folder.is_done("predict", key, *outputs):
        with folder.stage("predict", key), reporter("predicting unlabelled clusters") as progress:
            masses = predict(folder, survey.unlabelled_store, progress, workers, z_err=z_err)
            write_catalog(masses, outputs[0])
    evaluate_run(folder, survey.labelled_store, config.seed, reporter)
    if "log10_m500c_true" in survey.unlabelled.colnames:
        folder.write_json(
            "metrics.json", {**folder.read_json("metrics.json"), "unlabelled": _unlabelled(folder, survey)}
        )
    ids = choose_clusters(folder, config.explain.n_clusters)
    key = digest("explain", trained, config.explain, ids, DEFAULT_METHOD)
    if not folder.is_done("explain", key, folder / "maps"):
        with folder.stage("explain", key), reporter("drawing attribution maps") as progress:
            shutil.rmtree(folder / "maps", ignore_errors=True)
            explain(
                folder,
                survey.labelled_store,
                ids,
                config.explain.steps,
                config.explain.compare,
                progress=progress,
            )
    with folder.stage("report", digest("report", trained)):
        write_report(folder)
    metrics = folder.read_json("metrics.json")
    metrics["seconds"] = {name: record["seconds"] for name, record in folder.stages.items()}
    folder.write_json("metrics.json", metrics)
    return metrics


_LEAST_LABELS = 125


def learning_curve(
    folder: RunFolder,
    store: ImageStore,
    seed: int,
    reporter: Reporter,
    unlabelled: ImageStore | None = None,
    test: tuple[QTable, ImageStore] | None = None,
) -> dict[str, Any]:
    """Error of a run's recipe when it is trained with fewer labels, and pretrained with fewer images.

    Args:
        folder: a trained run; gets ``learning_curve.json`` and, in ``learning-curve/``, a run per smaller point.
        store: images of its labelled clusters, with the run's bands or more.
        seed: of the choice of clusters and of the trainings.
        reporter: shows progress.
        unlabelled: images that network 1 was trained on; None leaves that curve out.
        test: catalogue and images of clusters to take the errors from; if None, from the folds of each training.

    Returns:
        ``labels`` and ``unlabelled``, each a list of ``n``, ``mae_dex``, ``mae_err_dex`` (against the true mass where
        it is known) and, where the clusters have one, ``richness_mae_dex`` from as many labels; and ``fit``, for each
        of the two with three points or more: ``slope``, ``slope_err`` and ``intercept`` of log10 MAE against log10 n.
    """
    config, catalog = folder.read_config("train", TrainConfig), read_catalog(_need(folder, "catalog.ecsv"))
    bands = folder.read_json("model.json")["bands"]
    store, unlabelled = store.with_bands(bands), unlabelled and unlabelled.with_bands(bands)
    order = np.random.default_rng([seed, 4321]).permutation(len(catalog))

    def point(name: str, n: int, encoder: RunFolder, rows: np.ndarray) -> dict[str, Any]:
        smaller = folder
        if len(rows) < len(catalog) or encoder is not folder:
            smaller = _smaller_run(folder / "learning-curve" / name, encoder)
            train_run(smaller, store, catalog[np.sort(rows)], config, seed, reporter)
        used = read_catalog(smaller / "catalog.ecsv")
        if test is None:
            table = QTable.read(smaller / "train-out-of-fold.ecsv", format="ascii.ecsv")
            row_of = {str(cluster_id): row for row, cluster_id in enumerate(used["id"])}
            used = used[[row_of[str(cluster_id)] for cluster_id in table["id"]]]  # those that have pixels
            rivals = baselines(used, np.asarray(table["fold"]))
        else:
            table, rivals = predict(smaller, test[1]), baselines_from(used, test[0])
            used = test[0]
        column = "log10_m500c_true" if "log10_m500c_true" in used.colnames else "log10_m500c"
        true = np.asarray(used[column], float)
        error = np.abs(np.asarray(table["log10_m500c"]) - true)
        error = error[np.isfinite(error)]
        found = {"n": n, "mae_dex": float(error.mean()), "mae_err_dex": float(error.std() / np.sqrt(len(error)))}
        if "richness" in rivals:
            found["richness_mae_dex"] = float(np.nanmean(np.abs(rivals["richness"] - true)))
        return found

    found: dict[str, Any] = {"labels": [], "unlabelled": [], "fit": {}}
    for n in _sizes(len(catalog), max(_LEAST_LABELS, 8 * config.folds)):
        found["labels"].append(point(f"labels-{n}", n, folder, order[:n]))
    if unlabelled is not None:
        pretraining = folder.read_config("pretrain", PretrainConfig)
        for n in _sizes(len(unlabelled), _LEAST_LABELS):
            encoder = folder
            if n != folder.read_json("pretrain.json")["n_images"]:
                encoder = RunFolder(folder / "learning-curve" / f"encoder-{n}")
                with reporter(f"pretraining on {n} images") as progress:
                    pretrain(unlabelled, encoder, pretraining.model_copy(update={"n_images": n}), seed, None, progress)
            found["unlabelled"].append(point(f"unlabelled-{n}", n, encoder, order))
    for name in ("labels", "unlabelled"):
        if len(found[name]) >= 3:
            found["fit"][name] = _power_law(found[name])
    folder.write_json("learning_curve.json", found)
    return found


def _sizes(largest: int, least: int) -> list[int]:
    """The largest number, and its halves down to ``least``, rising."""
    sizes = [largest]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def _smaller_run(path: Path, encoder: RunFolder) -> RunFolder:
    """A run folder with network 1 of another run, if that has one."""
    smaller = RunFolder(path)
    if (encoder / "pretrain.json").exists():
        for name in ("pretrain.json", "encoder.safetensors"):
            shutil.copyfile(encoder / name, smaller / name)
        smaller.write_json("stages.json", {**smaller.stages, "pretrain": encoder.stages["pretrain"]})
    return smaller


def _power_law(points: list[dict[str, Any]]) -> dict[str, float]:
    """Weighted least squares of log10 MAE on log10 n; the error of the slope follows from those of the MAE."""
    n, mae, error = (np.array([point[key] for point in points], float) for key in ("n", "mae_dex", "mae_err_dex"))
    weight = mae / error * np.log(10)
    slope, intercept = np.polyfit(np.log10(n), np.log10(mae), 1, w=weight)
    spread = np.average((np.log10(n) - np.average(np.log10(n), weights=weight**2)) ** 2, weights=weight**2)
    return {
        "slope": float(slope),
        "slope_err": float(1 / np.sqrt((weight**2).sum() * spread)),
        "intercept": float(intercept),
    }


def _unlabelled(folder: RunFolder, survey: Survey) -> dict[str, Any]:
    """How well predict does on the mock's unlabelled clusters: their labels trained nothing, their truth is known."""
    masses = QTable.read(folder / "masses.ecsv", format="ascii.ecsv")
    true = np.asarray(survey.unlabelled["log10_m500c_true"])
    error = np.asarray(masses["log10_m500c"]) - true
    return {
        "n": len(error),
        "mae_dex": float(np.abs(error).mean()),
        "bias_dex": float(error.mean()),
        "coverage_68": float(((true >= masses["q16"]) & (true <= masses["q84"])).mean()),
        "coverage_95": float(((true >= masses["q025"]) & (true <= masses["q975"])).mean()),
    }


def labelled_store(folder: RunFolder) -> ImageStore:
    """The images of the labelled clusters that a run made itself.

    Raises:
        Pix2massError: they are not in the run's folder.
    """
    checksum = folder.read_json("provenance.json").get("stores", {}).get("labelled")
    for path in sorted([*folder.path.glob("survey-*/labelled.zarr"), *folder.path.glob("labelled-*.zarr")]):
        store = ImageStore.open(path)
        if store.checksum == checksum:
            return store
    raise Pix2massError(f"{folder.path}: expected the images the run was trained on, found none here; name the store")


def choose_clusters(folder: RunFolder, n: int) -> list[str]:
    """Ids of the worst, the typical and the best clusters of a run, n in all: the gallery of its report.

    Raises:
        Pix2massError: the run has not been evaluated.
    """
    return [cluster_id for ids in OutOfFold.read(folder).gallery(n).values() for cluster_id in ids]


def choose_rows(store: ImageStore, n: int, flagged: bool = False) -> np.ndarray:
    """At most n rows of a store, spread evenly over redshift, in that order; only those with a flag if asked for.

    Raises:
        Pix2massError: no cutout has a flag, or n is below 1.
    """
    if n < 1:
        raise Pix2massError(f"n = {n}: expected the number of cutouts to draw, 1 or more")
    rows = np.flatnonzero(store.flags) if flagged else np.arange(len(store))
    if not rows.size:
        raise Pix2massError(f"{store.path}: no cutout has a flag")
    rows = rows[np.argsort(store.z[rows], kind="stable")]
    return rows[np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]


def draw_store(store: ImageStore, rows: np.ndarray, out: Path) -> Path:
    """Draw a contact sheet of some rows."""
    tiles = [Tile(store.ids[row], float(store.z[row]), store[row]) for row in rows]
    return write_contact_sheet(tiles, f"{Path(store.path).name}: {len(rows)} of {len(store)} cutouts", out)


def _survey(config: RunConfig, folder: RunFolder, workers: Workers, reporter: Reporter) -> Survey:
    if config.mock is not None:
        key = digest("mock", config.mock, config.grid, config.seed)
        out = folder / f"survey-{key}"
        if folder.is_done("mock", key, out / "labelled.ecsv"):
            return make_mock(config.mock, config.grid, config.seed, out, workers, reporter)
        with folder.stage("mock", key):
            return make_mock(config.mock, config.grid, config.seed, out, workers, reporter)
    assert config.data is not None  # the config holds one of the two
    data = config.data
    source = BuildConfig(**{name: getattr(data, name) for name in BuildConfig.model_fields})
    # Of unlabelled clusters too: in the end they are weighed.
    need = ("z",) if config.grid.width_kpc or config.train.use_redshift else ()
    tables = {name: read_catalog(getattr(data, name), need=need) for name in ("labelled", "unlabelled")}
    stores = {}
    for name, table in tables.items():
        columns = (table[column].tolist() for column in ("id", "ra_deg", "dec_deg", "z"))
        key = digest("build", source.decides(), _files(source, table, config.grid), config.grid, *columns)
        out = folder / f"{name}-{key}.zarr"
        if folder.is_done(f"build-{name}", key, out):
            stores[name] = ImageStore.open(out)
            continue
        with folder.stage(f"build-{name}", key):
            stores[name] = build_store(table, source, config.grid, out, workers, reporter)
    return Survey(tables["labelled"], tables["unlabelled"], stores["labelled"], stores["unlabelled"])


def _need(folder: RunFolder, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise Pix2massError(f"{folder.path}: the run has no {name}; train it first with `pix2mass train`")
    return path
