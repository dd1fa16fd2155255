"""The figures carry the data they are given, and the run page carries everything the notebooks show."""

import base64
import json
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
from matplotlib.axes import Axes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from seal_nb.chain.index import write_index
from seal_nb.errors import DataError, SettingsError
from seal_nb.results.published import ROUNDS_BY_PROMPT, SINGLE_PASSAGE, are_published_passages
from seal_nb.views.continual_plots import asked_cells, continual_curve, continual_matrix
from seal_nb.views.plots import accuracy_across_rounds, accuracy_by_arm, gain_by_passage, gain_histogram
from seal_nb.views.style import STYLE, Chart, png_bytes, save_figure
from seal_nb.views.tables import Table
from seal_nb.views.training_plots import self_edit_rewards, training_loss


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float
    high: float
    n: int = 6


ARMS = {"passage only": Estimate(0.2, 0.1, 0.35), "hand-written": Estimate(0.6, 0.45, 0.7)}
PIXEL = base64.b64encode(png_bytes(training_loss({"a": [1.0]}))).decode()


def lines_labelled(axes: Axes, label: str) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.get_lines() if line.get_label() == label]


def test_arm_bars_end_at_the_means_and_intervals_at_the_bounds() -> None:
    axes = accuracy_by_arm(ARMS, baseline=Estimate(0.05, 0.0, 0.1)).axes[0]
    assert [bar.get_width() for bar in axes.patches[:2]] == [0.2, 0.6]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(ARMS)
    spans = [bars.get_segments()[0] for container in axes.containers[1:] for bars in container.lines[2]]
    assert np.allclose([[span[0][0], span[1][0]] for span in spans], [[0.1, 0.35], [0.45, 0.7]])


def test_arm_axis_names_n_and_what_the_bars_are() -> None:
    axes = accuracy_by_arm(ARMS).axes[0]
    assert "n = 6 passages" in axes.get_xlabel() and "95 % interval" in axes.get_xlabel()


def test_arms_over_different_numbers_of_passages_say_so() -> None:
    axes = accuracy_by_arm({**ARMS, "own": Estimate(0.3, 0.2, 0.4, n=2)}).axes[0]
    assert "n = 2 to 6 passages" in axes.get_xlabel()


def test_baseline_is_a_line_at_its_mean() -> None:
    axes = accuracy_by_arm(ARMS, baseline=Estimate(0.05, 0.0, 0.1)).axes[0]
    (line,) = [one for one in axes.get_lines() if str(one.get_label()).startswith("not adapted")]
    assert list(line.get_xdata()) == [0.05, 0.05]


