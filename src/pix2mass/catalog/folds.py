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
        source: label source of each cluster, shape (n,); a group counts as its commonest one. None: mass alone.

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
    stratum = np.zeros(n_groups, int) if source is None else _commonest(np.asarray(source, str), group, n_groups)
    fold_size = np.zeros(n_folds)
    fold_of_group = np.zeros(n_groups, int)
    # Source by source in order of mass, each group to the emptiest fold: sizes stay level, every fold gets all masses.
    for index in np.lexsort((rng.random(n_groups), mean_mass, stratum)):
        emptiest = np.flatnonzero(fold_size == fold_size.min())
        fold = rng.choice(emptiest)
        fold_of_group[index] = fold
        fold_size[fold] += size[index]
    return fold_of_group[group]


def _commonest(source: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Number of the commonest source in each group."""
    names, code = np.unique(source, return_inverse=True)
    counts = np.zeros((n_groups, len(names)), int)
    np.add.at(counts, (group, code), 1)
    return counts.argmax(axis=1)
