"""`qtool demoire` on JPEGs of 12 megapixels beside the plain forward pass of the same network.

    python tests/bench/demoire.py bandgate esdnet --rounds 3 --json demoire.json

Every measurement is a process of its own, both sides in alternation. The plain side is one float32
pass over a whole picture that is in memory already, without reading, tiles, blending or writing. A
name is the bundled network or one with random weights: time does not depend on them. Peak memory
is that of the process, PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import qtool
from qtool.models import demoire, demoire_weights
from qtool.settings.demoire import DemoireSettings

BUNDLED = "bandgate"


def weights_of(name: str, folder: Path) -> Path:
    """A file of weights for a network."""
    if name == BUNDLED:
        return demoire_weights.bundled_path()
    torch.manual_seed(0)
    path = folder / f"{name}.pth"
    torch.save(demoire.build(name).state_dict(), path)
    return path


def draw(path: Path, height: int, width: int, seed: int) -> None:
    """A photograph: smooth colour, fine noise and bands, as a JPEG of quality 92."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(40, 216, (24, 32, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    rows, columns = np.mgrid[:height, :width]
    bands = 12 * np.sin(columns * 0.21 + rows * 0.04)[..., None] * (1, -1, 0.5)
    noisy = smooth + bands + random.normal(0, 3, smooth.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def tool(weights: Path, folder: Path, threads: int) -> dict[str, float]:
    """Files to files."""
    photographs = sorted(folder.glob("*.jpg"))
    with tempfile.TemporaryDirectory() as out:
        settings = DemoireSettings(
            paths=tuple(map(str, photographs)),
            out=out,
            weights=weights,
            threads=threads,
            device="cpu",
            force=True,
        )
        started = time.perf_counter()
        found = qtool.demoire(settings)
        seconds = (time.perf_counter() - started) / len(photographs)
    if any(item["status"] != "ok" for item in found.items):
        raise SystemExit(f"not restored: {found.items}")
    return {"seconds": seconds, "tile": found.items[0].get("tile", -1)}


def plain(weights: Path, folder: Path, threads: int) -> dict[str, float]:
    """The network alone."""
    torch.set_num_threads(threads)
    network = demoire_weights.load_network(weights)
    with Image.open(next(folder.glob("*.jpg"))) as image:
        width, height = image.size
    multiple = network.size_multiple
    picture = torch.rand(1, 3, height + -height % multiple, width + -width % multiple)
    started = time.perf_counter()
    with torch.inference_mode():
        network.module(picture)
    return {"seconds": time.perf_counter() - started}


def one(side: str, weights: Path, folder: Path, threads: int) -> None:
    """What a process of its own does."""
    found = {"tool": tool, "plain": plain}[side](weights, folder, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak_bytes": peak}))


def measured(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides in alternation: medians, and their ratio."""
    weights = weights_of(name, folder)
    rounds: dict[str, list[dict[str, float]]] = {"tool": [], "plain": []}
    for _ in range(options.rounds):
        for side, rows in rounds.items():
            words = [side, str(weights), str(folder), str(options.threads)]
            ran = subprocess.run(
                [sys.executable, __file__, "--one", *words], check=True, capture_output=True
            )
            rows.append(json.loads(ran.stdout))
    height, width = options.size
    row: dict[str, Any] = {"network": name, "megapixels": round(height * width / 1e6, 1)}
    for side, rows in rounds.items():
        row[f"{side}_seconds"] = round(statistics.median(r["seconds"] for r in rows), 2)
        row[f"{side}_peak_gb"] = round(max(r["peak_bytes"] for r in rows) / 1e9, 2)
    row["megapixels_per_second"] = round(row["megapixels"] / row["tool_seconds"], 2)
    row["speed_ratio"] = round(row["plain_seconds"] / row["tool_seconds"], 2)
    row["memory_ratio"] = round(row["tool_peak_gb"] / row["plain_peak_gb"], 2)
    row["tile"] = rounds["tool"][0]["tile"]
    return row


def main() -> None:
    """Print one line of JSON per network."""
    if sys.argv[1:2] == ["--one"]:
        side, weights, folder, threads = sys.argv[2:]
        one(side, Path(weights), Path(folder), int(threads))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("networks", nargs="+", choices=[spec.name for spec in demoire.NETWORKS])
    parser.add_argument("--size", type=int, nargs=2, default=(3000, 4000), help="height, width")
    parser.add_argument("--photographs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(options.photographs):
            draw(folder / f"{index}.jpg", *options.size, seed=index)
        for network in options.networks:
            rows.append(measured(network, options, folder))
            print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
