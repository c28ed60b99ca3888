"""The kit on estimators: the library's own pass, and those that are biased or malformed do not."""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint

import pytest
import torch
from conformance import broken

from mcobjectives import IWAE, PluginError, Power, Weights, messages, plugins
from mcobjectives.estimators import reparam, require_smooth, score
from mcobjectives.testing import ConformanceError, check_estimator, check_objective
from mcobjectives.testing.estimators import own_names
from mcobjectives.testing.objectives import objective_findings

torch.set_num_threads(1)

REGISTERED, LOAD = plugins.registered, plugins.load


@pytest.mark.parametrize("name", own_names(plugins.ESTIMATORS))
def test_the_estimators_of_the_library_conform(name):
    assert not broken(check_estimator(name, unbiased=name not in ("stl", "rws")))


def register(monkeypatch, estimator):
    """An estimator under the name "probe", as if a distribution had brought it."""
    point = EntryPoint("probe", f"{__name__}:{estimator.__name__}", plugins.ESTIMATORS)

    def registered(group):
        return REGISTERED(group) | ({"probe": (point,)} if group == plugins.ESTIMATORS else {})

    monkeypatch.setattr(plugins, "registered", registered)
    monkeypatch.setattr(plugins, "load", lambda group, name: estimator if name == "probe" else LOAD(group, name))


def no_baseline_term(objective, log_w):
    """Score without the g that differentiating log q inside F gives."""
    return Weights(objective.slopes(log_w), None, -objective.reduce(log_w).expand_as(log_w))


def own_baseline(objective, log_w):
    """A baseline that looks at the sample itself."""
    g = objective.slopes(log_w)
    own = torch.where(log_w.isfinite(), log_w, 0.0)
    return Weights(g, None, objective.tempering * g - (objective.reduce(log_w) - 0.5 * own))


def own_score(objective, log_w):
    g = objective.slopes(log_w)
    return Weights(g, None, objective.tempering * g - objective.reduce(log_w))


def half_theta(objective, log_w):
    g = objective.slopes(log_w)
    return Weights(g / 2, None, objective.tempering * g - objective.reduce(log_w))


def wrong_shape(objective, log_w):
    g = objective.slopes(log_w)
    return Weights(g, None, g.sum(0))


def leaves_log_space(objective, log_w):
    w = log_w.exp()
    return Weights(objective.slopes(log_w), None, -w / w.sum(0))


@pytest.mark.parametrize("estimator", [no_baseline_term, own_baseline, half_theta])
def test_a_biased_estimator_is_found_on_every_objective(monkeypatch, estimator):
    register(monkeypatch, estimator)
    with pytest.raises(ConformanceError, match="expected gradient of") as raised:
        check_estimator("probe")
    assert raised.value.properties >= {"iwae", "power", "miwae"}  # constant slopes need no such term


def half_dreg(objective, log_w):
    """Halfway between reparam and DReG, without the refusal of slopes that jump: half the term at the jump is lost."""
    g, t = objective.slopes(log_w), objective.tempering
    return Weights(g, g - t * objective.curvatures(log_w) / 2, t * g / 2)


def test_a_function_is_an_estimator_without_being_installed(monkeypatch):
    assert not broken(check_estimator(own_score))
    with pytest.raises(ConformanceError, match=r"^estimator 'half_theta' breaks .*\n.* gradient='half_theta', the"):
        check_estimator(half_theta)
    objective = IWAE(k=3, gradient=own_score)
    assert {f.property for f in check_objective(objective) if f.passed} >= {"estimator own_score", "shape"}
    with pytest.raises(ConformanceError, match="estimator half_theta: with k = 2 and gradient='half_theta'"):
        check_objective(IWAE(k=3, gradient=half_theta))


