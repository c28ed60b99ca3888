"""An objective as a loss for Pyro's SVI."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn

from pyro.infer import ELBO
from torch import Tensor

from mcobjectives.objective import Objective
from mcobjectives.pyro.model import Arguments, PyroModel
from mcobjectives.pyro.programs import Program


class ObjectiveELBO(ELBO):
    """Any objective with any estimator as a `pyro.infer.ELBO`, following Pyro's conventions.

    The loss is minus the bound, summed over the data. The scales of plates and `poutine.scale` multiply it, outside the
    logarithm, so with `subsample_size` it estimates the loss of the whole data set.

    Args:
        objective: for example `IWAE(k=50, gradient="dreg")`.
        max_plate_nesting: as for `PyroModel`.
        weights: as for `PyroModel`. An objective that is linear in the log-weights (VAE) needs no weight for each data
            point, and takes programs that others refuse.
        retain_graph: `loss_and_grads` passes it to `backward`.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI
        >>> from mcobjectives import IWAE
        >>> from mcobjectives.pyro import ObjectiveELBO
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
        >>> def guide(x):
        ...     loc = pyro.param("loc", torch.zeros(100))
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         pyro.sample("z", dist.Normal(loc[i], 0.7))
        >>> loss = ObjectiveELBO(IWAE(k=50, gradient="dreg"))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=loss)
        >>> 126 < svi.step(torch.zeros(100)) < 127  # 100 data points of log N(0; 0, sqrt 2) = -1.2655
        True
    """

    def __init__(
        self,
        objective: Objective,
        *,
        max_plate_nesting: float = math.inf,
        weights: Literal["auto", "joint"] = "auto",
        retain_graph: bool | None = None,
    ) -> None:
        if not isinstance(objective, Objective):
            raise ValueError(f"objective must be an Objective such as IWAE(k=50), got {objective!r}")
        super().__init__(num_particles=objective.k, max_plate_nesting=max_plate_nesting, retain_graph=retain_graph)
        self.objective, self.weights = objective, weights
        self._pair: PyroModel | None = None

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """Minus the scaled bound, summed over the data, without a graph."""
        x = Arguments(*args, **kwargs)
        pair = self._programs(model, guide, x)
        return -(self.objective.bound(pair, x) * pair.scale).sum().item()

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The same number, with the estimator's gradient."""
        x = Arguments(*args, **kwargs)
        pair = self._programs(model, guide, x)
        return -(self.objective.surrogate(pair, x) * pair.scale).sum()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """The same number; adds the gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _programs(self, model: Program, guide: Program, x: Arguments) -> PyroModel:
        if self._pair is None or self._pair.model != model or self._pair.guide != guide:
            nesting = None if self.max_plate_nesting == math.inf else int(self.max_plate_nesting)
            pair = PyroModel(model, guide, max_plate_nesting=nesting, weights=self.weights, scaled=self._linear)
            if self._linear and pair.structure(x).plate is None:
                pair.weights = "joint"
            self._pair = pair
        return self._pair

    @property
    def _linear(self) -> bool:
        """Whether scales may go inside the weights: F is linear in them, and no score of a scaled q is taken."""
        return self.objective.linear and not (self.objective.weighs_itself or self.objective.plan.score)

    def _get_trace(self, *args: Any) -> NoReturn:
        raise NotImplementedError("ObjectiveELBO has no traces: use loss, differentiable_loss or loss_and_grads")
