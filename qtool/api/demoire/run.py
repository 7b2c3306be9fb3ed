"""`qtool demoire`: moire out of photographs, whole folders at a time.

While one photograph is computed the next is read and the last is written.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from qtool.api.demoire import network as networks
from qtool.api.demoire import photo as work
from qtool.api.demoire import preview
from qtool.api.demoire.jobs import Job, Plan, make_plan, relative, settings_hash
from qtool.api.parallel import share
from qtool.api.runtime import check_report, choose_device, notice, prepare
from qtool.errors import ImageError, MissingError, Progress, QtoolError, UsageError
from qtool.io import photo_metadata, photo_write, photos, segments
from qtool.io.atomic import sweep, write_file
from qtool.io.journal import Journal, Record
from qtool.methods.undem import detection
from qtool.methods.undem.restoration import Restorer
from qtool.report import Result, Status
from qtool.settings.demoire import DemoireSettings

Sink = Callable[[bytes], None]

_FILE_SECONDS = 0.35
"""To read, judge and write a megapixel, beside what the network takes."""


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A photograph that has been read and looked at."""

    job: Job
    decoded: work.Decoded
    score: float
    sha256: str


@dataclass
class _Run:
    """What all photographs of a run share."""

    settings: DemoireSettings
    plan: Plan
    restorer: Restorer
    settings_sha256: str
    mask: photos.Pixels | None
    journal: Journal | None
    stdin: bytes | None
    sink: Sink | None
    pages: preview.Preview | None
    items: list[dict[str, Any]] = field(default_factory=list)
    errors: list[QtoolError] = field(default_factory=list)


def plan(settings: DemoireSettings, *, listed: Sequence[str] = ()) -> Result:
    """What `demoire` would do, and how long it would take; decodes nothing.

    Raises:
        QtoolError: The request is wrong, or weights are missing or damaged.
    """
    made = _plan(settings, listed)
    items = [_header_item(job) for job in made.jobs]
    megapixels = sum(item.get("megapixels", 0.0) for item in items)
    items += [{**_item(job), "status": "skipped"} for job in made.done]
    device = choose_device(_placed(settings).device)
    seconds = 0.0
    if made.jobs:
        network = networks.open_network(settings)
        seconds = megapixels * (_FILE_SECONDS + networks.seconds_per_megapixel(network, device))
    summary = {
        "photographs": len(made.jobs),
        "skipped": len(made.done),
        "ignored": made.ignored,
        "megapixels": round(megapixels, 1),
        "bytes": sum(item.get("bytes", 0) for item in items),
        "weights": str(networks.weights_path(settings)),
        "device": str(device),
        "estimated_seconds": math.ceil(seconds),
        "output": settings.out,
    }
    return Result("demoire", status="planned", items=items, summary=summary)


def demoire(
    settings: DemoireSettings,
    progress: Progress | None = None,
    *,
    listed: Sequence[str] = (),
    stdin: bytes | None = None,
    sink: Sink | None = None,
) -> Result:
    """Restore photographs.

    Args:
        settings: What to restore, and how.
        progress: Told about every photograph, or about every tile if there is only one.
        listed: Photographs besides those of the settings.
        stdin: The photograph that `-` stands for.
        sink: Takes the result when `--out` is `-`.

    Returns:
        One item per photograph: where its result is, what was found and done, or why it failed.

    Raises:
        QtoolError: The request is wrong, something is missing, or the only photograph failed.
    """
    made = _plan(settings, listed)
    device = prepare(_placed(settings))
    restorer = networks.make_restorer(networks.open_network(settings), device)
    _clean_up(made)
    run = _Run(
        settings=settings,
        plan=made,
        restorer=restorer,
        settings_sha256=settings_hash(settings, networks.weights_sha256(settings)),
        mask=_mask(settings),
        journal=Journal(made.root) if made.root is not None else None,
        stdin=stdin,
        sink=sink,
        pages=preview.Preview() if settings.preview is not None else None,
    )
    started = time.monotonic()
    _work_through(run, progress)
    seconds = time.monotonic() - started
    if run.pages is not None and settings.preview is not None:
        write_file(settings.preview, run.pages.html().encode(), overwrite=True)
    return _result(run, seconds)


def _plan(settings: DemoireSettings, listed: Sequence[str]) -> Plan:
    check_report(settings.preview, replace=settings.overwrite or settings.skip_existing)
    part = share()
    if settings.preview is not None and part[1] > 1:
        raise UsageError(
            "several processes cannot write one preview", remedy="leave out --preview here"
        )
    return make_plan(
        settings,
        listed=listed,
        weights_sha256=lambda: networks.weights_sha256(settings),
        share=part,
    )


