"""Timings beside the float model, with what they were taken on."""

from pathlib import Path

import torch

from qtool.api import evaluate as evaluate_api
from qtool.api import latency
from qtool.io import checkpoint
from qtool.settings.evaluate import EvaluateSettings

OUT = Path("q.safetensors")


def test_latency_names_backends_and_compares_with_float(quantize, demo, monkeypatch):
    quantize(demo, out=OUT, bits="w3a4")
    monkeypatch.setattr(latency, "_ROUNDS", 2)
    monkeypatch.setattr(latency, "bfloat16_is_faster", lambda device: True)
    options = {"count": 4, "latency": True, "batch_size": 2, "backend": "reference"}
    result = evaluate_api.evaluate(
        EvaluateSettings.build({"target": str(OUT), "device": "cpu", **options})
    )
    timings = result.summary["latency"]
    assert [(row["model"], row["batch"]) for row in timings] == [
        (name, batch) for batch in (1, 2) for name in ("float32", "bfloat16", "w3a4")
    ]
    layers = checkpoint.read_header(OUT).layers
    for row in timings:
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["float32_over_this"] > 0
        assert row["backend"] == (
            f"reference x{len(layers)}" if row["model"] == "w3a4" else "torch"
        )
    assert [row["float32_over_this"] for row in timings if row["model"] == "float32"] == [1.0, 1.0]
    assert result.summary["threads"] == torch.get_num_threads()


def test_the_title_says_what_the_times_were_taken_on(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert "on 3 CPU threads," in latency.table([], torch.device("cpu")).title
    assert "on cuda:1 and 3 CPU threads," in latency.table([], torch.device("cuda:1")).title
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "on 1 CPU thread," in latency.table([], torch.device("cpu")).title
