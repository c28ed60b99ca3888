"""What the commands do with single models: evaluate a checkpoint, print its metrics, draw figures."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcobjectives.cli.running import announce, running
from mcobjectives.cli.show import CellBar, console, errors, grid
from mcobjectives_examples import checkpoints, drawing, figures, files
from mcobjectives_examples.cells import cell_lock, passes_done, recorded
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import load
from mcobjectives_examples.devices import pick_device
from mcobjectives_examples.evaluating import evaluate_model, test_images
from mcobjectives_examples.hooks import Hooks
from mcobjectives_examples.models import paper_model
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.provenance import provenance
from mcobjectives_examples.words import counted


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
    """Rebuild a checkpoint's model and data, and evaluate it anew; the configuration is that of this evaluation."""
    chosen_device = pick_device(device)
    state = checkpoints.load(path, None, chosen_device)
    with checkpoints.readable(path):
        record = json.loads(state["config"])
        checksum, config = record["data_sha256"], Config.from_dict(record, nll_k=k, test_images=images)
        passes = checkpoints.passes_of(state, config.preset.passes)
    dataset = load(config.dataset, data_dir, download=download)
    if dataset.checksum != checksum:
        raise checkpoints.CheckpointError(f"{path} was trained on other data than {config.dataset} in this data folder")
    with checkpoints.readable(path):
        model = paper_model(config.layers, dataset.train.mean(0), config.latent).to(chosen_device)
        model.load_state_dict(state["model"])
    if passes < config.preset.passes:
        errors.print(f"not trained to its end: {passes} of {counted(config.preset.passes, 'pass')}")
    with running(how="after this batch") as (stop, bars):
        bar = CellBar(bars, config.name)
        hooks = Hooks(on_progress=bar.update, stop=stop)
        metrics = evaluate_model(model, test_images(dataset, config), config.preset, hooks)
        bar.close()
    return config.name, {"config": config.to_dict(checksum), "passes_done": passes, "metrics": metrics}


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
    if figures.figure(number).labelled:
        figures.test_labels(loaded.name, data_dir)  # a missing file shows before the work
    for config in configs:
        # A checkpoint of other settings than the record's is not made.
        recorded(runs, config, loaded.checksum, "--runs")
    done = passes_done(runs, configs, loaded.checksum, "--runs")
    files.require_writable(out)
    surroundings = provenance()
    untrained = {config: passes for config, passes in done.items() if passes < config.preset.passes}
    if untrained:  # a figure needs no NLL
        quick = {replace(c, preset=replace(c.preset, nll_k=1)): passes for c, passes in untrained.items()}
        announce(quick, loaded, chosen_device)
    models = []
    with running(f"the checkpoint is in {runs}; the same command goes on") as (stop, bars):
        for config in configs:
            bar = CellBar(bars, config.name)
            hooks = Hooks(on_progress=bar.update, stop=stop, note=errors.print)
            with cell_lock(runs, config) if config in untrained else nullcontext():
                models.append(figures.trained(config, loaded, runs, chosen_device, hooks))
            bar.close()
    content = figures.content(number, configs, models, loaded, data_dir)
    record = drawing.save(out, content, configs, loaded, surroundings)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        console.print(f"{content.title}. {content.caption}", markup=False, highlight=False)
        console.print(f"Wrote {out}.", markup=False, highlight=False, soft_wrap=True)
