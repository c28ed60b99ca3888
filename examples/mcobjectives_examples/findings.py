"""Which of the paper's claims hold in a table that was run, each with its figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mcobjectives_examples.tables import Row

NOISE = 0.6
"""Nats between two runs of one configuration in the paper: with fewer than three seeds, less proves nothing."""
LEAST_SEEDS = 3
"""From so many on, less than two standard errors of the difference proves nothing."""


@dataclass(frozen=True)
class Finding:
    """One of the paper's claims: "holds", "does not hold", "within noise" or "not run", and the figures."""

    claim: str
    verdict: str
    figures: str


Series = Sequence[Row]
Grid = dict[tuple[int, str, int], Row]


def findings(table_rows: Sequence[Row]) -> list[Finding]:
    """Which of the paper's findings about k, depth, KL and active units hold in these rows."""
    # By the k that was trained, so that rows made equal by a cap on k are one.
    by = {(row.layers, row.family, row.k): row for row in table_rows if row.after is None and row.family}
    return [*_by_k(by), *_by_depth(by), *_by_family(by)]


def _by_k(by: Grid) -> Iterator[Finding]:
    for layers in _depths(by):
        iwae, vae = _series(by, layers, "iwae"), _series(by, layers, "vae")
        if len(iwae) > 1:
            yield _ordered(f"{layers}L: IWAE's NLL falls with k", [iwae], "nll", -1)
        if len(vae) > 1:
            yield _ordered(f"{layers}L: VAE's NLL does not fall with k", [[vae[0], vae[-1]]], "nll", 1)
        if len(iwae) > 1:
            yield _ordered(f"{layers}L: KL(q || posterior) grows with k for IWAE", [iwae], "kl_posterior", 1)


def _by_depth(by: Grid) -> Iterator[Finding]:
    pairs = [[by[1, name, k], by[2, name, k]] for layers, name, k in by if layers == 1 and (2, name, k) in by]
    if pairs:
        yield _ordered("two stochastic layers beat one", pairs, "nll", -1)


def _by_family(by: Grid) -> Iterator[Finding]:
    for layers in _depths(by):
        iwae = [row for row in _series(by, layers, "iwae") if row.k > 1]
        pairs = [[by[layers, "vae", row.k], row] for row in iwae if (layers, "vae", row.k) in by]
        if pairs:
            yield _ordered(f"{layers}L: IWAE has more active units than VAE", pairs, "active_units", 1, noise=0.5)


def _depths(by: Grid) -> list[int]:
    return sorted({layers for layers, _, _ in by})


def _series(by: Grid, layers: int, family: str) -> list[Row]:
    """The rows of a depth and a family by growing k."""
    return [by[key] for key in sorted(by) if key[:2] == (layers, family)]


def _ordered(claim: str, series: Sequence[Series], metric: str, sign: int, noise: float = NOISE) -> Finding:
    """Whether a metric rises (sign 1) or falls (sign -1) at every step of every series."""
    figures = "; ".join(" -> ".join(_shown(row, metric) for row in one) for one in series)
    if not all(row.complete for one in series for row in one):
        return Finding(claim, "not run", figures)
    verdicts = {_step(a, b, metric, sign, noise) for one in series for a, b in pairwise(one)}
    # One clear step the wrong way refutes a claim, one unclear step leaves it open.
    worst = next(v for v in ("does not hold", "within noise", "holds") if v in verdicts)
    return Finding(claim, worst, figures)


def _step(a: Row, b: Row, metric: str, sign: int, noise: float) -> str:
    before, after = _values(a, metric), _values(b, metric)
    gain = sign * (statistics.fmean(after) - statistics.fmean(before))
    if min(len(before), len(after)) >= LEAST_SEEDS:
        noise = 2 * math.sqrt(sum(statistics.variance(values) / len(values) for values in (before, after)))
    if gain == 0 or abs(gain) < noise:
        return "within noise"
    return "holds" if gain > 0 else "does not hold"


def _values(row: Row, metric: str) -> list[float]:
    return [float(sum(v)) if isinstance(v, list) else v for v in row.values(metric)]


def _shown(row: Row, metric: str) -> str:
    number = f"{statistics.fmean(_values(row, metric)):.4g}" if row.complete else "not run"
    return f"{row.layers}L {row.family}(k={row.k}) {number}"
