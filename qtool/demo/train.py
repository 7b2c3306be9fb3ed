"""Train the bundled classifier `demo_vit` on drawn pictures.

    python -m qtool.demo.train -o assets/demo_vit.safetensors

Every step draws fresh pictures, so there is nothing to overfit and no augmentation. They are less
cluttered than those that accuracy is measured on: a model this small learns from them several times
faster. Two more choices make about an hour of one CPU core enough. The patch embedding starts as a
whitening transform: most of the variance of a patch is its mean colour, which says nothing about
the class, and a random embedding passes little else. And the matrices of the blocks are trained
with Muon, the rest with AdamW.

The weights are kept in half precision on disk; the accuracy in the metadata is that of the stored
weights, in float32, on held-out pictures.

Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from qtool.demo import pictures
from qtool.models import vision

logger = logging.getLogger(__name__)

MEAN = STD = 0.5


def learning_rate(step: int, *, steps: int, warmup: int) -> float:
    """Return the share of the peak rate at `step`: a linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def initialise(model: nn.Module, images: Tensor) -> None:
    """Set the starting weights of a new `demo_vit`.

    Patches come out of the embedding as their leading principal components, each of unit variance;
    positions start as sines, rows in the first half of the channels and columns in the second.

    Args:
        model: The model, from `vision.build`.
        images: Normalised pictures to whiten by, shape (B, 3, H, W).
    """
    weight = model.get_parameter("patch_embed.proj.weight")
    width, side = weight.shape[0], weight.shape[-1]
    patches = functional.unfold(images, side, stride=side).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    centred = patches - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(patches))
    filters = (directions / (variances + 0.05 * variances.mean()).sqrt()).T.flip(0)[:width]
    weight.copy_(filters.view_as(weight))
    model.get_parameter("patch_embed.proj.bias").copy_(-(filters @ mean))

    grid = images.shape[-1] // side
    waves = torch.arange(grid)[:, None] * (math.pi / 32) * torch.arange(1, width // 4 + 1)
    axis = torch.cat([waves.sin(), waves.cos()], 1)
    rows, columns = axis[:, None].expand(grid, grid, -1), axis[None].expand(grid, grid, -1)
    positions = torch.cat([rows, columns], 2).flatten(0, 1)
    model.get_parameter("pos_embed")[0, 1:] = 0.5 * positions
    model.get_parameter("cls_token").normal_(std=0.5)
    for name, module in model.get_submodule("blocks").named_modules():
        if isinstance(module, nn.Linear):
            into_residual = name.endswith(("attn.proj", "fc2"))
            nn.init.xavier_uniform_(module.weight, gain=0.4 if into_residual else 1.0)


def optimizers(
    model: nn.Module, *, peak_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if matrix else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=peak_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=peak_rate / 3, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


@torch.inference_mode()
def accuracy(model: nn.Module, count: int, *, size: int = 64, batch_size: int = 120) -> float:
    """Return the top-1 share of `model` on the first `count` held-out pictures."""
    was_training = model.training
    model.eval()
    hits = 0
    for start in range(0, count, batch_size):
        images, labels = pictures.held_out(min(batch_size, count - start), size, start=start)
        hits += int((model((images - MEAN) / STD).argmax(1) == labels).sum())
    model.train(was_training)
    return hits / count


def write_weights(model: nn.Module, path: Path, recipe: dict[str, Any], *, count: int) -> float:
    """Store the weights in half precision with their measured accuracy; return that accuracy.

    Args:
        model: A float32 `demo_vit`; left as it is.
        path: The safetensors file, replaced as a whole.
        recipe: How the weights came about, for the metadata.
        count: Held-out pictures to measure on.

    Returns:
        Top-1 share of the stored weights.
    """
    halves = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    stored = vision.build("demo_vit", {})
    stored.load_state_dict({name: value.float() for name, value in halves.items()})
    top1 = accuracy(stored, count)
    metadata = {
        "format": "pt",
        "architecture": "demo_vit",
        "model_args": json.dumps(vision.DEMO_ARGUMENTS),
        "recipe": json.dumps(recipe),
        "seed": str(recipe["seed"]),
        "accuracy": json.dumps({"top1": round(top1, 5), "held_out_pictures": count}),
        "provenance": "trained from random weights by qtool.demo.train on qtool.demo.pictures; "
        "no outside data or weights",
        "labels": json.dumps(pictures.class_names()),
        "licence": "Apache-2.0",
    }
    partial = path.with_name(f".{path.name}.tmp")
    save_file(halves, partial, metadata)
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)
    partial.replace(path)
    return top1


def train(
    output: Path,
    *,
    steps: int = 10_500,
    batch_size: int = 64,
    peak_rate: float = 3e-3,
    weight_decay: float = 0.01,
    label_smoothing: float = 0.05,
    warmup: int = 200,
    seed: int = 0,
    resume: Path | None = None,
    evaluate_every: int = 500,
    held_out: int = 2400,
) -> float:
    """Train `demo_vit` and write it to `output`, now and then on the way and at the end.

    Args:
        output: The safetensors file.
        steps: Optimiser steps in all, those of a resumed run included.
        batch_size: Pictures a step.
        peak_rate: Highest learning rate of Muon; AdamW takes a third.
        weight_decay: Decay of the matrices of the blocks.
        label_smoothing: Share of the target spread over all classes.
        warmup: Steps until the peak rate.
        seed: Of the initial weights and of the stream of pictures.
        resume: State file: read when it exists, written at every evaluation.
        evaluate_every: Steps between evaluations.
        held_out: Pictures of the final evaluation; those on the way take a quarter.

    Returns:
        Final top-1 share.
    """
    recipe = {
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": "Muon and AdamW",
        "peak_rate": peak_rate,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "warmup": warmup,
        "schedule": "cosine",
        "precision": "bfloat16 autocast",
        "pictures": "easy; measured on full difficulty",
        "seed": seed,
    }
    torch.manual_seed(seed)
    model = vision.build("demo_vit", {})
    vision.unfuse_attention(model)  # on a CPU, fused attention is the slower one to differentiate
    initialise(model, (pictures.draw(1500, seed=seed, difficulty=pictures.EASY)[0] - MEAN) / STD)
    pair = optimizers(model, peak_rate=peak_rate, weight_decay=weight_decay)
    first = 0
    if resume is not None and resume.exists():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(pair, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
        logger.info("resumed at step %d", first)

    model.train()
    began, running = time.monotonic(), 0.0
    for step in range(first, steps):
        rate = learning_rate(step, steps=steps, warmup=warmup)
        for optimizer, peak in zip(pair, (peak_rate, peak_rate / 3), strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        images, labels = pictures.draw(
            batch_size, seed=seed, start=step * batch_size, difficulty=pictures.EASY
        )
        loss = _step(model, pair, images, labels, label_smoothing)
        running = loss if step == first else 0.98 * running + 0.02 * loss
        if (step + 1) % 50 == 0:
            speed = (step + 1 - first) * batch_size / (time.monotonic() - began)
            logger.info("step %d loss %.4f, %.0f pictures/s", step + 1, running, speed)
        if (step + 1) % evaluate_every == 0 and step + 1 < steps:
            recipe["steps_done"] = step + 1
            top1 = write_weights(model, output, recipe, count=held_out // 4)
            logger.info("step %d top-1 %.4f", step + 1, top1)
            if resume is not None:
                _save_state(resume, model, pair, step + 1)
    recipe["steps_done"] = steps
    top1 = write_weights(model, output, recipe, count=held_out)
    logger.info("done: top-1 %.4f on %d held-out pictures", top1, held_out)
    return top1


def _step(
    model: nn.Module,
    pair: Sequence[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    label_smoothing: float,
) -> float:
    """Take one optimiser step on images (B, 3, H, W) and labels (B,); return the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model((images - MEAN) / STD)
    loss = functional.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in pair:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _save_state(
    path: Path, model: nn.Module, pair: Sequence[torch.optim.Optimizer], step: int
) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    states = [optimizer.state_dict() for optimizer in pair]
    torch.save({"model": model.state_dict(), "optimizers": states, "step": step}, partial)
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m qtool.demo.train", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=10_500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--peak-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="state file, read if there and kept up to date")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        options.out,
        steps=options.steps,
        batch_size=options.batch_size,
        peak_rate=options.peak_rate,
        seed=options.seed,
        resume=options.resume,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
