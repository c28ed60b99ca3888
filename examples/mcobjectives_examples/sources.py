"""The paper's data sets: what each must look like, which files hold it, where they are had, and how they are read.

Every pixel is a float32 in [0, 1], images are rows of `height * width` pixels in row-major order.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mcobjectives_examples import downloads
from mcobjectives_examples.amat import read_amat
from mcobjectives_examples.binarisation import binary_pixels
from mcobjectives_examples.downloads import file_digest
from mcobjectives_examples.errors import DataError

DIGITS_SEED = 0
NOT_BGS16S = "not BGS16's own file"


@dataclass(frozen=True)
class DataFile:
    """One file that was read: its path relative to the data folder and the sha256 of its content.

    `verified` is True where it matches an official checksum, None where none is known; a mismatch raises instead.
    """

    path: str
    sha256: str
    verified: bool | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory: `train` and `test` are `(n, height * width)` float32 in [0, 1], on the CPU.

    `binary` says that the pixels are already 0 or 1; `source` is a sentence for people on where the data came from.
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor
    shape: tuple[int, int]
    binary: bool
    files: tuple[DataFile, ...]
    source: str

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            pixels = getattr(self, part)
            if pixels.ndim != 2 or pixels.shape[1] != math.prod(self.shape) or pixels.dtype != torch.float32:
                raise DataError(
                    f"{self.name}: {part} is {pixels.dtype} of shape {tuple(pixels.shape)}, "
                    f"not float32 of shape (n, {math.prod(self.shape)})"
                )
            binary = binary_pixels(pixels, f"{self.name}: {part}")
            if self.binary and not binary:
                raise DataError(f"{self.name}: {part} has pixels other than 0 and 1, yet is declared binary")

    @property
    def checksum(self) -> str:
        """One sha256 over the files' digests, to be recorded in results."""
        return hashlib.sha256("\n".join(file.sha256 for file in self.files).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What was read: files with checksums, and whether an official checksum vouches for them."""
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.checksum,
            "files": [asdict(file) for file in self.files],
            "train": len(self.train),
            "test": len(self.test),
        }


@dataclass(frozen=True)
class SourceFile:
    """A file of a data set: its path relative to the data folder, its official checksum as `algorithm:hex` if known."""

    path: str
    official: str | None = None


@dataclass(frozen=True)
class Source:
    """A registry entry: what a data set must look like, which files hold it, and where they are had.

    `url` is the folder that the files are downloaded from; where it is empty, `torchvision` names the class that does.
    """

    name: str
    about: str
    shape: tuple[int, int]
    sizes: tuple[int, int]
    binary: bool
    read: Callable[[Source, Path], Dataset]
    files: tuple[SourceFile, ...] = ()
    url: str = ""
    torchvision: str = ""


def _data_file(file: SourceFile, folder: Path) -> DataFile:
    path = folder / file.path
    if file.official and not downloads.matches(path, file.official):
        raise DataError(f"{path} has not the official checksum {file.official}; move it away and use --download")
    return DataFile(file.path, file_digest(path), True if file.official else None)


def _dataset(source: Source, parts: list[np.ndarray], files: tuple[DataFile, ...], about: str = "") -> Dataset:
    for part, array, rows in zip(("train", "test"), parts, source.sizes, strict=True):
        if array.shape != (rows, math.prod(source.shape)):
            raise DataError(
                f"{source.name}: {part} is {array.shape[0]} images of {array[0:1].size} pixels, "
                f"not {rows} of {math.prod(source.shape)}: truncated, or another file"
            )
    train, test = (torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)) for array in parts)
    return Dataset(source.name, train, test, source.shape, source.binary, files, about or source.about)


def _read_digits(source: Source, folder: Path) -> Dataset:
    from sklearn.datasets import load_digits

    images = load_digits().data.astype(np.uint8)
    file = DataFile("sklearn.datasets.load_digits", hashlib.sha256(images.tobytes()).hexdigest(), None)
    order = np.random.RandomState(DIGITS_SEED).permutation(len(images))
    pixels = images[order].astype(np.float32) / 16
    return _dataset(source, [pixels[: source.sizes[0]], pixels[source.sizes[0] :]], (file,))


def _read_idx(source: Source, folder: Path) -> Dataset:
    from torchvision.datasets.mnist import read_image_file

    parts = []
    for file in source.files:
        try:
            images = read_image_file(str(folder / file.path))
        except Exception as error:  # torchvision asserts, indexes and views its way through foreign bytes
            raise DataError(f"{folder / file.path} is truncated or no IDX image file; move it away") from error
        parts.append(images.flatten(1).numpy() / np.float32(255))
    return _dataset(source, parts, tuple(_data_file(file, folder) for file in source.files))


def _read_amat(source: Source, folder: Path) -> Dataset:
    pairs = zip(source.files, source.sizes, strict=True)
    parts = [read_amat(folder / file.path, rows, math.prod(source.shape)) for file, rows in pairs]
    return _dataset(source, parts, tuple(_data_file(file, folder) for file in source.files))


def _read_omniglot(source: Source, folder: Path) -> Dataset:
    from scipy.io import loadmat

    (file,) = source.files
    path = folder / file.path
    content = path.read_bytes()
    try:
        arrays = loadmat(io.BytesIO(content), variable_names=["data", "testdata"])
        parts = [arrays[key].T.astype(np.float32, casting="same_kind") for key in ("data", "testdata")]
    except Exception as error:  # foreign bytes fail in loadmat in many ways
        what = ".mat file with data and testdata of real numbers"
        raise DataError(f"{path} is truncated or no {what}; move it away") from error
    if file.official is None or not downloads.matches(path, file.official):
        about = f"{path.name}, {NOT_BGS16S} ({file.official}): another one, its pixels taken as row-major"
        return _dataset(source, parts, (DataFile(file.path, file_digest(path), None),), about)
    height, width = source.shape
    parts = [part.reshape(-1, width, height).transpose(0, 2, 1).reshape(len(part), -1) for part in parts]
    return _dataset(source, parts, (_data_file(file, folder),), f"{path.name}, BGS16's own file")


def _idx_files(folder: str, train_md5: str, test_md5: str) -> tuple[SourceFile, ...]:
    return (
        SourceFile(f"{folder}/raw/train-images-idx3-ubyte", f"md5:{train_md5}"),
        SourceFile(f"{folder}/raw/t10k-images-idx3-ubyte", f"md5:{test_md5}"),
    )


DATASETS: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "digits",
            "scikit-learn's bundled 8x8 digits, shuffled with a fixed seed and split 1500 / 297",
            shape=(8, 8),
            sizes=(1500, 297),
            binary=False,
            read=_read_digits,
        ),
        Source(
            "mnist",
            "MNIST through torchvision",
            shape=(28, 28),
            sizes=(60000, 10000),
            binary=False,
            read=_read_idx,
            files=_idx_files("MNIST", "6bbc9ace898e44ae57da46a324031adb", "2646ac647ad5339dbf082846283269ea"),
            torchvision="MNIST",
        ),
        # The sha256 are those that TensorFlow Datasets recorded when it downloaded from the official address.
        Source(
            "binarized_mnist",
            "Larochelle's fixed binarisation of MNIST (the validation split is left out, as in the paper)",
            shape=(28, 28),
            sizes=(50000, 10000),
            binary=True,
            read=_read_amat,
            files=(
                SourceFile(
                    "binarized_mnist/binarized_mnist_train.amat",
                    "sha256:ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
                ),
                SourceFile(
                    "binarized_mnist/binarized_mnist_test.amat",
                    "sha256:e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
                ),
            ),
            url="http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
        ),
        Source(
            "omniglot",
            "chardata.mat of BGS16's repository",
            shape=(28, 28),
            sizes=(24345, 8070),
            binary=False,
            read=_read_omniglot,
            files=(SourceFile("omniglot/chardata.mat", "git-blob:016a3536ffe5e1d38e42563a18d7a78bfaf643ec"),),
            url="https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/",
        ),
        # The md5 are those of the files that the official archives, whose md5 torchvision knows, unpack to.
        Source(
            "fashion_mnist",
            "Fashion-MNIST through torchvision",
            shape=(28, 28),
            sizes=(60000, 10000),
            binary=False,
            read=_read_idx,
            files=_idx_files("FashionMNIST", "f4a8712d7a061bf5bd6d2ca38dc4d50a", "8181f5470baa50b63fa0f6fddb340f0a"),
            torchvision="FashionMNIST",
        ),
    )
}
