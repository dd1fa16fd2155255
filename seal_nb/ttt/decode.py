"""Answers: texts generated for many adapters and the base in one batch, and log-probabilities of given texts (`score`).

Rows of the same adapters are neighbours, so that their branch is one product. Between two layouts of the batch a step
only launches work. Greedy answers equal `transformers.generate` with the PEFT adapter."""

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from seal_nb.models import decode
from seal_nb.ttt.attention import KERNELS, Cache
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.branches import NO_PLAN, Plan
from seal_nb.ttt.device import Limit, Readback, cuda_graph, error_text, is_out_of_memory, sent, tensor_on, wide
from seal_nb.ttt.lora import Adapter

VOCABULARY_AT_A_TIME = 4096  # tokens whose logits are made at a time for scores
EAGER_CALLS = 2  # the first calls also load kernels and fill caches, which a recording must not do
BATCHES_TO_RECOVER = 8  # full batches of texts after running out of memory until twice as many rows are tried

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRow:
    """One text to generate from a prompt. `key` comes back with the result."""

    key: Hashable
    token_ids: Sequence[int]
    adapters: tuple[Adapter, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # of the nucleus that is sampled from (arXiv 1904.09751)
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end the generated text and are not part of it


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A generated text. finish_reason: "stop" (EOS or a stop text), "length", or "failed" with an `error`."""

    key: Hashable
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str
    error: str = ""


@dataclass(eq=False)
class LiveRow:
    """A row in the batch, with its new tokens."""

    row: DecodeRow
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    place: int | None = None  # its row of the cache, None before its first pass

    @property
    def n_cached(self) -> int:
        """Tokens with keys and values: all but the newest one."""
        return len(self.row.token_ids) + max(0, len(self.new_ids) - 1)


class GroupedDecoder:
    """Generates many texts at once. prefill_tokens: prompt tokens of a pass, fewer in smaller batches (a longer prompt
    is passed alone)"""

    def __init__(self, base: FrozenBase, *, max_rows: int = 64, prefill_tokens: int = 4096):
        self.base = base
        self.max_rows = Limit(max_rows, BATCHES_TO_RECOVER)
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[DecodeRow] = deque()
        self.live: list[LiveRow] = []
        self.seen: dict[object, int] = {}  # layouts and groups of adapters, numbered as they came
        self.n_tokens = 0
        self.reads_late = base.device.type == "cuda"
        self.record: Callable[..., tuple[Any, Tensor]] | None = cuda_graph if self.reads_late else None  # of a step
        self._clear()

    def _clear(self) -> None:
        """Free all that a batch holds on the device."""
        self.cache = Cache(self.base.device, self.base.dtype)
        self.plan, self.ids = NO_PLAN, torch.empty(0)
        self.unread: Readback | None = None
        self.steps_left = 0
        self.graph: Any = None  # a recording, whose memory the next one takes over
        self.recorded: Tensor | None = None  # what it writes to; None before it is made

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def submit(self, row: DecodeRow) -> None:
        if not self.busy:
            self.seen.clear()
        self.waiting.append(row)

    def cancel(self, chosen: Callable[[Hashable], bool]) -> None:
        """Drop rows whose keys are chosen; live ones leave at the next layout."""
        self.waiting = deque(row for row in self.waiting if not chosen(row.key))
        for live in self.live:
            if chosen(live.row.key):
                live.finish_reason = "cancelled"

    def run(self) -> list[Decoded]:
        """Step until no row is left."""
        done: list[Decoded] = []
        while self.busy:
            done += self.step()
        return done

    @torch.no_grad()
    def step(self) -> list[Decoded]:
        """Generate one token for every live row; first let waiting rows enter if a new layout is due. After an error
        all rows wait again, at most half as many at a time; each gives the text it would have given. A row that fails
        alone comes back with `error`."""
        finished: list[Decoded] = []
        failure = self.max_rows.attempt(partial(self._step, finished), work=0)
        return finished if failure is None else finished + self._start_again(failure)

    def _step(self, finished: list[Decoded]) -> None:
        if self._layout_is_due():
            self._read()
            finished += self._leave()
            if entering := self._next_rows():
                self._enter(entering)
            else:
                self._lay_out()
        if self.steps_left:
            self._advance()

    def _layout_is_due(self) -> bool:
        """No step is left, an eighth of the rows has finished, or a quarter of the places is free for waiting rows. (A
        new layout costs a copy of the cache.)"""
        n_ended = sum(bool(live.finish_reason) for live in self.live)
        can_enter = bool(self.waiting) and len(self.live) - n_ended <= self.max_rows.now * 3 // 4
        return not self.steps_left or can_enter or n_ended >= max(1, len(self.live) / 8)

    def _leave(self) -> list[Decoded]:
        """Take finished rows out of the batch."""
        ended = [live for live in self.live if live.finish_reason]
        self.live = [live for live in self.live if not live.finish_reason]
        self.max_rows.worked(len(ended) / self.max_rows.now)
        return [self._decoded(live) for live in ended if live.finish_reason != "cancelled"]

    def _start_again(self, failure: Exception) -> list[Decoded]:
        """After an error: free the batch and queue its rows first, in smaller batches."""
        done = self._leave()
        rows = [live.row for live in self.live]
        self.live = []
        self._clear()
        if short := is_out_of_memory(failure):
            self.base.make_room()
        if len(rows) == 1 and self.max_rows.now == 1:
            self.max_rows.now = 1 if short else self.max_rows.most  # the cause of another error is found
            error = error_text(failure, f"with one text of {len(rows[0].token_ids)} prompt tokens")
            return [*done, Decoded(key=rows[0].key, finish_reason="failed", error=error)]
        self.waiting.extendleft(reversed(rows))
        self.max_rows.lower(min(self.max_rows.now, len(rows)) // 2)
        return done

    def _next_rows(self) -> list[LiveRow]:
        """Waiting rows for which there are places and prompt tokens."""
        n_places = max(0, self.max_rows.now - len(self.live))
        stops = accumulate(len(row.token_ids) for row in islice(self.waiting, n_places))
        most = self.prefill_tokens * self.max_rows.now / self.max_rows.most
        n = sum(i == 0 or stop <= most for i, stop in enumerate(stops))
        return [LiveRow(self.waiting.popleft()) for _ in range(n)]

    def _enter(self, new: list[LiveRow]) -> None:
        """Prefill: pass the prompts of new rows, and give each its place in the batch and its first token."""
        self.steps_left, self.plan = 0, NO_PLAN  # no memory for two plans
        self.live += new
        self.live.sort(key=self._rank)
        new = [live for live in self.live if live.place is None]
        self._move_cache()
        lengths = [live.n_cached for live in new]
        rows, stacks = [live.row.token_ids for live in new], [live.row.adapters for live in new]
        attend = self.cache.prefill(lengths, [live.place for live in new if live.place is not None])
        hidden = self.base.hidden(rows, stacks, attend=attend)
        last = torch.tensor(lengths).cumsum(0) - 1
        logits = self._logits(hidden.index_select(0, sent(last, self.base.device)))
        self.n_tokens += sum(lengths)
        self._append(new, _Chooser(new, self.base.device)(logits).tolist())

    def _rank(self, live: LiveRow) -> tuple[bool, list[int], int]:
        """Order: rows with adapters, layout by layout, group by group as they came; then rows of the base alone. So a
        batch has the same layout in every process."""
        adapters = live.row.adapters
        layouts = [self.seen.setdefault(a.layout, len(self.seen)) for a in adapters]
        return not adapters, layouts, self.seen.setdefault(tuple(map(id, adapters)), len(self.seen))

    def _move_cache(self) -> int:
        """Arrange the cache as the live rows. Returns the number of steps for which it has room."""
        room = self.cache.arrange([live.place for live in self.live], [live.n_cached for live in self.live])
        for i, live in enumerate(self.live):
            live.place = i
        return room

    def _lay_out(self) -> None:
        """Send to the device all that stays the same in the next steps."""
        if not self.live:
            return self._clear()
        self.plan = NO_PLAN
        room = self._move_cache()
        self.plan = Plan([(1, live.row.adapters) for live in self.live], lasting=True)
        self.ids = tensor_on(self.base.device, [live.new_ids[-1] for live in self.live], torch.long)
        self.chooser = _Chooser(self.live, self.base.device)
        self.steps_left = min(room, max(live.row.max_new_tokens - len(live.new_ids) for live in self.live))
        self.recorded, self.n_calls = None, 0

    def _advance(self) -> None:
        """One token for every live row. Finished rows take part until they leave; their tokens are dropped."""
        tokens = self.chooser(self._replayed())
        self.ids.copy_(tokens)
        self.steps_left -= 1
        self._read(Readback(tokens))
        if not self.reads_late:
            self._read()

    def _replayed(self) -> Tensor:
        """As `_pass`. The third step of a layout is recorded, and the recording is replayed from then on."""
        if self.n_calls == EAGER_CALLS and self.record is not None:
            try:
                self.graph, self.recorded = self.record(self._pass, self.graph)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise  # says nothing about what can be recorded
                self.record = None
                log.warning("decoding continues without a CUDA graph: %s", error)
        self.n_calls += 1
        if self.recorded is None:
            return self._pass()
        self.graph.replay()
        return self.recorded

    def _pass(self) -> Tensor:
        """Logits (rows, vocabulary) of each row's next token. Works on the same tensors each time."""
        self.cache.advance()
        with sdpa_kernel(KERNELS):
            hidden = self.base.run(self.ids, self.cache.positions, self.plan, self.cache.attend)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.base.shape_logits(F.linear(hidden, self.base.head.weight, self.base.head.bias))

    def _read(self, newest: Readback | None = None) -> None:
        """Append the unread tokens of the last pass. newest: those of the pass just launched, for the next call."""
        before, self.unread = self.unread, newest
        if before is not None:
            self._append(self.live, before.tolist())

    def _append(self, rows: Sequence[LiveRow], tokens: Sequence[int]) -> None:
        """Give each row its new token, and set the finish reason of those that are done."""
        eos_ids = self.base.eos_ids
        for live, token in zip(rows, tokens, strict=True):
            if live.finish_reason:
                continue
            self.n_tokens += 1
            if token in eos_ids:
                live.finish_reason = "stop"
                continue
            live.new_ids.append(token)
            if len(live.new_ids) >= live.row.max_new_tokens:
                live.finish_reason = "length"
            if live.row.stop:
                self._text(live)

    def _text(self, live: LiveRow) -> str:
        """The new text up to a stop text, which ends the row. A row whose tokens cannot be decoded fails."""
        try:
            text = decode(self.base.tokenizer, live.new_ids, skip_special_tokens=True)
            for stop in live.row.stop:
                text, found, _ = text.partition(stop)
                live.finish_reason = "stop" if found else live.finish_reason
            return text
        except Exception as error:  # noqa: BLE001  # must not end the other rows
            live.finish_reason, live.error = "failed", error_text(error, "for the text")
            return ""

    def _decoded(self, live: LiveRow) -> Decoded:
        text, ids = self._text(live), tuple(live.new_ids)  # first: it may fail
        return Decoded(key=live.row.key, text=text, token_ids=ids, finish_reason=live.finish_reason, error=live.error)


class _Chooser:
    """Chooses the next tokens of rows, step by step: the likeliest, or at random from the row's nucleus."""

    def __init__(self, live: Sequence[LiveRow], device: torch.device):
        sampled = [i for i, one in enumerate(live) if one.row.temperature > 0]
        rows = [live[i].row for i in sampled]
        generators = [torch.Generator().manual_seed(r.seed) for r in rows]  # a text does not depend on its neighbours
        draws = [torch.rand(r.max_new_tokens, generator=g) for r, g in zip(rows, generators, strict=True)]
        draws = [draw[len(live[i].new_ids) :] for i, draw in zip(sampled, draws, strict=True)]
        self.step = 0
        self.draws = sent(pad_sequence(draws) if draws else torch.empty(0, 0), device)  # (steps, sampled)
        self.where = tensor_on(device, sampled, torch.long)
        self.temperature = tensor_on(device, [r.temperature for r in rows], torch.float32)[:, None]
        self.top_p = tensor_on(device, [r.top_p for r in rows], torch.float32)[:, None]

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (rows, vocabulary) → (rows,)"""
        tokens = logits.argmax(-1)
        if self.step == len(self.draws):
            return tokens
        draws = self.draws[self.step][:, None]
        self.step += 1
        chances = (logits.index_select(0, self.where).float() / self.temperature).softmax(-1)
        p, order = chances.sort(dim=-1, descending=True)
        below = p.cumsum(-1) - p  # probability of everything likelier
        mass = torch.where(below < self.top_p, p, 0).cumsum(-1)
        place = (mass <= draws * mass[:, -1:]).sum(-1).clamp(max=p.shape[-1] - 1)
        return tokens.index_copy_(0, self.where, order.gather(1, place[:, None])[:, 0])


def _logprobs(base: FrozenBase, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability (M,) of each target under hidden (M, d). The head is passed in parts of the vocabulary, each in
    float32: a product in bfloat16 moves in steps of an eighth of a nat."""
    weight, bias, dtype = base.head.weight, base.head.bias, wide(hidden.dtype)
    hidden = hidden.to(dtype)
    norm, own = hidden.new_full(targets.shape, -torch.inf), hidden.new_zeros(targets.shape)
    for i in range(0, len(weight), VOCABULARY_AT_A_TIME):
        part = slice(i, i + VOCABULARY_AT_A_TIME)
        logits = F.linear(hidden, weight[part].to(dtype), None if bias is None else bias[part].to(dtype))
        logits = base.shape_logits(logits)
        norm = torch.logaddexp(norm, logits.logsumexp(-1))
        place = (targets - i).clamp(0, logits.shape[1] - 1)
        own = torch.where(place == targets - i, logits.gather(1, place[:, None])[:, 0], own)
    return own - norm


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """A prompt and the text whose tokens are scored."""

    prompt_ids: Sequence[int]
    target_ids: Sequence[int]
    adapters: tuple[Adapter, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


@torch.no_grad()
def score(base: FrozenBase, rows: Sequence[ScoreRow], *, token_budget: Limit | None = None) -> list[list[float]]:
    """Log-probabilities, in nats, of each row's target tokens. token_budget: tokens of a pass, by default 4,096.
    Raises if memory runs out twice for one row alone."""
    results: list[list[float]] = []
    token_budget, again = token_budget or Limit(4096, math.inf, base.make_room), False
    while left := rows[len(results) :]:
        stops = accumulate(map(len, left))
        chunk = left[: max(1, sum(stop <= token_budget.now for stop in stops))]
        failure = token_budget.attempt(partial(_score_chunk, base, chunk, results), sum(map(len, chunk)) // 2)
        if failure is not None and (again or not is_out_of_memory(failure)):
            raise failure
        again = failure is not None and len(chunk) == 1
    return results


def _score_chunk(base: FrozenBase, rows: Sequence[ScoreRow], results: list[list[float]]) -> None:
    hidden = base.hidden([[*row.prompt_ids, *row.target_ids] for row in rows], [row.adapters for row in rows])
    ends = accumulate(map(len, rows))
    sources = [i - 1 for row, end in zip(rows, ends, strict=True) for i in range(end - len(row.target_ids), end)]
    targets = tensor_on(base.device, [t for row in rows for t in row.target_ids], torch.long)
    hidden = hidden.index_select(0, tensor_on(base.device, sources, torch.long))
    found = iter(_logprobs(base, hidden, targets).tolist())
    results += [list(islice(found, len(row.target_ids))) for row in rows]
