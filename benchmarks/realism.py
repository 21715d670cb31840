"""Claim: the mock sky is as hard as the real one. Mock pixels, galaxy catalogues, red sequence and richness beside SDSS
frames and the photometry of the redMaPPer code's test data (E. Rykoff), each with its target; one table.

The mock side goes through the mock camera and the mock photometric catalogue, with the cuts of the real side. Real
frames: six fields. Real galaxies: one field of 3.36 deg2, i < 21; 1,022 red-sequence galaxies with P > 0.8 at z
0.10-0.20; centrals of clusters at z 0.10-0.35. Small networks judge the pictures (``realism_judge``), each tried on a
real field it was not trained on; the stamps they find easiest are drawn.

Run: PIX2MASS_DATA=/path/to/data python benchmarks/realism.py [--configuration sim] [--quick] [--without-networks].
About four minutes on one core without the networks; with them an hour or more.
"""

from __future__ import annotations

import argparse
import bz2
import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import realism_judge
from astropy.io import fits
from astropy.table import Table
from scipy.ndimage import maximum_filter
from scipy.stats import ks_2samp

from pix2mass.catalog import sky_folds
from pix2mass.config import GridConfig, MockConfig
from pix2mass.cosmology import kpc_per_arcsec, m_star_i_mag
from pix2mass.images.mock import population
from pix2mass.images.mock.source import MockSource
from pix2mass.images.mock.templates import templates
from pix2mass.pipeline import measure_richness
from pix2mass.richness import LUMINOUS_MAG, RedSequence, cross_validate, separation_arcsec
from pix2mass.types import BANDS, SDSS_PIXEL_SCALE_ARCSEC

FIELD_AREA_DEG2 = 3.357
"""One pixel of a HEALPix map with nside 32."""

FIELD_EBV_MAG, RED_EBV_MAG = 0.09, 0.026
"""Mean E(B-V) of the field, and median of the redMaPPer training galaxies: mock photometry gets the same."""

