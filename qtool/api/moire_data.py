"""Reading what moire synthesis and demoire training learn from: folders, pairs, generators."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from qtool.errors import CheckpointError, UsageError
from qtool.io import container, folders, images
from qtool.methods.undem.complexity import Grouping
from qtool.methods.undem.denoise import Painter, painter_from
from qtool.methods.undem.generator import Variant

MOIRE, CLEAN = "moire", "clean"
"""Sub-folders of a folder of pairs."""

_LARGEST = 1536
_READERS = 8
_GENERATOR_KEY = "qtool.moire_generator"


class Pictures(Sequence[Tensor]):
    """Pictures held as bytes and handed out as (3, H, W) in 0..1.

    Args:
        stored: Pictures (3, H, W), uint8.
    """

    def __init__(self, stored: Sequence[Tensor]) -> None:
        self._stored = list(stored)

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Tensor | Pictures:
        """One picture, or a part of them."""
        if isinstance(index, slice):
            return Pictures(self._stored[index])
        return self._stored[index].float() / 255

    @property
    def size(self) -> int:
        """Bytes that all pictures take."""
        return sum(picture.numel() for picture in self._stored)

    def to(self, device: torch.device) -> Pictures:
        """The same pictures, held by a device."""
        return Pictures([picture.to(device, non_blocking=True) for picture in self._stored])

    def split(self, every: int) -> tuple[Pictures, Pictures]:
        """All but every n-th picture, and every n-th; a single picture is in both."""
        kept = [x for index, x in enumerate(self._stored) if index % every]
        held = [x for index, x in enumerate(self._stored) if index % every == 0]
        return Pictures(kept or held), Pictures(held)


class Pairs(Sequence[tuple[Tensor, Tensor]]):
    """Moire and clean pictures of equal size, number by number.

    Args:
        moire: With moire.
        clean: Without.
    """

    def __init__(self, moire: Pictures, clean: Pictures) -> None:
        self.moire, self.clean = moire, clean

    def __len__(self) -> int:
        return len(self.moire)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor] | Pairs:
        """One pair, or a part of them."""
        if isinstance(index, slice):
            return Pairs(self.moire[index], self.clean[index])
        return self.moire[index], self.clean[index]

    @property
    def size(self) -> int:
        """Bytes that all pairs take."""
        return self.moire.size + self.clean.size

    def to(self, device: torch.device) -> Pairs:
        """The same pairs, held by a device."""
        return Pairs(self.moire.to(device), self.clean.to(device))

    def split(self, every: int) -> tuple[Pairs, Pairs]:
        """All but every n-th pair, and every n-th."""
        (moire, held_moire), (clean, held_clean) = self.moire.split(every), self.clean.split(every)
        return Pairs(moire, clean), Pairs(held_moire, held_clean)


Holder = TypeVar("Holder", Pictures, Pairs)


def read_pictures(folder: Path, *, smallest: int) -> Pictures:
    """Read all pictures of a folder; of very large ones the middle.

    Args:
        folder: Where they are.
        smallest: Shortest side that is of use.

    Raises:
        UsageError: There is no picture that is large enough.
        ImageError: One cannot be read.
    """
    found = _read(folders.find_images(folder))
    large = [_middle(picture) for picture in found if min(picture.shape[-2:]) >= smallest]
    if not large:
        raise UsageError(
            f"no picture in {folder} has {smallest} pixels on its shorter side",
            remedy="give larger pictures, or ask for smaller patches",
        )
    return Pictures(large)


def read_pairs(folder: Path, *, smallest: int) -> Pairs:
    """Read `moire/NAME` beside `clean/NAME`, whatever the suffix.

    Raises:
        UsageError: A picture has no partner, or a partner of another size.
        ImageError: One cannot be read.
    """
    sides = {
        side: {path.stem: path for path in folders.find_images(folder / side)}
        for side in (MOIRE, CLEAN)
    }
    alone = sorted(sides[MOIRE].keys() ^ sides[CLEAN].keys())
    if alone:
        raise UsageError(
            f"{alone[0]!r} is in only one of {folder / MOIRE} and {folder / CLEAN}",
            remedy="pairs have the same name in both folders",
        )
    moire, clean = [], []
    names = list(sides[MOIRE])
    firsts, seconds = (_read([side[name] for name in names]) for side in sides.values())
    for name, first, second in zip(names, firsts, seconds, strict=True):
        if first.shape != second.shape:
            raise UsageError(
                f"the two pictures {name!r} in {folder} differ in size",
                remedy="pairs show the same part of the same picture",
            )
        if min(first.shape[-2:]) >= smallest:
            moire.append(_middle(first))
            clean.append(_middle(second))
    if not moire:
        raise UsageError(
            f"no pair in {folder} has {smallest} pixels on its shorter side",
            remedy="make larger pairs, or choose a smaller --crop",
        )
    return Pairs(Pictures(moire), Pictures(clean))


def near(pictures: Holder, device: torch.device) -> Holder:
    """Pictures where they are used: held by a GPU if a quarter of its free memory takes them."""
    if device.type != "cuda" or pictures.size > torch.cuda.mem_get_info(device)[0] // 4:
        return pictures
    return pictures.to(device)


def _read(paths: Sequence[Path]) -> list[Tensor]:
    """Pictures as bytes, in the order of their paths; decoding leaves Python's lock to others."""
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_bytes, paths))


