"""Streamed evaluation against closed forms and against all samples at once; k-hat against arviz; active units."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats
from torch import Tensor
from torch.distributions import (
    Independent,
    MultivariateNormal,
    Normal,
    Transform,
    TransformedDistribution,
    constraints,
    kl_divergence,
)

from mcobjectives import IWAE, ModelError, evaluation
from mcobjectives.evaluation import Evaluation, evaluate
from mcobjectives.pareto import pareto_khat, tail_length
from mcobjectives.reductions import effective_sample_size, log_mean_exp
from mcobjectives.sampling import Samples

F64 = torch.float64

CHUNKS = (1, 7, 49, 50, 51, 99, 100, 130, 999, 1234, 5000)

PER_POINT = ("log_likelihood", "elbo", "ess", "khat", "log_p_x_given_h")


class LinearGaussian:
    """h ~ N(0, I), x | h ~ N(W h + b, s^2 I); q is the posterior, its mean shifted and its scale stretched."""

    def __init__(self, shift: float = 0.0, stretch: float = 1.0, latent: int = 2, pixels: int = 3) -> None:
        g = torch.Generator().manual_seed(3)
        self.w = torch.randn(pixels, latent, generator=g, dtype=F64)
        self.b, self.s = torch.randn(pixels, generator=g, dtype=F64), 0.7
        self.shift, self.stretch = shift, stretch
        self.calls, self.rows = 0, []

    def exact(self, x: Tensor) -> MultivariateNormal:
        covariance = torch.linalg.inv(torch.eye(self.w.shape[1], dtype=F64) + self.w.T @ self.w / self.s**2)
        return MultivariateNormal((x - self.b) @ self.w @ covariance / self.s**2, covariance)

    def log_marginal(self, x: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.s**2 * torch.eye(len(self.b), dtype=F64)
        return MultivariateNormal(self.b, covariance).log_prob(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        self.calls += 1
        exact = self.exact(x)
        return MultivariateNormal(exact.mean + self.shift, exact.covariance_matrix * self.stretch**2)

    def log_likelihood(self, x: Tensor, h: Tensor) -> Tensor:
        self.rows.append(tuple(h.shape[:2]))
        return Normal(h @ self.w.T + self.b, self.s).log_prob(x).sum(-1)

    def log_prior(self, h: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(h).sum(-1)


class Listed:
    """Log-weights as given, `(k, batch)`: a data point is its column."""

    def __init__(self, log_w: Tensor) -> None:
        self.log_w = log_w

    def posterior(self, x: Tensor) -> Listed:
        self.columns, self.drawn = x, 0
        return self

    def sample(self, shape: torch.Size) -> Tensor:
        self.drawn += shape[0]
        return self.log_w[self.drawn - shape[0] : self.drawn, self.columns]

    def log_prob(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    def log_joint(self, x: Tensor, h: Tensor) -> Tensor:
        return h


def of_weights(log_w: Tensor, **options: int) -> evaluation.Evaluation:
    return evaluate(Listed(log_w), torch.arange(log_w.shape[1]), k=len(log_w), **options)


def data(n: int = 11) -> Tensor:
    return 2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def arviz_khat(log_w: Tensor) -> Tensor:
    return torch.tensor([float(array_stats.psislw(-column.numpy())[1]) for column in log_w.T])  # takes -log w


# The estimates.


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_exact_at_the_posterior(chunk_size):
    x, model = data(), LinearGaussian()
    found = evaluate(model, x, k=130, chunk_size=chunk_size, batch_size=4)
    torch.testing.assert_close(found.log_likelihood, model.log_marginal(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.elbo, model.log_marginal(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.ess, torch.full((11,), 130.0, dtype=F64))
    assert float(found.kl_posterior.max()) < 1e-12
    assert found.nll == pytest.approx(-float(model.log_marginal(x).mean()), abs=1e-12)


@pytest.mark.parametrize("at_once", [1, 60, 1000])
@pytest.mark.parametrize("k", [1, 40, 50, 1234])
def test_streamed_equals_all_samples_at_once(k, at_once, monkeypatch):
    monkeypatch.setattr(evaluation, "_LOG_WEIGHTS_AT_ONCE", at_once)
    x, model = data(5), LinearGaussian(shift=0.4, stretch=0.8)
    torch.manual_seed(1)
    posterior = model.posterior(x)
    h = Samples(posterior, k, pathwise=False).draw()
    likelihood = model.log_likelihood(x, h)
    log_w = likelihood + model.log_prior(h) - posterior.log_prob(h)
    expected = (log_mean_exp(log_w), log_w.mean(0), effective_sample_size(log_w), None, likelihood.mean(0))
    for chunk_size in CHUNKS:
        torch.manual_seed(1)
        found = evaluate(model, x, k=k, chunk_size=chunk_size)
        for name, value in zip(PER_POINT, expected, strict=True):
            if value is not None:
                torch.testing.assert_close(getattr(found, name), value, rtol=1e-12, atol=1e-12)
        if k >= 40:
            torch.testing.assert_close(found.khat, arviz_khat(log_w).double(), rtol=1e-6, atol=1e-6)


def test_float32_chunks_agree_to_rounding():
    x, model = data(6).float(), LinearGaussian(shift=0.3)
    model.w, model.b = model.w.float(), model.b.float()
    model.exact = lambda x: MultivariateNormal(x @ torch.ones(3, 2) / 9, torch.eye(2))
    found = []
    for chunk_size in CHUNKS:
        torch.manual_seed(0)
        found.append(evaluate(model, x, k=1234, chunk_size=chunk_size))
        assert found[-1].log_likelihood.dtype == F64
        torch.testing.assert_close(found[-1].log_likelihood, found[0].log_likelihood, rtol=1e-6, atol=1e-5)


def test_equals_the_objective_on_the_same_samples():
    x, model = data(), LinearGaussian(shift=0.4)
    torch.manual_seed(5)
    bound = IWAE(k=70).bound(model, x)
    torch.manual_seed(5)
    torch.testing.assert_close(evaluate(model, x, k=70, chunk_size=9).log_likelihood, bound, rtol=1e-12, atol=1e-12)


def test_expectations_equal_closed_forms():
    x, model, k = data(), LinearGaussian(shift=0.3, stretch=0.9), 20_000
    torch.manual_seed(0)
    found = evaluate(model, x, k=k)
    q, exact, log_p = model.posterior(x), model.exact(x), model.log_marginal(x)
    kl = kl_divergence(q, exact)
    prior = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    h = q.sample((2000,))
    spread = (exact.log_prob(h) - q.log_prob(h)).std(0) / math.sqrt(k)
    assert bool(((found.elbo - (log_p - kl)).abs() < 5 * spread).all())
    assert bool(((found.log_likelihood - log_p).abs() < 5 * (1 / found.ess - 1 / k).sqrt()).all())
    assert bool(((found.kl_posterior - kl).abs() < 6 * spread + 5 * (1 / found.ess).sqrt()).all())
    likelihood = model.log_likelihood(x, h)
    closed = log_p - kl + kl_divergence(q, prior)
    assert bool(((found.log_p_x_given_h - closed).abs() < 5 * likelihood.std(0) / math.sqrt(k)).all())
    torch.testing.assert_close(found.kl_prior, found.log_p_x_given_h - found.elbo)


def test_kl_is_never_negative():
    log_w = -100 * torch.rand(1, 500, generator=torch.Generator().manual_seed(0), dtype=F64).expand(3, 500)
    found = of_weights(log_w)
    assert float((found.log_likelihood - found.elbo).min()) < 0  # by rounding
    assert float(found.kl_posterior.min()) == 0


def test_ess_and_bias_by_hand():
    found = of_weights(torch.tensor([[1.0, 5.0], [2.0, 5.0], [1.0, 5.0]], dtype=F64).log())
    torch.testing.assert_close(found.ess, torch.tensor([16 / 6, 3.0], dtype=F64))
    assert found.nll_bias == pytest.approx((6 / 16 - 1 / 3) / 4)
    assert found.nll == pytest.approx(-(math.log(4 / 3) + math.log(5)) / 2)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_far_from_zero(offset):
    log_w = torch.tensor([[1.0], [2.0], [1.0]], dtype=F64).log() + offset
    found = of_weights(log_w, chunk_size=1)
    assert float(found.log_likelihood) == pytest.approx(math.log(4 / 3) + offset, abs=1e-9)
    assert float(found.ess) == pytest.approx(16 / 6)


def test_zero_weights_count_as_zero(monkeypatch):
    monkeypatch.setattr(evaluation, "_LOG_WEIGHTS_AT_ONCE", 1)  # -inf meets -inf in the running sums
    log_w = torch.tensor([[-math.inf], [-math.inf], [0.0], [0.0]], dtype=F64)
    found = of_weights(log_w, chunk_size=1)
    assert float(found.log_likelihood) == pytest.approx(-math.log(2))
    assert float(found.ess) == pytest.approx(2)
    assert float(found.elbo) == -math.inf
    assert found.to_dict()["elbo"] is None


# The work done.


def test_counts_are_exact_and_the_encoder_runs_once_a_batch():
    x, model, done = data(11), LinearGaussian(), []
    found = evaluate(model, x, k=130, chunk_size=60, batch_size=4, progress=done.append)
    assert model.calls == 3
    assert done == [4, 8, 11]
    assert found.log_likelihood.shape == (11,)
    assert sum(k * batch for k, batch in model.rows) == 130 * 11
    assert max(k for k, _ in model.rows) <= 60


def test_only_a_bounded_number_of_log_weights_is_kept():
    running = evaluation._Running(tail_length(10_000))
    for _ in range(100):
        running.add(torch.randn(100, 2), None)
        kept = sum(map(len, running.waiting)) + (0 if running.largest is None else len(running.largest))
        assert kept <= 1000 + 301


def test_any_structure_of_x_and_h():
    class Pair:
        def posterior(self, x):
            self.loc = x["a"] + x["b"][0]
            return self

        def sample(self, shape):
            return {"z": self.loc.expand(*shape, *self.loc.shape), "y": torch.zeros(*shape, len(self.loc))}

        def log_prob(self, h):
            return h["y"]

        def log_joint(self, x, h):
            return h["z"] + x["a"]

    a = torch.arange(5.0)
    found = evaluate(Pair(), {"a": a, "b": (10 * a,)}, k=60, batch_size=2, chunk_size=7)
    torch.testing.assert_close(found.log_likelihood, 12 * a.double())
    assert found.log_p_x_given_h is None and found.kl_prior is None and found.to_dict()["kl_prior"] is None


def test_no_graph_is_left():
    model = LinearGaussian()
    model.w.requires_grad_()
    assert not evaluate(model, data(), k=3).log_likelihood.requires_grad


def test_its_repr_is_the_means():
    found = evaluate(LinearGaussian(), data(5), k=30)
    assert repr(found).startswith(f"Evaluation(points=5, k=30, nll={found.nll:.5g}, ") and "tensor" not in repr(found)
    assert len(repr(found)) < 400


def test_to_dict_is_plain_json():
    torch.manual_seed(0)
    found = evaluate(LinearGaussian(shift=0.5), data(), k=200)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["points"] == 11 and record["k"] == 200
    assert record["nll"] == found.nll and record["kl_posterior"] == found.kl
    assert record["nll_stderr"] == pytest.approx(float(found.log_likelihood.std()) / math.sqrt(11))
    json.dumps(evaluate(LinearGaussian(), data(1), k=3).to_dict(), allow_nan=False)


def test_numpy_integers_are_counts():
    torch.manual_seed(0)
    plain = evaluate(LinearGaussian(shift=0.5), data(), k=60, chunk_size=7, batch_size=4)
    torch.manual_seed(0)
    k, chunk_size, batch_size = map(np.int64, (60, 7, 4))
    found = evaluate(LinearGaussian(shift=0.5), data(), k=k, chunk_size=chunk_size, batch_size=batch_size)
    assert json.dumps(found.to_dict()) == json.dumps(plain.to_dict())


@pytest.mark.parametrize("name", ["k", "chunk_size", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_counts_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
        evaluate(LinearGaussian(), data(), **{name: value})


def test_bad_data_are_refused():
    with pytest.raises(ValueError, match="no data points"):
        evaluate(LinearGaussian(), data(0))
    with pytest.raises(ValueError, match="one row for each data point"):
        evaluate(LinearGaussian(), (data(2), data(3)))
    with pytest.raises(ValueError, match=r"all 2 weights are zero .* for 1 of 3 data points, the first at row 1"):
        of_weights(torch.tensor([[0.0, -math.inf, 0.0], [0.0, -math.inf, 0.0]]))
    with pytest.raises(ValueError, match="is NaN at 1 of 2"):
        of_weights(torch.tensor([[0.0, math.nan]]))


def test_bad_models_are_refused():
    with pytest.raises(ModelError, match="posterior"):
        evaluate(object(), data())
    model = LinearGaussian()
    model.log_likelihood = lambda x, h: Normal(h @ model.w.T, 1.0).log_prob(x)  # not summed over the pixels
    with pytest.raises((ModelError, RuntimeError)):
        evaluate(model, data(), k=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_agrees_with_closed_form():
    class Gaussian:
        def posterior(self, x):
            return Independent(Normal(x / 2, 0.5**0.5), 1)

        def log_joint(self, x, h):
            return (Normal(0.0, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)).sum(-1)

    x = torch.randn(7, 3)
    found = evaluate(Gaussian(), x.cuda(), k=1234)
    assert found.log_likelihood.device.type == "cpu"
    torch.testing.assert_close(
        found.log_likelihood, Normal(0.0, 2**0.5).log_prob(x).sum(-1).double(), rtol=0, atol=1e-4
    )


# k-hat.


@pytest.mark.parametrize("k", [25, 30, 224, 226, 1234, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 30.0])
def test_khat_equals_arviz(k, spread):
    log_w = spread * torch.randn(k, 6, generator=torch.Generator().manual_seed(k), dtype=F64)
    largest = log_w.topk(tail_length(k) + 1, dim=0).values
    found, expected = pareto_khat(largest), arviz_khat(log_w).double()
    if k == 25 and expected.isnan().all():
        pytest.skip("this arviz fits no tail of five weights")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_khat_finds_the_shape_of_a_pareto_tail(shape):
    uniform = torch.rand(50_000, 20, generator=torch.Generator().manual_seed(0), dtype=F64)
    khat = pareto_khat((-shape * uniform.log()).topk(tail_length(50_000) + 1, dim=0).values)
    assert float(khat.mean()) == pytest.approx(shape, abs=0.05)


def test_a_khat_that_is_infinite_does_not_hide_the_others():
    log_w = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    log_w[:, 1] = torch.arange(1000.0) * 1e3
    found = of_weights(log_w)
    assert found.khat.isinf().tolist() == [False, True, False]
    means = found.to_dict()
    assert means["khat_mean"] == pytest.approx(float(found.khat[[0, 2]].mean())) and means["khat_max"] is None


def test_what_is_no_tensor_is_named_with_the_mend():
    for x in ([1.0, 2.0], np.zeros(3), torch.utils.data.DataLoader(torch.zeros(3, 1)), (row for row in [1])):
        with pytest.raises(ValueError, match=r"got \w+: of a loader evaluate each batch"):
            evaluate(LinearGaussian(), x, k=5)
    with pytest.raises(ValueError, match="got float: what all data points share belongs into the model"):
        evaluate(LinearGaussian(), {"image": torch.zeros(3, 1), "rate": 0.1}, k=5)
    with pytest.raises(ValueError, match="must have one row for each data point, all of them, got rows of 2, 3"):
        evaluate(LinearGaussian(), [torch.zeros(2, 3), torch.zeros(3, 3)], k=5)


def test_evaluations_of_batches_are_joined():
    x, model = data(5), LinearGaussian(shift=0.3)
    parts = [evaluate(model, batch, k=30) for batch in x.split(2)]
    whole = Evaluation.concatenate(iter(parts))
    for name in ("log_likelihood", "elbo", "ess", "khat"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert whole.k == 30 and whole.to_dict()["points"] == len(x)
    with pytest.raises(ValueError, match=r"must be of the same k, got \[20, 30\]"):
        Evaluation.concatenate([*parts, evaluate(model, x, k=20)])
    with pytest.raises(ValueError, match="got none"):
        Evaluation.concatenate([])


def test_khat_where_there_is_none():
    assert tail_length(24) == 0 and tail_length(25) == 5 and tail_length(5000) == 212
    assert math.isnan(float(of_weights(torch.randn(24, 1)).khat))
    assert math.isnan(float(of_weights(torch.zeros(100, 1)).khat))
    assert float(of_weights(torch.arange(100.0).unsqueeze(1) * 1e3).khat) == math.inf


@pytest.mark.parametrize("k", [100, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_are_equal_but_for_rounding_are_reliable(k, dtype):
    class Exact:
        def posterior(self, x):
            return Independent(Normal(x / 2, 0.5**0.5), 1)

        def log_joint(self, x, h):
            return (Normal(0.0, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)).sum(-1)

    torch.manual_seed(0)
    found = evaluate(Exact(), 2**0.5 * torch.randn(50, 10, dtype=dtype), k=k)
    assert float(found.ess.min()) > k - 0.1 and found.unreliable == 0


def test_weights_of_few_values_have_no_tail():
    """A discrete h: the largest weights are tied at the cutoff, and none has vanished."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10, 40, generator=generator, dtype=F64)
    drawn = torch.randint(0, 10, (1000, 40), generator=generator)
    found = of_weights(values.gather(0, drawn))
    assert not bool(found.khat.isinf().any()) and found.unreliable == 0
    assert float(found.ess.min()) > 100


