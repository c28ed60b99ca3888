"""Class labels of the test images, for figures; no model is trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mcobjectives_examples.downloads import data_dir as folder_of
from mcobjectives_examples.errors import DataError, MissingDataError
from mcobjectives_examples.sources import DATASETS, DIGITS_SEED

FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LABELLED = ("digits", "mnist", "fashion_mnist")


def class_names(name: str) -> tuple[str, ...]:
    """The classes of a data set that lists them, in the order of their numbers; raises `DataError` otherwise."""
    if name not in LABELLED:
        raise DataError(f"{name} lists no class labels: choose from {', '.join(LABELLED)}")
    return FASHION if name == "fashion_mnist" else tuple(map(str, range(10)))


def test_labels(name: str, data_dir: str | Path | None = None) -> np.ndarray:
    """The class of each test image, in the order of `Dataset.test`: `(n,)` integers from 0 to 9."""
    classes = class_names(name)
    source = DATASETS[name]
    if name == "digits":
        from sklearn.datasets import load_digits

        target = load_digits().target
        return target[np.random.RandomState(DIGITS_SEED).permutation(len(target))][source.sizes[0] :]
    path = folder_of(data_dir) / source.files[1].path.replace("images-idx3", "labels-idx1")
    if not path.is_file():
        raise MissingDataError(f"{name}: the labels {path} are not there: copy them from where its images came from")
    from torchvision.datasets.mnist import read_label_file

    try:
        labels = read_label_file(str(path)).numpy()
    except Exception as error:  # torchvision asserts and views its way through foreign bytes
        raise DataError(f"{path} is truncated or no IDX label file; move it away") from error
    if labels.shape != (source.sizes[1],) or not 0 <= labels.min() <= labels.max() < len(classes):
        raise DataError(f"{path} does not hold {source.sizes[1]} labels from 0 to {len(classes) - 1}; move it away")
    return labels


test_labels.__test__ = False  # type: ignore[attr-defined]  # the name is not pytest's
