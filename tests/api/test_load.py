"""Checkpoints become models again, or are refused."""

import json
from pathlib import Path

import pytest
import torch

from qtool.api.load import load, restore
from qtool.engine.packing import packed_width
from qtool.errors import CheckpointError, UsageError
from qtool.io import checkpoint
from qtool.methods.spdfq.reconstruction import (
    ReconstructionConfig,
    freeze,
    reconstruct,
    simulate,
)
from qtool.models import vision
from qtool.quant.bits import BitSpec
from qtool.quant.plan import plan_layers


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def rewritten(path, change):
    """Write a checkpoint again with a changed header and tensors."""
    header, tensors = checkpoint.read(Path(path))
    values = header.model_dump()
    change(values, tensors)
    checkpoint.write(Path(path), checkpoint.Header(**values), tensors, overwrite=True)


@pytest.mark.parametrize("model", ["demo", "swin"])
@pytest.mark.parametrize("bits", ["w2a3", "w4a4", "w5a7", "w8a8"])
def test_a_file_holds_the_whole_model(request, quantize, images, model, bits):
    source = request.getfixturevalue(model)
    quantize(source, bits=bits, out="q.safetensors")
    loaded = load("q.safetensors")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in loaded.buffers())
    header, tensors = checkpoint.read(Path("q.safetensors"))
    assert loaded.qtool_config == header
    state = loaded.state_dict()
    assert set(state) == set(tensors)
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    with torch.no_grad():
        logits = loaded(images)
        assert torch.equal(load("q.safetensors")(images), logits)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("quantizer", ["uniform", "table"])
@pytest.mark.parametrize("model", ["demo", "swin"])
def test_a_frozen_model_and_its_file_compute_the_same(request, images, tmp_path, model, quantizer):
    opened = vision.open_model(request.getfixturevalue(model))
    layout = vision.layout(opened.model)
    names = [site.name for site in layout.attentions]
    plans = plan_layers(opened.model, attentions=names, bits=BitSpec(4, 4), quantizer=quantizer)
    reference = vision.open_model(request.getfixturevalue(model)).model
    frozen = simulate(opened.model, plans, layout.attentions)
    reconstruct(
        frozen, reference, images, layout.units, config=ReconstructionConfig(steps=0, batch_size=4)
    )
    freeze(frozen)
    header = checkpoint.Header(
        architecture=opened.architecture,
        model_args=opened.model_args,
        data=opened.data.to_dict(),
        engine="fixed",
        bits=["w4a4"],
        active_bits="w4a4",
        layers={
            name: checkpoint.LayerBits(
                kind=plan.kind,
                weight_bits=plan.weight_bits or None,
                input_bits=plan.input_bits,
                options=plan.options(),
            )
            for name, plan in plans.items()
        },
        quantization_config={},
        provenance={},
    )
    checkpoint.write(tmp_path / "q.safetensors", header, frozen.state_dict())
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "q.safetensors")(images), frozen(images))


def test_index_tables_and_masks_are_restored(quantize, swin):
    quantize(swin, out="q.safetensors")
    stored = checkpoint.read(Path("q.safetensors"))[1]
    expected = dict(vision.open_model(swin).model.named_buffers())
    found = dict(load("q.safetensors").named_buffers())
    derived = [name for name in expected if name not in stored]
    assert any(name.endswith("relative_position_index") for name in derived)
    assert any(name.endswith("attn_mask") for name in derived)
    for name in derived:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_file_has_the_size_of_its_bits(quantize, demo, bits):
    result = quantize(demo, bits=f"w{bits}a4", out="q.safetensors")
    header, tensors = checkpoint.read(Path("q.safetensors"))
    packed = 0
    for name, layer in header.layers.items():
        if layer.kind != "attention":
            rows, *rest = tensors[f"{name}.weight_shape"].tolist()
            width = packed_width(bits, torch.Size(rest).numel())
            assert tensors[f"{name}.weight_packed"].shape == (rows, width)
            assert width == -(-torch.Size(rest).numel() * bits // 8)
            packed += rows * width
    assert packed == result.summary["quantized_weights"] * bits / 8
    content = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    size = Path("q.safetensors").stat().st_size
    assert size == result.summary["bytes"]
    assert content < size < content + 20_000


def test_bits_can_be_named(quantize, demo, images):
    quantize(demo, bits="w4a6", out="q.safetensors")
    with torch.no_grad():
        assert torch.equal(
            load("q.safetensors", bits="w4a6")(images), load("q.safetensors")(images)
        )
    with pytest.raises(UsageError, match="cannot run at w8a8") as caught:
        load("q.safetensors", bits="w8a8")
    assert "w4a6" in caught.value.remedy


def test_layers_of_different_bits_and_float_layers(quantize, demo, images):
    quantize(
        demo, keep=("head=8", "blocks.1.*=w3a5"), skip=("blocks.0.attn*",), out="q.safetensors"
    )
    model = load("q.safetensors")
    assert (model.head.weight_bits, model.head.input_bits) == (8, 8)
    assert (model.blocks[1].mlp.fc2.weight_bits, model.blocks[1].attn.products.bits) == (3, 5)
    assert isinstance(model.blocks[0].attn.qkv, torch.nn.Linear)
    with torch.no_grad():
        assert bool(model(images).isfinite().all())


@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
def test_every_documented_type_and_shape_runs(quantize, swin, images, bits):
    quantize(swin, bits=bits, out="q.safetensors")

    def round_scales(values, tensors):
        for name in tensors:
            if name.endswith("_scale"):
                tensors[name] = tensors[name].half().float()
            elif tensors[name].is_floating_point():
                tensors[name] = tensors[name].bfloat16().float()

    def shrink(values, tensors):
        for name, tensor in tensors.items():
            if name.endswith("_scale"):
                tensors[name] = tensor.half()
            elif name.endswith("_zero_point"):
                tensors[name] = tensor.byte()
            elif tensor.is_floating_point():
                tensors[name] = tensor.bfloat16()
            if "weight" not in name and name.endswith(("_scale", "_zero_point")):
                tensors[name] = tensors[name].reshape(())

    rewritten("q.safetensors", round_scales)
    with torch.no_grad():
        expected = load("q.safetensors")(images)
        rewritten("q.safetensors", shrink)
        model = load("q.safetensors")
        assert torch.equal(model(images), expected)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}