def _placed(settings: DemoireSettings) -> DemoireSettings:
    """Give every process of one machine a GPU of its own."""
    local = os.environ.get("LOCAL_RANK", "")
    if settings.device != "auto" or not local.isdecimal() or not torch.cuda.is_available():
        return settings
    device = f"cuda:{int(local) % torch.cuda.device_count()}"
    return settings.model_copy(update={"device": device})


def _clean_up(made: Plan) -> None:
    """Remove what a killed run left."""
    for folder in {job.output.parent for job in made.jobs if job.output is not None}:
        if folder.is_dir():
            sweep(folder)
    if made.root is not None:
        made.root.mkdir(parents=True, exist_ok=True)


def _mask(settings: DemoireSettings) -> photos.Pixels | None:
    if settings.mask is None:
        return None
    try:
        content = settings.mask.read_bytes()
    except OSError as error:
        raise UsageError(f"the mask {settings.mask}: {error.strerror}") from error
    photo = photos.read_photo(content, str(settings.mask), bit_depth="8")
    grey: photos.Pixels = np.rint(photo.pixels.mean(axis=2)).astype(np.uint8)
    return grey


def _work_through(run: _Run, progress: Progress | None) -> None:
    jobs = run.plan.jobs
    with _thread() as reader, _thread() as writer:
        coming: Future[_Read] | None = reader.submit(_read, run, jobs[0]) if jobs else None
        written: Future[None] | None = None
        for index, job in enumerate(jobs):
            ready = coming
            coming = reader.submit(_read, run, jobs[index + 1]) if index + 1 < len(jobs) else None
            tell = _teller(progress, job, index, len(jobs))
            began = time.monotonic()
            try:
                found = ready.result() if ready is not None else _read(run, job)
                finish = _compute(run, found, began, tell)
            except Exception as error:
                _note_failure(run, job, error)
            else:
                if written is not None:
                    written.result()
                written = writer.submit(_finish, run, job, finish)
            if progress is not None and len(jobs) > 1:
                progress("demoire", index + 1, len(jobs), job.name)
            if run.errors and run.settings.on_error == "stop":
                break
        if written is not None:
            written.result()


@contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """One thread beside this one; what it has not begun is dropped at the end."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _teller(
    progress: Progress | None, job: Job, index: int, count: int
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    if count == 1:
        return lambda done, total: progress("demoire", done, total, job.name)
    return lambda done, total: progress(
        "demoire", index, count, f"{job.name}, tile {done} of {total}"
    )


def _read(run: _Run, job: Job) -> _Read:
    if job.source is None:
        content = run.stdin or b""
    else:
        try:
            content = job.source.read_bytes()
        except OSError as error:
            raise ImageError(f"{job.name} cannot be read: {error.strerror}") from error
    decoded = work.decode(content, job.name, run.settings)
    return _Read(
        job=job,
        decoded=decoded,
        score=work.moire_score(decoded),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _compute(
    run: _Run, found: _Read, began: float, tell: Callable[[int, int], None] | None
) -> Callable[[], dict[str, Any]]:
    """Restore a photograph if it needs it; what is returned writes the result."""
    decoded, job = found.decoded, found.job
    shows_moire = found.score >= detection.THRESHOLD
    facts: dict[str, Any] = {
        **_item(job),
        "status": "ok",
        "action": "restored" if shows_moire or run.settings.force else "copied",
        "moire": round(found.score, 3),
        "megapixels": round(decoded.height * decoded.width / 1e6, 2),
    }
    if not shows_moire and not run.settings.force:
        notice.info("%s: no moire found, passed on unchanged (--force restores it)", job.name)

        def pass_on() -> dict[str, Any]:
            content, notes = _unchanged(decoded, job, run.settings)
            return _deliver(run, found, content, {**facts, "notes": notes}, began)

        return pass_on
    restored = work.restore(decoded, run.restorer, run.settings, run.mask, tell)
    facts |= {
        "change": round(restored.change, 3),
        "tile": restored.tile,
        "seam": round(restored.seam, 3),
    }
    if run.pages is not None:
        run.pages.add(job.name, decoded.photo, restored.pixels)

    def write() -> dict[str, Any]:
        content, notes = work.encode(decoded, restored.pixels, kind=job.kind, settings=run.settings)
        notes = [*decoded.notes, *notes]
        return _deliver(run, found, content, {**facts, "notes": notes}, began)

    return write


def _unchanged(
    decoded: work.Decoded, job: Job, settings: DemoireSettings
) -> tuple[bytes, list[str]]:
    """The source's bytes, unless another form was asked for."""
    kind = decoded.photo.kind
    deep = decoded.photo.top > 255
    same_depth = settings.bit_depth == "keep" or (
        not decoded.notes and deep == (settings.bit_depth == "16")
    )
    if job.kind in (None, kind) and same_depth and settings.quality is None:
        if settings.metadata == "keep":
            return decoded.content, []
        if kind == "jpeg":
            metadata = photo_metadata.kept_metadata(decoded.photo.metadata, settings.metadata)
            notes: list[str] = []
            kept = photo_write.jpeg_segments(metadata, native=True, notes=notes)
            return segments.with_jpeg_segments(decoded.content, kept), notes
    content, notes = work.encode(decoded, decoded.photo.pixels, kind=job.kind, settings=settings)
    return content, [*decoded.notes, *notes]


