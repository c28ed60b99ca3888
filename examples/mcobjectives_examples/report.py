"""One page on all that a folder of results holds: HTML that needs no network, and its twin in Markdown."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from mcobjectives_examples import checkpoints, curves, render
from mcobjectives_examples.blocks import Block, Bullets, Picture, Section, Text, markdown_page
from mcobjectives_examples.figures import FIGURES, Figure
from mcobjectives_examples.files import write_atomically
from mcobjectives_examples.findings import findings
from mcobjectives_examples.metric_tables import metric_tables
from mcobjectives_examples.origins import origin_blocks
from mcobjectives_examples.paper import paper, table
from mcobjectives_examples.provenance import provenances
from mcobjectives_examples.records import Records, TableRun, missing, read, table_runs
from mcobjectives_examples.results import FORMATS, read_json, record_path
from mcobjectives_examples.words import counted


def write_report(folder: Path, out: Path) -> list[Path]:
    """Write `report.html` and `report.md` on a folder of results; raises `ValueError` where there are none."""
    page = report(folder, linked=out.resolve() == folder.resolve())
    written = {out / "report.html": html(page), out / "report.md": markdown_page(page)}
    for path, text in written.items():
        write_atomically(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    return list(written)


def html(page: Section) -> str:
    """The page as HTML; whatever is in a record stays text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda block: type(block).__name__
    template = environment.from_string((files("mcobjectives_examples") / "data" / "report.html").read_text())
    return template.render(page=page, not_run=render.NOT_RUN, unreliable=render.UNRELIABLE)


def report(folder: Path, linked: bool = True) -> Section:
    """All that a folder holds; `linked` images are beside the page."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name one that mcobj reproduce or train wrote to")
    records, drawings = read(folder), list(pictures(folder, linked))
    if not records and not drawings:
        raise ValueError(f"{folder} holds no recorded results: mcobj reproduce and train write them to --out")
    runs = table_runs(records)
    drawn = Section("Figures", drawings or [Text(f"{render.NOT_RUN.capitalize()}: mcobj figure draws them.")])
    sections = [
        Section(
            "The paper's tables", [Text(render.noise_note())] if runs else [], [_table_section(run) for run in runs]
        ),
        Section("Other recorded models", curves.other_learning_curves(records, runs)),
        drawn,
        Section("Every recorded cell", metric_tables(records)),
        Section("Not run", list(_not_run(runs, drawings))),
        Section("Configuration and provenance", origin_blocks(records)),
    ]
    name = folder.resolve().name
    return Section(
        f"Results recorded in {name}",
        [_summary(records, runs, drawings)],
        [s for s in sections if s.blocks or s.sections],
    )


def _table_section(run: TableRun) -> Section:
    title = render.title(run.number, run.rows)
    results = [result for row in run.rows for result in row.results if result is not None]
    blocks = render.table_blocks("Ours beside the paper's", run.rows, findings(run.rows))
    blocks.append(Text(render.sources(source for result in results for source in provenances(result))))
    return Section(title, [*blocks, *curves.k_curves(run), *curves.learning_curves(run)])


def _summary(records: Records, runs: Sequence[TableRun], drawings: Sequence[Picture]) -> Bullets:
    verdicts = Counter(found.verdict for run in runs for found in findings(run.rows))
    counts = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    shares = [result["metrics"].get("khat_unreliable") for result in records.values()]
    doubtful, unknown = sum(map(render.unreliable, shares)), shares.count(None)
    numbers = list(dict.fromkeys(run.number for run in runs))
    tables = f", of the paper's {'table' if len(numbers) == 1 else 'tables'} {', '.join(numbers)}" if numbers else ""
    items = [
        f"{counted(len(records), 'cell')} recorded{tables}",
        f"The paper's claims, and what its tables show: {counts}" if verdicts else "",
        f"{doubtful} of {len(records)} NLLs are {render.UNRELIABLE}: k-hat is too high for more than "
        f"{100 * render.MOST_UNRELIABLE:.0f} % of the test images, and the NLL may be too high by more than its "
        f"standard error tells{f'; of {unknown} k-hat is not known' if unknown else ''}"
        if records
        else "",
        f"{counted(len(drawings), 'figure')} drawn" if drawings else "",
    ]
    return Bullets([item for item in items if item])


def pictures(folder: Path, linked: bool = True) -> Iterator[Picture]:
    """The figures that a folder holds with their records; `linked` images are beside the page."""
    for path in sorted(folder.iterdir()):
        record = record_path(path)
        if path.suffix in FORMATS and record.is_file():
            found = read_json(record)
            with checkpoints.readable(record):
                title, caption, alt = found["title"], found["caption"], found["alt"]
                source = render.sources([found["provenance"]])
            image = path.read_bytes()
            digest = sha256(image).hexdigest()
            if found.get("image_sha256", digest) != digest:  # older records have none
                raise checkpoints.CheckpointError(
                    f"{path} is not the image that {record.name} tells of: draw it again or move both away"
                )
            encoded = base64.b64encode(image).decode()
            uri = f"data:{FORMATS[path.suffix]};base64,{encoded}"
            yield Picture(title, f"{caption} {source}", alt, uri, path.name if linked else "")


def not_drawn(drawings: Sequence[Picture]) -> dict[int, Figure]:
    """The paper's figures that are not among some drawings."""
    drawn = {picture.title.partition(":")[0] for picture in drawings}
    return {number: figure for number, figure in FIGURES.items() if f"Figure {number}" not in drawn}


def _not_run(runs: Sequence[TableRun], drawings: Sequence[Picture]) -> Iterator[Block]:
    items = []
    for run in runs:
        rows = [f"{row.layers}L {row.label}{_which_seeds(row.configs, seeds)}" for row, seeds in missing(run)]
        if rows:
            items.append(f"Of {render.title(run.number, run.rows)}: {', '.join(rows)}")
    tables = [n for n in paper()["tables"] if n not in {run.number for run in runs}]
    items += [f"Table {n}: {table(n)['title']}" for n in tables]
    items += [f"Figure {n}: {figure.title}" for n, figure in not_drawn(drawings).items()]
    if items:
        yield Bullets(items)
        yield Text("mcobj reproduce --table N runs a table, or goes on with it; mcobj figure N draws a figure.")


def _which_seeds(configs: Sequence[Any], seeds: Sequence[int]) -> str:
    """Which of a row's seeds are meant, where it has several."""
    return "" if len(configs) == len(seeds) == 1 else f" (seed {', '.join(map(str, seeds))})"
