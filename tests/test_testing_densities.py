"""The kit on samples and their density: what is off is found, and what cannot be told is not passed off as checked."""

from __future__ import annotations

import math

import pytest
import torch
from kit_models import Bounded, Discrete, Gaussian, Masked, Own, Positive, Wide
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Independent,
    Normal,
    Uniform,
)

from mcobjectives.testing import ConformanceError, check_model
from mcobjectives.testing.models import model_findings

torch.set_num_threads(1)


@pytest.mark.parametrize("model", [Gaussian, Wide, Positive, Bounded])
def test_a_mass_is_told_of_units_on_the_line_above_zero_and_between_zero_and_one(x, model):
    torch.manual_seed(0)
    finding = next(f for f in check_model(model(), x) if f.property == "normalised")
    assert finding.passed is True


class BoundedElsewhere(Bounded):
    def posterior(self, x):
        return Independent(Uniform(-torch.ones(len(x), 2), 2 * torch.ones(len(x), 2)), 1)


class OnASimplex(Bounded):
    def posterior(self, x):
        return Dirichlet(torch.full((len(x), 3), 3.0))

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h[..., :2])


@pytest.mark.parametrize(("model", "why"), [(BoundedElsewhere, "bounded"), (OnASimplex, "span")])
def test_what_cannot_be_told_is_not_passed_off_as_checked(x, model, why):
    torch.manual_seed(0)
    finding = next(f for f in check_model(model(), x) if f.property == "normalised")
    assert finding.passed is None and why in finding.message


class WrongDiscrete(Discrete):
    def posterior(self, x):
        q = super().posterior(x)
        return type(
            "Q", (), {"sample": staticmethod(q.sample), "log_prob": staticmethod(lambda h: q.log_prob(h) + 0.3)}
        )()


def test_probabilities_that_do_not_sum_to_one_are_found(x):
    with pytest.raises(ConformanceError, match=r"probabilities of all values drawn sum to 1\.35") as raised:
        check_model(WrongDiscrete(), x)
    assert raised.value.properties == {"normalised"}


class WrongDiscreteOfManyUnits(WrongDiscrete):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 25), nn.Linear(25, 3)

    def posterior(self, x):
        q = Independent(Bernoulli(logits=0.1 * self.encoder(x)), 1)
        return type(
            "Q", (), {"sample": staticmethod(q.sample), "log_prob": staticmethod(lambda h: q.log_prob(h) - 0.3)}
        )()


def test_a_mass_of_which_little_was_seen_is_not_passed_off_as_checked(x):
    [finding] = [f for f in check_model(WrongDiscreteOfManyUnits(), x) if f.property == "normalised"]
    assert finding.passed is None and "of the mass was seen" in finding.message


class OneOfTwo(Gaussian):
    """The scores of a softmax's logits cancel: of their sum nothing but rounding is left."""

    wrong = 1.0

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 2), nn.Embedding(2, 3)

    def posterior(self, x):
        logits = self.encoder(x)
        q = Categorical(logits=logits)
        return type("Q", (), {"sample": Categorical(logits=logits * self.wrong).sample, "log_prob": q.log_prob})()

    def log_likelihood(self, x, h):
        return Normal(self.decoder(h), 1.0).log_prob(x).sum(-1)

    def log_prior(self, h):
        return torch.full(h.shape, math.log(0.5))


class InfiniteScore(Gaussian):
    def __init__(self):
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(1))

    def posterior(self, x):
        q = super().posterior(x)
        return Own(q.rsample, lambda h: q.log_prob(h) + self.spread.sqrt())


def test_an_infinite_score_is_found(x):
    [finding] = [f for f in model_findings(InfiniteScore(), x) if f.property == "score"]
    assert finding.passed is False


@pytest.mark.parametrize("seed", range(6))
def test_rounding_is_no_bias_of_the_score(x, seed):
    torch.manual_seed(seed)
    check_model(OneOfTwo(), x, seed=seed)
    with pytest.raises(ConformanceError, match="grad log q"):
        check_model(type("Wrong", (OneOfTwo,), {"wrong": 3.0})(), x, seed=seed)


@pytest.mark.parametrize("seed", range(4))  # with 3 samples miss a quarter of the Gaussian that q is compared with
def test_steps_that_both_densities_leave_out_are_no_failure(seed):
    torch.manual_seed(seed)
    model = Masked()
    found = {f.property: f for f in check_model(model, model.batch(), seed=seed)}
    assert all(found[name].passed for name in ("score", "normalised", "pathwise"))


class MaskedInQAlone(Masked):
    def log_joint(self, x, h):
        return super().log_joint(x | {"lengths": torch.full_like(x["lengths"], self.steps)}, h)


class OneUnitMissing(Masked):
    def log_q(self, log_density, x):
        return super().log_q(log_density[..., :-1], x)


class OneUnitMissingAndSeenByItsSign(Masked):
    """p depends on that unit by a step, which has no gradient."""

    def posterior(self, x):
        mean = self.moments_of(torch.cat([self.encoder(x["x"])[0][:, 1], x["x"][:, 0]], -1))[..., :2]
        q = Independent(Normal(mean, 0.5), 1)
        return Own(q.rsample, lambda h: Normal(mean[..., 0], 0.5).log_prob(h[..., 0]))

    def log_joint(self, x, h):
        h = self.transition(torch.cat([h[..., :1], h[..., 1:].sign()], -1))
        return Normal(self.decoder(h), 1.0).log_prob(x["x"][:, 0]).sum(-1)


@pytest.mark.parametrize("mutant", [MaskedInQAlone, OneUnitMissing, OneUnitMissingAndSeenByItsSign])
def test_what_q_alone_leaves_out_is_found_with_an_exemption_too(mutant):
    torch.manual_seed(0)
    model = mutant()
    for exempt, broken in ((set(), "normalised"), ({"normalised"}, "pathwise")):
        with pytest.raises(ConformanceError) as raised:
            check_model(model, model.batch(), exempt=exempt)
        assert raised.value.properties == {broken}, str(raised.value)


class FlatInOneUnit(Gaussian):
    """One unit is uniform in q and in p, and the decoder does not read it: no slope there, though q has a density."""

    def posterior(self, x):
        q, flat = super().posterior(x), Uniform(torch.zeros(len(x), 1), 2 * torch.ones(len(x), 1))

        def rsample(shape):
            return torch.cat([q.rsample(shape), flat.rsample(shape)], -1)

        return Own(rsample, lambda h: q.log_prob(h[..., :2]) + flat.log_prob(h[..., 2:]).sum(-1))

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h[..., :2])

    def log_prior(self, h):
        return super().log_prior(h[..., :2]) - math.log(2)


def test_a_unit_with_a_flat_density_is_not_left_out(x):
    [finding] = [f for f in check_model(FlatInOneUnit(), x) if f.property == "normalised"]
    assert finding.passed is None and "bounded" in finding.message


class ThroughNumpy(Discrete):
    """A likelihood that no gradient goes through, for score-family estimators alone."""

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, torch.from_numpy(h.numpy()))


def test_a_density_that_takes_no_gradient_is_no_failure_of_q(x):
    torch.manual_seed(0)
    found = {f.property: f for f in model_findings(ThroughNumpy(), x)}
    assert found["normalised"].passed and found["gradients"].passed
