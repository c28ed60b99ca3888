"""Which of the paper's claims, and of what its tables show, hold in a table that was run, each with its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mcobjectives import CIWAE, MIWAE, LAlpha, Median, Objective, Power
from mcobjectives.specs import parse_objective
from mcobjectives_examples.config import Config, name_of
from mcobjectives_examples.paper import table
from mcobjectives_examples.tables import Row
from mcobjectives_examples.verdicts import (
    LEAST_SEEDS,
    NOISE,
    NOISE_IN_UNITS,
    Finding,
    Measured,
    Series,
    alike,
    bent,
    half_interval,
    of_seeds,
    ordered,
    unfallen,
    worst,
)

PRUNING_OF_BGS16 = 0.06
"""Nats: the most that BGS16 lost by removing inactive units; the paper says that it lost about one."""


Grid = dict[tuple[int, str, int], Row]
Results = Sequence[dict[str, Any] | None]


def findings(table_rows: Sequence[Row]) -> list[Finding]:
    """Which of the paper's claims hold in these rows, and in the paper's own numbers by the same rule."""
    theirs = {f.claim: f.verdict for f in _findings(_papers(table_rows))}
    return [replace(found, papers=theirs.get(found.claim, "")) for found in _findings(table_rows)]


def _papers(table_rows: Sequence[Row]) -> list[Row]:
    """The rows with the paper's numbers for results; none where these rows are not the paper's cells."""
    if not all(row.on_papers_data and not row.capped for row in table_rows):
        return []

    def own(row: Row) -> Row:
        first = next((r["first"] for r in table(10)["rows"] if row.after and r["after"] == row.after), None)
        stages = ({"metrics": first},) if first else ()
        beside = tuple(map(own, row.beside))
        return replace(row, results=({"metrics": row.paper},), first_results=stages, drawn_once=(), beside=beside)

    return list(map(own, table_rows))


def _findings(table_rows: Sequence[Row]) -> list[Finding]:
    """With the cells beside which the paper sets a table's rows."""
    by = _grid(row for row in table_rows if row.after is None)
    found = [*_by_k(by), *_by_depth(by), *_by_family(by)]
    if table_rows and table_rows[0].beside:
        peers = _grid(table_rows[0].beside)
        found += [*_l_alpha_or_median(table_rows, peers), *_power(table_rows, peers), *_ciwae(table_rows, peers)]
    return [
        *found,
        *_miwae(table_rows),
        *_switching(table_rows),
        *_drawn_anew(table_rows),
        *_pruning(table_rows),
    ]


# Tables 1 to 4: VAE and IWAE by k and depth.


def _by_k(by: Grid) -> Iterator[Finding]:
    for layers in _depths(by):
        iwae, vae = _series(by, layers, "iwae"), _series(by, layers, "vae")
        if len(iwae) > 1:
            yield ordered(f"{layers}L: IWAE's NLL falls with k", [_all(iwae, "nll")], -1)
        if len(vae) > 1:
            yield unfallen(f"{layers}L: VAE's NLL does not fall with k", _all(vae, "nll"))
        if len(iwae) > 1:
            claim = f"{layers}L: KL(q || posterior) grows with k for IWAE"
            yield ordered(claim, [_all(iwae, "kl_posterior")], 1)
        if len(iwae) > 1 and any(row.values("reconstruction_error") for row in iwae):  # older results have none
            claim = f"{layers}L: IWAE's reconstruction error is greater at the largest k than at the least"
            cells = _all(iwae, "reconstruction_error")
            yield replace(ordered(claim, [[cells[0], cells[-1]]], 1), figures=" -> ".join(map(str, cells)))


def _by_depth(by: Grid) -> Iterator[Finding]:
    pairs = [[by[1, name, k], by[2, name, k]] for layers, name, k in by if layers == 1 and (2, name, k) in by]
    if pairs:
        yield ordered("two stochastic layers beat one", [_all(pair, "nll") for pair in pairs], -1)


def _by_family(by: Grid) -> Iterator[Finding]:
    for layers in _depths(by):
        iwae = [row for row in _series(by, layers, "iwae") if row.k > 1]
        pairs = [[by[layers, "vae", row.k], row] for row in iwae if (layers, "vae", row.k) in by]
        if pairs:
            series = [_all(pair, "active_units") for pair in pairs]
            yield ordered(f"{layers}L: IWAE has more active units than VAE", series, 1, noise=NOISE_IN_UNITS)


# Tables 5 to 9: other objectives, beside VAE and IWAE of the same k.


