"""The quantized operations; importing this file registers them as `torch.ops.qtool.*`.

Codes are uint8, zero points int32 within the range of the codes, scales float32; a value is (code -
zero point) * scale. A parameter of activations is per tensor (one element) or per token (shape
`(..., 1)`, one value for each row of the last dimension). Results carry no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.engine import contracts
from qtool.engine.packing import packed_width

__all__ = [
    "attention",
    "conv2d",
    "conv2d_quantize",
    "layer_norm_quantize",
    "linear",
    "linear_nested",
    "linear_quantize",
    "matmul",
    "matmul_log2",
    "pack_codes",
    "packed_width",
    "quantize_log2",
    "quantize_table",
    "quantize_uniform",
    "unpack_codes",
]

contracts.register()


def _run(op: str, *arguments: object) -> Tensor:
    """An operation: through torch where someone traces or looks on, else straight to its backend.

    The way through torch takes 50 microseconds, as long as a small layer.
    """
    if torch.compiler.is_compiling() or not _alone(arguments[0]):
        result: Tensor = getattr(torch.ops.qtool, op)(*arguments)
        return result
    with torch.no_grad():
        return contracts.run(op, *arguments)


def _alone(x: object) -> bool:
    """Whether torch would only pass a call with a tensor on."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )


def quantize_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantizes to evenly spaced codes: `clamp(round(x / scale) + zero_point, 0, 2^bits - 1)`.

    The division is IEEE float32 and halves round to even, so that every backend returns the same
    codes. The code of NaN is unspecified.

    Args:
        x: float32 `(..., D)`.
        scale: float32, per tensor or per token `(..., 1)`.
        zero_point: int32, per tensor or per token `(..., 1)`.
        bits: Width of a code, 2 to 8.

    Returns:
        uint8 codes `(..., D)`; pictures stay channels last in memory.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("quantize_uniform", x, scale, zero_point, bits)


def quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Tensor:
    """Quantizes to the levels of a table: `table[quantize_uniform(x, scale, zero_point, 8)]`.

    A table with 2^b distinct entries is a b-bit quantizer whose levels need not be evenly spaced.
    The levels share scale and zero point with the fine codes, so `linear` and `matmul` take them
    like any codes.

    Args:
        x: float32 `(..., D)`.
        scale: float32, per tensor or per token `(..., 1)`.
        zero_point: int32, per tensor or per token `(..., 1)`.
        table: uint8 `(256,)`.

    Returns:
        uint8 levels `(..., D)`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("quantize_table", x, scale, zero_point, table)


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Quantizes to powers of two: `clamp(round(-log2(x / scale)), 0, 2^bits - 1)`, top code zero.

    Defined without a logarithm, so that every backend returns the same codes: with `x / scale = m *
    2^e`, m in [0.5, 1), the code is `-e + (m <= sqrt(0.5))` in float32. Zero and negative values
    get the top code; other codes stand for `scale * 2^-code`.

    Args:
        x: Finite float32 of any shape, probabilities for instance.
        scale: float32, one element.
        bits: Width of a code, 2 to 8.

    Returns:
        uint8 codes in the shape of `x`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("quantize_log2", x, scale, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs rows of codes without a wasted bit, in the format of `qtool.engine.packing`.

    Args:
        codes: uint8 `(N, K)`, each below 2^bits.
        bits: Width of a code, 2 to 8.

    Returns:
        uint8 `(N, packed_width(bits, K))`.

    Raises:
        UsageError: An argument has the wrong type or shape.
        BackendError: The backend asked for cannot run this.
    """
    return _run("pack_codes", codes, bits)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Unpacks what `pack_codes` packed.

    Args:
        packed: uint8 `(N, packed_width(bits, in_features))`.
        bits: Width of a code, 2 to 8.
        in_features: Codes in a row, K.

    Returns:
        uint8 codes `(N, K)`.

    Raises:
        UsageError: An argument has the wrong type or shape.
        BackendError: The backend asked for cannot run this.
    """
    return _run("unpack_codes", packed, bits, in_features)


def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None = None,
    *,
    weight_bits: int,
    in_features: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer on codes: exact integer sum, then `sum * (x_scale * weight_scale) + bias`.

    The sum over k is that of `(x - x_zero) * (q - weight_zero)`. The float operations round one by
    one in this order, with `residual` added last, so that a simulation with integer-valued float32
    tensors gives the same bits while its sums stay below 2^24.

    Args:
        x: uint8 codes `(..., K)`.
        x_scale: float32, per tensor or per token `(..., 1)`.
        x_zero: int32, per tensor or per token `(..., 1)`.
        weight: Packed uint8 rows `(N, packed_width(weight_bits, K))`.
        weight_scale: float32 `(N,)`.
        weight_zero: int32 `(N,)`.
        bias: float32 `(N,)`, or None.
        weight_bits: Width of a weight code, 2 to 8.
        in_features: K.
        residual: float32 `(..., N)`, added to the result, or None.

    Returns:
        float32 `(..., N)`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run(
        "linear",
        x,
        x_scale,
        x_zero,
        weight,
        weight_scale,
        weight_zero,
        bias,
        weight_bits,
        in_features,
        residual,
    )


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None = None,
    bits: int,
) -> Tensor:
    """Normalises the last dimension and quantizes: the input codes of a linear layer.

    Backends may round the normalised value in another way, so a code may differ by one where that
    lies next to the middle between two.

    Args:
        x: float32 `(..., D)`.
        weight: float32 `(D,)`, or None for ones.
        bias: float32 `(D,)`, or None for zeros.
        eps: Added to the variance.
        scale: float32, one element.
        zero_point: int32, one element.
        table: uint8 `(256,)` for the levels of `quantize_table`, or None for uniform codes.
        bits: Width of a uniform code, 2 to 8; unused with a table.

    Returns:
        uint8 `(..., D)`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("layer_norm_quantize", x, weight, bias, eps, scale, zero_point, table, bits)


