"""Every error qtool raises on purpose, and the exit code each one maps to.

QtoolError                      1  the work failed
├── CheckpointError             1  a checkpoint is damaged, foreign or hostile
│   └── MissingCheckpointError  4  there is none at the path that was named
├── ImageError                  1  a picture cannot be read
├── UsageError                  2  the request itself is wrong
│   └── OutputExistsError       2  the output is already there
├── ItemsFailedError            3  some items failed, the rest were written
├── MissingError                4  weights, a device or an extra is missing
│   └── BackendError            4  the backend asked for cannot run this
└── QualityGateError            5  a measured value is below its gate
"""

from __future__ import annotations

from typing import Protocol


class QtoolError(Exception):
    """Base of all errors that carry a sentence for the user.

    Args:
        message: What happened and why, one line.
        remedy: What to do about it, one line.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class CheckpointError(QtoolError):
    """A checkpoint is truncated, damaged, foreign or hostile."""


class MissingCheckpointError(CheckpointError):
    """There is no checkpoint at the path that was named."""

    exit_code = 4


class ImageError(QtoolError):
    """A picture cannot be decoded, or is not one."""


class UsageError(QtoolError):
    """The request contradicts itself or names something that does not exist."""

    exit_code = 2


class OutputExistsError(UsageError):
    """The output exists and neither overwriting nor skipping was asked for."""


class ItemsFailedError(QtoolError):
    """Some items of a batch failed; the others were written."""

    exit_code = 3


class MissingError(QtoolError):
    """Something outside the request is missing: weights, a device, an optional extra."""

    exit_code = 4


class BackendError(MissingError):
    """The backend that was asked for cannot run this operation here."""


class QualityGateError(QtoolError):
    """A measured value is below the gate the user set."""

    exit_code = 5


class Progress(Protocol):
    """Callback through which long work reports how far it is."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report `done` of `total` steps of `stage`; `note` is a short free text."""
