"""How long cells would take, from a few timed steps and a short evaluation of each kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mcobjectives.context import generators_at
from mcobjectives.evaluation import evaluate
from mcobjectives_examples.config import Config, training_objective
from mcobjectives_examples.devices import fastest
from mcobjectives_examples.engine import Engine, flat_adam, make_step
from mcobjectives_examples.evaluating import test_images
from mcobjectives_examples.memory import require_memory
from mcobjectives_examples.models import paper_model
from mcobjectives_examples.precision import set_precision
from mcobjectives_examples.sources import Dataset


def estimate_seconds(done: Mapping[Config, int], dataset: Dataset, device: torch.device) -> float:
    """How long configurations would take of which so many passes are done, from a few timed steps of each.

    Compiling may save two thirds of it.
    """
    steps: dict[tuple[int, int | None, str], float] = {}
    evaluations: dict[tuple[int, int | None], float] = {}
    total = 0.0
    with generators_at():
        for config, passes in done.items():
            preset, kind = config.preset, (config.layers, config.latent)
            key = *kind, config.objective
            if key not in steps:
                steps[key] = _time_step(config, dataset, device)
            if kind not in evaluations:
                evaluations[kind] = _time_evaluation(config, dataset, device)
            left = max(0, preset.passes - passes) * -(-len(dataset.train) // preset.batch_size)
            total += left * steps[key] + evaluations[kind]
    return total


def _time_step(config: Config, dataset: Dataset, device: torch.device) -> float:
    preset = config.preset
    model = paper_model(config.layers, dataset.train.mean(0), config.latent).to(device)
    objective = training_objective(config.objective, preset)
    optimiser = flat_adam(model, preset.betas, preset.eps)
    x = dataset.train[: preset.batch_size].to(device)
    require_memory(objective, x)
    step, _ = make_step(Engine("eager", "to be timed"), objective, model, optimiser, preset.precision, x)
    return fastest(lambda: float(step(x)), 4)


def _time_evaluation(config: Config, dataset: Dataset, device: torch.device) -> float:
    model = paper_model(config.layers, dataset.train.mean(0), config.latent).to(device)
    set_precision("highest")
    images = test_images(dataset, config)
    few, k = images[:20].to(device), min(config.preset.nll_k, 500)
    return fastest(lambda: evaluate(model, few, k=k).nll, 2) * len(images) / len(few) * config.preset.nll_k / k
