"""Claims about errors: intervals of new mock clusters hold what they say; estimates that are not to be trusted are
flagged and others are not; redshift errors and miscentring are accounted for or measured; shrinkage can be undone.

Run: python benchmarks/errors.py --run runs/demo  [--clusters 1000] [--cache runs/errors]
With PIX2MASS_DATA=/path/to/data, also empty positions in real SDSS fields.

Mock: all clusters, drawn with a seed of their own; none has trained or calibrated anything. Cutouts are on the run's
grid.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.table import QTable

from pix2mass.calibrate import Posterior
from pix2mass.config import GridConfig, MockConfig
from pix2mass.cosmology import kpc_per_arcsec
from pix2mass.evaluate import calibration_scores
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.images.mock.population import draw_clusters, offset_position
from pix2mass.images.mock.source import MockSource
from pix2mass.model import prepare
from pix2mass.predict import Predictor, predict
from pix2mass.store import ImageStore, build
from pix2mass.types import BANDS, Cutout, Flag
from pix2mass.weights import open_weights

STAR_COLOURS_MAG = {"u": 2.0, "g": 0.5, "r": 0.0, "i": -0.15, "z": -0.2}
"""Band minus r of a star of the middle of the main sequence (about K0)."""
SHIFTS_KPC = (0, 100, 300)


class Fault:
    """A source of pictures with something wrong.

    Args:
        source: makes the pictures.
        change: what is done to each.
    """

    def __init__(self, source: MockSource, change: Callable[[Cutout, np.random.Generator], Cutout]) -> None:
        self.source, self.change = source, change

    def cutout(self, cluster: Any) -> Cutout:
        """A picture, changed."""
        rng = np.random.default_rng(list(str(cluster["id"]).encode()))
        return self.change(self.source.cutout(cluster), rng)


def star(mag: float) -> Callable[[Cutout, np.random.Generator], Cutout]:
    """A star of this r magnitude somewhere in the inner half of the picture, with the camera's PSF and full well."""

    def change(cutout: Cutout, rng: np.random.Generator) -> Cutout:
        physics, n = MockConfig().physics, cutout.flux.shape[-1]
        y, x = np.mgrid[:n, :n] - rng.uniform(n / 4, 3 * n / 4, 2)[:, None, None]
        flux = cutout.flux.copy()
        for k, band in enumerate(cutout.bands):
            sigma = cutout.psf_fwhm_arcsec[k] / 2.355 / cutout.pixel_scale_arcsec
            light = 10 ** (-0.4 * (mag + STAR_COLOURS_MAG[band] - 22.5))
            for share, width in physics.psf_components:
                # No narrower than the pixels that it is averaged over.
                s = np.hypot(sigma * width, 0.3)
                flux[k] += share * light * np.exp(-0.5 * (x**2 + y**2) / s**2) / (2 * np.pi * s**2)
            full = physics.saturation_nmgy[BANDS.index(band)] * (cutout.pixel_scale_arcsec / 0.396) ** 2
            flux[k] = np.minimum(flux[k], full)
        return replace(cutout, flux=flux)

    return change


def missing(cutout: Cutout, rng: np.random.Generator) -> Cutout:
    """One band without usable pixels, and no flag that says so."""
    k = rng.integers(len(cutout.bands))
    flux, sigma, mask = cutout.flux.copy(), cutout.sigma.copy(), cutout.mask.copy()
    flux[k], sigma[k], mask[k] = 0.0, 0.0, True
    return replace(cutout, flux=flux, sigma=sigma, mask=mask)


def zeros(cutout: Cutout, rng: np.random.Generator) -> Cutout:
    """One band full of zeros that passes for an image."""
    flux = cutout.flux.copy()
    flux[rng.integers(len(cutout.bands))] = 0.0
    return replace(cutout, flux=flux)


def swapped(cutout: Cutout, rng: np.random.Generator) -> Cutout:
    """Two neighbouring bands exchanged."""
    k = rng.integers(len(cutout.bands) - 1)
    order = list(range(len(cutout.bands)))
    order[k], order[k + 1] = order[k + 1], order[k]
    return replace(cutout, flux=cutout.flux[order], sigma=cutout.sigma[order])


