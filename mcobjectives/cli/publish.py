"""Commands that show what was trained: `figure`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mcobjectives.cli.options import DataDir, Dataset, Device, Download, Json, Overrides, PresetName, path


def figure(
    number: Annotated[
        int,
        typer.Argument(help="2: latent space; 3: encoded and decoded; 4: the same in grey; 5: the manifold."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, help="File to draw, .png or .svg.", show_default="figure-NUMBER.png in --runs"),
    ] = None,
    preset: PresetName = "smoke",
    dataset: Dataset = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the models.")] = 0,
    runs: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder of checkpoints: what is not there is trained.", show_default="runs/PRESET"
        ),
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw one of the paper's figures from trained models, and train those that are missing.

    Beside the file a record FILE.json tells what it shows: models, numbers, data, versions. `mcobj report` takes it up.
    """
    from mcobjectives.cli.models import draw_figure
    from mcobjectives_examples.presets import configured

    chosen, cap = configured(preset, overrides or [])
    folder = runs or Path("runs") / chosen.name
    draw_figure(
        number,
        chosen,
        out or folder / f"figure-{number}.png",
        cap=cap,
        dataset=dataset,
        seed=seed,
        runs=folder,
        data_dir=data_dir,
        download=download,
        device=device,
        as_json=as_json,
    )


def report(
    folder: Annotated[
        Path, typer.Argument(parser=path, help="A folder of results, as mcobj reproduce and train write them.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder to write report.html and report.md to.", show_default="the folder of results"
        ),
    ] = None,
) -> None:
    """Write all that a folder holds as one page of HTML that needs no network, and the same in Markdown.

    Tables beside the paper's numbers, findings with their evidence, curves, figures, how far each NLL can be trusted,
    what was not run, configuration and provenance.
    """
    from mcobjectives.cli.show import console
    from mcobjectives_examples.report import write_report

    for written in write_report(folder, out or folder):
        console.print(f"Wrote {written}.", markup=False, highlight=False, soft_wrap=True)
