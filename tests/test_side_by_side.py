"""`--jobs`: cells in processes of their own, with real signals."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import CPU, MCOBJ

from mcobjectives import cli
from mcobjectives_examples import checkpoints
from mcobjectives_examples.cells import Place, cell_lock, run_cell
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import load
from mcobjectives_examples.files import OutputError
from mcobjectives_examples.hooks import NO_HOOKS, Hooks
from mcobjectives_examples.in_turn import run_in_turn
from mcobjectives_examples.presets import configured
from mcobjectives_examples.side_by_side import run_side_by_side
from mcobjectives_examples.training import Interrupted, TrainingError

TABLE = ["reproduce", "--table=6", "--dataset=digits", "--seeds=2", "--set=k=3", "--set=passes=10000", "--set=nll_k=20"]
TABLE += ["--set=batch_size=10", "--engine=eager", "--device=cpu", "--jobs=2"]


@pytest.fixture
def first():
    preset = configured("smoke", ["passes=2", "nll_k=20"])[0]
    return Config("digits", "once", 1, "vae(k=1)", preset)


def silent(config):
    return NO_HOOKS.on_progress


def record(configs, out, jobs=2, stop=lambda: False):
    done = []
    place = Place(out, CPU, engine="eager")
    run_side_by_side(configs, place, jobs, Hooks(stop=stop), progress_of=silent, on_done=done.append)
    return done


def once_at_work(number, out, n):
    """A `stop` that is true once n checkpoints are there, and then sends the processes that work on them a signal."""

    def stop():
        if len(list(out.glob("*.pt"))) < n:
            return False
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
        return number == signal.SIGINT

    return stop


def alone(configs, out):
    """Record the cells one after the other on the threads that each of two beside each other has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        for config in configs:
            run_cell(config, load(config.dataset), Place(out, CPU, engine="eager"))
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def numbers(out):
    """Metrics and learning curves of all cells in a folder."""
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return [(record["metrics"], record["learning_curve"]) for record in records]


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found.stdout.split()}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def at_work(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_cells_side_by_side_interrupted_and_gone_on_with_are_the_cells_alone(first, tmp_path):
    first = replace(first, preset=configured("smoke", ["passes=3", "nll_k=20", "batch_size=10"])[0])
    second = replace(first, objective="iwae(k=2)", after=first.objective)
    other = replace(first, seed=1)
    out = tmp_path / "beside"
    with pytest.raises(Interrupted):  # Ctrl-C reaches all processes
        record([second, first, other], out, stop=once_at_work(signal.SIGINT, out, 2))
    positions = [checkpoints.load(path, None, CPU)["position"] for path in out.glob("*.pt")]
    assert len(positions) == 2 and all(at["epoch"] < 3 for at in positions) and not numbers(out)
    assert record([second, first, other], out)[-1] == second  # which waits for its first stage
    threads = alone([first, other, second], tmp_path / "alone")
    assert numbers(out) == numbers(tmp_path / "alone")
    records = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert {r["provenance"]["machine"]["threads"] for r in records} == {threads} and len(records) == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_while_the_processes_start_is_no_fault_of_theirs(tmp_path):
    command = [sys.executable, "-c", MCOBJ, *TABLE, f"--out={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(children(process)) < 2:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in told and "its process ended" not in told
    assert "cells 0/2" in " ".join(told.split()) or "0/2 cells" in told


def test_a_cell_that_fails_stops_the_others_with_their_checkpoints(first, tmp_path):
    long = replace(first, preset=configured("smoke", ["passes=3000"])[0])
    broken = replace(first, seed=1)
    (tmp_path / f"{broken.name}.pt").write_text("no checkpoint")
    with pytest.raises(TrainingError, match=f"^{broken.name}: .* is not a readable checkpoint .*: move it away"):
        record([long, broken], tmp_path)
    assert (tmp_path / f"{broken.name}.pt").read_text() == "no checkpoint"
    kept = tmp_path / f"{long.name}.pt"
    assert not kept.exists() or checkpoints.load(kept, None, CPU)["position"]["epoch"] < 3000


@pytest.mark.parametrize("how", ["beside", "in turn", "stacked"])
def test_a_cell_that_another_process_makes_is_refused_and_left_to_it(first, tmp_path, how):
    cells = [first, replace(first, seed=1)]
    each = {"progress_of": silent, "on_done": lambda config: None}
    with cell_lock(tmp_path, cells[1]):
        with pytest.raises(
            (TrainingError, OutputError), match=rf"another process is at work on .*{cells[1].name}: wait"
        ):
            if how == "beside":
                record(cells[1:], tmp_path)
            else:
                place = Place(tmp_path, CPU, engine="eager")
                run_in_turn(cells, load("digits"), place, NO_HOOKS, stack=how == "stacked", **each)
        assert not list(tmp_path.glob(f"{cells[1].name}*"))
    assert not list(tmp_path.glob(".*"))


def test_a_process_that_is_killed_is_named(first, tmp_path):
    long = replace(first, preset=configured("smoke", ["passes=3000"])[0])
    with pytest.raises(TrainingError, match=f"^{long.name}: its process was killed, as where memory is short"):
        record([long], tmp_path, stop=once_at_work(signal.SIGKILL, tmp_path, 1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_none_outlives_the_first_process(tmp_path):
    told = tmp_path / "stderr"
    with told.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", MCOBJ, *TABLE, f"--out={tmp_path}"], stderr=stderr)
    while process.poll() is None and len(left := children(process)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(at_work, left)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(left) == 2 and not any(map(at_work, left))
    assert "Traceback" not in told.read_text()


def test_stack_and_jobs_exclude_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mcobj", *TABLE, "--stack", f"--out={tmp_path / 'none'}"])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        cli.main()
    signal.signal(signal.SIGINT, handler)
    assert "give one of them" in capsys.readouterr().err and not (tmp_path / "none").exists()