def linear_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None = None,
    *,
    weight_bits: int,
    in_features: int,
    activation: str = "none",
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None = None,
    out_bits: int,
) -> Tensor:
    """`linear`, an activation and the quantizer of what comes next in one: codes to codes.

    Sums are exact as in `linear`; backends may round the activation in another way, so a code may
    differ by one where its value lies next to the middle between two.

    Args:
        x: uint8 codes `(..., K)`.
        x_scale: As in `linear`.
        x_zero: As in `linear`.
        weight: As in `linear`.
        weight_scale: As in `linear`.
        weight_zero: As in `linear`.
        bias: As in `linear`.
        weight_bits: Width of a weight code, 2 to 8.
        in_features: K.
        activation: "none", or "gelu" for x times the normal distribution function of x.
        out_scale: float32 `(G,)`: one quantizer for each of G equal groups of channels, a single
            one after an activation.
        out_zero: int32 `(G,)`.
        out_table: uint8 `(G, 256)`, `(256,)` for one group, or None for uniform codes.
        out_bits: Width of a uniform output code, 2 to 8; unused with tables.

    Returns:
        uint8 `(..., N)` for one group, `(G, ..., N / G)` for more.

    Raises:
        UsageError: An argument has the wrong type, shape, value or device.
        BackendError: The backend asked for cannot run this.
    """
    if out_table is not None and out_table.shape[:-1] == (1,):
        out_table = out_table[0]
    return _run(
        "linear_quantize",
        x,
        x_scale,
        x_zero,
        weight,
        weight_scale,
        weight_zero,
        bias,
        weight_bits,
        in_features,
        activation,
        out_scale,
        out_zero,
        out_table,
        out_bits,
    )


