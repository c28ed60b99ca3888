"""A convolutional model of grey or colour levels, outside the paper's domain, trained by any objective.

    python examples/convolutional.py                                                     # 8 x 8 digits, seconds
    python examples/convolutional.py --dataset fashion_mnist --preset short --out convolutional.json     # minutes
    python examples/convolutional.py --dataset cifar10 --preset long --device cuda --download

One stochastic layer, convolutions in both directions, and pixels of 256 levels under a discretised logistic, whose
probabilities are exact: the NLL is that of the images as they are, in nats and in bits per dimension. A run that was
killed goes on from its last whole pass.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from mcobjectives.arguments import require_choice
from mcobjectives.evaluation import evaluate, layer_activity
from mcobjectives.likelihoods import discretised_logistic_log_likelihood
from mcobjectives.objective import Objective
from mcobjectives.specs import parse_objective
from mcobjectives_examples import checkpoints, files
from mcobjectives_examples.datasets import load
from mcobjectives_examples.devices import pick_device
from mcobjectives_examples.downloads import data_dir
from mcobjectives_examples.errors import DataError, MissingDataError
from mcobjectives_examples.evaluating import EVALUATION_SEED, random_rows
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.sources import DATASETS

LEVELS = {"digits": 17, "mnist": 256, "fashion_mnist": 256, "cifar10": 256}
ADAM: dict[str, Any] = {"one_cycle": True, "eps": 1e-8}
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("smoke", "seconds: shows that it works", ((2, 2e-3),), nll_k=100, test_images=100, **ADAM),
        Preset("short", "minutes on a CPU", ((3, 2e-3),), nll_k=100, test_images=1000, **ADAM),
        Preset("long", "for a GPU", ((100, 1e-3),), nll_k=5000, **ADAM),
    )
}


class ConvolutionalVAE(nn.Module):
    """p(h) = N(0, I), q(h | x) a diagonal Gaussian, p(x | h) a discretised logistic for each pixel and channel.

    Images are rows of `channels * height * width` levels in [0, 1]; height and width are multiples of four.
    """

    def __init__(
        self, shape: tuple[int, int, int], pixel_means: Tensor, levels: int, width: int = 16, latent: int = 32
    ):
        super().__init__()
        channels, height, across = shape
        small = (2 * width, height // 4, across // 4)
        self.shape, self.levels = shape, levels
        self.encoder = nn.Sequential(
            *(nn.Conv2d(channels, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU()),
            *(nn.Flatten(), nn.Linear(math.prod(small), 2 * latent)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(latent, math.prod(small)), nn.SiLU(), nn.Unflatten(1, small)),
            *(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU()),
            nn.ConvTranspose2d(width, 2 * channels, 4, 2, 1),
        )
        self.bias = nn.Parameter(pixel_means.clone())

    def posterior(self, x: Tensor) -> Independent:
        mean, log_std = self.encoder(x.unflatten(-1, self.shape) - 0.5).chunk(2, -1)
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)

    def log_prior(self, h: Tensor) -> Tensor:
        return (-0.5 * h * h).sum(-1) - 0.5 * math.log(2 * math.pi) * h.shape[-1]

    def decode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the scale of each pixel, `(..., pixels)`."""
        out = self.decoder(h.flatten(0, -2)).flatten(1).unflatten(0, h.shape[:-1])
        mean, log_scale = out.chunk(2, -1)
        return mean + self.bias, (log_scale - 2).clamp(min=-7)  # a quarter of a grey level: sharper is no use

    def log_likelihood(self, x: Tensor, h: Tensor) -> Tensor:
        return discretised_logistic_log_likelihood(*self.decode(h), x, self.levels)


@dataclasses.dataclass(frozen=True)
class Images:
    """Training and test images, `(n, channels * height * width)` in [0, 1], and where they come from."""

    train: Tensor
    test: Tensor
    shape: tuple[int, int, int]
    levels: int
    about: dict[str, Any]


def read(name: str, folder: Path | None, download: bool) -> Images:
    """The images of a data set, on their grid of levels."""
    require_choice("data set", name, LEVELS)
    if name in DATASETS:
        found = load(name, folder, download=download)
        images = Images(found.train, found.test, (1, *found.shape), LEVELS[name], found.record())
    else:
        images = _cifar10(data_dir(folder), download)
    steps = images.test * (images.levels - 1)
    if not torch.allclose(steps, steps.round(), atol=1e-3):
        raise DataError(f"{name} has pixels between its {images.levels} levels: this model is for whole ones")
    return images


def _cifar10(folder: Path, download: bool) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(str(folder), train=train, download=download).data for train in (True, False)]
    except RuntimeError as error:
        raise MissingDataError(
            f"cifar10 is not in {folder}, or damaged: point --data-dir at it, or --download"
        ) from error
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
    train, test = (torch.from_numpy(part).permute(0, 3, 1, 2).flatten(1) / 255 for part in parts)
    about = {"name": "cifar10", "source": "CIFAR-10 through torchvision", "sha256": digest}
    return Images(train, test, (3, 32, 32), 256, about | {"train": len(train), "test": len(test)})


