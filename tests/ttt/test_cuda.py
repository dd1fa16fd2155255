"""The inner loop on a real GPU: equal to one adapter alone, never waiting for the device, behind a server.

The other side is a plain PyTorch path on the same GPU (`benchmarks/one_adapter.py`) and transformers' own
`generate`. Where slots run in float32, the plain path runs in float64, so that the difference is the slots'
own. In bfloat16 the order of sums shows, so there losses are compared, and updates against what another
padding changes in the plain path itself.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.one_adapter import OneAdapter, twin
from seal_nb.server.client import TTTServer
from seal_nb.ttt import passes
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow, GroupedDecoder, ScoreRow, score
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings, initial_weights
from seal_nb.ttt.trainer import SlotTrainer, Trained
from tests.server.conftest import plain_req
from tests.ttt.tiny import SIZES, AsciiTokenizer, save_tiny_model

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

# Small random models that differ in what surrounds the Linear layers: biases, norms, rotations.
FAMILIES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Olmo2": {},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "Phi3": {"sliding_window": None},
    "Gemma": {"head_dim": 8},
}
# As wide as what flash attention and grouped products are made for; the head sizes of most released models.
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "initializer_range": 0.05,
}
HALF: dict[str, tuple[str, dict[str, object]]] = {
    "head size 64": ("Llama", WIDE),
    "head size 128": ("Qwen3", WIDE | {"head_dim": 128, "num_attention_heads": 4}),
}
ALL, SOME = ("all-linear",), ("o_proj", "down_proj")
TINY_RATE, WIDE_RATE = 3e-3, 1e-3


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The base that the slots use, and a plain model of the same weights for the other side."""

    base: FrozenBase
    plain: PreTrainedModel

    def train(self, jobs: Sequence[TrainJob], **settings: int) -> dict[str, Trained]:
        trainer = SlotTrainer(self.base, **{"n_slots": 3, **settings})
        for job in jobs:
            trainer.submit(job)
        return {trained.job.name: trained for trained in trainer.run()}

    def alone(self, job: TrainJob, pad_to: int = 0) -> tuple[torch.Tensor, list[float]]:
        """Weights and the losses of the epochs of the plain path."""
        padded = job.train.padding_in_loss
        one = OneAdapter(
            self.plain,
            self.base.layout(job.lora),
            job,
            self.base.encode,
            pad_to=job.train.pad_to if padded else pad_to,
            padding_in_loss=padded,
        )
        one.train()
        one.remove()
        return one.flat(), one.epoch_losses()

    def update_distance(self, job: TrainJob, found: Trained, expected: torch.Tensor) -> float:
        """Relative L2 of the update."""
        assert found.adapter is not None, found.error
        initial = initial_weights(self.base.layout(job.lora), job.train.seed).to(expected)
        return float((found.adapter.flat.to(expected) - expected).norm() / (expected - initial).norm())

    def merged(self, adapters: Sequence[Adapter]) -> PreTrainedModel:
        """The plain model in float32 with the adapters' products added to its weights."""
        model = copy.deepcopy(self.plain).float()
        for adapter in adapters:
            for target in adapter.layout.targets:
                weight = model.get_submodule(target.name).weight
                weight.data += adapter.delta(target.name).to(weight)
        return model


def make_pair(kind: str, sizes: dict[str, object], dtype: torch.dtype, plain_dtype: torch.dtype) -> Pair:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(DEVICE, dtype)
    model.eval().requires_grad_(False)
    plain = twin(model) if dtype == plain_dtype else copy.deepcopy(model).to(plain_dtype)
    return Pair(base=FrozenBase(model, AsciiTokenizer(), name=kind), plain=plain)  # type: ignore[arg-type]


def tiny_pair(kind: str, plain_dtype: torch.dtype = torch.float64) -> Pair:
    return make_pair(kind, FAMILIES[kind], torch.float32, plain_dtype)


@pytest.fixture(scope="module", params=HALF, ids=[name.replace(" ", "-") for name in HALF])
def half(request: pytest.FixtureRequest) -> Pair:
    kind, sizes = HALF[request.param]
    return make_pair(kind, sizes, torch.bfloat16, torch.bfloat16)


@pytest.fixture(scope="module")
def llama() -> Pair:
    """Float32 on both sides."""
    return tiny_pair("Llama", torch.float32)


