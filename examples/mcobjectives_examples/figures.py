"""Figures 2 to 5 of the paper: which models each shows, and what it shows of them, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from mcobjectives.arguments import require_choice
from mcobjectives.evaluation import posterior_means
from mcobjectives.specs import parse_objective
from mcobjectives_examples.binarisation import test_set
from mcobjectives_examples.cells import Place, trainer_of
from mcobjectives_examples.config import Config, canonical, capped, name_of
from mcobjectives_examples.evaluating import reconstructions
from mcobjectives_examples.hooks import NO_HOOKS, Hooks
from mcobjectives_examples.labels import class_names, test_labels
from mcobjectives_examples.models import PaperModel
from mcobjectives_examples.precision import set_precision
from mcobjectives_examples.presets import Preset
from mcobjectives_examples.sources import Dataset
from mcobjectives_examples.words import counted

SIDE = 20
"""Images along one side of the manifold."""
SHOWN = 10
"""Images of an encode-decode grid."""


@dataclass(frozen=True)
class LatentSpace:
    """Where q puts the test images.

    Args:
        means: posterior means, `(n, 2)`.
        labels: the class of each image, `(n,)`.
        spread: standard deviation of the means over images, averaged over both dimensions.
        width: standard deviation of q, averaged over images and dimensions.
    """

    means: np.ndarray
    labels: np.ndarray
    spread: float
    width: float


@torch.no_grad()
def latent_space(model: PaperModel, images: Tensor, labels: np.ndarray) -> LatentSpace:
    """Posterior means of images, `(n, pixels)`, with their classes."""
    [(means, _)] = posterior_means(model, images, n=2)  # exact: no samples are needed
    width = torch.cat([model.posterior(batch).stddev for batch in images.split(1000)]).double().mean()
    return LatentSpace(means.cpu().numpy(), labels, float(means.std(0).mean()), float(width))


@dataclass(frozen=True)
class Reconstruction:
    """Images decoded from their posterior means.

    Args:
        pixels: probabilities, `(n, pixels)`.
        errors: cross-entropy between image and reconstruction, summed over pixels, `(n,)`, nats.
    """

    pixels: np.ndarray
    errors: np.ndarray

    @property
    def error(self) -> float:
        """The mean over images, nats."""
        return float(self.errors.mean())


@torch.no_grad()
def reconstruct(model: PaperModel, images: Tensor) -> Reconstruction:
    """Images, `(n, pixels)`, encoded to the posterior mean and decoded again."""
    pixels, errors = reconstructions(model, images)
    return Reconstruction(pixels.cpu().numpy(), errors.cpu().numpy())


@torch.no_grad()
def manifold(model: PaperModel) -> np.ndarray:
    """Decoded quantiles (i + 1/2) / SIDE of N(0, 1) in both dimensions, `(SIDE, SIDE, pixels)`.

    Columns are the first dimension, rising to the right; rows the second, rising upwards.
    """
    first = next(model.parameters())
    quantiles = Normal(0.0, 1.0).icdf((torch.arange(SIDE, dtype=torch.float64) + 0.5) / SIDE).to(first)
    h = torch.stack(torch.meshgrid(quantiles, quantiles.flip(0), indexing="xy"), -1)
    return model.decode(h).cpu().numpy()


Part = LatentSpace | Reconstruction | np.ndarray
"""What is shown of one model."""


@dataclass(frozen=True)
class Shown:
    """What a figure shows of its models, what that is in words, and what is beside it.

    Args:
        images: which of the test images are shown.
        classes: names of the classes that are told apart.
    """

    parts: Sequence[Part]
    words: str
    images: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()


Show = Callable[[Sequence[str], Sequence[PaperModel], Tensor, Dataset, str | Path | None], Shown]
"""(labels of the models, models, test images on their device, data set, data folder) -> what is shown."""


def _latent_spaces(
    labels: Sequence[str], models: Sequence[PaperModel], images: Tensor, dataset: Dataset, data_dir: str | Path | None
) -> Shown:
    of_images = test_labels(dataset.name, data_dir)
    spaces = [latent_space(model, images, of_images) for model in models]
    spreads = _each(labels, [space.spread for space in spaces])
    words = (
        f"the posterior means of the {len(images)} test images, coloured by class. Their standard deviation: {spreads}"
    )
    return Shown(spaces, words, classes=class_names(dataset.name))


def _reconstructions(
    labels: Sequence[str], models: Sequence[PaperModel], images: Tensor, dataset: Dataset, data_dir: str | Path | None
) -> Shown:
    n = len(images)
    decoded = [reconstruct(model, images) for model in models]
    means = _each(labels, [one.error for one in decoded])
    words = (
        f"{SHOWN} of the {n} test images, and each decoded from its posterior mean, with the cross-entropy in "
        f"nats. Its mean over all test images: {means}"
    )
    return Shown(decoded, words, images=tuple(range(0, n, n // SHOWN))[:SHOWN])


def _manifolds(
    labels: Sequence[str], models: Sequence[PaperModel], images: Tensor, dataset: Dataset, data_dir: str | Path | None
) -> Shown:
    words = f"images decoded from a grid of {SIDE} by {SIDE} quantiles of the prior N(0, I)"
    return Shown([manifold(model) for model in models], words)


def _each(labels: Sequence[str], values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f} ({label})" for label, value in zip(labels, values, strict=True))


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures: what it shows, on which data, of which models.

    Args:
        labelled: whether it needs the class of each image.
        grey: whether images are taken as they are, rather than as the models' protocol makes them binary.
    """

    title: str
    show: Show
    dataset: str
    latent: int | None = None
    objectives: tuple[str, ...] = ("vae(k=1)", "iwae(k=50)")
    labelled: bool = False
    grey: bool = False