def train(
    model: ConvolutionalVAE, objective: Objective, x: Tensor, preset: Preset, path: Path, config: dict[str, Any]
) -> tuple[list[float], float]:
    """The mean bound of each pass, nats, and the seconds; from the checkpoint on, if there is one of this config."""
    optimiser = torch.optim.Adam(model.parameters(), lr=preset.learning_rate(0), betas=preset.betas, eps=preset.eps)
    history: list[float] = []
    seconds, device, steps = 0.0, x.device, math.ceil(len(x) / preset.batch_size)
    if path.exists():
        state = checkpoints.load(path, config, device)
        with checkpoints.readable(path):
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            history, seconds = list(state["history"]), state["seconds"]
    for epoch in range(len(history), preset.passes):
        began, total = time.monotonic(), 0.0
        torch.manual_seed(1000 * config["seed"] + epoch)  # a pass draws the same wherever a run was interrupted
        order = torch.randperm(len(x), device=device)
        for step, batch in enumerate(order.split(preset.batch_size)):
            optimiser.param_groups[0]["lr"] = preset.learning_rate(epoch + step / steps)
            optimiser.zero_grad(set_to_none=True)
            loss = objective(model, x[batch])
            loss.backward()
            optimiser.step()
            total -= float(loss.detach()) * len(batch)
        if not math.isfinite(total):
            raise ValueError(f"pass {epoch + 1}: the mean bound is {total / len(x)}: try another --seed")
        history.append(total / len(x))
        seconds += time.monotonic() - began
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "history": history}
        checkpoints.save(path, {"config": json.dumps(config), **state, "seconds": seconds})
        print(f"{config['objective']}, pass {epoch + 1} of {preset.passes}: {history[-1]:.2f} nats", file=sys.stderr)
    return history, seconds


def run(spec: str, images: Images, preset: Preset, seed: int, runs: Path, device: torch.device) -> dict[str, Any]:
    """Train by one objective and measure on test images, in nats and bits per dimension."""
    torch.manual_seed(seed)
    model = ConvolutionalVAE(images.shape, images.train.mean(0), images.levels).to(device)
    config = {"objective": spec, "preset": dataclasses.asdict(preset), "seed": seed, "data": images.about["sha256"]}
    config = json.loads(json.dumps(config))
    name = "-".join(
        ("convolutional", images.about["name"], preset.name, *spec.strip(")").replace("(", "-").split(", "))
    )
    history, seconds = train(
        model, parse_objective(spec), images.train.to(device), preset, runs / f"{name}-seed{seed}.pt", config
    )
    n = min(preset.test_images or len(images.test), len(images.test))
    x = images.test[random_rows(len(images.test), n)].to(device)
    began = time.monotonic()
    torch.manual_seed(EVALUATION_SEED)
    with torch.no_grad():
        found = evaluate(model, x, k=preset.nll_k).to_dict()
        [layer] = layer_activity(model, x)
    assert isinstance(found["nll"], float)
    return {
        "objective": spec,
        "bits_per_dim": found["nll"] / (x.shape[1] * math.log(2)),
        **found,
        "active_units": layer.active,
        "learning_curve": history,
        "seconds": {"train": round(seconds, 2), "evaluate": round(time.monotonic() - began, 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help=", ".join(LEVELS))
    parser.add_argument("--preset", default="smoke", choices=PRESETS)
    parser.add_argument("--objective", nargs="+", default=["vae(k=5)", "iwae(k=5)"], help="as in mcobj train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passes", type=int, help="in place of the preset's")
    parser.add_argument("--runs", type=Path, default=Path("runs/convolutional"), help="folder of checkpoints")
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    surroundings = provenance()
    try:
        preset = preset if arguments.passes is None else preset.with_passes(arguments.passes)
        device = pick_device(arguments.device)
        for spec in arguments.objective:
            parse_objective(spec)
        images = read(arguments.dataset, arguments.data_dir, arguments.download)
        if arguments.out:
            files.require_writable(arguments.out)
        rows = [run(s, images, preset, arguments.seed, arguments.runs, device) for s in arguments.objective]
    except (ValueError, DataError, checkpoints.CheckpointError, files.OutputError) as error:
        sys.exit(f"convolutional.py: {error}")
    for row in rows:
        nats, ess = f"{row['nll']:.2f} ± {row['nll_stderr']:.2f} nats", f"ESS {row['ess_mean']:.1f} of {row['k']}"
        print(f"{row['objective']:>12}  {nats}  {row['bits_per_dim']:.3f} bits/dim  {ess}")
    print("An ESS near one means that log p(x) is still underestimated: more samples would lower the NLL.")
    if arguments.out:
        config = {"seed": arguments.seed, "preset": dataclasses.asdict(preset), "levels": images.levels}
        record = {"config": config, "data": images.about, "rows": rows, "provenance": surroundings}
        files.write_json(arguments.out, record)


if __name__ == "__main__":
    main()
