"""What the modules on data raise: a data set that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """A data set that cannot be used: one line that says what is wrong, with which value, and the mend."""


class MissingDataError(DataError):
    """A data set whose files are not there."""
