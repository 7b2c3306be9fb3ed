"""Every Triton kernel compiles for the GPUs we know, with or without one in this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

pytestmark = pytest.mark.timeout(600)
CAPABILITIES = (80, 90, 100)
INTEGER_KERNELS = {"attention", "conv2d", "linear", "linear_nested", "matmul"}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def records(repository):
    """One record for each kernel and capability, from a process that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(repository)
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run(
        [sys.executable, script, *map(str, CAPABILITIES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_file_compiles_for_every_capability(records, repository):
    folder = repository / "qtool/engine/kernels"
    files = {path.stem for path in folder.glob("[!_]*.py") if "_kernel(" in path.read_text()}
    compiled = {(record["kernel"].split()[0], record["capability"]) for record in records}
    assert compiled == {(name, capability) for name in files for capability in CAPABILITIES}


def test_kernels_fit_the_shared_memory(records):
    over = [record for record in records if record["shared"] > SHARED_LIMIT[record["capability"]]]
    assert over == []


def test_kernels_spill_no_registers(records):
    if records[0]["stack"] is None:
        pytest.skip("no cuobjdump came with Triton")
    assert [record for record in records if record["stack"]] == []


def test_float_arithmetic_is_not_contracted(records):
    assert [record for record in records if record["contracts"]] == []
    assert [record for record in records if record["approximate_division"]] == []
    # These end in codes by fused operations of their own; the values of a layer do not.
    own = ("attention", "layer_norm", "linear codes")
    assert [
        record for record in records if record["fused"] and not record["kernel"].startswith(own)
    ] == []


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_integer_products_run_on_the_int8_tensor_cores(records, capability, instruction):
    integer = [
        record
        for record in records
        if record["kernel"].split()[0] in INTEGER_KERNELS and record["capability"] == capability
    ]
    assert {record["kernel"].split()[0] for record in integer} == INTEGER_KERNELS
    for record in integer:
        assert record["products"], record
        for product in record["products"]:
            assert product.startswith(instruction)
            # The second product of attention is one of float16.
            whole = ".s32.s8.s8" in product
            assert whole or ("attention" in record["kernel"] and ".f32.f16.f16" in product)
        assert any(".s32.s8.s8" in product for product in record["products"])
