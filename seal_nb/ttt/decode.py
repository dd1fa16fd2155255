"""Grouped decoding: rows of many adapters and of the base in one batch, with a KV cache.

Each step gives every live row its next token in one pass of the frozen base; rows lie group by group (a
group: rows with the same adapters), so each group's low-rank branch is one small product. Finished rows
leave, waiting rows enter. Greedy answers equal `transformers.generate` with the PEFT adapter; sampling
draws from a stream of each row's own, so a text does not depend on its neighbours."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch.nn import functional as F

from seal_nb.ttt.base import FrozenBase, RowTokens
from seal_nb.ttt.branches import Segment, make_plan
from seal_nb.ttt.kv_cache import Cache, Prefill
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.packing import make_rows


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
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    error: str = ""


@dataclass(eq=False)
class _Live:
    """A row in the batch: its new tokens so far, and its own uniform draws if it samples."""

    row: DecodeRow
    draws: torch.Tensor
    new_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


class GroupedDecoder:
    """Generates for many rows at once. max_rows: rows in the batch at a time; prefill_tokens: prompt tokens
    of one pass."""

    def __init__(self, base: FrozenBase, *, max_rows: int = 64, prefill_tokens: int = 4096):
        self.base, self.max_rows, self.prefill_tokens = base, max_rows, prefill_tokens
        self.waiting: deque[DecodeRow] = deque()
        self.live: list[_Live] = []
        self.cache = Cache.empty()
        self.n_tokens = 0
        self.ranks: dict[tuple[int, ...], int] = {}

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def submit(self, row: DecodeRow) -> None:
        if not self.busy:
            self.ranks.clear()
        self.ranks.setdefault(row.group, len(self.ranks))
        self.waiting.append(row)

    def cancel(self, keys: set[Hashable]) -> None:
        """Forget rows of these keys; live ones are cut short and dropped at the next step."""
        self.waiting = deque(r for r in self.waiting if r.key not in keys)
        for lane in self.live:
            if lane.row.key in keys:
                lane.finish_reason = "cancelled"

    @torch.no_grad()
    def step(self) -> list[Decoded]:
        """Let waiting rows in where enough lanes are free, else one token for every live row.

        Out of memory: all rows wait again, at most half as many at a time; each gives the text it would have
        given. A row that does not fit alone comes back with `error`.
        """
        finished = self._leave()
        entering = self._next_rows() if len(self.live) <= self.max_rows * 3 // 4 else []
        try:
            if entering:
                self._enter(entering)
            elif self.live:
                self._advance()
        except torch.OutOfMemoryError:
            short = True
        else:
            short = False
        return finished + (self._retreat(entering) if short else self._leave())

    def _retreat(self, entering: list[_Live]) -> list[Decoded]:
        lanes = self.live + [lane for lane in entering if lane not in self.live]
        done = [self._decoded(lane) for lane in lanes if lane.finish_reason in ("stop", "length")]
        rows = [lane.row for lane in lanes if not lane.finish_reason]
        self.live, self.cache = [], Cache.empty()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(rows) == 1:
            error = f"out of memory with one text of {len(rows[0].token_ids)} prompt tokens"
            return [
                *done,
                Decoded(key=rows[0].key, text="", token_ids=(), finish_reason="failed", error=error),
            ]
        self.waiting.extendleft(reversed(rows))
        self.max_rows = max(1, min(self.max_rows, len(rows)) // 2)
        self.prefill_tokens = max(1, self.prefill_tokens // 2)
        return done

    def run(self) -> list[Decoded]:
        done: list[Decoded] = []
        while self.busy:
            done += self.step()
        return done

    def _next_rows(self) -> list[_Live]:
        """Waiting rows for which there are lanes and prompt tokens, group by group."""
        new: list[_Live] = []
        tokens = 0
        while self.waiting and len(self.live) + len(new) < self.max_rows:
            if new and tokens + len(self.waiting[0].token_ids) > self.prefill_tokens:
                break
            tokens += len(self.waiting[0].token_ids)
            new.append(_Live(self.waiting[0], _draws(self.waiting.popleft())))
        return sorted(new, key=self._rank)

    def _rank(self, lane: _Live) -> int:
        """Groups in the order in which they came, so that a batch is laid out alike in every process."""
        return self.ranks[lane.row.group]

    def _enter(self, new: list[_Live]) -> None:
        """Prefill, packed; each row gets its first token and a place in the cache."""
        lengths = [len(lane.row.token_ids) for lane in new]
        prefill = Prefill(make_rows(lengths, self.base.device), lengths)
        hidden = self.base.hidden(
            [RowTokens.plain(lane.row.token_ids) for lane in new],
            _segments(new, lengths),
            attend=prefill.attend,
        )
        last = torch.tensor(lengths, device=self.base.device).cumsum(0) - 1
        self._append(new, hidden[last])
        self.n_tokens += sum(lengths)
        self.cache = self.cache.joined(prefill.cache(self.base.device))
        self._reorder(self.live + new)

    def _reorder(self, lanes: list[_Live]) -> None:
        """Lanes group by group; the cache follows."""
        order = sorted(range(len(lanes)), key=lambda i: self._rank(lanes[i]))
        self.live = [lanes[i] for i in order]
        if order != list(range(len(order))):
            self.cache = self.cache.selected(order)

    def _advance(self) -> None:
        """One token for every lane; finished ones that have not left yet run along, their cache unchanged."""
        going = torch.tensor([not lane.finish_reason for lane in self.live], device=self.base.device)
        ids = torch.tensor([(lane.new_ids or [0])[-1] for lane in self.live], device=self.base.device)
        room = max(len(lane.row.token_ids) + lane.row.max_new_tokens for lane in self.live)
        attend = self.cache.opened(room)
        plan = make_plan(_segments(self.live, [1] * len(self.live)))
        hidden = self.base.run(ids, self.cache.lengths, plan, attend)
        self.cache.lengths += going
        self._append(self.live, hidden)

    def _append(self, lanes: list[_Live], hidden: torch.Tensor) -> None:
        """Choose each lane's next token from hidden (lanes, d) and note which lanes are done."""
        logits = F.linear(hidden, self.base.head.weight, self.base.head.bias).float()
        self.n_tokens += len(lanes)
        for lane, token in zip(lanes, _choose(logits, lanes).tolist(), strict=True):
            if lane.finish_reason:
                continue
            if token in self.base.eos_ids:
                lane.finish_reason = "stop"
                continue
            lane.new_ids.append(token)
            if len(lane.new_ids) >= lane.row.max_new_tokens:
                lane.finish_reason = "length"
            if lane.row.stop and any(s in self._text(lane) for s in lane.row.stop):
                lane.finish_reason = "stop"

    def _leave(self) -> list[Decoded]:
        """Take finished lanes out, once an eighth of the batch is finished (each time costs a copy of the
        cache)."""
        ended = [lane for lane in self.live if lane.finish_reason]
        if not ended or len(ended) < len(self.live) / 8:
            return []
        kept = [i for i, lane in enumerate(self.live) if not lane.finish_reason]
        self.live = [self.live[i] for i in kept]
        self.cache = self.cache.selected(kept)
        return [self._decoded(lane) for lane in ended if lane.finish_reason != "cancelled"]

    def _text(self, lane: _Live) -> str:
        return self.base.tokenizer.decode(lane.new_ids, skip_special_tokens=True)

    def _decoded(self, lane: _Live) -> Decoded:
        text = self._text(lane)
        for stop in lane.row.stop:
            text = text.split(stop, 1)[0]
        return Decoded(
            key=lane.row.key, text=text, token_ids=tuple(lane.new_ids), finish_reason=lane.finish_reason
        )


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


def _choose(logits: torch.Tensor, lanes: Sequence[_Live]) -> torch.Tensor:
    """Next token (lanes,): the likeliest, or by each lane's own draw within its top-p nucleus (arXiv
    1904.09751)."""
    tokens = logits.argmax(-1)
    sampled = [i for i, lane in enumerate(lanes) if lane.row.temperature > 0 and not lane.finish_reason]
    if not sampled:
        return tokens
    where = torch.tensor(sampled, device=logits.device)
    rows = [lanes[i].row for i in sampled]
    draws = torch.stack([lanes[i].draws[len(lanes[i].new_ids)] for i in sampled]).to(logits.device)
    temperature = torch.tensor([r.temperature for r in rows], device=logits.device)
    top_p = torch.tensor([r.top_p for r in rows], device=logits.device)
    p, order = (logits[where] / temperature[:, None]).softmax(-1).sort(dim=-1, descending=True)
    below = p.cumsum(-1) - p  # probability of everything likelier
    mass = torch.where(below < top_p[:, None], p, 0).cumsum(-1)
    place = (mass <= (draws * mass[:, -1])[:, None]).sum(-1).clamp(max=p.shape[-1] - 1)
    tokens[where] = order.gather(1, place[:, None])[:, 0]
    return tokens
