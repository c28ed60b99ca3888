"""The commands as typed: in this process where that shows the same, in real ones where signals or imports count."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from runs import EVERY_STEP, MCOBJ, wait_for

from mcobjectives import cli
from mcobjectives.cli import models
from mcobjectives_examples import checkpoints, downloads, engine, precision, presets, sources
from mcobjectives_examples.binarisation import MODES
from mcobjectives_examples.files import locked
from mcobjectives_examples.paper import paper

COMMANDS = ("reproduce", "train", "evaluate", "figure", "report", "objectives", "data", "check")
QUICK = ["--dataset", "digits", "--preset", "smoke", "--set", "passes=1", "--set", "nll_k=50", "--device", "cpu"]
TABLE = ["reproduce", "--table", "1", *QUICK, "--set", "k=2"]
REAL_DATA = os.environ.get("MCOBJECTIVES_DATA")  # before the tests take it away


@pytest.fixture
def mcobj(monkeypatch, capsys):
    """Runs `mcobj` in this process: exit status, stdout, stderr."""
    monkeypatch.delenv("MCOBJECTIVES_DATA", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mcobj", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    handler = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, handler)


def start(*arguments, before="", **options):
    """A real `mcobj` process; `before` is code that it runs first."""
    command = [sys.executable, "-c", f"{before}\n{MCOBJ}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# Help.


def test_the_help_lists_what_there_is():
    commands = typer.main.get_command(cli.app).commands

    def told(command, option):
        return next(p.help for p in commands[command].params if p.name == option)

    for command, option, choices in (
        ("data", "names", sources.DATASETS),
        ("reproduce", "dataset", sources.DATASETS),
        ("train", "overrides", (*presets.CHANGEABLE, "k=N")),
        ("train", "preset", presets.PRESETS),
        ("train", "engine", engine.ENGINES),
        ("train", "precision", precision.PRECISIONS),
        ("train", "binarisation", MODES),
    ):
        assert all(choice in told(command, option) for choice in choices), (command, option)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_of_every_command(mcobj, command):
    status, out, err = mcobj(*command, "--help")
    assert status == 0 and "Usage: mcobj" in out and not err


def test_help_imports_nothing_heavy():
    heavy = {"torch", "numpy", "sklearn", "torchvision", "matplotlib", "pyro"}
    code = f"""
import sys
from mcobjectives.cli import main
for command in {[[], *([name] for name in COMMANDS)]!r}:
    sys.argv = ["mcobj", *command, "--help"]
    try:
        main()
    except SystemExit:
        pass
