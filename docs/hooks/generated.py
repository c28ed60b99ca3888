"""mkdocs hook: `<!-- generated: NAME -->` in a page becomes what the code and the recorded results say at build time.

No number in a table is copied by hand. What has not been run is said to be "not run".
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import measurements
import typer
from measurements import provenance

from mcobjectives import get_objective
from mcobjectives.catalogue import catalogue
from mcobjectives.cli import app
from mcobjectives.plugins import ESTIMATORS
from mcobjectives.testing.estimators import own_names
from mcobjectives_examples import blocks, records, render
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import default_binarisation
from mcobjectives_examples.findings import findings
from mcobjectives_examples.paper import paper, table
from mcobjectives_examples.presets import PRESETS
from mcobjectives_examples.render import NOT_RUN
from mcobjectives_examples.report import not_drawn, pictures
from mcobjectives_examples.sources import DATASETS

log = logging.getLogger("mkdocs.hooks.generated")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"<!-- generated: (\w+) -->")
NEAR = {"short": 1.5, "paper": 0.5}  # nats: how near to the paper a preset is meant to come


def on_files(files: Any, *, config: Any) -> Any:
    """The figures of the paper that are recorded, as files of the site."""
    from mkdocs.structure.files import File  # pages are filled without mkdocs too

    for path, picture in _drawn():
        files.append(File.generated(config, picture.file, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return fill(markdown)


def fill(markdown: str) -> str:
    """The page with every marker replaced."""
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


# Tables of the paper.


def tables() -> str:
    """All tables, for each preset of which anything is recorded; where nothing is, the command that would run it."""
    return "\n\n".join(_table(number) for number in paper()["tables"])


def _table(number: str) -> str:
    parts = [f"## Table {number}: {table(number)['title']}"]
    found = [rows for folder in _folders() for rows in _recorded_rows(number, folder)]
    for rows in found:
        title = render.title(number, rows)
        parts.append(render.markdown(title, rows, findings(rows)))
        parts.append(provenance(result for row in rows for result in row.results))
    if not found:
        parts.append(
            f"{NOT_RUN.capitalize()}. This runs it:\n\n```sh\nmcobj reproduce --table {number} --preset short\n```"
        )
    return "\n\n".join(parts)


def agreement() -> str:
    """For each recorded table: how far our NLL is from the paper's, and how many of the paper's claims hold."""
    lines = []
    for number in paper()["tables"]:
        for rows in (r for folder in _folders() for r in _recorded_rows(number, folder)):
            if rows[0].configs[0].binarisation != default_binarisation(table(number)["dataset"]):
                continue  # the paper has no number by the other protocol
            found = [
                (nll - row.paper["nll"], row)
                for row in rows
                if row.on_papers_data and (nll := row.mean("nll")) is not None
            ]
            if not found:
                continue
            furthest, row = max(found, key=lambda pair: abs(pair[0]))
            verdicts = Counter(finding.verdict for finding in findings(rows))
            preset = rows[0].configs[0].preset.name
            near = NEAR.get(preset, NEAR["short"])
            lines.append(
                (
                    f"[{number}](#table-{number}-{_anchor(number)})",
                    preset,
                    f"{len(found)} of {len(rows)}",
                    f"{sum(abs(gap) <= near for gap, _ in found)} within {near}",
                    f"{sum(gap for gap, _ in found) / len(found):+.2f}",
                    f"{furthest:+.2f} ({row.layers}L `{row.label}`)",
                    ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()),
                )
            )
    if not lines:
        return f"{NOT_RUN.capitalize()}."
    header = (
        "table",
        "preset",
        "rows recorded",
        "near the paper (nats)",
        "mean difference",
        "largest",
        "the paper's claims",
    )
    return blocks.markdown_table(header, lines, right=range(2, 5))


def _anchor(number: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", table(number)["title"].lower()).strip("-")


def _folders() -> list[Path]:
    return [folder for name in ("short", "bgs16", "paper") if (folder := RESULTS / name).is_dir()]


def _recorded_rows(number: str, folder: Path) -> list[list[Any]]:
    """The rows of a table for each protocol of which a folder holds a cell."""
    _, runs = _held(folder)
    return [run.rows for run in runs if run.number == number]


def _held(folder: Path) -> tuple[dict[Any, Any], list[Any]]:
    """The results that a folder holds by configuration, and the paper's tables of them."""
    files = ((path.name, path.stat().st_mtime_ns) for path in folder.glob("*.json"))
    return _read(folder, *sorted(files))


@cache
def _read(folder: Path, *files: tuple[str, int]) -> tuple[dict[Any, Any], list[Any]]:
    """The same, read once while these are its files."""
    try:
        found = records.read(folder)
        return found, records.table_runs(found)
    except CheckpointError as error:
        log.warning("%s: %s", folder.name, error)
        return {}, []


