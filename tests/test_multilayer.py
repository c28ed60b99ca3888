"""Several stochastic layers, shared parameters, flows: q's parameters are stopped, never its inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Independent, Normal
from toys import (
    F64,
    Curved,
    Gaussian1D,
    Jackknife,
    LinearGaussian,
    Model,
    TwoLayers,
    assert_same,
    exact_gradient,
    expected_gradient,
    gaussian_grid,
    loss_gradient,
    registered,
)

from mcobjectives import CIWAE, IWAE, VAE, LAlpha, Power, Split

TWO = [
    *(VAE(k=2), IWAE(k=2), Power(k=2, p=2.0), Power(k=2, p=0.5), CIWAE(k=2, beta=0.25), LAlpha(k=2, alpha=0.5)),
    *(Curved(k=2), Jackknife(k=2), IWAE(k=2, kl_weight=0.6)),
]
GRID = gaussian_grid(2, 2, 14)


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "score", "vimco"])
@pytest.mark.parametrize("objective", TWO, ids=repr)
def test_two_layers_are_exact_in_theta_phi_and_what_they_share(objective, gradient):
    model = TwoLayers()
    x = model.on(GRID)
    found = expected_gradient(replace(objective, gradient=gradient), model, x, GRID.weight)
    assert_same(found, exact_gradient(objective, model, x, GRID.weight))


def test_the_toy_tells_wrong_stops_from_right_ones():
    """Detaching q's outputs instead of its parameters, the classic mistake, moves the first layer's gradient."""

    class Detached(TwoLayers):
        def posterior(self, x):
            chain, detached = super().posterior(x), super().posterior(x)
            inner = chain._h2
            chain._h2 = lambda h1: Normal(inner(h1).loc.detach(), inner(h1).scale.detach())
            chain.rsample = detached.rsample
            return chain

    objective = IWAE(k=2, gradient="dreg")
    right, wrong = TwoLayers(), Detached()
    x = right.on(GRID), wrong.on(GRID)
    exact = exact_gradient(objective, right, x[0], GRID.weight)
    found = expected_gradient(objective, wrong, x[1], GRID.weight)
    assert abs(found["q_m1"] - exact["q_m1"]) > 1e-3


class DictLayers(TwoLayers):
    """The same model with h a dict of a list."""

    def posterior(self, x):
        chain = super().posterior(x)

        class Wrapped:
            def rsample(self, shape):
                h1, h2 = chain.rsample(shape)
                return {"deep": [h2], "h1": h1}

            sample = rsample

            def log_prob(self, h):
                return chain.log_prob((h["h1"], h["deep"][0]))

        return Wrapped()

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, (h["h1"], h["deep"][0]))

    def log_prior(self, h):
        return super().log_prior((h["h1"], h["deep"][0]))


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg", "score", "vimco", "rws"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("backward_samples", [None, 2])
@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
def test_a_dict_of_layers_is_as_good_as_a_tuple(gradient, chunk_size, backward_samples):
    x = torch.tensor([0.3, -1.2], dtype=F64)
    objective = IWAE(k=5, gradient=gradient, chunk_size=chunk_size, backward_samples=backward_samples)
    value, expected = loss_gradient(objective, TwoLayers(), x)
    found_value, found = loss_gradient(objective, DictLayers(), x)
    torch.testing.assert_close(found_value, value, rtol=0, atol=1e-12)
    assert_same(found, expected, 1e-12)


class Attached(TwoLayers):
    """The same model, whose posterior says how samples depend on its parameters; it counts the rows with a graph."""

    def posterior(self, x):
        chain, model = super().posterior(x), self
        self.rows = []

        class Attaching:
            rsample, log_prob = chain.rsample, chain.log_prob

            def attach(self, h):
                model.rows.append(len(h[0]))
                h1 = _attached(chain._h1(), h[0])
                return h1, _attached(chain._h2(h1), h[1])

        return Attaching()


def _attached(q, h):
    return q.loc + q.scale * ((h - q.loc) / q.scale).detach()


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg", "score", "vimco"])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
def test_only_the_chosen_samples_are_attached_and_their_gradient_is_the_same(gradient, chunk_size):
    x, model = torch.tensor([0.3, -1.2], dtype=F64), Attached()
    objective = IWAE(k=5, gradient=gradient, chunk_size=chunk_size, backward_samples=2)
    value, expected = loss_gradient(objective, TwoLayers(), x)
    found_value, found = loss_gradient(objective, model, x)
    torch.testing.assert_close(found_value, value, rtol=0, atol=1e-12)
    assert_same(found, expected, 1e-12)
    assert model.rows == ([2] if objective.plan.path else [])


def test_an_attach_that_moves_the_samples_is_refused():
    class Moving(Attached):
        def posterior(self, x):
            posterior = super().posterior(x)
            attach = posterior.attach
            posterior.attach = lambda h: tuple(part + 0.1 for part in attach(h))
            return posterior

    with pytest.raises(RuntimeError, match="another value when it is evaluated again"):
        IWAE(k=5, backward_samples=2)(Moving(), torch.tensor([0.3, -1.2], dtype=F64))


class Widths(Model):
    """Layers of different shapes: h1 is (k, batch, 2, 3), h2 (k, batch)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.q = self.parameter(0.7), self.parameter(0.4)

    def posterior(self, x):
        model = self

        class Both:
            def _h1(self):
                return Independent(Normal((model.q * x)[:, None, None].expand(-1, 2, 3), 0.9), 2)

            def _h2(self, h1):
                return Normal(model.q * h1.sum((-1, -2)), 0.8)

            def rsample(self, shape):
                h1 = self._h1().rsample(shape)
                return h1, self._h2(h1).rsample()

            sample = rsample

            def log_prob(self, h):
                return self._h1().log_prob(h[0]) + self._h2(h[0]).log_prob(h[1])

        return Both()

    def log_likelihood(self, x, h):
        return Normal(self.w * h[0].sum((-1, -2)), 1.0).log_prob(x)

    def log_prior(self, h):
        h1, h2 = h
        return Independent(Normal(self.w * h2[..., None, None].expand_as(h1), 1.0), 2).log_prob(h1) - h2**2 / 2


