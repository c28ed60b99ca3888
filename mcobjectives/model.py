"""What a model is: q(h | x) to sample from, and log p(x, h). Nobody has to inherit from anything here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Latent = Any
"""A tensor, or a tuple, list or dict of tensors, each `(k, batch, ...)`."""


class ModelError(TypeError, ValueError):
    """A model does not fit what was asked of it: a method is missing, or what it returns is not log-densities.

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

    Pathwise estimators need `rsample(sample_shape)` too, with samples that are differentiable. One whose samples cost
    networks, as q(h1 | x) q(h2 | h1) does, may have `attach(h)` besides: the samples h, `(m, batch, ...)`, as functions
    of its parameters, the noise in them held constant. With `backward_samples` its networks are then differentiated
    for the chosen samples alone.

    Example:
        >>> from torch.distributions import Independent, Normal
        >>> isinstance(Independent(Normal(torch.zeros(8, 2), 1.0), 1), Posterior)
        True
    """

    def sample(self, sample_shape: torch.Size) -> Latent:
        """h, each part of it `sample_shape + (batch, ...)`."""
        ...

    def log_prob(self, h: Latent, /) -> Tensor:
        """log q(h | x), `(k, batch)`."""
        ...


@runtime_checkable
class Model(Protocol):
    """A latent-variable model: `log_joint(x, h)`, or `log_likelihood(x, h)` and `log_prior(h)`, each `(k, batch)`.

    Nothing is inherited from: any object with these methods is a model.

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

    def posterior(self, x: Any) -> Posterior:
        """q(h | x) for the data points of x."""
        ...


Density = Callable[[Latent], Tensor]


def has_methods(model: Any, *names: str) -> bool:
    return all(callable(getattr(model, name, None)) for name in names)


def require(model: Any, needed_by: str, *names: str) -> None:
    """Raise `ModelError` unless the model has all the named methods."""
    missing = [name for name in names if not has_methods(model, name)]
    if missing:
        raise ModelError(
            f"{needed_by} needs {type(model).__name__} to have the method(s) {', '.join(missing)}: "
            "a model gives posterior(x), and log_joint(x, h) or both log_likelihood(x, h) and log_prior(h)"
        )


def log_joint(model: Any, x: Any, kl_weight: float = 1.0) -> Density:
    """h -> log p(x, h), or log p(x | h) + kl_weight * log p(h) where the weight is not one."""
    require(model, "an objective", "posterior")
    if kl_weight == 1.0 and has_methods(model, "log_joint"):
        return lambda h: model.log_joint(x, h)
    require(model, "a tempered objective" if kl_weight != 1.0 else "an objective", "log_likelihood", "log_prior")

    def joint(h: Latent) -> Tensor:
        return joined(model.log_likelihood(x, h), model.log_prior(h), kl_weight)

    return joint


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


def has_rsample(posterior: Any) -> bool:
    return has_methods(posterior, "rsample") and getattr(posterior, "has_rsample", True)


def is_discrete(posterior: Any) -> bool:
    """Whether h takes discrete values: a gradient through its samples is then straight-through, not q's."""
    return bool(getattr(_support(posterior), "is_discrete", False))


def moving_support(posterior: Any) -> bool:
    """Whether the values that h can take depend on parameters of q, as a Uniform's do."""
    support = _support(posterior)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return any(isinstance(bound, Tensor) and bound.requires_grad for bound in getattr(support, "__dict__", {}).values())


def _support(posterior: Any) -> Any:
    try:
        return getattr(posterior, "support", None)
    except NotImplementedError:  # of torch distributions that know none
        return None


