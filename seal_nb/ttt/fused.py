"""Elementwise parts of a decoder in one kernel each: norms, rotary embedding, gated activation, loss.

torch.compile makes the kernels out of the model's own code, so each family keeps its own arithmetic; what is
kept between two steps stays in float32, where the separate kernels round. A call of a compiled region costs
the host more than the separate kernels do (0.17 ms against 0.09 ms for a norm, see benchmarks/gpu_log.md), so
the regions are used only inside `fused()`: in passes that are captured once and replayed."""

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ROTARY = "apply_rotary_pos_emb"
_active = ContextVar("_active", default=False)


@contextmanager
def fused() -> Iterator[None]:
    """Use the compiled regions, where the device has a compiler for them."""
    token = _active.set(_compiles())
    try:
        yield
    finally:
        _active.reset(token)


def region(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, compiled while `fused()` is on."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        # At the first call: importing the compiler takes seconds, and a CPU never needs it.
        return torch.compile(plain, dynamic=True)

    @functools.wraps(plain)
    def switched(*args: Any, **kwargs: Any) -> Any:
        return (compiled() if _active.get() else plain)(*args, **kwargs)

    switched.is_region = True  # type: ignore[attr-defined]
    return switched


def make_regions(model: nn.Module) -> None:
    """Turn the model's norms, gated activations and rotary embedding into regions."""
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_class_region(kind), module)
        elif _is_gated(module):
            module.forward = functools.partial(_gated_mlp, module)
        code = sys.modules[kind.__module__]
        rotary = getattr(code, ROTARY, None)
        if rotary is not None and not hasattr(rotary, "is_region"):
            setattr(code, ROTARY, region(rotary))


@functools.cache
def _class_region(kind: Any) -> Callable[..., Any]:
    return region(kind.forward)


def _is_gated(module: nn.Module) -> bool:
    """Whether forward is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`: its code names these four only."""
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    return set(names) == GATED


def _gated_mlp(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_gate(module.act_fn, module.gate_proj(x), module.up_proj(x)))


@region
def _gate(act: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return act(gate) * up


@functools.cache
def _compiles() -> bool:
    """Whether torch.compile works on this GPU: it needs Triton and a C compiler."""
    try:
        ones = torch.ones(8, device="cuda")
        return bool(torch.compile(lambda x: x * 2 + 1)(ones).sum() == 24)
    except Exception as error:  # noqa: BLE001  # whatever is missing, the separate kernels do the same
        log.warning("torch.compile does not work here, so elementwise kernels stay separate: %s", error)
        return False
