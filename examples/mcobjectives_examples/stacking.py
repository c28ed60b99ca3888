"""Several runs of one architecture trained as one: each step computes the losses and gradients of all in one call.

Every run keeps its own data order, random numbers, optimiser and checkpoint: its numbers are those that it has alone,
to rounding. What is shared is one batched function of (parameters, x, noise), its noise drawn outside, run by run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx import Graph, GraphModule, Node

from mcobjectives.context import generators_at
from mcobjectives_examples.compiling import compile_whole, functional_graph, is_random
from mcobjectives_examples.config import Config
from mcobjectives_examples.engine import (
    Engine,
    Step,
    choose_engine,
    loss_and_gradient,
    make_step,
)
from mcobjectives_examples.hooks import Interrupted, or_interrupted
from mcobjectives_examples.memory import require_memory
from mcobjectives_examples.precision import set_precision
from mcobjectives_examples.training import Trainer, advance

_SHAPE_OF_ANOTHER = {
    torch.ops.aten.randn_like.default,
    torch.ops.aten.rand_like.default,
    torch.ops.aten.empty_like.default,
}
STACKED = Engine("stacked", "several runs as one compiled function")
STACKED_EAGER = Engine("stacked-eager", "several runs as one function, operation by operation")


def stacks(configs: Sequence[Config]) -> list[list[Config]]:
    """The configurations in groups that can be trained as one: those that differ in seed or binarisation alone."""
    groups: dict[Config, list[Config]] = {}
    for config in configs:
        groups.setdefault(replace(config, seed=0, binarisation=""), []).append(config)
    return list(groups.values())


def pays(k: int, device: torch.device) -> bool:
    """Whether a stack surely beats its members one by one: on a CPU at k = 1; beyond, it depends on the precision."""
    return device.type != "cpu" or k == 1


def noise_apart(function: Callable[..., Any], *arguments: Tensor) -> tuple[GraphModule, GraphModule]:
    """A function as one that draws its noise, `() -> noise`, and one without chance, `(*arguments, *noise) -> results`.

    The noise is drawn in the function's own order, so that a seed gives the same numbers. Raises `ValueError` if the
    distribution of a draw depends on the arguments.
    """
    graph = functional_graph(function, *arguments)
    drawn = [node for node in graph.graph.nodes if is_random(node)]
    source = _noise_graph(graph.graph, drawn)
    given = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with graph.graph.inserting_after(given[-1]):
        for node in reversed(drawn):
            node.replace_all_uses_with(graph.graph.placeholder(f"noise_{node.name}"))
    for node in reversed(drawn):
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return GraphModule(graph, source), graph


def _noise_graph(whole: Graph, drawn: Sequence[Node]) -> Graph:
    needed: set[Node] = set()
    pending = list(drawn)
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            raise ValueError("cannot be stacked: what it draws depends on its parameters or data")
        if node not in needed:
            needed.add(node)
            pending += [] if node.target in _SHAPE_OF_ANOTHER else node.all_input_nodes
    source = Graph()
    copies: dict[Node, Node] = {}
    for node in whole.nodes:
        if node not in needed:
            continue
        inputs = copies
        if node.target in _SHAPE_OF_ANOTHER:
            [like] = node.all_input_nodes
            value = like.meta["val"]
            options = {"dtype": value.dtype, "device": value.device}
            inputs = {like: source.call_function(torch.empty, (tuple(value.shape),), options)}
        copies[node] = source.node_copy(node, inputs.__getitem__)
    source.output(tuple(copies[node] for node in drawn))
    return source


class Stack:
    """Trainers of one architecture, to be trained together."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = trainers
        first = trainers[0]
        if first.objective.chunk_size is not None:
            raise ValueError("cannot be stacked: chunk_size draws random numbers again")
        self.vectors = [trainer.optimiser.param_groups[0]["params"][0] for trainer in trainers]
        x = first.first_batch()
        require_memory(first.objective, x)
        self.size = len(x)
        set_precision(first.preset.precision)
        function = loss_and_gradient(first.objective, first.model, first.preset.precision)
        self.draw, rows = noise_apart(function, self.vectors[0].detach(), x)
        self.engine = self._engine(x)
        self.x = [torch.zeros_like(x) for _ in trainers]
        self.noise = [self.draw() for _ in trainers]
        self.together: Any = vmap(rows)
        if self.engine == STACKED:
            self.together = compile_whole(self.together, *self._inputs())

    def _engine(self, x: Tensor) -> Engine:
        first = self.trainers[0]
        before = {trainer.engine.name for trainer in self.trainers if trainer.engine}
        for engine in (STACKED, STACKED_EAGER):  # after a restart the same as before: another one rounds differently
            if before == {engine.name}:
                return engine
        if before:
            first.hooks.note(f"the checkpoints are of {', '.join(sorted(before))} steps: last digits may differ")
        steps = sum(trainer.steps_left for trainer in self.trainers)
        precision = first.preset.precision
        alone = choose_engine(first.wanted_engine, first.objective, first.model, precision, x, steps)
        return STACKED_EAGER if alone.name == "eager" else STACKED

    def _inputs(self) -> list[Tensor]:
        vectors = torch.stack([vector.detach() for vector in self.vectors])
        return [vectors, torch.stack(self.x), *(torch.stack(parts) for parts in zip(*self.noise, strict=True))]

    def gradients(self, members: Sequence[int]) -> Tensor:
        """Leave the gradients of some members in their vectors and return the losses of all, `(members,)`.

        The others' rows are computed from their last batch and dropped: a member's numbers do not depend on who else
        takes part, so that it ends with the same bits wherever the others were stopped.
        """
        with torch.no_grad():
            losses, gradients = self.together(*self._inputs())
        for i in members:
            self.vectors[i].grad = gradients[i]
        return losses


