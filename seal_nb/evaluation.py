"""One request under way: what it waits for, what it has, and the job it trains. Records, no machinery."""

import time
from dataclasses import dataclass, field

from seal_nb.protocol import GenerateReply, GenerateRequest, TTTRequest
from seal_nb.ttt.decode import Decoded
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.scheduler import Trained


@dataclass(frozen=True)
class Question:
    """What one answer depends on besides the adapter under training: the key of the baseline cache."""

    stack: tuple[str, ...]
    prompt: str
    max_new_tokens: int
    special_tokens: bool = True  # False: a chat template has put them in


@dataclass
class Evaluation:
    """A TTTRequest under way. `baseline` and `answers` fill up by question index."""

    request: TTTRequest
    questions: list[Question]
    stack: tuple[Adapter, ...]
    started_s: float = field(default_factory=time.monotonic)
    baseline: dict[int, str] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    trained: Trained | None = None
    trained_s: float = 0.0
    adapter_path: str | None = None

    @property
    def n_baseline(self) -> int:
        return 0 if self.request.skip_baseline else len(self.questions)

    @property
    def n_answers(self) -> int:
        return len(self.questions) if self.request.training_wanted else 0

    @property
    def complete(self) -> bool:
        trained = self.trained is not None or not self.request.training_wanted
        return trained and len(self.baseline) == self.n_baseline and len(self.answers) == self.n_answers


@dataclass
class Generation:
    """A GenerateRequest under way; `texts` fills up by prompt index."""

    request: GenerateRequest
    started_s: float = field(default_factory=time.monotonic)
    texts: dict[int, Decoded] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.texts) == len(self.request.prompts)

    def reply(self, model_id: str) -> GenerateReply:
        ordered = [self.texts[i] for i in range(len(self.request.prompts))]
        return GenerateReply(
            texts=[d.text for d in ordered],
            token_counts=[len(d.token_ids) for d in ordered],
            finish_reasons=[d.finish_reason for d in ordered],  # type: ignore[misc]
            request_id=self.request.request_id,
            seed=self.request.seed,
            timings={"answer_s": time.monotonic() - self.started_s},
            model_id=model_id,
        )


def train_job(request: TTTRequest, max_seq_length: int) -> TrainJob:
    lora = LoraSettings(
        rank=request.lora_rank,
        alpha=request.lora_alpha,
        dropout=request.lora_dropout,
        target_modules=tuple(request.target_modules),
    )
    train = TrainSettings(
        epochs=request.finetune_epochs,
        learning_rate=request.finetune_lr,
        batch_size=request.batch_size,
        gradient_accumulation_steps=request.gradient_accumulation_steps,
        max_seq_length=min(request.max_seq_length, max_seq_length),
        end_mask_substring=request.end_mask_substring,
        padding_in_loss=request.padding_in_loss,
        pad_to=request.pad_to,
        pad_samples=request.pad_samples,
        seed=int(request.seed or 0),
    )
    return TrainJob(
        name=str(request.request_id), texts=tuple(request.train_sequences), lora=lora, train=train
    )
