"""Flag > environment > configuration file > default."""

import json
import tomllib
from pathlib import Path

import pytest

from qtool.cli.config import to_toml
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.synthesize import SynthesizeSettings

FILE = """
[quantize]
model = "from_file"
data-free = true
count = 5
keep = ["head=8"]
device = "cuda"
threads = 3

[synthesize.images]
out = "pictures"
effort = "quick"

[eval]
min = ["top1=75"]
batch-size = 3
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(FILE)
    return str(path)


def test_each_source_beats_the_next(qtool_run, fake_api, job, monkeypatch):
    monkeypatch.setenv("QTOOL_DEVICE", "cuda:1")
    monkeypatch.setenv("QTOOL_THREADS", "4")
    monkeypatch.setenv("QTOOL_OFFLINE", "1")
    monkeypatch.setenv("QTOOL_BACKEND", "")
    ran = qtool_run("quantize", "--config", job, "--threads", "5")
    assert ran.err == ""
    [(_, settings)] = fake_api.calls
    assert settings.model == "from_file"
    assert settings.data_free
    assert settings.keep == ("head=8",)
    assert settings.device == "cuda:1"
    assert settings.threads == 5
    assert settings.offline
    assert settings.backend == "auto"
    assert settings.count == 5
    assert settings.seed == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("QTOOL_DEVICE", "cuda:1"),
        ("QTOOL_BACKEND", "reference"),
        ("QTOOL_OFFLINE", "1"),
        ("QTOOL_THREADS", "4"),
    ],
)
def test_every_variable_is_read_and_a_flag_beats_it(
    qtool_run, fake_api, monkeypatch, variable, value
):
    name = variable.removeprefix("QTOOL_").lower()
    monkeypatch.setenv(variable, value)
    qtool_run("models")
    qtool_run("models", "--device", "cpu", "--backend", "cpu", "--threads", "2")
    read, given = (getattr(settings, name) for _, settings in fake_api.calls)
    assert str(read) in (value, "True")
    assert given == {"device": "cpu", "backend": "cpu", "threads": 2, "offline": True}[name]


def test_a_flag_equal_to_the_default_still_beats_the_file(qtool_run, fake_api, job):
    qtool_run("quantize", "--config", job, "--count", "32", "--device", "auto")
    [(_, settings)] = fake_api.calls
    assert (settings.count, settings.device) == (32, "auto")


def test_nested_tables_and_flag_names(qtool_run, fake_api, job):
    qtool_run("synthesize", "images", "m", "--config", job)
    qtool_run("eval", "t", "--config", job)
    (_, synthesis), (_, evaluation) = fake_api.calls
    assert (synthesis.out, synthesis.effort) == (Path("pictures"), "quick")
    assert (evaluation.minimum, evaluation.batch_size) == (("top1=75",), 3)


@pytest.mark.parametrize(
    ("text", "said", "remedy"),
    [
        ("[quantize]\nbit = 'w4a4'", "key 'bit'", "bits"),
        ("[quantize]\njson = true", "key 'json'", "known"),
        ("[quantise]\nbits = 'w4a4'", "table [quantise]", "quantize"),
        ("[synthesize.image]\ncount = 1", "table [synthesize.image]", "synthesize.images"),
        ("count = 1", "table [count]", "known"),
        ("[quantize", "is not TOML", "--help"),
        ("[quantize]\ncount = 0", "'count' in", "--help"),
        ("[quantize]\ncount = 'x'", "'count' in", "--help"),
    ],
)
def test_wrong_files_are_explained(qtool_run, fake_api, tmp_path, text, said, remedy):
    (tmp_path / "bad.toml").write_text(text)
    ran = qtool_run("quantize", "m", "--data-free", "--config", "bad.toml")
    cause, hint = ran.err.splitlines()
    assert ran.code == 2
    assert said in cause
    assert "bad.toml" in cause
    assert remedy in hint
    assert fake_api.calls == []


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable_files_are_usage_errors(qtool_run, tmp_path, content):
    if content is not None:
        (tmp_path / "bad.toml").write_bytes(content)
    assert qtool_run("models", "--config", "bad.toml").code == 2


def test_a_wrong_variable_is_named(qtool_run, monkeypatch):
    monkeypatch.setenv("QTOOL_THREADS", "many")
    ran = qtool_run("models")
    assert ran.code == 2
    assert ran.err.startswith("error: QTOOL_THREADS must be a valid integer, not 'many'")


@pytest.mark.parametrize(
    "line",
    [
        "quantize m --data-free --keep head=8 --threads 2",
        "synthesize images m -o d --learning-rate 1e-05",
        'eval t --min top1=1 --min top5=2 --data weird\\"name',
        "models vit*",
        "info c",
    ],
)
def test_a_dumped_configuration_is_read_back(qtool_run, tmp_path, line):
    words = line.split()
    dumped = qtool_run(*words, "--dump-config")
    assert (dumped.code, dumped.err) == (0, "")
    (tmp_path / "dumped.toml").write_text(dumped.out)
    command = words[:2] if words[0] == "synthesize" else words[:1]
    again = qtool_run(*command, "--config", "dumped.toml", "--dump-config")
    assert again.out == dumped.out


def test_a_dump_shows_what_is_missing(qtool_run):
    ran = qtool_run("synthesize", "images", "--dump-config")
    assert ran.code == 0
    assert "# model = (required)" in ran.out
    assert "# steps = (not set)" in ran.out
    assert "model" not in tomllib.loads(ran.out)["synthesize"]["images"]


def test_a_dump_can_be_json(qtool_run):
    content = json.loads(qtool_run("quantize", "m", "--dump-config", "--json").out)
    assert content["summary"]["config"]["bits"] == "w4a4"


def test_a_dump_refuses_wrong_values(qtool_run):
    assert qtool_run("quantize", "m", "--count", "0", "--dump-config").code == 2


def test_toml_survives_odd_text():
    settings = SynthesizeSettings(model='a"\\\n\x7f\U0001f600', out=Path("p"), learning_rate=1e-5)
    table = tomllib.loads(to_toml(settings, "synthesize.images"))["synthesize"]["images"]
    assert SynthesizeSettings.build(table) == settings


def test_toml_holds_every_field():
    settings = QuantizeSettings(model="m", calib=Path("c"), steps=3, skip=("a", "b"))
    table = tomllib.loads(to_toml(settings, "quantize"))["quantize"]
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
    }
    assert QuantizeSettings.build(values) == settings
