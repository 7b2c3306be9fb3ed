"""Checkpoints become models again, or are refused."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from qtool.api.load import load, restore
from qtool.engine import dispatch
from qtool.engine.cpu import exact, native
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
from qtool.models.convolutional import chains
from qtool.quant.bits import BitSpec
from qtool.quant.fusion import QuantLayerNorm, fuse
from qtool.quant.layers import QuantConv2d
from qtool.quant.plan import plan_layers, replace_module


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


def both_ways(path):
    """A checkpoint's model with layers that hand codes on, and with layers on their own."""
    header, tensors = checkpoint.read(Path(path))
    return load(path), restore(header, tensors, origin=str(path))


RECIPES = {
    "w4a4": {"recipe": "strong"},
    "w3a5": {"recipe": "paper"},
    "w8a8": {"recipe": "strong"},
    "mixed:4.0": {"recipe": "strong"},
}


# Mixed bits of a Swin take half a minute and have nothing that one of the others has not.
@pytest.mark.parametrize(
    ("model", "bits"),
    [*(("demo", bits) for bits in RECIPES), *(("swin", b) for b in [*RECIPES][:3])],
)
def test_layers_that_hand_codes_on_compute_the_same(request, quantize, images, model, bits):
    quantize(request.getfixturevalue(model), bits=bits, out="q.safetensors", **RECIPES[bits])
    fused, plain = both_ways("q.safetensors")
    assert any(isinstance(module, QuantLayerNorm) for module in fused.modules())
    assert not any(isinstance(module, QuantLayerNorm) for module in plain.modules())
    with torch.no_grad():
        for count in (1, 4):
            assert torch.equal(fused(images[:count]), plain(images[:count]))
        with dispatch.use_backend("reference"):
            assert torch.equal(fused(images), plain(images))


@pytest.mark.parametrize(
    ("family", "bits"), [("resnet", "w4a4"), ("mobilenet", "w4a8"), ("mobilenet", "w8a8")]
)
def test_convolutions_hand_codes_on(convolutional, quantize, images, family, bits):
    quantize(convolutional(family), bits=bits, out="q.safetensors")
    fused, plain = both_ways("q.safetensors")
    feeding = [m for m in fused.modules() if isinstance(m, QuantConv2d) and m.feeds]
    assert {layer.feeds.activation for layer in feeding} == {
        {"resnet": "relu", "mobilenet": "relu6"}[family]
    }
    assert not any(isinstance(m, QuantConv2d) and m.feeds for m in plain.modules())
    with torch.no_grad(), dispatch.trace() as decisions:
        assert torch.equal(fused(images), plain(images))
        assert torch.equal(fused(images[:1]), plain(images[:1]))
        with dispatch.use_backend("reference"):
            assert torch.equal(fused(images), plain(images))
    assert "conv2d_quantize" in {decision.op for decision in decisions}


def test_other_activations_stay_between_convolutions(build_model):
    found = build_model("efficientnet_b0", num_classes=10)
    before = [name for name, module in found.named_modules() if type(module) is nn.SiLU]
    for convolution in [n for n, m in found.named_modules() if isinstance(m, nn.Conv2d)]:
        source = found.get_submodule(convolution)
        layer = QuantConv2d(tuple(source.weight.shape), weight_bits=4, input_bits=4, bias=False)
        replace_module(found, convolution, layer)
    fuse(found, norms=(), gelus=(), chains=list(chains(found)))
    assert [n for n, m in found.named_modules() if type(m) is nn.SiLU] == before
    assert not any(isinstance(m, QuantConv2d) and m.feeds for m in found.modules())


@pytest.mark.parametrize("family", ["convnext"])
def test_convnext_hands_codes_on(convolutional, quantize, images, family):
    quantize(convolutional(family), bits="w4a4", out="q.safetensors")
    fused, plain = both_ways("q.safetensors")
    assert any(isinstance(module, QuantLayerNorm) for module in fused.modules())
    with torch.no_grad():
        assert torch.equal(fused(images), plain(images))


@pytest.mark.parametrize("recipe", ["paper", "strong"])
@pytest.mark.parametrize("missing", ["int8 units", "compiled passes", "tiles"])
def test_a_lesser_cpu_computes_the_same(monkeypatch, quantize, demo, images, recipe, missing):
    quantize(demo, bits="w4a4", out="q.safetensors", recipe=recipe)
    with torch.no_grad():
        expected = load("q.safetensors")(images)
        if missing == "int8 units":
            monkeypatch.setattr(exact, "has_int8_units", lambda: False)
        elif missing == "tiles":
            monkeypatch.setattr(native, "has_tiles", lambda: False)
        else:
            monkeypatch.setattr(native, "library", lambda: None)
        dispatch._cpu_runs_whole_blocks.cache_clear()
        try:
            with dispatch.trace() as decisions:
                assert torch.equal(load("q.safetensors")(images), expected)
            whole = missing != "compiled passes" and dispatch._cpu_runs_whole_blocks()
        finally:
            dispatch._cpu_runs_whole_blocks.cache_clear()
    assert (dispatch.WHOLE_BLOCK in decisions) == whole


