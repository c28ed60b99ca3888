"""Figures as PNG or SVG by matplotlib, with a JSON file beside each that says what it shows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcobjectives_examples import files
from mcobjectives_examples.config import Config
from mcobjectives_examples.figures import Content, LatentSpace, Reconstruction
from mcobjectives_examples.results import FORMATS, record_path
from mcobjectives_examples.sources import Dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def require_drawing(path: Path) -> None:
    """Raises before any work if matplotlib is missing, or the file's name is of no format that is drawn."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path.name!r} must end in {' or '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('mcobj figure needs: pip install "mcobjectives[figures]"') from error


def save(
    path: Path, content: Content, configs: Sequence[Config], dataset: Dataset, surroundings: dict[str, Any]
) -> dict[str, Any]:
    """Draw a figure to a file, and write its record beside it; the same content gives the same bytes."""
    require_drawing(path)
    from matplotlib import rc_context

    image = io.BytesIO()
    kind = path.suffix[1:]
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 9}):
        draw(content).savefig(
            image, format=kind, dpi=160, metadata={"Software": None} if kind == "png" else {"Date": None}
        )
    record = {
        "figure": content.number,
        "title": content.title,
        "caption": content.caption,
        "alt": content.alt,
        "numbers": content.numbers(),
        "models": [config.to_dict(dataset.checksum) for config in configs],
        "data": dataset.record(),
        "image_sha256": hashlib.sha256(image.getvalue()).hexdigest(),  # the two files are written one after the other
        "provenance": surroundings,
    }
    files.write_atomically(path, lambda file: file.write(image.getvalue()))
    files.write_json(record_path(path), record)
    return record


def draw(content: Content) -> Figure:
    """The figure, drawn without a display."""
    match content.parts[0]:
        case LatentSpace():
            return _scatter(content)
        case Reconstruction():
            return _grid(content)
        case _:
            return _manifold(content)


def _scatter(content: Content) -> Figure:
    figure, axes = _axes(content, 1, len(content.parts), (4.6 * len(content.parts), 5.9))
    spaces = [part for part in content.parts if isinstance(part, LatentSpace)]
    limit = 1.05 * max(float(np.abs(space.means).max()) for space in spaces)
    for panel, label, space in zip(axes[0], content.labels, spaces, strict=True):
        size = 4 if len(space.means) > 2000 else 12
        colours = [f"C{i}" for i in space.labels]  # in the images' order: no class covers another
        panel.scatter(space.means[:, 0], space.means[:, 1], s=size, lw=0, alpha=0.6, c=colours)
        for i, name in enumerate(content.classes):
            mine = space.means[space.labels == i]
            if len(mine):
                box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": f"C{i}", "alpha": 0.85}
                x, y = np.median(mine, 0)
                panel.text(x, y, name, ha="center", va="center", fontsize=8, bbox=box)
        panel.set(xlim=(-limit, limit), ylim=(-limit, limit), box_aspect=1, xlabel="$h_1$")
        panel.set_title(f"{label}\nstandard deviation of the means {space.spread:.2f}", fontsize=9)
    axes[0][0].set_ylabel("$h_2$")
    dots = [axes[0][0].scatter([], [], color=f"C{i}", label=name) for i, name in enumerate(content.classes)]
    figure.legend(handles=dots, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _grid(content: Content) -> Figure:
    parts = [part for part in content.parts if isinstance(part, Reconstruction)]
    rows = 1 + len(parts)
    figure, axes = _axes(content, rows, len(content.shown), (0.95 * len(content.shown) + 1.4, 1.2 * rows + 0.7))
    for column, i in enumerate(content.shown):
        _image(axes[0][column], content.images[i], content.shape)
        for row, part in enumerate(parts, start=1):
            _image(axes[row][column], part.pixels[i], content.shape)
            axes[row][column].set_xlabel(f"{part.errors[i]:.1f}", fontsize=8, labelpad=2)
    names = ["input", *(f"{name}\nmean {p.error:.1f} nats" for name, p in zip(content.labels, parts, strict=True))]
    for row, name in enumerate(names):
        axes[row][0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    return figure


def _manifold(content: Content) -> Figure:
    figure, axes = _axes(content, 1, len(content.parts), (6.2 * len(content.parts), 6.6))
    height, width = content.shape
    for panel, label, part in zip(axes[0], content.labels, content.parts, strict=True):
        assert isinstance(part, np.ndarray)
        apart = np.pad(part.reshape(*part.shape[:2], height, width), ((0, 0), (0, 0), (1, 1), (1, 1)))
        tiled = np.concatenate(np.concatenate(apart, axis=1), axis=1)
        _image(panel, tiled, tiled.shape)
        panel.set(xlabel="$h_1$, quantiles of N(0, 1)", ylabel="$h_2$, quantiles of N(0, 1)")
        panel.set_title(label, fontsize=9)
    return figure


def _axes(content: Content, rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(content.title, fontsize=11)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _image(panel: Axes, pixels: np.ndarray, shape: tuple[int, ...]) -> None:
    panel.imshow(pixels.reshape(shape), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
