"""How a training step is executed: operation by operation, compiled as a whole, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam

from mcobjectives.arguments import require_choice
from mcobjectives.context import generators_at
from mcobjectives.messages import first_line
from mcobjectives.objective import Objective
from mcobjectives_examples.compiling import SECONDS_TO_COMPILE, compile_whole, compiler_failure
from mcobjectives_examples.devices import fastest
from mcobjectives_examples.memory import keep_freed_memory
from mcobjectives_examples.precision import products, set_precision

ENGINES = ("eager", "compiled", "cuda-graph")

Step = Callable[[Tensor], Tensor]
"""x -> the loss before the step, detached."""

_GAIN_OF_COMPILING = 0.3
_STEPS_BEFORE_CAPTURE = 3


@dataclass(frozen=True)
class Engine:
    """One of `ENGINES`, and why."""

    name: str
    why: str


def require_engine(name: str) -> None:
    """Raise `ValueError` unless the name is "auto" or one of `ENGINES`."""
    require_choice("engine", name, ("auto", *ENGINES))


def flat_adam(model: nn.Module, betas: tuple[float, float], eps: float, rate: float = 1e-3) -> torch.optim.Adam:
    """Adam on one vector of which the model's parameters become views: one tensor to update instead of dozens."""
    parameters = list(model.parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    for p, part in zip(parameters, flat.detach().split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    on_cuda = flat.is_cuda  # where a captured graph reads the rate from a tensor
    first_rate: Any = torch.tensor(rate, device=flat.device) if on_cuda else rate
    return torch.optim.Adam([flat], lr=first_rate, betas=betas, eps=eps, fused=True, capturable=on_cuda)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where it is a tensor."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class _LossAndGradient(nn.Module):
    """(x, vector) -> the loss and its gradient with respect to the vector that the parameters are views of."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.loss_of = objective.bind(model)

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        # Inside the call that sets the parameters: some estimators evaluate the model again in the backward pass.
        loss = self.loss_of(x)
        (gradient,) = torch.autograd.grad(loss, vector)
        return loss.detach(), gradient


def loss_and_gradient(objective: Objective, model: nn.Module, precision: str) -> Callable[[Tensor, Tensor], Any]:
    """A function (vector of all parameters, x) -> (loss, gradient), both detached, of tensor operations alone."""
    module = _LossAndGradient(objective, model)
    named = list(module.named_parameters())

    def function(vector: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), products(precision):
            vector = vector.detach().requires_grad_()
            parts = vector.split([p.numel() for _, p in named])
            values = {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}
            return functional_call(module, values, (x, vector))

    return function


def make_step(
    engine: Engine, objective: Objective, model: nn.Module, optimiser: torch.optim.Optimizer, precision: str, x: Tensor
) -> tuple[Step, Engine]:
    """A function x -> loss that takes one step of an optimiser made by `flat_adam`, and the engine that it came to be.

    It is made for batches of the size of this x; another one, a last and smaller batch, is run eagerly. So are all
    where the objective or the model cannot be compiled: the engine then says why.
    """
    set_precision(precision)
    keep_freed_memory()
    function = loss_and_gradient(objective, model, precision)
    [vector] = optimiser.param_groups[0]["params"]

    def eager(x: Tensor) -> Tensor:
        loss, vector.grad = function(vector, x)
        optimiser.step()
        return loss

    if engine.name == "eager":
        return eager, engine
    usual = x
    try:
        whole: Step
        if engine.name == "compiled":
            whole = _compiled_step(function, vector, optimiser, x)
        else:
            whole = _GraphStep(eager, vector, optimiser, x)
    except Exception as error:  # whatever a compiler stumbles over: do without
        return eager, Engine("eager", f"cannot be {engine.name}: {first_line(error)}")
    return lambda x: whole(x) if x.shape == usual.shape and x.dtype == usual.dtype else eager(x), engine


def _compiled_step(function: Callable[..., Any], vector: nn.Parameter, optimiser: Any, x: Tensor) -> Step:
    compiled = compile_whole(function, vector.detach(), x)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            loss, gradient = compiled(vector.detach(), x)
            adam_step(optimiser, vector, gradient)
        return loss

    return step


def adam_step(optimiser: torch.optim.Optimizer, vector: nn.Parameter, gradient: Tensor) -> None:
    """`optimiser.step()` without its bookkeeping, which at k = 1 is a sixteenth of a step."""
    [group], state = optimiser.param_groups, optimiser.state[vector]
    if not state:
        state["step"] = torch.zeros((), device=vector.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(vector), torch.zeros_like(vector)
    beta1, beta2 = group["betas"]
    adam(
        [vector],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=True,
        capturable=group["capturable"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


class _GraphStep:
    """An eager step as one CUDA graph, replayed without the host.

    Making it takes ordinary steps, as a capture needs them, and leaves the parameters, the optimiser's moments and the
    random numbers as they were: all steps of a run are replays.
    """

    def __init__(self, eager: Step, vector: nn.Parameter, optimiser: torch.optim.Optimizer, x: Tensor) -> None:
        before = vector.detach().clone()
        moments = {name: value.clone() for name, value in optimiser.state[vector].items()}
        self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
        try:
            with generators_at():
                self._capture(eager)
        finally:
            with torch.no_grad():
                vector.copy_(before)
                for name, value in optimiser.state[vector].items():  # in place: the graph knows these tensors
                    value.copy_(moments[name]) if moments else value.zero_()

    def _capture(self, eager: Step) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_STEPS_BEFORE_CAPTURE):
                eager(self.x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.loss = eager(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.loss.clone()


def choose_engine(wanted: str, objective: Objective, model: nn.Module, precision: str, x: Tensor, steps: int) -> Engine:
    """ "auto" is a CUDA graph on a GPU, and compiles on a CPU where that saves more time than it takes."""
    if wanted == "eager":
        return Engine("eager", "as asked")
    if wanted == "cuda-graph" or (wanted == "auto" and x.is_cuda):
        if not x.is_cuda:
            return Engine("eager", f"no CUDA graph on {x.device}")
        if objective.chunk_size is not None:
            return Engine("eager", "chunk_size sets random number generators back, which a CUDA graph cannot")
        return Engine("cuda-graph", "as asked" if wanted == "cuda-graph" else "the default on a GPU")
    if wanted == "compiled":
        return _compiled("as asked", objective, x.device)
    if x.device.type != "cpu":
        return Engine("eager", "compiled steps are not the default on this device")
    set_precision(precision)
    with generators_at(), products(precision):
        step = fastest(lambda: objective(model, x).backward(), 3)
    model.zero_grad(set_to_none=True)
    saved = step * steps * _GAIN_OF_COMPILING
    if saved < 2 * SECONDS_TO_COMPILE:
        return Engine("eager", "the run is too short for compiling to pay")
    return _compiled("saves more than compiling takes", objective, x.device)


def _compiled(why: str, objective: Objective, device: torch.device) -> Engine:
    if objective.chunk_size is not None:
        return Engine("eager", "chunk_size draws random numbers again, which a compiled step cannot")
    failure = compiler_failure(device)
    return Engine("eager", f"no working compiler ({failure})") if failure else Engine("compiled", why)
