"""What a command found, as JSON, Markdown or one HTML file that needs nothing else.

Only text is made here; whoever asked for a report writes it.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final, Literal

from qtool.errors import ItemsFailedError, UsageError

SCHEMA: Final = 1
Status = Literal["ok", "partial", "failed", "planned"]


@dataclass(frozen=True)
class Table:
    """Rows under column names; a cell holds text, a number, a truth value, a path or None."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A PNG file's bytes and what they show."""

    title: str
    png: bytes


@dataclass(frozen=True)
class Chart:
    """Lines over named steps, drawn into the HTML report.

    Attributes:
        title: What it shows.
        steps: Names along the horizontal axis.
        lines: Values per line, one for each step; None leaves a gap.
        unit: What the values are.
    """

    title: str
    steps: Sequence[str]
    lines: Mapping[str, Sequence[float | None]]
    unit: str


@dataclass(frozen=True)
class Result:
    """What a command did, in the same form for every command.

    Args:
        command: The words after `qtool`, for example `synthesize images`.
        status: `ok`, `partial` (some items failed), `failed`, or `planned` (a dry run).
        items: One mapping per input or output. Keys with a meaning: `path` (what it is about),
            `output` (the file written), `status` (`ok`, `failed` or `skipped`) and `error`.
        summary: Facts about the whole. `error`, `remedy` and `exit_code` say why it failed.
        tables: For people; the same facts should be in `items` or `summary`.
        pictures: For the HTML report.
        charts: For the HTML report; the same numbers should be in a table.
    """

    command: str
    status: Status = "ok"
    items: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    charts: Sequence[Chart] = ()

    @property
    def exit_code(self) -> int:
        """0 when all is well, 3 when some items failed, else what the summary says, or 1."""
        if self.status == "failed":
            return int(self.summary.get("exit_code", 1))
        return ItemsFailedError.exit_code if self.status == "partial" else 0

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The summary as pairs of name and text; inner mappings become dotted names."""
        return list(_flat(self.summary))

    def to_dict(self) -> dict[str, Any]:
        """The five keys of the JSON form, holding nothing but JSON types."""
        return {
            "schema": SCHEMA,
            "command": self.command,
            "status": self.status,
            "items": [_plain(item) for item in self.items],
            "summary": _plain(self.summary),
        }

    def to_json(self) -> str:
        """One JSON object, in ASCII so that it passes any terminal and any file."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown; pictures are left out."""
        parts = [f"# qtool {_markdown(self.command)}", f"Status: {self.status}"]
        for table in self._all_tables():
            if table.title:
                parts.append(f"## {_markdown(table.title)}")
            parts.append(_markdown_table(table))
        return "\n\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One file without scripts or links, light and dark, readable on a phone."""
        title = html.escape(f"qtool {self.command}")
        body = "\n".join(
            [
                f"<h1>{title}</h1>",
                f'<p class="status {self.status}">{self.status}</p>',
                *(_html_chart(chart) for chart in self.charts),
                *(_html_table(table) for table in self._all_tables()),
                *(_html_picture(picture) for picture in self.pictures),
            ]
        )
        return _PAGE.format(title=title, style=_STYLE, body=body)

    def to_text(self, suffix: str) -> str:
        """The report whose file name ends in `.json`, `.md` or `.html`.

        Raises:
            UsageError: The suffix is none of them.
        """
        writers = {".json": self.to_json, ".md": self.to_markdown, ".html": self.to_html}
        writer = writers.get(suffix.lower())
        if writer is None:
            raise UsageError(
                f"there is no report of kind {suffix!r}", remedy=f"choose {', '.join(writers)}"
            )
        return writer()

    def _all_tables(self) -> Iterable[Table]:
        if self.summary:
            yield Table("Summary", ("fact", "value"), self.facts)
        yield from self.tables
        if self.items:
            columns = tuple(dict.fromkeys(key for item in self.items for key in item))
            yield Table(
                "Items", columns, [[item.get(name) for name in columns] for item in self.items]
            )


def cell(value: object) -> str:
    """A value as people read it: four digits, `yes` and `no`, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(cell(inner) for inner in value)
    return str(value)


def is_number(value: object) -> bool:
    """Whether a cell belongs on the right side of its column."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", cell(value)


