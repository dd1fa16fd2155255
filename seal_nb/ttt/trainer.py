"""Continuous batching of test-time training: slots.

N adapters live side by side on one frozen base. A step takes the next micro-batch of each active slot (as
many as the token budget allows), runs the base once over all rows, and steps the optimiser of each slot
whose accumulation window closes. A job that is done leaves its slot; the next enters at the very next step.
A job's result does not depend on its neighbours, up to rounding. No sockets, no text generation.

AdamW and clipping of one adapter, as torch.optim.AdamW and ``torch.nn.utils.clip_grad_norm_`` do it,
without a host sync.

β 0.9/0.999, ε 1e-8, no weight decay: the defaults in force in the published inner loop. Works on the flat
row with torch's fused kernel; the clipping factor stays on the device.

How far the jobs in training are, for whoever watches: steps, and the loss of each epoch so far.

Losses stay on the device while a job trains. Reading them waits for the device, so it is done at most once a
second, whatever the number of passes in between.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from seal_nb.errors import SettingsError
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import Bank, BankRow, Segment
from seal_nb.ttt.device import Readback
from seal_nb.ttt.jobs import MicroBatch, TrainJob, TrainRow, learning_rate_at
from seal_nb.ttt.lora import Adapter, Layout, initial_weights
from seal_nb.ttt.passes import CapturedPasses, Pass

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def adamw_step(row: BankRow, *, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
    """Clip and step in place. Returns the gradient's norm before clipping, a scalar on the device."""
    norm = torch.linalg.vector_norm(row.gradient)
    divisor = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    fused_division = row.gradient.dtype == torch.float32  # the kernel divides, in float32 only
    if not fused_division:
        row.gradient.div_(divisor)
    row.steps += 1
    torch._fused_adamw_(
        [row.weights],
        [row.gradient],
        [row.mean],
        [row.square],
        [],
        [row.steps],
        lr=learning_rate,
        beta1=BETA_1,
        beta2=BETA_2,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor if fused_division else None,
    )
    row.refresh()
    return norm


PASSES_TO_RECOVER = 500  # after running out of memory until twice as much is tried
STEPS_AHEAD = 2  # passes that the host may be ahead of the device
DRAWN_AHEAD = 8  # waiting jobs whose initial weights are drawn in threads
FULL_PASS = {"cpu": 376, "cuda": 4096}  # tokens; more in a pass hardly train faster
TYPICAL_ROW = 47  # tokens of a train sequence; published self-edits after round 2, mean
BANK_SHARE = 0.4  # of a GPU's free memory that one bank may take
log = logging.getLogger(__name__)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, SettingsError) else f"{type(error).__name__}: {error}"


