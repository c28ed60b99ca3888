"""The docs are code: snippets run, docstring examples hold, commands parse, the site builds."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import json
import logging
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import pytest
import torch
import typer

import mcobjectives
import mcobjectives_examples
from mcobjectives.cli import app
from mcobjectives.specs import parse_objective
from mcobjectives.testing.estimators import own_names

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]+)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
OPTIONAL = ("pyro", "zuko", "lightning", "mcobjectives_jackknife")
SLOW_PAGES = {"docs/integrations.md"}  # torch.compile


class Fence(NamedTuple):
    language: str
    title: str
    body: str
    line: int


def fences(page: Path) -> list[Fence]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        found.append(Fence(language, rest, textwrap.dedent(match["body"]), text[: match.start()].count("\n") + 1))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with(*languages: str) -> list:
    chosen = [page for page in PAGES if any(fence.language in languages for fence in fences(page))]
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW_PAGES else [])
        for page in chosen
    ]


def missing(code: str) -> str | None:
    """An optional package that the code imports and that is not installed."""
    wanted = [name for name in OPTIONAL if re.search(rf"^\s*(?:from|import) {name}\b", code, re.M)]
    wanted += ["pyro"] if "mcobjectives.pyro" in code else []
    return next((name for name in wanted if importlib.util.find_spec(name) is None), None)


@pytest.fixture(autouse=True)
def _as_found(tmp_path, monkeypatch):
    """Snippets run in an empty folder and leave no global state behind."""
    monkeypatch.chdir(tmp_path)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    yield
    torch.set_rng_state(rng)
    torch.set_num_threads(threads)
    if "pyro" in sys.modules:
        sys.modules["pyro"].clear_param_store()


@pytest.mark.parametrize("page", pages_with("python", "pycon"))
def test_snippets_run(page, capsys, monkeypatch):
    module = ModuleType("snippet")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "snippet", module)
    namespace = vars(module)
    skipped = set()
    for fence in fences(page):
        if fence.language not in ("python", "pycon") or fence.title.startswith('title="Before: '):
            continue
        absent = missing(fence.body)
        if absent:
            skipped.add(absent)
            continue
        # Compiled at its own line, so that a traceback points into the page.
        source = "\n" * fence.line + fence.body
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if fence.language == "python":
                exec(compile(source, name_of(page), "exec"), namespace)
            else:
                test = doctest.DocTestParser().get_doctest(fence.body, namespace, name_of(page), str(page), fence.line)
                run_doctest(test, clear=False)
                namespace.update(test.globs)
    if skipped:
        pytest.skip(f"the rest ran; not installed: {', '.join(sorted(skipped))}")


def run_doctest(test: doctest.DocTest, clear: bool = True) -> None:
    out: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=out.append, clear_globs=clear)
    assert not runner.failures, "".join(out)


def test_only_other_libraries_code_is_not_run():
    for page in PAGES:
        for fence in fences(page):
            where = f"{name_of(page)}:{fence.line}"
            if fence.language in ("python", "pycon", "py"):
                before = name_of(page) == "docs/migration.md" and re.fullmatch(r'title="Before: [^"]+"', fence.title)
                assert not fence.title or before, f"{where}: {fence.title} would not be run"
                assert fence.language != "py", f"{where}: write ```python"
        unfenced = re.sub(FENCE, "", page.read_text())
        assert "```" not in unfenced, f"{name_of(page)}: a fence that the tests do not see"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_reader_sees_no_code_block_that_the_tests_do_not(page):
    """By the site's own renderer: whatever makes a code block, tildes and indentation too, is one of the fences."""
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("pymdownx")
    rendered = markdown.markdown(page.read_text(), extensions=["pymdownx.superfences", "admonition", "md_in_html"])
    assert rendered.count("<pre") == len(fences(page))


# Docstrings.


def modules() -> list[str]:
    found = []
    for package in (mcobjectives, mcobjectives_examples):
        found.append(package.__name__)
        found += [
            m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None)
        ]
    return found


