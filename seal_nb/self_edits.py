"""Self-edits: having a model write them, and what one becomes as training text.

A self-edit is the completion of a self-edit prompt. ``train_sequences`` turns it into the sequences an
adapter is trained on, exactly as published (SEAL, ``knowledge-incorporation``: the query client), with its
quirks, since they are part of the published numbers. Nothing is trained here, and no model is loaded.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from seal_nb.engines.base import Completion, Engine, Incomplete, Prompt, Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.passages import Passage
from seal_nb.prompts import SELF_EDIT_PROMPTS, SelfEditPrompt
from seal_nb.storage import Journal, content_id, derived_seed

TOLD_TIMES = 10  # lines of progress at most, so that an executed notebook stays short

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
    prompts: Sequence[SelfEditPrompt],
    k_completions: int,
    sampling: Sampling,
    seed: int,
    chat: bool = False,
    journal: Journal | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Passage]:
    """Every passage with ``k_completions`` new self-edits and what they complete.

    The self-edits of a passage take turns with ``prompts`` (one, or a family). Each text has a seed of its
    own, derived from ``seed``, its prompt and its number: a resumed run, one for one passage, or one for more
    self-edits writes the same texts. Each goes into ``journal`` as it comes, and what is there is not asked
    for again. ``chat``: through the model's chat template. Completions are stripped, as published.

    Raises: EngineError when texts are missing in the end; those that came are in the journal.
    """
    if k_completions < 1 or not prompts:
        raise SettingsError(f"{k_completions=}, {len(prompts)} prompts: both must be at least 1")
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise SettingsError(f"prompts share keys: {[prompt.key for prompt in prompts]}; give each its own")
    taking_turns = [prompts[nth % len(prompts)] for nth in range(k_completions)]
    model_id, how = engine.model_id, asdict(sampling)
    wanted_P: list[list[_Wanted]] = []
    for passage in passages:
        wanted_P.append([])
        for nth, prompt in enumerate(taking_turns):
            asked = prompt.asked(title=passage.title, context=passage.context, chat=chat)
            key = content_id([model_id, asked, nth, seed, how])
            wanted_P[-1].append(_Wanted(key=key, passage=passage, prompt=prompt, asked=asked, nth=nth))
    every = {one.key: one for wanted in wanted_P for one in wanted}
    texts = _texts(engine, every, sampling, seed, journal, tell)
    return [_with_texts(engine, wanted, [texts[one.key] for one in wanted]) for wanted in wanted_P]


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One self-edit to be written, the ``nth`` of its passage; ``key`` is its name in the journal."""

    key: str
    passage: Passage
    prompt: SelfEditPrompt
    asked: Prompt
    nth: int


def _texts(
    engine: Engine,
    wanted: Mapping[str, _Wanted],
    sampling: Sampling,
    seed: int,
    journal: Journal | None,
    tell: Callable[[str], None] | None,
) -> dict[str, str]:
    """The text of each key, from the journal, or from the engine and at once into the journal."""
    texts: dict[str, str] = {}
    if journal is not None:
        texts = {key: journal.get(key)["text"] for key in wanted if key in journal}
    missing = {key: one for key, one in wanted.items() if key not in texts}
    keys, asked = list(missing), list(missing.values())

    def keep(index: int, completion: Completion) -> None:
        texts[keys[index]] = completion.text
        if journal is not None:
            journal.append(keys[index], asdict(completion))
        if tell is not None and _is_told(len(texts), len(wanted)):
            tell(f"self-edits: {len(texts)} of {len(wanted)}")

    seeds = [derived_seed(seed, one.asked, one.nth) for one in asked]
    try:
        if asked:
            engine.generate([one.asked for one in asked], sampling, seeds=seeds, on_text=keep)
    except Incomplete as error:
        titles = ", ".join(dict.fromkeys(asked[index].passage.title for index in error.failures))
        kept = "" if journal is None else "; those that came are in the journal, run again for the others"
        raise EngineError(f"{error}{kept}; missing are self-edits of: {titles}") from error
    if len(texts) != len(wanted):
        raise EngineError(f"{engine.model_id} gave {len(texts)} texts where {len(wanted)} were asked for")
    return texts


def _is_told(done: int, total: int) -> bool:
    return done * TOLD_TIMES // total > (done - 1) * TOLD_TIMES // total


def _with_texts(engine: Engine, wanted: Sequence[_Wanted], texts: Sequence[str]) -> Passage:
    """The passage with its self-edits, stripped, and their prompts as the model saw them."""
    prompts = {one.prompt.key: engine.text_of(one.asked) for one in wanted}
    keys = [one.prompt.key for one in wanted]
    is_told_by_text = len(prompts) == 1 and keys[0] in SELF_EDIT_PROMPTS and "/" not in keys[0]
    return replace(
        wanted[0].passage,
        completions=tuple(text.strip() for text in texts),
        prompt=prompts[keys[0]],
        prompts=tuple(prompts[key] for key in keys) if len(prompts) > 1 else (),
        prompt_keys=() if is_told_by_text else tuple(keys),
    )
