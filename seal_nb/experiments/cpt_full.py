"""CPT by full fine-tuning: all weights are trained on the train sequences, and the new model is asked.

Published CPT trains one LoRA adapter (SEAL, arXiv 2506.10943); this is ours, for who wants to know what the
low rank costs. The training is that of ``sft.train``, in processes of its own whose memory is free again
before a server of the new model answers. All of it on this machine. Resumes: a finished model is taken as it
is, an answer in the journal is not asked for again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seal_nb.errors import SettingsError
from seal_nb.experiments.control import general_questions
from seal_nb.experiments.cpt import CPTSettings
from seal_nb.experiments.run_requests import Tell, run_requests, ttt_client
from seal_nb.experiments.single_passage import identified
from seal_nb.protocol import Answers, TTTReply, TTTRequest, build_reply
from seal_nb.runs import Journal, write_text
from seal_nb.service.client import TTTClient
from seal_nb.sft.settings import SftJob, SftResult, SftSettings


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
    request: TTTRequest,
    settings: CPTSettings,
    journal: Journal,
    place: FullTraining,
    *,
    tell: Tell = lambda _: None,
) -> tuple[SftResult, Asked]:
    """The model of one arm and its answers, to the request that ``cpt_request`` made for it.

    Rows, model and logs lie in ``place.folder``. Raises: SettingsError, EngineError, RemoteError.
    """
    from seal_nb.sft.launch import train_in_processes  # torch, which method "lora" does not need here

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
        texts=reply.baseline_texts,
        verdicts=reply.baseline_verdicts,
        gold_logprobs=reply.baseline_gold_logprobs,
    )


def _write_rows(path: Path, sequences: Sequence[str]) -> Path:
    return write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in sequences))
