"""The jackknife objective, and the score estimator whose baseline is the objective of the other samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mcobjectives import Objective, Weights
from mcobjectives.reductions import log_mean_exp

__all__ = ["Jackknife", "loo"]


@dataclass(frozen=True)
class Jackknife(Objective):
    """The IWAE bound with its leading bias removed: F = k LME(l) - (k - 1) mean_j LME(l without l_j) (Nowozin 2018).

    Its bias as an estimate of log p(x) falls as 1/k^2, that of IWAE as 1/k. No bound: the correction extrapolates, so F
    may exceed the largest log-weight, and raising a log-weight may lower it. `k = 1` is the VAE.

    Example:
        >>> import torch
        >>> Jackknife(k=2).reduce(torch.tensor([[-3.0], [-3.0]]))
        tensor([-3.])
    """

    k: int = 50

    exempt = frozenset({"bounds", "monotone"})

    def reduce(self, log_w: Tensor) -> Tensor:
        k = log_w.shape[0]
        if k == 1:
            return log_w[0]
        return k * log_mean_exp(log_w) - (k - 1) * log_mean_exp(_without_each(log_w)).mean(0)


def loo(objective: Objective, log_w: Tensor) -> Weights:
    """Score-function gradient whose baseline for sample i is the objective of the other k - 1 samples.

    For discrete latents, like "vimco", whose baseline puts the mean of the others in the place of sample i.
    """
    k, batch = log_w.shape
    if k < 2:
        raise ValueError("gradient='loo' needs at least two samples, got k = 1: use k >= 2 or gradient='score'")
    try:
        baseline = objective.reduce(_without_each(log_w).reshape(k - 1, k * batch)).reshape(k, batch)
    except ValueError as error:
        raise ValueError(
            f"gradient='loo' needs an objective of any number of samples, but {error}: use gradient='vimco'"
        ) from error
    g = objective.slopes(log_w)
    return Weights(g, None, objective.tempering * g - (objective.reduce(log_w) - baseline))


def _without_each(log_w: Tensor) -> Tensor:
    """For each i the log-weights j != i: `(k, batch) -> (k - 1, k, batch)`, i along the second axis."""
    k = log_w.shape[0]
    steps = torch.arange(1, k, device=log_w.device)
    others = (steps.unsqueeze(1) + torch.arange(k, device=log_w.device)) % k
    return log_w[others]
