"""What is kept of a run: nothing that is not finite, nothing half-written, nothing of another run."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest
import torch
from runs import CPU, TINY, until

from mcobjectives_examples import checkpoints, files, training
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.files import OutputError, locked, require_unlocked, require_writable
from mcobjectives_examples.hooks import Hooks
from mcobjectives_examples.training import TrainingError

# Not finite any more.


def test_a_bound_that_is_not_finite_keeps_the_checkpoint_before(trainer, monkeypatch):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    run = trainer()
    good = run.checkpoint

    def broken(x):
        return x.mean() * (math.nan if run.epoch == 1 else 1)

    monkeypatch.setattr(training, "make_step", lambda engine, *a: (broken, engine))
    with pytest.raises(TrainingError, match=r"pass 2: the mean bound is nan; .*run\.pt"):
        run.run()
    kept = checkpoints.load(good, run.record, CPU)
    assert kept["position"] == {"epoch": 1, "step": 0, "total": 0.0} and len(kept["history"]) == 1


@pytest.mark.parametrize("stopped", [True, False])
def test_parameters_that_are_not_finite_are_never_saved(trainer, monkeypatch, stopped):
    run = trainer(hooks=until(10 if stopped else 99))

    def ruin(x):
        if run.epoch == 2 and run.step == 1:
            next(run.model.parameters()).data.fill_(math.nan)
        return x.mean()

    monkeypatch.setattr(training, "make_step", lambda engine, *a: (ruin, engine))
    with pytest.raises(TrainingError, match="pass 3: a parameter"):
        run.run()
    again = trainer()
    assert again.restore() and all(torch.isfinite(p).all() for p in again.model.parameters())


def test_a_learning_rate_that_is_far_too_large_is_a_training_error(trainer):
    run = trainer(preset=dataclasses.replace(TINY, stages=((3, 1e30),), one_cycle=False))
    with pytest.raises(TrainingError, match="pass 1: "):
        run.run()


# Checkpoints.


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_crash_while_writing_keeps_the_old_file(saved, monkeypatch, function):
    old = saved.checkpoint.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match="No space left on device: choose another folder with --out"):
        saved.save()
    assert saved.checkpoint.read_bytes() == old
    assert os.listdir(saved.checkpoint.parent) == ["run.pt"]


def test_a_file_that_could_not_be_written_is_named_before_the_work(tmp_path):
    require_writable(tmp_path / "new" / "figure.png")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"^cannot write \S+/taken/figure\.png: .*: choose another folder with --out"):
        require_writable(tmp_path / "taken" / "figure.png")


def test_content_is_on_the_disk_before_it_takes_the_name_and_then_the_name_is(saved, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def forced(file):
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    monkeypatch.setattr(os, "fsync", forced)
    monkeypatch.setattr(os, "replace", lambda *names: done.append("rename") or replace(*names))
    saved.save()
    assert done == ["file", "rename", "folder"]


def test_a_disk_that_fills_up_keeps_the_old_file(saved):
    old = saved.checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*run\.pt: .*File too large: choose another folder"):
            saved.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.checkpoint.read_bytes() == old
    assert os.listdir(saved.checkpoint.parent) == ["run.pt"]


def test_a_folder_that_cannot_be_written_shows_before_the_first_step(trainer, tmp_path):
    (tmp_path / "out").write_text("a file")
    run = trainer("out/run.pt")
    with pytest.raises(OutputError, match="cannot write"):
        run.run()
    assert run.step == run.epoch == 0


def test_files_get_the_usual_permissions(saved, tmp_path):
    (tmp_path / "usual").write_text("")
    assert saved.checkpoint.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_what_one_process_writes_no_other_does(tmp_path):
    path = tmp_path / "new" / "run-k-0.5-seed1"
    with locked(path), locked(path.with_name("run-k-0.5-seed10")):
        for refuses in (locked(path).__enter__, lambda: require_unlocked(path)):
            with pytest.raises(
                OutputError, match=r"another process is at work on .*/run-k-0.5-seed1: wait for its end"
            ):
                refuses()
    assert not list(path.parent.iterdir())
    require_unlocked(path)
    with locked(path):
        pass


def test_a_killed_process_holds_no_lock_and_what_it_left_half_written_is_removed(tmp_path):
    path = tmp_path / "run-seed1"
    code = f"""
import os, signal
from pathlib import Path
from mcobjectives_examples.files import locked, write_atomically
path = Path({str(path)!r})
with locked(path):
    write_atomically(path.with_suffix(".pt"), lambda file: os.kill(os.getpid(), signal.SIGTERM))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGTERM
    others = tmp_path / ".run-seed10.pt.0123abcd.part"
    others.write_text("")
    assert len(list(tmp_path.glob(".run-seed1.pt.*.part"))) == 1 and (tmp_path / ".run-seed1.lock").exists()
    require_unlocked(path)
    assert list(tmp_path.iterdir()) == [others]