def other_zero_point(cutout: Cutout, _: np.random.Generator) -> Cutout:
    """Fluxes and noise in other units, brighter by 1 magnitude: nothing in the picture tells but the Poisson noise."""
    return replace(cutout, flux=cutout.flux * 2.512, sigma=cutout.sigma * 2.512)


def wrong_noise(cutout: Cutout, _: np.random.Generator) -> Cutout:
    """Noise given three times too small."""
    return replace(cutout, sigma=cutout.sigma / 3)


class Study:
    """Pictures of the same mock sky, kept on disk, and what the network makes of them."""

    def __init__(self, predictor: Predictor, work: Path, seed: int) -> None:
        low, high = predictor.info["z_range"]
        self.predictor, self.work, self.seed = predictor, work, seed
        self.config = MockConfig(
            log10_m500c_min=13.8, log10_m500c_max=15.2, z_min=max(0.05, low + 0.001), z_max=min(0.55, high - 0.001)
        )

    def clusters(self, n: int, prefix: str, **changes: Any) -> QTable:
        """New clusters, flat in log mass and redshift."""
        return draw_clusters(self.config.model_copy(update=changes), n, self.seed, prefix)

    def source(self, **changes: Any) -> MockSource:
        """The mock sky on the run's grid, or on a changed one."""
        return MockSource(self.config, self.predictor.grid.model_copy(update=changes), self.seed)

    def store(self, name: str, catalog: QTable, source: Any) -> ImageStore:
        """Pictures of a catalogue."""
        path = self.work / f"{name}-{len(catalog)}.zarr"
        return build(catalog, source, path, self.predictor.grid, {"study": name, "seed": self.seed})

    def weigh(self, name: str, catalog: QTable, source: Any, **choices: Any) -> QTable:
        """Masses of a catalogue's pictures."""
        return predict(self.predictor, self.store(name, catalog, source), **choices)


def shares(table: QTable, *flags: Flag) -> list[float]:
    """Share of estimates that are not to be trusted, and with each of the flags."""
    bits = np.asarray(table["flags"])
    return [float(np.mean(~table["trusted"])), *(float(np.mean(bits & int(flag) != 0)) for flag in flags)]


def held_out(study: Study, n: int) -> dict[str, Any]:
    """Coverage, false alarms and slopes of clusters that nothing has seen."""
    catalog = study.clusters(n, "H")
    true, z = (np.asarray(catalog[name], float) for name in ("log10_m500c_true", "z"))
    store = study.store("held-out", catalog, study.source())
    predictor = study.predictor
    table = predict(predictor, store)
    trusted = np.asarray(table["trusted"])
    posterior = _posterior(predictor, store)
    chosen = np.flatnonzero(trusted)
    kept = replace(posterior, **{name: getattr(posterior, name)[chosen] for name in ("centre", "scale", "shape")})
    plain = calibration_scores(kept, true[chosen], np.zeros(len(chosen)), z[chosen], predictor.calibration.n, "true")
    print(
        f"MOCK: {n} new clusters, log10 M500c 13.8-15.2, z {z.min():.2f}-{z.max():.2f}, {len(chosen)} of them trusted"
    )
    print(f"  {'what':<15} {'low':>6} {'high':>6} {'n':>5}  68% interval      95% interval      target")
    for row in plain["coverage"]:
        low, high = (f"{row[k]:6.2f}" if row[k] is not None else " " * 6 for k in ("low", "high"))
        says = ("met" if row["met"] else "MISSED") if row["target"] else "none"
        print(
            f"  {row['what']:<15} {low} {high} {row['n']:5d}  "
            f"{row['coverage_68']:.3f} +- {row['coverage_68_error']:.3f}"
            f"   {row['coverage_95']:.3f} +- {row['coverage_95_error']:.3f}   {says}"
        )
    print(f"  PIT {'/'.join(map(str, plain['pit']))}, CRPS {plain['crps_dex']:.3f} dex")
    flags = (Flag.NO_CLUSTER_SEEN, Flag.UNLIKE_TRAINING, Flag.BRIGHT_STAR)
    alarms = shares(table, *flags)
    print(
        "  false alarms: "
        + ", ".join(f"{name} {share:.3f}" for name, share in zip(("any", *map(str, flags)), alarms, strict=True))
    )
    corrected = predict(study.predictor, store, correct_shrinkage=True)
    out = {}
    for name, masses in (("raw", table), ("corrected", corrected)):
        mass, error = (np.asarray(masses[column])[chosen] for column in ("log10_m500c", "log10_m500c_err"))
        out[name] = {
            "slope": float(np.polyfit(true[chosen], mass, 1)[0]),
            "mae_dex": float(np.abs(mass - true[chosen]).mean()),
            "coverage_68": float((np.abs(mass - true[chosen]) <= error).mean()),
        }
        print(
            f"  {name + ' for shrinkage' if name == 'corrected' else name:<24} slope of predicted on true mass "
            f"{out[name]['slope']:.3f}, MAE {out[name]['mae_dex']:.3f}, 68% errors hold {out[name]['coverage_68']:.3f}"
        )
    return {
        "coverage": plain["coverage"],
        "coverage_68": plain["coverage"][0]["coverage_68"],
        "coverage_95": plain["coverage"][0]["coverage_95"],
        "coverage_met": all(row["met"] for row in plain["coverage"] if row["target"]),
        "crps_dex": plain["crps_dex"],
        "false_alarms": alarms[0],
        "shrinkage": out,
    }


