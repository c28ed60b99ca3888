"""The kit on objectives: what the library brings passes, and each property fails on what breaks it, alone."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

import pytest
import torch
from conformance import broken

from mcobjectives import IWAE, MIWAE, VAE, LAlpha, Median, Objective, Power, Split, get_objective, plugins
from mcobjectives.reductions import log_mean_exp
from mcobjectives.testing import EXEMPTABLE, ConformanceError, check_objective
from mcobjectives.testing.estimators import own_names
from mcobjectives.testing.objectives import objective_findings

torch.set_num_threads(1)


LOAD = plugins.load


# What the library brings.


def smaller(cls):
    return cls(k=8) if "k" in {f.name for f in dataclasses.fields(cls)} else cls()


OBJECTIVES = [smaller(get_objective(name)) for name in own_names(plugins.OBJECTIVES)]
VARIANTS = [
    VAE(k=1),
    VAE(k=3, analytic_kl=True),
    IWAE(k=300),
    IWAE(k=6, kl_weight=0.3, gradient="dreg", chunk_size=2),
    IWAE(k=4, gradient="vimco"),
    LAlpha(k=6, alpha=2.0),
    Median(k=2),
    Median(k=7),
    MIWAE(k1=1, k2=8),
    MIWAE(k1=8, k2=1),
    Power(k=6, p=-3.0),
    Power(k=6, p=1e-7),
    Power(k=6, p=1000.0),
    Split(generative=IWAE(k=6), inference=MIWAE(k1=3, k2=2)),
    Split(generative=IWAE(k=4), inference=Power(k=4, p=0.5, gradient="vimco")),
]


@pytest.mark.parametrize("objective", OBJECTIVES + VARIANTS, ids=repr)
def test_the_objectives_of_the_library_conform(objective):
    findings = check_objective(objective)
    assert not broken(findings)
    names = [f.property for f in findings]
    assert len(names) == len(set(names)) and set(names) > EXEMPTABLE


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.smooth], ids=repr)
def test_every_estimator_is_checked_on_every_objective(objective):
    findings = {f.property: f for f in check_objective(objective)}
    for name in own_names(plugins.ESTIMATORS):
        assert findings[f"estimator {name}"].passed, findings[f"estimator {name}"].message


# Objectives that break one promise each.


@dataclass(frozen=True, repr=False)
class Sound(Objective):
    """The IWAE, without closed forms; what follows breaks it."""

    k: int = 8

    def reduce(self, log_w):
        return log_mean_exp(log_w)


class KeepsAxis(Sound):
    def reduce(self, log_w):
        return log_w.logsumexp(0, keepdim=True) - math.log(log_w.shape[0])


class Forgets(Sound):
    limit: float = 1.0


class BadDeclaration(Sound):
    exempt = frozenset({"smoothness"})


class InPlace(Sound):
    def reduce(self, log_w):
        value = log_mean_exp(log_w)
        log_w.detach().clamp_(max=50.0)
        return value


class Random(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w + 1e-3 * torch.randn_like(log_w))


class SeesTheBatch(Sound):
    def reduce(self, log_w):
        mean = log_w.mean(0)
        return mean + (log_mean_exp(log_w) - mean) / log_w.shape[1]


class SeesItsPlace(Sound):
    def reduce(self, log_w):
        mean, place = log_w.mean(0), torch.arange(log_w.shape[1], device=log_w.device)
        return mean + (log_mean_exp(log_w) - mean) / (1 + place)


class NotShift(Sound):
    def reduce(self, log_w):
        return log_w.asinh().mean(0).sinh()


class ByPosition(Sound):
    def reduce(self, log_w):
        w = torch.arange(1, log_w.shape[0] + 1, dtype=log_w.dtype, device=log_w.device)
        return (w @ log_w) / w.sum()


class OddAlone(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w) + 0.5 * (log_w.shape[0] == 1)


class Extrapolates(Sound):
    exempt = frozenset({"monotone"})

    def reduce(self, log_w):
        return 2 * log_mean_exp(log_w) - log_w.mean(0)


class NotMonotone(Sound):
    def reduce(self, log_w):
        return (log_w.softmax(0) * log_w).sum(0)


class Clamps(Sound):
    """Log-weights cut off where those of images may lie."""

    def reduce(self, log_w):
        return super().reduce(log_w.clamp(-1000, 1000))


class Overflows(Sound):
    def reduce(self, log_w):
        return log_w.exp().mean(0).log()


class Doubles(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w.double())


class OnTheCPU(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w + torch.zeros(log_w.shape[0], 1))


class Detaches(Sound):
    def reduce(self, log_w):
        mean = log_w.mean(0)
        return mean + (log_mean_exp(log_w) - mean).detach()


class WrongTwice(Sound):
    """Right slopes by a backward that cannot be differentiated again: silently, the curvatures are zero."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, log_w):
            ctx.save_for_backward(log_w.softmax(0))
            return log_mean_exp(log_w)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    def reduce(self, log_w):
        return self.Function.apply(log_w)


