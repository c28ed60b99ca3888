"""Presets and configurations: what the protocols are, and what may be changed of them."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import accumulate

import pytest
from runs import TINY

from mcobjectives.specs import parse_objective
from mcobjectives_examples.config import Config, canonical, capped, name_of, training_objective, without_k
from mcobjectives_examples.presets import PRESETS, configured, get_preset

# Presets.


def test_the_papers_schedule():
    paper = get_preset("paper")
    ends = list(accumulate(3**i for i in range(8)))
    assert paper.passes == ends[-1] == 3280
    for i, end in enumerate(ends):
        rate = 1e-4 * 10 ** (-i / 7)
        assert paper.learning_rate(end - 3**i) == paper.learning_rate(end - 0.01) == pytest.approx(rate, rel=1e-12)
    assert (paper.batch_size, paper.betas, paper.eps, paper.nll_k) == (100, (0.9, 0.999), 1e-4, 5000)
    assert get_preset("bgs16").learning_rate(0) == 1e-3


@pytest.mark.parametrize("passes", [1, 12, 200])
def test_one_cycle_warms_up_over_a_tenth_and_falls_to_zero(passes):
    preset = get_preset("short").with_passes(passes)
    rates = [preset.learning_rate(passes * i / 1000) for i in range(1001)]
    assert max(rates) == rates[100] == pytest.approx(2e-3)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_fewer_passes_cut_the_stages_and_more_are_refused():
    paper = get_preset("paper")
    assert [passes for passes, _ in paper.with_passes(5).stages] == [1, 3, 1]
    assert paper.with_passes(5).learning_rate(4.5) == paper.learning_rate(4.5)
    with pytest.raises(ValueError, match="3281 are more than its schedule"):
        paper.with_passes(3281)
    for preset in (paper, get_preset("short")):
        with pytest.raises(ValueError, match="passes must be an integer of at least 1, got 0"):
            preset.with_passes(0)


def test_a_second_stage_is_no_longer_than_the_first():
    paper = get_preset("paper")
    assert paper.continued(2187, 1e-4).stages == ((2187, 1e-4),)
    assert paper.with_passes(4).continued(2187, 1e-4).stages == ((4, 1e-4),)
    assert get_preset("smoke").continued(2187, 1e-4) == get_preset("smoke")


def test_overrides():
    preset, cap = configured("smoke", ["passes=3", "batch_size=7", "nll_k=11", "test_images=5", "k=4"])
    assert (preset.passes, preset.batch_size, preset.nll_k, preset.test_images, cap) == (3, 7, 11, 5, 4)


@pytest.mark.parametrize("text", ["passes", "passes=0", "passes=-1", "passes=1.5", "test_images=1", "lr=1", ""])
def test_bad_overrides_are_refused(text):
    with pytest.raises(ValueError, match=r"must be an integer|cannot set"):
        configured("smoke", [text])


@pytest.mark.parametrize(
    ("spec", "k"), [("iwae(k=50)", 4), ("vae(k=2)", 2), ("power(k=50, p=3)", 4), ("miwae(k1=5, k2=10)", 4)]
)
def test_a_cap_on_k(spec, k):
    assert training_objective(capped(spec, 4), TINY).k == k
    assert capped(spec, None) == spec


def test_a_split_cannot_be_capped():
    with pytest.raises(ValueError, match="give its parts fewer samples"):
        capped("split(generative=iwae(k=6), inference=vae(k=6))", 2)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dataset", ["binarized_mnist", "mnist"])
def test_what_is_binary_already_stays_fixed(name, dataset):
    expected = "fixed" if dataset == "binarized_mnist" else "epoch" if name == "bgs16" else "once"
    assert get_preset(name).binarisation_of(dataset) == expected


def test_the_presets_numbers():
    paper, bgs16, short, smoke = (get_preset(name) for name in ("paper", "bgs16", "short", "smoke"))
    assert {p.name: (p.batch_size, p.eps, p.betas) for p in (paper, bgs16, short, smoke)} == {
        "paper": (100, 1e-4, (0.9, 0.999)),
        "bgs16": (20, 1e-4, (0.9, 0.999)),
        "short": (100, 1e-4, (0.9, 0.999)),
        "smoke": (100, 1e-4, (0.9, 0.999)),
    }
    assert (short.passes, short.backward_samples, short.precision, short.nll_k) == (140, 10, "bf16", 5000)
    assert (smoke.passes, smoke.backward_samples, smoke.nll_k, smoke.test_images) == (12, None, 1000, 500)
    assert paper.backward_samples is bgs16.backward_samples is None and paper.precision == "highest"


def test_one_cycle_by_hand():
    preset = get_preset("short").with_passes(10)
    shares = [0.04, 0.52, 1.0, 0.5 + 0.5 * math.cos(math.pi / 3), 0.5]
    assert [preset.learning_rate(at) for at in (0, 0.5, 1, 4, 5.5)] == pytest.approx([2e-3 * s for s in shares])


# Configurations.


def test_a_configuration_survives_json():
    config = Config("digits", "once", 2, "iwae(k=3)", get_preset("paper"), seed=3, after="vae(k=1)")
    record = json.loads(json.dumps(config.to_dict("abc")))
    assert Config.from_dict(record) == config and record["data_sha256"] == "abc"


def test_every_configuration_has_its_own_file_name():
    base = Config("digits", "once", 1, "iwae(k=3)", TINY)
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"dataset": "mnist"},
            {"binarisation": "epoch"},
            {"layers": 2},
            {"seed": 1},
            {"after": "vae(k=1)"},
            {"objective": "iwae(k=30)"},
            {"objective": "power(k=3, p=1.0)"},
            {"objective": "power(k=3, p=-1.0)"},
            {"objective": "iwae(k=3, gradient='dreg')"},
        )
    ]
    names = {config.name for config in [base, *others]}
    assert len(names) == 10 and all("/" not in name and " " not in name for name in names)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("iwae", "iwae(k=50)"),
        ("iwae(k=1)", "vae(k=1)"),
        ("miwae(k1=1, k2=50)", "vae(k=50)"),
        ("miwae(k1=50, k2=1)", "iwae(k=50)"),
        ("miwae(k1=1, k2=1)", "vae(k=1)"),
        ("vae(k=2, analytic_kl=True)", "vae(k=2, analytic_kl=True)"),
        ("iwae(k=1, gradient='dreg')", "iwae(k=1, gradient='dreg')"),
        ("power", "power(k=50, p=2)"),
        ("power(k=3, p=-2.0)", "power(k=3, p=-2)"),
        ("ciwae(k=3, beta=1.0)", "ciwae(k=3, beta=1)"),
        ("l_alpha(k=3, alpha=0.10)", "l_alpha(k=3, alpha=0.1)"),
    ],
)
def test_equal_objectives_have_one_canonical_spec(spec, expected):
    assert parse_objective(canonical(spec)) == parse_objective(expected)
    assert canonical(canonical(spec)) == canonical(spec) == canonical(expected)


def test_a_split_is_canonical_too():
    spec = "split(generative=iwae(k=6), inference=miwae(k1=3, k2=2))"
    assert parse_objective(canonical(spec)) == parse_objective(spec)


@pytest.mark.parametrize(
    ("spec", "name", "expected"),
    [
        ("vae", "vae", "vae"),
        ("iwae(k=50)", "iwae", "iwae"),
        ("power(k=50, p=3)", "power", "power(p=3)"),
        ("miwae(k1=5, k2=10)", "miwae", "miwae(k1=5, k2=10)"),
        ("mine(beta=0.5, k=3, gradient='dreg')", "mine", "mine(beta=0.5, gradient='dreg')"),
    ],
)
def test_a_spec_tells_its_name_and_is_written_without_k(spec, name, expected):
    assert (name_of(spec), without_k(spec)) == (name, expected)
