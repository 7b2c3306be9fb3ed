"""One file for all widths: made, cut, switched, measured."""

import copy
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.api import evaluate as evaluate_api
from qtool.api.load import load
from qtool.api.runtime import read_picture
from qtool.api.switch_bits import switch_bits
from qtool.engine import dispatch
from qtool.errors import CheckpointError, UsageError
from qtool.io import checkpoint, folders
from qtool.io.container import read_table
from qtool.models import vision
from qtool.quant.fusion import NestedBlock
from qtool.quant.widths import bits
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.switch_bits import SwitchBitsSettings

FILE = Path("any.safetensors")
MADE: dict[str, bytes] = {}


@pytest.fixture
def made(quantize, demo):
    """A switchable file of the tiny demo model, 2 to 8 bits; made once."""
    if not MADE:
        result = quantize(demo, bits="any:2-8", recipe="paper", out=FILE, effort="standard")
        assert result.summary["verify"]["max_abs_difference"] == 0.0
        MADE["any"] = FILE.read_bytes()
    FILE.write_bytes(MADE["any"])
    return FILE


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def switch(target, **options):
    return switch_bits(SwitchBitsSettings.build({"target": target, **options}))


def sections(path):
    """Where the tensors' bytes begin and where each section ends, in bytes of the file."""
    with path.open("rb") as file:
        table = read_table(file, path)
    ends = [end for end, _ in json.loads(table.metadata["qtool.sections"])]
    return table.data_start, [table.data_start + end for end in ends]


def tensor_bytes(path):
    start, _ = sections(path)
    return hashlib.sha256(path.read_bytes()[start:]).hexdigest()


def test_switching_back_equals_a_fresh_load(made, images):
    model = load(made)
    with torch.no_grad():
        fresh = model(images)
        model.set_bits(3)
        low = model(images)
        model.set_bits(8)
        assert torch.equal(model(images), fresh)
        assert torch.equal(load(made, bits=3)(images), low)
        assert torch.equal(load(made)(images, bits="w3a8"), low)
        with bits(3):
            assert torch.equal(model(images), low)
    assert not torch.equal(low, fresh)


def test_eight_bits_are_near_the_float_model_on_pictures(made, demo, class_folders):
    opened = vision.open_model(demo)
    paths = folders.find_images(class_folders)
    images = torch.stack([read_picture(path, opened.data) for path in paths])
    with torch.no_grad():
        found, expected = load(made)(images), opened.model(images)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert float(cosine) >= 0.999


@pytest.mark.parametrize("extra", [0, 7])
def test_a_file_cut_after_the_second_plane_runs_at_four_bits(made, images, extra):
    with torch.no_grad():
        expected = load(made)(images, bits="w4a8")
    _, ends = sections(made)
    cut = Path("cut.safetensors")
    cut.write_bytes(made.read_bytes()[: ends[2] + extra])
    model = load(cut, bits=4)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    for refused in (6, None):
        with pytest.raises(UsageError, match="its weights end after plane p2") as caught:
            load(cut, bits=refused)
        assert "2, 3, 4 bits" in caught.value.remedy
    with pytest.raises(UsageError, match="plane p2"):
        switch(cut, bits="6", in_place=True)
    switch(cut, bits="4", in_place=True)
    assert load(cut).active_bits == "w4a8"


def test_cut_or_damaged_files_are_refused(made):
    whole = made.read_bytes()
    start, ends = sections(made)
    assert len(ends) == 5
    for length in (ends[0] - 1, ends[0], start - 5):
        made.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(made, bits=2)
    spoiled = bytearray(whole[: ends[2]])
    spoiled[ends[1] + 3] ^= 1
    made.write_bytes(bytes(spoiled))
    with pytest.raises(CheckpointError, match="checksum"):
        load(made, bits=4)


def test_a_map_changes_the_layers_it_names(made, images):
    model = load(made)
    outputs = {}

    def keep(name):
        return lambda _, __, output: outputs.__setitem__(name, output)

    for name in ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"):
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        model(images)
        before = dict(outputs)
        model.set_bits({"*.0.mlp.fc2": 2})
        model(images)
    assert torch.equal(outputs["blocks.0.mlp.fc1"], before["blocks.0.mlp.fc1"])
    assert not torch.equal(outputs["blocks.0.mlp.fc2"], before["blocks.0.mlp.fc2"])
    assert [n for n, spec in model.layer_bits.items() if spec.weight == 2] == ["blocks.0.mlp.fc2"]