def usual_slots(device: torch.device) -> int:
    """As many slots as fill a pass with ordinary train sequences, one each."""
    return -(-FULL_PASS.get(device.type, FULL_PASS["cpu"]) // TYPICAL_ROW)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A job that is done: its adapter, or why there is none.

    epoch_losses: mean loss per label of each epoch, in nats; n_tokens: tokens of the train sequences and of
    computed padding, all epochs"""

    job: TrainJob
    adapter: Adapter | None = None
    error: str = ""
    epoch_losses: tuple[float, ...] = ()
    n_steps: int = 0
    n_tokens: int = 0


@dataclass(eq=False)
class Waiting:
    """A job that waits for a slot; `initial`: its weights, drawn beside the training."""

    job: TrainJob
    stack: tuple[Adapter, ...]
    initial: Future[torch.Tensor] | None = None


@dataclass(eq=False)
class Slot:
    """One job in training. `losses` holds (epoch, Σ nll, labels) of each pass; sums stay on the device
    until the end, when `outcome` brings them to the host."""

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
    adapter: Adapter | None = None
    outcome: Readback | None = None

    def rewind_window(self) -> None:
        """Forget the passes of the open accumulation window."""
        self.losses = self.losses[: len(self.losses) - self.done_in_window]
        self.done_in_window = 0
        self.row.opens_window = True

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be alike in the slots of a captured pass."""
        return id(self.row.bank), bool(self.stack), bool(self.row.settings.dropout), self.job.train.padded

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
            raise SettingsError(f"n_slots is {n_slots} and token_budget {token_budget}; both must be at least 1")
        self.base, self.n_slots, self.token_budget = base, n_slots, token_budget
        self.most = (n_slots, token_budget)
        self.n_since_short = 0
        self.waiting: deque[Waiting] = deque()
        self.slots: list[Slot] = []
        self.leaving: list[Slot] = []
        self.banks: list[Bank] = []
        self.failed: list[Trained] = []
        self.n_tokens = 0
        self.captured = CapturedPasses(base)
        on_gpu = base.device.type == "cuda"
        self.threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1) if on_gpu else 1)
        self.ahead: deque[torch.cuda.Event] = deque()
        base.trainers.add(self)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.slots or self.leaving or self.failed)

    def submit(self, job: TrainJob, stack: Sequence[Adapter] = ()) -> None:
        """Queue a job; `stack`: frozen adapters under the new one."""
        self.waiting.append(Waiting(job, tuple(stack)))

    def cancel(self, name: str) -> bool:
        """Forget the job of this name, wherever it is. False where there is none."""
        before = len(self.slots) + len(self.leaving) + len(self.waiting)
        self._release([s for s in self.slots if s.job.name == name])
        self.leaving = [s for s in self.leaving if s.job.name != name]
        self.waiting = deque(w for w in self.waiting if w.job.name != name)
        return len(self.slots) + len(self.leaving) + len(self.waiting) < before

    def step(self) -> list[Trained]:
        """One pass: fill free slots, train, return the jobs that are done."""
        self._fill()
        chosen = self._choose()
        if chosen:
            self._guarded_pass(chosen)
            self._recover()
        for slot in [s for s in self.slots if not s.window]:
            self._let_go(slot)
        here = [s for s in self.leaving if s.outcome is not None and (s.outcome.ready or not self.slots)]
        self.leaving = [s for s in self.leaving if s not in here]
        finished = self.failed + [_result(s) for s in here]
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
            self._draw_ahead()
            waiting = self.waiting.popleft()
            try:
                slot = self._open(waiting)
            except torch.OutOfMemoryError:
                slot = None
                self.n_slots = max(1, len(self.slots))
                if not self.slots:
                    error = "out of memory for a single adapter; lower lora_rank or name fewer target_modules"
                    self.failed.append(Trained(job=waiting.job, error=error))
                    continue
            except Exception as error:  # noqa: BLE001  # one job's error must not end the others'
                self.failed.append(Trained(job=waiting.job, error=_said(error)))
                continue
            if slot is None:  # no room until another job leaves
                self.waiting.appendleft(waiting)
                return
            self.slots.append(slot)
        self._draw_ahead()

    def _draw_ahead(self) -> None:
        """Initial weights take 0.1 s a job at 7B, on one core: they are drawn while others train."""
        for waiting in list(self.waiting)[:DRAWN_AHEAD]:
            if waiting.initial is None:
                waiting.initial = self.threads.submit(self._initial, waiting.job)

    def _initial(self, job: TrainJob) -> torch.Tensor:
        drawn = initial_weights(self.base.layout(job.lora), job.train.seed)
        return drawn.pin_memory() if self.base.device.type == "cuda" else drawn

    def _open(self, waiting: Waiting) -> Slot | None:
        """The job's slot; None where its bank has no free row."""
        job = waiting.job
        bank = self._bank(self.base.layout(job.lora))
        if bank.full:
            return None
        rows = job.rows(self.base.tokenizer, 0)
        n_items_R = [row.n_items for row in rows]
        if not sum(n_items_R):
            raise SettingsError(
                f"job {job.name!r}: no token carries loss; check end_mask_substring and the train sequences"
            )
        assert waiting.initial is not None
        initial = waiting.initial.result()
        row = bank.enter(job.lora, initial, dropout_seed=job.train.seed)
        upcoming = _windows(job.micro_batches(n_items_R))
        return Slot(job=job, stack=waiting.stack, row=row, rows=rows, window=next(upcoming), upcoming=upcoming)

    def _bank(self, layout: Layout) -> Bank:
        """The bank of this layout, made when needed; banks that stand empty make room for it."""
        found = next((bank for bank in self.banks if bank.layout == layout), None)
        if found is None:
            self.base.make_room()
            found = self.base.new_bank(layout, self._affordable(layout))
            self.n_slots = min(self.n_slots, len(self.slots) + found.n)
            self.banks.append(found)
        return found

    def drop_idle(self) -> None:
        """Let go of banks without jobs, and of the captured passes, which read and write banks."""
        self.banks = [bank for bank in self.banks if bank.rows]
        self.captured.forget()

    def _affordable(self, layout: Layout) -> int:
        """Rows of a new bank: one a slot, as far as a GPU's memory goes."""
        if self.base.device.type != "cuda":
            return self.n_slots
        free_bytes, _ = torch.cuda.mem_get_info(self.base.device)
        return max(1, min(self.n_slots, int(BANK_SHARE * free_bytes / self.base.bank_row_bytes(layout))))

    def _release(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.row.leave()
        self.slots = [s for s in self.slots if s not in slots]

    def _let_go(self, slot: Slot) -> None:
        """Free the slot of a job that is done; its losses and norms go to the host without a wait."""
        try:
            slot.adapter = slot.row.adapter()
        except torch.OutOfMemoryError:
            slot.adapter = None
        if slot.adapter is None:
            self.base.make_room()
            try:
                slot.adapter = slot.row.adapter()
            except torch.OutOfMemoryError:
                self._fail(slot, "out of memory for the trained adapter; lower lora_rank or n_slots")
                return
        losses = torch.stack([loss for _, loss, _ in slot.losses])
        slot.outcome = Readback(torch.cat([losses, torch.stack(slot.norms).to(losses)]))
        self._release([slot])
        self.leaving.append(slot)

    def _choose(self) -> list[Slot]:
        """Slots of the next pass: furthest behind first, so that none starves; laid out bank by bank, row
        by row."""
        chosen: list[Slot] = []
        tokens = 0
        for slot in sorted(self.slots, key=lambda s: s.step):
            if chosen and tokens + slot.waiting_tokens > self.token_budget:
                continue
            if chosen and self.captured.works and slot.kind != chosen[0].kind:
                continue  # only passes of one kind can be captured
            chosen.append(slot)
            tokens += slot.waiting_tokens
        return sorted(chosen, key=lambda s: (self.banks.index(s.row.bank), s.row.index))

    def _guarded_pass(self, chosen: list[Slot]) -> None:
        """Out of memory: halve the token budget and do the open accumulation windows again. Nothing is lost.

        A micro-batch that fails twice although it is alone fails its job.
        """
        n_tokens = sum(s.waiting_tokens for s in chosen)
        failure: Exception | None = None
        short = False
        try:
            self._pass(chosen)
        except torch.OutOfMemoryError:
            short = True
        except torch.AcceleratorError:
            raise  # nothing runs on this device any more
        except Exception as error:  # noqa: BLE001  # must not end the jobs that did not cause it
            failure = error
        for slot in chosen:
            slot.lone_failures = slot.lone_failures + 1 if short and len(chosen) == 1 else 0
        if short:
            self._retreat(chosen, n_tokens)
        elif failure is not None:
            self._find_cause(chosen, failure)

    def _find_cause(self, chosen: list[Slot], error: Exception) -> None:
        """A pass failed: each slot runs alone and without a capture; the job of one that fails is the cause.
        Where none fails, the capture is the cause, and nothing is captured from now on."""
        for slot in chosen:
            slot.rewind_window()
        captured, self.captured.works = self.captured.works, False
        if len(chosen) == 1 and not captured:
            self._fail(chosen[0], _said(error))
            return
        self.captured.forget()
        n_failed = len(self.failed)
        for slot in chosen:
            self._guarded_pass([slot])
        self.captured.works = captured and len(self.failed) > n_failed
        if captured and not self.captured.works:
            log.warning("passes are launched kernel by kernel from now on: %s", _said(error))

    def _recover(self) -> None:
        """After enough passes without running out of memory, try more slots and larger passes again."""
        self.n_since_short += 1
        if self.n_since_short >= PASSES_TO_RECOVER:
            self.n_since_short = 0
            self.n_slots = min(2 * self.n_slots, self.most[0])
            self.token_budget = min(2 * self.token_budget, self.most[1])

    def _retreat(self, chosen: list[Slot], n_tokens: int) -> None:
        self.n_since_short = 0
        for slot in chosen:
            slot.rewind_window()
        self.base.make_room()
        self.token_budget = max(1, min(self.token_budget, n_tokens) // 2)
        if chosen[0].lone_failures > 1:
            self._fail(chosen[0], f"out of memory with {n_tokens} tokens in one micro-batch; lower batch_size")

    def _fail(self, slot: Slot, error: str) -> None:
        self._release([slot])
        self.failed.append(Trained(job=slot.job, error=error, n_steps=slot.step, n_tokens=slot.n_tokens))

    def _pass(self, chosen: list[Slot]) -> None:
        pass_, start = Pass(), 0
        for slot in chosen:
            stop = start + slot.waiting_tokens
            segment = Segment(start=start, stop=stop, adapters=slot.stack, trained=slot.row)
            pass_.add(segment, slot.micro_rows, slot.micro_batch.n_items)
            start = stop
        losses = self.captured.run(pass_)
        self.n_tokens += start
        for slot, loss in zip(chosen, losses, strict=False):
            self._account(slot, loss)
        self._keep_pace()

    def _keep_pace(self) -> None:
        """Let the host be a few passes ahead of the device, so that neither waits, and no more."""
        if self.base.device.type != "cuda":
            return
        self.ahead.append(torch.cuda.Event())
        self.ahead[-1].record()
        if len(self.ahead) > STEPS_AHEAD:
            self.ahead.popleft().synchronize()

    def _account(self, slot: Slot, loss: torch.Tensor) -> None:
        """Note the pass; step the optimiser where its window closes; go to the next window."""
        settings, batch = slot.job.train, slot.micro_batch
        slot.losses.append((batch.epoch, loss, batch.n_items))
        slot.n_tokens += sum(row.n_text + len(row) - row.n_real for row in slot.micro_rows)
        slot.done_in_window += 1
        slot.row.opens_window = batch.closes_window
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
    assert slot.outcome is not None
    values = slot.outcome.tolist()
    losses, norms = values[: len(slot.losses)], values[len(slot.losses) :]
    bad = next((step for step, norm in enumerate(norms) if not math.isfinite(norm)), None)
    error = ""
    if bad is not None:
        error = f"the gradient was not finite at step {bad} of {slot.step}; lower finetune_lr"
    sums = [0.0] * slot.job.train.epochs
    for (epoch, _, n_items), loss in zip(slot.losses, losses, strict=True):
        sums[epoch] += loss * n_items
    items = max(float(sum(row.n_items for row in slot.rows)), 1.0)
    return Trained(
        job=slot.job,
        adapter=None if error else slot.adapter,
        error=error,
        epoch_losses=tuple(s / items for s in sums),
        n_steps=slot.step,
        n_tokens=slot.n_tokens,
    )


EVERY_S = 1.0


class Progress:
    """Keeps what was read last."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.every_s = every_s
        self._read_at = float("-inf")
        self._last: dict[str, dict[str, Any]] = {}

    def read(self, slots: Sequence[Slot]) -> dict[str, dict[str, Any]]:
        """By job name: ``step``, ``n_steps``, ``epoch_losses`` (nats per label; the last epoch is open).

        A loss that is not finite is None: the job is lost, and JSON has no word for it.
        """
        now = time.monotonic()
        if now - self._read_at >= self.every_s:
            self._read_at = now
            self._last = {slot.job.name: _progress(slot) for slot in slots}
        return self._last


def _progress(slot: Slot) -> dict[str, Any]:
    """An epoch that is over counts all labels of the job, as its result does; the open one, those seen."""
    losses = torch.stack([loss for _, loss, _ in slot.losses]).tolist() if slot.losses else []
    sums: dict[int, float] = {}
    seen: dict[int, float] = {}
    for (epoch, _, n_items), loss in zip(slot.losses, losses, strict=True):
        sums[epoch] = sums.get(epoch, 0.0) + loss * n_items
        # n_items is of the whole accumulation window, the loss is one micro-batch's share of it
        seen[epoch] = seen.get(epoch, 0.0) + n_items / slot.job.train.gradient_accumulation_steps
    all_labels = float(sum(row.n_items for row in slot.rows))
    seen |= {epoch: all_labels for epoch in seen if epoch < max(seen)}
    return {
        "step": slot.step,
        "n_steps": slot.job.n_steps,
        "epoch_losses": [_finite(sums[epoch] / max(seen[epoch], 1.0)) for epoch in sorted(sums)],
    }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
