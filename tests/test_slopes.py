"""What is seen of the slopes of F, whether they vary or jump, and which estimators that rules out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from toys import F64, Largest, PartlyLargest

from mcobjectives import CIWAE, IWAE, VAE, LAlpha, Median, Objective, Power, derivatives
from mcobjectives.testing import ConformanceError, check_objective


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


def test_slopes_that_vary_by_little_vary():
    assert CIWAE(k=4, beta=0.9999).slopes_vary and not CIWAE(k=4, beta=1.0).slopes_vary


@pytest.mark.parametrize("k", [10_000, 100_001])
def test_of_many_samples_jumps_are_found_in_few_walks(k):
    """As many as of a thousand samples would make the smallest objective take a minute."""
    largest = []

    def seen(log_w):
        largest.append(log_w.numel())
        return IWAE(k=k).slopes(log_w)

    assert not derivatives.slopes_jump(seen, k)
    assert len(largest) < 50 and max(largest) <= max(6 * k, 960_000)
    assert IWAE(k=k, gradient="dreg").slopes_vary
    with pytest.raises(ValueError, match="jump"):
        Median(k=k, gradient="dreg")


@pytest.mark.parametrize("k", [50, 2000, 5000])
def test_a_jump_that_is_on_some_walks_alone_is_found_of_many_samples_too(k):
    @dataclass(frozen=True)
    class Floored(Objective):
        k: int = 50

        def reduce(self, log_w):
            return torch.maximum(log_w, log_w.mean(0) - 3).logsumexp(0) - math.log(self.k)

    with pytest.raises(ValueError, match="jump"):
        Floored(k=k, gradient="dreg")
