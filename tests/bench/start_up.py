"""Processor time from start to help, beside a bare interpreter, in alternation.

    python tests/bench/start_up.py

`--help`, `--version` and the help of a command are meant to take under 0.5 s on a usual machine.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

ROUNDS = 7
BARE = ("-c", "pass")
COMMANDS = {
    "python": BARE,
    "qtool --version": ("-m", "qtool", "--version"),
    "qtool --help": ("-m", "qtool", "--help"),
    "qtool quantize --help": ("-m", "qtool", "quantize", "--help"),
}


def processor_seconds(arguments: tuple[str, ...]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print the median of every command and its ratio to the bare interpreter."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            taken[name].append(processor_seconds(arguments))
    bare = statistics.median(taken["python"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"{name:24} {median:6.3f} s  {median / bare:5.1f} x")


if __name__ == "__main__":
    main()
