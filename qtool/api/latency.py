"""How long a model takes, timed beside its float original in the same process."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qtool.api import layer_report
from qtool.api.runtime import bfloat16_is_faster
from qtool.api.target import Target
from qtool.engine import dispatch
from qtool.quant.plan import LayerPlan
from qtool.report import Table
from qtool.settings.evaluate import EvaluateSettings

_ROUNDS = 7


def measure(
    target: Target, baseline: Target | None, settings: EvaluateSettings, device: torch.device
) -> list[dict[str, Any]]:
    """Time float32, bfloat16 and the target in turn, so that a drifting machine is fair to all.

    Args:
        target: The model under test.
        baseline: The float model beside it, if there is one.
        settings: The larger batch to time, a single picture always is; the widths to run at.
        device: Where the models are.

    Returns:
        One record per model and batch.
    """
    runs: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {}
    plain = baseline if baseline is not None else target if target.header is None else None
    if plain is not None and plain.header is None:
        runs["float32"] = (plain.model, False)
        if bfloat16_is_faster(device):
            runs["bfloat16"] = (plain.model, True)
    if settings.widths:
        for width in settings.widths:
            runs[width] = (functools.partial(target.model, bits=width), False)
    elif target.header is not None:
        runs[target.header.active_bits] = (target.model, False)
    results = []
    for batch in sorted({1, settings.batch_size}):
        x = torch.rand(batch, *target.data.input_size, device=device)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(_ROUNDS + 1):
            for name, (model, half) in runs.items():
                seconds = _time_once(model, x, half=half)
                if turn:
                    samples[name].append(seconds)
        words = _backend_words(target, x)
        reference = min(samples.get("float32", [float("nan")]))
        for name, times in samples.items():
            results.append(
                {
                    "model": name,
                    "batch": batch,
                    "min_ms": round(1e3 * min(times), 3),
                    "median_ms": round(1e3 * statistics.median(times), 3),
                    "float32_over_this": round(reference / min(times), 3)
                    if reference == reference
                    else None,
                    "backend": "torch" if name in ("float32", "bfloat16") else words,
                }
            )
    return results


def _time_once(model: Callable[[Tensor], Tensor], x: Tensor, *, half: bool) -> float:
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        started = time.perf_counter()
        model(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - started


def _backend_words(target: Target, x: Tensor) -> str:
    """The backends that multiply in a checkpoint's layers, with the number of layers of each."""
    if target.header is None:
        return "torch"
    if target.header.engine == "branches":
        # A layer of the header runs once in every branch, under another name.
        with dispatch.trace() as decisions, torch.no_grad():
            target.model(x[:1])
        used = [d.backend for d in decisions if d.op.split("::")[-1] == "conv2d"]
    else:
        plans = {
            name: LayerPlan(layer.kind, layer.weight_bits or 0, layer.input_bits or 0)
            for name, layer in target.header.layers.items()
        }
        used = list(layer_report.backends(target.model, plans, x).values())
    return ", ".join(f"{name} x{used.count(name)}" for name in dict.fromkeys(used))


def table(timings: list[dict[str, Any]], device: torch.device) -> Table:
    """The records of `measure` for people."""
    columns = ("model", "batch", "min ms", "median ms", "float32 / this", "backend")
    keys = ("model", "batch", "min_ms", "median_ms", "float32_over_this", "backend")
    threads = torch.get_num_threads()
    place = f"{threads} CPU thread{'s' if threads != 1 else ''}"
    if device.type != "cpu":
        place = f"{device} and {place}"
    title = f"Latency on {place}, interleaved in one process"
    return Table(title, columns, [[row[key] for key in keys] for row in timings])
