"""A residual network as a list of blocks: which convolutions there are and what goes around them.

The description is enough to compute the body of the network with other layers in the place of its
convolutions, and with fewer channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.errors import UsageError
from qtool.models import cifar

_STEM = ("conv1", "bn1", "act1", "maxpool")
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_HEAD = ("global_pool", "fc", cifar.HEAD)
_PAIRS = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
_REFUSED = ("se", "aa", "drop_block", "drop_path")


@dataclass(frozen=True)
class Convolution:
    """A convolution and the BatchNorm behind it.

    Attributes:
        name: Path of the convolution.
        norm: Path of the BatchNorm.
        inputs: Channels it reads.
        outputs: Channels it writes.
        kernel: Height and width of the kernel.
        stride: Vertical and horizontal distance of two places.
        padding: Rows and columns of zeros on either side.
        dilation: Distance of two points of the kernel.
        pixels: Places in its output for one picture; 0 if the network was not run.
    """

    name: str
    norm: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    pixels: int = 0

    def multiplications(self, inputs: int | None = None, outputs: int | None = None) -> int:
        """Multiplications for one picture, of all channels or of the first `inputs`, `outputs`."""
        area = self.kernel[0] * self.kernel[1] * self.pixels
        return (inputs or self.inputs) * (outputs or self.outputs) * area


@dataclass(frozen=True)
class ResidualBlock:
    """Convolutions with ReLU between them, and a shortcut that is added before the last ReLU.

    Attributes:
        name: Path of the block.
        convolutions: In forward order.
        shortcut: The convolution of the shortcut, None for one without weights.
        stride: Distance of the pixels that a shortcut without weights keeps.
        before: Channels of zeros that such a shortcut puts before those of its input.
    """

    name: str
    convolutions: tuple[Convolution, ...]
    shortcut: Convolution | None = None
    stride: int = 1
    before: int = 0

    @property
    def all_convolutions(self) -> tuple[Convolution, ...]:
        """Those of the main path, then that of the shortcut."""
        return self.convolutions if self.shortcut is None else (*self.convolutions, self.shortcut)


@dataclass(frozen=True)
class ResidualLayout:
    """The parts of a residual network, in forward order.

    Attributes:
        stem: Paths of the modules before the blocks.
        blocks: The body.
        head: Paths of the modules behind the blocks.
    """

    stem: tuple[str, ...]
    blocks: tuple[ResidualBlock, ...]
    head: tuple[str, ...]

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """All convolutions of the body."""
        return tuple(conv for block in self.blocks for conv in block.all_convolutions)


def residual_layout(
    model: nn.Module, *, input_size: tuple[int, int, int] | None = None
) -> ResidualLayout:
    """Describe a ResNet of timm or of `models.cifar`.

    Args:
        model: The network.
        input_size: Channels, height and width of a picture, to count places with; None counts none.

    Raises:
        UsageError: It is another network, or a ResNet with parts that are not known here.
    """
    kind = type(model).__name__
    if kind not in ("ResNet", "CifarResNet"):
        raise UsageError(
            f"{kind} has no body of residual blocks that could be branched",
            remedy="take a ResNet, for example resnet18, resnet50 or resnet20 (for CIFAR)",
        )
    sizes = {} if input_size is None else _pixels(model, input_size)
    children = dict(model.named_children())
    return ResidualLayout(
        stem=tuple(name for name in _STEM if name in children),
        blocks=tuple(
            _block(f"{stage}.{name}", block, sizes)
            for stage in _STAGES
            if stage in children
            for name, block in children[stage].named_children()
        ),
        head=tuple(name for name in _HEAD if name in children),
    )


def _block(name: str, block: nn.Module, sizes: dict[str, int]) -> ResidualBlock:
    part: Any = block
    for attribute in _REFUSED:
        if getattr(part, attribute, None) is not None and not isinstance(
            getattr(part, attribute), nn.Identity
        ):
            raise _unknown(name, attribute)
    for module in block.modules():
        is_activation = type(module).__module__.startswith("torch.nn.modules.activation")
        if is_activation and not isinstance(module, nn.ReLU):
            raise _unknown(name, type(module).__name__)
    convolutions = tuple(
        _convolution(f"{name}.{conv}", f"{name}.{norm}", getattr(part, conv), sizes)
        for conv, norm in _PAIRS
        if hasattr(part, conv)
    )
    plain = getattr(part, "shortcut", None)
    if isinstance(plain, cifar.PaddedShortcut):
        return ResidualBlock(name, convolutions, stride=plain.stride, before=plain.before)
    downsample = getattr(part, "downsample", None)
    if downsample is None:
        return ResidualBlock(name, convolutions)
    if [type(module) for module in downsample] != [nn.Conv2d, nn.BatchNorm2d]:
        raise _unknown(name, "downsample")
    place = f"{name}.downsample"
    conv = _convolution(f"{place}.0", f"{place}.1", downsample[0], sizes)
    return ResidualBlock(name, convolutions, shortcut=conv)


def _convolution(name: str, norm: str, module: nn.Conv2d, sizes: dict[str, int]) -> Convolution:
    if module.groups != 1 or module.bias is not None or isinstance(module.padding, str):
        raise _unknown(name, "groups, a bias or padding by name")
    return Convolution(
        name=name,
        norm=norm,
        inputs=module.in_channels,
        outputs=module.out_channels,
        kernel=_pair(module.kernel_size),
        stride=_pair(module.stride),
        padding=_pair(module.padding),
        dilation=_pair(module.dilation),
        pixels=sizes.get(name, 0),
    )


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[1]


def _unknown(name: str, what: str) -> UsageError:
    return UsageError(
        f"the block {name} has {what}, which a branch cannot compute",
        remedy="take a plain ResNet: resnet18, resnet34, resnet50, or resnet20 and its like",
    )


@torch.no_grad()
def _pixels(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Places in the output of every convolution for one picture."""
    found: dict[str, int] = {}

    def note(name: str) -> Any:  # noqa: ANN401
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            found[name] = output.shape[-2] * output.shape[-1]

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        model(torch.zeros(1, *input_size, device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found
