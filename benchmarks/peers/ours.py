"""This library, by its public API, on the paper's model of the examples package."""

from functools import partial

import numpy as np
import torch
from _protocol import ADAM_EPS, LEARNING_RATE, PIXELS, Settings, serve
from torch import Tensor, nn

from mcobjectives import IWAE
from mcobjectives_examples.engine import Engine, flat_adam, make_step, set_rate
from mcobjectives_examples.models import paper_model

# mode -> (engine, precision, samples back-propagated or None for all)
MODES: dict[str, tuple[str, str, int | None]] = {
    "eager": ("eager", "highest", None),
    "compiled": ("compiled", "highest", None),
    "exact": ("compiled", "medium", None),
    "resampled": ("compiled", "medium", 5),
    "resampled-mixed": ("compiled", "mixed", 5),
    "resampled-bf16": ("compiled", "bf16", 5),
}


def build(settings: Settings) -> tuple:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = paper_model(settings.layers, pixel_means=torch.full((PIXELS,), 0.5))
    encoder, decoder = settings.initial()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module, (weight, bias) in zip(linear, [p for net in encoder + decoder for p in net], strict=True):
            module.weight.copy_(torch.from_numpy(weight).T)
            module.bias.copy_(torch.from_numpy(bias))
    engine, precision, m = MODES[settings.mode]
    objective = IWAE(k=settings.k, backward_samples=None if m is None else min(m, settings.k))
    optimizer = flat_adam(model, (0.9, 0.999), ADAM_EPS, LEARNING_RATE)

    x = torch.from_numpy(settings.batches(1)[0])
    train, used = make_step(Engine(engine, "as asked"), objective, model, optimizer, precision, x)
    if used.name != engine:
        raise SystemExit(used.why)

    def step(x: Tensor) -> float:
        return train(x).item()

    def parameters() -> list[np.ndarray]:
        return [p.detach().T.numpy() for module in linear for p in (module.weight, module.bias)]

    return torch.from_numpy, step, partial(set_rate, optimizer), parameters


if __name__ == "__main__":
    serve("ours", build, ["mcobjectives", "torch"], kind="ours", modes=list(MODES))
