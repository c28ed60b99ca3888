"""dtypes, autocast, transforms and the compiler: the same numbers, and sums in float32 at least."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toys import F64, DiagonalGaussian, LinearGaussian, assert_same, every, gradients, loss_gradient

from mcobjectives import IWAE, VAE


@every
def test_the_loss_has_the_dtype_of_the_log_densities(objective):
    model = LinearGaussian(dtype=torch.float32).off_posterior()
    for gradient in ("reparam", "score", "vimco"):
        loss, gradient = loss_gradient(replace(objective, gradient=gradient), model, model.data())
        assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradient.values())


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "vimco"])
def test_under_bf16_autocast_log_weights_are_float32(gradient):
    seen = []

    class Spy(IWAE):
        def reduce(self, log_w):
            seen.append(log_w.dtype)
            return super().reduce(log_w)

    model = LinearGaussian(dtype=torch.float32)
    objective = Spy(k=3, gradient=gradient)
    seen.clear()

    class Half(LinearGaussian):
        def log_likelihood(self, x, h):
            return super().log_likelihood(x, h).bfloat16()

        def log_prior(self, h):
            return super().log_prior(h).bfloat16()

    half = Half(dtype=torch.float32)
    for m in (model, half):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(m, m.data())
        loss.backward()
        assert loss.dtype == torch.float32 and m.q_offset.grad is not None
    assert set(seen) == {torch.float32}


class Plain:
    """A model of numbers without torch.distributions: log-densities are as given, or Gaussian."""

    def __init__(self, loc=0.0, log_p=None, log_q=None, noise=None):
        self.loc, self.noise = loc, noise
        self.log_joint = lambda x, h: -((x - h) ** 2) - h**2 if log_p is None else log_p
        self.log_prob = lambda h: -((h - self.loc) ** 2) / 2 if log_q is None else log_q

    def posterior(self, x):
        return self

    def rsample(self, shape):
        return self.loc + (torch.randn(*shape, 1) if self.noise is None else self.noise)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_densities_are_subtracted_in_float32(dtype):
    log_p, log_q = torch.full((2, 1), -96.5, dtype=dtype), torch.full((2, 1), 3.125, dtype=dtype)
    bound = VAE(k=2).bound(Plain(log_p=log_p, log_q=log_q), torch.zeros(1))
    assert bound.dtype == torch.float32 and bound.item() == -99.625  # bfloat16 knows -99.5 and -100


def test_vmap_gives_each_data_points_own_gradient():
    noise = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=F64)

    def loss(loc, x):
        return IWAE(k=5)(Plain(loc, noise=noise), x.unsqueeze(0))

    loc, x = torch.tensor(0.3, dtype=F64), torch.tensor([0.9, -2.0, 0.1], dtype=F64)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(loc, x)
    expected = []
    for point in x:
        leaf = loc.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf, point), leaf)[0])
    torch.testing.assert_close(found, torch.stack(expected))


@every
def test_functional_gradients_equal_backward(objective):
    model = LinearGaussian().off_posterior()
    x, bound = model.data(), objective.bind(model)

    def loss(parameters):
        return torch.func.functional_call(bound, parameters, (x,))

    torch.manual_seed(0)
    found = torch.func.grad(loss)({name: p.detach() for name, p in bound.named_parameters()})
    _, expected = loss_gradient(objective, model, x)
    assert_same({name.removeprefix("model."): -g for name, g in found.items()}, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [IWAE(k=6), IWAE(k=6, backward_samples=2)], ids=repr)
def test_a_compiled_loss_gives_the_same_numbers(objective):
    try:
        torch.compile(lambda v: v + 1)(torch.zeros(2))
    except Exception as error:
        pytest.skip(f"no compiler: {type(error).__name__}")

    model = DiagonalGaussian(dtype=torch.float32).off_posterior()
    x = model.data()
    expected = loss_gradient(objective, model, x)
    compiled = torch.compile(objective.bind(model), options={"fallback_random": True})
    torch.manual_seed(0)
    loss = compiled(x)
    torch.testing.assert_close(loss.detach(), expected[0])
    assert_same(gradients(model, -loss), expected[1], 1e-5)
