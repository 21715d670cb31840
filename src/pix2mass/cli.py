"""The command line: each verb is one function, its flags are the fields of the typed configs."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter

from pix2mass.config import (
    PUBLIC_ARCHIVE,
    BaselineConfig,
    BuildConfig,
    CatalogConfig,
    ExplainConfig,
    GridConfig,
    MockConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
    load_toml,
    validate,
)
from pix2mass.types import FLAG_MEANING, Flag, Pix2massError

app = App(
    name="pix2mass",
    help="Weigh galaxy clusters from their pictures: log10 M500c with errors from SDSS ugriz images.",
    help_format="markdown",
    version_flags=["--version"],
)
catalog_app = App(
    name="catalog",
    help="Check catalogues; build tables of clusters with and without mass; list an archive's frames and positions.",
)
app.command(catalog_app)
store_app = App(name="store", help="What an image store holds, whether it is whole, and how its images look.")
app.command(store_app)

_flat = Parameter(name="*")
Grid = Annotated[GridConfig, _flat]
Source = Annotated[BuildConfig | None, _flat]
Seed = Annotated[int, Parameter(help="Seed of every random number.")]
Columns = Annotated[
    str, Parameter(help="Names of the catalogue's columns where they differ from ours: ra_deg=RA,dec_deg=DEC,...")
]
Workers = Annotated[int, Parameter(help="Processes that share the work; 0 takes one per core.")]
Scheduler = Annotated[
    str | None,
    Parameter(help="Dask scheduler whose workers do the work, e.g. tcp://host:8786; --workers does not count."),
]


DEMO = RunConfig(name="demo", mock=MockConfig(z_min=0.1, z_max=0.4))
"""What `pix2mass demo` runs; configs/demo.toml spells it out."""

# ---- the whole chain -------------------------------------------------------------------------------------------------


@app.command(help_epilogue="Example: `pix2mass demo`")
def demo(*, out: Path = Path("runs/demo"), workers: Workers = 0) -> None:
    """Run everything on a small mock survey with known truth: no data and no network needed.

    Parameters
    ----------
    out
        Run folder. The same command goes on where it was stopped.
    """
    _run(DEMO, out, workers)


@app.command(help_epilogue="Example: `pix2mass run configs/demo.toml`")
def run(config: Path, /, *, out: Path | None = None, workers: Workers = 0) -> None:
    """Run all stages of a configuration file; stages whose inputs have not changed are skipped.

    Parameters
    ----------
    config
        TOML file, see configs/.
    out
        Run folder; runs/NAME if not given.
    """
    resolved = load_toml(RunConfig, config)
    _run(resolved, out or Path("runs") / resolved.name, workers)


def _run(config: RunConfig, out: Path, workers: int) -> None:
    from pix2mass import pipeline
    from pix2mass.distribute import open_workers

    folder = _folder(out)
    with open_workers(_cores(workers)) as pool:
        metrics = pipeline.run(config, folder, pool, _progress)
    _print_summary(folder.path, metrics)


def _print_summary(path: Path, metrics: dict[str, Any]) -> None:
    kind = "MOCK sky, scored against the true masses" if metrics["mock"] else "real clusters, scored against labels"
    lines = [
        f"{metrics['n']} clusters ({kind}); mean absolute error over folds, dex:",
        f"  this network      {metrics['mae_dex']:.3f}   best fold {metrics['mae_best_fold_dex']:.3f}",
    ]
    for name, label in (
        ("richness", "richness"),
        ("richness_true", "true richness"),
        ("redshift", "redshift only"),
        ("constant", "constant"),
        ("shuffled", "shuffled labels"),
    ):
        if f"mae_{name}_dex" in metrics:
            lines.append(f"  {label:<17} {metrics[f'mae_{name}_dex']:.3f}")
    if metrics["ratio_to_richness"] is not None:
        difference = metrics["network_minus"]["richness"]
        if metrics["n_richness"] < metrics["n"]:
            lines.append(f"  ({metrics['n_richness']} clusters have a richness; the ratio is of these)")
        lines.append(
            f"  ratio to richness {metrics['ratio_to_richness']:.2f}   difference "
            f"{difference['difference_dex']:+.3f} +- {difference['error_dex']:.3f}"
        )
    lines += [
        f"  bias {metrics['bias_dex']:+.3f}, slope {metrics['slope']:.2f}, 68% intervals hold "
        f"{100 * metrics['coverage_68']:.0f}%"
        + (f", band accuracy {metrics['band_accuracy']:.2f}" if "band_accuracy" in metrics else ""),
        "",
        f"  {path / 'report.html'}       open this in a browser",
        f"  {path / 'predictions.ecsv'}  every cluster's mass by networks that did not see it",
        f"  {path / 'metrics.json'}      all numbers",
    ]
    print("\n".join(line for line in lines))
    if metrics.get("null_test_failed"):
        raise Pix2massError(metrics["null_test_failed"])


# ---- catalogues and images -------------------------------------------------------------------------------------------


@catalog_app.command(
    help_epilogue="Example: `pix2mass catalog check clusters.fits --columns ra_deg=RA,dec_deg=DEC,id=NAME`"
)
def check(catalog: Path, /, *, columns: Columns = "", out: Path | None = None) -> None:
    """Read a catalogue, list all that is wrong with it, or write it with the project's column names.

    Parameters
    ----------
    catalog
        CSV, ECSV or FITS table.
    out
        Where to write the checked table.
    """
    import numpy as np

    from pix2mass.catalog import read_catalog, write_catalog

    table = read_catalog(catalog, _columns(columns))
    with_mass = int(np.isfinite(np.asarray(table["log10_m500c"], float)).sum())
    with_z = int(np.isfinite(np.asarray(table["z"], float)).sum())
    print(f"{catalog}: {len(table)} clusters, {with_z} with redshift, {with_mass} with mass; no problems found")
    if out is not None:
        write_catalog(table, out)
        print(f"wrote {out}")


@catalog_app.command(
    name="build", help_epilogue="Example: `pix2mass catalog build --catalogs DATA/catalogs --out clusters --report`"
)
def build_labels(
    *,
    out: Path,
    config: Annotated[CatalogConfig | None, _flat] = None,
    report: Annotated[bool, Parameter(negative="")] = False,
    seed: Seed = 1,
) -> None:
    """Make the labelled and the unlabelled table from published catalogues, matched to redMaPPer, on one mass scale.

    Parameters
    ----------
    out
        Folder for labelled.ecsv, unlabelled.ecsv, catalog.json and report.html.
    report
        Draw the report.
    """
    import json

    from pix2mass.catalog import write_catalog
    from pix2mass.catalog.labels import build as build_tables
    from pix2mass.run import write_atomic

    config = config or validate(CatalogConfig, {}, "pix2mass catalog build")
    with _progress("reading catalogues") as progress:
        result = build_tables(config, seed, progress)
    write_catalog(result.labelled, out / "labelled.ecsv")
    write_catalog(result.unlabelled, out / "unlabelled.ecsv")
    summary = {**result.summary(), "config": config.model_dump(mode="json"), "seed": seed}
    write_atomic(out / "catalog.json", json.dumps(_plain_numbers(summary), indent=1))
    _print_labels(summary)
    print(f"wrote {out / 'labelled.ecsv'}: {len(result.labelled)} clusters with a mass")
    print(f"wrote {out / 'unlabelled.ecsv'}: {len(result.unlabelled)} clusters without")
    if report:
        from pix2mass.report import write_catalog_report

        print(f"wrote {write_catalog_report(out)}")


@catalog_app.command(help_epilogue="Example: `pix2mass catalog frames DATA/sas --out frame-index.ecsv`")
def frames(base: str, /, *, out: Path = Path("frame-index.ecsv")) -> None:
    """List the SDSS frames below a folder or URL from their headers, for `build --frame-index`.

    Parameters
    ----------
    base
        What stands before /dr12 in the archive's paths.
    out
        Table to write.
    """
    from pix2mass.images.frame_index import FrameIndex

    with _progress("reading frame headers") as progress:
        index = FrameIndex.from_base(base, progress=progress)
    index.to_file(out)
    print(f"wrote {out}")


@catalog_app.command(help_epilogue="Example: `pix2mass catalog positions DATA/sas --per-field 60 --out positions.ecsv`")
def positions(
    base: str,
    /,
    *,
    per_field: int = 60,
    margin_arcsec: float = 0.0,
    z: float | None = None,
    seed: Seed = 1,
    out: Path = Path("positions.ecsv"),
) -> None:
    """Draw random positions inside the frames of an archive: images to pretrain on, or empty sky to compare with.

    Parameters
    ----------
    base
        What stands before /dr12 in the archive's paths.
    per_field
        Positions per field; the field's name becomes their group.
    margin_arcsec
        Least distance from the frame's edge.
    z
        Redshift to write for all of them.
    out
        Table to write.
    """
    from pix2mass.catalog import write_catalog
    from pix2mass.images.frame_index import FrameIndex, random_positions

    with _progress("reading frame headers") as progress:
        index = FrameIndex.from_base(base, progress=progress)
    table = random_positions(index, per_field, seed, margin_arcsec=margin_arcsec, z=z)
    write_catalog(table, out)
    print(f"wrote {out}: {len(table)} positions")


@app.command(help_epilogue="Example: `pix2mass build clusters.ecsv --frames DATA/sas --out clusters.zarr`")
def build(
    catalog: Path,
    /,
    *,
    source: Source = None,
    grid: Grid = GridConfig(),  # noqa: B008  a frozen value
    columns: Columns = "",
    out: str | None = None,
    plan: Annotated[bool, Parameter(negative="")] = False,
    workers: Workers = 1,
    scheduler: Scheduler = None,
) -> None:
    """Make the images of a catalogue's clusters, from SDSS frames, a cutout service or your own cutouts.

    Parameters
    ----------
    catalog
        CSV, ECSV or FITS table of positions and redshifts.
    out
        Store to write, a folder or a URL such as s3://bucket/name.zarr; the catalogue's name with .zarr if not given.
        The same command goes on after a kill.
    plan
        Fetch no image; say how many clusters, frames, gigabytes and hours it would be, and what the disk must hold.
    """
    from pix2mass import pipeline
    from pix2mass.catalog import read_catalog
    from pix2mass.distribute import open_workers
    from pix2mass.images.plan import describe

    table = read_catalog(catalog, _columns(columns), ("z",) if grid.width_kpc else ())
    source = source or validate(BuildConfig, {}, "pix2mass build")
    if plan:
        target = out or f"{catalog.stem}.zarr"
        print(describe(pipeline.plan_build(table, source, grid, target, _cores(workers), _progress)))
        return
    with open_workers(_cores(workers), scheduler) as pool:
        store = pipeline.build_store(table, source, grid, out or f"{catalog.stem}.zarr", pool, _progress)
    _print_store(store)
    if unreadable := int((store.flags & Flag.UNREADABLE != 0).sum()):
        print(
            f"{unreadable} of them are flagged UNREADABLE: files that should cover them could not be read. To have "
            f"them made again, mend or fetch those files, remove {store.path} and run the same command"
        )


@app.command(help_epilogue="Example: `pix2mass mock --out mock-survey --n-labelled 200 --n-unlabelled 200`")
def mock(
    *,
    out: Path,
    images: Literal["store", "cutouts", "frames"] = "store",
    catalog: Path | None = None,
    config: Annotated[MockConfig, _flat] = MockConfig(),  # noqa: B008  a frozen value
    grid: Grid = GridConfig(),  # noqa: B008
    columns: Columns = "",
    seed: Seed = 1,
    workers: Workers = 0,
) -> None:
    """Make a mock survey with known truth: catalogues with measured richness, and their images.

    Parameters
    ----------
    out
        Folder for labelled.ecsv, unlabelled.ecsv and the images.
    images
        Image stores (labelled.zarr, unlabelled.zarr); FITS cutouts (labelled/ID-BAND.fits, unlabelled/ID-BAND.fits); or
        whole frames in the layout of the SDSS archive (dr12/...), about 30 MB per cluster.
    catalog
        With --images frames: clusters to draw at their own positions, redshifts and masses (else richness), in place
        of new ones.
    """
    from pix2mass import pipeline
    from pix2mass.catalog import read_catalog
    from pix2mass.distribute import open_workers

    if catalog is not None and images != "frames":
        raise Pix2massError("--catalog says whose sky the frames show: give it together with --images frames")
    with open_workers(_cores(workers)) as pool:
        if catalog is not None:
            table = read_catalog(catalog, _columns(columns), ("z",))
            count = pipeline.draw_frames(table, config, grid, seed, out, pool, _progress)
            print(f"wrote {count} frames of {len(table)} clusters; next: pix2mass build {catalog} --frames {out}")
            return
        if images != "store":
            pipeline.write_mock_files(config, grid, seed, out, images, pool, _progress)
            source = f"--frames {out}" if images == "frames" else f"--cutouts '{out}/labelled/{{id}}-{{band}}.fits'"
            print(f"wrote {out}; next: pix2mass build {out / 'labelled.ecsv'} {source}")
            return
        survey = pipeline.make_mock(config, grid, seed, out, pool, _progress)
    _print_store(survey.labelled_store)
    _print_store(survey.unlabelled_store)


@app.command(help_epilogue="Example: `pix2mass inject DATA/sas --out injected --n-clusters 6 --log10-m500c-min 14.5`")
def inject(
    base: str,
    /,
    *,
    out: Path,
    catalog: Path | None = None,
    n_clusters: int = 10,
    config: Annotated[MockConfig, _flat] = MockConfig(),  # noqa: B008  a frozen value
    grid: Grid = GridConfig(),  # noqa: B008
    columns: Columns = "",
    seed: Seed = 1,
) -> None:
    """Paint mock clusters of known mass into SDSS frames: new frames in the same layout, the old ones stay.

    Parameters
    ----------
    base
        Folder or URL of the frames (what stands before /dr12).
    out
        Folder for the new frames and for injected.ecsv, the clusters painted.
    catalog
        Where to paint, and what: positions, redshifts and masses; random ones inside the frames if not given.
    n_clusters
        How many to paint at random positions.
    """
    from pix2mass import pipeline
    from pix2mass.catalog import read_catalog

    table = None if catalog is None else read_catalog(catalog, _columns(columns), ("z",))
    painted = pipeline.inject(base, table, n_clusters, config, grid, seed, out, _progress)
    print(f"painted {len(painted)} clusters; next: pix2mass build {out / 'injected.ecsv'} --frames {out}")


@store_app.command(name="info", help_epilogue="Example: `pix2mass store info clusters.zarr`")
def store_info(store: str, /) -> None:
    """Print what a store holds: images, redshifts, flags, where they come from, and what building it took.

    Parameters
    ----------
    store
        Folder or URL of a finished store.
    """
    import numpy as np

    from pix2mass.store import ImageStore

    images = ImageStore.open(store)
    _print_store(images)
    print(f"size       {images.n_bytes / 1e6:.1f} MB, {images.n_bytes / len(images) / 1e3:.0f} kB per cutout")
    known = images.z[np.isfinite(images.z)]
    missing = f"; {len(images) - len(known)} have none" if len(known) < len(images) else ""
    spread = f"{known.min():.3f} to {known.max():.3f}, median {np.median(known):.3f}" if len(known) else "none"
    print(f"redshift   {spread}{missing}")
    names = sorted({name for name in images.groups if name})
    if names:
        print(f"groups     {len(names)}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}")
    for flag in Flag:
        count = int((images.flags & flag != 0).sum())
        if count:
            print(f"flag       {flag.name}: {count} cutouts; {FLAG_MEANING[flag]}")
    for name, value in images.provenance.items():
        if value is not None:
            print(f"source     {name}: {value}")
    built = images.build_summary
    if built:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in built["seconds"].items())
        print(
            f"build      {seconds}; {built['bytes_read'] / 1e6:.0f} MB read, {built['retried']} retried, started "
            f"{built['starts']} times"
        )


@store_app.command(name="check", help_epilogue="Example: `pix2mass store check clusters.zarr`")
def store_check(store: str, /) -> None:
    """Read every byte of a store and compare it with the checksums taken when it was sealed.

    Parameters
    ----------
    store
        Folder or URL of a finished store.
    """
    from pix2mass.store import ImageStore

    images = ImageStore.open(store)
    with _progress("comparing checksums") as progress:
        images.check(progress)
    print(f"{images.path}: {len(images)} cutouts as they were sealed, checksum {images.checksum}")


@store_app.command(name="show", help_epilogue="Example: `pix2mass store show clusters.zarr --out sheet.png --flagged`")
def store_show(
    store: str,
    /,
    *,
    out: Path = Path("contact-sheet.png"),
    ids: str = "",
    flagged: Annotated[bool, Parameter(negative="")] = False,
    n: int = 24,
) -> None:
    """Draw a contact sheet: colour composites with redshifts and flags.

    Parameters
    ----------
    store
        Folder or URL of a finished store.
    out
        Picture to write; .png, .pdf or .svg.
    ids
        Clusters to draw, separated by commas; some spread evenly over redshift if not given.
    flagged
        Draw only cutouts with a flag.
    n
        How many to draw when no ids are given.
    """
    from pix2mass import pipeline
    from pix2mass.store import ImageStore

    images = ImageStore.open(store)
    rows = images.rows(ids.split(",")) if ids else pipeline.choose_rows(images, n, flagged)
    print(f"wrote {pipeline.draw_store(images, rows, out)}: {len(rows)} of {len(images)} cutouts")


# ---- networks --------------------------------------------------------------------------------------------------------


@app.command(help_epilogue="Example: `pix2mass pretrain positions.zarr --run runs/real --leave-one-group-out`")
def pretrain(
    store: str,
    /,
    *,
    run: Path,
    config: Annotated[PretrainConfig, _flat] = PretrainConfig(),  # noqa: B008
    test_store: str | None = None,
    leave_one_group_out: Annotated[bool, Parameter(negative="")] = False,
    seed: Seed = 1,
) -> None:
    """Train network 1 on unlabelled images: which band is this?

    Parameters
    ----------
    store
        Images; no labels are used.
    run
        Run folder that gets the encoder.
    test_store
        Images that take no part, to measure the band accuracy on.
    leave_one_group_out
        Also train without each group (field) in turn and test on the group left out.
    """
    from pix2mass import train as training
    from pix2mass.store import ImageStore

    folder, images = _folder(run), ImageStore.open(store)
    folder.write_config(seed=seed, grid=images.grid, pretrain=config)
    test = ImageStore.open(test_store) if test_store else None
    with _progress("pretraining network 1") as progress:
        training.pretrain(images, folder, config, seed, test, progress)
    folder.write_provenance(seed, stores={"unlabelled": images.checksum})
    info = folder.read_json("pretrain.json")
    if "band_confusion" in info:
        _print_confusion(f"all images, tested on the {info['tested_on']}", info, images.grid.bands)
    if leave_one_group_out:
        with _progress("leaving one group out") as progress:
            results = training.leave_one_group_out(images, folder, config, seed, progress)
        for name, result in results.items():
            _print_confusion(f"trained without {name}, tested on it", result, images.grid.bands)
        mean = sum(result["band_accuracy"] for result in results.values()) / len(results)
        print(f"band accuracy on groups left out: mean {mean:.3f} (guessing gives {1 / len(images.grid.bands):.2f})")


@app.command(help_epilogue="Example: `pix2mass train labelled.zarr labelled.ecsv --run runs/mine`")
def train(
    store: str,
    catalog: Path,
    /,
    *,
    run: Path,
    config: Annotated[TrainConfig, _flat] = TrainConfig(),  # noqa: B008
    columns: Columns = "",
    seed: Seed = 1,
) -> None:
    """Train network 2 on the clusters that have a mass, once per fold, with the encoder of the run.

    Parameters
    ----------
    store
        Images of the labelled clusters.
    catalog
        Table with log10_m500c and, better, its error; other rows are left out.
    run
        Run folder, with network 1 unless the network is 'galaxies'.
    """
    from pix2mass import pipeline
    from pix2mass.catalog import read_catalog
    from pix2mass.store import ImageStore

    table = read_catalog(catalog, _columns(columns))
    pipeline.train_run(_folder(run), ImageStore.open(store), table, config, seed, _progress)
    print(f"trained: {run}; next: pix2mass evaluate {run} {store}")


@app.command(help_epilogue="Example: `pix2mass evaluate runs/mine labelled.zarr`")
def evaluate(
    run: Path,
    store: str,
    /,
    *,
    learning_curve: Annotated[bool, Parameter(negative="")] = False,
    unlabelled: str | None = None,
    seed: Seed = 1,
) -> None:
    """Score a trained run beside constant, redshift-only, richness and shuffled-label baselines on the same folds.

    Parameters
    ----------
    run
        Run folder after training.
    store
        Images of the labelled clusters.
    learning_curve
        Also train with a half, a quarter, ... of the labels: error against number, with a fitted power law.
    unlabelled
        Images that network 1 was trained on: with learning_curve, the same for their number.
    """
    from pix2mass import pipeline
    from pix2mass.run import RunFolder
    from pix2mass.store import ImageStore

    folder = RunFolder.open(run)
    images = ImageStore.open(store)
    metrics = pipeline.evaluate_run(folder, images, seed, _progress)
    if learning_curve:
        others = ImageStore.open(unlabelled) if unlabelled else None
        found = pipeline.learning_curve(folder, images, seed, _progress, others)
        for name in ("labels", "unlabelled"):
            for point in found[name]:
                print(f"{point['n']:>7} {name}: {point['mae_dex']:.4f} +- {point['mae_err_dex']:.4f} dex")
            if name in found["fit"]:
                fit = found["fit"][name]
                print(f"        error falls as the number to the power {fit['slope']:.3f} +- {fit['slope_err']:.3f}")
    pipeline.write_report(folder)
    _print_summary(run, metrics)


@app.command(help_epilogue="Example: `pix2mass baseline labelled.ecsv --folds 10`")
def baseline(
    catalog: Path,
    /,
    *,
    config: Annotated[BaselineConfig, _flat] = BaselineConfig(),  # noqa: B008
    columns: Columns = "",
    out: Path | None = None,
    seed: Seed = 1,
) -> None:
    """Masses from richness, log10 M500c = a + b log10(lambda/40) + c log10((1+z)/1.3), beside constant and redshift.

    Parameters
    ----------
    catalog
        CSV, ECSV or FITS table with z, richness and log10_m500c; richness_err and log10_m500c_err for scatter.
    out
        JSON file for the numbers.
    """
    import json

    from pix2mass import pipeline
    from pix2mass.catalog import read_catalog

    if out is not None:
        _can_write(out)
    table = read_catalog(catalog, _columns(columns), need=("z",))
    with _progress("dealing folds") as progress:
        result = pipeline.richness_baseline(table, config, seed, progress)
    print(
        f"{result['n']} clusters, {config.folds} folds dealt {config.repeats} times; mean absolute error, dex "
        "(spread over deals):"
    )
    for name, label in (("", "richness"), ("redshift_", "redshift only"), ("constant_", "constant")):
        print(f"  {label:<14} {result[f'mae_{name}dex']:.3f} ({result[f'mae_{name}spread_dex']:.4f})")
    if "a" in result:
        print(f"  all clusters   a {result['a']:.3f}, b {result['b']:.3f}, c {result['c']:.2f}")
    if "scatter_dex" in result:
        errors = result["errors"]
        print(
            f"  errors         a {errors[0]:.3f}, b {errors[1]:.3f}, c {errors[2]:.2f}; intrinsic scatter "
            f"{result['scatter_dex']:.3f} +- {errors[3]:.3f} dex"
        )
    if "reference" in result:
        print(f"  {result['reference']}\n  median of relation minus label {result['offset_dex']:+.3f} dex")
    if result["dropped"]:
        print(f"  {result['dropped']} clusters without a richness or a mass were left out")
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


@app.command(
    help_epilogue="Example: `pix2mass predict clusters.ecsv --run runs/demo --frames DATA/sas --out masses.ecsv`"
)
def predict(
    clusters: str | None = None,
    /,
    *,
    run: Path | None = None,
    weights: str | None = None,
    source: Source = None,
    ra: float | None = None,
    dec: float | None = None,
    z: float | None = None,
    z_err: float | None = None,
    id: str | None = None,  # noqa: A002  the flag's name
    prior: Literal["training", "flat", "mass-function"] = "training",
    correct_shrinkage: Annotated[bool, Parameter(negative="")] = False,
    columns: Columns = "",
    out: Path = Path("masses.ecsv"),
    workers: Workers = 1,
    scheduler: Scheduler = None,
) -> None:
    """Masses with errors and flags, from a store of images, from a catalogue and the source of its images, or of one
    position.

    Parameters
    ----------
    clusters
        An image store (.zarr), or a catalogue together with --frames, --hips or --cutouts.
    run
        Run folder after training.
    weights
        Packaged weights in place of a run: default (u, g, r, i, z), which is taken where neither is given, or
        default-gri.
    ra
        Right ascension of one position, ICRS degrees, in place of a catalogue; its images come from the public archive
        where no source is given.
    dec
        Its declination, ICRS degrees.
    z
        Its redshift.
    z_err
        Standard error of every redshift; the catalogue's column z_err, where it has one, if not given.
    id
        Name of the one position; from its coordinates if not given.
    prior
        Prior of the masses: the distribution of the training labels, flat in log10 M500c, or the halo mass function.
    correct_shrinkage
        Undo the shrinkage of estimates towards the mean, as measured out of fold.
    out
        Table to write; .ecsv, .csv or .fits. With a catalogue, the images stay beside it in OUT.zarr.
    """
    import tempfile

    import numpy as np

    from pix2mass import pipeline
    from pix2mass.catalog import write_catalog
    from pix2mass.catalog.table import check_letters, redshift_errors
    from pix2mass.distribute import open_workers
    from pix2mass.predict import Predictor
    from pix2mass.store import ImageStore
    from pix2mass.weights import open_weights

    if out.suffix not in (".ecsv", ".csv", ".fits"):
        raise Pix2massError(f"--out {out}: choose a name ending in .ecsv, .csv or .fits")
    if z_err is not None and not 0.0 <= z_err <= 1.0:
        raise Pix2massError(f"--z-err {z_err:g}: expected the standard error of a redshift, 0 to 1")
    position = (ra, dec, z)
    if (clusters is None) == all(value is None for value in position):
        raise Pix2massError("give a store, a catalogue, or one position with --ra, --dec and --z")
    is_store = clusters is not None and ("://" in clusters or Path(clusters).is_dir())
    if clusters is not None and not is_store and not Path(clusters).exists():
        raise Pix2massError(f"{clusters}: no such catalogue or image store")
    if run is not None and weights is not None:
        raise Pix2massError(f"--run {run} and --weights {weights} exclude each other: give one of them")
    _can_write(out)
    predictor = Predictor(run or open_weights(weights or "default"))
    if is_store and source is not None:
        raise Pix2massError(f"{clusters} is an image store: --frames and --cutouts go with a catalogue")
    if clusters is not None and not is_store and source is None:
        raise Pix2massError(
            f"{clusters} is a catalogue: say where its images are with --frames, --hips or --cutouts (--frames "
            f"{PUBLIC_ARCHIVE} is the public archive; `pix2mass build {clusters} --plan` says what that costs)"
        )
    with open_workers(_cores(workers), scheduler) as pool, tempfile.TemporaryDirectory() as scratch:
        errors: Any = z_err or 0.0
        if is_store:
            store = ImageStore.open(str(clusters))
            check_letters(store.ids, "id", out)
        else:
            images = out.with_suffix(".zarr") if clusters else Path(scratch) / "position.zarr"
            table = _to_weigh(clusters, position, id, columns, predictor)
            check_letters(table["id"], "id", out)
            if z_err is None:
                errors = redshift_errors(table, str(clusters))
            source = source or validate(BuildConfig, {}, "pix2mass predict")
            store = pipeline.build_store(table, source, predictor.grid, images, pool, _progress)
        with _progress("predicting") as progress:
            masses = pipeline.predict(predictor, store, progress, pool, prior, correct_shrinkage, errors)
    write_catalog(masses, out)
    print(f"{'id':<28} {'z':>6} {'log10 M500c':>11} {'error':>6}  flags")
    for row in masses[:20]:
        print(
            f"{row['id']:<28} {row['z']:6.3f} {row['log10_m500c']:11.3f} {row['log10_m500c_err']:6.3f}  "
            f"{row['flag_names']}"
        )
    if len(masses) > 20:
        print(f"... and {len(masses) - 20} more")
    print(f"wrote {out}: {len(masses)} clusters; networks trained on: {masses.meta['trained_on']}")
    print(f"prior: {masses.meta['prior']}; not to be trusted: {int((~masses['trusted']).sum())}")
    seen = Flag(int(np.bitwise_or.reduce(np.asarray(masses["flags"], int))))
    for flag in Flag:
        if flag in seen:
            print(f"  {flag.name}: {FLAG_MEANING[flag]}")


def _to_weigh(
    catalog: str | None, position: tuple[float | None, ...], name: str | None, columns: str, predictor: Any
) -> Any:
    """The catalogue, or one row for the position."""
    from astropy.coordinates import SkyCoord
    from astropy.table import QTable

    from pix2mass.catalog import check_catalog, read_catalog

    need = ("z",) if predictor.info["use_redshift"] or predictor.grid.width_kpc else ()
    if catalog is not None:
        return read_catalog(Path(catalog), _columns(columns), need)
    ra, dec, z = position
    if ra is None or dec is None or (z is None and need):
        raise Pix2massError("one position: expected --ra, --dec and --z, e.g. --ra 336.732 --dec -0.918 --z 0.245")
    if name is None:
        text = SkyCoord(ra % 360, max(-90.0, min(90.0, dec)), unit="deg").to_string("hmsdms", sep="", precision=1)
        name = "J" + str(text).replace(" ", "")
    row = {"id": [name], "ra_deg": [ra], "dec_deg": [dec]} | ({} if z is None else {"z": [z]})
    return check_catalog(QTable(row), "the position", need)


@app.command(help_epilogue="Example: `pix2mass pack runs/mine weights/mine`")
def pack(run: Path, out: Path, /, *, fold: int = 0) -> None:
    """Reduce a trained and evaluated run to one network and what prediction needs, with a model card.

    Parameters
    ----------
    run
        Run folder after `pix2mass evaluate`.
    out
        Folder to write: a run folder for `pix2mass predict --run`.
    fold
        Whose network.
    """
    from pix2mass.run import RunFolder
    from pix2mass.weights import pack as pack_run

    print(f"wrote {pack_run(RunFolder.open(run), out, fold)}; read MODEL_CARD.md before you pass it on")


@app.command(help_epilogue="Example: `pix2mass explain runs/demo clusters.zarr --ids RMJ222655.7-005503.6`")
def explain(
    run: str,
    store: str = "",
    /,
    *,
    ids: str = "",
    config: Annotated[ExplainConfig, _flat] = ExplainConfig(),  # noqa: B008
    out: Path | None = None,
) -> None:
    """Attribution maps: which pixels of which band make the mass, and which tell the band.

    Writes FITS with the cutout's WCS, npz, and a figure, per cluster.

    Parameters
    ----------
    run
        Run folder after training, or packaged weights by name: default, default-gri.
    store
        Images; those the run itself made of its labelled clusters if not given.
    ids
        Clusters, separated by commas; the gallery of the run's report if not given.
    out
        Folder for the maps; RUN/maps if not given, which packaged weights do not have.
    """
    from pix2mass import pipeline
    from pix2mass.report import write_map_figure
    from pix2mass.store import ImageStore
    from pix2mass.weights import is_packaged, open_run

    folder = open_run(run)
    if is_packaged(folder) and not (store and ids):
        raise Pix2massError(f"{run} are packaged weights: name a store of images and, with --ids, clusters of it")
    images = ImageStore.open(store) if store else pipeline.labelled_store(folder)
    chosen = ids.split(",") if ids else pipeline.choose_clusters(folder, config.n_clusters)
    with _progress("making attribution maps") as progress:
        paths = pipeline.explain(folder, images, chosen, config.steps, config.compare, out, progress)
    for path in paths:
        write_map_figure(path, path.with_suffix(".png"))
    print(f"wrote the maps of {len(paths)} clusters to {paths[0].parent}")


@app.command(help_epilogue="Example: `pix2mass report runs/demo`")
def report(run: Path, /) -> None:
    """Write the run's report, one HTML page with all figures inside.

    Parameters
    ----------
    run
        Run folder.
    """
    from pix2mass.report import write_report
    from pix2mass.run import RunFolder

    print(f"wrote {write_report(RunFolder.open(run))}")


# ---- shared ----------------------------------------------------------------------------------------------------------


def _print_labels(summary: dict[str, Any]) -> None:
    """Matches, what was dropped and why, and the offsets between label sources before and after."""
    print(f"{'source':<14} {'rows':>6} {'matched':>7} {'by name':>7} {'by chance':>9} {'label of':>8}")
    for one in summary["matches"]:
        print(
            f"{one['source']:<14} {one['rows']:6d} {one['matched']:7d} {one['by_name']:7d} {one['by_chance']:9.1f} "
            f"{one['chosen']:8d}{'   derived, not the published table' if one['derived'] else ''}"
        )
    for one in summary["matches"]:
        print(f"{one['source']} rows without a label:")
        for why, count in sorted(one["dropped"].items(), key=lambda item: -item[1]):
            print(f"  {count:6d}  {why}")
    scale = summary["scale"]
    print("offsets between sources, median of log10 M500c (dex), as published and after:")
    for before, after in zip(scale["before"], scale["after"], strict=True):
        print(
            f"  {before['first'] + ' - ' + before['second']:<22} {before['offset_dex']:+.3f} +- "
            f"{before['error_dex']:.3f} ({before['n']} clusters)   {after['offset_dex']:+.3f}"
        )
    verb = {"apply": "subtracted", "carry": "written beside the labels", "none": "not used"}[summary["config"]["scale"]]
    fitted = ", ".join(
        f"{name} {value:+.3f} +- {scale['error_dex'][name]:.3f}"
        for name, value in scale["offset_dex"].items()
        if name != scale["reference"]
    )
    print(f"scale of {scale['reference']}; offsets {verb}: {fitted or 'none'}")
    for message in summary["messages"]:
        print(f"note: {message}")


def _plain_numbers(value: Any) -> Any:
    """The same with null for numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _plain_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain_numbers(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value


def _folder(path: Path) -> Any:
    from pix2mass.run import RunFolder

    folder = RunFolder(path)
    folder.announce = print
    return folder


def _can_write(out: Path) -> None:
    """Make the folder of a file that is to be written at the end, before the work begins.

    Raises:
        Pix2massError: the file could not be written there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Pix2massError(f"--out {out}: the folder cannot be made: {error.strerror}; choose another") from None
    if out.is_dir():
        raise Pix2massError(f"--out {out}: expected the name of a file, this is a folder; add a name")
    if not os.access(out.parent, os.W_OK):
        raise Pix2massError(f"--out {out}: files cannot be written in {out.parent}; choose another folder")


def _cores(workers: int) -> int:
    return workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or 1


def _columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    wrong = [name for name, sign, value in pairs if not (name and sign and value)]
    if wrong:
        raise Pix2massError(
            f"--columns {text!r}: expected OURS=THEIRS pairs separated by commas, e.g. ra_deg=RA,z=ZSPEC"
        )
    return {name.strip(): value.strip() for name, _, value in pairs}


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Any]:
    """A bar with rate and time left; plain lines where the output is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    if not console.is_terminal:
        yield _line_progress(label)
        return
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=None, rate="", note="")

        begun = False

        def update(done: int, total: int, note: str = "") -> None:
            nonlocal begun
            if not begun:  # what was there before says nothing about the rate
                bar.reset(task, completed=done, total=total)
                begun = True
            speed = bar.tasks[task].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "", note=note)

        yield update


