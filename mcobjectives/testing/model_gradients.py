"""What a model promises of gradients: one for each parameter, through the samples, and that of log p(x, h) itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mcobjectives.densities import log_joint as density_of
from mcobjectives.messages import one_line
from mcobjectives.model import has_methods
from mcobjectives.objectives import IWAE
from mcobjectives.sampling import detached, draw, has_rsample
from mcobjectives.testing.densities import dense, is_whole, trainable
from mcobjectives.testing.model_promises import Subject, batch_of, close, rows_of
from mcobjectives.testing.report import Broken, Unchecked

_MANY = 64
"""Samples at which the units of a confident discrete q have been on and off."""


def gradients(s: Subject) -> None:
    parameters = _shaken(s)
    if not parameters:
        raise Unchecked("the model is not an nn.Module with parameters")
    pathwise = has_rsample(s.model.posterior(s.x))
    k = max(s.k, 2) if pathwise else _MANY
    loss = IWAE(k=k, gradient="reparam" if pathwise else "vimco")(s.model, s.x)
    if not loss.requires_grad:
        raise Broken("the loss depends on no parameter")
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {name: g if g is None else dense(g) for name, g in zip(parameters, grads, strict=True)}
    lost = [name for name, g in found.items() if g is None or not bool((g != 0).any())]
    if lost and not pathwise and all(found[name] is not None for name in lost) and _hardly_varies(s):
        raise Unchecked(f"h hardly varies in {k} samples: whether a gradient reaches {', '.join(lost[:8])} is open")
    if lost:
        raise Broken(f"no gradient reaches {len(lost)} of {len(parameters)} parameters: {', '.join(lost[:8])}")
    bad = [name for name, g in found.items() if g is not None and not bool(torch.isfinite(g).all())]
    if bad:
        raise Broken(f"the gradient is NaN or infinite at {', '.join(bad[:8])}")
    if pathwise and has_methods(s.model.posterior(s.x), "attach"):
        _attaches(s, parameters)


def _shaken(s: Subject) -> dict[str, Tensor]:
    """The copy's parameters, moved a little: a layer that starts at zero hides those before it, and sits on kinks."""
    parameters = trainable(s.model)
    generator = torch.Generator().manual_seed(s.seed)
    with torch.no_grad():
        for p in parameters.values() if s.copied else ():
            p += 0.01 * torch.randn(p.shape, generator=generator).to(p)
    return parameters


def _hardly_varies(s: Subject) -> bool:
    """Whether some unit of h has one value in all samples, for each data point."""
    parts = pytree.tree_leaves(draw(s.model.posterior(s.x), _MANY))
    return any(bool((part == part[:1, :1]).flatten(0, 1).all(0).any()) for part in parts)


def _attaches(s: Subject, parameters: dict[str, Tensor]) -> None:
    """What `posterior.attach` gives are the samples, with the gradient of those that are drawn."""
    posterior = s.model.posterior(s.x)
    drawn = posterior.rsample(torch.Size((s.k,)))
    attached = posterior.attach(detached(drawn))
    grads = []
    for h in (drawn, attached):
        torch.manual_seed(s.seed)
        total = sum((torch.randn_like(part) * part).sum() for part in pytree.tree_leaves(h))
        grads.append(torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True))
    for one, other in zip(pytree.tree_leaves(drawn), pytree.tree_leaves(attached), strict=True):
        if not close(one, other).all():
            raise Broken("posterior.attach(h) moves the samples h")
    for name, expected, found in zip(parameters, *grads, strict=True):
        zero = torch.zeros_like(parameters[name])
        expected, found = zero if expected is None else expected, zero if found is None else found
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6):
            raise Broken(
                f"the gradient of posterior.attach(h) to {name} is not that of rsample: "
                f"{float(found.flatten()[0]):.4g}, expected {float(expected.flatten()[0]):.4g} in its first place"
            )


class _Place(NamedTuple):
    """Something that log p(x, h) is differentiated at, in one direction, and autograd's derivative there."""

    at: Tensor
    direction: Tensor
    derivative: float


