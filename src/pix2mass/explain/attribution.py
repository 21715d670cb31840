"""The methods: whose value is explained, and how much of it each pixel makes.

F is the mean of some networks' values of an image x of several bands; x is asinh(flux / noise). B are draws of blank
sky (``blank_sky``). F is log10 M500c (network 2, the mean over folds and views), or the log odds that a single-band
image is of its band (network 1). With p a pixel, b a band:

- integrated gradients (Sundararajan, Taly & Yan 2017, arXiv 1703.01365), from blank sky to the image:
  IG_bp = mean over B of (x - B)_bp times the integral over a from 0 to 1 of dF/dx_bp at B + a (x - B).
  They are complete: their sum over p and b is F(x) - mean F(B);
- class-activation map on the encoder's last feature maps A_c, with a sign, since a mass can be pushed both ways:
  CAM_q = sum over c of (A_cq(x) - mean A_cq(B)) dF/dA_cq(x), q a place of the feature maps, brought to pixels linearly.
  Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) has A_cq(x) in place of the difference and the gradient's mean
  over q: on these networks that map lies on empty sky. The local gradient is that of HiResCAM (Draelos & Carin 2020,
  arXiv 2011.08891); the difference is ours;
- joint map = IG summed over bands, times |CAM| / max |CAM|. That the two are joined is Lin et al. 2022 (arXiv
  2203.06288); how, is ours;
- for comparison: the gradient dF/dx; SmoothGrad (Smilkov et al. 2017, arXiv 1706.03825), its mean over noisy copies of
  x; occlusion (Zeiler & Fergus 2014, arXiv 1311.2901), the change of F where a square of x is put in place of a square
  of B.

captum takes the gradients, the activations and the occlusions; summing and joining them is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.attr import (
    LayerActivation,
    LayerGradientXActivation,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from pix2mass.model import BandClassifier, Regressor, dihedral, to_pixels
from pix2mass.predict import Predictor
from pix2mass.stretch import sinh

METHODS = {
    "joint": "joint map",
    "integrated_gradients": "integrated gradients",
    "cam": "class-activation map",
    "gradient": "gradient",
    "smoothgrad": "SmoothGrad",
    "occlusion": "occlusion",
}
"""Name in files -> what to call it. The last three are made for comparison only."""
DEFAULT_METHOD = {"bands": "joint", "gaussian-process": "joint", "galaxies": "cam"}
"""Kind of network 2 -> the method that finds true member galaxies best on mock clusters: benchmarks/explain.py."""
_BATCH = 16
_NEXT_NETWORK = 7
"""Draws by which each network's steps are shifted against those of the one before."""
_SMOOTHGRAD_SIGMA = 0.5
_OCCLUSION_SQUARES = 16
"""Squares along a side of the image."""


class Network(NamedTuple):
    """One network as a function of images.

    Attributes:
        value: from images (n, channels, h, w), and further arguments of length n, to a number each, (n,).
        layer: where its last feature maps come out, one or more per image.
        to_pixels: brings values (n, h', w') at the places of these maps to pixels (n, h, w).
        view: how it turns the images before it looks at them, see :func:`pix2mass.model.dihedral`.
        gradients_per_step: by how many times finer than asked for the integral is taken.
    """

    value: Callable[..., Tensor]
    layer: nn.Module
    to_pixels: Callable[[Tensor, tuple[int, int]], Tensor]
    view: int = 0
    gradients_per_step: int = 1


