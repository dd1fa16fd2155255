"""Which passage a question is about: BM25 (Robertson & Zaragoza 2009), no index, no library.

For a handful of passages, as in a sequence of continual edits. The topic line of a question is left out:
with the title in it, choosing would be no task.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from seal_nb.passages import Passage

K1, B = 1.5, 0.75  # the customary values
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


class Bm25:
    """Scores of a question against some passages, title and text."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.counts_P = [Counter(words(f"{one.title} {one.context}")) for one in passages]
        lengths = [sum(counts.values()) for counts in self.counts_P]
        mean = sum(lengths) / len(lengths) if lengths else 0.0
        self.norms_P = [K1 * (1 - B + B * length / mean) if mean else K1 for length in lengths]

    def scores(self, question: str) -> list[float]:
        """One for each passage; 0.0 where they share no word."""
        totals = [0.0] * len(self.counts_P)
        for word in set(words(question)):
            holding = sum(word in counts for counts in self.counts_P)
            rarity = math.log(1 + (len(self.counts_P) - holding + 0.5) / (holding + 0.5))
            for at, (counts, norm) in enumerate(zip(self.counts_P, self.norms_P, strict=True)):
                totals[at] += rarity * counts[word] * (K1 + 1) / (counts[word] + norm)
        return totals

    def best(self, question: str) -> int | None:
        """The passage with the highest score, the first of equals; None where no word is shared."""
        scores = self.scores(question)
        top = max(scores, default=0.0)
        return scores.index(top) if top > 0 else None
