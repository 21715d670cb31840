"""Configs: every shipped file parses, nothing is lost in TOML, mistakes are named with the nearest right key."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pix2mass.config import (
    BuildConfig,
    Config,
    DataConfig,
    GridConfig,
    MockConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
    load_toml,
    to_toml,
    validate,
)
from pix2mass.types import BANDS, Pix2massError

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_parses_and_comes_back(path, tmp_path):
    config = load_toml(RunConfig, path)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_toml(RunConfig, tmp_path / "again.toml") == config


@settings(max_examples=30, deadline=None)
@given(
    bands=st.sets(st.sampled_from(BANDS), min_size=1).map(lambda chosen: "".join(b for b in BANDS if b in chosen)),
    width=st.floats(1.0, 1e5),
    in_arcsec=st.booleans(),
    n_pixels=st.integers(8, 512),
    seed=st.integers(0, 2**31),
    learning_rate=st.floats(1e-8, 1.0),
    folds=st.integers(2, 50),
    scatter=st.floats(0, 1),
)
def test_toml_round_trip(bands, width, in_arcsec, n_pixels, seed, learning_rate, folds, scatter):
    grid = {"bands": bands, "width_arcsec" if in_arcsec else "width_kpc": width, "n_pixels": n_pixels}
    config = RunConfig(
        name="trip",
        seed=seed,
        mock=MockConfig(label_scatter_dex=scatter),
        grid=GridConfig(**grid),
        train=TrainConfig(folds=folds, learning_rate=learning_rate),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(to_toml(config))
        assert load_toml(RunConfig, path) == config


def test_a_width_in_arcsec_takes_the_place_of_the_default():
    assert GridConfig().width_kpc == 2000
    grid = GridConfig(width_arcsec=600)
    assert grid.width_kpc is None and grid.width_arcsec == 600


@pytest.mark.parametrize("widths", [{"width_kpc": 1000, "width_arcsec": 600}, {"width_kpc": None}])
def test_both_widths_or_none_are_refused(widths):
    with pytest.raises(Pix2massError, match="either width_kpc or width_arcsec"):
        validate(GridConfig, widths, "here")


@pytest.mark.parametrize("bands", ["zirgu", "gg", "y", ""])
def test_bands_must_be_known_and_in_order(bands):
    with pytest.raises(Pix2massError, match="in that order"):
        validate(GridConfig, {"bands": bands}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"epohcs": 3}}, r"train\.epohcs: unknown key; did you mean 'epochs'\?"),
        ({"mock": {"z_mni": 0.1}}, r"mock\.z_mni: unknown key; did you mean 'z_min'\?"),
        ({"gird": {}}, r"gird: unknown key; did you mean 'grid'\?"),
        ({"grid": {"xxxxxxxx": 1}}, r"grid\.xxxxxxxx: unknown key; known keys: bands, width_kpc"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(values, message):
    with pytest.raises(Pix2massError, match=message):
        validate(RunConfig, {"name": "a", "mock": {}, **values}, "run.toml")


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(Pix2massError) as caught:
        validate(RunConfig, {"name": "a", "mock": {}, "train": {"folds": 1, "views": 99}, "sed": 3}, "run.toml")
    text = str(caught.value)
    assert text.startswith("run.toml: the configuration is not valid")
    assert all(part in text for part in ("train.folds", "got 1", "train.views", "got 99", "did you mean 'seed'"))


@pytest.mark.parametrize(
    ("config_class", "values", "message"),
    [
        (RunConfig, {"name": "a"}, r"either a \[mock\] table or a \[data\] table"),
        (RunConfig, {"name": "a", "mock": {}, "data": {"labelled": "a", "unlabelled": "b"}}, r"either a \[mock\]"),
        (RunConfig, {"name": "../a", "mock": {}}, "name"),
        (MockConfig, {"z_min": 0.4, "z_max": 0.3}, "below its _max"),
        (MockConfig, {"ebv_min_mag": 0.2, "ebv_max_mag": 0.1}, "ebv_min_mag"),
        (TrainConfig, {"from_scratch": True}, "freeze_encoder = false"),
        (BuildConfig, {"hips": True, "frames": "a"}, "give one source of images"),
        (BuildConfig, {"frames": "a", "cutouts": "b"}, "give one source of images"),
        (PretrainConfig, {"epochs": 0}, "epochs"),
        (PretrainConfig, {"task": "contrastive", "units": "l-star"}, "'contrastive' needs units = 'noise'"),
        (
            TrainConfig,
            {"network": "gaussian-process", "freeze_encoder": False, "start_from": "a"},
            "has no use for start_from, freeze_encoder: leave that out",
        ),
        (TrainConfig, {"network": "galaxies", "epochs": 9, "views": 8}, "has no use for epochs, views: leave that out"),
        (TrainConfig, {"network": "gaussian-process", "use_redshift": False}, "needs use_redshift"),
        (TrainConfig, {"ensemble_size": 3}, "ensemble_size is for network = 'galaxies'"),
    ],
)
def test_contradictions_are_refused(config_class, values, message):
    with pytest.raises(Pix2massError, match=message):
        validate(config_class, values, "here")


def test_configs_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        GridConfig().n_pixels = 32  # type: ignore[misc]


def test_every_field_says_what_it_is():
    classes = [BuildConfig, DataConfig, GridConfig, MockConfig, PretrainConfig, TrainConfig]
    fields = {f"{c.__name__}.{name}": field for c in classes for name, field in c.model_fields.items()}
    assert [name for name, field in fields.items() if not field.description] == []
    assert issubclass(RunConfig, Config)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(Pix2massError, match=r"none\.toml: no such file or directory; expected a TOML"):
        load_toml(RunConfig, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(Pix2massError, match=r"bad\.toml: not a TOML file"):
        load_toml(RunConfig, tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Pix2massError, match=r"bytes\.toml: not a TOML file"):
        load_toml(RunConfig, tmp_path / "bytes.toml")
