"""Data sets by name: found, fetched, read and verified, and the state of each.

What a run trained on is told by `Dataset.checksum` and `Dataset.source`, both meant for the results file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcobjectives.arguments import require_choice
from mcobjectives_examples import downloads
from mcobjectives_examples.errors import DataError, MissingDataError
from mcobjectives_examples.sources import DATASETS, NOT_BGS16S, Dataset, Source, SourceFile


def load(name: str, data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Read the data set `name`, verified, from the data folder.

    Args:
        name: a key of `DATASETS`.
        data_dir: the data folder, see `data_dir()`.
        download: fetch the files that are missing; files that are there are never replaced.
    """
    source, folder = _source(name), downloads.data_dir(data_dir)
    try:
        missing = [file for file in source.files if not (folder / file.path).is_file()]
        if missing and not download:
            raise MissingDataError(
                f"{name}: {missing[0].path} is not in {folder}; point --data-dir or MCOBJECTIVES_DATA at the folder "
                "that holds it, or add --download"
            )
        if missing:
            _download(source, missing, folder)
        return source.read(source, folder)
    except OSError as error:
        raise DataError(f"{name}: cannot read {error.filename or folder}: {error.strerror or error}") from error


def vouched(source: str, verified: Iterable[bool | None]) -> str:
    """What is known of the files that data were read from: verified, or not, or that they are other files."""
    if all(verified):
        return "verified"
    return NOT_BGS16S if NOT_BGS16S in source else "no official checksum"


def default_binarisation(name: str) -> str:
    """The paper's protocol for a data set: `fixed` where the pixels are already 0 or 1, else `once`."""
    return "fixed" if _source(name).binary else "once"


@dataclass(frozen=True)
class Status:
    """One data set as `mcobj data` lists it; counts, mean and checksum are there only where it could be read.

    `verified` is None where there is nothing to verify or no official checksum is known, False where it is broken.
    """

    name: str
    present: bool
    location: str
    source: str
    verified: bool | None = None
    train: int | None = None
    test: int | None = None
    shape: tuple[int, int] | None = None
    pixel_mean: float | None = None
    checksum: str | None = None
    message: str = ""


def status(
    data_dir: str | Path | None = None, names: Sequence[str] | None = None, *, download: bool = False
) -> list[Status]:
    """The state of the named data sets, or of all, each one really read; a broken one is a row with a message.

    With `download`, files that are missing are fetched first.
    """
    folder = downloads.data_dir(data_dir)
    return [_status_of(source, folder, download) for source in list(map(_source, names or DATASETS))]


def _status_of(source: Source, folder: Path, download: bool) -> Status:
    location = str(folder / Path(source.files[0].path).parent) if source.files else "bundled with scikit-learn"
    try:
        data = load(source.name, folder, download=download)
    except Exception as error:
        present = all((folder / file.path).is_file() for file in source.files)
        message = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        return Status(source.name, present, location, source.about, False if present else None, message=message)
    return Status(
        source.name,
        True,
        location,
        data.source,
        verified=True if all(file.verified for file in data.files) else None,
        train=len(data.train),
        test=len(data.test),
        shape=data.shape,
        pixel_mean=float(data.train.numpy().mean(dtype=np.float64)),
        checksum=data.checksum,
    )


def _source(name: str) -> Source:
    require_choice("data set", name, DATASETS, DataError)
    return DATASETS[name]


def _download(source: Source, missing: list[SourceFile], folder: Path) -> None:
    if source.torchvision:
        return downloads.fetch_torchvision(source.torchvision, folder)
    for file in missing:
        url = source.url + Path(file.path).name

        def check(path: Path, file: SourceFile = file, url: str = url) -> None:
            if file.official and not downloads.matches(path, file.official):
                raise DataError(f"{url}: what was downloaded has not the official checksum {file.official}; try later")

        downloads.fetch(url, folder / file.path, check)
