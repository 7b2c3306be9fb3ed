"""Compiles every Triton kernel for GPUs that need not be there; prints one JSON record a kernel.

A program of its own because Triton must start without TRITON_INTERPRET. Run it as
`python tests/engine/aot_compile.py [CAPABILITY...]`; the records say how the kernel came out.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtool.engine.kernels import (
    attention,
    conv2d,
    count_levels,
    kernel_sums,
    layer_norm,
    linear,
    linear_nested,
    matmul,
    matmul_log2,
    pack_codes,
    quantize_log2,
    quantize_uniform,
    row_distances,
    tiles,
    unpack_codes,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LINEAR = {"SCALE_STEP": 1, "ZERO_STEP": 1, "HAS_BIAS": True}
MATRICES = dict.fromkeys(("inner", "rows", "columns", "terms"), "i32")


@dataclass(frozen=True)
class Case:
    """One kernel with the types and constants it is launched with."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, object] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()


def strides(left: str, right: str) -> dict[str, str]:
    """Types of the strides of two batches, of which `right` is a transposed view."""
    names = [f"{left}_outer", f"{left}_inner", f"{left}_row", f"{left}_term"]
    names += [f"{right}_outer", f"{right}_inner", f"{right}_term", f"{right}_column"]
    return dict.fromkeys(names, "i32")


def linear_cases(capability: int = 90) -> list[Case]:
    """Every tile with every ending, then what else a layer may have."""
    types = {
        "x": "*u8",
        "x_scale": "*fp32",
        "x_zero": "*i32",
        "weight": "*i8",
        "weight_shift": "*i32",
        "weight_sums": "*i32",
        "weight_scale": "*fp32",
        "bias": "*fp32",
        "residual": "*fp32",
        "y": "*fp32",
        "rows": "i32",
        "channels": "i32",
        "in_features": "i32",
        "group_channels": "i32",
    }
    none = dict.fromkeys(("out_scale", "out_zero", "out_table"))
    values = {"HAS_GELU": False, "QUANTIZES": False, "HAS_TABLE": False, "TOP": 255, **none}
    values |= {"ONE_GROUP": True, "FOLDED": False}
    to_codes = types | {"y": "*u8", "out_scale": "*fp32", "out_zero": "*i32", "out_table": "*u8"}
    usual = {"SCALE_STEP": 0, "ZERO_STEP": 0, "HAS_BIAS": True, "EVEN_K": True}
    usual |= {"HAS_SHIFT": False, "weight_shift": None, "HAS_RESIDUAL": False, "residual": None}
    kernel = linear.linear_kernel
    cases = []
    for ending, tile in [
        (e, tile) for e in tiles.Ending for tile in sorted(tiles.of(e, capability))
    ]:
        constants, options = usual | tile.constants(), tile.options()
        name = f"linear {ending.value} {'x'.join(map(str, tile))}"
        if ending is tiles.Ending.VALUES:
            whole = {**constants, "HAS_RESIDUAL": True, **values}
            del whole["residual"]
            cases.append(Case(name, kernel, types, whole, options))
            continue
        for gelu, table in itertools.product((False, True), (False, True)):
            constants |= {"HAS_GELU": gelu, "QUANTIZES": True, "HAS_TABLE": table, "TOP": 255}
            constants["out_table"] = None
            if table:
                del constants["out_table"]
            constants["ONE_GROUP"] = gelu or tile != tiles.SMALLEST
            constants["FOLDED"] = tile != tiles.SMALLEST
            kind = f"{' gelu' * gelu}{' table' * table}"
            cases.append(Case(name + kind, kernel, to_codes, constants.copy(), options))
    constants = {"SCALE_STEP": 1, "ZERO_STEP": 1, "HAS_BIAS": True, "EVEN_K": False}
    constants |= {"HAS_SHIFT": True, "HAS_RESIDUAL": True, **values, **tiles.SMALLEST.constants()}
    options = tiles.SMALLEST.options()
    cases.append(Case("linear per token, shifted", kernel, types, constants, options))
    unused = ("weight_shift", "weight_sums", "residual", "group_channels")
    types = {name: kind for name, kind in types.items() if name not in unused}
    types["shift"] = "i32"
    constants = LINEAR | linear_nested.TILE
    kernel, options = linear_nested.linear_nested_kernel, linear_nested.OPTIONS
    cases.append(Case("linear_nested", kernel, types, constants, options, unaligned=("shift",)))
    return cases


