"""pythae's IWAE with encoder and decoder of this model. Its loss is sum w~ log w without constants, not the bound; its
gradient is the bound's. One stochastic layer only."""

from collections.abc import Callable

import torch
from _protocol import PIXELS, Settings, serve
from _torch_model import adam, networks
from pythae.models import IWAE, IWAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn


class Encoder(BaseEncoder):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_std = self.net(x)
        return ModelOutput(embedding=mean, log_covariance=2 * log_std)


class Decoder(BaseDecoder):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, h: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=torch.sigmoid(self.net(h)))


def build(settings: Settings) -> tuple[Callable, Callable]:
    if settings.layers != 1:
        raise SystemExit("pythae has no model with several stochastic layers")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    (encoder,), _, output = networks(settings)
    config = IWAEConfig(input_dim=(PIXELS,), latent_dim=50, number_samples=settings.k, reconstruction_loss="bce")
    model = IWAE(config, encoder=Encoder(encoder), decoder=Decoder(output))
    optimizer = adam(model.parameters())

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loss = model({"data": x}).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return torch.from_numpy, step


if __name__ == "__main__":
    serve("pythae", build, ["torch", "pythae"])
