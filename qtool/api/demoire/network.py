"""The network that restores, and the memory it may take."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtool.api.estimate import warm_seconds
from qtool.api.load import restore
from qtool.api.runtime import bfloat16_is_faster, notice
from qtool.errors import CheckpointError, MissingError, UsageError
from qtool.io import checkpoint
from qtool.methods.undem.restoration import Restorer
from qtool.models import demoire, demoire_weights, sources
from qtool.models.demoire_weights import DemoireNetwork
from qtool.settings.demoire import DemoireSettings

_SHARE_OF_FREE = 0.6
_SHARE_OF_CUDA = 0.8
_INTEGER_MEMORY = 1.25
"""Memory of integer layers, which hold codes beside values, relative to float ones."""

_TIMED_SIDE = 256
_OVERLAP = 1.3
"""Pixels that go through the network for each one of a photograph in tiles."""

_PICTURE_BYTES = 48
"""What one pixel takes outside the network: decoded, changed, encoded, for three photographs."""


def weights_path(settings: DemoireSettings) -> Path:
    """The file of weights that a run takes.

    Raises:
        MissingError: None is named, and none came with this installation; or the repository that
            is named is not cached and cannot be fetched.
    """
    if settings.weights is not None:
        offline = settings.offline or settings.dry_run
        return sources.checkpoint_file(settings.weights, offline=offline)
    if settings.model is not None and not demoire.find(settings.model).bundled:
        raise missing_weights(settings.model)
    return demoire_weights.bundled_path()


def missing_weights(name: str) -> MissingError:
    """The error for a network whose weights do not come with qtool."""
    spec = demoire.find(name)
    return MissingError(
        f"weights of {name} ({spec.parameters * 4:.0f} MB, {spec.paper}) do not come with qtool",
        remedy="their authors offer them for download; name the file with --weights FILE",
    )


def open_network(settings: DemoireSettings) -> DemoireNetwork:
    """Load the network of a run: a float one, or one that `qtool quantize` wrote.

    Raises:
        MissingError: There are no weights.
        CheckpointError: The file does not hold what was asked for.
    """
    path = weights_path(settings)
    arguments: dict[str, Any] = {}
    if settings.head is not None:
        arguments["head"] = settings.head
    if settings.transform is not None:
        arguments["dct"] = settings.transform
    if _is_quantized(path):
        return _quantized(path, name=settings.model, arguments=arguments)
    return demoire_weights.load_network(path, name=settings.model, arguments=arguments)


def _is_quantized(path: Path) -> bool:
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return False
    try:
        return "qtool.format" in sources.read_metadata(path)
    except UsageError:
        # What is wrong with it is said where float weights are read.
        return False


def _quantized(path: Path, *, name: str | None, arguments: Mapping[str, Any]) -> DemoireNetwork:
    """A network that multiplies integers, from its checkpoint alone.

    Raises:
        CheckpointError: The file is damaged, or holds another network or variant.
    """
    header, tensors = checkpoint.read(path)
    if header.task != "restoration":
        raise CheckpointError(
            f"{path} is a quantized classifier ({header.architecture}), not a demoire network",
            remedy="measure it with `qtool eval`, or give a file of `qtool quantize bandgate`",
        )
    module = restore(header, tensors, origin=str(path))
    spec = demoire.find(header.architecture)
    if name not in (None, spec.name):
        raise CheckpointError(
            f"{path} holds weights of {spec.name}, not of {name}",
            remedy=f"use --model {spec.name}, or give weights of {name}",
        )
    own = {**spec.arguments, **header.model_args}
    for key, value in arguments.items():
        if getattr(module, key, value) != value:
            raise CheckpointError(
                f"{path} was quantized with {key} {getattr(module, key)}, not {value}",
                remedy=f"quantize it again as {spec.name},{key}={value}",
            )
    return DemoireNetwork(
        spec=spec,
        module=module,
        arguments=own,
        provenance=header.provenance,
        sha256=sources.sha256(path),
        size_multiple=int(module.size_multiple),  # type: ignore[arg-type]
        residual=bool(module.residual),
        bits=header.active_bits,
    )


def make_restorer(network: DemoireNetwork, device: torch.device) -> Restorer:
    """Put a network where it computes, in the layout that is fastest there."""
    module = network.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # A network that adds to its input loses nothing of it to the short mantissa; integer layers
    # take float32 alone.
    bfloat16 = network.residual and not network.bits and bfloat16_is_faster(device)
    kind = " in bfloat16" if bfloat16 else f" in integers, {network.bits}" if network.bits else ""
    notice.info("network: %s%s", network.spec.name, kind)
    return Restorer(
        network=module,
        result=network.spec.result,
        multiple=network.size_multiple,
        bytes_per_pixel=math.ceil(
            network.spec.bytes_per_pixel * (_INTEGER_MEMORY if network.bits else 1)
        ),
        device=device,
        bfloat16=bfloat16,
        batch_size=4 if device.type == "cuda" else 1,
        tile=network.spec.cpu_tile if device.type == "cpu" else 0,
    )


def seconds_per_megapixel(network: DemoireNetwork, device: torch.device) -> float:
    """Time one tile, and what tiles of a photograph share with their neighbours on top."""
    restorer = make_restorer(network, device)
    picture = torch.full((3, _TIMED_SIDE, _TIMED_SIDE), 0.5)
    picture[:, ::2] = 0.25

    def restore_once() -> None:
        restorer.change(
            lambda rows, columns: picture[:, rows][..., columns], *picture.shape[1:], tile=0
        )

    return _OVERLAP * warm_seconds(restore_once, device) * 1e6 / _TIMED_SIDE**2


def memory_for_network(settings: DemoireSettings, device: torch.device, pixels: int) -> int:
    """Bytes that the network may take for a picture of so many pixels."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_CUDA)
        return free // 4 if settings.memory_bytes is None else min(free, settings.memory_bytes) // 4
    if settings.memory_bytes is None:
        return int(free_memory() * _SHARE_OF_FREE) - _PICTURE_BYTES * pixels
    return settings.memory_bytes - resident_memory() - _PICTURE_BYTES * pixels


def free_memory() -> int:
    """Bytes of main memory that are free, or 4 GiB where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 4 << 30
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return min(int(match[1]) * 1024 if match else 4 << 30, _container_room())


def _container_room() -> int:
    """What the container's limit leaves, or very much without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        return limit - int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 1 << 62


def resident_memory() -> int:
    """Bytes of main memory that this process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def weights_sha256(settings: DemoireSettings) -> str:
    """SHA-256 of the weights a run takes, without loading them.

    Raises:
        QtoolError: There are none.
    """
    path = weights_path(settings)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", remedy="check the path given to --weights")
    return sources.sha256(path)
