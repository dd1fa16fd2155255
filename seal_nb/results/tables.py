"""Rows for the tables of the notebooks: an arm in numbers, its answers in words. Plain records, no drawing.

An arm is one way to make train sequences: the passage alone, self-edits, implications written by hand. Its
run file has the published name for self-edits, and the arm's name added for the others.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seal_nb.grading.base import Answered, Verdict
from seal_nb.grading.choose import make_grader
from seal_nb.metrics import Estimate, mean_interval, paired_difference, recitation_rate
from seal_nb.passages import Passage
from seal_nb.protocol import TTTReply
from seal_nb.results.collect import ARM_NAMES, SinglePassageResult, single_passage_result
from seal_nb.results.single_passage import AnsweredQuestion, SinglePassageRun
from seal_nb.self_edits import train_sequences

Match = Callable[[str, str, str], bool]
VERDICT_WORDS = {True: "right", False: "wrong", None: "ungraded"}
FLIPS: dict[tuple[bool | None, bool | None], int] = {
    (False, True): 0,
    (True, False): 1,
}  # what a reader wants to see first


def arm_row(run: SinglePassageRun, *, match: Match | None = None) -> dict[str, Any]:
    """One line of the table of arms; `match`: the rule that recitation is measured with (default: local)."""
    result = single_passage_result(run, run.path.name)
    adapter = result.adapter()
    return {
        "arm": result.arm,
        "passages": adapter.n if adapter else 0,
        "accuracy": adapter.mean if adapter else None,
        "low": adapter.low if adapter else None,
        "high": adapter.high if adapter else None,
        "gain": gain_sentence(result),
        "recited": recited(run, match or local_match),
        "ungraded": sum(verdict is None for verdicts in result.adapter_P_Q for verdict in verdicts),
    }


def gain_sentence(result: SinglePassageResult) -> str | None:
    """Adapter minus baseline with its paired interval, in words; None where a file has no verdicts."""
    if not any(verdict is not None for verdicts in result.adapter_P_Q for verdict in verdicts):
        return None
    return paired_difference(result.adapter_P_Q, result.baseline_P_Q).sentence()


def recited(run: SinglePassageRun, match: Match) -> float | None:
    """Share of adapter answers that hold the gold answer of another question of the same passage."""
    answered = [
        (passage.index, one) for passage in run.passages for edit in passage.self_edits for one in edit.questions
    ]
    if not answered:
        return None
    return recitation_rate(
        [one.question for _, one in answered],
        [one.gold for _, one in answered],
        [one.adapter_answer for _, one in answered],
        match,
        passages=[passage for passage, _ in answered],
    )


def local_match(question: str, gold: str, answer: str) -> bool:
    """The local rule: whether the answer counts as containing the gold answer."""
    (verdict,) = make_grader("local").grade([Answered(question=question, gold=gold, answer=answer)])
    return verdict is Verdict.CORRECT


def answer_rows(run: SinglePassageRun, *, limit: int) -> list[dict[str, str]]:
    """Questions with their answers without and with the adapter; flips to right first, then to wrong."""
    answered = [
        (passage.title, one) for passage in run.passages for edit in passage.self_edits for one in edit.questions
    ]
    answered.sort(key=lambda pair: FLIPS.get((pair[1].baseline_correct, pair[1].adapter_correct), 2))
    return [_answer_row(title, one) for title, one in answered[:limit]]


def _answer_row(title: str, one: AnsweredQuestion) -> dict[str, str]:
    return {
        "passage": title,
        "question": one.question,
        "gold": one.gold,
        "without adapter": one.baseline_answer,
        "with adapter": one.adapter_answer,
        "verdicts": f"{_word(one.baseline_correct)} → {_word(one.adapter_correct)}",
    }


def cpt_arm(run: Mapping[str, Any]) -> str:
    """The arm of a CPT run in words."""
    name = ARM_NAMES.get(str(run.get("arm")), str(run.get("arm")))
    return f"{name}, all weights" if run.get("method") == "full" else name


def cpt_estimate(run: Mapping[str, Any], which: str) -> Estimate:
    """Accuracy of a CPT run with every question counted once and its interval over passages.

    `which`: "baseline_correct" or "adapter_correct".
    """
    return mean_interval([entry[which] for entry in run["per_passage"]], weighting="question")


def cpt_row(run: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of CPT arms."""
    adapter = cpt_estimate(run, "adapter_correct")
    before, after = ([entry[w] for entry in run["per_passage"]] for w in ("baseline_correct", "adapter_correct"))
    return {
        "arm": cpt_arm(run),
        "passages": adapter.n,
        "questions": sum(map(len, after)),
        "accuracy": adapter.mean,
        "low": adapter.low,
        "high": adapter.high,
        "gain": paired_difference(after, before, weighting="question").sentence(),
        "ungraded": sum(verdict is None for verdicts in after for verdict in verdicts),
    }


def self_edit_rows(passages: Sequence[Passage]) -> list[dict[str, Any]]:
    """One line a self-edit, numbered as in run files: its length, what it becomes, its new words."""
    return [
        {
            "passage": passage.title,
            "self-edit": number,
            "words": len(text.split()),
            "train sequences": len(
                train_sequences(text, title=passage.title, context=passage.context, split_newlines=True)
            ),
            "new words": _share_of_new_words(text, passage.context),
        }
        for passage in passages
        for number, text in enumerate(passage.completions)
    ]


def _share_of_new_words(text: str, context: str) -> float | None:
    words = re.findall(r"\w+", text.casefold())
    known = set(re.findall(r"\w+", context.casefold()))
    return sum(word not in known for word in words) / len(words) if words else None


def reply_rows(asked: Sequence[Any], reply: TTTReply, *, start: int = 0) -> list[dict[str, str]]:
    """One line a question of one reply; `asked` (with question and answer) begin at index `start` of it."""
    return [
        {
            "question": one.question,
            "gold": one.answer,
            "without adapter": reply.baseline_texts[at],
            "with adapter": reply.adapter_texts[at],
            "verdicts": f"{_word(reply.baseline_correct[at])} → {_word(reply.adapter_correct[at])}",
        }
        for at, one in enumerate(asked, start=start)
    ]


def _word(correct: bool | None) -> str:
    return VERDICT_WORDS[correct]
