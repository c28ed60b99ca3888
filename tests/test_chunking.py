"""chunk_size: the same loss and gradient, whatever the chunks, or an error that says why not."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from chunks import ESTIMATORS, EVERY, X, assert_same_in_chunks
from torch.distributions import Independent, Normal
from toys import F64, Curved, Discrete, Gaussian1D, LinearGaussian, Mixed, TwoLayers, assert_same, loss_gradient

from mcobjectives import IWAE, VAE, Median, ModelError, Objective, Power, Split, parameterless
from mcobjectives.context import generators_at, rng_state, same_state
from mcobjectives.sampling import Samples

pytestmark = pytest.mark.filterwarnings("ignore:gradient='stl' is biased")


@pytest.mark.parametrize("objective", EVERY, ids=repr)
def test_chunks_change_nothing(objective):
    assert_same_in_chunks(objective, LinearGaussian().off_posterior(), LinearGaussian().data(), [1, 4, 6, 9])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_chunks_that_divide_k_or_do_not_change_nothing(size):
    for objective in (IWAE(k=6), IWAE(k=6, gradient="dreg"), VAE(k=6, gradient="score")):
        assert_same_in_chunks(objective, LinearGaussian().off_posterior(), LinearGaussian().data(), [size])


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_chunks_across_the_blocks_of_the_stream_change_nothing(gradient):
    k = 2 * Samples.BLOCK + 20
    sizes = [7, Samples.BLOCK - 1, Samples.BLOCK, Samples.BLOCK + 14, k - 1, k, 1000]
    assert_same_in_chunks(
        IWAE(k=k, gradient=gradient), LinearGaussian().off_posterior(), LinearGaussian().data(), sizes
    )


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_chunks_of_several_layers_change_nothing(gradient):
    assert_same_in_chunks(IWAE(k=7, gradient=gradient), TwoLayers(), X, [1, 3, 7])


@pytest.mark.parametrize("gradient", ["score", "vimco", "rws"])
@pytest.mark.parametrize("make", [Discrete, Mixed])
def test_chunks_of_discrete_latents_change_nothing(make, gradient):
    assert_same_in_chunks(Power(k=7, p=0.5, gradient=gradient), make(), X, [1, 3, 7])


def test_chunks_in_float32_agree_to_a_millionth():
    model = LinearGaussian(dtype=torch.float32).off_posterior()
    for gradient in ("reparam", "dreg"):
        assert_same_in_chunks(IWAE(k=20, gradient=gradient), model, model.data(), [1, 3, 7], 2e-6)


class Dropout(LinearGaussian):
    """A decoder with randomness of its own."""

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, torch.nn.functional.dropout(h, 0.3))


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_a_dropout_in_the_model_repeats_itself_in_the_backward_pass(gradient):
    model = Dropout().off_posterior()
    assert_same_in_chunks(IWAE(k=6, gradient=gradient), model, model.data(), [1, 4, 6])


class Normalised(LinearGaussian):
    """Batch normalisation of the samples."""

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, (h - h.mean((0, 1))) / h.std((0, 1)))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
@pytest.mark.parametrize("make", [Dropout, Normalised])
def test_kept_samples_whose_weights_change_when_evaluated_again_raise(make, gradient, chunk_size):
    """Weights of one dropout mask on the gradient of another would be a biased gradient without a word."""
    model = make().off_posterior()
    objective = IWAE(k=6, gradient=gradient, backward_samples=2, chunk_size=chunk_size)
    with pytest.raises(RuntimeError, match=r"another value when it is evaluated again.*dropout.*model\.eval\(\)"):
        objective(model, model.data())


class SemiImplicit(LinearGaussian):
    """q(e) q(z | e, x), with e of a fixed distribution: h = (e, z)."""

    mark = staticmethod(parameterless)

    def posterior(self, x):
        mean, mark = x @ self.q_gain.T + self.q_offset, self.mark

        class Q:
            def rsample(self, shape):
                e = mark(torch.randn(*shape, *mean.shape, dtype=F64))
                return e, mean + 0.5 * e + 0.7 * torch.randn(*shape, *mean.shape, dtype=F64)

            def log_prob(self, h):
                e, z = h
                return (Normal(0.0, 1.0).log_prob(e) + Normal(mean + 0.5 * e, 0.7).log_prob(z)).sum(-1)

        return Q()

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h[1])

    def log_prior(self, h):
        return super().log_prior(h[1]) + Normal(h[1], 1.0).log_prob(h[0]).sum(-1)


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_a_layer_of_q_without_parameters_is_marked(gradient):
    model = SemiImplicit()
    assert_same_in_chunks(IWAE(k=6, gradient=gradient), model, model.data(), [1, 4, 6])
    few, all_of_them = (IWAE(k=6, gradient=gradient, backward_samples=m) for m in (2, 6))
    assert all(g.isfinite().all() for g in loss_gradient(few, model, model.data())[1].values())
    expected = loss_gradient(IWAE(k=6, gradient=gradient), model, model.data())[1]
    for name, found in loss_gradient(all_of_them, model, model.data())[1].items():
        torch.testing.assert_close(found, expected[name])
    with torch.no_grad():
        assert not any(part.requires_grad for part in model.posterior(model.data()).rsample((2,)))
    unmarked = SemiImplicit()
    unmarked.mark = lambda e: e
    with pytest.raises(ModelError, match=r"part\(s\) \[0\].*mcobjectives\.parameterless"):
        IWAE(k=6, gradient=gradient)(unmarked, model.data())


class FarDropout(LinearGaussian):
    """A dropout whose change is small beside log p(x, h), as with hundreds of pixels, and large in a weight."""

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, torch.nn.functional.dropout(h, 0.3, self.training)) - 1e5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_kept_samples_whose_weights_change_by_little_beside_them_raise(gradient, chunk_size, dtype):
    model = FarDropout(dtype=dtype).off_posterior()
    objective = IWAE(k=6, gradient=gradient, backward_samples=2, chunk_size=chunk_size)
    with pytest.raises(RuntimeError, match="dropout"):
        objective(model, model.data())
    assert torch.isfinite(objective(model.eval(), model.data()))


class Draws(LinearGaussian):
    """Random numbers that change nothing, as those that another thread draws meanwhile."""

    def log_likelihood(self, x, h):
        torch.rand(3)
        return super().log_likelihood(x, h)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_random_numbers_that_change_no_weight_are_no_fault(chunk_size):
    model = Draws().off_posterior()
    assert torch.isfinite(IWAE(k=6, backward_samples=2, chunk_size=chunk_size)(model, model.data()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "objective",
    [
        IWAE(k=6, backward_samples=2),
        IWAE(k=6, gradient="dreg", chunk_size=4),
        Median(k=6, gradient="score"),
        Median(k=6, backward_samples=2),
        Split(IWAE(k=6), Median(k=6)),
    ],
    ids=repr,
)
def test_the_loss_without_a_graph_is_the_bound_whatever_the_estimator(objective, context):
    model = Dropout().off_posterior()
    with context():
        torch.manual_seed(0)
        loss = objective(model, model.data())
        torch.manual_seed(0)
        assert torch.equal(loss, -objective.bound(model, model.data()).mean())


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_parameters_hook_is_called_once_on_the_whole_gradient(chunk_size):
    def trained(size, *changes):
        model, calls = LinearGaussian().off_posterior(), []
        for i, p in enumerate(model.parameters()):
            for change in changes[i % 2 : i % 2 + 1]:
                p.register_hook(lambda g, change=change: calls.append(g) or change(g))
        torch.manual_seed(0)
        IWAE(k=6, gradient="dreg", chunk_size=size)(model, model.data()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(calls)

    def half(g):
        return g / 2

    def clipped(g):
        return g.clamp(-0.01, 0.01)

    free, _ = trained(None)
    whole, calls = trained(None, half, clipped)
    found, again = trained(chunk_size, half, clipped)
    assert_same(found, whole, 1e-10)
    assert again == calls == len(whole) and any((whole[name] != free[name]).any() for name in whole)


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_features_of_another_network_have_a_gradient_and_it_is_differentiated_once(gradient):
    model = LinearGaussian().off_posterior()
    weights = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found, calls = [], []
    for chunk_size in (None, 4):
        features = model.data() @ weights
        features.register_hook(lambda g, size=chunk_size: calls.append(size))
        features.retain_grad()
        torch.manual_seed(0)
        loss = IWAE(k=6, gradient=gradient, chunk_size=chunk_size)(model, features)
        (direct,) = torch.autograd.grad(loss, features, retain_graph=True)
        model.zero_grad()
        weights.grad = None
        loss.backward()
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(own | {"direct": direct, "features": features.grad, "weights": weights.grad})
    assert_same(*found, 1e-10)
    assert calls == [None, None, 4, 4] and found[0]["weights"].abs().min() > 0


@pytest.mark.parametrize("power", [1, 2])
def test_a_second_derivative_through_features_is_refused_too(power):
    weights = torch.ones(4, 3, dtype=F64, requires_grad=True)
    loss = IWAE(k=6, chunk_size=4)(LinearGaussian().off_posterior(), weights**power)
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative of this loss would be incomplete"):
        torch.autograd.grad(gradient.sum(), weights)


def test_parts_of_x_that_come_with_a_graph_have_a_gradient():
    class Pairs(LinearGaussian):
        def posterior(self, x):
            return super().posterior(x["x"] + x["shift"])

        def log_likelihood(self, x, h):
            return super().log_likelihood(x["x"] + x["shift"], h)

    model = Pairs().off_posterior()
    shift, found = torch.ones(3, dtype=F64, requires_grad=True), []
    for chunk_size in (None, 4):
        torch.manual_seed(0)
        parts = {"x": model.data(), "shift": 2 * shift}
        (gradient,) = torch.autograd.grad(IWAE(k=6, chunk_size=chunk_size)(model, parts), shift)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert found[0].abs().min() > 0


def test_a_model_that_reaches_other_parameters_in_a_later_chunk_raises():
    class Routed(LinearGaussian):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(torch.zeros(2, dtype=F64)), torch.nn.Parameter(torch.ones(2, dtype=F64))
            self.calls = 0

        def log_prior(self, h):
            self.calls += 1
            return super().log_prior(h + self.experts[self.calls % 2] * (1e-9 if self.calls % 2 else 0.0))

    model = Routed().off_posterior()
    with pytest.raises(RuntimeError, match="depends on other parameters than in the forward pass"):
        IWAE(k=6, chunk_size=2)(model, model.data()).backward()


@pytest.mark.parametrize("objective", [Median(k=6, gradient="score"), Curved(k=6, gradient="dreg")], ids=repr)
def test_objectives_are_made_and_copied_in_inference_mode(objective):
    model = LinearGaussian().off_posterior()
    torch.manual_seed(0)
    expected = objective.bound(model, model.data())
    with torch.inference_mode():
        for made in (replace(objective), copy.deepcopy(objective)):
            torch.manual_seed(0)
            assert torch.equal(made.bound(model, model.data()), expected)
        log_w = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]], dtype=F64)
        inside = objective.weights(log_w)
    outside = objective.weights(log_w.clone())
    assert torch.equal(inside.a, outside.a)


@dataclass(frozen=True)
class Learnt(Objective):
    """A weighted mean of two bounds, whose weight is a parameter."""

    k: int = 4
    beta: torch.Tensor = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))  # noqa: RUF009

    def reduce(self, log_w):
        return self.beta * log_w.mean(0) + (1 - self.beta) * (log_w.logsumexp(0) - math.log(self.k))


@pytest.mark.parametrize("options", [{"gradient": "dreg"}, {"chunk_size": 2}, {"backward_samples": 2}], ids=str)
def test_parameters_of_an_objective_are_trained_or_refused(options):
    model = LinearGaussian().off_posterior()
    plain = Learnt(k=4)
    plain(model, model.data()).backward()
    assert plain.beta.grad is not None and plain.beta.grad != 0
    with pytest.raises(ValueError, match="has parameters of its own, whose gradient would be lost"):
        Learnt(k=4, **options)(model, model.data())
    assert torch.isfinite(Learnt(k=4, **options).bound(model, model.data())).all()


def test_parameters_of_an_objective_are_among_those_of_the_bound_module():
    model = LinearGaussian().off_posterior()
    bound = copy.deepcopy(Learnt(k=4).bind(model))
    names = [name for name, _ in bound.named_parameters()]
    assert names == ["beta", *(f"model.{name}" for name, _ in model.named_parameters())]
    bound(model.data()).backward()
    assert bound.beta is bound.objective.beta and bound.beta is not Learnt.beta
    assert all(p.grad is not None for p in bound.parameters())
    assert list(IWAE(k=4).bind(model).state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_parameters_of_an_objective_are_those_that_the_bound_module_has_now():
    model = LinearGaussian().off_posterior()
    x, bound = model.data(), Learnt(k=4).bind(model)

    def loss(beta):
        torch.manual_seed(0)
        return Learnt(k=4, beta=torch.nn.Parameter(torch.tensor(beta, dtype=F64)))(model, x)

    torch.manual_seed(0)
    torch.testing.assert_close(
        torch.func.functional_call(bound, {"beta": torch.tensor(0.9, dtype=F64)}, x), loss(0.9), rtol=1e-12, atol=0
    )
    state = {name: value.clone() for name, value in bound.state_dict().items()} | {"beta": torch.tensor(0.6, dtype=F64)}
    bound.load_state_dict(state, assign=True)
    torch.manual_seed(0)
    value = bound(x)
    torch.testing.assert_close(value, loss(0.6), rtol=1e-12, atol=0)
    value.backward()
    assert bound.beta.grad is not None


@pytest.mark.parametrize("options", [{}, {"gradient": "vimco"}, {"gradient": "dreg"}], ids=str)
def test_parameters_changed_before_the_backward_pass_raise(options):
    model = LinearGaussian().off_posterior()
    loss = IWAE(k=6, chunk_size=2, **options)(model, model.data())
    with torch.no_grad():
        model.bias += 0.3
    with pytest.raises(RuntimeError, match="changed in between"):
        loss.backward()


def test_draws_leave_the_generator_alone_between_slices():
    torch.manual_seed(0)
    stream = Samples(Gaussian1D().posterior(X), 120, pathwise=True, replay=True)
    whole = stream.draw()
    expected = torch.rand(3)
    for start, stop in ((0, 120), (40, 60), (50, 100), (119, 120), (7, 119)):
        torch.testing.assert_close(stream.draw(start, stop), whole[start:stop], rtol=0, atol=0)
    torch.manual_seed(0)
    Samples(Gaussian1D().posterior(X), 120, pathwise=True).draw()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_memory_kept_for_the_backward_pass_does_not_grow_with_k(gradient):
    class Wide(LinearGaussian):
        """What autograd would have to keep for each sample is far more than its log-weight."""

        def log_likelihood(self, x, h):
            wide = torch.tanh(h.sum(-1, keepdim=True) * self.weight.sum() * torch.ones(100, dtype=F64))
            return super().log_likelihood(x, h + wide.mean(-1, keepdim=True))

    def kept(k, chunk_size):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        model = Wide()
        x = model.data(2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            IWAE(k=k, gradient=gradient, chunk_size=chunk_size)(model, x)
        return sum(sizes) / (k * 2)

    assert kept(120, None) > 100  # numbers for each sample
    assert kept(120, 10) < 30
    assert kept(240, 10) <= kept(120, 10)


@pytest.mark.parametrize("gradient", ["reparam", "vimco", "dreg"])
def test_parameters_changed_by_a_small_step_before_the_backward_pass_raise_too(gradient):
    model = LinearGaussian().off_posterior()
    loss = IWAE(k=6, chunk_size=2, gradient=gradient)(model, model.data())
    with torch.no_grad():
        model.bias += 0.003
    with pytest.raises(RuntimeError, match="changed in between"):
        loss.backward()


def test_a_parameter_frozen_before_the_backward_pass_raises():
    model = LinearGaussian().off_posterior()
    loss = IWAE(k=6, chunk_size=2)(model, model.data())
    model.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="depends on other parameters than in the forward pass"):
        loss.backward()


def test_an_error_leaves_the_generator_where_it_was():
    torch.manual_seed(0)
    before = rng_state()
    torch.manual_seed(1)
    now = rng_state()
    with pytest.raises(ZeroDivisionError), generators_at(before):
        torch.rand(3)
        raise ZeroDivisionError
    assert same_state(rng_state(), now)


def test_the_generators_of_all_devices_are_put_back(monkeypatch):
    """Two devices, as far as a machine without any can play them: the samples are drawn on the second."""
    devices = [torch.Generator().manual_seed(i) for i in range(2)]
    states = {"is_available": lambda: True, "is_initialized": lambda: True}
    states["get_rng_state_all"] = lambda: [g.get_state() for g in devices]
    states["set_rng_state_all"] = lambda new: [g.set_state(state) for g, state in zip(devices, new, strict=True)]
    for name, function in states.items():
        monkeypatch.setattr(torch.cuda, name, function)

    class Second(Gaussian1D):
        def posterior(self, x):
            q = super().posterior(x)
            q.rsample = lambda shape: q.loc + q.scale * torch.randn(*shape, 3, dtype=F64, generator=devices[1])
            return q

    found = []
    for size in (None, 4):
        devices[1].manual_seed(3)
        found.append(loss_gradient(IWAE(k=10, chunk_size=size), Second(), X))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert_same(found[0][1], found[1][1], 1e-10)


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_gradients_of_sparse_embeddings_stay_sparse(gradient):
    class Embedded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(10, 3, sparse=True, dtype=F64)

        def posterior(self, x):
            return Independent(Normal(self.table(x), 1.0), 1)

        def log_joint(self, x, h):
            return -(h**2).sum(-1) - (h - 1).pow(4).sum(-1)

    torch.manual_seed(0)
    model, x, found = Embedded(), torch.tensor([1, 4, 4]), []
    for chunk_size in (None, 2):
        model.table.weight.grad = None
        torch.manual_seed(1)
        IWAE(k=5, gradient=gradient, chunk_size=chunk_size)(model, x).backward()
        assert model.table.weight.grad.is_sparse
        found.append(model.table.weight.grad.to_dense())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.optim.SparseAdam(model.parameters()).step()
    loss = IWAE(k=5, gradient=gradient, chunk_size=2)(model, x)
    [once] = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative of this loss would be incomplete"):
        once.to_dense().pow(2).sum().backward()


@dataclass(frozen=True)
class TupleOfWeights(IWAE):
    """Weights of its own, as a plain tuple."""

    def weights(self, log_w):
        g = self.slopes(log_w)
        return g, g, None


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"backward_samples": 2}])
def test_an_objectives_own_weights_may_be_a_tuple(options):
    model = LinearGaussian()
    x = model.data()
    _, found = loss_gradient(TupleOfWeights(k=4, **options), model, x)
    _, expected = loss_gradient(IWAE(k=4, gradient="stl", **options), model, x)
    assert_same(found, expected, 1e-12)