def test_a_switch_in_place_touches_the_header_alone(made, images):
    before, size, inode = tensor_bytes(made), made.stat().st_size, made.stat().st_ino
    result = switch(made, bits="4", layers=("blocks.0.*=w8a8",), in_place=True)
    assert result.summary["active_bits"] == "mixed"
    assert (tensor_bytes(made), made.stat().st_size, made.stat().st_ino) == (before, size, inode)
    with torch.no_grad():
        found = load(made)(images)
        expected = load(made)(images, bits={"*": 4, "blocks.0.*": 8})
    assert torch.equal(found, expected)
    switch(made, bits="8", in_place=True)
    assert made.read_bytes() == MADE["any"]


def test_a_copy_leaves_its_source_and_what_is_there_alone(made, stale):
    switch(made, bits="w4a4", out=Path("copy.safetensors"))
    assert made.read_bytes() == MADE["any"]
    assert load("copy.safetensors").active_bits == "w4a4"
    assert tensor_bytes(Path("copy.safetensors")) == tensor_bytes(made)
    with pytest.raises(UsageError, match="exists"):
        switch(made, bits="4", out=Path("copy.safetensors"))
    for dry_run in (True, False):
        kept = switch(
            made, bits="4", out=Path("copy.safetensors"), skip_existing=True, dry_run=dry_run
        )
        assert kept.summary["status"] == "skipped"
        assert kept.status == ("planned" if dry_run else "ok")
    assert load("copy.safetensors").active_bits == "w4a4"
    left = stale(Path())
    switch(made, bits="8", out=Path("copy.safetensors"), overwrite=True)
    assert load("copy.safetensors").active_bits == "w8a8"
    assert not left.exists()
    with pytest.raises(UsageError, match="replace its source"):
        switch(made, bits="4", out=made, overwrite=True)


def test_a_dry_run_writes_nothing(made):
    for place in ({"in_place": True}, {"out": Path("copy.safetensors")}):
        planned = switch(made, bits="4", dry_run=True, **place)
        assert (planned.status, planned.summary["active_bits"]) == ("planned", "w4a8")
    assert made.read_bytes() == MADE["any"]
    assert not Path("copy.safetensors").exists()


def test_unused_planes_are_dropped(made, images):
    small = Path("small.safetensors")
    switch(made, layers=("*=3", "blocks.1.mlp.fc2=6"), out=small, drop_unused=True)
    assert small.stat().st_size < 0.9 * made.stat().st_size
    with torch.no_grad():
        expected = load(made)(images, bits={"*": 3, "blocks.1.mlp.fc2": 6})
        model = load(small)
        assert torch.equal(model(images), expected)
        assert torch.equal(model(images, bits=4), load(made)(images, bits=4))
    with pytest.raises(UsageError, match="plane p2"):
        model.set_bits(6)


@pytest.mark.parametrize("request_", [8, "w4a4", {"*": 3, "blocks.1.mlp.*": "w6a5"}], ids=str)
def test_blocks_run_whole_and_give_what_their_layers_give(made, images, request_):
    model = load(made)
    blocks = [m for m in model.modules() if isinstance(m, NestedBlock)]
    assert len(blocks) == 2
    with torch.no_grad():
        with dispatch.trace() as decisions:
            whole = model(images, bits=request_)
        runs = dispatch.runs_whole_blocks(torch.device("cpu"))
        assert (dispatch.WHOLE_BLOCK in decisions) == runs
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(blocks[0]))):
            assert not any(m._programs for m in copied.modules() if isinstance(m, NestedBlock))
        hooks = [block.attn.register_forward_hook(lambda *_: None) for block in blocks]
        with dispatch.trace() as decisions:
            assert torch.equal(model(images, bits=request_), whole)
        assert dispatch.WHOLE_BLOCK not in decisions
        for hook in hooks:
            hook.remove()
        with dispatch.use_backend("reference"):
            assert torch.equal(model(images, bits=request_), whole)


def test_a_block_that_was_written_to_is_another_one(made, images):
    model = load(made)
    with torch.no_grad():
        before = model(images)
        model.get_submodule("blocks.0.mlp.fc1").alpha.mul_(1.5)
        after = model(images)
        assert not torch.equal(before, after)
        with dispatch.use_backend("reference"):
            assert torch.equal(model(images), after)


