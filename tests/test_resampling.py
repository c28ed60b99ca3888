"""backward_samples: a selection that is unbiased, and the gradient that it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chunks import EVERY, X, assert_same_in_chunks, with_every_estimator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import (
    F64,
    Discrete,
    Gaussian1D,
    Jackknife,
    LinearGaussian,
    Mixed,
    TwoLayers,
    assert_same,
    gradients,
    loss_gradient,
)

import mcobjectives.bounds
from mcobjectives import CIWAE, IWAE, MIWAE, VAE, LAlpha, Median, Power, Split
from mcobjectives.reductions import effective_sample_size
from mcobjectives.resampling import inclusion, select
from mcobjectives.sampling import Samples

pytestmark = pytest.mark.filterwarnings("ignore:gradient='stl' is biased")


importances = st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=1, max_size=12).filter(lambda v: max(v) > 0)

offsets = st.integers(0, 1008).map(lambda i: i / 1009)

# The selection.


@given(importances, st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_inclusion_probabilities_follow_the_threshold_rule(values, m):
    v = torch.tensor(values, dtype=F64)
    m = min(m, len(values))
    pi = inclusion(v.unsqueeze(1), m)[0].squeeze(1)
    assert ((pi >= 0) & (pi <= 1)).all() and ((pi > 0) == (v > 0)).all()
    assert pi.sum().item() == pytest.approx(min(m, int((v > 0).sum())), abs=1e-9)
    rest = pi < 1
    if rest.any() and (v[rest] > 0).any():
        tau = (v / pi)[rest & (v > 0)]
        torch.testing.assert_close(tau, tau[:1].expand_as(tau))  # proportional below the threshold
        assert (v[pi == 1] >= tau[0] * (1 - 1e-9)).all()  # certain above it


@given(importances, st.integers(1, 12), offsets)
@settings(deadline=None, max_examples=200)
@example([1.0, 1.0, 1.0, 0.09640591629546984, 1.0, 0.06824734073425107, 1.0], 6, 0.0)  # whose pi sum up to 6 + 1e-15
def test_a_selection_has_no_duplicates_and_the_whole_weight(values, m, offset):
    v = torch.tensor(values, dtype=F64).unsqueeze(1)
    m = min(m, len(values))
    index, multiplier = select(v, m, torch.tensor([offset], dtype=F64))
    assert index.shape == multiplier.shape == (m, 1)
    kept = multiplier > 0
    assert len(set(index[kept].tolist())) == int(kept.sum()) == min(m, int((v > 0).sum()))
    assert (multiplier * v.gather(0, index)).sum().item() == pytest.approx(v.sum().item(), rel=1e-9)
    assert (multiplier[kept] >= 1).all()


def offsets_of(importance, m):
    """The offsets between which the selection does not change: a value within each piece, and its length."""
    edges = inclusion(importance, m)[0].cumsum(0).squeeze(1)
    breaks = torch.cat([torch.tensor([0.0, 1.0], dtype=F64), edges % 1]).sort().values
    lengths = breaks.diff()
    return (breaks[:-1] + lengths / 2)[lengths > 0], lengths[lengths > 0]


def selection_moments(v, m, f):
    """Mean and variance over the offset of sum_j multiplier_j f(index_j), and each sample's mean multiplier."""
    offset, length = offsets_of(v.unsqueeze(1), m)
    index, multiplier = select(v.unsqueeze(1).expand(-1, len(offset)), m, offset)
    sums = (multiplier * f[index]).sum(0)
    each = torch.zeros(len(v), len(offset), dtype=F64).scatter_add(0, index, multiplier) @ length
    mean = sums @ length
    return mean, ((sums - mean) ** 2) @ length, each


@given(importances, st.integers(1, 12))
@settings(deadline=None, max_examples=100)
def test_every_multiplier_is_one_in_expectation(values, m):
    v = torch.tensor(values, dtype=F64)
    *_, each = selection_moments(v, min(m, len(values)), torch.ones_like(v))
    torch.testing.assert_close(each, (v > 0).to(F64), rtol=0, atol=1e-7)


def test_the_threshold_rule_adds_a_tenth_of_multinomials_variance_at_most():
    """k = 50, m = 10, an effective sample size of about three."""
    g = torch.Generator().manual_seed(8)
    log_w, f = 3.0 * torch.randn(50, generator=g, dtype=F64), torch.randn(50, generator=g, dtype=F64)
    w = log_w.softmax(0)
    assert 2.5 < effective_sample_size(log_w.unsqueeze(1)).item() < 3.5
    mean, variance, _ = selection_moments(w, 10, w * f)
    multinomial = ((w * f**2).sum() - (w * f).sum() ** 2) / 10
    torch.testing.assert_close(mean, (w * f).sum(), rtol=0, atol=1e-12)
    assert 10 * variance < multinomial


