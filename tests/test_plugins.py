"""Plugins: found through entry points, each by its distribution; the built-ins exactly as a third party's."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from importlib import metadata

import pytest
import torch
from toys import LinearGaussian, loss_gradient

from mcobjectives import (
    IWAE,
    MIWAE,
    PluginError,
    Split,
    cli,
    estimator_names,
    get_estimator,
    get_objective,
    objective_names,
    plugins,
)
from mcobjectives.catalogue import broken_estimators, catalogue
from mcobjectives.specs import format_objective, import_objective, parse_objective
from mcobjectives_examples.config import capped


def forget():
    plugins.registered.cache_clear()
    plugins._loaded.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out a distribution as an installer would: a module, and a dist-info folder with its entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def lay_out(name, source="", folder=None, **points):
        module = name.replace("-", "_")
        where = tmp_path / (folder or ".")
        where.mkdir(exist_ok=True)
        if folder:
            monkeypatch.syspath_prepend(where)
        (where / f"{module}.py").write_text(textwrap.dedent(source))
        info = where / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"[mcobjectives.{g}]\n" + "".join(f"{n} = {v}\n" for n, v in p.items()) for g, p in points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        forget()

    yield lay_out
    monkeypatch.undo()
    forget()


MIN_WEIGHT = """
    from dataclasses import dataclass
    from mcobjectives import Objective

    @dataclass(frozen=True)
    class MinWeight(Objective):
        k: int = 8

        def reduce(self, log_w):
            return log_w.amin(0)
