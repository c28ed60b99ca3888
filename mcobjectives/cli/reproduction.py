"""The glue between the commands and the examples package: progress, estimates, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from mcobjectives.cli.show import CellBar, console, duration, errors, grid, interruptible, progress
from mcobjectives.specs import parse_objective
from mcobjectives_examples import checkpoints, drawing, figures, files, render
from mcobjectives_examples.cells import (
    Place,
    passes,
    passes_done,
    recorded,
    run_cell,
    trainer_of,
)
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import load
from mcobjectives_examples.engine import pick_device, require_engine
from mcobjectives_examples.estimates import estimate_seconds
from mcobjectives_examples.evaluating import evaluate_model, test_images
from mcobjectives_examples.findings import findings
from mcobjectives_examples.logs import Log, require_tensorboard, tensorboard_log
from mcobjectives_examples.models import paper_model
from mcobjectives_examples.paper import paper
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.side_by_side import run_side_by_side
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.stacking import pays, stacks, train_together
from mcobjectives_examples.tables import Row, configurations, protocols, rows, with_results
from mcobjectives_examples.training import Interrupted


def reproduce_tables(
    number: str,
    preset: Preset,
    *,
    cap: int | None,
    dataset: str | None,
    binarisation: str | None,
    layers: Sequence[int] | None,
    seeds: Sequence[int],
    out: Path,
    data_dir: Path | None,
    download: bool,
    device: str,
    engine: str,
    run: bool,
    form: str,
    stack: bool,
    jobs: int,
    tensorboard: Path | None,
) -> None:
    """Run and print a table, or all of them (as JSON: one object, or a list of them)."""
    if stack and jobs > 1:
        raise ValueError("--stack trains cells as one model and --jobs in processes of their own: give one of them")
    place = Place(out, pick_device(device), data_dir, engine, tensorboard)
    require_engine(engine)
    tables: list[tuple[str, list[list[Row]], list[Config]]] = []  # the rows by one protocol or two, and all their cells
    for n in list(paper()["tables"]) if number == "all" else [number]:
        found = [
            rows(n, preset, seeds=seeds, cap=cap, dataset=dataset, binarisation=protocol, layers=layers)
            for protocol in protocols(n, dataset, binarisation, strict=number != "all")
        ]
        if found[0]:
            tables.append((n, found, configurations([row for by_protocol in found for row in by_protocol])))
    if not tables:
        what = "no table has" if number == "all" else f"table {number} has no"
        raise ValueError(f"{what} rows of {', '.join(map(str, layers or []))} layers")
    datasets: dict[str, Dataset] = {}
    for _, _, configs in tables if run else []:  # what is amiss with any table shows before the first is run
        name = configs[0].dataset
        if name not in datasets:
            datasets[name] = load(name, data_dir, download=download)
        passes_done(out, _missing(configs, datasets[name], out), datasets[name].checksum)
    records = []
    for n, found, configs in tables:
        loaded = datasets.get(configs[0].dataset)
        if loaded is not None:
            run_all(configs, loaded, place, jobs=jobs, stack=stack)
        for by_protocol in found:
            title = render.title(n, by_protocol)
            done = with_results(by_protocol, out, None if loaded is None else loaded.checksum)
            if form == "json":
                records.append(render.as_json(title, done, findings(done)))
            else:
                _print_table(title, done, form)
    if form == "json":
        print(json.dumps(records if number == "all" or binarisation == "both" else records[0], indent=1))


def run_all(
    configs: Sequence[Config], dataset: Dataset, place: Place, *, jobs: int = 1, stack: bool = False
) -> list[dict[str, Any]]:
    """The results of all configurations, with bars; Ctrl-C writes a checkpoint and exits with 130.

    With `stack`, those that differ in seed or binarisation alone are trained together, where that pays. With `jobs`
    above one, so many are at work at once.
    """
    require_tensorboard(place.tensorboard)
    missing = _missing(configs, dataset, place.out)
    if missing:
        _announce(passes_done(place.out, missing, dataset.checksum), dataset, place.device)
    noted: set[str] = set()

    def note(text: str) -> None:
        if text not in noted:
            errors.print(text, markup=False, highlight=False)
        noted.add(text)

    with interruptible() as stop, progress() as bars:
        whole = bars.add_task("cells", total=len(configs), completed=len(configs) - len(missing), unit="cells")
        cells = {config: CellBar(bars, f"{config.layers}L {config.objective} seed {config.seed}") for config in missing}

        def on_progress(config: Config, what: str, done: float, total: float) -> None:
            cells[config].update(what, done, total)

        def on_done(config: Config) -> None:
            cells[config].close()
            bars.advance(whole)

        hooks: dict[str, Any] = {"on_progress": on_progress, "on_done": on_done, "stop": stop, "note": note}
        try:
            if jobs > 1:
                run_side_by_side(missing, place, jobs, **hooks)
            else:
                together = _stacks(missing, place.device) if stack and missing else {}
                _run_in_turn(missing, dataset, place, together, **hooks)
        except Interrupted:
            errors.print(
                f"interrupted: the checkpoint is in {place.out}; the same command goes on from there", markup=False
            )
            raise typer.Exit(130) from None
    return [result for config in configs if (result := recorded(place.out, config, dataset.checksum)) is not None]


def _missing(configs: Sequence[Config], dataset: Dataset, out: Path) -> list[Config]:
    return [config for config in configs if recorded(out, config, dataset.checksum) is None]


def _run_in_turn(
    configs: Sequence[Config],
    dataset: Dataset,
    place: Place,
    together: dict[Config, list[Config]],
    *,
    on_progress: Callable[[Config, str, float, float], None],
    on_done: Callable[[Config], None],
    stop: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    options: dict[str, Any] = {"engine": place.engine, "note": note}
    for config in configs:
        update = partial(on_progress, config)
        with ExitStack() as logs:

            def log_of(config: Config) -> Log | None:
                return logs.enter_context(tensorboard_log(place.tensorboard, config.name))

            if config in together:
                trainers = [
                    trainer_of(c, dataset, place.out, place.device, log=log_of(c), **options) for c in together[config]
                ]
                train_together(trainers, passes(update), stop)
            log = log_of(config)
            run_cell(config, dataset, place.out, place.device, log=log, on_progress=update, stop=stop, **options)
        on_done(config)


def _stacks(configs: Sequence[Config], device: torch.device) -> dict[Config, list[Config]]:
    """The groups to be trained together, each by its first configuration."""
    groups = [group for group in stacks(configs) if len(group) > 1]
    if not groups:
        errors.print("nothing to stack: no two cells differ in seed or binarisation alone; try --seeds 3")
    paying = [group for group in groups if pays(parse_objective(group[0].objective).k, device)]
    if len(paying) < len(groups):
        errors.print("on a CPU only cells of k = 1 are stacked: the others are trained one by one")
    return {group[0]: group for group in paying}


def _announce(done: Mapping[Config, int], dataset: Dataset, device: torch.device) -> None:
    with errors.status("timing a few steps"):
        seconds = estimate_seconds(done, dataset, device)
    preset = next(iter(done)).preset
    begun = sum(passes > 0 for passes in done.values())
    going_on = f", {begun} begun" if begun else ""
    most = "at most about" if device.type == "cpu" else "about"  # these steps were not compiled
    advice = "" if seconds < 600 or preset.name == "smoke" else "; --preset smoke would take minutes"
    errors.print(
        f"{render.counted(len(done), 'cell')} to run with preset {preset.name} "
        f"({render.counted(preset.passes, 'pass')}) on {device}{going_on}: {most} {duration(seconds)}{advice}"
    )


def _print_table(title: str, done: Sequence[Row], form: str) -> None:
    found = findings(done)
    if form == "markdown":
        print(render.markdown(title, done, found))
    else:
        shown = grid(*render.HEADER, title=title, right=tuple(range(2, len(render.HEADER))))
        for row in done:
            shown.add_row(*render.cells(row))
        console.print(shown)
        console.print(render.caption(done), style="dim")
        colours = {"holds": "green", "does not hold": "red"}
        for finding in found:
            verdict = f"[{colours.get(finding.verdict, 'yellow')}]{finding.verdict}[/]"
            console.print(f"{verdict}: {finding.claim}: {finding.figures}", highlight=False)
        if any(finding.verdict == "within noise" for finding in found):
            console.print(render.noise_note(), style="dim")


def print_metrics(name: str, result: dict[str, Any], out: Path | None) -> None:
    """One model's evaluation as a table."""
    shown = grid("metric", "value", right=(1,))
    for key, value in result["metrics"].items():
        shown.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(name, markup=False, highlight=False)
    console.print(shown)
    if out is not None:
        console.print(f"Recorded in {out / name}.json, with a checkpoint beside it.", markup=False)


