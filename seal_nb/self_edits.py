"""Self-edits: how a model writes them, and the training sequences that one becomes.

The sequences are exactly those of the published query client (SEAL, ``knowledge-incorporation``), with its quirks,
because they are part of the published numbers."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice

from seal_nb.engines.base import Completion, Engine, Incomplete, Prompt, Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.passages import Passage
from seal_nb.prompts import SELF_EDIT_PROMPTS, SelfEditPrompt
from seal_nb.storage import Journal, content_id, derived_seed

_NEXT_PAIR = re.compile(r"\n(?=Question \d+:)")
_NUMBERED_QUESTION = re.compile(r"^Question \d+:", re.MULTILINE)


def sequences_of_text(completion: str, *, title: str, context: str, split_newlines: bool) -> list[str]:
    """The training sequences of one self-edit. Each is title, newline, text; the last one is the passage. After an
    empty self-edit it is alone with ``split_newlines``, and follows an empty part without. ``split_newlines``: make a
    sequence of each line, or of each "Question 1: …\\nAnswer: …" pair if the self-edit has such pairs; otherwise of
    each part between ``---``. Published: True for single passages, False for CPT."""
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


def write_self_edits(
    engine: Engine,
    passages: Sequence[Passage],
    *,
    prompts: Sequence[SelfEditPrompt],
    k_completions: int,
    sampling: Sampling,
    seed: int,
    chat: bool = False,
    journal: Journal | None = None,
    on_start: Callable[[Sequence[Prompt]], None] = lambda _: None,
    on_text: Callable[[int, int], None] = lambda *_: None,
) -> tuple[list[Passage], list[Completion]]:
    """The passages with `k_completions` new self-edits each, for which `prompts` take turns, and the texts of the call.

    Each text has a seed of its own, from `seed`, its prompt and its number, so that a resumed run, a run with one
    passage, and a run with more self-edits write the same texts. `journal` keeps each text as it comes; a text that it
    has is not requested again. `on_start` gets the prompts of the other texts, `on_text` how many of how many texts
    there are. Raises: EngineError where texts are missing in the end."""
    if k_completions < 1 or not prompts:
        raise SettingsError(f"{k_completions=}, {len(prompts)} prompts: both must be at least 1")
    if len({prompt.key for prompt in prompts}) < len(prompts):
        raise SettingsError(f"prompts share keys: {[prompt.key for prompt in prompts]}; give each its own")

    turns = list(islice(cycle(prompts), k_completions))
    asked_P_K = [[turn.asked(title=one.title, context=one.context, chat=chat) for turn in turns] for one in passages]
    keys_P_K, wanted = [list[str]() for _ in passages], dict[str, tuple[str, Prompt, int]]()
    for passage, asked_K, keys_K in zip(passages, asked_P_K, keys_P_K, strict=True):
        for nth, asked in enumerate(asked_K):
            keys_K.append(content_id([engine.model_id, asked, nth, seed, asdict(sampling)]))
            wanted[keys_K[-1]] = passage.title, asked, derived_seed(seed, asked, nth)
    texts = {key: Completion(**journal.get(key)) for key in wanted if key in journal} if journal is not None else {}
    missing = [key for key in wanted if key not in texts]
    titles, asked_M, seeds_M = zip(*(wanted[key] for key in missing), strict=True) if missing else ((), (), ())
    on_start(asked_M)

    def keep(index: int, completion: Completion) -> None:
        texts[missing[index]] = completion
        if journal is not None:
            fields = asdict(completion)
            journal.append(missing[index], {name: value for name, value in fields.items() if value != ()})
        on_text(len(texts), len(wanted))

    try:
        if missing:
            engine.generate(asked_M, sampling, seeds=seeds_M, on_text=keep)
    except Incomplete as error:
        of = ", ".join(dict.fromkeys(titles[index] for index in error.failures))
        kept = "" if journal is None else "; the others are in the journal, run again to get the missing ones"
        raise EngineError(f"{error}{kept}; missing are self-edits of: {of}") from error
    if len(texts) != len(wanted):
        raise EngineError(f"{engine.model_id} gave {len(texts)} texts, but {len(wanted)} were requested")

    names = tuple(turn.key for turn in turns)
    is_family = len(set(names)) > 1
    has_known_text = not is_family and names[0] in SELF_EDIT_PROMPTS and "/" not in names[0]  # which names its prompt
    written = []
    for passage, asked_K, keys_K in zip(passages, asked_P_K, keys_P_K, strict=True):
        shown = tuple(map(engine.text_of, asked_K))
        one = replace(
            passage,
            # A model may write the character NUL, which no item file may hold.
            completions=tuple(texts[key].text.strip().replace("\0", "\ufffd") for key in keys_K),
            prompt=shown[0],
            prompts=shown if is_family else (),
            prompt_keys=() if has_known_text else names,
        )
        written.append(one)
    return written, [texts[key] for key in wanted]