FIGURES = {
    2: Figure("Posterior means in two latent dimensions", _latent_spaces, "mnist", latent=2, labelled=True),
    3: Figure("Encoded and decoded again", _reconstructions, "mnist"),
    # In grey as in the paper: Fashion-MNIST is hard to recognise when binarised.
    4: Figure("Encoded and decoded again, grey pixels", _reconstructions, "fashion_mnist", grey=True),
    5: Figure("The manifold of two latent dimensions", _manifolds, "mnist", latent=2, objectives=("iwae(k=50)",)),
}


def figure(number: int) -> Figure:
    """The figure of that number; raises `ValueError` for one that is not drawn from models."""
    require_choice("figure", number, FIGURES)
    return FIGURES[number]


def configurations(
    number: int, preset: Preset, *, dataset: str | None = None, seed: int = 0, cap: int | None = None
) -> list[Config]:
    """The models that a figure shows, as configurations of a preset; one where a cap on k makes them equal."""
    wanted = figure(number)
    name = wanted.dataset if dataset is None else dataset
    protocol = preset.binarisation_of(name)  # an unknown data set raises here
    if wanted.labelled:
        class_names(name)  # as does one without classes
    specs = dict.fromkeys(canonical(capped(spec, cap)) for spec in wanted.objectives)
    return [Config(name, protocol, 1, spec, preset, seed, latent=wanted.latent) for spec in specs]


def trained(config: Config, dataset: Dataset, runs: Path, device: torch.device, hooks: Hooks = NO_HOOKS) -> PaperModel:
    """The configuration's model from its checkpoint in `runs`, trained to its end first where it is not."""
    trainer = trainer_of(config, dataset, Place(runs, device), hooks)
    if trainer.epoch < config.preset.passes:
        trainer.run()
    set_precision("highest")
    return trainer.model.eval()


def model_label(config: Config) -> str:
    """ "IWAE, k = 50"."""
    return f"{name_of(config.objective).upper()}, k = {parse_objective(config.objective).k}"


@dataclass(frozen=True)
class Content:
    """What a figure shows: for each model its label and its numbers, and words for those who do not see it."""

    number: int
    title: str
    caption: str
    alt: str
    labels: tuple[str, ...]
    parts: tuple[Part, ...]
    shape: tuple[int, int]
    images: np.ndarray
    """The images that are encoded and decoded, `(n, pixels)`; none elsewhere."""
    shown: tuple[int, ...]
    classes: tuple[str, ...]

    def numbers(self) -> dict[str, dict[str, float]]:
        """For each model what can be said in a number."""
        return {label: _numbers(part) for label, part in zip(self.labels, self.parts, strict=True)}


def _numbers(part: Part) -> dict[str, float]:
    if isinstance(part, LatentSpace):
        return {"spread_of_means": part.spread, "width_of_q": part.width}
    return {"reconstruction_error": part.error} if isinstance(part, Reconstruction) else {}


def content(
    number: int,
    configs: Sequence[Config],
    models: Sequence[PaperModel],
    dataset: Dataset,
    data_dir: str | Path | None = None,
) -> Content:
    """What a figure shows of trained models, on all test images, by the protocol that their configurations name."""
    wanted, config, preset = figure(number), configs[0], configs[0].preset
    labels = tuple(map(model_label, configs))
    images = dataset.test if wanted.grey else test_set(dataset.test, config.binarisation)
    device = next(models[0].parameters()).device
    found = wanted.show(labels, models, images.to(device), dataset, data_dir)
    title = f"Figure {number}: {wanted.title}, {dataset.name}"
    latent = "" if config.latent is None else f", {config.latent} latent units"
    caption = (
        f"{' and '.join(labels)} of one stochastic layer{latent}: {found.words}. "
        f"Preset {preset.name}, {counted(preset.passes, 'pass')}, binarisation {config.binarisation}, "
        f"seed {config.seed}."
    )
    return Content(
        number=number,
        title=title,
        caption=caption,
        alt=f"{title}. {found.words[0].upper()}{found.words[1:]}.",
        labels=labels,
        parts=tuple(found.parts),
        shape=dataset.shape,
        images=images.numpy() if found.images else np.empty((0, images.shape[1]), np.float32),
        shown=found.images,
        classes=found.classes,
    )
