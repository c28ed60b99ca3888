"""Signal-to-noise ratio of the gradients of IWAE as the number of samples grows, on the toy of Rainforth et al. (2018).

    python benchmarks/snr.py                                          # a few minutes
    python benchmarks/snr.py --out benchmarks/results/snr.json        # with machine, versions, commit, date
    python benchmarks/snr.py --read benchmarks/results/snr.json --plot docs/assets/snr.png

The model is h ~ N(mu, I), x | h ~ N(h, I) in 20 dimensions, q(h | x) = N(A x + b, 2/3 I); theta is mu, phi is (A, b).
All start at their optimum plus noise of standard deviation 0.01, where "Tighter Variational Bounds are Not Necessarily
Better" (arXiv:1802.04537) proves that the ratio grows as k^(1/2) for theta and falls as k^(-1/2) for phi under the
reparameterisation gradient. DReG (arXiv:1810.04152) makes it rise for phi too.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from mcobjectives import IWAE
from mcobjectives.diagnostics import gradient_statistics
from mcobjectives_examples.files import write_json
from mcobjectives_examples.provenance import provenance

DIMENSIONS, POINTS, PERTURBATION = 20, 1024, 0.01
ESTIMATORS = {"reparam": 6, "stl": 1, "dreg": 1}  # times --draws: the ratio of reparam is the hardest to see
LEAST_K = 32  # from here on the expected gradients hardly change, and the slopes are those of the theory
GROUPS = ("theta", "phi")
CHUNK = 128  # samples at a time: the same gradient, faster in the caches


class Toy(nn.Module):
    """Rainforth's linear Gaussian model near its optimum for the data x, `(points, dimensions)`."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        mu = x.mean(0)
        optimum = {"mu": mu, "A": torch.eye(len(mu)) / 2, "b": mu / 2}
        for name, value in optimum.items():
            self.register_parameter(name, nn.Parameter(value + PERTURBATION * torch.randn_like(value)))

    def posterior(self, x: Tensor) -> Independent:
        mean = x @ self.A.T + self.b
        return Independent(Normal(mean, math.sqrt(2 / 3), validate_args=False), 1, validate_args=False)

    def log_joint(self, x: Tensor, h: Tensor) -> Tensor:
        squares = (h - self.mu).square().sum(-1) + (x - h).square().sum(-1)
        return -0.5 * squares - x.shape[-1] * math.log(2 * math.pi)

    @property
    def groups(self) -> dict[str, list[Tensor]]:
        return {"theta": [self.mu], "phi": [self.A, self.b]}


def measure(ks: list[int], draws: int, seed: int) -> dict[str, Any]:
    """The record of one run: a row for each k and estimator, and the slopes fitted to them."""
    source = provenance()
    torch.manual_seed(seed)
    mu = torch.randn(DIMENSIONS)
    x = mu + math.sqrt(2) * torch.randn(POINTS, DIMENSIONS)
    model = Toy(x)
    rows = []
    pairs = [(k, estimator) for k in ks for estimator in ESTIMATORS if k > 1 or estimator != "stl"]
    for k, estimator in track(pairs, "gradients", console=Console(stderr=True)):
        objective = IWAE(k=k, gradient=estimator, chunk_size=CHUNK if k > CHUNK else None)
        n = draws * ESTIMATORS[estimator]
        found = gradient_statistics(objective, model, x, draws=n, groups=model.groups)
        rows.append(
            {"k": k, "estimator": estimator, "draws": n}
            | {f"{group}_snr": found[group].group_snr for group in GROUPS}
            | {f"{group}_parameter_snr": float(found[group].snr.mean()) for group in GROUPS}
            | {f"{group}_variance": found[group].total_variance for group in GROUPS}
        )
    slopes = {
        estimator: {group: slope([row for row in rows if row["estimator"] == estimator], group) for group in GROUPS}
        for estimator in ESTIMATORS
    }
    config = {
        "dimensions": DIMENSIONS,
        "points": POINTS,
        "perturbation": PERTURBATION,
        "least_k": LEAST_K,
        "seed": seed,
    }
    return {"config": config, "slopes": slopes, "rows": rows, "provenance": source}