def doctests(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    if name.startswith("mcobjectives.pyro"):
        pytest.importorskip("pyro")
    for test in doctests(name):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_doctest(test)


@pytest.mark.parametrize("name", mcobjectives.__all__)
def test_public_names_are_documented(name):
    public = getattr(mcobjectives, name)
    doc = inspect.getdoc(public) or ""
    assert "Example:" in doc and ">>>" in doc, f"{name} has no example in its docstring"
    assert f"::: mcobjectives.{name}\n" in (DOCS / "api" / "index.md").read_text(), f"{name} is not on the API page"


@pytest.mark.parametrize("package", ["mcobjectives.testing", "mcobjectives.pyro"])
def test_public_names_of_subpackages_are_on_their_page(package):
    if package.endswith("pyro"):
        pytest.importorskip("pyro")
    page = (DOCS / "api" / f"{package.rpartition('.')[2]}.md").read_text()
    for name in importlib.import_module(package).__all__:
        assert f"{package}.{name}" in page or f"`{name}`" in page, name


def test_objectives_and_estimators_are_in_the_decision_tables():
    choosing, estimators = (DOCS / "choosing.md").read_text(), (DOCS / "choosing-estimators.md").read_text()
    for name in own_names(mcobjectives.plugins.OBJECTIVES):
        assert f"`{mcobjectives.get_objective(name).__name__}(" in choosing, name
    for name in own_names(mcobjectives.plugins.ESTIMATORS):
        assert f"`{name}`" in estimators, name


# The command line.


def commands() -> list:
    found = []
    for page in PAGES:
        lines = []
        for fence in fences(page):
            if fence.language in ("sh", "bash", "console", "shell"):
                lines += fence.body.replace("\\\n", " ").splitlines()
        text = re.sub(FENCE, "", page.read_text())
        lines += re.findall(r"`(mcobj [^`]+)`", text)
        for line in lines:
            words = line.strip().removeprefix("$ ")
            if words.startswith("mcobj ") and "..." not in words:
                found.append(pytest.param(words, id=f"{name_of(page)}: {words}"))
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, tmp_path):
    words = shlex.split(command, comments=True)[1:]
    for word in words:
        if word.endswith(".pt"):  # the checkpoint that the command wants must exist
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch()
    group = typer.main.get_command(app)
    try:
        context = group.make_context("mcobj", list(words))
        name, found, rest = group.resolve_command(context, [*getattr(context, "_protected_args", []), *context.args])
        assert found is not None, f"mcobj has no command {name!r}"
        parameters = found.make_context(name, list(rest), parent=context).params
    except typer.Exit:  # --help, --version
        return
    except Exception as error:
        format_message = getattr(error, "format_message", None)
        raise AssertionError(format_message() if format_message else str(error)) from error
    spec = parameters.get("objective")
    if spec and ":" not in spec and "jackknife" not in spec:
        parse_objective(spec)
    if "table" in parameters:
        from mcobjectives_examples.paper import table
        from mcobjectives_examples.presets import configured

        configured(parameters["preset"], parameters["overrides"] or [])
        assert parameters["table"] == "all" or table(parameters["table"])


# The site.


def generated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks" / "generated.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "hooks"))  # as mkdocs does for a hook
        spec.loader.exec_module(module)
    return module


def test_every_marker_is_generated():
    hooks = generated()
    used = {name for page in DOCS.rglob("*.md") for name in hooks.MARKER.findall(page.read_text())}
    assert used == set(hooks.GENERATORS)


