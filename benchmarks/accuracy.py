"""Claim: masses from pixels against masses from richness, every recipe on the same clusters and folds.

The standard task, all mock: 1,000 clusters with a label (0.12 dex of scatter), 5,000 without, 10,000 for the test, flat
in log10 M500c 13.8-15.2 and z 0.08-0.55, configuration `sky`, seed 1. Each recipe is a file in configs/recipes. Recipes
are chosen by cross-validation on the labelled clusters ("folds"); the test clusters are looked at once per recipe. The
rival is the richness that pix2mass.richness measures on the same mock sky, with a relation fitted to the same labels.
`sim-pretrained` starts from networks fitted to clusters of the other configuration, `sim`, with their true masses.

Run: python benchmarks/accuracy.py [--recipe NAME ...] [--quick] [--learning-curve]

Surveys and finished recipes are kept in --cache: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import QTable

from pix2mass.catalog import read_catalog, write_catalog
from pix2mass.config import GridConfig, MockConfig, RunConfig, TrainConfig, load_toml
from pix2mass.distribute import open_workers
from pix2mass.evaluate import baselines, baselines_from, paired_difference, scores
from pix2mass.images.mock.population import draw_clusters
from pix2mass.images.mock.source import MockSource
from pix2mass.pipeline import learning_curve, measure_richness, train_run
from pix2mass.predict import predict
from pix2mass.run import RunFolder, digest
from pix2mass.store import ImageStore, build
from pix2mass.train import RichnessBlend, pretrain
from pix2mass.types import BANDS

RECIPES = Path(__file__).parents[1] / "configs" / "recipes"
ORDER = (
    "lin2022",
    "lin2022-network",
    "lin2022-tuned",
    "contrastive",
    "scratch",
    "best",
    "best-gri",
    "best-r",
    "sim-pretrained",
)
HEADLINE_Z = (0.1, 0.4)
FULL = {"labelled": 1000, "unlabelled": 5000, "test": 10_000, "sim": 6000}
QUICK = {"labelled": 200, "unlabelled": 200, "test": 300, "sim": 300}
"""Clusters of each kind: of the standard task, and of --quick."""
QUICK_FOLDS = 3
"""At most, with --quick: training so few clusters takes about as long for each fold as training many."""
PREFIX = {"labelled": "L", "unlabelled": "U", "test": "test-"}
"""Of the ids, which decide the sky around each cluster."""
METHODS = ("constant", "redshift", "richness", "richness_true")


@contextlib.contextmanager
def reporter(title: str) -> Iterator[Any]:
    """Say what begins and how long it took."""
    start = time.monotonic()
    yield lambda *_: None
    if time.monotonic() - start > 1:
        print(f"  {title}: {time.monotonic() - start:.0f} s", flush=True)


class Surveys:
    """Mock surveys, made when they are asked for and kept.

    Args:
        cache: folder.
        sizes: clusters of each kind.
        workers: processes that draw the images.
        most_folds: recipes with more are cut to as many; None leaves them as they are.
    """

    def __init__(self, cache: Path, sizes: dict[str, int], workers: int = 1, most_folds: int | None = None) -> None:
        self.cache, self.sizes, self.workers, self.most_folds = cache, sizes, workers, most_folds

    def __call__(self, mock: MockConfig, grid: GridConfig, kind: str, n: int, seed: int) -> tuple[QTable, ImageStore]:
        """Catalogue, with richness where it is a rival, and images of n clusters of a kind."""
        name = f"{mock.configuration}-{kind}-{n}-{digest(mock.model_dump(mode='json'), seed)[:8]}"
        bands, grid = grid.bands, grid.model_copy(update={"bands": BANDS})
        catalog, source = draw_clusters(mock, n, seed, PREFIX[kind]), MockSource(mock, grid, seed)
        table = self.cache / f"{name}.ecsv"
        needed = kind == "test" or (kind == "labelled" and mock.configuration == "sky")
        if needed and not table.exists():
            with reporter(f"measuring richness of {n} {kind} clusters") as progress:
                measure_richness(catalog, source, seed, progress)
            self.cache.mkdir(parents=True, exist_ok=True)
            write_catalog(catalog, table)
        width = f"{grid.width_kpc:.0f}kpc" if grid.width_kpc else f"{grid.width_arcsec:.0f}arcsec"
        path = self.cache / f"{name}-{BANDS}-{width}-{grid.n_pixels}.zarr"
        provenance = {"source": "mock", "seed": seed, "config": mock.model_dump(mode="json")}
        with reporter(f"drawing {n} {kind} clusters, {grid.n_pixels} pixels"), open_workers(self.workers) as workers:
            store = build(catalog, source, path, grid, provenance, workers).with_bands(bands)
        return (read_catalog(table) if table.exists() else catalog), store


def sky(config: RunConfig) -> MockConfig:
    """The mock survey of a recipe, without what does not change its images, so that recipes share them."""
    assert config.mock is not None
    same = ("n_labelled", "n_unlabelled", "label_scatter_dex")
    return config.mock.model_copy(update={name: MockConfig.model_fields[name].default for name in same})


def read_recipe(name: str, surveys: Surveys) -> RunConfig:
    """A recipe's file, with as many folds as the surveys allow."""
    config = load_toml(RunConfig, RECIPES / f"{name}.toml")
    folds = min(config.train.folds, surveys.most_folds or config.train.folds)
    return config.model_copy(update={"train": config.train.model_copy(update={"folds": folds})})


