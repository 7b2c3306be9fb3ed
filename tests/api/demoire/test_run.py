"""A folder of awkward photographs goes through whole, and a killed run can go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.api.demoire import network as networks
from qtool.api.demoire import run as api
from qtool.errors import ImageError, MissingError, UsageError
from qtool.io import exif, photos
from qtool.io.container import write_container
from qtool.io.journal import NAME, read_journal
from qtool.methods.undem import detection
from qtool.methods.undem.restoration import Restorer
from qtool.models import demoire, demoire_weights
from qtool.settings.demoire import DemoireSettings

BAD = {"truncated.jpg", "text.png"}


def read(path):
    return photos.read_photo(path.read_bytes(), str(path))


def results(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != NAME
    }


@pytest.fixture(scope="module")
def restored(awkward, weights, tmp_path_factory):
    """The awkward folder after a run, and what the run said."""
    out = tmp_path_factory.mktemp("out") / "clean"
    settings = DemoireSettings(
        paths=(str(awkward),),
        out=str(out),
        weights=weights,
        force=True,
        device="cpu",
        preview=out.parent / "page.html",
    )
    return out, api.demoire(settings)


def test_all_but_the_damaged_are_restored(awkward, restored):
    out, result = restored
    assert result.exit_code == 3
    assert result.status == "partial"
    expected = {p.relative_to(awkward).as_posix() for p in awkward.rglob("*") if p.is_file()}
    assert set(results(out)) == expected - BAD - {"notes.txt"}
    failed = {Path(item["path"]).name for item in result.items if item["status"] == "failed"}
    assert failed == BAD
    assert all(item["error"] for item in result.items if item["status"] == "failed")
    assert result.summary["ignored"] == 1
    assert result.summary["restored"] == len(expected) - 3


def test_every_trait_survives(awkward, restored):
    out, _ = restored
    for name in results(out):
        before, after = read(awkward / name), read(out / name)
        assert before.kind == after.kind, name
        assert before.pixels.shape == after.pixels.shape, name
        assert before.pixels.dtype == after.pixels.dtype, name
        assert (before.alpha is None) == (after.alpha is None), name
        if before.alpha is not None:
            assert np.array_equal(before.alpha, after.alpha), name
        assert exif.orientation(before.metadata.exif) == exif.orientation(after.metadata.exif)
        assert before.metadata.xmp == after.metadata.xmp, name
        assert len(before.metadata.exif) == len(after.metadata.exif), name
        if name != "cmyk.jpg":
            assert before.metadata.icc == after.metadata.icc, name
        if before.kind == "jpeg" and name != "cmyk.jpg":
            assert before.coding.subsampling == after.coding.subsampling, name
            assert before.coding.progressive == after.coding.progressive, name


def test_pictures_change_but_what_is_invisible_does_not(awkward, restored):
    out, result = restored
    changes = {Path(item["path"]).name: item.get("change") for item in result.items}
    assert changes["plain.png"] > 0.3
    before, after = read(awkward / "alpha.png"), read(out / "alpha.png")
    assert np.array_equal(before.pixels[24:], after.pixels[24:])
    assert not np.array_equal(before.pixels[:24], after.pixels[:24])


def test_grey_stays_grey_and_deep_stays_deep(awkward, restored):
    out, _ = restored
    deep = read(out / "grey16.png").pixels
    assert deep.dtype == np.uint16
    assert len(np.unique(deep % 257)) > 50


def test_the_preview_shows_what_was_restored(restored):
    out, _ = restored
    page = (out.parent / "page.html").read_text()
    assert page.count("<section>") == 17
    assert "sub/folder/a.jpg" in page
    assert "http://" not in page
    assert "https://" not in page


def test_the_journal_tells_what_was_made(restored):
    out, _ = restored
    assert set(read_journal(out)) == set(results(out))


def test_existing_results_are_refused_skipped_or_replaced(awkward, restore, tmp_path):
    out = tmp_path / "out"
    restore(awkward / "a.jpg", out=out)
    first = (out / "a.jpg").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        restore(awkward / "a.jpg", out=out)
    again = restore(awkward / "a.jpg", out=out, skip_existing=True)
    assert [item["status"] for item in again.items] == ["skipped"]
    restore(awkward / "a.jpg", out=out, skip_existing=True, strength=0.2)
    assert (out / "a.jpg").read_bytes() != first
    restore(awkward / "a.jpg", out=out, overwrite=True)
    assert (out / "a.jpg").read_bytes() == first


def test_what_somebody_else_made_is_never_replaced(awkward, restore, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.jpg").write_bytes(b"mine")
    restore(awkward / "a.jpg", out=out, skip_existing=True)
    assert (out / "a.jpg").read_bytes() == b"mine"
    restore(awkward / "b.JPEG", out=out)
    (out / "b.JPEG").write_bytes(b"edited")
    restore(awkward / "b.JPEG", out=out, skip_existing=True, strength=0.2)
    assert (out / "b.JPEG").read_bytes() == b"edited"


def test_a_clean_photograph_is_passed_on_byte_for_byte(awkward, restore, tmp_path, photo_files):
    source = tmp_path / "flat.jpg"
    source.write_bytes(photo_files.jpeg(np.full((90, 90, 3), 120, np.uint8)))
    result = restore(source, out=tmp_path / "out", force=False)
    assert result.summary["copied"] == 1
    assert result.items[0]["moire"] < detection.THRESHOLD
    assert (tmp_path / "out" / "flat.jpg").read_bytes() == source.read_bytes()
    stripped = restore(source, out=tmp_path / "bare", force=False, metadata="strip")
    assert stripped.summary["copied"] == 1
    bare = (tmp_path / "bare" / "flat.jpg").read_bytes()
    assert b"Photoshop" not in bare
    with Image.open(source) as before, Image.open(tmp_path / "bare" / "flat.jpg") as after:
        assert before.tobytes() == after.tobytes()


def test_strength_zero_keeps_every_bit_of_a_png(awkward, restore, tmp_path):
    restore(awkward / "plain.png", out=tmp_path / "out", strength=0.0)
    before, after = read(awkward / "plain.png"), read(tmp_path / "out" / "plain.png")
    assert np.array_equal(before.pixels, after.pixels)


def test_a_mask_protects_what_is_black(awkward, restore, tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    restore(awkward / "plain.png", out=tmp_path / "out", mask=tmp_path / "mask.png")
    before, after = read(awkward / "plain.png"), read(tmp_path / "out" / "plain.png")
    assert np.array_equal(before.pixels[:, :32], after.pixels[:, :32])
    assert not np.array_equal(before.pixels[:, 32:], after.pixels[:, 32:])
    with pytest.raises(ImageError, match="mask is 64 x 48"):
        restore(awkward / "one pixel.png", out=tmp_path / "no", mask=tmp_path / "mask.png")


def test_wide_gamut_colours_outside_srgb_survive(photo_files, restore, tmp_path):
    pixels = photo_files.scene()
    pixels[:24] = (255, 0, 0)
    source = tmp_path / "wide.png"
    Image.fromarray(pixels).save(source, icc_profile=photo_files.display_p3())
    restore(source, out=tmp_path / "out", strength=0.05)
    after = read(tmp_path / "out" / "wide.png")
    assert after.metadata.icc == photo_files.display_p3()
    assert np.abs(after.pixels[:20].astype(int) - (255, 0, 0)).max() <= 12


def test_keeping_colour_stays_nearer_to_the_photograph(awkward, restore, tmp_path):
    means = {}
    for keep in (True, False):
        out = tmp_path / str(keep)
        restore(awkward / "plain.png", out=out, keep_colour=keep)
        means[keep] = read(out / "plain.png").pixels.mean(axis=(0, 1))
    before = read(awkward / "plain.png").pixels.mean(axis=(0, 1))
    assert np.abs(means[True] - before).max() <= np.abs(means[False] - before).max() + 0.05


def test_stdin_and_stdout(awkward, restore, tmp_path):
    written = []
    content = (awkward / "plain.png").read_bytes()
    restore(Path("-"), out="-", stdin=content, sink=written.append)
    restore(awkward / "plain.png", out=tmp_path / "out")
    assert written == [(tmp_path / "out" / "plain.png").read_bytes()]


def test_another_format_and_another_depth(awkward, restore, tmp_path):
    pytest.importorskip("pyvips")
    restore(awkward / "a.jpg", out=tmp_path / "out", output_format="png", bit_depth="16")
    after = read(tmp_path / "out" / "a.png")
    assert after.pixels.dtype == np.uint16
    assert exif.orientation(after.metadata.exif) == 6


def test_the_only_photograph_fails_with_its_own_error(awkward, restore, tmp_path):
    with pytest.raises(ImageError, match="not a picture"):
        restore(awkward / "text.png", out=tmp_path / "out")


def test_a_missing_extra_is_exit_4(photo_files, restore, tmp_path, monkeypatch):
    (tmp_path / "deep.png").write_bytes(photo_files.deep("png"))
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(MissingError, match=r"qtool\[photo\]"):
        restore(tmp_path / "deep.png", out=tmp_path / "out")
    result = restore(tmp_path / "deep.png", out=tmp_path / "out", bit_depth="8")
    assert result.items[0]["notes"] == ["cut down to 8 bits"]


def test_output_that_is_no_picture_is_a_failed_photograph(awkward, restore, tmp_path):
    tiny = {"encoder_width": 4, "decoder_width": 4, "growth": 4}
    network = demoire.build("esdnet_s", tiny)
    torch.nn.init.constant_(network.decoder.decoder_1.conv.conv.bias, 1e38)
    torch.nn.init.constant_(network.decoder.decoder_1.conv.conv.weight, -1e38)
    torch.nn.init.constant_(network.encoder.conv_first[0].bias, 1e38)
    path = tmp_path / "bad.safetensors"
    write_container(path, demoire_weights.metadata("esdnet_s", tiny, {}), network.state_dict())
    with pytest.raises(ImageError, match="nothing was written"):
        restore(awkward / "plain.png", out=tmp_path / "out", weights=path)
    assert results(tmp_path / "out") == {}


def test_on_error_stop_leaves_the_rest(awkward, restore, tmp_path):
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).write_bytes(
            b"bad" if name == "2.png" else (awkward / "plain.png").read_bytes()
        )
    result = restore(tmp_path, out=tmp_path / "out", on_error="stop")
    assert set(results(tmp_path / "out")) == {"1.png"}
    assert result.exit_code == 3


def test_processes_share_the_list(awkward, restore, tmp_path, monkeypatch, restored):
    out, _ = restored
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "3")
        restore(awkward, out=tmp_path / "out")
    assert results(tmp_path / "out") == results(out)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UsageError, match="RANK"):
        restore(awkward, out=tmp_path / "out")


def test_without_weights_the_error_says_what_to_do(awkward, tmp_path, monkeypatch):
    monkeypatch.setattr(demoire, "BUNDLED", "none.safetensors")
    settings = DemoireSettings(paths=(str(awkward),), out=str(tmp_path / "out"))
    for use in (api.plan, api.demoire):
        with pytest.raises(MissingError) as caught:
            use(settings)
        assert "--weights" in caught.value.remedy
    other = settings.model_copy(update={"model": "esdnet_l"})
    with pytest.raises(MissingError, match="42 MB"):
        api.demoire(other)
    assert not (tmp_path / "out").exists()


def test_a_plan_decodes_nothing_and_writes_nothing(awkward, weights, tmp_path):
    settings = DemoireSettings(
        paths=(str(awkward),), out=str(tmp_path / "out"), weights=weights, dry_run=True
    )
    planned = api.plan(settings)
    assert planned.summary["photographs"] == 19
    assert planned.summary["megapixels"] > 0
    assert planned.summary["estimated_seconds"] > 0
    assert not (tmp_path / "out").exists()


class _Darker(torch.nn.Module):
    """Stands for a network, so that only the handling of the picture takes time."""

    def forward(self, x):
        return (0.9 * x,)


def test_48_megapixels_within_a_bound_of_memory(restore, tmp_path, monkeypatch):
    """The picture alone is 144 MB decoded; the network gets what is left, in tiles."""

    def stand_in(network, device):
        return Restorer(
            network=_Darker(), result=0, multiple=64, bytes_per_pixel=2000, device=device
        )

    monkeypatch.setattr(networks, "make_restorer", stand_in)
    source = tmp_path / "large.jpg"
    Image.fromarray(np.full((6000, 8000, 3), 90, np.uint8)).save(source, quality=95)
    result = restore(source, out=tmp_path / "out", max_memory="3G", keep_colour=False)
    assert result.items[0]["tile"] == 512
    with Image.open(tmp_path / "out" / "large.jpg") as image:
        assert image.size == (8000, 6000)
        assert abs(image.getpixel((4000, 3000))[0] - 81) <= 1


KILLED = """
import sys, time
from qtool.api.demoire import photo, run
from qtool.settings.demoire import DemoireSettings
slow = photo.encode
def encode(*args, **kwargs):
    time.sleep(0.3)
    return slow(*args, **kwargs)
photo.encode = encode
run.demoire(DemoireSettings(paths=(sys.argv[1],), out=sys.argv[2], weights=sys.argv[3],
                            force=True, device="cpu", skip_existing=True))
"""


def test_a_killed_run_goes_on_to_the_same_result(
    awkward, restored, restore, weights, tmp_path, repository
):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(awkward), str(out), str(weights)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen(command, cwd=repository, env=environment)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and len(results(out)) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What the kill may also have left: a half-written temporary file and a cut line.
    half = out / f".a.qtool-{_host()}-{process.pid}-0123abcd.tmp"
    half.write_bytes(b"half")
    with (out / NAME).open("a") as journal:
        journal.write('{"output": "cut')
    done = {name for name in results(out) if not name.endswith(".tmp")}
    assert 0 < len(done) < 17
    result = restore(awkward, out=out, skip_existing=True)
    assert result.summary["skipped"] == len(done)
    assert results(out) == results(restored[0])


def _host():
    from qtool.io import atomic

    return atomic._HOST


def test_items_are_json(restored):
    _, result = restored
    assert json.loads(result.to_json())["summary"]["failed"] == 2
