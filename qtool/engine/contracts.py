"""What each operation accepts and returns: schema, checks, result shape, registration with torch.

One function per operation checks the arguments and describes the result. The real operation and its
shape-only twin for `torch.compile` both start from it, so they cannot disagree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.engine import dispatch
from qtool.engine.activations import AFTER_CONVOLUTION, AFTER_LINEAR
from qtool.engine.geometry import layout_of, output_size
from qtool.engine.packing import MAX_BITS, MIN_BITS, packed_width
from qtool.errors import UsageError

MAX_TERMS = 16384  # so many products of 8-bit codes fit int32 at every step, zero points included
MAX_HEAD_WIDTH = 128  # one program of the GPU's attention holds so much of an output row

NAMES_OF_QUANTIZERS = {
    "": ("scale", "zero_point", "table", "bits"),
    "p": ("p_scale", "p_zero", "p_table", "p_bits"),
    "out": ("out_scale", "out_zero", "out_table", "out_bits"),
}
"""How operations call the parameters of a quantizer of a result."""

TABLE_LENGTH = 256
"""Entries of a table of levels, one for every 8-bit code."""


class Result(NamedTuple):
    """The result of an operation, before it is computed.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        limit: Why the fast versions cannot run these shapes, "" if they can.
        layout: Its memory format.
    """

    shape: Sequence[int]
    dtype: torch.dtype
    limit: str = ""
    layout: torch.memory_format = torch.contiguous_format


def register() -> None:
    """Defines every operation in torch's `qtool` namespace, on all devices and for shapes alone."""
    for op, (schema, contract) in _OPERATIONS.items():
        torch.library.define(f"qtool::{op}", schema)
        torch.library.impl(f"qtool::{op}", "default", functools.partial(run, op))
        torch.library.register_fake(f"qtool::{op}", _fake(contract))


def run(op: str, *arguments: object) -> Tensor:
    """Check the arguments of an operation and run it.

    Raises:
        UsageError: An argument has the wrong type, shape, value or device.
        BackendError: The backend asked for cannot run this.
    """
    expected = _OPERATIONS[op][1](*arguments)
    function = dispatch.choose(op, _device(arguments), limit=expected.limit)
    return function(*arguments).contiguous(memory_format=expected.layout)


def _fake(contract: Callable[..., Result]) -> Callable[..., Tensor]:
    def allocate(*arguments: object) -> Tensor:
        result = contract(*arguments)
        return torch.empty(
            result.shape,
            dtype=result.dtype,
            device=_device(arguments),
            memory_format=result.layout,
        )

    return allocate


def _device(arguments: tuple[object, ...]) -> torch.device:
    """The device of the first argument, which is always a tensor."""
    first = arguments[0]
    if not isinstance(first, Tensor):
        raise UsageError(f"the first argument is a {type(first).__name__}, not a tensor")
    return first.device


def _quantize_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Result:
    _check_tensor("x", x, torch.float32, x)
    _check_dimensions("x", x, 1)
    _check_activation("scale", scale, torch.float32, x)
    _check_activation("zero_point", zero_point, torch.int32, x)
    _check_bits("bits", bits)
    return Result(x.shape, torch.uint8, layout=layout_of(x))


def _quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Result:
    _check_tensor("table", table, torch.uint8, x)
    if table.shape != (TABLE_LENGTH,):
        raise UsageError(f"table has shape {_words(table)}, not ({TABLE_LENGTH},)")
    return _quantize_uniform(x, scale, zero_point, MAX_BITS)


def _quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Result:
    _check_tensor("x", x, torch.float32, x)
    _check_one("scale", scale, torch.float32, x)
    _check_bits("bits", bits)
    return Result(x.shape, torch.uint8)


def _pack_codes(codes: Tensor, bits: int) -> Result:
    _check_tensor("codes", codes, torch.uint8, codes)
    if codes.dim() != 2:
        raise UsageError(f"codes has shape {_words(codes)}, not (N, K)")
    _check_bits("bits", bits)
    return Result((codes.shape[0], packed_width(bits, codes.shape[1])), torch.uint8)


def _unpack_codes(packed: Tensor, bits: int, in_features: int) -> Result:
    _check_tensor("packed", packed, torch.uint8, packed)
    _check_bits("bits", bits)
    _check_packed("packed", packed, bits, in_features)
    return Result((packed.shape[0], in_features), torch.uint8)


