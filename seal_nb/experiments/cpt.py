"""Multi-passage evaluation (CPT): one adapter for the self-edits of many passages, asked about all of them (`cpt`).

The run file is as published (SEAL, arXiv 2506.10943), but the published `per_article` loses passages of equal titles
(200 become 47): here it keeps all questions of a title, and `per_passage` has one entry for each passage. Method "full"
is ours: `sft.train` trains all weights in processes of its own, and a server of the new model is asked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from seal_nb.errors import SettingsError
from seal_nb.experiments import session
from seal_nb.experiments.session import TTT, ask_named, loop_request
from seal_nb.experiments.settings import CptArm, Match, Training, arm_texts, check_asked, names_in
from seal_nb.experiments.single_passage import Arms, arm_sequences, check_answers, eval_questions
from seal_nb.passages import Passage, asked
from seal_nb.protocol import Answers, TTTReply, TTTRequest, build_reply
from seal_nb.results.run import CPT
from seal_nb.results.single_passage import CptRun
from seal_nb.settings import Settings, setting
from seal_nb.sft.settings import SftJob, SftSettings
from seal_nb.storage import Journal, derived_seed, runs_folder, write_json, write_record, write_text
from seal_nb.views.live import say

_KEPT_OF_REPLY = {  # as published, then ours
    "baseline_accuracy", "adapter_accuracy", "adapter_gain", "baseline_texts", "adapter_texts", "baseline_correct",
    "adapter_correct", "gains",
    "baseline_gold_logprobs", "adapter_gold_logprobs", "epoch_losses", "train_steps", "train_tokens",
}  # fmt: skip
Replies = Mapping[str, TTTReply]
PUBLISHED_TRAINING = Training(finetune_epochs=3, batch_size=4, gradient_accumulation_steps=2)


@dataclass(frozen=True, kw_only=True)
class CPTSettings(Settings):
    """What is run; ``k_completions`` 0 is the published passage-only baseline, empty sequences and all."""

    k_completions: int = setting(5, least=0)
    split_newlines: bool = False
    seed: int = 42
    arm: CptArm = "self_edits"
    match: Match = "none"
    method: Literal["lora", "full"] = "lora"  # published; "full": all weights, with the schedule of `training` alone
    training: Training = PUBLISHED_TRAINING

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, off in (("padding_in_loss", False), ("end_mask_substring", "")):
            if self.method == "full" and (value := getattr(self.training, name)) != off:
                raise SettingsError(f"{name}={value!r} is a setting of adapters and method is 'full'; leave it {off!r}")


class Cpt(Arms[CptRun]):
    """What `cpt` returns: the runs by arm, with tables and figures. Every question counts once."""

    published = CPT

    def __init__(self, runs: Mapping[str, CptRun], replies: Replies, control: Replies) -> None:
        super().__init__(runs, {arm: reply.epoch_losses for arm, reply in replies.items()})
        self.control = control  # the replies to general questions

    def unrelated(self) -> pd.DataFrame:
        """Accuracy on general questions of the base and of each arm; empty unless they were asked."""
        return session.control_frame(self.control)


def cpt(
    ttt: TTT,
    passages: Sequence[Passage],
    *,
    arms: str | Sequence[str] = ("passage_only", "self_edits"),
    method: str = "lora",
    training: Training | None = None,
    match: Match = "none",
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
        arms: of passage_only, self_edits, hand_written, and the control passage_matched (the passages alone, for as
            many steps as the longest arm).
        method: "lora" (published), or "full": all weights, on this machine.
        training: settings; published CPT (3 epochs, batch 4, accumulation 2) unless given.
        match: "steps" or "tokens" repeats the epochs of shorter arms until they cost as much as the longest; "none"
            (published): each arm has the same epochs.
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
        DataError: for a passage without what an arm needs, and for passages without any question.
        SettingsError: for settings that do not fit.
        RemoteError: when a training failed on the server.
        RoundTimeout: when the server went away and did not come back.

    Source: SEAL, arXiv 2506.10943, continued pretraining."""
    training = training or PUBLISHED_TRAINING
    given, folder = locals(), runs_folder(folder)
    check_asked(passages)
    settings = {name: CPTSettings.from_parameters(given, arm=name) for name in names_in("arms", arms)}
    if method == "full" and ttt.server is None:
        why = "method 'full' trains and asks a model on this machine"
        raise SettingsError(f"endpoint is {ttt.where!r}, and {why}; leave endpoint empty, or choose method 'lora'")
    for one in settings.values():  # refuses what does not fit, before a server starts
        cpt_train_sequences(passages, one)
        if method == "full":
            sft_settings(one, n_processes=n_processes)
    with Journal(folder / "journal.jsonl") as journal:
        how: dict[str, Any] = {"model_id": ttt.model_id, "keep": check_unrelated}
        requests = {arm: cpt_request(passages, one, **how) for arm, one in settings.items()}
        planned = [(arm, 0, request) for arm, request in requests.items()]  # all arms have the same passages
        model_id = f"{ttt.model_id}-full" if method == "full" else ttt.model_id  # as in `cpt_request`
        requests = dict(zip(requests, session.matched(planned, match, model_id=model_id), strict=True))
        if method == "full":
            own: dict[str, Any] = {"check_unrelated": check_unrelated, "n_processes": n_processes}
            replies, control = full_replies(ttt, requests, settings, journal, folder, n_threads=n_threads, **own)
        else:
            replies, control = ask_named(ttt, requests, journal, work="to do", price_per_hour=price_per_hour), {}
            if check_unrelated:
                stacks = {arm: [str(request.adapter_name)] for arm, request in requests.items()}
                control = session.ask_control(ttt, journal, stacks, training, seed=seed)
    about = {"model": ttt.model_id, "dataset": Path(dataset).name, "timestamp": f"{datetime.now(UTC):%m%d_%H%M%S}"}
    runs = {}
    for arm, one in settings.items():
        value = build_cpt_run(passages, requests[arm], replies[arm], one, **about)
        path = write_json(folder / f"cpt_run_{arm}{'_full' if method == 'full' else ''}.json", value)
        write_record(path, stage="04_cpt", settings=asdict(one), seeds={"seed": seed})
        runs[arm] = CptRun(value=value, path=path, passages=passages)
    return Cpt(runs, replies, control)


