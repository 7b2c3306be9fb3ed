"""One pydantic model per command: the only place where a default value is written.

The command line takes its help texts from the descriptions here. Wrong values raise `UsageError`
when a model is made through `Settings.build`, which every command does.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec, parse_rule

Backend = Literal["auto", "reference", "cpu", "triton"]
DType = Literal["float32"]
Effort = Literal["quick", "standard", "max"]
Recipe = Literal["paper", "strong"]
SynthesisMethod = Literal["spdfq", "psaq", "noise"]

REPORT_SUFFIXES: Final = (".json", ".md", ".html")
DEVICES: Final = ("auto", "cpu", "cuda")


def _checked_device(value: str) -> str:
    if value in DEVICES or re.fullmatch(r"cuda:\d+", value, re.ASCII):
        return value
    raise UsageError(f"there is no device {value!r}", remedy="choose auto, cpu, cuda or cuda:N")


def _checked_report(value: Path | None) -> Path | None:
    if value is None or value.suffix.lower() in REPORT_SUFFIXES:
        return value
    raise UsageError(
        f"the kind of report cannot be told from {str(value)!r}",
        remedy="let the name end in .json, .md or .html",
    )


def _checked_bits(value: str) -> str:
    spec = BitSpec.parse(value)
    if not spec.integer:
        raise UsageError(
            f"{spec} keeps activations in floating point, which the integer engine cannot do",
            remedy="give activations 2 to 8 bits, for example w4a8",
        )
    return str(spec)


Device = Annotated[str, AfterValidator(_checked_device)]
ReportPath = Annotated[Path | None, AfterValidator(_checked_report)]


class Settings(BaseModel):
    """Base of all settings: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @classmethod
    def build(
        cls,
        values: Mapping[str, Any],
        *,
        named: Callable[[str], str] = str,
        complete: bool = True,
    ) -> Self:
        """Make settings, saying what is wrong in one line.

        Args:
            values: Field names and values.
            named: What the user calls a field, for messages (`--count`, `QTOOL_THREADS`).
            complete: Whether rules that tie fields together are checked as well.

        Raises:
            UsageError: A value is missing, unknown or out of range, or two contradict each other.
        """
        try:
            return cls.model_validate(dict(values), context={"complete": complete})
        except ValidationError as error:
            raise cls._explained(error, values, named) from None

    @classmethod
    def _explained(
        cls, error: ValidationError, values: Mapping[str, Any], named: Callable[[str], str]
    ) -> UsageError:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, cls.model_fields)
            remedy = f"near names: {', '.join(near)}" if near else ""
            return UsageError(f"{named(field)} is not a setting here", remedy=remedy)
        if first["type"] == "missing":
            return UsageError(f"{named(field)} is missing")
        rule = re.sub(r"^\w+ should ", "must ", first["msg"]).partition(", unable")[0]
        return UsageError(f"{named(field)} {rule}, not {values.get(field)!r}")


