"""Time, memory and cost of a run before it starts: arithmetic on its requests or texts, no model, no torch.

Tokens are counted from characters unless a counter is given. Time is tokens over a rate: the one a server was
seen to make, else what was measured on a CPU core here or assumed of a GPU, scaled by the model's size (4
FLOP a parameter and trained token: a frozen base needs no weight gradients). The rate's source is part of the
answer; starting up and slots that are not full come on top. Memory is weights, adapters and optimiser states;
activations come on top.

Sizes of a decoder, for arithmetic on what a run takes: from its config.json, no weights and no torch.

The requests of continual edits before any is made, for an estimate of what they will take.

Self-edits that the model has yet to write are stood in for by texts as long as the published ones are on
average. Nothing of this is sent.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from seal_nb.errors import DataError
from seal_nb.experiments.continual import ContinualSettings, edit_request, unedited_request
from seal_nb.experiments.single_passage import SinglePassageSettings, eval_questions, self_edit_texts
from seal_nb.passages import Passage
from seal_nb.protocol import TTTRequest
from seal_nb.server.status import ServerStatus
from seal_nb.sft.settings import SftSettings

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DEFAULT_TARGETS = ("q_proj", "v_proj")  # PEFT's, of Llama and Qwen2


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like decoder (Llama, Qwen2, Qwen3, Mistral), from its config.json."""

    n_layers: int
    hidden: int
    intermediate: int
    q_out: int  # heads × head size
    kv_out: int
    vocabulary: int
    tied: bool

    @classmethod
    def of_folder(cls, folder: str | Path) -> "ModelShape":
        """Raises: DataError where the folder has no such configuration."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
            heads = config["num_attention_heads"]
            head_size = config.get("head_dim") or config["hidden_size"] // heads
            return cls(
                n_layers=config["num_hidden_layers"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                q_out=heads * head_size,
                kv_out=config.get("num_key_value_heads", heads) * head_size,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"holds no sizes of a decoder: {error}", path=path, remedy="give a model folder") from error

    def linear(self, name: str) -> tuple[int, int]:
        """(in, out) of one layer's Linear."""
        outs = {"q_proj": self.q_out, "k_proj": self.kv_out, "v_proj": self.kv_out}
        if name == "o_proj":
            return self.q_out, self.hidden
        if name == "down_proj":
            return self.intermediate, self.hidden
        return self.hidden, outs.get(name, self.intermediate)

    @property
    def n_parameters(self) -> int:
        """Weights of embeddings and Linears; norms and biases are too few to matter."""
        in_layers = sum(n_in * n_out for n_in, n_out in map(self.linear, _LINEARS))
        return self.n_layers * in_layers + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int, target_modules: Sequence[str]) -> int:
        names = _LINEARS if "all-linear" in target_modules else (tuple(target_modules) or _DEFAULT_TARGETS)
        return self.n_layers * rank * sum(sum(self.linear(name)) for name in names if name in _LINEARS)


# Known before they are fetched: the small model, and the published one.
KNOWN = {
    "embedded": ModelShape(
        n_layers=30, hidden=576, intermediate=1536, q_out=576, kv_out=192, vocabulary=49152, tied=True
    ),
    "Qwen/Qwen2.5-7B": ModelShape(
        n_layers=28, hidden=3584, intermediate=18944, q_out=3584, kv_out=512, vocabulary=152064, tied=False
    ),
}


def shape_of(model: str) -> ModelShape | None:
    """Of a model folder, or of a name that is known; None where nothing is known of it without fetching."""
    if model in KNOWN:
        return KNOWN[model]
    if not model or not (Path(model) / "config.json").is_file():
        return None
    try:
        return ModelShape.of_folder(model)
    except DataError:  # a config of another kind: an estimate must not stop what can run
        return None


