"""Single-passage evaluation: k self-edits × repeats per passage, one adapter each, as a published run file.

Pure: passages and settings become requests, replies become the ``run_*.json`` of SEAL (arXiv 2506.10943, the
published query client) with verdicts, soft scores, seeds and request ids added. Every request has a seed and
an id of its own, derived from what it is, so that any single number can be made again alone. Sending requests
and keeping replies is somebody else's work.

The ceiling of single-passage evaluation: the same questions with the passage in the prompt, untrained.

What an adapter could at best have put into the weights (SEAL, arXiv 2506.10943, does not report it). The
server generates the answers; it grades only what was asked without the passage, so the answers are graded
here, by the grader that the server has: arms with verdicts of two graders cannot be compared. Greedy, as all
answers.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.settings import ARMS, IN_CONTEXT, SingleArm, TrainingSettings
from seal_nb.grading.base import Answered, Grader
from seal_nb.grading.choose import check_grader
from seal_nb.metrics import Verdicts
from seal_nb.passages import Passage
from seal_nb.prompts import OTHER_PROMPT, answer_prompt, recorded_key, topic_question
from seal_nb.protocol import Answers, EvalQuestion, GenerateReply, GenerateRequest, TTTReply, TTTRequest, build_reply
from seal_nb.results.statistics import published_statistics, repeat_stats
from seal_nb.self_edits import passage_only_sequences, train_sequences
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal, content_id, derived_seed

_NOT_CONTENT = {"request_id", "priority", "traceback"}  # change nothing in the result


@dataclass(frozen=True, kw_only=True)
class SinglePassageSettings:
    """What is run; defaults as published for evaluation (ranking: ``eval_times`` 3).

    ``label`` names an arm whose self-edits come from a file of its own, ``texts_from``.
    """

    k_completions: int = 5
    eval_times: int = 1
    split_newlines: bool = True
    seed: int = 42
    arm: SingleArm = "self_edits"
    label: str = ""
    texts_from: str = ""
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        if self.arm not in (*ARMS, IN_CONTEXT):
            raise SettingsError(f"arm={self.arm!r}: known are {', '.join((*ARMS, IN_CONTEXT))}")
        if self.k_completions < 1 or self.eval_times < 1:
            raise SettingsError(f"{self.k_completions=}, {self.eval_times=}: both must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PlannedLoop:
    """One adapter to train and ask: which self-edit of which passage, which repeat, and the request."""

    passage: int
    self_edit: int
    repeat: int
    text: str
    request: TTTRequest

    @property
    def request_id(self) -> str:
        assert self.request.request_id is not None  # set by requests_for_run
        return self.request.request_id


def requests_for_run(
    passages: Sequence[Passage], settings: SinglePassageSettings, *, model_id: str
) -> list[PlannedLoop]:
    """Every inner loop of a run, passages outermost, repeats innermost.

    Raises: DataError for a passage without what the arm trains on.
    """
    return [
        PlannedLoop(
            passage=at,
            self_edit=self_edit,
            repeat=repeat,
            text=text,
            request=_request(passage, text, settings, model_id=model_id, place=(at, self_edit, repeat)),
        )
        for at, passage in enumerate(passages)
        for self_edit, text in enumerate(self_edit_texts(passage, at, settings))
        for repeat in range(1 if settings.arm == IN_CONTEXT else settings.eval_times)
    ]


def self_edit_texts(passage: Passage, index: int, settings: SinglePassageSettings) -> tuple[str, ...]:
    """What the arm trains on beside the passage; an arm without self-edits has one empty one."""
    if settings.arm in ("passage_only", IN_CONTEXT):
        return ("",)
    texts = passage.completions if settings.arm == "self_edits" else (passage.hand_written,)
    if not texts or (settings.arm == "hand_written" and not texts[0]):
        raise DataError(
            f"passage {passage.title!r} has nothing for the arm {settings.arm!r}",
            item=index,
            field="completions" if settings.arm == "self_edits" else "hand_written",
            remedy="run 01_create_self_edits on the items first, or choose another arm",
        )
    return texts[: settings.k_completions]


def _request(
    passage: Passage, text: str, settings: SinglePassageSettings, *, model_id: str, place: tuple[int, int, int]
) -> TTTRequest:
    at, self_edit, repeat = place
    request = TTTRequest(
        train_sequences=arm_sequences(
            settings.arm, text, title=passage.title, context=passage.context, split_newlines=settings.split_newlines
        ),
        eval_questions=eval_questions(passage),
        seed=derived_seed(settings.seed, at, passage.title, self_edit, repeat),
        **settings.training.request_fields(),
    )
    return identified(request, model_id)


def arm_sequences(arm: str, text: str, *, title: str, context: str, split_newlines: bool) -> list[str]:
    """What one adapter of an arm is trained on; nothing where the arm trains none."""
    if arm == IN_CONTEXT:
        return []
    if arm == "passage_only":
        return passage_only_sequences(title=title, context=context)
    return train_sequences(text, title=title, context=context, split_newlines=split_newlines)


def eval_questions(passage: Passage) -> list[EvalQuestion]:
    """The questions as published clients send them, with their topic line."""
    return [
        EvalQuestion(
            title=passage.title,
            context=passage.context,
            question=topic_question(passage.title, question.question),
            answer=question.answer,
        )
        for question in passage.questions
    ]


def identified(request: TTTRequest, model_id: str) -> TTTRequest:
    """The request with the id of its content and its model: the same work has the same id."""
    content = request.model_dump(mode="json", exclude=_NOT_CONTENT)
    return request.model_copy(update={"request_id": content_id([model_id, content])})


def build_run(
    passages: Sequence[Passage],
    loops: Sequence[PlannedLoop],
    replies: Mapping[str, TTTReply],
    settings: SinglePassageSettings,
    *,
    model: str,
    dataset: str,
    timestamp: str,
    failures: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The run file: published keys first. ``replies`` and ``failures`` (error texts) are by request id.

    An inner loop without a reply is missing, listed under ``missing`` with its failure, and enters no mean.
    """
    by_self_edit: dict[tuple[int, int], list[PlannedLoop]] = defaultdict(list)
    for loop in loops:
        by_self_edit[loop.passage, loop.self_edit].append(loop)
    completions_P: list[list[dict[str, Any]]] = [[] for _ in passages]
    for (at, _), mine in by_self_edit.items():
        completions_P[at].append(_completion(passages[at], mine, replies))
    stats_P, overall = published_statistics([[c["stats"] for c in completions] for completions in completions_P])
    return {
        "overall": overall,
        "timestamp": timestamp,
        "model": model,
        "dataset": dataset,
        "split_newlines": settings.split_newlines,
        "n_articles": len(passages),
        "k_completions": max(map(len, completions_P), default=0),
        "eval_times": settings.eval_times,
        "lora_params": settings.training.lora_params(),
        "arm": settings.label or settings.arm,
        "trained_on": settings.arm,
        **({"texts_from": settings.texts_from} if settings.texts_from else {}),
        **_prompt_key(passages, settings),
        "seed": settings.seed,
        "training": settings.training.request_fields(),
        "n_ungraded": sum(replies[loop.request_id].n_ungraded for loop in loops if loop.request_id in replies),
        "missing": _missing(loops, replies, failures or {}),
        "articles": [
            _article(passage, stats, completions)
            for passage, stats, completions in zip(passages, stats_P, completions_P, strict=True)
        ],
    }


