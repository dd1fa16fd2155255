"""Multi-passage evaluation (CPT): one adapter for the self-edits of many passages, asked about all of them (`cpt`).

Passages become one request for each arm, the reply becomes a `cpt_run_*.json` as published (SEAL, arXiv 2506.10943).
The published `per_article` is keyed by title and loses passages of equal titles (200 become 47); here it keeps all
questions of a title, and `per_passage` has one entry for each passage. Method "full" is ours: all weights are trained
by `sft.train` in processes of their own, and a server of the new model is asked. A finished model is used again, and
an answer in the journal is not asked for again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_nb.errors import SettingsError
from seal_nb.experiments.control import ask_control, control_frame, general_questions
from seal_nb.experiments.session import TTT, ask_named, identified, loop_request, tell_work
from seal_nb.experiments.settings import ARMS, Arm, Training, names_in, texts_of_arm
from seal_nb.experiments.single_passage import Arms, arm_sequences, check_answers, eval_questions
from seal_nb.passages import Passage
from seal_nb.protocol import Answers, TTTReply, TTTRequest, build_reply
from seal_nb.results.cpt import CptRun
from seal_nb.results.published import CPT
from seal_nb.sft.settings import METHODS, SftJob, SftResult, SftSettings
from seal_nb.storage import Journal, derived_seed, runs_folder, write_json, write_record, write_text
from seal_nb.views.live import Teller

if TYPE_CHECKING:
    import pandas as pd

_PUBLISHED_REPLY = {
    "baseline_accuracy", "adapter_accuracy", "adapter_gain", "baseline_texts", "adapter_texts",
    "baseline_correct", "adapter_correct", "gains",
}  # fmt: skip
_OUR_REPLY = {"baseline_gold_logprobs", "adapter_gold_logprobs", "epoch_losses", "train_steps", "train_tokens"}


def published_cpt_training() -> Training:
    """CPT as published: 3 epochs, batch 4, accumulation 2."""
    return Training(finetune_epochs=3, batch_size=4, gradient_accumulation_steps=2)


@dataclass(frozen=True, kw_only=True)
class CPTSettings:
    """What is run; ``k_completions`` 0 is the published passage-only baseline, empty sequences and all."""

    k_completions: int = 5
    split_newlines: bool = False
    seed: int = 42
    arm: Arm = "self_edits"
    method: str = "lora"  # published; "full": all weights, with the schedule of `training` alone
    training: Training = field(default_factory=published_cpt_training)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(f"method={self.method!r}: known are {', '.join(METHODS)}")
        for name, off in (("padding_in_loss", False), ("end_mask_substring", "")):
            if self.method == "full" and (value := getattr(self.training, name)) != off:
                raise SettingsError(
                    f"{name}={value!r} is a setting of adapters, and method is 'full'; leave it {off!r}, or "
                    "choose method 'lora'"
                )
        if self.arm not in ARMS or self.k_completions < 0:
            raise SettingsError(f"{self.arm=}, {self.k_completions=}: known arms are {', '.join(ARMS)}, k >= 0")

    def lora_params(self) -> dict[str, Any]:
        """The published key of a run file; without an adapter its shape is null."""
        params = self.training.lora_params()
        shape = ("rank", "alpha", "dropout", "target_modules")
        return params if self.method == "lora" else params | dict.fromkeys(shape)


def cpt_file_name(settings: CPTSettings) -> str:
    """`cpt_run_<arm>.json`; full fine-tuning adds its name."""
    return f"cpt_run_{settings.arm}{'_full' * (settings.method == 'full')}.json"


class Cpt(Arms[CptRun]):
    """What `cpt` returns: the runs by arm, with tables and figures. Every question counts once."""

    published = CPT

    def __init__(
        self,
        passages: Sequence[Passage],
        runs: Mapping[str, CptRun],
        losses: Mapping[str, Sequence[float | None]],
        control: Mapping[str, TTTReply],
    ) -> None:
        super().__init__(passages, runs, losses)
        self._control = control

    def unrelated(self) -> "pd.DataFrame":
        """Accuracy on general questions of the base and of each arm; empty unless they were asked."""
        return control_frame(self._control)


def cpt(
    ttt: TTT,
    passages: Sequence[Passage],
    *,
    arms: str | Sequence[str] = ("passage_only", "self_edits"),
    method: str = "lora",
    training: Training | None = None,
    k_completions: int = 5,
    split_newlines: bool = False,
    check_unrelated: bool = False,
    n_processes: int = 1,
    n_threads: int = 1,
    seed: int = 42,
    folder: str | Path = "runs/cpt",
    dataset: str = "",
    price_per_hour: float = 0.0,
) -> Cpt:
    """Train one adapter (or with method "full" one model) for each arm on all passages; ask all questions.

    Args:
        ttt: the server (`ttt_server` or `connect`). With method "full" it must have been started here; it answers for
            the untouched model and is then closed, so that the training has the memory.
        passages: with questions; the arm `self_edits` needs their completions.
        arms: of passage_only, self_edits, hand_written.
        method: "lora" (published), or "full": all weights, on this machine.
        training: settings; published CPT (3 epochs, batch 4, accumulation 2) unless given.
        k_completions: self-edits used of each passage; 0 is the published passage-only baseline.
        split_newlines: each line of a self-edit is a train sequence (published: no).
        check_unrelated: ask twenty general questions of the base and of each arm.
        n_processes: of the training with method "full", one GPU each.
        n_threads: CPU threads of one of these processes.
        seed: of the training.
        folder: for run files, their records and the journal; a second call asks only for what is missing.
        dataset: name of the data, for the run files.
        price_per_hour: of the server; adds the cost to the line that says how much work it is.

    Returns:
        The runs by arm. Their run files (`cpt_run_<arm>.json`) are in `folder`.

    Raises:
        DataError: for a passage without what an arm needs.
        SettingsError: for settings that do not fit.
        RemoteError: when a training failed on the server.

    Source: SEAL, arXiv 2506.10943, continued pretraining.
    """
    folder = runs_folder(folder)
    settings = {
        name: CPTSettings(
            arm=name,  # type: ignore[arg-type]
            method=method,
            k_completions=k_completions,
            split_newlines=split_newlines,
            seed=seed,
            training=training or published_cpt_training(),
        )
        for name in names_in("arms", arms)
    }
    if method == "full" and ttt.server is None:
        raise SettingsError(
            f"endpoint is {ttt.client.where!r}, and method 'full' trains and asks a model on this machine; "
            "leave endpoint empty, or choose method 'lora'"
        )
    requests = {
        arm: cpt_request(passages, one, model_id=ttt.model_id, keep=check_unrelated) for arm, one in settings.items()
    }
    control: dict[str, TTTReply] = {}
    with Journal(folder / "journal.jsonl") as journal:
        if method == "lora":
            tell_work(ttt, list(requests.values()), journal, price_per_hour=price_per_hour)
            replies = ask_named(ttt, requests, journal)
            if check_unrelated:
                stacks = {arm: [str(request.adapter_name)] for arm, request in requests.items()}
                first = next(iter(settings.values()))
                control = ask_control(ttt, journal, stacks, first.training, seed=seed)
        else:
            assert ttt.server is not None
            for one in settings.values():
                sft_settings(one, seed=seed, n_processes=n_processes)  # refuses what does not fit before any training
            served, model_id = ttt.server.settings, ttt.model_id
            asked = questions_only(next(iter(requests.values())), model_id, check_unrelated)
            before = ask_named(ttt, asked, journal, what="questions")
            if check_unrelated:
                control["never edited"] = before["control"]
            ttt.close()
            replies = {}
            for arm, one in settings.items():
                how = {"model": served.model, "folder": folder, "n_processes": n_processes, "n_threads": n_threads}
                trained, model_dir = train_all_weights(requests[arm], one, **how)  # type: ignore[arg-type]
                Teller()(f"{arm}: {trained.n_steps} steps of all weights")
                asked = questions_only(requests[arm], str(requests[arm].request_id), check_unrelated)
                after = _ask_model(str(model_dir), asked, journal, ttt, folder / f"server_{arm}_full")
                replies[arm] = full_reply(requests[arm], before["answers"], after["answers"], trained)
                if check_unrelated:
                    control[arm] = after["control"]
    about = {"model": ttt.model_id, "dataset": Path(dataset).name, "timestamp": f"{datetime.now(UTC):%m%d_%H%M%S}"}
    runs = {}
    for arm, one in settings.items():
        value = build_cpt_run(passages, requests[arm], replies[arm], one, **about)
        path = write_json(folder / cpt_file_name(one), value)
        write_record(path, stage="04_cpt", settings=asdict(one), seeds={"seed": seed})
        runs[arm] = CptRun(value=value, path=path, passages=passages)
    return Cpt(passages, runs, {arm: replies[arm].epoch_losses for arm in settings}, control)


def _ask_model(
    model: str, asked: Mapping[str, TTTRequest], journal: Journal, ttt: TTT, folder: Path
) -> dict[str, TTTReply]:
    """The questions put to a model folder, by a server like `ttt`'s; none is started where all are journalled."""
    if all(str(request.request_id) in journal for request in asked.values()):
        return {name: TTTReply.model_validate(journal.get(str(one.request_id))) for name, one in asked.items()}
    assert ttt.settings is not None
    with ttt.another(model, folder=folder, n_workers=ttt.settings.n_workers) as server:
        return ask_named(server, asked, journal, what="questions")


