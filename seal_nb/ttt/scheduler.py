"""Continuous batching of test-time training: slots.

N adapters live side by side on one frozen base. A step takes the next micro-batch of each active slot (as
many as the token budget allows), runs the base once over all rows, and steps the optimiser of each slot
whose accumulation window closes. A job that is done leaves its slot; the next enters at the very next step.
A job's result does not depend on its neighbours, up to rounding. No sockets, no text generation."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from seal_nb.errors import SettingsError
from seal_nb.ttt.bank import Bank, BankRow
from seal_nb.ttt.base import FrozenBase, RowTokens
from seal_nb.ttt.branches import Segment
from seal_nb.ttt.jobs import MicroBatch, TrainJob, TrainRow, learning_rate_at
from seal_nb.ttt.lora import Adapter, Layout, initial_weights
from seal_nb.ttt.loss import weighted_nll
from seal_nb.ttt.optimizer import adamw_step


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A job that is done: its adapter, or why there is none.

    epoch_losses: mean loss per label of each epoch, in nats; n_tokens: tokens passed through the base, all
    epochs"""

    job: TrainJob
    adapter: Adapter | None = None
    error: str = ""
    epoch_losses: tuple[float, ...] = ()
    n_steps: int = 0
    n_tokens: int = 0


@dataclass
class Slot:
    """One job in training. `losses` holds (epoch, Σ nll, labels) of each pass; sums stay on the device
    until the end."""

    job: TrainJob
    stack: tuple[Adapter, ...]
    row: BankRow
    rows: list[TrainRow]
    window: list[MicroBatch] = field(default_factory=list)
    done_in_window: int = 0
    upcoming: Iterator[list[MicroBatch]] = field(default_factory=lambda: iter(()))
    step: int = 0
    n_tokens: int = 0
    rows_epoch: int = 0
    losses: list[tuple[int, torch.Tensor, float]] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    lone_failures: int = 0

    def rewind_window(self) -> None:
        """Forget the passes of the open accumulation window."""
        self.losses = self.losses[: len(self.losses) - self.done_in_window]
        self.done_in_window = 0

    @property
    def micro_batch(self) -> MicroBatch:
        return self.window[self.done_in_window]

    @property
    def micro_rows(self) -> list[TrainRow]:
        return [self.rows[i] for i in self.micro_batch.row_indices]

    @property
    def waiting_tokens(self) -> int:
        return sum(len(row) for row in self.micro_rows)


