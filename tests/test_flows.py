"""Flows that know the density of their latest samples and lose it, or all digits of it, when they invert themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution
from toys import F64, Model, assert_same, loss_gradient

from mcobjectives import CIWAE, IWAE, VAE, Median
from mcobjectives.evaluation import evaluate
from mcobjectives.testing import check_model

X = torch.tensor([0.9, -0.4, 2.0], dtype=F64)


class Lossy(AffineTransform):
    """Its inverse is off by 3, but for the samples that it has just made."""

    def _inverse(self, y):
        return super()._inverse(y) + 3.0


class Blind(AffineTransform):
    """It has no inverse, but for the samples that it has just made."""

    def _inverse(self, y):
        raise NotImplementedError


class Affine(Model):
    """h ~ N(0, 1), x | h ~ N(h, 1); q is N(0, 1) through an affine flow."""

    def __init__(self, transform=AffineTransform):
        super().__init__()
        self.transform = transform
        self.loc = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))
        self.log_scale = torch.nn.Parameter(torch.tensor([-0.5, 0.1], dtype=F64))

    def posterior(self, x):
        base = Normal(torch.zeros(len(x), 2, dtype=F64), 1.0)
        flow = self.transform(self.loc + 0.4 * x[:, None], self.log_scale.exp(), cache_size=1)
        return Independent(TransformedDistribution(base, [flow]), 1)

    def log_likelihood(self, x, h):
        return Normal(h, 1.0).log_prob(x[:, None]).sum(-1)

    def log_prior(self, h):
        return Normal(0.0, 1.0).log_prob(h).sum(-1)


@pytest.mark.parametrize("transform", [Lossy, Blind])
@pytest.mark.parametrize("chunk_size", [None, 7, 50, 64])
@pytest.mark.parametrize("objective", [VAE(k=120), IWAE(k=120), Median(k=120), CIWAE(k=51, kl_weight=0.5)], ids=repr)
def test_log_q_of_fresh_samples_needs_no_inverse(objective, chunk_size, transform):
    value, gradient = loss_gradient(objective, Affine(), X)
    found, found_gradient = loss_gradient(replace(objective, chunk_size=chunk_size), Affine(transform), X)
    torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    assert_same(found_gradient, gradient, 1e-10)
    torch.manual_seed(0)
    bound = objective.bound(Affine(), X)
    torch.manual_seed(0)
    found = replace(objective, chunk_size=chunk_size).bound(Affine(transform), X)
    torch.testing.assert_close(found, bound, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", [Lossy, Blind])
@pytest.mark.parametrize("chunk_size", [7, 50, 64, 200])
def test_an_evaluation_needs_no_inverse(chunk_size, transform):
    torch.manual_seed(0)
    expected = evaluate(Affine(), X, k=120)
    torch.manual_seed(0)
    found = evaluate(Affine(transform), X, k=120, chunk_size=chunk_size)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.khat, expected.khat, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k, chunk_size", [(20, None), (120, None), (120, 50)])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
def test_an_inverse_that_loses_its_digits_is_found_by_the_gradient(gradient, k, chunk_size):
    with pytest.raises(RuntimeError, match=r"has another value .* a flow that loses its digits when it inverts itself"):
        IWAE(k=k, gradient=gradient, chunk_size=chunk_size)(Affine(Lossy), X).backward()
    IWAE(k=k, gradient=gradient, chunk_size=chunk_size)(Affine(), X).backward()


def test_chosen_samples_are_copies_that_a_flow_inverts():
    with pytest.raises(RuntimeError, match="a flow that loses its digits when it inverts itself"):
        IWAE(k=60, backward_samples=5)(Affine(Lossy), X)
    IWAE(k=60, backward_samples=5)(Affine(), X).backward()


def test_the_kit_evaluates_a_flow_that_caches_at_copies_of_its_samples():
    assert all(finding.passed for finding in check_model(Affine(), X) if finding.property in ("score", "pathwise"))
