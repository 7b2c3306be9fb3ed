"""Steps of synthesis and the passes of training on a GPU, beside what they are measured against.

    python tests/bench/training.py vit_base_patch16_224 --batch 32 --json training.json

One step of SPDFQ and of PSAQ images (as many squares as images, random weights: time does not
depend on them), called and replayed as a CUDA graph, against its floor: forward and input-gradient
products at the rate of the chip, measured in the same run. Both kinds of steps start from the same
images, and how far their pixels are apart after all steps is told. Then the kernels of
`qtool.engine.training` beside PyTorch's own passes, forwards and backwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qtool.engine import dispatch, training
from qtool.methods.spdfq import losses
from qtool.methods.spdfq.batch import BatchSynthesizer, SynthesisConfig
from qtool.models import vision

WARM_UP = 6


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of one call, each waited for."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found)


def rate(device: torch.device) -> float:
    """Operations a second of a bfloat16 product of random data."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    return 2 * size**3 / milliseconds(lambda: a @ b, device, 10) * 1e3


def synthesizer(
    model: nn.Module, method: Any, options: argparse.Namespace, size: int
) -> BatchSynthesizer:
    """A batch about to be optimised."""
    return BatchSynthesizer(
        model,
        vision.layout(model),
        count=options.batch,
        size=(size, size),
        num_classes=1000,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        config=SynthesisConfig(
            method=method,
            steps=WARM_UP + 2 * options.steps,
            patches_per_step=options.batch,
            bfloat16=options.device.type == "cuda",
        ),
    )


def steps(model: nn.Module, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One step of every method, called and replayed."""
    size = options.size
    fastest = rate(options.device)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, size, size, device=options.device))
    for method in ("spdfq", "psaq"):
        seen = options.batch * (2 if method == "spdfq" else 1)
        floor = 2 * counter.get_total_flops() * seen / fastest * 1e3
        pixels = {}
        for replayed in (False, True):
            made = synthesizer(model, method, options, size)
            made._gradient.active = made._gradient.active and replayed
            for _ in range(WARM_UP):
                made.step()
            taken = milliseconds(made.step, options.device, options.steps)
            pixels[replayed] = made.pixels.detach()
            yield {
                "step": method,
                "replayed": made.replays,
                "ms": taken,
                "floor_ms": floor,
                "over_floor": taken / floor,
                "images_per_second_at_200_steps": options.batch / (0.2 * taken),
            }
        yield {
            "step": method,
            "largest_difference_of_pixels": float((pixels[True] - pixels[False]).abs().max()),
        }


def passes(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Kernels of training beside PyTorch's passes."""
    device, batch = options.device, options.batch
    step = torch.tensor(0.1, device=device, requires_grad=True)
    prior = torch.rand(batch, 12, 196, device=device).softmax(dim=-1)
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "learnt steps": (
            lambda x: training.count_levels(x, step, 15).sum(),
            torch.randn(batch, 256, 28, 28, device=device),
        ),
        "similarity entropy": (
            losses.patch_similarity_entropy,
            torch.randn(batch, 196, 64, device=device),
        ),
        "alignment": (
            lambda x: losses.alignment(x, prior),
            torch.rand(batch, 12, 196, device=device).softmax(dim=-1),
        ),
    }
    for name, (function, x) in cases.items():
        x = x.requires_grad_(True)

        def both(function: Callable[[Tensor], Tensor] = function, x: Tensor = x) -> None:
            x.grad = None
            function(x).backward()

        found = {}
        for backend in ("reference", "triton"):
            with dispatch.use_backend(backend):
                both()
                found[backend] = milliseconds(both, device, options.steps)
        yield {
            "pass": name,
            "ms": found["triton"],
            "pytorch_ms": found["reference"],
            "pytorch_over_this": found["reference"] / found["triton"],
        }


def main() -> None:
    """Measure, print one record a line, keep everything in one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a name of timm")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20, help="of each kind, timed")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = vision.build(options.model, {}).to(options.device).eval().requires_grad_(False)
    machine = "cpu" if options.device.type == "cpu" else torch.cuda.get_device_name()
    records: list[dict[str, Any]] = [
        {"device": machine, "torch": torch.__version__, "model": options.model}
    ]
    for source in (steps(model, options), passes(options)):
        for record in source:
            records.append(
                {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
            )
            print(json.dumps(records[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
