"""Which posteriors an objective's gradient would be wrong for: refused, or warned of."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from mcobjectives.context import may_synchronise
from mcobjectives.messages import warn_once
from mcobjectives.model import Latent, ModelError, has_methods, without_trace
from mcobjectives.sampling import (
    detached,
    has_rsample,
    ignores_h,
    is_discrete,
    moving_support,
    named,
    without_inverse,
)

if TYPE_CHECKING:
    from mcobjectives.objective import Objective

_FUNCTIONS_OF_H: weakref.WeakKeyDictionary[type, weakref.WeakSet[type]] = weakref.WeakKeyDictionary()


def require_sound(objective: Objective, posterior: Any) -> None:
    """Raise, or warn, where this estimator's gradient would be wrong for this posterior."""
    plan, m = objective.plan, objective.backward_samples
    if plan.path:
        warn_if_straight_through(posterior)
    culprit, mend = f"gradient={objective.gradient!r}", "gradient='reparam'"
    if objective.weighs_itself:
        culprit, mend = type(objective).__name__, "an objective without weights of its own"
    if not plan.plain and moving_support(posterior):
        raise ModelError(
            f"{culprit} is wrong for {named(posterior, 'moving_support')}, whose support moves "
            f"with its parameters: use {mend}"
        )
    if plan.plain:
        culprit, mend = f"backward_samples={m}", "all samples"
    if (not plan.plain or m is not None) and (transform := without_inverse(posterior)) is not None:
        raise ModelError(
            f"{culprit} takes log q(h | x) at given samples, for which {type(transform).__name__} of q has "
            f"no inverse: use {mend}"
        )


def warn_if_straight_through(posterior: Any) -> None:
    """Warn where a gradient through discrete samples is not q's."""
    if is_discrete(posterior) and has_rsample(posterior):
        warn_once(
            f"h of {named(posterior, 'discrete')} is discrete, and a gradient straight through its samples is "
            "biased: use gradient='vimco' for an unbiased one"
        )


def require_function_of_h(model: Any, posterior: Any, h: Latent) -> None:
    """Raise where log_prob(h) is that of the samples drawn last, whatever h is, as flows often keep it.

    Once for each class of model and posterior, after log q was taken at h: what q keeps from then on has its graph.
    """
    made_for_it = isinstance(posterior, Distribution) or has_methods(posterior, "named_by_sites")
    if made_for_it or torch.compiler.is_compiling():
        return
    kind, parts = type(posterior), pytree.tree_leaves(h)
    seen = _FUNCTIONS_OF_H.setdefault(kind, weakref.WeakSet())
    if type(model) in seen or len(parts[0]) < 2 or not all(map(may_synchronise, parts)):
        return
    with without_trace(model):
        if ignores_h(posterior, detached(h)):
            raise ModelError(
                f"log_prob(h) of {kind.__name__} gives the density of its latest samples, whatever h is: compute it "
                "from h, or use gradient='reparam' without chunk_size and backward_samples"
            )
    seen.add(type(model))
