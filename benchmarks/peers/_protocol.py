"""What every worker shares: the model's sizes and initial parameters, the data, and the line protocol.

A worker is a program of its own, so that frameworks cannot disturb each other and each has its own peak memory:

    python peers/x.py --layers 1 --k 50 --batch 100 --threads 2

It prints one JSON line when it is ready; then, for each line `n` read from stdin, it trains n steps and prints one JSON
line `{"ms": [n floats], "loss": float, "peak_mb": float}`; `n RATE` sets the learning rate first; `save FILE` writes
the parameters as arrays in the order of `Settings.initial`. It ends when stdin does. No framework is imported here.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE, ADAM_EPS = 1e-4, 1e-4  # slow, so that the last step timed does the same work as the first
PIXELS = 784
ENCODER = {1: [(PIXELS, 200, 50)], 2: [(PIXELS, 200, 100), (100, 100, 50)]}  # (input, hidden, latent), x upwards
DECODER = {1: [(50, 200, PIXELS)], 2: [(50, 100, 100), (100, 200, PIXELS)]}  # top latent down to x

Affine = tuple[np.ndarray, np.ndarray]  # (inputs, outputs), (outputs,)
Net = list[Affine]  # two hidden layers, then mean and log standard deviation, or the logits alone


@dataclass(frozen=True)
class Settings:
    layers: int
    k: int
    batch: int
    threads: int
    mode: str
    data: str | None = None

    def batches(self, count: int = 10) -> list[np.ndarray]:
        """Binary images, each (batch, 784) float32, the same for every worker."""
        rng = np.random.default_rng(0)
        return [(rng.random((self.batch, PIXELS)) < 0.5).astype(np.float32) for _ in range(count)]

    def stream(self) -> Iterator[np.ndarray]:
        """Batches without end: those, or the images of `data` (uint8 .npy) in a new order each pass."""
        if self.data is None:
            yield from cycle(self.batches())
        images, rng = np.load(str(self.data)), np.random.default_rng(2)
        while True:
            order = rng.permutation(len(images))
            for start in range(0, len(images) - self.batch + 1, self.batch):
                yield images[order[start : start + self.batch]].astype(np.float32)

    def initial(self) -> tuple[list[Net], list[Net]]:
        """Encoder and decoder nets, the same for every worker: Glorot, the heads scaled down.

        A trained model's log-weights spread by a few nats within an x, and so they do here (effective sample size 3 to
        9 of 50). With Glorot heads on random images they spread by hundreds: the normalised weights are subnormal
        floats, which PyTorch multiplies several times slower while XLA and TensorFlow flush them to zero. With `data`,
        the pixels' biases begin at the logits of its means.
        """
        rng = np.random.default_rng(1)

        def affine(inputs: int, outputs: int, scale: float = 1.0) -> Affine:
            limit = scale * (6 / (inputs + outputs)) ** 0.5
            weight = rng.uniform(-limit, limit, (inputs, outputs)).astype(np.float32)
            return weight, np.zeros(outputs, np.float32)

        def net(inputs: int, hidden: int, outputs: int) -> Net:
            heads = 1 if outputs == PIXELS else 2
            body = [affine(inputs, hidden), affine(hidden, hidden)]
            return body + [affine(hidden, outputs, scale=0.3) for _ in range(heads)]

        encoder, decoder = [net(*s) for s in ENCODER[self.layers]], [net(*s) for s in DECODER[self.layers]]
        if self.data is not None:
            means = np.load(self.data).mean(axis=0).clip(0.001, 0.999)
            decoder[-1][-1][1][:] = np.log(means / (1 - means))
        return encoder, decoder


class Training(NamedTuple):
    """What a contestant's `build` gives; the last two only where it is to be trained to a result."""

    prepare: Callable[[np.ndarray], Any]  # a batch as the framework's own tensor, outside the timing
    step: Callable[[Any], float]  # trains one step on it; minus the mean bound, so that it has ended
    set_rate: Callable[[float], None] | None = None
    parameters: Callable[[], list[np.ndarray]] | None = None


def serve(
    name: str,
    build: Callable[[Settings], tuple],
    packages: Sequence[str],
    kind: str = "peer",
    modes: Sequence[str] = ("default",),
) -> None:
    """Run a worker.

    Args:
        name: what the results call it.
        build: settings -> the fields of `Training`.
        packages: distributions whose versions are recorded.
        kind: "ours", "peer" or "floor".
        modes: the values that `--mode` may take; the first is the default.
    """
    parser = argparse.ArgumentParser(description=f"benchmark worker: {name}")
    parser.add_argument("--layers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mode", choices=list(modes), default=modes[0])
    parser.add_argument("--data", help="train on the images of this .npy file")
    settings = Settings(**vars(parser.parse_args()))
    _limit_cores(settings.threads)

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break the protocol

    import_mb = peak_mb()
    training = Training(*build(settings))
    # Those few are prepared once; a stream of real images is not kept.
    prepared = map(training.prepare, settings.stream())
    data = cycle([training.prepare(x) for x in settings.batches()]) if settings.data is None else prepared

    def reply(**fields: object) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    reply(name=name, kind=kind, mode=settings.mode, versions=_versions(packages), import_mb=import_mb)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "save":
            assert training.parameters is not None
            np.savez(argument, *training.parameters())
            reply(saved=argument)
            continue
        if argument:
            assert training.set_rate is not None
            training.set_rate(float(argument))
        ms, loss = [], float("nan")
        for _ in range(int(command)):
            x = next(data)
            start = time.perf_counter()
            loss = training.step(x)
            ms.append(1e3 * (time.perf_counter() - start))
        reply(ms=ms, loss=loss, peak_mb=peak_mb())


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss may be inherited from the parent across exec
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return round(int(peak.split()[1]) / 1024, 1)
    import resource

    scale = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)


def _limit_cores(threads: int) -> None:
    """XLA sizes its thread pool by the cores it may run on and has no other setting, so all are held this way."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
