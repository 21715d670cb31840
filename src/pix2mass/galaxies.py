"""Network 2 as a count of galaxies: what each source in the image weighs is learnt, the sum is turned into a mass.

Sources are the maxima of the image of all bands together. Each is described by its light in units of an L* red galaxy
at the cluster's redshift, how far its colours lie from the red sequence, how compact it is and where it lies. A small
network gives it some weights; their sums over the image, as logarithms, and the redshift go to the mass. This is a
network on sets (Zaheer et al. 2017, arXiv 1703.06114); the form, logarithm of a sum of weights that depend on
luminosity, colour and radius, is that of the richness lambda (Rykoff et al. 2014, ApJ 785, 104). Description and sizes
are this project's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pix2mass.config import GridConfig
from pix2mass.scale import PhysicalScale
from pix2mass.stretch import sinh
from pix2mass.types import SDSS_PIXEL_SCALE_ARCSEC

_NATIVE_SIGMA_NMGY = {"u": 0.044, "g": 0.0186, "r": 0.027, "i": 0.046, "z": 0.178}
"""Noise of a native SDSS pixel: within the range of six frames. It weighs bands and colours."""
_COLOUR_SCATTER = {"u": 0.20, "g": 0.10, "r": 0.06, "i": 0.08}
"""Fractional width of the red sequence in the flux of a band relative to the next: scatter, slope and zero points."""
_BINOMIAL = torch.tensor([1.0, 2.0, 1.0, 2.0, 4.0, 2.0, 1.0, 2.0, 1.0]) / 16
_BINOMIAL_NOISE = 0.375
"""White noise that is left after smoothing with it."""
_LEAST_SIGNIFICANCE = (3.0, 5.0)
_LEAST_LIGHT = (0.07, 0.12)
"""A maximum counts nothing below the first, fully above the second: of the smoothed image over its noise, and of the
light in 3 x 3 pixels in L*. Between, smoothly, so that the mass is a smooth function of the pixels."""
_RINGS = 10
"""Rings in which masked area is made up for by the sources in what is left of them."""
_LEAST_COVERAGE = 0.2
_WEIGHTS, _HIDDEN = 8, 32
"""Weights that each source is given, width of the layers."""
_CENTRE_DEX, _SCALE_DEX = 14.5, 0.3
_BATCH, _PASSES, _STEPS = 64, 60, (600, 6000)
"""Clusters per step, passes over them, and fewest and most steps."""
_LEARNING_RATE, _WEIGHT_DECAY = 4e-3, 1e-2
_INPUT_NOISE = 0.1
"""Noise on the descriptions in training, in units of their spread."""
_EMPTY_DEX = 0.5
"""An image without sources gets a mass lower than all labels by this much. No label teaches that."""
_EXTRA_ERROR_DEX = 0.1
"""Added in quadrature to the labels' errors where they weigh the labels: masses scatter at equal images."""
_CORRECTION_WIDTHS = (0.5, 0.5, 1.0, 4.0, 1.0, 0.5)
"""Prior widths of the coefficients of 1, u, v, v^2, u v, u^2 by which a network is tuned; u is its mass less 10^14.5,
within 1 dex, v the redshift less 0.3. They matter for a few tens of labels."""


class Sources(NamedTuple):
    """Places of the sources of some images, each (n_sources,), in the order of the images.

    Attributes:
        image: index of the image.
        row: of the pixel.
        column: of the pixel.
    """

    image: Tensor
    row: Tensor
    column: Tensor

    def copies(self, n: int) -> Sources:
        """The places of one image's sources in n images."""
        image = torch.arange(n, device=self.image.device).repeat_interleave(len(self.image))
        return Sources(image, self.row.repeat(n), self.column.repeat(n))

    def near(self, images: Tensor) -> Tensor:
        """Values (n_sources, n_bands, 9) in the 3 x 3 pixels around each source, from images (n, n_bands, h, w);
        those of the nearest pixel where the image ends."""
        height, width = images.shape[2:]
        step = torch.tensor([-1, 0, 1], device=images.device)
        row = (self.row[:, None] + step).clamp(0, height - 1)
        column = (self.column[:, None] + step).clamp(0, width - 1)
        pixel = (row[:, :, None] * width + column[:, None, :]).flatten(1)
        return images.flatten(2)[self.image[:, None], :, pixel].transpose(1, 2)


