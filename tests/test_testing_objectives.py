"""The kit on objectives: what the library brings passes, and each property fails on what breaks it, alone."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from dataclasses import KW_ONLY, InitVar, dataclass, field

import numpy as np
import pytest
import torch
from conformance import broken

from mcobjectives import (
    IWAE,
    MIWAE,
    VAE,
    LAlpha,
    Median,
    Objective,
    Power,
    Split,
    Weights,
    get_objective,
    messages,
    plugins,
)
from mcobjectives.derivatives import leave_one_out
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
    Power(k=6, p=-1e-3),
    Power(k=6, p=1e-7),
    Power(k=6, p=1000.0),
    Split(generative=IWAE(k=6), inference=MIWAE(k1=3, k2=2)),
    Split(generative=IWAE(k=4), inference=Power(k=4, p=0.5, gradient="vimco")),
    Split(generative=IWAE(k=4), inference=VAE(k=4, gradient="score")),
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
        w = log_w.softmax(0)
        return torch.where(w == 0, 0.0, w * log_w).sum(0)


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
        return log_mean_exp(torch.cat([log_w[:1], log_w[1:].detach()]))


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


class WrongSign(Sound):
    def __call__(self, model, x):
        return self.surrogate(model, x).mean()


class InBits(Sound):
    def bound(self, model, x):
        return super().bound(model, x) / math.log(2)


class SumsTheBatch(Sound):
    def __call__(self, model, x):
        return -self.surrogate(model, x).sum()


class IgnoresKLWeight(Sound):
    tempering = 1.0


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
    WrongSign: "loss",
    InBits: "loss",
    SumsTheBatch: "loss",
    IgnoresKLWeight: "loss",
}


@dataclass(frozen=True, repr=False)
class KeywordOnly(Sound):
    _: KW_ONLY
    alpha: float = 0.5


@dataclass(frozen=True, repr=False)
class WithInitVar(Sound):
    scale: InitVar[float] = 1.0

    def __post_init__(self, scale):
        super().__post_init__()


@dataclass(frozen=True)
class Learnable(Sound):
    """Half-way between two objectives, by a parameter of its own, which `bind` trains with the model's."""

    share: torch.nn.Parameter = field(default_factory=lambda: torch.nn.Parameter(torch.tensor([0.3])))

    def reduce(self, log_w):
        b = self.share.double().sigmoid().to(log_w.dtype)
        return b * log_w.mean(0) + (1 - b) * log_mean_exp(log_w)


class ConstantByList(Sound):
    """Makes a tensor where Python makes it, and takes it to the log-weights' device."""

    def reduce(self, log_w):
        return log_mean_exp(log_w + torch.tensor([0.0] * log_w.shape[0]).to(log_w).unsqueeze(1))


class AsksForNumbers(Sound):
    """Branches on its log-weights, so that no device without numbers can run it; a scalar mixes with any device."""

    def reduce(self, log_w):
        assert not bool(log_w.isnan().any())
        return log_mean_exp(log_w + torch.tensor(0.0, dtype=log_w.dtype))


@pytest.mark.parametrize("sound", [KeywordOnly, WithInitVar, Learnable, ConstantByList, AsksForNumbers])
def test_what_keeps_its_promises_in_a_way_of_its_own_conforms(sound):
    assert not broken(objective_findings(sound()))


def test_an_objective_with_parameters_is_not_checked_where_the_library_refuses_them():
    findings = {f.property: f for f in objective_findings(Learnable())}
    assert findings["estimator reparam"].passed
    for name in ("dreg", "rws", "score", "stl", "vimco"):
        finding = findings[f"estimator {name}"]
        assert finding.passed is None and finding.message.startswith("refused: reduce(log_w) has parameters of its own")


# Objectives that break one promise, at one place alone.


class OnlyIn(Sound):
    """Overflows in one dtype."""

    dtype = torch.float32

    def reduce(self, log_w):
        return log_w.exp().mean(0).log() if log_w.dtype == self.dtype else log_mean_exp(log_w)


class OnlyInDouble(OnlyIn):
    dtype = torch.float64


class NaNAtAZeroWeight(Sound):
    def reduce(self, log_w):
        mean = log_w.mean(0)
        return mean + log_mean_exp(log_w - mean)


class OverflowingSlopes(Sound):
    def slopes(self, log_w):
        w = log_w.exp()
        return w / w.sum(0)


class OverflowingCurvatures(Sound):
    def curvatures(self, log_w):
        w = log_w.exp() / log_w.exp().sum(0)
        return w * (1 - w)


class OverflowingLeaveOneOut(Sound):
    def leave_one_out(self, log_w):
        return leave_one_out(lambda log_w: log_w.exp().mean(0).log(), log_w)


class OtherInFloat32(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w) + 0.1 * (log_w.dtype == torch.float32)


class DifferencesForSlopes(Sound):
    """Exact enough in float64, and zero in float32, which a step of 1e-5 does not change."""

    def slopes(self, log_w):
        steps = 1e-5 * torch.eye(log_w.shape[0], dtype=log_w.dtype, device=log_w.device).unsqueeze(2)
        rows = [(self.reduce(log_w + step) - self.reduce(log_w - step)) / 2e-5 for step in steps]
        return torch.stack(rows)


