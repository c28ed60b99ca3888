"""Whether samples come from the density that log_prob states: Monte Carlo, judged at six standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mcobjectives.context import generators_at
from mcobjectives.densities import log_joint as density_of
from mcobjectives.model import Latent
from mcobjectives.reductions import effective_sample_size
from mcobjectives.sampling import caches, detached, draw, has_rsample, without_inverse
from mcobjectives.testing.report import Broken, Unchecked

LARGEST_Z = 6.0
_REPLICATES, _SAMPLES, _DIRECTIONS = 48, 64, 4
_LEAST_SURPRISE = 100.0
"""Nats in all samples of a discrete q: with fewer, values too rare to be drawn make up the mean."""
_DRAWS, _POINTS = 4000, 4


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters of an `nn.Module` that are to be trained, by name."""
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    return {name: p for name, p in named if p.requires_grad}


def is_whole(part: Tensor) -> bool:
    """Whether samples are integers all, as discrete ones are."""
    return bool((part == part.round()).all()) if part.is_floating_point() else True


def dense(gradient: Tensor) -> Tensor:
    """A gradient as the other parameters have it: that of an embedding may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def of_latest_alone(posterior: Any) -> str:
    """Why q knows its density at its latest samples alone, if it does."""
    if not caches(posterior):
        return ""
    with torch.no_grad(), generators_at():
        try:
            posterior.log_prob(detached(draw(posterior, 1)))
        except (NotImplementedError, KeyError):  # KeyError from Pyro
            transform = without_inverse(posterior)
            name = "a transform of q" if transform is None else type(transform).__name__
            return f"{name} has no inverse, so log q(h | x) is known of the latest samples alone"
    return ""


def require_given(posterior: Any) -> None:
    """Leave unchecked what takes log q(h | x) at samples that it did not just draw, where q has no inverse."""
    if why := of_latest_alone(posterior):
        raise Unchecked(why)


def score_identity(model: Any, x: Any, seed: int) -> None:
    """E_q grad log q(h | x) = 0."""
    require_given(model.posterior(x))
    pilot = draw(model.posterior(x), _SAMPLES)
    if all(map(is_whole, pytree.tree_leaves(pilot))):
        with torch.no_grad():
            surprise = -float(model.posterior(x).log_prob(pilot).sum()) * _REPLICATES
        if surprise < _LEAST_SURPRISE:
            raise Unchecked(f"h hardly varies: all samples to be drawn hold about {surprise:.2g} nats")

    def mean_log_q() -> Tensor:
        posterior = model.posterior(x)
        h = detached(draw(posterior, _SAMPLES))  # copies: a flow may know what it has just made
        return posterior.log_prob(h).mean()

    _vanishes(model, seed, mean_log_q, "the mean of grad log q(h | x) over samples is not 0 but")


def unweighted(model: Any, x: Any, h: Latent) -> list[Tensor]:
    """Where no log-weight depends on h, as at padded steps: of each part `(batch, ...)`; nowhere if on all of h."""
    parts, structure = pytree.tree_flatten(detached(h))
    nowhere = [torch.zeros_like(part[0], dtype=torch.bool) for part in parts]
    smooth = [i for i, part in enumerate(parts) if part.is_floating_point()]

    def densities(parts: list[Tensor]) -> Tensor:
        given = pytree.tree_unflatten(parts, structure)
        with generators_at():  # the same dropout each time
            return torch.stack([model.posterior(x).log_prob(given), density_of(model, x)(given)])

    if of_latest_alone(model.posterior(x)):
        return nowhere
    try:
        before = densities([part.requires_grad_() if i in smooth else part for i, part in enumerate(parts)])
    except Exception:  # of a density that takes no gradient: numpy inside, say
        return nowhere
    if not (smooth and before.requires_grad):
        return nowhere
    found = list(nowhere)
    grads = torch.autograd.grad(before.sum(), [parts[i] for i in smooth], allow_unused=True)
    for i, grad in zip(smooth, grads, strict=True):
        found[i] = ~nowhere[i] if grad is None else (grad == 0).all(0)
    with torch.no_grad():  # a detach, or a step function, has no gradient either
        after = densities([torch.where(at, part.roll(1, 0), part) for at, part in zip(found, parts, strict=True)])
    return nowhere if all(at.all() for at in found) or not torch.allclose(before, after) else found


def pathwise_identity(model: Any, x: Any, seed: int) -> None:
    """grad E_q f(h) by the path through the samples is that by the score of q, for a bounded f."""
    if not has_rsample(model.posterior(x)):
        raise Unchecked("the posterior has no rsample")
    require_given(model.posterior(x))
    drawn = draw(model.posterior(x), _SAMPLES)
    pilot = pytree.tree_leaves(drawn)
    generator = torch.Generator().manual_seed(seed)
    moments = [(part.mean(0), part.std(0).clamp(min=1e-6)) for part in pilot]
    signs = [torch.randint(0, 2, (2, *part.shape[1:]), generator=generator).to(part) * 2 - 1 for part in pilot]
    # The score of q does not cover what its density leaves out.
    signs = [sign * ~at for sign, at in zip(signs, unweighted(model, x, drawn), strict=True)]

    def f(h: Latent) -> Tensor:
        total = torch.zeros(())
        for part, (mean, std), (odd, even) in zip(pytree.tree_leaves(h), moments, signs, strict=True):
            z = 3 * ((part - mean) / std / 3).tanh()  # bounded, for tails without moments
            total = total + (odd * z + even * z * z / 2).reshape(*part.shape[:2], -1).sum(-1)
        return total

    def difference() -> Tensor:
        posterior = model.posterior(x)
        h = posterior.rsample(torch.Size((_SAMPLES,)))
        if not any(part.requires_grad for part in pytree.tree_leaves(h)):
            raise Unchecked("the samples carry no gradient")
        for i, part in enumerate(pytree.tree_leaves(h)):
            if part.requires_grad and is_whole(part) and bool((part != part[:1]).any()):
                raise Broken(
                    f"part {i} of h takes whole values, yet rsample gives it a gradient, which is not that of E f(h)",
                    "a straight-through step such as gumbel_softmax(hard=True): name the method sample in place of "
                    "rsample, and use gradient='vimco' or 'score'",
                )
        fixed = detached(h)
        value = f(fixed)
        baseline = (value.sum(0) - value) / (_SAMPLES - 1)  # of the other samples
        return (f(h) - (value - baseline) * posterior.log_prob(fixed)).mean()

    _vanishes(model, seed, difference, "grad E f(h) along the samples is off from that by the score of q by")


def _vanishes(model: Any, seed: int, scalar: Callable[[], Tensor], what: str) -> None:
    """Raise unless the gradient is zero on average, in fixed random directions of each parameter, over replicates."""
    named = trainable(model)
    generator = torch.Generator().manual_seed(seed)
    signs = [torch.randint(0, 2, (_DIRECTIONS, *p.shape), generator=generator).to(p) * 2 - 1 for p in named.values()]
    rows, sizes = [], []
    for _ in range(_REPLICATES):
        value = scalar()
        if not (named and value.requires_grad):
            raise Unchecked("log q(h | x) depends on no parameter of an nn.Module")
        found_grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        grads = [g if g is None else dense(g) for g in found_grads]
        slopes = [
            torch.zeros(_DIRECTIONS) if g is None else (d * g).reshape(_DIRECTIONS, -1).sum(1)
            for d, g in zip(signs, grads, strict=True)
        ]
        rows.append(torch.stack([slope.detach().cpu().double() for slope in slopes]))
        sizes.append(torch.tensor([0.0 if g is None else float(g.abs().sum()) for g in grads], dtype=torch.float64))
    found = torch.stack(rows)  # (replicates, parameters, directions)
    # All that is left where terms cancel, as those of a softmax's logits do.
    rounding = 1e-9 + 1e-5 * torch.stack(sizes).amax(0)[:, None]
    mean, error = found.mean(0), found.std(0) / math.sqrt(_REPLICATES)
    small = found.isfinite().all(0) & (found.abs().amax(0) <= rounding)
    z = torch.where(small, 0.0, mean.abs() / error.clamp(min=1e-30))
    if not float(z.max()) <= LARGEST_Z:
        at = divmod(int(z.argmax()), _DIRECTIONS)
        raise Broken(
            f"{what} {mean[at]:.4g} +- {error[at]:.2g} in a direction of {list(named)[at[0]]}, {z.max():.1f} standard "
            "errors away"
        )


def normalisation(model: Any, x: Any) -> None:
    """E_q r(h) / q(h | x) = 1 for a density r near q; for discrete h, what was seen holds as much mass as it should.

    Over all of h, or over what the log-weights depend on.
    """
    posterior = model.posterior(x)
    h = draw(posterior, _DRAWS)
    with torch.no_grad():
        log_q = posterior.log_prob(h)[:, :_POINTS].cpu().double()
    parts = [part[:, :_POINTS] for part in pytree.tree_leaves(h)]
    discrete = list(map(is_whole, parts))
    parts = [part.reshape(*part.shape[:2], -1).cpu().double() for part in parts]
    flat = torch.cat(parts, 2)  # (k, batch, dims)
    if any(discrete) and not all(discrete):
        raise Unchecked("normalisation cannot be told for a mixture of discrete and continuous parts")
    check = _discrete_mass if all(discrete) else _continuous_mass
    apart = unweighted(model, x, pytree.tree_map(lambda part: part[:_SAMPLES], h))
    used = ~torch.cat([at[:_POINTS].reshape(flat.shape[1], -1) for at in apart], 1).cpu()

    def unclear_at(j: int) -> str:
        what = f"q(h | x) of data point {j}"
        if not used[j].any():
            return "no log-weight depends on h"
        try:
            return check(flat[:, j], log_q[:, j], what)
        except Broken:
            if used[j].all():
                raise
        return check(flat[:, j, used[j]], log_q[:, j], what)

    unclear = [unclear_at(j) for j in range(flat.shape[1])]
    if all(unclear):
        raise Unchecked(f"normalisation cannot be told: {unclear[0]}")


def _discrete_mass(h: Tensor, log_q: Tensor, what: str) -> str:
    """`h` `(n, dims)`, `log_q` `(n,)`: raise if the mass of the values seen is wrong."""
    _, inverse, counts = h.unique(dim=0, return_inverse=True, return_counts=True)
    seen = float(log_q.new_full((len(counts),), -math.inf).scatter(0, inverse, log_q).exp().sum())
    # Good & Turing: the mass that was not seen is about the share of values that were seen once.
    expected = 1 - float((counts == 1).sum()) / len(h)
    slack = LARGEST_Z / math.sqrt(len(h))
    if seen <= 1 and expected < 0.5:
        return f"only {expected:.2g} of the mass was seen in {len(h)} samples"
    if seen > 1 + 1e-3 or not abs(seen - expected) <= slack:
        raise Broken(f"{what}: the probabilities of all values drawn sum to {seen:.4g}, expected {expected:.4g}")
    return ""


def _continuous_mass(h: Tensor, log_q: Tensor, what: str) -> str:
    """`h` `(n, dims)`, `log_q` `(n,)`: raise if the mass is not one, or return why that cannot be told."""
    if flat := _without_span(h[: len(h) // 2]):
        return flat
    return _mass(h, log_q, what) and _mass(*_on_the_line(h, log_q), what)


def _without_span(h: Tensor) -> str:
    """Why q has no density over all dimensions of h, if it has none: a simplex, say."""
    scale = h.std(0)
    if not bool((scale > 0).all()):
        return "samples do not vary"
    z = (h - h.mean(0)) / scale
    factor, failed = torch.linalg.cholesky_ex(torch.cov(z.T).reshape(h.shape[1], h.shape[1]))
    if failed or float(factor.diagonal().amin()) < 1e-3:
        return f"{len(h)} samples do not span the {h.shape[1]} dimensions of h"
    return ""


def _on_the_line(h: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Units that are positive by their logarithm, those between 0 and 1 by their logit, with the density of these."""
    positive = h.amin(0) > 0
    below_one = positive & (h.amax(0) < 1)
    log_h, log_rest = torch.where(positive, h, 1.0).log(), torch.where(below_one, 1 - h, 1.0).log()
    return torch.where(positive, log_h - log_rest, h), log_q + (log_h + log_rest).sum(1)


