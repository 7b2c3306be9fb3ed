"""Where interim results live, and hashes of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for everything that can be made again: QTOOL_CACHE, else ~/.cache/qtool.

    The folder is not made here; whoever writes into it does that.
    """
    chosen = os.environ.get("QTOOL_CACHE", "").strip()
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "qtool"


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
