"""Moire generators for `synthesize moire`: trained group by group, or taken from a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.api.estimate import warm_seconds
from qtool.api.moire_data import Pictures, read_generator, write_generator
from qtool.api.runtime import notice
from qtool.api.synthesize import read_tensor_file, sheet_png
from qtool.errors import CheckpointError, Progress
from qtool.io import container
from qtool.io.atomic import write_file
from qtool.methods.undem import complexity
from qtool.methods.undem.denoise import PaintedBatches, Painter, painter_from
from qtool.methods.undem.synthesis import MoireSynthesizer, SynthesisConfig, best_probe
from qtool.settings.moire import MoireSettings

PROBES = 20
"""How often a training is judged, and its painter kept when it is the best so far."""

_SAVE_SECONDS = 60.0
_THRESHOLD_SAMPLES = 256
_PAINTING = 0.3
"""Time of painting one picture in that of a training step."""
_BEST = "best/"
_SECONDS = "seconds"
_PATCH_CROPS = 2


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """Painters with the photographs whose bands they paint.

    Attributes:
        painters: One per group.
        patches: The moire patches of each group.
        facts: For the report.
        states: Files that only an interrupted run needs.
    """

    painters: tuple[Painter, ...]
    patches: tuple[Sequence[Tensor], ...]
    facts: dict[str, Any]
    states: tuple[Path, ...] = field(default=())

    def forget(self) -> None:
        """Remove the state files: the work is done."""
        for path in self.states:
            path.unlink(missing_ok=True)


def adopt(path: Path, moire: Pictures, *, crop: int, device: torch.device) -> Learnt:
    """Take trained painters from a file, and sort photographs into their groups.

    Raises:
        CheckpointError: The file is no generator.
    """
    file = read_generator(path, device)
    patches = cut_patches(moire, max(file.patch, crop))
    groups: list[list[Tensor]] = [[] for _ in file.painters]
    for patch in patches:
        number = 0
        if file.grouping is not None:
            values = complexity.frequency(patch[None]), complexity.colourfulness(patch[None])
            number = int(file.grouping.group_of(*values))
        groups[number].append(patch)
    # A group that none of these photographs belongs to has nothing to paint.
    used = [index for index, members in enumerate(groups) if members]
    return Learnt(
        painters=tuple(file.painters[index] for index in used),
        patches=tuple(groups[index] for index in used),
        facts={"generator": str(path), "groups": len(used), "patches": len(patches)},
    )


def learning_seconds(settings: MoireSettings, device: torch.device) -> float:
    """Estimate the training of all groups and the painting of all pairs; reads no picture."""
    config = SynthesisConfig(
        steps=1,
        crop=settings.patch_size,
        batch_size=settings.batch_size,
        width=settings.width,
        seed=settings.seed,
    )
    patch = [torch.rand(3, settings.patch_size, settings.patch_size)]
    game = MoireSynthesizer(patch, patch, config, device=device)
    step = warm_seconds(game.step, device)
    painted = step * _PAINTING * settings.count
    if settings.generator is not None:
        return painted
    judged = settings.groups * (PROBES + _PAINTING * _THRESHOLD_SAMPLES) * step
    if settings.budget is not None:
        return 60 * settings.budget + judged + painted
    return settings.groups * settings.steps * step + judged + painted


def cut_patches(pictures: Iterable[Tensor], side: int) -> list[Tensor]:
    """Patches side by side, (3, side, side); of a picture too small for one, its middle square."""
    found: list[Tensor] = []
    for picture in pictures:
        height, width = picture.shape[-2:]
        square = min(side, height, width)
        for top, left in complexity.patch_boxes(height, width, patch=(square, square)):
            found.append(picture[:, top : top + square, left : left + square])
    return found


def learn(
    settings: MoireSettings,
    moire: Pictures,
    clean: Pictures,
    *,
    device: torch.device,
    progress: Progress | None,
) -> Learnt:
    """Group patches, train a painter for each group, measure what it damages.

    Every probe leaves a sheet of real moire, clean pictures and fakes in the output folder.

    Raises:
        QtoolError: A training collapsed.
        CheckpointError: A state to resume belongs to other settings.
    """
    side = _PATCH_CROPS * settings.patch_size
    patches = cut_patches(moire, side)
    frequencies = torch.cat([complexity.frequency(patch[None]) for patch in patches])
    colours = torch.cat([complexity.colourfulness(patch[None]) for patch in patches])
    count = complexity.affordable_groups(len(patches), settings.groups)
    if count < settings.groups:
        notice.warning(
            "%d patches are too few for %d groups; taking %d", len(patches), settings.groups, count
        )
    grouping, numbers = complexity.group_patches(frequencies, colours, groups=count)
    groups = tuple(
        [patches[index] for index in (numbers == group).nonzero()[:, 0].tolist()]
        for group in range(count)
    )
    weights, states, facts = [], [], []
    for group, members in enumerate(groups):
        training = _Training(settings, group, count, members, clean, device)
        weights.append(training.run(progress))
        states.append(training.path)
        facts.append(training.facts())
    limits = [float("inf")] * count
    source = PaintedBatches(
        _painters(weights, limits, device), groups, clean, crop=settings.patch_size, denoise=False
    )
    limits = [
        source.measured_threshold(group, samples=_THRESHOLD_SAMPLES, seed=settings.seed)
        for group in range(count)
    ]
    if settings.save_generator is not None:
        write_generator(
            settings.save_generator,
            weights,
            thresholds=limits,
            grouping=grouping,
            variant="own",
            patch=side,
            crop=settings.patch_size,
            provenance={
                "pictures": [len(moire), len(clean)],
                "seed": settings.seed,
                "groups": facts,
            },
            overwrite=settings.overwrite or settings.resume,
        )
    return Learnt(
        painters=_painters(weights, limits, device),
        patches=groups,
        facts={"groups": count, "patches": len(patches), "thresholds": limits, "training": facts},
        states=tuple(states),
    )


def _painters(
    weights: Sequence[dict[str, Tensor]], limits: Sequence[float], device: torch.device
) -> tuple[Painter, ...]:
    return tuple(
        painter_from(part, variant="own", threshold=limit, device=device)
        for part, limit in zip(weights, limits, strict=True)
    )


class _Training:
    """The training of one group, with a state file and the best painter so far."""

    def __init__(
        self,
        settings: MoireSettings,
        group: int,
        groups: int,
        moire: Sequence[Tensor],
        clean: Pictures,
        device: torch.device,
    ) -> None:
        self.group, self.groups = group, groups
        self.out = settings.out
        self.path = settings.out / f".resume-{group}.safetensors"
        self.config = SynthesisConfig(
            steps=settings.steps,
            crop=settings.patch_size,
            batch_size=settings.batch_size,
            width=settings.width,
            seed=settings.seed,
        )
        self.identity = json.dumps(
            {"group": group, "groups": groups, "patches": len(moire), **self.config.to_dict()},
            sort_keys=True,
        )
        self.game = MoireSynthesizer(moire, clean, self.config, device=device)
        self.best: dict[str, Tensor] = {}
        self.limit = 60 * (settings.budget or 0) / groups
        self.seconds = 0.0
        if settings.resume and self.path.exists():
            self._load()

    def _load(self) -> None:
        metadata, tensors = read_tensor_file(self.path)
        if metadata.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.path} was left by a run with other settings",
                remedy="repeat the settings of that run, or delete the file to start again",
            )
        self.seconds = float(metadata.get(_SECONDS, 0))
        self.best = {k[len(_BEST) :]: v for k, v in tensors.items() if k.startswith(_BEST)}
        self.game.load_state({k: v for k, v in tensors.items() if not k.startswith(_BEST)})

    def _save(self) -> None:
        tensors = self.game.state() | {f"{_BEST}{k}": v for k, v in self.best.items()}
        metadata = {"identity": self.identity, _SECONDS: str(self.seconds)}
        container.write_container(self.path, metadata, tensors, overwrite=True)

    def run(self, progress: Progress | None) -> dict[str, Tensor]:
        """Train to the end and return the best painter's weights."""
        before, started, saved = self.seconds, time.monotonic(), time.monotonic()
        done = self._done()
        while done < 1:
            losses = self.game.step(done if self.limit else None)
            self.seconds = before + time.monotonic() - started
            probed, done = int(PROBES * done), self._done()
            if int(PROBES * done) > probed or done >= 1:
                self._probe()
            if progress is not None:
                total = round(self.limit) or self.config.steps
                now = min(total, round(done * total))
                note = f"group {self.group + 1}, content {losses['content']:.2f}"
                progress("learn", self.group * total + now, self.groups * total, note)
            if time.monotonic() - saved > _SAVE_SECONDS or done >= 1:
                saved = time.monotonic()
                self._save()
        return self.best

    def _done(self) -> float:
        """Share of the work that is done, by the clock where there is a budget."""
        if self.limit:
            return self.seconds / self.limit
        return self.game.step_index / self.config.steps

    def _probe(self) -> None:
        self.game.probe()
        if best_probe(self.game.probes) == len(self.game.probes) - 1:
            self.best = self.game.painter()
        sheet = sheet_png(torch.stack(self.game.sheet()).cpu())
        write_file(self.out / f"group-{self.group + 1}.png", sheet, overwrite=True)

    def facts(self) -> dict[str, Any]:
        """What the chosen painter was judged to be."""
        probe = self.game.probes[best_probe(self.game.probes)]
        return {
            "steps": self.game.step_index,
            "feature": round(probe.feature, 4),
            "content": round(probe.content, 4),
            "belief": round(probe.belief, 4),
            "balanced": probe.balanced,
        }
