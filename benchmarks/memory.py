"""Peak memory of training steps at k = 5000 in chunks over those at k = 50: the bar is 1.3 (1L, batch 100).

Each (estimator, k, chunk) runs in a process of its own. Compared are its peak resident set size, imports included, and
how much of it came with the steps: what is above its size before the first one, with what the C library keeps of freed
memory. On CUDA also the allocator's peak. `--out` records the rows with their provenance.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from peers._protocol import peak_mb

from mcobjectives_examples.files import write_json

BAR = 1.3
CASES = [("reparam", 50, None), ("reparam", 5000, 50), ("dreg", 50, None), ("dreg", 5000, 50), ("vimco", 5000, 50)]


def step(gradient: str, k: int, chunk_size: int | None, device: str) -> dict[str, float]:
    """Two training steps in this process, and its peak memory in MB."""
    import torch

    from mcobjectives import IWAE
    from mcobjectives_examples.models import paper_model

    torch.manual_seed(0)
    model = paper_model(1, torch.full((784,), 0.3)).to(device)
    x = (torch.rand(100, 784, device=device) < 0.3).float()
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    objective = IWAE(k=k, gradient=gradient, chunk_size=chunk_size)
    base = peak_mb()
    for _ in range(2):
        objective(model, x).backward()
        optimiser.step()
        optimiser.zero_grad()
    peak = {"peak_rss_mb": peak_mb(), "of_steps_mb": peak_mb() - base}
    if device == "cuda":
        peak["peak_cuda_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", help="internal: one case as JSON")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(step(*json.loads(args.case), args.device)))
        return
    from mcobjectives_examples.provenance import provenance

    rows, source = [], provenance()
    for case in CASES:
        command = [sys.executable, __file__, "--device", args.device, "--case", json.dumps(case)]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append({"gradient": case[0], "k": case[1], "chunk_size": case[2], **peak})
    few = {row["gradient"]: row for row in rows if row["k"] == 50}
    for row in rows:
        base = few.get(row["gradient"], few["reparam"])
        row["over_k50"] = row["peak_rss_mb"] / base["peak_rss_mb"]
        row["steps_over_k50"] = row["of_steps_mb"] / base["of_steps_mb"]
        print(
            f"{row['gradient']:8} k {row['k']:5}  process {row['peak_rss_mb']:5.0f} MB, {row['over_k50']:.2f}  "
            f"steps {row['of_steps_mb']:5.0f} MB, {row['steps_over_k50']:.2f}"
        )
    if args.out:
        write_json(args.out, {"bar": BAR, "rows": rows, "provenance": source})


if __name__ == "__main__":
    main()
