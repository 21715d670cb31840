"""Claim: the renderer draws the survey's galaxies at least 40 times faster than GalSim, with each flux within 0.5% and,
for galaxies fainter than r = 17, each pixel within 0.1 of the sky noise; and 25 five-band clusters per second and core.

The same galaxies with both, drawn at random from those of the mock sky's pictures (to r = 25), in native pixels, with
the same truncated Sersic profiles, the same double Gaussian PSF and the same stamps; GalSim stamp by stamp, ours as one
frame that holds all stamps side by side. One core each; CPU seconds; repeated in turns, best of each. GalSim is timed
with its default accuracy, its profiles made once and then scaled and sheared; accuracy is taken against GalSim with
tighter settings and from galaxies drawn alone, on the same galaxies and on 400 more of r < 21. Clusters:
``MockSource.cutout`` on the default grid (2 Mpc on 64 pixels, z 0.1-0.4), the drawing of the population and the noise
included; GalSim draws the same sources into the same picture without either.

Run: OMP_NUM_THREADS=1 python benchmarks/render.py [--galaxies 2000] [--clusters 50] [--galsim-clusters 50]. About a
quarter of an hour. Mock data, seed 1.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields, replace

import galsim
import numpy as np
import torch

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.mock import population
from pix2mass.images.mock.population import Sources
from pix2mass.images.mock.render import (
    PSF_COMPONENTS,
    TRUNCATION_R50,
    half_light_over_untruncated,
    psf_fwhm_per_sigma,
    render,
)
from pix2mass.images.mock.source import MockSource
from pix2mass.types import SDSS_PIXEL_SCALE_ARCSEC

SEED, BRIGHT_GALAXIES = 1, 400
FWHM_ARCSEC, COARSE_SCALE_ARCSEC = 1.3, 3.2
SKY_NOISE_R_NMGY = 0.027
"""Of native r pixels: the middle of the range measured in six SDSS frames."""
BAND_FWHM_ARCSEC = np.array([1.5, 1.4, 1.3, 1.2, 1.2])
FINE = galsim.GSParams(folding_threshold=5e-4, maxk_threshold=1e-4, kvalue_accuracy=1e-6, maximum_fft_size=16384)
EDGE_R50 = {0: 0.0} | {n: TRUNCATION_R50[n] / half_light_over_untruncated(n) for n in (1, 4)}


class Reference:
    """GalSim's objects for our sources."""

    def __init__(self, fwhm_arcsec: float, gsparams: galsim.GSParams | None = None) -> None:
        sigma = fwhm_arcsec / psf_fwhm_per_sigma()
        self.psf = galsim.Add(
            [galsim.Gaussian(sigma=sigma * ratio, flux=share, gsparams=gsparams) for share, ratio in PSF_COMPONENTS]
        )
        self.profiles = {
            n: galsim.Sersic(n, half_light_radius=1.0, trunc=EDGE_R50[n], gsparams=gsparams) for n in (1, 4)
        }

    def __call__(self, sources: Sources, k: int, flux: float) -> galsim.GSObject:
        if sources.sersic_n[k] == 0:
            return self.psf * flux
        size = sources.r50_arcsec[k] * np.sqrt(sources.axis_ratio[k])
        profile = self.profiles[int(sources.sersic_n[k])].dilate(size)
        profile = profile.shear(q=sources.axis_ratio[k], beta=sources.angle_deg[k] * galsim.degrees)
        return galsim.Convolve(profile, self.psf) * flux


def stamp_sides(sources: Sources, scale_arcsec: float, fwhm_arcsec: float) -> np.ndarray:
    """Even numbers of pixels that hold each truncated profile and the PSF about it."""
    edge = np.array([EDGE_R50[int(n)] for n in sources.sersic_n])
    return 2 * np.ceil((edge * sources.r50_arcsec + 3 * fwhm_arcsec) / scale_arcsec).astype(int)