def a_job(name: str, lengths: Sequence[int], rank: int, targets: tuple[str, ...], **train: object) -> TrainJob:
    """Train sequences of exactly these lengths in tokens."""
    words = f"{name} tells of seas, hills and lamps that nobody has seen. "
    texts = tuple((words[i:] + words * (n // len(words) + 1))[:n] for i, n in enumerate(lengths))
    lora = LoraSettings(rank=rank, alpha=2 * rank, target_modules=targets)
    settings = {"seed": len(name) + rank, "learning_rate": TINY_RATE, **train}
    return TrainJob(name=name, texts=texts, lora=lora, train=TrainSettings(**settings))  # type: ignore[arg-type]


def mixed_jobs(**train: object) -> list[TrainJob]:
    """More jobs than slots, so that neighbours leave and enter while others train.

    A row of two tokens stands alone only where no query or key is trained: their gradient is zero there, and
    AdamW would make whole steps of what rounding leaves of it.
    """
    return [
        a_job("short", (3, 7, 12), 4, ALL, epochs=4, **train),
        a_job("long", (600, 40), 8, SOME, epochs=3, **train),
        a_job("middle", (150, 129, 30), 2, ALL, epochs=2, batch_size=2, **train),
        a_job("accumulates", (20, 33, 8, 47, 5), 33, SOME, epochs=3, gradient_accumulation_steps=2, **train),
        a_job("batches", (64, 2, 90), 12, ALL, epochs=3, batch_size=3, **train),
        a_job("two tokens", (2,), 8, SOME, epochs=6, **train),
    ]


def padded_jobs(pad_to: int, **train: object) -> list[TrainJob]:
    """Jobs with padding in the loss, and a plain one."""
    padded = {"padding_in_loss": True, "pad_to": pad_to, **train}
    return [
        a_job("padded", (12, 40, 3), 4, ALL, epochs=3, **padded),
        a_job("batch of padded", (30, 9, 21), 8, SOME, epochs=2, batch_size=2, **padded),
        a_job("plain", (25, 60), 4, ALL, epochs=3, **train),
    ]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_job_of_a_mixed_batch_equals_one_adapter_alone(kind: str) -> None:
    pair = tiny_pair(kind)
    jobs = mixed_jobs()
    trained = pair.train(jobs)
    distances = {job.name: pair.update_distance(job, trained[job.name], pair.alone(job)[0]) for job in jobs}
    assert max(distances.values()) < 1e-3, distances


@pytest.mark.parametrize("pad_to", [64, 600])
def test_padding_in_the_loss_equals_the_padded_training_alone(pad_to: int) -> None:
    pair = tiny_pair("Qwen2")
    jobs = padded_jobs(pad_to)
    trained = pair.train(jobs, n_slots=4)
    distances = {job.name: pair.update_distance(job, trained[job.name], pair.alone(job)[0]) for job in jobs}
    assert max(distances.values()) < 1e-3, distances


@pytest.mark.parametrize("make_jobs", [mixed_jobs, lambda **train: padded_jobs(256, **train)], ids=["", "padded"])
def test_in_bfloat16_losses_and_updates_are_those_of_one_adapter_alone(
    half: Pair, make_jobs: Callable[..., list[TrainJob]]
) -> None:
    jobs = make_jobs(learning_rate=WIDE_RATE)
    trained = half.train(jobs)
    for job in jobs:
        flat, losses = half.alone(job)
        assert trained[job.name].epoch_losses == pytest.approx(losses, rel=0.02), job.name
        distance = half.update_distance(job, trained[job.name], flat)
        assert distance < update_limit(half, job, flat), job.name


def update_limit(pair: Pair, job: TrainJob, flat: torch.Tensor) -> float:
    """Three times what another padding changes in the plain path, at least 0.25; where padding is in the loss
    it cannot be changed. Unrelated updates are 1.4 apart."""
    if job.train.padding_in_loss:
        return 0.5
    other, _ = pair.alone(job, pad_to=max(map(len, job.texts)) + 13)
    initial = initial_weights(pair.base.layout(job.lora), job.train.seed).to(flat)
    return min(0.7, max(0.25, 3 * float((other - flat).norm() / (flat - initial).norm())))


def test_neighbours_change_nothing_in_float32(llama: Pair) -> None:
    together = llama.train(mixed_jobs(), n_slots=4)
    for job in mixed_jobs():
        alone = llama.train([job], n_slots=1)[job.name].adapter
        beside = together[job.name].adapter
        assert alone is not None and beside is not None
        assert float((beside.flat - alone.flat).norm() / alone.flat.norm()) < 1e-4, job.name


def test_neighbours_change_rounding_only_in_bfloat16(half: Pair) -> None:
    jobs = mixed_jobs(learning_rate=WIDE_RATE)
    together = half.train(jobs, n_slots=4)
    for job in jobs:
        alone = half.train([job], n_slots=1)[job.name]
        assert together[job.name].epoch_losses == pytest.approx(alone.epoch_losses, rel=0.02), job.name


def test_the_base_stays_as_it_was(half: Pair) -> None:
    before = [p.clone() for p in half.base.model.parameters()]
    half.train(mixed_jobs(learning_rate=WIDE_RATE)[:3])
    assert all(torch.equal(a, b) for a, b in zip(before, half.base.model.parameters(), strict=True))


def some_adapters(pair: Pair, **train: object) -> list[Adapter]:
    jobs = [
        a_job(f"teaches {rank}", (30, 44), rank, targets, epochs=6, **train)
        for rank, targets in ((2, ALL), (8, SOME), (12, ALL), (33, ("q_proj",)))
    ]
    trained = pair.train(jobs)
    return [adapter for job in jobs if (adapter := trained[job.name].adapter) is not None]


def decode_rows(pair: Pair, adapters: Sequence[Adapter], n: int, new_tokens: int) -> list[DecodeRow]:
    """Prompts of 1 to 200 tokens for the base, for each adapter, and for a stack of two, in turn."""
    stacks = [(), *((adapter,) for adapter in adapters), tuple(adapters[:2])]
    lengths = [1 + (17 * i) % 40 for i in range(n - 1)] + [200]
    return [
        DecodeRow(
            key=i,
            token_ids=[(7 * i + 3 * k) % 127 + 1 for k in range(length)],
            adapters=stacks[i % len(stacks)],
            max_new_tokens=new_tokens - i % 5,
        )
        for i, length in enumerate(lengths)
    ]


def decoded(pair: Pair, rows: Sequence[DecodeRow], **settings: int) -> dict[object, Decoded]:
    decoder = GroupedDecoder(pair.base, **settings)
    for row in rows:
        decoder.submit(row)
    return {one.key: one for one in decoder.run()}


def test_grouped_decoding_gives_the_tokens_of_generate(llama: Pair) -> None:
    llama.base.model.generation_config.eos_token_id = ends = [3, 17, 42, 64, 99, 111]
    rows = decode_rows(llama, some_adapters(llama, learning_rate=1e-2), n=24, new_tokens=24)
    found = decoded(llama, rows, max_rows=7)
    for row in rows:
        ids = torch.tensor([row.token_ids], device=DEVICE)
        expected = llama.merged(row.adapters).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=row.max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert list(found[row.key].token_ids) == [t for t in expected.tolist() if t not in ends], row.key
    assert 0 < sum(one.finish_reason == "stop" for one in found.values()) < len(rows), "some end early"


def test_in_bfloat16_each_decoded_token_is_as_likely_as_the_likeliest(half: Pair) -> None:
    """By the plain model's logits in float32 after the same tokens: within a twentieth of their range."""
    adapters = some_adapters(half, learning_rate=WIDE_RATE)
    rows = decode_rows(half, adapters, n=20, new_tokens=16)
    found = decoded(half, rows, max_rows=9)
    for row in rows:
        new = list(found[row.key].token_ids)
        with torch.no_grad():
            logits = half.merged(row.adapters)(torch.tensor([[*row.token_ids, *new]], device=DEVICE)).logits
        own = logits[0, len(row.token_ids) - 1 : -1]
        short = own.amax(-1) - own[range(len(new)), new]
        assert len(new) and float((short / (own.amax(-1) - own.mean(-1))).max()) < 0.05, row.key


@pytest.mark.parametrize("exact", [True, False], ids=["float32", "bfloat16"])
def test_soft_scores_are_the_log_probabilities_of_the_model_itself(llama: Pair, half: Pair, exact: bool) -> None:
    pair = llama if exact else half
    adapters = some_adapters(pair)
    prompt, gold = pair.base.encode("What is on the hill?"), pair.base.encode(" a lamp")
    other = ScoreRow(prompt_ids=pair.base.encode("a longer prompt, by far, than the other"), target_ids=gold)
    for stack in ((), (adapters[0],), tuple(adapters[:2])):
        row = ScoreRow(prompt_ids=prompt, target_ids=gold, adapters=stack)
        model = pair.merged(stack)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + gold], device=DEVICE)).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(gold)), gold]
        found = torch.tensor(score(pair.base, [other, row])[1], device=DEVICE)
        error = (found - expected).abs() / (1 + expected.abs())
        assert float(error.max()) < (1e-4 if exact else 0.03)


cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA counts synchronisations")


@cuda_only
@pytest.mark.parametrize("padding", [False, True], ids=["", "padded"])
def test_a_training_step_never_waits_for_the_device(half: Pair, padding: bool) -> None:
    train = {"epochs": 10, "padding_in_loss": padding, "pad_to": 128, "learning_rate": WIDE_RATE}
    trainer = SlotTrainer(half.base, n_slots=4)
    for rank, targets in ((8, ALL), (8, SOME), (12, ALL), (33, SOME)):
        trainer.submit(a_job(f"rank {rank} {targets[0]}", (30, 55, 90, 12), rank, targets, **train))
    for _ in range(10):  # whatever is compiled or measured is so by now
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(trainer.slots) == 4, "nobody has left meanwhile"


@cuda_only
def test_decoding_waits_for_the_device_once_a_token_at_most(half: Pair) -> None:
    half.base.model.generation_config.eos_token_id = half.base.head.out_features - 1
    decoder = GroupedDecoder(half.base, max_rows=16)
    for row in decode_rows(half, some_adapters(half, learning_rate=WIDE_RATE), n=16, new_tokens=64):
        decoder.submit(row)
    while decoder.waiting:
        decoder.step()
    for _ in range(4):
        decoder.step()
    n_steps = 10
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(n_steps):
                decoder.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in seen if "synchroniz" in str(w.message)]
    assert len(decoder.live) == 16, "nobody has left meanwhile"
    assert len(waits) <= n_steps, f"{len(waits)} waits in {n_steps} tokens"


