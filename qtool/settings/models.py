"""Settings of `qtool models` and `qtool info`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from qtool.settings.base import CommonSettings


class ModelsSettings(CommonSettings):
    """`qtool models`: what can be used."""

    pattern: str = Field(default="*", description="Glob over aliases and architectures.")


class InfoSettings(CommonSettings):
    """`qtool info`: what a checkpoint holds."""

    target: Path = Field(description="Checkpoint written by qtool, its folder or hf-hub:ID.")
