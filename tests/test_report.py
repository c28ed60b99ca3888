"""The report on a folder of results: the numbers are those that were recorded, and it needs no network."""

import copy
import json
import re
import shutil
import statistics
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from mcobjectives_examples import charts, records
from mcobjectives_examples.blocks import Section, Table, escaped, markdown_page
from mcobjectives_examples.checkpoints import CheckpointError
from mcobjectives_examples.config import Config
from mcobjectives_examples.findings import findings
from mcobjectives_examples.presets import get_preset
from mcobjectives_examples.protocols import preset_names
from mcobjectives_examples.report import html, report, write_report
from mcobjectives_examples.tables import configurations, rows

RECORDED = Path(__file__).parent.parent / "benchmarks" / "results" / "short"
SHORT = get_preset("short")
VOID = {"meta", "img", "br", "link", "input", "hr", "line", "polyline", "circle"}


def result(config, **metrics):
    """A made-up record of a configuration."""
    usual = {"nll": 88.123, "kl_posterior": 5.0, "active_units": [10] * config.layers, "ess_mean": 21.5}
    usual |= {"pca_active_units": [9] * config.layers, "khat_mean": 0.4, "khat_unreliable": 0.05}
    return {
        "config": config.to_dict("abc"),
        "metrics": usual | metrics,
        "learning_curve": [-120.0, -110.0, -100.0],
        "data": {"name": config.dataset, "sha256": "abc", "train": 5, "test": 10_000, "files": [{"verified": True}]},
        "provenance": {
            "versions": {"mcobjectives": "0.1.0", "torch": "2.9"},
            "commit": 40 * "c",
            "machine": {"cpu": "a processor", "cores": 2, "threads": 1},
            "date": "2025-01-02T03:04:05+00:00",
        },
    }


def record(folder, config, **changes):
    folder.mkdir(exist_ok=True)
    made = changes.pop("made", None) or result(config, **changes)
    (folder / f"{config.name}.json").write_text(json.dumps(made))


