"""A model with discrete latents in Pyro, trained by VIMCO: no enumeration, no reparameterisation.

    python examples/pyro_vimco.py

A sigmoid belief network: two layers of binary units, sampled in the guide from x upwards. Enumeration would take 2^36
terms. The objective is the importance-weighted bound of k samples, its gradient the score function with a
leave-one-out baseline; Pyro's RenyiELBO(alpha=0) gives the guide of such a model no gradient at all.
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mcobjectives import IWAE
from mcobjectives.pyro import ObjectiveELBO, PyroModel


class BeliefNetwork(nn.Module):
    """h2 -> h1 -> x, all of them binary."""

    def __init__(self, pixels: int = 64, lower: int = 24, upper: int = 12):
        super().__init__()
        self.top = nn.Parameter(torch.zeros(upper))
        self.h1_given_h2, self.x_given_h1 = nn.Linear(upper, lower), nn.Linear(lower, pixels)
        self.h1_given_x, self.h2_given_h1 = nn.Linear(pixels, lower), nn.Linear(lower, upper)

    def model(self, x: Tensor) -> None:
        pyro.module("network", self)
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=self.top).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=self.h1_given_h2(h2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.x_given_h1(h1)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("network", self)
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Bernoulli(logits=self.h1_given_x(x)).to_event(1))
            pyro.sample("h2", dist.Bernoulli(logits=self.h2_given_h1(h1)).to_event(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x = (torch.from_numpy(load_digits().data) > 7).float()
    train, test = x[:1500], x[1500:]
    network = BeliefNetwork()
    loss = ObjectiveELBO(IWAE(k=options.k, gradient="vimco"))
    svi = SVI(network.model, network.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    pair = PyroModel(network.model, network.guide)
    for epoch in range(1, options.epochs + 1):
        value = sum(svi.step(batch) for batch in train[torch.randperm(len(train))].split(100)) / len(train)
        if epoch % 5 == 0 or epoch == options.epochs:
            nll = -IWAE(k=500).bound(pair, test).mean()
            print(f"epoch {epoch:3d}  train loss {value:.2f}  test NLL (IWAE, k = 500) {nll:.2f}")


if __name__ == "__main__":
    main()
