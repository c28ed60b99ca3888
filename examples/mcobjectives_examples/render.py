"""Tables as text: one set of columns for the terminal, Markdown, HTML and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from mcobjectives.specs import parse_objective
from mcobjectives_examples import blocks
from mcobjectives_examples.config import without_k
from mcobjectives_examples.datasets import default_binarisation, vouched
from mcobjectives_examples.paper import table
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.provenance import machine_name, short_commit
from mcobjectives_examples.sources import DATASETS
from mcobjectives_examples.tables import Row
from mcobjectives_examples.verdicts import LEAST_SEEDS, NOISE, NOISE_IN_UNITS, Finding, of_seeds
from mcobjectives_examples.words import counted

NLL = "NLL"
KHAT = "k-hat (too high for)"
HEADER = ("L", "objective", "k", NLL, "paper", "BGS16", "active", "PCA", "KL")
TRUST_HEADER = ("ESS", KHAT)
"""Beside the NLL where there is room: effective samples of it, and the share of images that have too few."""
MORE = ("pruned", "reconstruction")
"""Further columns, where there is room: by how much NLL grows without inactive units, and the error in nats."""
NOT_RUN = "not run"
NOT_FINITE = "not finite"
UNRELIABLE = "unreliable"
MOST_UNRELIABLE = 0.1
"""The largest share of test images with too high a k-hat for an NLL that is not called unreliable."""


def cells(row: Row) -> list[str]:
    """The columns of `HEADER` for one row; a seed that is missing marks the row."""
    nll, spread = row.mean("nll"), row.spread("nll")
    none = NOT_FINITE if any(row.results) else NOT_RUN
    ours = none if nll is None else f"{nll:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
    if nll is not None:
        ours += of_seeds(len(row.values("nll")), len(row.results), "/")
    kl = row.mean("kl_posterior")
    comparable = nll if row.on_papers_data else None
    bgs16 = row.bgs16 or {}
    theirs = comparable if bgs16.get("dataset", row.configs[0].dataset) == row.configs[0].dataset else None
    return [
        str(row.layers),
        row.label if row.after else without_k(row.objective),
        str(row.k),
        ours,
        _beside(comparable, row.paper["nll"]),
        _beside(theirs, bgs16.get("nll")),
        f"{row.units('active_units')}/{_units(row.paper.get('active_units'))}",
        f"{row.units('pca_active_units')}/{_units(row.paper.get('pca_active_units'))}",
        f"{'' if kl is None else f'{kl:.2f}'}/{row.paper.get('kl_posterior', '')}",
    ]


def trust(row: Row) -> list[str]:
    """The columns of `TRUST_HEADER` for one row."""
    ess, khats, share = row.mean("ess_mean"), row.values("khat_mean"), row.mean("khat_unreliable")
    khat = statistics.fmean(khats) if khats else None  # a seed's is None where all of its images' are not finite
    return ["" if ess is None else f"{ess:.3g}", khat_cell(khat, share)]


def unreliable(share: float | None) -> bool:
    """Whether k-hat is too high for too large a share of the test images."""
    return share is not None and share > MOST_UNRELIABLE


def khat_cell(khat: float | None, share: float | None) -> str:
    """Mean k-hat, the share of images for which it is too high, and a flag where these are many."""
    if share is None:
        return ""
    shown = "none finite" if khat is None else f"{khat:.2f}"
    return f"{shown} ({100 * share:.0f} %)" + (f" {UNRELIABLE}" if unreliable(share) else "")


def title(number: int | str, table_rows: Sequence[Row]) -> str:
    """The table's title, and where it was run on other data or by another protocol than the paper."""
    config = table_rows[0].configs[0]
    text = f"Table {number}: {table(number)['title']}"
    if not table_rows[0].on_papers_data:
        text += f", run on {config.dataset}"
    if config.dataset in DATASETS and config.binarisation != default_binarisation(config.dataset):
        text += f", binarisation {config.binarisation}"
    return text


def more_cells(row: Row) -> list[str]:
    """The columns of `MORE`, empty for what older results lack."""
    error = row.mean("reconstruction_error")
    return [_pruned(row), "" if error is None else f"{error:.2f}"]


def _pruned(row: Row) -> str:
    costs = row.pruning_costs
    finite = [cost for cost in costs if cost is not None]
    if len(finite) < len(costs):
        return NOT_FINITE
    seeds = of_seeds(len(finite), len(row.results), "/")
    return f"{statistics.fmean(finite):+.2f}{seeds}" if finite else ""


def _beside(ours: float | None, theirs: float | None) -> str:
    """Their number, and by how much ours differs."""
    if theirs is None:
        return ""
    return f"{theirs:.2f}" if ours is None else f"{theirs:.2f} {ours - theirs:+.2f}"


def _units(values: Sequence[int] | None) -> str:
    return "+".join(map(str, values)) if values else ""


