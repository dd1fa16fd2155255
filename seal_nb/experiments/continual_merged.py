"""Continual edits merged into the weights after each step, as published: a model folder and a server an edit.

SEAL, arXiv 2506.10943, ``continual_self_edits.py``. Stacked adapters give the same outputs
(tests/test_continual_merged.py) without a copy of the model for every edit and without S × K starts of a
server; this is for who wants to see that, or wants the merged models. Resumes after the last finished edit.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seal_nb.errors import RunMismatch
from seal_nb.experiments.continual import ContinualRun, ContinualSettings, edit_request, texts_of_step
from seal_nb.experiments.run_requests import Tell, served_model, ttt_client
from seal_nb.passages import Passage
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.runs import Journal, content_id
from seal_nb.service.client import TTTClient


@dataclass(frozen=True, kw_only=True)
class MergedEdit:
    """One finished edit, as the journal keeps it."""

    text: str
    request: TTTRequest
    reply: TTTReply

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "MergedEdit":
        return cls(
            text=record["text"],
            request=TTTRequest.model_validate(record["request"]),
            reply=TTTReply.model_validate(record["reply"]),
        )

    def to_json(self) -> dict[str, Any]:
        request, reply = (part.model_dump(mode="json") for part in (self.request, self.reply))
        return {"text": self.text, "request": request, "reply": reply}


def edit_and_merge(
    sequences: Sequence[Sequence[Passage]],
    settings: ContinualSettings,
    journal: Journal,
    *,
    model: str,
    model_id: str,
    folder: Path,
    server: Mapping[str, Any],
    tell: Tell = lambda _: None,
) -> ContinualRun:
    """All edits of all sequences, each on the model that the one before it was merged into.

    `folder` takes models and servers, in a folder of its own for each content of a sequence, so that no
    merged model is taken for that of other passages or settings; its last model stays. `model_id`: of
    `model` on the server that row 0 was asked of. `server`: what TTTServer takes beside model and run_dir.

    Raises: RunMismatch where the server started for the first edit holds another model, RemoteError,
    SettingsError for an adapter that cannot be merged.
    """
    edits_S_T = []
    for number, sequence in enumerate(sequences):
        on: dict[str, Any] = {"settings": settings, "journal": journal, "model": model, "model_id": model_id}
        edits_S_T.append(_one_sequence(number, sequence, **on, folder=folder, server=server, tell=tell))
    run = ContinualRun.of(sequences)
    for edits_S in zip(*edits_S_T, strict=True):
        run.write([edit.text for edit in edits_S])
        run.keep([edit.request for edit in edits_S], [edit.reply for edit in edits_S])
    return run


def _one_sequence(
    number: int,
    sequence: Sequence[Passage],
    settings: ContinualSettings,
    journal: Journal,
    model: str,
    model_id: str,
    folder: Path,
    server: Mapping[str, Any],
    tell: Tell,
) -> list[MergedEdit]:
    done: list[MergedEdit] = []
    now, content = model, _content(number, sequence, settings, model_id)
    own = folder / f"sequence_{number + 1}_{content}"
    for step in range(1, len(sequence) + 1):
        key = content_id(["merged", content, step])
        run_dir = own / f"server_{step}"
        if key not in journal:
            with ttt_client("", run_dir=run_dir, model=now, **server) as client:
                served = served_model(client)
                if step == 1 and served != model_id:
                    raise RunMismatch(
                        f"row 0 was asked of model {model_id}, the server for the merged edits has {served}; "
                        "give both the same model, dtype, grader and deterministic"
                    )
                new = _next_edit(client, served, number, sequence, settings, journal, done)
            journal.append(key, new.to_json())
        done.append(MergedEdit.from_json(journal.get(key)))
        adapter = run_dir / "adapters" / str(done[-1].request.adapter_name)
        now = _merged(now, adapter, own / f"model_{step}")
        tell(f"merged, sequence {number + 1}: edit {step} of {len(sequence)}")
    return done


def _content(number: int, sequence: Sequence[Passage], settings: ContinualSettings, model_id: str) -> str:
    """Names what every edit of a sequence depends on: titles alone are not enough, passages share them."""
    return content_id([model_id, number, [asdict(passage) for passage in sequence], _said(settings)])


def _said(settings: ContinualSettings) -> list[Any]:
    """What an edit depends on, as plain values."""
    own = [settings.arm, settings.prompt_key, settings.max_tokens, settings.temperature, settings.top_p]
    return [*own, settings.split_newlines, settings.seed, settings.training.request_fields()]


def _next_edit(
    client: TTTClient,
    model_id: str,
    number: int,
    sequence: Sequence[Passage],
    settings: ContinualSettings,
    journal: Journal,
    done: Sequence[MergedEdit],
) -> MergedEdit:
    """One edit on a server of the model as it is now."""
    on: dict[str, Any] = {"settings": settings, "model_id": model_id}
    stack = [
        str(edit.request.adapter_name) for edit in done
    ]  # merged already: they count, and lie under nothing
    (text,) = texts_of_step(client, journal, [sequence], [stack], numbers=[number], **on)
    request = edit_request(number, sequence, [*(edit.text for edit in done), text], stack, **on)
    # Not by the journal: the first edit is the stacked one's too, and its adapter lies with the other server.
    return MergedEdit(text=text, request=request, reply=client.evaluate(request))


def _merged(model: str, adapter: Path, out: Path) -> str:
    """The folder of `model` with `adapter` merged in; the folder before it is not needed any more."""
    from seal_nb.ttt.merge import merge_stack  # torch, which no other strategy needs here

    if not out.is_dir():
        merge_stack(model, [adapter], out)
    if Path(model).parent == out.parent:
        shutil.rmtree(model, ignore_errors=True)
    return str(out)
