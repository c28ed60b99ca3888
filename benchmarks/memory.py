"""Peak memory of a training step at k = 5000 in chunks over one at k = 50: the bar is 1.3 (1L, batch 100).

Each (estimator, k, chunk) runs in a process of its own, whose peak resident set size is what is compared; on CUDA also
the allocator's peak. `--out` records the rows with their provenance.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

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
    for _ in range(2):
        objective(model, x).backward()
        optimiser.step()
        optimiser.zero_grad()
    peak = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
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
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--device", args.device, "--case", json.dumps(case)]
        peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rows.append({"gradient": case[0], "k": case[1], "chunk_size": case[2], **peak})
    base = {row["gradient"]: row["peak_rss_mb"] for row in rows if row["k"] == 50}
    for row in rows:
        row["over_k50"] = row["peak_rss_mb"] / base.get(row["gradient"], base["reparam"])
        print(f"{row['gradient']:8} k {row['k']:5} {row['peak_rss_mb']:7.0f} MB  {row['over_k50']:.2f} (bar {BAR})")
    if args.out:
        from mcobjectives_examples.provenance import provenance

        args.out.write_text(json.dumps({"bar": BAR, "rows": rows, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
