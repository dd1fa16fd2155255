"""Requests in progress: the texts that each needs and has, its training job, its scores, and its reply.

Scores of single tokens take two forward passes and no generation. A soft score is the sum over a gold answer."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, cast

from seal_nb.errors import GradingError
from seal_nb.grading.base import Grader, Verdict, answered_with
from seal_nb.prompts import answer_prompt
from seal_nb.protocol import Answers, GenerateReply, GenerateRequest, ScoredText, TTTReply, TTTRequest, build_reply
from seal_nb.tokens import tokenize
from seal_nb.ttt.base import FrozenBase
from seal_nb.ttt.decode import Decoded, ScoreRow, score
from seal_nb.ttt.device import Limit
from seal_nb.ttt.lora import Adapter, LoraSettings, TrainJob, TrainSettings, make_row
from seal_nb.ttt.trainer import Trained

log = logging.getLogger(__name__)


class Question(NamedTuple):
    """What the base's answer depends on: the key under which it is stored. stack: identities of frozen adapters."""

    stack: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    max_new_tokens: int


Key = tuple[str, int] | Question  # of a text: request id and index of the prompt; or a question to the base


@dataclass
class Generation:
    """A GenerateRequest in progress. keys: of the texts that it needs; texts: those that are there"""

    request: GenerateRequest
    texts: dict[Key, Decoded] = field(default_factory=dict)
    started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        own = ((str(self.request.request_id), i) for i in range(len(self.request.prompts)))
        self.keys: dict[Key, None] = dict.fromkeys(own)  # a set in order

    @property
    def ready(self) -> bool:
        return len(self.texts) == len(self.keys)

    def reply(self, model_id: str) -> GenerateReply:
        texts = [self.texts[key] for key in self.keys]
        return GenerateReply(
            texts=[d.text for d in texts],
            token_counts=[len(d.token_ids) for d in texts],
            finish_reasons=[d.finish_reason for d in texts],  # type: ignore[misc]
            request_id=self.request.request_id,
            seed=self.request.seed,
            timings={"answer_s": time.monotonic() - self.started_s},
            model_id=model_id,
        )


@dataclass
class Evaluation:
    """A TTTRequest in progress. keys, texts: as in Generation"""

    request: TTTRequest
    questions: list[Question]
    stack: tuple[Adapter, ...]
    texts: dict[Key, Decoded] = field(default_factory=dict)
    trained: Trained | None = None
    adapter_path: str | None = None
    scores: list[ScoredText] = field(default_factory=list)  # of all kinds of texts that are requested
    verdicts: Future[list[Verdict]] | None = None  # of all answers, those of the base first; None until graded

    def __post_init__(self) -> None:
        # Keys of the texts of the base and of the adapter, one a question; empty if not requested.
        own: list[Key] = [(str(self.request.request_id), i) for i in range(len(self.questions))]
        self.baseline = [] if self.request.skip_baseline else self.questions
        self.answers = own if self.request.training_wanted else []
        self.keys = frozenset([*self.baseline, *self.answers])
        self.timings, self.since_s = {"train_s": 0.0}, time.monotonic()

    def lap(self, name: str) -> None:
        """Record the seconds since the last lap."""
        now = time.monotonic()
        self.timings[name], self.since_s = now - self.since_s, now

    @property
    def complete(self) -> bool:
        """Whether it is trained and all its answers are there."""
        trained = self.trained is not None or not self.request.training_wanted
        return trained and len(self.texts) == len(self.keys)

    @property
    def ready(self) -> bool:
        return self.verdicts is not None and self.verdicts.done()

    def _text(self, key: Key) -> str:
        return self.texts[key].text.strip()

    def grade(self, grader: Grader) -> list[Verdict]:
        """Verdicts of all answers. If the grader fails, they are UNGRADED, so that the training is not lost."""
        answered = [
            answered_with((q.answer, *q.other_answers), question=q.question, answer=self._text(key), title=q.title)
            for keys in (self.baseline, self.answers)
            for q, key in zip(self.request.eval_questions, keys, strict=bool(keys))
        ]
        try:
            return grader.grade(answered)
        except GradingError as error:
            log.warning("%d answers stay UNGRADED: %s", len(answered), error)
            return [Verdict.UNGRADED] * len(answered)

    def reply(self, model_id: str) -> TTTReply:
        """Raises what the grader raised."""
        assert self.verdicts is not None
        request, trained, verdicts, n = self.request, self.trained, self.verdicts.result(), len(self.baseline)
        gold = [text for text in self.scores if text.kind == "gold" and request.soft_scores]
        before = self._answers(self.baseline, verdicts[:n], [(text.index, text.baseline_logprobs) for text in gold])
        after = self._answers(self.answers, verdicts[n:], [(text.index, text.adapter_logprobs) for text in gold])
        self.lap("grade_s")
        return build_reply(
            baseline=None if request.skip_baseline else before,
            adapter=after if trained else None,
            request_id=request.request_id,
            seed=request.seed,
            gold_token_counts=[n for _, n in sorted({text.index: len(text.tokens) for text in reversed(gold)}.items())],
            token_logprobs=self.scores if request.return_token_logprobs else [],
            train_tokens=trained.n_tokens if trained else 0,
            train_steps=trained.n_steps if trained else 0,
            epoch_losses=list(trained.epoch_losses) if trained else [],
            timings=self.timings,
            model_id=model_id,
            adapter_path=self.adapter_path,
        )

    def _answers(
        self, keys: Sequence[Key], verdicts: Sequence[Verdict], gold: Sequence[tuple[int, list[float | None]]]
    ) -> Answers:
        """gold: the question and the log-probabilities of the tokens of each gold answer; the likeliest one counts"""
        sums: dict[int, list[float]] = {}
        for question, values in gold:
            sums.setdefault(question, []).extend([] if None in values else [sum(cast(list[float], values))])
        best = [max(of_one, default=None) for of_one in sums.values()]
        return Answers(texts=list(map(self._text, keys)), verdicts=verdicts, gold_logprobs=best)


