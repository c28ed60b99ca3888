"""KL(q(h | x) || p(h)) in closed form, where there is one."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from mcobjectives.context import may_synchronise
from mcobjectives.model import Density, Latent, ModelError, density, has_methods


def expected_log_ratio(model: Any, posterior: Any) -> Density:
    """h -> KL(q || p(h)) for each data point, `(k, batch)`: it stands in for log q(h | x) - log p(h)."""
    prior = _prior(model)
    if prior is not None and not isinstance(prior, Distribution):
        raise ModelError(f"analytic_kl=True needs model.prior to be a torch Distribution, got {type(prior).__name__}")
    if not isinstance(posterior, Distribution):
        raise ModelError(
            f"analytic_kl=True needs a torch Distribution as posterior, got {type(posterior).__name__}: "
            "use analytic_kl=False"
        )
    if prior is None and not has_methods(model, "log_prior"):
        raise ModelError("analytic_kl=True needs model.prior (a torch Distribution), or log_prior(h) of N(0, I)")

    def divergence(h: Latent) -> Tensor:
        if prior is not None:
            _require_agreement(model, prior, h)
        known = _standard_normal(model, h) if prior is None else prior
        try:
            kl = kl_divergence(posterior, known)
        except NotImplementedError:
            raise ModelError(
                f"analytic_kl=True: no closed-form KL between {posterior} and {known}: give the model a `prior` of "
                "the posterior's family, or use analytic_kl=False"
            ) from None
        return kl.expand(h.shape[0], *kl.shape)

    return divergence


def _prior(model: Any) -> Any:
    """`model.prior`, or what it gives when called; None where it wants arguments, such as a prior given labels."""
    prior = getattr(model, "prior", None)
    if isinstance(prior, Distribution) or not callable(prior):
        return prior
    try:
        inspect.signature(getattr(prior, "forward", prior)).bind()
    except TypeError:
        return None
    return prior()


def _require_agreement(model: Any, prior: Distribution, h: Latent) -> None:
    """Raise where model.prior is not the distribution whose density log_prior gives."""
    if not (has_methods(model, "log_prior") and isinstance(h, Tensor) and may_synchronise(h)):
        return
    with torch.no_grad():
        given, expected = density(model, "log_prior", h=h), prior.log_prob(h)
    if not _alike(given, expected):
        raise ModelError(
            "analytic_kl=True takes model.prior for p(h), but model.log_prior(h) is another density than "
            "model.prior.log_prob(h): make them one, rename `prior`, or use analytic_kl=False"
        )


def _standard_normal(model: Any, h: Latent) -> Distribution:
    """N(0, I), if that is what the model's log_prior computes at these samples."""
    if not isinstance(h, Tensor):
        raise ModelError("analytic_kl=True needs one stochastic layer, h a tensor: use analytic_kl=False")
    standard: Distribution = Normal(torch.zeros_like(h[0]), torch.ones_like(h[0]))
    if h.ndim > 2:  # torch knows no divergence from a Normal to an Independent of no dimensions
        standard = Independent(standard, h.ndim - 2)
    given, expected = density(model, "log_prior", h=h.detach()), standard.log_prob(h.detach())
    if given.requires_grad:
        raise ModelError(
            "analytic_kl=True: log_prior has parameters, which would get no gradient: give the model a `prior` (a "
            "torch Distribution that holds them), freeze them by requires_grad_(False), or use analytic_kl=False"
        )
    try:
        standard_normal = _alike(given, expected)
    except RuntimeError:
        raise ModelError(
            "analytic_kl=True cannot see under vmap whether log_prior is N(0, I): give the model a `prior` (a torch "
            "Distribution), or use analytic_kl=False"
        ) from None
    if not standard_normal:
        raise ModelError(
            "analytic_kl=True: the model's log_prior is not N(0, I): give the model a `prior` (a torch Distribution), "
            "or use analytic_kl=False"
        )
    return standard


def _alike(given: Tensor, expected: Tensor) -> bool:
    half = (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if given.dtype in half or expected.dtype in half else 1e-3
    return given.shape == expected.shape and torch.allclose(
        given.double(), expected.double(), rtol=tolerance, atol=tolerance
    )
