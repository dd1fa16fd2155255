"""A completion becomes the training sequences the published code makes of it; self-edits are resumable."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seal_nb.engines.base import Completion, Sampling
from seal_nb.errors import EngineError, SettingsError
from seal_nb.passages import Passage, Question, load_passages
from seal_nb.runs import Journal
from seal_nb.self_edits import create_self_edits, passage_only_sequences, train_sequences

PASSAGES = [
    Passage(title=f"T{n}", context=f"Context {n}.", questions=(Question(question="q?", answer="a"),))
    for n in range(5)
]


def assert_published(case: dict) -> None:
    for split, field in ((True, "expected_split"), (False, "expected_nosplit")):
        made = train_sequences(
            case["completion"], title=case["title"], context=case["context"], split_newlines=split
        )
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
            made = train_sequences(
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
    made = train_sequences(completion, title=title, context=context, split_newlines=split)
    assert made[-1] == f"{title}\n{context.strip()}"
    assert all(sequence.startswith(f"{title}\n") for sequence in made)


@given(st.lists(st.text(alphabet="abc .,", min_size=1).filter(str.strip), min_size=1, max_size=8))
def test_without_pairs_and_dashes_every_line_is_one_sequence(lines: list[str]) -> None:
    made = train_sequences("\n".join(lines), title="T", context="C", split_newlines=True)
    assert made == [f"T\n{line.strip()}" for line in lines] + ["T\nC"]


def test_the_passage_only_arm_is_the_passage_once() -> None:
    assert passage_only_sequences(title="T", context=" C ") == ["T\nC"]


class RecordingEngine:
    """Writes texts that tell seed, position and prompt; fails from a given call on."""

    model_id = "recording"

    def __init__(self, *, calls_before_failure: int = 1000) -> None:
        self.calls: list[tuple[list[str], Sampling]] = []
        self.calls_left = calls_before_failure

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[Completion]:
        if self.calls_left == 0:
            raise EngineError("out of memory")
        self.calls_left -= 1
        self.calls.append((list(prompts), sampling))
        return [
            Completion(text=f" {seed}/{len(prompt)} \n", n_tokens=3, finish_reason="stop")
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


def written(
    engine: RecordingEngine, passages: Sequence[Passage] = PASSAGES, **changed: object
) -> list[Passage]:
    settings = {"prompt_key": "implications", "k_completions": 3, "sampling": Sampling(), "seed": 7}
    return create_self_edits(engine, passages, **(settings | changed))  # type: ignore[arg-type]


def test_every_passage_gets_k_stripped_self_edits_and_its_prompt() -> None:
    made = written(RecordingEngine())
    assert [p.title for p in made] == [p.title for p in PASSAGES]
    assert all(len(set(p.completions)) == 3 for p in made)
    assert all(text == text.strip() for p in made for text in p.completions)
    assert "Passage:\nT2\nContext 2.\n\nImplications:\n" in made[2].prompt


def test_an_interrupted_run_resumes_with_the_texts_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = written(RecordingEngine())
    with Journal(tmp_path / "self_edits.jsonl") as journal, pytest.raises(EngineError):
        written(RecordingEngine(calls_before_failure=2), journal=journal, passages_per_call=1)
    again = RecordingEngine()
    with Journal(tmp_path / "self_edits.jsonl") as journal:
        assert written(again, journal=journal) == whole
    assert [len(prompts) for prompts, _ in again.calls] == [9], "three passages were left"


def test_one_passage_alone_gets_the_self_edits_it_got_among_others() -> None:
    assert written(RecordingEngine(), PASSAGES[3:4]) == written(RecordingEngine())[3:4]


def test_another_seed_gives_other_self_edits() -> None:
    assert written(RecordingEngine(), seed=8) != written(RecordingEngine(), seed=7)


def test_an_engine_that_loses_a_text_is_an_error_and_not_a_short_list() -> None:
    class Losing(RecordingEngine):
        def generate(
            self, prompts: Sequence[str], sampling: Sampling, *, seeds: Sequence[int]
        ) -> list[Completion]:
            return super().generate(prompts, sampling, seeds=seeds)[:-1]

    with pytest.raises(EngineError, match="14 texts for 15 prompts"):
        written(Losing())


def test_no_self_edits_at_all_cannot_be_asked_for() -> None:
    with pytest.raises(SettingsError, match="k_completions=0"):
        written(RecordingEngine(), k_completions=0)
