"""What the CPU path promises beyond equality with the reference."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qtool.engine import dispatch, ops, resident
from qtool.engine.cpu import attention, build_native, exact, linear, native
from qtool.engine.cpu import codes as quantizers
from qtool.errors import BackendError


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.mark.usefixtures("exact_int8_products")
@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_has_the_bits_of_a_float_simulation(bits, per_token, draw):
    tokens, features, channels = 197, 192, 51
    x, q = draw.codes(tokens, features, bits=bits), draw.codes(channels, features, bits=bits)
    size = (tokens, 1) if per_token else (1,)
    x_scale, x_zero = draw.scales(*size), draw.zeros(*size, bits=bits)
    scale, zero, bias = (
        draw.scales(channels),
        draw.zeros(channels, bits=bits),
        draw.floats(channels),
    )
    simulated = ((x - x_zero).float() @ (q - zero[:, None]).float().T) * (x_scale * scale) + bias
    packed = ops.pack_codes(q, bits=bits)
    sizes = {"weight_bits": bits, "in_features": features}
    with dispatch.use_backend("cpu"):
        y = ops.linear(x, x_scale, x_zero, packed, scale, zero, bias, **sizes)
    assert torch.equal(y, simulated)


@pytest.mark.usefixtures("exact_int8_products")
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_nested_codes_need_no_tiles(monkeypatch, bits, draw):
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(native, "has_vectors", lambda: False)
    x, weight = draw.codes(37, 192), (draw.codes(45, 192).int() - 128).to(torch.int8)
    arguments = (draw.scales(1), draw.zeros(1), weight, draw.scales(45), draw.floats(45))
    layer = linear.nested_layer(*arguments, bits)
    assert (layer is None) == (bits == 8 or not exact.has_int8_units())
    results = []
    for backend in ("reference", "cpu"):
        with dispatch.use_backend(backend):
            results.append(ops.linear_nested(x, *arguments, bits=bits))
    assert torch.equal(*results)


@pytest.mark.usefixtures("exact_int8_products")
def test_rows_are_taken_in_blocks(draw):
    rows = linear.BLOCK_ROWS + 3
    x, weight = draw.codes(rows, 5), draw.codes(3, 5)
    parameters = (draw.scales(rows, 1), draw.zeros(rows, 1), weight, draw.scales(3), draw.zeros(3))
    results, codes = [], []
    values = draw.floats(rows, 300)
    for backend in ("reference", "cpu"):
        with dispatch.use_backend(backend):
            results.append(ops.linear(x, *parameters, weight_bits=8, in_features=5))
            codes.append(ops.quantize_uniform(values, *parameters[:2], bits=8))
            codes.append(ops.quantize_log2(values.abs(), draw.scales(1) * 0 + 0.1, bits=8))
    assert torch.equal(*results)
    assert torch.equal(codes[0], codes[2])
    assert torch.equal(codes[1], codes[3])


def test_a_cpu_with_saturating_products_is_left_to_the_reference(monkeypatch, draw):
    monkeypatch.setattr(exact, "int8_product_is_exact", lambda: False)
    a, b, one, zero = draw.codes(3, 5), draw.codes(5, 2), draw.scales(1), draw.zeros(1)
    with dispatch.trace() as decisions:
        ops.matmul(a, one, zero, b, one, zero)
        ops.matmul_log2(a, one, b, one, zero, bits=8)
    assert decisions == [
        ("matmul", "reference", "this CPU's int8 products saturate (no VNNI)"),
        ("matmul_log2", "cpu", "tensors on cpu"),
    ]
    with dispatch.use_backend("cpu"), pytest.raises(BackendError, match="saturate"):
        ops.matmul(a, one, zero, b, one, zero)


@pytest.mark.parametrize("terms", [0, 1, 514, 515, 1100])
def test_products_without_int8_units_are_exact(monkeypatch, terms):
    monkeypatch.setattr(exact, "has_int8_units", lambda: False)
    codes = torch.full((5, terms), 255, dtype=torch.uint8)
    weight = torch.full((terms, 3), -128, dtype=torch.int8)
    codes[1:3, ::3], weight[::2, 1:] = 254, 127
    assert torch.equal(exact.product(codes, weight).long(), codes.long() @ weight.long())


needs_unsigned_codes = pytest.mark.skipif(
    not exact.takes_unsigned_codes(), reason="this torch multiplies int8 by int8 only"
)


def test_a_torch_without_unsigned_products_has_no_int8_units(monkeypatch):
    def refuse(left, right):
        raise RuntimeError(f"expected int8, not {left.dtype}")

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", refuse)
    exact.has_int8_units.cache_clear()
    try:
        assert not exact.has_int8_units()
    finally:
        exact.has_int8_units.cache_clear()


@needs_unsigned_codes
@pytest.mark.usefixtures("exact_int8_products")
def test_the_self_check_notices_saturation(monkeypatch):
    right = torch._int_mm
    monkeypatch.setattr(exact, "has_int8_units", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: right(x, w).clamp(max=32767 * 64))
    exact.int8_product_is_exact.cache_clear()
    assert not exact.int8_product_is_exact()
    exact.int8_product_is_exact.cache_clear()


@pytest.mark.parametrize(
    "units",
    [
        pytest.param(True, id="int8 units", marks=needs_unsigned_codes),
        pytest.param(False, id="float32"),
    ],
)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_nested_layers_are_exact_with_and_without_int8_units(monkeypatch, draw, units, bits):
    rows, terms = linear.BLOCK_ROWS + 3, 1100
    x, x_scale, x_zero = draw.codes(rows, terms), draw.scales(rows, 1), draw.zeros(rows, 1)
    weight, scale = draw.codes(3, terms).view(torch.int8), draw.scales(3)
    weight[0], weight[1] = -128, 127
    with dispatch.use_backend("reference"):
        expected = ops.linear_nested(x, x_scale, x_zero, weight, scale, bits=bits)
    monkeypatch.setattr(exact, "has_int8_units", lambda: units)
    y = linear.linear_nested(x, x_scale, x_zero, weight, scale, None, bits)
    assert torch.equal(y, expected)


def layers_to_codes(draw):
    """Calls of the operations that end in codes, every kind once, by name."""
    one, zero = torch.tensor([0.03]), torch.tensor([7], dtype=torch.int32)
    table = draw.codes(256).sort().values
    values = {"scale": one, "zero_point": zero + 90}
    layer = (
        draw.codes(70, 97),
        one,
        zero,
        ops.pack_codes(draw.codes(66, 97, bits=5), bits=5),
        draw.scales(66),
        draw.zeros(66, bits=5),
        draw.floats(66),
    )
    sizes = {"weight_bits": 5, "in_features": 97}
    deep = (  # as panels take it
        *(draw.codes(70, 128), one, zero),
        ops.pack_codes(draw.codes(96, 128, bits=4), bits=4),
        *(draw.scales(96), draw.zeros(96, bits=4), draw.floats(96)),
    )
    deep_sizes = {"weight_bits": 4, "in_features": 128}
    groups = {"out_scale": draw.scales(3) + 1, "out_zero": draw.zeros(3), "out_bits": 8}
    tables = draw.codes(3, 256).sort().values
    heads = (draw.codes(3, 4, 19, 2, 24), torch.tensor([0.01, 0.01, 0.02]), draw.zeros(3))
    wide_heads = (draw.codes(3, 4, 19, 2, 32), *heads[1:])
    output = {"out_scale": one, "out_zero": zero + 100, "out_bits": 8}
    maps = draw.floats(2, 2, 19, 19)
    return {
        "layer_norm": (
            ops.layer_norm_quantize,
            (draw.floats(9, 50), draw.floats(50), None),
            {"eps": 1e-6, "bits": 6, **values},
        ),
        "layer_norm table": (
            ops.layer_norm_quantize,
            (draw.floats(9, 50), None, None),
            {"eps": 1e-6, "bits": 8, "table": table, **values},
        ),
        "linear": (ops.linear_quantize, layer, {**sizes, **groups}),
        "linear table": (ops.linear_quantize, layer, {**sizes, **groups, "out_table": tables}),
        "linear gelu": (
            ops.linear_quantize,
            layer,
            {**sizes, **output, "out_scale": one * 99, "activation": "gelu"},
        ),
        "deep": (ops.linear_quantize, deep, {**deep_sizes, **groups}),
        "deep gelu table": (
            ops.linear_quantize,
            deep,
            {
                **deep_sizes,
                **output,
                "out_scale": one * 99,
                "out_table": table,
                "activation": "gelu",
            },
        ),
        "attention": (
            ops.attention,
            heads,
            {"p_scale": one / 4, "p_zero": zero * 0, "p_bits": 7, **output},
        ),
        "attention table": (
            ops.attention,
            heads,
            {
                "added": maps,
                "p_scale": one / 8,
                "p_zero": zero,
                "p_table": table,
                "p_bits": 8,
                "out_table": table,
                **output,
            },
        ),
        "attention log2": (
            ops.attention,
            heads,
            {"added": maps, "p_scale": one * 30, "p_bits": 4, **output},
        ),
        "attention wide": (
            ops.attention,
            wide_heads,
            {"added": maps, "p_scale": one / 4, "p_zero": zero, "p_bits": 7, **output},
        ),
        "attention wide log2": (
            ops.attention,
            wide_heads,
            {"added": maps, "p_scale": one * 30, "p_bits": 4, **output},
        ),
    }


KINDS = (
    *("layer_norm", "layer_norm table", "linear", "linear table", "linear gelu"),
    *("deep", "deep gelu table", "attention", "attention table", "attention log2"),
    *("attention wide", "attention wide log2"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lacking",
    ["nothing", "memory", "int8 units", "panels", "compiled passes", "either"],
    ids=lambda word: word,
)
def test_layers_to_codes_are_exact_on_every_machine(monkeypatch, draw, lacking, kind):
    call, arguments, options = layers_to_codes(draw)[kind]
    with dispatch.use_backend("reference"):
        expected = call(*arguments, **options)
    if lacking in ("int8 units", "panels", "either"):
        monkeypatch.setattr(exact, "has_int8_units", lambda: False)
    if lacking == "memory":
        monkeypatch.setattr(linear, "NEAR", 9000)
        monkeypatch.setattr(attention, "BLOCK_SCORES", 1)
    if lacking == "panels":
        monkeypatch.setattr(native, "has_tiles", lambda: False)
        monkeypatch.setattr(native, "has_vectors", lambda: False)
    if lacking in ("compiled passes", "either"):
        monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(exact, "int8_product_is_exact", lambda: True)
    with dispatch.use_backend("cpu"):
        codes = call(*arguments, **options)
    assert codes.is_contiguous()
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 4


needs_compiled_passes = pytest.mark.skipif(
    native.library() is None, reason="the compiled passes were not built here"
)


def codes_in_passes(x, scale, zero, table, bits):
    """Codes by PyTorch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return quantizers.quantize(x, scale, zero, table, bits)


