"""Flows that know the density of their latest samples and lose it, or all digits of it, when they invert themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Independent,
    IndependentTransform,
    LogNormal,
    Normal,
    SigmoidTransform,
    StackTransform,
    Transform,
    TransformedDistribution,
    constraints,
)
from toys import F64, Model, assert_same, loss_gradient

from mcobjectives import CIWAE, IWAE, VAE, Median, ModelError, Split
from mcobjectives.evaluation import evaluate
from mcobjectives.sampling import caches, without_inverse
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


class OneWay(Transform):
    """It defines no inverse at all."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, loc, scale, cache_size=0):
        super().__init__(cache_size=cache_size)
        self.loc, self.scale = loc, scale

    def with_cache(self, cache_size=1):
        return OneWay(self.loc, self.scale, cache_size)

    def _call(self, x):
        return self.loc + self.scale * x

    def log_abs_det_jacobian(self, x, y):
        return self.scale.log().expand(x.shape)


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


@pytest.mark.parametrize("transform", [Lossy, Blind, OneWay])
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


@pytest.mark.parametrize("transform", [Lossy, Blind, OneWay])
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


class Dropping(Affine):
    """A second layer whose network drops at random, in samples and in log q alike."""

    def __init__(self):
        super().__init__()
        self.upper = torch.nn.Linear(2, 1, dtype=F64)

    def posterior(self, x):
        return _Layers(super().posterior(x), self.upper)

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h[0])

    def log_prior(self, h):
        return super().log_prior(h[0]) + Normal(0.0, 1.0).log_prob(h[1]).sum(-1)


class _Layers:
    has_rsample = False

    def __init__(self, first, upper):
        self.first, self.upper = first, upper

    def _second(self, h1):
        return Independent(Normal(torch.nn.functional.dropout(self.upper(h1), 0.3), 1.0), 1)

    def sample(self, shape):
        h1 = self.first.sample(shape)
        return h1, self._second(h1).sample()

    def log_prob(self, h):
        return self.first.log_prob(h[0]) + self._second(h[0]).log_prob(h[1])


@pytest.mark.parametrize("gradient", ["score", "vimco", "rws"])
@pytest.mark.parametrize("k, chunk_size", [(60, None), (50, 20), (100, 75), (50, 5)])
def test_a_dropout_in_q_repeats_itself_in_the_score_of_chunks(gradient, k, chunk_size):
    model, objective = Dropping(), IWAE(k=k, gradient=gradient, chunk_size=chunk_size)
    value, _ = loss_gradient(objective, model, X)
    torch.manual_seed(0)
    torch.testing.assert_close(-objective.bound(model, X).mean(), value, rtol=1e-12, atol=1e-12)


def test_what_caches_is_told():
    normal, cached = Normal(torch.zeros(3, 2), 1.0), AffineTransform(0.0, 2.0, cache_size=1)
    plain = AffineTransform(0.0, 2.0)
    assert not any(map(caches, (normal, Independent(normal, 1), TransformedDistribution(normal, [plain]))))
    for transform in (
        cached,
        cached.inv,
        ComposeTransform([plain, cached]),
        IndependentTransform(plain, 1, cache_size=1),
    ):
        flow = TransformedDistribution(normal, [plain, transform])
        assert caches(flow) and caches(Independent(flow, 0)), transform


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: ComposeTransform([t]), lambda t: IndependentTransform(t, 0, t._cache_size)]
)
def test_a_transform_without_an_inverse_is_named_before_any_compute(wrap):
    model = Affine(lambda *parameters, cache_size: wrap(OneWay(*parameters, cache_size=cache_size)))
    for gradient in ("stl", "dreg", "score", "vimco"):
        with pytest.raises(ModelError, match=rf"^gradient='{gradient}' .* OneWay of q has no inverse: use grad"):
            IWAE(k=3, gradient=gradient)(model, X)
    with pytest.raises(ModelError, match=r"^Split takes .* OneWay of q has no inverse: use an objective"):
        Split(generative=IWAE(k=3), inference=VAE(k=3))(model, X)
    with pytest.raises(ModelError, match=r"^backward_samples=2 takes .* has no inverse: use all samples"):
        IWAE(k=3, backward_samples=2)(model, X)
    assert torch.isfinite(IWAE(k=3, gradient="dreg").bound(model, X)).all()
    model.transform = lambda *parameters, cache_size: wrap(OneWay(*parameters))
    with pytest.raises(ModelError, match=r"^OneWay of q has no inverse, .* make it with cache_size=1$"):
        IWAE(k=3)(model, X)
    model.transform = lambda *parameters, cache_size: wrap(OneWay(*parameters).inv)
    assert without_inverse(model.posterior(X)) is None


@pytest.mark.parametrize("transform", [SigmoidTransform(), SigmoidTransform().inv, StackTransform([ExpTransform()])])
def test_what_torch_has_an_inverse_of_is_not_refused(transform):
    assert without_inverse(TransformedDistribution(Normal(torch.zeros(1), 1.0), [transform])) is None


def test_reparam_by_its_weights_is_reparam_though_q_caches():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))
            self.log_scale = torch.nn.Parameter(torch.tensor(-0.4, dtype=F64))

        def posterior(self, x):
            base = Normal(self.loc * x, self.log_scale.exp())
            return TransformedDistribution(Independent(base, 1), [ExpTransform(cache_size=1)])

        def log_joint(self, x, h):
            return (LogNormal(0.0, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)).sum(-1)

    model, x, found = Model(), torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=F64), []
    for objective in (IWAE(k=4), Split(generative=IWAE(k=4), inference=IWAE(k=4))):
        torch.manual_seed(0)
        found.append(torch.stack(torch.autograd.grad(objective(model, x), list(model.parameters()))))
    torch.testing.assert_close(found[1], found[0])
