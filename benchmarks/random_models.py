"""Random models and published job statistics, without a download: Qwen2.5-7B's configuration and small ones.

Texts are token ids written as numbers, for which a tokenizer is made here. Sizes are those of
https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.workload import ASKED_PER_PASSAGE
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import EvalQuestion, TTTRequest
from seal_nb.ttt.lora import LoraSettings, TrainJob, TrainSettings

QWEN25_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
# One sixteenth of the work of a layer in each product; for checks in float32, and for machines without GPU.
SMALL = QWEN25_7B | {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
TINY = SMALL | {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIGS = {"qwen2.5-7b": QWEN25_7B, "small": SMALL, "tiny": TINY}

# Deciles of the published self-edits after round 2: a passage and about seven implications, in tokens.
IMPLICATIONS = (5, 5, 6, 6, 7, 7, 7, 8, 8, 10)
IMPLICATION_TOKENS = (16, 20, 23, 25, 28, 30, 32, 35, 40, 50)
PASSAGE_TOKENS = (95, 118, 130, 140, 150, 163, 177, 196, 224, 300)
PROMPT_TOKENS = 40  # of a question, with its template
QUESTIONS = 5  # of a passage: 974 questions, 200 passages


def number_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """For the model of this name. Token ids as words: "17 4 2" is three tokens; any other word is one unknown
    token."""
    c = CONFIGS[name]
    words = [str(i) for i in range(c["vocab_size"])]
    words[c["eos_token_id"]], words[-1] = "<eos>", "<unk>"
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def random_model(name: str, *, device: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Weights drawn on the device itself."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**CONFIGS[name]), dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def flop_per_token(name: str) -> tuple[float, float]:
    """(of a token, of a label): the frozen products forward and back to their inputs, 4 a weight. Branches,
    attention and optimiser are left out: useful work is not counted more generously than that."""
    c = CONFIGS[name]
    d, ff = c["hidden_size"], c["intermediate_size"]
    kv = d * c["num_key_value_heads"] // c["num_attention_heads"]
    layer = 2 * d * d + 2 * d * kv + 3 * d * ff
    return 4.0 * layer * c["num_hidden_layers"], 4.0 * d * c["vocab_size"]


@dataclass(frozen=True, kw_only=True)
class JobMaker:
    """Jobs of published statistics for a vocabulary, the same ones for the same seeds."""

    vocab_size: int
    epochs: int = 10

    def text(self, draw: random.Random, n_tokens: int) -> str:
        return " ".join(str(draw.randrange(1, self.vocab_size - 1)) for _ in range(n_tokens))

    def job(self, seed: int, *, rank: int = 32, **train: Any) -> TrainJob:
        draw = random.Random(seed)
        lengths = [draw.choice(IMPLICATION_TOKENS) for _ in range(draw.choice(IMPLICATIONS))]
        lengths.append(draw.choice(PASSAGE_TOKENS))
        return TrainJob(
            name=f"job{seed}",
            texts=tuple(self.text(draw, n) for n in lengths),
            lora=LoraSettings(rank=rank, alpha=2 * rank),
            train=TrainSettings(**{"epochs": self.epochs, "seed": seed} | train),
        )

    def prompt(self, seed: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(1, self.vocab_size - 1) for _ in range(PROMPT_TOKENS)]

    def request(self, number: int, *, max_new_tokens: int = 64) -> TTTRequest:
        """One of a round: fifteen in a row ask the same five questions."""
        job, draw = self.job(number), random.Random(f"passage {number // ASKED_PER_PASSAGE}")
        n_words = PROMPT_TOKENS - len(answer_prompt("", "").split())
        return TTTRequest(
            request_id=job.name,
            seed=number,
            train_sequences=list(job.texts),
            eval_questions=[EvalQuestion(question=self.text(draw, n_words), answer="1") for _ in range(QUESTIONS)],
            finetune_epochs=self.epochs,
            max_new_tokens=max_new_tokens,
        )
