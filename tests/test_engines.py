"""Eager, compiled and captured steps: which is chosen, that they are one step, and what happens where one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from runs import CPU, TINY, same
from torch import nn

from mcobjectives import IWAE
from mcobjectives_examples import checkpoints, compiling, engine
from mcobjectives_examples.cells import Place
from mcobjectives_examples.engine import Engine, choose_engine, flat_adam, make_step
from mcobjectives_examples.estimates import estimate_seconds
from mcobjectives_examples.hooks import Hooks
from mcobjectives_examples.precision import in_bfloat16, products, set_precision
from mcobjectives_examples.presets import configured
from mcobjectives_examples.stacking import train_together
from mcobjectives_examples.training import Interrupted


@pytest.fixture
def no_compiler(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)


@pytest.mark.parametrize("wanted", ["auto", "compiled"])
def test_without_a_compiler_steps_are_eager_and_the_user_is_told(trainer, no_compiler, wanted):
    run = trainer()
    chosen = choose_engine(wanted, run.objective, run.model, "highest", run.pixels[:100], steps=10**9)
    assert chosen == Engine("eager", "no working compiler (RuntimeError)")
    notes = []
    told = trainer(engine="compiled", hooks=Hooks(note=notes.append))
    told.run()
    assert notes == ["eager steps: no working compiler (RuntimeError)"] and len(told.history) == 3


def test_choosing_an_engine_leaves_no_trace(trainer):
    run = trainer()
    state, parameters = torch.get_rng_state(), [p.clone() for p in run.model.parameters()]
    assert choose_engine("auto", run.objective, run.model, "highest", run.pixels[:100], steps=10).name == "eager"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(run.model.parameters(), parameters, strict=True))


def test_an_engine_is_chosen_for_the_precision_that_will_be_trained_in(trainer, monkeypatch):
    run, seen = trainer(), []

    def timed(step, times):
        seen.append((in_bfloat16(), torch.get_float32_matmul_precision()))
        step()
        return 0.0

    monkeypatch.setattr(engine, "fastest", timed)
    for precision, before in product(("highest", "medium", "bf16"), ("highest", "medium")):
        set_precision(before)
        choose_engine("auto", run.objective, run.model, precision, run.pixels[:100], steps=10)
    set_precision("highest")
    assert seen == 2 * [(False, "highest")] + 2 * [(False, "medium")] + 2 * [(True, "medium")]


def test_a_preset_is_read_without_a_trace_in_torch():
    for precision in ("bf16", "highest"):
        configured("smoke", [], precision)
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_restarted_run_keeps_its_engine(saved, trainer):
    notes = []
    again = trainer(engine="compiled", hooks=Hooks(note=notes.append))
    again.restore()
    again.run()
    assert notes == ["eager steps: as in the checkpoint"]


def test_a_restart_on_other_threads_is_told(saved, trainer):
    state = torch.load(saved.checkpoint, weights_only=True)
    torch.save(state | {"threads": state["threads"] + 6}, saved.checkpoint)
    notes = []
    trainer(hooks=Hooks(note=notes.append)).restore()
    assert notes == [
        f"the checkpoint is from a run on {state['threads'] + 6} threads, this is on {state['threads']}: "
        "last digits may differ"
    ]


def test_an_unknown_engine_is_refused(trainer):
    with pytest.raises(ValueError, match="unknown engine 'fast': choose from auto, eager, compiled, cuda-graph"):
        trainer(engine="fast")
    with pytest.raises(ValueError, match="unknown engine 'fast'"):
        Place(Path(), CPU, engine="fast")


def test_a_restart_keeps_the_tensor_that_a_graph_reads_the_rate_from(trainer):
    trainer().run()
    again = trainer()
    [group] = again.optimiser.param_groups
    rate = torch.tensor(0.5)
    group["lr"], group["capturable"] = rate, True  # as on a GPU
    assert again.restore()
    [group] = again.optimiser.param_groups
    assert group["lr"] is rate and group["capturable"] is True and group["fused"] is True
    assert again.optimiser.state[group["params"][0]]["exp_avg"].abs().sum() > 0


def test_only_whole_batches_are_compiled_wherever_a_run_begins(trainer, monkeypatch):
    compiled = []

    def compile_whole(function, vector, x):
        return lambda vector, x: compiled.append(len(x)) or function(vector, x)

    monkeypatch.setattr(engine, "compile_whole", compile_whole)
    run = trainer()
    arguments = run.objective, run.model, run.optimiser, "highest", run.pixels[:400]
    step, used = make_step(Engine("compiled", ""), *arguments)
    assert used.name == "compiled"
    for n in (300, 400, 400, 300):  # a run restarted before its last batch meets the smaller one first
        step(run.pixels[:n])
    assert compiled == [400, 400]


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "spec",
    [
        "iwae(k=4)",
        "iwae(k=4, gradient='dreg')",
        "iwae(k=4, gradient='vimco')",
        "iwae(k=6, backward_samples=2)",
        "miwae(k1=2, k2=3, gradient='dreg')",
        "median(k=5)",
        "l_alpha(k=3, alpha=0.5, gradient='stl')",
    ],
)
def test_a_step_traced_as_one_graph_is_the_step(trainer, monkeypatch, spec, layers):
    """Its loss and gradient are autograd's, and tracing draws no random number."""
    monkeypatch.setattr(compiling, "inductor_compile", lambda graph, *arguments, **options: graph)
    run = trainer(objective=spec, layers=layers)
    [vector], x = run.optimiser.param_groups[0]["params"], run.pixels[:50]
    state = torch.get_rng_state()
    graph = compiling.compile_whole(engine.loss_and_gradient(run.objective, run.model, "highest"), vector.detach(), x)
    assert torch.equal(torch.get_rng_state(), state)
    for seed in range(2):
        torch.manual_seed(seed)
        loss, gradient = graph(vector.detach(), x)
        torch.manual_seed(seed)
        expected = run.objective(run.model, x)
        parts = torch.autograd.grad(expected, list(run.model.parameters()))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, torch.cat([p.flatten() for p in parts]), rtol=1e-4, atol=1e-4)


