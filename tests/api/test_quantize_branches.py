"""`quantize --engine branches` from pictures to a file, and what is refused on the way."""

import json
from pathlib import Path

import pytest

from qtool.api import quantize as quantize_api
from qtool.api import quantize_branches
from qtool.api.load import load
from qtool.errors import OutputExistsError, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.models.vision import DataConfig
from qtool.settings.quantize import QuantizeSettings

FILE = Path("b.safetensors")


def test_a_training_writes_one_file_for_all_widths(train_branches):
    told = []
    result = train_branches(
        out=FILE, epochs=2, report="r.html", progress=lambda *words: told.append(words)
    )
    summary = result.summary
    assert summary["verify"] == {"max_abs_difference": 0.0}
    assert summary["widths"] == list(range(2, 9))
    assert summary["pictures"] == {"train": 32, "held_out": 4}
    assert [record["epoch"] for record in summary["epochs"]] == [1, 2]
    assert summary["bytes"] == FILE.stat().st_size
    assert not Path(".b.safetensors.resume").exists()
    assert [item["bits"] for item in result.items] == [f"w{b}a{b}" for b in range(2, 9)]
    assert result.items[3]["branches"] == "2 3 h4"
    assert result.items[-1]["needed_bytes"] > result.items[0]["needed_bytes"]
    assert ("train", 4, 4) in [words[:3] for words in told]
    assert "Top-1 on held-out pictures" in Path("r.html").read_text()
    header = checkpoint.read_header(FILE)
    assert (header.engine, header.active_bits) == ("branches", "w8a8")
    assert header.provenance["held_out_top1"] == summary["epochs"][-1]["top1"]
    json.dumps(result.to_dict())


def test_equal_seeds_give_equal_files(train_branches):
    for name in ("one", "two"):
        train_branches(out=Path(f"{name}.safetensors"), bits="any:2,4")
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    train_branches(out=Path("three.safetensors"), bits="any:2,4", seed=1)
    assert Path("one.safetensors").read_bytes() != Path("three.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("ablate", "branches"),
    [
        (("prefix",), ["1", "1 2", "1 2 3", "1 2 3 4"]),
        (("no-distillation",), ["1", "2 3", "2 3 4", "1 2 3 4"]),
        (("one-set", "no-distillation"), ["1", "2", "3", "4"]),
    ],
)
def test_parts_of_the_method_can_be_left_out(train_branches, ablate, branches):
    result = train_branches(out=FILE, bits="any:2,4,6,8", ablate=ablate)
    assert [item["branches"] for item in result.items] == branches
    assert result.summary["training"]["distill"] == ("no-distillation" not in ablate)
    assert checkpoint.read_header(FILE).provenance["ablate"] == list(ablate)
    assert load(FILE, bits=6).active_bits == "w6a6"
    if "one-set" in ablate:
        assert [item["bit_operations"] for item in result.items] == pytest.approx(
            [result.items[0]["bit_operations"] * bits * bits / 4 for bits in (2, 4, 6, 8)]
        )


def test_a_dry_run_tells_what_would_be_done(small_resnet, colours):
    values = {"model": small_resnet, "bits": "any:2-4", "engine": "branches", "train": colours}
    summary = quantize_api.plan(QuantizeSettings.build(values | {"device": "cpu"})).summary
    assert summary["branches"] == {"w2a2": [1], "w3a3": [1, 2], "w4a4": [1, 2]}
    assert summary["pictures"] == {"train": 32, "held_out": 4}
    assert summary["estimated_seconds"] >= 0
    assert not Path(summary["output"]).exists()


def test_networks_of_timm_train_on_parts_of_pictures(train_branches, save_weights, class_folders):
    arguments = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "num_classes": 3}
    data = DataConfig((3, 72, 72), (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9)
    model = save_weights("resnet18", arguments, data=data)
    result = train_branches(model=model, out=FILE, bits="any:2-4", train=class_folders)
    assert result.summary["verify"] == {"max_abs_difference": 0.0}
    assert checkpoint.read_header(FILE).architecture == "resnet18"
    assert load(FILE, bits=3).active_bits == "w3a3"


def test_an_absent_folder_is_told_before_any_work(small_resnet):
    values = {"model": small_resnet, "bits": "any", "engine": "branches", "train": "nowhere"}
    for use in (quantize_api.plan, quantize_api.quantize):
        with pytest.raises(UsageError, match="nowhere does not exist"):
            use(QuantizeSettings.build(values))


def test_networks_without_residual_blocks_are_refused(demo, colours):
    values = {"model": demo, "bits": "any:2-4", "engine": "branches", "train": colours}
    settings = QuantizeSettings.build(values | {"device": "cpu", "out": FILE})
    with pytest.raises(UsageError, match="no body of residual blocks"):
        quantize_api.quantize(settings)
    with pytest.raises(UsageError, match="no body of residual blocks"):
        quantize_api.plan(settings)


def test_an_existing_file_stops_it_before_any_work(train_branches):
    FILE.write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        train_branches(out=FILE)
    assert FILE.read_bytes() == b"mine"


def test_a_file_that_computes_something_else_is_not_written(train_branches, monkeypatch):
    plain = quantize_branches.restore

    def spoiled(*args, **options):
        model = plain(*args, **options)
        model.head.linear.bias += 1
        return model

    monkeypatch.setattr(quantize_branches, "restore", spoiled)
    with pytest.raises(QtoolError, match="was not written"):
        train_branches(out=FILE, bits="any:2,4")
    assert not FILE.exists()
    assert Path(".b.safetensors.resume").exists()
