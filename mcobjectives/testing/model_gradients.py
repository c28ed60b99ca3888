"""What a model promises of gradients: one for each parameter, through the samples, and that of log p(x, h) itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mcobjectives.messages import one_line
from mcobjectives.model import has_methods
from mcobjectives.model import log_joint as density_of
from mcobjectives.objectives import IWAE
from mcobjectives.sampling import draw, has_rsample
from mcobjectives.testing.densities import is_whole, trainable
from mcobjectives.testing.model_promises import Subject, close
from mcobjectives.testing.report import Broken, Unchecked

_MANY = 64
"""Samples at which the units of a confident discrete q have been on and off."""


def gradients(s: Subject) -> None:
    parameters = trainable(s.model)
    if not parameters:
        raise Unchecked("the model is not an nn.Module with parameters")
    generator = torch.Generator().manual_seed(s.seed)
    with torch.no_grad():  # a layer that starts at zero would hide those before it
        for p in parameters.values() if s.copied else ():
            p += 0.01 * torch.randn(p.shape, generator=generator).to(p)
    pathwise = has_rsample(s.model.posterior(s.x))
    found = _of_the_bound(s, max(s.k, 2), pathwise, parameters)
    if not pathwise and any(map(_is_lost, found.values())):
        found = _of_the_bound(s, _MANY, pathwise, parameters)
    lost = [name for name, g in found.items() if g is None or _is_lost(g)]
    if lost and not pathwise and _hardly_varies(s):
        raise Unchecked(f"h hardly varies in {_MANY} samples: whether a gradient reaches {', '.join(lost[:8])} is open")
    if lost:
        raise Broken(f"no gradient reaches {len(lost)} of {len(parameters)} parameters: {', '.join(lost[:8])}")
    bad = [name for name, g in found.items() if g is not None and not bool(torch.isfinite(g).all())]
    if bad:
        raise Broken(f"the gradient is NaN or infinite at {', '.join(bad[:8])}")
    if pathwise and has_methods(s.model.posterior(s.x), "attach"):
        _attaches(s, parameters)


def _of_the_bound(s: Subject, k: int, pathwise: bool, parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
    loss = IWAE(k=k, gradient="reparam" if pathwise else "vimco")(s.model, s.x)
    if not loss.requires_grad:
        raise Broken("the loss depends on no parameter")
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


def _is_lost(gradient: Tensor | None) -> bool:
    return gradient is None or not bool((gradient != 0).any())


def _hardly_varies(s: Subject) -> bool:
    """Whether some unit of h has one value in all samples, for each data point."""
    parts = pytree.tree_leaves(draw(s.model.posterior(s.x), _MANY))
    return any(bool((part == part[:1, :1]).flatten(0, 1).all(0).any()) for part in parts)


def _attaches(s: Subject, parameters: dict[str, Tensor]) -> None:
    """What `posterior.attach` gives are the samples, with the gradient of those that are drawn."""
    posterior = s.model.posterior(s.x)
    drawn = posterior.rsample(torch.Size((s.k,)))
    attached = posterior.attach(pytree.tree_map(Tensor.detach, drawn))
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


def gradcheck(s: Subject) -> None:
    """The gradient of log p(x, h) in h and in each parameter is that of central differences, in float64."""
    if not s.copied:
        raise Unchecked("the model cannot be copied, and so not be tried in float64")
    try:
        model: Any = s.model.double() if isinstance(s.model, nn.Module) else s.model
        x = pytree.tree_map(_doubled, s.x)
        with torch.no_grad():
            parts, structure = pytree.tree_flatten(draw(model.posterior(x), s.k))
            others = pytree.tree_leaves(draw(model.posterior(x), s.k))
        places: dict[str, tuple[Tensor, Tensor]] = {}  # and a direction at each
        for i, (part, other) in enumerate(zip(parts, others, strict=True)):
            if not is_whole(part):  # between two draws, so that a step towards one of them stays in the support
                parts[i] = ((part + other) / 2).requires_grad_()
                places[f"part {i} of h"] = parts[i], other - part
        generator = torch.Generator().manual_seed(s.seed)
        for name, p in trainable(model).items():
            places[name] = p, torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1

        def log_p() -> Tensor:
            torch.manual_seed(s.seed)
            return density_of(model, x)(pytree.tree_unflatten(parts, structure)).mean()

        value, again = log_p(), log_p()
    except Exception as error:
        raise Unchecked(f"log p(x, h) cannot be had in float64: {one_line(error)}") from None
    if value.dtype != torch.float64 or not torch.isfinite(value) or not torch.equal(value, again):
        raise Unchecked(f"log p(x, h) is {value.item():.9g}, then {again.item():.9g}, in {value.dtype}")
    if not places:
        raise Unchecked("log p(x, h) has neither continuous samples nor parameters")
    tensors = [at for at, _ in places.values()]
    grads = torch.autograd.grad(value, tensors, allow_unused=True) if value.requires_grad else [None] * len(tensors)
    told = [_agrees(name, *places[name], gradient, log_p) for name, gradient in zip(places, grads, strict=True)]
    if not any(told):
        raise Unchecked("log p(x, h) is too rough for finite differences")


def _agrees(name: str, at: Tensor, direction: Tensor, gradient: Tensor | None, log_p: Callable[[], Tensor]) -> bool:
    """Whether it can be told from differences at two steps; raise where it is another gradient than autograd's."""
    kept, moved = at.detach().clone(), {}

    def difference(step: float) -> float:
        with torch.no_grad():
            for sign in (1, -1):
                at.copy_(kept + sign * step * direction)
                moved[sign] = float(log_p())
            at.copy_(kept)
        return (moved[1] - moved[-1]) / (2 * step)

    fine, coarse = difference(1e-5), difference(4e-5)
    found = 0.0 if gradient is None else float((gradient * direction).sum())
    rounding = 1e-8 * (1 + abs(moved[1]))
    if not abs(fine - coarse) <= 1e-4 * (abs(fine) + abs(coarse)) + rounding:  # a kink, or single precision inside
        return False
    if not abs(fine - found) <= 1e-3 * (abs(fine) + abs(found)) + 10 * rounding:
        raise Broken(
            f"the mean of log p(x, h) changes with {name} at a rate of {fine:.6g} in a random direction, autograd's "
            f"gradient gives {found:.6g}"
        )
    return True


def _doubled(part: Any) -> Any:
    return part.double() if isinstance(part, Tensor) and part.is_floating_point() else part