class DoubleSlopes(Sound):
    def slopes(self, log_w):
        return log_w.double().softmax(0)


class DoubleCurvatures(Sound):
    def curvatures(self, log_w):
        w = log_w.double().softmax(0)
        return w * (1 - w)


class SlopesOnTheCPU(Sound):
    def slopes(self, log_w):
        return log_w.softmax(0) * torch.ones(log_w.shape[0], 1)


class CurvaturesOnTheCPU(Sound):
    def curvatures(self, log_w):
        w = log_w.softmax(0)
        return w * (torch.ones(log_w.shape[0], 1) - w)


class LeaveOneOutOnTheCPU(Sound):
    def leave_one_out(self, log_w):
        return leave_one_out(log_mean_exp, log_w) + torch.zeros(log_w.shape[0], 1)


class ByNumPy(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w + torch.from_numpy(np.zeros((log_w.shape[0], 1))).to(log_w.dtype))


class NumbersAndSlopesOnTheCPU(AsksForNumbers):
    def slopes(self, log_w):
        assert not bool(log_w.isnan().any())
        return log_w.softmax(0) * torch.ones(log_w.shape[0], 1)


class SmallJump(Sound):
    """Of 1e-3 in F."""

    def reduce(self, log_w):
        return log_mean_exp(log_w) + 1e-3 * (log_w.amax(0) - log_w.mean(0) > 1)


class SlightKink(Sound):
    """A jump of 1e-3 in the slopes."""

    def reduce(self, log_w):
        return 1e-3 * log_w.amax(0) + 0.999 * log_mean_exp(log_w)


class NarrowJump(Sound):
    """A jump and its return close by."""

    def reduce(self, log_w):
        spread = log_w.amax(0) - log_w.amin(0)
        return log_mean_exp(log_w) + 0.1 * ((spread > 3) & (spread < 3.001))


class NotLinear(Sound):
    linear = True


class SlopesATouchOff(Sound):
    def slopes(self, log_w):
        return 1.001 * log_w.softmax(0)


class SlopesOfNarrowWeights(Sound):
    """Right where log-weights lie close together."""

    def slopes(self, log_w):
        w = log_w.softmax(0)
        return w * (0.9 + 0.1 / (log_w.amax(0) - log_w.amin(0)).clamp(min=1))


class OffAlone(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w) + 1e-6 * (log_w.shape[0] == 1)


class AboveTheLargest(Sound):
    smooth = False

    def reduce(self, log_w):
        return log_w.amax(0) + 1e-5 * (log_w.shape[0] > 1)


class OffAtTies(Sound):
    """Equal log-weights, as at the start of a training, divide by a spread of zero."""

    def reduce(self, log_w):
        tied = log_w.amax(0) == log_w.amin(0)
        return log_mean_exp(log_w) + torch.where(tied, 1.0, 0.0).to(log_w) * (log_w.shape[0] > 1)


class FallsInTheLast(Sound):
    exempt = frozenset({"permutation", "bounds"})

    def reduce(self, log_w):
        return log_mean_exp(log_w) - 0.5 * (log_w[-1] - log_w.mean(0)) * (log_w.shape[0] > 1)


class Squeezes(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w).squeeze()


class NoEquality(Sound):
    def __eq__(self, other):
        return False

    __hash__ = Sound.__hash__


PLACES = {
    OnlyIn: "extreme",
    OnlyInDouble: "extreme",
    NaNAtAZeroWeight: "extreme",
    OverflowingSlopes: "extreme",
    OverflowingCurvatures: "extreme",
    OverflowingLeaveOneOut: "extreme",
    OtherInFloat32: "dtype",
    DifferencesForSlopes: "dtype",
    DoubleSlopes: "dtype",
    DoubleCurvatures: "dtype",
    SlopesOnTheCPU: "device",
    CurvaturesOnTheCPU: "device",
    LeaveOneOutOnTheCPU: "device",
    ByNumPy: "device",
    NumbersAndSlopesOnTheCPU: "device",
    SmallJump: "continuous",
    NarrowJump: "continuous",
    SlightKink: "smooth",
    NotLinear: "smooth",
    SlopesATouchOff: "slopes",
    SlopesOfNarrowWeights: "slopes",
    OffAlone: "one_sample",
    AboveTheLargest: "bounds",
    OffAtTies: "bounds",
    FallsInTheLast: "monotone",
    Squeezes: "shape",
    NoEquality: "dataclass",
}


@pytest.mark.parametrize("mutant", PLACES, ids=lambda c: c.__name__)
def test_what_is_broken_at_one_place_alone_is_found(mutant):
    assert broken(objective_findings(mutant())) == {PLACES[mutant]}


