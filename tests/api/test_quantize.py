"""From float weights to one file: sources of pictures, rules, refusals, interruptions."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from qtool.api import calibration
from qtool.api import quantize as api
from qtool.api import synthesize as synthesize_api
from qtool.api.load import load
from qtool.errors import (
    CheckpointError,
    ImageError,
    MissingError,
    OutputExistsError,
    QtoolError,
    UsageError,
)
from qtool.io import checkpoint
from qtool.io.cache import cache_dir
from qtool.methods.spdfq import batch as batches
from qtool.models import sources, vision
from qtool.quant.layers import QuantConv2d
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.synthesize import SynthesizeSettings

OUT = Path("q.safetensors")
STATE = Path(".q.safetensors.resume")


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(vision, "open_model", refuse)


def planned(**options):
    return api.plan(QuantizeSettings.build({"device": "cpu", **options}))


def synthesize(model, **options):
    synthesize_api.synthesize_images(
        SynthesizeSettings.build(
            {"model": model, "out": Path("pictures"), "count": 6, "device": "cpu", **options}
        )
    )
    return Path("pictures")


def tensors_of(path=OUT):
    return checkpoint.read(path)[1]


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_model_is_quantized_on_real_pictures(quantize, demo):
    result = quantize(demo, out=OUT, bits="w4a4")
    assert result.status == "ok"
    summary = result.summary
    assert summary["count"] == 6
    assert summary["bytes"] == OUT.stat().st_size
    floats = vision.open_model(demo).model.parameters()
    assert summary["float_bytes"] == sum(4 * p.numel() for p in floats)
    assert summary["verify"] == {"max_abs_difference": 0.0, "same_choice": 1.0}
    assert 0 <= summary["calibration_agreement"] <= 1
    header = checkpoint.read_header(OUT)
    assert {item["layer"] for item in result.items} == set(header.layers)
    assert [table.title.split()[0] for table in result.tables] == [
        "Quantized",
        "Layers",
        "Reconstruction",
    ]
    assert result.pictures[0].png.startswith(b"\x89PNG")
    before, after = result.charts[0].lines.values()
    assert len(before) == len(result.charts[0].steps) == len(result.tables[2].rows)
    assert all(0 <= late <= early for early, late in zip(before, after, strict=True))


@pytest.mark.parametrize("bits", ["w8a8", "w3a5", "w2a7"])
def test_the_file_computes_what_calibration_computed(quantize, swin, bits):
    checked = quantize(swin, out=OUT, bits=bits).summary["verify"]
    assert checked["same_choice"] == 1.0
    assert checked["max_abs_difference"] < 1e-3


@pytest.mark.parametrize("budget", ["size", "macs"])
def test_mixed_bits_keep_their_mean_and_the_users_rules(quantize, demo, budget):
    result = quantize(demo, out=OUT, bits="mixed:3.5", budget=budget, keep=("head=w8a4",))
    summary = result.summary
    assert 3.0 < summary["mean_bits"] <= 3.5
    assert len(summary["layers_per_width"]) > 1
    assert summary["verify"]["max_abs_difference"] == 0.0
    header = checkpoint.read_header(OUT)
    assert header.active_bits == "mixed:3.5"
    assert (header.layers["head"].weight_bits, header.layers["head"].input_bits) == (8, 4)
    assert {item["layer"]: item["bits"] for item in result.items}["head"] == "w8a4"
    if budget == "size":
        widths = {name: layer.weight_bits for name, layer in header.layers.items()}
        floats = vision.open_model(demo).model
        sizes = {
            name: floats.get_submodule(name).weight.numel() for name, bits in widths.items() if bits
        }
        mean = sum(widths[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert mean <= 3.7


def test_the_header_says_where_the_weights_came_from(quantize, demo):
    place = Path(demo).resolve()
    quantize(str(place), out=OUT, bits="w3a4", seed=11, effort="max", skip=("head",))
    header = checkpoint.read_header(OUT)
    provenance = header.provenance
    assert str(place.parent).encode() not in OUT.read_bytes()
    assert provenance["weights_sha256"] == sources.sha256(Path(demo))
    assert provenance["weights_source"] == provenance["source"] == place.name
    assert (provenance["seed"], provenance["effort"]) == (11, "max")
    assert provenance["method"] == "real images"
    assert "2412.16553" in provenance["paper"]
    assert vision.DataConfig.from_dict(header.data) == vision.open_model(demo).data
    config = header.quantization_config
    assert config["quant_method"] == "qtool"
    assert config["ignore"] == ["head"]
    widths = {
        name: (group["weights"]["num_bits"], group["input_activations"]["num_bits"])
        for group in config["config_groups"].values()
        for name in group["targets"]
    }
    assert widths["patch_embed.proj"] == (3, 8)
    assert widths["blocks.0.mlp.fc1"] == (3, 4)


def test_the_same_settings_write_the_same_bytes(quantize, demo):
    for name in ("one", "two"):
        quantize(demo, out=Path(f"{name}.safetensors"))
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()


def test_the_seed_chooses_the_pictures(quantize, demo):
    for seed in (0, 1):
        quantize(demo, out=Path(f"{seed}.safetensors"), seed=seed, count=2)
    scale = "blocks.0.mlp.fc1.input_scale"
    assert tensors_of(Path("0.safetensors"))[scale] != tensors_of(Path("1.safetensors"))[scale]


def test_data_free_is_synthesis_and_then_quantization(quantize, demo):
    result = quantize(demo, data_free=True, out=OUT)
    assert result.summary["synthesis_steps"] == 4
    assert 0 <= result.summary["image_agreement"] <= 1
    assert checkpoint.read_header(OUT).provenance["method"] == "spdfq"
    assert not STATE.exists()
    folder = synthesize(demo, effort="quick")
    quantize(demo, synthetic=folder, out=Path("two.safetensors"))
    assert_same_tensors(tensors_of(Path("two.safetensors")), tensors_of())


def test_windows_need_no_data_either(quantize, swin):
    result = quantize(swin, data_free=True, out=OUT, count=3)
    assert result.summary["verify"]["same_choice"] == 1.0


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext"])
@pytest.mark.parametrize("recipe", ["strong", "paper"])
def test_convolutional_networks_go_all_the_way(quantize, convolutional, family, recipe):
    model = convolutional(family)
    result = quantize(model, data_free=True, out=OUT, count=3, recipe=recipe)
    assert result.summary["verify"] == {"max_abs_difference": 0.0, "same_choice": 1.0}
    assert checkpoint.read_header(OUT).provenance["method"] == "spdfq"
    loaded = load(OUT)
    assert not [name for name in loaded.state_dict() if "running_mean" in name]
    convolutions = [m for m in loaded.modules() if isinstance(m, QuantConv2d)]
    assert sum(item["kind"] == "conv" for item in result.items) == len(convolutions) > 0
    # A linear layer after a LayerNorm takes over some of its gain, so its weights are others.
    errors = [item["weight_error"] for item in result.items if item["kind"] == "conv"]
    assert max(errors) < 0.1
    assert {item["backend"] for item in result.items} <= {"cpu", "reference"}
    first = next(item for item in result.items if item["kind"] == "conv")
    assert first["output_error"] < 0.1


def test_convolutions_take_part_in_mixed_precision(quantize, convolutional):
    result = quantize(convolutional("resnet"), out=OUT, bits="mixed:4.0")
    assert result.summary["mean_bits"] <= 4.0
    assert result.summary["verify"]["max_abs_difference"] == 0.0
    assert len({item["bits"] for item in result.items if item["kind"] == "conv"}) > 1


def test_a_convolution_left_in_float_keeps_its_norm(quantize, convolutional):
    model = convolutional("resnet")
    quantize(model, out=OUT, skip=("layer1.0.conv2",), bits="w8a8")
    loaded = load(OUT)
    original = vision.open_model(model).model
    assert torch.equal(loaded.layer1[0].conv2.weight, original.layer1[0].conv2.weight)
    assert isinstance(loaded.layer1[0].bn2, torch.nn.BatchNorm2d)
    assert isinstance(loaded.layer1[0].bn1, torch.nn.Identity)
    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = original(pictures), loaded(pictures)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_header_that_folds_no_norm_is_refused(quantize, convolutional):
    quantize(convolutional("resnet"), out=OUT)
    header, tensors = checkpoint.read(OUT)
    layer = header.layers["layer1.0.conv1"]
    wrong = layer.model_copy(update={"options": {**layer.options, "norm": "fc"}})
    changed = header.model_copy(update={"layers": {**header.layers, "layer1.0.conv1": wrong}})
    checkpoint.write(OUT, changed, tensors, overwrite=True)
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load(OUT)


def test_a_picture_that_cannot_be_read_ends_the_run(quantize, demo, class_folders):
    (class_folders / "0" / "0.png").write_bytes(b"rubbish")
    with pytest.raises(ImageError, match=r"0\.png"):
        quantize(demo, out=OUT)
    assert not OUT.exists()


def test_rules_for_single_layers_are_honoured(quantize, demo):
    result = quantize(
        demo,
        out=OUT,
        bits="w4a4",
        keep=("blocks.0.*=w6a6", "head=8"),
        skip=("blocks.1.mlp.*",),
    )
    layers = checkpoint.read_header(OUT).layers
    assert (layers["blocks.0.attn.qkv"].weight_bits, layers["head"].input_bits) == (6, 8)
    assert layers["blocks.1.attn.qkv"].weight_bits == 4
    assert not [name for name in layers if name.startswith("blocks.1.mlp")]
    assert {item["layer"]: item["bits"] for item in result.items}["blocks.0.attn"] == "a6"
    assert type(load(OUT).blocks[1].mlp.fc1) is nn.Linear


@pytest.mark.parametrize("bits", ["w4a4", "any:2-8"])
def test_rotated_layers_without_bias_are_stored_and_read(quantize, save_weights, bits):
    arguments = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = save_weights(
        "deit3_small_patch16_224", {**arguments, "qkv_bias": False, "init_values": 0.5}
    )
    assert quantize(model, out=OUT, bits=bits).summary["verify"]["max_abs_difference"] < 1e-4
    found = load(OUT)
    assert torch.equal(found.blocks[0].ls1.gamma, torch.ones(32))
    assert found(torch.zeros(2, 3, 32, 32)).isfinite().all()


def test_a_skipped_layer_is_untouched_where_nothing_is_rotated(quantize, demo):
    quantize(demo, out=OUT, recipe="paper", skip=("blocks.1.mlp.*",))
    original = vision.open_model(demo).model.blocks[1].mlp.fc1.weight
    assert torch.equal(load(OUT).blocks[1].mlp.fc1.weight, original)


@pytest.mark.parametrize("rule", [{"keep": ("haed=8",)}, {"skip": ("haed",)}])
def test_a_rule_for_no_layer_is_refused_naming_layers(quantize, demo, rule):
    with pytest.raises(UsageError, match="no layer matches 'haed'") as caught:
        quantize(demo, out=OUT, **rule)
    assert "patch_embed.proj" in caught.value.remedy
    assert not OUT.exists()


def test_existing_output_is_refused_before_any_work(quantize, no_weights):
    OUT.write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        quantize("deit_t", out=OUT)
    with pytest.raises(OutputExistsError):
        planned(model="deit_t", data_free=True, out=OUT)
    skipped = quantize("deit_t", out=OUT, skip_existing=True)
    assert skipped.summary == {"output": str(OUT), "status": "skipped"}
    assert planned(model="deit_t", data_free=True, out=OUT, skip_existing=True).summary["skipped"]
    assert OUT.read_bytes() == b"mine"


def test_a_report_that_cannot_be_written_is_refused_before_any_work(quantize, no_weights):
    Path("report.html").mkdir()
    with pytest.raises(UsageError, match=r"report\.html is a folder"):
        quantize("deit_t", out=OUT, report=Path("report.html"))


def test_existing_output_can_be_replaced(quantize, demo, stale):
    OUT.write_bytes(b"mine")
    left = stale(OUT.parent)
    quantize(demo, out=OUT, overwrite=True)
    assert checkpoint.read_header(OUT).active_bits == "w4a4"
    assert not left.exists()


@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_reports_are_written(quantize, demo, suffix):
    report = Path(f"report{suffix}")
    result = quantize(demo, out=OUT, report=report)
    text = report.read_text()
    assert "blocks.0.mlp.fc1" in text
    if suffix == ".json":
        assert json.loads(text)["summary"]["bytes"] == result.summary["bytes"]


@pytest.mark.parametrize("data_free", [True, False])
def test_a_plan_loads_no_weights_and_writes_nothing(no_weights, class_folders, data_free):
    source = {"data_free": True} if data_free else {"calib": class_folders}
    before = sorted(Path.cwd().rglob("*"))
    result = planned(model="deit_t", bits="w4a8", steps=9, **source)
    assert result.status == "planned"
    summary = result.summary
    assert summary["architecture"] == "deit_tiny_patch16_224.fb_in1k"
    assert summary["output"] == "deit_t-w4a8.safetensors"
    assert summary["reconstruction_steps"] == 9
    assert summary["synthesis_steps"] == (4 if data_free else 0)
    assert summary["estimated_bytes"] == pytest.approx(3.37e6, rel=0.03)  # as DeiT-tiny came out
    assert summary["estimated_seconds"] > 0
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"bits": "w8a8"}, 0),
        ({"bits": "mixed:8"}, 0),
        ({"bits": "w8a8", "steps": 5}, 5),
        ({"bits": "w8a8", "keep": ("head=w4a8",)}, 1),
        ({"bits": "w8a7"}, 1),
        ({"bits": "any:2-8"}, 1),
    ],
)
def test_nothing_is_trained_where_all_layers_have_eight_bits(no_weights, options, steps):
    found = planned(model="deit_t", data_free=True, **options).summary["reconstruction_steps"]
    assert found == steps


def test_untrained_blocks_keep_their_error(quantize, demo):
    trained = quantize(demo, out=OUT, bits="w8a8", steps=2).charts[0].lines.values()
    before, after = quantize(demo, out=OUT, bits="w8a8", overwrite=True).charts[0].lines.values()
    assert list(before) == list(after)
    assert [list(line) for line in trained] != [list(before), list(after)]


@pytest.mark.parametrize("bits", ["w4a4", "any:2-8", "any:2,4"])
def test_a_plan_tells_the_size_of_the_file(quantize, class_folders, bits):
    told = planned(model="demo_vit", bits=bits, calib=class_folders).summary["estimated_bytes"]
    made = quantize("demo_vit", out=OUT, bits=bits, count=2, steps=1, effort="quick")
    assert made.summary["bytes"] == pytest.approx(told, rel=0.1)


def test_a_plan_refuses_what_the_run_would(no_weights, demo):
    with pytest.raises(UsageError, match="absent"):
        planned(model="deit_t", data_free=True, keep=("absent=w8a8",))
    with pytest.raises(UsageError, match="does not exist"):
        planned(model="deit_t", calib=Path("absent"))
    with pytest.raises(UsageError, match=r"no synthetic\.safetensors in absent"):
        planned(model="deit_t", synthetic=Path("absent"))
    with pytest.raises(MissingError, match="no weights file absent"):
        planned(model="deit_t", weights="absent", data_free=True)
    with pytest.raises(MissingError, match="no file absent"):
        planned(model="absent.safetensors", data_free=True)
    with pytest.raises(UsageError, match="no model called 'deit_tt'") as caught:
        planned(model="deit_tt", data_free=True)
    assert "deit_t" in caught.value.remedy
    assert planned(model=demo, data_free=True).summary["architecture"] == "demo_vit"


def test_what_is_there_is_skipped_and_nothing_is_written(quantize, no_weights):
    OUT.write_bytes(b"mine")
    before = sorted(Path.cwd().rglob("*"))
    result = quantize("deit_t", out=OUT, skip_existing=True, report=Path("report.html"))
    assert (result.status, result.exit_code) == ("ok", 0)
    assert sorted(Path.cwd().rglob("*")) == before


def test_without_synthesis_there_is_nothing_to_resume(quantize, demo):
    quantize(demo, out=Path("one.safetensors"))
    quantize(demo, out=OUT, resume=True)
    assert OUT.read_bytes() == Path("one.safetensors").read_bytes()


def test_progress_is_told_stage_by_stage(quantize, demo):
    calls = []
    quantize(
        demo,
        data_free=True,
        out=OUT,
        progress=lambda stage, done, total, note="": calls.append((stage, done, total)),
    )
    stages = dict.fromkeys(stage for stage, _, _ in calls)
    assert list(stages) == ["synthesize", "reconstruct"]
    assert [call for call in calls if call[0] == "reconstruct"] == [
        ("reconstruct", index, 4) for index in range(1, 5)
    ]


def test_a_killed_run_goes_on_and_writes_the_same_file(quantize, demo, monkeypatch):
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(synthesize_api, "_SAVE_SECONDS", 0.0)
    quantize(demo, data_free=True, out=Path("whole.safetensors"))
    monkeypatch.setenv("QTOOL_CACHE", "empty")

    def kill(stage, done, total, note=""):
        if (stage, done) == ("synthesize", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(demo, data_free=True, out=OUT, progress=kill)
    assert STATE.is_file()
    assert not OUT.exists()
    with pytest.raises(CheckpointError, match="other settings"):
        quantize(demo, data_free=True, out=OUT, resume=True, seed=5)
    steps = []
    quantize(
        demo,
        data_free=True,
        out=OUT,
        resume=True,
        progress=lambda stage, done, total, note="": steps.append((stage, done)),
    )
    assert steps[0] == ("synthesize", 3)
    assert not STATE.exists()
    assert_same_tensors(tensors_of(), tensors_of(Path("whole.safetensors")))


def test_another_width_takes_the_images_that_were_made(quantize, demo, caplog):
    caplog.set_level("INFO", "qtool.notice")
    first = quantize(demo, data_free=True, out=Path("first.safetensors"))
    stages = []
    second = quantize(
        demo,
        data_free=True,
        bits="w6a6",
        out=Path("second.safetensors"),
        progress=lambda stage, done, total, note="": stages.append(stage),
    )
    assert set(stages) == {"reconstruct"}
    assert "an earlier run kept" in caplog.text
    for name in ("image_agreement", "synthesis_steps", "held_out"):
        assert first.summary[name] == second.summary[name]
    # The same command again writes the same bytes.
    quantize(demo, data_free=True, out=OUT)
    assert OUT.read_bytes() == Path("first.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"count": 5}, {"effort": "standard"}])
def test_other_settings_make_other_images(quantize, demo, monkeypatch, change):
    monkeypatch.setitem(synthesize_api.STEPS, "standard", 2)
    quantize(demo, data_free=True, out=Path("first.safetensors"))
    stages = []
    quantize(
        demo,
        data_free=True,
        out=OUT,
        progress=lambda stage, done, total, note="": stages.append(stage),
        **change,
    )
    assert "synthesize" in stages


def test_damaged_images_are_made_again(quantize, demo, caplog):
    caplog.set_level("INFO", "qtool.notice")
    quantize(demo, data_free=True, out=Path("first.safetensors"))
    (kept,) = (cache_dir() / "synthesis").iterdir()
    kept.write_bytes(kept.read_bytes()[:2000])
    quantize(demo, data_free=True, out=OUT)
    assert "making the images again" in caplog.text
    assert OUT.read_bytes() == Path("first.safetensors").read_bytes()


def test_a_cache_that_cannot_be_written_stops_nothing(quantize, demo, monkeypatch):
    Path("file").write_text("no folder")
    monkeypatch.setenv("QTOOL_CACHE", "file")
    quantize(demo, data_free=True, out=OUT)
    assert OUT.is_file()


def test_a_run_killed_after_synthesis_keeps_its_images(quantize, demo):
    def kill(stage, done, total, note=""):
        if stage == "reconstruct":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(demo, data_free=True, out=OUT, progress=kill)
    assert STATE.is_file()
    stages = []
    quantize(
        demo,
        data_free=True,
        out=OUT,
        resume=True,
        progress=lambda stage, done, total, note="": stages.append(stage),
    )
    assert set(stages) == {"reconstruct"}
    assert not STATE.exists()


def shift(tensors):
    tensors["head.bias"] += 5


def double(tensors):
    tensors["head.weight_scale"] *= 2
    tensors["head.bias"] *= 2


def choose_another(tensors):
    tensors["head.bias"] += 5 * torch.arange(24.0)


def spoil(tensors):
    tensors["head.bias"] *= torch.nan


@pytest.fixture
def tampering(monkeypatch, request):
    """Something changes the file between its writing and its reading."""
    real = checkpoint.write

    def write(path, header, tensors, **options):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        request.param(changed)
        real(path, header, changed, **options)

    monkeypatch.setattr(checkpoint, "write", write)


@pytest.mark.parametrize("tampering", [shift, double, choose_another, spoil], indirect=True)
@pytest.mark.parametrize("existing", [True, False])
def test_a_file_that_computes_something_else_is_not_written(quantize, demo, tampering, existing):
    if existing:
        OUT.write_bytes(b"mine")
    before = sorted(Path.cwd().rglob("*"))
    with pytest.raises(QtoolError, match="computes other outputs than calibration"):
        quantize(demo, out=OUT, overwrite=existing)
    assert sorted(Path.cwd().rglob("*")) == before
    assert not existing or OUT.read_bytes() == b"mine"


@pytest.mark.parametrize("tampering", [choose_another], indirect=True)
def test_the_check_can_be_left_out(quantize, demo, tampering):
    assert "verify" not in quantize(demo, out=OUT, verify=False).summary


def test_an_unknown_model_is_refused(quantize):
    with pytest.raises(UsageError, match="no model called 'demo_vti'") as caught:
        quantize("demo_vti", out=OUT)
    assert "demo_vit" in caught.value.remedy


@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_a_long_synthesis_is_announced(quantize, demo, monkeypatch, caplog, effort):
    monkeypatch.setitem(synthesize_api.STEPS, "standard", 2)
    monkeypatch.setattr(calibration, "LONG_MINUTES", 0)
    quantize(demo, data_free=True, out=OUT, effort=effort)
    assert ("--effort quick takes" in caplog.text) == (effort == "standard")
    caplog.clear()
    quantize(demo, data_free=True, out=OUT, effort=effort, overwrite=True)
    assert "--effort quick" not in caplog.text


def test_networks_for_cifar_are_quantized_like_others(quantize, small_resnet):
    result = quantize(small_resnet, bits="w4a4", out="r.safetensors")
    assert result.summary["verify"]["max_abs_difference"] == 0.0
    assert result.summary["architecture"] == "resnet8"
