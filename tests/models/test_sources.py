"""Finding files in the package and on the hub, without a network."""

import hashlib
import socket
import time
import urllib.error

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from qtool.errors import MissingError, UsageError
from qtool.models import sources

NAMES = ("model.safetensors", "pytorch_model.bin")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("inside", [True, False], ids=["wheel", "checkout"])
def test_bundled_file_is_found(tmp_path, monkeypatch, inside):
    package = tmp_path / "qtool"
    folder = (package if inside else tmp_path) / "assets"
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    monkeypatch.setattr(sources, "_PACKAGE", package)
    assert sources.bundled("file") == folder / "file"


def test_bundled_file_that_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "qtool")
    with pytest.raises(MissingError, match="demo_vit"):
        sources.bundled("demo_vit.safetensors")


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 1000)
    assert sources.sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_metadata_and_rows(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"head.weight": torch.zeros(7, 2)}, path, {"architecture": "x"})
    assert sources.read_metadata(path) == {"architecture": "x"}
    assert sources.rows(path, "head.weight") == 7
    assert sources.rows(path, "fc.weight") is None


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\xff" * 64])
def test_foreign_file_is_a_usage_error(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a readable safetensors"):
        sources.read_metadata(path)


@pytest.mark.parametrize("text", ["{", "[1]", "nonsense", '{"a": NaN}'])
def test_bad_json_is_a_usage_error(text):
    with pytest.raises(UsageError, match="here"):
        sources.read_json(text, origin="here")


def test_a_config_that_cannot_be_read_is_a_usage_error(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"\xff", b"[1]", b'{"a":' * 100_000):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"config\.json"):
            sources.read_config(path)
    with pytest.raises(UsageError, match="cannot be read"):
        sources.read_config(tmp_path / "absent")
    path.write_text('{"quantization_config": {"quant_method": "qtool"}}')
    assert sources.is_quantized(sources.read_config(path))
    for other in ({}, {"quantization_config": "qtool"}, {"quantization_config": {"bits": 4}}):
        assert not sources.is_quantized(other)


def test_names_of_checkpoints_are_files_folders_or_repositories(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    for name in (tmp_path, f"{tmp_path}/", f"local-dir:{tmp_path}", file, str(file)):
        assert sources.checkpoint_file(name, offline=True) == file
    absent = tmp_path / "absent"
    assert sources.checkpoint_file(f"local-dir:{absent}", offline=True) == absent
    with pytest.raises(MissingError) as caught:
        sources.checkpoint_file("hf-hub:a/b@v2", offline=True)
    command = "`hf download a/b config.json model.safetensors --revision v2`"
    assert command in caught.value.remedy
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repository, name, revision: str(tmp_path / repository / f"{revision}-{name}"),
    )
    found = sources.checkpoint_file("hf-hub:a/b@v2", offline=True)
    assert found == tmp_path / "a" / "b" / "v2-model.safetensors"


def test_cached_file_needs_no_network(tmp_path, monkeypatch, no_sockets):
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repository, name, revision: str(tmp_path / name) if name == NAMES[1] else None,
    )
    assert sources.fetch("a/b", NAMES, offline=False) == tmp_path / NAMES[1]


def test_offline_opens_no_socket_and_names_the_command(no_sockets):
    with pytest.raises(MissingError) as caught:
        sources.fetch("timm/x", NAMES, offline=True, note="about 5 MB, MIT")
    assert caught.value.exit_code == 4
    assert "timm/x (about 5 MB, MIT)" in caught.value.message
    assert "`hf download timm/x model.safetensors`" in caught.value.remedy
    assert "--weights FILE" in caught.value.remedy


def test_revision_is_part_of_the_command():
    with pytest.raises(MissingError) as caught:
        sources.fetch("a/b@v2", ("config.json",), offline=True, wanted="config.json")
    assert "`hf download a/b config.json --revision v2`" in caught.value.remedy
    assert "--weights" not in caught.value.remedy


def test_no_network_fails_fast(monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("tried to download")
    )
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    began = time.monotonic()
    with pytest.raises(MissingError, match="does not answer"):
        sources.fetch("timm/x", NAMES, offline=False)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("error", "reachable"),
    [
        (urllib.error.URLError(OSError("no route")), False),
        (TimeoutError("timed out"), False),
        (urllib.error.HTTPError("u", 403, "no", None, None), True),
    ],
    ids=["no-route", "timeout", "forbidden"],
)
def test_reachable(monkeypatch, error, reachable):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sources.urllib.request, "urlopen", fail)
    assert sources._reachable() is reachable


def test_second_name_is_tried_when_the_first_is_absent(tmp_path, monkeypatch):
    def download(repository, name, **_):
        if name == NAMES[0]:
            raise hub_errors.EntryNotFoundError("absent")
        return str(tmp_path / name)

    monkeypatch.setattr(sources, "_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert sources.fetch("a/b", NAMES, offline=False) == tmp_path / NAMES[1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (hub_errors.LocalEntryNotFoundError("lost"), "connection failed"),
        (hub_errors.EntryNotFoundError("absent"), "holds none of"),
        (hub_errors.HFValidationError("bad name\nmore"), "bad name"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_failed_download_says_why(monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sources, "_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(MissingError, match=reason):
        sources.fetch("a/b", NAMES, offline=False)
