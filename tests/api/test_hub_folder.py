"""Folders for a model hub: the same bytes as the file, all or nothing, and read back."""

import errno
import functools
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

import qtool
from qtool.api import evaluate as evaluate_api
from qtool.api import quantize as quantize_api
from qtool.api.demoire.network import open_network
from qtool.api.models import info
from qtool.api.switch_bits import switch_bits
from qtool.api.target import check_names
from qtool.errors import CheckpointError, MissingError, OutputExistsError, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.models import vision
from qtool.settings.demoire import DemoireSettings
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.models import InfoSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.switch_bits import SwitchBitsSettings

HUB = Path("hub")
FILE = Path("q.safetensors")
NAMES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def kept():
    """Folders that were made once and serve several tests: name and bytes of their files."""
    return {}


@pytest.fixture
def make(quantize, demo):
    """Quantize the tiny demo model with the quicker recipe."""
    return functools.partial(quantize, demo, recipe="paper")


@pytest.fixture
def hub(kept, make):
    """A hub folder of the tiny demo model at w4a4."""
    if not kept:
        make(out="hub/")
        kept.update({name: (HUB / name).read_bytes() for name in NAMES})
    HUB.mkdir(exist_ok=True)
    for name, content in kept.items():
        (HUB / name).write_bytes(content)
    return HUB


@pytest.fixture
def cached(hub, monkeypatch, tmp_path):
    """The folder as the hub's client caches a repository."""
    repository = tmp_path / "cache" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "snapshots").mkdir()
    hub.rename(repository / "snapshots" / "0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return "hf-hub:owner/name"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def switch(target, **options):
    return switch_bits(SwitchBitsSettings.build({"target": target, **options}))


def evaluate(target, **options):
    values = {"target": str(target), "device": "cpu", "count": 8, "baseline": "none", **options}
    return evaluate_api.evaluate(EvaluateSettings.build(values))


def assert_hub_folder(folder, file):
    assert sorted(contents(folder)) == NAMES
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()
    header = checkpoint.read_header(file)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == header.quantization_config
    assert config["model_args"] == header.model_args
    return config


@pytest.mark.parametrize("bits", ["w4a4", "any:2,8"])
def test_a_folder_holds_the_bytes_of_the_file(make, bits):
    make(out=FILE, bits=bits)
    result = make(out="hub/", bits=bits)
    config = assert_hub_folder(HUB, FILE)
    assert (config["architecture"], config["num_classes"]) == ("demo_vit", 24)
    assert result.summary["output"] == "hub/model.safetensors"
    assert result.summary["bytes"] == FILE.stat().st_size
    assert result.summary["verify"]["max_abs_difference"] == 0.0


def test_a_folder_of_branches_holds_the_bytes_of_the_file(train_branches):
    for out in (FILE, "hub/"):
        train_branches(out=out)
    config = assert_hub_folder(HUB, FILE)
    assert (config["architecture"], config["num_classes"]) == ("resnet8", 3)
    assert "held-out pictures" in (HUB / "README.md").read_text()


def test_a_folder_of_a_demoire_network_holds_the_bytes_of_the_file(quantize_network, gates):
    for out in (FILE, "hub/"):
        quantize_network(gates, bits="w8a8", out=out)
    assert assert_hub_folder(HUB, FILE)["architecture"] == "bandgate"
    network = open_network(DemoireSettings.build({"out": "clean", "weights": HUB}))
    assert network.bits == "w8a8"
    with pytest.raises(UsageError, match="restores pictures") as caught:
        evaluate(HUB)
    assert "--weights hub" in caught.value.remedy


def test_timm_builds_what_the_config_says(quantize, swin):
    quantize(swin, out="hub/", recipe="paper")
    config = json.loads((HUB / "config.json").read_text())
    network = timm.create_model(
        config["architecture"], pretrained_cfg=config["pretrained_cfg"], **config["model_args"]
    )
    assert network.num_classes == config["num_classes"] == 10
    assert network.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    assert timm.data.resolve_model_data_config(network)["input_size"] == [3, 32, 32]


def test_existing_folders_are_filled_and_keep_what_else_they_hold(make, hub, tmp_path):
    target = tmp_path / "clone"
    (target / ".git").mkdir(parents=True)
    (target / ".gitattributes").write_text("theirs")
    make(out=target)
    assert {path.name for path in target.iterdir()} == {*NAMES, ".git", ".gitattributes"}
    assert (target / "model.safetensors").read_bytes() == contents(hub)["model.safetensors"]


def test_the_current_folder_is_one(make, hub, monkeypatch):
    monkeypatch.chdir(hub)
    make(out=".", bits="w8a8", overwrite=True)
    assert sorted(path.name for path in Path().iterdir()) == NAMES
    assert qtool.load(".").qtool_config.active_bits == "w8a8"
    assert evaluate(".").items[0]["model"] == "w8a8 (hub)"


@pytest.mark.parametrize("name", NAMES)
def test_what_exists_is_refused_before_work_starts(make, monkeypatch, name):
    HUB.mkdir()
    (HUB / name).write_text("mine")
    monkeypatch.setattr(vision, "open_model", None)
    with pytest.raises(OutputExistsError, match=f"hub/{name} exists") as caught:
        make(out="hub/")
    assert "--overwrite" in caught.value.remedy
    assert "--skip-existing" in caught.value.remedy
    with pytest.raises(OutputExistsError, match=f"has a {name} but no") as caught:
        make(out="hub/", skip_existing=True)
    assert "--overwrite" in caught.value.remedy
    assert contents(HUB) == {name: b"mine"}


def test_a_whole_folder_can_be_skipped_or_replaced(make, demo, hub, kept):
    plan = QuantizeSettings.build({"model": demo, "data_free": True, "out": "hub", "bits": "w8a8"})
    with pytest.raises(OutputExistsError):
        quantize_api.plan(plan)
    skipping = plan.model_copy(update={"skip_existing": True})
    assert quantize_api.plan(skipping).summary["skipped"] is True
    assert quantize_api.quantize(skipping).summary["status"] == "skipped"
    assert contents(hub) == kept
    make(out="hub", bits="w8a8", overwrite=True)
    assert sorted(contents(hub)) == NAMES
    assert "w8a8" in (hub / "README.md").read_text()
    assert "w4a4" not in (hub / "README.md").read_text()


def test_a_file_in_the_way_is_refused(make):
    HUB.write_text("mine")
    with pytest.raises(UsageError, match="hub is a file; a folder is needed"):
        make(out="hub/", overwrite=True)
    (Path("other") / "README.md").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"README\.md is a folder; a file is needed"):
        make(out="other", overwrite=True)


