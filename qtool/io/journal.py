"""A journal of what a folder of results was made from, a line of JSON each.

A run that was killed leaves at most its last line cut off; reading passes over what it cannot
parse. Of several lines about one output the last counts.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from qtool.errors import QtoolError

NAME = ".qtool.jsonl"
"""The journal's file name inside a folder of results."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result.

    Attributes:
        output: Its path relative to the folder of the journal, with forward slashes.
        input: Path of what it was made from, as the user named it.
        input_sha256: SHA-256 of that file's bytes.
        settings_sha256: SHA-256 of the settings that shape a result.
        output_sha256: SHA-256 of the result's bytes.
        status: `ok`, or `copied` for a file passed on unchanged.
        time: When it was finished, ISO 8601.
    """

    output: str
    input: str
    input_sha256: str
    settings_sha256: str
    output_sha256: str
    status: str
    time: str


def read_journal(folder: Path) -> dict[str, Record]:
    """Read the journal of a folder.

    Returns:
        The last record of each output; empty without a journal.

    Raises:
        QtoolError: The journal is there and cannot be read.
    """
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise QtoolError(f"cannot read {folder / NAME}: {error.strerror}") from error
    records: dict[str, Record] = {}
    for line in text.splitlines():
        record = _parsed(line)
        if record is not None:
            records[record.output] = record
    return records


class Journal:
    """A journal open for adding records, by several threads and processes at once.

    Args:
        folder: The folder of results, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        """Append a record in one write, so that lines of several processes do not mix.

        Raises:
            QtoolError: The file system refuses.
        """
        line = json.dumps(asdict(record), sort_keys=True) + "\n"
        try:
            with self._lock:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                try:
                    os.write(descriptor, (self._cut_off(descriptor) + line).encode())
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise QtoolError(f"cannot write {self._path}: {error.strerror}") from error

    @staticmethod
    def _cut_off(descriptor: int) -> str:
        """A line break where the last line has none, because a run was killed in it."""
        size = os.fstat(descriptor).st_size
        if not size:
            return ""
        return "" if os.pread(descriptor, 1, size - 1) == b"\n" else "\n"


def _parsed(line: str) -> Record | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fields = Record.__dataclass_fields__
    if not isinstance(content, dict) or content.keys() != fields.keys():
        return None
    if not all(isinstance(value, str) for value in content.values()):
        return None
    return Record(**content)
