"""SQuAD from a hub: the real client against a small hub on a real socket, and no network at all."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seal_nb.passages import FILES, REPOSITORY, REVISION, Passage, Question, load_passages
from seal_nb.storage import read_json
from tests.fake_hub import COMMIT, fake_hub


def row(context: str, question: str, *answers: str) -> dict:
    """As the hub has it."""
    given = {"text": list(answers), "answer_start": [0] * len(answers)}
    return {"id": question, "title": "Super_Bowl_50", "context": context, "question": question, "answers": given}


ROWS = [row("C1", "q1?", "a", "b"), row("C2", "q2?", "c"), row("C1", "q3?", "d")]
EXPECTED = [
    Passage(
        title="Super Bowl 50",
        context="C1",
        questions=(Question(question="q1?", answer="a"), Question(question="q3?", answer="d")),
    ),
    Passage(title="Super Bowl 50", context="C2", questions=(Question(question="q2?", answer="c"),)),
]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Has the one file."""
    file = tmp_path / "hub" / FILES["validation"]
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    with fake_hub({f"datasets/{REPOSITORY}": tmp_path / "hub"}) as (address, _):
        yield address


def data_squad(out: Path, home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "seal_nb.cli", "data", "squad", "--split", "validation", "--out", str(out), *words]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=clean | {"HF_HOME": str(home)} | env)


def test_the_command_writes_the_item_file_that_every_stage_reads_with_the_first_answers_as_gold(
    hub: str, tmp_path: Path
) -> None:
    done = data_squad(tmp_path / "out", tmp_path / "home", HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert load_passages(tmp_path / "out" / "squad_val.json") == EXPECTED


@pytest.mark.parametrize(("words", "commit"), [([], REVISION), (["--revision", "main"], COMMIT)])
def test_the_record_has_the_commit_that_was_read(hub: str, tmp_path: Path, words: list[str], commit: str) -> None:
    assert data_squad(tmp_path, tmp_path / "home", *words, HF_ENDPOINT=hub).returncode == 0
    settings = read_json(tmp_path / "squad_val.record.json")["settings"]
    assert (settings["repository"], settings["commit"]) == (REPOSITORY, commit)


def test_without_a_network_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    done = data_squad(tmp_path / "out", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "rajpurkar/squad could not be fetched from the hub" in done.stderr
    assert "train-v1.1.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
