"""Makes the run that ships for the passage inspector: `python -m benchmarks.inspector_run`.

Four shipped passages, three texts each (two self-edits of the small model, one written by hand), two repeats,
with soft scores and values of single tokens. The answers are those of the embedded model. Takes about five minutes on
two cores.
"""

import gzip
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from seal_nb.experiments.session import ask, identified, ttt_server
from seal_nb.experiments.settings import Training
from seal_nb.experiments.single_passage import PlannedLoop, SinglePassageSettings, build_run, requests_for_run
from seal_nb.grading.choose import grader_of
from seal_nb.passages import Passage, load_passages
from seal_nb.prompts import self_edit_prompt
from seal_nb.protocol import GenerateRequest, TTTReply
from seal_nb.server.client import TTTClient
from seal_nb.storage import Journal

TARGET = Path(__file__).resolve().parent.parent / "seal_nb" / "data" / "inspector_run.json.gz"
N_PASSAGES, N_OWN, N_REPEATS = 4, 2, 2
DECIMALS = 3  # of a token's log-probability
TRAINING = Training(target_modules=("all-linear",), finetune_epochs=5, max_new_tokens=32, soft_scores=True)


def main() -> None:
    settings = SinglePassageSettings(k_completions=N_OWN + 1, eval_times=N_REPEATS, training=TRAINING)
    with (
        tempfile.TemporaryDirectory() as folder,
        ttt_server(folder=Path(folder) / "server", n_workers=2) as ttt,
        Journal(Path(folder) / "journal.jsonl") as journal,
    ):
        model_id = ttt.model_id
        passages = [_with_texts(ttt.client, one) for one in load_passages("shipped:val")[:N_PASSAGES]]
        loops = [_scored(loop, model_id) for loop in requests_for_run(passages, settings, model_id=model_id)]
        collected = ask(ttt, [loop.request for loop in loops], journal)
    made = {"model": "embedded", "dataset": "shipped:val", "timestamp": ""}
    run = build_run(passages, loops, collected.replies, settings, failures=collected.failures, **made)
    run["grader"] = grader_of({"model": model_id})
    for loop in loops:
        if loop.repeat == 0:
            completion = run["articles"][loop.passage]["completions"][loop.self_edit]
            completion |= _tokens(collected.replies[loop.request_id])
            completion["origin"] = "written by hand" if loop.self_edit == N_OWN else "the small model"
    with gzip.GzipFile(TARGET, "wb", mtime=0) as file:
        file.write(json.dumps(run, ensure_ascii=False).encode())
    print(f"{TARGET.name}: {TARGET.stat().st_size / 1000:.0f} KB")


def _with_texts(client: TTTClient, passage: Passage) -> Passage:
    prompt = self_edit_prompt("implications", title=passage.title, context=passage.context)
    asked = [GenerateRequest(prompts=[prompt], max_tokens=96, top_p=0.95, seed=seed) for seed in range(N_OWN)]
    own = [client.generate(request).texts[0].strip() for request in asked]
    return replace(passage, completions=(*own, passage.hand_written), prompt=prompt)


def _scored(loop: PlannedLoop, model_id: str) -> PlannedLoop:
    request = loop.request.model_copy(update={"return_token_logprobs": loop.repeat == 0})
    return replace(loop, request=identified(request, model_id))


def _tokens(reply: TTTReply) -> dict[str, Any]:
    scored = [one.model_dump(mode="json") for one in reply.token_logprobs]
    for one in scored:
        for side in ("baseline_logprobs", "adapter_logprobs"):
            one[side] = [None if value is None else round(value, DECIMALS) for value in one[side]]
    return {"epoch_losses": reply.epoch_losses, "token_logprobs": scored}


if __name__ == "__main__":
    main()
