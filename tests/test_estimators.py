"""Gradient estimators against exact gradients: sums over all samples, no Monte Carlo tolerance."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from toys import (
    F64,
    Curved,
    Discrete,
    Gaussian1D,
    Jackknife,
    LinearGaussian,
    Mixed,
    assert_same,
    exact_gradient,
    expected_gradient,
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
    Objective,
    Power,
    Split,
    estimator_names,
    estimators,
    messages,
)
from mcobjectives.estimators import Weights
from mcobjectives.plugins import PluginError
from mcobjectives.reductions import log_power_mean
from mcobjectives.specs import format_objective

BUILT_IN = ["dreg", "reparam", "rws", "score", "stl", "vimco"]
SCORE_FAMILY, PATHWISE = ["score", "vimco"], ["reparam", "dreg"]

warnings.filterwarnings("ignore", "gradient='stl' is biased")
pytestmark = pytest.mark.filterwarnings("ignore:gradient='stl' is biased")


def test_the_registry_has_all_six():
    assert set(BUILT_IN) <= set(estimator_names())


def smooth(objectives: list[Objective]) -> list[Objective]:
    return [o for o in objectives if o.smooth]


# Unbiased: the expectation is the exact gradient, theta and phi alike.


class Sharp(IWAE):
    """A subclass that overrides `reduce` alone: the parent's closed forms are not its own."""

    def reduce(self, log_w: torch.Tensor) -> torch.Tensor:
        return log_power_mean(log_w, 2.0)


class Softer:
    def reduce(self, log_w: torch.Tensor) -> torch.Tensor:
        return log_power_mean(log_w, 0.5)


class Mixin(Softer, Power):
    """`reduce` from a class that is no objective."""


class Own(IWAE):
    """Its slopes are its own, the curvatures and the leave-one-out values are not."""

    def reduce(self, log_w: torch.Tensor) -> torch.Tensor:
        return log_power_mean(log_w, 2.0)

    def slopes(self, log_w: torch.Tensor) -> torch.Tensor:
        return (2 * log_w).softmax(0)


class Child(Sharp):
    """And so on downwards."""


@pytest.mark.parametrize("gradient", PATHWISE + SCORE_FAMILY)
@pytest.mark.parametrize("objective", [Sharp(k=2), Mixin(k=2, p=3.0), Own(k=2), Child(k=2)], ids=repr)
def test_a_subclass_with_another_reduce_has_its_own_gradient(objective, gradient):
    model, grid = Gaussian1D(), gaussian_grid(2, 1, 110)
    x = model.on(grid)
    found = expected_gradient(replace(objective, gradient=gradient), model, x, grid.weight)
    assert_same(found, exact_gradient(objective, model, x, grid.weight))


@pytest.mark.parametrize("objective", [VAE(k=3), LAlpha(k=3, alpha=0.5)], ids=repr)
def test_where_f_is_a_sum_each_score_has_its_own_term(objective):
    """So that the noise falls with k, as REINFORCE's on k samples does."""
    log_w = torch.tensor([[-2.0], [-4.0], [-9.0]], dtype=F64)
    s = replace(objective, gradient="score").weights(log_w).s
    torch.testing.assert_close(s, objective.tempering / 3 - log_w / 3)
    assert torch.equal(IWAE(k=3, gradient="score").weights(log_w).s, log_w.softmax(0) - IWAE(k=3).reduce(log_w))


def test_closed_forms_go_with_the_reduce_they_were_written_for():
    class Renamed(Power):
        """Nothing of its own: the parent's closed forms hold."""

    assert Renamed.slopes is Power.slopes and Renamed.curvatures is Power.curvatures
    assert Own.slopes is not Objective.slopes and Own.curvatures is Objective.curvatures
    assert IWAE.slopes is not Objective.slopes and MIWAE.curvatures is not Objective.curvatures


