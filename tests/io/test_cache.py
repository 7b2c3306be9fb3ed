from __future__ import annotations

import hashlib

from qtool.io.cache import cache_dir, sha256_file


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QTOOL_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("QTOOL_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "qtool"
    assert not cache_dir().exists()


def test_sha256_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1_000_000)
    assert sha256_file(path) == hashlib.sha256(b"x" * 1_000_000).hexdigest()
