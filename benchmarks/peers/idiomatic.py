"""IWAE training by hand in idiomatic PyTorch: BCE with logits, logsumexp, fused Adam; `--mode compiled` compiles it."""

import math

import numpy as np
import torch
from _protocol import Settings, serve
from _torch_model import adam, log_normal, log_standard_normal, networks
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


def build(settings: Settings) -> tuple:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    encoder, decoder, output = networks(settings)
    optimizer = adam(nn.ModuleList([encoder, decoder, output]).parameters())
    k = settings.k

    def loss_of(x: Tensor) -> Tensor:
        h, log_w, states = x, 0.0, []
        for layer in encoder:
            mean, log_std = layer(h)
            h = mean + log_std.exp() * torch.randn(k, *mean.shape[-2:])
            log_w = log_w - log_normal(h, mean, log_std)
            states.append(h)
        log_w = log_w + log_standard_normal(states.pop())
        for layer in decoder:
            below = states.pop()
            log_w = log_w + log_normal(below, *layer(h))
            h = below
        logits = output(h)
        bce = binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        log_w = log_w - bce.sum(-1)
        return -(torch.logsumexp(log_w, 0) - math.log(k)).mean()

    if settings.mode == "compiled":
        loss_of = torch.compile(loss_of)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    def set_rate(rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate

    def parameters() -> list[np.ndarray]:
        return [p.detach().T.numpy() for p in optimizer.param_groups[0]["params"]]

    return torch.from_numpy, step, set_rate, parameters


if __name__ == "__main__":
    serve("idiomatic", build, ["torch"], modes=["default", "compiled"])
