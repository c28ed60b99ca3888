import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal

from mcobjectives import IWAE, VAE, ModelError
from mcobjectives.evaluation import evaluate
from mcobjectives_examples.models import Affine, GaussianChain, PaperModel, paper_model
from mcobjectives_examples.paper import paper
from mcobjectives_examples.precision import products
from mcobjectives_examples.pruning import pruned

DEPTHS = {1: ([8], [3]), 2: ([8, 6], [5, 3]), 3: ([8, 7, 6], [5, 4, 3])}


def small(layers, pixels=9, seed=0):
    torch.manual_seed(seed)
    model = PaperModel(torch.linspace(0.1, 0.9, pixels), *DEPTHS[layers])
    for parameter in model.parameters():  # no bias is left at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def data(batch=4, pixels=9):
    return torch.rand(batch, pixels, generator=torch.Generator().manual_seed(1))


def gaussian(layer, given):
    """The distribution of a `GaussianLayer`, from its weights alone."""
    first, second = layer.body[0], layer.body[2]
    features = torch.tanh(torch.tanh(given @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    log_std = features @ layer.log_std.weight.T + layer.log_std.bias
    return Independent(Normal(features @ layer.mean.weight.T + layer.mean.bias, log_std.exp() + 1e-6), 1)


def test_the_analytic_kl_is_the_textbook_formula_and_is_for_one_layer():
    model, x = small(1), data()
    q = gaussian(model.encoder[0], x).base_dist
    kl = (q.variance + q.mean**2 - 1 - q.variance.log()).sum(-1) / 2
    torch.manual_seed(0)
    found = VAE(k=3, analytic_kl=True).bound(model, x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, model.log_likelihood(x, model.posterior(x).rsample((3,))).mean(0) - kl)
    assert torch.isfinite(VAE(analytic_kl=True)(pruned(model, [[0, 2]]), x))
    with pytest.raises(ModelError, match="analytic_kl=True needs a torch Distribution as posterior"):
        VAE(analytic_kl=True)(small(2), x)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_1l_model_of_the_paper_has_its_parameters():
    assert count(paper_model(1, torch.full((784,), 0.5))) == paper()["architectures"]["1"]["parameters_784_pixels"]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("pixels", [1, 64, 784, 1000])
def test_parameters_by_the_formula_for_any_input_width(layers, pixels):
    hidden, latent = (paper()["architectures"][str(layers)][key] for key in ("hidden", "latent"))

    def affine(inputs, outputs):
        return inputs * outputs + outputs

    def gaussian_layer(inputs, width, outputs):
        return affine(inputs, width) + affine(width, width) + 2 * affine(width, outputs)

    width = hidden[0]
    expected = affine(latent[0], width) + affine(width, width) + affine(width, pixels)
    for below, w, d in zip([pixels, *latent], hidden, latent, strict=False):
        expected += gaussian_layer(below, w, d)
    for above, w, d in zip(latent[1:], hidden[1:], latent, strict=False):
        expected += gaussian_layer(above, w, d)
    assert count(paper_model(layers, torch.full((pixels,), 0.5))) == expected


def test_weights_are_glorot_uniform_and_biases_zero_but_the_output():
    torch.manual_seed(0)
    means = torch.tensor([0.0, 1e-5, 0.25, 0.5, 1.0])
    model = paper_model(2, means)
    output = model.decoder[-1]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.97 * bound < module.weight.abs().max() <= bound
            assert module is output or not module.bias.any()
    torch.testing.assert_close(output.bias.sigmoid(), means.clamp(0.001, 0.999))


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_posterior_is_the_chain_upwards_from_x(layers):
    model, x = small(layers), data()
    posterior = model.posterior(x)
    h = posterior.rsample(torch.Size([6]))
    parts = (h,) if layers == 1 else h
    given, expected = x.expand(6, -1, -1), 0.0
    for layer, part in zip(model.encoder, parts, strict=True):
        expected = expected + gaussian(layer, given).log_prob(part)
        given = part
    assert expected.shape == (6, 4)
    torch.testing.assert_close(posterior.log_prob(h), expected)


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_joint_is_the_chain_downwards_to_x(layers):
    model, x = small(layers), data()
    h = model.posterior(x).rsample(torch.Size([6]))
    parts = (h,) if layers == 1 else h
    expected = Normal(0.0, 1.0).log_prob(parts[-1]).sum(-1)
    for layer, above, below in zip(model.prior_layers, parts[1:], parts[:-1], strict=True):
        expected = expected + gaussian(layer, above).log_prob(below)
    torch.testing.assert_close(model.log_prior(h), expected)
    pixels = Independent(Bernoulli(probs=model.decode(h), validate_args=False), 1)
    torch.testing.assert_close(model.log_likelihood(x, h), pixels.log_prob(x.expand(6, -1, -1)))


@pytest.mark.parametrize("layers", [2, 3])
def test_samples_of_the_chain_have_its_means_and_spreads(layers):
    model, x = small(layers), data(batch=2)
    with torch.no_grad():
        h = model.posterior(x).rsample(torch.Size([40_000]))
        given = x
        for layer, part in zip(model.encoder, h, strict=True):
            conditional = gaussian(layer, given).base_dist
            z = (part - conditional.mean) / conditional.stddev
            assert z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.03
            given = part


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
@pytest.mark.parametrize("layers", [2, 3])
def test_attached_samples_of_the_chain_have_the_gradient_of_drawn_ones(gradient, layers, monkeypatch):
    model, x = small(layers).double(), data().double()
    objective = IWAE(k=7, backward_samples=3, gradient=gradient)

    def gradient_of() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return list(torch.autograd.grad(objective(model, x), list(model.parameters())))

    attached = gradient_of()
    monkeypatch.delattr(GaussianChain, "attach")
    torch.testing.assert_close(attached, gradient_of(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layers", [2, 3])
def test_layer_means_are_the_conditional_means_and_the_first_is_exact(layers):
    model, x = small(layers), data()
    posterior = model.posterior(x)
    h = posterior.rsample(torch.Size([6]))
    means = posterior.layer_means(h)
    assert [m.shape for m in means] == [part.shape for part in h]
    torch.testing.assert_close(means[0], gaussian(model.encoder[0], x).mean.expand_as(h[0]))
    torch.testing.assert_close(posterior.mean[0], gaussian(model.encoder[0], x).mean)
    for layer, below, mean in zip(list(model.encoder)[1:], h, means[1:], strict=False):
        torch.testing.assert_close(mean, gaussian(layer, below).mean)


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_encoder_of_x_runs_once_on_the_rows_of_the_batch(layers):
    model, x = small(layers), data()
    rows = []
    model.encoder[0].register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].numel() // 9))
    IWAE(k=50)(model, x).backward()
    assert rows == [4]
    rows.clear()
    evaluate(model, x, k=700, chunk_size=100, batch_size=4)
    assert rows == [4]


@pytest.mark.parametrize("layers", DEPTHS)
def test_every_parameter_gets_a_gradient(layers):
    model = small(layers)
    IWAE(k=5)(model, data()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_unequal_widths_and_unknown_depths_are_refused():
    with pytest.raises(ValueError, match="one width per layer"):
        PaperModel(torch.full((4,), 0.5), [3, 3], [2])
    with pytest.raises(ValueError, match="layers must be one of 1, 2, got 3"):
        paper_model(3, torch.full((4,), 0.5))


def test_a_bias_is_added_in_float32_to_a_product_in_bfloat16():
    layer = Affine(2, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(2**-10)
        with products("bf16"):
            assert float(layer(torch.tensor([3.0, 5.0]))) == 8 + 2**-10  # bfloat16 knows 8 and 8.0625
