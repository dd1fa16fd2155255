"""What loss on the padding costs, and how far the adapters are apart: the table in docs/inner_loop.md.

One job on the small model in float32, trained in a slot with each setting; distances are relative L2 of the
update from the published training's, `padding_in_loss=True`. Padding goes to 256 tokens here, since 2048
take minutes a dozen steps on a CPU; the tokens that 2048 take are counted, not timed. Writes
`benchmarks/padding.json`.

    python -m benchmarks.padding      (two minutes on one core)
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seal_nb.models import resolve_model
from seal_nb.passages import load_passages
from seal_nb.self_edits import sequences_of_text
from seal_nb.storage import write_json
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.lora import TrainJob, TrainSettings, initial_weights, make_row
from seal_nb.ttt.trainer import SlotTrainer

OUT = Path(__file__).with_name("padding.json")
PUBLISHED = "`padding_in_loss=True`"
SETTINGS: dict[str, dict[str, Any]] = {"none (default)": {}, PUBLISHED: {"padding_in_loss": True}}


def a_job(texts: tuple[str, ...], pad_to: int, n_epochs: int, setting: Mapping[str, Any]) -> TrainJob:
    train = TrainSettings(epochs=n_epochs, pad_to=pad_to, seed=1, **setting)
    return TrainJob(name="job", texts=texts, train=train)


def trained(base: FrozenBase, job: TrainJob) -> tuple[torch.Tensor, float]:
    """The update of the weights, and processor seconds an optimiser step."""
    trainer = SlotTrainer(base, n_slots=1)
    trainer.submit(job)
    start = time.process_time()
    (done,) = trainer.run()
    seconds = time.process_time() - start
    if done.adapter is None:
        raise RuntimeError(f"the benchmark's job failed: {done.error}")
    initial = initial_weights(done.adapter.layout, job.train.seed).to(done.adapter.flat)
    return done.adapter.flat - initial, seconds / done.n_steps


def tokens_of_a_step(base: FrozenBase, job: TrainJob, pad_to: int) -> float:
    settings = TrainSettings(**{**vars(job.train), "pad_to": pad_to})
    rows = [make_row(base.tokenizer, text, settings) for text in job.texts]
    return statistics.mean(len(row) for row in rows)


def measure(model: str, pad_to: int, n_epochs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    base = FrozenBase.load(resolve_model(model), device="cpu", dtype="float32")
    passage = load_passages("shipped:train")[0]
    texts = sequences_of_text(passage.hand_written, title=passage.title, context=passage.context, split_newlines=True)[
        -4:
    ]
    jobs = {name: a_job(tuple(texts), pad_to, n_epochs, s) for name, s in SETTINGS.items()}
    updates = {name: trained(base, job) for name, job in jobs.items()}
    published = updates[PUBLISHED][0]
    rows = [
        {
            "setting": name,
            "tokens": tokens_of_a_step(base, jobs[name], pad_to),
            "tokens_padded_to_2048": tokens_of_a_step(base, jobs[name], 2048),
            "cpu_s_per_step": seconds,
            "distance": float((update - published).norm() / published.norm()),
        }
        for name, (update, seconds) in updates.items()
    ]
    return {"pad_to": pad_to, "steps": jobs[PUBLISHED].n_steps, "rows": rows}


def markdown(result: Mapping[str, Any]) -> str:
    """The table as it stands in docs/inner_loop.md."""
    lines = [
        f"| loss on padding | tokens a step, padded to {result['pad_to']} | to 2048 | CPU-s a step | distance |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['setting']} | {row['tokens']:.0f} | {row['tokens_padded_to_2048']:.0f}"
            f" | {row['cpu_s_per_step']:.2f} | {row['distance']:.3f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--pad-to", type=int, default=256, help="tokens")
    parser.add_argument("--epochs", type=int, default=3, help="of four sequences")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    result = measure(arguments.model, arguments.pad_to, arguments.epochs)
    write_json(arguments.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
