"""Labelled pictures for training: split, cached if small, in batches that can be repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtool.api.runtime import notice
from qtool.errors import ImageError, Progress, UsageError
from qtool.io import folders, images
from qtool.io.random_crops import random_crop, shifted
from qtool.models import vision

HELD_OUT = 10
"""One of so many pictures is kept for measuring."""

_SMALL = 64
"""Inputs up to this side are kept in memory, and moved a little instead of cropped."""

_SHIFT = 8
"""Small pictures move by up to one part in so many of their side."""

_PRIME = 1_000_003

Labelled = tuple[Path, int]


@dataclass(frozen=True)
class Split:
    """Labelled files to train on and to measure on."""

    train: list[Labelled]
    held_out: list[Labelled]


def find(folder: Path, *, classes: int, wnids: Sequence[str] = ()) -> Split:
    """Find the pictures of a folder and set every tenth aside.

    Raises:
        UsageError: The folder or its labels are wrong, or there are too few pictures.
    """
    files = folders.read_labelled(folder, num_classes=classes, wnids=wnids)
    held_out = files[::HELD_OUT]
    train = [file for index, file in enumerate(files) if index % HELD_OUT]
    if len(train) < 2:
        raise UsageError(
            f"{folder} has only {len(files)} pictures", remedy="give at least a few per class"
        )
    return Split(train, held_out)


class Pictures:
    """Labelled pictures, decoded once if they are small, else when they are needed.

    Args:
        files: Files and labels.
        data: Size and normalisation of the model's input.
        progress: Told about every picture that is decoded beforehand.
        device: Where small pictures are kept.

    Attributes:
        failed: Files that could not be read beforehand, and why; they are left out.
        small: uint8 (N, 3, H, W), None if pictures are not small.
        labels: (N,), beside them.
    """

    def __init__(
        self,
        files: Sequence[Labelled],
        data: vision.DataConfig,
        progress: Progress | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.data = data
        self.files = list(files)
        self.failed: list[tuple[Path, str]] = []
        self.small: Tensor | None = None
        if max(data.input_size[1:]) <= _SMALL:
            self.small = self._decode_all(progress).to(device)
        self.labels = torch.tensor([label for _, label in self.files], device=device)

    def _decode_all(self, progress: Progress | None) -> Tensor:
        decoded, kept = [], []
        for index, (path, label) in enumerate(self.files):
            try:
                decoded.append(_whole(path, self.data))
                kept.append((path, label))
            except ImageError as error:
                self.failed.append((path, error.message))
            if progress is not None and (index % 100 == 99 or index + 1 == len(self.files)):
                progress("read pictures", index + 1, len(self.files))
        if not decoded:
            raise ImageError("no picture could be read", remedy="check the files of the folder")
        self.files = kept
        return torch.stack(decoded)

    def __len__(self) -> int:
        return len(self.files)

    def whole(self, index: int) -> Tensor:
        """A picture as for evaluation, uint8 (3, H, W).

        Raises:
            ImageError: It cannot be read.
        """
        return _whole(self.files[index][0], self.data)

    def part(self, index: int, generator: torch.Generator) -> Tensor:
        """A picture as for training, uint8 (3, H, W).

        Raises:
            ImageError: It cannot be read.
        """
        image = images.load_rgb(self.files[index][0])
        return random_crop(image, size=self.data.input_size[1:], generator=generator)


def batches_in(count: int, batch_size: int) -> int:
    """Training batches of one epoch; the last one that is not full is left out."""
    return max(1, count // batch_size)


def training_batches(
    pictures: Pictures,
    *,
    batch_size: int,
    epoch: int,
    seed: int,
    first: int = 0,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch: the same ones for the same arguments, however often it is asked.

    Args:
        pictures: Where they come from.
        batch_size: Pictures in a batch, over all processes.
        epoch: Number of the epoch.
        seed: Chooses order and parts.
        first: Number of the batch to begin with.
        share: Which of how many processes this is; each takes its part of every batch.
        workers: Processes that read pictures.

    Yields:
        Images (B, 3, H, W), normalised, and labels (B,).
    """
    generator = torch.Generator().manual_seed(seed * _PRIME + epoch)
    order = torch.randperm(len(pictures), generator=generator)
    parts = {
        index: order[index * batch_size : (index + 1) * batch_size]
        for index in range(first, batches_in(len(pictures), batch_size))
    }
    own = slice(share[0], None, share[1])
    if pictures.small is None:
        lists = [part[own].tolist() for part in parts.values()]
        yield from _load(pictures, lists, seed=seed, epoch=epoch, workers=workers)
        return
    reach = max(1, pictures.data.input_size[1] // _SHIFT)
    for index, part in parts.items():
        draws = torch.Generator().manual_seed(_mixed(seed, epoch, index))
        places = part.to(pictures.labels.device, non_blocking=True)
        moved = shifted(pictures.small[places], reach=reach, generator=draws)
        yield _normalised(moved[own], pictures.data), pictures.labels[places][own]


def measuring_batches(
    pictures: Pictures, *, batch_size: int, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures in order, as for evaluation: images (B, 3, H, W), normalised, labels (B,)."""
    starts = range(0, len(pictures), batch_size)
    if pictures.small is None:
        order = list(range(len(pictures)))
        parts = [order[start : start + batch_size] for start in starts]
        yield from _load(pictures, parts, seed=0, epoch=None, workers=workers)
        return
    for start in starts:
        part = slice(start, start + batch_size)
        yield _normalised(pictures.small[part], pictures.data), pictures.labels[part]


def _mixed(seed: int, epoch: int, index: int) -> int:
    """One seed of three numbers."""
    return ((seed * _PRIME + epoch) * _PRIME + index) % 2**63


def _normalised(pixels: Tensor, data: vision.DataConfig) -> Tensor:
    """Whole numbers (B, 3, H, W) as a model reads them."""
    statistics = torch.tensor((data.mean, data.std)).view(2, 1, -1, 1, 1)
    statistics = statistics.to(pixels.device, non_blocking=True)
    return (pixels.float() / 255 - statistics[0]) / statistics[1]


def _load(
    pictures: Pictures, parts: list[list[int]], *, seed: int, epoch: int | None, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    loader: DataLoader[Any] = DataLoader(
        _Draws(pictures, seed, epoch),
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=_collate,
    )
    for pixels, labels in loader:
        if len(labels):
            yield _normalised(pixels, pictures.data), labels


class _Draws(Dataset[tuple[Tensor | None, int]]):
    """Pictures by index, as for training in one epoch or, without one, as for evaluation."""

    def __init__(self, pictures: Pictures, seed: int, epoch: int | None) -> None:
        self.pictures, self.seed, self.epoch = pictures, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor | None, int]:
        path, label = self.pictures.files[index]
        try:
            if self.epoch is None:
                return self.pictures.whole(index), label
            generator = torch.Generator().manual_seed(_mixed(self.seed, self.epoch, index))
            return self.pictures.part(index, generator), label
        except ImageError as error:
            notice.warning("%s is left out: %s", path, error.message)
            return None, label


def _collate(rows: list[tuple[Tensor | None, int]]) -> tuple[Tensor, Tensor]:
    good = [(pixels, label) for pixels, label in rows if pixels is not None]
    pixels = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0)
    return pixels, torch.tensor([label for _, label in good], dtype=torch.long)


def _whole(path: Path, data: vision.DataConfig) -> Tensor:
    plain = images.to_tensor(
        images.load_rgb(path),
        size=data.input_size[1:],
        crop_pct=data.crop_pct,
        interpolation=data.interpolation,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    return plain.mul(255).round().to(torch.uint8)
