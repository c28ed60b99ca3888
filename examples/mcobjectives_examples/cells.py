"""One cell of a table: train it, evaluate it, record it. What is recorded is not run again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcobjectives_examples import checkpoints
from mcobjectives_examples.config import Config, differing
from mcobjectives_examples.engine import require_engine
from mcobjectives_examples.evaluating import evaluate_model, scalars, test_images
from mcobjectives_examples.files import locked, require_unlocked, write_json
from mcobjectives_examples.hooks import NO_HOOKS, Hooks, or_interrupted
from mcobjectives_examples.results import read_result
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.training import Trainer


@dataclass(frozen=True)
class Place:
    """How and where cells are run, and where they are recorded; raises `ValueError` for an engine that is none."""

    out: Path
    device: torch.device
    data_dir: Path | None = None
    engine: str = "auto"
    tensorboard: Path | None = None

    def __post_init__(self) -> None:
        require_engine(self.engine)


def result_path(out: Path, config: Config) -> Path:
    return out / f"{config.name}.json"


def checkpoint_path(out: Path, config: Config) -> Path:
    return out / f"{config.name}.pt"


def first_stage_path(out: Path, config: Config) -> Path:
    return out / f"{config.first_stage_name}.pt"


def cell_lock(out: Path, config: Config) -> AbstractContextManager[None]:
    """To be held by whoever makes a cell, from before its checkpoint is read until its result is written."""
    return locked(out / config.name)


def recorded(
    out: Path, config: Config, dataset_sha256: str | None = None, option: str = "--out"
) -> dict[str, Any] | None:
    """The recorded result of a cell, None if there is none; raises if the file is another configuration's.

    `option` is the one that chooses the folder, for messages.
    """
    path = result_path(out, config)
    if not path.exists():
        return None
    result = read_result(path)
    theirs = result["config"]
    found = differing(theirs, config.to_dict(dataset_sha256 or str(theirs.get("data_sha256"))))
    if found:
        raise checkpoints.CheckpointError(
            f"{path} was recorded with other settings ({found}): choose another {option} or move it away"
        )
    return result


def passes_done(out: Path, configs: Sequence[Config], dataset_sha256: str, option: str = "--out") -> dict[Config, int]:
    """How many passes the checkpoints of cells that are to be run hold, 0 without one.

    Raises `CheckpointError` where one is broken or another run's, or where a second stage's first one is not among the
    cells and cannot be gone on from, and `OutputError` where another process is at work on one: before work on any of
    them, not when its turn comes.
    """
    names = {config.name for config in configs}
    done = dict.fromkeys(configs, 0)
    for config in configs:
        require_unlocked(out / config.name)
        path = checkpoint_path(out, config)
        if path.exists():
            with checkpoints.readable(path):
                state = checkpoints.load(path, config.to_dict(dataset_sha256), "cpu", option)
                done[config] = checkpoints.passes_of(state, config.preset.passes)
        elif config.after is not None and config.first_stage_name not in names:
            first = first_stage_path(out, config)
            if not first.exists():
                raise checkpoints.CheckpointError(
                    f"{config.name} goes on from {first}, which is not there: move {first.stem}.json away to train "
                    f"that first stage again, or choose another {option}"
                )
            first_stage(out, config, dataset_sha256)
    return done


def first_stage(out: Path, config: Config, dataset_sha256: str) -> dict[str, Any]:
    """The checkpoint that a second stage goes on from.

    Raises `CheckpointError` unless it is of a finished first stage of this very cell, and of the run that is recorded
    beside it, if one is.
    """
    path = first_stage_path(out, config)
    state = checkpoints.load(path, None, "cpu")
    theirs = json.loads(state["config"])
    expected = config.to_dict(dataset_sha256) | {"objective": config.after, "after": None}
    if differing(theirs, expected | {"preset": theirs.get("preset")}):
        raise checkpoints.CheckpointError(f"{path} is not the first stage of {config.name}: move it away")
    record = path.with_suffix(".json")
    if record.exists() and differing(read_result(record)["config"], theirs):
        raise checkpoints.CheckpointError(
            f"{path} was trained with other settings than {record.name} records: move both away to train that "
            "first stage again"
        )
    with checkpoints.readable(path):
        whole = Config.from_dict(theirs).preset.passes
        if checkpoints.passes_of(state, whole) < whole:
            raise checkpoints.CheckpointError(f"{path} is not trained to its end: train the first stage first")
    return state


def trainer_of(config: Config, dataset: Dataset, place: Place, hooks: Hooks = NO_HOOKS) -> Trainer:
    """The cell's run: from its checkpoint, or for a second stage from the first one's, or from the beginning."""
    checkpoint = checkpoint_path(place.out, config)
    trainer = Trainer(config, dataset, place.device, checkpoint, engine=place.engine, hooks=hooks)
    if not trainer.restore() and config.after is not None:
        state = first_stage(place.out, config, dataset.checksum)
        with checkpoints.readable(first_stage_path(place.out, config)):
            trainer.model.load_state_dict(state["model"])
    return trainer


def run_cell(config: Config, dataset: Dataset, place: Place, hooks: Hooks = NO_HOOKS) -> dict[str, Any]:
    """The cell's result, from its file or by training; raises `Interrupted` with a checkpoint if `stop()` is true."""
    found = recorded(place.out, config, dataset.checksum)
    if found is not None:
        return found
    trainer = trainer_of(config, dataset, place, hooks)
    trainer.run()
    began = time.monotonic()
    with or_interrupted(hooks.stop):
        metrics = evaluate_model(trainer.model, test_images(dataset, config), config.preset, hooks)
    for name, value in scalars(metrics):
        hooks.log(f"test/{name}", value, trainer.epoch)
    *earlier, last = trainer.parts
    result = {
        "config": trainer.record,
        "metrics": metrics,
        "learning_curve": trainer.history,
        "data": dataset.record(),
        "engine": last["engine"],
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": {"train": round(trainer.seconds, 2), "evaluate": round(time.monotonic() - began, 2)},
        "provenance": last["provenance"],
        **({"earlier_parts": earlier} if earlier else {}),
    }
    write_json(result_path(place.out, config), result)
    return result
