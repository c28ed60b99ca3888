"""What a model is: q(h | x) to sample from, and log p(x, h). No base class is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mcobjectives.context import cast_anew, generators_at, may_synchronise

Latent = Any
"""A tensor, or a tuple, list or dict of tensors, each `(k, batch, ...)`."""


class ModelError(TypeError, ValueError):
    """The model does not fit the request: a method is missing, or it does not return log-densities.

    Example:
        >>> from mcobjectives import IWAE
        >>> try:
        ...     IWAE(k=2)(object(), torch.zeros(3))
        ... except ModelError as error:
        ...     print(str(error).partition(":")[0])
        an objective needs object to have the method(s) posterior
    """


@runtime_checkable
class Posterior(Protocol):
    """q(h | x) for a batch of x: any `torch.distributions.Distribution` of batch shape `(batch,)` is one.

    A posterior with `rsample` but no `sample` works too, though a type checker rejects it.

    Pathwise estimators also need `rsample(sample_shape)`, with differentiable samples. If drawing samples runs
    networks, as in q(h1 | x) q(h2 | h1), the posterior may also have `attach(h)`. It returns the samples h,
    `(m, batch, ...)`, as functions of its parameters, with the noise in them held constant. With `backward_samples`,
    its networks are then differentiated only for the chosen samples.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> isinstance(Independent(Normal(torch.zeros(8, 2), 1.0), 1), Posterior)
        True
    """

    def sample(self, sample_shape: torch.Size, /) -> Latent:
        """h, each part of it `sample_shape + (batch, ...)`."""
        ...

    def log_prob(self, h: Latent, /) -> Tensor:
        """log q(h | x), `(k, batch)`."""
        ...


@runtime_checkable
class Model(Protocol):
    """A latent-variable model: `log_joint(x, h)`, or `log_likelihood(x, h)` and `log_prior(h)`, each `(k, batch)`.

    Any object with these methods is a model; there is no base class. The protocol requires only `posterior`, because
    you can give the densities in either way. An objective looks for them when it needs them.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> from mcobjectives import IWAE
        >>> class Gaussian:  # h ~ N(0, 1), x | h ~ N(h, 1)
        ...     def posterior(self, x):
        ...         return Independent(Normal(x / 2, 0.5**0.5), 1)
        ...     def log_joint(self, x, h):
        ...         return (Normal(0.0, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)).sum(-1)
        >>> isinstance(Gaussian(), Model)
        True
        >>> IWAE(k=5).bound(Gaussian(), torch.zeros(2, 1))  # log N(0; 0, 2), as q is the exact posterior
        tensor([-1.2655, -1.2655])
    """

    def posterior(self, x: Any, /) -> Posterior:
        """q(h | x) for the data points of x."""
        ...


Density = Callable[[Latent], Tensor]


def has_methods(model: Any, *names: str) -> bool:
    return all(callable(getattr(model, name, None)) for name in names)


def require(model: Any, needed_by: str, *names: str) -> None:
    """Raise `ModelError` unless the model has all the named methods."""
    missing = [name for name in names if not has_methods(model, name)]
    if missing:
        inner = [name for name in ("module", "model") if has_methods(getattr(model, name, None), *names)]
        hint = f"its .{inner[0]} has: give that; " if inner else ""
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):  # whose .module would train each replica alone
            hint = "wrap the loss in place of the model, DistributedDataParallel(objective.bind(model.module)); "
        raise ModelError(
            f"{needed_by} needs {type(model).__name__} to have the method(s) {', '.join(missing)}: {hint}"
            "a model gives posterior(x), and log_joint(x, h) or both log_likelihood(x, h) and log_prior(h)"
        )


def called(owner: Any, method: str, **given: Any) -> Any:
    """owner.method(*given); raises where it changes one of these in place, which all that comes after would see."""
    if torch.compiler.is_compiling():
        return getattr(owner, method)(*given.values())
    marks = [(name, *mark) for name, value in given.items() for mark in _marks(value)]
    found = getattr(owner, method)(*given.values())
    for name, part, mark in marks:
        if not _same(part, mark) if isinstance(mark, Tensor) else part._version != mark:
            raise ModelError(
                f"{method}({', '.join(given)}) of {type(owner).__name__} changes {name} in place, which is used again "
                f"after it: use no inplace=True in the first layer, and {name} = {name} * 2 in place of {name} *= 2"
            )
    return found


def density(owner: Any, method: str, **given: Any) -> Tensor:
    """owner.method(*given); raises where that is no tensor of floats."""
    found = called(owner, method, **given)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        missing = " (is a `return` missing?)" if found is None else ""
        raise ModelError(
            f"{method}({', '.join(given)}) of {type(owner).__name__} must be a (k, batch) tensor of floats, got "
            f"{what}{missing}"
        )
    return found


def tensors(value: Any) -> list[Tensor]:
    """Those of a tensor, or a tuple, list or dict of tensors; whatever else x may be is not looked into."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [part for part in parts if isinstance(part, Tensor)]


def _marks(value: Any) -> list[tuple[Tensor, Any]]:
    """Each tensor with its version, or a copy of it where torch counts none."""
    marks: list[tuple[Tensor, Any]] = []
    for part in tensors(value):
        if not part.is_inference():
            marks.append((part, part._version))
        elif may_synchronise(part) and part.layout == torch.strided and not part.is_nested:
            marks.append((part, part.clone()))
    return marks


def _same(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before) or bool(((now == before) | (now.isnan() & before.isnan())).all())


@contextmanager
def without_trace(model: Any) -> Iterator[None]:
    """Inside, no graph is built; afterwards the model's buffers and torch's random numbers are as they were."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    kept = [buffer.clone() for buffer in buffers]
    try:
        with generators_at(), torch.no_grad():
            yield
    finally:
        for buffer, value in zip(buffers, kept, strict=True):
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # unseen by a graph that holds it, as batch normalisation's own changes are
        cast_anew()
