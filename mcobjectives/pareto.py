"""Pareto k-hat: how heavy the tail of the importance weights is, and so whether to trust an average of them.

arviz-stats fits one column that holds every weight. This one fits a batch of tails, which is all that a stream keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcobjectives.data import in_float64

_EQUAL = 1e-3


def tail_length(k: int) -> int:
    """How many of k weights form the tail that k-hat is fitted to: min(k / 5, 3 sqrt k), or zero if under five."""
    tail = int(min(k / 5, 3 * math.sqrt(k)))
    return tail if tail >= 5 else 0


def pareto_khat(largest: Tensor) -> Tensor:
    """Shape of the generalised Pareto distribution of the largest weights, `(tail + 1, batch) -> (batch,)`.

    `largest` has the largest log-weights in descending order; the last one is the cutoff. The fit is that of Zhang &
    Stephens (2009) with the weak prior of Vehtari et al. (2024). The result is NaN if there is no tail or its weights
    are equal to within a thousandth. It is infinite if three quarters of them vanish beside the largest.

    Example:
        >>> import torch
        >>> uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        >>> weights = uniform**-0.8  # P(weight > w) = w^(-1 / 0.8)
        >>> largest = weights.log().topk(tail_length(10_000) + 1).values.unsqueeze(1)
        >>> round(float(pareto_khat(largest)), 1)
        0.8
    """
    tail = largest.shape[0] - 1
    if tail < 5:
        return torch.full_like(largest[0], math.nan)
    largest = in_float64(largest)
    tiny = torch.finfo(largest.dtype).tiny
    weights = torch.exp(largest - largest[0])
    excess = (weights[:-1] - weights[-1]).flip(0)  # ascending
    quartile, top = excess[int(tail / 4 + 0.5) - 1], excess[-1]
    # With the cutoff, as where h is discrete: among weights of which many count, it is not that they have vanished.
    many = weights.sum(0).square() / weights.square().sum(0) >= tail / 4
    tied = (quartile < tiny) & (weights[-1] >= tiny) & many
    quartile = torch.where(tied, torch.where(excess >= tiny, excess, math.inf).amin(0), quartile)
    grid = torch.arange(1, 31 + math.isqrt(tail), dtype=excess.dtype, device=excess.device) - 0.5
    b = (1 - torch.sqrt(len(grid) / grid)).unsqueeze(1) / (3 * quartile) + 1 / top
    shape = torch.stack([torch.log1p(-row * excess).mean(0) for row in b])
    posterior = (tail * (torch.log(-b / shape) - shape - 1)).softmax(0)
    posterior = torch.where(posterior < 10 * torch.finfo(posterior.dtype).eps, 0.0, posterior)
    b_mean = (b * posterior).sum(0) / posterior.sum(0)
    khat = (tail * torch.log1p(-b_mean * excess).mean(0) + 10 * 0.5) / (tail + 10)
    khat = torch.where((quartile < tiny) & (top > 0), math.inf, khat)
    return torch.where(top < _EQUAL, math.nan, khat)
