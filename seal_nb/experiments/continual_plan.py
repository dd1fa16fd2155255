"""The requests of continual edits before any is made, for an estimate of what they will take.

Self-edits that the model has yet to write are stood in for by texts as long as the published ones are on
average. Nothing of this is sent.
"""

from collections.abc import Sequence

from seal_nb.experiments.continual import ContinualSettings, edit_request, unedited_request
from seal_nb.experiments.estimate import CHARACTERS_A_TOKEN
from seal_nb.experiments.single_passage import SinglePassageSettings, eval_questions, self_edit_texts
from seal_nb.passages import Passage
from seal_nb.protocol import TTTRequest

PUBLISHED_LINES, PUBLISHED_LINE_TOKENS = 8, 47  # of a self-edit, on average


def planned_requests(
    sequences: Sequence[Sequence[Passage]], settings: ContinualSettings, *, model_id: str
) -> list[TTTRequest]:
    """Row 0 and every edit of every sequence; where the texts are given, the very requests of the run."""
    requests = [unedited_request(sequence, settings, model_id=model_id) for sequence in sequences]
    for number, sequence in enumerate(sequences):
        texts: list[str] = []
        stack: list[str] = []
        for step, passage in enumerate(sequence, start=1):
            texts.append(_text(passage, settings))
            request = edit_request(number, sequence, texts, stack, settings, model_id=model_id)
            if settings.strategy == "retrieval":  # asked apart, of the adapter that is found
                seen = [question for one in sequence[:step] for question in eval_questions(one)]
                request = request.model_copy(update={"eval_questions": seen})
            stack.append(str(request.adapter_name))
            requests.append(request)
    return requests


def _text(passage: Passage, settings: ContinualSettings) -> str:
    if settings.arm != "self_edits":
        return self_edit_texts(passage, 0, SinglePassageSettings(arm=settings.arm))[0]
    n_tokens = min(settings.max_tokens, PUBLISHED_LINES * PUBLISHED_LINE_TOKENS)
    n_lines = max(1, n_tokens // PUBLISHED_LINE_TOKENS)
    return "\n".join(["x" * round(n_tokens / n_lines * CHARACTERS_A_TOKEN)] * n_lines)
