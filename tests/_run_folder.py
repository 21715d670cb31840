"""A finished run made in a second, without networks, for tests of what is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.table import QTable

from pix2mass.calibrate import Posterior
from pix2mass.evaluate import evaluate
from pix2mass.report import OutOfFold
from pix2mass.run import RunFolder
from pix2mass.types import Flag

N, N_FOLDS, BANDS = 120, 4, "ugriz"


def make_run(path: Path, mock: bool = True, ids: tuple[str, ...] | None = None) -> RunFolder:
    """A plausible finished run; it has maps of the given clusters, of its worst, a typical and its best one if None."""
    rng = np.random.default_rng(7)
    folder = RunFolder(path)
    true = rng.uniform(13.5, 15.2, N)
    z = rng.uniform(0.1, 0.4, N)
    fold = np.arange(N) % N_FOLDS
    catalog = QTable(
        {
            "id": [f"c{i}" for i in range(N)],
            "ra_deg": rng.uniform(0, 360, N),
            "dec_deg": rng.uniform(-10, 60, N),
            "z": z,
            "log10_m500c": true + 0.12 * rng.standard_normal(N),
            "log10_m500c_err": np.full(N, 0.12),
            "richness": 40 * 10 ** (true - 14.3 + 0.12 * rng.standard_normal(N)),
            "richness_err": np.full(N, 4.0),
        }
    )
    catalog["richness"][[3, 50]] = np.nan
    if mock:
        catalog["log10_m500c_true"] = true
        catalog["richness_true"] = 40 * 10 ** (true - 14.3 + 0.08 * rng.standard_normal(N))
    estimate = 14.35 + 0.75 * (true - 14.35) + 0.18 * rng.standard_normal(N)
    shape = np.eye(12)[5]  # one Gaussian of width 0.6 of the scale
    posterior = Posterior(estimate, np.full(N, 0.22 / 0.6), np.tile(shape, (N, 1)))
    meta = {"shape_of_fold": [shape.tolist()] * N_FOLDS}
    out_of_fold = QTable({"id": catalog["id"], "fold": fold, **posterior.columns()}, meta=meta)
    shuffled = QTable({"id": catalog["id"], "log10_m500c": 14.35 + 0.05 * rng.standard_normal(N)})
    confusion = (100 * (0.6 * np.eye(5) + 0.08)).astype(int)
    facts = {"band_accuracy": 0.68, "band_confusion": confusion.tolist(), "bands": BANDS, "seconds": {"mock": 12.5}}
    facts |= {"pretraining_saw_test_images": False, "pixel_scale_arcsec_range": [5.81, 16.94]}
    metrics, predictions = evaluate(catalog, out_of_fold, shuffled, 1, facts)
    folder.write_json("metrics.json", metrics)
    predictions.write(folder / "predictions.ecsv", format="ascii.ecsv")
    folder.write_json(
        "pretrain.json",
        {
            "encoder": "small",
            "bands": BANDS,
            "band_accuracy": 0.68,
            "band_confusion": confusion.tolist(),
            "tested_on": "images that took no part",
            "n_images": 400,
            "store_checksum": "0123abcd",
        },
    )
    folder.write_json(
        "model.json",
        {
            "encoder": "small",
            "use_redshift": True,
            "z_range": [0.1, 0.4],
            "label_range": [13.3, 15.4],
            "prior": "the distribution of the training labels",
        },
    )
    folder.write_provenance(seed=1, checksums={"labelled store": "4567ef"})
    (folder / "config.toml").write_text(f'name = "example"\n[{"mock" if mock else "data"}]\n')
    curve = [
        {"n": n, "mae_dex": 0.3 * (n / 30) ** -0.25, "mae_err_dex": 0.01, "richness_mae_dex": 0.2}
        for n in (30, 60, 120)
    ]
    fit = {"labels": {"slope": -0.25, "slope_err": 0.03, "intercept": -0.1536}}
    folder.write_json("learning_curve.json", {"labels": curve, "unlabelled": [], "fit": fit})
    with folder.stage("train", "key"):
        pass
    (folder / "maps").mkdir()
    if ids is None:
        ids = tuple(name for names in OutOfFold.read(folder).gallery(3).values() for name in names)
    for index, cluster_id in enumerate(ids):
        flags = Flag.PARTLY_OUTSIDE if index == 0 else Flag(0)
        write_map(folder / "maps" / f"{index}.npz", cluster_id, 14.0 + 0.7 * index, rng, flags=flags)
    return folder


def write_map(
    path: Path,
    cluster_id: str,
    log10_m500c: float,
    rng: np.random.Generator,
    bands: str = BANDS,
    z: float = 0.25,
    flags: Flag = Flag.PARTLY_OUTSIDE,
    default_method: str = "joint",
) -> None:
    """A cluster of a few dozen round galaxies, its upper right corner without pixels."""
    n = 64
    y, x = np.mgrid[:n, :n]
    light = np.zeros((n, n))
    for _ in range(40):
        cx, cy, flux = *rng.normal(n / 2, 10, 2), rng.pareto(1.2) + 0.3
        light += flux * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 4)
    light += 20 * np.exp(-((x - n / 2) ** 2 + (y - n / 2) ** 2) / 8)
    scale = dict(zip("ugriz", (0.1, 0.4, 1.0, 1.5, 1.9), strict=True))
    flux = np.stack([scale[band] * light + 0.2 * rng.standard_normal((n, n)) for band in bands]).astype(np.float32)
    mask = np.zeros_like(flux, bool)
    mask[:, x + y > 1.8 * n] = True
    joint = 1e-3 * (light / light.max()) * np.sign(light - 1)
    np.savez_compressed(
        path,
        id=cluster_id,
        bands=bands,
        flux=flux,
        mask=mask,
        pixel_scale_arcsec=8.0,
        z=z,
        ra_deg=150.0,
        dec_deg=2.0,
        log10_m500c=log10_m500c,
        log10_m500c_err=0.2,
        integrated_gradients=np.stack([joint / len(bands)] * len(bands)) + 2e-5 * rng.standard_normal(flux.shape),
        cam=light / light.max() - 0.2,
        joint=joint,
        default_method=default_method,
        flags=int(flags),
    )