EXTREME = {
    "one": [1.0] + [1e-300] * 9,
    "zeros": [0.0, 0.3, 0.0, 0.7, 0.0],
    "only one": [0.0, 1.0, 0.0],
    "tiny": [3e-308, 1e-308, 2e-308],
    "equal": [0.25] * 4,
    "steps": [10.0**-i for i in range(0, 300, 30)],
}


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_weights_are_selected_without_bias(name, m):
    v = torch.tensor(EXTREME[name], dtype=F64)
    mean, variance, each = selection_moments(v, m, v)
    likely = inclusion(v.unsqueeze(1), m)[0].squeeze(1) > 1e-12
    torch.testing.assert_close(each[likely], torch.ones(int(likely.sum()), dtype=F64), rtol=0, atol=1e-9)
    assert (each[v == 0] == 0).all()
    torch.testing.assert_close(mean, v.sum(), rtol=1e-12, atol=0)
    assert variance.item() <= 1e-20
    if name == "one":
        index, _ = select(v.unsqueeze(1), m, torch.tensor([0.5], dtype=F64))
        assert 0 in index


@pytest.mark.parametrize("name", EXTREME)
def test_as_many_places_as_samples_keep_every_one_as_it_is(name):
    v = torch.tensor(EXTREME[name], dtype=F64)
    index, multiplier = select(v.unsqueeze(1), len(v), torch.tensor([0.37], dtype=F64))
    kept = torch.zeros_like(v).scatter_add(0, index.squeeze(1), multiplier.squeeze(1))
    assert torch.equal(kept, (v > 0).to(F64))


def test_an_offset_on_an_edge_selects_no_sample_twice():
    v = torch.tensor([1.0, 1.0, 1.0, 0.36273251441035564, 1.0, 0.109375], dtype=F64).unsqueeze(1)
    index, multiplier = select(v, 5, torch.zeros(1))
    assert len(set(index.flatten().tolist())) == 5 and (multiplier > 0).all()


def test_nothing_to_select_is_nothing():
    index, multiplier = select(torch.zeros(4, 1, dtype=F64), 2, torch.tensor([0.4]))
    assert (multiplier == 0).all() and index.shape == (2, 1)


RESAMPLED = [
    *with_every_estimator(IWAE(k=7), Power(k=7, p=2.0), CIWAE(k=7, beta=0.25), MIWAE(7, 1), VAE(k=7), Median(k=7)),
    *[LAlpha(k=7, alpha=0.5, gradient=g) for g in ("reparam", "dreg", "score")],
    *[Jackknife(k=7, gradient=g) for g in ("reparam", "dreg", "vimco")],
    *[Split(IWAE(k=7), inference) for inference in with_every_estimator(VAE(k=7))],
]


def integrated_over_the_offset(objective, model, x, nodes, monkeypatch):
    """The exact mean of the gradient and of the value over the selection's offset, for one data point and its noise."""
    seen = []

    def spy(importance, m, offset):
        seen.append(importance)
        return select(importance, m, offset)

    model.nodes = nodes
    monkeypatch.setattr(mcobjectives.bounds, "select", spy)
    objective.surrogate(model, x)
    offset, length = offsets_of(seen[0], objective.backward_samples)
    model.nodes = nodes.expand(-1, len(offset), *nodes.shape[2:])
    monkeypatch.setattr(mcobjectives.bounds, "select", lambda importance, m, _: select(importance, m, offset))
    surrogate = objective.surrogate(model, x.expand(len(offset)))
    monkeypatch.undo()
    assert len(offset) > 1 or int((seen[0] > 0).sum()) <= objective.backward_samples
    return (length * surrogate).sum().detach(), gradients(model, (length * surrogate).sum())


# The resampled backward pass.


