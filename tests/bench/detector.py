"""How often the detector sees moire in photographs with it and without it; fits it again.

    python tests/bench/detector.py DATA [--fit]

DATA has the folders moire_pairs, moire_unpaired, clean, imagenet_ccby and imagenet_val. The fit
takes moire_unpaired, every tenth ImageNet picture, the Kodak pictures whose name has an even
CRC-32, and the even drawn ones; a column `unseen` leaves those out.
"""

from __future__ import annotations

import argparse
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qtool.methods.undem import detection
from qtool.methods.undem.content import page

DRAWN = 72
FOUND = 0.95
# Name, pattern, weight in the fit (negative for clean pictures, 0 for none).
SETS = (
    ("screens, fitted", "moire_unpaired/moire/*", 1.0),
    ("clean, fitted", "moire_unpaired/clean/*", -1.0),
    ("screens UHDM", "moire_pairs/uhdm700/*_moire.jpg", 0.0),
    ("targets UHDM", "moire_pairs/uhdm700/*_gt.jpg", 0.0),
    ("screen FHDMi", "moire_pairs/fhdmi/*moire*", 0.0),
    ("Kodak", "clean/kodak24/*", -0.6),
    ("ImageNet CC-BY", "imagenet_ccby/images/*", -0.4),
    ("ImageNet val", "imagenet_val/images/*", -0.4),
)


def seen_in_fit(name: str, index: int, path: str) -> bool:
    """Whether the fit may take this picture."""
    if name == "Kodak":
        return zlib.crc32(path.encode()) % 2 == 0
    return index % {"ImageNet CC-BY": 10, "ImageNet val": 10, "drawn": 2}.get(name, 1) == 0


def drawn(seed: int, height: int = 560, width: int = 800) -> Image.Image:
    """Cloth, a fence, blinds, bricks, checks or a page, in part of a picture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 2 * height, 0 : 2 * width].astype(np.float32) / 2
    x, y = x - width / 2, y - height / 2
    turn = random.uniform(-0.4, 0.4)
    tilt_x, tilt_y = random.uniform(-5e-4, 5e-4, 2)
    depth = 1 + tilt_x * x + tilt_y * y
    u = (x * np.cos(turn) + y * np.sin(turn)) / depth
    v = (y * np.cos(turn) - x * np.sin(turn)) / depth
    first, second, third = random.uniform(40, 225, (3, 3))
    kind = seed % 6
    if kind == 5:
        sheet = page(height, width, torch.Generator().manual_seed(seed))
        return Image.fromarray((sheet.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    period = random.uniform(*((4, 10), (12, 40), (8, 24), (10, 26), (6, 30))[kind])
    if kind == 0:
        mask = 0.5 + 0.5 * np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)
        second = first * random.uniform(0.5, 0.8)
    elif kind == 1:
        mask = ((u / period % 1 < 0.6) & (np.abs(v) < 200)).astype(np.float32)
    elif kind == 2:
        mask, second = v / period % 1, first * 0.45
    elif kind == 3:
        shifted = u / (2.2 * period) + 0.5 * (np.floor(v / period) % 2)
        mask = ((v / period % 1 < 0.12) | (shifted % 1 < 0.06)).astype(np.float32)
    else:
        mask = 0.5 * (u / period % 1 < 0.5) + 0.5 * (v / period % 1 < 0.5)
    picture = first + (second - first) * mask[..., None]
    picture = picture.reshape(height, 2, width, 2, 3).mean((1, 3))
    picture += random.normal(0, random.uniform(0.3, 4), picture.shape)
    edge = int(width * random.uniform(0.3, 1))
    picture[:, edge:] = third + random.normal(0, 2, (height, width - edge, 3))
    coded = io.BytesIO()
    image = Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))
    image.save(coded, "JPEG", quality=90, subsampling=2 if seed % 2 else 0)
    return Image.open(coded)


def measured(image: Image.Image) -> tuple[float, ...]:
    """The numbers that the score weighs."""
    reduced = image.convert("RGB").reduce(detection.reduction(image.height, image.width))
    return detection.features(torch.from_numpy(np.array(reduced)).permute(2, 0, 1) / 255)


def all_sets(data: Path) -> Iterator[tuple[str, float, NDArray[np.float64], NDArray[np.bool_]]]:
    """Name, weight, numbers (N, 7) and which of them the fit may take."""
    for name, pattern, weight in SETS:
        paths = sorted(data.glob(pattern))
        rows = [measured(Image.open(path)) for path in paths]
        mine = [bool(weight) and seen_in_fit(name, i, p.name) for i, p in enumerate(paths)]
        yield name, weight, np.array(rows), np.array(mine)
    rows = [measured(drawn(seed)) for seed in range(DRAWN)]
    yield "drawn", -0.35, np.array(rows), np.arange(DRAWN) % 2 == 0


def fitted(found: list[tuple[str, float, NDArray[np.float64], NDArray[np.bool_]]]) -> None:
    """Print weights and offset of a ridge logistic regression by Newton's method."""
    used = [(weight, rows[mine]) for _, weight, rows, mine in found if weight]
    clean = -sum(weight for weight, _ in used if weight < 0)
    shares = [
        np.full(len(rows), (1 if weight > 0 else -weight / clean) / 2 / len(rows))
        for weight, rows in used
    ]
    share, rows = np.concatenate(shares), np.concatenate([rows for _, rows in used])
    target = np.concatenate([np.full(len(rows), float(weight > 0)) for weight, rows in used])
    mean, spread = rows.mean(0), rows.std(0)
    inputs = np.c_[(rows - mean) / spread, np.ones(len(rows))]
    ridge = 2e-3 * np.diag([1.0] * rows.shape[1] + [0.0])
    solution = np.zeros(inputs.shape[1])
    for _ in range(30):
        sure = 1 / (1 + np.exp(-inputs @ solution))
        slope = inputs.T @ (share * (sure - target)) + ridge @ solution
        bend = (inputs.T * (share * sure * (1 - sure))) @ inputs + ridge
        solution -= np.linalg.solve(bend, slope)
    weights = solution[:-1] / spread
    offset = -np.quantile(rows[target == 1] @ weights, 1 - FOUND)
    print("weights", weights.round(3), "offset", offset.round(3))


def main() -> None:
    """Print the share of each set in which moire is seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    found = list(all_sets(arguments.data))
    for name, _, rows, mine in found:
        seen = np.array([detection.judged(tuple(row)) for row in rows]) >= detection.THRESHOLD
        unseen = f"{100 * seen[~mine].mean():5.1f} % of {(~mine).sum()}" if (~mine).any() else "-"
        print(
            f"{name:16} {100 * seen.mean():5.1f} % of {len(seen):4}   unseen {unseen}", flush=True
        )
    if arguments.fit:
        fitted(found)


if __name__ == "__main__":
    main()