def conv2d_cases() -> list[Case]:
    """Weights of every width, and the narrow tile of depthwise kernels."""
    types = {
        "x": "*u8",
        "x_scale": "*fp32",
        "x_zero": "*i32",
        "weight": "*u8",
        "weight_scale": "*fp32",
        "weight_zero": "*i32",
        "bias": "*fp32",
        "y": "*fp32",
        **dict.fromkeys(("places", "depth", "height", "width"), "i32"),
        **dict.fromkeys(("y_height", "y_width", "group_channels", "row_bytes"), "i32"),
    }
    pairs = {"KERNEL": 3, "STRIDE": 2, "PADDING": 1, "DILATION": 1}
    window = {f"{name}_{axis}": size for name, size in pairs.items() for axis in "HW"}
    forms = [(f"w{bits}", bits, conv2d.WIDE) for bits in range(2, 9)]
    forms += [("w4 narrow", 4, conv2d.NARROW)]
    return [
        Case(
            f"conv2d {name}",
            conv2d.conv2d_kernel,
            types,
            {
                "GROUPS": 1,
                "HAS_BIAS": True,
                "BITS": bits,
                "OFFSET": 128 if bits == 8 else 0,
                **window,
                **tile,
            },
            conv2d.OPTIONS,
        )
        for name, bits, tile in forms
    ]


def attention_cases(capability: int = 90) -> list[Case]:
    """Every kind of probabilities, with heads of every width that takes another tile."""
    types = {
        "qkv": "*u8",
        "qkv_scale": "*fp32",
        "qkv_zero": "*i32",
        "added": "*fp32",
        "p_scale": "*fp32",
        "p_zero": "*i32",
        "p_table": "*fp16",
        "out_scale": "*fp32",
        "out_zero": "*i32",
        "out_table": "*u8",
        "out": "*u8",
        **dict.fromkeys(("part", "tokens", "heads", "windows"), "i32"),
    }
    kinds = {
        "uniform": {"IS_LOG2": False, "P_TOP": 15, "p_table": None},
        "table": {"IS_LOG2": False, "P_TOP": 255},
        "log2": {"IS_LOG2": True, "P_TOP": 15, "p_zero": None, "p_table": None},
    }
    cases = []
    sizes = ((49, 32, 1), (49, 32, 999), (197, 64, 1), (197, 64, 999), (197, 96, 1), (577, 64, 1))
    for (tokens, width, matrices), kind, added in itertools.product(sizes, kinds, (False, True)):
        form = attention.form_of(
            tokens, width, matrices, added=added, tuned=capability == tiles.TUNED_CAPABILITY
        )
        constants = {
            "WIDTH": width,
            "HAS_ADDED": added,
            "HAS_P_TABLE": kind == "table",
            "HAS_OUT_TABLE": added,
            "OUT_TOP": 255 if added else 15,
            "BLOCK_D": attention.depth_of(width),
            **form.constants(),
            **kinds[kind],
        }
        if not added:
            constants |= {"added": None, "out_table": None}
        name = f"attention {kind} {tokens} d{width} x{matrices}{' added' * added}"
        kernel, options = attention.attention_kernel, form.options()
        cases.append(Case(name, kernel, types, constants, options, unaligned=("tokens", "heads")))
    return cases


