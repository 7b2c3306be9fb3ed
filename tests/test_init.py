"""The package's own names."""

import importlib.metadata

import qtool


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setitem(vars(qtool), "__version__", "")  # puts back what is there now
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert qtool.__getattr__("__version__") == "0+unknown"
