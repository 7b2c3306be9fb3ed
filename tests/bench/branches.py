"""Branches on CIFAR-10 ResNet-20: each part of the method left out in turn, over several seeds.

    python tests/bench/branches.py --data DATA --work cells/ --minutes 8 --results FILE

DATA holds `cifar10/train/CLASS.webp` (sheets of 32x32 tiles), `cifar10/cifar10_test.npz` and
`weights/cifar10_resnet20.safetensors`. Every variant starts from the same float weights and gets
the same number of steps and pictures; the learning rate falls to zero over them. The number of
steps is what fits into `--minutes`, measured first with all processes at work, or `--steps`. Test
pictures are only measured on, once, after the last step. A CPU has time for few widths and steps:

    python tests/bench/branches.py --data DATA --work cells/ --widths 2,4,6,8 --batch-size 64 \\
        --steps 160 --minutes 150 --results FILE

Processes share the device, and in each the seeds of a variant take turns on streams of their own.
Every seed of a variant leaves one JSON file in the work folder; a second run measures only what is
missing, with the steps of the first.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qtool.api import branch_data
from qtool.api.branch_run import float_accuracy
from qtool.api.runtime import bfloat16_is_faster, choose_device
from qtool.methods.multiquant.branch_training import BranchTrainer, BranchTraining, accuracy
from qtool.methods.multiquant.branches import branched, observe
from qtool.methods.multiquant.selection import select
from qtool.models import vision
from qtool.models.residual import residual_layout

TILE = 32
OBSERVED = 64
MEASURED = 500
ROUNDS = 20
"""Steps of every seed between two looks at the clock."""
PROBE_SECONDS = 6.0
PROBE_WARM_UP = 6
DIFFERENCE = 0.1
"""What a replayed step may differ by: sums in another order flip a few roundings."""
MARGIN = 0.8
"""Share of the time left that steps are planned for."""
RESERVE = 20.0
"""Seconds before the end at which training stops in any case, to measure what there is."""


@dataclass(frozen=True)
class Variant:
    """What is trained."""

    name: str
    widths: tuple[int, ...]
    amortized: bool = True
    one_set: bool = False
    distill: bool = True

    @property
    def passes(self) -> int:
        """Bodies that run in a step."""
        if self.one_set:
            return len(self.widths)
        chosen = select(self.widths, amortized=self.amortized)
        return sum(len(selection.branches) for selection in chosen.values())


ROWS = {
    "amortized": "the method: branches spread over widths, taught by the widest",
    "prefix": "every width takes the first branches",
    "no-distillation": "labels alone teach",
    "one-set": "one set of weights rounded anew to every width (Any-Precision style), distilled",
    "dedicated": "the branches of one width trained for it alone, one training each",
}


def variants_of(row: str, widths: tuple[int, ...]) -> list[Variant]:
    """What is trained for a row."""
    if row == "dedicated":
        return [Variant(f"dedicated-{width}", (width,)) for width in reversed(widths)]
    changes: dict[str, dict[str, bool]] = {
        "prefix": {"amortized": False},
        "no-distillation": {"distill": False},
        "one-set": {"one_set": True},
    }
    return [Variant(row, widths, **changes.get(row, {}))]


@dataclass(frozen=True)
class Plan:
    """What all trainings have in common."""

    steps: int
    batch_size: int
    learning_rate: float
    bfloat16: bool
    channels_last: bool = True
    replay: bool = True


class Sheets(branch_data.Pictures):
    """Labelled pictures that were never files of their own."""

    def __init__(
        self, pixels: Tensor, labels: Tensor, data: vision.DataConfig, device: torch.device
    ) -> None:
        self.data = data
        self.small, self.labels = pixels.to(device), labels.to(device)

    def __len__(self) -> int:
        return len(self.labels)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of one file per cell")
    parser.add_argument("--results", type=Path, help="file to write")
    parser.add_argument("--variant", action="append", choices=ROWS, help="all, if not given")
    parser.add_argument("--seed", type=int, action="append", help="0, 1 and 2, if not given")
    parser.add_argument("--widths", type=widths_of, default="2,3,4,5,6,7,8")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--steps", type=int, help="steps of every variant; otherwise what fits")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--jobs", type=int, help="processes; 6 on CUDA, else 1, if not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--test", type=int, default=2000, help="test pictures to measure on")
    options = parser.parse_args()
    options.seed = options.seed or [0, 1, 2]
    options.device = choose_device(options.device)
    options.jobs = options.jobs or (6 if options.device.type == "cuda" else 1)
    return options


def widths_of(text: str) -> tuple[int, ...]:
    """Bit-widths with commas between them."""
    return tuple(sorted({int(width) for width in text.split(",")}))


@functools.cache
def train_pictures(folder: Path, device: torch.device) -> Sheets:
    """All training pictures; classes are the sheets in the order of their names."""
    tiles, labels = [], []
    for label, path in enumerate(sorted((folder / "cifar10" / "train").glob("*.webp"))):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
        split = sheet.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
        tiles.append(torch.from_numpy(split.reshape(-1, 3, TILE, TILE).copy()))
        labels.append(torch.full((len(tiles[-1]),), label))
    return Sheets(torch.cat(tiles), torch.cat(labels), float_model(folder, device).data, device)


@functools.cache
def test_pictures(folder: Path, device: torch.device, count: int) -> Sheets:
    """The first test pictures."""
    stored = np.load(folder / "cifar10" / "cifar10_test.npz")
    pixels = torch.from_numpy(stored["x_test"][:count]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(stored["y_test"][:count].astype(np.int64)).flatten()
    return Sheets(pixels, labels, float_model(folder, device).data, device)


@functools.cache
def float_model(folder: Path, device: torch.device) -> vision.OpenedModel:
    """What every variant starts from."""
    weights = folder / "weights" / "cifar10_resnet20.safetensors"
    return vision.open_model("resnet20", weights=weights, offline=True, device=device)


class Lane:
    """One seed of a variant in training, on a stream of its own where there are streams."""

    def __init__(
        self, options: argparse.Namespace, variant: Variant, plan: Plan, seed: int
    ) -> None:
        device = options.device
        opened = float_model(options.data, device)
        train = train_pictures(options.data, device)
        layout = residual_layout(opened.model, input_size=opened.data.input_size)
        self.seed = seed
        self.network, _ = branched(
            opened.model,
            layout,
            widths=variant.widths,
            amortized=variant.amortized,
            one_set=variant.one_set,
            seed=seed,
        )
        config = BranchTraining(
            steps=plan.steps,
            learning_rate=plan.learning_rate,
            distill=variant.distill,
            bfloat16=plan.bfloat16,
            channels_last=plan.channels_last,
            replay=plan.replay,
        )
        self.trainer = BranchTrainer(self.network, config)
        first = branch_data.training_batches(train, batch_size=OBSERVED, epoch=0, seed=seed)
        observe(self.network, next(first)[0])
        self.batches = self._endless(train, plan.batch_size)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.losses: dict[int, Tensor] = {}

    def _endless(self, train: Sheets, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            yield from branch_data.training_batches(
                train, batch_size=batch_size, epoch=epoch, seed=self.seed
            )

    def step(self) -> None:
        """Queue one step."""
        stream: AbstractContextManager[Any] = nullcontext()
        if self.stream is not None:
            stream = torch.cuda.stream(self.stream)
        with stream:
            self.losses = self.trainer.step(*next(self.batches))


_start: Barrier | None = None


def begin(start: Barrier) -> None:
    """Set up a process."""
    global _start
    _start = start
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe(options: argparse.Namespace, plan: Plan) -> tuple[float, float]:
    """Try a plan while all processes do the same.

    Returns:
        Steps a second, and how far a step is from the same one without replay.
    """
    if _start is None:
        raise RuntimeError("the process was not set up")
    try:
        lanes = [
            Lane(options, Variant("amortized", options.widths), plan, seed) for seed in options.seed
        ]
        wait_for(options.device)
        for _ in range(PROBE_WARM_UP):
            for lane in lanes:
                lane.step()
        wait_for(options.device)
        _start.wait(timeout=90)
    except Exception:
        _start.abort()
        raise
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < PROBE_SECONDS:
        for lane in lanes:
            lane.step()
        steps += len(lanes)
        wait_for(options.device)
    rate = steps / (time.monotonic() - started)
    difference = difference_from_plain(options, plan, lanes[0]) if plan.replay else 0.0
    del lane, lanes
    tidy(options.device)
    return rate, difference


def difference_from_plain(options: argparse.Namespace, plan: Plan, lane: Lane) -> float:
    """How far the next step of a lane is from that step without replay, over its length."""
    twin = Lane(
        options, Variant("amortized", options.widths), replace(plan, replay=False), lane.seed
    )
    state = {name: value.clone() for name, value in lane.trainer.state().items()}
    twin.trainer.load_state(state)
    wait_for(options.device)
    batch = next(lane.batches)
    before = weights(twin)
    for one in (lane, twin):
        one.trainer.step(*batch)
    wait_for(options.device)
    plain = weights(twin)
    return float((weights(lane) - plain).norm() / (plain - before).norm())


def weights(lane: Lane) -> Tensor:
    """All parameters, one behind the other."""
    return torch.cat([p.detach().flatten() for p in lane.network.parameters()])


def train(
    options: argparse.Namespace, variant: Variant, plan: Plan, seeds: list[int], deadline: float
) -> list[str]:
    """Train some seeds of a variant and write a file for each; returns what to say about them."""
    started = time.time()
    if started > deadline:
        return [f"{variant.name}: no time left"]
    lanes = [Lane(options, variant, plan, seed) for seed in seeds]
    wait_for(options.device)
    done = 0
    while done < plan.steps and time.time() < deadline:
        for _ in range(min(ROUNDS, plan.steps - done)):
            for lane in lanes:
                lane.step()
            done += 1
        wait_for(options.device)
    seconds = time.time() - started
    test = test_pictures(options.data, options.device, options.test)
    said = []
    for lane in lanes:
        shares = accuracy(lane.network, branch_data.measuring_batches(test, batch_size=MEASURED))
        found = {
            "variant": variant.name,
            "seed": lane.seed,
            "steps": done,
            "top1": {width: round(100 * share, 2) for width, share in shares.items()},
            "losses": {width: round(float(loss), 4) for width, loss in lane.losses.items()},
            "replayed": lane.trainer.replays,
            "seconds": round(seconds, 1),
        }
        cell_file(options, variant, lane.seed).write_text(json.dumps(found))
        said.append(f"{variant.name} seed {lane.seed}: {done} steps, {found['top1']}")
    del lane, lanes
    tidy(options.device)
    return said


def tidy(device: torch.device) -> None:
    """Give memory back that the next networks of this process need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_float(options: argparse.Namespace) -> dict[str, Any]:
    """What the float network gets on the test pictures, and where."""
    test = test_pictures(options.data, options.device, options.test)
    model = float_model(options.data, options.device).model
    on_gpu = options.device.type == "cuda"
    return {
        "float_top1": float_accuracy(model, test, batch_size=MEASURED),
        "test_pictures": len(test),
        "train_pictures": len(train_pictures(options.data, options.device)),
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "CPU",
        "torch": torch.__version__,
    }


