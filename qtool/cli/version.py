"""Versions and devices, found without importing torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path


def version_line() -> str:
    """For example `qtool 0.1.0 (torch 2.15.0, cuda: no, triton: yes)`."""
    triton = "yes" if _version("triton") else "no"
    cuda = "yes" if _torch_has_cuda() and _driver_is_present() else "no"
    own, torch = _version("qtool") or "(not installed)", _version("torch") or "missing"
    return f"qtool {own} (torch {torch}, cuda: {cuda}, triton: {triton})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch_has_cuda() -> bool:
    """Whether torch was built for CUDA, as its own version file says."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b[^=\n]*= *['\"]", text, re.MULTILINE) is not None


def _driver_is_present() -> bool:
    """Whether the kernel offers a GPU (or WSL's door to one) that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
