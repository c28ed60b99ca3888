"""Grey pixels made binary, by an explicit protocol: `fixed`, `once` or `epoch`."""

from __future__ import annotations

import numpy as np
import torch

from mcobjectives.arguments import require_choice
from mcobjectives_examples.errors import DataError

MODES = ("fixed", "once", "epoch")
TEST_SEED = 150900519


def binarise(pixels: torch.Tensor, mode: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Make pixels in [0, 1] binary by an explicit protocol.

    `fixed`: the pixels are 0 or 1 already and are returned as they are. `once` and `epoch`: one Bernoulli draw per
    pixel with the pixel as probability; the training loop calls it at the start (`once`, the paper) or before every
    pass (`epoch`, BGS16). A protocol that does not fit the pixels raises, because a result would record it wrongly.

    Args:
        pixels: the whole set rather than a batch, any shape, any device.
        mode: `fixed`, `once` or `epoch`.
        generator: source of the draws, on the pixels' device; not needed for `fixed`.
    """
    _check_mode(pixels, mode)
    if mode == "fixed":
        return pixels
    if generator is None or generator.device.type != pixels.device.type:
        have = "none" if generator is None else f"one on {generator.device}"
        raise DataError(f"binarisation {mode!r} draws from a torch.Generator on {pixels.device}, was given {have}")
    return torch.bernoulli(pixels, generator=generator)


def test_set(pixels: torch.Tensor, mode: str) -> torch.Tensor:
    """The binary test images `(n, pixels)`, the same in every run whatever its training seed.

    Grey data is binarised once with the fixed `TEST_SEED`, under `once` and `epoch` alike.
    """
    _check_mode(pixels, mode)
    if mode == "fixed":
        return pixels
    # NumPy keeps RandomState's stream from release to release; torch promises no such thing for its generators.
    uniform = np.random.RandomState(TEST_SEED).random_sample(tuple(pixels.shape))
    return torch.from_numpy((uniform < pixels.numpy()).astype(np.float32))


test_set.__test__ = False  # type: ignore[attr-defined]  # the name is not pytest's


def _check_mode(pixels: torch.Tensor, mode: str) -> None:
    require_mode(mode, mode in MODES and binary_pixels(pixels, "binarisation"))


def require_mode(mode: str, binary: bool) -> None:
    """Raise `DataError` unless the protocol is one, and fits pixels that are binary already, or not."""
    require_choice("binarisation", mode, MODES, DataError)
    if mode == "fixed" and not binary:
        raise DataError("binarisation 'fixed' needs pixels that are 0 or 1 already: use 'once' or 'epoch' for grey")
    if mode != "fixed" and binary:
        raise DataError(f"binarisation {mode!r} would change nothing: the pixels are 0 or 1 already; use 'fixed'")


def binary_pixels(pixels: torch.Tensor, what: str) -> bool:
    """Whether all pixels are 0 or 1; raises where there are none, or one is NaN or outside [0, 1]."""
    if pixels.numel() == 0:
        raise DataError(f"{what}: there are no pixels")
    low, high = (bound.item() for bound in torch.aminmax(pixels))
    if not (low >= 0 and high <= 1):
        raise DataError(f"{what}: pixels must be numbers in [0, 1], these span [{low:g}, {high:g}]")
    return bool(((pixels == 0) | (pixels == 1)).all())
