"""Two models small enough for exact expectations: a Gaussian latent by quadrature, a discrete one by enumeration.

The batch runs over all the outcomes of the k samples: the sum of probabilities times gradients over the batch is the
expected gradient, with no Monte Carlo noise. The true gradient is taken by finite differences of the expectation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from mcobjectives.objective import Objective

NAMES: dict[str, list[str]] = {
    "gaussian": ["theta (slope)", "theta (offset)", "phi (mean)", "phi (log sd)"],
    "discrete": ["theta (table 0)", "theta (table 1)", "theta (table 2)", "phi (logit 0)", "phi (logit 1)"],
}


class Exact(ABC):
    """A model with parameters (theta, phi), at all outcomes h of k samples, `(k, outcomes)`."""

    kind: str
    start: tuple[float, ...]
    thetas: int
    h: Tensor

    @abstractmethod
    def probabilities(self, parameters: Tensor) -> Tensor:
        """Of each outcome under q, `(outcomes,)`: they sum to one."""

    @abstractmethod
    def model(self, parameters: Tensor) -> Any: ...

    def expected(self, objective: Objective) -> tuple[float, Tensor]:
        """The expected value of the surrogate, and its expected gradient, `(parameters,)`: what training sees."""
        parameters = torch.tensor(self.start, dtype=torch.float64, requires_grad=True)
        values = objective.surrogate(self.model(parameters), self.h[0])
        p = self.probabilities(parameters).detach()
        (gradient,) = torch.autograd.grad((p * values).sum(), parameters)
        return float((p * values.detach()).sum()), gradient

    def value(self, objective: Objective, parameters: Tensor) -> Tensor:
        """E F, from `reduce` and `tempering` alone."""
        with torch.no_grad():
            return (self.probabilities(parameters) * objective.reduce(self.log_weights(objective, parameters))).sum()

    def log_weights(self, objective: Objective, parameters: Tensor) -> Tensor:
        model = self.model(parameters)
        posterior = model.posterior(self.h[0])
        h = posterior.sample(torch.Size((objective.k,)))
        return model.log_likelihood(None, h) + objective.tempering * (model.log_prior(h) - posterior.log_prob(h))

    def true(self, objective: Objective) -> tuple[float, Tensor]:
        """E F and its gradient, `(parameters,)`, by central differences."""
        at, step = torch.tensor(self.start, dtype=torch.float64), 1e-5
        moves = step * torch.eye(len(at), dtype=torch.float64)
        rows = [(self.value(objective, at + m) - self.value(objective, at - m)) / (2 * step) for m in moves]
        return float(self.value(objective, at)), torch.stack(rows)

    def wake_phi(self, objective: Objective) -> Tensor:
        """E sum_i w~_i grad log q(h_i | x): the direction of phi in reweighted wake-sleep, `(parameters,)`."""
        parameters = torch.tensor(self.start, dtype=torch.float64, requires_grad=True)
        posterior = self.model(parameters).posterior(self.h[0])
        h = posterior.sample(torch.Size((objective.k,))).detach()
        w = self.log_weights(objective, parameters).detach().softmax(0)
        total = (self.probabilities(parameters).detach() * (w * posterior.log_prob(h)).sum(0)).sum()
        return torch.autograd.grad(total, parameters)[0]


class Gaussian(Exact):
    """p(h) = N(0, 1), p(x | h) = N(1; slope h + offset, 1), q = N(mean, sd): quadrature with n^k nodes."""

    kind, thetas, start = "gaussian", 2, (0.7, 0.2, 0.5, -0.4)

    def __init__(self, k: int, fineness: float = 1.0) -> None:
        n = int(fineness * {1: 64, 2: 64, 3: 32, 4: 16, 8: 3}[k])
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(n))
        self.h = torch.cartesian_prod(*[nodes] * k).reshape(-1, k).T.contiguous()
        logs = torch.cartesian_prod(*[(weights / weights.sum()).log()] * k).reshape(-1, k).sum(1)
        self._p = logs.exp()

    def probabilities(self, parameters: Tensor) -> Tensor:
        return self._p

    def model(self, parameters: Tensor) -> Any:
        return _GaussianModel(parameters, self.h)


class _GaussianModel:
    def __init__(self, parameters: Tensor, noise: Tensor) -> None:
        self.parameters, self.noise = parameters, noise

    def posterior(self, x: Any) -> Normal:
        mean, log_sd = self.parameters[2:].unsqueeze(1).expand(2, self.noise.shape[1])
        return _Nodes(mean, log_sd.exp(), self.noise)

    def log_likelihood(self, x: Any, h: Tensor) -> Tensor:
        slope, offset = self.parameters[:2]
        return Normal(slope * h + offset, 1.0).log_prob(torch.ones_like(h))

    def log_prior(self, h: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(h)


class _Nodes(Normal):
    """A normal distribution whose samples are given: loc + scale * noise."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)
        self.noise = noise

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        assert tuple(sample_shape) == self.noise.shape[:1]
        return self.loc + self.scale * self.noise

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.rsample(sample_shape).detach()


class Discrete(Exact):
    """A latent with three values, free tables for log p(x | h) and log p(h): 3^k outcomes."""

    kind, thetas, start = "discrete", 3, (-1.0, 0.4, -0.3, 0.2, -0.5)

    def __init__(self, k: int) -> None:
        self.h = torch.cartesian_prod(*[torch.arange(3)] * k).reshape(-1, k).T.contiguous()

    def probabilities(self, parameters: Tensor) -> Tensor:
        return _table(parameters[3:])[self.h].sum(0).exp()

    def model(self, parameters: Tensor) -> Any:
        return _DiscreteModel(parameters, self.h)


class _DiscreteModel:
    def __init__(self, parameters: Tensor, outcomes: Tensor) -> None:
        self.parameters, self.outcomes = parameters, outcomes

    def posterior(self, x: Any) -> Any:
        return _Outcomes(_table(self.parameters[3:]), self.outcomes)

    def log_likelihood(self, x: Any, h: Tensor) -> Tensor:
        return self.parameters[:3][h]

    def log_prior(self, h: Tensor) -> Tensor:
        return _table(self.parameters[1:3] / 2)[h]


def _table(logits: Tensor) -> Tensor:
    """Log-probabilities of three values from two free logits."""
    return torch.cat([logits, logits.new_zeros(1)]).log_softmax(0)


class _Outcomes:
    def __init__(self, table: Tensor, outcomes: Tensor) -> None:
        self.table, self.outcomes = table, outcomes

    def sample(self, sample_shape: Any) -> Tensor:
        assert tuple(sample_shape) == self.outcomes.shape[:1]
        return self.outcomes

    def log_prob(self, h: Tensor) -> Tensor:
        return self.table[h]
