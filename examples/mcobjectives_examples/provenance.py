"""Where a number comes from: versions, commit and machine, to be recorded beside it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mcobjectives_examples.words import counted


def provenance(**machine: Any) -> dict[str, Any]:
    """What a recorded result says of its surroundings, as they are when it is begun; no host name and no path.

    `machine` is what is to be said of the machine besides, or otherwise than of this process.
    """
    return {
        "versions": {name: version(name) for name in ("mcobjectives", "torch", "torchvision", "numpy")}
        | {"python": platform.python_version()},
        "commit": commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
        | machine,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def with_part(earlier: Sequence[dict[str, Any]], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run with the one at work, which is one with the last where only the date differs."""
    if earlier and _undated(earlier[-1]) == _undated(now):
        return [*earlier[:-1], now | {"provenance": earlier[-1]["provenance"]}]
    return [*earlier, now]


def _undated(part: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return part["engine"], {key: value for key, value in (part["provenance"] or {}).items() if key != "date"}


def provenances(result: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Where the parts of a result were made, in their order, None where that is not known."""
    return [*(part["provenance"] for part in result.get("earlier_parts", [])), result.get("provenance")]


def commit() -> str | None:
    """The checkout's commit, marked "+changes" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        # The parent of an installed package may be somebody else's repository.
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changed else "")


def _git(folder: Path, *command: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *command], check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


def cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_name(record: dict[str, Any]) -> str:
    """A recorded machine's GPU, or its CPU and how many threads of it."""
    return record.get("gpu") or f"{record['cpu']}, {counted(record['threads'], 'thread')}"


def short_commit(commit: str | None) -> str:
    """A recorded commit, marked where files differed from it."""
    return (commit[:10] + ("+changes" if "+" in commit else "")) if commit else "unknown"
