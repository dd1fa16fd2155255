"""A single-passage run for reading: its passages, self-edits, answers and train sequences as DataFrames.

Opening a run computes only the list of passages. The other graders judge the answers of a passage when it is first
looked at. What is said about an answer compares texts: these are observations, not causes."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from seal_nb.errors import DataError, SettingsError
from seal_nb.experiments.settings import LORA_PARAMS, Training
from seal_nb.grading.base import AS_BOOLEAN, Grader
from seal_nb.grading.choose import make_grader
from seal_nb.grading.rules import as_one_piece, normalised, one_spelling
from seal_nb.passages import Passage, Question
from seal_nb.results.collect import read_run
from seal_nb.results.run import VERDICT_WORDS, verdict_change
from seal_nb.results.single_passage import AnsweredQuestion, EvaluatedPassage, EvaluatedSelfEdit, SinglePassageRun
from seal_nb.self_edits import sequences_of_text

OTHER_GRADERS = ("local", "recall")  # judge in addition to the file's verdicts; both work offline
GAINED, LOST, UNGRADED = "▲\u00a0gained", "▼\u00a0lost", "?\u00a0ungraded"
_FLIPS = {(False, True): GAINED, (True, False): LOST, (False, False): "stayed wrong", (True, True): "stayed right"}
FLIPS = (GAINED, LOST, UNGRADED, "stayed wrong", "stayed right")  # the order in which answers are listed
COUNTS = ("gained", "lost", "ungraded")  # columns with the number of each of the first three
DIFFERENCE = "right answers, second − first"
MOST_NUMBERS = 3  # train sequences named in one sentence

Pair = tuple[bool | None, bool | None]  # verdict without and with the adapter; None: ungraded


def open_run(source: str | Path) -> SinglePassageRun:
    """``read_run`` for a single-passage run. Raises: DataError, also for a run of another form."""
    run = read_run(source)
    if not isinstance(run, SinglePassageRun):
        raise DataError(f"is a {run.form} run, which has no self-edits", path=run.path, remedy="give a run_*.json file")
    return run


def settings_of_run(settings: Mapping[str, Any]) -> Training:
    """The training settings that a run file states, with soft scores on. Published files state some of them under
    ``lora_params``; ours state all of them, under ``training`` too."""
    published = {LORA_PARAMS.get(key, key): value for key, value in (settings.get("lora_params") or {}).items()}
    repeat: dict[str, Any] = next(iter(settings.get("repeats") or ()), {})  # a matched arm has epochs of its own
    own = {"answer_style": settings.get("answer_style"), "finetune_epochs": repeat.get("finetune_epochs")}
    stated = [*(settings.get("training") or {}).items(), *published.items(), *own.items()]
    known = {name: value for name, value in stated if value is not None and name in Training.__dataclass_fields__}
    return Training(**known | {"soft_scores": True})


def flip_of(before: float | None, after: float | None) -> str:
    """How a verdict changed, as one of FLIPS. A verdict is True or False, 1.0 or 0.0; None and nan are ungraded."""
    return _FLIPS.get((before, after), UNGRADED)  # type: ignore[arg-type]


def contains(text: str, *golds: str) -> bool:
    """Whether the text contains a gold answer: its words in a row in one spelling, or as it is written if that has no
    words that can be cut."""
    known, spelled = f" {normalised(one_spelling(text))} ", [(normalised(one_spelling(gold)), gold) for gold in golds]
    in_words = [f" {words} " in known for words, _ in spelled if words]
    return any(in_words) or any(as_one_piece(gold, text) for words, gold in spelled if not (words and words.isascii()))


def observation(one: AnsweredQuestion, asked: Sequence[AnsweredQuestion], sequences: Sequence[str]) -> str:
    """What the texts show about one answer, in one sentence. The last train sequence is the passage."""
    sides = {"baseline": one.baseline_correct, "adapter": one.adapter_correct}
    if missing := [side for side, verdict in sides.items() if verdict is None]:
        return f"no verdict on the {' and the '.join(missing)} answer"
    found = [str(number) for number, text in enumerate(sequences[:-1], start=1) if contains(text, *one.golds)]
    if found:
        numbers = ", ".join(found[:MOST_NUMBERS]) + (" …" if len(found) > MOST_NUMBERS else "")
        plural, verb = ("s", "contain") if len(found) > 1 else ("", "contains")
        facts = [f"train sequence{plural} {numbers} of {len(sequences)} {verb} the gold answer"]
    elif contains(sequences[-1], *one.golds):
        facts = ["only the passage contains the gold answer"]
    else:
        facts = ["no train sequence contains the words of the gold answer"]
    if not one.adapter_answer.strip():
        facts.append("the adapter's answer is empty")
    elif not one.adapter_correct:
        own = {*map(str.casefold, one.golds)}
        others = {other.gold for other in asked if other.gold.casefold() not in own}
        recited = sorted(gold for gold in others if contains(one.adapter_answer, gold))
        facts += [f"the adapter's answer contains that of another question: {gold!r}" for gold in recited[:1]]
    elif not contains(one.adapter_answer, *one.golds):
        facts.append("the adapter's answer uses other words")
    return "; ".join(facts)


def as_passage(evaluated: EvaluatedPassage) -> Passage:
    """The passage of a run with each of its questions once, as an item file would have it."""
    asked = {one.question: one for edit in evaluated.self_edits for one in edit.questions}
    questions = tuple(
        Question(question=question, answer=one.gold, other_answers=tuple(one.other_golds))
        for question, one in asked.items()
    )
    return Passage(title=evaluated.title, context=evaluated.context, questions=questions)


def sequences_of(evaluated: EvaluatedPassage, text: str, *, split_newlines: bool) -> list[str]:
    """The train sequences of a text about a passage. An empty text gives those of the passage-only arm."""
    split = split_newlines or not text.strip()
    return sequences_of_text(text, title=evaluated.title, context=evaluated.context, split_newlines=split)


def graders_disagree(verdicts: Iterable[Pair]) -> bool:
    """Whether two graders gave different verdicts on the baseline's or the adapter's answer."""
    return any(len({*side} - {None}) > 1 for side in zip(*verdicts, strict=True))


_FILTERS = {  # pandas queries over ``Inspection.passages``
    "all": "n >= 0",
    "gains": "gain > 0",
    "losses": "gain < 0 or lost > 0",
    "ties": "tied > 0",
    "ungraded": "ungraded > 0",
    "graders disagree": "disagree > 0",
}
_ORDERS = {  # column → ascending
    "file order": {"n": True},
    "largest gain": {"gain": False},
    "largest loss": {"gain": True, "lost": False},
    "most ungraded": {"ungraded": False},
    "most disagreement": {"disagree": False},
}
SHOWN, SORTED = tuple(_FILTERS), tuple(_ORDERS)


class Inspection:
    """A run that is opened for looking at. ``graders`` (names) judge in addition to the file's own verdicts."""

    def __init__(self, run: SinglePassageRun, *, graders: Sequence[str] = OTHER_GRADERS) -> None:
        self.run = run
        self.graders: dict[str, Grader] = {name: make_grader(name) for name in graders}
        self._answers: dict[tuple[int, int], pd.DataFrame] = {}

    def made_with(self) -> pd.DataFrame:
        """How the run was made, as far as its file says."""
        settings = self.run.settings
        values = {
            "file": self.run.path.name,
            **{name: settings.get(name) for name in ("model", "dataset", "arm")},
            "passages": len(self.run.passages),
            "self-edits": sum(len(one.self_edits) for one in self.run.passages),
            "repeats": settings.get("eval_times"),
            "seed": settings.get("seed"),
            **{f"lora {key}": value for key, value in (settings.get("lora_params") or {}).items()},
        }
        texts = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in values.items()}
        return pd.DataFrame([{"run": key, "value": str(v)} for key, v in texts.items() if v not in (None, "")])

    @cached_property
    def passages(self) -> pd.DataFrame:
        """One row a passage: accuracies, flips of all answers, and how many self-edits tie for the best."""
        edits = self._self_edits.groupby("passage")
        columns = {
            "n": range(len(self.run.passages)),
            "passage": [one.title for one in self.run.passages],
            "self-edits": edits.size(),
            "baseline": edits["baseline"].mean(),
            "best": edits["adapter"].max(),
            "gain": edits["gain"].mean(),
            **{name: edits[name].sum() for name in COUNTS},
            "tied": edits["best"].sum().replace(1, 0),
        }
        table = pd.DataFrame(columns, index=columns["n"])
        whole = ["self-edits", *COUNTS, "tied"]
        return table.assign(**table[whole].fillna(0).astype(int))

    def select(self, show: str = "all", sort: str = "file order", search: str = "") -> pd.DataFrame:
        """Rows of ``passages`` that match, in order. "graders disagree" and "most disagreement" grade the whole run.
        Raises: SettingsError for an unknown filter or order."""
        for name, value, known in (("show", show, SHOWN), ("sort", sort, SORTED)):
            if value not in known:
                raise SettingsError(f"{name} is {value!r}; known are {', '.join(known)}")
        table, order, wanted = self.passages, _ORDERS[sort], search.casefold().strip()
        if show == "graders disagree" or sort == "most disagreement":
            table = table.assign(disagree=table["n"].map(self.n_disagreements))
        table = table.query(_FILTERS[show]).sort_values([*order], ascending=[*order.values()], kind="stable")
        return table.loc[[wanted in self._searched(n) for n in table["n"]], self.passages.columns]

    @cached_property
    def _self_edits(self) -> pd.DataFrame:
        rows = []
        for passage in self.run.passages:
            for edit in passage.self_edits:
                stats = edit.stats()
                flips = Counter(flip_of(one.baseline_correct, one.adapter_correct) for one in edit.questions)
                row = [passage.index, edit.index, str(edit.made.get("origin") or "the run").replace("_", " ")]
                row += [stats[name] for name in ("baseline_mean", "adapter_mean", "gain_mean")]
                rows.append([*row, edit.soft_gain(), *(flips[one] for one in FLIPS[:3]), edit.text or ""])
        accuracies = ["baseline", "adapter", "gain", "soft_gain"]
        table = pd.DataFrame(rows, columns=["passage", "self-edit", "origin", *accuracies, *COUNTS, "text"])
        table = table.astype(dict.fromkeys(accuracies, float))
        table.insert(10, "best", table["adapter"] == table.groupby("passage")["adapter"].transform("max"))
        return table

    def self_edits(self, passage: int) -> pd.DataFrame:
        """One row a self-edit, in file order. ``best`` is true for several self-edits if their accuracies are equal."""
        table = self._self_edits
        return table[table["passage"] == passage].drop(columns="passage").reset_index(drop=True)

    def answers(self, passage: int, self_edit: int) -> pd.DataFrame:
        """One row a question and repeat, flips first. ``verdicts`` are the file's, or those of each grader where they
        ``disagree``. ``answer`` is the adapter's answer with the file's verdict, ``right`` that verdict as a number.
        ``soft_gain`` is the change in log-probability of the gold answer, in nats."""
        if (passage, self_edit) not in self._answers:
            evaluated = self.run.passages[passage]
            self._answers[passage, self_edit] = self._judged(evaluated, evaluated.self_edits[self_edit])
        return self._answers[passage, self_edit]

    def n_disagreements(self, passage: int) -> int:
        """Answers over all self-edits on which the graders disagree."""
        n_edits = len(self.run.passages[passage].self_edits)
        return sum(int(self.answers(passage, edit)["disagree"].sum()) for edit in range(n_edits))

    def sequences(self, passage: int, self_edit: int) -> pd.DataFrame:
        """What the adapter was trained on. Text in ⟦ ⟧ carries no loss. The training divides by tokens, this table by
        characters. The first token carries no loss either, because nothing predicts it; only the tokenizer knows which
        characters it spans."""
        evaluated = self.run.passages[passage]
        edit = evaluated.self_edits[self_edit]
        params = edit.made.get("lora_params") or self.run.settings.get("lora_params") or {}
        texts, mask = self._sequences(evaluated, edit), str(params.get("end_mask_substring") or "")
        marked = [f"⟦{text.replace(mask, f'{mask}⟧', 1)}" if mask and mask in text else text for text in texts]
        origins = ["the self-edit"] * (len(texts) - 1) + ["the passage"]
        return pd.DataFrame({"n": range(1, len(texts) + 1), "train sequence": marked, "from": origins})

    def compare(self, passage: int, first: int, second: int) -> pd.DataFrame:
        """Two self-edits of a passage, question by question; the largest difference first, unknown ones last."""
        sides = [self.answers(passage, one).groupby("question", sort=False) for one in (first, second)]
        table = sides[0][["gold", "without adapter"]].first()
        for number, side in zip((first, second), sides, strict=True):
            table[f"self-edit {number}"] = side["answer"].agg(_equal_once)
        before, after = (side["right"].agg(lambda right: right.sum(skipna=False)) for side in sides)
        table = table.assign(**{DIFFERENCE: after.astype(float) - before}).reset_index()
        return table.sort_values(DIFFERENCE, key=lambda values: -values.abs(), kind="stable")

    def compare_edit(self, passage: int, old: int, new: int) -> pd.DataFrame:
        """The first answers of an edit next to those of the self-edit it was made from. ``flip``: what it changed."""
        first = (self.answers(passage, edit).sort_values("rep", kind="stable") for edit in (old, new))
        before, after = (answers.drop_duplicates("question") for answers in first)
        before = before.set_index("question").reindex(after["question"]).reset_index()
        flips = [flip_of(*verdicts) for verdicts in zip(before["right"], after["right"], strict=True)]
        table = after.assign(**{"flip": flips, "before the edit": before["answer"], "after the edit": after["answer"]})
        columns = ["flip", "question", "gold", "without adapter", "before the edit", "after the edit", "soft_gain"]
        return _flips_first(table)[columns]

    def with_self_edit(self, passage: int, edit: EvaluatedSelfEdit) -> "Inspection":
        """The same run with one more self-edit of a passage. No file is written."""
        evaluated = self.run.passages[passage]
        added = edit.model_copy(update={"index": len(evaluated.self_edits)})
        grown = Inspection(copy(self.run), graders=())
        grown.graders, grown._answers = self.graders, dict(self._answers)
        grown.run.passages = list(self.run.passages)
        grown.run.passages[passage] = evaluated.model_copy(update={"self_edits": [*evaluated.self_edits, added]})
        return grown

    def _judged(self, passage: EvaluatedPassage, edit: EvaluatedSelfEdit) -> pd.DataFrame:
        asked, sequences = edit.questions, self._sequences(passage, edit)
        by_grader = {"file": [(one.baseline_correct, one.adapter_correct) for one in asked]}
        by_grader |= {name: verdict_pairs(grader, passage, asked) for name, grader in self.graders.items()}
        pairs = [dict(zip(by_grader, of_one, strict=True)) for of_one in zip(*by_grader.values(), strict=True)]
        columns = {
            "flip": [flip_of(one.baseline_correct, one.adapter_correct) for one in asked],
            "rep": [one.repeat for one in asked],
            "question": [one.question for one in asked],
            "gold": [one.gold for one in asked],
            "without adapter": [one.baseline_answer for one in asked],
            "with adapter": [one.adapter_answer for one in asked],
            "verdicts": [_verdicts(of_one) for of_one in pairs],
            "soft_gain": [one.soft_gain for one in asked],
            "what the texts show": [observation(one, asked, sequences) for one in asked],
            "disagree": [graders_disagree(of_one.values()) for of_one in pairs],
            "answer": [f"{one.adapter_answer}\n[{VERDICT_WORDS[one.adapter_correct]}]" for one in asked],
            "right": [one.adapter_correct for one in asked],
        }
        table = pd.DataFrame(columns).astype({"soft_gain": float, "disagree": bool, "right": float})
        return _flips_first(table)

    def _sequences(self, passage: EvaluatedPassage, edit: EvaluatedSelfEdit) -> list[str]:
        splits = edit.made.get("split_newlines", self.run.settings.get("split_newlines"))
        source = self.run.passages[edit.made.get("text_of", passage.index)]  # of the arm `shuffled` another one
        return sequences_of(source, edit.text or "", split_newlines=splits is None or bool(splits))

    def _searched(self, passage: int) -> str:
        one = self.run.passages[passage]
        questions = (asked.question for edit in one.self_edits[:1] for asked in edit.questions)
        return "\n".join([one.title, one.context, *questions]).casefold()


