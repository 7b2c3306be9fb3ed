"""Linear layers in panels give what integers and PyTorch's float operations give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.engine import dispatch, ops, resident
from qtool.engine.cpu import exact, native, panels
from qtool.engine.cpu.linear import nested_layer

pytestmark = pytest.mark.skipif(not native.has_vectors(), reason="needs AVX2 and a C compiler")

TILES, VECTORS = False, True


@pytest.fixture(params=[TILES, VECTORS], ids=["tiles", "vectors"], scope="module")
def vectors(request):
    """Which of the two kernels multiplies."""
    if request.param == TILES and not native.has_tiles():
        pytest.skip("this CPU has no matrix tiles")
    return request.param


@pytest.fixture
def device():
    return torch.device("cpu")


def drawn(rows, depth, width, seed, *, vectors, bias=True, zero=37, reach=128):
    """Codes, layer and the values it should give."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, depth), generator=generator).to(torch.uint8)
    levels = torch.randint(-reach, reach, (width, depth), generator=generator).to(torch.int8)
    scale = torch.rand(width, generator=generator) + 0.01
    added = torch.randn(width, generator=generator) if bias else None
    layer = panels.PanelLinear(panels.laid_out(levels, vectors=vectors), scale, added, zero)
    sums = (codes.double() - zero) @ levels.double().t()
    values = sums.float() * scale
    return codes, layer, values if added is None else values + added


@given(
    rows=st.integers(1, 70),
    steps=st.integers(1, 80),
    width=st.integers(1, 100),
    seed=st.integers(0, 999),
    bias=st.booleans(),
    zero=st.sampled_from([0, 3, 255]),
    reach=st.sampled_from([1, 2, 8, 32, 64, 128]),
    threads=st.integers(1, 5),
)
def test_values_are_those_of_exact_sums(
    vectors, rows, steps, width, seed, bias, zero, reach, threads
):
    depth = 4 * steps if vectors else 64 * (1 + steps // 16)
    codes, layer, values = drawn(
        rows, depth, width, seed, vectors=vectors, bias=bias, zero=zero, reach=reach
    )
    torch.set_num_threads(threads)
    assert torch.equal(layer.product(codes), values)


@given(
    depth=st.integers(1, 40).map(lambda groups: 4 * groups),
    reach=st.sampled_from([1, 2, 8, 16, 32, 64, 128]),
    sign=st.sampled_from([-1, 1]),
    seed=st.integers(0, 999),
)
def test_sums_of_the_largest_codes_do_not_saturate(depth, reach, sign, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = sign * torch.randint(max(1, reach - 3), reach + 1, (20, depth), generator=generator)
    levels = levels.clamp(-128, 127).to(torch.int8)
    codes = torch.full((5, depth), 255, dtype=torch.uint8)
    layer = panels.PanelLinear(panels.laid_out(levels, vectors=True), torch.ones(20), None, 0)
    assert torch.equal(layer.product(codes).double(), codes.double() @ levels.double().t())


@pytest.mark.parametrize(
    ("level", "run"), [(0, 4), (1, 4), (16, 4), (17, 2), (32, 2), (33, 1), (64, 1), (65, 0)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_is_as_long_as_16_bits_allow(level, run, sign):
    levels = torch.full((3, 16), sign * level, dtype=torch.int8)
    found = panels.longest_run(levels)
    assert found >= run if level < 16 else found == run


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("reach", [8, 128])
def test_many_rows_pass_in_parts(threads, reach, vectors):
    codes, layer, values = drawn(700, 2048, 40, 0, vectors=vectors, reach=reach)
    torch.set_num_threads(threads)
    assert torch.equal(layer.product(codes), values)


@pytest.mark.parametrize("width", [32, 45])
def test_another_matrix_is_added_in_place(width, vectors):
    codes, layer, values = drawn(50, 128, width, 1, vectors=vectors)
    stream = torch.randn(50, width)
    expected = stream + values
    out = torch.full((50, width), torch.nan)
    assert layer.product(codes, added=stream, out=out) is out
    assert torch.equal(out, expected)
    layer.product(codes, added=stream, out=stream)
    assert torch.equal(stream, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("table", ["uniform", "table", "steps"])
@pytest.mark.parametrize(("pictures", "tokens", "heads", "depth"), [(2, 17, 3, 16), (3, 33, 2, 32)])
def test_codes_are_those_of_the_values(
    pictures, tokens, heads, depth, table, threads, vectors, draw
):
    width = 3 * heads * depth
    codes, layer, values = drawn(pictures * tokens, 64, width, 2, vectors=vectors)
    scales, zeros = draw.scales(3) * 1e4, draw.zeros(3, bits=4)
    tables = [draw.codes(256).sort().values if table != "uniform" else None for _ in range(3)]
    if table == "steps":
        step_of = (torch.arange(256) // 2).clamp(max=15)
        tables = [draw.codes(16).sort().values[step_of] for _ in range(3)]
    quantizers = (native.Quantizer * 3)(
        *(
            native.quantizer(scale, zero, own, 4, signed=number > 0)
            for number, (scale, zero, own) in enumerate(zip(scales, zeros, tables, strict=True))
        )
    )
    size = (pictures, heads, tokens, depth)
    by_head = (heads * tokens * depth, tokens * depth, depth)
    out = torch.full((3, *size), 99, dtype=torch.uint8)
    torch.set_num_threads(threads)
    walk = native.walk(size, (0, 0, 0), by_head)
    layer.codes(codes, out.data_ptr(), walk, quantizers, out.stride(0))
    parts = values.view(pictures, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4)
    for number, (part, found) in enumerate(zip(parts, out, strict=True)):
        step, zero, own = scales[number : number + 1], zeros[number : number + 1], tables[number]
        with dispatch.use_backend("reference"):
            if own is None:
                expected = ops.quantize_uniform(part, step, zero, bits=4)
            else:
                expected = ops.quantize_table(part, step, zero, own)
        assert len(expected.unique()) > 3
        assert torch.equal(found, expected ^ 128 if number else expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", range(2, 9))
def test_leading_bits_of_nested_codes_are_multiplied(bits, threads, draw, vectors, monkeypatch):
    if vectors:
        monkeypatch.setattr(native, "has_tiles", lambda: False)
        monkeypatch.setattr(exact, "has_int8_units", lambda: False)
    x, weight = draw.codes(37, 192), (draw.codes(45, 192).int() - 128).to(torch.int8)
    arguments = (draw.scales(1), draw.zeros(1), weight, draw.scales(45), draw.floats(45))
    torch.set_num_threads(threads)
    results = []
    for backend in ("reference", "cpu"):
        with dispatch.use_backend(backend):
            results.append(ops.linear_nested(x, *arguments, bits=bits))
    assert torch.equal(*results)
    whole = resident.derived(panels.laid_out, weight).panels
    assert resident.derived(panels.laid_out, weight).panels is whole  # one layout for all widths
    lesser = nested_layer(*arguments, bits)
    assert lesser is not None
    assert lesser.layer.panels == whole.data_ptr()
    assert bool(lesser.layer.vectors) is vectors


def test_other_depths_go_elsewhere(vectors, monkeypatch):
    monkeypatch.setattr(exact, "has_int8_units", lambda: not vectors)
    if vectors:
        monkeypatch.setattr(native, "has_tiles", lambda: False)
    assert panels.takes(192)
    assert panels.takes(100) is vectors
    assert not panels.takes(102)
    assert not panels.takes(panels.MOST_DEPTH + panels.STEP)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not panels.takes(192)