class Jumps(Sound):
    exempt = frozenset({"monotone"})
    smooth = False

    def reduce(self, log_w):
        return torch.where(log_w.amax(0) - log_w.amin(0) < 3, log_w.mean(0), log_mean_exp(log_w))


class Kinks(Sound):
    def reduce(self, log_w):
        return (log_w.amax(0) + log_mean_exp(log_w)) / 2


class NeedlesslyRough(Sound):
    smooth = False


class NeedlesslyExempt(Sound):
    exempt = frozenset({"bounds"})


class WrongSlopes(Sound):
    def slopes(self, log_w):
        return torch.full_like(log_w, 1 / log_w.shape[0])


class WrongCurvatures(Sound):
    def curvatures(self, log_w):
        return -(log_w.softmax(0) ** 2)


class WrongLeaveOneOut(Sound):
    def leave_one_out(self, log_w):
        return log_mean_exp(log_w).expand_as(log_w)


MUTANTS = {
    KeepsAxis: "shape",
    Forgets: "dataclass",
    BadDeclaration: "exempt",
    InPlace: "pure",
    Random: "pure",
    SeesTheBatch: "columns",
    SeesItsPlace: "columns",
    NotShift: "shift",
    ByPosition: "permutation",
    OddAlone: "one_sample",
    Extrapolates: "bounds",
    NotMonotone: "monotone",
    Overflows: "extreme",
    Clamps: "shift",
    Doubles: "dtype",
    OnTheCPU: "device",
    Detaches: "gradcheck",
    WrongTwice: "gradcheck",
    Jumps: "continuous",
    Kinks: "smooth",
    NeedlesslyRough: "smooth",
    NeedlesslyExempt: "bounds",
    WrongSlopes: "slopes",
    WrongCurvatures: "curvatures",
    WrongLeaveOneOut: "leave_one_out",
}


def test_the_sound_objective_conforms():
    assert not broken(check_objective(Sound()))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda c: c.__name__)
def test_a_mutated_objective_breaks_one_property_and_no_other(mutant):
    findings = objective_findings(mutant())
    assert broken(findings) == {MUTANTS[mutant]}
    with pytest.raises(ConformanceError) as raised:
        check_objective(mutant())
    assert raised.value.properties == {MUTANTS[mutant]}
    message = next(f.message for f in findings if f.passed is False)
    assert message in str(raised.value) and repr(mutant()) in str(raised.value)
    assert "Usual cause: " in message or "is declared in `exempt`, yet it holds" in message


def test_each_property_has_a_mutant():
    properties = {f.property for f in objective_findings(Sound()) if not f.property.startswith("estimator ")}
    assert properties == set(MUTANTS.values())


class LeaksTheSurrogate(Sound):
    """A surrogate that counts the gradient twice, and one whose value is not the bound's."""

    def surrogate(self, model, x):
        value = super().surrogate(model, x)
        return 2 * value - value.detach()


