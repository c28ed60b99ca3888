import math

import mpmath
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mcobjectives.likelihoods import bernoulli_log_likelihood, discretised_logistic_log_likelihood

PIXELS = (1, 2, 7, 63, 64, 784, 3000)


def exact(logits, x):
    """The same in float64, each term of one sign."""
    logits, x = logits.double(), x.double()
    missed = logits.clamp(min=0) * (1 - x) - logits.clamp(max=0) * x + torch.log1p(torch.exp(-logits.abs()))
    return -missed.sum(-1)


def assert_exact(logits, x):
    result = bernoulli_log_likelihood(logits, x)
    # Below 1e-38 float32 has fewer digits than it promises.
    torch.testing.assert_close(result.double(), exact(logits, x), rtol=1e-5, atol=1e-38)


def drawn(*shape, seed=0, **options):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
def test_exact_to_1e_5_relative(pixels, scale):
    logits = (2 * drawn(60, 4, pixels) - 1) * scale
    for x in (drawn(4, pixels, seed=1), drawn(4, pixels, seed=1).round()):
        torch.testing.assert_close(
            bernoulli_log_likelihood(logits, x).double(), exact(logits, x), rtol=1e-5, atol=1e-38
        )


@pytest.mark.parametrize("pixels", PIXELS)
def test_exact_where_every_pixel_is_all_but_certain(pixels):
    x = drawn(4, pixels).round()
    logits = torch.where(x == 1, 1.0, -1.0) * (8 + 60 * drawn(9, 4, pixels, seed=2))
    assert_exact(logits, x)


@pytest.mark.parametrize("logit", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_exact_at_the_corners(logit, value):
    logits, x = torch.full((2, 784), logit), torch.full((2, 784), value)
    assert_exact(logits, x)


def test_half_precision_logits_are_summed_in_float32():
    logits, x = (20 * drawn(5, 3, 784) - 10).bfloat16(), drawn(3, 784, seed=1)
    result = bernoulli_log_likelihood(logits, x)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact(logits, x), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("of_logits", "of_x"),
    [
        ((5, 3, 7), (3, 7)),
        ((3, 7), (3, 7)),
        ((5, 1, 7), (3, 7)),
        ((3, 7), (5, 3, 7)),
        ((2, 5, 3, 7), (3, 7)),
        ((7,), (7,)),
    ],
)
def test_shapes_broadcast(of_logits, of_x):
    logits, x = 4 * drawn(*of_logits) - 2, drawn(*of_x, seed=1)
    assert_exact(logits, x)


@pytest.mark.parametrize("of_logits", [(0, 3, 7), (5, 0, 7)])
def test_no_samples_or_no_data_points_give_an_empty_result(of_logits):
    assert bernoulli_log_likelihood(torch.zeros(of_logits), torch.zeros(of_logits[1:])).shape == of_logits[:2]


def test_many_blocks_of_samples_are_one_result():
    logits, x = 4 * drawn(700, 2, 784) - 2, drawn(2, 784, seed=1)
    logits.requires_grad_()
    result = bernoulli_log_likelihood(logits, x)
    torch.testing.assert_close(result.double(), exact(logits, x), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(result.sum(), logits)
    torch.testing.assert_close(gradient, x - torch.sigmoid(logits))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_binary_data_of_any_dtype(dtype):
    logits, x = 4 * drawn(5, 3, 7) - 2, drawn(3, 7, seed=1).round()
    torch.testing.assert_close(bernoulli_log_likelihood(logits, x.to(dtype)), bernoulli_log_likelihood(logits, x))


def test_pixels_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="logits have 8 pixels and x 7"):
        bernoulli_log_likelihood(torch.zeros(2, 8), torch.zeros(2, 7))


