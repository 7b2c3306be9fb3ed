"""`qtool synthesize images`: calibration pictures out of a classifier."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.api.estimate import Estimate
from qtool.api.parallel import torchrun_group
from qtool.api.runtime import bfloat16_is_faster, notice, planned_device, prepare
from qtool.errors import CheckpointError, Progress, UsageError
from qtool.io import container, folders, images
from qtool.io.atomic import sweep, write_file
from qtool.io.cache import cache_dir
from qtool.methods import spdfq
from qtool.methods.processes import processes, rank, wait_for_all
from qtool.methods.spdfq.batch import MOMENTS, Method, Part, SynthesisConfig, SyntheticImages
from qtool.methods.spdfq.synthesis import batches, merged
from qtool.models import vision
from qtool.report import Picture, Result, Table
from qtool.settings.synthesize import SynthesizeSettings

TENSORS = "synthetic.safetensors"
"""Exact pixels, labels, priors and boxes, in a folder of synthesized pictures."""

SHEET = "contact_sheet.png"
PICTURES = "images"
"""Folder of the single pictures, apart from the sheet so that `--calib` can read it."""

STEPS = {"quick": 100, "standard": 200, "max": 1000}
"""Optimiser steps per effort; max, with every patch in every step, is the paper's budget."""

ALL_PATCHES = "max"
"""The effort whose steps use every patch; the others draw as many as the batch has images."""

_RESUME = ".resume.safetensors"
_SAVE_SECONDS = 20.0


def synthesis_config(
    *,
    method: Method,
    effort: str,
    model: nn.Module,
    batch_size: int,
    seed: int,
    steps: int | None = None,
    learning_rate: float | None = None,
    classes: tuple[int, ...] = (),
    ablate: tuple[Part, ...] = (),
) -> SynthesisConfig:
    """Turn an effort and its overrides into settings of the method.

    Raises:
        UsageError: The model has nothing that the method needs.
    """
    sites = vision.layout(model).attentions
    if method == "psaq" and not sites:
        raise UsageError(
            f"psaq compares patch tokens, and {type(model).__name__} has none",
            remedy="take --method spdfq",
        )
    windows = any(site.kind == "windows" for site in sites)
    return SynthesisConfig(
        method=method,
        steps=steps or STEPS[effort],
        learning_rate=learning_rate or (0.25 if windows else 0.2),
        seed=seed,
        classes=classes,
        patches_per_step=None if effort == ALL_PATCHES else batch_size,
        bfloat16=bfloat16_is_faster(next(model.parameters()).device),
        ablate=ablate,
    )


def estimated_seconds(
    estimate: Estimate, *, method: Method, effort: str, count: int, steps: int
) -> float:
    """About how long `count` images take, with the patches that go through beside them."""
    # One to four squares an image, 2.5 on average.
    patches = round(2.5 * count) if effort == ALL_PATCHES else count
    return estimate.synthesis(count=count, patches=patches if method == "spdfq" else 0, steps=steps)


def _speed(
    settings: SynthesizeSettings, config: SynthesisConfig, *, boxes: int, seconds: float
) -> dict[str, float]:
    """Images per second, and how much of the machine's matrix product rate the synthesis used."""
    speed = {"images_per_second": round(settings.count / seconds, 4)}
    estimate = Estimate(settings.model, weights=settings.weights, device=settings.device)
    if config.method != "noise" and estimate.forward:
        batches = math.ceil(settings.count / settings.batch_size)
        drawn = boxes if config.patches_per_step is None else batches * config.patches_per_step
        floor = estimate.synthesis_floor(
            count=settings.count, patches=min(boxes, drawn), steps=config.steps
        )
        speed["matmul_rate_share"] = round(floor / seconds, 4)
    return speed