def _line_progress(label: str) -> Callable[..., None]:
    """Progress for log files: a line at the start, and one every ten seconds with rate and time left."""
    print(f"{label} ...", file=sys.stderr, flush=True)
    start = shown = time.monotonic()
    done_before = -1

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal start, shown, done_before
        now = time.monotonic()
        if done_before < 0:  # what was there before says nothing about the rate
            done_before, start, shown = (done, now, now) if done > 1 else (0, start, shown)
        if now - shown >= 10 and done > done_before:
            shown = now
            rate = (done - done_before) / (now - start)
            left = (total - done) / rate
            print(
                f"  {label}: {done} of {total}, {rate:.2g}/s, {left:.0f} s left{', ' + note if note else ''}",
                file=sys.stderr,
                flush=True,
            )

    return update


def _print_store(store: Any) -> None:
    import numpy as np

    flagged = [
        f"{name} {int((store.flags & flag != 0).sum())}"
        for flag in Flag
        if (name := flag.name) and (store.flags & flag).any()
    ]
    low, high = np.min(store.pixel_scale_arcsec), np.max(store.pixel_scale_arcsec)
    print(
        f"{store.path}: {len(store)} cutouts, bands {store.grid.bands}, {store.grid.n_pixels} x {store.grid.n_pixels} "
        f"pixels of {low:.2f} to {high:.2f} arcsec; flagged: {', '.join(flagged) or 'none'}; checksum {store.checksum}"
    )


