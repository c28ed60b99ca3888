"""The kit on gradients of models: those that are cut are found, and none where there is no fault to find."""

from __future__ import annotations

import re

import pytest
import torch
from kit_models import Attaching, DetachedInP, Discrete, Gaussian
from torch import nn
from torch.distributions import (
    Bernoulli,
    Independent,
    Normal,
)

from mcobjectives.testing import ConformanceError, check_model
from mcobjectives.testing.models import model_findings

torch.set_num_threads(1)


class NaNGradient(Gaussian):
    """The square root's slope at 0."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(2))

    def log_prior(self, h):
        return super().log_prior(h) - (self.rate - self.rate.detach()).sqrt().sum()


class AttachesToItself(Attaching):
    def attached(self, attached_h1, h1, h2):
        mean = self.upper(h1)
        return mean + (h2 - mean).detach()


class AttachesElsewhere(Attaching):
    def attached(self, attached_h1, h1, h2):
        return self.upper(attached_h1) + (h2 - self.upper(h1)).detach() + 0.01


@pytest.mark.parametrize(
    ("model", "why"),
    [(AttachesToItself, r"gradient of posterior.attach\(h\) to encoder"), (AttachesElsewhere, "moves the samples h")],
)
def test_samples_that_are_attached_wrongly_are_found(x, model, why):
    with pytest.raises(ConformanceError, match=why) as raised:
        check_model(model(), {"image": x})
    assert raised.value.properties == {"gradients"}


class ZeroStart(Gaussian):
    """A last layer that starts at zero hides the layers before it from the gradient, at the start only."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
        nn.init.zeros_(self.decoder[1].weight)


def test_a_layer_that_starts_at_zero_is_no_failure(x):
    check_model(ZeroStart(), x)


class ScalarScale(Gaussian):
    def __init__(self):
        super().__init__()
        self.encoder, self.log_sd = nn.Linear(3, 2), nn.Parameter(torch.tensor(-0.3))

    def moments(self, x):
        return self.encoder(x), self.log_sd.exp()


def test_a_parameter_without_dimensions_is_no_failure(x):
    check_model(ScalarScale(), x)


def test_a_gradient_that_is_not_a_number_is_found(x):
    found = {f.property: f for f in model_findings(NaNGradient(), x)}
    assert found["gradients"].passed is False and "NaN or infinite at rate" in found["gradients"].message


def test_the_gradient_that_is_off_is_named_with_both_rates(x):
    [message] = [f.message for f in model_findings(DetachedInP(), x) if f.property == "gradcheck"]
    rates = re.search(
        r"changes with part 0 of h at a rate of (\S+) in .*, autograd's gradient gives (\S+?)\.? ", message
    )
    assert rates and abs(float(rates[1]) - float(rates[2])) > 1e-3 * abs(float(rates[1]))


class SinglePrecisionInside(Gaussian):
    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h.float().double() if h.dtype == torch.float64 else h)


class SinglePrecisionAlone(Gaussian):
    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h) + h.float() @ torch.zeros(2)


class InSinglePrecision(Gaussian):
    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h).float()

    def log_prior(self, h):
        return super().log_prior(h).float()


class Rough(Gaussian):
    def log_prior(self, h):
        return super().log_prior(h) + 1e-3 * (1e6 * h).sin().sum(-1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (SinglePrecisionInside, None),
        (SinglePrecisionAlone, None),
        (InSinglePrecision, "torch.float32"),
        (Rough, None),
    ],
)
def test_a_gradient_that_finite_differences_cannot_tell_is_no_failure(x, model, why):
    finding = next(f for f in model_findings(model(), x) if f.property == "gradcheck")
    assert finding.passed is not False and (why is None or why in finding.message)


class Confident(Discrete):
    """Bernoulli units that are hardly ever on."""

    logit = -12.0

    def posterior(self, x):
        return Independent(Bernoulli(logits=self.logit + 0.1 * self.encoder(x)), 1)


