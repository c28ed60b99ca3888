"""Commands that train and evaluate: `reproduce`, `train`, `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mcobjectives.cli.options import (
    Binarisation,
    DataDir,
    Dataset,
    Device,
    Download,
    Engine,
    Json,
    Out,
    Overrides,
    Precision,
    PresetName,
    Tensorboard,
    path,
)


def reproduce(
    table: Annotated[str, typer.Option(help='Number of the paper\'s table, 1 to 10, or "all".')],
    preset: PresetName = "smoke",
    dataset: Dataset = None,
    binarisation: Binarisation = None,
    layers: Annotated[list[int] | None, typer.Option(help="Only rows of so many stochastic layers.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train every cell with so many seeds, from 0 up.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Folder of results and checkpoints: what is there is not run again.",
            show_default="runs/PRESET",
        ),
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    engine: Engine = "auto",
    precision: Precision = None,
    stack: Annotated[
        bool,
        typer.Option(
            "--stack",
            help="Train the seeds of a cell together, as one batched model, where that pays.",
        ),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="So many cells at once, each in a process with its share of the CPU's threads."),
    ] = 1,
    run: Annotated[bool, typer.Option(help="--no-run only renders what is recorded in --out.")] = True,
    as_json: Json = False,
    tensorboard: Tensorboard = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """Train the cells of one of the paper's tables and set them beside the paper's numbers.

    Results are files, one a cell, in --out: a run that was stopped or killed goes on where it was, and a partly run
    table shows which cells are missing.
    """
    from mcobjectives.cli.reproduction import reproduce_tables
    from mcobjectives_examples.cells import Place
    from mcobjectives_examples.devices import pick_device
    from mcobjectives_examples.presets import configured

    chosen, cap = configured(preset, overrides or [], precision)
    reproduce_tables(
        table,
        chosen,
        Place(out or Path("runs") / chosen.name, pick_device(device), data_dir, engine, tensorboard),
        cap=cap,
        dataset=dataset,
        binarisation=binarisation,
        layers=layers,
        seeds=range(seeds),
        download=download,
        stack=stack,
        jobs=jobs,
        run=run,
        form="json" if as_json else "markdown" if as_markdown else "terminal",
    )


def train(
    objective: Annotated[
        str, typer.Option(help='As in "iwae(k=50)" or "power(k=50, p=3, gradient=\'dreg\')".')
    ] = "iwae(k=50)",
    dataset: Annotated[str, typer.Option(help="See: mcobj data.")] = "digits",
    layers: Annotated[int, typer.Option(help="Stochastic layers of the paper's model: 1 or 2.")] = 1,
    preset: PresetName = "smoke",
    binarisation: Binarisation = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order, binarisation and samples.")] = 0,
    out: Out = Path("runs/train"),
    overrides: Overrides = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    engine: Engine = "auto",
    precision: Precision = None,
    tensorboard: Tensorboard = None,
    as_json: Json = False,
) -> None:
    """Train one model with any installed objective, evaluate it, and record both."""
    from mcobjectives.cli.models import print_metrics
    from mcobjectives.cli.running import run_all
    from mcobjectives_examples.cells import Place
    from mcobjectives_examples.config import Config, canonical, capped
    from mcobjectives_examples.datasets import load
    from mcobjectives_examples.devices import pick_device
    from mcobjectives_examples.presets import configured

    chosen, cap = configured(preset, overrides or [], precision)
    spec = canonical(capped(objective, cap))
    protocol = chosen.binarisation_of(dataset) if binarisation is None else binarisation
    config = Config(dataset, protocol, layers, spec, chosen, seed)
    place = Place(out, pick_device(device), data_dir, engine, tensorboard)
    loaded = load(dataset, data_dir, download=download)
    [result] = run_all([config], loaded, place)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_metrics(config.name, result, out)


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (.pt) that mcobj wrote.", exists=True, dir_okay=False)
    ],
    k: Annotated[int, typer.Option(min=1, help="Samples of the importance-weighted estimate of log p(x).")] = 5000,
    images: Annotated[int | None, typer.Option(min=2, help="Evaluate on so many random test images.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a checkpoint: NLL, KL to the posterior, active units, and how far the estimate can be trusted."""
    from mcobjectives.cli.models import evaluate_checkpoint, print_metrics

    name, result = evaluate_checkpoint(checkpoint, k, images, data_dir, download, device)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_metrics(name, result, None)