def _flips_first(answers: pd.DataFrame) -> pd.DataFrame:
    return answers.sort_values("flip", key=lambda flips: flips.map(FLIPS.index), kind="stable", ignore_index=True)


def verdict_pairs(grader: Grader, passage: EvaluatedPassage, asked: Sequence[AnsweredQuestion]) -> list[Pair]:
    """A grader's verdicts on each question's two answers. Equal answers are judged once."""
    given = [one.answered(text, passage.title) for one in asked for text in (one.baseline_answer, one.adapter_answer)]
    unique = list(dict.fromkeys(given))
    known = dict(zip(unique, grader.grade(unique), strict=True))
    verdicts = [AS_BOOLEAN[known[one]] for one in given]
    return list(zip(verdicts[::2], verdicts[1::2], strict=True))


def _verdicts(by_grader: Mapping[str, Pair]) -> str:
    """The file's verdicts, or those of each grader where the graders disagree."""
    words = {name: verdict_change(*pair) for name, pair in by_grader.items()}
    return "\n".join(map(": ".join, words.items())) if graders_disagree(by_grader.values()) else words["file"]


def _equal_once(texts: pd.Series) -> str:
    """The answers of several repeats; equal ones once, with their number."""
    return "\n".join(f"{text}{f' ({n} times)' if n > 1 else ''}" for text, n in Counter(texts).items())
