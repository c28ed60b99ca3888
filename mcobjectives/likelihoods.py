"""Log-likelihoods of images: Bernoulli pixels, on which a training step spends much time, and discrete grey levels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mcobjectives.context import is_transformed, may_synchronise
from mcobjectives.densities import at_least_float32

_BLOCK = 160_000
_ROUNDING = 1e-5
_GROUP = 16  # a product of 16 factors, each in (1, 2], stays far inside float32


def bernoulli_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | logits) = sum_d x_d l_d - log(1 + exp(l_d)) of independent Bernoulli pixels, in nats.

    `logits` is `(..., d)`. `x` is in [0, 1], of any dtype, and broadcasts against `logits`: `(k, batch, d)` goes with
    `(batch, d)`. The result is `(...)`, in float32 at least.

    The usual `binary_cross_entropy_with_logits` spends its time in log1p. Here the pixels' factors 1 + exp(-|l|) are
    multiplied in groups, and each group needs one logarithm. The products are stored minus one, so small terms keep
    their digits. Under `torch.compile`, all of it is fused into one pass over the logits.

    Raises:
        ValueError: if x leaves [0, 1], or the last dimensions do not agree.

    Example:
        >>> import torch
        >>> bernoulli_log_likelihood(torch.zeros(3, 2, 4), torch.ones(2, 4)).shape
        torch.Size([3, 2])
    """
    if logits.shape[-1] != x.shape[-1]:
        raise ValueError(f"logits have {logits.shape[-1]} pixels and x {x.shape[-1]}: the last dimensions must agree")
    _require_unit_interval(x)
    x = x.to(logits.dtype) if x.dtype == torch.bool else x
    shape = torch.broadcast_shapes(logits.shape, x.shape)
    return _Bernoulli.apply(logits if logits.shape == shape else logits.expand(shape), x)


def discretised_logistic_log_likelihood(mean: Tensor, log_scale: Tensor, x: Tensor, levels: int = 256) -> Tensor:
    """log p(x | mean, scale) = sum_d log P(x_d - w/2 < y_d < x_d + w/2) for y_d logistic, in nats.

    This is a probability over the levels 0, w, 2w, ..., 1 with w = 1 / (levels - 1), as in Kingma et al. (2016). The
    lowest level includes everything below it and the highest everything above it, so the probabilities of all levels
    add up to one.

    `mean` and `log_scale` are those of the logistic distribution, in units of x, and have shape `(..., d)`. `x`
    broadcasts against them: `(k, batch, d)` goes with `(batch, d)`. Each x counts as the nearest level. The result is
    `(...)`. In bits per dimension it is -log p / (d log 2).

    With a and b the edges (x ± w/2 - mean) / scale, P = sigmoid(a) sigmoid(-b) (1 - exp(b - a)). This takes no
    difference of nearly equal numbers, so probabilities near zero and near one keep their digits.

    Raises:
        ValueError: if there are fewer than two levels, x leaves [0, 1], or the last dimensions do not agree.

    Example:
        >>> import torch
        >>> x = torch.arange(256.0).unsqueeze(-1) / 255
        >>> log_p = discretised_logistic_log_likelihood(torch.tensor([0.3]), torch.tensor([-2.0]), x)
        >>> round(float(log_p.exp().sum()), 5)
        1.0
    """
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels!r}")
    if not mean.shape[-1] == log_scale.shape[-1] == x.shape[-1]:
        sizes = ", ".join(str(t.shape[-1]) for t in (mean, log_scale, x))
        raise ValueError(f"mean, log_scale and x must agree in the last dimension, got {sizes}")
    _require_unit_interval(x)
    mean, log_scale = at_least_float32(mean), at_least_float32(log_scale)
    width = 1 / (levels - 1)
    level = (x.to(mean.dtype) * (levels - 1)).round()
    per_unit = torch.exp((-log_scale).clamp(max=60.0))  # beyond, every probability is 0 or 1, and inf * 0 near
    # Neighbours meet at the very same number, so that nothing is lost or counted twice between them.
    upper, lower = ((level + 0.5) * width - mean) * per_unit, ((level - 0.5) * width - mean) * per_unit
    step = width * per_unit
    # log(1 - exp(-step)); where that is tiny, its series, which does not underflow.
    inside = torch.where(
        step > 1e-4, torch.log(-torch.expm1(-step.clamp(min=1e-4))), math.log(width) - log_scale - step / 2
    )
    below, above = logsigmoid(upper), logsigmoid(-lower)
    log_p = torch.where(level <= 0, below, torch.where(level >= levels - 1, above, below + above + inside))
    return log_p.sum(-1)