def run_recipe(name: str, surveys: Surveys) -> tuple[RunFolder, RunConfig, float]:
    """Train a recipe unless that was done: its run folder, its configuration and the seconds that training took."""
    config = read_recipe(name, surveys)
    train, seconds = _started(config.train, surveys)
    n = surveys.sizes["sim" if sky(config).configuration == "sim" else "labelled"]
    folder = RunFolder(surveys.cache / f"run-{name}-{n}")
    # A finished recipe needs its images no more: they may be removed, 20 GB of them.
    alone = train.network == "galaxies"
    settings = config.model_dump(mode="json", exclude={"pretrain"} if alone else None)
    key = digest(settings, 0 if alone else surveys.sizes["unlabelled"])
    if not folder.is_done("recipe", key, folder / "model.json"):
        with folder.stage("recipe", key):
            _train_recipe(name, config, train, folder, n, surveys)
    return (
        folder,
        config,
        seconds + sum(folder.stages[k]["seconds"] for k in ("pretrain", "train") if k in folder.stages),
    )


def _started(train: TrainConfig, surveys: Surveys) -> tuple[TrainConfig, float]:
    """The same training, with the run of the recipe that it starts from, if any, and the seconds which that took."""
    if train.start_from is None:
        return train, 0.0
    source, _, seconds = run_recipe(train.start_from.name, surveys)
    return train.model_copy(update={"start_from": source.path}), seconds


def _train_recipe(
    name: str, config: RunConfig, train: TrainConfig, folder: RunFolder, n: int, surveys: Surveys
) -> None:
    catalog, store = surveys(sky(config), config.grid, "labelled", n, config.seed)
    assert config.mock is not None
    if config.mock.label_scatter_dex == 0:
        catalog["log10_m500c"], catalog["log10_m500c_err"] = catalog["log10_m500c_true"], 0.0
    if train.network != "galaxies" and not train.from_scratch:
        _, unlabelled = surveys(sky(config), config.grid, "unlabelled", surveys.sizes["unlabelled"], config.seed)
        with reporter(f"{name}: pretraining") as progress:
            pretrain(unlabelled, folder, config.pretrain, config.seed, None, progress)
        folder.write_config(pretrain=config.pretrain)
    train_run(folder, store, catalog, train, config.seed, reporter)


def tested(name: str, surveys: Surveys) -> dict[str, Any]:
    """Estimates of a recipe for the labelled clusters (by networks that did not see them) and for the test clusters."""
    folder, config, seconds = run_recipe(name, surveys)
    labelled = read_catalog(folder / "catalog.ecsv")
    fold = np.asarray(QTable.read(folder / "folds.ecsv", format="ascii.ecsv")["fold"])
    out_of_fold = QTable.read(folder / "train-out-of-fold.ecsv", format="ascii.ecsv")
    test, store = surveys(sky(config), config.grid, "test", surveys.sizes["test"], config.seed)
    key, path = digest("test", folder.stages["train"]["key"], store.checksum), folder / "test.ecsv"
    if not folder.is_done("test", key, path):
        with folder.stage("test", key), reporter(f"{name}: predicting the test clusters"):
            write_catalog(predict(folder, store), path)
    return {
        "labelled": labelled,
        "fold": fold,
        "test": test,
        "out_of_fold": out_of_fold,
        "predicted": read_catalog(path),
        "seconds": seconds,
    }


