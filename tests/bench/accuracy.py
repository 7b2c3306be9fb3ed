"""Accuracy of calibration images, recipes, bits and seeds crossed, resumable, as a table.

    python tests/bench/accuracy.py deit_t --weights W --data PHOTOS --data MORE --work grid/ \\
        --images noise --images spdfq --images real=PHOTOS --bits w4a4 --recipe paper --seed 0

Every image set is made by `qtool synthesize images` and every cell by `qtool quantize` and `qtool
eval`, called as functions; each leaves one JSON file in the work folder, and a second run takes it
from there. With `--results FILE` what was found is kept in one file, and what stands there already
is not measured again. Accuracy is the drop in top-1 points from the float model, same pictures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qtool
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.synthesize import SynthesizeSettings

METHODS = ("noise", "psaq", "spdfq")


@dataclass(frozen=True)
class Cell:
    """One row of the table for one seed."""

    images: str
    recipe: str
    bits: str
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        """A file name."""
        label = self.images.split("=")[0]
        steps = f" {self.steps} steps" if self.steps else ""
        return f"{label}-{self.recipe}-{self.bits.replace(':', '')}{steps}-s{self.seed}"

    @property
    def synthetic(self) -> str | None:
        """The image set to make first, if any."""
        return f"{self.images}-s{self.seed}" if self.images in METHODS else None


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--work", type=Path, required=True, help="folder of images and results")
    parser.add_argument(
        "--images", action="append", required=True, help="noise, psaq, spdfq or NAME=FOLDER"
    )
    parser.add_argument("--bits", action="append", required=True)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--count", type=int, default=32, help="calibration images")
    parser.add_argument("--steps", type=int, help="training steps per block")
    parser.add_argument("--effort", default="standard", help="of the synthesis")
    parser.add_argument("--results", type=Path, help="file to read and keep results in")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    return parser.parse_args()


def kept(path: Path, measure: Any, *arguments: Any) -> dict[str, Any]:
    """What `measure` returns, from its file if it is there."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    started = time.process_time()
    found = measure(*arguments)
    found["cpu_seconds"] = round(time.process_time() - started, 1)
    path.write_text(json.dumps(found, indent=2, default=str))
    return found


def accuracy(options: argparse.Namespace, target: str) -> dict[str, Any]:
    """Top-1 on every picture set; a checkpoint stands alone, its float model is another cell."""
    found = {}
    for data in options.data:
        settings = EvaluateSettings(
            target=target,
            data=data,
            crop_pct=options.crop_pct,
            weights="pretrained" if target.endswith(".safetensors") else options.weights,
            baseline="none",
            batch_size=16,
            offline=True,
        )
        found[data.name] = qtool.evaluate(settings).summary["top1"]
    return {"top1": found}


def synthesize(options: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """One image set."""
    settings = SynthesizeSettings(
        model=options.model,
        weights=options.weights,
        offline=True,
        method=method,
        effort=options.effort,
        count=options.count,
        seed=seed,
        out=options.work / f"{method}-s{seed}",
        resume=True,
        overwrite=True,
    )
    return dict(qtool.synthesize_images(settings).summary)


def quantize(options: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """One cell: quantize, then measure the file."""
    out = options.work / f"{cell.name}.safetensors"
    _, _, folder = cell.images.partition("=")
    settings = QuantizeSettings(
        model=options.model,
        weights=options.weights,
        offline=True,
        bits=cell.bits,
        recipe=cell.recipe,
        seed=cell.seed,
        count=options.count,
        steps=cell.steps,
        calib=Path(folder) if folder else None,
        synthetic=options.work / cell.synthetic if cell.synthetic else None,
        out=out,
        overwrite=True,
    )
    summary = qtool.quantize(settings).summary
    found = accuracy(options, str(out))
    out.unlink()
    return {"quantize": dict(summary), **found}


def run(options: argparse.Namespace, kind: str, cell: Cell | None) -> dict[str, Any]:
    """One job, in a process of its own."""
    torch.set_num_threads(1)
    if cell is None:
        return kept(options.work / "float.json", accuracy, options, options.model)
    if kind == "synthesize":
        path = options.work / f"{cell.synthetic}.json"
        return kept(path, synthesize, options, cell.images, cell.seed)
    return kept(options.work / f"{cell.name}.json", quantize, options, cell)


def measure(options: argparse.Namespace, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Run all jobs, each quantization as soon as its images are there; results by name."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, Cell] = {}
    for cell in cells:
        if cell.synthetic:
            first.setdefault(cell.synthetic, cell)
    with ProcessPoolExecutor(options.jobs) as pool:
        running: dict[Future[dict[str, Any]], tuple[str, Cell | None]] = {}

        def start(kind: str, cell: Cell | None) -> None:
            running[pool.submit(run, options, kind, cell)] = (kind, cell)

        start("float", None)
        for cell in first.values():
            start("synthesize", cell)
        for cell in cells:
            if not cell.synthetic:
                start("quantize", cell)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                kind, done = running.pop(future)
                result = future.result()
                print(f"{kind} {done.name if done else ''}: {result.get('top1', '')}", flush=True)
                if kind == "synthesize" and done is not None:
                    for cell in cells:
                        if cell.synthetic == done.synthetic:
                            start("quantize", cell)
                else:
                    found[done.name if done else "float"] = result
    return found


def print_table(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Drops in Markdown, one row per images, recipe and bits."""
    plain = found["float"]["top1"]
    print(f"float: {plain}")
    print("| images | recipe | bits | mean drop | per seed | drop per picture set |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: dict[str, list[dict[str, float]]] = {}
    for name in sorted(found.keys() - {"float"}):
        row, _, _ = name.rpartition("-s")
        top1 = found[name]["top1"]
        rows.setdefault(row, []).append({key: plain[key] - top1[key] for key in plain})
    for row, seeds in rows.items():
        images, recipe, bits = row.rsplit("-", 2)
        means = [statistics.mean(drops.values()) for drops in seeds]
        sets = " / ".join(f"{statistics.mean(d[p.name] for d in seeds):.1f}" for p in options.data)
        each = ", ".join(f"{mean:.1f}" for mean in means)
        print(f"| {images} | {recipe} | {bits} | {statistics.mean(means):.1f} | {each} | {sets} |")


def main() -> None:
    """Measure what is missing, then print the table."""
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.results
    known = json.loads(results.read_text()) if results and results.exists() else {}
    cells = [
        cell
        for recipe in options.recipe
        for bits in options.bits
        for seed in options.seed
        for images in options.images
        if (cell := Cell(images, recipe, bits, seed, options.steps)).name not in known
    ]
    found = known | (measure(options, cells) if cells or "float" not in known else {})
    if results:
        kept_fields = ("top1", "cpu_seconds")
        rows = {
            name: {key: found[name][key] for key in kept_fields if key in found[name]}
            for name in sorted(found)
        }
        results.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(options, found)


if __name__ == "__main__":
    main()
