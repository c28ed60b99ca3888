"""Small exact models in float64, and sums over all their samples in place of Monte Carlo averages.

A model with `nodes` set returns those samples in place of random ones, one combination of k samples for each "data
point", so that a weighted sum over the batch is an exact expectation: over a categorical latent by enumeration, over a
Gaussian by quadrature. `exact_gradient` differentiates the density q (no pathwise derivative, none of the library's
estimators); `expected_gradient` sums what the library's surrogate gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal

from mcobjectives import Objective, get_objective, objective_names

F64 = torch.float64

PARAMETERS = {
    "power": [{"p": 2.0}, {"p": 0.5}, {"p": -1.5}, {"p": 1e-3}],
    "l_alpha": [{"alpha": 0.5}, {"alpha": 1.7}],
    "ciwae": [{"beta": 0.25}],
}


def registered(k: int, **options: object) -> list[Objective]:
    """Every objective of the registry at k samples, some with more than one value of their parameter."""
    found = []
    for name in objective_names():
        make = get_objective(name)
        if {"k1", "k2"} <= {f.name for f in fields(make)}:
            counts = [{"k1": d, "k2": k // d} for d in range(1, k + 1) if k % d == 0]
        else:
            counts = [{"k": k}]
        found += [make(**n, **own, **options) for n in counts for own in PARAMETERS.get(name, [{}])]
    return found


K = 6
EVERY = registered(K)
every = pytest.mark.parametrize("objective", EVERY, ids=repr)


@dataclass(frozen=True)
class Curved(Objective):
    """A user's smooth objective without closed forms: halfway between IWAE and the power mean of p = 1/2."""

    k: int = 2

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_w.logsumexp(0) / 2 + (log_w / 2).logsumexp(0) - 1.5 * math.log(self.k)


@dataclass(frozen=True)
class Jackknife(Objective):
    """The jackknife of IWAE (Nowozin 2018), whose slopes have mixed signs: k F_k - (k - 1) mean of F_{k-1}."""

    k: int = 2

    def reduce(self, log_w: Tensor) -> Tensor:
        k = self.k
        others = torch.stack([torch.cat([log_w[:i], log_w[i + 1 :]]).logsumexp(0) for i in range(k)])
        return k * (log_w.logsumexp(0) - math.log(k)) - (k - 1) * (others - math.log(max(k - 1, 1))).mean(0)


@dataclass(frozen=True)
class Largest(Objective):
    """The largest log-weight: its slopes jump, which it does not say."""

    k: int = 4

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_w.amax(0)


@dataclass(frozen=True)
class PartlyLargest(Objective):
    """Half the largest log-weight, half IWAE: its slopes are nowhere constant, and jump."""

    k: int = 4

    def reduce(self, log_w: Tensor) -> Tensor:
        return (log_w.amax(0) + log_w.logsumexp(0)) / 2


# Sums over all samples.


class Grid(NamedTuple):
    """`nodes` `(k, n, dims)` of standard normal noise (or discrete values), and `weight` `(n,)` that sum to one."""

    nodes: Tensor
    weight: Tensor


