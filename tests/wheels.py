"""Distributions as users get them: built, installed into a folder, and run from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MCOBJ = ("-c", "from mcobjectives.cli import main; main()")


def python(
    *arguments: str, sites: tuple[Path, ...] = (), cwd: Path, executable: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Python on these arguments, with nothing on its path but what is installed and the given sites."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sites)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )


def succeeds(*arguments: str, **where: Any) -> str:
    """What `python` prints, if it ends well."""
    done = python(*arguments, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(project: Path, wheels: Path, *kinds: str) -> list[Path]:
    """Build a project's distributions into a folder; without kinds the sdist, and the wheel from it."""
    succeeds("-m", "build", *kinds, "--no-isolation", "--outdir", str(wheels), str(project), cwd=wheels.parent)
    return sorted(wheels.iterdir())


def install(project: Path, place: Path) -> Path:
    """Build the project's wheel and install it into a folder of its own, which is returned."""
    (wheel,) = build(project, place / "wheels", "--wheel")
    return unpack(wheel, place / "site")


def unpack(distribution: Path, site: Path) -> Path:
    """Install a wheel or an sdist, without what it depends on, into a folder."""
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--target", str(site))
    succeeds("-m", "pip", "install", *options, str(distribution), cwd=distribution.parent)
    return site