print({heavy!r} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()" and done.stdout.count("Usage:") == len(COMMANDS) + 1


def test_the_version(mcobj):
    assert mcobj("--version")[1].startswith("mcobjectives 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "No such command 'nope': see mcobj --help"),
        (["reproduce"], "Missing option '--table': see mcobj reproduce --help"),
        (["evaluate", "missing.pt"], ".*'missing.pt' does not exist: see mcobj evaluate --help"),
        (["train", "--layers", "x"], "Invalid value for '--layers': .*: see mcobj train --help"),
        (["train", "--bogus"], "No such option.*--bogus.*: see mcobj train --help"),
        (["objectives", "extra"], "Got unexpected extra argument.*: see mcobj objectives --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_misused_command_is_told_in_one_line(mcobj, arguments, said):
    status, out, err = mcobj(*arguments)
    assert status == 2 and not out and re.fullmatch(f"mcobj: {said}\n", err)


def test_without_a_command_it_shows_its_help(mcobj):
    status, out, err = mcobj()
    assert status == 2 and "Usage: mcobj" in out + err and "mcobj: " not in out + err


# Looking.


def test_objectives_as_json(mcobj):
    status, out, _ = mcobj("objectives", "--json")
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert status == 0 and {"vae", "iwae", "power", "median", "l_alpha", "ciwae", "miwae"} <= found.keys()
    assert found["power"]["parameters"] == "k=50, p=2.0" and found["power"]["package"] == "mcobjectives"
    assert "dreg" in found["iwae"]["estimators"] and "dreg" not in found["median"]["estimators"]


def test_data_as_json(mcobj, tmp_path):
    status, out, _ = mcobj("data", "--json", "--data-dir", tmp_path)
    found = {row["name"]: row for row in json.loads(out)}
    assert status == 0 and found["digits"]["present"] and found["digits"]["train"] == 1500
    assert not found["mnist"]["present"] and found["mnist"]["location"].startswith(str(tmp_path))


def test_data_of_named_sets_says_what_is_missing_where_and_the_mend(mcobj, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = mcobj("data", "mnist", "digits", "--data-dir", tmp_path)
    assert status == 0 and "omniglot" not in out and str(tmp_path) in out and not list(tmp_path.iterdir())
    assert re.search(r"^ mnist +no +MNIST through torchvision *$", out, re.M)
    assert re.search(r"^ digits +yes +no official checksum +1,500 \+ 297 ", out, re.M)
    assert "mnist: mcobj data mnist --download fetches it there, as MNIST/raw/train-images-idx3-ubyte, MNIST/raw" in out


def test_a_data_file_that_is_not_the_official_one_is_marked(mcobj, tmp_path):
    path = tmp_path / "omniglot" / "chardata.mat"
    path.parent.mkdir()
    path.write_bytes(b"foreign")
    [row] = json.loads(mcobj("data", "omniglot", "--json", "--data-dir", tmp_path)[1])
    assert row["present"] and row["verified"] is False and "truncated or no .mat file" in row["message"]
    assert re.search(r"^ omniglot +yes +NO ", mcobj("data", "omniglot", "--data-dir", tmp_path)[1], re.M)


def test_a_download_that_fails_is_told_and_is_a_failure(mcobj, tmp_path, monkeypatch):
    nobody = dataclasses.replace(sources.DATASETS["omniglot"], url="http://127.0.0.1:9/")
    monkeypatch.setitem(sources.DATASETS, "omniglot", nobody)
    monkeypatch.setattr(downloads, "PAUSE_S", 0.0)
    monkeypatch.setenv("COLUMNS", "400")
    status, out, err = mcobj("data", "omniglot", "--download", "--data-dir", tmp_path)
    assert status == 1 and "127.0.0.1:9/chardata.mat" in out and "refused" in out and "Traceback" not in err
    [row] = json.loads(mcobj("data", "omniglot", "--download", "--json", "--data-dir", tmp_path)[1])
    assert not row["present"] and row["verified"] is None and "refused" in row["message"]
    assert mcobj("data", "digits", "--download", "--data-dir", tmp_path)[0] == 0


@pytest.mark.parametrize("command", [["objectives"], ["data"]])
@pytest.mark.parametrize("columns", ["80", "100"])
def test_lists_fit_the_terminal(command, columns, tmp_path):
    process = start(*command, env=os.environ | {"COLUMNS": columns, "MCOBJECTIVES_DATA": str(tmp_path)})
    out, err = process.communicate()
    assert process.returncode == 0 and not err
    assert max(map(len, out.splitlines())) <= int(columns)


OWN = """
from dataclasses import dataclass
from mcobjectives import Objective

@dataclass(frozen=True)
class {name}(Objective):
    k: int = 8

    def reduce(self, log_w):
        return {formula}
"""


def test_check_of_ones_own_objective_in_the_current_folder(mcobj, tmp_path, monkeypatch):
    (tmp_path / "good_one.py").write_text(OWN.format(name="Good", formula="log_w.mean(0)"))
    (tmp_path / "bad_one.py").write_text(OWN.format(name="Bad", formula="log_w.sum(0)"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    status, out, _ = mcobj("check", "good_one:Good(k=4)")
    assert status == 0 and "passes" in out and "k=4" in out
    assert "Not checked: one_sample: exempt" not in out
    status, out, _ = mcobj("check", "vae(k=2, gradient='vimco', kl_weight=0.5)")
    assert status == 0 and "passes" in out
    (tmp_path / "eights.py").write_text(
        OWN.format(name="Eights", formula="log_w.mean(0)")
        + "    exempt = frozenset({'one_sample'})\n"
        + "    def __post_init__(self):\n"
        + "        if self.k % 8:\n"
        + "            raise ValueError('k must be a multiple of 8')\n"
        + "        super().__post_init__()\n"
    )
    status, out, _ = mcobj("check", "eights:Eights(k=8)")
    assert status == 0 and "Not checked: estimator dreg: the objective cannot be made with k = 2, 3 or 4" in out
    status, out, err = mcobj("check", "bad_one:Bad")
    assert status == 1 and "shift" in err and "Traceback" not in err and not out


# Training and evaluating.


def test_train_and_evaluate_agree(mcobj, tmp_path):
    status, out, _ = mcobj("train", "--objective", "power(k=3, p=2)", *QUICK, "--out", tmp_path, "--json")
    trained = json.loads(out)
    assert status == 0 and trained["config"]["objective"].startswith("power(k=3, p=2")
    [checkpoint] = tmp_path.glob("*.pt")
    status, out, _ = mcobj("evaluate", checkpoint, "--k", 50, "--json", "--device", "cpu")
    assert status == 0 and json.loads(out)["metrics"] == trained["metrics"]
    assert (
        mcobj("train", "--objective", "power(k=3, p=2)", *QUICK, "--out", tmp_path, "--json")[1]
        == json.dumps(trained, indent=1) + "\n"
    )
    status, out, err = mcobj("evaluate", checkpoint, "--k", 5, "--images", 20)
    assert status == 0 and re.search(r"points +20 *\n", out) and "not trained" not in err
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"position": {"epoch": 0, "step": 3, "total": 0.0}}, checkpoint)
    status, out, err = mcobj("evaluate", checkpoint, "--k", 5, "--images", 20, "--json")
    evaluated = json.loads(out)
    assert evaluated["passes_done"] == 0 and "not trained to its end: 0 of 1 pass" in err
    changed = {"nll_k": 5, "test_images": 20}
    assert evaluated["config"] == trained["config"] | {"preset": trained["config"]["preset"] | changed}


def test_evaluate_refuses_what_is_no_checkpoint_or_of_other_data(mcobj, tmp_path):
    foreign = tmp_path / "foreign.pt"
    foreign.write_bytes(b"nothing")
    refused(mcobj("evaluate", foreign), "not a readable checkpoint")
    record = tmp_path / "record.json"
    record.write_text("{}")
    refused(mcobj("evaluate", record), "it is no file of torch.save", ": give the .pt file of a run")
    config = {"dataset": "digits", "data_sha256": "other"}
    torch.save({"format": checkpoints.FORMAT, "config": json.dumps(config), "position": {"epoch": 1}}, foreign)
    refused(mcobj("evaluate", foreign), "lacks or mismatches")
    mcobj("train", *QUICK, "--objective", "vae", "--out", tmp_path / "run")
    [checkpoint] = (tmp_path / "run").glob("*.pt")
    state = torch.load(checkpoint, weights_only=True)
    changed = json.dumps(json.loads(state["config"]) | {"data_sha256": "other"})
    torch.save(state | {"config": changed}, checkpoint)
    refused(mcobj("evaluate", checkpoint), "trained on other data")
    config = json.loads(state["config"])
    del config["data_sha256"]
    for wrong in ({"config": json.dumps(config)}, {"position": {"epoch": "a"}}, {"position": {"epoch": 2}}):
        torch.save(state | wrong, checkpoint)
        refused(mcobj("evaluate", checkpoint), "lacks or mismatches what a run needs")


def test_how_steps_are_executed_is_told_on_stderr(mcobj, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    status, out, err = mcobj("train", *QUICK, "--engine", "compiled", "--out", tmp_path, "--json")
    assert status == 0 and "eager steps: no working compiler" in err and json.loads(out)["engine"] == "eager"


def test_reproduce_is_complete_finite_and_rendered_from_its_files(mcobj, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = mcobj(*TABLE, "--json")
    table = json.loads(out)
    assert status == 0 and len(table["rows"]) == 12 and len(table["findings"]) == 12
    assert table["title"] == "Table 1: Fixed-binarisation MNIST, run on digits"
    for row in table["rows"]:
        [ours] = row["ours"]
        assert (
            all(math.isfinite(ours[key]) for key in ("nll", "kl_posterior"))
            and len(ours["active_units"]) == row["layers"]
        )
        assert row["difference"] is None and row["paper"]["nll"] > 80
    assert len(list((tmp_path / "runs" / "smoke").glob("*.json"))) == 6  # cells that are equal are one file
    assert mcobj(*TABLE, "--no-run", "--json")[1] == out
    markdown = mcobj(*TABLE, "--no-run", "--markdown")[1]
    assert markdown.startswith("**Table 1: ") and sum(line.startswith("|") for line in markdown.splitlines()) == 14
    refused(mcobj(*TABLE, "--set", "batch_size=50"), "recorded with other settings (preset.batch_size)")
    for file in (tmp_path / "runs" / "smoke").glob("*2L-iwae*.json"):
        file.unlink()
    assert mcobj(*TABLE, "--no-run")[1].count("not run") >= 2


def test_an_empty_folder_renders_a_table_of_cells_not_run(mcobj, tmp_path):
    for form in ([], ["--markdown"]):
        status, out, err = mcobj("reproduce", "--table", "1", "--no-run", "--out", tmp_path / "none", *form)
        assert status == 0 and out.count("not run") >= 12 and not err
    status, out, _ = mcobj("reproduce", "--table", "all", "--no-run", "--out", tmp_path / "none", "--json")
    assert status == 0 and len(json.loads(out)) == 10
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("columns", [80, 100])
def test_a_table_fits_the_terminal(columns, tmp_path):
    command = ["reproduce", "--table", "1", "--no-run", "--out", tmp_path]
    out, _ = start(*command, env=os.environ | {"COLUMNS": str(columns)}).communicate()
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert sum(bool(re.match(r" [12] +(vae|iwae) +(1|5|50) +not run", line)) for line in lines) == 12


def test_a_compilers_brackets_are_text(mcobj, tmp_path, monkeypatch):
    def compile_whole(*arguments):
        raise RuntimeError("C++ compile error in [/tmp/ab.cpp] near [k, batch]")

    monkeypatch.setattr("mcobjectives_examples.engine.compile_whole", compile_whole)
    monkeypatch.setattr("mcobjectives_examples.engine.compiler_failure", lambda device: "")
    quick = ["--objective", "iwae(k=2)", *QUICK, "--engine", "compiled", "--out", tmp_path]
    status, _, err = mcobj("train", *quick)
    assert status == 0 and "in [/tmp/ab.cpp] near [k, batch]" in " ".join(err.split())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_has_no_such_letters_loses_only_them(tmp_path, encoding):
    options = {"env": os.environ | {"PYTHONIOENCODING": encoding}, "encoding": encoding}
    first = start(*TABLE, "--out", tmp_path, "--no-run", **options)
    out, err = first.communicate()
    assert first.returncode == 0 and "not run" in out and "codec" not in err and "preset smoke" in out
    folder = tmp_path / "r\u00e9sultats \u2026"
    folder.mkdir()
    found = start("report", folder, **options)
    assert "holds no recorded results" in found.communicate()[1] and found.returncode == 1


# Figures and reports.


def test_a_figure_trains_what_is_missing_and_the_report_takes_it_up(mcobj, tmp_path):
    pytest.importorskip("matplotlib")
    quick = ["--dataset", "digits", "--runs", tmp_path, "--set", "passes=1", "--set", "k=2", "--device", "cpu"]
    status, out, err = mcobj("figure", "2", *quick, "--json")
    drawn = json.loads(out)
    assert status == 0 and "2 cells to run" in err and drawn["title"].startswith("Figure 2")
    numbers = {name: part["spread_of_means"] for name, part in drawn["numbers"].items()}
    assert numbers.keys() == {"VAE, k = 1", "IWAE, k = 2"} and all(map(math.isfinite, numbers.values()))
    checkpoints = {path.name for path in tmp_path.glob("*.pt")}
    assert checkpoints == {f"digits-once-1L-latent2-{name}-seed0.pt" for name in ("vae-k-1", "iwae-k-2")}
    status, out, err = mcobj("figure", "5", *quick, "--out", tmp_path / "figure-5.svg")
    assert status == 0 and "to run" not in err and "Wrote" in out  # figure 2's model serves
    status, out, err = mcobj("evaluate", next(tmp_path.glob("*iwae*.pt")), "--k", 5, "--images", 20, "--json")
    assert status == 0 and json.loads(out)["config"]["latent"] == 2
    status, out, err = mcobj("report", tmp_path)
    assert status == 0 and out.count("Wrote") == 2 and not err
    text = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in text and "data:image/svg+xml;base64," in text
    assert "![" in (tmp_path / "report.md").read_text()
    refused(mcobj("figure", "2", *quick, "--set", "batch_size=50"), "differs in preset", "another --runs")


# TensorBoard.


def events(folder):
    """The scalars of the one event file in a folder: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = folder.glob("events.*")
    found = EventAccumulator(str(file))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_logged(folder, result):
    """That a run's events are its recorded learning curve and metrics, under their names."""
    found = events(folder)
    objective = result["config"]["objective"].partition("(")[0]
    assert found[f"train/{objective}"] == [(i, pytest.approx(v)) for i, v in enumerate(result["learning_curve"], 1)]
    passes = len(result["learning_curve"])
    steps, rates = zip(*found["train/learning_rate"], strict=True)
    assert steps == tuple(range(1, passes + 1)) and all(0 <= rate <= 2e-3 for rate in rates)
    expected = {}
    for name, value in result["metrics"].items():
        if value is not None:
            parts = (
                {f"{name}/layer{i + 1}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            expected |= {f"test/{key}": [(passes, pytest.approx(v))] for key, v in parts.items()}
    assert {tag: v for tag, v in found.items() if tag.startswith("test/")} == expected
    assert {"test/nll", "test/kl_posterior", "test/active_units/layer1", "test/reconstruction_error"} <= found.keys()


def test_train_logs_every_statistic_under_its_name(mcobj, tmp_path):
    command = ["train", "--objective", "median(k=3)", *QUICK, "--set", "passes=2", "--layers", "2"]
    status, out, _ = mcobj(*command, "--out", tmp_path / "out", "--tensorboard", tmp_path / "logs", "--json")
    assert status == 0
    [folder] = (tmp_path / "logs").iterdir()
    assert_logged(folder, json.loads(out))


def test_reproduce_logs_every_cell_once_in_a_folder_of_its_own(mcobj, tmp_path):
    command = ["reproduce", "--table", "10", *QUICK, "--set", "k=2", "--out", tmp_path / "out", "--json"]
    assert mcobj(*command, "--tensorboard", tmp_path / "logs")[0] == 0
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert {folder.name for folder in (tmp_path / "logs").iterdir()} == set(results) and len(results) == 7
    for name, result in results.items():
        assert_logged(tmp_path / "logs" / name, result)
    assert mcobj(*command, "--tensorboard", tmp_path / "logs")[0] == 0  # recorded: nothing is logged twice
    for name, result in results.items():
        assert_logged(tmp_path / "logs" / name, result)


def test_tensorboard_that_is_not_installed_shows_before_the_work(mcobj, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(mcobj("train", *QUICK, "--out", tmp_path / "out", "--tensorboard", tmp_path / "new"), "[tensorboard]")
    assert not (tmp_path / "out").exists()


# Binarisation.


def test_a_table_under_both_binarisations(mcobj, tmp_path):
    command = ["reproduce", "--table", "6", *QUICK, "--set", "k=2", "--out", tmp_path / "out"]
    status, out, _ = mcobj(*command, "--binarisation", "both", "--json")
    once, epoch = json.loads(out)
    assert status == 0 and epoch["title"] == once["title"] + ", binarisation epoch"
    assert "digits, binarisation once;" in once["caption"] and "digits, binarisation epoch;" in epoch["caption"]
    assert once["rows"][0]["ours"][0]["nll"] != epoch["rows"][0]["ours"][0]["nll"]
    [first, second] = sorted((tmp_path / "out").glob("*.json"))
    assert first.name.startswith("digits-epoch-1L-median-k-2") and second.name.startswith("digits-once-1L-median-k-2")
    assert json.loads(mcobj(*command, "--binarisation", "epoch", "--json")[1]) == epoch


def test_tables_on_binary_data_keep_it_when_all_are_run_under_another_binarisation(mcobj, tmp_path):
    command = ["reproduce", "--table", "all", "--no-run", "--out", tmp_path / "out", "--json"]
    for binarisation, counts in (("epoch", (0, 5)), ("both", (5, 5))):
        status, out, _ = mcobj(*command, "--binarisation", binarisation)
        captions = [record["caption"] for record in json.loads(out)]
        found = [sum(f"binarisation {name};" in caption for caption in captions) for name in ("fixed", "once")]
        found.append(sum("binarisation epoch (the paper's: once);" in caption for caption in captions))
        assert status == 0 and tuple(found) == (5, *counts)


# What is refused.


def refused(done, *parts):
    status, out, err = done
    assert status in (1, 2) and "Traceback" not in err and not out
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["reproduce", "--table", "11"], "unknown table '11': choose from 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, all"),
        (["reproduce", "--table", "1", "--layers", "3", "--dataset", "digits"], "no rows of 3 layers"),
        (["reproduce", "--table", "1", "--dataset", "digit"], "did you mean 'digits'?"),
        (["reproduce", "--table", "1", "--dataset", "digits", "--preset", "quick"], "unknown preset 'quick'"),
        (["reproduce", "--table", "1", "--dataset", "digits", "--binarisation", "fixed"], "binarisation 'fixed' needs"),
        (["reproduce", "--table", "2", "--binarisation", "typo", "--no-run"], "unknown binarisation 'typo'"),
        (["reproduce", "--table", "all", "--binarisation", "typo"], "unknown binarisation 'typo'"),
        (["reproduce", "--table", "all", "--binarisation", "fixed"], "binarisation 'fixed' needs"),
        (["reproduce", "--table", "all", "--layers", "3", "--no-run"], "no table has rows of 3 layers"),
        (["reproduce", "--table", "1", "--data-dir", "none"], "--download"),
        (["reproduce", "--table", "1", "--dataset", "digits", "--seeds", "0"], "--seeds"),
        (["reproduce"], "--table"),
        (["train", "--objective", "iwa"], "did you mean 'iwae'?"),
        (["train", "--objective", "iwae(k=0)"], "k must be an integer of at least 1"),
        (["train", "--objective", "__import__('os')"], "objective"),
        (["train", "--layers", "3"], "layers must be one of 1, 2"),
        (["train", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["train", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["train", "--engine", "fast"], "unknown engine 'fast'"),
        (["train", "--engine", "compile"], "did you mean 'compiled'?"),
        (["train", "--preset", "smoek"], "did you mean 'smoke'?"),
        (["train", "--precision", "half"], "unknown precision 'half'"),
        (["train", "--set", "lr=1"], "cannot set 'lr=1'"),
        (["train", "--precision", ""], "unknown precision ''"),
        (["train", "--binarisation", ""], "unknown binarisation ''"),
        (["reproduce", "--table", "1", "--dataset", "digits", "--binarisation", ""], "unknown binarisation ''"),
        (["reproduce", "--table", "1", "--dataset", "", "--no-run"], "unknown data set ''"),
        (["figure", "3", "--dataset", ""], "unknown data set ''"),
        (["train", "--out", ""], "an empty path: name a folder"),
        (["train", "--tensorboard", ""], "an empty path: name a folder"),
        (["train", "--data-dir", ""], "an empty path: name a folder"),
        (["reproduce", "--table", "1", "--out", ""], "an empty path: name a folder"),
        (["figure", "3", "--runs", ""], "an empty path: name a folder"),
        (["figure", "3", "--out", ""], "an empty path: name a folder"),
        (["report", ""], "an empty path: name a folder"),
        (["report", ".", "--out", ""], "an empty path: name a folder"),
        (["train", "--set", "passes=none"], "passes must be an integer"),
        (["train", "--set", "test_images=1"], "test_images must be an integer of at least 2"),
        (["evaluate", __file__, "--images", "1"], "--images"),
        (["data", "minst"], "did you mean 'mnist'?"),
        (["train", "--binarisation", "twice"], "unknown binarisation 'twice'"),
        (["train", "--seed", "-1"], "seed"),
        (["evaluate", "missing.pt"], "missing.pt"),
        (["figure", "6"], "unknown figure 6: choose from 2, 3, 4, 5"),
        (["figure", "3", "--dataset", "digits", "--out", "figure.pdf"], "must end in .png or .svg"),
        (["figure", "2", "--dataset", "omniglot"], "omniglot lists no class labels"),
        (["figure", "3", "--dataset", "digit"], "did you mean 'digits'?"),
        (["figure", "3", "--data-dir", "none"], "--download"),
        (["report", "missing"], "missing is not a folder"),
        (["report", "."], "holds no recorded results"),
        (["check", "no.such.module:Thing"], "cannot import no.such.module"),
        (["check", "iwa"], "did you mean 'iwae'?"),
        (["trian"], "trian"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_before_any_training(mcobj, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = mcobj(*arguments)
    err = "\n".join(line for line in err.splitlines() if " to run with preset " not in line and "cells" not in line)
    refused((status, out, err), part)
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_last_cell_or_table_is_told_before_the_first_is_run(mcobj, tmp_path):
    for number, cell, more in (
        ("1", "2L-iwae-k-2", []),
        ("1", "2L-iwae-k-2", ["--jobs", 2]),
        ("all", "1L-power-k-2-p-2", []),
    ):
        broken = tmp_path / f"digits-once-{cell}-seed0.pt"
        broken.write_text("no checkpoint")
        done = mcobj("reproduce", "--table", number, *QUICK, "--set", "k=2", "--out", tmp_path, *more)
        refused(done, "not a readable checkpoint", broken.name)
        assert list(tmp_path.iterdir()) == [broken] and broken.read_text() == "no checkpoint"
        broken.unlink()


def test_a_cell_at_which_another_process_is_at_work_is_refused_before_any_work(mcobj, tmp_path):
    table = ["reproduce", "--table", 1, *QUICK, "--set", "k=2", "--out", tmp_path]
    figure = ["figure", 3, *QUICK[:4], "--set", "passes=1", "--runs", tmp_path, "--device", "cpu"]
    commands = {"2L-iwae-k-2": [table, [*table, "--jobs", 2], [*table, "--seeds", 2, "--stack"]]}
    commands["1L-iwae-k-5"] = [["train", "--objective", "iwae(k=5)", *QUICK, "--out", tmp_path]]
    commands["1L-iwae-k-50"] = [figure]
    for cell, refusing in commands.items():
        with locked(tmp_path / f"digits-once-{cell}-seed0"):
            for command in refusing:
                refused(mcobj(*command), f"another process is at work on {tmp_path}", f"{cell}-seed0: wait for its end")
        assert not list(tmp_path.iterdir())
    assert mcobj(*commands["1L-iwae-k-5"][0])[0] == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".pt"]


def test_a_figure_is_refused_where_its_file_or_models_cannot_be(mcobj, tmp_path):
    pytest.importorskip("matplotlib")
    quick = ["--dataset", "digits", "--runs", tmp_path, "--set", "k=2", "--set", "nll_k=20", "--device", "cpu"]
    (tmp_path / "file").write_text("")
    done = mcobj("figure", "5", *quick, "--set", "passes=1", "--out", tmp_path / "file" / "figure.png")
    assert done[0] == 1 and "cannot write" in done[2] and not list(tmp_path.glob("*.pt"))
    mcobj("train", *QUICK, "--objective", "vae", "--out", tmp_path)
    [checkpoint] = tmp_path.glob("*.pt")
    checkpoint.unlink()  # its record is kept: no model of other settings is put beside it
    refused(mcobj("figure", "3", *quick, "--set", "passes=2"), "was recorded with other settings", "another --runs")
    assert not list(tmp_path.glob("*.pt"))


def test_an_output_folder_that_is_a_file(mcobj, tmp_path):
    (tmp_path / "out").write_text("")
    status, out, err = mcobj("train", *QUICK, "--out", tmp_path / "out")
    assert status == 1 and "choose another folder with --out" in err.splitlines()[-1] + err and not out


def test_a_folder_of_logs_that_cannot_be_written(mcobj, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "logs").write_text("")
    done = mcobj("train", *QUICK, "--out", tmp_path / "out", "--tensorboard", tmp_path / "logs")
    refused(done, "cannot write TensorBoard logs", "choose another --tensorboard")


# Real data, where there are any.


@pytest.mark.slow
def test_real_binarized_mnist_is_read_trained_on_evaluated_and_recorded(mcobj, tmp_path):
    folder = REAL_DATA or Path(__file__).parents[2] / "shared" / "data"
    files = [Path(folder) / file.path for file in sources.DATASETS["binarized_mnist"].files]
    if not all(file.is_file() for file in files):
        pytest.skip(f"no real data: {files[0].name} is neither in MCOBJECTIVES_DATA nor in ../shared/data")
    fast = ["--set", "passes=1", "--set", "nll_k=100", "--set", "test_images=200", "--device", "cpu"]
    command = ["train", "--objective", "iwae(k=5)", "--dataset", "binarized_mnist", *fast, "--data-dir", folder]
    status, out, err = mcobj(*command, "--out", tmp_path, "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["config"]["binarisation"] == "fixed" and result["data"]["train"] == 50_000
    assert all(file["verified"] for file in result["data"]["files"])
    assert result["parameters"] == paper()["architectures"]["1"]["parameters_784_pixels"]
    # An untrained model has 206 nats, that of independent pixels; the paper's full run 87.6. One pass is in between.
    assert 100 < result["metrics"]["nll"] < 150 and -result["learning_curve"][0] < 206
    assert 5 <= result["metrics"]["active_units"][0] <= 50


# Stopped.


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own_is_an_interrupt(mcobj, monkeypatch):
    def half_imported(**options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("numpy has no attribute") from None

    monkeypatch.setattr(cli, "app", half_imported)
    assert mcobj("data") == (130, "", "mcobj: interrupted\n")


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    command = ["train", "--objective", "iwae(k=5)", *QUICK, "--set", "passes=8", "--engine", "eager", "--json"]
    checkpoint = tmp_path / "out" / "digits-once-1L-iwae-k-5-seed0.pt"
    stopped = start(*command, "--out", tmp_path / "out", before=EVERY_STEP)
    wait_for(stopped, checkpoint)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate()
    assert stopped.returncode == 130 and not out and "Traceback" not in err
    assert "the same command goes on from there" in " ".join(err.split())
    position = torch.load(checkpoint, weights_only=True)["position"]
    assert 0 < position["epoch"] + position["step"] < 8
    results = []
    for folder in ("out", "whole"):
        process = start(*command, "--out", tmp_path / folder)
        out, err = process.communicate()
        assert process.returncode == 0, err
        results.append(json.loads(out))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["learning_curve"] == results[1]["learning_curve"]


def test_ctrl_c_ends_an_evaluation_after_its_batch(mcobj, tmp_path, monkeypatch):
    mcobj("train", *QUICK, "--objective", "vae", "--out", tmp_path)
    [checkpoint] = tmp_path.glob("*.pt")
    before = checkpoint.read_bytes()
    evaluate = models.evaluate_model

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(models, "evaluate_model", interrupted)
    status, out, err = mcobj("evaluate", checkpoint, "--k", 5)
    assert status == 130 and not out and "stopping after this batch" in err and "Traceback" not in err
    assert checkpoint.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_table_of_stacked_cells_is_the_table(mcobj, tmp_path):
    arguments = ["reproduce", "--table=5", "--dataset=digits", "--seeds=2", "--set=k=1", "--set=passes=2", "--json"]
    arguments += ["--set=nll_k=20", "--engine=eager"]
    alone, stacked = [
        [
            result["nll"]
            for row in json.loads(mcobj(*arguments, f"--out={tmp_path / name}", *more)[1])["rows"]
            for result in row["ours"]
        ]
        for name, more in (("alone", []), ("stacked", ["--stack"]))
    ]
    assert stacked == pytest.approx(alone, abs=0.01) and len(set(stacked)) == 6
    records = [json.loads(path.read_text()) for path in (tmp_path / "stacked").glob("*.json")]
    assert {record["engine"] for record in records} == {"stacked-eager"}


def test_what_cannot_be_stacked_is_said(mcobj, tmp_path):
    arguments = ["reproduce", "--table=6", "--dataset=digits", "--stack", "--set=passes=1", "--set=nll_k=20"]
    _, _, err = mcobj(*arguments, f"--out={tmp_path}")
    assert "nothing to stack: no two cells differ in seed or binarisation alone; try --seeds 3" in " ".join(err.split())
    _, _, err = mcobj(*arguments, f"--out={tmp_path}")
    assert "to stack" not in err  # nor anything else to do
    _, _, err = mcobj(*arguments, "--binarisation=both", "--set=k=1", f"--out={tmp_path / 'both'}")
    engines = {json.loads(path.read_text())["engine"] for path in (tmp_path / "both").glob("*.json")}
    assert "to stack" not in err and engines == {"stacked-eager"}
    _, _, err = mcobj(*arguments, "--seeds=2", "--set=k=2", f"--out={tmp_path / 'two'}")
    assert "on a CPU only cells of k = 1 are stacked: the others are trained one by one" in " ".join(err.split())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "checkpoint"), [("1", "digits-once-2L-vae-k-1-seed0.pt"), ("10", "*-after-*.pt")])
def test_a_table_killed_and_restarted_is_the_same(mcobj, tmp_path, number, checkpoint):
    table = ["reproduce", "--table", number, *QUICK, "--set", "k=2"]
    killed = start(*table, "--out", tmp_path / "killed", before=EVERY_STEP)
    while killed.poll() is None and not list((tmp_path / "killed").glob(checkpoint)):
        time.sleep(0.001)
    killed.kill()
    assert killed.communicate() and killed.returncode == -signal.SIGKILL
    done = len(list((tmp_path / "killed").glob("*.json")))
    tables = [json.loads(mcobj(*table, "--out", tmp_path / name, "--json")[1]) for name in ("killed", "whole")]
    assert tables[0] == tables[1] and 3 <= done < len(list((tmp_path / "whole").glob("*.json")))


@pytest.mark.slow
def test_all_tables_are_complete_and_finite_and_cells_that_they_share_are_trained_once(mcobj, tmp_path):
    status, out, _ = mcobj("reproduce", "--table", "all", *QUICK, "--set", "k=2", "--out", tmp_path, "--json")
    tables = json.loads(out)
    assert status == 0 and [len(table["rows"]) for table in tables] == [12, 12, 8, 4, 3, 1, 4, 3, 4, 4]
    for row in (row for table in tables for row in table["rows"]):
        [ours] = row["ours"]
        unmeasured = {"khat_mean", "khat_max"}  # weights that are all equal have no tail
        assert all(
            math.isfinite(value) for key, value in ours.items() if key not in unmeasured and type(value) is float
        )
        assert not {key for key, value in ours.items() if value is None} - unmeasured
    assert {f["verdict"] for table in tables for f in table["findings"]} <= {"holds", "does not hold", "within noise"}
    # Tables 1 to 4 are six cells, 5 to 9 those of their own objectives (two at k = 2 are VAE and IWAE), 10 four more.
    cells = [path.stem for path in tmp_path.glob("*.json")]
    kinds = {kind: sum(f"L-{kind}" in cell for cell in cells) for kind in ("vae", "iwae", "median", "power", "ciwae")}
    assert kinds == {"vae": 6, "iwae": 4, "median": 1, "power": 4, "ciwae": 3} and len(cells) == len(set(cells))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert mcobj("reproduce", "--table", "9", *QUICK, "--set", "k=2", "--out", tmp_path, "--json")[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