def _posterior(predictor: Predictor, store: ImageStore) -> Posterior:
    parts = []
    for start in range(0, len(store), 64):
        rows = np.arange(start, min(start + 64, len(store)))
        flux, mask = (torch.from_numpy(values) for values in store.batch(rows))
        noise, z = torch.from_numpy(store.noise[rows]), torch.tensor(store.z[rows], dtype=torch.float32)
        images, valid = prepare(flux, mask, noise)
        parts.append(predictor.posterior(predictor.regressors[0].rescale(images, noise, z), valid, z))
    return Posterior(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("centre", "scale", "shape"))
    )


class WrongRedshift(MockSource):
    """The sky of the column z_true, in cutouts as wide as the column z asks for."""

    def width_arcsec(self, cluster: Any) -> float:
        """Width at the given redshift."""
        return float(self.grid.width_kpc or 0.0) / float(kpc_per_arcsec(float(cluster["z_given"])))

    def cutout(self, cluster: Any) -> Cutout:
        """Picture at the true redshift."""
        row = {name: cluster[name] for name in cluster.keys()}  # noqa: SIM118  a table row has keys but no "in"
        return super().cutout({**row, "z_given": row["z"], "z": row["z_true"]})


def redshift_errors(study: Study, n: int) -> dict[str, Any]:
    """Coverage where redshifts are off, with and without their errors."""
    catalog = study.clusters(n, "Z")
    true, z = (np.asarray(catalog[name], float) for name in ("log10_m500c_true", "z"))
    low, high = study.predictor.info["z_range"]
    out = {}
    print(f"\nMOCK: {n} clusters with redshifts that are off")
    for over_1_plus_z in (0.0, 0.01, 0.03):
        error = over_1_plus_z * (1 + z)
        given = catalog.copy()
        given["z_true"] = z
        given["z"] = np.clip(z + error * np.random.default_rng([study.seed, 3]).standard_normal(n), low, high)
        source = WrongRedshift(study.config, study.predictor.grid, study.seed)
        store = study.store(f"z-{over_1_plus_z}", given, source)
        without, with_error = (predict(study.predictor, store, z_err=err) for err in (0.0, error))
        held = [float(((true >= table["q16"]) & (true <= table["q84"])).mean()) for table in (without, with_error)]
        row = {
            "mae_dex": float(np.abs(without["log10_m500c"] - true).mean()),
            "coverage_68": held[0],
            "coverage_68_propagated": held[1],
            "widened": float(np.median(with_error["log10_m500c_err"] / without["log10_m500c_err"])),
        }
        out[str(over_1_plus_z)] = row
        print(
            f"  {over_1_plus_z:.2f} (1 + z): MAE {row['mae_dex']:.3f}, 68% intervals hold {row['coverage_68']:.3f}, "
            f"with the redshift's error {row['coverage_68_propagated']:.3f} (errors {row['widened']:.2f} times wider)"
        )
    return out


