"""What use cases share: threads, device, backend, offline; reading pictures, writing reports."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from qtool.engine import dispatch
from qtool.errors import MissingError, OutputExistsError
from qtool.io import folders, images
from qtool.io.atomic import write_file
from qtool.models.vision import DataConfig
from qtool.report import Result
from qtool.settings.base import CommonSettings

notice = logging.getLogger("qtool.notice")


def prepare(settings: CommonSettings) -> torch.device:
    """Apply the common settings to this process and say which device was taken.

    Returns:
        The device to compute on.

    Raises:
        MissingError: CUDA was asked for and is not there.
        BackendError: The backend asked for is not there.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    dispatch.set_backend(settings.backend)
    torch.manual_seed(settings.seed)
    device = choose_device(settings.device)
    notice.info("device: %s", device.type if device.type == "cpu" else device)
    return device


def choose_device(name: str) -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        MissingError: CUDA, or that many CUDA devices, are not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            raise MissingError(
                f"--device {name} was asked for, but PyTorch finds {found} here",
                remedy="use --device cpu, or install a CUDA build of torch and its driver",
            )
    return device


def planned_device(settings: CommonSettings) -> str:
    """The device that a run would take, for its dry run; nothing is set.

    Raises:
        MissingError: CUDA was asked for and is not there.
    """
    return str(choose_device(settings.device))


def bfloat16_is_faster(device: torch.device) -> bool:
    """Tell from what the hardware has whether bfloat16 products beat float32 ones.

    Decided by capability and not by a timing, so that the same machine always decides alike.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return sys.platform == "linux" and bool(torch.cpu._is_avx512_bf16_supported())


def check_report(path: Path | None, *, replace: bool) -> None:
    """Refuse before any work a report or preview that could not be written.

    Args:
        path: The page, if one was asked for.
        replace: Whether one that is there may be replaced.

    Raises:
        OutputExistsError: It is there and may not.
        QtoolError: The place cannot be written to.
    """
    if path is None:
        return
    if path.is_file() and not replace:
        raise OutputExistsError(
            f"{path} exists already", remedy="replace it with --overwrite, or name another file"
        )
    folders.check_output(path, overwrite=True)


def write_report(path: Path | None, result: Result) -> None:
    """Write the report that was asked for, if any, in the form its suffix names."""
    if path is not None:
        write_file(path, result.to_text(path.suffix).encode(), overwrite=True)


def read_picture(path: Path, data: DataConfig, *, crop_pct: float | None = None) -> Tensor:
    """Read a picture as a model expects it.

    Args:
        path: The picture.
        data: The model's preprocessing.
        crop_pct: Share of the picture kept; None takes the model's own.

    Returns:
        (3, H, W), normalised.

    Raises:
        ImageError: The file cannot be decoded.
    """
    return images.to_tensor(
        images.load_rgb(path),
        size=data.input_size[1:],
        crop_pct=crop_pct or data.crop_pct,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
    )
