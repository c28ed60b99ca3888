"""Step time of SVI on the 1L model: ObjectiveELBO beside Pyro's RenyiELBO, interleaved in one process, medians.

    python benchmarks/pyro_step.py --steps 200 --out benchmarks/results/pyro_step.json

Both train the same networks (784-200-200-50 and back, tanh) by the same fused Adam on the same binary images, with the
particles vectorised and Pyro's validation off. The losses of a first step with the same random numbers are compared.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from timing import in_turns
from torch import Tensor, nn

from mcobjectives import IWAE
from mcobjectives.pyro import ObjectiveELBO
from mcobjectives_examples.files import write_json
from mcobjectives_examples.provenance import provenance

PIXELS, HIDDEN, LATENT = 784, 200, 50


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.mean, self.log_std = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.hidden(x)
        return self.mean(y), self.log_std(y).exp()


def programs(name: str) -> tuple[Callable, Callable]:
    """Model and guide with networks of their own, under their own names in the parameter store."""
    torch.manual_seed(0)
    encoder = Gaussian()
    decoder = nn.Sequential(
        nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS)
    )

    def model(x: Tensor) -> None:
        pyro.module(f"{name} decoder", decoder)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(x.new_zeros(()), x.new_ones(())).expand([LATENT]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(h)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name} encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(*encoder(x)).to_event(1))

    return model, guide


def contestants(k: int) -> dict[str, SVI]:
    """Name -> what trains it."""
    losses = {
        "ObjectiveELBO(IWAE)": ObjectiveELBO(IWAE(k=k), max_plate_nesting=1),
        "ObjectiveELBO(IWAE dreg)": ObjectiveELBO(IWAE(k=k, gradient="dreg"), max_plate_nesting=1),
        "RenyiELBO(alpha=0)": RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1),
    }
    if k == 1:
        losses["Trace_ELBO"] = Trace_ELBO()
    return {
        name: SVI(*programs(name), pyro.optim.Adam({"lr": 1e-3, "eps": 1e-4, "fused": True}), loss)
        for name, loss in losses.items()
    }


def measure(k: int, batch: int, steps: int) -> dict:
    """Medians and quartiles in milliseconds, and the ratio of each to RenyiELBO in the same round."""
    pyro.clear_param_store()
    x = (torch.rand(batch, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    running = contestants(k)
    first = {}
    for name, svi in running.items():
        svi.evaluate_loss(x)  # lazy initialisation
        torch.manual_seed(1)
        first[name] = svi.evaluate_loss(x) / batch
    times = in_turns({name: partial(svi.step, x) for name, svi in running.items()}, steps)
    base = times["RenyiELBO(alpha=0)"]
    return {
        name: {
            "median_ms": round(statistics.median(ms), 3),
            "quartiles_ms": [round(q, 3) for q in statistics.quantiles(ms, n=4)[::2]],
            "ratio_to_renyi": round(statistics.median(a / b for a, b in zip(ms, base, strict=True)), 3),
            "first_loss": first[name],
        }
        for name, ms in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 50])
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    results, source = {}, provenance()
    source["versions"]["pyro-ppl"] = version("pyro-ppl")
    for k in options.k:
        results[k] = measure(k, options.batch, options.steps)
        for name, row in results[k].items():
            ms, ratio, loss = row["median_ms"], row["ratio_to_renyi"], row["first_loss"]
            print(f"k = {k:3d}  {name:26s} {ms:8.2f} ms  {ratio:5.2f} of RenyiELBO's  first loss {loss:.3f}")
    if options.out:
        record = {"what": "ms a training step, 1L model, SVI", "batch": options.batch, "steps": options.steps}
        write_json(options.out, {**record, "k": results, "provenance": source})


if __name__ == "__main__":
    main()
