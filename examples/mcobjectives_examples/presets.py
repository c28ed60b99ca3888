"""How long and with which optimiser to train: the paper's protocol, the original's, and two shorter ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mcobjectives.arguments import require_choice
from mcobjectives_examples.datasets import default_binarisation
from mcobjectives_examples.precision import require_precision


@dataclass(frozen=True)
class Preset:
    """A training and evaluation protocol.

    `stages` are (passes, learning rate); with `one_cycle` the one stage's rate is the peak of a warm-up over the first
    tenth and a cosine down to zero. `binarisation` overrides the data set's own choice. `backward_samples` is how many
    of an objective's samples are back-propagated, None for all. `nll_k` samples estimate log p(x) at the end, on all
    test images or on a random `test_images` of them, in float32; `precision` is that of training.
    """

    name: str
    about: str
    stages: tuple[tuple[int, float], ...]
    one_cycle: bool = False
    batch_size: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    binarisation: str | None = None
    backward_samples: int | None = None
    precision: str = "highest"
    nll_k: int = 5000
    test_images: int | None = None

    @property
    def passes(self) -> int:
        return sum(passes for passes, _ in self.stages)

    def learning_rate(self, position: float) -> float:
        """The learning rate after `position` passes (a fraction is part of a pass)."""
        if self.one_cycle:
            peak, done = self.stages[0][1], position / self.passes
            warm_up = 0.1
            if done < warm_up:
                return peak * (0.04 + 0.96 * done / warm_up)
            return peak * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
        for passes, rate in self.stages:
            if position < passes:
                return rate
            position -= passes
        return self.stages[-1][1]

    def binarisation_of(self, dataset: str) -> str:
        """How the protocol makes a data set binary."""
        default = default_binarisation(dataset)
        return default if default == "fixed" else self.binarisation or default

    def with_passes(self, passes: int) -> Preset:
        """The same protocol for another number of passes: a one-cycle is stretched, stages are cut off."""
        if passes < 1:
            raise ValueError(f"passes must be an integer of at least 1, got {passes}")
        if self.one_cycle:
            return replace(self, stages=((passes, self.stages[0][1]),))
        kept, left = [], passes
        for stage, rate in self.stages:
            if left > 0:
                kept.append((min(stage, left), rate))
            left -= stage
        if left > 0:
            raise ValueError(f"preset {self.name!r} has {self.passes} passes: {passes} are more than its schedule")
        return replace(self, stages=tuple(kept))

    def continued(self, passes: int, rate: float) -> Preset:
        """The protocol of a second stage of so many passes, no more than the first has; a one-cycle is repeated."""
        return self if self.one_cycle else replace(self, stages=((min(passes, self.passes), rate),))


def _stages(first_rate: float) -> tuple[tuple[int, float], ...]:
    return tuple((3**i, first_rate * 10 ** (-i / 7)) for i in range(8))


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("paper", "the paper's: 3280 passes in eight stages; days on a CPU", _stages(1e-4)),
        Preset(
            "bgs16",
            "the original's where it differs: batches of 20, rates from 1e-3, re-binarised every pass",
            _stages(1e-3),
            batch_size=20,
            binarisation="epoch",
        ),
        Preset(
            "short",
            "one learning-rate cycle of few passes, few samples back-propagated, products in bfloat16",
            ((140, 2e-3),),
            one_cycle=True,
            backward_samples=10,
            precision="bf16",
        ),
        Preset(
            "smoke",
            "seconds a cell: shows that everything works, not what is true",
            ((12, 2e-3),),
            one_cycle=True,
            nll_k=1000,
            test_images=500,
        ),
    )
}


CHANGEABLE = ("passes", "batch_size", "nll_k", "test_images", "backward_samples")


def configured(name: str, overrides: Sequence[str], precision: str | None = None) -> tuple[Preset, int | None]:
    """A preset changed by `NAME=VALUE` texts, and the cap on k if `k=N` is among them."""
    preset, cap = get_preset(name), None
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in (*CHANGEABLE, "k"):
            raise ValueError(f"cannot set {text!r}: choose from {', '.join((*CHANGEABLE, 'k'))}")
        least = 2 if key == "test_images" else 1  # no variance, hence no active units, of a single image
        if not value.isdecimal() or len(value) > 18 or int(value) < least:
            raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
        if key == "k":
            cap = int(value)
        else:
            preset = preset.with_passes(int(value)) if key == "passes" else replace(preset, **{key: int(value)})  # type: ignore[arg-type]
    if precision is not None:
        preset = replace(preset, precision=precision)
    require_precision(preset.precision)
    return preset, cap


def get_preset(name: str) -> Preset:
    """The preset of that name; raises `ValueError` with the choices."""
    require_choice("preset", name, PRESETS)
    return PRESETS[name]
