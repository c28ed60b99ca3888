"""Every metric of every recorded cell, in tables."""

from __future__ import annotations

from typing import Any

from mcobjectives_examples import render
from mcobjectives_examples.blocks import Block, Table
from mcobjectives_examples.config import Config
from mcobjectives_examples.protocols import by_protocol
from mcobjectives_examples.records import Records

NAMES = {
    "nll": "NLL",
    "nll_stderr": "its standard error",
    "nll_bias": "its bias, at least",
    "ess_mean": "ESS",
    "ess_min": "least ESS",
    "khat_max": "largest k-hat",
    "kl_posterior": "KL(q, posterior)",
    "kl_prior": "KL(q, prior)",
    "log_p_x_given_h": "E log p(x given h)",
    "elbo": "ELBO",
    "active_units": "active units",
    "pca_active_units": "PCA active units",
    "reconstruction_error": "reconstruction error",
    "nll_pruned": "pruned NLL",
    "nll_unpruned_same_images": "unpruned on the same images",
    "nll_pruned_stderr": "standard error of the difference",
    "pruned_images": "images pruned on",
    "points": "test images",
    "k": "k of the NLL",
}
"""Metrics in their order; others follow under their own name."""
_IN_THE_FLAG = ("khat_mean", "khat_unreliable")


def metric_tables(records: Records) -> list[Block]:
    """A table for each data set and protocol: a row for each cell and seed."""
    return [_table(name, cells) for name, cells in by_protocol(records).items()]


def cell_name(config: Config) -> str:
    """ "1L iwae(k=50)", with its first stage and its latent width where it has them."""
    after = "" if config.after is None else f"{config.after} then "
    latent = "" if config.latent is None else f", {config.latent} latent units"
    return f"{config.layers}L {after}{config.objective}{latent}"


def _table(name: str, cells: Records) -> Table:
    recorded = dict.fromkeys(key for result in cells.values() for key in result["metrics"])
    keys = [key for key in NAMES if key in recorded]
    keys += [key for key in recorded if key not in NAMES and key not in _IN_THE_FLAG]
    header = ["cell", "seed", *(NAMES.get(key, key.replace("_", " ")) for key in keys), "seconds to train", "engine"]
    at = header.index(NAMES["ess_mean"]) + 1 if NAMES["ess_mean"] in header else 3
    header.insert(at, render.KHAT)
    lines = []
    for config, result in cells.items():
        metrics = result["metrics"]
        line = [cell_name(config), str(config.seed), *(shown(metrics.get(key)) for key in keys)]
        line += [shown(result.get("seconds", {}).get("train")), _engines(result)]
        line.insert(at, render.khat_cell(metrics.get("khat_mean"), metrics.get("khat_unreliable")))
        lines.append(line)
    return Table(name, header, lines, tuple(range(1, len(header) - 1)), "In nats for one image.")


def _engines(result: dict[str, Any]) -> str:
    """The engine of each part, in their order."""
    parts = [*result.get("earlier_parts", []), result]
    return ", ".join(dict.fromkeys(str(part.get("engine", "")) for part in parts))


def shown(value: Any) -> str:
    """A recorded value: two decimals, or three digits below one; units of layers joined by "+"."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "+".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return str(value)