def test_what_is_not_recorded_is_said_to_be_not_run(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    for name in ("tables", "evidence", "speed", "memory", "snr", "parts", "pyro_step"):
        assert "Not run" in hooks.GENERATORS[name](), name


def record(folder: Path, config, *, metrics=MappingProxyType({}), **preset) -> None:
    """A result as `run_cell` writes it, with numbers made up here."""
    found = {"nll": 87.654, "nll_stderr": 0.21, "kl_posterior": 3.21, "active_units": [20], "pca_active_units": [19]}
    found |= {"ess_mean": 123.0, "khat_unreliable": 0.25}
    result = {
        "config": config.to_dict("0" * 64),
        "metrics": found | metrics,
        "learning_curve": [i - 4000.0 for i in range(config.preset.passes)],
        "data": {"sha256": "0" * 64, "files": [{"verified": None}], "train": 50_000, "test": 10_000},
        "provenance": {
            "versions": {"mcobjectives": "0.1.0", "torch": "2.9"},
            "commit": "c0ffee",
            "machine": {"cpu": "a processor", "cores": 2, "threads": 2},
            "date": "2025-01-02T03:04:05+00:00",
        },
    }
    result["config"]["preset"] |= preset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{config.name}.json").write_text(json.dumps(result))


def power_configs() -> list:
    from mcobjectives_examples import tables
    from mcobjectives_examples.presets import get_preset

    return [row.configs[0] for row in tables.rows(7, get_preset("short"))]


def test_tables_are_made_of_recorded_results(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    record(tmp_path / "short", power_configs()[0])
    shown = hooks.tables()
    assert "87.65" in shown and "a processor" in shown and "2025-01-02" in shown
    assert shown.count("not run") >= 3  # the other rows of table 7
    assert "87.65 ± 0.21" in hooks.evidence() and "25 %" in hooks.evidence()
    for seed in (1, 2):
        record(tmp_path / "short", replace(power_configs()[1], seed=seed))
    shown = hooks.evidence()
    assert shown.count("87.65 ± 0.21") == 2 and "± is the standard error over the images" in shown
    assert "; 1 to 2 seeds; " in shown and "minus theirs" not in shown and "ours/paper" not in shown


def test_what_is_not_finite_is_left_out_of_a_comparison(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    first, second, third, *_ = power_configs()
    record(tmp_path / "short", first)
    record(tmp_path / "short", second, metrics={"nll": None})
    record(tmp_path / "short", third, metrics={"kl_posterior": None, "ess_mean": None, "khat_unreliable": None})
    shown = hooks.evidence()
    assert shown.count("87.65 ± 0.21") == 2 and f"`{second.objective}`" not in shown
    assert f"| `{third.objective}` | 87.65 ± 0.21 |  |  | 20 |  |  |" in shown


def test_results_of_two_protocols_are_two_tables(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    first, second, *_ = power_configs()
    record(tmp_path / "short", first)
    record(tmp_path / "short", second, nll_k=7)
    shown = hooks.tables()
    assert shown.count("**Table 7: ") == 2 and "NLL by IWAE-7 " in shown and "NLL by IWAE-5000 " in shown
    assert shown.count("| 87.65 |") == 2


def test_schedules_are_compared_by_the_bound_at_the_ends_of_stages(tmp_path):
    from mcobjectives_examples.config import Config
    from mcobjectives_examples.presets import get_preset

    hooks = generated()
    hooks.RESULTS = tmp_path
    assert "Not run" in hooks.schedules()
    record(tmp_path / "paper", Config("binarized_mnist", "fixed", 1, "vae(k=1)", get_preset("paper")))
    record(tmp_path / "short", Config("binarized_mnist", "fixed", 1, "vae(k=1)", get_preset("short")))
    record(tmp_path / "short", Config("binarized_mnist", "fixed", 1, "vae(k=5)", get_preset("short")))
    faster = get_preset("bgs16").with_passes(364)
    record(tmp_path / "schedule" / "1093", Config("binarized_mnist", "fixed", 1, "vae(k=1)", faster))
    cycle, slow, fast = hooks.schedules().splitlines()[2:5]
    assert cycle == "| one cycle, peak 0.002 | 140 | -3988.0 | -3961.0 | -3880.0 |  |  |  | 87.65 | 3.21 |"
    assert slow.startswith("| 0.0001 to 1e-05 | 3280 | -3988.0 |") and slow.endswith(
        "| -2908.0 | -721.0 | 87.65 | 3.21 |"
    )
    assert fast.startswith("| 0.001 to 0.00019 |") and fast.endswith("| -3637.0 |  |  | 87.65 | 3.21 |")


def test_how_near_the_paper_is_told_of_its_own_protocol_alone(tmp_path):
    from mcobjectives_examples.config import Config
    from mcobjectives_examples.presets import get_preset

    hooks = generated()
    hooks.RESULTS = tmp_path
    for binarisation in ("once", "epoch"):
        record(tmp_path / "short", Config("mnist", binarisation, 1, "vae(k=5)", get_preset("short")))
    lines = hooks.agreement().splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| [2](#table-2-mnist-stochastic-binarisation)"]
    assert "drawing the pixels anew" in hooks.tables()


def test_figures_are_those_that_were_drawn(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    record(tmp_path / "short", power_configs()[0])
    assert hooks.figures().count("Not run") == 4
    (tmp_path / "short" / "figure-3.png").write_bytes(b"an image")
    about = {"title": "Figure 3: Two rows, mnist", "caption": "Of 7 images", "alt": "said aloud"}
    source = {"versions": {"mcobjectives": "0.1.0", "torch": "2.9"}, "commit": None, "date": "2025-01-02"}
    about["provenance"] = source | {"machine": {"cpu": "a processor", "threads": 2}}
    (tmp_path / "short" / "figure-3.png.json").write_text(json.dumps(about))
    shown = hooks.figures()
    assert "![said aloud](assets/short/figure-3.png)" in shown and "Of 7 images" in shown and "a processor" in shown
    assert shown.count("Not run") == 3 and "`mcobj figure 3" not in shown and "`mcobj figure 4" in shown


def test_a_result_that_cannot_be_read_warns(tmp_path, caplog):
    hooks = generated()
    hooks.RESULTS = tmp_path
    record(tmp_path / "short", power_configs()[0])
    (tmp_path / "short" / "foreign-seed0.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        hooks.tables()
    assert "foreign-seed0.json is not a recorded result" in caplog.text


def test_speed_is_made_of_a_record(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    row = {"layers": 1, "k": 5, "q25_ms": 1.0, "q75_ms": 3.0, "peak_mb": 400.0, "versions": {"torch": "2.9"}}
    rows = [
        {**row, "name": "exact", "kind": "ours", "median_ms": 2.0},
        {**row, "name": "pyro", "kind": "peer", "median_ms": 5.0},
    ]
    provenance = {"versions": {"python": "3.11"}, "commit": 40 * "c" + "+changes", "date": "2025-01-02"}
    provenance |= {"machine": {"cpu": "a processor", "threads": 2}}
    (tmp_path / "speed.json").write_text(json.dumps({"provenance": provenance, "rows": rows}))
    shown = hooks.GENERATORS["speed"]()
    assert "| **exact** | 2.0 | 1.0 to 3.0 | 400 | 2.50× |" in shown and "a processor" in shown
    assert "cccccccccc+changes" in shown and "torch 2.9" in shown


def test_goals_are_met_or_missed_by_the_records(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    assert all("| not run |" in line for line in hooks.goals().splitlines()[2:])
    rows = [
        {"layers": 1, "k": 50, "name": "resampled-mixed", "kind": "ours", "unbiased": True, "median_ms": 10.0},
        {"layers": 1, "k": 50, "name": "resampled-bf16", "kind": "ours", "unbiased": False, "median_ms": 5.0},
        {"layers": 1, "k": 50, "name": "exact", "kind": "ours", "unbiased": True, "median_ms": 40.0},
        {"layers": 1, "k": 50, "name": "pyro", "kind": "peer", "unbiased": True, "median_ms": 70.0},
        {"layers": 1, "k": 50, "name": "numpyro", "kind": "peer", "unbiased": True, "median_ms": 39.0},
        {"layers": 2, "k": 50, "name": "numpyro", "kind": "peer", "unbiased": True, "median_ms": 1.0},
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"rows": rows}))
    shown = hooks.goals()
    assert "| a step, k = 50, over the fastest peer | ≥ 4× | 3.90 | missed |" in shown
    assert "| the same over pyro | ≥ 6× | 7.00 | met |" in shown
    assert "| ≥ 1.3× | 0.97 | missed |" in shown and "| the same over pythae | ≥ 6× | not run |" in shown


def test_parts_are_made_of_a_record(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    row = {"k": 50, "backward_samples": 5, "precision": "mixed", "step_ms": 15.0, "faster": 3.0, "limit": 4.5}
    rows = [row | {"parts_ms": {"products with a gradient": 3.0, "noise": 1.0}, "peers_ms": {"numpyro": 45.0}}]
    provenance = {"versions": {"mcobjectives": "0.1.0", "torch": "2.9"}, "commit": None, "date": "2025-01-02"}
    provenance |= {"machine": {"cpu": "a processor", "threads": 2}}
    (tmp_path / "parts.json").write_text(json.dumps({"rows": rows, "provenance": provenance}))
    shown = hooks.GENERATORS["parts"]()
    assert "| products with a gradient | 3.00 |" in shown and "| `numpyro` | 45.00 |" in shown
    assert "| the products alone would be | 4.50× |" in shown


def test_memory_is_made_of_a_record(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    rows = [{"gradient": "dreg", "k": 5000, "chunk_size": 50, "peak_rss_mb": 700.0, "over_k50": 1.1}]
    rows[0] |= {"of_steps_mb": 150.0, "steps_over_k50": 2.0}
    provenance = {"versions": {"mcobjectives": "0.1.0", "torch": "2.9"}, "commit": None, "date": "2025-01-02"}
    provenance |= {"machine": {"cpu": "a processor", "threads": 2}}
    (tmp_path / "memory.json").write_text(json.dumps({"bar": 1.3, "rows": rows, "provenance": provenance}))
    assert "| `dreg` | 5000 | 50 | 700 | 1.10 | 150 | 2.00 |" in hooks.GENERATORS["memory"]()


def test_pyro_step_is_made_of_a_record(tmp_path):
    hooks = generated()
    hooks.RESULTS = tmp_path
    row = {"median_ms": 2.0, "quartiles_ms": [1.5, 2.5], "ratio_to_renyi": 0.8, "first_loss": 540.0}
    provenance = {"versions": {"pyro-ppl": "1.9"}, "commit": 40 * "c" + "+changes", "date": "2025-01-02"}
    provenance |= {"machine": {"cpu": "a processor", "threads": 1}}
    record = {"provenance": provenance}
    (tmp_path / "pyro_step.json").write_text(json.dumps(record | {"k": {"5": {"ObjectiveELBO": row}}}))
    shown = hooks.GENERATORS["pyro_step"]()
    assert "| 5 | ObjectiveELBO | 2.00 | 1.50 to 2.50 | 0.80 |" in shown and "cccccccccc+changes" in shown
    assert "Pyro 1.9" in shown


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) == len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text()
        assert "<!-- generated" not in text
        assert not re.search(r'(?:src|href)="https?://[^"]*(?:cdn|fonts\.g)', text), page  # all it needs is its own
        assert str(ROOT) not in text, page