CHARACTERS_A_TOKEN = 4.2  # of English passages and self-edits under the tokenizers in use
TOKENS_AN_ANSWER = 20  # greedy answers of the published run ended after 19 on average
FLOP_A_TRAINED_TOKEN = 4  # per parameter
FLOP_A_FULLY_TRAINED_TOKEN = 8  # of all weights; activations are computed twice
FLOP_A_GENERATED_TOKEN = 2
# Training FLOP/s: one CPU core in float32 (115 tokens/s of 134.5 M parameters; 113 to 128 by the length of
# sequences in benchmarks/inner_loop.json); the GPU's is an assumption, 40 % of 989 TFLOP/s (H100 and H200 in
# bfloat16), and named as one.
CPU_CORE_FLOPS = 62e9
GPU_FLOPS = 0.4 * 989e12
BYTES_AN_ADAPTER_PARAMETER = 18  # float32 weight, gradient and two moments, and a bfloat16 copy
BYTES_A_TRAINED_PARAMETER = 16  # without that copy
LINE = 100  # characters
BYTES_A_WEIGHT = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Training FLOP/s of all workers together, and where the number is from."""

    flops: float
    source: str


def assumed_rate(n_workers: int, *, gpu: bool, n_threads: int = 1) -> Rate:
    """A CPU's as measured on one core; a GPU's is arithmetic."""
    if gpu:
        return Rate(flops=n_workers * GPU_FLOPS, source=f"assumed: 40 % of an H100's peak, times {n_workers}")
    cores = n_workers * n_threads
    return Rate(flops=cores * CPU_CORE_FLOPS, source=f"measured on one core, times {cores}")


def server_rate(status: ServerStatus, shape: ModelShape) -> Rate | None:
    """What a server trained in the last minute; None where it trained nothing."""
    if not status.tokens_per_s:
        return None
    flops = status.tokens_per_s * FLOP_A_TRAINED_TOKEN * shape.n_parameters
    return Rate(flops=flops, source=f"this server, last minute: {status.tokens_per_s:.0f} tokens/s")


def by_characters(text: str) -> int:
    return max(1, round(len(text) / CHARACTERS_A_TOKEN))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What some requests come to."""

    n_loops: int
    n_steps: int
    train_tokens: int
    n_answers: int  # the base's answer to a question is generated once
    answer_tokens: int

    def lines(self) -> dict[str, str]:
        return {
            "adapters to train": f"{self.n_loops:,}",
            "optimiser steps": f"{self.n_steps:,}",
            "training tokens": f"about {self.train_tokens:,}",
            "answers": f"at most {self.n_answers:,}",
        }


