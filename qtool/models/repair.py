"""Importing timm where torchvision was built for another torch.

A CPU-only torch next to the registry's torchvision is a common pair, and it breaks at
`import torchvision`: the compiled extension does not load, so the operators that torchvision
goes on to describe do not exist. Nothing qtool uses needs them. Declaring them is enough.
"""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DECLARED: list[torch.library.Library] = []


def import_repaired(name: str) -> ModuleType:
    """Import a package; if torchvision's operators are missing, declare them and try again.

    Args:
        name: Top-level package that imports torchvision.

    Returns:
        The package. torchvision's own `ops.nms` and codecs stay unusable after a repair.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        logging.getLogger(__name__).info("torchvision and torch do not match: %s", error)
    for module in list(sys.modules):
        if module.partition(".")[0] in ("torchvision", name):
            del sys.modules[module]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + _SIGNATURE)
    _DECLARED.append(library)  # the declarations live as long as the library object
    return importlib.import_module(name)
