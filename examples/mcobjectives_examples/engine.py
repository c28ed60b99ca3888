"""How a training step is executed: eagerly, or compiled as a whole where that pays; in which precision."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcobjectives.objective import Objective

PRECISIONS = {
    "highest": "float32 products",
    "medium": "TF32 (GPU) or bfloat16 (CPU) inside float32 products, accumulated in float32",
    "mixed": "medium, and bfloat16 where no gradient is taken (the choice of samples to back-propagate)",
}

_SECONDS_TO_COMPILE = 40.0
_GAIN_OF_COMPILING = 0.3


@dataclass(frozen=True)
class Engine:
    """ "eager" or "compiled", and why."""

    name: str
    why: str


class HalfWhereNoGradient(nn.Module):
    """A model whose likelihood network runs in bfloat16 while no gradient is recorded; its sums stay float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def posterior(self, x: Any) -> Any:
        return self.model.posterior(x)

    def log_likelihood(self, x: Any, h: Any) -> Tensor:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=not torch.is_grad_enabled()):
            return self.model.log_likelihood(x, h)

    def log_prior(self, h: Any) -> Tensor:
        return self.model.log_prior(h)


ENGINES = ("auto", "eager", "compiled")


def require_engine(name: str) -> None:
    """Raise `ValueError` unless the name is one of `ENGINES`."""
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: choose from {', '.join(ENGINES)}")


def choose_engine(wanted: str, objective: Objective, model: nn.Module, x: Tensor, steps: int) -> Engine:
    """ "auto" compiles where that saves more time over the remaining steps than compiling takes."""
    require_engine(wanted)
    if wanted == "compiled":
        return _compiled("as asked", x.device)
    if wanted == "eager":
        return Engine("eager", "as asked")
    if x.device.type != "cpu":
        return Engine("eager", "compiled steps are not the default on this device")
    state = torch.get_rng_state()
    elapsed = []
    for _ in range(3):
        began = time.perf_counter()
        objective(model, x).backward()
        elapsed.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(state)
    saved = min(elapsed) * steps * _GAIN_OF_COMPILING
    if saved < 2 * _SECONDS_TO_COMPILE:
        return Engine("eager", "the run is too short for compiling to pay")
    return _compiled("saves more than compiling takes", x.device)


def _compiled(why: str, device: torch.device) -> Engine:
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # any failure of a compiler means: do without
        return Engine("eager", f"no working compiler ({type(error).__name__})")
    return Engine("compiled", why)


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def set_precision(precision: str) -> None:
    """Set torch's float32 matrix products as `PRECISIONS` says; raises `ValueError` for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "medium")


def compile_loss(loss_of: nn.Module) -> Any:
    """The whole forward and backward pass compiled; noise comes from torch's own generator, faster on a CPU."""
    return torch.compile(loss_of, dynamic=False, options={"fallback_random": True})


def make_step(
    engine: Engine,
    objective: Objective,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    precision: str,
    batch_size: int | None = None,
) -> Callable[[Tensor], Tensor]:
    """x -> the loss before the step, detached: forward, backward and one step of the optimiser.

    `batch_size` is that of the first x if it is left out.
    """
    set_precision(precision)
    loss_of: Any = objective.bind(HalfWhereNoGradient(model) if precision == "mixed" else model)
    compiled = compile_loss(loss_of) if engine.name == "compiled" else None
    usual = batch_size

    def step(x: Tensor) -> Tensor:
        nonlocal usual
        usual = len(x) if usual is None else usual
        # A smaller last batch is run eagerly: another shape would be another compilation.
        loss = compiled(x) if compiled is not None and len(x) == usual else loss_of(x)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step
