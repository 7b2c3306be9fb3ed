"""Top-1 of an exported model in ONNX Runtime beside the engine's, over many views of pictures.

    qtool quantize deit_t --weights W --bits w4a4 --calib V -o q.safetensors --onnx q.onnx
    python tests/bench/onnx_agreement.py q.safetensors q.onnx --data C --data V --views 50

With activations of few bits two correct programs choose differently for some pictures, because
floats are rounded in another order, and over 1,000 pictures that alone moves top-1 by most of a
point. So every picture is seen in many views: windows on a grid of places, each also mirrored. The
standard error is of the difference, from the pictures as independent draws; the views of one
picture are not. Printed after every view, so a run that is stopped is not lost.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import onnxruntime
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

import qtool
from qtool.io import folders
from qtool.models import vision


def places(count: int) -> list[tuple[float, float, bool]]:
    """Views, the middle first: top and left in parts of the margin, and whether mirrored."""
    side = math.ceil(math.sqrt(count / 2))
    steps = [(index + 0.5) / side for index in range(side)]
    found = [(top, left, mirror) for top in steps for left in steps for mirror in (False, True)]
    found.sort(key=lambda view: (abs(view[0] - 0.5) + abs(view[1] - 0.5), view[2]))
    return found[:count]


def loaded(path: Path, short: int) -> Tensor:
    """A picture whose shorter side has that many pixels, (3, H, W), bytes."""
    with Image.open(path) as image:
        return F.pil_to_tensor(F.resize(image.convert("RGB"), short, F.InterpolationMode.BICUBIC))


def views(
    pictures: list[Tensor], place: tuple[float, float, bool], data: vision.DataConfig
) -> Tensor:
    """The same view of some pictures, (N, 3, H, W), normalised."""
    top, left, mirror = place
    _, height, width = data.input_size
    cut = [
        F.crop(
            picture,
            round(top * (picture.shape[1] - height)),
            round(left * (picture.shape[2] - width)),
            height,
            width,
        )
        for picture in pictures
    ]
    batch = F.normalize(torch.stack(cut).float() / 255, list(data.mean), list(data.std))
    return batch.flip(3) if mirror else batch


def main() -> None:
    """Measure, and print one JSON object per view."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--views", type=int, default=50)
    parser.add_argument("--crop-pct", type=float, default=0.875)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(
        str(options.onnx), session_options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    engine = qtool.load(options.checkpoint)
    data = vision.DataConfig.from_dict(engine.qtool_config.data)
    short = round(min(data.input_size[1:]) / options.crop_pct)
    rows = [
        (loaded(path, short), label)
        for folder in options.data
        for path, label in folders.read_labelled(folder, num_classes=1000)
    ]
    batches = [
        rows[start : start + options.batch_size]
        for start in range(0, len(rows), options.batch_size)
    ]
    gained = torch.zeros(len(rows))
    right, same, seen = torch.zeros(2), 0, 0
    for number, place in enumerate(places(options.views), start=1):
        found = []
        for batch in batches:
            pictures, labels = [picture for picture, _ in batch], [label for _, label in batch]
            x, wanted = views(pictures, place, data), torch.tensor(labels)
            with torch.inference_mode():
                ours = engine(x).argmax(dim=1)
            theirs = torch.from_numpy(session.run(None, {name: x.numpy()})[0]).argmax(dim=1)
            hits = torch.stack([theirs == wanted, ours == wanted]).float()
            right += hits.sum(dim=1)
            same += int((ours == theirs).sum())
            found.append(hits[0] - hits[1])
        gained += torch.cat(found)
        seen += len(rows)
        of_pictures = 100 * gained / number
        record = {
            "views": number,
            "seen": seen,
            "onnx_top1": round(100 * float(right[0]) / seen, 2),
            "engine_top1": round(100 * float(right[1]) / seen, 2),
            "difference": round(float(of_pictures.mean()), 3),
            "standard_error": round(float(of_pictures.std()) / math.sqrt(len(rows)), 3),
            "same_choice": round(100 * same / seen, 2),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
