"""Low-bit quantization of vision models, with no training data needed.

The names below are loaded on first use, so that `import qtool` is quick and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtool.api.demoire.run import demoire
    from qtool.api.evaluate import evaluate
    from qtool.api.load import load
    from qtool.api.moire import synthesize_moire
    from qtool.api.quantize import quantize
    from qtool.api.switch_bits import switch_bits
    from qtool.api.synthesize import synthesize_images
    from qtool.api.train import train_demoire
    from qtool.errors import QtoolError
    from qtool.quant.widths import bits
    from qtool.settings.demoire import DemoireSettings
    from qtool.settings.evaluate import EvaluateSettings
    from qtool.settings.moire import MoireSettings
    from qtool.settings.quantize import QuantizeSettings
    from qtool.settings.switch_bits import SwitchBitsSettings
    from qtool.settings.synthesize import SynthesizeSettings
    from qtool.settings.train import TrainDemoireSettings

    __version__: str

__all__ = [
    "DemoireSettings",
    "EvaluateSettings",
    "MoireSettings",
    "QtoolError",
    "QuantizeSettings",
    "SwitchBitsSettings",
    "SynthesizeSettings",
    "TrainDemoireSettings",
    "__version__",
    "bits",
    "demoire",
    "evaluate",
    "load",
    "quantize",
    "switch_bits",
    "synthesize_images",
    "synthesize_moire",
    "train_demoire",
]

_HOME = {
    "DemoireSettings": "qtool.settings.demoire",
    "EvaluateSettings": "qtool.settings.evaluate",
    "MoireSettings": "qtool.settings.moire",
    "QtoolError": "qtool.errors",
    "QuantizeSettings": "qtool.settings.quantize",
    "SwitchBitsSettings": "qtool.settings.switch_bits",
    "SynthesizeSettings": "qtool.settings.synthesize",
    "TrainDemoireSettings": "qtool.settings.train",
    "bits": "qtool.quant.widths",
    "demoire": "qtool.api.demoire.run",
    "evaluate": "qtool.api.evaluate",
    "load": "qtool.api.load",
    "quantize": "qtool.api.quantize",
    "switch_bits": "qtool.api.switch_bits",
    "synthesize_images": "qtool.api.synthesize",
    "synthesize_moire": "qtool.api.moire",
    "train_demoire": "qtool.api.train",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home the first time it is asked for."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: object = version("qtool")
        except PackageNotFoundError:  # a checkout on PYTHONPATH
            value = "0+unknown"
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
