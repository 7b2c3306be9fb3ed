"""Where downloads and interim results live, whether the network may be used, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

_TRUE = frozenset({"1", "on", "true", "yes"})


def cache_dir() -> Path:
    """The folder for everything that can be made again: QTOOL_CACHE, else ~/.cache/qtool.

    The folder is not made here; whoever writes into it does that.
    """
    chosen = os.environ.get("QTOOL_CACHE", "").strip()
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "qtool"


def offline(flag: bool = False) -> bool:
    """Tell whether the network is out of bounds.

    Args:
        flag: What the user said on the command line; true always wins.

    Returns:
        True if the flag, QTOOL_OFFLINE or HF_HUB_OFFLINE asks for it (1, true, yes or on).
    """
    return flag or any(
        os.environ.get(name, "").strip().lower() in _TRUE
        for name in ("QTOOL_OFFLINE", "HF_HUB_OFFLINE")
    )


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_settings(settings: Mapping[str, object]) -> str:
    """The SHA-256 of settings, the same for any order of the keys.

    Args:
        settings: JSON values; paths and other objects count by their `str`.
    """
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
