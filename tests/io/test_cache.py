from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qtool.io.cache import cache_dir, offline, sha256_file, sha256_settings


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QTOOL_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("QTOOL_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "qtool"
    assert not cache_dir().exists()


@pytest.mark.parametrize("name", ["QTOOL_OFFLINE", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)]
)
def test_offline_by_environment(monkeypatch, name, value, expected):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(name, value)
    assert offline() is expected
    assert offline(True) is True


def test_sha256_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1_000_000)
    assert sha256_file(path) == hashlib.sha256(b"x" * 1_000_000).hexdigest()


def test_sha256_settings_ignores_order_but_not_values():
    first = sha256_settings({"count": 32, "out": Path("a")})
    assert first == sha256_settings({"out": Path("a"), "count": 32})
    assert first != sha256_settings({"count": 33, "out": Path("a")})