COLOURS = ("u-g", "g-r", "r-i", "i-z")
COUNT_EDGES = np.arange(17.0, 21.01, 0.5)
SEED = 1
TRANSFER_STAMPS, TRANSFER_EPOCHS = 2000, (5, 4)
"""Mock stamps to pretrain on, and passes over these and over the real ones."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    real: str
    mock: str
    target: str
    met: bool | None


def progress(what: str, done: int, total: int, started: list[float] = []) -> None:  # noqa: B006  one clock per process
    """Show how far a loop is, on standard error."""
    if done <= 1:
        started[:] = [time.monotonic()]
    left = (time.monotonic() - started[0]) / max(done, 1) * (total - done)
    print(
        f"\r{what}: {done}/{total}, {left:.0f} s left   ",
        end="\n" if done == total else "",
        file=sys.stderr,
        flush=True,
    )


# --- pixels -----------------------------------------------------------------------------------------------------------


def robust_sigma(values: np.ndarray, axis: int | None = None) -> Any:
    """Standard deviation from the median absolute deviation."""
    middle = np.median(values, axis=axis, keepdims=axis is not None)
    return 1.4826 * np.median(np.abs(values - middle), axis=axis)


def seeing_arcsec(image: np.ndarray, sigma: float) -> float:
    """Full width at half maximum of stars: Gaussian fits to the upper 60% of bright, isolated peaks, of which the
    narrower half are taken for stars."""
    reach = 8
    peaks = (image == maximum_filter(image, size=2 * reach + 1)) & (image > 30 * sigma) & (image < 4000 * sigma)
    widths = []
    y_grid, x_grid = np.mgrid[-4:5, -4:5]
    for y, x in np.argwhere(peaks):
        if min(y, x, image.shape[0] - 1 - y, image.shape[1] - 1 - x) < reach:
            continue
        stamp = image[y - 4 : y + 5, x - 4 : x + 5]
        core = np.where(stamp > 0.1 * stamp.max(), stamp, 0.0)
        dx, dy = (core * x_grid).sum() / core.sum(), (core * y_grid).sum() / core.sum()
        high = stamp > 0.4 * stamp.max()
        if high.sum() < 5:
            continue
        squared = ((x_grid - dx) ** 2 + (y_grid - dy) ** 2)[high]
        slope = np.polyfit(squared, np.log(stamp[high]), 1)[0]
        if slope < 0:
            widths.append(2.355 * np.sqrt(-0.5 / slope) * SDSS_PIXEL_SCALE_ARCSEC)
    return float(np.percentile(widths, 25)) if len(widths) >= 5 else np.nan


def pixels(data: Path, config: MockConfig, n_mock: int) -> tuple[list[Row], dict[str, Any]]:
    """Noise and seeing of native pixels: six real fields, and mock images of blank sky, by the same estimators."""
    paths = sorted((data / "sas").rglob("frame-*.fits.bz2"))
    found: dict[str, list[tuple[float, float]]] = {band: [] for band in BANDS}
    for done, path in enumerate(paths, start=1):
        with bz2.open(path) as packed, fits.open(io.BytesIO(packed.read())) as hdus:
            image = np.asarray(hdus[0].data, float)  # pyright: ignore
        sigma = robust_sigma(image[::5, ::5])
        found[path.name.split("-")[1]].append((sigma, seeing_arcsec(image, sigma)))
        progress("real frames", done, len(paths))
    n_pixels = 1024
    source = MockSource(config, GridConfig(width_arcsec=n_pixels * SDSS_PIXEL_SCALE_ARCSEC, n_pixels=n_pixels), SEED)
    mock: dict[str, list[tuple[float, float]]] = {band: [] for band in BANDS}
    for i in range(n_mock):
        cutout = source.cutout({"id": f"pixels-{i}", "z": 0.25})
        for band, image in zip(BANDS, cutout.flux, strict=True):
            sigma = robust_sigma(image[::5, ::5])
            mock[band].append((sigma, seeing_arcsec(image, sigma)))
        progress("mock images", i + 1, n_mock)
    rows, ratios, seeing = [], {}, {}
    for band in BANDS:
        (real_sigma, real_width), (mock_sigma, mock_width) = np.array(found[band]).T, np.array(mock[band]).T
        centre = np.sqrt(real_sigma.min() * real_sigma.max())
        ratios[band] = float(np.median(mock_sigma) / centre)
        rows.append(
            Row(
                f"pixel noise {band}, nmgy",
                f"{real_sigma.min():.4f}-{real_sigma.max():.4f}",
                f"{np.median(mock_sigma):.4f} ({ratios[band]:.2f})",
                "within 10% of centre",
                bool(abs(ratios[band] - 1) <= 0.1),
            )
        )
        low, high = np.nanmin(real_width), np.nanmax(real_width)
        seeing[band] = [float(np.nanmedian(mock_width)), float(low), float(high)]
        spread = np.nanpercentile(mock_width, [5, 95])
        rows.append(
            Row(
                f"PSF FWHM {band}, arcsec",
                f"{low:.2f}-{high:.2f}",
                f"{seeing[band][0]:.2f} ({spread[0]:.2f}-{spread[1]:.2f})",
                "median in real range",
                bool(low <= seeing[band][0] <= high),
            )
        )
    return rows, {"noise_ratio": ratios, "psf_fwhm_arcsec_mock_and_real_range": seeing}


# --- galaxies of the field --------------------------------------------------------------------------------------------


def field(data: Path, config: MockConfig, n_mock: int) -> tuple[list[Row], dict[str, Any]]:
    """Counts and colours of galaxies as listed, model magnitudes corrected for extinction, i < 21."""
    parts = sorted((data / "photometry" / "dr8_field").glob("dr8_test_galaxies_00*.fit"))
    real_parts = [np.asarray(Table.read(part)["MAG"], float) for part in parts]
    width_arcsec, mock_parts = 1800.0, []
    for i in range(n_mock):
        row = {"id": f"field-{i}", "z": 0.25}
        sources = population.galaxies(row, config, width_arcsec, SEED)
        mock_parts.append(population.observe(sources, row, SEED, config.physics, ebv_mag=FIELD_EBV_MAG)["mag"])
        progress("mock fields", i + 1, n_mock)
    mock_area = n_mock * (width_arcsec / 3600.0) ** 2
    rows: list[Row] = []
    counts = {}
    real_counts, mock_counts = (
        np.array([np.histogram(p[:, 2], COUNT_EDGES)[0] for p in ps]) for ps in (real_parts, mock_parts)
    )
    n = len(real_parts)
    # Pieces of one field, left out in turn: the standard error holds their clustering as well as Poisson noise.
    error = np.sqrt(n / (n - 1) * ((real_counts - real_counts.mean(axis=0)) ** 2).sum(axis=0)) / real_counts.sum(axis=0)
    mock_error = mock_counts.std(axis=0, ddof=1) * np.sqrt(n_mock) / mock_counts.sum(axis=0)
    for k, low in enumerate(COUNT_EDGES[:-1]):
        real, mock = real_counts[:, k].sum() / FIELD_AREA_DEG2, mock_counts[:, k].sum() / mock_area
        counts[f"{low:.1f}"] = float(mock / real)
        rows.append(
            Row(
                f"galaxies per deg2, r {low:.1f}-{low + 0.5:.1f}",
                f"{real:.0f} (+-{error[k]:.0%})",
                f"{mock:.0f} (+-{mock_error[k]:.0%}; {mock / real:.2f})",
                "within 15% or 2 errors",
                bool(abs(mock / real - 1) <= max(0.15, 2 * error[k])),
            )
        )
    real, mock = np.concatenate(real_parts), np.concatenate(mock_parts)
    ks: dict[str, dict[str, float]] = {}
    for low, high in ((17.0, 21.0), (17.0, 19.0), (19.0, 20.0), (20.0, 21.0)):
        a, b = (-np.diff(m[(m[:, 2] > low) & (m[:, 2] < high)], axis=1) for m in (real, mock))
        name = f"{low:.0f}-{high:.0f}"
        ks[name] = {colour: float(ks_2samp(a[:, c], b[:, c]).statistic) for c, colour in enumerate(COLOURS)}
        whole = name == "17-21"
        for c, colour in enumerate(COLOURS):
            quartiles = [" ".join(f"{q:.2f}" for q in np.percentile(m[:, c], [25, 50, 75])) for m in (a, b)]
            rows.append(
                Row(
                    f"{colour}, r {name}: quartiles; KS",
                    quartiles[0],
                    f"{quartiles[1]}; {ks[name][colour]:.3f}",
                    "KS at most 0.08" if whole else "",
                    ks[name][colour] <= 0.08 if whole else None,
                )
            )
    return rows, {"count_ratio": counts, "ks_colours": ks["17-21"], "ks_colours_by_r": ks}


# --- red sequence -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Red:
    """Galaxies on or near the red sequence: redshift, total i magnitude, ugriz magnitudes (n, 5) and their errors."""

    z: np.ndarray
    ref_mag: np.ndarray
    mag: np.ndarray
    mag_err: np.ndarray

    def __getitem__(self, keep: np.ndarray) -> Red:
        return Red(self.z[keep], self.ref_mag[keep], self.mag[keep], self.mag_err[keep])

    @property
    def dm(self) -> np.ndarray:
        """i - m*(z)."""
        return self.ref_mag - m_star_i_mag(self.z)

    @property
    def residual(self) -> np.ndarray:
        """(n, 4) colours less those of the red sequence of the configuration `sky`."""
        sky = MockConfig().physics
        expected = -np.diff(templates(sky.red_colour_offset_mag).red_magnitudes(self.z), axis=1)
        return -np.diff(self.mag, axis=1) - expected - np.array(sky.red_colour_slope) * self.dm[:, None]

    def chi2(self) -> np.ndarray:
        """Distance from the red sequence that these galaxies themselves have, fitted as an observer fits it."""
        sequence = RedSequence.fit(self.mag, self.mag_err, self.ref_mag, self.z)
        return np.concatenate(
            [
                sequence.chi2(self.mag[k : k + 1], self.mag_err[k : k + 1], self.ref_mag[k : k + 1], self.z[k])
                for k in range(len(self.z))
            ]
        )


def mock_members(config: MockConfig, z: tuple[float, float], n: int, central: bool) -> Red:
    """Listed members of mock clusters: the brightest galaxies, or all within R_c that are as luminous as the real."""
    low, high = (13.6, 14.8) if central else (14.0, 14.8)
    chosen = config.model_copy(
        update={
            "z_min": z[0],
            "z_max": z[1],
            "log10_m500c_min": low,
            "log10_m500c_max": high,
            "mass_prior": "mass function" if central else "flat",
            "miscentred_share": 0.0,
        }
    )
    parts = []
    for row in population.draw_clusters(chosen, n, SEED, f"red-{z[0]:.2f}-{central}-"):
        redshift = float(row["z"])
        reach_kpc = 50.0 if central else float(population.richness_radius_kpc(float(row["richness_true"])))
        width = 2 * reach_kpc / float(kpc_per_arcsec(redshift))
        sources = population.galaxies(row, chosen, width, SEED)
        listed = population.observe(sources, row, SEED, chosen.physics, ebv_mag=RED_EBV_MAG)
        distance = separation_arcsec(listed["ra_deg"], listed["dec_deg"], float(row["ra_deg"]), float(row["dec_deg"]))
        i_mag = listed["mag"][:, 3]
        if central:
            keep = listed["truth_member"] & (distance < 1.0)
        else:
            keep = listed["truth_member"] & (distance < width / 2) & (distance > 1.0)
            keep &= i_mag < m_star_i_mag(redshift) + LUMINOUS_MAG + 0.45
        parts.append(Red(np.full(keep.sum(), redshift), i_mag[keep], listed["mag"][keep], listed["mag_err"][keep]))
    return Red(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Red)))


def red_sequence(data: Path, config: MockConfig, n_mock: int) -> tuple[list[Row], dict[str, Any]]:
    """Median and scatter of the colours of red galaxies about one relation, per bin of 0.05 in z.

    The cut P > 0.8 takes the wings off the real red sequence. It is put on the mock members as a probability: the
    share of the real candidates with the same chi2 about their own red sequence that pass it. Mock members are taken
    with the luminosities of the real ones.
    """
    folder = data / "photometry"
    table = Table.read(folder / "test_dr8_trainredseq_gals.fit")
    candidates = Red(*(np.asarray(table[name], float) for name in ("Z", "REFMAG", "MAG", "MAG_ERR")))
    passed = np.asarray(table["P"], float) > 0.8
    table = Table.read(folder / "test_dr8_centcalcat.fit")
    table = table[np.asarray(table["P_CEN"])[:, 0] > 0.8]
    centrals = Red(*(np.asarray(table[name], float) for name in ("Z", "REFMAG", "MAG", "MAG_ERR")))
    edges = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 13.0, 20.0])
    chi2 = candidates.chi2()
    share = np.histogram(chi2[passed], edges)[0] / np.histogram(chi2, edges)[0]

    rng = np.random.default_rng(SEED)
    bins = [(candidates[passed], False, low) for low in (0.10, 0.15)]
    bins += [(centrals, True, low) for low in (0.10, 0.15, 0.20, 0.25, 0.30)]
    rows: list[Row] = []
    offsets: dict[str, dict[str, list[float]]] = {}
    for done, (real, central, low) in enumerate(bins, start=1):
        real = real[(real.z >= low) & (real.z < low + 0.05)]
        mock = mock_members(config, (low, low + 0.05), n_mock if central else n_mock // 8, central)
        if not central:
            # Distances come from all members; then each real galaxy gets mock ones of its luminosity.
            distance = mock.chi2()
            order = np.argsort(mock.dm)
            near = np.searchsorted(mock.dm[order], real.dm)[:, None] + rng.integers(-25, 25, (len(real.z), 12))
            drawn = order[np.clip(near, 0, len(order) - 1).ravel()]
            passing = np.append(share, 0.0)[np.digitize(distance[drawn], edges) - 1]
            mock = mock[drawn[rng.random(len(drawn)) < passing]]
        name = f"{'centrals' if central else 'satellites'} z {low:.2f}"
        medians, scatters = (
            [f(part.residual) for part in (real, mock)]
            for f in (lambda r: np.median(r, axis=0), lambda r: robust_sigma(r, 0))
        )
        error = 1.25 * scatters[0] / np.sqrt(len(real.z))
        offset, ratio = medians[1] - medians[0], scatters[1] / scatters[0]
        offsets[name] = {"median_mag": offset.tolist(), "error_mag": error.tolist(), "scatter_ratio": ratio.tolist()}
        for c, colour in enumerate(COLOURS):
            rows.append(
                Row(
                    f"{name} {colour}, mag",
                    f"{medians[0][c]:+.3f}+-{error[c]:.3f}, scatter {scatters[0][c]:.3f}",
                    f"{medians[1][c]:+.3f}, {scatters[1][c]:.3f} ({offset[c]:+.3f}, {ratio[c]:.2f})",
                    "0.03 mag, 20%",
                    bool(abs(offset[c]) <= 0.03 and abs(ratio[c] - 1) <= 0.2),
                )
            )
        progress("red sequence", done, len(bins))
    worst = {c: max((v["median_mag"][k] for v in offsets.values()), key=abs) for k, c in enumerate(COLOURS)}
    scatter = {
        c: max((v["scatter_ratio"][k] for v in offsets.values()), key=lambda r: abs(np.log(r)))
        for k, c in enumerate(COLOURS)
    }
    return rows, {"red_sequence_offset": worst, "red_sequence_scatter_ratio": scatter, "red_sequence_bins": offsets}


# --- difficulty -------------------------------------------------------------------------------------------------------


def difficulty(config: MockConfig, n: int) -> tuple[list[Row], dict[str, Any]]:
    """Mass from richness, true richness, redshift and nothing: mean absolute errors against noisy labels."""
    chosen = config.model_copy(
        update={"z_min": 0.1, "z_max": 0.4, "log10_m500c_min": 13.8, "log10_m500c_max": 15.2, "mass_prior": "flat"}
    )
    catalog = population.draw_clusters(chosen, n, SEED, "difficulty-")
    measure_richness(
        catalog,
        MockSource(chosen, GridConfig(), SEED),
        SEED,
        lambda done, total, note="": progress("richness", done, total),
    )
    z, label, truth = (np.asarray(catalog[name], float) for name in ("z", "log10_m500c", "log10_m500c_true"))
    ra, dec = np.asarray(catalog["ra_deg"], float), np.asarray(catalog["dec_deg"], float)
    fold = sky_folds(ra, dec, label, 10, 0.0, SEED)
    observed = cross_validate(np.asarray(catalog["richness"], float), z, label, fold)
    true = cross_validate(np.asarray(catalog["richness_true"], float), z, label, fold)
    against_truth = float(np.mean(np.abs(observed.predicted - truth)))
    values = {
        "mae_richness_dex": observed.mae_dex,
        "mae_true_richness_dex": true.mae_dex,
        "mae_constant_dex": observed.mae_constant_dex,
        "mae_redshift_dex": observed.mae_redshift_dex,
        "mae_richness_against_truth_dex": against_truth,
    }
    mae = observed.mae_dex
    rows = [
        Row("MAE of richness, dex", "0.160 (MCXC)", f"{mae:.3f}", "at most 0.21", mae <= 0.21),
        Row("MAE of true richness, dex", "", f"{true.mae_dex:.3f}", "clearly less", true.mae_dex < 0.97 * mae),
    ]
    for name, score in (("redshift alone", observed.mae_redshift_dex), ("a constant", observed.mae_constant_dex)):
        rows.append(Row(f"MAE of {name}, dex", "0.230 (MCXC)", f"{score:.3f}", "clearly more", score > 1.3 * mae))
    return rows, {name: float(value) for name, value in values.items()}


# --- networks ---------------------------------------------------------------------------------------------------------


def networks(data: Path, config: MockConfig, epochs: int, seeds: int, figure: Path) -> tuple[list[Row], dict[str, Any]]:
    """Can a network tell mock from real stamps, and does pretraining on mock stamps help on real ones?"""
    started = time.monotonic()

    def report(line: str) -> None:
        print(f"{line} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    real = realism_judge.real_stamps(data / "sas")
    judged = realism_judge.judge(real, config, SEED, epochs, report)
    realism_judge.draw_easiest(judged, real, figure)
    stamps, _ = realism_judge.mock_stamps(config, TRANSFER_STAMPS, SEED + 2)
    accuracy = realism_judge.band_transfer(real, stamps, seeds, TRANSFER_EPOCHS, report)

    def mean_error(found: Any) -> tuple[float, float]:
        return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(np.size(found)))

    auc, auc_error = mean_error(list(judged.auc.values()))
    null, null_error = mean_error(list(judged.null.values()))
    pairs = accuracy["mock_then_real"] - accuracy["real_only"]
    gain, gain_error = mean_error(pairs)
    field_error = mean_error(pairs.mean(axis=0))[1]
    mean = {kind: float(found.mean()) for kind, found in accuracy.items()}
    rows = [
        Row("ROC area, real against mock", "", f"{auc:.3f} +- {auc_error:.3f} (fields)", "at most 0.75", auc <= 0.75),
        Row("  control: real against real", f"{null:.3f} +- {null_error:.3f}", "", "about 0.5", abs(null - 0.5) < 0.05),
        *(
            Row(
                f"  control: mock with 15% wrong {what}",
                "",
                f"{found:.3f}",
                "at least 0.9 in one",
                found >= 0.9 or None,
            )
            for what, found in judged.control.items()
        ),
        Row(
            "band accuracy, field left out",
            f"{mean['real_only']:.3f} (real only)",
            f"{mean['mock_then_real']:.3f} mock first ({gain:+.4f} +- {gain_error:.4f})",
            "gain over one error",
            gain > gain_error,
        ),
        Row("  error of the gain, fields as units", "", f"{field_error:.4f}", "", None),
        Row("  trained on mock alone", "", f"{mean['mock_only']:.3f}", "", None),
    ]
    values = {
        "auc_real_vs_mock": auc,
        "auc_real_vs_mock_error": auc_error,
        "auc_by_field": judged.auc,
        "auc_control": max(judged.control.values()),
        "auc_control_by_fault": judged.control,
        "auc_null": null,
        "band_accuracy_gain": gain,
        "band_accuracy_gain_error": gain_error,
        "band_accuracy_gain_error_of_fields": field_error,
        **{f"band_accuracy_{kind}": value for kind, value in mean.items()},
    }
    return rows, values


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=os.environ.get("PIX2MASS_DATA"))
    parser.add_argument("--configuration", choices=("sky", "sim"), default="sky")
    parser.add_argument("--quick", action="store_true", help="a sixth of the mock sky: for a look, not for the claim")
    parser.add_argument("--without-networks", action="store_true", help="leave out the judges, which take longest")
    parser.add_argument("--figure", type=Path, default=Path("realism_stamps.png"), help="the judges' easiest stamps")
    options = parser.parse_args()
    if options.data is None:
        sys.exit("set PIX2MASS_DATA, or give --data: the folder of real SDSS data (with sas/ and photometry/)")
    config = MockConfig(configuration=options.configuration)
    share = 6 if options.quick else 1
    # Each part gives lines of the table and values for the JSON; a further comparison is one more entry.
    parts = [
        pixels(options.data, config, 30 // share),
        field(options.data, config, 120 // share),
        red_sequence(options.data, config, 2000 // share),
        difficulty(config, 480 // share),
    ]
    if not options.without_networks:
        epochs, seeds = (3, 1) if options.quick else (15, 3)
        parts.append(networks(Path(options.data), config, epochs, seeds, options.figure))
    rows = [row for found, _ in parts for row in found]
    values: dict[str, Any] = {"configuration": options.configuration, "quick": options.quick}
    for _, found in parts:
        values |= found
    values["targets_met"] = sum(row.met is True for row in rows)
    values["targets_missed"] = [row.what for row in rows if row.met is False]

    print(f"MOCK ({options.configuration}) beside REAL SDSS; in brackets mock over real, or mock minus real")
    print(f"{'':36}{'real':30}{'mock':40}{'target':24}")
    for row in rows:
        met = {True: "yes", False: "NO", None: ""}[row.met]
        print(f"{row.what:36}{row.real:30}{row.mock:40}{row.target:24}{met}")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
