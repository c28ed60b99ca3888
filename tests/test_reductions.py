"""The pure functions on log-weights, and the derivatives taken of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from toys import F64

from mcobjectives import derivatives
from mcobjectives.reductions import (
    effective_sample_size,
    log_mean_exp,
    log_median,
    log_power_mean,
    logsumexp_of_others,
    mean_of_others,
)

LOG_WEIGHTS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
numbers = st.lists(st.floats(-50, 50), min_size=1, max_size=9).map(lambda v: torch.tensor(v, dtype=F64).unsqueeze(1))


def test_log_mean_exp_is_the_log_of_the_mean_along_any_dimension():
    torch.testing.assert_close(log_mean_exp(LOG_WEIGHTS), LOG_WEIGHTS.exp().mean(0).log())
    torch.testing.assert_close(log_mean_exp(LOG_WEIGHTS, 1), LOG_WEIGHTS.exp().mean(1).log())


@given(numbers, st.floats(0.01, 20), st.sampled_from([1, -1]))
@settings(deadline=None, max_examples=50)
def test_power_mean_is_its_definition(log_w, p, sign):
    p, top = sign * p, (sign * log_w).amax()
    definition = sign * top + (p * (log_w - sign * top)).exp().mean(0).log() / p
    torch.testing.assert_close(log_power_mean(log_w, p), definition, rtol=1e-9, atol=1e-9)


@given(numbers, st.floats(-6, 6), st.floats(0, 3))
@settings(deadline=None, max_examples=50)
def test_power_mean_is_monotone_in_p_for_every_draw(log_w, p, more):
    assert log_power_mean(log_w, p) <= log_power_mean(log_w, p + more) + 1e-9


@pytest.mark.parametrize("p", [1e-3, 1e-5, 1e-8, 1e-11, 1e-13, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_power_mean_tends_to_the_mean_with_its_first_correction(p, sign):
    correction = sign * p / 2 * LOG_WEIGHTS.var(0, correction=0)
    found = log_power_mean(LOG_WEIGHTS, sign * p)
    torch.testing.assert_close(found, LOG_WEIGHTS.mean(0) + correction, rtol=0, atol=30 * p**2 + 1e-12)


def test_power_mean_has_no_seam_where_the_small_power_formula_takes_over():
    for p in (1e-2, -1e-2):
        across = log_power_mean(LOG_WEIGHTS, p * (1 - 1e-9)), log_power_mean(LOG_WEIGHTS, p)
        torch.testing.assert_close(*across, rtol=0, atol=1e-9)


def test_power_mean_at_one_is_log_mean_exp():
    torch.testing.assert_close(log_power_mean(LOG_WEIGHTS, 1.0), log_mean_exp(LOG_WEIGHTS))


@pytest.mark.parametrize(("p", "limit"), [(1e6, torch.amax), (-1e6, torch.amin)])
def test_power_mean_tends_to_the_extremes(p, limit):
    torch.testing.assert_close(log_power_mean(LOG_WEIGHTS, p), limit(LOG_WEIGHTS, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("p", [-1e3, -1.0, -9e-3, -1e-3, 1e-3, 9e-3, 1.0, 1e3])
def test_power_mean_does_not_overflow(p, dtype):
    wild = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype)
    assert torch.isfinite(log_power_mean(wild, p)).all()
    assert torch.isfinite(derivatives.slopes(lambda v: log_power_mean(v, p), wild)).all()


def test_small_powers_keep_float32_precision():
    log_w = LOG_WEIGHTS.float() - 90
    torch.testing.assert_close(log_power_mean(log_w, 1e-6), log_w.mean(0), rtol=0, atol=1e-4)


def test_even_median_is_the_mean_of_the_middle_two_and_odd_the_middle_one():
    assert log_median(torch.tensor([[1.0], [9.0], [2.0], [4.0]])).item() == 3.0
    assert log_median(torch.tensor([[1.0], [9.0], [2.0]])).item() == 2.0


def test_even_median_gives_half_the_gradient_to_each_of_the_middle_two():
    g = derivatives.slopes(log_median, torch.tensor([[1.0], [9.0], [2.0], [4.0]]))
    assert g.squeeze(1).tolist() == [0.0, 0.0, 0.5, 0.5]


def test_effective_sample_size_is_k_for_equal_weights_and_one_for_a_single_one():
    same, one = torch.full((8, 1), -700.0), torch.tensor([[0.0], [-2000.0], [-2000.0]])
    assert effective_sample_size(same).item() == pytest.approx(8)
    assert effective_sample_size(one).item() == 1.0
    w = LOG_WEIGHTS.exp()
    torch.testing.assert_close(effective_sample_size(LOG_WEIGHTS), w.sum(0) ** 2 / (w**2).sum(0))


@pytest.mark.parametrize(
    ("of_others", "of_all"), [(mean_of_others, torch.mean), (logsumexp_of_others, torch.logsumexp)]
)
def test_values_without_each_sample(of_others, of_all):
    expected = [of_all(torch.cat([LOG_WEIGHTS[:i], LOG_WEIGHTS[i + 1 :]]), 0) for i in range(len(LOG_WEIGHTS))]
    torch.testing.assert_close(of_others(LOG_WEIGHTS), torch.stack(expected))


def test_logsumexp_of_others_survives_one_dominating_and_many_vanishing_weights():
    log_w = torch.tensor([[800.0], [-math.inf], [-math.inf], [-800.0]], dtype=F64)
    assert logsumexp_of_others(log_w).squeeze(1).tolist() == [-800.0, 800.0, 800.0, 800.0]


class LargestResult(TorchDispatchMode):
    """Notes the size of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.size = max(self.size, part.numel())
        return result


