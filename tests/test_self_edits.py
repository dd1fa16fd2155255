"""A completion becomes the training sequences the published code makes of it; self-edits are resumable."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.engines.base import Ask, Completion, Engine, OnText, Prompt, Sampling, contents
from seal_nb.errors import DataError, EngineError, SettingsError
from seal_nb.experiments.rest_em import select_best, sft_rows
from seal_nb.passages import Passage, Question, load_passages, to_item
from seal_nb.prompts import SelfEditPrompt, find_prompts
from seal_nb.results.single_passage import SinglePassageRun
from seal_nb.self_edits import sequences_of_text, write_self_edits
from seal_nb.storage import Journal, write_json

IMPLICATIONS = find_prompts("implications")
PASSAGES = [
    Passage(title=f"T{n}", context=f"Context {n}.", questions=(Question(question="q?", answer="a"),)) for n in range(5)
]


def assert_published(case: dict) -> None:
    for split, field in ((True, "expected_split"), (False, "expected_nosplit")):
        made = sequences_of_text(case["completion"], title=case["title"], context=case["context"], split_newlines=split)
        assert made == case[field], (case.get("origin", case["completion"]), split)


def test_107_published_completions_become_the_published_sequences(golden: Path) -> None:
    with gzip.open(golden / "golden/train_sequences_cases.jsonl.gz", "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    assert len(cases) == 107
    for case in cases:
        assert_published(case)


def test_21_edge_cases_become_what_the_reference_makes_of_them(golden: Path) -> None:
    cases = json.loads((golden / "golden/edge_cases.json").read_text())["build_train_sequences"]
    assert len(cases) == 21
    for case in cases:
        assert_published(case)


def test_3000_digests_of_published_self_edits_agree(golden: Path) -> None:
    items: dict[str, list[Passage]] = {}
    with gzip.open(golden / "golden/train_sequences_digest.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 3000
    for row in rows:
        name = row["file"]
        if name not in items:
            items[name] = load_passages(golden / f"{name}.gz")
        passage = items[name][row["item"]]
        for split, suffix in ((True, "split"), (False, "nosplit")):
            made = sequences_of_text(
                passage.completions[row["completion"]],
                title=passage.title,
                context=passage.context,
                split_newlines=split,
            )
            digest = hashlib.sha256("\0".join(made).encode()).hexdigest()
            assert (len(made), digest) == (row[f"n_{suffix}"], row[f"sha256_{suffix}"]), row


@given(st.text(), st.text(min_size=1), st.text(min_size=1), st.booleans())
def test_the_passage_is_always_the_last_sequence_and_every_one_opens_with_the_title(
    completion: str, title: str, context: str, split: bool
) -> None:
    made = sequences_of_text(completion, title=title, context=context, split_newlines=split)
    assert made[-1] == f"{title}\n{context.strip()}"
    assert all(sequence.startswith(f"{title}\n") for sequence in made)


@given(st.lists(st.text(alphabet="abc .,", min_size=1).filter(str.strip), min_size=1, max_size=8))
def test_without_pairs_and_dashes_every_line_is_one_sequence(lines: list[str]) -> None:
    made = sequences_of_text("\n".join(lines), title="T", context="C", split_newlines=True)
    assert made == [f"T\n{line.strip()}" for line in lines] + ["T\nC"]


def test_the_passage_only_arm_is_the_passage_once() -> None:
    assert sequences_of_text("", title="T", context=" C ", split_newlines=True) == ["T\nC"]


class RecordingEngine(Engine):
    """Writes texts that show seed and prompt; fails from a given text on."""

    model_id = "recording"

    def __init__(self, *, texts_before_failure: int = 1000) -> None:
        self.asked: list[Prompt] = []
        self.texts_left = texts_before_failure

    def outcomes(self, asks: Sequence[Ask], on_text: OnText) -> dict[int, Completion | EngineError]:
        outcomes: dict[int, Completion | EngineError] = {}
        for index, ask in enumerate(asks):
            if self.texts_left == 0:
                outcomes[index] = EngineError("out of memory")
                continue
            self.texts_left -= 1
            self.asked.append(ask.prompt)
            text = f" {ask.seed}/{len(contents(ask.prompt))} \n"
            outcomes[index] = made = Completion(text=text, n_tokens=3, finish_reason="stop")
            if on_text is not None:
                on_text(index, made)
        return outcomes

    def text_of(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else f"<chat>{contents(prompt)}</chat>"


def written(engine: RecordingEngine, passages: Sequence[Passage] = PASSAGES, **changed: object) -> list[Passage]:
    settings = {"prompts": IMPLICATIONS, "k_completions": 3, "sampling": Sampling(), "seed": 7}
    return write_self_edits(engine, passages, **(settings | changed))[0]  # type: ignore[arg-type]


def test_every_passage_gets_k_stripped_self_edits_and_its_prompt() -> None:
    made = written(RecordingEngine())
    assert [p.title for p in made] == [p.title for p in PASSAGES]
    assert all(len(set(p.completions)) == 3 for p in made)
    assert all(text == text.strip() for p in made for text in p.completions)
    assert "Passage:\nT2\nContext 2.\n\nImplications:\n" in made[2].prompt
    assert made[2].prompts == made[2].prompt_keys == ()


def test_an_interrupted_run_resumes_with_the_texts_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Cut in the middle of a passage: its first text is kept, too."""
    whole = written(RecordingEngine())
    missing = "8 of 15 texts are missing.*out of memory.*run again.*missing are self-edits of: T2, T3, T4"
    with Journal(tmp_path / "self_edits.jsonl") as journal, pytest.raises(EngineError, match=missing):
        written(RecordingEngine(texts_before_failure=7), journal=journal)
    again = RecordingEngine()
    with Journal(tmp_path / "self_edits.jsonl") as journal:
        assert written(again, journal=journal) == whole
    assert len(again.asked) == 8