THREE = [*registered(3), Curved(k=3), Jackknife(k=3), IWAE(k=3, kl_weight=0.6), Power(k=3, p=2.0, kl_weight=1.4)]
FOUR = [MIWAE(k1=2, k2=2), MIWAE(k1=4, k2=1), MIWAE(k1=1, k2=4), Median(k=4)]
TWO = [
    *smooth(registered(2)),
    *(Curved(k=2), Jackknife(k=2)),
    *(IWAE(k=2, kl_weight=0.6), VAE(k=2, kl_weight=0.0), LAlpha(k=2, alpha=0.5, kl_weight=0.5)),
    *(Power(k=2, p=2.0, kl_weight=1.4), CIWAE(k=2, beta=0.25, kl_weight=0.3), Curved(k=2, kl_weight=0.5)),
]


@pytest.mark.parametrize("gradient", SCORE_FAMILY)
@pytest.mark.parametrize("objective", THREE + FOUR, ids=repr)
def test_score_family_is_exact_over_an_enumerated_categorical_latent(objective, gradient):
    model = Discrete()
    x, probability = model.enumerate(objective.k)
    assert probability.sum().item() == pytest.approx(1)
    found = expected_gradient(replace(objective, gradient=gradient), model, x, probability)
    assert_same(found, exact_gradient(objective, model, x, probability), 1e-12)


@pytest.mark.parametrize("gradient", PATHWISE + SCORE_FAMILY)
@pytest.mark.parametrize("objective", TWO, ids=repr)
def test_both_families_are_exact_over_a_gaussian_latent(objective, gradient):
    model, grid = Gaussian1D(), gaussian_grid(2, 1, 110)
    x = model.on(grid)
    found = expected_gradient(replace(objective, gradient=gradient), model, x, grid.weight)
    assert_same(found, exact_gradient(objective, model, x, grid.weight))


@pytest.mark.parametrize("gradient", SCORE_FAMILY)
@pytest.mark.parametrize("objective", [IWAE(k=2), Power(k=2, p=0.5), LAlpha(k=2, alpha=0.5)], ids=repr)
def test_score_family_is_exact_over_a_mixed_latent(objective, gradient):
    model = Mixed()
    x, weight = model.on(gaussian_grid(2, 1, 60))
    found = expected_gradient(replace(objective, gradient=gradient), model, x, weight)
    assert_same(found, exact_gradient(objective, model, x, weight))


