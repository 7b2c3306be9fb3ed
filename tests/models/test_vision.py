"""Building and opening models: names, files, folders, and what goes wrong with each."""

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.errors import MissingError, UsageError
from qtool.models import registry, sources, vision

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"
TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
TIMM = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine")
    return path


@pytest.fixture
def tiny_file(tmp_path):
    model = vision.build(TIMM, TINY)
    path = tmp_path / "anything.safetensors"
    metadata = {"architecture": TIMM, "model_args": json.dumps(TINY)}
    save_file(model.state_dict(), path, metadata)
    return path


@pytest.fixture
def local_dir(tmp_path):
    model = vision.build(TIMM, TINY)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": {k: v for k, v in TINY.items() if k not in ("num_classes", "img_size")},
        "pretrained_cfg": {
            "num_classes": 5,
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "interpolation": "bilinear",
            "crop_pct": 0.95,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_demo_opens_offline(no_sockets):
    opened = vision.open_model("demo_vit", offline=True)
    assert opened.architecture == "demo_vit"
    assert opened.labels_kind == "demo"
    assert opened.data.input_size == (3, 64, 64)
    assert opened.model(torch.zeros(2, 3, 64, 64)).shape == (2, 24)
    assert len(opened.weights_sha256) == 64


def test_opened_model_is_ready_for_inference():
    model = vision.open_model("demo_vit").model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_opened_model_can_be_built_again():
    opened = vision.open_model("demo_vit")
    arguments = json.loads(json.dumps(opened.model_args))
    again = vision.build(opened.architecture, arguments)
    again.load_state_dict(opened.model.state_dict())


def test_demo_parameters_agree_with_the_registry():
    count = sum(p.numel() for p in vision.build("demo_vit", {}, device="meta").parameters())
    assert registry.find("demo_vit").parameters == pytest.approx(count / 1e6, abs=0.01)


@pytest.mark.parametrize("alias", ["deit_t_distilled", "swin_t", "resnet18", "mobilenetv2"])
def test_registry_names_and_sizes_are_those_of_timm(alias):
    spec = registry.find(alias)
    model = vision.build(spec.architecture, {}, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    count = sum(parameter.numel() for parameter in model.parameters())
    assert spec.parameters == pytest.approx(count / 1e6, abs=0.06)


@pytest.mark.parametrize("spec", registry.MODELS[1:], ids=lambda spec: spec.alias)
def test_every_alias_has_weights_in_timm(spec):
    configured = vision.timm.get_pretrained_cfg(spec.architecture)
    assert configured.hf_hub_id == f"timm/{spec.architecture}"
    assert configured.license.lower() == spec.licence.lower()


def test_build_refuses_unknown_names_and_arguments():
    with pytest.raises(UsageError, match="no_such_net"):
        vision.build("no_such_net", {})
    with pytest.raises(UsageError, match="colour"):
        vision.build(TIMM, {"colour": "red"})


def test_file_says_what_it_is(tiny_file, no_sockets):
    opened = vision.open_model(str(tiny_file))
    assert opened.architecture == TIMM
    assert opened.model_args == TINY
    assert opened.data.mean == (0.5, 0.5, 0.5)
    assert opened.labels_kind == ""
    assert opened.weights_sha256 == sources.sha256(tiny_file)
    for name, value in load_file(tiny_file).items():
        assert torch.equal(opened.model.state_dict()[name], value)


def test_file_may_carry_its_data_configuration(tmp_path, tiny_file):
    data = vision.DataConfig((3, 32, 32), (0.1,) * 3, (0.2,) * 3, "bilinear", 1.0)
    metadata = {**sources.read_metadata(tiny_file), "data": json.dumps(data.to_dict())}
    path = tmp_path / "other.safetensors"
    save_file(load_file(tiny_file), path, metadata)
    assert vision.open_model(str(path)).data == data


def test_number_of_classes_is_read_off_the_head(tmp_path):
    path = tmp_path / "tuned.safetensors"
    model = vision.build("resnet18", {"num_classes": 7})
    save_file(model.state_dict(), path)
    opened = vision.open_model("resnet18", weights=path)
    assert opened.model_args == {"num_classes": 7}
    assert torch.equal(opened.model.get_parameter("fc.weight"), model.get_parameter("fc.weight"))


def test_alias_with_weights():
    path = shared("deit_tiny_patch16_224.safetensors")
    opened = vision.open_model("deit_t", weights=path, offline=True)
    assert opened.architecture == "deit_tiny_patch16_224.fb_in1k"
    assert opened.labels_kind == "imagenet"
    assert opened.data.crop_pct == 0.9
    assert opened.weights_source == str(path)


def test_file_name_names_the_model():
    path = shared("deit_tiny_patch16_224.safetensors")
    opened = vision.open_model(str(path))
    assert opened.architecture == "deit_tiny_patch16_224.fb_in1k"
    assert vision.layout(opened.model).grid == (14, 14)


def test_unclear_file_name_has_a_remedy(tmp_path):
    path = tmp_path / "mobilenetv2_100_relu.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UsageError) as caught:
        vision.open_model(str(path))
    assert f"MODEL --weights {path}" in caught.value.remedy
    assert "model_args" in caught.value.remedy


def test_activation_from_the_metadata(tmp_path):
    source = shared("mobilenetv2_100_relu.safetensors")
    path = tmp_path / "net.safetensors"
    metadata = {"architecture": "mobilenetv2_100", "model_args": '{"act_layer": "relu"}'}
    save_file(load_file(source), path, metadata)
    kinds = {type(module).__name__ for module in vision.open_model(str(path)).model.modules()}
    assert not any("ReLU6" in kind for kind in kinds)


def test_arguments_follow_the_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(vision.build("test_efficientnet", {"num_classes": 7}).state_dict(), path)
    name = "test_efficientnet.r160_in1k,act_layer=relu,drop_rate=0.5"
    opened = vision.open_model(name, weights=path)
    assert opened.architecture == "test_efficientnet.r160_in1k"
    assert opened.model_args == {"act_layer": "relu", "drop_rate": 0.5, "num_classes": 7}
    assert isinstance(opened.model.bn1.act, torch.nn.ReLU)
    assert vision.resolve(name, weights=path) == "test_efficientnet.r160_in1k"
    assert vision.resolve("mobilenetv2,act_layer=relu") == "mobilenetv2_100.ra_in1k"


def test_arguments_after_the_name_go_before_those_of_the_file(tiny_file):
    opened = vision.open_model(f"{TIMM},drop_rate=0.25", weights=tiny_file)
    assert opened.model_args == {**TINY, "drop_rate": 0.25}


@pytest.mark.parametrize("pair", ["act_layer", "act layer=relu", "=relu"])
def test_an_argument_without_a_value_is_refused(pair):
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        vision.resolve(f"mobilenetv2,{pair}")


def test_mobilenet_with_another_activation_opens():
    path = shared("mobilenetv2_100_relu.safetensors")
    opened = vision.open_model("mobilenetv2,act_layer=relu", weights=path)
    assert opened.labels_kind == "imagenet"
    assert opened.model_args == {"act_layer": "relu", "num_classes": 1000}


def test_quantized_checkpoint_is_no_float_model(tmp_path):
    path = tmp_path / "q.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"qtool.format": "1", "qtool.config": "{}"})
    with pytest.raises(UsageError, match="quantized checkpoint"):
        vision.open_model(str(path))


def test_weights_of_another_model_do_not_fit(tiny_file):
    with pytest.raises(UsageError, match="do not fit"):
        vision.open_model("resnet18", weights=tiny_file)


def test_truncated_weights_do_not_fit(tmp_path, tiny_file):
    path = tmp_path / "short.safetensors"
    path.write_bytes(tiny_file.read_bytes()[:-100])
    with pytest.raises(UsageError):
        vision.open_model(str(path))


@pytest.mark.parametrize("name", ["deit_t", "missing.safetensors"])
def test_absent_file_is_missing(tmp_path, name):
    weights = tmp_path / "none.safetensors"
    with pytest.raises(MissingError):
        vision.open_model(str(tmp_path / name) if "." in name else name, weights=weights)


def test_unknown_name_lists_near_ones():
    with pytest.raises(UsageError) as caught:
        vision.open_model("deit_tt")
    assert "deit_t" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("demo_vit", "demo_vit"),
        ("deit_t", "deit_tiny_patch16_224.fb_in1k"),
        ("vit_tiny_patch16_224", TIMM),
        ("hf-hub:owner/name", "hf-hub:owner/name"),
    ],
)
def test_names_resolve_without_weights(name, architecture, no_sockets, monkeypatch):
    monkeypatch.setattr(sources, "fetch", None)
    assert vision.resolve(name) == architecture


