"""The paper's models: chains of Gaussian layers with Bernoulli pixels, of any depth and any input width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from mcobjectives.likelihoods import bernoulli_log_likelihood
from mcobjectives_examples.paper import paper
from mcobjectives_examples.precision import in_bfloat16

_LEAST_STD = 1e-6
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(h: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(h; mean, diag std^2), summed over the last dimension."""
    z = (h - mean) / std
    return (-0.5 * z * z - std.log()).sum(-1) - _HALF_LOG_TWO_PI * h.shape[-1]


class Affine(nn.Linear):
    """A linear layer that adds its bias after the product, in float32. torch's first copies it over the whole result.

    When compiled, the sum is fused into the next operation.
    """

    def forward(self, given: Tensor) -> Tensor:
        if in_bfloat16():
            return nn.functional.linear(given.bfloat16(), self.weight.bfloat16()).float() + self.bias
        if torch.compiler.is_compiling():
            return nn.functional.linear(given, self.weight) + self.bias
        return super().forward(given)


class Tanh(nn.Module):
    """tanh. When compiled it uses the logistic function, which is exact to 1e-7 and three times faster."""

    def forward(self, given: Tensor) -> Tensor:
        return 2 * torch.sigmoid(2 * given) - 1 if torch.compiler.is_compiling() else torch.tanh(given)


def tanh_layers(inputs: int, hidden: int) -> list[nn.Module]:
    return [Affine(inputs, hidden), Tanh(), Affine(hidden, hidden), Tanh()]


class GaussianLayer(nn.Module):
    """Two tanh layers, then the mean and the standard deviation of a diagonal Gaussian."""

    def __init__(self, inputs: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*tanh_layers(inputs, hidden))
        self.mean = Affine(hidden, latent)
        self.log_std = Affine(hidden, latent)

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(given)
        return self.mean(features), self.log_std(features).exp() + _LEAST_STD


