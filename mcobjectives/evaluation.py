"""Evaluate a trained model: log p(x) by streamed importance sampling, the quality of the samples, active units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.activity import (
    Activity,
    active_units,
    activity,
    layer_activity,
    mean_covariance,
    pca_active_units,
    posterior_means,
)
from mcobjectives.arguments import require_count
from mcobjectives.context import cast_anew
from mcobjectives.data import batches, in_float64, rows_and_device
from mcobjectives.densities import joined, log_joint, log_weights, parts
from mcobjectives.model import Latent, ModelError, called, density, has_methods
from mcobjectives.pareto import pareto_khat, tail_length
from mcobjectives.sampling import Samples

__all__ = [  # with the active units, which belong to an evaluation too
    "Activity",
    "Evaluation",
    "active_units",
    "activity",
    "evaluate",
    "layer_activity",
    "mean_covariance",
    "pca_active_units",
    "posterior_means",
]

_ROWS_AT_ONCE = {"cpu": 2500, "cuda": 200_000}
_LOG_WEIGHTS_AT_ONCE = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Estimates for each data point, `(points,)` float64 on the CPU, from the same k samples; all in nats.

    Attributes:
        k: samples per data point.
        log_likelihood: IWAE-k, an estimate of log p(x) from below.
        elbo: the mean log-weight, which is VAE's bound.
        ess: effective sample size (sum w)^2 / sum w^2, between 1 and k.
        khat: Pareto k-hat of the weights (Vehtari et al. 2024); NaN for k < 25 or if the largest weights are equal.
        log_p_x_given_h: E_q log p(x | h) if the model has log_likelihood and log_prior, else None.
    """

    k: int
    log_likelihood: Tensor
    elbo: Tensor
    ess: Tensor
    khat: Tensor
    log_p_x_given_h: Tensor | None

    @classmethod
    def concatenate(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """Join evaluations of parts of the data, all with the same k: those of a loader's batches, for example."""
        parts = list(parts)
        ks = sorted({part.k for part in parts})
        if len(ks) != 1:
            raise ValueError(f"evaluations to be joined must be of the same k, got {ks or 'none'}")
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)[1:]}
        whole: dict[str, Any] = {
            n: None if any(part is None for part in c) else torch.cat(c) for n, c in columns.items()
        }
        return cls(ks[0], **whole)

    @property
    def kl_posterior(self) -> Tensor:
        """KL(q(h | x) || p(h | x)), estimated by log_likelihood - elbo: never negative."""
        return (self.log_likelihood - self.elbo).clamp(min=0.0)

    @property
    def kl_prior(self) -> Tensor | None:
        """E_q[log q(h | x) - log p(h)]."""
        return None if self.log_p_x_given_h is None else self.log_p_x_given_h - self.elbo

    @property
    def nll(self) -> float:
        """Minus the mean log-likelihood."""
        return -float(self.log_likelihood.mean())

    @property
    def nll_stderr(self) -> float:
        """Standard error of `nll` over the data points; NaN for a single one."""
        n = self.log_likelihood.numel()
        return float(self.log_likelihood.std() / math.sqrt(n)) if n > 1 else math.nan

    @property
    def nll_bias(self) -> float:
        """How much `nll` is too high because k is finite, to first order: mean (1 / ess - 1 / k) / 2.

        It never exceeds half a nat: if `ess` is small or k-hat is large, the true bias is greater.
        """
        return float((1 / self.ess - 1 / self.k).mean() / 2)

    @property
    def kl(self) -> float:
        """Mean of KL(q(h | x) || p(h | x))."""
        return float(self.kl_posterior.mean())

    @property
    def unreliable(self) -> float:
        """Fraction of data points whose k-hat is above min(1 - 1 / log10 k, 0.7): k is too small for them.

        NaN for k < 25, where there is no k-hat.
        """
        if not tail_length(self.k):
            return math.nan
        threshold = min(1 - 1 / math.log10(self.k), 0.7)
        return float((self.khat > threshold).double().mean())

    def __repr__(self) -> str:
        """Only the means: the numbers of each data point would fill the screen."""
        means = ", ".join(f"{name}={value:.5g}" for name, value in self.to_dict().items() if value is not None)
        return f"{type(self).__name__}({means})"

    def to_dict(self) -> dict[str, float | int | None]:
        """The means as plain numbers for JSON; k-hat's is over the finite ones. None if there is no finite number."""
        numbers: dict[str, Any] = {
            "points": self.log_likelihood.numel(),
            "k": self.k,
            "nll": self.nll,
            "nll_stderr": self.nll_stderr,
            "nll_bias": self.nll_bias,
            "elbo": self.elbo.mean(),
            "kl_posterior": self.kl,
            "log_p_x_given_h": None if self.log_p_x_given_h is None else self.log_p_x_given_h.mean(),
            "kl_prior": None if self.kl_prior is None else self.kl_prior.mean(),
            "ess_mean": self.ess.mean(),
            "ess_min": self.ess.min(),
            "khat_mean": self.khat[self.khat.isfinite()].mean(),
            "khat_max": self.khat.nan_to_num(-math.inf, posinf=math.inf).max(),
            "khat_unreliable": self.unreliable,
        }
        return {name: _plain(value) for name, value in numbers.items()}


