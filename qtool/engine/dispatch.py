"""Which backend runs an operation: the user's choice, what the machine has, a record of what ran.

`auto` takes the fast version for the device of the tensors where its conditions hold and the
reference elsewhere. A backend named explicitly runs or the call fails with a `BackendError`; it is
never replaced quietly.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import BackendError, UsageError

BACKENDS = ("auto", "reference", "cpu", "triton")
ENVIRONMENT_VARIABLE = "QTOOL_BACKEND"
INTEGER_PRODUCTS = frozenset({"linear", "linear_nested", "linear_quantize", "matmul"})
MIN_CAPABILITY = (8, 0)

# Triton takes these words for yes, and reads them when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "y", "yes", "on", "true"}
_KERNEL_FILES = {
    "conv2d_quantize": "conv2d",
    "layer_norm_quantize": "layer_norm",
    "linear_quantize": "linear",
    "quantize_table": "quantize_uniform",
}
_CPU_FILES = {
    "attention": "attention",
    "conv2d": "conv2d",
    "conv2d_quantize": "conv2d",
    "linear": "linear",
    "linear_nested": "linear",
    "linear_quantize": "linear",
    "matmul": "attention",
    "matmul_log2": "attention",
    "pack_codes": "packing",
    "unpack_codes": "packing",
}


class Decision(NamedTuple):
    """What ran an operation, and why."""

    op: str
    backend: str
    reason: str


WHOLE_BLOCK = Decision("transformer_block", "cpu", "compiled passes")

_default: str | None = None
_override: ContextVar[str | None] = ContextVar("qtool_backend", default=None)
_traces: ContextVar[tuple[list[Decision], ...]] = ContextVar("qtool_traces", default=())
_decisions: dict[Decision, None] = {}


def available() -> dict[str, str]:
    """Maps each backend to "" if this machine has it, else to the reason why not."""
    return {"auto": "", "reference": "", "cpu": "", "triton": _triton_absence()}


def set_backend(name: str) -> None:
    """Sets the backend of the whole process; `auto` is the default.

    Raises:
        UsageError: There is no such backend.
        BackendError: This machine does not have it.
    """
    global _default
    _default = _checked(name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets the backend inside a `with` block, for the current thread or task only.

    Raises:
        UsageError: There is no such backend.
        BackendError: This machine does not have it.
    """
    token = _override.set(_checked(name))
    try:
        yield
    finally:
        _override.reset(token)


def current() -> str:
    """The backend asked for by `use_backend`, `set_backend` or QTOOL_BACKEND, in this order."""
    global _default
    override = _override.get()
    if override is not None:
        return override
    if _default is None:
        _default = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)
    return _default


def explain() -> list[Decision]:
    """The distinct decisions of this process so far, in the order in which they first came."""
    return list(_decisions)


@contextlib.contextmanager
def trace() -> Iterator[list[Decision]]:
    """Yields a list that collects every decision of the current thread while the block runs."""
    decisions: list[Decision] = []
    token = _traces.set((*_traces.get(), decisions))
    try:
        yield decisions
    finally:
        _traces.reset(token)


def is_traced() -> bool:
    """Whether a `trace` of the current thread or task wants every decision."""
    return bool(_traces.get())


def choose(op: str, device: torch.device, *, limit: str = "") -> Callable[..., Tensor]:
    """Decides which version of `op` runs on tensors of `device`, and records the decision.

    Args:
        op: Name of the operation, which is also the name of the function in each backend's module.
        device: Where the tensors are.
        limit: Why the fast versions cannot run these shapes, "" if they can.

    Raises:
        BackendError: The backend asked for cannot run `op` on these tensors.
    """
    backend = current()
    if backend == "auto":
        backend, reason = _automatic(op, device, limit)
    elif refusal := _refusal(op, backend, device, limit):
        raise BackendError(
            f"the {backend} backend cannot run {op}: {refusal}",
            remedy=f"choose {_alternatives(op, device, limit)}",
        )
    else:
        reason = "asked for"
    _record(Decision(op, backend, reason))
    return _load(op, backend)


def takes_triton(device: torch.device) -> bool:
    """Whether what is no operation of its own, but has a kernel, runs it on tensors of a device."""
    backend = current()
    wanted = backend == "triton" or (backend == "auto" and device.type == "cuda")
    return wanted and not _refusal("", "triton", device, "")


def runs_whole_blocks(device: torch.device) -> bool:
    """Whether a transformer block runs as one program of the CPU backend, and records it if so."""
    if device.type != "cpu" or current() not in ("auto", "cpu") or torch.compiler.is_compiling():
        return False
    if _cpu_runs_whole_blocks():
        _record(WHOLE_BLOCK)
        return True
    return False


@functools.cache
def _cpu_runs_whole_blocks() -> bool:
    exact = importlib.import_module("qtool.engine.cpu.exact")
    native = importlib.import_module("qtool.engine.cpu.native")
    right = not exact.has_int8_units() or exact.int8_product_is_exact()
    return bool(right and native.multiplies_codes())


def _record(decision: Decision) -> None:
    _decisions.setdefault(decision)
    for decisions in _traces.get():
        decisions.append(decision)


def _automatic(op: str, device: torch.device, limit: str) -> tuple[str, str]:
    """The backend that `auto` takes, and the reason."""
    fast = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if fast is None:
        return "reference", f"no fast version for tensors on {device.type}"
    refusal = _refusal(op, fast, device, limit)
    return ("reference", refusal) if refusal else (fast, f"tensors on {device.type}")


def _refusal(op: str, backend: str, device: torch.device, limit: str) -> str:
    """Why `backend` cannot run `op` here, "" if it can."""
    if backend == "reference":
        return ""
    if limit:
        return limit
    if backend == "cpu":
        if device.type != "cpu":
            return f"the tensors are on {device.type}"
        if op in INTEGER_PRODUCTS and not _cpu_product_is_exact():
            return "this CPU's int8 products saturate (no VNNI)"
        return ""
    if absence := _triton_absence():
        return absence
    if INTERPRETED:
        return "" if device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels on the CPU"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if _capability(device.index) < MIN_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return ""


def _alternatives(op: str, device: torch.device, limit: str) -> str:
    """The backends that can run `op` here, as words."""
    able = [name for name in BACKENDS[1:] if not _refusal(op, name, device, limit)]
    return " or ".join(["auto", *able])


def _checked(name: str, source: str = "backend") -> str:
    """Returns `name` if it is a backend that this machine has."""
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, n=1) or BACKENDS
        raise UsageError(f"{source}: there is no '{name}'", remedy=f"choose {' or '.join(near)}")
    if absence := available()[name]:
        able = " or ".join(other for other, reason in available().items() if not reason)
        raise BackendError(f"{source}: no {name} here, {absence}", remedy=f"choose {able}")
    return name


@functools.cache
def _triton_absence() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED or torch.cuda.is_available():
        return ""
    return "no CUDA device was found"


def _cpu_product_is_exact() -> bool:
    return bool(importlib.import_module("qtool.engine.cpu.exact").int8_product_is_exact())


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _load(op: str, backend: str) -> Callable[..., Tensor]:
    """The function of a backend; a Triton file is imported only here, once it has been chosen."""
    module = {
        "triton": f"kernels.{_KERNEL_FILES.get(op, op)}",
        "cpu": f"cpu.{_CPU_FILES.get(op, 'codes')}",
    }.get(backend, backend)
    function: Callable[..., Tensor] = getattr(importlib.import_module(f"qtool.engine.{module}"), op)
    return function