@pytest.mark.parametrize("recipe", ["paper", "strong"])
def test_a_larger_cpu_computes_the_same(larger_cpu, quantize, save_weights, images, recipe):
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    quantize(save_weights("vit_tiny_patch16_224", size), out="q.safetensors", recipe=recipe)
    with torch.no_grad():
        expected = load("q.safetensors")(images)
        with larger_cpu(), dispatch.trace() as decisions:
            assert torch.equal(load("q.safetensors")(images), expected)
    assert decisions.count(dispatch.WHOLE_BLOCK) == size["depth"]


whole_blocks = pytest.mark.skipif(
    not dispatch._cpu_runs_whole_blocks(), reason="no int8 units or no compiled passes here"
)


@pytest.fixture
def block_model(quantize, demo):
    """A model whose blocks run as one program."""
    quantize(demo, bits="w4a4", out="q.safetensors")
    return load("q.safetensors")


@whole_blocks
def test_whole_blocks_are_said_to_run(block_model, images):
    with torch.no_grad(), dispatch.trace() as decisions:
        block_model(images)
    assert decisions.count(dispatch.WHOLE_BLOCK) == len(block_model.blocks)
    assert not [decision for decision in decisions if decision.op == "attention"]
    assert dispatch.WHOLE_BLOCK in dispatch.explain()


@whole_blocks
def test_hooks_inside_a_block_see_every_layer(block_model, images):
    with torch.no_grad():
        expected = block_model(images)
        seen = []
        handle = block_model.blocks[0].mlp.fc1.register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
        )
        assert torch.equal(block_model(images), expected)
        handle.remove()
        assert torch.equal(block_model(images), expected)
    assert seen == [(torch.uint8, torch.uint8)]


@whole_blocks
def test_a_block_notices_what_was_written_to_its_layers(block_model, images):
    with torch.no_grad():
        before = block_model(images)
        block_model.blocks[0].mlp.fc1.bias.add_(1.0)
        after = block_model(images)
        assert not torch.equal(before, after)
        handle = block_model.blocks[0].attn.register_forward_hook(lambda *_: None)
        assert torch.equal(block_model(images), after)
        handle.remove()


@whole_blocks
def test_copies_of_a_block_run_alone(block_model, images):
    with torch.no_grad():
        expected = block_model(images)
        copied = copy.deepcopy(block_model)
        block_model.blocks[0].mlp.fc1.bias.add_(1.0)
        assert torch.equal(copied(images), expected)
        state = copied.state_dict()
        assert not torch.equal(block_model(images), expected)
        block_model.load_state_dict(state)
        assert torch.equal(block_model(images), expected)


@whole_blocks
def test_threads_share_a_model_but_not_its_memory(block_model):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, 3, 32, 32, generator=generator) for _ in range(8)]

    def run(batch):
        with torch.no_grad():
            return block_model(batch)

    expected = [run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(run, batches), expected, strict=True):
                assert torch.equal(found, wanted)


def test_a_mask_reaches_attention(quantize, demo, images):
    quantize(demo, bits="w4a4", out="q.safetensors")
    fused, plain = both_ways("q.safetensors")
    tokens = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(2))
    hidden = torch.ones(17, 17, dtype=torch.bool).tril()
    with torch.no_grad():
        added = torch.zeros(2, 1, 17, 17).masked_fill(~hidden, -9)
        for mask in (hidden, hidden[None, None], added):
            found = fused.blocks[0](tokens, attn_mask=mask)
            assert torch.equal(found, plain.blocks[0](tokens, attn_mask=mask))
            assert not torch.equal(found, fused.blocks[0](tokens))
        causal = fused.blocks[0](tokens, is_causal=True)
        assert torch.equal(causal, fused.blocks[0](tokens, attn_mask=hidden))


def test_inference_mode_may_come_and_go(quantize, demo, images):
    quantize(demo, bits="w4a4", out="q.safetensors")
    model = load("q.safetensors")
    with torch.inference_mode():
        expected = model(images)
        inside = load("q.safetensors")
        assert torch.equal(inside(images), expected)
    with torch.no_grad():
        assert torch.equal(model(images), expected)
        assert torch.equal(inside(images), expected)
