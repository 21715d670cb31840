"""What all tests share. Nothing heavy is imported here, so that a single quick test stays quick."""

from __future__ import annotations

import os

# The tests' arrays are small: one thread each leaves the cores to pytest-xdist. Must be set before numpy or torch load.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run of a test."""
    return np.random.default_rng(20260101)
