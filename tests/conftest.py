import os

import pytest

from mcobjectives_examples.datasets import load

# A console reads its width when it is made: one that is set outside, as by pytest-xdist, would stay through every test.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)


@pytest.fixture(scope="session")
def digits():
    """The small data set that needs no download; nobody changes it."""
    return load("digits")
