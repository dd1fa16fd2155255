"""Soft scores of a request: log-probabilities of its gold answers, and of single tokens where wanted.

What the base says of a gold answer is computed once and kept; of these the newest GOLD_SCORES_KEPT stay.
"""

from seal_nb.asking import prompt_ids
from seal_nb.evaluation import Evaluation, Question
from seal_nb.protocol import ScoredText
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.score import ScoreRow, score
from seal_nb.ttt.token_scores import score_tokens, wanted_texts

GOLD_SCORES_KEPT = 100_000  # numbers; a server lives for weeks


class SoftScores:
    """Scores on one base."""

    def __init__(self, base: FrozenBase):
        self.base = base
        self.of_base: dict[tuple[Question, str], float] = {}  # by question and gold answer

    def gold_answers(
        self, evaluation: Evaluation, *, token_budget: int
    ) -> tuple[list[float], list[float], list[int]]:
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