def mass_maps(
    predictor: Predictor,
    images: Tensor,
    valid: Tensor,
    noise: Tensor,
    z: Tensor,
    blank: Tensor,
    steps: int,
    compare: bool = False,
) -> dict[str, Any]:
    """Maps of one cluster's mass.

    Args:
        predictor: the networks.
        images: (1, n_bands, h, w) from :func:`pix2mass.model.prepare`.
        valid: (1, h, w) usable share.
        noise: (1, n_bands) nanomaggies, that of :func:`pix2mass.model.prepare`.
        z: (1,) redshift.
        blank: (n_draws, n_bands, h, w) from :func:`~pix2mass.explain.blank_sky.blank_sky`.
        steps: gradients taken along the integral, per network, shared by the draws; four times as many where the
            network looks at the surroundings of sources only.
        compare: with the methods for comparison, made of the networks' first view alone.

    Returns:
        ``integrated_gradients`` (n_bands, h, w), ``cam`` and ``joint`` (h, w), all float32 in dex per pixel;
        ``log10_m500c_networks``, what is explained: the networks' mean before calibration; ``log10_m500c_blank_sky``,
        theirs of blank sky; ``completeness_error_dex``, what the gradients' sum misses of the difference; with
        ``compare`` also ``gradient`` and ``smoothgrad`` (n_bands, h, w), dex per unit of normalised flux, and
        ``occlusion`` (h, w), dex per pixel.
    """

    def network(regressor: Regressor, view: int) -> Network:
        with torch.no_grad():
            here = regressor.for_maps(dihedral(images, view), dihedral(valid, view), noise, z)

        def value(images: Tensor, valid: Tensor, noise: Tensor, z: Tensor) -> Tensor:
            return here(dihedral(images, view), dihedral(valid, view), noise, z)

        return Network(value, here.tap, here.to_pixels, view, here.gradients_per_step)

    views = range(predictor.info["views"])
    networks = [[network(regressor, view) for view in views] for regressor in predictor.regressors]
    found = _attribute(networks, images, (valid, noise, z), blank[:, None], steps, compare)
    maps = {name: values[0].numpy().astype(np.float32) for name, values in found.maps.items()}
    return {
        **maps,
        "log10_m500c_networks": found.value.item(),
        "log10_m500c_blank_sky": found.blank_value.item(),
        "completeness_error_dex": found.completeness_error.item(),
    }


def band_maps(
    classifier: BandClassifier,
    images: Tensor,
    noise: Tensor,
    z: Tensor,
    blank: Tensor,
    steps: int,
    compare: bool = False,
) -> dict[str, Any]:
    """Maps of network 1: why it takes each band's image of one cluster for that band.

    Args:
        classifier: network 1 with its head.
        images: (1, n_bands, h, w), as for :func:`mass_maps`.
        noise: (1, n_bands), as there.
        z: (1,), as there.
        blank: (n_draws, n_bands, h, w), as there.
        steps: as there.
        compare: as there.

    Returns:
        Every map of :func:`mass_maps`, of shape (n_bands, h, w), in log odds (natural logarithm) per pixel;
        ``log_odds`` and ``log_odds_blank_sky`` (n_bands,), of the true band; ``completeness_error`` (n_bands,).
    """

    units = classifier.units
    grows = None if units is None else units.per_noise(noise, z)[0]

    def log_odds(images: Tensor, band: Tensor) -> Tensor:
        if grows is not None:
            images = torch.asinh(sinh(images) * grows[band][:, None, None, None])
        logits = classifier(images)
        own = logits.gather(1, band[:, None])
        others = logits.scatter(1, band[:, None], -torch.inf)
        return own[:, 0] - others.logsumexp(dim=1)

    network = Network(log_odds, classifier.encoder.taps[-1], to_pixels)
    bands = torch.arange(images.shape[1])
    found = _attribute([[network]], images[0][:, None], (bands,), blank[:, :, None], steps, compare)
    maps = {
        name: (values[:, 0] if values.ndim == 4 else values).numpy().astype(np.float32)
        for name, values in found.maps.items()
    }
    return {
        **maps,
        "log_odds": found.value.numpy(),
        "log_odds_blank_sky": found.blank_value.numpy(),
        "completeness_error": found.completeness_error.numpy(),
    }


class _Found(NamedTuple):
    """Maps of n values: (n, channels, h, w) or, where the method has one for all channels, (n, h, w); the values, those
    of blank sky and what integrated gradients miss of the difference, (n,)."""

    maps: dict[str, Tensor]
    value: Tensor
    blank_value: Tensor
    completeness_error: Tensor