@pytest.mark.parametrize("objective", [VAE(k=2), LAlpha(k=2, alpha=0.5), MIWAE(1, 2), CIWAE(k=2, beta=1.0)], ids=repr)
def test_stl_is_unbiased_where_f_is_linear(objective):
    model, grid = Gaussian1D(), gaussian_grid(2, 1, 100)
    x = model.on(grid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sticking = replace(objective, gradient="stl")
    assert_same(
        expected_gradient(sticking, model, x, grid.weight), exact_gradient(objective, model, x, grid.weight), 1e-9
    )


def test_stl_on_iwae_is_biased_in_phi_and_right_in_theta():
    model, grid = Gaussian1D(), gaussian_grid(2, 1, 100)
    x = model.on(grid)
    found = expected_gradient(IWAE(k=2, gradient="stl"), model, x, grid.weight)
    exact = exact_gradient(IWAE(k=2), model, x, grid.weight)
    for name in ("w", "u"):
        torch.testing.assert_close(found[name], exact[name])
    for name in ("q_m", "q_n", "q_r"):
        assert abs(found[name] - exact[name]) > 0.02


def test_stl_warns_of_its_bias_once(monkeypatch):
    monkeypatch.setattr(messages, "warned", set())
    with pytest.warns(UserWarning, match=r"biased for IWAE.*use gradient='dreg'") as given:
        IWAE(k=5, gradient="stl")
    assert given[0].filename == __file__  # of the caller, not of the library
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IWAE(k=5, gradient="stl"), IWAE(k=7, gradient="stl"), IWAE(k=1, gradient="stl"), VAE(k=5, gradient="stl")


@pytest.mark.parametrize("objective", [IWAE(k=3), Power(k=3, p=2.0), VAE(k=3), IWAE(k=3, kl_weight=0.5)], ids=repr)
def test_rws_follows_the_objective_in_theta_and_the_wake_phase_in_phi(objective):
    model = Discrete()
    x, probability = model.enumerate(3)
    found = expected_gradient(replace(objective, gradient="rws"), model, x, probability)
    theta = exact_gradient(objective, model, x, probability)
    h, t = model.nodes, objective.tempering
    log_q = model.posterior(x).log_prob(h)
    log_w = (model.log_likelihood(x, h) + t * (model.log_prior(h) - log_q)).detach()
    wake = gradients(model, (probability * (log_w.softmax(0) * log_q).sum(0)).sum())
    for name in ("prior_logits", "mean"):
        torch.testing.assert_close(found[name], theta[name], rtol=0, atol=1e-12)
    for name in ("q_logits", "q_slope"):
        torch.testing.assert_close(found[name], wake[name], rtol=0, atol=1e-12)
        assert (found[name] - theta[name]).abs().max() > 1e-3  # it is not the objective's gradient


# Arrays that an estimator gives at some log-weights alone.


def clipped(log_w, name, objective):
    """IWAE's DReG or score weights, without `name` where the log-weights are extreme."""
    w = log_w.softmax(0)
    weights = Weights(w, w**2, None) if name == "c" else Weights(w, None, w - objective.reduce(log_w))
    return weights if log_w.abs().max() < 100 else weights._replace(**{name: None})


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"backward_samples": 3}], ids=str)
@pytest.mark.parametrize("name", ["c", "s"])
def test_an_array_that_was_none_in_the_plan_is_refused(name, options):
    objective = IWAE(k=5, gradient=lambda o, log_w: clipped(log_w, name, o), **options)
    with pytest.raises(ValueError, match=f"gives {name} for some log-weights and None for others"):
        objective(LinearGaussian(), LinearGaussian().data())


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"backward_samples": 3}], ids=str)
@pytest.mark.parametrize("c", [1, 1000])
def test_none_stands_for_zeros(c, options):
    """Of the ratio c / a and of terms of their own."""

    def found(absent):
        def estimator(objective, log_w):
            if log_w.shape[1] == 5:  # the plan's
                return Weights(log_w.softmax(0), c * log_w.softmax(0), log_w.softmax(0))
            zeros = None if absent else torch.zeros_like(log_w)
            return Weights(log_w.softmax(0), zeros, zeros)

        model = LinearGaussian().off_posterior()
        torch.manual_seed(0)
        IWAE(k=5, gradient=estimator, **options)(model, model.data()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with_none, with_zeros = found(absent=True), found(absent=False)
    for name, gradient in with_none.items():
        torch.testing.assert_close(gradient, with_zeros.get(name, torch.zeros_like(gradient)), rtol=0, atol=0)
    assert any(gradient.abs().max() > 0 for gradient in with_none.values())


# The weights as the literature has them.


def test_closed_weights_of_the_literature():
    log_w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    w = log_w.softmax(0)

    def check(objective, a, c, s):
        for found, expected in zip(objective.weights(log_w), (a, c, s), strict=True):
            if expected is None:
                assert found is None
            else:
                torch.testing.assert_close(found, expected)
                assert not found.requires_grad

    f = IWAE(k=5).reduce(log_w)
    check(IWAE(k=5), w, w, w)
    check(IWAE(k=5, gradient="stl"), w, w, None)
    check(IWAE(k=5, gradient="dreg"), w, w**2, None)
    check(IWAE(k=5, gradient="score"), w, None, w - f)
    check(IWAE(k=5, gradient="rws"), w, None, -w)
    wp = (0.3 * log_w).softmax(0)
    check(Power(k=5, p=0.3, gradient="dreg"), wp, 0.7 * wp + 0.3 * wp**2, None)
    check(CIWAE(k=5, beta=0.25, gradient="dreg"), 0.05 + 0.75 * w, 0.05 + 0.75 * w**2, None)
    check(IWAE(k=5, gradient="dreg", kl_weight=0.4), w, w - 0.4 * w * (1 - w), None)
    check(IWAE(k=5, gradient="score", kl_weight=0.4), w, None, 0.4 * w - f)
    fifth = torch.full_like(log_w, 0.2)
    check(LAlpha(k=5, alpha=0.3), fifth, fifth, 0.3 * fifth)
    check(LAlpha(k=5, alpha=0.3, gradient="dreg"), fifth, fifth, None)


def test_vimcos_baseline_is_independent_of_its_own_sample():
    log_w = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    for objective in registered(4):
        own = objective.leave_one_out(log_w)
        for i in range(4):
            moved = log_w.clone()
            moved[i] += 3.0
            torch.testing.assert_close(objective.leave_one_out(moved)[i], own[i], rtol=0, atol=1e-12)


# The value.

PAIRS = [
    (o, g)
    for o in [*registered(6), Curved(k=6), Jackknife(k=6)]
    for g in BUILT_IN
    if o.smooth or g not in ("stl", "dreg")
]


@pytest.mark.parametrize(("objective", "gradient"), PAIRS, ids=str)
def test_the_loss_is_the_true_bound_whatever_the_estimator(objective, gradient):
    model = LinearGaussian().off_posterior()
    x = model.data()
    expected, _ = loss_gradient(objective, model, x)
    chosen = replace(objective, gradient=gradient)
    value, _ = loss_gradient(chosen, model, x)
    torch.manual_seed(0)
    torch.testing.assert_close(value, -chosen.bound(model, x).mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("objective", "gradient"), PAIRS, ids=str)
def test_every_estimator_has_the_same_theta_gradient_for_a_seed(objective, gradient):
    model = LinearGaussian().off_posterior()
    x = model.data()
    _, expected = loss_gradient(objective, model, x)
    _, found = loss_gradient(replace(objective, gradient=gradient), model, x)
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12)


