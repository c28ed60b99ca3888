"""The README's figures are those of the recorded results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("section", "make"), [("table-1", "table_1"), ("speed", "speed")])
def test_the_readme_shows_what_is_recorded(readme, section, make):
    text = (ROOT / "README.md").read_text()
    shown = text.partition(f"<!-- {section} -->\n")[2].partition(f"<!-- /{section} -->")[0]
    assert shown == getattr(readme, make)(), "run: make readme"
