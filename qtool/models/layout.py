"""Where attention happens in a classifier, and in which units it can be rebuilt.

Models are told apart by the names of timm's classes: many of its networks have the same parts but
another arithmetic between them, such as relative positions in BEiT or cosines in Swin v2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from torch import nn

from qtool.errors import UsageError
from qtool.models import convolutional

_ATTENTION_PARTS = ("qkv", "proj", "attn_drop", "fused_attn", "num_heads")
_EXTRAS = ("backbone", "attn_pool", "gate")
_NORM_FEEDS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"), ("norm", "reduction"))


@dataclass(frozen=True)
class AttentionSite:
    """A module that computes softmax attention.

    With its attribute `fused_attn` set to False, its child `attn_drop` receives the softmax map:
    (B, heads, N, N) for tokens, (B * windows, heads, N, N) for windows.

    Attributes:
        name: Path of the module in the model.
        kind: Whether the queries are all tokens of a picture or those of one window.
        heads: Number of attention heads.
        grid: Height and width of the patch or window grid in a row of the map. N is its area plus
            the layout's prefix tokens.
    """

    name: str
    kind: Literal["tokens", "windows"]
    heads: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The parts of a classifier, in forward order.

    Attributes:
        attentions: Every softmax attention; none in a convolutional network.
        units: Paths of the modules that are rebuilt one after another: first convolution, blocks,
            down-sampling steps, heads.
        class_token: Whether the prediction is read from a class token.
        prefix_tokens: Tokens before the patch tokens: class, distillation and register tokens.
        grid: Height and width of the patch grid after the patch embedding; (0, 0) without one.
        norms: Pairs of a LayerNorm and the only linear layer that reads its output.
        batch_norms: Pairs of a convolution and the BatchNorm that alone reads its output.
        gelus: A linear layer, the exact GELU that alone reads its output, and the linear layer that
            alone reads the result.
    """

    attentions: tuple[AttentionSite, ...]
    units: tuple[str, ...]
    class_token: bool = False
    prefix_tokens: int = 0
    grid: tuple[int, int] = (0, 0)
    norms: tuple[tuple[str, str], ...] = ()
    batch_norms: tuple[tuple[str, str], ...] = ()
    gelus: tuple[tuple[str, str, str], ...] = ()


def layout(model: nn.Module) -> Layout:
    """Describe a timm ViT, DeiT, Swin, ConvNeXt, ResNet, MobileNetV2 or EfficientNet.

    Args:
        model: A model built by timm.

    Returns:
        Its attentions and units in forward order.

    Raises:
        UsageError: The model is of no kind known here.
    """
    classes = {base.__name__ for base in type(model).__mro__}
    found = None
    if "VisionTransformer" in classes:
        found = _tokens(model)
    elif "SwinTransformer" in classes:
        found = _windows(model)
    elif (parts := convolutional.parts(model)) is not None:
        found = Layout(
            attentions=(),
            units=parts.units,
            norms=parts.norms,
            batch_norms=parts.batch_norms,
            gelus=_gelus(model, parts.units),
        )
    if found is None:
        raise UsageError(
            f"{type(model).__name__} has parts between its layers that qtool does not know",
            remedy="use a ViT, DeiT, Swin, ConvNeXt, ResNet or MobileNetV2 (see `qtool models`)",
        )
    return found


def unfuse_attention(model: nn.Module) -> None:
    """Let every attention compute its softmax map in the open, where hooks can see it."""
    module: Any
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def _tokens(model: nn.Module) -> Layout | None:
    """Describe a model whose blocks attend over all tokens."""
    if _has_extras(model) or _has_extras(model.get_submodule("patch_embed")):
        return None
    grid = _grid(model)
    sites, units = [], ["patch_embed.proj"]
    for number, block in enumerate(model.get_submodule("blocks").children()):
        attention = getattr(block, "attn", None)
        if not _is_attention(attention, "Attention"):
            return None
        units.append(f"blocks.{number}")
        sites.append(AttentionSite(f"{units[-1]}.attn", "tokens", attention.num_heads, grid))
    units += [name for name in ("head", "head_dist") if _has_weight(model, name)]
    return Layout(
        attentions=tuple(sites),
        units=tuple(units),
        class_token=getattr(model, "cls_token", None) is not None
        and getattr(model, "global_pool", "") == "token",
        prefix_tokens=int(getattr(model, "num_prefix_tokens", 0)),
        grid=grid,
        norms=_norms(model, units),
        gelus=_gelus(model, units),
    )


def _windows(model: nn.Module) -> Layout | None:
    """Describe a model whose stages attend within windows."""
    sites, units = [], ["patch_embed.proj"]
    for depth, stage in enumerate(model.get_submodule("layers").children()):
        if _has_weight(stage, "downsample"):
            units.append(f"layers.{depth}.downsample")
        for number, block in enumerate(stage.get_submodule("blocks").children()):
            attention = getattr(block, "attn", None)
            if not _is_attention(attention, "WindowAttention"):
                return None
            units.append(f"layers.{depth}.blocks.{number}")
            height, width = attention.window_size
            sites.append(
                AttentionSite(f"{units[-1]}.attn", "windows", attention.num_heads, (height, width))
            )
    units += [name for name in ("head.fc",) if _has_weight(model, name)]
    return Layout(
        attentions=tuple(sites),
        units=tuple(units),
        class_token=False,
        prefix_tokens=0,
        grid=_grid(model),
        norms=_norms(model, units),
        gelus=_gelus(model, units),
    )


def _norms(model: nn.Module, units: list[str]) -> tuple[tuple[str, str], ...]:
    """Find the LayerNorms whose output goes to one linear layer and nowhere else."""
    modules = dict(model.named_modules())
    pairs = [
        (f"{unit}.{norm}", f"{unit}.{linear}") for unit in units for norm, linear in _NORM_FEEDS
    ]
    return tuple(
        (norm, linear)
        for norm, linear in pairs
        if isinstance(modules.get(norm), nn.LayerNorm)
        and isinstance(modules.get(linear), nn.Linear)
    )


def _gelus(model: nn.Module, units: Iterable[str]) -> tuple[tuple[str, str, str], ...]:
    """Find the perceptrons of two linear layers with nothing but GELU between them."""
    modules = dict(model.named_modules())
    found = []
    for mlp in (f"{unit}.mlp" for unit in units):
        parts = [modules.get(f"{mlp}.{part}") for part in ("fc1", "act", "fc2")]
        first, act, second = parts
        if (
            type(modules.get(mlp)).__name__ == "Mlp"
            and isinstance(modules.get(f"{mlp}.norm"), nn.Identity)
            and isinstance(first, nn.Linear)
            and type(act) is nn.GELU
            and act.approximate == "none"
            and isinstance(second, nn.Linear)
        ):
            found.append((f"{mlp}.fc1", f"{mlp}.act", f"{mlp}.fc2"))
    return tuple(found)


def _grid(model: nn.Module) -> tuple[int, int]:
    embedding: Any = model.get_submodule("patch_embed")
    height, width = embedding.grid_size
    return int(height), int(width)


def _is_attention(module: object, name: str) -> TypeGuard[Any]:
    return (
        isinstance(module, nn.Module)
        and type(module).__name__ == name
        and all(hasattr(module, part) for part in _ATTENTION_PARTS)
        and not _has_extras(module)
    )


def _has_extras(module: nn.Module) -> bool:
    return any(getattr(module, name, None) is not None for name in _EXTRAS)


def _has_weight(model: nn.Module, name: str) -> bool:
    """Tell whether the submodule exists and holds parameters; timm leaves out parts as Identity."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return any(True for _ in module.parameters())
