"""What differs between devices: copies that do not wait, memory that ran out, kernels that exist."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

TILE = 32  # tokens that a kernel of the branches takes at a time


def pinned(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor as a copy to the device wants it: in pinned memory, so that the copy does not wait."""
    return t.pin_memory() if device.type == "cuda" and t.numel() else t


def sent(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor, copied to the device without waiting for it."""
    return pinned(t, device).to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these values, copied without waiting for the device."""
    return sent(torch.tensor(values, dtype=dtype), device)


def free_cached_memory(device: torch.device) -> None:
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # torch 2.11 refuses after a capture that failed
            torch.cuda.empty_cache()


def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch.nn.attention.varlen works: half precision, compute capability 8.0 or above, heads of at
    most 256 in steps of 8."""
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    fits = head_size % 8 == 0 and head_size <= 256
    return half and fits and torch.cuda.get_device_capability(device) >= (8, 0)


class Readback:
    """A small tensor on its way to the host. The copy is queued behind what made the tensor, so reading it
    does not wait for what is queued later."""

    def __init__(self, t: torch.Tensor):
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
