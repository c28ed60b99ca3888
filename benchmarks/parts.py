"""Where the time of a training step goes: each part alone, beside the whole step and the fastest peers', in one run.

    python benchmarks/parts.py --out benchmarks/results/parts.json

The one-layer model, batch 100, IWAE. Two ways: all k samples back-propagated with float32 products (`compiled` of
`speed.py`), and 5 of 50 with bfloat16 products where no gradient is taken (`resampled-mixed`). The parts take turns,
some calls of each a round. The matrix products go into buffers made beforehand: a step made of nothing else would be as
many times faster than a peer as the record's `limit` says, so that no bar above it can be met with these products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed import PEERS_PYTHON, Contestant, Worker, choose, installed, interpreters
from torch import Tensor

from mcobjectives import IWAE
from mcobjectives.likelihoods import bernoulli_log_likelihood
from mcobjectives_examples.engine import Engine, adam_step, flat_adam, make_step
from mcobjectives_examples.files import write_json
from mcobjectives_examples.models import Tanh, paper_model
from mcobjectives_examples.provenance import provenance

BATCH, PIXELS, LATENT = 100, 784, 50
ENCODER = ((PIXELS, 200), (200, 200), (200, LATENT), (200, LATENT))
DECODER = ((LATENT, 200), (200, 200), (200, PIXELS))
Way = tuple[int, int | None, str]  # k, of which back-propagated, precision
WAYS: tuple[Way, ...] = ((1, None, "highest"), (5, None, "highest"), (50, None, "highest"), (50, 5, "mixed"))

Part = Callable[[], object]


def products(layers: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, gradient: bool) -> Part:
    """The products of some linear layers, with those of their backward pass."""
    todo = []
    for inputs, outputs in layers:
        x, w, y = (torch.randn(*size).to(dtype) for size in ((rows, inputs), (inputs, outputs), (rows, outputs)))
        todo.append((x, w, torch.empty_like(y)))
        if gradient:
            todo.append((x.T, y, torch.empty_like(w)))
            if inputs != PIXELS:  # nobody asks for the gradient of x
                todo.append((y, w.T, torch.empty_like(x)))
    return lambda: [torch.mm(a, b, out=out) for a, b, out in todo]


def likelihood(rows: int, dtype: torch.dtype, gradient: bool) -> Part:
    logits, bias = torch.randn(rows // BATCH, BATCH, PIXELS).to(dtype), torch.randn(PIXELS)
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()

    @torch.compile(dynamic=False)
    def compiled(logits: Tensor, bias: Tensor, x: Tensor) -> Any:
        whole = logits.float() + bias
        log_p = bernoulli_log_likelihood(whole, x)
        return (log_p, x - torch.sigmoid(whole)) if gradient else log_p

    return lambda: compiled(logits, bias, x)


def tanh(rows: int, dtype: torch.dtype, gradient: bool) -> Part:
    layer = Tanh()
    before, slope = torch.randn(2, rows, 200).to(dtype), torch.randn(2, rows, 200)

    @torch.compile(dynamic=False)
    def compiled(before: Tensor, slope: Tensor) -> Any:
        after = layer(before.float())
        return (after, slope * (1 - after * after)) if gradient else after.to(before.dtype)

    return lambda: compiled(before, slope)


def adam() -> Part:
    optimiser = flat_adam(paper_model(1, torch.full((PIXELS,), 0.5)), (0.9, 0.999), 1e-4)
    [vector] = optimiser.param_groups[0]["params"]
    gradient = torch.randn_like(vector)
    return lambda: adam_step(optimiser, vector, gradient)


def whole(k: int, m: int | None, precision: str) -> Part:
    torch.manual_seed(0)
    model = paper_model(1, torch.full((PIXELS,), 0.5))
    optimiser = flat_adam(model, (0.9, 0.999), 1e-4)
    x = (torch.rand(BATCH, PIXELS) < 0.3).float()
    step, used = make_step(Engine("compiled", ""), IWAE(k=k, backward_samples=m), model, optimiser, precision, x)
    if used.name != "compiled":
        raise SystemExit(used.why)
    return lambda: step(x).item()


def parts_of(k: int, m: int | None, precision: str) -> dict[str, Part]:
    """The parts of one way, by name; those of products first."""
    cheap = torch.bfloat16 if precision == "mixed" else torch.float32
    single = torch.float32

    def both(part: Callable[[int, torch.dtype, bool], Part]) -> Part:
        """Of all samples without a gradient, if some are chosen, and of those back-propagated with one."""
        chosen = part(BATCH * (m or k), single, True)
        if m is None:
            return chosen
        everything = part(BATCH * k, cheap, False)
        return lambda: (everything(), chosen())

    parts: dict[str, Part] = {}
    if m is not None:
        parts["products without a gradient"] = products(DECODER, BATCH * k, cheap, False)
    decoder, encoder = products(DECODER, BATCH * (m or k), single, True), products(ENCODER, BATCH, single, True)
    return parts | {
        "products with a gradient": lambda: (encoder(), decoder()),
        "likelihood": both(likelihood),
        "tanh": both(tanh),
        "noise": lambda: torch.randn(k, BATCH, LATENT),
        "Adam": adam(),
    }


def peers(wanted: list[Contestant], k: int, python: str, threads: int) -> list[Worker]:
    """Processes of the peers that are installed, ready to take steps."""
    pythons = interpreters(python, wanted)
    workers = [Worker(c, pythons[c.module], 1, k, BATCH, threads) for c in installed(wanted, pythons)]
    for worker in workers:
        worker.start()
    return workers


def measure(way: Way, wanted: list[Contestant], args: argparse.Namespace) -> dict[str, Any]:
    k, m, precision = way
    todo = {"whole step": whole(*way)} | parts_of(*way)
    workers = peers(wanted, k, args.peers_python, torch.get_num_threads())
    ms: dict[str, list[float]] = {name: [] for name in todo}
    calls = max(3, min(30, 300 // k))
    try:
        for part in todo.values():
            part()
        for _ in range(args.rounds):
            for name, part in todo.items():
                part()  # takes back the caches
                for _ in range(calls):
                    began = time.perf_counter()
                    part()
                    ms[name].append(1e3 * (time.perf_counter() - began))
            for worker in workers:
                worker.turn(calls)
    finally:
        for worker in workers:
            worker.close()
    medians = {name: round(statistics.median(times), 3) for name, times in ms.items()}
    theirs = {w.contestant.name: round(statistics.median(t for turn in w.rounds for t in turn), 3) for w in workers}
    least = sum(value for name, value in medians.items() if name.startswith("products"))
    limit = min(theirs.values()) / least if theirs else None
    step = medians.pop("whole step")
    return {
        "k": k,
        "backward_samples": m,
        "precision": precision,
        "step_ms": step,
        "parts_ms": medians,
        "peers_ms": theirs,
        "faster": round(min(theirs.values()) / step, 2) if theirs else None,
        "limit": round(limit, 2) if limit else None,
    }


def table(row: dict[str, Any]) -> Table:
    m = row["backward_samples"]
    out = Table(title=f"1L, k = {row['k']}, {'all' if m is None else m} back-propagated, {row['precision']}")
    out.add_column("")
    out.add_column("ms", justify="right")
    out.add_column("of the step", justify="right")
    for name, value in {"whole step": row["step_ms"], **row["parts_ms"], **row["peers_ms"]}.items():
        out.add_row(name, f"{value:.2f}", f"{value / row['step_ms']:.0%}")
    if row["limit"]:
        out.caption = f"{row['faster']}x faster than the fastest peer; the products alone would be {row['limit']}x"
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", default="idiomatic-compiled,numpyro,tensorflow-xla")
    parser.add_argument("--peers-python", default=str(PEERS_PYTHON))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = choose("peer", args.peers)
    rows, source = [], provenance()
    for way in WAYS:
        with torch.no_grad():
            rows.append(measure(way, wanted, args))
        Console().print(table(rows[-1]))
        if args.out:
            record = {"rounds": args.rounds, "rows": rows, "provenance": source}
            write_json(args.out, record)


if __name__ == "__main__":
    main()