def test_published_marks_stand_only_on_arms_that_were_published() -> None:
    arms = {"passage only": ARMS["passage only"], "something of ours": ARMS["hand-written"]}
    axes = accuracy_by_arm(arms, published=SINGLE_PASSAGE).axes[0]
    marks = [line for line in axes.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [list(mark.get_xdata()) for mark in marks] == [[0.335, 0.335]]


def test_rounds_carry_estimates_published_values_and_passages() -> None:
    estimates = [Estimate(0.3, 0.2, 0.4), None, Estimate(0.5, 0.4, 0.6)]
    chart = accuracy_across_rounds(
        {"implications": estimates}, per_passage=[[0.0, 0.5, 1.0]], published=ROUNDS_BY_PROMPT
    )
    axes = chart.axes[0]
    assert lines_labelled(axes, "published") == [[0.397, 0.427, 0.47]]
    assert list(axes.containers[0].lines[0].get_ydata()) == [0.3, 0.5]
    assert list(axes.containers[0].lines[0].get_xdata()) == [0.0, 2.0]
    assert any(list(line.get_ydata()) == [0.0, 0.5, 1.0] for line in axes.get_lines())
    assert "30.0%, not run, 50.0%" in chart.alt and "n = 6 passages" in axes.get_ylabel()


def test_cells_that_were_not_asked_are_masked_even_where_a_file_says_zero() -> None:
    published = [[0.3, 0.2], [0.4, 0.0], [0.2, 0.5]]
    assert asked_cells(published).mask.tolist() == [[False, False], [False, True], [False, False]]
    texts = [text.get_text() for text in continual_matrix(published, n_sequences=2).axes[0].texts]
    assert texts == ["30%", "20%", "40%", "20%", "50%"]


def test_a_cell_of_which_nothing_is_known_is_masked_too() -> None:
    assert asked_cells([[0.3], [None]]).mask.tolist() == [[False], [True]]


def test_continual_matrix_names_its_rows_and_sequences() -> None:
    chart = continual_matrix([[0.3, 0.2], [0.4, None], [0.2, 0.5]], n_sequences=2)
    labels = [text.get_text() for text in chart.axes[0].get_yticklabels()]
    assert labels == ["never edited", "after edit 1", "after edit 2"]
    assert "n = 2 sequences" in chart.axes[1].get_ylabel()


def test_a_matrix_of_zeros_is_drawn() -> None:
    assert png_bytes(continual_matrix([[0.0], [0.0]], n_sequences=1)).startswith(b"\x89PNG")


def test_continual_curve_stands_beside_never_edited() -> None:
    seen = [Estimate(0.4, 0.3, 0.5, n=2), Estimate(0.3, 0.2, 0.4, n=2)]
    axes = continual_curve(seen, [0.1, 0.15], just_edited=[0.4, 0.6]).axes[0]
    assert lines_labelled(axes, "never edited, same passages") == [[0.1, 0.15]]
    assert lines_labelled(axes, "passage just edited") == [[0.4, 0.6]]
    assert list(axes.containers[0].lines[0].get_ydata()) == [0.4, 0.3]
    assert "n = 2 sequences" in axes.get_ylabel()


def test_passages_are_ordered_by_gain() -> None:
    chart = gain_by_passage(["lost", "won", "same"], [0.5, 0.0, 0.2], [0.1, 0.9, 0.2])
    assert [text.get_text() for text in chart.axes[0].get_yticklabels()] == ["won", "same", "lost"]
    assert chart.alt == "Of 3 passages 1 gain accuracy with the adapter, 1 lose."


def test_a_passage_that_nobody_could_grade_is_no_passage_with_zero() -> None:
    chart = gain_by_passage(["known", "a", "b"], [0.5, None, 0.2], [0.9, 0.4, None])
    assert chart.alt == "Of 1 passages 1 gain accuracy with the adapter, 0 lose."
    assert gain_by_passage([], [], []).alt.startswith("Of 0 passages")


def test_many_passages_become_a_histogram_that_counts_them_all() -> None:
    chart = gain_by_passage([str(i) for i in range(50)], [0.2] * 50, [0.2 + i / 100 for i in range(50)])
    assert sum(bar.get_height() for bar in chart.axes[0].patches) == 50


@pytest.mark.parametrize("gain", [-1.0, -0.05, 0.0, 0.05, 1.0])
def test_every_possible_gain_falls_into_a_bin(gain: float) -> None:
    assert sum(bar.get_height() for bar in gain_histogram([gain]).axes[0].patches) == 1


def test_chosen_self_edits_are_drawn_at_their_reward_and_dropped_passages_have_none() -> None:
    axes = self_edit_rewards(["a", "b"], [[0.2, 0.6], [0.0, None]], [[1], []], baseline=[0.1, None]).axes[0]
    filled = [line for line in axes.get_lines() if line.get_zorder() == 3]
    assert [list(line.get_xdata()) for line in filled] == [[0.6]]


def test_loss_curves_keep_every_epoch_and_say_how_many_adapters() -> None:
    axes = training_loss({"own": [2.0, 1.0], "passage only": [3.0, 2.5]}).axes[0]
    assert lines_labelled(axes, "own") == [[2.0, 1.0]] and "n = 2 adapters" in axes.get_xlabel()
    many = training_loss({str(i): [float(i), 0.0] for i in range(9)}).axes[0]
    assert lines_labelled(many, "mean") == [[4.0, 0.0]]


def test_a_figure_shows_itself_as_a_picture_and_in_words() -> None:
    data, metadata = accuracy_by_arm(ARMS)._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"] == metadata["image/png"]["alt"]
    assert "hand-written 60.0% (45.0% to 70.0%)" in data["text/plain"]


def test_drawing_leaves_the_global_style_alone_and_needs_no_pyplot() -> None:
    before = dict(mpl.rcParams)
    accuracy_by_arm(ARMS)
    assert dict(mpl.rcParams) == before and mpl.rcParams["axes.titlesize"] != STYLE["axes.titlesize"]
    check = "import sys, seal_nb.views.plots, seal_nb.chain.index, seal_nb.views.continual_plots; "
    check += "sys.exit(bool({'matplotlib.pyplot', 'torch', 'seaborn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_equal_figures_are_equal_files(tmp_path: Path, ending: str) -> None:
    first = save_figure(accuracy_by_arm(ARMS), tmp_path / f"a{ending}").read_bytes()
    assert first == save_figure(accuracy_by_arm(ARMS), tmp_path / f"b{ending}").read_bytes()


def test_an_unknown_figure_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="figure format is 'bmp'; known are svg, pdf, png"):
        save_figure(accuracy_by_arm(ARMS), tmp_path / "a.bmp")


