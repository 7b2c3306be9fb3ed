"""What demoire weights do to real photographs of screens, and to clean pictures.

    python tests/bench/restoration.py DATA [WEIGHTS ...] [--limit N] [--sheet DIR] [--record]

DATA has the folders moire_pairs and clean/kodak24; nothing here may have been trained on. Network
outputs are measured as they are (protocol `plain`), beside the untouched photograph and a classical
filter. --record writes the result into the header of the file of weights, --sheet DIR before,
after and target of every pair.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from qtool.api.synthesize import read_tensor_file
from qtool.io import container
from qtool.methods.undem.filters import luma
from qtool.methods.undem.training import result_of
from qtool.metrics import fidelity
from qtool.models import demoire_weights

Restore = Callable[[Tensor], Tensor]
CHECKSUMS = ("qtool.sha256", "qtool.header_sha256")
NOTCH, NEAR, NOTCHED_FROM = 4.0, 9, 0.06


def read(path: Path) -> Tensor:
    """A picture (3, H, W) in 0..1."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def classical(picture: Tensor) -> Tensor:
    """Peaks of the spectrum cut down in brightness, a median over 7 x 7 pixels in colour."""
    bright = luma(picture)
    colour = F.pad((picture - bright)[None], (3, 3, 3, 3), mode="reflect")[0]
    windows = colour.unfold(1, 7, 1).unfold(2, 7, 1).flatten(3)
    spectrum = torch.fft.rfft2(bright[0])
    size = spectrum.abs()[None, None]
    reach = NEAR // 2
    around = F.pad(size, (reach,) * 4, mode="replicate").unfold(2, NEAR, 1).unfold(3, NEAR, 1)
    usual = around.flatten(4).median(-1).values
    down = torch.fft.fftfreq(bright.shape[1])[:, None]
    fine = (down.square() + torch.fft.rfftfreq(bright.shape[2]).square()).sqrt() > NOTCHED_FROM
    peak = (size > NOTCH * usual) & fine
    gain = torch.where(peak, usual / size.clamp_min(1e-9), 1.0)[0, 0]
    kept = torch.fft.irfft2(spectrum * gain, s=bright.shape[1:])
    return (kept + windows.median(-1).values).clamp(0, 1)


def network(path: Path) -> Restore:
    """Restore whole pictures by a file of weights, in float32."""
    loaded = demoire_weights.load_network(path)
    multiple = loaded.size_multiple

    @torch.inference_mode()
    def restore(picture: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        ends = (0, -width % multiple, 0, -height % multiple)
        whole = F.pad(picture[None], ends, mode="reflect")
        return result_of(loaded.module(whole), whole)[0, :, :height, :width].clamp(0, 1)

    return restore


def pairs(data: Path) -> Iterator[tuple[Path, Path]]:
    """Photographs and targets of moire_pairs."""
    for photo in sorted((data / "moire_pairs").glob("*/*_moire.*")):
        yield (
            photo,
            next(photo.parent.glob(photo.name.replace("_moire", "_gt").split(".")[0] + "*")),
        )


def measured(
    restore: Restore, data: Path, *, limit: int | None, sheet: Path | None
) -> dict[str, object]:
    """Means over the pairs, and PSNR of clean pictures to themselves."""
    found: list[dict[str, float]] = []
    for photo, wanted in list(pairs(data))[:limit]:
        source, target = read(photo), read(wanted)
        output = restore(source)
        found.append(fidelity.measure(output, target))
        if sheet is not None:
            side_by_side = torch.cat([source, output, target], -1).mul(255).round().byte()
            sheet.mkdir(parents=True, exist_ok=True)
            Image.fromarray(side_by_side.permute(1, 2, 0).numpy()).save(sheet / f"{photo.stem}.png")
    values = {name: round(sum(x[name] for x in found) / len(found), 4) for name in found[0]}
    harm = []
    for path in sorted((data / "clean" / "kodak24").iterdir())[:limit]:
        clean = read(path)
        harm.append(min(99.0, fidelity.psnr(restore(clean).mul(255).round() / 255, clean)))
    kodak = {"mean": round(sum(harm) / len(harm), 2), "least": round(min(harm), 2)}
    return {**values, "pairs": len(found), "kodak24_psnr_to_input": kodak}


def record(path: Path, results: dict[str, object]) -> None:
    """Write results into the provenance of a file of weights."""
    metadata, tensors = read_tensor_file(path)
    content = json.loads(metadata[demoire_weights.METADATA_KEY])
    content["provenance"]["measured"] = {
        "on": "moire_pairs (UHDM reduced, FHDMi) and kodak24, protocol plain, whole pictures, "
        "network output as it is; never trained on",
        **results,
    }
    kept = {key: value for key, value in metadata.items() if key not in CHECKSUMS}
    kept[demoire_weights.METADATA_KEY] = json.dumps(content, sort_keys=True)
    container.write_container(path, kept, tensors, overwrite=True)


def main() -> None:
    """Print one line of JSON per way to restore."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", type=Path, nargs="*")
    parser.add_argument("--limit", type=int, help="pairs and clean pictures to take")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--record", action="store_true")
    wanted = parser.parse_args()
    ways: list[tuple[str, Restore]] = [("untouched", lambda x: x), ("classical", classical)]
    if wanted.weights:
        ways = [("untouched", lambda x: x)]
    for name, restore in ways:
        print(name, json.dumps(measured(restore, wanted.data, limit=wanted.limit, sheet=None)))
    for path in wanted.weights:
        sheet = wanted.sheet / path.stem if wanted.sheet else None
        results = measured(network(path), wanted.data, limit=wanted.limit, sheet=sheet)
        print(path.name, json.dumps(results), flush=True)
        if wanted.record:
            record(path, results)


if __name__ == "__main__":
    main()
