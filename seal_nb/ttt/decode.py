"""Grouped decoding: rows of many adapters and of the base in one batch, with a KV cache.

Each step gives every live row its next token in one pass of the frozen base; rows lie group by group (a
group: rows with the same adapters), so each group's low-rank branch is one small product. Finished rows
leave, waiting rows enter; until they do, a step only launches work, and on CUDA its tokens are read while the
next step runs. Greedy answers equal `transformers.generate` with the PEFT adapter; sampling draws from a
stream of each row's own, so a text does not depend on its neighbours."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from seal_nb.errors import SettingsError
from seal_nb.ttt.attention import KERNELS, Cache, make_rows
from seal_nb.ttt.base import FrozenBase, RowTokens
from seal_nb.ttt.branches import Segment, make_plan
from seal_nb.ttt.device import Readback, sent, tensor_on
from seal_nb.ttt.lora import Adapter, Layout
from seal_nb.ttt.replay import Replay, cuda_graph

BATCHES_TO_RECOVER = 8  # full batches of texts after running out of memory until twice as many rows are tried


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRow:
    """One text to generate. temperature 0 is greedy. `key` comes back with the result."""

    key: Hashable
    token_ids: Sequence[int]
    adapters: tuple[Adapter, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    @property
    def group(self) -> tuple[int, ...]:
        return tuple(id(a) for a in self.adapters)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A generated text. finish_reason: "stop" (EOS or a stop text), "length", or "failed" with an `error`."""

    key: Hashable
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str
    error: str = ""


@dataclass(eq=False)
class _Live:
    """A row in the batch: its new tokens so far, and its own uniform draws if it samples.

    place: its row of the cache, None before its first pass; rank: sorts the batch"""

    row: DecodeRow
    draws: torch.Tensor
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    place: int | None = None
    rank: tuple[bool, list[int], int] = (False, [], 0)

    @property
    def n_cached(self) -> int:
        """Tokens with keys and values: all but the newest one."""
        return len(self.row.token_ids) + max(0, len(self.new_ids) - 1)