@pytest.mark.parametrize("logit", [-3.0, -5.0, -8.0, -12.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_confident_discrete_posterior_is_no_failure(x, logit, seed):
    torch.manual_seed(seed)
    check_model(type("At", (Confident,), {"logit": logit})(), x, seed=seed)


def test_a_gradient_that_is_cut_is_found_of_a_confident_posterior_that_varies(x):
    class Cut(Confident):
        logit = -3.0

        def log_likelihood(self, x, h):
            with torch.no_grad():
                return super().log_likelihood(x, h)

    with pytest.raises(ConformanceError, match="no gradient reaches 2 of 4 parameters: decoder") as raised:
        check_model(Cut(), x)
    assert raised.value.properties == {"gradients", "gradcheck"}


class Rectified(Discrete):
    """h of zero and a bias of zero: a kink that is hit."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        nn.init.zeros_(self.decoder[0].bias)


class Clamped(Gaussian):
    def __init__(self):
        super().__init__()
        self.log_sd = nn.Parameter(torch.zeros(3))

    def log_likelihood(self, x, h):
        return Normal(self.decoder(h), self.log_sd.clamp(min=0).exp()).log_prob(x).sum(-1)


class Padded(Gaussian):
    """Words, of which one is padding and gets no gradient."""

    def __init__(self, sparse=False):
        super().__init__()
        self.words = nn.Embedding(4, 3, padding_idx=0, sparse=sparse)

    def log_prior(self, h):
        return super().log_prior(h) - (self.words(torch.arange(4)) - 1).square().sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [Rectified, Clamped, Padded, lambda: Padded(sparse=True)])
def test_kinks_and_rows_without_a_gradient_by_design_are_no_failure(x, make, seed):
    torch.manual_seed(seed)
    found = {f.property: f for f in check_model(make(), x, seed=seed) if f.property == "gradcheck"}
    assert found["gradcheck"].passed


def test_a_step_out_of_what_the_model_allows_cannot_be_told(x):
    class Edge(Gaussian):
        def log_prior(self, h):
            if h.dtype == torch.float64 and not torch.is_grad_enabled():
                raise ValueError("out of the support")
            return super().log_prior(h)

    [finding] = [f for f in model_findings(Edge(), x) if f.property == "gradcheck"]
    assert finding.passed is None and "too rough" in finding.message


def test_a_saturated_unit_hides_no_parameter_that_is_not_connected(x):
    class Saturated(Discrete):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(7, 7)

        def posterior(self, x):
            return Independent(Bernoulli(logits=self.encoder(x) + torch.tensor([40.0, 0.0])), 1)

    [finding] = [f for f in model_findings(Saturated(), x) if f.property == "gradients"]
    assert finding.passed is False and "no gradient reaches 2 of 6 parameters: unused" in finding.message


def test_a_small_parameter_that_is_cut_is_found_beside_a_large_one(x):
    class Small(Gaussian):
        def __init__(self):
            super().__init__()
            self.little = nn.Parameter(torch.zeros(()))

        def log_prior(self, h):
            return super().log_prior(h) + (self.little + 1 - self.little.detach()).exp() * self.little.detach()

        def log_likelihood(self, x, h):
            return 1e3 * super().log_likelihood(x, h)

    [finding] = [f for f in model_findings(Small(), x) if f.property == "gradcheck"]
    assert finding.passed is False and " with little at a rate of " in finding.message


def test_a_model_of_many_layers_takes_few_evaluations(x):
    class Deep(Gaussian):
        calls = 0

        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(
                *(layer for _ in range(60) for layer in (nn.Linear(2, 2), nn.Tanh())), self.decoder
            )

        def log_prior(self, h):
            type(self).calls += 1
            return super().log_prior(h)

    [gradcheck] = [f for f in model_findings(Deep(), x) if f.property == "gradcheck"]
    assert gradcheck.passed and Deep.calls < 200