def _prompt_key(passages: Sequence[Passage], settings: SinglePassageSettings) -> dict[str, str]:
    """What the self-edits complete, where it is recorded; for texts under a label only a known key."""
    first = passages[0] if passages and settings.arm == "self_edits" else None
    key = first and recorded_key(first.prompt, first.prompt_keys, title=first.title, context=first.context)
    return {"prompt_key": key} if key and not (settings.label and key == OTHER_PROMPT) else {}


def _article(passage: Passage, stats: Mapping[str, float | None], completions: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "stats": stats,
        "title": passage.title,
        "context": passage.context,
        "completions": completions,
        "prompt": passage.prompt,
    }


def _completion(passage: Passage, loops: Sequence[PlannedLoop], replies: Mapping[str, TTTReply]) -> dict[str, Any]:
    answered = [(loop, replies[loop.request_id]) for loop in loops if loop.request_id in replies]
    verdicts: list[tuple[Verdicts, Verdicts]] = [
        (reply.baseline_correct, reply.adapter_correct) for _, reply in answered
    ]
    # Self-edits of a family complete different prompts; a ReST-EM round trains each on its own.
    at, text = loops[0].self_edit, loops[0].text
    of_family = at < len(passage.prompts) and passage.completions[at] == text
    return {
        "text": text,
        **({"prompt": passage.prompts[at], "prompt_key": passage.prompt_keys[at]} if of_family else {}),
        "stats": repeat_stats(verdicts),
        "questions": [row for loop, reply in answered for row in _question_rows(passage, loop, reply)],
        "repeats": [_repeat(loop, replies.get(loop.request_id)) for loop in loops],
    }


def _question_rows(passage: Passage, loop: PlannedLoop, reply: TTTReply) -> list[dict[str, Any]]:
    """One row a question of one repeat: the published keys, then verdicts and soft scores."""
    check_answers(reply, len(passage.questions))
    rows = []
    for at, question in enumerate(passage.questions):
        row: dict[str, Any] = {
            "rep": loop.repeat,
            "question": question.question,
            "answer": question.answer,
            "baseline_answer": reply.baseline_texts[at],
            "adapter_answer": reply.adapter_texts[at],
            "baseline_correct": reply.baseline_correct[at],
            "adapter_correct": reply.adapter_correct[at],
        }
        if reply.baseline_gold_logprobs and reply.adapter_gold_logprobs:
            row["baseline_gold_logprob"] = reply.baseline_gold_logprobs[at]
            row["adapter_gold_logprob"] = reply.adapter_gold_logprobs[at]
        rows.append(row)
    return rows


