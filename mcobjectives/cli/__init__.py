"""`mcobj`: the command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from mcobjectives.cli import inspect, publish, run
from mcobjectives.messages import one_line

app = typer.Typer(
    name="mcobj",
    help="Monte Carlo objectives for latent-variable models: train, evaluate, and reproduce the paper's tables.",
    epilog="Start with: mcobj reproduce --table 1 --dataset digits --preset smoke",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run.reproduce)
app.command()(run.train)
app.command()(run.evaluate)
app.command()(publish.figure)
app.command()(publish.report)
app.command()(inspect.objectives)
app.command()(inspect.data)
app.command()(inspect.check)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mcobjectives {version('mcobjectives')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run `mcobj`; a failure is one line on stderr (MCOBJ_TRACEBACK=1 shows where an expected one came from)."""
    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # one that has no ± or é shows a ?
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(prog_name="mcobj", standalone_mode=False) or 0)
    except Exception as error:
        if hasattr(error, "format_message"):  # of the parser, whose kind depends on typer's version
            _misused(error)
        if interrupted:  # libraries turn a Ctrl-C while they are imported into errors of their own
            _end("interrupted", 130)
        expected = isinstance(error, ValueError | RuntimeError | OSError | ImportError | AssertionError)
        if not expected or os.environ.get("MCOBJ_TRACEBACK"):
            raise
        _end(str(error) if isinstance(error, AssertionError) else one_line(error), 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)


def _misused(error: Any) -> NoReturn:
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)  # the help, or nothing where typer has shown it already
        sys.exit(error.exit_code)
    where = error.ctx.command_path if error.ctx else "mcobj"
    _end(f"{one_line(message).rstrip('.')}: see {where} --help", error.exit_code)


def _end(message: str, status: int) -> NoReturn:
    print(f"mcobj: {message}", file=sys.stderr)
    sys.exit(status)
