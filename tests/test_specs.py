"""Objective specs: what is read, what is written back, and every refusal in one line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum, StrEnum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcobjectives import IWAE, MIWAE, VAE, Median, Objective, Power, Split, get_objective, objective_names
from mcobjectives.plugins import estimator_names
from mcobjectives.specs import format_objective, import_objective, parse_objective


@dataclass(frozen=True)
class Own(Objective):
    k: int = 8
    limit: float = 0.0

    def reduce(self, log_w):
        return log_w.mean(0)


class Outer:
    @dataclass(frozen=True)
    class Inner(Own):
        pass


class Mode(StrEnum):
    B = "b"


class OlderMode(str, Enum):  # noqa: UP042  as written before StrEnum
    B = "b"


@dataclass(frozen=True)
class Weighted(Own):
    table: torch.Tensor = torch.zeros(2)  # noqa: RUF009
    made: list[int] = field(default_factory=list)


class Hidden:
    """Looks like nothing that mcobjectives knows."""


@pytest.mark.parametrize("name", objective_names())
def test_a_name_alone_stands_for_the_defaults(name):
    assert parse_objective(name) == get_objective(name)() == parse_objective(f" {name}() ")
    assert format_objective(get_objective(name)()) == name


@pytest.mark.parametrize(
    ("spec", "objective"),
    [
        ("power(k=50, p=3)", Power(k=50, p=3)),
        ("power(p=-2.5)", Power(p=-2.5)),
        ("power(p=+1e-3)", Power(p=1e-3)),
        ("vae(analytic_kl=True)", VAE(analytic_kl=True)),
        ('median(k=5, gradient="score", chunk_size=None)', Median(k=5, gradient="score")),
        ("miwae(k1=3, k2=2,)", MIWAE(k1=3, k2=2)),
        (
            "split(generative=iwae(k=6), inference=miwae(k1=3, k2=2, gradient='dreg'))",
            Split(generative=IWAE(k=6), inference=MIWAE(k1=3, k2=2, gradient="dreg")),
        ),
    ],
)
def test_literals_are_read(spec, objective):
    assert parse_objective(spec) == objective
    assert parse_objective(format_objective(objective)) == objective


BAD = {
    # what is wrong: the spec, and what the message must say
    "unknown name": ("iwea(k=3)", ["'iwea'", "did you mean 'iwae'?", "power"]),
    "class name": ("IWAE(k=3)", ["did you mean 'iwae'?"]),
    "unknown option": ("power(q=3)", ["unknown option 'q'", "power takes k, p, gradient"]),
    "k of a MIWAE": ("miwae(k=3)", ["unknown option 'k'", "k1, k2"]),
    "positional": ("iwae(50)", ["write k=50"]),
    "starred": ("iwae(*[50])", ["options go by name"]),
    "double starred": ("iwae(**{'k': 3})", ["** is not allowed"]),
    "twice": ("iwae(k=3, k=4)", ["'k' is given twice"]),
    "out of range": ("iwae(k=0)", ["k must be an integer of at least 1, got 0"]),
    "wrong type": ("iwae(k='3')", ["k must be an integer", "'3'"]),
    "refused pair": ("median(gradient='dreg')", ["Median", "use gradient='reparam'"]),
    "unknown estimator": ("iwae(gradient='zz')", ["unknown estimator 'zz'"]),
    "no quotes": ("iwae(gradient=dreg)", ["write gradient='dreg'"]),
    "json's true": ("vae(analytic_kl=true)", ["write analytic_kl=True"]),
    "missing parts": ("split(generative=iwae())", ["split needs inference"]),
    "name as part": ("split(generative=iwae, inference=vae())", ["generative=iwae()"]),
    "no part": ("split(generative=iwae(k=2), inference=3)", ["inference must be an objective, got 3"]),
    "tuple": ("iwae(k=(1, 2))", ["k=(1, 2) is not a number"]),
    "bytes": ("iwae(k=b'1')", ["not a number"]),
    "complex": ("iwae(k=1j)", ["not a number"]),
    "minus True": ("iwae(k=-True)", ["not a number"]),
    "f-string": ("iwae(gradient=f'{1}')", ["not a number"]),
    "arithmetic": ("iwae(k=2**9999)", ["k=2**9999 is not a number"]),
    "two calls": ("iwae(k=3)(k=4)", ["is not an objective"]),
    "attribute": ("mcobjectives.IWAE(k=3)", ["is not an objective"]),
    "import path": ("mcobjectives:IWAE(k=3)", ["cannot be read", "module:name is for mcobj check"]),
    "no number": ("power(p=nan)", ["p=nan", "write a number"]),
    "statement": ("iwae; power", ["cannot be read"]),
    "unclosed": ("iwae(k=3", ["cannot be read", "never closed"]),
    "empty": ("", ["cannot be read"]),
    "null byte": ("iwae(k=\0)", ["cannot be read"]),
    "lone surrogate": ("iwae(k='\ud800')", ["cannot be read"]),
    "newline": ("iwae\n(k=3)", ["cannot be read"]),
    "deep": ("iwae" + "(" * 900, ["cannot be read"]),
    "deep signs": ("iwae(k=" + "-" * 1900 + "1)", ["not a number"]),
    "long": ("iwae(k=" + "9" * 5000 + ")", ["longer than"]),
    "infinite": ("power(p=1e999)", ["p must be a finite number"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_spec_is_one_line_that_shows_it_and_the_mend(what):
    spec, expected = BAD[what]
    with pytest.raises(ValueError) as raised:
        parse_objective(spec)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    assert repr(spec)[1:50] in message
    for part in expected:
        assert part in message


CODE = [
    "__import__('os').system('touch {}')",
    "open('{}', 'w')",
    'exec(\'open("{}", "w")\')',
    "(lambda: open('{}', 'w'))()",
]
PLACES = ["{}", "iwae(k={})", "iwae(k=1, **{})", "iwae(*{})", "{}(k=1)", "iwae(gradient='a' + {})"]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("spec", PLACES)
def test_no_spec_runs_code(code, spec, tmp_path):
    witness = tmp_path / "ran"
    with pytest.raises(ValueError):
        parse_objective(spec.replace("{}", code.format(witness)))
    assert not witness.exists()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="iwae power(k=50,')\"-1.e*{}[]:\\\n\0\ud800μ", max_size=40))
def test_junk_is_an_objective_or_a_value_error(text):
    try:
        assert isinstance(parse_objective(text), Objective)
    except ValueError as error:
        assert "\n" not in str(error)


def options_of(cls: type) -> st.SearchStrategy[dict]:
    """Any subset of a class's options, each by the type of its default."""
    by_name = {
        "gradient": st.sampled_from(estimator_names()),
        "chunk_size": st.none() | st.integers(1, 9),
        "backward_samples": st.none() | st.integers(1, 9),
        "kl_weight": st.floats(0, 10),
    }
    by_type = {
        bool: st.booleans(),
        int: st.integers(1, 9),
        float: st.floats(-5, 5) | st.floats(0, 1),
        str: st.text(max_size=5),
    }
    return st.fixed_dictionaries(
        {}, optional={f.name: by_name.get(f.name, by_type.get(type(f.default))) for f in fields(cls)}
    )