class SlotTrainer:
    """Trains many jobs at once on one base.

    n_slots: adapters in training at a time. token_budget: tokens of one pass; a micro-batch that alone is
    larger runs alone."""

    def __init__(self, base: FrozenBase, *, n_slots: int, token_budget: int = 4096):
        if n_slots < 1 or token_budget < 1:
            raise SettingsError(
                f"n_slots is {n_slots} and token_budget {token_budget}; both must be at least 1"
            )
        self.base, self.n_slots, self.token_budget = base, n_slots, token_budget
        self.waiting: deque[tuple[TrainJob, tuple[Adapter, ...]]] = deque()
        self.slots: list[Slot] = []
        self.banks: list[Bank] = []
        self.failed: list[Trained] = []
        self.n_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.slots or self.failed)

    def submit(self, job: TrainJob, stack: Sequence[Adapter] = ()) -> None:
        """Queue a job; `stack`: frozen adapters under the new one."""
        self.waiting.append((job, tuple(stack)))

    def cancel(self, name: str) -> bool:
        """Forget the job of this name, wherever it is. False where there is none."""
        before = len(self.slots) + len(self.waiting)
        self._release([s for s in self.slots if s.job.name == name])
        self.waiting = deque(w for w in self.waiting if w[0].name != name)
        return len(self.slots) + len(self.waiting) < before

    def step(self) -> list[Trained]:
        """One pass: fill free slots, train, return the jobs that are done."""
        self._fill()
        chosen = self._choose()
        if chosen:
            self._guarded_pass(chosen)
        done = [s for s in self.slots if not s.window]
        finished = self.failed + [_result(s) for s in done]
        self._release(done)
        self.failed = []
        return finished

    def run(self) -> list[Trained]:
        """Step until nothing is left."""
        finished = []
        while self.busy:
            finished += self.step()
        return finished

    def _fill(self) -> None:
        while self.waiting and len(self.slots) < self.n_slots:
            job, stack = self.waiting.popleft()
            try:
                self.slots.append(self._open(job, stack))
            except SettingsError as e:
                self.failed.append(Trained(job=job, error=str(e)))
            except torch.OutOfMemoryError:
                if not self.slots:
                    error = "out of memory for a single adapter; lower lora_rank or name fewer target_modules"
                    self.failed.append(Trained(job=job, error=error))
                    continue
                self.waiting.appendleft((job, stack))
                self.n_slots = len(self.slots)

    def _open(self, job: TrainJob, stack: tuple[Adapter, ...]) -> Slot:
        rows = job.rows(self.base.tokenizer, 0)
        n_items_R = [row.n_items for row in rows]
        if not sum(n_items_R):
            raise SettingsError(
                f"job {job.name!r}: no token carries loss; check end_mask_substring and the train sequences"
            )
        layout = self.base.layout(job.lora)
        initial = initial_weights(layout, job.train.seed)
        row = self._bank(layout).enter(job.lora, initial, dropout_seed=job.train.seed)
        upcoming = _windows(job.micro_batches(n_items_R))
        return Slot(job=job, stack=stack, row=row, rows=rows, window=next(upcoming), upcoming=upcoming)

    def _bank(self, layout: Layout) -> Bank:
        """A bank of this layout with a free row: room for the jobs of its kind that are waiting, made when
        needed."""
        for bank in self.banks:
            if bank.layout == layout and bank.free:
                return bank
        alike = 1 + sum(self.base.layout(job.lora) == layout for job, _ in self.waiting)
        self.banks = [b for b in self.banks if len(b.free) < b.n]  # rooms that stand empty
        room = self.n_slots - len(self.slots)
        full = any(b.layout == layout for b in self.banks)  # more of its kind come one by one: no small banks
        self.banks.append(self.base.new_bank(layout, room if full else min(alike, room)))
        return self.banks[-1]

    def _release(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.row.leave()
        self.slots = [s for s in self.slots if s not in slots]

    def _choose(self) -> list[Slot]:
        """Slots of the next pass: furthest behind first, so that none starves; laid out bank by bank, row
        by row."""
        chosen: list[Slot] = []
        tokens = 0
        for slot in sorted(self.slots, key=lambda s: s.step):
            if chosen and tokens + slot.waiting_tokens > self.token_budget:
                continue
            chosen.append(slot)
            tokens += slot.waiting_tokens
        return sorted(chosen, key=lambda s: (self.banks.index(s.row.bank), s.row.index))

    def _guarded_pass(self, chosen: list[Slot]) -> None:
        """Out of memory: halve the token budget and do the open accumulation windows again. Nothing is lost.

        A micro-batch that fails twice although it is alone fails its job.
        """
        n_tokens = sum(s.waiting_tokens for s in chosen)
        try:
            self._pass(chosen)
        except torch.OutOfMemoryError:
            short = True
        else:
            short = False
        for slot in chosen:
            slot.lone_failures = slot.lone_failures + 1 if short and len(chosen) == 1 else 0
        if short:
            self._retreat(chosen, n_tokens)

    def _retreat(self, chosen: list[Slot], n_tokens: int) -> None:
        for slot in chosen:
            slot.rewind_window()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self.token_budget = max(1, min(self.token_budget, n_tokens) // 2)
        if chosen[0].lone_failures > 1:
            self._fail(
                chosen[0], f"out of memory with {n_tokens} tokens in one micro-batch; lower batch_size"
            )

    def _fail(self, slot: Slot, error: str) -> None:
        self._release([slot])
        self.failed.append(Trained(job=slot.job, error=error, n_steps=slot.step, n_tokens=slot.n_tokens))

    def _pass(self, chosen: list[Slot]) -> None:
        device, rows, segments, sources, targets, weights, sizes = self.base.device, [], [], [], [], [], []
        start = 0
        for slot in chosen:
            slot.row.opens_window = slot.micro_batch.opens_window
            stop, n = start, 0
            for row in slot.micro_rows:
                rows.append(RowTokens(token_ids=row.token_ids, positions=row.positions, n_real=row.n_real))
                sources.append(row.sources + stop)
                targets.append(row.targets)
                weights.append(row.weights / max(slot.micro_batch.n_items, 1))
                stop, n = stop + len(row), n + len(row.sources)
            segments.append(Segment(start=start, stop=stop, adapters=slot.stack, trained=slot.row))
            sizes.append(n)
            start = stop
        hidden = self.base.hidden(rows, segments)
        labels = torch.cat(sources).to(device, non_blocking=True)
        w = torch.cat(weights).to(device, non_blocking=True)
        total, nll = weighted_nll(
            hidden.index_select(0, labels),
            self.base.head,
            torch.cat(targets).to(device, non_blocking=True),
            w,
        )
        total.backward()
        self.n_tokens += start
        shares = (nll * w.to(nll.dtype)).split(sizes)
        for slot, share in zip(chosen, shares, strict=True):
            self._account(slot, share.sum())

    def _account(self, slot: Slot, loss: torch.Tensor) -> None:
        """Note the pass; step the optimiser where its window closes; go to the next window."""
        settings, batch = slot.job.train, slot.micro_batch
        slot.losses.append((batch.epoch, loss, batch.n_items))
        slot.n_tokens += slot.waiting_tokens
        slot.done_in_window += 1
        if not batch.closes_window:
            return
        rate = learning_rate_at(settings, slot.step, slot.job.n_steps)
        slot.norms.append(adamw_step(slot.row, learning_rate=rate, max_grad_norm=settings.max_grad_norm))
        slot.step += 1
        slot.window, slot.done_in_window = next(slot.upcoming, []), 0
        if slot.window and settings.pad_samples and slot.micro_batch.epoch != slot.rows_epoch:
            slot.rows_epoch = slot.micro_batch.epoch
            slot.rows = slot.job.rows(self.base.tokenizer, slot.rows_epoch)


def _windows(batches: Iterator[MicroBatch]) -> Iterator[list[MicroBatch]]:
    window: list[MicroBatch] = []
    for batch in batches:
        window.append(batch)
        if batch.closes_window:
            yield window
            window = []


def _result(slot: Slot) -> Trained:
    """Read the losses off the device, once a job."""
    losses = torch.stack([loss for _, loss, _ in slot.losses]).tolist()
    norms = torch.stack(slot.norms)
    bad = (~torch.isfinite(norms)).nonzero()
    error = (
        f"the gradient was not finite at step {int(bad[0])} of {slot.step}; lower finetune_lr"
        if len(bad)
        else ""
    )
    sums, items = [0.0] * slot.job.train.epochs, [0.0] * slot.job.train.epochs
    for (epoch, _, n_items), loss in zip(slot.losses, losses, strict=True):
        sums[epoch] += loss * n_items
    for epoch in range(slot.job.train.epochs):
        items[epoch] = float(sum(row.n_items for row in slot.rows))
    return Trained(
        job=slot.job,
        adapter=None if error else slot.row.adapter(),
        error=error,
        epoch_losses=tuple(s / max(n, 1.0) for s, n in zip(sums, items, strict=True)),
        n_steps=slot.step,
        n_tokens=slot.n_tokens,
    )
