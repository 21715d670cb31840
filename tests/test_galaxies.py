"""The network that weighs sources: what it finds and describes, by hand-made images, and what it can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2mass.config import GridConfig
from pix2mass.cosmology import l_star_red_mag
from pix2mass.galaxies import Described, GalaxyRegressor
from pix2mass.model import dihedral, prepare

GRID = GridConfig(bands="gri", n_pixels=32, width_kpc=400)
PLACES = [(3 + 4 * (k // 5), 4 + 5 * (k % 5)) for k in range(20)]


def picture(z: float, light: float, blue_mag: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Flux (1, 3, 32, 32) of single pixels that hold ``light`` L* of a red galaxy at z, bluer by ``blue_mag`` in g-r
    and r-i, and a noise level far below them (1, 3)."""
    mag = l_star_red_mag(z)[1:4] - np.array([2, 1, 0]) * blue_mag
    flux = torch.zeros(1, 3, 32, 32)
    for row, column in PLACES:
        flux[0, :, row, column] = torch.tensor(light * 10 ** (-0.4 * (mag - 22.5)))
    return flux, torch.full((1, 3), 1e-3)


def light_of(network: GalaxyRegressor, flux: torch.Tensor, noise: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    images, _ = prepare(flux, torch.zeros(flux.shape, dtype=torch.bool), noise)
    return network.rescale(images, noise, z)


def described(z: float, light: float, blue_mag: float = 0.0) -> Described:
    network, redshift = GalaxyRegressor(GRID), torch.tensor([z])
    flux, noise = picture(z, light, blue_mag)
    return network.described(light_of(network, flux, noise, redshift), torch.ones(1, 32, 32), redshift)


@pytest.mark.parametrize("z", [0.1, 0.25, 0.45])
def test_red_galaxies_look_alike_at_every_redshift_and_blue_ones_do_not(z):
    red, blue = described(z, 0.4), described(z, 0.4, blue_mag=0.6)
    assert len(red.image) == len(blue.image) == len(PLACES)
    torch.testing.assert_close(red.share, torch.ones(20))
    assert red.values[:, 0] == pytest.approx(np.log(0.4), abs=0.01), "the light in L*"
    colours = slice(3, 7, 2)
    assert red.values[:, colours].abs().max() < 0.02, "on the red sequence in g-r and r-i"
    assert blue.values[:, colours].min() > 1.5, "far from it"


def test_places_are_found_and_distances_are_in_kpc():
    network, z = GalaxyRegressor(GRID), torch.tensor([0.2])
    flux, noise = picture(0.2, 0.4)
    light = light_of(network, flux, noise, z)
    sources = network.encoder.find(light, torch.ones(1, 32, 32), z)
    assert list(zip(sources.row.tolist(), sources.column.tolist(), strict=True)) == PLACES
    values = network.encoder.describe(sources.near(light), torch.ones(1, 32, 32), z, sources).values
    radius_kpc = 400 / 32 * np.hypot(*(np.array(PLACES).T - 15.5))
    assert 1000 * values[:, -3] == pytest.approx(radius_kpc, rel=1e-3)


def test_noise_alone_and_galaxies_too_faint_count_nothing():
    network, z = GalaxyRegressor(GRID), torch.tensor([0.45])
    noise = network.encoder.at(network.encoder.sigma * network.encoder.l_star, z)
    flux = noise[..., None, None] * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = network.described(light_of(network, flux, noise, z), torch.ones(1, 32, 32), z)
    assert seen.share.sum() < 1, "32 x 32 pixels of noise"
    assert len(described(0.2, 0.03).image) == 0
    faint = described(0.2, 0.09).share
    assert len(faint) == len(PLACES) and faint.min() > 0 and faint.max() < 1


def trained(seed: int = 0) -> GalaxyRegressor:
    """A network with random weights for all that can be learnt."""
    torch.manual_seed(seed)
    network = GalaxyRegressor(GRID)
    for values in network.parameters():
        torch.nn.init.normal_(values, std=0.3)
    network.value_scale += 0.5
    return network.eval()


def test_masses_do_not_depend_on_noise_units_or_rotations():
    network, z = trained(), torch.tensor([0.2])
    flux, noise = picture(0.2, 0.3)
    first, second = (light_of(network, flux, noise * f, z) for f in (1.0, 30.0))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    valid = torch.ones(1, 32, 32)
    mass = network(first, valid, z)[0]
    for view in range(1, 8):
        torch.testing.assert_close(network(dihedral(first, view), valid, z)[0], mass, atol=1e-5, rtol=0)


def test_what_is_masked_is_made_up_for_by_the_rest_of_its_ring():
    network, z = GalaxyRegressor(GRID), torch.tensor([0.2])
    flux, noise = picture(0.2, 0.4)
    light, half = light_of(network, flux, noise, z), torch.ones(1, 32, 32)
    half[..., 16:] = 0
    seen = network.described(light * half[:, None], half, z)
    assert len(seen.image) == sum(column < 16 for _, column in PLACES)
    torch.testing.assert_close(seen.share, torch.full((len(seen.image),), 2.0))


def test_with_fixed_places_it_is_the_same_network_and_its_taps_sum_to_what_it_uses():
    network, z = trained(), torch.tensor([0.2])
    flux, noise = picture(0.2, 0.3)
    images, valid = prepare(flux, torch.zeros(flux.shape, dtype=torch.bool), noise)
    fixed = network.for_maps(images, valid, noise, z)
    taps: list[torch.Tensor] = []
    fixed.tap.register_forward_hook(lambda module, inputs, output: taps.append(output))
    mass = network(network.rescale(images, noise, z), valid, z)[0]
    torch.testing.assert_close(fixed(images, valid, noise, z), mass)
    torch.testing.assert_close(network.from_sums(taps[0].sum(dim=(2, 3)), z)[0], mass)
    twice = fixed(images.repeat(2, 1, 1, 1), valid.repeat(2, 1, 1), noise.repeat(2, 1), z.repeat(2))
    torch.testing.assert_close(twice, mass.repeat(2))
    pixels = fixed.to_pixels(torch.arange(1.0, 21.0)[None, None], (32, 32))
    assert pixels.sum().item() == pytest.approx(210)
    row, column = PLACES[7]
    assert 9 * pixels[0, row + 1, column - 1].item() == pytest.approx(8), "the eighth source's, over 3 x 3 pixels"


def test_an_image_without_sources_has_maps_without_any():
    network, z = trained(), torch.tensor([0.2])
    images, valid, noise = torch.zeros(1, 3, 32, 32), torch.ones(1, 32, 32), torch.ones(1, 3)
    fixed = network.for_maps(images, valid, noise, z)
    mass = fixed(images.repeat(2, 1, 1, 1), valid.repeat(2, 1, 1), noise.repeat(2, 1), z.repeat(2))
    torch.testing.assert_close(mass, network.empty_dex.expand(2))
    assert fixed.to_pixels(torch.zeros(1, 1, 0), (32, 32)).abs().sum() == 0


def test_pixels_far_from_all_sources_change_nothing():
    network, z = trained(), torch.tensor([0.2])
    flux, noise = picture(0.2, 0.3)
    images, valid = prepare(flux, torch.zeros(flux.shape, dtype=torch.bool), noise)
    fixed = network.for_maps(images, valid, noise, z)
    fixed(images.requires_grad_(), valid, noise, z).sum().backward()
    assert images.grad is not None
    touched = images.grad[0].abs().sum(dim=0) > 0
    near = torch.zeros(32, 32, dtype=torch.bool)
    for row, column in PLACES:
        near[row - 1 : row + 2, column - 1 : column + 2] = True
    assert touched.any() and not (touched & ~near).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data())
