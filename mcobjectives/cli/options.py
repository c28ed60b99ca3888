"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def path(text: str | Path) -> Path:
    """A path that is typed; an empty one would be the current folder."""
    if text == "":
        raise typer.BadParameter("an empty path: name a folder or a file")
    return Path(text)


Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else, on stdout.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        parser=path,
        help="Where the data sets are; else $MCOBJECTIVES_DATA, else a cache folder of yours.",
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch a missing data set from its official address.")]
Device = Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", ...; "auto" takes CUDA where there is one.')]
Engine = Annotated[
    str,
    typer.Option(
        help='"eager", "compiled" (the whole step by torch.compile), "cuda-graph", or "auto": a CUDA graph on a GPU, '
        "compiled on a CPU where that saves time."
    ),
]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        help="smoke (seconds a cell), short (table 1's 1L rows in 1.5 hours on two cores, --jobs 2), "
        "paper (3280 passes) or bgs16.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Change the preset: passes, batch_size, nll_k, test_images, backward_samples; "
        "k=N caps the samples of every objective. Repeatable.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(help="digits (built in), mnist, binarized_mnist, omniglot, fashion_mnist; default: the paper's."),
]
Binarisation = Annotated[
    str | None,
    typer.Option(
        help="once (at the start of training), epoch (every pass), fixed (the data set is binary); reproduce: both "
        "(a table of once and one of epoch)."
    ),
]
Out = Annotated[
    Path, typer.Option(parser=path, help="Folder of results and checkpoints: what is there is not run again.")
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="highest (float32), medium (TF32 on a GPU, bfloat16 products on a CPU, accumulated in float32), mixed "
        "(medium, and bfloat16 where no gradient is taken), or bf16 (bfloat16 products); default: the preset's."
    ),
]
Tensorboard = Annotated[
    Path | None,
    typer.Option(parser=path, help="Write TensorBoard logs to this folder, each run to a folder of its own in it."),
]
