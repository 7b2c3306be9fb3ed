"""What the README shows can be typed as it stands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from qtool.api import quantize as quantize_api
from qtool.api import synthesize as synthesize_api
from qtool.cli.app import main
from qtool.demo import pictures
from qtool.models import vision

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()


def blocks(language, *, after="", text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text[text.index(after) :], re.M | re.S)


def commands():
    """Every call of qtool in a shell block that needs no variable, as words behind its name."""
    found = []
    for block in blocks("sh"):
        for line in block.splitlines():
            for part in re.split(r"&&|\|", line):
                words = shlex.split(part.partition(">")[0], comments=True)
                calls = [index for index, word in enumerate(words) if Path(word).name == "qtool"]
                if calls and "$" not in part:
                    found.append(words[calls[-1] + 1 :])
    return [words for words in found if words]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_can_be_read(words, capfd):
    assert main([*words, "--dump-config"]) == 0
    assert capfd.readouterr().err == ""


def test_commands_were_found():
    assert len(commands()) > 25
    assert {words[0] for words in commands()} >= {"quantize", "eval", "demoire", "switch-bits"}


def test_links_lead_to_files_of_the_project():
    for path in re.findall(r"\]\((?!https?:|#)([^)]+)\)", TEXT):
        assert (README.parent / path).exists()


def test_the_python_example_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(synthesize_api.STEPS, "quick", 2)
    monkeypatch.setitem(quantize_api.RECONSTRUCTION_STEPS, "quick", 2)
    (example,) = blocks("python")
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert int(capsys.readouterr().out) == Path("demo.safetensors").stat().st_size
    assert names["model"].num_classes == len(pictures.class_names())


def tiny_model(path):
    """Weights of a small network for drawn pictures."""
    arguments = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    save_file(
        vision.build("demo_vit", arguments).state_dict(),
        path,
        {"architecture": "demo_vit", "model_args": json.dumps(arguments)},
    )
    return str(path)


def test_the_script_for_ci_runs(tmp_path):
    drawn, labels = pictures.held_out(48, 64)
    as_bytes = (drawn.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    labelled, photos = tmp_path / "labelled", tmp_path / "photos"
    for index, (pixels, label) in enumerate(zip(as_bytes, labels.tolist(), strict=True)):
        folder = labelled / f"{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    photos.mkdir()
    Image.fromarray(np.full((80, 96, 3), 127, np.uint8)).save(photos / "grey.jpg")
    (script,) = blocks("sh", after="### In CI")[:1]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "qtool").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qtool "$@"\n')
    (tools / "qtool").chmod(0o755)
    variables = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "MODEL": tiny_model(tmp_path / "tiny.safetensors"),
        "PICTURES": str(labelled),
        "LABELLED": str(labelled),
        "PHOTOS": str(photos),
        "MAX_DROP": "100",
    }

    def run(**changed):
        return subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, **variables, **changed},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval.json").read_text())["summary"]["drop"] <= 100
    assert done.stdout.splitlines()[-1] == "clean/grey.jpg"
    assert (tmp_path / "clean" / "grey.jpg").is_file()
    (tmp_path / "model.safetensors").unlink()
    gated = run(MAX_DROP="-200")
    assert gated.returncode == 5
    assert "quality gate not met" in gated.stderr