def test_choosing_clusters_keeps_each_ones_sources(lengths, data):
    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    every = Described(image, torch.arange(float(len(image)))[:, None], torch.ones(len(image)))
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    some = every.of(torch.tensor(chosen), len(lengths))
    for k, cluster in enumerate(chosen):
        assert some.values[some.image == k, 0].tolist() == every.values[image == cluster, 0].tolist()


def sky(n: int, seed: int) -> tuple[Described, torch.Tensor, torch.Tensor]:
    """Descriptions of n made-up clusters: members on the red sequence, as many as the mass says, among others of any
    colour; redshifts and masses."""
    rng = np.random.default_rng(seed)
    mass, z = rng.uniform(13.8, 15.2, n), rng.uniform(0.1, 0.5, n)
    parts, sizes = [], []
    n_values = GalaxyRegressor(GRID).encoder.n_values
    for one, redshift in zip(mass, z, strict=True):
        members = rng.poisson(30 * 10 ** (0.9 * (one - 14.5)))
        values = rng.normal(size=(members + rng.integers(20, 120), n_values))
        values[:members, 3], values[members:, 3] = 0.2 * values[:members, 3], 3 * values[members:, 3]
        values[:, -1] = redshift
        parts.append(
            Described(torch.zeros(len(values), dtype=torch.long), torch.tensor(values).float(), torch.ones(len(values)))
        )
        sizes.append(1)
    return Described.joined(parts, sizes), torch.tensor(z).float(), torch.tensor(mass).float()


@pytest.mark.slow
def test_the_fit_learns_whom_to_count_and_fine_tuning_keeps_it(monkeypatch):
    monkeypatch.setattr("pix2mass.galaxies._STEPS", (300, 300))
    (seen, z, mass), (new, new_z, new_mass) = sky(400, 1), sky(300, 2)
    network = GalaxyRegressor(GRID)
    label = mass + 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(3))
    network.fit(seen, z, label, torch.full((400,), 0.1), seed=1)
    estimate, sigma = network.from_described(new, new_z)
    # Counting all sources, whatever their colour, cannot do better than this straight line.
    count = np.log10(np.bincount(new.image.numpy()))
    everyone = np.polyval(np.polyfit(count, new_mass.numpy(), 1), count)
    error = (estimate - new_mass).abs().mean().item()
    assert error < 0.75 * np.abs(everyone - new_mass.numpy()).mean() and (sigma > 0).all()
    few = torch.arange(20)
    network.fit(seen.of(few, 400), z[few], mass[few] + 0.3, torch.full((20,), 0.1), seed=1, tune=True)
    moved = network.from_described(new, new_z)[0] - new_mass
    assert moved.mean().item() == pytest.approx(0.3, abs=0.1)
    assert moved.std().item() < 1.5 * (estimate - new_mass).std().item()