def _mass(h: Tensor, log_q: Tensor, what: str) -> str:
    half, dims = len(h) // 2, h.shape[1]
    centre, scale = h[:half].mean(0), h[:half].std(0)
    z = (h - centre) / scale
    factor, failed = torch.linalg.cholesky_ex(torch.cov(z[:half].T).reshape(dims, dims))
    tails = _normal_tails(z)
    if failed or float(tails.amax()) > 5e-3:
        return "the support of q looks bounded"
    identity = torch.eye(dims, dtype=h.dtype)
    ratios = [_normal(z[half:], f) - scale.log().sum() - log_q[half:] for f in (identity, factor)]
    log_ratio = max(ratios, key=effective_sample_size)
    reach = float(effective_sample_size(log_ratio)) / half
    if reach < 0.2:
        return "q is too far from a Gaussian"
    ratio = log_ratio.exp()
    mean, error = float(ratio.mean()), float(ratio.std()) / math.sqrt(half)
    if not math.isfinite(mean + error):
        return "q is too far from a Gaussian"
    slack = LARGEST_Z * error + 3 * float((tails - 1e-3).clamp(min=0).sum()) + 1e-3
    unseen = max(0.0, 0.5 - reach)  # of the Gaussian's mass, where it goes far beyond a skewed q
    if not -slack - unseen <= mean - 1 <= slack:
        raise Broken(
            f"{what} has a mass of {1 / mean:.5g} instead of 1 (importance identity: {mean:.5g} +- {error:.2g})"
        )
    return ""


def _normal(z: Tensor, factor: Tensor) -> Tensor:
    """log N(z; 0, factor factor'), `(n,)`."""
    reference = torch.distributions.MultivariateNormal(torch.zeros_like(z[0]), scale_tril=factor, validate_args=False)
    return reference.log_prob(z)


def _normal_tails(z: Tensor) -> Tensor:
    """The mass of N(0, 1) beyond the range of the samples, `(dims,)`: small unless the support is bounded."""
    return torch.special.ndtr(z.amin(0)) + torch.special.ndtr(-z.amax(0))