def test_table_is_the_same_in_text_html_and_csv(tmp_path: Path) -> None:
    table = Table(
        rows=[{"arm": "<b>own</b>", "accuracy": 0.25}, {"arm": "x", "accuracy": None}],
        columns={"arm": "", "accuracy": ".1%"},
    )
    assert repr(table) == "arm         accuracy\n<b>own</b>     25.0%\nx                  –"
    assert "&lt;b&gt;own&lt;/b&gt;" in table._repr_html_() and "<b>" not in table._repr_html_()
    assert table.to_csv(tmp_path / "t.csv").read_text() == "arm,accuracy\n<b>own</b>,0.25\nx,\n"


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


class Page(HTMLParser):
    """What a reader of the page gets: tags with attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def executed(folder: Path, name: str, *cells: nbformat.NotebookNode) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), folder / name)
    return folder / name


def shown(data: dict[str, str], **metadata: object) -> nbformat.NotebookNode:
    return new_code_cell("x", outputs=[new_output("display_data", data=data, metadata=metadata)])


def test_index_holds_every_figure_and_table_with_alt_text_and_link(tmp_path: Path) -> None:
    picture = shown({"image/png": PIXEL, "text/plain": "<Figure>"}, **{"image/png": {"alt": "a <curve>"}})
    table = shown({"text/html": Table(rows=[{"arm": "own", "n": 6}], columns={"arm": "", "n": ""})._repr_html_()})
    executed(tmp_path / "one", "03_query_server.ipynb", new_markdown_cell("# Query"), picture, table)
    executed(tmp_path / "two", "04 cpt.ipynb", new_markdown_cell("# CPT"), picture)
    page = Page(write_index(tmp_path).read_text())
    assert [image["alt"] for image in page.all("img")] == ["a <curve>", "a <curve>"]
    assert all(image["src"] == f"data:image/png;base64,{PIXEL}" for image in page.all("img"))
    links = [link["href"] for link in page.all("a")]
    assert "one/03_query_server.ipynb" in links and "two/04%20cpt.ipynb" in links
    assert {"arm", "own", "n", "6", "Query", "CPT"} <= set(page.texts)


def test_index_escapes_everything_that_comes_out_of_a_notebook(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    html_table = f"<table onclick='x'><tr><td>{evil}<img src=x onerror=y>cell</td></tr></table>"
    parameters = new_code_cell('dataset: str = "<i>"  # <u>', metadata={"tags": ["parameters"]})
    executed(tmp_path, "<b>.ipynb", new_markdown_cell(f"# {evil}"), parameters, shown({"text/html": html_table}))
    page = Page(write_index(tmp_path, title=evil).read_text())
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in page.tags} and not page.all("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "cell" in page.texts and "'<i>'" in page.texts and "<u>" in page.texts


def test_index_shows_the_settings_that_were_injected(tmp_path: Path) -> None:
    declared = new_code_cell(
        "lora_rank: int = 32  # published run files\nseed: int = 0", metadata={"tags": ["parameters"]}
    )
    injected = new_code_cell("# Parameters\nlora_rank = 8", metadata={"tags": ["injected-parameters"]})
    executed(tmp_path, "a.ipynb", declared, injected)
    texts = Page(write_index(tmp_path).read_text()).texts
    start = texts.index("lora_rank")
    assert texts[start : start + 3] == ["lora_rank", "8", "published run files"] and "seed" in texts


def test_index_says_which_notebook_failed(tmp_path: Path) -> None:
    failing = new_code_cell("1/0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="no", traceback=[])])
    executed(tmp_path, "a.ipynb", new_markdown_cell("# A"), failing)
    assert any("ZeroDivisionError: no" in text for text in Page(write_index(tmp_path).read_text()).texts)


def test_index_is_self_contained(tmp_path: Path) -> None:
    executed(tmp_path, "a.ipynb", shown({"image/png": PIXEL}))
    page = Page(write_index(tmp_path).read_text())
    assert not page.all("link") and not page.all("script")
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))


def test_a_picture_that_is_no_png_is_left_out(tmp_path: Path) -> None:
    executed(tmp_path, "a.ipynb", shown({"image/png": 'x" onerror="y'}))
    assert not Page(write_index(tmp_path).read_text()).all("img")


def test_an_empty_folder_and_a_broken_notebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no executed notebook"):
        write_index(tmp_path)
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(DataError, match=r"broken\.ipynb"):
        write_index(tmp_path)


def test_chart_is_a_matplotlib_figure() -> None:
    assert isinstance(accuracy_by_arm(ARMS), Chart) and isinstance(accuracy_by_arm(ARMS), mpl.figure.Figure)


def test_index_shows_the_results_first_and_then_stages_as_they_ran(tmp_path: Path) -> None:
    for folder, name, start in (
        ("b", "03", "2026-01-01T00:01"),
        ("a", "03", "2026-01-01T00:02"),
        ("c", "08_results", "9"),
    ):
        path = executed(tmp_path / folder, f"{name}.ipynb", new_markdown_cell(f"# {folder}"))
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["papermill"] = {"start_time": start}
        nbformat.write(notebook, path)
    links = [link["href"] for link in Page(write_index(tmp_path).read_text()).all("a")]
    assert [link for link in links if link and not link.startswith("#")] == [
        "c/08_results.ipynb",
        "b/03.ipynb",
        "a/03.ipynb",
    ]


def test_index_opens_with_whether_all_ran_and_with_the_first_result(tmp_path: Path) -> None:
    picture = shown({"image/png": PIXEL}, **{"image/png": {"alt": "the arms"}})
    table = shown({"text/html": Table(rows=[{"arm": "own"}], columns={"arm": ""})._repr_html_()})
    executed(tmp_path / "a", "03_query_server.ipynb", new_markdown_cell("# Query"), picture)
    executed(tmp_path / "b", "08_results.ipynb", new_markdown_cell("# Results"), picture, table)
    top = write_index(tmp_path).read_text().partition("<nav>")[0]
    assert "2 notebooks ran to the end." in top
    assert top.count("<table") == top.count("<img") == 1 and "the arms" in top


def test_index_opens_with_what_failed_and_shows_no_half_result(tmp_path: Path) -> None:
    failing = new_code_cell("1/0", outputs=[new_output("error", ename="E", evalue="no", traceback=[])])
    picture = shown({"image/png": PIXEL})
    executed(tmp_path, "08_results.ipynb", new_markdown_cell("# <Results>"), picture, failing)
    top = write_index(tmp_path).read_text().partition("<nav>")[0]
    assert '1 notebook ran; failed: <a href="#n0">&lt;Results&gt;</a>' in top and "<img" not in top
