"""Functions of tensors as one traced graph, compiled; a model whose likelihood is; whether a compiler is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import compile as inductor_compile
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mcobjectives.context import generators_at
from mcobjectives_examples.memory import keep_freed_memory

SECONDS_TO_COMPILE = 40.0
_SECONDS_SAVED_PER_SAMPLE = 2e-6
_THE_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


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
    with generators_at(), torch.no_grad():
        compiled(*arguments)
    return compiled


def functional_graph(function: Callable[..., Any], *arguments: Tensor) -> GraphModule:
    """The function as a graph in which no operation changes a tensor; no random number is spent on tracing.

    It is traced without numbers: a trace that computes keeps every tensor of a step, three times the step's own memory.
    """
    trace = partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
    with _tracing(), generators_at():
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


@contextmanager
def _tracing() -> Iterator[None]:
    # As torch.export does: `torch.compiler.is_compiling()` holds, so that nobody looks at the numbers.
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


class CompiledLikelihood:
    """A model to evaluate without gradients, its likelihood compiled: what large-k evaluation spends its time in."""

    def __init__(self, model: Any) -> None:
        keep_freed_memory()
        self.posterior, self.log_prior = model.posterior, model.log_prior
        self.log_likelihood = torch.compile(model.log_likelihood, dynamic=False)


def for_evaluation(model: nn.Module, samples: int) -> Any:
    """The model, with its likelihood compiled where so many samples of log p(x, h) make up for it, on a CPU."""
    device = next(model.parameters()).device
    pays = device.type == "cpu" and samples * _SECONDS_SAVED_PER_SAMPLE > 2 * SECONDS_TO_COMPILE
    if not pays or compiler_failure(device):
        return model
    return CompiledLikelihood(model)


def compiler_failure(device: torch.device) -> str:
    """Why nothing can be compiled, empty if it can."""
    try:
        torch.compile(_probe)(torch.ones(2, device=device))
    except Exception as error:  # any failure of a compiler means: do without
        return type(error).__name__
    return ""


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1
