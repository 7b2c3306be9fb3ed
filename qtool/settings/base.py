"""What the settings of every command share.

`qtool.settings` has one pydantic model per command and is the only place where a default value is
written. The command line takes its help texts from the descriptions there. Wrong values raise
`UsageError` when a model is made through `Settings.build`, which every command does.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from qtool.errors import UsageError
from qtool.models.registry import WEIGHTS_FILE

Backend = Literal["auto", "reference", "cpu", "triton"]
DType = Literal["float32"]
Effort = Literal["quick", "standard", "max"]

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


def _checked_onnx(value: Path | None) -> Path | None:
    if value is None or value.suffix.lower() == ".onnx":
        return value
    raise UsageError(f"{str(value)!r} is no name of an ONNX file", remedy="let it end in .onnx")


def _checked_out(value: Path | str | None) -> Path | str | None:
    if value == "":
        raise UsageError("the name of the output is empty", remedy="name a file or a folder")
    return value if value is None or str(value).endswith("/") else Path(value)


def hub_folder(out: Path | str | None) -> Path | None:
    """The folder that an output names, by a slash at its end or by being one; None for a file."""
    if out is None or not (os.fspath(out).endswith("/") or os.path.isdir(out)):
        return None
    return Path(out)


def checkpoint_in(out: Path | str) -> Path:
    """The checkpoint that an output names: a file, or the one in a hub folder."""
    folder = hub_folder(out)
    return Path(out) if folder is None else folder / WEIGHTS_FILE


Device = Annotated[str, AfterValidator(_checked_device)]
OutPath = Annotated[Path | str | None, AfterValidator(_checked_out)]
"""A file, or a folder if it ends in a slash, which a `Path` would forget."""

OnnxPath = Annotated[Path | None, AfterValidator(_checked_onnx)]
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
        default=0,
        ge=0,
        le=256,
        description="Processes that read or simulate pictures; 0 does so in this one.",
    )
    offline: bool = Field(default=False, description="Never open a network connection.")
    dry_run: bool = Field(
        default=False, description="Say what would be done; load no weights and write nothing."
    )


class OutputSettings(CommonSettings):
    """What every command that writes takes as well."""

    overwrite: bool = Field(default=False, description="Replace output that exists.")
    skip_existing: bool = Field(default=False, description="Leave output that exists as it is.")

    @model_validator(mode="after")
    def _one_answer_for_existing_output(self) -> Self:
        if self.overwrite and self.skip_existing:
            raise UsageError(
                "--overwrite and --skip-existing contradict each other",
                remedy="give one of them",
            )
        return self


class WriterSettings(OutputSettings):
    """What every command takes whose work may be long."""

    resume: bool = Field(
        default=False, description="Go on where an interrupted synthesis or training stopped."
    )
