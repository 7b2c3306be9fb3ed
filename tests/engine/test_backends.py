"""Every backend returns what the reference returns, on sizes that fit no tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qtool.engine import contracts, dispatch, ops

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


@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear(bits, per_token, draw, assert_equal_everywhere):
    for rows, features, channels in SIZES:
        arguments = linear_arguments(
            draw, rows, features, channels, bits=bits, per_token=per_token, input_bits=10 - bits
        )
        bias = draw.floats(channels) if rows == 64 else None
        sizes = {"weight_bits": bits, "in_features": features}
        assert_equal_everywhere(ops.linear, *arguments, bias, **sizes)


@pytest.mark.parametrize("bits", [3, 8])
def test_linear_on_the_tokens_of_a_picture(bits, draw, assert_equal_everywhere):
    arguments = linear_arguments(draw, 197, 193, 65, bits=bits, per_token=True)
    assert_equal_everywhere(ops.linear, *arguments, weight_bits=bits, in_features=193)


def some_levels(draw, *groups):
    """Tables with 16 levels at random places, as those of quantizers that were fitted to data."""
    steps = draw.codes(*groups, 256, bits=4).sort().values
    return (steps * 17).to(torch.uint8)


def quantizers_of(draw, values, *, groups=1, bits, table=False):
    """Output quantizers that use their codes on `values` (..., N): scales, zeros and tables."""
    scale = [part.std() / 2 ** (bits - 2) + 1e-6 for part in values.chunk(groups, dim=-1)]
    zero = draw.zeros(groups, bits=bits - 1) + 2 ** (bits - 2)
    tables = some_levels(draw, groups) if table else None
    return torch.stack(scale), zero, tables


@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
def test_linear_adds_a_residual_last(per_token, draw, assert_equal_everywhere):
    arguments = linear_arguments(draw, 77, 33, 70, bits=4, per_token=per_token)
    sizes = {"weight_bits": 4, "in_features": 33}
    residual = draw.floats(77, 70) * 1e3
    y = assert_equal_everywhere(ops.linear, *arguments, draw.floats(70), **sizes, residual=residual)
    plain = assert_equal_everywhere(ops.linear, *arguments, **sizes)
    assert not torch.equal(y, plain)
    alone = assert_equal_everywhere(ops.linear, *arguments, **sizes, residual=residual)
    assert torch.equal(alone, plain + residual)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_linear_quantize(bits, table, groups, draw, assert_equal_up_to_ties):
    for rows, features, channels in SIZES:
        channels *= groups
        arguments = linear_arguments(draw, rows, features, channels, bits=bits, per_token=rows > 64)
        arguments += (draw.floats(channels) * 9 if rows == 64 else None,)
        sizes = {"weight_bits": bits, "in_features": features}
        with dispatch.use_backend("reference"):
            values = ops.linear(*arguments, **sizes)
        width = 8 if table else bits
        scale, zero, tables = quantizers_of(draw, values, groups=groups, bits=width, table=table)
        output = {"out_scale": scale, "out_zero": zero, "out_table": tables, "out_bits": width}
        codes = assert_equal_up_to_ties(
            ops.linear_quantize, *arguments, uniform=not table, **sizes, **output
        )
        assert codes.shape == ((rows, channels) if groups == 1 else (3, rows, channels // 3))
        assert len(codes.unique()) > 2
        for group, part in enumerate(values.chunk(groups, dim=-1)):
            plain = ops.quantize_uniform(part, scale[group], zero[group], bits=width)
            if table:
                plain = tables[group][plain.long()]
            assert torch.equal(codes if groups == 1 else codes[group], plain)


@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("rows", [1, 77])
def test_linear_quantize_after_gelu(rows, table, draw, assert_equal_up_to_ties):
    arguments = linear_arguments(draw, rows, 97, 70, bits=4, per_token=False)
    sizes = {"weight_bits": 4, "in_features": 97}
    arguments = (arguments[0], arguments[1] / 999, *arguments[2:], draw.floats(70))
    with dispatch.use_backend("reference"):
        values = ops.linear(*arguments, **sizes)
    for bits in (4, 8):
        scale, zero, tables = quantizers_of(draw, values, bits=8 if table else bits, table=table)
        codes = assert_equal_up_to_ties(
            ops.linear_quantize,
            *arguments,
            uniform=not table,
            activation="gelu",
            out_scale=scale,
            out_zero=zero,
            out_table=None if tables is None else tables[0],
            out_bits=bits,
            **sizes,
        )
        assert len(codes.unique()) > 4


def test_linear_quantize_of_tokens_with_leading_dimensions(draw, assert_equal_up_to_ties):
    _, x_scale, x_zero, *weight = linear_arguments(draw, 1, 33, 66, bits=3, per_token=False)
    output = {"out_scale": draw.scales(3) * 99, "out_zero": draw.zeros(3), "out_bits": 8}
    codes = assert_equal_up_to_ties(
        ops.linear_quantize,
        draw.codes(2, 5, 33),
        x_scale,
        x_zero,
        *weight,
        weight_bits=3,
        in_features=33,
        **output,
    )
    assert codes.shape == (3, 2, 5, 22)


@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("whole", [False, True], ids=["bare", "affine"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2, 7, 96), (1, 5, 1000), (3, 2500), (1, 4096)])
def test_layer_norm_quantize(shape, whole, table, draw, assert_equal_up_to_ties):
    width = shape[-1]
    x = draw.floats(*shape) * 3 + 50
    parameters = (draw.floats(width), draw.floats(width)) if whole else (None, None)
    zero = torch.tensor([100], dtype=torch.int32, device=draw.device)
    codes = assert_equal_up_to_ties(
        ops.layer_norm_quantize,
        x,
        *parameters,
        uniform=not table,
        eps=1e-6,
        scale=draw.scales(1) / 9 + 0.02,
        zero_point=zero,
        table=some_levels(draw) if table else None,
        bits=8,
    )
    assert width == 1 or len(codes.unique()) > 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_layer_norm_quantize_at_every_width(bits, draw, assert_equal_up_to_ties):
    quantizer = {"scale": draw.scales(1), "zero_point": draw.zeros(1, bits=bits), "bits": bits}
    x = draw.floats(9, 33)
    x[0] = 7.0  # no variance at all
    x[1] *= 1e-4
    x[2] *= 1e15
    codes = assert_equal_up_to_ties(ops.layer_norm_quantize, x, None, None, eps=1e-5, **quantizer)
    assert int(codes.max()) < 2**bits


PROBABILITIES = {
    "uniform 2": {"p_scale": 1 / 3, "p_zero": 0, "p_bits": 2},
    "uniform 8": {"p_scale": 1 / 255, "p_zero": 0, "p_bits": 8},
    "shifted": {"p_scale": 1 / 99, "p_zero": 5, "p_bits": 7},
    "table": {"p_scale": 1 / 255, "p_zero": 3, "p_bits": 8, "p_table": True},
    "log2 2": {"p_scale": 1.0, "p_zero": None, "p_bits": 2},
    "log2 4": {"p_scale": 0.9, "p_zero": None, "p_bits": 4},
    "log2 8": {"p_scale": 0.7, "p_zero": None, "p_bits": 8},
}


def attention_arguments(draw, size, kind, *, windows=0, table=False):
    """Queries and keys whose scores spread by a few units, in any of the quantizers."""
    _, tokens, heads, width = size

    def one(value, dtype=torch.float32):
        return torch.tensor([value], dtype=dtype, device=draw.device)

    probabilities = dict(PROBABILITIES[kind])
    probabilities["p_scale"] = one(probabilities["p_scale"])
    if probabilities["p_zero"] is not None:
        probabilities["p_zero"] = one(probabilities["p_zero"], torch.int32)
    if probabilities.pop("p_table", False):
        probabilities["p_table"] = some_levels(draw)
    scale = torch.tensor([0.03 / width**0.5, 0.01, 0.02], device=draw.device)
    zero = torch.tensor([120, 140, 100], dtype=torch.int32, device=draw.device)
    output = {
        "out_scale": one(0.015),
        "out_zero": one(110, torch.int32),
        "out_table": some_levels(draw) if table else None,
        "out_bits": 8,
    }
    added = draw.floats(windows, heads, tokens, tokens) if windows else None
    return (draw.codes(3, *size), scale, zero), {"added": added, **probabilities, **output}


@pytest.mark.parametrize("windows", [0, 1, 2])
@pytest.mark.parametrize("kind", PROBABILITIES)
def test_attention(kind, windows, draw, assert_equal_up_to_ties):
    for size, table in (((2, 77, 3, 33), False), ((4, 1, 1, 5), True), ((2, 49, 2, 32), True)):
        arguments, options = attention_arguments(draw, size, kind, windows=windows, table=table)
        codes = assert_equal_up_to_ties(ops.attention, *arguments, uniform=not table, **options)
        assert len(codes.unique()) > 4
        assert codes.shape == (*size[:2], size[2] * size[3])


@pytest.mark.parametrize("kind", ["uniform 8", "table", "log2 4"])
def test_attention_on_the_tokens_of_a_picture(kind, draw, assert_equal_up_to_ties):
    arguments, options = attention_arguments(draw, (1, 197, 2, 64), kind)
    assert_equal_up_to_ties(ops.attention, *arguments, **options)


@pytest.mark.parametrize("windows", [0, 2])
@pytest.mark.parametrize("kind", ["uniform 8", "table", "log2 4"])
def test_attention_in_many_heads(kind, windows, draw, assert_equal_up_to_ties, monkeypatch):
    kernels = pytest.importorskip("qtool.engine.kernels.attention")
    monkeypatch.setattr(kernels, "FILLED_MATRICES", 2)
    arguments, options = attention_arguments(draw, (2, 100, 2, 16), kind, windows=windows)
    assert_equal_up_to_ties(ops.attention, *arguments, uniform=kind != "table", **options)


@pytest.mark.parametrize("kind", ["uniform 8", "table", "log2 4", "log2 8"])
def test_attention_over_more_tokens_than_fit_at_once(kind, draw, assert_equal_up_to_ties):
    arguments, options = attention_arguments(draw, (1, 300, 1, 32), kind)
    assert_equal_up_to_ties(ops.attention, *arguments, uniform=kind != "table", **options)


@pytest.mark.parametrize("kind", ["uniform 8", "log2 4"])
def test_attention_with_the_widest_heads(kind, draw, assert_equal_up_to_ties):
    arguments, options = attention_arguments(draw, (1, 40, 1, contracts.MAX_HEAD_WIDTH), kind)
    assert_equal_up_to_ties(ops.attention, *arguments, **options)


@pytest.mark.parametrize("kind", ["uniform 8", "log2 4"])
def test_attention_leaves_out_keys_that_a_map_hides(kind, draw, assert_equal_up_to_ties):
    """Whole blocks of keys may be hidden, the first ones too, by minus infinity."""
    arguments, options = attention_arguments(draw, (2, 77, 2, 16), kind, windows=2)
    options["added"][0, :, :, :40] = -float("inf")
    options["added"][1, :, :, 70:] = -float("inf")
    expected = assert_equal_up_to_ties(ops.attention, *arguments, **options)
    arguments[0][2, 0, :40], arguments[0][2, 1, 70:] = 255, 255
    same = assert_equal_up_to_ties(ops.attention, *arguments, **options)
    assert torch.equal(same, expected)


def test_attention_to_one_key_returns_its_value(device, assert_equal_everywhere):
    """Scores far apart give all of the weight to one key each."""
    tokens, width = 40, 8
    qkv = torch.full((3, 1, tokens, 1, width), 128, dtype=torch.uint8, device=device)
    added = torch.full((1, 1, tokens, tokens), -100.0, device=device)
    order = torch.arange(tokens, device=device).flip(0)
    added[0, 0, torch.arange(tokens), order] = 100.0
    qkv[2, 0, :, 0] = torch.arange(tokens * width, device=device).view(tokens, width) % 251
    one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    parameters = (one.repeat(3), zero.repeat(3), one / 255)
    codes = assert_equal_everywhere(
        ops.attention,
        qkv,
        *parameters[:2],
        added=added,
        p_scale=parameters[2],
        p_zero=zero,
        p_bits=8,
        out_scale=one,
        out_zero=zero,
        out_bits=8,
    )
    assert torch.equal(codes[0], qkv[2, 0, order, 0])


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


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_conv2d(form, biased, draw, assert_equal_everywhere):
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
    bias = draw.floats(channels) if biased else None
    assert_equal_everywhere(ops.conv2d, *arguments, bias, weight_bits=bits, **geometry)


@pytest.mark.parametrize(
    ("activation", "table"),
    [("none", False), ("relu", True), ("relu6", False)],
    ids=["none", "relu table", "relu6"],
)
@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_conv2d_quantize(form, table, activation, draw, assert_equal_everywhere):
    shape, channels, geometry = CONVOLUTIONS[form]
    x, x_scale, *weight = convolution_arguments(
        draw,
        shape,
        channels,
        bits=4,
        groups=geometry.get("groups", 1),
        kernel=geometry["kernel"],
    )
    bias = draw.floats(channels)
    with dispatch.use_backend("reference"):
        reach = ops.conv2d(x, x_scale, *weight, weight_bits=4, **geometry).abs().max()
        arguments = (x, x_scale * (9 / reach), *weight, bias)  # some values lie beyond 6
        values = ops.conv2d(*arguments, weight_bits=4, **geometry)
    values = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[activation](values)
    scale, zero, tables = quantizers_of(draw, values, bits=8 if table else 5, table=table)
    width = 8 if table else 5
    codes = assert_equal_everywhere(
        ops.conv2d_quantize,
        *arguments,
        weight_bits=4,
        **geometry,
        activation=activation,
        out_scale=scale,
        out_zero=zero,
        out_table=None if tables is None else tables[0],
        out_bits=width,
    )
    plain = ops.quantize_uniform(values, scale, zero, bits=width)
    assert torch.equal(codes, tables[0][plain.long()] if table else plain)
    assert len(codes.unique()) > 2


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
