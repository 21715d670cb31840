"""The networks: shapes, what they may and may not depend on, and hand-worked numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from pix2mass import stretch
from pix2mass.config import GridConfig
from pix2mass.model import (
    BandClassifier,
    Encoder,
    MassRegressor,
    ProcessRegressor,
    ViewMatcher,
    combine,
    dihedral,
    make_units,
    negative_log_likelihood,
    prepare,
)
from pix2mass.types import Pix2massError


def random_images(
    n: int, bands: int = 3, size: int = 32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, bands, size, size, generator=generator)
    return images, torch.ones(n, size, size), 0.1 + 0.3 * torch.rand(n, generator=generator)


@pytest.fixture
def regressor() -> MassRegressor:
    torch.manual_seed(1)
    regressor = MassRegressor(Encoder(), n_bands=3)
    images, _, z = random_images(16, seed=9)
    with torch.no_grad():
        for _ in range(3):
            regressor.encoder(images.reshape(-1, 1, 32, 32))  # batch statistics away from their start
        regressor.eval()
        regressor.fit_scaler(14.5 + 0.3 * torch.randn(16), z, regressor.features(images))
    return regressor


@given(arrays(np.float32, 20, elements=st.floats(-(2.0**40), 2.0**40, width=32)))
def test_the_stretch_is_asinh_and_sinh_undoes_it(x):
    stretched = stretch.asinh(torch.from_numpy(x))
    np.testing.assert_allclose(stretched.numpy(), np.arcsinh(x.astype(float)), rtol=1e-6, atol=3e-7)
    np.testing.assert_allclose(stretch.sinh(stretched).numpy(), x, rtol=2e-5, atol=3e-7)


def test_the_stretch_of_absurd_values_is_a_number():
    found = stretch.asinh(torch.tensor([3e38, -3e38, torch.inf, 0.0]))
    torch.testing.assert_close(found, torch.tensor([math.asinh(1e18), -math.asinh(1e18), math.asinh(1e18), 0.0]))


def test_prepare_hides_the_noise_level_and_the_masked_pixels():
    flux = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    mask[0, 1, :4] = True
    noise = torch.tensor([[1.0, 2.0, 3.0], [0.5, torch.nan, 1.0]])
    images, valid = prepare(flux, mask, noise)
    scaled, _ = prepare(flux * 7.0, mask, noise * 7.0)
    torch.testing.assert_close(images, scaled)
    assert (images[0, 1, :4] == 0).all() and (images[1, 1] == 0).all()
    assert images[0, 0, 0, 0].item() == pytest.approx(math.asinh(flux[0, 0, 0, 0].item() / 1.0), rel=1e-5)
    torch.testing.assert_close(valid[0, :4], torch.full((4, 8), 2 / 3))
    torch.testing.assert_close(valid[0, 4:], torch.ones(4, 8))
    torch.testing.assert_close(valid[1], torch.full((8, 8), 2 / 3))


def test_the_eight_views_are_different_and_keep_the_pixels():
    image = torch.arange(9.0).reshape(1, 3, 3)
    views = [dihedral(image, view) for view in range(8)]
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    assert all(sorted(view.flatten().tolist()) == sorted(image.flatten().tolist()) for view in views)
    assert torch.equal(views[0], image)


def test_combine_hand_worked():
    mean, sigma = combine(torch.tensor([[14.0, 15.0], [14.2, 15.0]]), torch.tensor([[0.1, 0.3], [0.1, 0.1]]))
    torch.testing.assert_close(mean, torch.tensor([14.1, 15.0]))
    torch.testing.assert_close(sigma, torch.tensor([math.sqrt(0.01 + 0.01), math.sqrt(0.05)]))


def test_likelihood_hand_worked_and_least_at_the_label():
    loss = negative_log_likelihood(*(torch.tensor([value]) for value in (14.0, 0.3, 14.5, 0.4)))
    assert loss.item() == pytest.approx(0.5 * (math.log(0.25) + 0.25 / 0.25))
    at = [
        negative_log_likelihood(torch.tensor([m]), *(torch.tensor([v]) for v in (0.3, 14.5, 0.1))).item()
        for m in (14.3, 14.5, 14.7)
    ]
    assert at[1] < at[0] and at[1] < at[2]


def test_one_seven_and_many_clusters_give_the_same_numbers(regressor):
    images, valid, z = random_images(19)
    with torch.no_grad():
        together = regressor(images, valid, z)
        for size in (1, 7):
            parts = [regressor(images[i : i + size], valid[i : i + size], z[i : i + size]) for i in range(0, 19, size)]
            for whole, split in zip(together, zip(*parts, strict=True), strict=True):
                torch.testing.assert_close(whole, torch.cat(split), atol=1e-5, rtol=1e-5)
    assert together[0].shape == (19,) and (together[1] > 0).all()
    assert regressor(images[:1], valid[:1], z[:1])[0].shape == (1,)


def test_band_order_and_redshift_matter_and_redshift_can_be_switched_off(regressor):
    images, valid, z = random_images(5)
    with torch.no_grad():
        base = regressor(images, valid, z)[0]
        assert not torch.allclose(base, regressor(images[:, [1, 0, 2]], valid, z)[0])
        assert not torch.allclose(base, regressor(images, valid, z + 0.1)[0])
        torch.manual_seed(2)
        without = MassRegressor(Encoder(), 3, use_redshift=False).eval()
        torch.testing.assert_close(without(images, valid, z)[0], without(images, valid, z + 0.1)[0])


def test_what_lies_outside_the_image_has_no_say(regressor):
    images, valid, z = random_images(4)
    valid[:, :, 16:] = 0
    levels = regressor.features(images)
    changed = [level.clone() for level in levels]
    for level in changed:
        level[..., level.shape[-1] // 2 :] += 5.0
    with torch.no_grad():
        base = regressor.from_features(levels, valid, z)
        for before, after in zip(base, regressor.from_features(changed, valid, z), strict=True):
            torch.testing.assert_close(before, after)
        full = regressor.from_features(levels, torch.ones_like(valid), z)
        assert not torch.allclose(full[0], base[0])


def test_every_parameter_learns():
    torch.manual_seed(3)
    regressor = MassRegressor(Encoder(), 3)
    images, valid, z = random_images(8)
    mean, sigma = regressor(images, valid, z)
    negative_log_likelihood(mean, sigma, 14.5 + torch.randn(8), torch.full((8,), 0.1)).backward()
    for name, parameter in regressor.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_overfits_eight_images():
    torch.manual_seed(4)
    regressor = MassRegressor(Encoder(), 3)
    images, valid, z = random_images(8)
    label = torch.linspace(13.8, 15.2, 8)
    regressor.eval()
    with torch.no_grad():
        regressor.fit_scaler(label, z, regressor.features(images))
    optimizer = torch.optim.Adam(regressor.parameters(), 3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        mean, sigma = regressor(images, valid, z)
        negative_log_likelihood(mean, sigma, label, torch.full((8,), 0.05)).backward()
        optimizer.step()
    assert (mean - label).abs().max() < 0.1


@pytest.mark.parametrize("name", ["small", "resnet18", "efficientnet_lite0"])
def test_encoders_by_name(name):
    encoder = Encoder(name).eval()
    levels = encoder(torch.randn(2, 1, 64, 64))
    assert [level.shape for level in levels] == [
        (2, channels, 64 // stride, 64 // stride)
        for channels, stride in zip(encoder.channels, encoder.strides, strict=True)
    ]
    assert BandClassifier(encoder, 5)(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    assert MassRegressor(encoder, 5).eval()(*random_images(2, bands=5, size=64))[0].shape == (2,)


def test_an_unknown_encoder_is_named_with_similar_ones():
    with pytest.raises(Pix2massError, match=r"resnet181.*similar names: .*resnet18"):
        Encoder("resnet181")


# ---- encoders of one's own -------------------------------------------------------------------------------------------


def test_an_encoder_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = Encoder("my_encoders:two_levels")
    assert (encoder.channels, encoder.strides) == ((8, 16), (2, 4))
    assert MassRegressor(encoder, 3).eval()(*random_images(2))[0].shape == (2,)
    assert BandClassifier(encoder, 3)(torch.randn(2, 1, 32, 32)).shape == (2, 3)


EXAMPLE = next(
    block.split("```")[0]
    for block in (Path(__file__).parents[1] / "docs" / "encoders.md").read_text().split("```python\n")[1:]
)
"""The example of the documentation."""


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("no_such_module:f", "No module named"),
        ("math:no_such_function", "no attribute"),
        ("math:pi", "failed with TypeError"),
        ("torch.nn:Identity", "expected a list of feature maps"),
    ],
)
def test_what_is_no_encoder_says_so(name, match):
    with pytest.raises(Pix2massError, match=match):
        Encoder(name)


# ---- all bands together ----------------------------------------------------------------------------------------------

GRID = GridConfig(bands="gri", width_kpc=2400.0, n_pixels=128)


def test_views_are_matched_by_what_they_show():
    torch.manual_seed(5)
    matcher = ViewMatcher(Encoder()).eval()
    with torch.no_grad():
        images = torch.cat([30 * torch.eye(32)[None, None], torch.zeros(1, 1, 32, 32), torch.randn(1, 1, 32, 32)])
        logits = matcher(torch.cat([images, images]))
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits.diagonal(), torch.full((3,), 5.0))
    assert (logits.argmax(dim=1) == torch.arange(3)).all()


def process_regressor(grid: GridConfig, n: int = 40) -> tuple[ProcessRegressor, tuple[torch.Tensor, ...]]:
    """One fitted to noise whose strength tells the mass, and these images."""
    torch.manual_seed(3)
    regressor = ProcessRegressor(Encoder().eval(), len(grid.bands), make_units({"units": "l-star"}, grid)).eval()
    mass = torch.linspace(14, 15, n)
    images = (mass - 13.5)[:, None, None, None] * torch.randn(n, len(grid.bands), 32, 32)
    noise, z = torch.ones(n, len(grid.bands)), torch.full((n,), 0.2)
    valid = torch.ones(n, 32, 32)
    with torch.no_grad():
        described = regressor.described(regressor.rescale(images, noise, z), valid, z)
    regressor.fit(described, z, mass, torch.full((n,), 0.1), 1)
    return regressor, (images, valid, noise, z)


def test_a_gaussian_process_on_features_has_the_gradient_of_its_mass():
    regressor, (images, valid, noise, z) = process_regressor(GridConfig(bands="gri", n_pixels=32))
    one = tuple(values[20:21] for values in (valid, noise, z))
    network = regressor.for_maps(images[20:21], *one)
    image = images[20:21].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(image, *one).sum(), image)
    along = gradient / gradient.norm()
    with torch.no_grad():
        change = (network(image + 0.5 * along, *one) - network(image - 0.5 * along, *one)) / 1.0
    assert change.item() == pytest.approx(gradient.norm().item(), rel=0.02) and change > 1e-3


class SameImage(nn.Module):
    """An encoder whose one feature is the image."""

    channels, strides = (1,), (1,)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image]


def test_rings_hold_the_mean_and_the_peaks_of_a_feature_band_by_band():
    regressor = ProcessRegressor(SameImage(), 2)  # type: ignore[arg-type]
    images = torch.ones(1, 2, 64, 64)
    images[:, 0, ::2, 1::2] = 3.0  # one pixel in each of 32 x 32 cells: 1.5 in the mean
    images[:, 1] = 0.25
    means, peaks = regressor.described(images, torch.ones(1, 64, 64), torch.tensor([0.2])).values.sinh().chunk(2, dim=1)
    of_feature = means.unflatten(1, (4, 2)) * 0.5
    torch.testing.assert_close(of_feature, torch.tensor([1.5, 0.25]).expand(1, 4, 2), atol=0.02, rtol=0)
    torch.testing.assert_close(peaks.unflatten(1, (4, 2)) * 0.5, torch.tensor([3.0, 0.25]).expand(1, 4, 2))
    place, feature = regressor.process.groups
    assert place.tolist() == 2 * list(range(8)) and feature.tolist() == [0] * 8 + [1] * 8


def test_a_ring_without_pixels_says_nothing_and_the_others_stay():
    regressor, (images, valid, noise, z) = process_regressor(GridConfig(bands="gri", n_pixels=32))
    light = regressor.rescale(images, noise, z)
    y, x = (torch.arange(32) + 0.5 - 16) / 16, (torch.arange(32) + 0.5 - 16) / 16
    inner = (torch.hypot(y[:, None], x) < 0.3).float().expand(40, -1, -1)
    whole = regressor.described(light, valid, z).values
    part = regressor.described(light, inner, z).values
    first = slice(0, 4 * 3 * 16)  # the finest level: ring by ring, band by band
    rings = part[:, first].unflatten(1, (4, 3, 16))
    assert torch.isnan(rings[:, 3]).all() and not torch.isnan(rings[:, 0]).any()
    torch.testing.assert_close(rings[:, 0], whole[:, first].unflatten(1, (4, 3, 16))[:, 0], atol=0.2, rtol=0.2)
    mean, sigma = regressor(light, inner, z)
    assert torch.isfinite(mean).all() and torch.isfinite(sigma).all()
    light[:, 1] = 0.0  # a band that is missing
    rings = regressor.described(light, valid, z).values[:, first].unflatten(1, (4, 3, 16))
    assert torch.isnan(rings[:, :, 1]).all() and not torch.isnan(rings[:, :, [0, 2]]).any()
