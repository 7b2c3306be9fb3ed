"""Settings of `qtool synthesize moire`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from qtool.errors import UsageError
from qtool.settings.base import WriterSettings

MoireTone = Literal["capture", "screen"]


class MoireSettings(WriterSettings):
    """`qtool synthesize moire`: pairs of pictures with and without moire."""

    out: Path = Field(description="Folder for the pairs.")
    clean: Path | None = Field(default=None, description="Folder of ordinary pictures.")
    moire: Path | None = Field(
        default=None, description="Folder of moire photographs, of any other scenes."
    )
    simulate: bool = Field(
        default=False,
        description="Simulate screen and camera; needs no photographs with moire.",
    )
    count: int = Field(default=200, ge=1, le=1_000_000, description="Number of pairs.")
    patch_size: int = Field(
        default=192, ge=64, le=1024, multiple_of=4, description="Side of the pairs in pixels."
    )
    pages: float = Field(
        default=0.3, ge=0, le=1, description="Share of drawn pages and windows with --simulate."
    )
    tone: MoireTone = Field(
        default="capture",
        description="Colours of the clean side with --simulate: of the capture, or of the screen.",
    )
    groups: Literal[1, 2, 4] = Field(
        default=4, description="Groups of like moire; fewer are made when there are few patches."
    )
    steps: int = Field(default=20_000, ge=1, description="Training steps of each group.")
    budget: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Minutes to train for in all, instead of --steps.",
    )
    batch_size: int = Field(default=1, ge=1, le=1024, description="Patches a step.")
    width: int = Field(
        default=128, ge=8, le=512, multiple_of=2, description="Channels of the moire generator."
    )
    denoise: bool = Field(default=True, description="Leave out pairs whose content is damaged.")
    generator: Path | None = Field(
        default=None, description="Trained generator to use instead of training one."
    )
    save_generator: Path | None = Field(
        default=None, description="Write the trained generator to this file."
    )

    @model_validator(mode="after")
    def _one_source_of_moire(self) -> Self:
        if self.simulate:
            given = [
                f"--{name.replace('_', '-')}"
                for name in ("moire", "generator", "save_generator")
                if getattr(self, name) is not None
            ]
            if given:
                raise UsageError(
                    f"--simulate and {given[0]} contradict each other", remedy="give one of them"
                )
        return self

    @model_validator(mode="after")
    def _photographs_to_learn_from(self) -> Self:
        if not self.simulate and (self.moire is None or self.clean is None):
            raise UsageError(
                "learning moire needs photographs with it and pictures without it",
                remedy="give --moire DIR and --clean DIR, or --simulate",
            )
        return self
