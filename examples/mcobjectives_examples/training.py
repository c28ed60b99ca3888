"""Train one cell: data on the device, an explicit seed, checkpoints from which a killed run goes on bit for bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcobjectives_examples import checkpoints
from mcobjectives_examples.binarisation import binarise
from mcobjectives_examples.config import Config, name_of, training_objective
from mcobjectives_examples.engine import (
    ENGINES,
    Engine,
    Step,
    choose_engine,
    flat_adam,
    make_step,
    require_engine,
    set_rate,
)
from mcobjectives_examples.hooks import NO_HOOKS, Hooks, Interrupted
from mcobjectives_examples.memory import require_memory
from mcobjectives_examples.models import PaperModel, paper_model
from mcobjectives_examples.provenance import provenance, with_part
from mcobjectives_examples.results import are_parts
from mcobjectives_examples.sources import Dataset

SECONDS_BETWEEN_CHECKPOINTS = 20.0


class TrainingError(RuntimeError):
    """Training went wrong: a bound or a parameter is not finite any more. The last checkpoint is kept."""


def advance(batches: Generator[Tensor, Tensor | None, None], loss: Tensor | None) -> Tensor | None:
    """The next batch of a run, None at its end, after the loss of the last one (None before the first)."""
    try:
        return batches.send(loss)
    except StopIteration:
        return None


class Trainer:
    """One training run: build it, `restore()` if its checkpoint is there, `run()`."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        checkpoint: Path,
        *,
        engine: str = "auto",
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        require_engine(engine)
        self.config, self.preset, self.device, self.checkpoint = config, config.preset, device, checkpoint
        self.record = config.to_dict(dataset.checksum)
        self.objective = training_objective(config.objective, config.preset)
        self.wanted_engine, self.hooks = engine, hooks
        torch.manual_seed(config.seed)
        self.grey = dataset.train
        drawn = binarise(self.grey, config.binarisation, self._generator("once"))  # an unfit protocol raises here
        self.pixels = (drawn if config.binarisation == "once" else self.grey).to(device)
        self.model: PaperModel = paper_model(config.layers, dataset.train.mean(0), config.latent).to(device)
        self.optimiser = flat_adam(self.model, self.preset.betas, self.preset.eps)
        self.epoch = self.step = 0
        self.total = torch.zeros((), dtype=torch.float64, device=device)  # of the current pass's bounds
        self.history: list[float] = []
        self.seconds = 0.0
        self.together = 1  # runs that share the time of this one's steps
        self.engine: Engine | None = None
        self.surroundings = provenance()  # as the run starts: the checkout may move on while it trains
        self.earlier_parts: list[dict[str, Any]] = []  # of other processes
        self.rng = self._rng_state()  # what others draw between now and `run` changes nothing

    @property
    def steps_per_pass(self) -> int:
        return math.ceil(len(self.pixels) / self.preset.batch_size)

    @property
    def steps_left(self) -> int:
        return (self.preset.passes - self.epoch) * self.steps_per_pass - self.step

    @property
    def passes_done(self) -> float:
        return self.epoch + self.step / self.steps_per_pass

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Up to which pass, by which engine and in which surroundings the run was made; the last is at work."""
        engine = self.engine.name if self.engine else ""
        now = {"to_pass": self.passes_done, "engine": engine, "provenance": self.surroundings}
        return with_part(self.earlier_parts, now)

    def run(self) -> None:
        """Train to the end of the preset; raises `Interrupted` after a checkpoint once the hook `stop()` is true."""
        with self.own_random_numbers():
            step = self._step_function() if self.epoch < self.preset.passes else None
            batches = self.batches(self.hooks.stop)
            x = advance(batches, None)
            while x is not None and step is not None:
                x = advance(batches, self.loss(step, x))

    def batches(self, stop: Callable[[], bool]) -> Generator[Tensor, Tensor | None, None]:
        """The batches from here to the end; each is answered by the loss of the step taken on it.

        The rate is set before a batch and checkpoints are written between them; raises as `run` does, at this `stop()`.
        """
        self.model.train()
        last_saved = time.monotonic()
        while self.epoch < self.preset.passes:
            last_saved = yield from self._one_pass(stop, last_saved)
        self.save()

    def loss(self, step: Step, x: Tensor) -> Tensor:
        """Take a step; what it cannot do with its numbers is a `TrainingError` of this run."""
        try:
            return step(x)
        except ValueError as error:
            raise self._failed(str(error)) from error

    def first_batch(self) -> Tensor:
        """A batch of the usual size, to make a step function for."""
        return self._batch(self._order(), 0)

    @contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Inside, torch's generator goes on from where this run left it; what others draw outside changes nothing."""
        self._set_rng_state(self.rng)
        try:
            yield
        finally:
            self.rng = self._rng_state()

    def _step_function(self) -> Step:
        stop = self.hooks.stop
        already = stop()
        precision = self.preset.precision
        # After a restart the same engine as before: another one rounds differently.
        before, x = self.engine, self.first_batch()
        require_memory(self.objective, x)
        if before and before.name not in ENGINES:
            self.hooks.note(f"the checkpoint is of {before.name} steps, now it goes on alone: last digits may differ")
            before = None
        wanted = before.name if before else self.wanted_engine
        chosen = choose_engine(wanted, self.objective, self.model, precision, x, self.steps_left)
        interrupted = stop() and not already  # a Ctrl-C stops a compiler too, whose failure then says nothing
        self.engine = before if interrupted or (before and before.name == chosen.name) else chosen
        self.save()  # a folder that cannot be written shows before the work
        if interrupted:
            raise Interrupted
        step, made = make_step(self.engine or chosen, self.objective, self.model, self.optimiser, precision, x)
        if stop() and not already:
            raise Interrupted
        self.engine = made
        self.hooks.note(f"{self.engine.name} steps: {self.engine.why}")
        self.save()  # the choice of engine is kept
        return step

    def _one_pass(self, stop: Callable[[], bool], last_saved: float) -> Generator[Tensor, Tensor | None, float]:
        began = time.monotonic()
        order = self._order()
        pixels = self.pixels
        if self.config.binarisation == "epoch":
            pixels = binarise(self.grey, "epoch", self._generator("epoch", self.epoch)).to(self.device)
        while self.step < self.steps_per_pass:
            rate = self.preset.learning_rate(self.epoch + self.step / self.steps_per_pass)
            set_rate(self.optimiser, rate)
            x = self._batch(order, self.step, pixels)
            loss = yield x
            assert loss is not None
            self.total -= loss * len(x)
            self.step += 1
            self.hooks.on_progress("train", self.passes_done, self.preset.passes)
            if stop() and self.step < self.steps_per_pass:
                self.seconds += (time.monotonic() - began) / self.together
                self.save()
                raise Interrupted
        bound = float(self.total) / len(pixels)
        if not math.isfinite(bound):
            raise self._failed(f"the mean bound is {bound}")
        self.history.append(bound)
        self.hooks.log(f"train/{name_of(self.config.objective)}", bound, self.epoch + 1)
        self.hooks.log("train/learning_rate", rate, self.epoch + 1)
        self.total.zero_()
        self.epoch, self.step = self.epoch + 1, 0
        now = time.monotonic()
        self.seconds += (now - began) / self.together
        if now - last_saved > SECONDS_BETWEEN_CHECKPOINTS or stop():
            self.save()
            last_saved = time.monotonic()
        if stop() and self.epoch < self.preset.passes:
            raise Interrupted
        return last_saved

    def _failed(self, why: str) -> TrainingError:
        number = min(self.epoch + 1, self.preset.passes)
        return TrainingError(
            f"pass {number}: {why}; the checkpoint before it is kept in {self.checkpoint}; try another seed or preset"
        )

    def _order(self) -> Tensor:
        return torch.randperm(len(self.pixels), generator=self._generator("order", self.epoch)).to(self.device)

    def _batch(self, order: Tensor, step: int, pixels: Tensor | None = None) -> Tensor:
        size = self.preset.batch_size
        return (self.pixels if pixels is None else pixels)[order[step * size : (step + 1) * size]]

    def _generator(self, purpose: str, epoch: int = 0) -> torch.Generator:
        # One stream for each purpose and pass, on the CPU: neither an interruption nor the device changes it.
        seed = sum(map(ord, purpose)) + 1_000 * epoch + 1_000_003_000 * self.config.seed
        return torch.Generator().manual_seed(seed)

    # Checkpoints

    def save(self) -> None:
        """Write the checkpoint; raises `TrainingError`, and keeps the old one, if a number in it is not finite."""
        if not all(bool(torch.isfinite(part).all()) for part in (*self.model.parameters(), self.total)):
            raise self._failed("a parameter or the bound is not finite")
        self.rng = self._rng_state()
        checkpoints.save(
            self.checkpoint,
            {
                "config": json.dumps(self.record),
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "position": {"epoch": self.epoch, "step": self.step, "total": float(self.total)},
                "history": self.history,
                "seconds": self.seconds,
                "engine": self.engine.name if self.engine else "",
                "threads": torch.get_num_threads(),
                "device": self.device.type,
                "parts": self.parts,
                "rng": self.rng,
            },
        )

    def restore(self) -> bool:
        """Go on from the checkpoint, if there is one; raises `CheckpointError` if it is broken or another run's."""
        if not self.checkpoint.exists():
            return False
        state = checkpoints.load(self.checkpoint, self.record, "cpu")
        with checkpoints.readable(self.checkpoint):
            self.model.load_state_dict(state["model"])
            [group] = self.optimiser.param_groups
            own = {key: group[key] for key in ("lr", "fused", "capturable")}
            self.optimiser.load_state_dict(state["optimiser"])
            self.optimiser.param_groups[0].update(own)  # of this device: a CUDA graph reads the rate from its tensor
            self.epoch = checkpoints.passes_of(state, self.preset.passes)
            most = 0 if self.epoch == self.preset.passes else self.steps_per_pass - 1
            self.step = checkpoints.whole_number("step", state["position"]["step"], most)
            self.history, self.seconds = list(state["history"]), state["seconds"]
            total = state["position"]["total"]
            if len(self.history) != self.epoch or not all(map(math.isfinite, (*self.history, self.seconds, total))):
                raise ValueError("its history, seconds or total are not those of its passes")
            self.total.fill_(total)
            self.engine = Engine(state["engine"], "as in the checkpoint") if state["engine"] else None
            self.rng = state["rng"]
            self._set_rng_state(self.rng)
            before, now = state["threads"], torch.get_num_threads()
            device = state.get("device", self.device.type)
            unknown = [{"to_pass": self.passes_done, "engine": state["engine"], "provenance": None}]
            self.earlier_parts = _not_empty(state.get("parts", unknown))
        if before != now:
            self.hooks.note(
                f"the checkpoint is from a run on {before} threads, this is on {now}: last digits may differ"
            )
        if device != self.device.type:
            self.hooks.note(
                f"the checkpoint is from a run on {device}, this is on {self.device.type}: the noise is another"
            )
        return True

    def _rng_state(self) -> dict[str, Tensor]:
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"cpu": torch.get_rng_state(), **cuda}

    def _set_rng_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _not_empty(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts in which any step was taken; raises `ValueError` for what are no parts of a run."""
    if not are_parts(parts):
        raise ValueError("its parts are not those of a run")
    begun = [0.0, *(part["to_pass"] for part in parts)]
    return [part for part, before in zip(parts, begun, strict=False) if part["to_pass"] > before]
