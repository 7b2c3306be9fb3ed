"""What a checkpoint says about itself: the header, apart from the tensors it describes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qtool.io.branch_tensors import BranchTable, sizes_problem


def _plain_json(value: object) -> object:
    """Turn tuples into lists and sort keys, so that equal headers have equal bytes."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, sort_keys=True))
    except TypeError as error:
        raise ValueError(str(error)) from error


JsonObject = Annotated[dict[str, Any], BeforeValidator(_plain_json)]
Bits = Annotated[int, Field(ge=2, le=8)]
BitsName = Annotated[str, Field(pattern=r"^(w[2-8]a([2-8]|16|32)|mixed:[2-8](\.\d{1,6})?)$")]
MIXED = "mixed"
"""The active bits of a switchable file whose layers run at several widths."""
LayerName = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=300)]


SEES_PICTURE = "sees_picture"
"""Option of a switchable layer whose input is the picture, which has 8 bits at every width."""


class LayerBits(BaseModel):
    """How one layer is quantized.

    Attributes:
        kind: `linear` and `conv` have packed weights, `attention` has quantized products.
        weight_bits: Width of the weights; None for attention.
        input_bits: Width of the input, or of the operands of attention; None where it stays float.
        options: Whatever else the layer's class needs to be made again.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["linear", "conv", "attention"]
    weight_bits: Bits | None
    input_bits: Bits | None
    options: dict[str, str | int | float | bool | None] = {}

    @model_validator(mode="after")
    def _weights_have_bits(self) -> Self:
        if (self.kind == "attention") != (self.weight_bits is None):
            raise ValueError("linear and conv layers have weight_bits, attention has none")
        return self


def activation_widths(layer: LayerBits, widths: NestedWidths) -> list[int]:
    """The widths of activations that a layer of a switchable file has: one if it sees the picture.

    Args:
        layer: The layer.
        widths: What the layers of the file have in common.
    """
    if layer.options.get(SEES_PICTURE):
        return [layer.input_bits or 8]
    return widths.activation_bits


class NestedWidths(BaseModel):
    """What the layers of a switchable file have in common.

    Attributes:
        weight_bits: The widths that scales of weights are stored for, rising.
        activation_bits: The same for activations.
        sensitivity: What running a layer at each of the weight widths costs the model's output, by
            layer; empty where it was not measured.
        dedicated_2bit: Whether 2 bits have codes of their own beside the nested ones.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight_bits: Annotated[list[Bits], Field(min_length=1, max_length=7)]
    activation_bits: Annotated[list[Bits], Field(min_length=1, max_length=7)]
    sensitivity: dict[LayerName, list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]] = {}
    dedicated_2bit: bool = False

    @model_validator(mode="after")
    def _widths_rise(self) -> Self:
        for widths in (self.weight_bits, self.activation_bits):
            if widths != sorted(set(widths)):
                raise ValueError(f"the widths {widths} do not rise")
        if any(len(costs) != len(self.weight_bits) for costs in self.sensitivity.values()):
            raise ValueError("a sensitivity does not have one number per weight width")
        if self.dedicated_2bit and 2 not in self.weight_bits:
            raise ValueError("2 bits have codes of their own, and are no width of the file")
        return self


class Header(BaseModel):
    """Everything a checkpoint says about itself.

    Attributes:
        architecture: The timm name and tag, or `demo_vit`.
        model_args: Arguments that build the model without weights.
        data: Input size, mean, std, interpolation and crop.
        engine: `fixed` has one bit-width per layer, `nested` several; `branches` has several for
            the whole network.
        bits: The bit-widths the file can run at; of `nested`, those that need no more saying.
        active_bits: The one of them it runs at, or `mixed`.
        layers: The quantized layers by name, in the order of the model, with their active bits.
        quantization_config: The same in compressed-tensors' words, `quant_method` "qtool".
        provenance: Version, method, recipe, seed, SHA-256 of the source weights, paper.
        nested: What only the engine `nested` has.
        branches: What only the engine `branches` has.
        task: What the model answers with: classes, or the picture as it should have been.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    architecture: Annotated[str, Field(pattern=r"^[\w.:/-]+$", max_length=200)]
    model_args: JsonObject
    data: JsonObject
    engine: Literal["fixed", "nested", "branches"]
    bits: Annotated[list[BitsName], Field(min_length=1)]
    active_bits: BitsName | Literal["mixed"]
    layers: dict[LayerName, LayerBits]
    quantization_config: JsonObject
    provenance: JsonObject
    nested: NestedWidths | None = None
    branches: BranchTable | None = None
    task: Literal["classification", "restoration"] = "classification"

    @model_validator(mode="after")
    def _active_bits_are_there(self) -> Self:
        mixed = self.engine == "nested" and self.active_bits == MIXED
        if not mixed and self.active_bits not in self.bits:
            raise ValueError(f"active_bits {self.active_bits} is not one of bits")
        return self

    @model_validator(mode="after")
    def _widths_belong_to_the_engine(self) -> Self:
        if (self.engine == "nested") != (self.nested is not None):
            raise ValueError("the engine nested, and no other, has nested widths")
        if (self.engine == "branches") != (self.branches is not None):
            raise ValueError("the engine branches, and no other, has branches")
        return self

    @model_validator(mode="after")
    def _restoration_has_one_width(self) -> Self:
        if self.task == "restoration" and self.engine != "fixed":
            raise ValueError("networks that restore run on the engine fixed")
        return self

    @model_validator(mode="after")
    def _branches_have_layers_of_some_size(self) -> Self:
        if self.branches is not None:
            if not self.layers:
                raise ValueError("there is no layer that branches could have")
            for name, layer in self.layers.items():
                if problem := sizes_problem(layer.options):
                    raise ValueError(f"{name}: {problem}")
        return self

    def to_json(self) -> str:
        """The header in JSON, without what goes without saying."""
        absent: dict[str, Any] = {
            name: True for name in ("nested", "branches") if getattr(self, name) is None
        }
        if self.task == "classification":
            absent["task"] = True
        if self.nested is not None and not self.nested.dedicated_2bit:
            absent["nested"] = {"dedicated_2bit"}
        return json.dumps(self.model_dump(exclude=absent), separators=(",", ":"))
