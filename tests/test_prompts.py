"""Prompts are those of the published files, character by character."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.errors import SettingsError
from seal_nb.passages import load_passages
from seal_nb.prompts import (
    SELF_EDIT_PROMPTS,
    SelfEditPrompt,
    answer_prompt,
    find_prompts,
    grading_prompt,
    prompt_names,
    self_edit_prompt,
    topic_question,
)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_25_published_self_edit_prompts_are_rendered_exactly(golden: Path) -> None:
    published = rows(golden / "golden/self_edit_prompts.jsonl")
    assert len(published) == 25
    assert {row["prompt_key"] for row in published} <= set(SELF_EDIT_PROMPTS)
    for row in published:
        rendered = self_edit_prompt(row["prompt_key"], title=row["title"], context=row["context"])
        assert rendered == row["prompt"]


def test_every_prompt_of_the_published_item_files_is_the_default_one(golden: Path) -> None:
    for name in ("eval/base_val.json.gz", "eval/iter2_val.json.gz", "train/iter0_train.json.gz"):
        for passage in load_passages(golden / name):
            rendered = self_edit_prompt("implications", title=passage.title, context=passage.context)
            assert rendered == passage.prompt


def test_23_published_answer_and_grading_prompts_are_rendered_exactly(golden: Path) -> None:
    published = rows(golden / "golden/answer_and_grade_prompts.jsonl")
    assert len(published) == 23
    for row in published:
        assert answer_prompt(row["title"], row["question"]) == row["answer_prompt"]
        graded = grading_prompt(row["title"], row["question"], row["gold"], row["answer"])
        assert graded == row["grade_prompt"]


def test_a_question_that_has_its_topic_line_keeps_it_once() -> None:
    once = topic_question("Oxygen", "What is it?")
    assert once == "Topic: Oxygen\nWhat is it?"
    assert topic_question("Oxygen", once) == once
    assert answer_prompt("Oxygen", once) == answer_prompt("Oxygen", "What is it?")


def test_braces_in_a_passage_are_text() -> None:
    assert "{title} {0} {" in self_edit_prompt("rewrite", title="T", context="{title} {0} {")
    assert "{gold}" in grading_prompt("T", "{gold}", "g", "{answer}")


def test_an_unknown_prompt_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="'implication'; known are implications, implications-long"):
        self_edit_prompt("implication", title="T", context="C")


CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"


def test_the_published_instruct_prompt_is_chatml_around_the_bare_passage() -> None:
    (prompt,) = find_prompts("implications-instruct")
    asked = prompt.asked(title="T", context="C")
    assert not isinstance(asked, str)
    rendered = "".join(CHATML.format(**message) for message in asked) + "<|im_start|>assistant\n"
    assert rendered == (
        "<|im_start|>system\nYou are an assistant tasked with analyzing the provided passage and producing a "
        "list of implications derived directly or indirectly from the content. <|im_end|>\n"
        "<|im_start|>user\nT\nC<|im_end|>\n<|im_start|>assistant\n"
    )


def test_any_prompt_can_be_the_one_message_of_a_chat() -> None:
    (prompt,) = find_prompts("rewrite")
    text = self_edit_prompt("rewrite", title="T", context="C")
    assert prompt.asked(title="T", context="C") == text
    assert prompt.asked(title="T", context="C", chat=True) == ({"role": "user", "content": text},)


def test_seven_strategies_and_active_reading_are_families_with_their_sources() -> None:
    assert len(find_prompts("spa")) == 7 and len(find_prompts("active-reading")) == 3
    assert all("2603.22213" in prompt.source for prompt in find_prompts("spa"))
    assert all("2508.09494" in prompt.source for prompt in find_prompts("active-reading"))
    assert find_prompts("spa/teacher") == find_prompts("spa")[6:]
    assert prompt_names()[-2:] == ["spa", "active-reading"]


@pytest.mark.parametrize("key", SELF_EDIT_PROMPTS)
def test_every_prompt_holds_title_and_passage_once_and_a_source(key: str) -> None:
    prompt = SELF_EDIT_PROMPTS[key]
    text = prompt.text(title="Quaxtitle", context="Quaxcontext")
    assert text.count("Quaxtitle") == text.count("Quaxcontext") == 1
    assert prompt.source and prompt.key == key


def test_a_family_is_not_one_text_and_a_chat_is_none() -> None:
    with pytest.raises(SettingsError, match="family of 7 prompts; name one: spa/key-concepts, spa/mind-map"):
        self_edit_prompt("spa", title="T", context="C")
    with pytest.raises(SettingsError, match="is a chat"):
        self_edit_prompt("implications-instruct", title="T", context="C")
    assert "C" in self_edit_prompt("spa/teacher", title="T", context="C")


def test_a_text_file_is_a_prompt_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "limericks.txt"
    path.write_text('Limericks about {title}, as {"json": true}:\n{context}\n')
    (prompt,) = find_prompts(str(path))
    assert prompt.key == "limericks" and prompt.source == "file limericks.txt"
    assert prompt.text(title="{context}", context="C") == 'Limericks about {context}, as {"json": true}:\nC\n'


def test_a_text_file_with_rules_between_is_a_family(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("One {context}\n---\nTwo {title} {context} --- still two\n")
    one, two = find_prompts(str(path))
    assert (one.key, one.template) == ("mine/1", "One {context}\n")
    assert (two.key, two.template) == ("mine/2", "Two {title} {context} --- still two\n")


def test_a_prompt_without_the_passage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("About {title}")
    with pytest.raises(SettingsError, match=r"'bad' has no \{context\}"):
        find_prompts(str(tmp_path / "bad.txt"))
    with pytest.raises(SettingsError, match="has no"):
        SelfEditPrompt(key="x", template="{title}", source="me")


@given(st.text(), st.text())
def test_whatever_stands_in_a_passage_stays_as_it_is(title: str, context: str) -> None:
    prompt = SelfEditPrompt(key="x", template="<{title}|{context}>{other}", source="me")
    assert prompt.text(title=title, context=context) == f"<{title}|{context}>{{other}}"


def test_the_docs_name_every_prompt_and_their_code_is_code() -> None:
    docs = (Path(__file__).parent.parent / "docs" / "engines.md").read_text()
    assert [name for name in prompt_names() if f"`{name}`" not in docs] == []
    for block in re.findall(r"^```python\n(.*?)^```", docs, flags=re.MULTILINE | re.DOTALL):
        compile(block, "docs/engines.md", "exec")
