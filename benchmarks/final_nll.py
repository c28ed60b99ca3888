"""Whether cheaper steps end at the same NLL: all samples in float32 beside few samples and bfloat16 products.

    python benchmarks/final_nll.py --out benchmarks/results/final_nll.json

IWAE-50 on the one-layer model and digits, each way from the same seeds: initial parameters, batches and noise. What is
judged is the mean of the seeds' differences, beside its standard error. The record is written after every run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mcobjectives.evaluation import evaluate
from mcobjectives_examples.config import Config, canonical
from mcobjectives_examples.datasets import load
from mcobjectives_examples.evaluating import test_images
from mcobjectives_examples.files import write_json
from mcobjectives_examples.precision import set_precision
from mcobjectives_examples.presets import Preset, get_preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.training import Trainer

WAYS = {
    "all samples, float32": ("highest", None),
    "5 samples, mixed": ("mixed", 5),
    "10 samples, bf16": ("bf16", 10),
}
NLL_K = 5000


def final_nll(dataset: Dataset, preset: Preset, k: int, seed: int) -> float:
    """The NLL of test images, in float32, after training."""
    config = Config(dataset.name, preset.binarisation_of(dataset.name), 1, canonical(f"iwae(k={k})"), preset, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, dataset, torch.device("cpu"), Path(folder) / "run.pt", engine="compiled")
        trainer.run()
    set_precision("highest")
    torch.manual_seed(0)
    return evaluate(trainer.model, test_images(dataset, config), k=NLL_K).nll


def row(name: str, nll: list[float], base: list[float]) -> dict[str, Any]:
    precision, samples = WAYS[name]
    found: dict[str, Any] = {"name": name, "precision": precision, "backward_samples": samples, "nll": nll}
    differences = [a - b for a, b in zip(nll, base, strict=False)]
    if nll is not base and len(differences) > 1:
        found["difference"] = statistics.mean(differences)
        found["stderr"] = statistics.stdev(differences) / math.sqrt(len(differences))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--passes", type=int, default=70)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dataset = load(args.dataset)
    source = provenance()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(args.seeds):
        for name, (precision, samples) in WAYS.items():
            preset = get_preset("short").with_passes(args.passes)
            preset = replace(preset, precision=precision, backward_samples=samples)
            found[name].append(final_nll(dataset, preset, args.k, seed))
            print(f"seed {seed}  {name:20}  {found[name][-1]:.3f}", flush=True)
            rows = [row(way, nll, next(iter(found.values()))) for way, nll in found.items()]
            about = {"dataset": args.dataset, "passes": args.passes, "k": args.k, "nll_k": NLL_K}
            if args.out:
                write_json(args.out, {**about, "rows": rows, "provenance": source})
    for r in rows[1:]:
        print(f"{r['name']}: {r.get('difference', math.nan):+.3f} ± {r.get('stderr', math.nan):.3f} nats")


if __name__ == "__main__":
    main()