def _linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
    residual: Tensor | None = None,
) -> Result:
    _check_tensor("x", x, torch.uint8, x)
    _check_dimensions("x", x, 1)
    if x.shape[-1] != in_features:
        raise UsageError(f"x has {x.shape[-1]} features, the weight has {in_features}")
    _check_activation("x_scale", x_scale, torch.float32, x)
    _check_activation("x_zero", x_zero, torch.int32, x)
    channels = _check_weight(
        x, weight, weight_scale, weight_zero, bias, weight_bits=weight_bits, in_features=in_features
    )
    shape = (*x.shape[:-1], channels)
    if residual is not None:
        _check_tensor("residual", residual, torch.float32, x)
        if residual.shape != shape:
            raise UsageError(f"residual has shape {_words(residual)}, not {shape}")
    return Result(shape, torch.float32, _limit(in_features))


def _layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    bits: int,
) -> Result:
    _check_tensor("x", x, torch.float32, x)
    _check_dimensions("x", x, 1)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_channels(name, parameter, torch.float32, x.shape[-1], x)
    _check_output(x, scale, zero_point, table, bits, name="")
    return Result(x.shape, torch.uint8)


def _linear_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
    activation: str,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Result:
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    plain = _linear(x, x_scale, x_zero, *parameters)
    _check_activation_name(activation, AFTER_LINEAR)
    groups, channels = out_scale.numel(), plain.shape[-1]
    if groups == 0 or channels % groups:
        raise UsageError(f"{groups} output quantizers do not divide {channels} channels alike")
    if groups > 1 and activation != "none":
        raise UsageError(f"there is one output quantizer after {activation}, not {groups}")
    _check_output(x, out_scale, out_zero, out_table, out_bits, groups=groups)
    shape = (groups, *plain.shape[:-1], channels // groups) if groups > 1 else plain.shape
    return plain._replace(shape=shape, dtype=torch.uint8)


def _attention(
    qkv: Tensor,
    qkv_scale: Tensor,
    qkv_zero: Tensor,
    added: Tensor | None,
    p_scale: Tensor,
    p_zero: Tensor | None,
    p_table: Tensor | None,
    p_bits: int,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Result:
    _check_tensor("qkv", qkv, torch.uint8, qkv)
    if qkv.dim() != 5 or qkv.shape[0] != 3:
        raise UsageError(f"qkv has shape {_words(qkv)}, not (3, B, N, heads, D)")
    _, batch, tokens, heads, width = qkv.shape
    _check_channels("qkv_scale", qkv_scale, torch.float32, 3, qkv)
    _check_channels("qkv_zero", qkv_zero, torch.int32, 3, qkv)
    if added is not None:
        _check_tensor("added", added, torch.float32, qkv)
        maps = added.shape[0] if added.dim() else 0
        if added.shape[1:] != (heads, tokens, tokens) or maps < 1 or batch % maps:
            raise UsageError(
                f"added has shape {_words(added)}, not (windows, {heads}, {tokens}, {tokens})"
                f" with windows that divide {batch}"
            )
    if p_zero is None:
        _check_one("p_scale", p_scale, torch.float32, qkv)
        _check_bits("p_bits", p_bits)
        if p_table is not None:
            raise UsageError("p_table needs p_zero: powers of two have neither")
    else:
        _check_output(qkv, p_scale, p_zero, p_table, p_bits, name="p")
    _check_output(qkv, out_scale, out_zero, out_table, out_bits)
    limit = _limit(tokens)
    if width > MAX_HEAD_WIDTH:
        limit = f"heads are at most {MAX_HEAD_WIDTH} wide"
    return Result((batch, tokens, heads * width), torch.uint8, limit)


def _conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Result:
    _check_tensor("x", x, torch.uint8, x)
    if x.dim() != 4 or x.shape[1] == 0:
        raise UsageError(f"x has shape {_words(x)}, not (B, C, H, W)")
    _check_one("x_scale", x_scale, torch.float32, x)
    _check_one("x_zero", x_zero, torch.int32, x)
    _check_pair("kernel", kernel, 1)
    _check_pair("stride", stride, 1)
    _check_pair("padding", padding, 0)
    _check_pair("dilation", dilation, 1)
    if groups < 1 or x.shape[1] % groups or weight.shape[0] % groups:
        raise UsageError(
            f"{groups} groups do not divide {x.shape[1]} input and {weight.shape[0]} output"
            " channels alike"
        )
    terms = x.shape[1] // groups * kernel[0] * kernel[1]
    channels = _check_weight(
        x, weight, weight_scale, weight_zero, bias, weight_bits=weight_bits, in_features=terms
    )
    height, width = output_size(
        x.shape[2:], kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )
    if height < 1 or width < 1:
        raise UsageError(
            f"x has shape {_words(x)}, smaller than a kernel of {tuple(kernel)} can cover"
        )
    shape = (x.shape[0], channels, height, width)
    return Result(shape, torch.float32, _limit(terms), layout_of(x))


def _conv2d_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Result:
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits)
    geometry = (kernel, stride, padding, dilation, groups)
    plain = _conv2d(x, x_scale, x_zero, *parameters, *geometry)
    _check_activation_name(activation, AFTER_CONVOLUTION)
    _check_output(x, out_scale, out_zero, out_table, out_bits)
    return plain._replace(dtype=torch.uint8)


def _linear_nested(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Result:
    _check_tensor("x", x, torch.uint8, x)
    _check_dimensions("x", x, 1)
    _check_activation("x_scale", x_scale, torch.float32, x)
    _check_activation("x_zero", x_zero, torch.int32, x)
    _check_bits("bits", bits)
    _check_tensor("weight", weight, torch.int8, x)
    in_features = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != in_features:
        raise UsageError(f"weight has shape {_words(weight)}, not (N, {in_features})")
    channels = weight.shape[0]
    _check_channels("weight_scale", weight_scale, torch.float32, channels, x)
    if bias is not None:
        _check_channels("bias", bias, torch.float32, channels, x)
    return Result((*x.shape[:-1], channels), torch.float32, _limit(in_features))


def _matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Result:
    shape = _check_factors("a", a, "b", b)
    _check_one("a_scale", a_scale, torch.float32, a)
    _check_one("a_zero", a_zero, torch.int32, a)
    _check_one("b_scale", b_scale, torch.float32, a)
    _check_one("b_zero", b_zero, torch.int32, a)
    return Result(shape, torch.float32, _limit(a.shape[-1]))


def _matmul_log2(
    p: Tensor, p_scale: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, bits: int
) -> Result:
    shape = _check_factors("p", p, "v", v)
    _check_one("p_scale", p_scale, torch.float32, p)
    _check_one("v_scale", v_scale, torch.float32, p)
    _check_one("v_zero", v_zero, torch.int32, p)
    _check_bits("bits", bits)
    return Result(shape, torch.float32)


_OPERATIONS: dict[str, tuple[str, Callable[..., Result]]] = {
    "quantize_uniform": (
        "(Tensor x, Tensor scale, Tensor zero_point, int bits) -> Tensor",
        _quantize_uniform,
    ),
    "quantize_table": (
        "(Tensor x, Tensor scale, Tensor zero_point, Tensor table) -> Tensor",
        _quantize_table,
    ),
    "quantize_log2": ("(Tensor x, Tensor scale, int bits) -> Tensor", _quantize_log2),
    "pack_codes": ("(Tensor codes, int bits) -> Tensor", _pack_codes),
    "unpack_codes": ("(Tensor packed, int bits, int in_features) -> Tensor", _unpack_codes),
    "linear": (
        "(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor weight_scale,"
        " Tensor weight_zero, Tensor? bias, int weight_bits, int in_features,"
        " Tensor? residual=None) -> Tensor",
        _linear,
    ),
    "layer_norm_quantize": (
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor scale, Tensor zero_point,"
        " Tensor? table, int bits) -> Tensor",
        _layer_norm_quantize,
    ),
    "linear_quantize": (
        "(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor weight_scale,"
        " Tensor weight_zero, Tensor? bias, int weight_bits, int in_features, str activation,"
        " Tensor out_scale, Tensor out_zero, Tensor? out_table, int out_bits) -> Tensor",
        _linear_quantize,
    ),
    "attention": (
        "(Tensor qkv, Tensor qkv_scale, Tensor qkv_zero, Tensor? added, Tensor p_scale,"
        " Tensor? p_zero, Tensor? p_table, int p_bits, Tensor out_scale, Tensor out_zero,"
        " Tensor? out_table, int out_bits) -> Tensor",
        _attention,
    ),
    "conv2d": (
        "(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor weight_scale,"
        " Tensor weight_zero, Tensor? bias, int weight_bits, int[] kernel, int[] stride,"
        " int[] padding, int[] dilation, int groups) -> Tensor",
        _conv2d,
    ),
    "conv2d_quantize": (
        "(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor weight_scale,"
        " Tensor weight_zero, Tensor? bias, int weight_bits, int[] kernel, int[] stride,"
        " int[] padding, int[] dilation, int groups, str activation, Tensor out_scale,"
        " Tensor out_zero, Tensor? out_table, int out_bits) -> Tensor",
        _conv2d_quantize,
    ),
    "linear_nested": (
        "(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor weight_scale,"
        " Tensor? bias, int bits) -> Tensor",
        _linear_nested,
    ),
    "matmul": (
        "(Tensor a, Tensor a_scale, Tensor a_zero, Tensor b, Tensor b_scale, Tensor b_zero)"
        " -> Tensor",
        _matmul,
    ),
    "matmul_log2": (
        "(Tensor p, Tensor p_scale, Tensor v, Tensor v_scale, Tensor v_zero, int bits) -> Tensor",
        _matmul_log2,
    ),
}
OPERATIONS = tuple(_OPERATIONS)


def _limit(terms: int) -> str:
    return "" if terms <= MAX_TERMS else f"int32 sums hold at most {MAX_TERMS} terms"


def _words(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_activation_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise UsageError(f"activation is '{name}', not one of {', '.join(known)}")


def _check_bits(name: str, bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UsageError(f"{name} is {bits}, not between {MIN_BITS} and {MAX_BITS}")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, beside: Tensor) -> None:
    if tensor.dtype != dtype:
        raise UsageError(f"{name} is {tensor.dtype}, not {dtype}")
    if tensor.device != beside.device:
        raise UsageError(f"{name} is on {tensor.device}, the first argument on {beside.device}")


def _check_dimensions(name: str, tensor: Tensor, least: int) -> None:
    if tensor.dim() < least:
        raise UsageError(f"{name} has shape {_words(tensor)}, fewer than {least} dimensions")


def _check_one(name: str, tensor: Tensor, dtype: torch.dtype, beside: Tensor) -> None:
    _check_tensor(name, tensor, dtype, beside)
    if tensor.numel() != 1:
        raise UsageError(f"{name} has shape {_words(tensor)}, not one element")


def _check_activation(name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    _check_tensor(name, tensor, dtype, x)
    if tensor.numel() != 1 and tensor.shape != (*x.shape[:-1], 1):
        raise UsageError(
            f"{name} has shape {_words(tensor)}, neither one element (per tensor)"
            f" nor {(*x.shape[:-1], 1)} (per token)"
        )


def _check_channels(
    name: str, tensor: Tensor, dtype: torch.dtype, channels: int, x: Tensor
) -> None:
    _check_tensor(name, tensor, dtype, x)
    if tensor.shape != (channels,):
        raise UsageError(f"{name} has shape {_words(tensor)}, not ({channels},)")


def _check_pair(name: str, pair: Sequence[int], least: int) -> None:
    if len(pair) != 2 or min(pair) < least:
        raise UsageError(f"{name} is {list(pair)}, not two numbers of {least} or more")


def _check_weight(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    *,
    weight_bits: int,
    in_features: int,
) -> int:
    """Checks packed weights with their parameters; returns the output channels."""
    _check_bits("weight_bits", weight_bits)
    _check_tensor("weight", weight, torch.uint8, x)
    _check_packed("weight", weight, weight_bits, in_features)
    channels = weight.shape[0]
    _check_channels("weight_scale", weight_scale, torch.float32, channels, x)
    _check_channels("weight_zero", weight_zero, torch.int32, channels, x)
    if bias is not None:
        _check_channels("bias", bias, torch.float32, channels, x)
    return channels


def _check_output(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    bits: int,
    *,
    groups: int = 1,
    name: str = "out",
) -> None:
    """Checks per-tensor quantizers of a result, one for each group of its channels."""
    names = NAMES_OF_QUANTIZERS[name]
    if groups == 1:
        _check_one(names[0], scale, torch.float32, x)
        _check_one(names[1], zero_point, torch.int32, x)
    else:
        _check_channels(names[0], scale, torch.float32, groups, x)
        _check_channels(names[1], zero_point, torch.int32, groups, x)
    _check_bits(names[3], bits)
    if table is not None:
        _check_tensor(names[2], table, torch.uint8, x)
        wanted = (TABLE_LENGTH,) if groups == 1 else (groups, TABLE_LENGTH)
        if tuple(table.shape) != wanted:
            raise UsageError(f"{names[2]} has shape {_words(table)}, not {wanted}")


def _check_packed(name: str, packed: Tensor, bits: int, in_features: int) -> None:
    if in_features < 0:
        raise UsageError(f"in_features is {in_features}, below zero")
    width = packed_width(bits, in_features)
    if packed.dim() != 2 or packed.shape[1] != width:
        raise UsageError(
            f"{name} has shape {_words(packed)}, not (N, {width}): rows of {in_features} codes"
            f" of {bits} bits"
        )


def _check_factors(left: str, a: Tensor, right: str, b: Tensor) -> tuple[int, ...]:
    """Checks two batches of code matrices and returns the shape of their product."""
    _check_tensor(left, a, torch.uint8, a)
    _check_tensor(right, b, torch.uint8, a)
    _check_dimensions(left, a, 2)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise UsageError(
            f"{left} {_words(a)} and {right} {_words(b)} do not multiply:"
            " they need shapes (..., M, K) and (..., K, N)"
        )
    return (*a.shape[:-1], b.shape[-1])
