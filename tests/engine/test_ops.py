"""The operations as torch sees them: schemas, shape propagation, torch.compile, views and sizes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.engine import dispatch, ops
from qtool.engine.contracts import OPERATIONS

COMPLETE = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def arguments(op, draw):
    """Arguments of `torch.ops.qtool.<op>`, with odd sizes and per-token parameters."""
    one, zero = draw.scales(1), draw.zeros(1, bits=4)
    packed = ops.pack_codes(draw.codes(5, 11, bits=3), bits=3)
    return {
        "quantize_uniform": (draw.floats(2, 7, 9), draw.scales(2, 7, 1), draw.zeros(2, 7, 1), 5),
        "quantize_table": (
            draw.floats(2, 7, 9),
            draw.scales(2, 7, 1),
            draw.zeros(2, 7, 1),
            draw.codes(256),
        ),
        "quantize_log2": (draw.floats(3, 9).abs(), one, 4),
        "pack_codes": (draw.codes(5, 11, bits=3), 3),
        "unpack_codes": (packed, 3, 11),
        "linear": (
            draw.codes(2, 7, 11),
            draw.scales(2, 7, 1),
            draw.zeros(2, 7, 1),
            packed,
            draw.scales(5),
            draw.zeros(5, bits=3),
            draw.floats(5),
            3,
            11,
        ),
        "layer_norm_quantize": (
            draw.floats(2, 7, 9),
            draw.floats(9),
            draw.floats(9),
            1e-5,
            draw.scales(1) / 9,
            draw.zeros(1),
            draw.codes(256).sort().values,
            8,
        ),
        "linear_quantize": (
            draw.codes(2, 7, 11),
            draw.scales(2, 7, 1),
            draw.zeros(2, 7, 1),
            ops.pack_codes(draw.codes(6, 11, bits=3), bits=3),
            draw.scales(6),
            draw.zeros(6, bits=3),
            draw.floats(6),
            3,
            11,
            "none",
            draw.scales(3),
            draw.zeros(3),
            draw.codes(3, 256).sort().values,
            8,
        ),
        "attention": (
            draw.codes(3, 4, 5, 2, 7),
            draw.scales(3) / 99,
            draw.zeros(3),
            draw.floats(2, 2, 5, 5),
            one / 9,
            zero,
            draw.codes(256).sort().values,
            8,
            draw.scales(1) / 99,
            draw.zeros(1),
            draw.codes(256).sort().values,
            8,
        ),
        "conv2d": (
            draw.codes(2, 6, 7, 5),
            one,
            zero,
            ops.pack_codes(draw.codes(4, 18, bits=3), bits=3),
            draw.scales(4),
            draw.zeros(4, bits=3),
            draw.floats(4),
            3,
            [3, 2],
            [2, 1],
            [1, 0],
            [1, 2],
            2,
        ),
        "conv2d_quantize": (
            draw.codes(2, 6, 7, 5),
            one,
            zero,
            ops.pack_codes(draw.codes(6, 9, bits=3), bits=3),
            draw.scales(6),
            draw.zeros(6, bits=3),
            draw.floats(6),
            3,
            [3, 3],
            [2, 1],
            [1, 0],
            [1, 1],
            6,
            "relu6",
            draw.scales(1),
            draw.zeros(1),
            draw.codes(256).sort().values,
            8,
        ),
        "linear_nested": (
            draw.codes(2, 7, 11),
            draw.scales(2, 7, 1),
            draw.zeros(2, 7, 1),
            draw.codes(5, 11).view(torch.int8),
            draw.scales(5),
            draw.floats(5),
            3,
        ),
        "matmul": (draw.codes(2, 3, 5, 7), one, zero, draw.codes(2, 3, 7, 4), one, zero),
        "matmul_log2": (draw.codes(2, 5, 7, bits=4), one, draw.codes(2, 7, 3), one, zero, 4),
    }[op]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_torch_accepts_the_registration(op, backend, draw):
    with dispatch.use_backend(backend):
        overload = getattr(torch.ops.qtool, op).default
        outcome = torch.library.opcheck(overload, arguments(op, draw), test_utils=COMPLETE)
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPERATIONS)
def test_functions_follow_the_schema(op):
    schema = getattr(torch.ops.qtool, op).default._schema
    parameters = inspect.signature(getattr(ops, op)).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)
    assert not any(argument.alias_info for argument in schema.arguments)


@pytest.mark.parametrize("op", OPERATIONS)
def test_shapes_are_known_without_data(op, draw):
    real = arguments(op, draw)
    call = getattr(torch.ops.qtool, op)
    meta = [item.to("meta") if isinstance(item, torch.Tensor) else item for item in real]
    result, expected = call(*meta), call(*real)
    assert result.is_meta
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


def test_a_compiled_graph_holds_the_operations_whole(draw):
    x, scale, zero = draw.floats(2, 7, 11), draw.scales(1), draw.zeros(1)
    packed = ops.pack_codes(draw.codes(5, 11, bits=3), bits=3)
    weight = (packed, draw.scales(5), draw.zeros(5, bits=3), draw.floats(5))

    def layer(x):
        codes = ops.quantize_uniform(x, scale, zero, bits=8)
        return ops.linear(codes, scale, zero, *weight, weight_bits=3, in_features=11)

    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with dispatch.trace() as decisions:
        assert torch.equal(compiled(x), expected)
    assert [decision.op for decision in decisions] == ["quantize_uniform", "linear"]


def test_inputs_that_require_gradients_are_welcome(draw):
    x = draw.floats(3, 5).requires_grad_()
    codes = ops.quantize_uniform(x, draw.scales(3, 1), draw.zeros(3, 1), bits=8)
    assert not codes.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_do_not_depend_on_the_default_dtype(dtype, draw, assert_equal_everywhere):
    calls = [(op, arguments(op, draw)) for op in OPERATIONS]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for op, values in calls:
            if op != "matmul_log2":
                assert_equal_everywhere(getattr(torch.ops.qtool, op), *values)
    finally:
        torch.set_default_dtype(before)


def transposed(tensor):
    """The same values with another memory layout."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def strided(tensor):
    """The same values as every second element of a larger tensor."""
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