def test_more_self_edits_later_cost_only_the_new_ones(tmp_path: Path) -> None:
    with Journal(tmp_path / "self_edits.jsonl") as journal:
        written(RecordingEngine(), journal=journal, k_completions=2)
        more = RecordingEngine()
        five = written(more, journal=journal, k_completions=5)
    assert len(more.asked) == 15 and five == written(RecordingEngine(), k_completions=5)


def test_one_passage_alone_gets_the_self_edits_it_got_among_others() -> None:
    assert written(RecordingEngine(), PASSAGES[3:4]) == written(RecordingEngine())[3:4]


def test_another_seed_gives_other_self_edits() -> None:
    assert written(RecordingEngine(), seed=8) != written(RecordingEngine(), seed=7)


def test_a_family_takes_turns_and_each_self_edit_knows_its_prompt() -> None:
    (made,) = written(RecordingEngine(), PASSAGES[:1], prompts=find_prompts("spa"), k_completions=9)
    keys = [prompt.key for prompt in find_prompts("spa")]
    assert list(made.prompt_keys) == [*keys, *keys[:2]]
    assert made.prompts[0] == made.prompts[7] == made.prompt != made.prompts[1]
    assert len(set(made.completions)) == 9, "the same prompt, another number, another seed"


def test_one_self_edit_of_a_family_or_a_file_says_whose_it_is_too() -> None:
    (made,) = written(RecordingEngine(), PASSAGES[:1], prompts=find_prompts("spa"), k_completions=1)
    assert made.prompt_keys == ("spa/key-concepts",) == (find_prompts("spa")[0].key,)
    mine = SelfEditPrompt(key="mine", template="About {title}: {context}", source="me")
    (made,) = written(RecordingEngine(), PASSAGES[:1], prompts=[mine], k_completions=2)
    assert made.prompt_keys == ("mine", "mine")


def test_the_prompt_of_a_chat_is_what_the_model_sees() -> None:
    instruct = RecordingEngine()
    (made,) = written(instruct, PASSAGES[:1], prompts=find_prompts("implications-instruct"), k_completions=1)
    assert made.prompt.startswith("<chat>You are an assistant") and made.prompt.endswith("Context 0.</chat>")
    (made,) = written(instruct, PASSAGES[:1], chat=True, k_completions=1)
    assert made.prompt.startswith("<chat>Let's read the following passage")


def test_work_is_said_for_the_missing_texts_only_and_progress_counts_all(tmp_path: Path) -> None:
    said: list[Any] = []
    with Journal(tmp_path / "journal.jsonl") as journal:
        for k_completions in (2, 3, 3):
            told = {"on_start": lambda prompts: said.append(len(prompts)), "on_text": lambda *at: said.append(at)}
            written(RecordingEngine(), journal=journal, k_completions=k_completions, **told)
    first, second = [(at, 10) for at in range(1, 11)], [(at, 15) for at in range(11, 16)]
    assert said == [10, *first, 5, *second, 0]


def test_an_engine_that_loses_a_text_is_an_error_and_not_a_short_list() -> None:
    class Losing(RecordingEngine):
        def outcomes(self, asks: Sequence[Ask], on_text: OnText) -> dict[int, Completion | EngineError]:
            return super().outcomes(asks[:-1], on_text)

    with pytest.raises(EngineError, match="14 texts, but 15"):
        written(Losing())


def test_no_self_edits_at_all_cannot_be_asked_for() -> None:
    with pytest.raises(SettingsError, match="k_completions=0"):
        written(RecordingEngine(), k_completions=0)
    with pytest.raises(SettingsError, match="0 prompts"):
        written(RecordingEngine(), prompts=())
    with pytest.raises(SettingsError, match="share keys"):
        written(RecordingEngine(), prompts=IMPLICATIONS * 2)


def test_a_family_goes_through_file_and_run_to_the_training_set(tmp_path: Path) -> None:
    """The best self-edit of a passage is trained on under its own prompt, not the first of the family."""
    made = written(RecordingEngine(), PASSAGES[:1], prompts=find_prompts("active-reading"))
    path = write_json(tmp_path / "self_edits.json", [to_item(passage) for passage in made])
    assert load_passages(path) == made
    run = SinglePassageRun(
        value={
            "articles": [
                {
                    "title": "T0",
                    "context": "Context 0.",
                    "prompt": made[0].prompt,
                    "completions": [
                        {"text": text, "prompt": prompt, "stats": {"adapter_mean": mean}}
                        for text, prompt, mean in zip(
                            made[0].completions, made[0].prompts, (0.1, 0.9, 0.2), strict=True
                        )
                    ],
                }
            ]
        }
    )
    assert sft_rows(run, select_best(run)) == [{"prompt": made[0].prompts[1], "completion": made[0].completions[1]}]


def test_a_file_with_too_few_prompts_for_its_self_edits_is_refused(tmp_path: Path) -> None:
    item = to_item(PASSAGES[0]) | {"completions": ["a", "b"], "prompts": ["p"]}
    path = write_json(tmp_path / "items.json", [item])
    with pytest.raises(DataError, match="has 1 entries for 2 completions"):
        load_passages(path)
