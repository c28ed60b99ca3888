"""A model's densities at its samples: log p(x, h), however the model gives it, and the log-weights."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.context import may_synchronise, rng_state, same_state
from mcobjectives.messages import warn_once
from mcobjectives.model import Density, Latent, ModelError, density, has_methods, require, without_trace

_AGREED: dict[int, weakref.ref[Any]] = {}


def log_joint(model: Any, x: Any, kl_weight: float = 1.0) -> Density:
    """h -> log p(x, h), or log p(x | h) + kl_weight * log p(h) where the weight is not one."""
    require(model, "an objective", "posterior")
    if kl_weight == 1.0 and has_methods(model, "log_joint"):
        return lambda h: density(model, "log_joint", x=x, h=h)
    require(model, "a tempered objective" if kl_weight != 1.0 else "an objective", "log_likelihood", "log_prior")

    def joint(h: Latent) -> Tensor:
        return joined(*parts(model, x, h), kl_weight)

    return joint


def parts(model: Any, x: Any, h: Latent) -> tuple[Tensor, Tensor]:
    """log p(x | h) and log p(h). Raises if the model's log_joint is not their sum; checked once per model, and skipped
    for random densities and under transforms.
    """
    look = has_methods(model, "log_joint") and id(model) not in _AGREED
    before = rng_state() if look and all(map(may_synchronise, pytree.tree_leaves(h))) else None
    likelihood, prior = density(model, "log_likelihood", x=x, h=h), density(model, "log_prior", h=h)
    if before is not None and same_state(before, rng_state()):
        _require_agreement(model, x, h, likelihood, prior)
    return likelihood, prior


def likelihood(model: Any, x: Any, h: Latent) -> Tensor:
    """log p(x | h), where log p(h) is taken elsewhere; raises as `parts` does."""
    if id(model) in _AGREED or not has_methods(model, "log_joint", "log_prior"):
        return density(model, "log_likelihood", x=x, h=h)
    return parts(model, x, h)[0]


def _require_agreement(model: Any, x: Any, h: Latent, likelihood: Tensor, prior: Tensor) -> None:
    key = id(model)
    try:
        known = weakref.ref(model, lambda _: _AGREED.pop(key, None))
    except TypeError:  # it would be looked at every time
        return
    joint = _quietly(model, x, h)
    expected = joined(likelihood, prior)
    if joint is not None and joint.shape == expected.shape and may_synchronise(joint) and may_synchronise(expected):
        coarse = torch.is_autocast_enabled(joint.device.type) or joint.dtype in (torch.bfloat16, torch.float16)
        size = 1 + likelihood.detach().abs() + prior.detach().abs()
        if bool(((joint - expected.detach()).abs() > (2e-2 if coarse else 1e-3) * size).any()):  # not where it is NaN
            raise ModelError(
                f"log_joint(x, h) of {type(model).__name__} is another density than log_likelihood(x, h) + "
                "log_prior(h): make them one, or give one of them alone"
            )
    _AGREED[key] = known


def _quietly(model: Any, x: Any, h: Latent) -> Tensor | None:
    """log_joint(x, h), without a trace; None where it is random or not to be called."""
    with without_trace(model):
        before = rng_state()
        try:
            joint = model.log_joint(x, h)
        except Exception:  # of a base class, say, for other arguments
            joint = None
        random = not same_state(before, rng_state())
    return joint if isinstance(joint, Tensor) and not random else None


def joined(likelihood: Tensor, prior: Tensor, kl_weight: float = 1.0) -> Tensor:
    """log p(x | h) + kl_weight * log p(h), once both are known to have one shape; not added in half precision."""
    if likelihood.shape != prior.shape:  # adding them would broadcast
        raise ModelError(
            f"log_likelihood(x, h) has shape {tuple(likelihood.shape)} and log_prior(h) {tuple(prior.shape)}: "
            "both must be (k, batch)"
        )
    likelihood, prior = at_least_float32(likelihood), at_least_float32(prior)
    if kl_weight == 0:  # outside the prior's support the weight is zero still, as for every other t
        return likelihood + torch.where(prior == -torch.inf, prior, 0 * prior)
    return likelihood + kl_weight * prior


def at_least_float32(log_p: Tensor) -> Tensor:
    """Sums of densities are never left in half precision, where the spacing near 100 nats is half a nat."""
    return log_p.float() if log_p.dtype in (torch.bfloat16, torch.float16) else log_p


def log_weights(log_p: Tensor, log_q: Tensor, expected_k: int, h: Latent) -> Tensor:
    """log p - log q at h, once both are known to be `(k, batch)`, on one device, and free of NaN and +inf."""
    for name, value in (("log p(x, h)", log_p), ("log q(h | x)", log_q)):
        if value.ndim != 2:
            mend = "sum over the event dimensions (torch.distributions.Independent does)"
            if value.ndim < 2:
                mend = (
                    "give x a batch axis, and do not sum over it; if all data points share h, its posterior's batch "
                    "has size one, and both are (k, 1)"
                )
            raise ModelError(
                f"{name} has shape {tuple(value.shape)}, expected (k, batch) with k = {expected_k}: {mend}"
            )
    if log_p.device != log_q.device:
        raise ModelError(
            f"log p(x, h) is on {log_p.device} and log q(h | x) on {log_q.device}: move both to one device"
        )
    if log_p.shape != log_q.shape or log_p.shape[0] != expected_k:
        raise ModelError(
            f"log p(x, h) has shape {tuple(log_p.shape)} and log q(h | x) {tuple(log_q.shape)}, expected both to be "
            f"(k, batch) with k = {expected_k}"
        )
    if log_p.shape[1] == 0:
        raise ModelError("the batch is empty: log-weights of shape (k, 0)")
    _warn_of_shared_rows(h, log_p.shape[1])
    log_w = at_least_float32(log_p) - at_least_float32(log_q)
    if may_synchronise(log_w) and not bool((log_w < torch.inf).all()):
        raise ValueError(_describe_bad(log_p, log_q))
    return log_w


def _warn_of_shared_rows(h: Latent, batch: int) -> None:
    """Where one part of h has a row for each data point and another one for all of them, which broadcasts."""
    if isinstance(h, Tensor) or torch.compiler.is_compiling() or batch == 1:
        return
    rows = [part.shape[1:2] for part in pytree.tree_leaves(h)]
    if set(rows) == {(1,), (batch,)}:
        shared = [i for i, one in enumerate(rows) if one == (1,)]
        warn_once(
            f"part(s) {shared} of h ({len(rows)} in all) are one for all data points, where the others have a row for "
            "each: their log p and log q count once for each of these; for one latent of the whole data set sum both "
            "over it, to (k, 1)"
        )


def _describe_bad(log_p: Tensor, log_q: Tensor) -> str:
    found = []
    for name, value, infinity, sign in (
        ("log p(x, h)", log_p, torch.inf, "+"),
        ("log q(h | x)", log_q, -torch.inf, "-"),
    ):
        nans, infinite = int(value.isnan().sum()), int((value == infinity).sum())
        if nans:
            found.append(f"{name} is NaN at {nans} of {value.numel()} samples")
        if infinite:
            found.append(f"{name} is {sign}inf at {infinite} of {value.numel()} samples")
    both = int(((log_p == -torch.inf) & (log_q == -torch.inf)).sum())
    if not found or both:
        found.append(f"log p - log q is undefined at {both} samples where both are -inf")
    return "NaN or +inf log-weights: " + "; ".join(found)