def test_a_few_huge_weights_over_ties_are_a_heavy_tail():
    """q hardly ever draws what holds all of the mass: the other weights are tied."""
    generator = torch.Generator().manual_seed(0)
    rare = torch.rand(5000, 200, generator=generator, dtype=F64) < 2e-4
    log_q = torch.where(rare, math.log(2e-4), math.log1p(-2e-4))
    found = of_weights(torch.where(rare, 0.0, -20.0) - log_q)
    drawn = rare.any(0)
    assert bool(found.khat[drawn & (rare.sum(0) < 10)].isinf().all()) and float(drawn.double().mean()) > 0.5
    steps = 10 * (torch.rand(5000, 20, generator=generator, dtype=F64).log() / math.log(0.1)).floor()  # geometric
    assert float((of_weights(steps).khat > 0.7).double().mean()) > 0.9


@pytest.mark.parametrize("low", [-709.0, -720.0, -740.0, -744.5, -800.0])
def test_weights_that_vanish_beside_the_largest_are_a_heavy_tail(low):
    log_w = torch.cat([torch.zeros(1, 3, dtype=F64), low + torch.rand(999, 3, dtype=F64)])
    assert bool((of_weights(log_w).khat == math.inf).all())


def test_unreliable_counts_heavy_tails():
    normal = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = of_weights(normal * torch.tensor([0.3, 0.3, 5.0]))
    assert found.unreliable == pytest.approx(1 / 3)
    assert of_weights(torch.zeros(25, 2)).unreliable == 0


