"""Statistics of the pixels, against the same by hand."""

from __future__ import annotations

import numpy as np
import torch

from pix2mass.model import prepare
from pix2mass.trust import image_statistics


def test_statistics_are_those_of_the_usable_pixels():
    rng = np.random.default_rng(5)
    flux = rng.normal(size=(1, 2, 24, 24)).astype(np.float32)
    flux[..., 9:15, 9:15] += 4.0
    mask = np.zeros(flux.shape, bool)
    mask[0, 1, :, :7] = True
    flux[mask] = np.nan
    noise = np.array([[1.0, 0.5]], np.float32)

    tensors = torch.from_numpy(flux), torch.from_numpy(mask), torch.from_numpy(noise)
    found = image_statistics(prepare(*tensors)[0], *tensors[1:])[0]

    x = np.arcsinh(flux[0].astype(float) / noise[0][:, None, None])
    y, across = (np.mgrid[:24, :24] + 0.5) / 12 - 1
    radius = np.hypot(y, across)
    centred = x - np.nanmean(x, axis=(1, 2), keepdims=True)
    for band in range(2):
        usable, own = ~mask[0, band], centred[band]
        one = x[band][usable]
        mean, spread, faint, bright, neighbours, contrast, ln_noise = found[7 * band : 7 * band + 7]
        np.testing.assert_allclose([mean, spread], [one.mean(), one.std()], rtol=1e-5)
        assert abs((one < faint).mean() - 0.1) < 0.01 and abs((one < bright).mean() - 0.98) < 0.01
        filled = np.nan_to_num(own)
        products = [filled[:, 1:] * filled[:, :-1], filled[1:] * filled[:-1]]
        by_hand = sum(product.mean() for product in products) / (2 * usable.mean() * one.var())
        np.testing.assert_allclose(neighbours, by_hand, rtol=1e-4)
        inner, outer = (np.nanmean(x[band][where]) for where in (radius < 0.25, radius > 0.5))
        np.testing.assert_allclose(contrast, inner - outer, rtol=1e-4)
        np.testing.assert_allclose(ln_noise, np.log(noise[0, band]), atol=1e-6)
    shared = np.nan_to_num(centred[0] * centred[1]).mean()
    scale = np.sqrt(np.nanvar(x[0]) * np.nanvar(x[1]) * (~mask[0, 1]).mean())
    np.testing.assert_allclose(found[14], shared / scale, rtol=1e-4)


def test_a_band_without_pixels_has_no_statistics():
    flux, mask = torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    mask[0, 1] = True
    noise = torch.tensor([[1.0, torch.nan]])
    found = image_statistics(prepare(flux, mask, noise)[0], mask, noise)[0]
    assert np.isfinite(found[:4]).all() and np.isnan(found[7:14]).all()
