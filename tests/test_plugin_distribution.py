"""examples/plugin as a third party ships it: its wheel is built, installed beside the library, and driven."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path

import pytest
from test_docs import fences
from wheels import MCOBJ, ROOT, install, python, succeeds

pytestmark = pytest.mark.slow

PLUGIN = ROOT / "examples" / "plugin"


def project(place: Path, name: str, code: str, objectives: dict[str, str]) -> Path:
    """A minimal distribution of one module."""
    module = name.replace("-", "_")
    points = "\n".join(f'{key} = "{module}:{value}"' for key, value in objectives.items())
    place.mkdir(parents=True)
    (place / f"{module}.py").write_text(textwrap.dedent(code))
    (place / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{name}"\nversion = "1.0"\n'
        f'[project.entry-points."mcobjectives.objectives"]\n{points}\n'
        f'[tool.hatch.build.targets.wheel]\ninclude = ["{module}.py"]\n'
    )
    return place


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """The library's own wheel, installed like the plugins', so that none of this runs on its sources."""
    return install(ROOT, tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def jackknife(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("jackknife")
    shutil.copytree(PLUGIN, place / "project", ignore=shutil.ignore_patterns("dist", "build", "*cache*"))
    return install(place / "project", place)


@pytest.fixture(scope="module")
def rival(tmp_path_factory) -> Path:
    """Another distribution that claims the name `jackknife`."""
    place = tmp_path_factory.mktemp("rival")
    code = "from mcobjectives import IWAE\nclass Jackknife(IWAE): pass\n"
    return install(project(place / "project", "rival-jackknife", code, {"jackknife": "Jackknife"}), place)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """A distribution whose dependency is missing, that names what it does not have, and that registers a function."""
    place = tmp_path_factory.mktemp("faulty")
    needy = project(place / "needy", "needy-objectives", "import not_installed_anywhere\n", {"needy": "Needy"})
    code = "def function(log_w): return log_w.mean(0)\n"
    points = {"nameless": "Nameless", "function": "function"}
    (place / "a").mkdir()
    (place / "b").mkdir()
    install(project(place / "confused", "confused-objectives", code, points), place / "a")
    shutil.copytree(install(needy, place / "b"), place / "a" / "site", dirs_exist_ok=True)
    return place / "a" / "site"


def run(code: str, *sites: Path, cwd: Path) -> str:
    return succeeds("-c", textwrap.dedent(code), sites=sites, cwd=cwd)


DRIVE = """
    import sys, torch, mcobjectives
    from pathlib import Path
    from torch.distributions import Bernoulli, Independent, Normal
    from mcobjectives.specs import format_objective, parse_objective

    assert Path(mcobjectives.__file__).parent.parent.name == "site"  # the wheel that was installed
    assert "mcobjectives_jackknife" not in sys.modules  # discovery alone imports no plugin
    assert "jackknife" in mcobjectives.objective_names() and "loo" in mcobjectives.estimator_names()
    assert "mcobjectives_jackknife" not in sys.modules
    Jackknife = mcobjectives.get_objective("jackknife")
    assert Jackknife.__module__ == "mcobjectives_jackknife"

    spec = "jackknife(k=5, gradient='dreg')"
    assert parse_objective(spec) == Jackknife(k=5, gradient="dreg") and format_objective(parse_objective(spec)) == spec

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.p = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
        def posterior(self, x):
            q = Bernoulli(logits=self.q(x)) if discrete else Normal(self.q(x), 1.0)
            return Independent(q, 1)
        def log_joint(self, x, h):
            return -(self.p(h) - x).square().sum(-1) - h.square().sum(-1)

    x = torch.randn(4, 3)
    for discrete, objectives in {
        False: [Jackknife(k=5, gradient=g) for g in ("reparam", "dreg", "score")] + [parse_objective(spec)],
        True: [cls(gradient="loo", k=5) for cls in (Jackknife, mcobjectives.IWAE, mcobjectives.Median)],
    }.items():
        for objective in objectives:
            model = Model()
            objective(model, x).backward()
            grads = [p.grad for p in model.parameters()]
            assert all(g is not None and g.isfinite().all() and g.any() for g in grads), objective

    for make in (lambda: mcobjectives.IWAE(k=1, gradient="loo"), lambda: mcobjectives.MIWAE(gradient="loo")):
        try:
            make()
        except ValueError as error:
            print(error)
        else:
            raise AssertionError("loo must be refused")
