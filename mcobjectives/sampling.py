"""The samples of a posterior: a stream that can be drawn again, and what a gradient through them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import AffineTransform, Independent, Transform, TransformedDistribution
from torch.utils import _pytree as pytree

from mcobjectives.context import cast_anew, generators_at, may_synchronise, rng_state, set_rng_state
from mcobjectives.model import Density, Latent, ModelError, has_methods

_INVERSES = ("inv", "_inv_call", "_inverse")  # a transform with an inverse has one of these of its own


def has_rsample(posterior: Any) -> bool:
    return has_methods(posterior, "rsample") and getattr(posterior, "has_rsample", True)


def named(posterior: Any, what: str) -> str:
    """The posterior, for a message on its parts that are `what`: its type, with what an `Independent` is made of."""
    if has_methods(posterior, "named_by_sites"):
        return posterior.named_by_sites(what)
    name, base = type(posterior).__name__, getattr(posterior, "base_dist", None)
    return name if base is None else f"{name}({named(base, what)})"


def is_discrete(posterior: Any) -> bool:
    """Whether h takes discrete values: a gradient through its samples is then straight-through, not q's."""
    own = getattr(posterior, "is_discrete", None)  # of one that is made of several distributions
    return own if isinstance(own, bool) else bool(getattr(_support(posterior), "is_discrete", False))


def moving_support(posterior: Any) -> bool:
    """Whether the values that h can take depend on parameters of q, as a Uniform's do."""
    if isinstance(own := getattr(posterior, "moving_support", None), bool):
        return own
    if isinstance(posterior, Independent):
        return moving_support(posterior.base_dist)
    if isinstance(posterior, TransformedDistribution) and (moving_support(posterior.base_dist) or _moved(posterior)):
        return True
    return any(_carries_gradient(bound) for bound in _bounds(_support(posterior)))


def has_ends(posterior: Any) -> bool:
    """Whether the values that h can take have ends, which parameters could move: False is sure."""
    return any(isinstance(q, TransformedDistribution) or _bounds(_support(q)) for q in _chain(posterior))


def _moved(posterior: TransformedDistribution) -> bool:
    """Whether an affine transform with parameters moves an end of what it is applied to."""
    support: Any = _support(posterior.base_dist)
    for transform in posterior.transforms:
        ends = _bounds(support)
        if isinstance(transform, AffineTransform):
            if ends and _carries_gradient(transform.loc):
                return True
            if _carries_gradient(transform.scale) and any(map(_is_stretched, ends)):
                return True
        else:
            support = transform.codomain
    return False


