import os

import pytest
import torch
from runs import CPU, TINY, until

from mcobjectives_examples.config import Config
from mcobjectives_examples.datasets import load
from mcobjectives_examples.hooks import NO_HOOKS
from mcobjectives_examples.training import Interrupted, Trainer

# A console reads its width when it is made: one that is set outside, as by pytest-xdist, would stay through every test.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)


@pytest.fixture(scope="session")
def digits():
    """The small data set that needs no download; nobody changes it."""
    return load("digits")


@pytest.fixture
def trainer(digits, tmp_path):
    def build(name="run.pt", preset=TINY, engine="eager", hooks=NO_HOOKS, **changes):
        settings = {"dataset": "digits", "binarisation": "once", "layers": 1, "objective": "iwae(k=3)"}
        return Trainer(
            Config(**settings | changes, preset=preset), digits, CPU, tmp_path / name, engine=engine, hooks=hooks
        )

    return build


@pytest.fixture
def saved(trainer):
    """A run, interrupted with a checkpoint."""
    run = trainer(hooks=until(2))
    with pytest.raises(Interrupted):
        run.run()
    return run


@pytest.fixture
def x():
    """Five data points of three numbers, for the models of `kit_models`."""
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
