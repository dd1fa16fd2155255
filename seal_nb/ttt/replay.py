"""Launching a pass of a thousand small kernels as one: CUDA graphs, recorded and replayed.

The function must work in place on the same tensors each time and read nothing back."""

import contextlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)
EAGER_CALLS = 2  # the first calls also load kernels and fill caches, which a recording must not do
FAILURES_LEFT = 3

# (function, the graph before or None) → a graph with `replay()`, and the tensor that each replay fills anew
Record = Callable[[Callable[[], torch.Tensor], Any], tuple[Any, torch.Tensor]]


class Replay:
    """Calls `function`; records its third call after each `renew` and replays the recording from then on.

    record: None calls the function each time. A recording that fails leaves the calls up to the next `renew`
    as they were; three failures end the attempts."""

    def __init__(self, function: Callable[[], torch.Tensor], record: Record | None):
        self.function, self.record, self.failures_left = function, record, FAILURES_LEFT
        self.clear()

    def clear(self) -> None:
        """As `renew`, and let go of the recording's memory, which the next one would take over."""
        self.graph: Any = None
        self.renew()

    def renew(self) -> None:
        """The tensors are other ones from now on."""
        self.result: torch.Tensor | None = None
        self.n_calls = 0

    def __call__(self) -> torch.Tensor:
        if self.n_calls == EAGER_CALLS and self.record is not None and self.failures_left:
            try:
                self.graph, self.result = self.record(self.function, self.graph)
            except torch.OutOfMemoryError:
                raise  # says nothing about what can be recorded
            except RuntimeError as error:
                self.failures_left -= 1
                log.warning("decoding goes on without a CUDA graph: %s", error)
        self.n_calls += 1
        if self.result is None:
            return self.function()
        self.graph.replay()
        return self.result


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all recordings, since cuBLAS keeps a workspace for each stream


def cuda_graph(
    function: Callable[[], torch.Tensor], before: "torch.cuda.CUDAGraph | None"
) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
    """Record without torch.cuda.graph, which first waits for the device and gives back all cached memory."""
    graph, side = torch.cuda.CUDAGraph(), _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(before.pool() if before else None, capture_error_mode="thread_local")
        try:
            result = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the first error says more
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph, result