def test_two_bits_may_have_codes_of_their_own(quantize, demo, images):
    plain, own = Path("plain.safetensors"), Path("own.safetensors")
    options = {"bits": "any:2,4,8", "recipe": "paper", "effort": "quick"}
    quantize(demo, out=plain, **options)
    result = quantize(demo, out=own, dedicated_2bit=True, **options)
    assert result.summary["verify"]["max_abs_difference"] == 0.0
    planes = sum(checkpoint.read_planes(own).plane_bytes.values())
    assert planes <= own.stat().st_size - plain.stat().st_size < planes + 6000
    lost = {}
    for path in (plain, own):
        with torch.no_grad():
            whole, low = (load(path)(images, bits=width) for width in (8, 2))
        lost[path] = float((low - whole).square().mean())
    assert lost[own] < lost[plain]
    with torch.no_grad():
        expected = load(own)(images, bits=2)
        assert not torch.equal(expected, load(own)(images, bits=4))
    _, ends = sections(own)
    for whole, last in ((ends[0], 0), (ends[2], 2)):
        cut = Path(f"cut{last}.safetensors")
        cut.write_bytes(own.read_bytes()[:whole])
        model = load(cut, bits=2)
        with torch.no_grad():
            assert torch.equal(model(images), expected)
        with pytest.raises(UsageError, match=f"end after {'plane p2' if last else 'those of 2 b'}"):
            model.set_bits(8)
    small, mixed = Path("small.safetensors"), Path("mixed.safetensors")
    switch(own, bits="2", out=small, drop_unused=True)
    assert not checkpoint.read_planes(small).planes
    switch(own, layers=("*=2", "blocks.1.mlp.fc2=4"), out=mixed, drop_unused=True)
    assert small.stat().st_size < mixed.stat().st_size < own.stat().st_size - planes
    with torch.no_grad():
        assert torch.equal(load(small)(images), expected)
        wanted = load(own)(images, bits={"*": 2, "blocks.1.mlp.fc2": 4})
        assert torch.equal(load(mixed)(images), wanted)
    rows = {row["bits"]: row for row in switch(own, listing=True).summary["rows"]}
    narrow, wide = (rows[width]["needed_bytes"] for width in ("w2a8", "w4a8"))
    assert wide - narrow == 2 * planes


@pytest.mark.parametrize("budget", ["60%", "size"])
def test_a_budget_is_kept(made, budget):
    header = checkpoint.read_header(made)
    assert header.nested.sensitivity
    _, ends = sections(made)
    limit = (ends[2] + ends[3]) / 2
    text = f"{limit / 1e6:.6f}MB" if budget == "size" else budget
    out = Path("budget.safetensors")
    result = switch(made, budget=text, out=out, drop_unused=True)
    assert len({item["bits"] for item in result.items if item["kind"] == "linear"}) > 1
    if budget == "size":
        assert out.stat().st_size <= limit + 300
    else:
        rows = switch(made, listing=True).summary["rows"]
        full = next(row["bit_operations"] for row in rows if row["bits"] == "w8a8")
        assert 0.5 * full < result.summary["bit_operations"] <= 0.6 * full
    with pytest.raises(UsageError, match="nothing fits"):
        switch(made, budget="0.001MB", in_place=True)


def test_the_list_names_every_width(made):
    result = switch(made, listing=True)
    assert result.summary["active_bits"] == "w8a8"
    assert {"w8a8", "w5a8", "w2a8", "w2a2"} <= set(result.summary["widths"])
    sizes = {row["bits"]: row["needed_bytes"] for row in result.summary["rows"]}
    assert sizes["w8a8"] == made.stat().st_size
    assert sizes["w2a8"] < sizes["w4a8"] == sizes["w3a8"]


def test_files_with_one_width_are_not_switchable(quantize, demo):
    quantize(demo, bits="w8a8", recipe="paper", out=Path("fixed.safetensors"))
    with pytest.raises(UsageError, match="one width per layer"):
        switch(Path("fixed.safetensors"), bits="4", in_place=True)
    with pytest.raises(UsageError, match="cannot run at 4"):
        load("fixed.safetensors", bits=4)


