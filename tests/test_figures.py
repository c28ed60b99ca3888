"""Figures 2 to 5: what they show against independent computations, and the command on tiny models."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from mcobjectives_examples import checkpoints, drawing, figures, labels, report
from mcobjectives_examples.binarisation import test_set
from mcobjectives_examples.cells import checkpoint_path
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.config import Config
from mcobjectives_examples.errors import DataError
from mcobjectives_examples.hooks import Hooks
from mcobjectives_examples.models import paper_model
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.sources import DATASETS
from mcobjectives_examples.training import Interrupted

CPU = torch.device("cpu")
TINY = dataclasses.replace(get_preset("smoke"), stages=((1, 2e-3),), batch_size=500)
PNG = b"\x89PNG\r\n\x1a\n"


def configs(number, **options):
    return figures.configurations(number, TINY, **{"dataset": "digits", "cap": 3} | options)


@pytest.fixture(scope="module")
def contents(digits, tmp_path_factory):
    """Every figure's configurations, models and content, by models of one pass."""
    runs, found = tmp_path_factory.mktemp("runs"), {}
    for number in figures.FIGURES:
        chosen = configs(number)
        models = [figures.trained(config, digits, runs, CPU) for config in chosen]
        found[number] = chosen, models, figures.content(number, chosen, models, digits)
    return found


# Which models.


def test_the_models_of_each_figure():
    names = {number: [config.name for config in configs(number, cap=None)] for number in figures.FIGURES}
    whole = ["digits-once-1L-vae-k-1-seed0", "digits-once-1L-iwae-k-50-seed0"]
    two = ["digits-once-1L-latent2-vae-k-1-seed0", "digits-once-1L-latent2-iwae-k-50-seed0"]
    assert names == {2: two, 3: whole, 4: whole, 5: two[1:]}
    assert [config.dataset for config in figures.configurations(4, TINY)] == ["fashion_mnist"] * 2
    assert len(configs(3, cap=1)) == 1  # IWAE of one sample is the VAE


def test_a_record_from_before_there_was_a_latent_width_is_the_same_configuration():
    config = Config("digits", "once", 1, "iwae(k=5)", TINY)
    record = config.to_dict("abc")
    assert "latent" not in record and config.name == "digits-once-1L-iwae-k-5-seed0"
    assert Config.from_dict(record) == config
    narrow = dataclasses.replace(config, latent=2)
    assert Config.from_dict(narrow.to_dict("abc")) == narrow != config
    assert narrow.to_dict("abc") == record | {"latent": 2}


def test_the_latent_width_is_the_topmost_layers():
    pixel_means = torch.full((64,), 0.3)
    for layers in (1, 2):
        model = paper_model(layers, pixel_means, latent=3)
        h = model.posterior(torch.zeros(2, 64)).rsample(torch.Size([4]))
        assert (h if layers == 1 else h[-1]).shape == (4, 2, 3)
    assert paper_model(2, pixel_means, latent=3).encoder[0].mean.out_features == 100


@pytest.mark.parametrize("name", ["binarized_mnist", "omniglot"])
def test_a_data_set_without_classes_has_no_figure_2(name):
    with pytest.raises(DataError, match=f"{name} lists no class labels: choose from digits, mnist, fashion_mnist"):
        figures.configurations(2, TINY, dataset=name)
    assert figures.configurations(3, TINY, dataset=name)


@pytest.mark.parametrize("number", [1, 6, 0])
def test_an_unknown_figure_names_the_known_ones(number):
    with pytest.raises(ValueError, match="choose from 2, 3, 4, 5"):
        figures.configurations(number, TINY)


# Labels.