def test_what_is_computed_twice_is_computed_once_but_for_noise(monkeypatch):
    def function(x):
        once, again = (x + 1).exp(), (x.detach() + 1).exp()
        other = (x + 1.5).exp() * x.sum(0) + x.sum(1)
        return once + again + other + torch.randn_like(x) * torch.randn_like(x)

    kept = []
    monkeypatch.setattr(compiling, "inductor_compile", lambda graph, *arguments, **options: kept.append(graph) or graph)
    x = torch.randn(3, 3)
    compiled = compiling.compile_whole(function, x)
    counts = Counter(getattr(node.target, "overloadpacket", None) for node in kept[0].graph.nodes)
    aten = torch.ops.aten
    assert (counts[aten.exp], counts[aten.sum], counts[aten.randn_like], counts[aten.detach]) == (2, 2, 2, 0)
    torch.manual_seed(0)
    expected = function(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)


def test_more_samples_than_memory_could_hold_are_refused_before_a_step(trainer):
    run = trainer(objective="iwae(k=1_000_000_000)")
    with pytest.raises(ValueError, match=r"^k=1000000000 needs over \S+ GB a step, of \S+ GB on cpu: take fewer"):
        run.run()
    assert run.epoch == run.step == 0


def test_nor_are_they_timed_or_stacked(trainer, digits):
    runs = [trainer(f"{seed}.pt", objective="iwae(k=1_000_000_000)", seed=seed) for seed in (0, 1)]
    for work in (lambda: estimate_seconds({runs[0].config: 0}, digits, CPU), lambda: train_together(runs)):
        with pytest.raises(ValueError, match="k=1000000000 needs over"):
            work()


