"""What a model promises: log-densities of the right shape that belong to its samples, data point by data point."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.model import Latent, has_methods
from mcobjectives.model import log_joint as density_of
from mcobjectives.objectives import IWAE
from mcobjectives.sampling import draw, has_rsample
from mcobjectives.testing.densities import normalisation, pathwise_identity, score_identity, trainable
from mcobjectives.testing.report import Broken, Unchecked


class Subject(NamedTuple):
    """A copy of the model, with its data and the sizes to try it at."""

    model: Any
    copied: bool
    x: Any
    k: int
    seed: int


def _log_w(s: Subject, x: Any, h: Latent) -> Tensor:
    """The log-weights of given samples, `(k, batch)`."""
    with torch.no_grad():
        return density_of(s.model, x)(h) - s.model.posterior(x).log_prob(h)


# Form.


def methods(s: Subject) -> None:
    posterior = s.model.posterior(s.x)
    density_of(s.model, s.x)
    if not has_methods(posterior, "log_prob") or not (has_methods(posterior, "sample") or has_rsample(posterior)):
        raise Broken(f"posterior(x) is a {type(posterior).__name__} without log_prob, or without sample and rsample")


def shape(s: Subject) -> None:
    batch = None
    for k in (s.k, 1):
        posterior = s.model.posterior(s.x)
        h = draw(posterior, k)
        with torch.no_grad():
            shapes = {"log q(h | x)": posterior.log_prob(h).shape, "log p(x, h)": density_of(s.model, s.x)(h).shape}
            for name in ("log_likelihood", "log_prior"):
                if has_methods(s.model, "log_likelihood", "log_prior"):
                    value = s.model.log_likelihood(s.x, h) if name == "log_likelihood" else s.model.log_prior(h)
                    shapes[name] = value.shape
        shapes |= {f"part {i} of h": part.shape[:2] for i, part in enumerate(pytree.tree_leaves(h))}
        if batch is None and len(shapes["log q(h | x)"]) > 1:
            batch = shapes["log q(h | x)"][1]
        for name, found in shapes.items():
            if tuple(found) != (k, batch):
                raise Broken(f"{name} has shape {tuple(found)} instead of (k, batch) = ({k}, {batch})")


def finite(s: Subject) -> None:
    posterior = s.model.posterior(s.x)
    h = draw(posterior, 50)
    with torch.no_grad():
        for name, value in {"log q(h | x)": posterior.log_prob(h), "log p(x, h)": density_of(s.model, s.x)(h)}.items():
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise Broken(f"{name} is NaN or infinite at {bad} of {value.numel()} samples from q")


# Densities.


def log_joint(s: Subject) -> None:
    if not has_methods(s.model, "log_joint", "log_likelihood", "log_prior"):
        raise Unchecked("the model gives log p(x, h) in one way only")
    h = draw(s.model.posterior(s.x), s.k)
    with torch.no_grad():
        whole, parts = s.model.log_joint(s.x, h), s.model.log_likelihood(s.x, h) + s.model.log_prior(h)
    if not torch.allclose(whole, parts, rtol=1e-4, atol=1e-4):
        raise Broken(f"log_joint is {whole[0, 0]:.7g}, log_likelihood + log_prior {parts[0, 0]:.7g}")


# Gradients, leaks, sizes, seeds.


def score(s: Subject) -> None:
    score_identity(s.model, s.x, s.seed)


def pathwise(s: Subject) -> None:
    pathwise_identity(s.model, s.x, s.seed)


def normalised(s: Subject) -> None:
    normalisation(s.model.posterior(s.x))


def gradients(s: Subject) -> None:
    parameters = trainable(s.model)
    if not parameters:
        raise Unchecked("the model is not an nn.Module with parameters")
    generator = torch.Generator().manual_seed(s.seed)
    with torch.no_grad():  # a layer that starts at zero would hide those before it
        for p in parameters.values() if s.copied else ():
            p += 0.01 * torch.randn(p.shape, generator=generator).to(p)
    pathwise = has_rsample(s.model.posterior(s.x))
    loss = IWAE(k=max(s.k, 2), gradient="reparam" if pathwise else "vimco")(s.model, s.x)
    if not loss.requires_grad:
        raise Broken("the loss depends on no parameter")
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = dict(zip(parameters, grads, strict=True))
    lost = [name for name, g in found.items() if g is None or not bool((g != 0).any())]
    if lost:
        raise Broken(f"no gradient reaches {len(lost)} of {len(parameters)} parameters: {', '.join(lost[:8])}")
    bad = [name for name, g in found.items() if g is not None and not bool(torch.isfinite(g).all())]
    if bad:
        raise Broken(f"the gradient is NaN or infinite at {', '.join(bad[:8])}")
    if pathwise and has_methods(s.model.posterior(s.x), "attach"):
        _attaches(s, parameters)


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
        if not _close(one, other).all():
            raise Broken("posterior.attach(h) moves the samples h")
    for name, expected, found in zip(parameters, *grads, strict=True):
        zero = torch.zeros_like(parameters[name])
        expected, found = zero if expected is None else expected, zero if found is None else found
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-6):
            raise Broken(
                f"the gradient of posterior.attach(h) to {name} is not that of rsample: "
                f"{float(found.flatten()[0]):.4g}, expected {float(expected.flatten()[0]):.4g} in its first place"
            )


def _rows(s: Subject, x: Any) -> int:
    """How many data points q(h | x) has samples for."""
    with torch.no_grad():
        posterior = s.model.posterior(x)
        return posterior.log_prob(draw(posterior, 1)).shape[1]


def _ignores_x(s: Subject) -> bool:
    """Whether q(h | x) stays as it is when a data point becomes another."""
    with torch.no_grad():
        h = pytree.tree_map(Tensor.detach, draw(s.model.posterior(s.x), s.k))
        both = (s.model.posterior(x).log_prob(h) for x in (s.x, _overwritten(s.x, 0, 0)))
        return torch.equal(*both)


def _batch(s: Subject) -> int:
    batch = _rows(s, s.x)
    leaves = pytree.tree_leaves(s.x)
    if not all(isinstance(part, Tensor) and part.ndim and part.shape[0] == batch for part in leaves) or not leaves:
        raise Unchecked("x is not made of tensors with the batch first, so that data points cannot be exchanged")
    return batch


def _overwritten(value: Any, axis: int, at: int) -> Any:
    """The value with place `at` of an axis overwritten by the next one (or the one before)."""

    def change(part: Tensor) -> Tensor:
        part = part.clone()
        other = at + 1 if at + 1 < part.shape[axis] else at - 1
        part.select(axis, at).copy_(part.select(axis, other))
        return part

    return pytree.tree_map(change, value)


def _with_samples(h: Latent, j: int, other: Latent) -> Latent:
    """h, with the samples of data point j taken from another draw."""

    def column(part: Tensor, theirs: Tensor) -> Tensor:
        part = part.clone()
        part[:, j] = theirs[:, j]
        return part

    leaves, structure = pytree.tree_flatten(h)
    parts = [column(part, theirs) for part, theirs in zip(leaves, pytree.tree_leaves(other), strict=True)]
    return pytree.tree_unflatten(parts, structure)


def leak(s: Subject) -> None:
    batch, k = _batch(s), max(s.k, 2)
    if batch < 2:
        raise Unchecked("needs a batch of at least two data points")
    h = draw(s.model.posterior(s.x), k)
    torch.manual_seed(s.seed)
    before = _log_w(s, s.x, h)
    again = _again(s, h)
    if not _close(before, again).all():
        raise Unchecked("log-weights of the same samples differ from call to call (dropout?)")
    everything = torch.ones_like(before, dtype=torch.bool)
    for j in {0, batch - 1}:
        column = everything.clone()
        column[:, j] = False
        for what, x in (("x", _overwritten(s.x, 0, j)), ("h", s.x)):
            # Its old samples may be outside the support of the new q.
            changed = _with_samples(h, j, draw(s.model.posterior(x), k))
            torch.manual_seed(s.seed)
            _untouched(before, _log_w(s, x, changed), column, f"changing {what} of data point {j}", "data point")
    row = everything.clone()
    row[0] = False
    torch.manual_seed(s.seed)
    _untouched(before, _log_w(s, s.x, _overwritten(h, 0, 0)), row, "changing sample 0", "sample")


def _again(s: Subject, h: Latent) -> Tensor:
    torch.manual_seed(s.seed + 1)
    return _log_w(s, s.x, h)


def _close(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise Broken(f"log-weights of shape {tuple(a.shape)} where {tuple(b.shape)} are expected")
    return torch.isclose(a, b, rtol=1e-4, atol=1e-4)


def _untouched(before: Tensor, after: Tensor, others: Tensor, what: str, unit: str) -> None:
    moved = ~_close(before, after) & others
    if moved.any():
        i, j = (int(n) for n in moved.nonzero()[0])
        raise Broken(
            f"{what} moves the log-weight of another {unit}, [{i}, {j}], from {before[i, j]:.7g} to {after[i, j]:.7g} "
            f"({int(moved.sum())} log-weights in all)"
        )


def sizes(s: Subject) -> None:
    batch = _batch(s)
    one = pytree.tree_map(lambda part: part[:1], s.x)
    if _rows(s, one) == batch > 1 and _ignores_x(s):
        raise Unchecked(
            f"q(h | x) has {batch} data points for the first row of x too (parameters for each?): the batch is fixed"
        )
    for k, x, expected in ((1, s.x, batch), (s.k, one, 1), (1, one, 1)):
        found = IWAE(k=k).bound(s.model, x)
        if found.shape != (expected,):
            raise Broken(f"k = {k} and a batch of {expected} give a bound of shape {tuple(found.shape)}")
    h = draw(s.model.posterior(s.x), s.k)
    torch.manual_seed(s.seed)
    whole, again = _log_w(s, s.x, h), _again(s, h)
    if not _close(whole, again).all():
        return
    single = _log_w(s, one, pytree.tree_map(lambda part: part[:, :1], h))
    first = _log_w(s, s.x, pytree.tree_map(lambda part: part[:1], h))
    for value, part, what in ((single, whole[:, :1], "a batch of one"), (first, whole[:1], "k = 1")):
        close = _close(value, part)
        if not close.all():
            i, j = (int(n) for n in (~close).nonzero()[0])
            raise Broken(
                f"the log-weight [{i}, {j}] of the same sample is {value[i, j]:.7g} in {what}, and {part[i, j]:.7g} "
                "otherwise"
            )


def seeds(s: Subject) -> None:
    bounds = []
    for _ in range(2):
        torch.manual_seed(s.seed)
        bounds.append(IWAE(k=s.k).bound(s.model, s.x))
    if not torch.equal(bounds[0], bounds[1]):
        raise Broken(f"with one seed the bound is {bounds[0][0]:.9g}, then {bounds[1][0]:.9g}")
    draws = [pytree.tree_leaves(draw(s.model.posterior(s.x), 50)) for _ in range(2)]
    if all(torch.equal(a, b) for a, b in zip(*draws, strict=True)):
        raise Broken("drawing 50 samples twice, without setting a seed between, gives the same samples")
