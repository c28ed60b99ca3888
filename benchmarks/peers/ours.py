"""This library, by its public API, on the paper's model of the examples package."""

from functools import partial

import numpy as np
import torch
from _protocol import ADAM_EPS, LEARNING_RATE, PIXELS, Settings, serve
from torch import Tensor, nn

from mcobjectives import IWAE
from mcobjectives_examples.engine import Engine, flat_adam, make_step, set_rate
from mcobjectives_examples.models import paper_model

# mode -> (engine, precision, whether few samples are back-propagated)
MODES: dict[str, tuple[str, str, bool]] = {
    "eager": ("eager", "highest", False),
    "compiled": ("compiled", "highest", False),
    "exact": ("compiled", "medium", False),
    "resampled": ("compiled", "medium", True),
    "resampled-mixed": ("compiled", "mixed", True),
    "resampled-bf16": ("compiled", "bf16", True),
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
    engine, precision, few = MODES[settings.mode]
    objective = IWAE(k=settings.k, backward_samples=(min(5, settings.k // 2) or None) if few else None)
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
