"""Where on this machine the float model of a quantized file lies: a file tells only its name.

A checkpoint that is sent to somebody must not tell the folders of the machine it was made on. What
`eval` needs to find the float model again stays in the cache, under the digest of its weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import QtoolError
from qtool.io.atomic import write_file
from qtool.io.cache import cache_dir
from qtool.models import sources, vision

PRETRAINED = "pretrained"

_FOLDER = "float-models"
_NAMED = ("hf-hub:", "hf_hub:", "bundled ")


@dataclass(frozen=True)
class FloatSource:
    """How a float model is opened on this machine.

    Attributes:
        model: As for `vision.open_model`.
        weights: As for `vision.open_model`.
    """

    model: str
    weights: str = PRETRAINED


def public_name(source: str) -> str:
    """A model's name without the folders of the machine it came from."""
    if source.startswith(_NAMED):
        return source
    last = re.split(r"[/\\]", source.removeprefix(sources.FOLDER_PREFIX).rstrip("/\\"))[-1]
    return f"{sources.FOLDER_PREFIX}{last}" if source.startswith(sources.FOLDER_PREFIX) else last


def remember(opened: vision.OpenedModel, weights: str) -> None:
    """Keep in the cache where a model came from, if that was a file or folder of this machine.

    Args:
        opened: The model.
        weights: The weights that were named for it.
    """
    source = FloatSource(_absolute(opened.name), _absolute(weights))
    if source == FloatSource(opened.name):
        return
    text = json.dumps({"model": source.model, "weights": source.weights})
    # A cache that cannot be written costs `eval --weights FILE`, not the result of a long run.
    with contextlib.suppress(QtoolError):
        write_file(_place(opened.weights_sha256), text.encode(), overwrite=True)


def recall(digest: str) -> FloatSource | None:
    """Return where the float weights with this SHA-256 were last seen, None if never."""
    try:
        found = json.loads(_place(digest).read_text(encoding="utf-8"))
        return FloatSource(str(found["model"]), str(found["weights"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_path(name: str) -> bool:
    """Tell whether a model's name is that of a file or folder."""
    return name.endswith(".safetensors") or name.startswith(sources.FOLDER_PREFIX)


def _absolute(name: str) -> str:
    if name.startswith(sources.FOLDER_PREFIX):
        return sources.FOLDER_PREFIX + str(Path(name.removeprefix(sources.FOLDER_PREFIX)).resolve())
    is_local = Path(name).is_file() and name != PRETRAINED
    return str(Path(name).resolve()) if is_path(name) or is_local else name


def _place(digest: str) -> Path:
    return cache_dir() / _FOLDER / f"{re.sub('[^0-9a-f]', '', digest)[:64] or 'none'}.json"
