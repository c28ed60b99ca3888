import dataclasses
import json
import math
import re

import pytest
import torch

from mcobjectives.specs import parse_objective
from mcobjectives_examples import render
from mcobjectives_examples.cells import Place, passes_done, recorded, result_path, run_cell
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.datasets import default_binarisation, load
from mcobjectives_examples.downloads import DataError
from mcobjectives_examples.estimates import estimate_seconds
from mcobjectives_examples.evaluating import test_images as images_of
from mcobjectives_examples.files import write_json
from mcobjectives_examples.findings import findings
from mcobjectives_examples.paper import paper, table
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.sources import DATASETS
from mcobjectives_examples.tables import binarisations, configurations, rows, with_results
from mcobjectives_examples.training import Trainer
from mcobjectives_examples.verdicts import Measured, ordered

CPU = torch.device("cpu")
TINY = dataclasses.replace(get_preset("smoke"), stages=((1, 2e-3),), batch_size=500, nll_k=20)
TABLES = list(paper()["tables"])


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


# Grids.


def test_table_1_is_the_papers_twelve_cells():
    cells = [(row.layers, row.objective) for row in rows(1, get_preset("paper"))]
    assert cells == [(n, f"{name}(k={k})") for n in (1, 2) for k in (1, 5, 50) for name in ("vae", "iwae")]
    assert [row.paper["nll"] for row in rows(1, get_preset("paper"))][:6] == [89.87, 89.87, 89.85, 87.61, 90.78, 87.13]


@pytest.mark.parametrize("number", TABLES)
def test_every_table_is_built_from_data_alone(number):
    grid = table(number)
    built = rows(number, get_preset("paper"))
    assert grid["dataset"] in DATASETS and grid["binarisation"] == default_binarisation(grid["dataset"])
    for row, data in zip(built, grid["rows"], strict=True):
        [config] = row.configs
        assert (row.paper, row.bgs16, row.after) == (data["paper"], data.get("bgs16"), data.get("after"))
        assert (config.dataset, config.binarisation) == (grid["dataset"], grid["binarisation"])
        assert config.layers == data["layers"] and row.k == parse_objective(data["objective"]).k and not row.capped
        assert math.isfinite(row.paper["nll"]) and len(row.paper["active_units"]) == row.layers


# Rows, and the sums of NLL, KL(q || posterior), active units and PCA active units over them and over first stages.
SUMS = {
    "1": (12, 1051.84, 78.86, 399, 280),
    "2": (12, 1036.12, 72.06, 374, 312),
    "3": (8, 892.36, 76.00, 505, 279),
    "4": (4, 937.37, 25.20, 36, 36),
    "5": (3, 264.73, 15.63, 60, 60),
    "6": (1, 88.05, 5.62, 20, 20),
    "7": (4, 348.13, 50.59, 101, 101),
    "8": (3, 260.55, 18.21, 72, 72),
    "9": (4, 347.38, 31.79, 93, 93),
    "10": (4, 707.09, 72.23, 165, 162),
}
SUMS_BGS16 = {"1": (12, 1053.17, 267), "2": (12, 1023.90, 270)}


@pytest.mark.parametrize("number", TABLES)
def test_the_papers_numbers_add_up_to_what_the_paper_prints(number):
    grid = table(number)["rows"]
    printed = [row[stage] for row in grid for stage in ("first", "paper") if stage in row]
    units = [sum(sum(row[key]) for row in printed) for key in ("active_units", "pca_active_units")]
    nats = [round(sum(row[key] for row in printed), 2) for key in ("nll", "kl_posterior")]
    assert (len(grid), *nats, *units) == SUMS[number]
    if number in SUMS_BGS16:
        theirs = [row["bgs16"] for row in grid]
        found = round(sum(row["nll"] for row in theirs), 2), sum(sum(row["active_units"]) for row in theirs)
        assert (len(theirs), *found) == SUMS_BGS16[number]


def test_an_unknown_table_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown table '11': choose from 1, 2, 3"):
        rows("11", TINY)


def test_equal_cells_are_trained_once():
    def trained(number):
        return len(configurations(rows(number, get_preset("paper"))))

    assert trained(1) == 10  # VAE and IWAE of one sample are the same, in 1L and in 2L
    assert trained(9) == 4
    shared = configurations([*rows(2, get_preset("paper"), layers=[1]), *rows(9, get_preset("paper"))])
    assert len(shared) == 5 + 2  # MIWAE(1, 50) is table 2's VAE and MIWAE(50, 1) its IWAE
    assert len(configurations(rows(1, get_preset("paper"), seeds=range(3)))) == 30


def test_layers_seeds_data_and_a_cap_choose_among_the_cells():
    chosen = rows(1, get_preset("smoke"), dataset="digits", layers=[2], seeds=[0, 1], cap=5)
    assert {row.layers for row in chosen} == {2} and {row.k for row in chosen} == {1, 5}
    assert [row.capped for row in chosen] == [False] * 4 + [True] * 2
    assert {(c.dataset, c.binarisation) for row in chosen for c in row.configs} == {("digits", "once")}
    assert [c.seed for c in chosen[0].configs] == [0, 1]
    assert rows(2, get_preset("bgs16"))[0].configs[0].binarisation == "epoch"
    assert rows(1, get_preset("bgs16"))[0].configs[0].binarisation == "fixed"