class CommonSettings(Settings):
    """What every command takes."""

    device: Device = Field(
        default="auto",
        description="Where to compute: auto (CUDA, else the CPU), cpu, cuda or cuda:N.",
    )
    dtype: DType = Field(default="float32", description="Number format of what is not quantized.")
    backend: Backend = Field(
        default="auto", description="Implementation of the integer operations."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of all random numbers.")
    threads: int = Field(
        default=0, ge=0, le=4096, description="CPU threads; 0 lets PyTorch choose."
    )
    workers: int = Field(
        default=0, ge=0, le=256, description="Processes that read pictures; 0 reads in this one."
    )
    offline: bool = Field(default=False, description="Never open a network connection.")
    dry_run: bool = Field(
        default=False, description="Say what would be done; load no weights and write nothing."
    )


class WriterSettings(CommonSettings):
    """What every command that writes takes as well."""

    overwrite: bool = Field(default=False, description="Replace output that exists.")
    skip_existing: bool = Field(default=False, description="Leave output that exists as it is.")
    resume: bool = Field(
        default=False, description="Go on where an interrupted synthesis of pictures stopped."
    )

    @model_validator(mode="after")
    def _one_answer_for_existing_output(self) -> Self:
        if self.overwrite and self.skip_existing:
            raise UsageError(
                "--overwrite and --skip-existing contradict each other",
                remedy="give one of them",
            )
        return self


class SynthesizeSettings(WriterSettings):
    """`qtool synthesize images`: calibration pictures made from a classifier alone."""

    model: str = Field(
        min_length=1,
        description="Classifier: an alias, a timm name, a .safetensors file, hf-hub:ID.",
    )
    out: Path = Field(description="Folder for the pictures.")
    count: int = Field(default=32, ge=1, description="Number of pictures.")
    method: SynthesisMethod = Field(default="spdfq", description="How pictures are made.")
    effort: Effort = Field(
        default="standard", description="Budget; standard takes the paper's number of steps."
    )
    steps: int | None = Field(
        default=None, ge=1, description="Optimisation steps; overrides the effort."
    )
    learning_rate: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Learning rate; overrides the effort."
    )
    batch_size: int = Field(default=32, ge=1, description="Pictures optimised together.")
    weights: str = Field(
        default="pretrained", min_length=1, description="pretrained, or a weight file."
    )
    classes: str = Field(
        default="", description="Classes to draw, for example 0-9,17; empty: spread evenly."
    )

    @model_validator(mode="after")
    def _classes_can_be_read(self) -> Self:
        _ = self.class_indices
        return self

    @property
    def class_indices(self) -> tuple[int, ...]:
        """Classes in the order given, each once; empty when the choice is left to the method."""
        indices: dict[int, None] = {}
        for part in filter(None, (part.strip() for part in self.classes.split(","))):
            match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise UsageError(
                    f"classes {self.classes!r} cannot be read at {part!r}",
                    remedy="list numbers and rising ranges, for example 0-9,17",
                )
            indices.update(dict.fromkeys(range(first, last + 1)))
        return tuple(indices)


class QuantizeSettings(WriterSettings):
    """`qtool quantize`: a model to one safetensors file of low-bit integers."""

    model: str = Field(
        min_length=1, description="Model: an alias, a timm name, a .safetensors file, hf-hub:ID."
    )
    bits: Annotated[str, AfterValidator(_checked_bits)] = Field(
        default="w4a4", description="Bits of weights and activations, 2 to 8 each."
    )
    data_free: bool = Field(default=False, description="Synthesize the calibration pictures first.")
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
        """The bits of all layers without a rule of their own."""
        return BitSpec.parse(self.bits)

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
        return Path(f"{safe}-{self.bits}.safetensors")


class EvaluateSettings(CommonSettings):
    """`qtool eval`: accuracy and latency of a model or checkpoint."""

    target: str = Field(min_length=1, description="Checkpoint, or a model as `qtool models` lists.")
    data: Path | None = Field(
        default=None,
        description="Class folders, or pictures with a labels.csv; without it the drawn pictures "
        "that demo models know.",
    )
    baseline: str | None = Field(
        default=None, min_length=1, description="Model or checkpoint to measure beside the target."
    )
    weights: str = Field(
        default="pretrained", min_length=1, description="pretrained, or a weight file."
    )
    count: int = Field(default=1000, ge=1, description="Number of drawn pictures, without --data.")
    limit: int | None = Field(default=None, ge=1, description="Stop after so many pictures.")
    batch_size: int = Field(default=64, ge=1, description="Pictures computed together.")
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the picture kept; otherwise the model's own.",
    )
    latency: bool = Field(
        default=False, description="Time the model as well, and name its backends."
    )
    report: ReportPath = Field(default=None, description="Report to write: .json, .md or .html.")
    minimum: tuple[str, ...] = Field(
        default=(),
        description="METRIC=VALUE that must be reached, else exit 5; for example top1=75.",
    )

    @model_validator(mode="after")
    def _gates_can_be_read(self) -> Self:
        _ = self.gates
        return self

    @property
    def gates(self) -> tuple[tuple[str, float], ...]:
        """`minimum` as pairs of metric and value."""
        return tuple(_gate(text) for text in self.minimum)


class ModelsSettings(CommonSettings):
    """`qtool models`: what can be used."""

    pattern: str = Field(default="*", description="Glob over aliases and architectures.")


class InfoSettings(CommonSettings):
    """`qtool info`: what a checkpoint holds."""

    target: Path = Field(description="Checkpoint written by qtool.")


def _gate(text: str) -> tuple[str, float]:
    metric, _, value = (part.strip() for part in text.partition("="))
    if metric and re.fullmatch(r"-?\d+(\.\d*)?|-?\.\d+", value, re.ASCII):
        return metric, float(value)
    raise UsageError(
        f"{text!r} is not METRIC=VALUE", remedy="name a metric and a number, for example top1=75"
    )
