"""Accuracy of calibration images, recipes, bits and seeds crossed, resumable, as a table.

    python tests/bench/accuracy.py deit_t --weights W --data C --data V --work grid/ \\
        --pictures real=V --rows noise,psaq,spdfq,real strong w4a4 --seed 0 --seed 1

Every image set is made by `qtool synthesize images` and every cell by `qtool quantize` and `qtool
eval`, called as functions; each leaves one JSON file in the work folder, and a second run takes it
from there. Several processes share the work in the order in which rows are named, seed by seed;
with `--minutes` they start nothing after that time. With `--results FILE` what was found is kept
in one file, and what stands there already is not measured again. Accuracy is the drop in top-1
points from the float model, same pictures, same machine. Below the table stands how well the
agreement that `quantize` reports without labels tells accuracy.

Images are noise, psaq or spdfq; spdfq with some of its parts alone, as spdfq.apa.msr (attention
alignment, blown-up patches, sl for soft labels) or spdfq.bare; either from white noise, as in
spdfq.bare.white and spdfq.white; or the name of real `--pictures`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qtool
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.synthesize import SynthesizeSettings

METHODS = ("noise", "psaq", "spdfq")
PARTS = {"apa": "alignment", "msr": "patches", "sl": "soft-labels"}
WHITE = "white"
FLOAT = "float"


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
        steps = f" {self.steps} steps" if self.steps else ""
        return f"{self.images}-{self.recipe}-{self.bits.replace(':', '')}{steps}-s{self.seed}"

    @property
    def synthetic(self) -> str | None:
        """The image set to make first, if any."""
        method = self.images.split(".")[0]
        return f"{self.images}-s{self.seed}" if method in METHODS else None


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--work", type=Path, required=True, help="folder of images and results")
    parser.add_argument(
        "--rows",
        nargs=3,
        action="append",
        required=True,
        metavar=("IMAGES", "RECIPES", "BITS"),
        help="lists with commas, crossed; repeat in order of importance",
    )
    parser.add_argument(
        "--pictures",
        action="append",
        default=[],
        metavar="NAME=FOLDER[:COUNT]",
        help="real pictures to calibrate on",
    )
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--count", type=int, default=32, help="calibration images")
    parser.add_argument("--steps", type=int, help="training steps per block")
    parser.add_argument("--effort", default="standard", help="of the synthesis")
    parser.add_argument("--results", type=Path, help="file to read and keep results in")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--device", default="cpu", help="of all processes")
    parser.add_argument("--backend", default="auto", help="of the integer operations")
    parser.add_argument("--minutes", type=float, help="start nothing after so long; 0: only show")
    return parser.parse_args(arguments)


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """All cells, the most important first."""
    found = [
        Cell(images, recipe, bits, seed, options.steps)
        for rows in options.rows
        for seed in options.seed
        for recipe in rows[1].split(",")
        for bits in rows[2].split(",")
        for images in rows[0].split(",")
    ]
    return list(dict.fromkeys(found))


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a file that is whole or not there."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(found, indent=1, default=str) + "\n")
    part.replace(path)


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of every command."""
    return {"device": options.device, "backend": options.backend, "offline": True}


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
            batch_size=16 if options.device == "cpu" else 100,
            **common(options),
        )
        found[data.name] = qtool.evaluate(settings).summary["top1"]
    return {"top1": found}