class ResumableSynthesis:
    """Synthesis that keeps its state in a file per batch, so that a killed run can go on.

    Args:
        opened: The classifier.
        config: Settings of the method.
        count: Number of images.
        batch_size: Images optimised together.
        state: File for the state of the first batch; those of others lie beside it.
        resume: Whether an existing state is taken up.
    """

    def __init__(
        self,
        opened: vision.OpenedModel,
        config: SynthesisConfig,
        *,
        count: int,
        batch_size: int,
        state: Path,
        resume: bool,
    ) -> None:
        self.opened = opened
        self.config = config
        self.count = count
        self.batch_size = batch_size
        self.state = state
        self.identity = json.dumps(
            {
                "weights": opened.weights_sha256,
                "architecture": opened.architecture,
                "model_args": opened.model_args,
                "count": count,
                "batch_size": batch_size,
                **asdict(config),
            },
            sort_keys=True,
            default=str,
        )
        self.resume = resume
        self._saved_at = time.monotonic()

    @property
    def kept_images(self) -> Path:
        """File in the cache for the finished images of exactly this synthesis, code included."""
        digest = hashlib.sha256(self.identity.encode())
        for source in sorted(Path(spdfq.__file__).parent.glob("*.py")):
            digest.update(source.read_bytes())
        return cache_dir() / "synthesis" / f"{digest.hexdigest()}.safetensors"

    def _file(self, batch: int) -> Path:
        return self.state.with_stem(f"{self.state.stem}-{batch:05d}") if batch else self.state

    def _files(self) -> list[Path]:
        """All files of state that are there, of whatever run."""
        numbered = re.compile(
            rf"{re.escape(self.state.stem)}(-[0-9]{{5,}})?{re.escape(self.state.suffix)}"
        )
        folder = self.state.parent
        found = folder.iterdir() if folder.is_dir() else ()
        return [path for path in found if numbered.fullmatch(path.name)]

    def _read(self, batch: int) -> dict[str, Tensor] | None:
        path = self._file(batch)
        if not self.resume or not path.exists():
            return None
        metadata, tensors = read_tensor_file(path)
        if metadata.get("identity") != self.identity:
            raise CheckpointError(
                f"{path} was left by a run with other settings",
                remedy="repeat the settings of that run, or delete the file to start again",
            )
        return tensors

    @property
    def begun(self) -> bool:
        """Whether part of the work was done before."""
        return self.resume and bool(self._files())

    def _save(self, batch: int, state: dict[str, Tensor]) -> None:
        finished = int(state["step"]) >= self.config.steps
        if not finished and time.monotonic() - self._saved_at < _SAVE_SECONDS:
            return
        self._saved_at = time.monotonic()
        if finished:  # nothing moves these pixels any more
            state = {name: value for name, value in state.items() if not name.startswith(MOMENTS)}
        container.write_container(
            self._file(batch), {"identity": self.identity}, state, overwrite=True
        )

    def parts(
        self, progress: Progress | None, *, share: tuple[int, int] = (0, 1)
    ) -> Iterator[SyntheticImages]:
        """Synthesize the batches of this process's share, saving the state now and then."""
        data = self.opened.data
        return batches(
            self.opened.model,
            vision.layout(self.opened.model),
            count=self.count,
            size=data.input_size[1:],
            num_classes=num_classes(self.opened),
            mean=data.mean,
            std=data.std,
            config=self.config,
            batch_size=self.batch_size,
            share=share,
            resume=self._read,
            checkpoint=self._save,
            progress=progress,
        )

    def run(self, progress: Progress | None) -> SyntheticImages:
        """Synthesize all batches, saving the state now and then."""
        return merged(list(self.parts(progress)))

    def forget(self) -> None:
        """Remove the files of state: the work is done, or starts again."""
        for path in self._files():
            path.unlink(missing_ok=True)


def num_classes(opened: vision.OpenedModel) -> int:
    """Width of a classifier's output."""
    return int(opened.model.num_classes)  # type: ignore[arg-type]


def read_tensor_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file written by `write_container`.

    Raises:
        CheckpointError: The file is absent or damaged.
    """
    with container.open_container(path) as file:
        table = container.read_table(file, path)
        return dict(table.metadata), container.read_tensors(file, path, table)


def denormalised(pixels: Tensor, data: vision.DataConfig) -> Tensor:
    """Undo a model's normalisation: (N, 3, H, W) to values in 0..1."""
    mean = torch.tensor(data.mean).view(1, -1, 1, 1)
    std = torch.tensor(data.std).view(1, -1, 1, 1)
    return (pixels * std + mean).clamp(0.0, 1.0)


