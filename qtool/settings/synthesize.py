"""Settings of `qtool synthesize`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from qtool.errors import UsageError
from qtool.settings.base import Effort, WriterSettings

SynthesisMethod = Literal["spdfq", "psaq", "noise"]
SynthesisPart = Literal["alignment", "patches", "soft-labels", "spectrum"]


class SynthesizeSettings(WriterSettings):
    """`qtool synthesize images`: calibration pictures made from a classifier alone."""

    model: str = Field(
        min_length=1,
        description="Classifier: an alias, a timm name (NAME,KEY=VALUE adds arguments), a "
        ".safetensors file, hf-hub:ID.",
    )
    out: Path = Field(description="Folder for the pictures.")
    count: int = Field(default=32, ge=1, description="Number of pictures.")
    method: SynthesisMethod = Field(default="spdfq", description="How pictures are made.")
    effort: Effort = Field(default="standard", description="Budget; max is the paper's.")
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

    ablate: tuple[SynthesisPart, ...] = Field(
        default=(),
        description="Leave out a part of spdfq: alignment (of attention with priors), patches "
        "(blown up, with classes of their own), soft-labels, spectrum (of photographs, for the "
        "noise to start from); repeat for more.",
    )

    @model_validator(mode="after")
    def _parts_belong_to_the_method(self) -> Self:
        if self.ablate and self.method != "spdfq":
            raise UsageError(
                f"{self.method} has no {self.ablate[0]} to leave out",
                remedy="take --method spdfq, or leave out --ablate",
            )
        return self

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
