"""The two networks. Network 1: an encoder of single-band images and a band classifier on it. Network 2: a mass from
the features of all bands.

What network 1 and network 2 take and give is the paper's (Lin et al. 2022, arXiv 2203.06288, abstract). The layers, the
pooling and the error output are this project's own choices.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pix2mass.config import GridConfig
from pix2mass.galaxies import GalaxyRegressor
from pix2mass.gaussian_process import GaussianProcess
from pix2mass.scale import PhysicalScale
from pix2mass.stretch import asinh
from pix2mass.types import Pix2massError

RADIAL_EDGES = (0.06, 0.15, 0.35, 0.75)
"""Centres of the radial pooling rings, in units of the cutout's half-width (60 to 750 kpc on the default grid)."""
_RING_WIDTH = 0.45
"""Of those rings, in ln radius."""
_MIN_LOG_SIGMA = math.log(0.02)
_FAINT_FEATURE = 0.5
"""What well above it enters the Gaussian process as its logarithm, well below linearly. Features are of order one where
something is."""
_PEAK_CELLS = 32
"""Cells across an image in each of which the Gaussian process looks for the highest value of a feature: 60 kpc each on
the default width, so that a ring's mean of them counts galaxies where that of the feature itself weighs light."""
_LEAST_RING = 0.05
"""Usable share of a ring below which it says nothing."""


