"""Training learns, resumes and writes; the bundled weights are as good as they say."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file

from qtool.demo import pictures, train
from qtool.models import sources, vision


def test_learning_rate_rises_and_falls():
    rates = [train.learning_rate(step, steps=100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_initial_embedding_whitens_patches():
    model = vision.build("demo_vit", {})
    images = (pictures.draw(300)[0] - train.MEAN) / train.STD
    train.initialise(model, images)
    with torch.no_grad():
        tokens = model.get_submodule("patch_embed.proj")(images).flatten(2).transpose(1, 2)
    tokens = tokens.flatten(0, 1)
    covariance = torch.cov(tokens.T)
    assert tokens.mean(0).abs().max() < 1e-2
    assert covariance.fill_diagonal_(0).abs().max() < 1e-2
    assert torch.unique(model.get_parameter("pos_embed")[0], dim=0).shape[0] == 65


def test_every_parameter_has_one_optimizer():
    model = vision.build("demo_vit", {})
    pair = train.optimizers(model, peak_rate=1e-3, weight_decay=0.01)
    owned = [p for optimizer in pair for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in pair[0].param_groups[0]["params"])


def run(folder, *, steps, **more):
    return train.train(
        folder / "out.safetensors",
        steps=steps,
        batch_size=8,
        warmup=2,
        evaluate_every=2,
        held_out=96,
        **more,
    )


def test_training_writes_weights_that_open(tmp_path):
    top1 = run(tmp_path, steps=3)
    path = tmp_path / "out.safetensors"
    metadata = sources.read_metadata(path)
    assert json.loads(metadata["accuracy"]) == {
        "top1": pytest.approx(top1, abs=1e-5),
        "held_out_pictures": 96,
    }
    assert json.loads(metadata["labels"]) == pictures.class_names()
    assert json.loads(metadata["recipe"])["steps_done"] == 3
    assert metadata["seed"] == "0"
    assert path.stat().st_size < 6e6
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    opened = vision.open_model(str(path))
    assert opened.labels_kind == "demo"
    assert train.accuracy(opened.model, 96) == pytest.approx(top1)


def test_resumed_training_goes_on_where_it_stopped(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = tmp_path / "state.pt"
    run(tmp_path, steps=4, resume=state)
    saved = torch.load(state, weights_only=True)
    assert saved["step"] == 2
    whole = load_file(tmp_path / "out.safetensors")
    run(tmp_path, steps=4, resume=state)
    assert "resumed at step 2" in caplog.text
    again = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_command_line(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "train", lambda path, **options: calls.append((path, options)))
    assert train.main(["-o", str(tmp_path / "x"), "--steps", "7", "--seed", "3"]) == 0
    ((path, options),) = calls
    assert path == tmp_path / "x"
    assert (options["steps"], options["seed"], options["resume"]) == (7, 3, None)


def test_bundled_weights_are_as_good_as_they_say():
    path = sources.bundled("demo_vit.safetensors")
    stated = json.loads(sources.read_metadata(path)["accuracy"])["top1"]
    model = vision.open_model("demo_vit").model
    count = 480
    measured = train.accuracy(model, count)
    assert abs(measured - stated) < 4 * math.sqrt(stated * (1 - stated) / count)


def test_bundled_weights_are_fully_trained():
    metadata = sources.read_metadata(sources.bundled("demo_vit.safetensors"))
    recipe = json.loads(metadata["recipe"])
    assert recipe["steps_done"] == recipe["steps"]
    assert 0.85 < json.loads(metadata["accuracy"])["top1"] < 0.98
