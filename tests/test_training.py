import contextlib
import dataclasses
import json
import math
import os
import platform
import resource
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from itertools import accumulate, product

import pytest
import torch
from torch import nn

from mcobjectives import IWAE
from mcobjectives.specs import parse_objective
from mcobjectives_examples import checkpoints, compiling, engine, training
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.config import Config, canonical, training_objective
from mcobjectives_examples.downloads import DataError
from mcobjectives_examples.engine import Engine, choose_engine, flat_adam, make_step, set_rate
from mcobjectives_examples.files import OutputError
from mcobjectives_examples.precision import in_bfloat16, products, set_precision
from mcobjectives_examples.presets import PRESETS, capped, configured, get_preset
from mcobjectives_examples.training import Interrupted, Trainer, TrainingError

CPU = torch.device("cpu")
# 1500 images in batches of 400: three whole ones and one of 300.
TINY = dataclasses.replace(get_preset("smoke"), stages=((3, 2e-3),), batch_size=400, nll_k=20)


@pytest.fixture
def trainer(digits, tmp_path):
    def build(name="run.pt", preset=TINY, engine="eager", note=lambda text: None, **changes):
        settings = {"dataset": "digits", "binarisation": "once", "layers": 1, "objective": "iwae(k=3)"}
        return Trainer(
            Config(**settings | changes, preset=preset), digits, CPU, tmp_path / name, engine=engine, note=note
        )

    return build


def until(steps):
    """Arguments of `run` that stop it after so many steps."""
    taken = []
    return taken.append, lambda: len(taken) >= steps


def same(a, b):
    """Whether two trainers hold the same bits."""
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    moments = zip(a.optimiser.state.values(), b.optimiser.state.values(), strict=True)
    return (
        all(torch.equal(x, y) for x, y in pairs)
        and all(torch.equal(x[key], y[key]) for x, y in moments for key in x)
        and a.history == b.history
    )


# Presets.


def test_the_papers_schedule():
    paper = get_preset("paper")
    ends = list(accumulate(3**i for i in range(8)))
    assert paper.passes == ends[-1] == 3280
    for i, end in enumerate(ends):
        rate = 1e-4 * 10 ** (-i / 7)
        assert paper.learning_rate(end - 3**i) == paper.learning_rate(end - 0.01) == pytest.approx(rate, rel=1e-12)
    assert (paper.batch_size, paper.betas, paper.eps, paper.nll_k) == (100, (0.9, 0.999), 1e-4, 5000)
    assert get_preset("bgs16").learning_rate(0) == 1e-3


@pytest.mark.parametrize("passes", [1, 12, 200])
def test_one_cycle_warms_up_over_a_tenth_and_falls_to_zero(passes):
    preset = get_preset("short").with_passes(passes)
    rates = [preset.learning_rate(passes * i / 1000) for i in range(1001)]
    assert max(rates) == rates[100] == pytest.approx(2e-3)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_fewer_passes_cut_the_stages_and_more_are_refused():
    paper = get_preset("paper")
    assert [passes for passes, _ in paper.with_passes(5).stages] == [1, 3, 1]
    assert paper.with_passes(5).learning_rate(4.5) == paper.learning_rate(4.5)
    with pytest.raises(ValueError, match="3281 are more than its schedule"):
        paper.with_passes(3281)
    for preset in (paper, get_preset("short")):
        with pytest.raises(ValueError, match="passes must be an integer of at least 1, got 0"):
            preset.with_passes(0)


def test_a_second_stage_is_no_longer_than_the_first():
    paper = get_preset("paper")
    assert paper.continued(2187, 1e-4).stages == ((2187, 1e-4),)
    assert paper.with_passes(4).continued(2187, 1e-4).stages == ((4, 1e-4),)
    assert get_preset("smoke").continued(2187, 1e-4) == get_preset("smoke")


def test_overrides():
    preset, cap = configured("smoke", ["passes=3", "batch_size=7", "nll_k=11", "test_images=5", "k=4"])
    assert (preset.passes, preset.batch_size, preset.nll_k, preset.test_images, cap) == (3, 7, 11, 5, 4)


@pytest.mark.parametrize("text", ["passes", "passes=0", "passes=-1", "passes=1.5", "test_images=1", "lr=1", ""])
def test_bad_overrides_are_refused(text):
    with pytest.raises(ValueError, match=r"must be an integer|cannot set"):
        configured("smoke", [text])


@pytest.mark.parametrize(
    ("spec", "k"), [("iwae(k=50)", 4), ("vae(k=2)", 2), ("power(k=50, p=3)", 4), ("miwae(k1=5, k2=10)", 4)]
)
def test_a_cap_on_k(spec, k):
    assert engine_objective(capped(spec, 4)).k == k
    assert capped(spec, None) == spec


def engine_objective(spec):
    return training_objective(spec, TINY)


