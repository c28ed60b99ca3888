"""The VAE of Pyro's tutorial, trained by IWAE with DReG in place of Trace_ELBO: one line changes.

    python examples/pyro_vae.py                            # 8 x 8 digits, half a minute
    python examples/pyro_vae.py --objective vae --k 1      # Trace_ELBO's objective

The model and the guide are ordinary Pyro programs. The held-out negative log-likelihood is estimated by IWAE with
many samples, through the same pair as a Model of this library.
"""

import argparse
import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mcobjectives import IWAE, get_objective
from mcobjectives.pyro import ObjectiveELBO, PyroModel


class VAE(nn.Module):
    """p(z) = N(0, I), p(x | z) = Bernoulli; both networks have one hidden layer."""

    def __init__(self, pixels: int = 64, latent: int = 8, hidden: int = 100):
        super().__init__()
        self.latent = latent
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Softplus(), nn.Linear(hidden, pixels))
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Softplus(), nn.Linear(hidden, 2 * latent))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="iwae", help="its name, as `mcobj objectives` lists them")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--gradient", default="dreg")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x = (torch.from_numpy(load_digits().data) > 7).float()
    train, test = x[:1500], x[1500:]
    vae = VAE()
    try:
        objective = get_objective(options.objective)(k=options.k, gradient=options.gradient)
    except (TypeError, ValueError) as error:  # MIWAE has k1 and k2, the median no DReG
        sys.exit(f"pyro_vae.py: {options.objective} with k and gradient={options.gradient!r}: {error}")
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-3}), loss=ObjectiveELBO(objective))
    pair = PyroModel(vae.model, vae.guide)
    for epoch in range(1, options.epochs + 1):
        loss = sum(svi.step(batch) for batch in train[torch.randperm(len(train))].split(100)) / len(train)
        if epoch % 5 == 0 or epoch == options.epochs:
            nll = -IWAE(k=500).bound(pair, test).mean()
            print(f"epoch {epoch:3d}  {objective}  train loss {loss:.2f}  test NLL (IWAE, k = 500) {nll:.2f}")


if __name__ == "__main__":
    main()
