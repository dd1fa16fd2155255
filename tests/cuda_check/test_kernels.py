"""The Triton kernels of the branches: right in Triton's interpreter, and small enough for each kind of GPU."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import accumulate
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seal_nb.ttt import kernels
from tests.cuda_check import interpreted
from tests.cuda_check.interpreted import LENGTHS, tiles

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # that a block may have, by compute capability
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
# (rank, dtype, capabilities). The largest rank that the kernels take, and float32, where there is least memory.
SHAPES = [
    (16, torch.bfloat16, (80, 86, 90)),
    (64, torch.bfloat16, (80, 86, 90)),
    (512, torch.bfloat16, (86,)),
    (16, torch.float32, (86,)),
]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Executor]:
    """A process in which Triton interprets kernels on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            yield process


@pytest.mark.parametrize("rank", [4, 16, 48, 64])
@pytest.mark.parametrize("product", [interpreted.narrow, interpreted.widen, interpreted.outer, interpreted.outer_kept])
def test_a_kernel_equals_a_loop_over_the_members(
    interpreter: Executor, product: Callable[[int], tuple[Any, Any]], rank: int
) -> None:
    found, expected = map(torch.from_numpy, interpreter.submit(product, rank).result())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Launches:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any):
        self.kernel, self.args, self.options = kernel, (), {}

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        self.args, self.options = args, options

    def compiled(self, capability: int) -> Any:
        """Compiled as at this launch. As Triton does, ones are constants and multiples of 16 are known to be so."""
        names, constants, signature, known = self.kernel.arg_names, {}, {}, {}
        for i, (name, value) in enumerate(zip(names, self.args, strict=False)):
            if isinstance(value, int) and value == 1:
                constants[i,] = value
            elif isinstance(value, Tensor) or value % 16 == 0:
                known[i,] = [["tt.divisibility", 16]]
            signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        options = {k: v for k, v in self.options.items() if k not in names}
        constants |= {(names.index(k),): v for k, v in self.options.items() if k in names}
        signature = {name: "constexpr" if (i,) in constants else signature[name] for i, name in enumerate(names)}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=known)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def launched(monkeypatch: pytest.MonkeyPatch, rank: int, dtype: torch.dtype) -> list[Launches]:
    """The three kernels at a width of 3584, launched as by a branch."""
    seen = {name: Launches(getattr(kernels, name)) for name in ("_narrow", "_widen", "_outer")}
    for name, one in seen.items():
        monkeypatch.setattr(kernels, name, one)
    wide, n, tokens = 3584, len(LENGTHS), sum(LENGTHS)
    x, h = torch.empty(tokens, wide, dtype=dtype), torch.empty(tokens, rank, dtype=dtype)
    weights = torch.empty(n, rank, wide, dtype=dtype)
    ends = torch.tensor(list(accumulate(LENGTHS)), dtype=torch.int32)
    kernels.narrow(x, weights, torch.empty(tokens, 1), tiles())
    kernels.widen(h, weights, x, tiles())
    kernels.outer(h, x, torch.empty(n, rank, wide), ends, torch.empty(n))
    return list(seen.values())


@pytest.mark.parametrize(("rank", "dtype", "capability"), [(r, d, c) for r, d, all_c in SHAPES for c in all_c])
def test_kernels_compile_within_the_shared_memory_of_a_gpu(
    rank: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.fits(rank, dtype.itemsize)
    for one in launched(monkeypatch, rank, dtype):
        n_bytes = one.compiled(capability).metadata.shared
        assert n_bytes <= SHARED_BYTES[capability], f"{one.kernel.__name__} takes {n_bytes} bytes"
