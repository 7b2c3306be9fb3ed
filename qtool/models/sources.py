"""Where weights come from: files of the package, local files, the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open

from qtool.errors import MissingError, UsageError
from qtool.models.registry import CONFIG_FILE, WEIGHTS_FILE

_PACKAGE = Path(__file__).resolve().parents[1]
_PATIENCE = 5.0
_HUB_FILES = f"{CONFIG_FILE} {WEIGHTS_FILE}"

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
FOLDER_PREFIX = "local-dir:"


def bundled(name: str) -> Path:
    """Return the path of an asset, in an installed package or in a checkout.

    Args:
        name: File name below `assets/`.

    Returns:
        `qtool/assets/NAME` where the package is installed, else `assets/NAME` beside the package.

    Raises:
        MissingError: The file is in neither place.
    """
    for folder in (_PACKAGE / "assets", _PACKAGE.parent / "assets"):
        if (folder / name).is_file():
            return folder / name
    raise MissingError(
        f"the bundled file {name} is missing from this installation",
        remedy="install qtool again, or pass your own file with --weights FILE",
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors.

    Raises:
        UsageError: The file is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is not a readable safetensors file ({error})",
            remedy="give a .safetensors file of model weights",
        ) from error


def rows(path: Path, tensor: str) -> int | None:
    """Return the length of a tensor's first axis in a safetensors file, or None without it."""
    with safe_open(path, framework="pt") as file:
        return int(file.get_slice(tensor).get_shape()[0]) if tensor in file.keys() else None  # noqa: SIM118


def read_json(text: str, *, origin: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The JSON text.
        origin: Where it comes from, for the error.

    Raises:
        UsageError: It is not a JSON object.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{origin} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UsageError(f"{origin} is not a JSON object")
    return value


def _refuse(constant: str) -> None:
    """Refuse NaN and infinities, which JSON does not have."""
    raise ValueError(f"{constant} is no number of JSON")


def checkpoint_file(name: str | Path, *, offline: bool) -> Path:
    """Return the file that a name of a checkpoint means; whether it is one has to be seen.

    Args:
        name: A file, a folder with or without `local-dir:`, or `hf-hub:OWNER/NAME`.
        offline: Look for repositories in the local cache only; no socket is opened.

    Raises:
        MissingError: The repository is not cached, and offline, out of reach or not on the hub.
    """
    text = str(name)
    if text.startswith(HUB_PREFIXES):
        repository = text.partition(":")[2]
        return fetch(repository, (WEIGHTS_FILE,), offline=offline, wanted=_HUB_FILES)
    path = Path(text.removeprefix(FOLDER_PREFIX))
    return path / WEIGHTS_FILE if path.is_dir() else path


def fetch_config(repository: str, *, offline: bool) -> Path:
    """Return the `config.json` of a hub repository, as `fetch` does."""
    return fetch(repository, (CONFIG_FILE,), offline=offline, wanted=_HUB_FILES)


def read_config(path: Path) -> dict[str, Any]:
    """Read the `config.json` of a model.

    Raises:
        UsageError: It is not a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error
    return read_json(text, origin=str(path))


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Tell whether a `config.json` stands beside a checkpoint of ours."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "qtool"


def fetch(
    repository: str,
    names: tuple[str, ...],
    *,
    offline: bool,
    note: str = "",
    wanted: str = "",
) -> Path:
    """Return a file of a hub repository from the local cache, or else download it.

    Args:
        repository: Owner and name, with `@revision` if need be.
        names: File names to try, in order of preference.
        offline: Look into the cache only; no socket is opened.
        note: What the error should say about the file, such as its size and licence.
        wanted: Files the remedy should fetch, when another file given by hand is no help.

    Returns:
        The cached file.

    Raises:
        MissingError: It is not cached, and offline, out of reach or not on the hub.
    """
    owner_name, _, revision = repository.partition("@")
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(owner_name, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    if offline or huggingface_hub.is_offline_mode():
        reason = "not in the local cache, and offline"
    elif not _reachable():
        reason = f"not in the local cache, and {huggingface_hub.constants.ENDPOINT} does not answer"
    else:
        found = _download(owner_name, revision or None, names)
        if isinstance(found, Path):
            return found
        reason = found
    command = f"hf download {owner_name} {wanted or names[0]}"
    if revision:
        command += f" --revision {revision}"
    about = f" ({note})" if note else ""
    otherwise = "" if wanted else ", or pass your own copy with --weights FILE"
    raise MissingError(
        f"{names[0]} of {owner_name}{about} is missing: {reason}",
        remedy=f"fetch it once with `{command}`{otherwise}",
    )


def _download(repository: str, revision: str | None, names: tuple[str, ...]) -> Path | str:
    """Download the first of `names` that exists; return its path, or why there is none."""
    for name in names:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repository, name, revision=revision, etag_timeout=_PATIENCE
                )
            )
        except hub_errors.LocalEntryNotFoundError:
            return "the connection failed"
        except hub_errors.EntryNotFoundError:
            continue
        except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
            return "the hub has no such public repository or revision"
        except (OSError, ValueError, hub_errors.HfHubHTTPError) as error:
            return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return f"the repository holds none of {', '.join(names)}"


def _reachable() -> bool:
    """Tell within seconds whether the hub answers; its own client retries for half a minute."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # The hub client may trust other certificates than Python does.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True
