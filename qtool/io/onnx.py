"""ONNX models: the optional extra, weights in four bits, bytes, and runs in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qtool.errors import MissingError

if TYPE_CHECKING:
    import onnx_ir

OPSET = 21
"""The first with 4-bit integers, which ONNX Runtime and OpenVINO read; OpenVINO reads no int2."""

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_INT4_LOWEST, _INT4_STEPS = -8, 15


def require() -> None:
    """Check that everything that writing and checking ONNX takes is installed.

    Raises:
        MissingError: It is not.
    """
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingError(
            f"--onnx needs {', '.join(absent)}, not installed here",
            remedy="pip install 'qtool[onnx]'",
        )


def to_bytes(
    model: onnx_ir.Model, *, outputs: int | None = None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A model as a file holds it: without the traces of the machine that made it.

    Args:
        model: The model.
        outputs: How many of its outputs are kept, the first ones; None keeps all.
        metadata: What the file says about itself.
    """
    import onnx_ir
    from onnxscript import optimizer

    model = model.clone()
    if outputs is not None:
        del model.graph.outputs[outputs:]
        optimizer.remove_unused_nodes(model)
    for part in [model, model.graph, *model.graph, *model.graph.initializers.values()]:
        part.metadata_props.clear()
        part.doc_string = None
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.producer_name, model.producer_version = "qtool", None
    model.metadata_props.update(metadata or {})
    content: bytes = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def pack_weights(model: onnx_ir.Model) -> dict[str, int]:
    """Store int8 weights in four bits where their levels allow it, in place; nothing is lost.

    A weight of at most 16 evenly spaced levels per channel becomes an int4 constant and the integer
    arithmetic that restores its int8 levels. Runtimes do that once, when they load the model, and
    then find the int8 weights that their kernels for integer activations take.

    Returns:
        Number of dequantized weights by the type they are stored in.
    """
    counts: dict[str, int] = {}
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.const_value is None:
            continue
        packed = _pack(model.graph, node, weight, weight.const_value.numpy())
        kind = "int4" if packed else str(weight.dtype).lower()
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _pack(
    graph: onnx_ir.Graph, node: onnx_ir.Node, weight: onnx_ir.Value, levels: np.ndarray[Any, Any]
) -> bool:
    import ml_dtypes
    import onnx_ir

    if levels.dtype != np.int8:
        return False
    axis = node.attributes["axis"].as_int()
    others = tuple(index for index in range(levels.ndim) if index != axis)
    levels = levels.astype(np.int32)
    low = levels.min(axis=others, keepdims=True)
    step = 2 if not ((levels - low) % 2).any() else 1
    codes = (levels - low) // step
    if codes.max() > _INT4_STEPS:
        return False

    def constant(suffix: str, array: Any) -> onnx_ir.Value:  # noqa: ANN401
        tensor = onnx_ir.Tensor(array, name=f"{weight.name}.{suffix}")
        value = onnx_ir.Value(
            name=tensor.name,
            shape=tensor.shape,
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    packed = constant("int4", (codes + _INT4_LOWEST).astype(ml_dtypes.int4))
    chain = [onnx_ir.node("Cast", [packed], {"to": onnx_ir.DataType.INT32})]
    if step != 1:
        factor = constant("step", np.array(step, dtype=np.int32))
        chain.append(onnx_ir.node("Mul", [chain[-1].outputs[0], factor]))
    offset = constant("offset", low - step * _INT4_LOWEST)
    chain.append(onnx_ir.node("Add", [chain[-1].outputs[0], offset]))
    chain.append(onnx_ir.node("Cast", [chain[-1].outputs[0]], {"to": onnx_ir.DataType.INT8}))
    for number, link in enumerate(chain):
        link.name = f"{node.name}.unpack{number}"
        link.outputs[0].name = f"{weight.name}.unpacked{number}"
    graph.insert_before(node, chain)
    node.replace_input_with(0, chain[-1].outputs[0])
    if not weight.uses():
        graph.initializers.pop(str(weight.name))
    return True


def run(
    model: bytes | str, image: np.ndarray[Any, Any], *, optimize: bool = True
) -> Sequence[np.ndarray[Any, Any]]:
    """Run a model in ONNX Runtime on the CPU.

    Args:
        model: Its bytes, or its path.
        image: Its only input.
        optimize: Whether the runtime may rewrite the model. It moves quantizers, for instance to
            before a transposition, so that values inside are no longer those of the model as
            written.

    Returns:
        Its outputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found: Sequence[np.ndarray[Any, Any]] = session.run(None, {session.get_inputs()[0].name: image})
    return found
