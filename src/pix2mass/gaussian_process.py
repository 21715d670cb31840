"""A regression for few labels and many values: a Gaussian process that learns what each group of values is worth.

Rasmussen & Williams 2006, Gaussian Processes for Machine Learning: prediction, algorithm 2.1; marginal likelihood,
equation 2.30; squared exponentials with relevances, equation 5.1, here a product of one factor per group. Written here,
not taken from a library, since maps need its gradient and runs keep it as plain arrays; it is one kernel and one
Cholesky decomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_STEPS, _RATE = 80, 0.1
_MOST_TO_LEARN = 1000
"""Labels that the relevances are learnt from; the prediction uses all."""
_JITTER = 1e-6
_LEAST_SPREAD = 0.02
"""Of a value over the clusters: one that hardly changes tells nothing, and must not where it does change."""
_UNIT_DEX = 0.4
"""What a value of the process is worth; of no account, but for where the learning starts."""
_RELEVANCE, _CHANGE, _SIZE, _LEVEL, _NOISE = 0.2, 0.15, 2.0, 0.5, 0.1
"""Where it starts: of the groups; how fast the mass changes with redshift at equal values; the variance of the masses;
that of a line in redshift; that of true masses at equal values."""
_PULL = 0.1
"""Of ln factors towards the mean of their kind, about which they are taken to scatter by 2.2: 1 / (2 * 2.2^2) = 0.1."""
_GROWN = ("known", "known_z", "known_error", "answer")


class GaussianProcess(nn.Module):
    """log10 mass as a smooth function of values and redshift.

    The covariance of two clusters with values x, scaled by the roots of their relevances, and redshifts z is
    S exp(-|x - x'|^2) exp(-c (z - z')^2) + C (1 + z z'). Far from all labels the mass is their mean; a term linear in
    x, which weighs clusters 1% better, gives empty sky any mass.

    Values are grouped in one or more ways. A value's relevance is the product of the factors of its groups, one of each
    way, so that few labels can tell the relevances of many values.

    Args:
        groups: (ways, p) group of each value, counted from 0 in each way.
    """

    groups: Tensor
    value_mean: Tensor
    value_scale: Tensor
    z_scale: Tensor
    mean: Tensor
    known: Tensor
    known_z: Tensor
    known_error: Tensor
    answer: Tensor

    def __init__(self, groups: Tensor) -> None:
        super().__init__()
        self.n_groups = [int(way.max()) + 1 for way in groups]
        self.register_buffer("groups", groups, persistent=False)
        factors = [_RELEVANCE] * self.n_groups[0] + [1.0] * sum(self.n_groups[1:])
        start = [*factors, _CHANGE, _SIZE, _LEVEL, _NOISE]
        self.log_parameters = nn.Parameter(torch.tensor(start, dtype=torch.double).log())
        self.register_buffer("value_mean", torch.zeros(groups.shape[1]))
        self.register_buffer("value_scale", torch.ones(groups.shape[1]))
        self.register_buffer("z_scale", torch.tensor([0.0, 1.0], dtype=torch.double))
        self.register_buffer("mean", torch.zeros((), dtype=torch.double))
        for name in _GROWN:
            self.register_buffer(name, torch.zeros(0))
        self._factor: Tensor | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in _GROWN:  # as many clusters as the file has
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        self._factor = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fit(
        self,
        values: Tensor,
        z: Tensor,
        log10_m500c: Tensor,
        label_err: Tensor,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Learn the relevances by maximum marginal likelihood, and the masses.

        Args:
            values: (n, p); NaN where there is none.
            z: (n,) redshifts.
            log10_m500c: (n,) labels.
            label_err: (n,) their standard errors, dex.
            seed: of the choice of clusters that the relevances are learnt from, where there are more than enough.
            progress: called with (steps done, steps in all).
        """
        there = torch.isfinite(values)
        n_there = there.sum(dim=0)
        self.value_mean.copy_(torch.nan_to_num(values).sum(dim=0) / n_there.clamp_min(1))
        spread = torch.nan_to_num(values - self.value_mean).square().sum(dim=0) / n_there.clamp_min(1)
        scale = spread.sqrt().clamp_min(_LEAST_SPREAD)
        self.value_scale.copy_(torch.where(n_there > 0, scale, torch.inf))
        self.z_scale.copy_(torch.stack([z.double().mean(), z.double().std(correction=0).clamp_min(1e-3)]))
        self.mean.copy_(log10_m500c.double().mean())
        known, known_z = self._scaled(values, z)
        wanted, error = (log10_m500c.double() - self.mean) / _UNIT_DEX, (label_err.double() / _UNIT_DEX) ** 2
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(z))[:_MOST_TO_LEARN])
        optimizer = torch.optim.Adam([self.log_parameters], _RATE)
        with torch.enable_grad():
            for step in range(_STEPS):
                optimizer.zero_grad()
                root = self._root(known[order], known_z[order], error[order])
                solved = torch.cholesky_solve(wanted[order, None], root)[:, 0]
                loss = 0.5 * wanted[order] @ solved + root.diagonal().log().sum()
                for factors in self.log_factors:
                    loss = loss + _PULL * (factors - factors.mean()).square().sum()
                loss.backward()
                optimizer.step()
                if progress:
                    progress(step + 1, _STEPS)
        with torch.no_grad():
            root = self._root(known, known_z, error)
            self.answer = torch.cholesky_solve(wanted[:, None], root)[:, 0]
            self.known, self.known_z, self.known_error, self._factor = known.float(), known_z, error, root

    @property
    def log_factors(self) -> tuple[Tensor, ...]:
        """ln of the factors of each way of grouping; their products are the relevances. Views of the parameters."""
        return self.log_parameters[: sum(self.n_groups)].split(self.n_groups)

    def forward(self, values: Tensor, z: Tensor) -> Tensor:
        """Mean (m,) of log10 M500c, of clusters with values (m, p) and redshifts (m,)."""
        return (self.mean + _UNIT_DEX * self._with_known(values, z) @ self.answer).to(values)

    @torch.no_grad()
    def sigma_dex(self, values: Tensor, z: Tensor) -> Tensor:
        """Standard deviation (m,) of the true log10 M500c, dex; arguments as :meth:`forward`."""
        size, level, noise = self.log_parameters[-3:].exp()
        prior = size + level * (1 + self._scaled(values, z)[1] ** 2)
        if self._factor is None:  # not kept in files: it is the square of the number of clusters
            self._factor = self._root(self.known.double(), self.known_z, self.known_error)
        taught = torch.linalg.solve_triangular(self._factor, self._with_known(values, z).T, upper=False)
        variance = (prior - taught.square().sum(dim=0)).clamp_min(0) + noise
        return (_UNIT_DEX * variance.sqrt()).to(values)

    def _scaled(self, values: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values and redshifts in units of their spread, about their mean, which a missing one is taken to have."""
        x = torch.nan_to_num((values - self.value_mean) / self.value_scale)
        return x.double(), (z.double() - self.z_scale[0]) / self.z_scale[1]

    def _with_known(self, values: Tensor, z: Tensor) -> Tensor:
        return self._covariance(*self._scaled(values, z), self.known.double(), self.known_z)

    def _covariance(self, x: Tensor, z: Tensor, other: Tensor, other_z: Tensor) -> Tensor:
        change, size, level = self.log_parameters[-4:-1].exp()
        relevance = torch.stack([f[way] for f, way in zip(self.log_factors, self.groups, strict=True)]).sum(dim=0).exp()
        weight = (relevance / len(relevance)).sqrt()
        x, other = x * weight, other * weight
        apart = (x.square().sum(dim=1)[:, None] + other.square().sum(dim=1) - 2 * x @ other.T).clamp_min(0)
        near = torch.exp(-apart - change * (z[:, None] - other_z) ** 2)
        return size * near + level * (1 + z[:, None] * other_z)

    def _root(self, x: Tensor, z: Tensor, error: Tensor) -> Tensor:
        """Cholesky factor of the covariance of labels whose errors have these variances."""
        own = self.log_parameters[-1].exp() + error + _JITTER
        return torch.linalg.cholesky(self._covariance(x, z, x, z) + torch.diag(own))
