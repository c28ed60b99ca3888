"""Gradient diagnostics on losses whose gradients have a known mean and variance, and on the estimators themselves."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategoricalStraightThrough
from toys import Mixed

from mcobjectives import IWAE, MIWAE, VAE, Objective, Split, diagnostics
from mcobjectives.diagnostics import Comparison, Row, compare_gradients, gradient_statistics, parameter_groups

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
RECORDS = Path(__file__).parent.parent / "benchmarks" / "results"


class Vectors(nn.Module):
    """Two groups of parameters that a loss can give any gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3, dtype=F64)), nn.Parameter(torch.zeros(2, 1, dtype=F64))


MEAN = {"a": torch.tensor([1.0, -2.0, 0.0], dtype=F64), "b": torch.tensor([0.5, 0.5], dtype=F64)}
STD = {"a": torch.tensor([0.5, 1.0, 2.0], dtype=F64), "b": torch.tensor([0.0, 0.1], dtype=F64)}


def noisy(bias: float = 0.0):
    """A loss whose gradient is MEAN + bias + STD * noise."""

    def loss(model: Vectors, x: object) -> Tensor:
        parts = [
            (parameter.flatten() * (MEAN[name] + bias + STD[name] * torch.randn_like(MEAN[name]))).sum()
            for name, parameter in model.named_parameters()
        ]
        return sum(parts)

    return loss


class Gaussian(nn.Module):
    """h ~ N(0, 1), x | h ~ N(h + shift, 1), q(h | x) = N(loc, std^2): one number each."""

    def __init__(self, loc: float = 0.3, std: float = 0.8, shift: float = 0.2) -> None:
        super().__init__()
        self.loc, self.shift = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (loc, shift))
        self.std = std

    def posterior(self, x: Tensor) -> Independent:
        return Independent(Normal(self.loc.expand(len(x), 1), self.std), 1)

    def log_joint(self, x: Tensor, h: Tensor) -> Tensor:
        return (Normal(0.0, 1.0).log_prob(h) + Normal(h + self.shift, 1.0).log_prob(x)).sum(-1)


X = torch.tensor([[0.7], [-0.4], [1.9], [0.1]], dtype=F64)
MANY = X.repeat(1000, 1)  # many independent samples in one gradient


# Moments.


def test_moments_of_a_known_gradient():
    torch.manual_seed(0)
    found = gradient_statistics(noisy(), Vectors(), None, draws=4000)
    for name, stats in found.items():
        error = STD[name] / math.sqrt(4000)
        assert bool(((stats.mean - MEAN[name]).abs() <= 4 * error + 1e-12).all())
        torch.testing.assert_close(stats.variance, STD[name] ** 2, rtol=0.1, atol=1e-12)
        assert stats.draws == 4000 and stats.ms > 0
    assert float(found["a"].snr[0]) == pytest.approx(2, rel=0.1)
    assert float(found["b"].snr[0]) == math.inf
    assert found["a"].total_variance == pytest.approx(5.25, rel=0.1)
    assert found["a"].group_snr == pytest.approx(math.sqrt(5 / 5.25), rel=0.1)


def test_moments_equal_those_of_all_gradients_at_once():
    model, seen = Vectors(), []

    def loss(model, x):
        gradient = 1e3 + torch.randn(3, dtype=F64)
        seen.append(gradient)
        return (model.a * gradient).sum()

    found = gradient_statistics(loss, model, None, draws=7)["a"]
    torch.testing.assert_close(found.mean, torch.stack(seen).mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.variance, torch.stack(seen).var(0), rtol=1e-10, atol=0)


def test_norm_of_a_gradient_that_is_zero_is_not_that_of_its_noise():
    torch.manual_seed(0)
    draws = [
        gradient_statistics(lambda m, x: (m.a * torch.randn(3)).sum(), Vectors(), None, draws=5, groups=None)["a"]
        for _ in range(200)
    ]
    norms = torch.tensor([stats.squared_norm for stats in draws])
    assert abs(float(norms.mean())) < 4 * float(norms.std()) / math.sqrt(200)
    assert float(norms.mean()) < 0.1  # the plain squared norm of the mean averages 3 / 5


