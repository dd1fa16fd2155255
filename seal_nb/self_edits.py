"""Self-edits: how a model writes them, and the training sequences that one becomes.

A self-edit is the completion of a self-edit prompt. ``train_sequences`` turns it into the sequences that an adapter is
trained on, exactly as published (SEAL, ``knowledge-incorporation``: the query client), with its quirks, because they
are part of the published numbers. No model is loaded or trained here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from seal_nb.engines.base import Completion, Engine, Incomplete, Prompt, Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.passages import Passage
from seal_nb.prompts import SELF_EDIT_PROMPTS, SelfEditPrompt
from seal_nb.storage import Journal, content_id, derived_seed

PROGRESS_LINES = 10  # at most, to keep an executed notebook short
_NEXT_PAIR = re.compile(r"\n(?=Question \d+:)")
_NUMBERED_QUESTION = re.compile(r"^Question \d+:", re.MULTILINE)


def train_sequences(completion: str, *, title: str, context: str, split_newlines: bool) -> list[str]:
    """The training sequences of one self-edit. Each is title, newline, text; the last one is the passage.

    Args:
        completion: the self-edit. If it is empty, the passage is alone with ``split_newlines``, and follows an empty
            part without.
        title: of the passage.
        context: the passage.
        split_newlines: make a sequence of each line, or of each "Question 1: …\\nAnswer: …" pair if the self-edit has
            such pairs; otherwise of each part between ``---``. Published: True for single passages, False for CPT.
    """
    parts = [part.strip() for part in completion.split("---")]
    texts = [part for part in parts if part] or [completion.strip()]
    if split_newlines and "\nAnswer:" in completion and _NUMBERED_QUESTION.search(completion):
        texts = _NEXT_PAIR.split(completion.strip())
        if not texts[0].startswith("Question"):  # the first number was the end of the prompt
            texts[0] = f"Question 1: {texts[0].strip()}"
    elif split_newlines:
        texts = [line.strip() for part in texts for line in part.splitlines() if line.strip()]
        if len(texts) > 1 and texts[1].startswith("1."):  # the first line introduces the list
            texts = texts[1:]
    return [f"{title}\n{text}" for text in [*texts, context.strip()]]


def passage_only_sequences(*, title: str, context: str) -> list[str]:
    return train_sequences("", title=title, context=context, split_newlines=True)


class _Wanted(NamedTuple):
    """One self-edit to write; `key` is its name in the journal."""

    key: str
    title: str
    prompt: SelfEditPrompt
    asked: Prompt
    seed: int


def create_self_edits(
    engine: Engine,
    passages: Sequence[Passage],
    *,
    prompts: Sequence[SelfEditPrompt],
    k_completions: int,
    sampling: Sampling,
    seed: int,
    chat: bool = False,
    journal: Journal | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Passage]:
    """The passages with `k_completions` new self-edits each, for which `prompts` take turns.

    Each text has a seed of its own, from `seed`, its prompt and its number, so that a resumed run, a run with one
    passage, and a run with more self-edits write the same texts. `journal` keeps each text as it comes; a text that it
    has is not requested again. Raises: EngineError where texts are missing in the end.
    """
    if k_completions < 1 or not prompts:
        raise SettingsError(f"{k_completions=}, {len(prompts)} prompts: both must be at least 1")
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise SettingsError(f"prompts share keys: {[prompt.key for prompt in prompts]}; give each its own")

    def wanted_of(passage: Passage, nth: int) -> _Wanted:
        prompt = prompts[nth % len(prompts)]
        asked = prompt.asked(title=passage.title, context=passage.context, chat=chat)
        key = content_id([engine.model_id, asked, nth, seed, asdict(sampling)])
        return _Wanted(key, passage.title, prompt, asked, derived_seed(seed, asked, nth))

    wanted_P = [[wanted_of(passage, nth) for nth in range(k_completions)] for passage in passages]
    every = {one.key: one for wanted in wanted_P for one in wanted}
    texts = {key: journal.get(key)["text"] for key in every if key in journal} if journal is not None else {}
    missing = [one for key, one in every.items() if key not in texts]

    def keep(index: int, completion: Completion) -> None:
        texts[missing[index].key] = completion.text
        if journal is not None:
            journal.append(missing[index].key, asdict(completion))
        done, total = len(texts), len(every)
        if tell is not None and done * PROGRESS_LINES // total > (done - 1) * PROGRESS_LINES // total:
            tell(f"self-edits: {done} of {total}")

    try:
        if missing:
            seeds = [one.seed for one in missing]
            engine.generate([one.asked for one in missing], sampling, seeds=seeds, on_text=keep)
    except Incomplete as error:
        titles = ", ".join(dict.fromkeys(missing[index].title for index in error.failures))
        kept = "" if journal is None else "; the others are in the journal, run again to get the missing ones"
        raise EngineError(f"{error}{kept}; missing are self-edits of: {titles}") from error
    if len(texts) != len(every):
        raise EngineError(f"{engine.model_id} gave {len(texts)} texts, but {len(every)} were requested")
    return [
        _with_texts(engine, passage, wanted, [texts[one.key].strip() for one in wanted])
        for passage, wanted in zip(passages, wanted_P, strict=True)
    ]


def _with_texts(engine: Engine, passage: Passage, wanted: Sequence[_Wanted], texts: Sequence[str]) -> Passage:
    prompts, keys = [engine.text_of(one.asked) for one in wanted], [one.prompt.key for one in wanted]
    is_family = len(set(keys)) > 1
    has_known_text = not is_family and keys[0] in SELF_EDIT_PROMPTS and "/" not in keys[0]  # which names its prompt
    return replace(
        passage,
        completions=tuple(texts),
        prompt=prompts[0],
        prompts=tuple(prompts) if is_family else (),
        prompt_keys=() if has_known_text else tuple(keys),
    )