def test_empty_sky_gets_less_than_any_label_and_images_like_those_of_training_what_was_learnt(monkeypatch):
    monkeypatch.setattr("pix2mass.galaxies._STEPS", (5, 5))
    seen, z, mass = sky(40, 1)
    network = GalaxyRegressor(GRID)
    network.fit(seen, z, mass, torch.full((40,), 0.1), seed=4)
    nothing = Described(torch.zeros(0, dtype=torch.long), torch.zeros(0, seen.values.shape[1]), torch.zeros(0))
    torch.testing.assert_close(network.from_described(nothing, z[:2])[0], (mass.min() - 0.5).expand(2))
    learnt = network.from_described(seen, z)[0]
    network.empty_dex -= 5.0
    torch.testing.assert_close(network.from_described(seen, z)[0], learnt)
    thinned = seen._replace(share=0.02 * seen.share)
    assert (network.from_described(thinned, z)[0] < learnt - 1).all()


def test_the_same_seed_gives_the_same_network(monkeypatch):
    monkeypatch.setattr("pix2mass.galaxies._STEPS", (5, 5))
    seen, z, mass = sky(20, 1)
    networks = []
    for state in (1, 2):
        torch.manual_seed(state)
        networks.append(GalaxyRegressor(GRID))
        networks[-1].fit(seen, z, mass, torch.full((20,), 0.1), seed=4)
    for first, second in zip(*(network.state_dict().values() for network in networks), strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_an_ensemble_gives_the_mean_of_its_networks_and_each_learns_as_if_alone(monkeypatch):
    monkeypatch.setattr("pix2mass.galaxies._STEPS", (20, 20))
    seen, z, mass = sky(40, 1)
    ensemble = GalaxyRegressor(GRID, ensemble_size=3)
    ensemble.fit(seen, z, mass, torch.full((40,), 0.1), seed=4)
    alone = []
    for one in ensemble.ensemble:
        network = GalaxyRegressor(GRID)
        for name, buffer in ensemble.named_buffers():
            network.get_buffer(name).copy_(buffer)
        network.ensemble[0].load_state_dict(one.state_dict())
        alone.append(network.from_described(seen, z)[0])
    assert torch.stack(alone).std(dim=0).min() > 0, "they start from different weights"
    torch.testing.assert_close(ensemble.from_described(seen, z)[0], torch.stack(alone).mean(dim=0))

    # The step of one network does not depend on how far off another one is.
    first = ensemble.ensemble[0].state_dict()["linear.weight"].clone()
    wild, restart = GalaxyRegressor(GRID, ensemble_size=3), type(ensemble.ensemble[0]).restart

    def restart_wildly(one: torch.nn.Module) -> None:
        restart(one)
        if one is wild.ensemble[2]:
            torch.nn.init.constant_(one.linear.weight, 50.0)

    monkeypatch.setattr(type(ensemble.ensemble[0]), "restart", restart_wildly)
    wild.fit(seen, z, mass, torch.full((40,), 0.1), seed=4)
    torch.testing.assert_close(wild.ensemble[0].state_dict()["linear.weight"], first)


def test_tuning_corrects_masses_by_a_quadratic_and_keeps_the_weights():
    network, rng = trained(), np.random.default_rng(3)
    z = torch.tensor(rng.uniform(0.15, 0.35, 60), dtype=torch.float32)
    pictures = [
        picture(float(redshift), float(size)) for redshift, size in zip(z, rng.uniform(0.3, 2.0, 60), strict=True)
    ]
    parts = [
        network.described(light_of(network, flux, noise, z[k : k + 1]), torch.ones(1, 32, 32), z[k : k + 1])
        for k, (flux, noise) in enumerate(pictures)
    ]
    described = Described.joined(parts, [1] * 60)
    weights = [parameter.clone() for parameter in network.parameters()]
    with torch.no_grad():
        before = network.from_described(described, z)[0]
    u, v = before - 14.5, z - 0.3
    label = before + 0.2 - 0.1 * u + 0.5 * v + 0.3 * u * v + 0.1 * u**2
    for _ in range(2):  # the second time starts anew, it does not add
        network.fit(described, z, label, torch.full((60,), 0.001), seed=1, tune=True)
    with torch.no_grad():
        missed = (network.from_described(described, z)[0] - label).abs()
    assert (before - label).abs().mean() > 0.1 and missed.mean() < 0.01
    assert all(torch.equal(old, new) for old, new in zip(weights, network.parameters(), strict=True))
