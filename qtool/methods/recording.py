"""A computation on a GPU that is recorded once and from then on launched as a whole.

A small network keeps the processor busier with launching kernels than the GPU with running them.
A CUDA graph launches all kernels of a step at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3

_log = logging.getLogger(__name__)


class Recorded:
    """A function of tensors that is replayed from its fourth call on.

    It must launch the same kernels for all inputs of one shape and read nothing back. What it
    leaves elsewhere, gradients for instance, stays where the recording has put it. If it cannot be
    recorded it is called as it is.

    Args:
        function: What to run.
        active: Whether to record at all; on a CPU there is nothing to gain.
    """

    def __init__(self, function: Callable[..., Any], *, active: bool) -> None:
        self.function, self.active = function, active
        self._forget()

    def _forget(self) -> None:
        self._calls = 0
        self._shapes: list[torch.Size] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: Any = None

    @property
    def replays(self) -> bool:
        """Whether the last call was a replay."""
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Any:  # noqa: ANN401
        """Run; results of a replay are overwritten by the next one."""
        if not self.active:
            return self.function(*inputs)
        shapes = [x.shape for x in inputs]
        if shapes != self._shapes:
            self._forget()
            self._shapes = shapes
        self._calls += 1
        if self._calls > _WARM_UP and self._graph is None:
            self._record(inputs)
        if self._graph is None:
            return self.function(*inputs)
        for kept, x in zip(self._inputs, inputs, strict=True):
            kept.copy_(x)
        self._graph.replay()
        return self._outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        graph = torch.cuda.CUDAGraph()
        kept = [x.clone() for x in inputs]
        try:
            with torch.cuda.graph(graph):
                outputs = self.function(*kept)
        except RuntimeError as error:
            _log.info("steps are not replayed as a CUDA graph: %s", error)
            self.active = False
            return
        self._graph, self._inputs, self._outputs = graph, kept, outputs
