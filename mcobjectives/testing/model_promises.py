"""What a model promises: log-densities of the right shape that belong to its samples, data point by data point."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.densities import log_joint as density_of
from mcobjectives.densities import log_weights
from mcobjectives.model import Latent, called, has_methods
from mcobjectives.sampling import detached, draw, has_rsample, ignores_h, without_inverse
from mcobjectives.testing.densities import (
    is_whole,
    normalisation,
    of_latest_alone,
    pathwise_identity,
    require_given,
    score_identity,
)
from mcobjectives.testing.report import Broken, Unchecked


class Subject(NamedTuple):
    """A copy of the model, with its data and the sizes to try it at."""

    model: Any
    copied: bool
    x: Any
    k: int
    seed: int


def _log_w(s: Subject, x: Any, h: Latent) -> Tensor:
    """The log-weights of given samples, `(k, batch)`; log p(x, h) alone where q has no density at them."""
    posterior = s.model.posterior(x)
    with torch.no_grad():
        log_p = density_of(s.model, x)(h)
        return log_p if of_latest_alone(posterior) else log_p - posterior.log_prob(h)


# Form.


def methods(s: Subject) -> None:
    posterior = s.model.posterior(s.x)
    density_of(s.model, s.x)
    if not has_methods(posterior, "log_prob") or not (has_methods(posterior, "sample") or has_rsample(posterior)):
        cause = None
        if isinstance(posterior, (tuple, list, dict, Tensor)):
            cause = "parameters where their distribution is meant: Independent(Normal(mean, log_std.exp()), 1)"
        name = type(posterior).__name__
        raise Broken(f"posterior(x) is a {name} without log_prob, or without sample and rsample", cause)
    transform = without_inverse(posterior)
    if transform is not None and not transform._cache_size:
        raise Broken(
            f"log q(h | x) is not known at any samples, for {type(transform).__name__} of q has no inverse",
            "a transform without a cache: make it with cache_size=1",
        )


def shape(s: Subject) -> None:
    batch = None
    for k in (s.k, 1):
        posterior = called(s.model, "posterior", x=s.x)
        h = draw(posterior, k)
        with torch.no_grad():
            log_q, log_p = called(posterior, "log_prob", h=h), density_of(s.model, s.x)(h)
            shapes = {"log q(h | x)": log_q.shape, "log p(x, h)": log_p.shape}
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
        q, p = posterior.log_prob(h), density_of(s.model, s.x)(h)
    allowed = torch.zeros_like(p, dtype=torch.bool)
    if not has_rsample(posterior):  # no gradient through samples, which would be blind to where p is zero
        allowed = (p == -torch.inf) & (p > -torch.inf).any(0)
    for name, bad in {"log q(h | x)": ~torch.isfinite(q), "log p(x, h)": ~torch.isfinite(p) & ~allowed}.items():
        if bad.any():
            raise Broken(f"{name} is NaN or infinite at {int(bad.sum())} of {bad.numel()} samples from q")


# Densities.


def log_joint(s: Subject) -> None:
    if not has_methods(s.model, "log_joint", "log_likelihood", "log_prior"):
        raise Unchecked("the model gives log p(x, h) in one way only")
    h = draw(s.model.posterior(s.x), s.k)
    with torch.no_grad():
        whole, parts = s.model.log_joint(s.x, h), s.model.log_likelihood(s.x, h) + s.model.log_prior(h)
    if whole.shape != parts.shape:
        raise Broken(f"log_joint has shape {tuple(whole.shape)}, log_likelihood + log_prior {tuple(parts.shape)}")
    off = torch.where(whole == parts, 0.0, (whole - parts).abs())  # -inf where p rules a value out
    if not bool((off <= 1e-4 + 1e-4 * parts.abs()).all()):
        at = int(off.nan_to_num(torch.inf).argmax())
        raise Broken(f"log_joint is {whole.flatten()[at]:.7g}, log_likelihood + log_prior {parts.flatten()[at]:.7g}")


# Samples.


def score(s: Subject) -> None:
    score_identity(s.model, s.x, s.seed)


def pathwise(s: Subject) -> None:
    pathwise_identity(s.model, s.x, s.seed)


def normalised(s: Subject) -> None:
    normalisation(s.model, s.x)


def rows_of(s: Subject, x: Any) -> int:
    """How many data points q(h | x) has samples for."""
    with torch.no_grad():
        posterior = s.model.posterior(x)
        return posterior.log_prob(draw(posterior, 1)).shape[1]


def _ignores_x(s: Subject) -> bool:
    """Whether q(h | x) stays as it is when a data point becomes another."""
    with torch.no_grad():
        posterior = s.model.posterior(s.x)
        if of_latest_alone(posterior):
            return False
        h = detached(draw(posterior, s.k))
        both = (s.model.posterior(x).log_prob(h) for x in (s.x, _overwritten(s.x, 0, 0)))
        return torch.equal(*both)


def batch_of(s: Subject) -> int:
    """How many data points there are; they are rows of tensors."""
    batch = rows_of(s, s.x)
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
    _require_one_shape(leaves, pytree.tree_leaves(other))
    parts = [column(part, theirs) for part, theirs in zip(leaves, pytree.tree_leaves(other), strict=True)]
    return pytree.tree_unflatten(parts, structure)


def _require_one_shape(parts: list[Tensor], others: list[Tensor]) -> None:
    if [part.shape[2:] for part in parts] != [part.shape[2:] for part in others]:
        raise Unchecked("the shape of h differs with the data points in a batch (sequences of other lengths?)")


def leak(s: Subject) -> None:
    batch, k = batch_of(s), max(s.k, 2)
    if batch < 2:
        raise Unchecked("needs a batch of at least two data points")
    h = draw(s.model.posterior(s.x), k)
    before = _repeatable(s, h)
    everything = torch.ones_like(before, dtype=torch.bool)
    for j in range(batch) if batch <= 8 else (0, batch // 2, batch - 1):
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
    require_given(s.model.posterior(s.x))


def _repeatable(s: Subject, h: Latent) -> Tensor:
    """The log-weights at these samples, once another seed is seen not to change them."""
    torch.manual_seed(s.seed)
    log_w = _log_w(s, s.x, h)
    torch.manual_seed(s.seed + 1)
    if not close(log_w, _log_w(s, s.x, h)).all():
        raise Unchecked("log-weights of the same samples differ from call to call (dropout?)")
    return log_w


def close(a: Tensor, b: Tensor) -> Tensor:
    """Where two arrays of log-weights, or of samples, are the same to rounding."""
    if a.shape != b.shape:
        raise Broken(f"log-weights of shape {tuple(a.shape)} where {tuple(b.shape)} are expected")
    return torch.isclose(a, b, rtol=1e-4, atol=1e-4)


def _untouched(before: Tensor, after: Tensor, others: Tensor, what: str, unit: str) -> None:
    moved = ~close(before, after) & others
    if moved.any():
        i, j = (int(n) for n in moved.nonzero()[0])
        raise Broken(
            f"{what} moves the log-weight of another {unit}, [{i}, {j}], from {before[i, j]:.7g} to {after[i, j]:.7g} "
            f"({int(moved.sum())} log-weights in all)"
        )


def sizes(s: Subject) -> None:
    batch = batch_of(s)
    one = pytree.tree_map(lambda part: part[:1], s.x)
    if rows_of(s, one) == batch > 1 and _ignores_x(s):
        raise Unchecked(
            f"q(h | x) has {batch} data points for the first row of x too (parameters for each?): the batch is fixed"
        )
    for k, x, expected in ((1, s.x, batch), (s.k, one, 1), (1, one, 1)):
        posterior = s.model.posterior(x)
        with torch.no_grad():
            h = draw(posterior, k)
            found = log_weights(density_of(s.model, x)(h), posterior.log_prob(h), k, h).shape[1:]
        if found != (expected,):
            raise Broken(f"k = {k} and a batch of {expected} give a bound of shape {tuple(found)}")
    h = draw(s.model.posterior(s.x), s.k)
    whole = _repeatable(s, h)
    _require_one_shape(pytree.tree_leaves(h), pytree.tree_leaves(draw(s.model.posterior(one), 1)))
    single = _log_w(s, one, pytree.tree_map(lambda part: part[:, :1], h))
    first = _log_w(s, s.x, pytree.tree_map(lambda part: part[:1], h))
    for value, part, what in ((single, whole[:, :1], "a batch of one"), (first, whole[:1], "k = 1")):
        same = close(value, part)
        if not same.all():
            i, j = (int(n) for n in (~same).nonzero()[0])
            raise Broken(
                f"the log-weight [{i}, {j}] of the same sample is {value[i, j]:.7g} in {what}, and {part[i, j]:.7g} "
                "otherwise"
            )
    require_given(s.model.posterior(s.x))


def seeds(s: Subject) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(s.seed)
        posterior = s.model.posterior(s.x)
        h = draw(posterior, s.k)
        with torch.no_grad():
            found.append(density_of(s.model, s.x)(h) - posterior.log_prob(h))
    if not torch.equal(found[0], found[1]):
        i, j = (int(n) for n in (found[0] != found[1]).nonzero()[0])
        raise Broken(f"with one seed the log-weight [{i}, {j}] is {found[0][i, j]:.9g}, then {found[1][i, j]:.9g}")
    _require_function(s)
    posterior = s.model.posterior(s.x)
    h = draw(posterior, 50)
    pairs = list(zip(pytree.tree_leaves(h), pytree.tree_leaves(draw(s.model.posterior(s.x), 50)), strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        raise Broken("drawing 50 samples twice gives samples of other shapes")
    if all(torch.equal(one, other) for one, other in pairs):
        with torch.no_grad():
            log_q = posterior.log_prob(h)
        # Of discrete samples that hardly vary it may be chance.
        if not all(is_whole(one) for one, _ in pairs) or float(log_q.sum()) < -30:
            raise Broken("drawing 50 samples twice, without setting a seed between, gives the same samples")
    for one, other in pairs:
        if bool(((one == one[:1]).all(0) & (other == other[:1]).all(0) & (one[0] != other[0])).any()):
            raise Broken("the samples of one draw are all the same, and those of another draw are others")


def _require_function(s: Subject) -> None:
    """Raise where log_prob(h) gives what the latest draw left, whatever h is."""
    posterior = s.model.posterior(s.x)
    if of_latest_alone(posterior) or s.k < 2:
        return
    with torch.no_grad():
        ignored = ignores_h(posterior, detached(draw(posterior, s.k)))
    if ignored:
        raise Broken(
            "log_prob(h) must be a function of h: it gives the density of the latest samples, whatever h is",
            "log q(h | x) that rsample stores for log_prob: compute it from h there",
        )
