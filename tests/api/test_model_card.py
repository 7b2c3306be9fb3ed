"""Model cards: front matter that hubs read, commands that work, nothing that was not measured."""

import re
import shlex

import huggingface_hub
import pytest

from qtool.api import model_card
from qtool.cli.app import main
from qtool.io.branch_tensors import BranchTable, BranchWidth
from qtool.io.header import Header, LayerBits, NestedWidths
from qtool.models.vision import DataConfig

DATA = DataConfig((3, 224, 224), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic", 0.9)
LAYER = LayerBits(kind="linear", weight_bits=4, input_bits=8)
SIZES = {"rows": 8, "columns": 9, "narrow_rows": 4, "narrow_inputs": 4, "macs": 1, "narrow_macs": 1}
NESTED = {
    "engine": "nested",
    "bits": ["w8a8", "w4a8", "w4a4"],
    "active_bits": "w4a8",
    "nested": NestedWidths(weight_bits=[4, 8], activation_bits=[4, 8]),
}
BRANCHES = {
    "engine": "branches",
    "architecture": "resnet20",
    "layers": {"a": LAYER.model_copy(update={"options": SIZES})},
}
RESTORING = {"task": "restoration", "architecture": "bandgate", "data": {"colour": "sRGB"}}


def header(**changed):
    values = {
        "architecture": "deit_tiny_patch16_224.fb_in1k",
        "model_args": {"num_classes": 1000},
        "data": DATA.to_dict(),
        "engine": "fixed",
        "bits": ["w4a8"],
        "active_bits": "w4a8",
        "layers": {"a": LAYER, "b": LAYER},
        "quantization_config": {"quant_method": "qtool"},
        "provenance": {
            "method": "spdfq",
            "seed": 3,
            "source": "deit_t",
            "weights_source": "hf-hub:timm/deit_tiny_patch16_224.fb_in1k",
            "weights_sha256": "0" * 64,
        },
    }
    return Header(**{**values, **changed})


def card(described=None, **summary):
    return model_card.text(described or header(), size=3_910_000, summary=summary)


def front_matter(text):
    return huggingface_hub.ModelCard(text).data.to_dict()


def test_hubs_can_read_the_front_matter():
    found = front_matter(card())
    assert found["library_name"] == "qtool"
    assert found["pipeline_tag"] == "image-classification"
    assert found["base_model"] == "timm/deit_tiny_patch16_224.fb_in1k"
    assert found["base_model_relation"] == "quantized"
    assert found["license"] == "apache-2.0"
    assert found["tags"] == ["quantized", "w4a8"]
    assert front_matter(card(header(**NESTED)))["tags"] == ["quantized", "switchable"]
    assert front_matter(card(header(**RESTORING)))["pipeline_tag"] == "image-to-image"


def test_licence_and_base_are_not_guessed():
    own = header(provenance={"weights_source": "/home/me/secret/fine-tuned.safetensors"})
    found = front_matter(card(own))
    assert not {"license", "base_model", "base_model_relation"} & set(found)
    revision = header(provenance={"weights_source": "hf-hub:me/mine@v2"})
    assert front_matter(card(revision))["base_model"] == "me/mine"
    assert "license" not in front_matter(card(revision))


def test_no_path_of_the_machine_is_told():
    places = {
        "source": "local-dir:/home/me/secret/net/",
        "weights_source": "C:\\Users\\me\\secret\\w.bin",
    }
    text = card(header(provenance=places), output="/home/me/out", calibration="pictures of /home/x")
    assert "secret" not in text
    assert "home" not in text
    assert "| float model | net |" in text
    assert "| its weights | w.bin |" in text


def test_what_was_measured_is_told_and_nothing_else():
    assert "Nothing was measured" in card()
    text = card(
        bytes=1,
        float_bytes=22_900_000,
        calibration_agreement=0.9375,
        held_out=18,
        held_out_agreement=0.5,
        verify={"max_abs_difference": 0.00012},
        steps=7,
    )
    assert "3.91 MB, of 22.90 MB in float32" in text
    assert "calibration pictures | 93.8% |" in text
    assert "18 others | 50.0% |" in text
    assert "at most | 0.00012 |" in text
    assert "Accuracy on labelled pictures was not measured" in text
    assert "Nothing was measured" not in text
    assert "| 7 |" in text
    assert "PSNR" not in text


def test_every_width_of_a_switchable_file_is_told():
    text = card(header(**NESTED), calibration_agreement={"w8a8": 1.0, "w4a8": 0.75})
    assert "# deit_tiny_patch16_224.fb_in1k at 4, 8 bits" in text
    assert "| weights 4, 8; activations 4, 8 |" in text
    assert "at w4a8, calibration pictures | 75.0% |" in text
    other = header(**{**NESTED, "active_bits": "w8a8", "bits": [*NESTED["bits"], "w8a4"]})
    assert card(header(**NESTED)) == card(other)


def test_pictures_of_demoire_networks_are_compared_in_decibels():
    text = card(
        header(**RESTORING),
        calibration_psnr_to_float=66.9,
        held_out=2,
        held_out_psnr_to_float=61.7,
        held_out_psnr=20.04,
        held_out_psnr_float=20.05,
    )
    assert "66.90 dB" in text
    assert "2 others | 61.70 dB |" in text
    assert "not how well the network restores" in text
    assert "same class" not in text
    assert "qtool demoire photos/ --out clean/ --weights model.safetensors" in text


def test_trained_branches_tell_their_accuracy():
    width = BranchWidth(bits=2, branches=[1], narrow=None)
    table = BranchTable(weight_bits=[2], widths=[width])
    trained = header(**BRANCHES, bits=["w2a2"], active_bits="w2a2", branches=table)
    text = card(
        trained, float_top1=91.25, pictures={"held_out": 500}, epochs=[{"top1": {"w2a2": 80.04}}]
    )
    assert "500 held-out pictures | 91.2 % |" in text
    assert "top-1 at w2a2, the same | 80.0 % |" in text
    assert "was not measured" not in text


def test_words_of_others_do_not_break_the_page():
    odd = header(provenance={"source": "a|b\n# <script>*x*", "method": "[x](http://y)\n\n---"})
    text = card(odd)
    (line,) = [line for line in text.splitlines() if "float model" in line]
    assert line == r"| float model | a\|b # \<script\>\*x\* |"
    assert r"| method | \[x\](http://y) --- |" in text


@pytest.mark.parametrize("changed", [{}, NESTED, RESTORING], ids=["fixed", "nested", "restoring"])
def test_the_commands_can_be_read(changed, capfd):
    (block,) = re.findall(r"^```sh\n(.*?)^```", card(header(**changed)), re.M | re.S)
    lines = block.splitlines()
    assert len(lines) >= 2
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "qtool"
        assert main([*words, "--dump-config"]) == 0
        assert capfd.readouterr().err == ""
