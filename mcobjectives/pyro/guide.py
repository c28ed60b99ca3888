"""A guide at one x as a posterior, and the samples that it draws."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.context import rng_state, same_state
from mcobjectives.model import ModelError
from mcobjectives.pyro.programs import Layout, Recorder, Site
from mcobjectives.pyro.structure import check_guide, check_random, kinds, moving
from mcobjectives.sampling import require_rsample
from mcobjectives.soundness import warn_if_straight_through

if TYPE_CHECKING:
    from mcobjectives.pyro.model import PyroModel


class Sites(dict[str, Tensor]):
    """The guide's random sites by name, each `(k, batch, other plates..., event...)`, and the posterior they come from.

    `trace` holds the guide's execution at exactly these tensors, if it is known. Copies, slices and detached samples
    have none.
    """

    def __init__(self, parts: dict[str, Tensor], posterior: GuidePosterior, trace: Trace | None = None) -> None:
        super().__init__(parts)
        self.posterior, self._traces = posterior, {} if trace is None else {torch.is_grad_enabled(): trace}
        self._other_part: tuple[tuple[bool, bool], Trace] | None = None

    @property
    def trace(self) -> Trace | None:
        # One that was recorded without a graph is of no use where gradients are wanted.
        return self._traces.get(True) or (None if torch.is_grad_enabled() else self._traces.get(False))

    @trace.setter
    def trace(self, trace: Trace) -> None:
        self._traces[torch.is_grad_enabled()] = trace

    @property
    def k(self) -> int:
        return next(iter(self.values())).shape[0]


Trace = dict[str, Site]

pytree.register_pytree_node(
    Sites,
    lambda h: (list(h.values()), (tuple(h), h.posterior)),
    lambda parts, context: Sites(dict(zip(context[0], parts, strict=True)), context[1]),
    serialized_type_name="mcobjectives.pyro.Sites",
)


class GuidePosterior:
    """A guide at one x: `rsample`, `sample` and `log_prob` of its random sites, in a dict of `(k, batch, ...)`."""

    def __init__(
        self,
        owner: PyroModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layout: Layout,
        subsamples: dict[str, Any] | None = None,
    ) -> None:
        self.owner, self.args, self.kwargs, self.layout = owner, args, kwargs, layout
        self.subsamples: dict[str, Any] = dict(subsamples or {})
        self._drawn = set(self.subsamples)
        self._redrawn: set[str] = set()
        self.types = types_of(args, kwargs)
        # Distributions that do not depend on other sites' samples are kept: no further execution is needed.
        self._kept: Trace | None = None
        if owner._independent:
            self._kept = self._independent()
            owner._independent = self._kept is not None
        # What the sites are: until an execution here shows it, what they were at the latest such arguments.
        self._shown = self._surprised = False
        if self._kept is not None:
            self._show(self._kept)
        elif self.types in owner._kinds:
            self._kinds = owner._kinds[self.types]
        else:
            self._preview()

    @property
    def has_rsample(self) -> bool:
        """Whether samples can carry a gradient."""
        return not self._has("without_rsample")

    @property
    def is_discrete(self) -> bool:
        """Whether a random site takes discrete values."""
        return self._has("discrete")

    @property
    def caches(self) -> bool:
        """Whether a random site knows the density of its latest samples."""
        return self._kinds.caches

    @property
    def moving_support(self) -> bool:
        """Whether the support of a random site moves with parameters, and not only with other sites' samples."""
        return bool(self._moving)

    @cached_property
    def _moving(self) -> tuple[str, ...]:
        if self._kept is not None:
            return moving(self._kept)
        if not self._kinds.has_ends:
            return ()
        return moving(self.record(1, preview=True, detach=True))

    def rsample(self, sample_shape: torch.Size) -> Sites:
        """k samples, differentiable if the sites' distributions are: a dict of `(k, batch, ...)`."""
        (k,) = sample_shape
        if self._kept is None:
            known = set(self._drawn)
            trace = self.record(k, redrawn=self._redrawn)
            self._redrawn |= self._drawn - known
            self._check(trace)
        else:
            drawn = Recorder(k, self.layout.nesting, {})
            trace = {n: s if s.observed else s._replace(value=drawn._draw(n, s.fn)) for n, s in self._kept.items()}
        return Sites({n: self.layout.to_latent(s.value) for n, s in trace.items() if s.free}, self, trace)

    def sample(self, sample_shape: torch.Size) -> Sites:
        """k samples without a graph."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, h: Any) -> Tensor:
        """log q(h | x), `(k, batch)`."""
        h = self._own(h)
        total = self.layout.sum((s for s in h.posterior.evaluate(h).values() if s.free), h.k, self.owner.scaled)
        assert total is not None
        return total

    def named_by_sites(self, what: str) -> str:
        """The guide with its sites that are `what`, for messages."""
        names = self._moving if what == "moving_support" else getattr(self._kinds, what)
        return f"the guide of site(s) {', '.join(names)}"

    def _has(self, what: str) -> bool:
        # What would be refused or warned of is made sure of: the guide may have taken another branch since.
        if getattr(self._kinds, what) and not self._shown and torch.is_grad_enabled():
            self._preview()
        return bool(getattr(self._kinds, what))

    def _preview(self) -> None:
        with torch.no_grad():
            self._show(self.record(1, preview=True))

    def _show(self, trace: Trace) -> None:
        self._kinds = self.owner._kinds[self.types] = kinds(trace)
        self._shown = True

    def _check(self, trace: Trace) -> None:
        """Raise or warn where samples show what was not expected when the objective asked."""
        if not self._shown:
            expected = self._kinds
            self._show(trace)
            self._surprised = self._kinds != expected
            if self._surprised and self.__dict__.pop("_moving", None) == ():  # it was asked for, and so it matters
                with torch.enable_grad():
                    moves = self.moving_support
                if moves:
                    raise ModelError(
                        f"this gradient is wrong for {self.named_by_sites('moving_support')}, whose support moves "
                        "with its parameters: use gradient='reparam'"
                    )
        if self._surprised and torch.is_grad_enabled():
            require_rsample(self)
            warn_if_straight_through(self)

    def note(self, run: Recorder) -> None:
        """Remember the subsamples that an execution has drawn, because the samples belong to them."""
        self._drawn |= run.subsampled

    @property
    def drawn_data(self) -> dict[str, Any] | None:
        """The indices of the subsamples that its samples belong to; None if plates are whole."""
        return {name: self.subsamples[name] for name in self._drawn} or None

    def same_data(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether these are the same objects that the guide was called with."""
        theirs: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        ours: dict[Any, Any] = {**dict(enumerate(self.args)), **self.kwargs}
        return ours.keys() == theirs.keys() and all(value is theirs[name] for name, value in ours.items())

    def _own(self, h: Any) -> Sites:
        """h to be evaluated here: samples of another posterior keep its subsample, and none of its densities."""
        if isinstance(h, Sites) and h.posterior is self:
            return h
        posterior = self
        if isinstance(h, Sites) and h.posterior.drawn_data is not None:
            posterior = GuidePosterior(self.owner, self.args, self.kwargs, self.layout, h.posterior.drawn_data)
        return Sites(dict(h), posterior)

    def evaluate(self, h: Sites) -> Trace:
        """The guide's sites at samples h, executed again only where their distributions depend on h."""
        if h.trace is None:
            given = {name: self.layout.to_site(part) for name, part in h.items()}
            if self._kept is not None:
                again = Recorder(h.k, self.layout.nesting, {})
                h.trace = {
                    n: s if s.observed else s._replace(value=given[n] if s.free else again._draw(n, s.fn))
                    for n, s in self._kept.items()
                }
            else:
                before, known = rng_state(), set(self._drawn)
                h.trace = self.record(h.k, given=given, draw=False)
                if self._drawn == known and not same_state(before, rng_state()):
                    raise ModelError(
                        "the guide draws random numbers outside its sample sites (dropout?), so its density cannot be "
                        "evaluated again at its samples, nor for more than 50 of them, which are drawn in blocks: make "
                        "them sites, or switch them off by eval()"
                    )
        assert h.trace is not None
        return h.trace

    def _independent(self) -> Trace | None:
        """The guide's sites, if none depends on another's samples."""
        try:  # two, as at one sample a squeeze, a reshape or a branch hides the dependence
            trace = self.record(2, preview=True)
        except Exception:  # it is written for one sample, or raises again at those that count
            return None
        # A factor is a function of the samples, whatever its shape.
        depend = (site.observed or site.depends_on_samples(self.layout.nesting) for site in trace.values())
        return None if any(depend) else trace

    def record(self, n: int, **options: Any) -> Trace:
        run = Recorder(n, self.layout.nesting, self.subsamples, **options)
        try:
            trace = run.run(self.owner.guide, self.args, self.kwargs)
        finally:
            self.note(run)
        check_guide(trace)
        check_random(trace)
        return trace


def types_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Types of all that the programs are given: those that branch on a label that is None have a kind for each."""
    return tuple(type(part).__name__ for part in pytree.tree_leaves((args, kwargs)))
