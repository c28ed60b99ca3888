import pytest
import torch

from mcobjectives.likelihoods import bernoulli_log_likelihood

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
    (gradient,) = torch.autograd.grad(compiled(logits, x).sum(), logits)
    torch.testing.assert_close(gradient, x - torch.sigmoid(logits))
