"""Multi-passage evaluation (CPT): one adapter for the self-edits of many passages, as a published run file.

Or all weights in place of the adapter: method "full", ours, which ``cpt_full`` trains and asks. Pure, as
``single_passage``: passages become one request, the reply becomes a ``cpt_run_*.json``. The published
``per_article`` is keyed by title and loses passages of equal titles (200 become 47); here it keeps all
questions of a title, and ``per_passage`` has one entry a passage.

CPT by full fine-tuning: all weights are trained on the train sequences, and the new model is asked.

Published CPT trains one LoRA adapter (SEAL, arXiv 2506.10943); this is ours, for who wants to know what the
low rank costs. The training is that of ``sft.train``, in processes of its own whose memory is free again
before a server of the new model answers. All of it on this machine. Resumes: a finished model is taken as it
is, an answer in the journal is not asked for again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.control import general_questions
from seal_nb.experiments.session import Tell, run_requests, ttt_client
from seal_nb.experiments.settings import ARMS, Arm, TrainingSettings
from seal_nb.experiments.single_passage import check_answers, eval_questions, identified
from seal_nb.passages import Passage
from seal_nb.protocol import Answers, TTTReply, TTTRequest, build_reply
from seal_nb.results.cpt import build_overall, by_title, per_passage_results
from seal_nb.self_edits import passage_only_sequences, train_sequences
from seal_nb.server.client import TTTClient
from seal_nb.sft.settings import METHODS, SftJob, SftResult, SftSettings
from seal_nb.storage import Journal, derived_seed, write_text

_PUBLISHED_REPLY = {
    "baseline_accuracy", "adapter_accuracy", "adapter_gain", "baseline_texts", "adapter_texts",
    "baseline_correct", "adapter_correct", "gains",
}  # fmt: skip
_OUR_REPLY = {"baseline_gold_logprobs", "adapter_gold_logprobs", "epoch_losses", "train_steps", "train_tokens"}


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
            raise SettingsError(f"{self.arm=}, {self.k_completions=}: known arms are {', '.join(ARMS)}, k >= 0")

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


def cpt_request(passages: Sequence[Passage], settings: CPTSettings, *, model_id: str, keep: bool = False) -> TTTRequest:
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


@dataclass(frozen=True, kw_only=True)
class FullTraining:
    """Where all weights are trained and asked. ``server``: what TTTServer takes beside model and run_dir.

    ``check_unrelated``: ask the twenty general questions too.
    """

    model: str
    folder: Path
    server: Mapping[str, Any]
    endpoint: str = ""  # there must be none
    n_processes: int = 1  # of the training, one GPU each
    n_threads: int = 1  # of one of them, on a CPU
    check_unrelated: bool = False

    def __post_init__(self) -> None:
        if self.endpoint:
            raise SettingsError(
                f"endpoint is {self.endpoint!r}, and method 'full' trains and asks a model on this machine; "
                "leave endpoint empty, or choose method 'lora'"
            )
        if self.n_processes < 1:
            raise SettingsError(f"n_processes is {self.n_processes}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one model answered; ``control``: to the general questions, where they were asked."""

    answers: TTTReply
    control: TTTReply | None


def sft_settings(settings: CPTSettings, *, seed: int, n_processes: int = 1) -> SftSettings:
    """The schedule of a CPT run as one of all weights. Raises: SettingsError, before anything is trained."""
    training = settings.training
    sft = SftSettings(
        method="full",
        epochs=training.finetune_epochs,
        learning_rate=training.finetune_lr,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_seq_length=training.max_seq_length,
        seed=seed,
    )
    sft.accumulation_of(n_processes)
    return sft


def ask_model(
    client: TTTClient, request: TTTRequest, journal: Journal, *, asked_of: str, control: bool, tell: Tell
) -> Asked:
    """The questions of ``request`` put to the server's model as it is, once. Raises: RemoteError.

    ``asked_of``: names the model in the journal; ``control``: put the general questions too.
    """
    requests = questions_only(request, asked_of, control)
    run_requests(client, requests, journal, what="questions", tell=tell).in_order(requests)
    return _journalled(journal, requests)


def questions_only(request: TTTRequest, asked_of: str, control: bool) -> list[TTTRequest]:
    """The questions of a run without its training, and the general ones; ids of their own."""
    plain = request.model_copy(update={"train_sequences": [], "skip_training": True})
    asked = [identified(plain, asked_of)]
    if control:
        general = plain.model_copy(update={"eval_questions": general_questions()})
        asked.append(identified(general, asked_of))
    return asked


def train_and_ask(
    request: TTTRequest, settings: CPTSettings, journal: Journal, place: FullTraining, *, tell: Tell = lambda _: None
) -> tuple[SftResult, Asked]:
    """The model of one arm and its answers, to the request that ``cpt_request`` made for it.

    Rows, model and logs lie in ``place.folder``. Raises: SettingsError, EngineError, RemoteError.
    """
    from seal_nb.sft.launch import train_in_processes

    name = f"{settings.arm}_full"
    job = SftJob(
        sft_file=_write_rows(place.folder / f"cpt_train_{name}.jsonl", request.train_sequences),
        model=place.model,
        model_dir=place.folder / f"model_{name}",
        settings=sft_settings(settings, seed=int(request.seed or 0), n_processes=place.n_processes),
        n_threads=place.n_threads,
    )
    result = train_in_processes(job, n_processes=place.n_processes)
    tell(f"{settings.arm}: {result.n_steps} steps of all weights")
    requests = questions_only(request, str(request.request_id), place.check_unrelated)
    missing = [one for one in requests if str(one.request_id) not in journal]
    if missing:
        where: dict[str, Any] = {"run_dir": place.folder / f"server_{name}", "model": str(job.model_dir)}
        with ttt_client("", **where, **place.server) as client:
            run_requests(client, missing, journal, what="questions", tell=tell).in_order(missing)
    return result, _journalled(journal, requests)


def full_reply(request: TTTRequest, before: TTTReply, after: TTTReply, trained: SftResult) -> TTTReply:
    """Answers of the base and of the new model as the reply to one request; no adapter made them."""
    return build_reply(
        baseline=_answers(before),
        adapter=_answers(after),
        request_id=request.request_id,
        seed=request.seed,
        gold_token_counts=after.gold_token_counts,
        train_tokens=trained.n_tokens,
        train_steps=trained.n_steps,
        epoch_losses=epoch_means(trained.losses, request.finetune_epochs),
        model_id=after.model_id,
    )


def epoch_means(losses: Sequence[float], n_epochs: int) -> list[float]:
    """Mean loss of each epoch; every epoch has as many steps."""
    n = len(losses) // n_epochs
    return [sum(losses[at * n : (at + 1) * n]) / n for at in range(n_epochs)] if n else []


def _journalled(journal: Journal, requests: Sequence[TTTRequest]) -> Asked:
    answers, *rest = (TTTReply.model_validate(journal.get(str(one.request_id))) for one in requests)
    return Asked(answers=answers, control=rest[0] if rest else None)


def _answers(reply: TTTReply) -> Answers:
    """Those of a model as it is; they stand on the baseline's side."""
    return Answers(
        texts=reply.baseline_texts, verdicts=reply.baseline_verdicts, gold_logprobs=reply.baseline_gold_logprobs
    )


def _write_rows(path: Path, sequences: Sequence[str]) -> Path:
    return write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in sequences))
