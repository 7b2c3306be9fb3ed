"""Checkpoints and float models as targets, and the baselines that suit them."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qtool.api import evaluate as evaluate_api
from qtool.errors import MissingError, UsageError
from qtool.models import vision
from qtool.models.sources import read_metadata
from qtool.settings.evaluate import EvaluateSettings

OUT = Path("q.safetensors")


def evaluate(target, **options):
    values = {"target": str(target), "device": "cpu", "count": 48, **options}
    return evaluate_api.evaluate(EvaluateSettings.build(values))


@pytest.fixture
def checkpoint_file(quantize, demo):
    quantize(demo, out=OUT, bits="w3a4")
    return OUT


def test_without_its_float_weights_a_checkpoint_stands_alone(checkpoint_file, demo, caplog):
    Path(demo).unlink()
    result = evaluate(checkpoint_file)
    assert "no float baseline" in caplog.text
    assert "--weights" in caplog.text
    assert "drop" not in result.summary
    assert result.status == "ok"


def test_weights_that_moved_can_be_named(checkpoint_file, demo, tmp_path):
    expected = evaluate(checkpoint_file).summary
    moved = Path(demo).rename(tmp_path / "moved.safetensors")
    for option in ("weights", "baseline"):
        assert evaluate(checkpoint_file, **{option: str(moved)}).summary == expected


def test_the_float_weights_are_found_from_another_folder(
    checkpoint_file, demo, tmp_path, monkeypatch
):
    expected = evaluate(checkpoint_file).summary
    assert "drop" in expected
    moved = checkpoint_file.resolve()
    monkeypatch.chdir(tmp_path)
    assert evaluate(moved).summary == expected


def test_other_weights_of_that_name_are_no_baseline(checkpoint_file, demo, caplog):
    tensors = {name: tensor + 1e-3 for name, tensor in load_file(demo).items()}
    metadata = read_metadata(Path(demo))
    save_file(tensors, demo, metadata)
    assert "drop" not in evaluate(checkpoint_file).summary
    assert "are not those" in caplog.text


def test_weights_that_are_named_must_be_there(checkpoint_file):
    with pytest.raises(MissingError, match="no weights file absent"):
        evaluate(checkpoint_file, weights="absent")


def test_weights_are_those_of_the_baseline_that_is_named(checkpoint_file, demo):
    result = evaluate(checkpoint_file, baseline="demo_vit", weights=demo)
    assert result.summary == evaluate(checkpoint_file).summary


def test_any_model_can_be_the_baseline(checkpoint_file, quantize, demo):
    quantize(demo, out=Path("eight.safetensors"), bits="w8a8")
    result = evaluate(checkpoint_file, baseline="eight.safetensors")
    assert result.items[0]["model"] == "w8a8 (eight.safetensors)"
    same = evaluate(demo, baseline=demo).summary
    assert (same["drop"], same["agreement"]) == (0.0, 100.0)


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ({}, {"input_size": (3, 64, 64)}, r"the input size is \(3, 64, 64\), not \(3, 32, 32\)"),
        ({"num_classes": 5}, {}, "the number of classes is 5, not 24"),
        ({}, {"mean": (0.0, 0.0, 0.0)}, "the mean is"),
        ({}, {"std": (1.0, 1.0, 1.0)}, "the standard deviation is"),
    ],
)
def test_a_baseline_for_other_pictures_is_refused_before_any_pass(
    demo, save_weights, monkeypatch, arguments, data, message
):
    config = replace(vision.open_model(demo).data, **data)
    sizes = {"img_size": config.input_size[1], "embed_dim": 16, "depth": 1, "num_heads": 2}
    other = save_weights("demo_vit", {**sizes, **arguments}, seed=1, data=config)
    monkeypatch.setattr(evaluate_api, "topk_hits", None)
    with pytest.raises(UsageError, match=message):
        evaluate(demo, baseline=other)