def test_weights_need_no_random_numbers(quantize, demo, images):
    quantize(demo, out="q.safetensors")
    torch.manual_seed(1)
    with torch.no_grad():
        first = load("q.safetensors")(images)
        torch.manual_seed(2)
        assert torch.equal(load("q.safetensors")(images), first)


def drop_bias(values, tensors):
    del tensors["blocks.0.norm1.bias"]


def add_tensor(values, tensors):
    tensors["blocks.7.norm1.bias"] = torch.zeros(3)


def drop_operand(values, tensors):
    del tensors["blocks.0.attn.products.query_scale"]


def rename_architecture(values, tensors):
    values["architecture"] = "no_such_model"


def change_arguments(values, tensors):
    values["model_args"]["embed_dim"] = 64


def name_no_site(values, tensors):
    values["layers"]["blocks.0.mlp"] = {**values["layers"]["blocks.0.attn"]}


def name_no_layer(values, tensors):
    values["layers"]["nowhere"] = {**values["layers"]["blocks.0.attn"]}


def change_probabilities(values, tensors):
    values["layers"]["blocks.0.attn"]["options"] = {"probabilities": "uniform"}


def turn_patches(values, tensors):
    rows, channels, height, width = tensors["patch_embed.proj.weight_shape"].tolist()
    tensors["patch_embed.proj.weight_shape"] = torch.tensor([rows, height, channels, width])


def narrow_rows(values, tensors):
    name = "blocks.0.mlp.fc1.weight_shape"
    tensors[name] = tensors[name] - torch.tensor([0, 1])


@pytest.mark.parametrize(
    "change",
    [
        drop_bias,
        add_tensor,
        drop_operand,
        rename_architecture,
        change_arguments,
        name_no_site,
        name_no_layer,
        change_probabilities,
        turn_patches,
        narrow_rows,
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(quantize, demo, change):
    quantize(demo, out="q.safetensors")
    rewritten("q.safetensors", change)
    with pytest.raises(CheckpointError, match="does not fit the architecture") as caught:
        load("q.safetensors")
    assert "\n" not in caught.value.message
    assert caught.value.remedy


def test_a_network_that_does_not_fit_its_header_is_refused(quantize_network, gates):
    quantize_network(gates, out=Path("q.safetensors"))
    for change in (
        {"architecture": "deit_tiny_patch16_224"},
        {"architecture": "esdnet"},
        {"model_args": {"octaves": 2, "width": 16}},
        {"model_args": {"octaves": 2, "width": 10**9}},
        {"model_args": {"octaves": "2", "width": 8}},
        {"model_args": {"octaves": None, "width": 8}},
        {"model_args": {"octaves": 2, "width": 8, "depth": 3}},
        {"task": "classification"},
    ):
        path = Path("changed.safetensors")
        path.write_bytes(Path("q.safetensors").read_bytes())
        rewritten(path, lambda values, _, change=change: values.update(change))
        with pytest.raises(CheckpointError, match="does not fit") as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path, demo):
    with pytest.raises(CheckpointError):
        load(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="is not a qtool checkpoint"):
        load(demo)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError):
        load(tmp_path / "text.safetensors")


def test_a_flipped_byte_is_noticed(quantize, demo):
    quantize(demo, out="q.safetensors")
    path = Path("q.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


def test_restore_names_where_the_tensors_came_from(quantize, demo):
    quantize(demo, out="q.safetensors")
    header, tensors = checkpoint.read(Path("q.safetensors"))
    tensors.pop("head.weight_packed")
    with pytest.raises(CheckpointError, match=r"^somewhere does not fit"):
        restore(header, tensors, origin="somewhere")


def test_the_header_is_plain_json(quantize, swin):
    quantize(swin, out="q.safetensors")
    header = checkpoint.read_header(Path("q.safetensors"))
    assert json.loads(json.dumps(header.model_dump())) == header.model_dump()