class Described(NamedTuple):
    """Descriptions of the sources of some clusters.

    Attributes:
        image: (n_sources,) index of the cluster, ascending.
        values: (n_sources, n_values).
        share: (n_sources,) what each counts: below 1 for the faintest, above where its neighbourhood is masked.
    """

    image: Tensor
    values: Tensor
    share: Tensor

    @classmethod
    def joined(cls, parts: list[Described], n_images: list[int]) -> Described:
        """Those of several batches of ``n_images`` clusters each as one."""
        starts = np.concatenate([[0], np.cumsum(n_images)[:-1]])
        image = torch.cat([part.image + int(start) for part, start in zip(parts, starts, strict=True)])
        return cls(image, torch.cat([part.values for part in parts]), torch.cat([part.share for part in parts]))

    def of(self, clusters: Tensor, n_images: int) -> Described:
        """Those of some clusters (m,), which become 0 to m - 1; ``n_images`` is the number there is."""
        ends = torch.searchsorted(self.image, torch.arange(n_images), right=True)
        length = torch.diff(ends, prepend=ends.new_zeros(1))
        first, length = (ends - length)[clusters], length[clusters]
        image = torch.repeat_interleave(torch.arange(len(clusters)), length)
        wanted = torch.arange(len(image)) + (first - torch.cumsum(length, 0) + length)[image]
        return Described(image, self.values[wanted], self.share[wanted])


