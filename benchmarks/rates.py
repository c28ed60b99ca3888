"""Whether the high learning rate of preset short costs a two-layer VAE its upper units: the same passes at lower peaks.

    python benchmarks/rates.py --work DIR --out benchmarks/results/rates.json

Each peak rate is a run of `VAE(k)` on the two-layer model, otherwise by `short`, in a folder of its own under --work,
where it goes on after an interruption. The record is written after every run.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mcobjectives_examples.cells import Place, run_cell
from mcobjectives_examples.config import Config, canonical
from mcobjectives_examples.datasets import load
from mcobjectives_examples.files import write_json
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.provenance import provenance

METRICS = ("nll", "kl_posterior", "active_units", "reconstruction_error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="binarized_mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 1e-3, 5e-4, 2.5e-4])
    parser.add_argument("--passes", type=int, default=140)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dataset, source = load(args.dataset, args.data_dir), provenance()
    rows: list[dict[str, Any]] = []
    for rate in args.rates:
        preset = replace(get_preset("short"), stages=((args.passes, rate),), test_images=args.test_images)
        config = Config(dataset.name, preset.binarisation_of(dataset.name), 2, canonical(f"vae(k={args.k})"), preset)
        place = Place(args.work / f"{rate:g}", torch.device("cpu"))
        place.out.mkdir(parents=True, exist_ok=True)
        metrics = run_cell(config, dataset, place)["metrics"]
        rows.append({"rate": rate, **{name: metrics[name] for name in METRICS}})
        print(rows[-1], flush=True)
        if args.out:
            about = {name: getattr(args, name) for name in ("dataset", "passes", "k", "test_images")}
            data = {"source": dataset.source, "sha256": dataset.checksum}
            write_json(args.out, {**about, "data": data, "rows": rows, "provenance": source})


if __name__ == "__main__":
    main()
