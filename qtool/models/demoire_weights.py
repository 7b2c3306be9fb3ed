"""Weights of demoire networks: files qtool writes, and published checkpoints key for key.

A file of qtool is a safetensors file whose metadata name the network. A published checkpoint is a
bare state dict (`.pth`), or one under `state_dict` beside the optimiser's (`.tar`), its keys maybe
prefixed by `module.`; which network it belongs to is read off its keys and shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qtool.errors import (
    CheckpointError,
    MissingCheckpointError,
    MissingError,
    QtoolError,
    UsageError,
)
from qtool.models import demoire, sources
from qtool.models.demoire import DemoireSpec

METADATA_KEY = "qtool.demoire"
"""The metadata string that names the network of a file, in JSON."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar")

_LARGEST_ARGUMENT = 512
_DATA_HASH = "qtool.sha256"
_NO_NETWORK = "give weights of " + ", ".join(spec.name for spec in demoire.NETWORKS)


@dataclass(frozen=True, kw_only=True)
class DemoireNetwork:
    """A demoire network with its weights, ready to run.

    Attributes:
        spec: What the registry says about it.
        module: The network in evaluation mode, on the CPU.
        arguments: The arguments it was built with.
        provenance: What the file says about where its weights come from.
        sha256: SHA-256 of the file.
        size_multiple: What height and width of its input must be multiples of.
        residual: Whether it predicts what to add to its input.
        bits: Of a quantized network, its bits, such as "w8a8"; "" for a float one.
    """

    spec: DemoireSpec
    module: nn.Module
    arguments: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sha256: str
    size_multiple: int
    residual: bool
    bits: str = ""


