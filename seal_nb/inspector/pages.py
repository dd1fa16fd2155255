"""What the inspector shows, as tables of plain records: the same for a widget and for its static twin.

Every text is escaped. Looks nothing up and computes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from seal_nb.inspector.html import heading, text_block
from seal_nb.inspector.inspection import AnswerRow, ComparedRow, PassageRow, SelfEditRow, SequenceRow
from seal_nb.inspector.live_edit import LiveResult, OwnAnswer
from seal_nb.inspector.tokens import total_change
from seal_nb.metrics import counted
from seal_nb.protocol import ScoredText
from seal_nb.views.tables import Table

VERDICTS = {True: "right", False: "wrong", None: "ungraded"}
FLIP_SIGNS = {"gained": "▲\u00a0gained", "lost": "▼\u00a0lost", "ungraded": "?\u00a0ungraded"}
VERDICT_WORDS = {"CORRECT": "right", "INCORRECT": "wrong", "UNGRADED": "ungraded"}


def run_table(settings: Mapping[str, Any], name: str, n_passages: int, n_self_edits: int) -> Table:
    """What made a run, as far as its file says; settings one below the other."""
    params = settings.get("lora_params") or {}
    told = {
        "file": name,
        "model": settings.get("model"),
        "dataset": settings.get("dataset"),
        "arm": settings.get("arm"),
        "passages": n_passages,
        "self-edits": n_self_edits,
        "repeats": settings.get("eval_times"),
        "seed": settings.get("seed"),
        **{f"lora {key}": _short(value) for key, value in params.items()},
    }
    rows = [{"run": key, "": str(value)} for key, value in told.items() if value not in (None, "", [])]
    return Table(rows=rows, columns={"run": "", "": ""})


def passages_table(rows: Sequence[PassageRow], *, most: int = 15) -> Table:
    """The list to choose from; a long one is cut, and says so."""
    shown = [
        {
            "n": row.index,
            "passage": row.title,
            "self-edits": row.n_self_edits,
            "baseline": row.baseline,
            "best": row.best,
            "mean gain": row.gain,
            "gained": row.n_gained,
            "lost": row.n_lost,
            "ungraded": row.n_ungraded,
            "tied": row.n_tied_best if row.n_tied_best > 1 else 0,
        }
        for row in rows[:most]
    ]
    columns = {"n": "", "passage": "", "self-edits": "", "baseline": ".0%", "best": ".0%", "mean gain": "+.1%"}
    columns |= dict.fromkeys(["gained", "lost", "ungraded", "tied"], "")
    said = counted(len(rows), "passages") + (f", the first {most} shown" if len(rows) > most else "")
    return Table(rows=shown, columns=columns, caption=said)


def self_edits_table(rows: Sequence[SelfEditRow], *, with_text: bool = False) -> Table:
    """All self-edits of a passage in numbers; the best is marked, equals all are."""
    shown = [
        {
            "self-edit": row.index,
            "origin": origin(row),
            "baseline": row.baseline,
            "adapter": row.adapter,
            "gain": row.gain,
            "gold log-prob.": row.soft_gain,
            "gained": row.n_gained,
            "lost": row.n_lost,
            "ungraded": row.n_ungraded,
            "best": "★" if row.is_best else "",
            "text": row.text,
        }
        for row in rows
    ]
    columns = {"self-edit": "", "origin": "", "baseline": ".0%", "adapter": ".0%", "gain": "+.0%"}
    columns |= {"gold log-prob.": "+.1f", "gained": "", "lost": "", "ungraded": "", "best": ""}
    return Table(rows=shown, columns=columns | ({"text": ""} if with_text else {}))


def accuracies(row: SelfEditRow) -> str:
    """Accuracy without and with the adapter of a self-edit."""
    return f"accuracy {_percent(row.baseline)} → {_percent(row.adapter)}"


def origin(row: SelfEditRow) -> str:
    """Who wrote it, where the file says so."""
    return str(row.made.get("origin") or "the run").replace("_", " ")


def answers_table(rows: Sequence[AnswerRow]) -> Table:
    """Questions with both answers, each grader's verdicts, what flipped and what the texts tell about it."""
    repeats = len({row.repeat for row in rows}) > 1
    shown = [
        {
            "": FLIP_SIGNS.get(row.flip, ""),
            "rep": row.repeat,
            "question": row.question,
            "gold": row.gold,
            "without adapter": row.baseline_answer,
            "with adapter": row.adapter_answer,
            "verdicts": _verdicts(row),
            "gold log-prob.": row.soft_gain,
            "what the texts tell": row.why,
        }
        for row in rows
    ]
    columns = {"": ""} | ({"rep": ""} if repeats else {})
    columns |= dict.fromkeys(["question", "gold", "without adapter", "with adapter", "verdicts"], "")
    columns |= {"gold log-prob.": "+.1f"} if any(row.soft_gain is not None for row in rows) else {}
    disagree = sum(row.graders_disagree for row in rows)
    said = f"graders disagree on {disagree} of {len(rows)} questions" if disagree else ""
    return Table(rows=shown, columns=columns | {"what the texts tell": ""}, caption=said)


def sequences_table(rows: Sequence[SequenceRow]) -> Table:
    """The train sequences; what stands in ⟦ ⟧ carries no loss."""
    shown = [
        {
            "n": row.number,
            "train sequence": (f"⟦{row.unscored}⟧" if row.unscored else "") + row.scored,
            "": "the passage" if row.is_passage else "",
        }
        for row in rows
    ]
    return Table(rows=shown, columns={"n": "", "train sequence": "", "": ""})


