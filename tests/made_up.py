"""Made-up results in the paper's tables, for the tests of what is said of them."""

import dataclasses

from mcobjectives_examples.findings import findings
from mcobjectives_examples.paper import table
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.tables import rows


def result(config, **metrics):
    """A made-up record of a configuration."""
    usual = {"nll": 88.0, "kl_posterior": 5.0, "active_units": [10] * config.layers}
    return {
        "config": config.to_dict("abc"),
        "metrics": {**usual, "pca_active_units": [9] * config.layers, **metrics},
        "data": {"sha256": "abc", "test": 10_000, "files": [{"verified": True}]},
    }


def made_up(
    number=1, seeds=1, preset="paper", metrics=lambda row, seed: {}, missing=lambda row, seed: False, **options
):
    """The rows of a table, and those beside it, with results by formula; first stages gave the paper's numbers."""

    def filled(row):
        results = tuple(None if missing(row, c.seed) else result(c, **metrics(row, c.seed)) for c in row.configs)
        first = next((r["first"] for r in table(10)["rows"] if r["after"] == row.after), {})
        firsts = tuple(None if missing(row, c.seed) else result(c, **first) for c in row.first_stages)
        beside = tuple(map(filled, row.beside))
        return dataclasses.replace(row, results=results, first_results=firsts, beside=beside)

    return [filled(row) for row in rows(number, get_preset(preset), seeds=range(seeds), **options)]


def verdict(claim, table_rows):
    [found] = [f for f in findings(table_rows) if f.claim == claim]
    return found.verdict