@pytest.mark.parametrize("k", [1, 5, 24])
def test_where_there_is_no_khat_nothing_is_called_reliable(k):
    found = of_weights(torch.linspace(0, 99, k).unsqueeze(1))
    assert math.isnan(found.unreliable) and found.to_dict()["khat_unreliable"] is None


class Changed(LinearGaussian):
    """Both parts of log p(x, h) changed by a function, or the prior alone."""

    def __init__(self, prior, likelihood=lambda p: p):
        super().__init__()
        self.prior, self.likelihood = prior, likelihood

    def log_prior(self, h):
        return self.prior(super().log_prior(h))

    def log_likelihood(self, x, h):
        return self.likelihood(super().log_likelihood(x, h))


@pytest.mark.parametrize("change", [lambda p: p[:, :1], lambda p: p[0]])
def test_a_prior_of_another_shape_is_refused_as_the_objectives_do(change):
    with pytest.raises(ModelError, match=r"log_likelihood\(x, h\) has shape .* both must be \(k, batch\)"):
        evaluate(Changed(change), data(), k=5)


def test_parts_in_half_precision_are_added_in_float32():
    def rounded(p):
        return (p * 20).bfloat16()

    def widened(p):
        return rounded(p).float()

    for estimate in (lambda model: evaluate(model, data(), k=5).elbo, lambda model: IWAE(k=5).bound(model, data())):
        found = []
        for change in (rounded, widened):
            torch.manual_seed(0)
            found.append(estimate(Changed(change, change)))
        assert torch.equal(*found)


