"""`qtool eval FOLDER --reference DIR`: how near restored pictures are to what they should be."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtool.api.estimate import warm_seconds
from qtool.api.runtime import check_report, choose_device, prepare, write_report
from qtool.errors import ImageError, Progress, QualityGateError, UsageError
from qtool.io import folders, images
from qtool.metrics import fidelity, perceptual
from qtool.report import Result, Status, Table
from qtool.settings.evaluate import EvaluateSettings

HARM = "do_no_harm"
"""PSNR of results against what they were made from; low where a clean picture was damaged."""

_LOWER_IS_BETTER = ("moire_luma", "moire_chroma", perceptual.NAME)
_ROLE = re.compile(
    r"^(?:src|tar|res|source|target|input)_|_(?:moire|gt|target|source|clean|input)$"
)
_TARGETS = re.compile(r"^(?:tar|target)_|_(?:gt|target|clean)$")
_TITLES = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "psnr_aligned": "PSNR dB, colour aligned",
    "moire_luma": "moire in luma",
    "moire_chroma": "moire in colour",
    perceptual.NAME: "LPIPS",
    HARM: "PSNR dB to the source",
}


@dataclass(frozen=True, kw_only=True)
class _Trio:
    """A result, what it should be, and what it was made from, if that is known."""

    result: Path
    target: Path
    source: Path | None


def plan(settings: EvaluateSettings, reference: Path) -> Result:
    """What `evaluate` would do, and how long it would take; measures the first picture for that.

    Raises:
        UsageError: The folders do not fit together.
    """
    _check(settings)
    trios, unmatched = _matched(settings, reference)
    device = choose_device(settings.device)
    summary = {
        "target": settings.target,
        "reference": str(reference),
        "protocol": settings.protocol,
        "metrics": _metrics(settings),
        "device": str(device),
        "count": len(trios),
        "without_reference": len(unmatched),
    }
    with contextlib.suppress(ImageError, ValueError):
        seconds = warm_seconds(lambda: _measured(trios[0], settings, device, None), device)
        summary["estimated_seconds"] = math.ceil(len(trios) * seconds)
    return Result("eval", status="planned", summary=summary)


def evaluate(
    settings: EvaluateSettings, reference: Path, progress: Progress | None = None
) -> Result:
    """Measure a folder of results against a folder of targets, picture by picture.

    Args:
        settings: What to measure.
        reference: The folder of targets.
        progress: Told about every picture.

    Returns:
        One item per picture; means, and gates that were missed, in the summary.

    Raises:
        UsageError: The folders do not fit together.
        ImageError: No picture could be measured.
    """
    _check(settings)
    trios, unmatched = _matched(settings, reference)
    device = prepare(settings)
    lpips = None
    if perceptual.NAME in _metrics(settings):
        lpips = perceptual.Lpips(device, offline=settings.offline)
    items: list[dict[str, Any]] = [
        {"path": str(path), "status": "failed", "error": "has no picture to be compared with"}
        for path in unmatched
    ]
    measured: list[dict[str, Any]] = []
    for index, trio in enumerate(trios):
        try:
            measured.append(_measured(trio, settings, device, lpips))
            items.append(measured[-1])
        except (ImageError, ValueError) as error:
            items.append({"path": str(trio.result), "status": "failed", "error": str(error)})
        if progress is not None:
            progress("eval", index + 1, len(trios), trio.result.name)
    if not measured:
        raise ImageError("no picture could be measured", remedy="check the folders")
    names = [name for name in measured[0] if name not in ("path", "status", "reference")]
    means = {name: _mean([item[name] for item in measured]) for name in names}
    failed = len(items) - len(measured)
    summary: dict[str, Any] = {
        "count": len(measured),
        "failed": failed,
        "protocol": settings.protocol,
        "about": fidelity.PROTOCOLS[settings.protocol].about,
        **means,
    }
    problem = _missed(settings, summary)
    status: Status = "failed" if problem else "partial" if failed else "ok"
    result = Result(
        "eval",
        status=status,
        items=items,
        summary={**summary, **problem},
        tables=[_table(settings, summary)],
    )
    write_report(settings.report, result)
    return result


def _check(settings: EvaluateSettings) -> None:
    known = (*fidelity.METRICS, perceptual.NAME, HARM)
    for metric, _ in settings.gates:
        if metric not in known:
            near = difflib.get_close_matches(metric, known) or list(known)
            raise UsageError(
                f"there is no metric {metric!r} here", remedy=f"choose {' or '.join(near)}"
            )
    check_report(settings.report, replace=settings.overwrite)
    if perceptual.NAME in _metrics(settings):
        perceptual.require_package()


def _metrics(settings: EvaluateSettings) -> list[str]:
    """What to measure, in one order; everything there is a folder for when nothing is named.

    LPIPS is measured only when it is named, because its weights are a download.
    """
    gated = {name for name, _ in settings.gates}
    wanted = {*settings.metric, *gated} if settings.metric else {*fidelity.METRICS, HARM, *gated}
    if settings.baseline is None:
        wanted -= {HARM}
    return [name for name in (*fidelity.METRICS, perceptual.NAME, HARM) if name in wanted]


def _matched(settings: EvaluateSettings, reference: Path) -> tuple[list[_Trio], list[Path]]:
    """Results with their targets and sources, matched by name, and results without a target.

    Raises:
        UsageError: A folder is missing or empty, or nothing matches.
    """
    folder = Path(settings.target)
    results = folders.find_images(folder)
    if folder.resolve() == reference.resolve():
        # Pairs in one folder: `0001_moire.jpg` beside `0001_gt.jpg`.
        results = [path for path in results if not _TARGETS.search(path.stem)]
    targets = _by_name(reference, skip=set(results))
    sources = _by_name(Path(settings.baseline), skip=set()) if settings.baseline else {}
    trios, unmatched = [], []
    for path in results[: settings.limit]:
        target = _look_up(targets, path, folder)
        if target is None:
            unmatched.append(path)
            continue
        source = _look_up(sources, path, folder)
        if settings.baseline is not None and source is None:
            unmatched.append(path)
            continue
        trios.append(_Trio(result=path, target=target, source=source))
    if not trios:
        raise UsageError(
            f"no picture of {folder} has a counterpart in {reference}",
            remedy="names must be alike, apart from suffixes and words such as _moire and _gt",
        )
    return trios, unmatched


def _by_name(folder: Path, *, skip: set[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in folders.find_images(folder):
        if path not in skip:
            for key in reversed(_keys(path, folder)):
                found.setdefault(key, path)
    return found


def _look_up(found: dict[str, Path], path: Path, folder: Path) -> Path | None:
    return next((found[key] for key in _keys(path, folder) if key in found), None)


def _keys(path: Path, folder: Path) -> list[str]:
    """Names under which a picture may be known: whole, and without its role."""
    inside = path.relative_to(folder).with_suffix("")
    return [inside.as_posix(), inside.with_name(_ROLE.sub("", inside.name) or "_").as_posix()]


def _measured(
    trio: _Trio,
    settings: EvaluateSettings,
    device: torch.device,
    lpips: perceptual.Lpips | None,
) -> dict[str, Any]:
    target = _tensor(trio.target, device)
    output = _tensor(trio.result, device)
    metrics = _metrics(settings)
    own = [name for name in metrics if name in fidelity.METRICS]

    def measured(picture: Tensor) -> dict[str, float]:
        values = fidelity.measure(picture, target, protocol=settings.protocol, metrics=own)
        if lpips is not None:
            way = fidelity.PROTOCOLS[settings.protocol]
            values[perceptual.NAME] = lpips(way.prepare(picture), way.prepare(target))
        return values

    values: dict[str, Any] = dict(measured(output))
    if trio.source is not None:
        source = _tensor(trio.source, device)
        values |= {f"before_{name}": value for name, value in measured(source).items()}
        if HARM in metrics:
            values[HARM] = fidelity.psnr(output, source)
    rounded = {name: round(value, 4) for name, value in values.items()}
    return {"path": str(trio.result), "status": "ok", "reference": str(trio.target), **rounded}


def _tensor(path: Path, device: torch.device) -> Tensor:
    pixels = np.asarray(images.load_rgb(path))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).to(device, torch.float64) / 255


def _mean(values: Sequence[float]) -> float:
    return round(math.fsum(values) / len(values), 4)


def _table(settings: EvaluateSettings, summary: dict[str, Any]) -> Table:
    rows = [
        (_TITLES[name], summary.get(f"before_{name}"), summary[name]) for name in _metrics(settings)
    ]
    return Table(f"Protocol {settings.protocol}", ("measure", "before", "result"), rows)


def _missed(settings: EvaluateSettings, summary: dict[str, Any]) -> dict[str, Any]:
    """What goes into the summary when a gate is missed; nothing otherwise."""
    missed = []
    for metric, bound in settings.gates:
        value = summary.get(metric)
        if value is None:
            missed.append(f"{metric} was not measured")
        elif value > bound if metric in _LOWER_IS_BETTER else value < bound:
            missed.append(f"{metric} is {value:g}, not {bound:g}")
    if not missed:
        return {}
    return {
        "error": f"quality gate not met: {'; '.join(missed)}",
        "remedy": "lower the gate with --min, or restore with other settings",
        "exit_code": QualityGateError.exit_code,
    }
