"""A pair of Pyro programs as a Model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.context import may_synchronise
from mcobjectives.model import ModelError, without_trace
from mcobjectives.pyro.guide import GuidePosterior, Sites, Trace, types_of
from mcobjectives.pyro.programs import Layout, Program, Recorder
from mcobjectives.pyro.structure import Kinds, Structure, check_matched, inspect


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


def _as_arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x.args, x.kwargs) if isinstance(x, Arguments) else ((x,), {})


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
            self._kinds[types_of(args, kwargs)] = self._structure.kinds
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
            with without_trace(self):
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
