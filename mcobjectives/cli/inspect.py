"""Commands that look and do not train: `objectives`, `data`, `check`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from mcobjectives.cli.options import DataDir, Download, Json


def objectives(as_json: Json = False) -> None:
    """List the installed objectives: from which package, their parameters, the gradient estimators they allow."""
    from rich.markup import escape

    from mcobjectives.catalogue import broken_estimators, catalogue
    from mcobjectives.cli.show import console, errors, grid

    entries = catalogue()
    for problem in broken_estimators():
        errors.print(f"broken: {problem}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    table = grid("objective", "package", "parameters", "estimators")
    for entry in entries:
        if entry.error:
            table.add_row(entry.name, entry.package, f"[red]broken: {escape(entry.error)}[/]", "")
        else:
            table.add_row(entry.name, entry.package, entry.parameters, " ".join(entry.estimators))
    console.print(table)
    console.print('Use one as: mcobj train --objective "power(k=50, p=3)", or mcobjectives.get_objective("power")(p=3)')


def data(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Only these: digits, mnist, binarized_mnist, omniglot, fashion_mnist.", show_default="all"),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    as_json: Json = False,
) -> None:
    """List the data sets: what is there, where, and whether it is verified by an official checksum.

    Every file that is there is read, once to the end. With --download the missing ones are fetched first.
    """
    from rich.markup import escape

    from mcobjectives.cli.show import console, grid
    from mcobjectives_examples.datasets import status, vouched
    from mcobjectives_examples.downloads import data_dir as folder_of
    from mcobjectives_examples.sources import DATASETS

    if as_json or download:  # whose own bars show how far it is
        rows = status(data_dir, names, download=download)
    else:
        with console.status("reading and checking the data sets"):
            rows = status(data_dir, names)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1, default=str))
    else:
        table = grid("data set", "there", "verified", "images", "about")
        for row in rows:
            images = "" if row.train is None else f"{row.train:,} + {row.test:,}"
            unknown = vouched(row.source, [None]) if row.present else ""
            verified = {True: "yes", False: "[red]NO[/]", None: unknown}
            about = row.message if row.message and (row.present or download) else row.source
            table.add_row(row.name, "yes" if row.present else "no", verified[row.verified], images, escape(about))
        console.print(table)
        folder = escape(str(folder_of(data_dir)))
        console.print(f"Data folder: {folder} (--data-dir or MCOBJECTIVES_DATA choose another)")
        for row in rows:
            if not row.present and not download:
                files = ", ".join(file.path for file in DATASETS[row.name].files)
                console.print(f"{row.name}: mcobj data {row.name} --download fetches it there, as {files}")
    if download and any(row.message for row in rows):
        raise typer.Exit(1)


def check(
    objective: Annotated[
        str, typer.Argument(help='"mypackage.module:MyObjective(k=8)", or the spec of an installed objective.')
    ],
) -> None:
    """Run the conformance kit on an objective: its identities, derivatives, and estimators against exact answers."""
    from rich.markup import escape

    from mcobjectives.cli.show import console, errors
    from mcobjectives.specs import import_objective, parse_objective
    from mcobjectives.testing import check_objective

    sys.path.insert(0, os.getcwd())  # as `python -m` does: one's own module need not be installed
    name = objective.partition("(")[0]
    found = import_objective(objective) if ":" in name else parse_objective(objective)
    with errors.status(escape(f"checking {found!r}")):
        findings = check_objective(found)
    console.print(f"{found!r} passes.", markup=False)
    for finding in findings:
        if finding.passed is None:
            console.print(f"Not checked: {finding.property}: {finding.message}", markup=False, highlight=False)