class GalaxyEncoder(PhysicalScale):
    """Finds the sources of images and describes them. It has no weights to learn.

    Args:
        grid: bands and pixel scale of the images.
    """

    sigma: Tensor

    def __init__(self, grid: GridConfig) -> None:
        super().__init__(grid)
        self.bands = grid.bands
        native = np.array([_NATIVE_SIGMA_NMGY[band] for band in grid.bands])
        sigma = native * (self.pixel_arcsec / SDSS_PIXEL_SCALE_ARCSEC)[:, None]
        self.add_table("sigma", sigma / self.l_star.numpy())
        self.reference = grid.bands.index("i") if "i" in grid.bands else len(grid.bands) - 1
        """The band in which luminosity is measured."""
        self.pairs = [(k, _COLOUR_SCATTER[band]) for k, band in enumerate(grid.bands[:-1])]
        self.n_values = 6 + 2 * len(self.pairs)

    @torch.no_grad()
    def find(self, light: Tensor, valid: Tensor, z: Tensor) -> Sources:
        """Maxima of the bands' mean, weighted by their noise and smoothed, that are not lost in it.

        Args:
            light: (n, n_bands, h, w) from :meth:`GalaxyRegressor.rescale`.
            valid: (n, h, w) usable share.
            z: (n,) redshifts.
        """
        weight = self._band_weight(z)
        mean = torch.einsum("nb,nbhw->nhw", weight, light)[:, None]
        kernel = _BINOMIAL.reshape(1, 1, 3, 3).to(mean)
        smooth = F.conv2d(F.pad(mean, (1, 1, 1, 1), mode="replicate"), kernel)
        highest = F.max_pool2d(smooth, 3, 1, 1) == smooth
        least = _LEAST_SIGNIFICANCE[0] * self._smooth_sigma(z)
        box = 9 * F.avg_pool2d(F.pad(light[:, [self.reference]], (1, 1, 1, 1), mode="replicate"), 3, 1)
        counted = highest & (smooth > least[:, None, None, None]) & (box > _LEAST_LIGHT[0])
        return Sources(*torch.nonzero(counted[:, 0] & (valid > 0), as_tuple=True))

    def _band_weight(self, z: Tensor) -> Tensor:
        weight = self.at(self.sigma, z) ** -2
        return weight / weight.sum(dim=1, keepdim=True)

    def _smooth_sigma(self, z: Tensor) -> Tensor:
        return _BINOMIAL_NOISE * (self.at(self.sigma, z) ** -2).sum(dim=1) ** -0.5

    def describe(self, near: Tensor, valid: Tensor, z: Tensor, sources: Sources) -> Described:
        """What is seen at the sources, a smooth function of the light.

        Args:
            near: (n_sources, n_bands, 9) light around them, as :meth:`Sources.near` gives it.
            valid: as for :meth:`find`.
            z: as for :meth:`find`.
            sources: from :meth:`find`.
        """
        image, row, column = sources
        height, width = valid.shape[1:]
        smooth = near @ _BINOMIAL.to(near)
        reference = smooth[:, self.reference]
        box, peak = near[:, self.reference].sum(dim=1), near[:, self.reference, 4]
        log_box, log_reference, log_peak = (
            0.5 * torch.log(x**2 + floor**2) for x, floor in ((box, 0.03), (reference, 0.01), (peak, 0.01))
        )
        sigma = _BINOMIAL_NOISE * self.at(self.sigma, z)[image]
        seen = [log_box, log_reference - log_box, log_peak - log_box]
        for k, scatter in self.pairs:
            error = torch.sqrt(sigma[:, k] ** 2 + sigma[:, k + 1] ** 2 + (scatter * reference) ** 2)
            seen += [torch.asinh((smooth[:, k] - smooth[:, k + 1]) / error), torch.log(error) - log_reference]
        pixels = torch.hypot(row + 0.5 - height / 2, column + 0.5 - width / 2)
        radius_kpc = pixels * self.at(self.kpc_per_pixel, z)[image, 0]
        seen += [radius_kpc / 1000, torch.log(radius_kpc + 30), z[image]]
        significance = (smooth * self._band_weight(z)[image]).sum(dim=1) / self._smooth_sigma(z)[image]
        share = _smoothly(significance, *_LEAST_SIGNIFICANCE) * _smoothly(box, *_LEAST_LIGHT)
        covered = _ring_coverage(valid)
        ring = (pixels / (max(height, width) / 2) * _RINGS).long().clamp_max(_RINGS - 1)
        return Described(image, torch.stack(seen, dim=1), share / covered[image, ring])