# Variance.


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("objective", smooth(registered(6)), ids=repr)
def test_at_the_posterior_the_phi_gradient_vanishes(objective, gradient):
    if isinstance(objective, LAlpha):
        pytest.skip("the posterior is not the optimum of L_alpha")
    model = LinearGaussian()
    _, found = loss_gradient(replace(objective, gradient=gradient), model, model.data())
    _, plain = loss_gradient(objective, model, model.data())
    for name in ("q_gain", "q_offset", "q_scale"):
        assert found[name].abs().max() < 1e-12
        assert plain[name].abs().max() > 1e-3


class OwnOffset(LinearGaussian):
    """Near the posterior, with an offset of q for each data point: one backward pass gives every point's gradient."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.own = torch.nn.Parameter(torch.full((batch, 2), 0.02, dtype=F64))

    def posterior(self, x):
        loc = x @ self.q_gain.T + self.q_offset + self.own
        return torch.distributions.MultivariateNormal(loc, scale_tril=self.q_scale)


def test_dreg_has_a_tenth_of_reparams_variance_near_the_posterior():
    model = OwnOffset(2000)
    x = model.data(1).expand(2000, -1)
    variance = {}
    for gradient in PATHWISE:
        _, found = loss_gradient(IWAE(k=64, gradient=gradient), model, x)
        variance[gradient] = found["own"].var(0)
    assert (10 * variance["dreg"] < variance["reparam"]).all()


def test_vimco_has_less_variance_than_score():
    model = OwnOffset(2000)
    x = model.data(1).expand(2000, -1)
    variance = {g: loss_gradient(IWAE(k=8, gradient=g), model, x)[1]["own"].var(0) for g in SCORE_FAMILY}
    assert (10 * variance["vimco"] < variance["score"]).all()


# Different objectives for theta and phi; slopes of mixed sign.


def test_piwae_trains_theta_by_iwae_and_phi_by_miwae_on_the_same_samples():
    model = LinearGaussian().off_posterior()
    x = model.data()
    value, found = loss_gradient(Split(generative=IWAE(k=6), inference=MIWAE(2, 3)), model, x)
    iwae_value, iwae = loss_gradient(IWAE(k=6), model, x)
    _, miwae = loss_gradient(MIWAE(2, 3), model, x)
    torch.testing.assert_close(value, iwae_value, rtol=0, atol=1e-12)
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[name], iwae[name], rtol=0, atol=1e-12)
        assert (iwae[name] - miwae[name]).abs().max() > 1e-3
    for name in ("q_gain", "q_offset", "q_scale"):
        torch.testing.assert_close(found[name], miwae[name], rtol=0, atol=1e-12)
        assert (iwae[name] - miwae[name]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("inference", "model", "weights"),
    [
        (MIWAE(1, 2, gradient="dreg"), Gaussian1D, None),
        (IWAE(k=2, gradient="dreg"), Gaussian1D, None),
        (Power(k=2, p=2.0, gradient="vimco"), Gaussian1D, None),
        (MIWAE(1, 2, gradient="score"), Gaussian1D, None),
        (MIWAE(1, 2, gradient="dreg", kl_weight=0.5), Gaussian1D, None),
        (LAlpha(k=2, alpha=0.5, gradient="vimco"), Gaussian1D, None),
    ],
    ids=repr,
)
def test_each_part_of_a_split_follows_its_own_objective(inference, model, weights):
    model, grid = model(), gaussian_grid(2, 1, 120)
    x = model.on(grid)
    generative = IWAE(k=2, kl_weight=inference.tempering)
    found = expected_gradient(Split(generative=generative, inference=inference), model, x, grid.weight)
    theta = exact_gradient(generative, model, x, grid.weight)
    phi = exact_gradient(inference, model, x, grid.weight)
    for name in found:
        torch.testing.assert_close(found[name], (phi if name.startswith("q_") else theta)[name], rtol=0, atol=1e-8)


def test_a_split_survives_samples_that_only_one_part_weights():
    """c / a would overflow: IWAE gives weight exp(-1000) to a sample that MIWAE's second group lives on."""

    class Apart(Gaussian1D):
        def log_likelihood(self, x, h):
            return super().log_likelihood(x, h) - 1000 * (torch.arange(4, dtype=F64) >= 2).unsqueeze(1)

    model = Apart()
    x = torch.full((1,), 0.9, dtype=F64)
    _, found = loss_gradient(Split(generative=IWAE(k=4), inference=MIWAE(2, 2)), model, x)
    _, miwae = loss_gradient(MIWAE(2, 2), model, x)
    for name in ("q_m", "q_n", "q_r"):
        torch.testing.assert_close(found[name], miwae[name], rtol=0, atol=1e-12)