def test_derivatives_of_every_kind():
    logits = (4 * drawn(3, 2, 7, dtype=torch.float64) - 2).requires_grad_()
    x = drawn(2, 7, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(bernoulli_log_likelihood, (logits, x))
    assert torch.autograd.gradgradcheck(bernoulli_log_likelihood, (logits, x))


def test_the_gradient_keeps_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        logits = (10 * drawn(5, 3, 63) - 5).to(dtype).requires_grad_()
        x = drawn(3, 63, seed=1)
        (gradient,) = torch.autograd.grad(bernoulli_log_likelihood(logits, x).sum(), logits)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), x - torch.sigmoid(logits.float()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_equals_a_loop(in_dims):
    logits = 4 * (drawn(6, 3, 7) if in_dims[0] == 0 else drawn(3, 7)) - 2
    x = drawn(6, 3, 7, seed=1) if in_dims[1] == 0 else drawn(3, 7, seed=1)
    row = [tuple(t[i] if dim == 0 else t for t, dim in zip((logits, x), in_dims, strict=True)) for i in range(6)]
    loop = torch.stack([bernoulli_log_likelihood(*one) for one in row])
    torch.testing.assert_close(torch.vmap(bernoulli_log_likelihood, in_dims)(logits, x), loop)
    slope = torch.func.grad(lambda logits, x: bernoulli_log_likelihood(logits, x).sum())
    loop = torch.stack([slope(*one) for one in row])
    torch.testing.assert_close(torch.vmap(slope, in_dims)(logits, x), loop)


def test_the_hessian_is_diagonal():
    logits, x = 4 * drawn(7) - 2, drawn(7, seed=1)
    p = torch.sigmoid(logits)
    slope = torch.func.grad(lambda logits: bernoulli_log_likelihood(logits, x))
    torch.testing.assert_close(torch.func.jacrev(slope)(logits), torch.diag(-p * (1 - p)))


@pytest.mark.slow
def test_compiled_equals_eager():
    logits, x = (20 * drawn(5, 3, 63) - 10).requires_grad_(), drawn(3, 63, seed=1)
    compiled = torch.compile(bernoulli_log_likelihood, fullgraph=True)
    torch.testing.assert_close(compiled(logits, x).double(), exact(logits, x), rtol=1e-5, atol=0)
    binary = x.round()
    certain = torch.where(binary == 1, 1.0, -1.0) * (8 + 60 * drawn(5, 3, 63, seed=2))
    for extreme in (certain, -certain, torch.zeros_like(certain)):
        found = compiled(extreme.requires_grad_(), binary).double()
        torch.testing.assert_close(found, exact(extreme, binary), rtol=1e-5, atol=1e-38)
    (gradient,) = torch.autograd.grad(compiled(logits, x).sum(), logits)
    torch.testing.assert_close(gradient, x - torch.sigmoid(logits))


# Discretised logistic.


def grid(levels, dtype=torch.float32):
    """All levels as `(levels, 1)`."""
    return torch.arange(levels, dtype=dtype).unsqueeze(-1) / (levels - 1)


def exact_logistic(mean, log_scale, x, levels=256):
    """log P of one pixel by many digits, from the definition."""
    with mpmath.workdps(400):
        x, mean, scale = mpmath.mpf(x), mpmath.mpf(mean), mpmath.exp(mpmath.mpf(log_scale))
        half = mpmath.mpf(1) / (levels - 1) / 2

        def below(edge):
            return 1 / (1 + mpmath.exp(-(edge - mean) / scale))

        p = (1 if x == 1 else below(x + half)) - (0 if x == 0 else below(x - half))
        return float(mpmath.log(p)) if p > 0 else -float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("log_scale", [-60.0, -7.0, -3.0, 0.0, 5.0])
def test_the_probabilities_of_all_levels_add_up_to_one(dtype, levels, mean, log_scale):
    x = grid(levels, dtype)
    log_p = discretised_logistic_log_likelihood(
        torch.tensor([mean], dtype=dtype), torch.tensor([log_scale], dtype=dtype), x, levels
    )
    assert log_p.shape == (levels,) and torch.isfinite(log_p).all() and (log_p <= 0).all()
    assert float(log_p.double().exp().sum()) == pytest.approx(1.0, abs=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("level", [0, 1, 100, 254, 255])
@pytest.mark.parametrize("mean", [-0.5, 0.25, 1.5])
@pytest.mark.parametrize("log_scale", [-5.0, -1.0, 4.0, 30.0])
def test_each_is_exact_however_small(level, mean, log_scale):
    arguments = (torch.tensor([v], dtype=torch.float64) for v in (mean, log_scale, level / 255))
    expected = exact_logistic(mean, log_scale, 1 if level == 255 else mpmath.mpf(level) / 255)
    assert float(discretised_logistic_log_likelihood(*arguments)) == pytest.approx(expected, rel=1e-10)


def test_a_far_pixel_has_a_finite_gradient_that_brings_the_mean_near():
    mean, log_scale = torch.full((3, 1), 0.5).requires_grad_(), torch.full((3, 1), -30.0).requires_grad_()
    x = torch.tensor([[0.0], [100 / 255], [1.0]])
    log_p = discretised_logistic_log_likelihood(mean, log_scale, x)
    slopes = torch.autograd.grad(log_p.sum(), (mean, log_scale))
    assert torch.isfinite(log_p).all() and all(torch.isfinite(slope).all() for slope in slopes)
    assert torch.equal(slopes[0].sign(), (x - 0.5).sign()) and (slopes[1] > 0).all()


def test_a_sum_over_pixels_that_broadcasts_over_samples():
    mean, log_scale, x = drawn(5, 3, 7), drawn(5, 3, 7, seed=1) - 3, (drawn(3, 7, seed=2) * 255).round() / 255
    result = discretised_logistic_log_likelihood(mean, log_scale, x)
    loop = torch.stack(
        [
            torch.stack(
                [
                    discretised_logistic_log_likelihood(
                        mean[i, j, d : d + 1], log_scale[i, j, d : d + 1], x[j, d : d + 1]
                    )
                    for d in range(7)
                ]
            ).sum()
            for i in range(5)
            for j in range(3)
        ]
    )
    assert result.shape == (5, 3)
    torch.testing.assert_close(result.flatten(), loop)


def test_the_discretised_logistic_is_not_summed_in_half_precision():
    mean, log_scale, x = drawn(4, 784), drawn(4, 784, seed=1) - 3, drawn(4, 784, seed=2)
    halves = mean.bfloat16(), log_scale.bfloat16()
    found = discretised_logistic_log_likelihood(*halves, x)
    expected = discretised_logistic_log_likelihood(*(half.double() for half in halves), x.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-2)


def test_derivatives_of_the_discretised_logistic():
    mean = drawn(4, 3, 6, dtype=torch.float64).requires_grad_()
    log_scale = (drawn(4, 3, 6, seed=1, dtype=torch.float64) * 12 - 7).requires_grad_()  # both sides of the series
    x = (drawn(3, 6, seed=2, dtype=torch.float64) * 255).round() / 255
    x[0, :2] = torch.tensor([0.0, 1.0])
    assert torch.autograd.gradcheck(lambda m, s: discretised_logistic_log_likelihood(m, s, x), (mean, log_scale))


def test_what_does_not_fit_the_discretised_logistic_is_refused():
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        discretised_logistic_log_likelihood(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), levels=1)
    with pytest.raises(ValueError, match="must agree in the last dimension, got 3, 3, 4"):
        discretised_logistic_log_likelihood(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_value_between_levels_counts_as_the_nearest():
    x = torch.arange(256, dtype=torch.float64).unsqueeze(-1) / 255
    mean, log_scale = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    expected = discretised_logistic_log_likelihood(mean, log_scale, x)
    for off in (-0.4, 0.4):
        found = discretised_logistic_log_likelihood(mean, log_scale, (x + off / 255).clamp(0, 1))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("x", "log_p"), [(0.0, -math.log(2)), (1.0, -math.log(2))])
def test_a_mean_on_an_edge_halves_the_mass_however_small_the_scale(x, log_p):
    mean, log_scale = torch.tensor([0.5], requires_grad=True), torch.tensor([-100.0], requires_grad=True)
    found = discretised_logistic_log_likelihood(mean, log_scale, torch.tensor([x]), levels=2)
    assert float(found.detach()) == pytest.approx(log_p)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, (mean, log_scale)))


