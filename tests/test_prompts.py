"""Prompts are those of the published files, character by character."""

import json
from pathlib import Path

import pytest

from seal_nb.errors import SettingsError
from seal_nb.passages import load_passages
from seal_nb.prompts import (
    SELF_EDIT_PROMPTS,
    answer_prompt,
    grading_prompt,
    self_edit_prompt,
    topic_question,
)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_25_published_self_edit_prompts_are_rendered_exactly(golden: Path) -> None:
    published = rows(golden / "golden/self_edit_prompts.jsonl")
    assert len(published) == 25
    assert {row["prompt_key"] for row in published} == set(SELF_EDIT_PROMPTS)
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