def metadata(
    name: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata under which a safetensors file of weights is recognised.

    Args:
        name: The network, as the registry calls it.
        arguments: Those it was built with.
        provenance: JSON values about training and licence.
    """
    text = json.dumps(
        {"network": name, "network_args": dict(arguments), "provenance": dict(provenance)},
        sort_keys=True,
    )
    return {"format": "pt", METADATA_KEY: text}


def bundled_path() -> Path:
    """The weights that come with qtool.

    Raises:
        MissingError: This installation has none.
    """
    try:
        return sources.bundled(demoire.BUNDLED)
    except MissingError as error:
        raise MissingError(
            f"this installation has no demoire weights ({demoire.BUNDLED} is not there)",
            remedy="install qtool again, or name a file of weights with --weights FILE",
        ) from error


def load_network(
    path: Path, *, name: str | None = None, arguments: Mapping[str, Any] | None = None
) -> DemoireNetwork:
    """Read weights and build the network they belong to.

    Args:
        path: A file of weights.
        name: The network it must be; None takes the one the file is for.
        arguments: Variants that leave no trace in the keys, such as MBCNN's `head` and `dct`.

    Raises:
        CheckpointError: The file is damaged, foreign, or holds another network or variant.
        UsageError: `name` or `arguments` are unknown.
    """
    wanted = demoire.find(name) if name else None
    header, state = _read(path)
    if METADATA_KEY in header:
        content = _described(path, header[METADATA_KEY])
        found, own = content["network"], dict(content["network_args"])
        provenance = content.get("provenance", {})
    else:
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
        found, own = _recognised(path, state)
        provenance = {}
    if wanted is not None and wanted.name != found:
        raise CheckpointError(
            f"{path} holds weights of {found}, not of {wanted.name}",
            remedy=f"use --model {found}, or give weights of {wanted.name}",
        )
    spec = demoire.find(found)
    module = _filled(path, spec, {**own, **(arguments or {})}, state)
    return DemoireNetwork(
        spec=spec,
        module=module.eval(),
        arguments={**spec.arguments, **own, **(arguments or {})},
        provenance=provenance if isinstance(provenance, Mapping) else {},
        sha256=sources.sha256(path),
        size_multiple=int(module.size_multiple),  # type: ignore[arg-type]
        residual=bool(module.residual),
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    remedy = "check the path given to --weights"
    if not path.exists():
        raise MissingCheckpointError(f"{path} does not exist", remedy=remedy)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", remedy=remedy)
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            f"{path} is no file of weights that can be read",
            remedy=f"weights end in {', '.join(SUFFIXES)}",
        )
    header: dict[str, str] = {}
    content: object
    if path.suffix.lower() == ".safetensors":
        header, content = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict", remedy=_NO_NETWORK)
    state: dict[str, Tensor] = {}
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path} holds more than tensors", remedy=_NO_NETWORK)
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {ascii(key)[:80]} is not a plain float tensor")
        state[key] = tensor.float()
    return header, state


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            if "qtool.format" in header:
                raise CheckpointError(
                    f"{path} is a quantized checkpoint, not the weights of a float network",
                    remedy="name the float weights it was made from",
                )
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error})",
            remedy="the file is damaged: copy or fetch it again",
        ) from error
    if _DATA_HASH in header and _data_sha256(path) != header[_DATA_HASH]:
        raise CheckpointError(
            f"{path} is damaged: its tensors do not match their checksum",
            remedy="copy or fetch it again",
        )
    return header, state


def _data_sha256(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and what it holds will not be run",
            remedy="load it where you trust it and save its state dict alone",
        ) from error
    # The reader answers a damaged file with almost any exception.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({' '.join(str(error).split())[:100] or type(error).__name__})",
            remedy="the file may be damaged or no checkpoint of PyTorch",
        ) from error


def _described(path: Path, text: str) -> dict[str, Any]:
    """The description in a file of ours, checked."""
    content = sources.read_json(text, origin=f"the description in {path}")
    name, arguments = content.get("network"), content.get("network_args")
    known = {spec.name for spec in demoire.NETWORKS}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(
            f"{path} is for a network {ascii(name)[:40]}, which is unknown here",
            remedy="use the version of qtool that wrote it, or " + _NO_NETWORK,
        )
    if not isinstance(arguments, dict) or not are_harmless(arguments):
        raise CheckpointError(f"{path} has no valid arguments of its network")
    return content


def are_harmless(arguments: Mapping[str, Any]) -> bool:
    """Tell whether a network can be built with these arguments without harm, whoever wrote them."""
    return all(map(_is_harmless, arguments.values()))


def _is_harmless(value: object) -> bool:
    return isinstance(value, bool | str) or (
        isinstance(value, int) and 0 < value <= _LARGEST_ARGUMENT
    )


def _recognised(path: Path, state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Tell a published network by its keys; widths and depths are read off shapes."""
    if "pre_block1.adaptive_implicit_trans1.it_weights.it_weights" in state:
        return "mbcnn", {}
    first = state.get("encoder.conv_first.0.weight")
    decoder = state.get("decoder.preconv_3.conv.0.weight")
    dense = state.get("encoder.encoder_1.rdb.conv_layers.0.conv.0.weight")
    if first is None or decoder is None or dense is None:
        raise CheckpointError(f"{path} holds none of the demoire networks", remedy=_NO_NETWORK)
    blocks = {
        match[1]
        for key in state
        if (match := re.match(r"encoder\.encoder_1\.sam_blocks\.(\d+)\.", key))
    }
    arguments = {
        "encoder_width": first.shape[0],
        "decoder_width": decoder.shape[0],
        "growth": dense.shape[0],
        "sam_blocks": len(blocks),
        "unshuffle": math.isqrt(first.shape[1] // 3),
    }
    for spec in demoire.NETWORKS:
        if spec.residual or not spec.builder.endswith(":ESDNet"):
            continue
        shape = {name: value for name, value in arguments.items() if name != "sam_blocks"}
        published = {"encoder_width": 48, "decoder_width": 64, "growth": 32, "unshuffle": 2}
        if shape == published and arguments["sam_blocks"] == spec.arguments.get("sam_blocks", 1):
            return spec.name, {}
    sizes = ", ".join(f"{name} {value}" for name, value in arguments.items())
    raise CheckpointError(
        f"{path} holds an ESDNet that nobody published ({sizes})", remedy=_NO_NETWORK
    )


def _filled(
    path: Path, spec: DemoireSpec, arguments: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """Build a network and give it its weights; all of them fit, or none is taken."""
    try:
        # A file may claim any width: its shapes are compared before memory is taken.
        with torch.device("meta"):
            shapes = {
                key: tensor.shape
                for key, tensor in demoire.build(spec.name, arguments).state_dict().items()
            }
    except QtoolError as error:
        raise UsageError(f"{path}: {error.message}", remedy=error.remedy) from error
    problems = [
        *_listed("missing", shapes.keys() - state.keys()),
        *_listed("unknown", state.keys() - shapes.keys()),
        *_listed(
            "of another shape",
            (key for key in shapes.keys() & state.keys() if state[key].shape != shapes[key]),
        ),
        *_listed(
            "not finite", (key for key, tensor in state.items() if not tensor.isfinite().all())
        ),
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit {spec.name}: {'; '.join(problems)}",
            remedy="give weights of exactly this network",
        )
    module = demoire.build(spec.name, arguments)
    module.load_state_dict(dict(state))
    return module


def _listed(problem: str, keys: Iterable[str]) -> list[str]:
    names = sorted(ascii(key)[1:61] for key in keys)
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    plural = "tensor" if len(names) == 1 else "tensors"
    return [f"{len(names)} {plural} {problem} ({names[0]}{more})"]
