"""A device that computes nothing, for checks of the CUDA path on a machine without a GPU.

Its tensors have shapes, dtypes and strides, but no values; tensors of the host are real. "cuda" needs a CUDA build of
torch (`make cuda-check`); "meta" works in any environment, but passes are as on CUDA. Whatever needs a driver or a GPU
is replaced in `fake_device` and nowhere else. A `FakeDevice` counts what would run, and refuses what would fail.
"""

import contextlib
import gc
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from seal_nb.ttt import attention, base, branches, decode, passes, trainer
from seal_nb.ttt.base import FrozenBase

# Without a kernel, although they have outputs that are no views.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
# The sizes of their outputs are values on the device.
WAITING = {"nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "bincount", "_assert_async"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear"}
GIB, TILE = 2**30, 32


@dataclass
class Counts:
    """What a stretch of work did."""

    operations: Counter[str] = field(default_factory=Counter)  # that would launch kernels, by name
    waits: list[str] = field(default_factory=list)  # of the host for all queued work, with their lines
    event_waits: int = 0  # of the host for earlier work
    copies: Counter[str] = field(default_factory=Counter)  # "to device", "to host"
    replays: int = 0  # of recorded CUDA graphs
    product_dtypes: set[torch.dtype] = field(default_factory=set)
    branch_tokens: int = 0  # of the members of all groups
    tile_tokens: int = 0  # the same with those that fill up tiles
    peak_bytes: int = 0

    @property
    def n(self) -> int:
        return self.operations.total()


