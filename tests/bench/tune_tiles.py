"""Times every tile of the GPU's linear layer on the shapes of transformers; prints the best.

    python tests/bench/tune_tiles.py --json tiles.json

What it prints fills `LINEAR` in `qtool/engine/kernels/tiles.py`. Kernels are compiled by several
processes first; times come from CUDA graphs of many calls, on random data.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor

from qtool.engine.kernels import linear
from qtool.engine.kernels.tiles import Tile

CANDIDATES = (
    Tile(64, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 64, 256, 4, 3),
    Tile(64, 32, 128, 4, 5),
    Tile(64, 128, 128, 4, 3),
    Tile(64, 128, 128, 4, 4, 168),
    Tile(64, 256, 128, 4, 3),
    Tile(64, 256, 64, 4, 4),
    Tile(128, 64, 128, 4, 4),
    Tile(128, 64, 128, 8, 4, 128),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 128, 128, 8, 4),
    Tile(128, 256, 128, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 128, 16, 3),
)
WIDTHS = (768, 384, 192)
BATCHES = (1, 8, 64)
TOKENS = 197


def arguments(rows: int, channels: int, features: int, kind: str) -> tuple[Any, ...]:
    """What `linear._launch` takes for a layer of 4-bit weights."""
    cuda: dict[str, Any] = {"device": "cuda"}
    torch.manual_seed(0)
    x = (torch.randint(0, 16, (rows, features), **cuda) * 17).to(torch.uint8)
    weight = torch.randint(0, 256, (channels, features // 2), **cuda).to(torch.uint8)
    scale, zero = torch.rand(channels, **cuda), torch.full((channels,), 8, **cuda).int()
    one, middle = torch.full((1,), 0.01, **cuda), torch.full((1,), 100, **cuda).int()
    shared = (x, one, middle, weight, scale, zero, torch.randn(channels, **cuda), 4, features)
    if kind == "values":
        return (torch.empty(rows, channels, **cuda), *shared)
    groups = 3 if kind == "codes" else 1
    step, zeros = torch.full((groups,), 0.3, **cuda), torch.full((groups,), 90, **cuda).int()
    table = (torch.arange(256, **cuda) // 17 * 17).to(torch.uint8).expand(groups, 256)
    if groups == 1:
        table = table[0]
    y = torch.empty(groups, rows, channels // groups, **cuda).to(torch.uint8)
    activation = "gelu" if kind == "gelu" else "none"
    return (y, *shared, activation, step, zeros, table.contiguous(), 8)


def runs(rows: int, channels: int, features: int, kind: str, tile: Tile) -> Any:
    """A call of the kernel with one tile."""
    taken = arguments(rows, channels, features, kind)
    residual: Tensor | None = torch.randn_like(taken[0]) if kind == "values" else None
    return lambda: linear._launch(*taken, residual=residual, tile=tile)


def shapes(width: int) -> list[tuple[str, int, int]]:
    """Endings, channels and features of the four layers of a block."""
    return [
        ("codes", 3 * width, width),
        ("values", width, width),
        ("gelu", 4 * width, width),
        ("values", width, 4 * width),
    ]


def compile_one(task: tuple[str, Tile, int]) -> str:
    """Compile a kernel into the cache that all processes share."""
    kind, tile, features = task
    channels = 768
    try:
        runs(TOKENS, channels, features, kind, tile)()
        torch.cuda.synchronize()
    except Exception as error:  # a tile that this GPU cannot hold is left out
        return f"{kind} {tuple(tile)}: {type(error).__name__} {str(error)[:100]}"
    return ""


def main() -> None:
    """Compile, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tasks = [
        (kind, tile, features)
        for kind, tile in itertools.product(("codes", "values", "gelu"), CANDIDATES)
        for features in ((768, 192) if tile.depth > 64 else (768,))
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for trouble in filter(None, pool.map(compile_one, tasks)):
            print(trouble, flush=True)
    rows_of = []
    for width, batch in itertools.product(WIDTHS, BATCHES):
        for kind, channels, features in shapes(width):
            times = {}
            for tile in CANDIDATES:
                rows = batch * TOKENS
                try:
                    run = runs(rows, channels, features, kind, tile)
                    found = triton.testing.do_bench_cudagraph(run, rep=8, return_mode="median")
                except Exception:
                    continue
                times[tile] = 1e3 * float(found)
            order = sorted(times, key=times.__getitem__)
            operations = 2 * rows * channels * features
            best = times[order[0]]
            print(
                f"{kind:6} {rows:6} x {channels} x {features}: "
                + ", ".join(f"{'x'.join(map(str, t))} {times[t]:.1f}" for t in order[:4])
                + f" us, {operations / best / 1e6:.0f} TOPS",
                flush=True,
            )
            rows_of.append(
                {
                    "kind": kind,
                    "shape": [rows, channels, features],
                    "us": {"x".join(map(str, tile)): round(us, 2) for tile, us in times.items()},
                }
            )
    if options.json:
        options.json.write_text(json.dumps(rows_of) + "\n")


if __name__ == "__main__":
    main()