def quantizer(scale, zero):
    return torch.tensor([scale], dtype=torch.float32), torch.tensor([zero], dtype=torch.int32)


@needs_compiled_passes
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
def test_one_pass_gives_the_codes_of_several(bits, table, draw):
    levels = draw.codes(256) if table else None
    for length in range(1, 201):
        x = draw.floats(length) * 3
        scale, zero = draw.scales(1) / 2 ** (bits - 2), draw.zeros(1, bits=bits)
        codes = quantizers.quantize(x, scale, zero, levels, bits)
        assert torch.equal(codes, codes_in_passes(x, scale, zero, levels, bits)), length


FLOATS = st.floats(width=32, allow_nan=False)


@needs_compiled_passes
@given(
    st.lists(FLOATS, min_size=1, max_size=70),
    st.floats(2.0**-126, 2.0**126, width=32),
    st.integers(0, 255),
    st.integers(2, 8),
)
def test_one_pass_takes_any_float(values, scale, zero, bits):
    step, middle = quantizer(scale, zero % 2**bits)
    x = torch.tensor(values)
    x = torch.cat([x, x * step, torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, 0.0])])
    codes = quantizers.quantize(x, step, middle, None, bits)
    assert torch.equal(codes, codes_in_passes(x, step, middle, None, bits))
    with dispatch.use_backend("reference"):
        assert torch.equal(codes, ops.quantize_uniform(x, step, middle, bits=bits))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "pytorch"])
