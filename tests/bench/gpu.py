"""A checkpoint on a GPU: its kernels against what the chip can do, the model against its peers.

    python tests/bench/gpu.py vit_b q.safetensors --batch 1 --batch 8 --batch 64 --json gpu.json

Weights of the float model are random unless `--weights` names some: they do not change times. Peers
are bfloat16 (eager and compiled, with and without autotuning), and int8 and float8 of torchao and
gemlite, compiled, where these are installed. Every model runs from a CUDA graph, so that nobody
waits for Python; all take turns in one process, twice. Ratios are over the fastest bfloat16.
Batch 1 is timed with weights in the cache (warm) and without (cold). Ceilings (copy, bfloat16 and
int8 products of 8,192 cubed, random data) are measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton.testing
from torch import Tensor, nn

import qtool
from qtool.engine import dispatch
from qtool.models import vision
from qtool.quant.fusion import QuantBlock, QuantLayerNorm
from qtool.quant.layers import QuantLinear

Run = Callable[[], Any]
DEVICE = torch.device("cuda")


def seconds_of(run: Run, milliseconds: int = 20) -> float:
    """Median of one call, from a graph of many."""
    found = triton.testing.do_bench_cudagraph(run, rep=milliseconds, return_mode="median")
    return float(found) / 1e3


def ceilings() -> dict[str, float]:
    """What the chip does on random data: bytes copied, products summed, a second."""
    size = 8192
    data = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(data)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    c, d = (
        torch.randint(-128, 128, (size, size), device=DEVICE, dtype=torch.int8) for _ in range(2)
    )
    d = d.t()
    return {
        "copy_gb_s": 2 * data.numel() * 4 / seconds_of(lambda: target.copy_(data)) / 1e9,
        "bfloat16_tflops": 2 * size**3 / seconds_of(lambda: a @ b) / 1e12,
        "int8_tops": 2 * size**3 / seconds_of(lambda: torch._int_mm(c, d)) / 1e12,
    }


def tokens_of(model: nn.Module, x: Tensor) -> int:
    """Tokens of a picture in the blocks of a model."""
    seen: list[int] = []
    block = next(module for module in model.modules() if isinstance(module, QuantBlock))
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    model(x)
    handle.remove()
    return seen[0]


def random_codes(*shape: int) -> Tensor:
    """Codes of four bits on the grid of tables."""
    return (torch.randint(0, 16, shape, device=DEVICE) * 17).to(torch.uint8)


def kernels(model: nn.Module, batch: int, tokens: int) -> Iterator[dict[str, Any]]:
    """The kernels of the first block beside bfloat16 ones of the same shapes."""
    block = next(module for module in model.modules() if isinstance(module, QuantBlock))
    rows = batch * tokens
    attn = block.attn
    fc1, fc2 = (cast(QuantLinear, block.mlp.get_submodule(name)) for name in ("fc1", "fc2"))
    qkv, proj = cast(QuantLinear, attn.qkv), cast(QuantLinear, attn.proj)
    width, heads = qkv.in_features, attn.num_heads
    half = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(batch, tokens, width, device=DEVICE)
    for name, layer, gelu in (
        ("qkv", qkv, False),
        ("proj + residual", proj, False),
        ("fc1 + GELU", fc1, True),
        ("fc2 + residual", fc2, False),
    ):
        channels, features = layer.shape
        codes = random_codes(batch, tokens, features)
        residual = torch.randn(batch, tokens, channels, device=DEVICE)
        residual_half = residual.bfloat16()
        weight, bias = torch.randn(channels, features, **half), torch.randn(channels, **half)
        values = torch.randn(rows, features, **half)

        def plain(
            values: Tensor = values,
            weight: Tensor = weight,
            bias: Tensor = bias,
            gelu: bool = gelu,
            residual: Tensor | None = residual_half if "residual" in name else None,
        ) -> Tensor:
            y = F.linear(values, weight, bias)
            if residual is not None:
                y += residual.view_as(y)
            return F.gelu(y) if gelu else y

        ours = seconds_of(
            lambda layer=layer, codes=codes, residual=residual, name=name: (
                layer(codes, residual) if "residual" in name else layer(codes)
            )
        )
        theirs = seconds_of(plain)
        operations = 2 * rows * channels * features
        yield {
            "kernel": name,
            "batch": batch,
            "us": 1e6 * ours,
            "tops": operations / ours / 1e12,
            "bfloat16_us": 1e6 * theirs,
            "bfloat16_over_this": theirs / ours,
        }
    codes = random_codes(3, batch, tokens, heads, width // heads)
    q, k, v = (torch.randn(batch, heads, tokens, width // heads, **half) for _ in range(3))
    ours = seconds_of(lambda: attn._attended_codes(codes, None))
    theirs = seconds_of(lambda: F.scaled_dot_product_attention(q, k, v))
    yield {
        "kernel": "attention",
        "batch": batch,
        "us": 1e6 * ours,
        "tops": 4 * batch * tokens**2 * width / ours / 1e12,
        "bfloat16_us": 1e6 * theirs,
        "bfloat16_over_this": theirs / ours,
    }
    norm = cast(QuantLayerNorm, block.norm1)
    half_x, weight, bias = x.bfloat16(), torch.ones(width, **half), torch.zeros(width, **half)
    ours = seconds_of(lambda: norm(x))
    theirs = seconds_of(lambda: F.layer_norm(half_x, (width,), weight, bias))
    yield {
        "kernel": "layer norm",
        "batch": batch,
        "us": 1e6 * ours,
        "gb_s": 5 * rows * width / ours / 1e9,
        "bfloat16_us": 1e6 * theirs,
        "bfloat16_over_this": theirs / ours,
    }


def peers(model: nn.Module, words: list[str]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Models to compare with, each made when its turn comes."""

    def compiled(module: nn.Module, mode: str) -> nn.Module:
        torch._dynamo.reset()
        return cast(nn.Module, torch.compile(module, mode=mode, fullgraph=True, dynamic=False))

    def half() -> nn.Module:
        return copy.deepcopy(model).bfloat16()

    def with_torchao(config: str) -> nn.Module:
        from torchao import quantization

        settings = getattr(quantization, config)
        made = (
            settings(granularity=quantization.PerRow())
            if config.startswith("Float8")
            else settings()
        )
        module = half()
        quantization.quantize_(module, made)
        return compiled(module, "max-autotune-no-cudagraphs")

    def with_gemlite(processor: str) -> nn.Module:
        from gemlite import helper

        module = half()
        made = getattr(helper, processor)(device=str(DEVICE), dtype=torch.bfloat16)
        helper.patch_model(module, device=str(DEVICE), processor=made, skip_modules=[])
        return compiled(module, "default")

    made: dict[str, Callable[[], nn.Module]] = {
        "bfloat16 eager": half,
        "bfloat16 compiled": lambda: compiled(half(), "default"),
        "bfloat16 max-autotune": lambda: compiled(half(), "max-autotune-no-cudagraphs"),
        "torchao int8 dynamic": lambda: with_torchao("Int8DynamicActivationInt8WeightConfig"),
        "torchao float8 dynamic": lambda: with_torchao("Float8DynamicActivationFloat8WeightConfig"),
        "gemlite int8 dynamic": lambda: with_gemlite("A8W8_int8_dynamic"),
    }
    for name, make in made.items():
        if not words or any(word in name for word in words):
            yield name, make