def test_a_split_cannot_be_capped():
    with pytest.raises(ValueError, match="give its parts fewer samples"):
        capped("split(generative=iwae(k=6), inference=vae(k=6))", 2)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dataset", ["binarized_mnist", "mnist"])
def test_what_is_binary_already_stays_fixed(name, dataset):
    expected = "fixed" if dataset == "binarized_mnist" else "epoch" if name == "bgs16" else "once"
    assert get_preset(name).binarisation_of(dataset) == expected


# Configurations.


def test_a_configuration_survives_json():
    config = Config("digits", "once", 2, "iwae(k=3)", get_preset("paper"), seed=3, after="vae(k=1)")
    record = json.loads(json.dumps(config.to_dict("abc")))
    assert Config.from_dict(record) == config and record["data_sha256"] == "abc"


def test_every_configuration_has_its_own_file_name():
    base = Config("digits", "once", 1, "iwae(k=3)", TINY)
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"dataset": "mnist"},
            {"binarisation": "epoch"},
            {"layers": 2},
            {"seed": 1},
            {"after": "vae(k=1)"},
            {"objective": "iwae(k=30)"},
            {"objective": "power(k=3, p=1.0)"},
            {"objective": "power(k=3, p=-1.0)"},
            {"objective": "iwae(k=3, gradient='dreg')"},
        )
    ]
    names = {config.name for config in [base, *others]}
    assert len(names) == 10 and all("/" not in name and " " not in name for name in names)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("iwae", "iwae(k=50)"),
        ("iwae(k=1)", "vae(k=1)"),
        ("miwae(k1=1, k2=50)", "vae(k=50)"),
        ("miwae(k1=50, k2=1)", "iwae(k=50)"),
        ("miwae(k1=1, k2=1)", "vae(k=1)"),
        ("vae(k=2, analytic_kl=True)", "vae(k=2, analytic_kl=True)"),
        ("iwae(k=1, gradient='dreg')", "iwae(k=1, gradient='dreg')"),
        ("power", "power(k=50, p=2)"),
        ("power(k=3, p=-2.0)", "power(k=3, p=-2)"),
        ("ciwae(k=3, beta=1.0)", "ciwae(k=3, beta=1)"),
        ("l_alpha(k=3, alpha=0.10)", "l_alpha(k=3, alpha=0.1)"),
    ],
)
def test_equal_objectives_have_one_canonical_spec(spec, expected):
    assert parse_objective(canonical(spec)) == parse_objective(expected)
    assert canonical(canonical(spec)) == canonical(spec) == canonical(expected)


def test_a_split_is_canonical_too():
    spec = "split(generative=iwae(k=6), inference=miwae(k1=3, k2=2))"
    assert parse_objective(canonical(spec)) == parse_objective(spec)


# Training.


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
    first = trainer(binarisation=binarisation, objective="iwae(k=3, backward_samples=2)")
    with pytest.raises(Interrupted) if steps < 12 else contextlib.nullcontext():
        first.run(*until(steps))
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
    run = trainer()

    def ruin(x):
        if run.epoch == 2 and run.step == 1:
            next(run.model.parameters()).data.fill_(math.nan)
        return x.mean()

    monkeypatch.setattr(training, "make_step", lambda engine, *a: (ruin, engine))
    with pytest.raises(TrainingError, match="pass 3: a parameter"):
        run.run(*until(10 if stopped else 99))
    again = trainer()
    assert again.restore() and all(torch.isfinite(p).all() for p in again.model.parameters())


def test_a_learning_rate_that_is_far_too_large_is_a_training_error(trainer):
    run = trainer(preset=dataclasses.replace(TINY, stages=((3, 1e30),), one_cycle=False))
    with pytest.raises(TrainingError, match="pass 1: "):
        run.run()


# Checkpoints.


@pytest.fixture
def saved(trainer):
    """A run, interrupted with a checkpoint."""
    run = trainer()
    with pytest.raises(Interrupted):
        run.run(*until(2))
    return run


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


def test_a_mismatch_says_what_differs(saved, trainer):
    notes = []
    state = torch.load(saved.checkpoint, weights_only=True)
    torch.save(state | {"device": "cuda"}, saved.checkpoint)
    assert trainer(note=notes.append).restore()
    assert notes == ["the checkpoint is from a run on cuda, this is on cpu: the noise is another"]
    reworded = trainer(preset=dataclasses.replace(TINY, about="in other words"))
    assert reworded.restore()  # a description is no setting
    with pytest.raises(CheckpointError, match=r"differs in objective, seed"):
        trainer(objective="vae(k=3)", seed=2).restore()


# Engines.


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
    told = trainer(engine="compiled", note=notes.append)
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
    again = trainer(engine="compiled", note=notes.append)
    again.restore()
    again.run()
    assert notes == ["eager steps: as in the checkpoint"]