def cell_file(options: argparse.Namespace, variant: Variant, seed: int) -> Path:
    """Where the result of one seed lies."""
    path: Path = options.work / f"{variant.name}-s{seed}.json"
    return path


def make_plan(
    options: argparse.Namespace, pool: ProcessPoolExecutor, passes: int, deadline: float
) -> Plan:
    """The plan of an earlier run, or one that fits: the fastest numbers, and as many steps."""
    path = options.work / "plan.json"
    if path.exists():
        return Plan(**json.loads(path.read_text()))
    usual = Plan(
        steps=options.steps or 1_000_000,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        bfloat16=bfloat16_is_faster(options.device),
    )
    plan = usual
    if options.steps is None:
        ways = [usual]
        if options.device.type == "cuda":
            ways = [
                replace(usual, bfloat16=half, channels_last=last)
                for last, half in itertools.product((True, False), (False, True))
            ]
            ways.append(replace(ways[0], replay=False))
        tried = [ways[number % len(ways)] for number in range(options.jobs)]
        futures = [pool.submit(probe, options, way) for way in tried]
        rates: dict[Plan, list[float]] = {}
        for way, future in zip(tried, futures, strict=True):
            words = f"bfloat16={way.bfloat16} channels_last={way.channels_last}"
            words = f"probe {words} replay={way.replay}"
            if error := future.exception():
                print(f"{words}: failed: {error!r}", flush=True)
                continue
            rate, difference = future.result()
            print(f"{words}: {rate:.2f} steps/s, differs by {difference:.2g}", flush=True)
            if difference < DIFFERENCE:
                rates.setdefault(way, []).append(rate)
        if not rates:
            raise SystemExit("no way of training works here")
        best = max(rates, key=lambda way: statistics.mean(rates[way]))
        together = (
            statistics.mean(rates[best])
            * options.jobs
            * Variant("amortized", options.widths).passes
        )
        left = deadline - time.time()
        plan = replace(best, steps=max(1, int(MARGIN * left * together / passes)))
    path.write_text(json.dumps(asdict(plan)))
    return plan


