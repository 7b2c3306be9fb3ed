"""Which backend runs: automatic, explicit, from the environment; and what is said about it."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading

import pytest
import torch

from qtool.engine import dispatch, ops
from qtool.engine.contracts import OPERATIONS
from qtool.errors import BackendError, UsageError

X = torch.linspace(0, 1, 12).view(3, 4)
ONE = torch.ones(1)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a machine without")


def quantize(x=X):
    return ops.quantize_log2(x, ONE.to(x.device), bits=4)


def test_auto_takes_the_cpu_version_for_cpu_tensors():
    with dispatch.trace() as decisions:
        quantize()
    assert decisions == [dispatch.Decision("quantize_log2", "cpu", "tensors on cpu")]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_asked_for_runs(backend):
    with dispatch.use_backend(backend), dispatch.trace() as decisions:
        quantize()
    assert decisions == [("quantize_log2", backend, "asked for")]


def test_devices_without_a_fast_version_get_the_reference():
    function = dispatch.choose("linear", torch.device("xpu"))
    assert function.__module__ == "qtool.engine.reference"
    assert dispatch.explain() == [("linear", "reference", "no fast version for tensors on xpu")]


def test_the_cpu_backend_refuses_tensors_elsewhere():
    with (
        dispatch.use_backend("cpu"),
        pytest.raises(
            BackendError, match=r"the cpu backend cannot run linear: .* on cuda"
        ) as caught,
    ):
        dispatch.choose("linear", torch.device("cuda", 0), limit="")
    assert caught.value.remedy.startswith("choose auto or reference")
    assert dispatch.explain() == []


@without_cuda
def test_interpreted_kernels_never_touch_gpu_tensors():
    dispatch.choose("linear", torch.device("cuda", 0))
    reason = "TRITON_INTERPRET=1 runs kernels on the CPU"
    assert dispatch.explain() == [("linear", "reference", reason)]


def test_without_an_interpreter_triton_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dispatch._triton_absence.cache_clear()
    assert dispatch.available()["triton"] == "no CUDA device was found"
    with pytest.raises(BackendError, match="no triton here, no CUDA device was found") as caught:
        dispatch.set_backend("triton")
    assert caught.value.remedy == "choose auto or reference or cpu"
    dispatch._triton_absence.cache_clear()


def test_a_gpu_older_than_the_kernels_gets_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_triton_absence", lambda: "")
    monkeypatch.setattr(dispatch, "_capability", lambda index: (7, 5))
    dispatch.choose("linear", torch.device("cuda", 0))
    reason = "the GPU is older than compute capability 8.0"
    assert dispatch.explain() == [("linear", "reference", reason)]


def test_without_triton_it_is_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    dispatch._triton_absence.cache_clear()
    assert dispatch.available() == {
        "auto": "",
        "reference": "",
        "cpu": "",
        "triton": "Triton is not installed",
    }
    dispatch._triton_absence.cache_clear()


def test_every_operation_has_a_version_on_every_backend():
    pytest.importorskip("triton", reason="Triton is not installed here")
    for op in OPERATIONS:
        for backend in ("reference", "cpu", "triton"):
            function = dispatch._load(op, backend)
            assert function.__name__ == op
            names = list(inspect.signature(function).parameters)
            assert names == list(inspect.signature(dispatch._load(op, "reference")).parameters)


def test_set_backend_holds_until_it_is_set_again():
    dispatch.set_backend("reference")
    assert dispatch.current() == "reference"
    with dispatch.use_backend("cpu"):
        assert dispatch.current() == "cpu"
    assert dispatch.current() == "reference"
    dispatch.set_backend("auto")
    assert dispatch.current() == "auto"


@pytest.mark.parametrize(
    "choose", [dispatch.set_backend, lambda name: dispatch.use_backend(name).__enter__()]
)
def test_an_unknown_backend_is_refused_with_the_nearest_name(choose):
    with pytest.raises(UsageError, match="there is no 'tritn'") as caught:
        choose("tritn")
    assert caught.value.remedy == "choose triton"
    with pytest.raises(UsageError) as caught:
        choose("fast")
    assert caught.value.remedy == "choose auto or reference or cpu or triton"


def test_the_environment_sets_the_first_default(monkeypatch):
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    assert dispatch.current() == "reference"
    monkeypatch.setenv("QTOOL_BACKEND", "cpu")
    assert dispatch.current() == "reference"


def test_a_wrong_environment_is_named(monkeypatch):
    monkeypatch.setenv("QTOOL_BACKEND", "gpu")
    with pytest.raises(UsageError, match="QTOOL_BACKEND: there is no 'gpu'"):
        quantize()


def test_explain_lists_each_decision_once():
    for _ in range(3):
        quantize()
    with dispatch.use_backend("reference"):
        quantize()
    assert dispatch.explain() == [
        ("quantize_log2", "cpu", "tensors on cpu"),
        ("quantize_log2", "reference", "asked for"),
    ]


def test_traces_nest_and_end():
    with dispatch.trace() as outer:
        quantize()
        with dispatch.trace() as inner:
            quantize()
        quantize()
    quantize()
    assert (len(outer), len(inner)) == (3, 1)


def test_a_choice_and_a_trace_stay_in_their_thread():
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        with dispatch.trace() as decisions:
            quantize()
        seen["backend"] = dispatch.current()
        seen["decisions"] = decisions
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with dispatch.use_backend("reference"), dispatch.trace() as decisions:
        inside.set()
        assert done.wait(10)
    thread.join()
    assert seen == {
        "backend": "auto",
        "decisions": [("quantize_log2", "cpu", "tensors on cpu")],
    }
    assert decisions == []


def test_importing_the_operations_starts_neither_triton_nor_cuda(repository):
    code = (
        "import sys, torch; from qtool.engine import ops;"
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]
