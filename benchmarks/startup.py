"""Claim: ``import pix2mass`` takes under 0.5 s and does not import torch; ``pix2mass --help`` takes under 1 s.

Whole processes, several runs after a warm-up, beside a bare ``python -c pass``. Run: python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import pix2mass": [sys.executable, "-c", "import pix2mass, sys; assert 'torch' not in sys.modules"],
    "pix2mass --help": [str(Path(sys.executable).with_name("pix2mass")), "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Time each command, print the table and the JSON line."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    print(f"{'command':<18} {'median':>7} {'min':>7} {'max':>7}  seconds, {RUNS} runs")
    for name, values in times.items():
        print(f"{name:<18} {statistics.median(values):7.3f} {min(values):7.3f} {max(values):7.3f}")
    print(
        json.dumps(
            {
                "import_s": statistics.median(times["import pix2mass"]),
                "help_s": statistics.median(times["pix2mass --help"]),
                "python_s": statistics.median(times["python -c pass"]),
            }
        )
    )


if __name__ == "__main__":
    main()