def _l_alpha_or_median(table_rows: Sequence[Row], peers: Grid) -> Iterator[Finding]:
    alphas = _rows_of(table_rows, LAlpha)
    if len(alphas) > 1:
        yield alike("L_alpha: alpha makes no difference to the NLL", _all(alphas, "nll"))
    for name, kind in (("L_alpha", LAlpha), ("the median", Median)):
        rows = _rows_of(table_rows, kind)
        for family in ("vae", "iwae") if rows else ():
            series = [_all([peer, row], "nll") for row in rows if (peer := peers.get((1, family, row.k)))]
            if series:
                yield ordered(f"{name}: a higher NLL than {family.upper()}'s", series, 1)


def _power(table_rows: Sequence[Row], peers: Grid) -> Iterator[Finding]:
    rows = {objective.p: row for row in _rows_of(table_rows, Power) if isinstance(objective := _objective(row), Power)}
    above = [row for p, row in rows.items() if p > 1]
    series = [_all([peer, row], "nll") for row in above if (peer := peers.get((1, "iwae", row.k)))]
    if series:
        yield ordered("power: a lower NLL than IWAE's for p > 1", series, -1)
    if 3.0 in rows:
        series = [_all([row, rows[3.0]], "nll") for p, row in rows.items() if p != 3.0]
        yield ordered("power: p = 3 has the lowest NLL", series, -1)


def _ciwae(table_rows: Sequence[Row], peers: Grid) -> Iterator[Finding]:
    rows = _rows_of(table_rows, CIWAE)  # by growing beta
    iwae, vae = (peers.get((1, family, rows[0].k)) if rows else None for family in ("iwae", "vae"))
    if iwae is None or vae is None:
        return
    middle = [row for row in rows if _objective(row) == CIWAE(k=_objective(row).k, beta=0.25)]
    yield bent("CIWAE: the NLL is not monotone in beta from IWAE to VAE", _all([iwae, *rows, vae], "nll"))
    yield alike("CIWAE: with beta = 0.25 the NLL is IWAE's", _all([iwae, *middle], "nll"))
    yield ordered("CIWAE: a lower NLL than VAE's", [_all([vae, row], "nll") for row in rows], -1)
    claim = "CIWAE: a lower KL(q || posterior) than IWAE's"
    yield ordered(claim, [_all([iwae, row], "kl_posterior") for row in rows], -1)


def _miwae(table_rows: Sequence[Row]) -> Iterator[Finding]:
    rows = _rows_of(table_rows, MIWAE)  # by growing k1
    if len(rows) > 1:
        yield ordered("MIWAE: the NLL falls with k1", [_all(rows, "nll")], -1)
        yield ordered("MIWAE: KL(q || posterior) grows with k1", [_all(rows, "kl_posterior")], 1)


# Table 10: before and after the objective is switched.


def _switching(table_rows: Sequence[Row]) -> Iterator[Finding]:
    for first, then in (("VAE", "IWAE"), ("IWAE", "VAE")):
        rows = [row for row in table_rows if row.after and name_of(row.after) == first.lower()]
        if not rows:
            continue

        def stages(metric: str, rows: list[Row] = rows) -> list[Series]:
            return [(_first(row, metric), _measured(row.results, metric, _label(row))) for row in rows]

        switch = f"{first}, then {then}"
        if first == "VAE":
            yield ordered(f"{switch}: the NLL falls", stages("nll"), -1)
            yield ordered(f"{switch}: more units are active", stages("active_units"), 1, noise=NOISE_IN_UNITS)
        else:
            yield ordered(f"{switch}: the NLL rises", stages("nll"), 1)
            for series in stages("active_units"):
                yield alike(f"{switch}: as many units are active ({series[1].label})", series, noise=NOISE_IN_UNITS)
            yield ordered(f"{switch}: KL(q || posterior) falls", stages("kl_posterior"), -1)


# Every table.


def _drawn_anew(table_rows: Sequence[Row]) -> Iterator[Finding]:
    """Pixels drawn for every pass, as BGS16's code does, against once: to this the paper puts down its higher NLLs.

    Of the cells that are recorded by both: each is compared with itself alone.
    """
    both = [row for row in _distinct(table_rows) if any(row.results) and any(row.drawn_once)]
    for layers in dict.fromkeys(row.layers for row in both):
        alike = [row for row in both if row.layers == layers]
        nlls = [
            (_measured(row.drawn_once, "nll", f"{_label(row)} once"), _measured(row.results, "nll", "anew"))
            for row in alike
        ]
        yield ordered(f"{layers}L: drawing the pixels anew for every pass lowers the NLL", nlls, -1)
        gaps = [
            (_overfit(row.drawn_once, f"{_label(row)} once"), _overfit(row.results, "anew"))
            for row in alike
            if row.family == "vae"
        ]
        if gaps:
            claim = f"{layers}L: with pixels drawn anew a VAE's training bound is less above its test ELBO"
            yield ordered(claim, gaps, -1)