class Page(HTMLParser):
    """Checks that tags are nested; collects attributes, text, and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.texts, self.tables, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += text

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(folder):
    return Page(html(report(folder)))


def lines_of(page, *header):
    """The lines of all tables that have these columns."""
    return [dict(zip(t[0], line, strict=True)) for t in page.tables if set(header) <= set(t[0]) for line in t[1:]]


# The recorded results of this repository.


def test_numbers_are_those_that_were_recorded():
    page = page_of(RECORDED)
    found = records.read(RECORDED)
    # Two data sets may have cells of one label: the NLL tells them apart.
    cells = {(line["cell"], line["seed"], line["NLL"]): line for line in lines_of(page, "cell", "least ESS")}
    assert len(cells) == len(found) == len(list(RECORDED.glob("*-seed*.json"))) > 0
    seeds = defaultdict(list)
    for config, recorded in found.items():
        m = recorded["metrics"]
        seeds[replace(config, seed=0)].append(m)
        line = cells[f"{config.layers}L {label(config)}", str(config.seed), f"{m['nll']:.2f}"]
        assert float(line["ELBO"]) == round(m["elbo"], 2)
        assert line["active units"] == "+".join(map(str, m["active_units"]))
        assert line["k-hat (too high for)"].startswith(khat([m]))
        for file in recorded["data"]["files"]:
            assert file["sha256"] in page.text
        assert recorded["provenance"]["commit"][:10] in page.text
    # A row of a table is of all seeds of its cell.
    table = {(x["L"], x["objective"], x["k"], x["NLL"].partition(" (")[0]): x for x in lines_of(page, "L", "BGS16")}
    for config, metrics in seeds.items():
        if family := re.fullmatch(r"(vae|iwae)\(k=(\d+)\)", config.objective):
            nlls = [m["nll"] for m in metrics]
            nll = f"{statistics.fmean(nlls):.2f}" + (f" ± {statistics.stdev(nlls):.2f}" if len(nlls) > 1 else "")
            objective = label(config) if config.after else family[1]
            row = table[str(config.layers), objective, family[2], nll]
            assert row["k-hat (too high for)"].startswith(khat(metrics))
            assert float(row["ESS"]) == pytest.approx(statistics.fmean(m["ess_mean"] for m in metrics), rel=5e-3)


def label(config):
    """How a page names a configuration, without its depth."""
    return f"{config.after} then {config.objective}" if config.after else config.objective


def khat(metrics):
    """What is shown of k-hat, the mean over seeds."""
    mean, share = (statistics.fmean(m[name] for m in metrics) for name in ("khat_mean", "khat_unreliable"))
    return f"{mean:.2f} ({100 * share:.0f} %)"


def test_html_and_markdown_say_the_same(tmp_path):
    shutil.copytree(RECORDED, tmp_path / "short")
    (tmp_path / "short" / "mnist-once-2L-vae-k-50-seed0.json").unlink()  # so that a cell is not run
    write_report(tmp_path / "short", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    page = Page((tmp_path / "out" / "report.html").read_text())
    in_markdown = [
        [cell.replace("\\|", "|").replace("\\", "") for cell in re.split(r" \| ", line.strip("| "))]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    in_html = [[cell for cell in line] for table in page.tables for line in table]
    assert [[c for c in line if c] for line in in_html] == [
        [c.strip() for c in line if c.strip("| ")] for line in in_markdown
    ]
    assert text.startswith("# Results recorded in short\n") and "- *not run*: " in text
    assert not list((tmp_path / "short").glob("report*"))
    write_report(tmp_path / "short", tmp_path / "short")
    inside, linked = re.subn(r"!\[.*\]\(figure-\d\.png\)\n\n", "", (tmp_path / "short" / "report.md").read_text())
    assert inside == text and linked == len(list(RECORDED.glob("figure-*.png")))


def test_nothing_is_loaded_from_elsewhere_and_the_page_is_accessible(tmp_path):
    shutil.copytree(RECORDED, tmp_path / "short")
    figure(tmp_path / "short")
    text = html(report(tmp_path / "short"))
    page = Page(text)
    loads = [
        value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert loads and all(value.startswith(("#", "data:image/")) for value in loads)
    assert not re.search(r"@import|url\(|<script|<link|<iframe|<object", text, re.IGNORECASE)
    assert "default-src 'none'" in text
    assert not re.search(r"\son\w+=", text)
    targets = [value[1:] for _, name, value in page.attributes if name == "href"]
    assert set(targets) == {i for i in page.ids if i in targets} and len(page.ids) == len(set(page.ids))
    assert all(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    count = {tag: sum(1 for t, name, _ in page.attributes if (t, name) == (tag, "alt")) for tag in ("img",)}
    assert count["img"] == text.count("<img ") == 1 + len(list(RECORDED.glob("figure-*.png")))
    assert text.count("<table>") == text.count("<caption>") and text.count("<h1>") == 1
    assert all("aria-label" in svg or "aria-hidden" in svg for svg in re.findall(r"<svg[^>]*>", text))
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert str(RECORDED.parent) not in text and str(tmp_path) not in text


# Made-up folders.


def test_a_partly_run_table_says_what_is_not_run(tmp_path):
    some = configurations(rows(1, SHORT))[:3]
    for config in some:
        record(tmp_path, config)
    page = page_of(tmp_path)
    shown = lines_of(page, "BGS16", "NLL")
    run = {config.objective for config in some}
    for line in shown:
        name = f"{line['objective']}(k={line['k']})".replace("iwae(k=1)", "vae(k=1)")
        assert line["NLL"] == ("88.12" if line["L"] == "1" and name in run else "not run")
    for name in ("2L iwae(k=50)", "Table 2: ", "Table 10: ", "Figure 3: "):
        assert name in page.text[page.text.index("Not run", 300) :]


def test_seeds_are_averaged_and_a_missing_one_is_named(tmp_path):
    for config in configurations(rows(7, SHORT, seeds=(0, 1, 2))):
        if (config.seed, config.objective) != (1, "power(k=50, p=0.5)"):
            record(tmp_path, config, nll=88.0 + config.seed)
    page = page_of(tmp_path)
    nlls = {line["objective"]: line["NLL"] for line in lines_of(page, "BGS16")}
    assert sorted(nlls.values()) == ["89.00 ± 1.00"] * 3 + ["89.00 ± 1.41 (2/3 seeds)"]
    assert re.search(r"1L power\(k=50, p=0\.5\) \(seed 1\)", page.text)
    assert len(lines_of(page, "cell", "ESS")) == 11


def claims_of(folder, number):
    """The findings of a table that is recorded in a folder, by claim."""
    [run] = [run for run in records.table_runs(records.read(folder)) if run.number == number]
    return {finding.claim: finding for finding in findings(run.rows)}


def test_claims_that_rest_on_another_tables_cells_are_judged(tmp_path):
    for seed in (0, 1):  # the claims are of the seeds that the table has
        record(tmp_path, Config("binarized_mnist", "fixed", 1, "iwae(k=50)", SHORT, seed), nll=90.0)
    for config in configurations(rows(7, SHORT)):
        record(tmp_path, config, nll=89.0)
    lower = claims_of(tmp_path, "7")["power: a lower NLL than IWAE's for p > 1"]
    assert lower.verdict == "holds"
    assert "1L iwae(k=50) 90 -> 1L power(k=50, p=2) 89" in lower.figures


def test_claims_that_rest_on_a_first_stage_are_judged(tmp_path):
    for config in configurations(rows(10, SHORT)):
        record(tmp_path, config, nll=89.0 if config.after is None else 90.0)
    falls = claims_of(tmp_path, "10")["VAE, then IWAE: the NLL falls"]
    assert falls.verdict == "does not hold"
    assert "1L vae(k=50) 89 -> 1L vae(k=50) then iwae(k=50) 90" in falls.figures


def test_every_protocol_is_a_table_of_its_own(tmp_path):
    for binarisation in ("once", "epoch"):
        record(tmp_path, Config("mnist", binarisation, 1, "iwae(k=50)", SHORT))
    text = page_of(tmp_path).text
    assert "Table 2: MNIST, stochastic binarisation, binarisation epoch" in text
    runs = records.table_runs(records.read(tmp_path))
    assert [(run.number, run.rows[0].configs[0].binarisation) for run in runs if run.number == "2"] == [
        ("2", "once"),
        ("2", "epoch"),
    ]


def test_pixels_drawn_anew_are_set_against_the_same_cells_drawn_once(tmp_path):
    for once, row in zip(rows(2, SHORT, layers=[1]), rows(2, SHORT, layers=[1], binarisation="epoch"), strict=True):
        record(tmp_path, *once.configs, nll=90.0, elbo=-91.0)
        record(tmp_path, *row.configs, nll=89.0, elbo=-90.5)
    once, run, *_ = records.table_runs(records.read(tmp_path))
    assert not any("anew" in f.claim for f in findings(once.rows))
    found = {f.claim: f for f in findings(run.rows) if "anew" in f.claim}
    lowers = found["1L: drawing the pixels anew for every pass lowers the NLL"]
    assert lowers.verdict == "holds" and "1L iwae(k=50) once 90 -> anew 89" in lowers.figures
    gap = found["1L: with pixels drawn anew a VAE's training bound is less above its test ELBO"]
    assert gap.verdict == "within noise" and gap.figures.startswith("1L vae(k=1) once -9 -> anew -9.50; ")
    assert len(found) == 2 and "drawing the pixels anew" in page_of(tmp_path).text


def test_a_preset_that_was_reworded_is_still_one_protocol(tmp_path):
    first, second, *_ = configurations(rows(1, SHORT))
    record(tmp_path, first)
    record(tmp_path, replace(second, preset=replace(SHORT, about="in other words")))
    [run] = [run for run in records.table_runs(records.read(tmp_path)) if run.number == "1"]
    assert sum(row.complete for row in run.rows) == 3  # VAE and IWAE of one sample are one cell


def test_cells_of_other_settings_by_one_presets_name_are_told_apart(tmp_path):
    smoke = get_preset("smoke")
    quick = replace(smoke.with_passes(1), batch_size=20)
    for i, preset in enumerate((smoke, quick, SHORT)):
        record(tmp_path, Config("mine", "once", 1, "vae(k=1)", preset, i, latent=2))
    page = page_of(tmp_path)
    names = ["smoke (12 passes, batch size 100)", "smoke (1 pass, batch size 20)", "short"]
    for name in names:
        assert page.text.count(f"mine, binarisation once, preset {name}") >= 2  # metrics, and a learning curve
    assert sum(set(table[0]) >= {"cell", "NLL"} for table in page.tables) == 3
    [settings] = [table for table in page.tables if len(table) > 1 and table[1][0] == "stages"]
    assert sorted(settings[0][1:]) == sorted(names)
    slower = replace(smoke, stages=((12, 1e-4),))
    assert preset_names([smoke, slower])[slower] == "smoke (stages (12, 0.0001))"


def test_a_cap_on_k_and_other_data_are_found_out(tmp_path):
    for config in configurations(rows(1, get_preset("smoke"), dataset="digits", cap=8)):
        record(tmp_path, config)
    [run] = records.table_runs(records.read(tmp_path))  # tables 2, 3, 4 would show the same cells
    assert run.number == "1" and all(row.complete for row in run.rows) and run.rows[-1].k == 8
    page = page_of(tmp_path)
    assert "k capped at 8" in page.text and "Table 1: Fixed-binarisation MNIST, run on digits" in page.text
    assert "BGS16 " not in page.text.replace("BGS16 active", "")  # no curve of theirs beside ours


def test_a_data_set_with_a_table_of_its_own_is_not_shown_under_another(tmp_path):
    for config in configurations(rows(4, SHORT)):
        record(tmp_path, config)
    assert [run.number for run in records.table_runs(records.read(tmp_path))] == ["4"]
    record(tmp_path, Config("fashion_mnist", "once", 1, "vae(k=5)", SHORT))  # this one table 4 does not have
    assert [run.number for run in records.table_runs(records.read(tmp_path))] == ["1", "4"]


def test_k_that_the_paper_has_is_no_cap(tmp_path):
    for k in (1, 5):
        record(tmp_path, Config("digits", "once", 1, f"vae(k={k})", get_preset("smoke")))
    [run] = records.table_runs(records.read(tmp_path))
    assert [row.complete for row in run.rows if row.objective.endswith("(k=50)")] == [False] * 4


@pytest.mark.parametrize("number", ["5", "6", "7", "8"])
@pytest.mark.parametrize("cap", [4, 5])
def test_a_cap_is_found_out_from_any_tables_cells(tmp_path, number, cap):
    for config in configurations(rows(number, get_preset("smoke"), dataset="digits", cap=cap)):
        record(tmp_path, config)
    record(tmp_path, Config("digits", "once", 1, "not_installed(k=3)", get_preset("smoke")))
    runs = records.table_runs(records.read(tmp_path))
    assert all(row.complete and row.k <= cap for run in runs if run.number == number for row in run.rows)
    assert number in {run.number for run in runs}


@pytest.mark.parametrize("specs", [["vae(k=1)"], ["vae(k=1)", "vae(k=5)", "iwae(k=5)"]])
def test_a_table_that_is_begun_tells_of_no_cap(tmp_path, specs):
    for spec in specs:  # all that table 9 would have with k capped at 1 or 5
        record(tmp_path, Config("mnist", "once", 1, spec, SHORT))
    assert [run.number for run in records.table_runs(records.read(tmp_path))] == ["2"]


def test_a_figure_whose_name_ends_in_a_seed_is_no_cell(tmp_path):
    record(tmp_path, configurations(rows(5, SHORT))[0])
    (tmp_path / "figure-5-seed0.png.json").write_text("{}")
    assert len(records.read(tmp_path)) == 1


def test_the_second_stage_belongs_to_its_first(tmp_path):
    for config in configurations(rows(10, SHORT)):
        record(tmp_path, config)
    page = page_of(tmp_path)
    shown = [line for line in lines_of(page, "BGS16") if " then " in line["objective"]]
    assert len(shown) == 4 and {line["NLL"] for line in shown} == {"88.12"}


@pytest.mark.parametrize(("share", "flagged"), [(0.05, False), (0.101, True), (None, False)])
def test_an_unreliable_nll_is_flagged(tmp_path, share, flagged):
    record(tmp_path, configurations(rows(5, SHORT))[0], khat_unreliable=share, khat_mean=None)
    page = page_of(tmp_path)
    cells = [line["k-hat (too high for)"] for line in lines_of(page, "k-hat (too high for)")]
    assert any(cell.endswith("unreliable") for cell in cells) == flagged
    assert f"{int(flagged)} of 1 NLLs are unreliable" in page.text


def test_missing_keys_and_metrics_that_are_new(tmp_path):
    first, second, *_ = configurations(rows(1, SHORT))
    made = result(first)
    for key in ("learning_curve", "provenance"):
        del made[key]
    del made["metrics"]["ess_mean"], made["metrics"]["khat_mean"], made["metrics"]["khat_unreliable"]
    record(tmp_path, first, made=made)
    assert "88.12" in page_of(tmp_path).text
    pruned = {"nll_pruned": 91.234, "nll_unpruned_same_images": 91.0, "nll_pruned_stderr": 0.1}
    record(tmp_path, second, **pruned, reconstruction_error=None, bits_per_pixel=0.1634)
    cells = {line["cell"]: line for line in lines_of(page_of(tmp_path), "pruned NLL")}
    assert cells["1L vae(k=1)"]["pruned NLL"] == "" and cells["1L vae(k=5)"]["pruned NLL"] == "91.23"
    assert {line["reconstruction error"] for line in cells.values()} == {""}
    assert cells["1L vae(k=5)"]["bits per pixel"] == "0.163"


def test_a_model_that_no_table_has_is_listed_with_its_curve(tmp_path):
    config = Config("digits", "once", 1, "power(k=7, p=3)", get_preset("smoke"), latent=2)
    record(tmp_path, config, nll=17.5)
    page = page_of(tmp_path)
    [cell] = lines_of(page, "ESS", "cell")
    assert cell["cell"] == "1L power(k=7, p=3), 2 latent units" and cell["NLL"] == "17.50"
    [curve] = lines_of(page, "after 100 %")
    assert curve["after 100 %"] == "-100.00" and "Table 1: Fixed" in page.text[page.text.index("Not run", 100) :]


ODD = """odd<img src=x onerror=alert(1)>|"`*&_[x](y)'"""