def slope(rows: list[dict[str, Any]], group: str) -> dict[str, float]:
    """Least-squares slope of log SNR in log k from LEAST_K on, with its standard error."""
    lost = [row["k"] for row in rows if row[f"{group}_snr"] == 0]
    if lost:
        raise SystemExit(f"the {group} gradient is lost in its noise at k = {lost}: use more --draws")
    points = [(math.log(row["k"]), math.log(row[f"{group}_snr"])) for row in rows if row["k"] >= LEAST_K]
    x, y = torch.tensor(points, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    value = (x * y).sum() / x.square().sum()
    error = ((y - value * x).square().sum() / max(len(x) - 2, 1) / x.square().sum()).sqrt()
    return {"slope": float(value), "stderr": float(error)}


def table(record: dict[str, Any]) -> Table:
    """The slopes, with each estimator's ratio at the least and the greatest k."""
    ks = [row["k"] for row in record["rows"]]
    shown = Table("estimator", "parameters", "slope", f"SNR at k = {min(ks)}", f"k = {max(ks)}", box=None)
    for estimator, groups in record["slopes"].items():
        for group, fit in groups.items():
            ratios = {row["k"]: row[f"{group}_snr"] for row in record["rows"] if row["estimator"] == estimator}
            ends = [f"{ratios[k]:.3g}" if k in ratios else "" for k in (min(ks), max(ks))]
            shown.add_row(estimator, group, f"{fit['slope']:+.2f} +- {fit['stderr']:.2f}", *ends)
    return shown


def plot(record: dict[str, Any], file: Path) -> None:
    """Two panels, theta and phi: SNR against k, the theoretical slopes dotted over the range of the fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    titles = {"theta": "generative parameters θ = μ", "phi": "inference parameters φ = (A, b)"}
    styles = {"reparam": ("C0", "o", 9), "stl": ("C2", "s", 6), "dreg": ("C1", "^", 4)}
    for axis, group in zip(axes, GROUPS, strict=True):
        for estimator, fits in record["slopes"].items():
            rows = [row for row in record["rows"] if row["estimator"] == estimator]
            colour, marker, size = styles[estimator]
            name = "stl (biased)" if (estimator, group) == ("stl", "phi") else estimator
            label = f"{name}: slope {fits[group]['slope']:+.2f}".replace("-", "\u2212")
            values = [row[f"{group}_snr"] for row in rows]
            axis.loglog([row["k"] for row in rows], values, color=colour, marker=marker, markersize=size, label=label)
        last = max(record["rows"], key=lambda row: (row["k"], row["estimator"] == "reparam"))
        ks, sign = [record["config"]["least_k"], last["k"]], "+" if group == "theta" else "-"
        guide = [last[f"{group}_snr"] * (k / last["k"]) ** float(f"{sign}0.5") for k in ks]
        axis.loglog(ks, guide, ":", color="black", label=f"$k^{{{sign}1/2}}$")
        axis.set(title=titles[group], xlabel="samples k", xticks=[4**i for i in range(10) if 4**i <= last["k"]])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, title=f"slopes fitted from k = {record['config']['least_k']} on", fontsize=9)
    axes[0].set_ylabel("gradient SNR")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[2**i for i in range(10)])
    parser.add_argument(
        "--draws", type=int, default=40, help="gradients for each k and estimator, times six for reparam"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--read", type=Path, help="show or plot this record; measure nothing")
    parser.add_argument("--out", type=Path, help="write the record here")
    parser.add_argument("--plot", type=Path, help="write the figure here")
    parser.add_argument("--json", action="store_true", help="print the record in place of the table")
    arguments = parser.parse_args()
    if sum(k >= LEAST_K for k in set(arguments.k)) < 2:
        parser.error(f"--k needs two numbers of at least {LEAST_K} to fit a slope to")
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", "gradient='stl' is biased")
    if arguments.read:
        record = json.loads(arguments.read.read_text())
    else:
        record = measure(arguments.k, arguments.draws, arguments.seed)
    if arguments.out:
        write_json(arguments.out, record)
    if arguments.plot:
        plot(record, arguments.plot)
    if arguments.json:
        json.dump(record, sys.stdout, indent=1)
    else:
        Console().print(table(record))


if __name__ == "__main__":
    main()