def test_a_file_that_computes_something_else_is_not_written(make, monkeypatch):
    def differs(*_):
        raise QtoolError("it computes other outputs")

    monkeypatch.setattr(quantize_api, "_verify", differs)
    with pytest.raises(QtoolError, match="other outputs"):
        make(out="hub/")
    assert not HUB.exists()
    assert not list(Path().glob(".*"))


def test_a_run_killed_on_the_way_goes_on_to_the_same_folder(make):
    make(data_free=True, out="whole/", count=4)
    for path in (Path(os.environ["QTOOL_CACHE"])).rglob("*.safetensors"):
        path.unlink()

    def kill(stage, done, total, note=""):
        if stage == "reconstruct":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(data_free=True, out="hub/", count=4, progress=kill)
    assert not HUB.exists()
    make(data_free=True, out="hub/", count=4, resume=True)
    assert contents(HUB) == contents(Path("whole"))
    assert not list(Path().glob(".*"))


def test_a_replacement_cut_short_is_not_taken_for_whole(make, hub, monkeypatch):
    real = os.replace

    def stop(source, target):
        if Path(target).name == "README.md":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            make(out="hub", bits="w8a8", overwrite=True)
    assert sorted(path.name for path in hub.iterdir()) == [NAMES[0], NAMES[2]]
    assert qtool.load(hub).qtool_config.active_bits == "w8a8"
    with pytest.raises(OutputExistsError, match=r"but no config\.json"):
        make(out="hub", skip_existing=True)


def test_a_full_disk_leaves_nothing(make, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QtoolError, match="cannot write hub: No space left") as caught:
        make(out="hub/")
    assert "free some space" in caught.value.remedy
    assert not HUB.exists()
    assert not list(Path().glob(".*"))


@pytest.mark.parametrize("name", ["hub", "hub/", "local-dir:hub", "hub/model.safetensors"])
def test_folders_are_opened_as_their_checkpoint(hub, name):
    picture = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        expected = qtool.load("hub/model.safetensors")(picture)
        assert torch.equal(qtool.load(name)(picture), expected)
    assert info(InfoSettings(target=name)).summary["bits"] == ["w4a4"]
    result = evaluate(name)
    assert result.summary["top1"] == evaluate(hub / "model.safetensors").summary["top1"]
    assert evaluate_api.plan(EvaluateSettings(target=name, count=8)).summary["architecture"] == (
        "demo_vit"
    )