def _print_confusion(title: str, result: dict[str, Any], bands: str) -> None:
    print(f"{title}: band accuracy {result['band_accuracy']:.3f}; rows true band, columns told band")
    print("     " + "".join(f"{band:>6}" for band in bands))
    for band, counts in zip(bands, result["band_confusion"], strict=True):
        print(f"    {band}" + "".join(f"{count:6d}" for count in counts))


def main() -> None:
    """Entry point: a user's mistake is one clear message and exit status 2, never a traceback."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except Pix2massError as error:
        _stop(str(error))
    except cyclopts.CycloptsError as error:
        _stop(f"{_plain(error)}\nTry the verb's --help.")
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _stop(f"{what}; mend the cause (rights, disk space, network) and run the same command again")
    except KeyboardInterrupt:
        _stop("stopped; the same command goes on where it was")


def _stop(message: str) -> None:
    print(f"pix2mass: {message}", file=sys.stderr)
    sys.exit(2)


def _plain(error: cyclopts.CycloptsError) -> str:
    """The message of a wrong flag; of a config that does not fit, only what is wrong with it."""
    from pydantic import ValidationError

    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        return "; ".join(
            f"--{'.'.join(str(part) for part in problem['loc']).replace('_', '-')}: ".removeprefix("--: ")
            + problem["msg"].removeprefix("Value error, ")
            for problem in cause.errors()
        )
    return str(error)