def in_two_evaluations(objective):
    """The same estimator, with log p evaluated apart for theta and for h instead of by the ratio c / a."""
    twin = replace(objective)
    twin.__dict__["plan"] = replace(objective.plan, ratio=False)
    return twin


@pytest.mark.parametrize("make", [LinearGaussian, TwoLayers, Gaussian1D, Widths])
@pytest.mark.parametrize("extra", [{}, {"backward_samples": 3}, {"chunk_size": 4}], ids=str)
def test_one_scaled_evaluation_equals_two(make, extra):
    model = make()
    x = model.data(3) if isinstance(model, LinearGaussian) else torch.tensor([0.3, -1.2, 0.7], dtype=F64)
    for objective in registered(6):
        if not objective.smooth:
            continue
        one = replace(objective, gradient="dreg", **extra)
        if not one.plan.ratio:
            continue
        assert_same(loss_gradient(in_two_evaluations(one), model, x)[1], loss_gradient(one, model, x)[1], 1e-10)


def test_split_of_two_layers_follows_each_part():
    model = TwoLayers()
    x = model.on(GRID)
    found = expected_gradient(Split(generative=IWAE(k=2), inference=VAE(k=2, gradient="dreg")), model, x, GRID.weight)
    theta, phi = (exact_gradient(o, model, x, GRID.weight) for o in (IWAE(k=2), VAE(k=2)))
    for name in found:
        if name != "shared":  # which has a part of both
            expected = (phi if name.startswith("q_") else theta)[name]
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-8)


class Flow(Model):
    """q is a normalising flow in two dimensions, conditioned on x; the prior correlates them."""

    def __init__(self, zuko) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.flow = zuko.flows.MAF(2, 1, transforms=2, hidden_features=(4,), activation=torch.nn.Tanh).to(F64)
        with torch.no_grad():  # a gentle flow, whose soft clip of the scales is never at its kink
            for name, parameter in self.flow.named_parameters():
                parameter *= 0.3
                if name.endswith("2.bias"):
                    parameter[1::2] = 0.1
        self.w = self.parameter(0.5, 0.8)

    def on(self, grid):
        self.nodes = grid.nodes
        return torch.full((len(grid.weight),), 0.4, dtype=F64)

    def posterior(self, x):
        q, nodes = self.flow(x.unsqueeze(-1)), self.nodes

        class Prescribed:
            log_prob = staticmethod(q.log_prob)

            def rsample(self, shape):
                return q.transform.inv(nodes)

            def sample(self, shape):
                return self.rsample(shape).detach()

        return q if nodes is None else Prescribed()

    def log_likelihood(self, x, h):
        return Normal((h * self.w).sum(-1), 2.0).log_prob(x)

    def log_prior(self, h):
        return Normal(0.0, 0.9).log_prob(h[..., 0]) + Normal(0.2 * h[..., 0], 0.9).log_prob(h[..., 1])


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
@pytest.mark.parametrize("objective", [IWAE(k=2), Power(k=2, p=0.5)], ids=repr)
def test_a_normalising_flow_is_exact(objective, gradient):
    model, grid = Flow(pytest.importorskip("zuko")), gaussian_grid(2, 2, 10)
    x = model.on(grid)
    found = expected_gradient(replace(objective, gradient=gradient), model, x, grid.weight)
    exact = exact_gradient(objective, model, x, grid.weight)
    assert_same(found, exact)
    assert all(g.abs().max() > 1e-4 for g in exact.values())


def test_a_flow_is_a_posterior_as_it_is():
    model = Flow(pytest.importorskip("zuko"))
    x = torch.tensor([0.3, -1.2, 0.7], dtype=F64)
    whole, chunked = (loss_gradient(IWAE(k=5, gradient="dreg", chunk_size=c), model, x) for c in (None, 2))
    torch.testing.assert_close(whole[0], chunked[0], rtol=0, atol=1e-12)
    assert_same(chunked[1], whole[1], 1e-10)


def test_samples_to_be_attached_are_drawn_without_a_graph():
    drawn = []

    class Watched(Attached):
        def posterior(self, x):
            posterior = super().posterior(x)
            rsample = posterior.rsample
            posterior.rsample = lambda shape: drawn.append(torch.is_grad_enabled()) or rsample(shape)
            return posterior

    IWAE(k=5, backward_samples=2)(Watched(), torch.tensor([0.3, -1.2], dtype=F64)).backward()
    assert drawn == [False]
