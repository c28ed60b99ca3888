"""Training runs: the same bits for a seed, whole or interrupted or killed, and every image in each pass."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch
from runs import CPU, EVERY_STEP, MCOBJ, TINY, same, until, wait_for

from mcobjectives_examples import checkpoints, training
from mcobjectives_examples.config import Config
from mcobjectives_examples.engine import set_rate
from mcobjectives_examples.errors import DataError
from mcobjectives_examples.hooks import Hooks
from mcobjectives_examples.presets import configured
from mcobjectives_examples.training import Interrupted


def test_the_same_seed_gives_the_same_bits_and_another_does_not(trainer):
    runs = [trainer(f"{i}.pt", seed=seed) for i, seed in enumerate((0, 0, 1))]
    for run in runs:
        run.run()
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert runs[0].history == sorted(runs[0].history)  # and it learns


@pytest.mark.parametrize("binarisation", ["once", "epoch"])
@pytest.mark.parametrize("steps", [1, 4, 6, 7, 8, 12])
def test_an_interrupted_run_ends_with_the_same_bits(trainer, binarisation, steps):
    whole = trainer("whole.pt", binarisation=binarisation, objective="iwae(k=3, backward_samples=2)")
    whole.run()
    first = trainer(binarisation=binarisation, objective="iwae(k=3, backward_samples=2)", hooks=until(steps))
    with pytest.raises(Interrupted) if steps < 12 else contextlib.nullcontext():
        first.run()
    second = trainer(binarisation=binarisation, objective="iwae(k=3, backward_samples=2)")
    torch.manual_seed(999)  # whatever the state of the process was
    assert second.restore()
    second.run()
    assert same(second, whole)


def recording(seen):
    """A `make_step` that keeps every batch and whose loss is its mean number of bright pixels."""
    return lambda engine, *arguments: (lambda x: seen.append(x) or x.sum(1).mean(), engine)


def test_every_image_counts_once_in_a_pass(trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "make_step", recording(seen))
    run = trainer()
    run.run()
    assert [len(x) for x in seen] == [400, 400, 400, 300] * 3
    for i in range(3):
        ordered = torch.cat(seen[4 * i : 4 * i + 4])
        assert torch.equal(ordered.unique(dim=0), run.pixels.unique(dim=0))
        assert not torch.equal(ordered, torch.cat(seen[4 * i - 4 : 4 * i] or seen[4:8]))
    torch.testing.assert_close(run.history, [-float(run.pixels.sum(1).double().mean())] * 3, rtol=1e-6, atol=0)


def test_binarised_once_or_before_every_pass(trainer, monkeypatch):
    for binarisation, distinct in (("once", 1), ("epoch", 3)):
        seen = []
        monkeypatch.setattr(training, "make_step", recording(seen))
        trainer(f"{binarisation}.pt", binarisation=binarisation).run()
        counts = [float(torch.cat(seen[4 * i : 4 * i + 4]).sum()) for i in range(3)]
        assert len(set(counts)) == distinct and all(((x == 0) | (x == 1)).all() for x in seen)


@pytest.mark.parametrize("binarisation", ["fixed", "twice"])
def test_an_unfit_binarisation_is_refused_at_once(trainer, binarisation):
    with pytest.raises(DataError, match="binarisation"):
        trainer(binarisation=binarisation)


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must be from 0 to 2147483647, got {seed}"):
        Config("digits", "once", 1, "iwae(k=3)", TINY, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("engine_name", "binarisation"), [("eager", "once"), ("eager", "epoch"), ("compiled", "once")])
def test_a_killed_run_ends_with_the_same_bits(trainer, tmp_path, engine_name, binarisation):
    preset = configured("smoke", ["passes=15", "nll_k=20", "batch_size=400"])[0]
    whole = trainer("whole.pt", preset=preset, binarisation=binarisation, engine=engine_name)
    whole.run()
    assert whole.engine.name == engine_name
    command = [
        sys.executable,
        "-c",
        f"{EVERY_STEP}\n{MCOBJ}",
        "train",
        "--dataset",
        "digits",
        "--objective",
        "iwae(k=3)",
        "--device=cpu",
    ]
    command += [f"--engine={engine_name}", "--set=passes=15", "--set=nll_k=20", "--set=batch_size=400"]
    command += ["--binarisation", binarisation, "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    checkpoint = tmp_path / "out" / f"{whole.config.name}.pt"

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    for writes, pause in ((3, 0.0), (4, 0.005)):
        process = start()
        wait_for(process, checkpoint, writes)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stderr.close()
        assert 0 < checkpoints.load(checkpoint, None, CPU)["position"]["epoch"] < 15
    process = start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    state = checkpoints.load(checkpoint, whole.record, CPU)
    assert state["history"] == whole.history
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in state["model"].items())


def test_the_optimiser_has_the_presets_options(trainer):
    run = trainer(preset=dataclasses.replace(TINY, betas=(0.5, 0.9), eps=0.25))
    [group] = run.optimiser.param_groups
    assert (group["betas"], group["eps"]) == ((0.5, 0.9), 0.25)


def test_the_rate_is_set_before_every_step(trainer, monkeypatch):
    rates = []
    monkeypatch.setattr(training, "set_rate", lambda optimiser, rate: rates.append(rate))
    monkeypatch.setattr(training, "make_step", recording([]))
    trainer().run()
    assert rates == [TINY.learning_rate(i / 4) for i in range(12)] and len(set(rates)) == 12


def test_another_seed_has_another_order_and_other_pixels(trainer):
    one, other = (trainer(f"{seed}.pt", seed=seed) for seed in (0, 1))
    assert not torch.equal(one._order(), other._order())
    assert not torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("binarisation", ["once", "epoch"])
def test_the_output_bias_is_of_the_grey_means(trainer, digits, binarisation):
    bias = trainer(binarisation=binarisation).model.decoder[-1].bias
    torch.testing.assert_close(bias.detach(), torch.logit(digits.train.mean(0).clamp(0.001, 0.999)))


def test_a_runs_seconds_are_its_share(trainer, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "make_step", recording([]))

    def tick(*progress):
        clock[0] += 1

    run = trainer(hooks=Hooks(on_progress=tick))
    run.together = 4
    run.run()
    assert run.seconds == 12 / 4


def test_every_purpose_pass_and_seed_has_a_stream_of_its_own(trainer):
    runs = [trainer(f"{seed}.pt", seed=seed) for seed in (0, 1)]
    streams = [("once", 0), *product(("epoch", "order"), range(3280))]
    seeds = [run._generator(*stream).initial_seed() for run in runs for stream in streams]
    assert len(set(seeds)) == len(seeds)


def test_an_interrupted_runs_seconds_are_its_share_too(trainer, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "make_step", recording([]))
    taken = []

    def tick(*progress):
        clock[0] += 1
        taken.append(progress)

    run = trainer(hooks=Hooks(on_progress=tick, stop=lambda: len(taken) >= 6))
    run.together = 4
    with pytest.raises(training.Interrupted):
        run.run()
    assert run.seconds == 6 / 4


def test_a_restored_run_goes_on_with_the_seconds_it_took(trainer):
    first, second = trainer(hooks=until(2)), trainer()
    with pytest.raises(training.Interrupted):
        first.run()
    assert second.restore() and second.seconds == first.seconds > 0


def surrounded(monkeypatch, commit, date="2025-01-02T03:04:05+00:00"):
    """From here on runs are begun in these surroundings."""
    machine = {"cpu": "a processor", "cores": 2, "threads": 1}
    told = {"versions": {"mcobjectives": "0.1.0", "torch": "2.9"}, "commit": commit, "machine": machine, "date": date}
    monkeypatch.setattr(training, "provenance", lambda: told)
    return told


def test_a_run_tells_of_all_its_parts(trainer, monkeypatch):
    first, again, other = (
        surrounded(monkeypatch, *made) for made in (("a", "2025-01-01"), ("a", "2025-01-02"), ("b", "2025-01-03"))
    )
    for surroundings, steps in ((first, 2), (again, 3), (other, 1), (other, 99)):
        monkeypatch.setattr(training, "provenance", lambda now=surroundings: now)
        run = trainer(hooks=until(steps))
        run.restore()
        with pytest.raises(Interrupted) if steps < 99 else contextlib.nullcontext():
            run.run()
    assert run.parts == [
        {"to_pass": 1.25, "engine": "eager", "provenance": first},
        {"to_pass": 3.0, "engine": "eager", "provenance": other},
    ]
    surrounded(monkeypatch, "c")  # in which no step is taken
    last = trainer()
    assert last.restore() and last.parts[:2] == run.parts and len(last.parts) == 3
    last.save()
    surrounded(monkeypatch, "d")
    assert last.restore() and last.parts[:2] == run.parts and len(last.parts) == 3


def test_of_a_part_before_parts_were_recorded_the_surroundings_are_not_known(saved, trainer):
    state = torch.load(saved.checkpoint, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "parts"}, saved.checkpoint)
    run = trainer()
    assert run.restore()
    run.run()
    earlier, last = run.parts
    assert earlier == {"to_pass": 0.5, "engine": "eager", "provenance": None} and last["provenance"]["machine"]


def test_a_rate_that_is_a_tensor_is_set_in_place():
    rate = torch.tensor(1e-3)
    optimiser = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=rate)
    set_rate(optimiser, 0.25)
    assert optimiser.param_groups[0]["lr"] is rate and rate == 0.25