def measure(options: argparse.Namespace, variants: list[Variant]) -> None:
    """Train what is missing."""
    deadline = time.time() + 60 * options.minutes - RESERVE
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(options.jobs)
    by_length = sorted(variants, key=lambda variant: -variant.passes)
    passes = sum(variant.passes for variant in variants) * len(options.seed)
    with ProcessPoolExecutor(options.jobs, context, begin, (start,)) as pool:
        facts = pool.submit(measure_float, options)
        plan = make_plan(options, pool, passes, deadline)
        (options.work / "float.json").write_text(json.dumps(facts.result()))
        print(f"{plan}, float {facts.result()['float_top1']}", flush=True)
        futures = []
        for variant in by_length:
            missing = [seed for seed in options.seed if not finished(options, variant, seed, plan)]
            if missing:
                futures.append(pool.submit(train, options, variant, plan, missing, deadline))
        for future in as_completed(futures):
            try:
                print("\n".join(future.result()), flush=True)
            except BrokenProcessPool:
                raise
            except Exception as error:
                print(f"failed: {error!r}", flush=True)
            collect(options)


def finished(options: argparse.Namespace, variant: Variant, seed: int, plan: Plan) -> bool:
    """Whether a cell has had all its steps."""
    path = cell_file(options, variant, seed)
    return path.exists() and json.loads(path.read_text())["steps"] == plan.steps


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """All that lies in the work folder as one record, written if a file is asked for."""
    plan = json.loads((options.work / "plan.json").read_text())
    facts = json.loads((options.work / "float.json").read_text())
    budget = plan | {"pictures_seen": plan["steps"] * plan["batch_size"]}
    budget["epochs"] = round(budget["pictures_seen"] / facts["train_pictures"], 2)
    widths = len(options.widths)
    rows: dict[str, Any] = {}
    for row, meaning in ROWS.items():
        cells = [
            json.loads(path.read_text())
            for variant in variants_of(row, options.widths)
            for seed in options.seed
            if (path := cell_file(options, variant, seed)).exists()
        ]
        if not cells:
            continue
        top1: dict[int, dict[int, float]] = {}
        for cell in cells:
            top1.setdefault(cell["seed"], {}).update(
                {int(width): value for width, value in cell["top1"].items()}
            )
        whole = [statistics.mean(found.values()) for found in top1.values() if len(found) == widths]
        rows[row] = {
            "meaning": meaning,
            "steps": sorted({cell["steps"] for cell in cells}),
            "replayed": all(cell["replayed"] for cell in cells),
            "seconds": sum(cell["seconds"] for cell in cells),
            "top1": {
                width: spread([found[width] for found in top1.values() if width in found])
                for width in options.widths
            },
            "mean_over_widths": spread(whole),
        }
    results = {"model": "CIFAR-10 resnet20", **facts, "widths": list(options.widths)}
    results |= {"budget": budget, "rows": rows}
    if options.results:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    return results


