"""Requests in progress: what each has and still needs, its training job, its prompts, and its reply."""

import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from seal_nb.errors import GradingError, SettingsError
from seal_nb.grading.base import Answered, Grader, Verdict
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import Answers, GenerateReply, GenerateRequest, ScoredText, TTTReply, TTTRequest, build_reply
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.trainer import Trained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What the base's answer depends on: the key under which it is stored."""

    stack: tuple[str, ...]
    prompt: str
    max_new_tokens: int
    special_tokens: bool = True  # False: a chat template has added them


@dataclass
class Evaluation:
    """A TTTRequest in progress.

    baseline, answers: of the base and of the adapter, one a question; None until generated, empty if not requested
    gold: log-probabilities of the gold answers without and with the adapter, and their numbers of tokens, if requested
    tokens: log-probabilities of single tokens, if requested
    verdicts: of all answers, those of the base first
    """

    request: TTTRequest
    questions: list[Question]
    stack: tuple[Adapter, ...]
    baseline: list[str | None] = field(init=False)
    answers: list[str | None] = field(init=False)
    started_s: float = field(default_factory=time.monotonic)
    trained: Trained | None = None
    trained_s: float = 0.0
    adapter_path: str | None = None
    answered_s: float = 0.0
    gold: tuple[list[float], list[float], list[int]] = ([], [], [])
    tokens: list[ScoredText] = field(default_factory=list)
    verdicts: Future[list[Verdict]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        n = len(self.questions)
        self.baseline = [None] * (0 if self.request.skip_baseline else n)
        self.answers = [None] * (n if self.request.training_wanted else 0)

    @property
    def complete(self) -> bool:
        """Whether it is trained and all its answers are there."""
        trained = self.trained is not None or not self.request.training_wanted
        return trained and None not in self.baseline and None not in self.answers

    @property
    def adapter(self) -> Adapter | None:
        return self.trained.adapter if self.trained else None

    def set_baseline(self, question: Question, text: str) -> None:
        """Store the base's answer wherever this request asks that question."""
        if self.baseline:
            self.baseline = [
                text if own == question else old for own, old in zip(self.questions, self.baseline, strict=True)
            ]

    def drop_adapters(self) -> None:
        """Free the adapters' memory."""
        self.stack = ()
        self.trained = self.trained and replace(self.trained, adapter=None)

    def grade(self, grader: Grader) -> list[Verdict]:
        """Verdicts of all answers. If the grader fails, they are UNGRADED, so that the training is not lost."""
        answered = [
            Answered(question=q.question, gold=q.answer, answer=text or "", title=q.title)
            for texts in (self.baseline, self.answers)
            for q, text in zip(self.request.eval_questions, texts, strict=bool(texts))
        ]
        try:
            return grader.grade(answered)
        except GradingError as error:
            log.warning("%d answers stay UNGRADED: %s", len(answered), error)
            return [Verdict.UNGRADED] * len(answered)

    def reply(self, model_id: str) -> TTTReply:
        """Raises what the grader raised."""
        request, trained, verdicts, n = self.request, self.trained, self.verdicts.result(), len(self.baseline)
        trained_s = self.trained_s or self.started_s
        timings = {"train_s": trained_s - self.started_s, "answer_s": self.answered_s - trained_s}
        return build_reply(
            baseline=None if request.skip_baseline else _answers(self.baseline, verdicts[:n], self.gold[0]),
            adapter=_answers(self.answers, verdicts[n:], self.gold[1]) if trained else None,
            request_id=request.request_id,
            seed=request.seed,
            gold_token_counts=self.gold[2],
            token_logprobs=self.tokens,
            train_tokens=trained.n_tokens if trained else 0,
            train_steps=trained.n_steps if trained else 0,
            epoch_losses=list(trained.epoch_losses) if trained else [],
            timings=timings | {"grade_s": time.monotonic() - self.answered_s},
            model_id=model_id,
            adapter_path=self.adapter_path,
        )


def _answers(texts: Sequence[str | None], verdicts: Sequence[Verdict], gold_logprobs: Sequence[float]) -> Answers:
    return Answers(texts=[text or "" for text in texts], verdicts=verdicts, gold_logprobs=gold_logprobs)


@dataclass
class Generation:
    """A GenerateRequest in progress. texts: by prompt index."""

    request: GenerateRequest
    started_s: float = field(default_factory=time.monotonic)
    texts: dict[int, Decoded] = field(default_factory=dict)

    def reply(self, model_id: str) -> GenerateReply:
        texts = [self.texts[i] for i in range(len(self.request.prompts))]
        return GenerateReply(
            texts=[d.text for d in texts],
            token_counts=[len(d.token_ids) for d in texts],
            finish_reasons=[d.finish_reason for d in texts],  # type: ignore[misc]
            request_id=self.request.request_id,
            seed=self.request.seed,
            timings={"answer_s": time.monotonic() - self.started_s},
            model_id=model_id,
        )


def train_job(request: TTTRequest, max_seq_length: int) -> TrainJob:
    """The training of a request. Raises SettingsError if a setting is out of its range."""
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
        seed=int(request.seed or 0),
    )
    return TrainJob(name=str(request.request_id), texts=tuple(request.train_sequences), lora=lora, train=train)


def questions_of(base: FrozenBase, request: TTTRequest, stack: tuple[str, ...]) -> list[Question]:
    """The closed-book questions of a request. stack: identities of the frozen adapters."""
    prompts = [answer_prompt(q.title, q.question) for q in request.eval_questions]
    if request.chat:
        template: Any = base.tokenizer.apply_chat_template
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [Question(stack, prompt, request.max_new_tokens, not request.chat) for prompt in prompts]


def prompt_ids(base: FrozenBase, question: Question) -> list[int]:
    return base.encode(question.prompt, special_tokens=question.special_tokens)


def decode_row(base: FrozenBase, ids: list[int], max_tokens: int, **fields: Any) -> DecodeRow:
    """A prompt for the decoder. Raises SettingsError if it leaves no room in the model's context."""
    context = base.model.config.max_position_embeddings
    if len(ids) >= context:
        raise SettingsError(f"a prompt has {len(ids)} tokens and the model's context {context}; shorten it")
    return DecodeRow(token_ids=ids, max_new_tokens=min(max_tokens, context - len(ids)), **fields)


def answer_row(base: FrozenBase, key: Hashable, question: Question, adapters: tuple[Adapter, ...]) -> DecodeRow:
    return decode_row(base, prompt_ids(base, question), question.max_new_tokens, key=key, adapters=adapters)


def text_rows(base: FrozenBase, request: GenerateRequest, stack: tuple[Adapter, ...]) -> Iterator[DecodeRow]:
    """The prompts of a request for the decoder, with the keys (request id, index)."""
    sampling = {"temperature": request.temperature, "top_p": request.top_p, "stop": tuple(request.stop)}
    for i, prompt in enumerate(request.prompts):
        key, seed = (str(request.request_id), i), (int(request.seed or 0) + i) % 2**63
        yield decode_row(base, base.encode(prompt), request.max_tokens, key=key, adapters=stack, seed=seed, **sampling)
