"""Where the verdicts of each kind of result file stand, and how its numbers follow from them.

Three forms, published and ours: single-passage runs, CPT runs, continual summaries. A form is made from a
file's value, which it changes in place: ``places`` to read and put verdicts, then ``compute``. Texts,
questions and settings stay as they are. Grades nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from seal_nb.errors import DataError
from seal_nb.grading.base import IN_WORDS, Answered
from seal_nb.passages import Passage, Question
from seal_nb.protocol import Answers, build_reply
from seal_nb.results.continual import continual_matrix, summarize_sequences
from seal_nb.results.cpt import build_overall, by_title, per_passage_results, split_by_passage
from seal_nb.results.single_passage import run_from_json
from seal_nb.results.statistics import published_statistics, repeat_stats

Kind = Literal["baseline", "adapter"]
KINDS: tuple[Kind, ...] = ("baseline", "adapter")
_PUBLISHED_NUMBERS = {"baseline_accuracy", "adapter_accuracy", "adapter_gain", "gains"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """One verdict, at ``holder[field]``, or at ``holder[field][index]`` where that is a list."""

    kind: Kind
    holder: dict[str, Any]
    field: str
    index: int | None
    answered: Answered

    @property
    def verdict(self) -> bool | None:
        value = self.holder[self.field]
        found: bool | None = value if self.index is None else value[self.index]
        return found

    def put(self, verdict: bool | None) -> None:
        if self.index is None:
            self.holder[self.field] = verdict
        else:
            self.holder[self.field][self.index] = verdict


@dataclass(frozen=True, kw_only=True)
class Form:
    """The verdicts of a file in its order, and what computes its numbers from them, in the file's value."""

    places: tuple[Place, ...]
    compute: Callable[[], None]


def is_run(value: Any) -> bool:
    """Whether this is a file of one of the three forms."""
    return isinstance(value, dict) and bool(value.keys() & {"articles", "server_reply", "mean_over_sequences"})


def form_of(run: dict[str, Any], passages: Sequence[Passage] = (), *, path: str = "") -> Form:
    """``passages``: what a CPT run, or a summary without questions, was asked about, in the dataset's order.

    Raises: DataError for a broken file, one without answers, and for other passages than it was asked about.
    """
    if "articles" in run:
        form = _single_passage(run, path)
    elif "server_reply" in run:
        form = _cpt(run, passages, path)
    else:
        form = _continual(run, passages, path)
    if not form.places:
        raise DataError("holds no answers", path=path, remedy="give a run file that has its answers")
    return form


def _single_passage(run: dict[str, Any], path: str) -> Form:
    run_from_json(run, path=path)  # refuses what is broken, by item and field
    places = [
        Place(kind=kind, holder=row, field=f"{kind}_correct", index=None, answered=_answer_of(row, article, kind))
        for article in run["articles"]
        for completion in article.get("completions") or []
        for row in completion.get("questions") or []
        for kind in KINDS
    ]
    for place in places:
        place.holder.setdefault(place.field, None)
    return Form(places=tuple(places), compute=lambda: _compute_single_passage(run))


def _answer_of(row: dict[str, Any], article: dict[str, Any], kind: Kind) -> Answered:
    return Answered(
        title=article.get("title") or "",
        question=row.get("question") or "",
        gold=row.get("answer") or "",
        answer=row.get(f"{kind}_answer") or "",
    )


def _compute_single_passage(run: dict[str, Any]) -> None:
    passages = run_from_json(run).passages
    stats_P_E = [[dict(repeat_stats(edit.repeats())) for edit in passage.self_edits] for passage in passages]
    stats_P, run["overall"] = published_statistics(stats_P_E)
    for article, stats, stats_E in zip(run["articles"], stats_P, stats_P_E, strict=True):
        article["stats"] = stats
        for completion, own in zip(article.get("completions") or [], stats_E, strict=True):
            completion["stats"] = own
    answered = [row for passage in passages for edit in passage.self_edits for row in edit.questions]
    run["n_ungraded"] = sum(None in (row.baseline_correct, row.adapter_correct) for row in answered)