def test_a_flow_without_an_inverse_can_be_evaluated():
    class Shear(Transform):
        bijective, domain, codomain = True, constraints.real_vector, constraints.real_vector

        def __init__(self):
            super().__init__(cache_size=1)

        def _call(self, h):
            return h + torch.stack([torch.zeros(h.shape[:-1]), h[..., 0].sin()], -1)

        def log_abs_det_jacobian(self, h, g):
            return torch.zeros(h.shape[:-1])

    class Sheared:
        def posterior(self, x):
            return TransformedDistribution(Independent(Normal(torch.zeros(len(x), 2), 1.0), 1), [Shear()])

        def log_joint(self, x, h):  # of the very same distribution: every weight is one
            undone = h - torch.stack([torch.zeros(h.shape[:-1]), h[..., 0].sin()], -1)
            return Normal(0.0, 1.0).log_prob(undone).sum(-1)

    for options in ({"k": 120, "chunk_size": 50}, {"k": 10, "chunk_size": 10}, {"k": 40, "chunk_size": 45}, {"k": 10}):
        assert evaluate(Sheared(), torch.zeros(3, 1), **options).nll == pytest.approx(0.0, abs=1e-6)


def test_to_dict_has_every_mean_under_its_own_name():
    torch.manual_seed(0)
    found = evaluate(LinearGaussian(shift=0.5, stretch=0.6), data(), k=200)
    means = {
        "points": 11,
        "k": 200,
        "nll": -found.log_likelihood.mean(),
        "nll_stderr": found.log_likelihood.std() / math.sqrt(11),
        "nll_bias": (1 / found.ess - 1 / 200).mean() / 2,
        "elbo": found.elbo.mean(),
        "kl_posterior": (found.log_likelihood - found.elbo).mean(),
        "log_p_x_given_h": found.log_p_x_given_h.mean(),
        "kl_prior": (found.log_p_x_given_h - found.elbo).mean(),
        "ess_mean": found.ess.mean(),
        "ess_min": found.ess.min(),
        "khat_mean": found.khat.mean(),
        "khat_max": found.khat.max(),
        "khat_unreliable": (found.khat > 1 - 1 / math.log10(200)).double().mean(),
    }
    assert found.to_dict() == pytest.approx({name: float(value) for name, value in means.items()})
    assert 0 < means["khat_unreliable"] < 1 and means["nll_bias"] > 0.01


