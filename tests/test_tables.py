import dataclasses
import json
import math

import pytest
import torch
from made_up import made_up, result

from mcobjectives.specs import parse_objective
from mcobjectives_examples import estimates, render, training
from mcobjectives_examples.cells import Place, passes_done, recorded, result_path, run_cell
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import default_binarisation, load
from mcobjectives_examples.errors import DataError
from mcobjectives_examples.estimates import estimate_seconds
from mcobjectives_examples.evaluating import test_images as images_of
from mcobjectives_examples.files import write_json
from mcobjectives_examples.findings import findings
from mcobjectives_examples.paper import paper, table
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.sources import DATASETS
from mcobjectives_examples.tables import binarisations, configurations, rows, with_results
from mcobjectives_examples.training import Trainer

CPU = torch.device("cpu")
TINY = dataclasses.replace(get_preset("smoke"), stages=((1, 2e-3),), batch_size=500, nll_k=20)
TABLES = list(paper()["tables"])


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
    state = torch.load(tmp_path / f"{cells[1].name}.pt", weights_only=True)
    torch.save(state | {"position": {"epoch": 2}}, tmp_path / f"{cells[1].name}.pt")
    with pytest.raises(CheckpointError, match="epoch must be an integer from 0 to 1, got 2"):
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
    message = r"unknown binarisation 'epch': did you mean 'epoch'\? choose from fixed, once, epoch"
    for number in TABLES:
        for strict in (True, False):
            with pytest.raises(DataError, match=message):
                binarisations(number, dataset, "epch", strict=strict)
    with pytest.raises(DataError, match="'fixed' needs pixels that are 0 or 1"):
        binarisations("2", None, "fixed", strict=False)
    with pytest.raises(DataError, match="'once' would change nothing"):
        binarisations("1", None, "once", strict=True)
    assert binarisations("1", None, "once", strict=False) == [None] and binarisations("1", None, "fixed", strict=True)


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


def test_a_seed_that_is_not_finite_leaves_no_mean():
    nlls = [20.0, 30.0, None]
    done = made_up(seeds=3, metrics=lambda row, seed: {"nll": nlls[seed], "khat_mean": [0.5, 0.7, None][seed]})
    assert render.cells(done[0])[3:6] == ["not finite", "89.87", "88.71"]
    assert render.as_json("t", done, [])["rows"][0]["difference"] is None
    assert "not finite" in {finding.verdict for finding in findings(done)}
    pair = made_up(seeds=3, metrics=lambda row, seed: {"khat_mean": [0.5, 0.7, None][seed], "khat_unreliable": 0.0})
    assert render.trust(pair[0])[1] == "0.60 (0 %)"


def test_what_pruning_costs_is_averaged_over_the_same_seeds():
    def metrics(row, seed, more=(90.0, 91.0, None)):
        pruned = {"nll_pruned": more[seed], "nll_unpruned_same_images": [80.0, 90.0, 85.0][seed]}
        return pruned | {"nll_pruned_stderr": 0.1} if row.k == 1 or seed < 2 else {}

    rows_of = made_up(6, seeds=3, metrics=metrics)[0], made_up(seeds=3, metrics=metrics)[0]
    assert [render.more_cells(row)[0] for row in rows_of] == ["+5.50 (2/3 seeds)", "not finite"]


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
    nothing = made_up(preset="smoke", dataset="digits", missing=lambda row, seed: True)
    assert "NLL by IWAE-1000 on all test images" in render.caption(nothing)  # which are 297
    assert "ours minus theirs" in render.caption(made_up()) and "minus theirs" not in render.caption(nothing)
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
    assert run_cell(config, digits, Place(tmp_path, CPU)) == found and "earlier_parts" not in found  # nor run again


def test_a_result_tells_of_the_parts_that_were_made_elsewhere(config, digits, tmp_path, monkeypatch):
    elsewhere = provenance() | {"commit": "another"}
    with monkeypatch.context() as patch:
        patch.setattr(training, "provenance", lambda: elsewhere)
        Trainer(config, digits, CPU, tmp_path / f"{config.name}.pt").run()
    found = run_cell(config, digits, Place(tmp_path, CPU))
    assert found["earlier_parts"] == [{"to_pass": 1.0, "engine": "eager", "provenance": elsewhere}]
    assert found["provenance"]["commit"] == provenance()["commit"] and recorded(tmp_path, config) == found


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


def test_cells_beside_are_of_the_same_cap_seeds_and_protocol():
    for row in rows(8, get_preset("smoke"), dataset="digits", binarisation="epoch", seeds=[0, 3], cap=3):
        assert {peer.layers for peer in row.beside} == {1}
        for peer in row.beside:
            assert peer.k <= 3 and [config.seed for config in peer.configs] == [0, 3]
            assert {(config.dataset, config.binarisation) for config in peer.configs} == {("digits", "epoch")}


def test_an_estimate_is_the_steps_and_the_evaluation_of_every_cell(monkeypatch, digits):
    monkeypatch.setattr(estimates, "_time_step", lambda config, *_: 2.0)
    monkeypatch.setattr(estimates, "_time_evaluation", lambda config, *_: 5.0)
    preset = dataclasses.replace(TINY, stages=((3, 2e-3),), batch_size=400)  # 4 steps a pass
    config = Config("digits", "once", 1, "iwae(k=3)", preset)
    assert estimate_seconds({config: 0}, digits, CPU) == 12 * 2 + 5
    assert estimate_seconds({config: 2, dataclasses.replace(config, seed=1): 3}, digits, CPU) == 4 * 2 + 5 + 5


def test_the_evaluation_of_a_cell_is_estimated_from_a_part_of_it(monkeypatch, digits):
    monkeypatch.setattr(estimates, "fastest", lambda run, times: 1.0)
    config = Config("digits", "once", 1, "iwae(k=3)", dataclasses.replace(TINY, nll_k=5000, test_images=100))
    assert estimates._time_evaluation(config, digits, CPU) == 100 / 20 * 5000 / 500


def test_units_are_averaged_over_seeds_layer_by_layer():
    def metrics(row, seed):
        return {"active_units": [[20, 4], [23, 7]][seed][: row.layers]}

    done = made_up(1, seeds=2, layers=[2], metrics=metrics)
    assert {row.units("active_units") for row in done} == {"21.5+5.5"}