def _cpt(run: dict[str, Any], passages: Sequence[Passage], path: str) -> Form:
    reply = run["server_reply"]
    if not isinstance(reply, dict):
        raise DataError("is not an object", path=path, field="server_reply", remedy="write the file again")
    asked = passages[: run.get("n_articles") or None]
    questions = [(passage.title, question) for passage in asked for question in passage.questions]
    for kind in KINDS:
        for name in (f"{kind}_texts", f"{kind}_correct"):
            _check_length(reply.get(name), len(questions), path=path, field=f"server_reply.{name}")
    places = [
        Place(
            kind=kind, holder=reply, field=f"{kind}_correct", index=at,
            answered=_answered(title, question, reply[f"{kind}_texts"][at]),
        )
        for at, (title, question) in enumerate(questions)
        for kind in KINDS
    ]  # fmt: skip
    return Form(places=tuple(places), compute=lambda: _compute_cpt(run, asked))


def _compute_cpt(run: dict[str, Any], passages: Sequence[Passage]) -> None:
    reply = run["server_reply"]
    arms = [
        Answers(texts=reply[f"{kind}_texts"], verdicts=[IN_WORDS[v] for v in reply[f"{kind}_correct"]])
        for kind in KINDS
    ]
    built = build_reply(baseline=arms[0], adapter=arms[1])
    reply |= built.model_dump(mode="json", include=_PUBLISHED_NUMBERS)
    per_passage = per_passage_results(passages, reply["baseline_correct"], reply["adapter_correct"])
    run |= {
        "overall": build_overall(reply["baseline_correct"], reply["adapter_correct"]),
        "n_ungraded": built.n_ungraded,
        "per_article": by_title(per_passage),
        "per_passage": per_passage,
    }


def _continual(run: dict[str, Any], passages: Sequence[Passage], path: str) -> Form:
    sequences = run.get("sequences") or []
    questions_S_P = [_questions_of(sequence, passages, path, at) for at, sequence in enumerate(sequences)]
    places = []
    for sequence, questions_P in zip(sequences, questions_S_P, strict=True):
        for step, record in enumerate(sequence["steps"]):
            seen = questions_P if step == 0 else questions_P[:step]
            asked = [pair for pairs in seen for pair in pairs]
            for name in ("texts", "correct"):
                _check_length(record.get(name), len(asked), path=path, field=f"steps[{step}].{name}")
            places += [
                Place(
                    kind="adapter" if step else "baseline", holder=record, field="correct", index=at,
                    answered=_answered(title, question, record["texts"][at]),
                )
                for at, (title, question) in enumerate(asked)
            ]  # fmt: skip
    counts_S = [[len(pairs) for pairs in questions_P] for questions_P in questions_S_P]
    return Form(places=tuple(places), compute=lambda: _compute_continual(run, counts_S))


def _questions_of(
    sequence: dict[str, Any], passages: Sequence[Passage], path: str, at: int
) -> list[list[tuple[str, Question]]]:
    """(title, question) of each passage: as the file has them, else of the one passage of that title."""
    if "questions" in sequence:
        return [
            [(title, Question(**question)) for question in asked]
            for title, asked in zip(sequence["titles"], sequence["questions"], strict=True)
        ]
    found = []
    for title in sequence["titles"]:
        named = [passage for passage in passages if passage.title == title]
        if len(named) != 1:
            raise DataError(
                f"was asked about {title!r}, which {len(named)} passages of the dataset are called",
                path=path,
                item=f"sequence {at}",
                remedy="give the item file it was asked about (--dataset); where titles repeat, run it again",
            )
        found.append([(title, question) for question in named[0].questions])
    return found


def _compute_continual(run: dict[str, Any], counts_S: Sequence[Sequence[int]]) -> None:
    matrices = []
    for sequence, counts in zip(run["sequences"], counts_S, strict=True):
        rows = []
        for step, record in enumerate(sequence["steps"]):
            seen = len(counts) if step == 0 else step
            cut = split_by_passage(record["correct"], counts[:seen])
            rows.append([*cut, *[None] * (len(counts) - seen)])
            record["n_ungraded"] = sum(verdict is None for verdict in record["correct"])
        matrices.append(continual_matrix(rows))
    about = {"dataset": run.get("dataset", ""), "base_model": run.get("base_model", "")}
    run |= summarize_sequences(matrices, **about)


def _answered(title: str, question: Question, answer: str) -> Answered:
    return Answered(title=title, question=question.question, gold=question.answer, answer=answer)


def _check_length(values: Any, n_questions: int, *, path: str, field: str) -> None:
    n_there = len(values) if isinstance(values, list) else 0
    if n_there != n_questions or not n_questions:
        raise DataError(
            f"has {n_there} entries, and the passages {n_questions} questions",
            path=path,
            field=field,
            remedy="give the item file that this run was asked about (--dataset)",
        )
