"""Richness beside the pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pix2mass.types import Pix2massError


@dataclass(frozen=True)
class RichnessBlend:
    """Mass from a network's estimate and a measured richness together.

    log10 M = constant + network (estimate - 14.5) + richness log10(lambda / 40) + redshift log10((1 + z) / 1.3), by
    least squares on clusters that the network has not seen.
    """

    constant: float
    network: float
    richness: float
    redshift: float

    @classmethod
    def fit(cls, estimate: np.ndarray, richness: np.ndarray, z: np.ndarray, label: np.ndarray) -> RichnessBlend:
        """Fit to out-of-fold estimates.

        Args:
            estimate: (n,) log10 M500c of networks that did not see the cluster.
            richness: (n,) measured lambda; clusters without one are left out.
            z: (n,) redshifts.
            label: (n,) measured log10 M500c.

        Raises:
            Pix2massError: fewer than 20 clusters have a richness.
        """
        terms, label = cls._terms(estimate, richness, z), np.asarray(label, float)
        known = np.isfinite(terms).all(axis=1) & np.isfinite(label)
        if known.sum() < 20:
            raise Pix2massError(
                f"richness: expected at least 20 labelled clusters with a richness, found {known.sum()}"
            )
        return cls(*map(float, np.linalg.lstsq(terms[known], label[known], rcond=None)[0]))

    @staticmethod
    def _terms(estimate: np.ndarray, richness: np.ndarray, z: np.ndarray) -> np.ndarray:
        # A filter that finds no galaxies says 0: the cluster then has at most a few.
        richness = np.maximum(np.asarray(richness, float), 2.0)
        columns = (
            np.asarray(estimate, float) - 14.5,
            np.log10(richness / 40),
            np.log10((1 + np.asarray(z, float)) / 1.3),
        )
        return np.stack([np.ones(len(richness)), *columns], axis=1)

    def predict(self, estimate: np.ndarray, richness: np.ndarray, z: np.ndarray) -> np.ndarray:
        """log10 M500c (n,); NaN without a richness."""
        return self._terms(estimate, richness, z) @ np.array(
            [self.constant, self.network, self.richness, self.redshift]
        )