"""


def test_the_built_ins_are_registered_by_this_projects_own_entry_points():
    for group in (plugins.OBJECTIVES, plugins.ESTIMATORS):
        built_in = {p.name for p in metadata.distribution("mcobjectives").entry_points if p.group == group}
        assert built_in and built_in <= set(plugins.registered(group))
    assert {"vae", "iwae", "power", "median", "l_alpha", "ciwae", "miwae"} <= set(objective_names())
    assert {"reparam", "stl", "dreg", "score", "vimco", "rws"} <= set(estimator_names())
    assert objective_names() == sorted(objective_names()) and estimator_names() == sorted(estimator_names())


def test_plugins_names_no_built_in():
    tree = ast.parse(inspect.getsource(plugins))
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    docs = {
        n.body[0].value.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(n)
    }
    code = " ".join(texts - docs).lower()
    imported = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(module.startswith("mcobjectives") for module in imported)
    for group, name in [(g, n) for g in (plugins.OBJECTIVES, plugins.ESTIMATORS) for n in plugins.registered(g)]:
        assert name not in code.split(), (group, name)
        assert f":{name}" not in code


def test_a_third_partys_objective_is_one_class_and_works_everywhere(install):
    install("acme-bounds", MIN_WEIGHT, objectives={"acme_min": "acme_bounds:MinWeight"})
    assert "acme_min" in objective_names()
    objective = get_objective("acme_min")(k=4)
    assert objective.reduce(torch.tensor([[2.0], [1.0], [5.0], [3.0]])).item() == 1.0
    model = LinearGaussian().off_posterior()
    for gradient in ("reparam", "score", "vimco"):
        chunked = get_objective("acme_min")(k=4, gradient=gradient, chunk_size=3)
        loss, found = loss_gradient(chunked, model, model.data())
        assert torch.isfinite(loss) and found["q_offset"].abs().max() > 0
    with pytest.raises(ValueError, match="wrong for MinWeight"):
        get_objective("acme_min")(k=4, gradient="dreg")


def test_an_objective_without_an_option_k_is_not_capped(install):
    install(
        "grouped",
        """
        from dataclasses import dataclass
        from mcobjectives import Objective

        @dataclass(frozen=True)
        class Grouped(Objective):
            k1: int = 2
            k2: int = 3

            @property
            def k(self):
                return self.k1 * self.k2

            def reduce(self, log_w):
                return log_w.mean(0)
        """,
        objectives={"grouped": "grouped:Grouped"},
    )
    assert capped("grouped(k1=2, k2=3)", 6) == "grouped(k1=2, k2=3)"
    with pytest.raises(ValueError, match="which has no option k: give it fewer samples"):
        capped("grouped(k1=2, k2=3)", 2)


def test_a_third_partys_estimator_is_one_function_and_works_everywhere(install):
    source = """
        def half_way(objective, log_w):
            g = objective.slopes(log_w)
            return g, g, objective.tempering * g / 2
    """
    install("acme-gradients", source, estimators={"half_way": "acme_gradients:half_way"})
    assert "half_way" in estimator_names()
    model = LinearGaussian().off_posterior()
    x = model.data()
    value, plain = loss_gradient(IWAE(k=5), model, x)
    _, stl = loss_gradient(IWAE(k=5, gradient="stl"), model, x)
    for extra in ({}, {"chunk_size": 2}, {"backward_samples": 5}):
        found_value, found = loss_gradient(IWAE(k=5, gradient="half_way", **extra), model, x)
        torch.testing.assert_close(found_value, value)
        for name in found:
            torch.testing.assert_close(found[name], (plain[name] + stl[name]) / 2)


def test_a_broken_plugin_is_reported_by_its_distribution_and_breaks_nothing_else(install):
    install("acme-broken", "import not_installed_anywhere", objectives={"acme_broken": "acme_broken:Thing"})
    install("acme-missing", "", objectives={"acme_missing": "acme_missing:Thing"})
    install("acme-raising", "raise RuntimeError('boom')", objectives={"acme_raising": "acme_raising:Thing"})
    install("acme-leaving", "import sys; sys.exit(3)", objectives={"acme_leaving": "acme_leaving:Thing"})
    cancelled = "import asyncio; raise asyncio.CancelledError('on two\\nlines')"
    install("acme-cancelled", cancelled, objectives={"acme_cancelled": "acme_cancelled:Thing"})
    assert {"acme_broken", "acme_missing", "acme_raising", "acme_leaving", "acme_cancelled"} <= set(objective_names())
    for name, why in [
        ("acme_broken", "ModuleNotFoundError: .*not_installed_anywhere"),
        ("acme_missing", "AttributeError"),
        ("acme_raising", "RuntimeError: boom"),
        ("acme_leaving", "SystemExit: 3"),
        ("acme_cancelled", "CancelledError: on two lines$"),
    ]:
        with pytest.raises(
            PluginError, match=rf"objective '{name}' of {name.replace('_', '-')} .*cannot be loaded: {why}"
        ):
            get_objective(name)
    assert get_objective("iwae") is IWAE


def test_a_ctrl_c_while_a_plugin_is_imported_is_one(install):
    install("acme-slow", "raise KeyboardInterrupt", objectives={"acme_slow": "acme_slow:Thing"})
    with pytest.raises(KeyboardInterrupt):
        get_objective("acme_slow")


def test_what_an_estimator_raises_is_quoted_in_one_line(install):
    raising = "raise RuntimeError('on two\\nlines')"
    install("acme-import", raising, estimators={"acme_import": "acme_import:half"})
    install("acme-call", f"def half(objective, log_w): {raising}", estimators={"acme_call": "acme_call:half"})
    for name in ("acme_import", "acme_call"):
        with pytest.raises(PluginError, match=r"RuntimeError: on two lines$"):
            IWAE(k=3, gradient=name)


def test_two_distributions_that_claim_a_name_are_both_named(install):
    install("acme-one", MIN_WEIGHT, objectives={"acme_min": "acme_one:MinWeight"})
    install("acme-two", MIN_WEIGHT, objectives={"acme_min": "acme_two:MinWeight", "acme_other": "acme_two:MinWeight"})
    with pytest.raises(PluginError, match="objective 'acme_min' is claimed by acme-one and acme-two: uninstall one"):
        get_objective("acme_min")
    assert get_objective("acme_other").__name__ == "MinWeight"


def test_a_claim_on_a_built_in_name_is_a_clash_like_any_other(install):
    install("acme-rival", MIN_WEIGHT, objectives={"iwae": "acme_rival:MinWeight"}, estimators={"dreg": "math:sqrt"})
    with pytest.raises(PluginError, match="'iwae' is claimed by acme-rival and mcobjectives"):
        get_objective("iwae")
    with pytest.raises(PluginError, match="estimator 'dreg' is claimed by acme-rival and mcobjectives"):
        IWAE(k=3, gradient="dreg")
    assert IWAE(k=3).gradient == "reparam"


def test_a_claim_on_split_which_no_entry_point_registers_is_a_clash_too(install):
    install("acme-splitter", MIN_WEIGHT, objectives={"split": "acme_splitter:MinWeight"})
    clash = "objective 'split' is claimed by acme-splitter and mcobjectives: uninstall one of them"
    for refused in (lambda: get_objective("split"), lambda: parse_objective("split()")):
        with pytest.raises(ValueError, match=clash):
            refused()
    entry = next(entry for entry in catalogue() if entry.name == "split")
    assert entry.error == clash and entry.package == "acme-splitter and mcobjectives"
    objective = Split(generative=IWAE(k=6), inference=MIWAE(k1=3, k2=2))
    assert import_objective(format_objective(objective)) == objective


def test_one_distribution_seen_twice_on_the_path_is_no_clash(install):
    for folder in (None, "again"):
        install("acme-bounds", MIN_WEIGHT, folder=folder, objectives={"acme_min": "acme_bounds:MinWeight"})
    assert get_objective("acme_min").__name__ == "MinWeight"


def test_what_is_not_an_objective_or_an_estimator_is_refused(install):
    install("acme-odd", "thing = 3\n", objectives={"odd": "acme_odd:thing"}, estimators={"odd": "acme_odd:thing"})
    with pytest.raises(PluginError, match="objective 'odd' of acme-odd is 3, not an Objective class"):
        get_objective("odd")
    with pytest.raises(PluginError, match=r"estimator 'odd' of acme-odd is 3, not a function \(objective"):
        get_estimator("odd")
    with pytest.raises(ValueError, match="estimator 'odd'"):
        IWAE(k=2, gradient="odd")


def test_what_only_looks_like_an_objective_is_refused(install):
    install("acme-duck", "class Duck:\n    def reduce(self, log_w): pass\n", objectives={"duck": "acme_duck:Duck"})
    with pytest.raises(PluginError, match=r"'duck' of acme-duck .* make it a subclass of mcobjectives\.Objective"):
        get_objective("duck")


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("my-dash", "my_dash"),
        ("dot.name", "dot_name"),
        ("lambda", "_lambda"),
        ("None", "_None"),
        ("2wise", "_2wise"),
        ("ﬁne", "fine"),
    ],
)
def test_an_objectives_name_that_no_spec_can_spell_is_refused(install, name, spelt):
    install("acme-spelling", MIN_WEIGHT, objectives={name: "acme_spelling:MinWeight"})
    mend = f"objective '{name}' of acme-spelling has a name that no spec can spell: register it as {spelt}"
    with pytest.raises(PluginError, match=mend):
        get_objective(name)
    assert next(entry for entry in catalogue() if entry.name == name).error == mend
    install("acme-speller", MIN_WEIGHT, objectives={spelt: "acme_speller:MinWeight"})
    objective = get_objective(spelt)(k=3)
    assert format_objective(objective) == f"{spelt}(k=3)" and parse_objective(f"{spelt}(k=3)") == objective


def test_an_estimators_name_is_any_string(install):
    install("acme-names", "from mcobjectives.estimators import dreg", estimators={"my-dash": "acme_names:dreg"})
    assert IWAE(k=3, gradient="my-dash").plan == IWAE(k=3, gradient="dreg").plan
    assert parse_objective("iwae(gradient='my-dash')").gradient == "my-dash"


def test_a_distribution_without_a_name_is_reported_all_the_same(install, tmp_path):
    install("acme-anonymous", "import nowhere_at_all", objectives={"anonymous": "acme_anonymous:Thing"})
    (tmp_path / "acme_anonymous-1.0.dist-info" / "METADATA").unlink()
    forget()
    with pytest.raises(PluginError, match="'anonymous' of an unknown distribution"):
        get_objective("anonymous")


def test_two_distributions_without_a_name_that_claim_one_name_clash(install, tmp_path):
    for name in ("nameless-one", "nameless-two"):
        module = name.replace("-", "_")
        install(name, MIN_WEIGHT, objectives={"nameless": f"{module}:MinWeight"})
        (tmp_path / f"{module}-1.0.dist-info" / "METADATA").unlink()
    forget()
    one, two = (rf"an unknown distribution \(nameless_{which}:MinWeight\)" for which in ("one", "two"))
    with pytest.raises(PluginError, match=f"objective 'nameless' is claimed by {one} and {two}: uninstall one of them"):
        get_objective("nameless")


CONSTRUCTED = """
    from dataclasses import dataclass
    from mcobjectives import Objective

    @dataclass(frozen=True)
    class Stumbles(Objective):
        k: int = 8

        def reduce(self, log_w):
            return log_w.amin(0)

        def __post_init__(self):
            raise KeyError("oops")

    @dataclass(frozen=True)
    class Unfinished(Objective):
        k: int = 8

    def two(objective, log_w):
        return log_w, log_w
