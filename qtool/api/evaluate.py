"""`qtool eval`: accuracy of models and checkpoints, beside the float model, and their latency."""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qtool.api import layer_report
from qtool.api.load import load
from qtool.api.runtime import bfloat16_is_faster, notice, prepare
from qtool.demo import pictures
from qtool.errors import CheckpointError, ImageError, Progress, QtoolError, UsageError
from qtool.io import checkpoint, folders, images
from qtool.io.atomic import write_file
from qtool.metrics.accuracy import standard_error, topk_hits
from qtool.models import vision
from qtool.quant.plan import LayerPlan
from qtool.report import Result, Table
from qtool.settings import EvaluateSettings

METRICS = ("top1", "top5", "drop", "agreement")
"""What `--min` can gate; for `drop`, the largest loss of top-1 points that passes."""

_LATENCY_ROUNDS = 7
_KS = (1, 5)


@dataclass
class Target:
    """A model under test.

    Attributes:
        label: What to call it in tables.
        model: The module.
        data: Preprocessing.
        labels_kind: "imagenet", "demo" or "".
        header: The checkpoint's header, for quantized targets.
        bytes: Size of the file, or of float32 weights.
    """

    label: str
    model: nn.Module
    data: vision.DataConfig
    labels_kind: str
    header: checkpoint.Header | None
    bytes: int


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
        self.crop_pct = crop_pct or data.crop_pct

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str, str]:
        path, label = self.files[index]
        try:
            pixels = images.to_tensor(
                images.load_rgb(path),
                size=self.data.input_size[1:],
                crop_pct=self.crop_pct,
                interpolation=self.data.interpolation,
                mean=self.data.mean,
                std=self.data.std,
            )
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


def is_checkpoint(name: str) -> bool:
    """Tell whether a target is a file that claims to be a checkpoint of ours."""
    path = Path(name)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        checkpoint.read_header(path)
    except CheckpointError as error:
        if "is not a qtool checkpoint" in error.message and _is_foreign_weights(path):
            return False
        raise
    return True


def _is_foreign_weights(path: Path) -> bool:
    """Tell whether a safetensors file holds plain weights that `open_model` may know."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return "qtool.config" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def open_target(name: str, *, weights: str, offline: bool, device: torch.device) -> Target:
    """Open a checkpoint or a float model."""
    if is_checkpoint(name):
        model = load(name, device=device)
        header: checkpoint.Header = model.qtool_config  # type: ignore[assignment]
        demo = header.architecture == "demo_vit"
        classes = int(getattr(model, "num_classes", 0))
        return Target(
            label=f"{header.active_bits} ({Path(name).name})",
            model=model,
            data=vision.DataConfig.from_dict(header.data),
            labels_kind="demo" if demo else "imagenet" if classes == 1000 else "",
            header=header,
            bytes=Path(name).stat().st_size,
        )
    opened = vision.open_model(name, weights=weights, offline=offline, device=device)
    return Target(
        label=f"float32 ({opened.architecture})",
        model=opened.model,
        data=opened.data,
        labels_kind=opened.labels_kind,
        header=None,
        bytes=sum(p.numel() * 4 for p in opened.model.parameters()),
    )


def _open_baseline(
    settings: EvaluateSettings, target: Target, device: torch.device
) -> Target | None:
    """The model to measure beside the target: the one named, or a checkpoint's float source."""
    if settings.baseline is not None:
        return open_target(
            settings.baseline, weights="pretrained", offline=settings.offline, device=device
        )
    if target.header is None:
        return None
    provenance = target.header.provenance
    name = str(provenance.get("source", target.header.architecture))
    weights = settings.weights
    recorded = Path(str(provenance.get("weights_source", "")))
    if weights == "pretrained" and recorded.suffix == ".safetensors" and recorded.is_file():
        weights = str(recorded)
    try:
        baseline = open_target(name, weights=weights, offline=settings.offline, device=device)
    except QtoolError as error:
        notice.warning(
            "no float baseline: %s; name one with --baseline, or its weights with --weights",
            error.message,
        )
        return None
    return baseline


def _check_gates(settings: EvaluateSettings) -> None:
    for metric, _ in settings.gates:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS) or list(METRICS)
            raise UsageError(
                f"there is no metric {metric!r} here", remedy=f"choose {' or '.join(near)}"
            )


def plan(settings: EvaluateSettings) -> Result:
    """What `evaluate` would do; loads no weights."""
    _check_gates(settings)
    if settings.report is not None:
        folders.check_output(settings.report, overwrite=True)
    summary = {
        "target": settings.target,
        "data": str(settings.data) if settings.data else "drawn pictures",
        "count": settings.limit or (None if settings.data else settings.count),
        "baseline": settings.baseline,
        "latency": settings.latency,
    }
    if settings.data is not None:
        folders.find_images(settings.data)
    return Result("eval", status="planned", summary=summary)


