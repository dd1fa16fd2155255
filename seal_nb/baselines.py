"""The base's answers to questions: each generated once, however many requests ask it, and kept.

A server lives for weeks, so only the newest BASELINES_KEPT stay, some 50 MB of questions and answers of
published length. A question whose answer was forgotten is answered once more.
"""

import itertools

from seal_nb.evaluation import Question

BASELINES_KEPT = 100_000  # answers


class Baselines:
    """Answers by question; a question that is being answered is in here without one."""

    def __init__(self) -> None:
        self._answers: dict[Question, str | None] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, question: Question) -> bool:
        """It has been answered, or is being answered."""
        return question in self._answers

    def get(self, question: Question) -> str | None:
        return self._answers.get(question)

    def asked(self, question: Question) -> None:
        self._answers[question] = None

    def answered(self, question: Question, text: str) -> None:
        """Keep it, and forget the oldest if there are too many."""
        self._answers[question] = text
        for key in list(itertools.islice(self._answers, max(0, len(self) - BASELINES_KEPT))):
            if self._answers[key] is not None:  # others wait for what is being answered
                del self._answers[key]

    def failed(self, question: Question) -> None:
        del self._answers[question]
