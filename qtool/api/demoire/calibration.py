"""The photographs that a demoire network calibrates on: the user's, or simulated ones."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qtool.api.runtime import notice
from qtool.demo import pictures
from qtool.errors import Progress, UsageError
from qtool.io import folders, images
from qtool.methods.undem.batches import cropped
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.simulated import simulated_pair
from qtool.settings.quantize import QuantizeSettings

HELD_OUT = 8
"""Photographs kept aside to judge by."""

_PAGES = 0.5
"""Share of simulated screens that show drawn pages and windows instead of drawn shapes."""

_CONTENT = 8
_CONTENT_SIDE = 384


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """Parts of photographs of screens, display-encoded sRGB in 0..1.

    Attributes:
        pixels: To calibrate on, (N, 3, S, S).
        held_out: To judge by, (M, 3, S, S); M may be 0.
        targets: What the held-out ones should have been, where that is known.
        method: How they were made, for the checkpoint's provenance.
    """

    pixels: Tensor
    held_out: Tensor
    targets: Tensor | None
    method: str


def gather(settings: QuantizeSettings, *, side: int, progress: Progress | None) -> Photographs:
    """Read or simulate photographs of screens.

    Args:
        settings: Their source, number and seed.
        side: Side S of the parts, in pixels.
        progress: Told about every simulated photograph.

    Raises:
        QtoolError: The folder is absent, or a picture damaged or too small.
    """
    if settings.calib is not None:
        return _read(settings.calib, settings.count, side, settings.seed)
    return _simulated(settings.count, side, settings.seed, progress)


def _simulated(count: int, side: int, seed: int, progress: Progress | None) -> Photographs:
    """Photographs of screens that show drawn content; nothing is read."""
    # The seed of drawn pictures has fewer bits than that of a run.
    drawn, _ = pictures.draw(_CONTENT, size=_CONTENT_SIDE, seed=seed % 2**31)
    pairs = []
    for index in range(count + HELD_OUT):
        pair = simulated_pair(list(drawn), size=side, seed=seed, index=index, page_share=_PAGES)
        pairs.append((pair.moire, pair.clean))
        if progress is not None:
            progress("simulate", index + 1, count + HELD_OUT)
    photographs, targets = (torch.stack(part) for part in zip(*pairs, strict=True))
    return Photographs(
        pixels=photographs[:count],
        held_out=photographs[count:],
        targets=targets[count:],
        method="simulated moire",
    )


def _read(folder: Path, count: int, side: int, seed: int) -> Photographs:
    """Parts of photographs, chosen by seed; where there are few, several parts of each."""
    paths = folders.find_images(folder)
    random.Random(seed).shuffle(paths)
    draw = Draw(torch.Generator().manual_seed(seed))
    chosen, others = paths[:count], paths[count : count + HELD_OUT]
    if len(chosen) < count:
        notice.warning("%s has only %d pictures", folder, len(chosen))
    parts: list[Tensor] = []
    for index in range(count):
        parts.append(cropped(_pixels(chosen[index % len(chosen)], side), side, draw))
    held_out = [cropped(_pixels(path, side), side, draw) for path in others]
    return Photographs(
        pixels=torch.stack(parts),
        held_out=torch.stack(held_out) if held_out else torch.empty(0, 3, side, side),
        targets=None,
        method="real photographs",
    )


def _pixels(path: Path, side: int) -> Tensor:
    pixels = torch.from_numpy(np.array(images.load_rgb(path))).permute(2, 0, 1)
    if min(pixels.shape[1:]) < side:
        raise UsageError(
            f"{path} is smaller than the {side} x {side} pixels that calibration takes",
            remedy="calibrate on larger photographs, or with --data-free",
        )
    return pixels.float() / 255