AFTER = tuple(accumulate(passes for passes, _ in PRESETS["paper"].stages))[2:]
"""Passes at the ends of the paper's stages."""


def schedules() -> str:
    """The one-layer VAE of one sample by each recorded protocol: its training bound on the way, and its NLL."""
    lines, results = [], []
    for folder in (*_folders(), *sorted((RESULTS / "schedule").glob("*"))):
        for config, result in _held(folder)[0].items():
            alike = Config("binarized_mnist", "fixed", 1, "vae(k=1)", config.preset)
            if config != alike:
                continue
            preset, curve = config.preset, result["learning_curve"]
            rates = " to ".join(f"{preset.stages[i][1]:.2g}" for i in (0, -1))
            how = f"one cycle, peak {preset.stages[0][1]:g}" if preset.one_cycle else rates
            bounds = (f"{curve[n - 1]:.1f}" if n <= len(curve) else "" for n in AFTER)
            lines.append(
                (
                    how,
                    str(preset.passes),
                    *bounds,
                    _shown("{:.2f}", result["metrics"]["nll"]),
                    _shown("{:.2f}", result["metrics"]["kl_posterior"]),
                )
            )
            results.append(result)
    if not lines:
        return _not_run('mcobj train --objective "vae(k=1)" --preset paper')
    header = ("learning rates", "passes", *(f"after {n}" for n in AFTER), "NLL", "KL")
    return "\n\n".join(
        (
            blocks.markdown_table(header, lines, right=range(1, len(header))),
            "Mean bound over the training images during a pass, batches of 100; NLL and KL(q ‖ posterior) at the end.",
            provenance(results),
        )
    )


# Figures of the paper.


def figures() -> str:
    """The figures that were drawn of recorded models; where there is none, the command that draws it."""
    drawn = [picture for _, picture in _drawn()]
    parts = [blocks.markdown(drawn)] if drawn else []
    for number, figure in not_drawn(drawn).items():
        command = f"mcobj figure {number} --preset short"
        title = f"**Figure {number}: {figure.title}.** {NOT_RUN.capitalize()}."
        parts.append(f"{title} `{command}` draws it.")
    return "\n\n".join(parts)


def _drawn() -> list[tuple[Path, Any]]:
    """The recorded figures: where each image is, and the picture with its address in the site."""
    return [
        (folder / picture.file, replace(picture, file=f"assets/{folder.name}/{picture.file}"))
        for folder in _folders()
        for picture in pictures(folder)
    ]


# The same columns for objectives of one model on one data set.


def evidence() -> str:
    """Every recorded objective on the one-layer model and the paper's fixed-binarised MNIST."""
    for folder in _folders():
        if known := _one_layer_rows(folder, ("1", "5", "6", "7"), papers_data=True):
            return _comparison(known)
    return _not_run("mcobj reproduce --table 1 --preset short --layers 1", ", and tables 5 to 7, ")


def evidence_digits() -> str:
    """Every objective of the paper's tables on the one-layer model and the small digits data set, several seeds."""
    known = _one_layer_rows(RESULTS / "digits", ("1", "5", "6", "7", "8", "9"), papers_data=False)
    if known:
        return _comparison(known)
    return _not_run(
        "mcobj reproduce --table 1 --dataset digits --preset short --seeds 3 --layers 1", ", and tables 5 to 9, "
    )


def _one_layer_rows(folder: Path, numbers: Iterable[str], *, papers_data: bool) -> list[Any]:
    """The rows of some tables of which a folder holds an NLL, an objective once."""
    known: dict[str, Any] = {}
    for number in numbers:
        for row in (r for rows in _recorded_rows(number, folder) for r in rows):
            papers = row.layers == 1 and row.on_papers_data == papers_data
            if papers and row.mean("nll") is not None:  # one that is not finite is in the tables
                known.setdefault(row.configs[0].objective, row)
    return list(known.values())


def _comparison(rows: Sequence[Any]) -> str:
    """NLL, KL, active units, ESS and k-hat of objectives of one model on one data set, the best NLL first."""
    header = (
        "objective",
        "NLL",
        "over VAE, k = 1",
        "KL(q ‖ posterior)",
        "active units",
        f"ESS of {rows[0].configs[0].preset.nll_k}",
        "k-hat too high",
    )
    names = {row.configs[0].objective: row for row in rows}
    base = names["vae(k=1)"].mean("nll") if "vae(k=1)" in names else None
    lines = []
    for name, row in sorted(names.items(), key=lambda item: item[1].mean("nll")):
        nll, error = row.mean("nll"), row.mean("nll_stderr")
        lines.append(
            (
                f"`{name}`",
                f"{nll:.2f} ± {error:.2f}",
                "" if base is None else f"{nll - base:+.2f}",
                _shown("{:.2f}", row.mean("kl_posterior")),
                row.units("active_units"),
                _shown("{:.0f}", row.mean("ess_mean")),
                _shown("{:.0%}", row.mean("khat_unreliable")).replace("%", " %"),
            )
        )
    return "\n\n".join(
        (
            blocks.markdown_table(header, lines, right=range(1, 7)),
            f"One stochastic layer; {render.caption(rows, beside=False)}. ± is the standard error over the images. "
            "Objectives that are missing are not run, or their NLL is not finite.",
            provenance(result for row in rows for result in row.results),
        )
    )


