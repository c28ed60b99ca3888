import dataclasses
import math
import types

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

from mcobjectives.activity import Activity
from mcobjectives.evaluation import evaluate, layer_activity
from mcobjectives_examples import evaluating
from mcobjectives_examples.evaluating import (
    evaluate_model,
    evaluate_pruned,
    random_rows,
    reconstruction_error,
    reconstructions,
)
from mcobjectives_examples.models import PaperModel
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.pruning import pruned

HIDDEN = [8, 7, 6]
WIDE = [5, 4, 3]
KEPT = [[0, 3, 4], [1, 3], [2]]
DEPTHS = [1, 2, 3]
PRESET = dataclasses.replace(get_preset("smoke"), nll_k=200)


def model_of(latent, seed=0, pixels=9):
    """A float64 model with no parameter at zero, whose means vary much with what is given."""
    torch.manual_seed(seed)
    model = PaperModel(torch.full((pixels,), 0.5), HIDDEN[: len(latent)], latent).double()
    for name, parameter in model.named_parameters():
        std = 3.0 if "encoder" in name and "mean.weight" in name else 0.2 if "log_std" in name else 0.4
        torch.nn.init.normal_(parameter, std=std)
    return model


def data(batch=40, pixels=9):
    return torch.rand(batch, pixels, generator=torch.Generator().manual_seed(1)).double().round()


@torch.no_grad()
def embed(small, kept, wide):
    """A wide model that reads and writes `kept` units as the small one does, its other numbers at random."""
    model = model_of(wide, seed=9)

    def put(theirs, ours, rows=slice(None), columns=slice(None)):
        block = theirs.weight[rows]
        block[:, columns] = ours.weight
        theirs.weight[rows] = block
        theirs.bias[rows] = ours.bias

    def layer(theirs, ours, below=slice(None), units=slice(None)):
        put(theirs.body[0], ours.body[0], columns=below)
        put(theirs.body[2], ours.body[2])
        put(theirs.mean, ours.mean, rows=units)
        put(theirs.log_std, ours.log_std, rows=units)

    for i in range(len(wide)):
        layer(model.encoder[i], small.encoder[i], kept[i - 1] if i else slice(None), kept[i])
    for i in range(len(wide) - 1):
        layer(model.prior_layers[i], small.prior_layers[i], kept[i + 1], kept[i])
    put(model.decoder[0], small.decoder[0], columns=kept[0])
    put(model.decoder[2], small.decoder[2])
    put(model.decoder[4], small.decoder[4])
    return model


@torch.no_grad()
def idle(model, kept):
    """Let the other units be N(0, 1) in q and p whatever is given, and read by nothing."""
    for i, width in enumerate(WIDE[: len(model.encoder)]):
        others = [u for u in range(width) if u not in kept[i]]
        layers = [model.encoder[i], *([model.prior_layers[i]] if i < len(model.prior_layers) else [])]
        for layer in layers:
            for linear, bias in ((layer.mean, 0.0), (layer.log_std, math.log1p(-1e-6))):
                linear.weight[others], linear.bias[others] = 0.0, bias
        readers = [model.encoder[i + 1].body[0]] if i + 1 < len(model.encoder) else []
        readers += [model.decoder[0]] if i == 0 else [model.prior_layers[i - 1].body[0]]
        for reader in readers:
            reader.weight[:, others] = 0.0


@pytest.mark.parametrize("layers", DEPTHS)
def test_a_pruned_model_is_the_smaller_one_parameter_by_parameter(layers):
    kept = KEPT[:layers]
    small = model_of([len(units) for units in kept])
    found = pruned(embed(small, kept, WIDE[:layers]), kept)
    expected = small.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("layers", DEPTHS)
def test_units_that_do_nothing_change_no_weight(layers):
    kept = KEPT[:layers]
    small = model_of([len(units) for units in kept])
    wide, x = embed(small, kept, WIDE[:layers]), data()
    idle(wide, kept)
    h = wide.posterior(x).rsample(torch.Size([6]))
    parts = (h,) if layers == 1 else h
    few = tuple(part[..., units] for part, units in zip(parts, kept, strict=True))
    without = pruned(wide, kept)

    def log_w(model, h):
        return model.log_likelihood(x, h) + model.log_prior(h) - model.posterior(x).log_prob(h)

    found = log_w(without, few[0] if layers == 1 else few)
    torch.testing.assert_close(found, log_w(wide, h), rtol=0, atol=1e-10)