def build_or_none(cls, options):
    try:
        return cls(**options)
    except ValueError:
        return None


valid_objectives = (
    st.sampled_from(objective_names())
    .map(get_objective)
    .flatmap(lambda cls: options_of(cls).map(lambda options: build_or_none(cls, options)))
    .filter(lambda objective: objective is not None)
)


@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
@settings(max_examples=150, deadline=None)
@given(valid_objectives)
def test_every_registered_objective_round_trips(objective):
    spec = format_objective(objective)
    assert parse_objective(spec) == objective
    assert format_objective(parse_objective(spec)) == spec


def test_only_what_differs_from_the_defaults_is_written():
    assert format_objective(Power(k=50, p=2.0)) == "power"
    assert format_objective(Power(k=8, chunk_size=4, gradient="dreg")) == "power(k=8, gradient='dreg', chunk_size=4)"


def test_an_objective_that_is_not_registered_is_written_for_import_objective():
    objective = Own(k=3, limit=-math.inf)
    spec = format_objective(objective)
    assert spec == f"{__name__}:Own(k=3, limit=-1e999)"
    assert import_objective(spec) == objective
    with pytest.raises(ValueError, match="Own is not registered, so it cannot be nested"):
        format_objective(Split(generative=Own(k=3), inference=IWAE(k=3)))


@pytest.mark.parametrize("value", [math.nan, (1, 2), object(), torch.zeros(2), torch.zeros(2, 30)])
def test_what_is_no_literal_is_not_written(value):
    with pytest.raises(ValueError, match=r"limit=.* cannot be written") as raised:
        format_objective(Own(limit=value))
    assert "\n" not in str(raised.value)


def test_a_default_that_is_no_literal_need_not_be_written():
    assert format_objective(Weighted(k=3)) == f"{__name__}:Weighted(k=3)"


@pytest.mark.parametrize("value", [Mode.B, OlderMode.B])
def test_a_string_of_a_subclass_is_written_as_a_string(value):
    objective = Own(limit=value)
    assert format_objective(objective) == f"{__name__}:Own(limit='b')"
    assert import_objective(format_objective(objective)) == objective


def test_a_class_that_no_spec_finds_is_not_written():
    @dataclass(frozen=True)
    class Local(Own):
        pass

    for objective in (Outer.Inner(), Local(k=3)):
        with pytest.raises(ValueError, match=r"(Outer\.Inner|Local) of .* is inside a class or a function"):
            format_objective(objective)


IMPORTS = {
    "no class": ("mcobjectives.objectives", "say where the class is"),
    "no module": ("a b:IWAE", "say where the class is"),
    "unknown module": ("nowhere_at_all.x:IWAE", "cannot import nowhere_at_all.x: ModuleNotFoundError"),
    "unknown class": ("mcobjectives.objectives:Nope", "has no Nope: its objectives are .*IWAE"),
    "no objective": (f"{__name__}:Hidden", "has Hidden, which is not a subclass"),
    "a function": ("os:getcwd", "has getcwd, which is not a subclass"),
    "bad option": ("mcobjectives.objectives:IWAE(kk=3)", "unknown option 'kk'"),
}


@pytest.mark.parametrize("what", IMPORTS)
def test_import_objective_refuses_in_one_line(what):
    spec, expected = IMPORTS[what]
    with pytest.raises(ValueError, match=expected) as raised:
        import_objective(spec)
    assert "\n" not in str(raised.value)


def test_a_module_that_raises_when_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_objective.py").write_text("raise RuntimeError('two\\nlines')")
    (tmp_path / "cancelled_objective.py").write_text("import asyncio; raise asyncio.CancelledError('two\\nlines')")
    (tmp_path / "interrupted_objective.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="cannot import broken_objective: RuntimeError: two lines"):
        import_objective("broken_objective:Mine")
    with pytest.raises(ValueError, match="cannot import cancelled_objective: CancelledError: two lines"):
        import_objective("cancelled_objective:Mine")
    with pytest.raises(KeyboardInterrupt):
        import_objective("interrupted_objective:Mine")
