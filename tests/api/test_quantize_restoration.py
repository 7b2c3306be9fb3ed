"""Demoire networks in integers: what is written, what it costs, what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qtool
from qtool.api import quantize as api
from qtool.api import quantize_restoration
from qtool.api.demoire import network as networks
from qtool.api.evaluate import evaluate
from qtool.api.models import info
from qtool.api.switch_bits import switch_bits
from qtool.errors import CheckpointError, MissingError, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.io.container import write_container
from qtool.models import demoire, demoire_weights, sources
from qtool.quant.layers import QuantConv2d
from qtool.settings.demoire import DemoireSettings
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.models import InfoSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.switch_bits import SwitchBitsSettings

OUT = Path("q.safetensors")
TINY = {"encoder_width": 4, "decoder_width": 4, "growth": 4}


@pytest.fixture
def photographs(tmp_path):
    """Five pictures of 80 x 70, each with waves of its own."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index in range(5):
        wave = 40 * np.sin(np.arange(80) * (0.3 + 0.2 * index))[None, :, None]
        pixels = np.random.default_rng(index).integers(60, 190, (70, 80, 3)) + wave
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def test_a_network_is_quantized_on_simulated_moire(quantize_network, gates):
    result = quantize_network(gates, out=OUT, bits="w8a8")
    summary = result.summary
    assert result.status == "ok"
    assert summary["verify"] == {"max_abs_difference": 0.0, "mean_abs_difference": 0.0}
    assert summary["calibration_psnr_to_float"] > 45
    assert summary["held_out"] == 2
    assert summary["held_out_psnr_to_float"] > 40
    lost = summary["held_out_psnr_float"] - summary["held_out_psnr"]
    assert summary["psnr_lost"] == pytest.approx(lost, abs=0.006)
    assert abs(summary["psnr_lost"]) < 0.5
    assert summary["bytes"] == OUT.stat().st_size < summary["float_bytes"]
    header = checkpoint.read_header(OUT)
    assert (header.task, header.architecture, header.model_args) == (
        "restoration",
        "bandgate",
        {"octaves": 2, "width": 8},
    )
    assert header.provenance["weights_sha256"] == sources.sha256(gates)
    assert header.provenance["weights_provenance"] == {"licence": "of the test"}
    assert {item["layer"] for item in result.items} == set(header.layers)
    assert {item["backend"] for item in result.items} == {"cpu"}
    assert result.to_json()
    assert "PSNR" in result.to_markdown()


def test_fewer_bits_cost_more(quantize_network, gates):
    found = [
        quantize_network(gates, out=OUT, bits=bits, overwrite=True).summary
        for bits in ("w8a8", "w4a8", "w2a2")
    ]
    nearness = [summary["calibration_psnr_to_float"] for summary in found]
    assert nearness == sorted(nearness, reverse=True)
    assert found[0]["bytes"] > found[1]["bytes"] > found[2]["bytes"]


def test_both_ends_keep_eight_bits_unless_a_rule_says_otherwise(quantize_network, gates):
    quantize_network(gates, out=OUT, bits="w4a4", keep=("gates.1=w4a4",), skip=("looks.0.second",))
    layers = checkpoint.read_header(OUT).layers
    widths = {name: (layer.weight_bits, layer.input_bits) for name, layer in layers.items()}
    assert widths == {
        "looks.0.first": (4, 8),
        "looks.1.first": (4, 8),
        "looks.1.second": (4, 4),
        "gates.0": (8, 8),
        "gates.1": (4, 4),
    }
    assert layers["looks.1.second"].options["quantizer"] == "table"


def test_the_file_alone_makes_the_network(quantize_network, gates):
    quantize_network(gates, out=OUT, bits="w8a8")
    gates.unlink()
    opened = networks.open_network(DemoireSettings(out="x", weights=OUT))
    assert (opened.spec.name, opened.bits, opened.size_multiple) == ("bandgate", "w8a8", 4)
    module = qtool.load(OUT)
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(picture)[0], opened.module(picture)[0])
    assert isinstance(module.looks[0].first, QuantConv2d)
    assert not any(tensor.is_meta for tensor in module.buffers())
    described = info(InfoSettings(target=OUT)).summary
    assert (described["task"], described["active_bits"]) == ("restoration", "w8a8")


@pytest.mark.parametrize("name", ["esdnet_s", "mbcnn"])
def test_other_networks_run_in_integers(quantize_network, tmp_path, monkeypatch, name):
    monkeypatch.setattr("qtool.models.mbcnn._WIDTH", 8)
    monkeypatch.setattr(quantize_restoration, "_SMALL_SIDE", 32)
    arguments = TINY if name == "esdnet_s" else {"head": "linear"}
    torch.manual_seed(0)
    network = demoire.build(name, arguments)
    if name == "esdnet_s":
        torch.nn.init.normal_(network.decoder.decoder_1.conv.conv.weight, std=0.1)
    path = tmp_path / "weights.safetensors"
    write_container(path, demoire_weights.metadata(name, arguments, {}), network.state_dict())
    summary = quantize_network(name, weights=str(path), out=OUT, bits="w8a8", count=1).summary
    assert summary["verify"]["mean_abs_difference"] < 1e-3
    assert summary["calibration_psnr_to_float"] > 25
    opened = networks.open_network(DemoireSettings(out="x", weights=OUT))
    assert opened.spec.name == name
    wanted = demoire_weights.load_network(path)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sizes = [out.shape for out in opened.module(picture)]
        assert sizes == [out.shape for out in wanted.module(picture)]
    if name == "mbcnn":
        with pytest.raises(CheckpointError, match="with head linear, not mixed") as caught:
            networks.open_network(DemoireSettings(out="x", weights=OUT, head="mixed"))
        assert "mbcnn,head=mixed" in caught.value.remedy