def _bounds(support: Any) -> list[Any]:
    """The ends of what a constraint allows: none of the whole line."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return [getattr(support, name) for name in ("lower_bound", "upper_bound") if hasattr(support, name)]


def _is_stretched(end: Any) -> bool:
    """Whether a scale moves this end: zero and infinity stay where they are."""
    end = torch.as_tensor(end)
    return not may_synchronise(end) or bool((end.isfinite() & (end != 0)).any())


def _carries_gradient(end: Any) -> bool:
    """Whether it is a tensor with a gradient; an end at infinity has none to give."""
    if not (isinstance(end, Tensor) and end.requires_grad):
        return False
    return not may_synchronise(end) or bool(end.isfinite().any())


def caches(posterior: Any) -> bool:
    """Whether it knows log q of its latest samples: at others, slices and copies among them, a flow inverts itself."""
    if isinstance(own := getattr(posterior, "caches", None), bool):
        return own
    return any(
        getattr(t, "_cache_size", 0) for q in _chain(posterior) for t in _with_parts(getattr(q, "transforms", ()))
    )


def without_inverse(posterior: Any) -> Any:
    """A transform of q that has no inverse, so that it knows log q of its latest samples alone, or None."""
    for q in _chain(posterior):
        if getattr(type(q), "log_prob", None) is TransformedDistribution.log_prob:  # no density of its own
            for transform in _with_parts(q.transforms):
                if all(getattr(type(transform), name, None) is getattr(Transform, name) for name in _INVERSES):
                    return transform
    return None


def ignores_h(posterior: Any, h: Latent) -> bool:
    """Whether log_prob(h) is the same for k samples h in another order, though not for each of them."""
    shifted = pytree.tree_map(lambda part: part.roll(1, 0), h)
    state, found = rng_state(), []
    for given in (h, shifted):
        set_rng_state(state)  # a dropout in q's networks repeats itself
        found.append(posterior.log_prob(given))
    return torch.equal(found[0], found[1]) and not torch.equal(found[0], found[0].roll(1, 0))


def _chain(posterior: Any) -> Iterator[Any]:
    while posterior is not None:
        yield posterior
        posterior = getattr(posterior, "base_dist", None)


def _with_parts(transforms: Iterable[Any]) -> Iterator[Any]:
    """All that a flow is made of, and what these are made of."""
    for transform in transforms:
        yield transform
        base = getattr(transform, "base_transform", None)
        parts = [getattr(transform, "parts", ()), getattr(transform, "transforms", ()), () if base is None else (base,)]
        for more in parts:
            yield from _with_parts(more)


def _support(posterior: Any) -> Any:
    try:
        return getattr(posterior, "support", None)
    except NotImplementedError:  # of torch distributions that know none
        return None


def require_rsample(posterior: Any) -> None:
    """Raise where samples cannot carry a gradient."""
    if not has_rsample(posterior):
        raise ModelError(
            f"a pathwise gradient needs rsample, which {named(posterior, 'without_rsample')} does not have: "
            'use gradient="score" or "vimco"'
        )


def draw(posterior: Any, k: int) -> Latent:
    """k samples for each data point, `(k, batch, ...)`, without a graph.

    By rsample where there is one, so that every estimator sees the same numbers for a seed.
    """
    with torch.no_grad():
        return (posterior.rsample if has_rsample(posterior) else posterior.sample)(torch.Size((k,)))


def detached(h: Latent) -> Latent:
    """The samples without their graph, as other tensors: a flow does not know them for those that it has just made."""
    return pytree.tree_map(Tensor.detach, h)


class Samples:
    """The k samples of a posterior as a stream that can be drawn again, slice by slice, with the same numbers.

    The stream is cut in blocks of a fixed size, so the numbers depend on the seed and k alone, not on how the caller
    slices. Only `replay=True` remembers the generator's state before each block: all are drawn once in advance, so that
    a slice drawn again leaves the generator where the first time did, and a dropout in the model repeats itself too.
    """

    BLOCK = 50

    def __init__(self, posterior: Any, k: int, *, pathwise: bool, replay: bool = False) -> None:
        if not any(has_methods(posterior, name) for name in ("sample", "rsample", "log_prob")):
            raise ModelError(
                f"posterior(x) must be a distribution, such as Independent(Normal(mean, std), 1), got "
                f"{type(posterior).__name__}"
            )
        if pathwise:
            require_rsample(posterior)
        if not (has_methods(posterior, "sample") or has_rsample(posterior)):
            raise ModelError(f"the posterior {type(posterior).__name__} has neither sample nor rsample")
        if not has_methods(posterior, "log_prob"):
            raise ModelError(f"the posterior {type(posterior).__name__} has no log_prob(h), for log q(h | x)")
        self.posterior, self.k, self.pathwise = posterior, k, pathwise
        self.caches = caches(posterior)
        transform = without_inverse(posterior)
        if transform is not None and not transform._cache_size:
            raise ModelError(
                f"{type(transform).__name__} of q has no inverse, without which log q(h | x) is known of its latest "
                "samples alone: make it with cache_size=1"
            )
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
        return self._between(start, stop, self._block)

    def draw_with(self, log_q: Density, start: int = 0, stop: int | None = None) -> tuple[Latent, Tensor | None]:
        """The same samples, and where q caches log q at them, `(stop - start, batch)`, of each block as it is drawn."""
        if not self.caches:
            return self.draw(start, stop), None

        def block(b: int) -> tuple[Latent, Tensor]:
            h = self._block(b)
            return h, log_q(h)

        return self._between(start, stop, block)

    def _between(self, start: int, stop: int | None, block: Callable[[int], Any]) -> Any:
        stop = self.k if stop is None else stop
        first, last = start // self.BLOCK, (stop - 1) // self.BLOCK
        blocks = [block(b) for b in range(first, last + 1)]
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
        if self.pathwise:
            h = self.posterior.rsample(torch.Size((n,)))
        else:
            h = draw(self.posterior, n)
            cast_anew()
        if not isinstance(h, Tensor):
            _require_tensors(h)
        return h


def _require_tensors(h: Any) -> None:
    strange = [type(part).__name__ for part in pytree.tree_leaves(h) if not isinstance(part, Tensor)]
    if strange:
        raise ModelError(f"h must be a tensor, or a tuple, list or dict of tensors, a part of it is {strange[0]}")


def check_differentiable(h: Latent, log_q: Tensor) -> None:
    """Raise where q has parameters that samples do not depend on: their pathwise gradient would be lost."""
    if not (torch.is_grad_enabled() and log_q.requires_grad):
        return
    if not all(part.requires_grad for part in pytree.tree_leaves(h)):
        raise ModelError(
            f"{_lost(h)} carry no gradient, though log q(h | x) has parameters: "
            'a pathwise gradient would be wrong; use gradient="score" or "vimco" (discrete or mixed latents); '
            "a layer to be frozen is left out of the optimiser, with requires_grad as it is; those of a layer without "
            "parameters are marked by mcobjectives.parameterless(h)"
        )


def _lost(h: Latent) -> str:
    """The parts of h without a gradient, by name if they have names."""

    def is_lost(part: Any) -> bool:
        return not all(leaf.requires_grad for leaf in pytree.tree_leaves(part))

    if isinstance(h, dict):
        return f"part(s) {', '.join(repr(name) for name, part in h.items() if is_lost(part))} of h"
    parts = pytree.tree_leaves(h)
    return f"part(s) {[i for i, part in enumerate(parts) if is_lost(part)]} of h ({len(parts)} in all)"


def parameterless(h: Tensor) -> Tensor:
    """Mark h as samples of a layer of q that has no parameters, so that no path through them can be lost.

    Use it in `rsample` of a q that draws one part of h from a fixed distribution and others from distributions with
    parameters. h must be freshly drawn, outside transforms of torch.func.

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
