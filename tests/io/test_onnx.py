"""The extra, and weights in four bits that come back as they were."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qtool.errors import MissingError
from qtool.io import onnx as files

INSTALLED = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not INSTALLED, reason="the extra onnx is not installed")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object()
    )
    with pytest.raises(MissingError, match="needs onnxruntime, not") as caught:
        files.require()
    assert caught.value.remedy == "pip install 'qtool[onnx]'"
    assert caught.value.exit_code == 4


def dequantizing(levels, *, axis):
    """A model that adds its input to a dequantized weight."""
    import onnx_ir

    def constant(name, array):
        tensor = onnx_ir.Tensor(array, name=name)
        kind = onnx_ir.TensorType(tensor.dtype)
        return onnx_ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)

    channels = levels.shape[axis]
    weight = constant("weight", levels)
    scale = constant("scale", np.linspace(0.5, 1.5, channels, dtype=np.float32))
    zero = constant("zero", np.zeros(channels, dtype=levels.dtype))
    image = onnx_ir.Value(
        name="image", shape=onnx_ir.Shape([1]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    )
    restored = onnx_ir.node("DequantizeLinear", [weight, scale, zero], {"axis": axis})
    total = onnx_ir.node("Add", [restored.outputs[0], image])
    restored.outputs[0].name, total.outputs[0].name = "restored", "total"
    total.outputs[0].type = image.type
    total.outputs[0].shape = onnx_ir.Shape(levels.shape)
    graph = onnx_ir.Graph(
        [image],
        [total.outputs[0]],
        nodes=[restored, total],
        initializers=[weight, scale, zero],
        opset_imports={"": files.OPSET},
        name="main",
    )
    return onnx_ir.Model(graph, ir_version=10)


def values(model):
    return files.run(files.to_bytes(model), np.zeros(1, dtype=np.float32))[0]


@needs_onnx
@given(
    st.integers(1, 3).flatmap(
        lambda step: st.tuples(
            st.just(step),
            st.sampled_from([0, 1]),
            arrays.arrays(
                np.int8, st.tuples(*[st.integers(1, 9)] * 2), elements=st.integers(0, 15)
            ),
            st.integers(-60, 30),
        )
    )
)
def test_few_levels_are_stored_in_four_bits_and_come_back(drawn):
    step, axis, codes, low = drawn
    levels = (codes * min(step, 2) + low).astype(np.int8)
    model = dequantizing(levels, axis=axis)
    expected = values(model)
    assert files.pack_weights(model) == {"int4": 1}
    assert "weight" not in model.graph.initializers
    np.testing.assert_array_equal(values(model), expected)


@needs_onnx
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_other_weights_stay_as_they_are(dtype):
    levels = np.arange(0, 40, dtype=dtype).reshape(2, 20)
    model = dequantizing(levels, axis=0)
    expected = values(model)
    assert files.pack_weights(model) == {np.dtype(dtype).name: 1}
    np.testing.assert_array_equal(values(model), expected)


@needs_onnx
def test_sixteen_levels_are_smaller_than_seventeen():
    few, many = (np.tile(np.arange(count, dtype=np.int8), (8, 40)) for count in (16, 17))
    sizes = []
    for levels in (few, many):
        model = dequantizing(levels, axis=0)
        files.pack_weights(model)
        sizes.append(len(files.to_bytes(model)))
    assert sizes[0] < 0.65 * sizes[1]


@needs_onnx
def test_a_file_keeps_the_outputs_asked_for_and_no_traces_of_its_making():
    import onnx

    model = dequantizing(np.zeros((2, 2), dtype=np.int8), axis=0)
    model.graph.outputs.append(model.graph.node(0).outputs[0])
    model.graph.node(0).outputs[0].type = model.graph.outputs[0].type
    for node in model.graph:
        node.metadata_props["stack"] = "/home/somebody/model.py"
    content = files.to_bytes(model, outputs=1, metadata={"qtool.bits": "w4a4"})
    assert b"somebody" not in content
    proto = onnx.load_from_string(content)
    assert [value.name for value in proto.graph.output] == ["total"]
    assert {prop.key: prop.value for prop in proto.metadata_props} == {"qtool.bits": "w4a4"}
    assert len(model.graph.outputs) == 2
