"""Pictures of the mock sky: its physics as curves, mock clusters and fields, and real ones beside them.

Run: PIX2MASS_DATA=/path/to/data python docs/gallery.py [--out docs/build]

Without PIX2MASS_DATA only the mock pictures are drawn. Colour composites of i, r, g (Lupton et al. 2004, PASP 116,
133), the same stretch in every panel.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from astropy.visualization import make_lupton_rgb

from pix2mass.config import GridConfig, MockConfig
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.images.mock import population
from pix2mass.images.mock.render import psf_fwhm_per_sigma
from pix2mass.images.mock.source import MockSource
from pix2mass.types import Cutout

NAME, RA_DEG, DEC_DEG, Z, RICHNESS = "RMJ222655.7-005503.6", 336.73222, -0.91766, 0.245, 28
LOG10_M500C = 14.11
"""Of the real cluster, from its richness and the relation of MCXC masses (docs/richness.md)."""
GRID = GridConfig(width_kpc=None, width_arcsec=237.6, n_pixels=300)
EMPTY = 3


def composite(cutout: Cutout) -> np.ndarray:
    """Colour picture (h, w, 3): surface brightness in nanomaggies per arcsec2, i, r, g as red, green, blue."""
    images = {band: cutout.flux[k] / cutout.pixel_scale_arcsec**2 for k, band in enumerate(cutout.bands)}
    return make_lupton_rgb(0.8 * images["i"], images["r"], 1.6 * images["g"], stretch=0.8, Q=8, minimum=-0.02)


def mock_cutouts(configuration: str, seed: int) -> tuple[list[Cutout], list[Cutout]]:
    """Mock clusters of the real one's redshift, mass and richness, and blank mock sky."""
    source = MockSource(MockConfig.model_validate({"configuration": configuration}), GRID, seed)
    cluster = {"z": Z, "log10_m500c_true": LOG10_M500C, "richness_true": RICHNESS, "ra_deg": RA_DEG, "dec_deg": DEC_DEG}
    clusters = [source.cutout({**cluster, "id": f"gallery-{k}"}) for k in range(EMPTY)]
    blank = [source.cutout({"z": Z, "id": f"blank-{k}"}) for k in range(EMPTY)]
    return clusters, blank


def real_cutouts(base: Path, seed: int) -> tuple[Cutout, list[Cutout]]:
    """The real cluster, and positions in fields without a catalogued one."""
    index = FrameIndex.from_base(base)
    positions = random_positions(index, 1, seed, margin_arcsec=150.0)
    positions = positions[[group != "94-1-0012" for group in positions["group"]]][:EMPTY]
    with FrameSource(base, GRID, index) as source:
        cluster = source.cutout({"id": NAME, "ra_deg": RA_DEG, "dec_deg": DEC_DEG, "z": Z})
        return cluster, [source.cutout(row) for row in positions]


def draw_physics(seed: int, path: Path) -> None:
    """Number counts, red sequence, richness and PSF of the two configurations."""
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7.2))
    counts, sequence, richness, psf = axes.flat
    edges, width_arcsec, n_fields = np.arange(15.0, 25.01, 0.5), 900.0, 12
    area_deg2 = n_fields * (width_arcsec / 3600) ** 2
    for name, colour in (("sky", "#0072B2"), ("sim", "#D55E00")):
        config = MockConfig.model_validate({"configuration": name, "z_min": 0.08, "z_max": 0.55})
        physics = config.physics
        fields = [
            population.galaxies({"id": f"figure-{k}", "z": 0.25}, config, width_arcsec, seed, background=True)
            for k in range(n_fields)
        ]
        for kind, style in ((False, "-"), (True, ":")):
            r_mag = np.concatenate([sources.mag[sources.is_star == kind, 2] for sources in fields])
            label = f"{name}, {'stars' if kind else 'galaxies'}"
            counts.step(
                edges[:-1], np.histogram(r_mag, edges)[0] / area_deg2, style, where="post", color=colour, label=label
            )
        clusters = population.draw_clusters(config, 300, seed, "figure-")
        members = [(row["z"], population.galaxies(row, config, 240.0, seed)) for row in clusters[:80]]
        red = [(z, s.mag[s.is_member & s.is_red & ~s.is_diffuse & (s.mag[:, 3] < 20.5)]) for z, s in members]
        z_red = np.concatenate([np.full(len(mag), z) for z, mag in red])
        mag_red = np.concatenate([mag for _, mag in red])
        sequence.plot(z_red, mag_red[:, 1] - mag_red[:, 2], ".", ms=1.5, alpha=0.4, color=colour, label=f"{name}, g-r")
        mass = np.asarray(clusters["log10_m500c_true"])
        richness.plot(mass, clusters["richness_true"], ".", ms=3, color=colour, label=name)
        radius = np.linspace(0, 15, 300)
        sigma = physics.psf_fwhm_arcsec[2] / psf_fwhm_per_sigma(physics.psf_components)
        profile = sum(
            share / ratio**2 * np.exp(-0.5 * (radius / (ratio * sigma)) ** 2) for share, ratio in physics.psf_components
        )
        psf.plot(radius, profile / profile[0], color=colour, label=name)
    counts.set(xlabel="r", ylabel="per deg2 and half magnitude", yscale="log", title="Number counts, blank sky")
    sequence.set(xlabel="z", ylabel="g - r", title="Red members with i < 20.5", ylim=(0.4, 2.2))
    richness.set(xlabel="log10 M500c", ylabel="true richness", yscale="log", title="Richness, scatter included")
    psf.set(xlabel="radius, arcsec", ylabel="PSF in r over its peak", yscale="log", ylim=(1e-6, 1.2), title="PSF")
    for ax in axes.flat:
        ax.legend(frameon=False, fontsize=8, markerscale=4)
    figure.suptitle("MOCK: the configurations sky and sim", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw(panels: list[tuple[str, Cutout]], path: Path, columns: int = 3) -> None:
    """Panels with their titles, row by row."""
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.35 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, cutout) in zip(axes.flat, panels, strict=False):
        ax.imshow(composite(cutout), origin="lower")
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw the pictures and say where they are."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "build")
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw_physics(options.seed, options.out / "mock_physics.png")
    drawn = {name: mock_cutouts(name, options.seed) for name in ("sky", "sim")}
    clusters = [(f"MOCK ({name}), z = {Z}, richness {RICHNESS}", c) for name in drawn for c in drawn[name][0]]
    fields = [(f"MOCK ({name}), no cluster", c) for name in drawn for c in drawn[name][1]]
    pictures = {"mock_clusters.png": clusters, "mock_fields.png": fields}
    if "PIX2MASS_DATA" in os.environ:
        cluster, empty = real_cutouts(Path(os.environ["PIX2MASS_DATA"]) / "sas", options.seed)
        beside = [*clusters[:EMPTY], *clusters[EMPTY : EMPTY + 2]]
        pictures["real_and_mock_clusters.png"] = [(f"REAL (SDSS DR12), {NAME}", cluster), *beside]
        pictures["real_and_mock_fields.png"] = [
            *(("REAL (SDSS DR12), no catalogued cluster", cutout) for cutout in empty),
            *fields,
        ]
    for name, panels in pictures.items():
        draw(panels, options.out / name)
        print(options.out / name)


if __name__ == "__main__":
    main()
