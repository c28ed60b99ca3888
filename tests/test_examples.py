"""The small scripts under examples/ do what they say: they learn."""

import math
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
UNIFORM = 64 * math.log(2)  # nats of an image of 64 pixels under a model that knows nothing


@pytest.mark.parametrize("script", ["pyro_vae.py", "pyro_vimco.py"])
def test_a_pyro_program_learns_the_digits(script, monkeypatch, capsys):
    pytest.importorskip("pyro")
    monkeypatch.setattr(sys, "argv", [script, "--epochs", "10"])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    early, late = map(float, re.findall(r"test NLL \(IWAE, k = 500\) ([\d.]+)", capsys.readouterr().out))
    assert late < early < UNIFORM and late < 25