@given(
    st.lists(FLOATS, min_size=1, max_size=70),
    st.floats(2.0**-10, 2.0**10, width=32),
    st.integers(0, 255),
    st.integers(2, 8),
)
def test_codes_after_an_activation(activation, compiled, values, scale, zero, bits):
    step, middle = quantizer(scale, zero % 2**bits)
    x = torch.tensor([*values, 6.0, 5.9999995, 6.0000005, -0.0, 0.0, step * 0.5, -step * 0.5])
    expected = codes_in_passes(getattr(F, activation)(x), step, middle, None, bits)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "library", lambda: None)
        found = quantizers.quantize(x, step, middle, None, bits, activation)
    assert torch.equal(found, expected)


@needs_compiled_passes
@given(st.floats(2.0**-60, 2.0**60, width=32), st.integers(0, 255))
def test_one_pass_rounds_ties_as_the_division_does(scale, zero):
    """The floats next to the middle between two codes, where a product would go wrong."""
    step, middle = quantizer(scale, zero)
    ties = (torch.arange(-260, 261).double() + 0.5) * step.double()
    ties = ties.float()
    lower = torch.nextafter(ties, torch.tensor(-float("inf")))
    higher = torch.nextafter(ties, torch.tensor(float("inf")))
    x = torch.cat([ties, lower, higher])
    codes = quantizers.quantize(x, step, middle, None, 8)
    expected = (torch.round(x / step) + middle).clamp(0, 255).to(torch.uint8)
    assert torch.equal(codes, expected)
    assert torch.equal(codes_in_passes(x, step, middle, None, 8), expected)


