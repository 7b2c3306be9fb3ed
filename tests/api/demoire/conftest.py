"""Tiny weights of our own making, and a folder of awkward photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qtool.api.demoire import run as api
from qtool.io.container import write_container
from qtool.models import demoire, demoire_weights
from qtool.report import Result
from qtool.settings.demoire import DemoireSettings

TINY = {"encoder_width": 4, "decoder_width": 4, "growth": 4}


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny network that changes every picture a little, differently from place to place."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = demoire.build("esdnet_s", TINY)
        torch.nn.init.normal_(network.decoder.decoder_1.conv.conv.weight, std=0.03)
    write_container(path, demoire_weights.metadata("esdnet_s", TINY, {}), network.state_dict())
    return path


@pytest.fixture
def restore(weights) -> Callable[..., Result]:
    """Run the use case; every photograph is restored unless `force` is taken back."""

    def run(*paths: Path, out: Path | str, **settings: object) -> Result:
        sink = settings.pop("sink", None)
        stdin = settings.pop("stdin", None)
        chosen = {"weights": weights, "force": True, "device": "cpu", **settings}
        request = DemoireSettings.build(
            {"paths": tuple(map(str, paths)), "out": str(out), **chosen}
        )
        return api.demoire(request, sink=sink, stdin=stdin)

    return run


@pytest.fixture(scope="session")
def awkward(tmp_path_factory, photo_files) -> Path:
    """Photographs of every format and trait, two damaged files, and one of another type."""
    folder = tmp_path_factory.mktemp("photos")
    alpha = np.dstack([photo_files.scene(), np.zeros((48, 64), np.uint8)])
    alpha[:24, :, 3] = 200
    files = {
        "a.jpg": photo_files.jpeg(orientation=6),
        "b.JPEG": photo_files.jpeg(orientation=3, progressive=True),
        "wide.jpg": photo_files.jpeg(icc=photo_files.display_p3(), orientation=1),
        "grey.jpg": photo_files.jpeg(photo_files.scene(channels=1)[..., 0]),
        "cmyk.jpg": photo_files.cmyk_jpeg(),
        "sub/folder/a.jpg": photo_files.jpeg(photo_files.scene(seed=3), orientation=8),
        "plain.png": photo_files.png(),
        "alpha.png": photo_files.png(alpha),
        "palette.png": photo_files.saved(
            photo_files.Image.fromarray(photo_files.scene()).quantize(16), "PNG"
        ),
        "grey16.png": photo_files.saved(
            photo_files.scene(channels=1)[..., 0].astype(np.uint16) * 257, "PNG"
        ),
        "turned.tif": photo_files.saved(photo_files.scene(), "TIFF", exif=photo_files.exif(7)),
        "lzw.tiff": photo_files.saved(photo_files.scene(), "TIFF", compression="tiff_lzw"),
        "photo.webp": photo_files.saved(
            photo_files.scene(), "WEBP", exif=photo_files.exif(5), lossless=True
        ),
        "photo.bmp": photo_files.saved(photo_files.scene(), "BMP"),
        "photo.avif": photo_files.saved(photo_files.scene(), "AVIF"),
        "one pixel.png": photo_files.saved(photo_files.scene(1, 1), "PNG"),
        "name with 'quotes' and ü.png": photo_files.png(),
        "truncated.jpg": photo_files.jpeg(photo_files.scene(300, 300))[:4000],
        "text.png": b"not a picture",
        "notes.txt": b"of another type",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
