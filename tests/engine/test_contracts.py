"""Arguments that do not fit are refused with a sentence, before anything runs."""

from __future__ import annotations

import re

import pytest
import torch

from qtool.engine import contracts, dispatch, ops
from qtool.errors import BackendError, UsageError

X = torch.zeros(2, 3, 8)
CODES = torch.zeros(2, 3, 8, dtype=torch.uint8)
ONE = torch.ones(1)
ZERO = torch.zeros(1, dtype=torch.int32)
IMAGE = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
PACKED = torch.zeros(5, 4, dtype=torch.uint8)
HEADS = torch.zeros(3, 4, 6, 2, 5, dtype=torch.uint8)
TABLE = torch.zeros(256, dtype=torch.uint8)
SCALES = torch.ones(5)
ZEROS = torch.zeros(5, dtype=torch.int32)
COLUMNS = CODES.transpose(1, 2)
SIZES = {"weight_bits": 4, "in_features": 8}


def linear(
    x=CODES, x_scale=ONE, x_zero=ZERO, weight=PACKED, scale=SCALES, zero=ZEROS, bias=None, **sizes
):
    return ops.linear(x, x_scale, x_zero, weight, scale, zero, bias, **(SIZES | sizes))


def layer_norm_quantize(x=X, weight=None, bias=None, scale=ONE, zero=ZERO, table=None, bits=4):
    return ops.layer_norm_quantize(
        x, weight, bias, eps=1e-6, scale=scale, zero_point=zero, table=table, bits=bits
    )


def linear_quantize(
    x=CODES, bias=None, activation="none", scale=ONE, zero=ZERO, table=None, bits=4, **sizes
):
    return ops.linear_quantize(
        x,
        ONE,
        ZERO,
        PACKED,
        SCALES,
        ZEROS,
        bias,
        **(SIZES | sizes),
        activation=activation,
        out_scale=scale,
        out_zero=zero,
        out_table=table,
        out_bits=bits,
    )


def attention(qkv=HEADS, qkv_scale=SCALES[:3], qkv_zero=ZEROS[:3], added=None, **quantizers):
    usual = {"p_scale": ONE, "p_zero": ZERO, "p_bits": 4}
    usual |= {"out_scale": ONE, "out_zero": ZERO, "out_bits": 4}
    return ops.attention(qkv, qkv_scale, qkv_zero, added=added, **(usual | quantizers))


def conv2d(x=IMAGE, x_scale=ONE, weight=PACKED, **sizes):
    sizes = {"weight_bits": 4, "kernel": (2, 2), **sizes}
    return ops.conv2d(x, x_scale, ZERO, weight, SCALES, ZEROS, **sizes)


def conv2d_quantize(activation="none", scale=ONE, table=None, bits=4, **sizes):
    sizes = {"weight_bits": 4, "kernel": (2, 2), **sizes}
    output = {"out_scale": scale, "out_zero": ZERO, "out_table": table, "out_bits": bits}
    weight = (PACKED, SCALES, ZEROS)
    return ops.conv2d_quantize(IMAGE, ONE, ZERO, *weight, activation=activation, **sizes, **output)


def matmul(a=CODES, a_scale=ONE, a_zero=ZERO, b=COLUMNS, b_scale=ONE, b_zero=ZERO):
    return ops.matmul(a, a_scale, a_zero, b, b_scale, b_zero)


def matmul_log2(p=CODES, p_scale=ONE, v=COLUMNS, v_scale=ONE, v_zero=ZERO, bits=4):
    return ops.matmul_log2(p, p_scale, v, v_scale, v_zero, bits=bits)