def synthesize(options: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """The image set of a cell."""
    method, *parts = cell.images.split(".")
    start = ("spectrum",) if WHITE in parts else ()
    named = [part for part in parts if part != WHITE]
    wanted = [PARTS[part] for part in named if part != "bare"] if named else PARTS.values()
    settings = SynthesizeSettings(
        model=options.model,
        weights=options.weights,
        method=method,
        effort=options.effort,
        count=options.count,
        seed=cell.seed,
        ablate=(*(part for part in PARTS.values() if part not in wanted), *start),
        out=options.work / str(cell.synthetic),
        resume=True,
        overwrite=True,
        **common(options),
    )
    return dict(qtool.synthesize_images(settings).summary)


def quantize(options: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """One cell: quantize, then measure the file."""
    out = options.work / f"{cell.name}.safetensors"
    named = dict(entry.split("=", 1) for entry in options.pictures)
    folder, _, count = named.get(cell.images, "").partition(":")
    settings = QuantizeSettings(
        model=options.model,
        weights=options.weights,
        bits=cell.bits,
        recipe=cell.recipe,
        seed=cell.seed,
        count=int(count or options.count),
        steps=cell.steps,
        calib=Path(folder) if folder else None,
        synthetic=options.work / cell.synthetic if cell.synthetic else None,
        out=out,
        overwrite=True,
        **common(options),
    )
    summary = qtool.quantize(settings).summary
    found = accuracy(options, str(out))
    out.unlink()
    return {"quantize": dict(summary), **found}


def claimed(options: argparse.Namespace, name: str) -> bool:
    """Whether this process may do the work of that name: nobody did, tried, or is at it."""
    if any((options.work / f"{name}.{end}").exists() for end in ("json", "failed")):
        return False
    try:
        with (options.work / f"{name}.claim").open("x") as claim:
            claim.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def abandoned(claim: Path) -> bool:
    """Whether the process that made a claim is no more."""
    try:
        os.kill(int(claim.read_text()), 0)
    except (ValueError, ProcessLookupError):
        return True
    return False


def kept(
    options: argparse.Namespace,
    name: str,
    measure: Callable[..., dict[str, Any]],
    *arguments: Any,
) -> None:
    """Measure, and leave a file of that name."""
    claim = options.work / f"{name}.claim"
    started, busy = time.monotonic(), time.process_time()
    try:
        found = measure(options, *arguments)
    except Exception:
        print(f"{name} failed\n{traceback.format_exc()}", flush=True)
        claim.replace(claim.with_suffix(".failed"))
        return
    found["seconds"] = round(time.monotonic() - started, 1)
    found["cpu_seconds"] = round(time.process_time() - busy, 1)
    write(options.work / f"{name}.json", found)
    claim.unlink()
    print(f"{name} {found['seconds']} s: {found.get('top1', '')}", flush=True)


def next_job(options: argparse.Namespace, cells: Sequence[Cell]) -> tuple[Any, ...] | None:
    """Claim the most important work that can be done; None while others have to finish theirs."""
    if claimed(options, FLOAT):
        return FLOAT, accuracy, options.model
    for cell in cells:
        images = cell.synthetic
        if images is None or (options.work / f"{images}.json").exists():
            if claimed(options, cell.name):
                return cell.name, quantize, cell
        elif claimed(options, images):
            return images, synthesize, cell
    return None


def work(options: argparse.Namespace, cells: Sequence[Cell], deadline: float) -> None:
    """One process: do what is most important until nothing is left, or no time."""
    torch.set_num_threads(1)
    while time.time() < deadline:
        job = next_job(options, cells)
        if job is not None:
            kept(options, *job)
            continue
        waiting = [c for c in cells if (options.work / f"{c.synthetic}.claim").exists()]
        if not waiting:
            return
        time.sleep(0.5)


def measure(options: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Let processes do what is missing; an interruption ends them and keeps what is done."""
    deadline = time.time() + 60 * options.minutes if options.minutes is not None else float("inf")
    left = [claim for claim in options.work.glob("*.claim") if abandoned(claim)]
    for path in [*left, *options.work.glob("*.failed")]:
        path.unlink()
    context = multiprocessing.get_context("spawn")  # a fork could not use CUDA
    workers = [
        context.Process(target=work, args=(options, cells, deadline)) for _ in range(options.jobs)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()


def collected(options: argparse.Namespace, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is known: from the file of results, and from the work folder."""
    results = options.results
    found = json.loads(results.read_text()) if results and results.exists() else {}
    for name in names:
        path = options.work / f"{name}.json"
        if "agreement" not in found.get(name, {}) and path.exists():
            found[name] = json.loads(path.read_text())
            agreement = found[name].get("quantize", {}).get("held_out_agreement")
            if agreement is not None:
                found[name]["agreement"] = agreement
    return dict(found)


def keep(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> None:
    """Write the file of results."""
    fields = ("top1", "agreement", "cpu_seconds")
    rows = {
        name: {key: found[name][key] for key in fields if key in found[name]}
        for name in sorted(found)
    }
    options.results.write_text(json.dumps(rows, indent=1) + "\n")


def print_table(cells: Sequence[Cell], found: dict[str, dict[str, Any]]) -> None:
    """Mean drop of the seeds, least and most, in Markdown: images and recipes by bits."""
    if FLOAT not in found:
        print("the float model was not measured")
        return
    plain = found[FLOAT]["top1"]
    print(f"float: {plain}")
    bits = list(dict.fromkeys(cell.bits for cell in cells))
    print(f"| calibration | recipe | {' | '.join(bits)} |")
    print("| --- | --- |" + " --- |" * len(bits))
    for images, recipe in dict.fromkeys((cell.images, cell.recipe) for cell in cells):
        row = [c for c in cells if (c.images, c.recipe) == (images, recipe) and c.name in found]
        columns = []
        for wanted in bits:
            tops = [found[cell.name]["top1"] for cell in row if cell.bits == wanted]
            drops = [statistics.mean(plain[name] - top1[name] for name in plain) for top1 in tops]
            columns.append(_spread(drops))
        print(f"| {images} | {recipe} | {' | '.join(columns)} |")
    told = [
        (cell["agreement"], statistics.mean(cell["top1"].values()))
        for cell in found.values()
        if "agreement" in cell
    ]
    if len(told) > 2:
        r = statistics.correlation(*zip(*told, strict=True))
        print(f"agreement on held-out images against top-1: r = {r:.2f}, {len(told)} models")


def _spread(drops: Sequence[float]) -> str:
    """Mean, least and most of the seeds."""
    if len(drops) < 2:
        return f"{drops[0]:.1f}" if drops else ""
    return f"{statistics.mean(drops):.1f} ({min(drops):.1f} to {max(drops):.1f})"


def main() -> None:
    """Measure what is missing, then print the table."""
    options = read_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.work.mkdir(parents=True, exist_ok=True)
    cells = cells_of(options)
    names = [FLOAT, *(cell.name for cell in cells)]
    known = collected(options, names)
    missing = [cell for cell in cells if cell.name not in known]
    if options.minutes != 0 and (missing or FLOAT not in known):
        measure(options, missing)
    found = collected(options, names)
    if options.results:
        keep(options, found)
    print_table(cells, found)


if __name__ == "__main__":
    main()