def test_a_restart_on_other_threads_is_told(saved, trainer):
    state = torch.load(saved.checkpoint, weights_only=True)
    torch.save(state | {"threads": state["threads"] + 6}, saved.checkpoint)
    notes = []
    trainer(note=notes.append).restore()
    assert notes == [
        f"the checkpoint is from a run on {state['threads'] + 6} threads, this is on {state['threads']}: "
        "last digits may differ"
    ]


def test_an_unknown_engine_is_refused(trainer):
    with pytest.raises(ValueError, match="unknown engine 'fast': choose from auto, eager, compiled, cuda-graph"):
        trainer(engine="fast")


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
    run = trainer(engine="compiled")
    with pytest.raises(Interrupted):
        run.run(stop=lambda: bool(asked))
    state = checkpoints.load(run.checkpoint, run.record, CPU)
    assert state["engine"] != "eager" and state["position"] == {"epoch": 0, "step": 0, "total": 0.0}
    compiled = []
    monkeypatch.setattr(engine, "compiler_failure", lambda device: "")
    monkeypatch.setattr(engine, "compile_whole", lambda *arguments: compiled.append(real) or eagerly(arguments[0]))
    again = trainer(engine="compiled")
    assert again.restore()
    again.run(*until(1)[:1])
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


# Killed.

MCOBJ = """
import sys
from mcobjectives.cli import main
from mcobjectives_examples import training
training.SECONDS_BETWEEN_CHECKPOINTS = -1.0
sys.argv = ["mcobj", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("engine_name", "binarisation"), [("eager", "once"), ("eager", "epoch"), ("compiled", "once")])
def test_a_killed_run_ends_with_the_same_bits(trainer, tmp_path, engine_name, binarisation):
    preset = configured("smoke", ["passes=15", "nll_k=20", "batch_size=400"])[0]
    whole = trainer("whole.pt", preset=preset, binarisation=binarisation, engine=engine_name)
    whole.run()
    assert whole.engine.name == engine_name
    command = [sys.executable, "-c", MCOBJ, "train", "--dataset", "digits", "--objective", "iwae(k=3)", "--device=cpu"]
    command += [f"--engine={engine_name}", "--set=passes=15", "--set=nll_k=20", "--set=batch_size=400"]
    command += ["--binarisation", binarisation, "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    checkpoint = tmp_path / "out" / f"{whole.config.name}.pt"

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    for writes, pause in ((3, 0.0), (4, 0.005)):
        process, inode = start(), None
        while writes and process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if (now := checkpoint.stat().st_ino) != inode:
                    inode, writes = now, writes - 1
            time.sleep(0.0005)
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


def test_the_presets_numbers():
    paper, bgs16, short, smoke = (get_preset(name) for name in ("paper", "bgs16", "short", "smoke"))
    assert {p.name: (p.batch_size, p.eps, p.betas) for p in (paper, bgs16, short, smoke)} == {
        "paper": (100, 1e-4, (0.9, 0.999)),
        "bgs16": (20, 1e-4, (0.9, 0.999)),
        "short": (100, 1e-4, (0.9, 0.999)),
        "smoke": (100, 1e-4, (0.9, 0.999)),
    }
    assert (short.passes, short.backward_samples, short.precision, short.nll_k) == (140, 10, "bf16", 5000)
    assert (smoke.passes, smoke.backward_samples, smoke.nll_k, smoke.test_images) == (12, None, 1000, 500)
    assert paper.backward_samples is bgs16.backward_samples is None and paper.precision == "highest"


def test_one_cycle_by_hand():
    preset = get_preset("short").with_passes(10)
    shares = [0.04, 0.52, 1.0, 0.5 + 0.5 * math.cos(math.pi / 3), 0.5]
    assert [preset.learning_rate(at) for at in (0, 0.5, 1, 4, 5.5)] == pytest.approx([2e-3 * s for s in shares])


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

    def tick(progress):
        clock[0] += 1

    run = trainer()
    run.together = 4
    run.run(tick)
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

    def tick(progress):
        clock[0] += 1
        taken.append(progress)

    run = trainer()
    run.together = 4
    with pytest.raises(training.Interrupted):
        run.run(tick, lambda: len(taken) >= 6)
    assert run.seconds == 6 / 4


def test_a_restored_run_goes_on_with_the_seconds_it_took(trainer):
    first, second = trainer(), trainer()
    with pytest.raises(training.Interrupted):
        first.run(*until(2))
    assert second.restore() and second.seconds == first.seconds > 0


def test_a_rate_that_is_a_tensor_is_set_in_place():
    rate = torch.tensor(1e-3)
    optimiser = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=rate)
    set_rate(optimiser, 0.25)
    assert optimiser.param_groups[0]["lr"] is rate and rate == 0.25
