"""SQuAD from a hub: the real client against a small hub on a real socket, and no network at all."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seal_nb.passages import FILES, REPOSITORY, Passage, Question, load_passages, passages_from_rows


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


def test_rows_of_one_paragraph_are_one_passage_with_the_first_answers_as_gold() -> None:
    assert passages_from_rows(ROWS) == EXPECTED


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Answers as the Hugging Face hub does for the one file it has."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "file.parquet")
    content = (tmp_path / "file.parquet").read_bytes()
    commit = "0" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            found = self.path == f"/datasets/{REPOSITORY}/resolve/main/{FILES['validation']}"
            found = found or self.path == f"/datasets/{REPOSITORY}/resolve/{commit}/{FILES['validation']}"
            self.send_response(200 if found else 404)
            self.send_header("ETag", '"abc"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def data_squad(out: Path, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "seal_nb.cli", "data", "squad", "--split", "validation", "--out", str(out)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=clean | {"HF_HOME": str(home)} | env)


def test_the_command_writes_the_item_file_that_every_stage_reads(hub: str, tmp_path: Path) -> None:
    done = data_squad(tmp_path / "out", tmp_path / "home", HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert load_passages(tmp_path / "out" / "squad_val.json") == EXPECTED


def test_without_a_network_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    done = data_squad(tmp_path / "out", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "rajpurkar/squad could not be fetched from the hub" in done.stderr
    assert "train-v1.1.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