def _attribute(
    networks: Sequence[Sequence[Network]],
    images: Tensor,
    further: tuple[Tensor, ...],
    blank: Tensor,
    steps: int,
    compare: bool,
) -> _Found:
    """All maps of the mean of some networks over their views.

    Args:
        networks: per network, the same network in each of its views.
        images: (n, channels, h, w), each with a value of its own.
        further: the networks' other arguments, each of length n.
        blank: (n_draws, n, channels, h, w); they are dealt out to the views.
        steps: as for :func:`mass_maps`.
        compare: as for :func:`mass_maps`.
    """
    n, _, *size = images.shape
    images = images.detach().requires_grad_()
    total: dict[str, Tensor] = {}
    value, blank_value = torch.zeros(n), torch.zeros(n)

    def add(name: str, values: Tensor, weight: float) -> None:
        total[name] = total.get(name, 0.0) + weight * values.detach()

    for index, views in enumerate(networks):
        # Steps at neighbouring places of the path go to different draws, and those of one draw are spread over the
        # path: all draws together are integrated as finely as a single one would be with all the steps.
        n_gradients = steps * views[0].gradients_per_step
        draw_of_step = (np.arange(n_gradients) + _NEXT_NETWORK * index) % len(blank)
        for number, network in enumerate(views[: len(blank)]):
            draws = np.arange(number, len(blank), len(views))
            share = len(draws) / len(blank) / len(networks)
            mine = np.flatnonzero(draw_of_step % len(views) == number)
            places = (mine + 0.5) / n_gradients
            along = _path_gradients(network, images, further, blank, draw_of_step[mine], places)
            add("integrated_gradients", along, 1.0 / n_gradients / len(networks))
            sky, sky_further = blank[draws].flatten(0, 1), _repeat(further, len(draws))
            activations = LayerActivation(network.value, network.layer)
            with torch.no_grad():
                value += share * network.value(images, *further)
                blank_value += share * network.value(sky, *sky_further).reshape(len(draws), n).mean(dim=0)
                seen = activations.attribute(images, further)
                unseen = activations.attribute(sky, sky_further)
            unseen = unseen.reshape(len(draws), *seen.shape).mean(dim=0)
            local = LayerGradientXActivation(network.value, network.layer, multiply_by_inputs=False)
            cells = (seen - unseen) * local.attribute(images, additional_forward_args=further)
            cells = cells.reshape(n, -1, *cells.shape[-2:]).sum(dim=1)
            add("cam", _undo(network.to_pixels(cells, (size[0], size[1])), network.view), share)
            if compare and number == 0:
                for name, values in _compare(network, images, further, blank[draws]).items():
                    add(name, values, 1.0 / len(networks))
    missed = total["integrated_gradients"].sum(dim=(1, 2, 3)) - (value - blank_value)
    cam = total["cam"]
    strength = cam.abs() / cam.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    total["joint"] = total["integrated_gradients"].sum(dim=1) * strength
    return _Found(total, value, blank_value, missed.abs())


def _path_gradients(
    network: Network,
    images: Tensor,
    further: tuple[Tensor, ...],
    blank: Tensor,
    draw_of_step: np.ndarray,
    places: np.ndarray,
) -> Tensor:
    """Sum over steps of gradient times (image minus blank sky), a few steps at a time.

    Args:
        network: the network.
        images: (n, channels, h, w).
        further: as for :func:`_attribute`.
        blank: (n_draws, n, channels, h, w) blank skies.
        draw_of_step: (n_steps,) on which of them the path of each step starts.
        places: (n_steps,) where on its path each step lies, from 0 at blank sky to 1 at the image.
    """
    images, saliency = images.detach(), Saliency(network.value)
    at_once = max(1, _BATCH // len(images))
    total = torch.zeros_like(images)
    for start in range(0, len(places), at_once):
        difference = images - blank[draw_of_step[start : start + at_once]]
        place = torch.tensor(places[start : start + at_once], dtype=images.dtype)[:, None, None, None, None]
        points = (images - (1.0 - place) * difference).flatten(0, 1).requires_grad_()
        gradient = saliency.attribute(points, abs=False, additional_forward_args=_repeat(further, len(difference)))
        total += (gradient.reshape(difference.shape) * difference).sum(dim=0)
    return total


def _repeat(further: tuple[Tensor, ...], times: int) -> tuple[Tensor, ...]:
    """The arguments for several copies of all images, one copy after the other."""
    return tuple(values.repeat(times, *[1] * (values.ndim - 1)) for values in further)


def _compare(network: Network, images: Tensor, further: tuple[Tensor, ...], draws: Tensor) -> dict[str, Tensor]:
    """Maps of one network by the methods for comparison."""
    saliency = Saliency(network.value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        smooth = NoiseTunnel(saliency).attribute(
            images,
            nt_samples=len(draws),
            stdevs=_SMOOTHGRAD_SIGMA,
            additional_forward_args=further,
            abs=False,
        )
    side = max(1, images.shape[-1] // _OCCLUSION_SQUARES)
    window = (images.shape[1], side, side)
    with torch.no_grad():
        squares = Occlusion(network.value).attribute(
            images, window, window, draws[0], additional_forward_args=further, perturbations_per_eval=_BATCH
        )
    return {
        "gradient": saliency.attribute(images, abs=False, additional_forward_args=further),
        "smoothgrad": smooth,
        "occlusion": squares[:, 0] / side**2,
    }


def _undo(maps: Tensor, view: int) -> Tensor:
    """The inverse of :func:`pix2mass.model.dihedral`."""
    return torch.rot90(maps.flip(-1) if view >= 4 else maps, -(view % 4), dims=(-2, -1))