"""


def test_what_fails_when_it_is_made_is_reported_by_its_distribution(install):
    points = {"stumbles": "acme_made:Stumbles", "unfinished": "acme_made:Unfinished"}
    install("acme-made", CONSTRUCTED, objectives=points, estimators={"two": "acme_made:two"})
    for spec, why in [
        ("stumbles", "objective 'stumbles' of acme-made cannot be made: KeyError: 'oops'"),
        ("unfinished(k=3)", "objective 'unfinished' of acme-made cannot be made: TypeError: .*abstract"),
        ("iwae(gradient='two')", "estimator 'two' of acme-made does not work with IWAE: TypeError: "),
    ]:
        with pytest.raises(ValueError, match=why):
            parse_objective(spec)
    entries = {entry.name: entry for entry in catalogue()}
    assert entries["stumbles"].package == entries["unfinished"].package == "acme-made"
    assert entries["stumbles"].error == "KeyError: 'oops'" and "abstract" in entries["unfinished"].error
    assert not entries["iwae"].error and "two" not in entries["iwae"].estimators


UNEVEN = """
    from dataclasses import dataclass
    from mcobjectives import Objective

    @dataclass(frozen=True)
    class Uneven(Objective):
        k: int = 3

        def __post_init__(self):
            if self.k % 2 == 0:
                raise ValueError("k must be odd")
            super().__post_init__()

        def reduce(self, log_w):
            return log_w.mean(0)
