"""Log-probabilities of a reply: of the gold answers (`gold_scores`), and of single tokens (`token_scores`).

Single tokens show which tokens an adapter made more likely. They take two forward passes over the train sequences, the
gold answers and the passages, and no generation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from seal_nb.inner_loop.evaluation import Evaluation, Question, prompt_ids
from seal_nb.protocol import ScoredText
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.jobs import TrainJob, make_row
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.loss import ScoreRow, score

GoldScores = dict[tuple[Question, str], float]  # of the base, by question and gold answer


def gold_scores(
    base: FrozenBase, evaluation: Evaluation, known: GoldScores, *, token_budget: int
) -> tuple[list[float], list[float], list[int]]:
    """Of each gold answer its log-probability without and with the adapter, and its number of tokens.

    known: the base's scores so far; missing ones are added.
    """
    keys = [(own, q.answer) for own, q in zip(evaluation.questions, evaluation.request.eval_questions, strict=True)]
    golds = [base.encode(answer, special_tokens=False) for _, answer in keys]
    prompts = [prompt_ids(base, own) for own in evaluation.questions]
    missing = [i for i, key in enumerate(keys) if key not in known]
    rows = [ScoreRow(prompt_ids=prompts[i], target_ids=golds[i], adapters=evaluation.stack) for i in missing]
    if evaluation.adapter is not None:
        adapters = (*evaluation.stack, evaluation.adapter)
        rows += [ScoreRow(prompt_ids=p, target_ids=g, adapters=adapters) for p, g in zip(prompts, golds, strict=True)]
    sums = [sum(row) for row in score(base, rows, token_budget=token_budget)]
    known |= {keys[i]: total for i, total in zip(missing, sums, strict=False)}
    return [known[key] for key in keys], sums[len(missing) :], [len(gold) for gold in golds]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to score after a prompt. tokens: the stretch of the text of each token; scored: which get a value."""

    kind: Literal["train", "gold", "passage"]
    index: int
    token_ids: Sequence[int]
    tokens: Sequence[str]
    scored: Sequence[bool]
    prompt_ids: Sequence[int] = ()

    def row(self, adapters: tuple[Adapter, ...]) -> ScoreRow:
        """Without a prompt, the first token predicts the others."""
        ids, start = [*self.prompt_ids, *self.token_ids], max(len(self.prompt_ids), 1)
        return ScoreRow(prompt_ids=ids[:start], target_ids=ids[start:], adapters=adapters)

    def values(self, found: Sequence[float]) -> list[float | None]:
        """One value a token; None for those without a score."""
        every = [None] * (len(self.token_ids) - len(found)) + list(found)
        return [value if scored else None for value, scored in zip(every, self.scored, strict=True)]


def token_scores(base: FrozenBase, evaluation: Evaluation, *, token_budget: int) -> list[ScoredText]:
    """Train sequences, gold answers and passages, token by token, without and (if there is one) with the adapter."""
    texts = list(_texts(base, evaluation))
    stack, adapter = evaluation.stack, evaluation.adapter
    rows = [text.row(stack) for text in texts]
    if adapter is not None:
        rows += [text.row((*stack, adapter)) for text in texts]
    found = score(base, rows, token_budget=token_budget)
    values = [text.values(one) for text, one in zip(texts * 2, found, strict=False)]
    before, after = values[: len(texts)], values[len(texts) :] or [[]] * len(texts)
    return [
        ScoredText(kind=t.kind, index=t.index, tokens=list(t.tokens), baseline_logprobs=b, adapter_logprobs=a)
        for t, b, a in zip(texts, before, after, strict=True)
    ]


def _texts(base: FrozenBase, evaluation: Evaluation) -> Iterator[Text]:
    questions = evaluation.request.eval_questions
    if evaluation.trained is not None:
        yield from _train_texts(base, evaluation.trained.job)
    for i, (own, question) in enumerate(zip(evaluation.questions, questions, strict=True)):
        ids, tokens = pieces(base.tokenizer, question.answer, special_tokens=False)
        prompt = prompt_ids(base, own)
        yield Text(kind="gold", index=i, token_ids=ids, tokens=tokens, scored=[True] * len(ids), prompt_ids=prompt)
    passages: dict[str, int] = {}
    for i, question in enumerate(questions):
        if question.context:
            passages.setdefault(f"{question.title}\n{question.context}", i)
    for passage, i in passages.items():
        ids, tokens = pieces(base.tokenizer, passage)
        yield Text(kind="passage", index=i, token_ids=ids, tokens=tokens, scored=[True] * len(ids))


def _train_texts(base: FrozenBase, job: TrainJob) -> Iterator[Text]:
    """The sequences as they are trained, without their padding. Tokens without loss have no value."""
    plain = replace(job.train, padding_in_loss=False)
    for i, text in enumerate(job.texts):
        row, (ids, tokens) = make_row(base.tokenizer, text, plain), pieces(base.tokenizer, text)
        n, with_loss = row.n_text, {int(place) + 1 for place in row.sources}
        scored = [place in with_loss for place in range(n)]
        yield Text(kind="train", index=i, token_ids=ids[:n], tokens=tokens[:n], scored=scored)


def pieces(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[str]]:
    """Token ids, and the stretch of the text that each token ends. Joined, the stretches are the text.

    If a character takes several tokens, its first token has it and the others are empty.
    """
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    stretches, reached = [], 0
    for _, stop in encoded["offset_mapping"]:
        stretches.append(text[reached : max(stop, reached)])
        reached = max(stop, reached)
    return list(encoded["input_ids"]), stretches
