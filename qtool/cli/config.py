"""Where settings come from: flag > environment > configuration file > default."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperGroup

from qtool.errors import UsageError
from qtool.settings.base import Settings

ENVIRONMENT: Final = {
    "device": "QTOOL_DEVICE",
    "backend": "QTOOL_BACKEND",
    "offline": "QTOOL_OFFLINE",
    "threads": "QTOOL_THREADS",
}


@dataclass(frozen=True)
class Gathered:
    """Values given somewhere, and what the user called each of them there."""

    values: Mapping[str, Any]
    names: Mapping[str, str]

    def name(self, field: str) -> str:
        """The flag, variable or key a field came from; its flag if it came from nowhere."""
        return self.names.get(field, field)


def command_words(ctx: typer.Context) -> str:
    """The words of the running command, for example `synthesize images`."""
    return ctx.command_path.partition(" ")[2]


def gather(ctx: typer.Context, model: type[Settings]) -> Gathered:
    """Collect what was set for this command, the strongest source last.

    Raises:
        UsageError: The configuration file cannot be read or has keys or tables nobody knows.
    """
    names = _spoken_names(ctx)
    flags = dict(names)
    values: dict[str, Any] = {}
    if ctx.params["config"] is not None:
        path = Path(ctx.params["config"])
        table = read_table(path, command_words(ctx), tables=command_tables(ctx))
        for key, value in table.items():
            field = _field(ctx, model, key)
            if field is None:
                raise _unknown(f"key {key!r}", key, path, sorted(model.model_fields))
            values[field] = tuple(value) if isinstance(value, list) else value
            names[field] = f"{key!r} in {path}"
    for field, variable in ENVIRONMENT.items():
        if field in model.model_fields and os.environ.get(variable):
            values[field], names[field] = os.environ[variable], variable
    for param in ctx.command.params:
        given = ctx.params.get(param.name)
        if param.name in model.model_fields and given not in (None, ()):
            values[param.name], names[param.name] = given, flags[param.name]
    return Gathered(values, names)


def read_table(path: Path, command: str, *, tables: Iterable[str]) -> dict[str, Any]:
    """Read the table of one command, `[synthesize.images]` for `synthesize images`.

    Args:
        path: A TOML file.
        command: The words of the command.
        tables: Dotted names of all tables there may be.

    Raises:
        UsageError: The file cannot be read, or something in it lies outside these tables.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"the configuration {path} is not TOML: {error}") from None
    known = sorted(tables)
    found = dict(_tables(content, known))
    for name, table in found.items():
        if name not in known or not isinstance(table, dict):
            raise _unknown(f"table [{name}]", name, path, known)
    table = found.get(command.replace(" ", "."), {})
    return dict(table)


def _tables(content: Mapping[str, Any], known: Iterable[str]) -> Iterable[tuple[str, Any]]:
    groups = {name.partition(".")[0] for name in known if "." in name}
    for name, value in content.items():
        if name in groups and isinstance(value, dict):
            yield from ((f"{name}.{inner}", table) for inner, table in value.items())
        else:
            yield name, value


def command_tables(ctx: typer.Context) -> list[str]:
    """Dotted names of all commands, which are the tables a configuration may have."""
    root = ctx.find_root().command
    names: list[str] = []
    for name, command in root.commands.items() if isinstance(root, TyperGroup) else ():
        inner = command.commands if isinstance(command, TyperGroup) else {}
        names.extend([f"{name}.{word}" for word in inner] or [name])
    return names


def to_toml(settings: Settings, table: str, *, missing: Iterable[str] = ()) -> str:
    """Effective settings as one TOML table; what has no value is a comment.

    Args:
        settings: What to print.
        table: Dotted name of the table.
        missing: Fields that still need a value.
    """
    lines = [f"[{table}]"]
    absent = set(missing)
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        lines.append(f"# {field.description}")
        if name in absent:
            lines.append(f"# {name} = (required)")
        elif value is None:
            lines.append(f"# {name} = (not set)")
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(inner) for inner in value)}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _spoken_names(ctx: typer.Context) -> dict[str, str]:
    """Each parameter as the user writes it: its longest flag, or the name of an argument."""
    names: dict[str, str] = {}
    for param in ctx.command.params:
        flags = [] if param.param_type_name == "argument" else param.opts
        names[param.name] = max(flags, key=len, default=param.metavar or param.name)
    return names


def _field(ctx: typer.Context, model: type[Settings], key: str) -> str | None:
    """The field a key means: its name, or its flag without dashes in front."""
    wanted = key.replace("-", "_")
    for param in ctx.command.params:
        flags = {opt.lstrip("-").replace("-", "_") for opt in param.opts}
        if param.name in model.model_fields and wanted in flags:
            return param.name
    return wanted if wanted in model.model_fields else None


def _unknown(what: str, name: str, path: Path, known: list[str]) -> UsageError:
    near = difflib.get_close_matches(name, known) or difflib.get_close_matches(
        name.replace("-", "_"), known
    )
    remedy = f"near names: {', '.join(near)}" if near else f"known: {', '.join(known)}"
    return UsageError(f"{what} in {path} is unknown", remedy=remedy)