def test_a_gradient_without_noise():
    found = gradient_statistics(lambda m, x: 2 * m.a.sum(), Vectors(), None, draws=3)
    assert found["a"].group_snr == math.inf and found["a"].total_variance == 0
    assert found["b"].group_snr == 0 and bool((found["b"].snr == 0).all())  # a parameter that plays no part


def test_elbo_gradient_in_closed_form():
    # The gradient of minus the ELBO's estimate with respect to loc is 2 h + shift - x, h = loc + std * noise.
    torch.manual_seed(0)
    model, k, draws = Gaussian(), 3, 1000
    found = gradient_statistics(VAE(k=k), model, X, draws=draws)["loc"]
    variance = (2 * model.std) ** 2 / (len(X) * k)
    expected = float((2 * model.loc + model.shift - X.mean()).detach())
    assert float(found.mean) == pytest.approx(expected, abs=4 * math.sqrt(variance / draws))
    assert float(found.variance) == pytest.approx(variance, rel=0.2)


# Groups.


def test_groups_are_the_children_and_what_can_be_trained():
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.decoder = nn.Linear(1, 2)
    model.decoder.bias.requires_grad_(False)
    model.scale = nn.Parameter(torch.zeros(4))
    groups = parameter_groups(model)
    assert {name: len(group) for name, group in groups.items()} == {"scale": 1, "encoder": 4, "decoder": 1}
    assert groups["decoder"][0] is model.decoder.weight


def test_groups_of_the_users():
    model = Vectors()
    found = gradient_statistics(noisy(), model, None, draws=2, groups={"all": [model.b, model.a]})
    assert found["all"].mean.shape == (5,)
    assert float(found["all"].mean[0]) == 0.5  # in the order given: b_0 has no noise


def test_grad_is_left_alone():
    model = Gaussian()
    gradient_statistics(IWAE(k=2), model, X, draws=2)
    assert model.loc.grad is None


def test_numpy_integers_are_counts():
    assert gradient_statistics(IWAE(k=2), Gaussian(), X, draws=np.int64(3))["loc"].draws == 3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="draws must be an integer of at least 2, got 1"):
        gradient_statistics(noisy(), Vectors(), None, draws=1)
    with pytest.raises(ValueError, match="pass groups, a dict"):
        gradient_statistics(noisy(), object(), None)
    with pytest.raises(ValueError, match="no parameters"):
        gradient_statistics(noisy(), nn.Module(), None)
    with pytest.raises(ValueError, match="tells no reference"):
        compare_gradients(Vectors(), None, [noisy()])
    with pytest.raises(ValueError, match="3 exact gradients of group 'a'"):
        compare_gradients(Vectors(), None, [noisy()], draws=2, reference={"a": torch.zeros(2)})


# Comparisons.


def by_group(rows: Comparison, group: str) -> list[Row]:
    return [row for row in rows if row.group == group]


@pytest.mark.parametrize("reference", [MEAN, noisy()], ids=["exact", "long run"])
def test_bias_against_a_reference(reference):
    torch.manual_seed(0)
    draws, long = 1000, 5000
    rows = compare_gradients(
        Vectors(), None, [noisy(), noisy(bias=0.7)], draws=draws, reference=reference, reference_draws=long
    )
    honest, biased = by_group(rows, "a")
    noise = math.sqrt(5.25 / draws + (0 if reference is MEAN else 5.25 / long))
    assert honest.bias_error == pytest.approx(noise, rel=0.1)
    assert honest.bias < 2 * noise
    assert biased.bias == pytest.approx(0.7 * math.sqrt(3), abs=3 * noise)
    assert biased.reference_norm == pytest.approx(math.sqrt(5), abs=4 * noise)
    assert biased.variance == pytest.approx(5.25, rel=0.1)


