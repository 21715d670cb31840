"""The networks: shapes, what they may and may not depend on, and hand-worked numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pix2mass.config import GridConfig
from pix2mass.cosmology import l_star_red_mag
from pix2mass.model import (
    BandClassifier,
    Encoder,
    FusedRegressor,
    MassRegressor,
    ViewMatcher,
    _ridge,
    combine,
    dihedral,
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


def test_prepare_hides_the_noise_level_and_the_masked_pixels():
    flux = torch.randn(2, 3, 8, 8)
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


def galaxies(z: float, light: float, blue_mag: float = 0.0, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Flux (1, 3, 32, 32) of n single pixels that hold ``light`` L* of a red galaxy at z, bluer by ``blue_mag`` in g-r
    and r-i, and a noise level far below them (1, 3)."""
    mag = l_star_red_mag(z)[1:4] - np.array([2, 1, 0]) * blue_mag
    flux = torch.zeros(1, 3, 32, 32)
    for k in range(n):
        flux[0, :, 3 + 2 * k, 5 + k] = torch.tensor(light * 10 ** (-0.4 * (mag - 22.5)))
    return flux, torch.full((1, 3), 1e-3)


def seen(z: float, light: float, blue_mag: float = 0.0) -> torch.Tensor:
    """Sums of the maps that the fused encoder makes of the unsmoothed image, (17,)."""
    network, redshift = FusedRegressor(GRID), torch.tensor([z])
    flux, noise = galaxies(z, light, blue_mag)
    images, _ = prepare(flux, torch.zeros(flux.shape, dtype=torch.bool), noise)
    maps = network.encoder(network.rescale(images, noise, redshift), redshift)
    return maps[0, :17].sum(dim=(1, 2))


@pytest.mark.parametrize("z", [0.1, 0.25, 0.45])
def test_red_galaxies_are_counted_at_every_redshift_and_blue_ones_are_not(z):
    empty = seen(z, 0.0)
    red, blue = seen(z, 0.4) - empty, seen(z, 0.4, blue_mag=0.6) - empty
    assert red[4].item() == pytest.approx(12, rel=0.02), "closely on the red sequence, brighter than 0.12 L*"
    assert red[5].item() == pytest.approx(12 * 0.4, rel=0.02), "and their light, in L*"
    assert blue[4] < 0.1 * red[4]
    assert blue[14].item() == pytest.approx(red[14].item(), rel=0.02), "whatever their colour"


def test_the_fused_network_does_not_see_noise_units_or_rotations():
    network, z = FusedRegressor(GRID).eval(), torch.tensor([0.2])
    flux, noise = galaxies(0.2, 0.3)
    mask = torch.zeros(flux.shape, dtype=torch.bool)
    images = [network.rescale(prepare(flux, mask, noise * f)[0], noise * f, z) for f in (1.0, 30.0)]
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=1e-4)
    valid = torch.ones(1, 32, 32)
    for view in range(1, 8):
        torch.testing.assert_close(network.pool(images[0], valid, z), network.pool(dihedral(images[0], view), valid, z))


def test_leaving_one_out_is_what_refitting_without_each_gives(monkeypatch):
    monkeypatch.setattr("pix2mass.model._PENALTIES", np.array([1e-9]))
    rng = np.random.default_rng(1)
    terms, weight = torch.tensor(rng.normal(size=(30, 4))), torch.tensor(rng.uniform(0.5, 2, 30))
    wanted = terms @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + 3 + 0.3 * torch.tensor(rng.normal(size=30))
    change, level, missed = _ridge(terms, wanted, weight)
    design, root = np.column_stack([terms.numpy(), np.ones(30)]), np.sqrt(weight.numpy())
    whole = np.linalg.lstsq(design * root[:, None], wanted.numpy() * root, rcond=None)[0]
    np.testing.assert_allclose([*change, level], whole, atol=1e-5)
    for left_out in (0, 17):
        others = np.arange(30) != left_out
        fit = np.linalg.lstsq(design[others] * root[others, None], wanted.numpy()[others] * root[others], rcond=None)[0]
        assert missed[left_out].item() == pytest.approx(wanted[left_out].item() - design[left_out] @ fit, abs=1e-5)


def test_the_fit_finds_a_power_law_and_fine_tuning_keeps_what_few_labels_cannot_tell():
    rng = np.random.default_rng(2)
    network = FusedRegressor(GRID)
    n = len(network.pooled_mean)
    # Rings and maps of one cluster say much the same: two things differ between clusters, and some noise.
    latent = rng.normal(size=(400, 2))
    pooled = latent @ rng.normal(size=(2, n)) + 0.1 * rng.normal(size=(400, n))
    pooled, z = (torch.tensor(v, dtype=torch.float32) for v in (pooled, rng.uniform(0.1, 0.5, 400)))
    mass = 14.5 + torch.tensor(0.3 * latent[:, 0] - 0.2 * latent[:, 1], dtype=torch.float32) + 0.5 * (z - 0.3)
    label = mass + 0.1 * torch.tensor(rng.normal(size=400), dtype=torch.float32)
    network.fit(pooled[:300], z[:300], label[:300], torch.full((300,), 0.1), seed=1)
    estimate, sigma = network.from_pooled(pooled[300:], z[300:])
    assert (estimate - mass[300:]).abs().mean() < 0.4 * (mass - mass.mean()).abs().mean() and (sigma > 0).all()
    before, few = (estimate - mass[300:]).std().item(), torch.arange(12)
    network.fit(pooled[few], z[few], label[few] + 0.5, torch.full((12,), 0.1), seed=1, tune=True)
    moved = network.from_pooled(pooled[300:], z[300:])[0] - mass[300:]
    assert moved.mean().item() == pytest.approx(0.5, abs=0.15)
    assert moved.std().item() < before + 0.05


def test_views_are_matched_by_what_they_show():
    torch.manual_seed(5)
    matcher = ViewMatcher(Encoder()).eval()
    with torch.no_grad():
        images = torch.cat([30 * torch.eye(32)[None, None], torch.zeros(1, 1, 32, 32), torch.randn(1, 1, 32, 32)])
        logits = matcher(torch.cat([images, images]))
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits.diagonal(), torch.full((3,), 5.0))
    assert (logits.argmax(dim=1) == torch.arange(3)).all()
