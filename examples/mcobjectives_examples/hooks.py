"""What a run tells of itself while it works, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

OnProgress = Callable[[str, float, float], None]
"""(what is being done, done, total)."""
Log = Callable[[str, float, int], None]
"""(statistic, value, pass)."""


@dataclass(frozen=True)
class Hooks:
    """What a run calls while it works.

    Args:
        on_progress: told how far the run is: passes of "train", then images of "evaluate".
        stop: asked again and again; once it is true, the run ends with a checkpoint and `Interrupted`.
        note: told how the steps are executed, and why.
        log: told each training statistic after each pass, and the metrics.
    """

    on_progress: OnProgress = lambda what, done, total: None
    stop: Callable[[], bool] = lambda: False
    note: Callable[[str], None] = lambda text: None
    log: Log = lambda statistic, value, step: None


NO_HOOKS = Hooks()


class Interrupted(Exception):
    """The run was asked to stop and has written its checkpoint."""


@contextmanager
def or_interrupted(stop: Callable[[], bool]) -> Iterator[None]:
    """What fails inside once `stop()` is true is `Interrupted`: a Ctrl-C stops a compiler too."""
    try:
        yield
    except Exception:
        if stop():
            raise Interrupted from None
        raise