def test_a_word_that_names_a_model_means_the_model(hub):
    hub.rename("demo_vit")
    assert evaluate("demo_vit").items[0]["model"] == "float32 (demo_vit)"
    for name in ("demo_vit/", "./demo_vit", "local-dir:demo_vit"):
        assert evaluate(name).items[0]["model"] == "w4a4 (demo_vit)"


def test_a_checkpoint_is_no_float_baseline_of_itself(make, demo, caplog):
    make(out=demo, overwrite=True)
    result = evaluate(demo, baseline=None)
    assert "is no float model any more" in caplog.text
    assert "drop" not in result.summary


def test_repositories_are_opened_from_the_cache(cached):
    assert qtool.load(cached, offline=True).qtool_config.active_bits == "w4a4"
    assert info(InfoSettings(target=cached)).summary["bits"] == ["w4a4"]
    assert evaluate(cached, offline=True).items[0]["model"] == "w4a4 (name)"
    assert check_names(EvaluateSettings(target=cached)) == "demo_vit"
    with pytest.raises(UsageError, match="one width per layer"):
        switch(cached, bits="4", out="copy.safetensors")
    with pytest.raises(UsageError, match="not a file of yours to change"):
        switch(cached, bits="4", in_place=True)
    with pytest.raises(UsageError, match="hf-hub:owner/name is a quantized checkpoint"):
        vision.open_model(cached, offline=True)


def test_absent_repositories_name_what_fetches_them(cached):
    absent = "hf-hub:owner/other"
    assert check_names(EvaluateSettings(target=absent)) == absent
    for call in (
        lambda: qtool.load(absent, offline=True),
        lambda: info(InfoSettings(target=absent, offline=True)),
        lambda: switch(absent, listing=True, offline=True),
        lambda: evaluate(absent, offline=True),
    ):
        with pytest.raises(MissingError) as caught:
            call()
        assert "`hf download owner/other config.json model.safetensors`" in caught.value.remedy


def test_folders_without_a_checkpoint_are_refused(hub):
    with pytest.raises(UsageError, match="local-dir:hub is a quantized checkpoint"):
        vision.resolve("local-dir:hub")
    (hub / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hub/model\.safetensors does not exist"):
        qtool.load(hub)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        qtool.load("local-dir:absent")
    with pytest.raises(UsageError, match="no model called 'hub'"):
        evaluate(hub)


@pytest.mark.parametrize("config", [b"\xff\xfe", b"[]", b'{"a":' * 100_000, b"{}"])
def test_repositories_with_a_foreign_config_are_refused(cached, tmp_path, config):
    (path,) = (tmp_path / "cache").rglob("config.json")
    path.write_bytes(config)
    with pytest.raises(UsageError) as caught:
        evaluate(cached, offline=True)
    assert "config.json" in caught.value.message
    assert "\n" not in caught.value.message


def test_copies_at_other_widths_go_into_folders(make):
    make(out=FILE, bits="any:2-8")
    switch(FILE, bits="4", out="copy.safetensors")
    result = switch(FILE, bits="4", out="hub/")
    assert_hub_folder(HUB, Path("copy.safetensors"))
    assert result.summary["bytes"] == (HUB / "model.safetensors").stat().st_size
    assert qtool.load(HUB).active_bits == "w4a8"
    card = (HUB / "README.md").read_text()
    assert "Nothing was measured" in card
    switch(FILE, bits="4", out="small.safetensors", drop_unused=True)
    switch(HUB, bits="4", out="small/", drop_unused=True)
    assert_hub_folder(Path("small"), Path("small.safetensors"))
    with pytest.raises(OutputExistsError):
        switch(FILE, bits="4", out="hub/")
    with pytest.raises(UsageError, match="replace its source"):
        switch(HUB, bits="2", out="hub/", overwrite=True)
    assert switch(HUB, listing=True).summary["active_bits"] == "w4a8"
    switch(HUB, bits="8", in_place=True)
    assert qtool.load(HUB).active_bits == "w8a8"
    assert (HUB / "README.md").read_text() == card
    rows = evaluate(HUB, bits=("8", "4")).items
    assert [row["model"] for row in rows] == ["w8a8", "w4a8"]


def test_a_dry_run_writes_no_folder(branch_file):
    result = switch(branch_file, bits="4", out="hub/", dry_run=True)
    assert result.status == "planned"
    assert not HUB.exists()
    switch(branch_file, bits="4", out="hub/")
    switch(branch_file, bits="4", out="copy.safetensors")
    assert_hub_folder(HUB, Path("copy.safetensors"))
