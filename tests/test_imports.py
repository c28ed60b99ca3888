"""What an import loads, and that imports point one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mcobjectives
import mcobjectives_examples

HEAVY = {"typer", "rich", "pyro", "torchvision", "matplotlib", "sklearn", "zuko", "mcobjectives_examples"}


def loaded_after(statement: str) -> set[str]:
    code = f"import json, sys; {statement}; print(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_the_core_loads_nothing_that_it_does_not_need():
    everything = "from mcobjectives import *; import mcobjectives; mcobjectives.get_objective('iwae')(k=3)"
    loaded = loaded_after(everything)
    assert "torch" in loaded and not loaded & HEAVY


def test_the_bare_import_is_as_light():
    assert not loaded_after("import mcobjectives") & HEAVY


def test_everything_promised_is_there():
    for name in mcobjectives.__all__:
        assert getattr(mcobjectives, name) is not None
    assert set(mcobjectives.__all__) <= set(dir(mcobjectives))


def imports() -> dict[str, set[str]]:
    """What each top-level module of the package imports of the others, imports for type-checkers aside."""
    root = Path(mcobjectives.__file__).parent
    modules = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in root.glob("*.py")}
    modules.pop("__init__")
    found = {}
    for name, tree in modules.items():
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        for_types = {id(inner) for block in blocks for inner in ast.walk(block)}
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and id(n) not in for_types]
        paths = {f"{n.module}.{alias.name}" for n in nodes for alias in n.names if n.module}
        found[name] = {p.split(".")[1] for p in paths if p.startswith("mcobjectives.")} & modules.keys()
    return found


def test_imports_within_the_package_go_round_in_no_circle():
    left = imports()
    assert "plugins" in left["objective"]
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_what_a_layer_knows_nothing_of():
    reached = imports()
    for _ in reached:  # until all that is imported indirectly is in
        reached = {name: needs.union(*(reached[n] for n in needs)) for name, needs in reached.items()}
    assert reached["reductions"] == reached["plugins"] == reached["resampling"] == set()
    assert not reached["model"] & {"objective", "objectives", "estimators", "plugins"}
    assert not reached["estimators"] & {"objective", "objectives", "model", "plugins"}
    assert "objectives" not in set().union(*(reached[n] for n in ("model", "surrogate", "objective", "evaluation")))


# Where an extra is needed, and may be missed in one line.
EXTRAS = {
    "pyro": ["mcobjectives/pyro"],
    "figures": ["mcobjectives_examples/drawing.py"],
    "tensorboard": ["mcobjectives_examples/logs.py"],
}


@pytest.mark.parametrize("package", [mcobjectives, mcobjectives_examples], ids=lambda package: package.__name__)
def test_what_is_imported_is_what_is_required(package):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    installs = packages_distributions()

    def named(requirements: list[str]) -> set[str]:
        return {Requirement(r).name.lower() for r in requirements}

    root = Path(package.__file__).parent
    for path in root.rglob("*.py"):
        inside = str(path.relative_to(root.parent))
        allowed = named(project["dependencies"])
        for extra, places in EXTRAS.items():
            if any(inside.startswith(place) for place in places):
                allowed |= named(project["optional-dependencies"][extra])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            paths = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                paths = [node.module]
            for top in {p.partition(".")[0] for p in paths} - sys.stdlib_module_names:
                if not top.startswith("mcobjectives"):
                    found = {name.lower() for name in installs[top]}
                    assert found & allowed, f"{inside} imports {top} of {', '.join(found)}, which is not required"