class TellsOddOrders(Sound):
    """Changes its sign where samples are put in an odd order: the shuffles of ten samples happen to be even."""

    k: int = 10

    def reduce(self, log_w):
        i, j = torch.triu_indices(log_w.shape[0], log_w.shape[0], 1)
        return log_mean_exp(log_w) + (log_w[i] - log_w[j]).tanh().prod(0) * (log_w.shape[0] > 1)


def test_what_the_shuffles_miss_the_reverse_order_shows():
    (finding,) = (f for f in objective_findings(TellsOddOrders(k=10)) if f.property == "permutation")
    assert finding.message.startswith("F changes when the samples are taken in reverse: got ")


FACTORIES = {
    **dict.fromkeys(("arange", "empty", "eye", "ones", "rand", "randn", "randperm", "zeros"), (3,)),
    **dict.fromkeys(("linspace", "logspace"), (0, 1, 3)),
    **dict.fromkeys(("as_tensor", "tensor"), ([0.0],)),
    "full": ((3,), 0.0),
    "randint": (2, (3,)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_each_factory_is_watched_where_numbers_are_asked_for(name):
    class Makes(AsksForNumbers):
        def reduce(self, log_w):
            return super().reduce(log_w) + 0 * len(getattr(torch, name)(*FACTORIES[name]))

    (finding,) = (f for f in objective_findings(Makes()) if f.property == "device")
    assert finding.message.startswith(f"torch.{name} is called without device=log_w.device")


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


class ChangesTheLast(Sound):
    def reduce(self, log_w):
        value = log_mean_exp(log_w).clone()
        if len(value) > 5:
            value[-1] += torch.rand(())
        return value


class Roots(Sound):
    def reduce(self, log_w):
        return log_mean_exp(log_w).sqrt() ** 2


class Raises(Sound):
    def reduce(self, log_w):
        raise RuntimeError("line one\n  line two")


def message_of(objective):
    (finding,) = (f for f in objective_findings(objective) if f.passed is False)
    return finding.message


def test_a_message_shows_the_numbers_that_differ():
    first, again = re.match(
        r"reduce .* gave (.*), then (.*), at data point 47\. ", message_of(ChangesTheLast())
    ).groups()
    assert first != again
    assert re.match(r"reduce gives NaN at \d+ of 48 data points, one with .*: a logarithm, root", message_of(Roots()))


def test_an_error_is_quoted_on_one_line_without_a_guess_at_its_cause():
    assert message_of(Raises()) == "raised RuntimeError: line one line two"


def test_the_check_keeps_warnings_to_itself(monkeypatch):
    monkeypatch.setattr(messages, "warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_objective(IWAE(k=8))
    with pytest.warns(UserWarning, match="gradient='stl' is biased for IWAE"):
        IWAE(k=8, gradient="stl")


# Objectives with weights of their own.


class OwnReparam(Sound):
    def weights(self, log_w):
        g = self.slopes(log_w)
        return Weights(g, g, self.tempering * g)


class OwnHalf(Sound):
    def weights(self, log_w):
        g = self.slopes(log_w)
        return Weights(g / 2, g, self.tempering * g)


class OwnWrongSign(Sound):
    def weights(self, log_w):
        g = self.slopes(log_w)
        return Weights(g, None, self.reduce(log_w) - self.tempering * g)


class OwnBatchMean(Sound):
    def weights(self, log_w):
        f, g = self.reduce(log_w), self.slopes(log_w)
        return Weights(g, None, self.tempering * g - (f - f.mean()))


class OwnExp(Sound):
    def weights(self, log_w):
        w = log_w.exp()
        return Weights(self.slopes(log_w), None, -w / w.sum(0))


def test_an_objective_of_its_own_weights_is_checked_for_phi_too():
    found = {f.property: f for f in check_objective(OwnReparam())}
    assert all(found[name].passed for name in ("weights", "weights: theta", "weights: phi"))
    found = {f.property: f for f in check_objective(OwnWrongSign())}
    assert found["weights: theta"].passed and found["weights: phi"].passed is None
    assert re.match(
        r"phi follows another target, or is biased: .* the expected gradient of phi \(.*\) is -?\d",
        found["weights: phi"].message,
    )


@pytest.mark.parametrize(
    ("mutant", "where"), [(OwnHalf, "weights: theta"), (OwnBatchMean, "weights"), (OwnExp, "weights")]
)
def test_wrong_weights_of_its_own_are_found(mutant, where):
    assert broken(objective_findings(mutant())) == {where}


# How exact the estimators' checks are.


class ValueATouchOff(Sound):
    def surrogate(self, model, x):
        return super().surrogate(model, x) + 1e-5


class NeedsThree(LeaksTheSurrogate):
    """Is made with three samples at least."""

    exempt = frozenset({"one_sample"})

    def __post_init__(self):
        if self.k < 3:
            raise ValueError(f"k must be at least 3, got {self.k}")
        super().__post_init__()


@pytest.mark.parametrize("mutant", [ValueATouchOff, NeedsThree])
def test_a_surrogate_a_touch_off_or_at_some_sizes_alone_is_found(mutant):
    expected = {f"estimator {name}" for name in own_names(plugins.ESTIMATORS)}
    assert broken(objective_findings(mutant())) == expected
