"""Graphs that are built only in the backward pass: a sum over chunks, one at a time, in the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mcobjectives.context import may_synchronise, refuse_transforms

Share = Callable[[int], Tensor]
"""i -> the share of chunk i in S for each data point, `(batch,)`; the same numbers whenever it is called."""


def replayed(value: Tensor, share: Share, chunks: int, upstream: Mapping[Tensor, Tensor]) -> Tensor:
    """`value`, `(batch,)`, with the gradient of the sum of share(i) over the chunks.

    The leaves that the sum depends on are read off the first chunk's graph; a later chunk that reaches another one
    raises, since its gradient would be lost. A leaf's gradient goes to the tensor that `upstream` has for it, if any.
    """
    refuse_transforms(value)
    require_no_parameters(value)
    leaves = _leaves(share(0))
    if not leaves:
        return value
    return _Replayed.apply(value, share, chunks, leaves, *(upstream.get(leaf, leaf) for leaf in leaves))


def autocast_as_now(device: str) -> Callable[[], AbstractContextManager[object]]:
    """A function that makes the autocast context that is active now, for use in a backward pass."""
    if not torch.amp.is_autocast_available(device):  # as on the meta device
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled)


def require_unchanged(again: Tensor, first: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raise where something evaluated again for the gradient has another value: its gradient would be wrong."""
    if may_synchronise(again) and not torch.allclose(again, first, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise RuntimeError(
            f"{what} has another value when it is evaluated again for the gradient (random numbers such as dropout or "
            "batch normalisation in the model, or drawn in another thread, a flow that loses its digits when it "
            "inverts itself, parameters changed in between or swapped by torch.func.functional_call): use "
            "gradient='reparam' without chunk_size and backward_samples, or model.eval(), or call backward() inside "
            "the context that sets the parameters"
        )


def require_no_parameters(value: Tensor) -> None:
    """Raise where F has parameters of its own, as its value at given log-weights then has a graph."""
    if value.requires_grad:
        raise ValueError(
            "reduce(log_w) has parameters of its own, whose gradient would be lost: use gradient='reparam' without "
            "chunk_size and backward_samples, or no parameters"
        )


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Share, chunks: int, leaves: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.share, ctx.chunks, ctx.leaves, ctx.inputs = share, chunks, leaves, inputs
        ctx.autocast = autocast_as_now(value.device.type)
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        total: list[Tensor | None] = [None] * len(ctx.leaves)
        known = {id(leaf) for leaf in ctx.leaves}
        for i in range(ctx.chunks):
            with torch.enable_grad(), ctx.autocast():
                share = ctx.share(i)
            reached = set(map(id, _leaves(share)))
            if reached - known or (i == 0 and reached != known):
                raise RuntimeError(
                    f"chunk {i + 1} of {ctx.chunks} depends on other parameters than in the forward pass "
                    "(swapped by torch.func.functional_call, or chosen at random): use chunk_size=None"
                )
            # What the chunks share, q's network, is differentiated once for each: it has batch rows only.
            with _without_hooks(ctx.leaves):
                grads = torch.autograd.grad(share, ctx.leaves, grad, retain_graph=True, allow_unused=True)
            for j, one in enumerate(grads):
                if one is not None:
                    so_far = total[j]
                    total[j] = one.clone() if so_far is None else so_far.add_(one)
        return None, None, None, None, *map(_first_derivative, total, ctx.inputs)


def _first_derivative(gradient: Tensor | None, of: Tensor) -> Tensor:
    if gradient is not None and gradient.is_sparse and not torch.is_grad_enabled():  # for optimisers that want it so
        return gradient
    zeros = zeros_once(of)
    return zeros if gradient is None else zeros.add_(gradient)


@contextmanager
def _without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the leaves' hooks are not called: they are meant for the whole gradient, which is yet to be added up."""
    hooks = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)


def zeros_once(like: Tensor) -> Tensor:
    """Zeros that raise when they are differentiated: added to a gradient, they make it a first derivative only."""
    return _ZerosOnce.apply(like)


class _ZerosOnce(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(like: Tensor) -> Tensor:
        return torch.zeros_like(like)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "a second derivative of this loss would be incomplete: its estimator gives a first derivative only; "
            "use gradient='reparam' without chunk_size and backward_samples"
        )


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a graph accumulates gradients into."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    stack = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not hasattr(node.variable, "parameterless"):
            found[id(node.variable)] = node.variable
        stack.extend(following for following, _ in node.next_functions)
    return list(found.values())
