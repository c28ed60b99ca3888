"""Objective: a pure function of log-weights and a sample count. All objectives are estimated in the same way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, Field, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from mcobjectives import plugins
from mcobjectives.arguments import require_count, require_number
from mcobjectives.bounds import open_batch
from mcobjectives.context import uncompiled
from mcobjectives.derivatives import curvatures, differentiable_twice, leave_one_out, slopes, slopes_jump, slopes_vary
from mcobjectives.estimators import Weights
from mcobjectives.surrogate import PLAIN, Plan, plan_of

_SEEN: dict[tuple[Any, ...], bool] = {}
_STATED = ("smooth", "linear", "exempt")  # by the class, not by its instances
_DERIVED = ("slopes", "curvatures", "leave_one_out", "linear")


@dataclass(frozen=True, eq=False)  # a subclass with eq=False is then equal to itself alone
class Objective(ABC):
    """A Monte Carlo objective: subclasses are frozen dataclasses with a field `k` and a method `reduce`.

    Everything is in nats. For each data point, `k` samples h_i ~ q(h | x) give the log-weights
    log w_i = log p(x, h_i) - log q(h_i | x), `(k, batch)`. `reduce` maps them to `(batch,)`.

    Args:
        gradient: name of the gradient estimator: "reparam", "stl", "dreg", "score", "vimco", "rws" or a plugin's. You
            can also pass the function (objective, log_weights) -> (a, c, s) itself.
        chunk_size: evaluate this many samples at a time, and again in the backward pass. The gradient is the same, but
            only the graph of one chunk is in memory at a time.
        backward_samples: back-propagate this many of the k samples, chosen without bias by their weights.
        kl_weight: t in log p(x | h) + t (log p(h) - log q(h | x)). In general the result is a bound only for t = 1.

    Raises:
        ValueError: if an argument is outside its range, or the estimator is not valid for this objective.
        ModelError: if the model lacks what the objective needs, or returns something other than `(k, batch)`.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from mcobjectives import Objective
        >>> @dataclass(frozen=True)
        ... class MinWeight(Objective):
        ...     k: int = 8
        ...     def reduce(self, log_w):
        ...         return log_w.amin(0)
        >>> MinWeight(k=2).reduce(torch.tensor([[1.0], [3.0]]))
        tensor([1.])
    """

    _: KW_ONLY
    gradient: str | plugins.Estimator = "reparam"
    chunk_size: int | None = None
    backward_samples: int | None = None
    kl_weight: float = 1.0

    if TYPE_CHECKING:
        k = cast(int, None)  # a field of every subclass, or a property; not one of this class's own

    @abstractmethod
    def reduce(self, log_w: Tensor) -> Tensor:
        """F, the objective of each data point: `(k, batch) -> (batch,)`, in nats."""

    # What an objective may state about itself.

    smooth: ClassVar[bool] = True
    """False if dF/dlog w jumps (a median, a maximum): STL and DReG are then refused."""

    linear: ClassVar[bool] = False
    """True if F is a sum of terms of one log-weight each with constant weights, such as a mean."""

    exempt: ClassVar[frozenset[str]] = frozenset()
    """Properties that it does not have, from `mcobjectives.testing.EXEMPTABLE`; the kit checks this declaration too."""

    analytic_kl = False
    """Whether its expectation replaces log p(h) - log q(h | x)."""

    @property
    def tempering(self) -> float:
        """The weight t on log p(h) - log q(h | x) in the log-weights."""
        return self.kl_weight

    # Derivatives of F: from autograd on `reduce` alone; closed forms may override them, down to the next `reduce`.

    def slopes(self, log_w: Tensor) -> Tensor:
        """g_i = dF/dlog w_i, `(k, batch)`."""
        return slopes(self.reduce, log_w)

    def curvatures(self, log_w: Tensor) -> Tensor:
        """H_ii = d2F/d(log w_i)2, `(k, batch)`."""
        return curvatures(self.reduce, log_w)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        """b_i = F with log w_i replaced by the mean of the other log-weights, `(k, batch)`."""
        return leave_one_out(self.reduce, log_w)

    @cached_property
    def slopes_vary(self) -> bool:
        """Whether the slopes depend on the log-weights, as found by trial: F is then not linear."""
        return self._seen("vary", lambda: slopes_vary(self.slopes, self.k))

    @cached_property
    def slopes_jump(self) -> bool:
        """Whether the slopes jump, as found by trial."""
        return self._seen("jump", lambda: slopes_jump(self.slopes, self.k))

    @cached_property
    def slopes_differentiable(self) -> bool:
        """False if the slopes vary but have no derivative, as in a Function whose backward autograd cannot follow."""
        if type(self).curvatures is not Objective.curvatures:
            return True
        return self._seen("differentiable", lambda: differentiable_twice(self.reduce, self.k)) or not self.slopes_vary

    def _seen(self, what: str, look: Callable[[], bool]) -> bool:
        """Cache `look()` by class and own options: how an objective is estimated does not change its slopes."""
        of_all = {f.name for f in own_fields(self)[1]}
        own = {name: value for name, value in self.__getstate__().items() if name not in of_all}
        if not all(value is None or isinstance(value, (bool, int, float, str)) for value in own.values()):
            return look()  # what a plugin's option holds may change
        key = type(self), what, *sorted(own.items())
        if key not in _SEEN:
            _SEEN[key] = look()
        return _SEEN[key]

    @property
    def weighs_itself(self) -> bool:
        """Whether the class overrides `weights`, and so is its own estimator."""
        return type(self).weights is not Objective.weights

    def weights(self, log_w: Tensor) -> Weights:
        """The estimator's (a, c, s) at these log-weights."""
        return Weights(*self._estimator(self, log_w))

    # The three ways to use an objective on a model.

    def __call__(self, model: Any, x: Any) -> Tensor:
        """The loss: minus the mean bound over the batch, a scalar. Its `backward()` trains p and q."""
        return -self.surrogate(model, x).mean()

    def bound(self, model: Any, x: Any) -> Tensor:
        """The bound for each data point, `(batch,)`, without a graph."""
        with torch.no_grad():
            return self.surrogate(model, x)

    def surrogate(self, model: Any, x: Any) -> Tensor:
        """The bound for each data point, `(batch,)`, with the estimator's gradient."""
        if self.chunk_size is None or not torch.is_grad_enabled():
            return self._surrogate(model, x)
        return uncompiled(self._surrogate)(model, x)

    def bind(self, model: Any) -> BoundObjective:
        """An `nn.Module` whose `forward(x)` is the loss: for torch.compile, DDP, Lightning."""
        return BoundObjective(self, model)

    # How it is done.

    def _surrogate(self, model: Any, x: Any) -> Tensor:
        at_batch = open_batch(self, model, x)
        if not torch.is_grad_enabled():
            return at_batch.value()
        if self.backward_samples is not None:
            return at_batch.resampled(self.backward_samples)
        return at_batch.whole() if self.chunk_size is None else at_batch.chunked()

    @cached_property
    def _estimator(self) -> Callable[..., Any]:
        if callable(self.gradient):
            return self.gradient
        try:
            return plugins.get_estimator(self.gradient)
        except plugins.PluginError as error:
            raise plugins.PluginError(f"gradient: {error}") from error

    @cached_property
    def plan(self) -> Plan:
        """Which terms of the surrogate the estimator needs."""
        # "reparam" with the objective's own weights is plain differentiation of F: no surrogate is needed.
        if self.gradient == "reparam" and not self.weighs_itself:
            return PLAIN
        try:
            return plan_of(self.weights, self.k)
        except ValueError:
            raise
        except Exception as error:
            name = type(self).__name__
            if self.weighs_itself:
                who = f"the weights of {name} do not work"
            else:
                who = f"{plugins.whose(plugins.ESTIMATORS, self.gradient)} does not work with {name}"
            raise plugins.PluginError(f"{who}: {type(error).__name__}: {error}") from error

    def __post_init__(self) -> None:
        given = [name for name in ("chunk_size", "backward_samples") if getattr(self, name) is not None]
        for name in ("k", *given):
            require_count(name, getattr(self, name, None))
        if self.backward_samples is not None and self.backward_samples > self.k:
            raise ValueError(f"backward_samples must be at most k = {self.k}, got {self.backward_samples}")
        require_number("kl_weight", self.kl_weight, lambda t: t >= 0, "a finite number of at least 0")
        self._estimator, self.plan  # noqa: B018  an invalid pair of objective and estimator raises here, before any compute

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, kind in vars(cls).get("__annotations__", {}).items():
            if name in _STATED and "ClassVar" not in str(kind):  # it would become a parameter, the first or a new one
                raise TypeError(f"{cls.__name__} annotates {name} as a field: write `{name} = ...`, without annotation")
        home = {name: _place(cls, name) for name in ("reduce", *_DERIVED)}
        for name in _DERIVED:
            if home["reduce"] < home[name]:  # a parent's closed form, of a parent's `reduce`
                setattr(cls, name, getattr(Objective, name))
        if "__repr__" not in vars(cls):
            # Before @dataclass would write its own.
            cls.__repr__ = Objective.__repr__  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        def cached(name: str) -> bool:
            return isinstance(getattr(type(self), name, None), cached_property)

        return {name: value for name, value in vars(self).items() if not cached(name)}

    def __repr__(self) -> str:
        own, of_all = own_fields(self)
        shown = [f for f in own if f.default is not False or getattr(self, f.name) is not False]
        shown += [f for f in of_all if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


class BoundObjective(torch.nn.Module):
    """An objective and a model in one module: `forward(x)` is the loss. `objective.bind(model)` creates it.

    Example:
        >>> from mcobjectives import IWAE
        >>> from torch.distributions import Independent, Normal
        >>> class Model(torch.nn.Linear):  # h ~ N(0, 1), x | h ~ N(h, 1)
        ...     def posterior(self, x):
        ...         return Independent(Normal(self(x), 1.0), 1)
        ...     def log_joint(self, x, h):
        ...         return (Normal(0.0, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)).sum(-1)
        >>> bound = IWAE(k=5).bind(Model(1, 1))
        >>> [name for name, _ in bound.named_parameters()], bound(torch.zeros(2, 1)).shape
        (['model.weight', 'model.bias'], torch.Size([]))
    """

    def __init__(self, objective: Objective, model: Any) -> None:
        super().__init__()
        self.objective, self.model = objective, model
        own = own_parameters(objective)
        self._own = list(own)
        for name, parameter in own.items():  # to be trained with the model's
            self.register_parameter(name, parameter)

    def forward(self, x: Any) -> Tensor:
        if not self._own:
            return self.objective(self.model, x)
        return replace(self.objective, **{name: getattr(self, name) for name in self._own})(self.model, x)

    if TYPE_CHECKING:

        def __call__(self, x: Any) -> Tensor: ...


def own_fields(objective: Any) -> tuple[list[Field[Any]], list[Field[Any]]]:
    """The fields of an objective or its class: its own, and those that every objective has."""
    base = {f.name for f in fields(Objective)}
    found = fields(objective)
    return [f for f in found if f.name not in base], [f for f in found if f.name in base]


def own_parameters(objective: Objective) -> dict[str, torch.nn.Parameter]:
    """The options of an objective that are parameters, to be trained with the model's."""
    own = {f.name: getattr(objective, f.name) for f in fields(objective)}
    return {name: value for name, value in own.items() if isinstance(value, torch.nn.Parameter)}


def _place(cls: type, name: str) -> int:
    """Position in the MRO of the class that defines the method; 0 is the class itself."""
    return next(i for i, parent in enumerate(cls.__mro__) if name in vars(parent))
