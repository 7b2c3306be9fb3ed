"""Quantized models to ONNX: traced, packed, written, and compared with the engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool import __version__
from qtool.api import onnx_check
from qtool.api.load import restore
from qtool.api.nested_model import choose_bits
from qtool.api.runtime import prepare
from qtool.demo import pictures
from qtool.errors import UsageError
from qtool.io import checkpoint, folders, onnx
from qtool.io.atomic import write_file
from qtool.models import vision
from qtool.quant.onnx_layers import Traced
from qtool.settings.base import CommonSettings

PICTURES = 2
"""How many pictures an exported model is checked on."""

INPUT, OUTPUT = "image", "logits"


def check_output(path: Path | None, *, overwrite: bool, skip_existing: bool = False) -> bool:
    """Check before any work that an ONNX file can be made.

    Returns:
        True to write it; False where none is asked for, or it exists and may stay.

    Raises:
        MissingError: The extra `onnx` is not installed.
        UsageError: The file exists.
        QtoolError: The place cannot be written to.
    """
    if path is None:
        return False
    onnx.require()
    return folders.check_output(path, overwrite=overwrite, skip_existing=skip_existing)


def export(
    model: nn.Module,
    header: checkpoint.Header,
    path: Path,
    *,
    images: Tensor,
    overwrite: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Write a quantized model as ONNX, at the width it runs at.

    Weights and activations are quantized in the file as they are in the model, with QuantizeLinear
    and DequantizeLinear; the size of a batch is free.

    Args:
        model: A model of integer layers, (B, 3, H, W) to (B, classes).
        header: What its checkpoint says about it.
        path: The file.
        images: Pictures to check it on, (N, 3, H, W), normalised.
        overwrite: Whether an existing file may be replaced.
        verify: Whether to run it in ONNX Runtime and compare.

    Returns:
        Path, size, opset, weights by type, and how its outputs compare with the model's.

    Raises:
        QtoolError: The file computes something else, or cannot be written; nothing is left.
    """
    images = images[:PICTURES]
    program, taps = _trace(model, images)
    weights = onnx.pack_weights(program.model)
    checked: dict[str, float] = {}
    if verify:
        outputs = _run(onnx.to_bytes(program.model), images, optimize=False)
        checked.update(onnx_check.lockstep(model, images, taps, outputs))
    metadata = {
        "qtool.version": __version__,
        "qtool.architecture": header.architecture,
        "qtool.bits": header.active_bits,
        "qtool.data": json.dumps(header.data),
    }
    content = onnx.to_bytes(program.model, outputs=1, metadata=metadata)

    def check(written: Path) -> None:
        if verify:
            checked.update(onnx_check.compare(model, images, *_run(str(written), images)))

    write_file(path, content, overwrite=overwrite, check=check)
    summary: dict[str, Any] = {
        "path": str(path),
        "bytes": len(content),
        "opset": onnx.OPSET,
        "bits": header.active_bits,
        "weights": weights,
    }
    return {**summary, "verify": checked} if checked else summary


def check_engine(header: checkpoint.Header) -> None:
    """Refuse a checkpoint whose layers have no form in ONNX here.

    Raises:
        UsageError: It is a network of branches, or restores pictures.
    """
    kind = "networks of branches" if header.engine == "branches" else "demoire networks"
    if header.engine == "branches" or header.task == "restoration":
        raise UsageError(f"{kind} are not exported to ONNX", remedy="leave out --onnx")


def export_file(
    settings: CommonSettings,
    source: Path,
    path: Path,
    *,
    header: checkpoint.Header | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as ONNX; like `export`, checked on drawn pictures.

    Args:
        settings: Device, threads and backend to check with.
        source: The checkpoint.
        path: The ONNX file.
        header: The checkpoint's header, with other widths; None takes its own.
        overwrite: Whether an existing file may be replaced.

    Raises:
        CheckpointError: The checkpoint is damaged.
        QtoolError: The file computes something else, or cannot be written; nothing is left.
    """
    device = prepare(settings)
    own, tensors = checkpoint.read(source)
    header = header or own
    check_engine(header)
    model = restore(header, tensors, origin=str(source))
    if header.engine == "nested":
        choose_bits(model, header, None, path=str(source))
    images = _drawn(vision.DataConfig.from_dict(header.data)).to(device)
    return export(model.to(device), header, path, images=images, overwrite=overwrite)


def _drawn(data: vision.DataConfig) -> Tensor:
    """Pictures for a model that came without any, (N, 3, H, W), normalised."""
    _, height, width = data.input_size
    images, _ = pictures.held_out(PICTURES, max(height, width))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (data.mean, data.std))
    return (images[..., :height, :width] - mean) / std


def _trace(model: nn.Module, images: Tensor) -> tuple[torch.onnx.ONNXProgram, list[str]]:
    """The model as ONNX sees it, and the names of the layers that it also gives the values of."""
    traced = Traced(model)
    # Two pictures even where there is one: tracing takes a batch of 1 for a fixed size.
    example = images.cpu().float().repeat(PICTURES, 1, 1, 1)[:PICTURES]
    with warnings.catch_warnings():
        # The exporter's words about its own inner workings are of no use to who exports.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=onnx.OPSET,
            verbose=False,
        )
    if program is None:
        raise AssertionError("the exporter returns a program")
    return program, traced.taps.names


def _run(model: bytes | str, images: Tensor, *, optimize: bool = True) -> list[Tensor]:
    outputs = onnx.run(model, images.cpu().float().numpy(), optimize=optimize)
    return [torch.from_numpy(output).to(images.device) for output in outputs]


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a table says about an exported file."""
    made = summary.get("onnx")
    if not made:
        return []
    rows = [("ONNX file", made["path"])]
    if "bytes" in made:
        kinds = ", ".join(f"{count} {kind}" for kind, count in made["weights"].items())
        size = f"{made['bytes'] / 1e6:.2f} MB, weights: {kinds}"
        rows.append(("its size", size))
    if "verify" in made:
        checked = made["verify"]
        rows.append(("in ONNX Runtime its layers differ by", f"{checked['layer_difference']:.2g}"))
        rows.append(("its logits, independent run", f"{checked['relative_error']:.2g}"))
        rows.append(("the engine's under float noise", f"{checked['relative_error_of_noise']:.2g}"))
    return rows