def prepare(flux: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Bring images to unit noise and compress bright sources, so that no band stands out by its noise level.

    Args:
        flux: (n, n_bands, h, w) nanomaggies per pixel.
        mask: (n, n_bands, h, w) bool, True = unusable.
        noise: (n, n_bands) nanomaggies, the median sigma of each image; NaN for a band without usable pixels.

    Returns:
        asinh(flux / noise), 0 where unusable, same shape as flux; and the share of bands usable per pixel, (n, h, w).
    """
    return asinh(in_noise(flux, mask, noise)), usable_share(mask, noise)


def in_noise(flux: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Flux in units of its noise, 0 where unusable; arguments as :func:`prepare`."""
    return (flux / noise[..., None, None]).masked_fill_(_unusable(mask, noise), 0.0)


def usable_share(mask: Tensor, noise: Tensor) -> Tensor:
    """Share of bands usable at each pixel, (n, h, w), 0 to 1; arguments as :func:`prepare`."""
    return 1.0 - _unusable(mask, noise).sum(dim=1, dtype=torch.uint8) / mask.shape[1]


def _unusable(mask: Tensor, noise: Tensor) -> Tensor:
    return mask | ~torch.isfinite(noise)[..., None, None]


def make_units(info: Mapping[str, Any], grid: GridConfig) -> PhysicalScale | None:
    """What brings images that :func:`prepare` gives to the units of a run: ``units`` in pretrain.json or model.json,
    "l-star" or, where missing, "noise", which needs nothing."""
    return PhysicalScale(grid) if info.get("units") == "l-star" else None


def dihedral(images: Tensor, view: int) -> Tensor:
    """One of the 8 rotations and reflections of a square, over the last two axes; view 0 is the image itself."""
    if view == 0:
        return images
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
        import timm  # takes seconds, for which the others need not wait

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


def source_of(name: str) -> str | None:
    """The code of one's own encoder, "module:function", which decides a training as its name does; None for others."""
    if ":" not in name:
        return None
    try:
        return inspect.getsource(importlib.import_module(name.partition(":")[0]))
    except (ImportError, OSError, TypeError):  # a missing module has its message where the encoder is made
        return None


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
        units: of its images, from :func:`make_units`.
    """

    def __init__(self, encoder: Encoder, n_bands: int, units: PhysicalScale | None = None) -> None:
        super().__init__()
        self.encoder, self.units = encoder, units
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

    units = None

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
        units: of its images, from :func:`make_units`.
    """

    label_mean: Tensor
    label_scale: Tensor
    z_mean: Tensor
    z_scale: Tensor

    def __init__(
        self,
        encoder: Encoder,
        n_bands: int,
        use_redshift: bool = True,
        hidden: int = 32,
        units: PhysicalScale | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.units = encoder, units
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
        """Images as :meth:`forward` takes them, from those that :func:`prepare` gives, with their noise there."""
        return images if self.units is None else self.units.rescale(images, noise, z)

    def for_maps(self, images: Tensor, valid: Tensor, noise: Tensor, z: Tensor) -> WholeImages:
        """The network as a function of which attributions are taken near these images: the same for all."""
        return WholeImages(self)

    def features(self, images: Tensor, z: Tensor | None = None) -> list[Tensor]:
        """Feature maps of all bands, per level (n, n_bands * channels, h', w'), from images (n, n_bands, h, w); the
        redshifts have no say."""
        return _features(self.encoder, images)

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


def _features(encoder: Encoder, images: Tensor) -> list[Tensor]:
    """Feature maps of all bands, per level (n, n_bands * channels, h', w'), from images (n, n_bands, h, w)."""
    n, n_bands = images.shape[:2]
    levels = encoder(images.reshape(n * n_bands, 1, *images.shape[2:]))
    return [level.reshape(n, n_bands * level.shape[1], *level.shape[2:]) for level in levels]


class RingMeans(NamedTuple):
    """Descriptions of some clusters by :class:`ProcessRegressor`.

    Attributes:
        values: (n, n_values).
    """

    values: Tensor

    @classmethod
    def joined(cls, parts: list[RingMeans], n_images: list[int]) -> RingMeans:
        """Those of several batches as one."""
        return cls(torch.cat([part.values for part in parts]))

    def of(self, clusters: Tensor, n_images: int) -> RingMeans:
        """Those of some clusters (m,)."""
        return RingMeans(self.values[clusters])


class ProcessRegressor(nn.Module):
    """Network 2 as a Gaussian process on frozen features: log10 M500c and its standard deviation.

    The feature maps of each band, and their highest values in cells, are averaged over the usable area in four rings
    around the centre, and compressed. What each band in each ring is worth is learnt, and each feature, then the mass:
    a hundred numbers by maximum likelihood, the rest by solving equations.

    Args:
        encoder: network 1's encoder, shared by the bands.
        n_bands: number of bands.
        units: of its images, from :func:`make_units`.
    """

    described_by = RingMeans

    def __init__(self, encoder: Encoder, n_bands: int, units: PhysicalScale | None = None) -> None:
        super().__init__()
        self.encoder, self.units = encoder, units
        n_rings, n_features = len(RADIAL_EDGES), 0
        place, feature = [], []
        for channels in encoder.channels:
            band = torch.arange(n_bands).repeat_interleave(channels)
            for _ in ("means", "peaks"):
                place.append((band + n_bands * torch.arange(n_rings)[:, None]).flatten())
                feature.append((n_features + torch.arange(channels)).repeat(n_rings * n_bands))
                n_features += channels
        self.process = GaussianProcess(torch.stack([torch.cat(place), torch.cat(feature)]))

    def rescale(self, images: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """As :meth:`MassRegressor.rescale`."""
        return images if self.units is None else self.units.rescale(images, noise, z)

    def for_maps(self, images: Tensor, valid: Tensor, noise: Tensor, z: Tensor) -> WholeImages:
        """As :meth:`MassRegressor.for_maps`."""
        return WholeImages(self)

    def described(self, images: Tensor, valid: Tensor, z: Tensor) -> RingMeans:
        """Compressed ring means of the features and of their peaks, NaN where a ring is masked or a band has no pixels;
        arguments as :meth:`forward`."""
        values, missing = [], (images == 0).all(dim=3).all(dim=2)
        for maps in (part for level in _features(self.encoder, images) for part in (level, _peaks(level))):
            size = (maps.shape[2], maps.shape[3])
            rings = _rings(size, maps.device)
            weight = F.adaptive_avg_pool2d(valid[:, None], size) * rings
            area = weight.sum(dim=(2, 3))[..., None]
            means = torch.einsum("nchw,nrhw->nrc", maps, weight) / area.clamp_min(1e-6)
            seen = area > _LEAST_RING * rings.sum(dim=(2, 3))[..., None]
            there = ~missing.repeat_interleave(maps.shape[1] // missing.shape[1], dim=1)
            values.append(torch.where(seen & there[:, None], torch.asinh(means / _FAINT_FEATURE), torch.nan).flatten(1))
        return RingMeans(torch.cat(values, dim=1))

    def forward(self, images: Tensor, valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mass of clusters: arguments and returns as :meth:`MassRegressor.forward`."""
        return self.from_described(self.described(images, valid, z), z)

    def from_described(self, described: RingMeans, z: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, from the output of :meth:`described`."""
        return self.process(described.values, z), self.process.sigma_dex(described.values, z)

    def fit(
        self,
        described: RingMeans,
        z: Tensor,
        log10_m500c: Tensor,
        label_err: Tensor,
        seed: int,
        tune: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Train, with the features as they are; arguments as :meth:`GalaxyRegressor.fit`, but ``tune`` has no say: what
        was learnt before is learnt anew."""
        self.process.fit(described.values, z, log10_m500c, label_err, seed, progress)


class WholeImages(nn.Module):
    """A network of feature maps as attributions need it: from normalised images to one number each.

    Args:
        regressor: the network.
    """

    def __init__(self, regressor: MassRegressor | ProcessRegressor) -> None:
        super().__init__()
        self.regressor = regressor
        self.tap = regressor.encoder.taps[-1]
        """Where the last feature maps come out, one per band."""
        self.gradients_per_step = 1

    def forward(self, images: Tensor, valid: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """log10 M500c (n,); arguments as :meth:`MassRegressor.for_maps`."""
        return self.regressor(self.regressor.rescale(images, noise, z), valid, z)[0]

    def to_pixels(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (n, h', w') brought to (n, h, w); their sums stay."""
        return to_pixels(cells, size)


def to_pixels(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (n, h', w') brought to (n, h, w), bilinearly; their sums stay."""
    area = size[0] * size[1] / (cells.shape[-2] * cells.shape[-1])
    return F.interpolate(cells[:, None], size, mode="bilinear", align_corners=False)[:, 0] / area


Regressor = MassRegressor | GalaxyRegressor | ProcessRegressor


def make_regressor(info: Mapping[str, Any], grid: GridConfig) -> Regressor:
    """An untrained network 2.

    Args:
        info: keys ``network`` ("bands" where missing), ``encoder``, ``use_redshift``, ``units`` and ``ensemble_size``
            (1 where missing), as in model.json.
        grid: of the images.
    """
    network = info.get("network", "bands")
    if network == "galaxies":
        return GalaxyRegressor(grid, info.get("ensemble_size", 1))
    encoder, units = Encoder(info["encoder"]), make_units(info, grid)
    if network == "gaussian-process":
        return ProcessRegressor(encoder, len(grid.bands), units)
    return MassRegressor(encoder, len(grid.bands), info["use_redshift"], units=units)


def _peaks(maps: Tensor) -> Tensor:
    """The highest value in each of 32 x 32 cells, or the maps (n, channels, h, w) themselves where they have fewer."""
    return F.adaptive_max_pool2d(maps, [min(_PEAK_CELLS, n) for n in maps.shape[2:]])


def _rings(size: tuple[int, int], device: torch.device) -> Tensor:
    """Weights of the pooling rings, (1, n_rings, h, w): Gaussian in the logarithm of the distance from the centre."""
    y, x = (((torch.arange(n, device=device) + 0.5) / n) * 2 - 1 for n in size)
    radius = torch.hypot(y[:, None], x[None, :])
    middles = torch.tensor(RADIAL_EDGES, device=device).log()[:, None, None]
    return torch.exp(-0.5 * ((radius.log() - middles) / _RING_WIDTH) ** 2)[None]


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
