"""Real and synthesized calibration images, and folders that hold neither."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.api import calibration
from qtool.api import synthesize as synthesize_api
from qtool.errors import CheckpointError, UsageError
from qtool.io import checkpoint
from qtool.io.container import write_container
from qtool.methods.spdfq.priors import Box
from qtool.settings.synthesize import SynthesizeSettings

OUT = Path("q.safetensors")


def synthesize(model, **options):
    synthesize_api.synthesize_images(
        SynthesizeSettings.build(
            {"model": model, "out": Path("pictures"), "count": 6, "device": "cpu", **options}
        )
    )
    return Path("pictures")


@pytest.mark.parametrize("method", ["spdfq", "psaq", "noise"])
def test_synthetic_pictures_name_their_method(quantize, demo, method, caplog):
    quantize(demo, synthetic=synthesize(demo, method=method), out=OUT)
    assert checkpoint.read_header(OUT).provenance["method"] == method
    assert "other weights" not in caplog.text


def test_pictures_of_other_weights_are_noticed(quantize, demo, save_weights, caplog):
    other = save_weights("demo_vit", {"img_size": 32, "embed_dim": 16, "depth": 1}, seed=1)
    quantize(demo, synthetic=synthesize(other), out=OUT)
    assert "was synthesized from other weights" in caplog.text


def test_pictures_of_another_size_are_refused(quantize, demo):
    folder = synthesize("demo_vit", method="noise")
    with pytest.raises(CheckpointError, match=r"images of shape \(3, 64, 64\)"):
        quantize(demo, synthetic=folder, out=OUT)
    assert not OUT.exists()


def test_a_folder_without_exact_images_is_refused(quantize, demo, class_folders):
    with pytest.raises(UsageError, match=r"no synthetic\.safetensors") as caught:
        quantize(demo, synthetic=class_folders, out=OUT)
    assert "--calib" in caught.value.remedy


def test_too_few_pictures_are_noticed(quantize, demo, caplog):
    result = quantize(demo, out=OUT, count=50)
    assert "has only 6 pictures" in caplog.text
    assert result.summary["count"] == 6
    assert checkpoint.read_header(OUT).provenance["count"] == 6


@pytest.mark.parametrize("made", ["[]", "3", "{", '{"config": 3}', '{"config": []}'])
def test_metadata_that_are_no_such_object_are_refused(quantize, demo, made):
    folder = Path("pictures")
    metadata = {"qtool.synthetic": made}
    images = torch.zeros(2, 3, 32, 32)
    write_container(folder / synthesize_api.TENSORS, metadata, {"images": images})
    with pytest.raises(CheckpointError, match="unreadable metadata") as caught:
        quantize(demo, synthetic=folder, out=OUT)
    assert caught.value.remedy


def test_no_images_at_all_are_refused(quantize, demo):
    path = Path("pictures") / synthesize_api.TENSORS
    metadata = {"qtool.synthetic": json.dumps({"config": {"method": "noise"}})}
    write_container(path, metadata, {"images": torch.zeros(0, 3, 32, 32)})
    with pytest.raises(CheckpointError, match="holds no images"):
        quantize(demo, synthetic=path.parent, out=OUT)
    assert not OUT.exists()


def test_an_absent_source_is_refused_before_weights_are_loaded(quantize, monkeypatch):
    monkeypatch.setattr("qtool.models.vision.open_model", None)
    with pytest.raises(UsageError, match="does not exist"):
        quantize("deit_t", calib=Path("absent"), out=OUT)


@pytest.mark.parametrize(("count", "held_out"), [(4, 2), (6, None)])
def test_synthetic_pictures_are_judged_on_others_or_on_their_patches(
    quantize, demo, count, held_out
):
    folder = synthesize(demo)
    result = quantize(demo, synthetic=folder, count=count, out=OUT)
    boxes = synthesize_api.read_tensor_file(folder / synthesize_api.TENSORS)[1]["boxes"]
    own = int((boxes[:, 0] < count).sum())
    assert result.summary["held_out"] == (held_out or math.ceil(own / 4))
    assert result.summary["patches"] == own - math.ceil(own / 4)
    assert f"{own - math.ceil(own / 4)} of their patches" in str(result.tables[0])
    assert 0 <= result.summary["held_out_agreement"] <= 1
    assert "Where the last block looks" in result.pictures[1].title


@given(boxes=st.integers(min_value=0, max_value=400), count=st.integers(min_value=1, max_value=300))
def test_patches_are_trained_on_or_judged_by(boxes, count):
    made = [Box(index % count, 0, 0, 8, 1) for index in range(boxes)]
    trained, judged = calibration._shared_out(made, count=count)
    assert not set(map(id, trained)) & set(map(id, judged))
    assert count + len(trained) <= max(count, calibration.MOST_WITH_PATCHES)
    assert bool(judged) is bool(made)
    assert len(judged) <= calibration.HELD_OUT


def test_patches_follow_the_images_they_were_cut_from():
    images, patches = torch.zeros(2, 3, 8, 8), torch.ones(3, 3, 8, 8)
    alone = calibration.Calibration(images, "spdfq")
    assert torch.equal(alone.everything, images)
    assert torch.equal(
        calibration.Calibration(images, "spdfq", patches=patches).everything,
        torch.cat((images, patches)),
    )


def test_boxes_outside_their_image_are_not_read(quantize, demo):
    folder = Path("pictures")
    boxes = torch.tensor(
        [[0, 0, 0, 40, 1], [7, 0, 0, 8, 1], [0, -1, 0, 8, 1], [0, 0, 0, 0, 1], [1, 8, 8, 16, 1]]
    )
    tensors = {"images": torch.randn(2, 3, 32, 32), "boxes": boxes}
    write_container(folder / synthesize_api.TENSORS, {"qtool.synthetic": "{}"}, tensors)
    assert quantize(demo, synthetic=folder, count=2, out=OUT).summary["held_out"] == 1


def test_real_pictures_keep_others_aside(quantize, demo):
    summary = quantize(demo, count=4, out=OUT).summary
    assert (summary["count"], summary["held_out"]) == (4, 2)