def _bytes(path: Path) -> Tensor:
    pixels = np.array(images.load_rgb(path), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _middle(picture: Tensor) -> Tensor:
    height, width = picture.shape[-2:]
    tall, wide = min(height, _LARGEST), min(width, _LARGEST)
    top, left = (height - tall) // 2, (width - wide) // 2
    return picture[:, top : top + tall, left : left + wide].clone()


@dataclass(frozen=True, kw_only=True)
class GeneratorFile:
    """What a file of moire generators holds.

    Attributes:
        painters: One per group.
        grouping: Cuts between groups; None for a single group.
        patch: Side of the patches that were grouped.
        crop: Side of the crops it was trained on.
    """

    painters: tuple[Painter, ...]
    grouping: Grouping | None
    patch: int
    crop: int


def write_generator(
    path: Path,
    weights: Sequence[dict[str, Tensor]],
    *,
    thresholds: Sequence[float],
    grouping: Grouping | None,
    variant: Variant,
    patch: int,
    crop: int,
    provenance: dict[str, Any],
    overwrite: bool,
) -> None:
    """Write the painters of all groups, in half precision, with cuts and thresholds."""
    header = {
        "thresholds": list(thresholds),
        "grouping": None
        if grouping is None
        else {"product": grouping.product, "ratios": list(grouping.ratios)},
        "variant": variant,
        "patch": patch,
        "crop": crop,
        "provenance": provenance,
    }
    tensors = {
        f"{group}.{name}": value.half()
        for group, painter in enumerate(weights)
        for name, value in painter.items()
    }
    metadata = {"format": "pt", _GENERATOR_KEY: json.dumps(header, sort_keys=True)}
    container.write_container(path, metadata, tensors, overwrite=overwrite)


def read_generator(path: Path, device: torch.device) -> GeneratorFile:
    """Read a file written by `write_generator`.

    Raises:
        CheckpointError: The file is damaged or something else.
    """
    with container.open_container(path) as file:
        table = container.read_table(file, path)
        tensors = container.read_tensors(file, path, table)
    try:
        header = container.strict_json(table.metadata[_GENERATOR_KEY])
        cuts = header["grouping"]
        grouping = None
        if cuts is not None:
            ratios = tuple(float(ratio) for ratio in cuts["ratios"])
            grouping = Grouping(product=float(cuts["product"]), ratios=ratios)
        thresholds = [float(value) for value in header["thresholds"]]
        patch, crop = int(header["patch"]), int(header["crop"])
        variant: Variant = "published" if header["variant"] == "published" else "own"
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a moire generator", remedy="give a file written with --save-generator"
        ) from error
    painters = []
    for group, limit in enumerate(thresholds):
        prefix = f"{group}."
        part = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        painters.append(painter_from(part, variant=variant, threshold=limit, device=device))
    return GeneratorFile(painters=tuple(painters), grouping=grouping, patch=patch, crop=crop)