def train_job(request: TTTRequest, max_seq_length: int) -> TrainJob:
    """The training of a request. Raises SettingsError if a setting is out of its range."""
    rank, alpha, wanted = request.lora_rank, request.lora_alpha, request.target_modules
    targets = wanted if isinstance(wanted, str) else tuple(wanted)
    lora = LoraSettings(rank=rank, alpha=alpha, dropout=request.lora_dropout, target_modules=targets)
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


def evaluation_of(base: FrozenBase, request: TTTRequest, stack: Mapping[str, Adapter]) -> Evaluation:
    """A new request with its closed-book questions. stack: the frozen adapters by their identities. Raises
    SettingsError if the model cannot run a question, or a text that is to be scored."""
    prompts = [answer_prompt(q.title, q.question) for q in request.eval_questions]
    if request.chat:  # the template adds the special tokens
        template: Any = base.tokenizer.apply_chat_template
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    ids = [base.encode(prompt, special_tokens=not request.chat) for prompt in prompts]
    for i, one in enumerate(ids):
        base.room_after(one, f"the prompt of eval_questions[{i}]", n_new=1)
    questions = [Question(tuple(stack), tuple(one), request.max_new_tokens) for one in ids]
    evaluation = Evaluation(request, questions, tuple(stack.values()))
    texts_to_score(base, evaluation)
    return evaluation


@dataclass(frozen=True, kw_only=True)
class Text(ScoreRow):
    """A text to score. tokens: the stretch of the text of each token; only the last ones, `target_ids`, are scored"""

    kind: Literal["train", "gold", "passage"]
    index: int
    tokens: list[str]


def scored_texts(base: FrozenBase, evaluation: Evaluation, *, token_budget: Limit) -> list[ScoredText]:
    """What the request wants scored, token by token, without and (if there is one) with the adapter."""
    texts, trained = texts_to_score(base, evaluation), evaluation.trained
    adapted = []
    if trained and trained.adapter:
        adapted = [replace(text, adapters=(*text.adapters, trained.adapter)) for text in texts]
    found = score(base, texts + adapted, token_budget=token_budget)
    scored = []
    for i, text in enumerate(texts):
        no_values = [None] * (len(text.tokens) - len(text.target_ids))
        before = [*no_values, *found[i]]
        after = [*no_values, *found[len(texts) + i]] if adapted else []
        values = {"baseline_logprobs": before, "adapter_logprobs": after}
        scored.append(ScoredText(kind=text.kind, index=text.index, tokens=text.tokens, **values))
    return scored


def texts_to_score(base: FrozenBase, evaluation: Evaluation) -> list[Text]:
    """What the request wants scored; before its training, without the train sequences. Raises SettingsError if the
    model cannot run a text."""
    wanted = evaluation.request.soft_scores or evaluation.request.return_token_logprobs
    texts = list(_texts(base, evaluation)) if wanted else []
    for text in texts:
        what = f"the {text.kind} text {text.index}{' with its prompt' * (text.kind == 'gold')}"
        base.room_after([*text.prompt_ids, *text.target_ids], what)
    return texts


def _texts(base: FrozenBase, evaluation: Evaluation) -> Iterator[Text]:
    request, tokenizer = evaluation.request, base.tokenizer
    text_of = partial(Text, adapters=evaluation.stack)
    if evaluation.trained is not None and request.return_token_logprobs:
        job = evaluation.trained.job
        plain = replace(job.train, padding_in_loss=False)
        for i, text in enumerate(job.texts):
            row, (ids, tokens) = make_row(tokenizer, text, plain), pieces(tokenizer, text)
            n, first = row.n_text, row.n_text - len(row.targets)  # the tokens with loss are the last ones
            yield text_of(kind="train", index=i, tokens=tokens[:n], prompt_ids=ids[:first], target_ids=ids[first:n])
    for i, (own, question) in enumerate(zip(evaluation.questions, request.eval_questions, strict=True)):
        for gold in (question.answer, *question.other_answers):
            ids, tokens = pieces(tokenizer, gold, special_tokens=False)
            yield text_of(kind="gold", index=i, tokens=tokens, prompt_ids=own.prompt_ids, target_ids=ids)
    passages: dict[str, int] = {}
    for i, question in enumerate(request.eval_questions):
        if question.context and request.return_token_logprobs:
            passages.setdefault(f"{question.title}\n{question.context}", i)
    for passage, i in passages.items():
        ids, tokens = pieces(tokenizer, passage)
        yield text_of(kind="passage", index=i, tokens=tokens, prompt_ids=ids[:1], target_ids=ids[1:])


def pieces(tokenizer: Any, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[str]]:
    """Token ids, and the stretch of the text that each token ends. Joined, the stretches are the text. If a character
    takes several tokens, its first token has it and the others are empty."""
    ids, spans = tokenize(tokenizer, text, special_tokens=special_tokens, with_spans=True)
    stops = accumulate((stop for _, stop in spans), max, initial=0)
    return ids, [text[start:stop] for start, stop in pairwise(stops)]
