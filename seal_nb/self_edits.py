"""Self-edits: having a model write them, and what one becomes as training text.

A self-edit is the completion of a self-edit prompt. ``train_sequences`` turns it into the sequences an
adapter is trained on, exactly as published (SEAL, ``knowledge-incorporation``: the query client), with its
quirks, since they are part of the published numbers. Nothing is trained here, and no model is loaded.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from seal_nb.engines.base import Engine, Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.passages import Passage
from seal_nb.prompts import self_edit_prompt
from seal_nb.runs import Journal, content_id, derived_seed

_SEPARATOR = "---"
_NEXT_PAIR = re.compile(r"\n(?=Question \d+:)")
_NUMBERED_QUESTION = re.compile(r"^Question \d+:", re.MULTILINE)
_FIRST_PAIR_OPENING = "Question 1: "


def train_sequences(completion: str, *, title: str, context: str, split_newlines: bool) -> list[str]:
    """The training sequences of one self-edit: each is title, newline, text; the passage is the last.

    ``split_newlines`` (published: on for single passages, off for CPT) makes a sequence of every line, or of
    every question-answer pair where the self-edit has them; without it, of every part between ``---``.
    An empty self-edit gives the passage alone with ``split_newlines``, and an empty part before it without.
    """
    texts = _lines_or_pairs(completion) if split_newlines else _parts(completion)
    return [f"{title}\n{text}" for text in [*texts, context.strip()]]


def passage_only_sequences(*, title: str, context: str) -> list[str]:
    """The training sequences of the passage-only arm: no self-edit, the passage once."""
    return train_sequences("", title=title, context=context, split_newlines=True)


def _lines_or_pairs(completion: str) -> list[str]:
    if "\nAnswer:" in completion and _NUMBERED_QUESTION.search(completion):
        return _question_answer_pairs(completion.strip())
    lines = [line.strip() for part in _parts(completion) for line in part.splitlines() if line.strip()]
    opens_with_preamble = len(lines) > 1 and lines[1].startswith("1.")
    return lines[1:] if opens_with_preamble else lines


def _question_answer_pairs(text: str) -> list[str]:
    """The pairs, the first with its "Question 1:" put back, which stood in the prompt."""
    first, *others = _NEXT_PAIR.split(text)
    if not first.startswith("Question"):
        first = _FIRST_PAIR_OPENING + first.strip()
    return [first, *others]


def _parts(completion: str) -> list[str]:
    parts = [part.strip() for part in completion.split(_SEPARATOR)]
    return [part for part in parts if part] or [completion.strip()]


def create_self_edits(
    engine: Engine,
    passages: Sequence[Passage],
    *,
    prompt_key: str,
    k_completions: int,
    sampling: Sampling,
    seed: int,
    journal: Journal | None = None,
    passages_per_call: int = 16,
    tell: Callable[[str], None] | None = None,
) -> list[Passage]:
    """Every passage with ``k_completions`` new self-edits and the prompt they complete.

    The engine is asked for ``passages_per_call`` passages at a time. Each text has a seed of its own, derived
    from ``seed`` and its prompt: a resumed run, or one for one passage, writes the same texts. What
    ``journal`` holds is not generated again. Completions are stripped, as published.

    Raises: EngineError when the engine fails or returns another number of texts than was asked for.
    """
    if k_completions < 1 or passages_per_call < 1:
        raise SettingsError(f"{k_completions=}, {passages_per_call=}: both must be at least 1")
    written: list[Passage] = []
    for start in range(0, len(passages), passages_per_call):
        group = passages[start : start + passages_per_call]
        prompts = [self_edit_prompt(prompt_key, title=p.title, context=p.context) for p in group]
        texts = _generated(engine, prompts, k_completions, sampling, seed, journal)
        for passage, prompt, own in zip(group, prompts, texts, strict=True):
            written.append(replace(passage, completions=tuple(own), prompt=prompt))
        if tell is not None:
            tell(f"passages: {len(written)} of {len(passages)}")
    return written


def _generated(
    engine: Engine, prompts: list[str], k: int, sampling: Sampling, seed: int, journal: Journal | None
) -> list[list[str]]:
    """k texts for each prompt, from the journal, or from the engine and then into the journal."""
    known: dict[str, list[str]] = {}
    keys = {prompt: content_id([engine.model_id, prompt, k, seed, asdict(sampling)]) for prompt in prompts}
    if journal is not None:
        known = {prompt: journal.get(key) for prompt, key in keys.items() if key in journal}
    missing = [prompt for prompt in keys if prompt not in known]
    asked = [(prompt, derived_seed(seed, prompt, i)) for prompt in missing for i in range(k)]
    completions = (
        engine.generate([p for p, _ in asked], sampling, seeds=[s for _, s in asked]) if asked else []
    )
    if len(completions) != len(asked):
        raise EngineError(f"{engine.model_id} returned {len(completions)} texts for {len(asked)} prompts")
    for at, prompt in enumerate(missing):
        known[prompt] = [c.text.strip() for c in completions[at * k : (at + 1) * k]]
        if journal is not None:
            journal.append(keys[prompt], known[prompt])
    return [known[prompt] for prompt in prompts]