def cpt_train_sequences(passages: Sequence[Passage], settings: CPTSettings) -> list[str]:
    """The sequences of all passages in order; a passage follows each of its k self-edits, as published."""
    sequences: list[str] = []
    for at, passage in enumerate(passages):
        texts: Sequence[str] = [""]  # k_completions 0: the published passage-only baseline
        if settings.arm != "self_edits" or settings.k_completions:
            texts = texts_of_arm(settings.arm, passage, at, k_completions=settings.k_completions or 1)
        for text in texts:
            sequences += arm_sequences(settings.arm, text, passage, split_newlines=settings.split_newlines)
    return sequences


def cpt_request(passages: Sequence[Passage], settings: CPTSettings, *, model_id: str, keep: bool = False) -> TTTRequest:
    """The one request of a run, with its seed and id; `keep`: the server keeps the adapter. With method "full" it says
    what is trained on and asked, and no server is sent it."""
    is_full = settings.method == "full"
    return loop_request(
        f"{model_id}-full" if is_full else model_id,
        settings.training,
        texts=cpt_train_sequences(passages, settings),
        questions=[question for passage in passages for question in eval_questions(passage)],
        keep="cpt" if keep and not is_full else "",
        seed=derived_seed(settings.seed, "cpt", [passage.title for passage in passages]),
    )


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
    check_answers(reply, len(request.eval_questions))
    value = {
        "overall": {},
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
        "n_ungraded": 0,
        "per_article": {},
        "per_passage": [],
        "train_sequences": len(request.train_sequences),
        "eval_questions": len(request.eval_questions),
        "server_reply": reply.model_dump(mode="json", include=_PUBLISHED_REPLY | _OUR_REPLY),
    }
    CptRun(value=value, passages=passages).fill_statistics()
    return value


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