def add_richness(found: dict[str, Any]) -> dict[str, Any]:
    """The same estimates joined with the measured richness, by the relation that the labels give."""
    labelled, test, fold = found["labelled"], found["test"], found["fold"]
    joined = {name: found[name].copy() for name in ("out_of_fold", "predicted")}
    mass = np.asarray(found["out_of_fold"]["log10_m500c"], float)

    def blend(rows: np.ndarray) -> RichnessBlend:
        return RichnessBlend.fit(mass[rows], *(labelled[name][rows] for name in ("richness", "z", "log10_m500c")))

    for k in np.unique(fold):
        inside = fold == k
        joined["out_of_fold"]["log10_m500c"][inside] = blend(~inside).predict(
            mass[inside], labelled["richness"][inside], labelled["z"][inside]
        )
    every = np.ones(len(fold), bool)
    joined["predicted"]["log10_m500c"] = blend(every).predict(
        found["predicted"]["log10_m500c"], test["richness"], test["z"]
    )
    for name, table in joined.items():
        moved = np.asarray(table["log10_m500c"]) - np.asarray(found[name]["log10_m500c"])
        for quantile in ("q025", "q16", "q84", "q975"):
            table[quantile] = np.asarray(table[quantile]) + moved
    return {**found, **joined}


def coverage(table: QTable, true: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Share of true masses within the central 68% and 95% intervals."""
    low, high, lowest, highest = (np.asarray(table[name], float)[inside] for name in ("q16", "q84", "q025", "q975"))
    true = true[inside]
    return float(((true >= low) & (true <= high)).mean()), float(((true >= lowest) & (true <= highest)).mean())


def score(name: str, found: dict[str, Any], part: str) -> dict[str, Any]:
    """Scores of a recipe and of the simple methods on one part: "folds" or "test"."""
    labelled, fold = found["labelled"], found["fold"]
    if part == "folds":
        used, group, table = labelled, fold, found["out_of_fold"]
        rivals = baselines(used, group)
    else:
        used, table = found["test"], found["predicted"]
        group = np.arange(len(used)) % len(np.unique(fold))
        rivals = baselines_from(labelled, used)
    z, true, label = (np.asarray(used[column], float) for column in ("z", "log10_m500c_true", "log10_m500c"))
    mass = np.asarray(table["log10_m500c"], float)
    out: dict[str, Any] = {"part": part, "seconds": found["seconds"]}
    for sample, inside in (("headline", (z >= HEADLINE_Z[0]) & (z <= HEADLINE_Z[1])), ("all", np.ones(len(z), bool))):
        rows = {name: scores(mass[inside], true[inside], group[inside])}
        rows |= {m: scores(rivals[m][inside], true[inside], group[inside]) for m in METHODS}
        error, rival = np.abs(mass - true)[inside], np.abs(rivals["richness"] - true)[inside]
        out[sample] = {
            "n": int(inside.sum()),
            "rows": rows,
            "ratio": rows[name]["mae_dex"] / rows["richness"]["mae_dex"],
            "difference": paired_difference(error, rival, 1),
            "coverage": coverage(table, true, inside),
            "against_label": {
                method: float(np.abs(values - label)[inside].mean())
                for method, values in {name: mass, **{m: rivals[m] for m in METHODS}}.items()
            },
        }
    return out


def show(found: dict[str, dict[str, Any]], sample: str) -> None:
    """Print the table of one part and sample."""
    part, n = next(iter(found.values()))["part"], next(iter(found.values()))[sample]["n"]
    where = f"z {HEADLINE_Z[0]}-{HEADLINE_Z[1]}" if sample == "headline" else "all z"
    print(f"\n{part}, {where}, N {n}, dex, against the true mass (last column: against the noisy label)")
    print(
        f"{'method':<23} {'MAE':>6} {'best':>6} {'spread':>6} {'bias':>7} {'rms':>6} {'NMAD':>6} {'slope':>6} "
        f"{'> 0.5':>6} {'ratio':>6} {'difference to richness':>24} {'68%':>5} {'95%':>5} {'s':>6} {'label':>6}"
    )
    first = next(iter(found.values()))[sample]
    for method in (*METHODS, *found):
        own = found[method][sample] if method in found else None
        row = (own or first)["rows"][method]
        print(
            f"{method:<23} {row['mae_dex']:6.4f} {row['mae_best_fold_dex']:6.4f} {row['mae_fold_spread_dex']:6.4f} "
            f"{row['bias_dex']:+7.4f} {row['rms_dex']:6.4f} {row['nmad_dex']:6.4f} {row['slope']:6.3f} "
            f"{row['outlier_share']:6.4f} {row['mae_dex'] / first['rows']['richness']['mae_dex']:6.3f} ",
            end="",
        )
        if own:
            d = own["difference"]
            low, high = d["interval_95_dex"]
            print(
                f"{d['difference_dex']:+.4f} [{low:+.4f}, {high:+.4f}] {own['coverage'][0]:5.3f} "
                f"{own['coverage'][1]:5.3f} {found[method]['seconds']:6.0f} ",
                end="",
            )
        else:
            print(" " * 44, end="")
        print(f"{(own or first)['against_label'][method]:6.4f}")


def null_test(name: str, surveys: Surveys) -> float:
    """MAE against the truth of a recipe whose network 2 was trained on shuffled labels, over its folds."""
    source, config, _ = run_recipe(name, surveys)
    shuffled, store = surveys(sky(config), config.grid, "labelled", surveys.sizes["labelled"], config.seed)
    order = np.random.default_rng([config.seed, 1234]).permutation(len(shuffled))
    shuffled["log10_m500c"] = np.asarray(shuffled["log10_m500c"])[order]
    folder = RunFolder(surveys.cache / f"run-{name}-shuffled-{len(shuffled)}")
    if "pretrain" in source.stages:
        for file in ("encoder.safetensors", "pretrain.json"):
            shutil.copy(source / file, folder / file)
        folder.write_json("stages.json", {**folder.stages, "pretrain": source.stages["pretrain"]})
    train_run(folder, store, shuffled, config.train, config.seed, reporter)
    table = QTable.read(folder / "train-out-of-fold.ecsv", format="ascii.ecsv")
    true = np.asarray(read_catalog(folder / "catalog.ecsv")["log10_m500c_true"])
    return float(np.abs(np.asarray(table["log10_m500c"]) - true).mean())


def main() -> None:
    """Run the recipes, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=ORDER, help="only this one; may be given several times")
    parser.add_argument("--quick", action="store_true", help="fewer clusters, the same code: about 12 minutes, 2 cores")
    parser.add_argument(
        "--learning-curve",
        action="store_true",
        help="a recipe (best) with 125 labels to four times --labelled, and with fewer unlabelled images",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that draw the images")
    parser.add_argument("--cache", type=Path, default=Path("runs/accuracy"))
    for kind, n in FULL.items():
        parser.add_argument(f"--{kind}", type=int, help=f"clusters of this kind, in place of {n:,}")
    args = parser.parse_args()
    sizes = {kind: getattr(args, kind) or n for kind, n in (QUICK if args.quick else FULL).items()}
    surveys = Surveys(args.cache, sizes, args.workers, QUICK_FOLDS if args.quick else None)
    print(", ".join(f"{kind} {n}" for kind, n in sizes.items()))
    if args.learning_curve:
        if args.recipe and len(args.recipe) > 1:
            parser.error(f"--learning-curve takes one --recipe, found {', '.join(args.recipe)}")
        curve((args.recipe or ["best"])[0], surveys)
        return

    folds, test, result = {}, {}, {}
    for name in args.recipe or ORDER:
        found = tested(name, surveys)
        both = {
            name: found,
            **({f"{name}+richness": add_richness(found)} if name in ("best", "sim-pretrained") else {}),
        }
        for recipe, estimates in both.items():
            folds[recipe], test[recipe] = score(recipe, estimates, "folds"), score(recipe, estimates, "test")
            head = test[recipe]["headline"]
            result[recipe] = {
                "mae_dex": round(head["rows"][recipe]["mae_dex"], 4),
                "ratio_to_richness": round(head["ratio"], 3),
                "coverage_68": round(head["coverage"][0], 3),
                "slope": round(head["rows"][recipe]["slope"], 3),
                "seconds": round(estimates["seconds"]),
            }
    for part in (folds, test):
        for sample in ("headline", "all"):
            show(part, sample)
    for name in sorted({"best", "lin2022"} & result.keys()):
        error = null_test(name, surveys)
        result[f"{name}-shuffled"] = {"mae_dex": round(error, 4)}
        print(f"\n{name}, trained on shuffled labels: {error:.4f} dex (folds, all z)")
    print(json.dumps(result))


def curve(name: str, surveys: Surveys) -> None:
    """Error of a recipe against the number of labels, beside richness with as many, and of unlabelled images."""
    config = read_recipe(name, surveys)
    n = 4 * surveys.sizes["labelled"]
    folder = RunFolder(surveys.cache / f"run-{name}-{n}")
    _train_recipe(name, config, _started(config.train, surveys)[0], folder, n, surveys)
    _, store = surveys(sky(config), config.grid, "labelled", n, config.seed)
    test = surveys(sky(config), config.grid, "test", surveys.sizes["test"], config.seed)
    unlabelled = None
    if (folder / "pretrain.json").exists():
        _, unlabelled = surveys(sky(config), config.grid, "unlabelled", surveys.sizes["unlabelled"], config.seed)
    found = learning_curve(folder, store, config.seed, reporter, unlabelled, test)
    for kind in ("labels", "unlabelled"):
        for row in found[kind]:
            print(
                f"{row['n']:>6} {kind}: {row['mae_dex']:.4f} +- {row['mae_err_dex']:.4f} dex; richness with as many "
                f"labels {row['richness_mae_dex']:.4f}"
            )
    print(json.dumps({"learning_curve": found}))


if __name__ == "__main__":
    main()
