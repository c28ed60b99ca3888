"""What goes to the package index: built twice alike, whole, typed, and light to import."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest
from wheels import ROOT, build, python, succeeds, unpack

pytestmark = pytest.mark.slow

NOT_SOURCES = shutil.ignore_patterns(".git", ".venv*", "venv", "runs", "dist", "build", "/site", "*cache*")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> list[Path]:
    """The wheel and the sdist: the sdist is built first, and the wheel out of it."""
    return build(ROOT, tmp_path_factory.mktemp("package") / "dist")


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory) -> Path:
    """The interpreter of a virtual environment with the wheel; what it depends on comes from this one."""
    place = tmp_path_factory.mktemp("consumer") / "venv"
    venv.create(place, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    unpack(next(d for d in distributions if d.suffix == ".whl"), packages)
    # A path file of a path file is not read, so an editable install of the library does not come along.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return place / ("Scripts" if os.name == "nt" else "bin") / "python"


def digests(files: list[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_it_builds_reproducibly(distributions, tmp_path):
    copy = tmp_path / "elsewhere" / "sources"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCES, copy_function=shutil.copy)  # new times, another folder
    assert len(distributions) == 2 and digests(build(copy, tmp_path / "dist")) == digests(distributions)


def test_the_index_takes_it(distributions, tmp_path):
    pytest.importorskip("twine")
    output = succeeds("-m", "twine", "check", "--strict", *map(str, distributions), cwd=tmp_path)
    assert output.count("PASSED") == 2


def test_the_sdist_installs_and_its_tests_are_found(distributions, tmp_path):
    sdist = next(d for d in distributions if d.name.endswith(".tar.gz"))
    site = unpack(sdist, tmp_path / "site")
    assert (site / "mcobjectives" / "py.typed").exists() and (site / "mcobjectives_examples" / "py.typed").exists()
    shutil.unpack_archive(sdist, tmp_path)
    sources = tmp_path / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(sources / "mcobjectives")
    found = succeeds("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", sites=(site,), cwd=sources)
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} <= {
        Path(word).name for word in found.replace(":", " ").split()
    }


CONSUMER = """
    from dataclasses import dataclass

    import torch
    from torch import Tensor, nn
    from torch.distributions import Distribution, Independent, Normal
    from typing_extensions import assert_type

    from mcobjectives import IWAE, MIWAE, VAE, BoundObjective, Model, Objective, Posterior, Split, Weights
    from mcobjectives import Nonesuch  # type: ignore[attr-defined]
    from mcobjectives.evaluation import Evaluation, evaluate
    from mcobjectives.testing import Finding, check_model, check_objective
    from mcobjectives_examples.models import paper_model


    class Gaussian(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)

        def posterior(self, x: Tensor) -> Distribution:
            return Independent(Normal(self.encoder(x), 1.0), 1)

        def log_joint(self, x: Tensor, h: Tensor) -> Tensor:
            return Normal(self.decoder(h), 1.0).log_prob(x).sum(-1) - h.square().sum(-1)


    @dataclass(frozen=True)
    class Largest(Objective):
        k: int = 8
        smooth = False

        def reduce(self, log_w: Tensor) -> Tensor:
            return log_w.amax(0)


    @dataclass(frozen=True)
    class Wrong(Objective):
        k: int = 8

        def reduce(self, log_w: Tensor) -> float:  # type: ignore[override]
            return 0.0


    def halved(objective: Objective, log_w: Tensor) -> Weights:
        g = objective.slopes(log_w)
        return Weights(g, None, 0.5 * g)


    model, x = Gaussian(), torch.randn(4, 3)
    structural: Model = model
    posterior: Posterior = model.posterior(x)
    assert_type(IWAE(k=5, gradient="dreg")(model, x), Tensor)
    assert_type(Largest(k=3, chunk_size=2).bound(model, x), Tensor)
    assert_type(VAE(analytic_kl=True).reduce(x), Tensor)
    assert_type(Split(generative=IWAE(k=6), inference=MIWAE(k1=3, k2=2)).surrogate(model, x), Tensor)
    assert_type(IWAE(k=5).k, int)
    assert_type(IWAE(k=5).weights(x).c, Tensor | None)
    assert_type(halved(IWAE(k=2), x).a, Tensor)
    module: nn.Module = IWAE().bind(model)
    bound = BoundObjective(IWAE(), model)
    assert_type(evaluate(model, x, k=10), Evaluation)
    assert_type(evaluate(model, x, k=10).nll, float)
    assert_type(check_objective(Largest()), list[Finding])
    check_model(paper_model(layers=1, pixel_means=torch.full((4,), 0.5)), x)

    IWAE(samples=5)  # type: ignore[call-arg]
    IWAE(k="5")  # type: ignore[arg-type]
    IWAE(k=5).k = 6  # type: ignore[misc]
    Objective()  # type: ignore[abstract]
"""


def test_a_consumer_sees_the_types(environment, tmp_path):
    """Each `type: ignore` is an error that mypy must report: `--strict` warns of those that are not needed."""
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(textwrap.dedent(CONSUMER))
    strict = ("--strict", "--allow-untyped-calls", "--no-warn-return-any")  # torch.distributions has few types
    found = python("-m", "mypy", *strict, "--python-executable", str(environment), "consumer.py", cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


def test_pyright_sees_them_too(environment, tmp_path):
    """Where it is installed; it honours the same `type: ignore` comments, and checks what mypy lets pass."""
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "consumer.py").write_text(textwrap.dedent(CONSUMER))
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    found = subprocess.run([pyright, "--pythonpath", str(environment)], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


IMPORT_TIMES = """
    import json, sys, time
    import torch
    before = set(sys.modules)
    start = time.process_time()
    import mcobjectives
    bare = time.process_time() - start
    for name in mcobjectives.__all__:
        getattr(mcobjectives, name)
    print(json.dumps([bare, time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_importing_it_adds_little_to_torch(environment, tmp_path):
    """Processor time, so that a busy machine does not count, and the best of three, so that a cold disk does not."""
    runs = [
        json.loads(succeeds("-c", textwrap.dedent(IMPORT_TIMES), executable=str(environment), cwd=tmp_path))
        for _ in range(3)
    ]
    assert min(run[0] for run in runs) < 0.15
    assert min(run[1] for run in runs) < 0.15  # with everything that is loaded at first use