def questions_only(request: TTTRequest, asked_of: str, control: bool) -> dict[str, TTTRequest]:
    """The questions of a run without its training, and with `control` the general ones; `asked_of`: the model."""
    plain = request.model_copy(update={"train_sequences": [], "skip_training": True})
    requests = {"answers": identified(plain, asked_of)}
    if control:
        general = plain.model_copy(update={"eval_questions": general_questions()})
        requests["control"] = identified(general, asked_of)
    return requests


def train_all_weights(
    request: TTTRequest, settings: CPTSettings, *, model: str, folder: Path, n_processes: int, n_threads: int
) -> tuple[SftResult, Path]:
    """Train the model of one arm on the request's sequences; the result and the new model's folder."""
    from seal_nb.sft.train import run_job

    name = f"{settings.arm}_full"
    rows = "".join(json.dumps({"text": text}) + "\n" for text in request.train_sequences)
    job = SftJob(
        sft_file=write_text(folder / f"cpt_train_{name}.jsonl", rows),
        model=model,
        model_dir=folder / f"model_{name}",
        settings=sft_settings(settings, seed=int(request.seed or 0), n_processes=n_processes),
        n_threads=n_threads,
    )
    return run_job(job, n_processes=n_processes), job.model_dir


def full_reply(request: TTTRequest, before: TTTReply, after: TTTReply, trained: SftResult) -> TTTReply:
    """Answers of the base and of the new model as the reply to one request. A model as it is has its answers on the
    baseline's side of its reply."""
    base, new = (
        Answers(texts=one.baseline_texts, verdicts=one.baseline_verdicts, gold_logprobs=one.baseline_gold_logprobs)
        for one in (before, after)
    )
    return build_reply(
        baseline=base,
        adapter=new,
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
