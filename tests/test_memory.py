"""Memory that large arrays free serves the next ones."""

from __future__ import annotations

import subprocess
import sys

import pytest

_COUNT = """
import resource, sys
import numpy as np
from pix2mass.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
np.ones(32 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(32 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of the GNU C library")
def test_arrays_get_their_pages_once():
    """Page faults of four arrays of 256 MB, each freed before the next, after a first one."""

    def faults(how: str) -> int:
        ran = subprocess.run([sys.executable, "-c", _COUNT, how], capture_output=True, text=True, check=True)
        return int(ran.stdout)

    assert faults("kept") < 0.1 * faults("as it is")