@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
@pytest.mark.parametrize("name", ["stl", "rws", "vimco"])
def test_the_librarys_own_as_functions_are_judged_as_by_name(name):
    objective = IWAE(k=8, gradient=plugins.get_estimator(name))
    properties = [f.property for f in check_objective(objective)]
    assert properties.count(f"estimator {name}") == 1 and len(set(properties)) == len(properties)


@pytest.mark.parametrize("p", [12.0, 30.0, 40.0])
def test_what_quadrature_cannot_tell_is_not_called_biased(p):
    assert not broken(objective_findings(Power(k=4, p=p)))


@pytest.mark.parametrize("subject", [IWAE, "iwae", None])
def test_an_objective_is_checked_as_an_instance(subject):
    with pytest.raises(TypeError, match=r"^check_objective checks an instance, such as IWAE\(k=8\), got"):
        check_objective(subject)


def test_a_term_at_a_jump_is_not_taken_for_rough_quadrature(monkeypatch):
    register(monkeypatch, half_dreg)
    with pytest.raises(ConformanceError, match="expected gradient of phi") as raised:
        check_estimator("probe")
    assert raised.value.properties == {"median"}


def test_a_wrong_theta_is_found_even_where_bias_is_declared(monkeypatch):
    register(monkeypatch, half_theta)
    with pytest.raises(ConformanceError, match="gradient of theta"):
        check_estimator("probe", unbiased=False)
    register(monkeypatch, own_baseline)
    assert not broken(check_estimator("probe", unbiased=False))


@pytest.mark.parametrize("estimator", [wrong_shape, leaves_log_space])
def test_weights_must_be_whole_and_finite(monkeypatch, estimator):
    register(monkeypatch, estimator)
    with pytest.raises(ConformanceError) as raised:
        check_estimator("probe")
    assert raised.value.properties == {"weights"}


def batch_baseline(objective, log_w):
    """The mean over the batch, which a kit whose batch is all outcomes takes for a constant."""
    f = objective.reduce(log_w)
    return Weights(objective.slopes(log_w), None, objective.tempering * objective.slopes(log_w) - (f - f.mean()))


def untempered(objective, log_w):
    """DReG that forgets kl_weight beside the curvature."""
    require_smooth(objective, "probe")
    g = objective.slopes(log_w)
    return Weights(g, g - objective.curvatures(log_w), None)


@pytest.mark.parametrize(
    ("estimator", "where", "why"),
    [
        (batch_baseline, "weights", "s of a data point depends on the others in its batch"),
        (untempered, "kl_weight", "tempering left out"),
    ],
)
def test_what_shows_beside_the_objectives_alone_is_found(monkeypatch, estimator, where, why):
    register(monkeypatch, estimator)
    with pytest.raises(ConformanceError, match=why) as raised:
        check_estimator("probe")
    assert raised.value.properties == {where}


def moving_baseline(objective, log_w):
    """A baseline of the calls before."""
    f, g = objective.reduce(log_w), objective.slopes(log_w)
    before = moving_baseline.value
    moving_baseline.value = 0.9 * before + 0.1 * float(f.mean())
    return Weights(g, None, objective.tempering * g - (f - before))


def test_a_baseline_that_learns_is_none_of_the_batch(monkeypatch):
    moving_baseline.value = 0.0
    register(monkeypatch, moving_baseline)
    assert not broken(check_estimator("probe"))


@pytest.mark.parametrize("name", ["reparam", "dreg", "score", "vimco"])
def test_the_librarys_own_temper_rightly(name):
    assert [f.passed for f in check_estimator(name) if f.property == "kl_weight"] == [True]


def test_bias_that_is_declared_and_absent_is_reported():
    with pytest.raises(ConformanceError, match="unbiased=False is declared, yet"):
        check_estimator("dreg", unbiased=False)


def test_stl_is_not_declared_unbiased():
    with pytest.raises(ConformanceError) as raised:
        check_estimator("stl")
    assert raised.value.properties == {"iwae", "power", "ciwae", "miwae"}


# At one k, dtype or log-weight alone.