@pytest.mark.parametrize("layers", DEPTHS)
def test_a_model_with_idle_units_loses_nothing_by_pruning(layers):
    kept = KEPT[:layers]
    wide = embed(model_of([len(units) for units in kept]), kept, WIDE[:layers])
    idle(wide, kept)
    metrics = evaluate_model(wide, data(400), dataclasses.replace(PRESET, nll_k=1000))
    assert metrics["active_units"] == [len(units) for units in kept]
    difference = metrics["nll_pruned"] - metrics["nll_unpruned_same_images"]
    assert abs(difference) < 4 * metrics["nll_pruned_stderr"]
    assert metrics["pruned_images"] == 100


def test_a_model_and_its_pruned_one_share_nothing():
    model = model_of([3])
    small = pruned(model, [[0, 1, 2]])
    before = [p.clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("units", [[[0], [1]], [[0, 0]], [[-1]], [[3]], []])
def test_other_units_than_the_models_are_refused(units):
    with pytest.raises(ValueError, match="units"):
        pruned(model_of([3]), units)


# What a cell records.


def log_p_at_zero(model, x):
    """log p(x | h1 = 0)."""
    return model.log_likelihood(x, torch.zeros(1, len(x), model.decoder[0].in_features, dtype=x.dtype))[0]


def compared(x):
    """The images on which a model is compared with its pruned one: a quarter of them."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(evaluating.EVALUATION_SEED))
    return order[: len(x) // 4]


@pytest.mark.parametrize("layers", [1, 2])
def test_without_any_active_unit_nothing_is_left_but_the_decoders_bias(layers):
    model, x = model_of(WIDE[:layers]), data()
    with torch.no_grad():
        for layer in (*model.encoder, *model.prior_layers):
            layer.mean.weight.zero_()
            layer.log_std.weight.zero_()
    metrics = evaluate_model(model, x, PRESET)
    assert metrics["active_units"] == [0] * layers
    expected = -float(log_p_at_zero(model, x[compared(x)]).mean().detach())
    assert metrics["nll_pruned"] == pytest.approx(expected, abs=1e-6)
    assert abs(metrics["nll_pruned"] - metrics["nll_unpruned_same_images"]) > 0.01  # what the decoder read was missed


def test_a_layer_without_active_units_leaves_the_other():
    model, x = model_of([5, 4]), data()
    with torch.no_grad():
        model.encoder[1].mean.weight.zero_()
    [first, second] = layer_activity(model, x)
    assert (len(first.units), second.units) == (5, [])
    metrics = evaluate_model(model, x, PRESET)
    torch.manual_seed(evaluating.EVALUATION_SEED)
    expected = evaluate(pruned(model, [[0, 1, 2, 3, 4], []]), x[compared(x)], k=200)
    assert metrics["nll_pruned"] == pytest.approx(expected.nll, rel=1e-12)
    assert all(value is None or math.isfinite(value) for value in metrics.values() if not isinstance(value, list))


def test_the_pruned_model_is_compared_on_the_very_images(monkeypatch):
    monkeypatch.setattr(evaluating, "PRUNED_IMAGES", 3)
    model, x = model_of([5]), data()
    with torch.no_grad():
        model.encoder[0].mean.weight.zero_()
        model.decoder[0].weight.zero_()  # log p(x | h) is one number an image, with or without h
        model.encoder[0].mean.bias.zero_()
        model.encoder[0].log_std.weight.zero_()
        model.encoder[0].log_std.bias.fill_(math.log1p(-1e-6))
    metrics = evaluate_model(model, x, PRESET)
    assert metrics["pruned_images"] == 3 and metrics["points"] == 40
    assert metrics["nll_pruned"] == pytest.approx(metrics["nll_unpruned_same_images"], abs=1e-10)
    assert metrics["nll_pruned_stderr"] == pytest.approx(0.0, abs=1e-9)
    assert abs(metrics["nll_pruned"] - metrics["nll"]) > 0.1


def test_where_every_unit_is_active_nothing_is_evaluated_again(monkeypatch):
    model, x = model_of([5, 4]), data()
    layers, evaluation = layer_activity(model, x), evaluate(model, x, k=20)
    assert [layer.active for layer in layers] == [5, 4]
    monkeypatch.setattr(evaluating, "evaluate", None)
    found = evaluate_pruned(model, x, layers, evaluation, len(x), lambda done: None)
    assert found["nll_pruned"] == found["nll_unpruned_same_images"] == pytest.approx(evaluation.nll)
    assert found["nll_pruned_stderr"] == 0


def test_pruning_moves_no_other_number():
    model, x = model_of([5]), data()
    whole = evaluate_model(model, x, PRESET)
    torch.manual_seed(evaluating.EVALUATION_SEED)
    assert evaluate(model, x, k=200).to_dict().items() <= whole.items()


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_reconstruction_goes_up_to_the_top_and_down_again_by_means(layers):
    model, x = model_of(WIDE[:layers]), data()
    h = x
    for layer in (*model.encoder, *list(model.prior_layers)[::-1]):
        features = torch.tanh(layer.body[2](torch.tanh(layer.body[0](h))))
        h = features @ layer.mean.weight.T + layer.mean.bias
    with torch.no_grad():
        error = reconstruction_error(model, x)
        expected = float(binary_cross_entropy(model.decode(h), x, reduction="sum")) / len(x)
    assert error == pytest.approx(expected, rel=1e-10)
    assert evaluate_model(model, x, PRESET)["reconstruction_error"] == pytest.approx(error)


def test_one_image_has_no_standard_error():
    model, x = model_of([5]), data()
    found = evaluate_pruned(model, x, layer_activity(model, x), evaluate(model, x, k=20), 1, lambda done: None)
    assert found["pruned_images"] == 1 and found["nll_pruned_stderr"] is None


def test_units_may_be_given_in_any_order():
    x, model = data(), model_of([5, 4, 3])
    rising, mixed = (pruned(model, units) for units in ([[0, 3, 4], [1, 3], [2]], [[4, 0, 3], [3, 1], [2]]))
    h = rising.posterior(x).rsample(torch.Size((3,)))
    same = h[0][..., [2, 0, 1]], h[1][..., [1, 0]], h[2]
    torch.testing.assert_close(mixed.log_prior(same), rising.log_prior(h))
    torch.testing.assert_close(mixed.log_likelihood(x, same), rising.log_likelihood(x, h))
    torch.testing.assert_close(mixed.posterior(x).log_prob(same), rising.posterior(x).log_prob(h))


def test_a_quarter_of_the_images_is_rounded_up():
    assert evaluate_model(model_of([5]), data(6), PRESET)["pruned_images"] == 2


def test_the_standard_error_is_of_the_images_that_were_compared(monkeypatch):
    model, x = model_of([5]), data()
    layers, evaluation = [Activity(torch.ones(5), [0, 1], 2)], evaluate(model, x, k=20)
    found = evaluation.log_likelihood[random_rows(len(x), 4)] - torch.tensor([1.0, 3.0, 1.0, 3.0])
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, **__: types.SimpleNamespace(log_likelihood=found))
    metrics = evaluate_pruned(model, x, layers, evaluation, 4, lambda done: None)
    assert metrics["nll_pruned"] - metrics["nll_unpruned_same_images"] == pytest.approx(2.0)
    assert metrics["nll_pruned_stderr"] == pytest.approx(math.sqrt(4 / 3) / 2)


def test_every_image_is_reconstructed():
    x = data(1003)
    model = model_of([5])
    with torch.no_grad():
        pixels, errors = reconstructions(model, x)
        last = reconstructions(model, x[-3:])
    assert len(pixels) == len(errors) == len(x)
    torch.testing.assert_close((pixels[-3:], errors[-3:]), last)


def test_an_evaluation_multiplies_in_float32_whatever_training_did():
    torch.set_float32_matmul_precision("medium")
    try:
        evaluate_model(model_of([5]), data(8), PRESET)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_units_and_directions_are_recorded_each_under_its_name():
    model = model_of([5])
    with torch.no_grad():  # two units say the same
        for linear in (model.encoder[0].mean,):
            linear.weight[1], linear.bias[1] = linear.weight[0], linear.bias[0]
    metrics = evaluate_model(model, data(), PRESET)
    [layer] = layer_activity(model, data())
    assert (metrics["active_units"], metrics["pca_active_units"]) == ([5], [4]) == ([layer.active], [layer.pca])