def evaluate(
    model: Any,
    x: Any,
    *,
    k: int = 5000,
    chunk_size: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Estimate log p(x) and its diagnostics with k samples of q(h | x), in memory that does not grow with k.

    For a given seed, the samples depend on k and `batch_size`, not on `chunk_size`.

    Args:
        model: see `mcobjectives.Model`.
        x: the data, on the model's device: a tensor, or a tuple, list or dict of tensors, one row per data point.
        k: samples per data point.
        chunk_size: samples evaluated at a time.
        batch_size: data points at a time; `model.posterior` is called once for each batch. If it is `len(x)`, the model
            may give one log-weight for all of x, as with latents that all data points share: x then counts as one.
        progress: called after every batch with the number of data points done.

    Raises:
        ValueError: if an argument is outside its range, there are no data, or all weights of a data point are zero.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> class Gaussian:  # h ~ N(0, 1), x | h ~ N(h, 1), q the exact posterior: log p(x) = log N(x; 0, 2)
        ...     def posterior(self, x):
        ...         return Independent(Normal(x / 2, 0.5**0.5), 1)
        ...     def log_joint(self, x, h):
        ...         return (Normal(0.0, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)).sum(-1)
        >>> result = evaluate(Gaussian(), torch.zeros(3, 1), k=100)
        >>> round(result.nll, 4), round(result.kl, 4)
        (1.2655, 0.0)
    """
    points, device = rows_and_device(x)
    rows = _ROWS_AT_ONCE.get(device.type, _ROWS_AT_ONCE["cpu"])
    as_one = batch_size == points
    batch_size = min(points, math.isqrt(rows)) if batch_size is None else batch_size
    require_count("k", k)
    require_count("batch_size", batch_size)
    chunk_size = max(1, rows // batch_size) if chunk_size is None else chunk_size
    require_count("chunk_size", chunk_size)
    parts, done = [], 0
    for batch in batches(x, batch_size):
        parts.append(_evaluate_batch(model, batch, int(k), chunk_size))
        found, expected = parts[-1].elbo.numel(), rows_and_device(batch)[0]
        if found != expected and not (found == 1 and as_one):
            raise ModelError(
                f"the model gave log-weights for {found} data points, expected {expected}: one for each row of x "
                f"(without subsampling; if it gives one for the whole data set, batch_size={points} evaluates that)"
            )
        done += expected
        if progress is not None:
            progress(done)
    whole = Evaluation.concatenate(parts)
    empty = (whole.log_likelihood == -math.inf).nonzero().flatten()
    if len(empty):
        raise ValueError(
            f"all {k} weights are zero (log p(x, h) = -inf) for {len(empty)} of {whole.elbo.numel()} data points, "
            f"the first at row {int(empty[0])}"
        )
    return whole


@torch.no_grad()
def _evaluate_batch(model: Any, x: Any, k: int, chunk_size: int) -> Evaluation:
    apart = has_methods(model, "log_likelihood", "log_prior")
    joint = log_joint(model, x)
    posterior = called(model, "posterior", x=x)
    running = _Running(tail_length(k))
    for h, log_q in _chunks(posterior, k, chunk_size):
        n = len(pytree.tree_leaves(h)[0])
        likelihood, prior = parts(model, x, h) if apart else (None, None)
        log_p = joint(h) if likelihood is None or prior is None else joined(likelihood, prior)
        log_q = density(posterior, "log_prob", h=h) if log_q is None else log_q
        running.add(log_weights(log_p, log_q, n, h), likelihood)
    cast_anew()
    return running.result(k)


def _chunks(posterior: Any, k: int, chunk_size: int) -> Iterator[tuple[Latent, Tensor | None]]:
    """The k samples in order, with log q at them where q caches, at most `chunk_size` at a time.

    They are drawn in whole blocks: the same numbers for every chunk size.
    """
    samples = Samples(posterior, k, pathwise=False)
    span = max(Samples.BLOCK, chunk_size // Samples.BLOCK * Samples.BLOCK)
    for start in range(0, k, span):
        drawn = samples.draw_with(posterior.log_prob, start, min(start + span, k))
        if min(span, k - start) <= chunk_size:
            yield drawn
            continue
        for first in range(0, min(span, k - start), chunk_size):
            yield pytree.tree_map(lambda part, i=first: None if part is None else part[i : i + chunk_size], drawn)


class _Running:
    """Running sums of each data point in float64; log-weights are gathered up and folded in many at a time."""

    def __init__(self, tail: int) -> None:
        self.tail = tail
        self.waiting: list[Tensor] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None  # logsumexp of l, logsumexp of 2 l, sum of l
        self.largest: Tensor | None = None
        self.likelihood: Tensor | None = None

    def add(self, log_w: Tensor, likelihood: Tensor | None) -> None:
        self.waiting.append(log_w)
        if likelihood is not None:
            total = in_float64(likelihood).sum(0)
            self.likelihood = total if self.likelihood is None else self.likelihood + total
        if sum(map(len, self.waiting)) >= _LOG_WEIGHTS_AT_ONCE:
            self.fold()

    def fold(self) -> None:
        if not self.waiting:
            return
        log_w = in_float64(torch.cat(self.waiting))
        self.waiting = []
        total, squares, log_w_sum = log_w.logsumexp(0), (2 * log_w).logsumexp(0), log_w.sum(0)
        if self.sums is None or self.largest is None:
            self.sums = total, squares, log_w_sum
        else:
            a, b, c = self.sums
            self.sums = torch.logaddexp(a, total), torch.logaddexp(b, squares), c + log_w_sum
            log_w = torch.cat([self.largest, log_w])
        self.largest = log_w.topk(min(self.tail + 1, len(log_w)), dim=0).values

    def result(self, k: int) -> Evaluation:
        self.fold()
        assert self.sums is not None and self.largest is not None
        total, squares, log_w_sum = self.sums
        return Evaluation(
            k,
            log_likelihood=(total - math.log(k)).cpu(),
            elbo=(log_w_sum / k).cpu(),
            ess=torch.exp(2 * total - squares).clamp(1, k).cpu(),
            khat=pareto_khat(self.largest).cpu(),
            log_p_x_given_h=None if self.likelihood is None else (self.likelihood / k).cpu(),
        )


def _plain(value: Any) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None
