"""What training data is worth: the same network and steps on pairs of several kinds.

    python tests/bench/moire_data.py DATA --work DIR --generator FILE [--steps N] [--rows 'A;B']

DATA has the folders moire_unpaired, which pairs are made from, and moire_pairs and clean/kodak24,
which the networks are measured on (`restoration.py`) and which nothing here is trained on. FILE is
a moire generator (`synthesize moire --save-generator`). What is in DIR is not made again; the table
goes to stdout, rows so far to DIR/results.json.

`shooting` is the plain simulation that UnDeM is compared with (Niu et al. 2021): every pixel a
block of three by three with columns of red, green and blue, turned, sampled through a Bayer mosaic
of the same resolution, interpolated, brightened and shrunk; light that the columns cost is lost.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import restoration
import torch
from torch import Tensor
from torch.nn import functional as F

import qtool
from qtool.api.moire_data import read_pictures
from qtool.io import images
from qtool.methods.undem.batches import cropped
from qtool.methods.undem.capture import Draw
from qtool.settings.moire import MoireSettings
from qtool.settings.train import TrainDemoireSettings

SIDE = 160
ROWS = ("shooting", "simulator", "undem", "undem, damaged kept", "simulator and undem")
_CELL = 3
_KEPT = 0.7
_STEEPEST = 20.0
_BRIGHTER = 20 / 255


def turned(picture: Tensor, angles: tuple[float, float, float]) -> Tensor:
    """A square picture (3, S, S) seen after a turn about three axes, in degrees."""
    side = picture.shape[-1]
    x, y, z = (torch.tensor(math.radians(angle)) for angle in angles)
    one, nil = torch.ones(()), torch.zeros(())
    about_x = torch.stack([one, nil, nil, nil, x.cos(), -x.sin(), nil, x.sin(), x.cos()])
    about_y = torch.stack([y.cos(), nil, y.sin(), nil, one, nil, -y.sin(), nil, y.cos()])
    about_z = torch.stack([z.cos(), -z.sin(), nil, z.sin(), z.cos(), nil, nil, nil, one])
    rotation = about_z.view(3, 3) @ about_y.view(3, 3) @ about_x.view(3, 3)
    diagonal = math.sqrt(2) * side
    focal = diagonal / (2 * math.sin(abs(z))) if abs(z) > 0.05 else 10 * diagonal
    focal = min(focal, 10 * diagonal) / (side / 2)
    axis = torch.linspace(-1, 1, side)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    # A point (u, v) of the turned plane, whose middle lies `focal` in front of the camera, is seen
    # in the direction of the first two columns times (u, v) plus that distance.
    away = torch.tensor([0.0, 0.0, focal])[:, None]
    directions = torch.stack([columns, rows, torch.full_like(rows, focal)], -1)
    points = directions @ torch.linalg.inv(torch.cat([rotation[:, :2], away], 1)).T
    seen = points[..., :2] / points[..., 2:]
    return F.grid_sample(picture[None], seen[None], padding_mode="border", align_corners=False)[0]


def shot(picture: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """A plain simulated photograph of a picture (3, S, S), and what it should have been."""
    side = picture.shape[-1]
    blocks = picture.repeat_interleave(_CELL, 1).repeat_interleave(_CELL, 2)
    columns = torch.arange(side * _CELL) % _CELL
    panel = blocks * (columns == torch.arange(3)[:, None]).float()[:, None]
    angles = tuple(draw.uniform(-_STEEPEST, _STEEPEST) for _ in range(3))
    panel, clean = turned(panel, angles), turned(blocks, angles)
    grid = torch.arange(side * _CELL) % 2
    odd = grid[:, None] + grid
    masks = torch.stack([(odd == 0), (odd == 1), (odd == 2)]).float()
    raw = (panel * masks).sum(0) + torch.randn(odd.shape, generator=draw.generator) / 256
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])
    weigh = kernel.view(1, 1, 3, 3).expand(3, 1, 3, 3)
    sums = F.conv2d((raw * masks)[None], weigh, padding=1, groups=3)
    photograph = sums / F.conv2d(masks[None], weigh, padding=1, groups=3)
    both = torch.cat([photograph + _BRIGHTER, clean[None]]).clamp(0, 1)
    small = F.interpolate(both, size=(side, side), mode="bilinear", align_corners=False)
    edge = round(side * (1 - _KEPT) / 2)
    inside = small[:, :, edge : side - edge, edge : side - edge]
    return inside[0], inside[1]


def shoot(clean: Path, out: Path, count: int) -> None:
    """Write `count` plain simulated pairs."""
    pictures = read_pictures(clean, smallest=SIDE)
    wide = math.ceil(SIDE / _KEPT) + 2
    for index in range(count):
        draw = Draw(torch.Generator().manual_seed(index))
        picture = pictures[draw.index(len(pictures))]
        moire, target = shot(cropped(picture, wide, draw), draw)
        for name, pixels in (("clean", target), ("moire", moire)):
            path = out / name / f"{index:05d}.png"
            images.save_png(path, pixels[:, :SIDE, :SIDE], overwrite=True)


def made(out: Path, make: Callable[[Path], None]) -> Path:
    """A folder of pairs, made unless it is there."""
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        make(part)
        part.rename(out)
    return out


def pairs_of(row: str, options: argparse.Namespace) -> Path:
    """The folder of pairs of a row."""
    source = options.data / "moire_unpaired"

    def synthesized(**settings: Any) -> Callable[[Path], None]:
        def make(out: Path) -> None:
            values = {"clean": source / "clean", "count": options.pairs, "patch_size": SIDE}
            qtool.synthesize_moire(
                MoireSettings.build({**values, "out": out, "resume": True, **settings})
            )

        return make

    painted = {"moire": source / "moire", "generator": options.generator}
    makers: dict[str, Callable[[Path], None]] = {
        "shooting": lambda out: shoot(source / "clean", out, options.pairs),
        "simulator": synthesized(simulate=True),
        "undem": synthesized(**painted),
        "undem, damaged kept": synthesized(**painted, denoise=False),
    }
    if row in makers:
        return made(options.work / row.replace(", ", "-").replace(" ", "-"), makers[row])

    def both(out: Path) -> None:
        for number, part in enumerate(("simulator", "undem")):
            folder = pairs_of(part, options)
            for path in sorted((folder / "moire").iterdir())[: options.pairs // 2]:
                for name in ("moire", "clean"):
                    (out / name).mkdir(parents=True, exist_ok=True)
                    shutil.copy(folder / name / path.name, out / name / f"{number}{path.name}")

    return made(options.work / "both", both)


def trained(row: str, options: argparse.Namespace) -> Path:
    """Weights trained on the pairs of a row, and on nothing else."""
    pairs = pairs_of(row, options)
    out: Path = options.work / f"{pairs.name}-{options.steps}-s{options.seed}.safetensors"
    if not out.exists():
        recipe = {"model": "bandgate", "init": "none", "learning_rate": 2e-3, "crop": 128}
        wanted = {"pairs": pairs, "out": out, "steps": options.steps, "seed": options.seed}
        qtool.train_demoire(TrainDemoireSettings.build({**recipe, **wanted, "resume": True}))
    return out


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--generator", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default=";".join(ROWS), help="separated by semicolons")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    plain: dict[str, restoration.Restore] = {
        "photograph as it is": lambda picture: picture,
        "spectrum and median": restoration.classical,
    }
    for row in (*plain, *options.rows.split(";")):
        key = row if row in plain else f"{row}, {options.steps} steps, seed {options.seed}"
        if key not in results:
            restore = plain[row] if row in plain else restoration.network(trained(row, options))
            results[key] = restoration.measured(restore, options.data, limit=None, sheet=None)
            path.write_text(json.dumps(results, indent=1) + "\n")
    for name, found in results.items():
        kodak = found["kodak24_psnr_to_input"]
        cells = [f"{found[key]:.2f}" for key in ("psnr", "psnr_aligned")]
        energies = f"{found['moire_luma']:.2f} / {found['moire_chroma']:.2f}"
        cells = [cells[0], f"{found['ssim']:.3f}", cells[1], energies, f"{kodak['mean']:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
