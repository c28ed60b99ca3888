"""The paper's tables as one command runs and prints them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mcobjectives.arguments import require_choice
from mcobjectives.cli.running import missing, run_all
from mcobjectives.cli.show import console, grid
from mcobjectives_examples import render
from mcobjectives_examples.cells import Place, passes_done
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import load
from mcobjectives_examples.findings import findings
from mcobjectives_examples.paper import paper
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.tables import Row, binarisations, configurations, rows, with_results


def reproduce_tables(
    number: str,
    preset: Preset,
    place: Place,
    *,
    cap: int | None,
    dataset: str | None,
    binarisation: str | None,
    layers: Sequence[int] | None,
    seeds: Sequence[int],
    download: bool,
    run: bool,
    form: str,
    stack: bool,
    jobs: int,
) -> None:
    """Run and print a table, or all of them (as JSON: one object, or a list of them)."""
    if stack and jobs > 1:
        raise ValueError("--stack trains cells as one model and --jobs in processes of their own: give one of them")
    require_choice("table", number, [*paper()["tables"], "all"])
    tables: list[tuple[str, list[list[Row]], list[Config]]] = []  # the rows by one protocol or two, and all their cells
    for n in list(paper()["tables"]) if number == "all" else [number]:
        found = [
            rows(n, preset, seeds=seeds, cap=cap, dataset=dataset, binarisation=chosen, layers=layers)
            for chosen in binarisations(n, dataset, binarisation, strict=number != "all")
        ]
        if found[0]:
            tables.append((n, found, configurations([row for by_protocol in found for row in by_protocol])))
    if not tables:
        what = "no table has" if number == "all" else f"table {number} has no"
        raise ValueError(f"{what} rows of {', '.join(map(str, layers or []))} layers")
    datasets = _checked([configs for _, _, configs in tables], place, download) if run else {}
    records = []
    for n, found, configs in tables:
        loaded = datasets.get(configs[0].dataset)
        if loaded is not None:
            run_all(configs, loaded, place, jobs=jobs, stack=stack)
        for by_protocol in found:
            title = render.title(n, by_protocol)
            done = with_results(by_protocol, place.out, None if loaded is None else loaded.checksum)
            if form == "json":
                records.append(render.as_json(title, done, findings(done)))
            else:
                _print_table(title, done, form)
    if form == "json":
        print(json.dumps(records if number == "all" or binarisation == "both" else records[0], indent=1))


def _checked(tables: Sequence[Sequence[Config]], place: Place, download: bool) -> dict[str, Dataset]:
    """The data sets of all tables: what is amiss with these, or with a checkpoint, shows before the first is run."""
    datasets: dict[str, Dataset] = {}
    for configs in tables:
        name = configs[0].dataset
        if name not in datasets:
            datasets[name] = load(name, place.data_dir, download=download)
        passes_done(place.out, missing(configs, datasets[name], place.out), datasets[name].checksum)
    return datasets


def _print_table(title: str, done: Sequence[Row], form: str) -> None:
    found = findings(done)
    if form == "markdown":
        print(render.markdown(title, done, found))
    else:
        shown = grid(*render.HEADER, title=title, right=tuple(range(2, len(render.HEADER))))
        for row in done:
            shown.add_row(*render.cells(row))
        console.print(shown)
        console.print(render.caption(done), style="dim")
        colours = {"holds": "green", "does not hold": "red"}
        for finding in found:
            verdict = f"[{colours.get(finding.verdict, 'yellow')}]{finding.verdict}[/]"
            console.print(f"{verdict}: {finding.claim}: {finding.evidence}", highlight=False)
        if any(finding.verdict == "within noise" for finding in found):
            console.print(render.noise_note(), style="dim")