class GaussianChain:
    """q(h1 | x) q(h2 | h1) ...: h is a tuple of layers, each `(k, batch, d)`."""

    def __init__(self, first: tuple[Tensor, Tensor], layers: Sequence[nn.Module]) -> None:
        self.first, self.layers = first, layers

    @property
    def mean(self) -> tuple[Tensor]:
        """The exact mean of layer 1, `(batch, d)`; deeper layers have no closed form."""
        return (self.first[0],)

    def attach(self, h: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same h = mean + std * noise, with a gradient for each layer's mean and std, and none for its noise."""
        mean, std = self.first
        attached: list[Tensor] = []
        for i, part in enumerate(h):
            if i:
                mean, std = self.layers[i - 1](attached[-1])
            attached.append(mean + std * ((part - mean) / std).detach())
        return tuple(attached)

    def rsample(self, sample_shape: torch.Size) -> tuple[Tensor, ...]:
        mean, std = self.first
        h = [mean + std * torch.randn(sample_shape + mean.shape, dtype=mean.dtype, device=mean.device)]
        for layer in self.layers:
            mean, std = layer(h[-1])
            h.append(mean + std * torch.randn_like(mean))
        return tuple(h)

    def log_prob(self, h: tuple[Tensor, ...]) -> Tensor:
        total = gaussian_log_prob(h[0], *self.first)
        for layer, above, below in zip(self.layers, h[1:], h[:-1], strict=True):
            total = total + gaussian_log_prob(above, *layer(below))
        return total

    def layer_means(self, h: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The conditional mean of each layer given the sample below it, each `(k, batch, d)`."""
        first = self.first[0].expand_as(h[0])
        return (first, *(layer(below)[0] for layer, below in zip(self.layers, h[:-1], strict=True)))


class PaperModel(nn.Module):
    """Bernoulli pixels over `len(latent)` Gaussian layers, tanh networks, Glorot weights (Arnal, Lee & Pezzotti 2021).

    q(h | x) = q(h1 | x) q(h2 | h1) ..., p(x, h) = N(h_L; 0, I) ... p(h1 | h2) Bernoulli(x; decoder(h1)). For one layer
    h is a tensor `(k, batch, d)`, for several a tuple of them. `x` is `(batch, pixels)` with values in [0, 1].

    Args:
        pixel_means: the training mean of each pixel, `(pixels,)`; its logit becomes the output bias.
        hidden: the width of both tanh layers of each stochastic layer, from x upwards.
        latent: the width of each stochastic layer, from x upwards.

    Example:
        >>> from mcobjectives import IWAE
        >>> model = paper_model(layers=1, pixel_means=torch.full((64,), 0.3))
        >>> IWAE(k=5).bound(model, torch.zeros(2, 64)).shape
        torch.Size([2])
    """

    def __init__(self, pixel_means: Tensor, hidden: Sequence[int], latent: Sequence[int]) -> None:
        super().__init__()
        if not hidden or len(hidden) != len(latent):
            raise ValueError(f"hidden and latent must have one width per layer, got {hidden!r} and {latent!r}")
        pixels = len(pixel_means)
        inputs = [pixels, *latent[:-1]]
        self.encoder = nn.ModuleList(map(GaussianLayer, inputs, hidden, latent))
        # prior[i] is p(h_{i+1} | h_{i+2}), counted from x upwards; the topmost prior is N(0, I).
        self.prior_layers = nn.ModuleList(map(GaussianLayer, latent[1:], hidden[1:], latent[:-1]))
        self.decoder = nn.Sequential(*tanh_layers(latent[0], hidden[0]), Affine(hidden[0], pixels))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        output = self.decoder[-1]
        assert isinstance(output, nn.Linear)
        with torch.no_grad():
            output.bias.copy_(torch.logit(pixel_means.clamp(0.001, 0.999)))

    @property
    def prior(self) -> Independent[Normal] | None:
        """p(h) = N(0, I) for one layer, for `analytic_kl=True`; None for several layers, whose prior is a chain."""
        if self.prior_layers:
            return None
        first = self.decoder[0]
        assert isinstance(first, nn.Linear)
        zeros = first.weight.new_zeros(first.weight.shape[1])
        return Independent(Normal(zeros, zeros + 1, validate_args=False), 1, validate_args=False)

    def posterior(self, x: Tensor) -> Any:
        bottom, *above = self.encoder
        mean, std = bottom(x)
        if not above:
            return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)
        return GaussianChain((mean, std), above)

    def log_likelihood(self, x: Tensor, h: Any) -> Tensor:
        return bernoulli_log_likelihood(self.decoder(_layers(h)[0]), x)

    def log_prior(self, h: Any) -> Tensor:
        layers = _layers(h)
        top = layers[-1]
        total = -0.5 * (top * top).sum(-1) - _HALF_LOG_TWO_PI * top.shape[-1]
        for layer, above, below in zip(self.prior_layers, layers[1:], layers[:-1], strict=True):
            total = total + gaussian_log_prob(below, *layer(above))
        return total

    def decode(self, h: Any) -> Tensor:
        """Pixel probabilities, `(..., pixels)`."""
        return torch.sigmoid(self.decoder(_layers(h)[0]))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Logits of x encoded to the topmost layer and decoded again, `(batch, pixels)`, by conditional means alone."""
        h = x
        for layer in self.encoder:
            h, _ = layer(h)
        for layer in reversed(self.prior_layers):
            h, _ = layer(h)
        return self.decoder(h)


def _layers(h: Any) -> tuple[Tensor, ...]:
    return (h,) if isinstance(h, Tensor) else tuple(h)


def paper_model(layers: int, pixel_means: Tensor, latent: int | None = None) -> PaperModel:
    """The paper's 1L (pixels-200-200-50) or 2L (200-200-100, 100-100-50) model; `latent` changes the topmost width."""
    architectures = paper()["architectures"]
    if str(layers) not in architectures:
        raise ValueError(f"layers must be one of {', '.join(architectures)}, got {layers!r}")
    widths = architectures[str(layers)]
    units = widths["latent"] if latent is None else [*widths["latent"][:-1], latent]
    return PaperModel(pixel_means, widths["hidden"], units)