class FakeDevice(TorchDispatchMode):
    """Runs operations of the device without computing and host operations as they are, and counts."""

    def __init__(self, name: str):
        super().__init__()
        self.device = torch.device(name)
        self.fake: Any = FakeTensorMode(allow_non_fake_inputs=True) if name == "cuda" else contextlib.nullcontext()
        self.counts, self.live_bytes = Counts(), 0
        self.hidden = 0  # depth of stretches that count as one operation
        self.recording = False  # a CUDA graph
        self.storages: dict[int, Any] = {}

    def count(self) -> Counts:
        """Count anew; returns the new counts, which grow."""
        self.counts = Counts(peak_bytes=self.live_bytes)
        return self.counts

    def has(self, t: object) -> bool:
        return isinstance(t, Tensor) and t.device.type == self.device.type

    @contextlib.contextmanager
    def one_operation(self, name: str) -> Iterator[None]:
        """Whatever happens inside is one kernel."""
        self._launch(name)
        self.hidden += 1
        try:
            yield
        finally:
            self.hidden -= 1

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        assert not self.recording, f"{why} while a CUDA graph is recorded, {_line()}"
        self.counts.waits.append(f"{_line()} {why}")

    def _launch(self, name: str) -> None:
        if not self.hidden:
            self.counts.operations[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return args[0].device
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in inputs if self.has(t)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not here and target != self.device.type:
            return _on_the_host(func, args, kwargs)
        from_host = [t for t in inputs if not self.has(t) and t.dim()]
        if name == "_local_scalar_dense":
            self.wait("reads a value")
            return 1
        if name == "_to_copy" and here and target not in (None, self.device.type):
            self.wait("copies to the host")
            self.counts.copies["to host"] += 1
            return torch.ones(here[0].shape, dtype=kwargs.get("dtype") or here[0].dtype)
        if name == "copy_" and not self.has(args[0]):
            self._check_async(args[0], kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            self.counts.copies["to host"] += 1
            return args[0].fill_(1)
        if from_host and name in ("_to_copy", "copy_"):
            (source,) = from_host
            self._check_async(source, kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            assert not self.recording, f"copies from the host while a CUDA graph is recorded, {_line()}"
            self.counts.copies["to device"] += 1
        elif from_host:
            raise AssertionError(f"{name} mixes tensors of the host and the device, {_line()}")
        if name in WAITING or (name.startswith("index") and any(t.dtype == torch.bool for t in inputs[1:])):
            self.wait(f"{name} has a size that only the device knows")
            raise AssertionError(self.counts.waits[-1])
        self._check(name, args)
        if not (func.is_view or name in FREE):
            self._launch(name)
        with self.fake:
            out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if self.has(t):
                self._remember(t)
        return out

    def _check_async(self, host: Tensor, non_blocking: bool) -> None:
        if host.numel() and self.device.type == "cuda" and not (non_blocking and getattr(host, "was_pinned", False)):
            self.wait("copies between host and device and waits for it")

    def _check(self, name: str, args: Sequence[Any]) -> None:
        """What fake tensors take and CUDA does not."""
        tensors = [t for t in args if isinstance(t, Tensor)]
        if name in PRODUCTS:
            self.counts.product_dtypes |= {t.dtype for t in tensors}
        if name.startswith("_varlen_attn") and "backward" not in name:
            q, k, v, *ends = tensors
            assert {t.dtype for t in (q, k, v)} <= {torch.bfloat16, torch.float16}
            assert all(t.stride(-1) == 1 and t.dim() == 3 for t in (q, k, v))
            assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape and q.shape[-1] == k.shape[-1]
            assert len(ends) == 2 and all(t.dtype == torch.int32 and t.is_contiguous() for t in ends)
            assert len(ends[0]) == len(ends[1]), "as many rows of queries as of keys"

    def _remember(self, t: Tensor) -> None:
        if self.hidden:  # a kernel has no intermediate tensors
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.live_bytes += storage.nbytes()
            self.counts.peak_bytes = max(self.counts.peak_bytes, self.live_bytes)
            self.storages[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())
            self.storages[key].atexit = False

    def _forget(self, key: int, n_bytes: int) -> None:
        del self.storages[key]
        self.live_bytes -= n_bytes


def _on_the_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    pinned = kwargs.pop("pin_memory", False)  # needs a driver
    out = func(*args, **kwargs)
    return _pin(out) if pinned else out


def _pin(t: Tensor) -> Tensor:
    t.was_pinned = True  # type: ignore[attr-defined]
    return t


def _line() -> str:
    """The innermost line of the package that is running."""
    frames = [f for f in traceback.extract_stack() if "/seal_nb/" in f.filename]
    return f"{frames[-1].filename.rsplit('/seal_nb/')[-1]}:{frames[-1].lineno}" if frames else "outside the package"


class FakeKernels:
    """In the place of `seal_nb.ttt.kernels`: checks what the Triton kernels expect of their arguments."""

    def __init__(self, watch: FakeDevice, real: Any):
        self.watch, self.real = watch, real

    def works(self, dtype: torch.dtype) -> bool:
        return True

    def fits(self, rank: int, itemsize: int) -> bool:
        return self.real is None or self.real.fits(rank, itemsize)

    def tiles_of(self, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
        self.watch.counts.branch_tokens += sum(lengths)
        self.watch.counts.tile_tokens += sum(-(-n // TILE) * TILE for n in lengths)
        if self.real is not None:
            return self.real.tiles_of(lengths)
        return [(0, 0, 0)] * (-(-sum(lengths) // TILE) + len(lengths))

    def narrow(self, x: Tensor, weights: Tensor, scales: Tensor, tiles: Tensor) -> Tensor:
        n, rank, wide = weights.shape
        self._rows(x, wide)
        self._tiles(tiles)
        assert scales.shape == (len(x), 1) and scales.dtype == torch.float32 and scales.is_contiguous()
        assert x.dtype == weights.dtype and n
        self._launch("narrow", x, weights, scales, tiles)
        return x.new_empty(len(x), rank)

    def widen(self, h: Tensor, weights: Tensor, y: Tensor, tiles: Tensor) -> None:
        n, rank, wide = weights.shape
        self._rows(h, rank)
        self._rows(y, wide)
        self._tiles(tiles)
        assert len(h) == len(y) and h.dtype == weights.dtype == y.dtype and n
        self._launch("widen", h, weights, y, tiles)

    def outer(self, h: Tensor, x: Tensor, out: Tensor, ends: Tensor, keep: Tensor | None) -> None:
        n, rank, wide = out.shape
        self._rows(h, rank)
        self._rows(x, wide)
        assert len(h) == len(x) and h.dtype == x.dtype and out.dtype == torch.float32
        assert ends.shape == (n,) and ends.dtype == torch.int32 and ends.is_contiguous()
        assert keep is None or (keep.shape == (n,) and keep.dtype == torch.float32 and keep.is_contiguous())
        self._launch("outer", h, x, out, ends, *([] if keep is None else [keep]))

    def _rows(self, t: Tensor, wide: int) -> None:
        assert t.dim() == 2 and t.shape[1] == wide and t.stride(1) == 1, (t.shape, t.stride(), wide)

    def _tiles(self, tiles: Tensor) -> None:
        assert tiles.dim() == 2 and tiles.shape[1] == 3 and tiles.dtype == torch.int32 and tiles.is_contiguous()

    def _launch(self, name: str, *tensors: Tensor) -> None:
        assert all(self.watch.has(t) for t in tensors), f"{name} reads memory of the host"
        self.watch._launch(name)


class Saved:
    """A tensor that a node of autograd's graph has saved."""

    def __init__(self, t: Tensor):
        self.t: Tensor | None = t


class Engine:
    """Runs backward passes node by node: torch's own engine needs a driver for tensors of CUDA. As torch's, it frees
    what a node has saved when the node has run."""

    def __init__(self) -> None:
        self.read: list[Saved] = []

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(Saved, self._unpack)

    def _unpack(self, saved: Saved) -> Tensor:
        assert saved.t is not None, "read again after it was freed"
        self.read.append(saved)
        return saved.t

    def backward(self, output: Tensor, grad: Tensor) -> None:
        """Call every node of the graph; gradients of leaves are dropped, since nothing reads them."""
        ready: dict[Any, list[Tensor | None]] = {}
        self._add(ready, output.grad_fn, output.output_nr, grad)
        with torch.no_grad():
            while ready:
                # A node made later never feeds one made earlier with a gradient, as in torch's engine.
                node = max(ready, key=lambda n: n._sequence_nr())
                inputs = ready.pop(node)
                if hasattr(node, "variable"):  # a leaf
                    continue
                self.read.clear()
                written_in_python = isinstance(node, torch.autograd.function.BackwardCFunction)
                new = node.apply(*_materialized(node, inputs)) if written_in_python else node(*inputs)
                for saved in self.read:
                    saved.t = None
                del inputs
                new = list(new) if isinstance(new, tuple) else [new]
                edges = list(node.next_functions)
                if written_in_python:
                    # Edges are those of tensors, gradients those of all arguments; tensors come first here.
                    new = new[: len(edges)]
                for (after, nr), grad in zip(edges, new, strict=True):
                    if after is not None and grad is not None:
                        self._add(ready, after, nr, grad)
                del new

    def _add(self, ready: dict[Any, list[Tensor | None]], node: Any, nr: int, grad: Tensor) -> None:
        inputs = ready.setdefault(node, [None] * len(node._input_metadata))
        before = inputs[nr]
        inputs[nr] = grad if before is None else before + grad


def _materialized(node: Any, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Zeros for missing gradients, of the right device at least."""
    device = next(grad.device for grad in grads if grad is not None)
    shapes = [(m.shape, m.dtype) for m in node._input_metadata]
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype) in zip(grads, shapes, strict=True)
    ]


class _Region(torch.autograd.Function):
    """A region as if it were compiled: one kernel forward and one backward, of which only the inputs are saved."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]  # torch's signature
        *tensors, call, watch, name = inputs
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.watch, ctx.name = call, watch, name
        with watch.one_operation(name):
            out = call(tensors)
        tree_map(watch._remember, out)
        return out

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        ctx.watch._launch(f"{ctx.name} backward")
        needed = ctx.needs_input_grad[: len(ctx.saved_tensors)]
        gradients = [torch.empty_like(t) if n else None for t, n in zip(ctx.saved_tensors, needed, strict=True)]
        return *gradients, None, None, None


class Recording:
    """In the place of a CUDA graph."""

    def __init__(self, watch: FakeDevice):
        self.watch = watch

    def replay(self) -> None:
        self.watch.counts.replays += 1


class FakeEvent:
    """In the place of torch.cuda.Event."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        if ACTIVE:
            ACTIVE[-1].counts.event_waits += 1


ACTIVE: list[FakeDevice] = []


@contextlib.contextmanager
def fake_device(name: str, *, own_engine: bool = True) -> Iterator[FakeDevice]:
    """The device "cuda" or "meta", and all that it replaces. own_engine: `Engine` runs backward passes, not torch"""
    watch, engine, with_compiler = FakeDevice(name), Engine(), torch.compile
    new_generator, to_list, attend_to_all = torch.Generator, Tensor.tolist, F.scaled_dot_product_attention

    def compile_(plain: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def region(*args: Any, **kwargs: Any) -> Any:  # is kept for longer than this device
            if not ACTIVE:
                return with_compiler(plain, **options)(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

            def call(tensors: Sequence[Tensor]) -> Any:
                filled = list(leaves)
                for i, t in zip(where, tensors, strict=True):
                    filled[i] = t
                own_args, own_kwargs = tree_unflatten(filled, spec)
                return plain(*own_args, **own_kwargs)

            return _Region.apply(*(leaves[i] for i in where), call, ACTIVE[-1], f"region {plain.__qualname__}")

        return region

    def record(function: Callable[[], Tensor], before: object) -> tuple[Recording, Tensor]:
        watch.recording = True
        try:
            return Recording(watch), function()
        finally:
            watch.recording = False

    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """One kernel, flash or memory-efficient attention."""
        if not watch.has(q):
            return attend_to_all(q, k, v, attn_mask, **kwargs)
        assert q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[-1] == k.shape[-1]
        if attn_mask is not None:
            assert attn_mask.dtype in (q.dtype, torch.bool) and watch.has(attn_mask)
            assert torch.broadcast_shapes(attn_mask.shape, full := (*q.shape[:-1], k.shape[-2])) == full
            assert attn_mask.dtype == torch.bool or attn_mask.shape[-1] % 16 == 0, "kernels read 16 keys at a time"
        watch._launch("scaled_dot_product_attention")
        return torch.empty_like(q)

    def read(t: Tensor) -> Any:
        return to_list(t.cpu() if watch.has(t) else t)

    def backward(t: Tensor, gradient: Tensor | None = None) -> None:
        engine.backward(t, torch.ones_like(t) if gradient is None else gradient)

    real_kernels = branches.kernels
    replaced: list[tuple[Any, str, Any]] = [
        (torch, "compile", compile_),
        (torch, "Generator", lambda device="cpu": new_generator()),
        (Tensor, "pin_memory", _pin),
        (Tensor, "tolist", read),
        (FakeTensor, "tolist", read),
        (F, "scaled_dot_product_attention", sdpa),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.cuda, "mem_get_info", lambda device=None: (80 * GIB, 80 * GIB)),
        (torch.cuda, "Event", FakeEvent),
        (passes, "cuda_graph", record),
        (decode, "cuda_graph", record),
        (branches, "kernels", FakeKernels(watch, real_kernels)),
        (base, "checked", lambda _: contextlib.nullcontext()),  # reads values
        (trainer, "initial_weights", lambda layout, seed: torch.zeros(layout.size)),  # slow, and values are not used
    ]
    if own_engine:
        replaced.append((Tensor, "backward", backward))
    if name != "cuda":
        replaced += [(module, "has_kernels", lambda layout, weights: True) for module in (branches, passes)]
        replaced += [(module, "has_varlen", lambda *_: True) for module in (attention, passes)]
    with contextlib.ExitStack() as stack:
        for place, attribute, new in replaced:
            stack.enter_context(mock.patch.object(place, attribute, new))
        if own_engine:
            stack.enter_context(engine.hooks())
        # torch.tensor(…, device="cuda") makes a tensor of the host and copies it, and does not ask the driver first.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        gc.freeze()  # imported modules need not be looked at when tensors are freed
        stack.callback(gc.unfreeze)
        stack.enter_context(watch)
        ACTIVE.append(watch)
        stack.callback(ACTIVE.pop)
        yield watch


class NumberTokenizer:
    """One token a word, which is its number; 0 ends."""

    eos_token_id = pad_token_id = 0
    bos_token = None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def fake_base(watch: FakeDevice, config: dict[str, Any], kind: str = "Qwen2") -> FrozenBase:
    """A model in bfloat16 on the device."""
    gc.collect()  # frees an earlier one
    with torch.device("meta"):
        options: Any = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
        of_config = getattr(transformers, f"{kind}ForCausalLM")._from_config
        model = of_config(getattr(transformers, f"{kind}Config")(**config), **options)
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=watch.device))
    if watch.device.type != "cuda":
        base._make_regions(model)
    return FrozenBase(model, NumberTokenizer())  # type: ignore[arg-type]
