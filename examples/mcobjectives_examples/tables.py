"""The paper's tables: which cells they have, and what of them is recorded."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcobjectives.specs import parse_objective
from mcobjectives_examples.binarisation import require_mode
from mcobjectives_examples.cells import recorded
from mcobjectives_examples.config import Config, canonical, capped, without_k
from mcobjectives_examples.datasets import default_binarisation
from mcobjectives_examples.paper import table
from mcobjectives_examples.presets import Preset


@dataclass(frozen=True)
class Row:
    """A cell of the paper's table, its configurations (one a seed), and what they gave, None where not run.

    `beside` are the cells of another table with which the paper compares this one's; `drawn_once` what the same cells
    gave with their pixels drawn once, empty for a row whose own are not drawn anew for every pass.
    """

    layers: int
    objective: str
    after: str | None
    paper: dict[str, Any]
    bgs16: dict[str, Any] | None
    configs: tuple[Config, ...]
    first_stages: tuple[Config, ...] = ()
    on_papers_data: bool = True
    results: tuple[dict[str, Any] | None, ...] = ()
    first_results: tuple[dict[str, Any] | None, ...] = ()
    drawn_once: tuple[dict[str, Any] | None, ...] = ()
    beside: tuple[Row, ...] = ()

    @property
    def k(self) -> int:
        """Samples it is trained with, fewer than the paper's where they are capped."""
        return parse_objective(self.configs[0].objective).k

    @property
    def capped(self) -> bool:
        """Whether it, or its first stage, is trained with fewer samples than the paper's."""
        config = self.configs[0]
        pairs = [(config.objective, self.objective), *([(config.after, self.after)] if self.after else [])]
        return any(parse_objective(ours or "").k < parse_objective(theirs).k for ours, theirs in pairs)

    @property
    def trained_as(self) -> str:
        """What is trained, after what: `label` where nothing is capped, but for the way in which it is written."""
        config = self.configs[0]
        return config.objective if config.after is None else f"{config.after} then {config.objective}"

    @property
    def family(self) -> str:
        """ "vae" or "iwae" for a row of one of these without further options, else empty."""
        plain = without_k(self.objective)
        return plain if plain in ("vae", "iwae") else ""

    @property
    def label(self) -> str:
        return self.objective if self.after is None else f"{self.after} then {self.objective}"

    def values(self, metric: str) -> list[Any]:
        """A metric of each seed that has it: older results lack some, and what is not finite is None."""
        found = (result["metrics"].get(metric) for result in self.results if result is not None)
        return [value for value in found if value is not None]

    @property
    def complete(self) -> bool:
        return bool(self.results) and None not in self.results

    def mean(self, metric: str) -> float | None:
        """Over the seeds that have the metric; None where one's is not finite, or none has it."""
        values = [r["metrics"][metric] for r in self.results if r is not None and metric in r["metrics"]]
        return statistics.fmean(values) if values and None not in values else None

    def spread(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def pruning_costs(self) -> list[float | None]:
        """By how much NLL grows without inactive units, in each seed that tells; None for what is not finite."""
        recorded = [result["metrics"] for result in self.results if result is not None]
        pairs = [(m["nll_pruned"], m["nll_unpruned_same_images"]) for m in recorded if "nll_pruned" in m]
        return [None if None in pair else pair[0] - pair[1] for pair in pairs]

    def units(self, metric: str) -> str:
        """Units per layer, joined by "+", averaged over seeds."""
        values = self.values(metric)
        return "+".join(f"{statistics.fmean(layer):.3g}" for layer in zip(*values, strict=True)) if values else ""


def rows(
    number: int | str,
    preset: Preset,
    *,
    dataset: str | None = None,
    binarisation: str | None = None,
    seeds: Sequence[int] = (0,),
    layers: Sequence[int] | None = None,
    cap: int | None = None,
) -> list[Row]:
    """The rows of a table as configurations of a preset, on the paper's data set or another; `cap` limits every k."""
    grid = table(number)
    name = grid["dataset"] if dataset is None else dataset
    protocol = preset.binarisation_of(name) if binarisation is None else binarisation
    beside: tuple[Row, ...] = ()
    if "beside" in grid:
        options: dict[str, Any] = {"dataset": dataset, "binarisation": binarisation, "seeds": seeds, "cap": cap}
        beside = tuple(rows(grid["beside"], preset, layers=[1], **options))
    found = []
    for row in grid["rows"]:
        if layers and row["layers"] not in layers:
            continue
        after = row.get("after")
        config = Config(name, protocol, row["layers"], canonical(capped(row["objective"], cap)), preset)
        first_stages: tuple[Config, ...] = ()
        if after is not None:
            first = replace(config, objective=canonical(capped(after, cap)))
            first_stages = tuple(replace(first, seed=seed) for seed in seeds)
            config = replace(config, preset=preset.continued(**grid["second_stage"]), after=first.objective)
        configs = tuple(replace(config, seed=seed) for seed in seeds)
        found.append(
            Row(
                layers=row["layers"],
                objective=row["objective"],
                after=after,
                paper=row["paper"],
                bgs16=row.get("bgs16"),
                configs=configs,
                first_stages=first_stages,
                on_papers_data=name == grid["dataset"],
                beside=beside,
            )
        )
    return found


def binarisations(
    number: int | str, dataset: str | None, binarisation: str | None, *, strict: bool
) -> list[str | None]:
    """The binarisations to run a table under: "both" is once and epoch. Binary data stay fixed unless `strict`.

    Raises `DataError` for a protocol that is none, or does not fit the data.
    """
    fixed = default_binarisation(table(number)["dataset"] if dataset is None else dataset) == "fixed"
    if binarisation not in (None, "both"):
        require_mode(binarisation, binary=fixed and (strict or binarisation == "fixed"))
    if fixed and (binarisation == "both" or not strict):
        return [None]
    return ["once", "epoch"] if binarisation == "both" else [binarisation]


def configurations(table_rows: Sequence[Row]) -> list[Config]:
    """All distinct configurations to train, first stages before the second, cells that rows share once."""
    ordered: dict[Config, None] = {}
    for row in table_rows:
        ordered |= dict.fromkeys((*row.first_stages, *row.configs))
    return sorted(ordered, key=lambda config: config.after is not None)


def with_results(table_rows: Sequence[Row], out: Path, data_sha256: str | None = None) -> list[Row]:
    """The rows with what is recorded in a folder."""
    return filled(table_rows, lambda config: recorded(out, config, data_sha256))


def filled(table_rows: Sequence[Row], result: Callable[[Config], dict[str, Any] | None]) -> list[Row]:
    """The rows with the results of their configurations, and of all the cells beside which these are seen."""

    def found(configs: Iterable[Config]) -> tuple[dict[str, Any] | None, ...]:
        return tuple(map(result, configs))

    beside = tuple(replace(row, results=found(row.configs)) for row in (table_rows[0].beside if table_rows else ()))
    return [
        replace(
            row,
            results=found(row.configs),
            first_results=found(row.first_stages),
            drawn_once=found(replace(c, binarisation="once") for c in row.configs if c.binarisation == "epoch"),
            beside=beside,
        )
        for row in table_rows
    ]