def cpt_train_sequences(passages: Sequence[Passage], settings: CPTSettings) -> list[str]:
    """The sequences of all passages in order; a passage follows each of its k self-edits, as published."""
    sequences: list[str] = []
    is_baseline = settings.arm == "self_edits" and not settings.k_completions  # the published one, passages only
    for at, passage in enumerate(passages):
        k = settings.k_completions or 1
        for text in [""] if is_baseline else arm_texts(settings.arm, passage, at, k_completions=k):
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
        questions=eval_questions(*passages, answer_style=settings.training.answer_style),
        keep="cpt" if keep and not is_full else "",
        seed=derived_seed(settings.seed, "cpt", [passage.title for passage in passages]),
    )


def build_cpt_run(
    passages: Sequence[Passage], request: TTTRequest, reply: TTTReply, settings: CPTSettings, **about: str
) -> dict[str, Any]:
    """The CPT run file: published keys first, then per-passage results, seed and request id. `about`: timestamp, model,
    dataset."""
    check_answers(reply, len(request.eval_questions))
    lora_params = settings.training.lora_params()
    if settings.method == "full":  # there is no adapter
        lora_params |= dict.fromkeys(("rank", "alpha", "dropout", "target_modules"))
    value: dict[str, Any] = {
        "overall": {},
        **{name: about[name] for name in ("timestamp", "model", "dataset")},
        "n_articles": len(passages),
        "k_completions": settings.k_completions,
        "split_newlines": settings.split_newlines,
        "lora_params": lora_params,
        "method": settings.method,
        "arm": settings.arm,
        "match": settings.match,
        "seed": settings.seed,
        "finetune_epochs": request.finetune_epochs,
        "request_seed": request.seed,
        "request_id": request.request_id,
        "n_ungraded": 0,
        "per_article": {},
        "per_passage": [],
        "passages": [
            {"title": one.title, "context": one.context, "questions": [asked(question) for question in one.questions]}
            for one in passages
        ],
        "train_sequences": len(request.train_sequences),
        "eval_questions": len(request.eval_questions),
        "server_reply": reply.model_dump(mode="json", include=_KEPT_OF_REPLY),
    }
    CptRun(value=value, passages=passages).fill_statistics()
    return value


