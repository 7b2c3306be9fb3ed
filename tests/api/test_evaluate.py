"""Accuracy on drawn and on labelled pictures, gates, baselines, latency."""

import json
from pathlib import Path

import pytest
import torch

from qtool.api import evaluate as api
from qtool.api.load import load
from qtool.demo import pictures
from qtool.errors import CheckpointError, ImageError, MissingError, OutputExistsError, UsageError
from qtool.io import images
from qtool.models import vision
from qtool.settings.evaluate import EvaluateSettings

OUT = Path("q.safetensors")


def settings(target, **options):
    return EvaluateSettings.build({"target": str(target), "device": "cpu", "count": 48, **options})


def evaluate(target, *, progress=None, **options):
    return api.evaluate(settings(target, **options), progress)


def logits_of(model, data, count):
    drawn, labels = pictures.held_out(count, data.input_size[1])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        return model((drawn - mean) / std), labels


@pytest.fixture
def checkpoint_file(quantize, demo):
    quantize(demo, out=OUT, bits="w3a4")
    return OUT


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(vision, "open_model", refuse)


def test_a_float_model_on_drawn_pictures(demo):
    result = evaluate(demo, batch_size=20)
    opened = vision.open_model(demo)
    logits, labels = logits_of(opened.model, opened.data, 48)
    hits = int((logits.argmax(1) == labels).sum())
    best = logits.topk(5, dim=1).indices
    assert result.status == "ok"
    assert result.summary["count"] == 48
    assert result.summary["top1"] == round(100 * hits / 48, 2)
    assert result.summary["top5"] == round(100 * int((best == labels[:, None]).sum()) / 48, 2)
    assert result.summary["bytes"] == sum(4 * p.numel() for p in opened.model.parameters())
    assert "drop" not in result.summary
    assert len(result.items) == 1


def test_a_checkpoint_is_measured_beside_its_float_model(checkpoint_file, demo):
    result = evaluate(checkpoint_file)
    opened = vision.open_model(demo)
    float_logits, labels = logits_of(opened.model, opened.data, 48)
    logits, _ = logits_of(load(checkpoint_file), opened.data, 48)
    top1 = [100 * float((x.argmax(1) == labels).float().mean()) for x in (float_logits, logits)]
    summary = result.summary
    assert summary["baseline_top1"] == pytest.approx(top1[0], abs=0.01)
    assert summary["top1"] == pytest.approx(top1[1], abs=0.01)
    assert summary["drop"] == pytest.approx(top1[0] - top1[1], abs=0.02)
    same = float((float_logits.argmax(1) == logits.argmax(1)).float().mean())
    assert summary["agreement"] == pytest.approx(100 * same, abs=0.01)
    assert summary["bytes"] == OUT.stat().st_size
    assert [item["model"] for item in result.items] == [
        "float32 (demo_vit)",
        "w3a4 (q.safetensors)",
    ]


@pytest.mark.parametrize("fixture", ["class_folders", "labelled_folder"])
def test_labelled_pictures(request, demo, fixture):
    folder = request.getfixturevalue(fixture)
    result = evaluate(demo, data=folder, batch_size=4)
    opened = vision.open_model(demo)
    hits = 0
    for path in sorted(folder.rglob("*.png")):
        label = int(path.parent.name if fixture == "class_folders" else path.name[0])
        pixels = images.to_tensor(
            images.load_rgb(path),
            size=32,
            crop_pct=opened.data.crop_pct,
            interpolation="bicubic",
            mean=opened.data.mean,
            std=opened.data.std,
        )
        with torch.no_grad():
            hits += int(opened.model(pixels[None]).argmax()) == label
    assert result.summary["count"] == 6
    assert result.summary["top1"] == round(100 * hits / 6, 2)


def test_both_kinds_of_folders_agree(demo, class_folders, labelled_folder):
    first, second = (evaluate(demo, data=folder) for folder in (class_folders, labelled_folder))
    assert first.summary == second.summary


def test_the_crop_can_be_set(demo, class_folders, monkeypatch):
    crops = []
    real = images.to_tensor

    def keep(image, **options):
        crops.append(options["crop_pct"])
        return real(image, **options)

    monkeypatch.setattr(images, "to_tensor", keep)
    evaluate(demo, data=class_folders, limit=1)
    evaluate(demo, data=class_folders, limit=1, crop_pct=0.5)
    assert crops == [0.9, 0.5]


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (4, 4), (6, 6), (100, 6)])
def test_a_limit_takes_a_balanced_part(demo, class_folders, monkeypatch, limit, expected):
    labels = []
    real = api.topk_hits

    def keep(logits, batch_labels, **options):
        labels.extend(batch_labels.tolist())
        return real(logits, batch_labels, **options)

    monkeypatch.setattr(api, "topk_hits", keep)
    assert evaluate(demo, data=class_folders, limit=limit).summary["count"] == expected
    if limit in (3, 4):
        assert set(labels) == {0, 1, 2}


def test_a_limit_on_drawn_pictures(demo):
    assert evaluate(demo, limit=5).summary["count"] == 5
    assert evaluate(demo, limit=100).summary["count"] == 48


