"""One number of a run made again, alone: the same inner loop from what the run file says, and compared.

The request is rebuilt from the file, and its id must come out as the file has it, so that the work is the same. It is
sent without the id: otherwise the server would answer from its journal and train nothing.
"""

import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from seal_nb.errors import DataError, RunMismatch
from seal_nb.experiments.session import TTT, loop_request, ttt_server
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import arm_sequences, eval_questions
from seal_nb.grading.choose import grader_of
from seal_nb.passages import Passage, Question
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.storage import read_json


class Item(NamedTuple):
    """A self-edit's repeat, each number from 0."""

    passage: int
    self_edit: int
    repeat: int

    @classmethod
    def parse(cls, text: str) -> "Item":
        """Raises: DataError for anything but three whole numbers."""
        if not re.fullmatch(r"\d{1,9}\.\d{1,9}\.\d{1,9}", text):
            raise DataError(f"item {text!r} is not passage.self_edit.repeat", remedy="write it as 0.0.0")
        return cls(*map(int, text.split(".")))


class StoredLoop(NamedTuple):
    """One inner loop as a run file has it: the request that made it, and its questions with their answers."""

    item: str
    model_id: str
    request: TTTRequest
    questions: list[dict[str, Any]]


def stored_loop(path: str | Path, item: Item) -> StoredLoop:
    """Raises: DataError where the file has no such item or not all that made it."""
    run = read_json(path)
    about: dict[str, Any] = {"path": path, "item": ".".join(map(str, item))}
    try:
        article = run["articles"][item.passage]
        completion = article["completions"][item.self_edit]
        made = next(entry for entry in completion["repeats"] if entry["rep"] == item.repeat)
        rows = [row for row in completion["questions"] if row["rep"] == item.repeat]
        fields = [(row["question"], row["answer"], tuple(row.get("other_answers") or ())) for row in rows]
        asked = tuple(Question(question=one, answer=gold, other_answers=others) for one, gold, others in fields)
        passage = Passage(title=article["title"], context=article["context"], questions=asked)
        texts = arm_sequences(run["trained_on"], completion["text"], passage, split_newlines=run["split_newlines"])
        stated = {name: value for name, value in run["training"].items() if name != "pad_samples"}  # of earlier files
        questions, seed = eval_questions(passage), made["seed"]
        request = loop_request(run["model"], Training(**stated), texts=texts, questions=questions, seed=seed)
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        remedy = "give a run_*.json that 03_query_server wrote (published files hold no seeds)"
        raise DataError("has no such item, or not what made it", **about, remedy=remedy) from error
    if not rows:
        raise DataError("has no answer", **about, remedy="run 03 again, or choose a passage with questions")
    if run["trained_on"] == "in_context":
        raise DataError("was trained on nothing", **about, remedy="choose another arm's file")
    if request.request_id != made["request_id"]:
        raise RunMismatch(f"{path}, item {about['item']}: what it says does not give its request id; it was changed")
    return StoredLoop(about["item"], run["model"], request.model_copy(update={"request_id": None}), rows)


def rerun(ttt: TTT, stored: StoredLoop) -> tuple[bool, list[str]]:
    """Train and ask again. Returns: see `compared`. Raises: RunMismatch for a server of another model, RemoteError."""
    if ttt.model_id != stored.model_id:
        raise RunMismatch(
            f"the run was made by model {stored.model_id}, the server has {ttt.model_id}; start it with that "
            "model, dtype and grader (seal-nb rerun --model FOLDER, of a round: its round1_train/model)"
        )
    return compared(stored, ttt.client.evaluate(stored.request))


def rerun_in(path: str | Path, item: Item, *, endpoint: str, **server: Any) -> tuple[bool, list[str]]:
    """``rerun`` on the server at ``endpoint``, or on one started with these settings, and the run's grader."""
    stored = stored_loop(path, item)
    server |= {"endpoint": endpoint, "grader": grader_of({"model": stored.model_id})}
    with tempfile.TemporaryDirectory(prefix="seal-nb-rerun-") as folder, ttt_server(folder=folder, **server) as ttt:
        return rerun(ttt, stored)


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
    return False, [
        f"{head}{len(differing) // 3} of {2 * n} answers differ:",
        *differing,
        "(without deterministic=True an answer may differ if its two best tokens have almost the same probability; "
        "with it the same bits come back)",
    ]
