"""NLL by large-k importance sampling over its bare forward matrix products, in float32: the bar is 1.5.

The one-layer model, on random images; the products of the decoder for all samples, of the sizes that `evaluate` takes,
into buffers made beforehand. The parts take turns; the ratio is that of the medians. `--out` records the rows.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from parts import DECODER, products
from timing import in_turns

from mcobjectives.evaluation import evaluate
from mcobjectives_examples.compiling import CompiledLikelihood
from mcobjectives_examples.files import write_json
from mcobjectives_examples.models import paper_model
from mcobjectives_examples.provenance import provenance

BAR = 1.5
ROWS = 2500  # samples times images at a time, as `evaluate` chooses on a CPU


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--k", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = provenance()
    torch.manual_seed(0)
    model = paper_model(1, torch.full((784,), 0.3))
    x = (torch.rand(args.images, 784) < 0.3).float()
    compiled = CompiledLikelihood(model)
    at_once = products(DECODER, ROWS, torch.float32, gradient=False)
    parts = {
        "products": lambda: [at_once() for _ in range(args.images * args.k // ROWS)],
        "eager": lambda: evaluate(model, x, k=args.k),
        "compiled": lambda: evaluate(compiled, x, k=args.k),
    }
    evaluate(compiled, x, k=100)
    medians = {name: statistics.median(ms) / 1e3 for name, ms in in_turns(parts, args.rounds, warm_up=0).items()}
    rows = [
        {"name": name, "seconds": round(s, 3), "over_products": round(s / medians["products"], 3)}
        for name, s in medians.items()
    ]
    for row in rows:
        print(f"{row['name']:9} {row['seconds']:7.2f} s  {row['over_products']:.2f} (bar {BAR})")
    if args.out:
        about = {"bar": BAR, "images": args.images, "k": args.k, "rounds": args.rounds}
        write_json(args.out, {**about, "rows": rows, "provenance": source})


if __name__ == "__main__":
    main()