def evaluate_checkpoint(
    path: Path, k: int, images: int | None, data_dir: Path | None, download: bool, device: str
) -> tuple[str, dict[str, Any]]:
    """Rebuild a checkpoint's model and data, and evaluate it anew."""
    chosen_device = pick_device(device)
    state = checkpoints.load(path, None, chosen_device)
    with checkpoints.readable(path):
        record, passes = json.loads(state["config"]), state["position"]["epoch"]
        config = Config.from_dict(record, nll_k=k, test_images=images)
    dataset = load(config.dataset, data_dir, download=download)
    if dataset.checksum != record["data_sha256"]:
        raise checkpoints.CheckpointError(f"{path} was trained on other data than {config.dataset} in this data folder")
    with checkpoints.readable(path):
        model = paper_model(config.layers, dataset.train.mean(0), config.latent).to(chosen_device)
        model.load_state_dict(state["model"])
    if passes < config.preset.passes:
        errors.print(f"not trained to its end: {passes} of {render.counted(config.preset.passes, 'pass')}")
    with interruptible("after this batch") as stop, progress() as bars:
        bar = CellBar(bars, config.name)
        try:
            metrics = evaluate_model(model, test_images(dataset, config), config.preset, bar.update, stop)
        except Interrupted:
            raise typer.Exit(130) from None
        bar.close()
    return config.name, {"config": record, "metrics": metrics}