@pytest.mark.parametrize("objective", RESAMPLED, ids=repr)
def test_the_resampled_gradient_is_the_full_one_in_expectation(objective, monkeypatch):
    nodes = torch.randn(7, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    model, x = Gaussian1D(), torch.tensor([0.9], dtype=F64)
    model.nodes = nodes
    full = objective.surrogate(model, x).sum()
    expected = gradients(model, full)
    for m in (1, 3, 6):
        resampled = replace(objective, backward_samples=m)
        value, found = integrated_over_the_offset(resampled, model, x, nodes, monkeypatch)
        torch.testing.assert_close(value, full.detach(), rtol=0, atol=1e-12)
        assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_the_resampled_gradient_of_two_layers_is_the_full_one_in_expectation(gradient, monkeypatch):
    nodes = torch.randn(7, 1, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    model, x = TwoLayers(), torch.tensor([0.9], dtype=F64)
    model.nodes = nodes
    objective = IWAE(k=7, gradient=gradient)
    expected = gradients(model, objective.surrogate(model, x).sum())
    _, found = integrated_over_the_offset(replace(objective, backward_samples=3), model, x, nodes, monkeypatch)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_every_data_point_and_every_step_has_a_uniform_offset_of_its_own(chunk_size, monkeypatch):
    """Which the sums over the offset take for granted: one that is fixed or shared would be a bias or a correlation."""
    offsets = []

    def spy(importance, m, offset):
        offsets.append(offset)
        return select(importance, m, offset)

    monkeypatch.setattr(mcobjectives.bounds, "select", spy)
    x, objective = torch.zeros(1000, dtype=F64), IWAE(k=4, backward_samples=2, chunk_size=chunk_size)
    torch.manual_seed(0)
    for _ in range(2):
        objective.surrogate(Gaussian1D(), x)
    drawn = torch.cat(offsets)
    assert drawn.dtype == F64 and len(drawn.unique()) == 2000
    uniform = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    assert (drawn.sort().values - uniform).abs().max() < 1.63 / 2000**0.5  # Kolmogorov-Smirnov at one in a hundred


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_resampling_all_samples_is_the_full_gradient(objective):
    model = LinearGaussian().off_posterior()
    value, gradient = loss_gradient(objective, model, model.data())
    found, found_gradient = loss_gradient(replace(objective, backward_samples=6), model, model.data())
    torch.testing.assert_close(found, value, rtol=0, atol=1e-12)
    assert_same(found_gradient, gradient, 1e-10)


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_the_value_is_the_bound_of_all_samples_however_few_are_kept(objective):
    model = LinearGaussian().off_posterior()
    value, _ = loss_gradient(objective, model, model.data())
    found, _ = loss_gradient(replace(objective, backward_samples=2), model, model.data())
    torch.testing.assert_close(found, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("objective", RESAMPLED, ids=repr)
def test_chunks_select_the_same_samples(objective):
    model = LinearGaussian().off_posterior()
    assert_same_in_chunks(replace(objective, backward_samples=3), model, model.data(), [1, 3, 5, 7, 20])


@pytest.mark.parametrize("gradient", ["score", "vimco", "rws"])
@pytest.mark.parametrize("make", [Discrete, Mixed])
def test_chunks_select_the_same_discrete_samples(make, gradient):
    assert_same_in_chunks(IWAE(k=7, gradient=gradient, backward_samples=3), make(), X, [1, 3, 7])


def test_chunks_across_blocks_select_the_same_samples():
    model, k = LinearGaussian().off_posterior(), 2 * Samples.BLOCK + 20
    for gradient in ("reparam", "dreg"):
        objective = IWAE(k=k, gradient=gradient, backward_samples=5)
        assert_same_in_chunks(objective, model, model.data(), [7, Samples.BLOCK, k])


@pytest.mark.parametrize("chunk_size", [None, 10])
def test_only_the_kept_samples_are_differentiated(chunk_size):
    rows = []

    class Counting(LinearGaussian):
        def log_likelihood(self, x, h):
            rows.append((len(h), torch.is_grad_enabled()))
            return super().log_likelihood(x, h)

    model = Counting().off_posterior()
    IWAE(k=20, backward_samples=4, chunk_size=chunk_size)(model, model.data()).backward()
    assert sum(n for n, differentiated in rows if differentiated) == 4
    assert sum(n for n, differentiated in rows if not differentiated) == 20


def test_dominating_weights_leave_the_resampled_gradient_finite():
    class Sharp(LinearGaussian):
        def log_likelihood(self, x, h):
            return 1000 * super().log_likelihood(x, h)

    for dtype in (torch.float32, F64):
        model = Sharp(dtype=dtype).off_posterior()
        for gradient in ("reparam", "dreg", "vimco"):
            loss, found = loss_gradient(IWAE(k=20, backward_samples=4, gradient=gradient), model, model.data())
            assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("gradient", ["dreg", "score", "vimco", "rws"])
def test_zero_weights_leave_the_resampled_gradient_finite(gradient):
    class Bounded(LinearGaussian):
        def log_prior(self, h):
            return torch.where(h[..., 0] > 0, super().log_prior(h), -torch.inf)

    model = Bounded().off_posterior()
    loss, found = loss_gradient(IWAE(k=20, backward_samples=15, gradient=gradient), model, model.data())
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in found.values())


def test_an_offset_of_zero_gives_an_unlikely_first_sample_a_finite_multiplier():
    v = torch.tensor([[1e-310], [1.0]], dtype=F64)
    _, multiplier = select(v, 1, torch.zeros(1))
    assert torch.isfinite(multiplier.float()).all()


@pytest.mark.parametrize("least", [1e-6, 1e-14])
def test_the_multiplier_of_an_unlikely_sample_is_one_over_its_probability(least):
    index, multiplier = select(torch.tensor([[least], [1.0]], dtype=F64), 1, torch.zeros(1))
    assert int(index) == 0 and float(multiplier) == pytest.approx((1 + least) / least, rel=1e-9)


def test_the_largest_offset_selects_the_last_sample_though_the_sum_is_a_hair_short():
    v = torch.tensor([0.9877646697951884, 0.779601876763762, 0.36187934651354103], dtype=F64).unsqueeze(1)
    index, multiplier = select(v, 1, torch.tensor([1 - 2**-53], dtype=F64))
    assert int(index) == 2 and float(multiplier) == pytest.approx(float(v.sum() / v[2]))