def _require_unit_interval(x: Tensor) -> None:
    if x.dtype == torch.bool or not x.numel() or not may_synchronise(x):
        return
    low, high = x.detach().aminmax()
    if (low < -_ROUNDING) | (high > 1 + _ROUNDING):  # one look: on a GPU each would be waited for
        raise ValueError(
            f"x must be in [0, 1], got values from {float(low):g} to {float(high):g}: divide bytes by 255, and leave "
            "out a Normalize"
        )


class _Bernoulli(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        return _in_blocks(_log_likelihood, logits, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, x = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        to_x = (grad * logits).sum_to_size(x.shape) if ctx.needs_input_grad[1] else None
        if torch.is_grad_enabled():  # a second derivative is wanted
            return (x - torch.sigmoid(logits)) * grad.to(logits.dtype), to_x
        return _in_blocks(_slope, logits, x, grad), to_x


def _log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    wide = at_least_float32(logits)
    # Minus the log-likelihood as a sum of terms of one sign: no digits are lost where a pixel is certain.
    above, below = wide.clamp(min=0), wide.clamp(max=0)
    if any(map(is_transformed, (wide, x))):
        missed = above * (1 - x) - below * x  # vmap has no rule for these in place
    else:
        missed = above.mul_(1 - x).addcmul_(below, x, value=-1)
    return -(missed.sum(-1) + _sum_log1p(wide.abs().neg_().exp_()))


def _slope(logits: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return torch.sigmoid(logits).neg_().add_(x).mul_(grad)


def _in_blocks(function: Callable[..., Tensor], logits: Tensor, x: Tensor, *more: Tensor) -> Tensor:
    """function(logits, x, ...) over slices of the samples that fit a core's cache; whole where a compiler fuses it."""
    each = logits[0].numel() if logits.ndim > x.ndim and len(logits) else logits.numel()
    if torch.compiler.is_compiling() or logits.is_cuda or each == logits.numel():
        return function(logits, x, *more)
    n = max(1, _BLOCK // each)
    blocks = [function(logits[i : i + n], x, *(m[i : i + n] for m in more)) for i in range(0, len(logits), n)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def _sum_log1p(t: Tensor) -> Tensor:
    """sum_d log(1 + t_d) for t in [0, 1]: (1 + a)(1 + b) - 1 = a + b + ab folds groups before one log1p of each."""
    groups = t.shape[-1] // _GROUP
    whole, rest = t[..., : groups * _GROUP], t[..., groups * _GROUP :]
    folded = whole.unflatten(-1, (_GROUP, groups))
    if torch.compiler.is_compiling():  # one after the other stays in registers, where halves would be stored
        first, *others = folded.unbind(-2)
        for other in others:
            first = first + other + first * other
        return _log1p(first).sum(-1) + _log1p(rest).sum(-1)
    while folded.shape[-2] > 1:
        half = folded.shape[-2] // 2
        a, b = folded[..., :half, :], folded[..., half:, :]
        folded = torch.mul(a, b).add_(a).add_(b)
    return torch.log1p(folded).sum((-1, -2)) + torch.log1p(rest).sum(-1)


def _log1p(t: Tensor) -> Tensor:
    """log(1 + t) with the rounding of 1 + t put right: as exact as log1p, five times faster in compiled code."""
    u = 1 + t
    return torch.log(u) + (t - (u - 1)) / u
