"""Published accuracies of SEAL (``data/published.json``): what figures draw as dashed reference lines.

All are fractions over one set of 200 SQuAD validation passages (974 questions), so they may only be drawn beside runs
over exactly these passages; `are_published_passages` tells. Qwen2.5-7B, verdicts by GPT-4.1.
"""

import hashlib
from collections.abc import Iterable

from seal_nb.passages import text_key
from seal_nb.storage import data_file, read_json

_PUBLISHED = read_json(data_file("published.json"))
SINGLE_PASSAGE: dict[str, float] = _PUBLISHED["single_passage"]  # prompt key `implications`
# Accuracy of self-edits written by the base model, after round 1, after round 2.
ROUNDS_BY_PROMPT = {key: tuple(accuracies) for key, accuracies in _PUBLISHED["rounds_by_prompt"].items()}
CPT: dict[str, float] = _PUBLISHED["cpt"]  # these runs differ from one another in learning rate and accumulation
CONTINUAL: dict[str, float] = _PUBLISHED["continual"]  # 64 sequences of 8 passages, model after round 2


def are_published_passages(titles_and_contexts: Iterable[tuple[str, str]]) -> bool:
    """Whether these are exactly the 200 passages of the published evaluation, in any order."""
    lines = sorted("\0".join(text_key(*texts)) for texts in titles_and_contexts)
    digest = hashlib.sha256("\n".join(lines).encode(errors="backslashreplace")).hexdigest()
    return bool(digest == _PUBLISHED["passages_sha256"])
