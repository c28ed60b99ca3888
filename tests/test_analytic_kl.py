"""analytic_kl: the closed form is the expectation that it replaces, with the model's own prior; else refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from toys import (
    F64,
    DiagonalGaussian,
    Gaussian1D,
    LinearGaussian,
    Mixed,
    TwoLayers,
    assert_same,
    exact_gradient,
    gaussian_grid,
    gradients,
)

from mcobjectives import VAE, ModelError


def test_analytic_kl_has_the_value_and_the_gradient_of_its_expectation():
    model = Gaussian1D()
    grid = gaussian_grid(1, 1, 120)
    x = model.on(grid)
    expected = (grid.weight * VAE(k=1).bound(model, x)).sum()
    gradient = exact_gradient(VAE(k=1), model, x, grid.weight)

    class Normal1D(torch.distributions.Normal):
        def rsample(self, shape=torch.Size()):  # noqa: B008
            return self.loc + self.scale * model.nodes

    class WithNormal:
        log_likelihood, log_prior = model.log_likelihood, model.log_prior

        def posterior(self, x):
            return Normal1D(model.q_m + model.q_n * x, model.q_r.exp())

    objective = VAE(k=1, analytic_kl=True)
    found = (grid.weight * objective.surrogate(WithNormal(), x)).sum()
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    assert_same(gradients(model, found), gradient, 1e-9)


def test_analytic_kl_is_the_textbook_formula_per_data_point():
    model = DiagonalGaussian().off_posterior()
    x = model.data()
    q = model.posterior(x).base_dist
    kl = (q.scale**2 + q.loc**2 - 1 - 2 * q.scale.log()).sum(-1) / 2
    for t in (1.0, 0.3):
        torch.manual_seed(0)
        found = VAE(k=5, analytic_kl=True, kl_weight=t).bound(model, x)
        torch.manual_seed(0)
        h = model.posterior(x).rsample((5,))
        torch.testing.assert_close(found, model.log_likelihood(x, h).mean(0) - t * kl)


def test_analytic_kl_takes_the_models_own_prior():
    class WithPrior(DiagonalGaussian):
        @property
        def prior(self):
            return torch.distributions.Independent(torch.distributions.Normal(torch.ones(2, dtype=F64), 2.0), 1)

        def log_prior(self, h):
            return self.prior.log_prob(h)

    model = WithPrior().off_posterior()
    x = model.data()
    torch.manual_seed(0)
    found = VAE(k=2, analytic_kl=True).bound(model, x)
    torch.manual_seed(0)
    h = model.posterior(x).rsample((2,))
    kl = torch.distributions.kl_divergence(model.posterior(x), model.prior)
    torch.testing.assert_close(found, model.log_likelihood(x, h).mean(0) - kl)


def test_analytic_kl_is_refused_where_prior_is_not_what_log_prior_gives():
    class Scaled(DiagonalGaussian):
        """`prior` is the base distribution of a scaled one."""

        prior = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2, dtype=F64), 1.0), 1)

        def log_prior(self, h):
            return self.prior.log_prob(h / 3) - 2 * math.log(3)

    model = Scaled().off_posterior()
    with pytest.raises(ModelError, match=r"model.log_prior\(h\) is another density than model.prior.log_prob\(h\)"):
        VAE(k=2, analytic_kl=True).bound(model, model.data())
    assert torch.isfinite(VAE(k=2).bound(model, model.data())).all()


def test_a_prior_that_wants_arguments_is_not_taken_for_p_of_h():
    class Conditional(DiagonalGaussian):
        def prior(self, labels):
            raise AssertionError("not to be called")

    class Network(DiagonalGaussian):
        def __init__(self):
            super().__init__()
            self.prior = torch.nn.Linear(1, 2)

    class Called(DiagonalGaussian):
        def prior(self):
            return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2, dtype=F64), 1.0), 1)

    bounds = []
    for make in (DiagonalGaussian, Conditional, Network, Called):
        model = make().off_posterior()
        torch.manual_seed(0)
        bounds.append(VAE(k=2, analytic_kl=True).bound(model, model.data()))
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0])


def test_analytic_kl_is_refused_where_it_is_not_known():
    objective = VAE(k=3, analytic_kl=True)

    class OtherPrior(LinearGaussian):
        def log_prior(self, h):
            return super().log_prior(h / 2) - 2 * math.log(2)

    with pytest.raises(ModelError, match=r"not N\(0, I\)"):
        objective(OtherPrior(), OtherPrior().data())

    class OwnPrior(LinearGaussian):
        def __init__(self):
            super().__init__()
            self.prior_loc = torch.nn.Parameter(torch.zeros(self.q_offset.shape, dtype=F64))

        def log_prior(self, h):  # N(0, I) as yet
            return super().log_prior(h - self.prior_loc)

        def posterior(self, x):
            return torch.distributions.Independent(
                torch.distributions.Normal(x @ self.q_gain.T + self.q_offset, 1.0), 1
            )

    model = OwnPrior()
    with pytest.raises(ModelError, match="log_prior has parameters, which would get no gradient"):
        objective(model, model.data())
    assert torch.isfinite(objective.bound(model, model.data())).all()  # without a graph there is none to lose

    class Cauchy(LinearGaussian):
        def posterior(self, x):
            loc = x @ self.q_gain.T + self.q_offset
            return torch.distributions.Independent(torch.distributions.Cauchy(loc, 1.0), 1)

    with pytest.raises(ModelError, match="no closed-form KL"):
        objective(Cauchy(), Cauchy().data())

    for model, x in ((TwoLayers(), torch.ones(2, dtype=F64)), (Mixed(), torch.ones(2, dtype=F64))):
        with pytest.raises(ModelError, match="torch Distribution"):
            objective(model, x)

    class OddPrior(LinearGaussian):
        prior = "standard normal"

    with pytest.raises(ModelError, match="prior"):
        objective(OddPrior(), OddPrior().data())

    class JointOnly:
        posterior = LinearGaussian().posterior

        def log_joint(self, x, h):
            raise AssertionError("computed before the check")

    with pytest.raises(ModelError, match="log_likelihood"):
        objective(JointOnly(), torch.zeros(2, 3, dtype=F64))


@pytest.mark.parametrize("gradient", ["stl", "dreg", "score", "vimco", "rws"])
def test_analytic_kl_goes_with_reparam_only(gradient):
    with pytest.raises(ValueError, match=r"analytic_kl=True.*use gradient='reparam' or analytic_kl=False"):
        VAE(k=3, analytic_kl=True, gradient=gradient)


def test_the_analytic_kl_compares_priors_of_unlike_dtypes():
    class Model:
        prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)

        def posterior(self, x):
            return Independent(Normal(x, torch.ones_like(x)), 1)

        def log_prior(self, h):
            return Normal(0.0, 1.0).log_prob(h.double()).sum(-1)

        def log_likelihood(self, x, h):
            return -((x - h) ** 2).sum(-1)

    x = torch.randn(3, 2)
    assert torch.isfinite(VAE(k=2, analytic_kl=True)(Model(), x))


@pytest.mark.filterwarnings("ignore")
def test_analytic_kl_takes_a_prior_that_is_a_method():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.at, self.shift = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (0.5, 0.0))

        def posterior(self, x):
            return Independent(Normal(x + self.shift, 0.5), 1)

        def prior(self):
            return Independent(Normal(self.at.expand(2), 2.0), 1)

        def log_prior(self, h):
            return self.prior().log_prob(h)

        def log_likelihood(self, x, h):
            return Normal(h, 1.0).log_prob(x).sum(-1)

    model, x = Method(), torch.randn(3, 2, dtype=F64)
    VAE(k=2, analytic_kl=True)(model, x).backward()
    torch.testing.assert_close(model.at.grad, (model.at.detach() - x).sum(1).mean() / 4)  # KL's own: (m - mean) / 2^2


@pytest.mark.parametrize(("dtype", "spread"), [(F64, 1.02), (torch.bfloat16, 1.1)])
def test_a_prior_that_is_nearly_standard_is_none(dtype, spread):
    class Model:
        def posterior(self, x):
            return Independent(Normal(x, torch.ones_like(x)), 1)

        def log_likelihood(self, x, h):
            return Normal(h, 1.0).log_prob(x).sum(-1)

        def log_prior(self, h):
            return Normal(0.0, spread).log_prob(h).sum(-1)

    with pytest.raises(ModelError, match=r"not N\(0, I\)"):
        VAE(k=3, analytic_kl=True)(Model(), torch.zeros(2, 3, dtype=dtype))