def at(sizes, wrong, right=score):
    """An estimator that is wrong at some numbers of samples."""
    return lambda objective, log_w: (wrong if log_w.shape[0] in sizes else right)(objective, log_w)


def wrong_sign(objective, log_w):
    a, c, s = score(objective, log_w)
    return Weights(a, c, -s)


def divides_by_the_others(objective, log_w):
    """A baseline of the other samples, of which one sample has none."""
    g = objective.slopes(log_w)
    others = (log_w.sum(0) - log_w) / (log_w.shape[0] - 1)
    return Weights(g, None, objective.tempering * g - (objective.reduce(log_w) - others))


def minus_infinite(objective, log_w):
    """The same with a refusal of one sample: -inf - (-inf) where a weight is zero."""
    if log_w.shape[0] < 2:
        raise ValueError("needs at least two samples")
    return divides_by_the_others(objective, log_w)


def other_in_float32(objective, log_w):
    return (score if log_w.dtype == torch.float64 else wrong_sign)(objective, log_w)


def doubles(objective, log_w):
    return score(objective, log_w)._replace(s=score(objective, log_w).s.double())


def singles(objective, log_w):
    return score(objective, log_w)._replace(s=score(objective, log_w).s.float())


def in_place(objective, log_w):
    weights = score(objective, log_w)
    log_w -= log_w.amax(0)
    return weights


def crashes_at_one(objective, log_w):
    return score(objective, log_w)._replace(a=objective.slopes(log_w) * (1 / (log_w.shape[0] - 1) > 0))


@pytest.mark.parametrize(
    ("estimator", "where", "why"),
    [
        (at({1}, divides_by_the_others), "weights", "s is NaN or infinite for .*, with k = 1"),
        (minus_infinite, "weights", "s is NaN or infinite for log-weights of which one is -inf, with k = 4"),
        (other_in_float32, "weights", "s is .* for log-weights in float32, and .* in torch.float64 for the same"),
        (doubles, "weights", r"s is \(4, 3\) torch.float64 for log-weights \(4, 3\) float32"),
        (singles, "weights", "and .* in torch.float32 for the same in float64"),
        (in_place, "weights", "the log-weights that it is given are changed.* an in-place operation"),
        (crashes_at_one, "weights", "with k = 1, .* ZeroDivisionError"),
        (at({1}, lambda o, log_w: Weights(log_w / 0, None, log_w)), "weights", "a is NaN .* with k = 1"),
        (at({8}, lambda o, log_w: Weights(log_w / 0, None, log_w)), "weights", "a is NaN .* with k = 8"),
        (at({8}, wrong_sign), "k = 8", "with k = 8 .* the expected gradient of phi"),
        (at({8}, lambda o, log_w: reparam(o, log_w)._replace(a=log_w.softmax(0) / 2), reparam), "k = 8", "of theta"),
    ],
)
def test_what_is_wrong_at_one_size_dtype_or_weight_alone_is_found(estimator, where, why):
    with pytest.raises(ConformanceError, match=why) as raised:
        check_estimator(estimator)
    assert raised.value.properties == {where}


def test_what_is_right_at_two_samples_alone_is_found():
    with pytest.raises(ConformanceError, match=r"with k = 3 .*\n.*with k = 4 ") as raised:
        check_estimator(at({3, 4}, wrong_sign))
    assert raised.value.properties == {"median", "miwae"}


def slight_batch_baseline(objective, log_w):
    a, c, s = score(objective, log_w)
    return Weights(a, c, s + 0.01 * objective.reduce(log_w).mean())


def test_a_baseline_that_is_a_little_of_the_batch_is_found():
    with pytest.raises(
        ConformanceError, match=r"depends on the others in its batch\. Usual cause: a mean over"
    ) as raised:
        check_estimator(slight_batch_baseline)
    assert raised.value.properties == {"weights"}