def test_widths_are_measured_in_one_run(made, demo):
    settings = EvaluateSettings.build(
        {
            "target": str(made),
            "weights": demo,
            "bits": ("8", "w4a4", "2"),
            "count": 6,
            "batch_size": 3,
            "device": "cpu",
            "latency": True,
            "report": Path("report.html"),
        }
    )
    result = evaluate_api.evaluate(settings)
    names = [item["model"] for item in result.items]
    assert names[1:] == ["w8a8", "w4a4", "w2a8"]
    assert result.items[0]["model"].startswith("float32")
    sizes = [item["bytes"] for item in result.items[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert all("drop" in item and item["bit_operations"] > 0 for item in result.items[1:])
    assert {row["model"] for row in result.summary["latency"]} >= {"w8a8", "w4a4", "w2a8"}
    page = Path("report.html").read_text()
    assert "<svg" in page
    assert "Accuracy at every width" in page


def test_kept_layers_are_pinned_and_ends_stay_in_half_precision(quantize, demo):
    quantize(demo, bits="any:3-8", recipe="paper", effort="quick", keep=("head=8",), out=FILE)
    header = checkpoint.read_header(FILE)
    assert header.layers["head"].options["pinned"] is True
    assert "patch_embed.proj" not in header.layers
    model = load(FILE)
    model.set_bits(3)
    assert str(model.layer_bits["head"]) == "w8a8"
    tensors = checkpoint.read(FILE)[1]
    assert tensors["patch_embed.proj.weight"].dtype == torch.float16
    with pytest.raises(UsageError, match="cannot be kept"):
        quantize(demo, bits="any:4-8", keep=("head=3",), out=Path("other.safetensors"))


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "convnext"])
def test_convolutional_networks_are_switchable(quantize, convolutional, images, family):
    model = convolutional(family)
    result = quantize(model, bits="any:2-8", out=FILE)
    assert result.summary["verify"]["max_abs_difference"] < 1e-4
    header = checkpoint.read_header(FILE)
    reference = vision.open_model(model).model
    convolutions = {
        name: module
        for name, module in reference.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }
    grouped = {name for name, module in convolutions.items() if module.groups > 1}
    assert grouped.isdisjoint(header.layers)
    assert set(convolutions) & set(header.layers)
    loaded = load(FILE)
    errors = {}
    with torch.no_grad():
        expected = reference(images)
        for width in (8, 6, 4, 2):
            errors[width] = float((loaded(images, bits=width) - expected).square().mean())
    assert errors[8] < errors[4] < errors[2]
    assert errors[8] < 1e-2 * float(expected.square().mean())
    loaded.set_bits({"*": 4})
    again = load(FILE, bits=4)
    with torch.no_grad():
        assert torch.equal(loaded(images), again(images))


def test_norms_that_were_folded_are_gone_and_those_left_are_stored(quantize, convolutional):
    quantize(convolutional("mobilenet"), bits="any:4-8", out=FILE)
    header, tensors = checkpoint.read(FILE)
    folded = {str(layer.options.get("norm")) for layer in header.layers.values()} - {"None"}
    left = {name: tensor for name, tensor in tensors.items() if name.endswith(".running_var")}
    assert folded
    assert left
    assert folded.isdisjoint(name.rpartition(".")[0] for name in left)
    assert {tensor.dtype for tensor in left.values()} == {torch.float16}


def test_what_sees_the_picture_has_one_width_of_activations(quantize, convolutional, images):
    quantize(convolutional("convnext"), bits="any:4-8", out=FILE)
    header = checkpoint.read_header(FILE)
    assert header.layers["stem.0"].options[checkpoint.SEES_PICTURE] is True
    model = load(FILE, bits="w4a4")
    widths = {name: str(spec) for name, spec in model.layer_bits.items()}
    assert widths.pop("stem.0") == "w4a8"
    assert set(widths.values()) == {"w4a4"}
    assert model(images).isfinite().all()


def test_convolutions_in_groups_cannot_be_kept(quantize, convolutional):
    with pytest.raises(UsageError, match="in groups"):
        quantize(convolutional("mobilenet"), bits="any:4-8", keep=("*conv_dw=8",), out=FILE)
    assert not FILE.exists()


def test_widths_may_be_a_list(quantize, demo):
    result = quantize(demo, bits="any:2,8", recipe="paper", out=FILE)
    assert result.summary["widths"] == [2, 8]
    assert load(FILE, bits=2).active_bits == "w2a8"
    with pytest.raises(UsageError):
        load(FILE, bits=4)


def test_a_resnet_chooses_as_in_float_at_eight_bits(quantize, shared_data, tmp_path):
    folder = shared_data / "cifar10"
    sheet = Image.open(folder / "train" / "cat.webp").convert("RGB")
    for index in range(32):
        left, top = 32 * (index % 8), 32 * (index // 8)
        sheet.crop((left, top, left + 32, top + 32)).save(tmp_path / f"{index}.png")
    weights = shared_data / "weights" / "cifar10_resnet20.safetensors"
    quantize("resnet20", weights=str(weights), calib=tmp_path, bits="any:4-8", out=FILE)
    opened = vision.open_model("resnet20", weights=weights)
    with np.load(folder / "cifar10_test.npz", allow_pickle=True) as found:
        pictures = torch.from_numpy(found["x_test"][:400]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (opened.data.mean, opened.data.std))
    pictures = (pictures - mean) / std
    model = load(FILE)
    with torch.no_grad():
        expected = opened.model(pictures).argmax(1)
        same = {
            n: float((model(pictures, bits=n).argmax(1) == expected).float().mean()) for n in (8, 4)
        }
    assert same[8] >= 0.99
    assert same[4] >= 0.9
