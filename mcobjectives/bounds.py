"""The bound of one batch, and three ways to its gradient: from all samples at once, in chunks, from a chosen few."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mcobjectives.analytic import expected_log_ratio
from mcobjectives.context import cast_anew, generators_at, may_synchronise, refuse_transforms, rng_state, same_state
from mcobjectives.densities import likelihood, log_joint
from mcobjectives.derivatives import reduced
from mcobjectives.estimators import Weights
from mcobjectives.messages import warn_once
from mcobjectives.model import Density, Latent, ModelError, called, density, require, tensors
from mcobjectives.replay import replayed, require_unchanged
from mcobjectives.resampling import select
from mcobjectives.sampling import Samples, check_differentiable, detached
from mcobjectives.soundness import require_function_of_h, require_sound
from mcobjectives.surrogate import PLAIN, Plan, Ratio, Terms, terms, with_value

if TYPE_CHECKING:
    from mcobjectives.objective import Objective

LOG_WEIGHTS = "log p(x, h) - log q(h | x)"


@dataclass(eq=False)
class BatchBound:
    """An objective at one batch: samples of q(h | x), h -> log p(x, h), tempered, and h -> log q(h | x).

    `upstream` has the tensors that parts of x stand in for, see `_cut_off`. Each method gives the bound of each data
    point, `(batch,)`; all but `value` with the estimator's gradient.
    """

    objective: Objective
    model: Any
    plan: Plan
    samples: Samples
    log_p: Density
    log_q: Density
    upstream: dict[Tensor, Tensor]

    def value(self) -> Tensor:
        """Without a graph."""
        return self._reduce(self._log_weights())

    def whole(self) -> Tensor:
        """From all samples at once."""
        ratio = Ratio()
        found = self._terms(self.plan, *self._draw(), self.objective.k, ratio)
        bound = self._reduce(found.log_w)
        if self.plan.plain:
            return bound
        weights = self._weights(found.log_w)
        ratio.of(weights)
        return with_value(found.weighted_sum(weights), bound)

    def chunked(self) -> Tensor:
        """In two passes: the log-weights without a graph, then S chunk by chunk when the gradient is asked for."""
        if self.plan.path:  # before anything is computed at all samples
            first, q = self._draw(*self._chunks()[0])
            check_differentiable(first, self.log_q(detached(first)) if q is None else q)
        states: list[Any] = []
        log_w = self._log_weights(states)
        weights = self._weights(log_w)

        def share(chunk: int) -> Tensor:
            start, stop = self._chunks()[chunk]
            own = weights.map(lambda w: w[start:stop])
            with generators_at(states[chunk]):  # a dropout in the model repeats itself
                found = self._terms(self.plan, *self._draw(start, stop), stop - start, Ratio(own))
            require_unchanged(found.log_w, log_w[start:stop], LOG_WEIGHTS)
            return found.weighted_sum(own)

        return replayed(self._reduce(log_w), share, len(states), self.upstream)

    def resampled(self, m: int) -> Tensor:
        """From m of the samples, chosen by their weights."""
        samples, in_chunks = self.samples, self.objective.chunk_size is not None
        if samples.attach is not None:  # only what is chosen needs a graph
            samples.pathwise = False
        if in_chunks:
            h, log_w = None, self._log_weights()
        else:
            h, q = self._draw(graph=False)
            log_w = self._numbers(detached(h), q, self.objective.k)
            cast_anew()
            _require_rows(h, log_w.shape[1])
            require_function_of_h(self.model, samples.posterior, h)
        bound = self._reduce(log_w)
        with torch.no_grad():
            arrays = self._weights(log_w)
            importance = torch.stack([w.abs() for w in arrays if w is not None]).amax(0)
            # In float64: float32 draws an exact 0, which favours the first sample however small, once in 2^24 times.
            offset = torch.rand(log_w.shape[1], dtype=torch.float64, device=log_w.device)
            index, multiplier = select(importance, m, offset)
            multiplier = multiplier.to(log_w.dtype)
            weights = arrays.map(lambda w: multiplier * w.gather(0, index))
        chosen = self._redraw(index) if in_chunks else pytree.tree_map(lambda part: _pick(part, index), h)
        if samples.attach is not None:
            chosen = samples.attach(chosen)
        before = rng_state() if may_synchronise(log_w) else None
        kept = self._terms(self.plan, chosen, None, m, Ratio(weights))
        if before is not None and not same_state(before, rng_state()):
            # A dropout, perhaps, whose change passes for rounding beside log p(x, h); or a thread that loads data.
            again = self._numbers(detached(chosen), None, m)
            cast_anew()
            require_unchanged(again, kept.log_w, LOG_WEIGHTS, tolerance=1e-6 if again.dtype == torch.float32 else 1e-10)
        # Loosely: in half precision m rows are not multiplied as k rows are, to the last of their few bits.
        require_unchanged(kept.log_w, log_w.gather(0, index), LOG_WEIGHTS, tolerance=1e-2)
        return with_value(kept.weighted_sum(weights), bound)

    def _weights(self, log_w: Tensor) -> Weights:
        """The estimator's; raises for an array that it did not have when its plan was made."""
        weights = Weights(*self.objective.weights(log_w))
        for name, array, planned in (("c", weights.c, self.plan.path), ("s", weights.s, self.plan.score)):
            if array is not None and not planned and not self.plan.plain:
                raise ValueError(
                    f"the estimator of {self.objective!r} gives {name} for some log-weights and None for others, so "
                    "that its terms would be lost: give zeros in place of None"
                )
        return weights

    def _draw(self, start: int = 0, stop: int | None = None, graph: bool = True) -> tuple[Latent, Tensor | None]:
        """Samples `start` to `stop`; with log q at them where q caches and no score is to be taken of it."""
        if self.plan.score:  # whose log q is that of fixed samples, in the passes without a graph too
            return self.samples.draw(start, stop), None

        def without_graph(h: Latent) -> Tensor:
            with torch.no_grad():
                return self.log_q(h)

        return self.samples.draw_with(self.log_q if graph else without_graph, start, stop)

    def _terms(self, plan: Plan, h: Latent, q: Tensor | None, k: int, ratio: Ratio) -> Terms:
        found = terms(plan, self.log_p, self.log_q, h, q, k, self.objective.tempering, ratio)
        if not plan.plain:
            require_function_of_h(self.model, self.samples.posterior, h)
        return found

    def _chunks(self) -> list[tuple[int, int]]:
        k = self.objective.k
        size = self.objective.chunk_size or k
        return [(start, min(start + size, k)) for start in range(0, k, size)]

    def _log_weights(self, states: list[Any] | None = None) -> Tensor:
        """All log-weights, `(k, batch)`, without a graph; `states` takes the generators' before each chunk."""
        parts = []
        for start, stop in self._chunks():
            if states is not None:
                states.append(rng_state())
            with torch.no_grad():
                h, q = self._draw(start, stop)
            parts.append(self._numbers(h, q, stop - start))
        cast_anew()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _numbers(self, h: Latent, q: Tensor | None, k: int) -> Tensor:
        """The log-weights of given samples, at which log q is known or None, `(k, batch)`, without a graph."""
        with torch.no_grad():
            return self._terms(PLAIN, h, q, k, Ratio()).log_w

    def _redraw(self, index: Tensor) -> Latent:
        """The chosen samples, `(m, batch, ...)`, drawn again chunk by chunk."""

        def picked(start: int, stop: int) -> Latent:
            inside = (index >= start) & (index < stop)
            local = (index - start).clamp(0, stop - start - 1)
            drawn = self.samples.draw(start, stop)
            _require_rows(drawn, index.shape[1])
            part = pytree.tree_map(lambda t: _pick(t, local), drawn)
            return pytree.tree_map(lambda t: torch.where(_like(inside, t), t, torch.zeros_like(t)), part)

        refuse_transforms(index)
        chosen: Latent = None
        for start, stop in self._chunks():
            part = checkpoint(picked, start, stop, use_reentrant=False)
            chosen = part if chosen is None else pytree.tree_map(torch.add, chosen, part)
        return chosen

    def _reduce(self, log_w: Tensor) -> Tensor:
        bound = reduced(self.objective.reduce, log_w)
        # One look at both: on a GPU each would be waited for.
        if may_synchronise(bound) and not bool(torch.isfinite(bound).all() & torch.isfinite(log_w).all()):
            self._explain(bound, log_w == -torch.inf)
        return bound

    def _explain(self, bound: Tensor, zero: Tensor) -> None:
        """Raise for a bound that is not finite; warn where some weights are zero, and a gradient is blind to that."""
        bad, empty, some = ~torch.isfinite(bound), int(zero.all(0).sum()), bool(zero.any())
        if not bool(bad.any()):
            if some and self.plan.path and torch.is_grad_enabled():
                warn_once(
                    "some weights are zero (log p(x, h) = -inf): where p's support ends inside q's (a Uniform or "
                    "HalfNormal prior under a Normal q) a pathwise gradient is biased, since it does not see samples "
                    "cross the edge: use a q on p's support, or gradient='vimco'"
                )
            return
        why = (
            f"all {self.objective.k} weights are zero for {empty} of them"
            if empty
            else "some of their weights are zero"
        )
        why += ", some for the others" if 0 < empty < int(bad.sum()) else ""
        why = f"{why} (log p(x, h) = -inf)" if some else "its reduce leaves what floats hold: stay in log space"
        raise ValueError(
            f"the bound of {type(self.objective).__name__} is not finite for {int(bad.sum())} of "
            f"{bound.numel()} data points: {why}"
        )