def _deliver(
    run: _Run, found: _Read, content: bytes, facts: dict[str, Any], began: float
) -> dict[str, Any]:
    job, root = found.job, run.plan.root
    if job.output is None:
        if run.sink is not None:
            run.sink(content)
    else:
        overwrite = run.settings.overwrite or job.output in run.plan.replace
        write_file(job.output, content, overwrite=overwrite)
        if run.journal is not None and root is not None:
            run.journal.add(
                Record(
                    output=relative(job.output, root),
                    input=job.name,
                    input_sha256=found.sha256,
                    settings_sha256=run.settings_sha256,
                    output_sha256=hashlib.sha256(content).hexdigest(),
                    status="copied" if facts["action"] == "copied" else "ok",
                    time=datetime.now(UTC).isoformat(timespec="seconds"),
                )
            )
    facts["seconds"] = round(time.monotonic() - began, 2)
    for note in facts["notes"]:
        notice.warning("%s: %s", job.name, note)
    return facts


def _finish(run: _Run, job: Job, finish: Callable[[], dict[str, Any]]) -> None:
    try:
        run.items.append(finish())
    except Exception as error:
        _note_failure(run, job, error)


def _note_failure(run: _Run, job: Job, error: Exception) -> None:
    known = error if isinstance(error, QtoolError) else None
    if known is None:
        if not isinstance(error, OSError | ValueError | RuntimeError | MemoryError):
            raise error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        known = QtoolError(f"{job.name} cannot be restored: {reason}")
    run.errors.append(known)
    reason = known.message.removeprefix(job.name).lstrip(": ")
    run.items.append({"path": job.name, "status": "failed", "error": reason})


def _item(job: Job) -> dict[str, Any]:
    return {"path": job.name, "output": str(job.output) if job.output is not None else "-"}


def _header_item(job: Job) -> dict[str, Any]:
    item = {**_item(job), "status": "planned"}
    if job.source is None:
        return item
    try:
        content = job.source.read_bytes()
        header = photos.read_header(content, job.name)
    except (QtoolError, OSError) as error:
        return {**item, "status": "failed", "error": str(error)}
    megapixels = round(header.width * header.height / 1e6, 2)
    return {**item, "megapixels": megapixels, "bytes": len(content)}


def _result(run: _Run, seconds: float) -> Result:
    order = {job.name: index for index, job in enumerate(run.plan.jobs)}
    items = sorted(run.items, key=lambda item: order[item["path"]])
    items += [{**_item(job), "status": "skipped"} for job in run.plan.done]
    count = Counter(item.get("action", item["status"]) for item in items)
    megapixels = sum(item.get("megapixels", 0.0) for item in items)
    summary: dict[str, Any] = {
        "restored": count["restored"],
        "copied": count["copied"],
        "skipped": count["skipped"],
        "failed": count["failed"],
        "ignored": run.plan.ignored,
        "megapixels": round(megapixels, 1),
        "seconds": round(seconds, 1),
        "output": run.settings.out,
    }
    if run.settings.preview is not None:
        summary["preview"] = str(run.settings.preview)
    status: Status = "partial" if run.errors else "ok"
    if run.errors and len(run.errors) == len(run.plan.jobs):
        if len(run.errors) == 1:
            raise run.errors[0]
        missing = all(isinstance(error, MissingError) for error in run.errors)
        status = "failed"
        summary |= {
            "error": "no photograph could be restored",
            "remedy": run.errors[0].remedy,
            "exit_code": (MissingError if missing else QtoolError).exit_code,
        }
    return Result("demoire", status=status, items=items, summary=summary)
