"""What every use case does first: threads, device, backend, offline."""

from __future__ import annotations

import logging
import os
import sys

import torch

from qtool.engine import dispatch
from qtool.errors import MissingError
from qtool.settings import CommonSettings

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


def bfloat16_is_faster(device: torch.device) -> bool:
    """Tell from what the hardware has whether bfloat16 products beat float32 ones.

    Decided by capability and not by a timing, so that the same machine always decides alike.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return sys.platform == "linux" and bool(torch.cpu._is_avx512_bf16_supported())
