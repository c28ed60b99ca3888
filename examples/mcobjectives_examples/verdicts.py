"""When a difference between cells is one: by the spread of seeds, or by the paper's own noise where there are few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from scipy.special import stdtrit

NOISE = 0.6
"""Nats between two runs of one configuration in the paper: with fewer than three seeds, less proves nothing."""
NOISE_IN_UNITS = 1.0
"""By so many active units two runs of one configuration differ: table 1's seeds do."""
LEAST_SEEDS = 3
"""From so many on, a difference proves nothing while its 95 % t interval holds zero."""

LACKS = ("not run", "not finite")
"""What stands against any verdict, the first before the second."""


@dataclass(frozen=True)
class Finding:
    """One of the paper's claims, or of what its tables show, a verdict, and the figures.

    Verdicts are "holds", "does not hold", "within noise", "not run" and "not finite"; `papers` is the one that the
    paper's own numbers get, empty where they have none.
    """

    claim: str
    verdict: str
    figures: str
    papers: str = ""

    @property
    def evidence(self) -> str:
        """The figures, and whether the paper's own numbers do not bear the claim out."""
        known = self.papers not in ("", "holds", *LACKS)
        return self.figures + (f" (the paper's own numbers: {self.papers})" if known else "")


@dataclass(frozen=True)
class Measured:
    """A metric of one cell, a value for each of its `seeds` that is run; what it lacks where none is, or is finite."""

    label: str
    values: tuple[float, ...]
    seeds: int = 1
    lack: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def __str__(self) -> str:
        if self.lack:
            return f"{self.label} {self.lack}"
        return f"{self.label} {_rounded(self.mean)}{of_seeds(len(self.values), self.seeds)}"


Series = Sequence[Measured]


def ordered(claim: str, series: Sequence[Series], sign: int, noise: float = NOISE) -> Finding:
    """Whether a metric rises (sign 1) or falls (sign -1) at every step of every series."""
    figures = "; ".join(" -> ".join(map(str, one)) for one in series)
    if lack := lacking(cell for one in series for cell in one):
        return Finding(claim, lack, figures)
    verdicts = []
    for a, b in (pair for one in series for pair in pairwise(one)):
        gain, least = sign * (b.mean - a.mean), _noise(a, b, noise)
        verdicts.append("within noise" if abs(gain) <= least else "holds" if gain > 0 else "does not hold")
    return Finding(claim, worst(verdicts), figures)


def unfallen(claim: str, cells: Series) -> Finding:
    """Whether a metric never falls: one clear fall, at whatever distance, refutes it.

    It holds where the last is clearly above the first, or where with enough seeds no fall can be more than `NOISE`.
    """
    figures = " -> ".join(map(str, cells))
    if lack := lacking(cells):
        return Finding(claim, lack, figures)
    falls = [(a.mean - b.mean, _noise(a, b, NOISE)) for a, b in combinations(cells, 2)]
    if any(fall > least for fall, least in falls):
        return Finding(claim, "does not hold", figures)
    few = min(len(cell.values) for cell in cells) < LEAST_SEEDS
    risen = cells[-1].mean - cells[0].mean > _noise(cells[0], cells[-1], NOISE)
    level = not few and all(fall + least <= NOISE for fall, least in falls)
    return Finding(claim, "holds" if risen or level else "within noise", figures)


def alike(claim: str, cells: Series, noise: float = NOISE) -> Finding:
    """Whether all are within `noise` of each other; only with enough seeds is that more than "within noise"."""
    figures = "; ".join(map(str, cells))
    if lack := lacking(cells):
        return Finding(claim, lack, figures)
    low, high = min(cells, key=lambda cell: cell.mean), max(cells, key=lambda cell: cell.mean)
    few = min(len(cell.values) for cell in cells) < LEAST_SEEDS
    spread, error = high.mean - low.mean, 0.0 if few else _noise(low, high, noise)
    if spread - error > noise:
        return Finding(claim, "does not hold", figures)
    return Finding(claim, "holds" if not few and spread + error <= noise else "within noise", figures)


def bent(claim: str, cells: Series) -> Finding:
    """Whether there are a rise and a fall, both beyond noise, in any steps."""
    figures = " -> ".join(map(str, cells))
    if lack := lacking(cells):
        return Finding(claim, lack, figures)
    clear = {b.mean > a.mean for a, b in pairwise(cells) if abs(b.mean - a.mean) > _noise(a, b, NOISE)}
    if len(clear) == 2:
        return Finding(claim, "holds", figures)
    steps = [abs(b.mean - a.mean) > _noise(a, b, NOISE) for a, b in pairwise(cells)]
    return Finding(claim, "does not hold" if all(steps) else "within noise", figures)


def _noise(a: Measured, b: Measured, noise: float) -> float:
    """How much a difference must exceed to be one: with enough seeds half its 95 % interval, by Welch's t."""
    if min(len(a.values), len(b.values)) >= LEAST_SEEDS:
        noise = half_interval(a.values, b.values)
    return noise + 1e-9  # 88.6 - 88.0 is not more than 0.6


def half_interval(*samples: Sequence[float]) -> float:
    """Half the 95 % interval of a mean, or of a difference of two, by the t distribution."""
    parts = [statistics.variance(one) / len(one) for one in samples]
    if not any(parts):
        return 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(one) - 1) for part, one in zip(parts, samples, strict=True))
    return float(stdtrit(freedom, 0.975)) * math.sqrt(sum(parts))


def lacking(cells: Iterable[Measured]) -> str:
    """What a claim's cells lack, empty where nothing stands against a verdict."""
    lacks = {cell.lack for cell in cells}
    return next((lack for lack in LACKS if lack in lacks), "")


def of_seeds(run: int, seeds: int, of: str = " of ") -> str:
    """How many seeds a figure is of, where not all are run."""
    return "" if run == seeds else f" ({run}{of}{seeds} seeds)"


def _rounded(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".removesuffix(".00")  # without a minus before zero


def worst(verdicts: Sequence[str]) -> str:
    """One clear step the wrong way refutes a claim, one unclear step leaves it open."""
    order = (*LACKS, "does not hold", "within noise", "holds")
    return next((verdict for verdict in order if verdict in verdicts), "not run")