def caption(table_rows: Sequence[Row], *, beside: bool = True) -> str:
    """Which protocol, how many passes and seeds, and which data a table's numbers come from.

    `beside` is for one of the paper's tables with its numbers in it; otherwise the rows are any that are recorded.
    """
    config = table_rows[0].configs[0]
    preset, compared = config.preset, beside and table_rows[0].on_papers_data
    checksums = {r["data"]["sha256"][:12]: r["data"] for row in table_rows for r in row.results if r is not None}
    data = "; ".join(
        f"data sha256 {sha}… ({vouched(d.get('source', ''), [f['verified'] for f in d['files']])})"
        for sha, d in checksums.items()
    )
    known = DATASETS[config.dataset].sizes[1] if config.dataset in DATASETS else math.inf
    least = min((d["test"] for d in checksums.values()), default=known)
    few = preset.test_images is not None and preset.test_images < least
    images = f"{preset.test_images} random test images" if few else "all test images"
    passes, theirs = counted(preset.passes, "pass"), str(get_preset("paper").passes)
    if table_rows[0].first_stages:
        passes = f"{table_rows[0].first_stages[0].preset.passes} and {passes}"
        theirs += f" and {table(10)['second_stage']['passes']}"
    recorded = {run for row in table_rows if (run := sum(result is not None for result in row.results))}
    seeds = sorted(recorded) or [len(table_rows[0].configs)]
    parts = [
        f"preset {preset.name}: {passes} (the paper's: {theirs}), batch {preset.batch_size}",
        counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {counted(seeds[-1], 'seed')}",
        f"{config.dataset}, binarisation {_binarised(table_rows[0])}",
        f"NLL by IWAE-{preset.nll_k} on {images}, in nats{', with ours minus theirs' if compared else ''}",
    ]
    if beside:
        parts.append("units and KL as ours/paper's")
    if preset.backward_samples:
        m = preset.backward_samples
        parts.append(f"{m} of k samples back-propagated")
        if any(row.k > m and not parse_objective(row.configs[0].objective).slopes_vary for row in table_rows):
            parts[-1] += f", so that VAE and L_alpha of more samples are trained as of {m}"
    if any(row.capped for row in table_rows):
        cap = max(parse_objective(c.objective).k for row in table_rows for c in (*row.configs, *row.first_stages))
        parts.append(f"k capped at {cap}")
    elsewhere = {b["dataset"] for row in table_rows if (b := row.bgs16) and "dataset" in b}
    if elsewhere and beside:
        parts.append(f"BGS16's numbers are of {', '.join(elsewhere)}")
    if beside and not compared:
        parts.append("not the paper's data set: no differences")
    if preset.precision != "highest":
        parts.append(f"precision {preset.precision} in training")
    return "; ".join(parts + ([data] if data else []))


def table_blocks(title: str, table_rows: Sequence[Row], found: Sequence[Finding]) -> list[blocks.Block]:
    """The table with how far each NLL can be trusted, its caption, and its findings."""
    beside = HEADER.index(NLL) + 1
    header = (*HEADER[:beside], *TRUST_HEADER, *HEADER[beside:], *MORE)
    lines = []
    for row in table_rows:
        columns = cells(row)
        lines.append([*columns[:beside], *trust(row), *columns[beside:], *more_cells(row)])
    shown: list[blocks.Block] = [
        blocks.Table(title, header, lines, tuple(range(2, len(header))), f"{caption(table_rows)}.")
    ]
    if found:
        shown.append(blocks.Verdicts([(f.verdict, f.claim, f.evidence) for f in found]))
    return shown


def _binarised(row: Row) -> str:
    ours = row.configs[0].binarisation
    if not row.on_papers_data:  # whose default, on a data set of somebody's own, is not known
        return ours
    theirs = default_binarisation(row.configs[0].dataset)
    return f"{ours} (the paper's: {theirs})" if ours != theirs else ours


def markdown(title: str, table_rows: Sequence[Row], found: Sequence[Finding]) -> str:
    """The table, its caption and its findings in Markdown."""
    return blocks.markdown(table_blocks(title, table_rows, found))


def noise_note() -> str:
    """What "within noise" means."""
    return (
        f"Within noise: under {NOISE} nat, or {NOISE_IN_UNITS:g} active unit, with fewer than {LEAST_SEEDS} seeds, "
        "inside a 95 % t interval with more. What pruning costs is a difference on the same model and images: twice "
        "its standard error over these is enough to refute a claim."
    )


def sources(provenances: Iterable[dict[str, Any] | None]) -> str:
    """Versions, machines, commits and dates of results, in a line."""
    known = [source for source in provenances if source]
    if not known:
        return "Where it was recorded is not known."
    dates = sorted(source["date"][:10] for source in known)
    said = [
        *sorted({_libraries(source["versions"]) for source in known}),
        ", ".join(sorted({machine_name(s["machine"]) for s in known})),
        f"commit {', '.join(sorted({short_commit(s['commit']) for s in known}))}",
        dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
    ]
    return f"Recorded with {'; '.join(filter(None, said))}."


def _libraries(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("mcobjectives", "torch") if name in versions)


def _difference(row: Row) -> float | None:
    nll = row.mean("nll")
    return nll - row.paper["nll"] if nll is not None and row.on_papers_data else None


def as_json(title: str, table_rows: Sequence[Row], found: Sequence[Finding]) -> dict[str, Any]:
    """The table for machines: per row the paper's numbers and each seed's metrics, None where not run."""
    return {
        "title": title,
        "caption": caption(table_rows),
        "rows": [
            {
                "layers": row.layers,
                "objective": row.objective,
                "after": row.after,
                "trained_as": row.configs[0].objective,
                "ours": [None if r is None else r["metrics"] for r in row.results],
                "first_stage": [None if r is None else r["metrics"] for r in row.first_results],
                "paper": row.paper,
                "bgs16": row.bgs16,
                "difference": _difference(row),
            }
            for row in table_rows
        ],
        "findings": [{"claim": f.claim, "verdict": f.verdict, "figures": f.figures, "papers": f.papers} for f in found],
    }
