"""Files made to hurt: what is read is refused in one line, or works; nothing crashes or swells."""

import copy
import io
import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qtool
from qtool.api import models as models_api
from qtool.errors import QtoolError
from qtool.io import container
from qtool.io.checkpoint import read_header
from qtool.models import demoire, demoire_weights, vision
from qtool.settings.demoire import DemoireSettings
from qtool.settings.models import InfoSettings
from qtool.settings.quantize import QuantizeSettings

SLOW = pytest.mark.slow
ODD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    1e308,
    "",
    "../../etc/passwd",
    "w2a2",
    "x" * 5000,
    [],
    [[[]]],
    {},
    {"a": 1},
    [0, 0, 0],
    [3, 10**9, 10**9],
]
GIGABYTE = 2**30


def peak():
    """Most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small whole checkpoint."""
    folder = tmp_path_factory.mktemp("hostile")
    drawn = folder / "pictures"
    drawn.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(drawn / f"{index}.png")
    arguments = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    weights = folder / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = demo_network(arguments).state_dict()
    container.write_container(
        weights, {"architecture": "demo_vit", "model_args": json.dumps(arguments)}, state
    )
    path = folder / "tiny-w4a4.safetensors"
    qtool.quantize(
        QuantizeSettings(model=str(weights), calib=drawn, count=4, steps=1, out=path, device="cpu")
    )
    return path


def demo_network(arguments):
    return vision.build("demo_vit", arguments)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def with_odd_value(config, rng):
    """A configuration with one value replaced, removed or doubled."""
    changed = copy.deepcopy(config)
    path = rng.choice([place for place in places(config) if place])
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    if rng.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = rng.choice(ODD)
    return changed


def with_odd_bytes(content, rng):
    """Bytes flipped, cut off, put in twice, emptied, or exchanged; the header suffers most."""
    changed = bytearray(content)
    head = 8 + int.from_bytes(content[:8], "little") if len(content) > 8 else len(content)
    kind = rng.randrange(5)
    start = rng.randrange(min(head, len(changed)) if rng.random() < 0.7 else len(changed))
    length = rng.choice([1, 2, 8, 100])
    if kind == 0:
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        changed[start:start] = changed[start : start + length]
    elif kind == 3:
        changed[start : start + length] = bytes(len(changed[start : start + length]))
    else:
        changed[start : start + 1] = rng.choice([b"\xff", b"{", b'"', b"\x00", b"9", b"]", b"-"])
    return bytes(changed)


def reads(path):
    """Read a file as `info` and programs do; tells whether it was taken for good."""
    refusals = []
    for read in (lambda: models_api.info(InfoSettings(target=path)), lambda: qtool.load(path)):
        try:
            read()
        except QtoolError as error:
            refusals.append(error.message)
    assert all(message.strip() and message.isprintable() for message in refusals)
    return not refusals


@pytest.mark.parametrize("count", [150, pytest.param(7_000, marks=[SLOW, pytest.mark.timeout(0)])])
def test_damaged_checkpoints(checkpoint, tmp_path, count):
    content, rng, before = checkpoint.read_bytes(), random.Random(1), peak()
    path = tmp_path / "damaged.safetensors"
    for _ in range(count):
        path.write_bytes(with_odd_bytes(content, rng))
        reads(path)
    assert peak() - before < GIGABYTE


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=[SLOW, pytest.mark.timeout(0)])])
def test_forged_checkpoints_whose_checksums_are_right(checkpoint, tmp_path, count):
    with container.open_container(checkpoint) as file:
        table = container.read_table(file, checkpoint)
        tensors = container.read_tensors(file, checkpoint, table)
        metadata = dict(table.metadata)
    config = json.loads(read_header(checkpoint).model_dump_json())
    rng, before = random.Random(2), peak()
    path = tmp_path / "forged.safetensors"
    loaded = 0
    for _ in range(count):
        text = json.dumps(with_odd_value(config, rng))
        container.write_container(path, {**metadata, "qtool.config": text}, tensors, overwrite=True)
        loaded += reads(path)
    assert peak() - before < GIGABYTE
    # Some changes are harmless, such as another seed in the provenance; not all are.
    assert 0 < loaded < count


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Weights of a tiny demoire network."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    arguments = {"encoder_width": 4, "decoder_width": 4, "growth": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = demoire.build("esdnet_s", arguments)
    container.write_container(
        path, demoire_weights.metadata("esdnet_s", arguments, {}), tiny.state_dict()
    )
    return path


@pytest.mark.parametrize("count", [48, pytest.param(2_000, marks=[SLOW, pytest.mark.timeout(0)])])
def test_damaged_photographs(network, tmp_path, count):
    rng = random.Random(3)
    pixels = np.random.default_rng(1).integers(0, 255, (40, 56, 3)).astype(np.uint8)
    whole = {}
    for suffix, form in {".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".webp": "WEBP"}.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form)
        whole[suffix] = buffer.getvalue()
    photos, before = tmp_path / "photos", peak()
    photos.mkdir()
    for index in range(count):
        suffix = rng.choice(list(whole))
        (photos / f"{index}{suffix}").write_bytes(with_odd_bytes(whole[suffix], rng))
    settings = DemoireSettings(
        paths=(str(photos),), out=str(tmp_path / "clean"), weights=network, device="cpu", force=True
    )
    result = qtool.demoire(settings)
    assert len(result.items) == count
    for item in result.items:
        if item["status"] == "failed":
            assert item["error"]
            assert "unexpected" not in item["error"]
            assert "Traceback" not in item["error"]
        else:
            with Image.open(item["output"]) as picture:
                picture.load()
    written = [path for path in (tmp_path / "clean").rglob("*") if path.suffix in whole]
    assert len(written) == sum(item["status"] == "ok" for item in result.items)
    assert {item["status"] for item in result.items} == {"ok", "failed"}
    assert peak() - before < GIGABYTE
    assert not list(Path(tmp_path).rglob("*.tmp*"))