def sft_settings(settings: CPTSettings, request: TTTRequest | None = None, *, n_processes: int = 1) -> SftSettings:
    """The schedule of a CPT run as one of all weights; `request` has its seed and epochs. Raises: SettingsError, before
    anything is trained."""
    names = ("finetune_epochs", "finetune_lr", "batch_size", "gradient_accumulation_steps", "max_seq_length")
    schedule = {name: getattr(request or settings.training, name) for name in names}
    sft = SftSettings(method="full", seed=int((request and request.seed) or 0), **schedule)
    sft.accumulation_of(n_processes)
    return sft


def full_replies(
    ttt: TTT,
    requests: Mapping[str, TTTRequest],
    settings: Mapping[str, CPTSettings],
    journal: Journal,
    folder: Path,
    *,
    check_unrelated: bool,
    n_processes: int,
    n_threads: int,
) -> tuple[dict[str, TTTReply], dict[str, TTTReply]]:
    """Train the model of each arm, and ask the base and each of them. Returns: the reply of each arm, in the form
    of an adapter's reply, and those to the general questions."""
    from seal_nb.sft.train import run_job

    def asked_of(model_id: str, request: TTTRequest) -> dict[str, TTTRequest]:
        questions = {"answers": request.eval_questions} | (
            {"control": session.general_questions()} if check_unrelated else {}
        )
        how: dict[str, Any] = {"skip_training": True, "seed": request.seed}
        return {name: loop_request(model_id, training, questions=asked, **how) for name, asked in questions.items()}

    training, served = next(iter(settings.values())).training, ttt.known_settings()
    before = ask_named(ttt, asked_of(ttt.model_id, next(iter(requests.values()))), journal, what="questions")
    ttt.close()  # the training needs the memory
    replies, control = {}, {"never edited": before["control"]} if check_unrelated else {}
    for arm, request in requests.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in request.train_sequences)
        job = SftJob(
            sft_file=write_text(folder / f"cpt_train_{arm}_full.jsonl", rows),
            model=served.model,
            model_dir=folder / f"model_{arm}_full",
            settings=sft_settings(settings[arm], request, n_processes=n_processes),
            n_threads=n_threads,
        )
        trained = run_job(job, n_processes=n_processes)
        say(f"{arm}: {trained.n_steps} steps of all weights")
        asked, place = asked_of(str(request.request_id), request), trained.model_dir.with_name(f"server_{arm}_full")
        if all(str(one.request_id) in journal for one in asked.values()):
            after = ask_named(ttt, asked, journal)  # sends nothing
        else:
            with ttt.another(str(trained.model_dir), folder=place, n_workers=served.n_workers) as server:
                after = ask_named(server, asked, journal, what="questions")
        base, new = (  # a model as it is has its answers on the baseline's side of its reply
            Answers(texts=one.baseline_texts, verdicts=one.baseline_verdicts, gold_logprobs=one.baseline_gold_logprobs)
            for one in (before["answers"], after["answers"])
        )
        replies[arm] = build_reply(
            baseline=base,
            adapter=new,
            gold_token_counts=after["answers"].gold_token_counts,
            train_tokens=trained.n_tokens,
            train_steps=trained.n_steps,
            epoch_losses=[float(np.mean(own)) for own in np.array_split(trained.losses, request.finetune_epochs)],
            model_id=after["answers"].model_id,
            **request.model_dump(include={"request_id", "seed"}),
        )
        if check_unrelated:
            control[arm] = after["control"]
    return replies, control