def gradcheck(s: Subject) -> None:
    """The gradient of log p(x, h) in h and in each parameter is that of central differences, in float64."""
    if not s.copied:
        raise Unchecked("the model cannot be copied, and so not be tried in float64")
    try:
        x = pytree.tree_map(_doubled, _first_rows(s))
        model: Any = s.model.double() if isinstance(s.model, nn.Module) else s.model
        parameters = _shaken(s)
        with torch.no_grad():
            parts, structure = pytree.tree_flatten(draw(model.posterior(x), 2))
            others = pytree.tree_leaves(draw(model.posterior(x), 2))
        directions: dict[str, Tensor] = {}
        for i, (part, other) in enumerate(zip(parts, others, strict=True)):
            if not is_whole(part):  # between two draws, so that a step towards one of them stays in the support
                parts[i], directions[f"part {i} of h"] = ((part + other) / 2).requires_grad_(), other - part
        tensors = {f"part {i} of h": part for i, part in enumerate(parts)} | parameters
        directions |= _signs(model, parameters, s.seed)

        def log_p() -> Tensor:
            torch.manual_seed(s.seed)
            return density_of(model, x)(pytree.tree_unflatten(parts, structure)).mean()

        value, again = log_p(), log_p()
    except Exception as error:
        raise Unchecked(f"log p(x, h) cannot be had in float64: {one_line(error)}") from None
    if value.dtype != torch.float64 or not torch.isfinite(value) or not torch.equal(value, again):
        raise Unchecked(f"log p(x, h) is {value.item():.9g}, then {again.item():.9g}, in {value.dtype}")
    if not directions:
        raise Unchecked("log p(x, h) has neither continuous samples nor parameters")
    at = [tensors[name] for name in directions]
    grads = torch.autograd.grad(value, at, allow_unused=True) if value.requires_grad else [None] * len(at)
    places = {
        name: _Place(tensors[name], d, 0.0 if g is None else float((dense(g) * d).sum()))
        for (name, d), g in zip(directions.items(), grads, strict=True)
    }
    if not _agree(places, log_p):
        raise Unchecked("log p(x, h) is too rough for finite differences")


def _agree(places: dict[str, _Place], log_p: Callable[[], Tensor]) -> bool:
    """Whether it can be told, of all at once or of some; raise where differences give another derivative."""
    fine, coarse = _difference(places, log_p, 1e-6), _difference(places, log_p, 4e-6)
    found, size = sum(place.derivative for place in places.values()), 1 + abs(float(log_p()))
    off, rough = abs(fine - found), abs(fine - coarse)
    scale = abs(fine) + abs(found)
    if max(off, rough) <= 1e-6 * scale + 1e-8 * size:
        return True
    if len(places) > 1:  # one of them, or a kink in the way
        names = list(places)
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        return any([_agree({name: places[name] for name in half}, log_p) for half in halves])
    if not rough <= 1e-4 * scale + 1e-8 * size:  # a kink, single precision inside, or nothing there
        return False
    if off > 1e-3 * scale + 1e-7 * size:
        raise Broken(
            f"the mean of log p(x, h) changes with {next(iter(places))} at a rate of {fine:.6g} in a random direction, "
            f"autograd's gradient gives {found:.6g}"
        )
    return True


def _difference(places: dict[str, _Place], log_p: Callable[[], Tensor], step: float) -> float:
    """The central difference of log p along all directions at once; NaN where a step leaves what it allows."""
    kept = [place.at.detach().clone() for place in places.values()]

    def moved(by: float) -> float:
        for place, value in zip(places.values(), kept, strict=True):
            place.at.copy_(value + by * place.direction)
        return float(log_p())

    with torch.no_grad():
        try:
            return (moved(step) - moved(-step)) / (2 * step)
        except (ValueError, RuntimeError):
            return math.nan
        finally:
            for place, value in zip(places.values(), kept, strict=True):
                place.at.copy_(value)


def _signs(model: Any, parameters: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A direction of +-1 for each parameter; 0 where an embedding's padding has no gradient by design."""
    generator = torch.Generator().manual_seed(seed)
    signs = {name: torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1 for name, p in parameters.items()}
    for module in model.modules() if parameters else ():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            for name, p in parameters.items():
                if p is module.weight:
                    signs[name][module.padding_idx] = 0
    return signs


def _first_rows(s: Subject) -> Any:
    """Two data points, where x is made of tensors with the batch first and the model takes as many; else all."""
    try:
        batch_of(s)
        two = pytree.tree_map(lambda part: part[:2], s.x)
        return two if rows_of(s, two) == 2 else s.x
    except Exception:  # sizes says what is wrong with it
        return s.x


def _doubled(part: Any) -> Any:
    return part.double() if isinstance(part, Tensor) and part.is_floating_point() else part
