"""Integer layers that hand codes to one another, where nothing else reads what lies between.

A LayerNorm then ends in the codes of the linear layer behind it, a linear layer before GELU in
those of the layer after it, a convolution before a ReLU in those of the next one, and attention
runs from codes to codes. That saves passes over
activations and time between them, and is the same computation: on a CPU to the last bit, elsewhere
up to codes whose values lie next to the middle between two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from qtool.engine import dispatch, ops
from qtool.engine.cpu.block import Block, Layer, NestedLayer, Norm, Operand, Program
from qtool.engine.resident import versions_of
from qtool.quant.attention import QuantAttention, QuantWindowAttention
from qtool.quant.bits import BitSpec
from qtool.quant.layers import Feeds, IntegerProducts, QuantConv2d, QuantLinear
from qtool.quant.nested_layers import NestedLinear, NestedProducts
from qtool.quant.plan import replace_module
from qtool.quant.widths import SwitchableLayer

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}

_MOST_PROGRAMS = 64
"""Choices of widths that a block remembers at a time."""


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


class _WholeBlock(nn.Module):
    """A transformer block as in ViT and DeiT, (B, N, C) to (B, N, C), that may run as one program.

    A CPU with compiled passes runs it as one program. Elsewhere its layers run one by one; with
    hooks they run as in the float block. The result is the same.

    Args:
        source: The block, whose layers are integer.
    """

    attn: QuantAttention
    norm1: nn.Module
    norm2: nn.Module
    mlp: nn.Module

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            self.add_module(name, child)
        self._programs: dict[tuple[BitSpec, ...], _Made] = {}
        self._hooks: list[dict[int, Any]] | None = None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend, then perceive, each added to what came in."""
        if attn_mask is not None or is_causal or torch.compiler.is_compiling() or self._watched():
            return self._plain(x, attn_mask, is_causal)
        if dispatch.runs_whole_blocks(x.device):
            program = self._made()
            if program.takes(x):
                return program.run(x)
        return self._by_layers(x)

    def _plain(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """As the float block does it."""
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def _by_layers(self, x: Tensor) -> Tensor:
        """Layer by layer."""
        return self._plain(x, None, False)

    def _watched(self) -> bool:
        """Whether someone wants to see what a layer inside takes or returns."""
        if self._hooks is None:
            self._hooks = hooks_inside(self)
        return any(self._hooks)

    def _made(self) -> Program:
        """The program for the widths at hand, made anew where a tensor was written to."""
        widths = self._widths()
        if (made := self._programs.get(widths)) is not None:
            if versions_of(made.tensors) == made.versions:
                return made.program
            self._programs.clear()
        if len(self._programs) >= _MOST_PROGRAMS:
            self._programs.clear()
        tensors = [*self.parameters(), *self.buffers()]
        program = Program(self._parameters_of_block())
        self._programs[widths] = _Made(program, tensors, versions_of(tensors))
        return program

    def _widths(self) -> tuple[BitSpec, ...]:
        """The widths of its layers, where they have several."""
        return ()

    def _parameters_of_block(self) -> Block:
        """What the program is made of."""
        products = self._products()
        operands = products.operands()
        p_scale, p_zero = products.parameters_of("probability")
        powers = products.probabilities == "log2"

        def operand(name: str) -> Operand:
            return Operand(*products.parameters_of(name), products.table_of(name), products.bits)

        return Block(
            norms=(_norm(self.norm1), _norm(self.norm2)),
            qkv=self._layer(self.attn.qkv),
            projected=self.attn.as_projected(operands.scale),
            operands=(operand("query"), operand("key"), operand("value")),
            probability=Operand(
                p_scale,
                None if powers else p_zero,
                products.table_of("probability"),
                products.bits,
            ),
            proj=self._layer(self.attn.proj),
            fc1=self._layer(self.mlp.get_submodule("fc1")),
            fc2=self._layer(self.mlp.get_submodule("fc2")),
            heads=self.attn.num_heads,
        )

    def _products(self) -> IntegerProducts:
        """The products of attention at the width at hand."""
        return cast(IntegerProducts, self.attn.products)

    def _layer(self, module: nn.Module) -> Layer | NestedLayer:
        """A linear layer at the width at hand."""
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

    def _apply(self, *arguments: Any, **options: Any) -> Self:  # noqa: ANN401
        self._programs.clear()
        super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: object, **options: object) -> None:
        self._programs.clear()
        super()._load_from_state_dict(*arguments, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own programs."""
        return {**self.__dict__, "_programs": {}, "_hooks": None}


class _Made(NamedTuple):
    """A program with the tensors it was made of and the state they were in."""

    program: Program
    tensors: list[Tensor]
    versions: tuple[int, ...] | None


class QuantBlock(_WholeBlock):
    """A block of integer layers that hand codes to one another already."""

    def _by_layers(self, x: Tensor) -> Tensor:
        """Layers add what goes around them."""
        x = self.attn(self.norm1(x), residual=x)
        hidden = self.mlp.get_submodule("fc1")(self.norm2(x))
        out: Tensor = self.mlp.get_submodule("fc2")(hidden, x)
        return out


class NestedBlock(_WholeBlock):
    """A block of switchable layers, with a program for every choice of widths it has run at."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self._switched: list[SwitchableLayer] = []

    def _widths(self) -> tuple[BitSpec, ...]:
        if not self._switched:
            self._switched = [m for m in self.modules() if isinstance(m, SwitchableLayer)]
        return tuple(layer.width() for layer in self._switched)

    def __getstate__(self) -> dict[str, Any]:
        """Copies look for their own layers."""
        return {**super().__getstate__(), "_switched": []}

    def _products(self) -> IntegerProducts:
        products = cast(NestedProducts, self.attn.products)
        return products.at(products.width().activation)

    def _layer(self, module: nn.Module) -> NestedLayer:
        linear = cast(NestedLinear, module)
        spec = linear.width()
        row = linear.offer.weight.index(spec.weight)
        return NestedLayer(
            linear.codes_of(spec.weight),
            linear.alpha[row],
            linear.bias[row],
            spec.weight,
            *linear.input_quantizer(spec.activation),
        )


def hooks_inside(module: nn.Module) -> list[dict[int, Any]]:
    """Where the layers inside a module keep who wants to see what they take and return."""
    inside = list(module.modules())[1:]
    return [hooks for m in inside for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def _norm(module: nn.Module) -> Norm:
    norm = cast(nn.LayerNorm, module)  # or a `QuantLayerNorm`, which has the same
    return Norm(norm.weight, norm.bias, norm.eps)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is timm's plain transformer block."""
    parts = dict(module.named_children())
    between = ("ls1", "drop_path1", "ls2", "drop_path2")
    return type(module).__name__ == "Block" and all(
        isinstance(parts.get(name), nn.Identity) for name in between
    )


def _is_whole(block: nn.Module) -> bool:
    """Whether all layers of a plain block are integer and hand on codes."""
    parts = dict(block.named_children())
    attention, mlp = parts.get("attn"), parts.get("mlp")
    return (
        isinstance(parts.get("norm1"), QuantLayerNorm)
        and isinstance(parts.get("norm2"), QuantLayerNorm)
        and isinstance(attention, QuantAttention)
        and cast(QuantLinear, attention.qkv).feeds is not None
        and mlp is not None
        and getattr(getattr(mlp, "fc1", None), "feeds", None) is not None
    )


def fuse(
    model: nn.Module,
    *,
    norms: Collection[tuple[str, str]],
    gelus: Collection[tuple[str, str, str]],
    chains: Iterable[tuple[str, Sequence[str], str]] = (),
) -> None:
    """Let the integer layers of a loaded model hand codes to one another, in place.

    Blocks of switchable layers keep their layers apart and may run as one program.

    Args:
        model: A model of integer layers, in evaluation mode.
        norms: Pairs of a LayerNorm and the only linear layer that reads its output. Before windows
            are cut their edges are padded with the value zero, which has no code of its own there.
        gelus: A linear layer, the GELU that alone reads it and the linear layer that alone reads
            that.
        chains: Two convolutions and all that stands between them, where the second one alone reads
            the first.
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
    for before, between, after in chains:
        first, second = model.get_submodule(before), model.get_submodule(after)
        found = [(n, m) for n in between if type(m := model.get_submodule(n)) is not nn.Identity]
        if type(first) is not QuantConv2d or type(second) is not QuantConv2d or len(found) != 1:
            continue
        name, module = found[0]
        if type(module) in _ACTIVATIONS:
            first.feeds = Feeds(second.input_quantizer, activation=_ACTIVATIONS[type(module)])
            replace_module(model, name, nn.Identity())
    feeds, ends = set(norms), {(before, after) for before, _, after in gelus}
    for name, module in list(model.named_modules()):
        if not (name and _is_block(module)):
            continue
        fc1, fc2 = f"{name}.mlp.fc1", f"{name}.mlp.fc2"
        needed = {(f"{name}.norm1", f"{name}.attn.qkv"), (f"{name}.norm2", fc1)}
        if _is_whole(module):
            replace_module(model, name, QuantBlock(module))
        elif needed <= feeds and (fc1, fc2) in ends and _is_switchable(module):
            replace_module(model, name, NestedBlock(module))


def _is_switchable(block: nn.Module) -> bool:
    """Whether all layers of a plain block are switchable."""
    attention = block.get_submodule("attn")
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return (
        isinstance(attention, QuantAttention)
        and attention.is_plain()
        and type(attention.products) is NestedProducts
        and all(type(block.get_submodule(name)) is NestedLinear for name in linears)
    )
