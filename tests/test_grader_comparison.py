"""Graders side by side on the same answers: biases of a made-up run by hand, of published runs measured."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from seal_nb.errors import SettingsError
from seal_nb.grading.choose import GRADERS
from seal_nb.passages import load_passages
from seal_nb.results.collect import read_run, run_of
from seal_nb.results.regrade import compare_graders, grade_file, regrade
from seal_nb.results.run import Run
from seal_nb.storage import read_json_lines
from seal_nb.views.plots import plot_graders
from tests.test_regrade import Says


def row(baseline: str, adapter: str, *verdicts: bool | None) -> dict[str, Any]:
    return {
        "rep": 0, "question": "Who built it?", "answer": "Ilse Corvandt",
        "baseline_answer": baseline, "adapter_answer": adapter,
        "baseline_correct": verdicts[0], "adapter_correct": verdicts[1],
    }  # fmt: skip


RIGHT, WRONG, SENTENCE = "Ilse Corvandt", "Pell Oduya", "It was built by Ilse Corvandt."
RUN = run_of({
    "articles": [
        {
            "title": "Clock", "context": "c",
            "completions": [{"text": "x", "questions": [
                row(WRONG, SENTENCE, False, True), row(WRONG, RIGHT, False, True),
                row(SENTENCE, SENTENCE, True, True), row(WRONG, WRONG, True, None),
            ]}],
        }
    ]
})  # fmt: skip


def by_name(graders: Any) -> dict[str, dict[str, Any]]:
    return {row["grader"]: row for row in graders.to_dict("records")}


def test_bias_of_each_arm_and_of_the_gain_by_hand() -> None:
    rows = by_name(compare_graders(RUN))
    assert set(rows) == {"in the file", *GRADERS}
    own, exact, local = rows["in the file"], rows["exact"], rows["local"]
    # The reference calls 2 of 4 and 3 of 3 correct; exact match 0 of 4 and 1 of 3.
    assert (own["n"], own["ungraded"], own["gain"]) == (7, 1, 0.5)
    assert (exact["baseline_bias"], exact["adapter_bias"]) == (-0.5, pytest.approx(-2 / 3))
    assert exact["gain_bias"] == pytest.approx(1 / 3 - 0.5)
    assert (local["agreement"], local["gain"]) == (pytest.approx(6 / 7), 0.75)


def test_an_answer_that_one_side_left_ungraded_counts_for_neither() -> None:
    silent = regrade(RUN, Says(lambda _: None, name="judge:m")).run
    graders = compare_graders(silent, reference="earlier (in the file)")
    rows = by_name(graders)
    judge = rows["judge:m (in the file)"]
    assert (judge["n"], judge["ungraded"]) == (0, 8)
    assert math.isnan(judge["baseline"]) and math.isnan(judge["kappa"])
    assert "judge" not in plot_graders(graders).alt


def reference_of(run: Run) -> list[str]:
    graders = compare_graders(run)
    return list(graders.grader[graders.agreement == 1])


def test_a_judge_is_the_reference_where_one_has_graded_and_else_the_first_grading() -> None:
    local = regrade(RUN, Says(lambda _: True, name="local")).run
    assert reference_of(local) == ["earlier (in the file)"]
    judged = regrade(local, Says(lambda one: one.answer == WRONG, name="judge:m")).run
    again = regrade(judged, Says(lambda _: True, name="f1")).run
    for run in (judged, again):
        assert reference_of(run) == ["judge:m (in the file)"]
    with pytest.raises(SettingsError, match="known are f1"):
        compare_graders(again, reference="oracle")


def test_of_several_gradings_without_a_judge_the_first_is_the_reference_and_the_file_has_the_newest() -> None:
    once = regrade(RUN, Says(lambda one: one.answer == RIGHT, name="exact")).run
    twice = regrade(once, Says(lambda _: False, name="f1")).run
    assert reference_of(twice) == ["earlier (in the file)"]
    again = regrade(twice, Says(lambda _: True, name="exact")).run
    graders = compare_graders(again)
    newest = graders[graders.grader == "exact (in the file)"].iloc[0]
    assert (newest["baseline"], newest["adapter"]) == (1.0, 1.0), "not its verdicts before f1"


def test_on_whole_published_runs_the_local_grader_bends_the_gain_least(golden: Path) -> None:
    """By 1.5 points at most; another grader may do better on one of the runs, and does worse on the other."""
    sizes: dict[str, list[float]] = {grader: [] for grader in GRADERS}
    for name in ("rank_iter0", "cpt_base"):
        path = next((golden / "results").glob(f"{name}.json*"))
        asked = load_passages(golden / "eval/base_val.json.gz") if name == "cpt_base" else ()
        run = read_run(path, passages=asked)
        rows = by_name(compare_graders(run))
        stored = run.value["overall"]
        published = stored.get("gain", stored.get("mean_gain"))
        assert rows["in the file"]["gain"] == pytest.approx(published, abs=0.005)
        for grader, found in sizes.items():
            found.append(abs(rows[grader]["gain_bias"]))
    assert min(sizes, key=lambda grader: max(sizes[grader])) == "local"
    assert max(sizes["local"]) <= 0.015


@pytest.mark.parametrize(("fewest", "most", "n", "kappa"), [(1, 1, 7316, 0.854), (7, math.inf, 2521, 0.644)])
def test_on_long_golds_the_local_grader_agrees_less(
    golden: Path, tmp_path: Path, fewest: int, most: float, n: int, kappa: float
) -> None:
    """The shipped weights on the answers that they were fitted to; cross-validated by title 0.854 and 0.633
    (docs/graders.md, and `kappa_by_words_of_gold` in the stored measurements)."""
    rows = [row for _, row in read_json_lines(golden / "graded_answers.jsonl.gz") if row["verdict"] is not None]
    chosen = [row for row in rows if fewest <= len(row["gold"].split()) <= most]
    (tmp_path / "chosen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    found = grade_file(tmp_path / "chosen.jsonl", tmp_path / "graded.jsonl").agreement()
    assert found is not None and found.n == n
    assert found.kappa == pytest.approx(kappa, abs=0.02)


def test_figure_says_in_words_what_each_grader_makes_of_it() -> None:
    chart = plot_graders(compare_graders(RUN))
    assert "in the file 50.0% → 100.0%" in chart.alt
    assert plot_graders(compare_graders(RUN).head(0)).alt.endswith(": no grader judged both arms.")
