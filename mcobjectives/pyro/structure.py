"""What a pair of programs looks like, from one plain run of each: its plates, and whether it can be weighted at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyro import poutine
from pyro.poutine.messenger import Messenger

from mcobjectives.model import ModelError, rng_state, set_rng_state
from mcobjectives.pyro.programs import Recorder, Site, check_declared, common_plates, is_factor


@dataclass(frozen=True)
class Structure:
    """Plate dimensions, the data plate (name, dim) if there is one, and why there is none where it matters."""

    nesting: int
    plate: tuple[str, int] | None
    refusal: str | None
    reparameterised: bool
    subsampled: bool


def inspect(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Structure:
    """Run both programs once, leaving the random number generator as it was."""
    if isinstance(poutine.unwrap(guide), Messenger):
        raise ModelError(f"{type(poutine.unwrap(guide)).__name__} runs inside the model: a guide must be a program")
    state = rng_state()
    try:
        with poutine.block():
            guide_run = Recorder(None, 0, {})
            q = guide_run.run(guide, args, kwargs)
            _check_guide(guide_run)
            given = {name: site.value for name, site in q.items()}
            p = Recorder(None, 0, guide_run.subsamples, given=given, draw=False).run(model, args, kwargs)
    finally:
        set_rng_state(state)
    latent = [name for name, site in p.items() if not site.observed]
    for site in q.values():
        if not (site.observed or site.auxiliary or site.name in latent):
            raise ModelError(
                f"site {site.name!r} of the guide is not a latent site of the model, and would make the weights wrong; "
                'if a Delta site depends on it, mark it by infer={"is_auxiliary": True}'
            )
    free = [site for site in q.values() if site.free]
    if not free:
        raise ModelError("the guide draws no random site, so there is nothing to weight: use pyro.infer.Trace_ELBO")
    sites = [*q.values(), *p.values()]
    for site in sites:
        check_declared(site, site.log_prob().shape)
    plates = common_plates(sites)
    local = any(site.plates for site in sites if not site.observed)
    return Structure(
        nesting=-min((dim for site in sites for _, dim in site.plates if dim is not None), default=0),
        plate=plates[0] if plates else None,
        refusal=None if plates or not local else _refusal(q, p),
        reparameterised=all(site.fn.has_rsample for site in free),
        subsampled=guide_run.subsampled,
    )


def _check_guide(run: Recorder) -> None:
    for site in run.sites.values():
        if site.observed and not (is_factor(site) and getattr(site.fn, "has_rsample", False) is True):
            raise ModelError(
                f"site {site.name!r} of the guide is observed: a guide may hold latent sites, and pyro.factor with "
                "has_rsample=True where the factor is a function of them"
            )


def _refusal(q: dict[str, Site], p: dict[str, Site]) -> str:
    places: dict[str, list[str]] = {}
    for sites in (q, p):
        for name, site in sites.items():
            place = " > ".join(plate for plate, _ in site.plates) or "no plate"
            if place not in places.setdefault(name, []):
                places[name].append(place)
    shown = "; ".join(f"{name}: {' in the guide, '.join(place)}" for name, place in list(places.items())[:8])
    return (
        f"there is no weight for each data point: no vectorised plate holds every site ({shown}). Ask for one weight "
        'for the whole data set by weights="joint", or use ObjectiveELBO(VAE()), which needs none'
    )
