"""The two networks. Network 1: an encoder of single-band images and a band classifier on it. Network 2: a mass from
the features of all bands.

What network 1 and network 2 take and give is the paper's (Lin et al. 2022, arXiv 2203.06288, abstract). The layers, the
pooling and the error output are this project's own choices.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pix2mass.config import GridConfig
from pix2mass.cosmology import kpc_per_arcsec, l_star_red_mag
from pix2mass.types import BANDS, NANOMAGGY_ZEROPOINT_MAG, SDSS_PIXEL_SCALE_ARCSEC, Pix2massError

RADIAL_EDGES = (0.06, 0.15, 0.35, 0.75)
"""Centres of the radial pooling rings, in units of the cutout's half-width (60 to 750 kpc on the default grid)."""
_MIN_LOG_SIGMA = math.log(0.02)


def prepare(flux: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Bring images to unit noise and compress bright sources, so that no band stands out by its noise level.

    Args:
        flux: (n, n_bands, h, w) nanomaggies per pixel.
        mask: (n, n_bands, h, w) bool, True = unusable.
        noise: (n, n_bands) nanomaggies, the median sigma of each image; NaN for a band without usable pixels.

    Returns:
        asinh(flux / noise), 0 where unusable, same shape as flux; and the share of bands usable per pixel, (n, h, w).
    """
    usable = ~mask & torch.isfinite(noise)[..., None, None]
    scaled = torch.asinh(flux / noise[..., None, None])
    return torch.where(usable, scaled, torch.zeros_like(scaled)), usable_share(mask, noise)


def usable_share(mask: Tensor, noise: Tensor) -> Tensor:
    """Share of bands usable at each pixel, (n, h, w), 0 to 1; arguments as :func:`prepare`."""
    return (~mask & torch.isfinite(noise)[..., None, None]).float().mean(dim=1)


def dihedral(images: Tensor, view: int) -> Tensor:
    """One of the 8 rotations and reflections of a square, over the last two axes; view 0 is the image itself."""
    turned = torch.rot90(images, view % 4, dims=(-2, -1))
    return turned.flip(-1) if view >= 4 else turned


def combine(means: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a mixture of equally weighted Gaussians.

    Args:
        means: (m, n) means of m networks or views for n clusters.
        sigmas: (m, n) their standard deviations.

    Returns:
        Mean (n,) and standard deviation (n,): the mean variance plus the variance of the means.
    """
    mean = means.mean(dim=0)
    return mean, torch.sqrt((sigmas**2).mean(dim=0) + means.var(dim=0, correction=0))


class _SmallBackbone(nn.Module):
    """Two levels of plain convolutions, at strides 2 and 4: made to train in a minute on two cores."""

    channels = (16, 32)
    strides = (2, 4)

    def __init__(self) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.ReLU(),
                nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(n_out),
                nn.ReLU(),
            )

        self.fine = block(1, self.channels[0])
        self.coarse = block(self.channels[0], self.channels[1])

    def forward(self, image: Tensor) -> list[Tensor]:
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