def test_files_and_folders_resolve_by_what_they_say(tiny_file, local_dir, no_sockets):
    assert vision.resolve(str(tiny_file)) == TIMM
    assert vision.resolve("deit_t", weights=tiny_file) == "deit_tiny_patch16_224.fb_in1k"
    assert vision.resolve(f"local-dir:{local_dir}") == "vit_tiny_patch16_224"


@pytest.mark.parametrize("name", ["deit_tt", "resnet18.nonsense", "owner/name"])
def test_what_cannot_be_opened_does_not_resolve(name):
    with pytest.raises(UsageError) as opening:
        vision.open_model(name)
    with pytest.raises(UsageError) as resolving:
        vision.resolve(name)
    assert (resolving.value.message, resolving.value.remedy) == (
        opening.value.message,
        opening.value.remedy,
    )


def test_absent_weights_do_not_resolve(tmp_path):
    with pytest.raises(MissingError, match="no weights file"):
        vision.resolve("hf-hub:owner/name", weights=tmp_path / "absent")


def test_unknown_tag_lists_known_ones():
    with pytest.raises(UsageError) as caught:
        vision.open_model("resnet18.nonsense")
    assert "resnet18.a1_in1k" in caught.value.remedy


def test_bare_hub_name_asks_for_its_prefix():
    with pytest.raises(UsageError) as caught:
        vision.open_model("owner/name")
    assert "hf-hub:owner/name" in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swin_t", ("113 MB", "MIT", "hf download timm/swin_tiny_patch4_window7_224.ms_in1k")),
        ("vit_tiny_patch16_384", ("23 MB", "apache-2.0", "hf download timm/vit_tiny")),
        ("hf-hub:owner/name", ("hf download owner/name config.json",)),
    ],
)
def test_missing_weights_offline(name, words, no_sockets, monkeypatch):
    monkeypatch.setattr(sources.huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    for ask in (vision.open_model, vision.resolve):
        with pytest.raises(MissingError) as caught:
            ask(name, offline=True)
        assert all(word in f"{caught.value.message} {caught.value.remedy}" for word in words)


def test_local_dir(local_dir, no_sockets):
    opened = vision.open_model(f"local-dir:{local_dir}", offline=True)
    assert opened.architecture == "vit_tiny_patch16_224"
    assert opened.model_args == TINY
    assert opened.data.mean == (0.1, 0.2, 0.3)
    assert opened.data.input_size == (3, 32, 32)
    vision.build(opened.architecture, opened.model_args).load_state_dict(opened.model.state_dict())


def test_hub_repository_from_the_cache(local_dir, no_sockets, monkeypatch):
    monkeypatch.setattr(
        sources.huggingface_hub,
        "try_to_load_from_cache",
        lambda _, name, revision: str(local_dir / name),
    )
    assert vision.resolve("hf-hub:owner/name@main", offline=True) == "hf-hub:owner/name@main"
    opened = vision.open_model("hf-hub:owner/name@main", offline=True)
    assert opened.weights_source == "hf-hub:owner/name@main"
    assert opened.model_args == TINY


def test_local_dir_without_files(tmp_path):
    with pytest.raises(MissingError, match=r"config\.json"):
        vision.open_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(MissingError, match="no weights"):
        vision.open_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("config", ["[]", "{", '{"architecture": "bert"}', "{}"])
def test_local_dir_with_a_foreign_config(local_dir, config):
    (local_dir / "config.json").write_text(config)
    with pytest.raises(UsageError):
        vision.open_model(f"local-dir:{local_dir}")


def test_imagenet_wnids():
    wnids = vision.imagenet_wnids()
    assert len(set(wnids)) == 1000
    assert wnids[:2] == ["n01440764", "n01443537"]


@pytest.mark.parametrize("name", ["demo_vit,img_size=32", "deit_tiny_patch16_224,img_size=96"])
def test_pictures_have_the_size_the_network_was_built_for(name, tmp_path):
    architecture, _, size = name.partition(",img_size=")
    path = tmp_path / "weights.safetensors"
    save_file(vision.build(architecture, {"img_size": int(size)}).state_dict(), path)
    opened = vision.open_model(name, weights=path)
    assert opened.data.input_size == (3, int(size), int(size))
    assert opened.model(torch.zeros(1, *opened.data.input_size)).shape[0] == 1
    network, expected = vision.outline(name, weights=path)
    assert expected == opened.data.input_size
    assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize(
    "arguments",
    [{"num_heads": 0}, {"embed_dim": "x"}, {"depth": -1.5}, {"patch_size": 0}, {"a": 1}],
)
def test_arguments_that_do_not_suit_a_network_are_refused(arguments):
    with pytest.raises(UsageError, match="cannot build demo_vit"):
        vision.build("demo_vit", arguments, device="meta")