def test_whatever_is_in_a_record_stays_text(tmp_path):
    config = Config(ODD, "once", 1, ODD, replace(SHORT, name=ODD))
    record(tmp_path, config, **{ODD: 1.5})
    path = tmp_path / f"{config.name}.json"
    if "/" in config.name:
        pytest.skip("no such file name")
    assert path.exists()
    text = html(report(tmp_path))
    page = Page(text)
    assert ODD in page.text and "<img src=x" not in text
    assert "<img" not in markdown_page(report(tmp_path)) and "&lt;img src=x" in markdown_page(report(tmp_path))


@pytest.mark.parametrize("text", [ODD, "a | b", "l_alpha(k=50, alpha=0.5)", "*a* `b` <c> [d] \\ e", "_x_", "a\nb"])
def test_escaped_markdown_shows_the_text_itself(text):
    markdown = pytest.importorskip("markdown")
    shown = markdown.markdown(escaped(text))
    assert "".join(ET.fromstring(shown).itertext()) == " ".join(text.split())
    table = markdown_page(Section("t", [Table("x", ("a", "b"), [(text, "c")])]))
    cells = re.findall(r"<td>(.*?)</td>", markdown.markdown(table, extensions=["tables"]))
    assert len(cells) == 2
    assert "".join(ET.fromstring(f"<td>{cells[0]}</td>").itertext()) == " ".join(text.split())


