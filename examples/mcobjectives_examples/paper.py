"""The paper's numbers and grids as data."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def paper() -> dict[str, Any]:
    """Tables, architectures and units of the paper, and the original's numbers where it prints them."""
    return json.loads((files("mcobjectives_examples") / "data" / "paper.json").read_text())


def table(number: int | str) -> dict[str, Any]:
    """One table: title, dataset, binarisation, note and rows; raises `ValueError` for an unknown number."""
    tables = paper()["tables"]
    if str(number) not in tables:
        raise ValueError(f"unknown table {number!r}: choose from {', '.join(tables)}")
    return tables[str(number)]
