"""Help: examples first, defaults from the settings, the same options everywhere."""

import re
import shlex

import pytest
import typer.core

from qtool.cli.commands import spoken
from qtool.cli.program import program
from qtool.settings.base import OutputSettings, WriterSettings
from qtool.settings.demoire import DemoireSettings
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.models import InfoSettings, ModelsSettings
from qtool.settings.moire import MoireSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.switch_bits import SwitchBitsSettings
from qtool.settings.synthesize import SynthesizeSettings
from qtool.settings.train import TrainDemoireSettings

COMMANDS = {
    "demoire": DemoireSettings,
    "synthesize images": SynthesizeSettings,
    "synthesize moire": MoireSettings,
    "train demoire": TrainDemoireSettings,
    "quantize": QuantizeSettings,
    "switch-bits": SwitchBitsSettings,
    "eval": EvaluateSettings,
    "models": ModelsSettings,
    "info": InfoSettings,
}
COMMON = [
    "--device",
    "--dtype",
    "--backend",
    "--seed",
    "--threads",
    "--workers",
    "--offline",
    "--config",
    "--dump-config",
    "--json",
    "-q",
    "--quiet",
    "-v",
    "--verbose",
    "--color",
    "--progress",
    "-n",
    "--dry-run",
    "--log-file",
]
OUTPUT = ["-o", "--out", "--overwrite", "--skip-existing"]


def command_of(words):
    command = program()
    for word in words.split():
        assert isinstance(command, typer.core.TyperGroup)
        command = command.commands[word]
    return command


def test_the_table_names_every_command():
    root = program()
    names = []
    for name, command in root.commands.items():
        inner = command.commands if isinstance(command, typer.core.TyperGroup) else {}
        names += [f"{name} {word}" for word in inner] or [name]
    assert sorted(names) == sorted(COMMANDS)


def test_only_the_commands_that_are_asked_for_are_imported():
    root = program(["quantize", "demo_vit"])
    assert {param.name for param in root.commands["quantize"].params} > {"bits", "seed"}
    assert root.commands["eval"].params == []
    assert spoken(["synthesize"]) == set()
    assert spoken(["synthesize", "-q", "images"]) == {"synthesize"}


@pytest.mark.parametrize(("words", "settings"), COMMANDS.items())
def test_every_command_has_the_common_options(words, settings):
    flags = {flag for param in command_of(words).params for flag in param.opts}
    assert set(COMMON) <= flags
    assert (set(OUTPUT) <= flags) is issubclass(settings, OutputSettings)
    assert ("--resume" in flags) is issubclass(settings, WriterSettings)


@pytest.mark.parametrize(("words", "settings"), COMMANDS.items())
def test_every_setting_can_be_given_and_no_default_is_written_twice(words, settings):
    params = {param.name: param for param in command_of(words).params}
    assert set(settings.model_fields) <= set(params)
    for name, field in settings.model_fields.items():
        assert params[name].default is None
        assert (field.description or "").replace("[", r"\[") in params[name].help


@pytest.mark.parametrize(("words", "settings"), COMMANDS.items())
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_starts_with_examples_and_shows_defaults(
    qtool_run, monkeypatch, words, settings, flag
):
    monkeypatch.setenv("COLUMNS", "200")
    ran = qtool_run(*words.split(), flag)
    assert (ran.code, ran.err) == (0, "")
    lines = [line.strip() for line in ran.out.splitlines() if line.strip()]
    assert lines[0].startswith(f"Usage: qtool {words} ")
    assert all(line.startswith(f"qtool {words}") for line in lines[1:3])
    for panel in ("Options", "Machine", "Talk and configuration"):
        assert f"─ {panel} ─" in ran.out
    for field in settings.model_fields.values():
        if isinstance(field.default, str | int) and field.default not in ("", True, False):
            assert f"[default: {field.default}]" in ran.out


@pytest.mark.parametrize("words", COMMANDS)
def test_examples_are_true(qtool_run, words):
    examples = re.findall(r"^qtool .*$", command_of(words).help, re.MULTILINE)
    assert 2 <= len(examples) <= 4
    for example in examples:
        assert len(example) < 78
        ran = qtool_run(*shlex.split(example)[1:], "--dump-config")
        assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize("words", ["", "synthesize", "train"])
def test_group_examples_are_true(qtool_run, words):
    examples = re.findall(r"^qtool .*$", command_of(words).help, re.MULTILINE)
    assert 2 <= len(examples) <= 4
    for example in examples:
        assert qtool_run(*shlex.split(example)[1:], "--dump-config").code == 0