def test_estimators_on_a_model():
    torch.manual_seed(0)
    pairs = [IWAE(k=8, gradient=name) for name in ("reparam", "stl", "dreg", "vimco")]
    rows = compare_gradients(Gaussian(), MANY, pairs, draws=40)
    assert [(row.objective, row.group) for row in rows] == [(o, g) for o in pairs for g in ("loc", "shift")]
    reparam, stl, dreg, vimco = by_group(rows, "loc")
    for unbiased in (reparam, dreg, vimco):
        assert unbiased.bias < 3 * unbiased.bias_error
    assert stl.bias > 4 * stl.bias_error
    assert dreg.variance < reparam.variance / 3
    assert dreg.snr > reparam.snr
    for row in by_group(rows, "shift"):
        assert row.bias < 3 * row.bias_error


def test_default_reference_without_rsample():
    class Discrete(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.5, 0.0, -1.0], dtype=F64))

        def posterior(self, x):
            return Categorical(logits=self.logits.expand(len(x), 3))

        def log_joint(self, x, h):
            return Normal(h.double(), 1.0).log_prob(x[:, 0]) - math.log(3)

    torch.manual_seed(0)
    pairs = [IWAE(k=4, gradient=name) for name in ("score", "vimco", "rws")]
    score, vimco, rws = compare_gradients(Discrete(), MANY, pairs, draws=40, reference_draws=120)
    assert score.bias < 3 * score.bias_error and vimco.bias < 3 * vimco.bias_error
    assert vimco.variance < score.variance
    assert rws.bias > 3 * rws.bias_error  # it follows another target


def test_a_split_is_compared_with_its_own_parts():
    torch.manual_seed(0)
    dreg = Split(generative=IWAE(k=6), inference=MIWAE(k1=2, k2=3, gradient="dreg"))
    stl = Split(generative=IWAE(k=8), inference=IWAE(k=8, gradient="stl"))
    right, wrong = by_group(compare_gradients(Gaussian(), MANY, [dreg, stl], draws=40, reference_draws=160), "loc")
    assert right.bias < 3 * right.bias_error
    assert wrong.bias > 4 * wrong.bias_error


@dataclass(frozen=True)
class Blend(Objective):
    """An objective made of objectives, whose gradient is its own."""

    first: Objective = field(default_factory=lambda: IWAE(k=8))
    second: Objective = field(default_factory=lambda: VAE(k=8))

    @property
    def k(self):
        return self.first.k

    def reduce(self, log_w):
        return 0.9 * self.first.reduce(log_w) + 0.1 * self.second.reduce(log_w)


def test_an_objective_of_objectives_is_compared_by_its_own_gradient():
    torch.manual_seed(0)
    pairs = [Blend(gradient="dreg"), Blend(gradient="stl")]
    right, wrong = by_group(compare_gradients(Gaussian(), MANY, pairs, draws=40), "loc")
    assert right.bias < 3 * right.bias_error
    assert wrong.bias > 4 * wrong.bias_error


def test_the_reference_of_a_split_back_propagates_all_samples():
    parts = {"generative": IWAE(k=8), "inference": IWAE(k=8, gradient="dreg")}
    reference = diagnostics._unbiased(Split(**parts, backward_samples=2), Gaussian(), MANY)
    assert reference == Split(generative=IWAE(k=8), inference=IWAE(k=8))
    assert diagnostics._unbiased(IWAE(k=8, gradient="dreg", backward_samples=2), Gaussian(), MANY) == IWAE(k=8)


