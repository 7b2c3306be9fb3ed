"""Latency of a checkpoint beside its float model and other integer engines, in one process.

    python tests/bench/latency.py deit_t q.safetensors --weights W --batch 1 --batch 8 --threads 2

Beside the checkpoint run, in turn: float32 as PyTorch does it, float32 and bfloat16 with
linear layers laid out for oneDNN once, and where they are installed ONNX Runtime and OpenVINO in
float32, int8 (ONNX Runtime's static Q/DQ with signed weights and unsigned activations, one random
batch for calibration) and dynamic int8. A time is the least of all rounds; ratios are
over the best float32 of PyTorch. A spinning loop is watched first: its gaps tell how much of the
machine other work takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qtool
from qtool.engine import dispatch
from qtool.models import vision

Run = Callable[[], Any]


class Prepared(nn.Module):
    """A linear layer in the layout of oneDNN for a number of rows."""

    def __init__(self, source: nn.Linear, rows: int) -> None:
        super().__init__()
        self.bias = source.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(source.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def prepared(model: nn.Module, rows: int) -> nn.Module:
    """A copy whose linear layers are laid out once."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Prepared(layer, rows))
    return model


def torch_runs(model: nn.Module, quantized: nn.Module, x: Tensor) -> Iterator[tuple[str, Run]]:
    """What PyTorch runs."""
    rows = 200 * len(x)
    half = copy.deepcopy(model).bfloat16()
    half_x = x.bfloat16()
    ready = prepared(model, rows)
    yield "torch float32", lambda: model(x)
    yield "torch float32, oneDNN", lambda: ready(x)
    yield "torch bfloat16", lambda: half(half_x)
    if torch.cpu._is_avx512_supported():  # without, oneDNN has no layout for bfloat16
        half_ready = prepared(half, rows)
        yield "torch bfloat16, oneDNN", lambda: half_ready(half_x)
    yield "qtool", lambda: quantized(x)


def exported(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    """ONNX files of the float model, with static and with dynamic int8."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    files = {name: folder / f"{name}.onnx" for name in ("float32", "static", "dynamic")}
    torch.onnx.export(model, (x,), files["float32"], input_names=["x"], dynamo=True, verbose=False)
    graph = onnx.load(files["float32"])
    onnx.save(graph, files["float32"])

    class OneBatch(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"x": x.numpy()}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantize_static(
        files["float32"],
        files["static"],
        OneBatch(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
    )
    quantize_dynamic(files["float32"], files["dynamic"], weight_type=QuantType.QInt8)
    return files


def peer_runs(model: nn.Module, x: Tensor, threads: int, folder: Path) -> Iterator[tuple[str, Run]]:
    """What other engines run."""
    import onnxruntime

    files = exported(model, x, folder)
    values = {"x": x.numpy()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, path in files.items():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        words = name if name == "float32" else f"int8 {name}"
        yield f"ONNX Runtime {words}", lambda session=session: session.run(None, values)
    try:
        import openvino
    except ImportError:
        return
    core = openvino.Core()
    for words, name, precision in (
        ("float32", "float32", "f32"),
        ("bfloat16", "float32", "bf16"),
        ("int8", "static", "f32"),
        ("int8, rest bfloat16", "static", "bf16"),
    ):
        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(str(files[name]), "CPU", hints).create_infer_request()
        yield f"OpenVINO {words}", lambda request=request: request.infer(values)


def gaps(seconds: float = 2.0) -> float:
    """The share of a busy loop's time that went elsewhere, in steps of more than 0.2 ms."""
    start = last = time.perf_counter()
    lost = 0.0
    while last - start < seconds:
        now = time.perf_counter()
        if now - last > 2e-4:
            lost += now - last
        last = now
    return lost / seconds


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run in every round, in turn, after one that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--batch", type=int, action="append", required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true", help="PyTorch and qtool only")
    parser.add_argument("--json", type=Path, help="file to add least and median to")
    return parser.parse_args()


def cpu_name() -> str:
    """Model and vector units of the processor."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1] for line in text.splitlines() if "model name" in line), "")
    units = [u for u in ("avx2", "avx_vnni", "avx512_vnni", "amx_int8") if u in text.split()]
    return f"{model.strip() or platform.machine()} ({', '.join(units)})"


@torch.no_grad()
def main() -> None:
    """Measure, then print one table for each batch."""
    options = read_options()
    torch.set_num_threads(options.threads)
    opened = vision.open_model(options.model, weights=options.weights, offline=True)
    started = time.perf_counter()
    quantized = qtool.load(options.checkpoint)
    loaded = time.perf_counter() - started
    record: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "checkpoint": quantized.qtool_config.active_bits,
        "model": options.model,
        "gaps": round(gaps(), 4),
        "load_seconds": round(loaded, 3),
        "batches": {},
    }
    print(json.dumps({key: value for key, value in record.items() if key != "batches"}))
    for batch in options.batch:
        x = torch.randn(batch, *opened.data.input_size)
        runs = dict(torch_runs(opened.model, quantized, x))
        with tempfile.TemporaryDirectory() as folder:
            if not options.no_peers:
                runs |= dict(peer_runs(opened.model, x, options.threads, Path(folder)))
            samples = measure(runs, options.rounds)
        least = {name: min(times) for name, times in samples.items()}
        best = min(least["torch float32"], least["torch float32, oneDNN"])
        print(f"\n| batch {batch} | ms | best float32 / this |\n| --- | --- | --- |")
        for name, time_ms in least.items():
            print(f"| {name} | {time_ms:.1f} | {best / time_ms:.2f} |")
        record["batches"][str(batch)] = {
            name: [round(min(times), 1), round(statistics.median(times), 1)]
            for name, times in samples.items()
        }
    print(f"\nran on: {', '.join(sorted({d.backend for d in dispatch.explain()}))}")
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.exists() else []
        options.json.write_text(json.dumps([*known, record], indent=1) + "\n")


if __name__ == "__main__":
    main()
