"""What commands there are: their words, where their code lies, and one sentence about each.

Nothing is imported for it, so that the overview and completion stay quick however many commands
there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple


class Command(NamedTuple):
    """One command.

    Attributes:
        words: What people type after `qtool`.
        module: The module of `qtool.cli` that registers it.
        summary: One sentence.
    """

    words: str
    module: str
    summary: str


class Group(NamedTuple):
    """A word under which commands are gathered.

    Attributes:
        name: The word.
        summary: One sentence.
        examples: Lines of shell that work.
    """

    name: str
    summary: str
    examples: Sequence[str]


COMMANDS: Final = (
    Command(
        "synthesize images",
        "synthesize",
        "Make calibration pictures from a classifier alone, without any data.",
    ),
    Command(
        "synthesize moire",
        "synthesize",
        "Make pairs of pictures with and without moire, to train a demoire network on.",
    ),
    Command(
        "train demoire",
        "train",
        "Train a demoire network on pairs, or on photographs of your own screen.",
    ),
    Command(
        "quantize",
        "quantize",
        "Quantize a model to low-bit integers and write one safetensors file.",
    ),
    Command(
        "switch-bits",
        "switch_bits",
        "Choose the widths at which a switchable checkpoint runs.",
    ),
    Command(
        "demoire",
        "demoire",
        "Take moire out of photographs of screens; metadata, depth and profile stay.",
    ),
    Command(
        "eval",
        "evaluate",
        "Measure accuracy and latency of a model, or how good restored pictures are.",
    ),
    Command("models", "models", "List the models that can be used, with size, licence and paper."),
    Command(
        "info", "models", "Describe a checkpoint from its header, without reading the weights."
    ),
)

GROUPS: Final = (
    Group(
        "synthesize",
        "Make training or calibration pictures.",
        (
            "qtool synthesize images demo_vit -o pictures/",
            "qtool synthesize images vit_b -o pictures/ --count 64",
            "qtool synthesize moire --simulate --clean photos/ -o pairs/",
        ),
    ),
    Group(
        "train",
        "Train networks on your own pictures.",
        (
            "qtool train demoire --moire screen/ --clean photos/ -o mine.safetensors",
            "qtool train demoire pairs/ --init none -o new.safetensors",
        ),
    ),
)

SUMMARIES: Final = {command.words: command.summary for command in COMMANDS}


def spoken(words: Iterable[str]) -> set[str]:
    """The modules of the commands that these words may mean."""
    said = set(words)
    return {command.module for command in COMMANDS if said.issuperset(command.words.split())}
