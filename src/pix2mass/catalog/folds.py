"""Cross-validation folds in which neighbours on the sky stay together."""

from __future__ import annotations

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
) -> np.ndarray:
    """Deal clusters into folds of nearly equal size and like mass, friends-of-friends groups on the sky undivided.

    Two clusters closer than the separation share pixels or large-scale structure; in different folds they would let
    the training part see the test part.

    Args:
        ra_deg: right ascension, shape (n,).
        dec_deg: declination, shape (n,).
        log10_m500c: what to balance between folds, shape (n,).
        n_folds: number of folds.
        separation_deg: clusters closer than this share a fold.
        seed: of the random dealing.

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
    fold_size = np.zeros(n_folds)
    fold_of_group = np.zeros(n_groups, int)
    # In order of mass, each group to the emptiest fold: sizes stay level and every fold gets all masses.
    for index in np.lexsort((rng.random(n_groups), mean_mass)):
        emptiest = np.flatnonzero(fold_size == fold_size.min())
        fold = rng.choice(emptiest)
        fold_of_group[index] = fold
        fold_size[fold] += size[index]
    return fold_of_group[group]
