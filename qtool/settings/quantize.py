"""Settings of `qtool quantize`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec, parse_average, parse_range, parse_rule
from qtool.settings.base import Effort, OnnxPath, ReportPath, WriterSettings

Budget = Literal["size", "macs"]
Recipe = Literal["paper", "strong"]


def _checked_bits(value: str) -> str:
    if parse_range(value) is not None:
        return value.lower()
    average = parse_average(value)
    if average is not None:
        return f"mixed:{average:g}"
    spec = BitSpec.parse(value)
    if not spec.integer:
        raise UsageError(
            f"{spec} keeps activations in floating point, which the integer engine cannot do",
            remedy="give activations 2 to 8 bits, for example w4a8",
        )
    return str(spec)


class QuantizeSettings(WriterSettings):
    """`qtool quantize`: a model to one safetensors file of low-bit integers."""

    model: str = Field(
        min_length=1,
        description="Model: an alias, a timm name (NAME,KEY=VALUE adds arguments), a .safetensors "
        "file, hf-hub:ID, or a demoire network.",
    )
    bits: Annotated[str, AfterValidator(_checked_bits)] = Field(
        default="w4a4",
        description="Bits of weights and activations, 2 to 8 each; mixed:AVG chooses them layer by "
        "layer; any or any:LO-HI makes one file that runs at all these widths.",
    )
    budget: Budget = Field(
        default="size",
        description="What the mean of mixed:AVG is weighted with: size (weights) or macs "
        "(multiply-adds).",
    )
    data_free: bool = Field(
        default=False, description="Synthesize or simulate the calibration pictures first."
    )
    calib: Path | None = Field(default=None, description="Folder of pictures to calibrate on.")
    synthetic: Path | None = Field(
        default=None, description="Folder made by `qtool synthesize images`."
    )
    recipe: Recipe = Field(
        default="strong",
        description="strong: table quantizers for activations; paper: as SPDFQ publishes it.",
    )
    effort: Effort = Field(
        default="standard", description="Budget; standard takes the paper's number of steps."
    )
    count: int = Field(default=32, ge=1, description="Number of calibration pictures.")
    steps: int | None = Field(
        default=None, ge=1, description="Optimisation steps; overrides the effort."
    )
    keep: tuple[str, ...] = Field(
        default=(), description="GLOB=BITS for layers that need other bits."
    )
    skip: tuple[str, ...] = Field(
        default=(), description="GLOB of layers that stay in floating point."
    )
    weights: str = Field(
        default="pretrained", min_length=1, description="pretrained, or a weight file."
    )
    out: Path | None = Field(
        default=None, description="File to write; otherwise ./MODEL-BITS.safetensors."
    )
    onnx: OnnxPath = Field(
        default=None,
        description="ONNX model to write as well, a name in .onnx; needs the extra onnx.",
    )
    report: ReportPath = Field(default=None, description="Report to write: .json, .md or .html.")
    verify: bool = Field(default=True, description="Load the file again and compare its outputs.")

    @model_validator(mode="after")
    def _rules_can_be_read(self) -> Self:
        _ = self.kept
        return self

    @model_validator(mode="after")
    def _one_source_of_pictures(self, info: ValidationInfo) -> Self:
        given = [self.data_free, self.calib is not None, self.synthetic is not None].count(True)
        if given != 1 and (info.context or {}).get("complete", True):
            raise UsageError(
                f"{'several sources' if given else 'no source'} of calibration pictures given",
                remedy="give exactly one of --data-free, --calib DIR and --synthetic DIR",
            )
        return self

    @property
    def bit_spec(self) -> BitSpec:
        """The bits of all layers without a rule of their own.

        Of mixed ones, the mean; of a switchable file, what it starts with: most bits for weights,
        8 for activations.
        """
        widths, average = self.switchable, self.average_bits
        if widths is not None:
            return BitSpec(max(widths), 8)
        if average is None:
            return BitSpec.parse(self.bits)
        return BitSpec(round(average), round(average))

    @property
    def switchable(self) -> tuple[int, ...] | None:
        """The weight bits of a switchable file, rising; None for a file with one width."""
        return parse_range(self.bits)

    @property
    def average_bits(self) -> float | None:
        """The mean width of mixed precision, or None where all layers get the same bits."""
        return parse_average(self.bits)

    @property
    def kept(self) -> tuple[tuple[str, BitSpec], ...]:
        """`keep` as pairs of glob and bits."""
        return tuple(parse_rule(rule) for rule in self.keep)

    @property
    def output(self) -> Path:
        """The file to write: `out`, or MODEL-BITS.safetensors in the current folder."""
        if self.out is not None:
            return self.out
        name = re.split("[/:]", self.model.rstrip("/"))[-1].removesuffix(".safetensors")
        safe = re.sub(r"[^\w.-]+", "-", name)
        return Path(f"{safe}-{self.bits.replace(':', '')}.safetensors")
