"""What a folder holds: recorded results by configuration, and the paper's tables made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mcobjectives.specs import parse_objective
from mcobjectives_examples import checkpoints
from mcobjectives_examples.config import Config, canonical
from mcobjectives_examples.paper import paper, table
from mcobjectives_examples.results import FORMATS, read_result
from mcobjectives_examples.tables import Row, filled, rows

Records = dict[Config, dict[str, Any]]


@dataclass(frozen=True)
class TableRun:
    """One of the paper's tables as it was run: on one data set, by one protocol; at least one cell is recorded."""

    number: str
    rows: list[Row]


def read(folder: Path) -> Records:
    """The recorded results of a folder; raises `CheckpointError` for a file that is none, or is renamed."""
    found: Records = {}
    for path in sorted(folder.glob("*-seed*.json")):
        if path.with_suffix("").suffix in FORMATS:  # a figure's record
            continue
        result = read_result(path)
        with checkpoints.readable(path):
            config = Config.from_dict(result["config"])
            if config.name != path.stem:
                raise checkpoints.CheckpointError(f"{path} is the result of {config.name}: rename it or move it away")
            found[config.unworded] = result
    return found


def table_runs(records: Records) -> list[TableRun]:
    """The paper's tables, in their order, of which anything is recorded.

    On another data set than its own a table is made only of what no other shows: neither the data set's own tables nor
    a table before it. A cap on k is taken from results that no table has as it is, where it accounts for more of them.
    """

    def foreign(pair: tuple[str, Config]) -> bool:
        number, group = pair
        return group.dataset != table(number)["dataset"]

    numbers = list(paper()["tables"])
    runs = []
    shown: set[Config] = set()
    for number, group in sorted(product(numbers, _groups(records)), key=foreign):
        found = _rows(number, group, records)
        recorded = {c for row in found for c in row.configs if c in records}
        if recorded and not (foreign((number, group)) and recorded <= shown):
            runs.append(TableRun(number, found))
            shown |= recorded
    return sorted(runs, key=lambda run: numbers.index(run.number))


def _groups(records: Records) -> list[Config]:
    """One configuration of each data set, binarisation and preset of the paper's models, BGS16's protocol last.

    Without second stages.
    """
    first: dict[Any, Config] = {}
    for config in records:
        if config.after is None and config.latent is None:
            first.setdefault((config.dataset, config.binarisation, config.preset), config)
    return sorted(first.values(), key=lambda config: config.binarisation == "epoch")


def _rows(number: str, like: Config, records: Records) -> list[Row]:
    """A table's rows by the protocol of a configuration, with the cap and the seeds of which most is recorded."""
    alike = [c for c in records if (c.dataset, c.binarisation) == (like.dataset, like.binarisation)]
    seeds = sorted({c.seed for c in alike})
    capped = {c.objective for c in alike if c.preset == like.preset} - _papers_objectives()
    ks = {k for spec in capped if (k := _k_of(spec)) is not None}
    attempts = [(cap, _with(records, number, like, seeds, cap)) for cap in (None, *sorted(ks))]
    cap, most = max(attempts, key=lambda attempt: len({c for row in attempt[1] for c in row.configs if c in records}))
    used = [seed for i, seed in enumerate(seeds) if any(row.results[i] is not None for row in most)]
    return _with(records, number, like, used, cap) if used else []


def _with(records: Records, number: str, like: Config, seeds: Sequence[int], cap: int | None) -> list[Row]:
    options = {"dataset": like.dataset, "binarisation": like.binarisation, "seeds": seeds, "cap": cap}
    return filled(rows(number, like.preset, **options), records.get)  # type: ignore[arg-type]


@cache
def _papers_objectives() -> frozenset[str]:
    """Those of any of the tables as they are: no cell of one tells of a cap."""
    return frozenset(canonical(row["objective"]) for number in paper()["tables"] for row in table(number)["rows"])


def _k_of(spec: str) -> int | None:
    try:
        return parse_objective(spec).k
    except ValueError:  # of a plugin that is not installed here
        return None


def missing(run: TableRun) -> Iterator[tuple[Row, list[int]]]:
    """Rows of which a seed is not run, and those seeds."""
    for row in run.rows:
        seeds = [c.seed for c, result in zip(row.configs, row.results, strict=True) if result is None]
        if seeds:
            yield row, seeds
