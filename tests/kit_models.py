"""Models that the kit's tests break or build on."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributions import (
    Bernoulli,
    Independent,
    LogNormal,
    Normal,
    Uniform,
)


class Gaussian(nn.Module):
    """A sound model; what follows breaks it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)

    def moments(self, x):
        mean, log_sd = self.encoder(x).chunk(2, -1)
        return mean, (0.3 * log_sd).exp()

    def posterior(self, x):
        return Independent(Normal(*self.moments(x)), 1)

    def log_likelihood(self, x, h):
        return Normal(self.decoder(h), 1.0).log_prob(x).sum(-1)

    def log_prior(self, h):
        return Normal(0.0, 1.0).log_prob(h).sum(-1)


class Own:
    """A posterior from two functions."""

    def __init__(self, rsample, log_prob):
        self.rsample, self.log_prob = rsample, log_prob
        self.sample = rsample


class DetachedInP(Gaussian):
    """p's own gradient is cut from the samples."""

    def log_likelihood(self, x, h):
        return super().log_likelihood(x, h.detach())


class TwoLayers(Gaussian):
    """q(h1 | x) q(h2 | h1), with x as a dict."""

    def __init__(self):
        super().__init__()
        self.upper, self.lower = nn.Linear(2, 1), nn.Linear(1, 2)

    def posterior(self, x):
        first = super().posterior(x["image"])

        def second(h1):
            return Independent(Normal(self.upper(h1), 0.5), 1)

        def rsample(shape):
            h1 = first.rsample(shape)
            return h1, second(h1).rsample()

        return Own(rsample, lambda h: first.log_prob(h[0]) + second(h[0]).log_prob(h[1]))

    def log_joint(self, x, h):
        above = Independent(Normal(self.lower(h[1]), 1.0), 1).log_prob(h[0])
        return super().log_likelihood(x["image"], h[0]) + above + Normal(0.0, 1.0).log_prob(h[1]).sum(-1)

    log_likelihood = log_prior = None


class Attaching(TwoLayers):
    """The same with samples that can be attached again."""

    def posterior(self, x):
        posterior, (mean, sd) = super().posterior(x), self.moments(x["image"])

        def attach(h):
            h1 = mean + sd * ((h[0] - mean) / sd).detach()
            return h1, self.attached(h1, *h)

        posterior.attach = attach
        return posterior

    def attached(self, attached_h1, h1, h2):
        mean = self.upper(attached_h1)
        return mean + (h2 - mean).detach()


class Discrete(Gaussian):
    """Bernoulli latents: no rsample."""

    def posterior(self, x):
        return Independent(Bernoulli(logits=self.encoder(x)[..., :2]), 1)

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 2)

    def log_prior(self, h):
        return Bernoulli(0.5).log_prob(h).sum(-1)


class Wide(Gaussian):
    """Fifty correlated latents through a flow of one linear layer."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 100), nn.Linear(50, 3)


class Positive(Gaussian):
    """Log-normal latents, far from Gaussian and bounded below."""

    def posterior(self, x):
        return Independent(LogNormal(*self.moments(x)), 1)

    def log_prior(self, h):
        return LogNormal(0.0, 1.0).log_prob(h).sum(-1)


class Bounded(Gaussian):
    """Uniform latents: grad log q of their width has no mean of zero, so q is fixed."""

    def posterior(self, x):
        return Independent(Uniform(torch.zeros(len(x), 2), torch.ones(len(x), 2)), 1)

    def __init__(self):
        super().__init__()
        del self.encoder

    def log_prior(self, h):
        return 0 * h.sum(-1)


class Masked(Gaussian):
    """Sequences of other lengths, padded; q(h | x) goes from step to step, both densities leave padded steps out."""

    steps, data = 4, 2

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.GRU(self.data, 4, batch_first=True), nn.Linear(2, self.data)
        self.moments_of, self.transition = nn.Linear(4 + 2, 4), nn.Linear(2, 2)

    def batch(self):
        generator = torch.Generator().manual_seed(1)
        lengths = torch.tensor([self.steps, 2, 3, 1])
        return {"x": torch.randn(4, self.steps, self.data, generator=generator), "lengths": lengths}

    def summed(self, log_density, x):
        return (log_density.sum(-1) * (torch.arange(self.steps) < x["lengths"][:, None])).sum(-1)

    def posterior(self, x):
        seen, _ = self.encoder(x["x"])

        def step(seen, before):
            mean, log_sd = (
                self.moments_of(torch.cat([seen.expand(*before.shape[:-1], 4), before], -1)).tanh().chunk(2, -1)
            )
            return Normal(mean, log_sd.exp())

        def rsample(shape):
            h = [torch.zeros(*shape, len(seen), 2)]
            for t in range(self.steps):
                h.append(step(seen[:, t], h[-1]).rsample())
            return torch.stack(h[1:], -2)

        return Own(rsample, lambda h: self.log_q(step(seen, before(h)).log_prob(h), x))

    def log_q(self, log_density, x):
        return self.summed(log_density, x)

    def log_joint(self, x, h):
        prior = Normal(self.transition(before(h)), 1.0).log_prob(h)
        return self.summed(torch.cat([prior, Normal(self.decoder(h), 1.0).log_prob(x["x"])], -1), x)

    log_likelihood = log_prior = None


def before(h):
    """Each step's predecessor."""
    return torch.cat([torch.zeros_like(h[..., :1, :]), h[..., :-1, :]], -2)
