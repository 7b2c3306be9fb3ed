"""What `qtool eval` measures: float models and checkpoints, opened alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qtool.api import float_source
from qtool.api.file_widths import chosen
from qtool.api.load import load
from qtool.api.runtime import notice
from qtool.errors import CheckpointError, MissingError, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.models import sources, vision
from qtool.quant.switchable import Switchable, layers_of
from qtool.quant.widths import Choice
from qtool.settings.evaluate import EvaluateSettings

ALONE = "none"
"""The baseline that stands for none."""


@dataclass
class Target:
    """A model under test.

    Attributes:
        label: What to call it in tables.
        model: The module.
        data: Preprocessing.
        labels_kind: "imagenet", "demo" or "".
        header: The checkpoint's header, for quantized targets.
        bytes: Size of the file, or of float32 weights.
        file: The checkpoint, for quantized targets.
        digest: SHA-256 of the weights, for float models.
    """

    label: str
    model: nn.Module
    data: vision.DataConfig
    labels_kind: str
    header: checkpoint.Header | None
    bytes: int
    file: Path | None = None
    digest: str = ""

    @property
    def classes(self) -> int:
        """Width of the output."""
        return int(getattr(self.model, "num_classes", 0))


def find_checkpoint(name: str, *, offline: bool) -> Path | None:
    """Find the file that claims to be a checkpoint of ours behind the name of a target.

    A word that names a model means that model, even where a folder of the same name lies.

    Args:
        name: A file, a folder, a hub repository or a float model.
        offline: Look for repositories in the local cache only; no socket is opened.

    Returns:
        The file; None for float models.

    Raises:
        CheckpointError: It is damaged.
        MissingError: The repository is not cached and cannot be fetched.
    """
    if name.startswith(sources.HUB_PREFIXES):
        config = sources.fetch_config(name.partition(":")[2], offline=offline)
        if not sources.is_quantized(sources.read_config(config)):
            return None
    elif os.path.isdir(name) and _is_model(name):
        return None
    path = sources.checkpoint_file(name, offline=offline)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        checkpoint.read_header(path)
    except CheckpointError as error:
        if "is not a qtool checkpoint" in error.message and _is_foreign_weights(path):
            return None
        raise
    return path


def _is_model(name: str) -> bool:
    try:
        vision.resolve(name)
    except QtoolError:
        return False
    return True


def _known_checkpoint(name: str) -> Path | None:
    """Find a checkpoint without a connection, as a plan must: what is not cached is not known."""
    try:
        return find_checkpoint(name, offline=True)
    except MissingError:
        return None


def _is_foreign_weights(path: Path) -> bool:
    """Tell whether a safetensors file holds plain weights that `open_model` may know."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return "qtool.config" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def require_classifier(header: checkpoint.Header, name: str) -> None:
    """Refuse a checkpoint of a network that answers with pictures.

    Raises:
        UsageError: It is one.
    """
    if header.task == "restoration":
        raise UsageError(
            f"{name} holds a network that restores pictures ({header.architecture} "
            f"{header.active_bits}), not a classifier",
            remedy=f"run it with `qtool demoire --weights {name}`, and measure what comes out with "
            "`qtool eval RESULTS --reference TARGETS`",
        )


def open_target(
    name: str, *, weights: str, offline: bool, device: torch.device, bits: str | None = None
) -> Target:
    """Open a checkpoint, a switchable one at `bits` if given, or a float model."""
    path = find_checkpoint(name, offline=offline)
    if path is not None:
        require_classifier(checkpoint.read_header(path), name)
        model = load(path, device=device, bits=bits)
        header: checkpoint.Header = model.qtool_config  # type: ignore[assignment]
        demo = header.architecture == "demo_vit"
        classes = int(getattr(model, "num_classes", 0))
        return Target(
            label=f"{getattr(model, 'active_bits', header.active_bits)} ({_last_part(name)})",
            model=model,
            data=vision.DataConfig.from_dict(header.data),
            labels_kind="demo" if demo else "imagenet" if classes == 1000 else "",
            header=header,
            bytes=path.stat().st_size,
            file=path,
        )
    opened = vision.open_model(name, weights=weights, offline=offline, device=device)
    return Target(
        label=f"float32 ({opened.architecture})",
        model=opened.model,
        data=opened.data,
        labels_kind=opened.labels_kind,
        header=None,
        bytes=sum(p.numel() * 4 for p in opened.model.parameters()),
        digest=opened.weights_sha256,
    )