def test_a_step_that_no_memory_could_hold_can_be_traced(trainer):
    run = trainer()
    [vector] = run.optimiser.param_groups[0]["params"]
    function = engine.loss_and_gradient(run.objective, run.model, "highest")
    graph = compiling.functional_graph(function, vector.detach(), run.pixels[:1].expand(10**9, -1))
    assert any(compiling.is_random(node) for node in graph.graph.nodes)


def test_a_compiled_step_leaves_what_adam_leaves(trainer, monkeypatch):
    """The same bits in parameters, moments and count, from the first step or from a checkpoint's, at any rate."""
    monkeypatch.setattr(engine, "compile_whole", lambda function, *arguments: function)
    ends = []
    for name in ("eager", "compiled"):
        run = trainer()
        step, _ = make_step(Engine(name, ""), run.objective, run.model, run.optimiser, "highest", run.pixels[:100])
        torch.manual_seed(0)
        for rate in (1e-3, 1e-2):
            engine.set_rate(run.optimiser, rate)
            step(run.pixels[:100])
        run.optimiser.load_state_dict(run.optimiser.state_dict())
        step(run.pixels[:100])
        ends.append((run.model.state_dict(), run.optimiser.state_dict()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert ends[0][1]["state"][0]["step"] == 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_that_a_step_frees_is_kept_for_the_next():
    script = """
import resource, torch
from mcobjectives_examples.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10_000_000)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10
first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 10 and after == 0


def test_what_cannot_be_compiled_is_run_eagerly_and_says_why(trainer, monkeypatch):
    def compile_whole(*arguments):
        raise RuntimeError("data-dependent control flow\nand a long story")

    monkeypatch.setattr(engine, "compile_whole", compile_whole)
    run = trainer()
    arguments = run.objective, run.model, run.optimiser, "highest", run.pixels[:400]
    step, used = make_step(Engine("compiled", ""), *arguments)
    assert used == Engine("eager", "cannot be compiled: data-dependent control flow")
    assert torch.isfinite(step(run.pixels[:400]))


@pytest.mark.parametrize("where", ["compile_whole", "compiler_failure"])
def test_a_compiler_that_ctrl_c_stops_says_nothing_of_the_engine(trainer, monkeypatch, where):
    """The signal reaches the compiler too: what fails then compiles when the run goes on."""
    asked, real = [], engine.compile_whole

    def stopped(*arguments):
        asked.append(True)
        if where == "compile_whole":
            raise RuntimeError("C++ compile error")
        return "CppCompileError"

    monkeypatch.setattr(engine, "compiler_failure", lambda device: "")
    monkeypatch.setattr(engine, where, stopped)
    run = trainer(engine="compiled", hooks=Hooks(stop=lambda: bool(asked)))
    with pytest.raises(Interrupted):
        run.run()
    state = checkpoints.load(run.checkpoint, run.record, CPU)
    assert state["engine"] != "eager" and state["position"] == {"epoch": 0, "step": 0, "total": 0.0}
    compiled = []
    monkeypatch.setattr(engine, "compiler_failure", lambda device: "")
    monkeypatch.setattr(engine, "compile_whole", lambda *arguments: compiled.append(real) or eagerly(arguments[0]))
    again = trainer(engine="compiled")
    assert again.restore()
    again.run()
    assert compiled and again.engine.name == "compiled"


def eagerly(function):
    return lambda vector, x: function(vector.detach().requires_grad_(), x)


class _Stream:
    def wait_stream(self, other):
        pass


class _Graph:
    """A CUDA graph's part on a CPU: a replay runs again the step that was captured."""

    def replay(self):
        self.step.loss.copy_(self.eager(self.step.x))


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for CUDA's streams and graphs, whose own behaviour only a GPU can show."""
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())


@pytest.mark.parametrize("taken", [0, 2])
def test_capturing_a_step_leaves_no_trace(trainer, graphs, taken):
    """Of a fresh run and of one that has taken steps: parameters, moments and random numbers are as before."""
    runs = [trainer("a.pt"), trainer("b.pt")]
    x = runs[0].pixels[:400]
    steps = []
    for run, name in zip(runs, ("eager", "cuda-graph"), strict=True):
        torch.manual_seed(1)
        arguments = run.objective, run.model, run.optimiser, "highest", x
        eager, _ = make_step(Engine("eager", ""), *arguments)
        for _ in range(taken):
            eager(x)
        if name == "cuda-graph":
            steps.append(engine._GraphStep(eager, run.optimiser.param_groups[0]["params"][0], run.optimiser, x))
            steps[-1].graph.step, steps[-1].graph.eager = steps[-1], eager
        else:
            steps.append(eager)
        losses = [steps[-1](run.pixels[n : n + 400]).item() for n in (0, 400, 800)]
        run.history = losses
    assert same(*runs) and len(set(runs[0].history)) == 3


def test_a_capture_that_fails_falls_back_and_says_why(trainer, graphs, monkeypatch):
    def refuse(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    runs = [trainer("a.pt"), trainer("b.pt")]
    for run, name in zip(runs, ("eager", "cuda-graph"), strict=True):
        torch.manual_seed(1)
        step, used = make_step(Engine(name, ""), run.objective, run.model, run.optimiser, "highest", run.pixels[:400])
        run.history = [step(run.pixels[:400]).item() for _ in range(2)]
    assert used.why == "cannot be cuda-graph: operation not permitted when stream is capturing"
    assert used.name == "eager" and same(*runs)


def test_mixed_precision_is_within_its_error(trainer):
    run, objective = trainer(), IWAE(k=50)
    bounds = []
    for precision in ("highest", "mixed"):
        torch.manual_seed(0)
        with products(precision):
            bounds.append(objective.bound(run.model, run.pixels[:200]))
    error = bounds[1] - bounds[0]
    assert 0 < error.abs().max() < 0.5 and error.mean().abs() < 0.02


def test_resampled_mixed_training_ends_where_the_exact_one_does(trainer):
    def final(name, **changes):
        preset = dataclasses.replace(TINY, stages=((8, 2e-3),), **changes)
        runs = [trainer(f"{name}{seed}.pt", preset=preset, objective="iwae(k=10)", seed=seed) for seed in range(2)]
        for run in runs:
            run.run()
        return sum(run.history[-1] for run in runs) / 2

    exact = final("exact")
    for precision in ("mixed", "bf16"):
        assert abs(exact - final(precision, backward_samples=3, precision=precision)) < 0.3
    set_precision("highest")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["iwae(k=3)", "vae(k=3, analytic_kl=True)"])
def test_compiled_steps_equal_eager_ones_and_are_compiled_once(trainer, objective):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    runs = [trainer(f"{name}.pt", engine=name, objective=objective) for name in ("eager", "compiled")]
    for run in runs:
        run.run()
    assert [run.engine.name for run in runs] == ["eager", "compiled"]
    torch.testing.assert_close(runs[1].history, runs[0].history, rtol=1e-4, atol=0)
    assert counters["stats"]["unique_graphs"] - before <= 2  # the probe and the step, not one a pass


def test_flat_adam_is_adam_with_the_options_that_are_given():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    betas, eps, x = (0.7, 0.8), 1e-2, torch.randn(5, 3)
    plain = torch.optim.Adam(models[1].parameters(), lr=0.1, betas=betas, eps=eps)
    flat = flat_adam(models[0], betas, eps, 0.1)
    [vector] = flat.param_groups[0]["params"]
    for _ in range(3):
        gradients = torch.autograd.grad(models[0](x).square().sum(), models[0].parameters())
        vector.grad = torch.cat([g.flatten() for g in gradients])
        flat.step()
        plain.zero_grad()
        models[1](x).square().sum().backward()
        plain.step()
    for found, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found, expected)
