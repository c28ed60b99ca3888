"""Several runs trained as one have the numbers that each has alone."""

import dataclasses
import math
import time

import pytest
import torch
from runs import CPU, TINY, until

from mcobjectives_examples.config import Config
from mcobjectives_examples.hooks import NO_HOOKS, Hooks
from mcobjectives_examples.stacking import Stack, noise_apart, pays, stacks, train_together
from mcobjectives_examples.training import Interrupted, Trainer, TrainingError


@pytest.fixture
def trainers(digits, tmp_path):
    def build(folder, objective="iwae(k=3)", layers=1, engine="eager", hooks=NO_HOOKS, n=3, **changes):
        preset = dataclasses.replace(TINY, **changes)
        protocols = ("once", "epoch", "once")
        found = []
        for seed in range(n):
            config = Config("digits", protocols[seed], layers, objective, preset, seed)
            path = tmp_path / folder / f"{config.name}.pt"
            found.append(Trainer(config, digits, CPU, path, engine=engine, hooks=hooks))
            found[-1].restore()
        return found

    return build


def parameters(trainer):
    return trainer.optimiser.param_groups[0]["params"][0].detach()


def same_bits(a, b):
    return torch.equal(parameters(a), parameters(b)) and a.history == b.history


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "spec", ["vae(k=1)", "iwae(k=4, gradient='dreg')", "iwae(k=4, gradient='vimco')", "iwae(k=6, backward_samples=2)"]
)
def test_a_member_has_the_numbers_that_it_has_alone(trainers, spec, layers):
    """Losses, parameters and the state of its random numbers, through batches of two sizes and both protocols."""
    alone, together = trainers("alone", spec, layers), trainers("together", spec, layers)
    for trainer in alone:
        trainer.run()
    train_together(together)
    for one, member in zip(alone, together, strict=True):
        torch.testing.assert_close(member.history, one.history, rtol=2e-4, atol=0)
        torch.testing.assert_close(parameters(member), parameters(one), rtol=0, atol=2e-3)
        assert torch.equal(member.rng["cpu"], one.rng["cpu"])
        assert member.checkpoint.exists() and member.engine.name == "stacked-eager"
    assert len({trainer.history[-1] for trainer in together}) == 3


