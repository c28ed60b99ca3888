"""What training several seeds as one saves: a step of three runs together beside a step of each, compiled.

The paper's one-layer model on binary images; the two take turns, and the ratio is that of the medians. `--out` records
the rows with their provenance.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import in_turns

from mcobjectives_examples.config import Config
from mcobjectives_examples.devices import pick_device
from mcobjectives_examples.engine import Engine, make_step
from mcobjectives_examples.files import write_json
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.stacking import Stack
from mcobjectives_examples.training import Trainer


def runs(k: int, members: int, precision: str, device: torch.device, folder: Path) -> list[Trainer]:
    """Trainers of as many seeds, on images of noise: a step's time does not depend on them."""
    torch.manual_seed(0)
    pixels = (torch.rand(1000, 784) < 0.3).float()
    data = Dataset("noise", pixels, pixels[:10], (28, 28), True, (), "made here")
    preset = replace(get_preset("short"), precision=precision)
    configs = [Config("noise", "fixed", 1, f"iwae(k={k})", preset, seed) for seed in range(members)]
    return [Trainer(c, data, device, folder / f"{c.seed}.pt", engine="compiled") for c in configs]


def measure(k: int, members: int, precision: str, device: torch.device, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainers = runs(k, members, precision, device, Path(folder))
        stack = Stack(trainers)
        x = trainers[0].first_batch()
        first = trainers[0]
        alone, _ = make_step(Engine("compiled", ""), first.objective, first.model, first.optimiser, precision, x)

    def one_by_one() -> None:
        for _ in trainers:  # the first one's, as often: all cost the same
            alone(x)

    def together() -> None:
        for i, trainer in enumerate(trainers):
            with trainer.own_random_numbers():
                stack.x[i], stack.noise[i] = x, stack.draw()
        stack.gradients(range(members))
        for trainer in trainers:
            trainer.optimiser.step()

    ms = in_turns({"one_by_one": one_by_one, "together": together}, rounds)
    medians = {f"{name}_ms": round(statistics.median(times), 3) for name, times in ms.items()}
    ratio = medians["one_by_one_ms"] / medians["together_ms"]
    return {"k": k, "members": members, "precision": precision, **medians, "speedup": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 50])
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--precision", nargs="+", default=["highest", "bf16"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = pick_device(args.device)
    rows, source = [], provenance()
    for k in args.k:
        for precision in args.precision:
            torch._dynamo.reset()
            rows.append(measure(k, args.members, precision, device, args.rounds))
            print(
                f"k {k:3}  {precision:8}  {args.members} one by one {rows[-1]['one_by_one_ms']:8.2f} ms  "
                f"together {rows[-1]['together_ms']:8.2f} ms  speed-up {rows[-1]['speedup']:.2f}",
                flush=True,
            )
    if args.out:
        record = {"device": str(device), "rows": rows, "provenance": source}
        write_json(args.out, record)


if __name__ == "__main__":
    main()