def test_slopes_of_mixed_sign_take_two_evaluations_and_positive_ones_one():
    assert not Jackknife(k=2, gradient="dreg").plan.ratio
    assert not Split(generative=IWAE(k=4), inference=MIWAE(2, 2)).plan.ratio
    for objective in (IWAE(k=4), Power(k=4, p=2.0), CIWAE(k=4), MIWAE(2, 2), LAlpha(k=4), VAE(k=4)):
        assert replace(objective, gradient="dreg").plan.ratio


class Counting(LinearGaussian):
    """Counts evaluations of the model's parts."""

    def __init__(self) -> None:
        super().__init__()
        self.off_posterior()
        self.encoded, self.decoded = [], 0

    def posterior(self, x):
        self.encoded.append(len(x))
        return super().posterior(x)

    def log_likelihood(self, x, h):
        self.decoded += 1
        return super().log_likelihood(x, h)


@pytest.mark.parametrize("gradient", BUILT_IN)
def test_one_evaluation_of_encoder_and_decoder_serves_theta_and_phi(gradient):
    model = Counting()
    IWAE(k=6, gradient=gradient)(model, model.data()).backward()
    assert model.encoded == [4] and model.decoded == 1


# Zero weights, user functions.


@pytest.mark.parametrize("gradient", ["dreg", "reparam", "score", "vimco", "rws"])
def test_samples_of_weight_zero_add_nothing(gradient):
    class Bounded(LinearGaussian):
        def log_prior(self, h):
            outside = torch.zeros(6, 1, dtype=F64)
            outside[[1, 4]] = -torch.inf
            return super().log_prior(h) + outside

    model = Bounded().off_posterior()
    loss, found = loss_gradient(IWAE(k=6, gradient=gradient), model, model.data())
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.parametrize("objective", [IWAE(k=2), Power(k=2, p=0.5), MIWAE(2, 1), Curved(k=2)], ids=repr)
def test_vimcos_baseline_stays_finite_where_the_other_weight_is_zero(objective):
    for w in replace(objective, gradient="vimco").weights(torch.tensor([[0.3], [-torch.inf]], dtype=F64)):
        assert w is None or torch.isfinite(w).all()