def work_of(requests: Iterable[TTTRequest], *, count: Callable[[str], int] = by_characters) -> Work:
    loops = steps = trained = asked = 0
    of_base: set[tuple[str, ...]] = set()
    for request in requests:
        if not request.skip_baseline:
            of_base |= {(*request.adapter_stack, question.question) for question in request.eval_questions}
        if not request.training_wanted:
            continue
        loops += 1
        batches = -(-len(request.train_sequences) // request.batch_size)
        steps += request.finetune_epochs * -(-batches // request.gradient_accumulation_steps)
        trained += request.finetune_epochs * sum(_trained(request, text, count) for text in request.train_sequences)
        asked += len(request.eval_questions)
    n_answers = asked + len(of_base)
    return Work(
        n_loops=loops,
        n_steps=steps,
        train_tokens=trained,
        n_answers=n_answers,
        answer_tokens=n_answers * TOKENS_AN_ANSWER,
    )


def _trained(request: TTTRequest, text: str, count: Callable[[str], int]) -> int:
    own = min(count(text), request.max_seq_length)
    if not request.padding_in_loss:
        return own
    return min(own + request.pad_samples, request.pad_to) if request.pad_samples else request.pad_to


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """seconds: training and answers; memory of one worker; cost in the currency of the price."""

    work: Work
    rate: Rate
    seconds: float
    base_bytes: int
    adapters_bytes: int
    cost: float | None

    def rows(self) -> list[dict[str, str]]:
        """As lines of a table."""
        lines = self.work.lines() | {
            "time": f"about {_duration(self.seconds)} without starting up ({self.rate.source})",
            "memory of a worker": f"{self.base_bytes / 1e9:.1f} GB base + {self.adapters_bytes / 1e9:.1f} GB "
            "adapters, without activations",
        }
        if self.cost is not None:
            lines["cost"] = f"about {self.cost:.2f}"
        return _rows(lines)


def estimate(
    work: Work,
    shape: ModelShape,
    rate: Rate,
    *,
    n_slots: int,
    lora_rank: int,
    target_modules: Sequence[str],
    bytes_a_weight: float = 4,
    price_per_hour: float = 0.0,
) -> Estimated:
    """``bytes_a_weight``: 4 in float32, 2 in bfloat16; ``price_per_hour``: of all workers together."""
    flop = shape.n_parameters * (FLOP_A_TRAINED_TOKEN * work.train_tokens + FLOP_A_GENERATED_TOKEN * work.answer_tokens)
    seconds = flop / rate.flops
    adapter = shape.adapter_parameters(lora_rank, target_modules)
    return Estimated(
        work=work,
        rate=rate,
        seconds=seconds,
        base_bytes=round(shape.n_parameters * bytes_a_weight),
        adapters_bytes=n_slots * adapter * BYTES_AN_ADAPTER_PARAMETER,
        cost=price_per_hour * seconds / 3600 if price_per_hour else None,
    )


def estimate_on_server(
    status: ServerStatus, model: str, requests: Sequence[TTTRequest], *, n_workers: int = 0, price_per_hour: float = 0.0
) -> list[dict[str, str]]:
    """What the requests will take on this server, as lines of a table; only the work where sizes are unknown.

    ``model``: the one it serves; empty where that is known to the server alone, so that nothing is fetched.
    ``n_workers``: that it will have, where some are not ready yet; ``price_per_hour``: of the whole server.
    """
    work, shape = work_of(requests), shape_of(model)
    if shape is None:
        return _rows(work.lines())
    stats = dict(status.workers[0].stats) if status.workers else {}
    n_workers = max(1, n_workers, len(status.workers))
    on_gpu = str(stats.get("device", "cpu")).startswith("cuda")
    largest = max(requests, key=lambda request: request.lora_rank, default=None)
    return estimate(
        work,
        shape,
        server_rate(status, shape) or assumed_rate(n_workers, gpu=on_gpu),
        n_slots=int(stats.get("slots", 1)),
        lora_rank=largest.lora_rank if largest else 1,
        target_modules=largest.target_modules if largest else (),
        bytes_a_weight=BYTES_A_WEIGHT.get(str(stats.get("dtype", "")), 4),
        price_per_hour=price_per_hour,
    ).rows()


def estimate_training(
    texts: Sequence[str],
    model: str,
    settings: SftSettings,
    *,
    gpu: bool,
    n_processes: int = 1,
    n_threads: int = 1,
    price_per_hour: float = 0.0,
) -> list[dict[str, str]]:
    """What ``sft.train`` will take for these examples; only the work where the model's sizes are unknown.

    On GPUs the processes share the model's states, on CPUs each has all of them; ``price_per_hour``: of all.
    """
    tokens = settings.epochs * sum(min(by_characters(text), settings.max_seq_length) for text in texts)
    steps = settings.epochs * -(-len(texts) // settings.examples_a_step)
    lines = {"optimiser steps": f"{steps:,}", "training tokens": f"about {tokens:,}"}
    if (shape := shape_of(model)) is None:
        return _rows(lines)
    full = settings.method == "full"
    rate = assumed_rate(n_processes, gpu=gpu, n_threads=n_threads)
    flop = tokens * shape.n_parameters * (FLOP_A_FULLY_TRAINED_TOKEN if full else FLOP_A_TRAINED_TOKEN)
    states = _states_bytes(shape, settings, alone_on_gpu=gpu and n_processes == 1)
    lines["time"] = f"about {_duration(flop / rate.flops)} without starting up ({rate.source})"
    lines["memory of a process"] = f"{states / (n_processes if gpu else 1) / 1e9:.1f} GB, without activations"
    if price_per_hour:
        lines["cost"] = f"about {price_per_hour * flop / rate.flops / 3600:.2f}"
    return _rows(lines)


def _states_bytes(shape: ModelShape, settings: SftSettings, *, alone_on_gpu: bool) -> int:
    if settings.method == "full":
        return BYTES_A_TRAINED_PARAMETER * shape.n_parameters
    frozen = BYTES_A_WEIGHT["bfloat16" if alone_on_gpu else "float32"] * shape.n_parameters
    adapter = shape.adapter_parameters(settings.lora_rank, settings.target_modules)
    return frozen + BYTES_A_TRAINED_PARAMETER * adapter


def estimate_texts(
    prompts: Sequence[str], *, k_completions: int, max_tokens: int, price_in: float = 0.0, price_out: float = 0.0
) -> list[dict[str, str]]:
    """What writing ``k_completions`` texts for each prompt will take at most; prices of a million tokens."""
    n_texts = k_completions * len(prompts)
    n_in, n_out = k_completions * sum(map(by_characters, prompts)), n_texts * max_tokens
    lines = {"texts": f"{n_texts:,}", "prompt tokens": f"about {n_in:,}", "new tokens": f"at most {n_out:,}"}
    if price_in or price_out:
        lines["cost"] = f"at most {(price_in * n_in + price_out * n_out) / 1e6:.2f}"
    return _rows(lines)


def in_words(rows: Iterable[dict[str, str]]) -> str:
    """One text, in lines that fit a notebook: JupyterLab breaks longer ones in the middle of a word."""
    return fill("; ".join(f"{row['quantity']}: {row['estimate']}" for row in rows), LINE)


def gpu_is_here() -> bool:
    """Whether this machine has a GPU, as its driver says; torch need not be there."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _rows(lines: dict[str, str]) -> list[dict[str, str]]:
    return [{"quantity": name, "estimate": text} for name, text in lines.items()]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


PUBLISHED_LINES, PUBLISHED_LINE_TOKENS = 8, 47  # of a self-edit, on average


def planned_requests(
    sequences: Sequence[Sequence[Passage]], settings: ContinualSettings, *, model_id: str
) -> list[TTTRequest]:
    """Row 0 and every edit of every sequence; where the texts are given, the very requests of the run."""
    requests = [unedited_request(sequence, settings, model_id=model_id) for sequence in sequences]
    for number, sequence in enumerate(sequences):
        texts: list[str] = []
        stack: list[str] = []
        for step, passage in enumerate(sequence, start=1):
            texts.append(_text(passage, settings))
            request = edit_request(number, sequence, texts, stack, settings, model_id=model_id)
            if settings.strategy == "retrieval":  # asked apart, of the adapter that is found
                seen = [question for one in sequence[:step] for question in eval_questions(one)]
                request = request.model_copy(update={"eval_questions": seen})
            stack.append(str(request.adapter_name))
            requests.append(request)
    return requests


def _text(passage: Passage, settings: ContinualSettings) -> str:
    if settings.arm != "self_edits":
        return self_edit_texts(passage, 0, SinglePassageSettings(arm=settings.arm))[0]
    n_tokens = min(settings.max_tokens, PUBLISHED_LINES * PUBLISHED_LINE_TOKENS)
    n_lines = max(1, n_tokens // PUBLISHED_LINE_TOKENS)
    return "\n".join(["x" * round(n_tokens / n_lines * CHARACTERS_A_TOKEN)] * n_lines)