def test_table_10_continues_finished_first_stages_by_the_papers_schedule():
    ordered = configurations(rows(10, get_preset("paper")))
    firsts = [config for config in ordered if config.after is None]
    assert ordered[: len(firsts)] == firsts and len(firsts) == 3 and len(ordered) == 7
    assert all(config.preset == get_preset("paper") for config in firsts)
    assert all(config.preset.stages == ((2187, 1e-4),) for config in ordered[3:])
    assert {config.first_stage_name for config in ordered[3:]} == {config.name for config in firsts}
    assert set(firsts) <= set(configurations(rows(1, get_preset("paper"))))  # table 1's runs serve


def test_an_estimate_counts_every_cell():
    digits = load("digits")
    cells = configurations(rows(1, TINY, dataset="digits", layers=[1], cap=2))
    long = [dataclasses.replace(c, preset=TINY.with_passes(1000)) for c in cells]
    whole = estimate_seconds(dict.fromkeys(long, 0), digits, CPU)
    assert 0 < estimate_seconds(dict.fromkeys(cells, 0), digits, CPU) < whole
    assert estimate_seconds(dict.fromkeys(long, 999), digits, CPU) < whole / 10


def test_passes_done_are_those_of_the_checkpoints(digits, tmp_path):
    cells = configurations(rows(1, TINY, dataset="digits", layers=[1], cap=2))
    Trainer(cells[1], digits, CPU, tmp_path / f"{cells[1].name}.pt").run()
    assert list(passes_done(tmp_path, cells, digits.checksum).values()) == [0, 1, *[0] * (len(cells) - 2)]
    (tmp_path / f"{cells[-1].name}.pt").write_bytes((tmp_path / f"{cells[1].name}.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"belongs to another run \(differs in objective\)"):
        passes_done(tmp_path, cells, digits.checksum)


def test_a_second_stage_without_a_first_one_to_go_on_from_is_refused(digits, tmp_path):
    row = rows(10, TINY, dataset="digits", cap=2)[0]
    [first], [second] = row.first_stages, row.configs
    assert passes_done(tmp_path, [first, second], digits.checksum) == {first: 0, second: 0}
    with pytest.raises(CheckpointError, match=rf"which is not there: move {first.name}\.json away"):
        passes_done(tmp_path, [second], digits.checksum)
    path = tmp_path / f"{first.name}.pt"
    path.write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        passes_done(tmp_path, [second], digits.checksum)
    Trainer(first, digits, CPU, path).save()
    with pytest.raises(CheckpointError, match="not trained to its end"):
        passes_done(tmp_path, [second], digits.checksum)
    Trainer(first, digits, CPU, path).run()
    assert passes_done(tmp_path, [second], digits.checksum) == {second: 0}


def test_a_first_stage_of_other_settings_than_the_recorded_one_is_refused(digits, tmp_path):
    """As a figure's model may be that was trained beside the records: the second stage would not be the caption's."""
    row = rows(10, TINY, dataset="digits", cap=2)[0]
    [first], [second] = row.first_stages, row.configs
    run_cell(first, digits, Place(tmp_path, CPU))
    (tmp_path / f"{first.name}.pt").unlink()
    other = dataclasses.replace(first, preset=TINY.with_passes(2))
    Trainer(other, digits, CPU, tmp_path / f"{first.name}.pt").run()
    for run in (
        lambda: run_cell(second, digits, Place(tmp_path, CPU)),
        lambda: passes_done(tmp_path, [second], digits.checksum),
    ):
        with pytest.raises(CheckpointError, match=r"trained with other settings than .*move both away"):
            run()
    assert not (tmp_path / f"{second.name}.json").exists()


@pytest.mark.parametrize("dataset", [None, "digits", "binarized_mnist"])
def test_a_protocol_that_is_none_is_refused_whatever_the_data(dataset):
    for number in TABLES:
        for strict in (True, False):
            with pytest.raises(DataError, match="unknown binarisation 'epch': choose from fixed, once, epoch"):
                binarisations(number, dataset, "epch", strict=strict)
    with pytest.raises(DataError, match="'fixed' needs pixels that are 0 or 1"):
        binarisations("2", None, "fixed", strict=False)
    with pytest.raises(DataError, match="'once' would change nothing"):
        binarisations("1", None, "once", strict=True)
    assert binarisations("1", None, "once", strict=False) == [None] and binarisations("1", None, "fixed", strict=True)


# Findings.


@pytest.mark.parametrize(
    ("nll", "seeds", "expected"),
    [
        ((90.0, 88.0, 87.0), 1, "holds"),
        ((90.0, 88.0, 87.5), 1, "within noise"),
        ((90.0, 88.0, 88.1), 2, "within noise"),
        ((90.0, 88.0, 89.0), 1, "does not hold"),
        ((90.0, 90.2, 88.0), 1, "within noise"),
        ((90.0, 91.0, 87.9), 1, "does not hold"),
        ((90.0, 88.0, 88.0), 1, "within noise"),
    ],
)
def test_iwae_falls_with_k(nll, seeds, expected):
    def metrics(row, seed):
        return {"nll": dict(zip((1, 5, 50), nll, strict=True))[row.k]}

    assert verdict("1L: IWAE's NLL falls with k", made_up(metrics=metrics, seeds=seeds)) == expected


@pytest.mark.parametrize(
    ("spread", "last", "expected"),
    [(0.0, 87.9, "holds"), (0.0, 88.1, "does not hold"), (0.5, 87.9, "within noise"), (0.5, 85.0, "holds")],
)
def test_with_three_seeds_noise_is_two_standard_errors(spread, last, expected):
    def metrics(row, seed):
        mean = {1: 90.0, 5: 88.0, 50: last}[row.k] if row.family == "iwae" else 90.0
        return {"nll": mean + spread * (seed - 1)}

    assert verdict("1L: IWAE's NLL falls with k", made_up(metrics=metrics, seeds=3)) == expected


@pytest.mark.parametrize(("last", "expected"), [(91.0, "holds"), (89.7, "within noise"), (89.0, "does not hold")])
def test_vae_does_not_fall_with_k(last, expected):
    def metrics(row, seed):
        return {"nll": last if (row.family, row.k) == ("vae", 50) else 90.0}

    assert verdict("2L: VAE's NLL does not fall with k", made_up(metrics=metrics)) == expected


@pytest.mark.parametrize(
    ("nll", "seeds", "expected"),
    [
        ((90.0, 85.0, 95.0), 1, "does not hold"),  # whatever the last one is
        ((90.0, 90.0, 90.0), 3, "holds"),
        ((90.0, 90.0, 90.0), 2, "within noise"),
        ((90.0, 89.8, 89.6), 3, "does not hold"),  # falls by little, and by more than its spread
    ],
)
def test_vae_does_not_fall_at_any_k(nll, seeds, expected):
    def metrics(row, seed):
        return {"nll": dict(zip((1, 5, 50), nll, strict=True))[row.k] + 0.01 * seed if row.family == "vae" else 90.0}

    assert verdict("1L: VAE's NLL does not fall with k", made_up(metrics=metrics, seeds=seeds)) == expected


def test_a_dip_between_the_ends_of_the_reconstruction_error_is_shown():
    def metrics(row, seed):
        return {"reconstruction_error": {1: 62.0, 5: 61.0, 50: 63.0}[row.k]}

    [found] = [f for f in findings(made_up(layers=[1], metrics=metrics)) if "reconstruction" in f.claim]
    assert found.verdict == "holds"
    assert found.figures == "1L iwae(k=1) 62 -> 1L iwae(k=5) 61 -> 1L iwae(k=50) 63"


def test_one_unit_more_proves_nothing_in_one_run():
    def metrics(row, seed):
        return {"active_units": [20 + (row.family == "iwae" and row.k > 1)]}

    claim = "1L: IWAE has more active units than VAE"
    assert verdict(claim, made_up(layers=[1], metrics=metrics)) == "within noise"
    assert verdict(claim, made_up(layers=[1], seeds=3, metrics=metrics)) == "holds"


def test_depth_kl_and_active_units():
    def metrics(row, seed):
        units = 20 if row.family == "iwae" and row.k > 1 else 10
        return {"nll": 90.0 - row.layers, "kl_posterior": 5.0 + row.k, "active_units": [units] * row.layers}

    done = made_up(metrics=metrics)
    assert verdict("two stochastic layers beat one", done) == "holds"
    assert verdict("1L: KL(q || posterior) grows with k for IWAE", done) == "holds"
    assert verdict("2L: IWAE has more active units than VAE", done) == "holds"


def test_a_claim_about_a_missing_cell_is_not_run_and_the_others_stand():
    done = made_up(missing=lambda row, seed: (row.layers, row.objective) == (1, "iwae(k=50)"))
    assert verdict("1L: IWAE's NLL falls with k", done) == "not run"
    assert verdict("two stochastic layers beat one", done) == "not run"
    assert verdict("1L: VAE's NLL does not fall with k", done) == "within noise"
    [found] = [f for f in findings(done) if f.claim == "1L: IWAE's NLL falls with k"]
    assert found.figures == "1L iwae(k=1) 88 -> 1L iwae(k=5) 88 -> 1L iwae(k=50) not run"


def test_findings_are_about_the_k_that_was_trained():
    done = made_up(preset="smoke", dataset="digits", cap=2)
    figures = {f.claim: f.figures for f in findings(done)}
    assert figures["1L: IWAE's NLL falls with k"] == "1L iwae(k=1) 88 -> 1L iwae(k=2) 88"
    assert not [f for f in findings(made_up(preset="smoke", dataset="digits", cap=1)) if "falls" in f.claim]


@pytest.mark.parametrize("number", TABLES)
def test_no_finding_and_no_caption_names_a_k_above_the_cap(number):
    done = made_up(number, preset="smoke", dataset="digits", cap=3)
    named = " ".join(f.figures for f in findings(done)) + render.caption(done)
    assert not [k for k in re.findall(r"k[12]?=([0-9]+)", named) if int(k) > 3]
    assert "k capped at 3" in render.caption(done)


PAPERS_FINDINGS = {
    "1": {
        "1L: IWAE's NLL falls with k": "within noise",  # 87.61 -> 87.13 nats
        "1L: VAE's NLL does not fall with k": "holds",
        "1L: KL(q || posterior) grows with k for IWAE": "holds",
        "2L: IWAE's NLL falls with k": "holds",
        "2L: VAE's NLL does not fall with k": "within noise",  # 86.81 -> 86.43 nats
        "2L: KL(q || posterior) grows with k for IWAE": "holds",
        "two stochastic layers beat one": "holds",
        "1L: IWAE has more active units than VAE": "holds",
        "2L: IWAE has more active units than VAE": "holds",
    },
    "4": {
        "1L: IWAE's NLL falls with k": "holds",
        "1L: VAE's NLL does not fall with k": "holds",
        "1L: KL(q || posterior) grows with k for IWAE": "holds",
        "1L: IWAE has more active units than VAE": "holds",
    },
    "5": {
        "L_alpha: alpha makes no difference to the NLL": "within noise",  # one run of each
        "L_alpha: a higher NLL than VAE's": "does not hold",  # the text says so, against its own table 1
        "L_alpha: a higher NLL than IWAE's": "holds",
    },
    "6": {
        "the median: a higher NLL than VAE's": "does not hold",
        "the median: a higher NLL than IWAE's": "holds",
    },
    "7": {
        "power: a lower NLL than IWAE's for p > 1": "within noise",
        "power: p = 3 has the lowest NLL": "within noise",
    },
    "8": {
        "CIWAE: the NLL is not monotone in beta from IWAE to VAE": "holds",  # 86.34, 87.69, 86.27, 86.59, 87.54
        "CIWAE: with beta = 0.25 the NLL is IWAE's": "within noise",
        "CIWAE: a lower NLL than VAE's": "within noise",
        "CIWAE: a lower KL(q || posterior) than IWAE's": "holds",
    },
    "9": {
        "MIWAE: the NLL falls with k1": "within noise",
        "MIWAE: KL(q || posterior) grows with k1": "holds",
    },
    "10": {
        "VAE, then IWAE: the NLL falls": "holds",
        "VAE, then IWAE: more units are active": "holds",
        "IWAE, then VAE: the NLL rises": "within noise",
        "IWAE, then VAE: as many units are active (1L iwae(k=50) then vae(k=50))": "within noise",
        "IWAE, then VAE: as many units are active (1L iwae(k=50) then vae(k=1))": "within noise",
        "IWAE, then VAE: KL(q || posterior) falls": "holds",
    },
}


@pytest.mark.parametrize("number", PAPERS_FINDINGS)
def test_the_papers_own_numbers_give_its_findings(number):
    done = made_up(number, metrics=lambda row, seed: row.paper)
    assert {f.claim: f.verdict for f in findings(done)} == PAPERS_FINDINGS[number]


@pytest.mark.parametrize("number", TABLES)
@pytest.mark.parametrize("seeds", [1, 2])
def test_with_fewer_than_three_seeds_nothing_within_the_papers_noise_is_confirmed(number, seeds):
    """Whatever the table: all numbers of nats within 0.6 of each other, in any order."""

    def metrics(row, seed):
        lift = 0.6 * (sum(map(ord, row.label)) % 7) / 6
        nats = {"kl_posterior": 5.0 + lift, "reconstruction_error": 70.0 + lift, "nll_pruned": 88.6 + lift}
        more = {"nll_unpruned_same_images": 88.0 + lift, "nll_pruned_stderr": 0.0}
        return {"nll": 88.0 + lift, **nats, **more, "active_units": [20] * row.layers}

    near = made_up(number, seeds=seeds, metrics=metrics)
    first = [r and {**r, "metrics": {**r["metrics"], **metrics(near[0], 0)}} for r in near[0].first_results]
    near = [dataclasses.replace(row, first_results=tuple(first)) for row in near]
    assert {f.verdict for f in findings(near)} <= {"within noise"} and findings(near)


@pytest.mark.parametrize("number", TABLES)
def test_every_table_has_findings_and_none_about_what_is_not_run(number):
    assert findings(made_up(number))
    assert {f.verdict for f in findings(made_up(number, missing=lambda row, seed: True))} == {"not run"}


def test_a_claim_about_another_tables_cells_is_not_run_without_them():
    done = made_up(7)
    done = [
        dataclasses.replace(r, beside=tuple(dataclasses.replace(b, results=(None,)) for b in r.beside)) for r in done
    ]
    assert verdict("power: a lower NLL than IWAE's for p > 1", done) == "not run"
    assert verdict("power: p = 3 has the lowest NLL", done) == "within noise"


@pytest.mark.parametrize(
    ("spread", "last", "expected"),
    [(0.0, 88.5, "holds"), (0.0, 88.7, "does not hold"), (0.5, 88.3, "within noise"), (0.5, 92.0, "does not hold")],
)
def test_with_three_seeds_no_difference_is_one_within_the_papers_noise(spread, last, expected):
    def metrics(row, seed):
        return {"nll": (last if "alpha=0.5" in row.objective else 88.0) + spread * (seed - 1)}

    assert verdict("L_alpha: alpha makes no difference to the NLL", made_up(5, seeds=3, metrics=metrics)) == expected


@pytest.mark.parametrize(
    ("nll", "expected"),
    [
        ((86.0, 86.7, 87.4, 88.1, 88.8), "does not hold"),
        ((86.0, 86.7, 86.8, 88.1, 88.8), "within noise"),
        ((86.0, 86.7, 86.0, 88.1, 88.8), "holds"),
    ],
)
def test_monotone_in_beta(nll, expected):
    def metrics(row, seed):
        known = {"iwae": nll[0], "vae": nll[4]}
        betas = {f"ciwae(k=50, beta={beta})": value for beta, value in zip((0.05, 0.25, 0.5), nll[1:4], strict=True)}
        return {"nll": betas.get(row.objective) or known[row.family]}

    assert verdict("CIWAE: the NLL is not monotone in beta from IWAE to VAE", made_up(8, metrics=metrics)) == expected


def test_cells_of_fewer_seeds_than_others_are_judged_by_what_is_run():
    """Three seeds of one layer and one of two layers, as many a folder has: nothing is lost by the other seeds."""

    def metrics(row, seed):
        return {"nll": 90.0 - row.layers - (row.k > 1) - (row.k > 5) + 0.01 * seed}

    done = made_up(seeds=3, metrics=metrics, missing=lambda row, seed: row.layers == 2 and seed > 0)
    assert verdict("2L: IWAE's NLL falls with k", done) == verdict("two stochastic layers beat one", done) == "holds"
    [found] = [f for f in findings(done) if f.claim == "two stochastic layers beat one"]
    assert found.figures.startswith("1L vae(k=1) 89.01 -> 2L vae(k=1) 88 (1 of 3 seeds); ")
    near = made_up(seeds=3, missing=lambda row, seed: row.layers == 2 and seed > 0)
    assert verdict("2L: IWAE's NLL falls with k", near) == "within noise"  # of one seed, however near the others are


def test_a_result_that_is_not_finite_is_not_one_that_is_not_run():
    def metrics(row, seed):
        return {"nll": None if row.objective == "iwae(k=5)" else 90.0 - row.k}

    [found] = [f for f in findings(made_up(layers=[1], metrics=metrics)) if f.claim == "1L: IWAE's NLL falls with k"]
    assert found.verdict == "not finite"
    assert found.figures == "1L iwae(k=1) 89 -> 1L iwae(k=5) not finite -> 1L iwae(k=50) 40"


def test_a_pruned_nll_that_is_not_finite_is_said_and_seeds_are_counted():
    def metrics(row, seed):
        cost = None if seed == worst else 90.0
        return {"nll_pruned": cost, "nll_unpruned_same_images": 88.0, "nll_pruned_stderr": 0.01}

    worst = 1
    [found] = [f for f in findings(made_up(6, seeds=3, metrics=metrics)) if "inactive" in f.claim]
    assert (found.verdict, found.figures) == ("not finite", "1L median(k=50) not finite")
    worst = None
    done = made_up(6, seeds=3, metrics=metrics, missing=lambda row, seed: seed > 0)
    [found] = [f for f in findings(done) if "inactive" in f.claim]
    assert (found.verdict, found.figures) == ("holds", "1L median(k=50) +2.00 ± 0.01 (1 of 3 seeds)")


def test_the_papers_own_verdict_stands_beside_a_claim_that_its_numbers_do_not_bear_out():
    def metrics(row, seed):
        return {"nll": 95.0 if "l_alpha" in row.objective else 88.0}

    found = {f.claim: f for f in findings(made_up(5, metrics=metrics))}
    claim = found["L_alpha: a higher NLL than VAE's"]
    assert (claim.verdict, claim.papers) == ("holds", "does not hold")
    assert claim.evidence == claim.figures + " (the paper's own numbers: does not hold)"
    claim = found["L_alpha: a higher NLL than IWAE's"]
    assert claim.papers == "holds" and claim.evidence == claim.figures
    assert not any(f.papers for f in findings(made_up(5, cap=3)))  # other cells than the paper's
    assert not any(f.papers for f in findings(made_up(5, dataset="digits", preset="smoke")))
    for number in PAPERS_FINDINGS:
        assert {f.claim: f.papers for f in findings(made_up(number))} == PAPERS_FINDINGS[number]


def test_with_three_seeds_a_difference_is_judged_by_students_t():
    """Of equal spread: t(0.975, 4 degrees of freedom) standard errors, 2.776, where the normal has 1.96."""
    base, error = (88.0, 88.1, 88.2), math.sqrt(2 * 0.01 / 3)
    for factor, expected in ((2.77, "within noise"), (2.78, "holds")):
        lower = tuple(value - factor * error for value in base)
        cells = [Measured("a", base, 3), Measured("b", lower, 3)]
        assert ordered("", [cells], -1).verdict == expected
    assert ordered("", [[Measured("a", (88.0,) * 3, 3), Measured("b", (88.1,) * 3, 3)]], 1).verdict == "holds"


@pytest.mark.parametrize(
    ("cost", "stderr", "seeds", "expected"),
    [
        (1.0, 0.05, 1, "holds"),
        (0.5, 0.05, 1, "within noise"),
        (0.5, 0.05, 3, "holds"),
        (0.1, 0.05, 3, "within noise"),
        (0.0, 0.02, 1, "does not hold"),
        (0.0, 0.1, 1, "within noise"),
    ],
)
def test_what_inactive_units_are_worth(cost, stderr, seeds, expected):
    def metrics(row, seed):
        return {"nll_pruned": 88.0 + cost, "nll_unpruned_same_images": 88.0, "nll_pruned_stderr": stderr}

    done = made_up(6, seeds=seeds, metrics=metrics)
    [found] = [f for f in findings(done) if "inactive" in f.claim]
    assert found.verdict == expected and found.figures.startswith(f"1L median(k=50) {cost:+.2f} ± ")


def test_models_without_inactive_units_say_nothing_of_what_they_are_worth():
    def metrics(row, seed):
        cost = 0.0 if "median" in row.objective or "alpha=0)" in row.objective else 1.0
        return {"nll_pruned": 88.0 + cost, "nll_unpruned_same_images": 88.0, "nll_pruned_stderr": cost / 20}

    assert not [f for f in findings(made_up(6, metrics=metrics)) if "inactive" in f.claim]
    [found] = [f for f in findings(made_up(5, metrics=metrics)) if "inactive" in f.claim]
    assert found.verdict == "holds" and "alpha=0) has no inactive unit" in found.figures


def test_what_inactive_units_are_worth_is_no_surer_than_the_seeds_agree():
    def metrics(row, seed):
        return {
            "nll_pruned": 88.0 + (0.0, 0.0, 0.5)[seed],
            "nll_unpruned_same_images": 88.0,
            "nll_pruned_stderr": 0.03,
        }

    [found] = [f for f in findings(made_up(6, seeds=3, metrics=metrics)) if "inactive" in f.claim]
    assert found.verdict == "within noise" and found.figures == "1L median(k=50) +0.17 ± 0.17"


# Rendering.


def test_what_inactive_units_cost_and_the_reconstruction_stand_in_markdown_and_older_results_leave_them_out():
    metrics = {"nll_pruned": 88.5, "nll_unpruned_same_images": 88.25, "reconstruction_error": 61.234}
    new = made_up(6, metrics=lambda row, seed: {**metrics, "nll_pruned_stderr": 0.1})
    assert render.more_cells(new[0]) == ["+0.25", "61.23"]
    assert "| +0.25 | 61.23 |" in render.markdown("t", new, findings(new))
    assert render.more_cells(made_up(6)[0]) == ["", ""]
    assert "|  |  |" in render.markdown("t", made_up(6), findings(made_up(6)))


@pytest.mark.parametrize("number", ["2", "3", "4", "8", "9"])
def test_the_other_binarisation_is_named_in_files_and_caption(number):
    protocols = {p: made_up(number, binarisation=p) for p in ("once", "epoch")}
    names = {p: {c.name for row in done for c in row.configs} for p, done in protocols.items()}
    assert not names["once"] & names["epoch"] and all("-epoch-" in name for name in names["epoch"])
    assert "binarisation epoch (the paper's: once);" in render.caption(protocols["epoch"])
    assert "binarisation once;" in render.caption(protocols["once"])


def test_numbers_of_bgs16_on_other_data_are_shown_but_not_compared():
    done = made_up(10)
    assert [render.cells(row)[5] for row in done] == ["", "86.02", "", "84.88"]
    assert "BGS16's numbers are of mnist" in render.caption(done)
    assert [r["first_stage"][0]["nll"] for r in render.as_json("t", done, [])["rows"]] == [87.13, 87.13, 90.81, 89.88]


def test_differences_stand_beside_the_papers_numbers():
    [row] = [r for r in made_up() if (r.layers, r.objective) == (2, "iwae(k=50)")]
    units = ["10+10/43+11", "9+9/26+11", "5.00/9.89"]
    assert render.cells(row) == ["2", "iwae", "50", "88.00", "84.77 +3.23", "85.32 +2.68", *units]


def test_seeds_are_averaged_and_missing_ones_counted():
    done = made_up(seeds=3, metrics=lambda row, seed: {"nll": 87.0 + seed}, missing=lambda row, seed: seed == 2)
    assert render.cells(done[0])[3] == "87.50 ± 0.71 (2/3 seeds)"


def test_a_metric_that_some_results_lack_is_averaged_over_the_others():
    done = made_up(seeds=3, metrics=lambda row, seed: {"nll_pruned": 90.0 + seed} if seed else {})
    assert done[0].values("nll_pruned") == [91.0, 92.0] and done[0].mean("nll_pruned") == 91.5
    assert made_up(metrics=lambda row, seed: {"nll_pruned": None})[0].mean("nll_pruned") is None


def test_a_partly_run_table_marks_what_is_missing():
    done = made_up(missing=lambda row, seed: row.layers == 2)
    text = render.markdown("Table 1", done, findings(done))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 14 and len({line.count("|") for line in lines}) == 1
    assert sum("not run" in line for line in lines) == 6
    assert "- *not run*: two stochastic layers beat one: 1L vae(k=1) 88 -> 2L vae(k=1) not run" in text


def test_other_data_than_the_papers_is_never_compared():
    done = made_up(preset="smoke", dataset="digits", cap=5)
    assert "+" not in "".join(render.cells(done[5])[4:6])
    assert all(row["difference"] is None for row in render.as_json("t", done, [])["rows"])
    caption = render.caption(done)
    for part in ("preset smoke: 12 passes (the paper's: 3280)", "1 seed;", "digits, binarisation once", "sha256 abc"):
        assert part in caption
    assert "k capped at 5" in caption and "not the paper's data set" in caption


def test_the_caption_tells_that_omniglot_is_not_bgs16s(tmp_path):
    grid = rows(3, TINY)
    for source, verified, said in (
        ("chardata.mat, BGS16's own file", True, "(verified)"),
        ("chardata.mat, not BGS16's own file (git-blob:0): another one", None, "(not BGS16's own file)"),
        ("some digits", None, "(no official checksum)"),
    ):
        made = result(grid[0].configs[0])
        made["data"] |= {"source": source, "files": [{"verified": verified}]}
        write_json(result_path(tmp_path, grid[0].configs[0]), made)
        assert said in render.caption(with_results(grid, tmp_path))


def test_the_caption_tells_what_was_evaluated():
    assert "NLL by IWAE-1000 on 500 random test images" in render.caption(made_up(preset="smoke"))
    assert "NLL by IWAE-5000 on all test images" in render.caption(made_up(preset="paper"))
    assert "3280 and 2187 passes (the paper's: 3280 and 2187)" in render.caption(made_up(10))
    caption = render.caption(made_up(preset="short"))
    assert "10 of k samples back-propagated, so that VAE and L_alpha of more samples are trained as of 10" in caption
    assert "trained as of" not in render.caption(made_up(7, preset="short"))


@pytest.mark.parametrize("number", TABLES)
def test_json_and_markdown_of_every_table_also_when_nothing_is_run(number):
    for done in (made_up(number), made_up(number, missing=lambda row, seed: True)):
        found = findings(done)
        record = json.loads(json.dumps(render.as_json("t", done, found), allow_nan=False))
        assert [row["objective"] for row in record["rows"]] == [row["objective"] for row in table(number)["rows"]]
        assert render.markdown("t", done, found).startswith("**t.** ")


# Cells.


@pytest.fixture
def config():
    return rows(1, TINY, dataset="digits", cap=2)[3].configs[0]


def test_a_result_tells_where_it_comes_from(config, digits, tmp_path):
    found = run_cell(config, digits, Place(tmp_path, CPU))
    assert json.loads(result_path(tmp_path, config).read_text()) == found
    assert found["config"] == config.to_dict(digits.checksum) and found["config"]["seed"] == 0
    assert found["data"]["sha256"] == digits.checksum and found["data"]["test"] == 297
    assert {"mcobjectives", "torch", "numpy", "python"} <= found["provenance"]["versions"].keys()
    assert {"commit", "machine", "date"} <= found["provenance"].keys()
    assert found["seconds"]["train"] > 0 and found["seconds"]["evaluate"] > 0
    assert found["metrics"]["points"] == 297 and found["metrics"]["k"] == 20
    assert len(found["learning_curve"]) == 1 and found["engine"] == "eager"
    numbers = ("log_p_x_given_h", "kl_prior", "kl_posterior", "nll_pruned", "nll_unpruned_same_images")
    assert all(math.isfinite(found["metrics"][name]) for name in (*numbers, "reconstruction_error"))
    assert found["metrics"]["pruned_images"] == 75
    assert run_cell(config, digits, Place(tmp_path, CPU)) == found  # and is not run again


def test_a_subset_of_the_test_images_is_drawn_from_all_of_them_and_the_same_in_every_run(config, digits):
    whole = images_of(digits, config)
    few = dataclasses.replace(config, preset=dataclasses.replace(TINY, test_images=90), seed=3)
    chosen = images_of(digits, few)
    torch.manual_seed(9)
    assert torch.equal(images_of(digits, few), chosen)
    # Files may be sorted by class: the first images are no sample of them.
    rows_of = [int((whole == image).all(1).nonzero()[0]) for image in chosen]
    assert len(set(rows_of)) == 90 and max(rows_of) > 250 and sum(row >= 148 for row in rows_of) > 30


def test_a_result_of_other_settings_is_refused_and_kept(config, digits, tmp_path):
    write_json(result_path(tmp_path, config), result(config))
    assert recorded(tmp_path, config)["metrics"]["nll"] == 88.0
    other = dataclasses.replace(config, preset=TINY.with_passes(7))
    before = result_path(tmp_path, config).read_bytes()
    with pytest.raises(
        CheckpointError, match=r"recorded with other settings \(preset\.[a-z_]+\): choose another --out"
    ):
        recorded(tmp_path, other)
    reworded = dataclasses.replace(config, preset=dataclasses.replace(TINY, about="in other words"))
    assert recorded(tmp_path, reworded)["metrics"]["nll"] == 88.0
    older = json.loads(before)
    del older["config"]["preset"]["precision"]
    write_json(result_path(tmp_path, config), older)
    assert recorded(tmp_path, config)["metrics"]["nll"] == 88.0
    result_path(tmp_path, config).write_bytes(before)
    with pytest.raises(CheckpointError, match=r"\(data_sha256\)"):
        run_cell(config, digits, Place(tmp_path, CPU))
    assert result_path(tmp_path, config).read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"config": 3}', '{"config": {}}'])
def test_a_foreign_result_is_refused(config, tmp_path, text):
    result_path(tmp_path, config).write_text(text)
    with pytest.raises(CheckpointError, match="move it away"):
        recorded(tmp_path, config)


def test_a_table_is_rendered_from_the_files(tmp_path):
    grid = rows(1, TINY, dataset="digits", cap=2)
    for config in configurations(grid)[:3]:
        write_json(result_path(tmp_path, config), result(config))
    done = with_results(grid, tmp_path)
    # Three files serve every row that the cap and k = 1 make equal.
    assert [row.complete for row in done] == [True] * 6 + [False] * 6


def test_the_second_stage_starts_from_the_first_ones_parameters(digits, tmp_path, monkeypatch):
    row = rows(10, TINY, dataset="digits", cap=2)[0]
    [first], [second] = row.first_stages, row.configs
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        run_cell(second, digits, Place(tmp_path, CPU))
    run_cell(first, digits, Place(tmp_path, CPU))
    trained = torch.load(tmp_path / f"{first.name}.pt", weights_only=True)["model"]
    frozen = dataclasses.replace(second, preset=dataclasses.replace(TINY, stages=((1, 0.0),)))
    assert run_cell(frozen, digits, Place(tmp_path, CPU))["config"]["after"] == first.objective
    kept = torch.load(tmp_path / f"{second.name}.pt", weights_only=True)["model"]
    assert all(torch.equal(kept[name], trained[name]) for name in trained)


def test_the_second_stage_wants_its_own_finished_first_stage(digits, tmp_path):
    row = rows(10, TINY, dataset="digits", cap=2)[0]
    [first], [second] = row.first_stages, row.configs
    path = tmp_path / f"{first.name}.pt"
    Trainer(first, digits, CPU, path).save()
    with pytest.raises(CheckpointError, match="not trained to its end"):
        run_cell(second, digits, Place(tmp_path, CPU))
    Trainer(dataclasses.replace(first, seed=5), digits, CPU, path).save()
    with pytest.raises(CheckpointError, match="not the first stage"):
        run_cell(second, digits, Place(tmp_path, CPU))


def test_a_fall_that_the_seeds_leave_open_is_no_level():
    def metrics(row, seed):
        return {"nll": {1: 90.0, 5: 89.7, 50: 90.0}[row.k] + 0.5 * (seed - 1) if row.family == "vae" else 90.0}

    assert verdict("1L: VAE's NLL does not fall with k", made_up(metrics=metrics, seeds=3)) == "within noise"


def test_a_spread_that_the_seeds_leave_open_is_no_difference():
    def metrics(row, seed):
        return {"nll": (88.9 if "alpha=0.5" in row.objective else 88.0) + 0.5 * (seed - 1)}

    assert (
        verdict("L_alpha: alpha makes no difference to the NLL", made_up(5, seeds=3, metrics=metrics)) == "within noise"
    )


def test_one_cell_of_few_seeds_has_the_papers_noise():
    three, one = (Measured("", values, len(values)) for values in ((88.0, 88.01, 88.02), (88.4,)))
    assert ordered("", [[three, one]], 1).verdict == ordered("", [[one, three]], -1).verdict == "within noise"


def test_one_unit_more_after_a_switch_proves_nothing_in_one_run():
    done = made_up(10, metrics=lambda row, seed: {"active_units": [12]})
    before = [{**row.results[0], "metrics": {**row.results[0]["metrics"], "active_units": [11]}} for row in done]
    done = [dataclasses.replace(row, first_results=(first,)) for row, first in zip(done, before, strict=True)]
    assert {f.verdict for f in findings(done) if "active" in f.claim} == {"within noise"}


def test_cells_beside_are_of_the_same_cap_seeds_and_protocol():
    for row in rows(8, get_preset("smoke"), dataset="digits", binarisation="epoch", seeds=[0, 3], cap=3):
        assert {peer.layers for peer in row.beside} == {1}
        for peer in row.beside:
            assert peer.k <= 3 and [config.seed for config in peer.configs] == [0, 3]
            assert {(config.dataset, config.binarisation) for config in peer.configs} == {("digits", "epoch")}
