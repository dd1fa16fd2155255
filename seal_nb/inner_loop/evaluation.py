"""One request under way: what it waits for, what it has, the job it trains, its reply. No machinery.

What is asked of a base, as rows for its decoder: closed-book questions, and prompts for free text.

The base's answers to questions: each generated once, however many requests ask it, and kept.

A server lives for weeks, so only the newest BASELINES_KEPT stay, some 50 MB of questions and answers of
published length. A question whose answer was forgotten is answered once more.
"""

import itertools
import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

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

    @property
    def before(self) -> list[str]:
        """The base's answers in the order of the questions; none where they are not asked for."""
        return [self.baseline[i] for i in range(self.n_baseline)]

    @property
    def after(self) -> list[str]:
        return [self.answers[i] for i in range(self.n_answers)]

    def base_said(self, question: Question, text: str) -> None:
        """Take it as the baseline's answer wherever this request asks that question."""
        if not self.request.skip_baseline:
            self.baseline |= {i: text for i, own in enumerate(self.questions) if own == question}

    def let_go_of_adapters(self) -> None:
        """Once nothing is asked of them any more."""
        self.stack = ()
        self.trained = self.trained and replace(self.trained, adapter=None)


@dataclass
class Grading:
    """A TTTRequest that has all its answers and waits for verdicts.

    `scored`: log-probabilities of the gold answers without and with the adapter, and their token counts.
    `tokens`: those of single tokens, where they are asked for.
    """

    evaluation: Evaluation
    scored: tuple[list[float], list[float], list[int]]
    tokens: list[ScoredText]
    verdicts: Future[tuple[list[Verdict], list[Verdict]]]  # of the baseline's and of the adapter's answers
    answered_s: float = field(default_factory=time.monotonic)

    @property
    def request(self) -> TTTRequest:
        return self.evaluation.request

    def reply(self, model_id: str) -> TTTReply:
        """Raises what the grader raised."""
        done, request, trained = self.evaluation, self.request, self.evaluation.trained
        verdicts = self.verdicts.result()
        trained_s = done.trained_s or done.started_s
        baseline, adapter = (
            Answers(texts=texts, verdicts=said, gold_logprobs=logprobs)
            for texts, said, logprobs in zip((done.before, done.after), verdicts, self.scored[:2], strict=True)
        )
        return build_reply(
            baseline=None if request.skip_baseline else baseline,
            adapter=adapter if trained else None,
            request_id=request.request_id,
            seed=request.seed,
            gold_token_counts=self.scored[2],
            token_logprobs=self.tokens,
            train_tokens=trained.n_tokens if trained else 0,
            train_steps=trained.n_steps if trained else 0,
            epoch_losses=list(trained.epoch_losses) if trained else [],
            timings={
                "train_s": trained_s - done.started_s,
                "answer_s": self.answered_s - trained_s,
                "grade_s": time.monotonic() - self.answered_s,
            },
            model_id=model_id,
            adapter_path=done.adapter_path,
        )


def grade(grader: Grader, evaluation: Evaluation) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts of the baseline's and of the adapter's answers, asked for at once."""
    questions, before, after = evaluation.request.eval_questions, evaluation.before, evaluation.after
    answered = [
        Answered(question=q.question, gold=q.answer, answer=text, title=q.title)
        for texts in (before, after)
        for q, text in zip(questions, texts, strict=bool(texts))
    ]
    verdicts = _verdicts(grader, answered)
    return verdicts[: len(before)], verdicts[len(before) :]


def _verdicts(grader: Grader, answered: Sequence[Answered]) -> list[Verdict]:
    """All UNGRADED where the grader cannot be used: what was trained and answered is not lost with it."""
    try:
        return grader.grade(answered)
    except GradingError as error:
        log.warning("%d answers stay UNGRADED: %s", len(answered), error)
        return [Verdict.UNGRADED] * len(answered)


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
    return TrainJob(name=str(request.request_id), texts=tuple(request.train_sequences), lora=lora, train=train)


def questions(base: FrozenBase, request: TTTRequest, stack: tuple[str, ...]) -> list[Question]:
    """Those of a request; ``stack``: identities of the adapters beneath the one under training."""
    prompts = [_worded(base, answer_prompt(q.title, q.question), request) for q in request.eval_questions]
    return [Question(stack, prompt, request.max_new_tokens, not request.chat) for prompt in prompts]


def _worded(base: FrozenBase, prompt: str, request: TTTRequest) -> str:
    if not request.chat:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_ids(base: FrozenBase, question: Question) -> list[int]:
    return base.encode(question.prompt, special_tokens=question.special_tokens)


def answer_row(base: FrozenBase, key: Hashable, question: Question, adapters: tuple[Adapter, ...]) -> DecodeRow:
    """Raises SettingsError where the prompt leaves no room in the model's context."""
    ids = prompt_ids(base, question)
    room = _room(base, len(ids), question.max_new_tokens)
    return DecodeRow(key=key, token_ids=ids, adapters=adapters, max_new_tokens=room)


def text_rows(base: FrozenBase, request: GenerateRequest, stack: tuple[Adapter, ...]) -> Iterator[DecodeRow]:
    """One for each prompt; its key is (request id, place). Raises as `answer_row`."""
    for i, prompt in enumerate(request.prompts):
        ids = base.encode(prompt)
        yield DecodeRow(
            key=(str(request.request_id), i),
            token_ids=ids,
            adapters=stack,
            max_new_tokens=_room(base, len(ids), request.max_tokens),
            temperature=request.temperature,
            top_p=request.top_p,
            seed=(int(request.seed or 0) + i) % 2**63,
            stop=tuple(request.stop),
        )


def _room(base: FrozenBase, n_prompt: int, max_tokens: int) -> int:
    """New tokens that fit into the model's context after the prompt."""
    context = base.model.config.max_position_embeddings
    if n_prompt >= context:
        raise SettingsError(f"a prompt has {n_prompt} tokens and the model's context {context}; shorten it")
    return min(max_tokens, context - n_prompt)


BASELINES_KEPT = 100_000  # answers


class Baselines:
    """Answers by question; a question that is being answered is in here without one."""

    def __init__(self) -> None:
        self._answers: dict[Question, str | None] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, question: Question) -> bool:
        """It has been answered, or is being answered."""
        return question in self._answers

    def get(self, question: Question) -> str | None:
        return self._answers.get(question)

    def asked(self, question: Question) -> None:
        self._answers[question] = None

    def answered(self, question: Question, text: str) -> None:
        """Keep it, and forget the oldest if there are too many."""
        self._answers[question] = text
        for key in list(itertools.islice(self._answers, max(0, len(self) - BASELINES_KEPT))):
            if self._answers[key] is not None:  # others wait for what is being answered
                del self._answers[key]

    def failed(self, question: Question) -> None:
        del self._answers[question]