def test_a_bad_picture_makes_the_result_partial(demo, class_folders):
    bad = class_folders / "1" / "0.png"
    bad.write_bytes(b"rubbish")
    done = []
    result = evaluate(
        demo,
        data=class_folders,
        batch_size=4,
        progress=lambda stage, step, total, note="": done.append((step, total)),
    )
    assert (result.status, result.exit_code) == ("partial", 3)
    assert result.summary["status"] == "partial"
    assert (result.summary["count"], result.summary["failed"]) == (5, 1)
    failed = result.items[-1]
    assert (failed["path"], failed["status"]) == (str(bad), "failed")
    assert str(bad) in failed["error"]
    assert done == [(4, 6), (6, 6)]


def test_only_bad_pictures_are_an_error(demo, class_folders):
    for path in class_folders.rglob("*.png"):
        path.write_bytes(b"rubbish")
    with pytest.raises(ImageError, match="no picture could be read"):
        evaluate(demo, data=class_folders)


def test_a_gate_that_is_met_changes_nothing(demo):
    assert evaluate(demo, minimum=("top1=0", "top5=0")).status == "ok"
    assert evaluate(demo, baseline=demo, minimum=("drop=0", "agreement=100")).status == "ok"


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ("top1=100.5", ", not 100.5"),
        ("drop=-1", "drop is 0, not -1"),
        ("agreement=100.5", "agreement is 100, not 100.5"),
    ],
)
def test_a_gate_that_is_missed_fails_with_its_own_code(demo, gate, reason):
    result = evaluate(demo, baseline=demo, minimum=(gate,))
    assert result.status == result.summary["status"] == "failed"
    assert result.summary["exit_code"] == result.exit_code == 5
    assert reason in result.summary["error"]
    assert result.summary["remedy"]


def test_what_was_not_measured_does_not_pass_a_gate(demo):
    result = evaluate(demo, minimum=("drop=5",))
    assert result.exit_code == 5
    assert "drop was not measured" in result.summary["error"]


def test_an_unknown_metric_is_refused_before_any_work(no_weights):
    for act in (api.evaluate, api.plan):
        with pytest.raises(UsageError, match="no metric 'top2'") as caught:
            act(settings("deit_t", minimum=("top2=5",)))
        assert "top1" in caught.value.remedy


def test_models_without_drawn_pictures_need_data(swin):
    with pytest.raises(UsageError, match="a labelled picture set is needed") as caught:
        evaluate(swin)
    assert "--data" in caught.value.remedy


def test_damaged_checkpoints_are_refused(checkpoint_file):
    content = bytearray(checkpoint_file.read_bytes())
    content[-5] ^= 1
    checkpoint_file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        evaluate(checkpoint_file)
    checkpoint_file.write_bytes(content[:100])
    with pytest.raises(CheckpointError):
        evaluate(checkpoint_file)


def test_absent_files_are_missing():
    with pytest.raises(MissingError):
        evaluate("absent.safetensors")


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_reports_are_written(demo, suffix):
    report = Path(f"report{suffix}")
    report.write_text("old")
    with pytest.raises(OutputExistsError, match=report.name):
        evaluate(demo, report=report)
    result = evaluate(demo, report=report, overwrite=True)
    text = report.read_text()
    assert "demo_vit" in text
    if suffix == ".json":
        assert json.loads(text)["summary"]["top1"] == result.summary["top1"]


def test_a_plan_loads_no_weights(no_weights, class_folders):
    result = api.plan(settings("deit_t", data=class_folders, limit=4, latency=True))
    assert result.status == "planned"
    assert result.summary.pop("estimated_seconds") > 0
    assert result.summary == {
        "target": "deit_t",
        "architecture": "deit_tiny_patch16_224.fb_in1k",
        "data": str(class_folders),
        "count": 4,
        "baseline": None,
        "latency": True,
        "device": "cpu",
    }
    assert api.plan(settings("demo_vit")).summary["data"] == "drawn pictures"
    with pytest.raises(UsageError, match="does not exist"):
        api.plan(settings("deit_t", data=Path("absent")))


def test_a_plan_refuses_what_the_run_would(checkpoint_file, class_folders, no_weights):
    with pytest.raises(UsageError, match="no model called 'deit_tt'") as caught:
        api.plan(settings("deit_tt", data=class_folders))
    assert "deit_t" in caught.value.remedy
    with pytest.raises(UsageError, match="no model called 'deit_tt'"):
        api.plan(settings("deit_t", baseline="deit_tt", data=class_folders))
    with pytest.raises(MissingError, match="no file absent"):
        api.plan(settings("absent.safetensors", data=class_folders))
    for target in ("deit_t", checkpoint_file):
        with pytest.raises(MissingError, match="no weights file absent"):
            api.plan(settings(target, weights="absent", data=class_folders))
    with pytest.raises(UsageError, match="a labelled picture set is needed"):
        api.plan(settings("deit_t"))


def test_a_plan_knows_checkpoints(checkpoint_file, no_weights):
    result = api.plan(settings(checkpoint_file, baseline=str(checkpoint_file)))
    assert result.summary["architecture"] == "demo_vit"
    checkpoint_file.write_bytes(checkpoint_file.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        api.plan(settings(checkpoint_file))


def test_the_bundled_model_knows_its_pictures():
    result = evaluate("demo_vit", count=48)
    assert result.summary["top1"] > 60


def test_a_checkpoint_can_be_measured_alone(checkpoint_file):
    result = evaluate(checkpoint_file, baseline="none")
    assert len(result.items) == 1
    assert "baseline_top1" not in result.summary
    assert "drop" not in result.items[0]