def train_together(trainers: Sequence[Trainer]) -> None:
    """Train runs that `stacks` has put together, each to its end; raises as `Trainer.run` does.

    On the first one's `stop()` all write their checkpoints before `Interrupted` is raised.
    """
    trainers = [trainer for trainer in trainers if trainer.steps_left]
    if not trainers:
        return
    stop = trainers[0].hooks.stop
    stopped = False

    def stop_all() -> bool:
        nonlocal stopped
        stopped = stopped or stop()
        return stopped

    already = stop()
    with or_interrupted(stop), generators_at():
        stack = Stack(trainers)
    if stop() and not already:
        raise Interrupted
    alone = [_alone(trainer) for trainer in trainers]
    for trainer in trainers:
        trainer.together = len(trainers)
        trainer.engine = stack.engine
        with trainer.own_random_numbers():
            trainer.save()  # a folder that cannot be written shows before the work
    trainers[0].hooks.note(f"{stack.engine.name} steps: {len(trainers)} runs as one")
    runs = {i: trainer.batches(stop_all) for i, trainer in enumerate(trainers)}
    losses: dict[int, Tensor] = {}
    while runs:
        members, smaller = [], {}
        for i in list(runs):
            trainer = trainers[i]
            with trainer.own_random_numbers():
                try:
                    x = advance(runs[i], losses.get(i))
                except Interrupted:
                    x = None
                if x is None:
                    del runs[i]
                elif len(x) == stack.size:
                    stack.x[i], stack.noise[i] = x, stack.draw()
                    members.append(i)
                else:  # a pass's last batch
                    smaller[i] = trainer.loss(alone[i], x)
        if members:
            together = stack.gradients(members)
            for i in members:
                trainers[i].optimiser.step()
            losses |= {i: together[i] for i in members}
        losses |= smaller
    if stopped and any(trainer.steps_left for trainer in trainers):
        raise Interrupted


def _alone(trainer: Trainer) -> Step:
    step, _ = make_step(
        Engine("eager", "a batch of another size"),
        trainer.objective,
        trainer.model,
        trainer.optimiser,
        trainer.preset.precision,
        trainer.first_batch(),
    )
    return step