"""


def test_the_installed_plugin_is_found_by_name_and_trains_models(ours, jackknife, tmp_path):
    output = run(DRIVE, ours, jackknife, cwd=tmp_path)
    assert "gradient='loo' needs at least two samples" in output
    assert "gradient='loo' needs an objective of any number of samples" in output


def test_the_command_line_drives_the_plugin(ours, jackknife, tmp_path):
    def mcobj(*words: str) -> str:
        return succeeds(*MCOBJ, *words, sites=(ours, jackknife), cwd=tmp_path)

    found = {entry["name"]: entry for entry in json.loads(mcobj("objectives", "--json"))}
    assert found["jackknife"]["package"] == "mcobjectives-jackknife" and not found["jackknife"]["error"]
    assert "loo" in found["iwae"]["estimators"] and "loo" in found["jackknife"]["estimators"]
    assert "passes" in mcobj("check", "jackknife(k=4)")
    for spec in ("jackknife(k=3, gradient='dreg')", "iwae(k=3, gradient='loo')"):
        quick = ("--set", "passes=1", "--set", "nll_k=5", "--set", "test_images=20")
        trained = json.loads(mcobj("train", "--objective", spec, *quick, "--json"))
        assert trained["config"]["objective"] == spec and trained["metrics"]["nll"] > 0


def test_the_plugin_that_the_docs_spell_out_installs_and_conforms(ours, tmp_path):
    """docs/plugins.md alone: its pyproject.toml, and a module of its first snippet and the other page's estimator."""
    plugins, estimators = (ROOT / "docs" / page for page in ("plugins.md", "choosing-estimators.md"))
    place = tmp_path / "project"
    place.mkdir()
    (place / "pyproject.toml").write_text(next(f.body for f in fences(plugins) if f.language == "toml"))
    code = [next(f.body for f in fences(plugins) if f.language == "python")]
    code += [f.body for f in fences(estimators) if "def loo(" in f.body]
    (place / "mcobjectives_jackknife.py").write_text("\n\n".join(code))
    sites = (ours, install(place, tmp_path))
    check = succeeds(*MCOBJ, "check", "jackknife(k=4, gradient='loo')", sites=sites, cwd=tmp_path)
    assert "passes" in check


def test_without_the_plugin_its_names_are_unknown(ours, tmp_path):
    output = run(
        """
        import mcobjectives
        print("jackknife" in mcobjectives.objective_names(), "loo" in mcobjectives.estimator_names())
        """,
        ours,
        cwd=tmp_path,
    )
    assert output.split() == ["False", "False"]


def test_the_plugins_own_tests_pass_where_it_is_installed(ours, jackknife, tmp_path):
    shutil.copytree(PLUGIN / "tests", tmp_path / "tests")
    found = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", sites=(ours, jackknife), cwd=tmp_path)
    assert found.returncode == 0 and "2 passed" in found.stdout, found.stdout + found.stderr


def test_the_wheel_holds_the_package_and_its_entry_points_alone(jackknife):
    top = {path.name for path in jackknife.iterdir()}
    assert top == {"mcobjectives_jackknife", "mcobjectives_jackknife-0.1.0.dist-info"}
    assert (jackknife / "mcobjectives_jackknife" / "py.typed").exists()


REPORT = """
    import mcobjectives
    from mcobjectives.specs import parse_objective

    names = mcobjectives.objective_names()
    for name in names:
        try:
            objective = mcobjectives.get_objective(name)()
        except mcobjectives.PluginError as error:
            print(f"{name}: {error}")
            try:
                parse_objective(name)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1 and name in str(error)
    for built_in in "vae iwae power median l_alpha ciwae miwae".split():
        assert built_in in names and parse_objective(built_in) == mcobjectives.get_objective(built_in)()
"""


def test_two_distributions_that_claim_a_name_are_both_named(ours, jackknife, rival, tmp_path):
    lines = run(REPORT, ours, jackknife, rival, cwd=tmp_path).splitlines()
    claims = "mcobjectives-jackknife and rival-jackknife"
    assert lines == [f"jackknife: objective 'jackknife' is claimed by {claims}: uninstall one of them"]


def test_faults_of_a_plugin_are_reported_by_its_distribution_and_break_nothing_else(ours, jackknife, faulty, tmp_path):
    lines = dict(line.split(": ", 1) for line in run(REPORT, ours, jackknife, faulty, cwd=tmp_path).splitlines())
    assert set(lines) == {"needy", "nameless", "function"}
    assert "needy-objectives" in lines["needy"] and "No module named 'not_installed_anywhere'" in lines["needy"]
    assert "confused-objectives" in lines["nameless"] and "AttributeError" in lines["nameless"]
    assert "confused-objectives" in lines["function"] and "not an Objective class" in lines["function"]
