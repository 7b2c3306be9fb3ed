"""Where interim results live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for everything that can be made again: QTOOL_CACHE, else ~/.cache/qtool.

    The folder is not made here; whoever writes into it does that.
    """
    chosen = os.environ.get("QTOOL_CACHE", "").strip()
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "qtool"
