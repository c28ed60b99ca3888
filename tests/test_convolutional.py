"""examples/convolutional.py: its model, its data and a run that is killed."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mcobjectives import IWAE
from mcobjectives.likelihoods import discretised_logistic_log_likelihood
from mcobjectives.testing import check_model
from mcobjectives_examples import checkpoints
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.errors import DataError, MissingDataError

SCRIPT = Path(__file__).parent.parent / "examples" / "convolutional.py"
spec = importlib.util.spec_from_file_location("convolutional", SCRIPT)
convolutional = importlib.util.module_from_spec(spec)
sys.modules["convolutional"] = convolutional
spec.loader.exec_module(convolutional)
PRESET = convolutional.PRESETS["smoke"].with_passes(3)
CONFIG = {"objective": "iwae(k=2)", "seed": 0}


def model_of(shape=(1, 8, 8), levels=17, seed=0):
    torch.manual_seed(seed)
    return convolutional.ConvolutionalVAE(shape, torch.full((math.prod(shape),), 0.3), levels, width=4, latent=3)


def data(n=40, pixels=64, levels=17):
    return torch.randint(levels, (n, pixels), generator=torch.Generator().manual_seed(1)) / (levels - 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_the_model_fits_grey_and_colour_and_the_protocol(shape):
    model, x = model_of(shape, 256), data(3, math.prod(shape), 256)
    check_model(model, x)
    h = model.posterior(x).rsample(torch.Size([4]))
    mean, log_scale = model.decode(h)
    assert mean.shape == log_scale.shape == (4, 3, math.prod(shape)) and (log_scale >= -7).all()
    expected = discretised_logistic_log_likelihood(mean, log_scale, x, 256)
    torch.testing.assert_close(model.log_likelihood(x, h), expected)
    one_by_one = torch.stack(
        [torch.cat([model.log_likelihood(x[j : j + 1], h[i, j : j + 1]) for j in range(3)]) for i in range(4)]
    )
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-3)  # samples and images are not mixed up
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(h).sum(-1)
    torch.testing.assert_close(model.log_prior(h), normal)


def test_every_parameter_gets_a_gradient():
    model = model_of()
    IWAE(k=5)(model, data(20)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, monkeypatch):
    def trained(name, model):
        return convolutional.train(model, IWAE(k=2), data(250), PRESET, tmp_path / name, CONFIG)[0]

    whole = model_of()
    history = trained("whole.pt", whole)
    assert len(history) == 3 and history == sorted(history)
    save, saved = checkpoints.save, []

    def kill(path, state):
        save(path, state)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        trained("killed.pt", model_of())
    monkeypatch.setattr(checkpoints, "save", save)
    again = model_of(seed=5)
    torch.manual_seed(99)
    assert trained("killed.pt", again) == history
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="differs in objective"):
        convolutional.train(again, IWAE(k=2), data(), PRESET, tmp_path / "killed.pt", CONFIG | {"objective": "vae"})


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convolutional.py", *map(str, arguments)])
    convolutional.main()


def test_the_script_records_nats_and_bits_and_where_they_come_from(tmp_path, monkeypatch, capsys):
    options = ["--passes", 1, "--device", "cpu", "--runs", tmp_path / "runs", "--out", tmp_path / "out.json"]
    run(monkeypatch, *options)
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["objective"] for row in record["rows"]] == ["vae(k=5)", "iwae(k=5)"]
    for row in record["rows"]:
        assert row["bits_per_dim"] == pytest.approx(row["nll"] / (64 * math.log(2))) and row["points"] == 100
        assert 0 < row["bits_per_dim"] < math.log2(17)  # that of levels without any model
        assert len(row["learning_curve"]) == 1
    assert record["data"]["name"] == "digits" and len(record["data"]["sha256"]) == 64
    assert {"commit", "machine", "versions", "date"} <= record["provenance"].keys()
    first = capsys.readouterr().out
    run(monkeypatch, *options)
    assert capsys.readouterr().out == first  # from the checkpoints


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--dataset", "digit"], "unknown data set 'digit'"),
        (["--dataset", "fashion_mnist", "--data-dir", "none"], "--download"),
        (["--objective", "iwa"], "did you mean 'iwae'?"),
        (["--device", "tpu9"], "tpu9"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(monkeypatch, tmp_path, arguments, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments)
    assert part in str(end.value) and "\n" not in str(end.value) and not list(tmp_path.iterdir())


class Cifar10:
    """torchvision's class with eight images, at the interface that is used."""

    def __init__(self, root, train, download):
        if not download:
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        self.data = np.random.RandomState(train).randint(0, 256, (8 if train else 4, 32, 32, 3)).astype(np.uint8)


def test_cifar_10_is_read_channel_by_channel(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar10)
    with pytest.raises(MissingDataError, match="--download"):
        convolutional.read("cifar10", tmp_path, download=False)
    images = convolutional.read("cifar10", tmp_path, download=True)
    raw = Cifar10("", True, True).data
    assert images.train.shape == (8, 3072) and images.test.shape == (4, 3072) and images.train.dtype == torch.float32
    assert float(images.train.unflatten(1, images.shape)[5, 2, 7, 9]) == pytest.approx(raw[5, 7, 9, 2] / 255)
    assert images.levels == 256 and images.about["train"] == 8


def test_pixels_between_the_levels_are_refused(monkeypatch):
    monkeypatch.setitem(convolutional.LEVELS, "digits", 256)
    with pytest.raises(DataError, match="between its 256 levels"):
        convolutional.read("digits", None, download=False)