def _overfit(results: Results, label: str) -> Measured:
    """By how much a VAE's bound on the training images, in the last pass, is above that on the test images."""
    recorded = [r for r in results if r is not None and r.get("learning_curve") and "elbo" in r["metrics"]]
    ends = [(r["learning_curve"][-1], r["metrics"]["elbo"]) for r in recorded]
    return _measured_values(label, [None if test is None else train - test for train, test in ends], len(results))


def _pruning(table_rows: Sequence[Row]) -> Iterator[Finding]:
    """Both numbers are of one model and the same images, in every seed: the noise is over images, or over seeds."""
    rows = _distinct(table_rows)
    for layers in dict.fromkeys(row.layers for row in rows):
        alike = [row for row in rows if row.layers == layers]
        judged = list(map(_cost_of_pruning, alike)) if any(row.values("nll_pruned") for row in alike) else []
        verdicts = [verdict for verdict, _ in judged if verdict]
        if verdicts:
            lost = f"more than BGS16's {PRUNING_OF_BGS16} nat (the paper: about 1)"
            figures = "; ".join(figures for _, figures in judged)
            yield Finding(f"{layers}L: removing inactive units costs {lost}", worst(verdicts), figures)


def _cost_of_pruning(row: Row) -> tuple[str, str]:
    """A verdict on one row, empty where there is nothing to prune, and its figures."""
    label, costs = _label(row), [cost for cost in row.pruning_costs if cost is not None]
    if not costs or None in row.pruning_costs:
        lack = "not finite" if row.pruning_costs else "not run"
        return lack, f"{label} {lack}"
    errors = row.values("nll_pruned_stderr")
    if not any(costs) and not any(errors):  # the very same model
        return "", f"{label} has no inactive unit"
    cost, stderr = statistics.fmean(costs), statistics.fmean(errors) if errors else 0.0
    few, width = len(costs) < LEAST_SEEDS, 2 * stderr
    if not few:
        stderr = max(stderr, statistics.stdev(costs) / math.sqrt(len(costs)))
        width = max(width, half_interval(costs))
    over = cost - PRUNING_OF_BGS16
    holds = over > (max(NOISE, width) if few else width)
    verdict = "holds" if holds else "does not hold" if over < -width else "within noise"
    return verdict, f"{label} {cost:+.2f} ± {stderr:.2f}{of_seeds(len(costs), len(row.results))}"


# Rows.


def _grid(table_rows: Iterable[Row]) -> Grid:
    # By the k that was trained, so that rows made equal by a cap on k are one.
    return {(row.layers, row.family, row.k): row for row in table_rows if row.family}


def _depths(by: Grid) -> list[int]:
    return sorted({layers for layers, _, _ in by})


def _series(by: Grid, layers: int, family: str) -> list[Row]:
    """The rows of a depth and a family by growing k."""
    return [by[key] for key in sorted(by) if key[:2] == (layers, family)]


def _objective(row: Row) -> Objective:
    return parse_objective(row.objective)


def _rows_of(table_rows: Sequence[Row], kind: type[Objective]) -> list[Row]:
    """The rows of an objective, those made equal by a cap on k once."""
    return _distinct(row for row in table_rows if row.after is None and type(_objective(row)) is kind)


def _distinct(table_rows: Iterable[Row]) -> list[Row]:
    """Of rows that are one cell, as where a cap makes them equal, the first."""
    cells: dict[tuple[Config, ...], Row] = {}
    for row in table_rows:
        cells.setdefault(row.configs, row)
    return list(cells.values())


def _all(rows: Sequence[Row], metric: str) -> Series:
    return [_measured(row.results, metric, _label(row)) for row in rows]


def _first(row: Row, metric: str) -> Measured:
    return _measured(row.first_results, metric, _label(row).partition(" then ")[0])


def _measured(results: Results, metric: str, label: str) -> Measured:
    """A metric of a row's results; units are summed over layers."""
    found = [result["metrics"][metric] for result in results if result is not None and metric in result["metrics"]]
    return _measured_values(label, [sum(v) if isinstance(v, list) else v for v in found], len(results))


def _measured_values(label: str, values: Sequence[float | None], seeds: int) -> Measured:
    """Values, of so many seeds those that are run; None stands for what is not finite."""
    finite = tuple(float(value) for value in values if value is not None)
    if not finite or len(finite) < len(values):
        return Measured(label, (), seeds, "not finite" if values else "not run")
    return Measured(label, finite, seeds)


def _label(row: Row) -> str:
    return f"{row.layers}L {row.trained_as if row.capped else row.label}"
