"""Derivatives and leave-one-out values of any reduction F: `(k, batch) -> (batch,)`, by autograd on F alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mcobjectives.reductions import mean_of_others

Reduction = Callable[[Tensor], Tensor]

_ELEMENTS_AT_ONCE = 4_000_000
_HALVINGS = 40


def reduced(reduce: Reduction, log_w: Tensor) -> Tensor:
    """F, once it is known to be `(batch,)` and to depend on log_w as far as autograd sees."""
    value = reduce(log_w)
    if value.shape != log_w.shape[1:]:
        raise ValueError(
            f"reduce(log_w) has shape {tuple(value.shape)} for log_w of shape {tuple(log_w.shape)}: "
            "it must reduce the samples, (k, batch) -> (batch,)"
        )
    if log_w.requires_grad and not value.requires_grad:
        raise ValueError(
            "reduce(log_w) has no gradient: compute it from log_w by torch operations, without detach and NumPy"
        )
    return value


def slopes(reduce: Reduction, log_w: Tensor) -> Tensor:
    """g_i = dF/dl_i, `(k, batch)`."""
    with _differentiable(log_w) as leaf:
        return torch.autograd.grad(reduced(reduce, leaf).sum(), leaf)[0]


def curvatures(reduce: Reduction, log_w: Tensor) -> Tensor:
    """H_ii = d2F/dl_i^2, `(k, batch)`: the diagonal by one Hessian-vector product a sample."""
    rows = []
    with _differentiable(log_w) as leaf:
        (g,) = torch.autograd.grad(reduce(leaf).sum(), leaf, create_graph=True)
        if not g.requires_grad:  # F is linear, at least in pieces
            return torch.zeros_like(log_w)
        for i in range(log_w.shape[0]):
            (row,) = torch.autograd.grad(g[i].sum(), leaf, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(log_w[i]) if row is None else row[i])
    return torch.stack(rows)


@contextmanager
def _differentiable(log_w: Tensor) -> Iterator[Tensor]:
    """log_w as a leaf, in a context that has a graph wherever this is called, under `inference_mode` too."""
    inference = not torch.compiler.is_compiling() and (torch.is_inference_mode_enabled() or log_w.is_inference())
    with torch.inference_mode(False) if inference else nullcontext(), torch.enable_grad():
        yield (log_w.clone() if inference else log_w.detach()).requires_grad_()


def leave_one_out(reduce: Reduction, log_w: Tensor) -> Tensor:
    """b_i = F with l_i replaced by the mean of the others, `(k, batch)`, a few i at a time."""
    k, batch = log_w.shape
    others = mean_of_others(log_w)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(1, k * batch))
    values = []
    for start in range(0, k, at_once):
        i = torch.arange(start, min(start + at_once, k), device=log_w.device)
        replaced = log_w.unsqueeze(1).expand(k, len(i), batch).clone()
        replaced[i, i - start] = others[i]
        values.append(reduce(replaced.reshape(k, -1)).reshape(len(i), batch))
    return torch.cat(values)


def slopes_vary(slopes: Reduction, k: int) -> bool:
    """Whether g depends on the log-weights at all, that is, whether F is not linear."""
    low, high = (slopes(end) for end in _walks(k, _steps(k)))
    return bool((low - high).abs().max() > 1e-12)


def differentiable_twice(reduce: Reduction, k: int) -> bool:
    """Whether dF/dl has a graph of its own."""
    with _differentiable(_walks(k, _steps(k))[0]) as leaf:
        (g,) = torch.autograd.grad(reduce(leaf).sum(), leaf, create_graph=True)
    return g.requires_grad


def slopes_jump(slopes: Reduction, k: int) -> bool:
    """Whether g jumps somewhere along some walks."""
    return largest_jump(slopes, k, _steps(k)) > 1e-6


def _steps(k: int) -> int:
    """Steps per walk: fewer for large k, to bound the cost."""
    return max(1, min(16, 160_000 // k))


def largest_jump(function: Reduction, k: int, steps: int = 16) -> float:
    """The largest jump of a function of log-weights `(k, n) -> (rows, n)` found along some walks of so many steps.

    Each step is halved, towards the larger change, until a jump is all that is left: however steep, the change of a
    continuous function shrinks with the interval; that of a median's slopes, or a maximum's, stays.
    """
    low, high = _walks(k, steps)
    at_low, at_high = function(low), function(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        at_middle = function(middle)
        left = (at_middle - at_low).abs().amax(0) > (at_high - at_middle).abs().amax(0)
        low, at_low = torch.where(left, low, middle), torch.where(left, at_low, at_middle)
        high, at_high = torch.where(left, middle, high), torch.where(left, at_middle, at_high)
    return float((at_high - at_low).abs().max())


def _walks(k: int, steps: int) -> tuple[Tensor, Tensor]:
    """Where the steps of straight walks through log-weight space start and end: `(k, walks * steps)` each."""
    double: Any = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is
    generator = torch.Generator("cpu").manual_seed(0)
    scales = torch.tensor([1.0, 1.0, 3.0, 10.0, 30.0, 300.0], **double)
    start, end = torch.randn(2, k, len(scales), generator=generator, **double) * scales
    end[:, 0] = start[:, 0].roll(1)  # whichever sample is the largest, or the middle one, it does not stay so
    at = start.unsqueeze(2) + (end - start).unsqueeze(2) * torch.linspace(0, 1, steps + 1, **double)
    return at[..., :-1].reshape(k, -1), at[..., 1:].reshape(k, -1)
