"""Self-edits: how a model writes them, and the training sequences that one becomes.

A self-edit is the completion of a self-edit prompt. ``train_sequences`` turns it into the sequences that an adapter is
trained on, exactly as published (SEAL, ``knowledge-incorporation``: the query client), with its quirks, because they
are part of the published numbers. No model is loaded or trained here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

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
    """The training sequences of the passage-only arm: no self-edit, the passage once."""
    return train_sequences("", title=title, context=context, split_newlines=True)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One self-edit to write; ``key`` is its name in the journal."""

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
    """Write self-edits of every passage.

    Each text has a seed of its own, derived from ``seed``, its prompt and its number. A resumed run, a run with one
    passage, and a run with more self-edits therefore write the same texts.

    Args:
        engine: writes the texts.
        passages: what they are about.
        prompts: one prompt, or a family, which the self-edits of a passage use in turn.
        k_completions: self-edits of each passage.
        sampling: how to sample.
        seed: of the run.
        chat: put the prompts through the model's chat template.
        journal: saves each text as it comes. Texts that it holds are not requested again.
        tell: is called with lines of progress.

    Returns:
        The passages with the new self-edits, stripped as published, and their prompts.

    Raises:
        EngineError: texts are missing at the end; the journal has the others.
    """
    if k_completions < 1 or not prompts:
        raise SettingsError(f"{k_completions=}, {len(prompts)} prompts: both must be at least 1")
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise SettingsError(f"prompts share keys: {[prompt.key for prompt in prompts]}; give each its own")
    model_id, how = engine.model_id, asdict(sampling)
    wanted_P: list[list[_Wanted]] = []
    for passage in passages:
        wanted_P.append([])
        for nth in range(k_completions):
            prompt = prompts[nth % len(prompts)]
            asked = prompt.asked(title=passage.title, context=passage.context, chat=chat)
            key = content_id([model_id, asked, nth, seed, how])
            text_seed = derived_seed(seed, asked, nth)
            wanted_P[-1].append(_Wanted(key=key, title=passage.title, prompt=prompt, asked=asked, seed=text_seed))
    every = list({one.key: one for wanted in wanted_P for one in wanted}.values())
    texts = _texts(engine, every, sampling, journal, tell)
    return [
        _with_texts(engine, passage, wanted, [texts[one.key] for one in wanted])
        for passage, wanted in zip(passages, wanted_P, strict=True)
    ]


def _texts(
    engine: Engine,
    wanted: Sequence[_Wanted],
    sampling: Sampling,
    journal: Journal | None,
    tell: Callable[[str], None] | None,
) -> dict[str, str]:
    """The text of each key, from the journal, or from the engine and at once into the journal."""
    texts = {} if journal is None else {one.key: journal.get(one.key)["text"] for one in wanted if one.key in journal}
    missing = [one for one in wanted if one.key not in texts]

    def keep(index: int, completion: Completion) -> None:
        texts[missing[index].key] = completion.text
        if journal is not None:
            journal.append(missing[index].key, asdict(completion))
        done, total = len(texts), len(wanted)
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
    if len(texts) != len(wanted):
        raise EngineError(f"{engine.model_id} gave {len(texts)} texts, but {len(wanted)} were requested")
    return texts


def _with_texts(engine: Engine, passage: Passage, wanted: Sequence[_Wanted], texts: Sequence[str]) -> Passage:
    prompts = {one.prompt.key: engine.text_of(one.asked) for one in wanted}
    keys = [one.prompt.key for one in wanted]
    # The text of a single shipped prompt identifies it.
    has_known_text = len(prompts) == 1 and keys[0] in SELF_EDIT_PROMPTS and "/" not in keys[0]
    return replace(
        passage,
        completions=tuple(text.strip() for text in texts),
        prompt=prompts[keys[0]],
        prompts=tuple(prompts[key] for key in keys) if len(prompts) > 1 else (),
        prompt_keys=() if has_known_text else tuple(keys),
    )
