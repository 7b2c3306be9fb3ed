"""`qtool eval`: accuracy of models and checkpoints, beside the float model, and their latency."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qtool.api import evaluate_widths, latency, restored
from qtool.api.estimate import Estimate
from qtool.api.runtime import (
    check_report,
    planned_device,
    prepare,
    read_picture,
    write_report,
)
from qtool.api.target import (
    Target,
    check_names,
    check_widths,
    open_baseline,
    open_target,
)
from qtool.demo import pictures
from qtool.errors import ImageError, Progress, QualityGateError, UsageError
from qtool.io import folders
from qtool.metrics.accuracy import standard_error, topk_hits
from qtool.models import vision
from qtool.report import Result, Status, Table
from qtool.settings.evaluate import EvaluateSettings

METRICS = ("top1", "top5", "drop", "agreement")
"""What `--min` can gate; for `drop`, the largest loss of top-1 points that passes."""

_KS = (1, 5)


@dataclass
class _Batch:
    images: Tensor
    labels: Tensor
    failed: list[tuple[str, str]]


class _Pictures(Dataset[tuple[Tensor | None, int, str, str]]):
    """Labelled files, read and preprocessed one by one; a bad one becomes a message."""

    def __init__(
        self, files: list[tuple[Path, int]], data: vision.DataConfig, crop_pct: float | None
    ) -> None:
        self.files = files
        self.data = data
        self.crop_pct = crop_pct

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str, str]:
        path, label = self.files[index]
        try:
            pixels = read_picture(path, self.data, crop_pct=self.crop_pct)
        except ImageError as error:
            return None, label, str(path), error.message
        return pixels, label, str(path), ""


def _collate(rows: list[tuple[Tensor | None, int, str, str]]) -> _Batch:
    good = [(pixels, label) for pixels, label, _, _ in rows if pixels is not None]
    return _Batch(
        images=torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0),
        labels=torch.tensor([label for _, label in good], dtype=torch.long),
        failed=[(path, message) for pixels, _, path, message in rows if pixels is None],
    )


def _check_gates(settings: EvaluateSettings) -> None:
    for metric, _ in settings.gates:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS) or list(METRICS)
            raise UsageError(
                f"there is no metric {metric!r} here", remedy=f"choose {' or '.join(near)}"
            )


def _check_data(settings: EvaluateSettings, *, drawable: bool) -> None:
    if settings.data is None and not drawable:
        raise UsageError(
            "a labelled picture set is needed to measure this model",
            remedy="pass --data DIR: class folders, or pictures with a labels.csv; "
            "only demo models can draw their own",
        )


def plan(settings: EvaluateSettings) -> Result:
    """What `evaluate` would do; loads no weights."""
    if settings.reference is not None:
        return restored.plan(settings, settings.reference)
    _check_gates(settings)
    check_report(settings.report, replace=settings.overwrite)
    architecture = check_names(settings)
    _check_data(settings, drawable=architecture == "demo_vit")
    summary: dict[str, Any] = {
        "target": settings.target,
        "architecture": architecture,
        "data": str(settings.data) if settings.data else "drawn pictures",
        "count": settings.limit or (None if settings.data else settings.count),
        "baseline": settings.baseline,
        "latency": settings.latency,
        "device": planned_device(settings),
    }
    if settings.widths:
        summary["bits"] = list(settings.widths)
    pictures = len(folders.find_images(settings.data)) if settings.data else settings.count
    passes = min(pictures, settings.limit or pictures) * max(1, len(settings.widths))
    estimate = Estimate(architecture, weights="pretrained", device=settings.device)
    summary["estimated_seconds"] = math.ceil(estimate.passes(passes))
    return Result("eval", status="planned", summary=summary)


def _batches(settings: EvaluateSettings, target: Target) -> tuple[Iterator[_Batch], int]:
    """Batches in the target's preprocessing, and the number of pictures."""
    _check_data(settings, drawable=target.labels_kind == "demo")
    if settings.data is None:
        count = min(settings.count, settings.limit or settings.count)
        return _drawn(target.data, count, settings.batch_size), count
    files = folders.read_labelled(
        settings.data,
        num_classes=target.classes,
        wnids=vision.imagenet_wnids() if target.labels_kind == "imagenet" else (),
    )
    # Spread evenly, so that a part is as balanced as the whole.
    wanted = min(settings.limit or len(files), len(files))
    files = [files[index * len(files) // wanted] for index in range(wanted)]
    loader: DataLoader[Any] = DataLoader(
        _Pictures(files, target.data, settings.crop_pct),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        collate_fn=_collate,
    )
    return iter(loader), len(files)


def _drawn(data: vision.DataConfig, count: int, batch_size: int) -> Iterator[_Batch]:
    mean = torch.tensor(data.mean).view(1, -1, 1, 1)
    std = torch.tensor(data.std).view(1, -1, 1, 1)
    for start in range(0, count, batch_size):
        drawn, labels = pictures.held_out(
            min(batch_size, count - start), data.input_size[1], start=start
        )
        yield _Batch((drawn - mean) / std, labels, [])


def evaluate(settings: EvaluateSettings, progress: Progress | None = None) -> Result:
    """Measure top-1 and top-5 of a model or checkpoint, the float model beside it.

    With a folder of reference pictures, restored pictures are measured instead.

    Args:
        settings: What to measure, on what.
        progress: Told about every batch.

    Returns:
        One item per model, and per picture that could not be read; gates in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings, damaged files or missing weights.
    """
    if settings.reference is not None:
        return restored.evaluate(settings, settings.reference, progress)
    _check_gates(settings)
    check_report(settings.report, replace=settings.overwrite)
    device = prepare(settings)
    target = open_target(
        settings.target,
        weights=settings.weights,
        offline=settings.offline,
        device=device,
        bits=settings.widths[0] if settings.widths else None,
    )
    widths = check_widths(target, settings.widths, name=settings.target)
    baseline = open_baseline(settings, target, device)
    batches, total = _batches(settings, target)
    runs = [_Run(baseline)] if baseline is not None else []
    runs += [_Run(target, width) for width in widths] or [_Run(target)]
    seen = 0
    failed: list[dict[str, Any]] = []
    for batch in batches:
        failed += [
            {"path": path, "status": "failed", "error": message} for path, message in batch.failed
        ]
        if len(batch.labels):
            first: Tensor | None = None
            for run in runs:
                logits = run.logits(batch.images.to(device))
                first = logits.argmax(dim=1) if first is None else first
                run.count(logits, batch.labels, first)
        seen += len(batch.labels)
        if progress is not None:
            progress("eval", seen + len(failed), total)
    if not seen:
        raise ImageError("no picture could be read", remedy="check the files listed above")
    items = [run.item(seen) for run in runs]
    if baseline is not None:
        for run, item in zip(runs[1:], items[1:], strict=True):
            item["drop"] = round(items[0]["top1"] - item["top1"], 2)
            item["agreement"] = round(100 * run.agreed / seen, 2)
    if widths and target.file is not None:
        evaluate_widths.add_costs(items[-len(widths) :], target.file)
    summary: dict[str, Any] = {"count": seen, "failed": len(failed), **items[-1]}
    if baseline is not None:
        summary["baseline_top1"] = items[0]["top1"]
    tables = [_accuracy_table(items, seen)]
    if settings.latency:
        timings = latency.measure(target, baseline, settings, device)
        summary["latency"] = timings
        summary["threads"] = torch.get_num_threads()
        tables.append(latency.table(timings, device))
    problem = _failed_gates(settings, items if widths else [summary], widths)
    status: Status = "failed" if problem else "partial" if failed else "ok"
    result = Result(
        "eval",
        status=status,
        items=[*items, *failed],
        summary={**summary, **problem, "status": status},
        tables=tables,
        charts=evaluate_widths.charts(items) if widths else (),
    )
    write_report(settings.report, result)
    return result


class _Run:
    """One model, at one width if it has several, and what it got right.

    Attributes:
        agreed: Pictures on which it chose as the first model did.
    """

    def __init__(self, entry: Target, width: str | None = None) -> None:
        self.entry = entry
        self.width = width
        self.hits = dict.fromkeys(_KS, 0)
        self.agreed = 0

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Answers for a batch, on the CPU."""
        options = {} if self.width is None else {"bits": self.width}
        answers: Tensor = self.entry.model(images, **options)
        return answers.cpu()

    def count(self, logits: Tensor, labels: Tensor, first: Tensor) -> None:
        """Count what is right, and what equals the first model's choice."""
        for k, number in topk_hits(logits, labels, ks=_KS).items():
            self.hits[k] += number
        self.agreed += int((logits.argmax(dim=1) == first).sum())

    def item(self, seen: int) -> dict[str, Any]:
        """What was found, for the result."""
        share = self.hits[1] / seen
        return {
            "model": self.width or self.entry.label,
            "status": "ok",
            "top1": round(100 * share, 2),
            "top5": round(100 * self.hits[5] / seen, 2),
            "standard_error": round(100 * standard_error(share, seen), 2),
            "bytes": self.entry.bytes,
        }


def _accuracy_table(items: list[dict[str, Any]], count: int) -> Table:
    rows = []
    widths = any("bit_operations" in item for item in items)
    for item in items:
        row = (
            item["model"],
            f"{item['top1']:.1f} ± {item['standard_error']:.1f}",
            f"{item['top5']:.1f}",
            f"{item['drop']:.1f}" if "drop" in item else "",
            f"{item['agreement']:.1f}" if "agreement" in item else "",
            f"{item['bytes'] / 1e6:.2f}",
        )
        operations = f"{item['bit_operations'] / 1e9:.2f}" if "bit_operations" in item else ""
        rows.append((*row, operations) if widths else row)
    columns = ("model", "top-1 %", "top-5 %", "drop", "same choice %", "MB")
    more = ("G bit operations",) if widths else ()
    return Table(f"Accuracy on {count} pictures", (*columns, *more), rows)


def _failed_gates(
    settings: EvaluateSettings, results: list[dict[str, Any]], widths: tuple[str, ...]
) -> dict[str, Any]:
    """What goes into the summary when a gate is missed; nothing otherwise.

    With several widths every one of them has to pass, the float model beside them has not.
    """
    missed = []
    for metric, bound in settings.gates:
        for result in results:
            if widths and result["model"] not in widths:
                continue
            value = result.get(metric)
            place = f" at {result['model']}" if widths else ""
            if value is None:
                missed.append(f"{metric} was not measured{place}")
            elif value > bound if metric == "drop" else value < bound:
                missed.append(f"{metric}{place} is {value:g}, not {bound:g}")
    if not missed:
        return {}
    return {
        "error": f"quality gate not met: {'; '.join(missed)}",
        "remedy": "lower the gate with --min, or quantize with more bits or effort",
        "exit_code": QualityGateError.exit_code,
    }