@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "pytorch"])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 130])
def test_codes_are_written_into_parts_of_other_tensors(monkeypatch, draw, width, compiled, table):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the compiled passes were not built here")
    scale, zero, levels = draw.scales(1) / 9, draw.zeros(1), draw.codes(256) if table else None
    x = draw.floats(3, 5, 2, width + 3)[..., 1 : width + 1].transpose(1, 2)
    whole = torch.full((3, 5, 2, width + 2), 99, dtype=torch.uint8)
    out = whole[..., 1:-1].transpose(1, 2)
    quantizers.quantize_into(out, x, scale, zero, levels, 8)
    with dispatch.use_backend("reference"):
        expected = ops.quantize_uniform(x, scale, zero, bits=8)
    assert torch.equal(out, expected if levels is None else levels[expected.long()])
    assert (whole[..., 0] == 99).all()
    assert (whole[..., -1] == 99).all()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "pytorch"])
@pytest.mark.parametrize("width", [1, 31, 64, 100])
def test_levels_are_codes_less_their_zero_point(monkeypatch, draw, width, compiled):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    codes = draw.codes(3, 4, 5, width).transpose(0, 2)
    found = quantizers.levels(codes, draw.zeros(1) * 0 + 77)
    assert found.is_contiguous()
    assert torch.equal(found, codes.float() - 77)


def test_tables_of_pairs_give_what_single_lookups_give(draw):
    fine, tables = draw.codes(3, 2, 2 * quantizers.PAIRED), draw.codes(3, 256)
    expected = torch.stack([table[part.long()] for table, part in zip(tables, fine, strict=True)])
    assert torch.equal(quantizers.look_up(fine, tables), expected)
    assert torch.equal(quantizers.look_up(fine[0], tables[0]), expected[0])
    few = fine[:, :, :31].contiguous()
    assert torch.equal(quantizers.look_up(few, tables), expected[:, :, :31])


def test_without_a_library_there_are_no_compiled_passes(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "absent.so")
    native.library.cache_clear()
    try:
        assert native.library() is None
        (tmp_path / "absent.so").write_bytes(b"no library")
        native.library.cache_clear()
        assert native.library() is None
        scale, zero = quantizer(0.5, 3)
        assert quantizers.quantize(torch.ones(2), scale, zero, None, 4).tolist() == [5, 5]
    finally:
        native.library.cache_clear()


class Form:
    """Something made from tensors that a weak reference can watch."""

    def __init__(self, total):
        self.total = total


def counted():
    """What makes a form, and the list of the forms it made."""
    made = []

    def make(*tensors):
        made.append(sum(float(tensor.sum()) for tensor in tensors))
        return Form(made[-1])

    return make, made


