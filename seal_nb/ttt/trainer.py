"""Slots: many adapters in training on one frozen base.

A step passes the next micro-batch of each slot, as far as the token limit allows, and steps the optimisers whose
accumulation windows close. A job's result does not depend on its neighbours, up to rounding."""

import contextlib
import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seal_nb.errors import SettingsError
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Bank, BankRow
from seal_nb.ttt.device import Limit, Readback, error_text, is_out_of_memory, pinned, wide
from seal_nb.ttt.lora import Adapter, Layout, TrainJob, TrainRow, Window, initial_weights, learning_rate_at, make_row
from seal_nb.ttt.passes import CapturedPasses, MicroBatch

ADAMW: Any = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
PASSES_TO_RECOVER = 500  # after running out of memory until twice as much is tried
PASSES_AHEAD = 2  # passes that the host may be ahead of the device
DRAWN_AHEAD = 8  # waiting jobs whose initial weights are drawn in threads
BANK_SHARE = 0.4  # of a GPU's free memory that one bank may take
PROGRESS_EVERY_S = 1.0
log = logging.getLogger(__name__)


def adamw_step(row: BankRow, *, learning_rate: float, max_grad_norm: float, scale: float = 1.0) -> Tensor:
    """Clip the gradient and step the weights, as ``clip_grad_norm_`` and torch.optim.AdamW do, without a host sync.
    The stored gradient is `scale` times the true one. Returns its norm before clipping, a scalar on the device."""
    norm = torch.linalg.vector_norm(row.gradient)
    # scale · max(1, (true norm + 1e-6) / max_grad_norm)
    divisor = ((norm + 1e-6 * scale) / max_grad_norm).clamp(min=scale)
    kernel_divides = row.gradient.dtype == torch.float32
    if not kernel_divides:
        row.gradient.div_(divisor)
    row.steps += 1
    tensors: Any = [row.flat], [row.gradient], [row.mean], [row.square], [], [row.steps]
    torch._fused_adamw_(*tensors, lr=learning_rate, grad_scale=divisor if kernel_divides else None, **ADAMW)
    row.refresh()
    return norm


@dataclass(kw_only=True)
class Trained:
    """A job that is done: its adapter, or the error for which there is none."""

    job: TrainJob
    adapter: Adapter | None = None
    error: str = ""
    epoch_losses: tuple[float, ...] = ()  # mean loss per label of each epoch, in nats
    n_steps: int = 0
    n_tokens: int = 0  # of the train sequences and of padding in the loss, all epochs


class Slot:
    """One job, from `submit` to its result. The four below are set later: three by `_open`, `outcome` by `_copy`."""

    row: BankRow
    rows: list[TrainRow]
    windows: Iterator[Window]
    outcome: Readback  # losses and norms of a finished job

    def __init__(self, job: TrainJob, stack: tuple[Adapter, ...]):
        self.job, self.stack, self.result = job, stack, Trained(job=job)
        self.initial: Future[Tensor] | None = None  # weights, drawn in a thread
        self.window: Window | None = None  # the open accumulation window, None after the last one
        self.suspect = False  # a pass with it has failed; until its window closes it is passed alone
        # Of each pass: epoch, labels, labels of its window, and on the device Σ nll / labels of its window.
        self.losses: list[tuple[int, int, int, Tensor]] = []
        self.norms: list[Tensor] = []  # of the gradient at each step, on the device

    @property
    def kind(self) -> tuple[object, ...]:
        """Slots of a captured pass must be of one kind."""
        return id(self.row.bank), bool(self.stack), bool(self.row.settings.dropout), self.job.train.padding_in_loss

    @property
    def next_rows(self) -> list[TrainRow]:
        """Rows of the next micro-batch."""
        assert self.window is not None
        return [self.rows[i] for i in self.window.batches[self.row.n_passed]]

    @property
    def next_tokens(self) -> int:
        return sum(map(len, self.next_rows))

    def epoch_losses(self, losses: Sequence[float]) -> list[float]:
        """Mean loss per label of each epoch so far."""
        sums, labels = defaultdict[int, float](float), defaultdict[int, int](int)
        for (epoch, n, n_in_window, _), loss in zip(self.losses, losses, strict=True):
            sums[epoch] += loss * n_in_window
            labels[epoch] += n
        return [sums[epoch] / max(labels[epoch], 1) for epoch in sorted(sums)]

    def read(self) -> Trained:
        """The result of a job that has failed, or whose outcome is on the host."""
        result = self.result
        if not result.error:
            values, n = self.outcome.tolist(), len(self.losses)
            result.epoch_losses = tuple(self.epoch_losses(values[:n]))
            result.n_tokens = self.job.train.epochs * sum(row.n_text + len(row) - row.n_real for row in self.rows)
            if bad := [step for step, norm in enumerate(values[n:]) if not math.isfinite(norm)]:
                result.adapter = None
                result.error = f"the gradient was not finite at step {bad[0]} of {result.n_steps}; lower finetune_lr"
        return result


