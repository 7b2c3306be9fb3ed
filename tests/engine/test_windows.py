"""Convolutions on vectors: the same bits as exact sums, for any geometry, layout and threads."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.engine import dispatch, ops
from qtool.engine.cpu import exact, native, windows

pytestmark = pytest.mark.skipif(not native.has_vectors(), reason="no compiled passes for AVX2 here")


@pytest.fixture(autouse=True)
def no_int8_units(monkeypatch):
    monkeypatch.setattr(exact, "has_int8_units", lambda: False)


def drawn(shape, weight_shape, *, bits, seed, bias=True, zero=None):
    """Arguments of a convolution by name, without its geometry."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high, *size):
        return torch.randint(low, high + 1, size, generator=generator)

    channels, terms = weight_shape[0], weight_shape[1] * weight_shape[2] * weight_shape[3]
    codes = whole(0, 2**bits - 1, channels, terms).to(torch.uint8)
    # Levels fit a byte: with 8 bits they have one middle alone.
    zeros = whole(2 ** (bits - 1) - (bits < 8), 2 ** (bits - 1), channels).to(torch.int32)
    return {
        "x": whole(0, 255, *shape).to(torch.uint8),
        "x_scale": torch.rand(1, generator=generator) + 0.01,
        "x_zero": whole(0, 255, 1).to(torch.int32) if zero is None else torch.tensor([zero]).int(),
        "weight": ops.pack_codes(codes, bits=bits),
        "weight_scale": torch.rand(channels, generator=generator) + 0.01,
        "weight_zero": zeros,
        "bias": torch.randn(channels, generator=generator) if bias else None,
        "weight_bits": bits,
        "kernel": weight_shape[2:],
    }


def expected(arguments, geometry):
    """The sums in double precision, then scale and bias as floats."""
    kernel, bits = arguments["kernel"], arguments["weight_bits"]
    depth = arguments["x"].shape[1] // geometry["groups"]
    terms = depth * kernel[0] * kernel[1]
    levels = ops.unpack_codes(arguments["weight"], bits=bits, in_features=terms).double()
    levels = (levels - arguments["weight_zero"][:, None]).view(-1, depth, *kernel)
    codes = arguments["x"].double() - arguments["x_zero"].double()
    sums = F.conv2d(codes, levels, None, **geometry)
    scale = arguments["x_scale"] * arguments["weight_scale"]
    y = sums.float() * scale.view(-1, 1, 1)
    return y if arguments["bias"] is None else y + arguments["bias"].view(-1, 1, 1)


def ran(arguments, geometry):
    """The operation on the CPU, and whether it took this way."""
    shared = {name: value for name, value in arguments.items() if name != "kernel"}
    direct = windows.convolve(**shared, kernel=arguments["kernel"], **geometry)
    with dispatch.use_backend("cpu"):
        y = ops.conv2d(**arguments, **geometry)
    assert direct is None or torch.equal(direct, y)
    return y, direct is not None


def quantized(arguments, geometry, values, bits, table, activation):
    """The operation that ends in codes on the CPU, and these codes in single steps."""
    scale = (values.std() / 2 ** (bits - 2) + 1e-6).reshape(1)
    zero = torch.tensor([2 ** (bits - 2)]).int()
    output = {"out_scale": scale, "out_zero": zero, "out_table": table, "out_bits": bits}
    with dispatch.use_backend("cpu"):
        codes = ops.conv2d_quantize(**arguments, **geometry, activation=activation, **output)
    values = {"none": lambda y: y, "relu": F.relu, "relu6": F.relu6}[activation](values)
    expected = (torch.round(values / scale) + zero).clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, expected if table is None else table[expected.long()]


pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=pair,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=pair,
    channels=st.integers(1, 37),
    outputs=st.integers(1, 37),
    depthwise=st.booleans(),
    bits=st.sampled_from([2, 4, 6, 8]),
    last=st.booleans(),
    bias=st.booleans(),
    zero=st.sampled_from([0, 7, 255]),
    threads=st.integers(1, 4),
    activation=st.sampled_from(["none", "relu", "relu6"]),
    ending=st.sampled_from(["2", "8", "table"]),
    seed=st.integers(0, 999),
)
def test_any_convolution_has_the_bits_of_exact_sums(
    size, kernel, stride, padding, dilation, channels, outputs, depthwise, bits, last, bias, zero,
    threads, activation, ending, seed,
):  # fmt: skip
    padding = tuple(map(min, padding, kernel))
    reach = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(max(own, least) for own, least in zip(size, reach, strict=True))
    groups = channels if depthwise else 1
    weight = (channels, 1, *kernel) if depthwise else (outputs, channels, *kernel)
    arguments = drawn((2, channels, *size), weight, bits=bits, seed=seed, bias=bias, zero=zero)
    if last:
        arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    torch.set_num_threads(threads)
    y, taken = ran(arguments, geometry)
    assert taken
    assert torch.equal(y, expected(arguments, geometry))
    table = None
    if ending == "table":
        table = (torch.arange(256) // 9).to(torch.uint8)
    codes, wanted = quantized(
        arguments, geometry, y, 8 if table is not None else int(ending), table, activation
    )
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("groups", [1, 96])
def test_large_codes_and_levels_do_not_overflow(groups):
    for level_bits, low in ((8, 0), (8, 255), (4, 15)):
        arguments = drawn((1, 96, 12, 12), (96, 96 // groups, 3, 3), bits=level_bits, seed=0)
        arguments["x"].fill_(255)
        arguments["x_zero"].fill_(0)
        terms = 9 * 96 // groups
        codes = torch.full((96, terms), low, dtype=torch.uint8)
        arguments["weight"] = ops.pack_codes(codes, bits=level_bits)
        arguments["weight_zero"].fill_(128 if level_bits == 8 else 8)
        geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups}
        y, taken = ran(arguments, geometry)
        assert taken
        assert torch.equal(y, expected(arguments, geometry))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_places_of_several_pictures_pass_in_parts(threads):
    arguments = drawn((3, 160, 17, 19), (48, 160, 3, 3), bits=4, seed=1)
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    torch.set_num_threads(threads)
    y, taken = ran(arguments, geometry)
    assert taken
    assert torch.equal(y, expected(arguments, geometry))


@pytest.mark.parametrize(
    ("channels", "weight", "groups"),
    [
        (8, (8, 2, 3, 3), 4),
        (8, (16, 1, 3, 3), 8),
        (4, (4, 1, 11, 12), 4),
        (1024, (2, 1024, 3, 3), 1),
    ],
)
def test_others_take_another_way_to_the_same_bits(channels, weight, groups):
    arguments = drawn((2, channels, 13, 13), weight, bits=4, seed=2)
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": groups}
    for last in (False, True):
        if last:
            arguments["x"] = arguments["x"].contiguous(memory_format=torch.channels_last)
        y, taken = ran(arguments, geometry)
        assert not taken
        assert torch.equal(y, expected(arguments, geometry))


@pytest.mark.parametrize("groups", [1, 5])
def test_levels_beyond_a_byte_are_exact_too(groups):
    arguments = drawn((1, 5, 6, 6), (5, 5 // groups, 3, 3), bits=8, seed=3)
    arguments["weight_zero"].fill_(0)
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups}
    y, taken = ran(arguments, geometry)
    assert taken == (groups == 5)
    assert torch.equal(y, expected(arguments, geometry))
