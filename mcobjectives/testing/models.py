"""`check_model`: whether a model keeps what `model_promises` has one by one, on a copy, from seeds."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from mcobjectives.arguments import require_count
from mcobjectives.testing import model_gradients
from mcobjectives.testing import model_promises as promises
from mcobjectives.testing.model_promises import Subject
from mcobjectives.testing.report import Finding, find, quietly, verdict


def check_model(model: Any, x: Any, *, k: int = 4, seed: int = 0, exempt: Set[str] = frozenset()) -> list[Finding]:
    """Check what a model promises, on a batch x of its data. Returns the findings, or raises `ConformanceError`.

    It checks:

    - shapes, finite densities, and that `log_joint` agrees with `log_likelihood` and `log_prior`;
    - samples against log q: score identity, normalisation, and gradients along the samples against those by the score.
      These are Monte Carlo tests with fixed seeds, judged at six standard errors;
    - the gradient of log p against finite differences, gradients to every parameter, and those of `attach` if the
      posterior has it;
    - no leak between data points or samples, k and batch of one, and the same numbers for the same seed.

    A property that cannot be checked has `passed` None and says why. The checks run on a copy: the model and the
    generator stay as they are.

    Args:
        model: anything with `posterior(x)` and `log_joint(x, h)`, or `log_likelihood` and `log_prior`.
        x: a batch of at least two data points: a tensor, or tuples, lists, dicts of tensors, batch first.
        k: samples for each data point.
        seed: the seed of every random number.
        exempt: properties that you know the model does not keep, by the names in the findings.

    Raises:
        TypeError: if `model` is a class instead of an instance.
        ValueError: if the batch has no data points, k is below one, `exempt` has an unknown property, or lazy layers
            have not been run.
        ConformanceError: names each broken property, the numbers, and the usual cause.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(3, 4), torch.nn.Linear(2, 3)
        ...     def posterior(self, x):
        ...         mean, log_scale = self.encoder(x).chunk(2, -1)
        ...         return Independent(Normal(mean, log_scale.exp()), 1)
        ...     def log_likelihood(self, x, h):
        ...         return Normal(self.decoder(h), 1.0).log_prob(x).sum(-1)
        ...     def log_prior(self, h):
        ...         return Normal(0.0, 1.0).log_prob(h).sum(-1)
        >>> all(finding.passed is not False for finding in check_model(Model(), torch.randn(4, 3)))
        True
    """
    if isinstance(model, type):
        raise TypeError(f"check_model checks an instance, such as {model.__name__}(...), got the class")
    require_count("k", k)
    rows = [len(part) for part in pytree.tree_leaves(x) if isinstance(part, Tensor) and part.ndim]
    if rows and not any(rows):
        raise ValueError("check_model needs a batch of data points, got none")
    if lazy := [name for name, p in _parameters(model) if is_lazy(p)]:
        raise ValueError(f"{', '.join(lazy[:8])} are lazy: run the model once before check_model")
    if unknown := set(exempt) - {name for stage in _STAGES for name in stage}:
        known = ", ".join(name for stage in _STAGES for name in stage)
        raise ValueError(f"exempt={sorted(unknown)} are no properties: choose from {known}")
    return verdict(f"model {type(model).__name__}", model_findings(model, x, k=k, seed=seed, exempt=exempt))


def model_findings(model: Any, x: Any, *, k: int = 4, seed: int = 0, exempt: Set[str] = frozenset()) -> list[Finding]:
    """The finding for each property, good and bad. What rests on a broken property is not checked."""
    findings: list[Finding] = []
    with quietly(), torch.random.fork_rng(), torch.enable_grad():
        for stage in _STAGES:
            for name, (check, cause) in stage.items():
                torch.manual_seed(seed)
                with _copied(model) as (twin, copied):
                    subject = Subject(twin, copied, x=x, k=k, seed=seed)
                    finding = find(name, cause, lambda s=subject, check=check: check(s))  # type: ignore[misc]
                if finding.passed is False and name in exempt:
                    finding = Finding(name, None, f"exempt: {finding.message}")
                findings.append(finding)
            if any(f.passed is False for f in findings):
                break
    return findings


def _parameters(model: Any) -> list[tuple[str, Any]]:
    return list(model.named_parameters()) if isinstance(model, nn.Module) else []


def _deep_copy(model: Any, state: Any) -> tuple[Any, Any]:
    """Copies of both. Pyro's automatic guides drop their model and master when they are copied: they are given back."""
    parts = [
        part for whole in (model, *vars(model).values()) if isinstance(whole, nn.Module) for part in whole.modules()
    ]
    dropped = [(part, name, vars(part)[name]) for part in parts for name in ("_model", "master") if name in vars(part)]
    memo: dict[int, Any] = {}
    try:
        return copy.deepcopy((model, state), memo)
    finally:
        for part, name, value in dropped:
            vars(part)[name] = value
            if name == "_model" and id(part) in memo:
                vars(memo[id(part)])[name] = copy.deepcopy(value, memo)


