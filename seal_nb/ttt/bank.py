"""Room for adapters in training: weights, gradients and AdamW's moments of n adapters of one shape, as (n,
size) matrices.

A slot is one row. All rows of a bank are one operand, which is what makes a step over many adapters cheap."""

import torch

from seal_nb.errors import SettingsError
from seal_nb.ttt.jobs import LoraSettings
from seal_nb.ttt.lora import Adapter, Layout


class Bank:
    """n rows for adapters of one layout. weights and gradients are in `dtype`, the passes' copy in
    `compute_dtype`."""

    def __init__(
        self, layout: Layout, n: int, *, device: torch.device, dtype: torch.dtype, compute_dtype: torch.dtype
    ):
        self.layout, self.n = layout, n
        # Not filled: a row is set when a job enters, and a CPU gives memory to rows that were touched only.
        self.weights, self.gradient, self.mean, self.square = (
            torch.empty(n, layout.size, device=device, dtype=dtype) for _ in range(4)
        )
        same = dtype == compute_dtype
        self.compute = self.weights if same else torch.empty_like(self.weights, dtype=compute_dtype)
        self.rows: dict[int, BankRow] = {}

    @property
    def full(self) -> bool:
        return len(self.rows) == self.n

    @property
    def kept_gradients(self) -> list[bool]:
        """For each row whether its gradient is of an open accumulation window, to be added to."""
        return [i in self.rows and not self.rows[i].opens_window for i in range(self.n)]

    @property
    def all_void(self) -> bool:
        return not any(self.kept_gradients)

    def enter(self, settings: LoraSettings, initial: torch.Tensor, dropout_seed: int) -> "BankRow":
        """Take the first free row."""
        if self.full:
            raise SettingsError(f"the bank's {self.n} rows are all in use")
        index = next(i for i in range(self.n) if i not in self.rows)
        self.rows[index] = BankRow(self, index, settings, initial, dropout_seed)
        return self.rows[index]


class BankRow:
    """One adapter in training: row `index` of a bank."""

    def __init__(
        self, bank: Bank, index: int, settings: LoraSettings, initial: torch.Tensor, dropout_seed: int
    ):
        self.bank, self.index, self.settings = bank, index, settings
        self.weights, self.gradient = bank.weights[index], bank.gradient[index]
        self.mean, self.square = bank.mean[index], bank.square[index]
        self.weights.copy_(initial, non_blocking=True)
        for left_over in (self.gradient, self.mean, self.square):
            left_over.zero_()
        self.steps = torch.zeros((), device=bank.weights.device)
        self.opens_window = True  # the next gradient replaces the old one
        self.draws = torch.Generator(bank.weights.device).manual_seed(dropout_seed)
        self.refresh()

    def refresh(self) -> None:
        """Bring the passes' copy up to date after the weights have changed."""
        if self.bank.compute is not self.bank.weights:
            self.bank.compute[self.index].copy_(self.weights)

    def adapter(self) -> Adapter:
        """A copy of the weights, of its own."""
        return Adapter(self.bank.layout, self.settings, self.weights.clone(), self.bank.compute.dtype)

    def leave(self) -> None:
        del self.bank.rows[self.index]
