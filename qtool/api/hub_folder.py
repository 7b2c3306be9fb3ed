"""The checkpoint that a run writes: a file, or a folder one can upload to a model hub as it is.

A hub folder holds `model.safetensors`, the same bytes as the file, `README.md`, and `config.json`
as timm's repositories have it, with `quantization_config`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from qtool.api import model_card
from qtool.errors import UsageError
from qtool.io import checkpoint, folders
from qtool.io.atomic import Writer, write_file, write_folder
from qtool.models import vision
from qtool.models.registry import CONFIG_FILE, WEIGHTS_FILE
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.switch_bits import SwitchBitsSettings

CARD_FILE = "README.md"


def check_output(
    path: Path, folder: Path | None, *, overwrite: bool, skip_existing: bool = False
) -> bool:
    """Check before work starts that a checkpoint, or the folder around it, can be written.

    Args:
        path: The checkpoint.
        folder: Its hub folder; None where the checkpoint stands alone.
        overwrite: Whether it may be replaced.
        skip_existing: Whether it may be left as it is.

    Returns:
        True to write it, False to skip it.

    Raises:
        OutputExistsError: It is there and may neither be replaced nor left.
        QtoolError: The place cannot be written to.
    """
    if folder is None:
        return folders.check_output(path, overwrite=overwrite, skip_existing=skip_existing)
    names = (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE)
    return folders.check_files(folder, names, overwrite=overwrite, skip_existing=skip_existing)


def save(
    settings: QuantizeSettings,
    header: checkpoint.Header,
    tensors: Mapping[str, Tensor],
    summary: dict[str, Any],
    *,
    verify: Callable[[Path], dict[str, float]],
) -> None:
    """Write what `quantize` made, where the request wants it.

    Args:
        settings: The request.
        header: What the checkpoint says about itself.
        tensors: All tensors of the quantized model by name.
        summary: What the run measured, for the card; gets `bytes`, `steps` if the request names
            them, and `verify` if it wants that.
        verify: Reads the file back and measures how much it differs; raises if that is too much.

    Raises:
        QtoolError: The file is not as it should be, or cannot be written; nothing is left.
    """

    def check(written: Path) -> None:
        summary["bytes"] = written.stat().st_size
        if settings.verify:
            summary["verify"] = verify(written)

    if settings.steps is not None:
        summary["steps"] = settings.steps
    if settings.folder is None:
        checkpoint.write(
            settings.output, header, tensors, overwrite=settings.overwrite, check=check
        )
        return
    content = checkpoint.content(header, tensors)
    _write(
        settings.folder,
        header,
        content,
        summary=summary,
        overwrite=settings.overwrite,
        check=check,
    )


def check_copy(settings: SwitchBitsSettings) -> None:
    """Check before work starts that the copy of `switch-bits`, if one is wanted, can be written.

    Raises:
        UsageError: It is there and may not be replaced, or it is its own source.
        QtoolError: The place cannot be written to.
    """
    if settings.output is None:
        return
    check_output(settings.output, settings.folder, overwrite=settings.overwrite)
    if settings.output.exists() and settings.output.samefile(settings.target):
        raise UsageError("the copy would replace its source", remedy="give --in-place")


def switch(settings: SwitchBitsSettings, header: checkpoint.Header) -> None:
    """Change the header of a checkpoint, in itself or in a copy, as the request wants it.

    Raises:
        QtoolError: The file is damaged, or the copy cannot be written.
    """
    if settings.output is not None:

        def content(file: BinaryIO) -> None:
            checkpoint.change_header(settings.target, header, copy=file)

        copy(settings, header, content)
    elif settings.in_place:
        checkpoint.change_header(settings.target, header)


def copy(settings: SwitchBitsSettings, header: checkpoint.Header, content: Writer) -> None:
    """Write the copy that `switch-bits` makes, where the request wants it.

    Args:
        settings: The request, which names an output.
        header: What the copy says about itself.
        content: Writes it to an open file.

    Raises:
        QtoolError: It cannot be written.
    """
    if settings.folder is not None:
        _write(settings.folder, header, content, summary={}, overwrite=settings.overwrite)
    elif settings.output is not None:
        write_file(settings.output, content, overwrite=settings.overwrite)


def _write(
    folder: Path,
    header: checkpoint.Header,
    content: Writer,
    *,
    summary: Mapping[str, Any],
    overwrite: bool,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a hub folder; its card tells what is in the summary after `check`."""
    size = 0

    def model(file: BinaryIO) -> None:
        nonlocal size
        content(file)
        size = file.tell()

    def card(file: BinaryIO) -> None:
        file.write(model_card.text(header, size=size, summary=summary).encode())

    config = json.dumps(_config(header), indent=2) + "\n"
    files: dict[str, Writer | bytes] = {
        WEIGHTS_FILE: model,
        CARD_FILE: card,
        CONFIG_FILE: config.encode(),
    }
    write_folder(folder, files, overwrite=overwrite, check=check)


def _config(header: checkpoint.Header) -> dict[str, Any]:
    """What `config.json` says, in the words of timm's repositories."""
    architecture, _, tag = header.architecture.partition(".")
    config: dict[str, Any] = {"architecture": architecture, "model_args": header.model_args}
    if header.task == "restoration":
        config["data"] = header.data
    else:
        usual = vision.DEMO_ARGUMENTS["num_classes"]
        classes = header.model_args.get("num_classes", usual)
        config["num_classes"] = classes
        config["pretrained_cfg"] = {"tag": tag, "num_classes": classes, **header.data}
    return {**config, "quantization_config": header.quantization_config}
