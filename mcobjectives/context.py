"""State of torch that we must respect: traces, transforms, random numbers, autocast's cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode


def may_synchronise(value: Tensor) -> bool:
    """Whether the host may look at the numbers: not while a compiler traces or a CUDA graph is captured.

    Nor where there are none, on the meta device or under a mode that traces with fake tensors.
    """
    traced = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
    if traced or is_transformed(value) or value.is_meta:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed(value: Tensor) -> bool:
    """Whether a transform of torch.func, vmap or grad, runs on the value; a tracing compiler sees to its own."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value)


def refuse_transforms(h: Any) -> None:
    """Raise under a transform of torch.func, which cannot go where the backward pass evaluates densities again."""
    if any(map(is_transformed, pytree.tree_leaves(h))):
        raise RuntimeError(
            "gradient='stl' and 'dreg', chunk_size and Split do not go with torch.func transforms: use "
            "torch.autograd.grad, or gradient='reparam', 'score', 'vimco' or 'rws' without chunk_size"
        )


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left alone by torch.compile: compiled random numbers cannot be drawn again."""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


@contextmanager
def generators_at(state: tuple[Tensor, ...] | None = None) -> Iterator[None]:
    """Inside, torch's generators go on from a `rng_state()`, if one is given; afterwards from where they were."""
    now = rng_state()
    if state is not None:
        set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(now)


def cast_anew() -> None:
    """After networks were evaluated without a graph: let autocast forget the parameters that it has cast.

    torch 2.9 hands those casts to code with a graph, where the parameters' gradient is then lost.
    """
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


def rng_state() -> tuple[Tensor, ...]:
    """Of the CPU's generator and, once CUDA is in use, of all devices': a model need not be on the current one."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if on_cuda else ())


def same_state(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def set_rng_state(state: tuple[Tensor, ...]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