def _last_part(name: str) -> str:
    """The last part of a path, that of the current folder for a dot."""
    return os.path.basename(os.path.abspath(name.removeprefix(sources.FOLDER_PREFIX)))


def check_widths(target: Target, widths: Sequence[str], *, name: str) -> tuple[str, ...]:
    """Refuse widths that a target lacks.

    Returns:
        The widths as the target runs them: a network of branches, whose weights and activations
        have one width together, runs w4a4 where 4 was asked for.

    Raises:
        UsageError: It is not switchable, or a layer has no such width.
    """
    if widths and not isinstance(target.model, Switchable):
        raise UsageError(
            f"{name} cannot run at other bits", remedy="only files of `quantize --bits any` can"
        )
    layers = layers_of(target.model)
    tied = any(layer.offer.tied for layer in layers.values())
    found = []
    for width in widths:
        specs = chosen(layers, Choice.of(width))
        found.append(str(next(iter(specs.values()))) if tied else width)
    return tuple(dict.fromkeys(found))


def check_names(settings: EvaluateSettings) -> str:
    """Check target and baseline from headers alone.

    Returns:
        The architecture of the target.

    Raises:
        QtoolError: One of them is unknown, absent or damaged.
    """
    path = _known_checkpoint(settings.target)
    header = None if path is None else checkpoint.read_header(path)
    if header is not None:
        require_classifier(header, settings.target)
    offline = settings.offline
    architecture = (
        vision.resolve(settings.target, weights=settings.weights, offline=offline)
        if header is None
        else header.architecture
    )
    baseline = _baseline(settings, header)
    if baseline is not None and not _is_optional(settings) and not _known_checkpoint(baseline[0]):
        vision.resolve(baseline[0], weights=baseline[1], offline=offline)
    return architecture


def open_baseline(
    settings: EvaluateSettings, target: Target, device: torch.device
) -> Target | None:
    """Open the model to measure beside the target: the one named, or a checkpoint's float source.

    Raises:
        UsageError: It cannot take the target's pictures.
        QtoolError: It was named, by `--baseline` or by its `--weights`, and cannot be opened.
    """
    named = _baseline(settings, target.header)
    if named is None:
        return None
    name, weights = named
    try:
        baseline = open_target(name, weights=weights, offline=settings.offline, device=device)
        if settings.baseline is None and baseline.header is not None:
            raise UsageError(f"{name} is no float model any more")
        if _is_optional(settings) and baseline.digest != _digest(target.header):
            raise UsageError(f"the weights of {name} are not those that {settings.target} had")
    except QtoolError as error:
        if not _is_optional(settings):
            raise
        notice.warning(
            "no float baseline: %s; name its weights with --weights, or a model with --baseline",
            error.message,
        )
        return None
    for what, theirs, ours in (
        ("the input size", baseline.data.input_size, target.data.input_size),
        ("the mean", baseline.data.mean, target.data.mean),
        ("the standard deviation", baseline.data.std, target.data.std),
        ("the number of classes", baseline.classes, target.classes),
    ):
        if theirs != ours:
            raise UsageError(
                f"{baseline.label} cannot be the baseline of {target.label}: "
                f"{what} is {theirs}, not {ours}",
                remedy="name another model with --baseline, or other weights with --weights",
            )
    return baseline


def _is_optional(settings: EvaluateSettings) -> bool:
    """Tell whether nobody named a baseline, so that one is only taken if it is there."""
    return settings.baseline is None and settings.weights == float_source.PRETRAINED


def _baseline(
    settings: EvaluateSettings, header: checkpoint.Header | None
) -> tuple[str, str] | None:
    """Name and weights of the model to measure beside a target, None for no such model."""
    if settings.baseline == ALONE:
        return None
    if settings.baseline is not None:
        return settings.baseline, "pretrained" if header is None else settings.weights
    if header is None:
        return None
    name = str(header.provenance.get("source", header.architecture))
    if settings.weights != float_source.PRETRAINED:
        # The file or folder that was the model may have moved; its architecture is the same.
        is_path = float_source.is_path(name)
        return header.architecture if is_path else name, settings.weights
    found = float_source.recall(_digest(header)) or float_source.FloatSource(name)
    return found.model, found.weights


def _digest(header: checkpoint.Header | None) -> str:
    """SHA-256 of the float weights that a checkpoint was made from."""
    return "" if header is None else str(header.provenance.get("weights_sha256", ""))
