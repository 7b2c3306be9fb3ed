"""From a command line to settings, to the api, to what is shown."""

import json
import logging
from pathlib import Path

import pytest

from qtool.report import Result, Table
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.models import InfoSettings, ModelsSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.synthesize import SynthesizeSettings

CALLS = [
    (
        "quantize m -b W3A4 --data-free --keep head=8 --keep x=w2a2 --no-verify -o o.safetensors",
        "quantize.quantize",
        QuantizeSettings(
            model="m",
            bits="w3a4",
            data_free=True,
            keep=("head=8", "x=w2a2"),
            verify=False,
            out=Path("o.safetensors"),
        ),
    ),
    (
        "synthesize images m -o d --learning-rate 0.1 --classes 0-3 --effort quick --resume",
        "synthesize.synthesize_images",
        SynthesizeSettings(
            model="m", out=Path("d"), learning_rate=0.1, classes="0-3", effort="quick", resume=True
        ),
    ),
    (
        "eval t --data d --min top1=7 --crop-pct .9 --latency --count 5 --seed 3 --offline",
        "evaluate.evaluate",
        EvaluateSettings(
            target="t",
            data=Path("d"),
            minimum=("top1=7",),
            crop_pct=0.9,
            latency=True,
            count=5,
            seed=3,
            offline=True,
        ),
    ),
    ("models vit*", "models.list_models", ModelsSettings(pattern="vit*")),
    ("models", "models.list_models", ModelsSettings()),
    (
        "info c --device cuda:1 --backend cpu --threads 2 --workers 1 --dtype float32",
        "models.info",
        InfoSettings(target=Path("c"), device="cuda:1", backend="cpu", threads=2, workers=1),
    ),
    (
        "quantize m --data-free -n",
        "quantize.plan",
        QuantizeSettings(model="m", data_free=True, dry_run=True),
    ),
    (
        "synthesize images m -o d --dry-run",
        "synthesize.plan_images",
        SynthesizeSettings(model="m", out=Path("d"), dry_run=True),
    ),
    ("eval t -n", "evaluate.plan", EvaluateSettings(target="t", dry_run=True)),
]


@pytest.mark.parametrize(("line", "name", "settings"), CALLS, ids=[call[0] for call in CALLS])
def test_words_become_settings(qtool_run, fake_api, line, name, settings):
    ran = qtool_run(*line.split())
    assert (ran.code, ran.err) == (0, "")
    assert fake_api.calls == [(name, settings)]


def test_a_dry_run_is_planned_in_every_command(qtool_run, fake_api):
    for line in ("models -n", "eval t -n", "info c -n"):
        assert json.loads(qtool_run(*line.split(), "--json").out)["status"] == "planned"


@pytest.mark.parametrize(
    "line",
    [
        "eval t",
        "quantize m --data-free",
        "synthesize moire --simulate -o d",
    ],
)
def test_what_cannot_be_shared_is_refused_under_torchrun(qtool_run, fake_api, monkeypatch, line):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert qtool_run(*line.split()).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = qtool_run(*line.split())
    assert ran.code == 2
    assert "torchrun" in ran.err
    assert len(fake_api.calls) == 1


@pytest.mark.parametrize(
    "line",
    ["synthesize images m -o d", "quantize m --engine branches -b any --train d"],
)
def test_what_can_be_shared_runs_under_torchrun(qtool_run, fake_api, monkeypatch, line):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert qtool_run(*line.split()).code == 0
    assert len(fake_api.calls) == 1


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("partial", 3), ("failed", 1)])
def test_a_result_decides_the_exit_code(qtool_run, fake_api, status, code):
    fake_api.answer = Result("models", status)
    assert qtool_run("models").code == code


def test_results_go_to_stdout_and_failures_to_stderr(qtool_run, fake_api):
    fake_api.answer = Result(
        "models",
        "partial",
        items=[
            {"path": "a.png", "status": "ok"},
            {"path": "b.png", "status": "failed", "error": "not a picture"},
        ],
        summary={"top1": 75.0, "data": {"pictures": 2}},
        tables=[Table("Accuracy", ["name", "top1"], [["[red]float[/red]", 75.0], ["x" * 300, 1]])],
    )
    ran = qtool_run("models")
    assert ran.code == 3
    assert "[red]float[/red]" in ran.out
    assert "x" * 300 in ran.out
    assert "top1:" in ran.out
    assert "data.pictures:" in ran.out
    assert ran.err == "error: b.png: not a picture\n"


def test_without_tables_the_outputs_are_listed(qtool_run, fake_api):
    fake_api.answer = Result("models", items=[{"path": "in", "output": "out\x1b.png"}])
    assert qtool_run("models").out == "out\\x1b.png\n"


def test_a_missed_gate_keeps_its_table(qtool_run, fake_api):
    fake_api.answer = Result(
        "eval",
        "failed",
        summary={"top1": 50.0, "error": "top1 is 50", "remedy": "train", "exit_code": 5},
        tables=[Table("Accuracy", ["top1"], [[50.0]])],
    )
    ran = qtool_run("eval", "t")
    assert ran.code == 5
    assert "Accuracy" in ran.out
    assert "exit" not in ran.out
    assert ran.err == "error: top1 is 50\nhint: train\n"


def talk(progress):
    progress("calibrating", 1, 2)
    logging.getLogger("qtool.notice").info("device: cpu")
    logging.getLogger("qtool.api").info("information")
    logging.getLogger("qtool.api").debug("details")
    logging.getLogger("qtool.api").warning("careful")
    logging.getLogger("timm").info("noise")
    logging.getLogger("qtool.api").error("bad")


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["-q"], {"bad"}),
        ([], {"bad", "careful", "device: cpu", "calibrating"}),
        (["--no-progress"], {"bad", "careful", "device: cpu"}),
        (["-q", "--progress"], {"bad", "calibrating"}),
        (["-v"], {"bad", "careful", "device: cpu", "calibrating", "information"}),
        (
            ["-vv"],
            {"bad", "careful", "device: cpu", "calibrating", "information", "details", "noise"},
        ),
    ],
)
def test_verbosity(qtool_run, fake_api, flags, shown):
    fake_api.work = talk
    ran = qtool_run("models", *flags, "--json")
    every = ("bad", "careful", "device: cpu", "calibrating", "information", "details", "noise")
    assert {word for word in every if word in ran.err} == shown
    assert json.loads(ran.out)["status"] == "ok"


def test_a_log_file_gets_everything(qtool_run, fake_api, tmp_path):
    fake_api.work = talk
    fake_api.answer = ValueError("deep")
    qtool_run("models", "-q", "--log-file", "run.log")
    text = (tmp_path / "run.log").read_text()
    assert all(word in text for word in ("details", "information", "device: cpu", "Traceback"))
    qtool_run("models", "--log-file", "run.log")
    assert (tmp_path / "run.log").read_text().startswith(text)


def test_a_log_file_that_cannot_be_written_is_an_error(qtool_run, fake_api):
    ran = qtool_run("models", "--log-file", "nowhere/run.log")
    assert ran.code == 1
    assert "nowhere/run.log" in ran.err
    assert fake_api.calls == []


def test_nothing_is_left_behind_in_logging(qtool_run, fake_api):
    before = list(logging.getLogger().handlers)
    qtool_run("models", "-vv")
    assert logging.getLogger().handlers == before
