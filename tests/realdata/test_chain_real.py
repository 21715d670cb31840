"""The chain on real SDSS pixels, at the size of a test; benchmarks/real_fields.py is the full-size run."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.table import vstack

from pix2mass.catalog import check_catalog
from pix2mass.config import GridConfig, MockConfig, PretrainConfig, TrainConfig
from pix2mass.images.frame_index import FrameIndex, random_positions
from pix2mass.images.frames import FrameSource
from pix2mass.images.mock.population import draw_clusters
from pix2mass.images.mock.source import MockSource
from pix2mass.predict import predict
from pix2mass.run import RunFolder
from pix2mass.store import build
from pix2mass.train import leave_one_group_out, pretrain, train
from pix2mass.types import Flag

CLUSTER = {"id": ["RMJ222655.7-005503.6"], "ra_deg": [336.73222], "dec_deg": [-0.91766], "z": [0.245]}


@pytest.fixture(scope="module")
def index(real_data):
    return FrameIndex.from_base(real_data / "sas")


@pytest.mark.slow
def test_bands_of_a_field_not_seen_are_told(real_data, index, tmp_path):
    """Chance is 0.2. Normalised to unit noise, so that only what is in the image can tell."""
    grid = GridConfig(width_kpc=None, width_arcsec=50.0)
    positions = random_positions(index, 60, 1, margin_arcsec=36.0)
    with FrameSource(real_data / "sas", grid, index) as source:
        store = build(positions, source, tmp_path / "stamps.zarr", grid)
    assert len(store) == 360 and np.isfinite(store.noise).all()
    config = PretrainConfig(epochs=15, accelerator="cpu")
    results = leave_one_group_out(store, RunFolder(tmp_path / "run"), config, 1)
    accuracy = np.array([result["band_accuracy"] for result in results.values()])
    assert len(accuracy) == 6
    # Measured 0.390 with a spread over fields of 0.021 of the mean (benchmarks/real_fields.py); the limit is 3 below.
    assert accuracy.mean() > 0.327
    assert accuracy.min() > 0.2


@pytest.mark.slow
def test_a_real_cluster_is_heavier_than_empty_sky(real_data, index, tmp_path):
    """Trained on the mock sky alone; the cluster is 0.8' from the edge of its frame."""
    folder, grid = RunFolder(tmp_path / "run"), GridConfig()
    mock = MockConfig(n_labelled=300, n_unlabelled=60, z_min=0.1, z_max=0.4)
    source = MockSource(mock, grid, 1)
    unlabelled = build(draw_clusters(mock, 60, 1, "U"), source, tmp_path / "unlabelled.zarr", grid)
    catalog = check_catalog(draw_clusters(mock, 300, 1, "L"), "mock")
    labelled = build(catalog, source, tmp_path / "labelled.zarr", grid)
    pretrain(unlabelled, folder, PretrainConfig(epochs=8, accelerator="cpu"), 1)
    config = TrainConfig(folds=2, epochs=25, views=1, accelerator="cpu")
    train(labelled, catalog, np.arange(300) % 2, folder, config, 1)
    folder.write_provenance(1)

    empty = random_positions(index, 6, 1, margin_arcsec=60.0, z=0.245)
    empty = empty[[group != "94-1-0012" for group in empty["group"]]]
    cluster = type(empty)({**CLUSTER, "group": ["94-1-0012"]})
    with FrameSource(real_data / "sas", grid, index) as source:
        store = build(vstack([cluster, empty]), source, tmp_path / "masses.zarr", grid)
    table = predict(folder, store)
    mass = np.asarray(table["log10_m500c"])
    assert Flag.PARTLY_OUTSIDE in Flag(int(table["flags"][0]))
    # Published richness 28 to 32 says 14.1 to 14.2; the relation scatters by 0.2 dex.
    assert 13.8 < mass[0] < 14.6
    assert (mass[1:] < mass[0]).mean() >= 0.9
    assert np.median(mass[1:]) < mass[0] - 0.15