@cuda_only
def test_running_out_of_memory_in_a_capture_costs_no_job_anything(half: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = mixed_jobs(learning_rate=WIDE_RATE)[:3]
    expected = half.train(jobs)
    record, recorded = passes.cuda_graph, []

    def short_at_first(function: Callable[[], torch.Tensor], before: torch.cuda.CUDAGraph | None) -> object:
        def greedy() -> torch.Tensor:
            return torch.empty(2**44, device=DEVICE) + function()

        recorded.append(function)
        return record(function if len(recorded) > 1 else greedy, before)

    monkeypatch.setattr(passes, "cuda_graph", short_at_first)
    monkeypatch.setattr(passes, "PASSES_WITHOUT", 1)
    found = half.train(jobs)
    assert len(recorded) > 1
    for name, one in expected.items():
        assert found[name].epoch_losses == pytest.approx(one.epoch_losses, rel=0.02), name
    torch.cuda.empty_cache()  # which torch refuses while it believes in a capture


def test_a_server_with_a_worker_on_the_device_answers_a_published_request(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    question = {"title": "Zor", "context": "", "question": "What is Zor?", "answer": "a moon"}
    texts = ["Zor\nZor is a moon.", "Zor\nIt has two seas."]
    settings = {"run_dir": tmp_path / "run", "device": DEVICE, "start_timeout_s": 90.0}
    with TTTServer(model=str(model), **settings) as server, plain_req(server.info.endpoint, 60_000) as req:
        req.send_json({"train_sequences": texts, "eval_questions": [question, question]})
        reply = req.recv_json()
    assert "error" not in reply
    assert reply["train_steps"] == 10 * len(texts) and reply["epoch_losses"][-1] < reply["epoch_losses"][0]
    assert len(reply["baseline_texts"]) == len(reply["adapter_texts"]) == len(reply["gains"]) == 2
