import pytest

from mcobjectives_examples.datasets import load


@pytest.fixture(scope="session")
def digits():
    """The small data set that needs no download; nobody changes it."""
    return load("digits")
