"""`qtool --version`."""

import importlib.metadata
import re

from qtool.cli import version


def test_the_line_names_torch_cuda_and_triton(qtool_run):
    ran = qtool_run("--version")
    assert ran.code == 0
    torch = re.escape(importlib.metadata.version("torch"))
    pattern = rf"qtool \S.* \(torch {torch}, cuda: (yes|no), triton: (yes|no)\)\n"
    assert re.fullmatch(pattern, ran.out)


def test_absent_packages_are_said_to_be_absent(monkeypatch):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = version.version_line()
    assert line == "qtool (not installed) (torch missing, cuda: no, triton: no)"


def test_hidden_devices_count_as_none(monkeypatch):
    for value in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert "cuda: no" in version.version_line()
