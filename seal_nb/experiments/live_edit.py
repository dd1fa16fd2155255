"""One self-edit changed by hand: trained at once, asked at once, and kept as an arm if it is worth it.

An edit becomes the same request that a run would send for it, plus token scores; ``workbench`` sends it and
has its adapter kept for a while, so that more questions can be put to it. What is worth it is appended to a
run file in the published form. Sends nothing itself and shows nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from seal_nb.errors import SettingsError
from seal_nb.experiments.inspection_rows import as_passage, sequences_of
from seal_nb.experiments.published_statistics import published_statistics
from seal_nb.experiments.run_files import EvaluatedPassage, EvaluatedSelfEdit, run_from_json
from seal_nb.experiments.settings import TrainingSettings
from seal_nb.experiments.single_passage import (
    PlannedLoop,
    SinglePassageSettings,
    build_run,
    eval_questions,
    identified,
)
from seal_nb.prompts import topic_question
from seal_nb.protocol import EvalQuestion, TTTReply, TTTRequest
from seal_nb.runs import read_json, write_json

ARM = "live_edit"


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A self-edit as somebody wrote it, and how its adapter is trained."""

    text: str
    split_newlines: bool = True
    seed: int = 42
    training: TrainingSettings = field(default_factory=TrainingSettings)


def settings_of_run(settings: Mapping[str, Any], **otherwise: Any) -> TrainingSettings:
    """The training settings that a run file states; ``otherwise`` for what it does not.

    Published files state some under ``lora_params``; ours all of them, under ``training`` too.
    """
    known = {field.name for field in fields(TrainingSettings)}
    ours = {name: value for name, value in (settings.get("training") or {}).items() if name in known}
    told = settings.get("lora_params") or {}
    names = {
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "epochs": "finetune_epochs",
        "lr": "finetune_lr",
        "batch_size": "batch_size",
        "grad_accum_steps": "gradient_accumulation_steps",
        "target_modules": "target_modules",
        "end_mask_substring": "end_mask_substring",
        "padding_in_loss": "padding_in_loss",
    }
    published = {name: told.get(theirs) for theirs, name in names.items()}
    stated = [{n: value for n, value in each.items() if value is not None} for each in (ours, published)]
    return TrainingSettings(**{**otherwise, **stated[0], **stated[1], "soft_scores": True})


