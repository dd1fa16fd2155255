"""Closed-book answers of kept adapters through any engine: evaluation apart from training.

The inner loop answers where it trains; this asks adapters that lie in folders, with the same prompts and
settings (SEAL, arXiv 2506.10943: greedy, 64 tokens). Grades nothing: `grading` takes the answers.
"""

from collections.abc import Sequence
from pathlib import Path

from seal_nb.engines.base import Engine, OnText, Sampling
from seal_nb.passages import Passage
from seal_nb.prompts import answer_prompt

ANSWER_TOKENS = 64


def closed_book_answers(
    engine: Engine,
    passages: Sequence[Passage],
    adapters: Sequence[Path | None],
    *,
    max_tokens: int = ANSWER_TOKENS,
    on_text: OnText | None = None,
) -> list[list[str]]:
    """Of each adapter (None: the base) the answers to all questions of all passages, in their order,
    stripped.

    All are asked at once. ``on_text``: see Engine; the index counts questions, then adapters. Raises:
    Incomplete with those that came, EngineError.
    """
    prompts = [answer_prompt(passage.title, q.question) for passage in passages for q in passage.questions]
    n = len(prompts)
    completions = engine.generate(
        prompts * len(adapters),
        Sampling(max_tokens=max_tokens, temperature=0.0, top_p=1.0),
        seeds=[0] * (n * len(adapters)),
        adapters=[adapter for adapter in adapters for _ in range(n)],
        on_text=on_text,
    )
    answers = [completion.text.strip() for completion in completions]
    return [answers[at * n : (at + 1) * n] for at in range(len(adapters))]
