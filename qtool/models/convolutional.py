"""The parts of convolutional classifiers: units to rebuild, BatchNorms to fold, LayerNorms to even.

As in `models.layout`, networks are told apart by the names of timm's classes. In the blocks named
here a BatchNorm that follows a convolution among the children of a module is its only reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

_BLOCKS = frozenset(
    {
        "BasicBlock",
        "Bottleneck",
        "DepthwiseSeparableConv",
        "InvertedResidual",
        "EdgeResidual",
        "ConvBnAct",
        "ConvNeXtBlock",
    }
)
_CHAINS = frozenset({"BasicBlock", "Bottleneck", "DepthwiseSeparableConv", "InvertedResidual"})
"""Blocks whose children come in the order in which they run, up to what is added at the end."""

_HEADS = ("fc", "classifier", "head.pre_logits", "head.fc", "linear")


@dataclass(frozen=True)
class ConvolutionalParts:
    """The parts of a convolutional classifier, in forward order.

    Attributes:
        units: Paths of the modules that are rebuilt one after another.
        batch_norms: Pairs of a convolution and the BatchNorm that alone reads its output.
        norms: Pairs of a LayerNorm and the only linear layer that reads its output.
    """

    units: tuple[str, ...]
    batch_norms: tuple[tuple[str, str], ...]
    norms: tuple[tuple[str, str], ...]


def parts(model: nn.Module) -> ConvolutionalParts | None:
    """Describe a ResNet, MobileNetV2, EfficientNet or ConvNeXt of timm; None for other models."""
    classes = {base.__name__ for base in type(model).__mro__}
    if "ResNet" in classes:
        units = ["conv1", *_children(model, ("layer1", "layer2", "layer3", "layer4"))]
    elif "CifarResNet" in classes:
        units = ["conv1", *_children(model, ("layer1", "layer2", "layer3"))]
    elif "EfficientNet" in classes:
        stages = [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]
        units = ["conv_stem", *_children(model, stages), "conv_head"]
    elif "ConvNeXt" in classes:
        units = ["stem"]
        for name, _ in model.get_submodule("stages").named_children():
            stage = f"stages.{name}"
            units += [f"{stage}.downsample", *_children(model, [f"{stage}.blocks"])]
    else:
        return None
    modules = dict(model.named_modules())
    units = [name for name in (*units, *_HEADS) if _has_layers(modules.get(name))]
    blocks = [name for name in units if type(modules[name]).__name__ in _BLOCKS]
    strange = [name for name in units if name not in blocks and not _is_plain(modules[name])]
    if strange or _outside(model, units):
        return None
    pairs = _pairs_among(model, "") + [
        pair
        for name, module in model.named_modules()
        if name and _inside(name, ("conv1", *blocks))
        for pair in _pairs_among(module, f"{name}.")
    ]
    feeds = [(f"{name}.norm", f"{name}.mlp.fc1") for name in units]
    return ConvolutionalParts(
        units=tuple(units),
        batch_norms=tuple(pairs),
        norms=tuple(
            (norm, linear)
            for norm, linear in feeds
            if isinstance(modules.get(norm), nn.LayerNorm)
            and isinstance(modules.get(linear), nn.Linear)
        ),
    )


def chains(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Convolutions of which another one alone reads the result, through what lies between.

    Args:
        model: Any model; quantized layers may stand for its convolutions.

    Yields:
        Paths of a module, of what stands between, in order, and of the module that follows.
    """
    for path, block in model.named_modules():
        if type(block).__name__ not in _CHAINS:
            continue
        names = [f"{path}.{name}" for name, _ in block.named_children()]
        stops = [index for index, name in enumerate(names) if _convolves(name)]
        for first, second in pairwise(stops):
            yield names[first], tuple(names[first + 1 : second]), names[second]


def _convolves(name: str) -> bool:
    """Whether a child of a block has the name of a convolution on its main path."""
    return name.rpartition(".")[2].startswith("conv")


def _children(model: nn.Module, parents: list[str] | tuple[str, ...]) -> list[str]:
    return [
        f"{parent}.{name}"
        for parent in parents
        for name, _ in model.get_submodule(parent).named_children()
    ]


def _is_layer(module: object) -> bool:
    return isinstance(module, nn.Conv2d | nn.Linear)


def _has_layers(module: nn.Module | None) -> bool:
    return module is not None and any(_is_layer(part) for part in module.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether a unit is one layer, or a chain with the layers among its direct children."""
    return _is_layer(module) or isinstance(module, nn.Sequential)


def _inside(name: str, units: tuple[str, ...]) -> bool:
    return any(name == unit or name.startswith(f"{unit}.") for unit in units)


def _outside(model: nn.Module, units: list[str]) -> bool:
    """Whether a layer lies in none of the units, so that nothing would calibrate it."""
    return any(
        _is_layer(module) and not _inside(name, tuple(units))
        for name, module in model.named_modules()
    )


def _pairs_among(module: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """Convolutions followed by a BatchNorm of their width among the children of one module."""
    found = []
    before: tuple[str, nn.Module] | None = None
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and before is not None:
            convolution, tail = before[1], before[0]
            while isinstance(convolution, nn.Sequential) and len(convolution):
                tail, convolution = f"{tail}.{len(convolution) - 1}", convolution[-1]
            if (
                isinstance(convolution, nn.Conv2d)
                and convolution.out_channels == child.num_features
                and child.track_running_stats
            ):
                found.append((f"{prefix}{tail}", f"{prefix}{name}"))
        before = (name, child)
    return found
