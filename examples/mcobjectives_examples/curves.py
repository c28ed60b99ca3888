"""Curves of recorded results: the bound against passes, and the NLL against k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from mcobjectives.specs import parse_objective
from mcobjectives_examples.blocks import Block, Chart, Table
from mcobjectives_examples.charts import COLOURS, Line, line_chart
from mcobjectives_examples.config import Config, name_of, without_k
from mcobjectives_examples.metric_tables import cell_name
from mcobjectives_examples.protocols import by_protocol
from mcobjectives_examples.records import Records, TableRun
from mcobjectives_examples.render import NLL
from mcobjectives_examples.tables import Row

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Parts of the training at which the bound is listed."""


def learning_curves(run: TableRun) -> list[Block]:
    """For each depth of a table the bound of every cell against passes."""
    cells = {c: r for row in run.rows for c, r in zip(row.configs, row.results, strict=True) if r is not None}
    return list(_by_depth(cells))


def other_learning_curves(records: Records, runs: Sequence[TableRun]) -> list[Block]:
    """The same for what no table shows."""
    shown = {config for run in runs for row in run.rows for config in row.configs}
    groups = by_protocol(records).items()
    others = [(f", {name}", {c: result for c, result in cells.items() if c not in shown}) for name, cells in groups]
    return [chart for name, cells in others for chart in _by_depth(cells, name)]


def _by_depth(cells: Records, protocol: str = "") -> Iterator[Chart]:
    for layers in sorted({config.layers for config in cells}):
        curves = {c: r["learning_curve"] for c, r in cells.items() if c.layers == layers and r.get("learning_curve")}
        names = list(dict.fromkeys(map(cell_name, curves)))
        for start in range(0, len(names), COLOURS):
            few = names[start : start + COLOURS]
            those = {c: curve for c, curve in curves.items() if cell_name(c) in few}
            yield _learning(those, few, f"Learning curves, {layers}L{protocol}")


def _learning(curves: dict[Config, list[float]], names: Sequence[str], title: str) -> Chart:
    lines = []
    for config, bounds in curves.items():
        first = len(bounds) // 10
        points = [(float(i + 1), bound) for i, bound in enumerate(bounds) if i >= first]
        lines.append(Line(f"{cell_name(config)}, seed {config.seed}", points, f"c{names.index(cell_name(config))}"))
    note = (
        "Mean bound of the training images in a pass, in nats, each of its own objective; the first tenth is not drawn."
    )
    listed = [
        [cell_name(c), str(c.seed), *(f"{bounds[max(1, round(share * len(bounds))) - 1]:.2f}" for share in SHARES)]
        for c, bounds in curves.items()
    ]
    header = ("cell", "seed", *(f"after {100 * share:.0f} %" for share in SHARES))
    table = Table(title, header, listed, tuple(range(1, len(header))), note)
    svg = line_chart(lines, "passes", "bound, nats", f"{title}: {', '.join(names)}. The numbers are in the table.")
    return Chart(svg, [(name, f"c{i}") for i, name in enumerate(names)], table)


def k_curves(run: TableRun) -> list[Block]:
    """For each depth of a table the NLL against k, of objectives that were run for several k, beside the paper's."""
    return [chart for layers in sorted({row.layers for row in run.rows}) for chart in _k_curve(run, layers)]


def _k_curve(run: TableRun, layers: int) -> Iterator[Chart]:
    series: defaultdict[str, dict[int, Row]] = defaultdict(dict)
    for row in run.rows:
        if row.layers == layers and row.after is None and row.mean("nll") is not None:
            series[_curve_name(row.objective)].setdefault(row.k, row)
    series = defaultdict(dict, {name: by_k for name, by_k in series.items() if len(by_k) > 1})
    if not series:
        return
    lines, legend, listed = [], [], []
    ks = sorted({k for by_k in series.values() for k in by_k})
    for i, (name, by_k) in enumerate(series.items()):
        for whose, values in _sources(by_k.values()).items():
            if len(values) > 1:
                label, style = f"{name}, {whose}", f"c{i % COLOURS} {whose}"
                lines.append(Line(label, sorted(values.items()), style))
                legend.append((label, style))
                listed.append([label, *(f"{values[k]:.2f}" if k in values else "" for k in ks)])
    title = f"{NLL} against k, {layers}L"
    table = Table(title, ("", *(f"k = {k}" for k in ks)), listed, tuple(range(1, len(ks) + 1)), "In nats.")
    about = f"{title}: {', '.join(label for label, _ in legend)}. The numbers are in the table."
    yield Chart(line_chart(lines, "k", "NLL, nats", about, log_x=True, dots=True), legend, table)


def _sources(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """NLL by k: ours, and the paper's and BGS16's where they are of the same data and k."""
    found: dict[str, dict[int, float]] = {"ours": {}, "paper": {}, "BGS16": {}}
    for row in rows:
        nll = row.mean("nll")
        assert nll is not None
        found["ours"][row.k] = nll
        if row.on_papers_data and not row.capped:
            for whose, numbers in (("paper", row.paper), ("BGS16", row.bgs16 or {})):
                if numbers.get("nll") is not None:
                    found[whose][row.k] = numbers["nll"]
    return found


def _curve_name(spec: str) -> str:
    """ "Power(p=0.5)" of "power(k=50, p=0.5)"."""
    return type(parse_objective(spec)).__name__ + without_k(spec).removeprefix(name_of(spec))
