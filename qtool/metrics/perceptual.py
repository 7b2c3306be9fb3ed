"""LPIPS: how different two pictures look to a network that has seen many.

The package `lpips` brings the learnt weights of its few linear layers; the network under them is
torchvision's AlexNet, whose weights are a download. Both have to be there, nothing takes their
place.

Reference: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual
metric", arXiv:1801.03924; AlexNet, version 0.1, as the demoire papers report it.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.request
import warnings
from http.client import HTTPException
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from qtool.errors import MissingError

NAME: Final = "lpips"
"""The metric; lower is better, 0 for equal pictures."""

WEIGHTS_URL: Final = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
"""Where torchvision keeps the weights of its AlexNet, 244 MB."""

SMALLEST: Final = 31
"""Shortest side that AlexNet can look at."""

_PATIENCE = 10.0


class Lpips:
    """The metric, ready to measure.

    Args:
        device: Where to compute.
        offline: Take the weights of AlexNet from torch's cache only; no socket is opened.

    Raises:
        MissingError: The package or the weights are not there.
    """

    def __init__(self, device: torch.device, *, offline: bool) -> None:
        require_package()
        self.device = device
        self.network = _network()
        trunk = _trunk_weights(offline=offline)
        net = self.network.get_submodule("net")
        # lpips cuts AlexNet's `features.N` into slices that keep the numbers.
        wanted = {name: f"features.{name.partition('.')[2]}" for name in net.state_dict()}
        if missing := sorted(set(wanted.values()) - trunk.keys()):
            raise _missing(f"the file holds no {missing[0]}")
        net.load_state_dict({name: trunk[key] for name, key in wanted.items()})
        self.network.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, output: Tensor, target: Tensor) -> float:
        """Distance of two pictures, (3, H, W) in 0..1.

        Raises:
            ValueError: The shapes differ, or a side is too short.
        """
        if output.shape != target.shape or output.ndim != 3:
            raise ValueError(
                f"pictures (C, H, W) disagree: {tuple(output.shape)}, {tuple(target.shape)}"
            )
        if min(output.shape[1:]) < SMALLEST:
            raise ValueError(f"LPIPS takes pictures of {SMALLEST} x {SMALLEST} pixels or more")
        scaled = [
            picture.to(self.device, torch.float32).clamp(0, 1).mul(2).sub(1)[None]
            for picture in (output, target)
        ]
        return float(self.network(*scaled))


def require_package() -> None:
    """Refuse to go on without the package.

    Raises:
        MissingError: It is not installed.
    """
    if importlib.util.find_spec("lpips") is None:
        raise MissingError(
            "LPIPS needs the package lpips, which is not installed",
            remedy="pip install 'qtool[lpips]'",
        )


def _network() -> nn.Module:
    """LPIPS with its own weights over an AlexNet without any."""
    import lpips

    with warnings.catch_warnings():
        # The package still calls torchvision by words that torchvision is about to drop.
        warnings.simplefilter("ignore")
        network: nn.Module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    return network


def _cached() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_URL.rpartition("/")[2]


def _trunk_weights(*, offline: bool) -> dict[str, Tensor]:
    """AlexNet's state dict, from torch's cache or else by download.

    Raises:
        MissingError: It is not cached, and offline, out of reach or damaged.
    """
    path = _cached()
    if not path.is_file():
        if offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
            raise _missing("not in torch's cache, and offline")
        try:
            # torch would wait for minutes where a connection is neither refused nor answered.
            request = urllib.request.Request(WEIGHTS_URL, method="HEAD")
            urllib.request.urlopen(request, timeout=_PATIENCE).close()
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = WEIGHTS_URL.rpartition("-")[2].partition(".")[0]
            torch.hub.download_url_to_file(WEIGHTS_URL, str(path), prefix, progress=False)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = " ".join(str(error).split())[:120]
            raise _missing(f"the download failed ({reason})") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # The reader answers a damaged file with almost any exception.
    except Exception as error:
        raise _missing(f"{path} is damaged") from error
    return dict(state) if isinstance(state, dict) else {}


def _missing(reason: str) -> MissingError:
    return MissingError(
        f"the AlexNet weights (244 MB) that LPIPS looks with are missing: {reason}",
        remedy=f"fetch them once: curl --create-dirs -L {WEIGHTS_URL} -o {_cached()}",
    )
