"""Progress on stderr: a bar on a terminal, a plain line every ten per cent elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

ProgressMode = Literal["bar", "lines", "off"]


def progress_mode(wanted: bool | None, *, quiet: bool, terminal: bool) -> ProgressMode:
    """Choose: `--no-progress` and `--quiet` silence it, `--progress` wins over `--quiet`."""
    if wanted is False or (quiet and not wanted):
        return "off"
    return "bar" if terminal else "lines"


class ProgressReporter:
    """The callback that is handed down to `qtool.api`; a context manager while work runs.

    Args:
        console: The stderr console, shared with the log handler.
        mode: How to show it.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        console: Console,
        mode: ProgressMode,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._mode = mode
        self._clock = clock
        self._stage = ""
        self._started = 0.0
        self._first_done = 0
        self._tenths = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._mode == "bar":
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", markup=False),
                _PaceColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=self._console,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=4,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, so that results can be printed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._mode = "off"

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` steps of `stage` are finished."""
        if self._mode == "off" or total <= 0:
            return
        done = min(done, total)
        fresh = stage != self._stage
        if fresh:
            self._stage, self._started, self._first_done = stage, self._clock(), done
        if self._bar is not None:
            if fresh or self._task is None:
                self._task = self._bar.add_task(stage, total=total, note=note)
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif self._mode == "lines":
            tenths = done * 10 // total
            if tenths > (0 if fresh else self._tenths):
                self._print_line(done, total, note)
            self._tenths = tenths

    def _print_line(self, done: int, total: int, note: str) -> None:
        line = f"{self._stage}: {100 * done // total} % ({done}/{total})"
        seconds, steps = self._clock() - self._started, done - self._first_done
        if seconds > 0 and steps > 0:
            line += f", {pace(steps / seconds, (total - done) * seconds / steps)}"
        self._console.print(Text(f"{line}, {note}" if note else line), soft_wrap=True)


def pace(rate: float, seconds_left: float) -> str:
    """Rate in steps per second and time left, for example `3.2/s, 1 min 20 s left`."""
    speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return f"{speed}, {duration(seconds_left)} left" if seconds_left > 0 else speed


def duration(seconds: float) -> str:
    """Seconds as people say them, in at most two units."""
    whole = max(round(seconds), 1)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


class _PaceColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        if not rate:
            return Text("")
        return Text(pace(rate, 0 if task.finished else task.time_remaining or 0), style="cyan")
