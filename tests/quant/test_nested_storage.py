"""Tables and layers come back from the form they have in a file."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qtool.quant.bits import BitSpec
from qtool.quant.nested_layers import NestedLinear, NestedProducts
from qtool.quant.nested_storage import fill, pack_table, stored, unpack_table
from qtool.quant.widths import Offer


@given(st.integers(2, 7), st.randoms(use_true_random=False))
def test_tables_come_back(bits, random):
    levels = sorted(random.sample(range(256), random.randint(1, 2**bits)))
    cuts = sorted(random.sample(range(1, 256), len(levels) - 1))
    table = torch.empty(256, dtype=torch.uint8)
    for level, start, stop in zip(levels, [0, *cuts], [*cuts, 256], strict=True):
        table[start:stop] = level
    packed = pack_table(table, bits=bits)
    assert packed.shape == (32 + 2**bits,)
    assert torch.equal(unpack_table(packed), table)


@pytest.mark.parametrize("dedicated", [False, True])
def test_layers_come_back(dedicated):
    offer, active = Offer((2, 4, 8), (3, 8), dedicated=dedicated), BitSpec(8, 8)
    layer = NestedLinear((5, 10), name="one", offer=offer, active=active, table=True)
    generator = torch.Generator().manual_seed(0)
    layer.codes.copy_(torch.randint(-128, 128, (5, 10), generator=generator))
    if dedicated:
        layer.low_codes.copy_(torch.randint(-2, 2, (5, 10), generator=generator) * 64)
    for buffer in (layer.alpha, layer.bias, layer.input_scale):
        buffer.copy_(torch.rand(buffer.shape, generator=generator).half())
    layer.input_zero_point.copy_(torch.tensor([3, 200]))
    layer.input_table.copy_(torch.arange(256).div(64, rounding_mode="floor") * 60)
    products = NestedProducts(name="two", offer=Offer((), (3, 8)), active=active, quantizer="table")
    products.at(3).query_scale.fill_(0.25)
    products.at(8).value_zero_point.fill_(77)
    for operand in ("query", "key", "probability", "value"):
        products.at(3).table_of(operand).copy_(layer.input_table[0])
    model = nn.ModuleDict({"one": layer, "two": products, "norm": nn.LayerNorm(4)})
    tensors = stored(model)
    assert tensors["norm.weight"].dtype == torch.float16
    assert {"one.p1", "one.p4", "one.alpha", "two.act"} <= tensors.keys()
    for name, module in (("one", layer), ("two", products)):
        own = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        state = fill(module, own)
        expected = module.state_dict()
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), key


def test_planes_that_no_width_reaches_are_not_stored():
    layer = NestedLinear((4, 8), name="one", offer=Offer((2, 3, 4), (8,)), active=BitSpec(4, 8))
    assert {name for name in stored(nn.ModuleDict({"one": layer})) if ".p" in name} == {
        "one.p1",
        "one.p2",
    }
