"""Settings of `qtool train demoire`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from qtool.errors import UsageError
from qtool.settings.base import WriterSettings

DemoireTraining = Literal["bandgate", "esdnet_s", "esdnet", "esdnet_l", "mbcnn"]


class TrainDemoireSettings(WriterSettings):
    """`qtool train demoire`: a demoire network from pairs, or from unpaired photographs."""

    pairs: Path | None = Field(
        default=None, description="Folder with the sub-folders moire and clean, of equal names."
    )
    out: Path = Field(description="Weight file to write.")
    moire: Path | None = Field(
        default=None, description="Folder of moire photographs; their bands are laid on pictures."
    )
    clean: Path | None = Field(default=None, description="Folder of ordinary pictures.")
    generator: Path | None = Field(
        default=None,
        description="Moire generator from `synthesize moire`, to paint pairs while training.",
    )
    model: DemoireTraining = Field(default="bandgate", description="Network to train.")
    width: int | None = Field(
        default=None,
        ge=8,
        le=256,
        description="Channels of bandgate or esdnet_s, in place of theirs.",
    )
    init: str = Field(
        default="bundled",
        min_length=1,
        description="Start from: bundled, none, or a weight file.",
    )
    steps: int = Field(default=20_000, ge=1, description="Training steps.")
    budget: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Minutes that all of it may take, instead of --steps.",
    )
    batch_size: int = Field(default=4, ge=1, le=1024, description="Samples a step.")
    crop: int = Field(
        default=128, ge=64, le=1024, multiple_of=64, description="Side of the samples in pixels."
    )
    learning_rate: float = Field(
        default=2e-4, gt=0, le=0.1, allow_inf_nan=False, description="Highest learning rate."
    )
    save_every: int = Field(
        default=200, ge=1, description="Steps between measurements, at which work is also saved."
    )

    @field_validator("out")
    @classmethod
    def _a_weight_file(cls, value: Path) -> Path:
        if value.suffix.lower() == ".safetensors":
            return value
        raise UsageError(
            f"{value} does not end in .safetensors", remedy=f"give -o {value}.safetensors"
        )

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> Self:
        if self.pairs is None and (self.moire is None or self.clean is None):
            raise UsageError(
                "there is nothing to learn from",
                remedy="give a folder of PAIRS, or --moire DIR and --clean DIR",
            )
        return self

    @model_validator(mode="after")
    def _a_generator_has_photographs(self) -> Self:
        if self.generator is not None and (self.moire is None or self.clean is None):
            raise UsageError(
                "--generator paints the bands of photographs on ordinary pictures",
                remedy="give --moire DIR and --clean DIR as well",
            )
        return self
