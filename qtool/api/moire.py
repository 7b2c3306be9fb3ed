"""`qtool synthesize moire`: pairs with and without moire, simulated or learnt from photographs."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.api.moire_data import CLEAN, MOIRE, near, read_pictures
from qtool.api.moire_training import adopt, learn, learning_seconds
from qtool.api.runtime import choose_device, prepare
from qtool.api.synthesize import sheet_png
from qtool.errors import Progress, QtoolError
from qtool.io import folders, images
from qtool.io.atomic import sweep, write_file
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.denoise import PaintedBatches, damage
from qtool.methods.undem.simulated import simulated_pair
from qtool.report import Picture, Result
from qtool.settings.moire import MoireSettings

SHEET = "sheet.png"
PARAMETERS = "parameters"
"""Sub-folder with one JSON file per pair: how it came about."""

COMMAND = "synthesize moire"

_SHOWN = 8
_TRIES = 20
_TIMED = 4
_CHUNK = 4
"""Pairs that a process makes at a time."""


def plan_moire(settings: MoireSettings) -> Result:
    """What `synthesize_moire` would do, and how long it would take; reads no picture."""
    if not _check_folder(settings):
        skipped = {"output": str(settings.out), "skipped": True}
        return Result(COMMAND, status="planned", summary=skipped)
    counts = {
        name: len(folders.find_images(folder))
        for name, folder in (("moire", settings.moire), ("clean", settings.clean))
        if folder is not None
    }
    device = choose_device(settings.device)
    summary = {
        "method": _method(settings),
        "count": settings.count,
        "patch_size": settings.patch_size,
        "pictures": counts,
        "training_steps": _training_steps(settings),
        "budget_minutes": settings.budget,
        "device": str(device),
        "estimated_seconds": math.ceil(_estimated_seconds(settings, device)),
        "output": str(settings.out),
        "skipped": False,
    }
    return Result(COMMAND, status="planned", summary=summary)


def synthesize_moire(settings: MoireSettings, progress: Progress | None = None) -> Result:
    """Write pairs of pictures: `moire/00000.png` beside `clean/00000.png`.

    Args:
        settings: What to make.
        progress: Told about every pair and training step.

    Returns:
        One item per pair.

    Raises:
        QtoolError: One of its kinds, for wrong settings, unreadable pictures, refused output or a
            training that collapsed.
    """
    if not _check_folder(settings):
        skipped = {"output": str(settings.out), "status": "skipped"}
        return Result(COMMAND, summary=skipped)
    if settings.save_generator is not None:
        folders.check_output(
            settings.save_generator, overwrite=settings.overwrite or settings.resume
        )
    device = prepare(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    sweep(settings.out)
    started = time.monotonic()
    summary: dict[str, Any] = {
        "method": _method(settings),
        "count": settings.count,
        "patch_size": settings.patch_size,
        "seed": settings.seed,
    }
    if settings.simulate:
        items, shown = _simulate(settings, progress)
    else:
        items, shown, facts = _paint(settings, device, progress)
        summary |= facts
    sheet = sheet_png(shown)
    write_file(settings.out / SHEET, sheet, overwrite=True)
    summary |= {
        "seconds": round(time.monotonic() - started, 1),
        "sheet": str(settings.out / SHEET),
        "output": str(settings.out),
    }
    pictures = (Picture("Moire above, clean below", sheet),)
    return Result(COMMAND, items=items, summary=summary, pictures=pictures)


def _estimated_seconds(settings: MoireSettings, device: torch.device) -> float:
    if not settings.simulate:
        return learning_seconds(settings, device)
    started = time.perf_counter()
    for index in range(_TIMED):
        simulated_pair(
            (),
            size=settings.patch_size,
            seed=settings.seed,
            index=index,
            page_share=1.0,
            tone=settings.tone,
            device=device,
        )
    each = (time.perf_counter() - started) / _TIMED
    return settings.count * each / max(1, settings.workers)


def _method(settings: MoireSettings) -> str:
    return "simulated" if settings.simulate else "undem"


def _training_steps(settings: MoireSettings) -> int | None:
    if settings.simulate or settings.generator:
        return 0
    return None if settings.budget else settings.steps


def _check_folder(settings: MoireSettings) -> bool:
    return folders.check_output(
        settings.out,
        overwrite=settings.overwrite or settings.resume,
        skip_existing=settings.skip_existing,
        folder=True,
    )


def _simulate(
    settings: MoireSettings, progress: Progress | None
) -> tuple[list[dict[str, Any]], Tensor]:
    items = [_item(settings.out, index) for index in range(settings.count)]
    shown: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for done, pair in enumerate(_simulated(settings, stack), start=1):
            if pair is not None:
                shown.append(pair)
            if progress is not None:
                progress("simulate", done, settings.count)
    return items, _sheet(shown)


def _simulated(settings: MoireSettings, stack: ExitStack) -> Iterator[tuple[Tensor, Tensor] | None]:
    """Make all pairs, in this process or in `workers` others; hand out those of the sheet."""
    indices = range(settings.count)
    if not settings.workers:
        return map(_Simulator(settings), indices)
    pool = ProcessPoolExecutor(
        settings.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_become_worker,
        initargs=(settings,),
    )
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool.map(_made_by_worker, indices, chunksize=_CHUNK)


class _Simulator:
    """Makes the pairs of a run by number, each the same whoever makes it.

    Args:
        settings: The run.
    """

    def __init__(self, settings: MoireSettings) -> None:
        self.settings = settings
        self.device = choose_device(settings.device)
        self.pictures: Sequence[Tensor] = ()
        if settings.clean is not None:
            self.pictures = near(read_pictures(settings.clean, smallest=48), self.device)

    def __call__(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Write a pair unless a stopped run has; return one that the sheet shows."""
        settings = self.settings
        done = settings.resume and _pair_paths(settings.out, index)[-1].exists()
        if done and index >= _SHOWN:
            return None
        pair = simulated_pair(
            self.pictures,
            size=settings.patch_size,
            seed=settings.seed,
            index=index,
            page_share=settings.pages,
            tone=settings.tone,
            device=self.device,
        )
        both = pair.moire.cpu(), pair.clean.cpu()
        if not done:
            facts = {"source": pair.source, "capture": pair.capture.to_dict()}
            _write_pair(settings.out, index, *both, facts)
        return both if index < _SHOWN else None


