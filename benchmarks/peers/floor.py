"""The bare matrix products of one training step, fp32, into buffers made beforehand: what no exact step can beat
without cheaper products. The first stochastic layer has `batch` rows, all others `k * batch`."""

from collections.abc import Callable

import torch
from _protocol import DECODER, ENCODER, PIXELS, Settings, serve


def build(settings: Settings) -> tuple[Callable, Callable]:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    products: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def affine(rows: int, inputs: int, outputs: int, needs_input_gradient: bool = True) -> None:
        x, w, y = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        products.append((x, w.T, torch.empty_like(y)))
        products.append((y.T, x, torch.empty_like(w)))
        if needs_input_gradient:
            products.append((y, w, torch.empty_like(x)))

    for i, (inputs, hidden, outputs) in enumerate(ENCODER[settings.layers] + DECODER[settings.layers]):
        rows = settings.batch * (settings.k if i else 1)
        affine(rows, inputs, hidden, needs_input_gradient=i > 0)
        affine(rows, hidden, hidden)
        for _ in range(1 if outputs == PIXELS else 2):
            affine(rows, hidden, outputs)

    def step(_: torch.Tensor) -> float:
        for a, b, out in products:
            torch.mm(a, b, out=out)
        return 0.0

    return torch.from_numpy, step


if __name__ == "__main__":
    serve("floor", build, ["torch"], kind="floor")
