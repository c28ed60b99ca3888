"""Objectives as values: frozen, comparable, picklable, printable, and made of arguments that are looked at."""

from __future__ import annotations

import copy
import math
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
import torch
from toys import LinearGaussian, every

from mcobjectives import CIWAE, IWAE, MIWAE, VAE, LAlpha, Objective, Power, Split


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


@every
def test_objectives_are_frozen_comparable_picklable_and_printable(objective):
    twin = pickle.loads(pickle.dumps(objective))
    assert twin == objective and hash(twin) == hash(objective) and copy.deepcopy(objective) == objective
    assert eval(repr(objective), {type(objective).__name__: type(objective)}) == objective
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
    *[(VAE, {"analytic_kl": v}, "analytic_kl must be True or False") for v in ("False", "no", 1, None)],
    *[(LAlpha, {"alpha": a}, "alpha must be a finite number") for a in (-1.0, math.nan, math.inf)],
    *[(VAE, {"kl_weight": t}, "kl_weight must be a finite number") for t in (-0.1, math.nan, math.inf, "1")],
    *[(IWAE, {"chunk_size": c}, "chunk_size must be an integer") for c in (0, 2.5, True)],
    *[(IWAE, {"backward_samples": m}, "backward_samples must be an integer") for m in (0, 2.5, True)],
    (IWAE, {"k": 5, "backward_samples": 6}, "backward_samples must be at most k = 5"),
    (IWAE, {"gradient": "reparametrise"}, "gradient: unknown estimator 'reparametrise': choose from .*dreg.*reparam"),
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


@pytest.mark.parametrize("name, kind", [("exempt", "frozenset[str]"), ("smooth", "bool"), ("linear", "bool")])
def test_what_a_class_states_is_no_parameter(name, kind):
    """Annotated it would be one: `exempt` the first, in the place of k."""
    value = getattr(Objective, name)
    with pytest.raises(TypeError, match=rf"^Annotated annotates {name} as a field: write `{name} = ...`, without"):
        type("Annotated", (Objective,), {name: value, "__annotations__": {name: kind}})
    type("Stated", (Objective,), {name: value, "__annotations__": {name: f"ClassVar[{kind}]"}})
