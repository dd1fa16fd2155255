"""What S sequences of continual edits cost side by side, against S times one.

Stacked adapters on one frozen base (SEAL, arXiv 2506.10943, continual self-edits): every step trains one
adapter a sequence on top of its own stack and asks all passages so far. CPU-seconds of one process with one
thread on the small model and the shipped passages with their hand-written implications; written to
benchmarks/continual.json by `python -m benchmarks.continual`. Side by side the frozen base runs once for the
rows of all sequences.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from seal_nb.experiments.continual import ContinualSettings, Edits, draw_sequences, edit_request
from seal_nb.experiments.settings import Training
from seal_nb.passages import load_passages
from seal_nb.protocol import TTTReply, TTTRequest
from seal_nb.server.client import InnerLoopSettings
from seal_nb.server.loop import InnerLoop, load_inner_loop

OUT = Path(__file__).with_name("continual.json")
TRAINING = Training(
    lora_rank=16, lora_alpha=32, target_modules=("up_proj", "down_proj"), finetune_epochs=3, max_new_tokens=16
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continual edits side by side and one by one.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--n-sequences", type=int, default=4)
    parser.add_argument("--n-datapoints", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    alone = measured(asked.model, 1, asked.n_datapoints)
    together = measured(asked.model, asked.n_sequences, asked.n_datapoints)
    result = {
        "n_sequences": asked.n_sequences,
        "n_datapoints": asked.n_datapoints,
        "cpu_s_one_sequence": round(alone, 2),
        "cpu_s_together": round(together, 2),
        "share_of_one_after_the_other": round(together / (asked.n_sequences * alone), 3),
    }
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measured(model: str, n_sequences: int, n_datapoints: int) -> float:
    """CPU-seconds of all edits and answers, the loading of the model left out."""
    with tempfile.TemporaryDirectory() as folder:
        loop = load_inner_loop(
            InnerLoopSettings(
                model=model, device="cpu", dtype="float32", n_slots=n_sequences, adapters_dir=Path(folder)
            )
        )
        settings = ContinualSettings(
            n_sequences=n_sequences, n_datapoints=n_datapoints, arm="hand_written", training=TRAINING
        )
        # The same passage for every sequence in its place: what differs is only how many run side by side.
        (sequence,) = draw_sequences(load_passages("shipped:val"), _one_of(settings))
        sequences = [sequence] * n_sequences
        started = time.process_time()
        edit_all(loop, sequences, settings)
        return time.process_time() - started


def _one_of(settings: ContinualSettings) -> ContinualSettings:
    return ContinualSettings(n_sequences=1, n_datapoints=settings.n_datapoints, arm=settings.arm)


def edit_all(loop: InnerLoop, sequences: list[Any], settings: ContinualSettings) -> list[Edits]:
    """Every step of all sequences at once."""
    edits_S = [Edits(number=number, passages=sequence) for number, sequence in enumerate(sequences)]
    for step in range(settings.n_datapoints):
        texts = [edits.passages[step].hand_written for edits in edits_S]
        pairs = zip(edits_S, texts, strict=True)
        requests = [edit_request(edits, text, settings, model_id=loop.model_id) for edits, text in pairs]
        for edits, text, request, reply in zip(edits_S, texts, requests, answered(loop, requests), strict=True):
            edits.add(text, request, reply)
    return edits_S


def answered(loop: InnerLoop, requests: list[TTTRequest]) -> list[TTTReply]:
    for request in requests:
        loop.submit(request)
    replies: dict[str, TTTReply] = {}
    while loop.busy:
        for reply in loop.advance():
            if not isinstance(reply, TTTReply):
                raise RuntimeError(str(reply))
            replies[str(reply.request_id)] = reply
    return [replies[str(request.request_id)] for request in requests]


if __name__ == "__main__":
    main()
