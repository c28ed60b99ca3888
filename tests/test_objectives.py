"""The objectives as pure functions and as values on models; every one of the registry is asked."""

from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Independent, Normal
from toys import (
    F64,
    Curved,
    Gaussian1D,
    Jackknife,
    Largest,
    LinearGaussian,
    Mixed,
    PartlyLargest,
    TwoLayers,
    assert_same,
    exact_gradient,
    gaussian_grid,
    gradients,
    loss_gradient,
    registered,
)

from mcobjectives import (
    CIWAE,
    IWAE,
    MIWAE,
    VAE,
    LAlpha,
    Median,
    ModelError,
    Objective,
    Power,
    Split,
    derivatives,
    objective_names,
)
from mcobjectives.testing import ConformanceError, check_objective

K = 6
EVERY = registered(K)
every = pytest.mark.parametrize("objective", EVERY, ids=repr)
log_weights = st.lists(st.floats(-30, 30), min_size=K, max_size=K).map(
    lambda v: torch.tensor(v, dtype=F64).unsqueeze(1)
)
quick = settings(deadline=None, max_examples=15)
LOG_WEIGHTS = torch.randn(K, 4, generator=torch.Generator().manual_seed(3), dtype=F64) * 2


def test_the_registry_has_the_papers_seven():
    assert {"vae", "iwae", "power", "median", "l_alpha", "ciwae", "miwae"} <= set(objective_names())
    assert {type(o).__name__ for o in EVERY} >= {"VAE", "IWAE", "Power", "Median", "LAlpha", "CIWAE", "MIWAE"}


# Identities of F.


@every
@given(log_weights, st.floats(-1e3, 1e3))
@quick
def test_scaling_all_weights_shifts_the_objective(objective, log_w, by):
    shifted = objective.reduce(log_w + by) - by
    torch.testing.assert_close(shifted, objective.reduce(log_w), rtol=0, atol=1e-9)


@every
@given(log_weights)
@quick
def test_slopes_sum_to_one_and_are_never_negative(objective, log_w):
    g = objective.slopes(log_w)
    torch.testing.assert_close(g.sum(0), torch.ones(1, dtype=F64))
    assert (g >= 0).all()


