"""The surrogate S of an estimator's weights (a, c, s): samples and log-densities in, differentiable terms out.

One forward pass is enough although the weights depend on all log-weights: they are needed only in the backward pass,
where `scale` reads them from a cell that is filled in between. Stopping q stops its *parameters* and never its inputs:
`stopped` differentiates log q with respect to h alone, so that q(h2 | h1) still depends on h1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.context import refuse_transforms
from mcobjectives.densities import log_weights
from mcobjectives.estimators import Weights
from mcobjectives.model import Density, Latent
from mcobjectives.replay import autocast_as_now, require_no_parameters, require_unchanged, zeros_once
from mcobjectives.sampling import check_differentiable, detached


@dataclass(frozen=True)
class Plan:
    """Which terms an estimator's weights call for."""

    plain: bool = False  # differentiate F itself
    path: bool = False  # c is not zero: samples must be differentiable
    score: bool = False  # s is not zero
    ratio: bool = False  # c / a is bounded, so that one evaluation of log p serves theta (a) and h (c)


PLAIN = Plan(plain=True, path=True)


class Ratio:
    """A cell for c / a, `(k, batch)`: read in the backward pass, filled before it, at once if its weights are known."""

    value: Tensor | None = None

    def __init__(self, weights: Weights | None = None) -> None:
        if weights is not None:
            self.of(weights)

    def of(self, weights: Weights) -> None:
        """Fill the cell; where a is zero so is c, wherever the ratio is used."""
        a, c, _ = weights
        self.value = torch.zeros_like(a) if c is None else torch.where(a == 0, 0.0, c / a).detach()


class Terms(NamedTuple):
    """The log-weights as numbers, and the differentiable terms that go with a, c and s, each `(k, batch)` or None."""

    log_w: Tensor
    a: Tensor
    c: Tensor | None
    s: Tensor | None

    def weighted_sum(self, weights: Weights) -> Tensor:
        """S for each data point, `(batch,)`, for its gradient: weight zero on a log p of -inf makes its value NaN."""
        total = (weights.a.detach() * self.a).sum(0)
        for weight, term in ((weights.c, self.c), (weights.s, self.s)):
            if term is not None and weight is not None:
                total = total + (weight.detach() * term).sum(0)
        return total


def plan_of(weights: Any, k: int) -> Plan:
    """Find out by example, on log-weights from flat to extreme, what an estimator (log_w -> (a, c, s)) calls for."""
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device is
    spread = torch.tensor([0.0, 0.1, 1.0, 10.0, 1000.0], dtype=torch.float64, device="cpu")
    a, c, s = weights(torch.randn(k, 5, generator=generator, dtype=torch.float64, device="cpu") * spread)
    if a is None:
        raise ValueError("an estimator must weight log p(x, h): a is None")
    for name, array in (("a", a), ("c", c), ("s", s)):
        if array is not None and array.shape != (k, 5):  # it would broadcast
            raise ValueError(
                f"an estimator's weights must be (k, batch): {name} is {tuple(array.shape)} for ({k}, 5) log-weights"
            )
    ratio = c is not None and bool((a >= 0).all() and (c.abs() <= 100 * a).all())
    return Plan(path=c is not None, score=s is not None, ratio=ratio)


def terms(
    plan: Plan, log_p: Density, log_q: Density, h: Latent, q: Tensor | None, k: int, tempering: float, ratio: Ratio
) -> Terms:
    """The terms of S at the samples h. `log_p` is tempered already; `tempering` multiplies log q.

    `q` is log_q(h) where that is known; not for plans with a score, which take the gradient of log q at fixed samples.
    """

    def tempered(q: Tensor) -> Tensor:
        return q if tempering == 1.0 else tempering * q

    fixed = detached(h)
    if q is None:
        q = log_q(h if plan.plain else fixed)
    if plan.path:
        check_differentiable(h, q)
    if plan.plain:
        log_w = log_weights(log_p(h), tempered(q), k, h)
        return Terms(log_w, log_w, None, None)

    together = plan.path and plan.ratio
    at = scale(h, ratio) if together else fixed
    p = log_p(at)
    log_w = log_weights(p.detach(), tempered(q.detach()), k, h)
    s_term = -q if plan.score else None
    if together:
        return Terms(log_w, p - tempered(stopped(log_q, at, q)), None, s_term)
    path = stopped(log_p, h, p) - tempered(stopped(log_q, h, q)) if plan.path else None
    return Terms(log_w, p, path, s_term)


def scale(h: Latent, ratio: Ratio) -> Latent:
    """h, with the gradient that flows back through it multiplied by the ratio's value at that time."""
    refuse_transforms(h)
    return pytree.tree_map(lambda part: _Scale.apply(part, ratio), h)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ratio: Ratio) -> Tensor:
        ctx.ratio = ratio
        return part.clone()  # a view would have torch speak of `_Scale` where a model changes h in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        value = ctx.ratio.value
        return grad * value.reshape(value.shape + (1,) * (grad.ndim - value.ndim)).to(grad.dtype), None


def stopped(density: Density, h: Latent, value: Tensor) -> Tensor:
    """density(h), whose value is known, differentiable with respect to h alone: its parameters are stopped."""
    refuse_transforms(h)
    leaves, structure = pytree.tree_flatten(h)

    def of_leaves(parts: list[Tensor]) -> Tensor:  # torch 2.9 compiles no function with a structure as its argument
        return density(pytree.tree_unflatten(parts, structure))

    return _Stopped.apply(of_leaves, value.detach(), *leaves)


class _Stopped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_leaves: Callable[[list[Tensor]], Tensor], value: Tensor, *leaves: Tensor) -> Tensor:
        ctx.of_leaves = of_leaves
        ctx.autocast = autocast_as_now(value.device.type)
        ctx.save_for_backward(value, *leaves)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        first, *saved = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in saved]
            with ctx.autocast():
                value = ctx.of_leaves(leaves)
            require_unchanged(value, first, "a log-density")
            if not value.requires_grad:  # it does not depend on h
                return None, None, *[None] * len(leaves)
            grads = torch.autograd.grad(value, leaves, grad, allow_unused=True)
        return None, None, *grads


def with_value(total: Tensor, value: Tensor) -> Tensor:
    """`value` with the gradient of `total`, but no second derivative: S holds its weights constant."""
    require_no_parameters(value)
    return _WithValue.apply(total, value)


class _WithValue(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad + zeros_once(ctx.saved_tensors[0]), None