def draw_figure(
    number: int,
    preset: Preset,
    out: Path,
    *,
    cap: int | None,
    dataset: str | None,
    seed: int,
    runs: Path,
    data_dir: Path | None,
    download: bool,
    device: str,
    as_json: bool,
) -> None:
    """Train what a figure misses, draw it, and say where it is and what it shows."""
    drawing.require_drawing(out)
    chosen_device = pick_device(device)
    configs = figures.configurations(number, preset, dataset=dataset, seed=seed, cap=cap)
    loaded = load(configs[0].dataset, data_dir, download=download)
    if number == 2:
        figures.test_labels(loaded.name, data_dir)  # a missing file shows before the work
    try:
        for config in configs:
            recorded(runs, config, loaded.checksum)  # a checkpoint of other settings than the record's is not made
        done = passes_done(runs, configs, loaded.checksum)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(str(error).replace("--out", "--runs")) from error
    files.require_writable(out)
    untrained = {config: passes for config, passes in done.items() if passes < config.preset.passes}
    if untrained:  # a figure needs no NLL
        quick = {replace(c, preset=replace(c.preset, nll_k=1)): passes for c, passes in untrained.items()}
        _announce(quick, loaded, chosen_device)
    models = []
    with interruptible() as stop, progress() as bars:
        for config in configs:
            bar = CellBar(bars, config.name)
            try:
                models.append(
                    figures.trained(
                        config, loaded, runs, chosen_device, on_progress=bar.update, stop=stop, note=errors.print
                    )
                )
            except Interrupted:
                errors.print(f"interrupted: the checkpoint is in {runs}; the same command goes on", markup=False)
                raise typer.Exit(130) from None
            bar.close()
    content = figures.content(number, configs, models, loaded, data_dir)
    record = drawing.save(out, content, configs, loaded)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        console.print(f"{content.title}. {content.caption}", markup=False, highlight=False)
        console.print(f"Wrote {out}.", markup=False, highlight=False, soft_wrap=True)
