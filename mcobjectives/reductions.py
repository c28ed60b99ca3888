"""Pure functions on log-weights: ``(k, batch) -> (batch,)``, entirely in log space."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY_POWER = 1e-12
_SMALL_POWER = 1e-2


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log (1/k) sum_i exp(log_w_i) along `dim`, in nats."""
    return torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])


def log_power_mean(log_w: Tensor, p: float) -> Tensor:
    """log of the power mean of the weights, (1/p) log (1/k) sum_i w_i^p. For p -> 0 it is the mean of log_w.

    `log_w` is `(k, batch)`, the result is `(batch,)`. `p` may be negative; p -> -inf gives the minimum.
    """
    if abs(p) < _TINY_POWER:
        return log_w.mean(0)
    if abs(p) >= _SMALL_POWER:
        return log_mean_exp(p * log_w) / p
    # For small p the logarithm is of a number near one: expm1 / log1p keep the digits that logsumexp / p loses.
    anchor = (log_w.amax(0) if p > 0 else log_w.amin(0)).detach()
    mean = anchor + torch.log1p(torch.expm1(p * (log_w - anchor)).mean(0)) / p
    return mean if p > 0 else torch.where(anchor == -torch.inf, anchor, mean)


def log_median(log_w: Tensor) -> Tensor:
    """Median over the samples. For even k, the mean of the two middle log-weights (torch.median takes the lower)."""
    k = log_w.shape[0]
    ordered = log_w.sort(0).values
    return (ordered[(k - 1) // 2] + ordered[k // 2]) / 2


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 for each data point: `(k, batch) -> (batch,)`, between 1 and k."""
    return 1 / log_w.softmax(0).square().sum(0)


def median_with(log_w: Tensor, value: Tensor) -> Tensor:
    """For each i, the median with log_w_i replaced by value_i: `(k, batch) -> (k, batch)`, by one sort for all i.

    With v among n ordered numbers o, the j-th smallest of the n + 1 is v clamped between o_{j-1} and o_j.
    """
    k = log_w.shape[0]
    ordered, order = log_w.sort(0)
    rank = order.argsort(0)
    ends = [torch.full_like(log_w[:1], end) for end in (-math.inf, math.inf)]
    padded = torch.cat([ends[0], ordered, ends[1]])

    def of_others(j: int) -> Tensor:
        """The j-th smallest of the others, counted from 1; -inf and inf beyond their ends."""
        return torch.where(j <= rank, padded[j], padded[j + 1])

    middle = [torch.clamp(value, of_others(j), of_others(j + 1)) for j in ((k - 1) // 2, k // 2)]
    return (middle[0] + middle[1]) / 2


def mean_of_others(log_w: Tensor) -> Tensor:
    """For each i, the mean of the log-weights j != i: `(k, batch) -> (k, batch)`."""
    return sum_of_others(log_w) / (log_w.shape[0] - 1)


def sum_of_others(values: Tensor) -> Tensor:
    """For each i, the sum of the values j != i: `(k, batch) -> (k, batch)`."""
    return _without_each(values, torch.cumsum, torch.add, 0.0)


def logsumexp_of_others(log_w: Tensor) -> Tensor:
    """For each i, the logsumexp of the log-weights j != i: `(k, batch) -> (k, batch)`, in O(k) memory."""
    return _without_each(log_w, torch.logcumsumexp, torch.logaddexp, -math.inf)


def _without_each(log_w: Tensor, accumulate, combine, empty: float) -> Tensor:
    # Prefix and suffix instead of total minus own: no cancellation, and -inf entries stay -inf, never NaN.
    none = torch.full_like(log_w[:1], empty)
    before = torch.cat([none, accumulate(log_w, 0)[:-1]])
    after = torch.cat([accumulate(log_w.flip(0), 0).flip(0)[1:], none])
    return combine(before, after)
