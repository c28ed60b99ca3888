"""Several cells at once, each in a process of its own with its share of the threads.

A step's products are too small to keep many threads busy: a CPU gets more done by cells beside each other.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import torch

from mcobjectives.messages import one_line
from mcobjectives_examples.cells import Place, cell_lock, run_cell
from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import load
from mcobjectives_examples.hooks import Hooks, Interrupted, OnProgress
from mcobjectives_examples.logs import tensorboard_log
from mcobjectives_examples.training import TrainingError

_SECONDS_BETWEEN_REPORTS = 0.2


@dataclass(frozen=True)
class _Report:
    doing: str
    done: float
    total: float


@dataclass(frozen=True)
class _Note:
    text: str


@dataclass(frozen=True)
class _End:
    error: str = ""
    recorded: bool = False


def run_side_by_side(
    configs: Sequence[Config],
    place: Place,
    jobs: int,
    hooks: Hooks,
    *,
    progress_of: Callable[[Config], OnProgress],
    on_done: Callable[[Config], None],
) -> None:
    """Record all cells, `jobs` at a time; a second stage begins when its first one is recorded.

    Each tells its progress to its own `progress_of`.

    Raises `Interrupted`, each cell that was at work with a checkpoint, once `stop()` is true, and `TrainingError` where
    a cell fails: the others then stop as if interrupted.
    """
    jobs = min(jobs, len(configs))
    threads = max(1, torch.get_num_threads() // max(1, jobs))
    waiting, working = list(configs), dict[Connection, tuple[Config, BaseProcess]]()
    errors: list[str] = []
    stopping = False
    try:
        while working or (waiting and not stopping):
            while not stopping and len(working) < jobs and (config := _next(waiting, working.values())):
                waiting.remove(config)
                connection, process = _start(config, place, threads)
                working[connection] = config, process
            for ready in wait(list(working), timeout=_SECONDS_BETWEEN_REPORTS):
                connection = cast("Connection", ready)
                config, process = working[connection]
                match _receive(connection, config, process):
                    case _Report(doing, done, total):
                        progress_of(config)(doing, done, total)
                    case _Note(text):
                        hooks.note(text)
                    case _End(error, recorded):
                        process.join()
                        del working[connection]
                        errors += [error] if error else []
                        if recorded:
                            on_done(config)
            if not stopping and (errors or hooks.stop()):
                stopping = True
                for connection in working:
                    with suppress(OSError):  # it has just ended
                        connection.send(None)
    finally:
        for _, process in working.values():  # after a second Ctrl-C: checkpoints are whole at any time
            process.kill()
    if errors:
        raise TrainingError(errors[0])
    if stopping:
        raise Interrupted


def _next(waiting: Sequence[Config], working: Collection[tuple[Config, BaseProcess]]) -> Config | None:
    unfinished = {config.name for config in waiting} | {config.name for config, _ in working}
    return next((c for c in waiting if c.after is None or c.first_stage_name not in unfinished), None)


def _start(config: Config, place: Place, threads: int) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")  # a copy of a process with threads of its own would hang
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, config, place, threads), name=config.name)
    with _without_interrupts():  # which it inherits, with its compilers: Ctrl-C reaches every process
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _without_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it unblocks the signal when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive(connection: Connection, config: Config, process: BaseProcess) -> object:
    try:
        return connection.recv()
    except (EOFError, ConnectionError):  # the latter if it died before it heard a word
        process.join()
        why = "was killed, as where memory is short" if process.exitcode == -9 else f"ended with {process.exitcode}"
        return _End(f"{config.name}: its process {why}: the same command goes on, or try fewer --jobs")


def _work(connection: Connection, config: Config, place: Place, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells the others
    torch.set_num_threads(threads)
    reported = -1.0, ""

    def report(doing: str, done: float, total: float) -> None:
        nonlocal reported
        now = time.monotonic()
        if doing != reported[1] or now - reported[0] > _SECONDS_BETWEEN_REPORTS:
            reported = now, doing
            connection.send(_Report(doing, done, total))

    def stop() -> bool:
        return connection.poll()  # a word from the first process, or its death

    try:
        with cell_lock(place.out, config), tensorboard_log(place.tensorboard, config.name) as log:
            hooks = Hooks(on_progress=report, stop=stop, note=lambda text: connection.send(_Note(text)), log=log)
            run_cell(config, load(config.dataset, place.data_dir), place, hooks)
        end = _End(recorded=True)
    except (Interrupted, ConnectionError):  # the latter if the first process is gone; the last checkpoint stands
        end = _End()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        end = _End(f"{config.name}: {one_line(error)}")
    with suppress(ConnectionError):
        connection.send(end)