@contextmanager
def _copied(model: Any) -> Iterator[tuple[Any, bool]]:
    """A copy of the model, and whether it is one; inside, Pyro's parameters are copies too, where Pyro is used."""
    pyro = sys.modules.get("pyro")
    store = pyro.get_param_store() if hasattr(pyro, "get_param_store") else None  # type: ignore[union-attr]
    try:
        twin, state = _deep_copy(model, store.get_state() if store is not None else None)
    except Exception:  # what cannot be copied is used as it is, but for its buffers
        buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
        kept = [buffer.clone() for buffer in buffers]
        try:
            yield model, False
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, kept, strict=True):
                    buffer.copy_(value)
        return
    with store.scope(state) if store is not None else nullcontext():
        yield twin, True


_Stage = dict[str, tuple[Callable[[Subject], None], str]]

_METHODS: _Stage = {
    "methods": (
        promises.methods,
        "a model without posterior(x), or log_joint(x, h), or both log_likelihood(x, h) and log_prior(h)",
    ),
}
_FORM: _Stage = {
    "shape": (
        promises.shape,
        "no sum over the event dimensions (torch.distributions.Independent does it), or one over all axes",
    ),
    "finite": (
        promises.finite,
        "log of a probability that rounds to zero (use logits), a scale that is not positive, or a p whose support "
        "ends inside q's (a pathwise gradient is then biased)",
    ),
}
_RANDOM: _Stage = {
    "seeds": (
        promises.seeds,
        "random numbers that do not come from torch's global generator (numpy, an own or fixed seed), or noise that is "
        "drawn once for all samples, whatever sample_shape says",
    ),
}
_PROMISES: _Stage = {
    "log_joint": (promises.log_joint, "a term counted twice or forgotten in one of them"),
    "score": (
        promises.score,
        "sample and log_prob disagree on a parameter (variance or standard deviation, log scale or scale), or the "
        "support of q moves with one (Uniform): only plain reparam is right there",
    ),
    "normalised": (
        promises.normalised,
        "a missing constant (log sd, log 2 pi), or a flow's log-determinant left out or of the wrong sign",
    ),
    "gradcheck": (
        model_gradients.gradcheck,
        "detach, .data or no_grad in log p(x, h), or a straight-through step: the gradient is not log p's",
    ),
    "gradients": (
        model_gradients.gradients,
        "detach, .data, or sample() where rsample is meant; freeze unused parameters",
    ),
    "leak": (
        promises.leak,
        "batch normalisation in training mode, a softmax or mean over axis 0, reshape for transpose, or a recurrent, "
        "attention or convolution layer that reads (k, batch, ...) as axes of its own: run it on h.flatten(0, 1), then "
        "unflatten(0, (k, batch))",
    ),
    "sizes": (
        promises.sizes,
        "squeeze() without an axis, batch normalisation in training mode, or x repeated in another order than h is "
        "flattened (repeat_interleave where expand is meant)",
    ),
}
_PATH: _Stage = {
    "pathwise": (
        promises.pathwise,
        "detach, .data or no_grad on a part of rsample, straight-through samples, or a support of q that moves with "
        "its parameters",
    ),
}
_STAGES = (_METHODS, _FORM, _RANDOM, _PROMISES, _PATH)