def _require_rows(h: Latent, batch: int) -> None:
    """Raise unless all parts of h have a row for each data point, which keeps samples of its own."""
    shapes = [tuple(part.shape) for part in pytree.tree_leaves(h)]
    if any(shape[1:2] != (batch,) for shape in shapes):
        raise ModelError(
            f"backward_samples needs all parts of h to be (k, batch, ...), got {', '.join(map(str, shapes))} for "
            f"{batch} data points: expand what they share over them, or use all samples"
        )


def _like(weights: Tensor, part: Tensor) -> Tensor:
    """`(m, batch)` with trailing ones, to broadcast against a part of h."""
    return weights.reshape(weights.shape + (1,) * (part.ndim - weights.ndim))


def _pick(part: Tensor, index: Tensor) -> Tensor:
    """Rows of `(k, batch, ...)` by an `(m, batch)` index."""
    return part.gather(0, _like(index, part).expand(index.shape + part.shape[2:]))


def open_batch(objective: Objective, model: Any, x: Any) -> BatchBound:
    """The model's samples and densities at x; raises for what it lacks, or what the estimator would get wrong of it."""
    log_p: Density
    in_chunks = torch.is_grad_enabled() and objective.chunk_size is not None and objective.backward_samples is None
    x, upstream = _cut_off(x) if in_chunks else (x, {})
    if objective.analytic_kl:
        require(model, f"{type(objective).__name__}(analytic_kl=True)", "posterior", "log_likelihood")
        log_p = partial(likelihood, model, x)
    else:
        log_p = log_joint(model, x, objective.tempering)
    parts = tensors(x)
    if parts and not any(part.numel() for part in parts) and (x is parts[0] or len(parts) == len(x)):
        # torch's own distributions stumble over it less legibly
        raise ModelError(f"the batch is empty: x has shape {', '.join(str(tuple(part.shape)) for part in parts)}")
    posterior, plan = called(model, "posterior", x=x), objective.plan
    if torch.is_grad_enabled():
        require_sound(objective, posterior)
    samples = Samples(
        posterior,
        objective.k,
        pathwise=plan.path and torch.is_grad_enabled(),
        replay=objective.chunk_size is not None,
    )
    ratio = expected_log_ratio(model, posterior) if objective.analytic_kl else None
    log_q = ratio or (lambda h: density(posterior, "log_prob", h=h))
    return BatchBound(objective, model, plan, samples, log_p, log_q, upstream)


def _cut_off(x: Any) -> tuple[Any, dict[Tensor, Tensor]]:
    """x without the graph that it comes with, as of features of another network; and the tensors that were cut off.

    That graph is then differentiated once and not for every chunk, and x itself has a gradient.
    """
    upstream: dict[Tensor, Tensor] = {}

    def cut(part: Any) -> Any:
        if not isinstance(part, Tensor) or part.grad_fn is None or part.is_nested:
            return part
        leaf = part.detach().requires_grad_()
        upstream[leaf] = part
        return leaf

    return pytree.tree_map(cut, x) if any(part.grad_fn is not None for part in tensors(x)) else x, upstream