def edit_request(evaluated: EvaluatedPassage, edit: Edit, *, model_id: str) -> TTTRequest:
    """The inner loop of an edit, scored token by token, under the id of its content.

    Raises: SettingsError for a value that no server takes.
    """
    try:
        request = TTTRequest(
            train_sequences=sequences_of(evaluated, edit.text, split_newlines=edit.split_newlines),
            eval_questions=eval_questions(as_passage(evaluated)),
            seed=edit.seed,
            return_token_logprobs=True,
            **edit.training.request_fields(),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{name} is {first['input']!r}: {first['msg']}; correct it") from None
    return identified(request, model_id)


def kept_request(request: TTTRequest, adapter_name: str, *, model_id: str) -> TTTRequest:
    """The same inner loop with its adapter kept; another id, so that nobody is answered without training."""
    return identified(request.model_copy(update={"adapter_name": adapter_name}), model_id)


def question_requests(
    evaluated: EvaluatedPassage, question: str, gold: str, trained: TTTRequest, *, model_id: str
) -> tuple[TTTRequest, TTTRequest]:
    """A question of one's own put to the base, and to the base under the adapter that ``trained`` kept.

    Without a gold answer nobody can judge the answers: they come back UNGRADED.
    """
    asked = EvalQuestion(
        title=evaluated.title, question=topic_question(evaluated.title, question), answer=gold
    )
    fields: dict[str, Any] = {"eval_questions": [asked], "skip_training": True, "soft_scores": bool(gold)}
    fields |= {"max_new_tokens": trained.max_new_tokens, "chat": trained.chat, "seed": 0}
    base = TTTRequest(**fields)
    adapted = base.model_copy(update={"adapter_stack": [trained.adapter_name]})
    return identified(base, model_id), identified(adapted, model_id)


def completion_record(
    evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply
) -> dict[str, Any]:
    """The edit with its answers as an entry of a run file's ``completions``."""
    run = _run_of_one(evaluated, edit, request, reply)
    made: dict[str, Any] = {
        "origin": ARM,
        "split_newlines": edit.split_newlines,
        "lora_params": edit.training.lora_params(),
        "training": edit.training.request_fields(),
        "epoch_losses": reply.epoch_losses,
        "token_logprobs": [scored.model_dump(mode="json") for scored in reply.token_logprobs],
    }
    return {**run["articles"][0]["completions"][0], **made}


def evaluated_edit(
    evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply
) -> EvaluatedSelfEdit:
    """The edit as a run file would give it back, without writing one."""
    article = {
        "title": evaluated.title,
        "completions": [completion_record(evaluated, edit, request, reply)],
    }
    return run_from_json({"articles": [article]}).passages[0].self_edits[0]


def keep_arm(
    path: str | Path, evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply
) -> Path:
    """Append the edit to a run file, which is made where there is none. The same edit is there once.

    Raises: DataError where the file is there and is no run.
    """
    target = Path(path)
    run = (
        read_json(target)
        if target.exists()
        else {**_run_of_one(evaluated, edit, request, reply), "articles": []}
    )
    run_from_json(run, path=target)  # refuses what is no run
    article = _article(run["articles"], evaluated)
    record = completion_record(evaluated, edit, request, reply)
    kept = [one for one in article["completions"] if not _is_same(one, record)]
    article["completions"] = [*kept, record]
    return write_json(target, _with_statistics(run))


def _run_of_one(
    evaluated: EvaluatedPassage, edit: Edit, request: TTTRequest, reply: TTTReply
) -> dict[str, Any]:
    # Whose adapter is kept, and for how long, is no part of what was found out.
    plain = identified(request.model_copy(update={"adapter_name": None}), reply.model_id)
    loop = PlannedLoop(passage=0, self_edit=0, repeat=0, text=edit.text, request=plain)
    settings = SinglePassageSettings(
        k_completions=1, split_newlines=edit.split_newlines, seed=edit.seed, training=edit.training
    )
    run = build_run(
        [as_passage(evaluated)],
        [loop],
        {loop.request_id: reply},
        settings,
        model=reply.model_id,
        dataset="",
        timestamp="",
    )
    # Each edit has settings of its own; what stands above them would be true of one only.
    of_one = ("lora_params", "seed", "split_newlines", "training")
    return {key: entry for key, entry in run.items() if key not in of_one} | {"arm": ARM}


def _article(articles: list[dict[str, Any]], evaluated: EvaluatedPassage) -> dict[str, Any]:
    about = {"title": evaluated.title, "context": evaluated.context}
    for article in articles:
        if {key: article.get(key) for key in about} == about:
            return article
    articles.append({"stats": {}, **about, "completions": [], "prompt": evaluated.prompt or ""})
    return articles[-1]


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ids, others = ({loop.get("request_id") for loop in each.get("repeats", [])} for each in (one, other))
    return bool(ids & others)


def _with_statistics(run: dict[str, Any]) -> dict[str, Any]:
    """Counts and published statistics of what the file now holds."""
    completions_P = [article["completions"] for article in run["articles"]]
    stats_P, overall = published_statistics([[one["stats"] for one in mine] for mine in completions_P])
    for article, stats in zip(run["articles"], stats_P, strict=True):
        article["stats"] = stats
    verdicts = [
        question[side]
        for completions in completions_P
        for one in completions
        for question in one["questions"]
        for side in ("baseline_correct", "adapter_correct")
    ]
    return run | {
        "overall": overall,
        "n_articles": len(completions_P),
        "k_completions": max(map(len, completions_P), default=0),
        "n_ungraded": verdicts.count(None),
    }