def shelves(sides: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Left and bottom pixels of square stamps packed into one frame, and the frame's rows and columns."""
    width = max(int(1.03 * np.sqrt((sides**2).sum())), sides.max())
    left, bottom = np.zeros(len(sides), int), np.zeros(len(sides), int)
    x = y = height = 0
    for k in np.argsort(-sides, kind="stable"):
        if x + sides[k] > width:
            x, y, height = 0, y + height, 0
        height = max(height, sides[k])
        left[k], bottom[k] = x, y
        x += sides[k]
    return left, bottom, (int(y + height), int(width))


def cpu_seconds(function, *arguments) -> float:
    """CPU time of one call."""
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def accuracy(sources: Sources, flux: np.ndarray, shift: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Relative error of the flux within the stamp, and largest pixel error over the sky noise, of each galaxy."""
    reference = Reference(FWHM_ARCSEC, FINE)
    noise = SKY_NOISE_R_NMGY * scale / SDSS_PIXEL_SCALE_ARCSEC
    flux_error, pixel_error = np.zeros(len(flux)), np.zeros(len(flux))
    alone = replace(sources, x_arcsec=shift[0] * scale, y_arcsec=shift[1] * scale)
    for k, side in enumerate(stamp_sides(sources, scale, FWHM_ARCSEC)):
        expected = reference(sources, k, flux[k]).drawImage(
            nx=side, ny=side, scale=scale, offset=tuple(shift[:, k]), dtype=float
        )
        drawn = render(alone[k : k + 1], flux[k : k + 1, None], np.array([FWHM_ARCSEC]), int(side), scale)[0]
        flux_error[k] = drawn.sum(dtype=float) / expected.array.sum() - 1
        pixel_error[k] = np.abs(drawn - expected.array).max() / noise
    return flux_error, pixel_error


def galsim_cluster(sources: Sources, flux: np.ndarray, n_pixels: int, scale: float) -> np.ndarray:
    """A cluster's picture (5, n_pixels, n_pixels) by GalSim, in pixels of about the native size that are then summed:
    into pixels much wider than the PSF GalSim takes a hundred times as long to draw."""
    parts = max(1, round(scale / SDSS_PIXEL_SCALE_ARCSEC))
    fine, side = scale / parts, n_pixels * parts
    pictures = []
    for band, fwhm in enumerate(BAND_FWHM_ARCSEC):
        reference = Reference(fwhm)
        picture = galsim.ImageD(side, side, xmin=0, ymin=0)
        sides = stamp_sides(sources, fine, fwhm) + 2
        for k in range(len(sources)):
            place = np.array([sources.x_arcsec[k], sources.y_arcsec[k]]) / fine + side / 2 - 0.5
            pixel = np.round(place).astype(int)
            bounds = galsim.BoundsI(*(int(v) for p in pixel for v in (p - sides[k] // 2, p + sides[k] // 2)))
            seen = bounds & picture.bounds
            if seen.isDefined():
                stamp = galsim.ImageD(bounds, init_value=0.0)
                reference(sources, k, flux[k, band]).drawImage(image=stamp, scale=fine, offset=tuple(place - pixel))
                picture[seen] += stamp[seen]
        pictures.append(picture.array.reshape(n_pixels, parts, n_pixels, parts).sum(axis=(1, 3)))
    return np.stack(pictures)


def main() -> None:
    """Draw, compare, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--galaxies", type=int, default=2000)
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--galsim-clusters", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    config = MockConfig(z_min=0.1, z_max=0.4)

    field = population.galaxies({"id": "render", "z": 0.25}, config, 1500.0, SEED, background=True)
    galaxies = field[~field.is_star & ~field.is_diffuse]
    galaxies = galaxies[rng.permutation(len(galaxies))[: arguments.galaxies]]
    n = len(galaxies)
    flux = 10 ** (-0.4 * (galaxies.mag[:, 2] - 22.5))
    shift = rng.uniform(-0.5, 0.5, (2, n))
    sides = stamp_sides(galaxies, SDSS_PIXEL_SCALE_ARCSEC, FWHM_ARCSEC)
    left, bottom, shape = shelves(sides)
    framed = replace(
        galaxies,
        x_arcsec=(left + sides / 2 + shift[0] - shape[1] / 2) * SDSS_PIXEL_SCALE_ARCSEC,
        y_arcsec=(bottom + sides / 2 + shift[1] - shape[0] / 2) * SDSS_PIXEL_SCALE_ARCSEC,
    )

    def ours(device: str = "cpu") -> np.ndarray:
        psf = np.array([FWHM_ARCSEC])
        return render(framed, flux[:, None], psf, shape, SDSS_PIXEL_SCALE_ARCSEC, device=device)

    reference = Reference(FWHM_ARCSEC)

    def theirs() -> None:
        for k in range(n):
            reference(galaxies, k, flux[k]).drawImage(
                nx=sides[k], ny=sides[k], scale=SDSS_PIXEL_SCALE_ARCSEC, offset=tuple(shift[:, k]), dtype=np.float32
            )

    # The first use of either makes its tables.
    ours(), theirs()
    turns = [(cpu_seconds(theirs), min(cpu_seconds(ours) for _ in range(3))) for _ in range(3)]
    galsim_ms, our_ms = np.min(turns, axis=0) / n * 1e3
    speedup = float(galsim_ms / our_ms)
    r = galaxies.mag[:, 2]
    print(f"{n} galaxies, r {r.min():.1f} to {r.max():.1f} (median {np.median(r):.1f}),", end=" ")
    print(
        f"{np.mean(galaxies.sersic_n == 4):.0%} n = 4, median r50 {np.median(galaxies.r50_arcsec):.2f} arcsec,", end=" "
    )
    print(f"median stamp {np.median(sides):.0f} pixels")
    print(f"ms of one core per galaxy: GalSim {galsim_ms:.3f}, ours {our_ms:.4f}: {speedup:.0f} times faster")

    print("\n  pixels       r  number  max flux error   median  max pixel error/noise   median")
    wide = population.galaxies({"id": "bright", "z": 0.25}, config, 2400.0, SEED)
    wide = wide[~wide.is_star & ~wide.is_diffuse & (wide.mag[:, 2] < 21.0)][:BRIGHT_GALAXIES]
    judged = Sources(
        **{f.name: np.concatenate([getattr(s, f.name) for s in (galaxies, wide)]) for f in fields(Sources)}
    )
    r, flux = judged.mag[:, 2], 10 ** (-0.4 * (judged.mag[:, 2] - 22.5))
    shift = np.concatenate([shift, rng.uniform(-0.5, 0.5, (2, len(wide)))], axis=1)
    flux_error = {}
    pixel_error = {}
    for scale in (SDSS_PIXEL_SCALE_ARCSEC, COARSE_SCALE_ARCSEC):
        flux_error[scale], pixel_error[scale] = accuracy(judged, flux, shift, scale)
        for low, high in ((10, 17), (17, 19), (19, 21), (21, 25)):
            chosen = (r >= low) & (r < high)
            if chosen.any():
                off, pixel = np.abs(flux_error[scale][chosen]), pixel_error[scale][chosen]
                print(
                    f'{scale:7.3f}" {low:3d}-{high} {chosen.sum():7d} {off.max():15.5f} {np.median(off):8.5f} '
                    f"{pixel.max():22.4f} {np.median(pixel):8.4f}"
                )
    faint = r > 17
    max_flux_error = float(np.abs(flux_error[SDSS_PIXEL_SCALE_ARCSEC]).max())
    max_pixel = float(pixel_error[SDSS_PIXEL_SCALE_ARCSEC][faint].max())

    grid = GridConfig()
    rows = population.draw_clusters(config, arguments.clusters, SEED, "render")
    source = MockSource(config, grid, SEED)
    for row in rows[:2]:
        source.cutout(row)
    clusters_per_s = max(len(rows) / cpu_seconds(lambda: [source.cutout(row) for row in rows]) for _ in range(3))
    widths = [source.width_arcsec(row) for row in rows]
    skies = [
        population.galaxies(row, config, width + 30.0, SEED, background=True)
        for row, width in zip(rows, widths, strict=True)
    ]
    fluxes = [10 ** (-0.4 * (sky.mag - 22.5)) for sky in skies]

    def draw(k: int, device: str = "cpu") -> np.ndarray:
        return render(skies[k], fluxes[k], BAND_FWHM_ARCSEC, grid.n_pixels, widths[k] / grid.n_pixels, device=device)

    drawn_s = min(cpu_seconds(lambda: [draw(k) for k in range(len(rows))]) for _ in range(3)) / len(rows)
    print(
        f"\n{len(rows)} five-band clusters of {np.mean([len(sky) for sky in skies]):.0f} sources, 2 Mpc on 64 pixels:"
    )
    print(f"{clusters_per_s:.1f} per second of one core, population and noise included;", end=" ")
    print(f"drawing alone {1e3 * drawn_s:.1f} ms")
    compared = min(arguments.galsim_clusters, len(rows))
    if compared:
        start, worst = time.process_time(), 0.0
        pictures = [
            galsim_cluster(skies[k], fluxes[k], grid.n_pixels, widths[k] / grid.n_pixels) for k in range(compared)
        ]
        seconds = (time.process_time() - start) / compared
        for k, expected in enumerate(pictures):
            noise = SKY_NOISE_R_NMGY * widths[k] / grid.n_pixels / SDSS_PIXEL_SCALE_ARCSEC
            worst = max(worst, np.abs(draw(k)[2] - expected[2]).max() / noise)
        print(f"GalSim, first {compared}: {seconds:.2f} s each, {seconds / drawn_s:.0f} times our drawing;", end=" ")
        print(f"largest difference of an r pixel, bright stars included: {worst:.2f} of the sky noise")

    result = {
        "speedup_vs_galsim": round(speedup, 1),
        "max_flux_error": round(max_flux_error, 5),
        "max_pixel_difference_sigma": round(max_pixel, 4),
        "clusters_per_s_core": round(clusters_per_s, 1),
    }
    if torch.cuda.is_available():
        draw(0, "cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        for k in range(len(rows)):
            draw(k, "cuda")
        result["clusters_per_s_gpu"] = round(len(rows) / (time.perf_counter() - start), 1)
        print(f"on a GPU: {result['clusters_per_s_gpu']:.1f} clusters per second, populations drawn beforehand")
    else:
        print("no GPU here: not measured on one")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
