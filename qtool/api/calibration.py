"""The images that quantization calibrates on: real, synthesized before, or synthesized now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.api.estimate import Estimate
from qtool.api.runtime import notice, read_picture
from qtool.api.synthesize import (
    STEPS,
    TENSORS,
    ResumableSynthesis,
    estimated_seconds,
    read_tensor_file,
    synthesis_config,
    write_tensors,
)
from qtool.errors import CheckpointError, Progress, QtoolError, UsageError
from qtool.io import folders
from qtool.methods.spdfq.priors import Box, magnified
from qtool.models import vision
from qtool.settings.quantize import QuantizeSettings

HELD_OUT = 64
"""Most images kept aside to judge by."""

MOST_WITH_PATCHES = 128
"""Few images are joined by their blown-up patches, up to so many pictures in all."""

LONG_MINUTES = 30
"""A synthesis that will take longer than this is announced."""


@dataclass
class Calibration:
    """Images and where they came from.

    Attributes:
        pixels: (N, 3, H, W), normalised as the model expects.
        method: How they were made, for the checkpoint's provenance.
        summary: What is worth saying about them.
        work: Synthesis whose state may be forgotten once the checkpoint is written.
        priors: Per attention site, the maps synthesized images were aligned to.
        patches: Blown-up patches of the images to train on beside them, (P, 3, H, W). They cost
            nothing, for the synthesis made them show their class too.
        held_out: Images nothing is calibrated on, (M, 3, H, W): other pictures of the folder, other
            synthesized images, or else a quarter of the blown-up patches.
    """

    pixels: Tensor
    method: str
    summary: dict[str, Any] = field(default_factory=dict)
    work: ResumableSynthesis | None = None
    priors: dict[str, Tensor] = field(default_factory=dict)
    patches: Tensor | None = None
    held_out: Tensor | None = None

    @property
    def everything(self) -> Tensor:
        """The images, and behind them their patches."""
        return self.pixels if self.patches is None else torch.cat((self.pixels, self.patches))


def told(summary: Mapping[str, Any]) -> str:
    """What a file was calibrated on, from the summary of its result."""
    patches = f" and {summary['patches']} of their patches" if summary["patches"] else ""
    return f"{summary['count']} images{patches}, {summary['calibration']}"


def source(settings: QuantizeSettings) -> str:
    """Name the source of the images for people."""
    if settings.data_free:
        return "synthesized (spdfq)"
    return f"pictures of {settings.calib}" if settings.calib else f"images of {settings.synthetic}"


def check(settings: QuantizeSettings) -> None:
    """Check before any work that the source of pictures that was named is there.

    Raises:
        UsageError: It is not.
    """
    for folder in (settings.calib, settings.train):
        if folder is not None:
            folders.find_images(folder)
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
        return _read_pictures(settings.calib, opened.data, settings.count, settings.seed)
    if settings.synthetic is not None:
        return _read_synthetic(_synthetic_file(settings.synthetic), opened, settings.count)
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
        state=settings.state,
        resume=settings.resume,
    )
    kept = work.kept_images
    found = _read_kept(work, kept)
    if found is None:
        _announce(settings)
        found = _synthesize(work, kept, progress)
    if found.summary["image_agreement"] < 0.5:
        notice.warning(
            "only %.0f %% of the images are seen as what they should show; try --effort max",
            100 * found.summary["image_agreement"],
        )
    return found


def _announce(settings: QuantizeSettings) -> None:
    """Say before a long synthesis how long it will take, and what would be quicker."""
    if settings.effort == "quick":
        return
    estimate = Estimate(settings.model, weights=settings.weights, device=settings.device)
    minutes, quick = (
        estimated_seconds(
            estimate, method="spdfq", effort=effort, count=settings.count, steps=STEPS[effort]
        )
        / 60
        for effort in (settings.effort, "quick")
    )
    if minutes > LONG_MINUTES:
        notice.warning(
            "making the images will take about %.0f minutes on this machine; --effort quick takes "
            "about %.0f",
            minutes,
            quick,
        )


def _synthesize(work: ResumableSynthesis, kept: Path, progress: Progress | None) -> Calibration:
    """Make images, and keep them so that a run at another width need not make them again."""
    made = work.run(progress)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(kept, made, work.opened, work.config)
    except (OSError, QtoolError) as error:
        notice.info("the images are not kept for the next run: %s", error)
    trained, judged = _shared_out(made.boxes, count=len(made.images))
    return Calibration(
        made.images,
        work.config.method,
        _synthesis_summary(work.config.steps, made.agreement),
        work,
        made.priors,
        patches=magnified(made.images, trained),
        held_out=magnified(made.images, judged),
    )


def _shared_out(boxes: list[Box], *, count: int) -> tuple[list[Box], list[Box]]:
    """The patches to train on beside `count` images, and the last quarter, to judge by."""
    cut = len(boxes) - (len(boxes) + 3) // 4
    return boxes[:cut][: max(0, MOST_WITH_PATCHES - count)], boxes[cut:][:HELD_OUT]


def _read_kept(work: ResumableSynthesis, path: Path) -> Calibration | None:
    """Images that an earlier run made for the same weights with the same settings, if any."""
    if not path.is_file():
        return None
    try:
        found = _read_synthetic(path, work.opened, work.count)
    except CheckpointError as error:
        notice.info("making the images again: %s", error.message)
        return None
    if "image_agreement" not in found.summary:
        return None
    notice.info("calibration images: those that an earlier run kept in %s", path)
    return replace(found, work=work)


def _synthesis_summary(steps: int, agreement: Tensor) -> dict[str, Any]:
    return {
        "synthesis_steps": steps,
        "image_agreement": round(float(agreement.float().mean()), 4),
    }


def _read_pictures(folder: Path, data: vision.DataConfig, count: int, seed: int) -> Calibration:
    """Read up to `count` pictures of a folder, chosen by seed, and some more to judge by."""
    paths = folders.find_images(folder)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(paths), generator=generator).tolist()
    if len(order) < count:
        notice.warning("%s has only %d pictures", folder, len(order))

    def read(chosen: list[int]) -> Tensor:
        return torch.stack([read_picture(paths[index], data) for index in sorted(chosen)])

    others = order[count : count + HELD_OUT]
    return Calibration(
        read(order[:count]), "real images", held_out=read(others) if others else None
    )


def _synthetic_file(folder: Path) -> Path:
    """The file with the exact images in a folder that `qtool synthesize images` made."""
    path = folder / TENSORS
    if not path.is_file():
        raise UsageError(
            f"there is no {TENSORS} in {folder}",
            remedy="make one with `qtool synthesize images MODEL -o DIR`, or use --calib DIR",
        )
    return path


def _read_synthetic(path: Path, opened: vision.OpenedModel, count: int) -> Calibration:
    """Exact images from a file that `write_tensors` wrote."""
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
        config = made.get("config", {})
        method = str(config.get("method", "synthetic images"))
        steps = int(config.get("steps", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has unreadable metadata: {error}", remedy="synthesize the images again"
        ) from error
    if weights not in (None, opened.weights_sha256):
        notice.warning("%s was synthesized from other weights", path)
    boxes = [box for box in _boxes(tensors, pixels) if box.image < count]
    trained, judged = _shared_out(boxes, count=min(count, len(pixels)))
    others = pixels[count : count + HELD_OUT]
    agreement = tensors.get("agreement")
    return Calibration(
        pixels[:count],
        method,
        {} if agreement is None else _synthesis_summary(steps, agreement[:count]),
        priors={
            name.removeprefix("prior."): tensor
            for name, tensor in tensors.items()
            if name.startswith("prior.")
        },
        patches=magnified(pixels, trained),
        held_out=others if len(others) else magnified(pixels, judged),
    )


def _boxes(tensors: dict[str, Tensor], pixels: Tensor) -> list[Box]:
    """The patch boxes of a file of synthesized images, those that lie inside their image."""
    rows = tensors.get("boxes")
    if rows is None or rows.dtype != torch.int64 or rows.dim() != 2 or rows.shape[1] != 5:
        return []
    height, width = pixels.shape[-2:]
    return [
        box
        for box in (Box(*row) for row in rows.tolist())
        if 0 <= box.image < len(pixels)
        and box.side > 0
        and min(box.top, box.left) >= 0
        and box.top + box.side <= height
        and box.left + box.side <= width
    ]
