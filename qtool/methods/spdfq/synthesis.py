"""Calibration images out of the model itself: optimise pixels until they mean something to it.

Three methods behind one interface: `spdfq` (attention priors alignment, multi-semantic
reinforcement, soft labels), `psaq` (patch-similarity entropy, the baseline it improves on) and
`noise` (Gaussian pixels, the floor). Where there is no attention, `spdfq` matches the statistics of
BatchNorms instead, and does without either in a network that has neither.

References: SPDFQ (arXiv 2412.16553); PSAQ-ViT (arXiv 2203.02250).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qtool.errors import Progress
from qtool.methods.spdfq.batch import BatchSynthesizer, SynthesisConfig, SyntheticImages
from qtool.methods.spdfq.priors import Box
from qtool.models.vision import Layout


def batches(
    model: nn.Module,
    layout: Layout,
    *,
    count: int,
    size: tuple[int, int],
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    config: SynthesisConfig,
    batch_size: int = 32,
    share: tuple[int, int] = (0, 1),
    resume: Callable[[int], dict[str, Tensor] | None] | None = None,
    checkpoint: Callable[[int, dict[str, Tensor]], None] | None = None,
    progress: Progress | None = None,
) -> Iterator[SyntheticImages]:
    """Synthesize calibration images batch by batch, every batch with a fresh seed.

    Args:
        model: Frozen classifier in evaluation mode, no parameter requiring a gradient.
        layout: Its attention sites and token grid.
        count: Number of images.
        size: Height and width in pixels.
        num_classes: Width of the classifier's output.
        mean: Per-channel mean of the model's normalisation.
        std: Per-channel standard deviation of the model's normalisation.
        config: Settings.
        batch_size: Images optimised together.
        share: Number of this process and of all; each takes every so many'th batch.
        resume: Gives the state of a batch from an earlier run, if there is one.
        checkpoint: Called with the batch's index and state now and then.
        progress: Told about every step.

    Yields:
        The images of a batch, with labels, boxes, priors and agreement.
    """
    mine = range(math.ceil(count / batch_size))[share[0] :: share[1]]
    steps = 0 if config.method == "noise" else config.steps
    for place, batch in enumerate(mine):
        run = BatchSynthesizer(
            model,
            layout,
            count=min(batch_size, count - batch * batch_size),
            size=size,
            num_classes=num_classes,
            mean=mean,
            std=std,
            config=config,
            batch=batch,
        )
        state = resume(batch) if resume is not None else None
        if state is not None:
            run.load_state(state)
        while run.step_index < steps:
            record = run.step()
            if progress is not None:
                note = "" if record is None else f"loss {record['classification']:.2f}"
                progress("synthesize", place * steps + run.step_index, len(mine) * steps, note)
            if checkpoint is not None and record is not None:
                checkpoint(batch, run.state())
        yield run.result()


def merged(parts: Sequence[SyntheticImages]) -> SyntheticImages:
    """Put the images of several batches together, in their order."""
    offset = 0
    boxes: list[Box] = []
    for part in parts:
        boxes.extend(
            Box(box.image + offset, box.top, box.left, box.side, box.label) for box in part.boxes
        )
        offset += len(part.images)
    names = parts[0].priors
    return SyntheticImages(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        boxes=boxes,
        priors={name: torch.cat([part.priors[name] for part in parts]) for name in names},
        agreement=torch.cat([part.agreement for part in parts]),
        patch_agreement=torch.cat([part.patch_agreement for part in parts]),
        history=[record for part in parts for record in part.history],
    )
