"""Settings of `qtool switch-bits`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec, parse_width
from qtool.settings.base import CommonSettings, OnnxPath, OutPath, checkpoint_in, hub_folder


class Budget(NamedTuple):
    """What a model may take.

    Attributes:
        amount: Bytes, or a share of the bit operations at the highest width.
        measure: Which of the two.
    """

    amount: float
    measure: Literal["bytes", "operations"]


def _checked_bits(value: str | None) -> str | None:
    return None if value is None else str(parse_width(value))


def _checked_budget(value: str | None) -> str | None:
    if value is not None:
        parse_budget(value)
    return value


def parse_budget(text: str) -> Budget:
    """Read `5.2MB` or `5.2`, megabytes of 10^6 bytes, or `40%`, of the bit operations.

    Raises:
        UsageError: It is neither, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(mb|%)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None or float(match[1]) <= 0:
        raise UsageError(
            f"{text!r} is not a budget", remedy="give a size such as 5MB or a share such as 40%"
        )
    if match[2] == "%":
        return Budget(float(match[1]) / 100, "operations")
    return Budget(float(match[1]) * 1e6, "bytes")


class SwitchBitsSettings(CommonSettings):
    """`qtool switch-bits`: the widths at which a switchable checkpoint runs."""

    target: Path = Field(
        description="Checkpoint made with `qtool quantize --bits any`, its folder or hf-hub:ID."
    )
    bits: Annotated[str | None, AfterValidator(_checked_bits)] = Field(
        default=None,
        description="Width of all layers that are not pinned: bits of weights, or w4a4.",
    )
    layers: tuple[str, ...] = Field(
        default=(), description="GLOB=BITS for some layers; the last match wins."
    )
    budget: Annotated[str | None, AfterValidator(_checked_budget)] = Field(
        default=None,
        description="Pick bits per layer for a size (5MB) or a share of bit operations (40%).",
    )
    listing: bool = Field(default=False, description="Show the widths that the file has and runs.")
    in_place: bool = Field(
        default=False, description="Change the header of the file itself; no tensor byte changes."
    )
    out: OutPath = Field(
        default=None,
        description="Copy to write: a file, or a folder for the hub, which exists or ends in a "
        "slash.",
    )
    drop_unused: bool = Field(
        default=False, description="Leave planes that no layer needs out of the copy."
    )
    onnx: OnnxPath = Field(
        default=None,
        description="ONNX model to write at these bits, a name in .onnx; without others, at those "
        "the file runs at. Takes any checkpoint; needs the extra onnx.",
    )
    overwrite: bool = Field(default=False, description="Replace a copy or ONNX model that exists.")

    @model_validator(mode="after")
    def _one_request(self, info: ValidationInfo) -> Self:
        _ = self.rules
        if not (info.context or {}).get("complete", True):
            return self
        asked = [bool(self.bits or self.layers), self.budget is not None, self.listing]
        if asked.count(True) > 1 or not (any(asked) or self.exports_alone):
            raise UsageError(
                f"{'several things' if any(asked) else 'nothing'} asked for",
                remedy="give --list, --budget, or --bits and --layers; or --onnx FILE",
            )
        writes = [self.in_place, self.out is not None].count(True)
        if self.listing and (writes or self.drop_unused or self.onnx):
            raise UsageError("--list writes nothing", remedy="leave out -o, --in-place and --onnx")
        if self.drop_unused and not writes:
            raise UsageError("--drop-unused makes another file", remedy="give -o FILE as well")
        if not self.listing and writes != 1 and (writes or self.onnx is None):
            raise UsageError(
                "it is not clear where the change goes" if writes == 0 else "two places are given",
                remedy="give -o FILE for a copy, --in-place to change the file's header, or "
                "--onnx FILE for an ONNX model",
            )
        if self.drop_unused and self.in_place:
            raise UsageError(
                "--drop-unused makes another file", remedy="give -o FILE instead of --in-place"
            )
        return self

    @property
    def exports_alone(self) -> bool:
        """Whether an ONNX model is all that is asked for, at the bits the file runs at."""
        writes = self.in_place or self.out is not None
        return self.onnx is not None and not (writes or self.bits or self.layers or self.budget)

    @property
    def output(self) -> Path | None:
        """The checkpoint to write; None where no copy is asked for."""
        return None if self.out is None else checkpoint_in(self.out)

    @property
    def folder(self) -> Path | None:
        """The hub folder to write; None for a checkpoint alone."""
        return hub_folder(self.out)

    @property
    def rules(self) -> tuple[tuple[str, BitSpec], ...]:
        """`layers` as pairs of glob and width."""
        pairs = []
        for text in self.layers:
            glob, separator, width = text.rpartition("=")
            if not separator or not glob.strip():
                raise UsageError(
                    f"{text!r} is not GLOB=BITS",
                    remedy="name layers and their bits, for example 'blocks.0.*=8'",
                )
            pairs.append((glob.strip(), parse_width(width)))
        return tuple(pairs)