def spread(values: list[float]) -> dict[str, Any] | None:
    """Mean and sample standard deviation of some seeds."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "mean": round(statistics.mean(values), 2),
        "std": None if deviation is None else round(deviation, 2),
        "seeds": [round(value, 2) for value in values],
    }


def shown(found: dict[str, Any] | None) -> str:
    """Mean and spread as words."""
    if found is None:
        return "-"
    return f"{found['mean']:.2f}" + ("" if found["std"] is None else f" ± {found['std']:.2f}")


def print_table(results: dict[str, Any]) -> None:
    """Top-1 in Markdown, one row per variant."""
    budget = results["budget"]
    print(
        f"float {results['float_top1']}; {budget['steps']} steps of {budget['batch_size']} "
        f"({budget['epochs']} epochs of {results['train_pictures']}), "
        f"{results['test_pictures']} test pictures, {results['device']}"
    )
    widths = results["widths"]
    print(f"| variant | {' | '.join(map(str, widths))} | mean |")
    print("| --- |" + " --- |" * (len(widths) + 1))
    for name, row in results["rows"].items():
        short = "" if row["steps"] == [budget["steps"]] else f" (cut short: {row['steps']})"
        values = " | ".join(shown(row["top1"][width]) for width in widths)
        print(f"| {name}{short} | {values} | {shown(row['mean_over_widths'])} |")


def main() -> None:
    """Measure what is missing, then print all there is."""
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = options.variant or ROWS
    variants = [variant for row in rows for variant in variants_of(row, options.widths)]
    try:
        measure(options, variants)
    except BrokenProcessPool as error:
        print(f"a process died: {error}", flush=True)
    print_table(collect(options))


if __name__ == "__main__":
    main()
