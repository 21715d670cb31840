"""Blank sky: what an image would be if nothing were on it. Integrated gradients and class-activation maps compare an
image with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pix2mass.model import prepare
from pix2mass.store import ImageStore

DRAWS = 20
"""Images of blank sky that a cluster is compared with."""
_CLIP_SIGMA, _CLIPS = 3.0, 5
_SAMPLE = 8192
"""Pixels, or up to twice as many, that medians are taken of."""


def blank_sky(store: ImageStore, row: int, seed: int, draws: int = DRAWS) -> Tensor:
    """Draws of the store's blank sky for one cluster, with its noise as the networks see it and without a source.

    A draw is made from another cutout of the store: from the pixels that are left after sources are clipped away, each
    put at a random place, the same in all bands. So it has the sky level, the scatter, its tails and what the bands
    share, of real pixels, but no shapes. The cutouts whose pixels are nearest in angular size are used, since larger
    pixels hold more of the faint sources that no one can clip.

    Args:
        store: sealed images.
        row: of the cluster.
        seed: of the places; each cluster's depend on it and on the cluster's id.
        draws: how many.

    Returns:
        (draws, n_bands, h, w), normalised as by :func:`pix2mass.model.prepare`, 0 where the cluster's image is masked.
    """
    rng = np.random.default_rng([seed, *store.ids[row].encode()])
    own_mask = torch.from_numpy(store.batch([row])[1][0] | ~np.isfinite(store.noise[row])[:, None, None])
    needed = np.isfinite(store.noise[row])
    complete = np.isfinite(store.noise[:, needed]).all(axis=1)
    distance = np.abs(np.log(store.pixel_scale_arcsec / store.pixel_scale_arcsec[row]))
    # The cluster itself gives its sky only where the store has no other.
    distance[row] = np.finfo(float).max
    order = np.argsort(np.where(complete, distance, np.inf), kind="stable")[: min(draws, int(complete.sum()))]
    others = order[order != row]
    donors = others if len(others) else np.array([row])
    sky = [_source_free(store, int(donor)) for donor in donors]
    images = torch.zeros(draws, *own_mask.shape)
    for draw in range(draws):
        pixels = sky[draw % len(sky)]
        places = torch.from_numpy(rng.integers(pixels.shape[1], size=own_mask[0].numel()))
        images[draw] = pixels[:, places].reshape(own_mask.shape).masked_fill(own_mask, 0.0)
    return images


def _source_free(store: ImageStore, row: int) -> Tensor:
    """Normalised pixels (n_bands, m) of a cutout that show no source: the sum of the bands in units of their noise,
    clipped until nothing stands out of it."""
    flux, mask = store.batch([row])
    noise = store.noise[row : row + 1]
    images, _ = prepare(torch.from_numpy(flux), torch.from_numpy(mask), torch.from_numpy(noise))
    seen = np.isfinite(noise[0])
    left = ~mask[0, seen].any(axis=0)
    if not left.any():
        left[:] = True
    total = (flux[0, seen] / noise[0, seen, None, None]).sum(axis=0)
    for _ in range(_CLIPS):
        sample = total[left]
        sample = sample[:: max(1, len(sample) // _SAMPLE)]
        middle = np.median(sample)
        scatter = 1.4826 * np.median(np.abs(sample - middle))
        left &= np.abs(total - middle) <= _CLIP_SIGMA * scatter
    return images[0][:, torch.from_numpy(left)]
