"""Compiles the C passes while the package is built; without a compiler the package does without."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("qtool/engine/cpu")
SOURCES = ("native.c", "panels.c", "amx.c", "avx2.c", "depthwise.c")
# Fused or reordered floating-point operations would change codes.
FLAGS = ("-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
VARIANTS = (("-fno-trapping-math", "-fopenmp"), ("-fopenmp",), ())


class CustomBuildHook(BuildHookInterface[Any]):
    """Builds the library beside its source, and puts it into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; a wheel with the library is for this platform alone."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        library = root / FOLDER / "_native.so"
        if not compiled(root / FOLDER, library):
            self.app.display_warning("no C compiler: qtool will run on PyTorch alone, slower")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["force_include"][str(library)] = str(FOLDER / "_native.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"


def compiled(folder: Path, library: Path, *more: str) -> bool:
    """Compile a folder's sources, with more flags if given, and tell whether that went well."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return False
    fresh = library.with_name(f"{library.name}.tmp")
    for extra in VARIANTS:
        sources = [str(folder / name) for name in SOURCES]
        command = [compiler, *FLAGS, *extra, *more, *sources, "-o", str(fresh), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            fresh.replace(library)
            return True
    return False