def layer_norm_cases() -> list[Case]:
    """Rows of several widths, with and without parameters."""
    types = {
        "x": "*fp32",
        "weight": "*fp32",
        "bias": "*fp32",
        "scale": "*fp32",
        "zero_point": "*i32",
        "table": "*u8",
        "codes": "*u8",
        "rows": "i32",
        "eps": "fp32",
    }
    cases = []
    sizes = ((1, 96, True), (1, 768, True), (9999, 768, False), (1, 4096, True), (9999, 4096, True))
    for rows, width, whole in sizes:
        block, warps = layer_norm.block_of(rows, width)
        constants = {"WIDTH": width, "TOP": 255, **block}
        constants |= dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_TABLE"), whole)
        if not whole:
            constants |= dict.fromkeys(("weight", "bias", "table"))
        name = f"layer_norm {rows} d{width}{' bare' * (not whole)}"
        options = layer_norm.OPTIONS | {"num_warps": warps}
        kernel = layer_norm.layer_norm_quantize_kernel
        cases.append(Case(name, kernel, types, constants, options, unaligned=("rows", "eps")))
    return cases


def training_cases() -> list[Case]:
    """Learnt steps in both types of activations, and the losses of synthesis."""
    cases = []
    constants: dict[str, object] = {"TOP": 15, **count_levels.BLOCK}
    for kind in ("fp32", "bf16"):
        shared, name = {"x": f"*{kind}", "step": "*fp32", "count": "i32"}, f"count_levels {kind}"
        kernel, types = count_levels.count_levels_kernel, {**shared, "levels": f"*{kind}"}
        cases.append(Case(name, kernel, types, constants, count_levels.OPTIONS))
        kernel = count_levels.count_gradients_kernel
        types = {**shared, "gradient": f"*{kind}", "passed": f"*{kind}", "shares": "*fp32"}
        cases.append(Case(f"{name} gradients", kernel, types, constants, count_levels.OPTIONS))
    shared = {"values": "*fp32", "points": "*fp32", "count": "i32", "inverse": "fp32"}
    constants = {"POINTS": 10, **kernel_sums.BLOCK}
    rest = (constants, kernel_sums.OPTIONS, ("count", "inverse"))
    types = {**shared, "sums": "*fp32"}
    cases.append(Case("kernel_sums", kernel_sums.kernel_sums_kernel, types, *rest))
    types = {**shared, "gradient": "*fp32", "passed": "*fp32"}
    kernel = kernel_sums.kernel_gradients_kernel
    cases.append(Case("kernel_sums gradients", kernel, types, *rest))
    sizes = ("inner", "outer_step", "inner_step", "width")
    types = dict.fromkeys(("x", "target", "distances", "differences"), "*fp32")
    types |= dict.fromkeys(sizes, "i32")
    for width in (49, 196, 3136):
        constants = {"BLOCK": row_distances.block_of(width)}
        kernel, name = row_distances.row_distances_kernel, f"row_distances {width}"
        cases.append(Case(name, kernel, types, constants, row_distances.OPTIONS, sizes))
    return cases


