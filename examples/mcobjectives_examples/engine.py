"""How a training step is executed: operation by operation, compiled as a whole, or as one CUDA graph; how exactly."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import compile as inductor_compile
from torch.func import functional_call, functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.adam import adam

from mcobjectives.model import generators_at, rng_state
from mcobjectives.objective import Objective
from mcobjectives_examples.models import reduced_products

PRECISIONS = {
    "highest": "float32 products",
    "medium": "TF32 (GPU) or bfloat16 (CPU) inside float32 products, accumulated in float32",
    "mixed": "medium, and bfloat16 where no gradient is taken (the choice of samples to back-propagate)",
    "bf16": "bfloat16 products in all networks; log-weights, their sums and the parameters stay float32",
}
ENGINES = {
    "eager": "operation by operation",
    "compiled": "forward and backward pass as one compiled function",
    "cuda-graph": "forward, backward and optimiser as one CUDA graph",
}

Step = Callable[[Tensor], Tensor]
"""x -> the loss before the step, detached."""

_SECONDS_TO_COMPILE = 40.0
_GAIN_OF_COMPILING = 0.3
_SECONDS_SAVED_PER_SAMPLE = 2e-6
_STEPS_BEFORE_CAPTURE = 3
# M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h.
_NEVER_TO_THE_SYSTEM = ((-1, 2**31 - 1), (-4, 0))
_THE_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@dataclass(frozen=True)
class Engine:
    """One of `ENGINES`, and why."""

    name: str
    why: str


def require_engine(name: str) -> None:
    """Raise `ValueError` unless the name is "auto" or one of `ENGINES`."""
    choices = ("auto", *ENGINES)
    if name not in choices:
        raise ValueError(f"unknown engine {name!r}: choose from {', '.join(choices)}")


def set_precision(precision: str) -> None:
    """Set torch's float32 matrix products as `PRECISIONS` says; raises `ValueError` for another name."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "medium")


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
    where = {"mixed": "no gradient", "bf16": "everywhere"}.get(precision, "nowhere")
    module = _LossAndGradient(objective, model)
    named = list(module.named_parameters())

    def function(vector: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), reduced_products(where):
            vector = vector.detach().requires_grad_()
            parts = vector.split([p.numel() for _, p in named])
            values = {name: part.view_as(p) for (name, p), part in zip(named, parts, strict=True)}
            return functional_call(module, values, (x, vector))

    return function


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees, for the next one, until the process ends.

    It hands large blocks back to the system and takes them anew, empty, at every step: up to a third of a step's time.
    Elsewhere nothing happens.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _NEVER_TO_THE_SYSTEM:
            mallopt(parameter, value)


def require_memory(objective: Objective, x: Tensor) -> None:
    """Raise `ValueError` if all samples of a batch, pixels alone, are more than the device has memory."""
    size = _memory_of(x.device)
    needed = (objective.chunk_size or objective.k) * x.numel() * 4
    if size is not None and needed > size:
        raise ValueError(
            f"k={objective.k} needs over {needed / 1e9:,.0f} GB a step, of {size / 1e9:,.0f} GB on {x.device}: "
            "take fewer samples or a smaller batch"
        )


def _memory_of(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError):  # where the system does not say
        return None


def make_step(
    engine: Engine, objective: Objective, model: nn.Module, optimiser: torch.optim.Optimizer, precision: str, x: Tensor
) -> tuple[Step, Engine]:
    """A function x -> loss that takes one step of an optimiser made by `flat_adam`, and the engine that it came to be.

    It is made for batches of the size of this x; another one, a last and smaller batch, is run eagerly. So are all
    where the objective or the model cannot be compiled: the engine then says why. Raises `ValueError` where no memory
    could hold the samples.
    """
    require_memory(objective, x)
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
        return eager, Engine("eager", f"cannot be {engine.name}: {_first_line(error)}")
    return lambda x: whole(x) if x.shape == usual.shape and x.dtype == usual.dtype else eager(x), engine


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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


def compile_whole(function: Callable[..., Any], *arguments: Tensor) -> Callable[..., Any]:
    """The function as one graph of tensor operations, its backward pass among them, compiled.

    So traced, there is no autograd and next to no Python left in a step: nor the guards of `torch.compile`, so that all
    calls must have arguments of these shapes and types. Random numbers come from torch's own generator, and none is
    spent on tracing.
    """
    graph = functional_graph(function, *arguments)
    _merge_repeats(graph.graph)
    graph.recompile()
    for node in graph.graph.nodes:
        node.meta.clear()  # shapes that the trace has found, which the compiler wants to find itself
    compiled = inductor_compile(graph, list(arguments), options={"fallback_random": True})
    with generators_at(rng_state()), torch.no_grad():
        compiled(*arguments)
    return compiled


def functional_graph(function: Callable[..., Any], *arguments: Tensor) -> GraphModule:
    """The function as a graph in which no operation changes a tensor; no random number is spent on tracing.

    It is traced without numbers: a trace that computes keeps every tensor of a step, three times the step's own memory.
    """
    trace = partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
    with tracing(), generators_at(rng_state()):
        return trace(functionalize(trace(function)(*arguments)))(*arguments)


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _merge_repeats(graph: Graph) -> None:
    """Let what is computed twice from the same inputs be computed once: q's layers, to draw from and for log q."""
    known: dict[Any, Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or is_random(node):
            continue
        if node.target in _THE_SAME:
            [same] = node.all_input_nodes
        else:
            same = known.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


class CompiledLikelihood:
    """A model to evaluate without gradients, its likelihood compiled: what large-k evaluation spends its time in."""

    def __init__(self, model: Any) -> None:
        keep_freed_memory()
        self.posterior, self.log_prior = model.posterior, model.log_prior
        self.log_likelihood = torch.compile(model.log_likelihood, dynamic=False)


def for_evaluation(model: nn.Module, samples: int) -> Any:
    """The model, with its likelihood compiled where so many samples of log p(x, h) make up for it, on a CPU."""
    device = next(model.parameters()).device
    pays = device.type == "cpu" and samples * _SECONDS_SAVED_PER_SAMPLE > 2 * _SECONDS_TO_COMPILE
    if not pays or compiler_failure(device):
        return model
    return CompiledLikelihood(model)


@contextmanager
def tracing() -> Iterator[None]:
    # As torch.export does: `torch.compiler.is_compiling()` holds, so that nobody looks at the numbers.
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


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
            with generators_at(rng_state()):
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


def choose_engine(wanted: str, objective: Objective, model: nn.Module, x: Tensor, steps: int) -> Engine:
    """ "auto" is a CUDA graph on a GPU, and compiles on a CPU where that saves more time than it takes."""
    require_engine(wanted)
    require_memory(objective, x)
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
    elapsed = []
    with generators_at(rng_state()):
        for _ in range(3):
            began = time.perf_counter()
            objective(model, x).backward()
            elapsed.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    saved = min(elapsed) * steps * _GAIN_OF_COMPILING
    if saved < 2 * _SECONDS_TO_COMPILE:
        return Engine("eager", "the run is too short for compiling to pay")
    return _compiled("saves more than compiling takes", objective, x.device)


def _compiled(why: str, objective: Objective, device: torch.device) -> Engine:
    if objective.chunk_size is not None:
        return Engine("eager", "chunk_size draws random numbers again, which a compiled step cannot")
    failure = compiler_failure(device)
    return Engine("eager", f"no working compiler ({failure})") if failure else Engine("compiled", why)


def compiler_failure(device: torch.device) -> str:
    """Why nothing can be compiled, empty if it can."""
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # any failure of a compiler means: do without
        return type(error).__name__
    return ""


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