def test_photographs_of_the_user(quantize_network, gates, photographs):
    summary = quantize_network(gates, out=OUT, calib=photographs).summary
    assert (summary["count"], summary["held_out"]) == (3, 2)
    assert "psnr_lost" not in summary  # nobody knows what they should have been
    assert checkpoint.read_header(OUT).provenance["method"] == "real photographs"
    few = quantize_network(gates, out=OUT, calib=photographs, count=9, overwrite=True).summary
    assert few["count"] == 9
    assert "held_out" not in few


def test_equal_seeds_write_equal_files(quantize_network, gates):
    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        quantize_network(gates, out=Path(name), bits="w4a8", seed=seed)
    assert Path("a").read_bytes() == Path("b").read_bytes() != Path("c").read_bytes()


def test_a_plan_loads_nothing(gates, monkeypatch):
    monkeypatch.setattr(demoire_weights, "load_network", None)
    planned = api.plan(QuantizeSettings(model="bandgate", bits="w8a8", data_free=True))
    assert planned.status == "planned"
    assert planned.summary["task"] == "restoration"
    assert planned.summary["calibration"] == "simulated moire"
    assert planned.summary["output"] == "bandgate-w8a8.safetensors"
    assert 50_000 < planned.summary["estimated_bytes"] < 200_000
    assert planned.summary["estimated_bytes"] == pytest.approx(136_896, rel=0.05)  # as it came out
    with pytest.raises(UsageError, match="absent"):
        api.plan(QuantizeSettings(model="bandgate", data_free=True, keep=("absent=w8a8",)))
    own = api.plan(QuantizeSettings(model=str(gates), data_free=True))
    assert own.summary["weights"] == str(gates)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": "any:2-8"}, "--bits any:2-8"),
        ({"bits": "mixed:4"}, "--bits mixed:4"),
        ({"synthetic": Path("pictures")}, "--synthetic"),
        ({"budget": "macs"}, "--budget"),
        ({"resume": True}, "--resume"),
        ({"keep": ("head=8",)}, "no layer matches 'head'"),
        ({"calib": Path("nowhere")}, "nowhere"),
        ({"weights": "other.pth"}, "both weights"),
    ],
)
def test_requests_that_make_no_sense(quantize_network, gates, options, said):
    with pytest.raises(UsageError, match=said):
        quantize_network(gates, out=OUT, **options)
    assert not OUT.exists()


def test_weights_that_are_missing_or_wrong(quantize_network, gates, tmp_path):
    with pytest.raises(MissingError, match="weights of esdnet "):
        quantize_network("esdnet")
    with pytest.raises(CheckpointError, match="weights of bandgate, not of esdnet_l"):
        quantize_network("esdnet_l", weights=str(gates))
    quantize_network(gates, out=OUT)
    with pytest.raises(CheckpointError, match="quantized checkpoint, not the weights"):
        quantize_network("bandgate", weights=str(OUT))
    with pytest.raises(UsageError, match="takes no such arguments"):
        quantize_network("bandgate,width=100000", weights=str(gates))


def test_small_photographs_are_refused(quantize_network, gates, tmp_path):
    (tmp_path / "small").mkdir()
    Image.new("RGB", (63, 200)).save(tmp_path / "small" / "a.png")
    with pytest.raises(UsageError, match="smaller than the 64 x 64"):
        quantize_network(gates, calib=tmp_path / "small")


def test_a_file_that_computes_something_else_is_not_written(quantize_network, gates, monkeypatch):
    restore = quantize_restoration.restore

    def wrong(*arguments, **options):
        model = restore(*arguments, **options)
        model.gates[0].bias.fill_(float("nan"))
        return model

    monkeypatch.setattr(quantize_restoration, "restore", wrong)
    with pytest.raises(QtoolError, match="was not written"):
        quantize_network(gates, out=OUT)
    assert not OUT.exists()


def test_files_of_the_wrong_kind_are_refused(quantize_network, quantize, gates, demo):
    quantize_network(gates, out=OUT)
    shutil.copy(demo, "demo.safetensors")
    quantize("demo.safetensors", out=Path("classes.safetensors"))
    with pytest.raises(UsageError, match=r"restores pictures \(bandgate w4a4\)"):
        evaluate(EvaluateSettings(target=str(OUT), device="cpu"))
    with pytest.raises(UsageError, match="restores pictures"):
        evaluate(EvaluateSettings(target="classes.safetensors", baseline=str(OUT), device="cpu"))
    with pytest.raises(UsageError, match="restores pictures, not a classifier"):
        evaluate(EvaluateSettings(target=str(gates), device="cpu"))
    with pytest.raises(CheckpointError, match=r"quantized classifier \(demo_vit"):
        networks.open_network(DemoireSettings(out="x", weights=Path("classes.safetensors")))


def test_nothing_is_exported_to_onnx(quantize_network, gates):
    pytest.importorskip("onnx")
    quantize_network(gates, out=OUT)
    settings = SwitchBitsSettings.build({"target": OUT, "onnx": Path("out.onnx"), "device": "cpu"})
    with pytest.raises(UsageError, match="demoire networks are not exported"):
        switch_bits(settings)
    assert not Path("out.onnx").exists()
