"""Label sources on one mass scale: robust offsets from the clusters that sources share, with bootstrap errors.

Samples are selected, each in its own way: an offset between two of them is also a difference of selections, and their
common scale, X-ray and SZ, may lie 0.1 to 0.15 dex below weak lensing. The offsets make labels agree, not true.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from pix2mass.types import Pix2massError

_FEWEST_SHARED = 5


@dataclass(frozen=True)
class Offset:
    """Difference of two sources on the clusters that both have.

    Attributes:
        first: name of the first source.
        second: name of the second source.
        n: clusters in common.
        offset_dex: median of log10 M(first) - log10 M(second).
        error_dex: standard deviation of that median over bootstrap resamplings.
        mae_dex: mean absolute deviation from the median.
    """

    first: str
    second: str
    n: int
    offset_dex: float
    error_dex: float
    mae_dex: float


@dataclass(frozen=True)
class Scale:
    """Offset of each source from the reference.

    Attributes:
        reference: the source whose scale is kept.
        offset_dex: by source; subtract it from log10 M500c of that source. NaN where nothing links it to the reference.
        error_dex: by source, bootstrap standard deviation; 0 for the reference.
        before: the pairs as published.
        after: the same pairs with the offsets taken off.
    """

    reference: str
    offset_dex: dict[str, float]
    error_dex: dict[str, float]
    before: list[Offset]
    after: list[Offset]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def pair_offsets(labels: dict[str, np.ndarray], n_bootstrap: int, seed: int) -> list[Offset]:
    """Offsets of all pairs of sources, the earlier one minus the later one, with at least 5 clusters in common.

    Args:
        labels: source -> log10 M500c per cluster, NaN where it has none, shape (n_clusters,) each.
        n_bootstrap: resamplings of the shared clusters.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    found = []
    for first, second in combinations(labels, 2):
        difference = labels[first] - labels[second]
        difference = difference[np.isfinite(difference)]
        n = len(difference)
        if n < _FEWEST_SHARED:
            continue
        median = float(np.median(difference))
        error = float(np.median(difference[rng.integers(n, size=(n_bootstrap, n))], axis=1).std())
        found.append(Offset(first, second, n, median, error, float(np.abs(difference - median).mean())))
    return found


def fit_scale(labels: dict[str, np.ndarray], reference: str, n_bootstrap: int = 1000, seed: int = 1) -> Scale:
    """One offset per source that agrees best with all pairs: least squares over the pairs' medians.

    Each pair weighs as its number of shared clusters. The errors come from resampling the clusters, all pairs at once,
    so that clusters with three labels are not counted as independent.

    Args:
        labels: source -> log10 M500c per cluster, NaN where it has none, shape (n_clusters,) each.
        reference: the source whose scale is kept.
        n_bootstrap: resamplings.
        seed: of the resampling.

    Raises:
        Pix2massError: the reference is not among the sources.
    """
    if reference not in labels:
        raise Pix2massError(f"scale_reference: expected one of {', '.join(labels)}, got {reference!r}")
    names = list(labels)
    matrix = np.array([labels[name] for name in names], float)
    shared = matrix[:, np.isfinite(matrix).sum(axis=0) > 1]
    anchor = names.index(reference)
    best = _solve(shared, anchor)
    rng = np.random.default_rng(seed)
    n = shared.shape[1]
    drawn = np.array([_solve(shared[:, rng.integers(n, size=n)], anchor) for _ in range(n_bootstrap if n else 0)])
    error = np.full(len(names), np.nan)
    for row in range(len(names)):
        usable = drawn[np.isfinite(drawn[:, row]), row] if len(drawn) else drawn
        if np.isfinite(best[row]) and len(usable) > 1:
            error[row] = usable.std()
    error[anchor] = 0.0
    corrected = {name: labels[name] - np.nan_to_num(best[row]) for row, name in enumerate(names)}
    return Scale(
        reference,
        dict(zip(names, best.tolist(), strict=True)),
        dict(zip(names, error.tolist(), strict=True)),
        pair_offsets(labels, n_bootstrap, seed),
        pair_offsets(corrected, n_bootstrap, seed),
    )


def _solve(matrix: np.ndarray, anchor: int) -> np.ndarray:
    """Offset per source from the medians of all pairs; NaN for sources that no chain of pairs links to the anchor."""
    n = len(matrix)
    rows, values, weights = [], [], []
    linked = np.eye(n, dtype=bool)
    for first, second in combinations(range(n), 2):
        difference = matrix[first] - matrix[second]
        difference = difference[np.isfinite(difference)]
        if len(difference) < _FEWEST_SHARED:
            continue
        row = np.zeros(n)
        row[first], row[second] = 1.0, -1.0
        rows.append(row)
        values.append(np.median(difference))
        weights.append(np.sqrt(len(difference)))
        linked[first, second] = linked[second, first] = True
    reached = np.linalg.matrix_power(linked.astype(float), n)[anchor] > 0
    out = np.where(reached, 0.0, np.nan)
    free = [index for index in np.flatnonzero(reached) if index != anchor]
    if free:
        design, weight = np.array(rows), np.array(weights)
        inside = np.abs(design[:, ~reached]).sum(axis=1) == 0
        solution, *_ = np.linalg.lstsq(
            design[inside][:, free] * weight[inside, None], np.array(values)[inside] * weight[inside], rcond=None
        )
        out[free] = solution
    return out
