"""Slots: many adapters in training on one frozen base.

A step passes the next micro-batch of each slot, as far as the token limit allows, and steps the optimisers whose
accumulation windows close. A job's result does not depend on its neighbours, up to rounding.
"""

import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seal_nb.errors import SettingsError
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Bank, BankRow, bank_row_bytes
from seal_nb.ttt.device import Limit, Readback, pinned
from seal_nb.ttt.jobs import TrainJob, TrainRow, Window, learning_rate_at, make_row
from seal_nb.ttt.lora import Adapter, Layout, initial_weights
from seal_nb.ttt.passes import CapturedPasses, Pass

ADAMW: Any = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
PASSES_TO_RECOVER = 500  # after running out of memory until twice as much is tried
PASSES_AHEAD = 2  # passes that the host may be ahead of the device
DRAWN_AHEAD = 8  # waiting jobs whose initial weights are drawn in threads
BANK_SHARE = 0.4  # of a GPU's free memory that one bank may take
PROGRESS_EVERY_S = 1.0
log = logging.getLogger(__name__)


def adamw_step(row: BankRow, *, learning_rate: float, max_grad_norm: float) -> Tensor:
    """Clip the gradient and step the weights, as ``clip_grad_norm_`` and torch.optim.AdamW do, without a host sync.
    Returns the gradient's norm before clipping, a scalar on the device."""
    norm = torch.linalg.vector_norm(row.gradient)
    divisor = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    fused_division = row.gradient.dtype == torch.float32  # the kernel divides, in float32 only
    if not fused_division:
        row.gradient.div_(divisor)
    row.steps += 1
    tensors: Any = [row.flat], [row.gradient], [row.mean], [row.square], [], [row.steps]
    grad_scale = divisor if fused_division else None
    torch._fused_adamw_(*tensors, lr=learning_rate, grad_scale=grad_scale, **ADAMW)
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
    """One job, from `submit` to its result. Attributes without a value are set when it enters a slot."""

    row: BankRow
    rows: list[TrainRow]
    windows: Iterator[Window]
    outcome: Readback  # losses and norms of a finished job

    def __init__(self, job: TrainJob, stack: tuple[Adapter, ...]):
        self.job, self.stack, self.result = job, stack, Trained(job=job)
        self.initial: Future[Tensor] | None = None  # weights, drawn in a thread
        self.window: Window | None = None  # the open accumulation window, None after the last one
        self.lone_failures = 0  # how often it has run out of memory alone in a pass
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
            values = self.outcome.tolist()
            losses, norms = values[: len(self.losses)], values[len(self.losses) :]
            result.epoch_losses = tuple(self.epoch_losses(losses))
            result.n_tokens = self.job.train.epochs * sum(row.n_text + len(row) - row.n_real for row in self.rows)
            bad = next((step for step, norm in enumerate(norms) if not math.isfinite(norm)), None)
            if bad is not None:
                result.adapter = None
                result.error = f"the gradient was not finite at step {bad} of {result.n_steps}; lower finetune_lr"
        return result


