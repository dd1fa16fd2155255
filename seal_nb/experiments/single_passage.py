"""Single-passage evaluation: one adapter for each arm, passage, self-edit and repeat, then all questions (`evaluate`).

Replies become the `run_*.json` of SEAL (arXiv 2506.10943, the published query client) with verdicts, soft scores,
seeds and request ids added. Seeds and ids follow from content, so any single number can be made again alone. The arm
`in_context` trains nothing: its questions are asked with the passage in the prompt."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from seal_nb.errors import DataError, RunMismatch, SettingsError
from seal_nb.experiments.session import TTT, ask, ask_named, identified, loop_request, matched, ttt_server
from seal_nb.experiments.settings import (
    CONTROLS,
    Match,
    SingleArm,
    Training,
    arm_passages,
    arm_texts,
    check_asked,
    parse_arms,
)
from seal_nb.grading.base import Grader, answered_with
from seal_nb.grading.choose import check_grader, grader_of, make_grader
from seal_nb.metrics import mean
from seal_nb.passages import Passage, Question, asked
from seal_nb.prompts import ANSWER_STYLES, OTHER_PROMPT, AnswerStyle, answer_prompt, recorded_key, topic_question
from seal_nb.protocol import Answers, EvalQuestion, GenerateRequest, TTTReply, TTTRequest, build_reply
from seal_nb.results.collect import stacked
from seal_nb.results.run import KINDS, SINGLE_PASSAGE, are_published_passages, verdict_change
from seal_nb.results.single_passage import CptRun, SinglePassageRun, check_length, run_file_name
from seal_nb.self_edits import sequences_of_text
from seal_nb.settings import Settings, setting
from seal_nb.storage import Journal, derived_seed, read_json, runs_folder, write_json, write_record
from seal_nb.views import plots
from seal_nb.views.live import say

SomeRun = TypeVar("SomeRun", bound=SinglePassageRun | CptRun)


@dataclass(frozen=True, kw_only=True)
class SinglePassageSettings(Settings):
    """One arm of an evaluation; defaults as published for evaluation (ranking: `eval_times` 3). `label` names an arm
    whose self-edits come from a file of its own, `texts_from`."""

    k_completions: int = setting(5, least=1)
    eval_times: int = setting(1, least=1)
    split_newlines: bool = True
    seed: int = 42
    arm: SingleArm = "self_edits"
    label: str = ""
    texts_from: str = ""
    match: Match = "none"
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arm == "in_context" and self.training.chat:
            raise SettingsError("chat=True: the arm in_context has no chat form; leave it out, or set chat to False")


@dataclass(frozen=True, kw_only=True)
class PlannedLoop:
    """One adapter to train and ask: which self-edit of which passage, which repeat, and the request."""

    passage: int
    self_edit: int
    repeat: int
    text: str
    request: TTTRequest
    text_of: int | None = None  # the passage that the text is of, if it is another one

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)


class Arms(dict[str, SomeRun]):
    """The runs of an experiment by arm, as their run files say, with tables and figures. `losses`: the training loss by
    epoch (nats per token) of each adapter."""

    published: ClassVar[Mapping[str, float]]  # accuracy of each arm on the 200 published passages

    def __init__(self, runs: Mapping[str, SomeRun], losses: Mapping[str, Sequence[float | None]]) -> None:
        super().__init__(runs)
        self.losses = losses

    def accuracy(self) -> pd.DataFrame:
        """One row for each arm: accuracy with its 95 % interval over passages, gain over the baseline with p (and
        Holm's p for all arms together), steps and tokens of one adapter, and controls of recitation
        (`results.run.recitation`)."""
        return stacked((run.arm, run) for run in self.values()).drop(columns=["prompt", "file"], errors="ignore")

    def best(self) -> "pd.Series[Any]":
        """The row of `accuracy` with the highest accuracy, the first of equals."""
        return self.accuracy().sort_values("accuracy", ascending=False, kind="stable").iloc[0]

    def plot_accuracy(self) -> Figure:
        """Accuracy of each arm with its interval, the baseline, and published values for the published passages."""
        bars = {run.arm: estimate for run in self.values() if (estimate := run.estimate("adapter"))}
        run = list(self.values())[-1]
        are_published = are_published_passages((passage.title, passage.context) for passage in run.passages)
        published = self.published if are_published else {}
        return plots.plot_accuracy(bars, baseline=run.estimate("baseline"), published=published)

    def plot_gains(self, arm: str = "") -> Figure:
        """Baseline and adapter accuracy of each passage; `arm`: the last one unless given."""
        run = self[arm or list(self)[-1]]
        before, after = ([mean(scores) for scores in run.scores(kind)] for kind in KINDS)
        return plots.plot_gains([passage.title for passage in run.passages], before, after)

    def plot_losses(self) -> Figure:
        """Training loss by epoch of each adapter; those of single passages are named passage.self_edit.repeat."""
        return plots.plot_losses(self.losses)


class Evaluation(Arms[SinglePassageRun]):
    """What `evaluate` returns: the runs by arm, with tables and figures."""

    published = SINGLE_PASSAGE

    def answers(self, arm: str = "") -> pd.DataFrame:
        """One row for each question and repeat, changed verdicts first; `arm`: the last one unless given."""
        frame = self[arm or list(self)[-1]].answers(changed_first=True)
        return frame.drop(columns=["baseline_correct", "adapter_correct"])


def evaluate(
    ttt: TTT,
    passages: Sequence[Passage],
    *,
    arms: str | Sequence[str] = ("passage_only", "passage_matched", "self_edits", "shuffled"),
    training: Training | Mapping[str, Training] | None = None,
    match: Match = "none",
    k_completions: int = 1,
    eval_times: int = 1,
    split_newlines: bool = True,
    seed: int = 42,
    folder: str | Path = "runs/evaluation",
    exp_name: str = "base",
    dataset: str = "",
    price_per_hour: float = 0.0,
) -> Evaluation:
    """Train one adapter for each arm, passage, self-edit and repeat; ask the passage's questions without and with it.

    Args:
        ttt: the server (`ttt_server` or `connect`).
        passages: with questions; the arm `self_edits` needs their completions.
        arms: of passage_only, self_edits, hand_written, the controls passage_matched (the passage alone, for as many
            steps as the longest arm) and shuffled (text and passage of another passage with another title), the
            reference in_context (the passage in the prompt, no training), and NAME:FILE for the self-edits of an item
            file.
        training: settings of the adapters, or of each arm by its name (`tune`); the published ones unless given.
        match: "steps" or "tokens" repeats the epochs of shorter arms until they cost as much as the longest arm on the
            same passage; "none" (published): each arm has the same epochs.
        k_completions: self-edits used of each passage.
        eval_times: adapters trained for each self-edit.
        split_newlines: each line of a self-edit is a train sequence (published: yes).
        seed: the seed of each inner loop is derived from it.
        folder: for run files, their records and the journal; a second call asks only for what is missing.
        exp_name: part of the names of the run files.
        dataset: name of the data, for the run files.
        price_per_hour: of the server; adds the cost to the line that says how much work it is.

    Returns:
        The runs by arm. Their run files (`run_<exp_name>.json` …) are in `folder`.

    Raises:
        DataError: for a passage without what an arm needs, and for passages without any question.
        SettingsError: for settings that do not fit, and for a server with another grader.
        RoundTimeout: when the server went away and did not come back.

    Source: SEAL, arXiv 2506.10943, section 3.1, single passage."""
    given, folder = locals(), runs_folder(folder)
    check_asked(passages)
    settings, texts, parsed = {}, {}, parse_arms(arms)
    if isinstance(training, Mapping) and (unknown := {*training} - {*parsed} - {*CONTROLS}):
        raise SettingsError(f"training names {', '.join(sorted(unknown))}; the arms are {', '.join(parsed)}")
    for arm, file in parsed.items():
        of_arm = training.get(arm) if isinstance(training, Mapping) else training
        own: dict[str, Any] = {"arm": arm, "training": of_arm or Training()}
        own |= {"arm": "self_edits", "label": arm, "texts_from": Path(file).name} if file else {}
        settings[arm] = SinglePassageSettings.from_parameters(given, **own)
        texts[arm] = arm_passages(arm, passages, file)
        most = max((len(one.completions) for one in texts[arm]), default=0)
        if settings[arm].arm == "self_edits" and most > k_completions:
            say(f"{arm}: a passage has {most} self-edits; the first {k_completions} are used (k_completions)")
    grader = make_grader(ttt.grader or "local") if "in_context" in settings else None
    with Journal(folder / "journal.jsonl") as journal:
        if grader is not None:  # verdicts of two graders cannot be compared
            check_grader(grader.name, ttt.model_id, where=ttt.where)
        loops = {arm: requests_for_run(texts[arm], one, model_id=ttt.model_id) for arm, one in settings.items()}
        planned = [(arm, loop.passage, loop.request) for arm, of_arm in loops.items() for loop in of_arm]
        requests = matched(planned, match, model_id=ttt.model_id)
        new = iter(requests)
        loops = {arm: [replace(loop, request=next(new)) for loop in of_arm] for arm, of_arm in loops.items()}
        collected = ask(ttt, requests, journal, work="to do", price_per_hour=price_per_hour)
        replies = collected.replies
        if grader is not None:
            replies, failed = with_in_context(ttt, passages, loops["in_context"], replies, journal, grader)
            collected.failures.update(failed)
    about = {"model": ttt.model_id, "dataset": Path(dataset).name, "timestamp": f"{datetime.now(UTC):%m%d_%H%M%S}"}
    runs, losses = {}, {}
    for arm, one in settings.items():
        value = build_run(texts[arm], loops[arm], replies, one, failures=collected.failures, **about)
        path = write_json(folder / run_file_name(exp_name, arm), value)
        write_record(path, stage="03_query_server", settings=asdict(one), seeds={"seed": seed})
        runs[arm] = SinglePassageRun(value=value, path=path)
        for loop in loops[arm]:
            if (reply := replies.get(loop.request_id)) is not None and reply.epoch_losses:
                name = f"{loop.passage}.{loop.self_edit}.{loop.repeat} {arm}, {passages[loop.passage].title}"
                losses[name] = reply.epoch_losses
    return Evaluation(runs, losses)


def train_and_ask(
    ttt: TTT,
    sequences: Mapping[str, Sequence[str]],
    questions: Sequence[EvalQuestion],
    *,
    training: Training | None = None,
    token_logprobs: bool = False,
    keep: bool = False,
    seed: int = 42,
    folder: str | Path = "runs/adapters",
) -> dict[str, TTTReply]:
    """Train one adapter on each list of train sequences; ask all of them the same questions. Writes no run file.

    Args:
        ttt: the server (`ttt_server` or `connect`).
        sequences: name of an adapter → its train sequences; empty: the untouched model alone is asked.
        questions: asked without and with each adapter (`eval_questions(passage)`).
        training: settings of the adapters; the published ones unless given.
        token_logprobs: also score every token of train sequences, gold answers and passages, in nats.
        keep: the server keeps each adapter, in PEFT's format; its folder is the reply's `adapter_path`.
        seed: of the initial weights and the order of train sequences, the same for all.
        folder: of the journal; a second call asks only for what is missing.

    Returns:
        The reply by name: both answers and verdicts, losses, counts.

    Raises:
        RemoteError: when a request failed on the server.
        RoundTimeout: when the server went away and did not come back."""
    requests = {
        name: loop_request(
            ttt.model_id,
            training or Training(),
            texts=texts,
            questions=questions,
            keep="kept" if keep else "",
            skip_training=not texts,
            return_token_logprobs=token_logprobs,
            seed=seed,
        )
        for name, texts in sequences.items()
    }
    with Journal(runs_folder(folder) / "journal.jsonl") as journal:
        return ask_named(ttt, requests, journal)


def reply_frame(questions: Sequence[Any], reply: TTTReply, *, start: int = 0) -> pd.DataFrame:
    """The answers of one reply.

    Args:
        questions: with ``question`` and ``answer``, such as ``passage.questions``.
        reply: the reply of the TTT server.
        start: index in the reply of the first of these questions.

    Returns:
        One row per question: ``question``, ``gold``, ``baseline_answer``, ``adapter_answer``, ``verdicts``."""
    at = slice(start, start + len(questions))
    return pd.DataFrame(
        {
            "question": [one.question for one in questions],
            "gold": [one.answer for one in questions],
            "baseline_answer": reply.baseline_texts[at],
            "adapter_answer": reply.adapter_texts[at],
            "verdicts": list(map(verdict_change, reply.baseline_correct[at], reply.adapter_correct[at])),
        }
    )


def requests_for_run(
    passages: Sequence[Passage], settings: SinglePassageSettings, *, model_id: str
) -> list[PlannedLoop]:
    """Every inner loop of one arm, passages outermost, repeats innermost. Raises: DataError; SettingsError where
    `shuffled` has no other passage."""
    loops, n_repeats = [], 1 if settings.arm == "in_context" else settings.eval_times
    for at, passage in enumerate(passages):
        questions = eval_questions(passage, answer_style=settings.training.answer_style)
        if settings.arm == "in_context" and not questions:
            continue  # nothing to train, and nothing to ask
        text_of = another_passage(passages, at) if settings.arm == "shuffled" else None
        source = passage if text_of is None else passages[text_of]
        for number, text in enumerate(arm_texts(settings.arm, source, at, k_completions=settings.k_completions)):
            texts = arm_sequences(settings.arm, text, source, split_newlines=settings.split_newlines)
            for repeat in range(n_repeats):
                seed = derived_seed(settings.seed, at, passage.title, number, repeat)
                request = loop_request(model_id, settings.training, texts=texts, questions=questions, seed=seed)
                about: dict[str, Any] = {"text": text, "request": request, "text_of": text_of}
                loops.append(PlannedLoop(passage=at, self_edit=number, repeat=repeat, **about))
    return loops


def another_passage(passages: Sequence[Passage], at: int) -> int:
    """The next passage with another title, since passages of one title share facts. Raises: SettingsError."""
    others = [place % len(passages) for place in range(at + 1, at + len(passages))]
    found = next((one for one in others if passages[one].title != passages[at].title), None)
    if found is None:
        raise SettingsError("arms has 'shuffled', and all passages have one title; give more passages, or leave it out")
    return found


def arm_sequences(arm: str, text: str, passage: Passage, *, split_newlines: bool) -> list[str]:
    """What one adapter of an arm is trained on; nothing for in_context."""
    if arm == "in_context":
        return []
    is_split = split_newlines or arm in ("passage_only", "passage_matched")  # a passage alone has no self-edit to split
    return sequences_of_text(text, title=passage.title, context=passage.context, split_newlines=is_split)


def train_sequences(
    passage: Passage, arm: str = "self_edits", *, self_edit: int = 0, split_newlines: bool = True
) -> list[str]:
    """The train sequences of one adapter: title and text each, the passage itself last.

    Args:
        passage: with what the arm needs (completions for self_edits).
        arm: as in `evaluate`, one of them.
        self_edit: index of the self-edit, for arms that have several.
        split_newlines: one sequence for each line of the self-edit (published: yes).

    Returns:
        The texts in the order of the self-edit.

    Raises:
        DataError: for a passage without such a text.

    Source: SEAL, arXiv 2506.10943, the published query client."""
    name, file = next(iter(parse_arms([arm]).items()))
    (passage,) = arm_passages(name, [passage], file)
    trained_on = "self_edits" if file else name
    text = arm_texts(trained_on, passage, 0, k_completions=self_edit + 1)[self_edit]
    return arm_sequences(trained_on, text, passage, split_newlines=split_newlines)


def eval_questions(*passages: Passage, answer_style: AnswerStyle = "published") -> list[EvalQuestion]:
    """The questions of one or more passages as published clients send them, with their topic line.

    Args:
        passages: one or more, in order.
        answer_style: "short" adds a sentence that asks for a few words.

    Returns:
        All questions in one list."""
    if answer_style not in ANSWER_STYLES:
        raise SettingsError(f"answer_style={answer_style!r}: known are {', '.join(ANSWER_STYLES)}")
    found = []
    for passage in passages:
        for one in passage.questions:
            question = topic_question(passage.title, one.question) + ANSWER_STYLES[answer_style]
            fields = asked(one) | {"title": passage.title, "context": passage.context, "question": question}
            found.append(EvalQuestion(**fields))
    return found


def build_run(
    passages: Sequence[Passage],
    loops: Sequence[PlannedLoop],
    replies: Mapping[str, TTTReply],
    settings: SinglePassageSettings,
    *,
    failures: Mapping[str, str] = {},
    **about: str,
) -> dict[str, Any]:
    """The run file: published keys first; `about`: timestamp, model, dataset. `replies` and `failures` (error texts)
    are by request id. An inner loop without a reply is listed under `missing` with its failure and enters no mean."""
    articles: list[dict[str, Any]] = [
        {"stats": {}, "title": one.title, "context": one.context, "completions": [], "prompt": one.prompt}
        for one in passages
    ]
    for (at, _), mine in groupby(loops, key=lambda loop: (loop.passage, loop.self_edit)):
        articles[at]["completions"].append(_completion(passages[at], list(mine), replies))
    missing = [
        {"article": loop.passage, "completion": loop.self_edit, "rep": loop.repeat, "request_id": loop.request_id}
        | {"error": failures.get(loop.request_id, "no reply")}
        for loop in loops
        if loop.request_id not in replies
    ]
    # The key of the prompt that the self-edits complete, if it is recorded; under a label only a known key.
    first = passages[0] if passages and settings.arm == "self_edits" else None
    key = first and recorded_key(first.prompt, first.prompt_keys, title=first.title, context=first.context)
    is_known = key and not (settings.label and key == OTHER_PROMPT)
    value = {
        "overall": {},
        **{name: about.get(name, "") for name in ("timestamp", "model", "dataset")},
        "split_newlines": settings.split_newlines,
        "n_articles": len(passages),
        "k_completions": max((len(article["completions"]) for article in articles), default=0),
        "eval_times": settings.eval_times,
        "lora_params": settings.training.lora_params(),
        "arm": settings.label or settings.arm,
        "trained_on": settings.arm,
        **({"texts_from": settings.texts_from} if settings.texts_from else {}),
        **({"prompt_key": key} if is_known else {}),
        "seed": settings.seed,
        "training": settings.training.request_fields(),
        "answer_style": settings.training.answer_style,
        "match": settings.match,
        "n_ungraded": 0,
        "missing": missing,
        "articles": articles,
    }
    SinglePassageRun(value=value).fill_statistics()
    return value


def _completion(passage: Passage, loops: Sequence[PlannedLoop], replies: Mapping[str, TTTReply]) -> dict[str, Any]:
    """A self-edit with one row for each question and repeat, and what each repeat takes to be run again alone."""
    questions: list[dict[str, Any]] = []
    repeats: list[dict[str, Any]] = []
    for loop in loops:
        epochs = loop.request.finetune_epochs
        made_by = {"seed": loop.request.seed, "finetune_epochs": epochs, "request_id": loop.request_id}
        repeats.append({"rep": loop.repeat, **made_by})
        if (reply := replies.get(loop.request_id)) is None:
            continue
        repeats[-1] |= {
            "train_steps": reply.train_steps,
            "train_tokens": reply.train_tokens,
            "last_epoch_loss": reply.epoch_losses[-1] if reply.epoch_losses else None,
        }
        check_answers(reply, len(passage.questions))
        columns = {f"{kind}_answer": getattr(reply, f"{kind}_texts") for kind in KINDS}
        columns |= {f"{kind}_correct": getattr(reply, f"{kind}_correct") for kind in KINDS}
        if reply.baseline_gold_logprobs and reply.adapter_gold_logprobs:
            columns |= {f"{kind}_gold_logprob": getattr(reply, f"{kind}_gold_logprobs") for kind in KINDS}
        for at, question in enumerate(passage.questions):
            row = {"rep": loop.repeat, **asked(question)}
            questions.append(row | {name: values[at] for name, values in columns.items()})
    at, made = loops[0].self_edit, dict[str, Any]({"text": loops[0].text})
    if loops[0].text_of is not None:
        made["text_of"] = loops[0].text_of
    # Self-edits of a family complete different prompts; a ReST-EM round trains each on its own.
    if at < len(passage.prompts) and passage.completions[at] == made["text"]:
        made |= {"prompt": passage.prompts[at], "prompt_key": passage.prompt_keys[at]}
    return {**made, "stats": {}, "questions": questions, "repeats": repeats}


def check_answers(reply: TTTReply, n_questions: int) -> None:
    """Raises: DataError where a reply does not answer every question in both arms."""
    remedy = "ask again with the passages the request was made from"
    for name in ("baseline_texts", "adapter_texts", "baseline_correct", "adapter_correct"):
        where = f"reply {reply.request_id}, {name}"
        check_length(getattr(reply, name), n_questions, path="", field=where, remedy=remedy)


def in_context_request(passage: Passage, loop: PlannedLoop, *, model_id: str) -> GenerateRequest:
    """All questions of one passage, each with title and passage before it."""
    request = GenerateRequest(
        prompts=[
            f"{passage.title}\n{passage.context.strip()}\n\n{answer_prompt(passage.title, one.question)}"
            for one in loop.request.eval_questions
        ],
        max_tokens=loop.request.max_new_tokens,
        temperature=0.0,
        top_p=1.0,
        priority=0,
        seed=loop.request.seed,
    )
    return identified(request, model_id)


def with_in_context(
    ttt: TTT,
    passages: Sequence[Passage],
    loops: Sequence[PlannedLoop],
    replies: Mapping[str, TTTReply],
    journal: Journal,
    grader: Grader,
) -> tuple[dict[str, TTTReply], dict[str, str]]:
    """`replies` with the in-context answers as the adapter's answers of `loops`, without those that failed, and the
    errors of these. The server grades only what it asks without the passage, so its grader grades these here."""
    answered = [loop for loop in loops if loop.request_id in replies]
    requests = [in_context_request(passages[loop.passage], loop, model_id=ttt.model_id) for loop in answered]
    generated, failures, completed = ask(ttt, requests, journal, what="passages in the prompt"), {}, dict(replies)
    for loop, request in zip(answered, requests, strict=True):
        passage, baseline = passages[loop.passage], completed.pop(loop.request_id)
        if (error := generated.failures.get(str(request.request_id))) is not None:
            failures[loop.request_id] = error
            continue
        texts = [text.strip() for text in generated.of(request).texts]
        answers = [
            answered_with((one.answer, *one.other_answers), question=one.question, answer=text, title=passage.title)
            for one, text in zip(passage.questions, texts, strict=True)
        ]
        completed[loop.request_id] = build_reply(
            baseline=Answers(texts=baseline.baseline_texts, verdicts=baseline.baseline_verdicts),
            adapter=Answers(texts=texts, verdicts=grader.grade(answers)),
            **baseline.model_dump(include={"request_id", "seed", "model_id", "server_id"}),
        )
    return completed, failures


class StoredLoop(NamedTuple):
    """One inner loop as a run file has it, to be made again: its request without an id (otherwise the server would
    answer from its journal and train nothing), and its questions with their answers."""

    item: str
    model_id: str
    request: TTTRequest
    questions: list[dict[str, Any]]


def stored_loop(path: str | Path, item: str) -> StoredLoop:
    """``item``: passage.self_edit.repeat, each from 0. Raises: DataError where the file has no such item or not all
    that made it, RunMismatch where it was changed."""
    if not re.fullmatch(r"\d{1,9}\.\d{1,9}\.\d{1,9}", item):
        raise DataError(f"item {item!r} is not passage.self_edit.repeat", remedy="write it as 0.0.0")
    (at, number, repeat), run = map(int, item.split(".")), read_json(path)
    about: dict[str, Any] = {"path": path, "item": item}
    try:
        article = run["articles"][at]
        completion = article["completions"][number]
        made = next(entry for entry in completion["repeats"] if entry["rep"] == repeat)
        rows = [row for row in completion["questions"] if row["rep"] == repeat]
        fields = [(row["question"], row["answer"], tuple(row.get("other_answers") or ())) for row in rows]
        own = tuple(Question(question=one, answer=gold, other_answers=others) for one, gold, others in fields)
        passage = Passage(title=article["title"], context=article["context"], questions=own)
        other = run["articles"][completion.get("text_of", at)]
        source = Passage(title=other["title"], context=other["context"], questions=())
        texts = arm_sequences(run["trained_on"], completion["text"], source, split_newlines=run["split_newlines"])
        stated = {name: value for name, value in run["training"].items() if name != "pad_samples"}  # of earlier files
        stated |= {name: made[name] for name in ("finetune_epochs",) if name in made}
        questions = eval_questions(passage, answer_style=run.get("answer_style", "published"))
        request = loop_request(run["model"], Training(**stated), texts=texts, questions=questions, seed=made["seed"])
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        remedy = "give a run_*.json that 03_query_server wrote (published files hold no seeds)"
        raise DataError("has no such item, or not what made it", **about, remedy=remedy) from error
    if not rows or run["trained_on"] == "in_context":
        problem = "was trained on nothing" if rows else "has no answer"
        raise DataError(problem, **about, remedy="run 03 again, or choose a passage that was asked about")
    if request.request_id != made["request_id"]:
        raise RunMismatch(f"{path}, item {item}: what it says does not give its request id; it was changed")
    return StoredLoop(item, run["model"], request.model_copy(update={"request_id": None}), rows)


def rerun(path: str | Path, item: str, *, endpoint: str, **server: Any) -> tuple[bool, list[str]]:
    """Train and ask again, on the server at ``endpoint`` or on one started with these settings and the run's grader.
    Returns: see `compared`. Raises: RunMismatch for a server of another model, RemoteError."""
    stored = stored_loop(path, item)
    server |= {"endpoint": endpoint, "grader": grader_of({"model": stored.model_id})}
    with tempfile.TemporaryDirectory(prefix="seal-nb-rerun-") as folder, ttt_server(folder=folder, **server) as ttt:
        if ttt.model_id != stored.model_id:
            raise RunMismatch(
                f"the run was made by model {stored.model_id}, the server has {ttt.model_id}; start it with that "
                "model, dtype and grader (seal-nb rerun --model FOLDER, of a round: its round1_train/model)"
            )
        return compared(stored, ttt.client.evaluate(stored.request))


def compared(stored: StoredLoop, reply: TTTReply) -> tuple[bool, list[str]]:
    """Whether every answer is the same, and lines with the accuracy then and now and each answer that differs."""
    differing = []
    for at, row in enumerate(stored.questions):
        for which in ("baseline", "adapter"):
            then, now = row[f"{which}_answer"], getattr(reply, f"{which}_texts")[at]
            if then != now or row[f"{which}_correct"] != getattr(reply, f"{which}_correct")[at]:
                differing += [f"  {which}: {row['question']}", f"    then: {then!r}", f"    now:  {now!r}"]
    n, n_then = len(stored.questions), sum(row["adapter_correct"] is True for row in stored.questions)
    head = f"item {stored.item}: {n_then} of {n} right with the adapter then, {reply.adapter_correct.count(True)} now; "
    if not differing:
        return True, [f"{head}every answer is the same"]
    why = "(only with deterministic=True the same bits come back: else one of two tokens that are almost equal may win)"
    return False, [f"{head}{len(differing) // 3} of {2 * n} answers differ:", *differing, why]