class SlotTrainer:
    """Trains many jobs at once on one base. token_budget: tokens of a pass (a larger micro-batch is passed alone)"""

    def __init__(self, base: FrozenBase, *, n_slots: int, token_budget: int = 4096):
        self.base = base
        self.n_slots = Limit(n_slots, PASSES_TO_RECOVER, base.make_room)
        self.token_budget = Limit(token_budget, PASSES_TO_RECOVER, base.make_room)
        self.waiting: deque[Slot] = deque()
        self.slots: list[Slot] = []
        self.leaving: list[Slot] = []
        self.banks: list[Bank] = []
        self.n_tokens = 0
        self.captured = CapturedPasses(base)
        self.blamed: Exception | None = None  # of a capture or one of its slots, as long as that is not known
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1) if base.device.type == "cuda" else 1)
        self.ahead: deque[torch.cuda.Event] = deque()
        self._progress_at, self._progress = -math.inf, dict[str, dict[str, Any]]()
        base.trainers.add(self)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.slots or self.leaving)

    def submit(self, job: TrainJob, stack: Sequence[Adapter] = ()) -> None:
        """Queue a job. stack: frozen adapters under the new one, in the order of training."""
        self.waiting.append(Slot(job, tuple(stack)))

    def cancel(self, name: str) -> None:
        """Drop the job of this name, if there is one."""
        for slot in [s for s in self.slots if s.job.name == name]:
            self._release(slot)
        self.leaving = [s for s in self.leaving if s.job.name != name]
        self.waiting = deque(s for s in self.waiting if s.job.name != name)

    def step(self) -> list[Trained]:
        """One pass: fill free slots, train, and return the jobs that are done."""
        self._fill()
        if chosen := self._choose():
            self._guarded_pass(chosen)
            self.n_slots.worked()
        for slot in [s for s in self.slots if s.window is None]:
            self._finish(slot)
        here = [slot for slot in self.leaving if slot.result.error or slot.outcome.ready or not self.slots]
        self.leaving = [slot for slot in self.leaving if slot not in here]
        return [slot.read() for slot in here]

    def run(self) -> list[Trained]:
        """Step until no job is left."""
        done = []
        while self.busy:
            done += self.step()
        return done

    def progress(self) -> dict[str, dict[str, Any]]:
        """By job name: ``step``, ``n_steps``, ``epoch_losses`` (nats per label; None if not finite, for JSON). Losses
        are on the device, and reading them waits for it, so they are read at most once in PROGRESS_EVERY_S."""
        if time.monotonic() - self._progress_at >= PROGRESS_EVERY_S:
            self._progress_at = time.monotonic()
            self.n_slots.attempt(self._read_progress, work=0)
        return self._progress

    def _read_progress(self) -> None:
        self._progress = {}
        for slot in self.slots:
            losses = torch.stack([loss for *_, loss in slot.losses]).tolist() if slot.losses else []
            means = [mean if math.isfinite(mean) else None for mean in slot.epoch_losses(losses)]
            shown = {"step": slot.result.n_steps, "n_steps": slot.job.n_steps, "epoch_losses": means}
            self._progress[slot.job.name] = shown

    def drop_idle(self) -> None:
        """Free banks without jobs, and the captured passes, which read and write banks."""
        self.banks = [bank for bank in self.banks if bank.rows]
        self.captured.statics.clear()

    def _fill(self) -> None:
        """Let waiting jobs enter free slots."""
        self._draw_ahead()
        while self.waiting and len(self.slots) < self.n_slots.now:
            slot = self.waiting[0]
            failure = self.n_slots.attempt(partial(self._open, slot), len(self.slots), work=0)
            if failure is not None and not (is_out_of_memory(failure) and self.slots):
                self._fail(slot, failure, "for a single adapter; lower lora_rank or name fewer target_modules")
            elif slot not in self.slots:  # until another job leaves
                return
            self.waiting.popleft()
            self._draw_ahead()

    def _draw_ahead(self) -> None:
        """Draw initial weights in threads while others train: at 7B they take 0.1 to 2 s a job on one core."""
        for slot in list(self.waiting)[:DRAWN_AHEAD]:
            with contextlib.suppress(RuntimeError):  # no thread can be started
                slot.initial = slot.initial or self.threads.submit(self._initial, slot.job)

    def _initial(self, job: TrainJob) -> Tensor:
        return pinned(initial_weights(self.base.layout(job.lora), job.train.seed), self.base.device)

    def _open(self, slot: Slot) -> None:
        """Give the job a row of a bank and a slot, if a row is free."""
        job, base = slot.job, self.base
        bank = self._bank(base.layout(job.lora))
        if len(bank.rows) == bank.n:
            return
        slot.rows = [make_row(base.tokenizer, text, job.train) for text in job.texts]
        for i, row in enumerate(slot.rows):
            base.room_after([*row.token_ids.tolist(), *row.targets[-1:].tolist()], f"train_sequences[{i}]")
        if job.train.padding_in_loss and (base.window or math.inf) < job.train.pad_to:
            problem = f"pad_to is {job.train.pad_to}, but padding sees no text beyond the model's {base.window}-token"
            raise SettingsError(f"{problem} sliding windows; lower pad_to or set padding_in_loss=false")
        n_labels_R = [len(row.sources) for row in slot.rows]
        if (mask := job.train.end_mask_substring) and not any(row.n_masked for row in slot.rows):
            raise SettingsError(f"end_mask_substring {mask!r} is in none of the train sequences, cut to max_seq_length")
        if not sum(n_labels_R):
            raise SettingsError(f"job {job.name!r}: no token carries loss; check end_mask_substring and the sequences")
        slot.windows = job.windows(n_labels_R)
        slot.window = next(slot.windows)
        initial = slot.initial.result() if slot.initial else self._initial(job)
        slot.row = BankRow(bank, job.lora, initial, dropout_seed=job.train.seed)
        slot.initial = None
        self.slots.append(slot)

    def _bank(self, layout: Layout) -> Bank:
        """The bank of this layout. A new one has a row for each slot, as far as a GPU's memory allows."""
        if same := [bank for bank in self.banks if bank.layout == layout]:
            return same[0]
        self.base.make_room()
        n, device, dtype = self.n_slots.now, self.base.device, self.base.adapter_dtype
        if device.type == "cuda":
            row_bytes = layout.size * (4 * wide(dtype).itemsize + dtype.itemsize * (dtype != wide(dtype)))  # see Bank
            n = max(1, min(n, int(BANK_SHARE * torch.cuda.mem_get_info(device)[0] / row_bytes)))
            self.n_slots.lower(len(self.slots) + n)
        self.banks.append(Bank(layout, n, device=device, compute_dtype=dtype))
        return self.banks[-1]

    def _release(self, slot: Slot) -> None:
        if slot in self.slots:
            del slot.row.bank.rows[slot.row.index]
            self.slots.remove(slot)
        if slot.suspect and self.blamed is not None:
            self.captured.works, self.blamed = True, None

    def _finish(self, slot: Slot) -> None:
        """Free the slot of a job that is done."""
        attempt = partial(self.n_slots.attempt, partial(self._copy, slot), len(self.slots) - 1, work=0)
        if attempt() and (failure := attempt()):  # the first attempt has made room for the second
            return self._fail(slot, failure, "for the trained adapter; lower lora_rank or n_slots")
        self._release(slot)
        self.leaving.append(slot)

    def _copy(self, slot: Slot) -> None:
        """Copy the adapter of a job that is done, and start the copy of its losses and norms to the host."""
        row = slot.row
        slot.result.adapter = Adapter(row.layout, row.settings, row.flat.clone(), row.compute.dtype)
        losses = torch.stack([loss for *_, loss in slot.losses])
        slot.outcome = Readback(torch.cat([losses, torch.stack(slot.norms).to(losses)]))

    def _choose(self) -> list[Slot]:
        """Slots of the next pass in the order of banks and rows. Those with the fewest steps have their turn first."""
        if suspects := [slot for slot in self.slots if slot.suspect]:
            return suspects[:1]
        if self.blamed is not None:
            log.warning("passes are launched kernel by kernel from now on: %s", self.blamed)
            self.blamed = None
        chosen: list[Slot] = []
        tokens = 0
        for slot in sorted(self.slots, key=lambda s: s.result.n_steps):
            fits = tokens + slot.next_tokens <= self.token_budget.now
            # Only a pass of one kind can be captured.
            if not chosen or (fits and (slot.kind == chosen[0].kind or not self.captured.works)):
                chosen.append(slot)
                tokens += slot.next_tokens
        return sorted(chosen, key=lambda s: (self.banks.index(s.row.bank), s.row.index))

    def _guarded_pass(self, chosen: list[Slot]) -> None:
        """A pass. After an error the open accumulation windows are repeated, by each slot alone and without a capture.
        A job that fails then is the cause; if none does, the capture is, and later passes are eager. If memory runs
        out, the token budget is halved instead, and a slot that was alone has one more try."""
        n_tokens = sum(s.next_tokens for s in chosen)
        failure = self.token_budget.attempt(partial(self._pass, chosen), min(self.token_budget.now, n_tokens) // 2)
        if failure is None:
            return
        for slot in chosen:
            slot.losses = slot.losses[: len(slot.losses) - slot.row.n_passed]
            slot.row.n_passed = 0
        if chosen[0].suspect:
            return self._fail(chosen[0], failure, f"with {n_tokens} tokens in one micro-batch; lower batch_size")
        for slot in chosen:  # without a window the pass went well for it, and was its last one
            slot.suspect = slot.window is not None and (len(chosen) == 1 or not is_out_of_memory(failure))
        if self.captured.works and not is_out_of_memory(failure):
            self.captured.works, self.blamed = False, failure
            self.captured.statics.clear()

    def _fail(self, slot: Slot, error: Exception, place: str) -> None:
        """place: as in `error_text`"""
        self._release(slot)
        slot.result.adapter, slot.result.error = None, error_text(error, place)
        self.leaving.append(slot)

    def _pass(self, chosen: list[Slot]) -> None:
        windows = [(slot, slot.window) for slot in chosen if slot.window is not None]
        batches = [MicroBatch((*slot.stack, slot.row), slot.next_rows, window.n_labels) for slot, window in windows]
        losses = self.captured.run(batches)
        self.n_tokens += sum(slot.next_tokens for slot in chosen)
        for slot, loss in zip(chosen, losses, strict=False):
            self._account(slot, loss)
        self._keep_pace()

    def _account(self, slot: Slot, loss: Tensor) -> None:
        """Record the pass. If it closes the window, step the optimiser and go to the next window."""
        settings, window, result = slot.job.train, slot.window, slot.result
        assert window is not None
        n_labels = sum(len(row.sources) for row in slot.next_rows)
        slot.losses.append((window.epoch, n_labels, window.n_labels, loss))
        slot.row.n_passed += 1
        if slot.row.n_passed == len(window.batches):
            rate = learning_rate_at(settings, result.n_steps, slot.job.n_steps)
            how = {"max_grad_norm": settings.max_grad_norm, "scale": self.base.gradient_scale}
            slot.norms.append(adamw_step(slot.row, learning_rate=rate, **how))
            result.n_steps += 1
            slot.window, slot.row.n_passed, slot.suspect = next(slot.windows, None), 0, False

    def _keep_pace(self) -> None:
        """Let the host be a few passes ahead of the device, so that neither waits, and no more."""
        if self.base.device.type != "cuda":
            return
        self.ahead.append(torch.cuda.Event())
        self.ahead[-1].record()
        if len(self.ahead) > PASSES_AHEAD:
            self.ahead.popleft().synchronize()