class WrongValue(Sound):
    def surrogate(self, model, x):
        return super().surrogate(model, x) + 1e-3


@pytest.mark.parametrize("mutant", [LeaksTheSurrogate, WrongValue])
def test_a_broken_surrogate_breaks_every_estimator(mutant):
    expected = {f"estimator {name}" for name in own_names(plugins.ESTIMATORS)}
    assert broken(objective_findings(mutant())) == expected


def spoilable(name):
    """Which of phi's arrays an estimator has."""
    weights = IWAE(k=4, gradient=name).weights(torch.zeros(4, 1))
    return "c" if weights.s is None else "s"


@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
@pytest.mark.parametrize("part", ["a", "phi"])
@pytest.mark.parametrize("name", [n for n in own_names(plugins.ESTIMATORS) if n != "reparam"])  # F itself, above
def test_a_mutated_estimator_breaks_its_property_and_no_other(monkeypatch, name, part):
    """Objectives are checked with the library's own estimators: spoil one of those, in theta's weights or in phi's."""
    right, phi = LOAD(plugins.ESTIMATORS, name), spoilable(name)

    def spoilt(objective, log_w):
        weights = right(objective, log_w)
        array = "a" if part == "a" else phi
        return weights._replace(**{array: 1.1 * getattr(weights, array)})

    monkeypatch.setattr(plugins, "load", lambda group, key: spoilt if key == name else LOAD(group, key))
    subject = VAE(k=3) if name == "stl" else Sound()  # STL is unbiased only where F is linear
    findings = [f for f in objective_findings(subject) if f.passed is False]
    assert {f.property for f in findings} == {f"estimator {name}"}
    assert re.search(r"expected gradient", findings[0].message) and "Usual cause: " in findings[0].message


class AcceptsAnything(Median):
    """Claims slopes that jump and gets past the refusal."""

    def curvatures(self, log_w):
        return torch.zeros_like(log_w)


@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
def test_what_is_declared_rough_must_be_refused(monkeypatch):
    assert not broken(objective_findings(AcceptsAnything(k=5)))
    monkeypatch.setattr("mcobjectives.estimators.require_smooth", lambda *_: None)
    assert broken(objective_findings(AcceptsAnything(k=5))) == {"estimator stl", "estimator dreg"}


@dataclass(frozen=True)
class NeedsTwo(Objective):
    """Cannot be made with one sample, and says so."""

    k: int = 4

    exempt = frozenset({"one_sample"})

    def reduce(self, log_w):
        return log_mean_exp(log_w)

    def __post_init__(self):
        if self.k < 2:
            raise ValueError(f"k must be at least 2, got {self.k}")
        super().__post_init__()


def test_an_exemption_covers_what_cannot_be_made():
    findings = {f.property: f for f in check_objective(NeedsTwo())}
    assert findings["one_sample"].message == "exempt, as declared"
    undeclared = type("Undeclared", (NeedsTwo,), {"exempt": frozenset()})
    assert broken(objective_findings(undeclared())) == {"one_sample"}


def test_an_exemption_is_not_disproved_by_a_size_at_which_it_is_needless():
    assert not broken(check_objective(MIWAE(k1=1, k2=6)))
    always = type("Always", (Sound,), {"exempt": frozenset({"permutation"})})
    with pytest.raises(ConformanceError, match="Take 'permutation' out"):
        check_objective(always())


def test_the_message_shows_the_property_the_numbers_and_the_cause():
    with pytest.raises(ConformanceError) as raised:
        check_objective(type("Sum", (Sound,), {"reduce": lambda self, log_w: log_w.logsumexp(0)})())
    first, line = str(raised.value).splitlines()
    assert first.startswith("Sum(k=8) breaks 1 of ")
    assert line.startswith("  bounds: F = ") and "for log-weights between" in line
    assert "a missing -log k" in line and "declare exempt = frozenset({'bounds'}) on the class" in line