@pytest.mark.parametrize("view", [transposed, strided])
@pytest.mark.parametrize("op", OPERATIONS)
def test_views_give_what_copies_give(op, view, draw, outputs):
    values = arguments(op, draw)
    views = [view(item) if isinstance(item, torch.Tensor) else item for item in values]
    call = getattr(torch.ops.qtool, op)
    expected, of_copies = outputs(call, *values)
    same, of_views = outputs(call, *views)
    assert torch.equal(same, expected)
    for backend, result in of_views.items():
        assert result.is_contiguous()
        if op == "matmul_log2":  # sums in float32, in an order that may depend on the layout
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-3)
        else:
            assert torch.equal(result, of_copies[backend])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 3)])
def test_quantizing_nothing_gives_nothing(shape, draw, assert_equal_everywhere):
    x, scale, zero = draw.floats(*shape), draw.scales(1), draw.zeros(1)
    codes = assert_equal_everywhere(ops.quantize_uniform, x, scale, zero, bits=4)
    assert codes.shape == x.shape
    per_token = (draw.scales(*shape[:-1], 1), draw.zeros(*shape[:-1], 1))
    assert assert_equal_everywhere(ops.quantize_uniform, x, *per_token, bits=4).shape == x.shape
    assert assert_equal_everywhere(ops.quantize_log2, x, scale, bits=4).shape == x.shape


