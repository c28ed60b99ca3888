"""`--jobs`: cells in processes of their own, with real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcobjectives_examples import checkpoints
from mcobjectives_examples.cells import run_cell
from mcobjectives_examples.datasets import load
from mcobjectives_examples.presets import configured
from mcobjectives_examples.side_by_side import Place, run_side_by_side
from mcobjectives_examples.training import Config, TrainingError

CPU = torch.device("cpu")
MCOBJ = "import sys; from mcobjectives.cli import main; sys.argv[0] = 'mcobj'; main()"
TABLE = ["reproduce", "--table=6", "--dataset=digits", "--seeds=2", "--set=k=3", "--set=passes=5", "--set=nll_k=20"]
TABLE += ["--set=batch_size=10", "--engine=eager", "--device=cpu", "--jobs=2"]


@pytest.fixture
def first():
    preset = configured("smoke", ["passes=2", "nll_k=20"])[0]
    return Config("digits", "once", 1, "vae(k=1)", preset)


def record(configs, out, jobs=2):
    done = []
    heard = {"on_progress": lambda *progress: None, "on_done": done.append, "note": lambda text: None}
    run_side_by_side(configs, Place(out, CPU, engine="eager"), jobs, stop=lambda: False, **heard)
    return done


def alone(configs, out):
    """Record the cells one after the other on the threads that each of two beside each other has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        for config in configs:
            run_cell(config, load(config.dataset), out, CPU, engine="eager")
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def reproduce(out, *more, **options):
    command = [sys.executable, "-c", MCOBJ, *TABLE, *more, "--json", f"--out={out}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def numbers(out):
    """Metrics and learning curves of all cells in a folder."""
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return [(record["metrics"], record["learning_curve"]) for record in records]


def wait_for(process, out, n):
    while process.poll() is None and len(list(out.glob("*.pt"))) < n:
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found.stdout.split()}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def at_work(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cells_side_by_side_are_the_cells_alone(first, tmp_path):
    second = replace(first, objective="iwae(k=2)", after=first.objective)
    other = replace(first, seed=1)
    assert record([second, first, other], tmp_path / "beside")[-1] == second  # which waits for its first stage
    threads = alone([first, other, second], tmp_path / "alone")
    assert numbers(tmp_path / "beside") == numbers(tmp_path / "alone")
    records = [json.loads(path.read_text()) for path in (tmp_path / "beside").glob("*.json")]
    assert {r["provenance"]["machine"]["threads"] for r in records} == {threads} and len(records) == 3


def test_a_cell_that_fails_stops_the_others_with_their_checkpoints(first, tmp_path):
    long = replace(first, preset=configured("smoke", ["passes=3000"])[0])
    broken = replace(first, seed=1)
    (tmp_path / f"{broken.name}.pt").write_text("no checkpoint")
    with pytest.raises(TrainingError, match=f"^{broken.name}: .* is not a readable checkpoint .*: move it away"):
        record([long, broken], tmp_path)
    assert (tmp_path / f"{broken.name}.pt").read_text() == "no checkpoint"
    kept = tmp_path / f"{long.name}.pt"
    assert not kept.exists() or checkpoints.load(kept, None, CPU)["position"]["epoch"] < 3000


@pytest.mark.slow
def test_ctrl_c_stops_all_with_checkpoints_and_the_same_command_goes_on(tmp_path):
    stopped = reproduce(tmp_path / "out", start_new_session=True)
    wait_for(stopped, tmp_path / "out", 2)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = stopped.communicate()
    assert stopped.returncode == 130 and not out and "Traceback" not in err
    assert "the same command goes on from there" in " ".join(err.split())
    positions = [checkpoints.load(path, None, CPU)["position"] for path in (tmp_path / "out").glob("*.pt")]
    assert len(positions) == 2 and all(0 <= at["epoch"] < 5 for at in positions)
    process = reproduce(tmp_path / "out")
    out, err = process.communicate()
    assert process.returncode == 0 and len(json.loads(out)["rows"][0]["ours"]) == 2, err
    configs = [json.loads(path.read_text())["config"] for path in (tmp_path / "out").glob("*.json")]
    alone([Config.from_dict(config) for config in configs], tmp_path / "whole")
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole") and len(configs) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_killed_is_named_and_none_outlives_the_first_one(tmp_path):
    process = reproduce(tmp_path, "--set=passes=10000")
    wait_for(process, tmp_path, 2)
    os.kill(children(process)[0], signal.SIGKILL)
    out, err = process.communicate()
    said = " ".join(err.split())
    assert process.returncode == 1 and not out and "Traceback" not in err
    assert (
        "mcobj: digits-once-1L-median-k-3-seed" in said and "its process was killed, as where memory is short" in said
    )
    process = reproduce(tmp_path, "--set=passes=10000")
    while process.poll() is None and len(left := children(process)) < 2:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(map(at_work, left)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(left) == 2 and not any(map(at_work, left))


def test_stack_and_jobs_exclude_each_other(tmp_path):
    command = [sys.executable, "-c", MCOBJ, *TABLE, "--stack", f"--out={tmp_path / 'none'}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and "give one of them" in ended.stderr and not (tmp_path / "none").exists()
