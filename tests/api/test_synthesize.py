"""Folders of synthesized pictures, and runs that are killed and taken up again."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from qtool.api import estimate
from qtool.api import synthesize as api
from qtool.api.synthesize import plan_images, synthesize_images
from qtool.errors import CheckpointError, MissingError, OutputExistsError, UsageError
from qtool.io import images
from qtool.methods.spdfq import batch as batches
from qtool.models import vision
from qtool.settings.synthesize import SynthesizeSettings


def settings(model, **options):
    return SynthesizeSettings.build(
        {"model": model, "out": Path("pictures"), "count": 3, "device": "cpu", **options}
    )


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(vision, "open_model", refuse)


def tensors_of(folder="pictures"):
    return api.read_tensor_file(Path(folder) / api.TENSORS)


def test_a_folder_has_pictures_a_sheet_and_the_exact_tensors(demo):
    result = synthesize_images(settings(demo))
    assert result.status == "ok"
    assert sorted(path.name for path in Path("pictures").iterdir()) == [
        "contact_sheet.png",
        "images",
        "synthetic.safetensors",
    ]
    metadata, tensors = tensors_of()
    assert {"images", "labels", "boxes", "agreement", "prior.blocks.1.attn"} == set(tensors)
    assert tensors["images"].shape == (3, 3, 32, 32)
    data = vision.open_model(demo).data
    visible = api.denormalised(tensors["images"], data)
    for index, item in enumerate(result.items):
        path = Path(item["path"])
        assert path == Path(f"pictures/images/{index:05d}.png")
        read = images.to_tensor(
            images.load_rgb(path),
            size=32,
            crop_pct=1.0,
            interpolation="bicubic",
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
        )
        torch.testing.assert_close(read, visible[index], rtol=0, atol=0.6 / 255)
        boxes = [row for row in tensors["boxes"].tolist() if row[0] == index]
        assert item["classes"] == [row[4] for row in boxes]
        assert item["agrees"] == bool(tensors["agreement"][index])
    made = json.loads(metadata["qtool.synthetic"])
    assert made["weights_sha256"] == vision.open_model(demo).weights_sha256
    assert made["config"]["method"] == "spdfq"
    with Image.open("pictures/contact_sheet.png") as sheet:
        assert sheet.width > 3 * 32


def test_the_summary_says_what_was_done(demo):
    summary = synthesize_images(settings(demo, steps=5, seed=3)).summary
    expected = {"method": "spdfq", "count": 3, "steps": 5, "seed": 3, "output": "pictures"}
    assert {key: summary[key] for key in expected} == expected
    assert 0 <= summary["agreement"] <= 1
    assert len(summary["alignment_loss"]) == 2


@pytest.mark.parametrize("method", ["psaq", "noise"])
def test_other_methods_write_the_same_files(demo, method):
    result = synthesize_images(settings(demo, method=method))
    _, tensors = tensors_of()
    assert set(tensors) == {"images", "labels", "boxes", "agreement"}
    assert tensors["boxes"].shape == (0, 5)
    assert [len(item["classes"]) for item in result.items] == [1, 1, 1]
    assert result.summary["steps"] == (0 if method == "noise" else 4)
    assert result.summary["patch_agreement"] is None


def test_the_summary_compares_the_speed_with_the_matrix_product(demo, monkeypatch):
    monkeypatch.setattr(estimate, "_operations_per_second", lambda _: 1e9)
    summary = synthesize_images(settings(demo)).summary
    model = vision.open_model(demo).model
    vision.unfuse_attention(model)  # the counter knows no fused attention of a CPU
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    boxes = len(tensors_of()[1]["boxes"])
    floor = 2 * summary["steps"] * (3 + boxes) * counter.get_total_flops() / 1e9
    seconds = 3 / summary["images_per_second"]
    assert seconds == pytest.approx(summary["seconds"], abs=0.06)
    assert summary["matmul_rate_share"] == pytest.approx(floor / seconds, rel=0.01)


def test_without_steps_there_is_no_share_of_a_rate(demo):
    summary = synthesize_images(settings(demo, method="noise")).summary
    assert "images_per_second" in summary
    assert "matmul_rate_share" not in summary


def test_the_same_seed_writes_the_same_pictures(demo):
    first = synthesize_images(settings(demo, out=Path("one")))
    synthesize_images(settings(demo, out=Path("two")))
    synthesize_images(settings(demo, out=Path("three"), seed=1))
    assert len(first.items) == 3
    for item in first.items:
        name = Path(item["path"]).name
        content = (Path("one/images") / name).read_bytes()
        assert content == (Path("two/images") / name).read_bytes()
        assert content != (Path("three/images") / name).read_bytes()


def test_a_killed_run_goes_on_and_ends_with_the_same_images(demo, monkeypatch):
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(api, "_SAVE_SECONDS", 0.0)
    options = {"steps": 6, "count": 4, "batch_size": 2}
    synthesize_images(settings(demo, out=Path("whole"), **options))

    def kill(stage, done, total, note=""):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize_images(settings(demo, **options), kill)
    state = Path("pictures/.resume.safetensors")
    assert state.is_file()
    assert not Path("pictures/images").exists()

    with pytest.raises(CheckpointError, match="other settings") as caught:
        synthesize_images(settings(demo, resume=True, seed=1, **options))
    assert "delete the file" in caught.value.remedy
    assert state.is_file()

    done = []
    result = synthesize_images(
        settings(demo, resume=True, **options), lambda _, step, total, note="": done.append(step)
    )
    assert result.status == "ok"
    assert done == [10, 11, 12]
    assert "images_per_second" not in result.summary  # the time of a part would flatter
    assert not state.exists()
    whole, resumed = tensors_of("whole")[1], tensors_of()[1]
    for name in ("images", "labels", "boxes", "agreement"):
        assert torch.equal(resumed[name], whole[name]), name


def test_a_state_is_saved_only_now_and_then(demo, monkeypatch):
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    written = []
    real = api.container.write_container

    def count(path, *args, **options):
        written.append(Path(path).name)
        return real(path, *args, **options)

    monkeypatch.setattr(api.container, "write_container", count)
    synthesize_images(settings(demo))
    assert written == [".resume.safetensors", "synthetic.safetensors"]


def test_resuming_nothing_starts_at_the_beginning(demo):
    synthesize_images(settings(demo, resume=True))
    assert tensors_of()[1]["images"].shape[0] == 3


def test_a_damaged_state_is_refused(demo):
    Path("pictures").mkdir()
    Path("pictures/.resume.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError):
        synthesize_images(settings(demo, resume=True))


def test_existing_pictures_are_refused_before_any_work(demo, no_weights):
    Path("pictures").mkdir()
    Path("pictures/mine.png").write_bytes(b"")
    with pytest.raises(OutputExistsError):
        synthesize_images(settings(demo))
    with pytest.raises(OutputExistsError):
        plan_images(settings(demo))
    skipped = synthesize_images(settings(demo, skip_existing=True))
    assert skipped.summary["status"] == "skipped"


def test_existing_pictures_can_be_replaced(demo):
    synthesize_images(settings(demo))
    before = tensors_of()[1]["images"]
    synthesize_images(settings(demo, overwrite=True, seed=1))
    assert not torch.equal(tensors_of()[1]["images"], before)


def test_pictures_of_a_longer_run_do_not_stay(demo):
    synthesize_images(settings(demo, count=5, method="noise"))
    mine = [Path("pictures/images/mine.png"), Path("pictures/images/7.png")]
    for path in mine:
        path.write_bytes(b"mine")
    synthesize_images(settings(demo, overwrite=True, count=2, method="noise"))
    left = sorted(Path("pictures/images").iterdir())
    assert left == sorted([*mine, *(Path(f"pictures/images/{i:05d}.png") for i in range(2))])


def test_a_plan_refuses_what_the_run_would(no_weights, demo):
    with pytest.raises(UsageError, match="no model called 'deit_tt'") as caught:
        plan_images(settings("deit_tt"))
    assert "deit_t" in caught.value.remedy
    with pytest.raises(MissingError, match="no weights file absent"):
        plan_images(settings("deit_t", weights="absent"))
    assert plan_images(settings(demo)).summary["architecture"] == "demo_vit"


def test_a_plan_loads_no_weights(no_weights):
    result = plan_images(settings("deit_t", steps=7, method="psaq"))
    assert result.summary["estimated_seconds"] > 0
    assert result.status == "planned"
    assert result.summary["architecture"] == "deit_tiny_patch16_224.fb_in1k"
    assert result.summary["steps"] == 7
    assert plan_images(settings("deit_t", method="noise")).summary["steps"] == 0
    assert not Path("pictures").exists()


def test_classes_beyond_the_last_are_refused(demo):
    with pytest.raises(UsageError, match=r"class 24 .* 24 classes") as caught:
        synthesize_images(settings(demo, classes="0,24"))
    assert "0 to 23" in caught.value.remedy
    assert not Path("pictures").exists()


def test_classes_are_honoured(demo):
    result = synthesize_images(settings(demo, classes="3-4", count=4))
    assert {label for item in result.items for label in item["classes"]} == {3, 4}


@pytest.mark.parametrize(("fixture", "rate"), [("demo", 0.2), ("swin", 0.25)])
def test_the_learning_rate_follows_the_kind_of_attention(request, fixture, rate):
    model = vision.open_model(request.getfixturevalue(fixture)).model
    options = {"method": "spdfq", "model": model, "batch_size": 8, "seed": 0}
    config = api.synthesis_config(effort="quick", **options)
    assert (config.learning_rate, config.patches_per_step) == (rate, 8)
    config = api.synthesis_config(effort="max", learning_rate=0.5, steps=9, **options)
    assert (config.learning_rate, config.patches_per_step, config.steps) == (0.5, None, 9)


def test_a_poor_result_is_noticed(demo, caplog):
    synthesize_images(settings(demo, count=6, steps=1))
    assert "are seen as what they should show" in caplog.text


def test_psaq_is_refused_without_patch_tokens(convolutional):
    with pytest.raises(UsageError, match="ResNet has none") as caught:
        synthesize_images(settings(convolutional("resnet"), method="psaq"))
    assert "--method spdfq" in caught.value.remedy
    assert not Path("pictures").exists()


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_networks_without_attention_are_synthesized_from(convolutional, family):
    result = synthesize_images(settings(convolutional(family)))
    assert len(result.items) == 3
    assert {"images", "labels", "boxes", "agreement"} == set(tensors_of()[1])
