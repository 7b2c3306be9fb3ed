"""Files tell names, the cache tells folders."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qtool.api import float_source
from qtool.api.float_source import FloatSource
from qtool.io import cache

DIGEST = "ab" * 32


def opened(name):
    return SimpleNamespace(name=name, weights_sha256=DIGEST)


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("/home/me/secret/w.safetensors", "w.safetensors"),
        ("C:\\Users\\me\\w.bin", "w.bin"),
        ("local-dir:/home/me/net/", "local-dir:net"),
        ("hf-hub:timm/x@main", "hf-hub:timm/x@main"),
        ("bundled demo_vit.safetensors", "bundled demo_vit.safetensors"),
        ("deit_t", "deit_t"),
    ],
)
def test_public_names_have_no_folders(source, public):
    assert float_source.public_name(source) == public


def test_a_file_is_found_again_from_any_folder(tmp_path, monkeypatch):
    Path("w.bin").write_bytes(b"w")
    where = Path.cwd() / "w.bin"
    float_source.remember(opened("deit_t"), "w.bin")
    monkeypatch.chdir(tmp_path)
    assert float_source.recall(DIGEST) == FloatSource("deit_t", str(where))


def test_a_model_that_is_a_file_or_folder_is_kept_with_its_place():
    float_source.remember(opened("net.safetensors"), "pretrained")
    assert float_source.recall(DIGEST) == FloatSource(str(Path.cwd() / "net.safetensors"))
    float_source.remember(opened("local-dir:net"), "pretrained")
    assert float_source.recall(DIGEST) == FloatSource(f"local-dir:{Path.cwd() / 'net'}")


@pytest.mark.parametrize("name", ["deit_t", "hf-hub:owner/name", "demo_vit"])
def test_what_every_machine_finds_is_not_kept(name):
    float_source.remember(opened(name), "pretrained")
    assert float_source.recall(DIGEST) is None
    assert not cache.cache_dir().exists() or not list(cache.cache_dir().rglob("*.json"))


def test_a_cache_that_cannot_be_used_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "file"))
    float_source.remember(opened("net.safetensors"), "pretrained")
    assert float_source.recall(DIGEST) is None


@pytest.mark.parametrize("text", ["", "[]", '{"model": 1}', "{", "\udcff"])
def test_a_damaged_note_counts_as_none(text):
    float_source.remember(opened("net.safetensors"), "pretrained")
    (note,) = cache.cache_dir().rglob("*.json")
    note.write_bytes(text.encode(errors="surrogateescape"))
    assert float_source.recall(DIGEST) is None


@pytest.mark.parametrize("digest", ["", "../../../etc/passwd", "zz", "a" * 4000])
def test_a_digest_from_a_hostile_header_leaves_the_cache_alone(digest):
    assert float_source.recall(digest) is None


def test_a_folder_that_was_the_model_keeps_saying_so():
    """So that `eval --weights FILE` asks for its architecture, not for a model of its name."""
    assert float_source.is_path(float_source.public_name("local-dir:/home/me/net/"))
    assert float_source.is_path(float_source.public_name("/home/me/w.safetensors"))
    assert not float_source.is_path(float_source.public_name("deit_t"))