def test_mixed_and_straight_through_latents_are_compared_with_the_score_family():
    torch.manual_seed(0)
    model, x = Mixed(), torch.full((40,), 0.9, dtype=F64)
    model = Flat(model)
    state = torch.get_rng_state()
    assert not diagnostics._is_pathwise(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    for row in compare_gradients(model, x, [IWAE(k=4, gradient="vimco")], draws=40, reference_draws=80):
        assert row.bias < 4 * row.bias_error

    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.5, 0.0, -1.0], dtype=F64))

        def posterior(self, x):
            return OneHotCategoricalStraightThrough(logits=self.logits.expand(len(x), 3))

        def log_joint(self, x, h):
            return 3 * h[..., 0] - math.log(3)

    [vimco] = compare_gradients(Straight(), MANY, [IWAE(k=4, gradient="vimco")], draws=40, reference_draws=80)
    assert vimco.bias < 4 * vimco.bias_error


class Flat(nn.Module):
    """A model whose parameters are one group each."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.posterior, self.log_joint = model.posterior, model.log_joint


def test_options_that_are_lists_or_tensors_have_references_of_their_own():
    @dataclass(frozen=True, eq=False)
    class Scaled(Objective):
        k: int = 2
        by: object = None

        def reduce(self, log_w):
            return float(self.by[0]) * log_w.mean(0)

    @dataclass(frozen=True)
    class Listed(Scaled):
        pass

    torch.manual_seed(0)
    tensors = [Scaled(by=torch.tensor([0.25, 0.0])), Scaled(by=torch.tensor([3.0, 0.0]))]
    same = [Listed(by=torch.tensor([0.25, 0.0])), Listed(by=torch.tensor([3.0, 0.0]))]
    for row in compare_gradients(Gaussian(), MANY, [*tensors, *same, Listed(by=[0.5])], draws=20, reference_draws=40):
        assert row.bias < 4 * row.bias_error


def test_frozen_parameters_and_sparse_gradients():
    model = Vectors()
    model.b.requires_grad_(False)
    with pytest.raises(ValueError, match=r"group\(s\) both have parameters that are frozen"):
        gradient_statistics(noisy(), model, None, draws=2, groups={"both": [model.a, model.b]})
    table = nn.Embedding(4, 2, sparse=True)
    found = gradient_statistics(lambda m, x: m(x).sum(), table, torch.tensor([1, 1, 3]), draws=2)
    assert found["weight"].mean.tolist() == [0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0]


def test_each_objective_has_its_own_reference():
    torch.manual_seed(0)
    for row in compare_gradients(Gaussian(), MANY, [VAE(k=1), IWAE(k=8)], draws=20, reference_draws=40):
        assert row.bias < 3 * row.bias_error


@pytest.mark.parametrize(("exact", "bias"), [(0.5, 0.0), (2.0, math.sqrt(3))])
def test_noise_is_taken_off_the_bias(exact, bias):
    gradients = iter([1.0, -1.0])  # mean 0 of squared error 1
    rows = compare_gradients(
        Gaussian(),
        X,
        [lambda model, x: model.loc * next(gradients)],
        draws=2,
        reference={"loc": torch.tensor([exact]), "shift": torch.zeros(1)},
    )
    assert rows[0].bias == pytest.approx(bias) and rows[0].bias_error == pytest.approx(1)


def test_the_table():
    row = Row(IWAE(k=5, gradient="dreg"), "encoder", 1.5, 0.0, 0.0123456, 2e-7, math.inf, 12.3456)
    table = Comparison([row, row._replace(objective=noisy(), group="b")])
    assert repr(table) == str(table)  # as a notebook shows it
    lines = str(table).splitlines()
    assert lines[0].split() == ["objective", "group", "|gradient|", "bias", "+-", "variance", "SNR", "ms"]
    assert lines[1].split() == [
        *("IWAE(k=5,", "gradient='dreg')", "encoder"),
        *("1.5", "0", "0.0123", "2e-07", "inf", "12.3"),
    ]
    assert lines[2].startswith("loss ") and len(set(map(len, lines))) == 1


# The recorded benchmarks.


def recorded(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text())


def test_recorded_slopes_are_those_of_the_theory():
    slopes = recorded("snr")["slopes"]
    expected = {"theta": {"reparam": 0.5, "dreg": 0.5, "stl": 0.5}, "phi": {"reparam": -0.5, "dreg": 0.5, "stl": 0.5}}
    for group, estimators in expected.items():
        for estimator, value in estimators.items():
            assert slopes[estimator][group]["slope"] == pytest.approx(value, abs=0.15), (estimator, group)


def test_recorded_memory_does_not_grow_with_k():
    record = recorded("memory")
    rows = {(row["gradient"], row["k"]): row for row in record["rows"]}
    assert record["bar"] == 1.3 and {("reparam", 50), ("reparam", 5000), ("dreg", 5000), ("vimco", 5000)} <= set(rows)
    for (gradient, _), row in rows.items():
        base = rows.get((gradient, 50), rows["reparam", 50])
        for peak in row.keys() & {"peak_rss_mb", "peak_cuda_mb"}:
            assert row[peak] <= 1.3 * base[peak], (gradient, peak)


def test_recorded_variance_of_the_threshold_rule_is_the_least():
    rows = recorded("resampling")["rows"]
    assert {row["m"] for row in rows} >= {1, 2, 5, 10, 20}
    for row in rows:
        assert row["threshold"] <= row["systematic"] * (1 + 1e-9) and row["systematic"] <= row["multinomial"] * 1.001
        assert row["m"] < 10 or 10 * row["threshold"] < row["multinomial"]


def test_an_objective_with_weights_of_its_own_is_not_its_own_reference():
    class Logged(IWAE):
        def weights(self, log_w):
            return super().weights(log_w)

    model, x = Mixed(), torch.randn(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="has weights of its own, which tell no reference: pass reference="):
        compare_gradients(model, x, [Logged(k=4, gradient="rws")], draws=2)


def test_ms_is_the_median_in_milliseconds(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 31.0, 31.0, 33.0])
    monkeypatch.setattr(diagnostics, "_now", lambda tensor: next(clock))
    assert gradient_statistics(noisy(), Vectors(), None, draws=3)["a"].ms == 2000


def test_one_long_run_serves_all_and_is_ten_times_as_long():
    draws = []

    def reference(model, x):
        draws.append(1)
        return noisy()(model, x)

    compare_gradients(Vectors(), None, [noisy(), noisy(bias=0.7)], draws=3, reference=reference)
    assert len(draws) == 30


def test_the_norm_shown_is_the_references():
    exact = {"loc": torch.tensor([3.0]), "shift": torch.zeros(1)}
    [row, _] = compare_gradients(Gaussian(), X, [lambda model, x: 5 * model.loc], draws=2, reference=exact)
    assert (row.reference_norm, row.bias, row.bias_error) == (3, 2, 0)


def test_the_reference_of_a_discrete_posterior_is_the_steadiest_unbiased_one():
    class Coin(nn.Module):
        def posterior(self, x):
            return Independent(Bernoulli(logits=x), 1)

    made = [diagnostics._unbiased(IWAE(k=k, gradient="rws"), Coin(), X) for k in (1, 2)]
    assert made == [IWAE(k=1, gradient="score"), IWAE(k=2, gradient="vimco")]


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize(("gradient", "bias"), [(1.0, 0.0), (2.0, math.sqrt(3))])
def test_the_noise_of_the_long_run_is_taken_off_the_bias(gradient, bias):
    long = iter([1.0, -1.0])  # mean 0 of squared error 1
    [row] = compare_gradients(
        Two(),
        None,
        [lambda model, x: model.loc * gradient],
        draws=2,
        reference=lambda model, x: model.loc * next(long),
        reference_draws=2,
    )
    assert row.bias == pytest.approx(bias) and row.bias_error == pytest.approx(1)
    assert row.reference_norm == 0
