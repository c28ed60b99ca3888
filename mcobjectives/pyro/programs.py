"""One execution of a Pyro program with n samples side by side, and where its dimensions go in log-weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from mcobjectives.context import generators_at
from mcobjectives.model import ModelError
from mcobjectives.sampling import parameterless

Program = Callable[..., Any]


class Site(NamedTuple):
    """A sample site of one execution; `value` is `(n, plates..., event...)`."""

    name: str
    fn: Any
    value: Tensor
    scale: float | Tensor
    mask: bool | Tensor | None
    plates: tuple[tuple[str, int | None], ...]  # (name, dim) of the plates around it, outermost first
    sizes: tuple[int, ...]  # of these plates, or of their subsamples
    observed: bool
    auxiliary: bool
    delta: bool

    @property
    def free(self) -> bool:
        """Whether it is random: neither observed nor a function of other sites."""
        return not (self.observed or self.delta)

    def log_prob(self, scaled: bool = False) -> Tensor:
        """Log-density, masked, over the plates (and samples, where it depends on them)."""
        try:
            log_p = self.fn.log_prob(self.value)
        except (KeyError, NotImplementedError) as error:  # what transforms without an inverse raise
            raise ModelError(
                f"the density at site {self.name!r} cannot be evaluated ({error}): a flow without an inverse knows "
                'that of its latest samples alone; use gradient="reparam" without backward_samples'
            ) from error
        if self.mask is None and not scaled:
            return log_p
        return scale_and_mask(log_p, self.scale if scaled else 1.0, self.mask)

    def depends_on_samples(self, nesting: int) -> bool:
        shapes = [self.fn.batch_shape, *(t.shape for t in (self.mask, self.scale) if isinstance(t, Tensor))]
        return any(len(shape) > nesting for shape in shapes)


def is_delta(fn: Any) -> bool:
    while not isinstance(fn, Delta) and hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


class Recorder(Messenger):
    """Runs a program and keeps its sample sites.

    Args:
        n: how many samples side by side, on the dimension left of `nesting` plate dimensions; None for a plain run.
        given: values of latent sites. The others are drawn if `draw`, and refused if not.
        subsamples: indices of subsampling plates by name; what is missing is drawn and added.
        preview: do not advance the random number generator for the draws of sites.
        detach: cut the draws of random sites off, so that only parameters carry a gradient.
        redrawn: plates whose known indices are drawn all the same and thrown away, for the numbers that they took.
    """

    def __init__(
        self,
        n: int | None,
        nesting: int,
        subsamples: dict[str, Any],
        *,
        given: Mapping[str, Tensor] | None = None,
        draw: bool = True,
        preview: bool = False,
        detach: bool = False,
        redrawn: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.n, self.nesting, self.subsamples = n, nesting, subsamples
        self.given, self.draw, self.preview, self.detach = given or {}, draw, preview, detach
        self.redrawn = frozenset(redrawn)
        self.sites: dict[str, Site] = {}
        self.subsampled: set[str] = set()  # the plates of which a part was drawn in this run

    def run(self, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Site]:
        """The sites of one execution that carry a density, by name."""
        with self:
            program(*args, **kwargs)
        return self.sites

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if name in self.subsamples:
                if name in self.redrawn:
                    fn()
                msg["value"], msg["done"] = self.subsamples[name], True
                index = torch.as_tensor(self.subsamples[name])
                if fn.subsample_size != fn.size and index.numel() and int(index.max()) >= fn.size:
                    raise ModelError(
                        f"the samples are of data point {int(index.max())} of plate {name!r}, which has {fn.size}: "
                        "draw them at this x"
                    )
            elif msg["value"] is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
                self.subsampled.add(name)
            return
        deep = [f.name for f in msg["cond_indep_stack"] if f.dim is not None and -f.dim > self.nesting]
        if self.n is not None and deep and not msg["infer"].get("_deterministic"):
            raise ModelError(f"plate {deep[0]!r} at site {name!r} lies left of max_plate_nesting = {self.nesting}")
        if msg["is_observed"]:
            return
        if not isinstance(fn, TorchDistributionMixin) or msg["args"] or msg["kwargs"]:
            raise ModelError(f"site {name!r} samples {fn!r}, which is not a plain Pyro distribution")
        if name in self.given:
            msg["value"] = self.given[name]
        elif self.draw and msg["infer"].get("enumerate"):
            raise ModelError(_enumerated(name, "guide"))
        elif self.draw or is_delta(fn):
            msg["value"] = self._draw(name, fn)
        else:
            raise ModelError(_missing(name, msg["infer"]))
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            self.subsamples[name] = msg["value"]
            return
        if name in self.sites:
            raise ModelError(f"the program has two sample sites named {name!r}")
        if msg["mask"] is False or msg["infer"].get("_deterministic"):
            if not msg["is_observed"]:
                raise ModelError(f"latent site {name!r} is masked as a whole: leave it out of the program")
            return
        frames = msg["cond_indep_stack"]
        self.sites[name] = Site(
            name,
            msg["fn"],
            msg["value"],
            msg["scale"],
            msg["mask"],
            tuple((frame.name, frame.dim) for frame in frames),
            tuple(frame.size for frame in frames),
            msg["is_observed"],
            bool(msg["infer"].get("is_auxiliary")),
            not msg["is_observed"] and is_delta(msg["fn"]),
        )

    def _draw(self, name: str, fn: Any) -> Tensor:
        with generators_at() if self.preview else nullcontext():
            value = self._samples(name, fn)
        if self.detach and not is_delta(fn):
            return value.detach()
        if torch.is_grad_enabled() and fn.has_rsample and not value.requires_grad and not is_delta(fn):
            parameterless(value)  # nothing is lost
        return value

    def _samples(self, name: str, fn: Any) -> Tensor:
        if self.n is None:
            return fn()
        batch = fn.batch_shape
        if len(batch) <= self.nesting:  # it does not depend on other samples: its parameters stay on batch rows
            return fn(torch.Size((self.n,) + (1,) * (self.nesting - len(batch))))
        if len(batch) > self.nesting + 1 or batch[0] not in (1, self.n):
            raise ModelError(
                f"site {name!r} has batch shape {tuple(batch)}, expected at most {self.nesting} plate dimensions "
                f"right of {self.n} samples: declare its dimensions by pyro.plate or .to_event"
            )
        return (fn if batch[0] == self.n else fn.expand((self.n, *batch[1:])))()


def _missing(name: str, infer: Any) -> str:
    if infer.get("enumerate"):
        return _enumerated(name, "model")
    return f"latent site {name!r} of the model is not in the guide: sample it there"


def _enumerated(name: str, program: str) -> str:
    return (
        f"site {name!r} of the {program} asks for enumeration, which importance weights do not do: sample it in the "
        'guide without infer={"enumerate": ...} (gradient="vimco"), or use pyro.infer.TraceEnum_ELBO'
    )


def common_plates(sites: Iterable[Site]) -> list[tuple[str, int]]:
    """The vectorised plates that hold all the sites, outermost first."""
    stacks = [[(name, dim) for name, dim in site.plates if dim is not None] for site in sites]
    return [plate for plate in stacks[0] if all(plate in stack for stack in stacks[1:])]


@dataclass(frozen=True)
class Layout:
    """Where (k, batch) lie among a program's dimensions `(k, plates..., event...)`.

    `plate` is the data plate (name, dim) whose dimension is the batch; None for one weight for the whole data set,
    which is right where no latent is in a plate, or if it is asked for: `joint`.
    """

    nesting: int
    plate: tuple[str, int] | None
    joint: bool

    @property
    def axis(self) -> int | None:
        return None if self.plate is None else self.nesting + 1 + self.plate[1]

    def to_latent(self, value: Tensor) -> Tensor:
        """`(k, plates..., event...) -> (k, batch, other plates..., event...)`."""
        return value.unsqueeze(1) if self.axis is None else value.movedim(self.axis, 1)

    def to_site(self, part: Tensor) -> Tensor:
        """The inverse of `to_latent`."""
        return part.squeeze(1) if self.axis is None else part.movedim(1, self.axis)

    def sum(
        self, sites: Iterable[Site], k: int, scaled: bool = False, shared: list[str] | None = None
    ) -> Tensor | None:
        """The sites' log-densities, `(k, batch)`; None where there are no sites.

        `shared` takes the names of those that have one log-density for all samples.
        """
        others = [i for i in range(1, self.nesting + 1) if i != self.axis]
        total: Tensor | None = None
        for site in sites:
            log_p = self._padded(site.log_prob(scaled))
            self._check(site, log_p, k)
            if shared is not None and log_p.shape[0] < k:
                shared.append(site.name)
            if others:
                log_p = log_p.sum(others)
            if self.axis is None:
                log_p = log_p.unsqueeze(1)
            total = log_p if total is None else total + log_p
        return total if total is None or total.shape[0] == k else total.expand(k, -1)

    def scale(self, sites: Iterable[Site]) -> float | Tensor:
        """The one scale of all the sites: a number, `()`, or `(batch,)`. `ModelError` where they differ."""
        first: Site | None = None
        scale: float | Tensor = 1.0
        for site in sites:
            own = self._scale(site)
            if first is None:
                first, scale = site, own
            elif not _equal(scale, own):
                raise ModelError(
                    f"sites {first.name!r} and {site.name!r} have different scales ({_show(scale)} and {_show(own)}), "
                    "and a scale has its place outside the logarithm, once for all that shares a weight. Subsampling "
                    "beside a global latent: use the whole data, or VAE; tempering: use kl_weight; for VAE alone, "
                    "PyroModel(..., scaled=True) scales inside"
                )
        return scale

    def _padded(self, value: Tensor) -> Tensor:
        missing = self.nesting + 1 - value.dim()
        return value.reshape((1,) * missing + value.shape) if missing > 0 else value

    def _scale(self, site: Site) -> float | Tensor:
        if not isinstance(site.scale, Tensor):
            return float(site.scale)
        scale = self._padded(site.scale)
        if scale.numel() == 1:
            return scale.reshape(()) if _has_gradient(scale) else float(scale)
        if self.axis is None or scale.numel() != scale.shape[self.axis]:
            raise ModelError(f"the scale of site {site.name!r}, {tuple(site.scale.shape)}, varies within one weight")
        return scale.reshape(-1)

    def _check(self, site: Site, log_p: Tensor, k: int) -> None:
        if self.plate is not None and self.plate not in site.plates:
            raise ModelError(f"site {site.name!r} is not in the plate {self.plate[0]!r}, as it was at first")
        if self.plate is None and not self.joint and site.plates and not site.observed:
            raise ModelError(
                f"latent site {site.name!r} is in the plate {site.plates[0][0]!r}, and at first no latent was in one: "
                'ask for one weight for the whole data set by weights="joint", or make a PyroModel for each kind of x'
            )
        if log_p.dim() > self.nesting + 1 or log_p.shape[0] not in (1, k):
            raise ModelError(
                f"the log-density at site {site.name!r} is {tuple(log_p.shape)}, expected {k} samples and then "
                f"{self.nesting} plate dimensions: let its parameters broadcast over leading dimensions"
            )
        check_declared(site, log_p.shape[1:])


def check_declared(site: Site, shape: torch.Size) -> None:
    """Raise unless each dimension of a log-density (counted from the right) is a plate's, and of its size."""
    declared = {dim: (name, size) for (name, dim), size in zip(site.plates, site.sizes, strict=True)}
    for i, size in enumerate(reversed(shape), 1):
        if size == 1:
            continue
        if -i not in declared:
            raise ModelError(
                f"dimension {-i} of size {size} at site {site.name!r} is in no plate: "
                "enclose it in pyro.plate, or use .to_event on the distribution"
            )
        plate, expected = declared[-i]
        if expected not in (-1, size):  # -1 is a plate's that was given none
            raise ModelError(
                f"dimension {-i} at site {site.name!r} has size {size}, and its plate {plate!r} has {expected}: "
                "give the site the plate's part of the data, x[i] in `with plate as i`"
            )


def is_factor(site: Site) -> bool:
    return isinstance(site.fn, Unit)


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) and _has_gradient(a) == _has_gradient(b)
    return not (isinstance(a, Tensor) or isinstance(b, Tensor)) and math.isclose(a, b, rel_tol=1e-9)


def _has_gradient(scale: Tensor) -> bool:
    return scale.requires_grad and torch.is_grad_enabled()


def _show(scale: float | Tensor) -> str:
    if not isinstance(scale, Tensor):
        return f"{scale:g}"
    shown = f"{float(scale):g}" if scale.dim() == 0 else "one for each data point"
    return f"{shown} with a gradient" if _has_gradient(scale) else shown