def _shown(form: str, value: float | None) -> str:
    """A metric, empty where it is not finite."""
    return "" if value is None else form.format(value)


# What is installed.


def objectives() -> str:
    """This library's own objectives: parameters, and which estimators they allow."""
    header = ("name", "parameters", *(f"`{name}`" for name in own_names(ESTIMATORS)))
    lines = []
    for entry in catalogue():
        if entry.package == "mcobjectives":
            label = f"[`{entry.name}`](api/index.md#mcobjectives.{get_objective(entry.name).__name__})"
            allowed = ("yes" if name in entry.estimators else "refused" for name in own_names(ESTIMATORS))
            lines.append((label, f"`{entry.parameters}`", *allowed))
    return blocks.markdown_table(header, lines)


def presets() -> str:
    """The training protocols."""
    lines = [
        (
            f"`{p.name}`",
            p.about,
            str(p.passes),
            str(p.batch_size),
            str(p.backward_samples or "all"),
            f"IWAE-{p.nll_k} on {'all' if p.test_images is None else p.test_images} images",
        )
        for p in PRESETS.values()
    ]
    return blocks.markdown_table(("preset", "what it is", "passes", "batch", "samples back-propagated", "NLL"), lines)


def datasets() -> str:
    """The data sets that the tables are made of."""
    lines = []
    for s in DATASETS.values():
        where = (
            f"`{s.url}`"
            if s.url
            else f"torchvision's `{s.torchvision}`"
            if s.torchvision
            else "comes with scikit-learn"
        )
        lines.append((f"`{s.name}`", s.about, f"{s.sizes[0]:,} / {s.sizes[1]:,}", "yes" if s.binary else "no", where))
    return blocks.markdown_table(("name", "what it is", "train / test", "binary", "from"), lines)


# The command line.


def cli() -> str:
    """Every command of `mcobj` with its options, from the program itself."""
    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():
        arguments = " ".join(
            p.name.upper() if p.required else f"[{p.name.upper()}]..."
            for p in command.params
            if p.param_type_name == "argument"
        )
        usage = " ".join(filter(None, ("mcobj", name, "[OPTIONS]", arguments)))
        parts += [f"## {name}", _unwrapped(command.help), f"```text\n{usage}\n```"]
        lines = [_option(p) for p in command.params]
        parts.append(blocks.markdown_table(("option", "default", "meaning"), lines))
    return "\n\n".join(parts)


def _option(parameter: Any) -> tuple[str, str, str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.required:
        default = "required"
    elif isinstance(parameter.show_default, str):
        default = parameter.show_default
    elif parameter.default is None or parameter.default is False or parameter.default == []:
        default = ""
    else:
        default = f"`{'--' + parameter.name if parameter.default is True else parameter.default}`"
    if parameter.param_type_name == "argument":
        names = [parameter.name.upper()]
    return ", ".join(f"`{n}`" for n in names), default, parameter.help or ""


# Measurements.


def _record(benchmark: str) -> dict[str, Any] | None:
    path = RESULTS / f"{benchmark}.json"
    return json.loads(path.read_text()) if path.exists() else None


def goals() -> str:
    """The project's own goals of speed and memory."""
    return measurements.goals(_record)


def _measurement(benchmark: str, show: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """What a benchmark recorded; the command where there is no record."""

    def shown() -> str:
        record = _record(benchmark)
        command = f"python benchmarks/{benchmark}.py --out benchmarks/results/{benchmark}.json"
        return _not_run(command) if record is None else show(record)

    return shown


def changelog() -> str:
    """CHANGELOG.md without its title."""
    return (ROOT / "CHANGELOG.md").read_text().partition("\n")[2]


def _not_run(command: str, more: str = " ") -> str:
    return f"{NOT_RUN.capitalize()}: `{command}`{more}fills this in."


def _unwrapped(text: str | None) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text or "")


GENERATORS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        tables,
        agreement,
        schedules,
        figures,
        evidence,
        evidence_digits,
        objectives,
        presets,
        datasets,
        cli,
        goals,
        changelog,
    )
} | {name: _measurement(name, show) for name, show in measurements.MEASUREMENTS.items()}
