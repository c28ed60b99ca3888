"""What a cell records of its trained model: log-likelihood, active units, reconstructions, and all of it pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mcobjectives.evaluation import Activity, Evaluation, evaluate, layer_activity
from mcobjectives.likelihoods import bernoulli_log_likelihood
from mcobjectives_examples.binarisation import test_set
from mcobjectives_examples.compiling import for_evaluation
from mcobjectives_examples.config import Config
from mcobjectives_examples.hooks import NO_HOOKS, Hooks, Interrupted
from mcobjectives_examples.models import PaperModel
from mcobjectives_examples.precision import set_precision
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.pruning import pruned
from mcobjectives_examples.sources import Dataset

EVALUATION_SEED = 20210401
PRUNED_IMAGES = 1000
"""At most so many test images, and a quarter of them, are evaluated a second time, by the pruned model."""


def test_images(dataset: Dataset, config: Config) -> Tensor:
    """The binary test images that a configuration is evaluated on, `(n, pixels)`."""
    images = test_set(dataset.test, config.binarisation)
    n = config.preset.test_images
    return images if n is None or n >= len(images) else images[random_rows(len(images), n)]


def random_rows(total: int, n: int) -> Tensor:
    """Which n of so many test images, `(n,)`: the same in every run, whatever its seed."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(EVALUATION_SEED))[:n]


def evaluate_model(model: PaperModel, images: Tensor, preset: Preset, hooks: Hooks = NO_HOOKS) -> dict[str, Any]:
    """What a cell records of its model on the test images, as plain values; log-probabilities are in nats per image.

    All of `Evaluation.to_dict`; active units of each layer; `reconstruction_error`; and the pruned model's
    `nll_pruned` on `pruned_images` of the images, beside `nll_unpruned_same_images` and the standard error
    `nll_pruned_stderr` of their difference.
    """
    device = next(model.parameters()).device
    images = images.to(device)
    set_precision("highest")
    torch.manual_seed(EVALUATION_SEED)
    model.eval()

    def progress(what: str, total: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            hooks.on_progress(what, done, total)
            if hooks.stop():
                raise Interrupted

        return report

    with torch.no_grad():
        fast = for_evaluation(model, preset.nll_k * len(images))
        evaluation = evaluate(fast, images, k=preset.nll_k, progress=progress("evaluate", len(images)))
        layers = layer_activity(model, images)
        n = min(PRUNED_IMAGES, math.ceil(len(images) / 4))
        pruning = evaluate_pruned(model, images, layers, evaluation, n, progress("evaluate pruned", n))
        error = reconstruction_error(model, images)
    return evaluation.to_dict() | {
        "active_units": [layer.active for layer in layers],
        "pca_active_units": [layer.pca for layer in layers],
        "reconstruction_error": _finite(error),
        **pruning,
    }


def reconstruction_error(model: PaperModel, images: Tensor) -> float:
    """The cross-entropy between an image and its reconstruction, summed over pixels: mean nats per image.

    The paper's: an image is encoded to the topmost layer and decoded again; but by conditional means, where the
    paper takes one sample of every layer.
    """
    return float(reconstructions(model, images)[1].mean())


def reconstructions(model: PaperModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images encoded and decoded again: pixel probabilities, `(n, pixels)`, and the cross-entropies, `(n,)` float64."""
    pixels, errors = [], []
    for batch in images.split(1000):
        logits = model.reconstruct(batch)
        pixels.append(logits.sigmoid())
        errors.append(-bernoulli_log_likelihood(logits, batch).double())
    return torch.cat(pixels), torch.cat(errors)


def evaluate_pruned(
    model: PaperModel,
    images: Tensor,
    layers: list[Activity],
    evaluation: Evaluation,
    n: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """NLL without the inactive units, on n random images, and of the whole model on those very images.

    `layers` and `evaluation` are the whole model's on all images; where every unit is active, its numbers serve.
    """
    chosen = random_rows(len(images), n)
    whole = evaluation.log_likelihood[chosen]
    without = whole
    if any(layer.active < len(layer.variance) for layer in layers):
        small = pruned(model, [layer.units for layer in layers])
        torch.manual_seed(EVALUATION_SEED)
        without = evaluate(small, images[chosen.to(images.device)], k=evaluation.k, progress=progress).log_likelihood
    stderr = float((whole - without).std() / math.sqrt(n)) if n > 1 else math.nan
    return {
        "pruned_images": n,
        "nll_pruned": _finite(-float(without.mean())),
        "nll_unpruned_same_images": _finite(-float(whole.mean())),
        "nll_pruned_stderr": _finite(stderr),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def scalars(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics that are numbers, and those of each layer one by one, counted from x upwards."""
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{name}/layer{i}", part) for i, part in enumerate(value, 1))
        elif value is not None:
            yield name, value