def sheet_png(visible: Tensor, *, captions: Sequence[str] = (), columns: int = 8) -> bytes:
    """A contact sheet of pictures (N, 3, H, W) in 0..1, as PNG bytes."""
    buffer = io.BytesIO()
    page = images.contact_sheet(list(visible), captions=captions, columns=columns)
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def check_classes(classes: tuple[int, ...], count: int) -> None:
    """Refuse classes the model does not have.

    Raises:
        UsageError: A class is out of range.
    """
    if classes and max(classes) >= count:
        raise UsageError(
            f"class {max(classes)} was asked for, but the model has {count} classes",
            remedy=f"name classes from 0 to {count - 1}",
        )


def _check_folder(settings: SynthesizeSettings) -> bool:
    """Check the folder before work starts; False means the result is there and may stay."""
    return folders.check_output(
        settings.out,
        overwrite=settings.overwrite or settings.resume,
        skip_existing=settings.skip_existing,
        folder=True,
    )


def plan_images(settings: SynthesizeSettings) -> Result:
    """What `synthesize_images` would do; loads no weights.

    Raises:
        QtoolError: The request is wrong, or the device or the weights are missing.
    """
    if not _check_folder(settings):
        skipped = {"output": str(settings.out), "skipped": True}
        return Result("synthesize images", status="planned", summary=skipped)
    steps = 0 if settings.method == "noise" else settings.steps or STEPS[settings.effort]
    summary = {
        "model": settings.model,
        "architecture": vision.resolve(
            settings.model, weights=settings.weights, offline=settings.offline
        ),
        "method": settings.method,
        "count": settings.count,
        "steps": steps,
        "device": planned_device(settings),
        "output": str(settings.out),
        "skipped": False,
    }
    estimate = Estimate(settings.model, weights=settings.weights, device=settings.device)
    if estimate.forward is not None:
        seconds = estimated_seconds(
            estimate,
            method=settings.method,
            effort=settings.effort,
            count=settings.count,
            steps=steps,
        )
        summary["estimated_seconds"] = math.ceil(seconds)
    return Result("synthesize images", status="planned", summary=summary)


def synthesize_images(settings: SynthesizeSettings, progress: Progress | None = None) -> Result:
    """Synthesize calibration pictures for a classifier and write them to a folder.

    The folder gets one PNG per picture in `images/`, a contact sheet, and `synthetic.safetensors`
    with the exact pixels, soft labels, attention priors and patch boxes. The processes of torchrun
    share the batches, which must see one folder; the first one writes what all have made.

    Args:
        settings: What to make.
        progress: Told about every step.

    Returns:
        One item per picture, with the intended classes and whether the model sees one of them.

    Raises:
        QtoolError: One of its kinds, for wrong settings, missing weights or refused output.
    """
    if not _check_folder(settings):
        return Result(
            "synthesize images", summary={"output": str(settings.out), "status": "skipped"}
        )
    with torchrun_group():
        return _synthesize(settings, progress)


