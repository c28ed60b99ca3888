"""Which posteriors an objective's gradient would be wrong for: refused, or warned of, before anything is computed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.distributions import Distribution

from mcobjectives.messages import warn_once
from mcobjectives.model import ModelError, has_methods, without_trace
from mcobjectives.sampling import (
    has_rsample,
    is_discrete,
    knows_its_latest_alone,
    moving_support,
    named,
    without_inverse,
)

if TYPE_CHECKING:
    from mcobjectives.objective import Objective

_ASKED_AGAIN = ("attach", "named_by_sites")  # methods of posteriors that are made for it
_FUNCTIONS_OF_H: weakref.WeakSet[type] = weakref.WeakSet()


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


def require_function_of_h(objective: Objective, model: Any, posterior: Any) -> None:
    """Raise where log q is asked for at other samples than the latest, and known of these alone; once of each class."""
    at_latest = objective.plan.plain and objective.chunk_size is None and objective.backward_samples is None
    made_for_it = isinstance(posterior, Distribution) or any(has_methods(posterior, m) for m in _ASKED_AGAIN)
    kind = type(posterior)
    if at_latest or made_for_it or kind in _FUNCTIONS_OF_H:
        return
    with without_trace(model):
        if knows_its_latest_alone(posterior):
            raise ModelError(
                f"log_prob(h) of {kind.__name__} gives the density of its latest samples, whatever h is: compute it "
                "from h, or use gradient='reparam' without chunk_size and backward_samples"
            )
    _FUNCTIONS_OF_H.add(kind)
