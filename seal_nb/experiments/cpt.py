"""Multi-passage evaluation (CPT): one adapter for the self-edits of many passages, as a published run file.

Or all weights in place of the adapter: method "full", ours, which ``cpt_full`` trains and asks. Pure, as
``single_passage``: passages become one request, the reply becomes a ``cpt_run_*.json``. The published
``per_article`` is keyed by title and loses passages of equal titles (200 become 47); here it keeps all
questions of a title, and ``per_passage`` has one entry a passage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.settings import ARMS, Arm, TrainingSettings
from seal_nb.experiments.single_passage import check_answers, eval_questions, identified
from seal_nb.metrics import Verdicts, accuracy, gain
from seal_nb.passages import Passage
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.runs import derived_seed
from seal_nb.self_edits import passage_only_sequences, train_sequences
from seal_nb.sft.settings import METHODS

_PUBLISHED_REPLY = {
    "baseline_accuracy", "adapter_accuracy", "adapter_gain", "baseline_texts", "adapter_texts",
    "baseline_correct", "adapter_correct", "gains",
}  # fmt: skip
_OUR_REPLY = {
    "baseline_gold_logprobs",
    "adapter_gold_logprobs",
    "epoch_losses",
    "train_steps",
    "train_tokens",
}


def published_cpt_training() -> TrainingSettings:
    """CPT as published: 3 epochs, batch 4, accumulation 2."""
    return TrainingSettings(finetune_epochs=3, batch_size=4, gradient_accumulation_steps=2)


@dataclass(frozen=True, kw_only=True)
class CPTSettings:
    """What is run; ``k_completions`` 0 is the published passage-only baseline, empty sequences and all."""

    k_completions: int = 5
    split_newlines: bool = False
    seed: int = 42
    arm: Arm = "self_edits"
    method: str = "lora"  # published; "full": all weights, with the schedule of `training` alone
    training: TrainingSettings = field(default_factory=published_cpt_training)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method={self.method!r}: known are {', '.join(METHODS)}")
        if self.method == "full":
            _refuse_what_only_adapters_have(self.training)
        if self.arm not in ARMS or self.k_completions < 0:
            raise SettingsError(
                f"{self.arm=}, {self.k_completions=}: known arms are {', '.join(ARMS)}, k >= 0"
            )

    def lora_params(self) -> dict[str, Any]:
        """The published key of a run file; without an adapter its shape is null."""
        said = self.training.lora_params()
        shape = ("rank", "alpha", "dropout", "target_modules")
        return said if self.method == "lora" else said | dict.fromkeys(shape)


def _refuse_what_only_adapters_have(training: TrainingSettings) -> None:
    for name, off in (("padding_in_loss", False), ("pad_samples", 0), ("end_mask_substring", "")):
        if (value := getattr(training, name)) != off:
            raise SettingsError(
                f"{name}={value!r} is a setting of adapters, and method is 'full'; leave it {off!r}, or "
                "choose method 'lora'"
            )


def cpt_file_name(settings: CPTSettings) -> str:
    """`cpt_run_<arm>.json`; full fine-tuning adds its name."""
    return f"cpt_run_{settings.arm}{'_full' * (settings.method == 'full')}.json"


def cpt_train_sequences(passages: Sequence[Passage], settings: CPTSettings) -> list[str]:
    """The sequences of all passages in order; a passage follows each of its k self-edits, as published."""
    return [sequence for at, passage in enumerate(passages) for sequence in _sequences(passage, at, settings)]


def _sequences(passage: Passage, index: int, settings: CPTSettings) -> list[str]:
    if settings.arm == "passage_only":
        return passage_only_sequences(title=passage.title, context=passage.context)
    texts: tuple[str, ...] = ("",)
    if settings.arm == "hand_written":
        texts = (passage.hand_written,) if passage.hand_written else ()
    elif settings.k_completions:
        texts = passage.completions[: settings.k_completions]
    if not texts:
        raise DataError(
            f"passage {passage.title!r} has nothing for the arm {settings.arm!r}",
            item=index,
            field="completions" if settings.arm == "self_edits" else "hand_written",
            remedy="run 01_create_self_edits on the items first, or choose another arm",
        )
    return [
        sequence
        for text in texts
        for sequence in train_sequences(
            text, title=passage.title, context=passage.context, split_newlines=settings.split_newlines
        )
    ]


def cpt_request(
    passages: Sequence[Passage], settings: CPTSettings, *, model_id: str, keep: bool = False
) -> TTTRequest:
    """The one request of a run, with its seed and id; `keep`: the server keeps the adapter.

    With method "full" it says what is trained on and asked, and no server is sent it.
    """
    if settings.method == "full":
        model_id, keep = f"{model_id}-full", False
    sequences = cpt_train_sequences(passages, settings)
    request = TTTRequest(
        train_sequences=sequences,
        eval_questions=[question for passage in passages for question in eval_questions(passage)],
        seed=derived_seed(settings.seed, "cpt", [passage.title for passage in passages]),
        **settings.training.request_fields(),
    )
    request = identified(request, model_id)
    if keep:
        kept = request.model_copy(update={"adapter_name": f"cpt-{request.request_id}"})
        request = identified(kept, model_id)
    return request


def build_cpt_run(
    passages: Sequence[Passage],
    request: TTTRequest,
    reply: TTTReply,
    settings: CPTSettings,
    *,
    model: str,
    dataset: str,
    timestamp: str,
) -> dict[str, Any]:
    """The CPT run file: published keys first, then per-passage results, seed and request id."""
    n_questions = sum(len(passage.questions) for passage in passages)
    check_answers(reply, n_questions)
    per_passage = per_passage_results(passages, reply.baseline_correct, reply.adapter_correct)
    return {
        "overall": build_overall(reply.baseline_correct, reply.adapter_correct),
        "timestamp": timestamp,
        "model": model,
        "dataset": dataset,
        "n_articles": len(passages),
        "k_completions": settings.k_completions,
        "split_newlines": settings.split_newlines,
        "lora_params": settings.lora_params(),
        "method": settings.method,
        "arm": settings.arm,
        "seed": settings.seed,
        "request_seed": request.seed,
        "request_id": request.request_id,
        "n_ungraded": reply.n_ungraded,
        "per_article": by_title(per_passage),
        "per_passage": per_passage,
        "train_sequences": len(request.train_sequences),
        "eval_questions": n_questions,
        "server_reply": reply.model_dump(mode="json", include=_PUBLISHED_REPLY | _OUR_REPLY),
    }


def per_passage_results(
    passages: Sequence[Passage], baseline_correct: Verdicts, adapter_correct: Verdicts
) -> list[dict[str, Any]]:
    """One entry a passage, by its index; titles repeat and are no key."""
    counts = [len(passage.questions) for passage in passages]
    baseline_P, adapter_P = (
        split_by_passage(baseline_correct, counts),
        split_by_passage(adapter_correct, counts),
    )
    return [
        {
            "index": at,
            "title": passage.title,
            "n_questions": counts[at],
            "baseline_correct": list(baseline_P[at]),
            "adapter_correct": list(adapter_P[at]),
            "baseline_accuracy": _rounded(accuracy(baseline_P[at])),
            "adapter_accuracy": _rounded(accuracy(adapter_P[at])),
        }
        for at, passage in enumerate(passages)
    ]


def split_by_passage(verdicts: Verdicts, counts: Sequence[int]) -> list[Verdicts]:
    """A flat list of verdicts cut into passages of ``counts`` questions each. Raises: DataError."""
    if len(verdicts) != sum(counts):
        raise DataError(
            f"{len(verdicts)} verdicts for {sum(counts)} questions",
            remedy="give the passages of this run, in its order",
        )
    return [verdicts[end - n : end] for end, n in zip(accumulate(counts), counts, strict=True)]


def build_overall(baseline_correct: Verdicts, adapter_correct: Verdicts) -> dict[str, float | None]:
    """Published ``overall``: 4 decimals, the gain from unrounded accuracies."""
    return {
        "baseline_accuracy": _rounded(accuracy(baseline_correct)),
        "adapter_accuracy": _rounded(accuracy(adapter_correct)),
        "gain": _rounded(gain(baseline_correct, adapter_correct)),
    }


def by_title(per_passage: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[bool | None]]]:
    """Published ``per_article``: passages of one title together."""
    by_title: dict[str, dict[str, list[bool | None]]] = {}
    for entry in per_passage:
        mine = by_title.setdefault(entry["title"], {"baseline_correct": [], "adapter_correct": []})
        for name, verdicts in mine.items():
            verdicts += entry[name]
    return by_title


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
