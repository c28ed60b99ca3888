"""Wall-clock to a test NLL: this library and peers train one model on the same data by the same schedule.

    python benchmarks/time_to_nll.py --out benchmarks/results/time_to_nll.json --plot docs/assets/time_to_nll.png
    python benchmarks/time_to_nll.py --passes 10 --target 96 --peers idiomatic    # shorter

One stochastic layer, IWAE with k samples, fixed-binarisation MNIST, batch 100, one learning-rate cycle. Every
contestant is a process (`peers/`); they take turns, a pass at a time, while the others wait. Only training steps count.
After some passes the parameters are evaluated here, all alike: IWAE-5000 in float32 on a random subset of test images.
The record is written after every evaluation, so that a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import CONTESTANTS, PEERS_PYTHON, Worker, choose, installed, interpreters, surroundings
from torch import nn

from mcobjectives.evaluation import evaluate
from mcobjectives_examples.compiling import CompiledLikelihood
from mcobjectives_examples.datasets import load
from mcobjectives_examples.files import write_json
from mcobjectives_examples.models import paper_model
from mcobjectives_examples.presets import get_preset

STEPS_BETWEEN_RATES = 25


class Judge:
    """The NLL of parameters that a worker saved: IWAE-k in float32 on the same images with the same random numbers."""

    def __init__(self, images: torch.Tensor, k: int) -> None:
        self.images, self.k = images, k
        self.model = paper_model(1, torch.full((784,), 0.5)).requires_grad_(False)
        self.compiled = CompiledLikelihood(self.model)

    def nll(self, parameters: Path) -> float:
        arrays = np.load(parameters)
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        for module, i in zip(linear, range(0, 2 * len(linear), 2), strict=True):
            module.weight.copy_(torch.from_numpy(arrays[f"arr_{i}"]).T)
            module.bias.copy_(torch.from_numpy(arrays[f"arr_{i + 1}"]))
        torch.manual_seed(0)
        with torch.no_grad():
            return evaluate(self.compiled, self.images, k=self.k).nll


def crossing(curve: list[dict[str, float]], target: float) -> float | None:
    """Seconds at which the NLL falls to the target, between two evaluations by a straight line; None if it does not."""
    for a, b in pairwise(curve):
        if b["nll"] <= target < a["nll"]:
            return a["seconds"] + (b["seconds"] - a["seconds"]) * (a["nll"] - target) / (a["nll"] - b["nll"])
    return curve[0]["seconds"] if curve and curve[0]["nll"] <= target else None


def one_pass(worker: Worker, steps: int, rates: list[float]) -> float:
    """Seconds of the steps of a pass."""
    seconds = 0.0
    for start, rate in zip(range(0, steps, STEPS_BETWEEN_RATES), rates, strict=True):
        n = min(STEPS_BETWEEN_RATES, steps - start)
        seconds += sum(worker.ask(f"{n} {rate}")["ms"]) / 1e3
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--passes", type=int, default=44)
    parser.add_argument("--rate", type=float, default=3e-3, help="the cycle's highest learning rate")
    parser.add_argument("--every", type=int, default=5, help="passes between evaluations")
    parser.add_argument("--target", type=float, default=90.0, help="nats")
    parser.add_argument("--nll-k", type=int, default=5000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours", default="resampled-mixed")
    parser.add_argument("--peers", default="idiomatic-compiled,tensorflow-xla")
    parser.add_argument("--peers-python", default=str(PEERS_PYTHON))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    wanted = choose("ours", args.ours) + choose("peer", args.peers)
    pythons = interpreters(args.peers_python, wanted)
    torch.set_num_threads(args.threads)
    dataset = load("binarized_mnist", args.data_dir)
    chosen = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))[: args.images]
    judge = Judge(dataset.test[chosen], args.nll_k)
    schedule = replace(get_preset("short"), stages=((args.passes, args.rate),))
    source = surroundings(args.threads)
    curves: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data, saved = Path(folder) / "train.npy", Path(folder) / "parameters.npz"
        np.save(data, dataset.train.numpy().astype(np.uint8))
        workers = [
            Worker(c, pythons[c.module], 1, args.k, schedule.batch_size, args.threads, data)
            for c in installed(wanted, pythons)
        ]
        try:
            for worker in workers:
                worker.ready = worker.answer()
                worker.ask(f"3 {schedule.learning_rate(0) * 1e-3}")  # compiles, and learns next to nothing
                curves[worker.contestant.name] = [{"passes": 0, "seconds": 0.0, "nll": float("inf")}]
            steps = len(dataset.train) // schedule.batch_size
            for done in range(args.passes):
                starts = range(0, steps, STEPS_BETWEEN_RATES)
                rates = [schedule.learning_rate(done + start / steps) for start in starts]
                for worker in workers:
                    curve = curves[worker.contestant.name]
                    curve.append({"passes": done + 1, "seconds": curve[-1]["seconds"] + one_pass(worker, steps, rates)})
                    if (done + 1) % args.every == 0 or done + 1 == args.passes:
                        worker.ask(f"save {saved}")
                        curve[-1]["nll"] = judge.nll(saved)
                        print(worker.contestant.name, curve[-1], file=sys.stderr, flush=True)
                record = summary(curves, args, source, dataset.checksum)
                if args.out:
                    write_json(args.out, record)
        finally:
            for worker in workers:
                worker.close()
    print(json.dumps({name: row["seconds_to_target"] for name, row in record["contestants"].items()}, indent=1))
    if args.plot:
        plot(record, args.plot)


def summary(curves: dict[str, Any], args: argparse.Namespace, source: dict, checksum: str) -> dict[str, Any]:
    """The record: what was run, each contestant's curve and its time to the target."""
    kinds = {c.name: c.kind for c in CONTESTANTS}
    contestants = {}
    for name, curve in curves.items():
        evaluated = [point for point in curve if np.isfinite(point.get("nll", np.nan))]
        contestants[name] = {
            "kind": kinds[name],
            "seconds_to_target": crossing(evaluated, args.target),
            "curve": evaluated,
        }
    about = {name: getattr(args, name) for name in ("k", "passes", "rate", "target", "images", "nll_k")}
    return {**about, "data_sha256": checksum, "contestants": contestants, "provenance": source}


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, row in record["contestants"].items():
        curve = row["curve"]
        style = "-o" if row["kind"] == "ours" else "--s"
        axes.plot([p["seconds"] for p in curve], [p["nll"] for p in curve], style, markersize=3, label=name)
    axes.axhline(record["target"], color="grey", linewidth=0.8)
    axes.set(xlabel="seconds of training", ylabel="test NLL, nats", title=f"IWAE, k = {record['k']}, fixed MNIST")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