"""


def test_an_objective_that_takes_odd_k_alone_is_listed_with_all_others(install):
    install("acme-uneven", UNEVEN, objectives={"acme_uneven": "acme_uneven:Uneven"})
    entries = {entry.name: entry for entry in catalogue()}
    assert "dreg" in entries["acme_uneven"].estimators and "vimco" in entries["vae"].estimators


KEYWORD_ONLY = """
    from dataclasses import dataclass
    from mcobjectives import Objective

    @dataclass(frozen=True, kw_only=True)
    class Sharp(Objective):
        k: int = 8
        sharpness: float = 2.0

        def reduce(self, log_w):
            return log_w.mean(0)

    @dataclass(frozen=True, kw_only=True)
    class Given(Sharp):
        scale: float
"""


def test_an_estimator_that_works_with_no_objective_is_broken(install):
    source = """
        from dataclasses import dataclass
        from mcobjectives import Objective
        from mcobjectives.estimators import dreg

        @dataclass(frozen=True)
        class Picky(Objective):
            k: int = 8

            def reduce(self, log_w):
                return log_w.mean(0)

        def pair(objective, log_w):
            return log_w, log_w

        def summed(objective, log_w):
            return log_w.sum(0), None, None

        def for_picky(objective, log_w):
            if not isinstance(objective, Picky):
                raise ValueError("for Picky alone")
            return dreg(objective, log_w)
    """
    points = {name: f"acme_useless:{name}" for name in ("Picky", "pair", "summed", "for_picky")}
    install("acme-useless", source, objectives={"picky": "acme_useless:Picky"}, estimators=points)
    of_class, pair, summed = broken_estimators()
    why = "of acme-useless works with no objective at its defaults"
    assert of_class.startswith(f"estimator 'Picky' {why}: TypeError: Picky.__init__() takes")
    assert summed.startswith(f"estimator 'summed' {why}: an estimator's weights must be (k, batch): a is (5,)")
    assert pair.startswith(f"estimator 'pair' {why}: TypeError: ") and "missing 1 required" in pair


def test_keyword_only_options_are_listed_like_any_other(install):
    install("acme-keyword", KEYWORD_ONLY, objectives={"sharp": "acme_keyword:Sharp", "given": "acme_keyword:Given"})
    entries = {entry.name: entry for entry in catalogue()}
    assert entries["sharp"].parameters == "k=8, sharpness=2.0" and "dreg" in entries["sharp"].estimators
    assert entries["given"].parameters == "k, sharpness, scale" and not entries["given"].error
    assert entries["iwae"].parameters == "k=50"
    spec = "sharp(k=3, gradient='dreg')"
    assert format_objective(parse_objective(spec)) == spec


def test_the_command_line_lists_every_broken_plugin_and_all_that_works(install, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mcobj", "objectives", "--json"])
    install("acme-broken", "import not_installed_anywhere", objectives={"acme_broken": "acme_broken:Thing"})
    install("acme-gradients", "", estimators={"acme_half": "acme_gradients:half", "acme_pi": "math:pi"})
    install("acme-rival", MIN_WEIGHT, estimators={"vimco": "acme_rival:MinWeight"})
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    out, err = capsys.readouterr()
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert found["acme_broken"]["package"] == "acme-broken" and "not_installed" in found["acme_broken"]["error"]
    assert not found["iwae"]["error"] and {"dreg", "score"} <= set(found["iwae"]["estimators"])
    half, pi, vimco = sorted(err.splitlines())
    assert half.startswith("broken: estimator 'acme_half' of acme-gradients (acme_gradients:half) cannot be loaded")
    with pytest.raises(PluginError, match=r"^gradient: estimator 'acme_half' of acme-gradients") as broken:
        IWAE(k=3, gradient="acme_half")
    assert isinstance(broken.value.__cause__.__cause__, (ImportError, AttributeError))  # with its own traceback
    assert pi.startswith("broken: estimator 'acme_pi' of acme-gradients is 3.14")
    assert vimco == "broken: estimator 'vimco' is claimed by acme-rival and mcobjectives: uninstall one of them"


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(PluginError, match=r"unknown objective 'iwea': choose from .*ciwae, iwae, .*vae"):
        get_objective("iwea")
    with pytest.raises(PluginError, match=r"unknown objective 'iwae\(k=5\)': parse_objective reads options; choose"):
        get_objective("iwae(k=5)")
    with pytest.raises(ValueError, match=r"unknown estimator 'drag': choose from dreg, .*vimco"):
        get_estimator("drag")
    with pytest.raises(PluginError, match="unknown objective None"):
        get_objective(None)


def test_a_name_that_is_no_string_is_as_unknown():
    with pytest.raises(PluginError, match=r"unknown objective \['iwae'\]: choose from ciwae, "):
        get_objective(["iwae"])
    with pytest.raises(PluginError, match=r"^gradient: unknown estimator \['dreg'\]: choose from dreg, "):
        IWAE(k=3, gradient=["dreg"])
