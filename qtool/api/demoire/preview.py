"""One page that shows photographs before and after, with the places that changed most."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import threading

import numpy as np
from PIL import Image, ImageOps

from qtool.io import exif
from qtool.io.photos import Photo, Pixels

LARGEST = 40
"""Photographs on a page; more would make it too heavy to open."""

_OVERVIEW = 1000
_CROP = 320
_CROPS = 3
_QUALITY = 85


class Preview:
    """A page that photographs are added to one by one."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._more = 0
        self._lock = threading.Lock()

    def add(self, name: str, photo: Photo, after: Pixels) -> None:
        """Add a photograph.

        Args:
            name: What to call it.
            photo: How it was.
            after: The stored values of the result.
        """
        if len(self._parts) >= LARGEST:
            self._more += 1
            return
        before = photo.pixels
        turn = exif.orientation(photo.metadata.exif)
        step = max(1, max(before.shape[:2]) // _OVERVIEW)
        views = [("The whole picture", slice(0, None, step), slice(0, None, step))]
        views += [
            ("At 100 %", _span(top), _span(left)) for top, left in most_changed(before, after)
        ]
        shown = "\n".join(
            _wiper(
                title,
                _jpeg(before[rows, columns], photo, turn),
                _jpeg(after[rows, columns], photo, turn),
                wide=index == 0,
            )
            for index, (title, rows, columns) in enumerate(views)
        )
        with self._lock:
            self._parts.append(
                f"<section><h2>{html.escape(name)}</h2>\n<div class=views>{shown}</div></section>"
            )

    def html(self) -> str:
        """The page, in one file that needs nothing else."""
        parts = list(self._parts)
        if self._more:
            parts.append(f"<p>{self._more} more photographs were restored and are not shown.</p>")
        if not parts:
            parts.append("<p>No photograph was changed.</p>")
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        return _PAGE.format(digest=digest, style=_STYLE, script=_SCRIPT, body="\n".join(parts))


def most_changed(before: Pixels, after: Pixels) -> list[tuple[int, int]]:
    """Top and left of the squares that changed most, at most three, without overlap."""
    top = np.iinfo(before.dtype).max
    cell = _CROP // 4
    height, width = before.shape[0] // cell, before.shape[1] // cell
    if height < 4 or width < 4:
        return [(0, 0)]
    # Every fourth pixel of each row is enough to compare squares by.
    area = (slice(0, height * cell), slice(0, width * cell, 4))
    change = np.abs(after[area].astype(np.float32) - before[area].astype(np.float32)).mean(axis=2)
    cells = change.reshape(height, cell, width, cell // 4).mean(axis=(1, 3), dtype=np.float64) / top
    total = np.cumsum(np.cumsum(np.pad(cells, ((1, 0), (1, 0))), axis=0), axis=1)
    squares = total[4:, 4:] - total[:-4, 4:] - total[4:, :-4] + total[:-4, :-4]
    found: list[tuple[int, int]] = []
    for _ in range(_CROPS):
        y, x = np.unravel_index(int(squares.argmax()), squares.shape)
        if squares[y, x] < 1e-6:
            break
        found.append((int(y) * cell, int(x) * cell))
        squares[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = -1
    return found or [(0, 0)]


def _span(start: int) -> slice:
    return slice(start, start + _CROP)


def _jpeg(pixels: Pixels, photo: Photo, turn: int) -> str:
    values = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    values = values[..., 0] if values.shape[2] == 1 else values
    image = Image.fromarray(np.ascontiguousarray(values))
    if turn != 1:
        image.getexif()[0x0112] = turn
        image = ImageOps.exif_transpose(image)
    buffer = io.BytesIO()
    profile = photo.metadata.icc if pixels.shape[2] == 3 else b""
    image.save(buffer, "JPEG", quality=_QUALITY, icc_profile=profile)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _wiper(title: str, before: str, after: str, *, wide: bool) -> str:
    label = html.escape(title)
    return (
        f'<figure class="{"wide" if wide else "crop"}"><div class=wiper>'
        f'<img class=before alt="before" src="data:image/jpeg;base64,{before}">'
        f'<img class=after alt="after" src="data:image/jpeg;base64,{after}">'
        '<span class="tag left">before</span><span class="tag right">after</span>'
        f'<i class=edge></i><input type=range min=0 max=100 value=50 aria-label="{label}: '
        'how much of the photograph before is shown"></div>'
        f"<figcaption>{label}</figcaption></figure>"
    )


_SCRIPT = """
document.addEventListener("input", function (event) {
  event.target.parentNode.style.setProperty("--cut", event.target.value + "%");
});
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5b626b; --paper: #ffffff;
  --line: #d5d9de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #a0a8b1;
  --paper: #16181b; --line: #3a4047; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 68rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
p { color: var(--faint); margin: .25rem 0 0; }
.views { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; min-width: 0; }
.wide { flex: 0 0 100%; }
.wiper { --cut: 50%; position: relative; display: inline-block; max-width: 100%; line-height: 0;
  border: 1px solid var(--line); overflow: hidden; }
.wiper img { display: block; max-width: 100%; height: auto; }
.crop img { max-width: none; image-rendering: pixelated; }
.crop .wiper { overflow: auto hidden; }
.wide img { max-height: 80vh; }
.wiper .after { position: absolute; inset: 0; height: 100%; width: 100%;
  clip-path: inset(0 0 0 var(--cut)); }
.edge { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px; margin-left: -1px;
  background: #ffffff; box-shadow: 0 0 3px #000000; pointer-events: none; }
.tag { position: absolute; bottom: .4rem; padding: .1rem .5rem; border-radius: .3rem;
  font-size: .8rem; line-height: 1.4; color: #ffffff; background: rgb(0 0 0 / 60%);
  pointer-events: none; }
.left { left: .4rem; }
.right { right: .4rem; }
.wiper input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.wiper:focus-within { outline: 3px solid #3b82f6; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .25rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>qtool demoire</title>
<style>{style}</style>
</head>
<body>
<h1>Before and after</h1>
<p>Drag across a picture. The squares are the places that changed most, pixel for pixel.</p>
{body}
<script>{script}</script>
</body>
</html>
"""
