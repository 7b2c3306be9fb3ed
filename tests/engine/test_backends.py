"""Every backend returns what the reference returns, on sizes that fit no tile."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.engine import ops

WIDTHS = range(2, 9)
SIZES = [(1, 97, 48), (64, 96, 33), (77, 33, 7)]


def linear_arguments(draw, rows, features, channels, *, bits, per_token, input_bits=8):
    size = (rows, 1) if per_token else (1,)
    weight = ops.pack_codes(draw.codes(channels, features, bits=bits), bits=bits)
    return (
        draw.codes(rows, features, bits=input_bits),
        draw.scales(*size),
        draw.zeros(*size, bits=input_bits),
        weight,
        draw.scales(channels),
        draw.zeros(channels, bits=bits),
    )


@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_uniform(bits, per_token, draw, assert_equal_everywhere):
    x = draw.floats(3, 7, 301) * 3
    x[0, 0, :4] = torch.tensor([1e30, -1e30, float("inf"), -float("inf")])
    size = (3, 7, 1) if per_token else (1,)
    scale, zero = draw.scales(*size), draw.zeros(*size, bits=bits)
    codes = assert_equal_everywhere(ops.quantize_uniform, x, scale, zero, bits=bits)
    assert int(codes.max()) < 2**bits


def test_quantize_uniform_mixes_per_token_and_per_tensor(draw, assert_equal_everywhere):
    x = draw.floats(40, 5)
    assert_equal_everywhere(ops.quantize_uniform, x, draw.scales(40, 1), draw.zeros(), bits=8)
    assert_equal_everywhere(ops.quantize_uniform, x, draw.scales(), draw.zeros(40, 1), bits=8)


def test_quantize_uniform_rounds_halves_to_even(device, assert_equal_everywhere):
    x = torch.arange(-300, 300, device=device).float() / 2
    scale, zero = torch.ones(1, device=device), torch.full((1,), 128, device=device).int()
    assert_equal_everywhere(ops.quantize_uniform, x, scale, zero, bits=8)


@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
def test_quantize_table(per_token, draw, assert_equal_everywhere):
    x = draw.floats(3, 7, 301) * 3
    x[0, 0, :2] = torch.tensor([1e30, -1e30])
    size = (3, 7, 1) if per_token else (1,)
    table = draw.codes(256).sort().values
    levels = assert_equal_everywhere(
        ops.quantize_table, x, draw.scales(*size) / 50, draw.zeros(*size), table
    )
    assert levels[0, 0, 0] == table[255]
    assert levels[0, 0, 1] == table[0]


@pytest.mark.parametrize("bits", WIDTHS)
def test_quantize_log2(bits, draw, device, assert_equal_everywhere):
    x = draw.floats(2500).abs()
    x[:7] = torch.tensor([0.0, -0.0, -1.0, 1e-45, 1e-40, 0.70710678, 1e30], device=device)
    x = torch.cat([x, x * 2.0**-60, x * 2.0**-126])
    for scale in (1.0, 0.3):
        step = torch.tensor([scale], device=device)
        assert_equal_everywhere(ops.quantize_log2, x, step, bits=bits)


@pytest.mark.parametrize("prepared", [False, True], ids=["packed", "prepared"])
@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear(bits, per_token, prepared, draw, assert_equal_everywhere):
    for rows, features, channels in SIZES:
        arguments = linear_arguments(
            draw, rows, features, channels, bits=bits, per_token=per_token, input_bits=10 - bits
        )
        bias = draw.floats(channels) if rows == 64 else None
        if prepared:
            weight = ops.prepare_weight(arguments[3], bits=bits, in_features=features)
            arguments = (*arguments[:3], weight, *arguments[4:])
        sizes = {"weight_bits": bits, "in_features": features}
        assert_equal_everywhere(ops.linear, *arguments, bias, **sizes)


@pytest.mark.parametrize("bits", [3, 8])
def test_linear_on_the_tokens_of_a_picture(bits, draw, assert_equal_everywhere):
    arguments = linear_arguments(draw, 197, 193, 65, bits=bits, per_token=True)
    assert_equal_everywhere(ops.linear, *arguments, weight_bits=bits, in_features=193)


def convolution_arguments(draw, shape, channels, *, bits, groups=1, kernel, input_bits=8):
    weight = draw.codes(channels, shape[1] // groups * kernel[0] * kernel[1], bits=bits)
    return (
        draw.codes(*shape, bits=input_bits),
        draw.scales(1),
        draw.zeros(1, bits=input_bits),
        ops.pack_codes(weight, bits=bits),
        draw.scales(channels),
        draw.zeros(channels, bits=bits),
    )


CONVOLUTIONS = {
    "point": ((2, 9, 5, 6), 7, {"kernel": (1, 1)}),
    "padded": ((2, 5, 6, 9), 19, {"kernel": (3, 3), "padding": (1, 1)}),
    "stem": ((1, 3, 15, 14), 5, {"kernel": (7, 7), "padding": (3, 3), "stride": (2, 2)}),
    "patches": ((1, 3, 8, 12), 65, {"kernel": (4, 3), "stride": (4, 3)}),
    "dilated": (
        (2, 3, 11, 9),
        4,
        {"kernel": (3, 2), "dilation": (2, 3), "padding": (2, 0), "stride": (1, 2)},
    ),
    "grouped": ((1, 12, 5, 5), 6, {"kernel": (3, 3), "padding": (1, 1), "groups": 3}),
    "depthwise": ((2, 6, 7, 5), 6, {"kernel": (3, 5), "padding": (1, 2), "groups": 6}),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["packed", "prepared"])
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_conv2d(form, prepared, draw, assert_equal_everywhere):
    shape, channels, geometry = CONVOLUTIONS[form]
    bits = 3 + len(form) % 4
    arguments = convolution_arguments(
        draw,
        shape,
        channels,
        bits=bits,
        groups=geometry.get("groups", 1),
        kernel=geometry["kernel"],
    )
    bias = draw.floats(channels) if prepared else None
    if prepared:
        terms = shape[1] // geometry.get("groups", 1) * math.prod(geometry["kernel"])
        weight = ops.prepare_weight(arguments[3], bits=bits, in_features=terms)
        arguments = (*arguments[:3], weight, *arguments[4:])
    assert_equal_everywhere(ops.conv2d, *arguments, bias, weight_bits=bits, **geometry)


@pytest.mark.parametrize("bits", WIDTHS)
def test_conv2d_at_every_width(bits, draw, assert_equal_everywhere):
    arguments = convolution_arguments(draw, (2, 5, 4, 4), 6, bits=bits, kernel=(3, 3))
    assert_equal_everywhere(ops.conv2d, *arguments, weight_bits=bits, kernel=(3, 3), padding=(1, 1))


def test_conv2d_pads_with_the_code_of_zero(draw, device, assert_equal_everywhere):
    """Where every input is zero, so is every sum, at the border as in the middle."""
    arguments = list(convolution_arguments(draw, (1, 4, 5, 5), 3, bits=4, kernel=(3, 3)))
    arguments[0] = torch.full_like(arguments[0], 77)
    arguments[2] = torch.tensor([77], dtype=torch.int32, device=device)
    y = assert_equal_everywhere(
        ops.conv2d, *arguments, weight_bits=4, kernel=(3, 3), padding=(2, 2)
    )
    assert not y.any()


@pytest.mark.parametrize("side", [1, 17], ids=["many channels", "a vast kernel"])
def test_large_convolutions_are_exact_before_the_scale(side, device, assert_equal_everywhere):
    channels = 1 if side > 1 else 600
    x = torch.full((1, channels, side, side), 255, dtype=torch.uint8, device=device)
    x[0, 0, 0, 0] = 254
    weight = torch.full((2, channels * side * side), 255, dtype=torch.uint8, device=device)
    one, zeros = torch.ones(2, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    y = assert_equal_everywhere(
        ops.conv2d, x, one[:1], zeros[:1], weight, one, zeros, weight_bits=8, kernel=(side, side)
    )
    total = 255 * 255 * channels * side * side - 255
    assert total > 2**24
    assert y.flatten().tolist() == [float(torch.tensor(total, dtype=torch.float32))] * 2


@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear_nested(bits, per_token, draw, assert_equal_everywhere):
    for rows, features, channels in SIZES:
        x, x_scale, x_zero, _, scale, _ = linear_arguments(
            draw, rows, features, channels, bits=8, per_token=per_token
        )
        weight = draw.codes(channels, features).view(torch.int8)
        bias = draw.floats(channels) if rows == 64 else None
        y = assert_equal_everywhere(
            ops.linear_nested, x, x_scale, x_zero, weight, scale, bias, bits=bits
        )
        # The levels as codes of their own, with the zero point between the two middle ones.
        levels = 2 * ((weight.int() + 128) >> (8 - bits)) - (2**bits - 1)
        sums = (x.double() - x_zero.double()) @ levels.double().T
        expected = sums.float() * (x_scale * scale)
        assert torch.equal(y, expected if bias is None else expected + bias)


def test_the_largest_nested_sums_fit_int32(device, assert_equal_everywhere):
    terms = 16384
    weight = torch.full((3, terms), -128, dtype=torch.int8, device=device)
    weight[1] = 127
    one = torch.ones(3, device=device)
    for code, zero in ((255, 0), (0, 255), (255, 255)):
        x = torch.full((2, terms), code, dtype=torch.uint8, device=device)
        offset = torch.tensor([zero], device=device).int()
        y = assert_equal_everywhere(
            ops.linear_nested, x, one[:1], offset, weight, one, None, bits=8
        )
        assert y[0, 1].item() == float((code - zero) * 255 * terms)
        assert y[0, 0].item() == -y[0, 1].item()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 2)])
def test_matmul(shape, draw, assert_equal_everywhere):
    a, b = draw.codes(*shape, 65, 33), draw.codes(*shape, 37, 33).transpose(-1, -2)
    parameters = (draw.scales(1), draw.zeros(1)), (draw.scales(), draw.zeros())
    assert_equal_everywhere(ops.matmul, a, *parameters[0], b, *parameters[1])


def test_matmul_of_heads_cut_from_one_projection(draw, assert_equal_everywhere):
    query, key, value = draw.codes(2, 19, 3, 4, 8).permute(2, 0, 3, 1, 4)
    one, zero = draw.scales(1), draw.zeros(1)
    scores = assert_equal_everywhere(ops.matmul, query, one, zero, key.transpose(-1, -2), one, zero)
    assert scores.shape == (2, 4, 19, 19)
    weights = draw.codes(2, 4, 19, 19)
    assert_equal_everywhere(ops.matmul, weights, one, draw.zeros() * 0, value, one, zero)


@pytest.mark.parametrize("bits", WIDTHS)
def test_matmul_log2(bits, draw, outputs):
    p = draw.codes(2, 65, 33, bits=bits)
    v = draw.codes(2, 33, 17)
    arguments = (p, draw.scales(1), v, draw.scales(1), draw.zeros(1))
    expected, results = outputs(ops.matmul_log2, *arguments, bits=bits)
    for result in results.values():
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=tolerance)


def test_large_sums_are_exact_before_the_scale(device, assert_equal_everywhere):
    x = torch.full((2, 5000), 255, dtype=torch.uint8, device=device)
    weight = torch.full((3, 5000), 255, dtype=torch.uint8, device=device)
    one, zeros = torch.ones(3, device=device), torch.tensor([0, 128, 255], device=device).int()
    sizes = {"weight_bits": 8, "in_features": 5000}
    y = assert_equal_everywhere(ops.linear, x, one[:1], zeros[:1], weight, one, zeros, **sizes)
    sums = torch.tensor([255 * 255, 255 * 127, 0]) * 5000
    assert y[0].tolist() == sums.float().tolist()
