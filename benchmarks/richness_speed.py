"""Claim: richness of 1,000 clusters in a catalogue of 10 million galaxies takes less than a minute on 2 cores,
the sorting of the catalogue included.

The galaxies are those of a mock blank field, repeated at fresh random positions over 2,300 deg2 (the surface density of
SDSS i < 21); members of 1,000 mock clusters are added. Making the catalogue is not timed.

Run: python benchmarks/richness_speed.py [--galaxies 10000000] [--clusters 1000]. About 3 GB of memory. Mock data.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from astropy.table import QTable

from pix2mass.config import MockConfig
from pix2mass.images.mock import population
from pix2mass.richness import Background, RedSequence, m_star_i_mag, measure

WIDTH_ARCSEC, FIELDS = 1800.0, 12
CONFIG = MockConfig(miscentred_share=0.0)


def observed(row: dict, width_arcsec: float) -> dict[str, np.ndarray]:
    """What a survey lists in a box."""
    return population.observe(population.galaxies(row, CONFIG, width_arcsec, 1), row, 1)


def main() -> None:
    """Make the sky, measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--galaxies", type=int, default=10_000_000)
    parser.add_argument("--clusters", type=int, default=1000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    names = ("mag", "mag_err")
    fields = [observed({"id": f"blank{i}", "z": 0.25}, WIDTH_ARCSEC) for i in range(FIELDS)]
    pool = {name: np.concatenate([field[name] for field in fields]).astype(np.float32) for name in names}
    density_deg2 = len(pool["mag"]) / (FIELDS * (WIDTH_ARCSEC / 3600) ** 2)
    area_deg2 = arguments.galaxies / density_deg2
    ra_range, dec_low = 120.0, 0.0
    dec_high = np.degrees(np.arcsin(area_deg2 / ra_range / np.degrees(1.0)))

    # A few true clusters, put down again and again at other positions.
    templates, truth, reds, red_z = [], [], [], []
    for i, z in enumerate(np.linspace(0.1, 0.35, 50)):
        number = [20, 40, 80][i % 3]
        row = {"id": f"c{i}", "z": z, "log10_m500c_true": 14.24 + np.log10(number / 40), "richness_true": number}
        catalogue = observed(row, 1500.0)
        member = catalogue["truth_member"]
        templates.append({name: catalogue[name][member] for name in ("ra_deg", "dec_deg", *names)})
        truth.append((z, number))
        bright = member & (catalogue["mag"][:, 3] < m_star_i_mag(z) + 1.75)
        reds.append({name: catalogue[name][bright] for name in names})
        red_z.append(np.full(bright.sum(), z))
    sequence = RedSequence.fit(
        *(np.concatenate([red[name] for red in reds]) for name in names),
        np.concatenate([red["mag"][:, 3] for red in reds]),
        np.concatenate(red_z),
    )
    background = Background.fit(fields, FIELDS * WIDTH_ARCSEC**2, sequence)

    chosen = rng.integers(len(pool["mag"]), size=arguments.galaxies)
    columns = {name: [pool[name][chosen]] for name in names}
    columns["ra_deg"] = [rng.uniform(120.0, 120.0 + ra_range, arguments.galaxies)]
    sin_low, sin_high = np.sin(np.radians([dec_low, dec_high]))
    columns["dec_deg"] = [np.degrees(np.arcsin(rng.uniform(sin_low, sin_high, arguments.galaxies)))]
    which = rng.integers(len(templates), size=arguments.clusters)
    ra, dec = rng.uniform(121, 239, arguments.clusters), rng.uniform(dec_low + 1, dec_high - 1, arguments.clusters)
    for k, ra_0, dec_0 in zip(which, ra, dec, strict=True):
        template = templates[k]
        offset = (template["ra_deg"] + 180.0) % 360.0 - 180.0
        columns["ra_deg"].append((ra_0 + offset / np.cos(np.radians(dec_0))) % 360.0)
        columns["dec_deg"].append(dec_0 + template["dec_deg"])
        for name in names:
            columns[name].append(template[name].astype(np.float32))
    sky = {name: np.concatenate(parts) for name, parts in columns.items()}
    del columns, chosen
    z, number = np.array(truth)[which].T
    clusters = QTable({"ra_deg": ra, "dec_deg": dec, "z": z})

    start = time.perf_counter()
    table = measure(sky, clusters, sequence, background)
    seconds = time.perf_counter() - start
    ratio = np.asarray(table["richness"]) / number
    print(f"{len(sky['mag'])} galaxies on {area_deg2:.0f} deg2, {len(table)} clusters: {seconds:.1f} s")
    print(f"measured over true richness: median {np.median(ratio):.3f}, scatter in ln {np.std(np.log(ratio)):.3f}")
    print(
        json.dumps(
            {
                "galaxies": len(sky["mag"]),
                "clusters": len(table),
                "seconds": round(seconds, 2),
                "clusters_per_s": round(len(table) / seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
