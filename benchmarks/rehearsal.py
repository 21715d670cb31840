"""Claim: ``pix2mass run configs/lin2022.toml`` goes from nothing to a report with no change but the base URLs.

The rehearsal of the real run against stand-ins on this machine. A stand-in for VizieR serves the published tables
under their identifiers; ``catalog build`` makes the two catalogues from it. Of these, clusters at their true positions,
redshifts and published richness are taken at random among those of z >= Z_MIN (nearer ones need many more frames each).
The mock sky draws frames of them in the archive's layout and with its file structure (MOCK pixels); a stand-in for the
archive serves these over HTTP. Then ``pix2mass run`` with the configuration file as it is, but for the two catalogues'
and the archive's place. What is measured: bytes, files and seconds of each step.

Run: PIX2MASS_DATA=/path/to/data python benchmarks/rehearsal.py [--labelled 100] [--unlabelled 300] [--out FOLDER]

Frames are kept: a second run of the script skips what is there. 2 to 3 s of a core per frame, 5 or 6 frames per
cluster.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import tomli_w
from astropy.table import QTable, Table, vstack

from pix2mass.catalog.registry import catalogue

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from _vizier import serve  # noqa: E402  the stand-in that the tests use

FILES = {
    "redmapper": "sdss_redmapper.csv.gz",
    "mcxc-ii": "mcxc2.csv",
    "mcxc": "mcxc.fits",
    "psz2": "HFI_PCCS_SZ-union_R2.08.fits",
    "act-dr5": "act_dr5.csv",
}
"""Name of a published catalogue -> its file below catalogs/."""
UNITS = {"None": None, "degrees": "deg", "10^14 Msol": "1e14 solMass", "10+14Msun": "1e14 solMass", "10+37W": "1e37 W"}
"""Units as the files write them -> as VizieR does."""

SEED, Z_MIN = 1, 0.3


class Archive(SimpleHTTPRequestHandler):
    """Serves a folder and counts what it sends."""

    sent = {"requests": 0, "bytes": 0}
    protocol_version = "HTTP/1.1"

    def copyfile(self, source, outputfile) -> None:
        """Send a file."""
        self.sent["requests"] += 1
        self.sent["bytes"] += os.fstat(source.fileno()).st_size
        super().copyfile(source, outputfile)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def pix2mass(*arguments: object) -> float:
    """Run a command line of this environment; seconds of wall time."""
    start = time.perf_counter()
    command = [str(Path(sys.executable).with_name("pix2mass")), *map(str, arguments)]
    print("$", " ".join(["pix2mass", *map(str, arguments)]), flush=True)
    if subprocess.run(command).returncode:
        print("this command failed; what it left is looked at all the same", flush=True)
    return time.perf_counter() - start


def published(data: Path) -> dict[str, Table]:
    """The published tables by their identifier on VizieR."""
    tables = {}
    for name, file in FILES.items():
        path = data / "catalogs" / file
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = Table.read(path) if path.suffix == ".fits" else Table.read(path, format="ascii.csv")
        for column in table.columns.values():
            column.unit = UNITS.get(str(column.unit), column.unit)
        tables[catalogue(name).vizier] = table
    return tables


def choose(path: Path, n: int, seed: int) -> QTable:
    """Clusters of a catalogue, at random."""
    table = QTable.read(path, format="ascii.ecsv")
    far = np.flatnonzero(np.asarray(table["z"], float) >= Z_MIN)
    return table[np.sort(np.random.default_rng(seed).choice(far, min(n, len(far)), replace=False))]


def main() -> None:
    """Rehearse, print what each step took and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--labelled", type=int, default=100)
    parser.add_argument("--unlabelled", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "lin2022.toml")
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    data, out = Path(os.environ.get("PIX2MASS_DATA", "../shared/data")), arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    with serve(published(data)) as service:
        seconds["catalogues"] = pix2mass(
            "catalog", "build", "--vizier", service.url, "--cache", out / "vizier", "--out", out / "catalogs"
        )
    chosen = {
        name: choose(out / "catalogs" / f"{name}.ecsv", n, SEED)
        for name, n in (("labelled", arguments.labelled), ("unlabelled", arguments.unlabelled))
    }
    for name, table in chosen.items():
        table.write(out / f"{name}.ecsv", format="ascii.ecsv", overwrite=True)
    names = ["id", "ra_deg", "dec_deg", "z", "richness", "log10_m500c"]
    both = vstack([table[names] for table in chosen.values()])
    both.write(out / "both.ecsv", format="ascii.ecsv", overwrite=True)

    config = tomllib.loads(arguments.config.read_text())
    grid = [item for key, value in config["grid"].items() for item in (f"--{key.replace('_', '-')}", value)]
    sky = out / "sas"
    seconds["mock frames"] = pix2mass(
        "mock", "--images", "frames", "--catalog", out / "both.ecsv", "--out", sky, "--seed", SEED, *grid,
        "--workers", arguments.workers,
    )  # fmt: skip
    frames = list(sky.rglob("frame-*.fits.bz2"))

    # The address is part of what a store is made from: the same one lets a second run of this script go on.
    kept = out / "port"
    port = int(kept.read_text()) if kept.exists() else 0
    server = ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Archive, directory=str(sky)))
    kept.write_text(str(server.server_address[1]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config["data"] |= {
        "labelled": str(out / "labelled.ecsv"),
        "unlabelled": str(out / "unlabelled.ecsv"),
        "frames": f"http://127.0.0.1:{server.server_address[1]}",
        "frame_cache": str(out / "frame-cache"),
    }
    here = out / arguments.config.name
    here.write_text(tomli_w.dumps(config))
    try:
        seconds["run"] = pix2mass("run", here, "--out", out / "run", "--workers", arguments.workers)
    finally:
        server.shutdown()
    metrics = json.loads((out / "run" / "metrics.json").read_text())
    stages = json.loads((out / "run" / "stages.json").read_text())

    print(f"\nREAL positions, redshifts and richness of {len(both)} clusters; MOCK pixels")
    size = sum(path.stat().st_size for path in frames) / 1e9
    print(f"{len(frames)} frames, {size:.2f} GB: {len(frames) / 5 / len(both):.2f} fields per cluster")
    print(f"over HTTP: {Archive.sent['requests']} files, {Archive.sent['bytes'] / 1e9:.2f} GB")
    for name, spent in seconds.items():
        print(f"{name:<24}{spent:8.0f} s")
    for name, stage in stages.items():
        print(f"  {name:<22}{stage.get('seconds', 0.0):8.0f} s")
    print(f"MAE against the published labels, from which the MOCK pixels were drawn: {metrics['mae_dex']:.3f} dex")
    result = {
        "clusters": len(both),
        "frames": len(frames),
        "gigabytes": size,
        "gigabytes_fetched": Archive.sent["bytes"] / 1e9,
        "seconds": {name: round(spent) for name, spent in seconds.items()},
        "mae_dex": metrics["mae_dex"],
        "report": (out / "run" / "report.html").is_file(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