def gaussian_grid(k: int, dims: int, points: int) -> Grid:
    """Gauss-Hermite in all k * dims dimensions of the noise."""
    roots, weights = np.polynomial.hermite_e.hermegauss(points)
    roots, weights = torch.tensor(roots), torch.tensor(weights / weights.sum())
    axes = torch.cartesian_prod(*[roots] * (k * dims)).reshape(-1, k, dims)
    weight = torch.cartesian_prod(*[weights] * (k * dims)).reshape(-1, k * dims).prod(1)
    return Grid(axes.transpose(0, 1).contiguous(), weight)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def exact_gradient(objective: Objective, model: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The gradient of E F: `weight` times q(h) / q_now(h), times F at fixed h, differentiated as it stands."""
    h = model.posterior(x).sample(torch.Size((objective.k,)))
    t = objective.tempering
    log_q = model.posterior(x).log_prob(h)
    log_p = model.log_likelihood(x, h) + t * model.log_prior(h)
    density = weight * (log_q - log_q.detach()).sum(0).exp()
    return gradients(model, (density * objective.reduce(log_p - t * log_q)).sum())


def expected_gradient(objective: Objective, model: nn.Module, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The expectation of the estimator's gradient."""
    return gradients(model, (weight * objective.surrogate(model, x)).sum())


def loss_gradient(objective: Objective, model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of the loss and the gradient of its negative, from a seed."""
    torch.manual_seed(seed)
    loss = objective(model, x)
    return loss.detach(), gradients(model, -loss)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


# Models.


class Model(nn.Module):
    """What the toys share: log p(x, h) from its two parts."""

    nodes: Tensor | None = None

    def log_joint(self, x: Tensor, h: Tensor) -> Tensor:
        return self.log_likelihood(x, h) + self.log_prior(h)

    def parameter(self, *values: float) -> nn.Parameter:
        return nn.Parameter(torch.tensor(values if len(values) > 1 else values[0], dtype=F64))


class LinearGaussian(Model):
    """x = W h + b + s e with h ~ N(0, I): log p(x) and the posterior, at which q starts, are known exactly."""

    def __init__(self, latent: int = 2, observed: int = 3, seed: int = 0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(observed, latent, generator=g, dtype=F64))
        self.bias = nn.Parameter(torch.randn(observed, generator=g, dtype=F64))
        self.noise = 0.7
        w, s2 = self.weight.detach(), self.noise**2
        covariance = torch.linalg.inv(torch.eye(latent, dtype=F64) + w.T @ w / s2)
        self.q_gain = nn.Parameter(covariance @ w.T / s2)
        self.q_offset = nn.Parameter(-covariance @ w.T @ self.bias.detach() / s2)
        self.q_scale = nn.Parameter(torch.linalg.cholesky(covariance))
        self.to(dtype)

    def data(self, batch: int = 4, seed: int = 1) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(batch, len(self.bias), generator=g, dtype=F64).to(self.bias.dtype)

    def off_posterior(self, by: float = 0.1) -> LinearGaussian:
        with torch.no_grad():
            self.q_offset += by
            self.q_scale *= 1 + by
        return self

    def phi(self) -> tuple[nn.Parameter, ...]:
        return self.q_gain, self.q_offset, self.q_scale

    def log_marginal(self, x: Tensor) -> Tensor:
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(len(self.bias), dtype=x.dtype)
        return MultivariateNormal(self.bias, covariance).log_prob(x).detach()

    def posterior(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(x @ self.q_gain.T + self.q_offset, scale_tril=self.q_scale)

    def log_likelihood(self, x: Tensor, h: Tensor) -> Tensor:
        return Independent(Normal(h @ self.weight.T + self.bias, self.noise), 1).log_prob(x)

    def log_prior(self, h: Tensor) -> Tensor:
        return Independent(Normal(torch.zeros_like(h), 1.0), 1).log_prob(h)


class DiagonalGaussian(LinearGaussian):
    def posterior(self, x: Tensor) -> Independent:
        normal = Normal(x @ self.q_gain.T + self.q_offset, self.q_scale.diagonal())
        return Independent(normal, 1)


class Reparameterised:
    """N(loc, scale) for a batch of numbers, whose samples come from `nodes` `(k, batch)` where there are any."""

    def __init__(self, loc: Tensor, scale: Tensor, nodes: Tensor | None) -> None:
        self.loc, self.scale, self.nodes = loc, scale, nodes

    def rsample(self, shape: torch.Size) -> Tensor:
        noise = torch.randn(*shape, *self.loc.shape, dtype=F64) if self.nodes is None else self.nodes
        assert noise.shape[0] == shape[0]
        return self.loc + self.scale * noise

    def sample(self, shape: torch.Size) -> Tensor:
        return self.rsample(shape).detach()

    def log_prob(self, h: Tensor) -> Tensor:
        return Normal(self.loc, self.scale).log_prob(h)


class Gaussian1D(Model):
    """h ~ N(0, 1), x ~ N(w h + u sin h, 0.8^2); q(h | x) = N(m + n x, exp(r)^2), deliberately not the posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = self.parameter(0.6), self.parameter(0.3)
        self.q_m, self.q_n, self.q_r = self.parameter(0.2), self.parameter(0.3), self.parameter(-0.1)

    def on(self, grid: Grid, x: float = 0.9) -> Tensor:
        """Prescribe the samples; returns the data, x once for each node."""
        self.nodes = grid.nodes.squeeze(-1)
        return torch.full((len(grid.weight),), x, dtype=F64)

    def posterior(self, x: Tensor) -> Reparameterised:
        return Reparameterised(self.q_m + self.q_n * x, self.q_r.exp(), self.nodes)

    def log_likelihood(self, x: Tensor, h: Tensor) -> Tensor:
        return Normal(self.w * h + self.u * h.sin(), 0.8).log_prob(x)

    def log_prior(self, h: Tensor) -> Tensor:
        return Normal(torch.zeros_like(h), 1.0).log_prob(h)


class Discrete(Model):
    """A categorical latent with three values; x ~ N(mean[h], 1), q's logits depend on x."""

    values = 3

    def __init__(self) -> None:
        super().__init__()
        self.prior_logits, self.mean = self.parameter(0.3, -0.2, 0.1), self.parameter(-1.0, 0.4, 1.5)
        self.q_logits, self.q_slope = self.parameter(0.5, 0.0, -0.7), self.parameter(-0.3, 0.2, 0.4)

    def enumerate(self, k: int, x: float = 0.9) -> tuple[Tensor, Tensor]:
        """Prescribe all values^k combinations: the data, and q's probability of each."""
        self.nodes = torch.cartesian_prod(*[torch.arange(self.values)] * k).reshape(-1, k).T.contiguous()
        data = torch.full((self.nodes.shape[1],), x, dtype=F64)
        return data, self.posterior(data).log_prob(self.nodes).sum(0).exp().detach()

    def posterior(self, x: Tensor) -> Categorical:
        nodes = self.nodes

        class Enumerated(Categorical):
            def sample(self, shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
                return super().sample(shape) if nodes is None else nodes

        return Enumerated(logits=self.q_logits + self.q_slope * x.unsqueeze(-1))

    def log_likelihood(self, x: Tensor, h: Tensor) -> Tensor:
        return Normal(self.mean[h], 1.0).log_prob(x)

    def log_prior(self, h: Tensor) -> Tensor:
        return self.prior_logits.log_softmax(0)[h]


class Pair:
    """q(b, z | x) = Bernoulli(b) Normal(z | b): a posterior over a tuple; only z could be reparameterised."""

    def __init__(self, model: Mixed, x: Tensor) -> None:
        self.model, self.x = model, x

    def _z(self, b: Tensor) -> Normal:
        return Normal(self.model.q_m + self.model.q_n * self.x + self.model.q_b * b, self.model.q_r.exp())

    def rsample(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        logits = self.model.q_logit * self.x
        if self.model.nodes is None:
            b = Bernoulli(logits=logits).sample(shape)
            noise = torch.randn_like(b)
        else:
            b, noise = self.model.nodes.unbind(-1)
        z = self._z(b)
        return b, z.loc + z.scale * noise

    def sample(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        b, z = self.rsample(shape)
        return b, z.detach()

    def log_prob(self, h: tuple[Tensor, Tensor]) -> Tensor:
        b, z = h
        return Bernoulli(logits=self.model.q_logit * self.x).log_prob(b) + self._z(b).log_prob(z)


class Mixed(Model):
    """h = (b, z): a coin and a number, x ~ N(w z + v b, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.prior_logit = self.parameter(0.7), self.parameter(0.9), self.parameter(0.2)
        self.q_logit, self.q_b = self.parameter(0.5), self.parameter(-0.3)
        self.q_m, self.q_n, self.q_r = self.parameter(0.1), self.parameter(0.3), self.parameter(-0.2)

    def on(self, grid: Grid, x: float = 0.9) -> tuple[Tensor, Tensor]:
        """All coins, with the grid's noise under each: the data and the weights."""
        k = grid.nodes.shape[0]
        coins = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * k).reshape(-1, k).T
        n, c = len(grid.weight), coins.shape[1]
        noise = grid.nodes.squeeze(-1)
        self.nodes = torch.stack([coins.repeat_interleave(n, 1), noise.repeat(1, c)], -1)
        data = torch.full((n * c,), x, dtype=F64)
        mass = Bernoulli(logits=self.q_logit * data).log_prob(self.nodes[..., 0]).sum(0).exp().detach()
        return data, mass * grid.weight.repeat(c)

    def posterior(self, x: Tensor) -> Pair:
        return Pair(self, x)

    def log_likelihood(self, x: Tensor, h: tuple[Tensor, Tensor]) -> Tensor:
        return Normal(self.w * h[1] + self.v * h[0], 1.0).log_prob(x)

    def log_prior(self, h: tuple[Tensor, Tensor]) -> Tensor:
        coin = Bernoulli(logits=self.prior_logit).log_prob(h[0])
        return coin + Normal(torch.zeros_like(h[1]), 1.0).log_prob(h[1])


class Chain:
    """q(h1 | x) q(h2 | h1): a posterior over a tuple, whose second part depends on the first through parameters."""

    def __init__(self, model: TwoLayers, x: Tensor) -> None:
        self.model, self.x = model, x

    def _h1(self) -> Normal:
        return Normal(self.model.q_m1 + self.model.shared * self.x, self.model.q_r1.exp())

    def _h2(self, h1: Tensor) -> Normal:
        return Normal(self.model.q_m2 + self.model.q_n2 * h1, self.model.q_r2.exp())

    def rsample(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        nodes = self.model.nodes
        e1, e2 = torch.randn(2, *shape, *self.x.shape, dtype=F64) if nodes is None else nodes.unbind(-1)
        h1 = self._h1().loc + self._h1().scale * e1
        h2 = self._h2(h1).loc + self._h2(h1).scale * e2
        return h1, h2

    def sample(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        h1, h2 = self.rsample(shape)
        return h1.detach(), h2.detach()

    def log_prob(self, h: tuple[Tensor, Tensor]) -> Tensor:
        h1, h2 = h
        return self._h1().log_prob(h1) + self._h2(h1).log_prob(h2)


class TwoLayers(Model):
    """p(h2) p(h1 | h2) p(x | h1), one number each; `shared` is a weight of both the encoder and the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.p_a, self.p_b, self.shared = self.parameter(0.3), self.parameter(0.3), self.parameter(0.4)
        self.q_m1, self.q_r1 = self.parameter(0.25), self.parameter(0.05)
        self.q_m2, self.q_n2, self.q_r2 = self.parameter(-0.2), self.parameter(0.25), self.parameter(-0.12)

    def on(self, grid: Grid, x: float = 0.9) -> Tensor:
        self.nodes = grid.nodes
        return torch.full((len(grid.weight),), x, dtype=F64)

    def posterior(self, x: Tensor) -> Chain:
        return Chain(self, x)

    def log_likelihood(self, x: Tensor, h: tuple[Tensor, Tensor]) -> Tensor:
        return Normal(self.shared * h[0] + self.p_b, 1.5).log_prob(x)

    def log_prior(self, h: tuple[Tensor, Tensor]) -> Tensor:
        h1, h2 = h
        return Normal(self.p_a * h2, 1.1).log_prob(h1) + Normal(torch.zeros_like(h2), 1.0).log_prob(h2)


class Toy:
    """A model of numbers: everything it returns can be replaced."""

    def __init__(self, **replaced):
        self.loc = torch.nn.Parameter(torch.zeros((), dtype=F64))
        self.__dict__.update(replaced)

    def posterior(self, x):
        return Normal(self.loc + 0 * x, 1.0)

    def log_joint(self, x, h):
        return -(h**2) / 2 - (x - h) ** 2