def test_a_lock_that_its_owner_has_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, flock = tmp_path / "run", files.fcntl.flock

    def late(file, how):
        monkeypatch.setattr(files.fcntl, "flock", flock)
        (tmp_path / ".run.lock").unlink()
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with locked(path), pytest.raises(OutputError, match="another process"), locked(path):
        pass


@pytest.mark.parametrize("without", ["fcntl", "locks of the file system"])
def test_where_there_are_no_locks_nothing_is_locked(tmp_path, monkeypatch, without):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    if without == "fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(saved, trainer, tmp_path):
    state = torch.load(saved.checkpoint, weights_only=True)
    torch.save(state | {"history": Evil(tmp_path / "owned")}, saved.checkpoint)
    old = saved.checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        trainer().restore()
    assert not (tmp_path / "owned").exists() and saved.checkpoint.read_bytes() == old


def _place(path, state, **changes):
    """Write a checkpoint with another position, history or time."""
    position = state["position"] | {key: value for key, value in changes.items() if key in state["position"]}
    torch.save(state | changes | {"position": position}, path)


SPOIL = {
    "empty": lambda path, state: path.write_bytes(b""),
    "garbage": lambda path, state: path.write_bytes(b"garbage" * 1000),
    "half": lambda path, state: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a few bytes short": lambda path, state: path.write_bytes(path.read_bytes()[:-30]),
    "a list": lambda path, state: torch.save([1], path),
    "a tensor": lambda path, state: torch.save(torch.ones(3), path),
    "another format": lambda path, state: torch.save(state | {"format": 99}, path),
    "no configuration": lambda path, state: torch.save({"format": checkpoints.FORMAT}, path),
    "a broken configuration": lambda path, state: torch.save(state | {"config": "{"}, path),
    "another run's": lambda path, state: torch.save(state | {"config": state["config"].replace("iwae", "vae")}, path),
    "no optimiser": lambda path, state: torch.save({k: v for k, v in state.items() if k != "optimiser"}, path),
    "another model's": lambda path, state: torch.save(state | {"model": {"weight": torch.ones(2)}}, path),
    "no model at all": lambda path, state: torch.save(state | {"model": 3}, path),
    "a foreign position": lambda path, state: torch.save(state | {"position": None}, path),
    "a pass before the first": lambda path, state: _place(path, state, epoch=-5),
    "a pass after the last": lambda path, state: _place(path, state, epoch=4, history=[-1.0] * 4),
    "half a pass": lambda path, state: _place(path, state, epoch=0.5),
    "no passes without a history": lambda path, state: _place(path, state, epoch=1),
    "a step after the last": lambda path, state: _place(path, state, step=4),
    "a step after the last pass": lambda path, state: _place(path, state, epoch=3, step=1, history=[-1.0] * 3),
    "a history that is not finite": lambda path, state: _place(path, state, epoch=1, history=[math.nan]),
    "a history of text": lambda path, state: _place(path, state, epoch=1, history=["x"]),
    "a total beyond all numbers": lambda path, state: _place(path, state, total=10**400),
    "a total that is not finite": lambda path, state: _place(path, state, total=math.inf),
    "seconds of text": lambda path, state: _place(path, state, seconds="x"),
    "seconds that are not finite": lambda path, state: _place(path, state, seconds=math.nan),
    "foreign parts": lambda path, state: torch.save(state | {"parts": [{"to_pass": 1.0}]}, path),
    "a foreign generator": lambda path, state: torch.save(state | {"rng": {"cpu": torch.ones(3)}}, path),
}


@pytest.mark.parametrize("how", SPOIL)
def test_a_spoilt_checkpoint_is_refused_and_kept(saved, trainer, how):
    path = saved.checkpoint
    SPOIL[how](path, torch.load(path, weights_only=True))
    old = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"run\.pt .*move it away") as error:
        trainer().restore()
    assert path.read_bytes() == old and "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [1], {"format": torch.zeros(3), "config": "{}"}, {"format": 2, "config": 3}, {"format": 2}],
    ids=str,
)
def test_somebody_elses_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this format: give"):
        checkpoints.load(tmp_path / "theirs.pt", None, CPU)


def test_a_mismatch_says_what_differs(saved, trainer):
    notes = []
    state = torch.load(saved.checkpoint, weights_only=True)
    torch.save(state | {"device": "cuda"}, saved.checkpoint)
    assert trainer(hooks=Hooks(note=notes.append)).restore()
    assert notes == ["the checkpoint is from a run on cuda, this is on cpu: the noise is another"]
    reworded = trainer(preset=dataclasses.replace(TINY, about="in other words"))
    assert reworded.restore()  # a description is no setting
    with pytest.raises(CheckpointError, match=r"differs in objective, seed"):
        trainer(objective="vae(k=3)", seed=2).restore()
