"""What the resampled backward pass adds in variance: the threshold rule beside multinomial and plain systematic choice.

For normalised weights w of k = 50 samples (effective sample size about 3.4) and gradients f of unit variance, the
variance of sum_j multiplier_j w_j f_j over the choice of m samples, averaged over draws of w and f. The threshold rule
and systematic choice are integrated over their one uniform offset, multinomial choice has a closed form.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from mcobjectives.resampling import select
from mcobjectives_examples.files import write_json
from mcobjectives_examples.provenance import provenance

K, OFFSETS, DRAWS, SPREAD = 50, 4000, 50, 3.1


def threshold(w: Tensor, f: Tensor, m: int, offsets: Tensor) -> Tensor:
    index, multiplier = select(w.unsqueeze(1).expand(K, len(offsets)), m, offsets)
    return (multiplier * (w * f)[index]).sum(0)


def systematic(w: Tensor, f: Tensor, m: int, offsets: Tensor) -> Tensor:
    points = (offsets.unsqueeze(1) + torch.arange(m)) / m
    return f[torch.searchsorted(w.cumsum(0), points).clamp(max=K - 1)].mean(1)


def rows() -> list[dict[str, float]]:
    """One row for each m: the mean added variances, and the mean effective sample size of the weights."""
    generator = torch.Generator().manual_seed(0)
    log_w = SPREAD * torch.randn(DRAWS, K, dtype=torch.float64, generator=generator)
    f = torch.randn(DRAWS, K, dtype=torch.float64, generator=generator)
    offsets = (torch.arange(OFFSETS, dtype=torch.float64) + 0.5) / OFFSETS
    weights = log_w.softmax(1)
    found = []
    for m in (1, 2, 5, 10, 20):
        variances = {
            "multinomial": torch.stack(
                [((w * g**2).sum() - (w * g).sum() ** 2) / m for w, g in zip(weights, f, strict=True)]
            ),
            "systematic": torch.stack([systematic(w, g, m, offsets).var() for w, g in zip(weights, f, strict=True)]),
            "threshold": torch.stack([threshold(w, g, m, offsets).var() for w, g in zip(weights, f, strict=True)]),
        }
        found.append({"m": m} | {name: float(v.mean()) for name, v in variances.items()})
        found[-1]["effective_sample_size"] = float((1 / (weights**2).sum(1)).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source, found = provenance(), rows()
    print(f"added variance, k = {K}, effective sample size {found[0]['effective_sample_size']:.1f}")
    print(f"{'m':>3} {'multinomial':>12} {'systematic':>12} {'threshold':>12}")
    for row in found:
        print(f"{row['m']:3} {row['multinomial']:12.4f} {row['systematic']:12.4f} {row['threshold']:12.4f}")
    if args.out:
        write_json(args.out, {"k": K, "rows": found, "provenance": source})


if __name__ == "__main__":
    main()
