"""Cross-validation folds in which neighbours on the sky stay together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord, search_around_sky
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pix2mass.types import Pix2massError


def sky_folds(
    ra_deg: np.ndarray,
    dec_deg: np.ndarray,
    log10_m500c: np.ndarray,
    n_folds: int,
    separation_deg: float,
    seed: int,
    source: Sequence[str] | np.ndarray | None = None,
) -> np.ndarray:
    """Deal clusters into folds of nearly equal size and like mass, friends-of-friends groups on the sky undivided.

    With ``source`` every fold also gets its share of each label source, at all of that source's masses.

    Two clusters closer than the separation share pixels or large-scale structure; in different folds they would let
    the training part see the test part.

    Args:
        ra_deg: right ascension, shape (n,).
        dec_deg: declination, shape (n,).
        log10_m500c: what to balance between folds, shape (n,).
        n_folds: number of folds.
        separation_deg: clusters closer than this share a fold.
        seed: of the random dealing.
        source: label source of each cluster, shape (n,). None: level in mass alone.

    Returns:
        Fold number of each cluster, 0 to n_folds - 1, shape (n,).

    Raises:
        Pix2massError: there are fewer sky groups than folds.
    """
    n = len(ra_deg)
    position = SkyCoord(ra_deg, dec_deg, unit="deg")
    first, second, _, _ = search_around_sky(position, position, separation_deg * u.deg)
    links = coo_matrix((np.ones(len(first)), (first, second)), shape=(n, n))
    n_groups, group = connected_components(links, directed=False)
    if n_groups < n_folds:
        raise Pix2massError(
            f"{n} clusters form {n_groups} groups closer than {separation_deg} deg, fewer than the {n_folds} folds; "
            "lower fold_separation_deg or folds"
        )
    rng = np.random.default_rng(seed)
    size = np.bincount(group)
    mean_mass = np.bincount(group, weights=log10_m500c) / size
    if source is not None:
        return _deal_by_source(group, np.asarray(log10_m500c, float), np.asarray(source, str), n_folds, rng)[group]
    fold_size = np.zeros(n_folds)
    fold_of_group = np.zeros(n_groups, int)
    # In order of mass, each group to the emptiest fold: sizes stay level and every fold gets all masses.
    for index in np.lexsort((rng.random(n_groups), mean_mass)):
        emptiest = np.flatnonzero(fold_size == fold_size.min())
        fold = rng.choice(emptiest)
        fold_of_group[index] = fold
        fold_size[fold] += size[index]
    return fold_of_group[group]


def _deal_by_source(
    group: np.ndarray, mass: np.ndarray, source: np.ndarray, n_folds: int, rng: np.random.Generator
) -> np.ndarray:
    """Fold of each group: level in size, in the number of each source, and in that source's mean mass.

    Large groups and extreme masses are dealt first, so that the many single clusters at the end can make up for them.
    Each goes where it raises least the sum over folds and sources of (number)^2 + (sum of mass deviations / sigma)^2,
    each source weighted by one over its size, among the folds with room for it.
    """
    names, code = np.unique(source, return_inverse=True)
    n_groups, n_sources = group.max() + 1, len(names)
    size_of_source = np.bincount(code)
    mean = np.bincount(code, weights=mass) / size_of_source
    deviation = mass - mean[code]
    sigma = np.sqrt(np.bincount(code, weights=deviation**2) / size_of_source)
    deviation = deviation / np.where(sigma > 0, sigma, 1.0)[code]
    number, moment = np.zeros((n_groups, n_sources)), np.zeros((n_groups, n_sources))
    np.add.at(number, (group, code), 1.0)
    np.add.at(moment, (group, code), deviation)
    size = number.sum(axis=1)
    room = np.full(n_folds, np.ceil(len(group) / n_folds))
    fold_number, fold_moment = np.zeros((n_folds, n_sources)), np.zeros((n_folds, n_sources))
    fold_of_group = np.zeros(n_groups, int)
    order = np.lexsort((rng.random(n_groups), -np.abs(moment).sum(axis=1), -size))
    for left, index in zip(range(n_groups, 0, -1), order, strict=True):
        rise = ((fold_number * number[index] + fold_moment * moment[index]) / size_of_source).sum(axis=1)
        rise = rise + 1e-9 * rng.random(n_folds)
        empty = fold_number.sum(axis=1) == 0
        fits = empty if left <= empty.sum() else room >= size[index]
        fold = int(np.where(fits, rise, np.inf).argmin()) if fits.any() else int(room.argmax())
        fold_of_group[index] = fold
        room[fold] -= size[index]
        fold_number[fold] += number[index]
        fold_moment[fold] += moment[index]
    return fold_of_group
