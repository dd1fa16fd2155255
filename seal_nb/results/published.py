"""Published accuracies of SEAL, as data: what figures draw as dashed reference lines.

From arXiv 2506.10943 and the run files released with it (MIT licence, Copyright (c) 2025 Adam Zweiger). All
are fractions over one set of 200 SQuAD validation passages (974 questions), so they may only be drawn beside
runs over exactly these passages; `are_published_passages` tells. Does not read files and draws nothing.
"""

import hashlib
from collections.abc import Iterable

# Single passage, prompt key `implications`. Qwen2.5-7B, verdicts by GPT-4.1.
SINGLE_PASSAGE: dict[str, float] = {
    "not adapted": 0.327,
    "passage only": 0.335,
    "self-edits, base model": 0.397,
    "self-edits, round 1": 0.427,
    "self-edits, round 2": 0.470,
    "texts of GPT-4.1": 0.463,
}

# Accuracy of self-edits written by the base model, after round 1, after round 2.
ROUNDS_BY_PROMPT: dict[str, tuple[float, ...]] = {
    "implications": (0.397, 0.427, 0.470),
    "implications-long": (0.493, 0.524, 0.544),
    "implications-very-long": (0.450, 0.515, 0.521),
    "rewrite": (0.494, 0.553, 0.556),
    "self-qa": (0.373, 0.428, 0.487),
}

# Many passages in one adapter. These runs differ from one another in learning rate and accumulation.
CPT: dict[str, float] = {
    "passage only": 0.322,
    "self-edits, base model": 0.410,
    "self-edits, round 2": 0.438,
    "texts of GPT-4.1": 0.394,
}

# 64 sequences of 8 passages drawn from the SQuAD validation set, model after round 2.
CONTINUAL: dict[str, float] = {
    "never edited": 0.307,
    "right after its own edit": 0.415,
    "all eight after the eighth edit": 0.247,
}

# sha256 over the sorted "title NUL context" of the 200 published passages, joined by newlines.
PASSAGES_SHA256 = "1ffca76e1795d022a6fb0e76aebd3f16334ee57627a7a1dcd838e7a99171f61b"


def are_published_passages(titles_and_contexts: Iterable[tuple[str, str]]) -> bool:
    """Whether these are exactly the 200 passages of the published evaluation, in any order."""
    lines = sorted(f"{title}\0{context}" for title, context in titles_and_contexts)
    return hashlib.sha256("\n".join(lines).encode(errors="backslashreplace")).hexdigest() == PASSAGES_SHA256
