"""Statistics agree with the published ones bit for bit; what is not graded enters none of them."""

import json
from pathlib import Path

from seal_nb.metrics import published_statistics, repeat_stats
from seal_nb.results.collect import read_run


def test_all_1507_published_statistics_of_a_ranking_run_agree_to_the_last_bit(golden: Path) -> None:
    run = read_run(golden / "results/rank_iter0.json.gz")
    computed = [[repeat_stats(edit.repeats()) for edit in passage.self_edits] for passage in run.passages]
    articles, overall = published_statistics(computed)
    n_equal = 0
    for passage, stats_E, article in zip(run.passages, computed, articles, strict=True):
        assert article == passage.stored_stats
        n_equal += len(article)
        for edit, stats in zip(passage.self_edits, stats_E, strict=True):
            assert stats == edit.stored_stats
            n_equal += len(stats)
    assert overall == run.value["overall"]
    assert n_equal + len(overall) == 1507


def test_published_evaluations_agree_from_their_verdicts_alone(golden: Path) -> None:
    runs = json.loads((golden / "eval_correct.json").read_text())["runs"]
    for name, run in runs.items():
        pairs = [
            ([mark == "1" for mark in passage["baseline"]], [mark == "1" for mark in passage["adapter"]])
            for passage in run["passages"]
        ]
        stats = [[repeat_stats([pair])] for pair in pairs]
        assert published_statistics(stats)[1] == run["overall"], name


def test_a_repeat_without_a_verdict_is_left_out_of_the_self_edits_mean() -> None:
    graded = ([True, False], [True, True])
    outage: tuple[list[bool | None], list[bool | None]] = ([None, None], [None, None])
    assert repeat_stats([graded, outage]) == repeat_stats([graded])
    assert set(repeat_stats([outage]).values()) == {None}


def test_a_self_edit_that_cannot_be_ranked_leaves_the_passage_mean_to_the_others() -> None:
    good = repeat_stats([([False], [True])])
    outage = repeat_stats([([None], [None])])
    articles, overall = published_statistics([[good, outage], [outage]])
    assert articles[0]["adapter_mean_accuracy"] == 1.0
    assert articles[1]["adapter_mean_accuracy"] is None
    assert overall["adapter_mean_accuracy"] == 1.0


def test_a_gain_is_over_the_questions_graded_on_both_sides() -> None:
    """The adapter's right answer to a question whose baseline nobody could judge is no gain."""
    stats = repeat_stats([([True, None], [False, True])])
    assert (stats["adapter_mean"], stats["gain_mean"]) == (0.5, -1.0)
    assert repeat_stats([([True, None], [None, True])])["gain_mean"] is None