class _Weigher(nn.Module):
    """What one network of :class:`GalaxyRegressor` learns: the weights of a source, and the mass of their sums.

    Args:
        n_values: length of the description of a source.
    """

    def __init__(self, n_values: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.Linear(n_values, _HIDDEN),
            nn.GELU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.GELU(),
            nn.Linear(_HIDDEN, _WEIGHTS),
        )
        self.linear = nn.Linear(_WEIGHTS + 2, 1)
        self.beside = nn.Sequential(nn.Linear(_WEIGHTS + 2, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, 1))
        self.restart()

    def restart(self) -> None:
        """Random first weights; the part beside the linear one starts at nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        nn.init.zeros_(self.beside[-1].get_parameter("weight"))
        nn.init.zeros_(self.beside[-1].get_parameter("bias"))

    def weights(self, scaled: Tensor, share: Tensor) -> Tensor:
        """What each source weighs (n_sources, n_weights), none negative."""
        return F.softplus(self.weigh(scaled) - 2) * share

    def mass(self, sums: Tensor, z: Tensor) -> Tensor:
        """log10 M500c (n,) from the sums (n, n_weights) of the weights."""
        redshift = ((z - 0.3) / 0.14)[:, None]
        terms = torch.cat([torch.log(sums + 1) - 3, redshift, redshift**2 - 1], dim=1)
        return _CENTRE_DEX + _SCALE_DEX * (self.linear(terms) + self.beside(terms))[:, 0]


class GalaxyRegressor(nn.Module):
    """Network 2 that weighs and counts the sources of the image: log10 M500c and its standard deviation.

    Args:
        grid: bands and pixel scale of the images.
        ensemble_size: networks, of which the mass is the mean; sources are found and described once for all.
    """

    described_by = Described
    value_mean: Tensor
    value_scale: Tensor
    sigma_dex: Tensor
    least_sources: Tensor
    empty_dex: Tensor
    correction: Tensor

    def __init__(self, grid: GridConfig, ensemble_size: int = 1) -> None:
        super().__init__()
        self.encoder = GalaxyEncoder(grid)
        self.n_bands = len(grid.bands)
        n_values = self.encoder.n_values
        self.ensemble = nn.ModuleList([_Weigher(n_values) for _ in range(ensemble_size)])
        self.register_buffer("value_mean", torch.zeros(n_values))
        self.register_buffer("value_scale", torch.ones(n_values))
        for name in ("sigma_dex", "least_sources"):
            self.register_buffer(name, torch.ones(()))
        self.register_buffer("empty_dex", torch.full((), _CENTRE_DEX))
        self.register_buffer("correction", torch.zeros(len(_CORRECTION_WIDTHS)))

    @property
    def _weighers(self) -> list[_Weigher]:
        return cast("list[_Weigher]", list(self.ensemble))

    def rescale(self, images: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """Images in units that make red galaxies look alike at all redshifts and noise levels.

        Args:
            images: (n, n_bands, h, w) from :func:`pix2mass.model.prepare`: asinh(flux / noise).
            noise: (n, n_bands) nanomaggies, that of :func:`pix2mass.model.prepare`.
            z: (n,) redshifts.

        Returns:
            Flux in units of an L* red galaxy's in each band at that redshift, same shape.
        """
        return sinh(images) * self._unit(noise, z)[..., None, None]

    def _unit(self, noise: Tensor, z: Tensor) -> Tensor:
        return torch.nan_to_num(noise) / self.encoder.at(self.encoder.l_star, z)

    def described(self, light: Tensor, valid: Tensor, z: Tensor) -> Described:
        """Descriptions of the sources; arguments as :meth:`forward`."""
        sources = self.encoder.find(light, valid, z)
        return self.encoder.describe(sources.near(light), valid, z, sources)

    def forward(self, light: Tensor, valid: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mass of clusters.

        Args:
            light: (n, n_bands, h, w) from :meth:`rescale`.
            valid: (n, h, w) usable share.
            z: (n,) redshifts.

        Returns:
            Mean (n,) and standard deviation (n,) of log10 M500c.
        """
        return self.from_described(self.described(light, valid, z), z)

    def from_described(self, described: Described, z: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, from the output of :meth:`described`."""
        return self.from_sums(self._sums(described, len(z)), z)

    def _sums(self, described: Described, n: int) -> Tensor:
        weights = self.weights(described)
        return weights.new_zeros(n, weights.shape[1]).index_add(0, described.image, weights)

    def weights(self, described: Described) -> Tensor:
        """What each source weighs, (n_sources, ensemble_size * n_weights + 1), none negative: to one network after the
        other, and last its share."""
        scaled = (described.values - self.value_mean) / self.value_scale
        share = described.share[:, None]
        return torch.cat([*(one.weights(scaled, share) for one in self._weighers), share], dim=1)

    def from_sums(self, sums: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, from the sums (n, ensemble_size * n_weights + 1) of :meth:`weights` over each image."""
        mean = self._masses(sums, z).mean(dim=0)
        mean = mean + _correction_terms(mean, z) @ self.correction
        return self._or_empty(mean, sums), self.sigma_dex.expand(len(mean))

    def _masses(self, sums: Tensor, z: Tensor) -> Tensor:
        """What each network of the ensemble says, (ensemble_size, n), as learnt."""
        parts = sums[:, :-1].split(_WEIGHTS, dim=1)
        return torch.stack([one.mass(part, z) for one, part in zip(self._weighers, parts, strict=True)])

    def _or_empty(self, mass: Tensor, sums: Tensor) -> Tensor:
        """Masses (..., n), but those of empty sky where there are too few sources: below the least number in a training
        image nothing was learnt."""
        seen = _smoothly(sums[:, -1], 0.0, float(self.least_sources))
        return seen * mass + (1 - seen) * self.empty_dex

    def for_maps(self, images: Tensor, valid: Tensor, noise: Tensor, z: Tensor) -> GalaxiesAt:
        """The same network with its sources at the places where this image has them. Then the mass of any other image
        is a smooth function of its pixels, of which attributions can be taken.

        Args:
            images: (1, n_bands, h, w) from :func:`pix2mass.model.prepare`.
            valid: (1, h, w) usable share.
            noise: (1, n_bands) nanomaggies.
            z: (1,) redshift.
        """
        return GalaxiesAt(self, self.encoder.find(self.rescale(images, noise, z), valid, z))

    def fit(
        self,
        described: Described,
        z: Tensor,
        log10_m500c: Tensor,
        label_err: Tensor,
        seed: int,
        tune: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Train.

        Args:
            described: from :meth:`described`.
            z: (n,) redshifts.
            log10_m500c: (n,) labels.
            label_err: (n,) their standard errors, dex: labels count by 1 / (label_err^2 + 0.1^2).
            seed: of the first weights, the order of the clusters and the noise on the descriptions.
            tune: keep the present weights, and correct the mass that they give by a quadratic in mass and redshift,
                least squares: more than that, a thousand labels with errors teach worse than they unteach.
            progress: called with (steps done, steps in all).
        """
        weight = 1 / (label_err**2 + _EXTRA_ERROR_DEX**2)
        self.correction.zero_()
        self.least_sources.copy_(_counts(described, len(z)).min().clamp_min(1e-3))
        self.empty_dex.copy_(log10_m500c.min() - _EMPTY_DEX)
        if tune:
            self._correct(described, z, log10_m500c, weight)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for one in self._weighers:
                    one.restart()
                self.value_mean.copy_(described.values.mean(dim=0))
                self.value_scale.copy_(described.values.std(dim=0, correction=0).clamp_min(1e-3))
                self._descend(described, z, log10_m500c, weight, progress)
        with torch.no_grad():
            missed = log10_m500c - self.from_described(described, z)[0]
        variance = (weight * (missed**2 - label_err**2)).sum() / weight.sum()
        self.sigma_dex.copy_(variance.clamp_min(0.02**2).sqrt())

    @torch.no_grad()
    def _correct(self, described: Described, z: Tensor, log10_m500c: Tensor, weight: Tensor) -> None:
        mean = self.from_described(described, z)[0].double()
        terms = _correction_terms(mean, z.double())
        precision = terms.T @ (weight[:, None] * terms) + torch.diag(torch.tensor(_CORRECTION_WIDTHS).double() ** -2)
        self.correction.copy_(torch.linalg.solve(precision, terms.T @ (weight * (log10_m500c - mean))))

    def _descend(
        self,
        described: Described,
        z: Tensor,
        log10_m500c: Tensor,
        weight: Tensor,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        n = len(z)
        n_batch = min(_BATCH, n)
        steps = min(max(_PASSES * n // n_batch, _STEPS[0]), _STEPS[1])
        optimizer = torch.optim.AdamW(self.parameters(), _LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
        order = torch.zeros(0, dtype=torch.long)
        self.train()
        for step in range(steps):
            if len(order) < n_batch:
                order = torch.randperm(n)
            chosen, order = order[:n_batch], order[n_batch:]
            batch = described.of(chosen, n)
            noise = _INPUT_NOISE * self.value_scale * torch.randn_like(batch.values)
            sums = self._sums(batch._replace(values=batch.values + noise), n_batch)
            estimate = self._or_empty(self._masses(sums, z[chosen]), sums)
            label = log10_m500c[chosen].expand_as(estimate)
            error = F.smooth_l1_loss(estimate, label, reduction="none", beta=0.1)
            # Summed over the ensemble: each network learns as if it were alone, from the same batches.
            loss = (weight[chosen] * error).sum() / weight[chosen].sum()
            optimizer.zero_grad()
            loss.backward()
            for one in self.ensemble:
                nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress and (step % 100 == 99 or step == steps - 1):
                progress(step + 1, steps)
        self.eval()


class GalaxiesAt(nn.Module):
    """A :class:`GalaxyRegressor` with its sources at fixed places.

    Args:
        regressor: the network.
        sources: the places, in one image.
    """

    def __init__(self, regressor: GalaxyRegressor, sources: Sources) -> None:
        super().__init__()
        self.regressor, self.sources = regressor, sources
        self.tap = nn.Identity()
        """Where the weights of the sources come out, (n, ensemble_size * n_weights + 1, 1, n_sources)."""
        self.gradients_per_step = 4
        """Blank skies differ more for sources than for maps, and gradients cost little: attributions take this many."""

    def forward(self, images: Tensor, valid: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        """log10 M500c (n,); arguments as :meth:`GalaxyRegressor.for_maps`, of n images."""
        network, n = self.regressor, len(images)
        sources = self.sources.copies(n)
        near = sinh(sources.near(images)) * network._unit(noise, z)[sources.image][..., None]
        weights = network.weights(network.encoder.describe(near, valid, z, sources))
        return network.from_sums(
            self.tap(weights.unflatten(0, (n, len(self.sources.row))).permute(0, 2, 1)[:, :, None]).sum((2, 3)), z
        )[0]

    def to_pixels(self, cells: Tensor, size: tuple[int, int]) -> Tensor:
        """Values (n, 1, n_sources) spread over the 3 x 3 pixels around the sources, in images (n, h, w)."""
        maps = cells.new_zeros(len(cells), *size)
        maps[:, self.sources.row, self.sources.column] = cells[:, 0]
        return F.avg_pool2d(maps[:, None], 3, 1, 1)[:, 0]


def _correction_terms(mean: Tensor, z: Tensor) -> Tensor:
    u, v = (mean - _CENTRE_DEX).clamp(-1, 1), z - 0.3
    return torch.stack([torch.ones_like(u), u, v, v**2, u * v, u**2], dim=1)


def _counts(described: Described, n: int) -> Tensor:
    """Sources of each image (n,)."""
    return described.share.new_zeros(n).index_add(0, described.image, described.share)


def _smoothly(x: Tensor, low: float, high: float) -> Tensor:
    """0 up to ``low``, 1 from ``high`` on, smooth between."""
    share = ((x - low) / (high - low)).clamp(0, 1)
    return share**2 * (3 - 2 * share)


def _ring_coverage(valid: Tensor) -> Tensor:
    """Usable share (n, n_rings) of rings of equal width, not below a least one; the outermost holds the corners."""
    height, width = valid.shape[1:]
    y, x = (torch.arange(size, device=valid.device) + 0.5 - size / 2 for size in (height, width))
    radius = torch.hypot(y[:, None], x[None, :]) / (max(height, width) / 2)
    ring = (radius * _RINGS).long().clamp_max(_RINGS - 1).flatten()
    area = torch.bincount(ring, minlength=_RINGS).clamp_min(1)
    usable = valid.new_zeros(len(valid), _RINGS).index_add(1, ring, valid.flatten(1))
    return (usable / area).clamp_min(_LEAST_COVERAGE)