class SlotTrainer:
    """Trains many jobs at once on one base. token_budget: tokens of a pass (a larger micro-batch is passed alone)"""

    def __init__(self, base: FrozenBase, *, n_slots: int, token_budget: int = 4096):
        if n_slots < 1 or token_budget < 1:
            raise SettingsError(f"n_slots is {n_slots} and token_budget {token_budget}; both must be at least 1")
        self.base = base
        self.n_slots, self.token_budget = Limit(n_slots, PASSES_TO_RECOVER), Limit(token_budget, PASSES_TO_RECOVER)
        self.waiting: deque[Slot] = deque()
        self.slots: list[Slot] = []
        self.leaving: list[Slot] = []
        self.banks: list[Bank] = []
        self.n_tokens = 0
        self.captured = CapturedPasses(base)
        on_gpu = base.device.type == "cuda"
        self.threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1) if on_gpu else 1)
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
            self.token_budget.worked()
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
            self._progress_at, self._progress = time.monotonic(), {}
            for slot in self.slots:
                losses = torch.stack([loss for *_, loss in slot.losses]).tolist() if slot.losses else []
                means = [mean if math.isfinite(mean) else None for mean in slot.epoch_losses(losses)]
                steps = {"step": slot.result.n_steps, "n_steps": slot.job.n_steps}
                self._progress[slot.job.name] = {**steps, "epoch_losses": means}
        return self._progress

    def drop_idle(self) -> None:
        """Free banks without jobs, and the captured passes, which read and write banks."""
        self.banks = [bank for bank in self.banks if bank.rows]
        self.captured.statics.clear()

    def _fill(self) -> None:
        """Let waiting jobs enter free slots."""
        self._draw_ahead()
        while self.waiting and len(self.slots) < self.n_slots.now:
            slot = self.waiting[0]
            try:
                if not self._open(slot):
                    return
                self.slots.append(slot)
            except torch.OutOfMemoryError:
                self.n_slots.lower(len(self.slots))
                if self.slots:  # until another job leaves
                    return
                self._fail(slot, "out of memory for a single adapter; lower lora_rank or name fewer target_modules")
            except Exception as error:  # noqa: BLE001  # the error of one job must not end the others
                self._fail(slot, _text(error))
            self.waiting.popleft()
            self._draw_ahead()

    def _draw_ahead(self) -> None:
        """Draw initial weights in threads while others train: at 7B they take 0.1 s a job on one core."""
        for slot in list(self.waiting)[:DRAWN_AHEAD]:
            if slot.initial is None:
                slot.initial = self.threads.submit(self._initial, slot.job)

    def _initial(self, job: TrainJob) -> Tensor:
        return pinned(initial_weights(self.base.layout(job.lora), job.train.seed), self.base.device)

    def _open(self, slot: Slot) -> bool:
        """Give the job a row of a bank; False if there is none."""
        job = slot.job
        bank = self._bank(self.base.layout(job.lora))
        if len(bank.rows) == bank.n:
            return False
        slot.rows = [make_row(self.base.tokenizer, text, job.train) for text in job.texts]
        n_labels_R = [len(row.sources) for row in slot.rows]
        if not sum(n_labels_R):
            raise SettingsError(f"job {job.name!r}: no token carries loss; check end_mask_substring and the sequences")
        assert slot.initial is not None
        slot.windows = job.windows(n_labels_R)
        slot.window = next(slot.windows)
        slot.row = BankRow(bank, job.lora, slot.initial.result(), dropout_seed=job.train.seed)
        slot.initial = None
        return True

    def _bank(self, layout: Layout) -> Bank:
        """The bank of this layout. A new one has a row for each slot, as far as a GPU's memory allows."""
        for bank in self.banks:
            if bank.layout == layout:
                return bank
        self.base.make_room()
        n, device, dtype = self.n_slots.now, self.base.device, self.base.dtype
        if device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            n = max(1, min(n, int(BANK_SHARE * free_bytes / bank_row_bytes(layout, dtype))))
            self.n_slots.lower(len(self.slots) + n)
        self.banks.append(Bank(layout, n, device=device, compute_dtype=dtype))
        return self.banks[-1]

    def _release(self, slot: Slot) -> None:
        if slot in self.slots:
            del slot.row.bank.rows[slot.row.index]
            self.slots.remove(slot)

    def _finish(self, slot: Slot) -> None:
        """Free the slot of a job that is done. Its losses and norms are copied to the host without a wait."""
        try:
            slot.result.adapter = self.base.with_room(slot.row.adapter)
        except torch.OutOfMemoryError:
            return self._fail(slot, "out of memory for the trained adapter; lower lora_rank or n_slots")
        losses = torch.stack([loss for *_, loss in slot.losses])
        slot.outcome = Readback(torch.cat([losses, torch.stack(slot.norms).to(losses)]))
        self._release(slot)
        self.leaving.append(slot)

    def _choose(self) -> list[Slot]:
        """Slots of the next pass in the order of banks and rows. Those with the fewest steps have their turn first."""
        chosen: list[Slot] = []
        tokens = 0
        for slot in sorted(self.slots, key=lambda s: s.result.n_steps):
            if chosen and tokens + slot.next_tokens > self.token_budget.now:
                continue
            if chosen and self.captured.works and slot.kind != chosen[0].kind:
                continue  # only passes of one kind can be captured
            chosen.append(slot)
            tokens += slot.next_tokens
        return sorted(chosen, key=lambda s: (self.banks.index(s.row.bank), s.row.index))

    def _guarded_pass(self, chosen: list[Slot]) -> None:
        """A pass. If memory runs out, the token budget is halved and the open accumulation windows are repeated; if
        a window alone fails twice, its job fails. After any other error each slot runs alone."""
        n_tokens = sum(s.next_tokens for s in chosen)
        failure: Exception | None = None
        try:
            return self._pass(chosen)
        except torch.OutOfMemoryError:
            pass  # handled below, where the error no longer holds the tensors of the pass
        except torch.AcceleratorError:
            raise  # nothing runs on this device any more
        except Exception as error:  # noqa: BLE001  # must not end the jobs that did not cause it
            failure = error
        for slot in chosen:
            slot.losses = slot.losses[: len(slot.losses) - slot.row.n_passed]
            slot.row.n_passed = 0
        if failure is not None:
            return self._find_cause(chosen, failure)
        self.base.make_room()
        self.token_budget.lower(min(self.token_budget.now, n_tokens) // 2)
        if len(chosen) == 1:
            chosen[0].lone_failures += 1
            if chosen[0].lone_failures > 1:
                self._fail(chosen[0], f"out of memory with {n_tokens} tokens in one micro-batch; lower batch_size")

    def _find_cause(self, chosen: list[Slot], error: Exception) -> None:
        """Run each slot of a failed pass alone and without a capture; a job that fails then is the cause. If none
        fails, the capture is the cause, and later passes are eager."""
        captured, self.captured.works = self.captured.works, False
        if len(chosen) == 1 and not captured:
            return self._fail(chosen[0], _text(error))
        self.captured.statics.clear()
        for slot in chosen:
            if slot.window is not None:  # None: the pass itself went well for it, and was its last one
                self._guarded_pass([slot])
        self.captured.works = captured and any(slot.result.error for slot in chosen)
        if captured and not self.captured.works:
            log.warning("passes are launched kernel by kernel from now on: %s", _text(error))

    def _fail(self, slot: Slot, error: str) -> None:
        self._release(slot)
        slot.result.error = error
        self.leaving.append(slot)

    def _pass(self, chosen: list[Slot]) -> None:
        parts = [(slot.next_tokens, (*slot.stack, slot.row)) for slot in chosen]
        n_labels_S = [slot.window.n_labels for slot in chosen if slot.window is not None]
        losses = self.captured.run(Pass(parts, [slot.next_rows for slot in chosen], n_labels_S))
        self.n_tokens += sum(n for n, _ in parts)
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
            slot.norms.append(adamw_step(slot.row, learning_rate=rate, max_grad_norm=settings.max_grad_norm))
            result.n_steps += 1
            slot.window, slot.row.n_passed, slot.lone_failures = next(slot.windows, None), 0, 0

    def _keep_pace(self) -> None:
        """Let the host be a few passes ahead of the device, so that neither waits, and no more."""
        if self.base.device.type != "cuda":
            return
        self.ahead.append(torch.cuda.Event())
        self.ahead[-1].record()
        if len(self.ahead) > PASSES_AHEAD:
            self.ahead.popleft().synchronize()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"