@pytest.mark.parametrize(("k", "most"), [(100, 0.5), (1000, 2 / 3), (10**6, 0.7)])
def test_the_highest_khat_that_is_reliable_grows_with_k_up_to_0_7(k, most):
    khat = torch.tensor([most - 0.01, most + 0.01, math.nan, math.inf], dtype=F64)
    zeros = torch.zeros(4, dtype=F64)
    assert Evaluation(k, zeros, zeros, zeros + k, khat, None).unreliable == 0.5


@pytest.mark.parametrize("k", [3, 7, 50, 1000])
def test_ess_never_exceeds_k(k):
    assert float(of_weights(torch.full((k, 50), -88.1, dtype=F64) + torch.arange(50)).ess.max()) <= k


@pytest.mark.parametrize(("large", "infinite"), [(10, True), (40, False)])
def test_ties_beside_few_large_weights_are_a_heavy_tail_and_beside_many_none(large, infinite):
    log_w = torch.full((1000, 1), -20.0, dtype=F64)
    log_w[:large, 0] = torch.linspace(0, 1, large)
    assert bool(of_weights(log_w).khat.isinf()) == infinite


def test_khat_has_no_seam_where_a_quarter_of_the_tail_is_tied():
    k = 1000
    tail = tail_length(k)
    largest = torch.randn(k, 1, generator=torch.Generator().manual_seed(0), dtype=F64).topk(tail + 1, dim=0).values
    found = []
    for ties in (tail // 4, tail // 4 + 1):  # weights equal to the cutoff
        tied = largest.clone()
        tied[tail - ties :] = largest[-1]
        found.append(float(pareto_khat(tied)))
    assert found[1] == pytest.approx(found[0], abs=0.05)


@pytest.mark.parametrize(("large", "infinite"), [(23, True), (24, False)])
def test_a_quarter_of_the_tail_are_many(large, infinite):
    log_w = torch.full((1000, 1), -20.0, dtype=F64)
    log_w[:large, 0] = 1e-3 * torch.arange(large)
    assert bool(of_weights(log_w).khat.isinf()) == infinite


def test_likelihoods_are_summed_in_float64():
    likelihood = torch.tensor([[2.0**24], [1.0], [1.0]])
    running = evaluation._Running(0)
    running.add(-likelihood, likelihood)
    assert float(running.result(3).log_p_x_given_h) == (2**24 + 2) / 3


class Regression:
    """w ~ N(0, I), y_n | w ~ N(x_n w, 1): one log-weight for all data points; q is the posterior, stretched."""

    def __init__(self, stretch):
        self.stretch = stretch

    def posterior(self, data):
        inputs, targets = data
        precision = torch.eye(2, dtype=F64) + inputs.T @ inputs
        covariance = precision.inverse() * self.stretch
        mean = precision.inverse() @ inputs.T @ targets
        return MultivariateNormal(mean.unsqueeze(0), covariance.unsqueeze(0))

    def log_joint(self, data, w):
        inputs, targets = data
        return Normal(0.0, 1.0).log_prob(w).sum(-1) + Normal(w @ inputs.T, 1.0).log_prob(targets).sum(-1)


def test_data_that_share_their_latents_are_evaluated_as_one():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((6, 2), (6,)))
    evidence = MultivariateNormal(torch.zeros(6, dtype=F64), torch.eye(6, dtype=F64) + inputs @ inputs.T)
    told = []
    exact = evaluate(Regression(1.0), (inputs, targets), k=70, batch_size=6, chunk_size=20, progress=told.append)
    assert exact.log_likelihood.shape == (1,) and told == [6] and float(exact.ess) == pytest.approx(70)
    assert -exact.nll == pytest.approx(float(evidence.log_prob(targets)), abs=1e-10)
    torch.manual_seed(0)
    near = evaluate(Regression(1.3), (inputs, targets), k=20_000, batch_size=6)
    assert -near.nll == pytest.approx(float(evidence.log_prob(targets)), abs=0.02) and float(near.khat) < 0.7
    with pytest.raises(ValueError, match=r"^batch_size must be an integer of at least 1, got '6'"):
        evaluate(Regression(1.0), (inputs, targets), k=5, batch_size="6")
    for batch_size in (None, 3, 100):  # as one only where it is asked for
        with pytest.raises(ModelError, match=r"for 1 data points, expected \d: .* batch_size=6 evaluates that\)"):
            evaluate(Regression(1.0), (inputs, targets), k=5, batch_size=batch_size)