@every
@given(log_weights, st.permutations(range(K)))
@quick
def test_samples_are_exchangeable(objective, log_w, order):
    k1 = getattr(objective, "k1", K)  # within groups, and whole groups, for MIWAE
    within = [i for start in range(0, K, k1) for i in order if start <= i < start + k1]
    groups = [g * k1 + j for g in sorted(range(K // k1), key=lambda g: order[g]) for j in range(k1)]
    for permutation in (within, groups):
        torch.testing.assert_close(objective.reduce(log_w[permutation]), objective.reduce(log_w), rtol=0, atol=1e-10)


@pytest.mark.parametrize("objective", registered(1), ids=repr)
@given(st.floats(-1e4, 1e4))
@quick
def test_one_sample_gives_its_log_weight(objective, value):
    assert objective.reduce(torch.tensor([[value]], dtype=F64)).item() == pytest.approx(value, abs=1e-9)


@every
@pytest.mark.parametrize("value", [-1e4, -90.0, 0.0, 3.5, 1e4])
def test_constant_weights_give_the_constant(objective, value):
    assert objective.reduce(torch.full((K, 1), value, dtype=F64)).item() == pytest.approx(value, abs=1e-9)


@every
@given(log_weights)
@quick
def test_the_objective_lies_between_the_smallest_and_the_largest_log_weight(objective, log_w):
    f = objective.reduce(log_w)
    assert log_w.amin() - 1e-9 <= f.item() <= log_w.amax() + 1e-9


@every
@given(log_weights, st.integers(0, K - 1), st.floats(0, 20))
@quick
def test_a_larger_weight_never_lowers_the_objective(objective, log_w, i, by):
    raised = log_w.clone()
    raised[i] += by
    assert objective.reduce(raised).item() >= objective.reduce(log_w).item() - 1e-9


@every
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_and_weights_are_finite_at_extreme_log_weights(objective, dtype):
    wild = torch.tensor([1e4, -1e4, 1e4, 0.0, -1e4, 9999.0], dtype=dtype).unsqueeze(1)
    for log_w in (wild, -wild, wild.abs(), -wild.abs()):
        for found in (objective.reduce, objective.slopes, objective.curvatures, objective.leave_one_out):
            assert torch.isfinite(found(log_w)).all()
            assert found(log_w).dtype == dtype


@pytest.mark.parametrize("objective", [*EVERY, Curved(k=K), Jackknife(k=K)], ids=repr)
def test_gradcheck(objective):
    log_w = LOG_WEIGHTS.clone().requires_grad_()
    assert torch.autograd.gradcheck(objective.reduce, log_w)
    if objective.smooth:
        assert torch.autograd.gradgradcheck(objective.reduce, log_w)


@every
def test_data_points_do_not_mix(objective):
    apart = torch.cat([objective.reduce(column) for column in LOG_WEIGHTS.split(1, dim=1)])
    torch.testing.assert_close(objective.reduce(LOG_WEIGHTS), apart, rtol=0, atol=1e-12)


@every
@given(log_weights)
@quick
def test_closed_forms_equal_autograd_on_reduce(objective, log_w):
    for closed, general in (
        (objective.slopes, derivatives.slopes),
        (objective.curvatures, derivatives.curvatures),
        (objective.leave_one_out, derivatives.leave_one_out),
    ):
        torch.testing.assert_close(closed(log_w), general(objective.reduce, log_w), rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", [1e-12, -1e-9, 1e-6, -1e-4, 9e-3, 0.3, -2.0, 30.0])
def test_closed_forms_of_power_hold_for_powers_of_every_size(p):
    power = Power(k=K, p=p)
    for closed, general in (
        (power.slopes, derivatives.slopes),
        (power.curvatures, derivatives.curvatures),
        (power.leave_one_out, derivatives.leave_one_out),
    ):
        torch.testing.assert_close(closed(LOG_WEIGHTS), general(power.reduce, LOG_WEIGHTS), rtol=0, atol=1e-9)


# How the objectives relate.


@given(log_weights)
@quick
def test_special_cases_meet(log_w):
    vae, iwae = VAE(k=K).reduce(log_w), IWAE(k=K).reduce(log_w)

    def same(objective, value):
        torch.testing.assert_close(objective.reduce(log_w), value, rtol=0, atol=1e-10)

    same(Power(k=K, p=1.0), iwae)
    same(Power(k=K, p=1e-13), vae)
    same(CIWAE(k=K, beta=1.0), vae)
    same(CIWAE(k=K, beta=0.0), iwae)
    same(MIWAE(k1=1, k2=K), vae)
    same(MIWAE(k1=K, k2=1), iwae)
    same(Split(generative=IWAE(k=K), inference=MIWAE(2, 3)), iwae)
    assert iwae >= vae - 1e-12


def test_miwae_averages_over_groups_what_iwae_gives_within_each():
    log_w = LOG_WEIGHTS
    by_hand = (IWAE(k=2).reduce(log_w[:2]) + IWAE(k=2).reduce(log_w[2:4]) + IWAE(k=2).reduce(log_w[4:])) / 3
    torch.testing.assert_close(MIWAE(k1=2, k2=3).reduce(log_w), by_hand)
    by_hand = (IWAE(k=3).reduce(log_w[:3]) + IWAE(k=3).reduce(log_w[3:])) / 2
    torch.testing.assert_close(MIWAE(k1=3, k2=2).reduce(log_w), by_hand)


def test_miwae_refuses_another_number_of_samples():
    with pytest.raises(ValueError, match=r"k1 \* k2 = 6"):
        MIWAE(k1=2, k2=3).reduce(torch.zeros(5, 1))


def test_a_power_above_one_may_exceed_iwae_by_its_stated_margin_only():
    one = torch.tensor([[0.0]] + [[-1e3]] * (K - 1), dtype=F64)
    assert (Power(k=K, p=4.0).reduce(one) - IWAE(k=K).reduce(one)).item() == pytest.approx(0.75 * math.log(K))


# On a model whose log p(x) is known.


@every
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_at_the_posterior_every_sample_gives_log_p(objective, dtype):
    if isinstance(objective, LAlpha):
        pytest.skip("not a bound on log p(x)")
    model = LinearGaussian(dtype=dtype)
    x = model.data()
    for seed in range(5):
        torch.manual_seed(seed)
        torch.testing.assert_close(objective.bound(model, x), model.log_marginal(x), rtol=0, atol=1e-5)


def test_l_alpha_tempers_the_prior_and_the_posterior():
    model = LinearGaussian().off_posterior()
    x, objective = model.data(), LAlpha(k=K, alpha=0.3)
    torch.manual_seed(0)
    h = model.posterior(x).rsample((K,))
    expected = model.log_likelihood(x, h) + 0.3 * (model.log_prior(h) - model.posterior(x).log_prob(h))
    torch.manual_seed(0)
    torch.testing.assert_close(objective.bound(model, x), expected.mean(0))


@every
def test_kl_weight_tempers_any_objective(objective):
    model = LinearGaussian().off_posterior()
    x, tempered = model.data(), replace(objective, kl_weight=0.4)
    assert tempered.tempering == pytest.approx(0.4 * objective.tempering)
    torch.manual_seed(0)
    h = model.posterior(x).rsample((K,))
    ratio = model.log_prior(h) - model.posterior(x).log_prob(h)
    torch.manual_seed(0)
    torch.testing.assert_close(
        tempered.bound(model, x), objective.reduce(model.log_likelihood(x, h) + tempered.tempering * ratio)
    )


def test_kl_weight_of_l_alpha_multiplies_alpha_and_one_is_the_vae():
    model = LinearGaussian().off_posterior()
    x = model.data()
    same = [LAlpha(k=3, alpha=0.5, kl_weight=2.0), LAlpha(k=3, alpha=1.0), VAE(k=3)]
    values = [loss_gradient(o, model, x) for o in same]
    for value, gradient in values[1:]:
        torch.testing.assert_close(value, values[0][0])
        assert_same(gradient, values[0][1], 1e-12)


def test_the_loss_is_minus_the_mean_of_the_bound():
    model = LinearGaussian().off_posterior()
    x = model.data()
    for objective in EVERY:
        torch.manual_seed(0)
        bound = objective.bound(model, x)
        assert bound.shape == (4,) and not bound.requires_grad
        loss, _ = loss_gradient(objective, model, x)
        assert loss.shape == () and loss.item() == pytest.approx(-bound.mean().item(), abs=1e-12)


# Expected values in one dimension, against sums over a grid in h that share nothing with the library.


def _one_dimensional():
    model = Gaussian1D()
    h = np.linspace(-9, 9, 901)
    mean, scale, x = 0.2 + 0.3 * 0.9, math.exp(-0.1), 0.9
    log_q = -0.5 * ((h - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
    residual = (x - 0.6 * h - 0.3 * np.sin(h)) / 0.8
    log_p = -0.5 * residual**2 - math.log(0.8) - 0.5 * h**2 - math.log(2 * math.pi)
    q = np.exp(log_q) * (h[1] - h[0])
    return model, q, log_p - log_q, math.log(np.exp(log_p).sum() * (h[1] - h[0]))


def test_expected_values_of_vae_and_iwae_equal_quadrature():
    model, q, log_w, log_p_x = _one_dimensional()
    vae = (q * log_w).sum()
    iwae2 = (q[:, None] * q * (np.logaddexp(log_w[:, None], log_w) - math.log(2))).sum()
    grid = gaussian_grid(2, 1, 120)
    x = model.on(grid)
    assert (grid.weight * VAE(k=2).bound(model, x)).sum().item() == pytest.approx(vae, abs=1e-10)
    assert (grid.weight * IWAE(k=2).bound(model, x)).sum().item() == pytest.approx(iwae2, abs=1e-10)
    assert vae + 0.01 < iwae2 < log_p_x - 0.01


# The closed-form KL.


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


class DiagonalGaussian(LinearGaussian):
    def posterior(self, x):
        normal = torch.distributions.Normal(x @ self.q_gain.T + self.q_offset, self.q_scale.diagonal())
        return torch.distributions.Independent(normal, 1)


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


def test_a_subclass_that_only_changes_reduce_is_looked_at_anew():
    class Biggest(IWAE):
        def reduce(self, log_w):
            return log_w.amax(0)

    class Bent(VAE):
        def reduce(self, log_w):
            return log_w.logsumexp(0)

    with pytest.raises(ValueError, match="its slopes dF/dlog w jump"):
        Biggest(k=4, gradient="dreg")
    assert Bent(k=3).slopes_vary and not VAE(k=3).slopes_vary


def test_objectives_that_compare_by_identity_are_not_equal():
    @dataclass(frozen=True, eq=False)
    class Weighted(Objective):
        k: int = 2
        w: torch.Tensor = None

        def reduce(self, log_w):
            return (self.w * log_w).mean(0)

    one = Weighted(w=torch.tensor(0.25))
    assert one == one and one != Weighted(w=torch.tensor(3.0)) and one != Weighted(w=torch.tensor(0.25))


def test_an_option_named_like_miwaes_is_the_objectives_own():
    @dataclass(frozen=True)
    class Curvature(Objective):
        k: int = 2
        k1: float = 0.5

        def reduce(self, log_w):
            return self.k1 * log_w.mean(0)

    assert Curvature(k1=0.25).k1 == 0.25
    with pytest.raises(ValueError, match="k1 must be an integer"):
        MIWAE(k1=0.5, k2=2)


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


# Objectives as values.


@every
def test_objectives_are_frozen_comparable_picklable_and_printable(objective):
    twin = pickle.loads(pickle.dumps(objective))
    assert twin == objective and hash(twin) == hash(objective) and copy.deepcopy(objective) == objective
    assert eval(repr(objective)) == objective
    assert replace(objective, kl_weight=0.5) != objective
    with pytest.raises(FrozenInstanceError):
        objective.gradient = "stl"


def test_an_objective_prints_what_is_its_own_and_what_was_changed():
    assert repr(IWAE(k=5)) == "IWAE(k=5)"
    assert repr(MIWAE(2, 3, gradient="dreg", chunk_size=4)) == "MIWAE(k1=2, k2=3, gradient='dreg', chunk_size=4)"
    assert re.fullmatch(r"Split\(generative=IWAE\(k=6\), .*\)", repr(Split(IWAE(k=6), MIWAE(2, 3))))


def test_an_objective_used_once_pickles_and_compares_as_before():
    model, objective = LinearGaussian(), IWAE(k=3, gradient="dreg")
    objective(model, model.data())
    assert pickle.loads(pickle.dumps(objective)) == objective == IWAE(k=3, gradient="dreg")


def test_ciwae_without_vae_is_iwae_where_a_weight_is_zero():
    log_w = torch.tensor([[0.0], [-torch.inf]], dtype=F64)
    torch.testing.assert_close(CIWAE(k=2, beta=0.0).reduce(log_w), IWAE(k=2).reduce(log_w))


@pytest.mark.parametrize("objective", [IWAE(k=20, kl_weight=0.0), LAlpha(k=20, alpha=0.0)], ids=repr)
def test_without_the_prior_its_support_still_counts(objective):
    class Bounded(LinearGaussian):
        def log_prior(self, h):
            inside = (h.abs() < 1.0).all(-1)
            return torch.where(inside, 0.0, -torch.inf).to(h) + 0 * super().log_prior(h)

    model = Bounded()
    torch.manual_seed(0)
    h = model.posterior(model.data()).rsample((20,))
    likelihood, inside = model.log_likelihood(model.data(), h), (h.abs() < 1.0).all(-1)
    assert not inside.all() and inside.any(0).all()
    torch.manual_seed(0)
    if isinstance(objective, LAlpha):  # a mean of log-weights is -inf then, and says so
        with pytest.raises(ValueError, match=r"not finite .* some of their weights are zero"):
            objective.bound(model, model.data())
    else:
        expected = torch.where(inside, likelihood, -torch.inf).logsumexp(0) - math.log(20)
        torch.testing.assert_close(objective.bound(model, model.data()), expected)


def test_slopes_are_looked_at_once_for_all_that_are_estimated_alike(monkeypatch):
    looked = []
    monkeypatch.setattr(
        "mcobjectives.objective.slopes_jump", lambda slopes, k: looked.append(k) or derivatives.slopes_jump(slopes, k)
    )
    for t in (0.1, 0.2, 1.0):
        IWAE(k=37, gradient="dreg", kl_weight=t)
    assert looked == [37]

    @dataclass(frozen=True)
    class Listed(Objective):
        k: int = 38
        options: list = field(default_factory=list)

        def reduce(self, log_w):
            return log_w.amax(0)

    with pytest.raises(ValueError, match="jump"):
        Listed(gradient="dreg")


def test_jumps_are_not_remembered_of_what_is_no_plain_option():
    class Either(IWAE):  # a plain subclass, with state beside its fields
        def __init__(self, jumps, **options):
            object.__setattr__(self, "jumps", jumps)
            super().__init__(k=3, **options)

        def reduce(self, log_w):
            return log_w.amax(0) if self.jumps else super().reduce(log_w)

        def slopes(self, log_w):
            return Objective.slopes(self, log_w)

    Either(False, gradient="dreg")
    for jumps in (True, [True], (1,)):
        with pytest.raises(ValueError, match="jump"):
            Either(jumps, gradient="dreg")


@dataclass(frozen=True)
class Tabled(Objective):
    """A plugin that keeps something beside its fields, and has an option that is on by default."""

    k: int = 4
    centred: bool = True

    def __post_init__(self):
        object.__setattr__(self, "table", torch.arange(self.k))
        super().__post_init__()

    def reduce(self, log_w):
        return log_w.mean(0) + 0 * self.table.sum()


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda objective: pickle.loads(pickle.dumps(objective))])
def test_copies_keep_what_a_plugin_has_set(twin):
    objective = Tabled(k=3)
    assert objective.slopes_vary is False  # cached
    found = twin(objective)
    assert found == objective and torch.equal(found.table, objective.table) and "slopes_vary" not in vars(found)


def test_a_repr_shows_an_option_that_was_switched_off():
    off = Tabled(centred=False)
    assert repr(off) == "Tabled(k=4, centred=False)" and eval(repr(off)) == off
    assert repr(VAE()) == "VAE(k=1)" and repr(VAE(analytic_kl=True)) == "VAE(k=1, analytic_kl=True)"


BAD_ARGUMENTS = [
    *[(IWAE, {"k": k}, "k must be an integer of at least 1") for k in (0, -3, 2.0, True, "5", None, float("nan"))],
    *[(MIWAE, {name: n}, f"{name} must be an integer") for name in ("k1", "k2") for n in (0, 1.5, True)],
    *[
        (Power, {"p": p}, "p must be a finite number other than 0")
        for p in (0, 0.0, math.nan, math.inf, -math.inf, "2")
    ],
    *[(CIWAE, {"beta": b}, r"beta must be a number in \[0, 1\]") for b in (-0.1, 1.1, math.nan, True, None)],
    *[(LAlpha, {"alpha": a}, "alpha must be a finite number") for a in (-1.0, math.nan, math.inf)],
    *[(VAE, {"kl_weight": t}, "kl_weight must be a finite number") for t in (-0.1, math.nan, math.inf, "1")],
    *[(IWAE, {"chunk_size": c}, "chunk_size must be an integer") for c in (0, 2.5, True)],
    *[(IWAE, {"backward_samples": m}, "backward_samples must be an integer") for m in (0, 2.5, True)],
    (IWAE, {"k": 5, "backward_samples": 6}, "backward_samples must be at most k = 5"),
    (IWAE, {"gradient": "reparametrise"}, "unknown estimator 'reparametrise': choose from .*dreg.*reparam"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named_with_what_is_allowed(make, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**arguments)
    assert repr(next(reversed(arguments.values()))) in str(error.value)


def test_numpy_integers_and_whole_parameters_are_fine():
    assert IWAE(k=np.int64(5)).reduce(torch.zeros(5, 1)).item() == 0
    assert Power(k=2, p=2) == Power(k=2, p=2.0) and CIWAE(k=2, beta=1) == CIWAE(k=2, beta=1.0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"generative": IWAE(k=4), "inference": MIWAE(3, 2)}, "same k, got 4 and 6"),
        ({"generative": IWAE(k=4), "inference": "miwae"}, "inference must be an objective"),
        ({"generative": IWAE(k=4, chunk_size=2), "inference": IWAE(k=4)}, "generative: chunk_size"),
        ({"generative": IWAE(k=4), "inference": IWAE(k=4, backward_samples=2)}, "inference: chunk_size"),
        ({"generative": IWAE(k=4), "inference": VAE(k=4, analytic_kl=True)}, "analytic_kl"),
        ({"generative": IWAE(k=4), "inference": IWAE(k=4, kl_weight=0.5)}, "same kl_weight"),
        ({"generative": IWAE(k=4), "inference": IWAE(k=4), "kl_weight": 0.5}, "same kl_weight"),
        ({"generative": IWAE(k=4), "inference": IWAE(k=4), "gradient": "dreg"}, "to the inference part"),
    ],
)
def test_a_split_says_which_part_does_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        Split(**parts)


# Objectives refused by estimators, before any compute.


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("make", [Median, Largest, PartlyLargest])
@pytest.mark.parametrize("k", [3, 4, 50])
def test_jumping_slopes_are_refused_with_what_to_use_instead(make, gradient, k):
    with pytest.raises(ValueError, match=f"gradient='{gradient}' is wrong for {make.__name__}.*use gradient='reparam'"):
        make(k=k, gradient=gradient)
    for valid in ("reparam", "score", "vimco"):
        make(k=k, gradient=valid)


def test_slopes_that_are_said_to_jump_are_refused_though_none_was_seen_to():
    class Declared(IWAE):
        smooth = False

    for gradient in ("stl", "dreg"):
        with pytest.raises(ValueError, match=f"gradient='{gradient}' is wrong for Declared"):
            Declared(k=3, gradient=gradient)


@pytest.mark.parametrize("p", [-200.0, -20.0, 5.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("k", [1, 2, 8, 50])
def test_steep_slopes_are_not_taken_for_jumping_ones(p, k):
    assert Power(k=k, p=p, gradient="dreg").gradient == "dreg"


def test_vimco_needs_two_samples():
    with pytest.raises(ValueError, match=r"at least two samples.*use k >= 2 or gradient='score'"):
        IWAE(k=1, gradient="vimco")


# Precision, compilers, transforms.


@every
def test_the_loss_has_the_dtype_of_the_log_densities(objective):
    model = LinearGaussian(dtype=torch.float32).off_posterior()
    for gradient in ("reparam", "score", "vimco"):
        loss, gradient = loss_gradient(replace(objective, gradient=gradient), model, model.data())
        assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradient.values())


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_under_bf16_autocast_log_weights_are_float32(gradient):
    seen = []

    class Spy(IWAE):
        def reduce(self, log_w):
            seen.append(log_w.dtype)
            return super().reduce(log_w)

    model = LinearGaussian(dtype=torch.float32)
    objective = Spy(k=3, gradient=gradient)
    seen.clear()

    class Half(LinearGaussian):
        def log_likelihood(self, x, h):
            return super().log_likelihood(x, h).bfloat16()

        def log_prior(self, h):
            return super().log_prior(h).bfloat16()

    half = Half(dtype=torch.float32)
    for m in (model, half):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(m, m.data())
        loss.backward()
        assert loss.dtype == torch.float32 and m.q_offset.grad is not None
    assert set(seen) == {torch.float32}


class Plain:
    """A model of numbers without torch.distributions: log-densities are as given, or Gaussian."""

    def __init__(self, loc=0.0, log_p=None, log_q=None, noise=None):
        self.loc, self.noise = loc, noise
        self.log_joint = lambda x, h: -((x - h) ** 2) - h**2 if log_p is None else log_p
        self.log_prob = lambda h: -((h - self.loc) ** 2) / 2 if log_q is None else log_q

    def posterior(self, x):
        return self

    def rsample(self, shape):
        return self.loc + (torch.randn(*shape, 1) if self.noise is None else self.noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_densities_are_subtracted_in_float32(dtype):
    log_p, log_q = torch.full((2, 1), -96.5, dtype=dtype), torch.full((2, 1), 3.125, dtype=dtype)
    bound = VAE(k=2).bound(Plain(log_p=log_p, log_q=log_q), torch.zeros(1))
    assert bound.dtype == torch.float32 and bound.item() == -99.625  # bfloat16 knows -99.5 and -100


def test_vmap_gives_each_data_points_own_gradient():
    noise = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=F64)

    def loss(loc, x):
        return IWAE(k=5)(Plain(loc, noise=noise), x.unsqueeze(0))

    loc, x = torch.tensor(0.3, dtype=F64), torch.tensor([0.9, -2.0, 0.1], dtype=F64)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(loc, x)
    expected = []
    for point in x:
        leaf = loc.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf, point), leaf)[0])
    torch.testing.assert_close(found, torch.stack(expected))


@every
def test_functional_gradients_equal_backward(objective):
    model = LinearGaussian().off_posterior()
    x, bound = model.data(), objective.bind(model)

    def loss(parameters):
        return torch.func.functional_call(bound, parameters, (x,))

    torch.manual_seed(0)
    found = torch.func.grad(loss)({name: p.detach() for name, p in bound.named_parameters()})
    _, expected = loss_gradient(objective, model, x)
    assert_same({name.removeprefix("model."): -g for name, g in found.items()}, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [IWAE(k=6), IWAE(k=6, backward_samples=2)], ids=repr)
def test_a_compiled_loss_gives_the_same_numbers(objective):
    try:
        torch.compile(lambda v: v + 1)(torch.zeros(2))
    except Exception as error:
        pytest.skip(f"no compiler: {type(error).__name__}")

    model = DiagonalGaussian(dtype=torch.float32).off_posterior()
    x = model.data()
    expected = loss_gradient(objective, model, x)
    compiled = torch.compile(objective.bind(model), options={"fallback_random": True})
    torch.manual_seed(0)
    loss = compiled(x)
    torch.testing.assert_close(loss.detach(), expected[0])
    assert_same(gradients(model, -loss), expected[1], 1e-5)


@dataclass(frozen=True)
class Truncated(Objective):
    """A mean of log-weights that are cut off where they are far above it: linear, unless they are."""

    k: int = 2
    cut: float = 30.0

    def reduce(self, log_w):
        return torch.minimum(log_w, log_w.mean(0, keepdim=True) + self.cut).mean(0)


def test_score_takes_for_linear_what_says_so_alone():
    log_w = torch.tensor([[0.0], [-400.0]], dtype=F64)
    objective = Truncated(gradient="score")
    g, bound = objective.slopes(log_w), objective.reduce(log_w)
    assert not objective.linear and torch.equal(objective.weights(log_w).s, g - bound)
    assert VAE(k=2).linear and LAlpha(k=2).linear and not IWAE(k=2).linear


def test_another_reduce_is_not_linear_because_its_parent_is():
    @dataclass(frozen=True)
    class Curved(VAE):
        def reduce(self, log_w):
            return torch.logsumexp(log_w, 0)

    assert not Curved(k=2).linear


def test_slopes_that_vary_far_out_alone_can_be_differentiated():
    @dataclass(frozen=True)
    class Soft(Objective):
        k: int = 8
        cut: float = 8.0

        def reduce(self, log_w):
            over = (log_w - log_w.mean(0, keepdim=True) - self.cut).clamp(min=0)
            return (log_w - over**3 / (1 + over**2)).mean(0)

    assert Soft(gradient="dreg").slopes_differentiable


def test_jumps_far_out_are_found():
    with pytest.raises(ValueError, match="slopes dF/dlog w jump"):
        Truncated(gradient="dreg")


def test_the_kit_refuses_a_wrong_declaration_of_linear():
    @dataclass(frozen=True)
    class Not(Objective):
        k: int = 4
        linear = True

        def reduce(self, log_w):
            return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])

    with pytest.raises(ConformanceError, match="smooth: linear = True is declared, but the slopes"):
        check_objective(Not())


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


@dataclass(frozen=True)
class Trimmed(Objective):
    """The mean of all log-weights but the least: the slopes jump by 1 / (k - 1)."""

    k: int = 300

    def reduce(self, log_w):
        return log_w.sort(0).values[1:].mean(0)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_slopes_that_jump_by_little_are_refused_too(gradient):
    with pytest.raises(ValueError, match="its slopes dF/dlog w jump"):
        Trimmed(gradient=gradient)


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


@pytest.mark.parametrize("name, kind", [("exempt", "frozenset[str]"), ("smooth", "bool"), ("linear", "bool")])
def test_what_a_class_states_is_no_parameter(name, kind):
    """Annotated it would be one: `exempt` the first, in the place of k."""
    value = getattr(Objective, name)
    with pytest.raises(TypeError, match=rf"^Annotated annotates {name} as a field: write `{name} = ...`, without"):
        type("Annotated", (Objective,), {name: value, "__annotations__": {name: kind}})
    type("Stated", (Objective,), {name: value, "__annotations__": {name: f"ClassVar[{kind}]"}})


def test_slopes_that_vary_by_little_vary():
    assert CIWAE(k=4, beta=0.9999).slopes_vary and not CIWAE(k=4, beta=1.0).slopes_vary


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