def other_cases() -> list[Case]:
    """The quantizers, the products of matrices and the packed format."""
    cases = [
        Case(
            "quantize_uniform",
            quantize_uniform.quantize_uniform_kernel,
            {
                "x": "*fp32",
                "scale": "*fp32",
                "zero_point": "*i32",
                "table": "*u8",
                "codes": "*u8",
                "rows": "i32",
                "width": "i32",
            },
            {
                "SCALE_STEP": 1,
                "ZERO_STEP": 1,
                "TOP": 15,
                "HAS_TABLE": False,
                **quantize_uniform.BLOCK,
            },
            quantize_uniform.OPTIONS,
        ),
        Case(
            "quantize_uniform table",
            quantize_uniform.quantize_uniform_kernel,
            {
                "x": "*fp32",
                "scale": "*fp32",
                "zero_point": "*i32",
                "table": "*u8",
                "codes": "*u8",
                "rows": "i32",
                "width": "i32",
            },
            {
                "SCALE_STEP": 1,
                "ZERO_STEP": 1,
                "TOP": 255,
                "HAS_TABLE": True,
                **quantize_uniform.BLOCK,
            },
            quantize_uniform.OPTIONS,
        ),
        Case(
            "quantize_log2",
            quantize_log2.quantize_log2_kernel,
            {"x": "*fp32", "scale": "*fp32", "codes": "*u8", "count": "i32"},
            {"TOP": 15, **quantize_log2.BLOCK},
            quantize_log2.OPTIONS,
        ),
        Case(
            "matmul",
            matmul.matmul_kernel,
            {
                "a": "*u8",
                "a_scale": "*fp32",
                "a_zero": "*i32",
                "b": "*u8",
                "b_scale": "*fp32",
                "b_zero": "*i32",
                "out": "*fp32",
                **MATRICES,
                **strides("a", "b"),
            },
            {"a_term": 1, "b_term": 1, **matmul.TILE},
            matmul.OPTIONS,
        ),
        Case(
            "matmul_log2",
            matmul_log2.matmul_log2_kernel,
            {
                "p": "*u8",
                "p_scale": "*fp32",
                "v": "*u8",
                "v_scale": "*fp32",
                "v_zero": "*i32",
                "out": "*fp32",
                **MATRICES,
                **strides("p", "v"),
            },
            {"p_term": 1, "v_column": 1, "TOP": 15, **matmul_log2.TILE},
            matmul_log2.OPTIONS,
        ),
    ]
    rows = {"rows": "i32", "in_features": "i32", "row_bytes": "i32"}
    for bits in range(2, 9):
        cases.append(
            Case(
                f"unpack_codes w{bits}",
                unpack_codes.unpack_codes_kernel,
                {"packed": "*u8", "codes": "*u8", **rows},
                {"BITS": bits, **unpack_codes.BLOCK},
                unpack_codes.OPTIONS,
            )
        )
    for width, low in ((8, 0), (4, 0), (2, 4), (1, 6)):
        cases.append(
            Case(
                f"pack_codes field {width}",
                pack_codes.pack_codes_kernel,
                {"codes": "*u8", "packed": "*u8", **rows, "start": "i32", "plane_bytes": "i32"},
                {"WIDTH": width, "LOW": low, **pack_codes.BLOCK},
                pack_codes.OPTIONS,
            )
        )
    return cases


def compile_case(case: Case, capability: int) -> dict[str, object]:
    """Compiles one case and says what came out of it."""
    names = case.kernel.arg_names
    constants = dict(case.constants)
    if "OVERLAPS" in names:
        constants["OVERLAPS"] = capability >= 90
    signature = {name: case.types.get(name, "constexpr") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(names)
        if signature[name] != "constexpr" and name not in case.unaligned
    }
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    ptx = compiled.asm["ptx"]
    products = re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*", ptx)
    return {
        "kernel": case.name,
        "capability": capability,
        "shared": compiled.metadata.shared,
        "stack": stack_bytes(compiled.asm["cubin"]),
        "products": sorted(set(products)),
        "contracts": compiled.metadata.enable_fp_fusion,
        "fused": bool(re.search(r"\bfma\.rn\.f32", ptx)),
        "approximate_division": bool(re.search(r"div\.(full|approx)", ptx)),
    }


def stack_bytes(cubin: bytes) -> int | None:
    """Bytes of local memory that a kernel spills, or None where no cuobjdump came with Triton."""
    if not CUOBJDUMP.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(value) for value in re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr))


def chosen(capability: int) -> list[Case]:
    """All cases."""
    layers = linear_cases(capability) + conv2d_cases() + layer_norm_cases()
    layers += training_cases()
    return layers + attention_cases(capability) + other_cases()


def main() -> None:
    """Compiles for the capabilities of the command line, by default 80, 90 and 100."""
    for capability in [int(word) for word in sys.argv[1:]] or [80, 90, 100]:
        for case in chosen(capability):
            print(json.dumps(compile_case(case, capability)), flush=True)


if __name__ == "__main__":
    main()
