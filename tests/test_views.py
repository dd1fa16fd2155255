"""The figures carry the data they are given, and the run page carries everything the notebooks show."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from seal_nb.cli import tell
from seal_nb.errors import DataError, SettingsError
from seal_nb.metrics import Estimate
from seal_nb.notebook_runner import for_stream
from seal_nb.results.run import ROUNDS_BY_PROMPT, SINGLE_PASSAGE, are_published_passages
from seal_nb.views.live import Progress, say
from seal_nb.views.plots import (
    Chart,
    asked_cells,
    plot_accuracy,
    plot_continual_curve,
    plot_continual_matrix,
    plot_gain_histogram,
    plot_gains,
    plot_losses,
    plot_rewards,
    plot_rounds,
)
from seal_nb.views.tables import as_html, as_text, mime_bundle, write_csv


def estimate(mean: float, low: float, high: float, n: int = 6, unit: str = "passages") -> Estimate:
    return Estimate(mean=mean, low=low, high=high, n=n, unit=unit)


ARMS = {"passage only": estimate(0.2, 0.1, 0.35), "hand-written": estimate(0.6, 0.45, 0.7)}


def lines_labelled(axes: Axes, label: str) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.get_lines() if line.get_label() == label]


def test_arm_bars_end_at_the_means_and_intervals_at_the_bounds() -> None:
    axes = plot_accuracy(ARMS, baseline=estimate(0.05, 0.0, 0.1)).axes[0]
    assert [bar.get_width() for bar in axes.patches[:2]] == [0.2, 0.6]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(ARMS)
    spans = axes.containers[0].lines[2][0].get_segments()
    assert np.allclose([[span[0][0], span[1][0]] for span in spans], [[0.1, 0.35], [0.45, 0.7]])


def test_arm_axis_names_n_and_what_the_bars_are() -> None:
    axes = plot_accuracy(ARMS).axes[0]
    assert "n = 6 passages" in axes.get_xlabel() and "95 % interval" in axes.get_xlabel()


def test_arms_over_different_numbers_of_passages_say_so() -> None:
    axes = plot_accuracy({**ARMS, "own": estimate(0.3, 0.2, 0.4, n=2)}).axes[0]
    assert "n = 2 to 6 passages" in axes.get_xlabel()


def test_baseline_is_a_line_at_its_mean() -> None:
    axes = plot_accuracy(ARMS, baseline=estimate(0.05, 0.0, 0.1)).axes[0]
    (line,) = [one for one in axes.get_lines() if str(one.get_label()).startswith("baseline")]
    assert list(line.get_xdata()) == [0.05, 0.05]


def test_published_marks_stand_only_on_arms_that_were_published() -> None:
    arms = {"passage only": ARMS["passage only"], "something of ours": ARMS["hand-written"]}
    axes = plot_accuracy(arms, published=SINGLE_PASSAGE).axes[0]
    marks = [line for line in axes.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [list(mark.get_xdata()) for mark in marks] == [[0.335, 0.335]]


def test_rounds_carry_estimates_published_values_and_passages() -> None:
    estimates = [estimate(0.3, 0.2, 0.4), None, estimate(0.5, 0.4, 0.6)]
    chart = plot_rounds({"implications": estimates}, per_passage=[[0.0, 0.5, 1.0]], published=ROUNDS_BY_PROMPT)
    axes = chart.axes[0]
    assert lines_labelled(axes, "published") == [[0.397, 0.427, 0.47]]
    assert list(axes.containers[0].lines[0].get_ydata()) == [0.3, 0.5]
    assert list(axes.containers[0].lines[0].get_xdata()) == [0.0, 2.0]
    assert any(list(line.get_ydata()) == [0.0, 0.5, 1.0] for line in axes.get_lines())
    assert "30.0%, not run, 50.0%" in chart.alt and "n = 6 passages" in axes.get_ylabel()


def test_cells_that_were_not_asked_are_masked_even_where_a_file_says_zero() -> None:
    published = [[0.3, 0.2], [0.4, 0.0], [0.2, 0.5]]
    assert asked_cells(published).mask.tolist() == [[False, False], [False, True], [False, False]]
    texts = [text.get_text() for text in plot_continual_matrix(published, n_sequences=2).axes[0].texts]
    assert texts == ["30%", "20%", "40%", "20%", "50%"]


def test_a_cell_of_which_nothing_is_known_is_masked_too() -> None:
    assert asked_cells([[0.3], [None]]).mask.tolist() == [[False], [True]]


def test_continual_matrix_names_its_rows_and_sequences() -> None:
    chart = plot_continual_matrix([[0.3, 0.2], [0.4, None], [0.2, 0.5]], n_sequences=2)
    labels = [text.get_text() for text in chart.axes[0].get_yticklabels()]
    assert labels == ["never edited", "after edit 1", "after edit 2"]
    assert "n = 2 sequences" in chart.axes[1].get_ylabel()


def test_charts_of_values_without_end_stay_small() -> None:
    matrix = plot_continual_matrix([[0.5] * 60] * 61, n_sequences=1)
    rewards = plot_rewards(["t"] * 400, [[0.5]] * 400, [[0]] * 400, [0.5] * 400)
    for chart, most in ((matrix, 41), (rewards, 200)):
        assert len(chart.axes[0].texts) == 0 and len(chart.axes[0].get_yticks()) <= most
        assert max(chart.get_size_inches()) < 100


def test_a_matrix_of_zeros_is_drawn() -> None:
    assert plot_continual_matrix([[0.0], [0.0]], n_sequences=1).drawn().startswith(b"\x89PNG")


def test_continual_curve_stands_beside_never_edited() -> None:
    seen = [estimate(0.4, 0.3, 0.5, 2, "sequences"), estimate(0.3, 0.2, 0.4, 2, "sequences")]
    axes = plot_continual_curve(seen, [0.1, 0.15], just_edited=[0.4, 0.6]).axes[0]
    assert lines_labelled(axes, "never edited, same passages") == [[0.1, 0.15]]
    assert lines_labelled(axes, "passage just edited") == [[0.4, 0.6]]
    assert list(axes.containers[0].lines[0].get_ydata()) == [0.4, 0.3]
    assert "n = 2 sequences" in axes.get_ylabel()


def test_passages_are_ordered_by_gain() -> None:
    chart = plot_gains(["lost", "won", "same"], [0.5, 0.0, 0.2], [0.1, 0.9, 0.2])
    assert [text.get_text() for text in chart.axes[0].get_yticklabels()] == ["won", "same", "lost"]
    assert chart.alt == "Of 3 passages 1 gain accuracy with the adapter, 1 lose."


def test_a_passage_that_nobody_could_grade_is_no_passage_with_zero() -> None:
    chart = plot_gains(["known", "a", "b"], [0.5, None, 0.2], [0.9, 0.4, None])
    assert chart.alt == "Of 1 passages 1 gain accuracy with the adapter, 0 lose."
    assert plot_gains([], [], []).alt.startswith("Of 0 passages")


def test_many_passages_become_a_histogram_that_counts_them_all() -> None:
    chart = plot_gains([str(i) for i in range(50)], [0.2] * 50, [0.2 + i / 100 for i in range(50)])
    assert sum(bar.get_height() for bar in chart.axes[0].patches) == 50


@pytest.mark.parametrize("gain", [-1.0, -0.05, 0.0, 0.05, 1.0])
def test_every_possible_gain_falls_into_a_bin(gain: float) -> None:
    assert sum(bar.get_height() for bar in plot_gain_histogram([gain]).axes[0].patches) == 1


def test_chosen_self_edits_are_drawn_at_their_reward_and_dropped_passages_have_none() -> None:
    axes = plot_rewards(["a", "b"], [[0.2, 0.6], [0.0, None]], [[1], []], baseline=[0.1, None]).axes[0]
    filled = [line for line in axes.get_lines() if line.get_zorder() == 3]
    assert [list(line.get_xdata()) for line in filled] == [[0.6]]


def test_loss_curves_keep_every_epoch_and_say_how_many_adapters() -> None:
    axes = plot_losses({"own": [2.0, 1.0], "passage only": [3.0, 2.5]}).axes[0]
    assert lines_labelled(axes, "own") == [[2.0, 1.0]] and "n = 2 adapters" in axes.get_xlabel()
    many = plot_losses({str(i): [float(i), 0.0] for i in range(9)}).axes[0]
    assert lines_labelled(many, "mean") == [[4.0, 0.0]]


def test_a_figure_shows_itself_as_a_picture_and_in_words() -> None:
    data, metadata = plot_accuracy(ARMS)._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == metadata["image/png"]["alt"]
    assert "hand-written 60.0% (45.0% to 70.0%)" in data["text/plain"]


def test_drawing_leaves_the_global_style_alone_and_needs_no_pyplot() -> None:
    before = dict(mpl.rcParams)
    plot_accuracy(ARMS)
    assert dict(mpl.rcParams) == before and mpl.rcParams["legend.frameon"]
    check = "import sys, seal_nb.views.plots; "
    check += "sys.exit(bool({'matplotlib.pyplot', 'torch', 'seaborn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_equal_figures_are_equal_files(tmp_path: Path, ending: str) -> None:
    (first,), (second,) = (plot_accuracy(ARMS).save(tmp_path / "new" / name, ending) for name in "ab")
    assert first.name == f"a.{ending}" and first.read_bytes() == second.read_bytes() != b""


def test_an_unknown_figure_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="figure format is 'bmp'; known are png, svg, pdf"):
        plot_accuracy(ARMS).save(tmp_path / "a", "bmp")


def test_a_table_is_the_same_in_text_and_html_and_everything_is_escaped() -> None:
    frame = pd.DataFrame({"arm": ["<b>own</b>", "x"], "accuracy": [0.25, None], "<i>": [3, 4]})
    assert as_text(frame) == "arm         accuracy  <i>\n<b>own</b>     25.0%    3\nx                  –    4"
    shown = as_html(frame, "<u>")
    assert all(f"&lt;{tag}&gt;" in shown for tag in ("b", "i", "u")) and "25.0%" in shown
    assert not any(f"<{tag}>" in shown for tag in ("b", "i", "u"))
    assert shown == as_html(frame.copy(), "<u>"), "saved outputs are the same every time"


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("gain", 0.073, "+7.3%"), ("p", 0.00012, "0.00012"), ("p", 0.456, "0.46"), ("n", 200, "200"), ("n", None, "–"),
        ("other", 0.123456, "0.1235"), ("sequences", 12.0, "12"), ("is_real", True, "True"), ("list", [1, 2], "[1, 2]"),
        ("tokens", 123456.0, "123,456"),
    ],
)  # fmt: skip
def test_the_column_name_chooses_the_format(column: str, value: object, text: str) -> None:
    assert as_text(pd.DataFrame({column: [value]})).split("\n")[1].strip() == text


def test_a_text_in_a_csv_file_is_no_formula_and_a_number_stays_one(tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "-3.5", "@x", "\tx", "\rx", "＝1", "plain", "a=b", None]
    frame = pd.DataFrame({"text": texts, "=n": [-3.5] * 10, "mixed": [-3.5, "-3.5", 2, True, [1], *"abcde"]})
    read = pd.read_csv(write_csv(frame, tmp_path / "new" / "a.csv"), dtype=str, keep_default_na=False)
    assert list(read["text"]) == ["'=1+1", "'+1", "'-3.5", "'@x", "'\tx", r"'\u000dx", "'＝1", "plain", "a=b", ""]
    assert list(read["'=n"]) == ["-3.5"] * 10 and list(read["mixed"][:5]) == ["-3.5", "'-3.5", "2", "True", "[1]"]


ATTACK = "a\x1b]0;x\x07b\x9b2J\u202ec\rd\ud800"
SHOWN = r"a\u001b]0;x\u0007b\u009b2J\u202ec\u000dd\ud800"


def test_hidden_characters_are_visible_in_tables_lines_bars_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame({ATTACK[:-1]: [ATTACK[:-1]]})  # no table of pandas has half a surrogate pair
    for shown in (as_text(frame, ATTACK), as_html(frame, ATTACK)):
        assert shown.count(SHOWN[:-6]) == 3 and shown.encode().decode().replace("\n", "").isprintable()
    say(ATTACK)
    Progress(ATTACK).at(1, 1)
    tell(ATTACK)
    write, _ = for_stream(sys.stdout)
    write(f"{ATTACK}\tz\r\n")
    said = [SHOWN, f"{SHOWN}: 1 of 1", SHOWN, f"{SHOWN}\tz\r"]
    assert capsys.readouterr().out.split("\n") == [*said, ""]
    assert DataError(ATTACK)._render_traceback_()[0] == f"DataError: {SHOWN}"


def test_a_name_with_dollar_signs_or_without_end_is_drawn(tmp_path: Path) -> None:
    names = [r"$\frac{$", "x" * 10**6, "\x1b\0"]
    plot_accuracy(dict.fromkeys(names, next(iter(ARMS.values())))).save(tmp_path / "a", "png")


def test_an_empty_table_says_so() -> None:
    assert mime_bundle(pd.DataFrame(columns=["a"]), "left out")["text/plain"] == "left out: no rows"


def test_a_long_cell_is_cut_in_the_text_and_whole_in_the_html() -> None:
    frame = pd.DataFrame({"text": ["word\n" * 40]})
    assert len(as_text(frame).split("\n")[1]) == 80 and as_html(frame).count("word") == 40


def test_published_lines_belong_to_the_published_passages_alone(golden: Path) -> None:
    from seal_nb.passages import load_passages

    passages = [(p.title, p.context) for p in load_passages(golden / "eval" / "base_val.json.gz")]
    assert are_published_passages(reversed(passages))
    assert not are_published_passages(passages[:199])


def test_published_values_are_those_of_the_released_runs(golden: Path) -> None:
    released = json.loads((golden / "published_results.json").read_text())["query_server"]
    by_file = {Path(run["file"]).name: run["overall"] for run in released if "/eval/" in run["file"]}
    for prompt, ending in {"implications": "", "rewrite": "_prompt-rewrite", "self-qa": "_prompt-self-qa"}.items():
        runs = [by_file[f"{model}{ending}.json"] for model in ("base", "iter1", "iter2")]
        assert [round(run["adapter_mean_accuracy"], 3) for run in runs] == pytest.approx(
            ROUNDS_BY_PROMPT[prompt], abs=0.0011
        )


def test_chart_is_a_matplotlib_figure() -> None:
    assert isinstance(plot_accuracy(ARMS), Chart) and isinstance(plot_accuracy(ARMS), mpl.figure.Figure)
