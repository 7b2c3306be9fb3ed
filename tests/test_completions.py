"""The files in completions/ and what shells are told."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.core

from qtool.cli.app import main
from qtool.cli.program import program
from qtool.models.demoire import NETWORKS
from qtool.models.registry import MODELS

ROOT = Path(__file__).resolve().parent.parent
FILES = {"bash": "qtool.bash", "zsh": "_qtool", "fish": "qtool.fish"}


def all_commands():
    """Words and command of everything that runs."""
    found = []

    def walk(words, command):
        if isinstance(command, typer.core.TyperGroup):
            for name, inner in command.commands.items():
                walk([*words, name], inner)
        else:
            found.append((" ".join(words), command))

    walk([], program())
    return found


@pytest.fixture
def complete(monkeypatch, capsys):
    """What bash is told after `qtool LINE`, whose last word is being typed."""

    def run(line):
        words = ["qtool", *line.split(" ")]
        monkeypatch.setenv("_QTOOL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert main([]) == 0
        return capsys.readouterr().out.split()

    return run


@pytest.mark.parametrize(("shell", "name"), FILES.items())
def test_files_equal_a_fresh_generation(monkeypatch, capsys, shell, name):
    monkeypatch.setenv("_QTOOL_COMPLETE", f"source_{shell}")
    assert main([]) == 0
    assert capsys.readouterr().out == (ROOT / "completions" / name).read_text()


def test_zsh_finds_its_command_in_the_first_line():
    text = (ROOT / "completions" / "_qtool").read_text()
    assert text.splitlines()[0] == "#compdef qtool"


@pytest.mark.parametrize(("words", "command"), all_commands(), ids=lambda value: str(value))
def test_every_option_of_every_command_completes(complete, words, command):
    offered = set(complete(f"{words} -"))
    for param in command.params:
        if param.param_type_name == "option":
            assert {*param.opts, *param.secondary_opts} <= offered


def test_commands_complete(complete):
    assert complete("qu") == ["quantize"]
    assert complete("synthesize ") == ["images", "moire"]


@pytest.mark.parametrize("words", ["quantize", "synthesize images", "eval", "eval --baseline"])
def test_models_complete(complete, words):
    networks = [spec.name for spec in NETWORKS] if words == "quantize" else []
    assert complete(f"{words} ") == [*(spec.alias for spec in MODELS), *networks]
    assert complete(f"{words} vit_b") == [
        spec.alias for spec in MODELS if spec.alias.startswith("vit_b")
    ]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("quantize --bits w3", ["w3a3", "w3a2", "w3a4", "w3a5", "w3a6", "w3a7", "w3a8"]),
        ("quantize -b w8a8", ["w8a8"]),
        ("quantize esd", ["esdnet_s", "esdnet", "esdnet_l"]),
        ("quantize --device ", ["auto", "cpu", "cuda"]),
        ("models --backend ", ["auto", "reference", "cpu", "triton"]),
        ("quantize --effort ", ["quick", "standard", "max"]),
        ("quantize --engine ", ["nested", "branches"]),
        ("quantize --ablate ", ["prefix", "no-distillation", "one-set"]),
        ("synthesize images --method ", ["spdfq", "psaq", "noise"]),
        ("eval --color ", ["auto", "always", "never"]),
        ("switch-bits f --bits ", [*"2345678", *(f"w{bits}a{bits}" for bits in range(2, 9))]),
        ("eval f -b w5", ["w5a5"]),
        ("quantize ./", []),
        ("quantize --calib ", []),
    ],
)
def test_values_complete(complete, line, offered):
    assert complete(line) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_reads_its_file_and_gets_answers(tmp_path):
    program = tmp_path / "qtool"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qtool "$@"\n')
    program.chmod(0o755)
    script = (
        f'source "{ROOT}/completions/qtool.bash"; COMP_WORDS=(qtool quantize vit_b --eff); '
        'COMP_CWORD=3; _qtool_completion qtool; echo "${COMPREPLY[@]}"; complete -p qtool'
    )
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run(["bash", "-n", ROOT / "completions" / "qtool.bash"], check=True)
    ran = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines()[0] == "--effort"
    assert "-F _qtool_completion qtool" in ran.stdout
