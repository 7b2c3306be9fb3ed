"""The house rules: who may import whom, what lies at the top level, how light the start is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtool

ALLOWED_AT_TOP = {"README.md", "pyproject.toml", "qtool", "tests", "assets", "completions"}
ROOMS = sorted(
    path.parent.relative_to(Path(qtool.__file__).parent).as_posix()
    for path in Path(qtool.__file__).parent.rglob("__init__.py")
    if path.parent != Path(qtool.__file__).parent
)


def _run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_rules_hold(repository):
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    ["qtool", "qtool.settings.quantize", "qtool.report", "qtool.models.registry", "qtool.cli.app"],
)
def test_start_needs_no_torch(module):
    heavy = _run_python(
        f"import sys, {module}\n"
        "heavy = {'torch', 'timm', 'torchvision', 'triton', 'numpy', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert heavy.strip() == "[]"


def test_kernels_are_imported_only_when_chosen():
    found = _run_python(
        "import sys, torch, qtool.engine.ops, qtool.engine.dispatch\n"
        "print([m for m in sys.modules if m.startswith('qtool.engine.kernels.')])"
    )
    assert found.strip() == "[]"


def test_top_level_holds_only_the_house(repository):
    listed = subprocess.run(
        ["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("the source tree is not a git repository")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= ALLOWED_AT_TOP


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_have_empty_init(room):
    assert (Path(qtool.__file__).parent / room / "__init__.py").read_bytes() == b""


def test_only_cli_prints():
    prints = re.compile(r"^\s*print\(|sys\.std(out|err)\b", re.MULTILINE)
    package = Path(qtool.__file__).parent
    found = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if prints.search(path.read_text(encoding="utf-8"))
        and path.relative_to(package).parts[0] != "cli"
    ]
    assert found == []


def test_public_names_resolve():
    assert set(qtool.__all__) <= set(dir(qtool))
    for name in qtool.__all__:
        assert getattr(qtool, name) is getattr(qtool, name)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qtool.quantise
