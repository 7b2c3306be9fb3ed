from __future__ import annotations

from qtool.io.cache import cache_dir


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QTOOL_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("QTOOL_CACHE")
    assert cache_dir() == tmp_path / ".cache" / "qtool"
    assert not cache_dir().exists()
