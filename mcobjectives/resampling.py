"""Which few samples to back-propagate: the threshold rule of Fearnhead & Clifford (2003), unbiased."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion(importance: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The probabilities pi, float64 `(k, batch)`, and the indices of the m largest v in order, `(min(m, k), batch)`.

    pi_i = min(v_i / tau, 1) with tau such that they sum to m (or to the number of non-zero v_i, if that is fewer), for
    v = `importance`, `(k, batch)` and not negative.
    """
    v = importance.double()
    largest, index = v.topk(min(m, len(v)), dim=0)
    rest = v.scatter(0, index, 0.0).sum(0)
    # With c samples kept for certain, the other m - c places are shared by a mass of tails[c]; no cancellation.
    tails = rest + largest.flip(0).cumsum(0).flip(0)
    places = m - torch.arange(len(largest), dtype=v.dtype, device=v.device).unsqueeze(1)
    taus = tails / places
    fits = largest <= taus * (1 + 1e-12)
    fits[-1] = True  # with one place left, the mass of the rest is at least its largest part
    tau = taus.gather(0, fits.to(torch.uint8).argmax(0, keepdim=True))
    return torch.where(v > 0, (v / tau).clamp(max=1.0), 0.0), index


def select(importance: Tensor, m: int, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic sampling with those probabilities: `(index, multiplier)`, each `(m, batch)`, for m up to k.

    `offset` is uniform in [0, 1), `(batch,)`. The multiplier is 1 / pi of the chosen sample, so that for any f
    E[sum_j multiplier_j f(index_j)] = sum_i f(i) over the samples with v_i > 0. Surplus places have multiplier zero.
    """
    pi, largest = inclusion(importance, m)
    certain = pi >= 1
    edges = torch.where(certain, 0.0, pi).T.contiguous().cumsum(1)
    # Rounding may leave the last edge a hair beside the whole number that it is.
    edges = torch.where(edges >= edges[:, -1:], edges[:, -1:].round(), edges)
    # Those that are kept for certain take the first places: in one sum with the others rounding could lose them.
    place = torch.arange(m, device=pi.device).unsqueeze(1) - certain.sum(0)
    drawn = torch.searchsorted(edges, (offset.double() + place).T.contiguous(), right=True).T
    index = torch.where(place < 0, largest, drawn)
    surplus = index >= pi.shape[0]
    index = index.clamp(max=pi.shape[0] - 1)
    # However unlikely the sample, its multiplier is a number that float32 holds too.
    return index, torch.where(surplus, 0.0, 1 / pi.gather(0, index).clamp(min=1e-30))
