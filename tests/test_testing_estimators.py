"""The kit on estimators: the library's own pass, and those that are biased or malformed do not."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from conformance import broken

from mcobjectives import IWAE, Power, Weights, plugins
from mcobjectives.estimators import require_smooth
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