def _plain(value: object) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Iterable):
        return [_plain(inner) for inner in value]
    return str(value)


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*\[\]<>|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return re.sub(r"\s+", " ", text)


def _markdown_table(table: Table) -> str:
    rows = [[_markdown(cell(value)) for value in row] for row in table.rows]
    marks = ["--:" if _all_numbers(table, index) else ":--" for index in range(len(table.columns))]
    lines = [[_markdown(name) for name in table.columns], marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _all_numbers(table: Table, column: int) -> bool:
    values = [row[column] for row in table.rows if row[column] is not None]
    return bool(values) and all(is_number(value) for value in values)


def _html_table(table: Table) -> str:
    def line(tag: str, values: Iterable[Any]) -> str:
        cells = (
            f"<{tag}{' class=n' if is_number(value) else ''}>{html.escape(cell(value))}</{tag}>"
            for value in values
        )
        return f"<tr>{''.join(cells)}</tr>"

    heading = f"<h2>{html.escape(table.title)}</h2>\n" if table.title else ""
    rows = "\n".join(line("td", row) for row in table.rows)
    return (
        f'{heading}<div class="scroll" tabindex="0"><table>\n<thead>{line("th", table.columns)}'
        f"</thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


_CHART_WIDTH, _CHART_HEIGHT, _CHART_MARGIN = 640, 280, 48
_DASHES = ("none", "6 4", "2 3", "8 3 2 3")


def _html_chart(chart: Chart) -> str:
    """A chart as inline SVG: points joined by lines, an axis of at most five numbers."""
    values = [value for line in chart.lines.values() for value in line if value is not None]
    if not values or not chart.steps:
        return ""
    low, high = min(values), max(values)
    room = (high - low or 1.0) * 0.08
    low, high = low - room, high + room

    def x_of(index: int) -> float:
        inner = _CHART_WIDTH - 2 * _CHART_MARGIN
        return _CHART_MARGIN + inner * (index + 0.5) / len(chart.steps)

    def y_of(value: float) -> float:
        inner = _CHART_HEIGHT - 2 * _CHART_MARGIN
        return _CHART_MARGIN + inner * (high - value) / (high - low)

    left, right, foot = _CHART_MARGIN, _CHART_WIDTH - _CHART_MARGIN, _CHART_HEIGHT - _CHART_MARGIN
    parts = []
    for quarter in range(5):
        value = low + (high - low) * quarter / 4
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(
            f'<text class="end" x="{left - 6}" y="{y + 4:.1f}">{html.escape(cell(value))}</text>'
        )
    for index, step in enumerate(chart.steps):
        parts.append(f'<text x="{x_of(index):.1f}" y="{foot + 20}">{html.escape(step)}</text>')
    for number, (name, line) in enumerate(chart.lines.items()):
        points = [(x_of(i), y_of(v)) for i, v in enumerate(line) if v is not None]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = _DASHES[number % len(_DASHES)]
        parts.append(f'<path class="line" stroke-dasharray="{dash}" d="M{path}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        if points:
            x, y = points[-1]
            parts.append(f'<text x="{x:.1f}" y="{y - 9:.1f}">{html.escape(name)}</text>')
    title = html.escape(f"{chart.title} ({chart.unit})")
    size = f"0 0 {_CHART_WIDTH} {_CHART_HEIGHT}"
    return (
        f'<figure><svg role="img" aria-label="{title}" viewBox="{size}">{"".join(parts)}</svg>'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _html_picture(picture: Picture) -> str:
    title = html.escape(picture.title)
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{data}">'
        f"<figcaption>{title}</figcaption></figure>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5b626b; --paper: #ffffff;
  --line: #d5d9de; --good: #176b37; --bad: #a3221c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #a0a8b1;
  --paper: #16181b; --line: #3a4047; --good: #6fce93; --bad: #ff9088; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 60rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.status { margin: .25rem 0 0; color: var(--faint); }
.status.ok { color: var(--good); }
.status.failed, .status.partial { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
.n { text-align: right; white-space: nowrap; }
figure { margin: 2rem 0 0; }
img, svg { max-width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 12px; text-anchor: middle; }
svg text.end { text-anchor: end; }
svg .grid { stroke: var(--line); }
svg .line { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg circle { fill: var(--ink); }
figcaption { color: var(--faint); font-size: .9rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
