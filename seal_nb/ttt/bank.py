"""Room for adapters in training: weights, gradients and AdamW's moments of n adapters of one shape, as (n,
size) matrices.

A slot is one row. Neighbouring rows are one batched operand, which is what makes a step over many adapters
cheap."""

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
        shape = (n, layout.size)
        self.weights = torch.zeros(shape, device=device, dtype=dtype)
        self.gradient, self.mean, self.square = (torch.zeros_like(self.weights) for _ in range(3))
        same = dtype == compute_dtype
        self.compute = self.weights if same else torch.zeros(shape, device=device, dtype=compute_dtype)
        self.scaling = torch.zeros(n, 1, 1, device=device, dtype=compute_dtype)
        self.free = list(range(n))

    def enter(self, settings: LoraSettings, initial: torch.Tensor, dropout_seed: int) -> "BankRow":
        """Take the first free row, so that rows in use stay neighbours."""
        if not self.free:
            raise SettingsError(f"the bank's {self.n} rows are all in use")
        return BankRow(self, self.free.pop(0), settings, initial, dropout_seed)


class BankRow:
    """One adapter in training: row `index` of a bank."""

    def __init__(
        self, bank: Bank, index: int, settings: LoraSettings, initial: torch.Tensor, dropout_seed: int
    ):
        self.bank, self.index, self.settings = bank, index, settings
        bank.weights[index] = initial.to(bank.weights)
        bank.mean[index].zero_()
        bank.square[index].zero_()
        bank.scaling[index] = settings.scaling
        self.weights, self.gradient = bank.weights[index], bank.gradient[index]
        self.mean, self.square = bank.mean[index], bank.square[index]
        self.steps = torch.zeros((), device=bank.weights.device)
        self.opens_window = True  # the next gradient replaces the old one
        self.dropout = settings.dropout
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
        self.bank.free.append(self.index)
        self.bank.free.sort()
