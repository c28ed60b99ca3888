"""What a pair of programs looks like, from plain runs of both: its plates, and whether it can be weighted at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from mcobjectives.context import generators_at, rng_state
from mcobjectives.model import ModelError
from mcobjectives.pyro.programs import Program, Recorder, Site, check_declared, common_plates, is_factor
from mcobjectives.sampling import caches, has_ends, is_discrete, moving_support

_TRIES = 20


class Kinds(NamedTuple):
    """Names of a guide's random sites by what matters to a gradient, and whether any caches its densities.

    `has_ends` is whether any has a support that could move.
    """

    without_rsample: tuple[str, ...]
    discrete: tuple[str, ...]
    caches: bool
    has_ends: bool


@dataclass(frozen=True)
class Structure:
    """Plate dimensions, the data plate (name, dim) if there is one, and why there is none where it matters."""

    nesting: int
    plate: tuple[str, int] | None
    refusal: str | None
    kinds: Kinds
    beside: bool  # whether the model reads what the guide has left beside its sites, in an attribute say


def inspect(model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Structure:
    """Run both programs plainly, leaving the random number generator as it was."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ModelError(f"{type(poutine.unwrap(guide)).__name__} runs inside the model: a guide must be a program")
    with generators_at(), poutine.block():
        guide_run = Recorder(None, 0, {})
        q = guide_run.run(guide, args, kwargs)
        check_guide(q)
        given, state = {name: site.value for name, site in q.items()}, rng_state()

        def at_given() -> dict[str, Site]:
            with generators_at(state):
                return Recorder(None, 0, guide_run.subsamples, given=given, draw=False).run(model, args, kwargs)

        p, again = at_given(), at_given()
        check_matched(q, p)
        check_random(q)
        sites = [*q.values(), *p.values()]
        for site in sites:
            check_declared(site, site.log_prob().shape)
        # A model with a counter, or with spectral norm, is another at each run, whatever the guide has left.
        beside = not _differ(p, again) and _others_drawn(guide, args, kwargs, guide_run) and _differ(again, at_given())
    plates = common_plates(sites)
    local = any(site.plates for site in sites if not site.observed)
    return Structure(
        nesting=-min((dim for site in sites for _, dim in site.plates if dim is not None), default=0),
        plate=plates[0] if plates else None,
        refusal=None if plates or not local else _refusal(q, p),
        kinds=kinds(q),
        beside=beside,
    )


def _others_drawn(guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any], first: Recorder) -> bool:
    """Run the guide until each of its random sites has other samples than at first; False if that never is."""

    def differ(site: Site) -> bool:
        return site.name not in first.sites or not torch.equal(site.value, first.sites[site.name].value)

    runs = (Recorder(None, 0, first.subsamples).run(guide, args, kwargs) for _ in range(_TRIES))
    return any(all(differ(site) for site in sites.values() if site.free) for sites in runs)


def _differ(p: dict[str, Site], again: dict[str, Site]) -> bool:
    """Whether two runs of a model at the same samples give other densities."""
    return any(name not in again or not torch.equal(s.log_prob(), again[name].log_prob()) for name, s in p.items())


def kinds(q: dict[str, Site]) -> Kinds:
    free = [site for site in q.values() if site.free]
    return Kinds(
        without_rsample=tuple(site.name for site in free if not site.fn.has_rsample),
        discrete=tuple(site.name for site in free if is_discrete(site.fn)),
        caches=any(caches(site.fn) for site in free),
        has_ends=any(has_ends(site.fn) for site in free),
    )


def moving(q: dict[str, Site]) -> tuple[str, ...]:
    """The random sites of a guide whose support carries a gradient."""
    return tuple(site.name for site in q.values() if site.free and moving_support(site.fn))


def check_guide(q: dict[str, Site]) -> None:
    """Raise where the guide observes something."""
    for site in q.values():
        if site.observed and not (is_factor(site) and getattr(site.fn, "has_rsample", False) is True):
            raise ModelError(
                f"site {site.name!r} of the guide is observed: a guide may hold latent sites, and pyro.factor with "
                "has_rsample=True where the factor is a function of them"
            )


def check_random(q: dict[str, Site]) -> None:
    """Raise where the guide has no random site."""
    if not any(site.free for site in q.values()):
        raise ModelError("the guide draws no random site, so there is nothing to weight: use pyro.infer.Trace_ELBO")


def check_matched(q: dict[str, Site], p: dict[str, Site]) -> None:
    """Raise where the guide draws what is not a latent site of the model."""
    matched = {name for name, site in q.items() if site.observed or (name in p and not p[name].observed)}
    changes = any(not q[name].free for name in matched)
    for name, site in q.items():
        if name in matched:
            continue
        if not site.auxiliary:
            raise ModelError(
                f"site {name!r} of the guide is not a latent site of the model, and would make the weights wrong; "
                'if a Delta site depends on it, mark it by infer={"is_auxiliary": True}'
            )
        if site.free and not changes:
            raise ModelError(
                f"auxiliary site {name!r} of the guide would make the weights wrong, as no Delta site of the model "
                "and no factor can depend on it: leave it out of the guide"
            )


def _refusal(q: dict[str, Site], p: dict[str, Site]) -> str:
    stacks: dict[str, list[tuple[tuple[str, int | None], ...]]] = {}
    for site in [*q.values(), *p.values()]:
        if site.plates not in stacks.setdefault(site.name, []):
            stacks[site.name].append(site.plates)
    places = {n: [" > ".join(plate for plate, _ in s) or "no plate" for s in own] for n, own in stacks.items()}
    both = "{} in the guide, {} in the model"
    shown = "; ".join(f"{n}: {both.format(*at) if len(at) > 1 else at[0]}" for n, at in [*places.items()][:8])
    differ = any(len(at) > 1 for at in places.values())
    return (
        f"there is no weight for each data point: no vectorised plate holds every site ({shown}). "
        + ("A plate is the same in both programs if its name and dim are. " if differ else "")
        + 'Ask for one weight for the whole data set by weights="joint", or use ObjectiveELBO(VAE()), which needs none'
    )