class Encoder(nn.Module):
    """Feature maps of single-band images, at the two finest levels of the backbone.

    Args:
        name: "small"; any timm model that can return feature maps (``features_only``), built with ``in_chans=1``; or
            "module:function", a function of yours without arguments that returns a network (see docs/encoders.md).

    Raises:
        Pix2massError: timm does not know the name, your function cannot be had, or the model gives no feature maps.
    """

    def __init__(self, name: str = "small") -> None:
        super().__init__()
        self.name = name
        self.taps = nn.ModuleList([nn.Identity(), nn.Identity()])
        """Where each level comes out, whatever the backbone: the layers that class-activation maps hook on to."""
        if name == "small":
            self.backbone: nn.Module = _SmallBackbone()
            self.channels, self.strides = _SmallBackbone.channels, _SmallBackbone.strides
            return
        if ":" in name:
            self.backbone, self.channels, self.strides = _own_backbone(name)
            self.taps = nn.ModuleList([nn.Identity() for _ in self.channels])
            return
        try:
            self.backbone = timm.create_model(name, in_chans=1, features_only=True, out_indices=(0, 1))
        except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
            near = difflib.get_close_matches(name, timm.list_models(), n=4)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            raise Pix2massError(
                f"encoder {name!r}: expected 'small' or a timm model with feature maps, timm says: {error}{hint}"
            ) from None
        self.channels = tuple(self.backbone.feature_info.channels())  # type: ignore[union-attr]
        self.strides = tuple(self.backbone.feature_info.reduction())  # type: ignore[union-attr]

    def check(self, n_pixels: int) -> None:
        """Refuse images of a size that the backbone cannot take, or a backbone whose maps are not (n, channels, h, w).

        Raises:
            Pix2massError: says what went wrong.
        """
        training = self.training
        try:
            with torch.no_grad():
                levels = self.eval()(torch.zeros(1, 1, n_pixels, n_pixels))
            shapes = [tuple(level.shape[:2]) for level in levels]
            if shapes != [(1, channels) for channels in self.channels]:
                raise ValueError(f"its maps have shapes {[tuple(level.shape) for level in levels]}")
        except (AssertionError, RuntimeError, ValueError) as error:
            raise Pix2massError(
                f"encoder {self.name!r} does not take images of {n_pixels} x {n_pixels} pixels: {error}; choose a "
                "convolutional encoder such as small or resnet18"
            ) from None
        self.train(training)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Feature maps.

        Args:
            image: (n, 1, h, w) normalised image of one band each.

        Returns:
            One map per level, finest first: (n, channels[k], h / strides[k], w / strides[k]).
        """
        return [tap(level) for tap, level in zip(self.taps, self.backbone(image), strict=True)]


_PROBE_PIXELS = 64


def _own_backbone(name: str) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """The network that "module:function" gives, with channels and strides of its maps as found on a blank image."""
    module_name, _, function_name = name.partition(":")
    expected = f"encoder {name!r}: expected 'module:function', a function without arguments that returns a network"
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise Pix2massError(f"{expected}; {error}; the module must be importable from here (PYTHONPATH)") from None
    try:
        backbone = function()
        with torch.no_grad():
            levels = backbone.eval()(torch.zeros(1, 1, _PROBE_PIXELS, _PROBE_PIXELS))
    except Exception as error:  # whatever a user's own code may raise
        raise Pix2massError(
            f"{expected}; on an image (1, 1, {_PROBE_PIXELS}, {_PROBE_PIXELS}) it failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    maps = isinstance(levels, Sequence) and all(isinstance(level, Tensor) and level.ndim == 4 for level in levels)
    if not maps or not levels or any(len(level) != 1 or min(level.shape[2:]) < 1 for level in levels):
        raise Pix2massError(
            f"encoder {name!r}: expected a list of feature maps (n, channels, h, w), finest first, found "
            f"{[tuple(level.shape) for level in levels] if maps else type(levels).__name__}"
        )
    backbone.train()
    return (
        backbone,
        tuple(level.shape[1] for level in levels),
        tuple(_PROBE_PIXELS // level.shape[2] for level in levels),
    )


class BandClassifier(nn.Module):
    """Network 1: which band is this image?

    Args:
        encoder: gives the feature maps.
        n_bands: number of bands to tell apart.
    """

    def __init__(self, encoder: Encoder, n_bands: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2 * sum(encoder.channels), n_bands)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (n, n_bands) of single-band images (n, 1, h, w). Mean and spread of every feature map are pooled."""
        return self.head(_mean_and_spread(self.encoder(image)))


def _mean_and_spread(levels: list[Tensor]) -> Tensor:
    """Mean and standard deviation of every feature map, (n, 2 * channels of all levels)."""
    return torch.cat(
        [part for level in levels for part in (level.mean(dim=(2, 3)), level.flatten(2).std(dim=2))], dim=1
    )


class ViewMatcher(nn.Module):
    """Network 1 of the contrastive pretext task: which two images are views of the same one?

    Args:
        encoder: gives the feature maps.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        n_pooled = 2 * sum(encoder.channels)
        self.head = nn.Sequential(nn.Linear(n_pooled, n_pooled), nn.ReLU(), nn.Linear(n_pooled, 32))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, n) of n images (2 n, 1, h, w), first views before second ones: whether first view i (row) and
        second view j (column) show the same image. Cosine similarity over a temperature of 0.2 (NT-Xent between the
        two sets of views: Chen et al. 2020, arXiv 2002.05709)."""
        first, second = F.normalize(self.head(_mean_and_spread(self.encoder(images))), dim=1).chunk(2)
        return first @ second.T / 0.2


