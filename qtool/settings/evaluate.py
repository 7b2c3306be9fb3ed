"""Settings of `qtool eval`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from qtool.errors import UsageError
from qtool.quant.bits import parse_width
from qtool.settings.base import CommonSettings, ReportPath

FidelityProtocol = Literal["plain", "uhdm", "fhdmi", "tip2018", "lcdmoire"]
FidelityMetric = Literal[
    "psnr", "ssim", "psnr_aligned", "moire_luma", "moire_chroma", "lpips", "do_no_harm"
]


class EvaluateSettings(CommonSettings):
    """`qtool eval`: accuracy and latency of a model, or fidelity of restored pictures."""

    target: str = Field(
        min_length=1,
        description="Checkpoint, its folder or hf-hub:ID; a model as `qtool models` lists; or with "
        "--reference a folder of results.",
    )
    data: Path | None = Field(
        default=None,
        description="Class folders, or pictures with a labels.csv; without it the drawn pictures "
        "that demo models know.",
    )
    baseline: str | None = Field(
        default=None,
        min_length=1,
        description="Model or checkpoint to measure beside the target, or none; with --reference "
        "the folder that the results were made from.",
    )
    reference: Path | None = Field(
        default=None, description="Folder of the pictures that results should be like."
    )
    protocol: FidelityProtocol = Field(
        default="plain", description="How PSNR and SSIM are computed, after the data set's name."
    )
    metric: tuple[FidelityMetric, ...] = Field(
        default=(),
        description="psnr, ssim, psnr_aligned, moire_luma, moire_chroma, do_no_harm or lpips; "
        "repeat for more, otherwise all there is data for but lpips.",
    )
    bits: tuple[str, ...] = Field(
        default=(),
        description="Width to run a switchable checkpoint at, 4 or w4a4; repeat for a table.",
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
    overwrite: bool = Field(default=False, description="Replace a report that exists.")
    minimum: tuple[str, ...] = Field(
        default=(),
        description="METRIC=VALUE that must be reached, else exit 5; for example top1=75.",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _ = self.gates
        if self.reference is None and self.metric:
            raise UsageError("--metric needs --reference", remedy="name the folder of targets")
        if "do_no_harm" in self.metric and self.baseline is None:
            raise UsageError(
                "do_no_harm compares results with what they were made from",
                remedy="name that folder with --baseline",
            )
        return self

    @model_validator(mode="after")
    def _widths_can_be_read(self) -> Self:
        _ = self.widths
        return self

    @property
    def widths(self) -> tuple[str, ...]:
        """`bits` as names such as w4a8, each once, in the order given."""
        return tuple(dict.fromkeys(str(parse_width(width)) for width in self.bits))

    @property
    def gates(self) -> tuple[tuple[str, float], ...]:
        """`minimum` as pairs of metric and value."""
        return tuple(_gate(text) for text in self.minimum)


def _gate(text: str) -> tuple[str, float]:
    metric, _, value = (part.strip() for part in text.partition("="))
    if metric and re.fullmatch(r"-?\d+(\.\d*)?|-?\.\d+", value, re.ASCII):
        return metric, float(value)
    raise UsageError(
        f"{text!r} is not METRIC=VALUE", remedy="name a metric and a number, for example top1=75"
    )