_workers: list[_Simulator] = []
"""In a process of the pool: the one simulator it has."""


def _become_worker(settings: MoireSettings) -> None:
    torch.set_num_threads(1)
    _workers.append(_Simulator(settings))


def _made_by_worker(index: int) -> tuple[Tensor, Tensor] | None:
    return _workers[0](index)


def _paint(
    settings: MoireSettings, device: torch.device, progress: Progress | None
) -> tuple[list[dict[str, Any]], Tensor, dict[str, Any]]:
    if settings.moire is None or settings.clean is None:  # the settings refuse this
        raise QtoolError("photographs with and without moire are missing")
    moire = near(read_pictures(settings.moire, smallest=settings.patch_size), device)
    clean = near(read_pictures(settings.clean, smallest=settings.patch_size), device)
    if settings.generator is not None:
        learnt = adopt(settings.generator, moire, crop=settings.patch_size, device=device)
    else:
        learnt = learn(settings, moire, clean, device=device, progress=progress)
    source = PaintedBatches(
        learnt.painters, learnt.patches, clean, crop=settings.patch_size, denoise=settings.denoise
    )
    items: list[dict[str, Any]] = []
    shown: list[tuple[Tensor, Tensor]] = []
    drawn = 0
    generator = torch.Generator().manual_seed(settings.seed)
    while len(items) < settings.count:
        if drawn >= _TRIES * settings.count:
            raise QtoolError(
                f"only {len(items)} of {drawn} painted pairs kept their content",
                remedy="train longer (--steps), or keep all with --no-denoise",
            )
        draw = Draw(generator)
        group = draw.index(len(learnt.painters))
        batch = source.draw_group(group, 1, draw)
        drawn += 1
        if not bool(batch.kept[0]):
            continue
        pair = batch.moire[0].cpu(), batch.clean[0].cpu()
        facts = {"group": group, "damage": round(float(damage(pair[1][None], pair[0][None])), 4)}
        _write_pair(settings.out, len(items), *pair, facts)
        items.append(_item(settings.out, len(items)))
        shown = [*shown, pair][:_SHOWN]
        if progress is not None:
            progress("paint", len(items), settings.count)
    learnt.forget()
    facts = {**learnt.facts, "kept": round(len(items) / drawn, 3)}
    return items, _sheet(shown), facts


def _pair_paths(folder: Path, index: int) -> tuple[Path, Path, Path]:
    name = f"{index:05d}"
    return (
        folder / CLEAN / f"{name}.png",
        folder / PARAMETERS / f"{name}.json",
        folder / MOIRE / f"{name}.png",
    )


def _item(folder: Path, index: int) -> dict[str, Any]:
    path = _pair_paths(folder, index)[-1]
    return {"path": str(path), "output": str(path), "status": "ok"}


def _write_pair(
    folder: Path, index: int, moire: Tensor, clean: Tensor, facts: dict[str, Any]
) -> None:
    """The moire picture comes last: where it is, the pair is whole."""
    clean_path, facts_path, moire_path = _pair_paths(folder, index)
    images.save_png(clean_path, clean, overwrite=True)
    write_file(facts_path, (json.dumps(facts, indent=1) + "\n").encode(), overwrite=True)
    images.save_png(moire_path, moire, overwrite=True)


def _sheet(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([pair[side] for side in (0, 1) for pair in pairs])