def test_labels_of_digits_are_those_of_the_test_images(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    by_image = {tuple(image): label for image, label in zip(bunch.data, bunch.target, strict=True)}
    shown = [by_image[tuple(image)] for image in (digits.test * 16).round().double().tolist()]
    assert labels.test_labels("digits").tolist() == shown


def idx(values):
    return (2049).to_bytes(4, "big") + len(values).to_bytes(4, "big") + bytes(values)


def test_labels_are_read_from_beside_the_images(tmp_path):
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte are not there"):
        labels.test_labels("mnist", tmp_path)
    path.parent.mkdir(parents=True)
    values = [i % 10 for i in range(DATASETS["mnist"].sizes[1])]
    path.write_bytes(idx(values))
    assert labels.test_labels("mnist", tmp_path).tolist() == values
    for broken in (idx(values[:-1]), idx([11, *values[1:]]), b"nothing", idx(values)[:-9]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="move it away"):
            labels.test_labels("mnist", tmp_path)


# What is shown.


def test_figure_2_shows_the_encoders_means(contents, digits):
    _, models, content = contents[2]
    x = test_set(digits.test, "once")
    for model, part in zip(models, content.parts, strict=True):
        bottom = model.encoder[0]
        means = bottom.mean(bottom.body(x)).detach()
        np.testing.assert_allclose(part.means, means, rtol=1e-5, atol=1e-6)
        assert part.spread == pytest.approx(float(means.std(0).mean()), rel=1e-5)
        assert part.width == pytest.approx(
            float((bottom.log_std(bottom.body(x)).exp() + 1e-6).detach().mean()), rel=1e-5
        )
        assert part.labels.tolist() == labels.test_labels("digits").tolist()
        assert f"{part.spread:.2f}" in content.caption
    assert content.labels == ("VAE, k = 1", "IWAE, k = 3") and len(content.numbers()) == 2


@pytest.mark.parametrize("number", [3, 4])
def test_the_reconstruction_error_is_the_cross_entropy(contents, digits, number):
    _, models, content = contents[number]
    x = digits.test if number == 4 else test_set(digits.test, "once")
    assert np.array_equal(content.images, x.numpy()) and len(content.shown) == 10
    for label, model, part in zip(content.labels, models, content.parts, strict=True):
        bottom = model.encoder[0]
        logits = model.decoder(bottom.mean(bottom.body(x))).double()
        expected = binary_cross_entropy_with_logits(logits, x.double(), reduction="none").sum(1).detach()
        np.testing.assert_allclose(part.errors, expected, rtol=1e-5)
        np.testing.assert_allclose(part.pixels, 1 / (1 + np.exp(-logits.detach().numpy())), rtol=1e-4)
        assert content.numbers()[label]["reconstruction_error"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert f"{part.error:.2f} ({label})" in content.caption


def test_figure_5_decodes_quantiles_of_the_prior(contents):
    from scipy.stats import norm

    _, [model], content = contents[5]
    [part] = content.parts
    assert part.shape == (20, 20, 64)
    for row, column in ((0, 0), (0, 19), (19, 0), (7, 12)):
        h = torch.tensor([norm.ppf((column + 0.5) / 20), norm.ppf(1 - (row + 0.5) / 20)], dtype=torch.float32)
        np.testing.assert_allclose(part[row, column], model.decode(h).detach(), rtol=1e-4)


def test_a_figure_is_drawn_with_the_numbers_that_its_record_holds(contents, digits, tmp_path):
    for number, (chosen, _, content) in contents.items():
        record = drawing.save(tmp_path / f"{number}.svg", content, chosen, digits, provenance())
        text = " ".join(ET.parse(tmp_path / f"{number}.svg").getroot().itertext())
        assert record["title"] in text and json.loads((tmp_path / f"{number}.svg.json").read_text()) == record
        for part in content.parts:
            if number == 2:
                assert f"standard deviation of the means {part.spread:.2f}" in text
            elif number in (3, 4):
                assert all(f"{part.errors[i]:.1f}" in text for i in content.shown) and f"{part.error:.1f} nats" in text
        assert record["data"]["sha256"] == digits.checksum and record["models"][0] == chosen[0].to_dict(digits.checksum)
        first = (tmp_path / f"{number}.svg").read_bytes()
        drawing.save(tmp_path / f"{number}.svg", content, chosen, digits, provenance())
        assert (tmp_path / f"{number}.svg").read_bytes() == first
        drawing.save(tmp_path / f"{number}.png", content, chosen, digits, provenance())
        assert (tmp_path / f"{number}.png").read_bytes().startswith(PNG)


def test_a_figure_that_is_not_its_records_is_refused(contents, digits, tmp_path, monkeypatch):
    path = tmp_path / "5.png"
    chosen, _, content = contents[5]
    drawing.save(path, content, chosen, digits, provenance())
    assert len(list(report.pictures(tmp_path))) == 1

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing.files, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        drawing.save(path, dataclasses.replace(content, title="Another"), chosen, digits, provenance())
    with pytest.raises(CheckpointError, match=r"5\.png is not the image that 5\.png\.json tells of: draw it again"):
        list(report.pictures(tmp_path))
    record = json.loads((tmp_path / "5.png.json").read_text())
    del record["image_sha256"]  # as older records are
    (tmp_path / "5.png.json").write_text(json.dumps(record))
    assert len(list(report.pictures(tmp_path))) == 1


# Training.


def test_what_is_trained_is_not_trained_again_and_what_was_stopped_goes_on(digits, tmp_path):
    [config] = configs(5)
    longer = dataclasses.replace(config, preset=TINY.with_passes(3))
    steps = []
    counted = Hooks(on_progress=lambda *seen: steps.append(seen))
    with pytest.raises(Interrupted):
        figures.trained(longer, digits, tmp_path, CPU, dataclasses.replace(counted, stop=lambda: len(steps) >= 4))
    figures.trained(longer, digits, tmp_path, CPU, counted)
    assert len(steps) == 9 and steps[-1] == ("train", 3.0, 3)
    written = checkpoint_path(tmp_path, longer).stat().st_mtime_ns
    model = figures.trained(longer, digits, tmp_path, CPU, counted)
    assert len(steps) == 9 and checkpoint_path(tmp_path, longer).stat().st_mtime_ns == written
    state = checkpoints.load(checkpoint_path(tmp_path, longer), None, CPU)["model"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    with pytest.raises(CheckpointError, match="differs in preset"):
        figures.trained(config, digits, tmp_path, CPU)
