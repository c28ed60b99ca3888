"""Programs and guides whose numbers are known, for the tests of the Pyro adapter."""

import math

import pytest
import torch
from torch import Tensor, nn

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import Trace_ELBO  # noqa: E402
from torch.distributions import Independent, Normal  # noqa: E402

from mcobjectives import VAE  # noqa: E402
from mcobjectives.pyro import ObjectiveELBO  # noqa: E402

PATHWISE = ["reparam", "stl", "dreg"]


@pytest.fixture(autouse=True)
def clean():
    """An empty parameter store, double precision, a fixed seed."""
    pyro.clear_param_store()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def close(actual, expected, tolerance=1e-10):
    if not isinstance(actual, tuple):
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Hand-written models and the same as programs.


class Gaussian(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, y: Tensor) -> Independent:
        return Independent(Normal(self.loc(y), (0.3 * self.log_scale(y)).exp()), 1)


class Sequence:
    """q(h1 | x) q(h2 | h1) by hand."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def rsample(self, shape):
        h1 = self.first.rsample(shape)
        return {"h1": h1, "h2": self.second(h1).rsample()}

    def log_prob(self, h):
        return self.first.log_prob(h["h1"]) + self.second(h["h1"]).log_prob(h["h2"])


class Vae(nn.Module):
    """One or two Gaussian layers over Bernoulli data; by hand, and as programs."""

    def __init__(self, layers: int, pixels: int = 6):
        super().__init__()
        self.layers, self.calls = layers, []
        self.encoder, self.upper = Gaussian(pixels, 3), Gaussian(3, 2)
        self.lower, self.decoder = Gaussian(2, 3), nn.Linear(3, pixels)

    def prior(self, size):
        return Independent(Normal(torch.zeros(size), torch.ones(size)), 1)

    def posterior(self, x):
        q = self.encoder(x)
        return q if self.layers == 1 else Sequence(q, self.upper)

    def log_prior(self, h):
        if self.layers == 1:
            return self.prior(3).log_prob(h)
        return self.prior(2).log_prob(h["h2"]) + self.lower(h["h2"]).log_prob(h["h1"])

    def log_likelihood(self, x, h):
        h1 = h if self.layers == 1 else h["h1"]
        return -nn.functional.binary_cross_entropy_with_logits(
            self.decoder(h1), x.expand(*h1.shape[:-1], -1), reduction="none"
        ).sum(-1)

    def log_joint(self, x, h):
        return self.log_prior(h) + self.log_likelihood(x, h)

    def program(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            if self.layers == 1:
                h1 = pyro.sample("h1", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            else:
                h2 = pyro.sample("h2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                h1 = pyro.sample("h1", self.as_pyro(self.lower(h2)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(h1)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            self.calls.append(x.shape)
            h1 = pyro.sample("h1", self.as_pyro(self.encoder(x)))
            if self.layers == 2:
                pyro.sample("h2", self.as_pyro(self.upper(h1)))

    @staticmethod
    def as_pyro(q):
        return dist.Normal(q.base_dist.loc, q.base_dist.scale).to_event(1)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


X = (torch.arange(24).reshape(4, 6) * 7 % 5 > 2).double()


# Closed forms: z ~ N(0, 1), x ~ N(z, 1), so x ~ N(0, sqrt 2) and z | x ~ N(x / 2, sqrt 1/2).

N, B = 1000, 10


DATA = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**0.5


LOG_P = -0.25 * DATA**2 - 0.5 * math.log(4 * math.pi)


def conjugate(x, index=None, spread=0.5**0.5):
    with pyro.plate("data", len(x), subsample=index) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def exact_guide(x, index=None, spread=0.5**0.5):
    with pyro.plate("data", len(x), subsample=index) as i:
        pyro.sample("z", dist.Normal(x[i] / 2, spread))


def same_as_trace_elbo(model, guide, *args, gradient="reparam", exact=True):
    """Value and gradient of VAE(k=1) seed for seed as Trace_ELBO; the gradient only where the estimator is the same."""
    found = []
    for elbo in (Trace_ELBO(), ObjectiveELBO(VAE(k=1, gradient=gradient))):
        elbo.loss(model, guide, *args)  # lazy initialisation
        with poutine.trace(param_only=True) as capture:
            torch.manual_seed(7)
            loss = elbo.loss_and_grads(model, guide, *args)
        parameters = {n: s["value"].unconstrained() for n, s in capture.trace.nodes.items()}
        found.append((loss, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
        for p in parameters.values():
            p.grad = None
    close(found[1][0], found[0][0])
    assert found[1][1].keys() == found[0][1].keys() and found[0][1]
    if exact:
        for name, value in found[0][1].items():
            close(found[1][1][name], value)


def norm(v: float) -> float:
    return math.exp(-v * v / 2) / math.sqrt(2 * math.pi)


class LeavesTwice:
    """A guide that leaves 2 z for its model, in an attribute."""

    def __call__(self, x):
        loc = pyro.param("loc", x / 2)
        with pyro.plate("data", len(x)):
            self.twice = 2 * pyro.sample("z", dist.Normal(loc, 0.5**0.5))