def compared_table(rows: Sequence[ComparedRow], first: str, second: str) -> Table:
    """Two self-edits of a passage side by side, the largest difference first, the unknown ones last."""
    shown = [
        {
            "question": row.question,
            "gold": row.gold,
            "without adapter": row.baseline_answer,
            first: _answers(row.first_answers, row.first_correct),
            second: _answers(row.second_answers, row.second_correct),
            "right answers, second − first": row.difference,
        }
        for row in sorted(rows, key=_by_difference)
    ]
    columns = dict.fromkeys(["question", "gold", "without adapter", first, second], "")
    return Table(rows=shown, columns=columns | {"right answers, second − first": "+d"})


def _by_difference(row: ComparedRow) -> int:
    return 1 if row.difference is None else -abs(row.difference)


def texts_side_by_side(first: str, first_text: str, second: str, second_text: str) -> str:
    """Two self-edits as written, next to one another."""
    sides = ((first, first_text), (second, second_text))
    columns = [f"<div>{heading(name)}{text_block(text)}</div>" for name, text in sides]
    return f'<div class="sn-pair">{"".join(columns)}</div>'


def named_texts(scored: Sequence[ScoredText], questions: Sequence[tuple[str, str]]) -> list[tuple[str, ScoredText]]:
    """Each text under its heading, gold answers first, then the passage, then train sequences.

    ``questions``: (question, gold) in the order of the request; topic lines are left out.
    """
    order = ("gold", "passage", "train")
    named = []
    for one in sorted(scored, key=lambda one: (order.index(one.kind), one.index)):
        change = total_change(one)
        said = f" ({change:+.1f} nats)" if change is not None else ""
        names = {"passage": "The passage", "train": f"Train sequence {one.index + 1}"}
        name = questions[one.index][0].rpartition("\n")[2] if one.kind == "gold" else names[one.kind]
        named.append((f"{name}{said}", one))
    return named


def live_table(old: Sequence[AnswerRow], new: Sequence[AnswerRow], *, graders: tuple[str, str] | None = None) -> Table:
    """The answers of an edit beside those of the self-edit it came from.

    ``graders``: whose verdicts the old and the new answers have, "" where that is not known.
    """
    before: dict[str, AnswerRow] = {}
    for row in old:
        before.setdefault(row.question, row)
    shown = [
        {
            "": FLIP_SIGNS.get(row.flip, ""),
            "question": row.question,
            "gold": row.gold,
            "base": row.baseline_answer,
            "before the edit": _one_answer(before.get(row.question)),
            "after the edit": _one_answer(row),
            "gold log-prob.": row.soft_gain,
        }
        for row in new
    ]
    columns = dict.fromkeys(["", "question", "gold", "base", "before the edit", "after the edit"], "")
    before_by, after_by = (name or "a grader that is not recorded" for name in graders or ("", ""))
    said = f"verdicts before the edit by {before_by}, after it by {after_by}" if graders else ""
    return Table(rows=shown, columns=columns | {"gold log-prob.": "+.1f"}, caption=said)


def live_summary(result: LiveResult) -> str:
    """One sentence on what an edit's adapter did."""
    reply = result.reply
    known = [loss for loss in reply.epoch_losses if loss is not None]
    loss = f", loss {known[0]:.2f} → {known[-1]:.2f}" if known else ""
    return (
        f"accuracy {_percent(reply.baseline_accuracy)} → {_percent(reply.adapter_accuracy)} "
        f"after {reply.train_steps} steps{loss}"
    )


def own_table(rows: Sequence[OwnAnswer]) -> Table:
    """Questions of one's own, base against adapter, the newest first."""
    shown = [
        {
            "question": row.question,
            "gold": row.gold or None,
            "base": row.base_answer,
            "adapter": row.adapter_answer,
            "verdicts": f"{VERDICT_WORDS[row.base_verdict]} → {VERDICT_WORDS[row.adapter_verdict]}",
            "gold log-prob.": row.soft_gain,
        }
        for row in rows
    ]
    columns = dict.fromkeys(["question", "gold", "base", "adapter", "verdicts"], "")
    return Table(rows=shown, columns=columns | {"gold log-prob.": "+.1f"})


def _verdicts(row: AnswerRow) -> str:
    """The file's verdicts; each grader's where they differ."""
    said = {name: f"{VERDICTS[before]} → {VERDICTS[after]}" for name, (before, after) in row.verdicts.items()}
    if not row.graders_disagree:
        return said["file"]
    return "\n".join(f"{name}: {verdicts}" for name, verdicts in said.items())


def _one_answer(row: AnswerRow | None) -> str:
    return "–" if row is None else f"{row.adapter_answer}\n[{VERDICTS[row.verdicts['file'][1]]}]"


def _answers(texts: Sequence[str], correct: Sequence[bool | None]) -> str:
    """Equal answers of several repeats once, with how often."""
    counted: dict[tuple[str, bool | None], int] = {}
    for key in zip(texts, correct, strict=True):
        counted[key] = counted.get(key, 0) + 1
    lines = [
        f"{text}\n[{VERDICTS[verdict]}{f', {n} times' if n > 1 else ''}]" for (text, verdict), n in counted.items()
    ]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
