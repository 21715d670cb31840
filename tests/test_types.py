"""The nouns: bands in order, flags with names, cutouts whose arrays fit each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pix2mass.types import (
    BANDS,
    EXTINCTION_PER_EBV,
    FLAG_MEANING,
    Cutout,
    Flag,
    Pix2massError,
    check_bands,
    empty_cutout,
)


@given(st.sets(st.sampled_from(BANDS), min_size=1))
def test_any_ordered_subset_of_bands_is_good(chosen):
    text = "".join(band for band in BANDS if band in chosen)
    assert check_bands(text) == text == check_bands(list(text))


@given(st.text(alphabet="ugrizy", max_size=7))
def test_all_other_bands_are_refused(text):
    good = text != "" and text == "".join(band for band in BANDS if band in text)
    if good:
        assert check_bands(text) == text
    else:
        with pytest.raises(Pix2massError, match="expected one or more of 'ugriz' in that order"):
            check_bands(text)


def test_every_flag_has_a_name_and_a_meaning():
    assert set(FLAG_MEANING) == set(Flag)
    assert len({flag.value for flag in Flag}) == len(Flag)
    assert all(flag.value.bit_count() == 1 for flag in Flag)
    assert str(Flag.NO_ESTIMATE | Flag.OUTSIDE) == "OUTSIDE|NO_ESTIMATE"
    assert str(Flag(0)) == "" and Flag(0).names == ()


def test_every_band_has_an_extinction_that_falls_with_wavelength():
    values = [EXTINCTION_PER_EBV[band] for band in BANDS]
    assert values == sorted(values, reverse=True)


def make(**changes) -> Cutout:
    shape = (2, 4, 6)
    parts = {
        "flux": np.ones(shape, np.float32),
        "sigma": np.ones(shape, np.float32),
        "mask": np.zeros(shape, bool),
        "bands": "gr",
        "ra_deg": 10.0,
        "dec_deg": 0.0,
        "pixel_scale_arcsec": 1.0,
        "psf_fwhm_arcsec": np.ones(2, np.float32),
    }
    return Cutout(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bands": "rg"}, "in that order"),
        ({"bands": "gri"}, r"flux: expected shape \(3, h, w\)"),
        ({"flux": np.ones((4, 6), np.float32)}, "flux: expected shape"),
        ({"sigma": np.ones((2, 4, 5), np.float32)}, "sigma: expected shape"),
        ({"mask": np.zeros((1, 4, 6), bool)}, "mask: expected shape"),
        ({"mask": np.zeros((2, 4, 6), np.uint8)}, "mask: expected bool, got uint8"),
        ({"psf_fwhm_arcsec": np.ones(3, np.float32)}, "psf_fwhm_arcsec: expected shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(Pix2massError, match=message):
        make(**changes)


def test_coverage_is_the_share_of_pixels_that_may_be_used():
    mask = np.zeros((2, 4, 6), bool)
    mask[0, :, :3] = True
    assert make(mask=mask).coverage == pytest.approx(0.75)
    empty = empty_cutout("gri", 8, 1.0, 2.0, 0.5, Flag.OUTSIDE)
    assert empty.coverage == 0 and empty.flux.shape == (3, 8, 8) and empty.flags == Flag.OUTSIDE
    assert np.isnan(empty.psf_fwhm_arcsec).all()
