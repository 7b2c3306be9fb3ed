"""The page with before and after needs nothing else and shows where pictures changed."""

import base64
import hashlib
import io
import re

import numpy as np
from PIL import Image

from qtool.api.demoire import preview
from qtool.io.photos import Coding, Metadata, Photo


def photo(pixels, **metadata):
    return Photo(
        pixels=pixels, alpha=None, kind="png", metadata=Metadata(**metadata), coding=Coding()
    )


def pictures(page):
    found = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_crops_lie_where_the_change_is_largest():
    before = np.full((1600, 2000, 3), 100, np.uint8)
    after = before.copy()
    after[1200:1300, 1500:1600] = 160
    after[200:260, 100:160] = 140
    places = preview.most_changed(before, after)
    (top, left), second = places[0], places[1]
    assert top <= 1200
    assert top + 320 >= 1300
    assert left <= 1500
    assert left + 320 >= 1600
    assert second[0] <= 200 <= second[0] + 320
    assert len(places) == 2


def test_small_and_deep_pictures():
    small = np.zeros((30, 40, 1), np.uint16)
    assert preview.most_changed(small, small + 5) == [(0, 0)]
    page = preview.Preview()
    page.add("small", photo(small), small + 900)
    assert pictures(page.html())[0].size == (40, 30)


def test_the_page_is_complete_upright_and_safe(photo_files):
    page = preview.Preview()
    pixels = photo_files.scene(600, 800)
    page.add("<b>name</b>", photo(pixels, exif=photo_files.exif(6)), pixels // 2)
    text = page.html()
    assert "<b>name" not in text
    assert "&lt;b&gt;name" in text
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    shown = pictures(text)
    assert shown[0].size == (600, 800)
    assert np.asarray(shown[1]).mean() < np.asarray(shown[0]).mean() * 0.6


def test_a_page_stays_light(photo_files):
    page = preview.Preview()
    pixels = photo_files.scene(40, 40)
    for index in range(preview.LARGEST + 3):
        page.add(str(index), photo(pixels), pixels)
    assert "3 more photographs" in page.html()
    assert page.html().count("<section>") == preview.LARGEST


def test_an_empty_page_says_so():
    assert "No photograph was changed" in preview.Preview().html()