def attention(
    qkv: Tensor,
    qkv_scale: Tensor,
    qkv_zero: Tensor,
    *,
    added: Tensor | None = None,
    p_scale: Tensor,
    p_zero: Tensor | None = None,
    p_table: Tensor | None = None,
    p_bits: int,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None = None,
    out_bits: int,
) -> Tensor:
    """Attention of quantized queries, keys and values, from codes to codes.

    `softmax(matmul(q, k^T) + added)` is quantized, multiplied by the values with `matmul` or
    `matmul_log2`, and the result quantized for the layer after it. Sums of codes are exact;
    backends may round softmax in another way, so a probability next to the middle between two codes
    may get either. The scale of the queries holds the usual `1 / sqrt(D)`.

    Args:
        qkv: uint8 codes of queries, keys and values `(3, B, N, heads, D)`.
        qkv_scale: float32 `(3,)`.
        qkv_zero: int32 `(3,)`.
        added: float32 `(windows, heads, N, N)`, added to the scores of every `windows` elements of
            the batch in turn, or None.
        p_scale: float32, one element.
        p_zero: int32, one element; None quantizes probabilities to powers of two.
        p_table: uint8 `(256,)` or None.
        p_bits: Width of a code of a probability, 2 to 8; unused with a table.
        out_scale: float32, one element.
        out_zero: int32, one element.
        out_table: uint8 `(256,)` or None.
        out_bits: Width of a uniform output code, 2 to 8; unused with a table.

    Returns:
        uint8 `(B, N, heads * D)`.

    Raises:
        UsageError: An argument has the wrong type, shape, value or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run(
        "attention",
        qkv,
        qkv_scale,
        qkv_zero,
        added,
        p_scale,
        p_zero,
        p_table,
        p_bits,
        out_scale,
        out_zero,
        out_table,
        out_bits,
    )


def conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None = None,
    *,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolution of codes: exact integer sum, then `sum * (x_scale * weight_scale) + bias`.

    Padding stands for the value 0, that is for the code `x_zero`, so it adds nothing to a sum. The
    float operations round in the order of `linear`. The dimensions of kernel, stride, padding and
    dilation are height and width.

    Args:
        x: uint8 codes `(B, C, H, W)`.
        x_scale: float32, one element.
        x_zero: int32, one element.
        weight: Rows of K = C / groups * kernel area codes in the order of torch's weights, packed
            uint8 `(N, packed_width(weight_bits, K))`.
        weight_scale: float32 `(N,)`.
        weight_zero: int32 `(N,)`.
        bias: float32 `(N,)`, or None.
        weight_bits: Width of a weight code, 2 to 8.
        kernel: Size of the kernel.
        stride: Distance between two places of the kernel.
        padding: Rows and columns of zeros on either side.
        dilation: Distance between two points of the kernel.
        groups: Blocks of channels that do not mix; C of them are a depthwise convolution.

    Returns:
        float32 `(B, N, H', W')`, channels last in memory if `x` is.

    Raises:
        UsageError: An argument has the wrong type, shape, value or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run(
        "conv2d",
        x,
        x_scale,
        x_zero,
        weight,
        weight_scale,
        weight_zero,
        bias,
        weight_bits,
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )


def conv2d_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None = None,
    *,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "none",
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None = None,
    out_bits: int,
) -> Tensor:
    """`conv2d`, an activation and the quantizer of what comes next in one: codes to codes.

    The same codes as those three one after another.

    Args:
        x: As in `conv2d`, like all others up to `groups`.
        x_scale: float32, one element.
        x_zero: int32, one element.
        weight: uint8 `(N, packed_width(weight_bits, K))`.
        weight_scale: float32 `(N,)`.
        weight_zero: int32 `(N,)`.
        bias: float32 `(N,)`, or None.
        weight_bits: Width of a weight code, 2 to 8.
        kernel: Size of the kernel.
        stride: Distance between two places of the kernel.
        padding: Rows and columns of zeros on either side.
        dilation: Distance between two points of the kernel.
        groups: Blocks of channels that do not mix.
        activation: "none", "relu", or "relu6" for values cut off at 6 as well.
        out_scale: float32, one element.
        out_zero: int32, one element.
        out_table: uint8 `(256,)`, or None for uniform codes.
        out_bits: Width of a uniform output code, 2 to 8; unused with a table.

    Returns:
        uint8 `(B, N, H', W')`, channels last in memory if `x` is.

    Raises:
        UsageError: An argument has the wrong type, shape, value or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run(
        "conv2d_quantize",
        x,
        x_scale,
        x_zero,
        weight,
        weight_scale,
        weight_zero,
        bias,
        weight_bits,
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        activation,
        out_scale,
        out_zero,
        out_table,
        out_bits,
    )


def linear_nested(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
) -> Tensor:
    """Linear layer with the leading `bits` bits of 8-bit weights, in one product at any width.

    The weight is resident as 8-bit codes less 128. An arithmetic shift by 8 - bits leaves the
    leading bits h, which stand for the odd level 2 h + 1: the middle of the codes they replace. The
    result is the exact integer sum over k of `(x - x_zero) * (2 h + 1)`, then
    `sum * (x_scale * weight_scale) + bias`, rounded as in `linear`.

    Args:
        x: uint8 codes `(..., K)`.
        x_scale: float32, per tensor or per token `(..., 1)`.
        x_zero: int32, per tensor or per token `(..., 1)`.
        weight: int8 `(N, K)`, codes less 128.
        weight_scale: float32 `(N,)`, half the distance of two levels at this width.
        bias: float32 `(N,)`, or None.
        bits: Leading bits that count, 2 to 8.

    Returns:
        float32 `(..., N)`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("linear_nested", x, x_scale, x_zero, weight, weight_scale, bias, bits)


def matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Batched product of codes: the exact sum of `(a - a_zero) * (b - b_zero)`, scaled.

    Args:
        a: uint8 codes `(..., M, K)`.
        a_scale: float32, one element.
        a_zero: int32, one element.
        b: uint8 codes `(..., K, N)` with the leading dimensions of `a`; a transposed view is
            welcome.
        b_scale: float32, one element.
        b_zero: int32, one element.

    Returns:
        float32 `(..., M, N)`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("matmul", a, a_scale, a_zero, b, b_scale, b_zero)


def matmul_log2(
    p: Tensor, p_scale: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, *, bits: int
) -> Tensor:
    """Batched product of powers of two with codes: the sum of `2^-p * (v - v_zero)`, scaled.

    The top code of `p` means zero, and so does every code above 126, whose power is no normal
    float32. Products are exact; backends may round while they add them up.

    Args:
        p: uint8 codes of `quantize_log2`, `(..., M, K)`.
        p_scale: float32, one element.
        v: uint8 codes `(..., K, N)` with the leading dimensions of `p`.
        v_scale: float32, one element.
        v_zero: int32, one element.
        bits: Width of a code of `p`, 2 to 8.

    Returns:
        float32 `(..., M, N)`.

    Raises:
        UsageError: An argument has the wrong type, shape or device.
        BackendError: The backend asked for cannot run this.
    """
    return _run("matmul_log2", p, p_scale, v, v_scale, v_zero, bits)
