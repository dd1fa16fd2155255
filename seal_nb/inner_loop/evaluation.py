"""Requests in progress: what each has and still needs, its training job, its prompts, its scores, and its reply.

Scores of single tokens (`scored_texts`) show which tokens an adapter made more likely. They take two forward passes
over the train sequences, the gold answers and the passages, and no generation. A soft score is the sum over a gold
answer.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, cast

from seal_nb.errors import GradingError, SettingsError
from seal_nb.grading.base import Answered, Grader, Verdict
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import Answers, GenerateReply, GenerateRequest, ScoredText, TTTReply, TTTRequest, build_reply
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, DecodeRow
from seal_nb.ttt.jobs import LoraSettings, TrainJob, TrainSettings, make_row
from seal_nb.ttt.lora import Adapter
from seal_nb.ttt.loss import ScoreRow, score
from seal_nb.ttt.trainer import Trained

log = logging.getLogger(__name__)


class Question(NamedTuple):
    """What the base's answer depends on: the key under which it is stored. stack: identities of frozen adapters."""

    stack: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass
class Evaluation:
    """A TTTRequest in progress.

    baseline, answers: of the base and of the adapter, one a question; None until generated, empty if not requested
    scores: of gold answers, train sequences and passages, as far as they are requested
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
    scores: list[ScoredText] = field(default_factory=list)
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
        gold = [text for text in self.scores if text.kind == "gold" and request.soft_scores]
        timings = {"train_s": trained_s - self.started_s, "answer_s": self.answered_s - trained_s}
        return build_reply(
            baseline=None
            if request.skip_baseline
            else _answers(self.baseline, verdicts[:n], [t.baseline_logprobs for t in gold]),
            adapter=_answers(self.answers, verdicts[n:], [t.adapter_logprobs for t in gold]) if trained else None,
            request_id=request.request_id,
            seed=request.seed,
            gold_token_counts=[len(text.tokens) for text in gold],
            token_logprobs=self.scores if request.return_token_logprobs else [],
            train_tokens=trained.n_tokens if trained else 0,
            train_steps=trained.n_steps if trained else 0,
            epoch_losses=list(trained.epoch_losses) if trained else [],
            timings=timings | {"grade_s": time.monotonic() - self.answered_s},
            model_id=model_id,
            adapter_path=self.adapter_path,
        )


def _answers(texts: Sequence[str | None], verdicts: Sequence[Verdict], gold: Sequence[list[float | None]]) -> Answers:
    """gold: log-probabilities of each gold answer's tokens."""
    sums = [None if None in values else sum(cast(list[float], values)) for values in gold]
    return Answers(texts=[text or "" for text in texts], verdicts=verdicts, gold_logprobs=sums)


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
    if request.chat:  # the template adds the special tokens
        template: Any = base.tokenizer.apply_chat_template
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    ids = [base.encode(prompt, special_tokens=not request.chat) for prompt in prompts]
    return [Question(stack, tuple(one), request.max_new_tokens) for one in ids]


def decode_row(base: FrozenBase, ids: Sequence[int], max_tokens: int, **fields: Any) -> DecodeRow:
    """A prompt for the decoder. Raises SettingsError if it leaves no room in the model's context."""
    context = base.model.config.max_position_embeddings
    if len(ids) >= context:
        raise SettingsError(f"a prompt has {len(ids)} tokens and the model's context {context}; shorten it")
    return DecodeRow(token_ids=ids, max_new_tokens=min(max_tokens, context - len(ids)), **fields)


def text_rows(base: FrozenBase, request: GenerateRequest, stack: tuple[Adapter, ...]) -> Iterator[DecodeRow]:
    """The prompts of a request for the decoder, with the keys (request id, index)."""
    sampling = {"temperature": request.temperature, "top_p": request.top_p, "stop": tuple(request.stop)}
    for i, prompt in enumerate(request.prompts):
        key, seed = (str(request.request_id), i), (int(request.seed or 0) + i) % 2**63
        yield decode_row(base, base.encode(prompt), request.max_tokens, key=key, adapters=stack, seed=seed, **sampling)


@dataclass(frozen=True)
class Text:
    """A text to score. tokens: the stretch of the text of each token; the last ones, `target_ids`, get a value."""

    kind: Literal["train", "gold", "passage"]
    index: int
    tokens: list[str]
    prompt_ids: Sequence[int]
    target_ids: Sequence[int]

    def values(self, found: Sequence[float]) -> list[float | None]:
        """One value a token; None for those without a score."""
        return [None] * (len(self.tokens) - len(found)) + list(found)


def scored_texts(base: FrozenBase, evaluation: Evaluation, *, token_budget: int) -> list[ScoredText]:
    """What the request wants scored, token by token, without and (if there is one) with the adapter."""
    texts, adapter = list(_texts(base, evaluation)), evaluation.adapter
    sides = [evaluation.stack] if adapter is None else [evaluation.stack, (*evaluation.stack, adapter)]
    rows = [ScoreRow(prompt_ids=t.prompt_ids, target_ids=t.target_ids, adapters=side) for side in sides for t in texts]
    found = score(base, rows, token_budget=token_budget)
    before, after = found[: len(texts)], found[len(texts) :]
    return [
        ScoredText(
            kind=text.kind,
            index=text.index,
            tokens=text.tokens,
            baseline_logprobs=text.values(before[i]),
            adapter_logprobs=text.values(after[i]) if after else [],
        )
        for i, text in enumerate(texts)
    ]


def _texts(base: FrozenBase, evaluation: Evaluation) -> Iterator[Text]:
    request, tokenizer = evaluation.request, base.tokenizer
    if evaluation.trained is not None and request.return_token_logprobs:
        job = evaluation.trained.job
        plain = replace(job.train, padding_in_loss=False)
        for i, text in enumerate(job.texts):
            row, (ids, tokens) = make_row(tokenizer, text, plain), pieces(tokenizer, text)
            n, first = row.n_text, row.n_text - len(row.targets)  # the tokens with loss are the last ones
            yield Text("train", i, tokens[:n], ids[:first], ids[first:n])
    for i, (own, question) in enumerate(zip(evaluation.questions, request.eval_questions, strict=True)):
        ids, tokens = pieces(tokenizer, question.answer, special_tokens=False)
        yield Text("gold", i, tokens, own.prompt_ids, ids)
    passages: dict[str, int] = {}
    for i, question in enumerate(request.eval_questions):
        if question.context and request.return_token_logprobs:
            passages.setdefault(f"{question.title}\n{question.context}", i)
    for passage, i in passages.items():
        ids, tokens = pieces(tokenizer, passage)
        yield Text("passage", i, tokens, ids[:1], ids[1:])


def pieces(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[str]]:
    """Token ids, and the stretch of the text that each token ends. Joined, the stretches are the text. If a character
    takes several tokens, its first token has it and the others are empty."""
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
    stretches, reached = [], 0
    for _, stop in encoded["offset_mapping"]:
        stretches.append(text[reached : max(stop, reached)])
        reached = max(stop, reached)
    return list(encoded["input_ids"]), stretches
