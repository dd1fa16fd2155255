"""Differences between a CPU and a GPU: copies that do not wait, running out of memory, CUDA graphs, compiled code."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.cuda import CUDAGraph

from seal_nb.errors import SettingsError

# In the text of a RuntimeError: of a CPU's allocator, of pinned memory, of cuBLAS. A GPU's allocator has its own class.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what must not be rounded to half precision."""
    return torch.promote_types(torch.float32, dtype)


def pinned(t: Tensor, device: torch.device) -> Tensor:
    """A host tensor in pinned memory, so that its copy to a GPU does not wait."""
    return t.pin_memory() if device.type == "cuda" and t.numel() else t


def sent(t: Tensor, device: torch.device) -> Tensor:
    """A host tensor, copied to the device without waiting for it."""
    return pinned(t, device).to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """A tensor of these values, copied to the device without waiting for it."""
    return sent(torch.tensor(values, dtype=dtype), device)


class Readback:
    """A small tensor that is copied to the host. Reading it waits only for the work queued before the copy."""

    def __init__(self, t: Tensor):
        self.host = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        self.host.copy_(t, non_blocking=True)
        self.copied = torch.cuda.Event() if t.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    @property
    def ready(self) -> bool:
        return self.copied is None or self.copied.query()

    def tolist(self) -> list[Any]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.tolist()


def free_cached_memory(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # torch 2.11 refuses after a capture that failed
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    by_text = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    return by_text or isinstance(error, MemoryError | torch.OutOfMemoryError)


def error_text(error: Exception, place: str) -> str:
    """What is reported of the error of a job. place: where memory ran out, if it did, and the remedy"""
    if is_out_of_memory(error):
        return f"out of memory {place}"
    with contextlib.suppress(Exception):  # some exceptions cannot be turned into text
        return str(error) if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
    return type(error).__name__


class Limit:
    """How much is done at a time. It is lowered when memory runs out, and doubled again, up to its first value, after
    enough work. make_room: frees memory that is cached"""

    def __init__(self, size: int, work_to_recover: float, make_room: Callable[[], object] = lambda: None):
        self.now = self.most = size
        self.work_to_recover, self.work, self.make_room = work_to_recover, 0.0, make_room

    def attempt(self, call: Callable[[], object], lower_to: float = math.inf, *, work: float = 1) -> Exception | None:
        """The error of `call`; None if it does its work. If memory ran out, there is room now, and the limit is lower.
        Raises torch.AcceleratorError, after which nothing runs on the device."""
        try:
            call()
        except Exception as error:
            if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
                raise
            if is_out_of_memory(error.with_traceback(None)):  # without its frames, which hold the tensors of the call
                self.make_room()
                self.lower(lower_to)
            return error
        self.worked(work)
        return None

    def lower(self, size: float) -> None:
        self.now, self.work = max(1, int(min(self.now, size))), 0.0

    def worked(self, amount: float = 1.0) -> None:
        self.work += amount
        if self.work >= self.work_to_recover:
            self.now, self.work = min(2 * self.now, self.most), 0.0


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively. Of CUDA cards, these also have flash attention."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has it, else float16 on CUDA (T4, V100) and float32 on a CPU."""
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch.nn.attention.varlen works: half precision, flash attention, heads of 8, 16 … 256."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return device.type == "cuda" and fits and has_bfloat16(device)


# One stream for all recordings, since cuBLAS keeps a workspace for each stream.
_side_stream = functools.cache(torch.cuda.Stream)


def cuda_graph(function: Callable[[], Tensor], before: CUDAGraph | None) -> tuple[CUDAGraph, Tensor]:
    """Record `function` as a CUDA graph that shares the memory of the graph `before`; return it and its output.
    torch.cuda.graph would first wait for the device and give back all cached memory. The function must work in place on
    the same tensors each time and read nothing back."""
    graph, side = CUDAGraph(), _side_stream()
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


# A call of a compiled region costs the host more than the separate kernels do (0.17 ms against 0.09 ms for a norm, see
# benchmarks/gpu_log.md), so regions are compiled only in passes that are captured once and replayed.
_fused = ContextVar("_fused", default=False)


@contextlib.contextmanager
def fused(device: torch.device) -> Iterator[None]:
    """Use compiled regions, but not on a CPU. They need Triton and a C compiler, as the kernels do."""
    token = _fused.set(device.type != "cpu")
    try:
        yield
    finally:
        _fused.reset(token)


@functools.cache
def region(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, which is compiled to one kernel while `fused()` is on. The same function is compiled once."""
    # Compiled late: importing the compiler takes seconds, and a CPU never needs it.
    compiled = functools.cache(lambda: torch.compile(plain, dynamic=True))

    @functools.wraps(plain)
    def switched(*args: Any, **kwargs: Any) -> Any:
        return (compiled() if _fused.get() else plain)(*args, **kwargs)

    switched.is_region = True  # type: ignore[attr-defined]
    return switched