def test_a_derived_form_is_made_once():
    make, made = counted()
    source, other = torch.ones(3), torch.ones(2)
    first = resident.derived(make, source, other)
    assert resident.derived(make, source, other) is first
    assert made == [5.0]


@pytest.mark.parametrize("write", ["source", "other", "replaced", "view"])
def test_a_derived_form_is_made_again_when_a_tensor_changed(write):
    make, made = counted()
    source, other = torch.ones(3), torch.ones(2)
    resident.derived(make, source, other)
    if write == "source":
        source[0] = 4.0
    elif write == "view":
        source.view(3, 1).add_(1.0)
    elif write == "other":
        other.add_(1.5)
    else:
        other = torch.full((2,), 2.5)
    again = resident.derived(make, source, other)
    assert made == [5.0, 8.0]
    assert again.total == 8.0
    assert resident.derived(make, source, other) is again


def test_two_makers_and_two_sources_do_not_mix():
    make, made = counted()
    other_make, other_made = counted()
    one, two = torch.ones(3), torch.ones(3)
    forms = {id(resident.derived(make, one)), id(resident.derived(make, two))}
    forms |= {id(resident.derived(other_make, one)), id(resident.derived(make, one))}
    assert (len(forms), made, other_made) == (3, [3.0, 3.0], [3.0])


def test_a_derived_form_goes_with_its_source():
    make, _ = counted()
    source = torch.ones(3)
    form = weakref.ref(resident.derived(make, source, torch.ones(1)))
    gc.collect()
    assert form() is not None
    del source
    gc.collect()
    assert form() is None


def test_tensors_that_count_no_changes_are_not_remembered():
    make, made = counted()
    with torch.inference_mode():
        source = torch.ones(3)
        resident.derived(make, source)
        source.add_(1.0)
        assert resident.derived(make, source).total == 6.0
        ordinary = resident.derived(make, torch.ones(3), source)
    assert ordinary.total == 9.0
    assert made == [3.0, 6.0, 9.0]


@pytest.mark.usefixtures("exact_int8_products")
def test_a_layer_notices_that_its_weight_was_written_to(draw):
    packed, zero = ops.pack_codes(draw.codes(5, 40, bits=4), bits=4), draw.zeros(5, bits=4)
    x = draw.codes(3, 40)

    def both(**sizes):
        results = []
        for backend in ("reference", "cpu"):
            with dispatch.use_backend(backend):
                y = ops.linear(x, torch.ones(1), zero[:1], packed, torch.ones(5), zero, **sizes)
            results.append(y)
        return results

    sizes = {"weight_bits": 4, "in_features": 40}
    first, same = both(**sizes)
    assert torch.equal(first, same)
    packed[0].fill_(0x37)
    zero[2] = 15 - zero[2]
    second, same = both(**sizes)
    assert torch.equal(second, same)
    assert not torch.equal(second, first)


@pytest.fixture
def plain_library(monkeypatch, tmp_path):
    """The compiled passes as a processor without vector instructions gets them."""
    path = tmp_path / "plain.so"
    if not build_native.compiled(native.LIBRARY.parent, path, "-DQTOOL_PLAIN"):
        pytest.skip("no C compiler")
    monkeypatch.setattr(native, "LIBRARY", path)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("plain_library")
@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("length", [1, 7, 64, 333])
def test_plain_passes_give_the_same_codes(table, length, draw):
    assert native.library() is not None
    assert not native.multiplies_codes()
    ties = (torch.arange(length) - length // 2 + 0.5) * 0.37
    for x in (draw.floats(5, length) * 9, ties.expand(2, -1), draw.floats(3, length) * 1e30):
        scale, zero = torch.tensor([0.37]), draw.zeros(1)
        how = (draw.codes(256).sort().values,) if table else ()
        call = ops.quantize_table if table else ops.quantize_uniform
        bits = {} if table else {"bits": 8}
        with dispatch.use_backend("reference"):
            expected = call(x, scale, zero, *how, **bits)
        with dispatch.use_backend("cpu"):
            assert torch.equal(call(x, scale, zero, *how, **bits), expected)
