"""The README.md of a hub folder: what the model is, how it was made, what was measured, its use."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qtool.api.float_source import public_name
from qtool.io.header import Header
from qtool.models import registry
from qtool.models.data_config import DataConfig
from qtool.models.registry import CONFIG_FILE, WEIGHTS_FILE
from qtool.models.sources import FOLDER_PREFIX

Rows = Sequence[tuple[str, str]]

_HUB = "hf-hub:"
_MADE = {
    "qtool": "qtool",
    "method": "method",
    "paper": "paper",
    "recipe": "recipe",
    "effort": "effort",
    "steps": "steps, instead of the effort's",
    "synthesis_steps": "synthesis steps",
    "count": "calibration pictures",
    "epochs": "epochs",
    "batch_size": "pictures a step",
    "learning_rate": "learning rate",
    "pictures": "training pictures",
    "seed": "seed",
}
_UNMEASURED = "Nothing was measured when this folder was written."
_LABELS = "Accuracy on labelled pictures was not measured in that run; `qtool eval` does it."
_RESTORING = (
    "PSNR to the float network tells what rounding costs, not how well the network restores."
)


def text(header: Header, *, size: int, summary: Mapping[str, Any]) -> str:
    """Describe a checkpoint in Markdown, with the front matter that model hubs read.

    Nothing in it changes when the checkpoint is switched to other bits, and no path of this
    machine appears.

    Args:
        header: What the checkpoint says about itself.
        size: Its bytes.
        summary: What the run that made it measured; empty if it measured nothing.
    """
    widths = _widths(header)
    bits = f"{', '.join(map(str, widths))} bits" if widths else header.bits[0]
    measured = _measured(summary)
    kind = "restores photographs of screens" if _restores(header) else "classifies pictures"
    sections = [
        _front_matter(header),
        f"# {header.architecture} at {bits}",
        f"A network that {kind}, quantized to integers with qtool. `{WEIGHTS_FILE}` holds packed "
        f"codes, scales and all that qtool needs to run it; `{CONFIG_FILE}` describes it to hubs.",
        _table(_facts(header, size, summary)),
        "## How it was made",
        _table(_made(header, summary)),
        "## Measured",
        *([_table(measured), *_caveat(header, summary)] if measured else [_UNMEASURED]),
        "## Use",
        _usage(header),
    ]
    return "\n\n".join(sections) + "\n"


def _name(source: str) -> str:
    return public_name(source).removeprefix(FOLDER_PREFIX)


def _restores(header: Header) -> bool:
    return header.task == "restoration"


def _widths(header: Header) -> list[int]:
    """Bits of weights that a switchable file has, rising; none for a file with one width."""
    if header.nested is not None:
        return header.nested.weight_bits
    return [] if header.branches is None else sorted(header.branches.bits)


def _front_matter(header: Header) -> str:
    """YAML, every value in JSON, which is YAML too."""
    values: dict[str, Any] = {
        "library_name": "qtool",
        "pipeline_tag": "image-to-image" if _restores(header) else "image-classification",
        "tags": ["quantized", "switchable" if _widths(header) else header.bits[0]],
    }
    source = str(header.provenance.get("weights_source", ""))
    spec = registry.find(header.architecture)
    known = () if spec is None else (f"{_HUB}timm/{spec.architecture}", f"bundled {spec.bundled}")
    if spec is not None and source in known:
        values["license"] = spec.licence.lower()
    if source.startswith(_HUB):
        values["base_model"] = source.removeprefix(_HUB).partition("@")[0]
        values["base_model_relation"] = "quantized"
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _facts(header: Header, size: int, summary: Mapping[str, Any]) -> Rows:
    provenance = header.provenance
    megabytes = f"{size / 1e6:.2f} MB"
    if "float_bytes" in summary:
        megabytes += f", of {summary['float_bytes'] / 1e6:.2f} MB in float32"
    rows = [
        ("architecture", header.architecture),
        ("float model", _name(str(provenance.get("source", header.architecture)))),
        ("its weights", _name(str(provenance.get("weights_source", "not recorded")))),
        ("SHA-256 of them", str(provenance.get("weights_sha256", "not recorded"))),
        ("bits", _bits(header)),
        ("quantized layers", _layers(header)),
        ("size", megabytes),
    ]
    if not _restores(header):
        data = DataConfig.from_dict(header.data)
        sizes = " x ".join(map(str, data.input_size))
        rows.append(("input", f"{sizes}, crop {data.crop_pct}, {data.interpolation}"))
        rows.append(("mean, standard deviation", f"{data.mean}, {data.std}"))
    return rows


def _bits(header: Header) -> str:
    if header.nested is None:
        return ", ".join(header.bits)
    weights, activations = (
        ", ".join(map(str, widths))
        for widths in (header.nested.weight_bits, header.nested.activation_bits)
    )
    return f"weights {weights}; activations {activations}"


def _layers(header: Header) -> str:
    layers = [layer for layer in header.layers.values() if layer.weight_bits]
    if header.engine != "fixed":
        return str(len(layers))
    counts = Counter((layer.weight_bits, layer.input_bits) for layer in layers)
    parts = [
        f"{number} at w{weight}a{activation or 32}"
        for (weight, activation), number in sorted(counts.items(), key=str)
    ]
    return ", ".join(parts)


def _made(header: Header, summary: Mapping[str, Any]) -> Rows:
    known = {**summary, **header.provenance}
    return [(words, str(known[key])) for key, words in _MADE.items() if key in known]


def _measured(summary: Mapping[str, Any]) -> Rows:
    """What a run found out about its file, as its summary holds it."""
    rows: list[tuple[str, str]] = []
    agreement = summary.get("calibration_agreement")
    same = "same class as the float model"
    if isinstance(agreement, Mapping):
        rows += [
            (f"{same} at {bits}, calibration pictures", f"{share:.1%}")
            for bits, share in agreement.items()
        ]
    elif agreement is not None:
        rows.append((f"{same}, calibration pictures", f"{agreement:.1%}"))
    others = f"{summary.get('held_out')} others"
    if "held_out_agreement" in summary:
        rows.append((f"{same}, {others}", f"{summary['held_out_agreement']:.1%}"))
    for key, words in (
        ("calibration_psnr_to_float", "PSNR to the float network, calibration pictures"),
        ("held_out_psnr_to_float", f"PSNR to the float network, {others}"),
        ("held_out_psnr", f"PSNR to the simulated targets of {others}"),
        ("held_out_psnr_float", "the float network's there"),
    ):
        if key in summary:
            rows.append((words, f"{summary[key]:.2f} dB"))
    if "float_top1" in summary:
        held_out = f"{summary['pictures']['held_out']} held-out pictures"
        top1 = summary["epochs"][-1]["top1"]
        rows.append((f"top-1 of the float model, {held_out}", f"{summary['float_top1']:.1f} %"))
        rows += [(f"top-1 at {bits}, the same", f"{share:.1f} %") for bits, share in top1.items()]
    if "verify" in summary:
        worst = f"{summary['verify']['max_abs_difference']:.2g}"
        rows.append(("reloaded, outputs differ from the calibrated ones by at most", worst))
    return rows


def _caveat(header: Header, summary: Mapping[str, Any]) -> list[str]:
    """What the figures do not say."""
    if _restores(header):
        return [_RESTORING]
    return [] if "float_top1" in summary else [_LABELS]


def _usage(header: Header) -> str:
    if _restores(header):
        lines = [f"qtool demoire photos/ --out clean/ --weights {WEIGHTS_FILE}"]
    else:
        lines = ["qtool eval . --data pictures/"]
        if widths := _widths(header):
            lines = ["qtool switch-bits . --list", f"{lines[0]} --bits {widths[-1]}"]
    shell = "\n".join(["qtool info .", *lines])
    python = 'import qtool\n\nmodel = qtool.load(".")  # an nn.Module that multiplies integers'
    return (
        f"In a copy of this folder:\n\n```sh\n{shell}\n```\n\n```python\n{python}\n```\n\n"
        "Once it is on a hub, `hf-hub:OWNER/NAME` can stand for the dot."
    )


def _table(rows: Rows) -> str:
    lines = [f"| {_cell(what)} | {_cell(value)} |" for what, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _cell(value: str) -> str:
    """One line that Markdown shows as it stands."""
    return re.sub(r"([|<>\[\]*_`\\])", r"\\\1", " ".join(value.split()))
