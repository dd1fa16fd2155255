"""Soft scores of a request: log-probabilities of its gold answers, and of single tokens where wanted.

What the base says of a gold answer is computed once and kept; of these the newest GOLD_SCORES_KEPT stay.

Which tokens an adapter made more likely: train sequences, gold answers and passages, token by token.

For whoever looks at one adapter closely; two forward passes over a few hundred tokens, no generation. Which
tokens of a train sequence carry loss is read off the row that is trained, not worked out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from seal_nb.inner_loop.evaluation import Evaluation, Question, prompt_ids
from seal_nb.protocol import EvalQuestion, ScoredText
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.jobs import TrainJob, make_row
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.loss import ScoreRow, score


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A text to score after a prompt. ``scored``: for each token whether it gets a value."""

    kind: Literal["train", "gold", "passage"]
    index: int
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    tokens: Sequence[str]
    scored: Sequence[bool]


def score_tokens(
    base: FrozenBase,
    wanted: Sequence[Wanted],
    *,
    stack: tuple[Adapter, ...] = (),
    adapter: Adapter | None = None,
    token_budget: int = 4096,
) -> list[ScoredText]:
    """Each text without and (where there is one) with the adapter, in the order asked for."""
    before = _scored(base, wanted, stack, token_budget)
    after = _scored(base, wanted, (*stack, adapter), token_budget) if adapter is not None else []
    return [
        ScoredText(
            kind=one.kind,
            index=one.index,
            tokens=list(one.tokens),
            baseline_logprobs=before[at],
            adapter_logprobs=after[at] if after else [],
        )
        for at, one in enumerate(wanted)
    ]


def wanted_texts(
    base: FrozenBase, questions: Sequence[EvalQuestion], prompts: Sequence[Sequence[int]], job: TrainJob | None
) -> list[Wanted]:
    """All texts of one request. ``prompts``: token ids of each question's prompt."""
    golds = [
        _gold(base, at, question.answer, prompt)
        for at, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
    ]
    passages: dict[tuple[str, str], int] = {}
    for at, question in enumerate(questions):
        if question.context:
            passages.setdefault((question.title, question.context), at)
    texts = [_passage(base, at, f"{title}\n{context}") for (title, context), at in passages.items()]
    return [*_train(base, job), *golds, *texts]


def pieces(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[str]]:
    """Token ids, and the stretch of the text that each one ends; the stretches together are the text.

    Of a letter that takes several tokens the first has it and the others are empty.
    """
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    stretches, reached = [], 0
    for _, stop in encoded["offset_mapping"]:
        stretches.append(text[reached : max(stop, reached)])
        reached = max(stop, reached)
    return list(encoded["input_ids"]), stretches


def _train(base: FrozenBase, job: TrainJob | None) -> list[Wanted]:
    """The sequences as they are trained, without their padding."""
    if job is None:
        return []
    plain = replace(job.train, padding_in_loss=False, pad_samples=0)
    wanted = []
    for at, text in enumerate(job.texts):
        row, (ids, tokens) = make_row(base.tokenizer, text, plain), pieces(base.tokenizer, text)
        n, with_loss = row.n_text, {int(place) + 1 for place in row.sources}
        scored = [place in with_loss for place in range(n)]
        wanted.append(
            Wanted(kind="train", index=at, prompt_ids=[], token_ids=ids[:n], tokens=tokens[:n], scored=scored)
        )
    return wanted


def _gold(base: FrozenBase, index: int, gold: str, prompt: Sequence[int]) -> Wanted:
    ids, tokens = pieces(base.tokenizer, gold, special_tokens=False)
    scored = [True] * len(ids)
    return Wanted(kind="gold", index=index, prompt_ids=prompt, token_ids=ids, tokens=tokens, scored=scored)


def _passage(base: FrozenBase, index: int, text: str) -> Wanted:
    ids, tokens = pieces(base.tokenizer, text)
    scored = [False] + [True] * (len(ids) - 1)
    return Wanted(kind="passage", index=index, prompt_ids=[], token_ids=ids, tokens=tokens, scored=scored)


def _scored(
    base: FrozenBase, wanted: Sequence[Wanted], adapters: tuple[Adapter, ...], token_budget: int
) -> list[list[float | None]]:
    """A text without a prompt is predicted from its own first token on."""
    rows = []
    for one in wanted:
        ids = [*one.prompt_ids, *one.token_ids]
        start = max(len(one.prompt_ids), 1)
        rows.append(ScoreRow(prompt_ids=ids[:start], target_ids=ids[start:], adapters=adapters))
    values = score(base, rows, token_budget=token_budget)
    return [_placed(one, found) for one, found in zip(wanted, values, strict=True)]


def _placed(one: Wanted, values: Sequence[float]) -> list[float | None]:
    first = len(one.token_ids) - len(values)
    return [values[place - first] if scored and place >= first else None for place, scored in enumerate(one.scored)]


GOLD_SCORES_KEPT = 100_000  # numbers; a server lives for weeks


class SoftScores:
    """Scores on one base."""

    def __init__(self, base: FrozenBase):
        self.base = base
        self.of_base: dict[tuple[Question, str], float] = {}  # by question and gold answer

    def gold_answers(self, evaluation: Evaluation, *, token_budget: int) -> tuple[list[float], list[float], list[int]]:
        """Of each gold answer its log-probability without and with the adapter, and its number of tokens."""
        asked = list(zip(evaluation.questions, evaluation.request.eval_questions, strict=True))
        golds = [self.base.encode(question.answer, special_tokens=False) for _, question in asked]
        rows = [(prompt_ids(self.base, own), gold) for (own, _), gold in zip(asked, golds, strict=True)]
        keys = [(own, question.answer) for own, question in asked]
        missing = [i for i, key in enumerate(keys) if key not in self.of_base]
        wanted = [_row(*rows[i], evaluation.stack) for i in missing]
        if (adapter := _adapter(evaluation)) is not None:
            wanted += [_row(*row, (*evaluation.stack, adapter)) for row in rows]
        sums = [sum(row) for row in score(self.base, wanted, token_budget=token_budget)]
        self.of_base |= {keys[i]: total for i, total in zip(missing, sums, strict=False)}
        before = [self.of_base[key] for key in keys]
        for key in list(self.of_base)[: max(0, len(self.of_base) - GOLD_SCORES_KEPT)]:
            del self.of_base[key]
        return before, sums[len(missing) :], [len(gold) for gold in golds]

    def tokens(self, evaluation: Evaluation, *, token_budget: int) -> list[ScoredText]:
        """Train sequences, gold answers and passages, token by token."""
        job = evaluation.trained.job if evaluation.trained else None
        prompts = [prompt_ids(self.base, question) for question in evaluation.questions]
        return score_tokens(
            self.base,
            wanted_texts(self.base, evaluation.request.eval_questions, prompts, job),
            stack=evaluation.stack,
            adapter=_adapter(evaluation),
            token_budget=token_budget,
        )


def _adapter(evaluation: Evaluation) -> Adapter | None:
    return evaluation.trained.adapter if evaluation.trained else None


def _row(prompt_ids: list[int], gold_ids: list[int], adapters: tuple[Adapter, ...]) -> ScoreRow:
    return ScoreRow(prompt_ids=prompt_ids, target_ids=gold_ids, adapters=adapters)
