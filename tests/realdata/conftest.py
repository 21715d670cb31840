"""Real data: every test in this folder carries the marker ``realdata`` and needs the folder named by PIX2MASS_DATA."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and of no other."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.realdata)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real SDSS data and published catalogues."""
    folder = os.environ.get("PIX2MASS_DATA")
    if not folder:
        pytest.skip("PIX2MASS_DATA is not set: it names the folder of real SDSS data")
    path = Path(folder)
    if not (path / "sas").is_dir():
        pytest.skip(f"PIX2MASS_DATA = {folder}: no folder sas/ there")
    return path