def test_data_that_have_a_place_for_samples_are_not_cut():
    logits = torch.randn(4, 100, 784, generator=torch.Generator().manual_seed(0))
    x = (torch.rand(4, 100, 784, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    one_by_one = torch.stack([bernoulli_log_likelihood(*pair) for pair in zip(logits, x, strict=True)])
    torch.testing.assert_close(bernoulli_log_likelihood(logits, x), one_by_one)


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (torch.tensor([[0, 255, 7]], dtype=torch.uint8), "from 0 to 255: divide bytes by 255"),
        (torch.tensor([[-1.0, 1.0, 0.5]]), "from -1 to 1: .* leave out a Normalize"),
    ],
)
def test_pixels_out_of_the_unit_interval_are_refused(x, found):
    with pytest.raises(ValueError, match=rf"^x must be in \[0, 1\], got values {found}"):
        bernoulli_log_likelihood(torch.zeros(5, 1, 3), x)
    with pytest.raises(ValueError, match=rf"^x must be in \[0, 1\], got values {found}"):
        discretised_logistic_log_likelihood(torch.zeros(5, 1, 3), torch.zeros(3), x)


def test_rounding_at_the_ends_of_the_unit_interval_is_no_offence():
    x = torch.tensor([[1 + 2e-7, -2e-7, 0.5]])
    assert bernoulli_log_likelihood(torch.zeros(1, 3), x).isfinite().all()


def test_it_traces_with_fake_tensors():
    def total(logits, x):
        return bernoulli_log_likelihood(logits, x).sum()

    logits, x = torch.randn(3, 2, 5), torch.rand(2, 5)
    graph = make_fx(total, tracing_mode="symbolic")(logits, x)
    torch.testing.assert_close(graph(logits, x), total(logits, x))