class GroupedDecoder:
    """Generates for many rows at once. max_rows: rows in the batch at a time; prefill_tokens: prompt tokens
    of one pass."""

    def __init__(self, base: FrozenBase, *, max_rows: int = 64, prefill_tokens: int = 4096):
        if max_rows < 1 or prefill_tokens < 1:
            raise SettingsError(f"max_rows is {max_rows} and prefill_tokens {prefill_tokens}; both must be at least 1")
        self.base, self.max_rows, self.prefill_tokens = base, max_rows, prefill_tokens
        self.most = (max_rows, prefill_tokens)
        self.waiting: deque[DecodeRow] = deque()
        self.live: list[_Live] = []
        self.layouts: dict[Layout, int] = {}
        self.groups = count()
        self.n_tokens = self.n_since_short = 0
        self.reads_late = base.device.type == "cuda"
        self.replay = Replay(self._pass, cuda_graph if self.reads_late else None)
        self._clear()

    def _clear(self) -> None:
        """Let go of all that a batch holds on the device."""
        self.cache = Cache(self.base.device, self.base.dtype)
        self.plan, self.ids = make_plan(()), torch.empty(0)
        self.unread: Readback | None = None
        self.steps_left = 0
        self.replay.clear()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def submit(self, row: DecodeRow) -> None:
        if not self.busy:
            self.layouts.clear()
        self.waiting.append(row)

    def cancel(self, keys: set[Hashable]) -> None:
        """Forget rows of these keys; live ones are cut short and dropped at the next step."""
        self.waiting = deque(r for r in self.waiting if r.key not in keys)
        for lane in self.live:
            if lane.row.key in keys:
                lane.finish_reason = "cancelled"

    def run(self) -> list[Decoded]:
        done: list[Decoded] = []
        while self.busy:
            done += self.step()
        return done

    @torch.no_grad()
    def step(self) -> list[Decoded]:
        """Let waiting rows in where lanes are free and the layout is due, else one token for every live row.

        Out of memory: all rows wait again, at most half as many at a time; each gives the text it would have
        given. A row that does not fit alone comes back with `error`.
        """
        finished: list[Decoded] = []
        try:
            if self._layout_is_due():
                self._read()
                finished = self._leave()
                if entering := self._next_rows():
                    self._enter(entering)
                else:
                    self._lay_out()
            if self.steps_left:
                self._advance()
        except torch.OutOfMemoryError:
            short = True
        else:
            short = False
        return finished + (self._retreat() if short else [])

    def _layout_is_due(self) -> bool:
        """No step is left; or an eighth of the rows has finished, or a quarter of the lanes is free for
        waiting ones (a new layout costs a copy of the cache)."""
        going = sum(not lane.finish_reason for lane in self.live)
        ended = len(self.live) - going
        wanted = bool(self.waiting) and going <= self.max_rows * 3 // 4
        return not self.steps_left or wanted or ended >= max(1, len(self.live) / 8)

    def _leave(self) -> list[Decoded]:
        """Take finished lanes out; after enough of them, try more rows at a time again."""
        ended = [lane for lane in self.live if lane.finish_reason]
        self.live = [lane for lane in self.live if not lane.finish_reason]
        self.n_since_short += len(ended)
        if self.n_since_short >= BATCHES_TO_RECOVER * self.max_rows:
            self.n_since_short = 0
            self.max_rows = min(2 * self.max_rows, self.most[0])
            self.prefill_tokens = min(2 * self.prefill_tokens, self.most[1])
        return [self._decoded(lane) for lane in ended if lane.finish_reason != "cancelled"]

    def _retreat(self) -> list[Decoded]:
        done = self._leave()
        rows = [lane.row for lane in self.live]
        self.live, self.n_since_short = [], 0
        self._clear()
        self.base.make_room()
        if len(rows) == 1 and self.max_rows == 1:
            error = f"out of memory with one text of {len(rows[0].token_ids)} prompt tokens"
            return [*done, Decoded(key=rows[0].key, finish_reason="failed", error=error)]
        self.waiting.extendleft(reversed(rows))
        self.max_rows = max(1, min(self.max_rows, len(rows)) // 2)
        self.prefill_tokens = max(1, self.prefill_tokens // 2)
        return done

    def _next_rows(self) -> list[_Live]:
        """Waiting rows for which there are lanes and prompt tokens."""
        new: list[_Live] = []
        tokens = 0
        while self.waiting and len(self.live) + len(new) < self.max_rows:
            if new and tokens + len(self.waiting[0].token_ids) > self.prefill_tokens:
                break
            tokens += len(self.waiting[0].token_ids)
            new.append(_Live(self.waiting[0], _draws(self.waiting.popleft())))
        return new

    def _enter(self, new: list[_Live]) -> None:
        """Prefill, packed; each new row gets its place among the others and its first token."""
        self.steps_left, self.plan = 0, make_plan(())  # no room for two plans
        self._rank(new)
        self.live = sorted([*self.live, *new], key=lambda lane: lane.rank)
        new = [lane for lane in self.live if lane.place is None]
        self._move_cache()
        lengths = [lane.n_cached for lane in new]
        rows = make_rows(lengths, self.base.device)
        hidden = self.base.hidden(
            [RowTokens.plain(lane.row.token_ids) for lane in new],
            _segments(new, lengths),
            attend=self.cache.prefill(rows, lengths, [lane.place for lane in new if lane.place is not None]),
        )
        last = torch.tensor(lengths).cumsum(0) - 1
        logits = self._logits(hidden.index_select(0, sent(last, self.base.device)))
        self.n_tokens += sum(lengths)
        self._note(new, _Chooser(new, self.base.device)(logits).tolist())

    def _rank(self, new: Sequence[_Live]) -> None:
        """Rows with adapters before those of the base alone, layout by layout, then group by group in the
        order in which they came, so that a batch is laid out alike in every process."""
        known = {lane.row.group: lane.rank for lane in self.live}
        for lane in new:
            group, adapters = lane.row.group, lane.row.adapters
            if group not in known:
                layouts = [self.layouts.setdefault(a.layout, len(self.layouts)) for a in adapters]
                known[group] = (not adapters, layouts, next(self.groups))
            lane.rank = known[group]

    def _move_cache(self) -> int:
        """The cache follows the lanes. Returns for how many steps it has room."""
        room = self.cache.arrange([lane.place for lane in self.live], [lane.n_cached for lane in self.live])
        for i, lane in enumerate(self.live):
            lane.place = i
        return room

    def _lay_out(self) -> None:
        """All that stays the same in the next steps goes to the device."""
        if not self.live:
            return self._clear()
        self.plan = make_plan(())
        room = self._move_cache()
        self.plan = make_plan(_segments(self.live, [1] * len(self.live)))
        newest = torch.tensor([lane.new_ids[-1] for lane in self.live])
        self.ids = sent(newest, self.base.device)
        self.chooser = _Chooser(self.live, self.base.device)
        self.replay.renew()
        self.steps_left = min(room, max(lane.row.max_new_tokens - len(lane.new_ids) for lane in self.live))

    def _advance(self) -> None:
        """One token for every lane. Finished ones that have not left yet run along; what they give is
        dropped."""
        tokens = self.chooser(self.replay())
        self.ids.copy_(tokens)
        self.steps_left -= 1
        before, self.unread = self.unread, Readback(tokens)
        if before is not None:
            self._note(self.live, before.tolist())
        if not self.reads_late:
            self._read()

    def _pass(self) -> torch.Tensor:
        """Logits (lanes, vocabulary) of each lane's next token; works on the same tensors each time."""
        self.cache.advance()
        with sdpa_kernel(KERNELS):
            hidden = self.base.run(self.ids, self.cache.positions, self.plan, self.cache.attend)
        return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.base.head.weight, self.base.head.bias)

    def _read(self) -> None:
        """Note the tokens of the last pass, if that has not been done."""
        if self.unread is not None:
            self._note(self.live, self.unread.tolist())
        self.unread = None

    def _note(self, lanes: Sequence[_Live], tokens: Sequence[int]) -> None:
        """Give each lane its new token and note which lanes are done."""
        eos_ids = self.base.eos_ids
        for lane, token in zip(lanes, tokens, strict=True):
            if lane.finish_reason:
                continue
            self.n_tokens += 1
            if token in eos_ids:
                lane.finish_reason = "stop"
                continue
            lane.new_ids.append(token)
            if len(lane.new_ids) >= lane.row.max_new_tokens:
                lane.finish_reason = "length"
            if lane.row.stop and any(s in self._text(lane) for s in lane.row.stop):
                lane.finish_reason = "stop"

    def _text(self, lane: _Live) -> str:
        return self.base.tokenizer.decode(lane.new_ids, skip_special_tokens=True)

    def _decoded(self, lane: _Live) -> Decoded:
        text = self._text(lane)
        for stop in lane.row.stop:
            text = text.split(stop, 1)[0]
        return Decoded(key=lane.row.key, text=text, token_ids=tuple(lane.new_ids), finish_reason=lane.finish_reason)


def _draws(row: DecodeRow) -> torch.Tensor:
    if row.temperature == 0:
        return torch.empty(0)
    return torch.rand(row.max_new_tokens, generator=torch.Generator().manual_seed(row.seed))


def _segments(lanes: Sequence[_Live], lengths: Sequence[int]) -> list[Segment]:
    """One segment a group of neighbouring lanes with the same adapters."""
    segments, start = [], 0
    pairs = zip(lanes, lengths, strict=True)
    for _, members in groupby(pairs, key=lambda pair: pair[0].row.group):
        group = list(members)
        stop = start + sum(n for _, n in group)
        if group[0][0].row.adapters:
            segments.append(Segment(start=start, stop=stop, adapters=group[0][0].row.adapters))
        start = stop
    return segments


class _Chooser:
    """Next tokens of the same lanes, step by step: the likeliest, or by each lane's own draw within its top-p
    nucleus (arXiv 1904.09751)."""

    def __init__(self, lanes: Sequence[_Live], device: torch.device):
        sampled = [i for i, lane in enumerate(lanes) if lane.row.temperature > 0]
        rows = [lanes[i].row for i in sampled]
        draws = [lanes[i].draws[len(lanes[i].new_ids) :] for i in sampled]
        self.step = 0
        self.draws = sent(pad_sequence(draws) if draws else torch.empty(0, 0), device)  # (steps, sampled)
        self.where = tensor_on(device, sampled, torch.long)
        self.temperature = tensor_on(device, [r.temperature for r in rows], torch.float32)[:, None]
        self.top_p = tensor_on(device, [r.top_p for r in rows], torch.float32)[:, None]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (lanes, vocabulary) → (lanes,)"""
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
