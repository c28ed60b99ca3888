"""Whether samples come from the density that log_prob states: Monte Carlo, judged at six standard errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mcobjectives.model import Latent, has_rsample
from mcobjectives.testing.report import Broken, Unchecked

LARGEST_Z = 6.0
_REPLICATES, _SAMPLES, _DIRECTIONS = 48, 64, 4
_DRAWS = 4000


def draw(posterior: Any, k: int) -> Latent:
    """k samples for each data point, `(k, batch, ...)`, without a graph."""
    with torch.no_grad():
        return (posterior.rsample if has_rsample(posterior) else posterior.sample)(torch.Size((k,)))


def trainable(model: Any) -> dict[str, Tensor]:
    """The parameters of an `nn.Module` that are to be trained, by name."""
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    return {name: p for name, p in named if p.requires_grad}


def score_identity(model: Any, x: Any, seed: int) -> None:
    """E_q grad log q(h | x) = 0, in fixed random directions of each parameter, over independent replicates."""
    named = trainable(model)
    generator = torch.Generator().manual_seed(seed)
    signs = [torch.randint(0, 2, (_DIRECTIONS, *p.shape), generator=generator).to(p) * 2 - 1 for p in named.values()]
    rows = []
    for _ in range(_REPLICATES):
        posterior = model.posterior(x)
        log_q = posterior.log_prob(draw(posterior, _SAMPLES))
        if not (named and log_q.requires_grad):
            raise Unchecked("log q(h | x) depends on no parameter of an nn.Module")
        grads = torch.autograd.grad(log_q.mean(), list(named.values()), allow_unused=True)
        slopes = [
            torch.zeros(_DIRECTIONS) if g is None else (d * g).flatten(1).sum(1)
            for d, g in zip(signs, grads, strict=True)
        ]
        rows.append(torch.stack([slope.detach().double().cpu() for slope in slopes]))
    found = torch.stack(rows)  # (replicates, parameters, directions)
    mean, error = found.mean(0), found.std(0) / math.sqrt(_REPLICATES)
    z = torch.where(found.abs().amax(0) > 1e-9, mean.abs() / error.clamp(min=1e-30), 0.0)
    if not float(z.max()) <= LARGEST_Z:
        at = divmod(int(z.argmax()), _DIRECTIONS)
        raise Broken(
            f"the mean of grad log q(h | x) over samples is not 0 but {mean[at]:.4g} +- {error[at]:.2g} in a "
            f"direction of {list(named)[at[0]]}, {z.max():.1f} standard errors away"
        )


def normalisation(posterior: Any) -> None:
    """E_q r(h) / q(h | x) = 1 for a density r near q; for discrete h, what was seen holds as much mass as it should."""
    h = draw(posterior, _DRAWS)
    with torch.no_grad():
        log_q = posterior.log_prob(h).double().cpu()
    parts = [part.reshape(*part.shape[:2], -1).double().cpu() for part in pytree.tree_leaves(h)]
    discrete = [bool((part == part.round()).all()) for part in parts]
    flat = torch.cat(parts, 2)  # (k, batch, dims)
    if any(discrete) and not all(discrete):
        raise Unchecked("normalisation cannot be told for a mixture of discrete and continuous parts")
    check = _discrete_mass if all(discrete) else _continuous_mass
    unclear = [check(flat[:, j], log_q[:, j], f"q(h | x) of data point {j}") for j in range(min(flat.shape[1], 4))]
    if all(unclear):
        raise Unchecked(f"normalisation cannot be told: {unclear[0]}")


def _discrete_mass(h: Tensor, log_q: Tensor, what: str) -> str:
    """`h` `(n, dims)`, `log_q` `(n,)`: raise if the mass of the values seen is wrong."""
    _, inverse, counts = h.unique(dim=0, return_inverse=True, return_counts=True)
    seen = float(log_q.new_full((len(counts),), -math.inf).scatter(0, inverse, log_q).exp().sum())
    # Good & Turing: the mass that was not seen is about the share of values that were seen once.
    expected = 1 - float((counts == 1).sum()) / len(h)
    slack = LARGEST_Z / math.sqrt(len(h))
    if seen > 1 + 1e-3 or not abs(seen - expected) <= slack:
        raise Broken(f"{what}: the probabilities of all values drawn sum to {seen:.4g}, expected {expected:.4g}")
    return ""


def _continuous_mass(h: Tensor, log_q: Tensor, what: str) -> str:
    """`h` `(n, dims)`, `log_q` `(n,)`: raise if the mass is not one, or return why that cannot be told."""
    half, dims = len(h) // 2, h.shape[1]
    centre, scale = h[:half].mean(0), h[:half].std(0)
    if not bool((scale > 0).all()):
        return "samples do not vary"
    z = (h - centre) / scale
    factor, failed = torch.linalg.cholesky_ex(torch.cov(z[:half].T).reshape(dims, dims))
    if failed or float(factor.diagonal().amin()) < 1e-3:
        return f"{half} samples do not span the {dims} dimensions of h"
    tails = _normal_tails(z)
    if float(tails.amax()) > 5e-3:
        return "the support of q looks bounded"
    identity = torch.eye(dims, dtype=h.dtype)
    ratios = [_normal(z[half:], f) - scale.log().sum() - log_q[half:] for f in (identity, factor)]
    log_ratio = max(ratios, key=_effective)
    if _effective(log_ratio) < 0.2 * half:
        return "q is too far from a Gaussian"
    ratio = log_ratio.exp()
    mean, error = float(ratio.mean()), float(ratio.std()) / math.sqrt(half)
    slack = LARGEST_Z * error + 3 * float((tails - 1e-3).clamp(min=0).sum()) + 1e-3
    if not abs(mean - 1) <= slack:
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


def _effective(log_ratio: Tensor) -> float:
    return float(torch.exp(2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)))
