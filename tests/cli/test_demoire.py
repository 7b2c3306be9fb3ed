"""`qtool demoire` on the command line: streams, lists, JSON and exit codes."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.cli.app import main
from qtool.io.container import write_container
from qtool.models import demoire, demoire_weights

TINY = {"encoder_width": 4, "decoder_width": 4, "growth": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny network with weights of the test's own making."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = demoire.build("esdnet_s", TINY)
        torch.nn.init.normal_(network.decoder.decoder_1.conv.conv.weight, std=0.1)
    write_container(path, demoire_weights.metadata("esdnet_s", TINY, {}), network.state_dict())
    return path


@pytest.fixture
def run(weights, tmp_path, monkeypatch, capfdbinary):
    """Run `qtool demoire WORDS...` among three photographs; bytes of stdout, text of stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")

    def call(*words, stdin=b""):
        stream = io.TextIOWrapper(io.BytesIO(stdin))
        monkeypatch.setattr(sys, "stdin", stream)
        capfdbinary.readouterr()
        code = main(["demoire", *words, "--weights", str(weights), "--device", "cpu", "--force"])
        captured = capfdbinary.readouterr()
        return code, captured.out, captured.err.decode()

    return call


def test_a_folder(run, tmp_path):
    code, out, err = run("photos", "-o", "clean")
    assert code == 0
    assert out.decode().splitlines()[:3] == [f"clean/{i}.png" for i in range(3)]
    assert "device: cpu" in err
    assert len(list((tmp_path / "clean").glob("*.png"))) == 3


def test_json_and_a_bad_photograph(run, tmp_path):
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"bad")
    code, out, _ = run("photos", "-o", "clean", "--json")
    content = json.loads(out)
    assert code == 3
    assert content["status"] == "partial"
    assert content["summary"]["restored"] == 3
    assert [i["status"] for i in content["items"]].count("failed") == 1


def test_from_stdin_to_stdout(run, tmp_path):
    source = (tmp_path / "photos" / "0.png").read_bytes()
    code, out, _ = run("-", "-o", "-", stdin=source)
    assert code == 0
    assert Image.open(io.BytesIO(out)).size == (50, 40)
    code, _, err = run("-", "-o", "-", "--json", stdin=source)
    assert code == 2
    assert "--json" in err


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_lists(run, tmp_path, separator):
    names = separator.join(["photos/0.png", "photos/2.png", ""]).encode()
    code, out, _ = run("--files-from", "-", "-o", "clean", stdin=names)
    assert code == 0
    assert out.decode().splitlines()[:2] == ["clean/0.png", "clean/2.png"]
    (tmp_path / "list").write_bytes(names)
    assert run("--files-from", "list", "-o", "clean", "--skip-existing")[0] == 0
    assert run("--files-from", "absent", "-o", "clean")[0] == 2
    assert run("-", "--files-from", "-", "-o", "clean")[0] == 2


def test_a_dry_run_says_what_would_be_done(run, tmp_path):
    code, out, _ = run("photos", "-o", "clean", "-n", "--json")
    assert code == 0
    content = json.loads(out)
    assert content["status"] == "planned"
    assert content["summary"]["photographs"] == 3
    assert not (tmp_path / "clean").exists()


def test_a_configuration_file_may_set_everything(run, tmp_path):
    (tmp_path / "qtool.toml").write_text('[demoire]\nout = "clean"\nformat = "webp"\n')
    code, out, _ = run("photos/0.png", "--config", "qtool.toml")
    assert code == 0
    assert out.decode().splitlines()[0] == "clean/0.webp"
