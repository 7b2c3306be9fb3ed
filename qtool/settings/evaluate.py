"""Settings of `qtool eval`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from qtool.errors import UsageError
from qtool.quant.bits import parse_width
from qtool.settings.base import CommonSettings, ReportPath


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
    minimum: tuple[str, ...] = Field(
        default=(),
        description="METRIC=VALUE that must be reached, else exit 5; for example top1=75.",
    )

    @model_validator(mode="after")
    def _gates_can_be_read(self) -> Self:
        _ = self.gates
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