def graph_of(model: Callable[[Tensor], Any], x: Tensor) -> torch.cuda.CUDAGraph:
    """A captured call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Mean of some replays, one after the other."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / replays


def take_turns(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every graph in every round."""
    replays = {name: max(3, min(200, int(30 / milliseconds(g, 3)))) for name, g in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            samples[name].append(milliseconds(graph, replays[name]))
    return samples


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--weights", help="of the float model; random if not given")
    parser.add_argument("--batch", type=int, action="append", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", action="append", default=[], help="only peers with this word")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure, print tables, keep everything in one file."""
    options = read_options()
    quantized = qtool.load(options.checkpoint, device=DEVICE)
    if options.weights:
        model = vision.open_model(options.model, weights=options.weights, offline=True).model
    else:
        header = quantized.qtool_config
        model = vision.build(header.architecture, header.model_args)
    model = model.to(DEVICE).eval()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checkpoint": quantized.qtool_config.active_bits,
        "model": options.model,
        "ceilings": {name: round(value, 1) for name, value in ceilings().items()},
        "kernels": [],
        "batches": {},
        "failed": {},
    }

    def keep() -> None:
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    print(json.dumps({k: v for k, v in record.items() if k not in ("kernels", "batches")}))
    size = (3, 224, 224)
    tokens = tokens_of(quantized, torch.randn(1, *size, device=DEVICE))
    for batch in options.batch:
        for row in kernels(quantized, batch, tokens):
            row = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
            record["kernels"].append(row)
            print(json.dumps(row), flush=True)
        keep()
    made: dict[str, nn.Module] = {}
    if not options.no_peers:
        made = {name: make() for name, make in peers(model, options.peer)}
    for batch in options.batch:
        x = torch.randn(batch, *size, device=DEVICE)
        with dispatch.use_backend("reference"):
            wanted = quantized(x[:64]).argmax(1)
        agreement = (quantized(x[:64]).argmax(1) == wanted).float().mean().item()
        # The graph of the product's own is timed as any: captured around the layers.
        forward = type(quantized).forward.__get__(quantized)
        graphs = {"qtool": graph_of(forward, x)}
        for name, module in made.items():
            started = time.perf_counter()
            try:
                torch._dynamo.reset()
                graphs[name] = graph_of(module, x.bfloat16())
            except Exception as error:  # a peer that fails is a line of the report
                record["failed"][f"{name}, batch {batch}"] = str(error)[:300]
                print(f"{name}: {type(error).__name__} {str(error)[:200]}")
            print(f"{name}: ready after {time.perf_counter() - started:.0f} s", flush=True)
        samples = take_turns(graphs, options.rounds)
        middle = {name: statistics.median(times) for name, times in samples.items()}
        halves = [ms for name, ms in middle.items() if name.startswith("bfloat16")]
        best = min(halves, default=float("nan"))
        print(f"\n| batch {batch} | ms | best bfloat16 / this |\n| --- | --- | --- |")
        for name, ms in middle.items():
            print(f"| {name} | {ms:.3f} | {best / ms:.2f} |")
        record["batches"][str(batch)] = {
            "ms": {n: [round(min(t), 4), round(middle[n], 4)] for n, t in samples.items()},
            "same_top1_as_reference": agreement,
        }
        if batch == 1:
            cold = {
                name: float(triton.testing.do_bench(graph.replay, return_mode="median"))
                for name, graph in graphs.items()
            }
            record["batches"]["1"]["cold_ms"] = {n: round(ms, 4) for n, ms in cold.items()}
            print("cold: " + ", ".join(f"{name} {ms:.3f}" for name, ms in cold.items()))
        keep()
        del graphs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
