"""A pair of Pyro programs as a Model."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.context import generators_at, may_synchronise, rng_state, same_state
from mcobjectives.model import ModelError
from mcobjectives.pyro.programs import Layout, Program, Recorder, Site
from mcobjectives.pyro.structure import (
    Kinds,
    Structure,
    check_guide,
    check_matched,
    check_random,
    inspect,
    kinds,
    moving,
)
from mcobjectives.sampling import require_rsample
from mcobjectives.soundness import warn_if_straight_through


class Arguments:
    """Several arguments for a pair of programs, instead of one x: `IWAE(k=5)(model, Arguments(x, y=y))`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


pytree.register_pytree_node(
    Arguments,
    lambda x: ([*x.args, *x.kwargs.values()], (len(x.args), tuple(x.kwargs))),
    lambda parts, context: _arguments(list(parts), *context),
    serialized_type_name="mcobjectives.pyro.Arguments",
)


def _arguments(parts: list[Any], positional: int, names: tuple[str, ...]) -> Arguments:
    return Arguments(*parts[:positional], **dict(zip(names, parts[positional:], strict=True)))


def _types(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Types of all that the programs are given: those that branch on a label that is None have a kind for each."""
    return tuple(type(part).__name__ for part in pytree.tree_leaves((args, kwargs)))


def _as_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x.args, x.kwargs) if isinstance(x, Arguments) else ((x,), {})


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


class PyroModel(torch.nn.Module):
    """A pair of Pyro programs as a Model: `IWAE(k=50)(PyroModel(model, guide), x)`.

    The programs are called as `model(x)` and `guide(x)`, or with the contents of `Arguments(...)` if x is one. The loss
    is minus the mean over the data plate (over its subsample, unscaled). One guide execution draws all samples, and
    computes what depends only on x once, on batch rows. Some guides are executed again when a density is needed at
    other samples: those whose sites depend on one another, and those that leave the model samples beside the sites.

    Args:
        model: a Pyro program that observes data with `obs` or `pyro.factor`.
        guide: a Pyro program with the model's latent sites: a function, `PyroModule` or autoguide.
        max_plate_nesting: the number of dimensions that belong to plates; by default a first run finds it.
        weights: "auto" gives one weight to each element of the plate that holds all sites, or one to the whole data set
            if no latent is in a plate, and refuses other programs. "joint" gives the whole data set one weight.
        scaled: multiply each site's log-density by its scale, inside the weights. This is right only for VAE.

    Raises:
        ModelError: if the program cannot be weighted; the message has the reason and what to change.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from mcobjectives import IWAE
        >>> from mcobjectives.pyro import PyroModel
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior, so that every sample has the same weight
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> IWAE(k=5).bound(PyroModel(model, guide), torch.tensor([0.0, 2.0]))  # log N(x; 0, sqrt 2)
        tensor([-1.2655, -2.2655])
    """

    scale: float | Tensor = 1.0
    """The scale that all sites had in the latest evaluation, not in the weights: a number, `()` or `(batch,)`."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        max_plate_nesting: int | None = None,
        weights: Literal["auto", "joint"] = "auto",
        scaled: bool = False,
    ) -> None:
        super().__init__()
        if weights not in ("auto", "joint"):
            raise ValueError(f'weights must be "auto" or "joint", got {weights!r}')
        self.model, self.guide = model, guide
        self.max_plate_nesting, self.weights, self.scaled = max_plate_nesting, weights, scaled
        self._structure: Structure | None = None
        self._kinds: dict[tuple[str, ...], Kinds] = {}  # the guide's latest, by the types of its arguments
        self._constant: set[tuple[str, ...]] = set()  # sites that do not depend on samples, with such arguments
        self._independent = True  # until a run of the programs shows otherwise

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"scale": 1.0}  # a copy has had no evaluation, whose graph could not be copied

    def posterior(self, x: Any) -> GuidePosterior:
        """The guide at x, its sites on `(k, batch)`."""
        if torch._C._get_tracing_state() is not None:
            raise NotImplementedError("torch.jit.trace would freeze the weights of an objective: call it eagerly")
        args, kwargs = _as_arguments(x)
        self.scale = 1.0  # until densities are asked for
        return GuidePosterior(self, args, kwargs, self._layout(args, kwargs))

    def log_joint(self, x: Any, h: Any) -> Tensor:
        """log p(x, h), `(k, batch)`, minus the log-density of the guide's `Delta` sites, if it has any."""
        return self._density(self._sites(x, h), likelihood=True, prior=True)

    def log_likelihood(self, x: Any, h: Any) -> Tensor:
        """The observed sites' part of log p(x, h), including factors, `(k, batch)`."""
        return self._density(self._sites(x, h), likelihood=True, prior=False)

    def log_prior(self, h: Sites) -> Tensor:
        """The latent sites' part of log p(x, h), `(k, batch)`, for samples drawn from `posterior(x)`."""
        if not isinstance(h, Sites):
            raise ModelError("log_prior needs samples that posterior(x) has drawn: a program's prior may depend on x")
        return self._density(h, likelihood=False, prior=True)

    def structure(self, x: Any) -> Structure:
        """The programs' plates, found by plain runs at the first x and cached."""
        if self._structure is None:
            args, kwargs = _as_arguments(x)
            self._structure = inspect(self.model, self.guide, args, kwargs)
            self._kinds[_types(args, kwargs)] = self._structure.kinds
            self._independent = not self._structure.beside
        return self._structure

    def sites(self, h: Sites) -> dict[str, Tensor]:
        """The latent sites of the model at samples h, each `(k, batch, ...)`, `Delta` sites included."""
        layout = h.posterior.layout
        return {
            name: layout.to_latent(site.value) for name, site in h.posterior.evaluate(h).items() if not site.observed
        }

    def _layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        structure = self.structure(Arguments(*args, **kwargs))
        if structure.refusal and self.weights == "auto":
            raise ModelError(structure.refusal)
        nesting = structure.nesting if self.max_plate_nesting is None else self.max_plate_nesting
        if nesting < structure.nesting:
            raise ModelError(f"max_plate_nesting must be at least {structure.nesting} here, got {nesting}")
        joint = self.weights == "joint"
        return Layout(nesting, None if joint else structure.plate, joint)

    def _sites(self, x: Any, h: Any) -> Sites:
        if not isinstance(h, Sites):
            return Sites(h, self.posterior(x))
        args, kwargs = _as_arguments(x)
        if x is None or h.posterior.same_data(args, kwargs):
            return h  # which know their x
        return Sites(dict(h), GuidePosterior(self, args, kwargs, self._layout(args, kwargs), h.posterior.drawn_data))

    def _density(self, h: Sites, *, likelihood: bool, prior: bool) -> Tensor:
        layout, k = h.posterior.layout, h.k
        q = h.posterior.evaluate(h)
        p = self._run(h, q, (torch.is_grad_enabled(), likelihood)) if likelihood != prior else self._execute(h, q)
        if not self.scaled:
            scale = layout.scale([*q.values(), *p.values()])
            if torch.is_grad_enabled() or not getattr(self.scale, "requires_grad", False):
                self.scale = scale  # else it is the same with a graph: a loss has passes without one too
        shared: list[str] = []
        own = (site for site in p.values() if (likelihood if site.observed else prior))
        total = layout.sum(own, k, self.scaled, shared)
        change = layout.sum((site for site in q.values() if not site.free), k, self.scaled, shared) if prior else None
        self._check_shared(h, {(*h.posterior.types, name) for name in shared} - self._constant)
        if total is None:  # no observed site, or no latent one
            total = torch.zeros_like(h.posterior.log_prob(h))
        return total if change is None else total - change

    def _check_shared(self, h: Sites, unknown: set[tuple[str, ...]]) -> None:
        """Raise where a log-density is one for all samples though it depends on them: each weight needs its own."""
        if not unknown or not all(map(may_synchronise, h.values())):
            return
        q, k = h.posterior.evaluate(h), h.k
        of_guide = any(q[name].observed for *_, name in unknown if name in q)

        def at(rows: list[int]) -> list[Tensor]:
            here = {n: s if s.observed else s._replace(value=s.value[rows]) for n, s in q.items()}
            with torch.no_grad(), generators_at():
                if of_guide:  # no more than needed, since a guide may have a dropout
                    here = h.posterior.record(k, given={n: s.value for n, s in here.items()}, draw=False)
                sites = {**here, **self._execute(h, here)}
            return [sites[name].log_prob() for *_, name in unknown]

        runs = at([*range(k)]), at([*range(k)]), at([0] * k), at([-1] * k)
        for (*_, name), both, again, first, last in zip(unknown, *runs, strict=True):
            alone = torch.equal(both, first) and torch.equal(both, last)
            if torch.equal(both, again) and not alone:  # a model with a counter is another at each run
                raise ModelError(
                    f"the log-density at site {name!r} is one for all {k} samples, though it depends on them: count "
                    "dimensions from the right, .sum(-1) and z[..., 0], as those of the samples come first"
                )
        if not all(torch.equal(part[0], part[-1]) for part in h.values()):  # else they tell nothing
            self._constant |= unknown

    def _run(self, h: Sites, q: Trace, part: tuple[bool, bool]) -> Trace:
        """The model's execution at h, kept for the other part of log p where the two are asked for one by one.

        Kept once only: by the time of a third question parameters may have changed.
        """
        kept, h._other_part = h._other_part, None
        if kept is not None and kept[0] == part:
            return kept[1]
        trace = self._execute(h, q)
        h._other_part = (part[0], not part[1]), trace
        return trace

    def _execute(self, h: Sites, q: Trace) -> Trace:
        posterior = h.posterior
        given = {name: site.value for name, site in q.items() if not site.observed}
        run = Recorder(h.k, posterior.layout.nesting, posterior.subsamples, given=given, draw=False)
        trace = run.run(self.model, posterior.args, posterior.kwargs)
        posterior.note(run)
        check_matched(q, trace)  # programs may branch on their arguments
        return trace


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
        self.types = _types(args, kwargs)
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
