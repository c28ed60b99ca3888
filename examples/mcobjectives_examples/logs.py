"""TensorBoard logs of runs, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcobjectives_examples.files import OutputError
from mcobjectives_examples.hooks import NO_HOOKS, Log


def require_tensorboard(folder: Path | None) -> None:
    """Raise before any work if TensorBoard logs are wanted and cannot be written."""
    if folder is None:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError('--tensorboard needs: pip install "mcobjectives[tensorboard]"') from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write TensorBoard logs to {folder}: {error}: choose another --tensorboard"
        ) from error


@contextmanager
def tensorboard_log(folder: Path | None, name: str) -> Iterator[Log]:
    """A function that writes to the run's own folder in TensorBoard's, or nowhere."""
    if folder is None:
        yield NO_HOOKS.log
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / name)) as writer:

        def log(statistic: str, value: float, step: int) -> None:
            writer.add_scalar(statistic, value, step)
            writer.flush()

        yield log
