"""Gradient estimators: functions (objective, log_weights) -> (a, c, s), three detached `(k, batch)` weight arrays.

They weight the terms of the surrogate that `mcobjectives.surrogate` differentiates,

    S = sum_i  a_i log p(x, h_i)  -  c_i log q_stopped(h_i | x)  -  s_i log q(stop(h_i) | x),

where c_i weights the pathwise gradient into h_i in every term. `None` stands for zeros: if c is None, samples need not
be differentiable; if s is None, no score is taken. Write g_i = dF/dl_i, H_ii = d2F/dl_i^2, and t for the objective's
weight on log p(h) - log q(h | x) (`kl_weight`). Then each estimator is one line. An estimator is valid for every
objective that it does not refuse with `ValueError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mcobjectives.messages import warn_once

if TYPE_CHECKING:
    from mcobjectives.objective import Objective


class Weights(NamedTuple):
    """The three weight arrays of an estimator, each `(k, batch)` or None for zeros.

    Attributes:
        a: weights log p(x, h_i), for the model's parameters.
        c: weights the path through the samples; None if samples need not be differentiable.
        s: weights the score of q; None if no score is taken.

    Example:
        >>> from mcobjectives import IWAE
        >>> a, c, s = IWAE(k=2, gradient="dreg").weights(torch.zeros(2, 1))
        >>> a.flatten(), c.flatten(), s
        (tensor([0.5000, 0.5000]), tensor([0.2500, 0.2500]), None)
    """

    a: Tensor
    c: Tensor | None
    s: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Weights:
        """The same weights with `change` applied to each array that is not None."""
        a, c, s = self
        return Weights(change(a), None if c is None else change(c), None if s is None else change(s))


def reparam(objective: Objective, log_w: Tensor) -> Weights:
    """The reparameterisation gradient (Kingma & Welling 2014): plain differentiation of F through h and log q."""
    g = objective.slopes(log_w)
    return Weights(g, g, objective.tempering * g)


def stl(objective: Objective, log_w: Tensor) -> Weights:
    """Sticking the landing (Roeder et al. 2017): reparam without the score of q; biased if F is not linear."""
    require_smooth(objective, "stl", twice=False)
    if objective.slopes_vary:
        warn_once(
            f"gradient='stl' is biased for {type(objective).__name__} with more than one sample: "
            "use gradient='dreg' for an unbiased gradient of as little variance"
        )
    g = objective.slopes(log_w)
    return Weights(g, g, None)


def dreg(objective: Objective, log_w: Tensor) -> Weights:
    """The doubly reparameterised gradient (Tucker et al. 2018), for any objective with continuous slopes."""
    require_smooth(objective, "dreg")
    g = objective.slopes(log_w)
    return Weights(g, g - objective.tempering * objective.curvatures(log_w), None)


def score(objective: Objective, log_w: Tensor) -> Weights:
    """The score-function gradient (REINFORCE): samples need not be differentiable, but the variance is high.

    The whole of F weights every sample's score, so the noise grows with k. If the objective is `linear`, as VAE is,
    only the sample's own term weights its score.
    """
    g = objective.slopes(log_w)
    own = torch.where(g == 0, 0.0, g * log_w) if objective.linear else objective.reduce(log_w)
    return Weights(g, None, objective.tempering * g - own)


def vimco(objective: Objective, log_w: Tensor) -> Weights:
    """The score-function gradient with a leave-one-out baseline (VIMCO, Mnih & Rezende 2016); needs k >= 2.

    The baseline b_i is F with log w_i replaced by the mean of the others.
    """
    if log_w.shape[0] < 2:
        raise ValueError("gradient='vimco' needs at least two samples, got k = 1: use k >= 2 or gradient='score'")
    g = objective.slopes(log_w)
    baseline = objective.leave_one_out(log_w)
    # Where weights among the others are zero F may be -inf; any other number that ignores sample i will do.
    baseline = torch.where(baseline.isfinite(), baseline, 0.0)
    return Weights(g, None, objective.tempering * g - (objective.reduce(log_w) - baseline))


def rws(objective: Objective, log_w: Tensor) -> Weights:
    """Reweighted wake-sleep's wake phases (Bornschein & Bengio 2015).

    theta follows the objective. phi minimises KL(p(h | x) || q(h | x)) with self-normalised weights, which is *not* the
    gradient of the objective (Le et al. 2019). With tempered log-weights, phi has another target.
    """
    return Weights(objective.slopes(log_w), None, -log_w.softmax(0))


def require_smooth(objective: Objective, estimator: str, *, twice: bool = True) -> None:
    """Raise `ValueError` if the slopes jump (median, max), so that g - H_ii would lose a term.

    Raise it too if the slopes vary but have no derivative, unless `twice` is False, for an estimator without H_ii.
    """
    if not objective.smooth or objective.slopes_jump:
        raise ValueError(
            f"gradient={estimator!r} is wrong for {type(objective).__name__}: its slopes dF/dlog w jump, "
            "and the term at the jump would be lost; use gradient='reparam' or 'score'"
        )
    if twice and not objective.slopes_differentiable:
        raise ValueError(
            f"gradient={estimator!r} needs second derivatives of {type(objective).__name__}, whose slopes vary but "
            "cannot be differentiated again: write the backward of its autograd.Function in differentiable operations, "
            "override `curvatures`, or use gradient='reparam'"
        )