# Figures.


def figure(folder):
    (folder / "figure-3.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "loose.png").write_bytes(b"of no figure")
    about = {"title": "Figure 3: a title", "caption": "what is <shown>", "alt": "said aloud"}
    provenance = result(configurations(rows(1, SHORT))[0])["provenance"]
    (folder / "figure-3.svg.json").write_text(json.dumps(about | {"provenance": provenance}))


def test_figures_are_taken_up_with_their_records(tmp_path):
    figure(tmp_path)
    text = html(report(tmp_path))
    page = Page(text)
    assert "Figure 3: a title" in page.text and "what is <shown>" in page.text and "a processor" in page.text
    assert [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")] == ["said aloud"]
    assert "data:image/svg+xml;base64," in text and "image/png" not in text
    assert "Figure 3: Encoded" not in page.text and "Figure 2: " in page.text
    assert "![said aloud](figure-3.svg)" in markdown_page(report(tmp_path))
    assert "![" not in markdown_page(report(tmp_path, linked=False))


# Charts.


def test_a_chart_puts_points_where_their_numbers_are():
    lines = [charts.Line("a", [(1.0, 90.0), (10.0, 80.0), (100.0, 85.0)], "c0")]
    root = ET.fromstring(charts.line_chart(lines, "k", "nats", 'about "it" <b>', log_x=True, dots=True))
    space = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle")]
    ticks = {t.text: t for t in root.iter(f"{space}text")}
    at = {text: float(tick.get("y")) - 4 for text, tick in ticks.items() if tick.get("text-anchor") == "end"}
    assert [y for _, y in circles] == pytest.approx([at["90"], at["80"], (at["80"] + at["90"]) / 2], abs=0.2)
    assert at["90"] < at["80"]  # SVG counts downwards
    assert [x for x, _ in circles] == pytest.approx([float(ticks[k].get("x")) for k in ("1", "10", "100")], abs=0.2)
    assert circles[1][0] - circles[0][0] == pytest.approx(circles[2][0] - circles[1][0], abs=0.2)
    assert root.get("aria-label") == 'about "it" <b>'


@pytest.mark.parametrize(
    ("low", "high"), [(88.7, 90.6), (0.0, 0.0), (-120.3, -91.2), (1e-4, 3e-4), (5.0, 5.0), (0, 53)]
)
def test_ticks_hold_the_numbers(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_curves_show_ours_and_theirs(tmp_path):
    for config in configurations(rows(1, SHORT, layers=[1])):
        record(tmp_path, config, nll=80.0 + len(config.objective))
    page = page_of(tmp_path)
    curves = {line[""]: line for line in lines_of(page, "k = 50")}
    assert set(curves) == {f"{name}, {whose}" for name in ("VAE", "IWAE") for whose in ("ours", "paper", "BGS16")}
    assert (curves["IWAE, ours"]["k = 5"], curves["IWAE, paper"]["k = 5"]) == ("89.00", "87.61")
    assert (curves["VAE, BGS16"]["k = 1"], curves["VAE, paper"]["k = 50"]) == ("88.71", "90.78")


# What is refused.


def test_a_folder_without_results_is_a_clear_line(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no recorded results: mcobj reproduce and train write them"):
        write_report(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        write_report(tmp_path / "none", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 3, "metrics": {}, "data": {}}'])
def test_a_foreign_file_is_named(tmp_path, text):
    (tmp_path / "foreign-seed0.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"foreign-seed0.json.*move it away"):
        report(tmp_path)


def _leaves(value, path=()):
    """The paths to all that a record holds."""
    if path:
        yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _leaves(part, (*path, key))


def test_whatever_a_record_lacks_or_has_wrong_is_one_line_that_names_the_file_or_harmless(tmp_path):
    config = configurations(rows(1, SHORT))[0]
    pruned = {"nll_pruned": 91.2, "nll_unpruned_same_images": 91.0, "nll_pruned_stderr": 0.1}
    whole = result(config, **pruned) | {"seconds": {"train": 3.0, "evaluate": 1.0}, "engine": "eager", "parameters": 9}
    record(tmp_path, config, made=whole)
    report(tmp_path)
    refused = set()
    for path in _leaves(whole):
        for wrong in (None, "abc", {}, ...):
            made = copy.deepcopy(whole)
            place = made
            for key in path[:-1]:
                place = place[key]
            if wrong is ...:
                del place[path[-1]]
            else:
                place[path[-1]] = wrong
            record(tmp_path, config, made=made)
            try:
                html(report(tmp_path))
            except CheckpointError as error:
                assert config.name in str(error) and "move it away" in str(error)
                refused.add(path[0])
    assert refused >= {"config", "metrics", "data", "provenance", "seconds", "learning_curve"}


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("metrics.nll", 10**400),
        ("metrics.nll", [1.0]),
        ("metrics.khat_unreliable", [1, 2]),
        ("metrics.active_units", 5),
        ("metrics.active_units", [5, 5]),
        ("metrics", {}),
        ("learning_curve", [1e308, -1e308]),
        ("data.files", [{"path": 5, "sha256": "abc", "verified": True}]),
        ("data.files", [{"path": "a", "sha256": None, "verified": True}]),
    ],
)
def test_a_value_that_no_run_records_is_one_line_that_names_the_file(tmp_path, path, wrong):
    config = configurations(rows(1, SHORT))[0]
    made = result(config)
    name, _, key = path.partition(".")
    made[name] = {**made[name], key: wrong} if key else wrong
    record(tmp_path, config, made=made)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(config.name)}\.json is not a .* be: {name}\): move it away"
    ):
        report(tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [('{"metrics": {"nll": 1}, "metrics": {}}', "it has 'metrics' twice"), ("[" * 100_000, "recursion")],
)
def test_a_record_that_says_a_thing_twice_or_never_ends_is_named(tmp_path, text, why):
    (tmp_path / "edited-seed0.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"cannot read .*edited-seed0.json: .*{why}.*move it away"):
        report(tmp_path)


def test_a_data_set_of_ones_own_is_reported(tmp_path):
    config = Config("mine", "once", 1, "vae(k=1)", replace(SHORT, name="own"))
    record(tmp_path, config)
    assert "run on mine" in page_of(tmp_path).text


def test_a_cell_of_several_parts_tells_where_each_was_run(tmp_path):
    config = configurations(rows(1, SHORT))[0]
    made = result(config) | {"engine": "compiled"}
    earlier = made["provenance"] | {"commit": 40 * "e", "date": "2025-01-01T00:00:00+00:00"}
    made["earlier_parts"] = [{"to_pass": 1.5, "engine": "eager", "provenance": earlier}]
    record(tmp_path, config, made=made)
    page = page_of(tmp_path)
    commits = {line["commit"]: line["cells"] for line in lines_of(page, "commit", "machine")}
    assert commits == {10 * "c": "1", 10 * "e": "1"} and "A cell of several parts counts for each." in page.text
    assert f"commit {10 * 'c'}, {10 * 'e'}; 2025-01-01 to 2025-01-02" in page.text
    assert {line["engine"] for line in lines_of(page, "cell", "engine")} == {"eager, compiled"}
    for wrong in ({}, [{}], [{"to_pass": 1.5, "engine": "eager"}], [earlier]):
        record(tmp_path, config, made=made | {"earlier_parts": wrong})
        with pytest.raises(CheckpointError, match=rf"{re.escape(config.name)}.*earlier_parts"):
            report(tmp_path)


def test_an_nll_that_is_not_finite_is_not_called_not_run(tmp_path):
    config = configurations(rows(6, SHORT))[0]
    record(tmp_path, config, nll=None)
    [line] = [line for line in lines_of(page_of(tmp_path), "NLL", "paper") if line["objective"].startswith("median")]
    assert line["NLL"] == "not finite"


def test_a_renamed_result_is_named(tmp_path):
    config = configurations(rows(1, SHORT))[0]
    record(tmp_path, config)
    (tmp_path / f"{config.name}.json").rename(tmp_path / "renamed-seed0.json")
    with pytest.raises(CheckpointError, match=f"is the result of {re.escape(config.name)}"):
        report(tmp_path)


def test_a_curve_is_listed_by_shares_of_its_passes_and_drawn_at_its_passes(tmp_path, monkeypatch):
    [config, *_] = configurations(rows(5, SHORT))
    bounds, drawn = [-200.0 + i for i in range(12)], []
    monkeypatch.setattr(
        "mcobjectives_examples.curves.line_chart", lambda lines, *a, **o: drawn.append(lines) or "<svg/>"
    )
    record(tmp_path, config, made={**result(config), "learning_curve": bounds})
    [line] = lines_of(page_of(tmp_path), "after 100 %")
    shown = [line[f"after {share} %"] for share in (10, 25, 50, 75, 100)]
    assert shown == ["-200.00", "-198.00", "-195.00", "-192.00", "-189.00"]  # passes 1, 3, 6, 9 and 12
    [[curve]] = drawn
    assert curve.points == [(float(i), -201.0 + i) for i in range(2, 13)]  # but for the first tenth


def test_a_capped_cell_is_not_drawn_beside_the_papers(tmp_path):
    for config in configurations(rows(1, SHORT, layers=[1], cap=3)):
        record(tmp_path, config)
    [ours] = [line[""] for line in lines_of(page_of(tmp_path), "k = 3") if line[""].startswith("IWAE")]
    assert ours == "IWAE, ours"
