"""How far bfloat16 products are from float32: log-weights, normalised weights, bound of a trained model.

Trains the one-layer model for a few passes, draws k samples for random test images, and evaluates their log-weights
in float32 and in bfloat16. `--out` records the errors with their provenance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcobjectives_examples.config import Config, canonical
from mcobjectives_examples.datasets import load
from mcobjectives_examples.evaluating import test_images
from mcobjectives_examples.files import write_json
from mcobjectives_examples.models import PaperModel
from mcobjectives_examples.precision import products
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.training import Trainer


@torch.no_grad()
def errors(model: PaperModel, x: Tensor, k: int) -> dict[str, Any]:
    """What bfloat16 products do to log-weights within an image, to the normalised weights, and to the bound."""
    torch.manual_seed(0)
    posterior = model.posterior(x)
    h = posterior.rsample(torch.Size((k,)))
    rest = (model.log_prior(h) - posterior.log_prob(h)).double()
    exact = model.log_likelihood(x, h).double() + rest
    w = exact.softmax(0)
    with products("bf16"):
        log_w = model.log_likelihood(x, h).double() + rest
    error = log_w - exact
    return {
        "k": k,
        "images": len(x),
        "ess": float((1 / w.square().sum(0)).mean()),
        "log_weight_std_within_x": float((error - error.mean(0)).std()),
        "total_variation": float((log_w.softmax(0) - w).abs().sum(0).mean() / 2),
        "bound": float((log_w.logsumexp(0) - exact.logsumexp(0)).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="binarized_mnist")
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dataset, source = load(args.dataset), provenance()
    preset = get_preset("short").with_passes(args.passes)
    config = Config(args.dataset, preset.binarisation_of(args.dataset), 1, canonical("iwae(k=5)"), preset)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, dataset, torch.device("cpu"), Path(folder) / "run.pt")
        trainer.run()
    images = test_images(dataset, config)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:200]
    found = errors(trainer.model, images[chosen], args.k)
    print(json.dumps(found, indent=1))
    if args.out:
        about = {"dataset": args.dataset, "passes": args.passes, "errors": found, "provenance": source}
        write_json(args.out, about)


if __name__ == "__main__":
    main()