def test_an_estimator_must_weight_the_joint(monkeypatch):
    class NoTheta(IWAE):
        def weights(self, log_w):
            return None, log_w, None

    with pytest.raises(ValueError, match="a is None"):
        NoTheta(k=3)


@pytest.mark.parametrize(
    ("weights", "which"),
    [
        (lambda log_w: (log_w, None, log_w.mean(0)), "s is \\(5,\\) for \\(3, 5\\)"),
        (lambda log_w: (log_w[:1], None, None), "a is \\(1, 5\\)"),
    ],
)
def test_weights_that_would_broadcast_are_refused(weights, which):
    class Odd(IWAE):
        def weights(self, log_w):
            return weights(log_w)

    with pytest.raises(ValueError, match=which):
        Odd(k=3)


def second_derivative(objective: Objective, model: LinearGaussian, name: str) -> torch.Tensor:
    parameter = dict(model.named_parameters())[name]
    torch.manual_seed(0)
    loss = objective(model, model.data()) + parameter.square().sum()  # another part that can be differentiated again
    (first,) = torch.autograd.grad(loss, parameter, create_graph=True)
    return torch.autograd.grad(first.sum(), parameter)[0]


@pytest.mark.parametrize("name", ["weight", "q_offset"])
@pytest.mark.parametrize(
    "options",
    [*({"gradient": g} for g in BUILT_IN if g != "reparam"), {"chunk_size": 2}, {"backward_samples": 2}],
    ids=str,
)
def test_a_second_derivative_that_would_be_incomplete_raises(options, name):
    with pytest.raises(RuntimeError, match=r"second derivative.*use gradient='reparam' without chunk_size"):
        second_derivative(IWAE(k=4, **options), LinearGaussian().off_posterior(), name)


@pytest.mark.parametrize("name", ["weight", "q_offset"])
def test_the_second_derivative_of_reparam_is_right(name):
    model, step = LinearGaussian().off_posterior(), 1e-5
    found = second_derivative(IWAE(k=4), model, name) - 2
    firsts = []
    for by in (step, -2 * step):
        with torch.no_grad():
            dict(model.named_parameters())[name].add_(by)
        firsts.append(-loss_gradient(IWAE(k=4), model, model.data())[1][name])
    assert found.sum().item() == pytest.approx((firsts[0] - firsts[1]).sum().item() / (2 * step), rel=1e-6)


@dataclass(frozen=True)
class First(Objective):
    """The first log-weight alone: linear, and blind to the others."""

    k: int = 2

    linear = True

    def reduce(self, log_w):
        return log_w[0] + 0 * log_w[1:].clamp(min=-1e300).sum(0)


def test_a_sample_without_a_slope_adds_no_score_though_its_weight_is_zero():
    log_w = torch.tensor([[1.5], [-torch.inf]], dtype=F64)
    a, _, s = First(gradient="score").weights(log_w)
    assert a.flatten().tolist() == [1, 0] and s.flatten().tolist() == [1 - 1.5, 0]


def test_a_function_is_an_estimator_itself():
    dreg, model = estimators.dreg, LinearGaussian().off_posterior()
    by_name, by_function = IWAE(k=4, gradient="dreg"), IWAE(k=4, gradient=dreg)
    (value, gradient), (found, found_gradient) = (loss_gradient(o, model, model.data()) for o in (by_name, by_function))
    assert torch.equal(found, value)
    assert_same(found_gradient, gradient, 0.0)
    assert by_function == IWAE(k=4, gradient=dreg) != by_name and hash(by_function) == hash(IWAE(k=4, gradient=dreg))
    assert pickle.loads(pickle.dumps(by_function)) == by_function
    with pytest.raises(ValueError, match=r"gradient=<function dreg at .*> cannot be written"):
        format_objective(by_function)
    with pytest.raises(ValueError, match="wrong for Median"):
        Median(k=4, gradient=dreg)
    with pytest.raises(PluginError, match=r"^estimator <lambda> does not work with IWAE: TypeError"):
        IWAE(k=4, gradient=lambda log_w: log_w)
    with pytest.raises(PluginError, match=r"^gradient: unknown estimator 0\.5: choose from"):
        IWAE(k=4, gradient=0.5)
