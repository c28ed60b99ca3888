"""The networks of the model in plain PyTorch, shared by the peers that run on it."""

import math

import torch
from _protocol import ADAM_EPS, LEARNING_RATE, Net, Settings
from torch import Tensor, nn


def affine(weight, bias) -> nn.Linear:
    layer = nn.Linear(*weight.shape)
    layer.weight.data = torch.from_numpy(weight).T.contiguous()
    layer.bias.data = torch.from_numpy(bias)
    return layer


class Bernoulli(nn.Module):
    """h -> logits of x."""

    def __init__(self, net: Net):
        super().__init__()
        first, second, logits = (affine(*p) for p in net)
        self.net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), logits)

    def forward(self, h: Tensor) -> Tensor:
        return self.net(h)


class Gaussian(nn.Module):
    """Input -> mean and log standard deviation."""

    def __init__(self, net: Net):
        super().__init__()
        first, second, mean, log_std = (affine(*p) for p in net)
        self.hidden = nn.Sequential(first, nn.Tanh(), second, nn.Tanh())
        self.mean, self.log_std = mean, log_std

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        y = self.hidden(inputs)
        return self.mean(y), self.log_std(y)


def networks(settings: Settings) -> tuple[nn.ModuleList, nn.ModuleList, Bernoulli]:
    """Encoder layers upwards from x, Gaussian decoder layers downwards, and the layer onto x."""
    encoder, decoder = settings.initial()
    return (
        nn.ModuleList(Gaussian(n) for n in encoder),
        nn.ModuleList(Gaussian(n) for n in decoder[:-1]),
        Bernoulli(decoder[-1]),
    )


def log_normal(h: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(..., d) -> (...)."""
    z = (h - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std).sum(-1) - 0.5 * math.log(2 * math.pi) * h.shape[-1]


def log_standard_normal(h: Tensor) -> Tensor:
    return -0.5 * h.square().sum(-1) - 0.5 * math.log(2 * math.pi) * h.shape[-1]


def adam(parameters) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=ADAM_EPS, fused=True)
