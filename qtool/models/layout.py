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
_BLOCK_FEEDS = (("norm1", "attn.qkv"), ("norm2", "mlp.fc1"))
_NORM_FEEDS = (*_BLOCK_FEEDS, ("norm", "reduction"))


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
class ResidualStream:
    """The sum that blocks read through LayerNorms and nothing else, and add to.

    Attributes:
        writers: Layers whose results are added, and the LayerScale in between ("" for none).
        embeddings: Parameters (..., D) that are added.
        readers: LayerNorms, and the linear layers that alone read their outputs. A layer that is
            wider than the stream reads several positions side by side.
    """

    writers: tuple[tuple[str, str], ...]
    embeddings: tuple[str, ...]
    readers: tuple[tuple[str, tuple[str, ...]], ...]


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
        streams: Residual streams on which nothing works channel by channel but LayerNorms.
    """

    attentions: tuple[AttentionSite, ...]
    units: tuple[str, ...]
    class_token: bool = False
    prefix_tokens: int = 0
    grid: tuple[int, int] = (0, 0)
    norms: tuple[tuple[str, str], ...] = ()
    batch_norms: tuple[tuple[str, str], ...] = ()
    gelus: tuple[tuple[str, str, str], ...] = ()
    streams: tuple[ResidualStream, ...] = ()


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
        streams=_token_stream(model, units),
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
        streams=_stage_streams(model),
    )


def _token_stream(model: nn.Module, units: list[str]) -> tuple[ResidualStream, ...]:
    """The one stream of a ViT, if nothing else works on it."""
    modules = dict(model.named_modules())
    blocks = [name for name in units if name.startswith("blocks.")]
    last = "norm" if isinstance(modules.get("norm"), nn.LayerNorm) else "fc_norm"
    heads = tuple(n for n in ("head", "head_dist") if isinstance(modules.get(n), nn.Linear))
    between = ("norm_pre", "patch_embed.norm", {"norm": "fc_norm", "fc_norm": "norm"}[last])
    if (
        not heads
        or not _is_affine(modules.get(last))
        or any(_works(modules.get(name)) for name in between)
        or not all(_is_block(modules[name]) for name in blocks)
    ):
        return ()
    names = ("cls_token", "dist_token", "reg_token", "pos_embed")
    return (
        ResidualStream(
            writers=(("patch_embed.proj", ""), *_writers(modules, blocks)),
            embeddings=tuple(n for n in names if getattr(model, n, None) is not None),
            readers=(*_readers(blocks), (last, heads)),
        ),
    )


def _stage_streams(model: nn.Module) -> tuple[ResidualStream, ...]:
    """The streams of a Swin's stages but the first, which begins with a LayerNorm's own scales."""
    modules = dict(model.named_modules())
    stages = [f"layers.{name}" for name, _ in model.get_submodule("layers").named_children()]
    found = []
    for stage, after in zip(stages, [*stages[1:], ""], strict=True):
        children = modules[f"{stage}.blocks"].named_children()
        blocks = [f"{stage}.blocks.{name}" for name, _ in children]
        merging = f"{stage}.downsample"
        last = (f"{after}.downsample.norm", (f"{after}.downsample.reduction",))
        if not after:
            last = ("norm", ("head.fc",))
        if (
            type(modules.get(merging)).__name__ == "PatchMerging"
            and _is_affine(modules.get(last[0]))
            and isinstance(modules.get(last[1][0]), nn.Linear)
            and all(_is_block(modules[name]) for name in blocks)
        ):
            writers = ((f"{merging}.reduction", ""), *_writers(modules, blocks))
            found.append(ResidualStream(writers, (), (*_readers(blocks), last)))
    return tuple(found)


def _is_block(block: nn.Module) -> bool:
    """Whether a block reads its input through two LayerNorms and adds two results to it."""
    return (
        type(block).__name__ in ("Block", "SwinTransformerBlock")
        and type(getattr(block, "mlp", None)).__name__ == "Mlp"
        and all(_is_affine(getattr(block, name)) for name in ("norm1", "norm2"))
        and all(
            type(getattr(block, name, None)).__name__ in ("Identity", "LayerScale", "NoneType")
            for name in ("ls1", "ls2")
        )
    )


def _is_affine(module: nn.Module | None) -> bool:
    return isinstance(module, nn.LayerNorm) and module.bias is not None


def _works(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _writers(modules: dict[str, nn.Module], blocks: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = [
        (f"{block}.{layer}", f"{block}.{scale}")
        for block in blocks
        for layer, scale in (("attn.proj", "ls1"), ("mlp.fc2", "ls2"))
    ]
    return tuple((layer, scale if _works(modules.get(scale)) else "") for layer, scale in pairs)


def _readers(blocks: list[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(
        (f"{block}.{norm}", (f"{block}.{linear}",))
        for block in blocks
        for norm, linear in _BLOCK_FEEDS
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
