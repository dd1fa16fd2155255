"""Notebook 01 with a service: no file of it shows the key, a family is recorded, a break costs nothing."""

import json
from pathlib import Path

import pytest

from benchmarks.stand_in import Answer, Asked, echo, error, stand_in
from seal_nb.notebook_runner import StageFailed
from seal_nb.passages import load_passages
from tests.test_notebooks import run, shown

KEY = "sk-nobody-may-see-this"
VALUES = {
    "engine": "openai",
    "model": "some-model",
    "api_key_env": "MY_KEY",
    "prompt_key": "spa",
    "n_articles": 2,
    "k_completions": 3,
    "max_parallel": 1,
    "chat": True,
}


def four_then_none(asked: Asked) -> Answer | str:
    return echo(asked) if asked.number < 4 else error(403, f"no more for {KEY}")


def test_notebook_01_writes_with_a_service_and_goes_on_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with stand_in(four_then_none) as service:
        with pytest.raises(StageFailed, match=r"2 of 6 texts are missing.*no more for \*\*\*"):
            run("01_create_self_edits", tmp_path, engine_url=service.url, **VALUES)
        service.behave = lambda asked: "late"
        n_asked = len(service.asked)
        run("01_create_self_edits", tmp_path, engine_url=service.url, **VALUES)
        assert len(service.asked) - n_asked == 2
    written = load_passages(tmp_path / "self_edits.json")
    late = [completion == "late" for passage in written for completion in passage.completions]
    assert late == [False] * 4 + [True] * 2
    assert written[0].prompt_keys == ("spa/key-concepts", "spa/mind-map", "spa/implications")
    record = json.loads((tmp_path / "self_edits.record.json").read_text())["settings"]
    assert record["engine"] == "openai" and record["model"] == "openai-some-model"
    assert [prompt["key"] for prompt in record["prompts"]][:2] == ["spa/key-concepts", "spa/mind-map"]
    said = shown(tmp_path / "01_create_self_edits.ipynb", "tokens")
    assert "6 texts, 18 tokens, 0 cut off" in said
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY not in path.read_text(errors="replace"), path