class MassRegressor(nn.Module):
    """Network 2: log10 M500c and its standard deviation from the feature maps of all bands.

    At each point of the maps the features of all bands (and the redshift) are mixed, so that colours at one place can
    be read; the result is averaged over the usable area in four rings around the centre, and a small network gives mean
    and spread. The scaler is part of the module and saved with its weights.

    Args:
        encoder: network 1's encoder, shared by the bands.
        n_bands: number of bands.
        use_redshift: whether the redshift is an input.
        hidden: width of the mixing layers.
    """

    label_mean: Tensor
    label_scale: Tensor
    z_mean: Tensor
    z_scale: Tensor

    def __init__(self, encoder: Encoder, n_bands: int, use_redshift: bool = True, hidden: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.n_bands = n_bands
        self.use_redshift = use_redshift
        n_context = 2 if use_redshift else 0
        self.level_mix = nn.ModuleList(
            [nn.Conv2d(n_bands * channels, hidden, 1, bias=False) for channels in encoder.channels]
        )
        self.context = nn.Linear(n_context, hidden) if use_redshift else None
        self.mix_bias = nn.Parameter(torch.zeros(hidden))
        self.mix = nn.Conv2d(hidden, hidden, 1)
        n_rings = len(RADIAL_EDGES)
        self.out = nn.Sequential(
            nn.Linear(n_rings * (hidden + 1) + n_context, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2)
        )
        for name in ("label_mean", "z_mean"):
            self.register_buffer(name, torch.zeros(()))
        for name in ("label_scale", "z_scale"):
            self.register_buffer(name, torch.ones(()))
        for level, channels in enumerate(encoder.channels):
            self.register_buffer(f"feature_mean_{level}", torch.zeros(n_bands * channels))
            self.register_buffer(f"feature_scale_{level}", torch.ones(n_bands * channels))

    def fit_scaler(self, log10_m500c: Tensor, z: Tensor, levels: list[Tensor]) -> None:
        """Take mean and scale of labels, redshifts and features from the training part.

        Args:
            log10_m500c: (n,) labels.
            z: (n,) redshifts.
            levels: feature maps of some training images, as :meth:`features` gives them.
        """
        self.label_mean.copy_(log10_m500c.mean())
        self.label_scale.copy_(log10_m500c.std(correction=0).clamp_min(1e-3))
        if self.use_redshift:
            self.z_mean.copy_(z.mean())
            self.z_scale.copy_(z.std(correction=0).clamp_min(1e-3))
        for level, maps in enumerate(levels):
            self.get_buffer(f"feature_mean_{level}").copy_(maps.mean(dim=(0, 2, 3)))
            self.get_buffer(f"feature_scale_{level}").copy_(maps.std(dim=(0, 2, 3)).clamp_min(1e-3))

    def rescale(self, images: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """Images as :meth:`forward` takes them, from those that :func:`prepare` gives: the same here."""
        return images

    def features(self, images: Tensor, z: Tensor | None = None) -> list[Tensor]:
        """Feature maps of all bands, per level (n, n_bands * channels, h', w'), from images (n, n_bands, h, w); the
        redshifts have no say."""
        n, n_bands = images.shape[:2]
        levels = self.encoder(images.reshape(n * n_bands, 1, *images.shape[2:]))
        return [level.reshape(n, n_bands * level.shape[1], *level.shape[2:]) for level in levels]

    def forward(self, images: Tensor, valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mass of clusters.

        Args:
            images: (n, n_bands, h, w), normalised.
            valid: (n, h, w) share of bands usable at each pixel, 0 to 1.
            z: (n,) redshifts.

        Returns:
            log10 M500c (n,) and its standard deviation in dex (n,).
        """
        return self.from_features(self.features(images, z), valid, z)

    def from_features(self, levels: list[Tensor], valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, from the output of :meth:`features`, which a frozen encoder need compute only once."""
        size = (levels[0].shape[2], levels[0].shape[3])
        bias = self.mix_bias
        mixed = torch.zeros((), device=z.device)
        for level, (maps, conv) in enumerate(zip(levels, self.level_mix, strict=True)):
            # The features' scaler is folded into the convolution: the maps are large, its weights are not.
            weight = conv.get_parameter("weight") / self.get_buffer(f"feature_scale_{level}")[:, None, None]
            bias = bias - weight[:, :, 0, 0] @ self.get_buffer(f"feature_mean_{level}")
            part = F.conv2d(maps, weight)
            mixed = mixed + (part if tuple(part.shape[2:]) == size else F.interpolate(part, size=size, mode="nearest"))
        mixed = mixed + bias[:, None, None]
        context = torch.zeros(len(z), 0, device=z.device)
        if self.context is not None:
            scaled = (z - self.z_mean) / self.z_scale
            context = torch.stack([scaled, scaled**2 - 1.0], dim=1)
            mixed = mixed + self.context(context)[:, :, None, None]
        mixed = F.relu(self.mix(F.relu(mixed)))
        weight = F.adaptive_avg_pool2d(valid[:, None], size) * _rings(size, valid.device)
        area = weight.sum(dim=(2, 3))
        pooled = torch.einsum("nchw,nrhw->nrc", mixed, weight) / (area[..., None] + 1e-3)
        coverage = area / _rings(size, valid.device).sum(dim=(2, 3))
        mean, log_sigma = self.out(torch.cat([pooled.flatten(1), coverage, context], dim=1)).unbind(dim=1)
        sigma = torch.exp(log_sigma.clamp(-6.0, 3.0)) * self.label_scale
        return mean * self.label_scale + self.label_mean, sigma + math.exp(_MIN_LOG_SIGMA)


# ---- all bands together --------------------------------------------------------------------------------------------

_SOFTENING = 0.05
"""Light per pixel, in L*, at which images of the fused network turn from linear to logarithmic."""
_NATIVE_SIGMA_NMGY = {"u": 0.044, "g": 0.0186, "r": 0.027, "i": 0.046, "z": 0.178}
"""Noise of a native SDSS pixel: within the range of six frames. It weighs colours; images are not scaled by it."""
_COLOUR_SCATTER = {"g": 0.10, "r": 0.06, "i": 0.08}
"""Fractional width of the red sequence in the flux of a band relative to the next: scatter, slope and zero points. The
band u is too noisy to tell members and is left out."""
_CLOSE, _NEAR = 1.0, 3.0
"""Two ways to agree with the red sequence: exp(-chi2 / 2) of colours, and with chi2 over this."""
_CUTS = ((_CLOSE, 0.03), (_CLOSE, 0.06), (_CLOSE, 0.12), (_NEAR, 0.03), (_NEAR, 0.06), (_NEAR, 0.12), (_NEAR, 0.25))
"""Agreement, and the light of one pixel in L* from which it counts: a galaxy's light is spread over a few pixels."""
_BRIGHTEST_PIXEL = 0.6
"""Light of a pixel, in L*, beyond which more does not count: stars and brightest galaxies would outweigh all others."""
_N_COUNTED = 2 * len(_CUTS) + 3
_FUSED_RINGS = (0.05, 0.12, 0.25, 0.45, 0.75, 1.1)
"""Centres of the pooling rings of the fused network, in units of the cutout's half-width."""
_LEAST_POOLED = 1e-4
_TABLE_Z = np.arange(0.02, 0.7001, 0.005)
_BINOMIAL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
_BINOMIAL_NOISE = 0.375
"""White noise that is left after smoothing with it."""
_PENALTIES = np.geomspace(1.0, 1e5, 26)
_MISSED_DEX, _INPUT_NOISE, _STEPS, _STEP_CLUSTERS = 0.2, 0.5, 1000, 128
"""Of the network beside the linear layer: scale of its output, noise on its inputs (in units of their scatter), steps
of training and clusters per step. Set on development clusters (docs/accuracy.md)."""


class FusedEncoder(nn.Module):
    """Images of all bands together to maps of the light that may belong to the cluster.

    The layer has no weights to learn: it knows what a red galaxy at redshift z looks like. Light is in units of an L*
    red galaxy's in each band. At each pixel the departures of neighbouring bands from the red sequence, in units of
    their errors, give chi2. Counted are, on the images as they are and on smoothed ones: pixels brighter than some cuts
    that agree with the red sequence, closely or nearly; their light; and the same of all pixels, whatever their colour.

    Args:
        grid: bands and pixel scale of the images.
    """

    l_star: Tensor
    sigma: Tensor
    binomial: Tensor

    def __init__(self, grid: GridConfig) -> None:
        super().__init__()
        self.bands = grid.bands
        columns = [BANDS.index(band) for band in grid.bands]
        flux = 10 ** (-0.4 * (l_star_red_mag(_TABLE_Z)[:, columns] - NANOMAGGY_ZEROPOINT_MAG))
        native = np.array([_NATIVE_SIGMA_NMGY[band] for band in grid.bands])
        width_arcsec = grid.width_arcsec or (grid.width_kpc or 0.0) / kpc_per_arcsec(_TABLE_Z)
        pixel_arcsec = np.broadcast_to(width_arcsec, _TABLE_Z.shape) / grid.n_pixels
        sigma = native * (pixel_arcsec / SDSS_PIXEL_SCALE_ARCSEC)[:, None] / flux
        self.register_buffer("l_star", torch.tensor(flux, dtype=torch.float32), persistent=False)
        self.register_buffer("sigma", torch.tensor(sigma, dtype=torch.float32), persistent=False)
        self.register_buffer("binomial", _BINOMIAL[None, None].clone(), persistent=False)
        self.reference = grid.bands.index("i") if "i" in grid.bands else len(grid.bands) - 1
        """The band in which luminosity is measured."""
        self.n_maps = 2 * _N_COUNTED
        self.taps = nn.ModuleList([nn.Identity()])
        """Where the maps come out: the layer that class-activation maps hook on to."""

    def at(self, table: Tensor, z: Tensor) -> Tensor:
        """Rows of a table over redshift, interpolated: (n, n_bands, 1, 1)."""
        step = (z - float(_TABLE_Z[0])) / float(_TABLE_Z[1] - _TABLE_Z[0])
        step = step.clamp(0, len(_TABLE_Z) - 1.001)
        left = step.long()
        part = (step - left)[:, None]
        return ((1 - part) * table[left] + part * table[left + 1])[:, :, None, None]

    def _counted(self, light: Tensor, sigma: Tensor) -> Tensor:
        """Maps (n, 17, h, w), none negative, of light in L* (n, n_bands, h, w) with noise sigma (n, n_bands, 1, 1)."""
        reference, chi2 = light[:, self.reference], torch.zeros_like(light[:, 0])
        for k, band in enumerate(self.bands[:-1]):
            if band in _COLOUR_SCATTER:
                variance = sigma[:, k] ** 2 + sigma[:, k + 1] ** 2 + (_COLOUR_SCATTER[band] * reference) ** 2
                chi2 = chi2 + (light[:, k] - light[:, k + 1]) ** 2 / variance
        capped = reference.clamp(0, _BRIGHTEST_PIXEL)
        agreement = {width: torch.exp(-0.5 * chi2 / width) for width in (_CLOSE, _NEAR)}
        maps = []
        for width, cut in _CUTS:
            counted = agreement[width] * _brighter(reference, cut)
            maps += [counted, counted * capped]
        seen = _brighter(reference, _SOFTENING)
        return torch.stack([*maps, seen, seen * capped, capped.clamp_max(_BRIGHTEST_PIXEL / 2)], dim=1)

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        """Maps (n, n_maps, h, w), none negative, of images (n, n_bands, h, w) from :meth:`FusedRegressor.rescale`."""
        light, sigma = _SOFTENING * torch.sinh(images), self.at(self.sigma, z)
        single = F.pad(light.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
        smooth = F.conv2d(single, self.binomial).reshape(light.shape)
        both = [self._counted(light, sigma), self._counted(smooth, _BINOMIAL_NOISE * sigma)]
        return self.taps[0](torch.cat(both, dim=1))


def _brighter(light: Tensor, cut: float) -> Tensor:
    """0 up to half the cut, 1 from one and a half on, smooth between: blank sky, most of an image, must not count."""
    share = (light / cut - 0.5).clamp(0, 1)
    return share**2 * (3 - 2 * share)


class FusedRegressor(nn.Module):
    """Network 2 with all bands fused at each pixel: log10 M500c and its standard deviation.

    The maps of :class:`FusedEncoder` are averaged over the usable area in six rings around the centre. Mass is a power
    of counts and light, so their logarithms go to a linear layer, whose weights are quadratic in redshift and fitted in
    closed form; a small network beside it learns what that one misses. Both take seconds (:meth:`fit`).

    Args:
        grid: bands and pixel scale of the images.
    """

    pooled_mean: Tensor
    pooled_scale: Tensor
    sigma_dex: Tensor

    def __init__(self, grid: GridConfig) -> None:
        super().__init__()
        self.encoder = FusedEncoder(grid)
        self.n_bands = len(grid.bands)
        n_pooled = len(_FUSED_RINGS) * self.encoder.n_maps
        self.linear = nn.Linear(3 * n_pooled + 3, 1)
        nn.init.zeros_(self.linear.weight)
        self.beside = nn.Sequential(
            nn.Linear(n_pooled + 2, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 1)
        )
        nn.init.zeros_(self.beside[-1].get_parameter("weight"))
        nn.init.zeros_(self.beside[-1].get_parameter("bias"))
        self.register_buffer("pooled_mean", torch.zeros(n_pooled))
        self.register_buffer("pooled_scale", torch.ones(n_pooled))
        self.register_buffer("sigma_dex", torch.ones(()))

    def rescale(self, images: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """Images in units that make red galaxies look alike at all redshifts and noise levels.

        Args:
            images: (n, n_bands, h, w) from :func:`prepare`: asinh(flux / noise).
            noise: (n, n_bands) nanomaggies, that of :func:`prepare`.
            z: (n,) redshifts.

        Returns:
            asinh(flux / 5% of an L* red galaxy's at that redshift), same shape.
        """
        unit = torch.nan_to_num(noise)[..., None, None] / (_SOFTENING * self.encoder.at(self.encoder.l_star, z))
        return torch.asinh(torch.sinh(images) * unit)

    def pool(self, images: Tensor, valid: Tensor, z: Tensor) -> Tensor:
        """Logarithms of the mean of each map in each ring, (n, n_maps * n_rings); arguments as :meth:`forward`."""
        maps = self.encoder(images, z)
        size = (maps.shape[2], maps.shape[3])
        weight = valid[:, None] * _rings(size, valid.device, _FUSED_RINGS, 0.35)
        mean = torch.einsum("nchw,nrhw->ncr", maps, weight) / (weight.sum(dim=(2, 3))[:, None] + 1e-3)
        return torch.log(mean + _LEAST_POOLED).flatten(1)

    def _terms(self, pooled: Tensor, z: Tensor) -> Tensor:
        scaled = (pooled - self.pooled_mean) / self.pooled_scale
        redshift = ((z - 0.3) / 0.14)[:, None]
        square = redshift**2 - 1
        return torch.cat([scaled, scaled * redshift, scaled * square, redshift, square, redshift**3], dim=1)

    def from_pooled(self, pooled: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, from the output of :meth:`pool`."""
        terms = self._terms(pooled, z)
        mean = self.linear(terms)[:, 0] + self._missed(terms)
        return mean, self.sigma_dex.expand(len(mean))

    def _missed(self, terms: Tensor) -> Tensor:
        """What the linear layer misses, (n,) dex, from the same terms: those that are linear, and the redshift's."""
        n_pooled = len(self.pooled_mean)
        return _MISSED_DEX * self.beside(torch.cat([terms[:, :n_pooled], terms[:, -3:-1]], dim=1))[:, 0]

    def forward(self, images: Tensor, valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mass of clusters: arguments and returns as :meth:`MassRegressor.forward`, images from :meth:`rescale`."""
        return self.from_pooled(self.pool(images, valid, z), z)

    def fit(
        self, pooled: Tensor, z: Tensor, log10_m500c: Tensor, label_err: Tensor, seed: int, tune: bool = False
    ) -> None:
        """Fit both layers: the linear one by ridge regression, then the network beside it to what that one misses.

        Labels count by 1 / (label_err^2 + 0.1^2). The network learns the errors of estimates from which the cluster
        itself was left out, from noisy inputs, since few labels teach it little.

        Args:
            pooled: (n, p) from :meth:`pool`.
            z: (n,) redshifts.
            log10_m500c: (n,) labels.
            label_err: (n,) their standard errors, dex.
            seed: of the network beside.
            tune: start from the present state: scaler and network stay, the linear layer departs from its weights as
                far as the labels ask for.
        """
        if not tune:
            self.pooled_mean.copy_(pooled.mean(dim=0))
            self.pooled_scale.copy_(pooled.std(dim=0, correction=0).clamp_min(0.05))
            nn.init.zeros_(self.linear.weight)
        terms = self._terms(pooled, z)
        weight = 1 / (label_err**2 + 0.1**2)
        with torch.no_grad():
            other = self._missed(terms) if tune else torch.zeros_like(log10_m500c)
            start = self.linear.weight[0]
            change, level, missed = _ridge(terms, log10_m500c - other - terms @ start, weight)
            self.linear.weight.copy_((start + change)[None])
            self.linear.bias.copy_(level[None])
        if not tune:
            torch.manual_seed(seed)
            missed = missed - self._learn_missed(terms, missed, weight / weight.mean())
        variance = (weight * (missed**2 - label_err**2)).sum() / weight.sum()
        self.sigma_dex.copy_(variance.clamp_min(0.02**2).sqrt())
        self.eval()

    def _learn_missed(self, terms: Tensor, missed: Tensor, weight: Tensor) -> Tensor:
        """Train the network beside the linear layer to the errors (n,) of that one; what it then says of them."""
        self.train()
        optimizer = torch.optim.AdamW(self.beside.parameters(), 2e-3, weight_decay=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=_STEPS)
        n_inputs = len(self.pooled_mean)
        for _ in range(_STEPS):
            chosen = torch.randint(len(terms), (_STEP_CLUSTERS,))
            noisy = terms[chosen].clone()
            noisy[:, :n_inputs] += _INPUT_NOISE * torch.randn(len(chosen), n_inputs)
            error = F.smooth_l1_loss(self._missed(noisy), missed[chosen], reduction="none", beta=0.1)
            optimizer.zero_grad()
            (10 * (weight[chosen] * error).mean()).backward()
            optimizer.step()
            schedule.step()
        self.eval()
        with torch.no_grad():
            return self._missed(terms)


def _ridge(terms: Tensor, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Linear fit with a penalty on the squares of its coefficients.

    The penalty is the one with the least squared error where each cluster is left out of its own estimate, which needs
    no further fits (Golub, Heath & Wahba 1979, Technometrics 21, 215).

    Args:
        terms: (n, p).
        wanted: (n,).
        weight: (n,).

    Returns:
        Coefficients (p,), constant (), and wanted minus estimate (n,) of each cluster by a fit to all others.
    """
    terms, wanted, weight = terms.double(), wanted.double(), weight.double()
    share, root = weight / weight.sum(), torch.sqrt(weight / weight.mean())
    middle, level = share @ terms, share @ wanted
    left, size, right = torch.linalg.svd(root[:, None] * (terms - middle), full_matrices=False)
    scaled = root * (wanted - level)
    along = left.T @ scaled
    best, penalty, missed = math.inf, 0.0, scaled
    for trial in map(float, _PENALTIES):
        kept = size**2 / (size**2 + trial)
        out = (scaled - left @ (kept * along)) / (1 - share - left**2 @ kept)
        if float(out @ out) < best:
            best, penalty, missed = float(out @ out), trial, out
    change = right.T @ (size / (size**2 + penalty) * along)
    return change.float(), (level - middle @ change).float(), (missed / root).float()


Regressor = MassRegressor | FusedRegressor


def make_regressor(info: Mapping[str, Any], grid: GridConfig) -> Regressor:
    """An untrained network 2.

    Args:
        info: keys ``network`` ("bands" or "fused"; "bands" where missing), ``encoder`` and ``use_redshift``, as in
            model.json.
        grid: of the images.
    """
    if info.get("network", "bands") == "fused":
        return FusedRegressor(grid)
    return MassRegressor(Encoder(info["encoder"]), len(grid.bands), info["use_redshift"])


def _rings(
    size: tuple[int, int], device: torch.device, centres: tuple[float, ...] = RADIAL_EDGES, width: float = 0.45
) -> Tensor:
    """Weights of the pooling rings, (1, n_rings, h, w): Gaussian in the logarithm of the distance from the centre."""
    y, x = (((torch.arange(n, device=device) + 0.5) / n) * 2 - 1 for n in size)
    radius = torch.hypot(y[:, None], x[None, :])
    middles = torch.tensor(centres, device=device).log()[:, None, None]
    return torch.exp(-0.5 * ((radius.log() - middles) / width) ** 2)[None]


def negative_log_likelihood(mean: Tensor, sigma: Tensor, label: Tensor, label_err: Tensor) -> Tensor:
    """Gaussian loss of noisy labels: the spread about the label is the network's own plus the label's known error.

    Args:
        mean: (n,) predicted log10 M500c.
        sigma: (n,) predicted standard deviation of the true mass, dex.
        label: (n,) measured log10 M500c.
        label_err: (n,) its standard error, dex.

    Returns:
        Mean over the batch of -log N(label; mean, sigma^2 + label_err^2), without the constant.
    """
    variance = sigma**2 + label_err**2
    return 0.5 * (torch.log(variance) + (label - mean) ** 2 / variance).mean()
