"""Settings of `qtool quantize`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec, parse_average, parse_range, parse_rule
from qtool.settings.base import (
    Effort,
    OnnxPath,
    OutPath,
    ReportPath,
    WriterSettings,
    checkpoint_in,
    hub_folder,
)

Budget = Literal["size", "macs"]
Recipe = Literal["paper", "strong"]
Engine = Literal["nested", "branches"]
Ablation = Literal["prefix", "no-distillation", "one-set"]

_TRAINING_ONLY = ("train", "epochs", "batch_size", "learning_rate", "ablate")
_CALIBRATION_ONLY = (
    *("data_free", "calib", "synthetic", "count"),
    *("recipe", "effort", "steps", "budget", "keep", "skip", "dedicated_2bit"),
)


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
        "layer; any, any:LO-HI or any:A,B,... makes one file that runs at all these widths.",
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
    effort: Effort = Field(default="standard", description="Budget; max is the paper's.")
    count: int = Field(default=32, ge=1, description="Number of calibration pictures.")
    steps: int | None = Field(
        default=None, ge=1, description="Optimisation steps; overrides the effort."
    )
    dedicated_2bit: bool = Field(
        default=False,
        description="Of any: give 2 bits codes of their own, better than those they share with 8; "
        "a quarter more to store.",
    )
    engine: Engine = Field(
        default="nested",
        description="Of any: nested 2-bit planes, calibrated; or branches of 2-bit weights, which "
        "are trained (ResNets only).",
    )
    train: Path | None = Field(
        default=None, description="Class folders of pictures to train branches on."
    )
    epochs: int = Field(default=30, ge=1, description="Passes over the training pictures.")
    batch_size: int = Field(default=128, ge=2, le=65536, description="Pictures a training step.")
    learning_rate: float = Field(
        default=0.02, gt=0, le=10, allow_inf_nan=False, description="Highest learning rate."
    )
    ablate: tuple[Ablation, ...] = Field(
        default=(),
        description="Leave out a part of the method: prefix (first branches at every width), "
        "no-distillation, one-set (one body, rounded anew to every width); repeat for more.",
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
    out: OutPath = Field(
        default=None,
        description="File to write, otherwise ./MODEL-BITS.safetensors; or a folder for the hub, "
        "which exists or ends in a slash.",
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
    def _options_belong_to_the_engine(self, info: ValidationInfo) -> Self:
        if not (info.context or {}).get("complete", True):
            return self
        if self.engine == "nested":
            if odd := self._changed(_TRAINING_ONLY):
                raise UsageError(
                    f"{_flag(odd[0])} is for training, which this engine does not do",
                    remedy="give --engine branches as well, or leave it out",
                )
            return self
        if self.switchable is None:
            raise UsageError(
                f"--engine branches makes files for several widths, not for {self.bits}",
                remedy="give --bits any:2-8, or leave out --engine",
            )
        if odd := self._changed(_CALIBRATION_ONLY):
            raise UsageError(
                f"{_flag(odd[0])} is for calibration; --engine branches trains instead",
                remedy="leave it out, or take --engine nested",
            )
        if self.onnx is not None:
            raise UsageError(
                "networks of branches are not exported to ONNX", remedy="leave out --onnx"
            )
        if self.train is None:
            raise UsageError(
                "--engine branches needs pictures to train on",
                remedy="give --train DIR with one folder per class",
            )
        if {"prefix", "one-set"} <= set(self.ablate):
            raise UsageError(
                "with one-set there are no branches for prefix to choose", remedy="ablate only one"
            )
        return self

    @model_validator(mode="after")
    def _dedicated_bits_are_served(self) -> Self:
        widths = self.switchable or ()
        if self.dedicated_2bit and (2 not in widths or len(widths) < 2):
            raise UsageError(
                f"--dedicated-2bit is for files that run at 2 bits and others, not for {self.bits}",
                remedy="give --bits any:2-8, or leave it out",
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_pictures(self, info: ValidationInfo) -> Self:
        if self.engine == "branches":
            return self
        given = [self.data_free, self.calib is not None, self.synthetic is not None].count(True)
        if given != 1 and (info.context or {}).get("complete", True):
            raise UsageError(
                f"{'several sources' if given else 'no source'} of calibration pictures given",
                remedy="give exactly one of --data-free, --calib DIR and --synthetic DIR",
            )
        return self

    def _changed(self, fields: Sequence[str]) -> list[str]:
        """Those of some fields that do not have their default."""
        defaults = type(self).model_fields
        return [name for name in fields if getattr(self, name) != defaults[name].default]

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
        """The checkpoint to write: at `out`, or MODEL-BITS.safetensors in the current folder."""
        if self.out is not None:
            return checkpoint_in(self.out)
        name = re.split("[/:]", self.model.rstrip("/"))[-1].removesuffix(".safetensors")
        safe = re.sub(r"[^\w.-]+", "-", name)
        bits = self.bits.replace(":", "").replace(",", "-")
        return Path(f"{safe}-{bits}.safetensors")

    @property
    def folder(self) -> Path | None:
        """The hub folder to write; None for a checkpoint alone."""
        return hub_folder(self.out)

    @property
    def state(self) -> Path:
        """What an interrupted run leaves to go on from; a folder to come appears whole, later."""
        folder = self.folder
        place = self.output if folder is None or folder.is_dir() else folder
        return place.with_name(f".{place.name}.resume")


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"
