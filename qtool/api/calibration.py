"""The images that quantization calibrates on: real, synthesized before, or synthesized now."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.api.runtime import notice, read_picture
from qtool.api.synthesize import TENSORS, ResumableSynthesis, read_tensor_file, synthesis_config
from qtool.errors import CheckpointError, Progress, UsageError
from qtool.io import folders
from qtool.models import vision
from qtool.settings.quantize import QuantizeSettings


@dataclass
class Calibration:
    """Images and where they came from.

    Attributes:
        pixels: (N, 3, H, W), normalised as the model expects.
        method: How they were made, for the checkpoint's provenance.
        summary: What is worth saying about them.
        work: Synthesis whose state may be forgotten once the checkpoint is written.
    """

    pixels: Tensor
    method: str
    summary: dict[str, Any] = field(default_factory=dict)
    work: ResumableSynthesis | None = None


def source(settings: QuantizeSettings) -> str:
    """Name the source of the images for people."""
    if settings.data_free:
        return "synthesized (spdfq)"
    return f"pictures of {settings.calib}" if settings.calib else f"images of {settings.synthetic}"


def check(settings: QuantizeSettings) -> None:
    """Check before any work that the source that was named is there.

    Raises:
        UsageError: It is not.
    """
    if settings.calib is not None:
        folders.find_images(settings.calib)
    if settings.synthetic is not None:
        _synthetic_file(settings.synthetic)


def gather(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    *,
    batch_size: int,
    progress: Progress | None,
) -> Calibration:
    """Read or synthesize images.

    Args:
        settings: Their source, number and seed.
        opened: The model they are for.
        batch_size: Images synthesized together.
        progress: Told about every step of synthesis.

    Raises:
        QtoolError: A folder, file or picture is absent, damaged or of the wrong kind.
    """
    if settings.calib is not None:
        pixels = _read_pictures(settings.calib, opened.data, settings.count, settings.seed)
        return Calibration(pixels, "real images")
    if settings.synthetic is not None:
        pixels, method = _read_synthetic(settings.synthetic, opened, settings.count)
        return Calibration(pixels, method)
    config = synthesis_config(
        method="spdfq",
        effort=settings.effort,
        model=opened.model,
        batch_size=batch_size,
        seed=settings.seed,
    )
    work = ResumableSynthesis(
        opened,
        config,
        count=settings.count,
        batch_size=batch_size,
        state=settings.output.with_name(f".{settings.output.name}.resume"),
        resume=settings.resume,
    )
    made = work.run(progress)
    agreement = float(made.agreement.float().mean())
    if agreement < 0.5:
        notice.warning(
            "only %.0f %% of the images are seen as what they should show; try --effort standard",
            100 * agreement,
        )
    summary = {"synthesis_steps": config.steps, "image_agreement": round(agreement, 4)}
    return Calibration(made.images, "spdfq", summary, work)


def _read_pictures(folder: Path, data: vision.DataConfig, count: int, seed: int) -> Tensor:
    """Read up to `count` pictures of a folder, chosen by seed, as the model expects them."""
    paths = folders.find_images(folder)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(paths), generator=generator)[:count].tolist()
    if len(chosen) < count:
        notice.warning("%s has only %d pictures", folder, len(chosen))
    return torch.stack([read_picture(paths[index], data) for index in sorted(chosen)])


def _synthetic_file(folder: Path) -> Path:
    """The file with the exact images in a folder that `qtool synthesize images` made."""
    path = folder / TENSORS
    if not path.is_file():
        raise UsageError(
            f"there is no {TENSORS} in {folder}",
            remedy="make one with `qtool synthesize images MODEL -o DIR`, or use --calib DIR",
        )
    return path


def _read_synthetic(folder: Path, opened: vision.OpenedModel, count: int) -> tuple[Tensor, str]:
    """Exact images of a folder that `qtool synthesize images` made."""
    path = _synthetic_file(folder)
    metadata, tensors = read_tensor_file(path)
    pixels = tensors.get("images")
    expected = tuple(opened.data.input_size)
    if pixels is None or pixels.dtype != torch.float32 or tuple(pixels.shape[1:]) != expected:
        found = "no images" if pixels is None else f"images of shape {tuple(pixels.shape[1:])}"
        raise CheckpointError(
            f"{path} holds {found}, but the model takes {expected}",
            remedy="synthesize images with the model that is quantized",
        )
    if not len(pixels):
        raise CheckpointError(f"{path} holds no images", remedy="synthesize them again")
    try:
        made = json.loads(metadata.get("qtool.synthetic", "{}"))
        weights = made.get("weights_sha256")
        method = str(made.get("config", {}).get("method", "synthetic images"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has unreadable metadata: {error}", remedy="synthesize the images again"
        ) from error
    if weights not in (None, opened.weights_sha256):
        notice.warning("%s was synthesized from other weights", folder)
    return pixels[:count], method