def faults(study: Study, n: int) -> dict[str, Any]:
    """Share of pictures with a made-up fault that are flagged, and how wrong those are that are not."""
    catalog, source = study.clusters(n, "F"), study.source()
    blank = QTable({name: catalog[name] for name in ("id", "ra_deg", "dec_deg", "z")})
    wide = study.predictor.grid.width_kpc or 0.0
    high = study.predictor.info["z_range"][1]
    far = catalog.copy()
    far["z"] = np.minimum(high + 0.05 + 0 * far["z"], 0.65)
    cases: dict[str, tuple[QTable, Any, Flag]] = {
        "nothing": (catalog, source, Flag(0)),
        "blank sky": (blank, source, Flag.NO_CLUSTER_SEEN),
        "redshift too high": (far, source, Flag.REDSHIFT_EXTRAPOLATED),
        "a band missing": (catalog, Fault(source, missing), Flag.MISSING_BAND),
        "a band of zeros": (catalog, Fault(source, zeros), Flag.UNLIKE_TRAINING),
        "bands exchanged": (catalog, Fault(source, swapped), Flag.UNLIKE_TRAINING),
        "noise 3 times too low": (catalog, Fault(source, wrong_noise), Flag.UNLIKE_TRAINING),
        "zero point off by 1": (catalog, Fault(source, other_zero_point), Flag.UNLIKE_TRAINING),
    }
    for mag in (8, 9, 10, 11, 12, 13):
        cases[f"star of r = {mag}"] = (catalog, Fault(source, star(mag)), Flag.BRIGHT_STAR)
    if wide:
        for factor in (0.5, 0.7, 1.4, 2.0):
            other = study.source(width_kpc=wide * factor)
            cases[f"pixels {factor} times"] = (catalog, other, Flag.OTHER_PIXEL_SCALE)
            # The same pictures with a wrong pixel scale in their header.
            hidden = Fault(
                other, lambda cutout, _, f=factor: replace(cutout, pixel_scale_arcsec=cutout.pixel_scale_arcsec / f)
            )
            cases[f"... and hidden {factor}"] = (catalog, hidden, Flag.UNLIKE_TRAINING)
    true = np.asarray(catalog["log10_m500c_true"], float)
    print(f"\nMOCK: {n} clusters with made-up faults: share not to be trusted, error (dex) of all and of those trusted")
    out = {}
    for name, (rows, pictures, flag) in cases.items():
        table = study.weigh(f"fault-{len(out)}", rows, pictures)
        caught, named = shares(table, flag)
        residual, trusted = np.abs(np.asarray(table["log10_m500c"]) - true), np.asarray(table["trusted"])
        kept = f"{residual[trusted].mean():.3f}" if trusted.any() else "  -  "
        all_ = f"{np.nanmean(residual):.3f}" if name != "blank sky" else "  -  "
        kept = kept if name != "blank sky" else "  -  "
        print(f"  {name:<24} flagged {caught:.3f}   {flag.name or '':<22} {named:.3f}   MAE {all_}  {kept}")
        out[name] = {"flagged": caught, "named": named, "flag": flag.name}
    return out