REFUSALS = {
    "x is torch.float64, not torch.float32": lambda: ops.quantize_uniform(
        X.double(), ONE, ZERO, bits=4
    ),
    "x has shape (), fewer than 1 dimensions": lambda: ops.quantize_uniform(
        X[0, 0, 0], ONE, ZERO, bits=4
    ),
    "scale has shape (8,), neither one element (per tensor) nor (2, 3, 1) (per token)": lambda: (
        ops.quantize_uniform(X, torch.ones(8), ZERO, bits=4)
    ),
    "zero_point is torch.float32, not torch.int32": lambda: ops.quantize_uniform(
        X, ONE, ONE, bits=4
    ),
    "table has shape (16,), not (256,)": lambda: ops.quantize_table(
        X, ONE, ZERO, torch.zeros(16, dtype=torch.uint8)
    ),
    "bits is 1, not between 2 and 8": lambda: ops.quantize_uniform(X, ONE, ZERO, bits=1),
    "bits is 9, not between 2 and 8": lambda: ops.quantize_log2(X, ONE, bits=9),
    "scale has shape (2,), not one element": lambda: ops.quantize_log2(X, torch.ones(2), bits=4),
    "scale is on meta, the first argument on cpu": lambda: ops.quantize_log2(
        X, ONE.to("meta"), bits=4
    ),
    "codes has shape (2, 3, 8), not (N, K)": lambda: ops.pack_codes(CODES, bits=4),
    "codes is torch.int8, not torch.uint8": lambda: ops.pack_codes(PACKED.to(torch.int8), bits=4),
    "packed has shape (5, 4), not (N, 5): rows of 9 codes of 4 bits": lambda: ops.unpack_codes(
        PACKED, bits=4, in_features=9
    ),
    "in_features is -1, below zero": lambda: ops.unpack_codes(PACKED, bits=4, in_features=-1),
    "x has 8 features, the weight has 7": lambda: linear(in_features=7),
    "x_zero has shape (3,), neither one element (per tensor) nor (2, 3, 1) (per token)": lambda: (
        linear(x_zero=ZEROS[:3])
    ),
    "weight has shape (5, 4), not (N, 3): rows of 8 codes of 3 bits": lambda: linear(weight_bits=3),
    "weight_bits is 0, not between 2 and 8": lambda: linear(weight_bits=0),
    "weight is torch.int32, not torch.uint8": lambda: linear(weight=PACKED.int()),
    "weight is torch.int8, not torch.uint8": lambda: linear(weight=PACKED.to(torch.int8)),
    "weight_scale has shape (1,), not (5,)": lambda: linear(scale=ONE),
    "weight_zero is torch.uint8, not torch.int32": lambda: linear(zero=ZEROS.to(torch.uint8)),
    "bias has shape (5, 1), not (5,)": lambda: linear(bias=SCALES[:, None]),
    "x is torch.uint8, not torch.float32": lambda: layer_norm_quantize(x=CODES),
    "weight has shape (5,), not (8,)": lambda: layer_norm_quantize(weight=SCALES),
    "bias is torch.int32, not torch.float32": lambda: layer_norm_quantize(bias=X[0, 0].int()),
    "x has 8 features, the weight has 6": lambda: linear_quantize(in_features=6),
    "bias has shape (1,), not (5,)": lambda: linear_quantize(bias=ONE),
    "activation is 'relu', not one of none, gelu": lambda: linear_quantize(activation="relu"),
    "3 output quantizers do not divide 5 channels alike": lambda: linear_quantize(
        scale=SCALES[:3], zero=ZEROS[:3]
    ),
    "0 output quantizers do not divide 5 channels alike": lambda: linear_quantize(
        scale=SCALES[:0], zero=ZEROS[:0]
    ),
    "there is one output quantizer after gelu, not 5": lambda: linear_quantize(
        activation="gelu", scale=SCALES, zero=ZEROS
    ),
    "out_zero has shape (1,), not (5,)": lambda: linear_quantize(scale=SCALES),
    "out_zero is torch.float32, not torch.int32": lambda: linear_quantize(zero=ONE),
    "out_bits is 9, not between 2 and 8": lambda: linear_quantize(bits=9),
    "out_table has shape (256,), not (5, 256)": lambda: linear_quantize(
        scale=SCALES, zero=ZEROS, table=TABLE
    ),
    "out_table has shape (255,), not (256,)": lambda: linear_quantize(table=TABLE[:255]),
    "out_table is torch.int32, not torch.uint8": lambda: linear_quantize(table=TABLE.int()),
    "qkv has shape (2, 4, 6, 2, 5), not (3, B, N, heads, D)": lambda: attention(qkv=HEADS[:2]),
    "qkv is torch.int8, not torch.uint8": lambda: attention(qkv=HEADS.to(torch.int8)),
    "qkv_scale has shape (1,), not (3,)": lambda: attention(qkv_scale=ONE),
    "qkv_zero is torch.float32, not torch.int32": lambda: attention(qkv_zero=SCALES[:3]),
    ("added has shape (3, 2, 6, 6), not (windows, 2, 6, 6) with windows that divide 4"): lambda: (
        attention(added=torch.zeros(3, 2, 6, 6))
    ),
    "added has shape (6, 6), not (windows, 2, 6, 6) with windows that divide 4": lambda: attention(
        added=torch.zeros(6, 6)
    ),
    "added is torch.float64, not torch.float32": lambda: attention(
        added=torch.zeros(1, 2, 6, 6).double()
    ),
    "p_table needs p_zero: powers of two have neither": lambda: attention(
        p_zero=None, p_table=TABLE
    ),
    "p_bits is 1, not between 2 and 8": lambda: attention(p_zero=None, p_bits=1),
    "p_zero has shape (5,), not one element": lambda: attention(p_zero=SCALES.int()),
    "p_table has shape (3,), not (256,)": lambda: attention(p_table=TABLE[:3]),
    "out_scale is on meta, the first argument on cpu": lambda: attention(out_scale=ONE.to("meta")),
    "x has shape (2, 3, 8), not (B, C, H, W)": lambda: conv2d(x=CODES),
    "x_scale has shape (5,), not one element": lambda: conv2d(x_scale=SCALES),
    "kernel is [2], not two numbers of 1 or more": lambda: conv2d(kernel=(2,)),
    "stride is [0, 1], not two numbers of 1 or more": lambda: conv2d(stride=(0, 1)),
    "padding is [-1, 0], not two numbers of 0 or more": lambda: conv2d(padding=(-1, 0)),
    "dilation is [1, 0], not two numbers of 1 or more": lambda: conv2d(dilation=(1, 0)),
    "activation is 'gelu', not one of none, relu, relu6": lambda: conv2d_quantize("gelu"),
    "out_scale has shape (5,), not one element": lambda: conv2d_quantize(scale=SCALES),
    "out_table has shape (254,), not (256,)": lambda: conv2d_quantize(table=TABLE[:254]),
    "out_bits is 1, not between 2 and 8": lambda: conv2d_quantize(bits=1),
    "3 groups do not divide 2 input and 5 output channels alike": lambda: conv2d_quantize(groups=3),
    "2 groups do not divide 2 input and 5 output channels alike": lambda: conv2d(groups=2),
    "weight has shape (5, 4), not (N, 9): rows of 18 codes of 4 bits": lambda: conv2d(
        kernel=(3, 3)
    ),
    "x has shape (1, 2, 3, 3), smaller than a kernel of (2, 2) can cover": lambda: conv2d(
        dilation=(3, 3)
    ),
    "a (2, 3, 8) and b (2, 3, 8) do not multiply: they need shapes (..., M, K) and (..., K, N)": (
        lambda: matmul(b=CODES)
    ),
    "a has shape (8,), fewer than 2 dimensions": lambda: matmul(a=CODES[0, 0]),
    "b_zero has shape (5,), not one element": lambda: matmul(b_zero=ZEROS),
    "v is torch.float32, not torch.uint8": lambda: matmul_log2(v=X.transpose(1, 2)),
    "p_scale has shape (5,), not one element": lambda: matmul_log2(p_scale=SCALES),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_a_wrong_argument_is_named(sentence):
    with dispatch.trace() as decisions, pytest.raises(UsageError, match=f"^{re.escape(sentence)}$"):
        REFUSALS[sentence]()
    assert not decisions


def test_arguments_are_checked_without_data_too():
    with pytest.raises(UsageError, match="x has 8 features, the weight has 7"):
        torch.ops.qtool.linear(
            CODES.to("meta"),
            *(item.to("meta") for item in (ONE, ZERO, PACKED, SCALES, ZEROS)),
            None,
            4,
            7,
        )


def long_call(terms):
    weight = torch.full((2, terms), 255, dtype=torch.uint8)
    x = torch.full((3, terms), 255, dtype=torch.uint8)
    zeros = torch.tensor([0, 255], dtype=torch.int32)
    sizes = {"weight_bits": 8, "in_features": terms}
    return ops.linear(x, ONE, ZERO, weight, ONE.repeat(2), zeros, **sizes)


@pytest.mark.usefixtures("exact_int8_products")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_longest_sums_are_exact(backend):
    terms = contracts.MAX_TERMS
    with dispatch.use_backend(backend):
        assert long_call(terms).tolist() == [[255.0 * 255 * terms, 0]] * 3


def test_longer_sums_go_to_the_reference():
    terms = contracts.MAX_TERMS + 1
    with dispatch.trace() as decisions:
        assert long_call(terms)[0, 0] == torch.tensor(255.0 * 255 * terms)
    assert decisions == [("linear", "reference", "int32 sums hold at most 16384 terms")]
    with (
        dispatch.use_backend("cpu"),
        pytest.raises(BackendError, match="int32 sums hold at most 16384 terms") as caught,
    ):
        long_call(terms)
    assert caught.value.remedy == "choose auto or reference"


def test_wide_heads_go_to_the_reference():
    qkv = HEADS.repeat(1, 1, 1, 1, 52)[..., : contracts.MAX_HEAD_WIDTH + 1]
    reason = f"heads are at most {contracts.MAX_HEAD_WIDTH} wide"
    with dispatch.trace() as decisions:
        assert attention(qkv=qkv).shape == (4, 6, 2 * qkv.shape[-1])
    assert decisions == [("attention", "reference", reason)]
    with dispatch.use_backend("cpu"), pytest.raises(BackendError, match=reason):
        attention(qkv=qkv)