def log_weights(log_p: Tensor, log_q: Tensor, expected_k: int) -> Tensor:
    """log p - log q, once both are known to be `(k, batch)`, on one device, and free of NaN and +inf."""
    for name, value in (("log p(x, h)", log_p), ("log q(h | x)", log_q)):
        if value.ndim != 2:
            raise ModelError(
                f"{name} has shape {tuple(value.shape)}, expected (k, batch) with k = {expected_k}: "
                "sum over the event dimensions (torch.distributions.Independent does)"
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
    log_w = at_least_float32(log_p) - at_least_float32(log_q)
    if may_synchronise(log_w) and not bool((log_w < torch.inf).all()):
        raise ValueError(_describe_bad(log_p, log_q))
    return log_w


def may_synchronise(value: Tensor) -> bool:
    """Whether the host may look at the numbers: not while a compiler traces or a CUDA graph is captured."""
    if torch.compiler.is_compiling() or is_transformed(value):
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def is_transformed(value: Tensor) -> bool:
    """Whether a transform of torch.func, vmap or grad, runs on the value; a tracing compiler sees to its own."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value)


def refuse_transforms(h: Latent) -> None:
    """Raise under a transform of torch.func, which cannot go where the backward pass evaluates densities again."""
    if any(map(is_transformed, pytree.tree_leaves(h))):
        raise RuntimeError(
            "gradient='stl' and 'dreg', chunk_size and Split do not go with torch.func transforms: use "
            "torch.autograd.grad, or gradient='reparam', 'score', 'vimco' or 'rws' without chunk_size"
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


class Samples:
    """The k samples of a posterior as a stream that can be drawn again, slice by slice, with the same numbers.

    The stream is cut in blocks of a fixed size, so the numbers depend on the seed and k alone, not on how the caller
    slices. Only `replay=True` remembers the generator's state before each block: all are drawn once in advance, so that
    a slice drawn again leaves the generator where the first time did, and a dropout in the model repeats itself too.
    """

    BLOCK = 50

    def __init__(self, posterior: Any, k: int, *, pathwise: bool, replay: bool = False) -> None:
        if pathwise and not has_rsample(posterior):
            raise ModelError(
                f"a pathwise gradient needs rsample, which {type(posterior).__name__} does not have: "
                'use gradient="score" or "vimco"'
            )
        if not (has_rsample(posterior) or has_methods(posterior, "sample")):
            raise ModelError(f"the posterior {type(posterior).__name__} has neither sample nor rsample")
        require(posterior, "an objective", "log_prob")
        self.posterior, self.k, self.pathwise = posterior, k, pathwise
        self.attach = posterior.attach if pathwise and has_methods(posterior, "attach") else None
        self._states: list[Any] = []
        if replay:
            for b in range(-(-k // self.BLOCK)):
                self._states.append(rng_state())
                with torch.no_grad():
                    self._sample(self._size(b))
            cast_anew()

    def draw(self, start: int = 0, stop: int | None = None) -> Latent:
        """Samples `start` to `stop`: `(stop - start, batch, ...)`, differentiable where the stream is pathwise."""
        stop = self.k if stop is None else stop
        first, last = start // self.BLOCK, (stop - 1) // self.BLOCK
        blocks = [self._block(b) for b in range(first, last + 1)]
        whole = blocks[0] if len(blocks) == 1 else pytree.tree_map(lambda *parts: torch.cat(parts), *blocks)
        offset = first * self.BLOCK
        if start == offset and (stop == self.k or stop % self.BLOCK == 0):
            return whole
        return pytree.tree_map(lambda part: part[start - offset : stop - offset], whole)

    def _size(self, b: int) -> int:
        return min(self.BLOCK, self.k - b * self.BLOCK)

    def _block(self, b: int) -> Latent:
        if not self._states:
            return self._sample(self._size(b))
        with generators_at(self._states[b]):
            return self._sample(self._size(b))

    def _sample(self, n: int) -> Latent:
        shape = torch.Size((n,))
        if self.pathwise:
            return self.posterior.rsample(shape)
        with torch.no_grad():  # rsample where there is one, so that every estimator sees the same numbers for a seed
            h = (self.posterior.rsample if has_rsample(self.posterior) else self.posterior.sample)(shape)
        cast_anew()
        return h


def check_differentiable(h: Latent, log_q: Tensor) -> None:
    """Raise where q has parameters that samples do not depend on: their pathwise gradient would be lost."""
    if not (torch.is_grad_enabled() and log_q.requires_grad):
        return
    parts = pytree.tree_leaves(h)
    lost = [i for i, part in enumerate(parts) if not part.requires_grad]
    if lost:
        raise ModelError(
            f"part(s) {lost} of h ({len(parts)} in all) carry no gradient, though log q(h | x) has parameters: "
            'a pathwise gradient would be wrong; use gradient="score" or "vimco" (discrete or mixed latents); '
            "a layer to be frozen is left out of the optimiser, with requires_grad as it is; those of a layer without "
            "parameters are marked by mcobjectives.parameterless(h)"
        )


def parameterless(h: Tensor) -> Tensor:
    """h, marked as samples of a layer of q that has no parameters, so that no path through them can be lost.

    For `rsample` of a q that draws a part of h from a fixed distribution, beside others that have parameters: freshly
    drawn samples, outside transforms of torch.func.

    Example:
        >>> noise = parameterless(torch.randn(5, 3, 2))
        >>> noise.requires_grad, noise.is_leaf
        (True, True)
    """
    if not h.is_floating_point():
        raise ModelError(f"parameterless(h) needs floating-point samples, got {h.dtype}: cast them, h.float()")
    if torch.is_grad_enabled():
        h.requires_grad_()
    h.parameterless = True  # type: ignore[attr-defined]
    return h


@contextmanager
def generators_at(state: Any) -> Iterator[None]:
    """Inside, torch's generators go on from a `rng_state()`; afterwards from where they were."""
    now = rng_state()
    set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(now)


def cast_anew() -> None:
    """After networks were evaluated without a graph: let autocast forget the parameters that it has cast.

    torch 2.9 hands those casts to code with a graph, where the parameters' gradient is then lost.
    """
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


def rng_state() -> tuple[Tensor, Tensor | None]:
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if on_cuda else None


def same_state(before: tuple[Tensor, Tensor | None], after: tuple[Tensor, Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(before, after, strict=True)
    )


def set_rng_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