def test_one_step_of_a_stack_is_each_members_gradient(trainers):
    members = trainers("one")
    stack = Stack(members)
    for i, trainer in enumerate(members):
        stack.x[i] = trainer.pixels[100 * i : 100 * i + 400]
        torch.manual_seed(i)
        stack.noise[i] = stack.draw()
    losses = stack.gradients(range(3))
    for i, trainer in enumerate(members):
        torch.manual_seed(i)
        expected = trainer.objective(trainer.model, stack.x[i])
        parts = torch.autograd.grad(expected, list(trainer.model.parameters()))
        torch.testing.assert_close(losses[i], expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(stack.vectors[i].grad, torch.cat([p.flatten() for p in parts]), rtol=1e-3, atol=1e-4)


def test_noise_apart_draws_what_the_function_does():
    def function(scale, x):
        first = torch.randn(3, 4)
        return scale * first + x, torch.rand(2, dtype=torch.float64)

    scale, x = torch.tensor(2.0), torch.ones(4)
    draw, rest = noise_apart(function, scale, x)
    torch.manual_seed(5)
    expected = function(scale, x)
    torch.manual_seed(5)
    noise = draw()
    assert [n.shape for n in noise] == [(3, 4), (2,)]
    for a, b in zip(rest(scale, x, *noise), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(rest(scale, x, *noise)[0], rest(scale, x, *noise)[0])


def test_noise_that_depends_on_parameters_is_refused():
    with pytest.raises(ValueError, match="cannot be stacked: what it draws depends on its parameters or data"):
        noise_apart(lambda p, x: torch.bernoulli(p) + x, torch.full((3,), 0.5), torch.ones(3))


def test_chunks_are_refused(trainers):
    with pytest.raises(ValueError, match="cannot be stacked: chunk_size draws random numbers again"):
        train_together(trainers("chunks", "iwae(k=4, chunk_size=2)"))


def test_an_interrupted_stack_ends_with_the_same_bits(trainers):
    whole = trainers("whole")
    train_together(whole)
    with pytest.raises(Interrupted):
        train_together(trainers("stopped", hooks=until(16)))
    stopped = trainers("stopped")
    assert all((trainer.epoch, trainer.step) == (1, 2) for trainer in stopped)
    train_together(stopped)
    assert all(same_bits(*pair) for pair in zip(stopped, whole, strict=True))


def test_a_stop_that_is_asked_for_once_stops_all(trainers):
    asked = iter(range(1, 100))
    members = trainers("once", hooks=Hooks(stop=lambda: next(asked) == 5))
    with pytest.raises(Interrupted):
        train_together(members)
    assert all(trainer.steps_left > 8 for trainer in members)


def test_members_share_the_time_that_they_took(trainers):
    members, began = trainers("time"), time.monotonic()
    train_together(members)
    assert 0 < sum(trainer.seconds for trainer in members) <= time.monotonic() - began


def test_members_that_were_stopped_at_different_steps_end_with_the_same_bits(trainers, monkeypatch):
    """As when a run is killed while the checkpoints of one moment are being written."""
    whole = trainers("whole")
    train_together(whole)
    first = trainers("killed", hooks=until(28))
    older = {}

    def save(trainer, real=Trainer.save):
        real(trainer)
        if trainer.config.seed == 2 and trainer.epoch == 1:
            older.setdefault("state", trainer.checkpoint.read_bytes())

    monkeypatch.setattr(Trainer, "save", save)
    monkeypatch.setattr("mcobjectives_examples.training.SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    with pytest.raises(Interrupted):
        train_together(first)
    first[2].checkpoint.write_bytes(older["state"])
    again = trainers("killed")
    assert [(trainer.epoch, trainer.step) for trainer in again] == [(2, 2), (2, 2), (1, 0)]
    train_together(again)
    assert all(same_bits(*pair) for pair in zip(again, whole, strict=True))


def test_a_stopped_member_can_go_on_alone_and_says_so(trainers):
    notes = []
    with pytest.raises(Interrupted):
        train_together(trainers("left", hooks=until(4)))
    [alone] = trainers("left", n=1, hooks=Hooks(note=notes.append))
    alone.run()
    whole = trainers("alone", n=1)[0]
    whole.run()
    assert notes[0] == "the checkpoint is of stacked-eager steps, now it goes on alone: last digits may differ"
    torch.testing.assert_close(alone.history, whole.history, rtol=2e-4, atol=0)


def test_runs_that_began_alone_can_be_stacked_and_say_so(trainers):
    notes = []
    with pytest.raises(Interrupted):
        trainers("begun", n=1, hooks=until(2))[0].run()
    train_together(trainers("begun", hooks=Hooks(note=notes.append)))
    assert notes[0] == "the checkpoints are of eager steps: last digits may differ"


def test_a_finished_stack_is_left_alone(trainers):
    train_together(trainers("done"))
    done = trainers("done")
    before = [trainer.checkpoint.read_bytes() for trainer in done]
    train_together(done)
    assert before == [trainer.checkpoint.read_bytes() for trainer in done]


def test_a_member_that_fails_is_named_by_its_own_error(trainers):
    members = trainers("failing")
    with torch.no_grad():
        parameters(members[1]).fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite"):
        train_together(members)


@pytest.mark.slow
def test_compiled_stacks_have_the_same_numbers(trainers):
    torch._dynamo.reset()
    alone, together = trainers("alone", "vae(k=1)"), trainers("together", "vae(k=1)", engine="compiled")
    for trainer in alone:
        trainer.run()
    train_together(together)
    for one, member in zip(alone, together, strict=True):
        torch.testing.assert_close(member.history, one.history, rtol=2e-4, atol=0)
        assert member.engine.name == "stacked"


def test_without_a_compiler_a_stack_is_eager(trainers, monkeypatch):
    monkeypatch.setattr("mcobjectives_examples.engine.compiler_failure", lambda device: "NoCompiler")
    members = trainers("none", engine="compiled")
    train_together(members)
    assert {trainer.engine.name for trainer in members} == {"stacked-eager"}


def test_what_is_stacked():
    cells = [
        Config("digits", protocol, layers, f"vae(k={k})", TINY, seed)
        for seed in range(2)
        for protocol in ("once", "epoch")
        for layers in (1, 2)
        for k in (1, 5)
    ]
    groups = stacks(cells)
    assert len(groups) == 4 and all(len(group) == 4 for group in groups)
    assert sorted(map(str, cells)) == sorted(str(c) for group in groups for c in group)
    assert all(len({(c.layers, c.objective) for c in group}) == 1 for group in groups)
    assert pays(1, CPU) and not pays(5, CPU) and pays(50, torch.device("cuda"))
