"""Pyro: SVI with RenyiELBO(alpha=0), particles vectorised, validation off."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from _protocol import ADAM_EPS, LEARNING_RATE, Settings, serve
from _torch_model import networks
from torch import Tensor


def build(settings: Settings) -> tuple[Callable, Callable]:
    torch.set_num_threads(settings.threads)
    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    encoder, decoder, output = networks(settings)
    top = len(encoder)

    def gaussian(net, inputs: Tensor) -> dist.TorchDistribution:
        mean, log_std = net(inputs)
        return dist.Normal(mean, log_std.exp()).to_event(1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        pyro.module("output", output)
        with pyro.plate("batch", len(x)):
            prior = dist.Normal(x.new_zeros(()), x.new_ones(())).expand([50]).to_event(1)
            h = pyro.sample(f"h{top}", prior)
            for i, net in zip(range(top - 1, 0, -1), decoder, strict=True):
                h = pyro.sample(f"h{i}", gaussian(net, h))
            pyro.sample("x", dist.Bernoulli(logits=output(h)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        h = x
        with pyro.plate("batch", len(x)):
            for i, net in enumerate(encoder, 1):
                h = pyro.sample(f"h{i}", gaussian(net, h))

    elbo = pyro.infer.RenyiELBO(alpha=0, num_particles=settings.k, vectorize_particles=True, max_plate_nesting=1)
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE, "eps": ADAM_EPS, "fused": True})
    svi = pyro.infer.SVI(model, guide, optimizer, elbo)
    return torch.from_numpy, lambda x: svi.step(x) / len(x)


if __name__ == "__main__":
    serve("pyro", build, ["torch", "pyro-ppl"])
