"""The objectives as functions of log-weights, and on models whose log p(x) is known; all of the registry are asked."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    EVERY,
    F64,
    Curved,
    Gaussian1D,
    Jackknife,
    K,
    LinearGaussian,
    assert_same,
    every,
    gaussian_grid,
    loss_gradient,
    registered,
)

from mcobjectives import CIWAE, IWAE, MIWAE, VAE, LAlpha, Median, Power, Split, derivatives, objective_names

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


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6, 12])
def test_leave_one_out_in_closed_form_knows_ties_and_zero_weights(k):
    generator = torch.Generator().manual_seed(k)
    log_w = 20 * torch.randn(k, 6, generator=generator, dtype=F64)
    log_w[:, 1], log_w[: k // 2, 2], log_w[0, 3], log_w[:2, 4] = 1.0, log_w[0, 2], -torch.inf, -torch.inf
    groups = [MIWAE(k1=k, k2=1), MIWAE(k1=1, k2=k), *([MIWAE(k1=2, k2=k // 2)] if k % 2 == 0 else [])]
    for objective in (VAE(k=k), Median(k=k), *(CIWAE(k=k, beta=beta) for beta in (0.0, 0.3, 1.0)), *groups):
        found, expected = objective.leave_one_out(log_w), derivatives.leave_one_out(objective.reduce, log_w)
        known = expected.isfinite()
        torch.testing.assert_close(found[known], expected[known], rtol=0, atol=1e-11)
        assert not found[~known].isfinite().any()


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