def scaled(factor):
    return lambda objective, log_w: score(objective, log_w)._replace(a=factor * objective.slopes(log_w))


@pytest.mark.parametrize(("factor", "found"), [(1.005, {"iwae", "power", "vae"}), (1.02, {"median"})])
def test_an_estimator_a_touch_off_is_found(factor, found):
    with pytest.raises(ConformanceError, match="gradient of theta") as raised:
        check_estimator(scaled(factor))
    assert raised.value.properties >= found


# What it refuses, and what breaks it.


def crashes_beside_iwae(objective, log_w):
    return Weights(objective.no_such_thing, None, None) if type(objective) is not IWAE else score(objective, log_w)


def test_an_estimator_that_crashes_has_not_refused():
    with pytest.raises(
        ConformanceError, match=r"does not work with CIWAE: AttributeError.* cause: an error in its own"
    ) as raised:
        check_estimator(crashes_beside_iwae)
    assert raised.value.properties == {"ciwae", "l_alpha", "median", "miwae", "power", "vae"}
    findings = objective_findings(Power(k=4, gradient=at({2}, crashes_beside_iwae)))
    assert {f.property for f in findings if f.passed is False} == {"estimator <lambda>"}


def linear_alone(objective, log_w):
    if not objective.linear:
        raise ValueError("needs a linear objective")
    return score(objective, log_w)


def linear_and_wrong(objective, log_w):
    linear_alone(objective, log_w)
    return wrong_sign(objective, log_w)


def refuses_everything(objective, log_w):
    raise ValueError("not today")


def test_an_estimator_is_checked_where_it_does_not_refuse():
    findings = {f.property: f for f in check_estimator(linear_alone)}
    assert findings["weights"].passed and findings["vae"].passed and findings["kl_weight"].passed
    assert findings["iwae"].passed is None and findings["iwae"].message == "refused: needs a linear objective"
    with pytest.raises(ConformanceError) as raised:
        check_estimator(linear_and_wrong)
    assert raised.value.properties == {"l_alpha", "vae"}
    with pytest.raises(ConformanceError, match="refuses each of the library's objectives, such as iwae: not today"):
        check_estimator(refuses_everything)


def untempered_alone(objective, log_w):
    if objective.kl_weight != 1:
        raise ValueError("needs kl_weight = 1")
    return score(objective, log_w)


def four_alone(objective, log_w):
    if log_w.shape[0] > 4:
        raise ValueError("needs four samples at most")
    return score(objective, log_w)


@pytest.mark.parametrize(("estimator", "where"), [(untempered_alone, "kl_weight"), (four_alone, "k = 8")])
def test_a_refusal_of_an_option_is_a_refusal(estimator, where):
    findings = check_estimator(estimator)
    assert {f.property for f in findings if f.passed is None} == {where}


def test_a_name_that_is_not_known_is_said_to_be():
    with pytest.raises(PluginError, match=r"^unknown estimator 'typo': choose from dreg, "):
        check_estimator("typo")


# What it leaves as it was.


def by_chance(objective, log_w):
    """An unbiased baseline drawn anew, which no finite number of draws makes exact."""
    a, c, s = score(objective, log_w)
    return Weights(a, c, s * 2 * (torch.rand(log_w.shape[1]) < 0.5))


def test_random_numbers_come_from_a_seed_and_are_given_back():
    messages = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with pytest.raises(ConformanceError) as raised:
            check_estimator(by_chance)
        assert torch.equal(torch.get_rng_state(), before)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_warnings_are_kept_inside_and_still_to_come(monkeypatch):
    monkeypatch.setattr(messages, "warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_estimator("stl", unbiased=False)
    with pytest.warns(UserWarning, match="gradient='stl' is biased for IWAE"):
        IWAE(k=8, gradient="stl")


def test_the_default_dtype_changes_nothing():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert not broken(check_estimator("dreg"))
    finally:
        torch.set_default_dtype(torch.float32)
