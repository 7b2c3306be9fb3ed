"""Integer layers that hand codes to one another, where nothing else reads what lies between.

A LayerNorm then ends in the codes of the linear layer behind it, a linear layer before GELU in
those of the layer after it, and attention runs from codes to codes. That saves passes over
activations and time between them, and is the same computation: on a CPU to the last bit, elsewhere
up to codes whose values lie next to the middle between two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from qtool.engine import dispatch, ops
from qtool.engine.cpu.block import Block, Layer, Norm, Operand, Program
from qtool.engine.resident import versions_of
from qtool.quant.attention import QuantAttention, QuantWindowAttention
from qtool.quant.layers import Feeds, IntegerProducts, QuantLinear
from qtool.quant.plan import replace_module


class QuantLayerNorm(nn.Module):
    """A LayerNorm over the last dimension that ends in codes: (..., D) to uint8 (..., D).

    Args:
        source: The norm whose parameters it takes.
        feeds: The only reader of its result.
    """

    def __init__(self, source: nn.LayerNorm, feeds: Feeds) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps
        self.feeds = feeds

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and quantize."""
        reader = self.feeds.quantizer()
        return ops.layer_norm_quantize(
            x,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=reader.scale,
            zero_point=reader.zero_point,
            table=reader.table,
            bits=reader.bits,
        )


class QuantBlock(nn.Module):
    """A transformer block of integer layers as in ViT and DeiT: (B, N, C) to (B, N, C).

    A CPU with int8 units runs it as one program. Elsewhere its layers run one by one and add what
    goes around them; with hooks they run as in the float block. The result is the same.

    Args:
        source: The block, whose layers hand codes to one another already.
    """

    attn: QuantAttention
    norm1: QuantLayerNorm
    norm2: QuantLayerNorm
    mlp: nn.Module

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            self.add_module(name, child)
        self._program: tuple[Program, list[Tensor], tuple[int, ...] | None] | None = None
        self._hooks: list[dict[int, Any]] | None = None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend, then perceive, each added to what came in."""
        if attn_mask is not None or is_causal or torch.compiler.is_compiling() or self._watched():
            x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
            out: Tensor = x + self.mlp(self.norm2(x))
            return out
        if dispatch.runs_whole_blocks(x.device):
            program = self._made()
            if program.takes(x):
                return program.run(x)
        x = self.attn(self.norm1(x), residual=x)
        hidden = self.mlp.get_submodule("fc1")(self.norm2(x))
        out = self.mlp.get_submodule("fc2")(hidden, x)
        return out

    def _watched(self) -> bool:
        """Whether someone wants to see what a layer inside takes or returns."""
        if self._hooks is None:
            self._hooks = hooks_inside(self)
        return any(self._hooks)

    def _made(self) -> Program:
        """The program, made anew where a tensor was written to."""
        if self._program is not None:
            program, tensors, versions = self._program
            if versions_of(tensors) == versions:
                return program
        tensors = [*self.parameters(), *self.buffers()]
        self._program = (Program(self._parameters_of_block()), tensors, versions_of(tensors))
        return self._program[0]

    def _apply(self, *arguments: Any, **options: Any) -> Self:  # noqa: ANN401
        self._program = None
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: object, **options: object) -> None:
        self._program = None
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own program."""
        return {**self.__dict__, "_program": None, "_hooks": None}

    def _parameters_of_block(self) -> Block:
        attn = self.attn
        products = cast(IntegerProducts, attn.products)
        p_scale, p_zero = products.parameters_of("probability")
        powers = products.probabilities == "log2"

        def operand(name: str) -> Operand:
            return Operand(*products.parameters_of(name), products.table_of(name), products.bits)

        return Block(
            norms=(_norm(self.norm1), _norm(self.norm2)),
            qkv=_layer(attn.qkv),
            projected=attn.projected_scale,
            operands=(operand("query"), operand("key"), operand("value")),
            probability=Operand(
                p_scale,
                None if powers else p_zero,
                products.table_of("probability"),
                products.bits,
            ),
            proj=_layer(attn.proj),
            fc1=_layer(self.mlp.get_submodule("fc1")),
            fc2=_layer(self.mlp.get_submodule("fc2")),
            heads=attn.num_heads,
        )


def hooks_inside(module: nn.Module) -> list[dict[int, Any]]:
    """Where the layers inside a module keep who wants to see what they take and return."""
    inside = list(module.modules())[1:]
    return [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _norm(module: QuantLayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


def _layer(module: nn.Module) -> Layer:
    linear = cast(QuantLinear, module)
    return Layer(
        linear.weight_packed,
        linear.weight_scale,
        linear.weight_zero_point,
        linear.bias,
        linear.weight_bits,
        linear.in_features,
        *linear.input_quantizer(),
    )


def _is_whole(block: nn.Module) -> bool:
    """Whether a block is timm's plain one and all its layers are integer and hand on codes."""
    parts = dict(block.named_children())
    between = ("ls1", "drop_path1", "ls2", "drop_path2")
    attention, mlp = parts.get("attn"), parts.get("mlp")
    return (
        type(block).__name__ == "Block"
        and all(isinstance(parts.get(name), nn.Identity) for name in between)
        and isinstance(parts.get("norm1"), QuantLayerNorm)
        and isinstance(parts.get("norm2"), QuantLayerNorm)
        and isinstance(attention, QuantAttention)
        and cast(QuantLinear, attention.qkv).feeds is not None
        and mlp is not None
        and getattr(getattr(mlp, "fc1", None), "feeds", None) is not None
    )


def fuse(
    model: nn.Module,
    *,
    norms: Iterable[tuple[str, str]],
    gelus: Iterable[tuple[str, str, str]],
) -> None:
    """Let the integer layers of a loaded model hand codes to one another, in place.

    Args:
        model: A model of integer layers, in evaluation mode.
        norms: Pairs of a LayerNorm and the only linear layer that reads its output. Before windows
            are cut their edges are padded with the value zero, which has no code of its own there.
        gelus: A linear layer, the GELU that alone reads it and the linear layer that alone reads
            that.
    """
    windows = set()
    for name, module in model.named_modules():
        if isinstance(module, (QuantAttention, QuantWindowAttention)):
            module.take_codes()
        if isinstance(module, QuantWindowAttention):
            windows.add(f"{name}.qkv")
    for name, reader in norms:
        norm, linear = model.get_submodule(name), model.get_submodule(reader)
        if reader in windows:
            continue
        if isinstance(norm, nn.LayerNorm) and type(linear) is QuantLinear:
            replace_module(model, name, QuantLayerNorm(norm, Feeds(linear.input_quantizer)))
    for before, gelu, after in gelus:
        first, second = model.get_submodule(before), model.get_submodule(after)
        if type(first) is QuantLinear and type(second) is QuantLinear:
            first.feeds = Feeds(second.input_quantizer, activation="gelu")
            replace_module(model, gelu, nn.Identity())
    for name, module in list(model.named_modules()):
        if name and _is_whole(module):
            replace_module(model, name, QuantBlock(module))
