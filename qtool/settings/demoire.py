"""Settings of `qtool demoire`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from qtool.errors import UsageError
from qtool.settings.base import WriterSettings

BitDepth = Literal["keep", "8", "16"]
Format = Literal["keep", "jpg", "png", "tiff", "webp", "avif", "heic", "bmp"]
MetadataPolicy = Literal["keep", "strip", "no-gps"]
OnError = Literal["continue", "stop"]
Network = Literal["bandgate", "esdnet_s", "esdnet", "esdnet_l", "mbcnn"]
Head = Literal["sigmoid", "mixed", "linear"]
Transform = Literal["relu_product", "signed"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class DemoireSettings(WriterSettings):
    """`qtool demoire`: moire out of photographs of screens."""

    paths: tuple[str, ...] = Field(
        default=(), description="Photographs, or folders of them; - reads one from stdin."
    )
    files_from: str | None = Field(
        default=None,
        min_length=1,
        description="List of photographs, a line each or separated by NUL; - reads stdin.",
    )
    out: str = Field(
        min_length=1,
        description="Folder for the results; for one photograph a file, or - for stdout.",
    )
    model: Network | None = Field(
        default=None, description="Network; otherwise the one the weights are for."
    )
    weights: Path | None = Field(
        default=None,
        description="Weights: a file of qtool, quantized or not, or a published checkpoint (.pth, "
        ".tar, .safetensors). Otherwise the small network that comes with qtool.",
    )
    head: Head | None = Field(
        default=None,
        description="Where a sigmoid ends MBCNN; checkpoints do not say [default: sigmoid].",
    )
    transform: Transform | None = Field(
        default=None,
        description="MBCNN's cosine transform; checkpoints do not say [default: relu_product].",
    )
    recursive: bool = Field(default=True, description="Look into folders inside folders.")
    include: tuple[str, ...] = Field(
        default=(), description="Take only files of folders that match; repeat for more."
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="Leave out files of folders that match; repeat for more."
    )
    output_format: Format = Field(default="keep", description="Format of the results.")
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Quality of lossy results; otherwise the source's own tables, at least 90.",
    )
    bit_depth: BitDepth = Field(default="keep", description="Bits per colour.")
    metadata: MetadataPolicy = Field(
        default="keep",
        description="keep everything; no-gps takes out the place; strip leaves profile and "
        "orientation.",
    )
    first_frame: bool = Field(
        default=False, description="Take the first of several frames or pages."
    )
    tile: int | None = Field(
        default=None,
        ge=0,
        description="Side of tiles in pixels, 0 for none; otherwise as memory allows.",
    )
    overlap: int | None = Field(
        default=None,
        ge=0,
        description="Pixels that tiles share; otherwise up to an eighth of a tile.",
    )
    max_memory: str | None = Field(
        default=None, description="Memory that may be taken, for example 2G or 800M."
    )
    strength: float = Field(
        default=1.0, ge=0, le=1, description="Share of the change that is made, 0 to 1."
    )
    keep_colour: bool = Field(
        default=True,
        description="Keep the tone of the photograph, or restore the screen's as the network "
        "sees it.",
    )
    mask: Path | None = Field(
        default=None, description="Grey picture of the photograph's size; white is restored."
    )
    force: bool = Field(default=False, description="Restore photographs that show no moire too.")
    preview: Path | None = Field(
        default=None, description="Page to write with before and after of each photograph (.html)."
    )
    on_error: OnError = Field(
        default="continue", description="What to do when a photograph cannot be restored."
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        _ = self.memory_bytes
        if self.resume:
            raise UsageError(
                "--resume is not for photographs",
                remedy="--skip-existing goes on where an interrupted run stopped",
            )
        if self.tile is not None and 0 < self.tile < 64:
            raise UsageError(
                f"--tile {self.tile} is too small", remedy="give 64 or more, or 0 for none"
            )
        if self.preview is not None and self.preview.suffix.lower() not in (".html", ".htm"):
            raise UsageError(
                f"the preview {str(self.preview)!r} is a page", remedy="let its name end in .html"
            )
        return self

    @property
    def memory_bytes(self) -> int | None:
        """`max_memory` in bytes."""
        if self.max_memory is None:
            return None
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", self.max_memory.lower())
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
        if size < 2**26:
            raise UsageError(
                f"--max-memory {self.max_memory!r} is no amount of memory, or less than 64M",
                remedy="give a number and a unit, for example 2G",
            )
        return size