def _synthesize(settings: SynthesizeSettings, progress: Progress | None) -> Result:
    device = prepare(settings)
    opened = vision.open_model(
        settings.model, weights=settings.weights, offline=settings.offline, device=device
    )
    check_classes(settings.class_indices, num_classes(opened))
    config = synthesis_config(
        method=settings.method,
        effort=settings.effort,
        model=opened.model,
        batch_size=settings.batch_size,
        seed=settings.seed,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        classes=settings.class_indices,
        ablate=settings.ablate,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    sweep(settings.out)
    started = time.monotonic()
    work = ResumableSynthesis(
        opened,
        config,
        count=settings.count,
        batch_size=settings.batch_size,
        state=settings.out / _RESUME,
        resume=settings.resume,
    )
    if not settings.resume and rank() == 0:
        work.forget()
    wait_for_all()
    afresh = not work.begun
    if processes() > 1 and config.method != "noise":
        for _ in work.parts(progress, share=(rank(), processes())):
            pass
        wait_for_all()
        work.resume = True
    if rank() != 0:
        return Result("synthesize images", summary={"rank": rank(), "status": "synthesized"})
    made = work.run(progress)
    seconds = time.monotonic() - started
    items, sheet = write_images(settings.out, made, opened, config)
    work.forget()
    agreement = float(made.agreement.float().mean())
    summary: dict[str, Any] = {
        "model": opened.name,
        "architecture": opened.architecture,
        "method": config.method,
        "count": settings.count,
        "steps": config.steps if config.method != "noise" else 0,
        "seed": settings.seed,
        "agreement": round(agreement, 4),
        "patch_agreement": _share(made.patch_agreement),
        "seconds": round(seconds, 1),
        "output": str(settings.out),
    }
    if afresh and processes() == 1:
        summary |= _speed(settings, config, boxes=len(made.boxes), seconds=seconds)
    if made.history and "alignment" in made.history[0]:
        summary["alignment_loss"] = [made.history[i]["alignment"] for i in (0, -1)]
    if agreement < 0.5 and config.method != "noise":
        notice.warning(
            "only %.0f %% of the images are seen as what they should show; more steps may help",
            100 * agreement,
        )
    table = Table("Synthesized pictures", ("figure", "value"), list(summary.items()))
    return Result(
        "synthesize images",
        items=items,
        summary=summary,
        tables=(table,),
        pictures=(Picture("Contact sheet", sheet),),
    )


def _share(flags: Tensor) -> float | None:
    return round(float(flags.float().mean()), 4) if len(flags) else None


def write_tensors(
    path: Path, made: SyntheticImages, opened: vision.OpenedModel, config: SynthesisConfig
) -> None:
    """Write exact pixels, soft labels, priors, boxes and agreement to one safetensors file."""
    boxes = torch.tensor(
        [(b.image, b.top, b.left, b.side, b.label) for b in made.boxes], dtype=torch.int64
    ).view(-1, 5)
    tensors = {
        "images": made.images,
        "labels": made.labels,
        "boxes": boxes,
        "agreement": made.agreement.to(torch.uint8),
        **{f"prior.{name}": prior for name, prior in made.priors.items()},
    }
    metadata = {
        "format": "pt",
        "qtool.synthetic": json.dumps(
            {
                "architecture": opened.architecture,
                "weights_sha256": opened.weights_sha256,
                "data": opened.data.to_dict(),
                "config": asdict(config),
            },
            sort_keys=True,
        ),
    }
    container.write_container(path, metadata, tensors, overwrite=True)


def write_images(
    folder: Path, made: SyntheticImages, opened: vision.OpenedModel, config: SynthesisConfig
) -> tuple[list[dict[str, Any]], bytes]:
    """Write PNGs, the contact sheet and the exact tensors of synthesized images.

    Single pictures that a former run wrote beyond the last are removed.

    Returns:
        One item per picture, and the contact sheet as PNG bytes.
    """
    visible = denormalised(made.images, opened.data)
    top = made.labels.argmax(dim=1).tolist()
    items: list[dict[str, Any]] = []
    for index, picture in enumerate(visible):
        path = folder / PICTURES / f"{index:05d}.png"
        images.save_png(path, picture, overwrite=True)
        shown = [b.label for b in made.boxes if b.image == index] or [top[index]]
        items.append(
            {
                "path": str(path),
                "output": str(path),
                "status": "ok",
                "classes": shown,
                "agrees": bool(made.agreement[index]),
            }
        )
    captions = [f"{i['classes'][0]} {'yes' if i['agrees'] else 'no'}" for i in items]
    sheet = sheet_png(visible, captions=captions)
    write_file(folder / SHEET, sheet, overwrite=True)
    write_tensors(folder / TENSORS, made, opened, config)
    written = {Path(item["path"]).name for item in items}
    for path in (folder / PICTURES).iterdir():
        if re.fullmatch(r"[0-9]{5,}\.png", path.name) and path.name not in written:
            path.unlink()
    return items, sheet
