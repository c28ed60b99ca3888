"""What the terminal shows: tables, and progress with the time left."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console()
errors = Console(stderr=True)


def grid(*columns: str, title: str | None = None, right: tuple[int, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    return table


def progress() -> Progress:
    """Bars on stderr, so that stdout stays for results."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
    )


class CellBar:
    """One bar for the cell at work: passes while it trains, test images while it is evaluated."""

    def __init__(self, bars: Progress, name: str) -> None:
        self.bars, self.name, self.doing = bars, name, ""
        self.task: TaskID | None = None

    def update(self, what: str, done: float, total: float) -> None:
        if what != self.doing:
            self.close()
            unit = "passes" if what == "train" else "images"
            self.task = self.bars.add_task(f"{what} {self.name}", total=total, unit=unit)
            self.doing = what
        assert self.task is not None
        self.bars.update(self.task, completed=done)

    def close(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None


@contextmanager
def interruptible(how: str) -> Iterator[Callable[[], bool]]:
    """A function that turns true at the first Ctrl-C; a second one interrupts at once."""
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        errors.print(f"stopping {how} (Ctrl-C again stops at once)")

    before: Any = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 2):.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172_800 else f"{seconds / 86400:.0f} days"
