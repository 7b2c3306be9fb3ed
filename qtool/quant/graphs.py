"""Forward passes replayed from CUDA graphs: the time of the GPU without that of Python.

A quantized transformer launches some hundred short kernels. Launched one by one from Python they
take longer than they run, up to large batches; a graph launches them all at once.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.engine import dispatch
from qtool.engine.resident import versions_of
from qtool.quant.fusion import hooks_inside

MOST_GRAPHS = 4
"""Graphs kept for a model; each holds memory for the activations of its shape."""


class _Graph(NamedTuple):
    """A captured pass: what it reads, what it writes, and when its last replay was done."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    done: torch.cuda.Event


class GraphedForward:
    """Takes the place of `model.forward` and replays it on a GPU, with the same result.

    The first call with some shape of input runs layer by layer, the second is captured, later ones
    are replayed. Calls with hooks inside, gradients, other arguments, or while backends are traced
    always run layer by layer, and so do all calls of a model that cannot be captured. What is
    written to the model's tensors is noticed.

    Args:
        model: A model in evaluation mode that takes one tensor and returns one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._state: tuple[list[Tensor], tuple[int, ...] | None] | None = None
        self._hooks: list[dict[int, Any]] | None = None
        self._refused = False

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        """A copy of a model captures graphs of its own."""
        copied = memo.get(id(self._model))
        return GraphedForward(self._model if copied is None else copied)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """So does one that was stored."""
        return GraphedForward, (self._model,)

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """The model's forward pass."""
        if arguments or options or not self._possible(x):
            return self._run(x, *arguments, **options)
        key = (x.shape, x.stride(), x.dtype, x.device, dispatch.current())
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._forget_if_changed()
            if key not in self._graphs:
                self._remember(key, None)
                return self._run(x)
            graph = self._graphs[key]
            if graph is None:
                try:
                    graph = self._captured(x)
                except RuntimeError:  # something inside waits for the GPU, or memory is short
                    self._refused = True
                    return self._run(x)
                self._remember(key, graph)
            self._graphs.move_to_end(key)
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(graph.done)
            graph.x.copy_(x)
            graph.graph.replay()
            y = graph.y.clone()
            graph.done.record(stream)
            return y

    def _run(self, x: Tensor, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        return type(self._model).forward(self._model, x, *arguments, **options)

    def _possible(self, x: Tensor) -> bool:
        """Whether a replay would do what a call does."""
        return (
            not self._refused
            and isinstance(x, Tensor)
            and x.device.type == "cuda"
            and not (torch.is_grad_enabled() and x.requires_grad)
            and dispatch.current() in ("auto", "triton")
            and not dispatch.is_traced()
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
            and not self._model.training
            and not self._watched()
        )

    def _watched(self) -> bool:
        """Whether someone wants to see what a layer inside takes or returns."""
        if self._hooks is None:
            self._hooks = hooks_inside(self._model)
        return any(self._hooks)

    def _forget_if_changed(self) -> None:
        """Drop the graphs if a tensor of the model was written to, exchanged or moved."""
        if self._state is not None and self._state[1] == versions_of(self._state[0]):
            return
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self._state = (tensors, versions_of(tensors))
        self._graphs.clear()

    def _remember(self, key: Hashable, graph: _Graph | None) -> None:
        self._graphs[key] = graph
        while len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)

    def _captured(self, x: Tensor) -> _Graph:
        """The pass on inputs like `x`."""
        with torch.cuda.device(x.device):
            static, stream = torch.empty_like(x).copy_(x), torch.cuda.Stream(x.device)
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):  # whatever is worked out once is worked out now
                self._run(static)
            torch.cuda.current_stream(x.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = self._run(static)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(x.device))
        return _Graph(graph, static, y, done)


def replay(model: nn.Module) -> None:
    """Let a model's passes on a GPU replay from graphs, in place.

    Args:
        model: A model in evaluation mode that takes one tensor and returns one.
    """
    model.forward = GraphedForward(model)