def check_answers(reply: TTTReply, n_questions: int) -> None:
    """Raises: DataError where a reply does not answer every question in both arms."""
    for name in ("baseline_texts", "adapter_texts", "baseline_correct", "adapter_correct"):
        n_answers = len(getattr(reply, name))
        if n_answers != n_questions:
            raise DataError(
                f"reply {reply.request_id} has {n_answers} entries for {n_questions} questions",
                field=name,
                remedy="ask again with the passages the request was made from",
            )


def _repeat(loop: PlannedLoop, reply: TTTReply | None) -> dict[str, Any]:
    """What made one repeat: enough to make it again alone."""
    made: dict[str, Any] = {"rep": loop.repeat, "seed": loop.request.seed, "request_id": loop.request_id}
    if reply is not None:
        made |= {
            "train_steps": reply.train_steps,
            "train_tokens": reply.train_tokens,
            "last_epoch_loss": reply.epoch_losses[-1] if reply.epoch_losses else None,
        }
    return made


def _missing(
    loops: Sequence[PlannedLoop], replies: Mapping[str, TTTReply], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    return [
        {
            "article": loop.passage,
            "completion": loop.self_edit,
            "rep": loop.repeat,
            "request_id": loop.request_id,
            "error": failures.get(loop.request_id, "no reply"),
        }
        for loop in loops
        if loop.request_id not in replies
    ]


def in_context_prompts(passage: Passage) -> list[str]:
    """The answer prompt of each question behind title and passage."""
    return [
        f"{passage.title}\n{passage.context.strip()}\n\n{answer_prompt(passage.title, question.question)}"
        for question in passage.questions
    ]


def in_context_request(passage: Passage, loop: PlannedLoop, *, model_id: str) -> GenerateRequest:
    """All questions of one passage. Raises: SettingsError where prompts would go through a chat template."""
    if loop.request.chat:
        raise SettingsError("chat=True: the arm in_context has no chat form; leave it out, or set chat to False")
    request = GenerateRequest(
        prompts=in_context_prompts(passage),
        max_tokens=loop.request.max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        seed=loop.request.seed,
        priority=0,
    )
    content = request.model_dump(mode="json", exclude={"request_id", "priority", "traceback"})
    return request.model_copy(update={"request_id": content_id([model_id, content])})


def with_in_context(
    replies: Mapping[str, TTTReply],
    client: TTTClient,
    passages: Sequence[Passage],
    loops: Sequence[PlannedLoop],
    journal: Journal,
    *,
    model_id: str,
    grader: Grader | None,
) -> dict[str, TTTReply]:
    """`replies` with those to `loops` completed: baseline and in-context answers as one reply, by its id.

    What the server could not generate is left out, and so missing in the run. ``grader``: not needed without
    loops. Raises: SettingsError where the server behind ``model_id`` grades by another one.
    """
    if not loops:
        return dict(replies)
    if grader is None:
        raise SettingsError("the arm in_context is graded here; give the grader that the server has")
    check_grader(grader.name, model_id, where=client.where)
    answered = [loop for loop in loops if loop.request_id in replies]
    requests = [in_context_request(passages[loop.passage], loop, model_id=model_id) for loop in answered]
    missing = [request for request in requests if str(request.request_id) not in journal]
    for index, reply in client.run_indexed(missing):
        if isinstance(reply, GenerateReply):
            journal.append(str(missing[index].request_id), reply.model_dump(mode="json"))
    completed = {key: reply for key, reply in replies.items() if key not in {loop.request_id for loop in loops}}
    for loop, request in zip(answered, requests, strict=True):
        if str(request.request_id) in journal:
            generated = GenerateReply.model_validate(journal.get(str(request.request_id)))
            baseline = replies[loop.request_id]
            completed[loop.request_id] = _reply(baseline, generated, passages[loop.passage], grader)
    return completed


def _reply(baseline: TTTReply, generated: GenerateReply, passage: Passage, grader: Grader) -> TTTReply:
    texts = [text.strip() for text in generated.texts]
    verdicts = grader.grade(
        [
            Answered(question=question.question, gold=question.answer, answer=text, title=passage.title)
            for question, text in zip(passage.questions, texts, strict=True)
        ]
    )
    return build_reply(
        baseline=Answers(texts=baseline.baseline_texts, verdicts=list(baseline.baseline_verdicts)),
        adapter=Answers(texts=texts, verdicts=[str(verdict) for verdict in verdicts]),
        request_id=baseline.request_id,
        seed=baseline.seed,
        model_id=baseline.model_id,
        server_id=baseline.server_id,
    )
