"""What `mcobj reproduce --jobs` saves: cells beside each other, and the same cells one after the other on all threads.

The one-layer model with the preset `short` and compiled steps; each cell is a process, as with `--jobs`. What is timed
is its training, without start, compilation and evaluation. `--out` records the rows with their provenance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from mcobjectives_examples.cells import Place
from mcobjectives_examples.config import Config
from mcobjectives_examples.files import write_json
from mcobjectives_examples.hooks import NO_HOOKS
from mcobjectives_examples.presets import configured
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.side_by_side import run_side_by_side

PASSES = {1: 15, 5: 6, 50: 2}


def seconds(k: int, cells: int, jobs: int, dataset: str) -> list[float]:
    """Training seconds a pass of each of as many seeds of IWAE-k, `jobs` at a time."""
    preset, _ = configured("short", [f"passes={PASSES[k]}", "nll_k=1", "test_images=2"])
    protocol = preset.binarisation_of(dataset)
    configs = [Config(dataset, protocol, 1, f"iwae(k={k})", preset, seed) for seed in range(cells)]
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), torch.device("cpu"), engine="compiled")
        run_side_by_side(
            configs,
            place,
            jobs,
            NO_HOOKS,
            progress_of=lambda config: NO_HOOKS.on_progress,
            on_done=lambda config: None,
        )
        records = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return [record["seconds"]["train"] / PASSES[k] for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dataset", default="binarized_mnist")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows, source = [], provenance()
    for k in args.k:
        in_turn, beside = (seconds(k, args.jobs, jobs, args.dataset) for jobs in (1, args.jobs))
        row = {"k": k, "jobs": args.jobs, "in_turn_seconds": sum(in_turn), "beside_seconds": max(beside)}
        rows.append(row | {"speedup": row["in_turn_seconds"] / row["beside_seconds"]})
        print(
            f"k {k:3}  a pass of {args.jobs} cells in turn {row['in_turn_seconds']:6.2f} s  "
            f"side by side {row['beside_seconds']:6.2f} s  speed-up {rows[-1]['speedup']:.2f}",
            flush=True,
        )
    if args.out:
        record = {"dataset": args.dataset, "rows": rows, "provenance": source}
        write_json(args.out, record)


if __name__ == "__main__":
    main()