def _batches(settings: EvaluateSettings, target: Target) -> tuple[Iterator[_Batch], int]:
    """Batches in the target's preprocessing, and the number of pictures."""
    if settings.data is None:
        if target.labels_kind != "demo":
            raise UsageError(
                "a labelled picture set is needed to measure this model",
                remedy="pass --data DIR: class folders, or pictures with a labels.csv; "
                "only demo models can draw their own",
            )
        count = min(settings.count, settings.limit or settings.count)
        return _drawn(target.data, count, settings.batch_size), count
    files = folders.read_labelled(
        settings.data,
        num_classes=int(getattr(target.model, "num_classes", 0)),
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

    Args:
        settings: What to measure, on what.
        progress: Told about every batch.

    Returns:
        One item per model, and per picture that could not be read; gates in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings, damaged files or missing weights.
    """
    _check_gates(settings)
    if settings.report is not None:
        folders.check_output(settings.report, overwrite=True)
    device = prepare(settings)
    target = open_target(
        settings.target, weights=settings.weights, offline=settings.offline, device=device
    )
    baseline = _open_baseline(settings, target, device)
    batches, total = _batches(settings, target)
    models = [entry for entry in (baseline, target) if entry is not None]
    hits = [dict.fromkeys(_KS, 0) for _ in models]
    agreed = seen = 0
    failed: list[dict[str, Any]] = []
    for batch in batches:
        failed += [
            {"path": path, "status": "failed", "error": message} for path, message in batch.failed
        ]
        if len(batch.labels):
            with torch.no_grad():
                logits = [entry.model(batch.images.to(device)).cpu() for entry in models]
            for counts, values in zip(hits, logits, strict=True):
                for k, number in topk_hits(values, batch.labels, ks=_KS).items():
                    counts[k] += number
            agreed += int((logits[0].argmax(dim=1) == logits[-1].argmax(dim=1)).sum())
        seen += len(batch.labels)
        if progress is not None:
            progress("eval", seen + len(failed), total)
    if not seen:
        raise ImageError("no picture could be read", remedy="check the files listed above")
    items = [_item(entry, counts, seen) for entry, counts in zip(models, hits, strict=True)]
    summary: dict[str, Any] = {"count": seen, "failed": len(failed), **items[-1]}
    if baseline is not None:
        summary["baseline_top1"] = items[0]["top1"]
        summary["drop"] = round(items[0]["top1"] - items[-1]["top1"], 2)
        summary["agreement"] = round(100 * agreed / seen, 2)
    tables = [_accuracy_table(items, summary)]
    if settings.latency:
        timings = _latency(target, baseline, settings, device)
        summary["latency"] = timings
        tables.append(_latency_table(timings))
    problem = _failed_gates(settings, summary)
    result = Result(
        "eval",
        status="failed" if problem else "partial" if failed else "ok",
        items=[*items, *failed],
        summary={**summary, **problem},
        tables=tables,
    )
    if settings.report is not None:
        text = result.to_text(settings.report.suffix)
        write_file(settings.report, text.encode(), overwrite=True)
    return result


def _item(entry: Target, counts: dict[int, int], seen: int) -> dict[str, Any]:
    share = counts[1] / seen
    return {
        "model": entry.label,
        "status": "ok",
        "top1": round(100 * share, 2),
        "top5": round(100 * counts[5] / seen, 2),
        "standard_error": round(100 * standard_error(share, seen), 2),
        "bytes": entry.bytes,
    }


def _accuracy_table(items: list[dict[str, Any]], summary: dict[str, Any]) -> Table:
    rows = []
    for index, item in enumerate(items):
        last = index == len(items) - 1 and "drop" in summary
        rows.append(
            (
                item["model"],
                f"{item['top1']:.1f} ± {item['standard_error']:.1f}",
                f"{item['top5']:.1f}",
                f"{summary['drop']:.1f}" if last else "",
                f"{summary['agreement']:.1f}" if last else "",
                f"{item['bytes'] / 1e6:.2f}",
            )
        )
    columns = ("model", "top-1 %", "top-5 %", "drop", "same choice %", "MB")
    return Table(f"Accuracy on {summary['count']} pictures", columns, rows)


def _failed_gates(settings: EvaluateSettings, summary: dict[str, Any]) -> dict[str, Any]:
    """What goes into the summary when a gate is missed; nothing otherwise."""
    missed = []
    for metric, bound in settings.gates:
        value = summary.get(metric)
        if value is None:
            missed.append(f"{metric} was not measured")
        elif value > bound if metric == "drop" else value < bound:
            missed.append(f"{metric} is {value:g}, not {bound:g}")
    if not missed:
        return {}
    return {
        "error": f"quality gate not met: {'; '.join(missed)}",
        "remedy": "lower the gate with --min, or quantize with more bits or effort",
        "exit_code": 5,
    }


def _latency(
    target: Target, baseline: Target | None, settings: EvaluateSettings, device: torch.device
) -> list[dict[str, Any]]:
    """Time float32, bfloat16 and the target in turn, so that a drifting machine is fair to all."""
    runs: dict[str, tuple[nn.Module, bool]] = {}
    plain = baseline if baseline is not None else target if target.header is None else None
    if plain is not None and plain.header is None:
        runs["float32"] = (plain.model, False)
        if bfloat16_is_faster(device):
            runs["bfloat16"] = (plain.model, True)
    if target.header is not None:
        runs[target.header.active_bits] = (target.model, False)
    results = []
    for batch in sorted({1, settings.batch_size}):
        x = torch.rand(batch, *target.data.input_size, device=device)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(_LATENCY_ROUNDS + 1):
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
                    "backend": "torch" if runs[name][0] is not target.model else words,
                }
            )
    return results


def _time_once(model: nn.Module, x: Tensor, *, half: bool) -> float:
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
    plans = {
        name: LayerPlan(layer.kind, layer.weight_bits or 0, layer.input_bits or 0)
        for name, layer in target.header.layers.items()
    }
    used = list(layer_report.backends(target.model, plans, x).values())
    return ", ".join(f"{name} x{used.count(name)}" for name in dict.fromkeys(used))


def _latency_table(timings: list[dict[str, Any]]) -> Table:
    columns = ("model", "batch", "min ms", "median ms", "float32 / this", "backend")
    keys = ("model", "batch", "min_ms", "median_ms", "float32_over_this", "backend")
    title = "Latency, interleaved in one process"
    return Table(title, columns, [[row[key] for key in keys] for row in timings])
