"""The paper's numbers and grids as data."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from mcobjectives.arguments import require_choice


@cache
def paper() -> dict[str, Any]:
    """Tables, architectures and units of the paper, and the original's numbers where it prints them."""
    return json.loads((files("mcobjectives_examples") / "data" / "paper.json").read_text())


def table(number: int | str) -> dict[str, Any]:
    """One table: title, dataset, binarisation, note and rows; raises `ValueError` for an unknown number."""
    tables = paper()["tables"]
    require_choice("table", str(number), tables)
    return tables[str(number)]