def miscentring(study: Study, n: int) -> dict[str, Any]:
    """Bias and scatter where the position given is off the cluster's centre."""
    catalog = study.clusters(n, "S", miscentred_share=0.0)
    true, z = (np.asarray(catalog[name], float) for name in ("log10_m500c_true", "z"))
    angle = np.random.default_rng([study.seed, 9]).uniform(0, 2 * np.pi, n)
    print(f"\nMOCK: the same {n} clusters with positions off their centres")
    out, first = {}, np.zeros(n)
    for shift_kpc in SHIFTS_KPC:
        moved, arcsec = catalog.copy(), shift_kpc / kpc_per_arcsec(z)
        ra, dec = np.empty(n), np.empty(n)
        for row in range(n):
            west, north = np.array([arcsec[row] * np.cos(angle[row])]), np.array([arcsec[row] * np.sin(angle[row])])
            there = offset_position(float(catalog["ra_deg"][row]), float(catalog["dec_deg"][row]), west, north)
            ra[row], dec[row] = (float(value[0]) for value in there)
        moved["ra_deg_true"], moved["dec_deg_true"] = ra, dec
        table = study.weigh(f"shift-{shift_kpc}", moved, study.source())
        mass, error = np.asarray(table["log10_m500c"]), np.asarray(table["log10_m500c_err"])
        first = mass if shift_kpc == 0 else first
        residual = mass - true
        out[str(shift_kpc)] = {
            "bias_dex": float(residual.mean()),
            "scatter_dex": float(residual.std(ddof=1)),
            "change_dex": float((mass - first).mean()),
            "change_error_dex": float((mass - first).std(ddof=1) / np.sqrt(n)),
            "coverage_68": float((np.abs(residual) <= error).mean()),
            "flagged": shares(table)[0],
        }
        row = out[str(shift_kpc)]
        print(
            f"  {shift_kpc:3d} kpc  bias {row['bias_dex']:+.3f}, scatter {row['scatter_dex']:.3f}, change "
            f"{row['change_dex']:+.3f} +- {row['change_error_dex']:.3f} dex, 68% errors hold {row['coverage_68']:.3f}, "
            f"flagged {row['flagged']:.3f}"
        )
    return out


def real_fields(study: Study, per_field: int) -> dict[str, Any]:
    """Share of empty positions in real SDSS fields that are flagged."""
    base = Path(os.environ["PIX2MASS_DATA"]) / "sas"
    index = FrameIndex.from_base(base)
    out = {}
    for z in (0.15, 0.25, 0.4):
        positions = random_positions(index, per_field, study.seed, margin_arcsec=60.0, z=z)
        with FrameSource(base, study.predictor.grid, index) as source:
            table = study.weigh(f"real-{z}", positions, source)
        flags = (Flag.NO_CLUSTER_SEEN, Flag.UNLIKE_TRAINING, Flag.BRIGHT_STAR, Flag.LOW_COVERAGE)
        found = shares(table, *flags)
        print(
            f"  REAL fields, {len(table)} positions at z = {z}: median {np.nanmedian(table['log10_m500c']):.2f}; "
            + ", ".join(f"{name} {share:.3f}" for name, share in zip(("flagged", *map(str, flags)), found, strict=True))
        )
        out[str(z)] = dict(zip(("flagged", *map(str, flags)), found, strict=True))
    return out


def main() -> None:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--weights", default="default")
    parser.add_argument("--clusters", type=int, default=1000, help="new clusters for the coverage")
    parser.add_argument("--faulty", type=int, default=200, help="clusters per fault and per shift")
    parser.add_argument("--per-field", type=int, default=20, help="empty positions per real field")
    parser.add_argument("--cache", type=Path, help="folder that keeps the pictures")
    parser.add_argument("--seed", type=int, default=77)
    options = parser.parse_args()
    predictor = Predictor(options.run or open_weights(options.weights))
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(predictor, options.cache or Path(scratch), options.seed)
        result = held_out(study, options.clusters)
        result["faults"] = faults(study, options.faulty)
        result["redshift_error"] = redshift_errors(study, options.faulty)
        result["miscentring_kpc"] = miscentring(study, options.faulty)
        if "PIX2MASS_DATA" in os.environ:
            print()
            result["real_empty"] = real_fields(study, options.per_field)
    grid: GridConfig = predictor.grid
    print(json.dumps({"run": predictor.folder.path.name, "grid": grid.model_dump(exclude_none=True), **result}))


if __name__ == "__main__":
    main()