def test_values_without_each_sample_need_memory_proportional_to_k():
    with LargestResult() as largest:
        logsumexp_of_others(torch.zeros(1000, 2)), mean_of_others(torch.zeros(1000, 2))
    assert largest.size <= 1001 * 2


# Derivatives by autograd alone.


def test_curvatures_are_the_diagonal_of_the_hessian():
    def f(v):
        return (v**3).sum(0) + v[0] * v[1] ** 2

    found = derivatives.curvatures(f, LOG_WEIGHTS)
    for b in range(LOG_WEIGHTS.shape[1]):
        hessian = torch.autograd.functional.hessian(lambda v: f(v.unsqueeze(1)).sum(), LOG_WEIGHTS[:, b])
        torch.testing.assert_close(found[:, b], hessian.diagonal())


def test_curvatures_of_what_is_linear_in_all_or_in_some_samples_are_zero_there():
    assert (derivatives.curvatures(lambda v: v.mean(0), LOG_WEIGHTS) == 0).all()
    partly = derivatives.curvatures(lambda v: v[0] + v[1] ** 2, LOG_WEIGHTS)
    assert (partly[1] == 2).all() and (partly[[0, 2, 3, 4, 5, 6]] == 0).all()


def test_derivatives_work_where_gradients_are_off_and_leave_their_argument_alone():
    with torch.no_grad():
        g = derivatives.slopes(log_mean_exp, LOG_WEIGHTS)
        derivatives.curvatures(log_mean_exp, LOG_WEIGHTS)
    torch.testing.assert_close(g, LOG_WEIGHTS.softmax(0))
    assert not LOG_WEIGHTS.requires_grad and not g.requires_grad


def test_leave_one_out_replaces_each_sample_by_the_mean_of_the_others(monkeypatch):
    def f(v):
        return v[0] * v[1].exp() + v.logsumexp(0)

    expected = []
    for i in range(7):
        replaced = LOG_WEIGHTS.clone()
        replaced[i] = (LOG_WEIGHTS.sum(0) - LOG_WEIGHTS[i]) / 6
        expected.append(f(replaced))
    torch.testing.assert_close(derivatives.leave_one_out(f, LOG_WEIGHTS), torch.stack(expected))
    monkeypatch.setattr(derivatives, "_ELEMENTS_AT_ONCE", 2 * 7 * 5)  # two samples at a time, one in the last round
    torch.testing.assert_close(derivatives.leave_one_out(f, LOG_WEIGHTS), torch.stack(expected))