@pytest.mark.parametrize(
    ("rows", "terms", "channels"), [(0, 8, 4), (3, 0, 4), (3, 8, 0), (0, 0, 0)]
)
def test_products_of_nothing_are_zero_plus_bias(
    rows, terms, channels, draw, assert_equal_everywhere
):
    one, zero = draw.scales(1), draw.zeros(1)
    codes = draw.codes(channels, terms, bits=3)
    packed = assert_equal_everywhere(ops.pack_codes, codes, bits=3)
    sizes = {"bits": 3, "in_features": terms}
    assert torch.equal(assert_equal_everywhere(ops.unpack_codes, packed, **sizes), codes)
    bias = draw.floats(channels)
    rest = (packed, draw.scales(channels), draw.zeros(channels, bits=3), bias)
    x, widths = draw.codes(rows, terms), {"weight_bits": 3, "in_features": terms}
    y = assert_equal_everywhere(ops.linear, x, one, zero, *rest, **widths)
    assert y.shape == (rows, channels)
    if terms == 0:
        assert torch.equal(y, bias.expand(rows, channels))
    for groups in (1, 2):
        output = {"out_scale": draw.scales(groups), "out_zero": draw.zeros(groups), "out_bits": 8}
        y = assert_equal_everywhere(ops.linear_quantize, x, one, zero, *rest, **widths, **output)
        assert y.shape == ((rows, channels) if groups == 1 else (2, rows, channels // 2))
    pair = (draw.codes(2, rows, terms), draw.codes(2, terms, channels))
    out = assert_equal_everywhere(ops.matmul, pair[0], one, zero, pair[1], one, zero)
    assert out.shape == (2, rows, channels)
    out = assert_equal_everywhere(ops.matmul_log2, pair[0], one, pair[1], one, zero, bits=8)
    assert out.shape == (2, rows, channels)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 3)])
def test_normalising_nothing_gives_nothing(shape, draw, assert_equal_everywhere):
    quantizer = {"scale": draw.scales(1), "zero_point": draw.zeros(1), "bits": 4}
    x = draw.floats(*shape)
    codes = assert_equal_everywhere(ops.layer_norm_quantize, x, None, None, eps=1e-6, **quantizer)
    assert codes.shape == shape


@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
@pytest.mark.parametrize("size", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (2, 5, 2, 0)])
def test_attention_to_nothing_is_nothing(size, added, draw, assert_equal_everywhere):
    batch, tokens, heads, width = size
    quantizers = {"p_scale": draw.scales(1), "p_zero": draw.zeros(1), "p_bits": 8}
    quantizers |= {"out_scale": draw.scales(1), "out_zero": draw.zeros(1), "out_bits": 8}
    maps = draw.floats(2, heads, tokens, tokens) if added else None
    parameters = (draw.scales(3), draw.zeros(3))
    qkv = draw.codes(3, *size)
    out = assert_equal_everywhere(ops.attention, qkv, *parameters, added=maps, **quantizers)
    assert out.shape == (batch, tokens, heads * width)


def test_a_single_vector_is_a_row(draw, assert_equal_everywhere):
    x, scale, zero = draw.floats(11), draw.scales(1), draw.zeros(1)
    codes = assert_equal_everywhere(ops.quantize_uniform, x, scale, zero, bits=8)
    weight = (draw.codes(5, 11), draw.scales(5), draw.zeros(5))
    sizes = {"weight_bits": 8, "in_features": 11}
    y = assert_equal_everywhere(ops.linear, codes, scale, zero, *weight, **sizes)
    assert y.shape == (5,)


class Seen(TorchDispatchMode):
    """Takes down which operations torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_call_goes_straight_unless_someone_looks_on(op, draw, monkeypatch):
    values = arguments(op, draw)
    call = getattr(torch.ops.qtool, op)
    expected = call(*values)
    with Seen() as seen:
        assert torch.equal(ops._run(op, *values), expected)
    assert [name for name in seen.names if name == f"qtool.{op}.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ops._run(op, *values)
    assert f"qtool::{op}" in {event.key for event in profiler.key_averages()}
    monkeypatch.setattr(torch.ops, "qtool", None)
    with torch.inference_mode():
        assert torch.equal(ops._run(op, *values), expected)
    if values[0].is_floating_point():
        values = (values[0].clone().requires_grad_(True), *values[1:])
    found = ops._run(op, *values)
    assert torch.equal(found, expected)
    assert not found.requires_grad
